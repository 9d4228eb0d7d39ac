"""Attach DoRA adapters: plan and check everything, then change the model."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.distributed._composable.replicate import DDP as ComposableDDP

from dora_fx.attach.attach_listeners import call_attach_listeners
from dora_fx.attach.frozen_experts import check_fused_experts
from dora_fx.attach.layer_names import called_here_maybe, hint
from dora_fx.attach.matching import find_targets, router_maybe
from dora_fx.attach.recomputation import train_through_recomputation
from dora_fx.attach.settings import DoRASettings
from dora_fx.cache import have_no_values, is_traced
from dora_fx.function import BaseWeight, QuantisedWeight, base_norm_squared, tensors_of
from dora_fx.megatron import NamedModule, TorchDDP, check_unsharded, data_parallel_around, replace_modules, unwrap, walk
from dora_fx.modules import (
    DoRALinear,
    GroupedDoRALinear,
    LinearSpec,
    ParallelLinearDoRAAdapter,
    bank_of,
    bypasses_its_linears,
    check_once_per_call,
    describe_linear,
    kind_of_maybe,
)
from dora_fx.ranks import of_all_parts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedSite:
    """One layer that is about to be wrapped.

    Attributes:
        chunk: as it was given, bare or wrapped.
        path: with the layer's number in the whole model.
        dim, alpha: of the layer's adapter.
        weight: the layer's own, or the one that it borrows.
    """

    chunk: nn.Module
    path: str
    linear: nn.Module
    spec: LinearSpec
    weight: BaseWeight
    dim: int
    alpha: float


@dataclass(frozen=True)
class AttachPlan:
    """The changes that a call of `DoRA` is going to make.

    Attributes:
        new: layers to wrap.
        existing: sites that are adapted already.
        unmatched_targets: targets that name no layer of this rank.
        unmatched_linears: linear layers that no target names.
        idle_patterns: patterns of ranks and alphas that decide for no layer of this rank, as pairs of field name and
            pattern.
    """

    new: list[PlannedSite]
    existing: list[DoRALinear]
    unmatched_targets: list[str]
    unmatched_linears: list[str]
    idle_patterns: list[tuple[str, str]]


def plan_attachment(settings: DoRASettings, chunks: Sequence[nn.Module]) -> AttachPlan:
    """Find and check every target of bare or wrapped model chunks, on this rank alone. Changes nothing.

    Raises:
        ValueError, TypeError: as `DoRA.__call__` documents.
    """
    if any(bank_of(chunk).is_mixed for chunk in chunks):
        raise ValueError("model: found a mixed batch, expected the end of the context of dora_fx.mixed")
    check_fused_experts(chunks, settings.target_modules, settings.exclude_modules)
    found = find_targets(chunks, settings.target_modules, settings.exclude_modules)
    new, existing = [], []
    for chunk, named in found.targets:
        if isinstance(named.module, DoRALinear):
            _check_same_settings(settings, named.whole_path, named.module)
            existing.append(named.module)
        else:
            new.append(_plan_site(settings, chunk, named))
    _check_passes_gradients(chunks, new)
    _check_called(chunks, new)
    _check_data_parallelism(chunks, new)
    _check_cuda_graphs(chunks)
    idle = settings.idle_patterns([named.whole_path for _, named in found.targets])
    return AttachPlan(new, existing, found.unmatched_targets, found.unmatched_linears, idle)


def check_targets_matched(settings: DoRASettings, chunks: Sequence[nn.Module], plan: AttachPlan) -> None:
    """Raise ValueError for a target or a pattern that no rank of the model has a layer for; every rank calls it.

    A pipeline stage may have no target at all, and a rank none of the experts that are named.
    """
    stages = of_all_parts((len(plan.new) + len(plan.existing), plan.unmatched_targets, plan.idle_patterns))
    if not any(num_targets for num_targets, *_ in stages):
        why = next(filter(None, (router_maybe(chunks, pattern) for pattern in settings.target_modules)), None)
        raise ValueError(
            f"DoRA.target_modules: no module matched {list(settings.target_modules)}; "
            f"{why or hint(chunks, settings.target_modules)}"
        )
    for pattern in plan.unmatched_targets:
        if all(pattern in unmatched for _, unmatched, _ in stages):
            why = router_maybe(chunks, pattern) or hint(chunks, [pattern])
            _warn_or_raise(settings, f"DoRA.target_modules: {pattern!r} matched nothing; {why}")
    for name, pattern in plan.idle_patterns:
        if all((name, pattern) in idle for *_, idle in stages):
            called = called_here_maybe(chunks, [pattern])
            _warn_or_raise(
                settings,
                f"DoRA.{name}: {pattern!r} decides for no adapted layer, expected a name, path or pattern of one that "
                f"no pattern before it names{f'; {called}' if called else ''}",
            )


def _warn_or_raise(settings: DoRASettings, message: str) -> None:
    if not settings.allow_unmatched:
        raise ValueError(f"{message}. Pass allow_unmatched=True to make this a warning")
    logger.warning("%s", message)


def attach(settings: DoRASettings, plan: AttachPlan, seed: int) -> None:
    """Wrap the planned layers in place; `seed` is that of all initial factors, the same on every rank."""
    replacements: dict[nn.Module, dict[nn.Module, nn.Module]] = {}
    for module in (module for chunk in dict.fromkeys(site.chunk for site in plan.new) for module in chunk.modules()):
        if (kind := kind_of_maybe(module)) is not None:
            kind.prepare(module)
    for site in plan.new:
        spec = site.spec
        adapter = ParallelLinearDoRAAdapter(
            spec.in_features,
            spec.out_features,
            site.dim,
            alpha=site.alpha,
            use_rslora=settings.use_rslora,
            dropout=settings.dropout,
            layout_name=spec.layout.name,
            tp_group=spec.tp_group_name,
            experts=spec.experts,
            row_blocks=spec.row_blocks,
            padded_in_features=spec.padded_in_features,
            padded_out_features=spec.padded_out_features,
            column_init_method=settings.lora_A_init_method,
            row_init_method=settings.lora_B_init_method,
            seed=_seeds(site, seed),
            dtype=site.weight.dtype,
            device=site.weight.device,
        )
        borrowed = cast(nn.Parameter, site.weight) if spec.weight is None else None
        wrapper = DoRALinear if spec.expert_weights is None else GroupedDoRALinear
        adapted = wrapper(
            site.linear,
            adapter,
            path=site.path,
            base_weight=borrowed,
            complete_gradients=settings.complete_gradients,
        )
        replacements.setdefault(site.chunk, {})[site.linear] = adapted
    for chunk, of_chunk in replacements.items():
        replace_modules(chunk, of_chunk)
        train_through_recomputation(chunk)
        check_once_per_call(unwrap(chunk))
        call_attach_listeners(chunk)


def _seeds(site: PlannedSite, seed: int) -> int | list[int]:
    """Return the seed of a layer's factors; of a grouped layer those that its experts have as layers of their own."""
    experts = site.spec.experts
    if site.spec.expert_weights is None or experts is None or experts.first is None:
        return seed_for(site.path, seed)
    holder, _, name = site.path.rpartition(".")
    numbers = range(experts.first, experts.first + experts.count)
    return [seed_for(f"{holder}.local_experts.{number}.{name}", seed) for number in numbers]


