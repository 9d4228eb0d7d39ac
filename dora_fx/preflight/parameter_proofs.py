"""Proofs about parameters: the optimizer trains them, replicas are equal, and a checkpoint keeps them.

Each function proves one property on this rank; every rank calls all of them in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from dora_fx.checkpoint import OptimizerState, all_shards, copy_digests, differing_copies, sharded_model_of
from dora_fx.megatron import differing, world_at_hand
from dora_fx.preflight.check_report import Finding, failed_at
from dora_fx.preflight.optimizers import copies_of, torch_optimizers, trained_parameters
from dora_fx.preflight.set_up import SetUp, not_finite, over_all_ranks, without_idle_experts

_OF_NO_MODULE = "a parameter of no module"
_NO_OPTIMIZER = "no optimizer was given"


def optimizer_trains_adapters(setup: SetUp) -> Finding:
    """Prove that the optimizer has every adapter parameter, and no other parameter."""
    name = "optimizer"
    if setup.optimizer is None:
        return Finding(name, "skipped", _NO_OPTIMIZER)
    names = {id(parameter): path for path, parameter in _all_parameters(setup).items()}
    trained = [names.get(id(parameter), _OF_NO_MODULE) for parameter in trained_parameters(setup.optimizer)]
    # On each rank a distributed optimizer has a part of the parameters.
    everywhere = set().union(*over_all_ranks(trained))
    adapters = setup.adapter_parameters
    number = _number_in_model(adapters)
    frozen = sorted(path for path, parameter in adapters.items() if not parameter.requires_grad)
    missing = sorted(adapters.keys() - everywhere)
    beyond = sorted(set(trained) - adapters.keys())
    if missing:
        state = "frozen" if missing[0] in frozen else "not in the optimizer"
        return failed_at(name, missing, f"{state}, expected it to be trained")
    if frozen:
        return failed_at(name, frozen, "frozen, expected it to be trained")
    if beyond:
        return failed_at(name, beyond, "in the optimizer, expected adapters alone")
    groups = [group for each in torch_optimizers(setup.optimizer) for group in each.param_groups]
    rates = sorted({float(group["lr"]) for group in groups})
    decays = sorted({float(group.get("weight_decay", 0.0)) for group in groups})
    lr, decay = (" and ".join(f"{value:g}" for value in values) for values in (rates, decays))
    figures = f"lr {lr}, weight decay {decay}"
    return Finding(name, "ok", f"all {number} adapter tensors and nothing else; {figures}")


def main_copies_are_parameters(setup: SetUp) -> Finding:
    """Prove that Megatron's float32 copies equal their parameters; a step writes the copies over the parameters."""
    name = "main copies"
    names = {id(parameter): path for path, parameter in setup.trainable.items()}
    copies = [copy for copy in copies_of(setup.optimizer) if copy.main.dtype != copy.parameter.dtype]
    wrong = [names.get(id(copy.parameter), _OF_NO_MODULE) for copy in differing(copies)]
    if wrong:
        return failed_at(name, wrong, "another value than the optimizer's float32 copy, which the next step writes")
    if not copies:
        return Finding(name, "skipped", "the optimizer has none")
    return Finding(name, "ok", f"{len(copies)} float32 copies are their parameters")


@world_at_hand()
def saved_is_trained(setup: SetUp) -> Finding:
    """Prove that `save_checkpoint` keeps every trainable parameter, and can save the optimizer's state."""
    name = "saved"
    sharded = sharded_model_of(setup.chunks)
    # By memory: the first shard that a factory makes of a parameter starts at the parameter's address.
    kept = {shard.data.data_ptr() for shard in all_shards(sharded.adapter)}
    lost = sorted(path for path, parameter in setup.trainable.items() if parameter.data_ptr() not in kept)
    number = _number_in_model(setup.trainable)
    if any(over_all_ranks(bool(lost))):
        return failed_at(name, lost, "trained, and save_checkpoint keeps adapters alone")
    if setup.optimizer is not None:
        OptimizerState(setup.optimizer, setup.chunks, sharded.adapter).to_save()
    state = "" if setup.optimizer is None else " and the optimizer's state"
    return Finding(name, "ok", f"{number} trained tensors{state}")


