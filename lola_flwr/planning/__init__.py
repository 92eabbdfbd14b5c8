"""What a round asks of whom: stated, solved, and planned without a model.

Neither Flower nor PyTorch is needed: `lola-flwr plan` says in a second what a run's
rounds will take, and a run's own rounds are planned by the same functions.
"""

from lola_flwr.planning.batches import BATCH_SIZES, solve_round
from lola_flwr.planning.fleet_plans import (
    Plan,
    comparable,
    compare,
    named_model_costs,
    plan_rounds,
    round_problem,
)
from lola_flwr.planning.forecast import Forecast, Range, forecast, planned_rounds
from lola_flwr.planning.known import AllocationOptions, Known, RunStatement
from lola_flwr.planning.latency_target import most_valuable_blocks
from lola_flwr.planning.round_problem import RoundProblem
from lola_flwr.planning.solution import (
    SolvedRound,
    matching_seed,
    planned_blocks,
)
from lola_flwr.planning.statement import stated_round

__all__ = [
    "BATCH_SIZES",
    "AllocationOptions",
    "Forecast",
    "Known",
    "Plan",
    "Range",
    "RoundProblem",
    "RunStatement",
    "SolvedRound",
    "comparable",
    "compare",
    "forecast",
    "matching_seed",
    "most_valuable_blocks",
    "named_model_costs",
    "plan_rounds",
    "planned_blocks",
    "planned_rounds",
    "round_problem",
    "solve_round",
    "stated_round",
]
