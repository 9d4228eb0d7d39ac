"""JSON whose size and depth somebody else chose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dora_fx.files.regular_file import UnsafeFileError, read_regular, reason_of

# Far above what any file of a checkpoint, an adapter or a model has.
_MOST_BYTES = 64 << 20


def read_json(path: Path, *, follow_link: bool = False) -> Any:
    """Parse a JSON file.

    Raises:
        UnsafeFileError: it is no regular file, is too large, or as `parse_json`.
        OSError: it is not there or cannot be read.
    """
    return parse_json(read_regular(path, at_most=_MOST_BYTES, follow_link=follow_link), str(path))


def parse_json(data: bytes | str, where: str) -> Any:
    """Parse JSON.

    Args:
        data: the text.
        where: it comes from, for messages.

    Raises:
        UnsafeFileError: it is no JSON, or is nested too deeply to be parsed.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise UnsafeFileError(f"{where}: cannot be read (values nested too deeply)") from None
    except ValueError as error:
        raise UnsafeFileError(f"{where}: cannot be read ({reason_of(error)})") from error
