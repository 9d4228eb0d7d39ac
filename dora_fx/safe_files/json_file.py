"""JSON whose size and depth somebody else chose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dora_fx.safe_files.regular_file import UnsafeFileError, read_regular

# Far above what any file of a checkpoint, an adapter or a model has.
_MOST_BYTES = 64 << 20


def read_json(path: Path, *, follow_link: bool = False) -> Any:
    """Parse a JSON file.

    Raises:
        UnsafeFileError: it is no regular file, is too large, or is nested too deeply to be parsed.
        ValueError: it is no JSON.
        OSError: it is not there or cannot be read.
    """
    data = read_regular(path, at_most=_MOST_BYTES, follow_link=follow_link)
    try:
        return json.loads(data)
    except RecursionError:
        raise UnsafeFileError(f"{path}: found values nested too deeply, expected a plain JSON file") from None
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
