"""Reads the input of `export`, `merge` and `chat`: a run or a checkpoint, and the base of its adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dora_fx.app.bases.base_model import load_checkpoint, name_of_base, resolve_base
from dora_fx.app.errors import UserError
from dora_fx.app.hub import pinned_name
from dora_fx.app.runs import Display, checkpoint_in, read_options_file, run_of
from dora_fx.checkpoint import (
    ATTENTION_AND_MLP,
    CheckpointError,
    WholeAdapter,
    check_base,
    open_checkpoint,
    read_adapters,
)
from dora_fx.files import check_new_folder, new_folder
from dora_fx.hf import PeftModule, base_digests, split_adapter
from dora_fx.megatron import ATTENTION, MLP
from dora_fx.models import DecoderNames, HFCheckpoint, HFParts, architecture_of, check_size, load_hf_config

T = TypeVar("T")


@dataclass(frozen=True)
class SavedAdapter:
    """A saved adapter, by Megatron's layers and by its base's Hugging Face layers.

    Attributes:
        path: of the checkpoint.
        base, base_path: the base's name, from the user or the run, and its path. If it is on the Hugging Face hub, the
            name has a commit, and the path is its folder of the cache, without weights before `load_base`.
        config: the base's transformers config.
        names: naming scheme of the model that the adapter was trained on.
        layers: adapters by the paths of Megatron layers in a GPTModel.
        modules: the same adapters by the paths of Hugging Face layers.
    """

    path: Path
    base: str
    base_path: Path
    config: Any
    names: DecoderNames
    layers: dict[str, WholeAdapter]
    modules: dict[str, PeftModule]


def open_saved_adapter(parsed: dict[str, Any]) -> SavedAdapter:
    """Check the arguments of `export` and `merge`, and read the adapter; the base's weights are not read.

    Raises:
        UserError: the target is taken, the checkpoint or the base is missing or damaged, or the adapter does not fit
            the base.
    """
    or_user_error("--to ", check_new_folder, Path(parsed["to"]))
    return read_saved_adapter(Path(parsed["checkpoint"]), parsed["base"])


def read_saved_adapter(source: Path, named_base: str | None) -> SavedAdapter:
    """Read the adapter of a run or a checkpoint, and the config of its base.

    Args:
        source: a run folder, or a checkpoint.
        named_base: value of `--base`; by default the base in the run's options.

    Raises:
        UserError: the checkpoint or the base is missing or damaged, or the adapter does not fit the base.
    """
    base = named_base or _base_of(source)
    path = checkpoint_in(source)
    layers = or_user_error("", read_adapters, path)
    base = pinned_name("--base", "model", base) or base
    base_path = _resolve(base, Display(), is_named=bool(named_base), with_weights=False)
    config = or_user_error(f"--base {base}: ", load_hf_config, base_path)
    names = _names(path, config)
    layers = {names.gpt_path(layer): adapter for layer, adapter in layers.items()}
    modules = or_user_error(f"{path} on --base {base}: ", _modules, config, layers)
    return SavedAdapter(path, base, base_path, config, names, layers, modules)


def load_base(saved: SavedAdapter, display: Display) -> HFCheckpoint:
    """Load the base in the dtype of A and B, in which the adapter was trained; `display` shows how.

    Raises:
        UserError: it cannot be loaded, or the adapter was trained on other weights.
    """
    dtype = next(iter(saved.layers.values())).tensors["linear_in.weight"].dtype
    path = _resolve(saved.base, display, is_named=True)
    with display.phase(f"loading {name_of_base(saved.base, path)}"):
        checkpoint = load_checkpoint(path, dtype)
    or_user_error(f"--base {saved.base}: ", _check_digests, saved, checkpoint)
    return checkpoint


def _check_digests(saved: SavedAdapter, checkpoint: HFCheckpoint) -> None:
    directory, manifest = open_checkpoint(saved.path)
    found = base_digests(
        checkpoint.config,
        checkpoint.state_dict,
        manifest.base,
        adapted=saved.layers,
        non_homogeneous_layers=manifest.non_homogeneous_layers,
        names=saved.names,
    )
    check_base(directory, manifest, found, any_base=False)


def write_folder(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary folder, and rename it to `target`; raise UserError if that fails."""

    def fill() -> None:
        with new_folder(target) as temporary:
            write(temporary)

    or_user_error(f"--to {target}: ", fill)


def or_user_error(prefix: str, function: Callable[..., T], *args: Any) -> T:
    """Call a function; convert its errors about files and values to UserError with a prefix."""
    try:
        return function(*args)
    except (CheckpointError, ValueError, OSError) as error:
        raise UserError(f"{prefix}{error}") from error


def _resolve(base: str, display: Display, *, is_named: bool, with_weights: bool = True) -> Path:
    try:
        return resolve_base(base, display, with_weights)
    except UserError as error:
        if is_named:
            raise
        raise UserError(f"{error}; if it was moved since the run was started, give its new path with --base") from error


def _base_of(source: Path) -> str:
    """Return the base that a run was started with."""
    folder = run_of(source)
    if not folder.config_file.is_file():
        raise UserError(f"{source}: found no config.yaml of a run, which names the base; give --base")
    options = read_options_file(folder.config_file)
    if "base" not in options:
        raise UserError(f"{folder.config_file}: found no base in it; give --base")
    return str(options["base"])


def _names(path: Path, config: Any) -> DecoderNames:
    """Return the naming scheme of a checkpoint's layers; raise UserError if no GPTModel has such layers."""
    _, manifest = or_user_error("", open_checkpoint, path)
    hybrid = manifest.layout.get("hybrid")
    if hybrid is None:
        return DecoderNames(None, config.num_hidden_layers)
    if hybrid != ATTENTION_AND_MLP:
        raise UserError(
            f"{path}: found the adapter of a HybridModel with other layers, expected attention and MLP in turn, as in "
            "the base"
        )
    return DecoderNames((ATTENTION + MLP) * config.num_hidden_layers, config.num_hidden_layers)


def _modules(config: Any, layers: Mapping[str, WholeAdapter]) -> dict[str, PeftModule]:
    """Split the adapters among the Hugging Face layers; raise ValueError for layers that the base does not have."""
    architecture = architecture_of(config)
    parts = HFParts.of(architecture.hf, architecture)
    modules: dict[str, PeftModule] = {}
    for path, adapter in layers.items():
        columns, rows = adapter.tensors["linear_in.weight"].shape[1], adapter.tensors["linear_out.weight"].shape[0]
        check_size(path, (rows, columns), architecture)
        own = adapter.settings
        modules |= split_adapter(path, adapter.tensors, own.alpha, parts, use_rslora=own.use_rslora)
    return modules
