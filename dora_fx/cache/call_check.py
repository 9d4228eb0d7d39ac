"""Check once per call of a model what each of its layers would check in front of its own call.

A model's call begins with one refresh of all its layers. Until it ends, the layers do not check again: after a step of
the optimizer there is one gather and one reduction per process group for all of them, and otherwise one comparison. A
layer that is called outside of its model's call, as a checkpoint calls it in the backward pass, checks for itself, and
so does one whose buffers are not those that were checked.

A write into a parameter while its model runs is so noticed by the model's next call. An optimizer's step ends what was
checked, whenever it is. A call that KeyboardInterrupt ends leaves its layers covered until the model is called again or
the optimizer steps: torch has no hook for that end.

On an accelerator the host would launch a comparison of all bits in front of every call, and at large tensor-parallel
sizes the device would wait for it. So between two steps only the first, second, fourth, eighth, ... call compares bits,
and all calls compare addresses and version counters: a write past the counter is noticed at the latest after as many
further calls as the step has had.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from dora_fx.cache.fingerprint import HostMemory, digest_of, host_memory
from dora_fx.cache.freshness import Places, raise_if_found_stale, versions_of
from dora_fx.cache.parameter_cache import RANK_TIMEOUT, CachedSite, refresh
from dora_fx.cache.step_counts import optimizer_steps

# Bytes of factors that are completed at once: what is gathered and reduced is held a second time until it is copied.
_BYTES_AT_ONCE = 2**26

# The scales that a check covers, by their identities. Weak references tell a later tensor of the same identity.
_covered: dict[int, _Coverage] = {}


class _Coverage(NamedTuple):
    """A scale that was up to date when a call of its model began.

    Attributes:
        scale: a weak reference.
        steps: the number of optimizer steps then.
        check: that of the model.
    """

    scale: weakref.ref[torch.Tensor]
    steps: int
    check: CallCheck


def are_covered(scales: Iterable[torch.Tensor]) -> bool:
    """Return whether sites need no check of their own, since a call of their model has begun with one.

    Args:
        scales: delta of each site's buffers.
    """
    steps = optimizer_steps()
    for scale in scales:
        known = _covered.get(id(scale))
        if known is None or known.steps != steps or known.scale() is not scale:
            return False
    return True


class SiteTensors(NamedTuple):
    """The tensors of one site that a check compares.

    Attributes:
        scale: delta of its buffers.
        values: the other buffers that are computed.
        sources: what they are computed from, without the frozen weight.
        weights: of which the frozen weight is made.
    """

    scale: torch.Tensor
    values: tuple[torch.Tensor, ...]
    sources: tuple[torch.Tensor, ...]
    weights: tuple[torch.Tensor, ...]


class _Record(NamedTuple):
    """The tensors of a check that found nothing stale, in a form that is quick to compare.

    Attributes:
        steps: the number of optimizer steps at that time.
        places: of all tensors.
        runs: in host memory, that of the sources and of a sample of the weights' rows; None on an accelerator.
        bits: their digest.
    """

    steps: int
    places: Places
    runs: tuple[HostMemory, ...] | None
    bits: int

    @classmethod
    def of_maybe(cls, sites: Sequence[SiteTensors], before: _Record | None) -> _Record | None:
        """Return the record; None where tensors are strided, made in inference mode, or on several devices.

        Args:
            before: an earlier record of the same model. Where its tensors have not moved, as after a step, they are not
                looked up again.
        """
        tensors, steps = _tensors_of(sites), optimizer_steps()
        is_plain = all(tensor.is_contiguous() and not tensor.is_inference() for tensor in tensors)
        if not is_plain or len({tensor.device for tensor in tensors}) != 1:
            return None
        if before is not None and before.places.hold(tensors):
            places = before.places._replace(versions=versions_of(tensors))
            return cls(steps, places, before.runs, digest_of(before.runs or ()))
        runs: list[HostMemory] | None = None
        if tensors[0].is_cpu:
            runs = [run for site in sites for source in site.sources for run in host_memory(source, sampled=False)]
            runs += [run for site in sites for weight in site.weights for run in host_memory(weight, sampled=True)]
        return cls(steps, Places.of(tensors), None if runs is None else tuple(runs), digest_of(runs or ()))

    def is_of(self, sites: Sequence[SiteTensors]) -> bool:
        """Return whether these are the same tensors in the same step, and PyTorch counted no write into them."""
        return self.steps == optimizer_steps() and self.places.are_still(_tensors_of(sites))


def _tensors_of(sites: Iterable[SiteTensors]) -> list[torch.Tensor]:
    return [tensor for scale, values, sources, weights in sites for tensor in (scale, *values, *sources, *weights)]


class CallCheck:
    """The checks of one model's calls.

    Args:
        rank_timeout: as `refresh` takes it, in seconds.
    """

    def __init__(self, rank_timeout: float = RANK_TIMEOUT) -> None:
        self._rank_timeout = rank_timeout
        self._known: _Record | None = None
        # Since the last refresh that found something stale, without the one that began with it.
        self._calls = 0
        # Whether the last step had other calls beside its first.
        self._repeats = False
        self._begun: list[int] = []

    def __reduce__(self) -> tuple[type[CallCheck], tuple[float]]:
        """Copies and pickles know nothing yet: their tensors are others."""
        return CallCheck, (self._rank_timeout,)

    def holds_for(self, sites: Sequence[SiteTensors]) -> bool:
        """Return whether nothing has changed since the last refresh; False where another has to tell.

        Raises:
            StaleParametersError: an earlier call on an accelerator used a value that was out of date.
        """
        known = self._known
        # Only a refresh tells whether a call that a backward pass repeats has another adapter.
        if known is None or torch._C._current_graph_task_id() != -1 or not known.is_of(sites):
            self._repeats, self._calls = self._calls > 0, 0
            return False
        self._calls += 1
        if known.runs is None:
            raise_if_found_stale()
            is_power_of_two = self._calls & (self._calls - 1) == 0
            return not is_power_of_two
        return digest_of(known.runs) == known.bits

    def refresh(self, sites: Sequence[SiteTensors], cached: Sequence[CachedSite]) -> None:
        """Bring the sites up to date.

        Raises:
            StaleParametersError, RuntimeError, ValueError: as `refresh` raises.
        """
        before, self._known = self._known, None
        were_stale = [refresh(run, self._rank_timeout) for run in _runs(cached)]
        if not any(were_stale):
            self._calls = max(1, self._calls)
        # In a step of one call there is no other that would read a record.
        if self._repeats or not any(were_stale):
            self._known = _Record.of_maybe(sites, before)

    def begin(self, scales: Sequence[torch.Tensor]) -> None:
        """Let sites that are up to date be until `end`."""
        # A call that KeyboardInterrupt ended had no end, and one that began inside another ends the outer one's.
        self.end()
        steps = optimizer_steps()
        self._begun = [id(scale) for scale in scales]
        for scale in scales:
            _covered[id(scale)] = _Coverage(weakref.ref(scale), steps, self)

    def end(self) -> None:
        """Let sites check for themselves again."""
        for each in self._begun:
            if each in _covered and _covered[each].check is self:
                del _covered[each]
        self._begun = []


def _runs(sites: Sequence[CachedSite]) -> Iterable[Sequence[CachedSite]]:
    """Yield consecutive sites of `_BYTES_AT_ONCE` of factors together; the same on all ranks of their groups."""
    run: list[CachedSite] = []
    size = 0
    for site in sites:
        run.append(site)
        size += site.stored.lora_a.nbytes + site.stored.lora_b.nbytes
        if size >= _BYTES_AT_ONCE:
            yield run
            run, size = [], 0
    if run:
        yield run
