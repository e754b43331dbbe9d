"""The covariates of a training's scans: age, sex, diagnosis, scanner, from a table, and classes from folders."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.running.covariates import (
    CLASS,
    Covariate,
    encoded,
    known_covariates,
    num_class_embeds,
    of_classes,
    value_of,
)
from scripts.running.errors import BundleError
from scripts.running.tables import MISSING, number, read_table
from scripts.scans.classes import check_table, with_classes
from scripts.scans.split import subjects_of

logger = logging.getLogger(__name__)
MOST_WORDS = 50
AGES = (0, 125)
ABSURD = 12  # standard deviations, as the median absolute deviation of a normal distribution gives them
TABLE = "participants.tsv"


class Covariates:
    """What is known of each scan, and what the network is told of it.

    Args:
        names: columns of the table, such as ["age", "sex"]. A column of numbers is a number, any other one words;
            "n/a", an empty field and the like are unknown.
        table: a CSV or TSV file with a column `participant_id` (a BIDS participants.tsv; with or without "sub-") or
            `file` (a path, absolute or from `dataset_dir`); None for `dataset_dir`/participants.tsv.
        class_names, class_table: see `scripts.scans.classes.classes_of`; classes are the words of one more covariate.
        dataset_dir: folder of the scans.
        description: of the weights to begin or go on with; their words keep their places and their numbers their scale.
        resumed: whether a run goes on, which must have the same covariates.

    Raises:
        BundleError: names the table, line and column of what cannot be used: see `read`, `column` and `check`.
    """

    def __init__(
        self,
        names: Sequence[str] = (),
        table: str | None = None,
        class_names: Sequence[str] | None = None,
        class_table: str | None = None,
        dataset_dir: str = "",
        description: Mapping[str, Any] | None = None,
        resumed: bool = False,
    ) -> None:
        self.names, self.dataset_dir = list(names), str(dataset_dir)
        self.class_names, self.class_table = class_names, class_table
        check_table(class_names, class_table)
        self.before = {c["name"]: c for c in known_covariates(description or {})}
        self.path = str(table or Path(self.dataset_dir, TABLE))
        self.rows: list[tuple[int, dict[str, str]]] = self.read() if self.names else []
        ids = [row.get("participant_id") for _, row in self.rows]
        by_file = bool(self.rows) and "file" in self.rows[0][1] and (None in ids or len(set(ids)) < len(ids))
        self.key = "file" if by_file else "participant_id"
        self.known = [*of_classes(class_names), *(self.column(name) for name in self.names)]
        self.check(resumed)
        self.num_class_embeds = num_class_embeds(self.known)

    def read(self) -> list[tuple[int, dict[str, str]]]:
        """The rows of the table, which has all columns."""
        right = f"a table with the columns 'participant_id' or 'file' and {self.names}"
        try:
            return read_table(self.path, ["participant_id", *self.names], "covariate_table", right)
        except BundleError as e:
            if "no column 'participant_id'" not in str(e):
                raise
            return read_table(self.path, ["file", *self.names], "covariate_table", right)

    def where(self, line: int, name: str, text: str) -> str:
        return f"covariate_table: {self.path!r}, line {line}: {name} is {text!r}"

    def column(self, name: str) -> Covariate:
        """What kind of covariate a column is.

        Raises:
            BundleError: it has no values; some are numbers and some not; too many different words; an age that nobody
                has.
        """
        texts = [(line, row[name]) for line, row in self.rows if row[name].lower() not in MISSING]
        if not texts:
            raise BundleError(f"covariates: the column {name!r} of {self.path!r} has no values; expected some")
        numbers = [number(text) for _, text in texts]
        then = self.before.get(name)
        numeric = "words" not in then if then else numbers.count(None) < len(numbers) / 2
        if not numeric:
            words = sorted({text for _, text in texts})
            if len(words) > MOST_WORDS:
                raise BundleError(
                    f"covariates: the column {name!r} of {self.path!r} has {len(words)} different words, such as "
                    f"{words[0]!r}; expected numbers, or at most {MOST_WORDS} words"
                )
            old = then["words"] if then else []
            return {"name": name, "words": [*old, *(word for word in words if word not in old)]}
        for (line, text), value in zip(texts, numbers, strict=True):
            if value is None:
                raise BundleError(f"{self.where(line, name, text)}; expected a number, or n/a where it is not known")
            if name.lower().startswith("age") and not AGES[0] <= value <= AGES[1]:
                raise BundleError(f"{self.where(line, name, text)}; expected an age from {AGES[0]} to {AGES[1]} years")
        values = np.array(numbers)
        spread = 1.4826 * np.median(np.abs(values - np.median(values)))
        worst = int(np.argmax(np.abs(values - np.median(values))))
        if spread > 0 and abs(values[worst] - np.median(values)) > ABSURD * spread:
            logger.warning(f"{self.where(*texts[worst][:1], name, texts[worst][1])}, far from all others; is it right?")
        return {"name": name}

    def check(self, resumed: bool) -> None:
        """Raises BundleError where a run that goes on was begun with other covariates."""
        names = [covariate["name"] for covariate in self.known]
        if len(set(names)) < len(names):
            raise BundleError(f"covariates: {self.names} name one twice (class_names is called {CLASS!r}); once each")
        if resumed:  # classes are compared as the knob class_names, with all others that describe weights
            names = [name for name in names if name != CLASS]
        before = [name for name in self.before if name != CLASS or not resumed]
        changed = [n for n in names if self.words_of(n) != self.before.get(n, {}).get("words")]
        if resumed and before != names:
            raise BundleError(
                f"covariates: {names} were given, but the run that goes on was begun with {before}; expected the same"
            )
        if forgotten := [name for name in before if name not in names]:
            logger.info(f"covariates: the weights to begin with know {forgotten} too, which this training passes over")
        if resumed and changed:
            name = changed[0]
            raise BundleError(
                f"covariates: the words of {name!r} are {self.words_of(name)}, "
                f"but the run that goes on was begun with {self.before[name]['words']}; expected the same"
            )

    def words_of(self, name: str) -> list[str] | None:
        return next(covariate.get("words") for covariate in self.known if covariate["name"] == name)

    def key_of(self, row: Mapping[str, str]) -> str:
        """What a row is found by: a subject without "sub-", or the real path of a file."""
        if self.key == "participant_id":
            return row["participant_id"].removeprefix("sub-")
        return os.path.realpath(os.path.join(self.dataset_dir, row["file"]))

    def attached(self, images: list[dict]) -> list[dict]:
        """The images, each with "covariates": {name: number, word or None}; as they are where there are none.

        Raises:
            BundleError: what `with_classes` raises; two rows that say different things of one scan; no scan has a row.
        """
        images = with_classes(images, self.class_names, self.class_table, self.dataset_dir)
        if not self.names or not images:
            return images
        rows: dict[str, tuple[int, dict[str, Any]]] = {}
        for line, row in self.rows:
            values = {c["name"]: value_of(c, row[c["name"]]) for c in self.known if c["name"] in self.names}
            key = self.key_of(row)
            if key in rows and rows[key][1] != values:
                raise BundleError(
                    f"covariate_table: {self.path!r} has two rows for {key!r}, lines {rows[key][0]} and {line}, which "
                    f"say {rows[key][1]} and {values}; expected one, or a column 'file'"
                )
            rows[key] = line, values
        subjects = [subject.rsplit("/", 1)[-1] for subject in subjects_of(images, self.dataset_dir)]
        keys = [
            next((key for key in candidates if key in rows), None)
            for candidates in zip(
                [os.path.realpath(item["image"]) for item in images],
                [subject.removeprefix("sub-") for subject in subjects],
                [os.path.basename(item["image"]).split(".")[0].removeprefix("sub-") for item in images],
            )
        ]
        missing = [item["image"] for item, key in zip(images, keys, strict=True) if key is None]
        if len(missing) == len(images):
            raise BundleError(
                f"covariate_table: none of the {len(rows)} rows of {self.path!r} is of one of the {len(images)} scans, "
                f"such as {missing[0]!r}; expected rows such as {subjects[0]!r} in participant_id, or paths in file"
            )
        if missing:
            logger.warning(
                f"covariate_table: {len(missing)} of {len(images)} scans have no row in {self.path!r}, for example "
                f"{missing[0]!r}; what it says of them counts as unknown"
            )
        if unused := sorted(rows.keys() - set(keys)):
            logger.info(f"covariate_table: {len(unused)} of {len(rows)} rows are of no scan, for example {unused[0]!r}")
        nothing = dict.fromkeys(self.names)
        return [
            item | {"covariates": item.get("covariates", {}) | (rows[key][1] if key else nothing)}
            for item, key in zip(images, keys, strict=True)
        ]

    def described(self, training: Sequence[Mapping[str, Any]]) -> list[Covariate]:
        """The covariates with what the training subjects say: means, standard deviations and ranges of the numbers.

        A number that the weights to begin with know keeps its mean and standard deviation; its range grows.
        """
        found = []
        for covariate in self.known:
            name = covariate["name"]
            values = [item["covariates"][name] for item in training if item.get("covariates", {}).get(name) is not None]
            if "words" in covariate:
                if never := [word for word in covariate["words"] if word not in values]:
                    logger.warning(f"covariates: of the training scans none has {name} {', '.join(map(repr, never))}")
                found.append(dict(covariate))
                continue
            if len(set(values)) < 2:
                raise BundleError(
                    f"covariates: {name} has {len(set(values))} different values among the {len(training)} training "
                    "scans; expected two or more"
                )
            then = self.before.get(name, {})
            found.append(
                {
                    "name": name,
                    "mean": then.get("mean", round(float(np.mean(values)), 6)),
                    "std": then.get("std", round(float(np.std(values)), 6)),
                    "min": min(*values, then.get("min", np.inf)),
                    "max": max(*values, then.get("max", -np.inf)),
                }
            )
        return found

    def encoded(self, images: Sequence[dict], covariates: Sequence[Covariate]) -> list[dict]:
        """The images with "condition", as `scripts.running.covariates.encoded` gives it, in place of "covariates"."""
        if not covariates:
            return list(images)
        plain = [{key: value for key, value in item.items() if key != "covariates"} for item in images]
        return [
            new | {"condition": encoded(item.get("covariates", {}), covariates)}
            for new, item in zip(plain, images, strict=True)
        ]
