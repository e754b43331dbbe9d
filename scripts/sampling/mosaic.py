"""All samples of a run as one picture, and the way from noise to a volume."""

from __future__ import annotations

import logging
from collections.abc import Callable

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events

from scripts.running.pictures import mosaic, save_png, triplanar
from scripts.running.processes import gathered

logger = logging.getLogger(__name__)


@idist.one_rank_only()
def save_denoising(
    sampler: Callable[[torch.Tensor], torch.Tensor], noise: torch.Tensor, path: str, num_frames: int = 8
) -> None:
    """Write the way from noise to volume as a PNG: a column a moment, a row a plane (sagittal, coronal, axial).

    Args:
        sampler: a `DiffusionSampler`, for its `on_the_way`.
        noise: standard normal noise of one volume, (1, C, *spatial), on the sampler's device.
        path: of the picture.
        num_frames: columns, evenly chosen among the steps; the first is the noise, the last the volume.
    """
    volumes = [noise[:, :1], *sampler.on_the_way(noise)]
    chosen = np.unique(np.linspace(0, len(volumes) - 1, num_frames).round().astype(int))
    strips = [triplanar(torch.as_tensor(volumes[i])[0, 0].cpu().numpy()) for i in chosen]
    cube = noise.ndim == 5 and len(set(noise.shape[2:])) == 1  # three planes of one size
    columns = [np.concatenate(np.split(s, 3, 1), 0) if cube else s for s in strips]
    factor = max(1, -(-96 // noise.shape[-1]))
    save_png(np.concatenate(columns, 1).repeat(factor, 0).repeat(factor, 1), path, -1, 1)
    logger.info(f"from noise to volume: {path}")


class MosaicHandler:
    """Evaluator handler: collect the middle slices of every volume of a run and write one mosaic at its end.

    Volumes of several classes stand in a row a class, those of a sweep in a row a noise. Expects `engine.state.output`
    as a list of {"pred": (1, *spatial) in [0, 255]} and `engine.state.batch` as a list of {"image": noise with meta
    "volume", "index": place among the volumes of the run, "row": number}.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.strips: dict[int, tuple[np.ndarray, int]] = {}  # by place, with its row

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def add(self, index: int, voxels: np.ndarray, row: int) -> None:
        """One volume (*spatial); one that was there before the run, too."""
        self.strips[index] = triplanar(voxels), row

    def __call__(self, engine: Engine) -> None:
        for item, output in zip(engine.state.batch, engine.state.output):
            voxels = torch.as_tensor(output["pred"])[0].cpu().numpy()
            self.add(int(item["index"]), voxels, int(item["row"]))

    def write(self, engine: Engine) -> None:
        """Of several processes rank 0 writes the strips of all."""
        everything = {index: strip for part in gathered(self.strips) for index, strip in part.items()}
        self.strips = {}
        if everything and idist.get_rank() == 0:
            strips, labels = zip(*(everything[index] for index in sorted(everything)))
            save_png(mosaic(list(strips), labels=labels), self.path, 0, 255)
            logger.info(f"{len(strips)} volumes as one picture: {self.path}")
