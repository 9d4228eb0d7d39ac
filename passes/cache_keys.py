"""Say what decides the results of a graph's functions, so that torch's caches of compiled graphs take them.

    Inductor's cache       keyed by the ATen graph, in which every function is spelled out
    AOTAutograd's cache    keyed by the Dynamo graph, in which functions are names

torch's own functions are known by their names and its version. Those of this package do what their sources say, for
process groups of the size that they have here, and some of them for this process's rank: all of that is in the digest
that goes into the key. So nothing that was compiled of another source, or for another layout, is used again.

Megatron's mappings around layers that are not adapted are higher-order ops. Their bodies are in the key, but torch
does not look at what the bodies call, and so caches no graph with such an op unless it is told to. Here the calls in
the bodies are checked as all others are.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import fx

from dora_fx.function import DEPEND_ON_RANK
from dora_fx.passes.graph_utils import subgraph_modules
from dora_fx.ranks import group_rank, group_size

# Dynamo's graphs call Python's operators too.
_KNOWN_PACKAGES = ("torch", "_operator", "builtins", "math", "dora_fx")
# The rooms that hold the functions that graphs call, and those that decide which of them a graph calls.
_SHAPE_GRAPHS = ("function", "modules", "passes", "ranks", "cache", "backend.py")


def cacheable_functions(gm: fx.GraphModule) -> dict[str, str]:
    """Functions of this package that a graph and its subgraphs call, with a digest of what decides their results.

    The arguments are not part of it; they are in the graph.
    """
    settings: dict[Callable[..., Any], set[str]] = {}
    for node in _calls(gm):
        if _package(node.target) == "dora_fx":
            assert callable(node.target)
            settings.setdefault(node.target, set()).update(_groups(node))
    return {
        f"{function.__module__}.{function.__name__}": _digest(source_digest(), *sorted(groups))
        for function, groups in settings.items()
    }


def calls_only_known_functions(gm: fx.GraphModule) -> bool:
    """Return whether a graph and the bodies of its higher-order ops call nothing but torch and this package."""
    return all(_package(node.target) in _KNOWN_PACKAGES for node in _calls(gm))


@functools.cache
def source_digest() -> str:
    """Digest of the sources that shape graphs, as they are when it is first asked for."""
    return digest_of_sources(Path(__file__).parents[1])


def digest_of_sources(package: Path) -> str:
    """Digest of the sources that shape graphs, in a folder that holds this package.

    The rest of the package may change, and what was compiled before is used again.
    """
    files = [file for name in _SHAPE_GRAPHS for file in _sources(package / name)]
    return _digest(*(f"{file.relative_to(package)}:{file.read_text(encoding='utf-8')}" for file in files))


def _sources(path: Path) -> list[Path]:
    assert path.exists(), f"{path} is gone, and its sources would not count"
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def _calls(gm: fx.GraphModule) -> Iterator[fx.Node]:
    for module in subgraph_modules(gm):
        yield from (node for node in module.graph.nodes if node.op == "call_function")


def _package(target: Any) -> str:
    return (getattr(target, "__module__", None) or "").partition(".")[0]


def _groups(node: fx.Node) -> Iterator[str]:
    """The process groups that a call names, with their sizes, and with this process's ranks where they matter."""
    for name in (*node.args, *node.kwargs.values()):
        if isinstance(name, str) and name:
            rank = group_rank(name) if node.target in DEPEND_ON_RANK else "any"
            yield f"{name}: rank {rank} of {group_size(name)}"


def _digest(*texts: str) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:{text}".encode())
    return digest.hexdigest()
