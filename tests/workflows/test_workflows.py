"""The real commands at tiny size: train, kill, resume, sample, the demonstration, the verbs, and bad inputs."""

import ast
import csv
import json
import random
import shutil
import signal
import subprocess
import time

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_NETWORK, TINY_TRAINING, bundle_command, quiet, run_bundle, sample, train, workflow
from monai.bundle import ConfigParser

from scripts.diffusion.weights import load_weights
from scripts.running.errors import root_bundle_error


def losses(output):
    with open(output / "loss.csv", newline="") as file:
        return [(int(row["iteration"]), row["loss"]) for row in csv.DictReader(file)]


def last_line(done):
    return done.stderr.strip().splitlines()[-1]


def sentence(done):
    """What a refused command says: everything from "error:" on. It must fail and must not show a traceback."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr and "error: " in done.stderr, done.stderr
    return done.stderr[done.stderr.index("error: ") :].strip()


def test_training_writes_what_the_readme_lists(trained):
    for name in ("loss.csv", "loss_curve.png", "validation.csv", "dataset.json", "previews/preview_00000006.png"):
        assert (trained / name).stat().st_size > 0, name
    assert list((trained / "tensorboard").iterdir())
    models = sorted(p.name for p in (trained / "models").iterdir() if p.name != ".lock")
    assert models == [*(f"checkpoint_0000000{i}.pt" for i in (2, 4, 6)), "model.json", "model.pt"]
    assert [i for i, _ in losses(trained)] == [1, 2, 3, 4, 5, 6]
    with open(trained / "validation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["iteration"], r["weights"]) for r in rows] == [("3", "raw"), ("3", "ema"), ("6", "raw"), ("6", "ema")]
    for row in rows:
        quarters = [float(row[f"loss_quarter_{i}"]) for i in (1, 2, 3, 4)]
        assert float(row["loss"]) == pytest.approx(np.mean(quarters), abs=1e-5)


def test_model_pt_is_the_ema_of_the_newest_checkpoint_as_a_plain_state_dict(trained):
    model = torch.load(trained / "models/model.pt", weights_only=True)
    newest = torch.load(trained / "models/checkpoint_00000006.pt", weights_only=True)
    assert all(torch.equal(model[name], newest["ema"][name]) for name in newest["ema"])
    assert any(not torch.equal(model[name], newest["network"][name]) for name in model)


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_killed_run_resumes_to_exactly_the_losses_of_one_never_killed(cohort, trained, tmp_path, cache):
    knobs = TINY_TRAINING | {
        "dataset_dir": cohort,
        "output_dir": tmp_path,
        "ckpt_dir": tmp_path / "models",
        "cache": cache,
        "resume": "true",
    }
    command = bundle_command("run", "training", config_file="configs/train.json", **knobs)
    process = subprocess.Popen(command, cwd=ROOT, env=quiet(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "models" / f"checkpoint_0000000{random.choice((2, 4))}.pt"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run(command, cwd=ROOT, env=quiet(), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "resumed after iteration" in done.stdout
    assert losses(tmp_path) == losses(trained)  # as text: every digit
    ours, theirs = (torch.load(p / "models/model.pt", weights_only=True) for p in (tmp_path, trained))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_rectified_flow_trains_and_samples(cohort, tmp_path):
    names = [f"['configs/{name}.json','configs/presets/rectified_flow.json']" for name in ("train", "inference")]
    knobs = {"num_train_timesteps": 1000}
    done = train(cohort, tmp_path, config_file=names[0], **knobs)
    assert done.returncode == 0, done.stderr
    knobs |= {"num_inference_steps": 4, "solver": "dpmpp_2m_sde"}
    done = sample(tmp_path / "models/model.pt", tmp_path / "samples", config_file=names[1], **knobs)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "samples").glob("*.nii.gz"))) == 2


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow"])
def test_other_prediction_types_train_and_sample(cohort, tmp_path, prediction_type):
    workflow("train", tmp_path, dataset_dir=str(cohort), prediction_type=prediction_type).run()
    knobs = {"ckpt_path": str(tmp_path / "models/model.pt"), "num_inference_steps": 4, "num_samples": 2}
    workflow("inference", tmp_path / "samples", prediction_type=prediction_type, **knobs).run()
    assert len(list((tmp_path / "samples").glob("*.nii.gz"))) == 2


def test_a_checkpoint_of_medforj_samples_from_the_command_line(tmp_path):
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs/train.json"), str(ROOT / "configs/presets/medforj.json")])
    network = parser.get_parsed_content("network_def")
    torch.save({"model": network.state_dict()}, tmp_path / "velocity.pt")
    done = run_bundle(
        "run",
        config_file="['configs/inference.json','configs/presets/medforj.json']",
        ckpt_path=tmp_path / "velocity.pt",
        output_dir=tmp_path,
        spatial_shape="[16,32,16]",
        num_samples=1,
        num_inference_steps=2,
        prediction_type="flow",
    )
    assert done.returncode == 0, done.stderr
    assert nib.load(tmp_path / "sample_seed0_volume000.nii.gz").shape == (16, 32, 16)


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_a_seed_is_a_volume_whatever_the_batch_size(trained, tmp_path, solver):
    knobs = {"ckpt_path": str(trained / "models/model.pt"), "solver": solver, "num_samples": 4, "seed": 7}
    for batch_size in (1, 4):
        output = tmp_path / str(batch_size)
        workflow("inference", output, batch_size=batch_size, **knobs).run()
        assert (output / "mosaic.png").exists()
    one, four = (nib.load(tmp_path / b / "sample_seed7_volume003.nii.gz") for b in ("1", "4"))
    difference = np.abs(one.get_fdata() - four.get_fdata()).max() / 127.5
    assert difference < 1e-4
    assert 0 <= one.get_fdata().min() and one.get_fdata().max() <= 255 and one.get_fdata().std() > 0
    other = nib.load(tmp_path / "1" / "sample_seed7_volume002.nii.gz").get_fdata()
    assert np.abs(one.get_fdata() - other).max() > 10


def test_synthetic_volumes_have_the_voxel_size_of_the_training_cubes(trained, tmp_path):
    assert sample(trained / "models/model.pt", tmp_path, num_samples=1, num_inference_steps=2).returncode == 0
    image = nib.load(tmp_path / "sample_seed0_volume000.nii.gz")
    median = json.loads((trained / "dataset.json").read_text())["voxel_size_mm"]["median"]
    np.testing.assert_allclose(image.header.get_zooms(), median, rtol=1e-5)
    centre = image.affine @ [*(np.array(image.shape) - 1) / 2, 1]
    np.testing.assert_allclose(centre[:3], 0, atol=1e-3)


def test_the_demonstration_makes_its_own_data_and_samples(tmp_path):
    bundle = tmp_path / "bundle"
    for part in ("configs", "scripts"):
        shutil.copytree(ROOT / part, bundle / part, ignore=shutil.ignore_patterns("__pycache__"))
    small = TINY_TRAINING | {"prediction_type": "sample", "preview_steps": "2"}
    preset = "configs/presets/demo.json"
    config = f"['configs/train.json','{preset}']"
    done = run_bundle("run", "training", cwd=bundle, config_file=config, **small)
    assert done.returncode == 0, done.stderr
    demo = bundle / "output/demo"
    assert len(list((demo / "phantoms").glob("*.nii.gz"))) == 48
    small = TINY_NETWORK | {"num_inference_steps": 3}
    done = run_bundle("run", cwd=bundle, config_file=f"['configs/inference.json','{preset}']", **small)
    assert done.returncode == 0, done.stderr
    assert len(list(demo.glob("sample_seed0_volume*.nii.gz"))) == 4 and (demo / "mosaic.png").exists()


def test_the_demonstration_does_not_draw_phantoms_into_a_folder_that_the_user_names(tmp_path):
    config = "['configs/train.json','configs/presets/demo.json']"
    places = {"output_dir": tmp_path / "out", "ckpt_dir": tmp_path / "out"}
    done = run_bundle("run", "training", config_file=config, dataset_dir=tmp_path / "mine", **places)
    assert "dataset_dir" in sentence(done) and not (tmp_path / "mine").exists()


def test_the_weights_that_come_with_the_bundle_are_sampled_without_any_argument(tmp_path):
    weights = torch.load(ROOT / "models/model.pt", weights_only=True)
    assert all(t.dtype == torch.bfloat16 for t in weights.values())
    assert (ROOT / "models/model.pt").stat().st_size <= 25 * 2**20
    done = run_bundle("run", config_file="configs/inference.json", output_dir=tmp_path, num_samples=1)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.nii.gz")
    image = nib.load(path)
    voxels = np.asarray(image.dataobj)
    described = json.loads((ROOT / "models/model.json").read_text())
    np.testing.assert_allclose(image.header.get_zooms(), described["voxel_size"], rtol=1e-4)
    assert list(voxels.shape) == described["spatial_shape"]
    edge = np.ones(voxels.shape, bool)
    edge[2:-2, 2:-2, 2:-2] = False
    assert 0.1 < (voxels > 20).mean() < 0.6 and (voxels[edge] > 20).mean() < 0.1  # a head in a dark background


def test_a_checkpoint_is_sampled_as_the_weights_of_its_training_are(trained, tmp_path):
    done = sample(trained / "models/checkpoint_00000004.pt", tmp_path, num_samples=1)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.nii.gz")
    described = json.loads((trained / "models/model.json").read_text())
    np.testing.assert_allclose(nib.load(path).header.get_zooms(), described["voxel_size"], rtol=1e-4)


def test_the_way_from_noise_to_volume_is_drawn(trained, tmp_path):
    knobs = {"config_file": "configs/inference.json", "ckpt_path": trained / "models/model.pt", "output_dir": tmp_path}
    done = run_bundle("run", "denoising", **TINY_NETWORK | knobs)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "denoising.png").stat().st_size > 1000 and not list(tmp_path.glob("*.nii.gz"))


def test_weights_are_exported_in_half_the_bytes_and_begin_another_training(trained, cohort, tmp_path):
    knobs = {"config_file": "configs/export.json", "ckpt_path": trained / "models/checkpoint_00000004.pt"}
    done = run_bundle("run", **knobs, path=tmp_path / "half.pt")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "half.json").read_text())["iteration"] == 4
    done = train(cohort, tmp_path / "tuned", init_ckpt=tmp_path / "half.pt", learning_rate=1e-9)
    assert done.returncode == 0, done.stderr
    tuned = torch.load(tmp_path / "tuned/models/model.pt", weights_only=True)
    half = torch.load(tmp_path / "half.pt", weights_only=True)
    assert all(torch.allclose(tuned[name], half[name].float(), atol=1e-5) for name in half)


def test_two_accumulated_half_batches_are_one_batch(cohort, tmp_path):
    weights = []
    for name, knobs in {
        "whole": {"batch_size": 4, "max_iterations": 2, "checkpoint_interval": 2},
        "halves": {"batch_size": 2, "max_iterations": 4, "checkpoint_interval": 4, "accumulation_steps": 2},
    }.items():
        intervals = {"val_interval": 4, "preview_interval": 4}
        workflow("train", tmp_path / name, dataset_dir=str(cohort), amp="float32", **intervals, **knobs).run()
        (path,) = (tmp_path / name / "models").glob("checkpoint_*.pt")
        weights.append(torch.load(path, weights_only=True)["network"])
    torch.testing.assert_close(weights[0], weights[1], atol=1e-4, rtol=1e-3)


def test_checkpointed_and_channels_last_training_is_the_same_training(cohort, tmp_path):
    plain, other = tmp_path / "plain", tmp_path / "other"
    means = {"activation_checkpointing": "all", "channels_last": "true"}
    for output, knobs in ((plain, {}), (other, means)):
        workflow("train", output, dataset_dir=str(cohort), amp="float32", **knobs).run()
    pairs = [(float(a), float(b)) for (_, a), (_, b) in zip(losses(plain), losses(other), strict=True)]
    assert len(pairs) == 6 and all(a == pytest.approx(b, rel=1e-3) for a, b in pairs)


def test_the_network_is_verified_and_exported_from_the_command_line(trained, tmp_path):
    common = {
        "meta_file": "configs/metadata.json",
        "config_file": "configs/inference.json",
        "num_inference_steps": 2,
        "ckpt_path": trained / "models/model.pt",  # which says what the network knows
    } | TINY_NETWORK
    done = run_bundle(
        "verify_net_in_out", "network_def", device="cpu", **common,
        **{"_meta_#network_data_format#inputs#image#spatial_shape": "[16,16,16]"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    archive = tmp_path / "model.ts"
    ckpt = {"ckpt_file": trained / "models/model.pt", "filepath": archive, "solver": "dpmpp_2m"}
    done = run_bundle("ckpt_export", "network_def", **ckpt, **common)
    assert done.returncode == 0, done.stderr

    parser = ConfigParser()
    parser.read_config(str(ROOT / "configs/inference.json"))
    knobs = {key: ast.literal_eval(value) for key, value in TINY_NETWORK.items()}
    parser.update(knobs | {"num_inference_steps": 2, "solver": "dpmpp_2m", "amp": "float32"})
    parser["ckpt_path"] = str(trained / "models/model.pt")
    eager = parser.get_parsed_content("network_def")
    load_weights(eager, str(trained / "models/model.pt"))
    for batch in (1, 3):
        noise = torch.randn(batch, 1, 16, 16, 16)
        torch.testing.assert_close(torch.jit.load(str(archive))(noise), eager(noise), atol=1e-5, rtol=0)


def test_monai_loads_the_network_with_its_weights_from_any_folder(tmp_path, monkeypatch):
    from monai.bundle import load

    bundle = tmp_path / "brain_mri_ddpm_3d"
    for part in ("configs", "scripts"):
        shutil.copytree(ROOT / part, bundle / part, ignore=shutil.ignore_patterns("__pycache__"))
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs/train.json"))
    weights = {k: torch.full_like(v, 0.5) for k, v in parser.get_parsed_content("network_def").state_dict().items()}
    (bundle / "models").mkdir()
    torch.save(weights, bundle / "models/model.pt")
    monkeypatch.chdir(tmp_path)
    network = load("brain_mri_ddpm_3d", bundle_dir=str(tmp_path), device="cpu")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


def given(knobs, tmp_path):
    """Knobs as the command line gives them."""
    values = {}
    for key, value in knobs.items():
        try:
            values[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[key] = value.format(tmp=tmp_path)
    return values


def refusal(kind, output, **knobs):
    """The sentence with which a command ends, found in this process: the real command prints it, and no traceback."""
    with pytest.raises(Exception) as refused:
        workflow(kind, output, **knobs).run()
    assert root_bundle_error(refused.value) is not None, refused.value
    return str(root_bundle_error(refused.value))


@pytest.mark.parametrize(
    "knobs, words",
    [
        ({"dataset_dir": "{tmp}/nowhere"}, ["dataset_dir", "nowhere", "no such folder"]),
        ({"spatial_shape": "[16,15,16]"}, ["spatial_shape", "15 is not divisible by 2"]),
        ({"channels": "[8,12]"}, ["channels", "12 is not divisible by norm_num_groups = 8"]),
        ({"num_head_channels": "[0,3]"}, ["num_head_channels", "channels[1] = 8"]),
        ({"schedule": "cosinus"}, ["schedule", "'cosinus' is unknown", "cosine"]),
        ({"prediction_type": "noise"}, ["prediction_type", "'noise' is unknown", "epsilon"]),
        ({"val_fraction": "0.95"}, ["dataset_dir", "too few", "val_fraction"]),
        ({"output_dir": "{tmp}/file/out"}, ["output_dir", "nothing can be written"]),
        ({"cache": "ram"}, ["cache", "'ram' is unknown", "memory"]),
        ({"amp": "half"}, ["amp", "'half'", "bfloat16"]),
        ({"max_iterations": "0"}, ["max_iterations", "0 was given", "1 or more"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_knob_of_training_is_refused_in_one_sentence(cohort, tmp_path, knobs, words):
    (tmp_path / "file").write_text("")
    said = refusal("train", tmp_path / "out", **{"dataset_dir": str(cohort)} | given(knobs, tmp_path))
    assert all(word in said for word in words), said
    assert not (tmp_path / "out" / "loss.csv").exists()


def test_all_bad_files_are_listed_at_once_or_skipped(cohort, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(cohort, data)
    voxels = np.random.default_rng(0).uniform(0, 100, (16, 16, 16)).astype(np.float32)
    with_nan = voxels.copy()
    with_nan[3, 3, 3] = np.nan
    bad = {
        "four.nii.gz": np.stack([voxels] * 3, -1),
        "flat.nii": voxels[:, :, 0],
        "constant.nii": voxels * 0,
        "nan.nii": with_nan,
    }
    for name, content in bad.items():
        nib.save(nib.Nifti1Image(content, np.eye(4)), data / name)
    whole = next(data.glob("phantom_*.nii.gz")).read_bytes()
    (data / "torn.nii.gz").write_bytes(whole[: len(whole) // 2])
    said = sentence(train(data, tmp_path / "out"))
    assert "5 files of 11" in said and "skip_bad_files" in said
    assert all(name in said for name in [*bad, "torn.nii.gz"])
    done = train(data, tmp_path / "out", skip_bad_files="true", max_iterations=1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("skipped: ") == 5


@pytest.mark.parametrize(
    "knobs, words",
    [
        ({"ckpt_path": "{tmp}/none.pt"}, ["ckpt_path", "none.pt", "monai.bundle run training"]),
        ({"ckpt_path": "{tmp}/torn.pt"}, ["torn.pt", "truncated"]),
        (
            {"channels": "[16,16]", "num_head_channels": "[0,16]"},
            ["model.pt", "channels: [16, 16] was given", "trained with [8, 8]"],
        ),
        ({"solver": "euler"}, ["solver", "'euler' is unknown", "ddpm"]),
        ({"num_inference_steps": "11"}, ["num_inference_steps", "11", "from 1 to num_train_timesteps = 10"]),
        ({"num_inference_steps": "0"}, ["num_inference_steps", "0", "1 or more"]),
        ({"output_dir": "{tmp}/torn.pt/out"}, ["output_dir", "nothing can be written"]),
        ({"schedule": "linear_beta"}, ["schedule", "'linear_beta' was given", "trained with 'cosine'"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_knob_of_sampling_is_refused_in_one_sentence(trained, tmp_path, knobs, words):
    model = trained / "models/model.pt"
    (tmp_path / "torn.pt").write_bytes(model.read_bytes()[:2000])
    said = refusal("inference", tmp_path / "out", **{"ckpt_path": str(model)} | given(knobs, tmp_path))
    assert all(word in said for word in words), said
    assert not list(tmp_path.rglob("*.nii.gz"))
