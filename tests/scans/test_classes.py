"""Classes from a scan's folder or table to the folder of a sample, and guidance against its closed form."""

import ast
import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_NETWORK, sample, train
from gaussian import STD, IdealNetwork
from monai.bundle import ConfigParser, ckpt_export
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler
from torch import nn

from scripts.diffusion.asked import requests
from scripts.diffusion.objective import AutocastDiffusionInferer, SeededPrepareBatch
from scripts.diffusion.process import PREDICTION_TYPES
from scripts.diffusion.sampler import DiffusionSampler
from scripts.diffusion.weights import load_weights
from scripts.running.checks import check_knobs
from scripts.running.covariates import of_classes
from scripts.running.errors import BundleError, root_bundle_error
from scripts.running.pictures import mosaic
from scripts.scans.classes import check_table, with_classes
from scripts.scans.datasets import VolumeDataset
from scripts.scans.find import require
from scripts.training.previews import PreviewHandler
from scripts.training.records import TrainingRecords

NAMES = ["bright", "dark"]
NO_CLASS = 2


def conditional_unet(spatial_dims=3, std=None):
    """Two channels a group: with one, the group norm would take the embedding of time and class away again."""
    torch.manual_seed(0)
    network = DiffusionModelUNet(
        spatial_dims=spatial_dims,
        in_channels=1,
        out_channels=1,
        channels=[16, 16],
        attention_levels=[False, False],
        num_head_channels=[0, 16],
        num_res_blocks=1,
        norm_num_groups=8,
        num_class_embeds=len(NAMES) + 1,
    )
    for parameter in network.parameters() if std else ():
        parameter.data.normal_(0, std)
    if std:
        network.class_embedding.weight.data.normal_(0, 3)
    return network


def seeded_noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# guidance


class IdealClasses(IdealNetwork):
    """The exact network for voxels that are N(mean of their class, STD^2)."""

    num_class_embeds = len(NAMES) + 1

    def __init__(self, scheduler, prediction_type, means):
        super().__init__(scheduler, prediction_type)
        self.means, self.passes = torch.tensor(means, dtype=torch.float64), 0

    def forward(self, x, timesteps, class_labels):
        self.passes += 1
        self.mean = self.means[class_labels].view(-1, *[1] * (x.ndim - 1))
        return super().forward(x, timesteps)

    def expected(self, x, a, s):
        return self.mean + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * self.mean)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guided_gaussians_are_the_gaussian_with_the_guided_mean(prediction_type, scale):
    """The guided score of two normal distributions of one spread is that of a third one, whatever is predicted."""
    rectified = prediction_type == "rectified_flow"
    scheduler = RFlowScheduler(100) if rectified else DDPMScheduler(100, schedule="cosine")
    means = [0.5, -0.4, 0.1]
    guided = [means[2] + scale * (mean - means[2]) for mean in means]
    options = {"prediction_type": prediction_type, "solver": "dpmpp_2m_sde", "clip_sample": False}
    options |= {"num_inference_steps": 12, "timestep_spacing": "logsnr"} | ({} if rectified else {"sigma_max": 20})
    network = IdealClasses(scheduler, prediction_type, means)
    found = DiffusionSampler(network, scheduler, guidance_scale=scale, **options)
    wanted = DiffusionSampler(IdealClasses(scheduler, prediction_type, guided), scheduler, **options)
    noise, labels = seeded_noise(3, 1, 4, 4, 4), torch.tensor([0, 1, 2])
    torch.testing.assert_close(found(noise, labels), wanted(noise, labels), atol=1e-3, rtol=0)
    assert network.passes == 12 * 3 * (1 if scale == 1 else 2)  # volume by volume on a CPU


def test_a_volume_of_a_class_does_not_depend_on_its_batch(scheduler):
    network = conditional_unet(std=0.1).eval()
    sampler = DiffusionSampler(network, scheduler, 5, "dpmpp_2m_sde", "sample", guidance_scale=2.5)
    noise, labels = seeded_noise(4, 1, 8, 8, 8), torch.tensor([0, 1, NO_CLASS, 1])
    together = sampler(noise, labels)
    for i in range(4):
        torch.testing.assert_close(sampler(noise[i : i + 1], labels[i : i + 1])[0], together[i], atol=1e-5, rtol=0)
    assert torch.equal(sampler(noise[2:3])[0], together[2])  # without a label: no class
    other = sampler(noise[:1], torch.tensor([1]))
    assert (other[0] - together[0]).abs().max() > 0.05


