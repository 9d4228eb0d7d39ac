"""Two nodes on one machine: a process that sees a folder of its own under a path where others see another."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import start_process

_CLONE_NEWNS = 0x20000


def mount_own_disk(folder: Path) -> None:
    """Give this process, and what it starts, an empty disk at a folder; raises OSError where that is not permitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    # Without the first, the others would see the mount too.
    for command in (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "tmpfs", str(folder)]):
        if subprocess.run(command, capture_output=True).returncode != 0:
            raise OSError(f"{' '.join(command)} is not permitted")


def _try_to_mount(folder: Path) -> None:
    try:
        mount_own_disk(folder)
    except OSError:
        sys.exit(1)


def skip_without_own_disks(folder: Path) -> None:
    """Skip a test where mounting is not permitted."""
    process = start_process(_try_to_mount, folder)
    process.join()
    if process.exitcode != 0:
        pytest.skip("unshare and mount are not permitted here")
