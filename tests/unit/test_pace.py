import pytest
from hypothesis import given
from hypothesis import strategies as st

from firefly_jobs.pace import BATCH_MAX, BATCH_SECONDS, Pace


def settled(pace: Pace, *, duration: float, calls: int = 300) -> Pace:
    for _ in range(calls):
        pace.observe(duration)
    return pace


def batches(pace: Pace, count: int, *, slots: int = 1) -> list[int]:
    found = []
    for _ in range(count):
        found.append(pace.next_batch(slots))
        pace.claimed(found[-1])
    return found


def test_the_first_batch_is_one():
    assert Pace().next_batch(1) == 1


def test_a_batch_at_most_doubles():
    assert batches(settled(Pace(), duration=0), 10) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 500]


@pytest.mark.parametrize(
    ("slots", "duration", "batch"), [(1, 0.01, 10), (4, 0.01, 40), (1, 0.05, 2), (10, 1, 1)]
)
def test_a_batch_grows_to_what_the_slots_finish_in_a_tenth_of_a_second(slots, duration, batch):
    assert batches(settled(Pace(), duration=duration), 20, slots=slots)[-1] == pytest.approx(
        batch, abs=1
    )


def test_asking_without_claiming_changes_nothing():
    pace = settled(Pace(), duration=0)

    assert [pace.next_batch(1) for _ in range(5)] == [1] * 5


def test_slow_calls_bring_the_batch_down_at_once():
    pace = settled(Pace(), duration=0.001)
    assert batches(pace, 20)[-1] >= 95

    pace.observe(60)

    assert pace.next_batch(1) == 1


def test_the_average_forgets():
    pace = settled(Pace(), duration=60, calls=1)

    settled(pace, duration=0.001)

    assert batches(pace, 20)[-1] >= 90


@given(
    st.integers(1, 1_000),
    st.lists(st.none() | st.floats(0, 1e6) | st.integers(0, 100_000), max_size=60),
)
def test_a_batch_always_has_one_member_and_never_too_many(slots, events):
    pace, former = Pace(), 1
    for duration in events:
        if duration is not None:
            pace.observe(duration)
            continue
        batch = pace.next_batch(slots)
        pace.claimed(batch)
        assert 1 <= batch <= min(BATCH_MAX, 2 * former)
        former = batch


def test_tasks_as_long_as_a_whole_batch_are_claimed_one_by_one():
    assert batches(settled(Pace(), duration=BATCH_SECONDS * 1.01), 5) == [1] * 5
