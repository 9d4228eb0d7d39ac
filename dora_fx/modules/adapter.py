"""The module that holds DoRA's parameters for one linear layer: A, B and m, or this rank's shards of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from dora_fx.function import LAYOUTS, DropoutFactors, Layout, norm_dtype
from dora_fx.modules.adapter_settings import (
    INIT_METHODS,
    check_alpha,
    check_dim,
    check_dropout,
    check_init_method,
    check_use_rslora,
    low_rank_scaling,
)
from dora_fx.modules.grouped_state_dict import grouped_sharded_state_dict
from dora_fx.modules.kinds import GroupedExperts, LocalExperts
from dora_fx.modules.sharded_state_dict import adapter_sharded_state_dict
from dora_fx.ranks import group_rank, group_size

# An entry of Megatron's metadata of state dicts: keys have the numbers of experts, and tensors have no axis for them.
NUMBERED_EXPERTS = "dora_fx_numbered_experts"
# Megatron cuts this text off keys afterwards, so a number that is to stay in them stands behind it.
_LOCAL_EXPERT = re.compile(r"\blocal_experts\.\d+\.")


class Factors(NamedTuple):
    """The tensors of an adapter that are trained, or what stands in for them in a mixed batch."""

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    magnitude: torch.Tensor


class LowRankFactor(nn.Module):
    """One factor of the low-rank product, or this rank's shard of it.

    It computes nothing, and is a module for the sake of its key: `linear_in.weight` is what Megatron-Bridge calls A.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.shape = tuple(weight.shape)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.weight.shape)}, dtype={self.weight.dtype}"


