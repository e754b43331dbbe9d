"""From a folder of scans, or of pictures where images are 2D, to the files to train on and the held-out ones."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from nibabel import Nifti1Pair

from scripts.running.errors import BundleError
from scripts.scans.images_2d import OVERVIEWS, is_picture

logger = logging.getLogger(__name__)
# What MONAI's reader takes: NIfTI files, NIfTI pairs (of which the .img is listed) and FreeSurfer's files.
VOLUME = re.compile(r"\.(nii(\.(gz|bz2))?|img(\.gz)?|mgh|mgz)$", re.IGNORECASE)
# What is no image by the last word of its name: BIDS, BraTS, FreeSurfer.
NO_IMAGE = re.compile(
    r"(?:^|[-_.+])(dseg|probseg|brainmask|mask|roi|labels?|seg|aseg|aparc|wmparc|ribbon|xfm|warp)$", re.IGNORECASE
)
OTHER_SCANS = frozenset("dcm ima nrrd nhdr mha mhd mnc par rec head brik img hdr nii".split())  # endings not read


def stem(path: str) -> str:
    """File name without folder and without the ending of a volume or picture, in any case."""
    name = os.path.basename(path)
    return re.sub(r"\.(png|jpe?g)$", "", VOLUME.sub("", name), flags=re.IGNORECASE)


def is_image(path: str, spatial_dims: int = 3) -> bool:
    """Whether a file is a volume by its name, or in 2D a picture."""
    return VOLUME.search(path) is not None or spatial_dims == 2 and is_picture(path)


def header_of(path: str) -> str:
    """The file that holds the header of a volume: itself, or the .hdr of an .img."""
    if not path.lower().endswith((".img", ".img.gz")):
        return path
    return Nifti1Pair.filespec_to_file_map(path)["header"].filename


def files_below(folder: str, key: str = "dataset_dir") -> list[str]:
    """Every file below a folder, sorted; hidden files and folders (.git, ._x.nii) are passed over.

    Links to folders are followed, each folder once, so that one that leads back ends there. Links to nothing are files.
    A missing folder has no files.

    Raises:
        BundleError: a folder that cannot be opened; `key` is what the user knows it by.
    """

    def refuse(error: OSError) -> None:
        if os.path.lexists(folder):
            reason = f"{error.filename!r} cannot be searched ({error.strerror})"
            raise BundleError(f"{key}: {reason}; expected folders that can be read") from error

    files, seen, waiting = [], set(), [folder]
    while waiting:  # links come last: a file that has two paths gets the one without
        for place, subfolders, names in os.walk(waiting.pop(0), onerror=refuse):
            real = os.path.realpath(place)
            if real in seen:
                subfolders.clear()
                continue
            seen.add(real)
            shown = sorted(name for name in subfolders if name[0] != ".")
            links = [name for name in shown if os.path.islink(os.path.join(place, name))]
            waiting += [os.path.join(place, name) for name in links]
            subfolders[:] = [name for name in shown if name not in links]
            files += [str(Path(place, name)) for name in names if name[0] != "."]
    return sorted(files)


def volumes_below(folder: str) -> list[str]:
    """The volumes below a folder, whatever their names say they hold, sorted."""
    return [file for file in files_below(folder) if VOLUME.search(file)]


def find_images(
    dataset_dir: str,
    mask_suffix: str | None = None,
    spatial_dims: int = 3,
    image_pattern: str | None = None,
    key: str = "dataset_dir",
    exclude: Sequence[str] = (),
    beside: Mapping[str, str] | None = None,
) -> list[dict[str, str]]:
    """All images below a folder, sorted by path; the log counts what is left out.

    Args:
        dataset_dir: searched with its sub-folders and linked ones, see `files_below`; a missing folder gives an empty
            list (see `require`).
        mask_suffix: for example "_mask": `sub-01_mask.nii.gz` is then the brain mask of `sub-01.nii.gz`.
        spatial_dims: 3 finds volumes; 2 also PNG and JPEG.
        image_pattern: which files are images, such as "*_T1w.nii.gz" or, from `dataset_dir`, "sub-*/anat/*"; None for
            all whose names do not end as those of masks, label maps and the like (NO_IMAGE) do.
        key: what the user knows the folder by.
        exclude: names or patterns, as `image_pattern`, of images to leave out; a path without a pattern may also be
            given from `dataset_dir`.
        beside: {"t2": "_T2w"}: `sub-01_T2w.nii.gz` is then the "t2" of `sub-01.nii.gz`, or of `sub-01_T1w.nii.gz`.

    Returns:
        [{"image": path}, ...], with "mask": path where `mask_suffix` is given, and paths for what is `beside`.

    Raises:
        BundleError: an image that lacks its mask although `mask_suffix` is given, or what is to be beside it; masks in
            2D; a pattern, or an entry of `exclude`, that fits no file.
    """
    if mask_suffix and spatial_dims == 2:
        raise BundleError(f"mask_suffix: {mask_suffix!r} was given, but 2D images are not masked; expected null")
    if image_pattern is not None and (not isinstance(image_pattern, str) or not image_pattern):
        right = "expected null or a pattern such as '*_T1w.nii.gz'"
        raise BundleError(f"image_pattern: {image_pattern!r} was given; {right}")
    every = files_below(dataset_dir, key)
    files = [file for file in every if is_image(file, spatial_dims)]
    tell_of_others(key, every, files)
    ends = tuple(filter(None, [mask_suffix, *(beside or {}).values()]))
    partners = {(os.path.dirname(f), stem(f)): f for f in files if ends and stem(f).endswith(ends)}
    files = [f for f in files if not ends or not stem(f).endswith(ends)]
    if image_pattern is None:
        images = without_labels(key, files)
    else:
        images = [f for f in files if fits(f, image_pattern, dataset_dir)]
        if files and not images:
            raise BundleError(
                f"image_pattern: {image_pattern!r} fits none of the {len(files)} files in {key}, such as "
                f"{os.path.relpath(files[0], dataset_dir)!r}; expected a pattern of some of them"
            )
        logger.info(f"{key}: {len(images)} of {len(files)} files fit the image_pattern {image_pattern!r}")
    images = without_excluded(key, once(key, images), exclude, dataset_dir)
    items = [{"image": f} for f in images]
    if mask_suffix:
        add_partners(items, "mask", [(f, stem(f) + mask_suffix) for f in images], partners, "mask_suffix", mask_suffix)
    for name, suffix in (beside or {}).items():
        wanted = [(f, *(base + suffix for base in (stem(f), stem(f).rpartition("_")[0]))) for f in images]
        add_partners(items, name, wanted, partners, "condition_images", suffix)
    return items


def add_partners(
    items: list[dict[str, str]],
    name: str,
    wanted: Sequence[tuple[str, ...]],
    partners: Mapping[tuple[str, str], str],
    key: str,
    suffix: str,
) -> None:
    """Give each item the path of a file beside its image.

    Args:
        items: receive `name`.
        wanted: of each item the image, and the names without ending that the file may have, the best first.
        partners: {(folder, name without ending): path}.
        key, suffix: for the message.

    Raises:
        BundleError: an image without that file.
    """
    without = []
    for item, (image, *names) in zip(items, wanted, strict=True):
        found = [partners[place] for end in names if (place := (os.path.dirname(image), end)) in partners]
        if found:
            item[name] = found[0]
        else:
            without.append((image, names[0]))
    if without:
        raise BundleError(
            f"{key}: {suffix!r} was given, but {len(without)} of {len(items)} images have no {name} beside "
            f"them, for example {without[0][0]!r} (expected {without[0][1]}.nii.gz)"
        )


def without_excluded(key: str, images: Sequence[str], exclude: Sequence[str], folder: str) -> list[str]:
    """The images that no entry of `exclude` fits; each must fit one."""
    excluded = set()
    for entry in exclude:
        found = [file for file in images if fits(file, entry, folder) or os.path.relpath(file, folder) == entry]
        if images and not found:
            raise BundleError(
                f"exclude: {entry!r} fits none of the {len(images)} images in {key}, such as "
                f"{os.path.relpath(images[0], folder)!r}; expected names or patterns of some of them"
            )
        excluded.update(found)
    if excluded:
        logger.info(f"{key}: {len(excluded)} of {len(images)} images are left out by exclude")
    return [file for file in images if file not in excluded]


def fits(file: str, pattern: str, folder: str) -> bool:
    """Whether the name of a file fits a pattern with * ? []; with a slash in it, the path from `folder`."""
    return fnmatchcase(os.path.relpath(file, folder) if "/" in pattern else os.path.basename(file), pattern)


def counted(words: Iterable[str]) -> str:
    """Each word with how often it is there, as in nrrd (4), json (2): the most frequent first, up to ten."""
    common = Counter(words).most_common()
    return ", ".join(f"{word} ({count})" for word, count in common[:10]) + (", ..." if len(common) > 10 else "")


def ending_of(path: str) -> str:
    """What follows the last dot of a file's name, in lower case, with what stands before .gz and its like."""
    found = re.search(r"\.([^.]+(?:\.(?:gz|bz2|zst|xz|z|zip))?)$", os.path.basename(path).lower())
    return found.group(1) if found else "no ending"


