"""Compiles one layer on fake tensors as the backend does, and keeps the graphs in place of running them."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from dora_fx.explanation.kept_values import NodeNames, names_in_layer
from dora_fx.megatron import allow_many_graphs, capture_megatron_whole
from dora_fx.passes import GraphPass, run_passes


@dataclass(frozen=True)
class LayerInputs:
    """What a layer is called with in a training step.

    Attributes:
        hidden: its hidden states, which need a gradient.
        arguments: its other keyword arguments, which all layers of the model share.
    """

    hidden: torch.Tensor
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class CapturedGraphs:
    """The graphs of one layer, of one micro-batch on one rank.

    Attributes:
        before: Dynamo's, in which each adapted layer is a call and a marker.
        after: the same behind the passes.
        forward, backward: as AOTAutograd partitions it, in ATen's operators; no backward graph where nothing is
            trained and no input needs a gradient.
        num_outputs: how many outputs of the forward graph are the layer's; the others are saved for the backward pass.
        hidden_index: which input of the forward graph the hidden states are.
        names: the `names_in_layer` of the graph that was compiled, of which `after` is a copy.
    """

    before: fx.GraphModule
    after: fx.GraphModule
    forward: fx.GraphModule
    backward: fx.GraphModule | None
    num_outputs: int
    hidden_index: int
    names: NodeNames


def capture(layer: nn.Module | Callable[..., Any], inputs: LayerInputs, passes: Sequence[GraphPass]) -> CapturedGraphs:
    """Trace one call of a layer and its backward pass under the FakeTensorMode of the inputs.

    Nothing is computed, and gradients of the right shapes arrive at the parameters.

    Args:
        layer: takes `inputs.hidden` and `inputs.arguments`.
        inputs: fake.
        passes: over Dynamo's graph, in order.
    """
    capture_megatron_whole()
    allow_many_graphs()
    recorder = _Recorder(passes, inputs.hidden)

    def call(hidden: torch.Tensor, arguments: Mapping[str, Any]) -> Any:
        return layer(hidden, **arguments)

    # Dynamo keeps its graphs by code object. With one of its own, this capture finds no graph of an earlier one, and
    # leaves none to the process.
    fresh = types.FunctionType(call.__code__.replace(), globals(), call.__name__, None, call.__closure__)
    # Dynamo remembers sizes by the name of a function and would make symbols of those that differ between captures.
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, assume_static_by_default=True):
        compiled = torch.compile(fresh, backend=recorder, fullgraph=True, dynamic=False)
        output = compiled(inputs.hidden, inputs.arguments)
    differentiable = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if differentiable:
        torch.autograd.backward(differentiable, [torch.empty_like(leaf) for leaf in differentiable])
    return recorder.captured()


class _Recorder:
    """A backend of torch.compile that keeps the graphs on their way to Inductor."""

    def __init__(self, passes: Sequence[GraphPass], hidden: torch.Tensor) -> None:
        self.passes, self.hidden = passes, hidden
        self.graphs: dict[str, fx.GraphModule] = {}
        self.num_outputs: int | None = None
        self.hidden_index = -1
        self.names: NodeNames = {}

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.hidden_index = next(i for i, value in enumerate(example_inputs) if self._is_hidden(value))
        self.graphs["before"] = copied_graph(gm)
        gm = run_passes(gm, example_inputs, self.passes)
        self.graphs["after"] = copied_graph(gm)
        self.names = names_in_layer(gm)
        compiled = aot_autograd(
            fw_compiler=self._keep_as("forward"),
            bw_compiler=self._keep_as("backward"),
            inference_compiler=self._keep_as("forward"),
            partition_fn=self._partition,
            decompositions=select_decomp_table(),
        )(gm, example_inputs)
        return compiled

    def _is_hidden(self, value: Any) -> bool:
        return value is self.hidden or (
            isinstance(value, FakeTensor)
            and not isinstance(value, nn.Parameter)
            and value.requires_grad == self.hidden.requires_grad
            and value.shape == self.hidden.shape
            and value.dtype == self.hidden.dtype
        )

    def _keep_as(self, name: str) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
        def keep(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            self.graphs[name] = gm
            return make_boxed_func(_fake_of(gm))

        return keep

    def _partition(self, gm: fx.GraphModule, joint_inputs: Any, **settings: Any) -> Any:
        self.num_outputs = settings["num_fwd_outputs"]
        return min_cut_rematerialization_partition(gm, joint_inputs, compiler="inductor", **settings)

    def captured(self) -> CapturedGraphs:
        """Return what was kept."""
        forward = self.graphs["forward"]
        num_outputs = len(results_of(forward.graph)) if self.num_outputs is None else self.num_outputs
        return CapturedGraphs(
            self.graphs["before"],
            self.graphs["after"],
            forward,
            self.graphs.get("backward"),
            num_outputs,
            self.hidden_index,
            self.names,
        )


def results_of(graph: fx.Graph) -> Sequence[Any]:
    """Return what a graph of AOTAutograd gives, in order: nodes and constants."""
    results: Any = graph.output_node().args[0]
    return list(results)


def _fake_of(gm: fx.GraphModule) -> Callable[..., Any]:
    """Return a function that gives what the graph would give, and runs nothing: some operators want real values."""
    results = [node.meta["val"] if isinstance(node, fx.Node) else node for node in results_of(gm.graph)]

    def answer(*inputs: Any) -> list[Any]:
        return [_like(value) if isinstance(value, torch.Tensor) else value for value in results]

    return answer


def _like(value: torch.Tensor) -> torch.Tensor:
    """Make a tensor of the FakeTensorMode that is active; Dynamo has one of its own."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def copied_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph and those that it calls, with the metadata of their nodes, before a pass edits them.

    A deep copy would copy what constants of the graph hold, which fake tensors do not have.
    """
    graph = fx.Graph()
    value, output = cast(tuple[Any, fx.Node], graph.graph_copy(gm.graph, {}, return_output_node=True))
    graph.output(value).meta.update(output.meta)
    copied = fx.GraphModule(gm, graph)
    for name, child in list(copied.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(copied, name, copied_graph(child))
    return copied
