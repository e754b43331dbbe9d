"""Features of networks that were trained on other images: MedicalNet, and networks for slices."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets import ResNet
from monai.networks.nets.resnet import get_pretrained_resnet_medicalnet, resnet_params
from torch import nn

from scripts.evaluation.extractors import MissingWeights, all_batches, batches
from scripts.running.checks import check_knobs, resolved_device
from scripts.running.errors import BundleError

DOWNLOAD = "download"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# grey x in [0, 1] -> (offset, scale) of the three channels: input = (x - offset) / scale
NORMALISATIONS = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),  # torchvision's weights
    "bgr_mean": (IMAGENET_MEAN[::-1], (1, 1, 1)),  # MONAI's copy of the RadImageNet weights (its PerceptualLoss)
    "symmetric": ((0.5,) * 3, (0.5,) * 3),  # [-1, 1]
    "byte": ((0,) * 3, (1 / 255,) * 3),  # [0, 255]: Inception TorchScript files for FID
}


def file_mark(path: str) -> str:
    """A short hash of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=8)).hexdigest()


def read_resnet(path: str, key: str) -> dict[str, torch.Tensor]:
    """The weights in a file of torch.save, without what wraps them ("state_dict", "module.", the head).

    Raises:
        BundleError: a file that torch cannot read, or that holds no weights; `key` is the knob that named it.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch has no common class for what a broken file raises
        raise BundleError(f"{key}: {path!r} is not a file of weights that torch.load reads ({type(e).__name__})") from e
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise BundleError(f"{key}: {path!r} holds {type(content).__name__}; expected a state dict of a ResNet")
    return without_wrapping(content)


def without_wrapping(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameter names without DataParallel's prefix, and without those of a classification or segmentation head."""
    state = {k.removeprefix("module."): v for k, v in state.items()}
    return {k: v for k, v in state.items() if not k.startswith(("fc.", "conv_seg."))}


