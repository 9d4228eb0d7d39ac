"""The DoRA function, for tensors in eager calls and for FX proxies in the graph rewrite.

    z = W0 x + s B A x          n = || W0 + s B A || per output row, detached          delta = (m - n) / n
    y = z + delta z + bias                                                 (DoRA, arXiv 2402.09353, eq. 5)

with dropout d(x), one mask for both terms:

    y = W0 x + delta W0 d(x) + (1 + delta) s B A d(x) + bias

where a layer normalises its own input, x is what its norm makes of it.

Under sequence parallelism a column layer's rank has the tokens x_i and needs those of all ranks, x = gather(x_i):

    W0 x = W0 gather(x_i)         A x = gather(A x_i)         dA = sum_i (du_i)^T x_i,   du = reduce_scatter((s B)^T dz)

W0 is frozen and needs no x in the backward pass, so nothing of the gathered x is kept. dA is a partial sum over the
rank's tokens, and what completes partial sums of A's gradient in the other column layouts completes it here.

A mixed call has an adapter for each sample or token, and z, s, B, A, delta and d are its own (`mixture.py`).

Eager code and graphs run the same lines but for one product: under dropout, a compiled graph multiplies x and d(x) by
the weight at once, and eager code multiplies twice (`_base_products`). The scale of the rows and its gradient are in
`row_scale.py`.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import fx

from dora_fx.function.base_weight import QuantisedWeight, frozen_product
from dora_fx.function.collectives import ENTER, REDUCE, gather_features, gather_sequence, split_features
from dora_fx.function.dropout import DropoutFactors, draw_dropout_key, dropout
from dora_fx.function.input_norm import InputNorm, normalise
from dora_fx.function.mixture import MixedOperands, mixed_low_rank_product, rows_of
from dora_fx.function.row_scale import RowScale, scale_rows, trained_delta
from dora_fx.function.site_parameters import SiteOperands, StoredParameters


def adapted_linear(
    x: torch.Tensor,
    stored: StoredParameters,
    operands: SiteOperands | MixedOperands,
    bias: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    base_output: torch.Tensor | None = None,
    input_norm: InputNorm | None = None,
) -> torch.Tensor:
    """Return the output of one DoRA linear layer.

    Args:
        x: the layer's input as the caller passes it, `[s, b, in]` or `[tokens, in]`; `[s/tp, b, in]` with
            sequence parallelism in a column layout, `[s, b, in/tp]` in a row layout.
        stored: what the site stores; its weight and settings are read here. Of any adapter in a mixed call.
        operands: from `complete_parameters`, or from `mix` in a mixed call.
        bias: the bias that the base layer adds itself, None if it returns it or has none.
        dtype: of the output.
        base_output: what the base layer returned, bias included. None to compute it here, so that the
            low-rank product goes through the base layer's own collective.
        input_norm: applied to x first; None where x is what the products take.

    Returns:
        the adapted output, shaped and sharded like the base layer's.
    """
    layout, tp_group = stored.layout, stored.tp_group
    if input_norm is not None:
        # In front of the gather: each token is normalised once, and its gradient arrives here complete.
        x = normalise(x, input_norm)
    if layout.enter in ENTER:
        x = ENTER[layout.enter](x, tp_group)
    if base_output is not None and layout.leave == "gather_features":
        base_output = split_features(base_output, tp_group)
    scaled = _scaled if stored.dropout is None else _scaled_under_dropout
    output = scaled(x, stored, operands, bias, dtype, base_output)
    return gather_features(output, tp_group) if layout.leave == "gather_features" else output


def _scaled(
    x: torch.Tensor,
    stored: StoredParameters,
    operands: SiteOperands | MixedOperands,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    base_output: torch.Tensor | None,
) -> torch.Tensor:
    """y = z + delta z + bias."""
    low_rank = _low_rank_product(x, stored, operands)
    if base_output is None:
        output = _join(_base_product(_all_tokens(x, stored), stored, bias), low_rank, stored, bias)
    else:
        output = base_output + _reduce(low_rank, stored)
    magnitude, scale = _of_rows(operands, own=stored.layout.shards_output_tokens)
    return scale_rows(output.to(dtype), bias=bias, magnitude=magnitude, scale=scale)


def _scaled_under_dropout(
    x: torch.Tensor,
    stored: StoredParameters,
    operands: SiteOperands | MixedOperands,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    base_output: torch.Tensor | None,
) -> torch.Tensor:
    """y = W0 x + delta W0 d(x) + (1 + delta) s B A d(x) + bias."""
    key = draw_dropout_key(x, stored.tp_group)
    dropped = _drop(x, key, stored, operands, own=stored.layout.shards_input_tokens)
    product, dropped_product = _base_products(x, dropped, key, stored, operands, bias, base_output)
    # In front of the layer's collective, where a rank has all tokens that the layout multiplies.
    delta = trained_delta(*_of_rows(operands, own=stored.layout.shards_tokens))
    change = dropped_product * delta + _low_rank_product(dropped, stored, operands) * (delta + 1.0)
    change = change.to(dtype)
    if base_output is not None:
        return base_output + _reduce(change, stored)
    return _join(product, change, stored, bias)


def _base_products(
    x: torch.Tensor,
    dropped: torch.Tensor,
    key: torch.Tensor,
    stored: StoredParameters,
    operands: SiteOperands | MixedOperands,
    bias: torch.Tensor | None,
    base_output: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the base layer makes of x, and W0 d(x).

    Where a graph is made, one product of both reads the weight once, and the weight is most of what a product of few
    tokens reads. Eager code multiplies x alone: its result is then, bit by bit, that of the base layer, which a product
    of twice as many rows may round otherwise.
    """
    if base_output is not None:
        return base_output, frozen_product(_all_tokens(dropped, stored), stored.weight)
    if stored.layout.gathers_tokens:
        # The base's one gather serves both products: masks go by position, so every rank drops the same elements of the
        # gathered x as the ranks that the tokens came from.
        x = _all_tokens(x, stored)
        dropped = _drop(x, key, stored, operands, own=False)
    if not isinstance(x, fx.Proxy) and not torch.compiler.is_compiling():
        return _base_product(x, stored, bias), frozen_product(dropped, stored.weight)
    product, dropped_product = frozen_product(torch.cat((x, dropped)), stored.weight).chunk(2)
    if bias is not None and stored.layout.adds_bias_in_product:
        product = product + bias
    return product, dropped_product


