"""A base model that somebody planted files in is refused before transformers opens it.

Beside it stands what transformers, or a reader that it uses, does without the check.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dora_fx.models import load_hf_checkpoint
from dora_fx.models.hf_checkpoint import load_hf_config
from tests.hf_models import save_tiny_checkpoint, tiny_hf_model
from tests.peft_models import save_peft_adapter
from tests.tables import every_case
from tests.unit.hostile_files import Payload, archive_with, compressed, is_endless, ran, saved
from tests.unit.refused_bases import refused


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_checkpoint(tmp_path / "base")


def test_a_pipe_among_the_files(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (base / "generation_config.json").unlink()
    os.mkfifo(base / "generation_config.json")
    assert is_endless("import sys\npass\nopen(sys.argv[1]).read()", base / "generation_config.json", patience=3)
    refused(base, "generation_config.json: found a named pipe, expected a regular file; take it out", capsys)


def use_pickled_weights(base: Path, content: bytes) -> Path:
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(content)
    return base / "pytorch_model.bin"


def test_pickled_weights_are_read(base: Path) -> None:
    expected = load_hf_checkpoint(base).state_dict
    use_pickled_weights(base, saved(expected))
    found = load_hf_checkpoint(base).state_dict
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_code_in_pickled_weights(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "marker"
    path = use_pickled_weights(base, saved({"a": Payload(marker)}))
    assert ran(marker, lambda: torch.load(path, weights_only=False))
    refused(base, r"pytorch_model\.bin: found posix\.mkdir in it", capsys)
    assert not marker.exists()


def test_compressed_weights(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers reads a thousand times as many bytes as the file has."""
    content = compressed(saved({"a": torch.zeros(1 << 22)}))
    path = use_pickled_weights(base, content)
    assert torch.load(path, weights_only=True)["a"].nbytes > 100 * len(content)
    refused(base, r"pytorch_model\.bin: found compressed records", capsys)


