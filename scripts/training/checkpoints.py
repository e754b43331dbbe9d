"""Checkpoints of a whole training run, written atomically, the weights that leave it, and the way back into a run."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from torch import nn

from scripts.diffusion.networks import unet_of
from scripts.diffusion.wavelets import bands_of, grown
from scripts.diffusion.weights import (
    DESCRIBING,
    PATTERN,
    as_json,
    check_described,
    check_finite,
    check_fits,
    described,
    labelled,
    load_file,
    load_weights,
    read_state_dict,
    save_weights,
)
from scripts.running.errors import BundleError
from scripts.running.files import save_tensors, set_aside, write_atomically, write_text
from scripts.running.processes import note_launch, started_anew
from scripts.training.intervals import IntervalHandler

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


def begin_with(
    ckpt_path: str | None, network: nn.Module, ema_network: nn.Module, expected: Mapping[str, Any] | None = None
) -> None:
    """Let a training begin with the weights of a file instead of random ones; None changes nothing.

    Fine-tuning: the file may come from a training of another `spatial_shape`, since the network is convolutional.
    Growing: it may come from a network of fewer wavelet levels and coarser voxels, see `grow`.

    Args:
        ckpt_path, expected: see `load_weights`.
        network, ema_network: receive the weights.
    """
    if ckpt_path is None:
        return
    state_dict = read_state_dict(ckpt_path) if os.path.isfile(ckpt_path) else {}
    if getattr(unet_of(network), "in_channels", 0) > bands_of(state_dict) > 0:
        grow(state_dict, ckpt_path, network, expected or {})
    else:
        load_weights(network, ckpt_path, expected={k: v for k, v in (expected or {}).items() if DESCRIBING[k].fixed})
    ema_network.load_state_dict(network.state_dict())
    logger.info(f"training begins with the weights of {ckpt_path}")


def grow(state_dict: dict, ckpt_path: str, network: nn.Module, expected: Mapping[str, Any]) -> None:
    """Load a coarse network's weights into a `WaveletUNet` of more levels, whose volumes begin as the coarse ones.

    The coarse network may predict anything at any schedule: `WaveletUNet` was told which (`coarse_process`).

    Raises:
        BundleError: nobody has written down what the coarse network predicts, its volumes are not of the side of the
            new ones' means, its weights are not finite, or the networks differ otherwise.
    """
    unet, description, spatial_shape = unet_of(network), described(ckpt_path), expected["spatial_shape"]
    levels = round(math.log2(unet.in_channels / bands_of(state_dict)) / len(spatial_shape))
    if not description:
        raise BundleError(
            f"init_ckpt: {ckpt_path!r} does not say how it was trained, and no JSON file beside it does; a network "
            "that is grown must know it: the model.json of that training would be right"
        )
    coarse, wanted = description.get("spatial_shape"), [side // 2**levels for side in spatial_shape]
    if coarse not in (None, wanted):
        right = [side * 2**levels for side in coarse]
        raise BundleError(
            f"init_ckpt: {ckpt_path!r} was trained on volumes of {coarse}; with {levels} more of wavelet_levels it can "
            f"be grown to {right}, but spatial_shape is {list(spatial_shape)}"
        )
    same = {key: value for key, value in expected.items() if DESCRIBING[key].of_unet}
    check_described(description, same, ckpt_path)
    check_finite(state_dict, ckpt_path)
    weights = grown(state_dict, unet.in_channels)
    check_fits(network, weights, ckpt_path)
    network.load_state_dict(weights)
    logger.info(f"grown from {coarse or 'coarser volumes'} to {list(spatial_shape)}")


class RampedEMAHandler(EMAHandler):
    """Ignite's `EMAHandler` with a momentum that starts at 1 and falls to `momentum`: max(momentum, 9 / (8 + k)).

    The average then spans about the last tenth of the k steps of the optimizer so far, so that the EMA weights of a
    short run are not those of its random start. It is a function of the iteration alone, so a resumed run is exact.

    Args:
        model: the network that is trained.
        ema_model: a copy of it, without gradients, that other parts of a config can refer to.
        momentum: share of the newest weights, in (0, 1).
        accumulation_steps: iterations a step of the optimizer; the weights, and so the average, change with a step.
        load_path: not for this handler: train.json looks it up, and MONAI Label gives one in its place.
    """

    def __init__(
        self,
        model: nn.Module,
        ema_model: nn.Module,
        momentum: float,
        accumulation_steps: int = 1,
        load_path: str | None = None,
    ) -> None:
        super().__init__(model, momentum)
        self.ema_model, self.accumulation_steps = ema_model, accumulation_steps

    def attach(self, engine: Engine, name: str = "ema_momentum", warn_if_exists: bool = False) -> None:
        step = Events.ITERATION_COMPLETED(every=self.accumulation_steps)
        engine.add_event_handler(step, self.ramp, name)
        super().attach(engine, name, warn_if_exists, step)

    def ramp(self, engine: Engine, name: str) -> None:
        steps = engine.state.iteration // self.accumulation_steps
        setattr(engine.state, name, max(self.momentum, 9 / (8 + steps)))

    @torch.no_grad()
    def _update_ema_model(self, engine: Engine, name: str) -> None:
        """Ignite's update in one call for all tensors: ema += momentum (weights - ema). A U-Net has no buffers."""
        momentum = getattr(engine.state, name)
        torch._foreach_lerp_(list(self.ema_model.parameters()), list(self.model.parameters()), momentum)


