"""Run sub-networks of a transformer fully, forward only, or not at all (D2FT).

Source: Ding, Zhang, Wang, Ateniese, Yuan, "D2FT: Distributed Dynamic Fine-Tuning for
Pretrained Transformers", arXiv:2504.12471.

Of a base that adapters are trained on, parts can be left out for good, on devices and
server, and the adapters be recovered on the whole one (`cuts`, `pruned`, `recovery`):
Zhang et al., "Train Small, Infer Large: Memory-Efficient LoRA Training for Large
Language Models" (LoRAM), arXiv:2502.13533, its structured variant; without its
alignment, which trains the pruned base on a corpus before.
"""
