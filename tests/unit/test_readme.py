"""README runs as it stands, its graphs are golden text, and its commands and length are as agreed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
from torch._dynamo.utils import counters

from tests.models import sites

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    *transformers_blocks, megatron_block = blocks("python")
    assert len(transformers_blocks) == 2
    names: dict[str, Any] = {}
    counters.clear()
    exec(compile("".join(transformers_blocks), "README.md, blocks 1 and 2", "exec"), names)
    first_loss = names["model"](input_ids=names["tokens"], labels=names["tokens"]).loss
    # It learns: untrained, the loss is that of a guess among 64 tokens, 4.2.
    assert first_loss < 3.5
    # A layer has seven sites, and both layers share a graph.
    assert counters["dora_fx"]["sites_rewritten"] == 7
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    fresh = names["transformers"].LlamaForCausalLM(names["base"].config)
    peft.PeftModel.from_pretrained(fresh, "adapter")

    exec(compile(megatron_block, "README.md, block 3", "exec"), names)
    model = names["model"]
    assert model is names["gpt"] and counters["dora_fx"]["sites_rewritten"] >= 7 + 4
    assert len(sites(model)) == 8
    assert len(names["optimizer"].state) == 24
    assert (tmp_path / "run" / "step_3" / "dora_fx.json").is_file()
    assert names["held_out_losses"].shape == (1, 63)


def test_the_graphs_are_golden_text() -> None:
    golden = (ROOT / "tests" / "graph" / "test_golden_text.py").read_text(encoding="utf-8").splitlines()
    [block] = blocks("text")
    parts = [[line for line in part.splitlines() if not line.startswith("#")] for part in block.split("\n\n")]
    assert [len(part) for part in parts] == [4, 9]
    for line in [line for part in parts for line in part]:
        # What is left out of a line stands as three dots.
        pattern = re.escape(line).replace(re.escape("..."), ".+")
        assert any(re.fullmatch(pattern, found.strip()) for found in golden), line


def test_two_lines_set_up_all_they_need() -> None:
    commands = re.findall(r"^[ \t]*\$?[ \t]*(python -m pip install -e.*)$", README, re.MULTILINE)
    assert commands == [
        'python -m pip install -e ".[demo]" && dora-fx finetune --demo',
        'python -m pip install -e ".[test]" && python -m pytest',
    ]


def test_it_is_short() -> None:
    assert len(README.split()) <= 1300


def test_files_that_are_linked_are_there() -> None:
    linked = re.findall(r"\]\(([^):#]+)(?:#[\w-]+)?\)", README)
    assert len(linked) > 15
    assert not [path for path in linked if not (ROOT / path).exists()]
