"""Reads untrusted JSON with limits of size and depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dora_fx.files.message_text import reason_of
from dora_fx.files.regular_file import UnsafeFileError, read_regular

# Far above what any file of a checkpoint, an adapter or a model has.
_MOST_BYTES = 64 << 20


def read_json(path: Path, *, follow_link: bool = False) -> Any:
    """Parse a JSON file.

    Raises:
        UnsafeFileError: the file is not regular, is too large, or `parse_json` refuses its content.
        OSError: the file is missing or cannot be read.
    """
    return parse_json(read_regular(path, at_most=_MOST_BYTES, follow_link=follow_link), str(path))


def parse_json(data: bytes | str, where: str) -> Any:
    """Parse JSON.

    Args:
        data: the text.
        where: name of the file, for messages.

    Raises:
        UnsafeFileError: the text is not JSON, or is nested too deeply to be parsed.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise UnsafeFileError(f"{where}: cannot be read (values nested too deeply)") from None
    except ValueError as error:
        raise UnsafeFileError(f"{where}: cannot be read ({reason_of(error)})") from error
