"""Notice that a call is repeated in the backward pass with another adapter than it was made with.

A checkpoint calls a layer again when its backward pass needs what was not kept. If the model's active adapter was
changed in between, the repeated call would read the other adapter's parameters, of the same shapes, and autograd would
give wrong gradients without an error. A mixed batch is a change too, and each has a name of its own.

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

# Changes that a record keeps: half a million numbers and names are some 50 MB.
_MOST_CHANGES = 2**19
_FORGOTTEN = "an adapter whose record is gone"


class ActiveAdapterRecord:
    """Which adapter of a model chunk, or which mixed batch, was active when.

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
            if len(self._starts) > _MOST_CHANGES:
                # A call of before then gets an error if it is repeated.
                self._starts[: _MOST_CHANGES // 2], self._names[: _MOST_CHANGES // 2] = [0], [_FORGOTTEN]

    @property
    def current(self) -> str:
        """Return the name of what is active."""
        return self._names[-1]

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
_records = WeakTensorKeyDictionary()


def note_adapter(lora_a: torch.Tensor, record: ActiveAdapterRecord) -> None:
    """Note the record of the chunk that a site's A `[dim, in]` belongs to; there may be other adapters on its base."""
    _records[lora_a] = record


def raise_if_changed(sites: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Check that a call in the backward pass reads the adapter that the forward pass read.

    Args:
        sites: path and A of each layer that the call reads.

    Raises:
        RuntimeError: naming the layer and both adapters.
    """
    if not _records or torch._C._current_graph_task_id() == -1:
        return
    for path, lora_a in sites:
        record = _records.get(lora_a)
        if record is not None:
            raise_if_other(path, record)


def raise_if_other(path: str, record: ActiveAdapterRecord) -> None:
    """Raise RuntimeError if a call that is repeated in the backward pass was made with another adapter."""
    before, current = record.active_in_forward_pass(), record.current
    if before not in (None, current):
        raise RuntimeError(
            f"{path}: found adapter {current!r} active where the backward pass repeats a call of {before!r}, expected "
            f"{before!r}: let the backward pass of checkpointed layers end before the adapter is changed"
        )
