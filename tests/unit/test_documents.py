"""The documents: commands and Python blocks run in order, graphs are golden text, files that are named are there."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

import dora_fx
from dora_fx.app.cli.main import main
from dora_fx.models import causal_mask
from tests.distributed.bridge import adapter_shards, saving_on_cpu
from tests.graph.design_graphs import DESIGN, with_current_graphs
from tests.hf_models import save_tiny_checkpoint
from tests.models import SEQUENCE, tiny_gpt, token_ids

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def tutorial_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the tutorial says is there: a model in `base` and a text in `text.txt`."""
    save_tiny_checkpoint(tmp_path / "base")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 30)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_tutorial_s_python_runs(tutorial_folder: Path) -> None:
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks("tutorial.md", "python")):
        exec(compile(block, f"tutorial.md, block {number + 1}", "exec"), names)
    losses = names["losses"]
    assert len(losses) == 10 and losses[-1] < 0.9 * losses[0]
    # Training began with the base's loss, as an untrained adapter is silent; eager code may order sums otherwise.
    assert names["base_loss"] == pytest.approx(losses[0], rel=1e-5)
    assert names["merged_loss"] < losses[-1]
    assert names["extra"] == {"step": 10}
    assert (tutorial_folder / "out" / "adapter_model.safetensors").is_file()


def test_the_python_of_hugging_face_models_runs(tutorial_folder: Path) -> None:
    [block] = blocks("hugging_face.md", "python")
    names: dict[str, Any] = {}
    # What Inductor makes of it, the example of Trainer shows.
    eager = block.replace("compile_model(model)", 'compile_model(model, inner_compiler="eager")')
    assert eager != block
    exec(compile(eager, "hugging_face.md", "exec"), names)
    assert names["merged_loss"] < names["loss"]
    assert (tutorial_folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (tutorial_folder / "run" / "step_5" / "dora_fx.json").is_file()


def save_as_bridge(folder: Path, target_modules: Sequence[str], **settings: Any) -> None:
    """Save an adapter of one rank, whose keys, shapes and order of rows are Megatron-Bridge's."""
    model = dora_fx.DoRA(target_modules, **settings)(tiny_gpt(num_layers=1))
    folder.mkdir()
    with saving_on_cpu():
        dist_checkpointing.save(adapter_shards(model), str(folder))


def test_the_python_of_use_runs(world: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gpt_model = tiny_gpt(num_layers=1)
    before = {name: value.clone() for name, value in gpt_model.named_parameters()}
    dora = dora_fx.DoRA()
    model = dora(gpt_model)
    save_as_bridge(tmp_path / "bridge", dora.target_modules, dim=dora.dim, alpha=dora.alpha)
    tokens = token_ids(SEQUENCE + 1)
    batch = {
        "input_ids": tokens[:, :-1],
        "position_ids": torch.arange(SEQUENCE).expand(len(tokens), -1),
        "attention_mask": causal_mask(SEQUENCE, "cpu"),
        "labels": tokens[:, 1:],
    }
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    model(**batch).mean().backward()
    optimizer.step()
    names: dict[str, Any] = {"torch": torch, "dora_fx": dora_fx, "model": model, "optimizer": optimizer, "batch": batch}
    for number, block in enumerate(blocks("use.md", "python")):
        exec(compile(block, f"use.md, block {number + 1}", "exec"), names)
    assert names["extra"] == {"step": 100}
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    base = {name.replace(".to_wrap.", "."): value for name, value in model.named_parameters() if ".adapter" not in name}
    torch.testing.assert_close(base, before, rtol=0, atol=0)


def test_the_tutorial_s_commands_run(tutorial_folder: Path) -> None:
    commands = [line.removeprefix("$ ") for block in blocks("tutorial.md", "console") for line in block.splitlines()]
    assert len(commands) == 6
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "dora-fx"
        # What is compiled, other tests run; here the options and files of the text are looked at.
        eager = ["--compile", "none", "--sample-tokens", "2"] if "--base" in arguments else []
        assert main([*arguments, *eager]) == 0, command
    assert (tutorial_folder / "runs" / "first" / "loss.png").is_file()
    assert (tutorial_folder / "adapter" / "adapter_config.json").is_file()
    assert (tutorial_folder / "merged" / "config.json").is_file()


def test_the_graphs_of_the_design_are_golden_text() -> None:
    page = DESIGN.read_text(encoding="utf-8")
    assert page.count("<!-- golden text: ") == len(blocks("design.md", "text")) == 4
    stale = re.sub(r"^(output_1|linear): .*\n", "", page, flags=re.MULTILINE)
    assert stale != page == with_current_graphs(stale), "python -m tests.graph.design_graphs writes them anew"


def test_files_that_the_documents_name_are_there() -> None:
    named = set()
    for page in [*DOCS.glob("*.md"), ROOT / "CONTRIBUTING.md"]:
        text = page.read_text(encoding="utf-8")
        named |= {(page.name, path) for path in re.findall(r"`((?:\w+/)+[\w.]*\.(?:py|md))`", text)}
    assert len(named) > 20
    missing = [
        found for found in sorted(named) if not any((root / found[1]).is_file() for root in (ROOT, ROOT / "dora_fx"))
    ]
    assert not missing


def test_the_citation_is_of_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {dora_fx.__version__}\n" in citation


def test_every_public_name_is_in_the_reference() -> None:
    listed = re.findall(
        r"^        - (\w+)$", (DOCS / "reference" / "index.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(listed) == sorted(set(dora_fx.__all__) - {"__version__"})


def test_attributes_stand_in_lines_of_their_own() -> None:
    """The reference takes the second of two names in front of a colon for a type."""
    pages = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    modules = {name for name in re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE) if find_spec_maybe(name)}
    modules |= {getattr(dora_fx, name).__module__ for name in set(dora_fx.__all__) - {"__version__"}}
    assert len(modules) > 20
    joined = []
    for module in sorted(modules):
        source = inspect.getsource(import_module(module))
        sections = re.findall(r"^    Attributes:\n((?:        .*\n)+)", source, re.MULTILINE)
        joined += [(module, line) for part in sections for line in re.findall(r"^ {8}\w+, .*$", part, re.MULTILINE)]
    assert not joined


def find_spec_maybe(name: str) -> Any:
    """Find a module; None for a class or function, whose parent is no package."""
    try:
        return find_spec(name)
    except ModuleNotFoundError:
        return None


def test_no_public_name_is_hidden_by_a_module() -> None:
    """The reference is made from sources: a module of the same name would stand in the place of a function there."""
    for name in set(dora_fx.__all__) - {"__version__"}:
        value = getattr(dora_fx, name)
        for room in {value.__module__, value.__module__.rpartition(".")[0], "dora_fx"}:
            is_package = hasattr(import_module(room), "__path__")
            assert not is_package or find_spec(f"{room}.{name}") is None, f"{room}.{name}"
