"""A training set-up as the proofs use it: run a pass, read gradients, move adapters, take a step."""

from __future__ import annotations

import contextlib
import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.utils._pytree import tree_map_only

from dora_fx.attach import adapted_layers, check_torch_wrappers, routers_of
from dora_fx.function import whole_of
from dora_fx.megatron import (
    Model,
    NamedModule,
    check_unsharded,
    chunks_of,
    data_parallel_around,
    expert_path_maybe,
    path_of_expert,
    unwrap,
    walk,
    with_expert_number,
)
from dora_fx.modules import DoRALinear
from dora_fx.preflight.model_passes import Forward, ForwardBackward, megatron_runs, one_step, output_of, weight_of_loss
from dora_fx.preflight.optimizers import complete_parts, is_megatron, single_optimizers
from dora_fx.preflight.saved_state import RandomState
from dora_fx.ranks import gather_objects, resolve_group, world_group

# Learning rate for groups whose rate is zero and that name no other, as at the start of a warm-up.
_SOME_LEARNING_RATE = 1e-3
# In a model of one adapted layer: length of the rows of s B A relative to W0's, and relative change of the magnitudes.
_SHARE = 0.3


class Pass(NamedTuple):
    """The results of one training pass on this rank.

    Attributes:
        loss: None on pipeline stages without a loss.
        weight: of the loss; the gradients are those of the mean over all ranks of loss times weight.
        gradients: of every trainable parameter, by its name in the whole model; None where it got none.
    """

    loss: float | None
    weight: float
    gradients: dict[str, torch.Tensor | None]


