"""One table has all names of Hugging Face architectures, and nothing else in the package writes one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open

from dora_fx.models.architecture import architecture_of
from dora_fx.models.hf_architectures import HF_ARCHITECTURES, SUPPORTED_MODEL_TYPES
from dora_fx.models.layer_tensors import hf_layer_names
from tests.hf_models import CONFIGS, MOE_CONFIGS, tiny_hf_config, tiny_hf_model
from tests.tables import every_case
from tests.unit.test_imports import source_files

TABLE = "dora_fx.models.hf_architectures"
# What targets are called in other libraries, for a hint, and sizes that are published by the types of models.
OTHER_TABLES = ("dora_fx.attach.layer_names", "dora_fx.explanation.named_shapes")


def written_strings(tree: ast.AST) -> Iterator[str]:
    """Strings that are no docstrings."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def names_in(path: Path) -> list[str]:
    """Strings of a file that hold a name of the table's; `linear_kv_down_proj` and the like are Megatron's own."""
    layers = {name.rpartition(".")[2] for hf in HF_ARCHITECTURES.values() for ns in hf.linears.values() for name in ns}
    norms = {name for hf in HF_ARCHITECTURES.values() for name in hf.norms.values() if name not in hf.norms}
    around = {"block_sparse_moe", "self_attn", "lm_head", "embed_tokens", "model.layers", "model.norm"}
    return [
        text
        for text in written_strings(ast.parse(path.read_text()))
        if text in SUPPORTED_MODEL_TYPES
        or any(re.search(rf"(?<!\w){re.escape(name)}(?!\.org)", text) for name in layers | norms | around)
    ]


def test_no_other_file_names_what_the_table_does() -> None:
    found = {name: names for name, path in source_files().items() if (names := names_in(path))}
    assert len(found.pop(TABLE)) > 10
    assert all(found.pop(table) for table in OTHER_TABLES)
    assert found == {}


@every_case("kind", [*CONFIGS, *MOE_CONFIGS])
def test_the_table_names_exactly_the_tensors_that_transformers_writes(kind: str, tmp_path: Path) -> None:
    tiny_hf_model(kind).save_pretrained(tmp_path)
    prefix = "model.layers.0."
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = {name.removeprefix(prefix) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    listed = hf_layer_names(architecture_of(tiny_hf_config(kind)))
    assert sorted(listed) == sorted(names)


def test_every_architecture_is_tested() -> None:
    assert {tiny_hf_config(kind).model_type for kind in [*CONFIGS, *MOE_CONFIGS]} == set(SUPPORTED_MODEL_TYPES)
