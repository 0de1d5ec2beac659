from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firefly_jobs import Priority
from firefly_jobs.priorities import BANDS, as_number, at_least, bands


def test_names_members_and_numbers_mean_the_same():
    for name, number in {"critical": 100, "high": 50, "normal": 0, "low": -50}.items():
        assert as_number(name) == as_number(Priority[name.upper()]) == as_number(number) == number
    assert type(as_number(Priority.HIGH)) is int


def test_an_unknown_name_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match=r"no priority 'hgih', only .*Did you mean 'high'"):
        as_number("hgih")


@given(st.integers(-100, 100))
def test_every_number_is_in_exactly_one_band(number):
    assert sum(low <= number <= high for low, high in BANDS.values()) == 1


@pytest.mark.parametrize(
    ("served", "expected"),
    [
        (["low", "background"], [(-100, -1)]),
        (["critical", "low"], [(100, 100), (-50, -1)]),
        ([Priority.HIGH], [(50, 99)]),
        ([50], [(50, 50)]),
        (["-50..100"], [(-50, 100)]),
        (["5", "7..9", "6"], [(5, 9)]),
        ([(-3, 4), "0..2"], [(-3, 4)]),
        (list(BANDS), [(-100, 100)]),
        (["0..0", "2..2"], [(2, 2), (0, 0)]),
    ],
)
def test_bands_are_merged_and_sorted(served, expected):
    assert list(bands(served)) == expected


@given(st.lists(st.tuples(st.integers(-100, 100), st.integers(-100, 100)).map(sorted), min_size=1))
def test_merged_bands_serve_the_same_numbers(pairs):
    def numbers(found):
        return {n for low, high in found for n in range(low, high + 1)}

    merged = bands(map(tuple, pairs))
    assert numbers(merged) == numbers(pairs)
    assert all(lower[1] < upper[0] - 1 for upper, lower in pairwise(merged))


@pytest.mark.parametrize(
    ("served", "message"),
    [
        (["lwo"], "no band 'lwo'; give one of critical.*Did you mean 'low'"),
        (["5..1"], "so 5..1 is empty"),
        (["0..101"], "between -100 and 100, got 101"),
        ([], "at least one band"),
        (["1-5"], "no band '1-5'"),
    ],
)
def test_what_is_no_band_is_refused(served, message):
    with pytest.raises(ValueError, match=message):
        bands(served)


def test_from_a_priority_upwards():
    assert at_least("high") == (50, 100)
    assert at_least("low") == (-50, 100)
    assert at_least("10") == (10, 100)
