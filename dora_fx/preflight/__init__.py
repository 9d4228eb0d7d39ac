"""The preflight: proofs, on a user's own set-up, that what should train trains and would be kept."""

from dora_fx.preflight.check_report import CheckError, CheckReport, Finding
from dora_fx.preflight.checking import check

__all__ = [
    "CheckError",
    "CheckReport",
    "Finding",
    "check",
]
