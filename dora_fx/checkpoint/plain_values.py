"""Converts optimizer settings to plain values, which compare with `==` and load without any class of this package."""

from __future__ import annotations

import numbers
from typing import Any

import torch


def to_plain(value: Any) -> Any:
    """Copy a value into None, bool, int, float, str, tuples, lists, and dicts that stand for tensors of one element.

    Raises:
        TypeError: the value or a part of it is something else; the message says what.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    # NumPy's scalars register with `numbers`, and become Python's here.
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, torch.Tensor) and type(value) in (torch.Tensor, torch.nn.Parameter):
        if value.numel() == 1 and not value.is_complex():
            dtype = str(value.dtype).removeprefix("torch.")
            return {"tensor": value.item(), "dtype": dtype, "shape": tuple(value.shape)}
        raise TypeError(f"a {value.dtype} tensor of shape {tuple(value.shape)}")
    # By type and not isinstance: a named tuple would be constructed in another way.
    if type(value) in (tuple, list):
        return type(value)(map(to_plain, value))
    raise TypeError(f"a {type(value).__module__}.{type(value).__qualname__}")


def from_plain(value: Any, like: Any = None) -> Any:
    """Invert `to_plain`. Tensors are made on the CPU, or on the device of `like` if that is a tensor."""
    if isinstance(value, dict):
        device = like.device if isinstance(like, torch.Tensor) else "cpu"
        dtype = getattr(torch, value["dtype"])
        return torch.tensor(value["tensor"], dtype=dtype, device=device).reshape(value["shape"])
    if isinstance(value, (tuple, list)):
        return type(value)(map(from_plain, value))
    return value
