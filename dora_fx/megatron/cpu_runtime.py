"""Replace the functions of CUDA that Megatron-Core calls, on a machine without it, for the command, examples and tests.

To build a model and to run it, Megatron calls `torch.cuda.current_device()` for the device of rotary frequencies and of
its collectives' buffers. Everything else on a CPU is an ordinary option (gloo, `use_cpu_initialization=True`, the
inference RNG tracker).

Its data parallelism and its optimizers name CUDA in their code, as the device of small tensors and in the types that
they expect of parameters.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def cuda_current_device_is_cpu() -> Iterator[None]:
    """Make `torch.cuda.current_device()` return `torch.device("cpu")` for a model that runs on CPU.

    The stand-in is a `functools.partial` because Dynamo knows those by type. It gives a function found under this
    name the rule "torch operator" whenever it builds its rule table (at the first compilation, and again after
    `init_process_group`), then refuses it ("torch.* op returned non-Tensor") unless it was already there when
    `torch._dynamo` was imported: whether a model compiles would depend on the order of imports.

    megatron-core 0.16 reads a name in routers that it has with Transformer Engine only; it gets its value for none.
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    original = torch.cuda.current_device
    torch.cuda.current_device = functools.partial(torch.device, "cpu")  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.cuda.current_device = original


@contextlib.contextmanager
def cuda_means_cpu() -> Iterator[None]:
    """Let Megatron's data parallelism, optimizers and pipeline schedules run on a CPU.

    Tensors that are asked for on "cuda" are made on the CPU, and `type()` of a CPU tensor names a CUDA one. Code that
    was compiled outside the context is compiled once more when it is called inside.
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
