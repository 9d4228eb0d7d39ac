"""A training run that is planned: its layout, its batches and its adapters, and whether they fit a base's sizes."""

from __future__ import annotations

import typing
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from dora_fx.models import GPTArchitecture

DType = Literal["fp32", "bf16"]
Attention = Literal["flash", "local"]

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class PlannedRun:
    """A run whose costs are asked for; the names are those of `dora-fx finetune`.

    Dropout, which adds a message of a row layer's magnitudes, and ranks by patterns are left out.

    Attributes:
        tp, pp, dp: tensor-, pipeline- and data-parallel sizes; their product is the number of ranks.
        ep: expert-parallel size: the ranks of tp times dp share the experts of a base that has some.
        etp: tensor-parallel size of each expert; None for tp.
        sequence_parallel: shard the sequence between tensor-parallel layers too.
        batch_size: sequences of one forward pass, a micro-batch.
        gradient_accumulation: micro-batches of one optimizer step, over all data-parallel ranks; 0 is dp * pp, the
            fewest that keep every pipeline stage busy.
        sequence_length: tokens of one sequence.
        recompute: compute each layer's activations again in the backward pass, and keep its input alone.
        dtype: of the base weights, the low-rank factors and the activations.
        attention: "flash" keeps no scores, as Transformer Engine's and torch's fused attention; "local" is Megatron's
            own, which keeps them.
        target_modules, exclude_modules, dim: of `DoRA`.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int | None = None
    sequence_parallel: bool = False
    batch_size: int = 1
    gradient_accumulation: int = 0
    sequence_length: int = 4096
    recompute: bool = False
    dtype: DType = "bf16"
    attention: Attention = "flash"
    target_modules: tuple[str, ...] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    exclude_modules: tuple[str, ...] = ()
    dim: int = 16

    def __post_init__(self) -> None:
        """Raise ValueError, naming the option, for a value out of its range or against another one."""
        for name in ("sequence_parallel", "recompute"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected True or False")
        for name in ("target_modules", "exclude_modules"):
            found = getattr(self, name)
            if not isinstance(found, (tuple, list)) or not all(isinstance(target, str) for target in found):
                raise ValueError(f"{name}: found {found!r}, expected a list of names")
        for name in ("tp", "pp", "dp", "ep", "batch_size", "sequence_length", "dim"):
            _check_count(name, getattr(self, name), 1)
        _check_count("etp", self.expert_tensor_parallel, 1)
        if (self.tp * self.dp) % (self.ep * self.expert_tensor_parallel):
            raise ValueError(
                f"ep: found {self.ep} with etp {self.expert_tensor_parallel}, expected a product that divides the "
                f"{self.tp * self.dp} ranks of tp {self.tp} times dp {self.dp}"
            )
        _check_count("gradient_accumulation", self.gradient_accumulation, 0)
        for name, choices in (("dtype", typing.get_args(DType)), ("attention", typing.get_args(Attention))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        if self.gradient_accumulation % self.dp:
            raise ValueError(
                f"gradient_accumulation: found {self.gradient_accumulation}, expected a multiple of dp {self.dp}, "
                "whose ranks share the micro-batches of a step"
            )
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("sequence_parallel: found tp 1, expected a tensor-parallel size above 1 to shard over")
        if self.sequence_parallel and self.sequence_length % self.tp:
            raise ValueError(
                f"sequence_length: found {self.sequence_length}, expected a multiple of tp {self.tp} with "
                "sequence_parallel"
            )

    @property
    def expert_tensor_parallel(self) -> int:
        """Return how many ranks share an expert."""
        return self.tp if self.etp is None else self.etp

    @property
    def num_ranks(self) -> int:
        """Return the number of processes of the run."""
        return self.tp * self.pp * self.dp

    @property
    def micro_batches(self) -> int:
        """Return how many micro-batches each data-parallel rank computes in a step."""
        return self.gradient_accumulation // self.dp or self.pp

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return torch's dtype of the base weights."""
        return DTYPES[self.dtype]

    def in_flight(self, stage: int) -> int:
        """Return for how many micro-batches a stage keeps activations at once, in the schedule of Megatron.

        With one forward pass, one backward pass in turn (1F1B), a stage works ahead of those behind it.
        """
        return min(self.pp - stage, self.micro_batches)

    def check_fits(self, architecture: GPTArchitecture) -> None:
        """Raise ValueError where the ranks cannot share a base equally, naming the option."""
        self._check_experts_fit(architecture)
        if architecture.num_layers % self.pp:
            raise ValueError(f"pp: found {self.pp}, expected a divisor of the {architecture.num_layers} layers")
        shared = {
            "tokens of the vocabulary": architecture.vocab_size,
        }
        if not architecture.num_experts:
            shared["features of the MLP"] = architecture.ffn_hidden_size
        for what, size in shared.items():
            if size % self.tp:
                raise ValueError(f"tp: found {self.tp}, expected a divisor of the {size} {what}")
        if self.dim % self.tp:
            raise ValueError(f"dim: found {self.dim}, expected a multiple of tp {self.tp}, over which A is sharded")
        if self.sequence_length > architecture.max_sequence_length:
            raise ValueError(
                f"sequence_length: found {self.sequence_length}, expected at most the "
                f"{architecture.max_sequence_length} tokens of the base"
            )

    def _check_experts_fit(self, architecture: GPTArchitecture) -> None:
        number, etp = architecture.num_experts, self.expert_tensor_parallel
        if not number:
            for name, size, default in (("ep", self.ep, 1), ("etp", self.etp, None)):
                if size != default:
                    raise ValueError(f"{name}: found {size} for a base without experts, expected it left out")
            return
        if self.tp > 1 and not self.sequence_parallel:
            raise ValueError("sequence_parallel: found False with experts and tp above 1, expected it, as in Megatron")
        for name, size, shared, what in (
            ("ep", self.ep, number, "experts"),
            ("etp", etp, architecture.ffn_hidden_size, "features of an expert"),
        ):
            if shared % size:
                raise ValueError(f"{name}: found {size}, expected a divisor of the {shared} {what}")
        if self.dim % etp:
            raise ValueError(f"dim: found {self.dim}, expected a multiple of etp {etp}, over which A is sharded")


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: found {value!r}, expected an integer from {least}")


RUN_FIELDS = tuple(field.name for field in fields(PlannedRun))
