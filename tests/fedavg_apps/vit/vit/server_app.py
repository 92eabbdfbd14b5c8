"""The server."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from generated import HELD_OUT

from vit.task import VisionTransformer, load_data, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    torch.manual_seed(context.run_config["seed"])
    global_model = VisionTransformer()
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=2)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(global_model.state_dict()),
        train_config=ConfigRecord({"lr": context.run_config["learning-rate"]}),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=global_evaluate,
    )


def global_evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Evaluate the model on held-out data."""
    model = VisionTransformer()
    model.load_state_dict(arrays.to_torch_state_dict())
    loss, accuracy = test(model, load_data(HELD_OUT, count=2000))
    print(f"round {server_round}: loss {loss:.4f} accuracy {accuracy:.4f}")
    return MetricRecord({"loss": loss, "accuracy": accuracy})
