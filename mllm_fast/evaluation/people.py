"""What people fill in: tables of their answers, and the pages on which they give them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import InputError

_PLACE = "/*QUESTIONS*/[]"
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet program takes for the beginning of a formula


def written_table(rows: Iterable[Sequence[Any]]) -> str:
    """Return a CSV table. A text that a spreadsheet program would run as a formula gets an apostrophe before it.

    `read_table` takes the apostrophe away.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_neutral(cell) for cell in row] for row in rows)
    return text.getvalue()


def _neutral(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


def _given(cell: str | None) -> str:
    cell = cell or ""
    return cell[1:] if cell[:1] == "'" and cell[1:].startswith(_FORMULA) else cell


def read_table(file: Path, columns: Sequence[str], what: str) -> list[tuple[str, dict[str, str]]]:
    """Read a CSV table.

    Args:
        file: The file, in UTF-8.
        columns: The columns that it must have; others are left alone.
        what: What the table is, for the error: "a table of labels".

    Returns:
        The place of each row, for errors ("FILE, line 3"), and its values. A missing value is "".

    Raises:
        InputError: The file does not exist, is no text in UTF-8, or lacks a column.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{file}: there is no such file") from None
    except UnicodeDecodeError:
        raise InputError(f"{file}: is no text in UTF-8; save the table as CSV, UTF-8") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
        raise InputError(f"{file}: has no column {', '.join(missing)}; {what} has {', '.join(columns)}")
    return [(f"{file}, line {reader.line_num}", {name: _given(row[name]) for name in columns}) for row in reader]


def filled_page(page: Path, questions: Sequence[dict[str, Any]]) -> str:
    """Return a page of this package with its questions in it. No text of a question can end the page's script."""
    return page.read_text(encoding="utf-8").replace(_PLACE, json.dumps(questions).replace("<", "\\u003c"))
