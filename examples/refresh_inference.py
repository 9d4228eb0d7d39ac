"""Train with Megatron on two tensor-parallel ranks, and give a transformers model the merged weights after each step.

    torchrun --standalone --nproc-per-node 2 examples/refresh_inference.py [DTYPE]

The transformers model answers in a process of its own, as an inference engine would for reinforcement learning. DTYPE
is what it computes in, bfloat16 unless given. After each step the script says how far apart the log-probabilities of
the two are, and at the end what merging changed in each layer.
"""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import transformers
from tiny_gpt import DEVICE, LENGTH, VOCABULARY, world

import dora_fx
from dora_fx.models import build_gpt_model, causal_mask

STEPS, BATCH = 5, 4


def llama_config() -> Any:
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


# --8<-- [start:main]
@torch.no_grad()
def serve(trainer: Connection, dtype: torch.dtype) -> None:
    """Answer with a transformers model. New weights take the place of the old ones when all of them are there."""
    model = transformers.LlamaForCausalLM(llama_config()).to(dtype).eval()
    expected, staged = set(model.state_dict()), {}
    while True:
        try:
            request, *content = trainer.recv()
        except EOFError:
            # The trainer is gone. What it sent of a refresh that it did not complete was never used.
            return
        if request == "weight":
            staged[content[0]] = content[1]
        elif request == "replace":
            if set(staged) != expected:
                raise ValueError(f"found {len(staged)} weights, expected all {len(expected)}")
            # Parameters are exchanged, and no answer is given in between: it has all the old ones or all the new.
            model.load_state_dict(staged, assign=True)
            staged = {}
        elif request == "log_probs":
            tokens = content[0]
            logits = model(tokens[:, :-1]).logits.float()
            trainer.send(logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2))


def refresh(model: Any, engine: Connection | None, dtype: torch.dtype) -> None:
    """Send the merged weights one after another: no rank has a second model in memory, and no file is written."""
    for name, weight in dora_fx.iter_merged(model, dtype=dtype):
        # Rank 0 alone gets the stream; the others send it their shards.
        engine.send(("weight", name, weight.cpu()))
    if engine is not None:
        engine.send(("replace",))


def main(dtype: torch.dtype) -> None:
    torch.manual_seed(1234)
    base = transformers.LlamaForCausalLM(llama_config()).state_dict()
    dora = dora_fx.DoRA(target_modules="all-linear", dim=8, alpha=16)
    model = dora(build_gpt_model(llama_config(), base, device=DEVICE))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    tokens = (torch.arange(LENGTH + 1) + torch.arange(BATCH)[:, None]) % 7
    batch = {
        "input_ids": tokens[:, :-1].to(DEVICE),
        "position_ids": torch.arange(LENGTH, device=DEVICE).expand(BATCH, LENGTH),
        "attention_mask": causal_mask(LENGTH, DEVICE),
        "labels": tokens[:, 1:].to(DEVICE),
    }
    engine = None
    if dist.get_rank() == 0:
        engine, its_end = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        context.Process(target=serve, args=(its_end, dtype), daemon=True).start()
        its_end.close()

    for step in range(STEPS):
        loss = model(**batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        refresh(model, engine, dtype)
        with torch.no_grad():
            log_probs = -model(**batch).cpu()
        if engine is not None:
            engine.send(("log_probs", tokens))
            gap = (engine.recv() - log_probs).abs()
            gaps = f"mean gap of log-probabilities {gap.mean():.1e}, largest {gap.max():.1e}"
            print(f"step {step + 1}: loss {loss.item():.4f}, {gaps}")
    comparison = dora_fx.compare_merged(model, **batch, dtype=dtype)
    if engine is not None:
        print(comparison)


# --8<-- [end:main]
if __name__ == "__main__":
    names = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if len(sys.argv) > 2 or (sys.argv[1:] and sys.argv[1] not in names):
        sys.exit(__doc__)
    with world(tensor_parallel=2):
        main(names[sys.argv[1] if len(sys.argv) == 2 else "bfloat16"])
