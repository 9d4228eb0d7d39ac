"""The adapters of a model layer by layer, whole, under Hugging Face names.

A fused Megatron layer and the Hugging Face layers that it is made of share their input, so A goes to each of them
and the rows of B and m are dealt out: that is exact. A transformers model's layers have their names already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from dora_fx.function import ADAPTER_TENSORS
from dora_fx.hf.counterpart import Counterpart, GPTCounterpart, NamedLinear
from dora_fx.hf.model_record import ModelRecord
from dora_fx.hf.peft_files import PeftModule
from dora_fx.megatron import expert_number_maybe
from dora_fx.models import OUTPUT_LAYER, HFParts
from dora_fx.modules import gather_whole


@dataclass(frozen=True)
class AdapterSource:
    """A model's adapters for PEFT, and what its files say beside them.

    Attributes:
        layers: the adapters of each layer in turn, by their paths in the Hugging Face model. Where the model lies on
            ranks, all of them take part.
        dropout: of all adapters.
        all_paths: of the Hugging Face model's layers, adapted or not.
        is_tied: whether the output layer multiplies by the embedding.
        base_model: the name that the model has itself.
        task_type: of PEFT; None for none of its own.
    """

    layers: Iterator[dict[str, PeftModule]]
    dropout: float
    all_paths: tuple[str, ...]
    is_tied: bool
    base_model: str | None = None
    task_type: str | None = "CAUSAL_LM"


def adapter_source(record: ModelRecord, hf: Counterpart, dropout: float) -> AdapterSource:
    """The adapters of a model that was checked; `dropout` is that of all."""
    model = record.model
    if isinstance(hf, GPTCounterpart):
        is_tied = bool(model.share_embeddings_and_output_weights)
        return AdapterSource(_layer_by_layer(hf), dropout, hf.paths, is_tied)
    return AdapterSource(
        layers=({linear.path: _copied_adapter(linear)} for linear in hf.adapted),
        dropout=dropout,
        all_paths=hf.paths,
        is_tied=bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False)),
        base_model=model.name_or_path or None,
        task_type="CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
    )


def _layer_by_layer(hf: GPTCounterpart) -> Iterator[dict[str, PeftModule]]:
    """The adapters of each layer of the whole model in turn, whole, on the ranks of the layer's pipeline stage."""
    prefixes = [*(f"decoder.layers.{index}." for index in range(hf.decoder.num_layers)), OUTPUT_LAYER]
    for prefix in prefixes:
        own: dict[str, PeftModule] = {}
        # Expert by expert, also of a module that holds several.
        for linear in sorted(hf.adapted, key=_expert_or_none_first):
            if linear.gpt_path.startswith(prefix):
                whole = _whole_adapter(linear)
                if linear.whole_path == OUTPUT_LAYER and hf.vocabulary is not None:
                    whole = _cut_rows(whole, hf.vocabulary)
                adapter = linear.module.adapter
                own |= split_adapter(linear.gpt_path, whole, adapter.alpha, hf.parts, use_rslora=adapter.use_rslora)
        yield own


def _expert_or_none_first(linear: NamedLinear) -> int:
    number = expert_number_maybe(linear.gpt_path)
    return -1 if number is None else number


def _whole_adapter(linear: NamedLinear) -> dict[str, Tensor]:
    """The whole tensors of an adapter on the CPU; every rank of the layer's tensor-parallel group calls it."""
    adapter = linear.module.adapter
    return {
        name: gather_whole(tensor, adapter.matrix_placements[name], adapter.tp_group).cpu()
        for name, tensor in zip(ADAPTER_TENSORS, linear.module.matrix_factors(linear.matrix), strict=True)
    }


def _cut_rows(tensors: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The whole tensors of an adapter for the first rows of its layer alone."""
    return {name: tensor if name == "linear_in.weight" else tensor[:count] for name, tensor in tensors.items()}


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


def _copied_adapter(linear: NamedLinear) -> PeftModule:
    """The adapter of a transformers model's layer, in new tensors on the CPU."""
    adapter = linear.module.adapter
    a, b, magnitude = (tensor.detach().to("cpu", copy=True) for tensor in linear.module.factors())
    return PeftModule(a, b, magnitude, adapter.alpha, adapter.use_rslora)
