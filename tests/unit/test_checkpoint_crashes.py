"""A save that is killed, or fails, at any point leaves the last good checkpoint, whole, or the new one."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import dora_fx
from dora_fx import CheckpointError
from dora_fx.checkpoint import read_adapters
from dora_fx.megatron.world import megatron_world
from tests.processes import start_process
from tests.unit.checkpoints import adapted, are_equal, leftovers, loaded, values

OLD, NEW, NEXT = 1, 2, 3
FILE_EVENTS = ("open", "os.mkdir", "os.chmod", "os.rename", "os.remove", "os.rmdir", "os.listdir", "shutil.rmtree")


def run(function: Callable[..., object], *args: object) -> int | None:
    """Run a function in a process; returns its exit code, negative for the signal that ended it."""
    child = start_process(function, *args)
    child.join()
    return child.exitcode


def save(path: Path, seed: int, die_at: tuple[int, tuple[str, ...]] | None = None) -> None:
    with megatron_world():
        model = adapted(seed)
        if die_at is not None:
            die_at_event(*die_at, path.parent)
        dora_fx.save_checkpoint(model, path)


def save_again_and_again(path: Path, seed: int, times: int) -> None:
    with megatron_world():
        model = adapted(seed)
        for _ in range(times):
            dora_fx.save_checkpoint(model, path)
            time.sleep(0.3)


def die_at_event(number: int, kinds: tuple[str, ...], folder: Path) -> None:
    """From now on, kill this process before its file-system event of a number, of some kinds and under a folder.

    Python announces every such event to its audit hooks, so the library runs as it is.
    """
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in kinds:
            return
        # With a directory's handle the name is relative, as in `shutil.rmtree`.
        if event in ("os.remove", "os.rmdir") or any(str(argument).startswith(str(folder)) for argument in arguments):
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(hook)


def saves_killed_at_every_event(folder: Path, kinds: tuple[str, ...], *, replacing: bool) -> Iterator[Path]:
    """The checkpoint's path after a save that was killed at the first event, the second, ..., and at none."""
    for number in range(1000):
        path = folder / str(number) / "checkpoint"
        path.parent.mkdir(parents=True)
        if replacing:
            shutil.copytree(folder / "good", path)
        code = run(save, path, NEW, (number, kinds))
        assert code in (0, -signal.SIGKILL)
        yield path
        if code == 0:
            assert number >= 3
            return
    raise AssertionError("the save never ended")


@pytest.mark.parametrize("replacing", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kinds", [("os.mkdir", "os.rename", "shutil.rmtree"), pytest.param(FILE_EVENTS, marks=pytest.mark.slow)]
)
def test_killed_at_any_point(tmp_path: Path, kinds: tuple[str, ...], replacing: bool) -> None:
    assert run(save, tmp_path / "good", OLD) == 0
    paths = list(saves_killed_at_every_event(tmp_path, kinds, replacing=replacing))
    outcomes = []
    with megatron_world():
        old, new, following = values(adapted(OLD)), values(adapted(NEW)), values(adapted(NEXT))
        for path in paths:
            try:
                found = loaded(path)
                outcomes.append("new" if are_equal(found, new) else "old")
                assert are_equal(found, new) or (replacing and are_equal(found, old))
            except CheckpointError as error:
                outcomes.append("none")
                assert not replacing
                assert "no such checkpoint" in str(error)
            dora_fx.save_checkpoint(adapted(NEXT), path)
            assert are_equal(loaded(path), following)
            assert leftovers(path) == []
    print(f"{len(paths) - 1} kills, loaded afterwards: {' '.join(outcomes)}")
    assert outcomes == sorted(outcomes, key=["none", "old", "new"].index)
    assert set(outcomes) == ({"old", "new"} if replacing else {"none", "new"})


def test_a_save_that_was_killed_between_its_renames(tmp_path: Path, world: None, caplog: Any) -> None:
    path = tmp_path / "checkpoint"
    dora_fx.save_checkpoint(adapted(OLD), path)
    path.rename(tmp_path / ".checkpoint.previous")
    assert are_equal(loaded(path), values(adapted(OLD)))
    assert "a save was interrupted; loading the checkpoint that it was replacing" in caplog.text


def test_what_a_dead_save_left_is_removed_and_what_a_live_one_fills_is_not(tmp_path: Path, world: None) -> None:
    from dora_fx.checkpoint.directory import new_directory

    path = tmp_path / "checkpoint"
    stale = tmp_path / ".checkpoint.saving-dead"
    stale.mkdir()
    (stale / "__0_0.distcp").write_bytes(b"half")
    with new_directory(path) as live:
        assert leftovers(path) == [live.name]
        dora_fx.save_checkpoint(adapted(NEW), path)
        assert leftovers(path) == [live.name]
    assert leftovers(path) == []
    assert are_equal(loaded(path), values(adapted(NEW)))


