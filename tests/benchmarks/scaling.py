"""How time and memory of a training step grow with side and batch, with and without activation checkpointing.

    python tests/benchmarks/scaling.py --output scaling.json --picture scaling.png
    python tests/benchmarks/scaling.py --device cuda --sides 32 64 96 128 160 192 --batches 1 2 4 8

The network, its type, layout and optimiser are those of configs/train.json. Memory is the peak of all tensors on a GPU
(`torch.cuda.max_memory_allocated`); on a CPU it is counted: weights, gradients and Adam's two moments, and every
storage that the forward pass keeps for the backward pass. The count leaves out what an operation needs for a moment,
and what checkpointing computes again. Each point is the median of several steps after one to warm up; on a CPU the two
kinds take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable

import torch
from common import hardware, options, read_config, synchronize, table, write
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from scripts.running.files import write_atomically

CHECKPOINTING = ("none", "all")


class Step:
    """One training step of the bundle's network on random volumes, (B, 1, side, side, side)."""

    def __init__(self, arguments: argparse.Namespace, side: int, batch: int, checkpointing: str) -> None:
        values = vars(arguments) | {"side": side, "batch": batch}
        settings = [*arguments.set, f"activation_checkpointing={checkpointing}"]
        config = read_config("train.json", argparse.Namespace(**values), settings)
        self.device = arguments.device
        config.get_parsed_content("initialize")
        self.network = config.get_parsed_content("network")
        self.optimizer = config.get_parsed_content("optimizer")
        self.inferer = config.get_parsed_content("train#inferer")
        self.volumes = torch.randn(batch, 1, side, side, side, device=self.device)
        self.timesteps = torch.randint(0, config["num_train_timesteps"], (batch,), device=self.device)

    def loss(self) -> torch.Tensor:
        noise = torch.randn_like(self.volumes)
        prediction = self.inferer(self.volumes, self.network, noise=noise, timesteps=self.timesteps)
        return (prediction - noise).abs().mean()

    def seconds(self) -> float:
        """Do one step and time it."""
        synchronize(self.device)
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()
        synchronize(self.device)
        return time.perf_counter() - start

    def memory(self) -> int:
        """Bytes: see the head of this file."""
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)
            self.seconds()
            return torch.cuda.max_memory_allocated(self.device)
        weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in self.network.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.loss()
        del loss
        return 4 * sum(weights.values()) + sum(kept.values())


def measure(arguments: argparse.Namespace, side: int, batch: int) -> list[dict]:
    """A row for each kind of checkpointing: {"side", "batch", "activation_checkpointing", "seconds", "bytes"}; null
    where the device has too little memory."""
    rows, steps = [], {}
    for checkpointing in CHECKPOINTING:
        row = {"side": side, "batch": batch, "activation_checkpointing": checkpointing, "seconds": [], "bytes": None}
        rows.append(row)
        step = None
        try:
            if arguments.device.startswith("cuda"):  # one at a time, or the peak would be that of both
                step = Step(arguments, side, batch, checkpointing)
                step.seconds()
                row["seconds"] = [step.seconds() for _ in range(arguments.rounds)]
                row["bytes"] = step.memory()
            else:
                steps[checkpointing] = Step(arguments, side, batch, checkpointing)
                steps[checkpointing].seconds()
                row["bytes"] = steps[checkpointing].memory()
        except (torch.OutOfMemoryError, RuntimeError) as e:
            if not isinstance(e, torch.OutOfMemoryError) and "memory" not in str(e):
                raise
            print(f"side {side}, batch {batch}, checkpointing {checkpointing}: out of memory")
            steps.pop(checkpointing, None)
        del step
        if arguments.device.startswith("cuda"):
            torch.cuda.empty_cache()
    for _ in range(arguments.rounds):
        for row in rows:
            if row["activation_checkpointing"] in steps:
                row["seconds"].append(steps[row["activation_checkpointing"]].seconds())
    for row in rows:
        row["median"] = statistics.median(row["seconds"]) if row["seconds"] else None
    return rows


def draw(rows: list[dict], path: str, arguments: argparse.Namespace, title: str) -> None:
    """Seconds and GiB against side at --batch, and against batch at --side, double logarithmic."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    sweeps = (("side", "batch", arguments.batch), ("batch", "side", arguments.side))
    for column, (knob, other, value) in enumerate(sweeps):
        for kind, colour in zip(CHECKPOINTING, ("tab:blue", "tab:orange")):
            points = [
                (row[knob], row["median"], row["bytes"] / 2**30)
                for row in rows
                if row[other] == value and row["activation_checkpointing"] == kind and row["median"] and row["bytes"]
            ]
            if not points:
                continue
            x, seconds, memory = zip(*points)
            axes[0, column].loglog(x, seconds, "o-", color=colour, label=f"checkpointing: {kind}")
            axes[1, column].loglog(x, memory, "o-", color=colour, label=f"checkpointing: {kind}")
            for axis in axes[:, column]:
                axis.set_xticks(x, [str(i) for i in x])
                axis.set_xticks([], minor=True)
        for axis, label in zip(axes[:, column], ("seconds a step", "memory, GiB")):
            axis.set_xlabel("voxels a side" if knob == "side" else "batch")
            axis.set_ylabel(label)
            axis.grid(True, which="both", alpha=0.3)
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        axes[0, column].set_title(f"{other} {value}" if other == "batch" else f"{value}$^3$ voxels")
    axes[0, 0].legend()
    figure.suptitle(title, fontsize="small")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def points(arguments: argparse.Namespace) -> Iterable[tuple[int, int]]:
    """(side, batch): all sides at --batch, all batches at --side."""
    return sorted({(s, arguments.batch) for s in arguments.sides} | {(arguments.side, b) for b in arguments.batches})


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = options(__doc__.splitlines()[0], side=64 if cuda else 32, batch=1)
    parser.set_defaults(rounds=3)
    sides = (32, 64, 96, 128, 160, 192) if cuda else (16, 32, 48, 64)
    parser.add_argument("--sides", type=int, nargs="+", default=sides, help="measured with --batch")
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 2, 4, 8), help="measured with --side")
    parser.add_argument("--picture", help="PNG file that receives the curves")
    arguments = parser.parse_args()
    result = {"hardware": hardware(arguments.device), "arguments": vars(arguments), "points": []}
    print(result["hardware"], flush=True)
    for side, batch in points(arguments):
        result["points"] += measure(arguments, side, batch)
        shown = ("side", "batch", "activation_checkpointing", "median", "bytes")
        for row in result["points"][-len(CHECKPOINTING) :]:
            print(", ".join(f"{key} {row[key]}" for key in shown), flush=True)

    lines = []
    for plain, saving in zip(*[iter(result["points"])] * 2):
        cells = [
            (f"{row['median']:.3g}" if row["median"] else "-", f"{row['bytes'] / 2**30:.2f}" if row["bytes"] else "-")
            for row in (plain, saving)
        ]
        slower = f"{saving['median'] / plain['median']:.2f}" if plain["median"] and saving["median"] else "-"
        lines.append([plain["side"], plain["batch"], cells[0][0], cells[1][0], slower, cells[0][1], cells[1][1]])
    header = ["side", "batch", "seconds a step", "with checkpointing", "times slower", "GiB", "GiB, checkpointing"]
    print("\n" + table(header, lines))
    if arguments.picture:
        draw(result["points"], arguments.picture, arguments, result["hardware"])
    write(arguments.output, result)


if __name__ == "__main__":
    main()
