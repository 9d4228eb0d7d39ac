"""The properties that make a training set-up one that trains its adapters, each with the figure that shows it.

Each function proves one of them on this rank, and every rank calls all of them in the same order. Errors are relative:
of outputs to what the adapters change, of gradients to the gradient. They may be up to the square root of the dtype's
rounding, which lies far above what another order of sums changes (1e-6 and 1e-2 of float32 and bfloat16) and far below
what a wrong function does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo import OptimizedModule

from dora_fx.attach.merge import merge_problem_maybe, merged, merged_weight
from dora_fx.checkpoint.contents import all_shards, model_contents
from dora_fx.checkpoint.optimizer import OptimizerState
from dora_fx.checkpoint.tensor_digests import copy_digests, differing_copies
from dora_fx.megatron.main_copies import differing
from dora_fx.megatron.world import world_at_hand
from dora_fx.modules.dora_linear import disable_adapter
from dora_fx.preflight.optimizers import copies_of, torch_optimizers, trained_parameters
from dora_fx.preflight.passes import call, loss_of
from dora_fx.preflight.report import Finding
from dora_fx.preflight.saved_state import SavedValues
from dora_fx.preflight.set_up import Pass, SetUp, drops_in_base, over_all_ranks, uncompiled, without_recomputation
from dora_fx.ranks.groups import resolve_group

_OF_NO_MODULE = "a parameter of no module"
_NO_OPTIMIZER = "no optimizer was given"
# Gradients of 16 bits go through more roundings than outputs.
_ROOM_FOR_GRADIENTS = 3.0


def optimizer_trains_adapters(setup: SetUp) -> Finding:
    """The optimizer has every adapter parameter that is trained, and no other."""
    name = "optimizer"
    if setup.optimizer is None:
        return Finding(name, "skipped", _NO_OPTIMIZER)
    names = {id(parameter): path for path, parameter in _all_parameters(setup).items()}
    trained = [names.get(id(parameter), _OF_NO_MODULE) for parameter in trained_parameters(setup.optimizer)]
    # A distributed optimizer has a part of the parameters on each rank.
    everywhere = set().union(*over_all_ranks(trained))
    adapters = setup.adapter_parameters
    number = _number_in_model(adapters)
    frozen = sorted(path for path, parameter in adapters.items() if not parameter.requires_grad)
    missing = sorted(adapters.keys() - everywhere)
    beyond = sorted(set(trained) - adapters.keys())
    if missing:
        state = "frozen" if missing[0] in frozen else "not in the optimizer"
        return _failed(name, missing, f"{state}, expected it to be trained")
    if frozen:
        return _failed(name, frozen, "frozen, expected it to be trained")
    if beyond:
        return _failed(name, beyond, "in the optimizer, expected adapters alone")
    groups = [group for each in torch_optimizers(setup.optimizer) for group in each.param_groups]
    rates = sorted({float(group["lr"]) for group in groups})
    decays = sorted({float(group.get("weight_decay", 0.0)) for group in groups})
    figures = f"lr {_listed(map('{:g}'.format, rates))}, weight decay {_listed(map('{:g}'.format, decays))}"
    return Finding(name, "ok", f"all {number} adapter tensors and nothing else; {figures}")


def main_copies_are_parameters(setup: SetUp) -> Finding:
    """A step of Megatron's 16-bit optimizers writes float32 copies over the parameters: they must be their values."""
    name = "main copies"
    names = {id(parameter): path for path, parameter in setup.trainable.items()}
    copies = [copy for copy in copies_of(setup.optimizer) if copy.main.dtype != copy.parameter.dtype]
    wrong = [names.get(id(copy.parameter), _OF_NO_MODULE) for copy in differing(copies)]
    if wrong:
        return _failed(name, wrong, "another value than the optimizer's float32 copy, which the next step writes")
    if not copies:
        return Finding(name, "skipped", "the optimizer has none")
    return Finding(name, "ok", f"{len(copies)} float32 copies are their parameters")


