"""Compares gradients with differences of the loss: a proof of the backward pass without an oracle, at any layout.

    (L(p + d) - L(p - d)) / 2    against    <dL/dp, d>        d along the gradient

A, B and m move one after the other. DoRA treats norms as constants (arXiv 2402.09353, section 4.3), and so do these
differences: while A or B moves, m is scaled with the norm, so that m / n stays the same.
"""

from __future__ import annotations

import math

import torch

from dora_fx.function import ADAPTER_TENSORS
from dora_fx.preflight.check_report import Finding
from dora_fx.preflight.model_passes import expert_replicas, model_replicas
from dora_fx.preflight.saved_state import SavedValues
from dora_fx.preflight.set_up import Pass, SetUp, kept_routing, over_all_ranks, uncompiled

# Relative changes of the loss to try: small enough to be linear, and above its rounding. If the loss is curved over one
# change, the next one is tried; a wrong gradient is wrong over all of them.
_CHANGES = {torch.float64: (1e-3, 1e-5, 1e-7), torch.float32: (1e-2, 2e-3, 4e-4)}
_CHANGES_OF_16_BITS = (5e-2, 1e-2)
# A tensor moves by no more than this part of itself.
_MOST = 0.05
# Error that the curvature of the loss may add over such a change.
_ROOM = 0.02


def gradients_are_slopes(setup: SetUp, eager: Pass) -> Finding:
    """Prove that the loss changes along the gradients of A, B and m by the amount that they predict."""
    name = "slope"
    gradients = {path: eager.gradients.get(path) for path in setup.adapter_parameters}
    known = all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients.values())
    if not all(over_all_ranks(known)):
        return Finding(name, "skipped", "there are layers without a gradient")
    bound = _ROOM + 3.0 * math.sqrt(setup.rounding)
    with uncompiled(), kept_routing(setup, eager) as kept:
        errors = {kind: _least_error_of(setup, kept, kind, bound) for kind in ADAPTER_TENSORS}
    worst = max(errors, key=lambda kind: errors[kind])
    if not errors[worst] <= bound:
        paths = [path for path in gradients if path.endswith(worst)]
        where = paths[0] if paths else worst
        text = (
            f"{where} and other layers: found a change of the loss {errors[worst]:.1%} off, expected the gradients' own"
        )
        return Finding(name, "failed", text)
    figures = ", ".join(f"{errors[kind]:.1e} ({letter})" for kind, letter in zip(ADAPTER_TENSORS, "ABm", strict=True))
    return Finding(name, "ok", f"the loss changes as the gradients predict, within {figures}")


def _least_error_of(setup: SetUp, eager: Pass, kind: str, bound: float) -> float:
    """Return the error for the first change that is within the bound, or else the least error."""
    dtypes = {site.base_weight.dtype for site in setup.sites.values()}
    of_ranks = over_all_ranks([_CHANGES.get(dtype, _CHANGES_OF_16_BITS) for dtype in dtypes])
    # On every rank those of the coarsest dtype of all ranks.
    changes = max(changes for of_rank in of_ranks for changes in of_rank)
    errors = []
    for change in changes:
        errors.append(_error_of(setup, eager, kind, change))
        if errors[-1] <= bound:
            return errors[-1]
    return min(errors)


def _error_of(setup: SetUp, eager: Pass, kind: str, relative_change: float) -> float:
    """Move one kind of tensor in all layers along its gradients; return the relative error of the predicted change."""
    parameters = setup.adapter_parameters
    moved = {path: eager.gradients[path] for path in parameters if path.endswith(f".adapter.{kind}")}
    squared = _total(setup, {path: float(g.double().square().sum()) for path, g in moved.items() if g is not None})
    if squared == 0.0:
        return 0.0
    change = relative_change * abs(_objective(eager))
    sizes = {path: float(parameters[path].detach().double().square().sum()) for path in moved}
    distance = min(change / (2.0 * squared), _MOST * math.sqrt(_total(setup, sizes) / squared))
    values = SavedValues(parameters.values())
    gains = {path: _gain(setup, path) for path in setup.sites}
    ends = []
    for sign in (1.0, -1.0):
        before = {path: parameters[path].detach().double() for path in moved}
        _move(setup, kind, eager, sign * distance, gains)
        loss = _objective(setup.training_pass())
        dots = {
            path: float((g.double() * (parameters[path].detach().double() - before[path])).sum())
            for path, g in moved.items()
            if g is not None
        }
        # The prediction takes the distance that rounding left of the move, which matters in 16 bits.
        ends.append((loss, _total(setup, dots)))
        values.restore()
    (above, predicted_above), (below, predicted_below) = ends
    return abs((above - below) / (predicted_above - predicted_below) - 1.0)


@torch.no_grad()
def _move(setup: SetUp, kind: str, eager: Pass, distance: float, gains: dict[str, torch.Tensor]) -> None:
    for path, site in setup.sites.items():
        parameter, gradient = site.adapter.get_parameter(kind), eager.gradients[f"{path}.adapter.{kind}"]
        assert gradient is not None
        parameter.add_(gradient.to(parameter.dtype), alpha=distance)
        if kind != "weight_magnitude":
            site.adapter.weight_magnitude.copy_(gains[path] * site._get_weight_norm().flatten())


@torch.no_grad()
def _gain(setup: SetUp, path: str) -> torch.Tensor:
    """Return m / n of each row, and 0 for a row of zeros."""
    site = setup.sites[path]
    # Of a layer that holds several experts, magnitudes are flat.
    norm, magnitude = site._get_weight_norm().flatten(), site.adapter.weight_magnitude
    return torch.where(norm > 0, magnitude / norm, torch.zeros_like(norm))


def _objective(done: Pass) -> float:
    """Return the quantity that the gradients of a pass are gradients of; every rank calls it."""
    losses = [loss for loss in over_all_ranks(None if done.loss is None else done.loss * done.weight) if loss]
    return sum(losses) / len(losses) if losses else math.nan


def _total(setup: SetUp, numbers: dict[str, float]) -> float:
    """Add numbers, by the names of adapter parameters, over all layers and shards, each counted once."""
    own = 0.0
    for path, number in numbers.items():
        site, _, kind = path.partition(".adapter.")
        adapter = setup.sites[site].adapter
        # A tensor that is not sharded is on every tensor-parallel rank, and each counts its share of it.
        share = number if adapter.placements[kind].shard_dim is not None else number / adapter.tp_size
        own += share / (model_replicas() if adapter.experts is None else expert_replicas())
    return sum(over_all_ranks(own))
