"""Images in 2D: PNG, JPEG and NIfTI slices read as grey images of one convention, and samples written as PNG.

In memory the first axis of an image runs to the right and the second upwards, as in an axial NIfTI slice turned to RAS;
in a PNG rows run downwards.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, NibabelReader, PILReader
from monai.transforms import MapTransform, SqueezeDim
from monai.utils import convert_to_dst_type, ensure_tuple
from PIL import Image, PngImagePlugin

from scripts.running.files import write_atomically

PICTURES = (".png", ".jpg", ".jpeg")
OVERVIEWS = ("mosaic.png", "denoising.png")  # `inference.json` writes them into the folder of its samples


def is_picture(path: str) -> bool:
    """Whether a file is a PNG or JPEG, by its name, and not an overview of others."""
    return path.lower().endswith(PICTURES) and os.path.basename(path) not in OVERVIEWS


def grey(image: Image.Image) -> Image.Image:
    """Any picture in shades of grey: 8 bits, or as it is where it has 16 or more (which "L" would cut off at 255)."""
    return image if image.mode[0] in "IF" else image.convert("L")


class SliceReader(PILReader):
    """PNG and JPEG as grey pictures, every other file as NIfTI.

    MONAI gives a picture no affine, and it would be upside down beside NIfTI slices; here the affine says that its rows
    run downwards, 1 mm a pixel, so that `Orientationd` turns both alike.
    """

    def __init__(self) -> None:
        super().__init__(converter=grey)
        self.nifti = NibabelReader()

    def read(self, data: str | Sequence[str], **kwargs: Any) -> Any:
        reader = super() if all(is_picture(str(path)) for path in ensure_tuple(data)) else self.nifti
        return reader.read(data, **kwargs)

    def get_data(self, img: Any) -> tuple[np.ndarray, dict[str, Any]]:
        if not isinstance(img, Image.Image):
            return self.nifti.get_data(img)
        data, meta = super().get_data(img)
        return data, meta | {"affine": np.diag([1.0, -1.0, 1.0, 1.0])}


class ScaleGreyd(MapTransform):
    """(1, W, H) or (1, W, H, 1) of any type -> (1, W, H) float32 in [0, 1].

    What is stored in 8 bits has a black and a white of its own, y = x / 255; the rest (16 bits, floating point) is
    scaled from its minimum and maximum. Load with `dtype` null, which keeps the type.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.squeeze = SqueezeDim(dim=-1)

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        item = dict(data)
        for key in self.key_iterator(item):
            image = self.squeeze(item[key]) if item[key].ndim == 4 else item[key]
            values = image.as_tensor()
            if values.dtype == torch.uint8:
                values = values.float() / 255
            else:
                values = values.double()
                values = (values - values.min()) / (values.max() - values.min())
            item[key] = convert_to_dst_type(values, image, dtype=torch.float32)[0]
        return item


def save_grey(image: np.ndarray, path: str, description: str, made_with: str = "") -> None:
    """Write an image (W, H) in [0, 255] as an 8-bit grey PNG, upright; the file appears whole or not at all.

    `description` goes into its text field "Description", `made_with` into "Settings".
    """
    picture = Image.fromarray(np.rint(np.rot90(image)).clip(0, 255).astype(np.uint8))
    text = PngImagePlugin.PngInfo()
    text.add_text("Description", description)
    text.add_text("Settings", made_with)
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG", pnginfo=text))
