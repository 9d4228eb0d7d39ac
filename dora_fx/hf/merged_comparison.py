"""The adapted model against the merged one in the dtype that serves it: what merging and rounding change, and where."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from dora_fx.attach import (
    NOTHING_ADAPTED,
    adapted_layers,
    merge_problem_maybe,
    merged,
    merged_layer_maybe,
    merged_weight,
    served_dtype,
)
from dora_fx.function import whole_of
from dora_fx.hf.counterpart import check_own
from dora_fx.hf.model_record import ModelRecord, model_record
from dora_fx.megatron import Model, chunks_of
from dora_fx.modules import DoRALinear, weights_of
from dora_fx.ranks import gather_objects, raise_on_every_rank, world_group

# Pairs of dtypes of which the first holds every value of the second.
_HOLDS = {
    torch.float64: (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.bfloat16,),
    torch.float16: (torch.float16,),
}

LogProbs = Callable[[], Tensor | None]


@dataclass(frozen=True)
class LayerGap:
    """One adapted layer, over all ranks.

    Attributes:
        path: with its number in the whole model.
        change: ||W' - W0|| / ||W0||, how much the adapter changes the weight; W' = g * (W0 + s B A) before rounding.
        lost: ||R(W') - W'|| / ||W' - W0||, the part of the change that rounding R to the serving dtype spoils. At one,
            what rounding does is as large as what training did.
        unmoved: of the elements that the adapter changes, the share that rounding puts back to the base's value.
        output_gap: ||y - y'|| / ||y|| of the layer's outputs in the adapted and in the merged model, whose inputs
            differ already by what the layers before it did. NaN for a layer that no token went through.
    """

    path: str
    change: float
    lost: float
    unmoved: float
    output_gap: float


@dataclass(frozen=True)
class MergedComparison:
    """What `compare_merged` found, the same on every rank; `print` shows it as a table.

    Attributes:
        dtypes: that the merged weights were rounded to.
        layers: in model order.
        num_tokens: whose log-probabilities were compared.
        mean_gap: mean of |log p - log p'| over the tokens, in nats.
        max_gap: the largest of them.
    """

    dtypes: tuple[torch.dtype, ...]
    layers: tuple[LayerGap, ...]
    num_tokens: int
    mean_gap: float
    max_gap: float

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("module", "change", "lost", "unmoved", "output gap")]
        rows += [
            (gap.path, *(f"{value:.1e}" for value in (gap.change, gap.lost, gap.unmoved, gap.output_gap)))
            for gap in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        dtypes = " and ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        lines.append(
            f"log-probabilities of {self.num_tokens} tokens, merged in {dtypes}: "
            f"mean gap {self.mean_gap:.1e}, largest {self.max_gap:.1e}"
        )
        return "\n".join(lines)


@torch.no_grad()
def compare_merged(
    model: Model,
    *inputs: Any,
    dtype: torch.dtype | None = None,
    log_probs: LogProbs | None = None,
    **kwargs: Any,
) -> MergedComparison:
    """Run a model with its adapters, and merged in a serving dtype, and say how far apart the two are.

    Every rank calls it. Both runs are in evaluation mode and uncompiled, and the model is bitwise as it was afterwards.
    Merged weights are rounded to the serving dtype as `iter_merged` does; everything else, and the arithmetic, is
    the model's own in both runs, so that the gap is that of merging alone. It holds a copy of every adapted weight
    and the outputs of all adapted layers in host memory.

    Args:
        model: an adapted transformers or Megatron model, or a list or a tuple of its chunks, bare or wrapped.
        inputs, kwargs: of the model. A transformers model is called with `input_ids` `[b, s]`, and its tokens but the
            first are compared, without those that an `attention_mask` `[b, s]` leaves out; a Megatron model with
            `labels` `[b, s]`, which makes it return their losses. Data-parallel ranks may have different inputs.
        dtype: that merged weights are served in; None for that of each weight.
        log_probs: runs the model and returns the log-probabilities of the tokens, of any shape, or None on ranks that
            have none, in place of the call with `inputs`. A pipeline is run by its schedule here.

    Raises:
        ValueError: on every rank: as `merge`, a weight's dtype does not hold the serving dtype, or there is no telling
            how the model is called.
    """
    record = model_record(chunks_of(model))
    raise_on_every_rank(_problem_maybe(record, dtype, log_probs, inputs, kwargs), world_group())
    adapted = {named.whole_path: named.module for named in record.sites}
    if not any(gather_objects(bool(adapted), world_group())):
        raise ValueError(NOTHING_ADAPTED)
    own = _served_dtypes(record)
    run = log_probs if log_probs is not None else _caller(record, inputs, kwargs)
    with _evaluating(record.chunks), torch.compiler.set_stance("force_eager"):
        weights = {path: _weight_sums(site, dtype or own[path]) for path, site in adapted.items()}
        with _recorded(adapted) as outputs:
            expected = run()
        with merged(model):
            plain = _in_their_places(record.chunks, adapted)
            for weight in itertools.chain.from_iterable(map(weights_of, plain.values())):
                weight.copy_(weight.to(dtype or weight.dtype))
            with _recorded(plain) as merged_outputs:
                found = run()
    sums = {path: (weights[path], _output_sums(outputs[path], merged_outputs[path])) for path in adapted}
    return _comparison(set(own.values()) if dtype is None else {dtype}, sums, expected, found)


def _problem_maybe(
    record: ModelRecord,
    dtype: torch.dtype | None,
    log_probs: LogProbs | None,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> str | None:
    sites = [(named.whole_path, named.module) for named in record.sites]
    for path, own in _served_dtypes(record).items():
        if dtype is not None and dtype not in _HOLDS.get(own, ()):
            return f"{path}: found dtype={dtype} for a weight in {own}, expected None or one of {list(_HOLDS[own])}"
    if log_probs is None:
        if record.is_own:
            check_own(record)
        has_ranks = not record.is_own and parallel_state.model_parallel_is_initialized()
        if len(record.chunks) > 1 or (has_ranks and parallel_state.get_pipeline_model_parallel_world_size() > 1):
            return "log_probs: found None for a pipeline, expected a function that runs its schedule"
        if not record.is_own and kwargs.get("labels") is None:
            return "labels: found none, expected those of the tokens, for a Megatron model to return their losses"
        if record.is_own and _input_ids(inputs, kwargs) is None:
            return "input_ids: found none, expected tokens [b, s] for a transformers model, or log_probs to run it"
    return merge_problem_maybe(record.chunks, sites)


def _served_dtypes(record: ModelRecord) -> dict[str, torch.dtype]:
    return {named.whole_path: served_dtype(chunk, named.module) for chunk, named in adapted_layers(record.chunks)}


def _in_their_places(chunks: Sequence[nn.Module], adapted: Mapping[str, DoRALinear]) -> dict[str, Any]:
    """Return the plain layers that stand in the places of adapted ones in a merged model, by the same paths."""
    layers = {merged_layer_maybe(module): module for chunk in chunks for module in chunk.modules()}
    return {path: layers[site] for path, site in adapted.items()}


def _input_ids(inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    found = inputs[0] if inputs else kwargs.get("input_ids")
    return found if isinstance(found, Tensor) and found.dim() == 2 else None


def _caller(record: ModelRecord, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> LogProbs:
    model = record.chunks[0]
    if not record.is_own:
        return lambda: -model(*inputs, **kwargs)
    tokens = _input_ids(inputs, kwargs)
    assert tokens is not None
    mask = kwargs.get("attention_mask")

    def run() -> Tensor:
        logits = model(*inputs, **kwargs).logits[:, :-1]
        # The dtype of the softmax is that in which losses are computed.
        found = logits.float().log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
        return found if mask is None or mask.dim() != 2 else found[mask[:, 1:].bool()]

    return run


@contextmanager
def _evaluating(chunks: Sequence[nn.Module]) -> Iterator[None]:
    training = {module: module.training for chunk in chunks for module in chunk.modules()}
    try:
        for chunk in chunks:
            chunk.eval()
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training


@contextmanager
def _recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Within the context the outputs of modules are kept in host memory, one for each call."""
    outputs: dict[str, list[Tensor]] = {path: [] for path in modules}

    def recorder(path: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            outputs[path].append(first.detach().to("cpu", copy=True))

        return record

    handles = [module.register_forward_hook(recorder(path)) for path, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _weight_sums(site: DoRALinear, dtype: torch.dtype) -> Tensor:
    """Squares of W0, of W' - W0 and of R(W') - W', and how many elements are changed, and put back; of this rank."""
    sums = torch.zeros(5, dtype=torch.float64)
    for index, weight in enumerate(site.base_weights):
        stored = whole_of(weight)
        base, exact = stored.double(), merged_weight(site, index)
        rounded = exact.to(dtype).double()
        change, lost = exact.double() - base, rounded - exact.double()
        is_changed = change != 0
        # What is served where nothing was trained is the base, rounded alike.
        is_put_back = is_changed & (rounded == stored.to(dtype).double())
        squares = [x.square().sum() for x in (base, change, lost)]
        sums += torch.stack([*squares, is_changed.sum(), is_put_back.sum()]).cpu()
    return sums


def _output_sums(adapted: Sequence[Tensor], merged_: Sequence[Tensor]) -> Tensor:
    """Squares of the adapted model's outputs, and of the differences; of this rank."""
    sums = torch.zeros(2, dtype=torch.float64)
    for one, other in zip(adapted, merged_, strict=True):
        sums += torch.stack([one.double().square().sum(), (one.double() - other.double()).square().sum()])
    return sums


def _comparison(
    dtypes: set[torch.dtype], own: Mapping[str, tuple[Tensor, Tensor]], expected: Tensor | None, found: Tensor | None
) -> MergedComparison:
    """Add up the ranks: where several hold the same, it counts as often in both parts of a ratio."""
    # Tensor-parallel ranks have the same tokens.
    is_first = (
        not parallel_state.model_parallel_is_initialized() or parallel_state.get_tensor_model_parallel_rank() == 0
    )
    gaps = torch.zeros(0)
    if is_first and expected is not None and found is not None:
        gaps = (expected.double() - found.double()).abs()
    largest = gaps.max().item() if gaps.numel() else 0.0
    ranks = gather_objects((dtypes, own, gaps.sum().item(), gaps.numel(), largest), world_group())
    all_dtypes, layers, totals, counts, all_largest = zip(*ranks, strict=True)
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for path, (weight, output) in (item for of_rank in layers for item in of_rank.items()):
        weights, outputs = sums.get(path, (torch.zeros_like(weight), torch.zeros_like(output)))
        sums[path] = (weights + weight, outputs + output)
    return MergedComparison(
        tuple(sorted(set().union(*all_dtypes), key=str)),
        tuple(_gap(path, *(part.tolist() for part in sums[path])) for path in sorted(sums, key=_layer_number)),
        sum(counts),
        sum(totals) / sum(counts) if sum(counts) else math.nan,
        max(all_largest),
    )


def _layer_number(path: str) -> float:
    """The first number in a path; what has none, such as an output layer, comes last."""
    number = re.search(r"\.(\d+)\.", path)
    return int(number[1]) if number else math.inf


def _gap(path: str, weight: Sequence[float], output: Sequence[float]) -> LayerGap:
    base, change, lost, num_changed, num_put_back = weight
    return LayerGap(
        path,
        change=_ratio(change, base) ** 0.5,
        lost=_ratio(lost, change) ** 0.5,
        unmoved=_ratio(num_put_back, num_changed),
        output_gap=_ratio(output[1], output[0]) ** 0.5 if output[0] or output[1] else math.nan,
    )


def _ratio(part: float, whole: float) -> float:
    """Zero for nothing of nothing."""
    return part / whole if whole else (math.inf if part else 0.0)
