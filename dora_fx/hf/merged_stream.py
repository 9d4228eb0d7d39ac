"""The merged model as a stream of Hugging Face tensors, from any layout, with the model left as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from dora_fx.attach import NOTHING_ADAPTED, merge_problem_maybe, merged_weight
from dora_fx.function import ParameterPlacement
from dora_fx.hf.base_names import warn_of_assumed_names
from dora_fx.hf.layers import (
    NamedLinear,
    gpt_config,
    named_architecture,
    named_linears,
    num_hf_layers,
    true_vocabulary,
)
from dora_fx.hf.send import send_units
from dora_fx.hf.transformers_model import merged_tensors, speaks_for_all, transformers_model_maybe
from dora_fx.megatron import Model, check_unsharded, chunks_of, unwrap, walk
from dora_fx.models import (
    EMBEDDING_WEIGHT,
    FINAL_NORM,
    FINAL_NORM_WEIGHT,
    LAYERS,
    OUTPUT_LAYER,
    DecoderNames,
    HFArchitecture,
    HFParts,
)
from dora_fx.modules import DoRALinear, LinearSpec, gather_whole
from dora_fx.ranks import gather_objects, raise_on_every_rank, world_group

_EMBEDDING = "embedding.word_embeddings"

# What is computed of one module of a stage, by all of its tensor-parallel ranks: Hugging Face name -> whole tensor.
Unit = Callable[[], Mapping[str, Tensor]]


def iter_merged(
    model: Model,
    *,
    dtype: torch.dtype | None = None,
    every_rank: bool = False,
    vocab_size: int | None = None,
    model_type: str | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Stream all weights of the merged model, whole, under Hugging Face names; the model itself is not changed.

    Every rank calls it and takes the stream to its end: what is yielded has been sent. The order is that of the layers,
    whatever the layout. Beyond the model it needs memory for one linear layer, whole, in float32 and in `dtype`.

    Args:
        model, vocab_size, model_type: as in `export_hf`.
        dtype: of the tensors; None for that of each parameter, which gives bitwise the weights of `merge`. Adapted
            weights are rounded to it once, from float32 (or float64).
        every_rank: let every rank have the tensors; else global rank 0 alone, and the others get an empty stream.

    Raises:
        ValueError: on every rank, and at once: as `export_hf` and `merge`, or a parameter has no Hugging Face name.
        RuntimeError: while it is taken: another rank is gone, or did not come within the timeout of the process group.
    """
    chunks = chunks_of(model)
    own = transformers_model_maybe(chunks, vocab_size=vocab_size, model_type=model_type)
    if own is not None:
        tensors = merged_tensors(own, dtype)
        return tensors if every_rank or speaks_for_all() else iter(())
    linears = named_linears(chunks)
    adapted = [(linear.whole_path, linear.module) for linear in linears if isinstance(linear.module, DoRALinear)]
    try:
        config = gpt_config(chunks)
        if getattr(config, "layernorm_zero_centered_gamma", False):
            raise ValueError("the model's config has layernorm_zero_centered_gamma = True, expected False")
        hf = named_architecture(chunks, model_type)
        vocabulary = true_vocabulary(config, linears, vocab_size)
        units = _units(chunks, linears, HFParts.of(hf, config), vocabulary, dtype)
        problem = merge_problem_maybe(chunks, adapted)
    except (ValueError, TypeError) as error:
        problem = str(error)
    raise_on_every_rank(problem, world_group())
    found = gather_objects((len(adapted), set(units)), world_group())
    if not any(num_adapted for num_adapted, _ in found):
        raise ValueError(NOTHING_ADAPTED)
    names = [_EMBEDDING, *_layer_modules(hf, num_hf_layers(chunks)), FINAL_NORM]
    names += [] if unwrap(chunks[0]).share_embeddings_and_output_weights else [OUTPUT_LAYER]
    missing = [name for name in names if not any(name in held for _, held in found)]
    if missing:
        raise ValueError(f"{missing[0]}: found no such layer, expected one as in models of type {hf.model_type}")
    warn_of_assumed_names(chunks, model_type)
    return send_units((units[name]() if name in units else {} for name in names), every_rank=every_rank)


def _layer_modules(hf: HFArchitecture, num_layers: int) -> Iterator[str]:
    for index in range(num_layers):
        yield from (f"decoder.layers.{index}.{name}" for name in (*hf.norms, *hf.linears))


