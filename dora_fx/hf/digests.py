"""Digests of a Hugging Face model's weights as a checkpoint has them of the base that it was trained on."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from dora_fx.checkpoint import EXPERTS, add_digests, shard_digests
from dora_fx.megatron import expert_number_maybe
from dora_fx.models import DecoderNames, architecture_with_tensors, full_tensors

_LAYER = re.compile(r"(decoder\.layers\.)(\d+)\.(.+)")


def base_digests(
    config: Any,
    state_dict: Mapping[str, Tensor],
    keys: Collection[str],
    *,
    adapted: Collection[str],
    non_homogeneous_layers: bool,
    names: DecoderNames | None = None,
) -> dict[str, str]:
    """Digests of whole Megatron tensors by key, in one process without groups.

    Args:
        config, state_dict: of the checkpoint, in the dtype that was trained on.
        keys: the tensors to take.
        adapted: paths of the adapted layers. Of the tensor of all experts a checkpoint has those that are adapted.
        non_homogeneous_layers: whether keys carry layer numbers, as a checkpoint's manifest says.
        names: of the model that wrote the checkpoint; a GPTModel by default.
    """
    architecture = architecture_with_tensors(config, state_dict)
    names = names or DecoderNames(None, architecture.num_layers)

    def shards() -> Iterator[ShardedTensor]:
        for gpt_name, tensor in full_tensors(architecture, state_dict, range(architecture.num_layers)):
            name = names.fused_name(gpt_name)
            match = None if non_homogeneous_layers else _LAYER.fullmatch(name)
            # Without numbers in the keys the layers of a kind are one tensor, with an axis of layers in front.
            key = match[1] + match[3] if match else name
            offsets = [(0, int(match[2]), architecture.num_layers)] if match else []
            if (number := expert_number_maybe(key)) is not None:
                # Experts are always one, behind that axis.
                key = key.replace(f".experts.local_experts.{number}.", EXPERTS)
                offsets.append((len(offsets), number, architecture.num_experts))
            if key in keys and (number is None or gpt_name.rpartition(".")[0] in adapted):
                yield ShardedTensor.from_rank_offsets(key, tensor, *offsets, prepend_axis_num=len(offsets))

    return add_digests([shard_digests(shards())])
