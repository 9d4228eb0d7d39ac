"""The `dora-fx` command: trains adapters on texts, and chats with, exports, merges and inspects them.

The library imports nothing of this package and works without it.
"""
