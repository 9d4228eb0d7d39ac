"""`dora-fx merge`: writes the base model with the adapter of a run or a checkpoint merged in, for transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dora_fx.app.bases import load_base, open_saved_adapter, or_user_error, write_folder
from dora_fx.app.runs import Display
from dora_fx.hf import merged_state_dict, save_hf_model
from dora_fx.models import companion_files


def run(parsed: dict[str, Any]) -> int:
    """Check everything, then load the base, merge and write; return the exit code.

    The weights are written in the dtype of A and B, in which the adapter was trained.

    Raises:
        UserError: a folder, a file or a model is not usable, or the adapter was trained on another base.
    """
    from transformers.utils.logging import disable_progress_bar

    # transformers would draw a bar while the weights are written, on a terminal and into logs.
    disable_progress_bar()
    target, display = Path(parsed["to"]), Display()
    saved = open_saved_adapter(parsed)
    if saved.base_path.is_dir():
        or_user_error(f"--base {saved.base}: ", companion_files, saved.base_path)
    checkpoint = load_base(saved, display)
    with display.phase("merging"):
        merged = or_user_error(f"{saved.path}: ", merged_state_dict, checkpoint, saved.modules)
    write_folder(target, lambda into: save_hf_model(checkpoint, merged, into))
    display.say(f"merged model: {target}")
    return 0
