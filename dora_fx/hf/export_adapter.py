"""DoRA adapters to and from Hugging Face PEFT, at any tensor- and pipeline-parallel size.

A fused Megatron layer and the Hugging Face layers that it is made of share their input, so A goes to each of them
and the rows of B and m are dealt out: export is exact. The way back is in `import_adapter.py`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn

from dora_fx.attach.merge import NOTHING_ADAPTED
from dora_fx.function.placement import ADAPTER_TENSORS
from dora_fx.hf.base_names import check_model_type, check_vocabulary, config_of_directory, warn_of_assumed_names
from dora_fx.hf.layers import (
    NamedLinear,
    adapted_linears,
    gpt_config,
    named_architecture,
    named_linears,
    num_hf_layers,
    true_vocabulary,
)
from dora_fx.hf.new_folder import check_new_folder, new_folder
from dora_fx.hf.peft_files import PeftModule, peft_tensors, write_peft_adapter
from dora_fx.hf.send import is_speaker, send_units
from dora_fx.megatron.wrappers import Model, check_unsharded, chunks_of, unwrap
from dora_fx.models.hf_architectures import (
    LM_HEAD,
    OUTPUT_LAYER,
)
from dora_fx.models.hf_parts import HFParts
from dora_fx.modules.whole_tensors import AdapterShards
from dora_fx.ranks.agreement import raise_on_every_rank
from dora_fx.ranks.exchange import gather_objects, gather_objects_on_first_rank
from dora_fx.ranks.groups import has_other_ranks, world_group

logger = logging.getLogger(__name__)


def export_hf(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    revision: str | None = None,
    vocab_size: int | None = None,
    model_type: str | None = None,
) -> None:
    """Write the model's adapters as a DoRA adapter that Hugging Face PEFT loads.

    Every rank calls it. Whole tensors go to global rank 0 one layer at a time, and it writes the files: the folder
    is whole or absent. A and B keep their dtype, magnitudes stay in float32 (or float64), padding is cut off. An
    adapted output layer that is tied to the embedding is exported too, with a warning: see `warn_of_tied_output`.

    Args:
        model: a Megatron GPTModel of a supported architecture, or a list or a tuple of its chunks, bare or wrapped.
        folder: a name that is free, or an empty folder.
        base_model, revision: a Hugging Face name or directory, for PEFT to find the base by.
        vocab_size: number of tokens of the base, where Megatron padded the output layer to more rows. Those beyond are
            cut off an adapter of it. A model of Megatron-Bridge knows it itself.
        model_type: of the base's config, whose names the layers get. A model of `build_gpt_model` knows it itself;
            others are named as Llama's, as they are of most architectures, with a warning unless the config of a
            `base_model` that is a directory says the same.

    Raises:
        ValueError: on every rank: no layer is adapted, one has no Hugging Face counterpart, adapters differ in
            dropout, the folder exists or cannot be written, `model_type` is not that of the model, or a `base_model`
            that is a directory has another vocabulary than the output layer has rows, or other layers.
    """
    chunks = chunks_of(model)
    target = Path(folder)
    sites = adapted_linears(chunks)
    problem = _problem_maybe(chunks, sites, base_model, vocab_size, model_type) or _folder_problem_maybe(target)
    raise_on_every_rank(problem, world_group())
    dropout = _dropout_of_all_ranks(sites)
    config = gpt_config(chunks)
    vocabulary = true_vocabulary(config, sites, vocab_size)
    parts = HFParts.of(named_architecture(chunks, model_type), config)
    modules: dict[str, PeftModule] = {}
    for part in _layer_by_layer(sites, parts, num_hf_layers(chunks), vocabulary):
        modules.update(_to_first_rank(part))
    if _global_rank() == 0:
        try:
            with new_folder(target) as temporary:
                write_peft_adapter(
                    temporary,
                    modules,
                    num_layers=num_hf_layers(chunks),
                    dropout=dropout,
                    base_model=base_model,
                    revision=revision,
                )
        except OSError as error:
            problem = f"{target}: {error}"
        warn_of_assumed_names(chunks, model_type, base_model)
        warn_of_tied_output(modules, tied=bool(unwrap(chunks[0]).share_embeddings_and_output_weights))
        logger.info("exported %d adapters to %s", len(modules), target)
    raise_on_every_rank(problem, world_group())


def iter_adapter(
    model: Model, *, every_rank: bool = False, vocab_size: int | None = None, model_type: str | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Stream the model's adapters, whole, under the names of PEFT's files and bitwise as `export_hf` writes them.

    Every rank calls it and takes the stream to its end: what is yielded has been sent. The order is that of the layers,
    whatever the layout. Beyond the model it needs memory for the adapters of one layer.

    Args:
        model, vocab_size, model_type: as in `export_hf`.
        every_rank: let every rank have the tensors; else global rank 0 alone, and the others get an empty stream.

    Raises:
        ValueError: on every rank, and at once, as `export_hf`.
    """
    chunks = chunks_of(model)
    sites = adapted_linears(chunks)
    raise_on_every_rank(_problem_maybe(chunks, sites, None, vocab_size, model_type), world_group())
    _dropout_of_all_ranks(sites)
    config = gpt_config(chunks)
    parts = HFParts.of(named_architecture(chunks, model_type), config)
    warn_of_assumed_names(chunks, model_type)
    layers = _layer_by_layer(sites, parts, num_hf_layers(chunks), true_vocabulary(config, sites, vocab_size))
    return send_units((peft_tensors(layer) for layer in layers), every_rank=every_rank)


