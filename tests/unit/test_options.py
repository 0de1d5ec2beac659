import math
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.test import override_settings
from hypothesis import given
from hypothesis import strategies as st

from firefly_jobs.options import FIXED, TaskOptions, check_eta, check_name, check_queue, check_words
from firefly_jobs.retries import Exponential, Fixed, RandomDelay

ETA = datetime(2026, 5, 1, 12, tzinfo=UTC)


@given(st.integers(-100, 100))
def test_every_priority_in_range_is_taken(priority):
    assert TaskOptions(priority=priority).priority == priority


@pytest.mark.parametrize("priority", [101, -101, 10**9])
def test_priority_out_of_range_is_refused(priority):
    with pytest.raises(ValueError, match=rf"priority must be between -100 and 100, got {priority}"):
        TaskOptions(priority=priority)


@pytest.mark.parametrize("priority", ["5", True, False, 1.0, None])
def test_priority_that_is_no_whole_number_is_refused(priority):
    with pytest.raises(TypeError, match=rf"priority must be a whole number, got {priority!r}"):
        TaskOptions(priority=priority)


@pytest.mark.parametrize("queue", ["a", "mail", "q" * 100, "with space", "UPPER", "données"])
def test_a_queue_may_have_any_plain_name(queue):
    assert TaskOptions(queue=queue).queue == queue


@pytest.mark.parametrize("queue", [5, b"mail", ["mail"], True])
def test_a_queue_that_is_no_string_is_refused(queue):
    with pytest.raises(TypeError, match=r"queue must be a string, got .* of type"):
        TaskOptions(queue=queue)


@pytest.mark.parametrize("queue", ["", "a,b", ",", "*", " mail", "mail ", "\t", "q" * 101])
def test_a_queue_that_the_consumer_could_not_be_told_is_refused(queue):
    with pytest.raises(ValueError, match="queue must have 1 to 100 characters, no comma") as caught:
        check_queue(queue)

    assert repr(queue) in str(caught.value)


def test_a_queue_with_a_nul_character_is_refused():
    with pytest.raises(ValueError, match="queue must"):
        check_queue("ma\0il")


def test_an_aware_eta_is_taken():
    assert TaskOptions(eta=ETA).eta == ETA
    check_eta(None)


def test_a_naive_eta_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"eta must be timezone-aware.*timezone\.now\(\)"):
        TaskOptions(eta=datetime(2026, 5, 1, 12))  # noqa: DTZ001 - naive is the point


@pytest.mark.parametrize("eta", [date(2026, 5, 1), timedelta(hours=1), 60, "2026-05-01", True])
def test_an_eta_that_is_no_datetime_is_refused_with_the_remedy(eta):
    with pytest.raises(TypeError, match=r"eta must be a timezone-aware datetime.*For a delay, pas"):
        TaskOptions(eta=eta)


@pytest.mark.parametrize("words", [{"max_retries": 3}, {"retry_delay": 5}, {"max_retries": 0}])
def test_a_strategy_and_the_plain_words_exclude_each_other(words):
    with pytest.raises(ValueError, match=r"Give either retry= or max_retries= and retry_delay="):
        TaskOptions(retry=Fixed(3), **words)


@pytest.mark.parametrize("retry", [3, "fixed", Fixed, {"kind": "fixed"}])
def test_retry_that_is_no_strategy_is_refused(retry):
    with pytest.raises(TypeError, match=r"retry must be a strategy such as Fixed\(3\), got"):
        TaskOptions(retry=retry)


@pytest.mark.parametrize("value", ["3", True, 1.5, [3]])
def test_max_retries_that_is_no_count_is_refused(value):
    with pytest.raises(TypeError, match="max_retries must be a whole number, got"):
        TaskOptions(max_retries=value)


@pytest.mark.parametrize("value", [-1, 32_768])
def test_max_retries_that_does_not_fit_the_row_is_refused(value):
    with pytest.raises(ValueError, match=f"max_retries must be between 0 and 32767, got {value}"):
        TaskOptions(max_retries=value)


@pytest.mark.parametrize("value", ["5", True, [5]])
def test_retry_delay_that_is_no_duration_is_refused(value):
    with pytest.raises(TypeError, match="retry_delay must be seconds or a timedelta, got"):
        TaskOptions(retry_delay=value)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, 2**31, timedelta(days=40_000)])
def test_retry_delay_that_does_not_fit_the_row_is_refused(value):
    with pytest.raises(ValueError, match="retry_delay must be zero or more seconds, at most"):
        TaskOptions(retry_delay=value)


@pytest.mark.parametrize("value", ["yaml", "", "PICKLE", 5, ["json"]])
def test_an_unknown_serializer_is_refused_with_those_there_are(value):
    with pytest.raises(
        (ValueError, TypeError), match=r"serializer must be one of \['json', 'pickle'\], got"
    ):
        TaskOptions(serializer=value)


@pytest.mark.parametrize("word", ["atomic", "takes_context"])
@pytest.mark.parametrize("value", [1, 0, "yes", None])
def test_a_flag_must_be_true_or_false(word, value):
    words: dict[str, Any] = {word: value}

    with pytest.raises(TypeError, match=rf"{word} must be True or False, got {value!r}"):
        TaskOptions(**words)