class SetUp:
    """A model with its wrappers, a batch, and an optimizer or None.

    Attributes:
        sites: this rank's adapted layers, by their paths in the whole model; one that holds several experts by a path
            with their numbers, as other ranks hold others.
        matrices: the matrices that they adapt, each its site and its number among the site's `base_weights`, by paths
            in the whole model with a layer for each expert.
        trainable: parameters that require gradients, by their names in the whole model.
        rounding: machine epsilon of the coarsest dtype of the adapted weights, the same on every rank.
        num_layers: number of adapted matrices in the whole model.
    """

    def __init__(
        self,
        model: Model,
        batch: Any,
        optimizer: Any,
        forward_backward: ForwardBackward | None,
        forward: Forward | None,
    ) -> None:
        self.model, self.batch, self.optimizer = model, batch, optimizer
        self.chunks = chunks_of(model)
        self._forward_backward, self._forward = forward_backward, forward
        self.sites: dict[str, DoRALinear] = {}
        self.matrices: dict[str, tuple[DoRALinear, int]] = {}
        for _, named in adapted_layers(self.chunks):
            check_unsharded(named.whole_path, named.module)
            self.sites[_path_of_site(named)] = named.module
            self.matrices |= _matrices(named)
        check_torch_wrappers(self.sites.values())
        self.trainable = self._named_parameters()
        wrappers = data_parallel_around(self.chunks)
        self._wrappers: list[Any] = [wrapper for wrapper in wrappers if isinstance(wrapper, DistributedDataParallel)]
        self._generators = RandomState()
        # The maximum over all ranks: errors of other stages reach a pipeline stage without adapters too.
        own = max((torch.finfo(site.base_weight.dtype).eps for site in self.sites.values()), default=0.0)
        self.rounding = max(over_all_ranks(own))
        self.num_layers = len(set().union(*over_all_ranks(list(self.matrices))))

    @property
    def room(self) -> float:
        """Bound of relative errors: the square root of the rounding, and more in deep models, whose roundings add up.

        `move_adapters` makes the whole model change by the same amount at any depth, so the bound grows with the depth.
        """
        return math.sqrt(self.rounding) * max(1.0, math.sqrt(self.num_layers) / 3.0)

    @property
    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """A, B and m of all sites, by their names in the whole model."""
        return {
            f"{path}.adapter.{name}": parameter
            for path, site in self.sites.items()
            for name, parameter in site.adapter.named_parameters()
        }

    def training_pass(self) -> Pass:
        """Run the forward and backward passes of one step, always from the same random states."""
        self._generators.restore()
        self.clear_gradients()
        if self._forward_backward is not None:
            returned = self._forward_backward(self.model, self.batch)
            loss, weight = None if returned is None else float(returned), 1.0
        else:
            loss, weight = one_step(self.model, self.batch, self._scaled), weight_of_loss()
        gradients = {name: _gradient_maybe(parameter) for name, parameter in self.trainable.items()}
        by_id = {id(self.trainable[name]): gradient for name, gradient in gradients.items() if gradient is not None}
        complete_parts(self.optimizer, by_id)
        return Pass(loss, weight, gradients)

    def output(self) -> torch.Tensor | None:
        """Compute the output in evaluation mode and without compiled code; None if it is on another rank."""
        modes = [(module, module.training) for chunk in self.chunks for module in chunk.modules()]
        try:
            for chunk in self.chunks:
                chunk.eval()
            self._generators.restore()
            with uncompiled():
                return output_of(self.model, self.batch, self._forward)
        finally:
            for module, training in modes:
                module.training = training

    def clear_gradients(self) -> None:
        """Clear all gradients."""
        for wrapper in self._wrappers:
            wrapper.zero_grad_buffer()
        for parameter in (*self.trainable.values(), *(p for s in single_optimizers(self.optimizer) for p in _held(s))):
            parameter.grad = None
            # A model may be passed without its wrapper, whose buffer then is found here alone.
            if (main_grad := getattr(parameter, "main_grad", None)) is not None:
                main_grad.zero_()

    def step(self) -> None:
        """Take an optimizer step, at a learning rate above zero."""
        for single in single_optimizers(self.optimizer):
            for group in (single.optimizer if is_megatron(single) else single).param_groups:
                if float(group["lr"]) == 0.0:
                    group["lr"] = group.get("max_lr") or group.get("initial_lr") or _SOME_LEARNING_RATE
        if is_megatron(self.optimizer):
            with megatron_runs(self.chunks):
                self.optimizer.step()
        else:
            self.optimizer.step()

    @torch.no_grad()
    def scale_losses_by_one(self) -> None:
        """Set the scale of float16 losses to one, since finding a large one without overflows takes many steps."""
        for single in single_optimizers(self.optimizer):
            scale = getattr(getattr(single, "grad_scaler", None), "scale", None)
            if isinstance(scale, torch.Tensor):
                scale.fill_(1.0)

    @torch.no_grad()
    def move_adapters(self) -> None:
        """Draw B and m from seeds that depend on the layers' paths: the same whole tensors at every layout.

        Initially B is zero and m the norm: DoRA is the identity, and no fault would show. The changes of the layers add
        up like a random walk, so each layer of a deep model changes less, and the whole model stays near the one to
        train.
        """
        share = _SHARE / math.sqrt(self.num_layers)
        for path, size in self._sizes_of_b(share).items():
            site, index = self.matrices[path]
            adapter, generator = site.adapter, torch.Generator().manual_seed(zlib.crc32(path.encode()))

            def draw(name: str, adapter: Any = adapter, generator: torch.Generator = generator) -> torch.Tensor:
                placement = adapter.matrix_placements[name]
                whole = torch.rand(placement.shape, dtype=torch.float64, generator=generator) * 2 - 1
                return placement.pad_and_shard(whole, adapter.tp_rank, adapter.tp_size)

            _, lora_b, magnitude = site.matrix_factors(index)
            lora_b.copy_(draw("linear_out.weight") * (size * math.sqrt(3.0)))
            gain = 1.0 + share * draw("weight_magnitude").to(magnitude.device)
            magnitude.copy_(site.matrix_norm(index) * gain)

    @torch.no_grad()
    def make_adapters_fresh(self) -> None:
        """Set B to zero and m to the norms, so that an adapted layer computes what its base computes."""
        for site in self.sites.values():
            site.adapter.linear_out.weight.zero_()
            site.adapter.weight_magnitude.copy_(site._get_weight_norm().flatten())

    def _sizes_of_b(self, share: float) -> dict[str, float]:
        """Return the root mean squares of B for which rows of s B A have a share of W0's length, by matrices' paths.

        Every rank calls it.

        Computed from sums over each layer's ranks, so that it is the same at every layout.
        """
        own: dict[str, tuple[float, ...]] = {}
        for path, (site, index) in self.matrices.items():
            operands = (whole_of(site.base_weights[index]), site.matrix_factors(index).lora_a.detach())
            own[path] = tuple(float(tensor.double().square().sum()) for tensor in operands)
        sizes = {path: share * self._size_of_b(self.matrices[path][0], [squares]) for path, squares in own.items()}
        for tp_group in dict.fromkeys(site.adapter.tp_group for site in self.sites.values()):
            if tp_group:
                of_ranks = gather_objects(own, resolve_group(tp_group))
                for path, (site, _) in self.matrices.items():
                    if site.adapter.tp_group == tp_group:
                        sizes[path] = share * self._size_of_b(site, [of_rank[path] for of_rank in of_ranks])
        return sizes

    @staticmethod
    def _size_of_b(site: DoRALinear, squares: Sequence[tuple[float, ...]]) -> float:
        """Return the size for rows as long as W0's, from sums of squares of W0 and A on the layer's ranks."""
        base, low_rank = (sum(column) for column in zip(*squares, strict=True))
        if base == 0.0 or low_rank == 0.0:
            return 1.0
        row = math.sqrt(base / site.adapter.out_features)
        return row / (abs(site.scaling) * math.sqrt(low_rank))

    def _named_parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{_path_of_site(named)}.{name}".replace(".to_wrap.", ".").lstrip("."): parameter
            for chunk in self.chunks
            for named in walk(chunk, DoRALinear)
            for name, parameter in named.module.named_parameters(recurse=isinstance(named.module, DoRALinear))
            if parameter.requires_grad
        }

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = self.optimizer.scale_loss(loss) if is_megatron(self.optimizer) else loss
        return scaled


