"""Running out of GPU memory, as PyTorch says it; there is no GPU in the tests."""

import pytest
import torch
from conftest import OUT_OF_MEMORY, OUT_OF_MEMORY_SHORT

from scripts.diffusion.sampler import DiffusionSampler
from scripts.running.errors import BundleError


class Small(torch.nn.Module):
    """A network whose memory suffices for passes of `most` volumes; it keeps the size of every pass."""

    def __init__(self, unet, most):
        super().__init__()
        self.unet, self.most, self.passes = unet, most, []

    def forward(self, x, timesteps):
        self.passes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return self.unet(x, timesteps)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Passes take whole batches, as on a GPU."""
    monkeypatch.setattr(DiffusionSampler, "volumes_at_once", lambda self, x: min(len(x), self.most or len(x)))


@pytest.mark.parametrize("most, passes", [(2, [5, 2, 2, 1, 2, 2, 1]), (1, [5, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1])])
def test_sampling_halves_its_batch_and_makes_the_same_volumes(unet, scheduler, as_on_a_gpu, caplog, most, passes):
    for parameter in unet.parameters():
        parameter.data *= 0.3  # as in test_sampler.py: or rounding would be enlarged
    noise = torch.randn(5, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    small = Small(unet, most)
    volumes = DiffusionSampler(small, scheduler, 2)(noise)
    torch.testing.assert_close(volumes, DiffusionSampler(unet, scheduler, 2)(noise), atol=1e-4, rtol=0)
    assert small.passes == passes  # only what failed is done again, and the limit is kept
    assert f"out of GPU memory with 5 volumes at a time ({OUT_OF_MEMORY_SHORT}): going on with 2" in caplog.messages


def test_a_volume_that_does_not_fit_is_refused_with_the_numbers(unet, scheduler, as_on_a_gpu):
    noise = torch.randn(2, 1, 8, 8, 8)
    with pytest.raises(BundleError) as error:
        DiffusionSampler(Small(unet, 0), scheduler, 2)(noise)
    said = str(error.value)
    assert OUT_OF_MEMORY_SHORT in said and "batch_size 1, spatial_shape [8, 8, 8], amp float32" in said
    assert "--batch_size" not in said and "--amp auto" in said
    with pytest.raises(BundleError, match=r"--batch_size 1, or --halve_batch_on_oom true") as error:
        DiffusionSampler(Small(unet, 1), scheduler, 2, halve_batch_on_oom=False)(noise)
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)
