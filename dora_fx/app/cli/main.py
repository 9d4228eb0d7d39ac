"""Entry point of the `dora-fx` command: parses arguments, runs the sub-command, and prints errors as one line."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import signal
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from typing import Any

from dora_fx.app.cli.commands import COMMANDS
from dora_fx.app.cli.option_order import options_in_order
from dora_fx.app.errors import Interrupted, UserError
from dora_fx.app.options import (
    DEMO_DEFAULTS,
    LIST_OPTIONS,
    PAIR_OPTIONS,
    with_hint,
    with_lists,
    with_own_names,
)
from dora_fx.version import __version__

USER_ERROR_EXIT_CODE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dora-fx` with the given arguments (the process's own by default) and return its exit code."""
    _quieten_libraries()
    _take_every_character()
    try:
        exit_code = _run(list(sys.argv[1:] if argv is None else argv))
        if sys.stdout is not None:
            # Here, where an error can still be reported: Python would flush at its exit.
            sys.stdout.flush()
        return exit_code
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "dora_fx":
            raise
        return _fail(f'{error.name} is not installed; the command needs: pip install "dora-fx[demo]"')
    except UserError as error:
        return _fail(str(error))
    except Interrupted as error:
        print(f"dora-fx: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return Interrupted(signal.SIGINT).exit_code
    except OSError as error:
        # Errors at files have been converted before, or have a name. One without a name is of the command's own output.
        if error.filename is not None:
            raise
        return _output_failed(error)


def _run(argv: list[str]) -> int:
    try:
        name, parsed = parse(argv)
    except UserError as error:
        if argv[:1] == ["finetune"] and os.environ.get("WORLD_SIZE", "1") != "1":
            _tell_other_ranks(error)
        raise
    return COMMANDS[name].run(parsed)


def _tell_other_ranks(error: UserError) -> None:
    """Tell the other processes of the run, whose arguments may be valid, that this one fails."""
    from dora_fx.app.runs import Ranks

    def refuse() -> None:
        raise error

    with contextlib.suppress(UserError):
        Ranks.from_environment().together(refuse)


def parse(argv: list[str]) -> tuple[str, dict[str, Any]]:
    """Return the sub-command and its parsed arguments; raise UserError for invalid ones."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        prog="dora-fx",
        description="DoRA fine-tuning of Megatron-Core models.",
        exit_on_error=False,
        allow_abbrev=False,
        version=__version__,
    )
    subcommands = parser.add_subcommands(required=True, dest="command")
    parsers = {name: command.parser() for name, command in COMMANDS.items()}
    for name, command in COMMANDS.items():
        subcommands.add_subcommand(name, parsers[name], help=command.help)
    if argv[:1] == ["finetune"]:
        own = with_own_names(argv[1:], _option_names(parsers["finetune"]))
        argv = ["finetune", *options_in_order(with_lists(own, LIST_OPTIONS, PAIR_OPTIONS))]
    elif argv[:1] == ["explain"]:
        own = with_own_names(argv[1:], _option_names(parsers["explain"]))
        argv = ["explain", *with_lists(own, LIST_OPTIONS, PAIR_OPTIONS)]
    try:
        parsed = parser.parse_args(argv)
        if parsed.command == "finetune" and parsed.finetune.demo in DEMO_DEFAULTS:
            # As defaults, so that the command line and files of options override them.
            parsers["finetune"].set_defaults(DEMO_DEFAULTS[parsed.finetune.demo])
            parsed = parser.parse_args(argv)
    except ArgumentError as error:
        message = _in_terms_of_options(str(error))
        known = _option_names(parsers[argv[0]]) if argv and argv[0] in parsers else list(parsers)
        raise UserError(with_hint(message, known)) from error
    return parsed.command, parsed[parsed.command].as_dict()


def _option_names(parser: Any) -> list[str]:
    return [name.replace("_", "-") for name in vars(parser.get_defaults())]


def _quieten_libraries() -> None:
    """Hide warnings of libraries that a user of the command cannot act on.

    Dynamo warns about Megatron's cached rotary table, torch about the way Megatron reads checkpoints, and Megatron
    about packages that a single process does not need.
    """
    for module in (r"megatron\.", r"torch\.distributed\.checkpoint\."):
        warnings.filterwarnings("ignore", module=module)
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _take_every_character() -> None:
    """Print characters that a terminal's encoding lacks, such as those of a sample in ASCII, as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _output_failed(error: OSError) -> int:
    """Return the shell's exit code for a broken pipe; for other errors, such as a full disk, print a line."""
    # Python would report the error once more when it closes the stream.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE
    return _fail(f"the output cannot be written: {error.strerror}")


def _in_terms_of_options(message: str) -> str:
    """Rewrite jsonargparse's message: options in place of Python's names of keys and types."""
    message = re.sub(r'Parser key "(\w+)":', lambda key: f"--{key[1].replace('_', '-')}:", message)
    return re.sub(r"a (?:<class '(\w+)'>|typing\.(?=Literal))", r"\1", message)


def _fail(message: str) -> int:
    rank = os.environ.get("RANK", "0")
    speaker = "dora-fx" if rank == "0" else f"dora-fx, rank {rank}"
    print(f"{speaker}: error: {' '.join(message.split())}", file=sys.stderr)
    return USER_ERROR_EXIT_CODE


if __name__ == "__main__":
    sys.exit(main())
