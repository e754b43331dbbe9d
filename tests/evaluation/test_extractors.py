import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import resnet10, resnet18, resnet50

from scripts.evaluation.extractors import MissingWeights, PCAFeatures, haar_octave
from scripts.evaluation.pretrained import MedicalNet, SliceNetwork, resnet_from, without_biases
from scripts.running.errors import BundleError


def randomised(network, seed=0):
    """Running statistics and gains of batch norms as after training, so that a wrong one shows."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.0),
                (module.bias.data, -0.2, 0.2),
            ):
                tensor.uniform_(low, high, generator=generator)
    return network.eval()


def small_weights(network, seed=0):
    return randomised(network, seed).state_dict()


@pytest.fixture(scope="module")
def resnet50_2d():
    torch.manual_seed(0)
    network = resnet50(
        spatial_dims=2,
        n_input_channels=3,
        conv1_t_stride=2,
        feed_forward=False,
        bias_downsample=False,
        shortcut_type="B",
    )
    return small_weights(network)


def reference_resnet(x, state, dims, strides, dilations, eps=1e-5, stride_first=False):
    """A ResNet from its definition (He et al. 2016), by functions of torch only: the head of the network left out.

    torchvision's: strides 1, 2, 2, 2 in the 3 x 3 convolution. MedicalNet's (models/resnet.py): strides 1, 2, 1, 1 and
    dilations 1, 1, 2, 4. Keras' ResNet50: strides in the first convolution of a block, biases.
    """
    conv, pool = (F.conv2d, F.max_pool2d) if dims == 2 else (F.conv3d, F.max_pool3d)

    def convolved(x, name, **options):
        return conv(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)

    def normed(x, name):
        mean, var, gain, bias = (
            state[f"{name}.{k}"].view(1, -1, *[1] * dims) for k in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + eps) * gain + bias

    x = pool(F.relu(normed(convolved(x, "conv1", stride=2, padding=3), "bn1")), 3, 2, 1)
    for number, (stride, dilation) in enumerate(zip(strides, dilations), 1):
        for block in range(len({k.split(".")[1] for k in state if k.startswith(f"layer{number}.")})):
            at, s, wide = (
                f"layer{number}.{block}",
                stride if block == 0 else 1,
                {"padding": dilation, "dilation": dilation},
            )
            if f"{at}.conv3.weight" in state:
                first, second = (s, 1) if stride_first else (1, s)
                y = F.relu(normed(convolved(x, f"{at}.conv1", stride=first), f"{at}.bn1"))
                y = F.relu(normed(convolved(y, f"{at}.conv2", stride=second, **wide), f"{at}.bn2"))
                y = normed(convolved(y, f"{at}.conv3"), f"{at}.bn3")
            else:
                y = F.relu(normed(convolved(x, f"{at}.conv1", stride=s, **wide), f"{at}.bn1"))
                y = normed(convolved(y, f"{at}.conv2", **wide), f"{at}.bn2")
            if f"{at}.downsample.0.weight" in state:
                x = normed(convolved(x, f"{at}.downsample.0", stride=s), f"{at}.downsample.1")
            elif y.shape != x.shape:  # shortcut type A: every s-th voxel, zeros in the new channels
                x = x[(..., *[slice(None, None, s)] * dims)]
                x = torch.cat([x, x.new_zeros(len(x), y.shape[1] - x.shape[1], *x.shape[2:])], 1)
            x = F.relu(x + y)
    return x.flatten(2).mean(2)


def volumes_of(n, shape, seed=0):
    rng = np.random.default_rng(seed)
    volumes = rng.uniform(-0.9, 1, (n, *shape)).astype(np.float16)
    volumes[:, :3] = -1
    return volumes


@pytest.mark.parametrize("make, options", [(resnet10, ("B", False)), (resnet18, ("A", True))])
def test_medicalnet_features_are_those_of_its_dilated_network(tmp_path, make, options):
    torch.manual_seed(1)
    network = make(
        spatial_dims=3, n_input_channels=1, feed_forward=False, shortcut_type=options[0], bias_downsample=options[1]
    )
    state = small_weights(network)
    head = {"module.conv_seg.0.weight": torch.zeros(2)}
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()} | head}, tmp_path / "resnet.pth")
    volumes = volumes_of(3, (20, 24, 18))
    extractor = MedicalNet(str(tmp_path / "resnet.pth"), device="cpu", batch_size=2)
    extractor.check(3)
    found = extractor(volumes)
    assert found.shape == (3, 1, 1, 512)
    z = volumes.astype(np.float32)
    for v in z:
        brain = v > -1
        v[brain] = (v[brain] - v[brain].mean()) / v[brain].std()
        v[~brain] = 0
    with torch.no_grad():
        want = reference_resnet(torch.tensor(z)[:, None], state, 3, (1, 2, 1, 1), (1, 1, 2, 4))
    np.testing.assert_allclose(found[:, 0, 0], want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))
    assert extractor.settings["missing"] is None and len(extractor.settings["weights"]) == 16


def test_monais_resnet50_is_torchvisions(resnet50_2d, tmp_path):
    head = {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    torch.save(resnet50_2d | head, tmp_path / "resnet50.pth")
    images = volumes_of(2, (32, 40))
    found = SliceNetwork(str(tmp_path / "resnet50.pth"), device="cpu", size=64)(images)
    assert found.shape == (2, 1, 1, 2048)
    x = F.interpolate(torch.tensor((images.astype(np.float32) + 1) / 2)[:, None], size=(64, 64), mode="bilinear")
    x = torch.cat([(x - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))], 1)
    want = reference_resnet(x, resnet50_2d, 2, (1, 2, 2, 2), (1,) * 4)
    np.testing.assert_allclose(found[:, 0, 0], want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))


def test_radimagenet_files_of_both_kinds(resnet50_2d, tmp_path):
    images = volumes_of(2, (64, 64))
    grey = torch.tensor((images.astype(np.float32) + 1) / 2)[:, None]
    places = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    renamed = {".".join(["backbone", places[k.split(".")[0]], k.split(".", 1)[1]]): v for k, v in resnet50_2d.items()}
    torch.save(renamed, tmp_path / "ResNet50.pt")
    found = SliceNetwork(str(tmp_path / "ResNet50.pt"), device="cpu", size=64)(images)
    want = reference_resnet((grey * 2 - 1).expand(-1, 3, -1, -1), resnet50_2d, 2, (1, 2, 2, 2), (1,) * 4)
    np.testing.assert_allclose(found[:, 0, 0], want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))

    generator = torch.Generator().manual_seed(5)
    biases = {
        k.replace(".weight", ".bias"): torch.empty(len(v)).uniform_(-0.3, 0.3, generator=generator)
        for k, v in resnet50_2d.items()
        if v.ndim == 4
    }
    torch.save(resnet50_2d | biases, tmp_path / "keras.pth")
    found = SliceNetwork(str(tmp_path / "keras.pth"), device="cpu", size=64)(images)
    x = torch.cat([grey - mean for mean in (0.406, 0.456, 0.485)], 1)
    want = reference_resnet(x, resnet50_2d | biases, 2, (1, 2, 2, 2), (1,) * 4, eps=1.001e-5, stride_first=True)
    np.testing.assert_allclose(found[:, 0, 0], want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))
    assert set(without_biases(resnet50_2d | biases)) == set(resnet50_2d)


class FakeInception(torch.nn.Module):
    """Takes bytes and resizes nothing; its features are the mean, the first pixel and the height of its input."""

    def forward(self, x, return_features: bool = False):
        if not return_features:
            return x.new_zeros(len(x), 1008)
        return torch.stack([x.mean((1, 2, 3)), x[:, 2, 0, 0], torch.full([len(x)], float(x.shape[2]))], 1)


def test_a_torchscript_file_gets_bytes_of_the_middle_slices_of_three_planes(tmp_path):
    torch.jit.script(FakeInception()).save(str(tmp_path / "inception.pt"))
    volumes = volumes_of(3, (8, 10, 12))
    extractor = SliceNetwork(str(tmp_path / "inception.pt"), num_slices=3, device="cpu", batch_size=4)
    extractor.check(3)
    found = extractor(volumes)
    assert found.shape == (3, 3, 3, 3) and extractor.planes(3) == ("sagittal", "coronal", "axial")
    grey = (volumes.astype(np.float64) + 1) / 2 * 255
    for plane, (where, height) in enumerate((([2, 4, 5], 10), ([2, 4, 7], 8), ([3, 6, 8], 8))):
        for s, index in enumerate(where):
            slices = np.take(grey, index, plane + 1)
            want = np.stack([slices.mean((1, 2)), slices[:, 0, 0], np.full(3, height)], 1)
            np.testing.assert_allclose(found[:, plane, s], want, rtol=1e-4, atol=1e-3)
    assert extractor(volumes[:, 0]).shape == (3, 1, 1, 3) and extractor.planes(2) == ("",)


def test_no_weights_are_a_reason_and_wrong_weights_an_error(tmp_path, monkeypatch, resnet50_2d):
    volumes = volumes_of(2, (8, 8, 8))
    for extractor, key in ((MedicalNet(), "medicalnet_weights"), (SliceNetwork(), "slice_weights")):
        extractor.check(3)
        with pytest.raises(MissingWeights, match=key):
            extractor(volumes)
        with pytest.raises(BundleError, match=f"{key}.*no such file"):
            type(extractor)(str(tmp_path / "no.pth")).check(3)
        (tmp_path / "text.pth").write_text("hello")
        with pytest.raises(BundleError, match=f"{key}.*text.pth"):
            type(extractor)(str(tmp_path / "text.pth")).check(3)
        torch.save({"a.weight": torch.zeros(3)}, tmp_path / "other.pth")
        with pytest.raises(BundleError, match=f"{key}.*other.pth.*ResNet"):
            type(extractor)(str(tmp_path / "other.pth")).check(3)
    torch.save(resnet50_2d, tmp_path / "two.pth")
    with pytest.raises(BundleError, match="3D ResNet"):
        MedicalNet(str(tmp_path / "two.pth")).check(3)
    with pytest.raises(MissingWeights, match="2D"):
        MedicalNet()(volumes[:, 0])


def test_a_failed_download_is_a_reason_and_a_good_one_is_used(monkeypatch):
    def offline(depth, device, datasets23):
        raise OSError("no route")

    monkeypatch.setattr("scripts.evaluation.pretrained.get_pretrained_resnet_medicalnet", offline)
    extractor = MedicalNet("download", depth=10)
    extractor.check(3)
    with pytest.raises(MissingWeights, match="OSError: no route.*medicalnet_weights"):
        extractor(volumes_of(2, (8, 8, 8)))
    assert "no route" in extractor.settings["missing"]
    state = small_weights(
        resnet10(spatial_dims=3, n_input_channels=1, feed_forward=False, shortcut_type="B", bias_downsample=False)
    )
    monkeypatch.setattr("scripts.evaluation.pretrained.get_pretrained_resnet_medicalnet", lambda *_, **__: state)
    assert MedicalNet("download", depth=10)(volumes_of(2, (8, 8, 8))).shape == (2, 1, 1, 512)


def test_a_state_dict_that_misses_a_tensor(resnet50_2d):
    broken = {k: v for k, v in resnet50_2d.items() if k != "layer4.2.conv3.weight"}
    with pytest.raises(BundleError, match="layer4.2.conv3.weight"):
        resnet_from(broken, 2, "slice_weights: 'x.pth'")


@pytest.mark.parametrize("shape", [(4, 6, 8), (6, 8), (5, 6, 7)])
def test_haar_octave_keeps_energy_and_averages_blocks(shape):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *shape))
    low, energy = (v.numpy() for v in haar_octave(torch.tensor(x)[:, None]))
    padded = np.pad(x, [(0, 0)] + [(0, s % 2) for s in shape])
    blocks = padded
    for axis in range(len(shape)):
        blocks = np.add.reduceat(blocks, np.arange(0, blocks.shape[axis + 1], 2), axis + 1) / 2
    np.testing.assert_allclose(low[:, 0], blocks, atol=1e-12)
    bands = [3, 3, 1] if len(shape) == 3 else [2, 1]  # how many bands are high-pass along 1, 2, 3 axes
    cells = blocks[0].size
    total = 2 ** len(shape) * (blocks**2).reshape(2, -1).sum(1) + cells * energy @ bands
    np.testing.assert_allclose(total, (padded**2).reshape(2, -1).sum(1))


def test_haar_orders_of_plain_patterns():
    along_one = torch.tensor([1.0, -1] * 4).view(1, 1, 8, 1, 1).expand(1, 1, 8, 8, 8)
    checkerboard = along_one * along_one.transpose(2, 3) * along_one.transpose(2, 4)
    np.testing.assert_allclose(haar_octave(along_one)[1], [[8 / 3, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(haar_octave(checkerboard)[1], [[0, 0, 8]], atol=1e-6)


def test_white_noise_has_its_variance_in_every_band():
    noise = torch.tensor(np.random.default_rng(0).normal(0, 0.3, (1, 1, 64, 64, 64)))
    np.testing.assert_allclose(haar_octave(noise)[1], 0.09, rtol=0.03)


def test_pca_features_are_standard_on_the_real_volumes():
    rng = np.random.default_rng(0)
    volumes = rng.uniform(-1, 1, (30, 16, 12, 10)).astype(np.float16)
    extractor = PCAFeatures(resolution=8, max_components=4, device="cpu", batch_size=7)
    extractor.fit(volumes)
    found = extractor(volumes)
    assert found.shape == (30, 1, 1, 4 + 3)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(found.std(0, ddof=1), 1, rtol=1e-3)
    np.testing.assert_array_equal(extractor(volumes[:3])[0], found[0])


def test_pca_takes_no_more_components_than_needed_or_sound():
    rng = np.random.default_rng(0)
    pattern = rng.normal(size=(1, 8, 8))
    volumes = (rng.normal(0, 0.2, (40, 1, 1)) * pattern).clip(-1, 1)  # one direction of variation
    one = PCAFeatures(resolution=4, explained=0.9, device="cpu")
    one.fit(volumes)
    assert one.num_components == 1
    few = PCAFeatures(resolution=4, device="cpu")
    few.fit(rng.uniform(-1, 1, (20, 8, 8)))
    assert few.num_components == 4  # a fifth of 20


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: PCAFeatures(resolution=0), "resolution"),
        (lambda: SliceNetwork(num_slices=0), "num_slices"),
        (lambda: SliceNetwork(normalisation="grey"), "normalisation"),
        (lambda: MedicalNet(depth=51), "depth"),
    ],
)
def test_wrong_knobs(make, word):
    with pytest.raises(BundleError, match=word):
        make()
