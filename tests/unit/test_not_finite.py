"""An adapter with NaN or inf is neither kept nor handed on: every writer names the layer before it writes anything."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dora_fx
from dora_fx import CheckpointError
from dora_fx.app.cli.main import main
from dora_fx.checkpoint import read_adapters
from tests.hf_models import tiny_hf_model
from tests.models import randomize_adapters, sites
from tests.peft_models import adapted_megatron
from tests.unit.checkpoints import adapted, are_equal, refusal, values
from tests.unit.hostile_files import DATA, recompute_checksums

pytestmark = pytest.mark.usefixtures("world")

TENSORS = {"linear_in.weight": math.nan, "linear_out.weight": math.inf, "weight_magnitude": -math.inf}
WRITERS: dict[str, Callable[[Any, Path], object]] = {
    "save_checkpoint": dora_fx.save_checkpoint,
    "export_hf": dora_fx.export_hf,
    "iter_adapter": lambda model, _: dora_fx.iter_adapter(model),
    "iter_merged": lambda model, _: dora_fx.iter_merged(model),
    "merge": lambda model, _: dora_fx.merge(model),
    "merged": lambda model, _: dora_fx.merged(model).__enter__(),
    "save_pretrained": lambda model, path: model.save_pretrained(path),
}


def adapted_transformers() -> nn.Module:
    model = dora_fx.DoRA("all-linear", dim=4, alpha=8)(tiny_hf_model())
    randomize_adapters(model)
    return model


@pytest.mark.parametrize("of", ["megatron", "transformers"])
def test_every_writer_names_the_layer_and_writes_nothing(of: str, tmp_path: Path) -> None:
    model = adapted_megatron(tiny_hf_model()) if of == "megatron" else adapted_transformers()
    layers = sites(model)
    path = list(layers)[-1]
    for (name, value), (writer, write) in [(tensor, item) for tensor in TENSORS.items() for item in WRITERS.items()]:
        if writer == "save_pretrained" and of == "megatron":
            continue
        parameter = layers[path].adapter.get_parameter(name)
        was = parameter.detach().clone()
        with torch.no_grad():
            parameter.flatten()[-1] = value
        bits = {key: tensor.clone() for key, tensor in model.state_dict().items() if torch.is_tensor(tensor)}
        with pytest.raises((ValueError, CheckpointError)) as raised:
            write(model, tmp_path / "target")
        assert f"{path}.adapter.{name}: found NaN or inf, expected finite values" in str(raised.value), writer
        assert list(tmp_path.iterdir()) == [] and sites(model) == layers
        found = {key: tensor for key, tensor in model.state_dict().items() if torch.is_tensor(tensor)}
        torch.testing.assert_close(found, bits, rtol=0, atol=0, equal_nan=True)
        with torch.no_grad():
            parameter.copy_(was)
    dora_fx.save_checkpoint(model, tmp_path / "target")


def test_a_good_checkpoint_is_not_replaced_by_one_that_is_not_finite(tmp_path: Path) -> None:
    path, model = tmp_path / "checkpoint", adapted(1)
    dora_fx.save_checkpoint(model, path)
    good = values(model)
    with torch.no_grad():
        sites(model)["decoder.layers.0.mlp.linear_fc1"].adapter.weight_magnitude[0] = math.nan
    with pytest.raises(CheckpointError, match=r"\(what was there is unchanged\): decoder.layers.0.mlp.linear_fc1"):
        dora_fx.save_checkpoint(model, path)
    dora_fx.load_checkpoint(model, path)
    assert are_equal(values(model), good)


def test_a_stored_adapter_that_is_not_finite_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, model, mark = tmp_path / "checkpoint", adapted(1), 1234.5678
    with torch.no_grad():
        sites(model)["decoder.layers.0.mlp.linear_fc2"].adapter.linear_in.weight[1, 2] = mark
    dora_fx.save_checkpoint(model, path)
    [file] = path.glob(DATA)
    stored, planted = (torch.tensor([value]).numpy().tobytes() for value in (mark, math.nan))
    assert file.read_bytes().count(stored) == 1
    file.write_bytes(file.read_bytes().replace(stored, planted))
    recompute_checksums(path)
    expected = f"{path}: decoder.layers.0.mlp.linear_fc2.adapter.linear_in.weight: found NaN or inf, expected finite"
    assert expected in refusal(adapted(2), path)
    with pytest.raises(CheckpointError) as raised:
        read_adapters(path)
    assert expected in str(raised.value)
    for command in ("export", "merge"):
        assert main([command, str(path), "--base", "smollm2", "--to", str(tmp_path / "target")]) == 2
        assert expected in capsys.readouterr().err and not (tmp_path / "target").exists()
