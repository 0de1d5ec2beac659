"""Workflows while consumers are killed: every step once, in order, and the workflow ends."""

import random
import signal
from collections import Counter

import pytest

from firefly_jobs import Workflow, WorkflowModel
from firefly_jobs.checkpoints import CHECKPOINTS
from firefly_jobs.models import TaskModel, WorkflowStep
from tests.crash import tasks
from tests.crash.conftest import describe_rows, effects, stops_in_order
from tests.support.waiting import eventually
from tests.testapp.models import Effect

KILLS, SEED = 4, 20_261_126


def step(name):
    return tasks.write.job.with_args(name).with_name(name)


def every_shape():
    """Return workflows of several shapes, and who has to come before whom."""
    order: list[tuple[str, str]] = []
    plans = []

    fan = Workflow("fan")
    fan.add(step("first"))
    for n in range(80):
        fan.add(step(f"fan-{n}"), depends_on=["first"])
        order += [("first", f"fan-{n}"), (f"fan-{n}", "last")]
    fan.add(step("last"), depends_on=[f"fan-{n}" for n in range(80)])
    plans.append(fan)

    diamond = Workflow("diamond")
    diamond.add(step("top"))
    for side in ("left", "right"):
        diamond.add(step(side), depends_on="top")
        order += [("top", side), (side, "bottom")]
    diamond.add(step("bottom"), depends_on=["left", "right"])
    plans.append(diamond)

    links = Workflow("chain")
    for n in range(30):
        links.add(step(f"link-{n}"), depends_on=[f"link-{n - 1}"] if n else ())
        order += [(f"link-{n - 1}", f"link-{n}")] if n else []
    plans.append(links)

    levels = Workflow("levels")
    for level in range(3):
        for n in range(15):
            levels.add(step(f"level-{level}-{n}"), priority=-level)
            order += [(f"level-{level - 1}-{m}", f"level-{level}-{n}") for m in range(15) if level]
    plans.append(levels)
    return plans, order


def all_have_ended():
    assert set(WorkflowModel.objects.values_list("status", flat=True)) == {"completed"}, (
        describe_rows()
    )


def came_in(order):
    places = {
        key: place for place, key in enumerate(Effect.objects.values_list("task_key", flat=True))
    }
    return [pair for pair in order if places[pair[0]] > places[pair[1]]]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_steps_of_a_consumer_killed_at_a_checkpoint_are_done_once_by_another(consume, checkpoint):
    wf = Workflow("killed")
    middle = [wf.add(step(f"m{n}"), depends_on=[]) for n in range(3)]
    wf.add(step("last"), depends_on=middle)
    wf.schedule()
    dying = consume(checkpoint=f"{checkpoint}:kill")
    assert dying.wait() == -signal.SIGKILL

    survivor = consume()

    eventually(all_have_ended, timeout_seconds=20.0)
    assert effects() == Counter(["m0", "m1", "m2", "last"])
    assert came_in([(f"m{n}", "last") for n in range(3)]) == []
    stops_in_order(survivor)


@pytest.mark.timeout(180)
def test_every_shape_ends_in_order_while_consumers_are_killed(consume):
    chance = random.Random(SEED)
    plans, order = every_shape()
    for plan in plans:
        plan.schedule()
    total = WorkflowStep.objects.count()
    consumers = [consume(), consume("--threads", "3"), consume("--group-commit"), consume()]

    for kill in range(1, KILLS + 1):

        def is_under_way(threshold: int = kill * total // (KILLS + 2)) -> None:
            assert effects().total() >= threshold, describe_rows()

        eventually(is_under_way, timeout_seconds=60.0)
        consumers.pop(chance.randrange(4)).kill9()
        consumers.append(consume())

    eventually(all_have_ended, timeout_seconds=90.0)
    assert effects() == Counter(WorkflowStep.objects.values_list("name", flat=True))
    assert came_in(order) == [], f"seed {SEED}"
    assert not TaskModel.objects.exclude(status="completed").exists()
    for consumer in consumers:
        assert "stood still" not in consumer.output
        assert "Deadlock" not in consumer.output
        stops_in_order(consumer)