def tell_of_others(key: str, every: Sequence[str], images: Sequence[str]) -> None:
    """Count the files that are passed over by their endings, as a warning where there are scans among them."""
    known = {*images, *map(header_of, images)}
    others = [file for file in every if file not in known and os.path.basename(file) not in OVERVIEWS]
    nowhere = [file for file in others if ending_of(file) == "no ending" and not os.path.exists(file)]
    if nowhere:
        logger.warning(f"{key}: {len(nowhere)} links lead to nothing and are passed over, for example {nowhere[0]!r}")
    endings = [ending_of(file) for file in others if file not in nowhere]
    if endings:
        scans = any(ending.split(".")[0] in OTHER_SCANS for ending in endings)
        advice = "; of scans NIfTI (.nii, .nii.gz) and FreeSurfer's .mgz are read" if scans else ""
        logger.log(
            logging.WARNING if scans else logging.INFO,
            f"{key}: {len(endings)} files are passed over by their endings: {counted(endings)}{advice}",
        )


def without_labels(key: str, files: Sequence[str]) -> list[str]:
    """The files whose names do not end as those of masks, label maps and the like do; the others are counted."""
    found = {file: ending.group(1).lower() for file in files if (ending := NO_IMAGE.search(stem(file)))}
    if found:
        logger.warning(
            f"{key}: {len(found)} of {len(files)} files are taken for masks, label maps or transforms by the ends of "
            f"their names and left out: {counted(found.values())}; image_pattern says which files are images"
        )
    return [file for file in files if file not in found]


