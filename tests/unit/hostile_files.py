"""Files that do harm to whoever opens them: each leaves a marker, or takes memory or time without end."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import resource
import signal
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import Metadata

from tests.processes import start_process

MANIFEST, METADATA, COMMON, DATA = "dora_fx.json", ".metadata", "common.pt", "__0_0.distcp"
_NO_MEMORY = 9
# The processor's time is over; the stack is, in C; an integer is divided by zero, in C++; memory is over, in Rust.
_KILLED_BY = (-signal.SIGXCPU, -signal.SIGSEGV, -signal.SIGFPE, -signal.SIGABRT)


class Payload:
    """Makes a folder when it is unpickled, by a function that any pickle may name."""

    def __init__(self, marker: Path) -> None:
        self._marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._marker,)


def ran(marker: Path, call: Callable[[], object]) -> bool:
    """Make a call; true if it runs the payload, whatever becomes of it."""
    with contextlib.suppress(BaseException):
        call()
    if marker.exists():
        marker.rmdir()
        return True
    return False


def archive_with(pickled: bytes, **records: bytes) -> bytes:
    """The archive that `torch.save` would have written: a pickle, and records by their names below `data/`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for name, record in records.items():
            archive.writestr(f"archive/data/{name}", record)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def compressed(archive: bytes) -> bytes:
    """The same archive, its records compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    return buffer.getvalue()


def metadata_of(checkpoint: Path) -> Metadata:
    return pickle.loads((checkpoint / METADATA).read_bytes())


def write_metadata(checkpoint: Path, metadata: Any) -> None:
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))


def edit_manifest(checkpoint: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and its checksum with it, as whoever plants a file would."""
    path = checkpoint / MANIFEST
    content = json.loads(path.read_text())
    content.pop("checksum", None)
    edit(content)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps(content | {"checksum": hashlib.sha256(text.encode()).hexdigest()}))


def recompute_checksums(checkpoint: Path) -> None:
    """Make the manifest say of every file what is there."""

    def edit(content: dict[str, Any]) -> None:
        for name, described in content["files"].items():
            if (checkpoint / name).is_file():
                data = (checkpoint / name).read_bytes()
                described |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    edit_manifest(checkpoint, edit)


def is_endless(code: str, *arguments: object, seconds: int = 2, mebibytes: int = 1024, patience: int = 100) -> bool:
    """Run Python code in a process of its own; true if it ends that, or needs more processor, memory or patience.

    Args:
        code: imports, a line `pass`, and what is tried; limits count from the `pass`.
        arguments: `sys.argv[1:]` of the process.
    """
    process = start_process(_try_within_limits, code, list(map(str, arguments)), seconds, mebibytes)
    process.join(patience)
    if process.exitcode is None:
        process.kill()
        process.join()
        return True
    assert process.exitcode in (0, _NO_MEMORY, *_KILLED_BY)
    return process.exitcode != 0


def _try_within_limits(code: str, arguments: list[str], seconds: int, mebibytes: int) -> None:
    """End this process with an exit code that tells whether the code ran out of memory."""
    imports, tried = code.split("\npass\n")
    sys.argv[1:] = arguments
    names: dict[str, Any] = {}
    exec(imports, names)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (mebibytes << 20),) * 2)
    now = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (now + seconds, now + seconds + 1))
    try:
        exec(tried, names)
    except BaseException as error:
        os._exit(_NO_MEMORY if "memory" in repr(error).lower() else 0)
