"""The `dora-fx` command: `main.py` dispatches, one file per sub-command, the rest is what they share."""
