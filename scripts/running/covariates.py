"""What a network is told besides the time, as a list of dictionaries: `covariates` of model.json.

    {"name": "age", "mean": 48.2, "std": 16.9, "min": 19, "max": 82}    a number, standardised by the training subjects
    {"name": "sex", "words": ["f", "m"]}                                a word, known by its index

A volume's condition is one value for each. "Unknown" is a value of its own, NaN for a number and the index after the
last for a word: what is missing in a table, and what is dropped in training for guidance. The classes of `class_names`
are the words of one covariate that is called class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.running.tables import MISSING, number

CLASS = "class"
REQUESTS = "samples.csv"  # beside synthetic volumes: what each was asked to be
Covariate = Mapping[str, Any]


def one_word(covariates: Sequence[Covariate]) -> bool:
    """Whether there is one covariate and it is a word: a condition is then an index, such as a class label."""
    return len(covariates) == 1 and "words" in covariates[0]


def of_classes(class_names: Sequence[str] | None) -> list[Covariate]:
    """Classes as a covariate; none without names."""
    return [{"name": CLASS, "words": list(class_names)}] if class_names else []


def known_covariates(description: Mapping[str, Any]) -> list[Covariate]:
    """The covariates of weights, from what their model.json says, of this version or an earlier one."""
    return list(description.get("covariates") or of_classes(description.get("class_names")))


def unknown_of(covariates: Sequence[Covariate]) -> Any:
    """The condition that says nothing: an index for one word, else a list of floats; 0 without covariates."""
    if not covariates:
        return 0
    values = [float(len(c["words"])) if "words" in c else math.nan for c in covariates]
    return int(values[0]) if one_word(covariates) else values


def value_of(covariate: Covariate, text: str) -> float | str | None:
    """What the text of a table says of a covariate; None where it is missing, or no number where one is wanted."""
    if text.lower() in MISSING:
        return None
    return text if "words" in covariate else number(text)


def encoded(values: Mapping[str, Any], covariates: Sequence[Covariate]) -> Any:
    """{"age": 70.0, "sex": "f"} as a condition: numbers standardised, words as indices; what is None is unknown.

    Returns:
        an index for one word, else a list of floats.
    """
    condition = []
    for covariate, unknown in zip(covariates, [unknown_of([c]) for c in covariates], strict=True):
        value = values.get(covariate["name"])
        if "words" in covariate:
            words = covariate["words"]
            condition.append(float(words.index(value) if value in words else len(words)))
        else:
            condition.append(unknown[0] if value is None else (value - covariate["mean"]) / covariate["std"])
    return int(condition[0]) if one_word(covariates) else condition


def num_class_embeds(covariates: Sequence[Covariate]) -> int | None:
    """The argument of MONAI's U-Net: the words of one, and "unknown"; 1 where another embedding replaces its own."""
    if not covariates:
        return None
    return len(covariates[0]["words"]) + 1 if one_word(covariates) else 1
