"""Jobs: immutable calls, types of one's own, and many at once."""

import asyncio
import copy
import pickle
import re
from typing import Any, cast

import pytest
from asgiref.sync import async_to_sync
from django.db import transaction
from django.utils import timezone

from firefly_jobs import Exponential, Job, PayloadError, aschedule_many, schedule_many, task
from firefly_jobs.exceptions import TaskDefinitionError
from firefly_jobs.models import TaskModel
from firefly_jobs.registry import find
from tests.conformance import tasks
from tests.conformance.support import captured_statements, run_burst
from tests.testapp.models import Effect

pytestmark = pytest.mark.django_db(transaction=True)


@task(queue="sums", max_retries=4, kwargs={"c": 7})
def add(a, b=0, *, c=0):
    return a + b + c


class Insert(Job):
    queue = "inserts"
    priority = 10
    aliases = ("old.Insert",)
    effects_left = 3  # no option: the type's own

    def __init__(self, key, factor=1, **options):
        self.target = f"{key}!"
        super().__init__(key, value=5 * factor, **options)
        self.after = "set after"

    @property
    def upper(self):
        return self.args[0].upper()

    def run(self, key, value):
        Effect.objects.create(task_key=key, value=value)
        return f"{self.kwargs['value']} {self.effects_left}"

    def validate(self, value):
        if value > 100:
            raise ValueError("value is too large")


class Quick(Insert):
    queue = "quick"


class Sleepy(Job):
    async def run(self, seconds=0.0):
        await asyncio.sleep(seconds)
        return "slept"


class Limited(Job):
    max_attempts = 3

    def run(self, priority, *, factor=1):
        return priority * factor


class Listed(Job):
    largest = 100

    def run(self, values):
        return sum(values)

    def validate(self, values):
        if max(values) > self.largest:
            raise ValueError("a value is too large")


class Abstract(Job):
    queue = "x"


# --- values


def test_every_step_returns_a_new_job():
    job = add.job
    eta = timezone.now()
    full = (
        job.with_args(1)
        .with_kwargs(b=2)
        .with_kwargs(c=3)
        .with_queue("slow")
        .with_priority("high")
        .with_max_retries(2)
        .with_eta(eta)
        .with_unique_key("k", on_conflict="raise")
        .with_limits(time=60)
        .with_limits(memory="1MB")
        .with_tags("a", "b")
        .with_name("Sum")
        .with_description("adds")
        .with_metadata({"x": 1}, y=2)
        .with_metadata(y=3)
    )

    row = full.schedule()
    row.refresh_from_db()

    assert job == add.job == Job(add)
    assert row.params == {"args": (1,), "kwargs": {"b": 2, "c": 3}}
    assert (row.queue, row.priority, row.max_retries) == ("slow", 50, 2)
    assert (row.not_before, row.unique_key, row.active_key) == (eta, "k", "k")
    assert (row.time_limit, row.memory_limit) == (60.0, 1024**2)
    assert (row.label, row.description, row.tags) == ("Sum", "adds", ["a", "b"])
    assert row.metadata == {"x": 1, "y": 3}


def test_a_job_has_the_options_of_its_task_until_told_otherwise():
    assert add.job.options == add.options
    assert add.using(queue="x").job.with_args(1).schedule().queue == "x"
    assert add.job.with_max_attempts(2).options.max_retries == 1
    assert add.job.with_retry(Exponential(9)).options.effective_max_retries == 9
    made = Job(add, (1,), {"b": 2}, name="Sum", timeout=5, max_attempts=2)
    assert made == add.job.with_args(1).with_kwargs(b=2).with_options(
        label="Sum", time_limit=5, max_retries=1
    )
    assert add.job.with_scheduled_at(None) == add.job
    assert add.job.with_tags(["a"], "b") == add.job.with_tags("a", "b")


def test_equal_jobs_are_equal_and_no_others():
    assert add.job.with_args([1]) == Job(add, ([1],))
    assert hash(add.job.with_args([1])) == hash(Job(add, ([1],)))
    others = [add.job, add.job.with_args(2), Job(tasks.nothing), add.job.with_queue("x"), 1]
    assert all(add.job.with_args([1]) != other for other in others)
    assert pickle.loads(pickle.dumps(add.job.with_args(1))) == add.job.with_args(1)


def test_a_job_does_not_show_its_arguments():
    text = repr(add.job.with_args("secret").with_kwargs(b="secret"))

    assert text == "<Job tests.conformance.test_jobs.add: 2 arguments>"


def test_a_job_cannot_be_changed():
    job: Any = Insert("k")
    for name in ("args", "queue", "target", "new"):
        with pytest.raises(AttributeError, match=f"immutable, so {name} cannot be set"):
            setattr(job, name, 1)
    with pytest.raises(AttributeError, match="cannot be deleted"):
        del job.args


