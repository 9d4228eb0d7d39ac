"""Do several runs go through the same losses? Draws them in one picture and prints how far they are apart.

python benchmarks/compare_loss_curves.py runs/tp1 runs/tp2 runs/tp4 --png loss_curves.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dora_fx.app.runs.run_folder import RunFolder


def losses_of(run: Path) -> dict[int, float]:
    """Training loss by step."""
    return {row["step"]: row["loss"] for row in RunFolder(run).read_metrics() if "loss" in row}


def draw(curves: dict[str, dict[int, float]], path: Path) -> None:
    """Curves one above the other, and below them each one's distance from the first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 6), height_ratios=(2, 1))
    first = next(iter(curves.values()))
    # The curves are equal to the eye: each is drawn narrower than the one below it, so that none is hidden.
    for width, (name, losses) in zip(range(2 * len(curves), 0, -2), curves.items(), strict=True):
        above.plot(losses.keys(), losses.values(), label=name, linewidth=width, alpha=0.7)
        below.plot(losses.keys(), [abs(losses[step] - first[step]) for step in losses if step in first], label=name)
    above.set_ylabel("training loss (nats per token)")
    above.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(curves))
    below.set_ylabel(f"distance from {next(iter(curves))}")
    below.set_xlabel("optimizer step")
    figure.tight_layout()
    figure.savefig(path, dpi=75)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", type=Path, help="run folders of dora-fx finetune; the first is compared with"
    )
    parser.add_argument("--png", type=Path, help="picture to write")
    arguments = parser.parse_args()
    curves = {run.name: losses_of(run) for run in arguments.runs}
    shared = set.intersection(*(set(losses) for losses in curves.values()))
    if not shared:
        parser.error("the runs have no step in common")
    curves = {name: {step: losses[step] for step in sorted(shared)} for name, losses in curves.items()}
    first = next(iter(curves.values()))
    for name, losses in curves.items():
        apart = max(abs(losses[step] - first[step]) for step in shared)
        print(f"{name}: {len(shared)} steps, at most {apart:.1e} from {next(iter(curves))}")
    if arguments.png is not None:
        draw(curves, arguments.png)


if __name__ == "__main__":
    main()
