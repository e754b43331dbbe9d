"""A sampling run: what is there already, and what it adds."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from monai.engines import Evaluator

from scripts.running.covariates import REQUESTS
from scripts.running.errors import BundleError
from scripts.running.files import set_aside, write_text
from scripts.running.locks import remove_partial
from scripts.running.signals import ending_at_once
from scripts.sampling.mosaic import MosaicHandler
from scripts.sampling.volumes import TORN, SaveVolumes, made_with, read_sample

logger = logging.getLogger(__name__)
RECORD = "samples.json"


def sample(evaluator: Evaluator, handlers: Sequence[Any], seed: int, resume: bool = False) -> None:
    """Run an evaluator over the volumes of its dataset, or, with `resume`, over those that are not there yet.

    The header of every volume holds a mark of what made it (see `SaveVolumes`), and samples.json beside the volumes
    says what the marks stand for. Volumes that this run would replace and that have another mark are moved to
    `output_dir`/.previous_1 (2, 3, ...), a hidden folder, which an evaluation passes over; those of the same mark are
    the same volumes, and are replaced one by one. Volumes beside them that have another mark are warned of.

    Of several processes, each looks after the volumes that the sampler of its data loader names.

    Args:
        evaluator: over a MONAI `DataLoader` of a `Dataset` of [{"image": number of a volume, ...}], see
            `scripts.diffusion.asked.requests`.
        handlers: those attached to it; without a `SaveVolumes` no files are looked at.
        seed: of the volumes.
        resume: keep the volumes that are there, were made with the same settings by the same weights, and are whole.

    Raises:
        BundleError: with `resume`, volumes that were made with other settings, or a seed that is new each time.
        SystemExit: SIGTERM or Ctrl-C ended the run.
    """
    saver = next((handler for handler in handlers if isinstance(handler, SaveVolumes)), None)
    mosaic = next((handler for handler in handlers if isinstance(handler, MosaicHandler)), None)
    if saver is None:
        evaluator.run()
        return
    if resume and seed < 0:
        raise BundleError(f"resume: true was given with seed {seed}, which is a new one each time; expected a seed")
    data = evaluator.data_loader.dataset.data
    folders = sorted({os.path.join(saver.output_dir, item["folder"]) for item in data} | {saver.output_dir})
    if idist.get_rank() == 0:
        remove_partial(**{folder: folder for folder in folders})
    idist.barrier()
    batches = evaluator.data_loader.batch_sampler
    own, dims = list(batches.sampler), len(saver.settings.get("spatial_shape", "xyz"))
    places = [saver.path(seed, item["image"], item, dims) for item in data]
    paths = [places[index] for index in own]
    marks = {path: made_with(path) for path in paths if os.path.exists(path)}
    others = {path: mark for path, mark in marks.items() if mark not in (saver.mark, None)}
    if others:
        found = (
            f"{len(others)} of {len(paths)} volumes are there, but were made otherwise: {differences(others, saver)}"
        )
        if resume:
            raise BundleError(f"resume: {found}; expected the same settings, another output_dir, or --resume false")
        logger.warning(f"{found}; they were moved to {set_aside(others, saver.output_dir, '.previous')!r}")
    intact = {path for path, mark in marks.items() if mark == saver.mark} if resume else set()
    left = [i for i in own if not (places[i] in intact and kept(data[i], places[i], mosaic))]
    if resume:
        logger.info(f"resume: {len(own) - len(left)} of {len(own)} volumes are there")
    if idist.get_rank() == 0:
        warn_of_others(saver, folders, places)
        record(saver)
        if any(item["values"] for item in data):
            write_requests(saver.output_dir, data, places, seed)

    def advice() -> str:
        made = sum(made_with(path) == saver.mark for path in paths if os.path.exists(path))
        again = "" if seed < 0 else "; the same command with --resume true goes on"
        return f"{made} of {len(paths)} volumes are in {saver.output_dir!r}{again}"

    batches.sampler, length = left, evaluator.state.epoch_length
    evaluator.state.epoch_length = len(batches)
    try:
        with ending_at_once(evaluator, advice):
            if left:
                evaluator.run()
            elif mosaic is not None:
                mosaic.write(evaluator)
    finally:
        batches.sampler, evaluator.state.epoch_length = own, length


def kept(item: Mapping[str, Any], path: str, mosaic: MosaicHandler | None) -> bool:
    """Whether a volume that is there can be read to its end; it then has its place in the mosaic."""
    try:
        voxels = read_sample(path)
    except TORN as e:
        logger.warning(f"{path!r} is damaged ({e}); it is made again")
        return False
    if mosaic is not None:
        mosaic.add(item["index"], voxels, item["row"])
    return True


def recorded(output_dir: str) -> dict[str, dict[str, Any]]:
    """{mark: what it stands for} of samples.json, as far as it can be read."""
    try:
        found = json.loads(Path(output_dir, RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def record(saver: SaveVolumes) -> None:
    """Add the settings of this run to samples.json; like the headers, it holds no paths."""
    found = recorded(saver.output_dir)
    if found.get(saver.mark) != saver.made_with:
        text = json.dumps({**found, saver.mark: saver.made_with}, indent=4) + "\n"
        path = os.path.join(saver.output_dir, RECORD)
        write_text(path, text)


def write_requests(output_dir: str, data: Sequence[Mapping[str, Any]], places: Sequence[str], seed: int) -> None:
    """samples.csv: a row a volume, its file, seed and volume, and what it was asked to be; n/a where nothing was said.

    Rows of other files that are still there are kept.
    """
    path, rows = os.path.join(output_dir, REQUESTS), {}
    if os.path.isfile(path):
        with open(path, newline="", encoding="utf-8") as file:
            rows = {
                row["file"]: row
                for row in csv.DictReader(file)
                if os.path.exists(os.path.join(output_dir, row["file"]))
            }
    for item, place in zip(data, places, strict=True):
        name = os.path.relpath(place, output_dir)
        rows[name] = {"file": name, "seed": seed, "volume": item["image"], **item["values"]}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="n/a", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[name] for name in sorted(rows))
    write_text(path, text.getvalue())


def differences(others: Mapping[str, str], saver: SaveVolumes) -> str:
    """What made some volumes otherwise, in the words of samples.json, with an example."""
    path, mark = next(iter(others.items()))
    then, now = recorded(saver.output_dir).get(mark), saver.made_with
    if not isinstance(then, dict):
        return f"{RECORD} does not say how {path!r} was made"
    found = [
        "other weights" if key == "weights" else f"{key} was {then.get(key)!r} and is {now.get(key)!r}"
        for key in [*now, *(key for key in then if key not in now)]
        if then.get(key) != now.get(key)
    ]
    return f"{', '.join(found)} (for example {path!r})"


def warn_of_others(saver: SaveVolumes, folders: Sequence[str], places: Sequence[str]) -> None:
    """Say which volumes beside those of this run were made otherwise: an evaluation of the folder would mix them."""
    beside = {str(path) for folder in folders for path in Path(folder).glob("sample_seed*_volume*.*")}
    beside = sorted(path for path in beside - {str(Path(p)) for p in places} if path.endswith((".nii.gz", ".png")))
    others = {path: mark for path in beside if (mark := made_with(path)) != saver.mark}
    if others:
        logger.warning(
            f"{len(others)} other volumes in {saver.output_dir!r} were made otherwise: {differences(others, saver)}; "
            "another output_dir would keep them apart"
        )
