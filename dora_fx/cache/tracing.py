"""Tell whether operations are carried out on real tensors now, or traced.

    make_fx, non-strict torch.export, aot_function    record operations, and keep a tensor of the module as a constant
    torch.jit.trace                                   does likewise
    FakeTensorMode                                    computes shapes alone; there is no memory whose bits could be read
    torch.func's transforms                           wrap tensors, whose memory cannot be read

Nothing is cached under any of them: a cached norm would become a constant of the trace, so norms are computed with the
call, as in the graphs of compilers that know no cache.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor

# Private names, read in torch 2.11 to 2.15. Each eager call asks; public functions answer for one mode each, and most
# of them walk the whole stack of modes.
_MODES = (
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


def have_no_values(*tensors: torch.Tensor) -> bool:
    """Return whether the tensors belong to the FakeTensorMode that is active: they have shapes, and nothing to read."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return mode is not None and all(isinstance(tensor, FakeTensor) and tensor.fake_mode is mode for tensor in tensors)


def is_traced(*tensors: torch.Tensor) -> bool:
    """Return whether operations on these tensors are traced, or have no effect on real memory.

    Dynamo's tracing is not noticed here; a caller that Dynamo may trace asks `torch.compiler.is_compiling()` first.
    """
    return (
        torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or (torch._C._len_torch_dispatch_stack() > 0 and any(torch._C._get_dispatch_mode(key) for key in _MODES))
        or any(isinstance(tensor, FakeTensor) for tensor in tensors)
    )
