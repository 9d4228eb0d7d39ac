"""The preflight: proofs, on a user's own set-up, that what should train trains and would be kept."""

from dora_fx.preflight.check import check
from dora_fx.preflight.report import CheckError, CheckReport, Finding

__all__ = ["CheckError", "CheckReport", "Finding", "check"]
