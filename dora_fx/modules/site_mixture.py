"""The adapters of one layer in a mixed batch, and what a call of the layer makes of the batch's ids.

`attach/mixed_batch.py` puts a `SiteMixture` into every adapted layer for the time of a mixed batch. Compiled code reads
nothing of the layer's own adapter then, so which adapter is active makes no difference to its guards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from dora_fx.cache import ActiveAdapterRecord, note_adapter, note_step_count, step_count_of
from dora_fx.function import BaseWeight, CachedParameters, Layout, Samples, StoredParameters
from dora_fx.modules.adapted_site import AdaptedSite
from dora_fx.modules.adapter import Factors
from dora_fx.modules.site_paths import note_alias


class MixedAdapter(NamedTuple):
    """One adapter of a layer in a mixed batch.

    Attributes:
        site: its wrapper around the layer, which need not be the one that is called.
        factors: its own, or aliases of them for an adapter that no sample has, which keep its gradient None. Whether
            they are aliases is told by no attribute, which compiled code would be guarded by.
    """

    site: AdaptedSite
    factors: Factors

    @classmethod
    def of(cls, site: AdaptedSite, record: ActiveAdapterRecord, *, has_samples: bool) -> MixedAdapter:
        """Return the record of a wrapper.

        Without samples an adapter would get gradients of zero, by which momentum and decay move it. So aliases of its
        parameters, in the same memory, take them. Megatron's wrapper reduces gradients over ranks that may have
        samples, and waits for each: there the parameters themselves get the zeros.
        """
        factors = site.factors()
        if not has_samples and torch.is_grad_enabled() and not hasattr(factors.lora_a, "main_grad"):
            factors = Factors(*(_alias(parameter) for parameter in factors))
            note_adapter(factors.lora_a, record)
        return cls(site, factors)

    def are_current(self) -> bool:
        """Return whether the factors are the adapter's, which other ones may have been loaded in the place of since."""
        return all(
            own.data_ptr() == found.data_ptr() for own, found in zip(self.site.factors(), self.factors, strict=True)
        )


class SiteMixture(NamedTuple):
    """What one layer knows of a mixed batch.

    Attributes:
        adapters: all of the batch, in the order that ids number them in.
        ids: int64 on the layer's device, numbers of adapters and their count for none: `[b]`, or, an id for each token,
            `[s, b]` for models with the sequence first and `[b, s]` for others.
        own_ids: as `ids`; for tokens those of this rank's part of the sequence, in the layer's tensor-parallel group.
        sequence_first: layers take `[s, b, in]`, and `[b, s, in]` otherwise.
        trains: gradients were enabled when the batch began, and everything that concerns them was checked.
    """

    adapters: tuple[MixedAdapter, ...]
    ids: torch.Tensor
    own_ids: torch.Tensor
    sequence_first: bool
    trains: bool

    def drops(self, *, training: bool) -> bool:
        """Return whether a call is one with dropout: all adapters take part then, those without dropout with p = 0."""
        return training and any(each.site.adapter.has_dropout for each in self.adapters)

    def stored_parameters(self, weight: BaseWeight, layout_name: str, *, drops: bool) -> list[StoredParameters]:
        """Return what a call reads of each adapter's parameters; see `AdaptedSite.stored_parameters`."""
        return [
            each.site.stored_parameters(weight, layout_name, drops=drops, factors=each.factors)
            for each in self.adapters
        ]

    def cached_parameters(self) -> list[CachedParameters]:
        """Return the buffers of each adapter."""
        return [each.site.cached_parameters() for each in self.adapters]

    def samples_of(self, path: str, x: torch.Tensor, layout: Layout) -> Samples:
        """Return the adapter of each sample or token of an input.

        Args:
            path: of the layer, for messages.
            x: its input, `[s, b, in]`, `[b, s, in]` or, with both in one dimension, `[tokens, in]`.
            layout: of the call.

        Raises:
            ValueError: the input has another number of samples or tokens than there are ids; or gradients are enabled,
                and were not when the batch began.
        """
        # In this order, since compiled code without gradients then has no guard on the second.
        if torch.is_grad_enabled() and not self.trains:
            raise ValueError(
                f"{path}: found gradients enabled, expected them to be when the context of dora_fx.mixed is entered"
            )
        dims = tuple(each.site.adapter.dim for each in self.adapters)
        if self.ids.dim() == 1 and x.dim() == 3:
            found = x.shape[1] if self.sequence_first else x.shape[0]
            if found != self.ids.shape[0]:
                raise _other_length(path, f"an input of {found} samples", self.ids)
            return Samples(self.ids, self.ids, dims, per_token=False, sequence_first=self.sequence_first)
        ids, own_ids = self._of_tokens(path, x, layout)
        expected = own_ids if layout.shards_input_tokens else ids
        if x.shape[:-1] != expected.shape:
            raise _other_length(path, f"an input of {tuple(x.shape[:-1])} tokens", expected)
        return Samples(ids, own_ids, dims, per_token=True, sequence_first=self.sequence_first)

    def _of_tokens(self, path: str, x: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and own ids for each token, in the shape of an input of two dimensions if it has two."""
        if self.ids.dim() == 2:
            return (self.ids, self.own_ids) if x.dim() == 3 else (self.ids.flatten(), self.own_ids.flatten())
        if x.dim() != 2 or x.shape[0] % self.ids.shape[0]:
            raise _other_length(path, f"an input of shape {tuple(x.shape)}", self.ids)
        ranks = self.adapters[0].site.adapter.tp_size
        tokens = x.shape[0] // self.ids.shape[0]
        whole, own = (tokens * ranks, tokens) if layout.shards_input_tokens else (tokens, tokens // ranks)
        if self.sequence_first:
            return self.ids.repeat(whole), self.ids.repeat(own)
        return self.ids.repeat_interleave(whole), self.ids.repeat_interleave(own)


def _alias(parameter: torch.Tensor) -> nn.Parameter:
    alias = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    note_alias(alias, parameter)
    note_step_count([alias], step_count_of(parameter))
    return alias


def _other_length(path: str, found: str, ids: torch.Tensor) -> ValueError:
    return ValueError(f"{path}: found {found}, expected one that fits the ids of dora_fx.mixed, {tuple(ids.shape)}")
