"""Speed and memory knobs change neither values nor state dicts, and give way where the machine cannot."""

import copy
import ctypes
import logging
import sys

import pytest
import torch
from conftest import small_unet
from torch import nn

from scripts.diffusion.acceleration import checkpointed, compiled, keep_freed_memory, prepared
from scripts.diffusion.sampler import DiffusionSampler
from scripts.running.errors import BundleError

CPU = torch.device("cpu")
INPUT = torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 9])


def gradients(network):
    network.zero_grad()
    network(*INPUT).square().mean().backward()
    return [p.grad.clone() for p in network.parameters()]


def saved_bytes(network):
    """Bytes that autograd keeps for the backward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(*INPUT)
    return sum(kept.values())


@pytest.mark.parametrize("levels", ["all", [0], [1]])
def test_checkpointing_keeps_values_gradients_and_names_and_saves_memory(unet, levels):
    other = checkpointed(copy.deepcopy(unet), levels)
    assert list(other.state_dict()) == list(unet.state_dict())
    assert torch.equal(other(*INPUT), unet(*INPUT))
    for found, right in zip(gradients(other), gradients(unet), strict=True):
        torch.testing.assert_close(found, right)
    assert saved_bytes(other) < 0.9 * saved_bytes(unet)


def test_a_checkpointed_network_can_be_copied(unet):
    other = copy.deepcopy(checkpointed(copy.deepcopy(unet), "all"))
    for p in other.parameters():
        p.data.zero_()
    assert other(*INPUT).abs().max() == 0 and unet(*INPUT).abs().max() > 0


@pytest.mark.parametrize("levels", ["some", [2], [-1], 1, ["0"]])
def test_unknown_levels_are_refused(unet, levels):
    with pytest.raises(BundleError, match="activation_checkpointing: .* levels from 0 to 1"):
        checkpointed(unet, levels)


def test_channels_last_weights_give_the_same_values(unet):
    expected, names = unet(*INPUT), list(unet.state_dict())
    assert prepared(unet, CPU, channels_last="true") is unet
    convolutions = [
        m for m in unet.modules() if isinstance(m, nn.Conv3d) and m.in_channels > 1 and m.kernel_size[0] > 1
    ]
    assert convolutions
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last_3d) for m in convolutions)
    torch.testing.assert_close(unet(*INPUT), expected, atol=1e-5, rtol=1e-4)
    assert list(unet.state_dict()) == names


def test_the_network_inside_a_sampler_is_prepared(unet, scheduler):
    sampler = DiffusionSampler(unet, scheduler, 3)
    assert prepared(sampler, CPU, channels_last=True) is sampler
    assert unet.conv_in.conv.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert unet.down_blocks[0].resnets[0].conv1.conv.weight.stride()[1] == 1


@pytest.mark.parametrize("knob", [{"compile": "fast"}, {"channels_last": "yes"}, {"activation_checkpointing": "most"}])
def test_unknown_words_are_refused(unet, knob):
    with pytest.raises(BundleError, match=next(iter(knob))):
        prepared(unet, CPU, **knob)


def test_a_compiler_that_fails_is_done_without(unet, monkeypatch, caplog):
    def no_compiler(self, *args, **kwargs):
        self._compiled_call_impl = lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no C++ compiler was found"))

    expected = unet(*INPUT)
    monkeypatch.setattr(nn.Module, "compile", no_compiler)
    compiled(unet, "default")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(unet(*INPUT), expected)
        assert torch.equal(unet(*INPUT), expected)
    assert caplog.text.count("no C++ compiler was found") == 1


def test_a_compiled_network_is_the_same_network(monkeypatch):
    unet = small_unet()
    expected, names = unet(*INPUT), list(unet.state_dict())
    seen = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: seen.append(options) or model)
    prepared(unet, CPU, compile="reduce-overhead")
    torch.testing.assert_close(unet(*INPUT), expected)
    assert list(unet.state_dict()) == names
    assert seen == [{"mode": "reduce-overhead", "dynamic": False}]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_freed_memory_is_kept_on_a_cpu_only(monkeypatch):
    assert keep_freed_memory(CPU) is True
    assert keep_freed_memory(torch.device("cuda:0")) is False
    monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert keep_freed_memory(CPU) is False


@pytest.mark.parametrize("channels_last", [False, True])
def test_half_precision_volumes_are_the_same_in_any_batch_on_a_cpu(unet, scheduler, channels_last):
    sampler = DiffusionSampler(unet, scheduler, 4, "dpmpp_2m_sde", amp_dtype=torch.bfloat16)
    prepared(sampler, CPU, channels_last=channels_last)
    noise = torch.randn(3, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    together = sampler(noise)
    for i in range(3):
        assert torch.equal(together[i : i + 1], sampler(noise[i : i + 1]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compile", [False, True, "reduce-overhead"])
def test_the_means_work_on_a_gpu(compile):
    unet, device = small_unet(), torch.device("cuda:0")
    expected = unet(*INPUT)
    fast = prepared(copy.deepcopy(unet), device, channels_last=True, compile=compile)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        found = fast(*(x.to(device) for x in INPUT)).float().cpu()
    assert (found - expected).norm() < 0.02 * expected.norm()
