"""`dora-fx export`: writes the adapter of a run or a checkpoint for Hugging Face PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dora_fx.app.bases import open_saved_adapter, or_user_error, write_folder
from dora_fx.app.options import hub_name_maybe
from dora_fx.app.runs import Display
from dora_fx.hf import one_dropout, warn_of_tied_output, write_peft_adapter
from dora_fx.models import architecture_of

# The model on Hugging Face, which PEFT can load by name; this command's GGUF file is a quantised copy of it.
_HF_NAMES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def run(parsed: dict[str, Any]) -> int:
    """Check everything, then write; return the exit code.

    Raises:
        UserError: a folder, a file or a model is not usable.
    """
    saved = open_saved_adapter(parsed)
    dropouts = [layer.settings.dropout for layer in saved.layers.values()]
    dropout = or_user_error(f"{saved.path}: ", one_dropout, dropouts)
    architecture = architecture_of(saved.config)
    all_paths = architecture.hf.linear_paths(architecture.num_layers, architecture.num_experts)
    base_name, revision = (parsed["base_name"], None) if parsed["base_name"] else _known_to_peft(saved.base)

    def write(into: Path) -> None:
        write_peft_adapter(
            into, saved.modules, all_paths=all_paths, dropout=dropout, base_model=base_name, revision=revision
        )

    write_folder(Path(parsed["to"]), write)
    warn_of_tied_output(saved.modules, tied=bool(saved.config.tie_word_embeddings))
    Display().say(f"PEFT adapter of {base_name}: {parsed['to']}")
    return 0


def _known_to_peft(base: str) -> tuple[str, str | None]:
    """Return the name by which PEFT finds a base, and the commit of a repository on the Hugging Face hub."""
    on_hub = hub_name_maybe(base)
    return (_HF_NAMES.get(base, base), None) if on_hub is None else (on_hub.repository, on_hub.revision)
