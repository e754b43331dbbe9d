"""Weights in files: read in any layout, with what describes them, and loaded where they belong to a network."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from scripts.diffusion.networks import unet_of
from scripts.running.errors import BundleError
from scripts.running.files import save_tensors, write_atomically, write_text

logger = logging.getLogger(__name__)
PATTERN = re.compile(r"checkpoint_(\d+)\.pt")


class Unsaid:
    """The value of a knob that nobody has written down."""


class Knob(NamedTuple):
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
# weights file. A new one also gets a line in `weights_description` of train.json and of inference.json.
DESCRIBING = {
    "spatial_shape": Knob(fixed=False),
    "voxel_size": Knob(fixed=False),  # mm; in training it is known once the data are, see `CheckpointHandler`
    "wavelet_levels": Knob(shown=True, older=0),
    "coarse": Knob(older=None),
    "detail_rms": Knob(shown=True),  # of no account without wavelets, and written down with them
    "network_class": Knob(of_unet=True, older="DiffusionModelUNet"),
    "channels": Knob(of_unet=True, shown=True),
    "attention_levels": Knob(of_unet=True, shown=True),
    "num_head_channels": Knob(of_unet=True),
    "num_res_blocks": Knob(of_unet=True, shown=True),
    "norm_num_groups": Knob(of_unet=True),
    "scheduler": Knob(),  # the name of its class
    "num_train_timesteps": Knob(),
    "schedule": Knob(),
    "prediction_type": Knob(),
    "timestep_sampling": Knob(fixed=False, shown=True, older="uniform"),  # of training alone
    "class_names": Knob(of_unet=True, older=None),
}


def as_json(content: Any) -> Any:
    """As JSON gives it back: a tuple is a list."""
    return json.loads(json.dumps(content))


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
    for key, value in expected.items():
        then = said(description, key)
        if then is not Unsaid and then != as_json(value) and (same_run or DESCRIBING[key].fixed):
            raise BundleError(
                f"{key}: {value!r} was given, but {path!r} was trained with {then!r}; give the same (or the preset "
                "that was used for training)"
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


def load_file(path: str, device: torch.device | str = "cpu", mmap: bool = False) -> dict:
    """Read a PyTorch file with `weights_only` (nothing in it is executed), or a safetensors file.

    Args:
        mmap: leave the tensors of a PyTorch file, a zip file, where they are until they are looked at.

    Raises:
        BundleError: it is torn, of another kind, holds objects, or holds something else than a dictionary.
    """
    try:
        if path.endswith(".safetensors"):
            import safetensors  # here, since MONAI Label does not install it

            with safetensors.safe_open(path, "pt", device=str(device)) as file:
                content = OrderedDict((name, file.get_tensor(name)) for name in file.keys())
                content._metadata = {"description": {"json": (file.metadata() or {}).get("description")}}
            return content
        place = torch.device(device)
        place = "cpu" if place.type == "cpu" else place  # torch.load does not know cpu:0
        content = torch.load(path, map_location=place, weights_only=True, mmap=mmap)
    except Exception as e:  # torch.load has many ways to fail on a damaged file
        raise BundleError(f"{path!r} cannot be read as PyTorch weights{why_unreadable(path, e)}") from e
    if not isinstance(content, dict):
        raise BundleError(f"{path!r} holds a {type(content).__name__}; a state dict would be right")
    return content


def why_unreadable(path: str, error: Exception) -> str:
    """The end of a sentence; PyTorch's own texts are advice for programmers, several lines long and with colours."""
    try:
        objects = get_unsafe_globals_in_checkpoint(path)  # of pickled things, by their names alone
    except Exception:  # not a zip file, or torn
        objects = re.findall(r"GLOBAL (\S+) was not an allowed", str(error))
    if objects:
        names = ", ".join(sorted(objects)[:3]) + (", ..." if len(objects) > 3 else "")
        return f": it holds objects that are not tensors ({names}); save its state_dict alone"
    text = re.sub(r"\x1b\[\d*m", "", str(error)).split("WeightsUnpickler error:")[-1].strip()
    reason = text.splitlines()[0][:160] if text else ""
    kind = "" if isinstance(error, (RuntimeError, OSError)) else f"{type(error).__name__}: "
    return f" ({(kind + reason).rstrip(': ')}); it may be truncated or of another kind"


