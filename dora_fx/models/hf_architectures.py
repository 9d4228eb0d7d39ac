"""The supported Hugging Face architectures, one record per `model_type`.

All are decoders with an RMSNorm before attention and MLP, rotary positions, grouped-query attention and a SwiGLU MLP,
or in its place a router and experts that are such MLPs.
Loading, exporting, importing, merging and digests take the names of Hugging Face layers from these records.

Experts have the names of checkpoints on the hub, where each expert has tensors of its own. transformers holds the
experts of a layer in two tensors (`fused_experts.py`), and writes the hub's names by default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dora_fx.megatron import expert_number_maybe, with_expert_number

# Megatron's linear layers within a layer of the decoder, and the one after it.
LINEAR_QKV, LINEAR_PROJ = "self_attention.linear_qkv", "self_attention.linear_proj"
LINEAR_FC1, LINEAR_FC2 = "mlp.linear_fc1", "mlp.linear_fc2"
# Those of an expert, with a place for its number in the whole model.
EXPERT_FC1, EXPERT_FC2 = "mlp.experts.local_experts.{}.linear_fc1", "mlp.experts.local_experts.{}.linear_fc2"
ROUTER = "mlp.router"
OUTPUT_LAYER = "output_layer"
_Q_LAYERNORM, _K_LAYERNORM = "self_attention.q_layernorm", "self_attention.k_layernorm"

# Names around the layers, the same in all architectures. A decoder that was saved by itself lacks the prefix.
DECODER_PREFIX = "model."
LAYERS, LM_HEAD = "model.layers", "lm_head"
EMBEDDING_WEIGHT, FINAL_NORM_WEIGHT, OUTPUT_WEIGHT = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
# Old checkpoints hold these frequencies; transformers computes them from the config.
ROTARY_FREQUENCIES = "rotary_emb.inv_freq"
# transformers' own parameters of a layer with experts: `[E, 2 f, h]` with gate before up, `[E, h, f]` and `[E, h]`.
FUSED_FC1, FUSED_FC2, FUSED_ROUTER = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate"


@dataclass(frozen=True)
class HFArchitecture:
    """Tensor names in checkpoints of one `model_type`, and the options of its configs that are supported.

    Attributes:
        model_type: the name in config.json.
        linears: Megatron linear layer -> the Hugging Face layers that share its rows: one for each of its blocks
            (query, key and value; gate and up), or a single one that holds the blocks one after another. Names of an
            expert's layers have a place for its number.
        router: the Hugging Face layer that chooses experts; None for a model that has none.
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
    router: str | None = None
    qkv_bias: bool = False
    unset: tuple[str, ...] = ("attention_bias", "mlp_bias")
    gguf: str | None = None
    gguf_rotary_pairs: bool = False

    @property
    def plain_modules(self) -> dict[str, str]:
        """Megatron module -> Hugging Face module, of those that have the same weight: the norms and the router."""
        return {**self.norms, ROUTER: self.router} if self.router else {**self.norms}

    @property
    def qk_layernorm(self) -> bool:
        """True if each head of query and key is normalised."""
        return _Q_LAYERNORM in self.norms

    def names_of(self, linear: str) -> tuple[str, ...]:
        """Return the Hugging Face layers that share the rows of a Megatron linear layer; none if it has no counterpart.

        Args:
            linear: its name within a layer of the decoder; that of an expert has its number.
        """
        number = expert_number_maybe(linear)
        return tuple(name.format(number) for name in self.linears.get(numberless(linear), ()))

    def linears_of_layer(self, experts: Sequence[int]) -> dict[str, tuple[str, ...]]:
        """Return `linears` with the numbers of these experts filled in."""
        return {
            linear.format(number): tuple(name.format(number) for name in names)
            for linear, names in self.linears.items()
            for number in (experts if linear in (EXPERT_FC1, EXPERT_FC2) else (0,))
        }

    def linear_paths(self, num_layers: int, num_experts: int) -> tuple[str, ...]:
        """Paths of all linear layers of a model with so many layers, and so many experts in each of them."""
        names = [name for parts in self.linears_of_layer(range(num_experts)).values() for name in parts]
        return (*(f"{LAYERS}.{i}.{name}" for i in range(num_layers) for name in names), LM_HEAD)


def is_fc1(linear: str) -> bool:
    """Return whether a layer, by its path or its name within a layer, holds gate and up, of the MLP or of an expert."""
    return numberless(linear).endswith((LINEAR_FC1, EXPERT_FC1))


def is_expert_fc2(linear: str) -> bool:
    """Return whether a layer is an expert's second one, which is sharded along its columns."""
    return numberless(linear).endswith(EXPERT_FC2)


def numberless(linear: str) -> str:
    """Return a Megatron layer's name with `{}` instead of an expert's number, as `linears` has it."""
    return with_expert_number(linear, "{}")


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
_ATTENTION = {linear: _LLAMA.linears[linear] for linear in (LINEAR_QKV, LINEAR_PROJ)}
# Layers with a dense MLP, and a loss of the router beside the model's, have no counterpart here.
_QWEN3_MOE = dataclasses.replace(
    _QWEN3,
    model_type="qwen3_moe",
    linears={
        **_ATTENTION,
        EXPERT_FC1: ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
        EXPERT_FC2: ("mlp.experts.{}.down_proj",),
    },
    router="mlp.gate",
    unset=(*_QWEN3.unset, "mlp_only_layers", "output_router_logits"),
    gguf=None,
)
_MIXTRAL = dataclasses.replace(
    _LLAMA,
    model_type="mixtral",
    linears={
        **_ATTENTION,
        EXPERT_FC1: ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
        EXPERT_FC2: ("block_sparse_moe.experts.{}.w2",),
    },
    router="block_sparse_moe.gate",
    unset=(*_LLAMA.unset, "router_jitter_noise", "output_router_logits"),
    gguf=None,
    gguf_rotary_pairs=False,
)

HF_ARCHITECTURES = {hf.model_type: hf for hf in (_LLAMA, _MISTRAL, _QWEN2, _QWEN3, _PHI3, _QWEN3_MOE, _MIXTRAL)}
SUPPORTED_MODEL_TYPES = tuple(HF_ARCHITECTURES)
GGUF_ARCHITECTURES = {hf.gguf: hf for hf in HF_ARCHITECTURES.values() if hf.gguf is not None}
# For a Megatron model of unknown origin, without experts or with them: most architectures share these names.
DEFAULT_ARCHITECTURE, DEFAULT_EXPERTS_ARCHITECTURE = _LLAMA, _QWEN3_MOE
