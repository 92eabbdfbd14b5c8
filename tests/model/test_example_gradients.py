from __future__ import annotations

import numpy as np
import torch

from lola_flwr.model.backprop import block_gradient
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.model.example_gradients import example_gradients


def test_their_mean_is_the_gradient_of_the_batch(roberta):
    partition = partition_parameters(name for name, _ in roberta.named_parameters())
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(3, 30, (5, 7), generator=generator),
        "labels": torch.tensor([0, 1, 1, 0, 1]),
    }
    one_by_one = [{n: t[k : k + 1] for n, t in batch.items()} for k in range(5)]
    parameters = dict(roberta.named_parameters())
    values = {n: 1.1 * parameters[n].detach().numpy() for n in partition.trainable}
    roberta.train()
    found = list(example_gradients(roberta, partition, one_by_one)(values))
    assert len(found) == 5
    assert not roberta.training  # No dropout.
    for name, array in values.items():
        np.testing.assert_array_equal(parameters[name].detach(), array)
    blocks = [*range(partition.num_blocks)]
    whole = block_gradient(roberta, partition, blocks, batch).gradients
    assert whole.keys() == found[0].keys()
    for name, gradient in whole.items():
        mean = np.mean([one[name] for one in found], axis=0)
        np.testing.assert_allclose(mean, gradient, rtol=1e-3, atol=1e-6)
