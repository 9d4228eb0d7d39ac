"""What does a transformer layer keep for its backward pass, tensor by tensor?

One layer of Llama-3-70B's shape on one tensor-parallel rank, with sequence parallelism, as the frozen base and with
DoRA. The graphs are partitioned as Inductor's are, and nothing runs; collectives have no other ranks. Attention is
torch's, which keeps no scores. A tensor that is kept in part, as a view, counts whole.

    python benchmarks/bench_saved.py --tp 8 --tokens 8192
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

import dora_fx
from dora_fx.megatron.dynamo_settings import capture_megatron_whole
from dora_fx.megatron.world import megatron_world
from dora_fx.models.specs import FrozenRMSNorm
from dora_fx.passes import default_passes, run_passes

# Graphs are whole, those of the base too.
capture_megatron_whole()

HIDDEN, FFN, HEADS, GROUPS = 8192, 28672, 64, 8
TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
VIEWS = {"view", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "split_with_sizes", "as_strided"}
VIEWS |= {"t", "transpose", "alias", "detach", "_unsafe_view", "reshape", "getitem", "split"}


class Attention(nn.Module):
    """Causal attention `[s, b, heads, channels]` that keeps no scores; stands in for Megatron's local one."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        heads = [tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)]
        output = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return output.permute(2, 0, 1, 3).flatten(2)


def make_layer(tp: int) -> nn.Module:
    """The frozen layer's shard of a rank, in bfloat16."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        perform_initialization=False,
        tensor_model_parallel_size=tp,
        sequence_parallel=True,
        params_dtype=torch.bfloat16,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = FrozenRMSNorm
    spec.submodules.self_attention.submodules.core_attention = Attention
    layer = build_module(spec, config=config, layer_number=1).to(torch.bfloat16)
    for parameter in layer.parameters():
        # What torch.empty left there may be no finite numbers.
        nn.init.constant_(parameter, 0.01)
    return layer.requires_grad_(False)


def forward_graph(layer: nn.Module, x: torch.Tensor, rope: torch.Tensor) -> tuple[fx.GraphModule, int]:
    """The forward graph as Inductor would get it, and how many of its outputs are the layer's own."""
    found: list[fx.GraphModule] = []

    def note(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        found.append(gm)
        return make_boxed_func(gm)

    aot = aot_autograd(
        fw_compiler=note,
        bw_compiler=lambda gm, _: make_boxed_func(gm),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        gm = run_passes(gm, example_inputs, default_passes())
        aot(gm, example_inputs)
        [outputs] = gm.graph.output_node().args
        values = [node.meta["example_value"] for node in tree_leaves(outputs)]
        # Instead of the layer's outputs: nothing is computed.
        return lambda *_: [torch.empty(value.shape, dtype=value.dtype) for value in values]

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    output = compiled(x, attention_mask=None, rotary_pos_emb=rope)
    [gm] = found
    return gm, sum(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(output))


def saved_tensors(gm: fx.GraphModule, num_outputs: int) -> dict[fx.Node, int]:
    """What the forward graph computes and hands to the backward graph -> its bytes."""
    saved: dict[fx.Node, int] = {}
    [outputs] = gm.graph.output_node().args
    for node in outputs[num_outputs:]:
        while isinstance(node, fx.Node) and node.op == "call_function" and op_name(node) in VIEWS:
            node = node.all_input_nodes[0]
        if isinstance(node, fx.Node) and node.op != "placeholder":
            tensors = [leaf for leaf in tree_leaves(node.meta["val"]) if isinstance(leaf, torch.Tensor)]
            saved[node] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return saved


def op_name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.partition("::")[2] if schema is not None else getattr(node.target, "__name__", str(node.target))


def print_saved(name: str, saved: dict[fx.Node, int]) -> None:
    print(f"{name}: {sum(saved.values()) / 2**20:.2f} MiB")
    for node, num_bytes in sorted(saved.items(), key=lambda item: -item[1]):
        value, stack = node.meta["val"], node.meta.get("nn_module_stack") or {}
        path = next(reversed(list(stack.values())))[0].partition("._modules")[2] if stack else ""
        shape = list(value.shape) if isinstance(value, torch.Tensor) else ""
        print(f"  {num_bytes / 2**20:8.2f}  {node.name:42} {shape!s:20} {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tp", 8), ("tokens", 8192), ("dim", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    world = {"global_rank": 0, "world_size": options.tp, "tensor_model_parallel_size": options.tp}
    with megatron_world(backend="fake", store=FakeStore(), seed=0, **world):
        x = torch.randn(options.tokens // options.tp, 1, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        rope = torch.randn(options.tokens, 1, 1, HIDDEN // HEADS)
        layer = make_layer(options.tp)
        print_saved("frozen base", saved_tensors(*forward_graph(layer, x, rope)))
        dora_fx.DoRA(TARGETS, dim=options.dim)(layer)
        print_saved("dora_fx", saved_tensors(*forward_graph(layer, x, rope)))


if __name__ == "__main__":
    main()
