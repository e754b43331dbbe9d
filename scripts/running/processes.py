"""Several processes that work on one run, as `torchrun` starts them: one a GPU, or a few on a CPU.

The overlays `configs/multi_gpu_*.json` initialize `join` where the configs have `check_alone`. Everything else here
also works in a run of one process, where nothing is shared out and nothing is waited for.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import ignite.distributed as idist
import torch
import torch.distributed as dist
from tqdm import tqdm

from scripts.running.checks import check_knobs
from scripts.running.errors import BundleError, root_bundle_error
from scripts.running.files import write_text

T = TypeVar("T")
logger = logging.getLogger(__name__)
LONGEST_WAIT = timedelta(hours=2)  # for rank 0: it checks thousands of files, or draws a report
GRACE = 5.0  # seconds that a process has to end by itself after another one has failed
LAUNCH = ".torchrun"  # file in the folder of the checkpoints
FAILED = "failed"  # key of the store


def local_device() -> torch.device:
    """cuda:LOCAL_RANK on a machine with GPUs, else the CPU.

    Raises:
        BundleError: `torchrun` did not start this process, or it started more of them than there are GPUs.
    """
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is None or "MASTER_ADDR" not in os.environ:
        raise BundleError(
            "config_file: the multi_gpu configs are for processes that torchrun starts (LOCAL_RANK and MASTER_ADDR are "
            "not set); start them with `torchrun --standalone --nproc_per_node=2 -m monai.bundle run ...`"
        )
    count = torch.cuda.device_count()
    if not count:
        return torch.device("cpu")
    if int(local_rank) >= count:
        raise BundleError(
            f"nproc_per_node: this is process {int(local_rank) + 1} of a machine that has {count} GPUs; expected at "
            "most as many processes as GPUs"
        )
    return torch.device("cuda", int(local_rank))


def check_alone(overlay: str | None = None) -> None:
    """Raises BundleError in one of several processes of torchrun: each would do all of the work, in the same folders.

    Args:
        overlay: the config that lets them share it; None where there is nothing to share.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if "LOCAL_RANK" in os.environ and count > 1:
        right = f"add {overlay!r} to config_file, or start one" if overlay else "start one"
        raise BundleError(f"nproc_per_node: {count} processes were started by torchrun: {right}")


def join(device: str | torch.device) -> None:
    """Make the process group (NCCL for GPUs, else gloo), let rank 0 alone talk, and let no process outlive a failure.

    Args:
        device: of this process.
    """
    check_knobs(device=device)
    device = torch.device(device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=connection(),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=LONGEST_WAIT,
        device_id=device if cuda else None,
    )
    # with SLURM's number of the job ignite takes SLURM's ranks, which are those of the launchers, for torchrun's
    job = os.environ.pop("SLURM_JOB_ID", None)
    idist.sync()
    if job is not None:
        os.environ["SLURM_JOB_ID"] = job
    if idist.get_rank() > 0:
        silence()
    guard()
    logger.info(f"{idist.get_world_size()} processes ({dist.get_backend()}), rank 0 on {device}")


def check_shared_evenly(**knobs: int) -> None:
    """Every knob is a multiple of the number of processes."""
    size = idist.get_world_size()
    for key, value in knobs.items():
        if value % size:
            raise BundleError(
                f"{key}: {value} was given, which {size} processes cannot share evenly; expected a multiple of {size} "
                f"such as {-(-value // size) * size}"
            )


def leave() -> None:
    """The end of a run that went well."""
    idist.barrier()
    idist.finalize()


def silence() -> None:
    """Let this process log errors only, and draw no bars: rank 0 says the same."""
    logging.getLogger().setLevel(logging.ERROR)
    for name, known in logging.root.manager.loggerDict.items():
        if name.split(".")[0] in ("monai", "ignite") and isinstance(known, logging.Logger):
            known.setLevel(max(logging.ERROR, known.level))
    draw = tqdm.__init__

    def hidden(self: tqdm, *args: Any, **kwargs: Any) -> None:
        draw(self, *args, **(kwargs | {"disable": True}))

    tqdm.__init__ = hidden


