"""Layers over Transformer Engine, with emulated kernels, send no tokens x features more than Transformer Engine itself.

Sequence-parallel column layers send the low-rank product of their tokens, and its gradient.

The base's collectives are counted in its own code, ours in the adapted layer, eager and compiled; `pytest -s` prints
them.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.distributed.launch import call_in_process
from tests.graph.sites import DIM, IN, OUT
from tests.graph.te_sites import BATCH, CASES, SEQUENCE, added_collectives, graphs_of_chain

pytestmark = pytest.mark.usefixtures("emulated_te")

TP, FLOAT = 4, 4
LORA_A = {("all_gather", DIM * IN * FLOAT): 1}
LORA_B = {("all_gather", OUT * DIM * FLOAT): 1}
NORM = {("all_reduce", (OUT + DIM * DIM) * FLOAT): 1}
LORA_A_GRAD = {("reduce_scatter", DIM * IN * FLOAT): 1}
LORA_B_GRAD = {("reduce_scatter", OUT * DIM * FLOAT): 1}
MAGNITUDE_GRAD = {("all_reduce", OUT * FLOAT): 1}
# dA, dB and dm of a layer whose ranks see other tokens.
EVERY_GRAD = {("all_reduce", (DIM * IN + OUT * DIM + OUT) * FLOAT): 1}

# name, sequence parallelism, dropout -> what of weights' size is added once per optimizer step, and by a backward pass
CONTRACT = {
    ("norm_column", False, 0.0): (LORA_A, LORA_A_GRAD),
    ("norm_column", True, 0.5): (LORA_A, LORA_A_GRAD),
    ("column", False, 0.5): (LORA_A, LORA_A_GRAD),
    ("column", True, 0.0): (LORA_A, LORA_A_GRAD),
    ("row", False, 0.0): (LORA_B | NORM, LORA_B_GRAD),
    ("row", False, 0.5): (LORA_B | NORM, LORA_B_GRAD | MAGNITUDE_GRAD),
    ("row", True, 0.0): (LORA_B | NORM, LORA_B_GRAD | MAGNITUDE_GRAD),
    ("row", True, 0.5): (LORA_B | NORM, LORA_B_GRAD | MAGNITUDE_GRAD),
    ("duplicated", False, 0.5): ({}, {}),
    ("duplicated", True, 0.0): ({}, EVERY_GRAD),
    ("duplicated", True, 0.5): ({}, EVERY_GRAD),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_collectives_added_to_the_base_emulated_kernels(compiled):
    found = call_in_process(every_case, compiled)
    for (name, sequence_parallel, dropout), (once, backward) in CONTRACT.items():
        added = found[name, sequence_parallel, dropout]
        print(f"{name:12} {'SP' * sequence_parallel:2} dropout {dropout}: {added}")
        low_rank = [SEQUENCE * BATCH * DIM * FLOAT] if "column" in name and sequence_parallel else []
        forward = {("all_gather", size): 1 for size in low_rank}
        backward = backward | {("reduce_scatter", size): 1 for size in low_rank}
        assert added == {"once": once, "forward": forward, "backward": backward, "removed": {}}, name
        activations = [SEQUENCE * BATCH * width * FLOAT for width in (IN, OUT)]
        assert all(size not in activations for _, size in added["once"] | added["forward"] | added["backward"])


def every_case(compiled: bool) -> dict[tuple[str, bool, float], dict[str, dict[tuple[str, int], int]]]:
    return {case: added_collectives(case[0], TP, case[1], case[2], compiled) for case in CONTRACT}


def test_gradients_of_two_dtypes_are_one_message_emulated_kernels():
    # A's and B's are bfloat16, the magnitude's float32; all travel, and are added up, in float32.
    added = call_in_process(added_collectives, "duplicated", TP, True, 0.0, True, torch.bfloat16)
    assert added == {"once": {}, "forward": {}, "backward": EVERY_GRAD, "removed": {}}


def test_every_kind_has_its_contract():
    assert {name for name, _, _ in CONTRACT} == set(CASES)


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True), (8, True)])
def test_a_chain_is_one_graph_emulated_kernels(tp, sequence_parallel):
    call = partial(call_in_process, graphs_of_chain)
    num_graphs, names, backward = call(tp, sequence_parallel)
    assert num_graphs == 1
    assert names.count("rms_norm") == 1 and "dora_linear" not in names
    # The gradients of three layers in one message of each kind: the factors', and what is partial over tokens.
    sizes = {kind for kind, _ in backward}
    messages = names.count("substitute_gathered_rows"), names.count("copy_to_group_coalesced")
    assert messages == ((0, 0) if tp == 1 else (1, int(sequence_parallel)))
    assert bool(sizes) == (tp > 1)