def mount(folder: Path, options: str) -> None:
    folder.mkdir(exist_ok=True)
    if os.system(f"mount -t tmpfs -o {options} tmpfs '{folder}' 2>/dev/null") != 0:
        pytest.skip("mounting a file system is not permitted here")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that holds one checkpoint, but not two."""
    folder = tmp_path / "disk"
    mount(folder, "size=96k")
    yield folder
    os.system(f"umount '{folder}'")


def test_disk_full(small_disk: Path, world: None) -> None:
    path = small_disk / "checkpoint"
    dora_fx.save_checkpoint(adapted(OLD), path)
    (small_disk / "filler").write_bytes(bytes(16 << 10))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="No space left on device"):
            dora_fx.save_checkpoint(adapted(NEW), path)
        assert leftovers(path) == []
        assert are_equal(loaded(path), values(adapted(OLD)))
    (small_disk / "filler").unlink()


def test_read_only_directory(small_disk: Path, world: None) -> None:
    path = small_disk / "checkpoint"
    dora_fx.save_checkpoint(adapted(OLD), path)
    assert os.system(f"mount -o remount,ro '{small_disk}'") == 0
    with pytest.raises(CheckpointError, match=f"{small_disk}: cannot write a checkpoint there .Read-only file system"):
        dora_fx.save_checkpoint(adapted(NEW), path)
    assert are_equal(loaded(path), values(adapted(OLD)))


def test_a_file_in_the_way(tmp_path: Path, world: None) -> None:
    path = tmp_path / "checkpoint"
    path.write_text("precious")
    with pytest.raises(CheckpointError, match="found a file, expected a checkpoint or nothing; save somewhere else"):
        dora_fx.save_checkpoint(adapted(NEW), path)
    assert path.read_text() == "precious"


def test_a_file_for_a_parent(tmp_path: Path, world: None) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(CheckpointError, match="cannot write a checkpoint there"):
        dora_fx.save_checkpoint(adapted(NEW), tmp_path / "file" / "checkpoint")


def test_a_directory_of_the_users_in_the_way(tmp_path: Path, world: None) -> None:
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="it is no checkpoint of dora_fx, and saving would delete it"):
        dora_fx.save_checkpoint(adapted(NEW), path)
    assert (path / "thesis.txt").read_text() == "precious"


def test_an_empty_directory_is_taken(tmp_path: Path, world: None) -> None:
    path = tmp_path / "checkpoint"
    path.mkdir()
    dora_fx.save_checkpoint(adapted(NEW), path)
    assert are_equal(loaded(path), values(adapted(NEW)))


@pytest.mark.parametrize("target", ["good", "nowhere"])
def test_a_symbolic_link_in_the_way(tmp_path: Path, world: None, target: str) -> None:
    dora_fx.save_checkpoint(adapted(OLD), tmp_path / "good")
    (tmp_path / "checkpoint").symlink_to(tmp_path / target)
    with pytest.raises(CheckpointError, match=f"found a symbolic link to .*{target}"):
        dora_fx.save_checkpoint(adapted(NEW), tmp_path / "checkpoint")
    assert are_equal(loaded(tmp_path / "good"), values(adapted(OLD)))
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("extra", "message"), [(lambda: None, "pickle"), (Fraction(1, 2), "`extra` holds objects that could not be loaded")]
)
def test_extra_that_cannot_be_saved_or_loaded(tmp_path: Path, world: None, extra: object, message: str) -> None:
    path = tmp_path / "checkpoint"
    dora_fx.save_checkpoint(adapted(OLD), path)
    with pytest.raises(CheckpointError, match=message):
        dora_fx.save_checkpoint(adapted(NEW), path, extra=extra)
    assert leftovers(path) == []
    assert are_equal(loaded(path), values(adapted(OLD)))


def test_two_savers_and_a_loader_at_once(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    assert run(save, path, OLD) == 0
    savers = [start_process(save_again_and_again, path, seed, 10) for seed in (OLD, NEW)]
    seen = {OLD: 0, NEW: 0}
    with megatron_world():
        expected = {seed: values(adapted(seed)) for seed in (OLD, NEW)}
        while any(saver.is_alive() for saver in savers):
            found = loaded(path)
            plain = {
                f"{layer}.adapter.{name}": tensor
                for layer, adapter in read_adapters(path).items()
                for name, tensor in adapter.tensors.items()
            }
            for read in (found, plain):
                [seed] = [seed for seed, value in expected.items() if are_equal(read, value)]
                seen[seed] += 1
    print(f"loads that found the first and the second saver's checkpoint: {seen}")
    assert [saver.exitcode for saver in savers] == [0, 0]
    assert sum(seen.values()) >= 6
    assert leftovers(path) == []