def seed_for(path: str, seed: int) -> int:
    """Seed of the initial A and B at a path, so that attaching draws nothing from torch's generator."""
    return (seed + (zlib.crc32(path.encode()) << 31)) % 2**63


def _check_passes_gradients(chunks: Iterable[nn.Module], new: Sequence[PlannedSite]) -> None:
    """Raise ValueError, naming the layer, if gradients could not pass through one that is not adapted."""
    if not new:
        return
    for named in (named for chunk in chunks for named in walk(chunk, DoRALinear)):
        kind = kind_of_maybe(named.module)
        if kind is not None and (problem := kind.gradient_problem_maybe(named.module)) is not None:
            raise ValueError(f"{named.whole_path}: {problem}")


def _check_called(chunks: Iterable[nn.Module], new: Iterable[PlannedSite]) -> None:
    paths = {site.linear: site.path for site in new}
    for holder in (named.module for chunk in chunks for named in walk(chunk) if bypasses_its_linears(named.module)):
        for child in holder.children():
            if child in paths:
                raise TypeError(
                    f"{paths[child]}: found a layer of a {type(holder).__name__}, which computes with its parameters "
                    "and never calls it, expected an MLP that does; build the model without the op fuser, and not for "
                    "inference alone"
                )


def _check_data_parallelism(chunks: Iterable[nn.Module], new: Iterable[PlannedSite]) -> None:
    linears: set[nn.Module] = {site.linear for site in new}
    replicas = [module for chunk in {site.chunk for site in new} for module in chunk.modules()]
    unaware = any(isinstance(module, ComposableDDP) for module in replicas)
    for wrapper in data_parallel_around(chunks):
        if isinstance(wrapper, TorchDDP):
            unaware |= not linears.isdisjoint(wrapper.modules())
        elif wrapper.ddp_config.overlap_param_gather:  # type: ignore[union-attr]
            raise ValueError(
                "DistributedDataParallel: found overlap_param_gather=True, expected False: the norms of a step need "
                "the parameters before the forward pass begins"
            )
    if unaware:
        raise ValueError(
            "torch.nn.parallel.DistributedDataParallel: found one that was made before the adapters exist and would "
            "never synchronise their gradients, so that ranks drift apart; expected DoRA to be called first, and "
            "DistributedDataParallel on what it returns. Delete the one that is there"
        )


def _check_cuda_graphs(chunks: Iterable[nn.Module]) -> None:
    for chunk in chunks:
        config = getattr(unwrap(chunk), "config", None)
        for name, off in (("enable_cuda_graph", False), ("external_cuda_graph", False), ("cuda_graph_impl", "none")):
            if getattr(config, name, off) != off:
                raise ValueError(
                    f"TransformerConfig.{name}: found {getattr(config, name)!r}, expected {off!r}: a graph that is "
                    "replayed computes no norms, so that those of its first step would stay"
                )


