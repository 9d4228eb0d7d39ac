"""An output layer whose rows were padded to a size that divides: exports leave the padding out, imports put it back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import dora_fx
from tests.hf_models import tiny_hf_model
from tests.models import sites
from tests.peft_models import TOKENS, adapted_megatron, hf_logits, megatron_logits, megatron_of, save_peft_adapter
from tests.tables import every_case

pytestmark = [
    pytest.mark.usefixtures("world"),
    # PEFT on an adapter of a tied lm_head; see `hf.peft_files.warn_of_tied_output`.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

VOCAB, PADDED = 60, 64
TARGETS = ["linear_proj", "output_layer"]
# Logits of order one in float32, by two implementations.
TOLERANCE = dict(rtol=0, atol=100 * torch.finfo(torch.float32).eps)


def bases(kind: str = "llama") -> tuple[Any, Any]:
    """A Hugging Face model, and one with more rows behind its vocabulary, of which Megatron's is built."""
    hf, padded = tiny_hf_model(kind, vocab_size=VOCAB), tiny_hf_model(kind, vocab_size=PADDED)
    with torch.no_grad():
        for name, parameter in padded.named_parameters():
            parameter[: len(hf.get_parameter(name))] = hf.get_parameter(name)
    return hf, padded


def tokens() -> torch.Tensor:
    return TOKENS % VOCAB


def with_peft(hf: nn.Module, folder: Path) -> torch.Tensor:
    return hf_logits(peft.PeftModel.from_pretrained(copy.deepcopy(hf), str(folder)), tokens())


def lm_head(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name.partition("lm_head.")[2]: value for name, value in tensors.items() if "lm_head." in name}


@every_case("kind", ["llama", "llama_tied"])
@every_case("who_says_so", ["caller", "model"])
def test_peft_takes_an_export_of_the_true_vocabulary(kind: str, who_says_so: str, tmp_path: Path) -> None:
    hf, padded = bases(kind)
    model = adapted_megatron(padded, TARGETS)
    dora_fx.export_hf(model, tmp_path / "padded")
    with pytest.raises(RuntimeError, match="size mismatch"):
        with_peft(hf, tmp_path / "padded")
    if who_says_so == "model":
        # As Megatron-Bridge's configuration, which is a TransformerConfig, has it.
        model.config.vocab_size = VOCAB
    dora_fx.export_hf(model, tmp_path / "cut", **({"vocab_size": VOCAB} if who_says_so == "caller" else {}))
    shapes = {name: tuple(value.shape) for name, value in lm_head(tmp_path / "cut").items()}
    assert shapes == {"lora_A.weight": (4, 48), "lora_B.weight": (VOCAB, 4), "lora_magnitude_vector": (VOCAB,)}
    expected = megatron_logits(model, tokens())[..., :VOCAB]
    torch.testing.assert_close(with_peft(hf, tmp_path / "cut"), expected, **TOLERANCE)


@every_case("who_says_so", ["caller", "model"])
@every_case("is_adapted", [False, True])
def test_an_import_leaves_the_padding_as_it_is(is_adapted: bool, who_says_so: str, tmp_path: Path) -> None:
    hf, padded = bases()
    save_peft_adapter(hf, tmp_path / "adapter", target_modules=["o_proj", "lm_head"])
    model = adapted_megatron(padded, TARGETS) if is_adapted else megatron_of(padded)
    stated = {"vocab_size": VOCAB} if who_says_so == "caller" else {}
    if who_says_so == "model":
        model.config.vocab_size = VOCAB
    dora_fx.import_hf(model, tmp_path / "adapter", **stated)
    logits = megatron_logits(model, tokens())
    torch.testing.assert_close(logits[..., :VOCAB], with_peft(hf, tmp_path / "adapter"), **TOLERANCE)
    site = sites(model)["output_layer"]
    hidden = torch.randn(3, 1, 48)
    adapted, base = site(hidden)[0], site.to_wrap(hidden)[0]
    assert torch.equal(adapted[..., VOCAB:], base[..., VOCAB:])
    assert not torch.allclose(adapted[..., :VOCAB], base[..., :VOCAB])
    dora_fx.export_hf(model, tmp_path / "again", **stated)
    torch.testing.assert_close(lm_head(tmp_path / "again"), lm_head(tmp_path / "adapter"), rtol=0, atol=0)


def test_a_model_that_knows_its_vocabulary_takes_an_adapter_with_all_rows_too(tmp_path: Path) -> None:
    _, padded = bases()
    save_peft_adapter(padded, tmp_path / "adapter", target_modules=["lm_head"])
    model = megatron_of(padded)
    model.config.vocab_size = VOCAB
    dora_fx.import_hf(model, tmp_path / "adapter")
    expected = hf_logits(peft.PeftModel.from_pretrained(padded, str(tmp_path / "adapter")), tokens())
    torch.testing.assert_close(megatron_logits(model, tokens()), expected, **TOLERANCE)


def test_statements_that_cannot_be(tmp_path: Path) -> None:
    hf, padded = bases()
    model = adapted_megatron(padded, TARGETS)
    for vocab_size in (0, -1, PADDED + 1):
        message = f"vocab_size: found {vocab_size}, expected a positive number, at most the {PADDED} rows"
        with pytest.raises(ValueError, match=message):
            dora_fx.export_hf(model, tmp_path / "out", vocab_size=vocab_size)
        dora_fx.export_hf(model, tmp_path / "adapter")
        with pytest.raises(ValueError, match=message):
            dora_fx.import_hf(megatron_of(padded), tmp_path / "adapter", vocab_size=vocab_size)
        (tmp_path / "adapter").rename(tmp_path / f"adapter {vocab_size}")
    save_peft_adapter(hf, tmp_path / "adapter", target_modules=["lm_head"])
    for stated in ({}, {"vocab_size": 62}):
        expected = stated.get("vocab_size", PADDED)
        message = rf"lm_head: found lora_b \({VOCAB}, 4\), expected \({expected}, 4\); pass vocab_size if rows"
        plain = megatron_of(padded)
        with pytest.raises(ValueError, match=message):
            dora_fx.import_hf(plain, tmp_path / "adapter", **stated)
        assert not sites(plain)
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_at_hand_has_the_last_word(tmp_path: Path) -> None:
    hf, padded = bases()
    hf.save_pretrained(tmp_path / "base")
    where = {"base_model": str(tmp_path / "base")}
    model = adapted_megatron(padded, TARGETS)
    for stated, rows in (({}, PADDED), ({"vocab_size": 62}, 62)):
        message = (
            rf"adapter would have {rows} rows, expected the {VOCAB} tokens .*config\.json says; pass vocab_size=60"
        )
        with pytest.raises(ValueError, match=message):
            dora_fx.export_hf(model, tmp_path / "out", **where, **stated)
    assert not (tmp_path / "out").exists()
    dora_fx.export_hf(model, tmp_path / "out", **where, vocab_size=VOCAB)
    torch.testing.assert_close(
        with_peft(hf, tmp_path / "out"), megatron_logits(model, tokens())[..., :VOCAB], **TOLERANCE
    )
    # Without an adapter of the output layer its rows are nobody's business.
    dora_fx.export_hf(adapted_megatron(padded, ["linear_proj"]), tmp_path / "another", **where)
    assert json.loads((tmp_path / "another" / "adapter_config.json").read_text())["target_modules"] == ["o_proj"]
    for broken in ("{", "[]"):
        (tmp_path / "base" / "config.json").write_text(broken)
        dora_fx.export_hf(model, tmp_path / f"export {broken}", **where)
