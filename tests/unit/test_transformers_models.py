"""DoRA on transformers models: PEFT's function and files, checkpoints, saving, and what such models bring along."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import dora_fx
from dora_fx.checkpoint.manifest import read_manifest
from tests.closeness import assert_apart, assert_close, rounding, roundings_of
from tests.hf_models import tiny_hf_model
from tests.models import randomize_adapters, sites
from tests.peft_models import (
    TOKENS,
    adapters,
    assert_equal,
    assert_same_logits,
    base_model,
    beside_peft,
    hf_logits,
    load_with_peft,
    save_peft_adapter,
)
from tests.tables import every_case

KINDS = ["llama", "llama_tied", "qwen2", "phi3"]


def adapted(kind: str = "llama", seed: int = 1, **settings: Any) -> Any:
    """A model with adapters away from the identity."""
    model = dora_fx.DoRA(**(dict(target_modules="all-linear", dim=4, alpha=12) | settings))(base_model(kind))
    randomize_adapters(model, seed)
    return model.eval()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


# PEFT's function and files


@every_case("kind", [*KINDS, "gemma"])
def test_files_from_and_to_peft(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    dora_fx.export_hf(model, tmp_path / "ours")
    peft_model = load_with_peft(base_model(kind), tmp_path / "ours")
    assert_same_logits(hf_logits(peft_model), hf_logits(model), model)
    peft_model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    assert_equal(*files)
    assert_equal(dict(dora_fx.iter_adapter(model)), files[0])
    empty, other = base_model(kind), adapted(kind, seed=2)
    for target in (empty, other):
        assert dora_fx.import_hf(target, tmp_path / "theirs") is target
        assert_equal(adapters(target), adapters(model))


@pytest.mark.parametrize("compiler", [None, "dora_fx"])
@pytest.mark.parametrize("kind", [*KINDS, "gemma"])
def test_loss_and_gradients_are_peft_s(kind: str, compiler: str | None, tmp_path: Path) -> None:
    base = base_model(kind)
    targets = "all-linear"
    expected = save_peft_adapter(base, tmp_path / "adapter", target_modules=targets).train()
    found = dora_fx.import_hf(copy.deepcopy(base), tmp_path / "adapter").train()
    assert sorted(sites(found)) == sorted(
        name.removeprefix("base_model.model.")
        for name, module in expected.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    )
    if compiler is not None:
        for layer in found.model.layers:
            layer.compile(backend=compiler, options={"inner_compiler": "eager"})
    found_parts, expected_parts = beside_peft(found, expected)
    assert len(found_parts) == 1 + 3 * len(sites(found))
    assert_close(found_parts, expected_parts, rounding(torch.float32, 2 * roundings_of(base)))


@every_case(
    "make",
    [
        lambda: base_model("llama_tied"),
        lambda: base_model("gemma"),
        lambda: transformers.LlamaModel(tiny_hf_model().config),
        lambda: transformers.LlamaForSequenceClassification(tiny_hf_model().config),
        lambda: transformers.GPTNeoXForCausalLM(
            transformers.GPTNeoXConfig(
                vocab_size=64, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
            )
        ),
    ],
)
def test_all_linear_is_what_peft_means_by_it(make: Any) -> None:
    model = make()
    task = "SEQ_CLS" if "Classification" in type(model).__name__ else None
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules="all-linear", task_type=task))
    expected = {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert len(expected) >= 4
    assert set(sites(dora_fx.DoRA(target_modules="all-linear", dim=2)(model))) == expected


def test_some_layers_and_a_rank_of_their_own(tmp_path: Path) -> None:
    model = base_model()
    dora_fx.DoRA(["model.layers.0.*"], dim=4, alpha=12)(model)
    dora_fx.DoRA(["*.1.mlp.up_proj"], dim=2, alpha=2)(model)
    randomize_adapters(model)
    dora_fx.export_hf(model, tmp_path / "adapter", base_model="some/name")
    peft_model = load_with_peft(base_model(), tmp_path / "adapter")
    assert peft_model.peft_config["default"].base_model_name_or_path == "some/name"
    assert_same_logits(hf_logits(peft_model), hf_logits(model), model)
    empty = dora_fx.import_hf(base_model(), tmp_path / "adapter")
    assert_equal(adapters(empty), adapters(model))


# Streams and merging


@every_case("dtype", [torch.float32, torch.bfloat16])
@every_case("kind", [*KINDS, "gemma"])
def test_the_stream_is_bitwise_the_merged_model(kind: str, dtype: torch.dtype) -> None:
    model = adapted(kind).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = dict(dora_fx.iter_merged(model))
    assert_equal(dict(model.state_dict()), before)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert own.isdisjoint(tensor.data_ptr() for tensor in found.values())
    rounded = dict(dora_fx.iter_merged(model, dtype=torch.float16))
    assert {tensor.dtype for tensor in rounded.values()} == {torch.float16}
    twin = base_model(kind).to(dtype)
    result = twin.load_state_dict(found, strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) <= {"lm_head.weight"}
    assert_equal(dict(twin.state_dict()), dict(dora_fx.merge(model).state_dict()))


@pytest.mark.parametrize("compiled", [False, True])
def test_merged_for_a_while(compiled: bool) -> None:
    model = adapted()
    if compiled:
        for layer in model.model.layers:
            layer.compile(backend="dora_fx", options={"inner_compiler": "eager"})
    before, expected = {n: v.clone() for n, v in model.state_dict().items()}, hf_logits(model)
    with pytest.raises(KeyError), dora_fx.merged(model):
        assert not sites(model)
        assert_same_logits(hf_logits(model), expected, model)
        with pytest.raises(ValueError, match="q_proj: found a layer that is merged already; unmerge it first"):
            dora_fx.merge(model)
        raise KeyError("inside")
    assert_equal(dict(model.state_dict()), before)
    assert torch.equal(hf_logits(model), expected)


def test_an_optimizer_that_steps_while_merged() -> None:
    """What it changes are the adapters, and the model comes back with them."""
    results = []
    for steps_inside in (False, True):
        model = adapted().train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model(TOKENS, labels=TOKENS).loss.backward()
        with dora_fx.merged(model):
            if steps_inside:
                optimizer.step()
        if not steps_inside:
            optimizer.step()
        results.append(hf_logits(model))
    assert torch.equal(*results)
    assert_apart(results[0], hf_logits(adapted()))


# Checkpoints


def training(seed: int, kind: str) -> tuple[Any, torch.optim.Optimizer]:
    model = adapted(kind, seed).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    step(model, optimizer)
    return model, optimizer


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["llama_tied", "qwen2"])
def test_checkpoints_need_no_process_group(kind: str, tmp_path: Path) -> None:
    source, target = training(1, kind), training(2, kind)
    generator = torch.get_rng_state()
    dora_fx.save_checkpoint(source[0], tmp_path / "checkpoint", source[1], extra={"step": 1})
    assert dora_fx.load_checkpoint(target[0], tmp_path / "checkpoint", target[1]) == {"step": 1}
    assert not torch.distributed.is_initialized()
    assert torch.equal(torch.get_rng_state(), generator)
    assert_equal(adapters(target[0]), adapters(source[0]))
    for model, optimizer in (source, target):
        step(model, optimizer)
    assert_equal(adapters(target[0]), adapters(source[0]))
    manifest = read_manifest(tmp_path / "checkpoint")
    assert set(manifest.sites) == set(sites(source[0])) and manifest.non_homogeneous_layers


def test_comparisons_need_no_process_group() -> None:
    found = dora_fx.compare_merged(adapted("gemma"), TOKENS, dtype=torch.bfloat16)
    assert len(found.layers) == 14 and found.mean_gap > 0
    assert not torch.distributed.is_initialized()


def test_a_checkpoint_of_another_base_is_refused(tmp_path: Path) -> None:
    dora_fx.save_checkpoint(adapted(), tmp_path / "checkpoint")
    other = dora_fx.DoRA("all-linear", dim=4, alpha=12)(tiny_hf_model(seed=5))
    with pytest.raises(dora_fx.CheckpointError, match=r"trained on another base .*model.layers.0.mlp.down_proj"):
        dora_fx.load_checkpoint(other, tmp_path / "checkpoint")
    assert not torch.distributed.is_initialized()


# What else such models bring


def test_state_dicts_are_as_they_were(tmp_path: Path) -> None:
    model, other = adapted(), adapted(seed=2)
    torch.save(model.state_dict(), tmp_path / "state")
    other.load_state_dict(torch.load(tmp_path / "state"))
    assert torch.equal(hf_logits(other), hf_logits(model))
    assert set(base_model().state_dict()) < set(model.state_dict())


@every_case("reentrant", [False, True])
@every_case("kind", ["llama", "gemma"])
def test_gradient_checkpointing(kind: str, reentrant: bool) -> None:
    plain, recomputing = adapted(kind).train(), adapted(kind).train()
    recomputing.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, recomputing):
        model(TOKENS, labels=TOKENS).loss.backward()
    assert len(gradients(plain)) == 3 * len(sites(plain))
    assert_equal(gradients(recomputing), gradients(plain))


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_that_of_the_merged_model(kind: str) -> None:
    model = adapted(kind)
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(TOKENS))
    found = model.generate(TOKENS, **options)
    with dora_fx.merged(model):
        assert torch.equal(model.generate(TOKENS, **options), found)
    with dora_fx.disable_adapter(model):
        assert torch.equal(model.generate(TOKENS, **options), base_model(kind).generate(TOKENS, **options))


def test_casts_and_copies() -> None:
    model = adapted().to(torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if "magnitude" in n} == {torch.float32}
    assert hf_logits(model).dtype == torch.bfloat16
    copied = copy.deepcopy(model)
    randomize_adapters(copied, 9)
    assert_apart(hf_logits(copied).float(), hf_logits(model).float())
    assert torch.equal(hf_logits(copy.deepcopy(model).to("cpu")), hf_logits(model))


class Linear4bit(nn.Linear):
    """As a library that quantises has it: a linear layer by class, and not by what it computes."""


def test_linears_that_compute_otherwise_are_refused_by_name() -> None:
    model = base_model()
    model.model.layers[1].mlp.up_proj = Linear4bit(48, 80)
    with pytest.raises(TypeError, match=r"model.layers.1.mlp.up_proj: .*Linear4bit has no DoRA layout"):
        dora_fx.DoRA("all-linear", dim=4)(model)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=48, n_layer=1, n_head=4))
    for target in ("all-linear", ["c_attn"], ["*c_attn"]):
        with pytest.raises(TypeError, match=r"transformer.h.0.attn.c_attn: .*Conv1D has no DoRA layout"):
            dora_fx.DoRA(target, dim=4)(gpt2)


def test_weights_of_another_class_are_refused_by_name() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = base_model()
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(TwoTensor(linear.weight.detach(), linear.weight.detach()), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj: found a base weight of class .*TwoTensor, expected a"):
        dora_fx.DoRA("all-linear", dim=4)(model)


def test_what_is_megatron_s_to_be_told_is_refused(tmp_path: Path) -> None:
    model = adapted()
    for stream in (dora_fx.iter_adapter, dora_fx.iter_merged):
        with pytest.raises(ValueError, match="vocab_size: found 50, expected none for a transformers model"):
            stream(model, vocab_size=50)
        with pytest.raises(ValueError, match="model_type: found 'phi3', expected none or 'llama', the model's own"):
            stream(model, model_type="phi3")
        with pytest.raises(ValueError, match="found no adapted layer"):
            stream(base_model())
    tied = dora_fx.DoRA(["lm_head"], dim=4)(base_model("llama_tied"))
    with pytest.raises(ValueError, match=r"lm_head: the layer shares its weight with model.embed_tokens"):
        dora_fx.iter_merged(tied)
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match=r"taken: it exists, expected a name that is free or an empty folder"):
        dora_fx.export_hf(model, tmp_path / "taken")
    with pytest.raises(ValueError, match="found 2 chunks, expected one transformers model"):
        dora_fx.export_hf([model, base_model()], tmp_path / "new")
