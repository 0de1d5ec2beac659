import math
from contextvars import copy_context
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firefly_jobs.attempts import (
    ALONE_AFTER_RESCUES,
    ERROR_LENGTH_MAX,
    TRACEBACK_LENGTH_MAX,
    Claim,
    Ended,
    Outcome,
    Settlement,
    Verdict,
    decide,
    decide_buried,
    decide_rescued,
    describe,
)
from firefly_jobs.contexts import TaskContext, current_task, enter_context
from firefly_jobs.exceptions import (
    DELAY_SECONDS_MAX,
    Cancel,
    LaneTimeoutError,
    Retry,
    Snooze,
    StopRequested,
    TimeLimitExceeded,
)
from firefly_jobs.retries import Exponential, Fixed
from firefly_jobs.states import TRANSITIONS, Status

CLAIM = Claim(
    id=7,
    fence=3,
    func_name="shop.tasks.charge",
    queue="mail",
    priority=0,
    run_at=None,
    raw_params="",
    retry_attempts=0,
    max_retries=2,
    retry_delay=60,
    retry=None,
    rescues=0,
    lost_alone=0,
)
MAX_RESCUES = 3


class Mixin:
    """A base of an exception that is none itself."""


class MixedError(Mixin, ValueError):
    """An error like grpc's, with a base that is no exception."""


