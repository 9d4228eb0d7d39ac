"""Train adapters on a transformers model with `transformers.Trainer`, compiled through this package's backend.

    python examples/transformers_trainer.py OUT [BASE]

OUT is a new folder for the run's checkpoints and the adapter. BASE is a model's directory or its name at a hub. Without
one, a tiny Llama with random weights, which is written to OUT, learns tokens that follow a rule.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_utils import get_last_checkpoint

import dora_fx

STEPS, LENGTH = 5, 32
TEXT = "DoRA decomposes a weight into a magnitude and a direction, and learns a low-rank change of the direction. "


def load_base(out: Path, base: str | None) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """The model, and samples to learn."""
    if base is not None:
        tokens = transformers.AutoTokenizer.from_pretrained(base)(TEXT * 40, return_tensors="pt").input_ids[0]
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    else:
        torch.manual_seed(1234)
        sizes = dict(vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(out / "base")
        model = transformers.AutoModelForCausalLM.from_pretrained(out / "base")
        tokens = torch.arange(40 * LENGTH) % 7
    return model, [dict(input_ids=part, labels=part) for part in tokens.split(LENGTH) if len(part) == LENGTH]


# --8<-- [start:main]
class PrintLoss(transformers.TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            print(f"step {state.global_step}: loss {float(logs['loss']):.4f}")


class CheckFirst(transformers.TrainerCallback):
    """Prove on one batch that what should train trains, with the optimizer that Trainer made."""

    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        self.batch = batch

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        print(dora_fx.check(model, {name: value.to(model.device) for name, value in self.batch.items()}, optimizer))


def main(out: Path, base: str | None) -> None:
    model, samples = load_base(out, base)
    dora = dora_fx.DoRA(target_modules="all-linear", dim=8, alpha=16)
    dora(model)
    print(dora.report)
    # Trainer and accelerate accept only names of backends that they know; a model compiled in place needs none of them.
    dora_fx.compile_model(model)

    # A second run goes on where the last checkpoint was saved.
    checkpoint = get_last_checkpoint(str(out))
    done = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
    settings = transformers.TrainingArguments(
        str(out),
        max_steps=done + STEPS,
        save_steps=STEPS,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
    )
    batch = {name: torch.stack([sample[name] for sample in samples[:4]]) for name in samples[0]}
    callbacks = [PrintLoss(), CheckFirst(batch)]
    trainer = transformers.Trainer(model, settings, train_dataset=samples, callbacks=callbacks)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint)

    dora_fx.export_hf(model, out / f"adapter-{done + STEPS}")
    with torch.no_grad(), dora_fx.merged(model.eval()):
        one = {name: value[:1].to(model.device) for name, value in batch.items()}
        print(f"merged model: loss {model(**one).loss.item():.4f}")


# --8<-- [end:main]
if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) == 3 else None)
