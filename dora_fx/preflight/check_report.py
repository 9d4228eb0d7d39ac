"""The report of a preflight: one line per property of a training set-up, with a figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Verdict = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """What is known of one property.

    Attributes:
        name: of the property, the same on every rank.
        verdict: "skipped" where this rank or this set-up cannot tell; `text` says why.
        text: the figures. Of a property that failed: where, what was found and what was expected.
    """

    name: str
    verdict: Verdict
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:8}{self.name:17}{self.text}"


@dataclass(frozen=True)
class CheckReport:
    """The findings of `dora_fx.check`, in the order in which they were made.

    Attributes:
        findings: one per property, the same on every rank.
        loss: of the batch, averaged over data-parallel ranks, at adapter values that `check` chooses by the paths of
            the layers. It is the same at every parallel layout, and so what `check(reference=...)` takes at another.
        seconds: that the check took.
    """

    findings: tuple[Finding, ...]
    loss: float
    seconds: float

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The findings that something is wrong."""
        return tuple(finding for finding in self.findings if finding.verdict == "failed")

    def __str__(self) -> str:
        number = len(self.failed)
        outcome = f"{number} of {len(self.findings)} failed" if number else "nothing is wrong"
        lines = [str(finding) for finding in self.findings]
        return "\n".join([*lines, f"{outcome}; loss {self.loss:.6f}, {self.seconds:.1f} s"])


class CheckError(RuntimeError):
    """A training set-up would not train what it should.

    Attributes:
        report: all findings; None where the batch could not be run.
    """

    def __init__(self, message: str, report: CheckReport | None = None) -> None:
        super().__init__(message)
        self.report = report


def joined(of_ranks: Sequence[Sequence[Finding]]) -> tuple[Finding, ...]:
    """One list of findings out of those of all ranks: of each property what failed first, else what is known."""
    return tuple(_worst(of_property) for of_property in zip(*of_ranks, strict=True))


def _worst(findings: Sequence[Finding]) -> Finding:
    for rank, finding in enumerate(findings):
        if finding.verdict == "failed":
            return replace(finding, text=f"{finding.text} (on rank {rank})") if len(findings) > 1 else finding
    return next((finding for finding in findings if finding.verdict == "ok"), findings[0])


def failed_at(name: str, paths: Iterable[str], found: str) -> Finding:
    """What failed at some paths; of a rank that has none of them, as all ranks leave a proof together."""
    paths = list(paths)
    if not paths:
        return Finding(name, "skipped", "it failed on another rank")
    first, *others = paths
    rest = f", and so {len(others)} more" if others else ""
    return Finding(name, "failed", f"{first}: found {found}{rest}")
