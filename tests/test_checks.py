import sys

import pytest
import torch

from scripts import checks
from scripts.errors import BundleError, report_plainly, root_bundle_error

PAPER = {
    "spatial_shape": [64, 64, 64],
    "channels": [64, 64, 128, 128],
    "attention_levels": [False, False, True, False],
    "num_head_channels": [0, 0, 128, 128],
    "norm_num_groups": 32,
}


def test_the_papers_network_passes():
    checks.check_network(**PAPER)
    checks.check_diffusion(250, "cosine", "epsilon")


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"spatial_shape": [64, 60, 64]}, "spatial_shape.*60 is not divisible by 8.*56 or 64 would be right"),
        ({"spatial_shape": [4, 8, 8]}, "spatial_shape.*4 is not divisible by 8"),
        ({"spatial_shape": [64, 64.0, 64]}, "spatial_shape.*whole numbers"),
        ({"spatial_shape": 64}, "spatial_shape: 64 was given.*list of whole numbers"),
        ({"channels": [64, 64, 100, 128]}, "channels.*100 is not divisible by norm_num_groups = 32"),
        ({"channels": [64, 64, 128]}, "attention_levels.*has 4 entries, but channels has 3 levels"),
        ({"num_head_channels": [0, 0, 48, 128]}, r"num_head_channels.*channels\[2\] = 128"),
        ({"num_head_channels": [0, 0, 128, 0]}, r"num_head_channels.*channels\[3\] = 128.*middle block"),
        ({"num_head_channels": [0, 128]}, "num_head_channels.*has 2 entries"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change, sentence):
    with pytest.raises(BundleError, match=sentence):
        checks.check_network(**PAPER | change)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((250, "cosinus", "epsilon"), "schedule: 'cosinus' is unknown.*linear_beta.*cosine"),
        ((250, "cosine", "velocity"), "prediction_type: 'velocity' is unknown.*v_prediction"),
        ((1, "cosine", "epsilon"), "num_train_timesteps: 1 was given"),
    ],
)
def test_unknown_words_of_the_process_are_named(arguments, sentence):
    with pytest.raises(BundleError, match=sentence):
        checks.check_diffusion(*arguments)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="output_dir: nothing can be written in .*file/below"):
        checks.check_writable(output_dir=str(tmp_path / "file" / "below"))
    checks.check_writable(output_dir=str(tmp_path / "new"))
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("key, value", [("num_samples", 0), ("batch_size", 1.5), ("batch_size", True)])
def test_counts_must_be_whole_and_positive(key, value):
    with pytest.raises(BundleError, match=f"{key}: {value!r} was given"):
        checks.check_sampling(
            **{"num_samples": 1, "batch_size": 1, key: value}, voxel_size=[1, 1], spatial_shape=[8, 8]
        )


@pytest.mark.parametrize("voxel_size", [[1, 1], 2.0, [1, 1, 0], [1, 1, float("nan")]])
def test_voxel_sizes_must_be_lengths(voxel_size):
    with pytest.raises(BundleError, match="voxel_size.*3 lengths in mm"):
        checks.check_sampling(1, 1, voxel_size, [8, 8, 8])


@pytest.mark.parametrize("value", [0, -1, float("nan"), "4", True])
def test_positive_numbers_are_checked(value):
    with pytest.raises(BundleError, match="learning_rate: .* above 0"):
        checks.check_positive(learning_rate=value)


@pytest.mark.parametrize("value, truth", [(True, True), ("true", True), ("False", False), (False, False)])
def test_switches_are_understood_as_the_command_line_gives_them(value, truth):
    assert checks.switch(resume=value) is truth


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_another_word_for_a_switch_is_refused(value):
    with pytest.raises(BundleError, match="resume: .* true or false"):
        checks.switch(resume=value)


@pytest.mark.parametrize("amx, avx512, expected", [(0, 0, None), (1, 0, torch.bfloat16), (0, 1, torch.bfloat16)])
def test_a_cpu_gets_bfloat16_where_its_hardware_has_it(monkeypatch, amx, avx512, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512))
    assert checks.amp_dtype("auto", torch.device("cpu")) is expected


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
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert checks.amp_dtype("auto", "cpu", sides, levels) is (torch.bfloat16 if safe else None)
    if safe:
        assert checks.amp_dtype("bfloat16", "cpu", sides, levels) is torch.bfloat16
    else:
        with pytest.raises(
            BundleError, match="amp: 'bfloat16' .* coarsest of the network's 4 levels .* auto or float32"
        ):
            checks.amp_dtype("bfloat16", "cpu", sides, levels)
    assert checks.amp_dtype("float32", "cpu", sides, levels) is None


def test_gradients_are_added_over_whole_groups_of_iterations():
    checks.check_accumulation(4, max_iterations=8, checkpoint_interval=4)
    with pytest.raises(BundleError, match="checkpoint_interval: 6 .* accumulation_steps = 4 .* such as 8"):
        checks.check_accumulation(4, max_iterations=8, checkpoint_interval=6)


def test_precision_goes_by_the_device():
    cpu = torch.device("cpu")
    assert checks.amp_dtype("float32", cpu) is None
    assert checks.amp_dtype("bfloat16", cpu) is torch.bfloat16
    with pytest.raises(BundleError, match="amp: 'float16' cannot be used on cpu"):
        checks.amp_dtype("float16", cpu)
    with pytest.raises(BundleError, match="amp: 'half' cannot be used"):
        checks.amp_dtype("half", cpu)


@pytest.mark.parametrize("capability, expected", [((7, 5), torch.float16), ((9, 0), torch.bfloat16)])
def test_older_gpus_get_float16(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert checks.amp_dtype("auto", torch.device("cuda:0")) is expected


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