def _drop(
    x: torch.Tensor,
    key: torch.Tensor,
    stored: StoredParameters,
    operands: SiteOperands | MixedOperands,
    *,
    own: bool,
) -> torch.Tensor:
    """d(x) of this rank's own tokens, or of those of all ranks."""
    factors = stored.dropout
    if isinstance(operands, MixedOperands) and operands.dropout is not None:
        factors = DropoutFactors(*(rows_of(table, operands.samples, own=own) for table in operands.dropout))
    assert factors is not None
    return dropout(x, key, *factors, stored.layout.shards_input_features, own)


def _of_rows(operands: SiteOperands | MixedOperands, *, own: bool) -> tuple[torch.Tensor, RowScale]:
    """The magnitude and the scale of output rows: of all tokens, or of each in a mixed call."""
    if not isinstance(operands, MixedOperands):
        return operands.magnitude, operands.scale
    samples = operands.samples
    scale = RowScale(*(rows_of(table, samples, own=own) for table in operands.scale))
    return rows_of(operands.magnitude, samples, own=own), scale


def _base_product(x: torch.Tensor, stored: StoredParameters, bias: torch.Tensor | None) -> torch.Tensor:
    """W0 x, with the bias where the base layer adds it within the product.

    It is rounded as the base layer's own output is, so an adapter that is not trained yet changes no bit of it.
    """
    added = bias if stored.layout.adds_bias_in_product else None
    if not isinstance(stored.weight, QuantisedWeight):
        return F.linear(x, stored.weight, added)
    product = frozen_product(x, stored.weight)
    return product if added is None else product + added


def _low_rank_product(
    x: torch.Tensor, stored: StoredParameters, operands: SiteOperands | MixedOperands
) -> torch.Tensor:
    """s B A x of all tokens; s is viewed as a tensor without dimensions, which leaves the product in its own dtype."""
    if isinstance(operands, MixedOperands):
        gather = partial(_all_tokens, stored=stored)
        own = stored.layout.shards_input_tokens
        return mixed_low_rank_product(x, operands, gather, own=own, dtype=stored.dtype)
    hidden = F.linear(x, operands.lora_a) * stored.scaling.view(())
    return F.linear(_all_tokens(hidden, stored), operands.lora_b)


def _all_tokens(own: torch.Tensor, stored: StoredParameters) -> torch.Tensor:
    """The values of all ranks' tokens, where the layout multiplies those and each rank has its own, `[s/tp, ...]`."""
    return gather_sequence(own, stored.tp_group) if stored.layout.gathers_tokens else own


def _join(
    product: torch.Tensor, addend: torch.Tensor, stored: StoredParameters, bias: torch.Tensor | None
) -> torch.Tensor:
    """Base product + addend + bias, summed over the group where the layout's products are partial."""
    late_bias = None if stored.layout.adds_bias_in_product else bias
    if stored.reduces:
        output = _reduce(product + addend, stored)
        return output if late_bias is None else output + late_bias
    return (product if late_bias is None else product + late_bias) + addend


def _reduce(partial: torch.Tensor, stored: StoredParameters) -> torch.Tensor:
    """Sum over the group where the layout's products are partial."""
    return REDUCE[stored.layout.leave](partial, stored.tp_group) if stored.reduces else partial
