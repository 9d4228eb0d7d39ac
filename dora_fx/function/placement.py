"""The one table of tensor-parallel layouts: which rank holds what.

Everything that has to know how a DoRA site is sharded reads `LAYOUTS`: the eager function, the graph
rewrite, parameter attributes, initialisation, norms and state dicts. Dimensions are those of the stored
tensors: weight `[out, in]`, lora_a `[dim, in]`, lora_b `[out, dim]`, weight_magnitude `[out]`. `None`
means that every tensor-parallel rank holds the whole tensor.

The low-rank product is added to the base product before the base layer's own output collective, so the only
collectives of tokens x features are `enter` and `leave`, and the frozen base has both without an adapter (eager code
that calls the base gathers what dropout leaves of the tokens once more). Where the tokens are gathered, the product
with A is made first and gathered for itself, `[tokens, dim]`: the gathered input would have to be kept for A's
gradient, and nothing else needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

# An adapter's A, B and magnitude by their names in its state dict.
ADAPTER_TENSORS = ("linear_in.weight", "linear_out.weight", "weight_magnitude")

Enter = Literal["none", "copy", "gather_sequence", "split_features"]
Leave = Literal["none", "partial", "all_reduce", "reduce_scatter_sequence", "gather_features"]


@dataclass(frozen=True)
class Layout:
    """The distribution of one kind of linear layer over its tensor-parallel group.

    Attributes:
        name: key in `LAYOUTS`; the graph marker carries it as a constant.
        enter: what happens to the layer's input before the products. "copy" is the identity whose
            gradient is all-reduced.
        leave: what happens to the sum of the products. "partial" leaves it a partial sum, which other code adds up.
        weight_shard_dim: the sharded dimension of the stored weight; None if it is whole.
        lora_a_shard_dim: the sharded dimension of the stored A; None if it is whole.
        lora_b_shard_dim: the sharded dimension of the stored B; None if it is whole.
        magnitude_shard_dim: the sharded dimension of the stored magnitude; None if it is whole.
        adds_bias_in_product: the layer adds its bias inside the product, as nn.Linear does and Megatron's do not.
        shards_tokens: every rank holds the whole layer and runs it on tokens of its own, so each has only a part of
            all gradients.
    """

    name: str
    enter: Enter
    leave: Leave
    weight_shard_dim: int | None
    lora_a_shard_dim: int | None
    lora_b_shard_dim: int | None
    magnitude_shard_dim: int | None
    adds_bias_in_product: bool = False
    shards_tokens: bool = False

    @property
    def shards_input_features(self) -> bool:
        """Each rank multiplies its own slice of the input features, so products are partial sums."""
        return self.weight_shard_dim == 1

    @property
    def gathers_tokens(self) -> bool:
        """Each rank's input has tokens of its own, and its rows of the weight are multiplied by those of all ranks."""
        return self.enter == "gather_sequence"

    @property
    def shards_input_tokens(self) -> bool:
        """Each rank's input has tokens of its own."""
        return self.shards_tokens or self.gathers_tokens

    @property
    def shards_output_tokens(self) -> bool:
        """Each rank's output has tokens of its own."""
        return self.shards_tokens or self.leave == "reduce_scatter_sequence"

    @property
    def gathers_lora_a(self) -> bool:
        """lora_a is stored in row blocks and needed whole: gathered, its gradient reduce-scattered."""
        return self.lora_a_shard_dim == 0

    @property
    def gathers_lora_b(self) -> bool:
        """lora_b is stored in row blocks and needed whole, because the layer's output rows are."""
        return self.lora_b_shard_dim == 0 and self.magnitude_shard_dim is None

    def magnitude_grad_is_partial(self, dropout: bool) -> bool:
        """Return whether each rank sees only a part of the magnitude's gradient.

        A replicated magnitude is scaled after the reduction and sees all of it, unless the output is sequence-sharded
        or stays a partial sum, or dropout moves the scale in front of the reduction.
        """
        return self.shards_tokens or (
            self.magnitude_shard_dim is None
            and (self.leave in ("reduce_scatter_sequence", "partial") or (dropout and self.leave == "all_reduce"))
        )

    def adapter_parameters(
        self,
        in_features: int,
        out_features: int,
        dim: int,
        *,
        row_blocks: int = 1,
        padded_in_features: int = 0,
        padded_out_features: int = 0,
    ) -> dict[str, ParameterPlacement]:
        """Return the placements of an adapter's parameters, by their names in its state dict.

        Args:
            in_features, out_features: of the whole layer, padding included.
            dim: rank of the low-rank product.
            row_blocks: blocks of output rows that are sharded each on its own.
            padded_in_features, padded_out_features: how many of the last features are padding.
        """
        columns, rows = in_features - padded_in_features, out_features - padded_out_features
        return {
            "linear_in.weight": ParameterPlacement(self.lora_a_shard_dim, 1, (dim, columns), (dim, in_features)),
            "linear_out.weight": ParameterPlacement(
                self.lora_b_shard_dim, row_blocks, (rows, dim), (out_features, dim)
            ),
            "weight_magnitude": ParameterPlacement(self.magnitude_shard_dim, row_blocks, (rows,), (out_features,)),
        }