@world_at_hand()
def saved_is_trained(setup: SetUp) -> Finding:
    """`save_checkpoint` keeps every parameter that is trained, and what the optimizer has of it."""
    name = "saved"
    contents = model_contents(setup.chunks)
    # The first of the shards that a factory makes of a parameter begins where the parameter does.
    kept = {shard.data.data_ptr() for shard in all_shards(contents.adapter)}
    lost = sorted(path for path, parameter in setup.trainable.items() if parameter.data_ptr() not in kept)
    number = _number_in_model(setup.trainable)
    if any(over_all_ranks(bool(lost))):
        return _failed(name, lost, "trained, and save_checkpoint keeps adapters alone")
    if setup.optimizer is not None:
        OptimizerState(setup.optimizer, setup.chunks, contents.adapter).to_save()
    state = "" if setup.optimizer is None else " and the optimizer's state"
    return Finding(name, "ok", f"{number} trained tensors{state}")


@world_at_hand()
def replicas_are_equal(setup: SetUp, when: str) -> Finding:
    """Ranks that hold the same part of an adapter hold the same bits."""
    name = f"replicas {when}"
    digests = copy_digests(all_shards(model_contents(setup.chunks).adapter))
    everyone = over_all_ranks(digests)
    if len(everyone) == 1:
        return Finding(name, "skipped", "there is one rank")
    differing = differing_copies(everyone)
    if differing:
        return _failed(name, differing, "other bits on other ranks, expected equal copies")
    copies = sum(len(of_rank) for of_rank in everyone) - len(set().union(*everyone))
    if not copies:
        return Finding(name, "skipped", "no two ranks hold the same part")
    return Finding(name, "ok", f"{copies} copies on {len(everyone)} ranks are equal bit by bit")


def steps_move_everything(setup: SetUp) -> Finding:
    """Two steps have finite gradients and move every tensor. In the first, A has none, as B is zero."""
    name = "steps"
    if setup.optimizer is None:
        return Finding(name, "skipped", _NO_OPTIMIZER)
    if any(over_all_ranks(bool(differing(copies_of(setup.optimizer))))):
        return Finding(name, "skipped", "a step would undo what was written into parameters")
    copies = {id(copy.parameter): copy.main for copy in copies_of(setup.optimizer)}
    held = {path: [p, *([copies[id(p)]] if id(p) in copies else [])] for path, p in setup.trainable.items()}
    before = {path: [tensor.detach().clone() for tensor in tensors] for path, tensors in held.items()}
    for number in (1, 2):
        gradients = setup.training_pass().gradients
        wrong = _not_finite(gradients)
        if any(over_all_ranks(bool(wrong))):
            return _failed(name, wrong, f"a gradient that is not finite, in step {number}")
        setup.step()
    moves = {
        path: max(float((now.detach() - then).abs().max()) for now, then in zip(tensors, before[path], strict=True))
        for path, tensors in held.items()
    }
    wrong = [path for path, move in moves.items() if not math.isfinite(move)]
    if any(over_all_ranks(bool(wrong))):
        return _failed(name, wrong, "values that are not finite after two steps")
    # A part of a distributed optimizer's copies is on each rank.
    everywhere: dict[str, float] = {}
    for of_rank in over_all_ranks(moves):
        for path, move in of_rank.items():
            everywhere[path] = max(move, everywhere.get(path, 0.0))
    still = [path for path, move in everywhere.items() if move == 0.0]
    if still:
        dtype = str(setup.trainable[still[0]].dtype).removeprefix("torch.") if still[0] in setup.trainable else "it"
        return _failed(name, still, f"the value of before after two steps ({dtype})")
    least = min(everywhere, key=lambda path: everywhere[path]) if everywhere else ""
    return Finding(name, "ok", f"every tensor moves; least {everywhere.get(least, 0.0):.1e} ({least})")


