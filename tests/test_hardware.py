"""What is chosen for a machine, whatever this one is."""

import pytest
import torch
from llamapro import hardware


@pytest.mark.parametrize(
    "rate, chosen", [(5.0, "bfloat16"), (0.8, "bfloat16"), (0.2, "float32"), (0.01, "float32")]
)
def test_the_dtype_of_a_cpu(monkeypatch, rate, chosen):
    """rate: of bf16, in that of fp32. Slower by less than half, it still halves the memory."""
    rates = {torch.bfloat16: rate, torch.float32: 1.0}
    monkeypatch.setattr(hardware, "matmul_rate", lambda device, dtype: rates[dtype])
    assert hardware.pick_dtype(torch.device("cpu")) == chosen


@pytest.mark.parametrize(
    "build, chosen",
    [("amx", "bfloat16"), ("avx512_bf16", "bfloat16"), ("avx2", "float32"), (None, "float32")],
)
def test_the_dtype_of_samples(monkeypatch, build, chosen):
    monkeypatch.setattr(hardware.cpu, "BUILD", build)
    assert hardware.pick_sampling_dtype(torch.device("cpu")) == chosen
    assert hardware.pick_sampling_dtype(torch.device("cuda")) == "bfloat16"


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware.pick_device() == torch.device("cpu")
    with pytest.raises(ValueError, match="no CUDA"):
        hardware.pick_device("cuda")
    with pytest.raises(ValueError, match="auto, cpu, cuda or cuda:N, got 'gpu'"):
        hardware.pick_device("gpu")
