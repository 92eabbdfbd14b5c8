"""The server."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from generated import HELD_OUT

from autoencoder.task import LitAutoEncoder, Trainer, load_data

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    torch.manual_seed(context.run_config["seed"])
    model = LitAutoEncoder()

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        loss = Trainer().test(model, load_data(HELD_OUT, count=2000))
        print(f"round {server_round}: loss {loss:.4f}")
        return MetricRecord({"loss": loss})

    strategy = FedAvg(min_train_nodes=2, min_available_nodes=2)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=evaluate,
    )
