"""What a network is shown of one subject, and the way of its volumes back to the grid of these images."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform, SpatialResample

from scripts.diffusion.sampler import DiffusionSampler
from scripts.running.condition_images import CONDITION_IMAGE, ConditionImage
from scripts.running.errors import BundleError


def own_grid(image: nib.Nifti1Image, voxel_size: float) -> tuple[np.ndarray, list[int]]:
    """(affine, shape) of an image's own grid, its voxels divided along each axis on which they are larger than
    `voxel_size` in mm, as thick slices are."""
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
    parts = np.maximum(1, np.round(spacing / voxel_size)).astype(int)
    finer = np.diag([*(1 / parts), 1.0])
    finer[:3, 3] = (1 / parts - 1) / 2  # the corner of the volume stays where it is
    return image.affine @ finer, (np.array(image.shape[:3]) * parts).tolist()


def on_grid(cube: MetaTensor, affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """A cube (1, *spatial) with its affine, 0 around it, on another grid by linear interpolation."""
    place = {"dst_affine": torch.as_tensor(affine), "spatial_size": list(shape)}
    onto = SpatialResample(mode="bilinear", padding_mode="zeros", dtype=torch.float64)
    return torch.as_tensor(onto(cube, **place))[0].numpy().astype(np.float32)


class Shown:
    """What the network is shown of one subject, and the way of a volume back to the grid of these images.

    Args:
        paths: {name of a condition image: path}, see `images_in`.
        known: see `scripts.running.condition_images`.
        transforms: the training's deterministic ones.

    Raises:
        BundleError: labels that the weights do not know.

    Attributes:
        image: the condition image, (C, *spatial) float32, see `scripts.running.condition_images`.
        affine: (4, 4), of the volumes of `sample`.
    """

    def __init__(
        self, paths: Mapping[str, str], known: Sequence[ConditionImage], transforms: Sequence[Callable]
    ) -> None:
        stack = [type(transform).__name__ for transform in transforms].index("StackConditionsd")
        cubes = Compose(transforms[:stack])(dict(paths))
        self.image = Compose(transforms[stack:])(dict(cubes))[CONDITION_IMAGE].float()
        first = known[0]["name"]
        self.cube = np.asarray(cubes[first].affine)
        self.affine, self.shape = own_grid(nib.load(paths[first]), float(np.linalg.norm(self.cube[:3, 0])))

    def sample(
        self, sampler: DiffusionSampler, noise: torch.Tensor, condition: torch.Tensor, postprocessing: Callable
    ) -> tuple[np.ndarray, np.ndarray]:
        """A volume on the images' own grid, and as it left the network: (X, Y, Z) in [0, 255], (*spatial) in [-1, 1].

        Args:
            sampler: with its weights.
            noise: (1, *spatial).
            condition: of the covariates, see `scripts.diffusion.asked.requests`.
            postprocessing: {"pred": volume in [-1, 1]} -> the same in [0, 255].
        """
        device = sampler.table.device
        drawn = torch.cat([noise.as_subclass(torch.Tensor), self.image])[None].to(device)
        result = sampler(drawn, condition[None].to(device))[0].float().cpu()
        voxels = torch.as_tensor(postprocessing({"pred": result})["pred"])
        return on_grid(MetaTensor(voxels, affine=self.cube), self.affine, self.shape), result[0].numpy()


class ShowImaged(MapTransform):
    """The path of an image becomes noise with what the network is shown of that image, as MONAI Label wants it.

    Output: (1 + C, *spatial) MetaTensor, see `scripts.diffusion.sampler.DiffusionSampler`, with the affine of the cube
    that the image was brought to, on which the volume will lie.

    Args:
        known, transforms: see `Shown`.
        draw_noise: (seed, volume) -> MetaTensor (1, *spatial).
        seed: of the noise; -1 is a new one each time.

    Raises:
        BundleError: the weights are shown nothing, or several images.
    """

    def __init__(
        self,
        keys: KeysCollection,
        known: Sequence[ConditionImage],
        transforms: Sequence[Callable],
        draw_noise: Callable[[int, int], MetaTensor],
        seed: int = -1,
    ) -> None:
        super().__init__(keys)
        if len(known) != 1:
            names = [each["name"] for each in known]
            raise BundleError(f"condition_images: these weights are shown {names}; expected weights that are shown one")
        self.known, self.transforms, self.draw_noise, self.seed = known, transforms, draw_noise, int(seed)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        for key in self.key_iterator(item):
            shown = Shown({self.known[0]["name"]: item[key]}, self.known, self.transforms)
            noise = self.draw_noise(self.seed, 0)
            both = torch.cat([noise.as_subclass(torch.Tensor), shown.image])
            meta = {**noise.meta, "affine": torch.as_tensor(shown.cube), "original_affine": shown.cube}
            item[key] = MetaTensor(both, meta=meta)
        return item
