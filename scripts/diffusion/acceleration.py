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
from scripts.running.checks import COMPILE_MODES, check_knobs, switch
from scripts.running.errors import BundleError

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
) -> nn.Module:
    """A network on its device, made ready to run fast; the same object, with the same state dict.

    Args:
        network: a `DiffusionModelUNet`, or a module such as `WaveletUNet` or `DiffusionSampler` with one inside.
        channels_last: store weights, and so activations, with the channels innermost.
        compile: false, true, or one of COMPILE_MODES.
        activation_checkpointing: see `checkpointed`.

    Raises:
        BundleError: a word that is not known.
    """
    check_knobs(compile=compile)
    mode = compile if compile in COMPILE_MODES else "default" if switch(compile=compile) else None
    network = network.to(device)
    unet = unet_of(network)
    if switch(channels_last=channels_last):
        dims = next(p.ndim for p in unet.parameters() if p.ndim in (4, 5))
        unet.to(memory_format=torch.channels_last if dims == 4 else torch.channels_last_3d)
    checkpointed(unet, activation_checkpointing)
    if torch.device(device).type == "cuda":
        for module in unet.modules():  # fused attention: its matrix of 4096 x 4096 is never stored
            if hasattr(module, "use_flash_attention"):
                module.use_flash_attention = True
    if mode is not None:
        compiled(unet, mode)
    return network
