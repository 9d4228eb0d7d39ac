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

from tests.emulated_te.compiled_module import CompiledModule, general_grouped_gemm


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
    from transformer_engine.pytorch.attention.dot_product_attention import softmax
    from transformer_engine.pytorch.attention.dot_product_attention import utils as dpa_utils
    from transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention import DotProductAttention
    from transformer_engine.pytorch.cpp_extensions import gemm
    from transformer_engine.pytorch.module import grouped_linear
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    assert te.Linear is not None
    # Its kernels for optimizers are not emulated; Megatron takes torch's then.
    sys.modules["transformer_engine.pytorch.optimizers"] = None  # type: ignore[assignment]
    # A device that has no FP8.
    utils._get_device_compute_capability = lambda device: (8, 0)
    gemm.get_cublas_workspace = lambda *_: torch.empty(1, dtype=torch.uint8)
    gemm._empty_tensor = utils._empty_tensor = torch.Tensor
    grouped_linear.general_grouped_gemm = general_grouped_gemm
    # Attention in plain torch is Transformer Engine's own; the fused ones are kernels.
    os.environ.update(NVTE_FLASH_ATTN="0", NVTE_FUSED_ATTN="0", NVTE_UNFUSED_ATTN="1")
    DotProductAttention.forward = _with_text_replaced(
        DotProductAttention.forward, "query_layer.is_cuda and key_layer.is_cuda and value_layer.is_cuda", "True"
    )
    dpa_utils.get_full_mask = _with_text_replaced(dpa_utils.get_full_mask, 'device="cuda"', 'device="cpu"')
    softmax._get_default_causal_mask = _with_text_replaced(
        softmax._get_default_causal_mask, 'device="cuda"', 'device="cpu"'
    )
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
    """The function compiled from its own source, decorators too, with a text replaced, which must be there."""
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    assert old in source, f"{old!r} is not in {function.__qualname__}"
    names: dict[str, Any] = {}
    exec(compile(source.replace(old, new), inspect.getsourcefile(function) or "", "exec"), function.__globals__, names)
    replaced: Callable[..., Any] = names[function.__name__]
    return replaced


install()
