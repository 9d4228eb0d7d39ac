"""GPTModel and HybridModel of Transformer Engine's layers, emulated kernels, against transformers and the local spec.

Attention is Transformer Engine's own in plain torch. The models have Megatron's shipped specs, unchanged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.closeness import assert_apart, assert_close, rounding, roundings_of
from tests.distributed.launch import run_ranks
from tests.distributed.spec_models import (
    NORMS,
    PADDED,
    TOKENS,
    life_in_every_spec,
    load,
    logits_of_every_spec,
    refusals_of_other_norms,
    through_files,
)
from tests.hf_models import CONFIGS, tiny_hf_model
from tests.unit.test_specs import HAS_HYBRID_MODEL

SPECS = ["te", "hybrid"] if HAS_HYBRID_MODEL else ["te"]
pytestmark = pytest.mark.usefixtures("emulated_te")
slow = pytest.mark.slow


def expected_logits(kind: str) -> tuple[torch.Tensor, float]:
    """Of transformers, and how far rounding may take ours from them."""
    hf = tiny_hf_model(kind) if kind in CONFIGS else tiny_hf_model("llama", **PADDED)
    with torch.no_grad():
        return hf(TOKENS).logits, rounding(torch.float32, roundings_of(hf))


@pytest.mark.parametrize(
    ("tp", "sequence_parallel", "kinds"),
    [
        pytest.param(1, False, list(CONFIGS), id="tp1"),
        pytest.param(2, True, ["padded", "qwen3"], id="tp2_sp"),
        pytest.param(2, False, [*CONFIGS, "padded"], id="tp2", marks=slow),
    ],
)
def test_logits_equal_transformers_emulated_kernels(tp: int, sequence_parallel: bool, kinds: list[str]) -> None:
    kinds = [kind for kind in kinds if kind != "llama_one_group" or tp == 1]
    found = run_ranks(logits_of_every_spec, tp, tp, sequence_parallel, kinds, SPECS)
    for kind in kinds:
        expected, bound = expected_logits(kind)
        assert expected.std() > 0.1
        for spec in SPECS:
            assert_close(found[f"{kind} {spec}"], expected, bound)


@pytest.mark.parametrize(("first", "second"), [("te", "local"), pytest.param("local", "te", marks=slow)])
def test_an_adapter_goes_from_spec_to_spec_and_back_bit_by_bit_emulated_kernels(
    first: str, second: str, tmp_path: Path
) -> None:
    found: dict[str, Any] = run_ranks(through_files, 1, 1, str(tmp_path), first, second)
    trained, there, again = found["adapters"]
    torch.testing.assert_close(there, trained, rtol=0, atol=0)
    torch.testing.assert_close(again, trained, rtol=0, atol=0)
    logits, there_logits, again_logits = found["logits"]
    torch.testing.assert_close(again_logits, logits, rtol=0, atol=0)
    bound = rounding(torch.float32, 2 * roundings_of(tiny_hf_model("qwen2", **PADDED)))
    assert_close(there_logits, logits, bound)
    assert_apart(logits, found["start"])
    assert found["losses"][-1] < found["losses"][0]
    for spec in ("local", "te"):
        whole, of_two_ranks = run_ranks(load, 2, 2, str(tmp_path / "second"), spec, PADDED)
        torch.testing.assert_close(whole, trained, rtol=0, atol=0)
        assert_close(of_two_ranks, logits, bound)


@pytest.mark.parametrize(
    ("first", "second"),
    [("local", "te"), *(pytest.param(*pair, marks=slow) for pair in [("te", "local"), ("te", "te")])],
)
def test_an_adapter_of_a_model_of_other_norms_is_refused_emulated_kernels(
    first: str, second: str, tmp_path: Path
) -> None:
    found = run_ranks(refusals_of_other_norms, 1, 1, str(tmp_path), first, second)
    assert found.pop("none") == ""
    assert found.keys() == NORMS.keys()
    for which, linear in (("before attention", "linear_qkv"), ("before the MLP", "linear_fc1")):
        assert "was trained on another base model than this one" in found[which]
        assert f"{linear}.layer_norm_weight differ" in found[which]


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=slow)])
def test_streams_files_and_merged_weights_are_those_of_the_local_spec_emulated_kernels(tp: int, tmp_path: Path) -> None:
    found = run_ranks(life_in_every_spec, tp, tp, ["local", *SPECS], str(tmp_path))
    local = found["local"]
    first = load_file(tmp_path / "first" / "adapter_model.safetensors")
    bound = rounding(torch.float32, 2 * roundings_of(tiny_hf_model("qwen2", **PADDED)))
    for spec in SPECS:
        own = found[spec]
        for name in ("adapter", "streamed"):
            assert list(own[name]) == list(local[name])
            torch.testing.assert_close(own[name], local[name], rtol=0, atol=0)
        torch.testing.assert_close(load_file(tmp_path / spec / "adapter_model.safetensors"), first, rtol=0, atol=0)
        for name in ("logits", "merged logits"):
            assert_close(own[name], local["logits"], bound)
        # The norms, which belong to the linear layers, are none of them.
        assert own["changed by merging"] == own["linears"]
        assert own["changed by unmerging"] == []
    hf = tiny_hf_model("qwen2", **PADDED)
    assert local["streamed"].keys() == hf.state_dict().keys()
