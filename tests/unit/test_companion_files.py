"""Files of a base that are no weights come along with the merged model, as they are; weights and links out do not."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import dora_fx
from dora_fx.app.cli.main import main
from dora_fx.megatron.world import megatron_world
from dora_fx.models import load_hf_checkpoint
from dora_fx.models.base_files import companion_files
from tests.gguf_models import write_gguf
from tests.hf_models import save_tiny_checkpoint, tiny_hf_model
from tests.models import GPT_TARGETS, randomize_adapters
from tests.peft_models import megatron_of
from tests.tables import every_case

COMPANIONS = {
    "generation_config.json": b'{"eos_token_id": [0, 61], "temperature": 0.7}\n',
    "chat_template.jinja": b"{% for message in messages %}...",
    "special_tokens_map.json": b'{"eos_token": "<e>"}',
    "added_tokens.json": b"{}",
    "tokenizer.model": b"\x0a\x0e sentencepiece",
    "vocab.txt": b"a\nb\n",
    "LICENSE": b"terms",
    "README.md": b"# A card\n",
    "params.json": b"{}",
    "Notice with spaces.TXT": b"notice",
    "figures/loss.png": b"\x89PNG",
    "original/params.json": b'{"dim": 48}',
    "original/tokenizer.model": b"sentencepiece",
}
WEIGHTS = (
    *("pytorch_model.bin", "model-00001-of-00002.safetensors", "model.safetensors.index.json.bak.pt", "tf_model.h5"),
    *("original/consolidated.00.pth", "consolidated.safetensors", "old/Model.SafeTensors", "flax_model.msgpack"),
    *("model.Q4_K_M.gguf", "onnx/model.onnx", "onnx/model.onnx_data", "rust_model.ot", "training_args.bin"),
    *("pytorch_model.bin.index.json", "ema.ckpt", "global_step1/mp_rank_00_model_states.pt"),
)
OF_TOOLS = (
    ".gitattributes",
    ".git/config",
    ".git/lfs/objects/4d/7a",
    ".cache/huggingface/download/a.lock",
    ".DS_Store",
)


def add_files(folder: Path) -> None:
    for name, content in (COMPANIONS | dict.fromkeys([*WEIGHTS, *OF_TOOLS], b"weights")).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def save_adapter(base: Path, into: Path, kind: str = "llama") -> Path:
    """A checkpoint of adapters away from the identity."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(base) if base.is_dir() else tiny_hf_model(kind)
    with megatron_world():
        model = dora_fx.DoRA(GPT_TARGETS, dim=2)(megatron_of(hf))
        randomize_adapters(model)
        dora_fx.save_checkpoint(model, into)
    return into


def merge(checkpoint: Path, base: Path, target: Path) -> int:
    return main(["merge", str(checkpoint), "--base", str(base), "--to", str(target)])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_everything_but_weights_comes_along(tmp_path: Path) -> None:
    base = save_tiny_checkpoint(tmp_path / "base")
    checkpoint = save_adapter(base, tmp_path / "saved")
    add_files(base)
    before = contents(base)
    assert merge(checkpoint, base, tmp_path / "merged") == 0
    found = contents(tmp_path / "merged")
    assert found.keys() == {*COMPANIONS, "tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"}
    assert {name: found[name] for name in found if name not in ("config.json", "model.safetensors")} == {
        name: before[name] for name in found if name not in ("config.json", "model.safetensors")
    }
    assert contents(base) == before
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "merged")
    assert (generation.eos_token_id, generation.temperature) == ([0, 61], 0.7)
    merged, own = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "base"))
    assert merged.keys() == own.keys() and not torch.equal(
        *(t["model.layers.0.mlp.up_proj.weight"] for t in (merged, own))
    )


def test_a_base_without_generation_settings_gets_none(tmp_path: Path) -> None:
    base = save_tiny_checkpoint(tmp_path / "base")
    (base / "generation_config.json").unlink()
    assert merge(save_adapter(base, tmp_path / "saved"), base, tmp_path / "merged") == 0
    assert not (tmp_path / "merged" / "generation_config.json").exists()


@pytest.mark.parametrize("names", [("torch_dtype",), ("dtype",), ("torch_dtype", "dtype"), ()])
def test_the_config_is_the_bases_own_but_for_what_the_weights_changed(names: tuple[str, ...], tmp_path: Path) -> None:
    """Older names and fields that no transformers knows stay for the readers that know them."""
    base = save_tiny_checkpoint(tmp_path / "base", "llama_tied")
    checkpoint = save_adapter(base, tmp_path / "saved")
    fields = json.loads((base / "config.json").read_text())
    del fields["dtype"], fields["rope_parameters"]
    fields |= dict(rope_theta=10000.0, of_another_reader={"a": [1]}, transformers_version="4.31.0")
    fields |= dict.fromkeys(names, "bfloat16")
    (base / "config.json").write_text(json.dumps(fields))
    assert merge(checkpoint, base, tmp_path / "merged") == 0
    found = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert found == fields | dict.fromkeys(names or ("dtype",), "float32")
    assert load_hf_checkpoint(tmp_path / "merged").config.tie_word_embeddings


def test_an_output_layer_that_the_config_calls_tied_stays_its_own(tmp_path: Path) -> None:
    base = save_tiny_checkpoint(tmp_path / "base", "llama_tied")
    untied = tiny_hf_model("llama", seed=5)
    untied.config.tie_word_embeddings = True
    untied.save_pretrained(base, state_dict={name: value.clone() for name, value in untied.state_dict().items()})
    assert json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= load_file(base / "model.safetensors").keys()
    assert merge(save_adapter(base, tmp_path / "saved"), base, tmp_path / "merged") == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], untied.lm_head.weight)
    assert torch.equal(merged["model.embed_tokens.weight"], untied.model.embed_tokens.weight)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


