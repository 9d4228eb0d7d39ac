"""`torch.compile(model, backend="dora_fx")`: run the passes, then hand the graph to a compiler.

What runs later is the compiled graph behind a refresh of the norms and gathered factors that it reads.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor as inductor
from torch import fx
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config

from dora_fx.cache import are_covered, check, refresh
from dora_fx.megatron import allow_many_graphs, capture_megatron_whole
from dora_fx.passes import (
    SiteInputs,
    Unmatched,
    cacheable_functions,
    calls_only_known_functions,
    check_same_graph,
    default_passes,
    run_passes,
    site_inputs_of,
    tensor_parallel_groups,
)

INNER_COMPILERS = ("inductor", "aot_eager", "eager")
WEIGHT_NORMS = ("once_per_step", "every_call", "checked")
UNMATCHED = ("warn", "error")

capture_megatron_whole()
allow_many_graphs()


@dataclass(frozen=True)
class BackendOptions:
    """The checked options of one compilation; see `dora_fx`."""

    inner_compiler: str
    weight_norm: str
    unmatched: Unmatched
    rank_timeout: float
    inductor_settings: dict[str, Any]

    @classmethod
    def of(cls, options: Mapping[str, Any], mode: str | None = None) -> BackendOptions:
        """Check options and an Inductor mode; raises ValueError as `dora_fx` documents."""
        options = dict(options)
        inner_compiler = _pop_choice(options, "inner_compiler", INNER_COMPILERS)
        weight_norm = _pop_choice(options, "weight_norm", WEIGHT_NORMS)
        unmatched = _pop_choice(options, "unmatched", UNMATCHED)
        rank_timeout = options.pop("rank_timeout", 300.0)
        if not isinstance(rank_timeout, (int, float)) or not rank_timeout > 0:
            raise ValueError(f"rank_timeout: found {rank_timeout!r}, expected a positive number of seconds")
        settings = _inductor_settings(options.pop("mode", mode), options)
        if inner_compiler != "inductor" and settings:
            raise ValueError(f"inner_compiler {inner_compiler!r} takes no Inductor settings; found {sorted(settings)}")
        return cls(inner_compiler, weight_norm, unmatched, rank_timeout, settings)


def dora_fx(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph whose DoRA sites are rewritten into explicit subgraphs.

    Args:
        gm, example_inputs: from Dynamo.
        mode: Inductor's, as in `torch.compile`.
        options: `inner_compiler`, one of `INNER_COMPILERS` ("inductor" by default); `weight_norm`, one of
            "once_per_step" (by default: norms and gathered factors are refreshed when parameters changed),
            "every_call" (computed in the graph) and "checked" (once per step, and compared bit by bit with what
            every call would give); `unmatched`, what to do about an adapted layer whose base call cannot be read from
            the graph, "warn" (by default: it runs beside its base layer) or "error"; `rank_timeout`, how many seconds
            the other tensor-parallel ranks may take to compile the same graph, or to agree on a refresh outside an
            optimizer's step (300.0 by default); `mode`, which wins over the argument; any other key is an option of
            Inductor.
        name: of the compiled region, in logs; torch passes it from 2.15 on.

    Raises:
        ValueError: an option, a mode or an inner compiler that does not exist, or Inductor's settings with
            another inner compiler.
        UnmatchedDoRASiteError: `unmatched` is "error", and there is such a layer.
        RuntimeError: another tensor-parallel rank compiles another graph, or none.
    """
    chosen = BackendOptions.of(options or {}, mode)
    passes = default_passes(
        cached_parameters=chosen.weight_norm != "every_call",
        unmatched=chosen.unmatched,
        fuses=chosen.inner_compiler == "inductor",
    )
    gm = run_passes(gm, example_inputs, passes)
    for tp_group in tensor_parallel_groups(gm):
        check_same_graph(gm, tp_group, _shapes_of_activations(example_inputs), chosen.rank_timeout)
    counters["dora_fx"]["graphs_compiled"] += 1
    compiled = _compile(gm, example_inputs, chosen.inner_compiler, chosen.inductor_settings, name)
    return with_refresh(compiled, gm, checked=chosen.weight_norm == "checked", rank_timeout=chosen.rank_timeout)


