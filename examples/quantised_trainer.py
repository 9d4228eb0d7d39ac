"""Train adapters on a base in 4 bits with `transformers.Trainer`, compiled through this package's backend.

    python -m pip install bitsandbytes
    python examples/quantised_trainer.py OUT [BASE]

OUT is a new folder for the adapter. BASE is a model's directory or its name at a hub; it is quantised to NF4 when it is
loaded. Without one, a tiny Llama with random weights, which is written to OUT, learns tokens that follow a rule.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import dora_fx

STEPS, LENGTH = 5, 32
TEXT = "DoRA decomposes a weight into a magnitude and a direction, and learns a low-rank change of the direction. "


def write_tiny_base(folder: Path) -> str:
    torch.manual_seed(1234)
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)
    return str(folder)


def samples_of(base: str | None) -> list[dict[str, torch.Tensor]]:
    if base is None:
        tokens = torch.arange(40 * LENGTH) % 7
    else:
        tokens = transformers.AutoTokenizer.from_pretrained(base)(TEXT * 40, return_tensors="pt").input_ids[0]
    return [dict(input_ids=part, labels=part) for part in tokens.split(LENGTH) if len(part) == LENGTH]


class PrintLoss(transformers.TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            print(f"step {state.global_step}: loss {float(logs['loss']):.4f}")


# --8<-- [start:main]
def main(out: Path, base: str | None) -> None:
    samples = samples_of(base)
    in_4_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base or write_tiny_base(out / "base"),
        quantization_config=in_4_bits,
        dtype=in_4_bits.bnb_4bit_compute_dtype,
        device_map="auto" if torch.cuda.is_available() else "cpu",
    )
    # Before anything evaluates the model: see docs/quantised.md.
    dora = dora_fx.DoRA(target_modules="all-linear", dim=8, alpha=16)
    dora(model)
    print(dora.report)
    dora_fx.compile_model(model)

    settings = transformers.TrainingArguments(
        str(out),
        max_steps=STEPS,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, settings, train_dataset=samples, callbacks=[PrintLoss()])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()

    # PEFT loads it over the same base, quantised alike.
    dora_fx.export_hf(model, out / "adapter")
    batch = {name: torch.stack([sample[name] for sample in samples[:4]]).to(model.device) for name in samples[0]}
    with torch.no_grad():
        print(f"adapted model: loss {model.eval()(**batch).loss.item():.4f}")
        # Dense while it is merged. The quantised weights are there again afterwards, as they were.
        with dora_fx.merged(model):
            print(f"merged model: loss {model(**batch).loss.item():.4f}")


# --8<-- [end:main]
if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) == 3 else None)
