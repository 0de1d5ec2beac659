import threading
from collections import Counter
from collections.abc import Callable

import pytest

from firefly_jobs.attempts import Claim
from firefly_jobs.holdings import Holdings
from tests.support.threads import Concurrent
from tests.support.waiting import eventually


def claim(number: int, *, fence: int = 1) -> Claim:
    return Claim(
        id=number,
        fence=fence,
        func_name="shop.tasks.charge",
        queue="default",
        priority=0,
        run_at=None,
        raw_params="",
        retry_attempts=0,
        max_retries=0,
        retry_delay=0,
        retry=None,
        rescues=0,
        lost_alone=0,
    )


def make(*, may_start: Callable[[], bool] = lambda: True) -> Holdings:
    return Holdings(may_start=may_start, is_low=lambda: None)


def hold(holdings: Holdings, *numbers: int) -> list[Claim]:
    claims = [claim(number) for number in numbers]
    holdings.hold(claims)
    return claims


def test_claims_are_started_in_the_order_they_came():
    holdings = make()
    claims = hold(holdings, 3, 1, 2)

    assert [holdings.next_sync() for _ in claims] == claims


def test_a_claim_is_held_from_its_coming_until_it_is_settled():
    holdings = make()
    hold(holdings, 1)
    assert (holdings.waiting, holdings.running, holdings.is_empty) == (1, 0, False)

    started = holdings.next_sync()
    assert started is not None
    assert (holdings.waiting, holdings.running, holdings.ids()) == (0, 1, {(1, 1)})
    assert holdings.started() == [started]

    holdings.returned(started)
    assert (holdings.running, holdings.ids()) == (0, {(1, 1)})
    assert holdings.started() == []

    holdings.done(started)
    assert holdings.is_empty
    assert holdings.ids() == set()


def test_a_coroutine_counts_as_running_from_the_start():
    holdings, it = make(), claim(1)

    holdings.hold_started(it)

    assert (holdings.running, holdings.running_async, holdings.started()) == (1, 1, [it])
    holdings.returned(it)
    assert (holdings.running, holdings.running_async) == (0, 0)


def test_a_claim_that_was_put_aside_is_held_but_not_started():
    holdings, it = make(), claim(1)

    holdings.hold_aside(it)

    assert (holdings.waiting, holdings.running, holdings.ids()) == (0, 0, {(1, 1)})
    assert holdings.take_waiting() == []
    holdings.hold([it])
    assert holdings.next_sync() is it


def test_what_is_taken_to_be_released_is_not_started():
    holdings = make()
    claims = hold(holdings, 1, 2, 3)
    first = holdings.next_sync()

    assert holdings.take_waiting() == claims[1:]

    assert holdings.waiting == 0
    assert holdings.ids() == {(1, 1)}
    assert holdings.started() == [first]


def test_only_what_has_waited_for_long_is_taken():
    holdings = make()
    hold(holdings, 1, 2)

    assert holdings.take_waiting(older_than_seconds=60) == []
    assert holdings.waiting == 2


def test_a_lane_ends_once_the_holdings_are_closed_and_nothing_waits():
    holdings = make()
    (it,) = hold(holdings, 1)

    holdings.close()

    assert holdings.next_sync() is it
    assert holdings.next_sync() is None


def test_a_waiting_lane_is_ended_by_close():
    holdings = make()
    lane = Concurrent(holdings.next_sync)

    holdings.close()

    assert lane.result() is None


def test_a_waiting_lane_is_woken_by_new_claims():
    waits = threading.Event()
    holdings = Holdings(may_start=lambda: True, is_low=waits.set)
    lane = Concurrent(holdings.next_sync)
    assert waits.wait(5)

    (it,) = hold(holdings, 1)

    assert lane.result() is it


def test_nothing_is_started_while_the_lease_is_not_fresh():
    asked, is_fresh = threading.Event(), threading.Event()

    def may_start() -> bool:
        asked.set()
        return is_fresh.is_set()

    holdings = make(may_start=may_start)
    (it,) = hold(holdings, 1)
    lane = Concurrent(holdings.next_sync)
    assert asked.wait(5)

    assert holdings.running == 0
    assert holdings.waiting == 1

    is_fresh.set()
    assert lane.result() is it


