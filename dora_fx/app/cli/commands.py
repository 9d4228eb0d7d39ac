"""The sub-commands of `dora-fx`: their help, their arguments, and the modules that run them.

This file and `app/options/` import no slow packages, so that `--help` and a misspelled option are answered at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from dora_fx.app.options import add_options, add_options_of_layout

_SAVED = "folder of a run of dora-fx finetune, or what dora_fx.save_checkpoint wrote"


class _PathType:
    """The type of a path for jsonargparse, whose help would print the class."""

    def __call__(self, value: str) -> Path:
        return Path(value)

    def __repr__(self) -> str:
        return "Path"


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Attributes:
        help: its line in the help of `dora-fx`.
        description: the first sentence of its own help.
        add_arguments: adds its arguments to a jsonargparse parser.
        module: name of the module whose `run` takes the parsed arguments and returns the exit code.
    """

    help: str
    description: str
    add_arguments: Callable[[Any], None]
    module: str

    def parser(self) -> Any:
        """Make the sub-command's jsonargparse parser."""
        import jsonargparse

        parser = jsonargparse.ArgumentParser(description=self.description, exit_on_error=False, allow_abbrev=False)
        self.add_arguments(parser)
        return parser

    def run(self, parsed: dict[str, Any]) -> int:
        """Import the sub-command's module, which takes seconds, and run it; it may raise UserError."""
        return int(import_module(self.module).run(parsed))


def _export_arguments(parser: Any) -> None:
    _saved_adapter_arguments(parser)
    parser.add_argument(
        "--base-name",
        type=str | None,
        default=None,
        help="name or directory by which PEFT finds the base; by default the base's own",
    )


def _inspect_arguments(parser: Any) -> None:
    parser.add_argument(
        "checkpoint",
        type=_PathType(),
        help="what dora_fx.save_checkpoint wrote, or the folder of a run of dora-fx finetune",
    )


def _saved_adapter_arguments(parser: Any) -> None:
    """Add the arguments of what to read and where to write."""
    parser.add_argument("checkpoint", type=_PathType(), help=_SAVED)
    parser.add_argument(
        "--to", type=_PathType(), required=True, help="folder to write; it must not exist or must be empty"
    )
    _base_argument(parser)


def _base_argument(parser: Any) -> None:
    parser.add_argument(
        "--base",
        type=str | None,
        default=None,
        help="the adapter's base: a Hugging Face directory, a GGUF file, a model of the Hugging Face hub as org/name "
        "or org/name@revision, or smollm2; by default the run's own",
    )


def _chat_arguments(parser: Any) -> None:
    parser.add_argument(
        "model",
        type=str,
        help=f"{_SAVED}; or a model as it is: a merged folder, another Hugging Face directory, a GGUF file, a model of "
        "the Hugging Face hub as org/name or org/name@revision, or smollm2",
    )
    _base_argument(parser)
    parser.add_argument(
        "--prompt",
        type=str | None,
        default=None,
        help="a prompt to answer; by default, every line that is typed or piped in is answered",
    )
    parser.add_argument("--system", type=str | None, default=None, help="instruction before the first turn")
    parser.add_argument(
        "--raw",
        action="store_true",
        help="continue the prompt as a text, without turns; implied if the tokenizer has no chat template",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="largest number of tokens in an answer")
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="of the sampling; at 0 the most probable token is always taken"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        help="sample from the most probable tokens, as few as have this probability together",
    )
    parser.add_argument("--seed", type=int, default=1234, help="seed of the sampling")
    parser.add_argument(
        "--device",
        type=Literal["auto", "cpu", "cuda"],
        default="auto",
        help="device to run on; auto is CUDA if there is a GPU",
    )


def _explain_arguments(parser: Any) -> None:
    parser.add_argument(
        "base",
        type=str,
        help="a name such as llama3-70b, a Hugging Face folder or its config.json, or a GGUF file; no weights are read",
    )
    add_options_of_layout(parser)
    parser.add_argument(
        "--gradient-accumulation",
        type=int,
        default=0,
        help="forward passes of one optimizer step, over all data-parallel ranks; dp x pp by default, the fewest that "
        "keep every pipeline stage busy",
    )
    parser.add_argument(
        "--attention",
        type=Literal["flash", "local"],
        default="flash",
        help="flash keeps no attention scores, as fused attention on a GPU; local is Megatron's own, which keeps them",
    )
    parser.add_argument(
        "--compare",
        type=str,
        nargs="+",
        default=[],
        help="layouts to show side by side, such as tp=4,pp=8 tp=8,pp=4; other options hold for all of them",
    )
    parser.add_argument(
        "--memory", type=str | None, default=None, help="of a device, such as 80GiB: say whether the run fits into it"
    )
    parser.add_argument("--json", action="store_true", help="print the records as JSON in place of tables")
    parser.add_argument(
        "--picture",
        type=_PathType(),
        default=None,
        help="SVG file to write: a layer's graph before and after the passes, shapes, bytes and collectives; where "
        "a model has several kinds of layers, a numbered file for each",
    )
    parser.add_argument("--tree", action="store_true", help="print the same as a tree, after the tables")


COMMANDS = {
    "finetune": Command(
        "train a DoRA adapter on texts or conversations",
        "Train a DoRA adapter of a base model on texts or conversations, and write a run folder.",
        add_options,
        "dora_fx.app.cli.finetune",
    ),
    "explain": Command(
        "say what a run costs before it runs: memory, operations and collectives of a layout",
        "Say what a run with DoRA costs beside LoRA and the frozen base, per rank, without weights and on one CPU.",
        _explain_arguments,
        "dora_fx.app.cli.explain",
    ),
    "chat": Command(
        "talk to a trained or merged model",
        "Talk to a trained or merged model, or let it continue a text.",
        _chat_arguments,
        "dora_fx.app.cli.chat",
    ),
    "export": Command(
        "write the adapter of a run or a checkpoint for Hugging Face PEFT",
        "Write the adapter of a run or a checkpoint for Hugging Face PEFT.",
        _export_arguments,
        "dora_fx.app.cli.export",
    ),
    "merge": Command(
        "write the base with the adapter of a run or a checkpoint merged in, as a Hugging Face model",
        "Write the base model with the adapter of a run or a checkpoint merged in, for transformers.",
        _saved_adapter_arguments,
        "dora_fx.app.cli.merge",
    ),
    "inspect": Command(
        "show what a checkpoint holds and whether it is damaged",
        "Show what a checkpoint holds, and whether it is damaged. Needs no model and no other process.",
        _inspect_arguments,
        "dora_fx.app.cli.inspect",
    ),
}
