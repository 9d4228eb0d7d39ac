"""Let Megatron's optimizer and data parallelism, which name CUDA in their code, run on a CPU in tests."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        result = function(*args, **kwargs)
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("torch.", "torch.cuda.")
        return result


@contextmanager
def cuda_means_cpu() -> Iterator[None]:
    """Tensors asked for on "cuda" come on the CPU. Not to be entered around torch.compile."""
    no_stream = types.SimpleNamespace(wait_stream=lambda stream: None, wait_event=lambda event: None)
    with _CudaMeansCpu(), mock.patch.object(torch.cuda, "current_stream", lambda *args: no_stream):
        yield
