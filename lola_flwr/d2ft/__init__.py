"""Run sub-networks of a transformer fully, forward only, or not at all (D2FT).

Source: Ding, Zhang, Wang, Ateniese, Yuan, "D2FT: Distributed Dynamic Fine-Tuning for
Pretrained Transformers", arXiv:2504.12471.
"""
