"""Compare adapted models with the float64 oracle of `reference.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from dora_fx import DoRALinear
from dora_fx.function import whole_of
from dora_fx.function.dropout import draw_dropout_key, keep_mask
from tests import reference
from tests.closeness import relative_error as relative_error
from tests.models import LinearZoo, sites

Results = dict[str, torch.Tensor]


def draw_mask(site: DoRALinear, x: torch.Tensor) -> torch.Tensor:
    """Draw the dropout mask that the site draws when it is called with `x` in the same state of the generator."""
    key = draw_dropout_key(x, site.adapter.tp_group)
    return keep_mask(x, key, site.adapter.dropout_threshold, sharded_features=site.adapter.layout.shards_input_features)


def reference_layer(site: DoRALinear) -> reference.ReferenceLinear:
    """The oracle with an adapted layer's own weights, returning the bias where the layer does."""
    base, adapter = site.to_wrap, site.adapter
    apart = getattr(base, "skip_bias_add", False)
    is_megatron = site.kind.returned_beside_output(base) is not None
    dropped_bias = base.bias.detach().double() if apart and base.bias is not None else None
    return reference.ReferenceLinear(
        whole_of(site.base_weight),
        None if apart else base.bias,
        adapter.linear_in.weight,
        adapter.linear_out.weight,
        adapter.weight_magnitude,
        scaling=adapter.scaling,
        dropout_p=adapter.dropout,
        returns=(lambda output: (output, dropped_bias)) if is_megatron else (lambda output: output),
        draw_mask=partial(draw_mask, site) if adapter.dropout > 0 else None,
    )


def zoo_results(zoo: LinearZoo, call: Callable[..., Any], inputs: Results, targets: Results) -> dict[str, Results]:
    """Output and gradients of every layer of a zoo, called eagerly or through a compiled `call`."""
    zoo.zero_grad()
    leaves = {kind: x.detach().clone().requires_grad_() for kind, x in inputs.items()}
    torch.manual_seed(7)
    outputs = call(leaves)
    zoo_loss(outputs, targets).backward()
    results = {}
    for kind, x in leaves.items():
        adapter = getattr(zoo, kind).adapter
        results[kind] = {
            "output": outputs[kind].detach(),
            "grad of x": x.grad,
            "grad of A": adapter.linear_in.weight.grad,
            "grad of B": adapter.linear_out.weight.grad,
            "grad of m": adapter.weight_magnitude.grad,
        }
    return results


def zoo_loss(outputs: Results, targets: Results) -> torch.Tensor:
    """A loss whose gradients are as large as the outputs, so that no layer's error hides behind another's."""
    return torch.stack([0.5 * (outputs[kind] - targets[kind]).square().sum() for kind in outputs]).sum()


def reference_zoo(zoo: LinearZoo) -> nn.ModuleDict:
    """The oracle's layers for a zoo, in the order in which the zoo calls its own."""
    return nn.ModuleDict({kind: reference_layer(getattr(zoo, kind)) for kind in zoo.kinds}).train(zoo.training)


def reference_outputs(layers: nn.ModuleDict, inputs: Results) -> Results:
    """Outputs of the oracle's layers, with the biases that they return apart."""
    outputs = {}
    for kind, layer in layers.items():
        returned = layer(inputs[kind])
        output, bias = returned if isinstance(returned, tuple) else (returned, None)
        outputs[kind] = output if bias is None else output + bias
    return outputs


def expected_zoo_results(
    zoo: LinearZoo, inputs: Results, targets: Results, dtype: torch.dtype = torch.float64
) -> dict[str, Results]:
    """What `zoo_results` should be, or the paper's formula makes of it in another `dtype`."""
    layers = reference_zoo(zoo).to(dtype)
    leaves = {kind: x.detach().to(dtype).requires_grad_() for kind, x in inputs.items()}
    torch.manual_seed(7)
    outputs = reference_outputs(layers, leaves)
    zoo_loss(outputs, {kind: target.to(dtype) for kind, target in targets.items()}).backward()
    return {
        kind: {
            "output": outputs[kind].detach(),
            "grad of x": leaves[kind].grad,
            "grad of A": layer.lora_a.grad,
            "grad of B": layer.lora_b.grad,
            "grad of m": layer.magnitude.grad,
        }
        for kind, layer in layers.items()
    }


def put_reference_into(twin: nn.Module, adapted: nn.Module) -> nn.Module:
    """Replace, in an unadapted float64 copy of a model, every layer that `adapted` adapts by the oracle."""
    for path, site in sites(adapted).items():
        parent, _, name = path.rpartition(".")
        setattr(twin.get_submodule(parent), name, reference_layer(site))
    return twin.train(adapted.training)
