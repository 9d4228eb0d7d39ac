"""One mixture-of-experts layer at any tensor-, expert- and expert-tensor-parallel size, and its oracle.

Whole values depend on names alone, and names have the experts' numbers in the whole model, which are worked out here
and not read from the library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import nn

import dora_fx
from dora_fx import DoRALinear
from dora_fx.megatron.world import megatron_world
from tests.closeness import rounding
from tests.distributed.zoo import Sharding, gather, shardings, split, tensors_of, whole_values
from tests.reference import dora_linear

HIDDEN, FFN, SHARED_FFN, EXPERTS, TOP_K, DIM = 16, 24, 40, 4, 2, 4
SEQUENCE, BATCH = 8, 4
SCALING = 2.0
FEATURES = {"linear_fc1": (2 * FFN, HIDDEN), "linear_fc2": (HIDDEN, FFN)}
SHARED_FEATURES = {"linear_fc1": (2 * SHARED_FFN, HIDDEN), "linear_fc2": (HIDDEN, SHARED_FFN)}
TRAINED = ("lora_a", "lora_b", "magnitude")
# Sums of the four linear layers that a token passes; a backward pass has about twice as many.
ROUNDINGS = 3 * (2 * HIDDEN + FFN + SHARED_FFN + 4 * DIM)

# Of steps that are compared with the oracle.
MODES = [
    (compiler, dtype) for compiler in ("eager", "compiled") for dtype in (torch.float64, torch.float32, torch.bfloat16)
]

Results = dict[str, torch.Tensor]
# What is taken of each parameter of an adapter: its value, or a gradient.
Read = Callable[[Any], torch.Tensor]
# A model, and what to read -> the whole tensors of all adapters; `total` as `whole_tensors` takes it.
TensorsOf = Callable[..., Results]
# How experts are compiled in tests that are not about compilation.
COMPILED: dict[str, Any] = {"backend": "dora_fx", "fullgraph": True, "options": {"inner_compiler": "aot_eager"}}


@dataclass(frozen=True)
class ExpertLayout:
    """Sizes of a world; data parallelism, of dense layers and of experts, fills what the others leave."""

    world_size: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1
    pp: int = 1
    dispatcher: str = "allgather"

    def __str__(self) -> str:
        sizes = {name: getattr(self, name) for name in ("tp", "ep", "etp", "pp")}
        parts = [str(self.world_size), *(f"{name}{size}" for name, size in sizes.items() if size > 1)]
        return "-".join([*parts, *([self.dispatcher] * (self.dispatcher != "allgather"))])

    @contextmanager
    def world(self, rank: int, store: Path) -> Iterator[None]:
        """Be one rank of a world of this layout."""
        with (
            streams_on_cpu() if self.dispatcher == "alltoall" else nullcontext(),
            megatron_world(
                tensor_model_parallel_size=self.tp,
                pipeline_model_parallel_size=self.pp,
                expert_model_parallel_size=self.ep,
                expert_tensor_parallel_size=self.etp,
                store=dist.FileStore(str(store), self.world_size),
                global_rank=rank,
                world_size=self.world_size,
            ),
        ):
            yield


class _Stream:
    """What Megatron's dispatcher asks of CUDA's streams and events, on a CPU."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record_event(self, *_: Any) -> _Stream:
        return self

    def wait_stream(self, *_: Any) -> None:
        pass

    wait_event = synchronize = wait = record = wait_stream


