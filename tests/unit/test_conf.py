import math
from dataclasses import FrozenInstanceError, fields
from datetime import timedelta
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings

from firefly_jobs.conf import _RULES, Settings, get_settings, problems, suggestion

COUNTS = {"MAX_RETRIES": 0, "MAX_RESCUES": 0}
POSITIVE_COUNTS = {"MAX_PAYLOAD_BYTES": 1, "ASYNC_SLOTS": 1, "ASYNC_CONNECTIONS": 1}
FLAGS = ["NOTIFY", "FAIL_SILENTLY", "SIGNING"]
DURATIONS = ["RETRY_DELAY", "SHUTDOWN_TIMEOUT", "TIME_LIMIT_GRACE"]
POSITIVE_DURATIONS = ["CONSUMER_NAP_TIME", "LANE_TIMEOUT"]
TEXTS = ["DATABASE", "DEFAULT_QUEUE"]


def complaint(key: str, value: Any) -> str:
    """Return the one problem of a dictionary with this one entry."""
    ((found, message),) = problems({key: value})
    assert found == key
    assert message.startswith(f"FIREFLY_JOBS[{key!r}] must be ")
    assert message.endswith(f", got {value!r}.")
    return message


def test_every_setting_has_a_rule_and_every_rule_a_setting():
    assert {field.name for field in fields(Settings)} == set(_RULES)


def test_the_defaults_obey_their_own_rules():
    defaults = {field.name: field.default for field in fields(Settings)}

    assert problems(defaults) == []


def test_every_rule_is_tested_here():
    tested = [*COUNTS, *POSITIVE_COUNTS, *FLAGS, *DURATIONS, *POSITIVE_DURATIONS, *TEXTS]

    words = {"LEASE_SECONDS", "SERIALIZER", "IMPORTS", "HOOKS", "KEEP_EVENTS", "SCHEDULE_OWNER"}
    words |= {"API_AUTHENTICATOR", "JOB_ADMIN_ACTIONS"}
    assert {*tested} | words == set(_RULES)


def test_an_empty_dictionary_gives_the_documented_defaults():
    with override_settings(FIREFLY_JOBS={}):
        settings = get_settings()

    assert settings == Settings()
    assert (settings.DATABASE, settings.DEFAULT_QUEUE) == ("default", "default")
    assert (settings.MAX_RETRIES, settings.RETRY_DELAY) == (0, 120)
    assert (settings.FAIL_SILENTLY, settings.SERIALIZER, settings.SIGNING) == (True, "pickle", True)
    assert settings.LEASE_SECONDS == 30


def test_a_setting_takes_effect_at_once_and_is_gone_afterwards():
    before = get_settings()

    with override_settings(FIREFLY_JOBS={"MAX_RETRIES": 7}):
        assert get_settings().MAX_RETRIES == 7
        with override_settings(FIREFLY_JOBS={"MAX_RETRIES": 8}):
            assert get_settings().MAX_RETRIES == 8
        assert get_settings().MAX_RETRIES == 7

    assert get_settings() == before


def test_another_setting_of_the_project_is_no_reason_to_read_again():
    first = get_settings()

    with override_settings(LANGUAGE_CODE="nb"):
        assert get_settings() is first


def test_settings_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        get_settings().MAX_RETRIES = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("MAX_RETRY", "FIREFLY_JOBS has no key 'MAX_RETRY'. Did you mean 'MAX_RETRIES'?"),
        ("LEASE_SECOND", "FIREFLY_JOBS has no key 'LEASE_SECOND'. Did you mean 'LEASE_SECONDS'?"),
        ("ZZZ", "FIREFLY_JOBS has no key 'ZZZ'."),
        (5, "FIREFLY_JOBS has no key 5."),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(key, message):
    assert problems({key: 1}) == [(str(key), message)]


@pytest.mark.parametrize(("raw", "kind"), [([], "list"), (None, "NoneType"), ("x", "str")])
def test_what_is_no_dictionary_is_refused(raw, kind):
    assert problems(raw) == [("", f"FIREFLY_JOBS must be a dictionary, got {kind}.")]
    with override_settings(FIREFLY_JOBS=raw), pytest.raises(ImproperlyConfigured):
        get_settings()


def test_all_problems_are_told_at_once():
    with (
        override_settings(FIREFLY_JOBS={"MAX_RETRIES": -1, "SIGNING": "yes", "COLOUR": 1}),
        pytest.raises(ImproperlyConfigured) as caught,
    ):
        get_settings()

    assert [word in str(caught.value) for word in ("MAX_RETRIES", "SIGNING", "COLOUR")] == [
        True
    ] * 3


@pytest.mark.parametrize(("key", "least"), [*COUNTS.items(), *POSITIVE_COUNTS.items()])
def test_a_count_is_a_whole_number_that_is_large_enough(key, least):
    assert problems({key: least}) == []
    assert problems({key: least + 1}) == []
    for value in (least - 1, 1.5, "3", None, True):
        assert f"must be a whole number, {least} or more" in complaint(key, value)


def test_more_retries_than_a_row_can_count_are_refused():
    assert problems({"MAX_RETRIES": 32_767}) == []
    assert problems({"MAX_RETRIES": 32_768}) != []


@pytest.mark.parametrize("key", FLAGS)
def test_a_flag_is_true_or_false(key):
    assert problems({key: True}) == problems({key: False}) == []
    for value in (0, 1, "yes", None):
        assert "must be True or False" in complaint(key, value)


