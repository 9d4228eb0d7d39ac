"""Whether a model's adapters can be one adapter of a Hugging Face base, by PEFT's rules and with the base's names."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_fx.attach import NOTHING_ADAPTED
from dora_fx.hf.counterpart import Counterpart, GPTCounterpart
from dora_fx.hf.model_record import ModelRecord
from dora_fx.megatron import check_unsharded
from dora_fx.models import CONFIG, HF_ARCHITECTURES, LM_HEAD, OUTPUT_LAYER, SUPPORTED_MODEL_TYPES
from dora_fx.modules import adapter_not_finite_maybe
from dora_fx.ranks import gather_objects

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NamedBase:
    """The base that a caller names.

    Attributes:
        name: of a directory, or at a hub; None for none.
        fields: its config, empty where that is not at hand.
    """

    name: str | None
    fields: Mapping[str, Any]


NO_BASE = NamedBase(None, {})


def named_base(name: str | None) -> NamedBase:
    """Read the config of a base that is a directory."""
    if name is None:
        return NO_BASE
    try:
        found = json.loads((Path(name) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # A name at a hub, or a file that whoever loads the base will complain about.
        found = None
    return NamedBase(name, found if isinstance(found, dict) else {})


def check_adapters(hf: Counterpart, base: NamedBase) -> None:
    """Check this rank's adapters for being those of Hugging Face layers.

    Raises:
        ValueError: naming a layer that has no counterpart in the base, or whose adapter is sharded, or has NaN or inf.
    """
    if isinstance(hf, GPTCounterpart):
        _check_model_type(hf, base)
    for linear in hf.adapted:
        check_unsharded(linear.whole_path, linear.module)
        if isinstance(hf, GPTCounterpart):
            num_rows = int(linear.module.adapter.matrix_placements["weight_magnitude"].shape[0])
            hf.parts.rows(linear.gpt_path, num_rows)
            if linear.whole_path == OUTPUT_LAYER:
                _check_vocabulary(hf.vocabulary or num_rows, base)
    problem = adapter_not_finite_maybe(dict.fromkeys((linear.whole_path, linear.module) for linear in hf.adapted))
    if problem is not None:
        raise ValueError(problem)


def _check_model_type(hf: GPTCounterpart, base: NamedBase) -> None:
    """Raise ValueError if the base, where its config is at hand, names its layers otherwise."""
    found = base.fields.get("model_type")
    of_base = HF_ARCHITECTURES.get(found) if isinstance(found, str) else None
    if of_base is not None and of_base.linears != hf.parts.hf.linears:
        raise ValueError(
            f"{base.name}: found model_type {found!r} in {CONFIG}, expected a base that names its layers as "
            f"{hf.model_type} does; pass model_type={found!r} if the model is of that base"
        )


def _check_vocabulary(exported: int, base: NamedBase) -> None:
    """Raise ValueError unless lm_head's rows are the tokens of the base, where its config is at hand."""
    expected = base.fields.get("vocab_size")
    if expected is not None and expected != exported:
        raise ValueError(
            f"{OUTPUT_LAYER}: {LM_HEAD}'s adapter would have {exported} rows, expected the {expected} tokens that "
            f"{Path(base.name or '') / CONFIG} says; pass vocab_size={expected} if the rows beyond pad the vocabulary"
        )


def dropout_of_all_ranks(record: ModelRecord, hf: Counterpart) -> float:
    """The dropout of all adapters; every rank that holds a part of the model calls it.

    Raises:
        ValueError: on every rank: nothing is adapted, or adapters differ in dropout.
    """
    # A pipeline stage may have no adapter of its own.
    of_ranks = gather_objects([linear.module.adapter.dropout for linear in hf.adapted], record.group)
    dropouts = [dropout for of_rank in of_ranks for dropout in of_rank]
    if not dropouts:
        raise ValueError(NOTHING_ADAPTED)
    return one_dropout(dropouts)


def one_dropout(dropouts: Iterable[float]) -> float:
    """The dropout that all adapters have; raises ValueError if there are several: PEFT's files have one."""
    found = sorted(set(dropouts))
    if len(found) > 1:
        raise ValueError(f"found adapters with dropout {found}, expected one for all: PEFT's files have one")
    return float(found[0])


def warn_of_assumed_names(hf: GPTCounterpart, base: NamedBase = NO_BASE) -> None:
    """Log whose names a model's layers are given, where nothing says that they are the right ones."""
    if hf.is_assumed and base.fields.get("model_type") not in SUPPORTED_MODEL_TYPES:
        logger.warning(
            "the model does not say what architecture it is of: its layers were named as those of %s; pass model_type, "
            "because PEFT skips layers whose names it does not find",
            hf.model_type,
        )
