"""Whether the base that an adapter is exported for has the layers and tokens that it is exported under."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from dora_fx.hf.layers import named_architecture
from dora_fx.megatron import unwrap
from dora_fx.models import (
    CONFIG,
    HF_ARCHITECTURES,
    LM_HEAD,
    OUTPUT_LAYER,
    SUPPORTED_MODEL_TYPES,
    HFArchitecture,
    noted_architecture_maybe,
)

logger = logging.getLogger(__name__)


def config_of_directory(base_model: str | None) -> dict[str, Any]:
    """The config of a base that is a directory, empty for others."""
    if base_model is None:
        return {}
    try:
        found = json.loads((Path(base_model) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # A name at a hub, or a file that whoever loads the base will complain about.
        return {}
    return found if isinstance(found, dict) else {}


def check_model_type(hf: HFArchitecture, base_fields: Mapping[str, Any], base_model: str | None) -> None:
    """Raise ValueError if the base, where its config is at hand, names its layers otherwise."""
    found = base_fields.get("model_type")
    base = HF_ARCHITECTURES.get(found) if isinstance(found, str) else None
    if base is not None and base.linears != hf.linears:
        raise ValueError(
            f"{base_model}: found model_type {found!r} in {CONFIG}, expected a base that names its layers as "
            f"{hf.model_type} does; pass model_type={found!r} if the model is of that base"
        )


def warn_of_assumed_names(chunks: Sequence[nn.Module], model_type: str | None, base_model: str | None = None) -> None:
    """Log on global rank 0 whose names a model's layers are given, where nothing says that they are the right ones."""
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    if not is_first or model_type is not None or noted_architecture_maybe(unwrap(chunks[0])) is not None:
        return
    if config_of_directory(base_model).get("model_type") not in SUPPORTED_MODEL_TYPES:
        logger.warning(
            "the model does not say what architecture it is of: its layers were named as those of %s; pass model_type, "
            "because PEFT skips layers whose names it does not find",
            named_architecture(chunks, None).model_type,
        )


def check_vocabulary(exported: int, base_fields: Mapping[str, Any], base_model: str | None) -> None:
    """Raise ValueError unless lm_head's rows are the tokens of the base, where its config is at hand."""
    expected = base_fields.get("vocab_size")
    if expected is not None and expected != exported:
        raise ValueError(
            f"{OUTPUT_LAYER}: {LM_HEAD}'s adapter would have {exported} rows, expected the {expected} tokens that "
            f"{Path(base_model or '') / CONFIG} says; pass vocab_size={expected} if the rows beyond pad the vocabulary"
        )
