"""The children of the tests' warm process are the commands that a user starts."""

import subprocess

import pytest
from conftest import ROOT, bundle_command, quiet, run_bundle, warm_python

WRONG = {"its number": {"num_samples": "many"}, "its file": {"ckpt_path": "models/none.pt"}}


@pytest.mark.parametrize("overrides", WRONG.values(), ids=WRONG)
def test_a_command_says_what_it_says_when_started_alone(overrides):
    overrides |= {"config_file": "configs/inference.json"}
    alone = subprocess.run(bundle_command("run", **overrides), cwd=ROOT, env=quiet(), text=True, capture_output=True)
    warm = run_bundle("run", **overrides)
    assert alone.returncode == warm.returncode == 1
    assert alone.stderr.splitlines()[-1] == warm.stderr.splitlines()[-1]


def test_a_command_sees_its_folder_and_environment_and_may_end_by_a_signal(tmp_path):
    (tmp_path / "probe.json").write_text(
        '{"imports": ["$import os", "$import sys", "$import signal"], "run": ["$print(os.getcwd(), os.environ[\'A\'],'
        " sys.path[0], '/more' in sys.path, sys.stdin.isatty(), 'scripts' in sys.modules, flush=True)\","
        ' "$os.kill(os.getpid(), signal.SIGKILL)"]}'
    )
    env = quiet() | {"A": "b", "PYTHONPATH": "/more"}
    done = warm_python().run(["run", "run", "--config_file", "probe.json"], tmp_path, env)
    assert done.returncode == -9
    assert done.stdout.splitlines()[-1] == f"{tmp_path} b {tmp_path} True False False"
