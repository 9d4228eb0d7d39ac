"""Sizes of the steps of `on_gpu.py`, without torch, which only the steps themselves import."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Sizes of everything, those of Qwen3-8B by default, and on which device.

    Attributes:
        device: "cuda" or "cpu".
        warm_up: compile what the step compiles, and measure nothing.
        tokens: of few, many and very many.
        norms: `OUTxINxDIM`.
        kinds: of the layers that are compiled; None for all.
    """

    device: str
    warm_up: bool = False
    hidden: int = 4096
    ffn: int = 12288
    heads: int = 32
    groups: int = 8
    dim: int = 16
    tokens: tuple[int, int, int] = (512, 4096, 8192)
    micro_batches: int = 8
    rounds: int = 10
    max_rounds: int = 30
    norms: tuple[str, ...] = ("4096x4096x16", "4096x4096x384")
    kinds: tuple[str, ...] | None = None

    @classmethod
    def quick(cls, device: str) -> Settings:
        """Tiny sizes, to see that everything runs."""
        tiny = {"hidden": 32, "ffn": 48, "heads": 4, "groups": 2, "dim": 4, "micro_batches": 2, "rounds": 2}
        # One length for all steps, so that each graph is compiled once, and one layer per shape of the base's call.
        tokens, kinds = (16, 16, 16), ("column_bias_returned", "row_bias_added", "linear_bias", "output_layer")
        return cls(device, **tiny, tokens=tokens, max_rounds=2, norms=("64x48x4", "64x48x24"), kinds=kinds)

    def options(self, tokens: int) -> argparse.Namespace:
        """The options that other benchmarks take."""
        rounds = {"rounds": 1, "max_rounds": 1} if self.warm_up else {}
        more: dict[str, Any] = {"dtype": "bf16", "recompute": False, "tokens": tokens}
        return argparse.Namespace(**(asdict(self) | more | rounds))
