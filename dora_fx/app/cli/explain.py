"""`dora-fx explain`: says what a run costs before it runs, of one layout or of several side by side."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from dora_fx.app.cli.explained_tables import comparison_table, explanation_tables, text_of
from dora_fx.app.errors import UserError
from dora_fx.explanation import (
    RUN_FIELDS,
    Explanation,
    LayerDescription,
    PlannedRun,
    architecture_named,
    captured_layers,
    describe_layer,
    draw,
    explain,
    tree_of,
)
from dora_fx.files import reason_of

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BOOLEANS = {"true": True, "false": False}


def run(parsed: dict[str, Any]) -> int:
    """Print tables or JSON, and whether the layouts fit into the memory; return 0, or 1 if none of them fits.

    Raises:
        UserError: a value is invalid, the base is unknown or cannot be read, or the layout cannot share it.
    """
    memory = None if parsed["memory"] is None else bytes_in(parsed["memory"])
    _check_pictures(parsed)
    values = {name: parsed[name] for name in RUN_FIELDS}
    layouts = [_with_changes(values, text) for text in parsed["compare"]] or [values]
    runs = [_planned(layout) for layout in layouts]
    try:
        architecture = architecture_named(parsed["base"])
        for one in runs:
            one.check_fits(architecture)
        found = [explain(parsed["base"], one) for one in runs]
        layers = _described(parsed["base"], runs[0]) if parsed["picture"] or parsed["tree"] else []
    except (ValueError, TypeError, OSError) as error:
        raise UserError(_in_terms_of_options(str(error))) from error
    if parsed["json"]:
        records = [_record(one, memory) for one in found]
        print(json.dumps(records if parsed["compare"] else records[0], indent=1))
    else:
        _show(found, memory, is_comparison=bool(parsed["compare"]))
    if parsed["tree"]:
        for layer in layers:
            _print(tree_of(layer))
    if parsed["picture"] is not None:
        _draw(layers, parsed["picture"])
    return 0 if memory is None or any(one.fits(memory) for one in found) else 1


def _check_pictures(parsed: Mapping[str, Any]) -> None:
    for option in ("picture", "tree"):
        if parsed[option] and parsed["compare"]:
            raise UserError(f"--{option}: found --compare beside it, expected one layout")
    if parsed["tree"] and parsed["json"]:
        raise UserError("--tree: found --json beside it, expected one of them")
    file = parsed["picture"]
    if file is not None and (file.suffix != ".svg" or not file.absolute().parent.is_dir()):
        raise UserError(f"--picture: found {file}, expected a name of a .svg file in a folder that exists")


def _described(base: str, run: PlannedRun) -> list[LayerDescription]:
    """Describe each kind of layer of the first stage by its graphs, while their process groups are there."""
    return [
        describe_layer(
            layer.before,
            layer.after,
            f"{base}: {layer.name}, {layer.count} of them, tensor-parallel rank 0 of {run.tp}",
            kept=layer.kept,
        )
        for layer in captured_layers(base, run)
    ]


def _draw(layers: list[LayerDescription], file: Path) -> None:
    for number, layer in enumerate(layers):
        target = file if len(layers) == 1 else file.with_stem(f"{file.stem}_{number + 1}")
        try:
            target.write_text(draw(layer), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--picture {target}: {reason_of(error)}") from error
        print(f"\ndrew {target}", file=sys.stderr)


def _print(part: RenderableType) -> None:
    # A file gets the text as wide as it is, and a terminal may fold it.
    Console(highlight=False).print(part) if sys.stdout.isatty() else print(text_of(part))


def _show(found: list[Explanation], memory: int | None, *, is_comparison: bool) -> None:
    for part in [comparison_table(found, memory)] if is_comparison else [explanation_tables(one) for one in found]:
        _print(part)
    if memory is not None and not is_comparison:
        print(f"\n{_verdict(found[0], memory)}")


def _verdict(explanation: Explanation, memory: int) -> str:
    stage = explanation.largest_stage
    difference = memory - stage.peak
    amount = f"{abs(difference) / 2**30:,.2f} GiB"
    where = f"the largest stage, {stage.stage}, takes about {stage.peak / 2**30:,.2f} of {memory / 2**30:,.2f} GiB"
    return f"fits: {where}, {amount} are left" if difference >= 0 else f"does not fit: {where}, {amount} too much"


def _record(explanation: Explanation, memory: int | None) -> dict[str, Any]:
    fits = {} if memory is None else {"memory": memory, "fits": explanation.fits(memory)}
    return {**explanation.as_dict(), **fits}


def bytes_in(text: str) -> int:
    """Return the bytes that a size names, such as 80GiB, 40 GB or 1024; raise UserError for any other text."""
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = None if parts is None else _UNITS.get(parts[2].upper())
    if parts is None or unit is None or not float(parts[1]):
        raise UserError(f"--memory: found {text!r}, expected a size such as 80GiB or 80GB")
    return round(float(parts[1]) * unit)


def _with_changes(values: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Return the values with those of a layout such as tp=4,pp=8 in their place."""
    changed = dict(values)
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        field = name.replace("-", "_")
        if not equals or field not in RUN_FIELDS or isinstance(values[field], (list, tuple)):
            numbers = (
                "tp, pp, dp, ep, etp, sequence-parallel, batch-size, gradient-accumulation, sequence-length, recompute"
            )
            raise UserError(f"--compare: found {part!r} in {text!r}, expected a name and a value, of {numbers}, ...")
        changed[field] = _value_like(values[field], value, part)
    return changed


def _value_like(known: Any, value: str, part: str) -> Any:
    try:
        if isinstance(known, bool):
            return _BOOLEANS[value.lower()]
        return int(value) if known is None or isinstance(known, int) else value
    except (KeyError, ValueError) as error:
        kind = "true or false" if isinstance(known, bool) else "an integer"
        raise UserError(f"--compare: found {part!r}, expected {kind}") from error


def _planned(values: Mapping[str, Any]) -> PlannedRun:
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    try:
        return PlannedRun(**{**values, **lists})
    except ValueError as error:
        raise UserError(_in_terms_of_options(str(error))) from error


def _in_terms_of_options(message: str) -> str:
    """Put the options where a message begins with a field of `PlannedRun`."""
    names = "|".join(field.name for field in dataclasses.fields(PlannedRun))
    return re.sub(rf"^({names}):", lambda found: f"--{found[1].replace('_', '-')}:", message)
