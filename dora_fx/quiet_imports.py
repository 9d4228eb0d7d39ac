"""What libraries say when they are imported about other packages and hardware that this package does without."""

from __future__ import annotations

import logging
import warnings

_NO_CUDA = "No CUDA runtime is found"


def hide_what_is_not_missed() -> None:
    """Hide warnings that a library was imported without an optional package or a GPU.

    Megatron-Core names Transformer Engine, Apex and others, and torch's extension builder a CUDA toolkit without a
    GPU. Neither is imported here. The filter of warnings is the last of all, so that those of a user, `-W` among
    them, come before it; nothing that is said later is hidden.
    """
    # Each of these messages is of its own kind; what Megatron warns of at run time does not read like them.
    warnings.filterwarnings(
        "ignore", r".* (is|are) not installed\b", category=UserWarning, module=r"megatron\.", append=True
    )
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_no_lack_of_cuda)


def _is_no_lack_of_cuda(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_NO_CUDA)
