"""Tensor-parallel ranks load their shards of a checkpoint, and together compute what transformers computes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from dora_fx.models import build_gpt_model, causal_mask
from tests.closeness import assert_close, rounding, roundings_of
from tests.distributed.launch import run_ranks
from tests.hf_models import tiny_hf_model
from tests.tables import every_case

# Three query groups do not divide by two ranks, so a zero group is added.
CASES: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "llama": ("llama", {}, None),
    "qwen2": ("qwen2", {}, None),
    "phi3": ("phi3", {}, None),
    "zero_group": ("llama_tied", dict(num_key_value_heads=3), 4),
}
# As many tokens as two ranks share.
TOKENS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(8))


def logits_of_all_ranks() -> dict[tuple[str, bool], torch.Tensor]:
    """Logits by case, without and with sequence parallelism."""
    group = parallel_state.get_tensor_model_parallel_group()
    logits = {}
    for case, sequence_parallel in itertools.product(CASES, (False, True)):
        kind, overrides, num_query_groups = CASES[case]
        hf = tiny_hf_model(kind, **overrides)
        settings = dict(num_query_groups=num_query_groups, sequence_parallel=sequence_parallel)
        model = build_gpt_model(hf.config, hf.state_dict(), **settings).eval()
        with torch.no_grad():
            positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
            local = model(TOKENS, positions, causal_mask(TOKENS.shape[1], "cpu"))
        parts = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(parts, local.contiguous(), group=group)
        logits[case, sequence_parallel] = torch.cat(parts, dim=-1)
    return logits


@pytest.fixture(scope="module")
def logits() -> dict[tuple[str, bool], torch.Tensor]:
    return run_ranks(logits_of_all_ranks, 2, 2)


@every_case("sequence_parallel", [False, True])
@every_case("case", CASES)
def test_two_ranks_compute_the_logits_of_transformers(
    case: str, sequence_parallel: bool, logits: dict[tuple[str, bool], torch.Tensor]
) -> None:
    kind, overrides, _ = CASES[case]
    hf = tiny_hf_model(kind, **overrides)
    with torch.no_grad():
        expected = hf(TOKENS).logits
    assert_close(logits[case, sequence_parallel], expected, rounding(torch.float32, roundings_of(hf)))
