"""Targets: how they are written, when they hold, and what a run spent until then."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lola_flwr.app.target import check_target, spent_words, was_reached
from lola_flwr.errors import UserError
from lola_flwr.report.tally import Tally
from lola_flwr.run.records import BlockRecord, RoundRecord, StepRecord
from lola_flwr.run.target import Spent, Target, best_so_far, falls, reached


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("accuracy>=0.83", Target("accuracy", 0.83)),
        (" perplexity <= 2e1 ", Target("perplexity", 20.0, falls=True)),
        ("matthews_correlation>=-0.1", Target("matthews_correlation", -0.1)),
    ],
)
def test_a_target_is_read_and_written(text, target):
    assert Target.parse(text) == target
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize(
    "text",
    [
        *("", "accuracy", "accuracy=0.83", "accuracy>0.83", "accuracy>=", ">=0.8"),
        *("accuracy>=high", "accuracy>=nan", "loss<=inf", "a>=1 b>=2"),
    ],
)
def test_what_is_no_target_is_refused(text):
    with pytest.raises(UserError, match=r"'accuracy>=0\.83'") as raised:
        Target.parse(text)
    assert "\n" not in str(raised.value)


def test_a_target_holds_at_its_value_and_beyond():
    rising, falling = Target("accuracy", 0.8), Target("loss", 0.8, falls=True)
    seen = [0.79, 0.8, 0.81, math.nan]
    assert [rising.holds({"accuracy": v}) for v in seen] == [False, True, True, False]
    assert [falling.holds({"loss": v}) for v in seen] == [True, True, False, False]
    assert not rising.holds({}) and not rising.holds({"loss": 0.9})


def test_a_metric_that_there_is_not_is_refused_with_those_that_there_are():
    with pytest.raises(UserError, match=r"no 'f1'; it has loss, accuracy\."):
        Target("f1", 0.5).require_in({"loss": 1.0, "accuracy": 0.5})


def test_lower_is_better_of_losses_alone():
    assert falls("loss") and falls("perplexity") and falls("train loss")
    assert not falls("accuracy") and not falls("exact_match")


def block(received, sent):
    return BlockRecord(
        block_index=0,
        depth=1,
        device="a",
        share=1.0,
        compute_s=1.0,
        upload_s=1.0,
        reported_compute_s=None,
        compute_clock="",
        loss=None,
        status="accepted",
        received_bytes=received,
        sent_bytes=sent,
    )


def test_what_was_spent_is_summed_over_all_rounds_until_the_evaluation():
    rounds = [
        RoundRecord(
            n,
            2,
            10.0 * n,
            blocks=(block(100, 7), block(1, 0)) if n != 2 else (),
            metrics={"accuracy": 0.1 * n} if n % 2 == 0 else {},
            start_metrics={"accuracy": 0.15} if n == 1 else {},
        )
        for n in range(1, 5)
    ]
    course = Tally.of(rounds).course("accuracy")
    assert course == [
        Spent(0, 0.15, 0.0, 0, 0),
        Spent(2, 0.2, 20.0, 101, 7),
        Spent(4, 0.4, 40.0, 303, 21),
    ]
    assert reached(course, Target("accuracy", 0.16)) == course[1]
    assert reached(course, Target("accuracy", 0.4)) == course[2]
    assert reached(course, Target("accuracy", 0.41)) is None
    assert Tally.of(rounds).course("f1") == []


def test_steps_have_their_own_counts_and_records_without_any_tell_none():
    step = StepRecord(1, 2, 1.0, sent_bytes=5, received_bytes=3, metrics={"loss": 2.0})
    assert Tally.of([step]).course("loss") == [Spent(1, 2.0, 1.0, 3, 5)]
    old = RoundRecord(1, 2, 1.0, metrics={"loss": 2.0})
    assert Tally.of([old]).course("loss") == [Spent(1, 2.0, 1.0, None, None)]


def test_the_best_so_far_is_what_is_better_than_all_before():
    values = [0.5, 0.4, 0.5, 0.7, math.nan, 0.6, 0.8]
    course = [Spent(n, value, 1.0 * n) for n, value in enumerate(values)]
    assert [p.server_round for p in best_so_far(course, falling=False)] == [0, 3, 6]
    assert [p.server_round for p in best_so_far(course, falling=True)] == [0, 1]


def test_a_target_that_holds_before_the_first_round_is_refused():
    target = Target("loss", 0.7, falls=True)
    check_target(target, 0, {"loss": 0.71})
    check_target(target, 5, {"loss": 0.69})
    check_target(None, 0, {})
    with pytest.raises(UserError, match=r"before the first round: loss is 0\.69"):
        check_target(target, 0, {"loss": 0.69})


def test_the_final_line_says_what_a_target_took():
    rounds = [
        RoundRecord(n, 2, 1.5 * n, blocks=(block(10**6, 0),), metrics={"f1": 0.1 * n})
        for n in range(1, 4)
    ]
    target = Target("f1", 0.2)
    assert was_reached(target, rounds) and not was_reached(target, rounds[:1])
    assert not was_reached(None, rounds)
    said = spent_words(target, rounds)
    assert said == " target_round=2 target_s=3.000 target_up_mb=2.000"
    rounds[1] = replace(rounds[1], joules=2.5)
    assert spent_words(target, rounds) == f"{said} target_j=2.500"
    assert spent_words(target, rounds[:1]) == " target_round=none"
    assert spent_words(None, rounds) == ""
