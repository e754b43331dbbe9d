"""Tiny inputs that the tests make for themselves, and a way to run the real commands."""

from __future__ import annotations

import ast
import csv
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, create_workflow
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDPMScheduler
from warm import WarmPython

from scripts.evaluation.cohorts import Cohort
from scripts.scans.phantoms import phantom_cohort

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)  # the tests run in several processes, a core each
OUT_OF_MEMORY = (  # as PyTorch says it
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.06 GiB is free."
    " Including non-PyTorch memory, this process has 78.08 GiB memory in use."
)
OUT_OF_MEMORY_SHORT = "asked 2.50 GiB, free 1.06 GiB of 79.15 GiB"
TINY_NETWORK = {
    "spatial_shape": "[16,16,16]",
    "wavelet_levels": "0",
    "channels": "[8,8]",
    "attention_levels": "[False,True]",
    "num_head_channels": "[0,8]",
    "norm_num_groups": "8",
    "num_train_timesteps": "10",
}
TINY_TRAINING = TINY_NETWORK | {
    "timestep_sampling": "'uniform'",
    "max_iterations": "6",
    "batch_size": "2",
    "val_interval": "3",
    "preview_interval": "6",
    "preview_samples": "1",
    "preview_steps": "2",
    "checkpoint_interval": "2",
    "num_workers": "0",
    "learning_rate": "0.001",
    "brain_extraction": "False",  # phantoms are heads, and their brains are none that deepbet knows
}