def split_adapter(
    path: str, tensors: Mapping[str, Tensor], alpha: float, parts: HFParts, *, use_rslora: bool
) -> dict[str, PeftModule]:
    """The adapters of the Hugging Face layers that one Megatron layer is made of.

    Args:
        path: of the layer, with its number in the whole model.
        tensors: whole tensors without padding: `linear_in.weight`, `linear_out.weight` and `weight_magnitude`.
        alpha, use_rslora: of the adapter.
        parts: of the model, says which rows go where.
    """
    lora_a, lora_b, magnitude = (tensors[name] for name in ADAPTER_TENSORS)
    return {
        name: PeftModule(lora_a.clone(), lora_b[rows], magnitude[rows], alpha, use_rslora)
        for name, rows in parts.rows(path, magnitude.shape[0]).items()
    }


def cut_rows(tensors: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The whole tensors of an adapter for the first rows of its layer alone."""
    return {name: tensor if name == "linear_in.weight" else tensor[:count] for name, tensor in tensors.items()}


def warn_of_tied_output(modules: Container[str], *, tied: bool) -> None:
    """Log what PEFT does with the adapter of an output layer that is tied to the embedding.

    It computes with it as Megatron does, but merges it into the one weight that both have. PEFT's own option
    `ensure_weight_tying` would adapt the embedding too, which is another function.
    """
    if tied and LM_HEAD in modules:
        logger.warning(
            "%s is adapted and tied to the embedding: PEFT computes with the adapter and warns about it, but its "
            "merge_and_unload would change the embedding too; keep the adapter unmerged",
            LM_HEAD,
        )


def one_dropout(dropouts: Iterable[float]) -> float:
    """The dropout that all adapters have; raises ValueError if there are several: PEFT's files have one."""
    found = sorted(set(dropouts))
    if len(found) > 1:
        raise ValueError(f"found adapters with dropout {found}, expected one for all: PEFT's files have one")
    return float(found[0])


def _layer_by_layer(
    sites: Sequence[NamedLinear], parts: HFParts, num_layers: int, vocabulary: int | None
) -> Iterator[dict[str, PeftModule]]:
    """The adapters of each layer of the whole model in turn, whole, on the ranks of the layer's pipeline stage."""
    shards = {id(site.chunk): AdapterShards(site.chunk) for site in sites}
    prefixes = [*(f"decoder.layers.{index}." for index in range(num_layers)), OUTPUT_LAYER]
    for prefix in prefixes:
        own: dict[str, PeftModule] = {}
        for site in sites:
            if site.gpt_path.startswith(prefix):
                gathered = _whole_adapter(site, shards[id(site.chunk)])
                if site.whole_path == OUTPUT_LAYER and vocabulary is not None:
                    gathered = cut_rows(gathered, vocabulary)
                adapter = site.module.adapter
                own.update(split_adapter(site.gpt_path, gathered, adapter.alpha, parts, use_rslora=adapter.use_rslora))
        yield own


def _whole_adapter(site: NamedLinear, shards: AdapterShards) -> dict[str, Tensor]:
    names = {name: f"{site.path}.adapter.{name}" for name in ADAPTER_TENSORS}
    return {name: shards.gather(full, shards.parameters[full]).cpu() for name, full in names.items()}


def _to_first_rank(own: dict[str, PeftModule]) -> dict[str, PeftModule]:
    group = world_group()
    if not has_other_ranks(group):
        return own
    parts = gather_objects_on_first_rank(own if is_speaker() else {}, group)
    return {path: module for part in parts for path, module in part.items()}


def _dropout_of_all_ranks(sites: Sequence[NamedLinear]) -> float:
    """The dropout of all adapters on all ranks; a pipeline stage may have none of its own."""
    found = gather_objects([site.module.adapter.dropout for site in sites], world_group())
    dropouts = [dropout for part in found for dropout in part]
    if not dropouts:
        raise ValueError(NOTHING_ADAPTED)
    return one_dropout(dropouts)


def _global_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _problem_maybe(
    chunks: Sequence[nn.Module],
    sites: Sequence[NamedLinear],
    base_model: str | None,
    vocab_size: int | None,
    model_type: str | None,
) -> str | None:
    try:
        config = gpt_config(chunks)
        hf = named_architecture(chunks, model_type)
        base_fields = config_of_directory(base_model)
        check_model_type(hf, base_fields, base_model)
        vocabulary = true_vocabulary(config, named_linears(chunks), vocab_size)
        for site in sites:
            check_unsharded(site.whole_path, site.module)
            HFParts.of(hf, config).rows(site.gpt_path, _whole_rows(site))
            if site.whole_path == OUTPUT_LAYER:
                check_vocabulary(vocabulary or _whole_rows(site), base_fields, base_model)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _folder_problem_maybe(target: Path) -> str | None:
    try:
        if _global_rank() == 0:
            check_new_folder(target)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _whole_rows(site: NamedLinear) -> int:
    return int(site.module.adapter.placements["weight_magnitude"].shape[0])
