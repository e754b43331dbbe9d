"""One pass of a network in sampling: its conditions and their guidance, its precision, and the memory that it needs."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from scripts.diffusion.networks import unet_of
from scripts.running.checks import as_bool, check_knobs
from scripts.running.errors import BundleError
from scripts.running.out_of_memory import numbers, out_of_memory

logger = logging.getLogger(__name__)


class GuidedNetwork(nn.Module):
    """`predict(x, timesteps, asked) -> prediction` of a network, with the state dict of that network alone.

    What is asked of a volume is its condition and its condition image. A condition is what `scripts.running.covariates`
    says: (B,) int64 of a network with one word, such as its class, else (B, covariates) float32; it may be unknown, in
    whole or in part. A condition image is what `scripts.running.condition_images` says, (B, C, *spatial), and 0 where
    it is unknown. The output is guided
    (Ho & Salimans 2022, Eq. 6, whose w is guidance_scale - 1):

        guided = unconditional + guidance_scale * (conditional - unconditional).

    They guide the noise, but for a given x_t every prediction type is an affine function of the noise, and the two
    weights of the outputs, 1 - scale and scale, add up to 1: guiding any of them is the same.

    Args:
        unet: a network (x, timesteps) -> prediction, such as MONAI's `DiffusionModelUNet`; with covariates,
            (x, timesteps, class_labels=...) -> prediction. Its `unknown` is the condition that says nothing; with
            `num_class_embeds` n alone it is n - 1. A condition image is further channels of x.
        condition: of volumes that are given none; None for unknown.
        guidance_scale: 1 takes the conditional output as it is, with one pass of the network a step; others take two.
        amp_dtype: autocast the network to this type; None for float32. Not used when scripted.
        halve_batch_on_oom: where a GPU's memory does not suffice for a pass of the network, take half as many volumes
            at a time from there on, down to one; the volumes are the same. Not used when scripted.

    Raises:
        BundleError: a condition that the network cannot have, guidance of a network without conditions; when called, a
            pass that the GPU's memory does not suffice for.
    """

    def __init__(
        self,
        unet: nn.Module,
        condition: int | Sequence[float] | None = None,
        guidance_scale: float = 1.0,
        amp_dtype: torch.dtype | None = None,
        halve_batch_on_oom: bool | str = True,
    ) -> None:
        super().__init__()
        check_knobs(guidance_scale=guidance_scale)
        self.unet, self.amp_dtype = unet, amp_dtype
        self.halve_batch_on_oom = as_bool(halve_batch_on_oom=halve_batch_on_oom)
        self.most: int = 0  # volumes of a pass that the memory suffices for; 0 where nothing speaks against any number
        self.num_class_embeds = getattr(unet, "num_class_embeds", None)
        self.shown: int = getattr(unet, "in_channels", 1) - getattr(unet, "out_channels", 1)  # C of condition images
        unknown = getattr(unet_of(unet), "unknown", (self.num_class_embeds or 1) - 1)
        self.register_buffer("unknown", torch.tensor(unknown), persistent=False)
        given = self.unknown if condition is None else torch.tensor(condition, dtype=self.unknown.dtype)
        self.register_buffer("condition", given, persistent=False)
        self.guidance_scale = float(guidance_scale)
        right = given.shape == self.unknown.shape and (given.ndim or 0 <= int(given) <= int(self.unknown))
        if not right:
            kind = f"an index from 0 to {unknown}" if not self.unknown.ndim else f"{len(unknown)} numbers"
            raise BundleError(f"condition: {condition!r} was given; the network takes {kind}")
        if self.guidance_scale != 1 and self.num_class_embeds is None and not self.shown:
            raise BundleError(
                f"guidance_scale: {guidance_scale!r} was given, but the network knows no covariates; expected 1"
            )

    def without_images(self, noise: torch.Tensor) -> torch.Tensor:
        """The noise alone, of noise that may have condition images as further channels."""
        return noise[:, :1] if self.shown > 0 else noise

    def asked_of(self, noise: torch.Tensor, conditions: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(condition (B,) or (B, covariates), condition image (B, C, *spatial)) of each volume of a batch.

        Args:
            noise: with the condition images as further channels, or without: they are then unknown.
            conditions: None for `condition`.
        """
        images = noise[:, 1:] if self.shown > 0 else noise[:, :0]
        if images.shape[1] == 0:  # another number than the network takes is its own error
            images = torch.zeros_like(noise[:, :1]).repeat_interleave(self.shown, 1)
        if conditions is None:
            conditions = self.condition.to(noise.device).unsqueeze(0).repeat_interleave(noise.shape[0], 0)
        return conditions, images

    def predict(
        self, x: torch.Tensor, timesteps: torch.Tensor, asked: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """The guided float32 output of the network for x_t (B, 1, *spatial), timesteps (B,), and what is asked."""
        conditions, images = asked
        conditional = self.output(x, timesteps, conditions, images)
        if self.guidance_scale == 1.0:
            return conditional
        nobody = self.unknown.to(x.device).expand_as(conditions)
        unconditional = self.output(x, timesteps, nobody, torch.zeros_like(images))
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def output(
        self, x: torch.Tensor, timesteps: torch.Tensor, conditions: torch.Tensor, images: torch.Tensor
    ) -> torch.Tensor:
        """One pass of the network, float32."""
        if self.shown > 0:
            x = torch.cat([x, images], 1)
        if torch.jit.is_scripting():
            return self.call(x, timesteps, conditions)
        else:
            with torch.autocast(x.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
                return self.output_in_parts(x, timesteps, conditions)

    @torch.jit.unused
    def volumes_at_once(self, x: torch.Tensor) -> int:
        """How many volumes of a batch a pass takes.

        On a CPU one: as fast as a batch, and with the same rounding whatever the batch is.
        """
        size = 1 if x.device.type == "cpu" else len(x)
        return min(size, self.most or size)

    @torch.jit.unused
    def output_in_parts(self, *inputs: torch.Tensor) -> torch.Tensor:
        """A pass over as many volumes at a time as the memory suffices for."""
        while True:
            size = self.volumes_at_once(inputs[0])
            try:
                return torch.cat([self.call(*part).float() for part in zip(*(t.split(size) for t in inputs))])
            except torch.OutOfMemoryError as e:
                if size == 1 or not self.halve_batch_on_oom:
                    raise self.explained(e, size, inputs[0]) from e
                reason = numbers(e)
            # outside of the handler, whose exception holds the tensors of the pass
            self.most = size // 2
            torch.cuda.empty_cache()
            logger.warning(f"out of GPU memory with {size} volumes at a time ({reason}): going on with {self.most}")

    @torch.jit.unused
    def explained(self, error: torch.OutOfMemoryError, size: int, x: torch.Tensor) -> BundleError:
        advice = [f"--batch_size {size // 2}", "--halve_batch_on_oom true"] if size > 1 else []
        if self.amp_dtype is None:
            advice.append("--amp auto")
        knobs = {"batch_size": size, "spatial_shape": list(x.shape[2:]), "amp": self.amp_dtype or torch.float32}
        return out_of_memory(error, "in sampling", [*advice, "a smaller spatial_shape", "fewer channels"], **knobs)

    def call(self, x: torch.Tensor, timesteps: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
        """The network as it is. TorchScript compiles one branch only, for it sees whether the number is None."""
        if self.num_class_embeds is None:
            return self.unet(x, timesteps)
        else:
            return self.unet(x, timesteps, class_labels=conditions)

    def state_dict(self, *args, **kwargs):
        """The network's own state dict: no prefix, no tables."""
        return self.unet.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Load the network's own state dict, or the average in a checkpoint of a whole training run.

        MONAI Label hands over what any file in models/ holds, and is not strict: it would go on with random weights.
        """
        return self.unet.load_state_dict(state_dict.get("ema", state_dict), strict=strict, assign=assign)
