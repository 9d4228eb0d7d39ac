"""Run `dora-fx finetune`, and what else torchrun starts, on several ranks with the surroundings that it gives."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from dora_fx.app.cli.main import main
from tests.processes import start_process


def finetune(
    num_ranks: int,
    *arguments: object,
    of_rank_1: Sequence[str] = (),
    prepare: Callable[[int], None] | None = None,
    expect: int = 0,
) -> str:
    """Run the command in processes with the surroundings that torchrun gives; returns what all of them wrote.

    `prepare` is called with its rank in each process first.
    """
    own = [["finetune", *map(str, arguments), *(of_rank_1 if rank == 1 else ())] for rank in range(num_ranks)]
    return as_torchrun_does(num_ranks, run_command, own, prepare, expect=expect)


def run_command(rank: int, arguments: list[list[str]], prepare: Callable[[int], None] | None) -> int:
    if prepare is not None:
        prepare(rank)
    return main(arguments[rank])


def as_torchrun_does(
    num_ranks: int, function: Callable[..., int | None], *args: object, seconds: float = 240, expect: int = 0
) -> str:
    """Exit with `function(rank, *args)` in processes with torchrun's surroundings; returns what all of them wrote."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        # torchrun's agent holds the store, too.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ranks = [
            start_process(be_rank, rank, num_ranks, store.port, output, function, args) for rank in range(num_ranks)
        ]
        for rank in ranks:
            rank.join(timeout=seconds)
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
        text = output.read_text()
    assert codes == [expect] * num_ranks, f"{codes}: {text}"
    return text


def be_rank(
    rank: int,
    world_size: int,
    port: int,
    output: Path,
    function: Callable[..., int | None],
    args: tuple[object, ...],
) -> None:
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with output.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    sys.exit(function(rank, *args))


def losses(run: Path) -> torch.Tensor:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] for line in lines if "loss" in line], dtype=torch.float64)
