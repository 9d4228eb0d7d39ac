"""The command line: `main.py` parses and dispatches, `commands.py` lists the sub-commands, each has a file."""
