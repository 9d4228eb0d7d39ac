"""`dora_fx.check`: a preflight that proves on a user's own set-up that adapters train and are saved."""

from dora_fx.preflight.check_report import CheckError, CheckReport, Finding
from dora_fx.preflight.training_check import check

__all__ = [
    "CheckError",
    "CheckReport",
    "Finding",
    "check",
]
