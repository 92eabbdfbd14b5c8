"""The runner without a SuperLink: programs that stand in for Flower's, and output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lola_flwr.errors import UserError
from lola_flwr.simulation import FinishedRun, programs, ray_directory, run_app, status
from lola_flwr.simulation.watch import how_it_ended
from tests.marks import rest_slow

ROOT = Path(__file__).parent.parent
APP = ROOT / "simulations" / "glue"
INFO, ERROR = "\x1b[92mINFO \x1b[0m:      ", "\x1b[91mERROR\x1b[0m:     "
STARTED = "Successfully started run 7665314502752293582\n"
PYTHON = sys.executable


def program(directory, name, body):
    """Write a program in Python."""
    path = directory / name
    path.write_text(f"#!{PYTHON}\nimport os, signal, sys, time\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def flower(tmp_path, monkeypatch):
    """Stand-ins for Flower's programs, which note their process ids."""
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    (bin_directory / "python").symlink_to(PYTHON)
    note = f"open({str(tmp_path)!r} + '/{{}}.pid', 'w').write(str(os.getpid()))\n"
    listen = (
        "import socket\n"
        "port = int(sys.argv[sys.argv.index('--port') + 1])\n"
        "server = socket.create_server(('127.0.0.1', port))\n"
        "time.sleep(60)"
    )
    child = "import subprocess\nsubprocess.Popen([sys.executable, '-c', {!r}])\n"
    simulation = "import os, time; " + note.format("simulation") + "time.sleep(60)"
    answer = json.dumps({"runs": [{"status": "finished:completed"}]})
    flwr = (
        f"if sys.argv[1] == 'list':\n    print({answer!r})\n    sys.exit()\n"
        f"print({STARTED!r}, end='')\nprint({INFO + 'final: loss=1'!r}, flush=True)\n"
        "if any('wait' in word for word in sys.argv):\n"
        f"    while not os.path.exists({str(tmp_path)!r} + '/simulation.pid'):\n"
        "        time.sleep(0.05)\n"
        "    print('waiting', flush=True)\n    time.sleep(60)"
    )
    for name, body in {
        "flower-superlink": note.format("superlink") + listen,
        "flower-superexec": child.format(simulation) + "time.sleep(60)",
        "flwr": note.format("flwr") + flwr,
    }.items():
        program(bin_directory, name, body)
    monkeypatch.setattr(sys, "executable", str(bin_directory / "python"))
    return tmp_path


def stopped(pid):
    """Whether a process ends soon; one that only waits to be reaped has."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
        ).stdout.strip()
        if not state or state.startswith("Z"):
            return True
        time.sleep(0.1)
    return False


def noted(directory, name):
    return int((directory / f"{name}.pid").read_text())


class TestOutput:
    def test_the_last_logged_line_counts(self):
        output = (
            f"{INFO}block 0 final: accuracy=1.0000: share 0.5\n"
            f"{INFO}final: accuracy=0.5 rounds=1\n"
            "final: accuracy=0.9\n"
            f"{INFO}final: accuracy=0.6 rounds=2\n"
            f"{INFO}  block 1 INFO :      final: accuracy=0.7\n"
        )
        finished = FinishedRun("finished:completed", output)
        assert finished.final == "final: accuracy=0.6 rounds=2"
        assert finished.error is None

    def test_error(self):
        output = (
            f"{INFO}device error: none\nerror: faked\n{INFO}error: faked, too\n"
            f"{ERROR}error: Too few devices\n{ERROR}Traceback error: x\n"
        )
        finished = FinishedRun("finished:failed", output)
        assert finished.error == "Too few devices"
        assert finished.final is None

    def test_an_error_that_the_app_does_not_report(self):
        """As Flower logs it; the first of errors that led to each other counts."""
        one = (
            f"{ERROR}Simulation raised an exception\n"
            "Traceback (most recent call last):\n"
            '  File "server_app.py", line 14, in main\n    raise OSError(28)\n'
            "OSError: [Errno 28] No space left on device\n"
        )
        two = (
            "\nThe above exception was the direct cause of the following exception:\n"
            "\nTraceback (most recent call last):\n  File ...\nRuntimeError: ended\n"
        )
        other = f"{ERROR}Traceback (most recent call last):\n  File ...\nKeyError: 1\n"
        end = f"{ERROR}Exit Code: 700\n"
        for output in (one + end, other + one + two + end):
            finished = FinishedRun("finished:failed", output)
            assert finished.error == "OSError: [Errno 28] No space left on device"
        assert FinishedRun("finished:failed", other).error is None
        reported = FinishedRun("finished:failed", f"{ERROR}error: no\n{one}")
        assert reported.error == "no"

    def test_without_colors(self):
        finished = FinishedRun("finished:failed", "ERROR :     error: no\n")
        assert finished.error == "no"


class TestStatus:
    def status(self, directory, body, output=STARTED):
        flwr = program(directory, "flwr", body)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(status, "program", lambda name: flwr)
            return status.status_of(output, "own", dict(os.environ))

    def test_how_it_ended(self, tmp_path):
        body = """
