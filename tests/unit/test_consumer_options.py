"""What a consumer may be told, and how it says that it may not."""

from datetime import timedelta

import pytest

from firefly_jobs import Consumer
from firefly_jobs.consumer_options import count, queue_names, shutdown_seconds


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"queues": "mail"}, TypeError, "queues must be a list of names, got 'mail' of type str"),
        (
            {"queues": b"mail"},
            TypeError,
            "queues must be a list of names, got b'mail'",
        ),
        ({"queues": {"mail"}}, TypeError, "queues must be a list of names, got {'mail'}"),
        ({"queues": 5}, TypeError, "queues must be a list of names, got 5 of type int"),
        ({"queues": []}, ValueError, r"queues must name a queue at least, got \[\]"),
        ({"queues": ["a,b"]}, ValueError, "queue must have 1 to 100 characters, no comma"),
        ({"queues": ["mail", ""]}, ValueError, "queue must have 1 to 100 characters"),
        ({"queues": ["mail", None]}, TypeError, "queue must be a string, got None"),
        ({"threads": 0}, ValueError, "threads must be 1 or more, got 0"),
        ({"threads": 1.5}, TypeError, "threads must be a whole number, got 1.5 of type float"),
        ({"threads": True}, TypeError, "threads must be a whole number, got True"),
        ({"max_tasks": 0}, ValueError, "max_tasks must be 1 or more, got 0"),
        ({"max_memory_mb": -1}, ValueError, "max_memory_mb must be 1 or more, got -1"),
        ({"async_slots": -1}, ValueError, "async_slots must be 1 or more, got -1"),
        ({"async_slots": 0}, ValueError, "async_slots must be 1 or more, got 0"),
        ({"async_connections": "8"}, TypeError, "async_connections must be a whole number"),
        ({"shutdown_timeout": -1}, ValueError, "shutdown_timeout must be zero or more seconds"),
        ({"shutdown_timeout": float("nan")}, ValueError, "shutdown_timeout must be zero or more"),
        ({"shutdown_timeout": "5"}, TypeError, "shutdown_timeout must be seconds or a timedelta"),
        (
            {"queue_order": "fiar"},
            ValueError,
            "queue_order must be one of 'strict', 'fair', got 'fiar'. Did you mean 'fair'?",
        ),
    ],
)
def test_a_consumer_says_which_argument_it_cannot_mean(arguments, error, message):
    with pytest.raises(error, match=message.replace("?", r"\?")):
        Consumer(**arguments)


def test_what_a_consumer_was_not_told_is_looked_up_in_the_settings(settings):
    settings.FIREFLY_JOBS = {"DEFAULT_QUEUE": "mail", "SHUTDOWN_TIMEOUT": 7}

    assert queue_names(None) == ["mail"]
    assert shutdown_seconds(None) == 7
    assert count("threads", None, 3) == 3


def test_what_a_consumer_was_told_counts():
    assert queue_names(("mail", "*")) == ["mail", "*"]
    assert shutdown_seconds(timedelta(minutes=1)) == 60.0
    assert shutdown_seconds(0) == 0
    assert count("threads", 4, 1) == 4
