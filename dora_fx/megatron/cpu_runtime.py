"""Stand-ins for what Megatron-Core needs of CUDA, on a machine without it. The command, examples and tests call it.

Building a model and running it: `torch.cuda.current_device()` must answer, for Megatron asks it where to put rotary
frequencies and the buffers of its collectives. Everything else on a CPU is an ordinary option (gloo,
`use_cpu_initialization=True`, the inference RNG tracker).

Data parallelism and the optimizer: they name CUDA in their code, in the device of small tensors and in the types they
expect of parameters.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def cuda_current_device_is_cpu() -> Iterator[None]:
    """Make `torch.cuda.current_device()` return `torch.device("cpu")` for a model that runs on CPU.

    The stand-in is a `functools.partial` because Dynamo knows those by type. It gives a function found under this
    name the rule "torch operator" whenever it builds its rule table (at the first compilation, and again after
    `init_process_group`), then refuses it ("torch.* op returned non-Tensor") unless it was already there when
    `torch._dynamo` was imported: whether a model compiles would depend on the order of imports.
    """
    original = torch.cuda.current_device
    torch.cuda.current_device = functools.partial(torch.device, "cpu")  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.cuda.current_device = original


@contextlib.contextmanager
def cuda_means_cpu() -> Iterator[None]:
    """Let Megatron's data parallelism and optimizer run on a CPU, and its pipeline schedule.

    Tensors asked for on "cuda" come on the CPU, and those on the CPU say that their type is a CUDA one. Code that was
    compiled outside is compiled once more where it is called inside.
    """
    original = torch.cuda.current_stream
    no_stream = types.SimpleNamespace(wait_stream=lambda stream: None, wait_event=lambda event: None)
    torch.cuda.current_stream = lambda *args: no_stream  # type: ignore[assignment]
    try:
        with _CudaMeansCpu():
            yield
    finally:
        torch.cuda.current_stream = original


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        result = function(*args, **kwargs)
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("torch.", "torch.cuda.")
        return result
