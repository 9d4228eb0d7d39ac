"""PEFT adapters of somebody else, whose files say what they cannot have, are refused and nothing is attached."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

import dora_fx
from tests.hf_models import tiny_hf_model
from tests.peft_models import megatron_of, save_peft_adapter
from tests.tables import every_case


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(shape: list[int], end: int, key: str = "a") -> bytes:
    return json.dumps({key: {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()


SAFETENSORS_FILES = {
    "length": safetensors(b"{}", length=1 << 62),
    "cut": safetensors(tensor([4], 16), bytes(4)),
    "overflow": safetensors(tensor([1 << 62, 4], 4), bytes(4)),
    "more": safetensors(tensor([8], 16), bytes(16)),
    "deep": safetensors(b'{"a":' * 100_000),
    "empty": b"",
}


@every_case("name", SAFETENSORS_FILES)
def test_safetensors_headers(name: str, world: None, tmp_path: Path) -> None:
    """Their own reader compares the header with the file, so nothing of ours does."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(SAFETENSORS_FILES[name])
    with pytest.raises(SafetensorError):
        safe_open(path, framework="pt").__enter__()
    adapter = tmp_path / "adapter"
    save_peft_adapter(tiny_hf_model(), adapter)
    (adapter / "adapter_model.safetensors").write_bytes(SAFETENSORS_FILES[name])
    found = "the file is empty" if name == "empty" else r"cannot be read \(SafetensorError: .*\)"
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors: {found}; .*download it again"):
        dora_fx.import_hf(megatron_of(tiny_hf_model()), adapter)


ADAPTER_CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "deep": (lambda config: "[" * 100_000 + "]" * 100_000, "values nested too deeply"),
    "list": (lambda config: [config], "found a list, expected an object"),
    "rank_pattern": (lambda config: config | {"rank_pattern": [3]}, "expected an object of patterns and numbers"),
    "pattern": (
        lambda config: config | {"rank_pattern": {"(": 3}},
        r"rank_pattern has '\(', expected a regular expression",
    ),
    "targets": (lambda config: config | {"target_modules": "*"}, r"target_modules has '\*', expected a regular"),
    "rank": (lambda config: config | {"r": 10**12}, "expected the rank 1000000000000"),
}


@every_case("name", ADAPTER_CONFIGS)
def test_adapter_configs(name: str, world: None, tmp_path: Path) -> None:
    edit, message = ADAPTER_CONFIGS[name]
    folder = tmp_path / "adapter"
    save_peft_adapter(tiny_hf_model(), folder)
    edited = edit(json.loads((folder / "adapter_config.json").read_text()))
    (folder / "adapter_config.json").write_text(edited if isinstance(edited, str) else json.dumps(edited))
    model = megatron_of(tiny_hf_model())
    with pytest.raises(ValueError, match=message):
        dora_fx.import_hf(model, folder)
    assert not any("adapter" in key for key, _ in model.named_parameters())


def test_a_pipe_as_an_adapter(world: None, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_peft_adapter(tiny_hf_model(), folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).rename(folder / "kept")
        os.mkfifo(folder / name)
        with pytest.raises(ValueError, match=f"{name}: found a named pipe, expected a regular file; download"):
            dora_fx.import_hf(megatron_of(tiny_hf_model()), folder)
        (folder / "kept").rename(folder / name)
