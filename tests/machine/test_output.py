"""What compiled code prints, beside what others do."""

from __future__ import annotations

import ctypes
import os

import pytest

from lola_flwr.machine.output import stdout_without


def test_lines_that_begin_so_are_left_out_and_all_others_stay(capfd):
    print("before", flush=True)
    with stdout_without("Highs"):
        ctypes.CDLL(None).puts(b"Highs::run();")
        print("meanwhile", flush=True)
        os.write(1, b"by Highs\nHighs again\n")
        os.write(2, b"an error\n")
    print("after", flush=True)
    assert capfd.readouterr() == ("before\nmeanwhile\nby Highs\nafter\n", "an error\n")


def test_what_raises_leaves_the_output_as_it_was(capfd):
    with pytest.raises(KeyError), stdout_without("Highs"):
        print("meanwhile", flush=True)
        raise KeyError
    print("after", flush=True)
    assert capfd.readouterr().out == "meanwhile\nafter\n"
