"""The paper's figures: ``python -m simulations.figures --out runs/figures``.

Every figure is computed as rows, written as CSV, and drawn from those rows. What the
paper (Wu, Chen, Huang, arXiv:2407.09873) does not publish, the ranges of the fleets
above all, is our choice, and the figures say so.
"""
