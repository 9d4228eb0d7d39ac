"""Proofs about outputs and gradients: gradients arrive, and compiling, recomputing and merging change nothing.

Each function proves one property on this rank; every rank calls all of them in the same order. Errors are relative: of
outputs to the change that the adapters make, of gradients to the gradient. The bound is the square root of the dtype's
rounding; where whole models are compared it grows with their depth (`SetUp.room`). It lies far above the effect of
another order of sums (1e-6 in float32, 1e-2 in bfloat16) and far below the effect of a wrong formula.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo import OptimizedModule

from dora_fx.attach import adapted_layers, merge_problem_maybe, merged, merged_weight
from dora_fx.modules import disable_adapter
from dora_fx.preflight.check_report import Finding, failed_at
from dora_fx.preflight.model_passes import call, loss_of
from dora_fx.preflight.saved_state import SavedValues
from dora_fx.preflight.set_up import (
    Pass,
    SetUp,
    drops_in_base,
    not_finite,
    over_all_ranks,
    uncompiled,
    without_idle_experts,
    without_recomputation,
)
from dora_fx.ranks import resolve_group

# Gradients go through more roundings than outputs.
_ROOM_FOR_GRADIENTS = 3.0


def gradients_arrive(setup: SetUp, eager: Pass) -> Finding:
    """Prove that every adapter tensor gets a finite gradient that is not zero, away from the initial B and m."""
    name = "gradients"
    gradients = {path: eager.gradients.get(path) for path in setup.adapter_parameters}
    norms = {path: float(gradient.double().norm()) for path, gradient in gradients.items() if gradient is not None}
    zeros = [path for path, norm in norms.items() if norm == 0.0]
    others = [path for path, norm in norms.items() if norm != 0.0]
    problems = (
        ([path for path, gradient in gradients.items() if gradient is None], "no gradient"),
        (not_finite(gradients), "a gradient that is not finite"),
        (without_idle_experts(zeros, others), "zeros alone"),
    )
    for paths, found in problems:
        if paths:
            return failed_at(name, paths, f"{found}, expected a gradient in every adapted layer")
    least = min(others, key=lambda path: norms[path], default="none here")
    idle = f"; {len(zeros)} of experts without a token are zero" if zeros else ""
    return Finding(name, "ok", f"all are there and finite; least norm {norms.get(least, 0.0):.1e} ({least}){idle}")


def compiled_is_eager(setup: SetUp, eager: Pass) -> Finding:
    """Prove that compiled code gives the loss and the gradients of eager code."""
    name = "compiled"
    if not is_compiled(setup):
        return Finding(name, "skipped", "nothing is compiled")
    if drops_in_base(setup):
        return Finding(name, "skipped", "the base has dropout, whose masks differ in compiled code")
    return _same_pass(name, setup, setup.training_pass(), eager, "eager")


def recomputation_changes_nothing(setup: SetUp, eager: Pass) -> Finding:
    """Prove that activation checkpointing gives the loss and the gradients of a pass that keeps the activations."""
    name = "recomputation"
    with without_recomputation(setup) as was_on, uncompiled():
        if not was_on:
            return Finding(name, "skipped", "there is none")
        kept = setup.training_pass()
    return _same_pass(name, setup, eager, kept, "kept activations")


def adapter_off_is_base(setup: SetUp) -> Finding:
    """Prove that with B = 0 and m = norm the adapted layers compute what their base layers compute."""
    values = SavedValues(setup.adapter_parameters.values())
    moved = setup.output()
    with disable_adapter(setup.model):
        off = setup.output()
    setup.make_adapters_fresh()
    fresh = setup.output()
    values.restore()
    return _same_output("adapter off", setup, fresh, off, moved, "a fresh adapter from the base")


def merged_is_adapted(setup: SetUp) -> Finding:
    """Prove that the merged model computes what the adapted model computes."""
    name = "merged"
    sites = [(named.whole_path, named.module) for _, named in adapted_layers(setup.chunks)]
    problems = over_all_ranks(merge_problem_maybe(setup.chunks, sites))
    problem = next((problem for problem in problems if problem is not None), None)
    if problem is not None:
        return Finding(name, "skipped", problem)
    adapted = setup.output()
    with disable_adapter(setup.model):
        off = setup.output()
    with merged(setup.model):
        whole = setup.output()
    return _same_output(name, setup, whole, adapted, off, "merged weights from adapters")


@torch.no_grad()
def magnitudes_are_lengths(setup: SetUp) -> Finding:
    """Prove that the rows of m / n * (W0 + s B A) have the norm m, at any number of ranks, so that n is right."""
    name = "magnitudes"
    errors = {}
    for path, (site, index) in setup.matrices.items():
        adapter = site.adapter
        squares = merged_weight(site, index).square().sum(1)
        if adapter.tp_group and adapter.layout.shards_input_features:
            # Each rank has the squares of its own input features.
            dist.all_reduce(squares, group=resolve_group(adapter.tp_group))
        errors[path] = _error(squares.sqrt(), site.matrix_factors(index).magnitude.detach().abs())
    worst = max(errors, key=lambda path: errors[path], default="none here")
    if errors and not errors[worst] <= math.sqrt(setup.rounding):
        return Finding(
            name,
            "failed",
            f"{worst}: found rows of the adapted weight whose norms are {errors[worst]:.1e} off, expected m",
        )
    return Finding(name, "ok", f"rows have the norm m, within {errors.get(worst, 0.0):.1e} ({worst})")


def loss_of_reference(setup: SetUp, reference: nn.Module) -> float:
    """Return the loss of another model with the same adapters on the batch of the set-up."""
    with torch.no_grad():
        return float(loss_of(call(reference, setup.batch)))


def loss_is_reference(setup: SetUp, loss: float, reference: float | None) -> Finding:
    """Prove that the loss equals that of another layout, or of another model with the same adapters."""
    name = "reference"
    if reference is None:
        return Finding(name, "skipped", "none was given")
    error = abs(loss - reference) / max(abs(reference), 1e-30)
    text = f"loss {loss:.6f} of {reference:.6f}, {error:.1e} apart"
    return Finding(name, "ok" if error <= math.sqrt(setup.rounding) else "failed", text)


def _same_pass(name: str, setup: SetUp, found: Pass, expected: Pass, of: str) -> Finding:
    bound = _ROOM_FOR_GRADIENTS * setup.room
    errors = {path: _error(found.gradients[path], gradient) for path, gradient in expected.gradients.items()}
    worst = max(errors, key=lambda path: errors[path], default="")
    text = f"gradients within {errors.get(worst, 0.0):.1e} of {of} ({worst})"
    if not errors.get(worst, 0.0) <= bound:
        return Finding(name, "failed", f"{worst}: found a gradient {errors[worst]:.1e} away from {of}")
    if found.loss is not None and expected.loss is not None:
        error = abs(found.loss - expected.loss) / max(abs(expected.loss), 1e-30)
        text = f"loss within {error:.1e}, {text}"
        if not error <= bound:
            return Finding(name, "failed", f"model: found a loss of {found.loss:.6f}, {expected.loss:.6f} with {of}")
    return Finding(name, "ok", text)


def _same_output(
    name: str,
    setup: SetUp,
    found: torch.Tensor | None,
    expected: torch.Tensor | None,
    other: torch.Tensor | None,
    what: str,
) -> Finding:
    """Compare outputs; the error is relative to the change that the adapters make."""
    if found is None or expected is None or other is None:
        return Finding(name, "skipped", "the output is on another rank")
    found, expected, other = found.double(), expected.double(), other.double()
    effect = float((other - expected).norm())
    difference = float((found - expected).norm())
    error = difference / max(effect, 1e-30)
    text = f"{what}: {error:.1e} of what the adapters change"
    return Finding(name, "ok" if error <= setup.room else "failed", text)


def _error(found: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    if found is None or expected is None:
        return 0.0 if found is expected else math.inf
    scale = float(expected.double().norm())
    difference = float((found.double() - expected.double()).norm())
    return difference / scale if scale > 0.0 else (0.0 if difference == 0.0 else math.inf)


def is_compiled(setup: SetUp) -> bool:
    """Return whether a part of the model is compiled."""
    modules = [module for chunk in setup.chunks for module in chunk.modules()]
    compiled = (getattr(module, "_compiled_call_impl", None) is not None for module in modules)
    return any(compiled) or any(isinstance(module, OptimizedModule) for module in modules)