EMA = re.compile(r"(^|[._])ema([._]|$)", re.IGNORECASE)
WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.)")


def is_state_dict(content: Any) -> bool:
    """Whether something is names and tensors, and at least one."""
    whole = isinstance(content, dict) and bool(content)
    return whole and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items())


def state_dicts_in(content: Mapping[Any, Any], depth: int = 3) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(dotted name, state dict) of all that lie in a dictionary, up to some depth; not the moments of an optimizer."""
    for key, value in content.items():
        if is_state_dict(value):
            yield str(key), value
        elif isinstance(value, dict) and "param_groups" not in value and depth > 1:
            for name, inner in state_dicts_in(value, depth - 1):
                yield f"{key}.{name}", inner


def unwrapped(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict under the names of the network itself.

    What programs put before all names (`module.`, `_orig_mod.`, `unet.`) is what all of them have in common: the parts
    of a U-Net begin with several words.
    """
    names = [name for name in state_dict if name != "n_averaged"]  # of torch.optim.swa_utils.AveragedModel
    common = os.path.commonprefix([WRAPPERS.sub("", name).lstrip(".") for name in names])
    prefix = common[: common.rfind(".") + 1]
    plain = [WRAPPERS.sub("", name).lstrip(".").removeprefix(prefix) for name in names]
    if plain == list(state_dict) or len(set(plain)) < len(names):
        return state_dict
    renamed = OrderedDict((new, state_dict[old]) for new, old in zip(plain, names, strict=True))
    renamed._metadata = getattr(state_dict, "_metadata", {})
    return renamed


def read_state_dict(path: str, weights: str = "ema", mmap: bool = False) -> dict[str, torch.Tensor]:
    """The state dict of a network from any of the files that hold one.

    Args:
        path: a plain state dict, a dictionary that holds one ({"model": state dict}, as MedForj publishes; "state_dict"
            and so on), or an average besides ("ema", "state_dict_ema" and so on), such as a checkpoint of a whole
            training run of this bundle; or a .safetensors file.
        weights: "ema" or "raw": which ones where there are both.
        mmap: see `load_file`.

    Raises:
        BundleError: it cannot be read, or which state dict is meant is not clear; shows the keys of the file.
    """
    if weights not in ("ema", "raw"):
        raise BundleError(f"weights: {weights!r} is unknown; it must be 'ema' or 'raw'")
    content = load_file(path, mmap=mmap)
    found = dict(state_dicts_in(content))
    if not found and any(isinstance(value, torch.Tensor) for value in content.values()):
        found = {"": content}
    averages = [name for name in found if EMA.search(name)]
    others = [name for name in found if name not in averages]
    wanted = averages or others if weights == "ema" else others
    if len(wanted) != 1:
        holds = f"{len(wanted)} state dicts ({', '.join(wanted)})" if wanted else "no state dict"
        keys = ", ".join(map(repr, list(content)[:8])) + (", ..." if len(content) > 8 else "")
        raise BundleError(
            f"{path!r} holds {holds} where one is needed (weights = {weights!r}); its keys are: {keys or 'none'}. A "
            "file of the network's state dict alone would be right"
        )
    state_dict = found[wanted[0]]
    if not is_state_dict(state_dict):
        return state_dict  # `check_fits` names what is no tensor
    return unwrapped(state_dict)


