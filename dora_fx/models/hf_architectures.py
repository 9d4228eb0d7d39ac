"""The supported Hugging Face architectures, one record per `model_type`.

All are decoders with an RMSNorm before attention and MLP, rotary positions, grouped-query attention and a SwiGLU MLP.
Loading, exporting, importing, merging and digests take the names of Hugging Face layers from these records.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

# Megatron's linear layers within a layer of the decoder, and the one after it.
LINEAR_QKV, LINEAR_PROJ = "self_attention.linear_qkv", "self_attention.linear_proj"
LINEAR_FC1, LINEAR_FC2 = "mlp.linear_fc1", "mlp.linear_fc2"
OUTPUT_LAYER = "output_layer"
_Q_LAYERNORM, _K_LAYERNORM = "self_attention.q_layernorm", "self_attention.k_layernorm"

# Names around the layers, the same in all architectures. A decoder that was saved by itself lacks the prefix.
DECODER_PREFIX = "model."
LAYERS, LM_HEAD = "model.layers", "lm_head"
EMBEDDING_WEIGHT, FINAL_NORM_WEIGHT, OUTPUT_WEIGHT = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
# Old checkpoints hold these frequencies; transformers computes them from the config.
ROTARY_FREQUENCIES = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class HFArchitecture:
    """Tensor names in checkpoints of one `model_type`, and the options of its configs that are supported.

    Attributes:
        model_type: the name in config.json.
        linears: Megatron linear layer -> the Hugging Face layers that share its rows: one for each of its blocks
            (query, key and value; gate and up), or a single one that holds the blocks one after another.
        norms: Megatron norm -> Hugging Face norm.
        qkv_bias: whether query, key and value have a bias; other layers have none.
        unset: fields of a config that must be absent, None, False or zero.
        gguf: `general.architecture` of GGUF files with such a model; None where llama.cpp has no name of its own.
        gguf_rotary_pairs: whether llama.cpp stores the rows of q and k as pairs of rotary dimensions; transformers
            stores two halves.
    """

    model_type: str
    linears: Mapping[str, tuple[str, ...]]
    norms: Mapping[str, str]
    qkv_bias: bool = False
    unset: tuple[str, ...] = ("attention_bias", "mlp_bias", "quantization_config")
    gguf: str | None = None
    gguf_rotary_pairs: bool = False

    @property
    def qk_layernorm(self) -> bool:
        """True if each head of query and key is normalised."""
        return _Q_LAYERNORM in self.norms

    def linear_paths(self, num_layers: int) -> tuple[str, ...]:
        """Paths of all linear layers of a model with so many layers."""
        names = [name for parts in self.linears.values() for name in parts]
        return (*(f"{LAYERS}.{i}.{name}" for i in range(num_layers) for name in names), LM_HEAD)


_LLAMA = HFArchitecture(
    model_type="llama",
    linears={
        LINEAR_QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        LINEAR_PROJ: ("self_attn.o_proj",),
        LINEAR_FC1: ("mlp.gate_proj", "mlp.up_proj"),
        LINEAR_FC2: ("mlp.down_proj",),
    },
    norms={"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"},
    gguf="llama",
    gguf_rotary_pairs=True,
)
# Converters write Mistral models as architecture llama.
_MISTRAL = dataclasses.replace(_LLAMA, model_type="mistral", gguf=None)
_QWEN2 = dataclasses.replace(_LLAMA, model_type="qwen2", qkv_bias=True, gguf="qwen2", gguf_rotary_pairs=False)
_QWEN3 = dataclasses.replace(
    _LLAMA,
    model_type="qwen3",
    norms={**_LLAMA.norms, _Q_LAYERNORM: "self_attn.q_norm", _K_LAYERNORM: "self_attn.k_norm"},
    gguf="qwen3",
    gguf_rotary_pairs=False,
)
# Its dropout after attention and MLP has no counterpart here.
_PHI3 = dataclasses.replace(
    _LLAMA,
    model_type="phi3",
    linears={**_LLAMA.linears, LINEAR_QKV: ("self_attn.qkv_proj",), LINEAR_FC1: ("mlp.gate_up_proj",)},
    unset=(*_LLAMA.unset, "resid_pdrop", "embd_pdrop"),
    gguf="phi3",
    gguf_rotary_pairs=False,
)

HF_ARCHITECTURES = {hf.model_type: hf for hf in (_LLAMA, _MISTRAL, _QWEN2, _QWEN3, _PHI3)}
SUPPORTED_MODEL_TYPES = tuple(HF_ARCHITECTURES)
GGUF_ARCHITECTURES = {hf.gguf: hf for hf in HF_ARCHITECTURES.values() if hf.gguf is not None}
# For a Megatron model of unknown origin: most architectures share these names.
DEFAULT_ARCHITECTURE = _LLAMA
