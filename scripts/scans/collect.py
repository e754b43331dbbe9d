"""The scans of a training: found, with what is known of each, and each looked into."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.scans.find import find_images
from scripts.scans.inspect import readable
from scripts.scans.participants import Covariates


def find_scans(
    dataset_dir: str,
    spatial_dims: int,
    mask_suffix: str | None = None,
    image_pattern: str | None = None,
    covariates: Covariates | None = None,
    skip_bad_files: bool | str = False,
    checked_path: str | None = None,
    exclude: Sequence[str] = (),
) -> list[dict]:
    """[{"image": path, "mask": path, "covariates": {name: value}}, ...], the latter two where they are asked for.

    Args:
        dataset_dir, spatial_dims, mask_suffix, image_pattern, exclude: see `find_images`.
        covariates: of the scans, see `Covariates.attached`; None without.
        skip_bad_files, checked_path: see `readable`.

    Raises:
        BundleError: see these functions.
    """
    images = find_images(dataset_dir, mask_suffix, spatial_dims, image_pattern, exclude=exclude)
    images = covariates.attached(images) if covariates else images
    return readable(images, skip_bad_files, spatial_dims=spatial_dims, checked_path=checked_path)
