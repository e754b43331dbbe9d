"""What the benchmarks share: settings, a process for each rival, turns between them, profiles and tables.

Each variant runs in a process of its own, since `keep_freed_memory` and `set_determinism` change a whole process. The
processes stay alive and take turns, so that other work on the machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from monai.bundle import ConfigParser  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from scripts.diffusion.networks import unet_of  # noqa: E402
from scripts.diffusion.wavelets import grown  # noqa: E402
from scripts.running.files import write_atomically  # noqa: E402

PLAIN, AMP, AUTHORS, WDM, OURS = "MONAI float32", "MONAI amp", "med-ddpm", "wdm-3d", "ours"

# Operations by the kind of kernel that they spend their time in; the first pattern that is found counts.
KERNELS = {
    "optimizer, EMA": r"_foreach|fused_adam|lerp",
    "convolution": r"convolution|conv3d|conv2d|mkldnn_reorder",
    "normalisation": r"group_norm",
    "activation": r"silu",
    "attention": r"attention|softmax|bmm",
    "linear": r"addmm|linear|::mm$|matmul",
    "resampling": r"upsample|interpolate",
    "compiled, fused": r"graph_\d+_|triton|cpp_fused",
    "copies, memory": r"copy_|clone|::cat$|contiguous|::to$|_to_copy|empty|fill_|zero_|zeros|stack|[Mm]emcpy|[Mm]emset",
    "elementwise": r"::(add|sub|mul|div|rsub|neg|abs|sgn|sqrt|pow|clamp|sum|mean|randn|normal|exp|cos|sin)",
}


def options(description: str, side: int, batch: int) -> argparse.ArgumentParser:
    """The knobs that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--side", type=int, default=side, help="voxels along each side")
    parser.add_argument("--batch", type=int, default=batch, help="volumes in a batch")
    parser.add_argument("--channels", type=int, nargs="+", help="of the network; default: that of the config")
    parser.add_argument("--attention_levels", type=int, nargs="+", help="0 or 1 for each level")
    parser.add_argument("--num_head_channels", type=int, nargs="+", help="for each level")
    parser.add_argument("--preset", nargs="+", default=[], help="overlays, such as configs/presets/paper_128.json")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="knobs of the config for ours")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant; the median counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--output", help="JSON file that receives the result")
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # this process is the worker of one variant
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # where the worker finds its data
    return parser


def parse_setting(setting: str) -> tuple[str, Any]:
    """KEY=VALUE with the value as Python or JSON has it, or a plain word."""
    key, _, word = setting.partition("=")
    if word in ("true", "false", "null"):
        return key, {"true": True, "false": False, "null": None}[word]
    try:
        return key, ast.literal_eval(word)
    except (SyntaxError, ValueError):
        return key, word


def read_config(name: str, arguments: argparse.Namespace, settings: Sequence[str] = ()) -> ConfigParser:
    """configs/`name` with the presets, the sizes of the command line and `settings` (KEY=VALUE).

    `keep_freed_memory=false` is no key of the config: it drops that entry of `initialize`.
    """
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / name), *arguments.preset])
    parser["bundle_root"] = str(ROOT)
    parser["device"] = f"$torch.device('{arguments.device}')"
    parser["spatial_shape"] = [arguments.side] * 3
    parser["wavelet_levels"] = 0  # what MONAI and the others have; `--also wavelet_levels=1` for ours
    parser["batch_size"] = arguments.batch
    for key in ("channels", "num_head_channels", "attention_levels"):
        if getattr(arguments, key):
            values = getattr(arguments, key)
            parser[key] = [bool(value) for value in values] if key == "attention_levels" else values
    for key, value in map(parse_setting, settings):
        if key == "keep_freed_memory":
            if not value:
                drop(parser, "keep_freed_memory")
        else:
            parser[key] = value
    return parser


def drop(parser: ConfigParser, name: str) -> None:
    """Take an entry whose target is called `name` out of `initialize`."""
    parts = parser["initialize"]
    parser["initialize"] = [p for p in parts if not (isinstance(p, dict) and p["_target_"].split(".")[-1] == name)]


def fill_zeros(network: nn.Module) -> nn.Module:
    """Give the layers that begin as zero what torch gives to every other layer; the output would be zero without."""
    torch.manual_seed(1)
    for parameter in network.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.kaiming_uniform_(parameter, a=5**0.5)
    return network


def load_common(network: nn.Module, folder: str | Path) -> None:
    """The weights that all variants share; a network in wavelets, which has more channels, is grown from them."""
    weights = torch.load(Path(folder) / "weights.pt")
    network.load_state_dict(grown(weights, unet_of(network).in_channels))


def another_network(variant: str) -> bool:
    """Whether the output of a variant is another one than that of plain MONAI with the same weights."""
    return variant in (AUTHORS, WDM) or "wavelet_levels" in variant


