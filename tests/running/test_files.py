"""Files are whole or absent, and only what the file system does is told as that."""

import numpy as np
import pytest
import torch

from scripts.running.errors import BundleError
from scripts.running.files import save_tensors, write_atomically


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def full_disk(temporary):
    with open(temporary, "w") as file:
        file.write("half")
    raise OSError(28, "No space left on device")


def a_device_that_is_always_full(temporary):
    save_tensors({"weight": torch.zeros(100_000)}, "/dev/full")


def torch_on_a_full_disk(temporary):
    torch.save({"weight": torch.zeros(100_000)}, "/dev/full")


@pytest.mark.parametrize("write", [full_disk, a_device_that_is_always_full, torch_on_a_full_disk])
def test_a_failed_write_leaves_the_old_file(tmp_path, write):
    path = tmp_path / "model.pt"
    path.write_text("old")
    words = "inline_container" if write is torch_on_a_full_disk else "No space left on device"
    with pytest.raises(BundleError, match=f"model.pt' could not be written .*{words}.*; earlier files are untouched"):
        write_atomically(str(path), write)
    assert names(tmp_path) == ["model.pt"] and path.read_text() == "old"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("PyTorch and ONNX outputs differ"),
        AssertionError("Tensor-likes are not close!"),
        ConnectionResetError(104, "Connection reset by peer"),
        torch.OutOfMemoryError("CUDA out of memory."),
        np.linalg.LinAlgError("Singular matrix"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_no_fault_of_the_file_system_comes_out_as_it_is(tmp_path, error):
    def write(temporary):
        open(temporary, "w").close()
        raise error

    with pytest.raises(type(error)) as caught:
        write_atomically(str(tmp_path / "model.onnx"), write)
    assert caught.value is error and names(tmp_path) == []
