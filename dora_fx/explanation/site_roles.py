"""What the adapted layers of a graph are, and which nodes of the rewritten graph are theirs.

The markers of the graph before the passes name every tensor of a site. The passes keep the inputs of a graph by their
names, so these tell the same tensors in the graph after them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from dora_fx.explanation.flat_graph import FlatGraph
from dora_fx.explanation.layer_parts import Part
from dora_fx.explanation.node_values import is_own_function, module_tensor_name_maybe
from dora_fx.modules import dora_linear
from dora_fx.passes import module_path

# Operands of a marker that the base layer has as well.
_OF_THE_BASE = frozenset({"weight", "bias", "norm_weight", "norm_bias"})
_NOT_TENSORS_OF_THE_SITE = frozenset({"x", "base_output"})
_SHORT = {
    "weight": "W0",
    "lora_a": "A",
    "lora_b": "B",
    "magnitude": "m",
    "scaling": "s",
    "cached_lora_a": "A gathered",
    "cached_lora_b": "B gathered",
}


@dataclass(frozen=True)
class Role:
    """One tensor of one site; `operand` is its name in the marker."""

    site: str
    operand: str

    @property
    def short(self) -> str:
        """The name of the tensor in pictures."""
        return _SHORT.get(self.operand, self.operand.removeprefix("cached_"))


@dataclass(frozen=True)
class SiteRoles:
    """The sites of a graph before the passes.

    Attributes:
        sites: their module paths, in graph order.
        by_input: the roles of the graph's inputs, by the names of their nodes.
        before: names and targets of the graph's nodes.
        root: path of the module around all others, as the graph's caller knows it.
    """

    sites: tuple[str, ...]
    by_input: Mapping[str, Role]
    before: frozenset[tuple[str, Any]]
    root: str

    @classmethod
    def of(cls, before: FlatGraph) -> SiteRoles:
        """Read the markers of a graph."""
        markers = [node for node in before.computing if node.target is dora_linear]
        root = _root_of(before, markers)
        by_input = {}
        for marker in markers:
            for operand, node in marker.kwargs.items():
                if isinstance(node, fx.Node) and operand not in _NOT_TENSORS_OF_THE_SITE:
                    by_input[before.source(node).name] = Role(_below(module_path(marker), root), operand)
        identities = frozenset(_identity(before, node) for node in before.computing if node.target is not dora_linear)
        sites = tuple(_below(module_path(marker), root) for marker in markers)
        return cls(sites, by_input, identities, root)

    def path_of(self, node: fx.Node) -> str:
        """Return the path of the innermost module that a node was traced in, below the root."""
        return _below(module_path(node), self.root)

    def role_maybe(self, node: fx.Node) -> Role | None:
        """Return the role of an input of the graph before the passes or after them."""
        return self.by_input.get(node.name) if node.op in ("placeholder", "get_attr") else None

    def name_of(self, node: fx.Node, site: str | None) -> str:
        """Return the name of a parameter or buffer for a box of `site`; elsewhere it says whose it is."""
        role = self.role_maybe(node)
        if role is None:
            return module_tensor_name_maybe(node) or node.name
        return role.short if role.site == site else f"{role.site.rpartition('.')[2]} {role.short}"

    def site_maybe(self, flat: FlatGraph, node: fx.Node) -> str | None:
        """Return the one site whose tensors a node reads, or else the site in whose module it was traced."""
        roles = filter(None, map(self.role_maybe, flat.operands[node]))
        read = {role.site for role in roles}
        if read:
            return read.pop() if len(read) == 1 else None
        return next((site for site in self.sites if _is_within(self.path_of(node), site)), None)

    def outermost_without_site(self, path: str) -> str:
        """Return the outermost module around `path` that has no site inside; `path` itself in a graph without sites."""
        if not self.sites:
            return path
        parts = path.split(".")
        outer = (".".join(parts[:length]) for length in range(1, len(parts)))
        return next((one for one in outer if not any(_is_within(site, one) for site in self.sites)), path)

    def parts(self, flat: FlatGraph, senders: Collection[fx.Node]) -> dict[fx.Node, Part]:
        """Return whose each computing node is.

        What the passes left alone is the base's, and so are a product with its weight, a sum with its bias, and the
        collectives of its input and of that product. Of what no tensor of an adapter enters, this package's own
        functions are DoRA's, as the key of a dropout.

        Args:
            senders: the nodes that send.
        """
        parts: dict[fx.Node, Part] = {}
        with_adapter: dict[fx.Node, str | None] = {}
        with_product: dict[fx.Node, str | None] = {}
        for node in flat.computing:
            site, operands = self.site_maybe(flat, node), self._marker_operands(flat, node)
            # Each site reads what the one before it returned: this is neither of its own adapter nor its own product.
            sources = flat.operands[node]
            if operands - _OF_THE_BASE or any(with_adapter.get(one, "") in (site, None) for one in sources):
                with_adapter[node] = site
            if "weight" in operands or any(with_product.get(one, "") == site for one in sources):
                with_product[node] = site
            is_kept = _identity(flat, node) in self.before
            sends_of_base = node in senders and (node in with_product or node not in with_adapter)
            is_plain = node not in with_adapter and not is_own_function(node)
            parts[node] = "base" if is_kept or operands & _OF_THE_BASE or sends_of_base or is_plain else "dora"
            if node.target is dora_linear:
                parts[node] = "dora"
        return parts

    def _marker_operands(self, flat: FlatGraph, node: fx.Node) -> set[str]:
        roles = filter(None, map(self.role_maybe, flat.operands[node]))
        return {role.operand for role in roles}


def _identity(flat: FlatGraph, node: fx.Node) -> tuple[str, Any]:
    """What tells a node that the passes left alone; a graph gives the name of an erased node to no other."""
    return flat.names[node], node.target


def _is_within(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _root_of(flat: FlatGraph, markers: Sequence[fx.Node]) -> str:
    """Return the module around all nodes, and around each site."""
    paths = {path for node in flat.computing if (path := module_path(node))}
    paths |= {module_path(marker).rpartition(".")[0] for marker in markers}
    return common_path([*paths])


def common_path(paths: Sequence[str]) -> str:
    """Return the path of the innermost module around all of several."""
    split = [path.split(".") if path else [] for path in paths]
    common = []
    for parts in zip(*split, strict=False):
        if len({*parts}) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _below(path: str, root: str) -> str:
    return path.removeprefix(root).removeprefix(".") if _is_within(path, root) else path
