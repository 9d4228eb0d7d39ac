"""A GPTModel that takes its rotary embeddings at `position_ids`.

Megatron counts positions from the start of a sequence and ignores `position_ids`. Attention depends on differences of
positions alone, but the rotary table is rounded: gradients of a sample that is packed behind others would differ from
those of the sample alone, by 3e-6 at 2,048 tokens in float32 and by more in bfloat16.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor


class PositionedGPTModel(GPTModel):
    """Megatron's GPTModel with the rows of the rotary table at `position_ids`, `[b, s]`."""

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        decoder_input, rotary, *rest = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        if rotary is not None and position_ids is not None:
            # [s, 1, 1, d] -> [b, s, d] -> [s, b, 1, d]
            rotary = rotary[:, 0, 0][position_ids].transpose(0, 1)[:, :, None]
        return decoder_input, rotary, *rest
