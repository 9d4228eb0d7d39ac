"""Opens PEFT DoRA adapters from anywhere, and checks everything that needs no model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from dora_fx.files import check_readable, read_json_object, reading
from dora_fx.hf.peft_files import CONFIG_FILE, EXPERTS_KEY, NAME_IN_MODULE, PER_EXPERT, PREFIX, SUFFIXES, TENSOR_FILE
from dora_fx.hf.peft_patterns import by_pattern, check_patterns, is_target

# What the options that change the function must be. PiSSA, OLoRA and their like change the base weights too.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (True,),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva"),
    EXPERTS_KEY: (None, PER_EXPERT),
}
# Options that are honoured, describe the files, or concern training under PEFT alone.
_KNOWN = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "auto_mapping"),
    *("megatron_core", "qalora_group_size", "eva_config", "runtime_config", "loftq_config"),
}
# Of the factors and magnitudes. Files in other dtypes are quantised, and their scales would be elsewhere.
_DTYPES = ("F64", "F32", "F16", "BF16")


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

    @property
    def dropout(self) -> float:
        """The dropout of all layers."""
        return float(self.config.get("lora_dropout") or 0.0)

    def tensor(self, path: str, name: str) -> Tensor:
        """Read `lora_a`, `lora_b` or `magnitude` of a layer."""
        return self._file.get_tensor(self._keys[path][name])

    def is_target(self, path: str) -> bool | None:
        """Return whether PEFT would adapt a layer of a model; None where the config leaves that to PEFT's defaults."""
        return is_target(self.config, path)

    def idle_patterns(self) -> list[str]:
        """Patterns of ranks and alphas that name no layer of the files."""
        return [
            f"{option} {pattern!r}"
            for option in ("rank_pattern", "alpha_pattern")
            for pattern in self.config.get(option) or {}
            if not any(by_pattern({pattern: True}, path, False) for path in self.shapes)
        ]


def read_peft_adapter(folder: Path, base_model: str | None = None) -> PeftAdapter:
    """Open a PEFT DoRA adapter and check everything that needs no model.

    Args:
        folder: where its two files are.
        base_model: the name of the base that it has to be of; None for any.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file cannot be read; an option, or a tensor, has no equal here; a magnitude is missing, or there
            twice; the adapter is of another base.
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
    of = config.get("base_model_name_or_path")
    if base_model is not None and of != base_model:
        raise ValueError(f"{folder}: the adapter is of the base {of!r}, expected {base_model!r}")
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
    # "false" would be true, and a probability in quotes fails where nothing knows of the file.
    if not isinstance(config.get("use_rslora"), bool | None):
        raise ValueError(f"{file}: use_rslora is {config['use_rslora']!r}, expected true or false")
    dropout = config.get("lora_dropout") or 0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"{file}: lora_dropout is {dropout!r}, expected a probability below 1")
    for name, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        for value in (config.get(name), *(config.get(pattern) or {}).values()):
            if not _is_positive(value, whole=name == "r"):
                raise ValueError(f"{file}: {name} or {pattern} has {value!r}, expected a positive number")


def _tensors_by_layer(file: Path) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, tuple[int, ...]]]]:
    from safetensors import safe_open

    keys: dict[str, dict[str, str]] = {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    with reading(file, "the file is damaged or incomplete, download it again"), safe_open(file, "pt") as opened:
        found_tensors = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  no dict
        kinds = {key: (tuple(found.get_shape()), found.get_dtype()) for key, found in found_tensors.items()}
    for key, (shape, dtype) in kinds.items():
        path, name = _layer_and_name(file, key)
        if dtype not in _DTYPES:
            raise ValueError(f"{file}: {key} has the dtype {dtype}, expected one of {', '.join(_DTYPES)}")
        if name in keys.setdefault(path, {}):
            raise ValueError(f"{file}: found {keys[path][name]} and {key}, expected one of them")
        keys[path][name] = key
        shapes.setdefault(path, {})[name] = shape
    for path, found in shapes.items():
        for name, suffix in SUFFIXES.items():
            if name not in found:
                raise ValueError(
                    f"{file}: {path} has {', '.join(sorted(found))} and no {suffix[1:]}; "
                    "expected A, B and the magnitude of every adapted layer"
                )
    if not shapes:
        raise ValueError(f"{file}: found no tensor, expected an adapter's")
    return keys, shapes


def _layer_and_name(file: Path, key: str) -> tuple[str, str]:
    for name, suffix in (*SUFFIXES.items(), ("magnitude", SUFFIXES["magnitude"] + NAME_IN_MODULE)):
        if key.startswith(PREFIX) and key.endswith(suffix):
            return key.removeprefix(PREFIX).removesuffix(suffix), name
    if key.endswith(".base_layer.weight"):
        raise ValueError(
            f"{file}: found a copy of a base weight, {key!r}, expected an adapter alone; "
            "save it from PEFT with save_embedding_layers=False"
        )
    expected = ", ".join(f"{PREFIX}<path>{suffix}" for suffix in SUFFIXES.values())
    raise ValueError(f"{file}: found a tensor {key!r}, expected names of the form {expected}")


def _check_rank(adapter: PeftAdapter, path: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    rank, (a, b) = adapter.rank(path), (shapes["lora_a"], shapes["lora_b"])
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
        raise ValueError(
            f"{adapter.folder / TENSOR_FILE}: {path} has A of shape {a} and B of shape {b}, "
            f"expected the rank {rank} that {CONFIG_FILE} states"
        )


def _is_positive(value: Any, whole: bool) -> bool:
    kinds = int if whole else (int, float)
    # Python compares any integer with a float, and converts only some.
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _one_of(values: tuple[Any, ...]) -> str:
    return " or ".join(map(repr, values))
