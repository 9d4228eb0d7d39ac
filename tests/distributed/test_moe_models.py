"""Models with experts at every layout: transformers' logits, and adapters and merged weights that go in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

import dora_fx
from dora_fx.megatron import megatron_world
from dora_fx.models import build_gpt_model, causal_mask
from tests.closeness import assert_apart, assert_close, rounding, roundings_of
from tests.distributed.launch import visit_worlds
from tests.distributed.moe_layers import ExpertLayout
from tests.distributed.zoo import Sharding, gather
from tests.hf_models import tiny_hf_model
from tests.peft_models import adapted_megatron, hf_logits

KINDS = ["qwen3_moe", "mixtral"]
TOKENS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(8))
LAYOUTS = [ExpertLayout(2, ep=2), ExpertLayout(2, tp=2, etp=2)]
MORE_LAYOUTS = [
    ExpertLayout(2, tp=2, ep=2),
    ExpertLayout(2, tp=2),
    ExpertLayout(2, pp=2),
    ExpertLayout(4, tp=2, ep=2, etp=2),
    ExpertLayout(4, pp=2, ep=2),
]
_OF_LAYER = ["self_attention.linear_qkv", "self_attention.linear_proj"]
_OF_LAYER += [f"mlp.experts.local_experts.{number}.linear_fc{i}" for number in range(4) for i in (1, 2)]
PATHS = [f"decoder.layers.{index}.{name}" for index in range(2) for name in _OF_LAYER]


def logits_of(model: nn.Module) -> torch.Tensor:
    """Logits of all tokens, on every rank; data-parallel ranks share the rows."""
    replicas, group = parallel_state.get_data_parallel_group(), parallel_state.get_tensor_model_parallel_group()
    tokens = TOKENS.chunk(replicas.size())[replicas.rank()]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        local = model.eval()(tokens, positions, causal_mask(tokens.shape[1], "cpu"))
    return gather(gather(local, Sharding(2), group), Sharding(0), replicas).to(local.dtype)


def of_one_rank(kind: str, folder: Path) -> dict[str, Any]:
    hf = tiny_hf_model(kind)
    model = adapted_megatron(hf)
    dora_fx.export_hf(model, folder)
    return {
        "adapter": list(dora_fx.iter_adapter(model)),
        "merged": list(dora_fx.iter_merged(model)),
        "logits": logits_of(model),
    }


def visit(layout: ExpertLayout, folder: Path) -> None:
    """Build each model, import the adapter, and export and stream it."""
    for kind in KINDS:
        hf = tiny_hf_model(kind)
        model = build_gpt_model(hf.config, hf.state_dict(), sequence_parallel=layout.tp > 1)
        found: dict[str, Any] = {"base": logits_of(model)} if layout.pp == 1 else {}
        dora_fx.import_hf(model, folder / kind)
        if layout.pp == 1:
            found["logits"] = logits_of(model)
            labels = TOKENS.roll(-1, 1)
            positions, mask = torch.arange(TOKENS.shape[1]).expand_as(TOKENS), causal_mask(TOKENS.shape[1], "cpu")
            compared = dora_fx.compare_merged(model, TOKENS, positions, mask, labels=labels)
            found["compared"] = [layer.path for layer in compared.layers], compared.mean_gap
        for name, iterate in (("adapter", dora_fx.iter_adapter), ("merged", dora_fx.iter_merged)):
            here, everywhere = list(iterate(model)), list(iterate(model, every_rank=True))
            assert bool(here) == (dist.get_rank() == 0)
            found[name] = everywhere
        dora_fx.export_hf(model, folder / f"{kind} {layout}")
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{kind} {layout}.pt")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("moe")
    with megatron_world():
        of_one = {kind: of_one_rank(kind, folder / kind) for kind in KINDS}
    return folder, of_one


def check(layout: ExpertLayout, folder: Path, expected: dict[str, dict[str, Any]]) -> None:
    for kind in KINDS:
        hf, found, own = tiny_hf_model(kind), torch.load(folder / f"{kind} {layout}.pt"), expected[kind]
        bound = rounding(torch.float32, 2 * roundings_of(hf))
        if layout.pp == 1:
            assert_close(found["base"], hf_logits(hf, TOKENS), bound)
            assert_close(found["logits"], own["logits"], bound)
            assert_apart(found["logits"], found["base"])
            paths, gap = found["compared"]
            assert sorted(paths) == sorted(PATHS) and gap < bound
        assert found["adapter"] and [name for name, _ in found["adapter"]] == [name for name, _ in own["adapter"]]
        torch.testing.assert_close(dict(found["adapter"]), dict(own["adapter"]), rtol=0, atol=0)
        assert [name for name, _ in found["merged"]] == [name for name, _ in own["merged"]]
        # Norms of a row layer are sums over ranks.
        torch.testing.assert_close(dict(found["merged"]), dict(own["merged"]), rtol=1e-6, atol=1e-6)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (folder / f"{kind} {layout}" / name).read_bytes() == (folder / kind / name).read_bytes()


@pytest.mark.parametrize("layouts", [LAYOUTS, pytest.param(MORE_LAYOUTS, marks=pytest.mark.slow)], ids=["two", "more"])
def test_every_layout_computes_and_writes_what_one_rank_does(
    layouts: list[ExpertLayout], expected: tuple[Path, dict[str, dict[str, Any]]]
) -> None:
    folder, of_one = expected
    visit_worlds([(visit, layout) for layout in layouts], folder)
    for layout in layouts:
        check(layout, folder, of_one)
