"""A whole Megatron GPT is one graph on CPU, in whichever order torch._dynamo, the patch and Megatron come."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dora_fx.megatron.cpu_runtime import cuda_current_device_is_cpu
from dora_fx.megatron.world import megatron_world

PROGRAM = """
import torch
{first}
from dora_fx.megatron.dynamo_settings import capture_megatron_whole
from dora_fx.megatron.world import megatron_world
from dora_fx.models import build_gpt_model, causal_mask
from tests.hf_models import tiny_hf_model

for _ in range(2):
    with megatron_world():
        hf = tiny_hf_model()
        model = build_gpt_model(hf.config, hf.state_dict()).eval()
        capture_megatron_whole()
        tokens = torch.arange(8).expand(2, 8)
        inputs = tokens, tokens, causal_mask(8, "cpu")
        with torch.no_grad():
            compiled = torch.compile(model, backend="eager", fullgraph=True)(*inputs)
            print(torch.equal(compiled, model(*inputs)))
    torch._dynamo.reset()
"""


@pytest.mark.parametrize(
    "first",
    [
        "pass",
        "import torch._dynamo",
        'torch.compile(torch.sin, backend="eager")(torch.zeros(2))',
        "import dora_fx.megatron.cpu_runtime, contextlib; contextlib.ExitStack().enter_context("
        "dora_fx.megatron.cpu_runtime.cuda_current_device_is_cpu()); import torch._dynamo",
    ],
    ids=["dynamo_last", "dynamo_first", "compiled_before", "patched_before_dynamo"],
)
@pytest.mark.slow
def test_the_order_of_imports_does_not_matter(first: str) -> None:
    program = PROGRAM.format(first=first)
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, cwd=root)
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_the_patch_is_undone() -> None:
    original = torch.cuda.current_device
    with cuda_current_device_is_cpu():
        assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.cuda.current_device is original


def test_a_world_cleans_up_after_an_error() -> None:
    original = torch.cuda.current_device
    with pytest.raises(KeyError), megatron_world():
        assert torch.distributed.get_backend() == "gloo"
        raise KeyError
    assert not torch.distributed.is_initialized()
    assert torch.cuda.current_device is original
    with megatron_world():
        pass


def test_a_world_in_a_world_and_a_world_without_a_meeting_point_are_refused(world: None) -> None:
    with pytest.raises(RuntimeError, match="has a default process group already"), megatron_world():
        pass
    with (
        pytest.raises(ValueError, match="world_size is 2, so the processes need a store"),
        megatron_world(world_size=2),
    ):
        pass
    with pytest.raises(ValueError, match="device is 'tpu', expected 'cpu' or 'cuda'"), megatron_world("tpu"):
        pass