def with_refresh(
    compiled: Callable[..., Any], gm: fx.GraphModule, *, checked: bool = False, rank_timeout: float = 300.0
) -> Callable[..., Any]:
    """Put the refresh of the sites' buffers in front of what a graph was compiled to, if the graph reads any.

    Args:
        compiled: takes the graph's inputs, one by one.
        gm: the graph after the passes.
        checked, rank_timeout: see `RefreshingGraph`.
    """
    site_inputs = site_inputs_of(gm)
    if not site_inputs:
        return compiled
    return RefreshingGraph(compiled, site_inputs, checked=checked, rank_timeout=rank_timeout)


class RefreshingGraph:
    """A compiled graph that reads norms and gathered factors from buffers among its inputs.

    Args:
        compiled: takes the graph's inputs, one by one.
        site_inputs: where the sites' tensors are among them.
        checked: compute everything again at each call, and raise if a buffer differs; for debugging.
        rank_timeout: see `parameter_cache.refresh`.

    Raises:
        StaleParametersError, RuntimeError: when called, as `parameter_cache.refresh` and, with `checked`, `check` do.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        site_inputs: Sequence[SiteInputs],
        *,
        checked: bool,
        rank_timeout: float,
    ) -> None:
        self.compiled, self.site_inputs = compiled, site_inputs
        self.checked, self.rank_timeout = checked, rank_timeout
        self.scale_positions = [where.position_of_scale for where in site_inputs]
        self.to_detach = sorted({position for where in site_inputs for position in where.to_detach})

    def __call__(self, *inputs: Any) -> Any:
        if self.checked or not are_covered(inputs[position] for position in self.scale_positions):
            sites = [where.site(inputs) for where in self.site_inputs]
            refresh(sites, self.rank_timeout)
            if self.checked:
                check(sites)
        if not self.to_detach:
            return self.compiled(*inputs)
        # Autograd would call hooks of a parameter among the inputs, Megatron's too, without any gradient.
        arguments = list(inputs)
        for position in self.to_detach:
            arguments[position] = arguments[position].detach()
        return self.compiled(*arguments)


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], inner_compiler: str, settings: dict[str, Any], name: str | None
) -> Callable[..., Any]:
    if inner_compiler != "inductor":
        return lookup_backend(inner_compiler)(gm, list(example_inputs))
    region: dict[str, Any] = {} if name is None else {"compile_region_name": name}
    compile_fx: Callable[..., Any] = inductor.compile_fx.compile_fx
    with _cached_by_torch(gm, settings) as patches:
        return compile_fx(gm, list(example_inputs), config_patches=patches, **region)


@contextlib.contextmanager
def _cached_by_torch(gm: fx.GraphModule, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Inductor's settings with which AOTAutograd's cache takes the graph, if all it calls is known."""
    key = "unsafe_marked_cacheable_functions"
    known = {**settings.get(key, getattr(inductor.config, key)), **cacheable_functions(gm)}
    takes_bodies = {"autograd_cache_allow_custom_autograd_functions": True} if calls_only_known_functions(gm) else {}
    with functorch_config.patch(takes_bodies):
        yield {**settings, key: known} if known else dict(settings)


def _pop_choice(options: dict[str, Any], name: str, choices: Sequence[str]) -> Any:
    """Take an option out of `options`; the first choice is its default."""
    found = options.pop(name, choices[0])
    if found not in choices:
        raise ValueError(f"{name}: found {found!r}, expected one of {list(choices)}")
    return found


def _shapes_of_activations(example_inputs: Sequence[Any]) -> str:
    inputs = [x for x in example_inputs if isinstance(x, torch.Tensor) and not isinstance(x, torch.nn.Parameter)]
    return f"inputs {', '.join(str(tuple(x.shape)) for x in inputs[:4])}"


def _inductor_settings(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Merge a mode and options into one checked dict of Inductor settings; options win."""
    modes = inductor.list_mode_options()
    if mode is not None and mode != "default" and mode not in modes:
        raise ValueError(f"mode: found {mode!r}, expected one of {['default', *modes]}")
    settings = dict(modes.get(mode or "default", {}))
    known = inductor.list_options()
    current = torch._inductor.config.get_config_copy()
    for key, value in options.items():
        option = key.replace("-", "_")
        if option not in known:
            close = difflib.get_close_matches(option, ["inner_compiler", *known], n=3)
            raise ValueError(f"options: unknown option {key!r}; the nearest are {close}")
        default = current[option]
        if default is not None and not isinstance(value, type(default)):
            raise ValueError(f"options[{key!r}]: found {value!r}, expected a {type(default).__name__}")
        settings[option] = value
    return settings
