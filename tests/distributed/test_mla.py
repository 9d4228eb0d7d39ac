"""Multi-latent attention with emulated kernels: duplicated and gathered down-projections, and the norms between.

The layer on one rank is what others are compared with; the function of each kind of linear layer has tests of its own.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from dora_fx.attach.latent_attention import warn_of_approximate_backward
from tests.closeness import assert_apart, assert_close, rounding
from tests.distributed.launch import run_ranks
from tests.distributed.mla_models import (
    HIDDEN,
    base_step,
    files_and_merged,
    one_step_and_twenty,
    refusal_of_fused_projections,
    refusal_of_splitting,
)
from tests.unit.test_specs import needs_hybrid_model

pytestmark = pytest.mark.usefixtures("emulated_te")
slow = pytest.mark.slow
# Sums of eight linear layers, one after another; a step has three times as many as a forward pass.
BOUND = rounding(torch.float32, 20 * 3 * 8 * HIDDEN)
KEYS_OF_POSITIONS = "self_attention.linear_kv_down_proj"


@pytest.fixture(scope="module")
def one_rank() -> dict[str, torch.Tensor]:
    found = run_ranks(one_step_and_twenty, 1, 1, "te", False)
    assert all(tensor.isfinite().all() for tensor in found.values())
    for name, value in found.items():
        if name.startswith("d "):
            assert value.abs().max() > 0, name
    return found


@pytest.mark.parametrize(
    ("spec", "tp"), [("local", 1), ("te", 2), pytest.param("te", 4, marks=slow)], ids=lambda value: str(value)
)
def test_every_rank_trains_what_one_trains_emulated_kernels(spec: str, tp: int, one_rank: dict) -> None:
    """Transformer Engine's down-projections are duplicated: under sequence parallelism each rank has its own tokens."""
    assert_close(run_ranks(one_step_and_twenty, tp, tp, spec, tp > 1), one_rank, BOUND)


@pytest.mark.parametrize(
    ("spec", "tp", "sequence_parallel"),
    [
        ("local", 2, True),
        pytest.param("local", 2, False, marks=slow),
        pytest.param("local", 4, True, marks=slow),
        pytest.param("local", 4, False, marks=slow),
        pytest.param("te", 2, False, marks=slow),
        pytest.param("te", 4, False, marks=slow),
    ],
)
def test_where_megatron_itself_leaves_out_gradients_all_others_are_right_emulated_kernels(
    spec: str, tp: int, sequence_parallel: bool, one_rank: dict
) -> None:
    """See `attach/latent_attention.py`: the base without adapters has the same fault, in the same place."""
    base = run_ranks(base_step, tp, tp, spec, sequence_parallel)
    expected_base = run_ranks(base_step, 1, 1, spec, False)
    assert_close(base["y"], expected_base["y"], BOUND)
    assert_apart(base["dx"], expected_base["dx"])
    found = run_ranks(one_step_and_twenty, tp, tp, spec, sequence_parallel)
    of_one_step = {name for name in found if name == "y" or name.startswith("d ")}
    whole = {name for name in of_one_step if KEYS_OF_POSITIONS not in name}
    assert len(of_one_step) - len(whole) == 3
    assert_close({name: found[name] for name in whole}, {name: one_rank[name] for name in whole}, BOUND)


def warned(spec: str, sequence_parallel: bool) -> list[str]:
    """The warnings of attaching on this rank."""
    from tests.distributed.mla_models import adapted_mla

    messages: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger = logging.getLogger(warn_of_approximate_backward.__module__)
    logger.addHandler(Keeper())
    adapted_mla(spec, sequence_parallel)
    return messages


@pytest.mark.parametrize(
    ("spec", "tp", "sequence_parallel", "is_warned"),
    [("te", 2, True, False), ("local", 2, True, True), pytest.param("te", 2, False, True, marks=slow)],
)
def test_the_user_is_told_where_gradients_are_left_out_emulated_kernels(spec, tp, sequence_parallel, is_warned) -> None:
    messages = run_ranks(warned, tp, tp, spec, sequence_parallel)
    assert len(messages) == is_warned
    if is_warned:
        assert "self_attention.linear_kv_down_proj" in messages[0] and "sequence_parallel=True" in messages[0]


def test_adapters_fit_both_specs_and_merge_emulated_kernels(tmp_path: Path) -> None:
    found = run_ranks(files_and_merged, 1, 1, ["te", "local"], str(tmp_path))
    expected = found["te"]["adapted"]
    for outputs in found.values():
        for output in outputs.values():
            assert_close(output, expected, rounding(torch.float32, 2 * 8 * HIDDEN))


def test_a_wrapped_layer_is_not_split_emulated_kernels() -> None:
    message = run_ranks(refusal_of_splitting, 1, 1)
    assert "self_attention.linear_kv_up_proj" in message and "the copy would have no adapter" in message


# Fused down-projections came with the same version.
@needs_hybrid_model
def test_down_projections_in_one_layer_are_refused_emulated_kernels() -> None:
    message = run_ranks(refusal_of_fused_projections, 1, 1)
    assert message.startswith("self_attention.linear_qkv_down_proj: found a TELayerNormColumnParallelLinear")
    assert "mla_down_proj_fusion=False" in message
