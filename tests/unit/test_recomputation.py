"""Adapters behind frozen inputs train in layers that are recomputed, by whosever checkpoint."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from transformers import ViTConfig, ViTForImageClassification

import dora_fx
from tests.closeness import assert_close, rounding, roundings_of
from tests.hf_models import tiny_hf_model
from tests.megatron_checkpoint import BLOCK, UNIFORM, counted_checkpoints, selective, without_cuda_generators
from tests.models import GPT_TARGETS, logits_of, randomize_adapters, tiny_gpt, token_ids, trainable

MLP = ["linear_fc1", "linear_fc2"]
SECOND_MLP = ["*.layers.1.mlp.linear_fc2"]


@pytest.fixture(autouse=True)
def generators(world: None) -> Iterator[None]:
    with without_cuda_generators():
        yield


def adapted(targets: list[str], dropout: float = 0.0, **settings: Any) -> nn.Module:
    torch.manual_seed(2)
    model = dora_fx.DoRA(targets, dim=4, dropout=dropout)(tiny_gpt(**settings))
    randomize_adapters(model)
    return model


def gradients(model: nn.Module, tokens: torch.Tensor | None = None) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    torch.manual_seed(3)
    logits_of(model, token_ids() if tokens is None else tokens).square().mean().backward()
    return {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in trainable(model).items()}


@pytest.mark.parametrize(
    ("targets", "settings", "more"),
    [
        ([*GPT_TARGETS, "output_layer"], UNIFORM, {}),
        (GPT_TARGETS, UNIFORM | {"recompute_num_layers": 2}, {"dropout": 0.2}),
        (GPT_TARGETS, UNIFORM, {"dropout": 0.1, "hidden_dropout": 0.1}),
        (GPT_TARGETS, BLOCK, {}),
        (SECOND_MLP, UNIFORM, {}),
        (MLP, selective("mlp"), {}),
        (["linear_fc2"], selective("core_attn", "mlp"), {}),
    ],
)
def test_gradients_are_those_without_recomputation(
    targets: list[str], settings: dict[str, Any], more: dict[str, Any]
) -> None:
    for tokens in (token_ids(), token_ids(batch=1)):
        expected = gradients(adapted(targets, **more), tokens)
        with counted_checkpoints() as checkpoints:
            found = gradients(adapted(targets, **more, **settings), tokens)
        assert checkpoints
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("settings", [UNIFORM, selective("core_attn", "mlp")], ids=["full", "selective"])
def test_compiled_as_a_whole_and_by_layer(scope: Any, settings: dict[str, Any]) -> None:
    expected = gradients(adapted(MLP))
    model = adapted(MLP, **settings)
    counters.clear()
    dora_fx.compile_model(model, scope, inner_compiler="aot_eager")
    found = gradients(model)
    assert counters["dora_fx"]["sites_rewritten"] > 0
    assert_close(found, expected, rounding(torch.float32, 3 * roundings_of(model)))


def test_graphs_that_break_recompute_between_them() -> None:
    """A break inside leaves Megatron's own checkpoint around compiled pieces of the layers."""
    expected = gradients(adapted(MLP))
    model = adapted(MLP, **UNIFORM)
    for layer in model.decoder.layers:
        layer.self_attention.register_forward_hook(torch.compiler.disable(lambda *_: None))
    dora_fx.compile_model(model, "model", inner_compiler="aot_eager", fullgraph=False)
    with counted_checkpoints() as checkpoints:
        found = gradients(model)
    assert checkpoints
    assert_close(found, expected, rounding(torch.float32, 3 * roundings_of(model)))


def input_of_first_layer(model: nn.Module, **call: Any) -> torch.Tensor:
    found = []
    handle = model.decoder.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: found.append(kwargs["hidden_states"]), with_kwargs=True
    )
    logits_of(model, token_ids())
    handle.remove()
    return found[0]


def test_each_call_looks_whether_it_recomputes_and_adds_nothing_otherwise() -> None:
    model = adapted(MLP)
    expected = gradients(model)
    for settings in (selective("core_attn"), UNIFORM, {"recompute_granularity": None}, UNIFORM):
        for name, value in settings.items():
            setattr(model.config, name, value)
        torch.testing.assert_close(gradients(model), expected, rtol=0, atol=0)
        if settings is not UNIFORM:
            assert input_of_first_layer(model).grad_fn is None
    for evaluation in (model.eval(), model.train()):
        with torch.set_grad_enabled(not evaluation.training):
            assert not input_of_first_layer(evaluation).requires_grad


def test_a_hook_is_there_once_and_where_adapters_are() -> None:
    model = adapted(MLP, **UNIFORM)
    dora_fx.DoRA(["linear_qkv"], dim=4)(model)
    assert len(model.decoder._forward_pre_hooks) == 1
    assert None not in gradients(model).values()
    assert pickle.loads(pickle.dumps(model.decoder._forward_pre_hooks)) == model.decoder._forward_pre_hooks
    assert not adapted(["output_layer"], **UNIFORM).decoder._forward_pre_hooks


def test_a_stage_whose_input_tensor_needs_no_gradient() -> None:
    chunk = {"pre_process": False}
    tensor = torch.randn(12, 2, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for settings in ({}, UNIFORM):
        model = adapted(MLP, chunk=chunk, **settings)
        model.set_input_tensor(tensor)
        found.append(gradients(model))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert not tensor.requires_grad


def wrap(layers: Any, reentrant: bool = True) -> None:
    impl = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer, checkpoint_impl=impl)


@pytest.mark.parametrize("reentrant", [True, False])
def test_wrappers_of_torch_around_layers_of_megatron(reentrant: bool) -> None:
    expected = gradients(adapted(MLP))
    after = adapted(MLP)
    wrap(after.decoder.layers, reentrant)
    before = tiny_gpt()
    before.load_state_dict(adapted(MLP).state_dict(), strict=False)
    wrap(before.decoder.layers, reentrant)
    dora_fx.DoRA(MLP, dim=4)(before)
    randomize_adapters(before)
    before.load_state_dict(adapted(MLP).state_dict(), strict=False)
    for model in (after, before):
        torch.testing.assert_close(gradients(model), expected, rtol=0, atol=0)


def llama() -> nn.Module:
    return tiny_hf_model()


def vision() -> nn.Module:
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes))


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    ("build", "targets", "inputs"),
    [
        (llama, ["q_proj", "down_proj"], lambda model: {"input_ids": token_ids()}),
        (llama, ["q_proj", "down_proj"], lambda model: {"inputs_embeds": numbers(2, 6, model.config.hidden_size)}),
        (vision, ["q_proj", "fc2"], lambda model: {"pixel_values": numbers(2, 3, 8, 8)}),
    ],
    ids=["tokens", "embeddings", "pixels"],
)
def test_models_of_transformers(
    build: Callable[[], nn.Module], targets: list[str], inputs: Callable[[Any], Any], use_reentrant: bool
) -> None:
    torch.manual_seed(2)
    model: Any = dora_fx.DoRA(targets, dim=4)(build())
    randomize_adapters(model)
    found = []
    for recomputes in (False, True):
        if recomputes:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        # A copy has its own hooks.
        model = copy.deepcopy(model)
        model(**inputs(model)).logits.square().mean().backward()
        found.append({name: parameter.grad for name, parameter in trainable(model).items()})
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_wrappers_of_torch_around_layers_of_transformers() -> None:
    torch.manual_seed(2)
    model: Any = tiny_hf_model()
    wrap(model.model.layers)
    dora_fx.DoRA(["q_proj", "down_proj"], dim=4)(model)
    model(token_ids(), use_cache=False).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in trainable(model).values())
