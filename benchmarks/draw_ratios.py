"""Draw the ratios that benchmarks wrote as JSON: one panel per table, a bar per variant, its 95 % interval on it.

A run whose control did not hold is not drawn.

python benchmarks/draw_ratios.py benchmarks/results/layer_*.json --png benchmarks/results/layers.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

# What the keys of the tables mean, in the words of benchmarks/README.md.
WORDS = {
    "base": "frozen base, compiled",
    "base compiled": "frozen base, compiled",
    "LoRA": "LoRA, compiled",
    "LoRA compiled": "LoRA, compiled",
    "control": "LoRA, compiled, again (control)",
    "dora_fx": "dora_fx, compiled",
    "dora_fx eager": "dora_fx, eager",
    "dora_fx, norm every call": "dora_fx, compiled, norms at every call",
    "dora_fx merged": "dora_fx, merged, compiled",
    "LoRA eager": "LoRA, eager",
    "PEFT LoRA eager": "PEFT's LoRA, eager",
    "PEFT DoRA eager": "PEFT's DoRA, eager",
    "Megatron-Bridge eager": "Megatron-Bridge's DoRA, eager",
}
NOTE = (
    "Lower is better. Bars are medians, the lines across their ends 95 % intervals. Control: compiled LoRA, built and\n"
    "measured a second time; its distance from 1 is noise, and a run where that is more than 1 % is not drawn."
)


def title(table_name: str, result: dict[str, Any]) -> str:
    """Say in words what was timed, and of which sizes."""
    rank, tokens, batches = result["dim"], result["tokens"], result["micro_batches"]
    widths = f"hidden size {result['hidden']:,}, inner size {result['ffn']:,}"
    what = f"{result['layers']} transformer layers" if "layers" in result else "A gated MLP"
    if table_name == "evaluation":
        return f"{what}: an evaluation of {tokens:,} tokens\n{widths}, rank {rank}, {result['dtype']}"
    return f"{what}: a training step of {batches} x {tokens:,} tokens\n{widths}, rank {rank}, {result['dtype']}"


def panels(files: list[Path]) -> list[tuple[str, dict[str, dict[str, float]]]]:
    """Title and table of every table in the files."""
    found = []
    for file in files:
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for name, control in result["controls"].items():
            if not control["held"]:
                raise SystemExit(f"{file}: the control of {name!r} did not hold, expected a run on a quiet machine")
        found += [(title(name, result), table) for name, table in result["tables"].items()]
    return found


def draw_panel(axis: Any, table: dict[str, dict[str, float]]) -> None:
    """Draw a bar for each variant, the first of the table above the others, with its ratio on it."""
    names = list(table)[::-1]
    values = [table[name]["ratio"] for name in names]
    highs = [table[name]["ratio_high"] for name in names]
    ranges = [
        [value - table[name]["ratio_low"] for name, value in zip(names, values, strict=True)],
        [high - value for high, value in zip(highs, values, strict=True)],
    ]
    colours = ["tab:orange" if name.startswith("dora_fx") else "silver" for name in names]
    labels = [WORDS[name] for name in names]
    axis.barh(labels, values, xerr=ranges, color=colours, error_kw={"elinewidth": 1, "ecolor": "black"})
    axis.axvline(1.0, color="black", linewidth=0.8)
    for index, value in enumerate(values):
        axis.text(0.01 * max(highs), index, f"{value:.2f}", va="center", fontweight="bold")


def draw(files: list[Path], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tables = panels(files)
    figure, axes = pyplot.subplots(len(tables), 1, figsize=(9, 3.1 * len(tables) + 0.6), squeeze=False)
    for axis, (words, table) in zip(axes[:, 0], tables, strict=True):
        draw_panel(axis, table)
        axis.set_title(words, fontsize=10)
        axis.set_xlabel("time, compiled LoRA = 1; lower is better")
    figure.supxlabel(NOTE, fontsize=8, x=0.02, ha="left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="JSON files of bench_layer.py or bench_model.py")
    parser.add_argument("--png", type=Path, required=True, help="picture to write")
    options = parser.parse_args()
    draw(options.files, options.png)


if __name__ == "__main__":
    main()
