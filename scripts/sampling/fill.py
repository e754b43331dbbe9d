"""A part of a scan filled by the network, such as a lesion: from the scan's grid to the network's cube, and back."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, SpatialResample
from monai.utils import optional_import

from scripts.diffusion.fill import filled
from scripts.diffusion.sampler import DiffusionSampler
from scripts.running.condition_images import ConditionImage
from scripts.running.errors import BundleError
from scripts.running.pictures import mosaic, save_png, triplanar
from scripts.sampling.volumes import write_nifti
from scripts.scans.degraded import RandHoled, with_hole
from scripts.scans.find import stem

maximum_filter, _ = optional_import("scipy.ndimage", name="maximum_filter")
logger = logging.getLogger(__name__)
LEAST_KNOWN = 0.2  # of the brain; filling more is making one up


def read_known(known: str, known_mask: str) -> tuple[nib.Nifti1Image, np.ndarray]:
    """The scan, and where it is to be filled: boolean, of its shape.

    Raises:
        BundleError: a file that cannot be read, other grids, a mask without a hole, or one that leaves too little.
    """
    images = {}
    for key, path in (("known", known), ("known_mask", known_mask)):
        try:
            images[key] = nib.load(path)
            np.asarray(images[key].dataobj)
        except Exception as e:  # nibabel, zlib and numpy each raise their own
            raise BundleError(f"{key}: {path!r} cannot be read ({e}); expected a NIfTI image") from e
    scan, mask = images["known"], images["known_mask"]
    if scan.shape != mask.shape or not np.allclose(scan.affine, mask.affine, atol=1e-3):
        raise BundleError(
            f"known_mask: {known_mask!r} has the shape {mask.shape} and another grid than {known!r} with {scan.shape}; "
            "expected the same shape and affine"
        )
    if len(scan.shape) != 3:
        raise BundleError(f"known: {known!r} has the shape {scan.shape}; expected three dimensions")
    hole = np.asarray(mask.dataobj) > 0
    if not hole.any():
        raise BundleError(f"known_mask: {known_mask!r} has no voxel above 0; expected those that are to be filled")
    return scan, hole


class Geometry:
    """The cube of a scan, and the way back to the scan's own grid and intensities.

    Args:
        known, known_mask: paths of NIfTI files; what is above 0 in the mask is filled.
        to_cube: the training's transforms from a file to a cube that keeps its affine, {"image": path} -> MetaTensor
            (1, *spatial) >= 0 with background 0.
        scale: the training's transform to [-1, 1] after that.

    Attributes:
        cube: (1, *spatial) in [-1, 1].
        hole: boolean (1, *spatial): every voxel of the cube that the mask touches.
    """

    def __init__(self, known: str, known_mask: str, to_cube: Sequence[Callable], scale: Callable) -> None:
        self.scan, self.mask = read_known(known, known_mask)
        cube = Compose(to_cube)({"image": known})["image"]
        affine = torch.as_tensor(self.scan.affine)
        onto_cube = SpatialResample(mode="bilinear", padding_mode="zeros")
        place = {"dst_affine": cube.affine, "spatial_size": cube.shape[1:]}
        # finer than the cube's voxels, so that a small hole is not missed between them
        touched = onto_cube(MetaTensor(torch.as_tensor(spread(self.mask, cube, affine))[None], affine=affine), **place)
        self.hole = torch.as_tensor(touched) > 0.01
        brain = torch.as_tensor(cube) > 0.05 * cube.max()  # without the rim that resizing smears
        if (left := (brain & ~self.hole).sum() / brain.sum()) < LEAST_KNOWN:
            raise BundleError(
                f"known_mask: {known_mask!r} leaves {left:.0%} of the brain; expected {LEAST_KNOWN:.0%} or more"
            )
        cube[self.hole] = 0  # neither its darkest nor its brightest voxels count
        self.cube = scale({"image": cube})["image"]
        own = np.asarray(self.scan.dataobj, np.float32)
        here = torch.as_tensor(onto_cube(MetaTensor(torch.as_tensor(own)[None], affine=affine), **place))
        cube_values = torch.as_tensor(self.cube)
        inside = ~self.hole & (cube_values > -0.9) & (cube_values < 0.99)
        self.line = np.polyfit(cube_values[inside].numpy(), here[inside].numpy(), 1)  # intensities of the scan

    def back(self, volume: torch.Tensor) -> nib.Nifti1Image:
        """A filled cube (1, *spatial) as the scan with its hole filled; all else is bit for bit what it was."""
        cube = MetaTensor(torch.as_tensor(volume), affine=self.cube.affine)
        onto_scan = SpatialResample(mode="bilinear", padding_mode="border", dtype=torch.float64)
        values = onto_scan(cube, dst_affine=torch.as_tensor(self.scan.affine), spatial_size=self.scan.shape)
        values = np.polyval(self.line, torch.as_tensor(values)[0].numpy())
        slope, inter = self.scan.dataobj.slope, self.scan.dataobj.inter
        raw = np.array(self.scan.dataobj.get_unscaled())
        new = (values[self.mask] - inter) / slope
        if raw.dtype.kind in "iu":
            new = np.clip(np.rint(new), np.iinfo(raw.dtype).min, np.iinfo(raw.dtype).max)
        raw[self.mask] = new.astype(raw.dtype)
        result = nib.Nifti1Image(raw, self.scan.affine, self.scan.header)
        result.header.set_slope_inter(slope, inter)
        return result


def spread(mask: np.ndarray, cube: MetaTensor, affine: torch.Tensor) -> np.ndarray:
    """A mask as float32, made thicker where the voxels of the cube are larger than the scan's."""
    sizes = [np.linalg.norm(np.asarray(a)[:3, :3], axis=0) for a in (cube.affine, affine)]
    return maximum_filter(mask.astype(np.float32), size=np.maximum(1, np.ceil(sizes[0] / sizes[1])).astype(int))