def check_finite(state_dict: Mapping[str, Any], path: str) -> None:
    """Raises BundleError, naming tensors, where weights hold NaN or infinite numbers."""
    tensors = {name: t for name, t in state_dict.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        names = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
        raise BundleError(
            f"{path!r} holds NaN or infinite weights in {len(bad)} of {len(tensors)} tensors ({names}); an earlier "
            "checkpoint of that training, with finite ones, would be right"
        )


def check_fits(network: nn.Module, state_dict: Mapping[str, Any], path: str) -> None:
    """Raises BundleError, naming tensors, where a state dict does not belong to a network."""
    wanted = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    found = {name: tuple(t.shape) if isinstance(t, torch.Tensor) else type(t) for name, t in state_dict.items()}
    if not wanted.keys() & found.keys():
        names = [", ".join(list(of)[:3]) for of in (found, wanted)]
        raise BundleError(
            f"{path!r} is of another kind of network: its {len(found)} tensors are named {names[0]}, ...; those of "
            f"this config {names[1]}, ..."
        )
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


def load_weights(
    network: nn.Module, ckpt_path: str, weights: str = "ema", expected: Mapping[str, Any] | None = None
) -> None:
    """Load the weights of a file that `read_state_dict` can read into a network.

    A state dict of a `monai-generative` 0.2 network is translated by MONAI's `load_old_state_dict`.

    Args:
        network: receives the weights, on its own device and in its own type; a `DiffusionSampler` passes them on.
        ckpt_path: the file.
        weights: "ema" or "raw", for a checkpoint of a whole training run.
        expected: knobs of `DESCRIBING` as they are now; compared with what the file, or the JSON file beside it, says.

    Raises:
        BundleError: no such file (says how to make one), torn, of another network, not finite, or trained with other
            knobs. Where nothing is known of a knob there is a warning.
    """
    if not os.path.isfile(ckpt_path):
        raise BundleError(
            f"ckpt_path: there are no weights at {ckpt_path!r}. They are made by `python -m monai.bundle run training "
            "--config_file configs/train.json --dataset_dir YOUR_SCANS`, or, as a small demonstration, by the first "
            "command of README.md; --ckpt_path names other ones"
        )
    expected, description = expected or {}, described(ckpt_path)
    check_described(description, expected, ckpt_path)
    state_dict = read_state_dict(ckpt_path, weights)
    check_finite(state_dict, ckpt_path)
    strangers = [name for name in state_dict if name not in network.state_dict()]
    if strangers and all(OLD_NAMES.search(name) for name in strangers):
        load_old(unet_of(network), state_dict, ckpt_path)
    else:
        check_fits(network, state_dict, ckpt_path)
        network.load_state_dict(state_dict)
    warn_of_assumptions(description, expected, ckpt_path)


def load_old(unet: nn.Module, state_dict: dict, path: str) -> None:
    """Load a `monai-generative` state dict into a `DiffusionModelUNet`, which must be built without the projection
    that such a network never applied."""
    if any(name.endswith(".attn.out_proj.weight") for name in unet.state_dict()):
        raise BundleError(
            f"{path!r} was trained with monai-generative, whose attention has no output projection; give "
            "--network_def#unet#unet#include_fc false --network_def#unet#unet#use_combined_linear false"
        )
    try:
        with contextlib.redirect_stdout(None):
            unet.load_old_state_dict(dict(state_dict))
    except (KeyError, RuntimeError) as e:
        raise BundleError(
            f"{path!r}, trained with monai-generative, does not belong to the network of this config: {str(e)[:300]}"
        ) from e


def save_weights(state_dict: Mapping[str, torch.Tensor], description: Mapping[str, Any], path: str) -> None:
    """Write a plain state dict with its description inside, as PyTorch or, by its name, as a safetensors file.

    Raises:
        BundleError: it cannot be written.
    """

    def write(temporary: str) -> None:
        if path.endswith(".safetensors"):
            import safetensors.torch  # here, as in `load_file`

            contiguous = {name: tensor.contiguous() for name, tensor in state_dict.items()}
            header = {"format": "pt", "description": json.dumps(dict(description))}  # the first is what others look for
            Path(temporary).write_bytes(safetensors.torch.save(contiguous, header))
        else:
            save_tensors(labelled(state_dict, description), temporary)

    write_atomically(path, write)


def release_weights(ckpt_path: str, path: str, weights: str = "ema") -> None:
    """Write the weights of a file that `read_state_dict` can read as a plain bfloat16 state dict, half the size.

    What training wrote about them goes into it, and beside it: `path` with .json.

    Args:
        ckpt_path: where they are.
        path: where they go, for example models/model.pt, or model.safetensors for a file of that kind.
        weights: "ema" or "raw", for a checkpoint of a whole training run.

    Raises:
        BundleError: weights that cannot be read or are not finite, or `path` cannot be written.
    """
    state_dict = read_state_dict(ckpt_path, weights)
    check_finite(state_dict, ckpt_path)
    description = described(ckpt_path)
    save_weights({name: t.to(torch.bfloat16) for name, t in state_dict.items()}, description, path)
    write_text(os.path.splitext(path)[0] + ".json", json.dumps(description, indent=4) + "\n")