def test_the_arguments_of_a_job_cannot_be_changed_either():
    given = {"b": 1}
    job: Any = Job(add, (1,), given)
    copied = job.with_queue("other")
    given["b"] = 2

    others: list[Any] = [Insert("k"), pickle.loads(pickle.dumps(job)), copy.deepcopy(job)]
    for each in (job, copied, *others):
        with pytest.raises(TypeError, match="does not support item assignment"):
            each.kwargs["b"] = 3
    assert job.kwargs == copied.kwargs == {"b": 1}
    assert {**job.kwargs, "c": 2} == {"b": 1, "c": 2}
    assert job.schedule().params == {"args": (1,), "kwargs": {"b": 1, "c": 7}}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: add.job.with_options(que="x"), TypeError, "no option 'que' of a job.*'queue'"),
        (lambda: Job(add, atomic=False), TypeError, "atomic belongs to the task itself"),
        (lambda: Job(add, name="x", label="y"), TypeError, "which mean the same"),
        (lambda: Job(len), TypeError, "A job is made of a task"),
        (lambda: Job(add, "ab"), TypeError, "args must be a tuple"),
        (lambda: add.job.with_priority(500), ValueError, "priority must be between"),
        (Abstract, TaskDefinitionError, "Abstract defines no method run"),
    ],
)
def test_a_wrong_job_is_refused_where_it_is_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_wrong_call_is_refused_and_nothing_is_written():
    with pytest.raises(TypeError, match="cannot be called like this"):
        add.job.schedule()
    with pytest.raises(PayloadError):
        add.job.with_args(lambda: 1).schedule()

    assert not TaskModel.objects.exists()


def test_defaults_for_keyword_arguments_are_part_of_the_call():
    rows = [add.schedule(1), add.schedule(1, c=8), add.job.with_args(1, 2).schedule()]

    run_burst("sums")

    for row in rows:
        row.refresh_from_db()
    assert [row.returned for row in rows] == [8, 9, 10]


def test_jobs_are_scheduled_in_the_callers_transaction():
    with transaction.atomic():
        add.job.with_args(1).apply_async()
        transaction.set_rollback(True)

    assert not TaskModel.objects.exists()


def test_coroutines_schedule_jobs():
    async def main():
        return await add.job.with_args(1).aschedule(), await aschedule_many([add.job.with_args(2)])

    one, many = async_to_sync(main)()

    assert [row.params["args"] for row in (one, *many)] == [(1,), (2,)]


# --- types of one's own


def test_a_job_type_runs_like_a_task():
    row = Insert("k", factor=2, max_attempts=2, name="Two").schedule()
    slept = Sleepy().schedule()

    run_burst("inserts", "default")
    row.refresh_from_db()
    slept.refresh_from_db()

    assert (row.func_name, row.queue) == ("tests.conformance.test_jobs.Insert", "inserts")
    assert (row.priority, row.max_retries, row.label) == (10, 1, "Two")
    assert (row.status, row.returned) == ("completed", "10 3")
    assert list(Effect.objects.values_list("task_key", "value")) == [("k", 10)]
    assert (slept.status, slept.returned) == ("completed", "slept")


def test_what_a_constructor_sets_can_be_read():
    job: Any = Insert("k").with_queue("other")

    assert (job.target, job.after, job.queue, job.effects_left) == ("k!", "set after", "other", 3)
    assert Insert.queue == "inserts"
    assert find("old.Insert") is find("tests.conformance.test_jobs.Insert") is Insert.task


def test_what_a_constructor_has_set_does_not_outlive_its_arguments():
    job: Any = Insert("k")

    for other in (job.with_args("x"), job.with_kwargs(value=1).with_queue("other")):
        for name in ("target", "after"):
            with pytest.raises(AttributeError, match=rf"{name} was set by Insert\.__init__ for"):
                getattr(other, name)
        assert (other.upper, other.priority) == (other.args[0].upper(), 10)
        assert not hasattr(other, "never_set")
        copied = pickle.loads(pickle.dumps(other))
        assert copied == other and not hasattr(copied, "target")  # noqa: PT018 - one fact
    assert (job.target, job.upper) == ("k!", "K")


def test_an_attribute_that_never_was_is_missing_as_usual():
    with pytest.raises(AttributeError, match="'Insert' object has no attribute 'targt'"):
        Insert("k").targt  # type: ignore[attr-defined]  # noqa: B018 - the mistake
    with pytest.raises(AttributeError, match="'int' object has no attribute 'upper'"):
        Insert(5).upper  # noqa: B018 - what the property raises


def test_a_type_inherits_and_is_one_of_its_own():
    row = Quick("k").schedule()

    run_burst("quick")
    row.refresh_from_db()

    assert row.func_name == "tests.conformance.test_jobs.Quick"
    assert (row.priority, row.returned) == (10, "5 3")


