"""Loads Hugging Face directories and GGUF files, and builds Megatron models with their weights.

config, state_dict -> GPTArchitecture -> full Megatron tensors -> this rank's shards in a GPTModel or a HybridModel
"""

from dora_fx.models.architecture import (
    Experts,
    GPTArchitecture,
    UnsupportedModelError,
    architecture_of,
    with_query_groups,
)
from dora_fx.models.base_files import CONFIG, GENERATION_CONFIG, companion_files, copy_companions, write_config
from dora_fx.models.chat_templates import apply_chat_template
from dora_fx.models.decoder_names import FINAL_NORM, DecoderNames
from dora_fx.models.gpt_model import (
    architecture_with_tensors,
    build_gpt_model,
    causal_mask,
    full_tensors,
    known_architecture_maybe,
    separating_mask,
)
from dora_fx.models.hf_architectures import (
    DEFAULT_ARCHITECTURE,
    DEFAULT_EXPERTS_ARCHITECTURE,
    EMBEDDING_WEIGHT,
    FINAL_NORM_WEIGHT,
    HF_ARCHITECTURES,
    LAYERS,
    LM_HEAD,
    OUTPUT_LAYER,
    ROUTER,
    SUPPORTED_MODEL_TYPES,
    HFArchitecture,
)
from dora_fx.models.hf_checkpoint import HFCheckpoint, load_hf_checkpoint, load_hf_config, load_hf_tokenizer
from dora_fx.models.hf_parts import HFParts, check_size
from dora_fx.models.megatron_settings import check_settings
from dora_fx.models.model_tensors import empty_model
from dora_fx.models.specs import Spec, check_spec, default_spec, empty_gpt_model

__all__ = [
    "CONFIG",
    "DEFAULT_ARCHITECTURE",
    "DEFAULT_EXPERTS_ARCHITECTURE",
    "EMBEDDING_WEIGHT",
    "FINAL_NORM",
    "FINAL_NORM_WEIGHT",
    "GENERATION_CONFIG",
    "HF_ARCHITECTURES",
    "LAYERS",
    "LM_HEAD",
    "OUTPUT_LAYER",
    "ROUTER",
    "SUPPORTED_MODEL_TYPES",
    "DecoderNames",
    "Experts",
    "GPTArchitecture",
    "HFArchitecture",
    "HFCheckpoint",
    "HFParts",
    "Spec",
    "UnsupportedModelError",
    "apply_chat_template",
    "architecture_of",
    "architecture_with_tensors",
    "build_gpt_model",
    "causal_mask",
    "check_settings",
    "check_size",
    "check_spec",
    "companion_files",
    "copy_companions",
    "default_spec",
    "empty_gpt_model",
    "empty_model",
    "full_tensors",
    "known_architecture_maybe",
    "load_hf_checkpoint",
    "load_hf_config",
    "load_hf_tokenizer",
    "separating_mask",
    "with_query_groups",
    "write_config",
]
