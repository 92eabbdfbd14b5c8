"""The comparison: its runs on the image task, and what it makes of them."""

from __future__ import annotations

import csv

import pytest
import torch

from lola_flwr.run.target import Target
from simulations.compare.__main__ import METHODS, main, read_methods
from simulations.compare.local_rounds import CONTENDERS
from simulations.compare.measure import counted_flops, peak_bytes
from simulations.compare.methods import Method, RunSettings
from simulations.compare.report import comparison_rows
from simulations.compare.runs import run_method
from simulations.compare.tasks import image_task, text_task

SETTINGS = RunSettings(rounds=2, eval_every=2, num_devices=4, batch_size=5, seed=1)


def last_point(method):
    task = image_task(num_devices=4, seed=1)
    (point,) = run_method(task, method, SETTINGS, lambda _: None)
    assert point.server_round == 2
    assert 0 <= point.metrics["accuracy"] <= 1
    assert point.memory_bytes > 0 < point.flops
    return point


def test_a_models_own_weights_are_no_new_memory():
    linear = torch.nn.Linear(1000, 500)
    batch = torch.ones(20, 1000)

    def forward():
        with torch.no_grad():
            return linear(batch)

    assert peak_bytes(linear, forward) == 20 * 500 * 4
    _, flops = counted_flops(forward)
    assert flops == 2 * 20 * 1000 * 500


def test_attention_counts_in_evaluation_too():
    query = torch.ones(1, 2, 8, 4)
    attention = torch.nn.functional.scaled_dot_product_attention
    _, flops = counted_flops(attention, query, query, query)
    assert flops == 2 * (2 * 2 * 8 * 8 * 4)


@pytest.mark.slow
def test_a_run_whose_last_round_is_skipped_still_ends():
    task = image_task(num_devices=4, seed=1)
    method = Method(latency_target=1e-9)
    (point,) = run_method(task, method, SETTINGS, lambda _: None)
    assert (point.server_round, point.wireless_s, point.flops) == (2, 0.0, 0)


@pytest.mark.slow
def test_d2ft_spends_what_its_budgets_allow():
    full = last_point(Method(kind="d2ft"))
    compute = last_point(Method(kind="d2ft", compute=0.6))
    traffic = last_point(Method(kind="d2ft", traffic=0.5))
    shared = last_point(
        Method(kind="d2ft", compute=0.6, shared_budgets=True, refresh=9)
    )
    # What scores and the parts outside of the layers take is counted, too.
    assert 0.5 < compute.flops / full.flops < shared.flops / full.flops < 0.72
    assert traffic.payload_bytes <= 0.5 * full.payload_bytes
    assert compute.memory_bytes < full.memory_bytes
    assert max(compute.wireless_s, traffic.wireless_s) < full.wireless_s


@pytest.mark.slow
def test_lola_methods_differ_in_what_they_spend():
    every = last_point(Method())
    some = last_point(Method(selector="round-robin", selector_options={"count": 2}))
    low = last_point(Method(low_rank={"rank": 4, "period": 2}))
    forward = last_point(Method(zeroth_order={"use": "always", "num_directions": 2}))
    hurried = last_point(Method(latency_target=0.7))
    assert some.payload_bytes < 0.6 * every.payload_bytes
    assert low.payload_bytes < 0.5 * every.payload_bytes
    assert forward.payload_bytes < 0.01 * every.payload_bytes
    assert forward.memory_bytes < every.memory_bytes
    assert hurried.wireless_s < every.wireless_s
    chosen = last_point(Method(sampler="entropy"))
    assert chosen.flops > every.flops
    assert chosen.wireless_s > every.wireless_s
    seen = last_point(Method(sampler="history", sampler_options={"weighted": True}))
    assert (seen.flops, seen.wireless_s) == (every.flops, every.wireless_s)


def test_a_text_task_of_few_examples():
    options = {"num_devices": 2, "seed": 3, "model_name": "random:roberta-tiny"}
    few, many = (
        text_task("acceptability", data_dir=None, train_examples=count, **options)
        for count in (10, None)
    )

    def seen(task):
        batches = [task.draw(device, step, 8) for device in (0, 1) for step in (1, 2)]
        return {
            tuple(row[mask.bool()].tolist())
            for batch in batches
            for row, mask in zip(
                batch["input_ids"], batch["attention_mask"], strict=True
            )
        }

    assert len(few.draw(0, 1, 8)["labels"]) == 5, "half of what there is"
    assert len(seen(few)) <= 10 < len(seen(many))


@pytest.mark.slow
def test_a_target_ends_a_run_at_the_evaluation_that_finds_it():
    settings = RunSettings(rounds=9, eval_every=2, num_devices=4, until="loss<=1e9")
    method = Method(batch_size=3, codec="int8")
    course = run_method(
        image_task(num_devices=4, seed=1), method, settings, lambda _: None
    )
    assert [point.server_round for point in course] == [2]


def test_a_target_that_ends_runs_has_to_be_given(capsys):
    assert main(["--until-target"]) == 1
    assert "--until-target needs --target" in capsys.readouterr().out


