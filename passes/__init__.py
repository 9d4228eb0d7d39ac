"""FX passes over Dynamo graphs. Reading `default_passes` is reading the compiler."""

from __future__ import annotations

# This folder lies beside `dora_fx` in a checkout, so `import passes` would find it there too, and would load each
# module a second time. Each copy would have errors, records and logs of its own, which the other does not know.
if __name__ != "dora_fx.passes":
    raise ImportError(f"import this package as dora_fx.passes, not as {__name__}")

from functools import partial

from dora_fx.passes.base_ops import op_name
from dora_fx.passes.cache_keys import cacheable_functions, calls_only_known_functions
from dora_fx.passes.graph_utils import module_path, referenced_graph_maybe, subgraph_modules
from dora_fx.passes.pipeline import GraphPass, run_passes
from dora_fx.passes.rewrite_dora_pass import Unmatched, rewrite_dora_pass
from dora_fx.passes.same_graph import check_same_graph
from dora_fx.passes.site_inputs import SiteInputs, site_inputs_of, tensor_parallel_groups
from dora_fx.passes.split_scale_pass import split_scale_pass


def default_passes(
    *, cached_parameters: bool = True, unmatched: Unmatched = "warn", fuses: bool = True
) -> list[GraphPass]:
    """The passes that `backend="dora_fx"` runs, in order.

    Args:
        cached_parameters, unmatched: see `rewrite_dora_pass`.
        fuses: whether the compiler that takes the graph fuses elementwise ops, for which the later passes prepare it.
    """
    rewrite: GraphPass = partial(rewrite_dora_pass, cached_parameters=cached_parameters, unmatched=unmatched)
    return [rewrite, split_scale_pass] if fuses else [rewrite]


__all__ = [
    "GraphPass",
    "SiteInputs",
    "Unmatched",
    "cacheable_functions",
    "calls_only_known_functions",
    "check_same_graph",
    "default_passes",
    "module_path",
    "op_name",
    "referenced_graph_maybe",
    "run_passes",
    "site_inputs_of",
    "subgraph_modules",
    "tensor_parallel_groups",
]