def resnet_from(state: dict[str, torch.Tensor], spatial_dims: int, source: str) -> ResNet:
    """MONAI's ResNet without a head, with the depth that the parameter names tell and the weights loaded.

    With `conv1_t_stride` 2 it is the network of He et al. 2016 as torchvision builds it: stride in the 3 x 3
    convolution of a bottleneck, batch norm with eps 1e-5, 3 x 3 max pooling; the parameter names are the same.

    Raises:
        BundleError: the weights are not those of a ResNet for this number of dimensions; `source` is named.
    """
    layers = [len({k.split(".")[1] for k in state if k.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4)]
    block = "bottleneck" if "layer1.0.conv3.weight" in state else "basic"
    channels = 1 if spatial_dims == 3 else 3
    first = state.get("conv1.weight", torch.empty(0))
    if (
        first.ndim != spatial_dims + 2
        or first.shape[1] != channels
        or [block, layers] not in [[parameters[0], parameters[1]] for parameters in resnet_params.values()]
    ):
        raise BundleError(
            f"{source} holds {len(state)} tensors such as {next(iter(state), 'none')!r}; expected the weights of a "
            f"{spatial_dims}D ResNet of 10 to 200 layers (input channels: {channels})"
        )
    network = ResNet(
        block,
        layers,
        [64, 128, 256, 512],
        spatial_dims=spatial_dims,
        n_input_channels=channels,
        conv1_t_stride=2,
        shortcut_type="B" if any(".downsample." in k for k in state) else "A",
        bias_downsample="layer2.0.downsample.0.bias" in state,
        feed_forward=False,
    )
    try:
        network.load_state_dict(state)
    except RuntimeError as e:
        raise BundleError(f"{source} does not fit MONAI's ResNet: {e}") from e
    return network.eval()


def dilate_as_medicalnet(network: ResNet) -> ResNet:
    """Give layers 3 and 4 the dilations 2 and 4 instead of strides, in place.

    MedicalNet's weights were trained so (Chen et al. 2019, models/resnet.py: output stride 8); MONAI's class, which has
    the same parameters, uses strides, which moves every tap of these kernels.
    """
    for layer, dilation in ((network.layer3, 2), (network.layer4, 4)):
        for block in layer:
            for module in block.modules():
                if isinstance(module, nn.Conv3d):
                    module.stride = (1, 1, 1)
                    if module.kernel_size == (3, 3, 3):
                        module.dilation = module.padding = (dilation,) * 3
            if isinstance(block.downsample, partial):  # shortcut type A has no parameters
                block.downsample.keywords["stride"] = 1
    return network


class MedicalNet:
    """Global average of the last feature map of MedicalNet's 3D ResNet (Chen et al. 2019, arXiv:1904.00625).

    A volume is z-scored by the mean and standard deviation of its brain (voxels above -1), as MedicalNet does; its
    background, which MedicalNet fills with N(0, 1) noise, is the mean of that noise, 0, so that features are the same
    each time. Nothing is resampled. d = 512 (10 to 34 layers) or 2048.

    Args:
        weights: file such as resnet_50_23dataset.pth (keys below "state_dict", prefix "module."; the depth is read from
            them); "download" for MONAI's own download from Hugging Face (needs huggingface_hub); None for no such rows.
        depth: of the download: 10, 18, 34, 50, 101, 152 or 200 layers.
        device: where the network runs; None for the GPU where there is one.
        batch_size: in volumes.
    """

    name, title, distances = "medicalnet", "MedicalNet (3D ResNet)", ("fid", "kid")

    def __init__(
        self, weights: str | None = None, depth: int = 50, device: str | torch.device | None = None, batch_size: int = 4
    ) -> None:
        check_knobs(batch_size=batch_size)
        if f"resnet{depth}" not in resnet_params:
            raise BundleError(f"depth: {depth!r} was given; expected 10, 18, 34, 50, 101, 152 or 200")
        self.weights, self.depth, self.batch_size = weights or None, depth, batch_size
        self.device = resolved_device(device)

    @cached_property
    def network(self) -> ResNet | str:
        """The network, or the reason why there is none."""
        key = "medicalnet_weights"
        if self.weights is None:
            return f"no weights; the knob {key} gives a file such as resnet_50_23dataset.pth, or {DOWNLOAD!r}"
        if self.weights == DOWNLOAD:
            try:
                state = get_pretrained_resnet_medicalnet(self.depth, "cpu", datasets23=True)
            except Exception as e:  # no network, no huggingface_hub, no such file: the evaluation goes on without
                return f"MONAI's download failed ({type(e).__name__}: {e}); the knob {key} gives a local file"
            state = without_wrapping(state)
        else:
            check_file(key, self.weights)
            state = read_resnet(self.weights, key)
        network = resnet_from(state, 3, f"{key}: {self.weights!r}")
        return dilate_as_medicalnet(network).to(self.device)

    def check(self, spatial_dims: int) -> None:
        """Load the weights. Raises BundleError if a file was given that cannot be used."""
        if spatial_dims == 3:
            _ = self.network

    @property
    def settings(self) -> dict[str, Any]:
        missing = self.network if isinstance(self.network, str) else None
        mark = file_mark(self.weights) if self.weights not in (None, DOWNLOAD) else self.weights
        return {"weights": mark, "depth": self.depth, "missing": missing}

    def planes(self, spatial_dims: int) -> tuple[str, ...]:
        return ("",)

    def fit(self, real: np.ndarray) -> None:
        """Nothing is fitted."""

    @torch.inference_mode()
    def __call__(self, volumes: np.ndarray, progress: str = "") -> np.ndarray:
        """(N, D, H, W) -> (N, 1, 1, d). Raises MissingWeights."""
        if volumes.ndim != 4:
            raise MissingWeights("a 3D network cannot describe 2D images")
        if isinstance(self.network, str):
            raise MissingWeights(self.network)
        features = []
        for x in batches(volumes, self.batch_size, progress, self.device):
            brain = (x > -1).float()
            count = brain.sum((1, 2, 3, 4), keepdim=True).clamp(min=1)
            mean = (x * brain).sum((1, 2, 3, 4), keepdim=True) / count
            std = (((x - mean) ** 2 * brain).sum((1, 2, 3, 4), keepdim=True) / count).sqrt().clamp(min=1e-6)
            features.append(self.network((x - mean) / std * brain).float().cpu().numpy())
        return all_batches(features)[:, None, None]


class SliceNetwork:
    """Features of a 2D network on slices in three planes ("2.5D"); of the image itself where the cohort is 2D.

    `num_slices` slices, evenly spaced over the middle half of each axis, are scaled from [-1, 1] to [0, 1], enlarged
    (bilinear) to `size`, repeated in three channels and normalised as `normalisation` says. Spatial dims that the
    network leaves are averaged.

    Args:
        weights: one of these files, or None for no such rows:
            - a TorchScript file (the Inception files for FID): input "byte", [0, 255], its own resizing; called with
              return_features=True where it has that argument;
            - a state dict of a ResNet as torchvision names it: "imagenet", 224;
            - RadImageNet's own ResNet50.pt (keys backbone.0 ... backbone.7): "symmetric", 224;
            - MONAI's copy of RadImageNet's ResNet50 (converted from Keras: biases, stride in the first convolution of a
              bottleneck, eps 1.001e-5): "bgr_mean", 224.
        normalisation: "auto" as in the list above, or "imagenet", "bgr_mean", "symmetric", "byte".
        size: in pixels; None as in the list above.
        num_slices: a plane.
        device: where the network runs; None for the GPU where there is one.
        batch_size: in slices.
    """

    name, title, distances = "slices", "2D network on slices", ("fid", "kid")

    def __init__(
        self,
        weights: str | None = None,
        normalisation: str = "auto",
        size: int | None = None,
        num_slices: int = 8,
        device: str | torch.device | None = None,
        batch_size: int = 32,
    ) -> None:
        check_knobs(num_slices=num_slices, batch_size=batch_size, size=size)
        if normalisation not in ("auto", *NORMALISATIONS):
            raise BundleError(
                f"normalisation: {normalisation!r} is unknown; it must be one of {('auto', *NORMALISATIONS)}"
            )
        self.weights, self.normalisation, self.size = weights or None, normalisation, size
        self.num_slices, self.batch_size = num_slices, batch_size
        self.device = resolved_device(device)

    @cached_property
    def loaded(self) -> tuple[Callable[[torch.Tensor], torch.Tensor], str, int | None] | str:
        """(network, its normalisation, its input size or None), or the reason why there is none."""
        key = "slice_weights"
        if self.weights is None:
            return (
                f"no weights; the knob {key} gives a ResNet50 (RadImageNet, ImageNet) or an Inception TorchScript file"
            )
        check_file(key, self.weights)
        if is_torchscript(self.weights):
            try:
                script = torch.jit.load(self.weights, map_location=self.device).eval()
            except RuntimeError as e:
                raise BundleError(f"{key}: {self.weights!r} is not a TorchScript file that torch can read") from e
            wanted = {"return_features"} & {argument.name for argument in script.forward.schema.arguments}
            return partial(script, **dict.fromkeys(wanted, True)), "byte", None
        state = read_resnet(self.weights, key)
        normalisation = "imagenet"
        if any(k.startswith("backbone.") for k in state):
            parts = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
            names = {k: k.split(".", 2) for k in state}
            state = {f"{parts.get(n[1], n[1])}.{n[2]}": state[k] for k, n in names.items() if len(n) == 3}
            normalisation = "symmetric"
        from_keras = "conv1.bias" in state
        network = resnet_from(without_biases(state) if from_keras else state, 2, f"{key}: {self.weights!r}")
        if from_keras:
            normalisation = "bgr_mean"
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eps = 1.001e-5
                elif hasattr(module, "conv3"):
                    module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
        return network.to(self.device), normalisation, 224

    def check(self, spatial_dims: int) -> None:
        """Load the weights. Raises BundleError if a file was given that cannot be used."""
        _ = self.loaded

    @property
    def settings(self) -> dict[str, Any]:
        knobs = {"normalisation": self.normalisation, "size": self.size, "num_slices": self.num_slices}
        return {"weights": file_mark(self.weights) if self.weights else None, **knobs}

    def planes(self, spatial_dims: int) -> tuple[str, ...]:
        return ("sagittal", "coronal", "axial") if spatial_dims == 3 else ("",)

    @torch.inference_mode()
    def __call__(self, volumes: np.ndarray, progress: str = "") -> np.ndarray:
        """(N, D, H, W) -> (N, 3, num_slices, d); (N, H, W) -> (N, 1, 1, d). Raises MissingWeights."""
        if isinstance(self.loaded, str):
            raise MissingWeights(self.loaded)
        if volumes.ndim == 3:
            return self.of_images(volumes, progress)[:, None, None]
        planes = []
        for axis, plane in enumerate(self.planes(3), 1):
            side = volumes.shape[axis]
            where = np.linspace(side // 4, side - 1 - side // 4, self.num_slices).round().astype(int)
            images = np.moveaxis(np.take(volumes, where, axis), axis, 1)
            features = self.of_images(images.reshape(-1, *images.shape[2:]), progress and f"{progress}, {plane}")
            planes.append(features.reshape(len(volumes), self.num_slices, -1))
        return np.stack(planes, 1)

    def fit(self, real: np.ndarray) -> None:
        """Nothing is fitted."""

    def of_images(self, images: np.ndarray, progress: str) -> np.ndarray:
        """(M, H, W) in [-1, 1] -> (M, d)."""
        network, normalisation, size = self.loaded
        normalisation = normalisation if self.normalisation == "auto" else self.normalisation
        size = self.size or size
        offset, scale = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in NORMALISATIONS[normalisation])
        features = []
        for x in batches(images, self.batch_size, progress, self.device):
            x = (x.clamp(-1, 1) + 1) / 2
            if size is not None:
                x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
            y = network((x.expand(-1, 3, -1, -1) - offset) / scale)
            features.append(y.flatten(2).mean(2).cpu().numpy() if y.ndim > 2 else y.cpu().numpy())
        return all_batches(features).astype(np.float32)


def without_biases(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same network without convolution biases: batch norm subtracts the running mean, so the bias moves into it."""
    state = dict(state)
    for key in [k for k in state if k.endswith(".bias") and state[k.replace(".bias", ".weight")].ndim == 4]:
        layer = key.removesuffix(".bias")
        head, _, last = layer.rpartition(".")
        norm = f"{head}.1" if last == "0" else layer.replace("conv", "bn")
        state[f"{norm}.running_mean"] = state[f"{norm}.running_mean"] - state.pop(key)
    return state


def is_torchscript(path: str) -> bool:
    """A TorchScript file is a zip archive with code in it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def check_file(key: str, path: str) -> None:
    """Raises BundleError if there is no such file."""
    if not isinstance(path, str) or not os.path.isfile(path):
        raise BundleError(f"{key}: {path!r}: there is no such file; expected a file of weights, or null")
