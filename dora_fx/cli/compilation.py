"""How `finetune` compiles a model: through the dora_fx backend, with as few graphs as the options allow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dora_fx.backend import dora_fx
from dora_fx.cli.options import FinetuneOptions


def compile_in_place(model: Any, options: FinetuneOptions) -> None:
    """Mark a GPTModel, or each of its layers, for compilation at its first call.

    The backend is passed as a function, which needs no installed entry point.
    """
    settings: dict[str, Any] = {"backend": dora_fx, "options": {"inner_compiler": options.inner_compiler}}
    if options.compile == "model":
        model.embedding.register_forward_hook(_as_a_fresh_tensor)
        model.compile(fullgraph=True, **settings)
    elif options.compile == "layer":
        model.embedding.register_forward_hook(_like_a_layer_output)
        for layer in model.decoder.layers:
            layer.compile(fullgraph=True, **settings)


def _as_a_fresh_tensor(module: Any, inputs: Any, output: Tensor) -> Tensor:
    """Copy the hidden states, which with one sequence in the batch are a view: a transposed embedding.

    Megatron would copy a view itself, through `torch.empty(..., requires_grad=True)`, which Dynamo does not trace.
    """
    return output.clone(memory_format=torch.contiguous_format)


def _like_a_layer_output(module: Any, inputs: Any, output: Tensor) -> Tensor:
    """Give the first layer's input what the other layers' inputs have, so that one graph serves them all.

    That is a gradient, which a frozen embedding does not ask for, and the strides of a tensor that is no view.
    The price is one layer's gradient of its input.
    """
    output = _as_a_fresh_tensor(module, inputs, output)
    return output.requires_grad_() if torch.is_grad_enabled() else output
