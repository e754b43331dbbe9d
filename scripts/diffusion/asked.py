"""What volumes are asked to be: covariates, or a class, for each volume of a sampling run."""

from __future__ import annotations

import ast
import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from scripts.running.checks import check_knobs
from scripts.running.covariates import CLASS, Covariate, encoded, one_word, unknown_of, value_of
from scripts.running.errors import BundleError
from scripts.running.knobs import is_number
from scripts.running.tables import MISSING, read_table

logger = logging.getLogger(__name__)
Values = Mapping[str, Any]


def listed(covariates: Sequence[Covariate]) -> str:
    """The covariates of weights, as a sentence names them."""
    words = [f"{c['name']} (one of {c['words']})" if "words" in c else f"{c['name']} (a number)" for c in covariates]
    return ", ".join(words) or "none, for these weights know no covariates"


def checked(values: Values, covariates: Sequence[Covariate]) -> dict[str, Any]:
    """{name: number, word or None} with a sentence for what the weights do not know.

    Raises:
        BundleError: a name or word that they do not know, a number that is none.
    """
    known = {covariate["name"]: covariate for covariate in covariates}
    for name, value in values.items():
        if name not in known:
            raise BundleError(f"covariates: {name!r} was given; these weights know {listed(covariates)}")
        if value is None:
            continue
        if "words" in known[name]:
            if value not in known[name]["words"]:
                raise BundleError(
                    f"covariates: {name} {value!r} was given; it must be one of {known[name]['words']}, or None"
                )
        elif not is_number(value):
            raise BundleError(f"covariates: {name} {value!r} was given; it must be a number, or None")
        elif not known[name]["min"] <= value <= known[name]["max"]:
            logger.warning(
                f"covariates: {name} {value} was given, but the weights were trained on {known[name]['min']} to "
                f"{known[name]['max']}; what comes out is a guess"
            )
    return dict(values)


def of_class_label(class_label: Any, covariates: Sequence[Covariate]) -> list[Values]:
    """A class by its name or index, None for none, or a list of these, as covariates.

    Raises:
        BundleError: an unknown class.
    """
    names = next((list(c["words"]) for c in covariates if c["name"] == CLASS and "words" in c), [])
    known = f"one of {names}, an index from 0 to {len(names) - 1}, or null (no class)"
    if not names:
        known = "null, for these weights know no classes (class_names)"
    wanted = list(class_label) if isinstance(class_label, (list, tuple)) else [class_label]
    if not wanted:
        raise BundleError(f"class_label: an empty list was given; it must be {known}")
    found = []
    for label in wanted:
        is_index = isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names)
        name = names[label] if is_index else label
        if label is not None and (not isinstance(name, str) or name not in names):
            raise BundleError(f"class_label: {label!r} was given; it must be {known}")
        found.append({} if label is None else {CLASS: name})
    return found


def of_table(path: str, covariates: Sequence[Covariate]) -> list[Values]:
    """A volume for each row of a table, CSV or TSV, such as a participants.tsv: what its columns say of covariates.

    Raises:
        BundleError: it cannot be read; no column is a covariate of these weights; a word or number that is none.
    """
    right = f"a table with columns out of {listed(covariates)}"
    rows = read_table(path, [], "covariates", right)
    columns = [covariate for covariate in covariates if covariate["name"] in rows[0][1]]
    if not columns:
        raise BundleError(f"covariates: {path!r} has the columns {list(rows[0][1])}; expected {right}")
    found = []
    for line, row in rows:
        values = {covariate["name"]: value_of(covariate, row[covariate["name"]]) for covariate in columns}
        for covariate in columns:
            name, words = covariate["name"], covariate.get("words")
            if row[name].lower() not in MISSING and (values[name] not in words if words else values[name] is None):
                right = f"one of {words}" if words else "a number"
                raise BundleError(
                    f"covariates: line {line} of {path!r}: {name} is {row[name]!r}; expected {right}, or n/a"
                )
        found.append(values)
    return found


def text_of(value: Any) -> str:
    return "n/a" if value is None else str(value)


def as_text(values: Values) -> str:
    """Such as "age 70, sex f"; of a class its name alone."""
    return ", ".join(
        f"{value}" if name == CLASS else f"{name} {value}" for name, value in values.items() if value is not None
    )


