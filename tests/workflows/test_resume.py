"""Going on with a run: every knob of train.json changed, the split, the learning rate, and what an average spans.

All in this process, in the trainer that train.json builds.
"""

import json
import shutil

import nibabel as nib
import pytest
import torch
from conftest import ROOT, workflow

from scripts.diffusion.description import DESCRIBING, labelled
from scripts.diffusion.weights import save_weights
from scripts.running.errors import root_bundle_error
from scripts.scans.split import subjects_of

KNOBS = list(json.loads((ROOT / "configs/train.json").read_text()))
KNOBS = KNOBS[KNOBS.index("dataset_dir") : KNOBS.index("init_description")]
PLACES = {"dataset_dir", "output_dir", "ckpt_dir", "resume", "init_ckpt"}  # which run, of which files
OF_WEIGHTS = {
    "spatial_shape": [16, 16, 32],
    "wavelet_levels": 1,
    "detail_rms": [0.2, 0.1, 0.05],
    "network_class": "scripts.diffusion.networks.ConvNeXtUNet",
    "channels": [8, 16],
    "attention_levels": [False, False],
    "num_head_channels": [0, 4],
    "num_res_blocks": 2,
    "norm_num_groups": 4,
    "num_train_timesteps": 20,
    "schedule": "linear_beta",
    "prediction_type": "sample",
    "timestep_sampling": "balanced",
    "class_names": ["glioma", "healthy"],
}
OF_DATA = {
    "seed": 1,
    "val_fraction": 0.4,
    "mask_suffix": "_mask",
    "brain_extraction": True,
    "image_pattern": "*.gz",
    "crop_margin": 0,
    "percentiles": [1, 99],
}
MAY_CHANGE = {
    "skip_bad_files": True,
    "device": "cpu:0",
    "exclude": [],
    "mask_dir": "elsewhere",
    "class_table": None,
    "covariates": [],
    "covariate_table": None,
    "condition_images": {},
    "made_condition": None,
    "class_dropout": 0.5,
    "learning_rate": 0.002,
    "batch_size": 1,
    "max_iterations": 8,
    "time_limit": 60,
    "sigma_max": 80,
    "ema_momentum": 0.1,
    "amp": "float32",
    "channels_last": True,
    "compile": False,  # true takes a minute
    "activation_checkpointing": "all",
    "accumulation_steps": 2,
    "max_grad_norm": 1.0,
    "surge_factor": None,
    "surge_retries": 1,
    "val_interval": 4,
    "preview_interval": 8,
    "preview_samples": 2,
    "preview_steps": 3,
    "preview_epochs": [0],
    "checkpoint_interval": 4,
    "checkpoints_kept": 1,
    "flip_probability": 0.0,
    "num_workers": 1,
    "cache": "none",
}


def test_every_knob_of_training_has_its_place(tmp_path):
    """A knob that is new describes weights (`weights.DESCRIBING`), or data, or may change: say which."""
    assert sorted(KNOBS) == sorted([*PLACES, *OF_WEIGHTS, *OF_DATA, *MAY_CHANGE])
    assert set(OF_WEIGHTS) == set(DESCRIBING) - {"voxel_size", "scheduler", "coarse"}  # no knobs
    assert set(workflow("train", tmp_path).parser.get_parsed_content("data_knobs")) == set(OF_DATA)


@pytest.fixture(scope="module")
def scans(tmp_path_factory, cohort):
    """The cohort as six subjects of BIDS."""
    folder = tmp_path_factory.mktemp("scans")
    for number, path in enumerate(sorted(cohort.rglob("*.nii.gz"))):
        shutil.copy(path, folder / f"sub-{number:02d}_T1w.nii.gz")
    return folder


@pytest.fixture(scope="module")
def run(scans, tmp_path_factory):
    """The folder of a whole tiny run."""
    output = tmp_path_factory.mktemp("run")
    workflow("train", output, dataset_dir=str(scans), val_fraction=0.3).run()
    return output


