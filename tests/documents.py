"""The documents, and what is read out of them: sections, tables, fenced blocks."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "manifests/README.md").read_text()
DOCUMENTS = {"README.md": README, "manifests/README.md": REFERENCE}
DOCUMENTS["CHANGELOG.md"] = (ROOT / "CHANGELOG.md").read_text()

Table = list[dict[str, str]]


def section(text: str, title: str) -> str:
    """The text below a heading, up to the next heading of its level or above."""
    found = re.search(rf"^(#+) {re.escape(title)}$\n", text, re.M)
    assert found, f"no heading {title!r}"
    rest = text[found.end() :]
    end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.M)
    return rest[: end.start()] if end else rest


def tables(text: str) -> list[Table]:
    """All Markdown tables of a text, each a list of rows by column title."""
    found: list[Table] = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        head, _, *lines = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()
        ]
        assert all(len(line) == len(head) for line in lines), f"ragged table: {head}"
        found.append([dict(zip(head, line, strict=True)) for line in lines])
    return found


def quoted(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
