"""Adapt a Hugging Face model, train it for a few steps, export the adapter for PEFT, and merge it.

    python examples/hugging_face.py OUT [BASE]

OUT is a new folder for the adapter. BASE is a directory or a GGUF file of a Llama, Mistral, Qwen2, Qwen3 or Phi-3
model. Without one, a tiny Llama with random weights learns random tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import dora_fx
from dora_fx.megatron.world import megatron_world
from dora_fx.models import build_gpt_model, causal_mask, load_hf_checkpoint

STEPS, LENGTH = 5, 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXT = "DoRA decomposes a weight into a magnitude and a direction, and learns a low-rank change of the direction."


def load_base(base: str | None) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    """The model's config, its tensors by their names in transformers, and a batch of tokens `[b, s + 1]` to learn."""
    if base is not None:
        checkpoint = load_hf_checkpoint(Path(base))
        tokens = checkpoint.tokenizer(TEXT, return_tensors="pt").input_ids[:, : LENGTH + 1]
        return checkpoint.config, checkpoint.state_dict, tokens
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return config, LlamaForCausalLM(config).state_dict(), torch.randint(config.vocab_size, (2, LENGTH + 1))


# --8<-- [start:main]
def main(out: str, base: str | None) -> None:
    config, state_dict, tokens = load_base(base)
    tokens = tokens.to(DEVICE)
    length = tokens.shape[1] - 1
    batch = {
        "input_ids": tokens[:, :-1],
        "position_ids": torch.arange(length, device=DEVICE).expand(len(tokens), length),
        "attention_mask": causal_mask(length, DEVICE),
        "labels": tokens[:, 1:],
    }

    dora = dora_fx.DoRA(target_modules=["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"], dim=8, alpha=16)
    model = dora(build_gpt_model(config, state_dict, device=DEVICE))
    print(dora.report)
    dora_fx.compile_model(model)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for step in range(STEPS):
        loss = model(**batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.4f}")

    model.eval()
    with torch.no_grad():
        print(f"adapted model: loss {model(**batch).mean().item():.4f}")
        dora_fx.export_hf(model, out, base_model=base)
        dora_fx.merge(model)
        print(f"merged model: loss {model(**batch).mean().item():.4f}")
    print(f"the adapter for PEFT is in {out}")


# --8<-- [end:main]
if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    # The world of this one process: Megatron's layers need their process groups.
    with megatron_world(DEVICE, seed=1234):
        main(sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else None)
