"""Who computes on which device."""

import importlib.util

import pytest
import torch

from cadenza.kernels import ops

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    monkeypatch.delenv(ops.SWITCH, raising=False)
    ops._wants_triton.cache_clear()
    yield
    ops._wants_triton.cache_clear()


def test_triton_on_a_gpu_and_torch_elsewhere(monkeypatch):
    assert ops.runs_triton(GPU) == (importlib.util.find_spec("triton") is not None)
    assert not ops.runs_triton(torch.device("cpu"))


def test_torch_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv(ops.SWITCH, "torch")
    assert not ops.runs_triton(GPU)


def test_torch_where_triton_is_not(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not ops.runs_triton(GPU)


def test_a_wish_for_something_else_is_refused(monkeypatch):
    monkeypatch.setenv(ops.SWITCH, "cutlass")
    with pytest.raises(ValueError, match="CADENZA_KERNELS is 'cutlass'"):
        ops.runs_triton(GPU)
