"""How a sampler becomes TorchScript: its loop is compiled, its network is traced."""

from __future__ import annotations

import copy
from unittest import mock

import torch
from monai.networks.nets import diffusion_model_unet
from torch import nn

from scripts.diffusion.networks import unet_of


def with_traced_network(sampler: nn.Module) -> nn.Module:
    """A copy of a sampler with the network `unet` replaced by its trace, for `torch.jit.script`.

    A `DiffusionModelUNet` cannot be scripted, but its trace with (x, timesteps), and conditions where it has
    covariates, is exact for all sizes, batches, timesteps and conditions. The timestep embedding is scripted first,
    since a trace of it would fix the device.
    """
    scriptable = copy.copy(sampler)
    scriptable._modules = dict(sampler._modules)
    weight = next(p for p in sampler.unet.parameters() if p.ndim in (4, 5))
    levels = len(getattr(unet_of(sampler), "block_out_channels", (0,) * 4))
    side = 2 ** (levels + getattr(sampler.unet, "wavelet_levels", 0))
    channels = getattr(sampler.unet, "in_channels", weight.shape[1])
    example = torch.randn(2, channels, *[side] * (weight.ndim - 2), device=weight.device)
    embedding = torch.jit.script(diffusion_model_unet.get_timestep_embedding)
    inputs = {"x": example, "timesteps": torch.tensor([3.0, 1.0], device=example.device)}
    if sampler.num_class_embeds is not None:
        inputs["class_labels"] = torch.stack([torch.zeros_like(sampler.unknown), sampler.unknown]).to(example.device)
    with mock.patch.object(diffusion_model_unet, "get_timestep_embedding", embedding), torch.no_grad():
        unet = torch.jit.trace(sampler.unet.eval(), example_kwarg_inputs=inputs)
    scriptable._modules["unet"] = unet
    return scriptable
