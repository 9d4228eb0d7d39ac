"""The two files of a Hugging Face PEFT DoRA adapter: adapter_config.json and adapter_model.safetensors.

base_model.model.<path>.lora_A.weight            [r, in]
base_model.model.<path>.lora_B.weight            [out, r]
base_model.model.<path>.lora_magnitude_vector    [out]

transformers reads these files itself where `from_pretrained` finds them, and takes a magnitude by the name that PEFT's
module has, with `.weight` at its end, alone: of PEFT's files it forgets them (seen in 5.24). PEFT takes both names.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from dora_fx.hf.peft_patterns import by_pattern, check_patterns
from dora_fx.models.hf_architectures import LM_HEAD
from dora_fx.models.reading import check_readable, read_json_object, reading
from dora_fx.modules.adapter import low_rank_scaling

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SUFFIXES = {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
_NAME_IN_MODULE = ".weight"

# What the options that change the function must be. PiSSA, OLoRA and their like change the base weights too.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (True,),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva"),
}
# Options that are honoured, describe the files, or concern training under PEFT alone.
_KNOWN = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "auto_mapping"),
    *("megatron_core", "qalora_group_size", "eva_config", "runtime_config", "loftq_config"),
}


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


def peft_tensors(modules: Mapping[str, PeftModule]) -> dict[str, Tensor]:
    """Tensors of adapters by the names that PEFT's files have; `modules` by the path in the Hugging Face model."""
    return {
        f"{_PREFIX}{path}{suffix}": getattr(module, name).contiguous()
        for path, module in modules.items()
        for name, suffix in _SUFFIXES.items()
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
        end = _SUFFIXES["magnitude"]
        tensors = {key + _NAME_IN_MODULE * key.endswith(end): tensor for key, tensor in tensors.items()}
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
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class PeftAdapter:
    """A PEFT adapter on disk; tensors are read when they are asked for.

    Attributes:
        folder: where it lies.
        config: adapter_config.json.
        shapes: path of each adapted layer -> shapes of `lora_a`, `lora_b` and `magnitude`.
    """

    folder: Path
    config: dict[str, Any]
    shapes: dict[str, dict[str, tuple[int, ...]]]
    _keys: dict[str, dict[str, str]] = field(repr=False)

    @cached_property
    def _file(self) -> Any:
        from safetensors import safe_open

        return safe_open(self.folder / TENSOR_FILE, framework="pt")

    def rank(self, path: str) -> int:
        """The rank that the config states for a layer."""
        return int(by_pattern(self.config.get("rank_pattern"), path, self.config.get("r")))

    def alpha(self, path: str) -> float:
        """The lora_alpha that the config states for a layer."""
        alpha: float = by_pattern(self.config.get("alpha_pattern"), path, self.config.get("lora_alpha"))
        return alpha

    @property
    def use_rslora(self) -> bool:
        """Return whether B A is scaled by alpha / sqrt(r)."""
        return bool(self.config.get("use_rslora"))

    def tensor(self, path: str, name: str) -> Tensor:
        """Read `lora_a`, `lora_b` or `magnitude` of a layer."""
        return self._file.get_tensor(self._keys[path][name])

    def is_target(self, path: str) -> bool | None:
        """Return whether the config targets a layer; None where it excludes layers in a way not followed here."""
        targets = self.config.get("target_modules")
        if self.config.get("layers_to_transform") is not None or self.config.get("exclude_modules"):
            return None
        if isinstance(targets, str):
            return path != LM_HEAD if targets == "all-linear" else re.fullmatch(targets, path) is not None
        return any(path == target or path.endswith(f".{target}") for target in targets or ())


def read_peft_adapter(folder: Path) -> PeftAdapter:
    """Open a PEFT DoRA adapter and check everything that needs no model.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file cannot be read; an option, or a tensor, has no equal here; a magnitude is missing.
    """
    for name in (CONFIG_FILE, TENSOR_FILE):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name}: no such file, expected a PEFT adapter in safetensors format")
    config = read_json_object(folder / CONFIG_FILE)
    check_readable(folder / TENSOR_FILE)
    _check_config(folder / CONFIG_FILE, config)
    keys, shapes = _tensors_by_layer(folder / TENSOR_FILE)
    adapter = PeftAdapter(folder, config, shapes, keys)
    for path, found in shapes.items():
        _check_rank(adapter, path, found)
    return adapter


def _check_config(file: Path, config: Mapping[str, Any]) -> None:
    for name, expected in _REQUIRED.items():
        found = config.get(name, {"bias": "none", "init_lora_weights": True}.get(name))
        # True == 1 in Python, and JSON's are told apart.
        if not any(found is value or (isinstance(value, str) and found == value) for value in expected):
            raise ValueError(f"{file}: {name} is {found!r}, which is not supported; expected {_one_of(expected)}")
    for name, value in config.items():
        if name not in _REQUIRED and name not in _KNOWN and value:
            raise ValueError(f"{file}: {name} is {value!r}, which is not supported; expected it unset")
    check_patterns(file, config)
    for name, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        for value in (config.get(name), *(config.get(pattern) or {}).values()):
            if not _is_positive(value, whole=name == "r"):
                raise ValueError(f"{file}: {name} or {pattern} has {value!r}, expected a positive number")


def _tensors_by_layer(file: Path) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, tuple[int, ...]]]]:
    from safetensors import safe_open

    keys: dict[str, dict[str, str]] = {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    with reading(file, "the file is damaged or incomplete, download it again"), safe_open(file, "pt") as opened:
        found_shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118  no dict
    for key, shape in found_shapes.items():
        path, name = _layer_and_name(file, key)
        keys.setdefault(path, {})[name] = key
        shapes.setdefault(path, {})[name] = shape
    for path, found in shapes.items():
        for name, suffix in _SUFFIXES.items():
            if name not in found:
                raise ValueError(
                    f"{file}: {path} has {', '.join(sorted(found))} and no {suffix[1:]}; "
                    "expected A, B and the magnitude of every adapted layer"
                )
    if not shapes:
        raise ValueError(f"{file}: found no tensor, expected an adapter's")
    return keys, shapes


def _layer_and_name(file: Path, key: str) -> tuple[str, str]:
    for name, suffix in (*_SUFFIXES.items(), ("magnitude", _SUFFIXES["magnitude"] + _NAME_IN_MODULE)):
        if key.startswith(_PREFIX) and key.endswith(suffix):
            return key.removeprefix(_PREFIX).removesuffix(suffix), name
    if key.endswith(".base_layer.weight"):
        raise ValueError(
            f"{file}: found a copy of a base weight, {key!r}, expected an adapter alone; "
            "save it from PEFT with save_embedding_layers=False"
        )
    expected = ", ".join(f"{_PREFIX}<path>{suffix}" for suffix in _SUFFIXES.values())
    raise ValueError(f"{file}: found a tensor {key!r}, expected names of the form {expected}")


def _check_rank(adapter: PeftAdapter, path: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    rank, (a, b) = adapter.rank(path), (shapes["lora_a"], shapes["lora_b"])
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
        raise ValueError(
            f"{adapter.folder / TENSOR_FILE}: {path} has A of shape {a} and B of shape {b}, "
            f"expected the rank {rank} that {CONFIG_FILE} states"
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


def _is_positive(value: Any, whole: bool) -> bool:
    kinds = int if whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _one_of(values: tuple[Any, ...]) -> str:
    return " or ".join(map(repr, values))
