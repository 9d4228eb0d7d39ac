"""DoRA adapters to and from Hugging Face PEFT, at any tensor- and pipeline-parallel size.

A fused Megatron layer and the Hugging Face layers that it is made of share their input, so A goes to each of them
and the rows of B and m are dealt out: export is exact. The way back is in `import_adapter.py`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from dora_fx.function.placement import ADAPTER_TENSORS
from dora_fx.hf.layers import (
    NamedLinear,
    adapted_linears,
    gpt_config,
    named_architecture,
    named_linears,
    true_vocabulary,
)
from dora_fx.hf.new_folder import check_new_folder, new_folder
from dora_fx.hf.peft_files import PeftModule, write_peft_adapter
from dora_fx.megatron.wrappers import Model, check_unsharded, chunks_of, unwrap
from dora_fx.models.base_files import CONFIG
from dora_fx.models.gpt_model import noted_architecture_maybe
from dora_fx.models.hf_architectures import (
    HF_ARCHITECTURES,
    LM_HEAD,
    OUTPUT_LAYER,
    SUPPORTED_MODEL_TYPES,
    HFArchitecture,
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
    raise_on_every_rank(_problem_maybe(chunks, sites, target, base_model, vocab_size, model_type), world_group())
    dropout = _dropout_of_all_ranks(sites)
    config = gpt_config(chunks)
    vocabulary = true_vocabulary(config, sites, vocab_size)
    parts = HFParts.of(named_architecture(chunks, model_type), config)
    modules: dict[str, PeftModule] = {}
    for part in _layer_by_layer(sites, parts, config.num_layers, vocabulary):
        modules.update(part)
    problem = None
    if _global_rank() == 0:
        try:
            with new_folder(target) as temporary:
                write_peft_adapter(
                    temporary,
                    modules,
                    num_layers=config.num_layers,
                    dropout=dropout,
                    base_model=base_model,
                    revision=revision,
                )
        except OSError as error:
            problem = f"{target}: {error}"
        if model_type is None and noted_architecture_maybe(unwrap(chunks[0])) is None:
            _warn_of_assumed_names(parts.hf, base_model)
        warn_of_tied_output(modules, tied=bool(unwrap(chunks[0]).share_embeddings_and_output_weights))
        logger.info("exported %d adapters to %s", len(modules), target)
    raise_on_every_rank(problem, world_group())


def split_adapter(path: str, tensors: Mapping[str, Tensor], alpha: float, parts: HFParts) -> dict[str, PeftModule]:
    """The adapters of the Hugging Face layers that one Megatron layer is made of.

    Args:
        path: of the layer, with its number in the whole model.
        tensors: whole tensors without padding: `linear_in.weight`, `linear_out.weight` and `weight_magnitude`.
        alpha: of the adapter.
        parts: of the model, says which rows go where.
    """
    lora_a, lora_b, magnitude = (tensors[name] for name in ADAPTER_TENSORS)
    return {
        name: PeftModule(lora_a.clone(), lora_b[rows], magnitude[rows], alpha)
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
    """On global rank 0 the adapters of each layer of the whole model in turn; nothing on the others."""
    shards = {id(site.chunk): AdapterShards(site.chunk) for site in sites}
    prefixes = [*(f"decoder.layers.{index}." for index in range(num_layers)), OUTPUT_LAYER]
    for prefix in prefixes:
        own: dict[str, PeftModule] = {}
        for site in sites:
            if site.whole_path.startswith(prefix):
                gathered = _whole_adapter(site, shards[id(site.chunk)])
                if site.whole_path == OUTPUT_LAYER and vocabulary is not None:
                    gathered = cut_rows(gathered, vocabulary)
                own.update(split_adapter(site.whole_path, gathered, site.module.adapter.alpha, parts))
        yield _to_first_rank(own)


def _whole_adapter(site: NamedLinear, shards: AdapterShards) -> dict[str, Tensor]:
    names = {name: f"{site.path}.adapter.{name}" for name in ADAPTER_TENSORS}
    return {name: shards.gather(full, shards.parameters[full]).cpu() for name, full in names.items()}


def _to_first_rank(own: dict[str, PeftModule]) -> dict[str, PeftModule]:
    group = world_group()
    if not has_other_ranks(group):
        return own
    # Tensor- and data-parallel replicas hold the same whole tensors.
    is_speaker = parallel_state.get_tensor_model_parallel_rank() == 0 and _data_parallel_rank() == 0
    parts = gather_objects_on_first_rank(own if is_speaker else {}, group)
    return {path: module for part in parts for path, module in part.items()}


def _data_parallel_rank() -> int:
    return int(parallel_state.get_data_parallel_rank(with_context_parallel=True))


def _dropout_of_all_ranks(sites: Sequence[NamedLinear]) -> float:
    """The dropout of all adapters on all ranks; a pipeline stage may have none of its own."""
    found = gather_objects([site.module.adapter.dropout for site in sites], world_group())
    dropouts = [dropout for part in found for dropout in part]
    if not dropouts:
        raise ValueError("found no adapted layer, expected a model that DoRA was called on")
    return one_dropout(dropouts)


def _global_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _problem_maybe(
    chunks: Sequence[nn.Module],
    sites: Sequence[NamedLinear],
    target: Path,
    base_model: str | None,
    vocab_size: int | None,
    model_type: str | None,
) -> str | None:
    try:
        config = gpt_config(chunks)
        hf = named_architecture(chunks, model_type)
        base_fields = _config_of_directory(base_model)
        _check_model_type(hf, base_fields, base_model)
        vocabulary = true_vocabulary(config, named_linears(chunks), vocab_size)
        for site in sites:
            check_unsharded(site.whole_path, site.module)
            HFParts.of(hf, config).rows(site.whole_path, _whole_rows(site))
            if site.whole_path == OUTPUT_LAYER:
                _check_vocabulary(vocabulary or _whole_rows(site), base_fields, base_model)
        if _global_rank() == 0:
            check_new_folder(target)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _config_of_directory(base_model: str | None) -> dict[str, Any]:
    """The config of a base that is a directory, empty for others."""
    if base_model is None:
        return {}
    try:
        found = json.loads((Path(base_model) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # A name at a hub, or a file that whoever loads the base will complain about.
        return {}
    return found if isinstance(found, dict) else {}


def _check_model_type(hf: HFArchitecture, base_fields: Mapping[str, Any], base_model: str | None) -> None:
    """Raise ValueError if the base, where its config is at hand, names its layers otherwise."""
    found = base_fields.get("model_type")
    base = HF_ARCHITECTURES.get(found) if isinstance(found, str) else None
    if base is not None and base.linears != hf.linears:
        raise ValueError(
            f"{base_model}: found model_type {found!r} in {CONFIG}, expected a base that names its layers as "
            f"{hf.model_type} does; pass model_type={found!r} if the model is of that base"
        )


def _warn_of_assumed_names(hf: HFArchitecture, base_model: str | None) -> None:
    """Log whose names a model's layers were given, where nothing says that they are the right ones."""
    if _config_of_directory(base_model).get("model_type") not in SUPPORTED_MODEL_TYPES:
        logger.warning(
            "the model does not say what architecture it is of: its layers were named as those of %s; pass model_type, "
            "because PEFT skips layers whose names it does not find",
            hf.model_type,
        )


def _check_vocabulary(exported: int, base_fields: Mapping[str, Any], base_model: str | None) -> None:
    """Raise ValueError unless lm_head's rows are the tokens of the base, where its config is at hand."""
    expected = base_fields.get("vocab_size")
    if expected is not None and expected != exported:
        raise ValueError(
            f"{OUTPUT_LAYER}: {LM_HEAD}'s adapter would have {exported} rows, expected the {expected} tokens that "
            f"{Path(base_model or '') / CONFIG} says; pass vocab_size={expected} if the rows beyond pad the vocabulary"
        )


def _whole_rows(site: NamedLinear) -> int:
    return int(site.module.adapter.placements["weight_magnitude"].shape[0])
