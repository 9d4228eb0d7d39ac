"""Text for training: read and checked before anything is loaded, then cut into sequences of tokens."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dora_fx.cli.errors import UserError
from dora_fx.files.json_file import parse_json
from dora_fx.files.regular_file import open_regular, reason_of
from dora_fx.models.reading import check_no_pointer

_UNPACK = "unpack it"
_NUL = (
    "found a NUL character, which no text has; the file is binary, or UTF-16 without its mark; convert it, for "
    "example with: iconv -f UTF-16LE -t UTF-8"
)
# First bytes, kind and cure; UTF-32's mark begins with UTF-16's.
_OTHER_KINDS = (
    (b"\xff\xfe\0\0", "UTF-32", "convert it, for example with: iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "UTF-16", "convert it, for example with: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16", "convert it, for example with: iconv -f UTF-16 -t UTF-8"),
    (b"\x1f\x8b", "a gzip file", _UNPACK),
    (b"PK\x03\x04", "a zip file", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd file", _UNPACK),
    (b"PAR1", "a Parquet file", "write its texts as .jsonl"),
)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def read_documents(path: Path) -> list[str]:
    """The documents of a .txt file (one) or a .jsonl file (one per line, field `text`).

    Raises:
        UserError: the file is missing, is neither kind, is not UTF-8, has no text, holds characters that no text has,
            or a line of it is malformed; the message has the line.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"--data {path}: found a {path.suffix or 'suffixless'} file, expected .txt or .jsonl")
    try:
        with open_regular(path, follow_link=True) as file:
            data = file.read()
        check_no_pointer(path, data)
    except ValueError as error:
        raise UserError(f"--data {error}") from error
    except OSError as error:
        raise UserError(f"--data {path}: {reason_of(error)}") from error
    text = _decoded(path, data)
    documents = [text] if path.suffix == ".txt" else list(_jsonl_texts(path, text))
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(f"--data {path}: the file has no text")
    return documents


def _decoded(path: Path, data: bytes) -> str:
    for start, kind, cure in _OTHER_KINDS:
        if data.startswith(start):
            raise UserError(f"--data {path}: found {kind}, expected text in UTF-8; {cure}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"--data {path}, line {line}: not UTF-8 at byte {error.start}; convert the file to UTF-8, "
            "for example with iconv"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"--data {path}, line {line}: {_NUL}")
    return text


def demo_documents() -> list[str]:
    """Python's language reference, one document per topic."""
    from pydoc_data.topics import topics

    return list(topics.values())


def _jsonl_texts(path: Path, text: str) -> Iterator[str]:
    # Not splitlines(), which also splits at separators that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"--data {path}, line {number}"
        try:
            record = parse_json(line, where)
        except ValueError as error:
            raise UserError(f"{error}; expected an object with a field text") from error
        document = record.get("text") if isinstance(record, dict) else None
        if not isinstance(document, str):
            raise UserError(f"{where}: expected an object with a field text that is a string")
        if "\0" in document:
            raise UserError(f"{where}: {_NUL}")
        if surrogate := _LONE_SURROGATE.search(document):
            raise UserError(
                f"{where}: found {ascii(surrogate[0])[1:-1]} by itself, half of a character; "
                "write both halves, or the character itself"
            )
        yield document


@dataclass(frozen=True)
class TokenBlocks:
    """Sequences `[n, sequence_length + 1]`: the inputs and, one token on, the targets.

    `num_tokens` is the length of the whole text; `fingerprint` identifies it.
    """

    train: Tensor
    held_out: Tensor
    num_tokens: int
    fingerprint: str


def cut_blocks(tokens: Tensor, sequence_length: int, held_out_fraction: float, max_held_out: int) -> TokenBlocks:
    """Cut a row of tokens into sequences and hold some out, evenly spread over the text.

    Raises:
        UserError: the text is too short for one sequence to train on and one to hold out.
    """
    num_blocks = (len(tokens) - 1) // sequence_length
    if num_blocks < 2:
        raise UserError(
            f"the text has {len(tokens)} tokens, expected at least {2 * sequence_length + 1}: "
            f"two sequences of {sequence_length}; give more text or a smaller --sequence-length"
        )
    blocks = tokens[: num_blocks * sequence_length + 1].unfold(0, sequence_length + 1, sequence_length)
    # The last token of a block is the first of the next as a target and as an input: no pair is seen twice.
    count = min(max(round(num_blocks * held_out_fraction), 1), num_blocks - 1)
    is_held_out = torch.zeros(num_blocks, dtype=torch.bool)
    is_held_out[torch.arange(count) * num_blocks // count + num_blocks // (2 * count)] = True
    held_out = blocks[is_held_out]
    if count > max_held_out:
        held_out = held_out[torch.arange(max_held_out) * count // max_held_out]
    fingerprint = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    return TokenBlocks(blocks[~is_held_out].contiguous(), held_out.contiguous(), len(tokens), fingerprint)


def training_batch(blocks: Tensor, batch_size: int, index: int, seed: int) -> Tensor:
    """Batch number `index` of an endless pass over the blocks, shuffled anew in every epoch.

    A function of its arguments alone, so a resumed run needs only its step to go on with the same sequences.
    """
    first = index * batch_size
    rows = []
    for position in range(first, first + batch_size):
        epoch, offset = divmod(position, len(blocks))
        rows.append(_epoch_order(len(blocks), seed, epoch)[offset])
    return blocks[torch.stack(rows)]


@functools.lru_cache(maxsize=2)
def _epoch_order(num_blocks: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_blocks, generator=generator)
