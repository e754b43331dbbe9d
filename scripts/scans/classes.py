"""Classes of images: by folder, or by a table of files."""

from __future__ import annotations

import os
from collections.abc import Sequence

from scripts.running.covariates import CLASS
from scripts.running.errors import BundleError
from scripts.running.tables import read_table


def check_table(class_names: Sequence[str] | None, class_table: str | None) -> None:
    """A table of classes can be read, and has no other classes than `class_names`. See `classes_in_table`."""
    if class_table is not None:
        classes_in_table(class_table, class_names or (), "")


def classes_in_table(class_table: str, class_names: Sequence[str], dataset_dir: str) -> dict[str, str]:
    """{absolute path: class} of a CSV file with the columns `file` (absolute, or from `dataset_dir`) and `class`.

    Raises:
        BundleError: no such table, other columns, a class that `class_names` lacks, one file with two classes.
    """
    classes: dict[str, str] = {}
    right = "a CSV file with the columns 'file' and 'class'"
    for line, row in read_table(class_table, ("file", "class"), "class_table", right):
        where = f"class_table: {class_table!r}, line {line}: {row['file']!r}"
        if row["class"] not in class_names:
            raise BundleError(
                f"{where} has the class {row['class']!r}; it must be one of {list(class_names)} (class_names)"
            )
        path = os.path.realpath(os.path.join(dataset_dir, row["file"]))
        if classes.setdefault(path, row["class"]) != row["class"]:
            raise BundleError(f"{where} has the class {row['class']!r}, and {classes[path]!r} in a line before")
    return classes


def classes_of(
    paths: Sequence[str], folder: str, class_names: Sequence[str], class_table: str | None = None
) -> list[str | None]:
    """The class of each file, None where it has none: the one rule, for training and evaluation.

    It is that of its line in `class_table`, see `classes_in_table`; without a table that of the innermost folder below
    `folder` whose name is a class.
    """
    if class_table is not None:
        classes = classes_in_table(class_table, class_names, folder)
        return [classes.get(os.path.realpath(path)) for path in paths]
    inner_first = [os.path.relpath(path, folder).split(os.sep)[-2::-1] for path in paths]
    return [next((name for name in names if name in class_names), None) for names in inner_first]


def with_classes(
    images: list[dict], class_names: Sequence[str] | None, class_table: str | None, dataset_dir: str
) -> list[dict]:
    """The images, each with "covariates": {"class": its class}; without names as they are.

    Args:
        images: [{"image": path, ...}, ...] below `dataset_dir`.
        class_names: the words to train with, or None.
        class_table: see `classes_of`.

    Raises:
        BundleError: a table that cannot be used, names a file that is not there or leaves one out; an image that lies
            in no folder of a class.
    """
    if not class_names:
        return images
    if not images:
        return []  # `scripts.scans.find.require` says so
    paths = [item["image"] for item in images]
    found = classes_of(paths, dataset_dir, class_names, class_table)
    if class_table is None:
        problem, right = "lie in no folder", f"folders named {list(class_names)} (class_names), or a class_table,"
    else:
        classes = classes_in_table(class_table, class_names, dataset_dir)
        if missing := sorted(set(classes) - set(map(os.path.realpath, paths))):
            raise BundleError(
                f"class_table: {class_table!r} names {len(missing)} files that are not among the {len(images)} images "
                f"of dataset_dir, for example {missing[0]!r}; expected the path of an image, absolute or from "
                f"{dataset_dir!r}"
            )
        problem, right = f"have no line in {class_table!r}", "a line for each"
    without = [path for path, name in zip(paths, found) if name is None]
    if without:
        raise BundleError(
            f"{'class_names' if class_table is None else 'class_table'}: {len(without)} of {len(images)} images "
            f"{problem} and so have no class, for example {without[0]!r}; expected {right}"
        )
    return [item | {"covariates": {CLASS: name}} for item, name in zip(images, found)]
