"""Megatron's layers over Transformer Engine, recognised by class names, since the package need not be installed.

While its adapter is on, such a layer is never called: norm, collectives and products are computed in plain ops from the
layer's parameters, so that they are in the same graph as DoRA and share its collective. With the adapter off the layer
runs its own kernels. Both compute the same for weights in the dtype of the activations. A layer that computes in FP8 or
FP4 is refused, since plain ops would compute it in another precision without an error.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from dora_fx.function import LAYOUTS, InputNorm
from dora_fx.megatron import TE_MODULE, derives_from
from dora_fx.modules.kinds.linear_kind import LinearKind, LinearSpec, LocalExperts, has_own_hooks
from dora_fx.modules.kinds.megatron_linear import row_blocks

logger = logging.getLogger(__name__)


class _TELinear(LinearKind):
    class_module = TE_MODULE
    # `parallel_mode` of the layers that this kind is of.
    parallel_mode: str | None

    @classmethod
    def describe(cls, path: str, linear: Any) -> LinearSpec:
        # The layer has no attribute that tells an expert's, so its path does.
        is_expert = "experts" in path.split(".")
        _check_precision(path, linear)
        _check_parallelism(path, linear, cls.parallel_mode, is_expert=is_expert)
        if (problem := cls.call_problem_maybe(linear)) is not None:
            raise ValueError(f"{path}: {problem}")
        _warn_of_other_transport(linear)
        layout = LAYOUTS[cls.layout_name(linear)]
        group: dist.ProcessGroup = linear._tp_group
        out_parts, in_parts = (group.size() if layout.weight_shard_dim == dim else 1 for dim in (0, 1))
        return LinearSpec(
            kind=cls,
            layout=layout,
            # Transformer Engine's own numbers are those of the shard.
            in_features=linear.in_features * in_parts,
            out_features=linear.out_features * out_parts,
            padded_in_features=getattr(linear, "padded_in_features", 0),
            padded_out_features=getattr(linear, "padded_out_features", 0),
            row_blocks=row_blocks(path, linear),
            tp_group=group,
            weight=cls.stored_weight(linear),
            bias=_bias(linear),
            input_norm=cls.input_norm(linear),
            experts=LocalExperts.of(path, linear, group) if is_expert else None,
        )

    @staticmethod
    def added_bias(linear: Any) -> torch.Tensor | None:
        return None if linear.te_return_bias else _bias(linear)

    @staticmethod
    def returned_beside_output(linear: Any) -> tuple[torch.Tensor | None, ...]:
        return (_bias(linear) if linear.te_return_bias else None,)

    @classmethod
    def calls_base(cls, linear: Any) -> bool:
        return False

    @staticmethod
    def call_problem_maybe(linear: Any) -> str | None:
        name, weight = type(linear).__name__, linear.weight
        if "forward" in vars(linear) or has_own_hooks(linear):
            return (
                f"found a {name} with hooks or a forward of its own, expected none: while its adapter is on it is not "
                "called. Register hooks on the adapted layer"
            )
        if torch.is_autocast_enabled(weight.device.type):
            return f"found torch.autocast around a {name}, expected none: it computes in its weight's {weight.dtype}"
        if _fp8_is_enabled():
            return (
                f"found Transformer Engine's FP8 autocast around a {name}, expected none: its weight is {weight.dtype}"
            )
        return None

    @staticmethod
    def trial_problem_maybe(linear: Any) -> str | None:
        if getattr(linear.config, "tp_comm_overlap", False):
            return "tp_comm_overlap has communication buffers of one size of batches"
        return None


class TEColumnParallel(_TELinear):
    """Output rows are sharded."""

    class_name = "TEColumnParallelLinear"
    parallel_mode = "column"

    @staticmethod
    def layout_name(linear: Any) -> str:
        if linear.parallel_mode is None:
            return "column_expert"
        return "column_sequence_parallel" if linear.sequence_parallel else "column"


class TELayerNormColumnParallel(TEColumnParallel):
    """A norm of the input, then a layer whose output rows are sharded."""

    class_name = "TELayerNormColumnParallelLinear"

    @staticmethod
    def input_norm(linear: Any) -> InputNorm:
        return InputNorm(
            weight=linear.layer_norm_weight,
            # There for LayerNorm only.
            bias=linear.layer_norm_bias,
            name=linear.normalization,
            eps=linear.eps,
            zero_centered=linear.zero_centered_gamma,
        )


class TERowParallel(_TELinear):
    """Input columns are sharded."""

    class_name = "TERowParallelLinear"
    parallel_mode = "row"

    @staticmethod
    def layout_name(linear: Any) -> str:
        if linear.parallel_mode is None:
            return "row_expert"
        return "row_sequence_parallel" if linear.sequence_parallel else "row"


class TEDuplicated(_TELinear):
    """Every rank holds the whole layer; with sequence parallelism it runs on the rank's own tokens."""

    class_name = "TELinear"
    parallel_mode = None

    @staticmethod
    def layout_name(linear: Any) -> str:
        # The layer's own `sequence_parallel` is False: to Transformer Engine it is not parallel.
        return "replicated_sequence_parallel" if linear.config.sequence_parallel else "replicated"


