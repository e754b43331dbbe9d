"""The record of a training run: progress bar, loss.csv, and the loss curve with its table."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence

import ignite.distributed as idist

from scripts.running.errors import BundleError
from scripts.running.files import write_atomically


class CsvRecord:
    """A CSV file that grows row by row and survives a kill: a resumed run drops the rows that it will write again.

    Of several processes, rank 0 writes.

    Args:
        path: of the file; its first column is "iteration".
        columns: names of the columns after the first.
    """

    def __init__(self, path: str, columns: Sequence[str]) -> None:
        self.path = path
        self.header = ["iteration", *columns]

    def start(self, iteration: int) -> None:
        """Keep the rows up to and including `iteration`; 0 begins the file anew."""
        if idist.get_rank() != 0:
            return
        kept = [row for row in self.rows() if int(row["iteration"]) <= iteration] if iteration else []
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        write_atomically(self.path, lambda temporary: self.write(temporary, kept))

    def write(self, path: str, rows: list[dict[str, str]]) -> None:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, self.header)
            writer.writeheader()
            writer.writerows(rows)

    def add(self, iteration: int, *values: float | str) -> None:
        if idist.get_rank() != 0:
            return
        try:
            with open(self.path, "a", newline="") as file:
                csv.writer(file).writerow([iteration, *values])
        except OSError as e:
            raise BundleError(
                f"{self.path!r} could not be written at iteration {iteration} ({e.strerror}); rows and checkpoints "
                "from before it are untouched: make room, then --resume true goes on"
            ) from e

    def flush(self) -> None:
        """Bring the rows so far to the disk, for the case of a power failure."""
        if idist.get_rank() == 0 and os.path.exists(self.path):
            with open(self.path, "rb+") as file:
                os.fsync(file.fileno())

    def rows(self) -> list[dict[str, str]]:
        """All complete rows; a last row that a kill has torn is left out."""
        if not os.path.exists(self.path):
            return []
        with open(self.path, newline="") as file:
            lines = [line for line in file if line.endswith("\n")]
        return [row for row in csv.DictReader(lines) if None not in row.values() and row["iteration"].isdigit()]