@pytest.mark.parametrize("dims, scale", [(2, 1.0), (3, 3.0)])
def test_the_scripted_sampler_has_classes_and_one_of_its_own(scheduler, dims, scale, tmp_path):
    options = {"prediction_type": "sample", "condition": 1, "guidance_scale": scale}
    sampler = DiffusionSampler(conditional_unet(dims, std=0.1), scheduler, 4, "dpmpp_2m_sde", **options)
    torch.jit.script(sampler).save(str(tmp_path / "model.ts"))
    loaded = torch.jit.load(str(tmp_path / "model.ts"))
    for shape in [(1, 1, 8, 8, 8), (3, 1, 16, 8, 4)]:
        shape = shape[: 2 + dims]
        noise, labels = seeded_noise(*shape, seed=2), torch.tensor([0, 2, 1])[: shape[0]]
        torch.testing.assert_close(loaded(noise), sampler(noise), atol=1e-5, rtol=0)
        torch.testing.assert_close(loaded(noise, labels), sampler(noise, labels), atol=1e-5, rtol=0)
        assert torch.equal(sampler(noise), sampler(noise, torch.ones(shape[0], dtype=torch.int64)))
        assert (sampler(noise)[0] - sampler(noise, labels)[0]).abs().max() > 0.05


def test_a_sampler_refuses_what_its_network_does_not_know(unet, scheduler):
    with pytest.raises(BundleError, match="condition: 3 was given; the network takes an index from 0 to 2"):
        DiffusionSampler(conditional_unet(), scheduler, 5, condition=3)
    with pytest.raises(BundleError, match="guidance_scale: 3 was given, but the network knows no covariates"):
        DiffusionSampler(unet, scheduler, 5, guidance_scale=3)


# training


def test_a_label_is_dropped_with_its_probability_as_a_function_of_seed_and_draw(scheduler):
    def labels(draws, class_dropout=0.1, seed=0):
        prepare = SeededPrepareBatch(
            scheduler, "epsilon", seed, covariates=of_classes(NAMES), class_dropout=class_dropout
        )
        draws = torch.tensor(draws)
        batch = {"image": torch.zeros(len(draws), 1, 1), "draw": draws, "condition": draws % 2}
        return prepare(batch, "cpu")[3]

    draws = list(range(3000))
    found = labels(draws)["class_labels"]
    dropped = found == NO_CLASS
    assert 240 < dropped.sum() < 360  # 300 expected, standard deviation 16
    assert torch.equal(found[~dropped], torch.tensor(draws)[~dropped] % 2)
    assert torch.equal(labels(draws[::-1])["class_labels"], found.flip(0))
    assert not torch.equal(labels(draws, seed=1)["class_labels"], found)
    assert (labels(draws[:100], 1.0)["class_labels"] == NO_CLASS).all()
    assert torch.equal(labels(draws[:100], 0.0)["class_labels"], torch.tensor(draws[:100]) % 2)
    plain = SeededPrepareBatch(scheduler, "epsilon")({"image": torch.zeros(1, 1, 1), "draw": torch.tensor([7])})[3]
    assert "class_labels" not in plain and torch.equal(plain["noise"], labels([7])["noise"])


def test_a_network_learns_which_class_is_bright():
    scheduler = DDPMScheduler(num_train_timesteps=50, schedule="cosine")
    prepare = SeededPrepareBatch(scheduler, "sample", covariates=of_classes(NAMES), class_dropout=0.2)
    inferer, network = AutocastDiffusionInferer(scheduler), conditional_unet(2)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for iteration in range(120):
        draws = torch.arange(16) + 16 * iteration
        images = torch.where(draws % 2 == 0, 0.6, -0.6).view(-1, 1, 1, 1) + 0.1 * seeded_noise(
            16, 1, 8, 8, seed=iteration
        )
        batch = {"image": images, "draw": draws, "condition": draws % 2}
        images, wanted, _, extra = prepare(batch, "cpu")
        optimizer.zero_grad()
        nn.functional.mse_loss(inferer(images, network, **extra), wanted).backward()
        optimizer.step()
    noise = seeded_noise(6, 1, 8, 8, seed=5)
    for scale in (1.0, 3.0):
        sampler = DiffusionSampler(network.eval(), scheduler, 10, "ddpm", "sample", guidance_scale=scale)
        bright, dark = (sampler(noise, torch.full((6,), label)).mean((1, 2, 3)) for label in (0, 1))
        assert bright.min() > 0.3 and dark.max() < -0.3, (scale, bright, dark)


