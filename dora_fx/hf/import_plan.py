"""What an import does to each layer of a model: everything is planned and checked, and nothing is changed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_fx.attach import AttachPlan, DoRA, plan_attachment
from dora_fx.hf.counterpart import Counterpart, GPTCounterpart, NamedLinear
from dora_fx.hf.join import JoinedAdapter, Part, join_parts
from dora_fx.hf.peft_files import is_of_expert
from dora_fx.hf.peft_numbers import check_numbers
from dora_fx.hf.peft_reader import PeftAdapter
from dora_fx.megatron import check_unsharded, walk
from dora_fx.models import HF_ARCHITECTURES, LM_HEAD, OUTPUT_LAYER
from dora_fx.modules import DoRALinear, is_grouped_linear, is_grouped_mlp
from dora_fx.ranks import gather_objects, world_group

logger = logging.getLogger(__name__)

_FUSED_EXPERTS = (
    ", and none of single experts, which are parameters here: import into a Megatron model "
    "(dora_fx.models.build_gpt_model), whose merged weights transformers loads"
)


@dataclass(frozen=True)
class PlannedImport:
    """The import of one linear layer: its adapter, or None where the files have none for it."""

    linear: NamedLinear
    joined: JoinedAdapter | None


def plan_imports(hf: Counterpart, adapter: PeftAdapter, vocab_size: int | None) -> list[PlannedImport]:
    """Find the place of every tensor of an adapter in a model, on this rank alone. Changes nothing.

    Args:
        hf: of the model.
        adapter: the files.
        vocab_size: as in `import_hf`.

    Raises:
        ValueError: as `import_hf` says, but for what it says of the files alone.
    """
    if isinstance(hf, GPTCounterpart):
        hf = _as_files_say(hf, adapter, vocab_size)
        known: Sequence[str] = hf.paths
    else:
        known = [linear.gpt_path for linear in hf.linears]
    unknown = sorted(set(adapter.shapes) - set(known))
    if unknown:
        fused = is_of_expert(unknown[0]) and not isinstance(hf, GPTCounterpart)
        raise ValueError(
            f"{adapter.folder}: found an adapter of {unknown[0]} ({len(unknown)} without a place in the model), "
            f"expected layers such as {known[0]}; the model has {len(hf.linears)} linear layers"
            f"{_FUSED_EXPERTS if fused else ''}"
        )
    _check_targets(adapter, known)
    _check_experts_are_layers(hf, adapter)
    imports = [PlannedImport(linear, _joined_maybe(linear, hf, adapter)) for linear in hf.linears]
    if hf.adapted:
        for planned in imports:
            _check_fits(adapter.folder, planned)
    return imports


def _check_experts_are_layers(hf: Counterpart, adapter: PeftAdapter) -> None:
    """Raise ValueError for adapters of single experts where a module holds several: they would have no place."""
    of_experts = next(filter(is_of_expert, adapter.shapes), None)
    if of_experts is None:
        return
    for chunk in dict.fromkeys(linear.chunk for linear in hf.linears):
        for _, path, module in walk(chunk):
            if is_grouped_mlp(module):
                raise ValueError(
                    f"{adapter.folder}: found an adapter of {of_experts}, and in the model {path}, a GroupedMLP, which "
                    "has no linear layers; expected a TEGroupedMLP or a SequentialMLP"
                )


def check_experts_are_alike(folder: Path, imports: Sequence[PlannedImport]) -> None:
    """Raise ValueError unless the experts of a layer that holds several have one rank and scaling, or no adapter.

    Every rank calls it: others hold other experts of the same layers.
    """
    grouped = [planned for planned in imports if is_grouped_linear(planned.linear.base)]
    own = {planned.linear.gpt_path: (planned.linear.whole_path, _numbers_of(planned.joined)) for planned in grouped}
    first: dict[str, tuple[str, _Numbers | None]] = {}
    for path, (layer, found) in (pair for of_rank in gather_objects(own, world_group()) for pair in of_rank.items()):
        other, expected = first.setdefault(layer, (path, found))
        if found != expected:
            raise ValueError(
                f"{folder}: found {other} with {_text_of(expected)} and {path} with {_text_of(found)}, expected one "
                f"rank and scaling for the experts of {layer}, which has one adapter for all of them. Import into the "
                "same model with SequentialMLP, whose experts may differ"
            )


# Rank, alpha, and whether it is rsLoRA's.
_Numbers = tuple[int, float, bool]


def _numbers_of(adapter: Any) -> _Numbers | None:
    """Of a joined adapter, or of a module's; None for no adapter."""
    return None if adapter is None else (adapter.dim, adapter.alpha, adapter.use_rslora)


def _text_of(numbers: _Numbers | None) -> str:
    if numbers is None:
        return "no adapter"
    dim, alpha, use_rslora = numbers
    return f"dim {dim} and alpha {alpha:g}{' with rsLoRA' * use_rslora}"


