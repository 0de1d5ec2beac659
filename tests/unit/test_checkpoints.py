import os
import signal
import subprocess
import sys
import threading

import pytest

from firefly_jobs import checkpoints
from firefly_jobs.checkpoints import CHECKPOINTS, _parse, reach


@pytest.fixture
def sent(monkeypatch):
    """Collect the signals that would end this process."""
    signals: list[tuple[int, int]] = []
    monkeypatch.setattr(
        signal, "pthread_kill", lambda thread, number: signals.append((thread, number))
    )
    return signals


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_checkpoint_can_be_armed_both_ways(name):
    assert _parse(f"{name}:kill")[name][0] == signal.SIGKILL
    assert _parse(f"{name}:stop")[name][0] == signal.SIGSTOP


def test_several_checkpoints_can_be_armed():
    armed = _parse("claimed:stop,settling:kill:2,")
    assert {name: number for name, (number, _) in armed.items()} == {
        "claimed": signal.SIGSTOP,
        "settling": signal.SIGKILL,
    }
    assert _parse("") == {}


@pytest.mark.parametrize(
    "text", ["settle:kill", "settling", "settling:", "settling:term", ":kill", "settling:kill:x"]
)
def test_a_misspelt_checkpoint_is_a_mistake_in_the_test_and_said_to_be(text):
    with pytest.raises(ValueError, match=r"FIREFLY_CHECKPOINT: .* is not NAME:kill or NAME:stop"):
        _parse(text)


def test_an_armed_checkpoint_signals_this_process_the_first_time_only(monkeypatch, sent):
    monkeypatch.setattr(checkpoints, "_armed", _parse("settling:stop"))

    reach("claimed")
    assert sent == []
    reach("settling")
    reach("settling")

    assert sent == [(threading.get_ident(), signal.SIGSTOP)]


def test_a_checkpoint_with_a_count_waits_for_that_time(monkeypatch, sent):
    monkeypatch.setattr(checkpoints, "_armed", _parse("settling:kill:3"))

    seen = []
    for _ in range(5):
        reach("settling")
        seen.append(len(sent))

    assert seen == [0, 0, 1, 1, 1]


def test_no_checkpoint_is_armed_here():
    assert checkpoints._armed == {}


def test_a_process_is_armed_by_its_environment():
    code = "from firefly_jobs.checkpoints import reach; reach('claimed'); reach('settled')"

    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FIREFLY_CHECKPOINT": "settled:kill"},
        check=False,
    )

    assert ended.returncode == -signal.SIGKILL