def conditions_asked(
    covariates: Values | Sequence[Values] | str | None,
    class_label: Any,
    known: Sequence[Covariate],
    guidance_scale: float = 1.0,
    from_images: bool = False,
) -> tuple[list[dict[str, Any]], bool]:
    """What the volumes of a run are asked to be.

    Args:
        covariates: {"age": 70, "sex": "f"}, which is said of every volume; a list of these, taken in turn; or with
            lists as values, {"age": [20, 40, 60]}, a sweep: every noise becomes a volume of each. A text is read as
            Python.
        class_label: a class by name or index, or a list of these, taken in turn.
        known: the covariates of the weights, see `scripts.running.covariates`.
        guidance_scale: see `scripts.diffusion.sampler.DiffusionSampler`.
        from_images: whether there are condition images, to which it may guide.

    Returns:
        ([{name: value}, ...], whether it is a sweep)

    Raises:
        BundleError: what `checked` and `of_class_label` raise; both were given; guidance without anything to guide to.
    """
    if isinstance(covariates, str):
        try:
            covariates = ast.literal_eval(covariates) if covariates.strip() else None
        except (ValueError, SyntaxError) as e:
            raise BundleError(
                f"covariates: {covariates!r} was given; expected such as {{'age': 70, 'sex': 'f'}}"
            ) from e
    columns = [covariate["name"] for covariate in known]
    if isinstance(covariates, (list, tuple)) and covariates and all(name in columns for name in covariates):
        logger.info(f"covariates: {covariates!r}, the columns of a training, ask for nobody in particular")
        covariates = None
    if covariates and class_label is not None:
        raise BundleError(f"class_label: {class_label!r} was given beside covariates; say {{'{CLASS}': ...}} in these")
    sweep = isinstance(covariates, Mapping) and any(isinstance(v, (list, tuple)) for v in covariates.values())
    if sweep:
        choices = [v if isinstance(v, (list, tuple)) else [v] for v in covariates.values()]
        wanted: list[Values] = [dict(zip(covariates, chosen)) for chosen in itertools.product(*choices)]
    elif covariates:
        wanted = [covariates] if isinstance(covariates, Mapping) else list(covariates)
        if not all(isinstance(values, Mapping) for values in wanted):
            raise BundleError(
                f"covariates: {covariates!r} was given; expected such as {{'age': 70}}, or a list of these"
            )
    else:
        wanted = of_class_label(class_label, known)
    found = [checked(values, known) for values in wanted]
    if not found:
        raise BundleError(
            f"covariates: {covariates!r} was given, which asks for no volume; expected at least one value"
        )
    check_knobs(guidance_scale=guidance_scale)
    if (
        guidance_scale != 1
        and not from_images
        and not any(value is not None for values in found for value in values.values())
    ):
        names = next((c["words"] for c in known if c["name"] == CLASS), None) if one_word(known) else None
        right = f"a class_label out of {names}" if names else f"covariates: these weights know {listed(known)}"
        right = right if known else "1, for these weights know no classes (class_names) nor other covariates"
        raise BundleError(
            f"guidance_scale: {guidance_scale} was given, but there is no class to guide to; expected {right}"
        )
    return found, sweep


def conditions_of_text(text: str, known: Sequence[Covariate], noise: torch.Tensor) -> torch.Tensor:
    """What a client asks for, such as "{'age': 70}", as conditions of a batch of noise (B, C, *spatial)."""
    asked, _ = conditions_asked(text, None, known)
    condition = torch.tensor(encoded(asked[0], known), device=noise.device)
    return condition.expand(len(noise), *condition.shape)


def requests(
    num_samples: int,
    covariates: Any,
    class_label: Any,
    known: Sequence[Covariate],
    guidance_scale: float = 1.0,
    from_images: bool = False,
) -> list[dict[str, Any]]:
    """The volumes of a run, in their order: of each noise one, or in a sweep one for each value.

    Args:
        num_samples: how many noises.
        covariates, class_label, known, guidance_scale, from_images: see `conditions_asked`; here covariates may also be
            the path of a table, see `of_table`, whose rows are taken in turn.

    Returns:
        [{"image": number of the noise, "index": place, "condition": tensor, "values": {name: text}, "said": text,
        "folder": of the class, "suffix": of the file's name, "row": of the mosaic}, ...]
    """
    if isinstance(covariates, str) and covariates.endswith((".csv", ".tsv")):
        covariates = of_table(covariates, known)
    asked, sweep = conditions_asked(covariates, class_label, known, guidance_scale, from_images)
    classes = one_word(known) and known[0]["name"] == CLASS
    found = []
    for volume in range(num_samples):
        for values in asked if sweep else [asked[volume % len(asked)]]:
            condition = encoded(values, known) if known else unknown_of(known)
            swept = [f"_{name}{value}" for name, value in values.items()] if sweep else []
            found.append(
                {
                    "image": volume,
                    "index": len(found),
                    "condition": torch.tensor(condition),
                    "values": {c["name"]: text_of(values.get(c["name"])) for c in known},
                    "said": as_text(values),
                    "folder": values.get(CLASS) or "" if classes else "",
                    "suffix": re.sub(r"[^\w.-]", "", "".join(swept)),
                    "row": condition if classes else volume if sweep else 0,
                }
            )
    return found