@contextmanager
def streams_on_cpu() -> Iterator[None]:
    """Let the all-to-all dispatcher run on a CPU."""

    def moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    with ExitStack() as stack:
        for name in ("Stream", "Event"):
            stack.enter_context(mock.patch.object(torch.cuda, name, _Stream))
        stack.enter_context(mock.patch.object(torch.cuda, "current_stream", lambda *_: _Stream()))
        stack.enter_context(mock.patch.object(torch.cuda, "stream", lambda *_: nullcontext()))
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", lambda *_: None))
        # Megatron leaves what is on the CPU already a tensor, and torch's all_to_all takes lists of numbers.
        stack.enter_context(mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", moved))
        yield


def moe_config(layout: ExpertLayout, dtype: torch.dtype = torch.float64, **settings: Any) -> TransformerConfig:
    defaults: dict[str, Any] = dict(
        num_layers=layout.pp,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=4,
        num_query_groups=4,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        pipeline_dtype=dtype,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        sequence_parallel=layout.tp > 1,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOP_K,
        moe_ffn_hidden_size=FFN,
        moe_shared_expert_intermediate_size=SHARED_FFN,
        moe_token_dispatcher_type=layout.dispatcher,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
    )
    return TransformerConfig(**(defaults | settings))


class MoE(nn.Module):
    """A model that is one mixture-of-experts layer.

    Args:
        spec: as `build_moe_layer` takes it.
        set_values: sets the weights of the layer; None for `set_base_values`.
    """

    def __init__(
        self, config: TransformerConfig, spec: str = "local", set_values: Callable[[nn.Module], None] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.mlp = build_moe_layer(config, spec)
        (set_values or set_base_values)(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.mlp(x)[0]
        return output

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As a GPTModel of one layer, for checkpoints."""
        shards: dict[str, Any] = self.mlp.sharded_state_dict(f"{prefix}mlp.", sharded_offsets, metadata)
        return shards


def build_moe_layer(config: TransformerConfig, name: str) -> Any:
    """The layer of Megatron's "local" spec, or of that over Transformer Engine ("te")."""
    build = get_gpt_layer_local_spec if name == "local" else get_gpt_layer_with_transformer_engine_spec
    spec = build(num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm)
    mlp = spec.submodules.mlp
    if isinstance(mlp, ModuleSpec):
        layer = build_module(mlp, config=config)
    else:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        layer = mlp(config, pg_collection=groups, is_mtp_layer=False)
    layer.set_layer_number(1)
    return layer


def named_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Name in the whole model -> linear layer of an expert of this rank or of the shared one, adapted or not."""
    experts = next(module for module in model.modules() if type(module).__name__ == "SequentialMLP")
    first = parallel_state.get_expert_model_parallel_rank() * len(experts.local_experts)
    found = {
        f"expert {first + index} {name}": getattr(expert, name)
        for index, expert in enumerate(experts.local_experts)
        for name in FEATURES
    }
    for module in model.modules():
        if type(module).__name__ == "SharedExpertMLP":
            found |= {f"shared {name}": getattr(module, name) for name in SHARED_FEATURES}
    return found


def group_of(name: str) -> dist.ProcessGroup:
    """The group that shares a layer."""
    if name.startswith("shared"):
        return parallel_state.get_tensor_model_parallel_group()
    return parallel_state.get_expert_tensor_parallel_group()


def replicas_of(name: str) -> dist.ProcessGroup:
    """The group of ranks that hold the same part of a layer."""
    if name.startswith("shared"):
        return parallel_state.get_data_parallel_group()
    return parallel_state.get_expert_data_parallel_group()


def whole_of(name: str) -> dict[str, torch.Tensor]:
    """The whole tensors of a layer, in float64; magnitudes lie between half and 1.5 of the norm."""
    out_features, in_features = (SHARED_FEATURES if name.startswith("shared") else FEATURES)[name.split()[-1]]
    weight = whole_values((out_features, in_features), f"{name}.weight", in_features**-0.5)
    lora_a = whole_values((DIM, in_features), f"{name}.lora_a", in_features**-0.5)
    lora_b = whole_values((out_features, DIM), f"{name}.lora_b", 0.2)
    gain = 1.0 + 0.5 * torch.tanh(whole_values((out_features,), f"{name}.gain", 1.0))
    magnitude = ((weight + SCALING * lora_b @ lora_a).norm(dim=1) * gain).bfloat16().double()
    return {"weight": weight, "lora_a": lora_a, "lora_b": lora_b, "magnitude": magnitude}


def own_part(name: str, linear: nn.Module, tensor_name: str, whole: torch.Tensor) -> torch.Tensor:
    group, sharding = group_of(name), shardings(name.replace(" ", "."), linear)[tensor_name]
    return split(whole, sharding.dim, group.rank(), group.size(), sharding.blocks)


@torch.no_grad()
def set_router(model: nn.Module) -> None:
    for module in model.modules():
        if type(module).__name__ == "TopKRouter":
            module.weight.copy_(whole_values((EXPERTS, HIDDEN), "router", 0.5))


@torch.no_grad()
def set_base_values(model: nn.Module) -> None:
    """Set the weights of the router and of all linear layers from whole tensors."""
    set_router(model)
    for name, linear in named_linears(model).items():
        linear.weight.copy_(own_part(name, linear, "weight", whole_of(name)["weight"]))


def attach(model: nn.Module, **settings: Any) -> nn.Module:
    """The model with adapters on all its experts, with their initial values."""
    torch.manual_seed(11)
    return dora_fx.DoRA(["linear_fc1", "linear_fc2"], dim=DIM, alpha=SCALING * DIM, **settings)(model)


def adapted(model: nn.Module, *, set_values: bool = True, **settings: Any) -> nn.Module:
    """The model with adapters on all its experts, whose values come from whole tensors or are the initial ones."""
    attach(model, **settings)
    if set_values:
        set_adapter_values(model)
    return model


@torch.no_grad()
def set_adapter_values(model: nn.Module) -> None:
    for name, site in named_sites(model).items():
        wholes = whole_of(name)
        for tensor_name in TRAINED:
            tensors_of(site)[tensor_name].copy_(own_part(name, site.to_wrap, tensor_name, wholes[tensor_name]))


def named_sites(model: nn.Module) -> dict[str, DoRALinear]:
    return {name: linear for name, linear in named_linears(model).items() if isinstance(linear, DoRALinear)}


def batch(number: int, kind: str = "x") -> torch.Tensor:
    """A whole batch `[s, b, h]`; those with odd numbers have one token many times, so that experts get no token."""
    whole = whole_values((SEQUENCE, BATCH, HIDDEN), f"batch {number} {kind}", 1.0)
    if number % 2 and kind == "x":
        whole = whole[:1, :1].expand_as(whole).clone()
    return whole


def own_tokens(whole: torch.Tensor, layout: ExpertLayout) -> torch.Tensor:
    """This rank's part of a batch."""
    dp_rank, dp = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    own = split(whole, 1, dp_rank, dp)
    return split(own, 0, parallel_state.get_tensor_model_parallel_rank(), layout.tp)


def all_tokens(own: torch.Tensor) -> torch.Tensor:
    own = gather(own, Sharding(0), parallel_state.get_tensor_model_parallel_group())
    return gather(own, Sharding(1), parallel_state.get_data_parallel_group())


def whole_tensors(sites: dict[str, DoRALinear], tensors: Results, *, total: bool) -> Results:
    """Whole tensors of all experts on every rank, from each rank's parts by name of layer and tensor.

    Args:
        total: add up those of the ranks that hold the same part.
    """
    own = {}
    for key, part in tensors.items():
        name, tensor_name = key.rsplit(" ", 1)
        whole = gather(part, shardings(name.replace(" ", "."), sites[name].to_wrap)[tensor_name], group_of(name))
        if total:
            dist.all_reduce(whole, group=replicas_of(name))
        own[key] = whole
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    found: Results = {}
    for of_rank in everyone:
        for key, tensor in of_rank.items():
            if key in found:
                assert torch.allclose(found[key], tensor, rtol=1e-6), f"ranks differ in {key}"
            found[key] = tensor
    return found


class Oracle(nn.Module):
    """The layer as the paper writes it, of whole tensors, in float64; routed in float32 as Megatron does."""

    def __init__(self, num_shared: int = 1) -> None:
        super().__init__()
        self.names = [f"expert {number} {name}" for number in range(EXPERTS) for name in FEATURES]
        self.names += [f"shared {name}" for name in SHARED_FEATURES] * num_shared
        self.weights = {name: whole_of(name)["weight"] for name in self.names}
        self.trained = {
            f"{name} {tensor_name}": nn.Parameter(whole_of(name)[tensor_name])
            for name in self.names
            for tensor_name in TRAINED
        }
        self.router = whole_values((EXPERTS, HIDDEN), "router", 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, HIDDEN)
        logits, chosen = (tokens @ self.router.T).topk(TOP_K, -1)
        probs = logits.softmax(-1, dtype=torch.float32).double()
        y = torch.zeros_like(tokens)
        for number in range(EXPERTS):
            token, slot = (chosen == number).nonzero(as_tuple=True)
            y = y.index_add(0, token, self._mlp(f"expert {number}", tokens[token]) * probs[token, slot][:, None])
        if "shared linear_fc1" in self.names:
            y = y + self._mlp("shared", tokens)
        return y.view_as(x)

    def _mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._linear(f"{name} linear_fc1", x).chunk(2, -1)
        return self._linear(f"{name} linear_fc2", F.silu(gate) * up)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        trained = (self.trained[f"{name} {tensor_name}"] for tensor_name in TRAINED)
        return dora_linear(x, self.weights[name], None, *trained, scaling=SCALING)


def tensors_of_sites(model: nn.Module, read: Read = lambda parameter: parameter, *, total: bool = False) -> Results:
    """The whole tensors of all adapters, of what is read from each parameter."""
    sites = named_sites(model)
    own = {f"{name} {key}": read(tensors_of(site)[key]) for name, site in sites.items() for key in TRAINED}
    return whole_tensors(sites, own, total=total)


def weighted_sum(y: torch.Tensor, layout: ExpertLayout, number: int) -> torch.Tensor:
    """The loss of this rank's part of a batch, in float64."""
    return (y.double() * own_tokens(batch(number, "loss"), layout)).sum()


def bound_of_step(dtype: torch.dtype) -> float:
    """Of the errors of a step. Sums of 16-bit numbers are wider; operands and results are rounded, eight on the way."""
    return rounding(dtype, 8 if dtype is torch.bfloat16 else ROUNDINGS)


def oracle_step(number: int, num_shared: int = 1) -> Results:
    """Output and gradients of one batch."""
    oracle, x = Oracle(num_shared), batch(number).requires_grad_()
    y = oracle(x)
    (y * batch(number, "loss")).sum().backward()
    gradients = {f"d {key}": torch.zeros_like(p) if p.grad is None else p.grad for key, p in oracle.trained.items()}
    return {"y": y.detach(), "dx": x.grad, **gradients}


def step(
    model: nn.Module, layout: ExpertLayout, number: int, dtype: torch.dtype, read_tensors: TensorsOf = tensors_of_sites
) -> Results:
    """The same of a model that is spread over ranks."""
    model.zero_grad()
    x = own_tokens(batch(number), layout).to(dtype).requires_grad_()
    y = model(x)
    weighted_sum(y, layout, number).backward()
    gradients = read_tensors(model, lambda parameter: parameter.grad, total=True)
    return {"y": all_tokens(y), "dx": all_tokens(x.grad), **{f"d {key}": value for key, value in gradients.items()}}
