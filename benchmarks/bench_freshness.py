"""What does it cost to notice, before every forward pass, that parameters were written behind PyTorch's back?

The look itself is timed, as a share of a forward and backward pass of the gated MLP of `bench_layer.py`: a difference
of two passes would drown in their noise. It is timed between forward passes, which leave a CPU's caches as a model
does.

    python benchmarks/bench_freshness.py
    python benchmarks/bench_freshness.py --hidden 2048 --ffn 5632 --dim 64 --tokens 64
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from bench_layer import DTYPES, TARGETS, make_step
from measuring import interleaved, save_tables
from quiet_world import quiet_world
from variants import gated_mlp, with_dora

from dora_fx import DoRALinear
from dora_fx.cache.parameter_cache import refresh


def measure(options: argparse.Namespace, device: str) -> dict[str, float]:
    """Median milliseconds of a forward and backward pass and of the look before it, and the share of the look."""
    dtype = DTYPES[options.dtype]
    model = with_dora(gated_mlp(options.hidden, options.ffn, dtype, device), options.dim, TARGETS)
    sites = [module.cached_site() for module in model.modules() if isinstance(module, DoRALinear)]
    x = torch.randn(options.tokens, 1, options.hidden, dtype=dtype, device=device, requires_grad=True)
    step = make_step(torch.compile(model, backend="dora_fx"), model, x, micro_batches=1)
    step()
    refresh(sites)
    seconds = interleaved({"step": step, "refresh": lambda: refresh(sites)}, 1, device)
    # The look after a step recomputes the norms; those that follow only look.
    with torch.no_grad():
        between = {"before": lambda: model(x), "look": lambda: refresh(sites), "after": lambda: model(x)}
        looks = interleaved(between, options.rounds, device)["look"]
    steps = interleaved({"step": step}, options.rounds, device)["step"]
    look, whole = statistics.median(looks), statistics.median(steps)
    return {
        "step_ms": 1e3 * whole,
        "look_ms": 1e3 * look,
        "share_percent": 100.0 * look / whole,
        "refresh_ms": 1e3 * seconds["refresh"][0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"hidden": 1024, "ffn": 2816, "dim": 16, "tokens": 1024, "rounds": 15}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with quiet_world(device):
        row = measure(options, device)
    print("  ".join(f"{name} {value:.3f}" for name, value in row.items()))
    if options.json:
        save_tables(
            options.json, {"freshness": {"dora_fx": row}}, **{k: v for k, v in vars(options).items() if k != "json"}
        )


if __name__ == "__main__":
    main()
