"""Draw the ratios that benchmarks wrote as JSON: one panel per table, a bar per variant, its 95 % interval on it.

A run whose control did not hold is not drawn.

python benchmarks/draw_ratios.py benchmarks/results/layer_*.json --png benchmarks/results/layers.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

TITLE_KEYS = ("layers", "hidden", "ffn", "dim", "tokens", "micro_batches", "dtype")


def panels(files: list[Path]) -> list[tuple[str, dict[str, dict[str, float]]]]:
    """Title and table of every table in the files."""
    found = []
    for file in files:
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for name, control in result["controls"].items():
            if not control["held"]:
                raise SystemExit(f"{file}: the control of {name!r} did not hold, expected a run on a quiet machine")
        sizes = ", ".join(f"{key.replace('_', '-')} {result[key]}" for key in TITLE_KEYS if key in result)
        found += [(f"{name}\n{sizes}", table) for name, table in result["tables"].items()]
    return found


def draw(files: list[Path], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tables = panels(files)
    figure, axes = pyplot.subplots(len(tables), 1, figsize=(8, 2.9 * len(tables)), squeeze=False)
    for axis, (title, table) in zip(axes[:, 0], tables, strict=True):
        names = list(table)[::-1]
        values = [table[name]["ratio"] for name in names]
        ranges = [
            [value - table[name]["ratio_low"] for name, value in zip(names, values, strict=True)],
            [table[name]["ratio_high"] - value for name, value in zip(names, values, strict=True)],
        ]
        colours = ["tab:orange" if name.startswith("dora_fx") else "tab:gray" for name in names]
        axis.barh(names, values, xerr=ranges, color=colours, error_kw={"elinewidth": 1, "ecolor": "black"})
        axis.axvline(1.0, color="black", linewidth=0.8)
        for index, value in enumerate(values):
            axis.text(0.02, index, f"{value:.2f}", va="center", color="white", fontweight="bold")
        axis.set_title(title, fontsize=9)
    axes[-1, 0].set_xlabel("time, compiled LoRA = 1; bars are medians, lines their 95 % intervals")
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
