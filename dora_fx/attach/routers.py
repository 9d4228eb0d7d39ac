"""Which modules of a model choose the experts of each token. They stay frozen, linear layers inside them too."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from dora_fx.megatron import NamedModule, unwrap, walk
from dora_fx.modules import DoRALinear

# Of classes, in Megatron and transformers. Other gates, such as those that scale an output, choose nothing.
_CLASSES = re.compile(r"(Router|Gating|Mo[Ee]\w*Gate)$")
# Of linear layers that are routers themselves, as is one named "gate" beside "experts".
_NAMES = ("router", "router_gate")


def routers_of(chunk: nn.Module) -> Iterator[NamedModule]:
    """Yield the routers of a chunk, bare or wrapped."""
    gates = {
        unwrap(gate)
        for holder in chunk.modules()
        if (gate := holder._modules.get("gate")) is not None and "experts" in holder._modules
    }
    for named in walk(chunk, DoRALinear):
        is_named_so = named.path.rpartition(".")[2] in _NAMES
        if _CLASSES.search(type(named.module).__name__) or is_named_so or named.module in gates:
            yield named


def modules_of_routers(chunk: nn.Module) -> dict[nn.Module, NamedModule]:
    """Return every module in a router of a chunk, the router itself included, with that router."""
    # The outermost one of routers in one another comes first.
    found: dict[nn.Module, NamedModule] = {}
    for named in routers_of(chunk):
        for module in named.module.modules():
            found.setdefault(unwrap(module), named)
    return found
