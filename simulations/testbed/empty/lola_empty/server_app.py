"""A server that asks every node, round for round."""

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from lola_flwr.strategies.arrival_grid import ArrivalGrid

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Ask all nodes, and wait for all."""
    arrivals = ArrivalGrid(grid)
    for _ in range(int(context.run_config["rounds"])):
        asked = [
            Message(RecordDict(), dst_node_id=node, message_type=MessageType.TRAIN)
            for node in grid.get_node_ids()
        ]
        answered = list(arrivals.send_and_receive(asked, timeout=120))
        if len(answered) < len(asked) or any(reply.has_error() for reply in answered):
            raise RuntimeError("A node did not answer.")
