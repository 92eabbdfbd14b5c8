"""Runs for reports: planned ones, with replies and metrics made up by a seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lola_flwr.planning import named_model_costs, plan_rounds
from lola_flwr.report import Run
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.system.fleet_file import generate_fleet

HOSTILE = "</script><script>document.title='taken'</script><b onclick=x>&amp;"
LOST = "the gradient is not finite"


def sample_run(name, *, num_devices=8, num_rounds=12, mode=None, seed=0):
    """Return a run in which some updates were refused and one round was skipped."""
    fleet = generate_fleet(num_devices, seed=seed)
    # So fast that it takes part.
    hostile = DeviceProfile(HOSTILE[:64], flops_per_s=1e12, memory_bytes=8e9, snr_db=20)
    fleet = (hostile, *fleet[1:])
    rng = np.random.default_rng(seed)
    planned = plan_rounds(
        fleet,
        named_model_costs("minilm-l6", batch_size=4),
        rounds=num_rounds,
        allocator=name if name in ("exact", "crunch") else "exact",
        seed=seed,
        mode=mode,
    )
    rounds, wireless_s = [], 0.0
    for record in planned:
        if record.server_round == 3:
            rounds.append(
                replace(
                    record, blocks=(), skipped="too few devices", wireless_s=wireless_s
                )
            )
            continue
        blocks = tuple(
            replace(
                block,
                status=LOST if rng.random() < 0.1 else "accepted",
                reported_compute_s=block.compute_s * rng.uniform(0.8, 1.2),
            )
            for block in record.blocks
        )
        lost = sum(block.status == LOST for block in blocks)
        observed_s = max(b.upload_s + b.reported_compute_s for b in blocks)
        wireless_s += observed_s
        progress = record.server_round / num_rounds
        rounds.append(
            replace(
                record,
                blocks=blocks,
                observed_s=observed_s,
                wireless_s=wireless_s,
                refused={"not finite": lost} if lost else {},
                train_loss=0.7 - 0.4 * progress,
                start_metrics={"loss": 0.7, "accuracy": 0.5}
                if record.server_round == 1
                else {},
                measured_round_s=1.5,
                metrics={"loss": 0.7 - 0.3 * progress, "accuracy": 0.5 + 0.4 * progress}
                if record.server_round % 2 == 0
                else {},
            )
        )
    config = {"allocator": name, "rounds": num_rounds, "note": HOSTILE}
    return Run(name, rounds, {"config": config, "versions": {"flwr": "1.41.0"}})
