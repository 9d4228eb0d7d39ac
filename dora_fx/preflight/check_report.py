"""The report of a preflight: one line per property of a training set-up, with a figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Verdict = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """The result of one proof.

    Attributes:
        name: of the property, the same on every rank.
        verdict: "skipped" if this rank or this set-up cannot decide; `text` says why.
        text: the figures; for a failed property the place, what was found and what was expected.
    """

    name: str
    verdict: Verdict
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:8}{self.name:17}{self.text}"


@dataclass(frozen=True)
class CheckReport:
    """The results of `dora_fx.check`, in the order of the proofs.

    Attributes:
        findings: one per property, the same on every rank.
        loss: of the batch, averaged over data-parallel ranks, at adapter values that `check` derives from the layers'
            paths. It is the same at every parallel layout; pass it as `check(reference=...)` at another one.
        seconds: duration of the check.
    """

    findings: tuple[Finding, ...]
    loss: float
    seconds: float

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The findings of properties that do not hold."""
        return tuple(finding for finding in self.findings if finding.verdict == "failed")

    def __str__(self) -> str:
        number = len(self.failed)
        outcome = f"{number} of {len(self.findings)} failed" if number else "nothing is wrong"
        lines = [str(finding) for finding in self.findings]
        return "\n".join([*lines, f"{outcome}; loss {self.loss:.6f}, {self.seconds:.1f} s"])


class CheckError(RuntimeError):
    """A training set-up does not train what it should.

    Attributes:
        report: all findings; None if the batch could not be run.
    """

    def __init__(self, message: str, report: CheckReport | None = None) -> None:
        super().__init__(message)
        self.report = report


def join_findings(of_ranks: Sequence[Sequence[Finding]]) -> tuple[Finding, ...]:
    """Join the findings of all ranks into one per property: a failed one first, then one that is not skipped."""
    return tuple(_worst(of_property) for of_property in zip(*of_ranks, strict=True))


def _worst(findings: Sequence[Finding]) -> Finding:
    for rank, finding in enumerate(findings):
        if finding.verdict == "failed":
            return replace(finding, text=f"{finding.text} (on rank {rank})") if len(findings) > 1 else finding
    return next((finding for finding in findings if finding.verdict == "ok"), findings[0])


def failed_at(name: str, paths: Iterable[str], found: str) -> Finding:
    """Make a failed finding that names the first path.

    Ranks leave a proof together when it fails on one of them; on a rank without such a path the finding is "skipped".
    """
    paths = list(paths)
    if not paths:
        return Finding(name, "skipped", "it failed on another rank")
    first, *others = paths
    rest = f", and {len(others)} more like it" if others else ""
    return Finding(name, "failed", f"{first}: found {found}{rest}")