def _numbers_maybe(site: nn.Module) -> range | None:
    """Return the numbers of the experts that an adapted layer holds; None for a layer of one matrix."""
    if not isinstance(site, DoRALinear) or site.expert_weights is None:
        return None
    experts = site.adapter.experts
    assert experts is not None and experts.first is not None
    return range(experts.first, experts.first + experts.count)


def _path_of_site(named: NamedModule) -> str:
    numbers = _numbers_maybe(named.module)
    return named.whole_path if numbers is None else path_of_expert(named.whole_path, f"{numbers[0]}-{numbers[-1]}")


def _matrices(named: NamedModule) -> dict[str, tuple[Any, int]]:
    """Return the matrices of an adapted layer as `SetUp.matrices` has them."""
    numbers, site = _numbers_maybe(named.module), named.module
    if numbers is None:
        return {named.whole_path: (site, 0)}
    return {path_of_expert(named.whole_path, str(number)): (site, index) for index, number in enumerate(numbers)}


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Within the block, run compiled functions eagerly."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def without_recomputation(setup: SetUp) -> Iterator[bool]:
    """Turn activation checkpointing off within the block; yield whether any was on.

    Megatron has it in its configuration for whole layers and in attributes of modules for parts of layers; transformers
    has an attribute of the layers; torch's wrapper has the checkpoint function.
    """
    changed: list[tuple[Any, str, Any]] = []

    def put(holder: Any, name: str, value: Any) -> None:
        changed.append((holder, name, getattr(holder, name)))
        setattr(holder, name, value)

    for module in (module for chunk in setup.chunks for module in chunk.modules()):
        if isinstance(module, ActivationWrapper) and hasattr(module, "checkpoint_fn"):
            put(module, "checkpoint_fn", lambda function, *args, **kwargs: function(*args, **kwargs))
        config = getattr(module, "config", None)
        if getattr(config, "recompute_granularity", None) is not None:
            put(config, "recompute_granularity", None)
        for name, value in list(vars(module).items()):
            if value is True and not name.startswith("_") and ("recompute" in name or "checkpoint" in name):
                put(module, name, False)
    try:
        yield bool(changed)
    finally:
        for holder, name, value in reversed(changed):
            setattr(holder, name, value)


