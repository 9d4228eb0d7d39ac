"""The options of `dora-fx finetune` on a command line, and their values from it."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from dora_fx.app.options.command_line import aliases_of
from dora_fx.app.options.demo import DemoName
from dora_fx.app.options.finetune_options import FinetuneOptions
from dora_fx.app.options.hub_name import absolute_or_on_hub
from dora_fx.app.options.option_groups import (
    AdapterOptions,
    DataOptions,
    ModelOptions,
    RunOptions,
    TrainingOptions,
    default_of,
    flag_of,
)

_GROUPS = (ModelOptions, DataOptions, AdapterOptions, TrainingOptions, RunOptions)
# What `dora-fx explain` has of these options, with its own defaults: those of a run on accelerators.
LAYOUT_OPTIONS: dict[str, Any] = {
    "dtype": "bf16",
    "tp": 1,
    "pp": 1,
    "dp": 1,
    "ep": 1,
    "etp": None,
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
            _add_option(group, option, default_of(option))


def add_options_of_layout(parser: Any) -> None:
    """Add the options that decide what a run costs, with defaults of `dora-fx explain`, to a jsonargparse parser."""
    for option in dataclasses.fields(FinetuneOptions):
        if option.name in LAYOUT_OPTIONS:
            _add_option(parser, option, LAYOUT_OPTIONS[option.name])


def _add_option(group: Any, option: dataclasses.Field[Any], default: Any) -> None:
    option_type, help = typing.get_type_hints(FinetuneOptions)[option.name], _help(option)
    if option_type is bool:
        group.add_argument(flag_of(option.name), action="store_true", help=help)
    elif option.name == "demo":
        group.add_argument("--demo", nargs="?", const="pirate", type=DemoName(), default=default, help=help)
    else:
        group.add_argument(flag_of(option.name), type=option_type, default=default, help=help)


def _help(option: dataclasses.Field[Any]) -> str:
    """The help of an option, with other programs' names of it that are taken."""
    others = ", ".join(f"--{alias}" for alias in aliases_of(option.name.replace("_", "-")))
    return str(option.metadata["help"]).replace("%", "%%") + (f"; also {others}" if others else "")


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


def _options_of_type(name: str) -> frozenset[str]:
    return frozenset(flag_of(option.name) for option in dataclasses.fields(FinetuneOptions) if option.type == name)


LIST_OPTIONS = _options_of_type("list[str]")
# Those with a name and a text in each part.
PAIR_OPTIONS = _options_of_type("dict[str, str]")