@pytest.mark.parametrize("key", DURATIONS)
def test_a_duration_is_zero_or_more(key):
    for value in (0, 0.5, 30, timedelta(0), timedelta(minutes=1)):
        assert problems({key: value}) == []
    wrong: Any
    for wrong in (-1, -0.1, "30", None, True, timedelta(seconds=-1), math.nan):
        assert "must be zero seconds or a timedelta" in complaint(key, wrong).replace(
            "zero or more seconds", "zero seconds"
        )


@pytest.mark.parametrize("key", POSITIVE_DURATIONS)
def test_a_period_is_more_than_zero(key):
    for value in (0.001, 30, timedelta(seconds=1)):
        assert problems({key: value}) == []
    wrong: Any
    for wrong in (0, timedelta(0), -1, "30", True, math.nan):
        assert "must be more than zero seconds or a timedelta" in complaint(key, wrong)


def test_a_period_is_given():
    assert "must be more than zero seconds or a timedelta" in complaint("LANE_TIMEOUT", None)


def test_a_lease_is_long_enough_to_be_renewed():
    assert problems({"LEASE_SECONDS": 0.1}) == []
    for value in (0, 0.09, None, True, timedelta(milliseconds=99)):
        assert "must be 0.1 or more seconds or a timedelta" in complaint("LEASE_SECONDS", value)


def test_a_nap_may_be_left_to_the_database():
    assert problems({"CONSUMER_NAP_TIME": None}) == []
    assert "and at most 2147483647 s, or None" in complaint("CONSUMER_NAP_TIME", 0)


def test_an_owner_may_be_left_to_the_settings_module():
    assert problems({"SCHEDULE_OWNER": None}) == problems({"SCHEDULE_OWNER": "shop"}) == []
    assert "must be a non-empty string, or None" in complaint("SCHEDULE_OWNER", "")


def test_admins_are_named_by_the_labels_of_their_models():
    assert problems({"JOB_ADMIN_ACTIONS": {"shop.Order": "order"}}) == []
    for wrong in ({"Order": "order"}, {"shop.Order": ""}, ["shop.Order"], "shop.Order"):
        assert "must be a dictionary from labels" in complaint("JOB_ADMIN_ACTIONS", wrong)


def test_an_authenticator_is_named_by_its_path():
    assert problems({"API_AUTHENTICATOR": "shop.auth.by_token"}) == []
    assert "must be the dotted name of a function" in complaint("API_AUTHENTICATOR", "token")


@pytest.mark.parametrize("key", [*DURATIONS, *POSITIVE_DURATIONS, "LEASE_SECONDS"])
def test_a_duration_without_an_end_is_refused(key):
    assert problems({key: math.inf}) != []


@pytest.mark.parametrize("key", TEXTS)
def test_a_name_is_a_string_that_is_not_empty(key):
    assert problems({key: "mail"}) == []
    for value in ("", 5, None, b"mail"):
        assert "must be a non-empty string" in complaint(key, value)


@pytest.mark.parametrize("queue", ["a,b", "*", " mail", "q" * 101])
def test_the_default_queue_must_be_one_that_a_task_could_name(queue):
    assert problems({"DEFAULT_QUEUE": queue}) != []


def test_the_serializer_is_one_of_two():
    assert problems({"SERIALIZER": "json"}) == problems({"SERIALIZER": "pickle"}) == []
    for value in ("yaml", "", None, 5, ["json"]):
        assert "must be one of 'pickle', 'json'" in complaint("SERIALIZER", value)


def test_imports_are_a_list_of_module_names():
    assert problems({"IMPORTS": ["shop.jobs"]}) == problems({"IMPORTS": ()}) == []
    for value in ("shop.jobs", [5], [""], None, {"shop.jobs"}):
        assert "must be a list of module names" in complaint("IMPORTS", value)
    with override_settings(FIREFLY_JOBS={"IMPORTS": ["shop.jobs"]}):
        assert get_settings().IMPORTS == ("shop.jobs",)


def test_hooks_are_a_list_of_dotted_names():
    assert problems({"HOOKS": ["shop.hooks.Audit"]}) == problems({"HOOKS": ()}) == []
    for value in ("shop.hooks.Audit", [5], ["Audit"], None, {"shop.hooks.Audit"}):
        assert "must be a list of dotted names" in complaint("HOOKS", value)
    with override_settings(FIREFLY_JOBS={"HOOKS": ["shop.hooks.Audit"]}):
        assert get_settings().HOOKS == ("shop.hooks.Audit",)


@pytest.mark.parametrize("key", [*DURATIONS, *POSITIVE_DURATIONS])
def test_a_duration_may_be_a_timedelta_and_is_read_as_seconds(key):
    with override_settings(FIREFLY_JOBS={key: timedelta(minutes=1.5)}):
        assert getattr(get_settings(), key) == 90


@pytest.mark.parametrize(
    ("word", "hint"), [("colour", " Did you mean 'color'?"), ("xyz", ""), ("", "")]
)
def test_a_suggestion_is_made_for_a_word_that_is_close(word, hint):
    assert suggestion(word, ["color", "size"]) == hint


def test_events_are_kept_for_ever_for_a_while_or_not_at_all():
    good = [True, False, 0.5, 3600, timedelta(days=7)]

    assert [problems({"KEEP_EVENTS": value}) for value in good] == [[]] * len(good)
    for value in (None, "yes", 0, -1, math.nan, timedelta(0)):
        assert "more than zero seconds" in complaint("KEEP_EVENTS", value)
        assert "or True or False" in complaint("KEEP_EVENTS", value)
    with override_settings(FIREFLY_JOBS={"KEEP_EVENTS": timedelta(days=1)}):
        assert get_settings().KEEP_EVENTS == 86_400.0
