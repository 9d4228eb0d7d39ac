"""Training set-ups with a fault each: what users do, and what goes wrong where one of our own mends is taken out."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from torch import nn
from torch.utils.checkpoint import checkpoint

import dora_fx
from dora_fx.attach import merged_weights, recomputation
from dora_fx.megatron.cpu_runtime import cuda_means_cpu
from dora_fx.models import causal_mask
from dora_fx.modules import tensor_checks
from tests.distributed.mutations import BITS_ARE_NOT_COMPARED, MUTATIONS, Mutation, planted
from tests.distributed.pipeline_gpt import TARGETS, VOCAB, Kind, Layout, attach, build_base, unwrapped
from tests.megatron_checkpoint import UNIFORM, without_cuda_generators
from tests.models import sites

LENGTH = 16


def batch() -> dict[str, torch.Tensor]:
    """A micro-batch, the same on every rank."""
    tokens = torch.randint(0, VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(LENGTH).expand_as(inputs)
    return dict(input_ids=inputs, position_ids=positions, attention_mask=causal_mask(LENGTH, "cpu"), labels=labels)


class SetUp:
    """Chunks of a model of a layer per pipeline stage, wrapped as Megatron wraps them, and an optimizer."""

    def __init__(self, layout: Layout, kind: Kind, *, wraps: bool = True, compiles: bool = False, **dora: Any) -> None:
        chunks: list[Any] = attach(build_base(layout, kind, num_layers=layout.pp * layout.vpp), **dora)
        config, distributed = chunks[0].config, kind.optimizer == "distributed"
        if compiles:
            # Ranks that were in other worlds before would compile other graphs than the others.
            torch._dynamo.reset()
            dora_fx.compile_model(chunks, inner_compiler="eager")
        if kind.dtype is torch.bfloat16:
            chunks = [Float16Module(config, chunk) for chunk in chunks]
        with cuda_means_cpu():
            if wraps:
                settings = DistributedDataParallelConfig(use_distributed_optimizer=distributed)
                chunks = [DistributedDataParallel(config, settings, chunk) for chunk in chunks]
                optimizer_settings = OptimizerConfig(
                    optimizer="adam",
                    lr=1e-2,
                    params_dtype=kind.dtype,
                    bf16=kind.dtype is torch.bfloat16,
                    use_distributed_optimizer=distributed,
                )
                self.optimizer = get_megatron_optimizer(optimizer_settings, chunks)
            else:
                self.optimizer = torch.optim.AdamW(trained(chunks), lr=1e-2)
        self.chunks = chunks
        self.model: Any = chunks[0] if len(chunks) == 1 else chunks

    @property
    def sites(self) -> dict[str, dora_fx.DoRALinear]:
        return {path: site for chunk in self.chunks for path, site in sites(unwrapped(chunk)).items()}

    @property
    def site(self) -> dora_fx.DoRALinear:
        """The row-parallel layer of an MLP, whose magnitude every tensor-parallel rank has."""
        return next(site for path, site in self.sites.items() if path.endswith("linear_fc2"))

    def check(self, reference: float | None = None) -> dora_fx.CheckReport:
        return dora_fx.check(self.model, batch(), self.optimizer, reference=reference, raises=False)


def trained(chunks: list[Any]) -> list[nn.Parameter]:
    return [parameter for chunk in chunks for parameter in chunk.parameters() if parameter.requires_grad]


@dataclass(frozen=True)
class Fault:
    """A set-up that would not train what it should.

    Attributes:
        found_as: names of the findings that say so, or a part of the error where the batch cannot be trained on.
        plant: changes a set-up.
        make: makes it.
        within: a context to make, change and check it in.
        dp: data-parallel ranks that it takes.
    """

    name: str
    found_as: set[str] | str
    plant: Callable[[SetUp], object] = lambda setup: None
    make: Callable[[Layout], SetUp] = lambda layout: SetUp(layout, Kind())
    within: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    dp: int = 1


def mutated(name: str) -> Callable[[], contextlib.AbstractContextManager[None]]:
    [mutation] = [mutation for mutation in MUTATIONS if mutation.name == name]
    return functools.partial(planted, mutation)


def set_up(kind: Kind | None = None, **settings: Any) -> Callable[[Layout], SetUp]:
    return lambda layout: SetUp(layout, kind or Kind(), **settings)


def swallow_gradients(setup: SetUp, **settings: Any) -> None:
    """Put the first layer, whose input comes from a frozen embedding, into torch's checkpoint."""
    layer = unwrapped(setup.chunks[0]).decoder.layers[0]
    inner = layer.forward

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(lambda x: inner(x, *args, **kwargs), hidden_states, **settings)

    layer.forward = forward


