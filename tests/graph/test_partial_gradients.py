"""Gradients that are completed once per step are never used, and never lost, while they are partial sums."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch._dynamo.utils import counters
from torch.func import functional_call

import dora_fx
from dora_fx.megatron.cpu_runtime import cuda_means_cpu
from dora_fx.modules.partial_gradients import PartialGradientsError
from tests.graph.sites import IN, OneLinear, adapted, column, config, row

TP = 2


def once(complete_gradients: str = "once_per_step") -> OneLinear:
    """A column layer whose gradients are completed once per step, if nothing else is asked, on rank 0 of two."""
    return adapted(column(tensor_model_parallel_size=TP), complete_gradients=complete_gradients)


def data_parallel(model: OneLinear) -> DistributedDataParallel:
    return DistributedDataParallel(config(tensor_model_parallel_size=TP), DistributedDataParallelConfig(), model)


def backward(model: torch.nn.Module) -> None:
    output, _ = model(torch.ones(3, 2, IN, dtype=next(model.parameters()).dtype))
    output.sum().backward()


def compile_anew(model: OneLinear) -> None:
    """Compile it as if nothing had been compiled, and counted, before."""
    torch._dynamo.reset()
    counters.clear()
    model.compile(backend="dora_fx", options={"inner_compiler": "aot_eager"}, fullgraph=True)


def finish(ddp: DistributedDataParallel) -> None:
    with cuda_means_cpu():
        ddp.finish_grad_sync()


def trained(model: OneLinear) -> list[torch.nn.Parameter]:
    return list(model.linear.adapter.parameters())


def lora_a_of(model: OneLinear) -> Any:
    return model.linear.adapter.linear_in.weight


def pending_sum(model: OneLinear) -> torch.Tensor | None:
    return model.linear._accumulators.lora_a.total


def test_an_unknown_value_is_refused():
    with pytest.raises(ValueError, match=r"DoRA.complete_gradients: found 'step', expected one of \['auto', 'every_b"):
        dora_fx.DoRA(complete_gradients="step")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_by_default_gradients_are_summed_where_megatron_reduces_them(tensor_parallel, compiled):
    tensor_parallel(TP)
    model = once("auto")
    if compiled:
        compile_anew(model)
    backward(model)
    assert lora_a_of(model).grad is not None and pending_sum(model) is None
    lora_a_of(model).grad = None
    ddp = data_parallel(model)
    for _ in range(2):
        backward(ddp)
    assert lora_a_of(model).grad is None and pending_sum(model) is not None
    finish(ddp)
    assert pending_sum(model) is None
    assert not compiled or counters["dora_fx"]["graphs_compiled"] == 2


def test_an_evaluation_is_compiled_once_whatever_is_around_the_model(tensor_parallel):
    tensor_parallel(TP)
    model = once("auto")
    compile_anew(model)
    x = torch.ones(3, 2, IN)
    with torch.no_grad():
        model(x)
    ddp = data_parallel(model)
    with torch.no_grad():
        ddp(x)
    assert counters["dora_fx"]["graphs_compiled"] == 1


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_wrapper_that_is_gone_leaves_gradients_to_the_backward_pass(tensor_parallel, compiled):
    tensor_parallel(TP)
    model = once("auto")
    if compiled:
        compile_anew(model)
    ddp = data_parallel(model)
    backward(ddp)
    del ddp
    gc.collect()
    backward(model)
    assert lora_a_of(model).grad is not None and pending_sum(model) is None
    torch.optim.SGD(trained(model), lr=1.0).step()


def test_a_main_grad_that_is_not_megatrons_is_left_to_its_owner(tensor_parallel):
    tensor_parallel(TP)
    model = once("auto")
    parameter = lora_a_of(model)
    parameter.main_grad = torch.zeros_like(parameter)

    def accumulate(trained: torch.Tensor) -> None:
        trained.main_grad.add_(trained.grad)

    parameter.register_post_accumulate_grad_hook(accumulate)
    backward(model)
    assert pending_sum(model) is None
    assert torch.equal(parameter.main_grad, parameter.grad)


def test_a_step_of_another_model_between_micro_batches(tensor_parallel):
    tensor_parallel(TP)
    models = [once("auto"), once("auto")]
    wrappers = [data_parallel(model) for model in models]
    for wrapper in wrappers:
        backward(wrapper)
    finish(wrappers[0])
    torch.optim.SGD(trained(models[0]), lr=1.0).step()
    with pytest.raises(PartialGradientsError):
        torch.optim.SGD(trained(models[1]), lr=1.0).step()


def test_without_megatrons_data_parallelism_the_first_backward_pass_raises(tensor_parallel):
    tensor_parallel(TP)
    model = once()
    with pytest.raises(ValueError, match=r"^linear\.adapter\.linear_in\.weight: .*DistributedDataParallel.*found none"):
        backward(model)
    assert pending_sum(model) is None


def test_a_step_before_the_gradients_are_complete_raises_and_changes_nothing(tensor_parallel):
    tensor_parallel(TP)
    model = once()
    ddp = data_parallel(model)
    optimizer = torch.optim.SGD(trained(model), lr=1.0)
    backward(ddp)
    before = [parameter.detach().clone() for parameter in trained(model)]
    with pytest.raises(PartialGradientsError, match=r"^linear\.adapter\.linear_in\.weight: found an optimizer's step"):
        optimizer.step()
    assert all(map(torch.equal, before, trained(model)))
    assert lora_a_of(model).grad is None and not lora_a_of(model).main_grad.any()
    finish(ddp)
    optimizer.step()
    assert pending_sum(model) is None


def test_a_sum_that_is_given_up_does_not_reach_the_next_step(tensor_parallel, caplog):
    tensor_parallel(TP)
    model = once()
    ddp = data_parallel(model)
    backward(ddp)
    assert pending_sum(model) is not None and not caplog.records
    ddp.zero_grad_buffer()
    assert pending_sum(model) is None
    assert "gave up gradients that no reduction had completed: linear.adapter.linear_in.weight" in caplog.text
    torch.optim.SGD(trained(model), lr=1.0).step()


def test_the_sum_is_of_the_whole_factor_in_the_dtype_of_main_grad(tensor_parallel):
    tensor_parallel(TP)
    model = once().bfloat16()
    buffers = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    ddp = DistributedDataParallel(config(tensor_model_parallel_size=TP), buffers, model)
    for _ in range(2):
        backward(ddp)
    total = pending_sum(model)
    assert total.dtype == torch.float32
    assert total.shape == (TP * lora_a_of(model).shape[0], IN)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_number_of_elements_of_all_sums(tensor_parallel, dropout):
    tensor_parallel(TP)
    for make, features in ((column, IN), (row, IN // TP)):
        model = adapted(make(tensor_model_parallel_size=TP), dropout=dropout)
        ddp = data_parallel(model)
        output, _ = ddp(torch.ones(3, 2, features))
        output.sum().backward()
        totals = [partial.total for partial in model.linear._accumulators if partial is not None]
        assert model.linear.num_partial_sums == sum(total.numel() for total in totals if total is not None) > 0
        finish(ddp)


def test_wrapped_anew(tensor_parallel):
    tensor_parallel(TP)
    model = once()
    backward(data_parallel(model))
    ddp = data_parallel(model)
    backward(ddp)
    assert pending_sum(model) is not None
    finish(ddp)
    assert pending_sum(model) is None


def test_a_copy_has_gradients_of_its_own(tensor_parallel):
    tensor_parallel(TP)
    model = once()
    group = model.linear.to_wrap.tp_group
    # Process groups cannot be copied.
    twin = copy.deepcopy(model, {id(group): group})
    ddp = data_parallel(twin)
    backward(ddp)
    assert pending_sum(twin) is not None and pending_sum(model) is None
    finish(ddp)


def test_a_frozen_factor_gets_no_gradient(tensor_parallel):
    tensor_parallel(TP)
    model = once()
    lora_a_of(model).requires_grad_(False)
    ddp = data_parallel(model)
    backward(ddp)
    assert pending_sum(model) is None
    finish(ddp)


def test_tensors_in_place_of_parameters_get_their_gradients_in_the_backward_pass(tensor_parallel):
    tensor_parallel(TP)
    model = once()
    given = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    given["linear.to_wrap.weight"].requires_grad_(False)
    output, _ = functional_call(model, given, (torch.ones(3, 2, IN),))
    output.sum().backward()
    assert given["linear.adapter.linear_in.weight"].grad is not None
    assert pending_sum(model) is None


def test_a_model_that_is_gone_has_nothing_to_complete(tensor_parallel):
    tensor_parallel(TP)
    model = once()
    other = torch.nn.Linear(2, 2)
    ddp = data_parallel(model)
    backward(ddp)
    gone = weakref.ref(lora_a_of(model))
    del model, ddp
    gc.collect()
    assert gone() is None
    torch.optim.SGD(other.parameters(), lr=1.0).step()


def test_adapted_anew_with_another_setting(tensor_parallel):
    tensor_parallel(TP)
    model = once()
    with pytest.raises(ValueError, match="linear: already adapted with complete_gradients=once_per_step"):
        dora_fx.DoRA(["linear"], dim=16, alpha=32)(model)


def test_one_rank_completes_nothing(tensor_parallel):
    tensor_parallel(1)
    model = adapted(row(), complete_gradients="once_per_step")
    backward(model)
    assert all(parameter.grad is not None for parameter in trained(model))


def test_layers_share_a_graph(tensor_parallel):
    tensor_parallel(TP)
    torch._dynamo.reset()
    counters.clear()
    models = [once() for _ in range(3)]
    wrappers = [data_parallel(model) for model in models]
    for model in models:
        model.compile(backend="dora_fx", options={"inner_compiler": "aot_eager"}, fullgraph=True)
        backward(model)
    assert all(pending_sum(wrapper.module) is not None for wrapper in wrappers)
    assert counters["dora_fx"]["graphs_compiled"] == 1


def test_an_overlapped_bucket_is_reduced_within_the_last_backward_pass(tensor_parallel):
    tensor_parallel(TP)
    model = once()
    buffers = DistributedDataParallelConfig(overlap_grad_reduce=True)
    ddp = DistributedDataParallel(config(tensor_model_parallel_size=TP), buffers, model)
    is_pending = []
    for _ in range(2):
        ddp.zero_grad_buffer()
        with ddp.no_sync():
            backward(ddp)
        is_pending.append(pending_sum(model) is not None)
        with cuda_means_cpu():
            backward(ddp)
        is_pending.append(pending_sum(model) is not None)
        finish(ddp)
    # Megatron learns from the first step how many gradients a bucket waits for.
    assert is_pending == [True, True, True, False]
