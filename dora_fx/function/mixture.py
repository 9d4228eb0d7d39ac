"""Several adapters in one call: each sample, or each token of packed sequences, has one of them or none.

    z = W0 x + s_i B_i A_i x            y = z + delta_i z            i = id of the sample or token

Each sample is multiplied by the factors of its own adapter alone, gathered `[b, r, in]` and `[b, out, r]` and filled up
with zeros to the largest rank. So an adapter with NaN spoils its own samples and gradients alone. Tokens are multiplied
by the factors of all adapters side by side, `[sum of r, in]` and `[out, sum of r]`, and between the two products each
keeps the columns of its own adapter.

Scales and magnitudes are rows of a table, gathered by ids, so autograd adds gradients up by id. The last row of each
table is for ids without an adapter: with s = 0 and delta = 0, y = W0 x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dora_fx.function.dropout import DropoutFactors
from dora_fx.function.row_scale import RowScale
from dora_fx.function.site_parameters import SiteOperands, StoredParameters


class Samples(NamedTuple):
    """The adapter of each sample or token of one call.

    Attributes:
        ids: int64, numbers of adapters, and their count for none: `[b]`, an id for each sample, or an id for each token
            of all tensor-parallel ranks, in the shape of the layer's input without its features.
        own_ids: as `ids`, of the tokens that this rank has where ranks have tokens of their own.
        dims: rank of each adapter's low-rank product.
        per_token: the ids are those of tokens.
        sequence_first: the input is `[s, b, in]`, and `[b, s, in]` otherwise; for ids of samples.
    """

    ids: torch.Tensor
    own_ids: torch.Tensor
    dims: tuple[int, ...]
    per_token: bool
    sequence_first: bool


class MixedOperands(NamedTuple):
    """What one site computes with in a mixed call, N adapters' operands together.

    Attributes:
        lora_a: `[N + 1, r, in]`, with the largest rank r, for samples; `[sum of r, in]` for tokens.
        lora_b: `[N + 1, out, r]` or `[out, sum of r]`.
        scaling: `[N + 1, 1]`; `[N + 1, sum of r]`, zero outside of the row's own columns, for tokens.
        magnitude: `[N + 1, out]`; its gradient goes to the adapters' magnitudes.
        scale: of the output rows, `[N + 1, out]`.
        dropout: of each adapter, `[N + 1, 1]`; None in a call without dropout.
        samples: ids, of which all of these are looked up.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: torch.Tensor
    magnitude: torch.Tensor
    scale: RowScale
    dropout: DropoutFactors | None
    samples: Samples


def mix(stored: Sequence[StoredParameters], operands: Sequence[SiteOperands], samples: Samples) -> MixedOperands:
    """Join the operands of a site's adapters, in the order that `samples` numbers them in."""
    lora_a, lora_b = [each.lora_a for each in operands], [each.lora_b for each in operands]
    scaling = [each.scaling for each in stored]
    if samples.per_token:
        factors = torch.cat(lora_a), torch.cat(lora_b, 1)
        scalings = _table(_in_own_columns(scaling, samples.dims), 0.0)
    else:
        widest = max(samples.dims)
        missing = [widest - dim for dim in samples.dims]
        factors = (
            _table([F.pad(a, (0, 0, 0, more)) for a, more in zip(lora_a, missing, strict=True)], 0.0),
            _table([F.pad(b, (0, more)) for b, more in zip(lora_b, missing, strict=True)], 0.0),
        )
        scalings = _table(scaling, 0.0)
    scale = RowScale(*(_table(rows, fill) for rows, fill in zip(_fields(operands), (0.0, 1.0, 0.0), strict=True)))
    magnitude = _table([each.magnitude for each in operands], 0.0)
    return MixedOperands(*factors, scalings, magnitude, scale, _dropout(stored), samples)


def rows_of(table: torch.Tensor, samples: Samples, *, own: bool) -> torch.Tensor:
    """Return each sample's or token's row of a table `[N + 1, k]`, in a shape that broadcasts with `[..., k]`.

    Args:
        own: of this rank's own tokens, and not of those of all ranks.
    """
    rows = F.embedding(samples.own_ids if own else samples.ids, table)
    return rows if samples.per_token or samples.sequence_first else rows.unsqueeze(1)


def mixed_low_rank_product(
    x: torch.Tensor,
    mixed: MixedOperands,
    all_tokens: Callable[[torch.Tensor], torch.Tensor],
    *,
    own: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return s_i B_i A_i x of all tokens.

    Args:
        all_tokens: gathers what was computed of each rank's own tokens, where they have such.
        own: x has this rank's own tokens.
        dtype: of the factors.
    """
    samples, factor = mixed.samples, rows_of(mixed.scaling, mixed.samples, own=own)
    if samples.per_token:
        hidden = F.linear(x, mixed.lora_a)
        # Not a product with zero, which is NaN where another adapter's column is not finite.
        hidden = torch.where(factor != 0, hidden * factor, 0.0).to(dtype)
        return F.linear(all_tokens(hidden), mixed.lora_b)
    hidden = (_each(x, mixed.lora_a, samples) * factor).to(dtype)
    return _each(all_tokens(hidden), mixed.lora_b, samples)


def _each(x: torch.Tensor, factors: torch.Tensor, samples: Samples) -> torch.Tensor:
    """Multiply each sample of x by its own factor: `[s, b, k]` or `[b, s, k]`, and `[N + 1, l, k]`."""
    chosen = factors.index_select(0, samples.ids).transpose(1, 2)
    if samples.sequence_first:
        return torch.bmm(x.transpose(0, 1), chosen).transpose(0, 1)
    return torch.bmm(x, chosen)


def _table(rows: Sequence[torch.Tensor], fill: float) -> torch.Tensor:
    """Stack what the adapters have, and a constant for ids without one."""
    return torch.stack([*rows, torch.full_like(rows[0], fill)])


def _in_own_columns(scaling: Sequence[torch.Tensor], dims: Sequence[int]) -> list[torch.Tensor]:
    """Each adapter's scaling in its own columns of the hidden features of all, `[sum of r]`, and zero elsewhere."""
    starts = [sum(dims[:index]) for index in range(len(dims))]
    return [
        F.pad(value.expand(dim), (start, sum(dims) - start - dim))
        for value, dim, start in zip(scaling, dims, starts, strict=True)
    ]


def _fields(operands: Sequence[SiteOperands]) -> list[list[torch.Tensor]]:
    """The adapters' values of each field of a `RowScale`."""
    return [list(values) for values in zip(*(each.scale for each in operands), strict=True)]


def _dropout(stored: Sequence[StoredParameters]) -> DropoutFactors | None:
    factors = [each.dropout for each in stored]
    found = [each for each in factors if each is not None]
    if not found:
        return None
    assert len(found) == len(factors)
    return DropoutFactors(_table([each.threshold for each in found], 0), _table([each.rescale for each in found], 1.0))
