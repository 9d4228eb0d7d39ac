"""The merged model as a stream of Hugging Face tensors, from any layout, with the model left as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from dora_fx.attach import NOTHING_ADAPTED, merge_problem_maybe, merged_weight, served_dtype
from dora_fx.function import ParameterPlacement, whole_of
from dora_fx.hf.adapter_checks import warn_of_assumed_names
from dora_fx.hf.counterpart import GPTCounterpart, NamedLinear, check_own, gpt_counterpart
from dora_fx.hf.model_record import ModelRecord, model_record
from dora_fx.hf.send import send_units
from dora_fx.megatron import Model, check_unsharded, chunks_of
from dora_fx.models import EMBEDDING_WEIGHT, FINAL_NORM, FINAL_NORM_WEIGHT, LAYERS, OUTPUT_LAYER
from dora_fx.modules import DoRALinear, LinearSpec, format_problem_maybe, gather_whole, quantised_weight_maybe
from dora_fx.ranks import gather_objects, raise_on_every_rank

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
    record = model_record(chunks_of(model))
    if record.is_own:
        check_own(record, vocab_size=vocab_size, model_type=model_type)
        tensors = _own_tensors(record, dtype)
        return tensors if every_rank or record.is_writer else iter(())
    sites = [(named.whole_path, named.module) for named in record.sites]
    try:
        hf = gpt_counterpart(record, vocab_size=vocab_size, model_type=model_type)
        if getattr(record.model.config, "layernorm_zero_centered_gamma", False):
            raise ValueError("the model's config has layernorm_zero_centered_gamma = True, expected False")
        is_tied = bool(record.model.share_embeddings_and_output_weights)
        units = _units(record, hf, dtype, is_tied=is_tied)
        problem = merge_problem_maybe(record.chunks, sites)
    except (ValueError, TypeError) as error:
        problem = str(error)
    raise_on_every_rank(problem, record.group)
    found = gather_objects((len(sites), set(units)), record.group)
    if not any(num_adapted for num_adapted, _ in found):
        raise ValueError(NOTHING_ADAPTED)
    names = [_EMBEDDING, *_layer_modules(hf), FINAL_NORM, *([] if is_tied else [OUTPUT_LAYER])]
    missing = [name for name in names if not any(name in held for _, held in found)]
    if missing:
        raise ValueError(f"{missing[0]}: found no such layer, expected one as in models of type {hf.model_type}")
    if record.is_writer:
        warn_of_assumed_names(hf)
    return send_units((units[name]() if name in units else {} for name in names), every_rank=every_rank)


def _units(record: ModelRecord, hf: GPTCounterpart, dtype: torch.dtype | None, *, is_tied: bool) -> dict[str, Unit]:
    """What this rank's stage has of the whole model, by the paths of modules in a GPTModel of the local spec.

    Raises:
        ValueError: naming a parameter that has no Hugging Face name.
    """
    units: dict[str, Unit] = {}
    linears: dict[nn.Module, list[NamedLinear]] = {}
    for each in hf.linears:
        linears.setdefault(each.module, []).append(each)
    for _, (_, path, module) in record.modules:
        check_unsharded(path, module)
        own = linears.get(module, [])
        if path == OUTPUT_LAYER and is_tied:
            # The last stage has a copy of the embedding there.
            continue
        units |= {linear.gpt_path: _linear_unit(linear, hf, dtype) for linear in own}
        of_modules: dict[str, dict[str, nn.Parameter]] = {}
        for name, parameter in hf.decoder.gpt_parameters(path, own[0].base if own else module):
            owner, _, kind = name.rpartition(".")
            of_modules.setdefault(owner, {})[kind] = parameter
        for owner, parameters in of_modules.items():
            if owner not in units:
                units[owner] = _other_unit(owner, parameters, hf, dtype)
    return units


def _linear_unit(linear: NamedLinear, hf: GPTCounterpart, dtype: torch.dtype | None) -> Unit:
    spec, path = linear.describe(), linear.gpt_path
    if spec.weight is None and not isinstance(linear.module, DoRALinear):
        raise ValueError(f"{path}: the layer has no weight of its own and is not tied to the embedding")
    true_rows = spec.true_sizes[1]
    num_rows = true_rows if path != OUTPUT_LAYER or hf.vocabulary is None else hf.vocabulary
    rows = hf.parts.rows(path, num_rows)
    bias = spec.bias
    if (bias is not None) != hf.parts.has_bias(path):
        found, expected = ("a", "none") if bias is not None else ("no", "one")
        raise ValueError(f"{path}.bias: found {found} bias, expected {expected} as in models of type {hf.model_type}")

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
        weight = merged_weight(linear.module, linear.matrix)
        own = linear.module.base_weight.dtype
    else:
        assert spec.weight is not None
        weight, own = whole_of(spec.weight), spec.weight.dtype
    return gather_whole(weight.to(dtype or own), spec.weight_placement, spec.tp_group_name)


def _other_unit(
    path: str, parameters: Mapping[str, nn.Parameter], hf: GPTCounterpart, dtype: torch.dtype | None
) -> Unit:
    """The unit of an embedding, a norm or a router: one weight, whole on every rank or sharded along its rows."""
    layer = path.removeprefix("decoder.layers.").partition(".")
    names = {_EMBEDDING: EMBEDDING_WEIGHT, FINAL_NORM: FINAL_NORM_WEIGHT}
    own = hf.parts.hf.plain_modules
    if layer[0].isdigit() and layer[2] in own:
        names[path] = f"{LAYERS}.{layer[0]}.{own[layer[2]]}.weight"
    if path not in names or parameters.keys() != {"weight"}:
        raise ValueError(
            f"{path}: found parameters {', '.join(parameters)}, which have no name in Hugging Face models of type "
            f"{hf.model_type}"
        )
    weight = parameters["weight"]

    def compute() -> dict[str, Tensor]:
        if path != _EMBEDDING:
            return {names[path]: _cast(weight, dtype).clone()}
        group = parallel_state.get_tensor_model_parallel_group()
        shape = (weight.shape[0] * group.size(), weight.shape[1])
        placement = ParameterPlacement(0, 1, (hf.vocabulary or shape[0], shape[1]), shape)
        tp_group = group.group_name if group.size() > 1 else ""
        return {names[path]: gather_whole(_cast(weight, dtype), placement, tp_group)}

    return compute


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to(dtype or tensor.dtype)


def _layer_modules(hf: GPTCounterpart) -> Iterator[str]:
    """Paths, in a GPTModel of the local spec, of the modules in its layers that have parameters."""
    architecture = hf.parts.hf
    linears = architecture.linears_of_layer(range(hf.parts.num_experts))
    names = [*architecture.plain_modules, *linears]
    for index in range(hf.decoder.num_layers):
        yield from (f"decoder.layers.{index}.{name}" for name in names)


# A transformers model


def _own_tensors(record: ModelRecord, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the merged model's state dict in its order, those of tied weights once, in new tensors.

    Quantised layers, adapted or not, come as plain ones.

    Args:
        record: of an adapted transformers model; it is not changed.
        dtype: of the floating-point ones; None for that of each.

    Raises:
        ValueError: at once: nothing is adapted, an adapter cannot be merged, or a parameter is sharded.
    """
    check_unsharded("model", record.model)
    sites = [(named.path, named.module) for named in record.sites]
    problem = merge_problem_maybe([record.model], sites) if sites else NOTHING_ADAPTED
    for _, named in record.modules:
        if problem is None and (found := format_problem_maybe(named.module)) is not None:
            problem = f"{named.path}: {found}"
    if problem is not None:
        raise ValueError(problem)
    return _one_by_one(record, dtype)


