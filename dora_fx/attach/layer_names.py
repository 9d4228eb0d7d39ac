"""Name the layers of a model that another library, or another kind of model, calls otherwise.

Megatron has one layer where transformers models have several, or the other way round, so names are compared by the
projections that the layers hold.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from torch import nn

from dora_fx.attach.routers import modules_of_routers
from dora_fx.megatron import walk
from dora_fx.modules import DoRALinear, looks_like_linear

# Names of layers -> the projections that they hold.
_PROJECTIONS: dict[str, frozenset[str]] = {
    name: frozenset(projections.split())
    for projections, names in {
        "query": "q_proj query to_q wq q_lin linear_q_proj",
        "key": "k_proj key to_k wk k_lin",
        "value": "v_proj value to_v wv v_lin",
        "query key value": "linear_qkv qkv_proj c_attn query_key_value Wqkv W_pack wqkv qkv attn_qkv",
        "query_down": "q_a_proj linear_q_down_proj",
        "query_up": "q_b_proj linear_q_up_proj",
        "key_value_down": "kv_a_proj_with_mqa linear_kv_down_proj",
        "key_value_up": "kv_b_proj linear_kv_up_proj",
        "attention_out": "linear_proj o_proj out_proj wo out_lin",
        "gate": "gate_proj w1",
        "up": "up_proj w3 c_fc dense_h_to_4h lin1",
        "gate up": "linear_fc1 gate_up_proj fc1 wi",
        "down": "linear_fc2 down_proj fc2 w2 dense_4h_to_h lin2",
        # GPT-2 gives one name to two layers.
        "attention_out down": "c_proj",
        "logits": "output_layer lm_head embed_out",
    }.items()
    for name in names.split()
}


# None of these is in the name of a module.
_OF_REGULAR_EXPRESSIONS = re.compile(r"[\\^$|()+?\[\]{}]")


def hint(chunks: Sequence[nn.Module], patterns: Sequence[str]) -> str:
    """Return the end of a message about patterns that match nothing: which layers they seem to mean.

    Those are the layers that hold the same projections, or else the ones that are spelled most like the first pattern.
    """
    nearest = f"the nearest linear layers are {_nearest(_names_of_linears(chunks), patterns[0] if patterns else '')}"
    if any(_OF_REGULAR_EXPRESSIONS.search(pattern) for pattern in patterns):
        return f"patterns have `*` for any text, and are no regular expressions; {nearest}"
    return called_here_maybe(chunks, patterns) or nearest


def called_here_maybe(chunks: Sequence[nn.Module], patterns: Sequence[str]) -> str | None:
    """Return what this model calls the layers that patterns seem to mean; None if that is not known of any."""
    names = _names_of_linears(chunks)
    known = [(pattern, here) for pattern in patterns if (here := _called_here(pattern, names))]
    called = ", ".join(f"{pattern!r} is called {' and '.join(here)}" for pattern, here in known)
    return f"in this model {called}" if called else None


def projections_of(name: str) -> frozenset[str]:
    """Return the projections that a layer of this name holds; none for a name that is not known."""
    return _PROJECTIONS.get(name, frozenset())


def _names_of_linears(chunks: Sequence[nn.Module]) -> list[str]:
    """Return the last names of the model's linear layers but routers', once each, in model order."""
    of_routers = {module for chunk in chunks for module in modules_of_routers(chunk)}
    everywhere = (named for chunk in chunks for named in walk(chunk, DoRALinear) if named.module not in of_routers)
    linears = [named for named in everywhere if looks_like_linear(named.module)]
    return list(dict.fromkeys(named.path.rpartition(".")[2] for named in linears))


def _called_here(pattern: str, names: Sequence[str]) -> list[str]:
    meant = projections_of(_last_name(pattern))
    return [name for name in names if name != _last_name(pattern) and meant & projections_of(name)]


def _last_name(pattern: str) -> str:
    return pattern.rpartition(".")[2].strip("*")


def _nearest(names: Sequence[str], pattern: str, count: int = 3) -> list[str]:
    close = difflib.get_close_matches(pattern.rpartition(".")[2], sorted(names), n=count, cutoff=0.0)
    return close or sorted(names)[:count]
