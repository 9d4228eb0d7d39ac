"""A checkpoint that is damaged, or not this model's, is refused by name before a tensor changes."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dora_fx
from dora_fx import CheckpointError
from tests.models import row, tiny_gpt
from tests.tables import every_case
from tests.unit.checkpoints import adapted, are_equal, loaded, refusal, values

pytestmark = pytest.mark.usefixtures("world")

DATA, METADATA, COMMON, MANIFEST = "__0_0.distcp", ".metadata", "common.pt", "dora_fx.json"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    dora_fx.save_checkpoint(adapted(1), path, extra={"step": 3})
    return path


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def edit_manifest(path: Path, name: str, value: object) -> None:
    content = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(content | {name: value}))


def test_what_was_saved_is_loaded(checkpoint: Path) -> None:
    model = adapted(2)
    assert dora_fx.load_checkpoint(model, checkpoint) == {"step": 3}
    assert are_equal(values(model), values(adapted(1)))


@every_case("name", [DATA, METADATA, COMMON, "metadata.json"])
@every_case("damage", [flip, truncate, Path.unlink], ids=["flipped", "truncated", "missing"])
def test_damaged_file(checkpoint: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(checkpoint / name)
    message = refusal(adapted(2), checkpoint)
    assert str(checkpoint / name) in message
    assert "load another checkpoint" in message


def test_every_flipped_bit_of_the_manifest_is_noticed(checkpoint: Path) -> None:
    model, whole = adapted(2), (checkpoint / MANIFEST).read_bytes()
    for tenth in range(10):
        flip(checkpoint / MANIFEST, tenth / 10)
        assert MANIFEST in refusal(model, checkpoint)
        (checkpoint / MANIFEST).write_bytes(whole)
    dora_fx.load_checkpoint(model, checkpoint)


@pytest.mark.parametrize("damage", [truncate, Path.unlink], ids=["truncated", "missing"])
def test_damaged_manifest(checkpoint: Path, damage: Callable[[Path], None]) -> None:
    if damage is truncate:
        (checkpoint / MANIFEST).write_text((checkpoint / MANIFEST).read_text()[:100])
    else:
        damage(checkpoint / MANIFEST)
    message = refusal(adapted(2), checkpoint)
    assert MANIFEST in message
    assert "load another checkpoint" in message


@every_case(("name", "value"), [("format_version", 0), ("format_version", 2), ("format", "another")])
def test_another_format(checkpoint: Path, name: str, value: object) -> None:
    edit_manifest(checkpoint, name, value)
    message = refusal(adapted(2), checkpoint)
    assert f"{value!r}" in message
    assert "load it with the version of dora_fx that wrote it" in message


def test_an_edited_manifest_is_noticed(checkpoint: Path) -> None:
    edit_manifest(checkpoint, "base", {})
    assert "its checksum does not match" in refusal(adapted(2), checkpoint)


def test_another_base(checkpoint: Path) -> None:
    message = refusal(adapted(2, base_seed=4), checkpoint)
    assert "was trained on another base model" in message
    assert "decoder.layers.mlp.linear_fc1.weight" in message


def test_one_changed_element_of_the_base(checkpoint: Path) -> None:
    model = adapted(2)
    weight = model.decoder.layers[0].mlp.linear_fc2.base_weight
    with torch.no_grad():
        weight[7, 5].mul_(1 + 2**-20)
    message = refusal(model, checkpoint)
    assert "linear_fc2.weight" in message
    assert "linear_fc1" not in message


def test_swapped_rows_and_columns_of_the_base(checkpoint: Path) -> None:
    for swap in (lambda weight: weight.flip(0), lambda weight: weight.flip(1)):
        model = adapted(2)
        weight = model.decoder.layers[0].mlp.linear_fc2.base_weight
        with torch.no_grad():
            weight.copy_(swap(weight))
        assert "linear_fc2.weight" in refusal(model, checkpoint)


def test_another_base_on_request(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(2, base_seed=4)
    dora_fx.load_checkpoint(model, checkpoint, any_base=True)
    assert are_equal(values(model), values(adapted(1)))
    assert "another base model" in caplog.text


@pytest.mark.parametrize(("name", "value"), [("dim", 8), ("alpha", 16)])
def test_other_settings(checkpoint: Path, name: str, value: int) -> None:
    message = refusal(adapted(2, **{name: value}), checkpoint)
    saved = {"dim": 4, "alpha": 8}[name]
    assert f"was trained with {name}={saved}, the model has {name}={value}; attach DoRA with {name}={saved}" in message


def test_another_dropout_is_only_a_warning(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    dora_fx.load_checkpoint(adapted(2, dropout=0.1), checkpoint)
    assert "the checkpoint has dropout 0, training goes on with 0.1" in caplog.text


def test_fewer_adapters_than_the_checkpoint_has(checkpoint: Path) -> None:
    message = refusal(adapted(2, target_modules=["linear_qkv", "linear_fc1", "linear_fc2"]), checkpoint)
    assert "found adapters for decoder.layers.self_attention.linear_proj, which the model has not adapted" in message


def test_more_adapters_than_the_checkpoint_has(tmp_path: Path) -> None:
    dora_fx.save_checkpoint(adapted(1, target_modules=["linear_qkv"]), tmp_path / "checkpoint")
    message = refusal(adapted(2, target_modules=["linear_qkv", "linear_fc2"]), tmp_path / "checkpoint")
    assert "found no adapters for decoder.layers.mlp.linear_fc2, which the model has adapted" in message


def test_another_dtype(checkpoint: Path) -> None:
    message = refusal(adapted(2).bfloat16(), checkpoint, any_base=True)
    assert "is a float32 tensor of shape (1, 4, 32), the model's is bfloat16" in message


def test_more_layers_than_the_checkpoint_has(checkpoint: Path) -> None:
    model = dora_fx.DoRA(["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"], dim=4, alpha=8)(tiny_gpt())
    assert "(1, 4, 32), the model's is float32 of shape (2, 4, 32)" in refusal(model, checkpoint, any_base=True)


def test_optimizer_state_that_is_not_there(checkpoint: Path) -> None:
    assert "found no optimizer state" in refusal(adapted(2), checkpoint, optimizer=object())


def test_no_adapters() -> None:
    with pytest.raises(CheckpointError, match="the model has no DoRA adapters"):
        dora_fx.save_checkpoint(tiny_gpt(), "anywhere")


def test_a_model_that_megatron_cannot_save(tmp_path: Path) -> None:
    model = dora_fx.DoRA(["0"], dim=4)(torch.nn.Sequential(row()))
    with pytest.raises(CheckpointError, match="Sequential has no sharded_state_dict, and 0 is a RowParallelLinear"):
        dora_fx.save_checkpoint(model, tmp_path / "checkpoint")


def test_nothing_there(tmp_path: Path) -> None:
    assert refusal(adapted(2), tmp_path / "checkpoint") == f"{tmp_path / 'checkpoint'}: no such checkpoint"


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Savers that cannot tell each other's work from leftovers would delete it."""

    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(CheckpointError, match=r"cannot write a checkpoint there .No locks available"):
        dora_fx.save_checkpoint(adapted(1), tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_loading_a_file(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_text("text")
    assert "found a file, expected the directory of a checkpoint" in refusal(adapted(2), tmp_path / "checkpoint")


def test_a_linked_checkpoint_is_loaded(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(checkpoint)
    assert are_equal(loaded(tmp_path / "latest"), values(adapted(1)))


def test_a_moved_checkpoint_is_loaded(checkpoint: Path, tmp_path: Path) -> None:
    shutil.move(checkpoint, tmp_path / "elsewhere")
    assert are_equal(loaded(tmp_path / "elsewhere"), values(adapted(1)))
