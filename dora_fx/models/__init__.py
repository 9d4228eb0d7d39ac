"""Megatron-Core GPT models with the weights of Hugging Face checkpoints.

config, state_dict -> GPTArchitecture -> full Megatron tensors -> this rank's shards in a GPTModel
"""

from dora_fx.models.architecture import GPTArchitecture, UnsupportedModelError, architecture_of, with_query_groups
from dora_fx.models.gpt_model import build_gpt_model, causal_mask
from dora_fx.models.hf_checkpoint import HFCheckpoint, load_hf_checkpoint

__all__ = [
    "GPTArchitecture",
    "HFCheckpoint",
    "UnsupportedModelError",
    "architecture_of",
    "build_gpt_model",
    "causal_mask",
    "load_hf_checkpoint",
    "with_query_groups",
]
