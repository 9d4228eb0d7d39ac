"""`dora_fx.check`: prove on a user's own model, layout and batch that what should train trains."""

from __future__ import annotations

import math
import time
from typing import Any

from torch import nn

from dora_fx.megatron import Model
from dora_fx.preflight.check_report import CheckError, CheckReport, Finding, joined
from dora_fx.preflight.function_proofs import (
    adapter_off_is_base,
    compiled_is_eager,
    gradients_arrive,
    is_compiled,
    loss_is_reference,
    magnitudes_are_lengths,
    merged_is_adapted,
    recomputation_changes_nothing,
)
from dora_fx.preflight.model_passes import Forward, ForwardBackward
from dora_fx.preflight.parameter_proofs import (
    main_copies_are_parameters,
    optimizer_trains_adapters,
    replicas_are_equal,
    saved_is_trained,
    steps_move_everything,
)
from dora_fx.preflight.saved_state import SavedValues, left_as_it_was
from dora_fx.preflight.set_up import Pass, SetUp, over_all_ranks, uncompiled
from dora_fx.preflight.slope import gradients_are_slopes


def check(
    model: Model,
    batch: Any,
    optimizer: Any = None,
    *,
    reference: float | nn.Module | None = None,
    forward_backward: ForwardBackward | None = None,
    forward: Forward | None = None,
    raises: bool = True,
) -> CheckReport:
    """Prove that a training set-up trains its adapters, all of them and nothing else, and would keep them.

    It takes about sixteen passes of the batch and two steps of the optimizer, and leaves parameters, gradients, the
    optimizer, random states and modes bit by bit as they were. Every rank calls it, with its own part of the batch,
    between two steps: gradients that wait for more micro-batches are given up within Megatron's
    DistributedDataParallel.

    Args:
        model: after `DoRA` ran on it, as it is trained: compiled or not, with its wrappers, a list of chunks.
        batch: for one forward pass with labels; a mapping is passed by keyword, a list or a tuple by position. With
            pipeline stages every stage passes it, and has a tensor `[b, s]` in it.
        optimizer: torch's or Megatron's. Without one, what concerns it is skipped.
        reference: the `loss` of the report of another layout, or a model to call with the batch; this one's loss must
            be the same.
        forward_backward: called with model and batch in place of `model(**batch)` and its loss's backward pass; leaves
            complete gradients, and returns the loss, or None on a rank that has none.
        forward: called so in place of `model(**batch)`, for outputs in evaluation; returns a tensor, or None.
        raises: raise for what failed. Otherwise look at the report.

    Returns:
        The report, the same on every rank; `print` shows a line per property.

    Raises:
        CheckError: on every rank, naming the first layer of what failed, or with what a pass of the batch raised.
        ValueError, TypeError: the model has no adapter, is sharded by FSDP, or returns no loss.
    """
    start = time.perf_counter()
    setup = SetUp(model, batch, optimizer, forward_backward, forward)
    if not sum(over_all_ranks(len(setup.sites))):
        raise ValueError("model: found no adapted layer, expected a model that DoRA was called on")
    with left_as_it_was(setup.chunks, optimizer) as values:
        setup.scale_losses_by_one()
        try:
            found, loss = _findings(setup, values, reference)
        except Exception as error:
            raise CheckError(f"the batch cannot be trained on: {type(error).__name__}: {error}") from error
    report = CheckReport(joined(over_all_ranks(found)), loss, time.perf_counter() - start)
    if raises and report.failed:
        first = report.failed[0]
        raise CheckError(f"{first.name}: {first.text}\n{report}", report)
    return report


def _findings(setup: SetUp, values: SavedValues, reference: float | nn.Module | None) -> tuple[list[Finding], float]:
    """All findings of this rank, in an order that is the same on every rank, and the mean loss."""
    found = [
        optimizer_trains_adapters(setup),
        main_copies_are_parameters(setup),
        saved_is_trained(setup),
        replicas_are_equal(setup, "before"),
        steps_move_everything(setup),
        replicas_are_equal(setup, "after"),
    ]
    values.restore()
    has_model = isinstance(reference, nn.Module)
    # What compiled code keeps of these values must not be used for the next ones. Another model has these, too.
    as_found = _mean_loss(setup.training_pass()) if has_model or is_compiled(setup) else math.nan
    setup.move_adapters()
    with uncompiled():
        eager = setup.training_pass()
    loss = _mean_loss(eager)
    found += [
        gradients_arrive(setup, eager),
        gradients_are_slopes(setup, eager),
        compiled_is_eager(setup, eager),
        recomputation_changes_nothing(setup, eager),
        adapter_off_is_base(setup),
        merged_is_adapted(setup),
        magnitudes_are_lengths(setup),
        loss_is_reference(setup, as_found if has_model else loss, reference),
    ]
    return found, loss


def _mean_loss(found: Pass) -> float:
    """The mean over the ranks that have a loss; every rank calls it."""
    losses = [loss for loss in over_all_ranks(found.loss) if loss is not None]
    return sum(losses) / len(losses) if losses else math.nan
