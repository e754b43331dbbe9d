"""Synthetic volumes as NIfTI files, synthetic 2D images as PNG."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events

from scripts.slices import save_grey

logger = logging.getLogger(__name__)


def save_nifti(volume: np.ndarray, affine: np.ndarray, path: str, description: str) -> None:
    """Write a float32 volume (*spatial) with a RAS affine in mm; the file appears whole or not at all.

    sform and qform get code 2 (aligned): the axes are anatomical, but there was no scanner. `description` (79 bytes at
    most) goes into the header field `descrip`.
    """
    image = nib.Nifti1Image(volume.astype(np.float32), affine)
    image.set_sform(affine, code=2)
    image.set_qform(affine, code=2)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode()[:79]
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".partial_{name}")  # nibabel goes by the ending
    nib.save(image, temporary)
    os.replace(temporary, path)


class SaveVolumes:
    """Evaluator handler: write each volume of a batch as `output_dir`/sample_seed7_volume003.nii.gz, an image as .png.

    A volume of a class lies in a folder of its name, `output_dir`/glioma/, as training finds its images; one of no
    class lies in `output_dir` itself. Expects `engine.state.output` as a list of {"pred": (1, *spatial) in [0, 255]}
    and `engine.state.batch` as a list of {"image": MetaTensor of the noise, with `affine` and meta "seed" and "volume",
    "class_label": index in `class_names`, or their number for no class}.
    """

    def __init__(self, output_dir: str, class_names: Sequence[str] | None = None) -> None:
        self.output_dir, self.class_names = output_dir, class_names or []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        for item, output in zip(engine.state.batch, engine.state.output):
            noise = item["image"]
            seed, volume = int(noise.meta["seed"]), int(noise.meta["volume"])
            description = f"synthetic, brain_mri_ddpm_3d, seed {seed}, volume {volume}"
            folder, label = self.output_dir, int(item["class_label"])
            if label < len(self.class_names):
                folder = os.path.join(folder, self.class_names[label])
                description += f", {self.class_names[label]}"
            os.makedirs(folder, exist_ok=True)
            path = os.path.join(folder, f"sample_seed{seed}_volume{volume:03d}")
            voxels = torch.as_tensor(output["pred"])[0].cpu().numpy()
            path += ".png" if voxels.ndim == 2 else ".nii.gz"
            if voxels.ndim == 2:
                save_grey(voxels, path, description)
            else:
                save_nifti(voxels, noise.affine.numpy(), path, description)
            logger.info(f"wrote {path}")