@pytest.fixture
def copied(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
    return tmp_path / "run"


def up_to_the_training(output, scans, **knobs):
    """Everything that a command checks and reads before the first iteration; the sentence where it is refused."""
    knobs = {"dataset_dir": str(scans), "val_fraction": 0.3, "resume": True} | knobs
    try:
        going_on = workflow("train", output, **knobs)
        for number in range(len(going_on.parser["run"]) - 1):
            going_on.parser.get_parsed_content(f"run#{number}")
    except Exception as e:
        if root_bundle_error(e) is None:
            raise
        return str(root_bundle_error(e))
    return None


@pytest.mark.parametrize("key", OF_WEIGHTS)
def test_a_knob_that_describes_weights_is_refused_as_init_ckpt_refuses_it(run, scans, tmp_path, key):
    checkpoint = run / "models/checkpoint_00000006.pt"
    was = json.loads((run / "models/model.json").read_text())[key]
    said = up_to_the_training(run, scans, **{key: OF_WEIGHTS[key]})
    assert said == (
        f"{key}: {OF_WEIGHTS[key]!r} was given, but {str(checkpoint)!r} was trained with {was!r}; give the same (or "
        "the preset that was used for training)"
    )
    knobs = {key: OF_WEIGHTS[key], "resume": False, "init_ckpt": str(checkpoint)}
    other = up_to_the_training(tmp_path / "new", scans, **knobs)
    if key == "wavelet_levels":  # a new run would grow the network
        assert other.startswith("init_ckpt: ") and "it can be grown to [32, 32, 32]" in other
    elif key == "class_names":  # a new run would grow the network by them, and looks for them
        assert other.startswith("class_names: 6 of 6 images lie in no folder and so have no class")
    else:
        assert other == (said if DESCRIBING[key].fixed else None)


@pytest.mark.parametrize("key", OF_DATA)
def test_a_knob_that_describes_the_data_is_refused(run, scans, tmp_path, key):
    if key == "mask_suffix":
        shutil.copytree(scans, tmp_path / "scans")
        scans = tmp_path / "scans"
        for path in list(scans.iterdir()):
            shutil.copy(path, str(path).replace("_T1w", "_T1w_mask"))
    said = up_to_the_training(run, scans, **{key: OF_DATA[key]})
    assert said.startswith(f"{key}: {OF_DATA[key]!r} was given, but the run that goes on was begun with ")
    assert said.endswith("give the same, or begin a new run with --init_ckpt") and "dataset.json" in said


@pytest.mark.parametrize("key", MAY_CHANGE)
def test_every_other_knob_may_change(run, scans, key):
    knobs = {key: MAY_CHANGE[key]}
    if key == "accumulation_steps":
        knobs["checkpoint_interval"] = knobs["val_interval"] = 2
    assert up_to_the_training(run, scans, **knobs) is None


def test_a_run_goes_on_with_all_that_may_change(copied, scans, caplog):
    knobs = {"dataset_dir": str(scans), "val_fraction": 0.3, "resume": True, **MAY_CHANGE, "num_workers": 0}
    workflow("train", copied, **knobs).run()
    newest = torch.load(copied / "models/checkpoint_00000008.pt", weights_only=True)
    assert newest["iteration"] == 8 and newest["optimizer"]["param_groups"][0]["lr"] == 0.002
    assert "learning_rate: 0.002 from here on, in place of 0.001" in caplog.text


def test_what_the_weights_predict_is_that_of_the_run_and_not_of_weights_that_lie_there(copied, scans, tmp_path):
    """A run that began with --init_ckpt goes on without; one that is begun with --resume true, as in jobs, begins."""
    content = torch.load(copied / "models/checkpoint_00000006.pt", weights_only=True)
    flow = json.loads((copied / "models/model.json").read_text()) | {"prediction_type": "flow"}
    content |= {key: labelled(content[key], flow) for key in ("network", "ema")}
    torch.save(content, copied / "models/checkpoint_00000006.pt")
    knobs = {"dataset_dir": str(scans), "val_fraction": 0.3, "resume": True}
    assert workflow("train", copied, **knobs).parser.get_parsed_content("prediction_type") == "flow"
    assert up_to_the_training(copied, scans) is None
    assert "'sample' was given, but" in up_to_the_training(copied, scans, prediction_type="sample")
    (tmp_path / "models").mkdir()
    save_weights(content["ema"], flow, str(tmp_path / "models/model.pt"))
    begun = workflow("train", tmp_path, **knobs)
    assert begun.parser.get_parsed_content("prediction_type") == "epsilon"


def test_a_checkpoint_of_version_04_is_compared_with_its_model_json(copied, scans):
    """It says nothing by itself, and its model.json had fewer knobs."""
    for path in (copied / "models").glob("*.pt"):
        content = torch.load(path, weights_only=True)
        for state_dict in [content[key] for key in ("network", "ema") if key in content] or [content]:
            state_dict.__dict__.clear()
        torch.save(content, path)
    path = copied / "models/model.json"
    older = json.loads(path.read_text())
    for key in ("attention_levels", "num_head_channels", "num_res_blocks", "norm_num_groups"):
        del older[key]
    path.write_text(json.dumps(older))
    assert up_to_the_training(copied, scans) is None
    assert "'sample' was given, but" in up_to_the_training(copied, scans, prediction_type="sample")


# the split


def split_of(output):
    record = json.loads((output / "dataset.json").read_text())
    sides = ([{"image": path} for path in record[side]] for side in ("training", "validation"))
    return [set(subjects_of(images, record["dataset_dir"])) for images in sides]


def test_new_subjects_join_the_training_part_and_nobody_changes_sides(copied, scans, tmp_path, caplog):
    """In another place besides, as on the disk of a cluster's node; a new visit goes where its subject is."""
    before = split_of(copied)
    moved = tmp_path / "elsewhere" / "scans"
    shutil.copytree(scans, moved)
    volume = nib.load(next(scans.iterdir()))
    for name in ("sub-05a", "sub-10", "sub-11"):  # new; the first would shift the order of all after it
        nib.save(nib.Nifti1Image(volume.get_fdata()[::-1], volume.affine), moved / f"{name}_T1w.nii.gz")
    (visit,) = sorted(before[1])[:1]
    nib.save(nib.Nifti1Image(volume.get_fdata()[:, ::-1], volume.affine), moved / f"{visit}_ses-2_T1w.nii.gz")
    knobs = {"dataset_dir": str(moved), "val_fraction": 0.3, "resume": True, "max_iterations": 8}
    workflow("train", copied, **knobs, checkpoint_interval=8, val_interval=8, preview_interval=8).run()
    training, held_out = split_of(copied)
    assert held_out == before[1] and training == before[0] | {"sub-05a", "sub-10", "sub-11"}
    assert len(json.loads((copied / "dataset.json").read_text())["validation"]) == len(before[1]) + 1
    assert "3 subjects are new since the run began, and join its training part: sub-05a, sub-10, sub-11" in caplog.text


def test_a_run_does_not_go_on_without_what_it_held_out(copied, scans, tmp_path, caplog):
    held_out = split_of(copied)[1]
    shutil.copytree(scans, tmp_path / "scans")
    for subject in held_out:
        (tmp_path / f"scans/{subject}_T1w.nii.gz").unlink()
    said = up_to_the_training(copied, tmp_path / "scans")
    assert said.startswith(f"dataset_dir: {str(tmp_path / 'scans')!r} holds none of the {len(held_out)} held-out files")
    (copied / "dataset.json").write_text("[]")
    assert "does not say how the run was split" in up_to_the_training(copied, scans)
    (copied / "dataset.json").unlink()
    assert up_to_the_training(copied, scans) is None
    assert "it is split anew" in caplog.text


def test_a_new_run_is_split_anew(copied, scans):
    before = split_of(copied)
    assert up_to_the_training(copied, scans, resume=False, seed=3, val_fraction=0.5) is None
    going_on = workflow("train", copied, dataset_dir=str(scans), seed=3, val_fraction=0.5)
    assert len(going_on.parser.get_parsed_content("split")[1]) == 3 != len(before[1])


# what an average spans


def test_accumulated_batches_give_the_average_of_the_large_batch(scans, tmp_path):
    """Once a step of the optimizer, with the momentum of that step: the same training, so the same average."""
    lags = {}  # how far the average is behind the weights
    for accumulated in (1, 2, 4):
        output, iterations = tmp_path / str(accumulated), 6 * accumulated
        knobs = dict.fromkeys(("max_iterations", "checkpoint_interval", "val_interval", "preview_interval"), iterations)
        knobs |= {"batch_size": 4 // accumulated, "accumulation_steps": accumulated, "amp": "float32"}
        workflow("train", output, dataset_dir=str(scans), ema_momentum=0.05, preview_steps=1, **knobs).run()
        content = torch.load(output / f"models/checkpoint_{iterations:08d}.pt", weights_only=True)
        lag = [(content["network"][name] - content["ema"][name]).flatten() for name in content["ema"]]
        lags[accumulated] = torch.cat(lag)
    assert lags[1].norm() > 0.01
    for accumulated in (2, 4):
        assert (lags[accumulated] - lags[1]).norm() < 0.1 * lags[1].norm()