@pytest.mark.parametrize("value", [5, b"default", ["default"]])
def test_a_database_that_is_no_alias_is_refused(value):
    with pytest.raises(TypeError, match="database must be an alias of DATABASES, got"):
        TaskOptions(database=value)


@pytest.mark.parametrize("value", ["", 5, "n" * 201])
def test_a_name_that_does_not_fit_the_row_is_refused(value):
    with pytest.raises(TypeError, match="name must be a string of 1 to 200 characters, got"):
        check_name(value)
    with pytest.raises(TypeError, match="name must be a string of 1 to 200 characters, got"):
        TaskOptions(aliases=(value,))


def test_aliases_given_as_one_string_are_refused():
    with pytest.raises(TypeError, match=r"aliases must be a list of names, got .*'former'"):
        TaskOptions(aliases="former")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("prioritty", " Did you mean 'priority'?"),
        ("max_retry", " Did you mean 'max_retries'?"),
        ("serialiser", " Did you mean 'serializer'?"),
        ("zzz", ""),
    ],
)
def test_an_unknown_word_is_refused_with_a_suggestion(word, hint):
    with pytest.raises(TypeError) as caught:
        check_words({"queue": "mail", word: 1})

    assert str(caught.value) == f"There is no task option {word!r}.{hint}"


@pytest.mark.parametrize("retry_on", [(5,), (object,), 5])
def test_retry_on_that_names_no_exceptions_is_refused(retry_on):
    with pytest.raises(TypeError, match="retry_on takes exception classes, got"):
        TaskOptions(retry_on=retry_on)


def test_retry_on_takes_one_class_as_well():
    assert TaskOptions(retry_on=OSError).retry_on == ("builtins.OSError",)  # type: ignore[arg-type]


# --- copies for one call


def test_using_returns_a_copy_and_leaves_the_original():
    options = TaskOptions(queue="mail", priority=5)

    copy = options.using(queue="slow", eta=ETA)

    assert (copy.queue, copy.priority, copy.eta) == ("slow", 5, ETA)
    assert (options.queue, options.priority, options.eta) == ("mail", 5, None)


@pytest.mark.parametrize("word", sorted(FIXED))
def test_using_refuses_what_belongs_to_the_function(word):
    with pytest.raises(TypeError, match=f"{word} belongs to the function; set it in the decorator"):
        TaskOptions().using(**{word: "anything"})


def test_using_refuses_an_unknown_word_with_a_suggestion():
    with pytest.raises(TypeError, match=r"no task option 'que'\. Did you mean 'queue'"):
        TaskOptions().using(que="mail")


def test_using_checks_its_values_like_the_decorator():
    with pytest.raises(ValueError, match="priority must be between"):
        TaskOptions().using(priority=101)


def test_the_later_of_strategy_and_plain_words_wins():
    plain, with_strategy = TaskOptions(max_retries=5, retry_delay=1), TaskOptions(retry=Fixed(2))

    assert plain.using(retry=Fixed(3)).effective_max_retries == 3
    assert with_strategy.using(max_retries=7).effective_max_retries == 7
    assert with_strategy.using(max_retries=7).retry is None
    assert with_strategy.using(queue="mail").retry == Fixed(2)


# --- what a row is given


def test_a_row_without_retry_words_follows_the_settings():
    with override_settings(FIREFLY_JOBS={"MAX_RETRIES": 4, "RETRY_DELAY": timedelta(minutes=1)}):
        options = TaskOptions()
        assert options.effective_retry is None
        assert options.effective_max_retries == 4
        assert options.effective_retry_delay == 60


def test_the_documented_defaults_are_no_retry_after_two_minutes():
    assert TaskOptions().effective_max_retries == 0
    assert TaskOptions().effective_retry_delay == 120


def test_zero_retries_is_not_mistaken_for_the_setting():
    with override_settings(FIREFLY_JOBS={"MAX_RETRIES": 4, "RETRY_DELAY": 60}):
        options = TaskOptions(max_retries=0, retry_delay=0)
        assert (options.effective_max_retries, options.effective_retry_delay) == (0, 0)


@pytest.mark.parametrize(
    ("given", "stored"), [(0, 0), (0.2, 1), (1, 1), (timedelta(milliseconds=1500), 2)]
)
def test_a_retry_delay_is_rounded_up_to_whole_seconds(given, stored):
    assert TaskOptions(retry_delay=given).effective_retry_delay == stored


def test_a_strategy_fills_the_columns_as_far_as_they_can_tell():
    options = TaskOptions(retry=Exponential(5, base_delay=2))

    assert options.effective_retry == Exponential(5, base_delay=2)
    assert options.effective_max_retries == 5
    assert options.effective_retry_delay == 0


def test_retry_on_makes_a_strategy_of_the_plain_words():
    options = TaskOptions(max_retries=2, retry_delay=3, retry_on=(OSError,))

    assert options.effective_retry == Fixed(2, 3, retry_on=("builtins.OSError",))


