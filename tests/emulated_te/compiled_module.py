"""A stand-in for `transformer_engine_torch`, Transformer Engine's compiled module: a few kernels in plain torch.

Any other name gives an object that refuses to be called; as a constant it is a number of its own.
"""

from __future__ import annotations

import enum
import itertools
import types
from collections.abc import Sequence
from typing import Any

import torch

DType = enum.IntEnum("DType", "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1", start=0)
FP8FwdTensors = enum.IntEnum(
    "FP8FwdTensors", [f"GEMM{i}_{name}" for i in (1, 2, 3) for name in ("INPUT", "WEIGHT", "OUTPUT")], start=0
)
FP8BwdTensors = enum.IntEnum(
    "FP8BwdTensors", [f"GRAD_{name}{i}" for i in (1, 2, 3) for name in ("OUTPUT", "INPUT")], start=0
)
NVTE_Fused_Attn_Backend = enum.IntEnum(
    "NVTE_Fused_Attn_Backend", "NVTE_No_Backend NVTE_F16_arbitrary_seqlen NVTE_FP8", start=0
)

_numbers = itertools.count(1)


class Absent:
    """Something of the compiled module that is not emulated."""

    def __init__(self, name: str) -> None:
        self.name, self.number = name, next(_numbers)

    def __int__(self) -> int:
        return self.number

    __index__ = __int__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Layers that are adapted call none of these; a number made up here would be believed.
        raise NotImplementedError(f"transformer_engine_torch.{self.name} is not emulated")

    def __getattr__(self, name: str) -> Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.name}.{name}")


class CompiledModule(types.ModuleType):
    """The module to put in place of the compiled one; names that are not emulated are `Absent`."""

    def __init__(self) -> None:
        super().__init__("transformer_engine_torch")
        emulated = (rmsnorm_fwd, rmsnorm_bwd, layernorm_fwd, layernorm_bwd, generic_gemm, get_cudnn_version)
        constants = (DType, FP8FwdTensors, FP8BwdTensors, NVTE_Fused_Attn_Backend)
        for thing in (*emulated, *constants):
            setattr(self, thing.__name__, thing)

    def __getattr__(self, name: str) -> Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(name)


def rmsnorm_fwd(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, margin: int, centered: bool
) -> tuple[torch.Tensor, None, torch.Tensor]:
    """x `[tokens, in]`; returns the output, no mean, and 1 / sqrt(mean square) `[tokens]`."""
    assert quantizer is None, "FP8 is not emulated"
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1) + eps)
    return (wide * inverse[:, None] * (weight.float() + float(centered))).to(_torch_dtype(dtype)), None, inverse


def rmsnorm_bwd(
    dy: torch.Tensor, x: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor, margin: int, centered: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    normalised, grad = x.float() * inverse[:, None], dy.float()
    scaled = grad * (weight.float() + float(centered))
    dx = inverse[:, None] * (scaled - normalised * (scaled * normalised).mean(-1, keepdim=True))
    return dx.to(x.dtype), (grad * normalised).sum(0).to(weight.dtype)


def layernorm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    out: Any,
    quantizer: Any,
    dtype: Any,
    margin: int,
    centered: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x `[tokens, in]`; returns the output, and mean and 1 / standard deviation `[tokens]`."""
    assert quantizer is None, "FP8 is not emulated"
    wide = x.float()
    mean = wide.mean(-1)
    inverse = torch.rsqrt((wide - mean[:, None]).square().mean(-1) + eps)
    y = (wide - mean[:, None]) * inverse[:, None] * (weight.float() + float(centered))
    return (y if bias is None else y + bias.float()).to(_torch_dtype(dtype)), mean, inverse


def layernorm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor,
    margin: int,
    centered: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    normalised, grad = (x.float() - mean[:, None]) * inverse[:, None], dy.float()
    scaled = grad * (weight.float() + float(centered))
    along = normalised * (scaled * normalised).mean(-1, keepdim=True)
    dx = inverse[:, None] * (scaled - scaled.mean(-1, keepdim=True) - along)
    return dx.to(x.dtype), (grad * normalised).sum(0).to(weight.dtype), grad.sum(0).to(weight.dtype)


def generic_gemm(
    a: torch.Tensor,
    transposes_a: bool,
    b: torch.Tensor,
    transposes_b: bool,
    out: torch.Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: torch.Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: Any,
    is_gradient: bool,
    workspace: torch.Tensor,
    workspace_size: int,
    accumulates: bool,
    split_accumulator: bool,
    **overlap: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
    """Column-major, as cuBLAS: b @ a, each transposed if so said; b may have more than two dimensions."""
    assert quantizer is None and not gelu and overlap.get("comm_overlap") is None, "FP8 and overlap are not emulated"
    tokens, a, b = b.shape[:-1], a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    y = (b.t() if transposes_b else b) @ (a.t() if transposes_a else a)
    if not transposes_b:
        y = y.view(*tokens, y.shape[-1])
    bias_grad = b.sum(0) if bias is not None and is_gradient else None
    if bias is not None and not is_gradient:
        y = y + bias
    if out_dtype is not None:
        y = y.to(_torch_dtype(out_dtype))
    if out is not None:
        y = out.copy_(out + y if accumulates else y)
    return y, bias_grad, None, None


def general_grouped_gemm(
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    out: list[torch.Tensor],
    quantizers: Sequence[Any],
    out_dtype: torch.dtype,
    layout: str = "TN",
    m_splits: list[int] | None = None,
    gelu: bool = False,
    grad: bool = False,
    accumulate: bool = False,
    bias: Sequence[torch.Tensor] | None = None,
    use_bias: bool = False,
    use_split_accumulator: bool = False,
    D_dtype: Any = None,
    single_output: bool = False,
) -> tuple[list[torch.Tensor], Sequence[torch.Tensor | None] | None, None]:
    """A product for each expert, as `generic_gemm`; in place of Transformer Engine's function of that name.

    That one is Python, which only calls the compiled module: with lists of tensors and workspaces on a GPU.
    """
    assert not gelu and D_dtype is None and all(each is None for each in quantizers), "FP8 is not emulated"
    outputs = list(out[0].split(m_splits)) if single_output else out
    bias_grads: list[torch.Tensor | None] = []
    for index, (own_a, own_b, own_out) in enumerate(zip(a, b, outputs, strict=True)):
        y = (own_b.t() if layout[1] == "T" else own_b) @ (own_a.t() if layout[0] == "T" else own_a)
        if use_bias and bias is not None and not grad:
            y = y + bias[index]
        bias_grads.append(own_b.sum(0) if use_bias and grad else None)
        own_out.copy_(own_out + y if accumulate else y)
    return out, bias_grads if grad else bias, None


def get_cudnn_version() -> int:
    """Asked for where an implementation of attention is chosen; 9.0.0."""
    return 90000


def _torch_dtype(dtype: Any) -> torch.dtype:
    from transformer_engine.pytorch.constants import DType as TEDType
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    return dtype if isinstance(dtype, torch.dtype) else TE_DType_To_Torch[TEDType.cast(dtype)]