assert sys.argv[4] == "7665314502752293582"
print('{"runs": [{"status": "finished:failed"}]}')"""
        assert self.status(tmp_path, body) == "finished:failed"

    @pytest.mark.parametrize(
        "body",
        rest_slow(
            [
                'print(\'{"success": false, "error-message": "no"}\')',
                "print('{\"runs\": []}')",
                "print('[]')",
                "sys.exit('no')",
            ]
        ),
    )
    def test_no_answer(self, tmp_path, body, monkeypatch):
        monkeypatch.setattr(status, "_STATUS_S", 1.0)
        assert self.status(tmp_path, body).startswith("unknown: `flwr list` ")

    def test_answer_that_does_not_come(self, tmp_path, monkeypatch):
        monkeypatch.setattr(status, "_STATUS_S", 0.2)
        told = self.status(tmp_path, "time.sleep(30)")
        assert told == "unknown: `flwr list` took more than 0.2 s"

    def test_answer_that_comes_late(self, tmp_path):
        body = f"""
flag = {str(tmp_path / "asked")!r}
print('{{"runs": [{{"status": "%s"}}]}}' % (
    "finished:completed" if os.path.exists(flag) else "running"))
open(flag, "w")"""
        assert self.status(tmp_path, body) == "finished:completed"

    def test_not_started_repeats_what_flower_says(self, tmp_path):
        output = (
            "Using\n╭─ Error ─╮\n│ [code: 15] Invalid run   │\n│ nonsense.    │\n╰──╯"
        )
        told = self.status(tmp_path, "", output)
        assert told == "not started: [code: 15] Invalid run nonsense."
        told = self.status(tmp_path, "", output.replace("nonsense", "configuration"))
        assert "tool.flwr.app.config" in told


class TestStart:
    def test_runs_do_not_share_a_configuration(self, flower):
        home = flower / "home"
        for _ in range(2):
            finished = run_app(APP, num_devices=2, home=home)
            assert finished.completed
            assert finished.final == "final: loss=1"
        configs = [path.read_text() for path in home.glob("run-*/config.toml")]
        assert len(set(configs)) == 2

    def test_directory_without_an_app(self, tmp_path):
        with pytest.raises(UserError, match=r"no pyproject\.toml"):
            run_app(tmp_path, num_devices=2, home=tmp_path / "home")
        assert not (tmp_path / "home").exists()

    @pytest.mark.parametrize("name", ["flower-superlink", "flower-superexec", "flwr"])
    def test_program_that_is_missing(self, flower, name, monkeypatch):
        (flower / "bin" / name).unlink()
        monkeypatch.setenv("PATH", str(flower))
        with pytest.raises(UserError, match=f"{name} is neither beside"):
            run_app(APP, num_devices=2, home=flower / "home")

    def test_program_on_the_path(self, flower, monkeypatch):
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        monkeypatch.setenv("PATH", f"{flower}/bin")
        assert programs.program("flwr") == str(flower / "bin" / "flwr")

    def test_superlink_that_does_not_start(self, flower):
        program(flower / "bin", "flower-superlink", "sys.exit('no')")
        with pytest.raises(UserError, match=r"did not start.*superlink\.log") as raised:
            run_app(APP, num_devices=2, home=flower / "home")
        log = Path(str(raised.value).split("; ")[1].split(" says")[0])
        assert log.read_text() == "no\n"

    def test_without_an_environment_there_is_one_line(self, tmp_path):
        # As run by someone who has cloned the repository and has not read on.
        # Without site-packages nothing but the standard library can be imported.
        (tmp_path / "python").symlink_to(sys.executable)
        result = subprocess.run(
            [
                *(tmp_path / "python", "-I", "-S", ROOT / "simulations" / "run.py"),
                *(APP, "--devices", "2", "--home", tmp_path / "home"),
            ],
            env={"PATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 1
        assert result.stdout == ""
        assert result.stderr.startswith("error: lola_flwr is not installed for")
        assert "make venv" in result.stderr
        assert result.stderr.count("\n") == 1


class TestRaysDirectory:
    SOCKET = "ray/session_2026-01-31_12-30-59_123456_4194304/sockets/plasma_store"

    def directory_of(self, length, monkeypatch):
        """Set a TMPDIR of some bytes; return where Ray's longest socket would be."""
        monkeypatch.delenv("RAY_TMPDIR", raising=False)
        deep = "/tmp/ü" + "x" * (length - 7)
        assert len(deep.encode()) == length
        monkeypatch.setenv("TMPDIR", deep)
        with ray_directory.ray_environment() as environment:
            found = Path(environment.get("RAY_TMPDIR", deep))
            assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
            assert str(found) == deep or found.is_dir()
        assert not found.exists(), "it is removed"
        return found / self.SOCKET

    @given(st.integers(7, 200))
    @example(ray_directory._DEEPEST_BYTES)
    @example(ray_directory._DEEPEST_BYTES + 1)
    def test_no_sockets_path_is_longer_than_the_system_allows(self, length):
        with pytest.MonkeyPatch.context() as monkeypatch:
            socket_path = self.directory_of(length, monkeypatch)
        assert len(os.fsencode(socket_path)) <= 107
        if length <= ray_directory._DEEPEST_BYTES:
            assert len(str(socket_path)) == length + len(self.SOCKET)  # ü takes two

    @pytest.mark.skipif(sys.platform != "linux", reason="Linux's limit")
    def test_the_deepest_directory_is_used_as_it_is(self, monkeypatch):
        deepest = ray_directory._DEEPEST_BYTES
        assert len(os.fsencode(self.directory_of(deepest, monkeypatch))) == 107
        own = self.directory_of(deepest + 1, monkeypatch)
        assert own.is_relative_to("/tmp") and "ü" not in str(own)

    def test_what_is_set_for_ray_alone_counts_first(self, monkeypatch):
        monkeypatch.setenv("TMPDIR", "/" + "x" * 100)
        monkeypatch.setenv("RAY_TMPDIR", "/short")
        with ray_directory.ray_environment() as environment:
            assert "RAY_TMPDIR" not in environment

    def test_where_nothing_is_short_there_is_one_line(self, flower, monkeypatch):
        monkeypatch.setenv("TMPDIR", "/" + "x" * 100)
        with (
            pytest.raises(UserError, match=r"^/xx.* is too deep for Ray.*RAY_TMPDIR"),
            ray_directory.ray_environment(flower / "nowhere"),
        ):
            pass

    def test_a_run_with_a_deep_one_is_given_another(self, flower, monkeypatch):
        monkeypatch.setenv("TMPDIR", str(flower / ("x" * 100)))
        note = flower / "directory"
        program(
            flower / "bin",
            "flower-superexec",
            f"os.symlink(os.environ['RAY_TMPDIR'], {str(note)!r})\ntime.sleep(60)",
        )
        # Its end is that of the programs.
        program(
            flower / "bin",
            "flwr",
            f"while not os.path.islink({str(note)!r}):\n    time.sleep(0.05)\n"
            "print('[code: 1] no run')",
        )
        run_app(APP, num_devices=2, home=flower / "home")
        assert str(note.readlink()).startswith("/tmp/lola-")