def _as_files_say(hf: GPTCounterpart, adapter: PeftAdapter, vocab_size: int | None) -> GPTCounterpart:
    """The names and the vocabulary that the files have, where the model does not know better."""
    if hf.is_assumed:
        # The first architecture that has all the layers that the files name.
        named = (hf.named_as(one) for one in HF_ARCHITECTURES.values())
        hf = next((one for one in named if adapter.shapes.keys() <= set(one.paths)), hf)
    if vocab_size is None and adapter.shapes.get(LM_HEAD, {}).get("magnitude") != (hf.vocabulary,):
        # The model knows of padding, and the files are of a base that is padded alike.
        hf = replace(hf, vocabulary=None)
    return hf


def _check_targets(adapter: PeftAdapter, known: Sequence[str]) -> None:
    """Raise ValueError unless the files have tensors of exactly the layers that their config adapts in this model."""
    missing = [path for path in known if adapter.is_target(path) and path not in adapter.shapes]
    if missing:
        raise ValueError(
            f"{adapter.folder}: target_modules names {missing[0]}, which has no tensors ({len(missing)} such layers)"
        )
    ignored = [path for path in adapter.shapes if adapter.is_target(path) is False]
    if ignored:
        raise ValueError(
            f"{adapter.folder}: found tensors of {ignored[0]} ({len(ignored)} such layers), which target_modules, "
            "exclude_modules and layers_to_transform leave out, so that PEFT would ignore them"
        )
    if idle := adapter.idle_patterns():
        logger.warning("%s: %s names no layer that has tensors, and has no effect", adapter.folder, " and ".join(idle))


def _joined_maybe(linear: NamedLinear, hf: Counterpart, adapter: PeftAdapter) -> JoinedAdapter | None:
    path = linear.gpt_path
    if adapter.shapes.keys().isdisjoint(hf.parts.paths(path)):
        return None
    check_unsharded(path, linear.module)
    spec = linear.describe()
    in_features, out_features = spec.true_sizes
    num_rows = out_features if path != OUTPUT_LAYER or hf.vocabulary is None else hf.vocabulary
    rows = hf.parts.rows(path, num_rows)
    dtype = None if spec.weight is None else spec.weight.dtype
    parts = {
        name: _part(adapter, name, in_features, len(index), dtype)
        for name, index in rows.items()
        if name in adapter.shapes
    }
    return join_parts(path, parts, rows, out_features, spec.dim_multiple)


def _part(adapter: PeftAdapter, name: str, in_features: int, out_features: int, dtype: torch.dtype | None) -> Part:
    expected = {
        "lora_a": (adapter.rank(name), in_features),
        "lora_b": (out_features, adapter.rank(name)),
        "magnitude": (out_features,),
    }
    tensors: dict[str, Tensor] = {}
    for kind, shape in expected.items():
        if adapter.shapes[name][kind] != shape:
            hint = "; pass vocab_size if rows of the model pad its vocabulary" if name == LM_HEAD else ""
            found = adapter.shapes[name][kind]
            raise ValueError(f"{adapter.folder}: {name}: found {kind} {found}, expected {shape}{hint}")
        tensors[kind] = adapter.tensor(name, kind)
    part = Part(**tensors, alpha=adapter.alpha(name), use_rslora=adapter.use_rslora)
    check_numbers(f"{adapter.folder}: {name}", part, dtype)
    return part


def _check_fits(folder: Path, planned: PlannedImport) -> None:
    """Raise ValueError unless a layer of an adapted model is adapted as the files say."""
    site, joined, path = planned.linear.module, planned.joined, planned.linear.whole_path
    if isinstance(site, DoRALinear) != (joined is not None):
        found, expected = ("", "no ") if joined is None else ("no ", "")
        raise ValueError(f"{path}: found {found}adapter in the model, expected {expected}adapter as in {folder}")
    if joined is not None and (site.adapter.dim, site.scaling) != (joined.dim, joined.scaling):
        found, expected = (_text_of(_numbers_of(each)) for each in (site.adapter, joined))
        raise ValueError(f"{path}: found {found} in the model, expected {expected} for {folder}")


def plan_attachments(imports: Sequence[PlannedImport], dropout: float) -> list[tuple[DoRA, AttachPlan]]:
    """Plans for the layers of each chunk that have the same dim and alpha."""
    groups: dict[tuple[int, int, float, bool], tuple[nn.Module, dict[str, None]]] = {}
    for planned in imports:
        if planned.joined is not None:
            chunk, joined = planned.linear.chunk, planned.joined
            _, paths = groups.setdefault((id(chunk), joined.dim, joined.alpha, joined.use_rslora), (chunk, {}))
            # Experts that one module holds have its path.
            paths[planned.linear.whole_path] = None
    plans = []
    for (_, dim, alpha, use_rslora), (chunk, paths) in groups.items():
        dora = DoRA(
            target_modules=list(paths),
            dim=dim,
            alpha=alpha,
            dropout=dropout,
            lora_A_init_method="zero",
            use_rslora=use_rslora,
        )
        plans.append((dora, plan_attachment(dora, [chunk])))
    return plans
