"""Adapted transformers models, whose layers have their Hugging Face names: each process holds the whole model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dora_fx.attach import NOTHING_ADAPTED, adapted_layers, merge_problem_maybe, merged_weight
from dora_fx.function import ADAPTER_TENSORS
from dora_fx.hf.peft_files import PeftModule
from dora_fx.megatron import check_unsharded, unwrap, walk
from dora_fx.modules import DoRALinear


class OwnNames:
    """What `hf_parts.HFParts` is for Megatron models: every layer is a Hugging Face layer, with all of its rows."""

    def paths(self, path: str) -> tuple[str, ...]:
        """The Hugging Face layers that the layer at `path` is made of: itself."""
        return (path,)

    def rows(self, path: str, out_features: int) -> dict[str, Tensor]:
        """The rows of each of `paths`."""
        return {path: torch.arange(out_features)}


def is_transformers_model(module: nn.Module) -> bool:
    """Return whether a module, which is no wrapper, is a transformers model; imports nothing."""
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(module, library.PreTrainedModel)


def transformers_model_maybe(
    chunks: Sequence[nn.Module], *, vocab_size: int | None = None, model_type: str | None = None
) -> Any | None:
    """The transformers model that a caller passed, bare or wrapped; None for a model of another library.

    Raises:
        ValueError: the caller says of it what is Megatron's to be told, or passed several.
    """
    models: list[Any] = [unwrap(chunk) for chunk in chunks]
    if not is_transformers_model(models[0]):
        return None
    if len(models) > 1:
        raise ValueError(f"model: found {len(models)} chunks, expected one transformers model, which has no pipeline")
    own_type = models[0].config.model_type
    if vocab_size is not None:
        raise ValueError(f"vocab_size: found {vocab_size}, expected none for a transformers model, which pads nothing")
    if model_type not in (None, own_type):
        raise ValueError(f"model_type: found {model_type!r}, expected none or {own_type!r}, the model's own")
    return models[0]


def speaks_for_all() -> bool:
    """Return whether this process writes what all have: the one by itself, or global rank 0."""
    return not dist.is_initialized() or dist.get_rank() == 0


def own_adapters(model: nn.Module) -> Iterator[dict[str, PeftModule]]:
    """The adapters of each adapted layer in turn, in new tensors on the CPU.

    Raises:
        ValueError: at once, naming a parameter that is sharded.
    """
    sites = [named for _, named in adapted_layers([model])]
    for named in sites:
        check_unsharded(named.path, named.module)
    return ({named.path: _adapter(named.module)} for named in sites)


def merged_tensors(model: nn.Module, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the merged model's state dict in its order, those of tied weights once, in new tensors.

    Args:
        model: an adapted transformers model; it is not changed.
        dtype: of the floating-point ones; None for that of each.

    Raises:
        ValueError: at once: nothing is adapted, an adapter cannot be merged, or a parameter is sharded.
    """
    check_unsharded("model", model)
    sites = [(named.path, named.module) for _, named in adapted_layers([model])]
    problem = merge_problem_maybe([model], sites) if sites else NOTHING_ADAPTED
    if problem is not None:
        raise ValueError(problem)
    return _merged_tensors(model, dtype)


def _merged_tensors(model: nn.Module, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for path, _, module in walk(model, DoRALinear):
        prefix = f"{path}." if path else ""
        plain = module.to_wrap if isinstance(module, DoRALinear) else module
        for name, tensor in _own_tensors(plain).items():
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if isinstance(module, DoRALinear) and name == "weight":
                yield prefix + name, merged_weight(module).to(dtype or tensor.dtype)
            else:
                yield prefix + name, _copy(tensor, dtype)


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own entries of a state dict, the tensors themselves; those of its children are left out."""
    kept: dict[str, Any] = {}
    module._save_to_state_dict(kept, "", keep_vars=True)
    return {name: value for name, value in kept.items() if isinstance(value, Tensor)}


def _copy(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to(dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype, copy=True)


def _adapter(site: DoRALinear) -> PeftModule:
    tensors = dict(site.adapter.named_parameters())
    a, b, magnitude = (tensors[name].detach().to("cpu", copy=True) for name in ADAPTER_TENSORS)
    return PeftModule(a, b, magnitude, site.adapter.alpha, site.adapter.use_rslora)
