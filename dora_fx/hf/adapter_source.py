"""The adapters of a model layer by layer, whole, under Hugging Face names.

A fused Megatron layer and the Hugging Face layers that it is made of share their input, so A goes to each of them
and the rows of B and m are dealt out: that is exact. A transformers model's layers have their names already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dora_fx.attach import NOTHING_ADAPTED
from dora_fx.function import ADAPTER_TENSORS
from dora_fx.hf.base_names import check_model_type, check_vocabulary, config_of_directory
from dora_fx.hf.layers import (
    NamedLinear,
    adapted_linears,
    every_hf_path,
    gpt_config,
    named_architecture,
    named_linears,
    num_hf_layers,
    true_vocabulary,
)
from dora_fx.hf.peft_files import PeftModule
from dora_fx.hf.transformers_model import own_adapters, transformers_model_maybe
from dora_fx.megatron import check_unsharded, unwrap, walk
from dora_fx.models import OUTPUT_LAYER, HFParts
from dora_fx.modules import AdapterShards, DoRALinear, adapter_not_finite_maybe
from dora_fx.ranks import gather_objects, raise_on_every_rank, world_group


@dataclass(frozen=True)
class AdapterSource:
    """A model's adapters for PEFT, and what its files say beside them.

    Attributes:
        layers: the adapters of each layer in turn, by their paths in the Hugging Face model.
        on_ranks: whether they lie on the ranks of a world, all of which take part; else this process has them all.
        all_paths: of the Hugging Face model's layers, adapted or not.
        is_tied: whether the output layer multiplies by the embedding.
        base_model: the name that the model has itself.
        task_type: of PEFT; None for none of its own.
    """

    layers: Iterator[dict[str, PeftModule]]
    on_ranks: bool
    all_paths: Sequence[str]
    dropout: float
    is_tied: bool
    base_model: str | None = None
    task_type: str | None = "CAUSAL_LM"


def adapter_source(
    chunks: Sequence[nn.Module],
    base_model: str | None,
    vocab_size: int | None,
    model_type: str | None,
    other_problem: str | None = None,
) -> AdapterSource:
    """The adapters of a model; every rank of a world calls it.

    Args:
        chunks: bare or wrapped, as `wrappers.chunks_of` returns them.
        base_model, vocab_size, model_type: as in `export_hf`.
        other_problem: what the caller found wrong on this rank.

    Raises:
        ValueError: on every rank, as `export_hf` says, or with the other problem.
    """
    own = transformers_model_maybe(chunks, vocab_size=vocab_size, model_type=model_type)
    if own is not None:
        raise_on_every_rank(other_problem, None)
        return _own_source(own)
    sites = adapted_linears(chunks)
    problem = _problem_maybe(chunks, sites, base_model, vocab_size, model_type) or other_problem
    problem = problem or adapter_not_finite_maybe((site.whole_path, site.module) for site in sites)
    raise_on_every_rank(problem, world_group())
    dropout = _dropout_of_all_ranks(sites)
    config, num_layers = gpt_config(chunks), num_hf_layers(chunks)
    hf = named_architecture(chunks, model_type)
    vocabulary = true_vocabulary(config, sites, vocab_size)
    return AdapterSource(
        layers=_layer_by_layer(sites, HFParts.of(hf, config), num_layers, vocabulary),
        on_ranks=True,
        all_paths=every_hf_path(hf, num_layers),
        dropout=dropout,
        is_tied=bool(unwrap(chunks[0]).share_embeddings_and_output_weights),
    )


def _own_source(model: Any) -> AdapterSource:
    layers = own_adapters(model)
    sites = adapted_linears([model])
    dropouts = [site.module.adapter.dropout for site in sites]
    if not dropouts:
        raise ValueError(NOTHING_ADAPTED)
    raise_on_every_rank(adapter_not_finite_maybe((site.path, site.module) for site in sites), None)
    return AdapterSource(
        layers=layers,
        on_ranks=False,
        all_paths=[named.path for named in walk(model, DoRALinear)],
        dropout=one_dropout(dropouts),
        is_tied=bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False)),
        base_model=model.name_or_path or None,
        task_type="CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
    )


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


def _dropout_of_all_ranks(sites: Sequence[NamedLinear]) -> float:
    """The dropout of all adapters on all ranks; a pipeline stage may have none of its own."""
    found = gather_objects([site.module.adapter.dropout for site in sites], world_group())
    dropouts = [dropout for part in found for dropout in part]
    if not dropouts:
        raise ValueError(NOTHING_ADAPTED)
    return one_dropout(dropouts)


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


def _whole_rows(site: NamedLinear) -> int:
    return int(site.module.adapter.placements["weight_magnitude"].shape[0])
