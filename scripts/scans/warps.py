"""Random smooth deformations of volumes and slices, fast enough that a training step does not wait for them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from monai.transforms.utils import create_rotate
from monai.utils import convert_to_dst_type, convert_to_tensor
from scipy.interpolate import BSpline
from torch.nn import functional as F

from scripts.running.condition_images import CONDITION_IMAGE


@lru_cache
def spline_basis(side: int, pieces: int) -> torch.Tensor:
    """Cubic B-splines over `pieces` equal parts of an axis, at its `side` voxels: (side, pieces + 3) float32."""
    knots = np.arange(-3.0, pieces + 4)
    return torch.from_numpy(BSpline.design_matrix(np.linspace(0, pieces, side), knots, 3).toarray()).float()


@lru_cache
def sharpening(side: int, lost: float) -> torch.Tensor:
    """A filter that gives back, on average, what linear interpolation takes away, as a matrix (side, side) float32.

    Between two voxels, at the share f of the way, linear interpolation passes 1 - 2 f (1 - f) (1 - cos(w)) of the power
    at the frequency w. The filter has 5 taps, the least-squares fit of one over the square root of that, and leaves a
    constant as it is.

    Args:
        lost: mean of 2 f (1 - f): 0 on voxels, 1/3 where all f are as frequent, 1/2 in the middle.
    """
    w = np.linspace(0, np.pi, 200)
    terms = np.stack([2 * np.cos(w) - 2, 2 * np.cos(2 * w) - 2], 1)  # the middle tap is 1 less the others
    first, second = np.linalg.lstsq(terms, (1 - lost * (1 - np.cos(w))) ** -0.5 - 1, rcond=None)[0]
    taps = [second, first, 1 - 2 * (first + second), first, second]
    return torch.from_numpy(sum(tap * np.eye(side, k=k) for k, tap in zip(range(-2, 3), taps))).float()


def sharpenings(grid: torch.Tensor, shape: Sequence[int]) -> list[torch.Tensor]:
    """The filter of each axis for a grid of `RandWarpd`. At 1/2 the highest frequency is lost whole: 0.47 at most."""
    sides = torch.tensor(shape[::-1])  # the order of a grid's last axis
    some = grid[(0, *[slice(None, None, 3)] * len(shape))].reshape(-1, len(shape))  # as many as a mean needs
    share = ((some + 1) / 2 * (sides - 1)) % 1
    lost = (2 * share * (1 - share)).mean(0).flip(0)
    return [sharpening(side, round(min(each, 0.47), 2)) for side, each in zip(shape, lost.tolist())]


def along_axes(x: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """A matrix (new side, side) along each spatial axis of (C, *spatial)."""
    for matrix in matrices:
        x = torch.tensordot(x, matrix, ([1], [1]))  # the axes come round in their order
    return x


def warped_channel(image: torch.Tensor, grid: torch.Tensor, filters: Sequence[torch.Tensor]) -> torch.Tensor:
    """(1, *spatial) with background 0, warped; one of 0 and 2 alone, a label above -1, by nearest neighbour."""
    if bool(((image == 0) | (image == 2)).all()):
        return F.grid_sample(image[None], grid, "nearest", "zeros", align_corners=True)[0]
    return F.grid_sample(along_axes(image, filters)[None], grid, "bilinear", "zeros", align_corners=True)[0]


class RandWarpd(RandomizableTransform, MapTransform):
    """Move, turn, stretch and bend an image at random, by linear interpolation that keeps its spectrum.

    The bending is a field of cubic B-splines whose control points are independent normal numbers. Every image of `keys`
    moves alike. Input and output: (1, *spatial) float, 2D or 3D, with 0 as background, which is what comes in from
    outside; a condition image (C, *spatial) has -1 there, and its label channels, of -1 and 1 alone, are not
    interpolated. Values may leave their range by a few percent at edges, as with splines.

    Args:
        prob: how often anything is done.
        rotate: largest angle about each axis, radians.
        translate: largest shift along each axis, as a share of the side.
        scale: largest change of each side, as a share of it.
        bend: largest root mean square of the bending, as a share of the longest side.
        pieces: of each axis, between control points.
    """

    def __init__(
        self,
        keys: KeysCollection,
        prob: float = 0.9,
        rotate: float = 0.1,
        translate: float = 0.025,
        scale: float = 0.06,
        bend: float = 0.004,
        pieces: int = 6,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.rotate, self.translate, self.scale, self.bend, self.pieces = rotate, translate, scale, bend, pieces

    def randomize(self, data: Any = None) -> None:
        super().randomize(None)
        dims, uniform = data, self.R.uniform
        self.angles = uniform(-self.rotate, self.rotate, 3 if dims == 3 else 1)
        self.shifts, self.scales = (uniform(-most, most, dims) for most in (self.translate, self.scale))
        self.bend_rms = uniform(0, self.bend)
        self.control = self.R.standard_normal((dims, *[self.pieces + 3] * dims))

    def grid(self, shape: Sequence[int]) -> torch.Tensor:
        """Where each voxel comes from, for `grid_sample`: (1, *shape, dims), from -1 to 1 inside of the image."""
        dims, sides = len(shape), np.array(shape, float)
        bases = [spline_basis(side, self.pieces) for side in shape]
        # a linear function comes out of splines as it is where their control points lie on it
        axis = np.arange(-1, self.pieces + 2) * 2 / self.pieces - 1
        places = np.stack(np.meshgrid(*[axis] * dims, indexing="ij"))
        linear = create_rotate(dims, self.angles.tolist())[:dims, :dims] @ np.diag(1 + self.scales)
        linear = linear * sides / sides[:, None]  # voxels are isotropic, the coordinates of `grid_sample` are not
        rms_of_basis = np.sqrt(np.prod([float(basis.square().sum(1).mean()) for basis in bases]))
        rms = 2 * self.bend_rms * sides.max() / sides
        column = (-1, *[1] * dims)
        displaced = np.tensordot(linear, places, 1) + 2 * self.shifts.reshape(column)
        control = displaced + self.control * (rms / rms_of_basis).reshape(column)
        field = along_axes(torch.from_numpy(control).float(), bases)
        return field.flip(0).movedim(0, -1)[None]  # x, y, z are the last, the middle, the first axis

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        item = dict(data)
        first = item[self.first_key(item)]
        self.randomize(first.ndim - 1)
        if not self._do_transform:
            return item
        grid = self.grid(first.shape[1:])
        filters = sharpenings(grid, first.shape[1:])
        for key in self.key_iterator(item):
            image = convert_to_tensor(item[key], dtype=torch.float32, track_meta=False)
            background = -1 if key == CONDITION_IMAGE else 0
            channels = [warped_channel(channel[None] - background, grid, filters) + background for channel in image]
            item[key] = convert_to_dst_type(torch.cat(channels), item[key])[0]
        return item
