"""Find the modules that a DoRA configuration names. `plan.py` changes the model; nothing here does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dora_fx.attach.routers import modules_of_routers
from dora_fx.megatron import NamedModule, unwrap, walk, with_expert_number
from dora_fx.modules import DoRALinear, looks_like_linear

# PEFT's name for all linear layers but those that put out logits.
ALL_LINEAR = "all-linear"
_MEGATRON_OUTPUT_LAYER = "output_layer"
# A name and the first and last of the numbers that may follow it.
_RANGE = re.compile(r"([A-Za-z_]+)\.(\d+)-(\d+)(?=\.|$)")
# Projections of the tokens between a layer and all its experts, which wildcards alone do not name.
_LATENT = re.compile(r"\.fc[12]_latent_proj$")
# The heads that PEFT leaves out of a sequence classifier.
_CLASSIFIER_HEADS = ("score", "classifier")


def matches(pattern: str, path: str) -> bool:
    """Return whether a module's path is named by a pattern: its last name, its whole path, or `*` wildcards.

    A range of numbers after a name, as in `*.local_experts.0-15.*`, stands for each of them.
    """
    for name, first, last in _RANGE.findall(pattern):
        own = re.search(rf"(?:^|\.){name}\.(\d+)(?:\.|$)", path)
        if own is None or not int(first) <= int(own[1]) <= int(last):
            return False
        pattern = pattern.replace(f"{name}.{first}-{last}", f"{name}.{own[1]}", 1)
    if "*" not in pattern:
        return pattern in (path, path.rpartition(".")[2])
    start, *middle, end = pattern.split("*")
    # A part at the first place where it is found leaves the most text for the others, so no other place is tried.
    position, stop = len(start), len(path) - len(end)
    if position > stop or not path.startswith(start) or not path.endswith(end):
        return False
    for part in middle:
        found = path.find(part, position, stop)
        if found < 0:
            return False
        position = found + len(part)
    return True


def of_all_experts(path: str) -> str:
    """Return a path with `*` in place of an expert's number; other paths as they are."""
    return with_expert_number(path, "*")


def adapted_layers(chunks: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, NamedModule]]:
    """Yield every `DoRALinear` of chunks, bare or wrapped, with its chunk as it was given."""
    for chunk in chunks:
        for named in walk(chunk, DoRALinear):
            if isinstance(named.module, DoRALinear):
                yield chunk, named


@dataclass
class Matches:
    """The modules that targets name in one or more model chunks.

    Attributes:
        targets: chunks as they were given and their modules to adapt or already adapted, in model order.
        unmatched_targets: targets that named no module in any chunk.
        unmatched_linears: paths of the linear layers that no target named.
    """

    targets: list[tuple[nn.Module, NamedModule]] = field(default_factory=list)
    unmatched_targets: list[str] = field(default_factory=list)
    unmatched_linears: list[str] = field(default_factory=list)


def find_targets(chunks: Sequence[nn.Module], targets: Sequence[str], excluded: Sequence[str]) -> Matches:
    """Find the modules that `targets` name and `excluded` does not, by their paths in the whole model.

    Linear layers in routers of experts are left out, unless a target is the whole path of one.

    Raises:
        TypeError: a target names, without a wildcard, a module that is no linear layer.
    """
    found = Matches()
    used: set[str] = set()
    for chunk in chunks:
        output_layers, of_routers = _output_layers(chunk), modules_of_routers(chunk)
        for named in walk(chunk, DoRALinear):
            _, path, module = named
            is_linear = looks_like_linear(module)
            by = [pattern for pattern in targets if matches(pattern, path)]
            if ALL_LINEAR in targets and is_linear and module not in output_layers:
                by.append(ALL_LINEAR)
            if any(matches(pattern, path) for pattern in excluded):
                used.update(by)
                by = []
            if _LATENT.search(f".{path}"):
                by = [pattern for pattern in by if "latent" in pattern]
            exact = [pattern for pattern in by if "*" not in pattern]
            if exact and not is_linear:
                found_there = f"{type(module).__name__}{_ROUTERS if module in of_routers else ''}"
                raise TypeError(f"{path}: target {exact[0]!r} names a {found_there}, expected a linear layer")
            if module in of_routers:
                # Files of PEFT may have adapters of them, and name them so.
                by = [pattern for pattern in by if pattern == path]
            if by and is_linear:
                used.update(by)
                found.targets.append((chunk, named))
            elif is_linear:
                found.unmatched_linears.append(path)
    found.unmatched_targets = [pattern for pattern in targets if pattern not in used]
    return found


_ROUTERS = (
    ", whose weight chooses the experts of each token; DoRA leaves it frozen, and a router that is to be trained is "
    "trained whole"
)


def router_maybe(chunks: Iterable[nn.Module], pattern: str) -> str | None:
    """Return why a pattern that names nothing but routers of experts matches nothing; None for other patterns."""
    for chunk in chunks:
        of_routers = modules_of_routers(chunk)
        for named in walk(chunk, DoRALinear):
            router = of_routers.get(named.module)
            if router is None or not matches(pattern, named.whole_path):
                continue
            if router.module is named.module or looks_like_linear(named.module):
                within = "" if router.module is named.module else f"{named.whole_path} in "
                return f"it names {within}{router.whole_path}, a {type(router.module).__name__}{_ROUTERS}"
    return None


def _output_layers(chunk: nn.Module) -> set[nn.Module]:
    """Return the layers of a Megatron or transformers model that put out logits."""
    model: Any = unwrap(chunk)
    output_layer = getattr(model, _MEGATRON_OUTPUT_LAYER, None)
    if output_layer is None and hasattr(model, "get_output_embeddings"):
        output_layer = model.get_output_embeddings()
    if output_layer is not None:
        return {unwrap(output_layer)}
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    heads = [getattr(model, name, None) for name in _CLASSIFIER_HEADS if is_classifier]
    return {unwrap(head) for head in heads if head is not None}
