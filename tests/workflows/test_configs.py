"""The configs agree with each other, with the requirements and with what MONAI expects of a bundle."""

import json
import re

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT
from monai.bundle import ConfigParser, ConfigWorkflow, create_workflow
from monai.transforms import Compose

CONFIGS = ROOT / "configs"
PRESETS = sorted(p.name for p in (CONFIGS / "presets").glob("*.json"))
METADATA = json.loads((CONFIGS / "metadata.json").read_text())


def resolved(content, config):
    """A part of a config with its "@key" references filled in, for comparison."""
    if isinstance(content, dict):
        return {key: resolved(value, config) for key, value in content.items()}
    if content == "$len(@spatial_shape)":
        return len(config["spatial_shape"])
    if isinstance(content, str) and content.startswith("$2 ** (len(@spatial_shape) * @wavelet_levels)"):
        return 2 ** (len(config["spatial_shape"]) * config["wavelet_levels"])  # and no condition images
    if content == "@num_class_embeds":  # the weights of the bundle know no covariates
        return None
    if isinstance(content, str) and re.fullmatch(r"@\w+", content):
        return resolved(config[content[1:]], config)
    return content


def as_if_nothing_were_written_down(name):
    """A config, in which the knobs that weights or a training may say of themselves have their defaults."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    parser = ConfigParser(config | {"description": {}, "trained": {}})
    looked_up = [key for key, value in config.items() if re.match(r"\$@(description|trained)\.get\(", str(value))]
    return config | {key: parser.get_parsed_content(key) for key in looked_up}


def test_one_network_in_three_files():
    train = json.loads((CONFIGS / "train.json").read_text())
    inference = as_if_nothing_were_written_down("inference")
    network = resolved(train["network_def"], train)
    assert resolved(inference["network_def"]["unet"]["unet"], inference) == network == METADATA["network_def"]
    assert resolved(inference["network_def"]["scheduler"], inference) == resolved(train["scheduler"], train)
    shapes = [
        METADATA["network_data_format"][side][name]["spatial_shape"]
        for side, name in (("inputs", "image"), ("outputs", "pred"))
    ]
    assert shapes == [train["spatial_shape"]] * 2 == [inference["spatial_shape"]] * 2


def test_volumes_are_compared_in_the_size_that_is_sampled():
    configs = [as_if_nothing_were_written_down(name) for name in ("inference", "evaluate", "reader_study")]
    assert len({tuple(config["spatial_shape"]) for config in configs}) == 1


def test_the_papers_settings_are_the_defaults():
    train = ConfigParser()
    train.read_config(str(CONFIGS / "train.json"))
    paper = {
        "num_train_timesteps": 250,
        "schedule": "cosine",
        "loss": {"_target_": "torch.nn.L1Loss"},
        "learning_rate": 1e-4,
        "batch_size": 4,
        "max_iterations": 50000,
    }
    assert {key: train[key] for key in paper} == paper
    assert train.get_parsed_content("prediction_type") == "epsilon"
    assert train["optimizer"]["_target_"] == "torch.optim.Adam" and train["channels"][0] == 64


@pytest.mark.parametrize(
    "preset, million",
    [("size_32", 12.8), ("size_128", 13.1), ("paper_64", 12.8), ("wide_64", 39.0), ("paper_128", 40.2)],
)
def test_networks_have_the_size_that_the_readme_says_and_one_head_at_16(preset, million):
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "train.json"), str(CONFIGS / f"presets/{preset}.json")])
    network = parser.get_parsed_content("network_def")
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == million
    side, levels = parser["spatial_shape"][0] // 2 ** parser["wavelet_levels"], parser["attention_levels"]
    attended = 16 if preset.startswith(("paper", "wide")) else 8  # the grid is that of the 32^3 network
    assert [side // 2**i for i, on in enumerate(levels) if on] == [attended]
    level = levels.index(True)
    assert parser["num_head_channels"][level] == parser["channels"][level]  # one head


def test_the_default_network_is_the_papers_in_wavelets():
    train, preset = (json.loads((CONFIGS / f"{name}.json").read_text()) for name in ("train", "presets/paper_64"))
    assert train["spatial_shape"] == [64, 64, 64] and train["wavelet_levels"] == 1
    assert preset == {"spatial_shape": [64, 64, 64], "wavelet_levels": 0, "timestep_sampling": "uniform"}


def test_the_weights_of_the_bundle_are_those_of_its_configs(tmp_path):
    train = json.loads((CONFIGS / "train.json").read_text())
    workflow = create_workflow(
        config_file=str(CONFIGS / "inference.json"),
        workflow_type="inference",
        bundle_root=str(ROOT),
        output_dir=str(tmp_path),
        logging_file=False,
        device="cpu",
        **{key: train[key] for key in ("spatial_shape", "wavelet_levels", "channels", "num_train_timesteps")},
    )  # loads them, and compares what describes them
    known = workflow.parser.get_parsed_content("known_covariates")
    assert [each["name"] for each in known] == ["age", "sex", "dataset", "lateral_ventricles_ml"]


def test_few_subjects_are_varied_as_brains_vary(cohort):
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "train.json"), str(CONFIGS / "presets/few_subjects.json")])
    vary = Compose(parser.get_parsed_content("random_transforms"))
    path, *_ = sorted(cohort.rglob("*.nii.gz"))
    image = parser.get_parsed_content("train#preprocessing")({"image": str(path)})["image"].float()
    varied = []
    for seed in (1, 2, 1):
        vary.set_random_state(seed=seed)
        varied.append(torch.as_tensor(vary({"image": image.clone()})["image"]))
    assert torch.equal(varied[0], varied[2]) and not torch.equal(varied[0], varied[1])
    for volume in varied:
        assert volume.shape == image.shape and (volume.min(), volume.max()) == (-1, 1)
        assert 0.8 < (volume > -1).sum() / (image > -1).sum() < 1.2  # a warp of a few per cent
        mirrored = max(np.corrcoef(v.ravel(), image[0].ravel())[0, 1] for v in (volume[0], volume[0].flip(0)))
        assert mirrored > 0.75


def test_the_medforj_preset_in_wavelets_takes_its_volumes():
    parser = ConfigParser()
    names = ("train", "presets/medforj", "presets/medforj_wavelets")
    parser.read_config([str(CONFIGS / f"{name}.json") for name in names])
    network = parser.get_parsed_content("network#network").eval()
    assert parser["spatial_shape"] == [192, 224, 192] and network.wavelet_levels == 1
    assert network(torch.randn(1, 1, 32, 64, 32), torch.tensor([5.0])).shape == (1, 1, 32, 64, 32)


def test_the_medforj_preset_is_its_network():
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "train.json"), str(CONFIGS / "presets/medforj.json")])
    network = parser.get_parsed_content("network_def")
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == 41.2
    assert network(torch.randn(1, 1, 16, 32, 16), torch.tensor([5.0])).shape == (1, 1, 16, 32, 16)
    scheduler = parser.get_parsed_content("scheduler")
    torch.testing.assert_close(scheduler.betas, torch.linspace(1e-4, 2e-2, 1000))


def test_the_medforj_preprocessing_keeps_one_millimetre_voxels(tmp_path):
    volume = np.zeros((40, 50, 20), np.float32)
    volume[10:30, 10:40, 5:15] = np.random.default_rng(0).uniform(50, 100, (20, 30, 10))
    nib.save(nib.Nifti1Image(volume, np.diag([1.0, 1.0, 2.0, 1.0])), tmp_path / "scan.nii.gz")
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "train.json"), str(CONFIGS / "presets/medforj.json")])
    parser["spatial_shape"] = [48, 64, 48]
    item = parser.get_parsed_content("train#preprocessing")({"image": str(tmp_path / "scan.nii.gz")})
    assert item["image"].shape == (1, 48, 64, 48) and item["voxel_size"].tolist() == [1, 1, 1]
    inside = (item["image"][0] > -1).nonzero()
    extent = (inside.max(0).values - inside.min(0).values + 1).tolist()
    assert extent == pytest.approx([20, 30, 20], abs=2)
    assert (item["image"].min(), item["image"].max()) == (-1, 1)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_names_only_knobs_of_the_configs(preset):
    known = {
        key for name in ("train", "inference", "evaluate") for key in json.loads((CONFIGS / f"{name}.json").read_text())
    }
    content = json.loads((CONFIGS / "presets" / preset).read_text())
    own = {key for key in content if f'"@{key}"' in json.dumps(content)}  # a knob that the preset itself uses
    assert {key.removeprefix("+") for key in content} <= known | own


@pytest.mark.parametrize("kind", ["train", "inference"])
def test_the_workflow_has_every_property_that_monai_asks_for(kind, cohort, tmp_path):
    workflow = ConfigWorkflow(
        config_file=str(CONFIGS / f"{kind}.json"),
        workflow_type=kind,
        logging_file=False,
        init_id="none",
        bundle_root=str(ROOT),
        dataset_dir=str(cohort),
        output_dir=str(tmp_path),
        num_workers=0,
        spatial_shape=[16, 16, 16],
    )
    workflow.initialize()
    assert workflow.check_properties() == []


def test_requirements_are_pinned_and_the_metadata_says_the_same():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = dict(line.split("==") for line in lines)
    required = METADATA["required_packages_version"] | {
        "monai": METADATA["monai_version"],
        "torch": METADATA["pytorch_version"],
        "numpy": METADATA["numpy_version"],
    }
    assert pins == required


def test_the_metadata_has_the_class_names_of_the_weights_that_come_with_the_bundle():
    described = json.loads((ROOT / "models/model.json").read_text())
    assert METADATA["class_names"] == (described.get("class_names") or [])


def test_the_metadata_is_what_other_programs_read():
    assert METADATA["version"] in METADATA["changelog"]
    formats = METADATA["network_data_format"]
    assert list(formats["inputs"]) == ["image"] and list(formats["outputs"]) == ["pred"]
    for entry in (formats["inputs"]["image"], formats["outputs"]["pred"]):
        assert all(isinstance(k, str) and isinstance(v, str) for k, v in entry["channel_def"].items())


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.json")), ids=lambda p: p.name)
def test_json_is_indented_by_four(path):
    text = path.read_text()
    assert text == json.dumps(json.loads(text), indent=4, ensure_ascii=False) + "\n"


def test_nothing_of_scripts_stands_where_a_bare_archive_must_run():
    inference = json.loads((CONFIGS / "inference.json").read_text())
    for key in (
        "preprocessing",
        "postprocessing",
        "inferer",
        "draw_noise",
        "affine",
        "voxel_size",
        "description",
        "class_names",
    ):
        assert "scripts" not in json.dumps(inference[key])
