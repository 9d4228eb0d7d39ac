"""The `dora-fx` command: what it takes beside the library to train on a text, and to use what was trained.

The library imports nothing of it, and is what remains when this folder is deleted.
"""
