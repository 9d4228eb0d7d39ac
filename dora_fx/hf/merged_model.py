"""A Hugging Face model with DoRA adapters merged into its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dora_fx.attach import merge_tensors
from dora_fx.files import writing
from dora_fx.function import magnitude_delta, norm_dtype
from dora_fx.hf.peft_files import PeftModule
from dora_fx.models import GENERATION_CONFIG, LM_HEAD, HFCheckpoint, copy_companions, empty_model, write_config


def merged_state_dict(checkpoint: HFCheckpoint, modules: Mapping[str, PeftModule]) -> dict[str, Tensor]:
    """The checkpoint's tensors with g * (W + s B A) in place of every adapted weight, in the weight's dtype.

    Products and norms are taken in float32 at least, one layer at a time.

    Args:
        checkpoint: the base model; it is not changed.
        modules: adapters by the path of their layer.

    Raises:
        ValueError: an adapter does not fit the checkpoint, or its weight is tied to the embedding.
    """
    merged = dict(checkpoint.state_dict)
    for path, module in modules.items():
        name = f"{path}.weight"
        weight = merged.get(name)
        expected = None if weight is None else (weight.shape[0], weight.shape[1])
        found = (module.lora_b.shape[0], module.lora_a.shape[1])
        if weight is None or found != expected:
            raise ValueError(f"{name}: found an adapter for a weight of shape {found}, the base has {expected}")
        if path == LM_HEAD and checkpoint.config.tie_word_embeddings:
            raise ValueError(
                f"{name}: the weight is tied to the embedding, which merging would change too; export the adapter "
                "(dora-fx export), which PEFT computes beside the base, or train it without output_layer among "
                "--target-modules and merge that"
            )
        merged[name] = _merge(weight, module, module.scaling)
    return merged


def save_hf_model(checkpoint: HFCheckpoint, state_dict: Mapping[str, Tensor], folder: Path) -> None:
    """Write weights, config and tokenizer, for `AutoModelForCausalLM` and `AutoTokenizer` to load.

    Of a base directory every other file that is no weight comes along, see `base_files.py`.

    Args:
        checkpoint: the base.
        state_dict: the tensors, named as the base's.
        folder: empty, to be filled.

    Raises:
        ValueError, OSError: a file of the base cannot be copied, or one cannot be written.
    """
    dtype = next(iter(state_dict.values())).dtype
    with writing("the model"):
        empty_model(checkpoint.config, dtype).save_pretrained(folder, state_dict=dict(state_dict))
        if not checkpoint.path.is_dir():
            checkpoint.tokenizer.save_pretrained(folder)
            return
    (folder / GENERATION_CONFIG).unlink(missing_ok=True)
    copy_companions(checkpoint.path, folder)
    write_config(checkpoint.path, checkpoint.config, dtype, folder)


@torch.no_grad()
def _merge(weight: Tensor, module: PeftModule, scaling: float) -> Tensor:
    unscaled = merge_tensors(weight, module.lora_a, module.lora_b, weight.new_zeros(weight.shape[0]), scaling)
    norm = torch.linalg.vector_norm(unscaled, dim=1)
    delta = magnitude_delta(module.magnitude.to(norm_dtype(weight.dtype)), norm)
    return unscaled.mul_(1.0 + delta[:, None]).to(weight.dtype)