def once(key: str, files: Sequence[str]) -> list[str]:
    """The files without those that are another one's file too, by a link."""
    first: dict[str, str] = {}
    for file in files:
        first.setdefault(os.path.realpath(file), file)
    if len(first) < len(files):
        again = next(file for file in files if first[os.path.realpath(file)] != file)
        logger.warning(
            f"{key}: {len(files) - len(first)} of {len(files)} images are links to others of them and left out, for "
            f"example {again!r}, which is {first[os.path.realpath(again)]!r}"
        )
    return list(first.values())


def require(dataset_dir: str, training: Sequence, class_names: Sequence[str] | None = None) -> None:
    """Raises BundleError where there is nothing to train on, of all or of one class.

    Nothing held out is no error: `split_by_subject` holds out a subject at least, MONAI Label does so only on request.
    """
    if training:
        conditions = [item.get("condition") for item in training]
        labels = {c[0] if isinstance(c, list) else c for c in conditions}  # the class is the first covariate
        without = [name for label, name in enumerate(class_names or ()) if label not in labels]
        if without:
            raise BundleError(
                f"class_names: of {len(training)} images to train on none is of {without}; expected at least one of "
                f"each of {list(class_names)}"
            )
        return
    found = "it holds no usable images" if os.path.isdir(dataset_dir) else "there is no such folder"
    raise BundleError(
        f"dataset_dir: {str(dataset_dir)!r}: {found}; expected a folder with at least two volumes "
        "(.nii, .nii.gz or .mgz; in 2D also .png or .jpg), in MONAI Label images with a final label, or "
        "no folder at all and configs/presets/demo.json"
    )
