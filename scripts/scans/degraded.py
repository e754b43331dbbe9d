"""Conditions that are made out of the scan itself: coarse voxels, and holes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from torch.nn import functional as F

from scripts.running.condition_images import CONDITION_IMAGE
from scripts.running.errors import BundleError


def at_low_resolution(image: torch.Tensor, factors: Sequence[int]) -> torch.Tensor:
    """(C, *spatial) as a scan of larger voxels shows it: means of blocks, interpolated linearly to the old grid."""
    kind = "bilinear" if len(factors) == 2 else "trilinear"
    pooled = F.avg_pool2d if len(factors) == 2 else F.avg_pool3d
    coarse = pooled(image[None], list(factors), ceil_mode=True)
    return F.interpolate(coarse, image.shape[1:], mode=kind, align_corners=False)[0]


class LowResolutiond(MapTransform):
    """Add what the image looks like at a lower resolution as its condition image: thick slices, or large voxels.

    Input and output: (1, *spatial) in [-1, 1].

    Args:
        factors: how many voxels become one along each axis (RAS); [1, 1, 4] are axial slices four times as thick.

    Raises:
        BundleError: not a whole number, 1 or more, for each axis, or 1 for all of them.
    """

    condition_images = [{"name": "low_resolution", "suffix": ""}]

    def __init__(self, keys: KeysCollection, factors: Sequence[int]) -> None:
        super().__init__(keys)
        whole = all(isinstance(factor, int) and factor >= 1 for factor in factors)
        if not whole or max(factors) < 2:
            raise BundleError(
                f"factors: {factors!r} was given; expected a whole number of 1 or more for each axis, one of them 2 or "
                "more, such as [1, 1, 4] for thick axial slices"
            )
        self.factors = list(factors)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, Any]:
        item = dict(data)
        for key in self.key_iterator(item):
            image = torch.as_tensor(item[key])
            if image.ndim - 1 != len(self.factors):
                raise BundleError(f"factors: {self.factors!r} was given; expected {image.ndim - 1} numbers")
            item[CONDITION_IMAGE] = at_low_resolution(image.float(), self.factors)
        return item


def with_hole(image: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
    """What a network of holes is shown, two channels: the image, 0 in the hole, and the hole, 1 in it and -1 elsewhere.

    Args:
        image: (1, *spatial) in [-1, 1].
        hole: boolean, of that shape.
    """
    return torch.cat([torch.where(hole, 0.0, image), torch.where(hole, 1.0, -1.0)])


class RandHoled(RandomizableTransform, MapTransform):
    """Add the image with a hole in it, and the hole, as its condition image, see `with_hole`.

    The hole is an ellipsoid around a random voxel of the foreground; it may reach beyond the brain.

    Args:
        radii: least and largest half-axis, as shares of the longest side.
    """

    condition_images = [{"name": "known", "suffix": ""}, {"name": "known_mask", "suffix": "_mask", "labels": [1]}]

    def __init__(self, keys: KeysCollection, radii: Sequence[float] = (0.05, 0.35)) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, 1.0)
        if not (len(radii) == 2 and 0 < radii[0] <= radii[1]):
            raise BundleError(f"radii: {radii!r} was given; expected two numbers, 0 < least <= largest")
        self.radii = tuple(radii)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, Any]:
        item = dict(data)
        for key in self.key_iterator(item):
            image = torch.as_tensor(item[key]).float()
            inside = torch.nonzero(image[0] > -1)
            centre = inside[self.R.randint(len(inside))] if len(inside) else torch.tensor(image.shape[1:]) // 2
            radii = self.R.uniform(*self.radii, len(centre)) * max(image.shape[1:])
            axes = [(torch.arange(n) - c) / r for n, c, r in zip(image.shape[1:], centre.tolist(), radii.tolist())]
            distance = sum(part.square() for part in torch.meshgrid(*axes, indexing="ij"))
            item[CONDITION_IMAGE] = with_hole(image, (distance <= 1)[None])
        return item
