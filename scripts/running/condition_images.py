"""What images a network is shown beside the noise, as a list of dictionaries: `condition_images` of model.json.

    {"name": "t2", "suffix": "_T2w"}                            an image, such as another contrast: one channel
    {"name": "labels", "suffix": "_dseg", "labels": [1, 2]}     a label map: one channel a label

Channels go from -1 to 1: an image is scaled as those to train on, and a label is 1 where it is and -1 elsewhere.
"Unknown" is 0 everywhere: what is dropped in training for guidance, and what a volume is asked for without an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CONDITION_IMAGE = "condition_image"  # the key of all channels, (C, *spatial), in an item or batch
ConditionImage = Mapping[str, Any]


def channels_of(known: Sequence[ConditionImage]) -> list[tuple[str, int | None]]:
    """(name, label) of each channel, in their order; the label of an image is None."""
    return [(each["name"], label) for each in known for label in each.get("labels") or [None]]


def known_condition_images(description: Mapping[str, Any]) -> list[ConditionImage]:
    """The condition images of weights, from what their model.json says."""
    return list(description.get("condition_images") or [])
