"""Check and measure everything that only a GPU can show, in the few minutes for which one can be had.

One command writes one JSON: the machine, and the result of each step or the reason why there is none. Each step is a
process with a limit of time, so that one that fails, hangs or takes the device's memory loses nothing of the others.
Steps that are not timed run first, several at once, and with them all others once, for the compiler's caches; then the
timed ones run alone, one after the other. What is not done when the time is up is skipped.

Nothing is installed: torch with Triton and this checkout are enough, with wheels of a few more packages that are
downloaded where there is a network.

    python benchmarks/on_gpu.py --prepare wheels
    python benchmarks/on_gpu.py --wheels wheels --json on_gpu.json
    python benchmarks/on_gpu.py --device cpu --quick --json quick.json
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from carried_wheels import download, unpack
from gpu_settings import Settings

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Step:
    """What is run in a process of its own.

    Attributes:
        function: its module and its name; it returns what goes into the JSON.
        arguments: of the function, after the settings.
        limit_s: for the process, imports and compilation included.
        is_timed: it measures times, so nothing may run beside it.
    """

    function: str
    arguments: tuple[Any, ...] = ()
    limit_s: int = 120
    is_timed: bool = True


# In the order of what is missed most where the time is too short.
STEPS = {
    "machine": Step("gpu_checks.machine", limit_s=60, is_timed=False),
    "correctness fp32": Step("gpu_checks.correctness", ("fp32", 0.0), is_timed=False),
    "correctness bf16": Step("gpu_checks.correctness", ("bf16", 0.0), is_timed=False),
    "correctness fp32 dropout": Step("gpu_checks.correctness", ("fp32", 0.25), is_timed=False),
    "correctness of a layer": Step("gpu_checks.correctness_of_layer", is_timed=False),
    "training": Step("gpu_checks.training", is_timed=False),
    "layer 4096": Step("gpu_measurements.layer", (1,)),
    "layer 512": Step("gpu_measurements.layer", (0,)),
    "norms": Step("gpu_measurements.norms", limit_s=60),
    "kernels": Step("gpu_measurements.kernels"),
    "layer 8192": Step("gpu_measurements.layer", (2,)),
    "looks": Step("gpu_measurements.looks", limit_s=90),
    "CUDA graphs": Step("gpu_measurements.cuda_graphs"),
}


class Runner:
    """Runs steps as processes and keeps a file with what they have found so far.

    Args:
        options: of the command.
        steps: by name; the first says what the machine is.
        scratch: a folder for what the processes write.
        packages: a folder of packages for them.
    """

    def __init__(
        self, options: argparse.Namespace, steps: Mapping[str, Step], scratch: Path, packages: Path | None = None
    ) -> None:
        self.options, self.steps, self.scratch, self.packages = options, steps, scratch, packages
        self.first = next(iter(steps))
        self.deadline = time.monotonic() + 60.0 * options.minutes
        self.found: dict[str, dict[str, Any]] = {}
        self._saving = threading.Lock()

    def run(self, name: str, *, warm_up: bool = False) -> None:
        """Run a step, or only what it compiles, and enter how it ended."""
        limit = min(self.steps[name].limit_s * self.options.patience, self.deadline - time.monotonic())
        if limit < 1.0:
            entry: dict[str, Any] = {"status": "skipped", "reason": f"the {self.options.minutes:g} minutes are over"}
        else:
            entry = self._run_process(name, limit, warm_up)
        if not warm_up:
            self.found[name] = entry
            self.save()
            print(f"{name}: {entry['status']} {entry.get('reason', '')}".rstrip(), flush=True)

    def skip(self, names: Sequence[str], reason: str) -> None:
        """Enter steps that are not run."""
        self.found |= {name: {"status": "skipped", "reason": reason} for name in names}
        self.save()

    def _run_process(self, name: str, limit: float, warm_up: bool) -> dict[str, Any]:
        stem = self.scratch / f"{name}{' warm-up' if warm_up else ''}"
        result, output = stem.with_suffix(".json"), stem.with_suffix(".txt")
        step, options = self.steps[name], self.options
        command = [sys.executable, __file__, "--call", step.function, "--arguments", json.dumps(step.arguments)]
        command += ["--json", str(result), "--device", options.device]
        command += ["--quick"] * options.quick + ["--warm-up"] * warm_up
        command += ["--packages", str(self.packages)] if self.packages else []
        began = time.monotonic()
        with output.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        seconds = {"seconds": round(time.monotonic() - began, 1)}
        if code is None:
            return {"status": "failed", "reason": f"it took more than {limit:.0f} s", **seconds}
        if not result.exists():
            lines = output.read_text(errors="replace").strip().splitlines()
            return {"status": "failed", "reason": f"exit status {code}: {' | '.join(lines[-3:])}", **seconds}
        return json.loads(result.read_text()) | seconds

    def save(self) -> None:
        """Write what is known so far."""
        options = self.options
        with self._saving:
            found = {name: self.found[name] for name in self.steps if name in self.found}
            everything = {
                "written": datetime.now(UTC).isoformat(timespec="seconds"),
                "settings": {"device": options.device, "quick": options.quick, "minutes": options.minutes},
                "machine": found.get(self.first, {}).get("result"),
                "steps": found,
            }
            write(options.json, everything)

    def show(self) -> None:
        """Print what the steps printed, and a line for each."""
        for name, entry in self.found.items():
            if shown := entry.get("result", {}).get("shown"):
                print(f"\n== {name}\n{shown}")
        width = max(map(len, self.found))
        print(f"\n{'':{width}} {'seconds':>8}")
        for name, entry in self.found.items():
            print(f"{name:{width}} {entry.get('seconds', 0.0):8.1f} {entry['status']} {entry.get('reason', '')}")


def write(path: Path, value: Any) -> None:
    """Write JSON and replace the file at once, so that there is a whole one whenever this process is ended."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


