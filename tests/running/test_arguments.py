"""The command line: options that no config has, torchrun with and without its overlay, other working directories."""

import json
import re
import shlex

import pytest
from conftest import ROOT, TINY_NETWORK, run_bundle
from monai.bundle import ConfigParser

from scripts.running.arguments import check_arguments
from scripts.running.errors import BundleError
from scripts.running.processes import check_alone

PROGRAM = "/somewhere/site-packages/monai/bundle/__main__.py"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = sorted(
    {
        command
        for page in PAGES
        for command in re.findall(r"-m monai\.bundle (run [^`\n]*configs/[^`\n]*)", page.read_text())
        if "surge.json" not in command  # a file that the page shows
    }
)
KNOWN = {name: f"configs/{name}.json" for name in ("train", "inference", "evaluate")}


@pytest.fixture
def said(monkeypatch, caplog):
    """What is said of a command line: the sentence of an error, or the warnings."""

    def check(words, program=PROGRAM):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr("sys.argv", [program, *words])
        caplog.clear()
        try:
            check_arguments()
        except BundleError as error:
            return f"error: {error}"
        return " | ".join(record.getMessage() for record in caplog.records)

    return check


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--numsamples", "9"], "--numsamples: no config has this key, so that it changes nothing; num_samples is"),
        (["--num-sampels=9"], "num_sampels.*num_samples is the nearest"),
        (["--zzzz", "9"], "--zzzz: no config has this key, so that it changes nothing$"),
        (["--seed", "7", "--resume"], "^$"),
        (["--run_id", "denoising", "--logging_file", "False"], "^$"),
        (["--seed", "$@mine + 1", "--mine", "3"], "^$"),
        (["--_meta_#version", "1.0.0"], "^$"),
        (
            ["--network_def#unet#unet#chanels", "[8,8]"],
            "error: --network_def#unet#unet#chanels: Diff.*'chanels'; channels",
        ),
        (["--network_def::unet::unet::chanels", "[8,8]"], "error: --network_def#unet#unet#chanels: Diff"),
        (["--network_def#unet#unet#include_fc", "false"], "^$"),
        (["--network_def#solvr", "ddim"], "error: .*DiffusionSampler takes no argument 'solvr'; solver is the nearest"),
        (
            ["--network_class", "scripts.diffusion.networks.ConvNeXtUNet", "--network_def#unet#unet#wdth", "3"],
            "ConvNeXtUNet takes no",
        ),
        (["--scheduler#_desc_", "text"], "^$"),
        (["--scheduler#clip_sampel", "true"], "^$"),  # it takes any argument: **kwargs
        (["--displayable_configs#sed", "3"], "--displayable_configs#sed: no config has this key; seed is the nearest"),
        (["--evaluator#val_handlers", "[]"], "^$"),
        (["--preprocessing#transforms#0#keys", "image"], "^$"),
        (["--tracking", "configs/mlflow.json", "--experiment_name", "x"], "^$"),
        (["--tracking", "mlflow", "--experiment_name", "x"], "^$"),
        (["--experiment_name", "x"], "--experiment_name: no config"),
    ],
)
def test_an_option_that_no_config_has_is_told(said, words, expected):
    assert re.search(expected, said(["run", "--config_file", KNOWN["inference"], *words]))


def test_options_of_overlays_presets_and_files_of_arguments_count(said, tmp_path):
    both = "['configs/train.json','configs/presets/mridiff.json']"
    assert said(["run", "training", "--config_file", both, "--huber_delta", "0.5"]) == ""
    assert "--huber_delta" in said(["run", "training", "--config_file", KNOWN["train"], "--huber_delta", "0.5"])
    (tmp_path / "arguments.json").write_text(json.dumps({"config_file": KNOWN["train"], "datset_dir": "x"}))
    told = said(["run", "training", "--args_file", str(tmp_path / "arguments.json")])
    assert "--datset_dir: no config has this key" in told and "dataset_dir is the nearest" in told


def test_the_arguments_of_other_programs_are_left_alone(said):
    words = ["run", "--config_file", KNOWN["inference"], "--numsamples", "9"]
    assert said(words) and not said(words, "/somewhere/jupyter") and not said(["ckpt_export", *words[1:]])


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_of_the_documentation_is_told_anything(said, command):
    assert said(shlex.split(re.split(r"\s&&|\s\||\s>|\s#", command)[0])) == ""


