"""The network of a sampler as an ONNX file, for programs that bring their own loop over the timesteps."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.networks.utils import convert_to_onnx
from torch import nn

from scripts.diffusion.loaded import loaded
from scripts.running.files import write_atomically

logger = logging.getLogger(__name__)


class ToldNetwork(nn.Module):
    """A network with its conditions as the third input: an ONNX file knows its inputs by their order."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
        return self.network(x, timesteps, class_labels=conditions)


def export_onnx(
    ckpt_path: str,
    path: str,
    config_file: str | Sequence[str],
    weights: str = "ema",
    knobs: Mapping[str, Any] | None = None,
) -> None:
    """Write the network (x (B, 1, *spatial), timesteps (B,)) -> prediction, for any batch and size that it takes.

    Condition images are further channels of x. A network with covariates also takes `conditions`, as
    `scripts.diffusion.guidance.GuidedNetwork` has them.

    ONNX Runtime must give what PyTorch gives, to 1e-4, before the file gets its name.

    Args:
        ckpt_path, config_file, weights, knobs: see `loaded`.
        path: models/model.onnx, say.

    Raises:
        BundleError: knobs or weights that inference would refuse too, or `path` cannot be written.
        AssertionError: ONNX Runtime gives something else.
    """
    parser = loaded(config_file, ckpt_path, weights, knobs)
    sampler = parser.get_parsed_content("network_def")
    network, inputs, names = sampler.unet, [torch.tensor([3.0, 1.0])], ["x", "timesteps"]
    if sampler.num_class_embeds is not None:
        network = ToldNetwork(network)
        inputs.append(torch.stack([torch.zeros_like(sampler.unknown), sampler.unknown]))
        names.append("conditions")
    dims = len(parser.get_parsed_content("spatial_shape"))
    levels = len(parser.get_parsed_content("channels")) + parser.get_parsed_content("wavelet_levels")
    sides = {0: "batch", **{2 + i: f"side_{i}" for i in range(dims)}}

    def write(temporary: str) -> None:
        convert_to_onnx(
            network,
            [torch.randn([2, 1 + sampler.shown, *[2**levels] * dims]), *inputs],
            input_names=names,
            output_names=["prediction"],
            filename=temporary,
            dynamic_axes={"x": sides, "prediction": sides} | {name: {0: "batch"} for name in names[1:]},
            verify=True,
            use_ort=True,
            rtol=0,
            atol=1e-4,
            device="cpu",
            dynamo=False,
        )

    write_atomically(path, write)
    logger.info(f"wrote {path}")
