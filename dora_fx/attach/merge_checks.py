"""Raises on every rank of a model if a layer of any of them cannot be merged, or its merge cannot be undone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron.core import parallel_state
from torch import Tensor, nn

from dora_fx.attach.kept_adapter import KeptAdapter, is_merged, merged_layers
from dora_fx.attach.shared_weights import sharing_problem_maybe
from dora_fx.function import QuantisedWeight
from dora_fx.megatron import NamedModule, check_unsharded, walk
from dora_fx.modules import DoRALinear, adapter_not_finite_maybe, bank_of, inactive_adapters
from dora_fx.ranks import of_all_parts, problem_of_any_rank_maybe, resolve_group

NOTHING_ADAPTED = "found no adapted layer, expected a model that DoRA was called on"
_KEPT_TWICE = (
    "{}: found an adapter over a layer whose merge was kept to be undone, expected one of them to be kept: "
    "merge it without keep_adapter, after which neither can be undone"
)


def check_mergeable(
    chunks: Sequence[nn.Module], sites: Sequence[tuple[str, DoRALinear]], *, keep_adapter: bool
) -> None:
    """Raise on every rank of the model, all of its pipeline stages, if a site of any of them cannot be merged."""
    problem = merge_problem_maybe(chunks, sites)
    if problem is None and any(bank_of(chunk).is_mixed for chunk in chunks):
        problem = "found a mixed batch, expected the end of the context of dora_fx.mixed"
    if problem is None and not keep_adapter and (others := inactive_adapters(chunks)):
        problem = (
            f"found adapters {others} beside the active one, trained on weights that merging would change, expected "
            "none: call delete_adapter for each, merge with keep_adapter=True, or stream the weights with iter_merged"
        )
    if problem is None and keep_adapter:
        problem = next((_KEPT_TWICE.format(path) for path, site in sites if is_merged(site.to_wrap)), None)
    if problem is None:
        written = {path: site.to_wrap for path, site in sites if not isinstance(site.base_weight, QuantisedWeight)}
        problem = sharing_problem_maybe(chunks, written)
    _raise_together(problem, {site.adapter.tp_group for _, site in sites})
    if not _on_any_stage(bool(sites)):
        raise ValueError(_nothing_adapted(chunks))


def _raise_together(problem: str | None, tp_groups: Iterable[str]) -> None:
    """Raise ValueError on all ranks of the model if one of them found a problem; every rank calls it."""
    groups = [resolve_group(tp_group) for tp_group in sorted(set(tp_groups) - {""})]
    if parallel_state.model_parallel_is_initialized():
        experts = parallel_state.get_expert_model_parallel_group(check_initialized=False)
        if experts is not None and experts.size() > 1:
            # Other ranks hold other experts, and an expert's own group may have one rank where dense layers have more.
            groups += [parallel_state.get_tensor_model_parallel_group(), experts]
        groups.append(parallel_state.get_pipeline_model_parallel_group())
    # Every rank takes part in every exchange before it raises: ranks of another stage wait for it in the last one.
    for group in groups:
        problem = problem_of_any_rank_maybe(problem, group)
    if problem is not None:
        raise ValueError(problem)


def _on_any_stage(flag: bool) -> bool:
    """Return whether something holds on a pipeline stage; one without adapters has nothing to do, and is no error."""
    return any(of_all_parts(flag)) if parallel_state.model_parallel_is_initialized() else flag


def _nothing_adapted(chunks: Sequence[nn.Module]) -> str:
    path = next((named.whole_path for named, kept in merged_layers(chunks) if not kept.merged_again), None)
    return NOTHING_ADAPTED if path is None else f"{path}: found a layer that is merged already; unmerge it first"


def check_restorable(chunks: Sequence[nn.Module]) -> None:
    """Raise on every rank of the model if it has no merged layer, or one that cannot become what it was."""
    layers = merged_layers(chunks)
    _raise_together(_restore_problem_maybe(chunks, layers), {kept.site.adapter.tp_group for _, kept in layers})
    if not _on_any_stage(bool(layers)):
        raise ValueError("found no merged layer, expected a model after merge(model, keep_adapter=True)")


def _restore_problem_maybe(
    chunks: Sequence[nn.Module], layers: Iterable[tuple[NamedModule, KeptAdapter]]
) -> str | None:
    """Return the first reason why a merged layer cannot become what it was."""
    written: dict[str, nn.Module] = {}
    for named, kept in layers:
        if named.path.endswith(".to_wrap") or kept.merged_again:
            path = named.whole_path.removesuffix(".to_wrap")
            what = "and that adapter was merged too" if kept.merged_again else "by an adapter that is there"
            return f"{path}: found it adapted again since it was merged, {what}; undoing the merge would lose that one"
        if kept.weights is None:
            continue
        for name, kept_weight in zip(kept.site.kind.weight_names(named.module), kept.weights, strict=True):
            weight = getattr(named.module, name)
            if weight is None or weight.is_meta or weight.shape != kept_weight.shape:
                found = "none" if weight is None else f"one of shape {tuple(weight.shape)} on {weight.device}"
                return (
                    f"{named.whole_path}.{name}: found {found}, expected one of shape {tuple(kept_weight.shape)} with "
                    "memory, for the base weight of before the merge"
                )
        written[named.whole_path] = named.module
    return sharing_problem_maybe(chunks, written)


def merge_problem_maybe(chunks: Sequence[nn.Module], sites: Sequence[tuple[str, DoRALinear]]) -> str | None:
    """Return the first reason why a site of this rank cannot be merged; `sites` by their paths in the whole model."""
    users = _users_of_weights(chunks)
    return next((problem for path, site in sites if (problem := _problem_maybe(path, site, users)) is not None), None)


def _problem_maybe(path: str, site: DoRALinear, users: dict[int, list[str]]) -> str | None:
    try:
        check_unsharded(path, site)
    except ValueError as error:
        return str(error)
    if not site._adapter_enabled:
        return f"{path}: the adapter is disabled, so merging would change the function; enable it first"
    for weight in site.base_weights:
        own = weight.tensors[0] if isinstance(weight, QuantisedWeight) else weight
        if (problem := _weight_problem_maybe(path, site, own, users)) is not None:
            return problem
    return adapter_not_finite_maybe([(path, site)])


def _weight_problem_maybe(path: str, site: DoRALinear, own: Tensor, users: dict[int, list[str]]) -> str | None:
    if site.kind.stored_weight(site.to_wrap) is None:
        return (
            f"{path}: the layer multiplies by the embedding's weight, and merging would change the embedding; "
            "untie them, or exclude this layer from DoRA"
        )
    others = [user for user in users[id(own)] if user != f"{path}.to_wrap"]
    if others or getattr(own, "shared_embedding", False):
        shared_with = ", ".join(others) or "the embedding of another pipeline stage"
        return f"{path}: the layer shares its weight with {shared_with}, which merging would change too; untie them"
    if own.is_meta:
        return f"{path}: the base weight is on the meta device; load it before merging"
    return None


def _users_of_weights(chunks: Sequence[nn.Module]) -> dict[int, list[str]]:
    """Return the paths of the modules that own each parameter, by the parameter's id."""
    users: dict[int, list[str]] = {}
    for chunk in chunks:
        for _, path, module in walk(chunk):
            for parameter in module.parameters(recurse=False):
                users.setdefault(id(parameter), []).append(path)
    return users