def test_a_number_that_takes_memory(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted = (
        b"\x80\x02}X\x01\x00\x00\x00acbuiltins\nbytearray\n\x8a\x05" + (1 << 36).to_bytes(5, "little") + b"\x85Rs."
    )
    path = use_pickled_weights(base, archive_with(planted))
    code = "import sys\nfrom transformers.modeling_utils import load_state_dict\npass\nload_state_dict(sys.argv[1])"
    assert is_endless(code, path)
    refused(base, r"pytorch_model\.bin: found builtins\.bytearray in it", capsys)


def test_one_number_as_many(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any number of elements is one in the file, until they are converted to another dtype."""
    path = use_pickled_weights(base, saved({"lm_head.weight": torch.zeros(1).expand(1 << 40)}))
    found = torch.load(path, weights_only=True)["lm_head.weight"]
    assert found.numel() == 1 << 40 and path.stat().st_size < 1 << 11
    refused(base, r"pytorch_model\.bin: found 1,099,511,627,776 elements of tensors, expected at most", capsys)


def test_weights_of_before_archives(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = base / "old.bin"
    torch.save(tiny_hf_model().state_dict(), path, _use_new_zipfile_serialization=False)
    use_pickled_weights(base, path.read_bytes())
    refused(base, "found no archive of torch.save .*; download it again, or write it anew, as safetensors", capsys)


@pytest.mark.parametrize("format", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_that_names_other_files(base: Path, format: str, capsys: pytest.CaptureFixture[str]) -> None:
    private = base.parent / format
    state = load_hf_checkpoint(base).state_dict
    (base / "model.safetensors").rename(base.parent / "model.safetensors")
    (base.parent / "pytorch_model.bin").write_bytes(saved(state))
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, f"../{format}")}
    (base / f"{format}.index.json").write_text(json.dumps(index))
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])
    refused(base, f"found '../{format}' as the name of a file, expected one of this folder", capsys)
    index["weight_map"] = dict.fromkeys(state, str(private))
    (base / f"{format}.index.json").write_text(json.dumps(index))
    refused(base, "as the name of a file, expected one of this folder", capsys)
    index["weight_map"] = dict.fromkeys(state, "missing")
    (base / f"{format}.index.json").write_text(json.dumps(index))
    refused(base, f"missing: no such file, although {format}.index.json names it", capsys)


def test_links_of_a_cache_are_followed(base: Path) -> None:
    """huggingface_hub keeps the files of a snapshot as links to others."""
    blob = base.parent / "blob"
    (base / "model.safetensors").rename(blob)
    (base / "model.safetensors").symlink_to(blob)
    assert load_hf_checkpoint(base).config.num_hidden_layers == 2
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="found a device, expected a regular file; take it out of the folder"):
        load_hf_checkpoint(base)


def edit_config(base: Path, **values: Any) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | values))


def test_layers_without_end(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(base, model_type="qwen2", num_hidden_layers=10**9)
    code = "import sys\nfrom transformers import AutoConfig, Qwen2Config\npass\nAutoConfig.from_pretrained(sys.argv[1])"
    assert is_endless(code, base)
    refused(
        base,
        r"config\.json: found 1000000000 as num_hidden_layers, expected an integer from 1 to the elements of its weig",
        capsys,
    )
    edit_config(base, model_type="gemma3", num_hidden_layers=2, text_config={"num_hidden_layers": 10**9})
    code = (
        "import sys\nfrom transformers import AutoConfig, Gemma3Config\npass\nAutoConfig.from_pretrained(sys.argv[1])"
    )
    assert is_endless(code, base)
    refused(base, r"config\.json: found model_type = 'gemma3', which is not supported; expected one of llama", capsys)
    (base / "model.safetensors").unlink()
    edit_config(base, model_type="qwen2", num_hidden_layers=10**9)
    with pytest.raises(
        ValueError, match=r"found 1000000000 as num_hidden_layers, expected at most 10,000; .* download"
    ):
        load_hf_config(base)


def test_labels_without_end(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each gets a name, also in a model that has none."""
    edit_config(base, num_labels=10**9)
    code = "import sys\nfrom transformers import AutoConfig, LlamaConfig\npass\nAutoConfig.from_pretrained(sys.argv[1])"
    assert is_endless(code, base)
    edit_config(base, num_labels=10_001)
    refused(base, r"config\.json: found 10001 as num_labels, expected at most 10,000; .* download it again", capsys)


def test_another_config(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers reads the newest that a config names, in which sizes may be any."""
    fields = json.loads((base / "config.json").read_text())
    (base / "config.4.0.0.json").write_text(json.dumps(fields | {"num_hidden_layers": 7}))
    edit_config(base, configuration_files=["config.4.0.0.json"])
    assert transformers.AutoConfig.from_pretrained(base).num_hidden_layers == 7
    refused(base, r"config\.json: found configuration_files = .*, which is not followed", capsys)


def test_a_tokenizer_elsewhere(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (base / "tokenizer.json").rename(base.parent / "tokenizer.1.json")
    config = json.loads((base / "tokenizer_config.json").read_text())
    planted = {"fast_tokenizer_files": ["../tokenizer.1.json"]}
    (base / "tokenizer_config.json").write_text(json.dumps(config | planted))
    assert len(transformers.AutoTokenizer.from_pretrained(base)) == 63
    refused(base, r"tokenizer_config\.json: found fast_tokenizer_files = .*, which is not followed", capsys)


def test_normalizers_that_make_much_of_little(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((base / "tokenizer.json").read_text())
    each = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    content["normalizer"] = {"type": "Sequence", "normalizers": [each] * 4}
    (base / "tokenizer.json").write_text(json.dumps(content))
    code = (
        "import sys\nfrom transformers import AutoTokenizer\npass\nAutoTokenizer.from_pretrained(sys.argv[1])('a' * 9)"
    )
    assert is_endless(code, base)
    refused(base, r"tokenizer\.json: found .* normalizers that expand one character to 1,000 or more, expected", capsys)


@every_case(
    ("name", "value"),
    [("hidden_size", 10**6), ("vocab_size", 10**15), ("intermediate_size", -4), ("num_hidden_layers", "2")],
)
def test_sizes_that_the_weights_have_not(
    base: Path, name: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(base, **{name: value})
    refused(base, r"config\.json: found .* expected an integer .* of its weights", capsys)


def test_code_that_a_config_names(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers asks whether to run it, and takes a `y` that is on its way to something else."""
    marker = tmp_path / "marker"
    (base / "planted.py").write_text(
        f"import os\nos.mkdir({str(marker)!r})\nfrom transformers import LlamaConfig\n\n\nclass Planted(LlamaConfig):\n"
        "    model_type = 'planted'\n"
    )
    edit_config(base, model_type="planted", auto_map={"AutoConfig": "planted.Planted"})
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    assert ran(marker, lambda: transformers.AutoConfig.from_pretrained(base))
    refused(base, "found model_type = 'planted', which is not supported; expected one of llama", capsys)
    # Beside a type of its own, transformers leaves the code alone.
    edit_config(base, model_type="llama")
    assert load_hf_checkpoint(base).config.model_type == "llama"
    assert not marker.exists()


def test_code_that_a_tokenizer_names(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"
    (base / "planted.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    config = json.loads((base / "tokenizer_config.json").read_text())
    planted = {"tokenizer_class": "Planted", "auto_map": {"AutoTokenizer": ["planted.Planted", None]}}
    (base / "tokenizer_config.json").write_text(json.dumps(config | planted))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    assert ran(marker, lambda: transformers.AutoTokenizer.from_pretrained(base))
    # transformers may load one of its own tokenizers in its place.
    try:
        load_hf_checkpoint(base)
    except ValueError as error:
        assert "custom code" in str(error)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_an_attention_to_download(base: Path, name: str) -> None:
    """transformers looks for it on the hub, as soon as the package for that is installed."""
    edit_config(base, **{name: "kernels-community/planted"})
    with pytest.raises(ImportError, match="kernels"):
        transformers.AutoModelForCausalLM.from_pretrained(base)
    assert load_hf_checkpoint(base).config._attn_implementation == "eager"


def test_an_adapter_in_the_directory(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers adds it to the model."""
    save_peft_adapter(tiny_hf_model(), base, use_dora=False)
    assert (base / "config.json").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert any("lora_A" in name for name, _ in model.named_parameters())
    refused(
        base,
        "found adapter_config.json, a PEFT adapter's, with which .* change the model; expected a model alone",
        capsys,
    )