@dataclass(frozen=True)
class ParameterPlacement:
    """The placement of one parameter of an adapter on the ranks of its tensor-parallel group.

    Attributes:
        shard_dim: the sharded dimension, or None where every rank holds the whole tensor.
        blocks: how many equal blocks that dimension is made of, each sharded on its own; 2 for the output rows of a
            gated linear_fc1, whose ranks hold `[gate_i; up_i]`.
        shape: of the whole tensor.
        padded_shape: of the whole tensor with what pads the base layer, at the end of each dimension. The ranks
            hold equal parts of it.
    """

    shard_dim: int | None
    blocks: int
    shape: tuple[int, ...]
    padded_shape: tuple[int, ...]

    def with_experts(self, count: int) -> ParameterPlacement:
        """Return the placement of the tensors of several experts, stacked along a new first dimension."""
        dim = None if self.shard_dim is None else self.shard_dim + 1
        return ParameterPlacement(dim, self.blocks, (count, *self.shape), (count, *self.padded_shape))

    def pad_and_shard(self, whole: torch.Tensor, tp_rank: int, tp_size: int) -> torch.Tensor:
        """Return one rank's part of a tensor of `shape`, with zeros for the padding."""
        padding = [
            amount
            for size, padded_size in zip(reversed(self.shape), reversed(self.padded_shape), strict=True)
            for amount in (0, padded_size - size)
        ]
        return shard(F.pad(whole, padding), self.shard_dim, tp_rank, tp_size, self.blocks)

    def unshard_and_cut(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the tensor of `shape` from the parts of ranks 0, 1, ...; one part where `shard_dim` is None."""
        whole = parts[0] if self.shard_dim is None else unshard(parts, self.shard_dim, self.blocks)
        return whole[tuple(slice(size) for size in self.shape)].clone()


def _column(name: str, enter: Enter, leave: Leave = "none") -> Layout:
    return Layout(name, enter, leave, weight_shard_dim=0, lora_a_shard_dim=0, lora_b_shard_dim=0, magnitude_shard_dim=0)


def _row(name: str, leave: Leave, enter: Enter = "none") -> Layout:
    return Layout(
        name, enter, leave, weight_shard_dim=1, lora_a_shard_dim=1, lora_b_shard_dim=0, magnitude_shard_dim=None
    )


def _replicated_over_tokens(name: str) -> Layout:
    return Layout(name, "none", "none", None, None, None, None, adds_bias_in_product=True, shards_tokens=True)


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("replicated", "none", "none", None, None, None, None, adds_bias_in_product=True),
        _replicated_over_tokens("replicated_sequence_parallel"),
        _column("column", enter="copy"),
        _column("column_sequence_parallel", enter="gather_sequence"),
        _column("column_gather_output", enter="copy", leave="gather_features"),
        _column("column_sequence_parallel_gather_output", enter="gather_sequence", leave="gather_features"),
        _row("row", leave="all_reduce"),
        _row("row_sequence_parallel", leave="reduce_scatter_sequence"),
        _row("row_split_input", leave="all_reduce", enter="split_features"),
        # Of experts, where the dispatcher of their tokens gathers inputs and sums outputs: a scale of the rows is the
        # same before that sum as after it.
        _column("column_expert", enter="none"),
        _row("row_expert", leave="partial"),
    )
}


def shard(tensor: torch.Tensor, dim: int | None, tp_rank: int, tp_size: int, blocks: int = 1) -> torch.Tensor:
    """Return one rank's part of a whole tensor, as a copy.

    Args:
        tensor: the whole tensor, equal on every rank.
        dim: the sharded dimension, or None for a replicated tensor.
        blocks: how many equal blocks `dim` is made of, each sharded on its own; 2 for a gated
            linear_fc1, whose ranks hold `[gate_i; up_i]`.

    Raises:
        ValueError: the sharded dimension cannot be cut into equal parts, one of each block for each rank.
    """
    if dim is not None and tensor.shape[dim] % (blocks * tp_size):
        raise ValueError(
            f"shard: found a tensor of shape {tuple(tensor.shape)}, expected a multiple of {blocks * tp_size} in "
            f"dimension {dim}: {blocks} blocks, each in equal parts on {tp_size} ranks"
        )
    if dim is None or tp_size == 1:
        return tensor.clone()
    return torch.cat([block.chunk(tp_size, dim)[tp_rank] for block in tensor.chunk(blocks, dim)], dim)


def unshard(parts: Sequence[torch.Tensor], dim: int, blocks: int = 1) -> torch.Tensor:
    """Return the whole tensor of which `shard` made the parts of ranks 0, 1, ..."""
    pieces = [part.chunk(blocks, dim) for part in parts]
    return torch.cat([piece[block] for block in range(blocks) for piece in pieces], dim)
