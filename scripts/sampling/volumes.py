"""Synthetic volumes as NIfTI files, synthetic 2D images as PNG, and what their headers say of their making."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from nibabel.filebasedimages import ImageFileError
from PIL import Image
from torch import nn

from scripts.running.errors import BundleError
from scripts.running.files import write_atomically
from scripts.scans.images_2d import save_grey

logger = logging.getLogger(__name__)
TORN = (OSError, EOFError, ValueError, SyntaxError, zlib.error, ImageFileError)  # what reading a damaged file raises


def save_nifti(volume: np.ndarray, affine: np.ndarray, path: str, description: str, made_with: str = "") -> None:
    """Write a float32 volume (*spatial) with a RAS affine in mm; the file appears whole or not at all.

    sform and qform get code 2 (aligned): the axes are anatomical, but there was no scanner. `description` (79 bytes at
    most) goes into the header field `descrip`, `made_with` (16 bytes at most) into `intent_name`. Nothing else of the
    machine is in the file: no name, no path, no time.

    Raises:
        BundleError: it cannot be written.
    """
    image = nib.Nifti1Image(volume.astype(np.float32), affine)
    image.set_sform(affine, code=2)
    image.set_qform(affine, code=2)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode()[:79]
    image.header["intent_name"] = made_with.encode()[:16]
    write_nifti(image, path)


def write_nifti(image: nib.Nifti1Image, path: str) -> None:
    """Write an image, packed where the path ends in .gz; the file appears whole or not at all, and holds no time.

    Raises:
        BundleError: it cannot be written.
    """
    content = image.to_bytes()
    if path.endswith(".gz"):
        content = gzip.compress(content, compresslevel=1, mtime=0)  # as fast as nibabel's own
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(content))


def made_with(path: str) -> str | None:
    """What `SaveVolumes` noted in the header of a sample, "" where it noted nothing, None for a damaged header."""
    try:
        if path.endswith(".png"):
            with Image.open(path) as picture:
                return picture.info.get("Settings", "")
        return nib.load(path).header["intent_name"].item().decode()
    except TORN:
        return None


def read_sample(path: str) -> np.ndarray:
    """The voxels (*spatial) of a sample, read to the last byte; an image as `save_grey` got it.

    Raises:
        one of TORN: the file is damaged.
    """
    if path.endswith(".png"):
        with Image.open(path) as picture:
            return np.rot90(np.asarray(picture, np.float32), -1)
    if not path.endswith(".gz"):
        return np.asarray(nib.load(path).dataobj)
    with gzip.open(path) as file:  # to its end, where the checksum is; nibabel stops after the last voxel
        return np.asarray(nib.Nifti1Image.from_bytes(file.read()).dataobj)


def weights_digest(network: nn.Module) -> str:
    """A hash of every tensor of a state dict, 32 characters."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class SaveVolumes:
    """Evaluator handler: write each volume of a batch as `output_dir`/sample_seed7_volume003.nii.gz, an image as .png.

    A volume of a class lies in a folder of its name, `output_dir`/glioma/, as training finds its images; any other one
    in `output_dir` itself. Expects `engine.state.output` as a list of {"pred": (1, *spatial) in [0, 255]}
    and `engine.state.batch` as a list of {"image": MetaTensor of the noise, with `affine` and meta "seed" and "volume",
    and what `scripts.diffusion.asked.requests` says of it}.

    Args:
        output_dir: folder of the volumes.
        network: that makes them, with its weights, or None.
        settings: everything else that the voxels depend on besides seed, volume and class, as JSON.

    Raises:
        BundleError: a volume is not finite, or cannot be written.
    """

    def __init__(
        self, output_dir: str, network: nn.Module | None = None, settings: Mapping[str, Any] | None = None
    ) -> None:
        self.output_dir = output_dir
        self.network, self.settings = network, settings or {}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    @cached_property
    def made_with(self) -> dict[str, Any]:
        """The settings, as JSON gives them back, and a hash of the weights."""
        weights = {"weights": weights_digest(self.network)} if self.network is not None else {}
        return json.loads(json.dumps({**self.settings, **weights}))

    @cached_property
    def mark(self) -> str:
        """16 characters that stand for `made_with`, for the headers."""
        text = json.dumps(self.made_with, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def path(self, seed: int, volume: int, request: Mapping[str, Any], spatial_dims: int) -> str:
        """Of one volume."""
        ending = request["suffix"] + (".png" if spatial_dims == 2 else ".nii.gz")
        return os.path.join(self.output_dir, request["folder"], f"sample_seed{seed}_volume{volume:03d}{ending}")

    def __call__(self, engine: Engine) -> None:
        for item, output in zip(engine.state.batch, engine.state.output):
            self.save(item, output["pred"])

    def save(self, item: Mapping[str, Any], pred: torch.Tensor) -> str:
        """Write one volume of a batch, (1, *spatial) in [0, 255], and return its path."""
        noise = item["image"]
        seed, volume = int(noise.meta["seed"]), int(noise.meta["volume"])
        voxels = torch.as_tensor(pred)[0].cpu().numpy()
        path = self.path(seed, volume, item, voxels.ndim)
        if bad := np.count_nonzero(~np.isfinite(voxels)):
            raise BundleError(
                f"{path!r} was not written: {bad} of its {voxels.size} voxels are NaN or infinite; expected "
                "finite weights, --amp float32 or another solver"
            )
        os.makedirs(os.path.dirname(path), exist_ok=True)
        description = f"synthetic, brain_mri_ddpm_3d, seed {seed}, volume {volume}"
        description += f", {item['said']}" if item["said"] else ""
        if voxels.ndim == 2:
            save_grey(voxels, path, description, self.mark)
        else:
            save_nifti(voxels, noise.affine.numpy(), path, description, self.mark)
        logger.info(f"wrote {path}")
        return path
