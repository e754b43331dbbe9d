"""The images that a network is shown with each scan: label maps, other contrasts, or what is made of the scan."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform

from scripts.running.condition_images import CONDITION_IMAGE, ConditionImage, known_condition_images
from scripts.running.errors import BundleError
from scripts.scans.find import stem, volumes_below

logger = logging.getLogger(__name__)
MOST_LABELS = 32
TAKEN = {"image", "mask", "covariates", "condition", "draw", "voxel_size", CONDITION_IMAGE}  # other keys of an item


class ConditionImages:
    """Which images a training shows its network.

    Args:
        suffixes: {"labels": "_dseg", "t2": "_T2w"}: `sub-01_dseg.nii.gz` and `sub-01_T2w.nii.gz` then belong to
            `sub-01.nii.gz` or `sub-01_T1w.nii.gz`.
        dataset_dir: folder of the scans, whose label maps say which labels there are.
        made: a transform that makes its own channels out of the scan, such as `scripts.scans.degraded.LowResolutiond`,
            and says which in its `condition_images`; None for none. It goes without `suffixes`.
        description: of the weights to begin or go on with; labels keep their channels.
        resumed: whether a run goes on, which must be shown the same.

    Raises:
        BundleError: a name that cannot be one; both kinds at once; a run that goes on with others; more than 32 labels;
            labels that the weights to begin with do not know.

    Attributes:
        known: what the condition images are, see `scripts.running.condition_images`. Of files that cannot be read it
            says nothing: they are named when all files are checked.
    """

    def __init__(
        self,
        suffixes: Mapping[str, str] | None = None,
        dataset_dir: str = "",
        made: Callable | None = None,
        description: Mapping[str, Any] | None = None,
        resumed: bool = False,
    ) -> None:
        self.suffixes, self.made = dict(suffixes or {}), made
        self.before = {each["name"]: each for each in known_condition_images(description or {})}
        for name, suffix in self.suffixes.items():
            if not re.fullmatch(r"[A-Za-z]\w*", name) or name in TAKEN or not suffix:
                raise BundleError(
                    f"condition_images: {name!r}: {suffix!r} was given; expected a name that begins with a letter and "
                    f"is none of {sorted(TAKEN)}, and the end of the files' names, such as 't2': '_T2w'"
                )
        if self.suffixes and made:
            raise BundleError(
                f"condition_images: {self.suffixes} was given beside made_condition; expected one of the two"
            )
        names = list(self.suffixes) or [each["name"] for each in getattr(made, "condition_images", [])]
        if resumed and names != list(self.before):
            raise BundleError(
                f"condition_images: {names} were given, but the run that goes on was begun with {list(self.before)}; "
                "expected the same"
            )
        files = volumes_below(dataset_dir) if self.suffixes else []
        self.known: list[ConditionImage] = list(getattr(made, "condition_images", [])) + [
            self.of_name(name, [file for file in files if stem(file).endswith(suffix)])
            for name, suffix in self.suffixes.items()
        ]

    def of_name(self, name: str, paths: Sequence[str]) -> ConditionImage:
        """The description of one condition image, from all its files; those of few whole numbers are label maps."""
        found: dict[str, Any] = {"name": name, "suffix": self.suffixes[name]}
        with ThreadPoolExecutor() as pool:
            read = list(pool.map(labels_in, paths))
        paths, of_each = [p for p, of in zip(paths, read) if of != []], [of for of in read if of != []]
        if not paths or of_each[0] is None:
            return found
        for path, labels in zip(paths, of_each, strict=True):
            if labels is None:
                raise BundleError(
                    f"condition_images: {path!r} has fractions or more than {MOST_LABELS} values, but {paths[0]!r} is "
                    f"a label map; expected label maps with the end {self.suffixes[name]!r}, or none"
                )
        labels = sorted(set().union(*of_each))
        if then := self.before.get(name, {}).get("labels"):
            for path, of in zip(paths, of_each, strict=True):
                check_labels(set(of), then, name, path)
            labels = then
        if len(labels) > MOST_LABELS:
            raise BundleError(
                f"condition_images: the files of {name!r} have {len(labels)} labels, such as {labels[:5]}; expected at "
                f"most {MOST_LABELS}"
            )
        logger.info(f"condition_images: {name} is a label map with the labels {labels}")
        return found | {"labels": labels}


def labels_in(path: str) -> list[int] | None:
    """The labels of a file, without 0; None where it holds fractions or more than 32 values, as an image does.

    A file that cannot be read has none.
    """
    try:
        values = np.unique(np.asarray(nib.load(path).dataobj))
    except Exception:  # nibabel, zlib and numpy each raise their own; `scripts.scans.inspect` says what it is
        return []
    if len(values) > MOST_LABELS + 1 or (values != np.rint(values)).any():
        return None
    return [int(value) for value in values if value != 0]


def check_labels(found: set[int], known: Sequence[int], name: str, path: str) -> None:
    """Raises BundleError for a label that the network has no channel for."""
    if unknown := sorted(found - set(known) - {0}):
        raise BundleError(
            f"condition_images: {path!r} has the label{'s' if len(unknown) > 1 else ''} {unknown}, but {name!r} of "
            f"these weights has {list(known)}; expected these, and 0 elsewhere"
        )


class StackConditionsd(Transform):
    """Put all condition images of an item into one of several channels, `CONDITION_IMAGE` (C, *spatial), -1 to 1.

    An image, already scaled, is taken as it is; a label map becomes a channel a label, 1 in it and -1 elsewhere. An
    item without condition images stays as it is.

    Args:
        known: see `scripts.running.condition_images`.

    Raises:
        BundleError: a label map with a label that is not known.
    """

    def __init__(self, known: Sequence[ConditionImage]) -> None:
        self.known = known

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        item, channels = dict(data), []
        for each in self.known:
            if each["name"] not in item:
                continue
            image = item.pop(each["name"])
            voxels = torch.as_tensor(image)
            labels = each.get("labels")
            if labels:
                present = set(torch.unique(voxels).long().tolist())
                check_labels(present, labels, each["name"], str(image.meta.get("filename_or_obj")))
                voxels = torch.cat([torch.where(voxels == label, 1.0, -1.0) for label in labels])
            channels.append(voxels.float())
        return item | {CONDITION_IMAGE: torch.cat(channels)} if channels else item
