"""The benchmark of collectives counts none of tokens x features for this library, and some for the reference."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_collectives.py"


@pytest.mark.slow
def test_what_each_variant_adds(tmp_path):
    sizes = ["--hidden=64", "--ffn=96", "--dim=8", "--tokens=28", "--inner-compiler=aot_eager"]
    command = [sys.executable, str(SCRIPT), *sizes, f"--json={tmp_path / 'counts.json'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "counts.json").read_text())["collectives"]
    assert not [row for row in rows if row["size"].endswith("bytes")]

    def activations(variant: str) -> list[tuple]:
        keys = ("layout", "dropout", "direction", "kind", "size", "count")
        chosen = [row for row in rows if row["variant"] == variant and row["size"].startswith("T")]
        return [tuple(row[key] for key in keys) for row in chosen]

    assert len(activations("base")) == 12
    own_tokens = [
        ("column + SP", dropout, direction, kind, "T*r", 1)
        for dropout in (0.0, 0.1)
        for direction, kind in (("forward", "all_gather"), ("backward", "reduce_scatter"))
    ]
    for variant in ("dora_fx", "dora_fx eager", "dora_fx, once"):
        assert sorted(activations(variant)) == sorted(activations("base") + own_tokens)

    def of_weights(variant: str) -> list[tuple]:
        chosen = [row for row in rows if row["variant"] == variant and not row["size"].startswith("T")]
        return sorted((row["layout"], row["dropout"], row["kind"], row["size"], row["count"]) for row in chosen)

    # The same messages, and all of them once per step.
    assert of_weights("dora_fx, once") == of_weights("dora_fx")
    once = [row for row in rows if row["variant"] == "dora_fx, once" and not row["size"].startswith("T")]
    assert once and all(row["direction"] == "once_per_step" for row in once)
    if importlib.util.find_spec("megatron.bridge") is not None:
        assert ("row", 0.0, "forward", "all_gather", "T*out", 1) in activations("Megatron-Bridge")
        assert ("column + SP", 0.1, "backward", "reduce_scatter", "T*in", 3) in activations("Megatron-Bridge")
