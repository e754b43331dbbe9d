"""Denoisers that MONAI lacks, with the arguments and the `forward` of its `DiffusionModelUNet`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.blocks.mednext_block import MedNeXtBlock
from monai.networks.nets import DiffusionModelUNet
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock, zero_module
from torch import nn


def unet_of(network: nn.Module) -> nn.Module:
    """The U-Net inside a sampler, inside wavelets, or itself."""
    while isinstance(getattr(network, "unet", None), nn.Module):
        network = network.unet
    return network


class ConvNeXtBlock(MedNeXtBlock):
    """A ConvNeXt block that knows the time, in the place of a `DiffusionUNetResnetBlock`.

    With x' = skip(x), a 1x1 convolution where the width changes, and the embedding e of the time:

        x' + conv_1(GELU(conv_1(norm(conv_7(x') + linear(GELU(e))))))

    conv_7 is depth-wise and the 1x1 convolutions widen by 4 and narrow again: Liu et al. 2022, "A ConvNet for the
    2020s", figure 4. The layers are those of MONAI's `MedNeXtBlock` (Roy et al. 2023), but for two. The norm has one
    group, the usual stand-in for ConvNeXt's layer norm: MedNeXt's has a group a channel, which subtracts each channel's
    mean and with it the embedding of the time. The last convolution begins as zero, so that a new block is its skip
    connection (Ho et al. 2020, and MONAI's residual block); ConvNeXt's layer scale of 1e-6 does the same.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of x.
        out_channels: channels of the result.
        temb_channels: length of the embedding of the time.
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, temb_channels: int) -> None:
        super().__init__(out_channels, out_channels, expansion_ratio=4, kernel_size=7, dim=f"{spatial_dims}d")
        self.norm = nn.GroupNorm(1, out_channels)
        zero_module(self.conv3)
        self.time_emb_proj = nn.Linear(temb_channels, out_channels)
        self.skip_connection: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.skip_connection = (nn.Conv2d if spatial_dims == 2 else nn.Conv3d)(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """x (B, in_channels, *spatial) and the embedding (B, temb_channels) -> (B, out_channels, *spatial)."""
        x = self.skip_connection(x)
        time = self.time_emb_proj(self.act(emb))
        h = self.norm(self.conv1(x) + time.reshape(*time.shape, *[1] * (x.ndim - 2)))
        return x + self.conv3(self.act(self.conv2(h)))


class ConvNeXtUNet(DiffusionModelUNet):
    """MONAI's `DiffusionModelUNet` with each residual block replaced by a `ConvNeXtBlock`.

    The embeddings of time and class, attention, down- and up-sampling and skip connections stay MONAI's, and so does
    `forward(x, timesteps, context=None, class_labels=None)`. For the arguments see there; `norm_num_groups` is for the
    norms of attention and of the last layer.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        attention_levels: Sequence[bool],
        num_head_channels: int | Sequence[int],
        num_res_blocks: int | Sequence[int] = 1,
        norm_num_groups: int = 32,
        num_class_embeds: int | None = None,
    ) -> None:
        super().__init__(
            spatial_dims,
            in_channels,
            out_channels,
            num_res_blocks,
            channels,
            attention_levels,
            norm_num_groups,
            num_head_channels=num_head_channels,
            num_class_embeds=num_class_embeds,
        )
        for parent in list(self.modules()):
            for name, block in parent.named_children():
                if isinstance(block, DiffusionUNetResnetBlock):
                    new = ConvNeXtBlock(spatial_dims, block.channels, block.out_channels, block.emb_channels)
                    parent.register_module(name, new)
