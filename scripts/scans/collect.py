"""The scans of a training: found, with what is known of each, and each looked into."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.scans.condition_images import ConditionImages
from scripts.scans.find import find_images
from scripts.scans.inspect import readable
from scripts.scans.participants import Covariates


def find_scans(
    dataset_dir: str,
    spatial_dims: int,
    mask_suffix: str | None = None,
    image_pattern: str | None = None,
    covariates: Covariates | None = None,
    condition_images: ConditionImages | None = None,
    skip_bad_files: bool | str = False,
    checked_path: str | None = None,
    exclude: Sequence[str] = (),
) -> list[dict]:
    """[{"image": path, "mask": path, "t2": path, "covariates": {name: value}}, ...], but for the first where asked for.

    Args:
        dataset_dir, spatial_dims, mask_suffix, image_pattern, exclude: see `find_images`.
        covariates: of the scans, see `Covariates.attached`; None without.
        condition_images: what lies beside each image; None without.
        skip_bad_files, checked_path: see `readable`.

    Raises:
        BundleError: see these functions.
    """
    beside = condition_images.suffixes if condition_images else None
    images = find_images(dataset_dir, mask_suffix, spatial_dims, image_pattern, exclude=exclude, beside=beside)
    images = covariates.attached(images) if covariates else images
    return readable(images, skip_bad_files, spatial_dims=spatial_dims, checked_path=checked_path)