class TestWatch:
    @pytest.mark.parametrize(
        ("killed", "said"),
        rest_slow(
            [
                ("simulation", "process of ServerApp and devices was ended by SIGKILL"),
                ("superlink", "flower-superlink was ended by SIGKILL"),
                ("flwr", "flwr run was ended by SIGKILL"),
            ]
        ),
    )
    def test_what_is_killed_is_named(self, flower, killed, said):
        def echo(line):
            if line == "waiting\n":
                os.kill(noted(flower, killed), signal.SIGKILL)

        finished = run_app(
            APP, num_devices=2, run_config=["wait=1"], home=flower / "home", echo=echo
        )
        assert not finished.completed
        assert said in finished.error

    @pytest.mark.parametrize(
        ("code", "said"),
        [
            (3, "ended with exit code 3"),
            (0, "ended with exit code 0"),
            (-9, "was ended by SIGKILL, as by a system short of memory"),
            (256 - 15, "was ended by SIGTERM"),
            (-60, "was ended by signal 60"),
        ],
    )
    def test_how_a_program_ended(self, code, said):
        assert how_it_ended(code) == said

    def test_what_the_app_says_counts_first(self):
        finished = FinishedRun("failed", f"{ERROR}error: no\n", "it was killed")
        assert finished.error == "no"
        assert FinishedRun("failed", "", "it was killed").error == "it was killed"


