"""What people write on a command line besides what the parser takes: lists with commas, other programs' options."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Iterator

from dora_fx.app.errors import UserError

# Options of transformers, PEFT, TRL, Axolotl, LLaMA-Factory and Megatron-LM that mean what ours mean, value by value:
# they are taken in their place.
_ALIASES = {
    "lr": "learning-rate",
    "adam-eps": "adam-epsilon",
    "dim": "lora-r lora-rank lora-dim",
    "alpha": "lora-alpha",
    "dropout": "lora-dropout",
    "target-modules": "lora-target-modules",
    "base": "model-name-or-path base-model",
    "data": "train-file",
    "run": "output-dir",
    "steps": "max-steps train-iters",
    "epochs": "num-train-epochs num-epochs",
    "batch-size": "per-device-train-batch-size micro-batch-size",
    "sequence-length": "seq-length sequence-len",
    "schedule": "lr-decay-style",
    "max-grad-norm": "clip-grad",
    "eval-every": "eval-steps eval-interval",
    "patience": "early-stopping-patience",
    "save-every": "save-steps save-interval",
    "recompute": "gradient-checkpointing",
    "tp": "tensor-model-parallel-size tensor-parallel-size",
    "pp": "pipeline-model-parallel-size pipeline-parallel-size",
    "dp": "data-parallel-size",
    "ep": "expert-model-parallel-size expert-parallel-size",
    "etp": "expert-tensor-parallel-size",
}
# Others, which are answered with ours and not taken. They may mean something else (accumulation is counted on each rank
# elsewhere, and here over all of them; samples longer than a max-length are cut elsewhere, and left out here;
# schedulers of transformers warm up from zero, and the constant one not at all; checkpoints are no run folders), have
# other values (a name of a data set, torch's names of dtypes), or nobody's meaning in particular. Several of ours may
# have one in common, and the first that the command has is meant.
_ELSEWHERE = {
    "lr": "peak-lr max-lr",
    "dim": "r rank adapter-dim",
    "target-modules": "target targets lora-target modules layers",
    "base": "model model-name pretrained pretrained-checkpoint model-path base-revision model-revision revision",
    "data": "dataset train-data data-path data-file text file input data-revision dataset-revision split data-split",
    "columns": "column-names text-column prompt-column dataset-text-field",
    "run": "output out save-dir run-dir name",
    "to": "output output-dir out target",
    "steps": "num-steps iters iterations training-steps",
    "epochs": "train-epochs",
    "batch-size": "mbs bs train-batch-size",
    "gradient-accumulation": "gradient-accumulation-steps grad-accum accumulate-grad-batches",
    "sequence-length": "seq-len max-seq-length max-length cutoff-len context-length block-size",
    "schedule": "lr-scheduler lr-scheduler-type scheduler",
    "warmup-steps": "warmup warmup-ratio warmup-fraction lr-warmup-fraction lr-warmup-iters lr-warmup-steps",
    "log": "report-to logging",
    "max-grad-norm": "gradient-clipping grad-clip",
    "adam-beta1": "beta1 betas",
    "adam-beta2": "beta2",
    "adam-eps": "eps epsilon",
    "eval-every": "evaluation-interval",
    "resume": "resume-from-checkpoint load resume-from",
    "dtype": "bf16 fp16 precision torch-dtype params-dtype",
    "tp": "tensor-parallel",
    "pp": "pipeline-parallel",
    "dp": "data-parallel",
    "ep": "expert-parallel expert-model-parallel",
    "etp": "expert-tensor-parallel",
    "recompute": "recompute-activations recompute-granularity",
    "max-new-tokens": "max-tokens max-length num-predict n-predict",
    "prompt": "message input text question",
    "raw": "no-template no-chat-template completion",
}
# Options of other programs that quantise the base.
_QUANTISED = "load-in load-in-4bit load-in-8bit qlora quantize quantization quant-method bits"


def aliases_of(name: str) -> list[str]:
    """Other programs' names of an option of `finetune`; names are without dashes in front."""
    return _ALIASES.get(name, "").split()


