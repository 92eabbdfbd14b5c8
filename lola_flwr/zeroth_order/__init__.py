"""Train a block by forward passes alone, and upload a few numbers instead of it.

A device that cannot hold any back-propagation moves the weights of its block and of the
head a little along a random direction, one way and the other, and reports by how much
the loss differs: the gradient's projection on that direction. The server draws the same
direction from the same seed, so that the projection is all that travels. Or it moves
nothing, and carries the derivative along the direction through the forward pass
(`lola_flwr.zeroth_order.forward_mode`).

Sources: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes" (MeZO),
arXiv:2305.17333, Algorithm 1; restricted to one block as in the block-wise descent of
Zhang et al., "Revisiting Zeroth-Order Optimization for Memory-Efficient LLM
Fine-Tuning" (ZO-Bench), arXiv:2402.11592. The mask is that of Liu et al., "Sparse MeZO:
Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning",
arXiv:2402.15751: of each tensor only the smallest weights are moved.
"""