def gradients_arrive(setup: SetUp, eager: Pass) -> Finding:
    """Every adapter tensor has a finite gradient that is not zero, with B and m away from where training starts."""
    name = "gradients"
    gradients = {path: eager.gradients.get(path) for path in setup.adapter_parameters}
    for found, expected in (
        ([path for path, gradient in gradients.items() if gradient is None], "no gradient"),
        (_not_finite(gradients), "a gradient that is not finite"),
        ([path for path, gradient in gradients.items() if gradient is not None and not gradient.any()], "no gradient"),
    ):
        if found:
            return _failed(name, found, f"{expected}, expected one of every adapted layer that the batch goes through")
    norms = {path: float(gradient.double().norm()) for path, gradient in gradients.items() if gradient is not None}
    least = min(norms, key=lambda path: norms[path], default="none here")
    return Finding(name, "ok", f"all are there and finite; least norm {norms.get(least, 0.0):.1e} ({least})")


def compiled_is_eager(setup: SetUp, eager: Pass) -> Finding:
    """Compiled code gives the loss and the gradients of the same model run as it is written."""
    name = "compiled"
    if not is_compiled(setup):
        return Finding(name, "skipped", "nothing is compiled")
    if drops_in_base(setup):
        return Finding(name, "skipped", "the base drops out, with other masks in compiled code")
    return _same_pass(name, setup, setup.training_pass(), eager, "eager")


def recomputation_changes_nothing(setup: SetUp, eager: Pass) -> Finding:
    """Activation checkpointing gives the loss and the gradients that keeping the activations gives."""
    name = "recomputation"
    with without_recomputation(setup) as was_on, uncompiled():
        if not was_on:
            return Finding(name, "skipped", "there is none")
        kept = setup.training_pass()
    return _same_pass(name, setup, eager, kept, "kept activations")


def adapter_off_is_base(setup: SetUp) -> Finding:
    """With B = 0 and m = norm the adapted layers compute what their base layers do."""
    values = SavedValues(setup.adapter_parameters.values())
    moved = setup.output()
    with disable_adapter(setup.model):
        off = setup.output()
    setup.make_adapters_fresh()
    fresh = setup.output()
    values.restore()
    return _same_output("adapter off", setup, fresh, off, moved, "a fresh adapter from the base")


def merged_is_adapted(setup: SetUp) -> Finding:
    """The merged model computes what the adapted one does."""
    name = "merged"
    problems = over_all_ranks(merge_problem_maybe(setup.chunks, list(setup.sites.items())))
    problem = next((problem for problem in problems if problem is not None), None)
    if problem is not None:
        return Finding(name, "skipped", problem)
    adapted = setup.output()
    with disable_adapter(setup.model):
        off = setup.output()
    with merged(setup.model):
        whole = setup.output()
    return _same_output(name, setup, whole, adapted, off, "merged weights from adapters")


@torch.no_grad()
def magnitudes_are_lengths(setup: SetUp) -> Finding:
    """The rows of m / n * (W0 + s B A) are as long as m says, which is what n is for, on however many ranks."""
    name = "magnitudes"
    errors = {}
    for path, site in setup.sites.items():
        adapter = site.adapter
        squares = merged_weight(site).square().sum(1)
        if adapter.tp_group and adapter.layout.shards_input_features:
            dist.all_reduce(squares, group=resolve_group(adapter.tp_group))
        errors[path] = _error(squares.sqrt(), adapter.weight_magnitude.detach().abs())
    worst = max(errors, key=lambda path: errors[path], default="none here")
    if errors and not errors[worst] <= math.sqrt(setup.rounding):
        return Finding(
            name, "failed", f"{worst}: found rows of the adapted weight {errors[worst]:.1e} off their lengths"
        )
    return Finding(name, "ok", f"rows are as long as m says, within {errors.get(worst, 0.0):.1e} ({worst})")


