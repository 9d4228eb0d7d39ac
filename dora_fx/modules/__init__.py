"""The modules that stand in for linear layers: the wrapper, its parameters and their state dicts."""
