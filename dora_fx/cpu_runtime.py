"""What Megatron-Core needs on a machine without CUDA: `torch.cuda.current_device()` must answer.

Megatron asks it where to put rotary frequencies and the buffers of its collectives. Everything else on a CPU is
an ordinary option (gloo, `use_cpu_initialization=True`, the inference RNG tracker). Only the command line and the
tests call this module; a GPU user never runs it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch


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
