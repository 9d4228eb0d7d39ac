"""Adapters as Hugging Face PEFT knows them, and back."""

from dora_fx.hf.export_adapter import export_hf
from dora_fx.hf.import_adapter import import_hf

__all__ = ["export_hf", "import_hf"]
