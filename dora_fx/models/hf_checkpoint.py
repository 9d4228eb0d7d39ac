"""Read a base model with transformers: a directory of its own format, or one GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_fx.models.architecture import architecture_of
from dora_fx.safe_files.hf_files import check_base_files


@dataclass(frozen=True)
class HFCheckpoint:
    """A transformers config, the tensors as the transformers model names them, and the tokenizer."""

    config: Any
    state_dict: dict[str, Tensor]
    tokenizer: Any


def load_hf_checkpoint(path: Path, dtype: torch.dtype = torch.float32) -> HFCheckpoint:
    """Load a checkpoint from local files; nothing is downloaded.

    Args:
        path: a directory with config.json, weights and a tokenizer, or a .gguf file.
        dtype: the tensors are converted to it; quantised GGUF tensors are dequantised.

    Raises:
        FileNotFoundError: there is no such file or directory.
        UnsupportedModelError: the config has something that `build_gpt_model` refuses; in a directory, found
            before the weights are read.
        UnsafeFileError: reading the files could run code, take all memory or never end.
        ValueError, OSError: transformers cannot read the files, or tensors of the config's model are missing.
    """
    from transformers import AutoConfig, AutoTokenizer

    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory")
    check_base_files(path)
    source: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if path.is_dir():
        config = AutoConfig.from_pretrained(path, **source)
        architecture_of(config)
        tokenizer = AutoTokenizer.from_pretrained(path, **source)
        model = _load_model(path, dtype, source | {"config": config})
    else:
        # A GGUF file's config costs as much time to read as its tokenizer, so it is read once, with the model.
        source["gguf_file"] = path.name
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
        model = _load_model(path.parent, dtype, source)
        # transformers notes the file's quantisation here although it dequantised every tensor.
        model.config.__dict__.pop("quantization_config", None)
    return HFCheckpoint(model.config, dict(model.state_dict()), tokenizer)


def load_hf_config(path: Path) -> Any:
    """The transformers config of a checkpoint that `load_hf_checkpoint` loads, without its weights.

    Raises:
        FileNotFoundError, ValueError, OSError: there is no such file or directory, or it cannot be read.
    """
    from transformers import AutoConfig

    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory")
    check_base_files(path)
    source: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if path.is_dir():
        return AutoConfig.from_pretrained(path, **source)
    return AutoConfig.from_pretrained(path.parent, gguf_file=path.name, **source)


def _load_model(folder: Path, dtype: torch.dtype, source: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    # The config may name an attention to download and run; nothing is computed with this model.
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True, **source
    )
    # transformers draws a missing tensor at random and says so in a warning only.
    for problem in ("missing_keys", "mismatched_keys"):
        if info[problem]:
            raise ValueError(f"{folder}: the checkpoint has {problem.replace('_', ' ')}: {sorted(info[problem])}")
    return model
