"""Formats untrusted values, errors and lists of names for one-line messages, with limits of length."""

from __future__ import annotations

from collections.abc import Collection

_MOST_SHOWN, _LONGEST_REASON, _MOST_LISTED = 80, 300, 5


def shortened(value: object) -> str:
    """Format an untrusted value for a message; long texts are cut, and containers are shown by their type alone."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _MOST_SHOWN else f"{value[:_MOST_SHOWN]!r}..."
    is_short = value is None or isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 64)
    return repr(value) if is_short else f"a value of type {type(value).__name__}"


def reason_of(error: BaseException) -> str:
    """Format an error for a message: class and first line, cut in length; for an OSError the system's text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    line = text.splitlines()[0] if text else ""
    kind = type(error).__name__
    return f"{kind}: {line[:_LONGEST_REASON]}" if line else kind


def listed(names: Collection[str]) -> str:
    """Format the first names in alphabetical order, and how many more there are; "none" if there are none."""
    more = len(names) - _MOST_LISTED
    return (", ".join(sorted(names)[:_MOST_LISTED]) or "none") + (f" and {more} more" if more > 0 else "")
