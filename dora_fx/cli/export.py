"""`dora-fx export`: a run's adapter for Hugging Face PEFT, or the merged model for transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from torch import Tensor

from dora_fx.cli.base_model import load_checkpoint, resolve_base
from dora_fx.cli.errors import UserError
from dora_fx.cli.progress import Display
from dora_fx.cli.run_folder import RunFolder
from dora_fx.hf.export_adapter import ADAPTER_TENSORS, split_adapter
from dora_fx.hf.new_folder import check_new_folder, new_folder
from dora_fx.hf.peft_files import PeftModule, write_peft_adapter
from dora_fx.models import architecture_of
from dora_fx.models.hf_checkpoint import load_hf_config
from dora_fx.models.hf_merged import merged_state_dict, save_hf_model
from dora_fx.models.hf_parts import HeadShape

HELP = "write a run's adapter for Hugging Face PEFT, or its merged model for transformers"

# What PEFT can find by name; the GGUF file that the name stands for in this command is a quantised copy.
_HF_NAMES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}

T = TypeVar("T")


def parser() -> Any:
    """The command's jsonargparse parser."""
    import jsonargparse

    command = jsonargparse.ArgumentParser(description=__doc__, exit_on_error=False)
    command.add_argument("run", type=Path, help="folder of a run of dora-fx finetune")
    command.add_argument("--to", type=Path, required=True, help="folder to write; it must not exist, or be empty")
    command.add_argument(
        "--merged", action="store_true", help="the whole model with the adapter merged in, and its tokenizer"
    )
    command.add_argument(
        "--base-name",
        type=str | None,
        default=None,
        help="Hugging Face name or directory by which PEFT finds the base; the run's own base by default",
    )
    return command


def run(parsed: dict[str, Any]) -> int:
    """Check everything, then write; return the exit code.

    Raises:
        UserError: for folders, files and models that the command cannot work with.
    """
    folder, target, display = Path(parsed["run"]), Path(parsed["to"]), Display()
    if parsed["merged"] and parsed["base_name"] is not None:
        raise UserError("--base-name: leave it out with --merged; a merged model needs no base")
    _or_user_error("--to ", check_new_folder, target)
    description, tensors = _saved_adapter(folder)
    path = resolve_base(description["base"])
    config = _or_user_error(f"--base {description['base']}: ", load_hf_config, path)
    modules = _or_user_error(f"{folder}: ", _modules, config, description, tensors)
    if parsed["merged"]:
        with display.phase(f"loading {path.name}"):
            checkpoint = load_checkpoint(path, _dtype(folder))
        with display.phase("merging"):
            merged = _or_user_error(f"{folder}: ", merged_state_dict, checkpoint, modules)
        _or_user_error(f"--to {target}: ", _write, target, lambda into: save_hf_model(checkpoint, merged, into))
        display.say(f"merged model: {target}")
        return 0

    def write(into: Path) -> None:
        write_peft_adapter(
            into,
            modules,
            num_layers=config.num_hidden_layers,
            dropout=description["dropout"],
            base_model=base_name,
        )

    base_name = parsed["base_name"] or _HF_NAMES.get(description["base"], description["base"])
    _or_user_error(f"--to {target}: ", _write, target, write)
    display.say(f"PEFT adapter of {base_name}: {target}")
    return 0


def _write(target: Path, write: Callable[[Path], None]) -> None:
    with new_folder(target) as temporary:
        write(temporary)


def _saved_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter.json and the tensors of adapter.safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = folder / "adapter.json", RunFolder(folder).adapter, folder / "config.yaml"
    for file in files:
        if not file.is_file():
            raise UserError(f"{folder}: there is no {file.name}, expected the folder of a saved run")
    try:
        description = json.loads(files[0].read_text(encoding="utf-8"))
        missing = {"base", "dim", "alpha", "dropout"} - set(description)
    except (ValueError, TypeError) as error:
        raise UserError(f"{files[0]}: cannot be read ({error})") from error
    if missing:
        raise UserError(f"{files[0]}: there is no {', '.join(sorted(missing))}, expected what finetune writes")
    try:
        return description, load_file(files[1])
    except SafetensorError as error:
        raise UserError(f"{files[1]}: cannot be read ({error})") from error


def _dtype(folder: Path) -> str:
    """The dtype of the run's base weights, in which the merged ones are written."""
    return str(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["dtype"])


def _modules(config: Any, description: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, PeftModule]:
    """The adapters of the Hugging Face layers; raises ValueError for tensors that are not a whole adapter's."""
    heads = HeadShape.of(architecture_of(config))
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        path, _, kind = name.partition(".adapter.")
        layers.setdefault(path, {})[kind] = tensor
    modules: dict[str, PeftModule] = {}
    for path, found in layers.items():
        if found.keys() != set(ADAPTER_TENSORS):
            raise ValueError(f"{path}: found {sorted(found)}, expected {sorted(ADAPTER_TENSORS)}")
        rank = found["linear_in.weight"].shape[0]
        if rank != description["dim"]:
            raise ValueError(f"{path}: found an adapter of dim {rank}, adapter.json says {description['dim']}")
        modules.update(split_adapter(path, found, description["alpha"], heads))
    return modules


def _or_user_error(prefix: str, function: Callable[..., T], *args: Any) -> T:
    try:
        return function(*args)
    except (ValueError, OSError) as error:
        raise UserError(f"{prefix}{error}") from error
