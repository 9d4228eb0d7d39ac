"""The modules that stand in for linear layers: the wrapper, its parameters, their state dicts, and the marker.

`kinds/` describes the linear layers that can be wrapped, and is a room of this room's own.
"""

from dora_fx.modules.adapter import NUMBERED_EXPERTS, ParallelLinearDoRAAdapter
from dora_fx.modules.adapter_bank import (
    AdapterBank,
    bank_of,
    check_places,
    count_steps_apart,
    fit_to_base,
    guard_changes,
    inactive_adapters,
    keep_bank,
    path_of_inner_bank_maybe,
    put_in,
    sites_of,
    take_out,
)
from dora_fx.modules.adapter_settings import (
    check_alpha,
    check_dim,
    check_dropout,
    check_init_method,
    check_use_rslora,
    low_rank_scaling,
)
from dora_fx.modules.finite import adapter_not_finite_maybe, not_finite_maybe
from dora_fx.modules.grouped_linear_wrapper import GroupedDoRALinear, compile_grouped_linears
from dora_fx.modules.kinds import (
    LinearKind,
    LinearSpec,
    TorchLinear,
    bypasses_its_linears,
    describe_linear,
    format_problem_maybe,
    is_grouped_linear,
    is_grouped_mlp,
    kind_of_maybe,
    looks_like_linear,
    quantised_weight_maybe,
    refused_setting_of_experts_maybe,
    weights_of,
)
from dora_fx.modules.linear_wrapper import DoRALinear
from dora_fx.modules.marker import AdapterTensors, MarkedSite, dora_linear, operands_of_call, read_site
from dora_fx.modules.model_adapters import disable_adapter, invalidate_norms
from dora_fx.modules.model_calls import check_once_per_call, set_call_check
from dora_fx.modules.partial_gradients import GradientCompletion, complete
from dora_fx.modules.sharded_state_dict import adapter_sharded_state_dict
from dora_fx.modules.site_mixture import MixedAdapter, SiteMixture
from dora_fx.modules.site_paths import path_of
from dora_fx.modules.whole_tensors import gather_whole

__all__ = [
    "NUMBERED_EXPERTS",
    "AdapterBank",
    "AdapterTensors",
    "DoRALinear",
    "GradientCompletion",
    "GroupedDoRALinear",
    "LinearKind",
    "LinearSpec",
    "MarkedSite",
    "MixedAdapter",
    "ParallelLinearDoRAAdapter",
    "SiteMixture",
    "TorchLinear",
    "adapter_not_finite_maybe",
    "adapter_sharded_state_dict",
    "bank_of",
    "bypasses_its_linears",
    "check_alpha",
    "check_dim",
    "check_dropout",
    "check_init_method",
    "check_once_per_call",
    "check_places",
    "check_use_rslora",
    "compile_grouped_linears",
    "complete",
    "count_steps_apart",
    "describe_linear",
    "disable_adapter",
    "dora_linear",
    "fit_to_base",
    "format_problem_maybe",
    "gather_whole",
    "guard_changes",
    "inactive_adapters",
    "invalidate_norms",
    "is_grouped_linear",
    "is_grouped_mlp",
    "keep_bank",
    "kind_of_maybe",
    "looks_like_linear",
    "low_rank_scaling",
    "not_finite_maybe",
    "operands_of_call",
    "path_of",
    "path_of_inner_bank_maybe",
    "put_in",
    "quantised_weight_maybe",
    "read_site",
    "refused_setting_of_experts_maybe",
    "set_call_check",
    "sites_of",
    "take_out",
    "weights_of",
]
