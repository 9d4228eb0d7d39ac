"""Builds a Megatron-Core GPTModel or HybridModel and copies a Hugging Face checkpoint into it."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from dora_fx.files import listed
from dora_fx.megatron import expert_number_maybe
from dora_fx.models.architecture import GPTArchitecture, architecture_of, with_query_groups
from dora_fx.models.decoder_names import parameters_by_gpt_name
from dora_fx.models.fused_experts import per_expert
from dora_fx.models.hf_architectures import (
    EMBEDDING_WEIGHT,
    FINAL_NORM_WEIGHT,
    HF_ARCHITECTURES,
    LAYERS,
    OUTPUT_WEIGHT,
    SUPPORTED_MODEL_TYPES,
    HFArchitecture,
    is_expert_fc2,
)
from dora_fx.models.layer_tensors import hf_layer_names, megatron_layer_tensors, shard_of
from dora_fx.models.megatron_settings import check_states
from dora_fx.models.model_tensors import raise_for_names
from dora_fx.models.specs import Spec, check_spec, default_spec, empty_model

logger = logging.getLogger(__name__)


def build_gpt_model(
    config: Any,
    state_dict: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    num_query_groups: int | None = None,
    sequence_parallel: bool = False,
    spec: Spec | None = None,
) -> nn.Module:
    """Build a Megatron GPTModel or HybridModel that computes what the Hugging Face model computes.

    Megatron's model-parallel groups must exist (`dora_fx.megatron.world`). Each rank holds the layers of its pipeline
    stage, its tensor-parallel shards of them, and its share of the experts. Logits are `[b, s, vocab/tp]`. Pass
    `causal_mask(s, device)` as the attention mask. `export_hf` writes adapters under the checkpoint's names.

    Args:
        config: the checkpoint's transformers config.
        state_dict: the checkpoint's tensors, as the transformers model or checkpoints on the hub name them.
        dtype: of the parameters, float32 or bfloat16.
        device: "cpu" or "cuda" (the current device).
        num_query_groups: pad with query groups of zeros up to this number; the model computes the same. The default
            is the least number that the tensor-parallel size divides.
        sequence_parallel: shard the sequence between the tensor-parallel layers.
        spec: "local" for a GPTModel of Megatron's own layers, "te" for a GPTModel of Transformer Engine's layers,
            "te_grouped" for the same with grouped experts, "hybrid" for a HybridModel of Transformer Engine's layers.
            The default is "te" on CUDA where Transformer Engine is installed, and "local" elsewhere. An adapter trained
            on one GPTModel loads on the others.

    Raises:
        UnsupportedModelError: the config has a feature that this model would compute differently.
        ValueError: the checkpoint's tensors are not those of its config, a size is not divisible by a parallel size,
            the spec has no experts, or packages that the spec needs are missing; the message names them.
    """
    spec = default_spec(device) if spec is None else spec
    check_spec(spec)
    unpadded = architecture_with_tensors(config, state_dict)
    state_dict = per_expert(unpadded.hf, state_dict)
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    _check_stages(unpadded)
    # Megatron shards linear_qkv by whole query groups.
    if num_query_groups is None:
        num_query_groups = math.ceil(unpadded.num_query_groups / tp_size) * tp_size
    architecture = with_query_groups(unpadded, num_query_groups)
    _check_divisible(architecture, tp_size)
    _check_names(architecture, state_dict)
    if architecture.tied_embeddings and parallel_state.get_pipeline_model_parallel_world_size() > 1:
        # The embedding and the output layer are on different stages. The base is frozen, so two copies stay equal.
        architecture = dataclasses.replace(architecture, tied_embeddings=False)
        state_dict = {**state_dict, OUTPUT_WEIGHT: state_dict[EMBEDDING_WEIGHT]}
    model = empty_model(architecture, spec, dtype, device, sequence_parallel)
    _copy_weights(architecture, state_dict, model)
    _note_padding(model, unpadded, architecture)
    model.hf_model_type = architecture.hf.model_type  # read by known_architecture_maybe
    return model


def known_architecture_maybe(model: Any, stated: str | None) -> HFArchitecture | None:
    """Return the architecture whose names a Megatron model's layers have; None where nobody says it.

    Args:
        model: without wrappers. One of `build_gpt_model` knows the checkpoint that it was built from.
        stated: a `model_type` by the caller, None to go by the model.

    Raises:
        ValueError: the statement is no known type, names layers otherwise than that checkpoint, or is of an
            architecture with other norms or biases.
    """
    if stated is not None and stated not in SUPPORTED_MODEL_TYPES:
        raise ValueError(f"model_type: found {stated!r}, expected one of {', '.join(SUPPORTED_MODEL_TYPES)}")
    noted = getattr(model, "hf_model_type", None)
    built_from = None if noted is None else HF_ARCHITECTURES[noted]
    if stated is None:
        return built_from
    hf = HF_ARCHITECTURES[stated]
    if built_from is not None and built_from.linears != hf.linears:
        raise ValueError(f"model_type: found {stated!r}, expected {noted!r}, which the model was built from")
    check_states(
        model.config,
        model_type=stated,
        qkv_bias=hf.qkv_bias,
        qk_layernorm=hf.qk_layernorm,
        has_experts=hf.router is not None,
    )
    return hf


def architecture_with_tensors(config: Any, state_dict: Mapping[str, Tensor]) -> GPTArchitecture:
    """Call `architecture_of`, but untie the output layer if its tensor differs from the embedding.

    transformers does the same for a config with `tie_word_embeddings` and such tensors.
    """
    architecture = architecture_of(config)
    embedding, output = state_dict.get(EMBEDDING_WEIGHT), state_dict.get(OUTPUT_WEIGHT)
    if not architecture.tied_embeddings or embedding is None or output is None or embedding is output:
        return architecture
    return dataclasses.replace(architecture, tied_embeddings=torch.equal(embedding, output))


def causal_mask(sequence_length: int, device: torch.device | str) -> Tensor:
    """Make Megatron's boolean mask `[1, 1, s, s]`, True where attention is not allowed.

    Without a mask Megatron makes its own, and always on CUDA.
    """
    ones = torch.ones(1, 1, sequence_length, sequence_length, dtype=torch.bool, device=device)
    return ones.triu(diagonal=1)


def separating_mask(sample: Tensor) -> Tensor:
    """Make Megatron's boolean mask `[b, 1, s, s]` for packed samples, True where attention is not allowed.

    A position attends to the positions of its own sample up to itself.

    Args:
        sample: index of the sample that each token belongs to, `[b, s]`, not decreasing along a sequence.
    """
    others = sample[:, None, :, None] != sample[:, None, None, :]
    return others | causal_mask(sample.shape[1], sample.device)


def _check_divisible(architecture: GPTArchitecture, tp_size: int) -> None:
    ep_size = parallel_state.get_expert_model_parallel_world_size()
    etp_size = parallel_state.get_expert_tensor_parallel_world_size()
    if architecture.experts is None and ep_size > 1:
        raise ValueError(f"the expert-parallel size is {ep_size}, expected 1 for a model without experts")
    of_mlp = ("tensor", tp_size) if architecture.experts is None else ("expert-tensor", etp_size)
    for name, kind, parallel_size in (
        ("num_query_groups", "tensor", tp_size),
        ("ffn_hidden_size", *of_mlp),
        ("vocab_size", "tensor", tp_size),
        ("num_experts", "expert", ep_size),
    ):
        size = getattr(architecture, name)
        if size % parallel_size:
            raise ValueError(f"{name} is {size}, expected a multiple of the {kind}-parallel size {parallel_size}")


def _check_stages(architecture: GPTArchitecture) -> None:
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    if architecture.num_layers % stages:
        raise ValueError(f"found {architecture.num_layers} layers, expected a multiple of the {stages} pipeline stages")


def _note_padding(model: Any, unpadded: GPTArchitecture, padded: GPTArchitecture) -> None:
    """Note on the attention's linear layers how many features are padding, which adapters leave alone."""
    groups = padded.num_query_groups - unpadded.num_query_groups
    heads_size = groups * padded.queries_per_group * padded.kv_channels
    attentions = [layer.self_attention for layer in model.decoder.layers]
    # A HybridModel's MLP layers have no attention.
    for attention in (attention for attention in attentions if hasattr(attention, "linear_qkv")):
        attention.linear_proj.padded_in_features = heads_size
        attention.linear_qkv.padded_out_features = heads_size + 2 * groups * padded.kv_channels