def test_what_waits_for_a_fresh_lease_can_be_released_before_it_starts():
    asked, is_fresh = threading.Event(), threading.Event()

    def may_start() -> bool:
        asked.set()
        return is_fresh.is_set()

    holdings = make(may_start=may_start)
    claims = hold(holdings, 1)
    lane = Concurrent(holdings.next_sync)
    assert asked.wait(5)

    assert holdings.take_waiting() == claims
    is_fresh.set()
    holdings.close()

    assert lane.result() is None


def test_running_low_is_told_at_half_and_at_none():
    told: list[int] = []
    holdings = Holdings(may_start=lambda: True, is_low=lambda: told.append(holdings.waiting))
    hold(holdings, *range(6))

    for _ in range(6):
        holdings.next_sync()

    assert told == [3, 2, 1, 0]


def test_an_older_claim_of_a_row_does_not_stop_the_holding_of_a_newer_one():
    holdings = make()
    old, new = claim(1, fence=1), claim(1, fence=2)
    holdings.hold([old])
    assert holdings.next_sync() is old
    holdings.hold([new])

    holdings.done(old)

    assert holdings.ids() == {(1, 2)}
    assert holdings.next_sync() is new


def test_the_end_of_an_older_call_of_a_row_is_not_taken_for_the_end_of_a_newer_one():
    holdings = make()
    old, new = claim(1, fence=1), claim(1, fence=2)
    holdings.hold_started(old)
    holdings.hold_started(new)

    holdings.done(old)

    assert holdings.running_async == 1
    assert holdings.started() == [new]


def test_lanes_that_are_busy_for_long_are_counted_until_their_calls_end():
    holdings = make()
    assert holdings.lanes_busy_longer_than(0) == 0

    first, second = hold(holdings, 1, 2)
    may_end = threading.Event()

    def call():
        holdings.next_sync()
        assert may_end.wait(20)

    lanes = [Concurrent(call) for _ in range(2)]

    def both_run():
        assert holdings.lanes_busy_longer_than(0) == 2

    eventually(both_run)
    assert holdings.lanes_busy_longer_than(60) == 0
    holdings.done(first)
    assert holdings.lanes_busy_longer_than(0) == 1
    holdings.returned(second)
    assert holdings.lanes_busy_longer_than(0) == 0
    may_end.set()
    for lane in lanes:
        lane.result()


def test_calls_that_share_a_transaction_keep_one_lane_busy():
    holdings = make()
    hold(holdings, 1, 2, 3)

    holdings.next_sync()
    holdings.next_at_hand(lambda _: True)
    holdings.next_at_hand(lambda _: True)

    assert (holdings.running, holdings.running_lanes) == (3, 1)
    assert holdings.lanes_busy_longer_than(-1) == 1


# --- start or release: one of the two, decided under one lock


def test_a_release_waits_until_the_start_of_the_same_claim_is_decided():
    deciding, decide = threading.Event(), threading.Event()

    def may_start() -> bool:
        deciding.set()
        assert decide.wait(5)
        return True

    holdings = make(may_start=may_start)
    claims = hold(holdings, 1, 2)
    starting = Concurrent(holdings.next_sync)
    assert deciding.wait(5)
    # The lane is between "may I" and "I take it"; the release comes right here.
    releasing = Concurrent(holdings.take_waiting)
    assert releasing.is_running

    decide.set()

    assert starting.result() == claims[0]
    assert releasing.result() == claims[1:]
    assert holdings.ids() == {(1, 1)}


@pytest.mark.parametrize("round_", range(20))
def test_nothing_is_both_started_and_released_and_nothing_is_forgotten(round_):
    holdings, ready = make(), threading.Barrier(3)
    numbers = list(range(300))
    hold(holdings, *numbers)

    def start_all() -> list[int]:
        ready.wait(5)
        started = []
        while (it := holdings.next_sync()) is not None:
            started.append(it.id)
        return started

    def release_all() -> list[int]:
        ready.wait(5)
        return [it.id for _ in range(50) for it in holdings.take_waiting()]

    lanes = [Concurrent(start_all), Concurrent(start_all)]
    releasing = Concurrent(release_all)
    released = releasing.result()
    holdings.close()
    started = [number for lane in lanes for number in lane.result()]

    assert Counter(started + released) == Counter(numbers)
    assert {number for number, _ in holdings.ids()} == set(started)
