"""`torch.compile(model, backend="dora_fx")`: run the passes, then hand the graph to a compiler."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch._inductor as inductor
from torch import fx
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters

from dora_fx.agreement import check_same_graph
from dora_fx.dynamo import capture_megatron_whole
from dora_fx.passes import default_passes
from dora_fx.passes.dora_sites import tensor_parallel_groups
from dora_fx.passes.pipeline import run_passes

INNER_COMPILERS = ("inductor", "aot_eager", "eager")

capture_megatron_whole()


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
        options: `inner_compiler`, one of `INNER_COMPILERS` ("inductor" by default); `rank_timeout`, how many
            seconds the other tensor-parallel ranks may take to compile the same graph (300.0 by default); any other
            key is an option of Inductor.
        name: of the compiled region, in logs; torch passes it from 2.15 on.

    Raises:
        ValueError: an option, a mode or an inner compiler that does not exist, or Inductor's settings with
            another inner compiler.
        UnsupportedDoRASiteError: an adapted layer that cannot be rewritten.
        RuntimeError: another tensor-parallel rank compiles another graph, or none.
    """
    options = dict(options or {})
    inner_compiler = options.pop("inner_compiler", "inductor")
    if inner_compiler not in INNER_COMPILERS:
        raise ValueError(f"inner_compiler: found {inner_compiler!r}, expected one of {list(INNER_COMPILERS)}")
    rank_timeout = options.pop("rank_timeout", 300.0)
    if not isinstance(rank_timeout, (int, float)) or not rank_timeout > 0:
        raise ValueError(f"rank_timeout: found {rank_timeout!r}, expected a positive number of seconds")
    settings = _inductor_settings(mode, options)
    if inner_compiler != "inductor" and settings:
        raise ValueError(f"inner_compiler {inner_compiler!r} takes no Inductor settings; found {sorted(settings)}")
    tp_groups = tensor_parallel_groups(gm)
    gm = run_passes(gm, example_inputs, default_passes())
    for tp_group in tp_groups:
        check_same_graph(gm, tp_group, _shapes_of_activations(example_inputs), rank_timeout)
    counters["dora_fx"]["graphs_compiled"] += 1
    if inner_compiler != "inductor":
        return lookup_backend(inner_compiler)(gm, list(example_inputs))
    region: dict[str, Any] = {} if name is None else {"compile_region_name": name}
    compile_fx: Callable[..., Any] = inductor.compile_fx.compile_fx
    return compile_fx(gm, list(example_inputs), config_patches=settings, **region)


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
