"""Notice that a call is repeated in the backward pass with another adapter than it was made with.

A checkpoint calls a layer again when its backward pass needs what was not kept. If the model's active adapter was
changed in between, the repeated call would read the other adapter's parameters, of the same shapes, and autograd would
give wrong gradients without an error.

Autograd numbers its operations in the order in which the forward pass made them. So the operation that is being
differentiated tells when its call was made, and a record of the changes tells which adapter was active then. Each
thread has numbers of its own: calls of another thread than the one that changes adapters, and of a checkpoint inside a
checkpoint on an accelerator, whose backward pass has a thread of its own, are not told apart.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

import torch
from torch.utils.weak import WeakTensorKeyDictionary


class ActiveAdapterRecord:
    """Which adapter of a model chunk was active when.

    Args:
        name: of the adapter that is active at first.
    """

    def __init__(self, name: str) -> None:
        self._starts = [0]
        self._names = [name]

    def note_change(self, name: str) -> None:
        """Note that the adapter of this name is active from now on."""
        start = torch.autograd._get_sequence_nr()
        if start == self._starts[-1]:
            # No operation was made under the one before, as when tenants are served without gradients.
            self._names[-1] = name
        else:
            self._starts.append(start)
            self._names.append(name)

    def note_deletion(self, name: str) -> None:
        """Note that an adapter of this name is not the one that had it before."""
        self._names = [f"{name} (deleted)" if known == name else known for known in self._names]

    def __reduce__(self) -> tuple[type[ActiveAdapterRecord], tuple[str]]:
        """Copies and pickles begin anew, since the numbers of another process or model say nothing of their calls."""
        return ActiveAdapterRecord, (self._names[-1],)

    def active_in_forward_pass(self) -> str | None:
        """Return the adapter that was active when the operation now being differentiated was made.

        None outside a backward pass.
        """
        node = torch._C._current_autograd_node()
        if node is None:
            return None
        return self._names[bisect_right(self._starts, node._sequence_nr()) - 1]


# By A, as whose adapter a site is known where nothing but its tensors is.
_adapters = WeakTensorKeyDictionary()


def note_adapter(lora_a: torch.Tensor, record: ActiveAdapterRecord, name: str) -> None:
    """Note the adapter that a site's A `[dim, in]` belongs to; there is more than one on its base."""
    _adapters[lora_a] = (record, name)


def raise_if_changed(sites: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Check that a call in the backward pass reads the adapter that the forward pass read.

    Args:
        sites: path and A of each layer that the call reads.

    Raises:
        RuntimeError: naming the layer and both adapters.
    """
    if not _adapters or torch._C._current_graph_task_id() == -1:
        return
    for path, lora_a in sites:
        record, name = _adapters.get(lora_a, (None, ""))
        if record is not None:
            raise_if_other(path, record, name)


def raise_if_other(path: str, record: ActiveAdapterRecord, name: str) -> None:
    """Raise RuntimeError if a call that is repeated in the backward pass was made with another adapter than `name`."""
    before = record.active_in_forward_pass()
    if before not in (None, name):
        raise RuntimeError(
            f"{path}: found adapter {name!r} active where the backward pass repeats a call of {before!r}, expected "
            f"{before!r}: let the backward pass of checkpointed layers end before the adapter is changed"
        )
