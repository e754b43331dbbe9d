"""What a training run writes down as it goes: losses, held-out losses, surges, and all of it for TensorBoard."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from functools import cached_property

import ignite.distributed as idist
from torch.utils.tensorboard import SummaryWriter

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


class NoWriter:
    """What the other ranks have in place of a `SummaryWriter`: every method of it, doing nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not hasattr(SummaryWriter, name):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


class TrainingRecords:
    """All records of a run, in its output folder.

    Args:
        output_dir: of the run.

    Attributes:
        losses: loss.csv, a row an iteration.
        validation: validation.csv, a row a validation of the raw or the EMA weights.
        surges: surges.csv, what was given up after a surge of the loss, and the learning rate that the run went on
            with.
        summary_writer: of TensorBoard.
    """

    def __init__(self, output_dir: str) -> None:
        self.output_dir = output_dir
        self.losses = CsvRecord(self.path("loss.csv"), ["epoch", "loss"])
        quarters = [f"loss_quarter_{i}" for i in (1, 2, 3, 4)]
        self.validation = CsvRecord(self.path("validation.csv"), ["weights", "loss", *quarters])
        self.surges = CsvRecord(self.path("surges.csv"), ["surge", "loss", "learning_rate"])

    @cached_property
    def summary_writer(self) -> SummaryWriter | NoWriter:
        """Made once something is to be written, which makes its folder."""
        return SummaryWriter(self.path("tensorboard")) if idist.get_rank() == 0 else NoWriter()

    def path(self, name: str) -> str:
        """Of a file of the run."""
        return os.path.join(self.output_dir, name)

    def flush(self) -> None:
        """Bring everything so far to the disk."""
        for record in (self.losses, self.validation, self.surges, vars(self).get("summary_writer")):
            if record is not None:
                record.flush()
