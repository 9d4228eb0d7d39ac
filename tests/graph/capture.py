"""Compile one adapted layer and return its graphs."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.recording_backend import RecordingBackend

SEQUENCE, BATCH = 6, 2


def capture(
    model: nn.Module, features: int, *, sequence: int = SEQUENCE, grad: bool = True, recompute: bool = False
) -> RecordingBackend:
    """Trace `model` on an input `[sequence, BATCH, features]`; with `grad`, run the backward too."""
    backend = RecordingBackend()
    x = torch.randn(sequence, BATCH, features, requires_grad=grad)
    function = (lambda x: checkpoint(model, x, use_reentrant=False)) if recompute else model
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    with torch.set_grad_enabled(grad):
        output = compiled(x)
    output = output[0] if isinstance(output, tuple) else output
    if grad:
        output.sum().backward()
    assert len(backend.before) == 1
    return backend
