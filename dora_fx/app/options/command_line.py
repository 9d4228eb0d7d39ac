"""What people write on a command line besides what the parser takes: lists with commas, other programs' options."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Iterator

# Options of transformers, PEFT, TRL, Axolotl, LLaMA-Factory and Megatron-LM by what they are called here; several of
# ours may have a name in common, and the first that the command has is meant.
_ELSEWHERE = {
    "lr": "learning-rate peak-lr max-lr",
    "dim": "r rank lora-r lora-rank lora-dim adapter-dim",
    "alpha": "lora-alpha",
    "dropout": "lora-dropout",
    "target-modules": "target targets lora-target lora-target-modules modules layers",
    "base": "model model-name model-name-or-path base-model pretrained pretrained-checkpoint model-path",
    "data": "dataset train-file train-data data-path data-file text file input",
    "run": "output output-dir out save-dir run-dir name",
    "to": "output output-dir out target",
    "steps": "max-steps num-steps train-iters iters iterations training-steps",
    "epochs": "num-train-epochs num-epochs train-epochs",
    "batch-size": "per-device-train-batch-size micro-batch-size mbs bs train-batch-size",
    "gradient-accumulation": "gradient-accumulation-steps grad-accum accumulate-grad-batches",
    "sequence-length": "seq-length seq-len max-seq-length max-length cutoff-len context-length block-size",
    "schedule": "lr-scheduler lr-scheduler-type scheduler lr-decay-style",
    "warmup-steps": "warmup lr-warmup-iters lr-warmup-steps",
    "max-grad-norm": "clip-grad gradient-clipping grad-clip",
    "eval-every": "eval-steps eval-interval evaluation-interval",
    "save-every": "save-steps save-interval",
    "resume": "resume-from-checkpoint load resume-from",
    "dtype": "bf16 fp16 precision torch-dtype params-dtype",
    "tp": "tensor-parallel-size tensor-model-parallel-size tensor-parallel",
    "pp": "pipeline-parallel-size pipeline-model-parallel-size pipeline-parallel",
    "dp": "data-parallel-size data-parallel",
    "max-new-tokens": "max-tokens max-length num-predict n-predict",
    "prompt": "message input text question",
    "raw": "no-template no-chat-template completion",
}


def with_lists(argv: Iterable[str], names: Collection[str]) -> list[str]:
    """The arguments with `--option a,b` and `--option a b` as the parser takes them: `--option ["a", "b"]`.

    Args:
        argv: arguments of a command without positional ones.
        names: of the options that are lists. What is in brackets already stays as it is.
    """
    collected: list[str] = []
    values: list[str] | None = None
    for argument in argv:
        name, equals, value = argument.partition("=")
        if name in names:
            values = [value] if equals else []
            collected += [name, ""]
        elif values is None or argument.startswith("--"):
            values = None
            collected.append(argument)
            continue
        else:
            values.append(argument)
        collected[-1] = _as_list(values)
    return collected


def _as_list(values: list[str]) -> str:
    if len(values) == 1 and values[0].startswith("["):
        return values[0]
    return json.dumps([part.strip() for value in values for part in value.split(",") if part.strip()])


def with_hint(message: str, names: Collection[str]) -> str:
    """The parser's message, with the nearest of `names` for each option, key or command that it does not know.

    Args:
        message: of argparse or jsonargparse.
        names: of what there is, without dashes in front.
    """
    hints = [hint for found in _unknown(message) if (hint := _nearest(found.strip("-").replace("_", "-"), names))]
    if not hints:
        return message
    dashes = "" if "invalid choice" in message else "--"
    return f"{message}; did you mean {' and '.join(dashes + hint for hint in dict.fromkeys(hints))}?"


def _unknown(message: str) -> Iterator[str]:
    if arguments := re.search(r"unrecognized arguments: (.*)", message, re.DOTALL):
        yield from (word.partition("=")[0] for word in arguments[1].split() if re.match(r"--?[A-Za-z]", word))
    if key := re.search(r"does not accept option '([^']+)'|invalid choice: '([^']+)'", message):
        yield key[1] or key[2]


def _nearest(found: str, names: Collection[str]) -> str | None:
    for name, others in _ELSEWHERE.items():
        if name in names and found in (name, *others.split()):
            return name
    longer = [name for name in names if name.startswith(found)]
    if len(longer) == 1:
        return longer[0]
    return next(iter(difflib.get_close_matches(found, names, n=1)), None)
