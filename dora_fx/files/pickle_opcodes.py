"""Parses the opcodes of a pickle without running it."""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from typing import Any

from dora_fx.files.regular_file import UnsafeFileError

_MEMO_WRITES = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})


def opcodes(data: bytes, where: str) -> Iterator[tuple[str, Any]]:
    """Yield the name and the argument of every opcode.

    An unpickler keeps its memo in an array, so one opcode that writes to a large index allocates up to 32 GiB. Picklers
    count the indices up from zero, and a larger index than that is refused.

    Raises:
        UnsafeFileError: the data is not a pickle, is truncated, or writes to an index beyond the next free one.
    """
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name in _MEMO_WRITES and (argument is None or int(argument) > count):
                raise UnsafeFileError(
                    f"{where}: found a pickle that writes to place {argument} of its memo, expected at most {count}"
                )
            yield opcode.name, argument
    except UnsafeFileError:
        raise
    # pickletools lets any error of its argument parsers pass.
    except Exception as error:
        raise UnsafeFileError(f"{where}: found no whole pickle ({error})") from error
