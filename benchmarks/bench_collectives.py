"""What does DoRA send between tensor-parallel ranks beyond what the frozen base sends?

Counts the collectives that one linear layer really calls, once per optimizer step and in each forward and backward
pass, on gloo ranks: the frozen base, this library compiled, eager and with gradients that are completed once per step,
and Megatron-Bridge's DoRA where it can be imported. Sizes are those of the larger side of a collective: tokens x
features, tokens x r, and those of weights. The last of the columns of sizes is what an optimizer step over several
micro-batches sends of weights and their gradients.

    python benchmarks/bench_collectives.py --tp 2
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import tempfile
import warnings
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from collective_counts import Count, count_collectives
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import nn
from variants import HAS_BRIDGE, with_bridge_dora

import dora_fx
from dora_fx.megatron.cpu_runtime import cuda_means_cpu
from dora_fx.megatron.world import megatron_world

# layout -> (class of the linear layer, sequence parallelism)
LAYOUTS = {
    "column": (ColumnParallelLinear, False),
    "column + SP": (ColumnParallelLinear, True),
    "row": (RowParallelLinear, False),
    "row + SP": (RowParallelLinear, True),
}
# (direction, kind, size, bytes) -> how many
Named = dict[tuple[str, str, str, int], int]
DIRECTIONS = ("once_per_step", "forward", "backward")
SIZE_CLASSES = ("T*features", "T*r", "weights")
SHORT = {"all_reduce": "AR", "all_gather": "AG", "reduce_scatter": "RS"}


class OneLinear(nn.Module):
    """A model of one linear layer."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)[0]


def make_base(layout: str, options: argparse.Namespace) -> OneLinear:
    """The frozen layer; a column layer goes from hidden to ffn features and a row layer back."""
    linear_class, sequence_parallel = LAYOUTS[layout]
    config = TransformerConfig(
        num_layers=1,
        hidden_size=options.hidden,
        num_attention_heads=options.tp,
        tensor_model_parallel_size=options.tp,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
    )
    settings: dict[str, Any] = dict(config=config, init_method=nn.init.normal_, bias=False, skip_bias_add=True)
    if linear_class is ColumnParallelLinear:
        return OneLinear(ColumnParallelLinear(options.hidden, options.ffn, **settings)).requires_grad_(False)
    return OneLinear(RowParallelLinear(options.ffn, options.hidden, input_is_parallel=True, **settings)).requires_grad_(
        False
    )


def make_input(layout: str, options: argparse.Namespace) -> torch.Tensor:
    """This rank's input: `[s, 1, hidden]` or `[s, 1, ffn/tp]`, with s/tp for a column layer under SP."""
    linear_class, sequence_parallel = LAYOUTS[layout]
    if linear_class is RowParallelLinear:
        return torch.randn(options.tokens, 1, options.ffn // options.tp, requires_grad=True)
    tokens = options.tokens // options.tp if sequence_parallel else options.tokens
    return torch.randn(tokens, 1, options.hidden, requires_grad=True)


def adapted(base: nn.Module, options: argparse.Namespace, dropout: float, **settings: Any) -> nn.Module:
    return dora_fx.DoRA(["linear"], dim=options.dim, alpha=2 * options.dim, dropout=dropout, **settings)(base)


def compiled(base: nn.Module, options: argparse.Namespace, dropout: float, **settings: Any) -> nn.Module:
    torch._dynamo.reset()
    model = adapted(base, options, dropout, **settings)
    if settings:
        # Gradients are completed where Megatron's data parallelism reduces them, here over one replica.
        model = DistributedDataParallel(base.linear.config, DistributedDataParallelConfig(), model)
    inner = {"inner_compiler": options.inner_compiler}
    return torch.compile(model, backend="dora_fx", options=inner, fullgraph=True)


def completed_once(base: nn.Module, options: argparse.Namespace, dropout: float) -> nn.Module:
    return compiled(base, options, dropout, complete_gradients="once_per_step")


def finish(module: Any) -> None:
    """Do what follows a step's last backward pass."""
    model = getattr(module, "_orig_mod", module)
    if isinstance(model, DistributedDataParallel):
        with cuda_means_cpu():
            model.finish_grad_sync()


def bridge(base: nn.Module, options: argparse.Namespace, dropout: float) -> nn.Module:
    return with_bridge_dora(base, options.dim, ["linear"], dropout)


def variants() -> dict[str, Callable[..., nn.Module]]:
    """Name -> what makes the variant of a base layer."""
    found: dict[str, Callable[..., nn.Module]] = {
        "base": lambda base, options, dropout: base,
        "dora_fx": compiled,
        "dora_fx eager": adapted,
        "dora_fx, once": completed_once,
    }
    if HAS_BRIDGE:
        found["Megatron-Bridge"] = bridge
    return found


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per layout, dropout, variant, direction and collective, counted on this rank."""
    rows = []
    for layout in LAYOUTS:
        for dropout in (0.0, 0.1):
            for variant, make in variants().items():
                torch.manual_seed(0)
                module = make(make_base(layout, options), options, dropout)
                counts = count_collectives(module, make_input(layout, options), partial(finish, module))
                about = {"layout": layout, "dropout": dropout, "variant": variant}
                for direction in DIRECTIONS:
                    rows += describe(getattr(counts, direction), layout, options, about | {"direction": direction})
    return rows


def describe(count: Count, layout: str, options: argparse.Namespace, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of one direction; a size that is no tensor of the layer's is shown as bytes."""
    by_size = {size * torch.float32.itemsize: name for name, size in sizes(layout, options).items()}
    rows = []
    for (kind, num_bytes), times in sorted(count.items()):
        size = by_size.get(num_bytes, f"{num_bytes} bytes")
        rows.append({**about, "kind": kind, "size": size, "bytes": num_bytes, "count": times})
    return rows


def sizes(layout: str, options: argparse.Namespace) -> dict[str, int]:
    """Name -> elements of the tensors that may travel; T is the number of tokens, r the dim."""
    tokens, dim = options.tokens, options.dim
    wide = LAYOUTS[layout][0] is ColumnParallelLinear
    features_in, features_out = (options.hidden, options.ffn) if wide else (options.ffn, options.hidden)
    return {
        "T*in": tokens * features_in,
        "T*out": tokens * features_out,
        "T*r": tokens * dim,
        "r*in": dim * features_in,
        "out*r": features_out * dim,
        "out": features_out,
        "out+r*r": features_out + dim * dim,
    }


def run_rank(rank: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # Megatron-Bridge sets the root logger to INFO.
    logging.disable(logging.WARNING)
    store = dist.FileStore(f"{folder}/store", options.tp)
    with megatron_world(
        store=store, global_rank=rank, world_size=options.tp, tensor_model_parallel_size=options.tp, seed=0
    ):
        rows = measure(options)
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))


