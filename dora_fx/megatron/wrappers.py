"""See through the modules that people put around a model, or around parts of it.

A wrapper holds one module and hands calls on to it: torch.compile's, activation checkpointing's, mixed precision's,
data parallelism's. It does not change what the model computes, so paths, patterns, seeds and keys leave it out, and
attaching before or after wrapping gives the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from megatron.core.distributed import DistributedDataParallel, FullyShardedDataParallel, TorchFullyShardedDataParallel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import nn
from torch._dynamo import OptimizedModule
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FullyShardedDataParallel as TorchFSDP
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel
from torch.nn.parallel import DistributedDataParallel as TorchDDP
from torch.optim.swa_utils import AveragedModel

Model = nn.Module | Sequence[nn.Module]
ModelT = TypeVar("ModelT", bound=Model)

# Class of a wrapper -> the name that it keeps its module under.
_HELD_AS: dict[type[nn.Module], str] = {
    OptimizedModule: "_orig_mod",
    ActivationWrapper: "_checkpoint_wrapped_module",
    DistributedDataParallel: "module",
    Float16Module: "module",
    TorchDDP: "module",
    DataParallel: "module",
    TorchFullyShardedDataParallel: "module",
    AveragedModel: "module",
}


def chunks_of(model: Model) -> list[nn.Module]:
    """Return the chunks of a caller's model, without unwrapping them; the caller passes a model, or a list or a tuple.

    Raises:
        TypeError: it is something else, or none of its parts is a module.
        ValueError: there is no chunk, there is one twice, or a wrapper shards the parameters of one.
    """
    chunks = [model] if isinstance(model, nn.Module) else model
    if not isinstance(chunks, Sequence) or not all(isinstance(chunk, nn.Module) for chunk in chunks):
        found = [type(chunk).__name__ for chunk in chunks] if isinstance(chunks, Sequence) else type(model).__name__
        raise TypeError(f"model: found {found}, expected a torch.nn.Module, or a list or a tuple of model chunks")
    if not chunks:
        raise ValueError("model: found no chunk, expected a model or at least one of its chunks")
    if len(set(map(unwrap, chunks))) < len(chunks):
        raise ValueError("model: found the same chunk twice, expected the chunks of one model")
    for chunk in chunks:
        for path, module in chunk.named_modules():
            if isinstance(module, (TorchFSDP, FullyShardedDataParallel)):
                raise ValueError(
                    f"{path or 'model'}: found {type(module).__module__}.{type(module).__name__}, which replaces the "
                    "layers' weights by pieces of flat buffers; expected DistributedDataParallel, or "
                    "torch.distributed.fsdp.fully_shard after DoRA is attached"
                )
    return list(chunks)


_WITHOUT_FSDP = (
    "expected the whole tensor or Megatron's shard of it; FSDP2 (fully_shard) may be applied to an adapted model to "
    "train it, but attach, save, load, merge and export without it"
)


def check_unsharded(path: str, module: nn.Module) -> None:
    """Raise ValueError, naming the parameter, if one of a module's is a DTensor, of which a rank holds a piece.

    Between its forward and its backward pass a module of FSDP2 has whole tensors, whose memory goes away again.
    """
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(f"{path}.{name}: found a DTensor with placements {parameter.placements}, {_WITHOUT_FSDP}")
    # What FSDP tells Dynamo by (torch 2.13 to 2.15).
    if any(getattr(part, "_is_fsdp_managed_module", False) for part in module.modules()):
        raise ValueError(f"{path}: found a module of FSDP, {_WITHOUT_FSDP}")


def held_module(module: nn.Module) -> nn.Module | None:
    """Return the module that a wrapper holds; None for a module that is no wrapper."""
    for kind, name in _HELD_AS.items():
        if isinstance(module, kind):
            held: nn.Module = getattr(module, name)
            return held
    return None


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside any number of wrappers."""
    while (held := held_module(module)) is not None:
        module = held
    return module


class NamedModule(NamedTuple):
    """A module of a model chunk.

    Attributes:
        path: in the chunk, without wrappers.
        whole_path: the same with each layer's and each expert's number in the whole model in place of its number in the
            chunk, and so the same at every pipeline and expert-parallel size.
        module: without wrappers.
    """

    path: str
    whole_path: str
    module: Any


def walk(model: nn.Module, leaves: type[nn.Module] | tuple[type[nn.Module], ...] = ()) -> Iterator[NamedModule]:
    """Yield every module of a chunk once, by the first of its paths, and no wrapper.

    Args:
        model: a chunk, bare or wrapped.
        leaves: classes of which the parts are left out.
    """
    seen: set[nn.Module] = set()

    def visit(parent: NamedModule, holder: nn.Module | None) -> Iterator[NamedModule]:
        if parent.module in seen:
            return
        seen.add(parent.module)
        yield parent
        if not isinstance(parent.module, leaves):
            for name, whole_name, child in _children(parent.module, holder):
                named = NamedModule(_join(parent.path, name), _join(parent.whole_path, whole_name), child)
                yield from visit(named, parent.module)

    return visit(NamedModule("", "", unwrap(model)), None)


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in place of others wherever a chunk has them, also inside wrappers."""
    for holder in list(model.modules()):
        for name, child in list(holder._modules.items()):
            if child is not None and child in replacements:
                setattr(holder, name, replacements[child])
                if isinstance(holder, OptimizedModule):
                    # It calls a bound method that it made of its module at construction, and makes it again here.
                    holder.__setstate__(holder.__getstate__())


def first_local_expert(experts: Any) -> int:
    """Return the number of the first expert of this rank, counted over the experts of all ranks."""
    first: int = experts.ep_group.rank() * experts.num_local_experts
    return first


def _children(parent: nn.Module, holder: nn.Module | None) -> Iterator[tuple[str, str, nn.Module]]:
    """Children by their names in the parent and in the whole model, where Megatron numbers layers from one.

    Args:
        holder: the parent's own parent. That of a list of experts knows their numbers.
    """
    children = [(name, unwrap(child)) for name, child in parent.named_children()]
    if isinstance(holder, SequentialMLP) and parent is holder.local_experts:
        first = first_local_expert(holder)
        for index, (name, child) in enumerate(children):
            yield name, str(first + index), child
        return
    numbers: list[Any] = [getattr(child, "layer_number", None) for _, child in children]
    # Layers that have no numbers, or other numbers than one after the other, keep their names in the list.
    in_order = [number - index for index, number in enumerate(numbers) if isinstance(number, int)]
    is_numbered = isinstance(parent, nn.ModuleList) and len(in_order) == len(numbers) and len(set(in_order)) == 1
    for (name, child), number in zip(children, numbers, strict=True):
        yield name, str(number - 1) if is_numbered else name, child


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
