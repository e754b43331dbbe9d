"""Checkpoints of a whole training run, written atomically, the weights that leave it, and the way back into a run."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch import nn

from scripts.diffusion.description import PATTERN, described, labelled
from scripts.diffusion.state_dicts import check_finite, load_file
from scripts.diffusion.weights import save_weights
from scripts.running.errors import BundleError
from scripts.running.files import save_tensors, write_atomically, write_text
from scripts.running.settings import as_json
from scripts.training.intervals import IntervalHandler
from scripts.training.records import TrainingRecords

logger = logging.getLogger(__name__)


def iteration_of(path: str) -> int:
    """The iteration that the name of a checkpoint tells."""
    return int(PATTERN.fullmatch(os.path.basename(path)).group(1))


def checkpoints_in(folder: str) -> list[str]:
    """Paths of all checkpoints in a folder, the newest (highest iteration) first."""
    names = [name for name in os.listdir(folder) if PATTERN.fullmatch(name)] if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in sorted(names, key=iteration_of, reverse=True)]


def newest_whole(
    folder: str, keys: Sequence[str], device: torch.device | str = "cpu"
) -> tuple[dict, str] | tuple[None, None]:
    """Content and path of the newest checkpoint that loads whole, has all `keys` and finite weights; others are warned
    of."""
    for path in checkpoints_in(folder):
        try:
            content = load_file(path, device)
            missing = [key for key in keys if key not in content]
            if missing:
                raise BundleError(f"{path!r} lacks {missing}")
            for key in ("network", "ema"):
                if isinstance(content.get(key), dict):
                    check_finite(content[key], path)
        except BundleError as e:
            logger.warning(f"passed over: {e}")
            continue
        return content, path
    return None, None


def bytes_of(content: Any) -> int:
    """Bytes of all tensors in nested dictionaries and lists."""
    if isinstance(content, torch.Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, dict):
        content = content.values()
    return sum(map(bytes_of, content)) if isinstance(content, (list, tuple, type({}.values()))) else 0


def check_space(ckpt_dir: str, network: nn.Module, checkpoints_kept: int) -> None:
    """There is room for the checkpoints of a training with Adam, 4 times the network each, and for model.pt.

    Checkpoints that are there already count as room, since they are replaced, or their place is known to be enough.

    Raises:
        BundleError: not even one checkpoint fits. If one does, but not all that are kept, there is a warning.
    """
    weights = bytes_of(network.state_dict())
    one = 5 * weights
    all_of_them = (4 * (checkpoints_kept + 1) + 1) * weights  # an old one goes after a new one is there
    free = shutil.disk_usage(ckpt_dir).free
    replaceable = sum(map(os.path.getsize, checkpoints_in(ckpt_dir)))
    sizes = (
        f"{free / 2**20:.0f} MiB are free in {ckpt_dir!r}, and a checkpoint with its model.pt takes {one / 2**20:.0f}"
    )
    if free < one:
        raise BundleError(f"ckpt_dir: {sizes}; make room, or give a ckpt_dir on another disk")
    if free + replaceable < all_of_them:
        logger.warning(
            f"ckpt_dir: {sizes}; checkpoints_kept = {checkpoints_kept} need {all_of_them / 2**20:.0f} MiB: the disk "
            "will be full before the end"
        )


class CheckpointHandler(IntervalHandler):
    """Trainer handler, the last of all: save everything every `interval` iterations and at the end.

    Files in `ckpt_dir`: checkpoint_00001000.pt (network, EMA, optimizer, gradient scaler, iteration), the newest
    `keep` of them; model.pt, the EMA weights as a plain state dict; model.json, which describes them. Ignite's
    `Checkpoint` does not flush to the disk, so it is not used. Of several processes, rank 0 writes.

    Args:
        ckpt_dir: where to save.
        parts: {"network", "ema", "optimizer"}: what to save, each with a `state_dict`.
        interval: in iterations.
        keep: number of checkpoints to keep.
        description: the knobs of `scripts.diffusion.description.DESCRIBING`, for model.json and the weights files.
        records: of the run, flushed first: what was recorded up to a checkpoint is on the disk before it is.
    """

    def __init__(
        self,
        ckpt_dir: str,
        parts: dict[str, Any],
        interval: int,
        keep: int,
        description: dict,
        records: TrainingRecords,
    ) -> None:
        super().__init__(interval)
        self.ckpt_dir, self.parts, self.keep = ckpt_dir, parts, keep
        self.description, self.records = as_json(description), records
        self.newest: int | None = None  # iteration of the newest checkpoint of this process
        self.seconds = 0.0  # that the slowest save took

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        super().attach(engine)

    def start(self, engine: Engine) -> None:
        """A kill may have come between a checkpoint and its model.pt: a run that goes on writes that anew."""
        self.newest = None
        if engine.state.iteration and idist.get_rank() == 0:
            os.makedirs(self.ckpt_dir, exist_ok=True)
            self.save_weights(engine.state.iteration, self.parts["ema"].state_dict())

    def __call__(self, engine: Engine) -> None:
        if self.newest == engine.state.iteration:
            return
        start = time.monotonic()
        content = {key: part.state_dict() for key, part in self.parts.items()}
        for key in ("network", "ema"):
            content[key] = labelled(content[key], self.description | {"iteration": engine.state.iteration})
        scaler = getattr(engine, "scaler", None)
        content |= {"iteration": engine.state.iteration, "scaler": scaler.state_dict() if scaler is not None else None}
        if idist.get_rank() == 0:
            self.save(content)
        self.newest = engine.state.iteration
        self.seconds = max(self.seconds, time.monotonic() - start)

    def path(self, iteration: int) -> str:
        return os.path.join(self.ckpt_dir, f"checkpoint_{iteration:08d}.pt")

    def save(self, content: dict) -> None:
        """Write a checkpoint, and the model.pt and model.json that belong to it."""
        os.makedirs(self.ckpt_dir, exist_ok=True)
        self.records.flush()
        write_atomically(self.path(content["iteration"]), lambda path: save_tensors(content, path))
        self.save_weights(content["iteration"], content["ema"])
        for path in checkpoints_in(self.ckpt_dir)[self.keep :]:
            os.remove(path)

    def save_weights(self, iteration: int, weights: dict[str, torch.Tensor]) -> None:
        """Write model.pt and model.json, which never belong to two trainings, even if a kill comes between them."""
        model = os.path.join(self.ckpt_dir, "model.pt")
        description = {"iteration": iteration, **self.description}
        if described(model) | {"iteration": iteration} != description and os.path.exists(model):
            os.remove(model)  # of an earlier training, which `ResumeHandler` has copied
        text = json.dumps(description, indent=4) + "\n"
        write_text(os.path.join(self.ckpt_dir, "model.json"), text)
        save_weights(weights, description, model)
