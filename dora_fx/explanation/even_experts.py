"""Experts to which tokens are spread evenly, so that a layer has one graph, and costs that can be told before a run.

Where tokens go depends on their values, which nobody has before a run. A router that balances its experts, as it is
trained to, gives each about as many. The way there and back is that of Megatron's all-to-all dispatcher:

    tokens [n, h] -> k rows each, sorted by experts [E c, h] -> their ranks [ep, E/ep, c, h] -> all shards of an expert

with c = ceil(n k / E) rows for each expert of each rank's n tokens, the last ones padding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import router_gating_linear
from torch import nn

from dora_fx.megatron import walk


class EvenExperts(nn.Module):
    """Stands in for one of Megatron's MoELayers, with its modules and under their names.

    Args:
        layer: with experts of a `SequentialMLP`. Its router's choice is computed, and its experts get rows in that
            order, but as many each.
    """

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.router, self.experts, self.shared_experts = layer.router, layer.experts, layer.shared_experts
        self.num_experts, self.top_k = layer.config.num_moe_experts, layer.config.moe_router_topk
        self.ep_group = parallel_state.get_expert_model_parallel_group()
        self.etp_group = parallel_state.get_expert_tensor_parallel_group()
        self.ep, self.etp = self.ep_group.size(), self.etp_group.size()

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Return the layer's output `[s, b, h]`, or this rank's `[s/tp, b, h]`, and no bias."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        scores = router_gating_linear(tokens, self.router.weight, self.router.bias, tokens.dtype)
        values, chosen = scores.topk(self.top_k, dim=-1)
        order = chosen.flatten().argsort()
        source, weights = order // self.top_k, values.softmax(-1, dtype=torch.float32).flatten()[order]
        returned = self._of_experts(tokens[source], weights)
        output = torch.zeros_like(tokens).index_add(0, source, returned).view_as(hidden)
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden)
        return output, None

    def _of_experts(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return what the experts make of rows `[n k, h]` that are sorted by experts."""
        count, width = rows.shape
        each = -(-count // self.num_experts)
        missing = each * self.num_experts - count
        if missing:
            rows, weights = F.pad(rows, (0, 0, 0, missing)), F.pad(weights, (0, missing))
        # In front are the shards of an expert and the ranks that the rows came from.
        local = self.num_experts // self.ep
        received, scales = self._dispatched(rows), self._dispatched(weights)
        own = received.view(self.etp, self.ep, local, each, width).permute(2, 0, 1, 3, 4).reshape(local, -1, width)
        of_own = scales.view(self.etp, self.ep, local, each).permute(2, 0, 1, 3).reshape(local, -1)
        made = [expert(x, scale)[0] for expert, x, scale in zip(self.experts.local_experts, own, of_own, strict=True)]
        back = torch.stack(made).view(local, self.etp, self.ep, each, width).permute(1, 2, 0, 3, 4).reshape(-1, width)
        return all_to_all(self.ep_group, reduce_scatter_to_sequence_parallel_region(back, self.etp_group))[:count]

    def _dispatched(self, rows: torch.Tensor) -> torch.Tensor:
        return gather_from_sequence_parallel_region(all_to_all(self.ep_group, rows), group=self.etp_group)


def spread_evenly(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return what takes the place of each mixture-of-experts layer of a model, by that layer.

    Raises:
        ValueError: naming the layer, for experts that are not one module each, or that take tokens of a latent size.
    """
    layers = [named for named in walk(model) if isinstance(named.module, MoELayer)]
    for _, path, layer in layers:
        if not isinstance(layer.experts, SequentialMLP):
            raise ValueError(
                f"{path}: found experts in a {type(layer.experts).__name__}, expected a SequentialMLP, whose figures "
                "are those of both: build the model with moe_grouped_gemm=False"
            )
        if getattr(layer.config, "moe_latent_size", None):
            raise ValueError(f"{path}: found moe_latent_size = {layer.config.moe_latent_size}, expected None")
    return {layer: EvenExperts(layer) for _, _, layer in layers}
