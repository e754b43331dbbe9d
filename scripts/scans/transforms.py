"""What MONAI's transforms lack to turn any brain scan into a cube in [-1, 1]."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import MapTransform, SpatialPad, Transform
from monai.utils import convert_to_dst_type

from scripts.running.checks import check_knobs
from scripts.running.errors import BundleError

LEVEL = 1e-3  # of the largest value: so even is what lies around a brain that was extracted
FAINT = 0.05  # of the 99th percentile of what is not that even: a wave of spline resampling, and no brain


def otsu_threshold(values: np.ndarray) -> float:
    """The threshold that best separates two classes of intensities (Otsu 1979): maximal between-class variance.

    Args:
        values: any shape; the top 0.5 % is cut off first, since vessels and artefacts would stretch the histogram.
    """
    counts, edges = np.histogram(values, bins=256, range=(float(values.min()), float(np.percentile(values, 99.5))))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sum_below = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = sum_below / below - (sum_below[-1] - sum_below) / above
        between = np.nan_to_num(below * above * gap**2)
    return float(edges[1:][np.argmax(between)])


def fill_cavities(mask: np.ndarray) -> np.ndarray:
    """A mask with its cavities filled: voxels that have mask voxels on both sides along every axis."""
    inside = np.ones_like(mask)
    for axis in range(mask.ndim):
        before = np.logical_or.accumulate(mask, axis)
        after = np.flip(np.logical_or.accumulate(np.flip(mask, axis), axis), axis)
        inside &= before & after
    return inside


def background_of(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """(height of each voxel above the middle value of the corners, where there is almost none, whether that is even).

    Even is what lies around a brain that was extracted: one value in the corners, and in 30 % of the volume at least.
    """
    corners = np.ix_(*(np.r_[: side // 10 + 1, -(side // 10) - 1 : 0] for side in image.shape))
    height = image - np.median(image[corners])
    outside = np.abs(height) <= LEVEL * np.abs(height).max()
    return height, outside, bool(outside[corners].mean() > 0.95 and outside.mean() > 0.3)


def foreground_of(image: np.ndarray) -> np.ndarray:
    """Boolean mask of the brain (or head) in a volume without channel axis.

    A brain-extracted image has one value around the brain, so also in its corners: everything else is foreground.
    Resampling with splines leaves waves there: what is FAINT or less counts only with brain on both sides along every
    axis. Where much is below that value (z-scores have it in their middle) all that differs from it is foreground.
    Otherwise (a whole head in air whose noise may be whole numbers) Otsu's threshold separates tissue from air, and
    cavities are filled.
    """
    height, outside, even = background_of(image)
    signed = -height[height < 0].sum() > 0.2 * height[height > 0].sum()
    if signed:
        outside = height == 0
    if not even or outside.mean() <= 0.3:
        return fill_cavities(image > otsu_threshold(image))
    if signed or outside.all():
        return ~outside
    return ~outside & fill_cavities(height > FAINT * np.percentile(height[~outside], 99))


def mask_of(mask: np.ndarray) -> np.ndarray:
    """The brain in a mask or label map: what is above 0, in a soft one (fractions) above half of its largest value."""
    soft = mask.dtype.kind == "f" and bool((mask != np.rint(mask)).any())
    return mask > (mask.max() / 2 if soft else 0)


class ZeroBackgroundd(MapTransform):
    """Shift intensities so that the foreground starts at 0 and everything else IS 0: y = (x - min(x)) in the mask.

    The foreground is what `mask_of` finds in `mask_key`, if the item has a mask, otherwise what `foreground_of` finds.
    Input: (1, *spatial) of any type and range. Output: float32, >= 0. The mask is dropped from the item.

    Raises:
        BundleError: names a file without foreground.
    """

    def __init__(self, keys: KeysCollection, mask_key: str = "mask", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mask_key = mask_key

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        item = dict(data)
        mask = item.pop(self.mask_key, None)
        for key in self.key_iterator(item):
            image = item[key].float()
            foreground = torch.as_tensor(
                mask_of(mask.numpy()[0]) if mask is not None else foreground_of(image.numpy()[0])
            )[None]
            inside = image.as_tensor()[foreground]
            if inside.numel() == 0 or inside.min() == inside.max():
                raise BundleError(f"{image.meta.get('filename_or_obj')!r} has no foreground; expected an image")
            zeroed = torch.where(foreground, image.as_tensor() - inside.min(), 0.0)
            item[key] = convert_to_dst_type(zeroed, image)[0]
        return item


class PadToAspect(Transform):
    """Pad with zeros, centred, to a box that has the proportions of `spatial_shape` in millimetres.

    Resized to `spatial_shape` afterwards, the voxels are isotropic whatever the spacing of the scan: for a cube,
    (180, 220, 40) voxels of 1 x 1 x 4 mm become (220, 220, 55).

    Args:
        spatial_shape: voxels a side of the volumes to train on; only the proportions count here.
    """

    def __init__(self, spatial_shape: Sequence[int]) -> None:
        self.spatial_shape = np.asarray(spatial_shape, float)

    def __call__(self, image: MetaTensor) -> MetaTensor:
        """(C, *spatial) with an affine -> (C, *larger spatial), affine adapted."""
        shape = np.asarray(image.shape[1:])
        spacing = affine_to_spacing(image.affine, r=len(shape)).numpy()
        voxel_size = (shape * spacing / self.spatial_shape).max()  # mm after resizing
        size = np.maximum(shape, np.round(voxel_size * self.spatial_shape / spacing).astype(int))
        return SpatialPad(size.tolist())(image)


class PadToAspectd(MapTransform):
    """Dictionary form of `PadToAspect`."""

    def __init__(self, keys: KeysCollection, spatial_shape: Sequence[int], allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.pad = PadToAspect(spatial_shape)

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = self.pad(item[key])
        return item


class ScaleForegroundd(MapTransform):
    """Clip to two percentiles of the foreground (voxels above 0) and scale linearly to exactly [-1, 1].

    y = 2 (clip(x, p_lower, p_upper) - p_lower) / (p_upper - p_lower) - 1. The background, 0, becomes exactly -1.

    Args:
        lower, upper: percentiles, 0 <= lower < upper <= 100.
    """

    def __init__(
        self, keys: KeysCollection, lower: float = 0.5, upper: float = 99.5, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        check_knobs(percentiles=[lower, upper])
        self.lower, self.upper = lower, upper

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        item = dict(data)
        for key in self.key_iterator(item):
            image = item[key]
            voxels = image.as_tensor().double().numpy()
            low, high = np.percentile(voxels[voxels > 0], [self.lower, self.upper])
            if not low < high:
                raise BundleError(
                    f"{image.meta.get('filename_or_obj')!r} has almost one intensity only ({low:g} to {high:g} after "
                    "cropping and resizing); expected an image with contrast"
                )
            scaled = (np.clip(voxels, low, high) - low) / (high - low) * 2 - 1
            item[key] = convert_to_dst_type(scaled, image, dtype=torch.float32)[0]
        return item


class VoxelSized(MapTransform):
    """Note the voxel size in mm, from the affine: item["voxel_size"] is a float32 tensor (spatial dims,)."""

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        item = dict(data)
        for key in self.key_iterator(item):
            item["voxel_size"] = affine_to_spacing(item[key].affine, r=item[key].ndim - 1).float()
        return item
