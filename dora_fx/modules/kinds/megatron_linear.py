"""Megatron's own ColumnParallelLinear and RowParallelLinear."""

from __future__ import annotations

from typing import Any

import torch

from dora_fx.function import LAYOUTS
from dora_fx.modules.kinds.linear_kind import LinearKind, LinearSpec, LocalExperts, runs_its_class_alone


class _MegatronLinear(LinearKind):
    class_module = "megatron.core.tensor_parallel.layers"

    @classmethod
    def describe(cls, path: str, linear: Any) -> LinearSpec:
        if linear.tp_group is None:
            raise ValueError(
                f"{path}: found a layer without a tensor-parallel group, expected one that was built after "
                "megatron.core.parallel_state.initialize_model_parallel()"
            )
        return LinearSpec(
            kind=cls,
            layout=LAYOUTS[cls.layout_name(linear)],
            in_features=linear.input_size,
            out_features=linear.output_size,
            # Set by `models.build_gpt_model` on layers that it pads.
            padded_in_features=getattr(linear, "padded_in_features", 0),
            padded_out_features=getattr(linear, "padded_out_features", 0),
            row_blocks=row_blocks(path, linear),
            tp_group=linear.tp_group,
            weight=cls.stored_weight(linear),
            bias=linear.bias,
            experts=LocalExperts.of(path, linear, linear.tp_group) if linear.is_expert else None,
        )

    @staticmethod
    def added_bias(linear: Any) -> torch.Tensor | None:
        return None if linear.skip_bias_add else linear.bias

    @staticmethod
    def returned_beside_output(linear: Any) -> tuple[torch.Tensor | None, ...]:
        return (linear.bias if linear.skip_bias_add else None,)

    @classmethod
    def is_product_alone(cls, linear: Any) -> bool:
        config = linear.config
        # A private name of Megatron's (0.16 to 0.19), which its own layers read to offload what they save.
        offloading = getattr(config, "_cpu_offloading_context", None)
        offloads = offloading is not None and offloading.inside_context
        defers = getattr(config, "defer_embedding_wgrad_compute", False)
        is_known = ColumnParallel.matches(linear) or RowParallel.matches(linear)
        return is_known and runs_its_class_alone(linear) and not (offloads or defers)


class ColumnParallel(_MegatronLinear):
    """Output rows are sharded."""

    class_name = "ColumnParallelLinear"

    @staticmethod
    def layout_name(linear: Any, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None) -> str:
        if linear.explicit_expert_comm:
            return "column_expert"
        # Megatron switches sequence parallelism and gathering of an output layer for single calls.
        gathers = linear.gather_output if runtime_gather_output is None else runtime_gather_output
        return f"column{'_sequence_parallel' * linear.sequence_parallel}{'_gather_output' * gathers}"


class RowParallel(_MegatronLinear):
    """Input columns are sharded."""

    class_name = "RowParallelLinear"

    @staticmethod
    def layout_name(linear: Any) -> str:
        if linear.explicit_expert_comm:
            return "row_expert"
        if not linear.input_is_parallel:
            return "row_split_input"
        return "row_sequence_parallel" if linear.sequence_parallel else "row"


def row_blocks(path: str, linear: Any) -> int:
    """Return the number of blocks of output rows that Megatron shards one by one: gate and up of a gated linear_fc1."""
    return 2 if linear.config.gated_linear_unit and path.rpartition(".")[2] == "linear_fc1" else 1
