"""What is computed once per optimizer step, and whether it still holds."""