LONG = ("workflows", "faults", "test_processes", "test_classes", "test_images_2d", "test_surge", "test_wavelets")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes long, half of it in each half of the list: each of two processes begins with one."""
    modules = {}
    for item in items:
        modules.setdefault(item.path, []).append(item)
    long = [tests for path, tests in modules.items() if any(part in path.as_posix() for part in LONG)]
    short = [tests for tests in modules.values() if tests not in long]
    halves = [sum(long[i::2] + short[i::2], []) for i in (0, 1)]
    items[:] = [*halves[0], *halves[1]]


def words(*verb: str, **overrides: object) -> list[str]:
    """VERB --key value ... as a list."""
    return [*verb, *(word for key, value in overrides.items() for word in (f"--{key}", str(value)))]


def bundle_command(*verb: str, **overrides: object) -> list[str]:
    """`python -m monai.bundle VERB --key value ...` as a list."""
    return [sys.executable, "-W", "ignore", "-m", "monai.bundle", *words(*verb, **overrides)]


def quiet() -> dict[str, str]:
    """An environment of one thread and no GPU."""
    return dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


@cache
def warm_python() -> WarmPython:
    return WarmPython(quiet())


def run_bundle(*verb: str, cwd: Path = ROOT, **overrides: object) -> subprocess.CompletedProcess:
    """Run a command of the bundle to its end; stdout and stderr come as text."""
    return warm_python().run(words(*verb, **overrides), cwd, quiet())


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


class Served(NamedTuple):
    """A page that is open, `log()` is what its program has said so far."""

    port: int
    log: Callable[[], str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serving(command: list[str], port: int, cwd: Path = ROOT) -> Iterator[Served]:
    """A command that serves a page, once the page is there; it ends with the block."""
    with NamedTemporaryFile("w+") as file:
        process = subprocess.Popen(command, cwd=cwd, env=quiet(), stdout=file, stderr=file)
        try:
            while True:
                with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}") as answer:
                    assert answer.status == 200
                    break
                assert process.poll() is None, Path(file.name).read_text()
                time.sleep(0.2)
            yield Served(port, lambda: Path(file.name).read_text())
        finally:
            process.terminate()
            process.wait()


def train(dataset_dir: Path | str, output: Path, **overrides: object) -> subprocess.CompletedProcess:
    """A tiny training run with everything it writes below `output`."""
    places = {"dataset_dir": dataset_dir, "output_dir": output, "ckpt_dir": output / "models"}
    knobs = {"config_file": "configs/train.json"} | TINY_TRAINING | places | overrides
    return run_bundle("run", "training", **knobs)


def sample(ckpt_path: Path, output: Path, **overrides: object) -> subprocess.CompletedProcess:
    """A tiny sampling run from weights of `train`."""
    places = {"config_file": "configs/inference.json", "ckpt_path": ckpt_path, "output_dir": output, "num_samples": 2}
    return run_bundle("run", **TINY_NETWORK | places | overrides)


def run_two(*verb, launcher=("--standalone",), overlays=(), env=None, **overrides):
    """A command of the bundle in two processes; stdout and stderr come as text."""
    overrides["config_file"] = [overrides["config_file"], *overlays]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *launcher, "--nproc_per_node=2"]  # wherever PATH leads
    command = [*torchrun, "-m", "monai.bundle", *words(*verb, **overrides)]
    env = quiet() | {"PYTHONWARNINGS": "ignore"} | (env or {})
    return subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=600)


def train_two(dataset_dir, output, overlays=(), **options):
    places = {"dataset_dir": dataset_dir, "output_dir": output, "ckpt_dir": output / "models"}
    knobs = {"config_file": "configs/train.json"} | TINY_TRAINING | places | options
    return run_two("run", "training", overlays=("configs/multi_gpu_train.json", *overlays), **knobs)


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def preprocessing(side=16):
    """Of configs/train.json."""
    parser = ConfigParser()
    parser.read_config(ROOT / "configs" / "train.json")
    parser["spatial_shape"] = [side] * 3
    return parser.get_parsed_content("train#preprocessing")


def workflow(kind: str, output: Path, **knobs: object) -> ConfigWorkflow:
    """configs/train.json or inference.json, initialized in this process and not yet run, at tiny size.

    The trainer that it builds is `workflow.parser.get_parsed_content("train#trainer")`.
    """
    tiny = {"train": TINY_TRAINING, "inference": TINY_NETWORK}[kind]
    places = {"bundle_root": str(ROOT), "output_dir": str(output), "device": "cpu", "logging_file": False}
    if kind == "train":
        places["ckpt_dir"] = str(output / "models")
    values = {key: ast.literal_eval(value) for key, value in tiny.items()} | places | knobs
    with mock.patch.object(sys, "excepthook", sys.excepthook):
        return create_workflow(config_file=str(ROOT / f"configs/{kind}.json"), workflow_type=kind, **values)


def cohort_of(name: str, volumes: np.ndarray, label_maps: list[str] | None = None, voxel_size: float = 1.0) -> Cohort:
    """Volumes (N, *spatial) as a cohort of files that need not exist."""
    files = [f"/data/{name}_{i:02d}.nii.gz" for i in range(len(volumes))]
    sizes = np.full((len(volumes), volumes.ndim - 1), voxel_size, np.float32)
    return Cohort(name, files, volumes.astype(np.float16), sizes, label_maps)


@pytest.fixture(scope="session")
def cohort(tmp_path_factory) -> Path:
    """Six phantoms of 20^3 voxels of 8 mm."""
    return Path(phantom_cohort(str(tmp_path_factory.mktemp("cohort")), 6, (20, 20, 20), 8.0, seed=1))


@pytest.fixture(scope="session")
def trained(cohort, tmp_path_factory) -> Path:
    """Output folder of one tiny training run."""
    output = tmp_path_factory.mktemp("trained")
    done = train(cohort, output)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture
def scheduler() -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=250, schedule="cosine")


def small_unet(**options: bool) -> DiffusionModelUNet:
    """A small network whose weights are random, its last layer too (MONAI's begins as zero)."""
    torch.manual_seed(0)
    network = DiffusionModelUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        channels=[8, 8],
        attention_levels=[False, True],
        num_head_channels=[0, 8],
        num_res_blocks=1,
        norm_num_groups=8,
        **options,
    )
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.1)
    return network.eval()


@pytest.fixture
def unet() -> DiffusionModelUNet:
    return small_unet()


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium; its downloads land in tmp_path/downloads."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs Chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()
