"""How a network runs fast, or in little memory, on the machine at hand. Nothing here changes a state dict."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from scripts.diffusion.networks import unet_of
from scripts.running.checks import as_bool, check_knobs
from scripts.running.errors import BundleError
from scripts.running.knobs import COMPILE_MODES

logger = logging.getLogger(__name__)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's mallopt


def keep_freed_memory(device: torch.device) -> bool:
    """On a CPU, let glibc's malloc keep what is freed instead of giving it back to the system; elsewhere do nothing.

    Each activation of a 3D network is tens of MB, which malloc otherwise maps anew for every layer, so that the kernel
    must clear its pages: about a third of a forward pass. The process keeps its peak memory until it ends.

    Returns:
        whether it was done: the device is a CPU and the C library is glibc.
    """
    if torch.device(device).type != "cpu":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library, another system
        return False
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, 2**31 - 1), mallopt(M_TOP_PAD, 64 * 2**20)])


def checkpointed(network: nn.Module, activation_checkpointing: str | Sequence[int]) -> nn.Module:
    """Let residual and attention blocks forget their activations, to be computed again in the backward pass.

    Chen et al. 2016, "Training deep nets with sublinear memory cost". Values and gradients stay the same.

    Args:
        network: a `DiffusionModelUNet`; its blocks are changed in place.
        activation_checkpointing: "none", "all", or a list of levels of the U-Net, 0 for its finest.

    Raises:
        BundleError: neither of these words, or a level that the network does not have.
    """
    if activation_checkpointing == "none":
        return network
    levels = len(network.down_blocks)
    chosen = list(range(levels)) if activation_checkpointing == "all" else activation_checkpointing
    if not isinstance(chosen, (list, tuple)) or not all(isinstance(i, int) and 0 <= i < levels for i in chosen):
        raise BundleError(
            f"activation_checkpointing: {activation_checkpointing!r} was given; it must be 'none', 'all' or a list of "
            f"levels from 0 to {levels - 1}"
        )
    for level in chosen:
        for block in (network.down_blocks[level], network.up_blocks[-1 - level]):
            for part in (*block.resnets, *getattr(block, "attentions", ())):
                part.forward = partial(checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False)
    return network


def compiled(network: nn.Module, mode: str) -> nn.Module:
    """Compile a network in place by `torch.compile`; where that fails, say why and go on without.

    Args:
        mode: one of COMPILE_MODES; "reduce-overhead" records CUDA graphs.
    """
    network.compile(mode=mode, dynamic=False)
    fast = network._compiled_call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return fast(*args, **kwargs)
        except torch.OutOfMemoryError:  # without the compiler it would be no less
            raise
        except Exception as e:  # the compiler's own errors, or those of the C++ or Triton compiler that it calls
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
            logger.warning(f"compile: going on without torch.compile, which failed ({type(e).__name__}: {reason})")
            network._compiled_call_impl = None
            return network(*args, **kwargs)

    network._compiled_call_impl = call
    return network


def prepared(
    network: nn.Module,
    device: torch.device,
    channels_last: bool | str = False,
    compile: bool | str = False,
    activation_checkpointing: str | Sequence[int] = "none",
    amp_dtype: torch.dtype | None = torch.bfloat16,
) -> nn.Module:
    """A network on its device, made ready to run fast; the same object, with the same state dict.

    Args:
        network: a `DiffusionModelUNet`, or a module such as `WaveletUNet` or `DiffusionSampler` with one inside.
        channels_last: store weights, and so activations, with the channels innermost; "auto" does so on a GPU, and
            on a CPU that computes in float32, where convolutions are then twice as fast.
        compile: false, true, or one of COMPILE_MODES.
        activation_checkpointing: see `checkpointed`.
        amp_dtype: what the network will compute in, None for float32.

    Raises:
        BundleError: a word that is not known.
    """
    check_knobs(compile=compile)
    mode = compile if compile in COMPILE_MODES else "default" if as_bool(compile=compile) else None
    network = network.to(device)
    unet = unet_of(network)
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu or amp_dtype is None if channels_last == "auto" else as_bool(channels_last=channels_last):
        dims = next(p.ndim for p in unet.parameters() if p.ndim in (4, 5))
        unet.to(memory_format=torch.channels_last if dims == 4 else torch.channels_last_3d)
    checkpointed(unet, activation_checkpointing)
    if on_gpu:
        for module in unet.modules():  # fused attention: its matrix of 4096 x 4096 is never stored
            if hasattr(module, "use_flash_attention"):
                module.use_flash_attention = True
    if mode is not None:
        compiled(unet, mode)
    return network


def fast_in_bfloat16() -> bool:
    """Whether this CPU computes faster in bfloat16 than in float32.

    With AMX it does, and with AVX-512 of AMD; Intel's AVX-512 multiplies bfloat16 at the speed of float32, and what
    PyTorch has around it makes it slower (measured on an Emerald Rapids without AMX: a step 7.5 s against 4.8 s).
    """
    if torch.cpu._is_amx_tile_supported():
        return True
    name = torch.cpu.get_capabilities().get("cpu_name", "") if hasattr(torch.cpu, "get_capabilities") else ""
    return torch.cpu._is_avx512_bf16_supported() and "Intel" not in name


def amp_dtype(
    amp: str, device: str | torch.device, spatial_shape: Sequence[int] = (), levels: int = 1
) -> torch.dtype | None:
    """The type that autocast uses, or None for plain float32.

    On a CPU, PyTorch 2.13 writes past its memory in the weight gradient of a 3D convolution in
    bfloat16 where a side of its input is 2: infinite weights, or a crash. A training whose network comes down to that
    is kept in float32.

    Args:
        amp: "auto" is bfloat16 on a GPU that has it in hardware and on a CPU that is `fast_in_bfloat16`, float16 on an
            older GPU, float32 on other CPUs; else one of "float32", "bfloat16", "float16" (float16 only on a GPU: its
            loss must be scaled).
        device: where the network runs.
        spatial_shape: of the volumes to train on; nothing where only the forward pass is needed, which is right.
        levels: of the network, and of wavelets around it, each of half the sides.
    """
    device = torch.device(device)
    choices = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
    coarsest = [side // 2 ** (levels - 1) for side in spatial_shape]
    unsafe = device.type == "cpu" and len(coarsest) == 3 and min(coarsest) <= 2
    if amp == "auto":
        if device.type != "cuda":
            return torch.bfloat16 if device.type == "cpu" and not unsafe and fast_in_bfloat16() else None
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if amp not in choices or (amp == "float16" and device.type != "cuda"):
        words = ("auto", "float32", "bfloat16") + (("float16",) if device.type == "cuda" else ())
        raise BundleError(f"amp: {amp!r} cannot be used on {device}; it must be one of {words}")
    if amp == "bfloat16" and unsafe:
        raise BundleError(
            f"amp: 'bfloat16' was given, but the coarsest of the network's {levels} levels has {coarsest} voxels, and "
            "PyTorch's bfloat16 gradients are wrong on a CPU where a side is 2 or less; expected auto or float32, a "
            "larger spatial_shape or fewer levels (key channels)"
        )
    return choices[amp]