@pytest.mark.parametrize(
    "words, root",
    [
        (["--config_file", "configs/train.json"], "."),
        (["--config_file", "./configs/train.json"], "."),
        (["--config_file", "/a b/bundle/configs/train.json"], "/a b/bundle"),
        (["--config_file=../bundle/configs/train.json"], "../bundle"),
        (["--config_file", "['/b/configs/train.json','/b/configs/presets/demo.json']"], "/b"),
        (["--config_file", "[\"/b/configs/train.json\", '/c/configs/presets/demo.json']"], "/b"),
        (["--config_file", "/b/configs/train.json,/b/configs/multi_gpu_train.json"], "/b"),
        (["--ckpt_path", "/b/configs/x.pt"], "."),
        (["--config_file", "mine.json,/b/configs/train.json"], "."),
        ([], "."),
    ],
)
@pytest.mark.parametrize("name", ["train", "inference", "evaluate", "reader_study", "export"])
def test_the_bundle_is_the_folder_of_the_config_that_the_command_names(monkeypatch, name, words, root):
    monkeypatch.setattr("sys.argv", [PROGRAM, "run", *words])
    parser = ConfigParser()
    parser.read_config(str(ROOT / f"configs/{name}.json"))
    assert parser.get_parsed_content("bundle_root") == root


@pytest.mark.parametrize("name", ["evaluate", "reader_study"])
def test_the_preprocessing_of_training_is_found_from_any_folder_with_the_knobs_of_the_comparison(
    monkeypatch, tmp_path, name
):
    monkeypatch.chdir(tmp_path)
    parser = ConfigParser()
    parser.read_config(str(ROOT / f"configs/{name}.json"))
    parser.update({"bundle_root": str(ROOT), "spatial_shape": [8, 10, 12], "percentiles": [1, 90], "crop_margin": 5})
    parser = parser if name == "evaluate" else parser.get_parsed_content("evaluation")
    transforms = {type(t).__name__: t for t in parser.get_parsed_content("preprocessing").transforms}
    training = json.loads((ROOT / "configs/train.json").read_text())["deterministic_transforms"]
    assert list(transforms) == [part["_target_"].split(".")[-1] for part in training]
    assert transforms["Resized"].resizer.spatial_size == [8, 10, 12]
    assert (transforms["ScaleForegroundd"].lower, transforms["ScaleForegroundd"].upper) == (1, 90)
    assert transforms["CropForegroundd"].cropper.margin == 5


@pytest.mark.parametrize("root", [True, False])
def test_the_command_runs_in_a_folder_that_has_scripts_of_its_own(trained, tmp_path, root):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/__init__.py").write_text("raise ImportError('the wrong scripts')")
    knobs = {"config_file": ROOT / "configs/inference.json", "ckpt_path": trained / "models/model.pt", "numsamples": 9}
    knobs |= {"output_dir": "out", "num_samples": 1, "num_inference_steps": 2} | TINY_NETWORK
    done = run_bundle("run", cwd=tmp_path, **knobs | ({"bundle_root": ROOT} if root else {}))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["sample_seed0_volume000.nii.gz"]
    assert "--numsamples: no config has this key" in done.stdout + done.stderr


def test_several_processes_without_their_overlay_are_refused(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    check_alone("configs/multi_gpu_train.json")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_alone()
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(BundleError, match="3 processes were started by torchrun: add 'configs/multi_gpu_train.json"):
        check_alone("configs/multi_gpu_train.json")
    with pytest.raises(BundleError, match="3 processes were started by torchrun: start one"):
        check_alone()


@pytest.mark.parametrize("name", ["train", "inference", "evaluate"])
def test_the_overlay_joins_where_the_config_refuses_several_processes(name):
    config, overlay = (ConfigParser.load_config_file(ROOT / f"configs/{p}{name}.json") for p in ("", "multi_gpu_"))
    assert config["initialize"][1] == "@started" and overlay["started#together"] is True
    assert config["started"] == {"_target_": "scripts.running.start.start", "overlay": f"configs/multi_gpu_{name}.json"}
    assert overlay["device"]["_target_"] == "scripts.running.processes.local_device"


def test_the_overlay_without_torchrun_is_one_sentence():
    done = run_bundle("run", config_file="['configs/inference.json','configs/multi_gpu_inference.json']")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: config_file: the multi_gpu configs are for processes that")
