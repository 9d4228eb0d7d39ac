"""Memory: what surely does not fit is told from what may, and a failed allocation from other failures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dora_fx import DoRA
from dora_fx.app.bases.base_model import DTYPES
from dora_fx.app.bases.memory import (
    check_batch_fits,
    estimate_memory,
    fitting_in_memory,
    memory_of,
    memory_warning_maybe,
)
from dora_fx.app.errors import UserError
from dora_fx.app.options.finetune_options import FinetuneOptions
from dora_fx.app.training.adapter_optimizer import AdapterOptimizer
from dora_fx.models import causal_mask
from tests.hf_models import tiny_hf_config, tiny_hf_model
from tests.peft_models import megatron_of


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


SIZES: list[dict[str, Any]] = [
    dict(hidden_size=96, intermediate_size=160, num_hidden_layers=3, vocab_size=128),
    dict(hidden_size=48, intermediate_size=256, num_hidden_layers=5, num_key_value_heads=3, vocab_size=640),
    dict(kind="qwen3_moe", hidden_size=96, num_hidden_layers=3, vocab_size=128),
]


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("size", SIZES, ids=["wide", "deep", "experts"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_estimate_is_what_training_takes(size: dict[str, Any], dtype: str) -> None:
    """Parameters, gradients and optimizer state to the byte; activations as autograd keeps them, within a sixth."""
    options = FinetuneOptions(demo="text", dtype=dtype, batch_size=2, sequence_length=48)
    model = DoRA(dim=4, alpha=8)(megatron_of(tiny_hf_model(**size), dtype=DTYPES[dtype]))
    estimate = estimate_memory(model, options)
    optimizer = AdapterOptimizer(model, options, "cpu")
    kept = bytes_kept(model, options)
    optimizer.step(1e-3)
    own = [*model.parameters(), *model.buffers()]
    assert estimate.parameters == sum(tensor.numel() * tensor.element_size() for tensor in own)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert estimate.gradients == sum(p.main_grad.numel() * p.main_grad.element_size() for p in trained)
    state = [value for single in optimizer.megatron.optimizer.state.values() for value in single.values()]
    moments = sum(value.numel() * value.element_size() for value in state if value.dim() > 0)
    copies = sum(parameter.numel() * 4 for parameter in trained if parameter.dtype == torch.bfloat16)
    assert estimate.optimizer == moments + copies
    # The logits' gradient comes with the backward pass; norms and attention weights are float32 in bfloat16, too.
    logits = 2 * 48 * size["vocab_size"] * 4
    assert kept <= 1.17 * estimate.activations and estimate.activations - logits <= 1.17 * kept


def bytes_kept(model: nn.Module, options: FinetuneOptions) -> int:
    """Bytes that autograd keeps for the backward pass of one micro-batch, which is run."""
    tensors = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in tensors:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    length = options.sequence_length
    tokens = torch.randint(0, 64, (options.batch_size, length + 1))
    positions = torch.arange(length).expand(options.batch_size, length)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = model(tokens[:, :-1], positions, causal_mask(length, "cpu"), labels=tokens[:, 1:])
    losses.mean().backward()
    return sum(found.values())


@pytest.mark.usefixtures("world")
def test_the_estimate_follows_the_options() -> None:
    model = DoRA(dim=4, alpha=8)(megatron_of(tiny_hf_model(num_hidden_layers=4)))

    def activations(**options: Any) -> int:
        return estimate_memory(model, FinetuneOptions(demo="text", **options)).activations

    assert activations(batch_size=3) == pytest.approx(3 * activations(), rel=1e-6)
    assert activations(recompute=True) < activations() / 3
    assert activations(gradient_accumulation=4) == activations()
    # Two stages have half the layers, and the first holds two micro-batches at once.
    assert activations(pp=2, gradient_accumulation=4) == activations()
    assert activations(pp=2) < activations()
    assert activations(tp=2) > activations(tp=2, sequence_parallel=True) > activations() / 2 - 1


@pytest.mark.usefixtures("world")
def test_a_run_that_may_not_fit_is_warned_of() -> None:
    model = DoRA(dim=4, alpha=8)(megatron_of(tiny_hf_model()))
    fits = FinetuneOptions(demo="text")
    assert memory_warning_maybe(estimate_memory(model, fits), fits, "cpu") is None
    large = FinetuneOptions(demo="text", batch_size=2**24)
    warning = memory_warning_maybe(estimate_memory(model, large), large, "cpu")
    assert warning is not None and "the run may not fit in memory" in warning and "--recompute" in warning
