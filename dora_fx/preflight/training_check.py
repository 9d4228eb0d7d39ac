"""`dora_fx.check`: runs all proofs on a user's model, layout and batch."""

from __future__ import annotations

import math
import time
from typing import Any

from torch import nn

from dora_fx.megatron import Model
from dora_fx.preflight.check_report import CheckError, CheckReport, Finding, join_findings
from dora_fx.preflight.function_proofs import (
    adapter_off_is_base,
    compiled_is_eager,
    gradients_arrive,
    is_compiled,
    loss_is_reference,
    loss_of_reference,
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
    """Prove that a training set-up trains all adapters and nothing else, and that a checkpoint would keep them.

    The check runs about sixteen passes of the batch and two optimizer steps, and restores parameters, gradients, the
    optimizer, random states and modes bit by bit. Every rank calls it between two steps, with its own part of the
    batch. Within Megatron's DistributedDataParallel, partial sums of gradients from earlier micro-batches are
    discarded.

    Args:
        model: a model that `DoRA` was called on, as it is trained: compiled or not, with its wrappers; a list of chunks
            with virtual pipeline stages.
        batch: for one forward pass with labels. A mapping is passed by keyword, a list or a tuple by position. With
            pipeline stages every stage passes it, and it holds a tensor `[b, s]`.
        optimizer: torch's or Megatron's. Without one, the proofs about it are skipped.
        reference: the `loss` of the report of another layout, or a model to call with the batch; the loss must be the
            same.
        forward_backward: called with model and batch in place of `model(**batch)` and the backward pass of its loss. It
            leaves complete gradients, and returns the loss, or None on a rank without a loss.
        forward: called with model and batch in place of `model(**batch)` for outputs in evaluation; returns a tensor or
            None.
        raises: raise an error if a proof fails; with False, read `failed` of the report.

    Returns:
        The report, the same on every rank; `print` shows a line per property.

    Raises:
        CheckError: on every rank, naming the first layer of a failed property, or with the error of a pass of the
            batch.
        ValueError, TypeError: the model has no adapter, is sharded by FSDP, or returns no loss.
    """
    start = time.perf_counter()
    setup = SetUp(model, batch, optimizer, forward_backward, forward)
    if not sum(over_all_ranks(len(setup.sites))):
        raise ValueError("model: found no adapted layer, expected a model that DoRA was called on")
    with left_as_it_was(setup.chunks, optimizer) as values:
        setup.scale_losses_by_one()
        try:
            findings, loss = _findings(setup, values, reference)
        except Exception as error:
            raise CheckError(f"the batch cannot be trained on: {type(error).__name__}: {error}") from error
    report = CheckReport(join_findings(over_all_ranks(findings)), loss, time.perf_counter() - start)
    if raises and report.failed:
        first = report.failed[0]
        raise CheckError(f"{first.name}: {first.text}\n{report}", report)
    return report


def _findings(setup: SetUp, values: SavedValues, reference: float | nn.Module | None) -> tuple[list[Finding], float]:
    """Run all proofs on this rank, in the same order on every rank; return the findings and the mean loss."""
    findings = [
        optimizer_trains_adapters(setup),
        main_copies_are_parameters(setup),
        saved_is_trained(setup),
        replicas_are_equal(setup, "before"),
        steps_move_everything(setup),
        replicas_are_equal(setup, "after"),
    ]
    # The two steps have changed the parameters.
    values.restore()
    # Compiled code runs once before the adapters move, so that norms it keeps by mistake show up as wrong afterwards.
    if is_compiled(setup):
        setup.training_pass()
    # A reference model may share the adapters, and has the values of before the move.
    reference_loss = loss_of_reference(setup, reference) if isinstance(reference, nn.Module) else reference
    has_model, compared = any(over_all_ranks(isinstance(reference, nn.Module))), math.nan
    if has_model:
        with uncompiled():
            compared = _mean_loss(setup.training_pass())
    setup.move_adapters()
    with uncompiled():
        eager = setup.training_pass()
    loss = _mean_loss(eager)
    findings += [
        gradients_arrive(setup, eager),
        gradients_are_slopes(setup, eager),
        compiled_is_eager(setup, eager),
        recomputation_changes_nothing(setup, eager),
        adapter_off_is_base(setup),
        merged_is_adapted(setup),
        magnitudes_are_lengths(setup),
        loss_is_reference(setup, compared if has_model else loss, reference_loss),
    ]
    return findings, loss


def _mean_loss(done: Pass) -> float:
    """Return the mean over the ranks that have a loss; every rank calls it."""
    losses = [loss for loss in over_all_ranks(done.loss) if loss is not None]
    return sum(losses) / len(losses) if losses else math.nan
