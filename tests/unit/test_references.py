import copy
import math
import pickle
from dataclasses import FrozenInstanceError
from datetime import timedelta

import pytest

import firefly_jobs
from firefly_jobs import TaskModel, TaskReference
from firefly_jobs.references import timeout_seconds_of
from tests.testapp import tasks


def test_a_reference_is_a_value():
    reference = TaskReference(7, using="other")

    assert reference == TaskReference(7, using="other")
    assert reference != TaskReference(7)
    assert len({reference, TaskReference(7, using="other")}) == 1
    with pytest.raises(FrozenInstanceError):
        reference.id = 8  # type: ignore[misc]


def test_a_reference_can_be_pickled_and_copied():
    reference = TaskReference(7, using="other")

    assert pickle.loads(pickle.dumps(reference)) == reference
    assert copy.deepcopy(reference) == reference


def test_the_alias_is_that_of_the_settings_where_the_reference_is_used(settings):
    reference = TaskReference(7)
    settings.FIREFLY_JOBS = {"DATABASE": "other"}

    assert reference._alias == "other"
    assert TaskReference(7, using="default")._alias == "default"
    assert reference.using is None


@pytest.mark.parametrize("value", ["7", 7.0, None, True])
def test_an_id_that_is_none_is_refused(value):
    with pytest.raises(TypeError, match="id must be a whole number"):
        TaskReference(value)


@pytest.mark.parametrize(
    ("timeout", "seconds"),
    [(None, None), (0, 0.0), (2.5, 2.5), (timedelta(minutes=1), 60.0), (math.inf, math.inf)],
)
def test_a_timeout_is_seconds_or_a_timedelta(timeout, seconds):
    assert timeout_seconds_of(timeout) == seconds


@pytest.mark.parametrize("timeout", [-1, -0.01, math.nan, timedelta(seconds=-1)])
def test_a_timeout_in_the_past_is_refused(timeout):
    with pytest.raises(ValueError, match="timeout must be zero or more seconds"):
        TaskReference(7).wait(timeout)


@pytest.mark.parametrize("timeout", ["5", True, [5]])
def test_a_timeout_that_is_no_duration_is_refused(timeout):
    with pytest.raises(TypeError, match="timeout must be seconds, a timedelta or None"):
        TaskReference(7).wait_finished(timeout)


def test_a_call_that_was_not_scheduled_cannot_be_waited_for():
    for row in (TaskModel(func_name="shop.tasks.send"), tasks.add.row((1,), {})):
        with pytest.raises(ValueError, match="is not scheduled, so it never ends"):
            row.wait()


def test_the_reference_is_public():
    assert firefly_jobs.TaskReference is TaskReference
    assert TaskReference.__module__ == "firefly_jobs.references"