# Transformer Engine's own records of the precision it computes in, found at the first check of one of its layers.
# Dynamo guards on them as on any global, so compiled code is traced again when the precision changes. A look-up in
# `sys.modules` at each call would be guarded on as well, and any import would have everything traced again.
_fp8_states: list[Any] = []


@torch.compiler.assume_constant_result
def _find_fp8_states() -> None:
    # Versions of Transformer Engine keep the record in one or the other module.
    modules = [sys.modules.get(f"transformer_engine.pytorch.{name}") for name in ("quantization", "fp8")]
    found = [getattr(module, "FP8GlobalStateManager", None) for module in modules]
    _fp8_states.extend(state for state in dict.fromkeys(found) if state is not None and state not in _fp8_states)


def _fp8_is_enabled() -> bool:
    """Return whether Transformer Engine, if anybody imported it, computes in FP8 now."""
    _find_fp8_states()
    return any(state.is_fp8_enabled() for state in _fp8_states)


def bypasses_its_linears(module: nn.Module) -> bool:
    """Return whether a module computes with the parameters of the linear layers in it and does not call these."""
    return derives_from(module, "TEFusedMLP") or type(module).__name__ == "InferenceGroupedMLP"


def _bias(linear: Any) -> nn.Parameter | None:
    # A layer without one holds an empty tensor.
    return linear.bias if linear.use_bias else None


def _check_precision(path: str, linear: Any) -> None:
    """Raise ValueError, naming the layer, if it computes in another precision than that of its weight."""
    name, config, weight = type(linear).__name__, linear.config, linear.weight
    for field in ("fp8", "fp4"):
        if getattr(config, field, None):
            raise ValueError(
                f"{path}: found a {name} whose configuration has {field} = {getattr(config, field)!r}, expected None: "
                "the adapted layer would compute its base in another precision than the model does"
            )
    if linear.te_quant_params is not None:
        raise ValueError(
            f"{path}: found a {name} with quantisation parameters of its own (te_quant_params), expected none"
        )
    if getattr(weight, "gtp_remat_size", None) is not None:
        raise ValueError(
            f"{path}.weight: found a shard of generalised tensor parallelism (GTP) over {weight.gtp_remat_size} ranks, "
            "expected the whole weight or a tensor-parallel shard of it"
        )
    if type(weight) is not nn.Parameter:
        raise ValueError(
            f"{path}.weight: found a {type(weight).__name__}, expected a plain parameter; quantised base weights are "
            "not supported"
        )


def _check_parallelism(path: str, linear: Any, parallel_mode: str | None, *, is_expert: bool) -> None:
    """Raise ValueError, naming the layer, if its collectives are not those of its kind."""
    name, group = type(linear).__name__, cast(dist.ProcessGroup | None, linear._tp_group)
    # Megatron does not keep on the layer whether an expert's collectives are left to the dispatcher.
    if is_expert and group is not None and (group.size() > 1 or linear.config.expert_model_parallel_size > 1):
        parallel_mode = None
    if group is None:
        raise ValueError(
            f"{path}: found a {name} without a tensor-parallel group, expected one that was built after "
            "megatron.core.parallel_state.initialize_model_parallel()"
        )
    if linear.parallel_mode != parallel_mode:
        raise ValueError(
            f"{path}: found a {name} with parallel_mode = {linear.parallel_mode!r}, expected {parallel_mode!r}: its "
            "collectives are left to other code, such as the dispatcher of an expert's tokens"
        )
    if parallel_mode is not None and linear.tp_size != group.size():
        raise ValueError(
            f"{path}: found a {name} that was built for {linear.tp_size} tensor-parallel ranks in a group of "
            f"{group.size()}, expected the same number"
        )
    # The tokens of an expert come from its dispatcher.
    has_own_tokens = linear.sequence_parallel or (linear.config.sequence_parallel and not is_expert)
    if has_own_tokens and group.size() == 1:
        raise ValueError(
            f"{path}: found a {name} with sequence parallelism on one tensor-parallel rank, expected several ranks or "
            "sequence_parallel=False"
        )


def _warn_of_other_transport(linear: Any) -> None:
    config = linear.config
    if getattr(config, "tp_comm_overlap", False):
        _warn_once("tp_comm_overlap", "communication that overlaps with products")
    if getattr(config, "symmetric_ar_type", None) is not None:
        _warn_once("symmetric_ar_type", "reductions through symmetric memory")


@functools.cache
def _warn_once(option: str, transport: str) -> None:
    logger.warning(
        "%s: adapted Transformer Engine layers compute the same without %s; layers that are not adapted keep it",
        option,
        transport,
    )
