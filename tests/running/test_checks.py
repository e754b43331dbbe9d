import ast
import json
import sys
from math import inf, nan

import pytest
import torch
from conftest import ROOT, TINY_NETWORK, TINY_TRAINING
from monai.bundle import ConfigParser

from scripts.diffusion.acceleration import amp_dtype
from scripts.diffusion.solvers import SOLVERS
from scripts.running import checks, locks
from scripts.running.checks import check_knobs
from scripts.running.errors import BundleError, report_plainly, root_bundle_error
from scripts.running.knobs import KNOBS as KNOBS_OF_ALL

PAPER = {
    "spatial_shape": [64, 64, 64],
    "channels": [64, 64, 128, 128],
    "attention_levels": [False, False, True, False],
    "num_head_channels": [0, 0, 128, 128],
    "norm_num_groups": 32,
}
VALUES = {"0": 0, "-1": -1, "1.5": 1.5, "inf": inf, "nan": nan, "a": "a", "true": True, "[]": [], "none": None}
RIGHT = {  # which of `VALUES` a knob may be; a knob that is not here may be none of them
    "init_ckpt": "a none",
    "mask_suffix": "a none",
    "exclude": "[]",
    "brain_extraction": "true",
    "mask_dir": "a",
    "image_pattern": "a none",
    "wavelet_levels": "0",
    "output_dir": "a",
    "ckpt_dir": "a",
    "ckpt_path": "a",
    "skip_bad_files": "true",
    "resume": "true",
    "seed": "0",
    "class_names": "[] none",
    "class_table": "none",  # a path goes with class_names
    "class_dropout": "0",
    "covariates": "a [] none",  # a text, as of a client, or a list of columns
    "covariate_table": "a none",
    "made_condition": "none",
    "condition_dir": "a none",
    "known": "a none",
    "known_mask": "a none",
    "learning_rate": "1.5",
    "time_limit": "1.5 none",
    "channels_last": "true",
    "compile": "true",
    "activation_checkpointing": "[]",
    "max_grad_norm": "1.5 none",
    "surge_factor": "1.5 none",
    "surge_retries": "0",
    "preview_epochs": "[]",
    "crop_margin": "0",
    "flip_probability": "0",
    "num_workers": "0",
    "class_label": "0 a none",  # a name, which is looked for among those of the weights
    "guidance_scale": "0 1.5",
    "sigma_max": "1.5 none",
    "eta": "0 1.5 none",
    "clip_sample": "true",
    "background": "0",
    "halve_batch_on_oom": "true",
}
NOT_HERE = {"imports", "bundle_root", "dataset_dir", "onnx_path"}  # a folder without scans has sentences of its own
KNOBS = {}
for name, last in (("train", "cache"), ("inference", "class_names")):
    keys = list(json.loads((ROOT / f"configs/{name}.json").read_text()))
    KNOBS[name] = [key for key in keys[: keys.index(last) + 1] if key not in NOT_HERE]


def initialized(name, **knobs):
    """A config whose knobs have been checked as the command does it, and nothing after that has been done."""
    parser = ConfigParser()
    parser.read_config(str(ROOT / f"configs/{name}.json"))
    tiny = TINY_TRAINING if name == "train" else TINY_NETWORK
    parser.update({key: ast.literal_eval(value) for key, value in tiny.items()} | knobs)
    targets = [part.get("_target_") if isinstance(part, dict) else part for part in parser["initialize"]]
    for i, target in enumerate(targets):
        if target == "scripts.running.checks.check_knobs":
            parser.get_parsed_content(f"initialize#{i}")
    return parser


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name, key", [(name, key) for name, keys in KNOBS.items() for key in keys])
def test_a_knob_takes_what_is_right_and_refuses_the_rest_by_its_key_before_any_scan_is_read(name, key, value):
    right = RIGHT.get(key, "").split() + ["-1"] * ((name, key) == ("inference", "seed"))
    if value in right:
        initialized(name, **{key: VALUES[value]})
        return
    with pytest.raises((BundleError, RuntimeError)) as refused:
        initialized(name, **{key: VALUES[value]})
    said = root_bundle_error(refused.value)
    assert said is not None and str(said).startswith(f"{key}: {VALUES[value]!r}"), refused.value
    assert len(str(said)) < 300


@pytest.mark.parametrize("name", ["train", "inference", "evaluate", "reader_study", "export"])
def test_the_check_of_the_knobs_comes_before_anything_of_the_config_is_made(name):
    config = json.loads((ROOT / f"configs/{name}.json").read_text())
    first = config["initialize"][:3]
    assert first[:2] == ["@on_path", "@started"] and config["started"]["_target_"] == "scripts.running.start.start"
    assert first[2]["_target_"] == "scripts.running.checks.check_knobs"