class UnprintableError(Exception):
    """An error whose own text raises."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def raised(error: BaseException) -> BaseException:
    try:
        raise error  # noqa: TRY301 - to give it a traceback
    except BaseException as caught:  # noqa: BLE001 - any exception may end an attempt
        return caught


def outcome(error: BaseException | None = None, *, claim: Claim = CLAIM, **facts: Any) -> Outcome:
    return Outcome(claim=claim, duration=1.5, error=error, **facts)


def decided(
    error: BaseException | None = None, *, claim: Claim = CLAIM, **facts: Any
) -> Settlement:
    return decide(outcome(error, claim=claim, **facts), max_rescues=MAX_RESCUES)


def after(settlement: Settlement) -> Claim:
    """Return the claim of the next attempt, as the row would be then."""
    claim = settlement.claim
    return claim._replace(
        fence=claim.fence + 1,
        retry_attempts=claim.retry_attempts + settlement.retries,
        rescues=claim.rescues + settlement.rescues,
        lost_alone=claim.lost_alone + settlement.losses_alone,
    )


# --- decide(): the table


@pytest.mark.parametrize(
    ("error", "facts", "used", "expected"),
    [
        # error, other facts, retries used of 2 -> ended, status, delay, retries, rescues
        (None, {}, 0, (Ended.COMPLETED, Status.COMPLETED, None, 0, 0)),
        (None, {}, 2, (Ended.COMPLETED, Status.COMPLETED, None, 0, 0)),
        (ValueError("x"), {}, 0, (Ended.RETRIED, Status.CREATED, 60, 1, 0)),
        (ValueError("x"), {}, 1, (Ended.RETRIED, Status.CREATED, 60, 1, 0)),
        (ValueError("x"), {}, 2, (Ended.FAILED, Status.FAILED, None, 0, 0)),
        (SystemExit(0), {}, 0, (Ended.RETRIED, Status.CREATED, 60, 1, 0)),
        (KeyboardInterrupt(), {}, 2, (Ended.FAILED, Status.FAILED, None, 0, 0)),
        (Retry(), {}, 0, (Ended.RETRIED, Status.CREATED, 60, 1, 0)),
        (Retry(), {}, 2, (Ended.FAILED, Status.FAILED, None, 0, 0)),
        (Retry(5), {}, 0, (Ended.RETRIED, Status.CREATED, 5, 1, 0)),
        (Retry(0), {}, 1, (Ended.RETRIED, Status.CREATED, 0, 1, 0)),
        (Retry(5), {}, 2, (Ended.FAILED, Status.FAILED, None, 0, 0)),
        (Snooze(9), {}, 0, (Ended.SNOOZED, Status.CREATED, 9, 0, 0)),
        (Snooze(0), {}, 2, (Ended.SNOOZED, Status.CREATED, 0, 0, 0)),
        (Cancel("x"), {}, 0, (Ended.CANCELLED, Status.CANCELLED, None, 0, 0)),
        (Cancel(), {}, 2, (Ended.CANCELLED, Status.CANCELLED, None, 0, 0)),
        (
            StopRequested(),
            {"is_interrupted": True},
            0,
            (Ended.RELEASED, Status.CREATED, None, 0, 0),
        ),
        (
            StopRequested(),
            {"is_interrupted": True, "is_lost": True},
            2,
            (Ended.RELEASED, Status.CREATED, None, 0, 0),
        ),
    ],
)
def test_an_outcome_decides_what_becomes_of_the_row(error, facts, used, expected):
    claim = CLAIM._replace(retry_attempts=used)

    it = decided(error, claim=claim, **facts)

    assert (it.ended, it.status, it.delay_seconds, it.retries, it.rescues) == expected
    assert it.claim == claim
    assert it.duration == 1.5
    assert it.losses_alone == 0


def test_a_result_is_handed_on():
    assert decided(returned="json::0").returned == "json::0"


def test_the_reason_of_a_cancellation_is_kept():
    assert decided(Cancel("sold out")).error == "sold out"
    assert decided(Cancel()).error == "cancelled by the task"


def test_a_snooze_leaves_the_former_error():
    assert decided(Snooze(1)).error is None
    assert decided(Snooze(1)).is_history


def test_a_kind_of_snooze_may_give_a_reason_and_stay_out_of_history():
    class Looked(Snooze):
        reason = "not there yet"
        is_notable = False

    settlement = decided(Looked(5))

    assert (settlement.ended, settlement.status) == (Ended.SNOOZED, Status.CREATED)
    assert (settlement.error, settlement.delay_seconds) == ("not there yet", 5)
    assert not settlement.is_history


def test_a_failure_is_described_with_its_traceback():
    it = decided(raised(ValueError("no card")))

    assert it.error == "ValueError: no card"
    assert it.traceback.startswith("Traceback (most recent call last)")
    assert it.traceback.endswith("ValueError: no card\n")


@pytest.mark.parametrize("kind", [ValueError("x"), Retry(), Retry(5)])
def test_a_row_without_retries_fails_at_once(kind):
    assert decided(kind, claim=CLAIM._replace(max_retries=0)).status is Status.FAILED


def test_a_row_with_a_strategy_is_asked_for_by_it():
    strategy = Exponential(2, base_delay=10, retry_on=(OSError,))
    claim = CLAIM._replace(retry=strategy.to_json(), max_retries=2, retry_delay=0)

    assert decided(OSError(), claim=claim).delay_seconds == 10
    assert decided(OSError(), claim=claim._replace(retry_attempts=1)).delay_seconds == 20
    assert decided(OSError(), claim=claim._replace(retry_attempts=2)).status is Status.FAILED
    assert decided(ValueError(), claim=claim).status is Status.FAILED


def test_a_retry_that_the_task_asks_for_needs_not_be_in_retry_on():
    strategy = Fixed(1, 10, retry_on=(OSError,))
    claim = CLAIM._replace(retry=strategy.to_json(), max_retries=1, retry_delay=0)

    assert decided(Retry(), claim=claim).delay_seconds == 10
    assert decided(Retry(3), claim=claim).delay_seconds == 3
    assert decided(Retry(), claim=claim._replace(retry_attempts=1)).status is Status.FAILED


def test_an_error_with_a_base_that_is_no_exception_is_retried():
    assert decided(MixedError("x")).ended is Ended.RETRIED


@pytest.mark.parametrize(
    "stored",
    ['{"kind":"of.a.module.that.is.gone"}', '{"kind":"fixed","former_word":1}', "not json", "[]"],
)
@pytest.mark.parametrize("error", [ValueError("no card"), Retry()])
def test_a_stored_strategy_that_cannot_be_read_ends_the_attempt_and_not_the_consumer(stored, error):
    it = decided(error, claim=CLAIM._replace(retry=stored))

    assert it.status in {Status.FAILED, Status.CREATED}
    assert it.error


# --- decide(): losses


def lost(claim: Claim = CLAIM) -> Settlement:
    return decided(LaneTimeoutError("gone"), claim=claim, is_lost=True)


def test_a_loss_spends_no_retry():
    it = lost()

    assert (it.ended, it.status, it.retries, it.rescues) == (Ended.LOST, Status.CREATED, 0, 1)
    assert it.error == "LaneTimeoutError: gone"


def test_a_task_that_was_lost_too_often_fails():
    claim, endings = CLAIM._replace(max_retries=0), []
    free = ALONE_AFTER_RESCUES + MAX_RESCUES
    for _ in range(free + 1):
        it = lost(claim)
        endings.append(it.ended)
        claim = after(it)

    assert endings == [Ended.LOST] * free + [Ended.FAILED]


def test_a_task_that_was_lost_too_often_spends_a_retry_if_it_has_one():
    claim = CLAIM._replace(rescues=9, lost_alone=MAX_RESCUES)

    it = lost(claim)

    assert (it.ended, it.retries, it.rescues, it.delay_seconds) == (Ended.RETRIED, 1, 0, 60)


def test_a_call_that_never_started_spends_nothing_and_waits_a_little():
    it = decided(OSError("no connection"), has_started=False)

    assert (it.ended, it.status, it.has_started) == (Ended.RELEASED, Status.CREATED, False)
    assert (it.retries, it.rescues, it.losses_alone) == (0, 0, 0)
    assert it.delay_seconds is not None
    assert 1 <= it.delay_seconds <= 3


def test_two_tasks_that_met_in_a_deadlock_do_not_return_together():
    delays = {lost(CLAIM._replace(id=n)).delay_seconds for n in range(100)}

    assert len(delays) == 100
    assert all(delay is not None and 0.1 <= delay <= 0.3 for delay in delays)


@given(st.integers(1, 2**63 - 1), st.integers(0, 32_766), st.integers(0, 32_767))
def test_a_lost_task_comes_back_within_a_day_however_often_it_may_be_lost(task_id, rescues, more):
    claim = CLAIM._replace(id=task_id, rescues=rescues)

    it = decide(outcome(OSError(), claim=claim, is_lost=True), max_rescues=rescues + 1 + more)

    assert it.delay_seconds is not None
    assert 0 < it.delay_seconds <= 86_400


# --- decide(): whatever happens

errors = st.one_of(
    st.none(),
    st.builds(ValueError, st.text(max_size=5)),
    st.builds(Retry, st.none() | st.floats(0, 100) | st.timedeltas(timedelta(0), timedelta(9))),
    st.builds(Snooze, st.floats(0, 100)),
    st.builds(Cancel, st.text(max_size=5)),
    st.builds(SystemExit),
)
claims = st.builds(
    CLAIM._replace,
    max_retries=st.integers(0, 5),
    retry_delay=st.integers(0, 100),
    retry=st.none() | st.builds(lambda n: Fixed(n, 1).to_json(), st.integers(0, 5)),
).map(
    # The column tells the same as the strategy, see TaskOptions.effective_max_retries.
    lambda c: c if c.retry is None else c._replace(max_retries=c.strategy().retries_max)
)


@given(claims, st.lists(st.tuples(errors, st.booleans(), st.booleans()), max_size=40))
def test_no_history_of_attempts_spends_more_retries_or_losses_than_allowed(claim, history):
    retries, losses = 0, 0
    for error, is_lost, is_interrupted in history:
        it = decide(
            outcome(error, claim=claim, is_lost=is_lost, is_interrupted=is_interrupted),
            max_rescues=MAX_RESCUES,
        )
        retries += it.retries
        losses += it.rescues
        assert it.status in TRANSITIONS[Status.RUNNING]
        assert it.retries in {0, 1}
        assert (it.retries == 1) == (it.ended is Ended.RETRIED)
        assert it.delay_seconds is None or 0 <= it.delay_seconds < DELAY_SECONDS_MAX
        assert (it.delay_seconds is None) or it.status is Status.CREATED
        if it.status is not Status.CREATED:
            break
        claim = after(it)

    assert retries <= claim.max_retries
    # What was lost among others is free; while alone, MAX_RESCUES losses are.
    assert losses <= ALONE_AFTER_RESCUES + MAX_RESCUES + 1


@given(claims, st.booleans())
def test_exactly_max_retries_retries_follow_the_first_attempt(claim, asks):
    attempts = 0
    while True:
        attempts += 1
        it = decided(Retry(0) if asks else ValueError(), claim=claim)
        if it.status is Status.FAILED:
            break
        claim = after(it)

    assert attempts == claim.max_retries + 1
    assert claim.attempt == attempts


@given(claims, st.integers(1, 50))
def test_snoozing_never_spends_anything(claim, times):
    for _ in range(times):
        it = decided(Snooze(timedelta(seconds=1)), claim=claim)
        assert (it.ended, it.delay_seconds) == (Ended.SNOOZED, 1)
        claim = after(it)

    assert (claim.retry_attempts, claim.rescues, claim.lost_alone) == (0, 0, 0)
    assert claim.attempt == 1


# --- what the death of a consumer means


def rescued(claim: Claim, *, was_alone: bool) -> Settlement:
    return decide_rescued(claim, was_alone=was_alone, consumer="web1:7 #4", max_rescues=MAX_RESCUES)


@pytest.mark.parametrize("was_alone", [True, False])
@pytest.mark.parametrize("rescues", [0, 1])
def test_the_first_two_deaths_blame_nobody(rescues, was_alone):
    it = rescued(CLAIM._replace(rescues=rescues), was_alone=was_alone)

    assert (it.ended, it.status) == (Ended.LOST, Status.CREATED)
    assert (it.retries, it.rescues, it.losses_alone) == (0, 1, 0)
    assert it.delay_seconds is None


def test_a_task_runs_alone_from_its_second_loss_on():
    assert [CLAIM._replace(rescues=n).runs_alone for n in range(4)] == [False, False, True, True]


def test_a_death_while_alone_is_counted_and_the_one_too_many_fails():
    claim, history = CLAIM, []
    for _ in range(2 + MAX_RESCUES + 1):
        it = rescued(claim, was_alone=True)
        history.append((it.ended, it.losses_alone))
        claim = after(it)

    assert history == [(Ended.LOST, 0)] * 2 + [(Ended.LOST, 1)] * 3 + [(Ended.FAILED, 1)]
    assert "web1:7 #4" in (it.error or "")
    assert "4 times while nothing else ran" in (it.error or "")


def test_a_task_that_always_has_neighbours_when_its_consumer_dies_never_fails_for_it():
    claim = CLAIM
    for _ in range(100):
        it = rescued(claim, was_alone=False)
        assert it.status is Status.CREATED
        claim = after(it)

    assert (claim.rescues, claim.lost_alone) == (100, 0)


@given(st.integers(0, 200), st.integers(0, 200), st.booleans())
def test_a_rescue_spends_no_retry_and_fails_only_after_losses_alone(rescues, alone, was_alone):
    claim = CLAIM._replace(rescues=rescues, lost_alone=alone)

    it = rescued(claim, was_alone=was_alone)

    assert it.retries == 0
    assert it.rescues == 1
    assert it.losses_alone == int(was_alone and rescues >= 2)
    assert (it.status is Status.FAILED) == (alone + it.losses_alone > MAX_RESCUES)
    assert it.error is not None
    assert it.error.startswith("ConsumerLost: Consumer web1:7 #4 disappeared")


# --- what is written about an error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no card"), "ValueError: no card"),
        (ValueError(), "ValueError"),
        (ValueError("a\0b"), "ValueError: a\\0b"),
        (ValueError("a\ud800b"), "ValueError: a\\ud800b"),
        (UnprintableError(), "UnprintableError (its text raised RuntimeError)"),
    ],
)
def test_an_error_is_described_in_text_that_every_database_takes(error, line):
    assert describe(error) == line


@given(st.text(st.characters()))
def test_no_text_of_an_error_is_too_long_or_cannot_be_stored(text):
    it = decided(raised(ValueError(text * 50)), claim=CLAIM._replace(max_retries=0))

    for stored in (it.error or "", it.traceback):
        stored.encode()
        assert "\0" not in stored


def test_a_long_error_and_a_long_traceback_are_cut():
    def deep(levels: int) -> None:
        if levels:
            deep(levels - 1)
        raise ValueError("end of it")

    try:
        deep(300)
    except ValueError as error:
        error.__cause__ = raised(KeyError("x" * 200_000))
        it = decided(error)

    assert len(describe(ValueError("x" * 100_000))) <= ERROR_LENGTH_MAX
    assert len(it.traceback) <= TRACEBACK_LENGTH_MAX
    assert it.traceback.endswith("end of it\n")


def test_an_error_that_cannot_be_printed_still_settles():
    it = decided(raised(UnprintableError()))

    assert it.status is Status.CREATED
    assert it.error == "UnprintableError (its text raised RuntimeError)"
    assert "UnprintableError" in it.traceback


# --- the claim and its context


def test_attempts_are_counted_from_one():
    assert CLAIM.attempt == 1
    assert CLAIM._replace(retry_attempts=2).attempt == 3


def test_a_claim_without_a_strategy_has_that_of_its_columns():
    assert CLAIM.strategy() == Fixed(2, 60)


def test_current_task_is_known_inside_a_call_only():
    task: Any = object()
    context = TaskContext(task, CLAIM, (1,), {"b": 2})

    def call() -> None:
        enter_context(context)
        it = current_task()
        assert (it.id, it.func_name, it.queue, it.attempt, it.fence) == (
            7,
            "shop.tasks.charge",
            "mail",
            1,
            3,
        )
        assert (it.task, it.args, it.kwargs) == (task, (1,), {"b": 2})
        assert current_task(None) is context

    copy_context().run(call)

    assert current_task(None) is None
    with pytest.raises(LookupError, match=r"outside of a running task.*current_task\(None\)"):
        current_task()


def test_a_context_loads_a_cached_value_once():
    context = TaskContext(object(), CLAIM, (), {})  # type: ignore[arg-type]
    loads: list[int] = []

    def load() -> int:
        loads.append(1)
        return 0

    assert [context.cached("rate", load), context.cached("rate", load)] == [0, 0]
    assert loads == [1]
    assert context.cache == {"rate": 0}
    assert TaskContext(object(), CLAIM, (), {}).cache == {}  # type: ignore[arg-type]


def test_a_settlement_cannot_be_changed():
    with pytest.raises(AttributeError):
        decided().status = Status.FAILED  # type: ignore[misc]
    assert replace(outcome(), is_lost=True).is_lost
    assert math.isfinite(decided().duration)


# --- what a supervisor ended


def verdict(*, fence: int = CLAIM.fence) -> Verdict:
    return Verdict(
        task_id=CLAIM.id, fence=fence, error=TimeLimitExceeded("after 5.0s"), duration=5.0
    )


def buried(claim: Claim, why: Verdict) -> Settlement:
    return decide_buried(claim, why, consumer="host:1 #4", max_rescues=MAX_RESCUES)


def test_call_beyond_its_limit_is_decided_like_any_failure():
    settlement = buried(CLAIM, verdict())

    assert (settlement.ended, settlement.retries, settlement.duration) == (Ended.RETRIED, 1, 5.0)
    assert settlement.error == "TimeLimitExceeded: after 5.0s"
    assert buried(CLAIM._replace(retry_attempts=2), verdict()).ended is Ended.FAILED


@pytest.mark.parametrize("claim", [CLAIM._replace(id=8), CLAIM._replace(fence=4)])
def test_neighbour_of_a_call_beyond_its_limit_counts_nothing(claim):
    settlement = buried(claim._replace(rescues=5, lost_alone=3), verdict())

    assert (settlement.ended, settlement.status) == (Ended.LOST, Status.CREATED)
    assert (settlement.retries, settlement.rescues, settlement.losses_alone) == (0, 0, 0)
    assert "because of task 7" in (settlement.error or "")
