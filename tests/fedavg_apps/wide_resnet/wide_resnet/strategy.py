"""A strategy with an aggregation of its own."""

from flwr.common import parameters_to_ndarrays
from flwr.server.strategy import FedAvg

from wide_resnet.task import WideResNet, set_weights


class SaveModelStrategy(FedAvg):
    """FedAvg that keeps the present model at hand."""

    net = None

    def aggregate_fit(self, server_round, results, failures):
        """Aggregate, and load what comes of it into a model."""
        losses = [r.metrics["train_loss"] for _, r in results]
        parameters, metrics = super().aggregate_fit(server_round, results, failures)
        if parameters is not None:
            self.net = WideResNet() if self.net is None else self.net
            set_weights(self.net, parameters_to_ndarrays(parameters))
            print(f"Round {server_round} saved; train losses up to {max(losses):.3f}")
        return parameters, metrics