def _one_by_one(record: ModelRecord, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for _, (path, _, module) in record.modules:
        prefix = f"{path}." if path else ""
        is_adapted = isinstance(module, DoRALinear)
        base = module.to_wrap if is_adapted else module
        if quantised_weight_maybe(base) is not None:
            yield from _dequantised(prefix, module, base, dtype or served_dtype(record.model, base))
            continue
        for name, tensor in _entries(base).items():
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if is_adapted and name == "weight":
                yield prefix + name, merged_weight(module).to(dtype or tensor.dtype)
            else:
                yield prefix + name, _copy(tensor, dtype)


def _dequantised(prefix: str, module: nn.Module, base: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The weight and the bias of a quantised layer, adapted or not, as a plain layer has them."""
    weight = quantised_weight_maybe(base)
    assert weight is not None
    found = merged_weight(module) if isinstance(module, DoRALinear) else whole_of(weight)
    yield f"{prefix}weight", found.to(dtype)
    if base.bias is not None:
        yield f"{prefix}bias", _copy(base.bias, dtype)


def _entries(module: nn.Module) -> dict[str, Tensor]:
    """A module's own entries of a state dict, the tensors themselves; those of its children are left out."""
    kept: dict[str, Any] = {}
    module._save_to_state_dict(kept, "", keep_vars=True)
    return {name: value for name, value in kept.items() if isinstance(value, Tensor)}


def _copy(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to(dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype, copy=True)