def print_table(rows: list[dict[str, Any]], micro_batches: int) -> None:
    """A line per layout, dropout and variant; a variant's line shows what it adds to the base's."""
    keys = list(dict.fromkeys((row["layout"], row["dropout"], row["variant"]) for row in rows))
    sizes = f"{'T x features':>16} {'T x r':>16} {'weight-sized':>16}"
    per_step = f"{micro_batches} micro-batches"
    print(f"{'layout':12} {'dropout':8} {'':17} {sizes} {per_step:>16}  once per step | forward | backward")
    for layout, dropout, variant in keys:
        mine = [row for row in rows if (row["layout"], row["dropout"]) == (layout, dropout)]
        own = added(mine, variant) if variant != "base" else counted(mine, variant)
        totals = " ".join(f"{total(own, size_class):>16}" for size_class in SIZE_CLASSES)
        texts = [
            ", ".join(
                f"{'' if times == 1 else f'{times} x '}{SHORT.get(kind, kind)} {size}"
                for (way, kind, size, _), times in own.items()
                if way == direction
            )
            for direction in DIRECTIONS
        ]
        name = variant if variant == "base" else f"+ {variant}"
        shown = " | ".join(text or "-" for text in texts)
        of_step = f"{weight_bytes_of_step(own, micro_batches) / 1024:.0f} KiB"
        print(f"{layout:12} {dropout:<8} {name:17} {totals} {of_step:>16}  {shown}")


def size_class_of(size: str) -> str:
    """What the size of a collective grows with: tokens x features, tokens x r, or weights."""
    if size == "T*r":
        return size
    return "T*features" if size.startswith("T") else "weights"


def total(collectives: Named, size_class: str) -> str:
    """How many collectives and KiB are of one class of sizes."""
    chosen = [(times, each) for (_, _, size, each), times in collectives.items() if size_class_of(size) == size_class]
    num_bytes = sum(times * each for times, each in chosen)
    return f"{sum(times for times, _ in chosen)}: {num_bytes / 1024:.0f} KiB"


def weight_bytes_of_step(collectives: Named, micro_batches: int) -> int:
    """Bytes of the weight-sized collectives of one optimizer step."""
    return sum(
        times * each * (1 if way == "once_per_step" else micro_batches)
        for (way, _, size, each), times in collectives.items()
        if size_class_of(size) == "weights"
    )


def counted(rows: list[dict[str, Any]], variant: str) -> Named:
    return {
        (row["direction"], row["kind"], row["size"], row["bytes"]): row["count"]
        for row in rows
        if row["variant"] == variant
    }


def added(rows: list[dict[str, Any]], variant: str) -> Named:
    """What a variant calls beyond the base. Raises AssertionError if it lacks one of the base's collectives."""
    base, own = counted(rows, "base"), counted(rows, variant)
    assert all(own.get(key, 0) >= times for key, times in base.items()), f"{variant} leaves out some of {base}: {own}"
    return {key: times - base.get(key, 0) for key, times in own.items() if times > base.get(key, 0)}


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exit with an error for sizes that the ranks cannot share or that do not tell tensors apart."""
    for name in ("hidden", "ffn", "dim", "tokens"):
        if getattr(options, name) % options.tp:
            parser.error(f"--{name}: found {getattr(options, name)}, expected a multiple of --tp {options.tp}")
    for layout in LAYOUTS:
        found = sizes(layout, options)
        if len(set(found.values())) < len(found):
            parser.error(f"two tensors of a {layout} layer have the same size, choose other sizes: {found}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tp", 2), ("hidden", 1024), ("ffn", 2816), ("dim", 16), ("tokens", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--micro-batches", type=int, default=8, help="of an optimizer step, in the last column")
    parser.add_argument("--inner-compiler", choices=("inductor", "aot_eager"), default="inductor")
    parser.add_argument("--json", type=Path, help="write every count here")
    options = parser.parse_args()
    check(parser, options)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (options, folder), nprocs=options.tp)
        rows = json.loads(Path(folder, "rows.json").read_text())
    print_table(rows, options.micro_batches)
    if options.json:
        about = {"date": str(date.today()), "torch": torch.__version__, "machine": platform.machine()}
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        options.json.write_text(json.dumps({**about, **settings, "collectives": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