def wdm(path: str, parser: ConfigParser) -> nn.Module:
    """The U-Net of github.com/pfriedri/wdm-3d, as its run.sh has it but for the channels and blocks, which are ours.

    (B, 8, *spatial / 2), times (B,) -> (B, 8, *spatial / 2)
    """
    sys.path.insert(0, path)
    from guided_diffusion.unet import UNetModel

    channels = parser.get_parsed_content("channels")
    torch.manual_seed(0)
    network = UNetModel(
        image_size=parser["spatial_shape"][0],
        in_channels=8,
        model_channels=channels[0],
        out_channels=8,
        num_res_blocks=parser.get_parsed_content("num_res_blocks"),
        attention_resolutions=(),
        channel_mult=tuple(width // channels[0] for width in channels),
        dims=3,
        num_groups=32,
        resblock_updown=True,
        bottleneck_attention=False,
        additive_skips=True,
        resample_2d=False,
    )
    return fill_zeros(network)


def med_ddpm(path: str, parser: ConfigParser, side: int, timesteps: int) -> nn.Module:
    """The network of github.com/mobaidoctor/med-ddpm with the channels and attention of ours, and its loss and loop.

    Its trainer imports torchvision without using it; where there is none, an empty module stands in.
    """
    sys.path.insert(0, path)
    try:
        import torchvision  # noqa: F401
    except ImportError:
        stub = ModuleType("torchvision")
        stub.transforms, stub.utils = ModuleType("transforms"), ModuleType("utils")
        sys.modules["torchvision"] = stub
    from diffusion_model.trainer import GaussianDiffusion
    from diffusion_model.unet import UNetModel

    known = {key: parser.get_parsed_content(key) for key in ("channels", "attention_levels", "num_head_channels")}
    channels, last = known["channels"], known["num_head_channels"][-1]
    unet = UNetModel(
        image_size=side,
        in_channels=1,
        model_channels=channels[0],
        out_channels=1,
        num_res_blocks=parser.get_parsed_content("num_res_blocks"),
        attention_resolutions=tuple(2**level for level, on in enumerate(known["attention_levels"]) if on),
        channel_mult=tuple(width / channels[0] for width in channels),
        num_heads=channels[-1] // last,
    )
    torch.manual_seed(0)
    return GaussianDiffusion(fill_zeros(unet), image_size=side, depth_size=side, timesteps=timesteps, loss_type="l1")


def hardware(device: str) -> str:
    """Name of the processor, and of the GPU where one is used."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line for line in lines if line.startswith("flags"))
        known = [flag for flag in ("avx512_bf16", "amx_tile") if flag in flags]
    except (OSError, StopIteration):
        name, known = platform.processor(), []
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    gpu = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}; " if device.startswith("cuda") else ""
    return f"{gpu}{name} ({', '.join(known) or 'no bfloat16'}), {cores}, torch {torch.__version__}"


def synchronize(device: str) -> None:
    """Wait until the device has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak_memory(device: str) -> int:
    """Most bytes that this process held: of tensors on a GPU, of everything on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def file_name(variant: str) -> str:
    """The name of a variant as a part of a path."""
    return re.sub(r"[^a-z0-9]+", "_", variant.lower())


def operations(network: nn.Module, side: int, batch: int, backward: bool) -> dict[str, float]:
    """Floating-point operations of convolutions and of all matrix products, counted without doing them."""
    network = copy.deepcopy(network).to("meta")
    x, timesteps = torch.empty(batch, 1, side, side, side, device="meta"), torch.zeros(batch, device="meta")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        output = network(x, timesteps)
        if backward:
            output.sum().backward()
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    return {
        "convolution": sum(count for name, count in counts.items() if "convolution" in name),
        "all": counter.get_total_flops(),
    }


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product by torch, the best of several: a yardstick, not a bound, since a
    convolution may use the processor better than the library's product does."""
    side, best = (8192 if device.startswith("cuda") else 2048), float("inf")
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def limit_table(
    network: nn.Module, arguments: argparse.Namespace, backward: bool, profiles: dict[str, dict[str, float]]
) -> tuple[str, dict]:
    """How near the convolutions of each profiled variant come to the rate of a matrix product, float32 and bfloat16."""
    counted = operations(network, arguments.side, arguments.batch, backward)
    rates = {str(d).split(".")[1]: product_rate(arguments.device, d) for d in (torch.float32, torch.bfloat16)}
    rows = []
    for variant, seconds in profiles.items():
        rate = counted["convolution"] / seconds["convolution"] if seconds.get("convolution") else 0.0
        cells = [f"{rate / 1e12:.3g}", *(f"{rate / r:.0%} of {r / 1e12:.3g}" for r in rates.values())]
        rows.append([variant, f"{counted['convolution'] / 1e12:.3g}", *cells])
    header = ["convolutions", "10^12 operations", "10^12 a second", *(f"of a {name} product" for name in rates)]
    return table(header, rows), {"operations": counted, "product_rates": rates}


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted|"""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


class Turns:
    """The worker's side: between `begin` and `end` its parent measures; elsewhere it waits.

    Commands and answers are lines of JSON on standard input and output; what else the program prints goes to standard
    error.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.profiler: torch.profiler.profile | None = None
        self.ready = False

    def answer(self, **content: Any) -> None:
        print(json.dumps(content), file=self.answers, flush=True)

    def begin(self) -> dict:
        """Wait for a command {"job", "times", "profile"}, start the clock, return the command."""
        if not self.ready:
            self.answer(ready=True)
            self.ready = True
        line = sys.stdin.readline()
        if not line:
            sys.exit()
        command = json.loads(line)
        if command.get("profile"):
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if self.device.startswith("cuda"):
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(activities=kinds)
            self.profiler.start()
        synchronize(self.device)
        self.start = time.perf_counter()
        return command

    def end(self, times: int) -> None:
        """Stop the clock and answer with the seconds of each of `times` equal pieces of work."""
        synchronize(self.device)
        seconds = (time.perf_counter() - self.start) / times
        content = {"seconds": seconds, "memory": peak_memory(self.device)}
        if self.profiler is not None:
            self.profiler.stop()
            content["profile"] = by_kernel(self.profiler, self.device, times)
            self.profiler = None
        self.answer(**content)

    def serve(self, jobs: dict[str, Callable[[], Any]]) -> None:
        """Do what the parent asks for until it goes away."""
        while True:
            command = self.begin()
            for _ in range(command["times"]):
                jobs[command["job"]]()
            self.end(command["times"])


def by_kernel(profiler: torch.profiler.profile, device: str, times: int) -> dict[str, float]:
    """Seconds of each kind of kernel (KERNELS); on a GPU, of the kernels that an operation launched."""
    attribute = "self_device_time_total" if device.startswith("cuda") else "self_cpu_time_total"
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        ancestor, kind = event, None
        while ancestor is not None and kind is None:
            kind = "optimizer, EMA" if ancestor.name.startswith("Optimizer.step") else None
            ancestor = ancestor.cpu_parent
        if kind is None:
            kind = next((kind for kind, pattern in KERNELS.items() if re.search(pattern, event.name)), "other")
        seconds[kind] += getattr(event, attribute) / 1e6 / times
    return dict(seconds)


class Worker:
    """The parent's side of one variant: a process that runs the same script with `--variant`."""

    def __init__(self, variant: str, folder: str) -> None:
        self.variant = variant
        self.log_path = Path(folder) / f"{file_name(variant)}.log"
        self.log = open(self.log_path, "w")
        command = [sys.executable, "-W", "ignore", *sys.argv, "--variant", variant, "--folder", folder]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.first = self.read()  # what the worker says of itself
        self.read()  # it is warm: the next variant may start

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            sys.exit(f"the variant {self.variant!r} failed:\n{self.log_path.read_text()[-3000:]}")
        return json.loads(line)

    def turn(self, job: str, times: int, profile: bool = False) -> dict:
        """Let the worker do a job some times; {"seconds" for one of them, "memory" in bytes, ...}."""
        print(json.dumps({"job": job, "times": times, "profile": profile}), file=self.process.stdin, flush=True)
        return self.read()

    def stop(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()


def take_turns(workers: Sequence[Worker], rounds: int, job: str, times: int | dict[str, int]) -> dict[str, list[float]]:
    """Seconds of one piece of work, for each variant a list over the rounds; every round begins with another one."""
    seconds: dict[str, list[float]] = {worker.variant: [] for worker in workers}
    for i in range(rounds):
        k = i % len(workers)
        for worker in [*workers[k:], *workers[:k]]:
            n = times if isinstance(times, int) else times[worker.variant]
            seconds[worker.variant].append(worker.turn(job, n)["seconds"])
        print(f"round {i + 1} of {rounds}: " + ", ".join(f"{v} {s[-1]:.3g} s" for v, s in seconds.items()), flush=True)
    return seconds


def spread(values: Sequence[float]) -> str:
    """Median with the extremes."""
    middle, low, high = (
        f"{v:.3g}" if v < 1000 else f"{v:.0f}" for v in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({low} to {high})"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def profile_table(profiles: dict[str, dict[str, float]]) -> str:
    """Seconds and share of each kind of kernel, a column for each variant."""
    totals = {variant: sum(seconds.values()) for variant, seconds in profiles.items()}
    first = next(iter(profiles))
    kinds = sorted({k for seconds in profiles.values() for k in seconds}, key=lambda k: -profiles[first].get(k, 0))
    rows = [
        [kind, *(f"{s.get(kind, 0):.3f} s, {100 * s.get(kind, 0) / totals[v]:.0f}%" for v, s in profiles.items())]
        for kind in kinds
    ]
    return table(["kernels", *profiles], [*rows, ["sum", *(f"{totals[v]:.3f} s" for v in profiles)]])


def write(path: str | None, result: dict) -> None:
    """The result as JSON, with the command that made it."""
    if path:
        program = Path(sys.argv[0]).resolve()
        result = {"command": shlex.join(["python", str(program.relative_to(ROOT)), *sys.argv[1:]]), **result}
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        write_atomically(path, lambda temporary: Path(temporary).write_text(json.dumps(result, indent=2) + "\n"))
