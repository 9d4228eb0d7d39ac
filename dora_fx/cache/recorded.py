"""Tell when operations are recorded, or only pretended, and not carried out on values that last.

    make_fx, non-strict torch.export, aot_function    record what runs, and keep a tensor of the module as a constant
    torch.jit.trace                                   likewise
    FakeTensorMode                                    computes shapes; there is no memory to look at
    torch.func's transforms                           wrap tensors, whose memory cannot be looked at

Nothing is cached then: norms are computed with the call, as in the graphs of compilers that know no cache.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor

# Read in torch 2.11 to 2.15; public functions tell one mode each, and most walk the whole stack of modes.
_MODES = (
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


def is_recorded(*tensors: torch.Tensor) -> bool:
    """Return whether operations on these tensors are recorded, or are without effect on real memory."""
    return (
        torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or (torch._C._len_torch_dispatch_stack() > 0 and any(torch._C._get_dispatch_mode(key) for key in _MODES))
        or any(isinstance(tensor, FakeTensor) for tensor in tensors)
    )
