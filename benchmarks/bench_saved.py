"""What does a transformer layer keep for its backward pass, tensor by tensor?

One layer of Llama-3-70B's shape on one tensor-parallel rank, with sequence parallelism, as the frozen base, with LoRA
and with DoRA, as `dora_fx.explain` counts it: nothing runs, and there are no other ranks. The layer's input, which each
variant keeps, is left out. A tensor that is kept in part, as a view, counts whole.

    python benchmarks/bench_saved.py --tp 8 --tokens 8192
"""

from __future__ import annotations

import argparse

import dora_fx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tp", 8), ("tokens", 8192), ("dim", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    layout = {"tp": options.tp, "sequence_parallel": True, "sequence_length": options.tokens, "dim": options.dim}
    layer = dora_fx.explain("llama3-70b", **layout).kinds[0]
    for variant, costs in layer.variants.items():
        saved = [tensor for tensor in costs.saved if tensor.site]
        print(f"{variant}: {sum(tensor.num_bytes for tensor in saved) / 2**20:.2f} MiB, {costs.flops / 1e12:.4f} TFLOP")
        for tensor in saved:
            print(f"  {tensor.num_bytes / 2**20:8.2f}  {tensor.name:42} {list(tensor.shape)!s:20} {tensor.site}")


if __name__ == "__main__":
    main()
