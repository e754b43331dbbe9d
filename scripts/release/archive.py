"""The bundle as others receive it: a zip for `monai.bundle download`, folders for the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import posixpath
import re
import shutil
import stat
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from scripts.running.errors import BundleError
from scripts.running.files import write_atomically

logger = logging.getLogger(__name__)
APP = """from monai.bundle import run

run("page", config_file="configs/page.json", host="0.0.0.0")
"""
SPACE = """# Synthetic brain MRI

A network draws volumes out of noise while one watches. Synthetic, for research only. What the network was trained on,
and what it can and cannot do, is said in docs/README.md.
"""
RELATIVE_LINK = re.compile(r"\]\((?!\w+:|[#/])([^)\s]+)")


def release_files(bundle_root: str, contents: Sequence[str]) -> list[str]:
    """The files that belong to a release: sorted paths below `bundle_root` that match patterns such as "docs/*.md".

    Raises:
        BundleError: nothing matches one of the patterns.
    """
    files: set[str] = set()
    for pattern in contents:
        found = {p.relative_to(bundle_root).as_posix() for p in Path(bundle_root).glob(pattern) if p.is_file()}
        if not found:
            raise BundleError(f"contents: {pattern!r} matches no file in {bundle_root!r}; a release needs at least one")
        files |= found
    return sorted(files)


def write_archive(bundle_root: str, contents: Sequence[str], name: str, path: str) -> None:
    """Write a zip with the one top folder `name`, as `monai.bundle download` unpacks it.

    The same files give the same bytes on every machine: members are sorted, have one time and one mode, and are stored
    as they are (compressors differ from machine to machine, and weights do not shrink).

    Args:
        bundle_root: folder of the bundle.
        contents: patterns, see `release_files`.
        name: of the bundle.
        path: of the zip; `monai.bundle download` looks for NAME_vVERSION.zip.

    Raises:
        BundleError: a file is missing, or `path` cannot be written.
    """
    files = release_files(bundle_root, contents)

    def write(temporary: str) -> None:
        with zipfile.ZipFile(temporary, "w") as archive:
            for file in files:
                member = zipfile.ZipInfo(f"{name}/{file}")  # its time is 1980-01-01
                member.create_system = 3  # Unix, whose modes follow
                member.external_attr = (stat.S_IFREG | 0o644) << 16
                archive.writestr(member, Path(bundle_root, file).read_bytes())

    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    write_atomically(path, write)
    logger.info(f"wrote {path}, {len(files)} files, sha256 {hashlib.sha256(Path(path).read_bytes()).hexdigest()}")


def relinked(text: str, source: str, target: str) -> str:
    """Markdown of the page `source`, its relative links as the page `target` needs them; both are paths in a bundle."""

    def link(found: re.Match) -> str:
        aim = posixpath.join(posixpath.dirname(source), found[1])
        return "](" + posixpath.relpath(aim, posixpath.dirname(target) or ".")

    return RELATIVE_LINK.sub(link, text)


@contextmanager
def new_folder(bundle_root: str, contents: Sequence[str], path: str) -> Iterator[Path]:
    """The files of a release in a folder that appears at `path` once the block has added the rest.

    Args:
        bundle_root: folder of the bundle.
        contents: patterns, see `release_files`.
        path: the folder, which must not exist: what an earlier release left there would be uploaded too.

    Raises:
        BundleError: a file is missing, or `path` exists.
    """
    files = release_files(bundle_root, contents)
    if os.path.exists(path):
        raise BundleError(
            f"hub_folder, space_folder: {path!r} is there already; remove it or name a folder that is yet to be made"
        )
    parent = os.path.dirname(os.path.abspath(path))
    os.makedirs(parent, exist_ok=True)
    with TemporaryDirectory(dir=parent) as temporary:
        folder = Path(temporary, "whole")
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(bundle_root, file), folder / file)
        yield folder
        os.replace(folder, path)
    logger.info(f"wrote {path}, {len(files)} files of the bundle")


def with_head(card: dict[str, Any], text: str) -> str:
    """A page of the hub: keys and values between lines of dashes, then the text. JSON values are YAML values."""
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in card.items()) + f"---\n\n{text}"


def write_hub_folder(bundle_root: str, contents: Sequence[str], card: dict[str, Any], path: str) -> None:
    """Lay out the folder that `hf upload` sends and `huggingface_hub.snapshot_download` brings back.

    It is the bundle, but the hub shows README.md as the model card: that is docs/README.md with a YAML head here, and
    the bundle's own README.md becomes docs/usage.md.

    Args:
        bundle_root, contents, path: see `new_folder`.
        card: the head's keys and values, https://huggingface.co/docs/hub/model-cards.

    Raises:
        BundleError: see `new_folder`.
    """
    with new_folder(bundle_root, contents, path) as folder:
        for page in folder.glob("docs/*.md"):
            page.write_text(page.read_text().replace("](../README.md", "](usage.md"))
        readme, model_card = (Path(bundle_root, file).read_text() for file in ("README.md", "docs/README.md"))
        (folder / "docs/usage.md").write_text(relinked(readme, "README.md", "docs/usage.md"))
        (folder / "README.md").write_text(with_head(card, relinked(model_card, "docs/README.md", "README.md")))


def write_space_folder(bundle_root: str, contents: Sequence[str], card: dict[str, Any], path: str) -> None:
    """Lay out a Space of the hub: the bundle, and an app.py that opens its page (`run page`).

    Args:
        bundle_root, contents, path: see `new_folder`.
        card: the head's keys and values, https://huggingface.co/docs/hub/spaces-config-reference.

    Raises:
        BundleError: see `new_folder`.
    """
    with new_folder(bundle_root, contents, path) as folder:
        needed = [(folder / f"requirements{part}.txt").read_text() for part in ("", "-page")]
        (folder / "requirements.txt").write_text("".join(needed))
        (folder / "app.py").write_text(APP)
        (folder / "README.md").write_text(with_head(card, SPACE))
