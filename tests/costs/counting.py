"""How the models of these tests are divided, and those that are not counted."""

from __future__ import annotations

import torch

from lola_flwr.model.blocks import partition_parameters

REFUSED = {"LSTM": r"recurrent layer .* set torch\.backends\.mkldnn\.enabled"}
if not hasattr(torch.ops.aten, "_grouped_mm"):  # before PyTorch 2.9
    REFUSED["OLMoE LM (experts)"] = r"grouped_mm_fallback takes is not known"


def partition_of(model, **by_hand):
    return partition_parameters((n for n, _ in model.named_parameters()), **by_hand)
