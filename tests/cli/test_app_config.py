"""An app's run configuration, checked before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from lola_flwr.cli.app_config import as_run_config, read_overrides
from lola_flwr.errors import UserError
from lola_flwr.simulation.flower_app import FlowerApp, check_config, read_app

GLUE = Path(__file__).parents[2] / "simulations" / "glue"
APP = FlowerApp(
    Path("app"),
    "app",
    {"task": "cola", "rounds": 3, "lr": 0.1, "save": False, "inner.key": "x"},
)


class TestOverrides:
    def test_values_take_the_type_of_the_default(self):
        words = ["task=sst-2", "rounds=4", "lr=1", "save=true", 'inner.key="a b"']
        assert read_overrides(APP, words) == {
            "task": "sst-2",
            "rounds": 4,
            "lr": 1.0,
            "save": True,
            "inner.key": "a b",
        }

    def test_a_string_that_looks_like_a_number(self):
        assert read_overrides(APP, ["task=3"]) == {"task": "3"}

    def test_flower_reads_what_is_written(self):
        from flwr.common.config import parse_config_args

        words = ["task=r=8, names=['a', 'b']", "lr=3e-4", "save=true", "inner.key=/a b"]
        changes = read_overrides(APP, words)
        assert parse_config_args(as_run_config(changes)) == changes

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("rounds", "write key=value"),
            ("round=3", "Did you mean 'rounds'?"),
            ("zzz=3", "Its keys are task, rounds"),
            ("rounds=many", "rounds=many must be a whole number, as in rounds=3"),
            ("rounds=3.5", "must be a whole number"),
            ("rounds=true", "must be a whole number"),
            ("lr=fast", "lr=fast must be a number, as in lr=0.1"),
            ("save=1", "must be true or false"),
            ("task='a\"b'", "double quotes"),
        ],
    )
    def test_mistakes(self, word, message):
        with pytest.raises(UserError) as raised:
            read_overrides(APP, [word])
        assert message in str(raised.value)

    def test_a_number_may_be_one_of_the_words_that_the_schema_knows(self):
        app = read_app(GLUE)
        assert read_overrides(app, ["rank=auto"]) == {"rank": "auto"}
        with pytest.raises(UserError, match="rank=many must be a whole number"):
            read_overrides(app, ["rank=many"])

    def test_all_mistakes_are_said_at_once(self):
        with pytest.raises(UserError, match=r"'round'.*lr=fast"):
            read_overrides(APP, ["round=3", "lr=fast"])


class TestApp:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[tool", "is no TOML"),
            ("[project]\nname='x'", r"has no \[tool\.flwr\.app\]"),
        ],
    )
    def test_no_app(self, tmp_path, text, message):
        (tmp_path / "pyproject.toml").write_text(text)
        with pytest.raises(UserError, match=message):
            read_app(tmp_path)

    def test_inner_tables(self, tmp_path):
        (tmp_path / "pyproject.toml").write_text("[tool.flwr.app.config.a]\nb = 1\n")
        assert read_app(tmp_path).config == {"a.b": 1}

    def test_an_app_without_a_schema_takes_anything(self):
        check_config(APP, {"rounds": -1})

    def test_schema_that_is_not_there(self, tmp_path):
        app = FlowerApp(tmp_path, "app", {}, schema="no_such:Schema")
        with pytest.raises(UserError, match="cannot be imported"):
            check_config(app, {})

    @pytest.mark.parametrize("app", ["glue", "vision"])
    def test_own_apps_hold(self, app):
        found = read_app(GLUE.parent / app)
        assert found.schema is not None
        check_config(found, found.config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds=0"),
        ({"backups": 2, "participation": "all"}, "drop one of the two"),
        ({"method": "fedavg-full", "rotation-eps": 0.1}, "set it to 0"),
        ({"method": "fedavg-full", "devices-per-block": 2}, "set it to 1"),
        ({"schedule-options": "T_max=4"}, "but schedule='constant'"),
        ({"snr-min-db": 30.0}, "snr-min-db=30 must not exceed"),
        ({"tasks": "cola"}, "Did you mean 'task'?"),
    ],
)
def test_what_does_not_fit_together(changes, message):
    app = read_app(GLUE)
    with pytest.raises(UserError) as raised:
        check_config(app, {**app.config, **changes})
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_all_contradictions_are_said_at_once():
    app = read_app(GLUE)
    changes = {"backups": 1, "participation": "all", "schedule-options": "a=1"}
    with pytest.raises(UserError, match=r"backups=1.*schedule-options"):
        check_config(app, {**app.config, **changes})
