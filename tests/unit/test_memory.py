"""Memory: what surely does not fit is told from what may, and a failed allocation from other failures."""

from __future__ import annotations

import pytest
import torch

from dora_fx.cli.errors import UserError
from dora_fx.cli.memory import check_batch_fits, fitting_in_memory, memory_of
from tests.hf_models import tiny_hf_config


def test_the_memory_of_a_batch_is_a_lower_bound() -> None:
    """Of what fits: a batch whose logits and attention weights are exactly as large as the memory."""
    config = tiny_hf_config(vocab_size=2**20, num_hidden_layers=1, num_attention_heads=6)
    there = memory_of("cpu")
    per_sequence = 64 * (2**20 * 4 + 6 * 64 * 4)
    check_batch_fits(there // per_sequence, 64, config, 1, "cpu", 4)
    with pytest.raises(UserError, match=r"--batch-size: .* expected at most the [\d,]+ MiB of memory"):
        check_batch_fits(there // per_sequence + 1, 64, config, 1, "cpu", 4)


def test_only_a_failed_allocation_is_called_one() -> None:
    message = r"^a batch does not fit in memory \(RuntimeError: .*\); take less$"
    with pytest.raises(UserError, match=message), fitting_in_memory("a batch", "take less"):
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="size of tensor a"), fitting_in_memory("a batch", "take less"):
        torch.ones(2) + torch.ones(3)
