import pytest

from firefly_jobs.models import TaskModel
from firefly_jobs.states import TERMINAL, TRANSITIONS, Status, sources

ALLOWED = {
    ("created", "running"),  # claim
    ("created", "blocked"),
    ("created", "cancelled"),
    ("blocked", "created"),
    ("blocked", "cancelled"),
    ("running", "created"),  # retry, snooze, release, rescue
    ("running", "blocked"),  # a limit
    ("running", "completed"),
    ("running", "failed"),
    ("running", "cancelled"),
    ("failed", "created"),  # by hand
    ("cancelled", "created"),  # by hand
    ("failed", "blocked"),  # a step of a workflow, by hand
    ("cancelled", "blocked"),  # likewise
}


def test_every_status_has_a_line_in_the_table():
    assert set(TRANSITIONS) == set(Status)


@pytest.mark.parametrize("source", Status)
@pytest.mark.parametrize("target", Status)
def test_the_table_allows_exactly_the_listed_steps(source, target):
    assert (target in TRANSITIONS[source]) == ((source.value, target.value) in ALLOWED)


@pytest.mark.parametrize("status", Status)
def test_sources_is_the_table_read_backwards(status):
    assert {s.value for s in sources(status)} == {a for a, b in ALLOWED if b == status.value}


def test_three_states_are_ends():
    assert {Status.COMPLETED, Status.FAILED, Status.CANCELLED} == TERMINAL
    assert [s.value for s in Status if s.is_terminal] == ["completed", "failed", "cancelled"]


def test_a_completed_row_never_changes_again():
    assert TRANSITIONS[Status.COMPLETED] == frozenset()


def test_no_step_leads_from_a_state_to_itself():
    assert not [status for status, targets in TRANSITIONS.items() if status in targets]


def test_every_state_can_be_reached_from_created_and_can_lead_to_an_end():
    def reachable(start: Status) -> set[Status]:
        found, edge = set(), {start}
        while edge:
            found |= edge
            edge = {target for status in edge for target in TRANSITIONS[status]} - found
        return found

    # Blocked rows are also inserted as such.
    assert reachable(Status.CREATED) == set(Status)
    assert all(reachable(status) & TERMINAL for status in Status)


def test_every_status_fits_its_column():
    length = TaskModel._meta.get_field("status").max_length

    assert length is not None
    assert max(len(status.value) for status in Status) <= length


def test_a_row_knows_the_states_by_name():
    assert TaskModel.Status is Status
    assert Status("running") is Status.RUNNING
    assert str(Status.RUNNING) == "running"