def test_labels_pass_by_transforms_and_caches(cohort, tmp_path):
    paths = sorted(str(p) for p in cohort.glob("*.nii.gz"))[:2]
    data = [{"image": path, "condition": label} for label, path in enumerate(paths)]

    def transform(item):
        assert set(item) == {"image"}
        return {"image": torch.zeros(1, 2, 2, 2)}

    for cache in ("memory", "disk", "none"):
        dataset = VolumeDataset(data, transform, cache=cache, cache_dir=str(tmp_path))
        assert [dataset[i, draw]["condition"] for i, draw in ((0, 5), (1, 6))] == [0, 1]
    VolumeDataset([item | {"condition": 0} for item in data], transform, cache="disk", cache_dir=str(tmp_path))
    assert len(list(tmp_path.rglob("*.pt"))) == 2


def test_previews_show_the_classes_in_turn_a_row_each():
    asked = []

    def sampler(noise, class_labels):
        asked.append(class_labels.tolist())
        return torch.full_like(noise, float(class_labels[0]))

    previews = PreviewHandler(sampler, [4, 4], 1, TrainingRecords(""), num_samples=5, covariates=of_classes(NAMES))
    strips = previews.strips(SimpleNamespace(state=SimpleNamespace(device="cpu")))
    assert asked == [[0], [1], [0], [1], [0]]
    picture = mosaic(strips, gap=0, smallest=1, labels=previews.rows)
    assert picture.shape == (2 * 4, 3 * 4)
    assert (picture[:4] == 0).all() and (picture[4:, :8] == 1).all() and (picture[4:, 8:] == 0).all()  # an empty place


# the class of each scan


