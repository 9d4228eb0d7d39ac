"""Adapters as Hugging Face PEFT knows them, and back."""

from dora_fx.hf.compare_merged import LayerGap, MergedComparison, compare_merged
from dora_fx.hf.export_adapter import export_hf, iter_adapter
from dora_fx.hf.import_adapter import import_hf
from dora_fx.hf.iter_merged import iter_merged
from dora_fx.hf.save_pretrained import AdapterSaver

__all__ = [
    "AdapterSaver",
    "LayerGap",
    "MergedComparison",
    "compare_merged",
    "export_hf",
    "import_hf",
    "iter_adapter",
    "iter_merged",
]