@torch.no_grad()
def write_after_the_optimizer_was_made(setup: SetUp) -> None:
    setup.site.adapter.linear_out.weight.fill_(0.5)


def train_without_magnitudes(setup: SetUp) -> None:
    magnitudes = {id(site.adapter.weight_magnitude) for site in setup.sites.values()}
    others = [parameter for parameter in trained(setup.chunks) if id(parameter) not in magnitudes]
    setup.optimizer = torch.optim.AdamW(others, lr=1e-2)


def unfreeze_a_norm(setup: SetUp, *, is_optimized: bool) -> None:
    unwrapped(setup.chunks[-1]).decoder.final_layernorm.weight.requires_grad_()
    if is_optimized:
        setup.optimizer = torch.optim.AdamW(trained(setup.chunks), lr=1e-2)


def step_by_less_than_the_rounding(setup: SetUp) -> None:
    setup.optimizer = torch.optim.AdamW(trained(setup.chunks), lr=1e-6)


@torch.no_grad()
def differ_on_one_rank(setup: SetUp) -> None:
    setup.site.adapter.weight_magnitude.mul_(1.0 + 0.1 * parallel_state.get_tensor_model_parallel_rank())


@contextlib.contextmanager
def merging_without_scaling() -> Iterator[None]:
    with planted(Mutation("merged without scaling", merged_weights.merge_tensors, "alpha=scaling", "alpha=1.0")):
        yield


@contextlib.contextmanager
def recomputing_without_a_gradient() -> Iterator[None]:
    """Megatron's own recomputation, and nothing that gives the input of its layers a gradient."""
    condition = "not torch.is_grad_enabled() or not _recomputes(stack)"
    with without_cuda_generators(), planted(Mutation("no gradient", recomputation.before_stack, condition, "True")):
        yield


def recompute_everything(setup: SetUp) -> None:
    for name, value in UNIFORM.items():
        setattr(unwrapped(setup.chunks[0]).config, name, value)


@contextlib.contextmanager
def magnitudes_of_any_dtype() -> Iterator[None]:
    condition = "magnitude.dtype != wide"
    with planted(Mutation("any dtype", tensor_checks.check_magnitude, condition, "False")):
        yield


def cast_magnitudes(setup: SetUp) -> None:
    setup.optimizer = torch.optim.AdamW(trained(setup.chunks), lr=1e-4)
    for site in setup.sites.values():
        site.adapter.weight_magnitude.data = site.adapter.weight_magnitude.data.to(torch.bfloat16)


def make_a_magnitude_in_inference_mode(setup: SetUp) -> None:
    with torch.inference_mode():
        setup.site.adapter.weight_magnitude = nn.Parameter(setup.site.adapter.weight_magnitude.clone())
    setup.optimizer = torch.optim.AdamW(trained(setup.chunks), lr=1e-2)


