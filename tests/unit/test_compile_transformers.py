"""`compile_model` on transformers models: eager numbers, one graph for all layers, and calls that are not compiled."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.utils import counters

import dora_fx
from tests.closeness import assert_close, rounding, roundings_of
from tests.hf_models import SHAPE
from tests.models import randomize_adapters, sites, trainable
from tests.tables import every_case

LAYERS = 3
SIZES: dict[str, Any] = SHAPE | dict(num_hidden_layers=LAYERS)
NO_DROPOUT = dict(hidden_dropout=0.0, attention_dropout=0.0, dropout=0.0)
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    # Masks of two kinds: layers of one class that attend to all tokens and to the last few.
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=4),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, head_dim=8, sliding_window=4),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "phi3": lambda: transformers.Phi3Config(**SIZES, pad_token_id=None, eos_token_id=0),
    # Of other names, norms and positions; OPT passes what the others compute in the model.
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES, **NO_DROPOUT),
    "opt": lambda: transformers.OPTConfig(**SIZES, **NO_DROPOUT, ffn_dim=80, word_embed_proj_dim=48),
}
# Gemma 3's sliding and full attention are two graphs.
KINDS_OF_LAYERS = {"gemma3": 2}
FAST = ["llama", "gemma3"]
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in CONFIGS if kind not in FAST]
# None, or whether gradient checkpointing is reentrant.
CHECKPOINTS = [None, False, True]


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    counters.clear()
    yield
    torch._dynamo.reset()


def adapted(kind: str = "llama", targets: Any = "all-linear", dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).to(dtype)
    dora_fx.DoRA(targets, dim=4, alpha=12)(model)
    randomize_adapters(model)
    return model


def compiled(model: Any, **settings: Any) -> Any:
    return dora_fx.compile_model(model, **({"inner_compiler": "eager", "fullgraph": True} | settings))


def num_graphs() -> int:
    return counters["dora_fx"]["graphs_compiled"]


def tokens_of(length: int) -> torch.Tensor:
    return torch.randint(1, 60, (2, length), generator=torch.Generator().manual_seed(length))


def loss_and_gradients(model: nn.Module, length: int, **call: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    tokens = tokens_of(length)
    loss = model(**({"input_ids": tokens, "labels": tokens} | call)).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in trainable(model).items()}


def assert_same(found: Any, expected: Any, model: nn.Module) -> None:
    assert_close(found, expected, rounding(torch.float64, 3 * roundings_of(model)))


def trained(model: Any, lengths: list[int]) -> Iterator[dict[str, torch.Tensor]]:
    """Loss and gradients of a step of each length, and the logits of an evaluation in the end."""
    optimizer = torch.optim.SGD(trainable(model).values(), lr=1e-2)
    for length in lengths:
        yield loss_and_gradients(model, length)
        optimizer.step()
    with torch.no_grad():
        logits = model.eval()(tokens_of(lengths[-1]), use_cache=False).logits
    yield {"logits": logits}


@pytest.mark.parametrize("reentrant", CHECKPOINTS)
@pytest.mark.parametrize("kind", [*FAST, *SLOW])
def test_training_and_evaluation_are_eager_s_with_a_graph_for_all_layers(kind: str, reentrant: bool | None) -> None:
    model = adapted(kind)
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    plain, graphs, kinds = copy.deepcopy(model), [], KINDS_OF_LAYERS.get(kind, 1)
    compiled(model)
    for found, expected in zip(trained(model, [12, 17, 15]), trained(plain, [12, 17, 15]), strict=True):
        assert len(found) in (1, 1 + len(trainable(model)))
        assert_same(found, expected, model)
        graphs.append(num_graphs())
    # Of each kind of layer: one for the first length, one for all others, and one for evaluation.
    assert graphs == [kinds, 2 * kinds, 2 * kinds, 3 * kinds]
    assert counters["dora_fx"]["sites_rewritten"] == 3 * kinds * len(sites(model)) // LAYERS
    assert not counters["graph_break"]


def test_a_frozen_layer_in_front_stays_without_gradients() -> None:
    model = adapted(targets=["*.layers.2.*"])
    plain = copy.deepcopy(model)
    compiled(model)
    needed = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda layer, args, output: needed.append(output.requires_grad))
    assert_same(loss_and_gradients(model, 12), loss_and_gradients(plain, 12), model)
    # The last layer has another graph, as only it has adapters.
    assert needed == [False, False, True] and num_graphs() == 2


def test_embeddings_that_a_caller_computes() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    compiled(model)
    embeddings = torch.randn(2, 12, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for leaf in (embeddings, embeddings.clone().requires_grad_()):
        call = dict(input_ids=None, inputs_embeds=leaf)
        assert_same(loss_and_gradients(model, 12, **call), loss_and_gradients(plain, 12, **call), model)
        assert (leaf.grad is not None) == leaf.requires_grad
    assert not embeddings.requires_grad and num_graphs() == 1


@pytest.mark.parametrize("implementation", [None, "static"])
def test_generation_compiles_nothing(implementation: str | None) -> None:
    model = adapted().eval()
    plain = copy.deepcopy(model)
    compiled(model)
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, cache_implementation=implementation)
    prompt = dict(inputs=tokens_of(7), attention_mask=torch.ones(2, 7, dtype=torch.long))
    assert torch.equal(model.generate(**prompt, **options), plain.generate(**prompt, **options))
    assert num_graphs() == 0


@every_case(
    ("training", "call", "has_cache", "graphs"),
    [
        (True, {}, False, 1),
        (True, {"use_cache": True}, True, 0),
        (True, {"use_cache": False}, False, 1),
        (True, {"cache": "own"}, True, 0),
        (False, {}, True, 0),
        (False, {"labels": tokens_of(9)}, False, 1),
        (False, {"labels": tokens_of(9), "use_cache": True}, True, 0),
        (False, {"use_cache": False}, False, 1),
    ],
)
def test_a_cache_is_made_where_it_is_asked_for(
    training: bool, call: dict[str, Any], has_cache: bool, graphs: int, caplog: pytest.LogCaptureFixture
) -> None:
    counters.clear()
    torch._dynamo.reset()
    caplog.clear()
    model = adapted().train(training)
    plain = copy.deepcopy(model)
    compiled(model)
    found = []
    for one in (model, plain):
        # A cache grows, so each model gets its own.
        more = call | ({"cache": transformers.DynamicCache(config=model.config)} if "cache" in call else {})
        with torch.set_grad_enabled(training), caplog.at_level(logging.WARNING):
            for _ in range(2 if "cache" not in call else 1):
                found.append(one(tokens_of(9), **more))
    assert_same(found[0].logits, found[-1].logits, model)
    assert (found[0].cache is not None) == has_cache
    assert num_graphs() == graphs
    told = [record.getMessage() for record in caplog.records if "found a cache" in record.getMessage()]
    assert len(told) == (training and has_cache)


def test_hidden_states_are_those_of_every_layer() -> None:
    model = adapted().train()
    plain = copy.deepcopy(model)
    compiled(model, fullgraph=None)
    for call in ({}, {"output_hidden_states": True}, {}):
        found, expected = (one(tokens_of(9), **call).hidden_states or () for one in (model, plain))
        assert len(found) == len(expected) == (1 + LAYERS if call else 0)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, model)
    assert_same(loss_and_gradients(model, 9), loss_and_gradients(plain, 9), model)


def test_copies_are_not_compiled_and_may_be() -> None:
    model = compiled(adapted())
    expected = loss_and_gradients(model, 12)
    assert num_graphs() == 1
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(loss_and_gradients(made, 12), expected, model)
        assert num_graphs() == 1
    compiled(made)
    assert len(made._forward_pre_hooks) == len(model._forward_pre_hooks)
    # The same graph.
    assert_same(loss_and_gradients(made, 12), expected, model)
    assert num_graphs() <= 2


def test_adapters_are_off_merged_and_saved(tmp_path: Path) -> None:
    model = adapted(dtype=torch.float32).eval()
    plain = copy.deepcopy(model)
    compiled(model)
    call = dict(input_ids=tokens_of(9), labels=tokens_of(9))
    losses: dict[str, list[torch.Tensor]] = {"on": [], "off": [], "merged": [], "on again": []}
    with torch.no_grad():
        for one in (model, plain):
            losses["on"].append(one(**call).loss)
            with dora_fx.disable_adapter(one):
                losses["off"].append(one(**call).loss)
            with dora_fx.merged(one):
                losses["merged"].append(one(**call).loss)
            losses["on again"].append(one(**call).loss)
    bound = rounding(torch.float32, 3 * roundings_of(model))
    for found, expected in losses.values():
        assert_close(found, expected, bound)
    assert list(model.state_dict()) == list(plain.state_dict())
    for name, one in (("compiled", model), ("plain", plain)):
        one.save_pretrained(tmp_path / name)
    files = [
        sorted((path.name, path.read_bytes()) for path in (tmp_path / name).iterdir()) for name in ("compiled", "plain")
    ]
    assert files[0] == files[1]


def test_what_has_no_such_layer_is_refused_by_name_and_compiled_whole() -> None:
    config = transformers.CTRLConfig(vocab_size=64, n_embd=48, dff=80, n_layer=2, n_head=4, n_positions=64)
    model = transformers.CTRLLMHeadModel(config)
    with pytest.raises(ValueError, match=r"no transformer layer in a CTRLLMHeadModel, .*scope='model' compiles it as"):
        dora_fx.compile_model(model)
    assert not model._forward_pre_hooks
    with pytest.raises(ValueError, match="found a LlamaForCausalLM that is compiled already"):
        dora_fx.compile_model(compiled(adapted()))


def test_a_whole_model_is_a_graph_and_generates_uncompiled() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    compiled(model, scope="model", fullgraph=None)
    for length in (12, 17):
        assert_same(loss_and_gradients(model, length), loss_and_gradients(plain, length), model)
    graphs = num_graphs()
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(model.eval().generate(tokens_of(7), **options), plain.eval().generate(tokens_of(7), **options))
    assert 0 < num_graphs() == graphs


class Batches(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = tokens_of(10 + index // 8)[index % 2]
        return {"input_ids": tokens, "labels": tokens}


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_trainer_trains_and_evaluates_compiled(gradient_checkpointing: bool, tmp_path: Path) -> None:
    found = []
    for is_compiled in (True, False):
        model = adapted()
        if is_compiled:
            compiled(model)
        settings = transformers.TrainingArguments(
            str(tmp_path / str(is_compiled)),
            max_steps=2,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            learning_rate=1e-3,
            gradient_checkpointing=gradient_checkpointing,
            eval_strategy="steps",
            eval_steps=1,
            logging_steps=1,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, settings, train_dataset=Batches(), eval_dataset=Batches())
        trainer.train()
        logs = [entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history]
        found.append((torch.tensor([value for value in logs if value is not None]), trainable(model)))
        if is_compiled:
            # Two lengths of training and one more of evaluation, which has a graph of each length and of many.
            assert 2 <= num_graphs() <= 5
    assert len(found[0][0]) == 4
    # Trainer's logs are rounded.
    assert_close(found[0][0].double(), found[1][0].double(), 1e-5)
    assert_same(*(parameters for _, parameters in found), model)


def test_trainer_s_own_option_does_not_know_the_backend(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DORA_FX"):
        settings = transformers.TrainingArguments(str(tmp_path), torch_compile_backend="dora_fx", report_to=[])
        transformers.Trainer(adapted(), settings)