def with_own_names(argv: Iterable[str], names: Collection[str]) -> list[str]:
    """The arguments with other programs' names of options replaced by ours, and underscores in them by dashes.

    Args:
        argv: arguments of a command without positional ones.
        names: of its options, without dashes in front.

    Raises:
        UserError: one option is given under two names.
    """
    own = {alias: name for name in names for alias in (name, *aliases_of(name))}
    replaced: list[str] = []
    given: dict[str, str] = {}
    for argument in argv:
        written, equals, value = argument.partition("=")
        name = own.get(written.removeprefix("--").replace("_", "-")) if written.startswith("--") else None
        if name is None:
            replaced.append(argument)
            continue
        if given.setdefault(name, written) != written:
            raise UserError(f"{written}: found {given[name]} beside it, the same option, expected one of them")
        replaced.append(f"--{name}{equals}{value}")
    return replaced


def with_lists(argv: Iterable[str], names: Collection[str], pair_names: Collection[str] = ()) -> list[str]:
    """The arguments with `--option a,b` and `--option a b` as the parser takes them: `--option ["a", "b"]`.

    Args:
        argv: arguments of a command without positional ones.
        names: of the options that are lists. What is in brackets already stays as it is.
        pair_names: of the options whose parts are `name=text`, which become `--option {"name": "text"}`.

    Raises:
        UserError: an option stands twice, of which the parser would take the last; a part has no `=`, or two have the
            same name.
    """
    collected: list[str] = []
    option, values = "", list[str]()
    for argument in argv:
        name, equals, value = argument.partition("=")
        if name in names or name in pair_names:
            if name in collected:
                raise UserError(f"{name}: found it twice, expected all of its parts behind one {name}")
            option, values = name, [value] if equals else []
            collected += [name, ""]
        elif not option or argument.startswith("--"):
            option = ""
            collected.append(argument)
            continue
        else:
            values.append(argument)
        collected[-1] = _as_list(values) if option in names else _as_pairs(option, values)
    return collected


def _as_list(values: list[str]) -> str:
    if len(values) == 1 and values[0].startswith("["):
        return values[0]
    return json.dumps(_parts(values))


def _as_pairs(option: str, values: list[str]) -> str:
    if len(values) == 1 and values[0].startswith("{"):
        return values[0]
    pairs: dict[str, str] = {}
    for part in _parts(values):
        name, equals, text = (each.strip() for each in part.partition("="))
        if not equals:
            raise UserError(f"{option}: found {part!r}, expected a name on each side of =, such as prompt=question")
        if name in pairs:
            raise UserError(f"{option}: found {name}={pairs[name]} and {name}={text}, expected one of them")
        pairs[name] = text
    # The parser refuses nothing.
    return json.dumps(pairs) if pairs else ""


def _parts(values: list[str]) -> list[str]:
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def with_hint(message: str, names: Collection[str]) -> str:
    """The parser's message, with the nearest of `names` for each option, key or command that it does not know.

    Args:
        message: of argparse or jsonargparse.
        names: of what there is, without dashes in front.
    """
    # Nothing but a training has this one.
    trains = "gradient-accumulation" in names
    if trains and any(found.strip("-").replace("_", "-") in _QUANTISED.split() for found in _unknown(message)):
        return (
            f"{message}; Megatron's layers hold no quantised weights: train on a quantised base with transformers' "
            "Trainer, as docs/quantised.md and examples/quantised_trainer.py show"
        )
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
    for name, others in (*_ALIASES.items(), *_ELSEWHERE.items()):
        if name in names and found in (name, *others.split()):
            return name
    longer = [name for name in names if name.startswith(found)]
    if len(longer) == 1:
        return longer[0]
    return next(iter(difflib.get_close_matches(found, names, n=1)), None)
