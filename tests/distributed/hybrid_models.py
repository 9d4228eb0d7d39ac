"""HybridModel on ranks that have Transformer Engine with emulated kernels: pipeline stages, training, recomputation."""

from __future__ import annotations

import contextlib
import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from torch import nn

import dora_fx
from dora_fx.megatron.wrappers import walk
from dora_fx.models import causal_mask
from tests.distributed.pipeline_gpt import Layout
from tests.distributed.spec_models import DIM, PADDED, TOKENS, adapter_of, build, logits_of, train
from tests.megatron_checkpoint import counted_checkpoints, without_cuda_generators
from tests.models import GPT_SHAPE, GPT_TARGETS

VOCAB = 64


def stage_of(layout: Layout, pattern: str) -> nn.Module:
    """This rank's stage of an adapted model whose values depend on nothing but their place in the whole model."""
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    config = TransformerConfig(
        num_layers=len(pattern.replace("|", "")),
        **GPT_SHAPE,
        use_cpu_initialization=True,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        pipeline_dtype=torch.float32,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )
    model = HybridModel(
        config=config,
        hybrid_stack_spec=hybrid_stack_spec,
        vocab_size=VOCAB,
        max_sequence_length=32,
        hybrid_layer_pattern=pattern,
        position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    dora_fx.DoRA(GPT_TARGETS, dim=DIM, alpha=8)(model)
    with torch.no_grad():
        for named in walk(model):
            for name, parameter in named.module.named_parameters(recurse=False):
                seed = zlib.crc32(f"{named.whole_path}.{name}".encode())
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0 + 0.3 * noise)
    return model


def logits_through_stages(model: nn.Module, layout: Layout) -> torch.Tensor | None:
    """Logits on the last stage, None on the others."""
    length = TOKENS.shape[1]
    positions, mask = torch.arange(length).expand_as(TOKENS), causal_mask(length, "cpu")
    rank, hidden = dist.get_rank(), torch.empty(length, len(TOKENS), GPT_SHAPE["hidden_size"])
    if rank > 0:
        dist.recv(hidden, src=rank - 1)
        model.set_input_tensor(hidden)  # type: ignore[operator]
    with torch.no_grad():
        output: torch.Tensor = model.eval()(TOKENS, positions, mask)
    if rank == layout.pp - 1:
        return output
    dist.send(output.contiguous(), dst=rank + 1)
    return None


def save_stages(layout: Layout, pattern: str, folder: Path) -> None:
    model = stage_of(layout, pattern)
    paths = [named.whole_path for named in walk(model) if isinstance(named.module, dora_fx.DoRALinear)]
    everyone: list[Any] = [None] * layout.pp
    dist.all_gather_object(everyone, paths)
    logits = logits_through_stages(model, layout)
    adapter = dict(dora_fx.iter_adapter(model, model_type="llama", every_rank=True))
    merged = dict(dora_fx.iter_merged(model, model_type="llama", every_rank=True))
    dora_fx.save_checkpoint(model, folder / f"pp{layout.pp}")
    if logits is not None:
        found = {"paths": list(itertools.chain(*everyone)), "logits": logits, "adapter": adapter, "merged": merged}
        torch.save(found, folder / f"pp{layout.pp} found")


def load_stages(layout: Layout, pattern: str, folder: Path) -> None:
    """Load what one stage saved, and bring back the adapters."""
    model = stage_of(layout, pattern)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                parameter.mul_(2.0)
    dora_fx.load_checkpoint(model, folder / "pp1")
    adapter = dict(dora_fx.iter_adapter(model, model_type="llama", every_rank=True))
    if dist.get_rank() == 0:
        torch.save(adapter, folder / f"pp{layout.pp} loaded")


def train_in_every_spec(specs: list[str], folder: str) -> dict[str, dict[str, Any]]:
    """Train the same adapter in every spec; "hybrid recomputed" recomputes its layers in the backward pass."""
    dora = dora_fx.DoRA(GPT_TARGETS, dim=DIM, alpha=8)
    dora_fx.export_hf(dora(build("qwen2", "local", overrides=PADDED)), Path(folder) / "start")
    dist.barrier()
    found = {}
    for spec in specs:
        name, _, recomputed = spec.partition(" ")
        model = dora_fx.import_hf(build("qwen2", name, overrides=PADDED), Path(folder) / "start")
        with _recomputing(model) if recomputed else contextlib.nullcontext():
            losses = torch.tensor(train(model, 5))
        found[spec] = {"losses": losses, "logits": logits_of(model), "adapter": adapter_of(model)}
        dora_fx.save_checkpoint(model, Path(folder) / spec)
    return found


@contextlib.contextmanager
def _recomputing(model: nn.Module) -> Iterator[None]:
    """Megatron's full recomputation, a layer at a time."""
    config: Any = model.config
    config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    with without_cuda_generators(), counted_checkpoints() as checkpoints:
        yield
    assert len(checkpoints) >= config.num_layers
