"""Fetches the files of a base from the Hugging Face hub: those that are read, and no weights in another format."""

from __future__ import annotations

import re
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path

from dora_fx.app.errors import UserError
from dora_fx.app.hub import HubRepository
from dora_fx.app.options import HubName
from dora_fx.app.runs import Display
from dora_fx.files import listed

# What is read beside the weights, and what a merged model keeps of its base.
_COMPANIONS = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tekken.json", "*.model", "*.tiktoken", "*.jinja"),
    *("additional_chat_templates/*.jinja", "adapter_config.json", "LICEN[SC]E*", "NOTICE*", "USE_POLICY*"),
)
# In the order in which the weights are looked for: one file, or an index and its shards.
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json", re.compile(r"[^./]+-\d+-of-\d+\.safetensors")),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", re.compile(r"[^./]+-\d+-of-\d+\.bin")),
)


def fetch_base(name: HubName, display: Display, *, with_weights: bool = True) -> Path:
    """Return a folder of the local cache with a model's files, or a GGUF file that the name has as its part.

    Args:
        name: of the repository.
        display: shows the download.
        with_weights: without them, config and tokenizer alone are fetched.

    Raises:
        UserError: the repository cannot be found or fetched, or it has no model that can be read.
    """
    repository = HubRepository("--base", "model", name).pinned()
    there = repository.files()
    if name.part is not None:
        return repository.fetch([_gguf_file(name, there)], display) / name.part
    if "config.json" not in there:
        raise UserError(f"--base {name}: the repository has no config.json, {_instead(name, there)}")
    weights = _weights(there)
    if not weights:
        raise UserError(f"--base {name}: found no model.safetensors, in one file or sharded; {_instead(name, there)}")
    return repository.fetch(_companions(there) + (weights if with_weights else []), display)


def _companions(there: Collection[str]) -> list[str]:
    def is_companion(name: str) -> bool:
        # `*` of fnmatch goes past slashes.
        return any(fnmatchcase(name, each) and name.count("/") == each.count("/") for each in _COMPANIONS)

    return sorted(filter(is_companion, there))


def _weights(there: Collection[str]) -> list[str]:
    """Return the weight files of the first format that there is; an index comes last, since it promises its shards."""
    for single, index, shard in _WEIGHTS:
        if single in there:
            return [single]
        if index in there:
            return [*sorted(filter(shard.fullmatch, there)), index]
    return []


def _gguf_file(name: HubName, there: Collection[str]) -> str:
    if name.part is None or not name.part.endswith(".gguf") or name.part not in there:
        raise UserError(f"--base {name}: found no GGUF file {name.part} in the repository, {_instead(name, there)}")
    return name.part


def _instead(name: HubName, there: Collection[str]) -> str:
    """Format what is expected, by what there is."""
    if "adapter_config.json" in there:
        return "but adapter_config.json, a PEFT adapter's; expected a whole model, merge it first"
    if files := [file for file in there if file.endswith(".gguf")]:
        return (
            f"expected a Hugging Face checkpoint, or one of its GGUF files as {name.without_part}:FILE: {listed(files)}"
        )
    return f"expected a Hugging Face checkpoint; found {listed(there)}"
