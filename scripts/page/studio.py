"""Volumes that are made one at a time while somebody watches: the same voxels as those of `run`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from scripts.diffusion.asked import requests
from scripts.diffusion.loaded import loaded
from scripts.running.checks import check_knobs
from scripts.sampling.volumes import SaveVolumes, weights_digest


class Wish(NamedTuple):
    """What a visitor asks for.

    Attributes:
        seed: of the noise.
        num_inference_steps: passes of the network.
        guidance_scale: see `scripts.diffusion.guidance.GuidedNetwork`.
        covariates: {"age": 70}; with a list as a value, {"age": [20, 40]}, a sweep; {} for nobody in particular.
    """

    seed: int = 0
    num_inference_steps: int = 25
    guidance_scale: float = 1.0
    covariates: Mapping[str, Any] = {}


class Moment(NamedTuple):
    """A volume on its way out of the noise.

    Attributes:
        volume: its number among those of the wish.
        count: how many volumes these are.
        step: how many of its steps are done.
        voxels: (*spatial) float32 on the CPU in [0, 255]: x after that step, or the volume once it is done.
        path: of the file, once the volume is done.
        said: what it is, such as "age 70, sex f".
    """

    volume: int
    count: int
    step: int
    voxels: torch.Tensor
    path: str | None
    said: str


def quoted(text: str) -> str:
    """A word of a command line, in double quotes where it has single ones, as lists and dictionaries have."""
    word = shlex.quote(text)
    return word if word == text or re.search(r'["$`\\!]', text) else f'"{text}"'


class Studio:
    """The sampler of inference.json, step by step.

    Args:
        ckpt_path: weights. Size, network and process are those that the weights say they have.
        config_file: inference.json, or a list of it and of presets.
        weights: "ema" or "raw", for a checkpoint of a whole training run.
        knobs: other values of inference.json's keys.
        device: that samples.

    Raises:
        BundleError: there are no such weights, or inference would refuse them or a knob.
    """

    def __init__(
        self,
        ckpt_path: str,
        config_file: str | Sequence[str],
        weights: str = "ema",
        knobs: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        parser = loaded(config_file, ckpt_path, weights, knobs, device)
        self.ckpt_path, self.knobs = ckpt_path, dict(knobs or {})  # a command line has to say them
        self.sampler = parser.get_parsed_content("network")
        self.covariates = parser.get_parsed_content("known_covariates")
        self.spatial_shape = tuple(parser.get_parsed_content("spatial_shape"))
        self.most_steps = int(parser.get_parsed_content("num_train_timesteps"))
        self.draw_noise = parser.get_parsed_content("draw_noise")
        self.postprocessing = parser.get_parsed_content("postprocessing")
        self.made_with = parser.get_parsed_content("made_with") | {"weights": weights_digest(self.sampler)}
        self.device = torch.device(device)

    def requests(self, wish: Wish) -> list[dict[str, Any]]:
        """The volumes of a wish, see `scripts.diffusion.asked.requests`.

        Raises:
            BundleError: a wish that the weights cannot have.
        """
        check_knobs(seed=wish.seed, num_inference_steps=wish.num_inference_steps, guidance_scale=wish.guidance_scale)
        return requests(1, dict(wish.covariates), None, self.covariates, wish.guidance_scale)

    def command(self, wish: Wish) -> str:
        """The command line that makes the same volumes."""
        options = {
            "ckpt_path": self.ckpt_path,
            **self.knobs,
            "seed": wish.seed,
            "num_samples": 1,
            "num_inference_steps": wish.num_inference_steps,
        }
        if wish.covariates:
            options["covariates"] = dict(wish.covariates)
        if wish.guidance_scale != 1:
            options["guidance_scale"] = wish.guidance_scale
        words = [f"--{key} {quoted(str(value))}" for key, value in options.items()]
        return "python -m monai.bundle run --config_file configs/inference.json " + " ".join(words)

    def moments(self, wish: Wish, output_dir: str) -> Iterator[Moment]:
        """Make the volumes of a wish one after another, and write each as `run` does.

        Args:
            wish: what is asked for.
            output_dir: folder of the files.

        Raises:
            BundleError: see `requests`, and `scripts.sampling.volumes.SaveVolumes`.
        """
        asked = self.requests(wish)
        sampler = self.sampler.with_steps(
            self.sampler.unet,
            num_inference_steps=wish.num_inference_steps,
            guidance_scale=wish.guidance_scale,
            progress=False,
        ).to(self.device)
        own = {"num_inference_steps": wish.num_inference_steps, "guidance_scale": wish.guidance_scale}
        own |= {"covariates": dict(wish.covariates)} if wish.covariates else {}
        settings = self.made_with | {key: value for key, value in own.items() if self.made_with.get(key) != value}
        saver = SaveVolumes(output_dir, settings=settings)
        for number, request in enumerate(asked):
            noise = self.draw_noise(wish.seed, request["image"])
            conditions = request["condition"][None].to(self.device)
            for step, x in enumerate(sampler.on_the_way(noise[None].to(self.device), conditions), 1):
                shown = (127.5 * (x[0, 0].float().cpu() + 1)).clamp(0, 255)
                yield Moment(number, len(asked), step, shown, None, request["said"])
            pred = self.postprocessing({"pred": x[0].cpu()})["pred"]
            path = saver.save({**request, "image": noise}, pred)
            yield Moment(number, len(asked), step, torch.as_tensor(pred)[0], path, request["said"])
