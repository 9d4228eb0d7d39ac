"""Megatron's own recomputation in its schedules, with its data parallelism and distributed optimizer, in every spec."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

import dora_fx
from dora_fx.megatron.cpu_runtime import cuda_means_cpu
from dora_fx.models import causal_mask
from tests.closeness import assert_close, rounding, roundings_of
from tests.distributed.launch import visit_worlds
from tests.distributed.pipeline_gpt import Layout
from tests.distributed.spec_models import TOKENS, adapted
from tests.megatron_checkpoint import BLOCK, UNIFORM, counted_checkpoints, without_cuda_generators
from tests.models import trainable
from tests.unit.test_specs import needs_hybrid_model

MICRO_BATCHES = 2
LAYOUTS = [Layout(), Layout(pp=2), Layout(tp=2)]


def micro_batch_loss(batches: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    tokens = next(batches)
    positions, mask = torch.arange(tokens.shape[1]).expand_as(tokens), causal_mask(tokens.shape[1], "cpu")
    output = model(tokens, positions, mask, labels=tokens)
    return output, lambda losses: (losses.mean(), losses.detach().mean())


def train_a_step(model: Any) -> dict[str, torch.Tensor]:
    """Gradients of a step on this rank's stage, and their norm."""
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True)
    settings = OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=True)
    with cuda_means_cpu():
        model.config.batch_p2p_comm = False
        wrapped = DistributedDataParallel(model.config, ddp_config, model)
        optimizer = get_megatron_optimizer(settings, [wrapped])
        get_forward_backward_func()(
            forward_step_func=micro_batch_loss,
            data_iterator=iter(TOKENS.chunk(MICRO_BATCHES)),
            model=wrapped,
            num_microbatches=MICRO_BATCHES,
            seq_length=TOKENS.shape[1],
            micro_batch_size=len(TOKENS) // MICRO_BATCHES,
            forward_only=False,
        )
        finalize_model_grads([wrapped])
        found = {name: parameter.main_grad.clone() for name, parameter in trainable(model).items()}
        _, norm, _ = optimizer.step()
    return {**found, "norm": torch.as_tensor(norm)}


def compare_recomputation(layout: Layout, spec: str, scopes: list[Any]) -> None:
    """Compare a step's gradients with those without recomputation, bitwise where nothing is compiled."""
    expected = train_a_step(adapted("qwen2", spec, sequence_parallel=layout.tp > 1))
    assert all(gradient.count_nonzero() for gradient in expected.values())
    for settings, scope in [(UNIFORM, None), (BLOCK, None), *((UNIFORM, scope) for scope in scopes)]:
        model: Any = adapted("qwen2", spec, sequence_parallel=layout.tp > 1)
        for name, value in settings.items():
            setattr(model.config, name, value)
        if scope is not None:
            dora_fx.compile_model(model, scope, inner_compiler="aot_eager")
        with without_cuda_generators(), counted_checkpoints() as checkpoints:
            found = train_a_step(model)
        # A whole graph has torch's operator in its place.
        assert checkpoints or scope == "model"
        if scope is None:
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        else:
            assert_close(found, expected, rounding(torch.float32, 3 * roundings_of(model)))


def test_gradients_are_those_without_recomputation() -> None:
    visit_worlds([(compare_recomputation, layout) for layout in LAYOUTS], "local", [])


@pytest.mark.slow
def test_compiled_stages() -> None:
    visit_worlds([(compare_recomputation, Layout(pp=2))], "local", ["layer", "model"])


@pytest.mark.usefixtures("emulated_te")
@pytest.mark.parametrize("spec", ["te", pytest.param("hybrid", marks=needs_hybrid_model)])
def test_every_spec_emulated_kernels(spec: str) -> None:
    visit_worlds([(compare_recomputation, layout) for layout in LAYOUTS], spec, [])


@pytest.mark.slow
@pytest.mark.usefixtures("emulated_te")
@pytest.mark.parametrize("spec", ["te", pytest.param("hybrid", marks=needs_hybrid_model)])
def test_every_spec_compiled_emulated_kernels(spec: str) -> None:
    visit_worlds([(compare_recomputation, Layout())], spec, ["layer", "model"])