@pytest.mark.parametrize(
    "knobs, sentence",
    [
        ({"seed": 2**63}, r"seed: 9223372036854775808 was given; it must be a whole number from 0 to 2\^63 - 1"),
        ({"spatial_shape": [64, 64.0, 64]}, r"spatial_shape: \[64, 64.0, 64\] was given; .*list of 2 or 3.*whole"),
        ({"spatial_shape": 64}, "spatial_shape: 64 was given.*list"),
        ({"spatial_shape": [1, 1, 1]}, r"spatial_shape: \[1, 1, 1\] was given.*2 or more"),
        ({"spatial_shape": [8]}, "spatial_shape.*2 or 3 entries"),
        ({"attention_levels": ["false", "true"]}, "attention_levels.*True or False"),
        ({"schedule": "cosinus"}, "schedule: 'cosinus' is unknown.*linear_beta.*cosine"),
        ({"prediction_type": "velocity"}, "prediction_type: 'velocity' is unknown.*v_prediction"),
        ({"num_train_timesteps": 1}, "num_train_timesteps: 1 was given"),
        ({"network_class": "scripts.diffusion.networks.UNext"}, "network_class: 'scripts.diffusion.networks.UNext'"),
        ({"percentiles": [99, 1]}, "percentiles.*lower < upper"),
        ({"percentiles": [0.5, 99.5, 100]}, "percentiles.*two"),
        ({"class_label": []}, "class_label"),
        ({"preview_epochs": [0.5]}, "preview_epochs: .* list of whole numbers"),
        ({"preview_epochs": ["0"]}, "preview_epochs: .* list of whole numbers"),
        ({"surge_factor": 1}, "surge_factor: 1 was given.*above 1, or None"),
        ({"max_iterations": 10**400}, ""),
        ({"voxel_size": [1, 1], "spatial_shape": [8, 8, 8]}, "voxel_size.*3 lengths in mm"),
        ({"voxel_size": 2.0}, "voxel_size: 2.0 was given.*a length in mm above 0"),
        ({"voxel_size": [1, 1, 0]}, "voxel_size.*a length in mm above 0"),
        ({"preview_steps": 300, "num_train_timesteps": 250}, "preview_steps: 300 .* num_train_timesteps = 250"),
        (PAPER | {"spatial_shape": [64, 60, 64]}, "spatial_shape.*60 is not divisible by 8.*56 or 64"),
        (PAPER | {"spatial_shape": [4, 8, 8]}, "spatial_shape.*4 is not divisible by 8"),
        (PAPER | {"channels": [64, 64, 100, 128]}, "channels.*100 is not divisible by norm_num_groups = 32"),
        (PAPER | {"channels": [64, 64, 128]}, "attention_levels.*has 4 entries, but channels has 3 levels"),
        (PAPER | {"num_head_channels": [0, 0, 48, 128]}, r"num_head_channels.*channels\[2\] = 128"),
        (PAPER | {"num_head_channels": [0, 0, 128, 0]}, r"num_head_channels.*channels\[3\] = 128.*middle block"),
        (PAPER | {"num_head_channels": [0, 128]}, "num_head_channels.*has 2 entries"),
        (PAPER | {"spatial_shape": [8, 8, 8], "norm_num_groups": 32}, ""),
        (PAPER | {"spatial_shape": [8, 8, 8], "channels": [32, 32, 32, 32], "num_head_channels": 32}, "one voxel"),
    ],
)
def test_the_sentence_says_what_is_right(knobs, sentence):
    if not sentence:
        return check_knobs(**knobs)
    with pytest.raises(BundleError, match=sentence):
        check_knobs(**knobs)


def test_the_papers_network_passes():
    check_knobs(**PAPER, num_train_timesteps=250, schedule="cosine", prediction_type="epsilon", seed=2**63 - 1)


def test_every_solver_is_a_word_of_its_knob():
    assert KNOBS_OF_ALL["solver"].words == tuple(SOLVERS)


@pytest.mark.parametrize(
    "count, device, right",
    [
        (0, "cuda:1", "there is no CUDA GPU here; cpu, or leave it out"),
        (0, "cuda", "there is no CUDA GPU here; cpu, or leave it out"),
        (0, "gpu", "there is no CUDA GPU here; cpu, or leave it out"),
        (0, "meta", "there is no CUDA GPU here; cpu, or leave it out"),
        (1, "cuda:1", "there is one CUDA GPU here; cuda:0, cpu, or leave it out"),
        (2, "gpu", "there are 2 CUDA GPUs here; cuda:0, cuda:1, cpu, or leave it out"),
        (2, "cuda:1", None),
        (1, torch.device("cuda"), None),
        (0, "cpu", None),
        (0, torch.device("cpu"), None),
    ],
)
def test_a_device_that_is_not_here_is_refused(monkeypatch, count, device, right):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if right is None:
        return check_knobs(device=device)
    with pytest.raises(BundleError) as refused:
        check_knobs(device=device)
    assert str(refused.value) == f"device: {device!r} was given, but {right}"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="output_dir: nothing can be written in .*file/below"):
        locks.check_writable(output_dir=str(tmp_path / "file" / "below"))
    locks.check_writable(output_dir=str(tmp_path / "new"))
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("value, truth", [(True, True), ("true", True), ("False", False), (False, False)])
def test_switches_are_understood_as_the_command_line_gives_them(value, truth):
    assert checks.as_bool(resume=value) is truth


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_another_word_for_a_switch_is_refused(value):
    with pytest.raises(BundleError, match="resume: .* true or false"):
        checks.as_bool(resume=value)


