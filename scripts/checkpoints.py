"""Checkpoints of a whole training run, written atomically, and the weights that leave it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from torch import nn

from scripts.checks import check_knobs
from scripts.distributed import note_launch, started_anew
from scripts.errors import BundleError
from scripts.files import save_tensors, set_aside, write_atomically, write_text
from scripts.intervals import IntervalHandler

logger = logging.getLogger(__name__)
PATTERN = re.compile(r"checkpoint_(\d+)\.pt")


def iteration_of(path: str) -> int:
    """The iteration that the name of a checkpoint tells."""
    return int(PATTERN.fullmatch(os.path.basename(path)).group(1))


def checkpoints_in(folder: str) -> list[str]:
    """Paths of all checkpoints in a folder, the newest (highest iteration) first."""
    names = [name for name in os.listdir(folder) if PATTERN.fullmatch(name)] if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in sorted(names, key=iteration_of, reverse=True)]


def load_file(path: str, device: torch.device | str = "cpu") -> dict:
    """Read a PyTorch file with `weights_only` (nothing in it is executed), or a safetensors file.

    Raises:
        BundleError: it is torn, of another kind, or holds something else than a dictionary.
    """
    try:
        if path.endswith(".safetensors"):
            import safetensors.torch  # here, since MONAI Label does not install it

            return safetensors.torch.load_file(path, device=str(device))
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # torch.load has many ways to fail on a damaged file
        reason = str(e).strip().splitlines()[0][:160] if str(e).strip() else type(e).__name__
        raise BundleError(
            f"{path!r} cannot be read as PyTorch weights ({reason}); it may be truncated or of another kind"
        ) from e
    if not isinstance(content, dict):
        raise BundleError(f"{path!r} holds a {type(content).__name__}; a state dict would be right")
    return content


def newest_whole(
    folder: str, keys: Sequence[str], device: torch.device | str = "cpu"
) -> tuple[dict, str] | tuple[None, None]:
    """Content and path of the newest checkpoint that loads whole and has all `keys`; one that does not is warned of."""
    for path in checkpoints_in(folder):
        try:
            content = load_file(path, device)
            missing = [key for key in keys if key not in content]
            if missing:
                raise BundleError(f"{path!r} lacks {missing}")
        except BundleError as e:
            logger.warning(f"passed over: {e}")
            continue
        return content, path
    return None, None


def check_fits(network: nn.Module, state_dict: dict, path: str) -> None:
    """Raises BundleError, naming tensors, where a state dict does not belong to a network."""
    wanted = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    found = {name: tuple(t.shape) if isinstance(t, torch.Tensor) else type(t) for name, t in state_dict.items()}
    differences = [
        f"{name}: found {found.get(name, 'nothing')}, the network has {wanted.get(name, 'nothing')}"
        for name in [*wanted, *(name for name in found if name not in wanted)]
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        more = f"\n  and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise BundleError(
            f"{path!r} does not belong to the network of this config: {len(differences)} tensors differ (channels, "
            "attention_levels, num_res_blocks, class_names and so on must be those of the training):\n  "
            + "\n  ".join(differences[:5])
            + more
        )


OLD_NAMES = re.compile(r"(\.to_[qkv]|\.proj_attn|\.to_out\.0|upsampler\.conv(\.conv)?)\.(weight|bias)$")


def read_state_dict(path: str, weights: str = "ema") -> dict[str, torch.Tensor]:
    """The state dict of a network from any of the files that hold one.

    Args:
        path: a plain state dict; {"model": state dict}, as MedForj publishes; a checkpoint of a whole training run of
            this bundle; or a .safetensors file.
        weights: "ema" or "raw": which ones of a training checkpoint.
    """
    check_knobs(weights=weights)
    content = load_file(path)
    if "network" in content and "ema" in content:
        return content["ema" if weights == "ema" else "network"]
    return content["model"] if isinstance(content.get("model"), dict) else content


def load_weights(network: nn.Module, ckpt_path: str, weights: str = "ema", **expected: Any) -> None:
    """Load the weights of a file that `read_state_dict` can read into a network.

    A state dict of a `monai-generative` 0.2 network is translated by MONAI's `load_old_state_dict`.

    Args:
        network: receives the weights, on its own device and in its own type; a `DiffusionSampler` passes them on.
        ckpt_path: the file; a JSON file of the same name beside it, which training writes, is compared with `expected`.
        weights: "ema" or "raw", for a checkpoint of a whole training run.
        expected: knobs that must be as they were in training, such as prediction_type="epsilon".

    Raises:
        BundleError: no such file (says how to make one), torn, of another network, or trained with other knobs.
    """
    if not os.path.isfile(ckpt_path):
        raise BundleError(
            f"ckpt_path: there are no weights at {ckpt_path!r}. They are made by `python -m monai.bundle run training "
            "--config_file configs/train.json --dataset_dir YOUR_SCANS`, or, as a small demonstration, by the first "
            "command of README.md; --ckpt_path names other ones"
        )
    for key, value in described(ckpt_path).items():
        if key in expected and expected[key] != value:
            raise BundleError(
                f"{key}: {expected[key]!r} was given, but {ckpt_path!r} was trained with {value!r}; give the same "
                "(or the preset that was used for training)"
            )
    state_dict = read_state_dict(ckpt_path, weights)
    strangers = [name for name in state_dict if name not in network.state_dict()]
    if strangers and all(OLD_NAMES.search(name) for name in strangers):
        load_old(getattr(network, "unet", network), state_dict, ckpt_path)
        return
    check_fits(network, state_dict, ckpt_path)
    network.load_state_dict(state_dict)


def begin_with(ckpt_path: str | None, network: nn.Module, ema_network: nn.Module, **expected: Any) -> None:
    """Let a training begin with the weights of a file instead of random ones (fine-tuning); None changes nothing.

    The file may come from a training of another `spatial_shape`: the network is convolutional. See `load_weights`.
    """
    if ckpt_path is not None:
        load_weights(network, ckpt_path, **expected)
        ema_network.load_state_dict(network.state_dict())
        logger.info(f"training begins with the weights of {ckpt_path}")


def load_old(unet: nn.Module, state_dict: dict, path: str) -> None:
    """Load a `monai-generative` state dict into a `DiffusionModelUNet`, which must be built without the projection
    that such a network never applied."""
    if any(name.endswith(".attn.out_proj.weight") for name in unet.state_dict()):
        raise BundleError(
            f"{path!r} was trained with monai-generative, whose attention has no output projection; give "
            "--network_def#unet#include_fc false --network_def#unet#use_combined_linear false"
        )
    try:
        with contextlib.redirect_stdout(None):
            unet.load_old_state_dict(dict(state_dict))
    except (KeyError, RuntimeError) as e:
        raise BundleError(
            f"{path!r}, trained with monai-generative, does not belong to the network of this config: {str(e)[:300]}"
        ) from e


def described(ckpt_path: str | None) -> dict:
    """What training wrote about its weights beside them; empty where there is no such file, or no weights (None).

    model.pt is described by model.json, and so are the checkpoints of the same training, checkpoint_00001000.pt.
    """
    folder, name = os.path.split(ckpt_path or "")
    found = PATTERN.fullmatch(name)
    path = os.path.join(folder, "model.json" if found else os.path.splitext(name)[0] + ".json")
    if not os.path.isfile(path):
        return {}
    with open(path) as file:
        description = json.load(file)
    return description | {"iteration": int(found.group(1))} if found else description


class RampedEMAHandler(EMAHandler):
    """Ignite's `EMAHandler` with a momentum that starts at 1 and falls to `momentum`: max(momentum, 9 / (8 + k)).

    The average then spans about the last tenth of the k iterations so far, so that the EMA weights of a short run are
    not those of its random start. It is a function of the iteration alone, so a resumed run is exact.
    """

    def __init__(self, model: nn.Module, ema_model: nn.Module, momentum: float) -> None:
        """`ema_model` is a copy of `model`, without gradients, that other parts of a config can refer to."""
        super().__init__(model, momentum)
        self.ema_model = ema_model

    def attach(self, engine: Engine, name: str = "ema_momentum", warn_if_exists: bool = False, **kwargs: Any) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.ramp, name)
        super().attach(engine, name, warn_if_exists, **kwargs)

    def ramp(self, engine: Engine, name: str) -> None:
        setattr(engine.state, name, max(self.momentum, 9 / (8 + engine.state.iteration)))

    @torch.no_grad()
    def _update_ema_model(self, engine: Engine, name: str) -> None:
        """Ignite's update in one call for all tensors: ema += momentum (weights - ema). A U-Net has no buffers."""
        momentum = getattr(engine.state, name)
        torch._foreach_lerp_(list(self.ema_model.parameters()), list(self.model.parameters()), momentum)


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
    """

    def __init__(self, ckpt_dir: str, parts: dict[str, Any], sampler: Any, resume: bool = False) -> None:
        self.ckpt_dir, self.parts, self.sampler, self.resume = ckpt_dir, parts, sampler, resume

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
        if getattr(engine, "scaler", None) is not None and content.get("scaler"):
            engine.scaler.load_state_dict(content["scaler"])
        engine.state.iteration = self.sampler.iteration = content["iteration"]
        engine.state.epoch = content["iteration"] // engine.state.epoch_length
        logger.info(f"resumed after iteration {content['iteration']} from {path}")

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
        description: for model.json: knobs that inference needs to know.
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
        self.description, self.records = description, records
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
        description = {"iteration": iteration, **json.loads(json.dumps(self.description))}
        if described(model) | {"iteration": iteration} != description and os.path.exists(model):
            os.remove(model)  # of an earlier training, which `ResumeHandler` has copied
        text = json.dumps(description, indent=4) + "\n"
        write_text(os.path.join(self.ckpt_dir, "model.json"), text)
        write_atomically(model, lambda path: save_tensors(weights, path))


def release_weights(ckpt_path: str, path: str, weights: str = "ema") -> None:
    """Write the weights of a file that `read_state_dict` can read as a plain bfloat16 state dict, half the size.

    What training wrote about them goes beside it: `path` with .json.

    Args:
        ckpt_path: where they are.
        path: where they go, for example models/model.pt, or model.safetensors for a file of that kind.
        weights: "ema" or "raw", for a checkpoint of a whole training run.
    """
    state_dict = {name: t.to(torch.bfloat16) for name, t in read_state_dict(ckpt_path, weights).items()}
    text = json.dumps(described(ckpt_path), indent=4) + "\n"

    def write(temporary: str) -> None:
        if path.endswith(".safetensors"):
            import safetensors.torch  # here, as in `load_file`

            contiguous = {name: t.contiguous() for name, t in state_dict.items()}
            Path(temporary).write_bytes(safetensors.torch.save(contiguous))
        else:
            save_tensors(state_dict, temporary)

    write_atomically(path, write)
    write_text(os.path.splitext(path)[0] + ".json", text)
