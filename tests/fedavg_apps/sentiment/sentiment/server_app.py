"""The server."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from generated import HELD_OUT

from sentiment.task import get_model, load_data, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    num_rounds = context.run_config["num-server-rounds"]
    torch.manual_seed(context.run_config["seed"])
    net = get_model()
    arrays = ArrayRecord(net.state_dict())

    strategy = FedAvg(
        fraction_train=context.run_config["fraction-train"],
        fraction_evaluate=context.run_config["fraction-evaluate"],
        weighted_by_key="num-examples",
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=arrays,
        num_rounds=num_rounds,
        evaluate_fn=get_evaluate_fn(net),
    )
    print(
        "Train losses:",
        *(m["train_loss"] for m in result.train_metrics_clientapp.values()),
    )


def get_evaluate_fn(net):
    """Return what evaluates the model on held-out data."""
    batches = load_data(HELD_OUT, count=2000)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        net.load_state_dict(arrays.to_torch_state_dict())
        loss, accuracy = test(net, batches)
        print(f"round {server_round}: loss {loss:.4f} accuracy {accuracy:.4f}")
        return MetricRecord({"loss": loss, "accuracy": accuracy})

    return evaluate
