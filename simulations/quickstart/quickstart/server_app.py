"""The server: who trains which block with which share of the uplink, and the steps."""

from logging import INFO

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from lola_flwr.build import ServerStep, coordinator_for
from lola_flwr.costs.of_model import model_costs
from lola_flwr.model.loading import load_values
from lola_flwr.model.saved_adapters import save_model
from lola_flwr.run.directory import describe_run, run_directory, say_where
from lola_flwr.run.round_log import RoundLog, read_rounds
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.strategies.message import LoLaDeft
from quickstart.task import load_data, load_model, make_batch

app = ServerApp()


def make_coordinator(config: dict) -> Coordinator:
    """Return what decides who does what, and steps."""
    model, partition, _ = load_model(config["model"], config["data"])
    batch_size = config["batch-size"]
    return coordinator_for(
        model,
        partition,
        costs=model_costs(model, partition, batch_size=batch_size, sequence_length=64),
        batch_size=batch_size,
        step=ServerStep(lr=config["lr"]),
    )


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train for some rounds, and save the adapter."""
    config = context.run_config
    model, partition, tokenizer = load_model(config["model"], config["data"])
    test = load_data(config["data"])["test"]
    held_out, classes = test[:500], test.features["label"].names

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        load_values(model, partition.trainable, arrays.to_numpy_ndarrays())
        model.eval()
        batch = make_batch(held_out, tokenizer)
        with torch.inference_mode():
            output = model(**batch)
        correct = output.logits.argmax(dim=1) == batch["labels"]
        return MetricRecord(
            {"loss": output.loss.item(), "accuracy": correct.float().mean().item()}
        )

    directory = run_directory(config["output-dir"], context.run_id)
    rounds = RoundLog(directory / "rounds.jsonl")
    describe_run(directory, app="quickstart", config=config)
    strategy = LoLaDeft(make_coordinator(config), on_round=rounds.append)
    result = strategy.start(
        grid,
        strategy.initial_arrays(),
        num_rounds=config["rounds"],
        evaluate_fn=evaluate,
    )
    load_values(model, partition.trainable, result.arrays.to_numpy_ndarrays())
    save_model(model, directory / "adapter")
    say_where(rounds.path)
    # Who loads the adapter has to number them so.
    log(INFO, "classes, in the order of their numbers: %s", ", ".join(classes))
    log(INFO, "%s", read_rounds(rounds.path)[-1].final_line())
