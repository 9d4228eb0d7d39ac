"""Importing this module makes Transformer Engine importable in the process, with emulated kernels; before Megatron."""

from __future__ import annotations

import inspect
import os
import sys
import textwrap
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from tests.emulated_te.compiled_module import CompiledModule


def install() -> None:
    """Import Transformer Engine without libraries and without a GPU, and let its modules take tensors on the CPU."""
    assert "megatron.core" not in sys.modules, "Megatron was imported without Transformer Engine already"
    sys.modules["transformer_engine_torch"] = CompiledModule()
    with mock.patch.dict(os.environ, NVTE_PROJECT_BUILDING="1"):  # loads no library then
        import transformer_engine.common
    transformer_engine.common.load_framework_extension = lambda framework: None
    torch.cuda.is_current_stream_capturing = lambda: False
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch import utils
    from transformer_engine.pytorch.cpp_extensions import gemm
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    assert te.Linear is not None
    gemm.get_cublas_workspace = lambda *_: torch.empty(1, dtype=torch.uint8)
    gemm._empty_tensor = utils._empty_tensor = torch.Tensor
    TransformerEngineBaseModule.__init__ = _where_cuda_seems_available(TransformerEngineBaseModule.__init__)
    TransformerEngineBaseModule.prepare_forward = _with_text_replaced(
        TransformerEngineBaseModule.prepare_forward, "not inp.is_cuda", "False"
    )


def _where_cuda_seems_available(init: Callable[..., None]) -> Callable[..., None]:
    def seeing_cuda(*args: Any, **kwargs: Any) -> None:
        with mock.patch.object(torch.cuda, "is_available", lambda: True):
            init(*args, **kwargs)

    return seeing_cuda


def _with_text_replaced(function: Callable[..., Any], old: str, new: str) -> Callable[..., Any]:
    """The function compiled from its own source with one text replaced, which must be there once."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{old!r} is not once in {function.__qualname__}"
    names: dict[str, Any] = {}
    exec(compile(source.replace(old, new), inspect.getsourcefile(function) or "", "exec"), function.__globals__, names)
    replaced: Callable[..., Any] = names[function.__name__]
    return replaced


install()
