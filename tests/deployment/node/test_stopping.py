"""Signals end a node between two messages."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from lola_flwr.deployment.node import stopping
from lola_flwr.deployment.node.stopping import Stop, Stopped


@pytest.fixture
def stop():
    stop = Stop()
    before = signal.signal(signal.SIGUSR1, stop.on_signal)
    yield stop
    signal.signal(signal.SIGUSR1, before)


def ask(delay_s):
    threading.Timer(delay_s, os.kill, [os.getpid(), signal.SIGUSR1]).start()


def test_the_first_is_noted_and_ends_a_sleep(stop):
    ask(0.05)
    begun = time.monotonic()
    stop.sleep(30)
    assert stop.is_asked
    assert time.monotonic() - begun < 20
    stop.sleep(30)


def test_the_second_ends_at_once(stop):
    signal.raise_signal(signal.SIGUSR1)
    with pytest.raises(Stopped):
        signal.raise_signal(signal.SIGUSR1)


def test_a_superlink_that_does_not_answer_is_not_waited_for(stop, monkeypatch):
    with stop.asking():
        signal.raise_signal(signal.SIGUSR1)
    assert stop.is_asked
    stop.is_asked = False
    monkeypatch.setattr(stopping, "_ANSWERS_WITHIN_S", 0.01)
    with pytest.raises(Stopped), stop.asking():
        time.sleep(0.05)
        signal.raise_signal(signal.SIGUSR1)
