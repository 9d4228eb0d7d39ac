"""Named faults of the route of Transformer Engine's layers, as those of `mutations.py`."""

from __future__ import annotations

from dora_fx.function import formula, input_norm, placement, site_parameters
from dora_fx.modules.kinds import transformer_engine
from tests.distributed.mutations import Mutation

NORM = "x = normalise(x, input_norm)"

# What each token's norm gives is the same wherever the norm is: a graph shows it, no number does. The fault is that of
# the first rank.
NORM_AFTER_THE_GATHER = Mutation(
    "norm after the gather",
    formula.adapted_linear,
    NORM,
    "x = normalise(gather_sequence(x, tp_group), input_norm)[: x.shape[0]]",
)
# In 16 bits alone.
ROUNDINGS = [
    Mutation(
        "gamma + 1 in the parameter's dtype",
        input_norm._gain,
        "gain = weight.to(dtype)\n    return gain + 1.0 if zero_centered else gain",
        "gain = weight + 1.0 if zero_centered else weight\n    return gain.to(dtype)",
    ),
    Mutation(
        "norm computed in the input's dtype", input_norm._wide, "torch.promote_types(x.dtype, torch.float32)", "x.dtype"
    ),
]

TE_MUTATIONS = [
    Mutation("norm applied twice", formula.adapted_linear, NORM, "x = normalise(normalise(x, input_norm), input_norm)"),
    Mutation("norm forgotten", formula.adapted_linear, NORM, "pass"),
    Mutation("gamma + 1 forgotten", input_norm._gain, "gain + 1.0 if zero_centered else gain", "gain"),
    Mutation("empty bias added", transformer_engine._bias, "linear.bias if linear.use_bias else None", "linear.bias"),
    Mutation(
        "returned bias added too",
        transformer_engine._TELinear.added_bias,
        "None if linear.te_return_bias else _bias(linear)",
        "_bias(linear)",
    ),
    Mutation(
        "duplicated gradients not reduced",
        site_parameters._with_complete_gradients,
        "over_tokens = site.layout.shards_tokens",
        "over_tokens = False",
    ),
    Mutation(
        "duplicated magnitude's gradient not reduced",
        placement.Layout.magnitude_grad_is_partial,
        "self.shards_tokens or",
        "False or",
    ),
]
