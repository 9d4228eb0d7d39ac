"""The optimizers in a chain of Megatron's, and a saved chain's state in another chain.

Megatron chains an optimizer of experts to that of the dense layers where other ranks reduce their gradients, which
depends on the layout. So hyper-parameters of a chain are loaded into another chain by parameter group.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from megatron.core.optimizer.optimizer import param_group_identifier_keys

from dora_fx.checkpoint.rank_steps import CheckpointError

_OF_EXPERTS = "is_expert_parallel"
_HYPER_PARAMETERS = tuple(key for key in param_group_identifier_keys if key != _OF_EXPERTS)


def single_optimizers(optimizer: Any) -> list[Any]:
    """Return the optimizers of a chain that have something to train on some rank, or the one that is no chain."""
    singles = getattr(optimizer, "chained_optimizers", [optimizer])
    return [single for single in singles if single.optimizer is not None] or singles


def single_states(optimizer: Any, state: dict[Any, Any]) -> list[dict[str, Any]]:
    """Return the states of the chained optimizers within the state of the chain."""
    number = len(single_optimizers(optimizer))
    return [state] if number == 1 else [state[index] for index in range(number)]


def of_torch(single_state: dict[str, Any]) -> dict[str, Any]:
    """Return torch's part of the state: parameter groups and the state of parameters."""
    torchs: dict[str, Any] = single_state.get("optimizer", single_state)
    return torchs


def fit_to_chain(optimizer: Any, state: dict[Any, Any]) -> dict[Any, Any]:
    """Return the part of a saved state that is not sharded, in the chain of optimizers and groups of another one.

    Raises:
        CheckpointError: a parameter group has hyper-parameters that no saved group was trained by.
    """
    saved = [state[index] for index in sorted(key for key in state if isinstance(key, int))] or [state]
    singles = single_optimizers(optimizer)
    found = [of_torch(part).get("param_groups", []) for part in saved]
    if [_identities(groups) for groups in found] == [_identities(_groups(single)) for single in singles]:
        return state
    parts = [_fitted(single, saved[min(index, len(saved) - 1)], saved) for index, single in enumerate(singles)]
    return parts[0] if len(parts) == 1 else dict(enumerate(parts))


def _fitted(single: Any, at_its_place: dict[str, Any], saved: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a state for one optimizer of a chain, with the saved groups that have its groups' hyper-parameters.

    All else that is not sharded, such as the count of steps, is that of a part with such a group: those of a chain step
    together.
    """
    found = [(group, part) for part in saved for group in of_torch(part).get("param_groups", [])]
    groups, source = [], at_its_place
    for own in _groups(single):
        alike = [(group, part) for group, part in found if _hyper_parameters(group) == _hyper_parameters(own)]
        if not alike:
            raise CheckpointError(
                f"found no parameter group with {_hyper_parameters(own)} in the saved state, expected the groups that "
                "the optimizer given has"
            )
        group, source = next((pair for pair in alike if _is_of_experts(pair[0]) == _is_of_experts(own)), alike[0])
        groups.append({**group, _OF_EXPERTS: _is_of_experts(own)})
    # Megatron merges what is sharded into it in place, and two optimizers may be fitted from one.
    fitted = copy.deepcopy(source)
    of_torch(fitted)["param_groups"] = groups
    return fitted


def _groups(single: Any) -> list[dict[str, Any]]:
    return [] if single.optimizer is None else list(single.optimizer.param_groups)


def _identities(groups: Iterable[dict[str, Any]]) -> list[Any]:
    """Return what Megatron tells parameter groups apart by: whether they are experts', and hyper-parameters."""
    return [(_is_of_experts(group), _hyper_parameters(group)) for group in groups]


def _is_of_experts(group: dict[str, Any]) -> bool:
    return bool(group.get(_OF_EXPERTS, False))


def _hyper_parameters(group: dict[str, Any]) -> dict[str, Any]:
    # NeMo puts `pre_` in front of some names, and Megatron takes both.
    return {key: group.get(key, group.get(f"pre_{key}")) for key in _HYPER_PARAMETERS}
