"""Adapters on a Mamba layer's projections, with emulated kernels of Transformer Engine and none of mamba_ssm.

Without mamba_ssm's kernels such a layer cannot run. Megatron builds it all the same once it is told that they are
there, and attaching, checkpoints and refusals need no more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from torch import nn

import dora_fx
from dora_fx.checkpoint.directory import open_checkpoint
from tests.adapter_shards import AdapterShards
from tests.distributed.launch import run_ranks
from tests.models import randomize_adapters
from tests.unit.test_specs import needs_hybrid_model

pytestmark = [pytest.mark.usefixtures("emulated_te"), needs_hybrid_model]
PARTS = ("z", "x", "B", "C", "dt")


def mamba_model() -> nn.Module:
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    config = TransformerConfig(
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        gradient_accumulation_fusion=False,
        mamba_num_groups=2,
        mamba_head_dim=16,
        mamba_state_dim=8,
    )
    return HybridModel(
        config=config,
        hybrid_stack_spec=hybrid_stack_spec,
        vocab_size=64,
        max_sequence_length=32,
        hybrid_layer_pattern="M*-",
    )


class GatedNorm(nn.Module):
    """The parameter of mamba_ssm's norm."""

    def __init__(self, size: int, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


def pretend_mamba_ssm() -> None:
    from megatron.core.ssm import mamba_mixer

    mamba_mixer.HAVE_MAMBA_SSM = True
    mamba_mixer.ExtendedRMSNorm = GatedNorm


def adapted(targets: list[str], seed: int) -> nn.Module:
    torch.manual_seed(7)
    model = mamba_model()
    dora_fx.DoRA(targets, dim=4, alpha=8)(model)
    randomize_adapters(model, seed)
    return model


def adapter_of(model: nn.Module) -> dict[str, torch.Tensor]:
    shards = AdapterShards(model)
    return {name: shards.gather(name, parameter).clone() for name, parameter in shards.parameters.items()}


def without_mamba_ssm() -> str:
    try:
        mamba_model()
    except ImportError as error:
        return str(error)
    return "built"


def save_and_load(folder: str) -> list[dict[str, torch.Tensor]]:
    """Adapters that were saved, and loaded into another model; those of `out_proj` alone are saved too."""
    pretend_mamba_ssm()
    first, second = adapted(["in_proj", "out_proj"], 1), adapted(["in_proj", "out_proj"], 2)
    dora_fx.save_checkpoint(first, Path(folder) / "both")
    dora_fx.load_checkpoint(second, Path(folder) / "both")
    out = adapted(["out_proj"], 3)
    dora_fx.save_checkpoint(out, Path(folder) / "out")
    return [adapter_of(model) for model in (first, second, out)]


def on_two_ranks(folder: str) -> tuple[str, dict[str, torch.Tensor]]:
    """What attaching to the packed projection says, and `out_proj`'s adapter of a checkpoint of one rank."""
    pretend_mamba_ssm()
    model = mamba_model()
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match="in_proj") as refusal:
        dora_fx.DoRA(["in_proj", "out_proj"], dim=4)(model)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(parameter.requires_grad for parameter in before.values())
    out = adapted(["out_proj"], 4)
    dora_fx.load_checkpoint(out, Path(folder) / "out", any_base=True)
    return str(refusal.value), adapter_of(out)


def test_adapters_of_a_mamba_layer_are_saved_beside_its_split_weight_emulated_kernels(tmp_path: Path) -> None:
    saved, loaded, out = run_ranks(save_and_load, 1, 1, str(tmp_path))
    torch.testing.assert_close(loaded, saved, rtol=0, atol=0)
    _, manifest = open_checkpoint(tmp_path / "both")
    assert set(manifest.sites) == {"decoder.layers.0.mixer.in_proj", "decoder.layers.0.mixer.out_proj"}
    assert {f"decoder.layers.0.mixer.in_proj.weight.{part}" for part in PARTS} < set(manifest.base)
    message, of_two = run_ranks(on_two_ranks, 2, 2, str(tmp_path))
    assert "decoder.layers.0.mixer.in_proj: found the packed projection of a Mamba layer" in message
    torch.testing.assert_close(of_two, out, rtol=0, atol=0)


def test_a_model_with_mamba_layers_needs_mamba_ssm_emulated_kernels() -> None:
    """Megatron says so itself, when it is built."""
    assert "pip install mamba-ssm" in run_ranks(without_mamba_ssm, 1, 1)