def test_every_method_of_the_file_is_one():
    methods = read_methods(METHODS)
    assert {"auto", "fp32-32", "int8-256"} <= set(
        read_methods(METHODS.with_name("batches.toml"))
    )
    ranks = read_methods(METHODS.with_name("ranks.toml"))
    assert {method.rank for method in ranks.values()} == {None, 4, 2, 1, "auto"}
    contenders = read_methods(METHODS.with_name("contenders.toml"))
    kinds = {method.kind for method in contenders.values()}
    assert kinds == {"lola", "fedavg-full", *CONTENDERS}
    assert {"lola-deft", "fedavg-full", "d2ft-full", "mezo", "galore"} <= set(methods)
    assert {method.kind for method in methods.values()} == {
        "lola",
        "fedavg-full",
        "d2ft",
    }


def test_rows_are_means_over_seeds_after_the_last_round():
    spent = {
        "wireless_s": 2.0,
        "flops": 3e9,
        "payload_bytes": 5e6,
        "memory_bytes": 2**21,
    }
    curves = [
        {
            "task": "t",
            "method": "m",
            "seed": seed,
            "server_round": server_round,
            "metric": "accuracy",
            "value": value,
            "loss": 1.0,
            **spent,
        }
        for seed, server_round, value in ((0, 1, 0.1), (0, 3, 0.5), (1, 1, 0.7))
    ]
    (row,) = comparison_rows(curves)
    assert (row["mean"], row["least"], row["largest"]) == (0.6, 0.5, 0.7)
    assert (row["rounds"], row["gflop"], row["sent_mb"], row["memory_mib"]) == (
        2,
        3.0,
        5.0,
        2.0,
    )


def test_a_row_tells_where_all_blocks_was_at_that_time():
    def point(method, seed, server_round, wireless_s, value):
        return {
            "task": "t",
            "method": method,
            "seed": seed,
            "server_round": server_round,
            "metric": "accuracy",
            "value": value,
            "wireless_s": wireless_s,
            "flops": 1.0,
            "payload_bytes": 1.0,
            "memory_bytes": 1.0,
        }

    curves = [
        point("lola-deft", 0, 1, 1.0, 0.4),
        point("lola-deft", 0, 2, 3.0, 0.8),
        point("lola-deft", 1, 1, 2.0, 0.5),
        point("lola-deft", 1, 2, 4.0, 0.9),
        point("lisa", 0, 2, 2.0, 0.7),
        point("lisa", 1, 2, 4.0, 0.7),
        point("mezo", 0, 2, 0.9, 0.2),
        point("fedavg-full", 1, 2, 4.1, 0.9),
    ]
    whole, lisa, early, late = comparison_rows(curves)
    assert whole["all_blocks_then"] == whole["mean"] == 0.85
    # Half way between its points, and at its last one.
    assert lisa["all_blocks_then"] == pytest.approx((0.6 + 0.9) / 2)
    # It was not measured before its first point, nor after its last.
    assert early["all_blocks_then"] == late["all_blocks_then"] == ""
    assert comparison_rows(curves[-1:])[0]["all_blocks_then"] == ""


@pytest.mark.parametrize("untold", [False, True])
def test_a_row_tells_what_a_target_cost_where_all_runs_got_there(untold):
    def point(seed, server_round, value):
        spent = {"wireless_s": 10.0 * server_round, "payload_bytes": 1e6 * server_round}
        spent["joules"] = "" if seed == 1 and untold else 3.0 * server_round
        return {
            **{"task": "t", "method": "m", "seed": seed, "metric": "accuracy"},
            **{"server_round": server_round, "value": value, "flops": 1.0},
            **{"memory_bytes": 1.0, **spent},
        }

    curves = [point(0, n, 0.1 * n) for n in range(1, 10)]
    curves += [point(1, n, 0.05 * n) for n in range(1, 10)]
    (row,) = comparison_rows(curves, Target("accuracy", 0.4))
    assert (row["target"], row["reached"]) == ("accuracy>=0.4", "2 of 2")
    assert (row["rounds_to_target"], row["s_to_target"], row["mb_to_target"]) == (
        *(6.0, 60.0),
        6.0,
    )
    assert row["j_to_target"] == ("" if untold else 18.0)
    (row,) = comparison_rows(curves, Target("accuracy", 0.5))
    assert (row["reached"], row["s_to_target"]) == ("1 of 2", "")
    (row,) = comparison_rows(curves, Target("accuracy", 5.0))
    assert (row["reached"], row["s_to_target"]) == ("0 of 2", "")


@pytest.mark.slow
def test_the_command_writes_table_and_figure_and_reuses_finished_runs(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--tasks", "textures", "--rounds", "1"]
    arguments += ["--batch-size", "2", "--devices", "4", "--methods", "lisa"]
    assert main(arguments) == 0
    assert "textures lisa seed 0 round 1" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "round 1:" not in capsys.readouterr().out
    with (tmp_path / "comparison.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["task"], row["method"], row["metric"]) == (
        "textures",
        "lisa",
        "accuracy",
    )
    assert (tmp_path / "comparison.png").stat().st_size > 1000
    assert main([*arguments, "--target", "f1>=0.1"]) == 1
    assert "no 'f1'; it has accuracy" in capsys.readouterr().out
    assert main([*arguments, "--target", "accuracy>=0.01"]) == 0
    assert "s_to_target" in capsys.readouterr().out
    assert main([*arguments[:-1], "lissa"]) == 1
    assert "Unknown method 'lissa'" in capsys.readouterr().out


def test_a_file_that_is_none(tmp_path):
    from lola_flwr.errors import UserError

    file = tmp_path / "methods.toml"
    file.write_text("[methods.a]\nselecter = 'lisa'\n")
    with pytest.raises(UserError, match=r"selecter"):
        read_methods(file)