def connection() -> dist.Store:
    """A connection to the store through which the processes find each other, with nothing in it of earlier processes.

    torchrun keeps its own store when it starts the processes anew, and torch would find the addresses of dead ones in
    it (PyTorch issue 135712), so each start has its own keys.

    Raises:
        BundleError: several machines may start anew with one store; they do not agree on how often they did.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return dist.TCPStore(host, port, is_master=os.environ["RANK"] == "0", multi_tenant=True, timeout=LONGEST_WAIT)
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise BundleError(
            "max-restarts: torchrun cannot start processes on several machines anew with one store; set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, or --max-restarts=0"
        )
    store = dist.TCPStore(host, port, is_master=False, timeout=LONGEST_WAIT)
    return dist.PrefixStore(f"start_{restart_count()}", store)


def restart_count() -> int:
    """How often torchrun has started the processes of this machine anew (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def started_anew(folder: str) -> bool:
    """Whether the training that `note_launch` noted in a folder was started by the same launch of torchrun. Collective.

    A launch is known by its --rdzv-id, a random one with --standalone. Without any, a start after the first one counts.
    """
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if launch == "none":
        return max(gathered(restart_count())) > 0
    path = os.path.join(folder, LAUNCH)
    return gathered(os.path.exists(path) and Path(path).read_text() == launch)[0]


def note_launch(folder: str) -> None:
    """Let `started_anew` know that a training has begun, whose checkpoints go into this folder."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if launch != "none" and idist.get_rank() == 0:
        os.makedirs(folder, exist_ok=True)
        write_text(os.path.join(folder, LAUNCH), launch)


def guard() -> None:
    """Let an error of one process end all of them, with its message, within seconds; see `Guard`."""
    sys.excepthook = guardian = Guard(connection, idist.get_rank(), sys.excepthook)
    atexit.register(guardian.end)


class Guard:
    """`sys.excepthook` of one of several processes: the first that fails prints why; the others name it and end too.

    torchrun ends the others only after the first has ended, and can do so only gently for 30 seconds: a process that
    waits for another one in a collective operation hears no SIGTERM that Python handles. So each has a thread that
    looks every second whether another one has failed, and ends its process if that does not end by itself. Where the
    launcher was killed it sends its process the SIGTERM that the launcher cannot send any more.

    Args:
        connect: gives a new connection to the store of the processes.
        rank: of this process.
        previous: the hook that prints an error.
    """

    def __init__(self, connect: Callable[[], dist.Store], rank: int, previous: Callable) -> None:
        self.store, self.answers = connect(), connect()  # one a thread: a waiting call keeps others out
        self.rank, self.previous, self.launcher = rank, previous, os.getppid()
        self.ending = threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        plain = root_bundle_error(error)
        cause: BaseException = plain or error
        while plain is None and cause.__cause__ is not None:  # MONAI says "failed to instantiate" on the way
            cause = cause.__cause__
        text = str(cause)[:2000] if plain else f"{type(cause).__name__}: {cause}"[:2000]
        report = f"rank {self.rank} failed: {text}"
        try:
            first = self.answers.compare_set(FAILED, "", report).decode()
        except RuntimeError:  # the launcher is gone
            first = report
        if first == report:
            self.previous(kind, error, trace)
            if plain is None:  # below its traceback
                print(f"error: {report}", file=sys.stderr)
        elif first.split(": ", 1)[1] != text:
            print(f"error: rank {self.rank} ends, since {first}", file=sys.stderr)

    def watch(self) -> None:
        first = ""
        with contextlib.suppress(RuntimeError):  # of the store: who keeps it, the launcher or rank 0, has ended
            while os.getppid() == self.launcher and not self.store.check([FAILED]):
                if self.ending.wait(1):
                    return
            if os.getppid() == self.launcher:
                first = self.store.get(FAILED).decode()
        if self.ending.wait(GRACE if first else 1):
            return
        # no lock of the interpreter's own streams, which the main thread may hold
        if first:
            os.write(2, f"error: rank {self.rank} is ended, since {first}\n".encode())
            os._exit(1)
        if os.getppid() != self.launcher:
            os.write(2, f"rank {self.rank} ends, since torchrun was killed\n".encode())
            os.kill(os.getpid(), signal.SIGTERM)

    def end(self) -> None:
        """The process ends by itself. Python must not find the thread within the store: C++ would abort the process."""
        self.ending.set()
        self.watcher.join(GRACE)


def share(items: Sequence[T]) -> Sequence[T]:
    """The items of this process: every n-th of n processes, beginning with its rank."""
    return items[idist.get_rank() :: idist.get_world_size()]


def gathered(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks; any picklable object. Collective."""
    if idist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * idist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def in_turn(shares: Sequence[Sequence[T]]) -> list[T]:
    """The items that `share` gave to the processes, in their order again."""
    items: list[Any] = [None] * sum(map(len, shares))
    for rank, items_of_rank in enumerate(shares):
        items[rank :: len(shares)] = items_of_rank
    return items


def shared_out(work: Callable[[T], Any], items: Sequence[T]) -> list[Any]:
    """[work(item) for item in items], each done by one of the processes; all get all results. Collective."""
    return in_turn(gathered([work(item) for item in share(items)]))
