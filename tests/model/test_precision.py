from __future__ import annotations

import pytest
import torch

from lola_flwr.errors import UserError
from lola_flwr.model.precision import autocast, find_device


def test_a_gpu_is_taken_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto").type == "cpu"
    with pytest.raises(UserError, match=r"'cuda' is not available .* auto, cpu\."):
        find_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert find_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto").type == "cuda"
    assert find_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="accelerator='tpu'"):
        find_device("tpu")


def test_precision():
    device = torch.device("cpu")
    a = torch.ones(2, 2)
    with autocast("fp32", device):
        assert (a @ a).dtype == torch.float32
    with autocast("bf16", device):
        assert (a @ a).dtype == torch.bfloat16
    with pytest.raises(UserError, match="precision='fp8'"):
        autocast("fp8", device)