def _check_names(architecture: GPTArchitecture, state_dict: Mapping[str, Tensor]) -> None:
    expected = {EMBEDDING_WEIGHT, FINAL_NORM_WEIGHT, OUTPUT_WEIGHT}
    names = hf_layer_names(architecture)
    expected |= {f"{LAYERS}.{i}.{name}" for i in range(architecture.num_layers) for name in names}
    missing, unexpected = expected - set(state_dict), set(state_dict) - expected
    if architecture.tied_embeddings:
        missing.discard(OUTPUT_WEIGHT)
    raise_for_names("the checkpoint's tensors are not those of its config", missing, unexpected)


def full_tensors(
    architecture: GPTArchitecture,
    state_dict: Mapping[str, Tensor],
    layers: Iterable[int],
    experts: Sequence[int] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (parameter name in a GPTModel of the local spec, full tensor) for these layers and the model's ends.

    Of the experts those with these numbers are taken, by default all.
    """
    yield "embedding.word_embeddings.weight", state_dict[EMBEDDING_WEIGHT]
    for index in layers:
        hf = {name: state_dict[f"{LAYERS}.{index}.{name}"] for name in hf_layer_names(architecture, experts)}
        for name, tensor in megatron_layer_tensors(architecture, hf, experts).items():
            yield f"decoder.layers.{index}.{name}", tensor
    yield "decoder.final_layernorm.weight", state_dict[FINAL_NORM_WEIGHT]
    if not architecture.tied_embeddings:
        yield "output_layer.weight", state_dict[OUTPUT_WEIGHT]


# Tensors that only one pipeline stage has.
_ENDS = ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight")


@torch.no_grad()
def _copy_weights(architecture: GPTArchitecture, state_dict: Mapping[str, Tensor], model: Any) -> None:
    dense, of_experts = (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_expert_tensor_parallel_group(),
    )
    parameters = parameters_by_gpt_name(model)
    # The layers of this pipeline stage, and this rank's experts.
    layers = sorted({int(name.split(".")[2]) for name in parameters if name.startswith("decoder.layers.")})
    experts = sorted({number for name in parameters if (number := expert_number_maybe(name)) is not None})
    for name, full in full_tensors(architecture, state_dict, layers, experts):
        if name not in parameters and name in _ENDS and not (model.pre_process and model.post_process):
            # It belongs to another pipeline stage.
            continue
        parameter = parameters.pop(name)
        if expert_number_maybe(name) is not None:
            # Transformer Engine does not mark shards whose collectives the token dispatcher took over.
            dim = int(is_expert_fc2(name.rpartition(".")[0]))
            full = shard_of(name, full, dim, of_experts.rank(), of_experts.size())
        elif getattr(parameter, "tensor_model_parallel", False):
            full = shard_of(name, full, parameter.partition_dim, dense.rank(), dense.size())  # type: ignore[attr-defined]
        if full.shape != parameter.shape:
            raise ValueError(f"{name}: the checkpoint has {tuple(full.shape)}, expected {tuple(parameter.shape)}")
        parameter.copy_(full)
    if parameters:
        raise ValueError(f"the checkpoint has no tensor for {listed(set(parameters))}")
    logger.info("copied %d layers of tensor-parallel rank %d of %d", len(layers), dense.rank(), dense.size())
