"""Find modules of this process whose tensors lie in the memory of weights that are about to be written.

A policy and its reference may have one base between them, as one parameter or as two over the same memory. Writing a
merged weight for one of them then changes the other, and neither model has a reference to the other. So all modules of
the process are searched; no reference to them is kept.
"""

from __future__ import annotations

import bisect
import gc
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dora_fx.megatron import walk
from dora_fx.modules import DoRALinear, weights_of


class _Memory(NamedTuple):
    """Bytes of a device, from `start` up to `stop`."""

    device: str
    start: int
    stop: int


def sharing_problem_maybe(chunks: Sequence[nn.Module], linears: Mapping[str, nn.Module]) -> str | None:
    """Return a message that names the first layer whose weight another module uses too, and that module.

    It is None if there is none in this process.

    Args:
        chunks: of the model that the layers are in.
        linears: plain layers whose weights are about to be written, by their paths in the whole model.
    """
    own = sorted(
        (memory, path)
        for path, linear in linears.items()
        for weight in weights_of(linear)
        if (memory := _memory_maybe(weight)) is not None
    )
    written = set(linears.values())
    if next(_sharing(own, written), None) is None:
        return None
    # A model without users may still be there: reference cycles keep it until the collector runs.
    gc.collect()
    for path, other, name in _sharing(own, written):
        user = _path_anywhere(chunks, other, name)
        return (
            f"{path}: found its base weight in the memory of {user} too, which would change "
            "with it; expected a weight that no other module uses: give one of them a copy"
        )
    return None


def _sharing(
    own: Sequence[tuple[_Memory, str]], written: Collection[nn.Module]
) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield layers' paths, each with another module that has a tensor in the layer's memory, and that tensor's name.

    Args:
        own: memory of the weights, none of which overlap, in order, and the layers' paths.
        written: the modules of the layers themselves.
    """
    for module in _modules_of_process():
        if module in written:
            continue
        for name, tensor in _own_tensors(module):
            memory = _memory_maybe(tensor)
            if memory is None:
                continue
            last_before_its_end = bisect.bisect_left(own, (memory._replace(start=memory.stop, stop=0), "")) - 1
            if last_before_its_end >= 0:
                candidate, path = own[last_before_its_end]
                if candidate.device == memory.device and candidate.stop > memory.start:
                    yield path, module, name


def _modules_of_process() -> list[nn.Module]:
    """Return all modules but traced graphs, which hold the tensors of the model that they were traced from."""
    objects = gc.get_objects()
    # A process has millions of objects, of some thousand classes.
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, nn.Module)}
    kinds = {kind for kind in kinds if not issubclass(kind, fx.GraphModule)}
    return [found for found in objects if type(found) in kinds]


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for kind in ("_parameters", "_buffers"):
        # One that another thread is constructing may have none yet.
        for name, tensor in list(module.__dict__.get(kind, {}).items()):
            if isinstance(tensor, torch.Tensor):
                yield name, tensor


def _memory_maybe(tensor: torch.Tensor) -> _Memory | None:
    """Return the memory of a tensor; None for one without memory of its own."""
    if tensor.is_meta or tensor.layout != torch.strided or isinstance(tensor, FakeTensor):
        return None
    if nn.parameter.is_lazy(tensor) or is_traceable_wrapper_subclass(tensor) or not tensor.numel():
        return None
    start = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return _Memory(str(tensor.device), start, start + (last + 1) * tensor.element_size()) if start else None


def _path_anywhere(chunks: Sequence[nn.Module], module: nn.Module, name: str) -> str:
    """Return the path of a module's tensor in the model, or the longest that it has in another one."""
    for chunk in chunks:
        for named in walk(chunk):
            if named.module is module:
                return f"{named.whole_path}.{name}"
    paths = [
        (f"{path}.{name}".lstrip(".").replace(".to_wrap.", "."), type(root).__name__)
        for root in _modules_of_process()
        if not isinstance(root, DoRALinear)
        for path, part in root.named_modules()
        if part is module
    ]
    path, root = max(paths, key=lambda found: len(found[0]))
    return f"{path} of a {root} outside the model"