def _units(
    chunks: Sequence[nn.Module],
    linears: Sequence[NamedLinear],
    parts: HFParts,
    vocabulary: int | None,
    dtype: torch.dtype | None,
) -> dict[str, Unit]:
    """What this rank's stage has of the whole model, by the paths of modules in a GPTModel of the local spec.

    Raises:
        ValueError: naming a parameter that has no Hugging Face name.
    """
    units: dict[str, Unit] = {}
    by_path = {linear.whole_path: linear for linear in linears}
    for chunk in chunks:
        tied = bool(unwrap(chunk).share_embeddings_and_output_weights)
        names = DecoderNames.of(chunk)
        for named in walk(chunk, DoRALinear):
            path, module = named.whole_path, named.module
            check_unsharded(path, module)
            linear = by_path.get(path)
            if path == OUTPUT_LAYER and tied:
                # The last stage has a copy of the embedding there.
                continue
            if linear is not None:
                units[linear.gpt_path] = _linear_unit(linear, parts, vocabulary, dtype)
                module = linear.base
            of_modules: dict[str, dict[str, nn.Parameter]] = {}
            for name, parameter in names.gpt_parameters(path, module):
                owner, _, kind = name.rpartition(".")
                of_modules.setdefault(owner, {})[kind] = parameter
            for owner, parameters in of_modules.items():
                if owner not in units:
                    units[owner] = _other_unit(owner, parameters, parts, vocabulary, dtype)
    return units


def _linear_unit(linear: NamedLinear, parts: HFParts, vocabulary: int | None, dtype: torch.dtype | None) -> Unit:
    spec, path = linear.describe(), linear.gpt_path
    if spec.weight is None and not isinstance(linear.module, DoRALinear):
        raise ValueError(f"{path}: the layer has no weight of its own and is not tied to the embedding")
    true_rows = spec.true_sizes[1]
    num_rows = true_rows if path != OUTPUT_LAYER or vocabulary is None else vocabulary
    rows = parts.rows(path, num_rows)
    bias = spec.bias
    if (bias is not None) != parts.has_bias(path):
        found, expected = ("a", "none") if bias is not None else ("no", "one")
        raise ValueError(
            f"{path}.bias: found {found} bias, expected {expected} as in models of type {parts.hf.model_type}"
        )

    def compute() -> dict[str, Tensor]:
        tensors = {"weight": _whole_weight(linear, spec, dtype)}
        if bias is not None:
            tensors["bias"] = gather_whole(_cast(bias, dtype), spec.row_placement, spec.tp_group_name)
        return {
            f"{name}.{kind}": tensor[index.to(tensor.device)]
            for name, index in rows.items()
            for kind, tensor in tensors.items()
        }

    return compute


def _whole_weight(linear: NamedLinear, spec: LinearSpec, dtype: torch.dtype | None) -> Tensor:
    if isinstance(linear.module, DoRALinear):
        weight = merged_weight(linear.module)
        own = linear.module.base_weight.dtype
    else:
        assert spec.weight is not None
        weight, own = spec.weight.detach(), spec.weight.dtype
    return gather_whole(weight.to(dtype or own), spec.weight_placement, spec.tp_group_name)


def _other_unit(
    path: str, parameters: Mapping[str, nn.Parameter], parts: HFParts, vocabulary: int | None, dtype: torch.dtype | None
) -> Unit:
    """The unit of an embedding or a norm: one weight, whole on every rank or sharded along its rows."""
    layer = path.removeprefix("decoder.layers.").partition(".")
    names = {_EMBEDDING: EMBEDDING_WEIGHT, FINAL_NORM: FINAL_NORM_WEIGHT}
    if layer[0].isdigit() and layer[2] in parts.hf.norms:
        names[path] = f"{LAYERS}.{layer[0]}.{parts.hf.norms[layer[2]]}.weight"
    if path not in names or parameters.keys() != {"weight"}:
        raise ValueError(
            f"{path}: found parameters {', '.join(parameters)}, which have no name in Hugging Face models of type "
            f"{parts.hf.model_type}"
        )
    weight = parameters["weight"]

    def compute() -> dict[str, Tensor]:
        if path != _EMBEDDING:
            return {names[path]: _cast(weight, dtype).clone()}
        group = parallel_state.get_tensor_model_parallel_group()
        shape = (weight.shape[0] * group.size(), weight.shape[1])
        placement = ParameterPlacement(0, 1, (vocabulary or shape[0], shape[1]), shape)
        tp_group = group.group_name if group.size() > 1 else ""
        return {names[path]: gather_whole(_cast(weight, dtype), placement, tp_group)}

    return compute


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to(dtype or tensor.dtype)