def loss_is_reference(setup: SetUp, loss: float, reference: float | nn.Module | None) -> Finding:
    """The loss is that of another layout, or of another model that has the same adapters."""
    name = "reference"
    if reference is None:
        return Finding(name, "skipped", "none was given")
    if isinstance(reference, nn.Module):
        with torch.no_grad():
            reference = loss_of(call(reference, setup.batch)).item()
    error = abs(loss - reference) / max(abs(reference), 1e-30)
    text = f"loss {loss:.6f} of {reference:.6f}, {error:.1e} apart"
    return Finding(name, "ok" if error <= math.sqrt(setup.rounding) else "failed", text)


def _same_pass(name: str, setup: SetUp, found: Pass, expected: Pass, of: str) -> Finding:
    bound = _ROOM_FOR_GRADIENTS * math.sqrt(setup.rounding)
    errors = {path: _error(found.gradients[path], gradient) for path, gradient in expected.gradients.items()}
    worst = max(errors, key=lambda path: errors[path], default="")
    text = f"gradients within {errors.get(worst, 0.0):.1e} of {of} ({worst})"
    if not errors.get(worst, 0.0) <= bound:
        return Finding(name, "failed", f"{worst}: found a gradient {errors[worst]:.1e} away from {of}")
    if found.loss is not None and expected.loss is not None:
        error = abs(found.loss - expected.loss) / max(abs(expected.loss), 1e-30)
        text = f"loss within {error:.1e}, {text}"
        if not error <= bound:
            return Finding(name, "failed", f"model: found a loss of {found.loss:.6f}, {expected.loss:.6f} with {of}")
    return Finding(name, "ok", text)


def _same_output(
    name: str,
    setup: SetUp,
    found: torch.Tensor | None,
    expected: torch.Tensor | None,
    other: torch.Tensor | None,
    what: str,
) -> Finding:
    """Compare outputs, relative to what the adapters change, or to the rounding of the output if that is more."""
    if found is None or expected is None or other is None:
        return Finding(name, "skipped", "the output is on another rank")
    found, expected, other = found.double(), expected.double(), other.double()
    effect = float((other - expected).norm())
    difference = float((found - expected).norm())
    error = difference / max(effect, 1e-30)
    text = f"{what}: {error:.1e} of what the adapters change"
    return Finding(name, "ok" if error <= math.sqrt(setup.rounding) else "failed", text)


def _error(found: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    if found is None or expected is None:
        return 0.0 if found is expected else math.inf
    scale = float(expected.double().norm())
    difference = float((found.double() - expected.double()).norm())
    return difference / scale if scale > 0.0 else (0.0 if difference == 0.0 else math.inf)


def _not_finite(tensors: Mapping[str, torch.Tensor | None]) -> list[str]:
    return [path for path, tensor in tensors.items() if tensor is not None and not torch.isfinite(tensor).all()]


def _all_parameters(setup: SetUp) -> dict[str, nn.Parameter]:
    named = {path: parameter for chunk in setup.chunks for path, parameter in chunk.named_parameters()}
    # Those of adapters by their paths in the whole model.
    return {**named, **setup.trainable}


def is_compiled(setup: SetUp) -> bool:
    """Return whether a part of the model is compiled."""
    modules = [module for chunk in setup.chunks for module in chunk.modules()]
    compiled = (getattr(module, "_compiled_call_impl", None) is not None for module in modules)
    return any(compiled) or any(isinstance(module, OptimizedModule) for module in modules)


def _number_in_model(parameters: Iterable[str]) -> int:
    """How many parameters of the whole model the ranks' names are; every rank calls it."""
    return len(set().union(*over_all_ranks(list(parameters))))


def _failed(name: str, paths: Iterable[str], found: str) -> Finding:
    """What failed at some paths; of a rank that has none of them, as all ranks leave a proof together."""
    paths = list(paths)
    if not paths:
        return Finding(name, "skipped", "it failed on another rank")
    first, *others = paths
    rest = f", and so {len(others)} more" if others else ""
    return Finding(name, "failed", f"{first}: found {found}{rest}")


def _listed(texts: Iterable[str]) -> str:
    return " and ".join(texts)