def test_words_that_run_takes_are_arguments():
    job = Limited(priority=3, queue="x")

    assert (job.kwargs, job.options.queue, job.options.priority) == ({"priority": 3}, "x", 0)
    assert job.options.max_retries == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Limited(max_retrys=1), "no option 'max_retrys'. Did you mean 'max_retries'?"),
        (lambda: Limited(1, factr=2), "no option 'factr'. Did you mean 'factor'?"),
        (lambda: Insert("k", prioritty=2), "no option 'prioritty'. Did you mean 'priority'?"),
        (lambda: Limited(1).with_kwargs(factr=2), "no option 'factr'. Did you mean 'factor'?"),
        (lambda: Limited(1).with_kwargs(queue="x"), "an option: use with_options(queue=...)."),
        (lambda: Limited(1, atomic=False), "an option of the type: set it in the class."),
        (lambda: Limited(1, 2), "cannot be called like this: too many positional arguments"),
        (lambda: Limited(1, priority=2), "multiple values for argument 'priority'"),
        (lambda: Limited(1).with_args(1, 2), "too many positional arguments"),
    ],
)
def test_what_run_can_never_be_called_with_is_refused_at_once(make, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        make()


def test_arguments_may_come_later():
    assert Limited().with_kwargs(factor=2).with_args(3).schedule().params == {
        "args": (3,),
        "kwargs": {"factor": 2},
    }
    with pytest.raises(TypeError, match="missing a required argument: 'priority'"):
        Limited(factor=2).schedule()


def test_a_job_is_validated_when_its_arguments_are_there():
    with pytest.raises(ValueError, match="too large"):
        Insert("k", factor=100)
    good = Insert("k")
    with pytest.raises(ValueError, match="too large"):
        good.with_kwargs(value=101)
    assert good.with_kwargs(value=100).schedule().pk


def test_nothing_passes_by_what_a_job_type_validates():
    task, listed = cast("Any", Insert.task), cast("Any", Listed.task)
    made = Listed([1])
    made.args[0].append(1_000)

    for schedules in (
        made.schedule,
        lambda: schedule_many([made]),
        lambda: task.schedule("k", 101),
        lambda: task.using(queue="x").schedule("k", value=101),
        lambda: task.job.with_args("k", 101).schedule(),
        lambda: async_to_sync(task.aschedule)("k", 101),
        lambda: listed.schedule([101]),
    ):
        with pytest.raises(ValueError, match="too large"):
            schedules()

    assert not TaskModel.objects.exists()
    assert task.schedule("k", 100).params["args"] == ("k", 100)


def test_a_job_type_that_no_consumer_would_find_is_refused():
    with pytest.raises(TaskDefinitionError, match="cannot be a job type: it is defined inside"):

        class Hidden(Job):
            def run(self):
                pass


def test_a_constructor_that_forgets_the_job_is_told():
    with pytest.raises(TypeError, match=r"Forgetful\.__init__ must call super"):
        Forgetful()


class Forgetful(Job):
    def __init__(self):
        self.x = 1

    def run(self):
        return None


# --- many at once


def test_many_jobs_are_written_in_order_with_their_ids():
    jobs = (
        Insert(f"k{n}") if n % 3 == 0 else tasks.insert.job.with_args(f"k{n}") for n in range(2_500)
    )

    rows = schedule_many(jobs)

    assert [row.params["args"] for row in rows] == [(f"k{n}",) for n in range(2_500)]
    assert len({row.pk for row in rows}) == TaskModel.objects.count() == 2_500


def test_tasks_are_jobs_without_arguments():
    rows = schedule_many([tasks.nothing, tasks.nothing.job, tasks.nothing.using(queue="x")])

    assert [row.queue for row in rows] == ["default", "default", "x"]
    assert schedule_many([]) == []


def test_all_jobs_are_written_or_none():
    def jobs():
        yield from (add.job.with_args(n) for n in range(1_500))
        yield add.job

    with pytest.raises(TypeError, match="cannot be called like this"):
        schedule_many(jobs())
    with pytest.raises(TypeError, match="A job is made of a task"):
        schedule_many([add.job.with_args(1), 5])  # type: ignore[list-item]  # the mistake

    assert not TaskModel.objects.exists()


def test_jobs_of_two_databases_are_refused():
    jobs = [tasks.nothing.job, tasks.nothing.job.with_options(database="other")]

    with pytest.raises(ValueError, match="databases 'default' and 'other', which cannot"):
        schedule_many(jobs)

    assert not TaskModel.objects.exists()


def test_many_take_few_statements():
    with captured_statements() as statements:
        schedule_many(add.job.with_args(n).with_tags("a") for n in range(1_000))

    assert len([sql for sql, _ in statements if "INSERT" in sql]) == 1
    assert TaskModel.objects.tagged("a").count() == 1_000