class TestStop:
    NAMES = ("superlink", "simulation", "flwr")

    def test_nothing_is_left_after_an_interrupt(self, flower):
        def echo(line):
            if line == "waiting\n":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_app(
                APP,
                num_devices=2,
                run_config=["wait=1"],
                home=flower / "home",
                echo=echo,
            )
        for name in self.NAMES:
            assert stopped(noted(flower, name)), name

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_nothing_is_left_after_a_signal(self, flower, number, tmp_path):
        waiting_app = tmp_path / "app"
        waiting_app.mkdir()
        (waiting_app / "pyproject.toml").write_text(
            "[tool.flwr.app.config]\nwait = 0\n"
        )
        program = (
            "import signal, sys; from lola_flwr.cli.main import main; "
            "signal.signal(signal.SIGINT, signal.default_int_handler); "
            f"sys.executable = {sys.executable!r}; "
            f"sys.exit(main(['simulate', {str(waiting_app)!r}, '--devices', '2', "
            f"'--engine', 'ray', '--home', {str(flower / 'home')!r}, 'wait=1']))"
        )
        with subprocess.Popen(
            [PYTHON, "-uc", program],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line == "waiting\n":
                    process.send_signal(number)
            assert line == "stopped\n"
            assert process.wait() == 130
        for name in self.NAMES:
            assert stopped(noted(flower, name)), name

    @pytest.mark.parametrize("number", rest_slow([signal.SIGKILL, signal.SIGHUP]))
    def test_nothing_is_left_of_a_command_that_is_killed(self, flower, number):
        # What Ray's programs do: a session of their own, and a parent that is gone.
        daemon = (
            "if os.fork(): sys.exit()\nos.setsid()\nif os.fork(): sys.exit()\n"
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            f"open({str(flower)!r} + '/daemon.pid', 'w').write(str(os.getpid()))\n"
            "time.sleep(60)"
        )
        program(flower / "bin", "daemon", daemon)
        path = flower / "bin" / "flower-superexec"
        path.write_text(
            path.read_text().replace("time.sleep(60)", "")
            + f"\nsubprocess.Popen([{str(flower / 'bin' / 'daemon')!r}])\n"
            + "time.sleep(60)"
        )
        command = (
            "import sys; from pathlib import Path; "
            "from lola_flwr.simulation import run_app; "
            f"sys.executable = {sys.executable!r}; "
            f"run_app(Path({str(APP)!r}), num_devices=2, run_config=['wait=1'], "
            f"home=Path({str(flower / 'home')!r}))"
        )
        with subprocess.Popen(
            [PYTHON, "-uc", command], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            # All have to be there first, in whatever order they start.
            names = ("superlink", "flwr", "daemon")
            notes = [flower / f"{name}.pid" for name in names]
            while not all(note.exists() and note.stat().st_size for note in notes):
                time.sleep(0.05)
            process.send_signal(number)
            process.wait()
        for name in names:
            assert stopped(noted(flower, name)), name

    def test_a_program_that_does_not_stop_is_killed(self, tmp_path, monkeypatch):
        stubborn = program(
            tmp_path,
            "stubborn",
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "print(os.getpid(), flush=True)\ntime.sleep(60)",
        )
        with programs.running([stubborn], dict(os.environ), subprocess.PIPE) as process:
            assert process.stdout is not None
            pid = int(process.stdout.readline())
        process.stdout.close()
        assert stopped(pid)

    def test_a_guard_takes_over_the_exit_code(self, tmp_path):
        failing = program(tmp_path, "failing", "sys.exit(3)")
        with programs.running([failing], dict(os.environ), subprocess.PIPE) as process:
            assert process.wait() == 3
        assert process.stdout is not None
        process.stdout.close()
