"""The way back into a run."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Mapping
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events

from scripts.diffusion.description import check_described, described
from scripts.diffusion.state_dicts import check_fits
from scripts.running.checks import as_bool
from scripts.running.errors import BundleError
from scripts.running.files import set_aside
from scripts.running.processes import note_launch, started_anew
from scripts.training.checkpoints import checkpoints_in, newest_whole

logger = logging.getLogger(__name__)


def checkpoint_to_resume(ckpt_dir: str, resume: bool | str) -> str | None:
    """The newest checkpoint of the run that this command goes on with; None where it begins a new one. Collective.

    Args:
        ckpt_dir: where checkpoints are.
        resume: as the knob says; a training that the same torchrun starts anew goes on too.
    """
    return next(iter(checkpoints_in(ckpt_dir)), None) if as_bool(resume=resume) or started_anew(ckpt_dir) else None


def check_resume(ckpt_path: str | None, expected: Mapping[str, Any]) -> None:
    """A run goes on with the knobs that it was begun with, all of those that describe weights.

    Args:
        ckpt_path: of `checkpoint_to_resume`.
        expected: knobs of `scripts.diffusion.description.DESCRIBING` as they are now.

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

    def __init__(self, ckpt_dir: str, parts: dict[str, Any], sampler: Any, resume: bool | str = False) -> None:
        self.ckpt_dir, self.parts, self.sampler = ckpt_dir, parts, sampler
        self.resume = as_bool(resume=resume)
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
            first_given = group.get("initial_lr", given if halved else rate)  # version 0.4 took no note
            group["initial_lr"] = given
            if given != first_given:
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
