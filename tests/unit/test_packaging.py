"""What an installed copy holds is what the checkout holds."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_package_is_listed():
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    found = {".".join(init.parent.relative_to(ROOT).parts) for init in (ROOT / "dora_fx").rglob("__init__.py")}
    assert set(listed) == found | {"dora_fx.passes"}


def test_the_passes_are_reached_through_a_relative_link():
    link = ROOT / "dora_fx" / "passes"
    assert link.is_symlink() and link.readlink() == Path("../passes")
