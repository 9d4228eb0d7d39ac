"""The two files of a Hugging Face PEFT DoRA adapter: adapter_config.json and adapter_model.safetensors.

base_model.model.<path>.lora_A.weight            [r, in]
base_model.model.<path>.lora_B.weight            [out, r]
base_model.model.<path>.lora_magnitude_vector    [out]

Each expert's layers have tensors of their own, as where they are `nn.Linear`, and the config says so under `experts`.

transformers reads these files itself where `from_pretrained` finds them, and takes a magnitude by the name that PEFT's
module has, with `.weight` at its end, alone: of PEFT's files it forgets them (seen in 5.24). PEFT takes both names.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dora_fx.models import LM_HEAD
from dora_fx.modules import low_rank_scaling

logger = logging.getLogger(__name__)

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SUFFIXES = {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
NAME_IN_MODULE = ".weight"
# A key of the config that PEFT does not know, and its value: beside experts that are parameters, PEFT's files differ.
EXPERTS_KEY, PER_EXPERT = "experts", "per_expert"
_OF_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class PeftModule:
    """The adapter of one Hugging Face linear layer: A `[r, in]`, B `[out, r]`, m `[out]`, and what scales B A."""

    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor
    alpha: float
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return low_rank_scaling(self.alpha, self.lora_a.shape[0], self.use_rslora)


def is_of_expert(path: str) -> bool:
    """Return whether a Hugging Face layer is one of an expert's."""
    return _OF_EXPERT.search(path) is not None


def peft_tensors(modules: Mapping[str, PeftModule]) -> dict[str, Tensor]:
    """Tensors of adapters by the names that PEFT's files have; `modules` by the path in the Hugging Face model."""
    return {
        f"{PREFIX}{path}{suffix}": getattr(module, name).contiguous()
        for path, module in modules.items()
        for name, suffix in SUFFIXES.items()
    }


def write_peft_adapter(
    folder: Path,
    modules: Mapping[str, PeftModule],
    *,
    all_paths: Iterable[str],
    dropout: float,
    base_model: str | None,
    revision: str | None = None,
    task_type: str | None = "CAUSAL_LM",
    for_transformers: bool = False,
) -> None:
    """Fill an empty folder with an adapter, of a causal language model unless PEFT is told otherwise.

    Args:
        modules: by the path in the Hugging Face model.
        all_paths: of the layers that the Hugging Face model has; layers of a name that are all adapted are a target by
            their name.
        dropout: of the adapters, for further training.
        base_model, revision: what PEFT finds the base by.
        task_type: PEFT's; None for none.
        for_transformers: name magnitudes so that transformers finds them too; else as PEFT does.

    Raises:
        OSError: the files cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = peft_tensors(modules)
    if for_transformers:
        end = SUFFIXES["magnitude"]
        tensors = {key + NAME_IN_MODULE * key.endswith(end): tensor for key, tensor in tensors.items()}
    try:
        save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{TENSOR_FILE} cannot be written ({error})") from error
    ranks = {path: module.lora_a.shape[0] for path, module in modules.items()}
    # PEFT has one flag for all. Where layers differ, alpha alone can say the scaling, to rounding.
    use_rslora = all(module.use_rslora for module in modules.values())
    alphas = {
        path: _plain_number(module.scaling * ranks[path] if module.use_rslora and not use_rslora else module.alpha)
        for path, module in modules.items()
    }
    rank, rank_pattern = _common_and_pattern(ranks)
    alpha, alpha_pattern = _common_and_pattern(alphas)
    config = {
        "alpha_pattern": alpha_pattern,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "revision": revision,
        "target_modules": _targets(list(modules), all_paths),
        "task_type": task_type,
        "use_dora": True,
        "use_rslora": use_rslora,
        **({EXPERTS_KEY: PER_EXPERT} if any(map(is_of_expert, modules)) else {}),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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


def _common_and_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and a pattern for the layers that have another."""
    common = Counter(values.values()).most_common(1)[0][0]
    kinds: dict[str, set[Any]] = {}
    for path, value in values.items():
        kinds.setdefault(_kind(path), set()).add(value)
    pattern = {}
    for path, value in values.items():
        if value != common:
            pattern[_kind(path) if len(kinds[_kind(path)]) == 1 else re.escape(path)] = value
    return common, pattern


def _targets(paths: list[str], all_paths: Iterable[str]) -> list[str]:
    """Names of the layers of which all of that name are adapted, and whole paths of the others."""
    adapted, present = Counter(map(_kind, paths)), Counter(map(_kind, all_paths))
    return sorted({_kind(path) if adapted[_kind(path)] == present[_kind(path)] else path for path in paths})


def _kind(path: str) -> str:
    return path.rpartition(".")[2]


def _plain_number(value: float) -> float:
    return int(value) if value == int(value) else value
