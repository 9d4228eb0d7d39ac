"""Logs the metrics of a run to TensorBoard and Weights & Biases, in addition to metrics.jsonl."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dora_fx.app.errors import UserError

Row = Mapping[str, float]
Write = Callable[[Row], None]

_WITHOUT_LOGIN = ("offline", "disabled", "dryrun")


def check_logs(names: Sequence[str]) -> None:
    """Raise UserError if a package is missing, or nobody is logged in to W&B."""
    for name in names:
        if name not in LOGS:
            raise UserError(f"--log: found {name!r}, expected some of {', '.join(LOGS)}, with commas between")
        try:
            LOGS[name].check()
        except ImportError as error:
            raise UserError(f"--log {name}: it cannot be imported ({error}); pip install {name}") from error


@contextmanager
def training_log(names: Sequence[str], folder: Path, config: Mapping[str, Any], first_step: int) -> Iterator[Write]:
    """Open the logs; yield a function that writes a row of metrics.jsonl to each.

    Args:
        names: keys of `LOGS`.
        folder: of the run.
        config: the run's options.
        first_step: the next step. TensorBoard discards what it has of this and later steps, from before a resume.

    Raises:
        UserError: a log cannot be opened.
    """
    with ExitStack() as opened:
        writers = [opened.enter_context(LOGS[name].opened(folder, config, first_step)) for name in names]

        def write(row: Row) -> None:
            values = {name: value for name, value in row.items() if name not in ("step", "tokens", "seconds")}
            if "seconds" in row:
                values["tokens_per_second"] = row["tokens"] / row["seconds"]
            for writer in writers:
                writer({"step": row["step"], **values})

        yield write


class TensorBoard:
    """Event files in the folder `tensorboard` of the run."""

    @staticmethod
    def check() -> None:
        """Raise ImportError if TensorBoard is not installed."""
        import torch.utils.tensorboard  # noqa: F401

    @staticmethod
    @contextmanager
    def opened(folder: Path, config: Mapping[str, Any], first_step: int) -> Iterator[Write]:
        """Yield a function that adds the values of a row."""
        from torch.utils.tensorboard import SummaryWriter

        try:
            writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        except OSError as error:
            raise UserError(f"--log tensorboard: {folder / 'tensorboard'}: {error.strerror or error}") from error

        def write(row: Row) -> None:
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(name, value, int(row["step"]))

        try:
            yield write
        finally:
            writer.close()


class WeightsAndBiases:
    """A W&B run in the project `dora-fx`; a resumed run is a new W&B run in the same group."""

    @staticmethod
    def check() -> None:
        """Raise ImportError if W&B is not installed, UserError if nobody is logged in to it."""
        wandb = importlib.import_module("wandb")
        if wandb.setup().settings.mode in _WITHOUT_LOGIN:
            return
        try:
            is_logged_in = wandb.login(prompt=False, verify=False)
        # An older version has no `prompt`; if the server cannot be reached, wandb raises an error of its own.
        except (TypeError, wandb.errors.Error) as error:
            raise UserError(f"--log wandb: {error}; log in with: wandb login, or set WANDB_MODE=offline") from error
        if not is_logged_in:
            raise UserError("--log wandb: nobody is logged in; log in with: wandb login, or set WANDB_MODE=offline")

    @staticmethod
    @contextmanager
    def opened(folder: Path, config: Mapping[str, Any], first_step: int) -> Iterator[Write]:
        """Yield a function that logs the values of a row."""
        wandb = importlib.import_module("wandb")
        try:
            run = wandb.init(
                project="dora-fx", group=folder.name, name=folder.name, dir=str(folder), config=dict(config)
            )
        except wandb.errors.Error as error:
            raise UserError(f"--log wandb: {error}") from error

        def write(row: Row) -> None:
            run.log(dict(row), step=int(row["step"]))

        try:
            yield write
        finally:
            run.finish()


LOGS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