def in_the_cache(plain: Path, repository: Path) -> Path:
    """The Hugging Face cache's layout of a directory: a snapshot of links to blobs."""
    snapshot, blobs = repository / "snapshots" / "4f1c", repository / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in plain.rglob("*") if path.is_file())):
        shutil.copyfile(path, blobs / f"{number:040x}")
        link = snapshot / path.relative_to(plain)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / f"{number:040x}", link.parent))
    return snapshot


def test_a_snapshot_of_the_hugging_face_cache_is_copied_and_not_linked(tmp_path: Path) -> None:
    plain = save_tiny_checkpoint(tmp_path / "plain")
    for name in ("generation_config.json", "figures/loss.png", "original/params.json"):
        (plain / name).parent.mkdir(parents=True, exist_ok=True)
        (plain / name).write_bytes(COMPANIONS[name])
    base = in_the_cache(plain, tmp_path / "models--me--base")
    assert merge(save_adapter(base, tmp_path / "saved"), base, tmp_path / "merged") == 0
    assert not any(path.is_symlink() for path in (tmp_path / "merged").rglob("*"))
    found, expected = contents(tmp_path / "merged"), contents(plain)
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} == {"model.safetensors"}


@every_case(
    ("link", "target"),
    [
        ("notes.txt", "/etc/hostname"),
        ("notes.txt", "../secret.txt"),
        ("deep/notes.txt", "../../secret.txt"),
        ("folder", ".."),
        ("folder", "deep"),
        ("loop", "loop"),
        ("gone.json.txt", "nowhere"),
        ("weights.txt", "../other/snapshots/1/blobs"),
    ],
)
def test_a_link_out_of_the_base_is_refused_before_anything_is_read(
    link: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny_checkpoint(tmp_path / "base")
    checkpoint = save_adapter(base, tmp_path / "saved")
    (tmp_path / "secret.txt").write_text("secret")
    (base / "deep").mkdir()
    (base / link).symlink_to(target)
    capsys.readouterr()
    assert merge(checkpoint, base, tmp_path / "merged") == 2
    shown = capsys.readouterr()
    assert f"{base / link}: found a link to " in shown.err and shown.err.count("\n") == 1
    assert "expected a file of the base itself" in shown.err
    assert "loading" not in shown.out and not (tmp_path / "merged").exists()


def test_weights_may_be_links_to_anywhere(tmp_path: Path) -> None:
    base = save_tiny_checkpoint(tmp_path / "base")
    checkpoint = save_adapter(base, tmp_path / "saved")
    os.rename(base / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (base / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert merge(checkpoint, base, tmp_path / "merged") == 0


def test_files_of_a_merged_model_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    base = save_tiny_checkpoint(tmp_path / "base")
    (base / "README.md").touch(0o600)
    checkpoint = save_adapter(base, tmp_path / "saved")
    before = os.umask(0o027)
    try:
        assert merge(checkpoint, base, tmp_path / "merged") == 0
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "merged").iterdir()} == {0o640}


def test_a_link_inside_the_base_is_copied_and_what_is_no_file_is_left(tmp_path: Path) -> None:
    base = save_tiny_checkpoint(tmp_path / "base")
    (base / "TERMS").symlink_to("tokenizer_config.json")
    # In a sub-folder, where no reader opens it; beside the weights it is refused.
    (base / "deep").mkdir()
    os.mkfifo(base / "deep" / "pipe")
    assert Path("TERMS") in companion_files(base) and Path("deep/pipe") not in companion_files(base)
    assert merge(save_adapter(base, tmp_path / "saved"), base, tmp_path / "merged") == 0
    assert not (tmp_path / "merged" / "TERMS").is_symlink()
    assert (tmp_path / "merged" / "TERMS").read_bytes() == (base / "tokenizer_config.json").read_bytes()
    assert not (tmp_path / "merged" / "deep").exists()


def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny_checkpoint(tmp_path / "base")
    checkpoint = save_adapter(base, tmp_path / "saved")
    (base / "large.txt").write_bytes(bytes(400_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The weights of the first do not fit, of the second the base's own file.
    for limit in (50_000, 300_000):
        capsys.readouterr()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            assert merge(checkpoint, base, tmp_path / "merged") == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        shown = capsys.readouterr().err
        assert f"--to {tmp_path / 'merged'}: " in shown and "File too large" in shown and shown.count("\n") == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "saved"]


def test_a_merged_model_may_lie_in_its_base(tmp_path: Path) -> None:
    base = save_tiny_checkpoint(tmp_path / "base")
    checkpoint = save_adapter(base, tmp_path / "saved")
    assert merge(checkpoint, base, base / "merged") == 0
    assert {path.name for path in (base / "merged").iterdir()} == {path.name for path in base.iterdir()} - {"merged"}


@pytest.mark.parametrize(
    ("metadata", "ends"), [({}, 0), ({"tokenizer.ggml.eot_token_id": 61, "tokenizer.ggml.eom_token_id": 0}, [0, 61])]
)
def test_a_merged_gguf_file_keeps_all_tokens_that_end_a_turn(
    metadata: dict[str, Any], ends: Any, tmp_path: Path
) -> None:
    metadata = {"tokenizer.chat_template": "{{ messages }}", **metadata}
    base = write_gguf(tmp_path / "model.gguf", tiny_hf_model(), metadata=metadata)
    (tmp_path / "unrelated.json").write_text("{}")
    assert merge(save_adapter(base, tmp_path / "saved"), base, tmp_path / "merged") == 0
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == ends
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "{{ messages }}"
    assert not (tmp_path / "merged" / "unrelated.json").exists()
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"
