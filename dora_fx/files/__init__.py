"""Reads untrusted files and writes files that survive a crash.

Unpickling can run any code, so a pickle in a file is checked against a short list of classes before a library opens it.
The counts and sizes in a header are compared with the size of the file before memory is allocated for them. Within
`reading`, an error of a third-party reader becomes one error that names the file and a cure.
"""

from dora_fx.files.bounds import bounded
from dora_fx.files.dcp_metadata import StoredPiece, read_dcp_metadata
from dora_fx.files.durable import give_default_mode, sync
from dora_fx.files.gguf_header import check_gguf_file
from dora_fx.files.json_file import parse_json, read_json
from dora_fx.files.message_text import listed, reason_of, shortened
from dora_fx.files.model_sizes import check_elements, check_sizes
from dora_fx.files.parquet_pages import check_parquet_size
from dora_fx.files.regular_file import (
    UnsafeFileError,
    check_no_special_files,
    named_beside,
    open_regular,
    read_regular,
    size_of,
)
from dora_fx.files.third_party import (
    ExplainedError,
    UnreadableFileError,
    check_no_pointer,
    check_readable,
    is_out_of_memory,
    read_json_object,
    reading,
    writing,
)
from dora_fx.files.torch_file import check_torch_file, load_torch_bytes
from dora_fx.files.whole_folder import check_new_folder, new_folder

__all__ = [
    "ExplainedError",
    "StoredPiece",
    "UnreadableFileError",
    "UnsafeFileError",
    "bounded",
    "check_elements",
    "check_gguf_file",
    "check_new_folder",
    "check_no_pointer",
    "check_no_special_files",
    "check_parquet_size",
    "check_readable",
    "check_sizes",
    "check_torch_file",
    "give_default_mode",
    "is_out_of_memory",
    "listed",
    "load_torch_bytes",
    "named_beside",
    "new_folder",
    "open_regular",
    "parse_json",
    "read_dcp_metadata",
    "read_json",
    "read_json_object",
    "read_regular",
    "reading",
    "reason_of",
    "shortened",
    "size_of",
    "sync",
    "writing",
]
