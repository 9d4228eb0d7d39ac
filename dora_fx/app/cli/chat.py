"""`dora-fx chat`: prints answers of a trained model token by token; transformers generates with merged weights."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_fx.app.bases import (
    chosen_device,
    load_base,
    load_checkpoint,
    name_of_base,
    or_user_error,
    read_saved_adapter,
    resolve_base,
)
from dora_fx.app.cli.chat_model import ChatModel
from dora_fx.app.data import is_utf8
from dora_fx.app.errors import UserError
from dora_fx.app.runs import Display
from dora_fx.checkpoint import MANIFEST, previous_of
from dora_fx.hf import merged_state_dict
from dora_fx.models import HFCheckpoint

_NEW, _END = "/new", "/exit"


def run(parsed: dict[str, Any]) -> int:
    """Load the model, then answer the prompt or each input line; return the exit code.

    Raises:
        UserError: the model, an option or the prompt is not usable.
    """
    _check(parsed)
    # stdout has answers alone, so that they can be piped.
    display = Display(to_stderr=True)
    checkpoint = _load(parsed, display)
    model = ChatModel(checkpoint, chosen_device(parsed["device"]), parsed)
    conversation = _Conversation(model, parsed["system"])
    if parsed["prompt"] is not None:
        conversation.answer(parsed["prompt"])
        return 0
    return _answer_lines(conversation, display)


def _check(parsed: dict[str, Any]) -> None:
    for name, is_valid, expected in (
        ("max_new_tokens", parsed["max_new_tokens"] > 0, "a positive integer"),
        ("temperature", 0 <= parsed["temperature"] < float("inf"), "zero or a positive number"),
        ("top_p", 0 < parsed["top_p"] <= 1, "a number above 0, and at most 1"),
        ("seed", 0 <= parsed["seed"] < 2**63, "an integer from 0 to 2**63 - 1"),
        ("prompt", parsed["prompt"] is None or parsed["prompt"].strip(), "some text"),
    ):
        if not is_valid:
            raise UserError(f"--{name.replace('_', '-')}: found {parsed[name]!r}, expected {expected}")
    for name in ("prompt", "system"):
        if not is_utf8(parsed[name] or ""):
            raise UserError(f"--{name}: found bytes that are not UTF-8, expected text")
    if parsed["raw"] and parsed["system"] is not None:
        raise UserError("--system: found --raw beside it, which has no turns for an instruction; leave out one of them")


def _load(parsed: dict[str, Any], display: Display) -> HFCheckpoint:
    """Load the base with the adapter merged in, or a model without an adapter."""
    path, name = Path(parsed["model"]), parsed["model"]
    if _is_adapter(path):
        saved = read_saved_adapter(path, parsed["base"])
        checkpoint = load_base(saved, display)
        with display.phase("merging the adapter in"):
            merged = or_user_error(f"{saved.path}: ", merged_state_dict, checkpoint, saved.modules)
        return HFCheckpoint(checkpoint.path, checkpoint.config, merged, checkpoint.tokenizer)
    if parsed["base"] is not None:
        raise UserError(f"--base: found {name}, a model by itself, expected a run or a checkpoint; leave --base out")
    source = _model_path(name, display)
    with display.phase(f"loading {name_of_base(name, source)}"):
        try:
            return load_checkpoint(source, torch.float32)
        except UserError as error:
            raise UserError(str(error).removeprefix("--base ")) from error


def _is_adapter(path: Path) -> bool:
    """Return whether a path is a run or a checkpoint and not a model, by the files in it."""
    try:
        if (path / "config.json").exists():
            return False
        # After an interrupted save the old checkpoint lies beside its path.
        return any((path / name).exists() for name in ("config.yaml", MANIFEST)) or previous_of(path).exists()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def _model_path(name: str, display: Display) -> Path:
    path = Path(name)
    if (path / "adapter_config.json").exists():
        raise UserError(
            f"{name}: found an adapter for Hugging Face PEFT, expected a run, a checkpoint or a whole model; "
            "give the run that it was exported from, or what dora-fx merge wrote"
        )
    if path.is_dir() and not (path / "config.json").exists():
        raise UserError(
            f"{name}: found neither the config.yaml of a run nor the config.json of a model; give the folder of a run "
            "of dora-fx finetune, or one that dora-fx merge wrote"
        )
    try:
        return resolve_base(name, display)
    except UserError as error:
        raise UserError(str(error).removeprefix("--base ")) from error


@dataclass
class _Conversation:
    """A conversation with a model; without a chat template, the model sees each line by itself."""

    model: ChatModel
    system: str | None
    turns: list[dict[str, str]] = field(default_factory=list)

    def answer(self, line: str) -> None:
        """Write the answer to stdout as it is generated; raise UserError if it does not fit in the model's context."""
        turns = [*self.turns, {"role": "user", "content": line}]
        opening = [] if self.system is None else [{"role": "system", "content": self.system}]
        answer = self.model.answer(self._tokens(line, [*opening, *turns]))
        if self.model.has_turns:
            self.turns = [*turns, {"role": "assistant", "content": answer}]

    def _tokens(self, line: str, turns: list[dict[str, str]]) -> Tensor:
        if self.model.has_turns:
            return self.model.tokens_of_turns(turns)
        if self.system is not None:
            raise UserError("--system: found a tokenizer without a chat template, which would place the instruction")
        return self.model.tokens_of_text(line)


def _answer_lines(conversation: _Conversation, display: Display) -> int:
    is_typed = sys.stdin.isatty()
    if is_typed:
        # Gives input() editing and history, if Python was built with it.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        display.say(f"{_NEW} forgets what was said, {_END} or Ctrl-D ends, Ctrl-C ends an answer")
    for line in _lines(is_typed):
        if line == _END:
            break
        if line == _NEW:
            conversation.turns = []
            continue
        try:
            conversation.answer(line)
        except KeyboardInterrupt:
            print()
            if not is_typed:
                raise
        except UserError as error:
            # A user at the terminal can continue; in a pipe the message would be seen too late.
            if not is_typed:
                raise
            display.say(f"{error}; {_NEW} forgets what was said")
    return 0


def _lines(is_typed: bool) -> Iterator[str]:
    """Yield the typed or piped lines, without empty ones; Ctrl-C at the prompt ends the input as Ctrl-D does."""
    while True:
        try:
            line = input("> " if is_typed else "").strip()
        except (EOFError, KeyboardInterrupt):
            if is_typed:
                print()
            return
        except UnicodeDecodeError as error:
            raise UserError("the input: found bytes that are not UTF-8, expected text") from error
        if line:
            yield line
