"""What lies around the brain in a volume that came out of noise: a haze of specks, where real volumes have nothing.

In torch alone, so that a TorchScript archive does it, too, and on any device.
"""

from __future__ import annotations

import torch
from torch.nn.functional import max_pool3d


def largest_at_faces(values: torch.Tensor) -> torch.Tensor:
    """Of each element (*spatial) the largest of itself and of those that share a face with it."""
    met = values.clone()
    for axis in range(values.dim()):
        steps = values.shape[axis] - 1
        low, high = met.narrow(axis, 0, steps), met.narrow(axis, 1, steps)
        low.copy_(torch.maximum(low, values.narrow(axis, 1, steps)))
        high.copy_(torch.maximum(high, values.narrow(axis, 0, steps)))
    return met


def largest_region(mask: torch.Tensor) -> torch.Tensor:
    """The largest set of voxels of a boolean mask (*spatial) that are joined by their faces; none of an empty mask.

    Each voxel begins as a region with a number of its own. Then each region takes the largest number that it touches,
    and the number which that one has taken, until nothing changes.
    """
    count = mask.numel() + 1
    numbers = torch.arange(1, count, device=mask.device).reshape(mask.shape) * mask
    before = torch.zeros_like(numbers)
    while not torch.equal(numbers, before):
        before = numbers
        met = largest_at_faces(numbers) * mask
        taken = torch.zeros(count, dtype=torch.int64, device=mask.device)
        taken = taken.scatter_reduce(0, numbers.flatten(), met.flatten(), "amax")
        for _ in range(4):
            taken = taken[taken]
        numbers = taken[numbers]
    sizes = torch.bincount(numbers.flatten(), minlength=2)
    sizes[0] = 0
    return mask & (numbers == sizes.argmax())


def specks(brightness: torch.Tensor, level: float) -> torch.Tensor:
    """Where a faint voxel is no edge of anything: noise is as bright as what is around it, an edge fades from a brain.

    In 233 real brains at 64 x 64 x 64 the mean of the 26 neighbours of a voxel below 0.02 is at least 1.26 times as
    bright as it, and the brightest of its neighbours at a face at least 1.6 times.

    Args:
        brightness: (*spatial), 2D or 3D, 0 is background.
        level: voxels below it are faint.

    Returns:
        a boolean mask (*spatial)
    """
    box = brightness
    for axis in range(brightness.dim()):
        before, steps = box, box.shape[axis] - 1
        box = before.clone()
        box.narrow(axis, 0, steps).add_(before.narrow(axis, 1, steps))
        box.narrow(axis, 1, steps).add_(before.narrow(axis, 0, steps))
    around = (box - brightness) / (3 ** brightness.dim() - 1)
    alone = (around < 1.25 * brightness) | (largest_at_faces(brightness) < 1.5 * brightness)
    return alone & (brightness > 0) & (brightness < level)


def without_haze(volumes: torch.Tensor, level: float) -> torch.Tensor:
    """Volumes in which all is -1 but the largest region above a level, and the voxels that fade from it.

    These touch the region, and are no `specks` of less than two thirds of the level, however often one looks: what a
    speck has hidden may be one. Of 233 real brains at 64 x 64 x 64 and level 0.03 none is changed.

    Args:
        volumes: (B, 1, *spatial) in [-1, 1], 2D or 3D.
        level: as a share of the range, 0 to 1; 0 changes nothing.
    """
    if level == 0:
        return volumes
    kept: list[torch.Tensor] = []
    for volume in volumes:
        region = largest_region(volume[0] >= 2 * level - 1)
        sides = list(region.shape) + [1] * (3 - region.dim())
        touched = max_pool3d(region.reshape([1, 1] + sides).float(), 3, 1, 1).reshape(region.shape) > 0
        brightness = torch.where(touched, (volume[0].float() + 1) / 2, 0)
        alone = specks(brightness, level * 2 / 3)
        while bool(alone.any()):
            brightness = torch.where(alone, 0, brightness)
            alone = specks(brightness, level * 2 / 3)
        kept.append(torch.where(brightness > 0, volume, torch.full_like(volume, -1.0)))
    return torch.stack(kept)
