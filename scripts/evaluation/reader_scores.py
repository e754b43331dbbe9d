"""What the readers of a reader study answered: fractions called real with exact intervals, accuracy, agreement."""

from __future__ import annotations

import csv
import logging
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from scripts.running.errors import BundleError
from scripts.running.files import write_atomically, write_text
from scripts.running.tables import read_table

logger = logging.getLogger(__name__)
REAL, POOLED = "real", "pooled"
WORDS = (REAL, "synthetic")
KEY_COLUMNS = ("study", "image", "source")
ANSWER_COLUMNS = ("study", "reader", "image", "answer", "seconds")
SCORE_COLUMNS = ("measure", "source", "reader", "count", "of", "value", "low", "high")


@dataclass
class Answers:
    """What one reader answered.

    Attributes:
        reader: as the reader gave the name.
        answers: {image: "real" or "synthetic"}, every image of the study.
        seconds: {image: how long it was on the screen, all visits together}.
    """

    reader: str
    answers: dict[str, str]
    seconds: dict[str, float]


def read_key(key_file: str) -> tuple[str, dict[str, str]]:
    """(study, {image: source}) of the key that `scripts.evaluation.reader_study.ReaderStudy` wrote.

    Raises:
        BundleError: see `read_table`; rows of two studies; an image twice.
    """
    kind = "the key.csv that was written with the page"
    rows = [row for _, row in read_table(key_file, KEY_COLUMNS, "key_file", kind)]
    studies = {row["study"] for row in rows}
    sources = {row["image"]: row["source"] for row in rows}
    if len(studies) > 1 or len(sources) < len(rows):
        problem = f"names the studies {sorted(studies)}" if len(studies) > 1 else "names an image twice"
        raise BundleError(f"key_file: {key_file!r} {problem}; expected {kind}")
    return studies.pop(), sources


def read_answers(path: str, study: str, images: Sequence[str]) -> Answers:
    """One file that a reader downloaded from the page of this study.

    Raises:
        BundleError: see `read_table`; a file of another study or of two readers; images that the study does not have,
            that are answered twice or not at all; words other than "real" and "synthetic".
    """
    right = "a file that a reader downloaded from the page"
    rows = [row for _, row in read_table(path, ANSWER_COLUMNS, "answers", right)]
    others = sorted({row["study"] for row in rows} - {study})
    if others:
        raise BundleError(
            f"answers: {path!r} is of study {others[0]}, but the key is of study {study}; they must agree"
        )
    readers = sorted({row["reader"].strip() for row in rows})
    if len(readers) > 1 or readers[0] in ("", POOLED):
        raise BundleError(f"answers: {path!r} names the readers {readers}; expected one name a file, not {POOLED!r}")
    named = [row["image"] for row in rows]
    problems = {
        "does not belong to the study": [image for image in named if image not in images],
        "is there twice": [image for image in images if named.count(image) > 1],
        "is missing": [image for image in images if image not in named],
        "has no answer": [row["image"] for row in rows if not row["answer"].strip()],
        f"has an answer that is none of {WORDS}": [row["image"] for row in rows if row["answer"].strip() not in WORDS],
    }
    for problem, found in problems.items():
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise BundleError(
                f"answers: in {path!r}, image {found[0]!r}{more} {problem}; expected one answer to each of the "
                f"{len(images)} images of the key"
            )
    try:
        seconds = {row["image"]: float(row["seconds"]) for row in rows}
    except ValueError as e:
        raise BundleError(f"answers: {path!r} has seconds that are not a number ({e})") from e
    return Answers(readers[0], {row["image"]: row["answer"].strip() for row in rows}, seconds)


def fleiss_kappa(counts: np.ndarray) -> tuple[float, float]:
    """Agreement between readers beyond chance (Fleiss 1971).

    Args:
        counts: (images, categories), how many readers chose each category; each row sums to the number of readers.

    Returns:
        (kappa, observed agreement): kappa = (P - P_e) / (1 - P_e), where P is the share of pairs of
        readers that agree, on average over images, and P_e the same by chance. nan with one reader; kappa is nan where
        all chose one category for every image.
    """
    counts = np.asarray(counts, float)
    readers = counts[0].sum()
    if readers < 2:
        return float("nan"), float("nan")
    observed = float(((counts**2).sum(1) - readers).mean() / (readers * (readers - 1)))
    chance = float(((counts.sum(0) / counts.sum()) ** 2).sum())
    return (observed - chance) / (1 - chance) if chance < 1 else float("nan"), observed


def proportion(measure: str, source: str, reader: str, count: int, of: int) -> dict[str, Any]:
    """A row of the scores: count / of with the exact 95 % binomial interval (Clopper and Pearson 1934)."""
    exact = binomtest(count, of).proportion_ci(0.95, "exact")
    value = {"value": count / of, "low": float(exact.low), "high": float(exact.high)}
    return {"measure": measure, "source": source, "reader": reader, "count": count, "of": of} | value


