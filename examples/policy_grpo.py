"""Train an adapter with TRL's `GRPOTrainer` against the base, or against another adapter, in the memory of one model.

    python -m pip install trl
    python examples/policy_grpo.py OUT [BASE]

OUT is a folder for adapters, one of each run. The reference of the first run is the base; a later run trains the last
adapter further, and its reference is that adapter as the run before left it. BASE is as for `preference_dpo.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from preference_dpo import PAIRS, load_base

import dora_fx

STEPS, BATCH, ANSWERS = 12, 24, 12


# --8<-- [start:main]
class Reference:
    """What TRL takes for a reference model: the policy's model with another adapter, or with none."""

    def __init__(self, model: Any, name: str | None) -> None:
        self.model, self.name = model, name

    def __call__(self, **inputs: Any) -> Any:
        is_base = self.name is None
        with dora_fx.disable_adapter(self.model) if is_base else dora_fx.adapter(self.model, self.name):
            return self.model(**inputs)


class PrintProgress(transformers.TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "kl" in logs:
            print(f"step {state.global_step}: reward {float(logs['reward']):.4f}, kl {float(logs['kl']):.6f}")


def share_of_ascii(completions: list[Any], **kwargs: Any) -> list[float]:
    """Reward answers for characters that a keyboard has."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(character.isascii() for character in text) / max(len(text), 1) for text in texts]


def main(out: Path, base: str | None) -> None:
    model, tokenizer = load_base(base)
    earlier = sorted(out.glob("adapter-*"))
    for name in ("policy", "reference") if earlier else ("policy",):
        dora_fx.add_adapter(model, name, dora_fx.DoRA(target_modules="all-linear", dim=8, alpha=16))
        with dora_fx.adapter(model, name):
            if earlier:
                dora_fx.import_hf(model, out / f"adapter-{len(earlier)}")
    reference = Reference(model, "reference" if earlier else None)
    token_ids = torch.arange(24)[None]
    with torch.no_grad():
        before = reference(input_ids=token_ids).logits

    questions = [json.loads(line)["prompt"] for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    settings = trl.GRPOConfig(
        str(out),
        beta=0.0,  # or TRL loads a second model; set below
        num_generations=ANSWERS,
        max_completion_length=16,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        bf16=False,  # TRL's default is autocast to bfloat16, which needs a GPU
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    prompts = datasets.Dataset.from_dict({"prompt": questions})
    trainer = trl.GRPOTrainer(model, share_of_ascii, args=settings, train_dataset=prompts, processing_class=tokenizer)
    trainer.beta, trainer.ref_model = 0.04, reference
    trainer.add_callback(PrintProgress())
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()

    with torch.no_grad():
        change = (reference(input_ids=token_ids.to(model.device)).logits.cpu() - before).abs().max()
    print(f"reference: logits changed by {change:.1e}")
    dora_fx.export_hf(model, out / f"adapter-{len(earlier) + 1}")


# --8<-- [end:main]
if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) == 3 else None)
