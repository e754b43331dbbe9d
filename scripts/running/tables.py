"""Tables that people write or edit: CSV and TSV files with a line of names at their top."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence

from scripts.running.errors import BundleError

MISSING = {"", "n/a", "na", "nan", "none", "unknown"}  # in small letters: what stands where nothing is known


def read_table(path: str, columns: Sequence[str], key: str, right: str) -> list[tuple[int, dict[str, str]]]:
    """(line number, row) of each row of a table that has at least these columns; values are stripped of spaces.

    Args:
        path: of the file, in UTF-8, with or without the byte order mark of spreadsheets; .tsv has tabs, others commas.
        columns: that must be there and have a value, maybe empty, in each row.
        key: what the user knows the file by.
        right: ends an error, such as "a CSV file with the columns 'file' and 'class'".

    Raises:
        BundleError: no such file, not text, a column that is missing, no rows, a row that is too short.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True, delimiter="\t" if str(path).endswith(".tsv") else ",")
            rows, found = [(reader.line_num, row) for row in reader], list(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise BundleError(f"{key}: {path!r} cannot be read ({reason}); expected {right}") from e
    missing = [column for column in columns if column not in found]
    if missing or not rows:
        problem = f"has no column {missing[0]!r}, only {found}" if missing else "has no rows"
        raise BundleError(f"{key}: {path!r} {problem}; expected {right}")
    for line, row in rows:
        if any(row[column] is None for column in columns):
            raise BundleError(f"{key}: line {line} of {path!r} is cut short; expected {right}")
    return [(line, {name: (row[name] or "").strip() for name in found}) for line, row in rows]


def number(text: str) -> float | None:
    """A finite number, or None for a text that is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