@world_at_hand()
def replicas_are_equal(setup: SetUp, when: str) -> Finding:
    """Prove that ranks which hold the same part of an adapter hold the same bits."""
    name = f"replicas {when}"
    digests = copy_digests(all_shards(sharded_model_of(setup.chunks).adapter))
    everyone = over_all_ranks(digests)
    if len(everyone) == 1:
        return Finding(name, "skipped", "there is one rank")
    differing = differing_copies(everyone)
    if differing:
        return failed_at(name, differing, "other bits on other ranks, expected equal copies")
    copies = sum(len(of_rank) for of_rank in everyone) - len(set().union(*everyone))
    if not copies:
        return Finding(name, "skipped", "no two ranks hold the same part")
    return Finding(name, "ok", f"{copies} copies on {len(everyone)} ranks are equal bit by bit")


def steps_move_everything(setup: SetUp) -> Finding:
    """Prove that two steps have finite gradients and change every tensor.

    Two, since A has no gradient in the first step of training, where B is zero.
    """
    name = "steps"
    if setup.optimizer is None:
        return Finding(name, "skipped", _NO_OPTIMIZER)
    if any(over_all_ranks(bool(differing(copies_of(setup.optimizer))))):
        return Finding(name, "skipped", "a step would undo what was written into parameters")
    copies = {id(copy.parameter): copy.main for copy in copies_of(setup.optimizer)}
    held = {path: [p, *([copies[id(p)]] if id(p) in copies else [])] for path, p in setup.trainable.items()}
    before = {path: [tensor.detach().clone() for tensor in tensors] for path, tensors in held.items()}
    reached: set[str] = set()
    for number in (1, 2):
        gradients = setup.training_pass().gradients
        reached.update(path for path, gradient in gradients.items() if gradient is not None and gradient.any())
        wrong = not_finite(gradients)
        if any(over_all_ranks(bool(wrong))):
            return failed_at(name, wrong, f"a gradient that is not finite, in step {number}")
        setup.step()
    moves = {
        path: max(float((now.detach() - then).abs().max()) for now, then in zip(tensors, before[path], strict=True))
        for path, tensors in held.items()
    }
    wrong = [path for path, move in moves.items() if not math.isfinite(move)]
    if any(over_all_ranks(bool(wrong))):
        return failed_at(name, wrong, "values that are not finite after two steps")
    # On each rank a distributed optimizer has a part of the copies.
    everywhere: dict[str, float] = {}
    for of_rank in over_all_ranks(moves):
        for path, move in of_rank.items():
            everywhere[path] = max(move, everywhere.get(path, 0.0))
    unmoved = [path for path, move in everywhere.items() if move == 0.0]
    still = without_idle_experts(unmoved, reached)
    if still:
        dtype = str(setup.trainable[still[0]].dtype).removeprefix("torch.") if still[0] in setup.trainable else "it"
        return failed_at(name, still, f"the old value after two steps ({dtype})")
    least = min(everywhere.keys() - set(unmoved), key=lambda path: everywhere[path], default="")
    idle = f"; {len(unmoved)} of experts without a token stay" if unmoved else ""
    return Finding(name, "ok", f"every tensor moves; least {everywhere.get(least, 0.0):.1e} ({least}){idle}")


def _all_parameters(setup: SetUp) -> dict[str, nn.Parameter]:
    named = {path: parameter for chunk in setup.chunks for path, parameter in chunk.named_parameters()}
    # Adapters' parameters come by their paths in the whole model.
    return {**named, **setup.trainable}


def _number_in_model(parameters: Iterable[str]) -> int:
    """Count the distinct names over all ranks; every rank calls it."""
    return len(set().union(*over_all_ranks(list(parameters))))
