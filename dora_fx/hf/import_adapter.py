"""Hugging Face PEFT DoRA adapters into a Megatron model: plan and check everything, then attach and copy."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dora_fx.attach import AttachPlan, DoRA, adapted_layers, attach, plan_attachment, try_layers
from dora_fx.files import reason_of
from dora_fx.hf.join import JoinedAdapter, Part, join_parts
from dora_fx.hf.layers import (
    NamedLinear,
    every_hf_path,
    gpt_config,
    named_linears,
    num_hf_layers,
    true_vocabulary,
)
from dora_fx.hf.peft_numbers import check_numbers
from dora_fx.hf.peft_reader import PeftAdapter, read_peft_adapter
from dora_fx.hf.transformers_model import OwnNames, transformers_model_maybe
from dora_fx.megatron import ModelT, check_unsharded, chunks_of, rebuild_gradient_buffers, unwrap, update_main_copies
from dora_fx.models import (
    DEFAULT_ARCHITECTURE,
    HF_ARCHITECTURES,
    LM_HEAD,
    OUTPUT_LAYER,
    HFArchitecture,
    HFParts,
    noted_architecture_maybe,
)
from dora_fx.modules import DoRALinear
from dora_fx.ranks import raise_on_every_rank, world_group

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedImport:
    """The import of one linear layer: its adapter, or None where the files have none for it."""

    linear: NamedLinear
    joined: JoinedAdapter | None


def import_hf(
    model: ModelT,
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    vocab_size: int | None = None,
    training: bool = True,
) -> ModelT:
    """Give a Megatron or transformers model the adapters of a Hugging Face PEFT DoRA folder, and return it.

    The function is PEFT's, exactly: layers that Megatron fuses keep a common A, or stack their ranks (q, k and v of
    rank 8 become one adapter of dim 24). What PEFT does not adapt keeps its base function; in a fused layer further
    training reaches it. A and B take the base weight's dtype, magnitudes float32 at least. Every rank calls it and
    reads the files. Everything is checked before anything is changed.

    Args:
        model: a Megatron GPTModel of a supported architecture, or a list or a tuple of its chunks, or a transformers
            model, bare or wrapped. Without adapters they are attached, with the files' dropout, as `DoRA` does it.
            With adapters these must be on the same layers and of the same dim and scaling; they keep their dropout
            and what of them is trained.
        folder: with adapter_config.json and adapter_model.safetensors.
        base_model: raise if the files name another `base_model_name_or_path`.
        vocab_size: number of tokens, where the model's output layer has more rows than the files' lm_head because
            Megatron padded it. The rows beyond keep their base function. A model of Megatron-Bridge knows it itself.
        training: of the adapters that are attached, as in `DoRA.__call__`.

    Raises:
        ValueError: on every rank, naming the file or layer: an option, a tensor or a shape without an equal here, a
            missing magnitude or layer, values that are not finite, another base, or adapters that do not fit.
    """
    chunks = chunks_of(model)
    problem = None
    try:
        adapter = read_peft_adapter(Path(folder))
        _check_base(adapter, base_model)
        imports = _plan_imports(chunks, adapter, vocab_size)
        dropout = float(adapter.config.get("lora_dropout") or 0.0)
        plans = None if _is_adapted(imports) else _plan_attachments(imports, dropout)
    except (ValueError, TypeError, OSError) as error:
        problem = str(error)
    except Exception as error:
        # Of a reader, for example: the other ranks would wait for this one.
        problem = f"{folder}: cannot be read ({reason_of(error)})"
    raise_on_every_rank(problem, world_group())
    # A pipeline stage that has nothing to attach hears of the others' layers.
    try_layers([site for _, plan in plans or () for site in plan.new])
    if plans is not None:
        _attach(chunks, plans, training)
    sites = {named.whole_path: named.module for _, named in adapted_layers(chunks)}
    for planned in imports:
        if planned.joined is not None:
            _copy(sites[planned.linear.whole_path], planned.joined)
    update_main_copies(parameter for site in sites.values() for parameter in site.adapter.parameters())
    logger.info("imported %d adapters from %s", sum(p.joined is not None for p in imports), folder)
    return model


def _check_base(adapter: PeftAdapter, expected: str | None) -> None:
    found = adapter.config.get("base_model_name_or_path")
    if expected is not None and found != expected:
        raise ValueError(f"{adapter.folder}: the adapter is of the base {found!r}, expected {expected!r}")


def _plan_imports(chunks: Sequence[nn.Module], adapter: PeftAdapter, vocab_size: int | None) -> list[PlannedImport]:
    own = transformers_model_maybe(chunks, vocab_size=vocab_size)
    linears, parts, known, vocabulary = _own_layers(chunks) if own is not None else _layers(chunks, adapter, vocab_size)
    unknown = sorted(set(adapter.shapes) - set(known))
    if unknown:
        raise ValueError(
            f"{adapter.folder}: found an adapter of {unknown[0]} ({len(unknown)} without a place in the model), "
            f"expected layers such as {known[0]}; the model has {len(linears)} linear layers"
        )
    _check_targets(adapter, known)
    imports = [PlannedImport(linear, _joined_maybe(linear, adapter, parts, vocabulary)) for linear in linears]
    if _is_adapted(imports):
        for planned in imports:
            _check_fits(adapter.folder, planned)
    return imports


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


# The model's linear layers, what they are in the Hugging Face model, all paths there, and the vocabulary where it is
# smaller than the output layer.
Layers = tuple[list[NamedLinear], HFParts | OwnNames, list[str], int | None]


def _layers(chunks: Sequence[nn.Module], adapter: PeftAdapter, vocab_size: int | None) -> Layers:
    config, num_layers = gpt_config(chunks), num_hf_layers(chunks)
    hf = noted_architecture_maybe(unwrap(chunks[0])) or _architecture_of_files(adapter, num_layers)
    linears = named_linears(chunks)
    vocabulary = true_vocabulary(config, linears, vocab_size)
    if vocab_size is None and adapter.shapes.get(LM_HEAD, {}).get("magnitude") != (vocabulary,):
        # The model knows of padding, and the files are of a base that is padded alike.
        vocabulary = None
    return linears, HFParts.of(hf, config), every_hf_path(hf, num_layers), vocabulary


def _own_layers(chunks: Sequence[nn.Module]) -> Layers:
    linears = named_linears(chunks)
    return linears, OwnNames(), [linear.whole_path for linear in linears], None


def _architecture_of_files(adapter: PeftAdapter, num_layers: int) -> HFArchitecture:
    """The first architecture that has all the layers that the files name."""
    fitting = (hf for hf in HF_ARCHITECTURES.values() if adapter.shapes.keys() <= set(every_hf_path(hf, num_layers)))
    return next(fitting, DEFAULT_ARCHITECTURE)


def _is_adapted(imports: Sequence[PlannedImport]) -> bool:
    return any(isinstance(planned.linear.module, DoRALinear) for planned in imports)


def _check_fits(folder: Path, planned: PlannedImport) -> None:
    """Raise ValueError unless a layer of an adapted model is adapted as the files say."""
    site, joined, path = planned.linear.module, planned.joined, planned.linear.whole_path
    if isinstance(site, DoRALinear) != (joined is not None):
        found, expected = ("", "no ") if joined is None else ("no ", "")
        raise ValueError(f"{path}: found {found}adapter in the model, expected {expected}adapter as in {folder}")
    if joined is not None and (site.adapter.dim, site.scaling) != (joined.dim, joined.scaling):
        found, expected = (
            f"dim {adapter.dim} and alpha {adapter.alpha:g}{' with rsLoRA' * adapter.use_rslora}"
            for adapter in (site.adapter, joined)
        )
        raise ValueError(f"{path}: found {found} in the model, expected {expected} for {folder}")


def _joined_maybe(
    linear: NamedLinear, adapter: PeftAdapter, hf_parts: HFParts | OwnNames, vocabulary: int | None
) -> JoinedAdapter | None:
    path = linear.whole_path if isinstance(hf_parts, OwnNames) else linear.gpt_path
    if adapter.shapes.keys().isdisjoint(hf_parts.paths(path)):
        return None
    check_unsharded(path, linear.module)
    spec = linear.describe()
    in_features, out_features = spec.true_sizes
    num_rows = out_features if path != OUTPUT_LAYER or vocabulary is None else vocabulary
    rows = hf_parts.rows(path, num_rows)
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


def _plan_attachments(imports: Sequence[PlannedImport], dropout: float) -> list[tuple[DoRA, AttachPlan]]:
    """Plans for the layers of each chunk that have the same dim and alpha."""
    groups: dict[tuple[int, int, float, bool], tuple[nn.Module, list[str]]] = {}
    for planned in imports:
        if planned.joined is not None:
            chunk, joined = planned.linear.chunk, planned.joined
            _, paths = groups.setdefault((id(chunk), joined.dim, joined.alpha, joined.use_rslora), (chunk, []))
            paths.append(planned.linear.whole_path)
    plans = []
    for (_, dim, alpha, use_rslora), (chunk, paths) in groups.items():
        dora = DoRA(
            target_modules=paths,
            dim=dim,
            alpha=alpha,
            dropout=dropout,
            lora_A_init_method="zero",
            use_rslora=use_rslora,
        )
        plans.append((dora, plan_attachment(dora, [chunk])))
    return plans


def _attach(chunks: Sequence[nn.Module], plans: Sequence[tuple[DoRA, AttachPlan]], training: bool) -> None:
    for chunk in chunks:
        chunk.requires_grad_(False)
    for dora, plan in plans:
        attach(dora, plan, seed=0)
    for chunk in chunks:
        chunk.train(training)
        if not training:
            chunk.requires_grad_(False)
    rebuild_gradient_buffers(chunks)


@torch.no_grad()
def _copy(site: DoRALinear, joined: JoinedAdapter) -> None:
    """Copy this rank's shards of an adapter into a layer; every rank of its tensor-parallel group calls it."""
    adapter = site.adapter

    def own(name: str, whole: Tensor) -> Tensor:
        return adapter.placements[name].pad_and_shard(whole, adapter.tp_rank, adapter.tp_size)

    adapter.linear_in.weight.copy_(own("linear_in.weight", joined.lora_a))
    adapter.linear_out.weight.copy_(own("linear_out.weight", joined.lora_b))
    # The norm itself, as a forward pass computes it, so that a row without an adapter is bitwise its base.
    norm = site._get_weight_norm()
    magnitude = own("weight_magnitude", joined.magnitude).to(norm)
    is_adapted = own("weight_magnitude", joined.has_magnitude).to(norm.device)
    adapter.weight_magnitude.copy_(torch.where(is_adapted, magnitude, norm))