SEQUENCE_PARALLEL = Kind(sequence_parallel=True)
# On one rank.
FAULTS = [
    Fault(
        "a checkpoint swallows the gradients",
        "does not require grad",
        lambda s: swallow_gradients(s, use_reentrant=True),
    ),
    Fault(
        "Megatron's recomputation swallows the gradients",
        {"gradients", "recomputation", "steps"},
        recompute_everything,
        set_up(targets=[*TARGETS, "output_layer"]),
        recomputing_without_a_gradient,
    ),
    Fault(
        "magnitudes are cast past the model",
        {"adapter off", "slope", "steps"},
        cast_magnitudes,
        set_up(wraps=False),
        magnitudes_of_any_dtype,
    ),
    Fault(
        "a magnitude is made in inference mode",
        "made under torch.inference_mode()",
        make_a_magnitude_in_inference_mode,
        set_up(wraps=False),
    ),
    Fault(
        "a checkpoint computes with other masks",
        {"slope"},
        lambda s: swallow_gradients(s, use_reentrant=False, preserve_rng_state=False),
        set_up(dropout=0.4),
    ),
    Fault(
        "an output is detached",
        {"gradients", "slope", "steps"},
        lambda s: s.site.register_forward_hook(lambda module, inputs, output: (output[0].detach(), *output[1:])),
    ),
    Fault(
        "a gradient is not finite",
        {"steps", "gradients"},
        lambda s: s.site.adapter.linear_out.weight.register_hook(lambda gradient: gradient * torch.nan),
    ),
    Fault(
        "an adapter is written after the optimizer copied it",
        {"main copies"},
        write_after_the_optimizer_was_made,
        set_up(Kind(optimizer="bf16")),
    ),
    Fault("the optimizer lacks the magnitudes", {"optimizer", "steps"}, train_without_magnitudes, set_up(wraps=False)),
    Fault("an adapter is frozen", {"optimizer", "gradients"}, lambda s: s.site.adapter.linear_in.requires_grad_(False)),
    Fault(
        "a norm is trained too",
        {"optimizer", "saved"},
        lambda s: unfreeze_a_norm(s, is_optimized=True),
        set_up(wraps=False),
    ),
    Fault(
        "a norm has gradients that nobody uses",
        {"saved", "steps"},
        lambda s: unfreeze_a_norm(s, is_optimized=False),
        set_up(wraps=False),
    ),
    Fault(
        "steps are smaller than bfloat16's rounding",
        {"steps"},
        step_by_less_than_the_rounding,
        set_up(Kind(optimizer="bf16"), wraps=False),
    ),
    Fault(
        "norms of other values are kept",
        {"slope", "merged"},
        make=set_up(compiles=True),
        within=functools.partial(planted, BITS_ARE_NOT_COMPARED),
    ),
    Fault("merging forgets the scaling", {"merged", "magnitudes"}, within=merging_without_scaling),
    Fault(
        "the gain of a fresh adapter is not one",
        {"adapter off", "magnitudes"},
        within=mutated("gain without minus norm"),
    ),
    Fault("the norm's scaling is not squared", {"magnitudes"}, within=mutated("norm's scaling not squared")),
    Fault("output gradients are not scaled", {"slope"}, within=mutated("output gradient not scaled")),
]
# On two tensor-parallel ranks with sequence parallelism, or on two data-parallel ranks.
FAULTS_OF_RANKS = [
    Fault("copies differ before", {"replicas before", "replicas after"}, differ_on_one_rank, set_up(SEQUENCE_PARALLEL)),
    Fault(
        "a magnitude's gradient is left partial",
        {"replicas after", "slope"},
        make=set_up(SEQUENCE_PARALLEL),
        within=mutated("magnitude's gradient left partial"),
    ),
    Fault(
        "factors' gradients are not reduced",
        {"slope"},
        make=set_up(SEQUENCE_PARALLEL),
        within=mutated("weight gradients not reduced"),
    ),
    Fault(
        "a norm is that of the local shard",
        {"magnitudes", "replicas before", "replicas after"},
        make=set_up(SEQUENCE_PARALLEL),
        within=mutated("norm's terms not reduced"),
    ),
    Fault(
        "gate and up are sharded as one",
        {"reference"},
        make=set_up(SEQUENCE_PARALLEL),
        within=mutated("gated rows sharded as one block"),
    ),
    Fault("replicas are never synchronised", {"replicas after"}, make=set_up(wraps=False), dp=2),
]


def matches(fault: Fault, seen: set[str] | str) -> bool:
    """Return whether a fault was seen for what it is."""
    return fault.found_as in seen if isinstance(fault.found_as, str) else fault.found_as == seen


def seen_as(fault: Fault | None, layout: Layout, reference: float | None = None) -> set[str] | str:
    """The names of the findings that failed, or the error; on every rank alike."""
    with fault.within() if fault else contextlib.nullcontext():
        setup = (fault.make if fault else set_up(SEQUENCE_PARALLEL))(layout)
        if fault:
            fault.plant(setup)
        try:
            return {finding.name for finding in setup.check(reference).failed}
        except dora_fx.CheckError as error:
            return str(error)