def measure_readers(sources: dict[str, str], readings: Sequence[Answers]) -> list[dict[str, Any]]:
    """The rows of scores.csv.

    Args:
        sources: {image: source}; every source but "real" is synthetic.
        readings: one or more readers, each with an answer to every image.

    Returns:
        [{"measure", "source", "reader", "count", "of", "value", "low", "high"}]: measure "called_real" for each source,
        "accuracy" and "median_seconds" over all, each for every reader and "pooled"; "fleiss_kappa" and
        "observed_agreement" over all readers.
    """
    groups = {reading.reader: [reading] for reading in readings} | {POOLED: list(readings)}
    rows = []
    for source in dict.fromkeys([REAL, *sorted(sources.values())]):
        images = [image for image, s in sources.items() if s == source]
        for name, group in groups.items():
            called = sum(reading.answers[image] == REAL for reading in group for image in images)
            if images:
                rows.append(proportion("called_real", source, name, called, len(images) * len(group)))
    for name, group in groups.items():
        right = sum((r.answers[image] == REAL) == (s == REAL) for r in group for image, s in sources.items())
        rows.append(proportion("accuracy", "all", name, right, len(sources) * len(group)))
    empty = {"source": "all", "count": "", "of": "", "low": "", "high": ""}
    for name, group in groups.items():
        middle = statistics.median(second for reading in group for second in reading.seconds.values())
        rows.append(empty | {"measure": "median_seconds", "reader": name, "value": middle})
    counts = np.array([[sum(r.answers[image] == word for r in readings) for word in WORDS] for image in sources])
    for measure, value in zip(("fleiss_kappa", "observed_agreement"), fleiss_kappa(counts)):
        rows.append(empty | {"measure": measure, "reader": POOLED, "value": "" if np.isnan(value) else value})
    return rows


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it is also readable as plain text; the first row is its head."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def as_markdown(study: str, num_images: int, scores: Sequence[dict[str, Any]]) -> str:
    """The scores as the table of Dorjsembe et al. 2022: a row a source, a column a reader."""
    readers = [row["reader"] for row in scores if row["measure"] == "accuracy"]
    single = len(readers) == 2  # pooled says what the one reader's column says already
    columns = readers[:1] if single else readers
    cells = {(row["measure"], row["source"], row["reader"]): row for row in scores}

    def share(measure: str, source: str, reader: str) -> str:
        row = cells[measure, source, reader]
        low, high = 100 * row["low"], 100 * row["high"]
        return f"{row['count']}/{row['of']} = {100 * row['value']:.1f} % [{low:.1f}, {high:.1f}]"

    table = [["", *columns]]
    for source in dict.fromkeys(row["source"] for row in scores if row["measure"] == "called_real"):
        table.append([f"{source}, called real", *(share("called_real", source, reader) for reader in columns)])
    table.append(["accuracy", *(share("accuracy", "all", reader) for reader in columns)])
    seconds = [cells["median_seconds", "all", reader]["value"] for reader in columns]
    table.append(["median seconds an image", *(f"{value:.1f}" for value in seconds)])
    kappa, agreement = (cells[m, "all", POOLED]["value"] for m in ("fleiss_kappa", "observed_agreement"))
    notes = ["In brackets: exact (Clopper-Pearson) 95 % binomial intervals, in %."]
    if single:
        notes.append("Agreement between readers needs two readers or more.")
    else:
        same = f"two readers agree on {100 * agreement:.1f} % of the images on average"
        why = "is not defined, since every answer is the same word"
        notes.append(f"Fleiss' kappa {why if kappa == '' else f'= {kappa:.3f}'}; {same}.")
        notes.append(
            "All readers saw the same images, so the pooled intervals, which count each answer as an independent one, "
            "are narrower than they should be where readers agree."
        )
    head = f"# Reader study {study}: {num_images} images, {len(readers) - 1} reader{'s' * (not single)}"
    return "\n\n".join([head, markdown_table(table), *notes]) + "\n"


def score(key_file: str, answers: Sequence[str] | str | None, output_dir: str) -> list[dict[str, Any]]:
    """Score the answers of a study; write scores.csv and scores.md into `output_dir` and print the table.

    Args:
        key_file: key.csv of the study.
        answers: files that the readers downloaded, one a reader.

    Returns:
        the rows of `measure_readers`.

    Raises:
        BundleError: what `read_key` and `read_answers` raise; no file; two files of the same reader.
    """
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, Sequence) or not answers or not all(isinstance(path, str) for path in answers):
        raise BundleError(
            f"answers: {answers!r} was given; expected the files that the readers downloaded, such as "
            "\"['anna.csv','ben.csv']\""
        )
    study, sources = read_key(key_file)
    readings: dict[str, tuple[str, Answers]] = {}
    for path in answers:
        reading = read_answers(path, study, list(sources))
        if reading.reader in readings:
            raise BundleError(
                f"answers: {readings[reading.reader][0]!r} and {path!r} are both of the reader {reading.reader!r}; "
                "expected one file a reader"
            )
        readings[reading.reader] = (path, reading)
    scores = measure_readers(sources, [reading for _, reading in readings.values()])
    text = as_markdown(study, len(sources), scores)

    def write_csv(temporary: str) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, SCORE_COLUMNS)
            writer.writeheader()
            writer.writerows(scores)

    os.makedirs(output_dir, exist_ok=True)
    write_atomically(os.path.join(output_dir, "scores.csv"), write_csv)
    path = os.path.join(output_dir, "scores.md")
    write_text(path, text)
    print(text)
    logger.info(f"scores: {path} and scores.csv beside it")
    return scores
