"""Wrappers around a model and inside it leave no trace in paths, factors, keys and files, and hide nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.nn.parallel import DataParallel

import dora_fx
from dora_fx.checkpoint.sharded_model import all_shards, sharded_model_of
from dora_fx.checkpoint.tensor_digests import add_digests, shard_digests
from dora_fx.megatron.wrappers import unwrap, walk
from tests.models import DIM, GPT_TARGETS, logits_of, randomize_adapters, tiny_gpt, token_ids
from tests.tables import every_case

pytestmark = pytest.mark.usefixtures("world")

Wrap = Callable[[Any], Any]


def megatron_ddp(model: Any) -> nn.Module:
    return DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)


def float16(model: Any) -> nn.Module:
    return Float16Module(model.config, model)


def compiled(module: nn.Module, backend: str = "eager") -> Any:
    return torch.compile(module, backend=backend)


def compiled_in_place(module: Any) -> Any:
    module.compile(backend="eager")
    return module


def each_layer(wrap: Wrap) -> Wrap:
    def wrap_layers(model: Any) -> Any:
        for index, layer in enumerate(model.decoder.layers):
            model.decoder.layers[index] = wrap(layer)
        return model

    return wrap_layers


def parts(wrap: Wrap) -> Wrap:
    """Wrap an attention, an MLP, single linear layers and the whole decoder, each in itself."""

    def wrap_parts(model: Any) -> Any:
        first, second = model.decoder.layers
        first.mlp = wrap(first.mlp)
        first.self_attention.linear_qkv = wrap(first.self_attention.linear_qkv)
        second.self_attention = wrap(second.self_attention)
        second.mlp.linear_fc1, second.mlp.linear_fc2 = wrap(second.mlp.linear_fc1), wrap(second.mlp.linear_fc2)
        model.decoder = wrap(model.decoder)
        model.output_layer = wrap(model.output_layer)
        return model

    return wrap_parts


def chain(*wraps: Wrap) -> Wrap:
    def wrap(model: Any) -> Any:
        for one in wraps:
            model = one(model)
        return model

    return wrap


# Around the model, or inside it.
WRAPPINGS: dict[str, Wrap] = {
    "compiled": compiled,
    "float16": float16,
    "megatron_ddp": megatron_ddp,
    "checkpointed": checkpoint_wrapper,
    "megatron_ddp_of_float16_of_compiled": chain(compiled, float16, megatron_ddp),
    "compiled_megatron_ddp_of_float16": chain(float16, megatron_ddp, compiled),
    "compiled_in_place": compiled_in_place,
    "layers_compiled": each_layer(compiled),
    "layers_compiled_in_place": each_layer(compiled_in_place),
    "layers_checkpointed": each_layer(checkpoint_wrapper),
    "layers_offloaded": each_layer(offload_wrapper),
    "layers_checkpointed_compiled": each_layer(chain(checkpoint_wrapper, compiled)),
    "layers_compiled_checkpointed": each_layer(chain(compiled, checkpoint_wrapper)),
    "parts_compiled": parts(compiled),
    "parts_compiled_in_place": parts(compiled_in_place),
    "parts_checkpointed": parts(checkpoint_wrapper),
    "everything": chain(
        parts(compiled), each_layer(chain(checkpoint_wrapper, compiled)), float16, compiled, megatron_ddp, compiled
    ),
}
if not torch.cuda.is_available():
    # With GPUs it moves the model to the first one.
    WRAPPINGS["data_parallel"] = DataParallel
NEED_BFLOAT16 = [name for name in WRAPPINGS if "float16" in name or name == "everything"]
TARGETS = [*GPT_TARGETS, "output_layer"]


def base_gpt(name: str) -> Any:
    """A GPT of the precision that a wrapping takes."""
    torch.manual_seed(0)
    return tiny_gpt(bf16=True, params_dtype=torch.bfloat16) if name in NEED_BFLOAT16 else tiny_gpt()


def build(name: str, *, bare: bool = False, attach_first: bool = False, targets: list[str] | None = None) -> Any:
    """A GPT that is wrapped, and adapted before or afterwards; with what `DoRA` says of it."""
    model, wrap = base_gpt(name), chain() if bare else WRAPPINGS[name]
    dora = dora_fx.DoRA(targets or TARGETS, dim=DIM, alpha=2 * DIM)
    steps = [dora, wrap] if attach_first else [wrap, dora]
    for step in steps:
        model = step(model)
    return model, dora.report


def traces(model: Any) -> tuple[Any, dict[str, list[torch.Tensor]]]:
    """Everything that a wrapper could leave a trace in, but what the model computes: names, and factors by path."""
    contents = sharded_model_of([model])
    adapted = [named for named in walk(model) if isinstance(named.module, dora_fx.DoRALinear)]
    names = (
        [(named.path, named.whole_path, type(named.module)) for named in walk(model)],
        [named.module.path for named in adapted],
        {chunk: sorted(shards) for chunk, shards in contents.adapter.items()},
        contents.stored_tensors([all_shards(contents.adapter)]),
        contents.sites,
        add_digests([shard_digests(contents.base)]),
    )
    return names, {
        named.whole_path: [value.detach().clone() for value in named.module.adapter.parameters()] for named in adapted
    }


def assert_same(model: Any, expected: Any) -> None:
    (found_names, found), (names, factors) = traces(model), traces(expected)
    assert found_names == names
    torch.testing.assert_close(found, factors, rtol=0, atol=0)


def files(folder: Path) -> tuple[dict[str, torch.Tensor], Any]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return tensors, json.loads((folder / "adapter_config.json").read_text())


# Wrapped before alone, or afterwards alone; all others both. Each kind of wrapper meets both orders around the model,
# and each place inside it meets both with some kind: wrappers are taken apart one by one.
BEFORE = {
    "layers_checkpointed",
    "layers_compiled_checkpointed",
    "parts_compiled",
    "parts_compiled_in_place",
    "megatron_ddp_of_float16_of_compiled",
}
AFTERWARDS = {
    "layers_compiled",
    "layers_compiled_in_place",
    "layers_checkpointed_compiled",
    "parts_checkpointed",
    "compiled_megatron_ddp_of_float16",
}


def orders_of(names: Iterable[str]) -> list[tuple[str, bool]]:
    """Each name with every order in which it is tried, True where the model is adapted first and wrapped afterwards."""
    cases = [(name, order) for name in names for order in (False, True)]
    return [(name, order) for name, order in cases if name not in (BEFORE if order else AFTERWARDS)]


@pytest.mark.parametrize(("name", "attach_first"), orders_of(WRAPPINGS))
def test_wrapping_before_or_after_attaching_leaves_no_trace(name: str, attach_first: bool, tmp_path: Path) -> None:
    (bare, expected_report), (model, report) = build(name, bare=True), build(name, attach_first=attach_first)
    assert report == expected_report
    assert_same(model, bare)
    for adapted in (bare, model):
        randomize_adapters(unwrap(adapted))
    dora_fx.export_hf(bare, tmp_path / "bare")
    dora_fx.export_hf(model, tmp_path / "wrapped")
    (found, found_config), (expected, expected_config) = files(tmp_path / "wrapped"), files(tmp_path / "bare")
    assert found_config == expected_config
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    dora_fx.save_checkpoint(model, tmp_path / "checkpoint")
    fresh, _ = build(name, bare=True)
    dora_fx.load_checkpoint(fresh, tmp_path / "checkpoint")
    assert_same(fresh, bare)
    other, _ = build(name, attach_first=attach_first)
    dora_fx.load_checkpoint(other, tmp_path / "checkpoint")
    assert_same(other, bare)


@every_case("name", WRAPPINGS)
def test_paths_and_patterns_see_through(name: str) -> None:
    targets = ["decoder.layers.1.mlp.linear_fc1", "*.layers.0.self_attention.*", "output_layer"]
    _, expected = build(name, bare=True, targets=targets)
    _, report = build(name, targets=targets)
    assert report == expected
    assert len(report.sites) == 4


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


# Without those whose compiled code is that of another: what is compiled is a layer where it could be the model, or lies
# within wrappers that call it and keep nothing, or around them as in "everything".
SAME_CODE = ["layers_compiled", "layers_compiled_in_place", "layers_checkpointed_compiled"]
SAME_CODE += ["megatron_ddp_of_float16_of_compiled", "compiled_megatron_ddp_of_float16"]


@pytest.mark.parametrize("name", [name for name in WRAPPINGS if name not in SAME_CODE])
def test_compiled_and_wrapped_code_is_never_that_of_another_state(name: str) -> None:
    """Attach, switch off, merge and unmerge after the wrapped model has run: it computes what a bare one does."""
    tokens, (bare, _) = token_ids(), build(name, bare=True)
    randomize_adapters(bare)
    adapted = evaluate(bare.eval(), tokens)
    model = WRAPPINGS[name](base_gpt(name)).eval()
    base = evaluate(model, tokens)
    # Ten roundings of either dtype, where another state of the model is a fifth of the largest logit away.
    bound = 10 * torch.finfo(adapted.dtype).eps
    assert relative_error(base, adapted) > 0.2 > 2 * bound
    dora_fx.DoRA(TARGETS, dim=DIM, alpha=2 * DIM)(model, training=False)
    torch.testing.assert_close(evaluate(model, tokens), base, rtol=0, atol=0)
    randomize_adapters(unwrap(model))
    dora_fx.invalidate_norms(model)
    assert relative_error(evaluate(model, tokens), adapted) < bound
    with dora_fx.disable_adapter(model):
        assert relative_error(evaluate(model, tokens), base) < bound
    before = evaluate(model, tokens)
    dora_fx.merge(model, keep_adapter=True)
    assert not adapted_paths(model)
    assert relative_error(evaluate(model, tokens), adapted) < bound
    dora_fx.unmerge(model)
    torch.testing.assert_close(evaluate(model, tokens), before, rtol=0, atol=0)
    dora_fx.merge(model)
    assert not adapted_paths(model)
    assert relative_error(evaluate(model, tokens), adapted) < bound


def adapted_paths(model: nn.Module) -> list[str]:
    return [named.path for named in walk(model) if isinstance(named.module, dora_fx.DoRALinear)]


@pytest.mark.parametrize(
    ("name", "attach_first"), orders_of(name for name in WRAPPINGS if name.endswith("ed") and "ddp" not in name)
)
def test_gradients_are_those_of_the_bare_model(name: str, attach_first: bool) -> None:
    (bare, _), (model, _) = build(name, bare=True), build(name, attach_first=attach_first)
    gradients = []
    for adapted in (bare, model):
        randomize_adapters(unwrap(adapted))
        logits_of(adapted, token_ids()).square().mean().backward()
        sites = [named.module for named in walk(adapted) if isinstance(named.module, dora_fx.DoRALinear)]
        gradients.append([parameter.grad for site in sites for parameter in site.adapter.parameters()])
    bound = 100 * torch.finfo(torch.float32).eps
    for expected, found in zip(*gradients, strict=True):
        assert relative_error(found, expected) < bound


def evaluate(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(model, tokens)
