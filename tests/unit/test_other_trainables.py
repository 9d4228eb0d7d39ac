"""Whatever keeps adapters alone says which other parameters are trained; what keeps them all says nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dora_fx
from tests.distributed.launch import visit_worlds
from tests.distributed.pipeline_gpt import Kind, Layout, attach, build_base
from tests.hf_models import tiny_hf_model
from tests.peft_models import adapted_megatron

OWN_WRITERS: dict[str, Callable[[Any, Path], Any]] = {
    "save_checkpoint": dora_fx.save_checkpoint,
    "export_hf": dora_fx.export_hf,
    "iter_adapter": lambda model, _: list(dora_fx.iter_adapter(model)),
}
WRITERS = OWN_WRITERS | {"save_pretrained": lambda model, folder: model.save_pretrained(folder)}
LOGGER = "dora_fx.attach.other_trainables"


def megatron() -> tuple[nn.Module, dict[str, Any], list[str]]:
    model = adapted_megatron(tiny_hf_model())
    model.embedding.requires_grad_()
    model.decoder.final_layernorm.requires_grad_()
    return model, OWN_WRITERS, ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight"]


def transformers_with_a_head() -> tuple[nn.Module, dict[str, Any], list[str]]:
    model = dora_fx.DoRA(["q_proj", "v_proj"], dim=4)(tiny_hf_model())
    model.value_head = nn.Linear(4, 1)
    return torch.compile(model, backend="eager"), WRITERS, ["value_head.weight", "value_head.bias"]


def transformers_with_biases() -> tuple[nn.Module, dict[str, Any], list[str]]:
    """Biases of adapted layers, as some train them."""
    model = dora_fx.DoRA(["q_proj", "v_proj"], dim=4)(tiny_hf_model("qwen2"))
    names = [name for name, _ in model.named_parameters() if name.endswith("q_proj.to_wrap.bias")]
    for name in names:
        model.get_parameter(name).requires_grad_()
    return model, WRITERS, [name.replace(".to_wrap", "") for name in names]


@pytest.mark.parametrize("build", [megatron, transformers_with_a_head, transformers_with_biases])
def test_writers_name_what_they_leave_out(
    build: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, world: None
) -> None:
    model, writers, names = build()
    for writer, write in writers.items():
        caplog.clear()
        write(model, tmp_path / writer)
        write(model, tmp_path / f"{writer} again")
        [found] = [record.getMessage() for record in caplog.records if record.name == LOGGER]
        assert found.startswith(f"{writer} keeps adapters alone: found {len(names)} other")
        assert all(name in found for name in names)
        model.requires_grad_(False)
        write(model, tmp_path / f"{writer} frozen")
        model, _, _ = build()


def test_what_keeps_them_says_nothing(caplog: pytest.LogCaptureFixture, world: None, tmp_path: Path) -> None:
    model, _, _ = megatron()
    with torch.no_grad():
        model.embedding.word_embeddings.weight.add_(1)
    expected = model.embedding.word_embeddings.weight.detach().clone()
    assert torch.equal(dict(dora_fx.iter_merged(model))["model.embed_tokens.weight"], expected)
    with dora_fx.merged(model):
        assert torch.equal(model.embedding.word_embeddings.weight, expected)
    assert torch.equal(model.embedding.word_embeddings.weight, expected)
    head, _, _ = transformers_with_a_head()
    with dora_fx.merged(head):
        head.save_pretrained(tmp_path / "merged")
    assert not [record for record in caplog.records if record.name == LOGGER]


def messages_of_ranks(layout: Layout, folder: Path, expected: list[list[str]]) -> None:
    chunks = attach(build_base(layout, Kind()))
    for chunk in chunks:
        for name in ("embedding", "output_layer"):
            if hasattr(chunk, name):
                getattr(chunk, name).requires_grad_()
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(LOGGER).addHandler(handler)
    dora_fx.save_checkpoint(chunks, folder / str(layout))
    found: list[Any] = [None] * layout.world_size
    dist.all_gather_object(found, [message.partition("(")[2].partition(")")[0] for message in messages])
    assert found == expected


def test_the_first_rank_of_each_stage_says_it(tmp_path: Path) -> None:
    embedding, output = "embedding.word_embeddings.weight", "output_layer.weight"
    visit_worlds([(messages_of_ranks, Layout(dp=2))], tmp_path, [[f"{embedding}, {output}"], []])
    visit_worlds([(messages_of_ranks, Layout(pp=2))], tmp_path, [[embedding], [output]])
