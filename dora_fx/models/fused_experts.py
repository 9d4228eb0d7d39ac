"""Splits the tensors in which transformers holds the experts of a layer into those of each expert.

transformers' model                        checkpoint on the hub, here of Qwen3-MoE
mlp.experts.gate_up_proj   [E, 2 f, h]     mlp.experts.0.gate_proj.weight [f, h], mlp.experts.0.up_proj.weight, ...
mlp.experts.down_proj      [E, h, f]       mlp.experts.0.down_proj.weight [h, f], ...
mlp.gate.weight            [E, h]          the same, but block_sparse_moe.gate.weight of Mixtral
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from dora_fx.models.hf_architectures import (
    EXPERT_FC1,
    EXPERT_FC2,
    FUSED_FC1,
    FUSED_FC2,
    FUSED_ROUTER,
    HFArchitecture,
)

_FUSED = {FUSED_FC1: EXPERT_FC1, FUSED_FC2: EXPERT_FC2}
_PARAMETER = re.compile(rf"(.*\.)({'|'.join(map(re.escape, _FUSED))})")
_ROUTER = f".{FUSED_ROUTER}.weight"


def are_fused(names: Iterable[str]) -> bool:
    """Return whether one of the names is that of a tensor of several experts."""
    return any(_PARAMETER.fullmatch(name) for name in names)


def per_expert(hf: HFArchitecture, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's tensors by the names of checkpoints on the hub; a fused one becomes views of it.

    Args:
        hf: the architecture. Nothing changes where it has no experts.
        tensors: by either name.
    """
    if hf.router is None:
        return dict(tensors)
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _PARAMETER.fullmatch(name)
        if match is None:
            if name.endswith(_ROUTER):
                name = f"{name.removesuffix(_ROUTER)}.{hf.router}.weight"
            split[name] = tensor
            continue
        parts = hf.linears[_FUSED[match[2]]]
        for number, expert in enumerate(tensor):
            for part, rows in zip(parts, expert.chunk(len(parts)), strict=True):
                split[f"{match[1]}{part.format(number)}.weight"] = rows
    return split
