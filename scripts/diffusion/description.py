"""What is written down about weights, in their file and beside it, and whether it fits the knobs of a command."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from monai.networks.schedulers import Scheduler
from torch import nn

from scripts.diffusion.state_dicts import read_state_dict
from scripts.diffusion.wavelets import WaveletUNet
from scripts.running.errors import BundleError
from scripts.running.settings import differing

logger = logging.getLogger(__name__)
PATTERN = re.compile(r"checkpoint_(\d+)\.pt")


class Unsaid:
    """The value of a knob that nobody has written down."""


class Describing(NamedTuple):
    """How a knob belongs to weights.

    Args:
        fixed: with another value they are of no use; else a training may go on with another one, in a new run.
        of_unet: it is of the U-Net, and so the same in a coarse network and in a finer one that is grown from it.
        shown: the names and shapes of the tensors show it, or it only says how they were made: nothing needs to be
            said where it is not written down.
        older: what a description stands for that was written before it had this knob.
    """

    fixed: bool = True
    of_unet: bool = False
    shown: bool = False
    older: Any = Unsaid


# THE list of the knobs that describe weights, for --init_ckpt, --resume, sampling, model.json, and what lies in the
# weights file. Configs hand all their knobs to `description_of`, which takes these.
DESCRIBING = {
    "spatial_shape": Describing(fixed=False),
    "voxel_size": Describing(fixed=False),  # mm; in training it is known once the data are, see `CheckpointHandler`
    "wavelet_levels": Describing(shown=True, older=0),
    "coarse": Describing(older=None),
    "detail_rms": Describing(shown=True),  # of no account without wavelets, and written down with them
    "network_class": Describing(of_unet=True, older="DiffusionModelUNet"),
    "channels": Describing(of_unet=True, shown=True),
    "attention_levels": Describing(of_unet=True, shown=True),
    "num_head_channels": Describing(of_unet=True),
    "num_res_blocks": Describing(of_unet=True, shown=True),
    "norm_num_groups": Describing(of_unet=True),
    "scheduler": Describing(),  # the name of its class
    "num_train_timesteps": Describing(),
    "schedule": Describing(),
    "prediction_type": Describing(),
    "timestep_sampling": Describing(fixed=False, shown=True, older="uniform"),  # of training alone
    "class_names": Describing(of_unet=True, older=None),
}


def description_of(knobs: Mapping[str, Any], network: nn.Module, scheduler: Scheduler, **more: Any) -> dict[str, Any]:
    """What is to be written down about weights: `DESCRIBING`, as far as it is known, in its order.

    Args:
        knobs: of a config, by their keys; those that describe no weights are passed over.
        network: whose weights they are, a sampler or training network; a `WaveletUNet` says what it has grown from.
        scheduler: of the training.
        more: knobs that go last.
    """
    coarse = next((m.coarse for m in network.modules() if isinstance(m, WaveletUNet)), None)
    known = {**knobs, "coarse": coarse, "scheduler": type(scheduler).__name__}
    return {key: known[key] for key in DESCRIBING if key in known} | more


def said(description: Mapping[str, Any], key: str) -> Any:
    """What a description says of a knob; `Unsaid` where it says nothing."""
    return description.get(key, DESCRIBING[key].older if description else Unsaid)


def check_described(
    description: Mapping[str, Any], expected: Mapping[str, Any], path: str, same_run: bool = False
) -> None:
    """The knobs of this command are those that weights were trained with, as far as that is known.

    Args:
        description: of the weights at `path`, see `described`.
        expected: knobs of `DESCRIBING` as they are now.
        same_run: compare also those that another training could change.

    Raises:
        BundleError: names the first knob that differs.
    """
    then = {key: value for key in expected if (value := said(description, key)) is not Unsaid}
    for key in differing(then, expected):
        if same_run or DESCRIBING[key].fixed:
            raise BundleError(
                f"{key}: {expected[key]!r} was given, but {path!r} was trained with {then[key]!r}; give the same (or "
                "the preset that was used for training)"
            )


def warn_of_assumptions(description: Mapping[str, Any], expected: Mapping[str, Any], path: str) -> None:
    """Name what nobody has written down about weights, and their tensors do not show."""
    assumed = [
        f"{key} {value!r}"
        for key, value in expected.items()
        if said(description, key) is Unsaid and not DESCRIBING[key].shown
    ]
    if assumed:
        logger.warning(
            f"{path!r} does not say how it was trained, and no JSON file beside it does; taken as the config has them: "
            f"{', '.join(assumed)}. Where one of them was otherwise, what comes out is wrong: give it on the command "
            "line, or give the preset of the training"
        )


def labelled(state_dict: Mapping[str, torch.Tensor], description: Mapping[str, Any]) -> OrderedDict[str, torch.Tensor]:
    """A state dict that carries a description where PyTorch keeps its own notes, in `_metadata`.

    `torch.save` and `torch.load` keep it, with `weights_only` too, and `load_state_dict` passes over it.
    """
    copied = OrderedDict(state_dict)
    copied._metadata = OrderedDict(getattr(state_dict, "_metadata", {}))
    copied._metadata["description"] = {"json": json.dumps(dict(description))}
    return copied


def label_of(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What `labelled` has put into a state dict; empty where it holds none."""
    try:
        description = json.loads(state_dict._metadata["description"]["json"])
    except (AttributeError, LookupError, TypeError, ValueError):  # the file may come from anybody
        return {}
    return description if isinstance(description, dict) else {}


def read_description(path: str) -> dict[str, Any]:
    """The content of a JSON file beside weights."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise BundleError(f"{path!r}, beside weights of that name, is no JSON ({e}); mend or remove it") from e
    return content if isinstance(content, dict) else {}


def described(ckpt_path: str | None) -> dict[str, Any]:
    """What training wrote about its weights; empty where that is not known, or there are no weights (None).

    It lies in the file itself, and beside it as JSON, which is for people, and for files of other programs and of
    version 0.4: model.pt is described by model.json, and so are checkpoints of the same training. Where the two differ,
    the JSON file is of other weights, and there is a warning.
    """
    folder, name = os.path.split(ckpt_path or "")
    found = PATTERN.fullmatch(name)
    path = os.path.join(folder, "model.json" if found else os.path.splitext(name)[0] + ".json")
    beside = read_description(path) if os.path.isfile(path) else {}
    inside: dict[str, Any] = {}
    if ckpt_path is not None and os.path.isfile(ckpt_path):
        with contextlib.suppress(BundleError):  # which says why when the weights are loaded
            inside = label_of(read_state_dict(ckpt_path, mmap=zipfile.is_zipfile(ckpt_path)))
    description = inside or beside
    differ = [key for key in DESCRIBING if inside and beside and inside.get(key) != beside.get(key)]
    if differ:
        values = ", ".join(f"{key} {beside.get(key)!r} (it is {inside.get(key)!r})" for key in differ)
        logger.warning(f"{path!r} is not of {ckpt_path!r} and is not used: it says {values}")
    return description | {"iteration": int(found.group(1))} if description and found else description
