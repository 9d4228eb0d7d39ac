"""The option `--quick` of benchmarks, which runs everything in tiny sizes; no number of such a run means anything."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any


def parse_with_quick(parser: argparse.ArgumentParser, quick: Mapping[str, Any]) -> argparse.Namespace:
    """Parse the command line of a benchmark.

    Args:
        parser: with the options of the benchmark, `--json` among them.
        quick: what `--quick` puts in place of options, which are refused beside it.
    """
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few rounds, to see that everything works")
    options = parser.parse_args()
    if not options.quick:
        return options
    if options.json:
        parser.error("--quick: found --json too, expected none, as no number of a quick run means anything")
    if given := [name for name in quick if getattr(options, name) != parser.get_default(name)]:
        parser.error(f"--quick: found --{given[0].replace('_', '-')} too, expected none, as it has sizes of its own")
    return argparse.Namespace(**vars(options) | dict(quick))
