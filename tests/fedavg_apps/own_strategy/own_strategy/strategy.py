"""A strategy with a start of its own."""

from logging import INFO
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result


class CustomFedAvg(FedAvg):
    """FedAvg that decays the learning rate, and saves the best model so far."""

    def set_save_path(self, path: Path):
        """Set where models are saved."""
        self.save_path = path
        self.best_accuracy = 0.0

    def configure_train(self, server_round, arrays, config, grid):
        """Let the learning rate fall from round 6 on."""
        if server_round == 6:
            config["lr"] *= 0.5
        return super().configure_train(server_round, arrays, config, grid)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn=None,
    ) -> Result:
        """Run the rounds, with a checkpoint at each new best accuracy."""
        train_config = ConfigRecord() if train_config is None else train_config
        evaluate_config = ConfigRecord() if evaluate_config is None else evaluate_config
        result = Result()
        result.arrays = arrays = initial_arrays
        if evaluate_fn:
            result.evaluate_metrics_serverapp[0] = evaluate_fn(0, arrays)

        for current_round in range(1, num_rounds + 1):
            log(INFO, "[ROUND %s/%s]", current_round, num_rounds)
            train_replies = grid.send_and_receive(
                messages=self.configure_train(
                    current_round, arrays, train_config, grid
                ),
                timeout=timeout,
            )
            agg_arrays, agg_metrics = self.aggregate_train(current_round, train_replies)
            if agg_arrays is not None:
                result.arrays = arrays = agg_arrays
            if agg_metrics is not None:
                result.train_metrics_clientapp[current_round] = agg_metrics

            evaluate_replies = grid.send_and_receive(
                messages=self.configure_evaluate(
                    current_round, arrays, evaluate_config, grid
                ),
                timeout=timeout,
            )
            agg_metrics = self.aggregate_evaluate(current_round, evaluate_replies)
            if agg_metrics is not None:
                result.evaluate_metrics_clientapp[current_round] = agg_metrics

            if evaluate_fn:
                metrics = evaluate_fn(current_round, arrays)
                result.evaluate_metrics_serverapp[current_round] = metrics
                self._update_best(current_round, metrics, arrays)
        return result

    def _update_best(self, current_round: int, metrics: MetricRecord, arrays):
        if metrics["accuracy"] > self.best_accuracy:
            self.best_accuracy = metrics["accuracy"]
            log(INFO, "New best accuracy in round %s", current_round)
            torch.save(arrays.to_torch_state_dict(), self.save_path / "best.pt")
