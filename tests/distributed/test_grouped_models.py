"""Models with grouped experts, of Transformer Engine with emulated kernels: files, merging and checks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from safetensors.torch import load_file, save_file
from torch import nn

import dora_fx
from dora_fx.megatron.cpu_runtime import cuda_means_cpu
from dora_fx.models import build_gpt_model, causal_mask
from tests.closeness import assert_apart, assert_close, rounding, roundings_of
from tests.distributed.launch import visit_worlds
from tests.distributed.moe_layers import ExpertLayout
from tests.distributed.test_moe_models import KINDS, TOKENS, logits_of
from tests.hf_models import tiny_hf_model
from tests.models import GPT_TARGETS, randomize_adapters
from tests.peft_models import hf_logits

pytestmark = pytest.mark.usefixtures("emulated_te")
LAYOUTS = [ExpertLayout(), ExpertLayout(2, ep=2), ExpertLayout(2, tp=2, etp=2)]
MORE_LAYOUTS = [ExpertLayout(2, tp=2, ep=2), ExpertLayout(4, tp=2, ep=2, etp=2), ExpertLayout(4, pp=2, ep=2)]
POSITIONS, MASK = torch.arange(TOKENS.shape[1]).expand_as(TOKENS), causal_mask(TOKENS.shape[1], "cpu")


def build(kind: str, layout: ExpertLayout, spec: Any = "te_grouped") -> nn.Module:
    hf = tiny_hf_model(kind)
    return build_gpt_model(hf.config, hf.state_dict(), spec=spec, sequence_parallel=layout.tp > 1)


def bound_of(kind: str) -> float:
    return rounding(torch.float32, 2 * roundings_of(tiny_hf_model(kind)))


def streams_of(model: nn.Module) -> dict[str, list[tuple[str, torch.Tensor]]]:
    return {
        "adapter": list(dora_fx.iter_adapter(model, every_rank=True)),
        "merged": list(dora_fx.iter_merged(model, every_rank=True)),
    }


def write_expected(layout: ExpertLayout, folder: Path) -> None:
    """The adapters of a model with a module for each expert, and what it makes of them."""
    for kind in KINDS:
        model = dora_fx.DoRA(GPT_TARGETS, dim=4)(build(kind, layout, "te"))
        randomize_adapters(model)
        dora_fx.export_hf(model, folder / kind)
        torch.save({"logits": logits_of(model), **streams_of(model)}, folder / f"{kind}.pt")


def visit(layout: ExpertLayout, folder: Path) -> None:
    for kind in KINDS:
        bound, expected = bound_of(kind), torch.load(folder / f"{kind}.pt")
        model = build(kind, layout)
        base = None if layout.pp > 1 else logits_of(model)
        dora_fx.import_hf(model, folder / kind)
        check_files(model, folder / kind, folder / f"{kind} of {layout}", expected)
        if base is None:
            # A schedule runs a pipeline, and its weights are those of one rank.
            continue
        assert_close(base, hf_logits(tiny_hf_model(kind), TOKENS), bound)
        logits = logits_of(model)
        assert_close(logits, expected["logits"], bound)
        assert_apart(logits, base)
        check_merging(model, logits, bound)


def check_files(model: nn.Module, source: Path, target: Path, expected: dict[str, Any]) -> None:
    """What goes out is what a model with a module for each expert writes."""
    dora_fx.export_hf(model, target)
    if dist.get_rank() == 0:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (target / name).read_bytes() == (source / name).read_bytes()
    for name, stream in streams_of(model).items():
        assert [key for key, _ in stream] == [key for key, _ in expected[name]]
        # Norms of a row layer are sums over ranks.
        room = 0.0 if name == "adapter" else 1e-6
        torch.testing.assert_close(dict(stream), dict(expected[name]), rtol=room, atol=room)


def check_merging(model: nn.Module, logits: torch.Tensor, bound: float) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    streamed = dict(dora_fx.iter_merged(model, every_rank=True))
    compared = dora_fx.compare_merged(model, TOKENS, POSITIONS, MASK, labels=TOKENS.roll(-1, 1))
    assert {layer.path for layer in compared.layers} >= {f"decoder.layers.0.mlp.experts.linear_fc{i}" for i in (1, 2)}
    assert compared.mean_gap < bound
    with dora_fx.merged(model):
        assert not any(isinstance(module, dora_fx.DoRALinear) for module in model.modules())
        assert_close(logits_of(model), logits, bound)
        assert_apart(experts_of(model)[0].weight0, before[f"{FIRST_EXPERTS}.weight0"])
    assert torch.equal(logits_of(model), logits)
    after = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    dora_fx.merge(model)
    assert_close(logits_of(model), logits, bound)
    if parallel_state.get_expert_tensor_parallel_world_size() == 1:
        # The rows of the gate come first.
        number = parallel_state.get_expert_model_parallel_rank() * experts_of(model)[0].num_gemms
        gate = next(value for name, value in streamed.items() if ".layers.0." in name and f".experts.{number}." in name)
        assert torch.equal(experts_of(model)[0].weight0[: len(gate)], gate)


FIRST_EXPERTS = "decoder.layers.0.mlp.experts.linear_fc1"


def experts_of(model: nn.Module) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith("mlp.experts.linear_fc1")]


@pytest.mark.parametrize("layouts", [LAYOUTS, pytest.param(MORE_LAYOUTS, marks=pytest.mark.slow)], ids=["two", "more"])
def test_files_and_merged_weights_are_those_of_single_experts_emulated_kernels(
    layouts: list[ExpertLayout], tmp_path: Path
) -> None:
    visit_worlds([(write_expected, ExpertLayout()), *((visit, layout) for layout in layouts)], tmp_path)


def check_training(layout: ExpertLayout, folder: Path) -> None:
    """A check finds nothing in a sound set-up, and experts whose gradients are reduced over other ranks."""
    for sound in (True, False):
        model = dora_fx.DoRA(GPT_TARGETS, dim=4)(build("qwen3_moe", layout))
        if not sound:
            for site in experts_of(model):
                for parameter in site.adapter.parameters():
                    parameter.allreduce = not parameter.allreduce
        with cuda_means_cpu():
            ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)  # type: ignore[arg-type]
            settings = OptimizerConfig(optimizer="adam", lr=1e-2, params_dtype=torch.float32)
            optimizer = get_megatron_optimizer(settings, [ddp])
        replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        tokens = TOKENS.chunk(replicas)[replica]
        batch = {
            "input_ids": tokens,
            "position_ids": POSITIONS[: len(tokens)],
            "attention_mask": MASK,
            "labels": tokens.roll(-1, 1),
        }
        report = dora_fx.check(ddp, batch, optimizer, raises=False)
        assert bool(report.failed) != sound, f"{layout}\n{report}"
        by_name = {finding.name: finding for finding in report.findings}
        assert by_name["slope"].verdict == ("ok" if sound else "failed"), report
        assert not sound or {by_name[name].verdict for name in ("merged", "magnitudes", "steps", "saved")} == {"ok"}
        # Two layers: two linears of attention, and two of the experts of each rank, with three tensors each.
        assert f"{2 * (2 + 2 * layout.ep) * 3} " in by_name["optimizer"].text, report


def test_a_check_knows_grouped_experts_emulated_kernels(tmp_path: Path) -> None:
    visit_worlds([(check_training, ExpertLayout(2, ep=2))], tmp_path)


def refuse(layout: ExpertLayout, folder: Path) -> None:
    """Files whose experts differ fit a module for each alone, also where each rank's own are alike."""
    model = build("qwen3_moe", layout)
    with pytest.raises(ValueError, match=r"local_experts.0.linear_fc2 with dim 4 .* and .*local_experts.2.linear_fc2"):
        dora_fx.import_hf(model, folder / "changed")
    assert not any(isinstance(module, dora_fx.DoRALinear) for module in model.modules())


def test_experts_that_differ_are_refused_emulated_kernels(tmp_path: Path) -> None:
    visit_worlds([(write_expected, LAYOUTS[0])], tmp_path)
    shutil.copytree(tmp_path / "qwen3_moe", tmp_path / "changed")
    config, file = (tmp_path / "changed" / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    left_out = ["experts.2.down_proj", "experts.3.down_proj"]
    tensors = {
        name: each for name, each in load_file(file).items() if not any(f".{part}." in name for part in left_out)
    }
    save_file(tensors, file)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"exclude_modules": left_out}))
    visit_worlds([(refuse, layout) for layout in LAYOUTS[:2]], tmp_path)
