"""The server."""

import tempfile
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from generated import HELD_OUT

from own_strategy.strategy import CustomFedAvg
from own_strategy.task import Net, load_data, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    torch.manual_seed(context.run_config["seed"])
    model = Net()

    strategy = CustomFedAvg(fraction_train=1.0, fraction_evaluate=0.5)
    strategy.set_save_path(Path(tempfile.mkdtemp()))
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        train_config=ConfigRecord({"lr": context.run_config["learning-rate"]}),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=global_evaluate,
    )
    best = torch.load(strategy.save_path / "best.pt")
    print(f"best of {len(best)} arrays: accuracy {strategy.best_accuracy:.4f}")


def global_evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Evaluate the model on held-out data."""
    model = Net()
    model.load_state_dict(arrays.to_torch_state_dict())
    loss, accuracy = test(model, load_data(HELD_OUT, count=2000))
    print(f"round {server_round}: loss {loss:.4f} accuracy {accuracy:.4f}")
    return MetricRecord({"loss": loss, "accuracy": accuracy})