@pytest.mark.parametrize(
    "amx, avx512, name, expected",
    [
        (0, 0, "AMD EPYC", None),
        (1, 0, "Intel Xeon", torch.bfloat16),
        (0, 1, "AMD EPYC", torch.bfloat16),
        (0, 1, "Intel Xeon", None),
    ],
)
def test_a_cpu_gets_bfloat16_where_it_is_faster_with_it(monkeypatch, amx, avx512, name, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)
    assert amp_dtype("auto", torch.device("cpu")) is expected


@pytest.mark.parametrize(
    "sides, levels, safe",
    [
        ((32, 32, 32), 4, True),
        ((16, 16, 16), 4, False),
        ((64, 16, 64), 4, False),
        ((8, 8, 8), 4, False),
        ((4, 4), 2, True),
    ],
)
def test_bfloat16_is_not_trained_on_a_cpu_where_its_gradients_are_wrong(monkeypatch, sides, levels, safe):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert amp_dtype("auto", "cpu", sides, levels) is (torch.bfloat16 if safe else None)
    if safe:
        assert amp_dtype("bfloat16", "cpu", sides, levels) is torch.bfloat16
    else:
        with pytest.raises(
            BundleError, match="amp: 'bfloat16' .* coarsest of the network's 4 levels .* auto or float32"
        ):
            amp_dtype("bfloat16", "cpu", sides, levels)
    assert amp_dtype("float32", "cpu", sides, levels) is None


def test_gradients_are_added_over_whole_groups_of_iterations():
    check_knobs(accumulation_steps=4, max_iterations=8, checkpoint_interval=4)
    with pytest.raises(BundleError, match="checkpoint_interval: 6 .* accumulation_steps = 4 .* such as 8"):
        check_knobs(accumulation_steps=4, max_iterations=8, checkpoint_interval=6)


def test_precision_goes_by_the_device():
    cpu = torch.device("cpu")
    assert amp_dtype("float32", cpu) is None
    assert amp_dtype("bfloat16", cpu) is torch.bfloat16
    with pytest.raises(BundleError, match="amp: 'float16' cannot be used on cpu"):
        amp_dtype("float16", cpu)
    with pytest.raises(BundleError, match="amp: 'half' cannot be used"):
        amp_dtype("half", cpu)


@pytest.mark.parametrize("capability, expected", [((7, 5), torch.float16), ((9, 0), torch.bfloat16)])
def test_older_gpus_get_float16(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert amp_dtype("auto", torch.device("cuda:0")) is expected


def test_the_sentence_is_found_below_what_wraps_it():
    try:
        try:
            raise BundleError("the sentence")
        except BundleError as e:
            raise RuntimeError("Failed to evaluate") from e
    except RuntimeError as wrapped:
        assert str(root_bundle_error(wrapped)) == "the sentence"
    assert root_bundle_error(RuntimeError("another")) is None


@pytest.mark.parametrize("said", ["", "stopped at once"])
def test_ctrl_c_is_a_sentence(monkeypatch, capsys, said):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    report_plainly()
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(*[said] * bool(said)), None)
    assert capsys.readouterr().err == f"error: {said or 'stopped by Ctrl-C'}\n"


def test_intervals_and_preview_steps_follow_a_short_training_and_a_short_schedule():
    """Where the command line names none of them."""
    parser = ConfigParser.load_config_file(ROOT / "configs/train.json") | {"max_iterations": 6, "accumulation_steps": 3}
    parser = ConfigParser(parser | {"num_train_timesteps": 10})
    derived = parser.get_parsed_content("derived_knobs")
    assert [derived[key] for key in ("val_interval", "preview_interval", "checkpoint_interval")] == [6, 6, 6]
    assert derived["preview_steps"] == 10
    check_knobs(derived)


def test_the_seed_is_set_before_the_network_is_made():
    """A check of knobs looks into init_ckpt, and must not make anything of the config."""
    weights = []
    for earlier in (1, 2):
        torch.manual_seed(earlier)
        parser = initialized("train")
        (seeding,) = (i for i, part in enumerate(parser["initialize"]) if "torch.manual_seed" in str(part))
        parser.get_parsed_content(f"initialize#{seeding}")
        weights.append(torch.cat([w.flatten() for w in parser.get_parsed_content("network").state_dict().values()]))
    assert torch.equal(*weights)