def checkpoint_to_resume(ckpt_dir: str, resume: bool) -> str | None:
    """The newest checkpoint of the run that this command goes on with; None where it begins a new one. Collective.

    Args:
        ckpt_dir: where checkpoints are.
        resume: as the knob says; a training that the same torchrun starts anew goes on too.
    """
    return next(iter(checkpoints_in(ckpt_dir)), None) if resume or started_anew(ckpt_dir) else None


def check_resume(ckpt_path: str | None, expected: Mapping[str, Any]) -> None:
    """A run goes on with the knobs that it was begun with, all of those that describe weights.

    Args:
        ckpt_path: of `checkpoint_to_resume`.
        expected: knobs of `scripts.diffusion.weights.DESCRIBING` as they are now.

    Raises:
        BundleError: names the first knob that differs.
    """
    if ckpt_path is not None:
        check_described(described(ckpt_path), expected, ckpt_path, same_run=True)


class ResumeHandler:
    """Trainer handler: at the start, go on from the newest checkpoint or clear the way for a new run.

    A run that starts afresh moves an earlier run's checkpoints to `ckpt_dir`/previous_1 (2, 3, ...) and copies there
    the model.pt that it will replace: nothing is lost, and a later resume cannot mistake one run for the other.

    Args:
        ckpt_dir: where checkpoints are.
        parts: {"network", "ema", "optimizer"}: what to restore.
        sampler: a `DrawSampler`, told where to go on.
        resume: continue from the newest checkpoint that loads whole; a torn one is passed over with a warning. A
            training that the same torchrun starts anew does so too.

    The learning rate is that of the checkpoint, which a surge may have lowered; one that was changed by the user is
    used. To tell them apart, the optimizer's groups note the rate that was given as `initial_lr`, a key that PyTorch's
    schedulers have too.
    """

    def __init__(self, ckpt_dir: str, parts: dict[str, Any], sampler: Any, resume: bool = False) -> None:
        self.ckpt_dir, self.parts, self.sampler, self.resume = ckpt_dir, parts, sampler, resume
        for group in parts["optimizer"].param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.given = [group["initial_lr"] for group in parts["optimizer"].param_groups]

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        if not self.resume and not started_anew(self.ckpt_dir):
            self.set_aside()
            note_launch(self.ckpt_dir)
            return
        content, path = newest_whole(self.ckpt_dir, (*self.parts, "iteration"), engine.state.device)
        if content is None:
            logger.warning(f"resume: no checkpoint in {self.ckpt_dir!r} loads; training starts from the beginning")
            self.set_aside()
        else:
            self.load(content, path, engine)
        first, last = (idist.all_reduce(engine.state.iteration, how) for how in ("MIN", "MAX"))
        if first != last:
            raise BundleError(
                f"ckpt_dir: the processes of this run found different newest checkpoints in {self.ckpt_dir!r}, of "
                f"iterations {first} to {last}; it must be a folder that all of them share"
            )

    def load(self, content: dict, path: str, engine: Engine) -> None:
        for key in ("network", "ema"):
            check_fits(self.parts[key], content[key], path)
        for key, part in self.parts.items():
            part.load_state_dict(content[key])
        self.set_learning_rates()
        if getattr(engine, "scaler", None) is not None and content.get("scaler"):
            engine.scaler.load_state_dict(content["scaler"])
        engine.state.iteration = self.sampler.iteration = content["iteration"]
        engine.state.epoch = content["iteration"] // engine.state.epoch_length
        logger.info(f"resumed after iteration {content['iteration']} from {path}")

    def set_learning_rates(self) -> None:
        for group, given in zip(self.parts["optimizer"].param_groups, self.given, strict=True):
            rate = group["lr"]
            halved = given >= rate and math.log2(given / rate).is_integer()  # what surges do
            begun_with = group.get("initial_lr", given if halved else rate)  # version 0.4 took no note
            group["initial_lr"] = given
            if given != begun_with:
                group["lr"] = given
                logger.warning(f"learning_rate: {given:g} from here on, in place of {rate:g}")
            elif given != rate:
                logger.warning(
                    f"learning_rate: {rate:g} of the checkpoint goes on, to which surges of the loss have lowered "
                    f"{given:g}; another number than that on the command line would be used"
                )

    def set_aside(self) -> None:
        if idist.get_rank() != 0:
            return
        earlier = checkpoints_in(self.ckpt_dir)
        weights = [path for n in ("model.pt", "model.json") if os.path.exists(path := os.path.join(self.ckpt_dir, n))]
        if not earlier and not weights:
            return
        folder = set_aside(earlier, self.ckpt_dir, "previous")
        for path in weights:
            shutil.copy2(path, folder)
        what = f"{len(earlier)} checkpoints of an earlier run" if earlier else "weights that were there"
        logger.warning(f"{what} were moved to {folder}" + (" (--resume true goes on)" if earlier else ""))


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
    there = sum(map(os.path.getsize, checkpoints_in(ckpt_dir)))
    sizes = (
        f"{free / 2**20:.0f} MiB are free in {ckpt_dir!r}, and a checkpoint with its model.pt takes {one / 2**20:.0f}"
    )
    if free < one:
        raise BundleError(f"ckpt_dir: {sizes}; make room, or give a ckpt_dir on another disk")
    if free + there < all_of_them:
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
        description: the knobs of `scripts.diffusion.weights.DESCRIBING`, for model.json and the weights files.
        records: things with a `flush`, called first: what was recorded up to a checkpoint is on the disk before it is.
    """

    def __init__(
        self,
        ckpt_dir: str,
        parts: dict[str, Any],
        interval: int,
        keep: int,
        description: dict,
        records: Sequence[Any] = (),
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
        for record in self.records:
            record.flush()
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
