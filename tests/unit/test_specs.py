"""Which layers a model can be built of here, and how models of other layers name their parts."""

from __future__ import annotations

import importlib.util

import pytest

from dora_fx.models import build_gpt_model
from dora_fx.models.decoder_names import DecoderNames, parameters_by_gpt_name
from dora_fx.models.specs import check_spec, default_spec, has_transformer_engine
from tests.finetune_runs import finetune
from tests.hf_models import tiny_hf_model
from tests.models import tiny_gpt
from tests.tables import every_case

HAS_HYBRID_MODEL = importlib.util.find_spec("megatron.core.models.hybrid") is not None
MISSING = {
    "te": "found no Transformer Engine that can be imported",
    "hybrid": "found no Transformer Engine" if HAS_HYBRID_MODEL else "has no HybridModel; expected 0.19 or newer",
}
# 0.16, the oldest that is supported, has none.
needs_hybrid_model = pytest.mark.skipif(not HAS_HYBRID_MODEL, reason="HybridModel came with megatron-core 0.19")
# What is refused where it is missing cannot be seen where it is there.
without_transformer_engine = pytest.mark.skipif(has_transformer_engine(), reason="Transformer Engine is installed")


@without_transformer_engine
@pytest.mark.parametrize("spec", ["te", "hybrid"])
def test_a_spec_whose_packages_are_missing_is_refused_by_name(spec: str, world: None) -> None:
    hf = tiny_hf_model()
    with pytest.raises(ValueError, match=f"spec {spec}: .*{MISSING[spec]}"):
        build_gpt_model(hf.config, hf.state_dict(), spec=spec)


@without_transformer_engine
@pytest.mark.parametrize("spec", ["te", "hybrid"])
def test_the_command_refuses_a_spec_before_anything_is_loaded(spec: str, tmp_path, capsys) -> None:
    (tmp_path / "text.txt").write_text("no base was read for it")
    base = tmp_path / "there is no such base"
    arguments = ["--base", base, "--data", tmp_path / "text.txt", "--device", "cpu", "--run", tmp_path / "run"]
    assert finetune(*arguments, "--spec", spec) == 2
    assert f"--spec {spec}: {MISSING[spec]}".split(": ")[0] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unknown_spec_is_refused() -> None:
    with pytest.raises(ValueError, match="spec: found 'fused', expected one of local, te, te_grouped, hybrid"):
        check_spec("fused")


def test_a_cpu_has_the_local_spec() -> None:
    assert default_spec("cpu") == "local"


def test_a_gpt_model_of_the_local_spec_names_its_parts_itself(world: None) -> None:
    model = tiny_gpt()
    assert parameters_by_gpt_name(model).keys() == dict(model.named_parameters()).keys()


def test_layers_of_a_hybrid_model_are_counted_by_their_pairs() -> None:
    names = DecoderNames("*-*-", 2)
    assert names.gpt_path("decoder.layers.2.self_attention.linear_qkv") == "decoder.layers.1.self_attention.linear_qkv"
    assert names.gpt_path("decoder.layers.1.mlp.linear_fc2") == "decoder.layers.0.mlp.linear_fc2"
    assert names.gpt_path("decoder.final_norm") == "decoder.final_layernorm"
    assert names.gpt_path("embedding.word_embeddings") == "embedding.word_embeddings"


@every_case("pattern", ["M*M-", "**--", "*-*", "+-", "-*", ""])
def test_a_hybrid_model_of_other_layers_has_no_hugging_face_names(pattern: str, world: None) -> None:
    model = tiny_gpt()
    model.hybrid_layer_pattern = pattern
    with pytest.raises(ValueError, match=r"hybrid_layer_pattern: found .* expected attention and MLP in turn"):
        DecoderNames.of(model)


def test_boundaries_of_stages_are_no_layers(world: None) -> None:
    model = tiny_gpt()
    model.hybrid_layer_pattern = "*-|*-"
    assert DecoderNames.of(model) == DecoderNames("*-*-", 2)
