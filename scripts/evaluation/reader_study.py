"""A blinded reader study: experts tell real volumes from synthetic ones in one HTML page that needs no network."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import logging
import os
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image
from tqdm import tqdm

from scripts.evaluation.cohorts import Cohorts, check_enough
from scripts.running.checks import check_knobs
from scripts.running.errors import BundleError
from scripts.running.files import write_atomically, write_text
from scripts.running.pictures import triplanar

logger = logging.getLogger(__name__)
TEMPLATE = Path(__file__).with_name("reader_study.html")
KEY_COLUMNS = ["study", "image", "source", "file"]


def grey_png(picture: np.ndarray) -> bytes:
    """A picture (rows, columns) in [-1, 1] as an 8-bit grey PNG: the same window for all, and no metadata."""
    levels = np.clip((np.asarray(picture, np.float32) + 1) * 127.5, 0, 255).round().astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(levels).save(stream, "png", optimize=True)
    return stream.getvalue()


class ReaderStudy:
    """The reader study of Dorjsembe et al. 2022: N images of each source in random order, three centre slices each.

    The page holds the pictures in their shuffled order and nothing else of a volume: no file name, no source, no
    header. What an image is stands in the key alone.

    Args:
        cohorts: the real cohort and each synthetic one are sources; a held-out cohort is not shown.
        num_images: N, drawn from each source without replacement.
        seed: of the draw and of the order.
        output_dir: receives for_readers/reader_study.html, and key.csv, which no reader may see.

    Raises:
        BundleError: a source has fewer than `num_images` volumes.
    """

    def __init__(self, cohorts: Cohorts, num_images: int = 50, seed: int = 0, output_dir: str = ".") -> None:
        check_knobs(num_images=num_images, seed=seed)
        sources = [cohorts.real, *cohorts.synthetic]
        folders = {cohort.name: cohort.folder for cohort in sources}
        check_enough({cohort.name: len(cohort) for cohort in sources}, folders, num_images)
        generator = np.random.default_rng(seed)
        drawn = [(cohort, int(i)) for cohort in sources for i in generator.permutation(len(cohort))[:num_images]]
        order = generator.permutation(len(drawn))
        self.images = [drawn[i] for i in order]
        self.page = os.path.join(output_dir, "for_readers", "reader_study.html")
        self.key = os.path.join(output_dir, "key.csv")

    def write(self) -> None:
        """Write the page and the key.

        Raises:
            BundleError: `output_dir` holds the key of another study, whose answers nobody could score without it.
        """
        pictures = [grey_png(triplanar(cohort.volumes[i])) for cohort, i in tqdm(self.images, "pictures")]
        # a hash of what every reader sees: the same study has the same name, and the name says nothing of the key
        study = hashlib.blake2b(b"".join(pictures), digest_size=6).hexdigest()
        self.check_key(study)
        names = [f"{number:0{len(str(len(pictures)))}d}" for number in range(1, len(pictures) + 1)]
        os.makedirs(os.path.dirname(self.page), exist_ok=True)

        def write_key(temporary: str) -> None:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(KEY_COLUMNS)
                for name, (cohort, i) in zip(names, self.images, strict=True):
                    writer.writerow([study, name, cohort.name, cohort.files[i]])

        write_atomically(self.key, write_key)
        content = {
            "id": study,
            "images": [
                {"name": name, "picture": "data:image/png;base64," + base64.b64encode(picture).decode()}
                for name, picture in zip(names, pictures, strict=True)
            ],
        }
        shape = self.images[0][0].volumes.shape[1:]
        widths = [shape[1], shape[0], shape[0]] if len(shape) == 3 else [shape[0]]  # of the slices, see `triplanar`
        aspect = sum(widths) / max(shape[1:])
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
        template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
        page = template.render(study=content, widths=widths, aspect=aspect)
        write_text(self.page, page)
        logger.info(
            f"study {study}: {len(names)} images; give {self.page} to the readers and keep {self.key} from them"
        )

    def check_key(self, study: str) -> None:
        """No key of another study stands where this one's will be."""
        try:
            with open(self.key, newline="", encoding="utf-8") as file:
                found = next(csv.DictReader(file), {}).get("study")
        except FileNotFoundError:
            return
        if found != study:
            raise BundleError(
                f"output_dir: {self.key!r} is the key of study {found}, not of the new one, {study}, and its answers "
                "could not be scored without it; give another output_dir, or remove that file"
            )
