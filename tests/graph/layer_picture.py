"""The picture in the documents is drawn from graphs: `python -m tests.graph.layer_picture` draws it anew.

python -m tests.graph.layer_picture [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from dora_fx.explanation import draw_layer
from tests.graph.conftest import fake_world
from tests.graph.layer_graphs import TP, mlp_half

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "mlp_half.svg"
HIDDEN, FFN, TOKENS, DIM = 576, 1536, 512, 16


def picture() -> str:
    """The second half of a layer of SmolLM2-135M's shape."""
    title = f"MLP of SmolLM2-135M's shape at TP {TP} with sequence parallelism: one rank, {TOKENS} tokens, r {DIM}"
    with fake_world(TP):
        graphs = mlp_half(HIDDEN, FFN, TOKENS, DIM, params_dtype=torch.bfloat16)
        return draw_layer(graphs.before[0].graph, graphs.after[0].graph, title, kept=graphs.kept)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE
    target.parent.mkdir(exist_ok=True)
    target.write_text(picture(), encoding="utf-8")
