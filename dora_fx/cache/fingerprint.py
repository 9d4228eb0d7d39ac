"""Compute fingerprints of tensors: numbers that change with their bits, cheap enough for every forward pass.

On a CPU it is XXH3 of the tensors' memory. On an accelerator, where nothing may wait for the device, it is

    fingerprint = sum over 64-bit words of  (word ^ word >> 32) * mix(position)      modulo 2^64

`mix` gives odd numbers, so a change of one word always changes the sum, and a change of many words leaves it the same
by chance in one case of 2^32 at most. The shift is there for changes of signs: a top bit times any odd number is that
bit, so without it the sum would stay the same if the signs of an even number of float64 changed. Integer sums do not
depend on the order of their terms, so neither on threads nor on vector units.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
import xxhash

# 8 MiB, of which there are three copies at most. All adapters of a model at once would take hundreds of MiB.
_WORDS_AT_ONCE = 2**20
_SAMPLED_ROWS = 8
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

HostMemory = ctypes.Array[ctypes.c_char]

# The results of `mix` from index 0, by device: the same for all tensors.
_factors: dict[torch.device, torch.Tensor] = {}


def mix(start: int, count: int, device: torch.device) -> torch.Tensor:
    """Return odd 64-bit numbers without visible order for the indices from `start`, int64 `[count]`."""
    index = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=device)
    mixed = index * -7046029254386353131
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    return (mixed ^ (mixed >> 32)) | 1


def sampled_rows(weight: torch.Tensor) -> torch.Tensor:
    """Return some rows of a weight, evenly apart, as a view of it."""
    return weight[:: _step_of_sample(weight)]


def digest(tensors: Iterable[torch.Tensor], *, sampled: bool = False) -> int:
    """Return XXH3 of the bits of tensors in host memory, or of their `sampled_rows`, in their order.

    Strided tensors are copied. A tensor whose memory was freed counts as empty.
    """
    return digest_of(run for tensor in tensors for run in host_memory(tensor, sampled))


def digest_of(runs: Iterable[HostMemory]) -> int:
    """Return XXH3 of bytes in host memory."""
    state = xxhash.xxh3_64()
    for run in runs:
        state.update(run)
    return state.intdigest()


def host_memory(tensor: torch.Tensor, sampled: bool) -> Iterator[HostMemory]:
    """Yield the bytes of a tensor as views of its memory, without a call of torch's operators.

    This runs before every forward pass, and an operator that is called only now and then takes longer than the hash.
    The views of a contiguous tensor are good for as long as its memory is.
    """
    if sampled and not tensor.is_contiguous():
        tensor, sampled = sampled_rows(tensor), False
    tensor = tensor.contiguous()
    start, size = tensor.data_ptr(), tensor.nbytes
    if not start:
        return
    if not sampled:
        yield (ctypes.c_char * size).from_address(start)
        return
    row = size // tensor.shape[0]
    for address in range(start, start + size, row * _step_of_sample(tensor)):
        yield (ctypes.c_char * row).from_address(address)


def _step_of_sample(weight: torch.Tensor) -> int:
    return max(1, weight.shape[0] // _SAMPLED_ROWS)


def fingerprint(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the fingerprint of the tensors' bits in their order, int64 `[]` on their device."""
    return fingerprints([tensors])[0]


@torch.no_grad()
def fingerprints(groups: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """Return the fingerprints of several groups of tensors, int64 `[len(groups)]` on the one device of all of them.

    Nothing waits for the device. Tensors are small and many, so all work is for many groups at once: a launch for each
    tensor would take the host longer than the device takes for its sum. Strided tensors are copied.
    """
    return torch.cat([_weighted_sums(run) for run in _runs(groups)])


def _runs(groups: Iterable[Sequence[torch.Tensor]]) -> Iterator[list[tuple[Sequence[torch.Tensor], int]]]:
    """Yield consecutive groups, each with its words: of at most `_WORDS_AT_ONCE` together, but at least one group."""
    run: list[tuple[Sequence[torch.Tensor], int]] = []
    num_words = 0
    for group in groups:
        more = sum(map(_num_words, group))
        if run and num_words + more > _WORDS_AT_ONCE:
            yield run
            run, num_words = [], 0
        run.append((group, more))
        num_words += more
    yield run


def _weighted_sums(run: Sequence[tuple[Sequence[torch.Tensor], int]]) -> torch.Tensor:
    lengths = [length for _, length in run]
    flat = torch.cat(_words([tensor for group, _ in run for tensor in group]))
    mixed = flat >> 32
    mixed ^= flat
    known = _factors_for(flat.device, max(lengths))
    factors = [known[:length] for length in lengths]
    mixed *= torch.cat(factors)
    # Differences of running sums, which wrap around as the sums do: one launch for all groups, where a sum of each
    # would be one for every group.
    ends = torch.tensor(lengths).cumsum(0).to(flat.device, non_blocking=True)
    sums = F.pad(mixed.cumsum(0), (1, 0))[ends]
    return torch.diff(sums, prepend=sums.new_zeros(1))


def _words(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the bits of tensors in their order, as int64 `[n]`: eight bytes to a word where that fits.

    Where it does not, each element is a word. Elements of one size become words together.
    """
    words: list[torch.Tensor] = []
    single: dict[torch.dtype, list[int]] = {}
    for tensor in tensors:
        if _fills_words(tensor):
            words += [row.view(torch.int64) for row in _rows_to_read(tensor)]
        else:
            dtype = _INTEGERS[tensor.element_size()]
            single.setdefault(dtype, []).append(len(words))
            words.append(tensor.contiguous().view(-1).view(dtype))
    for indices in single.values():
        elements = [words[index] for index in indices]
        wide = torch.cat(elements).to(torch.int64).split([each.numel() for each in elements])
        for index, each in zip(indices, wide, strict=True):
            words[index] = each
    return words


def _rows_to_read(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return flat tensors with the elements in their order: one, or the rows of a sample, which need no copy."""
    if tensor.dim() == 2 and tensor.stride(1) == 1 and not tensor.is_contiguous() and len(tensor) < 2 * _SAMPLED_ROWS:
        size = tensor.element_size()
        if not any(number * size % 8 for number in (tensor.storage_offset(), tensor.stride(0), tensor.shape[1])):
            return tensor.unbind()
    return [tensor.contiguous().view(-1)]


def _num_words(tensor: torch.Tensor) -> int:
    return tensor.nbytes // 8 if _fills_words(tensor) else tensor.numel()


def _fills_words(tensor: torch.Tensor) -> bool:
    """Return whether the memory of the tensor, or of its copy if it is strided, begins and ends at whole words."""
    start = tensor.storage_offset() if tensor.is_contiguous() else 0
    return not any(number * tensor.element_size() % 8 for number in (start, tensor.numel()))


def _factors_for(device: torch.device, count: int) -> torch.Tensor:
    known = _factors.get(device)
    if known is None or known.numel() < count:
        known = _factors[device] = mix(0, max(count, 1024), device)
    return known
