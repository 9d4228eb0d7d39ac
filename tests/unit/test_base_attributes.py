"""Code that knows nothing of adapters reads and sets a layer's attributes: transformers, Megatron, and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dora_fx
from tests.hf_models import tiny_hf_model
from tests.models import DIM, IN, LINEAR_KINDS, OUT, LinearZoo, adapt_zoo, randomize_adapters, sites
from tests.peft_models import hf_logits
from tests.tables import every_case

pytestmark = pytest.mark.usefixtures("world")


def adapted_hf(kind: str = "llama_tied", targets: tuple[str, ...] = ("q_proj", "lm_head")) -> Any:
    model = dora_fx.DoRA(list(targets), dim=4)(tiny_hf_model(kind))
    randomize_adapters(model)
    return model


# What a bias adds to a tied or an untied model is the same compiled.
@pytest.mark.parametrize(
    ("kind", "compiled"),
    [("llama", False), ("llama_tied", False), ("qwen2", False), ("llama", True), ("llama_tied", True)],
)
def test_tying_and_resizing_to_the_same_size_change_nothing(kind: str, compiled: bool) -> None:
    model = adapted_hf(kind)
    options = {"inner_compiler": "aot_eager"}
    called = torch.compile(model, backend="dora_fx", options=options) if compiled else model
    before, modules = hf_logits(called), [id(module) for module in model.modules()]
    model.tie_weights()
    model.resize_token_embeddings(64)
    model.init_weights()
    assert [id(module) for module in model.modules()] == modules
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (kind == "llama_tied")
    assert model.get_output_embeddings().weight is model.lm_head.to_wrap.weight
    torch.testing.assert_close(hf_logits(called), before, rtol=0, atol=0)


def test_tying_after_the_embedding_was_copied_ties_again() -> None:
    model = adapted_hf()
    before = hf_logits(model)
    model.model.embed_tokens.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(hf_logits(model), before, rtol=0, atol=0)


def test_tying_to_an_embedding_of_other_values_is_refused() -> None:
    model = adapted_hf()
    model.model.embed_tokens.weight = nn.Parameter(torch.randn(64, 48), requires_grad=False)
    logits = model.lm_head(torch.ones(1, 48))
    with pytest.raises(ValueError, match=r"^lm_head: found another weight set on an adapted layer .*\(64, 48\).*tying"):
        model.tie_weights()
    torch.testing.assert_close(model.lm_head(torch.ones(1, 48)), logits, rtol=0, atol=0)


def test_resizing_an_adapted_output_layer_is_refused() -> None:
    # One Parameter serves both: transformers has given the layer more rows already when it sets out_features.
    with pytest.raises(ValueError, match=r"^lm_head: found out_features = 72 .*expected 64 to stay; resize .* before"):
        adapted_hf("llama_tied").resize_token_embeddings(72)
    with pytest.raises(TypeError, match="DoRALinear"):
        adapted_hf("llama").resize_token_embeddings(72)


@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_resizing_beside_adapted_layers(kind: str) -> None:
    model = adapted_hf(kind, targets=("q_proj", "up_proj"))
    before = hf_logits(model)
    model.resize_token_embeddings(72)
    assert model.lm_head.weight.shape == (72, 48)
    torch.testing.assert_close(hf_logits(model)[..., :64], before, rtol=0, atol=0)
    merged = adapted_hf("llama")
    dora_fx.merge(merged)
    merged.resize_token_embeddings(72)
    assert merged.lm_head.weight.shape == (72, 48)


SIZES = {
    "in_features": IN,
    "out_features": OUT,
    "input_size": IN,
    "output_size": OUT,
    "input_size_per_partition": IN,
    "output_size_per_partition": OUT,
}


@every_case("kind", LINEAR_KINDS)
def test_a_layer_has_its_base_layers_attributes(kind: str) -> None:
    site = sites(adapt_zoo(LinearZoo([kind])))[kind]
    base = site.to_wrap
    for name, size in SIZES.items():
        assert hasattr(site, name) == hasattr(base, name)
        if hasattr(base, name):
            assert getattr(site, name) == size
            setattr(site, name, size)
            with pytest.raises(
                ValueError, match=rf"^{kind}: found {name} = 7 set on an adapted layer, expected {size}"
            ):
                setattr(site, name, 7)
            assert getattr(base, name) == size
    for name in ("config", "gather_output", "sequence_parallel", "skip_bias_add", "tp_group", "is_expert", "bias"):
        assert getattr(site, name, "absent") is getattr(base, name, "absent")
    assert not hasattr(site, "no_such_attribute")


@every_case("kind", ["linear_bias", "column_bias_added", "row_bias_added"])
def test_weights_and_biases_that_are_set_by_hand(kind: str) -> None:
    zoo, x = adapt_zoo(LinearZoo([kind])), torch.randn(5, IN)
    site = sites(zoo)[kind]
    names = [name for name, _ in site.named_parameters()]
    before = zoo.call_layer(kind, x)
    site.weight = nn.Parameter(site.weight.detach().clone(), requires_grad=False)
    site.weight.data = site.weight.data.clone()
    torch.testing.assert_close(zoo.call_layer(kind, x), before, rtol=0, atol=0)
    for name in ("shape", "dtype", "values"):
        other = {"shape": torch.ones(OUT, IN + 1), "dtype": site.weight.double(), "values": site.weight * 2}[name]
        with pytest.raises(ValueError, match=f"^{kind}: found another weight set"):
            site.weight = nn.Parameter(other.detach(), requires_grad=False)
    with pytest.raises(TypeError, match="cannot assign"):
        site.weight = site.weight.detach().clone()
    site.bias = nn.Parameter(site.bias.detach() + 1, requires_grad=False)
    assert site.to_wrap.bias is site.bias
    torch.testing.assert_close(zoo.call_layer(kind, x), before + 1)
    site.bias = None
    assert site.to_wrap.bias is None
    site.register_parameter("bias", nn.Parameter(torch.zeros(OUT), requires_grad=False))
    assert [name for name, _ in site.named_parameters()] == names
    site.register_parameter("other", nn.Parameter(torch.zeros(1)))
    assert "other" in dict(site.named_parameters(recurse=False))
    site.weight = None
    with pytest.raises(ValueError, match="no weight of its own and none was passed"):
        zoo.call_layer(kind, x)


def test_the_base_follows_a_weight_that_is_set_under_a_compiler() -> None:
    model, x = nn.Sequential(nn.Linear(IN, OUT)), torch.randn(5, IN)
    dora_fx.DoRA(["0"], dim=DIM)(model)
    randomize_adapters(model)
    compiled = torch.compile(model, backend="dora_fx")
    before = compiled(x)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone(), requires_grad=False)
    torch.testing.assert_close(compiled(x), before, rtol=0, atol=0)
