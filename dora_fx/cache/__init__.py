"""The cache of what is computed once per optimizer step, and the detection of stale values."""
