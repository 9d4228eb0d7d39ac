"""Models of one tiny checkpoint in every spec, on ranks that have Transformer Engine with emulated kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

import dora_fx
from dora_fx.models import build_gpt_model, causal_mask
from tests.hf_models import CONFIGS, tiny_hf_model
from tests.models import GPT_TARGETS, randomize_adapters, sites

TOKENS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(8))
DIM = 4
# Three query groups do not divide by two ranks, so a zero group is added.
PADDED = dict(num_key_value_heads=3)


def build(kind: str, spec: str, **settings: Any) -> nn.Module:
    overrides = settings.pop("overrides", {})
    hf = tiny_hf_model(kind, **overrides)
    model = build_gpt_model(hf.config, hf.state_dict(), spec=spec, **settings)
    classes = {type(module).__name__ for module in model.modules()}
    assert ("TELayerNormColumnParallelLinear" in classes) == (spec != "local"), classes
    assert ("HybridModel" in classes) == (spec == "hybrid"), classes
    return model


def adapted(kind: str, spec: str, seed: int = 1, **settings: Any) -> nn.Module:
    """A model whose adapters are away from the identity; the same in "local" and "te", as far as norms are."""
    model = dora_fx.DoRA(GPT_TARGETS, dim=DIM, alpha=2 * DIM)(build(kind, spec, **settings))
    randomize_adapters(model, seed)
    return model


def logits_of(model: nn.Module) -> torch.Tensor:
    """Whole logits `[b, s, vocab]` of all tensor-parallel ranks, in evaluation."""
    group = parallel_state.get_tensor_model_parallel_group()
    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    with torch.no_grad():
        local = model.eval()(TOKENS, positions, causal_mask(TOKENS.shape[1], "cpu"))
    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def adapter_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole adapters by the names of PEFT's files."""
    return {name: tensor.clone() for name, tensor in dora_fx.iter_adapter(model, every_rank=True)}


def train(model: nn.Module, steps: int, recompute: bool = False) -> list[float]:
    """Train with torch's AdamW; returns the losses."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    positions = torch.arange(TOKENS.shape[1] - 1).expand(len(TOKENS), -1)
    losses = []
    model.train()
    for _ in range(steps):
        mask = causal_mask(TOKENS.shape[1] - 1, "cpu")
        loss = model(TOKENS[:, :-1], positions, mask, labels=TOKENS[:, 1:]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits_of_every_spec(sequence_parallel: bool, kinds: list[str], specs: list[str]) -> dict[str, torch.Tensor]:
    """By "kind spec"; kinds are names of `CONFIGS`, or "padded"."""
    found = {}
    for kind in kinds:
        settings: dict[str, Any] = {"sequence_parallel": sequence_parallel}
        if kind == "padded":
            settings["overrides"] = PADDED
        for spec in specs:
            model = build(kind if kind in CONFIGS else "llama", spec, **settings)
            found[f"{kind} {spec}"] = logits_of(model)
    return found


def through_files(folder: str, first: str, second: str) -> dict[str, Any]:
    """Train in one spec, save, load in another one, save there, and load again in the first."""
    trained = adapted("qwen2", first, overrides=PADDED)
    start = logits_of(trained)
    losses = train(trained, 3)
    expected, logits = adapter_of(trained), logits_of(trained)
    dora_fx.save_checkpoint(trained, Path(folder) / "first")
    other = adapted("qwen2", second, seed=2, overrides=PADDED)
    dora_fx.load_checkpoint(other, Path(folder) / "first")
    there, there_logits = adapter_of(other), logits_of(other)
    dora_fx.save_checkpoint(other, Path(folder) / "second")
    again = adapted("qwen2", first, seed=3, overrides=PADDED)
    dora_fx.load_checkpoint(again, Path(folder) / "second")
    return {
        "losses": losses,
        "start": start,
        "adapters": [expected, there, adapter_of(again)],
        "logits": [logits, there_logits, logits_of(again)],
    }


def load(folder: str, spec: str, overrides: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Adapters and logits of a model that loaded a checkpoint."""
    model = adapted("qwen2", spec, seed=4, overrides=overrides)
    dora_fx.load_checkpoint(model, folder)
    return adapter_of(model), logits_of(model)


# Ends of the names that the norms before attention and MLP have in either spec.
NORMS = {
    "before attention": ("input_layernorm.weight", "linear_qkv.to_wrap.layer_norm_weight"),
    "before the MLP": ("pre_mlp_layernorm.weight", "linear_fc1.to_wrap.layer_norm_weight"),
}


def refusals_of_other_norms(folder: str, first: str, second: str) -> dict[str, str]:
    """What loading says onto a model that differs in one norm alone, or in none."""
    dora_fx.save_checkpoint(adapted("llama", first), Path(folder) / "saved")
    refusals = {}
    for which, ends in {**NORMS, "none": ()}.items():
        model = adapted("llama", second, seed=2)
        with torch.no_grad():
            changed = [p for name, p in model.named_parameters() if "layers.1." in name and name.endswith(tuple(ends))]
            assert len(changed) == bool(ends)
            for parameter in changed:
                parameter[0] *= 1.25
        before = adapter_of(model)
        try:
            dora_fx.load_checkpoint(model, Path(folder) / "saved")
            refusals[which] = ""
        except dora_fx.CheckpointError as error:
            refusals[which] = str(error)
            torch.testing.assert_close(adapter_of(model), before, rtol=0, atol=0)
    return refusals


def life_in_every_spec(specs: list[str], folder: str) -> dict[str, dict[str, Any]]:
    """Import, export, streams, merge and unmerge of one adapter in every spec."""
    dora_fx.export_hf(adapted("qwen2", "local", overrides=PADDED), Path(folder) / "first")
    dist.barrier()
    found = {}
    for spec in specs:
        model = dora_fx.import_hf(build("qwen2", spec, overrides=PADDED), Path(folder) / "first")
        dora_fx.export_hf(model, Path(folder) / spec)
        base, logits = base_weights(model), logits_of(model)
        streamed = dict(dora_fx.iter_merged(model, every_rank=True))
        with dora_fx.merged(model):
            merged_logits, merged = logits_of(model), base_weights(model)
        unmerged = base_weights(model)
        found[spec] = {
            "adapter": adapter_of(model),
            "streamed": streamed,
            "logits": logits,
            "merged logits": merged_logits,
            "changed by merging": {name for name, value in merged.items() if not torch.equal(value, base[name])},
            "changed by unmerging": [name for name, value in unmerged.items() if not torch.equal(value, base[name])],
            "linears": {f"{path}.weight" for path in sites(model)},
        }
    return found


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the base's tensors, merged or not."""
    states = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    return {name: value.clone() for name, value in states.items() if ".adapter." not in name}