@pytest.fixture
def scans(tmp_path):
    paths = [tmp_path / p for p in ("dark/a.nii.gz", "bright/b.nii", "dark/bright/c.nii.gz", "bright/sub-1/d.nii")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return [{"image": str(path)} for path in paths]


def test_a_class_is_the_innermost_folder_below_the_dataset_that_has_its_name(scans, tmp_path):
    assert [item["covariates"]["class"] for item in with_classes(scans, NAMES, None, str(tmp_path))] == [
        "dark",
        *["bright"] * 3,
    ]
    with pytest.raises(
        BundleError, match=r"class_names: 2 of 4 images lie in no folder.*'.*b.nii'; expected folders named"
    ):
        with_classes(scans, ["dark"], None, str(tmp_path))
    with pytest.raises(BundleError, match="2 of 2 images"):  # the folder of the data itself is no class
        with_classes([scans[1], scans[3]], NAMES, None, str(tmp_path / "bright"))
    assert with_classes(scans, None, None, str(tmp_path)) is scans


def test_a_table_gives_the_class_of_each_scan(scans, tmp_path):
    table = tmp_path / "classes.csv"
    first, again = "dark/a.nii.gz,4,bright\n", "\ndark/a.nii.gz,4,bright"
    others = f"{tmp_path}/bright/b.nii,5,dark\n./dark/bright/c.nii.gz,6, dark \nbright/sub-1/d.nii,7,bright\n"
    table.write_text("file,age,class\n" + first + others + again, encoding="utf-8-sig")
    found = with_classes(scans, NAMES, str(table), str(tmp_path))
    assert [item["covariates"]["class"] for item in found] == ["bright", "dark", "dark", "bright"]
    assert [item["image"] for item in found] == [item["image"] for item in scans]


ROWS = "dark/a.nii.gz,dark\nbright/b.nii,bright\ndark/bright/c.nii.gz,dark\nbright/sub-1/d.nii,bright\n"


@pytest.mark.parametrize(
    "text, words",
    [
        ("file,class\n" + ROWS + "e.nii,dark\n", ["1 files that are not among the 4 images", "/e.nii", "dataset_dir"]),
        (
            "file,class\n" + ROWS.replace("nii,bright", "nii,brigth"),
            ["line 3", "b.nii", "'brigth'", "['bright', 'dark']"],
        ),
        ("file,class\n" + ROWS.replace("dark/a.nii.gz,dark\n", ""), ["1 of 4 images", "no line", "a.nii.gz"]),
        ("file,class\n" + ROWS + "bright/b.nii,dark\n", ["line 6", "'dark', and 'bright' in a line before"]),
        ("file,class\nbright/b.nii\n", ["line 2", "cut short"]),
        ("file;class\n" + ROWS, ["has no column 'file', only ['file;class']", "'file' and 'class'"]),
        ("", ["has no column 'file', only []"]),
        (None, ["cannot be read", "No such file"]),
    ],
    ids=["missing file", "unknown class", "scan without class", "two classes", "no class", "columns", "empty", "none"],
)
def test_a_table_that_cannot_be_used_is_refused(scans, tmp_path, text, words):
    table = tmp_path / "classes.csv"
    if text is not None:
        table.write_text(text)
    with pytest.raises(BundleError) as error:
        with_classes(scans, NAMES, str(table), str(tmp_path))
    assert all(word in str(error.value) for word in ["class_table", *words]), error.value


@pytest.mark.parametrize(
    "class_names, class_dropout, words",
    [
        ("glioma", 0.1, ["class_names: 'glioma'", "a list"]),
        ([1, 2], 0.1, ["class_names: [1, 2]"]),
        (["a", "a"], 0.1, ["different names"]),
        (["a/b"], 0.1, ["without a slash"]),
        (["..", "2"], 0.1, ["beginning with a letter"]),
        (["a", "b"], 1.5, ["class_dropout: 1.5", "from 0 to 1"]),
        (["a", "b"], "much", ["class_dropout: 'much'"]),
    ],
)
def test_class_knobs_of_training_are_checked(class_names, class_dropout, words):
    with pytest.raises(BundleError) as error:
        check_knobs(class_names=class_names, class_dropout=class_dropout)
    assert all(word in str(error.value) for word in words), error.value
    check_knobs(class_names=None, class_dropout=0.1)
    check_knobs(class_names=["no tumour", "Gliom_2"], class_dropout=0)


def test_a_table_without_names_and_a_class_without_images_are_refused(scans):
    with pytest.raises(BundleError, match="class_table: 'x.csv' was given without class_names"):
        check_knobs(class_names=None, class_table="x.csv")
    with pytest.raises(BundleError, match="class_table: 'x.csv' cannot be read"):
        check_table(NAMES, "x.csv")
    labelled = [item | {"condition": 0} for item in scans]
    require("", labelled, ["bright"])
    with pytest.raises(BundleError, match=r"of 4 images to train on none is of \['dark'\]"):
        require("", labelled, NAMES)


# the class of each volume


@pytest.mark.parametrize(
    "class_label, wanted",
    [(None, [2]), ("dark", [1]), (0, [0]), (["dark", None, 0], [1, 2, 0]), (("bright", "dark"), [0, 1])],
)
def test_a_class_is_a_name_an_index_or_a_list(class_label, wanted):
    found = requests(len(wanted) + 1, None, class_label, of_classes(NAMES))
    assert [int(item["condition"]) for item in found] == [*wanted, wanted[0]]  # in turn
    assert [int(item["condition"]) for item in requests(1, None, None, [])] == [0]


@pytest.mark.parametrize(
    "knobs, words",
    [
        (("gliom", NAMES), ["class_label: 'gliom'", "one of ['bright', 'dark']", "from 0 to 1"]),
        ((2, NAMES), ["class_label: 2", "from 0 to 1", "null (no class)"]),
        ((True, NAMES), ["class_label: True"]),
        (([], NAMES), ["class_label: an empty list"]),
        (("dark", None), ["class_label: 'dark'", "know no classes"]),
        ((None, NAMES, 3), ["guidance_scale: 3", "class_label out of ['bright', 'dark']"]),
        ((None, None, 3), ["guidance_scale: 3", "know no classes"]),
        (("dark", NAMES, -1), ["guidance_scale: -1", "0 or more"]),
        (("dark", NAMES, "strong"), ["guidance_scale: 'strong'"]),
    ],
)
def test_an_unknown_class_or_useless_guidance_is_refused(knobs, words):
    with pytest.raises(BundleError) as error:
        requests(1, None, knobs[0], of_classes(knobs[1]), *knobs[2:])
    assert all(word in str(error.value) for word in words), error.value


# the real commands


@pytest.fixture(scope="module")
def conditional(cohort, tmp_path_factory):
    """Output folder of a training of two iterations whose classes come from a table."""
    output = tmp_path_factory.mktemp("conditional")
    files = sorted(cohort.glob("*.nii.gz"))
    rows = [f"{path if i else path.name},{NAMES[i % 2]}" for i, path in enumerate(files)]
    (output / "classes.csv").write_text("\n".join(["file,class", *rows]) + "\n")
    often = dict.fromkeys(("max_iterations", "val_interval", "preview_interval", "checkpoint_interval"), 2)
    knobs = {"class_names": str(NAMES), "class_table": output / "classes.csv", "norm_num_groups": 4}
    done = train(cohort, output, preview_samples=2, preview_steps=2, **often, **knobs)
    assert done.returncode == 0, done.stderr
    return output


def test_a_training_with_a_table_counts_its_classes_and_names_them(conditional):
    described = json.loads((conditional / "dataset.json").read_text())
    counts = described["classes"]
    assert list(counts) == NAMES
    for side in ("training", "validation"):
        assert sum(counts[name][side] for name in NAMES) == len(described[side])
        parts = [json.loads((conditional / f"dataset_{name}.json").read_text())[side] for name in NAMES]
        assert sorted(parts[0] + parts[1]) == sorted(described[side])
        assert all(
            int(path[-8]) % 2 == label for label, part in enumerate(parts) for path in part
        )  # phantom_0001.nii.gz
    assert json.loads((conditional / "models/model.json").read_text())["class_names"] == NAMES
    assert torch.load(conditional / "models/model.pt", weights_only=True)["class_embedding.weight"].shape[0] == 3


def test_classes_in_turn_lie_in_folders_of_their_names(conditional, tmp_path):
    knobs = {"norm_num_groups": 4, "class_label": "[bright,dark,None]", "guidance_scale": 2, "num_inference_steps": 2}
    done = sample(conditional / "models/model.pt", tmp_path, num_samples=4, batch_size=2, **knobs)
    assert done.returncode == 0, done.stderr
    found = {str(p.relative_to(tmp_path)): nib.load(p) for p in tmp_path.rglob("*.nii.gz")}
    names = [f"sample_seed0_volume00{i}.nii.gz" for i in range(4)]
    assert set(found) == {f"bright/{names[0]}", f"dark/{names[1]}", names[2], f"bright/{names[3]}"}
    assert found[f"bright/{names[3]}"].header["descrip"].item().decode().endswith("volume 3, bright")
    assert np.isfinite(found[f"dark/{names[1]}"].get_fdata()).all() and (tmp_path / "mosaic.png").exists()


def test_an_exported_archive_samples_the_class_that_was_asked_for(conditional, tmp_path):
    knobs = {key: ast.literal_eval(value) for key, value in TINY_NETWORK.items()} | {"norm_num_groups": 4}
    model = str(conditional / "models/model.pt")
    knobs |= {
        "ckpt_path": model,
        "num_inference_steps": 2,
        "class_label": "dark",
        "guidance_scale": 2,
        "amp": "float32",
    }
    configs = {"config_file": str(ROOT / "configs/inference.json"), "meta_file": str(ROOT / "configs/metadata.json")}
    ckpt_export("network_def", filepath=str(tmp_path / "model.ts"), ckpt_file=model, **configs, **knobs)
    parser = ConfigParser()
    parser.read_config(configs["config_file"])
    parser.update(knobs)
    eager = parser.get_parsed_content("network_def")
    load_weights(eager, model, expected={"class_names": NAMES})
    noise, archive = seeded_noise(2, 1, 16, 16, 16), torch.jit.load(str(tmp_path / "model.ts"))
    assert int(eager.condition) == 1
    torch.testing.assert_close(archive(noise), eager(noise), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        archive(noise, torch.tensor([0, 2])), eager(noise, torch.tensor([0, 2])), atol=1e-5, rtol=0
    )
    parser.update({"class_label": "bleak"})
    with pytest.raises(RuntimeError) as error:
        parser.get_parsed_content("network_def")
    assert "one of ['bright', 'dark']" in str(root_bundle_error(error.value))
    with pytest.raises(BundleError, match="class_names: .*'dark', 'bright'.* trained with"):
        load_weights(eager, model, expected={"class_names": NAMES[::-1]})