def test_retry_on_of_the_task_narrows_its_strategy():
    options = TaskOptions(retry=RandomDelay(2, retry_on=(KeyError,)), retry_on=(OSError,))

    assert options.effective_retry == RandomDelay(2, retry_on=("builtins.OSError",))


def test_options_cannot_be_changed():
    with pytest.raises(AttributeError):
        TaskOptions().queue = "mail"  # type: ignore[misc]


@pytest.mark.parametrize(
    "eta",
    [
        datetime.min.replace(tzinfo=ZoneInfo("Europe/Oslo")),
        datetime.max.replace(tzinfo=ZoneInfo("America/New_York")),
        datetime(9999, 12, 31, 23, tzinfo=UTC),
    ],
)
def test_an_eta_that_not_every_database_can_store_is_refused(eta):
    with pytest.raises(ValueError, match="eta must lie between"):
        TaskOptions(eta=eta)


def test_attempts_are_retries_and_one():
    assert TaskOptions(max_attempts=3) == TaskOptions(max_retries=2)
    assert TaskOptions(max_retries=5).using(max_attempts=1).max_retries == 0
    assert TaskOptions(max_attempts=5).using(max_retries=1).max_retries == 1
    assert TaskOptions(retry=Fixed(3)).using(max_attempts=2).retry is None
    assert TaskOptions(max_attempts=5).using(retry=Fixed(3)).effective_max_retries == 3


@pytest.mark.parametrize("words", [{"max_retries": 2}, {"retry": Fixed(2)}])
def test_attempts_exclude_other_ways_to_say_it(words):
    with pytest.raises(ValueError, match=r"Give either .*max_attempts="):
        TaskOptions(max_attempts=3, **words)
    with pytest.raises(ValueError, match="max_attempts must be between 1 and"):
        TaskOptions(max_attempts=0)


def test_metadata_is_a_copy_as_json_gives_it_back():
    given = {"a": (1, 2), "b": {"c": None}}
    options = TaskOptions(metadata=given)
    given["a"] = ()

    assert options.metadata == {"a": [1, 2], "b": {"c": None}}


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"metadata": {"a": object()}}, TypeError, "metadata must be what JSON can hold"),
        ({"metadata": {"a": float("nan")}}, ValueError, "metadata must be what JSON can hold"),
        ({"metadata": [1]}, TypeError, "metadata must be a dictionary"),
        ({"metadata": {"a": "x" * 70_000}}, ValueError, "metadata may take 65,536 characters"),
        ({"metadata": {"a": "\0"}}, ValueError, "a character that no database stores"),
        ({"metadata": {"a": "\ud800"}}, ValueError, "a character that no database stores"),
        ({"tags": "abc"}, TypeError, "tags must be a list of words, got 'abc'"),
        ({"tags": [1]}, TypeError, "A tag must be text, got 1"),
        ({"tags": [""]}, ValueError, "A tag must have 1 to 100 characters, got 0"),
        ({"tags": map(str, range(101))}, ValueError, "100 tags at most, got 101"),
        ({"label": "x" * 201}, ValueError, "label must have 0 to 200 characters, got 201"),
        ({"label": None}, TypeError, "label must be text"),
        ({"description": "x" * 2001}, ValueError, "description must have 0 to 2,000"),
        ({"unique_key": ""}, ValueError, "unique_key must have 1 to 255 characters, got 0"),
        ({"unique_key": "x" * 256}, ValueError, "1 to 255 characters, got 256. .*sha256"),
        ({"unique_key": str}, TypeError, "unique_key (is|takes) .* as in lambda user_id"),
        ({"unique_key": lambda *a: "k"}, TypeError, "unique_key takes arguments by position"),
        ({"unique_key": "x "}, ValueError, "must not begin or end with white space"),
        ({"unique_key": "x\0y"}, ValueError, "a character that no database stores"),
        ({"unique_key": 5}, TypeError, "unique_key must be text or a callable .* got a int"),
        ({"on_conflict": "retrun"}, ValueError, "on_conflict must be one of .*mean 'return'"),
        ({"expires": datetime(2031, 1, 1)}, ValueError, "expires must be timezone-aware"),  # noqa: DTZ001 - the mistake
        ({"expires": "soon"}, TypeError, "expires must be seconds or a timedelta"),
        ({"expires": -1}, ValueError, "expires must be more than zero seconds"),
        ({"expires": 0.0}, ValueError, "expires must be more than zero seconds, .* got 0.0"),
        ({"expires": timedelta()}, ValueError, "expires must be more than zero seconds"),
        ({"expires": math.nan}, ValueError, "expires must be more than zero seconds"),
        ({"check_types": 1}, TypeError, "check_types must be True or False"),
        ({"kwargs": [1]}, TypeError, "kwargs must be a dictionary of arguments"),
        ({"priority": "hgih"}, ValueError, "Did you mean 'high'"),
    ],
)
def test_a_wrong_word_is_refused_with_what_to_do(words, error, message):
    with pytest.raises(error, match=message):
        TaskOptions(**words)


def test_tags_are_kept_in_order_and_once():
    assert TaskOptions(tags=("b", "a", "b")).tags == ("b", "a")