@contextlib.contextmanager
def kept_routing(setup: SetUp, done: Pass) -> Iterator[Pass]:
    """Within the block, routers of experts return constants, those of one pass; yield that pass, or `done` without any.

    A loss jumps where a token goes to another expert, and then differences of it say nothing of gradients.
    """
    returned: dict[nn.Module, list[Any]] = {named.module: [] for chunk in setup.chunks for named in routers_of(chunk)}
    if not any(over_all_ranks(bool(returned))):
        yield done
        return

    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        constants = tree_map_only(torch.Tensor, torch.Tensor.detach, output)
        returned[module].append(constants)
        return constants

    with _hooked(returned, keep):
        done = setup.training_pass()
    # Each pass has the same calls in the same order.
    outputs = {module: itertools.cycle(each) for module, each in returned.items()}
    with _hooked(returned, lambda module, args, output: next(outputs[module])):
        yield done


@contextlib.contextmanager
def _hooked(modules: Iterable[nn.Module], hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def drops_in_base(setup: SetUp) -> bool:
    """Return whether the base has dropout; compiled code draws other masks for it than eager code."""
    names = ("hidden_dropout", "attention_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob")
    modules = [module for chunk in setup.chunks for module in chunk.modules()]
    configs = [getattr(unwrap(module), "config", None) for module in modules]
    by_config = any((getattr(config, name, 0.0) or 0.0) > 0.0 for config in configs for name in names)
    return by_config or any(isinstance(module, nn.Dropout) and module.p > 0.0 for module in modules)


def without_idle_experts(paths: Iterable[str], with_gradient: Iterable[str]) -> list[str]:
    """Return the paths without those of experts that had no token; every rank calls it.

    An expert had none if no tensor of it has a gradient, and one of another expert of the layer has, on any rank.

    Args:
        paths: of tensors that did not get what all should get.
        with_gradient: paths of all that have a gradient other than zero.
    """
    reached = set().union(*over_all_ranks({expert for path in with_gradient if (expert := expert_path_maybe(path))}))
    layers = {with_expert_number(expert, "*") for expert in reached}

    def is_idle(path: str) -> bool:
        expert = expert_path_maybe(path)
        return expert is not None and expert not in reached and with_expert_number(expert, "*") in layers

    return [path for path in paths if not is_idle(path)]


def over_all_ranks(value: Any) -> list[Any]:
    """Gather a value from every rank, in rank order; every rank calls it."""
    return gather_objects(value, world_group())


def not_finite(tensors: Mapping[str, torch.Tensor | None]) -> list[str]:
    """Return the paths of tensors with NaN or inf."""
    return [path for path, tensor in tensors.items() if tensor is not None and not torch.isfinite(tensor).all()]


def _gradient_maybe(parameter: torch.Tensor) -> torch.Tensor | None:
    gradient = getattr(parameter, "main_grad", None)
    gradient = parameter.grad if gradient is None else gradient
    return None if gradient is None else gradient.detach().clone()


def _held(single: Any) -> list[torch.Tensor]:
    inner = single.optimizer if is_megatron(single) else single
    return [parameter for group in inner.param_groups for parameter in group["params"]]
