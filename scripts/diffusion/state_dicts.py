"""State dicts in files of any layout, and whether one belongs to a network."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from scripts.running.errors import BundleError

EMA = re.compile(r"(^|[._])ema([._]|$)", re.IGNORECASE)
WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.)")


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
        raise BundleError(f"{path!r} holds a {type(content).__name__}; expected a state dict")
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
            f"{path!r} holds {holds} where one is needed (weights = {weights!r}); its keys are: {keys or 'none'}; "
            "expected a file of the network's state dict alone"
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
            f"{path!r} holds NaN or infinite weights in {len(bad)} of {len(tensors)} tensors ({names}); expected an "
            "earlier checkpoint of that training, with finite ones"
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
