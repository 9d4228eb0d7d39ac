"""Numbers, text and one-element tensors as values that compare with `==` and load without any class of ours."""

from __future__ import annotations

import numbers
from typing import Any

import torch


def to_plain(value: Any) -> Any:
    """A copy made of None, bool, int, float, str, tuples, lists, and dicts that stand for tensors of one element.

    Raises:
        TypeError: with what the value, or a part of it, is instead.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, torch.Tensor) and type(value) in (torch.Tensor, torch.nn.Parameter):
        if value.numel() == 1 and not value.is_complex():
            dtype = str(value.dtype).removeprefix("torch.")
            return {"tensor": value.item(), "dtype": dtype, "shape": tuple(value.shape)}
        raise TypeError(f"a {value.dtype} tensor of shape {tuple(value.shape)}")
    if type(value) in (tuple, list):
        return type(value)(map(to_plain, value))
    raise TypeError(f"a {type(value).__module__}.{type(value).__qualname__}")


def from_plain(value: Any, like: Any = None) -> Any:
    """The inverse of `to_plain`; tensors on the CPU, or where the tensor `like` is."""
    if isinstance(value, dict):
        device = like.device if isinstance(like, torch.Tensor) else "cpu"
        dtype = getattr(torch, value["dtype"])
        return torch.tensor(value["tensor"], dtype=dtype, device=device).reshape(value["shape"])
    if isinstance(value, (tuple, list)):
        return type(value)(map(from_plain, value))
    return value
