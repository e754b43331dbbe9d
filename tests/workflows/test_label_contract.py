"""What MONAI Label 0.8.5 takes from the configs, and the overrides that it gives; its server needs 4 GB of packages."""

import ast
import json
import shutil

import monai.bundle
import pytest
import torch
from conftest import ROOT, TINY_NETWORK, TINY_TRAINING
from monai.bundle import ConfigParser

from scripts.diffusion.sampler import DiffusionSampler
from scripts.diffusion.weights import save_weights

TINY = {key: ast.literal_eval(value) for key, value in TINY_NETWORK.items()}


def config(**knobs):
    parser = ConfigParser()
    parser.read_config(str(ROOT / "configs/inference.json"))
    parser.update({"bundle_root": str(ROOT), **TINY, **knobs})
    return parser


def request(parser, image="/studies/scan.nii.gz", **params):
    """Resolve the parts that Label resolves for a request, in its way: the input, the inferer, postprocessing."""
    parser["displayable_configs"].update(params)
    parser.parse()
    transform, inferer, after = (parser.get_parsed_content(k) for k in ("preprocessing", "inferer", "postprocessing"))
    return transform({"image": image})["image"], inferer, after


def test_seed_and_steps_are_what_a_client_sees_and_sets():
    assert config(num_train_timesteps=250).get_parsed_content("displayable_configs") == {
        "seed": -1,
        "num_inference_steps": 25,
        "covariates": "",
    }
    assert config()["seed"] == 0


def test_a_request_begins_on_the_models_grid_with_the_noise_of_bundle_run():
    parser = config(voxel_size=[2.0, 2.0, 3.0])
    noise, _, _ = request(parser, seed=7)
    dataset = config(seed=7).get_parsed_content("dataset")
    assert torch.equal(noise, dataset[0]["image"]) and not torch.equal(noise, dataset[1]["image"])
    assert torch.equal(noise, request(parser, seed="7")[0]) and not torch.equal(noise, request(parser, seed=8)[0])
    assert not torch.equal(*(request(parser, seed=-1)[0] for _ in range(2)))
    # Label resizes the result to one entry and writes the other one into the file
    assert noise.meta["spatial_shape"].tolist() == list(noise.shape[1:]) == TINY["spatial_shape"]
    affine = [[2, 0, 0, -15], [0, 2, 0, -15], [0, 0, 3, -22.5], [0, 0, 0, 1]]
    assert noise.meta["original_affine"].tolist() == noise.affine.tolist() == affine


def test_the_steps_of_a_request_are_those_that_are_run(unet, scheduler):
    sampler = DiffusionSampler(unet, scheduler, 4)  # as it was when the server started
    noise, inferer, after = request(config(), seed=1, num_inference_steps=2)
    wanted = DiffusionSampler(unet, scheduler, 2)(noise[None])
    volume = inferer(noise[None], sampler)
    assert torch.equal(volume, wanted) and torch.equal(inferer(inputs=noise[None], network=sampler), wanted)
    assert not torch.equal(volume, sampler(noise[None]))
    archive = torch.jit.script(sampler)  # MONAI Deploy's: it takes the same call, and has steps of its own
    torch.testing.assert_close(inferer(noise[None], archive), sampler(noise[None]), atol=1e-5, rtol=0)
    scaled = after({"pred": volume[0]})["pred"]
    torch.testing.assert_close(scaled, (volume[0] + 1) * 127.5)


def test_a_training_checkpoint_that_a_client_names_gives_its_average(unet, scheduler):
    ema = {name: torch.ones_like(t) for name, t in unet.state_dict().items()}
    DiffusionSampler(unet, scheduler, 2).load_state_dict({"network": {}, "ema": ema}, strict=False)
    assert all((t == 1).all() for t in unet.state_dict().values())


@pytest.mark.parametrize("run_id", ["run", ""])  # "" is what 3D Slicer sends
def test_a_training_goes_on_from_the_weights_that_are_there(trained, cohort, tmp_path, monkeypatch, run_id):
    monkeypatch.setattr("sys.excepthook", lambda *_: None)
    shutil.copytree(trained / "models", tmp_path / "models", ignore=shutil.ignore_patterns("checkpoint_*"))
    description = json.loads((tmp_path / "models/model.json").read_text()) | {"prediction_type": "flow"}
    (tmp_path / "models/model.json").write_text(json.dumps(description))
    model, train = str(tmp_path / "models/model.pt"), str(ROOT / "configs/train.json")
    before = torch.load(model, weights_only=True)
    save_weights(before, description, model)
    loader = {"_target_": "CheckpointLoader", "load_path": model, "load_dict": {"model": "$@network"}, "strict": False}
    monai.bundle.run(
        run_id=run_id,
        init_id=None,
        final_id=None,
        meta_file=str(ROOT / "configs/metadata.json"),
        config_file=train,
        logging_file=False,
        **{key: ast.literal_eval(value) for key, value in TINY_TRAINING.items()} | {"learning_rate": 1e-9},
        **{
            "bundle_root": str(tmp_path),
            "device": "cpu",
            "train#trainer#max_epochs": 1,
            "train#dataset#data": [{"image": str(p), "label": str(p)} for p in sorted(cohort.rglob("*.nii.gz"))[:3]],
            "validate#dataset#data": [],
            "train#handlers": [loader, *ConfigParser.load_config_file(train)["train"]["handlers"]],
        },
    )
    after = torch.load(model, weights_only=True)
    assert all(torch.allclose(after[name], before[name], atol=1e-5) for name in before)
    description = json.loads((tmp_path / "models/model.json").read_text())
    assert description["prediction_type"] == "flow" and description["iteration"] == 2  # 3 volumes in batches of 2
    assert [p.name for p in (tmp_path / "models").glob("previous_*")] == ["previous_1"]
    assert len((tmp_path / "output/training/loss.csv").read_text().splitlines()) == 3
    assert len((tmp_path / "output/training/validation.csv").read_text().splitlines()) == 1