@contextmanager
def unpacked(wheels: Path | None, scratch: Path) -> Iterator[Path | None]:
    """A folder with the packages of the wheels; None if there are no wheels."""
    if wheels is None:
        yield None
        return
    unpack(wheels, scratch / "packages")
    yield scratch / "packages"


def run_steps(runner: Runner, names: Sequence[str], jobs: int) -> None:
    """Run the first step, then those of `names` that are not timed, `jobs` at once, then those that are."""
    first, others = runner.first, [name for name in names if name != runner.first]
    timed = [name for name in others if runner.steps[name].is_timed]
    runner.run(first)
    if runner.found[first]["status"] != "done":
        runner.skip(others, f"the step {first!r} failed")
        return
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(runner.run, name) for name in others if name not in timed]
        if jobs > 1:
            # For the compiler's caches, since then it compiles for several at once.
            waiting += [pool.submit(runner.run, name, warm_up=True) for name in timed]
        for future in waiting:
            future.result()
    for name in timed:
        runner.run(name)


def run_one(options: argparse.Namespace) -> None:
    """In the process of a step: call its function, and write what it returns or raises."""
    sys.path[:0] = [str(ROOT)]
    if options.packages is not None:
        # At the end: what the machine has goes first.
        sys.path.append(str(options.packages))
    module, _, function = options.call.partition(".")
    try:
        settings = Settings.quick(options.device) if options.quick else Settings(options.device)
        settings = replace(settings, warm_up=options.warm_up)
        result = getattr(import_module(module), function)(settings, *json.loads(options.arguments))
        entry = {"status": "done", "result": result}
        if not result.get("ok", True):
            entry |= {"status": "wrong", "reason": "the result is not what it should be"}
    except Exception as error:
        message = str(error).strip()
        entry = {"status": "failed", "reason": f"{type(error).__name__}: {message[:2000]}"}
    write(options.json, entry)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="download the wheels into it, and do no more")
    parser.add_argument("--python", default="3.12", help="version that the wheels are for; default %(default)s")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="the wheels, for packages that are not installed")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that every step runs")
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything; default %(default)s")
    parser.add_argument("--patience", type=float, default=1.0, help="factor of the limits of steps, on a slow machine")
    parser.add_argument("--jobs", type=int, help="processes at once for what is not timed; default 8 on CUDA, else 1")
    parser.add_argument("--json", type=Path, default=Path("on_gpu.json"), help="default %(default)s")
    for internal in ("--call", "--arguments", "--packages"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--warm-up", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    given = {name for name, value in vars(options).items() if value != parser.get_default(name)}
    if options.prepare is not None and (others := given - {"prepare", "python"}):
        parser.error(f"--prepare: downloads and does no more; found --{min(others)} beside it")
    if options.prepare is None and "python" in given:
        parser.error("--python: says for what --prepare downloads wheels; found no --prepare")
    if not options.json.resolve().parent.is_dir():
        parser.error(f"--json: found no folder {options.json.resolve().parent}, expected one that is there")
    if options.jobs is None:
        options.jobs = 8 if options.device == "cuda" else 1
    if options.jobs < 1 or options.minutes <= 0 or options.patience <= 0:
        parser.error("--jobs, --minutes and --patience: expected positive numbers")
    return options


def main() -> int:
    options = parse()
    if options.call is not None:
        run_one(options)
        return 0
    try:
        if options.prepare is not None:
            for wheel in download(options.prepare, options.python):
                print(f"{wheel.stat().st_size / 2**20:6.1f} MiB {wheel}")
            return 0
        with tempfile.TemporaryDirectory() as scratch, unpacked(options.wheels, Path(scratch)) as packages:
            runner = Runner(options, STEPS, Path(scratch), packages)
            run_steps(runner, options.only or list(STEPS), options.jobs)
            runner.show()
    except (ValueError, subprocess.CalledProcessError) as error:
        print(f"on_gpu: {error}", file=sys.stderr)
        return 2
    return 0 if all(entry["status"] == "done" for entry in runner.found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
