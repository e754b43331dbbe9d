"""Fill a part of a volume with the unconditional network: what is known steers what is sampled.

At every step the network's opinion of the volume, x_0, is replaced by the known voxels where these are (Wang et al.
2023, "Zero-shot image restoration using denoising diffusion null-space model", Eq. 13 with a mask as A), and the step
goes on from there. One step does not carry what is known far into the hole, so each is taken several times: the volume
gets the noise back that the step removed, and goes through it again (Lugmayr et al. 2022, "RePaint", Alg. 1).
"""

from __future__ import annotations

import torch

from scripts.diffusion.sampler import DiffusionSampler, tqdm, volume_seed


def noised_again(sampler: DiffusionSampler, i: int, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """x at the level after step i -> x at the level before it, by the forward process."""
    (a, s), (a_next, s_next) = sampler.levels[i], sampler.levels[i + 1]
    back = a / a_next
    return back * x + (s**2 - (back * s_next) ** 2).clamp(min=0).sqrt() * z


@torch.no_grad()
def filled(
    sampler: DiffusionSampler, noise: torch.Tensor, known: torch.Tensor, hole: torch.Tensor, repeats: int = 4
) -> torch.Tensor:
    """Volumes that equal `known` outside of the hole, and go on with it inside.

    Args:
        sampler: with a solver of one step, such as "ddpm". All its noise depends on `noise` alone.
        noise: standard normal, (B, C, *spatial).
        known: volumes in [-1, 1] of that shape; what they hold in the hole does not count.
        hole: boolean, of that shape.
        repeats: how often each step is taken; the time grows as it.
    """
    asked, x = sampler.asked_of(noise, None), sampler.without_images(noise)
    generators = sampler.generators(x)
    again = [torch.Generator(x.device).manual_seed(volume_seed(one) ^ 1) for one in x]  # another stream than theirs
    nothing = torch.zeros_like(x)
    last = len(sampler.timesteps) - 1
    for i in tqdm(range(last + 1), "filling", leave=False):
        for repeat in range(repeats if i < last else 1):
            if repeat:
                z = torch.stack([torch.randn(x.shape[1:], generator=g, device=x.device) for g in again])
                x = noised_again(sampler, i, x, z)
            x0 = torch.where(hole, sampler.sample(i, x, asked), known)
            x = sampler.onward(i, x, x0, nothing, generators)
    return x
