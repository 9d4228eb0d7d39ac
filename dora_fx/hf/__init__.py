"""Adapters as Hugging Face PEFT knows them, and back; streams of them, and merged models."""

from dora_fx.hf.adapter_checks import one_dropout
from dora_fx.hf.adapter_source import split_adapter
from dora_fx.hf.digests import base_digests
from dora_fx.hf.export_adapter import export_hf, iter_adapter
from dora_fx.hf.import_adapter import import_hf
from dora_fx.hf.merged_comparison import LayerGap, MergedComparison, compare_merged
from dora_fx.hf.merged_model import merged_state_dict, save_hf_model
from dora_fx.hf.merged_stream import iter_merged
from dora_fx.hf.peft_files import PeftModule, warn_of_tied_output, write_peft_adapter
from dora_fx.hf.save_pretrained import AdapterSaver

__all__ = [
    "AdapterSaver",
    "LayerGap",
    "MergedComparison",
    "PeftModule",
    "base_digests",
    "compare_merged",
    "export_hf",
    "import_hf",
    "iter_adapter",
    "iter_merged",
    "merged_state_dict",
    "one_dropout",
    "save_hf_model",
    "split_adapter",
    "warn_of_tied_output",
    "write_peft_adapter",
]