def _check_same_settings(settings: DoRASettings, path: str, site: DoRALinear) -> None:
    adapter = site.adapter
    found: dict[str, Any] = {name: getattr(adapter, name) for name in ("dim", "alpha", "use_rslora", "dropout")}
    found["complete_gradients"] = site.complete_gradients
    expected = {name: getattr(settings, name) for name in found}
    expected |= {"dim": settings.dim_of(path), "alpha": settings.alpha_of(path)}
    for name, value in expected.items():
        if found[name] != value:
            raise ValueError(
                f"{path}: already adapted with {name}={found[name]}, this configuration has {name}={value}"
            )


def _plan_site(settings: DoRASettings, chunk: nn.Module, named: NamedModule) -> PlannedSite:
    path, linear = named.whole_path, named.module
    check_unsharded(path, linear)
    spec = describe_linear(path, linear)
    _check_rows(path, linear, spec)
    weight = spec.weight if spec.weight is not None else _tied_weight(unwrap(chunk), path)
    if spec.expert_weights is None:
        _check_weight(path, weight)
    else:
        for name, of_expert in zip(spec.kind.weight_names(linear), spec.expert_weights, strict=True):
            _check_weight(f"{path}.{name}", of_expert)
    dim = settings.dim_of(path)
    if dim % spec.dim_multiple:
        raise ValueError(
            f"{path}: dim {dim} is sharded over {spec.tp_size} tensor-parallel ranks, "
            f"expected a multiple of {spec.dim_multiple}"
        )
    return PlannedSite(chunk, path, linear, spec, weight, dim, settings.alpha_of(path))


def _check_rows(path: str, linear: nn.Module, spec: LinearSpec) -> None:
    """Raise ValueError for layers whose rows Megatron's checkpoints hold in several parts.

    On several ranks each part is sharded by itself, but an adapter's rows are sharded as one. Loaded at another
    tensor-parallel size, the adapter's rows would be applied to other rows of the layer.
    """
    name = path.rpartition(".")[2]
    if name == "linear_qkv_down_proj":
        raise ValueError(
            f"{path}: found a {type(linear).__name__} that is the down-projections of query and key in one, expected "
            "a layer for each: Megatron saves its parts apart, without an adapter. Build the model with "
            "mla_down_proj_fusion=False, or exclude the layer"
        )
    if name == "in_proj" and spec.tp_size > 1:
        raise ValueError(
            f"{path}: found the packed projection of a Mamba layer or a linear attention on {spec.tp_size} "
            "tensor-parallel ranks, expected one rank: its parts are sharded each by itself, which adapters do not "
            "follow. Exclude the layer, or train it on one rank"
        )


def _tied_weight(chunk: nn.Module, path: str) -> nn.Parameter:
    """Return the embedding that a Megatron output layer without a weight of its own multiplies by."""
    tied = getattr(chunk, "shared_embedding_or_output_weight", None)
    weight = tied() if path == "output_layer" and tied is not None else None
    if weight is None:
        raise ValueError(f"{path}: the layer has no weight and is not an output layer tied to an embedding")
    return weight


def _check_weight(path: str, weight: BaseWeight) -> None:
    tensors = tensors_of(weight)
    if weight.is_meta:
        raise ValueError(f"{path}: the base weight is on the meta device; load it before attaching DoRA")
    if is_traced(*tensors) and not have_no_values(*tensors):
        raise ValueError(
            f"{path}: found a fake base weight, or a tracer or FakeTensorMode around this call, expected neither, or a "
            "weight that was made under the FakeTensorMode that is active: norms are computed from the weight's values"
        )
    if not isinstance(weight, QuantisedWeight):
        _check_plain(path, weight)
    if have_no_values(*tensors):
        return
    if isinstance(weight, QuantisedWeight):
        # Of finite elements no norm overflows.
        finite = torch.isfinite(base_norm_squared(weight))[:, None]
    else:
        finite = torch.isfinite(weight.detach())
    if not finite.all():
        rows = (~finite).any(1).nonzero().flatten()
        raise ValueError(
            f"{path}: the base weight has NaN or inf in {rows.numel()} of {weight.shape[0]} rows, "
            f"the first is row {int(rows[0])}; expected finite values"
        )


def _check_plain(path: str, weight: torch.Tensor) -> None:
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64) or weight.dim() != 2:
        raise ValueError(
            f"{path}: found a {weight.dtype} base weight of shape {tuple(weight.shape)}, expected a floating-point "
            "matrix of 16, 32 or 64 bits, or a quantised weight in one of the formats of docs/quantised.md"
        )
    if hasattr(weight, "__tensor_flatten__"):
        # Quantisation libraries keep the layer's class and replace its weight by a tensor subclass.
        raise ValueError(
            f"{path}: found a base weight of class {type(weight).__module__}.{type(weight).__name__}, expected a plain "
            "tensor, or a quantised weight in one of the formats of docs/quantised.md"
        )