class ParallelLinearDoRAAdapter(nn.Module):
    """DoRA's parameters for one linear layer.

    State-dict keys are `linear_in.weight` (A), `linear_out.weight` (B) and `weight_magnitude` (m). A and B
    have the base weight's dtype. m is float32, or float64 in a float64 model, and stays so under
    `.bfloat16()` and `.half()`: bfloat16 rounds m by more than a training step changes it.

    Shapes of the stored shards, with tp the tensor-parallel size:

        column layouts   A [dim/tp, in]    B [out/tp, dim]    m [out/tp]
        row layouts      A [dim, in/tp]    B [out/tp, dim]    m [out], equal on every rank
        nn.Linear        A [dim, in]       B [out, dim]       m [out]

    For a grouped layer, which holds those of several experts, each has a dimension of this rank's experts in front, and
    m is flat, see `init_weight_magnitude`.

    Scaling and dropout are tensors too, in buffers that are not saved. Compiled code takes tensors as inputs and
    numbers as constants, so layers that differ in alpha or dropout share a graph. The tensors have one dimension, since
    Dynamo makes a symbol of a float64 tensor without dimensions, and compiles twice.

    Args:
        in_features, out_features: sizes of the whole layer.
        dim: rank of the low-rank product, over all tensor-parallel ranks.
        alpha: the product is scaled by alpha / dim, or by alpha / sqrt(dim) with `use_rslora`. May be set later.
        dropout: probability in [0, 1) of dropping an element of the input in training, for the low-rank product and
            the magnitude's part of the base product. May be set later.
        layout_name: of a row of `placement.LAYOUTS`.
        tp_group: name of the tensor-parallel process group; "" for a layer that is not parallel.
        experts: the experts that the layer is of; None for any other layer.
        row_blocks: blocks of output rows that are sharded each on its own (2 for a gated linear_fc1).
        padded_in_features, padded_out_features: how many of the layer's last features are padding, zero in the
            base weight. Their columns of A and rows of B start as zero; as neither side of a padded feature
            carries anything, they get no gradient and stay so.
        column_init_method, row_init_method: initialisation of A and of B, keys of `INIT_METHODS`. The whole
            matrix is drawn in float32 and sharded, so it is the same at every tensor-parallel size.
        seed: seed of that draw; of a grouped layer one for each expert.
        use_rslora: see `low_rank_scaling`.
        dtype, device: of A and B.

    Raises:
        TypeError, ValueError: for an argument of another type or out of its range, or a size that the ranks cannot
            share equally.

    Attributes:
        weight_magnitude: m; None until `init_weight_magnitude` sets it, as it starts as a norm of the base weight.
        scaling_factor: `scaling` as a tensor `[1]`, of the magnitude's dtype.
        dropout_threshold: see `dropout.DropoutFactors`.
        dropout_rescale: see `dropout.DropoutFactors`.
        has_dropout: whether `dropout` is above zero.
        placements: of the parameters on the ranks, by their names.
        matrix_placements: those of one matrix by itself; of a grouped layer `placements` have its experts in front.
    """

    weight_magnitude: nn.Parameter
    scaling_factor: torch.Tensor
    dropout_threshold: torch.Tensor
    dropout_rescale: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        dim: int,
        *,
        alpha: float = 64,
        dropout: float = 0.0,
        layout_name: str = "replicated",
        tp_group: str = "",
        experts: LocalExperts | None = None,
        row_blocks: int = 1,
        padded_in_features: int = 0,
        padded_out_features: int = 0,
        column_init_method: str = "xavier",
        row_init_method: str = "zero",
        seed: int | Sequence[int] = 0,
        use_rslora: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        check_dim("dim", dim)
        check_use_rslora("use_rslora", use_rslora)
        check_init_method("column_init_method", column_init_method)
        check_init_method("row_init_method", row_init_method)
        if layout_name not in LAYOUTS:
            raise ValueError(f"layout_name: found {layout_name!r}, expected one of {sorted(LAYOUTS)}")
        self.in_features, self.out_features = in_features, out_features
        self.dim, self.use_rslora = dim, use_rslora
        self.layout_name, self.tp_group, self.row_blocks = layout_name, tp_group, row_blocks
        self.placements = self.layout.adapter_parameters(
            in_features,
            out_features,
            dim,
            row_blocks=row_blocks,
            padded_in_features=padded_in_features,
            padded_out_features=padded_out_features,
        )
        self.matrix_placements = self.placements
        self.experts = experts
        self.tp_size, self.tp_rank = group_size(tp_group), group_rank(tp_group)
        methods = {"linear_in.weight": column_init_method, "linear_out.weight": row_init_method}
        if isinstance(experts, GroupedExperts):
            assert not isinstance(seed, int)
            of_experts = [self._draw(methods, of_expert) for of_expert in seed]
            lora_a, lora_b = (torch.stack(factors) for factors in zip(*of_experts, strict=True))
            self.placements = {name: each.with_experts(experts.count) for name, each in self.placements.items()}
        else:
            assert isinstance(seed, int)
            lora_a, lora_b = self._draw(methods, seed)
        self.linear_in = LowRankFactor(lora_a.to(dtype=dtype, device=device))
        self.linear_out = LowRankFactor(lora_b.to(dtype=dtype, device=device))
        self.register_parameter("weight_magnitude", None)
        for name in ("scaling_factor", "dropout_threshold", "dropout_rescale"):
            self.register_buffer(name, None, persistent=False)
        self.alpha, self.dropout = alpha, dropout

    def _draw(self, methods: dict[str, str], seed: int) -> list[torch.Tensor]:
        """Draw the whole factors of one matrix, and return this rank's shards of them, in float32.

        Args:
            methods: of initialisation, by the factors' names.
        """
        # One generator for both, so that B does not start with the numbers of A.
        generator, shards = torch.Generator().manual_seed(seed), []
        for name, method in methods.items():
            placement = self.placements[name]
            whole = torch.empty(placement.shape, dtype=torch.float32)
            INIT_METHODS[method](whole, generator=generator)
            shards.append(placement.pad_and_shard(whole, self.tp_rank, self.tp_size))
        return shards

    @property
    def layout(self) -> Layout:
        """Return the layer's row in the layout table."""
        return LAYOUTS[self.layout_name]

    @property
    def alpha(self) -> float:
        """Return the numerator of `scaling`."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        check_alpha("alpha", value)
        self._alpha = value
        self._set_scaling_factor()

    @property
    def dropout(self) -> float:
        """Return the probability of dropping an element of the input in training."""
        return self._dropout

    @dropout.setter
    def dropout(self, value: float) -> None:
        check_dropout("dropout", value)
        self._dropout = value
        self._set_dropout_factors()

    @property
    def scaling(self) -> float:
        """Return the factor of the low-rank product, see `low_rank_scaling`."""
        return low_rank_scaling(self.alpha, self.dim, self.use_rslora)

    def set_factors(self) -> None:
        """Write the buffers of alpha and dropout, on the device of A and in the dtype of norms and magnitudes."""
        self._set_scaling_factor()
        self._set_dropout_factors()

    @torch.inference_mode(False)
    def _set_scaling_factor(self) -> None:
        lora_a = self.linear_in.weight
        self.scaling_factor = torch.tensor([self.scaling], dtype=norm_dtype(lora_a.dtype), device=lora_a.device)

    @torch.inference_mode(False)
    def _set_dropout_factors(self) -> None:
        lora_a = self.linear_in.weight
        factors = DropoutFactors.of(self.dropout, norm_dtype(lora_a.dtype), lora_a.device)
        self.dropout_threshold, self.dropout_rescale = factors
        self.has_dropout = self.dropout > 0

    def init_weight_magnitude(self, value: torch.Tensor) -> None:
        """Set m, `[out]` or this rank's `[out/tp]`, and mark all parameters for Megatron's optimizer.

        That of a grouped layer is given as `[experts, out]`, and is flat as a parameter: Megatron's optimizers spare
        parameters of one dimension weight decay, and so the magnitudes of all other layers.
        """
        self.weight_magnitude = nn.Parameter(value.detach().clone().flatten())
        self._mark_sharded_parameters()

    def get_weight_magnitude(self) -> nn.Parameter:
        """Return m, `[out]` or this rank's `[out/tp]`."""
        return self.weight_magnitude

    def _mark_sharded_parameters(self) -> None:
        """Tell Megatron which parameters are shards, or its gradient norm would count them on rank 0 alone."""
        for name, placement in self.placements.items():
            if placement.shard_dim is not None:
                parameter = self.get_parameter(name)
                parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
                # A grouped layer's m is flat.
                parameter.partition_dim = min(placement.shard_dim, parameter.dim() - 1)  # type: ignore[attr-defined]
                parameter.partition_stride = placement.blocks  # type: ignore[attr-defined]
            if self.experts is not None:
                self._mark_of_expert(self.get_parameter(name), is_shard=placement.shard_dim is not None)

    def _mark_of_expert(self, parameter: nn.Parameter, *, is_shard: bool) -> None:
        """Tell Megatron over which ranks a gradient is reduced, and that every expert's counts once in its norm.

        megatron-core 0.16 counts what is no shard on rank 0 of the dense layers' tensor-parallel group, of which the
        other ranks may hold other experts.
        """
        assert self.experts is not None
        parameter.allreduce = self.experts.allreduce  # type: ignore[attr-defined]
        if not is_shard and self.experts.tp_rank == 0:
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        elif not is_shard:
            # With fewer ranks of dense layers than of experts, other ranks of an expert are rank 0 there too.
            parameter.shared = True  # type: ignore[attr-defined]

    @torch.inference_mode(False)
    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        if self.weight_magnitude is None:
            super()._apply(fn, recurse)
        else:
            self._apply_but_keep_precision(fn, recurse)
        self.set_factors()
        return self

    def _apply_but_keep_precision(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool) -> None:
        """Cast and move all parameters, but leave the magnitude in float32 at least."""
        # A cast replaces the data of the same parameter, so the values before it are kept through a detached alias.
        precise, grad = self.weight_magnitude.detach(), self.weight_magnitude.grad
        # It would replace the data of the gradient too, which may be Megatron's `main_grad`, in a buffer.
        self.weight_magnitude.grad = None
        super()._apply(fn, recurse)
        magnitude = self.weight_magnitude
        wide = norm_dtype(magnitude.dtype)
        if magnitude.dtype != wide:
            magnitude.data = precise.to(device=magnitude.device, dtype=wide)
        if grad is not None:
            is_same = grad.device == magnitude.device and grad.dtype == magnitude.dtype
            magnitude.grad = grad if is_same else grad.detach().to(magnitude)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return A, B and m as shards of global tensors; see `sharded_state_dict.py`."""
        own = self.state_dict(prefix="", keep_vars=True)
        key_prefix = prefix
        if self.experts is not None and (metadata or {}).get(NUMBERED_EXPERTS):
            if isinstance(self.experts, GroupedExperts):
                raise ValueError(
                    f"{prefix}: found a checkpoint of a model in which some experts have no adapter, expected one with "
                    "adapters on all experts, as a grouped layer has"
                )
            # The last axis in front is that of the layer's experts, of which some have no adapter.
            key_prefix = _LOCAL_EXPERT.sub(rf"\g<0>{self.experts.first}.", prefix)
            sharded_offsets = sharded_offsets[:-1]
        shards = self.shards_of(own, key_prefix, sharded_offsets, metadata)
        return {prefix + key.removeprefix(key_prefix): shard for key, shard in shards.items()}

    def shards_of(
        self,
        tensors: dict[str, torch.Tensor],
        prefix: str,
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return tensors that are sharded as the parameters of these names as shards of global tensors."""
        if isinstance(self.experts, GroupedExperts):
            return grouped_sharded_state_dict(
                tensors, self.placements, self.experts, self.tp_size, prefix, sharded_offsets, metadata
            )
        return adapter_sharded_state_dict(tensors, self.placements, self.state_group, prefix, sharded_offsets, metadata)

    @property
    def state_group(self) -> str:
        """Return the name of the group that state dicts count shards over; "" for that of Megatron's dense layers."""
        return self.tp_group if self.experts is None else self.experts.tp_group

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise TypeError("a DoRA adapter holds parameters; DoRALinear.forward computes with them")

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, dim={self.dim}, "
            f"alpha={self.alpha}, use_rslora={self.use_rslora}, dropout={self.dropout}, layout={self.layout_name}"
        )
