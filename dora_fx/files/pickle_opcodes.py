"""The opcodes of a pickle, looked at without running it."""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from typing import Any

from dora_fx.files.regular_file import UnsafeFileError

_MEMO_WRITES = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})


def opcodes(data: bytes, where: str) -> Iterator[tuple[str, Any]]:
    """Yield the name and the argument of every opcode.

    The pickle machine keeps its memo in an array, so that one opcode that writes to a place of four bytes makes room
    for 32 GiB; whoever writes pickles counts those places up from zero.

    Raises:
        UnsafeFileError: it is no pickle, is cut short, or writes to a place of the memo that it has not come to.
    """
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name in _MEMO_WRITES and (argument is None or int(argument) > count):
                raise UnsafeFileError(f"{where}: found a pickle that writes to place {argument} of its memo")
            yield opcode.name, argument
    except UnsafeFileError:
        raise
    # pickletools raises whatever its parsers of arguments do.
    except Exception as error:
        raise UnsafeFileError(f"{where}: found no whole pickle ({error})") from error
