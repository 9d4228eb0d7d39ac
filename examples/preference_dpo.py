"""Train adapters on preferences with TRL's `DPOTrainer`; the reference is the base, which the adapters leave as it is.

    python -m pip install trl
    python examples/preference_dpo.py OUT [BASE]

OUT is a folder for adapters. Each run trains the last one further, against the same reference, and adds another. BASE
is a model's directory or its name at a hub, and has a chat template. Without one, a tiny Llama with random weights
learns the pairs, byte by byte.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import torch
import transformers
import trl

import dora_fx

STEPS, BATCH = 10, 4
PAIRS = Path(__file__).parent / "preferences.jsonl"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load_base(base: str | None) -> tuple[Any, Any]:
    """Return the model, and its tokenizer with a chat template."""
    if base is not None:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return model, transformers.AutoTokenizer.from_pretrained(base)
    letters = {letter: index for index, letter in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    by_bytes = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    by_bytes.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    by_bytes.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=by_bytes, eos_token="<|im_end|>", chat_template=TEMPLATE
    )
    torch.manual_seed(1234)
    sizes = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes)), tokenizer


# --8<-- [start:main]
class PrintRewards(transformers.TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "rewards/margins" in logs:
            loss, margin, accuracy = (float(logs[name]) for name in ("loss", "rewards/margins", "rewards/accuracies"))
            print(f"step {state.global_step}: loss {loss:.4f}, margin {margin:.4f}, accuracy {accuracy:.2f}")


def base_log_probs(trainer: Any) -> torch.Tensor:
    """Return the log-probabilities of each pair's answers in the model with its adapters off."""
    pairs = trainer.get_train_dataloader().collate_fn(list(trainer.train_dataset))
    with dora_fx.disable_adapter(trainer.model):
        return torch.stack(trainer.compute_ref_log_probs(trainer.model, trainer._prepare_inputs(pairs)))


def main(out: Path, base: str | None) -> None:
    model, tokenizer = load_base(base)
    dora_fx.DoRA(target_modules="all-linear", dim=8, alpha=16)(model)
    earlier = sorted(out.glob("adapter-*"))
    if earlier:
        dora_fx.import_hf(model, out / f"adapter-{len(earlier)}")

    pairs = datasets.Dataset.from_list([json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()])
    settings = trl.DPOConfig(
        str(out),
        precompute_ref_log_probs=True,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        bf16=False,  # TRL's default is autocast to bfloat16, which needs a GPU
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    # TRL computes the reference's log-probabilities here, once, with the model as it is: a trained adapter must be off.
    with dora_fx.disable_adapter(model):
        trainer = trl.DPOTrainer(model, args=settings, train_dataset=pairs, processing_class=tokenizer)
    trainer.add_callback(PrintRewards())
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()

    reference = torch.tensor([trainer.train_dataset["ref_chosen_logps"], trainer.train_dataset["ref_rejected_logps"]])
    change = (base_log_probs(trainer).cpu() - reference).abs().max() / reference.abs().max()
    print(f"reference: log-probabilities changed by {change:.1e} of the largest")
    dora_fx.export_hf(model, out / f"adapter-{len(earlier) + 1}")


# --8<-- [end:main]
if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) == 3 else None)
