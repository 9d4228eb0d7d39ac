"""Export and import at tensor-parallel size 2 are those at size 1, query groups that pad the model included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file

import dora_fx
from dora_fx.megatron.world import megatron_world
from tests.distributed.launch import run_ranks
from tests.hf_models import tiny_hf_model
from tests.models import randomize_adapters, tiny_gpt
from tests.peft_models import (
    TOKENS,
    adapted_megatron,
    assert_same_logits,
    hf_logits,
    load_with_peft,
    megatron_logits,
    megatron_of,
    save_peft_adapter,
)
from tests.tables import every_case

# Three query groups do not divide by two ranks, so a fourth is padding.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "padded": ("qwen2", dict(num_key_value_heads=3)),
    "phi3": ("phi3", dict(num_key_value_heads=3)),
}


def whole_logits(model: torch.nn.Module) -> torch.Tensor:
    group = parallel_state.get_tensor_model_parallel_group()
    local = megatron_logits(model).contiguous()
    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local, group=group)
    return torch.cat(parts, dim=-1)


def on_two_ranks(folder: Path) -> dict[str, Any]:
    """Import what one rank and PEFT wrote, export it again, and return the logits, and each rank's refusal."""
    results: dict[str, Any] = {}
    for case, (kind, overrides) in CASES.items():
        for source in ("one", "peft"):
            model = dora_fx.import_hf(megatron_of(tiny_hf_model(kind, **overrides)), folder / case / source)
            results[case, source] = whole_logits(model)
            dora_fx.export_hf(model, folder / case / f"{source} again")
    taken = folder / "llama" / "one"
    with pytest.raises(ValueError, match="it exists") as caught:
        dora_fx.export_hf(model, taken)
    results["refusals"] = [None, None]
    dist.all_gather_object(results["refusals"], str(caught.value))
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each case what one rank exports (`one`), and what PEFT trains (`peft`, rank 3, so that 9 is padded)."""
    folder = tmp_path_factory.mktemp("hf")
    with megatron_world():
        for case, (kind, overrides) in CASES.items():
            hf = tiny_hf_model(kind, **overrides)
            (folder / case).mkdir()
            dora_fx.export_hf(adapted_megatron(hf), folder / case / "one")
            save_peft_adapter(hf, folder / case / "peft", r=3, lora_alpha=5)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return run_ranks(on_two_ranks, 2, 2, folder)


def files(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_export_what_one_does(case: str, folder: Path, results: dict[str, Any]) -> None:
    (config, tensors), (expected_config, expected) = files(folder / case / "one again"), files(folder / case / "one")
    assert config == expected_config
    assert tensors.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(tensors[name], value)] == []


@every_case("source", ["one", "peft"])
@every_case("case", CASES)
def test_two_ranks_compute_the_logits_of_peft(case: str, source: str, folder: Path, results: dict[str, Any]) -> None:
    kind, overrides = CASES[case]
    hf = tiny_hf_model(kind, **overrides)
    for exported in (source, f"{source} again"):
        peft_model = load_with_peft(hf, folder / case / exported)
        assert_same_logits(results[case, source], hf_logits(peft_model, TOKENS), peft_model)


def test_a_rank_that_is_factored_unevenly_is_filled_up(folder: Path, results: dict[str, Any]) -> None:
    """Three factors of rank 3 stack to 9, which two ranks store as 10."""
    config, tensors = files(folder / "llama" / "peft again")
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (10, 48)
    assert config["rank_pattern"]["down_proj"] == 3


def test_what_rank_zero_cannot_write_is_refused_on_every_rank(results: dict[str, Any]) -> None:
    assert len(results["refusals"]) == 2
    for message in results["refusals"]:
        assert message.endswith("one: it exists, expected a name that is free or an empty folder (found on rank 0)")


def on_two_stages(folder: Path) -> None:
    """Import what one rank exported into the stages of a pipeline, and export it again."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2, create_gloo_process_groups=True)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    model = tiny_gpt(
        num_layers=4,
        pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
        chunk=dict(pre_process=stage == 0, post_process=stage == 1),
    )
    assert [layer.layer_number for layer in model.decoder.layers] == [2 * stage + 1, 2 * stage + 2]
    # Layers of one stage alone are damaged; both ranks refuse, and change nothing.
    for case in ("float8", "nan"):
        with pytest.raises(ValueError, match=r"layers.3.mlp.down_proj") as caught:
            dora_fx.import_hf([model], folder / case)
        refusals: list[Any] = [None, None]
        dist.all_gather_object(refusals, str(caught.value))
        assert refusals[0] == refusals[1]
    assert not any("adapter" in name for name, _ in model.named_parameters())
    dora_fx.export_hf(dora_fx.import_hf([model], folder / "whole"), folder / "stages")


def test_pipeline_stages_import_their_layers_and_export_one_adapter(tmp_path: Path, world: None) -> None:
    model = dora_fx.DoRA(["linear_qkv", "linear_fc1", "*.layers.3.*linear_fc2"], dim=4)(tiny_gpt(num_layers=4))
    randomize_adapters(model)
    dora_fx.export_hf(model, tmp_path / "whole")
    key = "base_model.model.model.layers.3.mlp.down_proj.lora_B.weight"
    for case, edit in (("float8", lambda b: b.to(torch.float8_e4m3fn)), ("nan", lambda b: b / 0.0)):
        shutil.copytree(tmp_path / "whole", tmp_path / case)
        tensors = load_file(tmp_path / case / "adapter_model.safetensors")
        save_file(tensors | {key: edit(tensors[key])}, tmp_path / case / "adapter_model.safetensors")
    run_ranks(on_two_stages, 2, 1, tmp_path)
    (config, tensors), (expected_config, expected) = files(tmp_path / "stages"), files(tmp_path / "whole")
    assert config == expected_config
    assert tensors.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(tensors[name], value)] == []
