"""The server."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from generated import HELD_OUT
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from lora.models import get_model
from lora.task import load_data, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    num_rounds = context.run_config["num-server-rounds"]
    torch.manual_seed(context.run_config["seed"])
    init_model = get_model(context.run_config["base"])
    arrays = ArrayRecord(get_peft_model_state_dict(init_model))

    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0)
    strategy.start(
        grid=grid,
        initial_arrays=arrays,
        num_rounds=num_rounds,
        evaluate_fn=get_evaluate_fn(init_model),
    )


def get_evaluate_fn(model):
    """Return what evaluates the adapters on held-out data."""
    batches = load_data(HELD_OUT, count=128)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        set_peft_model_state_dict(model, arrays.to_torch_state_dict())
        loss = test(model, batches)
        print(f"round {server_round}: loss {loss:.4f}")
        return MetricRecord({"loss": loss})

    return evaluate
