"""Run sub-networks of a transformer fully, forward only, or not at all (D2FT).

Source: Ding, Zhang, Wang, Ateniese, Yuan, "D2FT: Distributed Dynamic Fine-Tuning for
Pretrained Transformers", arXiv:2504.12471.
"""

from lola_flwr.d2ft.execution import scheduled
from lola_flwr.d2ft.operations import Operation
from lola_flwr.d2ft.schedule import (
    ADAPTER_TUNING,
    FULL_TUNING,
    Budgets,
    UnitCosts,
    operation_values,
    place_subnetworks,
    schedule_subnetworks,
    solve_knapsack,
    solve_two_stage,
)
from lola_flwr.d2ft.scores import Scores, score_subnetworks
from lola_flwr.d2ft.steps import (
    StepSchedules,
    activation_bytes,
    compute_s,
    uploads_s,
)
from lola_flwr.d2ft.subnetworks import Subnetworks, find_subnetworks
from lola_flwr.d2ft.training import scheduled_gradient, split_batch

__all__ = [
    "ADAPTER_TUNING",
    "FULL_TUNING",
    "Budgets",
    "Operation",
    "Scores",
    "StepSchedules",
    "Subnetworks",
    "UnitCosts",
    "activation_bytes",
    "compute_s",
    "find_subnetworks",
    "operation_values",
    "place_subnetworks",
    "schedule_subnetworks",
    "scheduled",
    "scheduled_gradient",
    "score_subnetworks",
    "solve_knapsack",
    "solve_two_stage",
    "split_batch",
    "uploads_s",
]