def fill(
    sampler: DiffusionSampler,
    known: str | None,
    known_mask: str | None,
    transforms: Sequence[Callable],
    noise: Callable[[int, int], torch.Tensor],
    output_dir: str,
    num_samples: int = 1,
    seed: int = 0,
    repeats: int = 4,
    device: Any = "cpu",
    condition_images: Sequence[ConditionImage] = (),
) -> list[str]:
    """Write `num_samples` fillings of a scan, each on the scan's own grid, and a picture of all.

    A network that was trained on holes is shown the scan with its hole (`scripts.scans.degraded.with_hole`), and fills
    it with the sampler as it is; any other is steered by what is known.

    Args:
        sampler: with its weights. Its steps are taken with the ancestral solver, "ddpm": of a Gaussian whose answer is
            known it fills a hole within 6 % of the right spread, and those that look back at the step before diverge.
        known, known_mask: paths, see `Geometry`.
        transforms: the training's deterministic ones.
        noise: (seed, volume) -> (1, *spatial).
        output_dir: gets <name of the scan>_filled_seed0_volume000.nii.gz and filled.png.
        repeats: see `scripts.diffusion.fill.filled`.
        condition_images: of the network.

    Returns:
        the paths of the volumes.

    Raises:
        BundleError: no scan or mask given, and what `read_known` raises.
    """
    for key, path in (("known", known), ("known_mask", known_mask)):
        if not path:
            raise BundleError(f"{key}: nothing was given; expected the path of a NIfTI image")
    names = [type(transform).__name__ for transform in transforms]
    scale = names.index("ScaleForegroundd")
    geometry = Geometry(str(known), str(known_mask), transforms[:scale], transforms[scale])
    steps = len(sampler.timesteps)
    ancestral = sampler.with_steps(sampler.unet, num_inference_steps=steps, solver="ddpm", eta=None).to(device)
    cube, hole = (torch.as_tensor(part)[None].to(device) for part in (geometry.cube, geometry.hole))
    of_holes = [each["name"] for each in condition_images] == [each["name"] for each in RandHoled.condition_images]
    centre = [int(axis) for axis in torch.nonzero(hole[0, 0]).double().mean(0).round()]
    paths, strips = [], [triplanar(torch.where(hole, -1.0, cube)[0, 0].cpu().numpy(), centre)]
    os.makedirs(output_dir, exist_ok=True)
    for volume in range(num_samples):
        drawn = torch.as_tensor(noise(seed, volume))[None].to(device)
        if of_holes:
            made = sampler(torch.cat([drawn, with_hole(cube[0], hole[0])[None]], 1))
            result = torch.where(hole, made, cube)[0].float().cpu()
        else:
            result = filled(ancestral, drawn, cube, hole, repeats)[0].float().cpu()
        name = f"{stem(str(known))}_filled_seed{seed}_volume{volume:03d}.nii.gz"
        path = os.path.join(output_dir, name)
        content = geometry.back(result)
        content.header["descrip"] = f"partly synthetic, brain_mri_ddpm_3d, seed {seed}, volume {volume}".encode()
        write_nifti(content, path)
        logger.info(f"wrote {path}")
        paths.append(path)
        strips.append(triplanar(result[0].numpy(), centre))
    save_png(mosaic(strips), os.path.join(output_dir, "filled.png"), -1, 1)
    return paths
