"""FX passes over Dynamo graphs. Reading `default_passes` is reading the compiler."""

from __future__ import annotations

if __name__ != "dora_fx.passes":
    raise ImportError(f"import this package as dora_fx.passes, not as {__name__}")

from dora_fx.passes.pipeline import GraphPass
from dora_fx.passes.rewrite_dora_pass import rewrite_dora_pass


def default_passes() -> list[GraphPass]:
    """The passes that `backend="dora_fx"` runs, in order."""
    return [rewrite_dora_pass]


__all__ = ["default_passes"]
