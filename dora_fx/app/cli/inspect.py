"""`dora-fx inspect`: shows what a checkpoint holds and whether it is damaged, without a model or other processes."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from dora_fx.app.errors import UserError
from dora_fx.app.runs import checkpoint_in
from dora_fx.checkpoint import (
    CheckedReader,
    CheckpointError,
    Manifest,
    check_file,
    check_stored,
    open_checkpoint,
    read_common,
)

DAMAGED_EXIT_CODE = 1

Rows = list[tuple[str, ...]]


def run(parsed: dict[str, Any]) -> int:
    """Print the checkpoint's tables, then its problems; return 1 if there are any.

    Raises:
        UserError: there is no checkpoint, or its manifest is damaged.
    """
    path = checkpoint_in(Path(os.path.abspath(parsed["checkpoint"])))
    try:
        directory, manifest = open_checkpoint(path)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    print(tables_of(manifest))
    problems = problems_of(directory, manifest)
    for problem in problems:
        print(f"dora-fx: {problem}", file=sys.stderr)
    if directory != path:
        print(f"\na save was interrupted; this is the checkpoint that it was replacing, in {directory}")
    print(f"\n{len(problems)} of {len(manifest.files)} files damaged" if problems else "\nall files are whole")
    return DAMAGED_EXIT_CODE if problems else 0


def problems_of(directory: Path, manifest: Manifest) -> list[str]:
    """Check the files; return a message for each that is missing, damaged or unsafe."""
    problems = []
    for name, expected in manifest.files.items():
        try:
            check_file(directory, name, expected)
        except CheckpointError as error:
            problems.append(str(error))
    # An attacker writes checksums as well, so the contents of whole files are checked too, as a load does.
    for check in (partial(check_stored, CheckedReader(directory), manifest.tensors), partial(read_common, directory)):
        try:
            if not problems:
                check()
        except (CheckpointError, ValueError, OSError) as error:
            problems.append(str(error))
    return problems


def tables_of(manifest: Manifest) -> str:
    """Format a checkpoint's tables: how it was written, sites, tensors and files."""
    layout = manifest.layout
    # Sizes for experts are not in checkpoints of earlier versions.
    has_own = layout.get("ep", 1) > 1 or layout.get("etp", layout["tp"]) != layout["tp"]
    names = ("tp", "pp", "vpp", "cp", "dp", *(("ep", "etp") if has_own else ()))
    sizes = ", ".join(f"{name} {layout[name]}" for name in names)
    sites: Rows = [("layer", "dim", "alpha", "scaling", "dropout")]
    sites += [
        (key, *(f"{getattr(site, name):g}" for name in sites[0][1:])) for key, site in sorted(manifest.sites.items())
    ]
    tensors: Rows = [("tensor", "shape", "dtype", "bytes")]
    tensors += [
        (key, "x".join(map(str, tensor.shape)), tensor.dtype, f"{tensor.num_bytes:,}")
        for key, tensor in manifest.tensors.items()
    ]
    files: Rows = [("file", "bytes")]
    files += [(name, f"{file.size:,}") for name, file in sorted(manifest.files.items())]
    whole, on_disk = sum(t.num_bytes for t in manifest.tensors.values()), sum(f.size for f in manifest.files.values())
    facts: Rows = [
        ("written by", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
        (
            "at layout",
            sizes + ", sequence parallel" * bool(layout["sequence_parallel"]) + ", HybridModel" * ("hybrid" in layout),
        ),
        ("keys", "with layer numbers" if manifest.non_homogeneous_layers else "without layer numbers, layers in front"),
        ("optimizer", "yes" if manifest.has_optimizer else "no"),
        ("extra", "yes" if manifest.has_extra else "no"),
        ("bytes", f"{whole:,} in tensors, {on_disk:,} in files"),
    ]
    return "\n\n".join(map(_table, (facts, sites, tensors, files)))


def _table(rows: Rows) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
