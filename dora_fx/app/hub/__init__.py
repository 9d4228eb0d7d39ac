"""Repositories of the Hugging Face hub: the commit of a name, its files in the local cache, errors of one line."""

from dora_fx.app.hub.hub_errors import Kind
from dora_fx.app.hub.hub_repository import HubRepository, pinned_name

__all__ = ["HubRepository", "Kind", "pinned_name"]
