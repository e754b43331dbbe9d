"""The scans as training takes them, as pictures and as a table, before hours are spent on them."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Sequence

import ignite.distributed as idist
import numpy as np
from PIL import Image, ImageDraw

from scripts.running.files import write_atomically, write_text
from scripts.scans.brains import for_each
from scripts.scans.find import stem
from scripts.scans.outliers import QUANTITIES, Brain, measured, outliers, table_of

logger = logging.getLogger(__name__)
ACROSS, DOWN = 4, 8  # scans of a page
MOST_PAGES = 20
CAPTION = 14  # rows of a line of text
LISTED = 20  # outliers of the log; the table has all


def page_of(brains: Sequence[Brain], captions: Sequence[str], marked: Sequence[bool]) -> Image.Image:
    """Brains in rows of four, each with a line of text above; those that are marked have it in orange."""
    rows = brains[0].slices[0].shape[0]
    width, height = 3 * rows + 6, rows + CAPTION + 4
    lines = -(-len(brains) // ACROSS)
    page = Image.new("RGB", (ACROSS * width, lines * height))
    draw = ImageDraw.Draw(page)
    for i, (brain, caption, mark) in enumerate(zip(brains, captions, marked, strict=True)):
        x, y = i % ACROSS * width, i // ACROSS * height
        for k, (cut, rim) in enumerate(zip(brain.slices, brain.outlines, strict=True)):
            colours = np.repeat(cut[..., None], 3, -1)
            colours[rim] = (255, 60, 60)
            page.paste(Image.fromarray(colours), (x + k * rows, y + CAPTION))
        draw.text((x + 2, y + 1), caption.encode("latin-1", "replace").decode("latin-1"), "orange" if mark else "white")
    return page


def write_table(path: str, files: Sequence[str], values: np.ndarray, found: dict[int, str]) -> None:
    """A CSV file with a line a scan: its quantities, and what stands out."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", *(quantity.name for quantity in QUANTITIES), "stands_out"])
    for row, (file, line) in enumerate(zip(files, values, strict=True)):
        writer.writerow([file, *(f"{value:.5g}" for value in line), found.get(row, "")])
    write_text(path, text.getvalue())


def look_at(
    images: Sequence[dict[str, str]], output_dir: str, folder: str, key: str = "dataset_dir"
) -> tuple[list[str], np.ndarray]:
    """Draw all scans with the outlines of their brains, measure them, and say which stand out. Collective.

    Writes `output_dir`/brains.png (then brains_2.png, ...; 32 scans a page, those that stand out first, 20 pages at
    most) and brains.csv, before training begins. Nothing is left out: the user does that, by `exclude`.

    Args:
        images: [{"image": path, "mask": path}, ...] of volumes; without a mask the brain is what is no background.
        folder: from which files are named.
        key: what the user knows it by.

    Returns:
        (files, values), see `scripts.scans.outliers.table_of`.
    """
    brains = for_each(measured, images, "looking at the scans")
    files = [os.path.relpath(item["image"], folder) for item in images]
    values = table_of(brains)
    found = outliers(values)
    if idist.get_rank() > 0:
        return files, values
    os.makedirs(output_dir, exist_ok=True)
    order = [*found, *(row for row in range(len(files)) if row not in found)]
    size = ACROSS * DOWN
    for number in range(min(MOST_PAGES, -(-len(order) // size))):
        rows = order[number * size : (number + 1) * size]
        captions = [f"{stem(files[row])[-44:]} {values[row, 0]:.0f} mL" for row in rows]
        page = page_of([brains[row] for row in rows], captions, [row in found for row in rows])
        path = os.path.join(output_dir, f"brains_{number + 1}.png" if number else "brains.png")
        write_atomically(path, lambda temporary, page=page: page.save(temporary, format="png"))
    write_table(os.path.join(output_dir, "brains.csv"), files, values, found)
    place = os.path.join(output_dir, "brains.png")
    if not found:
        logger.info(f"{key}: none of {len(files)} scans stands out; {place!r} shows them")
        return files, values
    lines = "".join(f"\n  {files[row]!r} has {words}" for row, words in list(found.items())[:LISTED])
    more = f"\n  ... and {len(found) - LISTED} more, in brains.csv" if len(found) > LISTED else ""
    names = [files[row] for row in found]
    logger.warning(
        f"{key}: {len(found)} of {len(files)} scans stand out, and come first in {place!r}; look at them:"
        f"{lines}{more}\n"
        f'they are used; to leave them out: --exclude "{names[:LISTED]}"'
    )
    return files, values
