"""The graphs in the design are made from golden text: `python -m tests.graph.design_graphs` writes them anew.

The line in front of a graph's block names the test whose golden text it is:

    <!-- golden text: test_golden_text.py::test_column -->
"""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

FOLDER = Path(__file__).parent
DESIGN = FOLDER.parents[1] / "docs" / "design.md"
_BLOCK = re.compile(r"^(<!-- golden text: (\w+\.py)::(\w+) -->\n)```text\n.*?^```$", re.DOTALL | re.MULTILINE)


def golden_lines(file: str, test: str) -> str:
    """The lines of the graph that a test of golden text expects, without the signature of its function."""
    module = ast.parse((FOLDER / file).read_text(encoding="utf-8"))
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == test]
    assert len(functions) == 1, f"docs/design.md: found {file}::{test}, expected the name of a test"
    [text] = (
        node.value
        for node in ast.walk(functions[0])
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value
    )
    _, body = re.split(r"^    def forward\(.*\):\n", text, maxsplit=1, flags=re.MULTILINE)
    lines = [line for line in textwrap.dedent(body).splitlines() if line]
    return "\n".join(lines)


def with_current_graphs(page: str) -> str:
    """The text of the page with the graphs of the golden text as it is."""
    return _BLOCK.sub(lambda block: f"{block[1]}```text\n{golden_lines(block[2], block[3])}\n```", page)


if __name__ == "__main__":
    DESIGN.write_text(with_current_graphs(DESIGN.read_text(encoding="utf-8")), encoding="utf-8")
