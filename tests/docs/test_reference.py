"""The reference lists what the code has: nothing is missing, nothing is made up."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.admin.utils import label_for_field
from django.core.management import get_commands, load_command_class
from django.core.management.base import BaseCommand
from django.db import models
from django.dispatch import Signal

import firefly_jobs
from benchmarks.catalogue import BENCHMARKS
from firefly_jobs import (
    api,
    attempts,
    conf,
    exceptions,
    hooks,
    lifecycle,
    options,
    retries,
    signals,
    slots,
    states,
)
from firefly_jobs.admin import layout, presentation, rows, steps, tasks, workflows
from firefly_jobs.contrib.celery import CeleryJob
from firefly_jobs.contrib.jobs import EmailJob, HTTPRequestJob, SQLQueryJob
from firefly_jobs.job_registry import MAX_ITEMS, register_job
from firefly_jobs.jobs import Job
from firefly_jobs.models import (
    ConcurrencySlot,
    ConsumerModel,
    JobStart,
    RateBucket,
    SavedJob,
    ScheduleModel,
    TaskAttempt,
    TaskEvent,
    TaskModel,
    WorkflowEdge,
    WorkflowGate,
    WorkflowModel,
    WorkflowStep,
)

from .pages import DOCS, headings, read, section, table

OUR_COMMANDS = sorted(name for name, app in get_commands().items() if app == "firefly_jobs")
PACKAGE = Path(firefly_jobs.__file__).parent


def _options(command: BaseCommand) -> set[str]:
    parser = command.create_parser("manage.py", "command")
    return {option for action in parser._actions for option in action.option_strings}


def test_every_setting_is_documented_with_its_default() -> None:
    documented = {key: cells[0] for key, cells in table(read("reference/settings.md")).items()}
    actual = {field.name: f"`{field.default!r}`" for field in dataclasses.fields(conf.Settings)}
    assert documented == actual


def test_every_command_has_a_section() -> None:
    assert headings(read("reference/commands.md"), 2) == OUR_COMMANDS


@pytest.mark.parametrize("name", OUR_COMMANDS)
def test_every_option_of_a_command_is_documented(name: str) -> None:
    documented = set(table(section(read("reference/commands.md"), name)))
    actual = _options(load_command_class("firefly_jobs", name)) - _options(BaseCommand())
    assert documented == actual


def test_every_task_option_is_documented() -> None:
    documented = set(table(section(read("reference/tasks.md"), "Options")))
    assert documented == {field.name for field in dataclasses.fields(options.TaskOptions)}


def test_the_options_that_using_refuses_are_marked() -> None:
    rows = table(section(read("reference/tasks.md"), "Options"))
    assert {name for name, cells in rows.items() if "decorator" in cells[-1]} == options.FIXED


def test_every_system_check_is_documented() -> None:
    source = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    actual = set(re.findall(r'"(?:firefly_jobs\.)?([EW]\d{3})"', source))
    documented = {name.split(".")[-1] for name in table(read("reference/checks.md"))}
    assert documented == actual


def test_every_exception_is_documented() -> None:
    actual = {
        name
        for name, value in vars(exceptions).items()
        if inspect.isclass(value)
        and issubclass(value, BaseException)
        and value.__module__ == exceptions.__name__
    }
    assert set(table(read("reference/errors.md"))) == actual


@pytest.mark.parametrize(
    "model",
    [
        *(TaskModel, TaskAttempt, TaskEvent, ConsumerModel, ConcurrencySlot, RateBucket),
        *(
            JobStart,
            SavedJob,
            ScheduleModel,
            WorkflowModel,
            WorkflowStep,
            WorkflowGate,
            WorkflowEdge,
        ),
    ],
    ids=lambda m: m.__name__,
)
def test_every_field_is_documented(model: type[models.Model]) -> None:
    documented = set(table(section(read("reference/models.md"), model.__name__)))
    assert documented == {field.name for field in model._meta.fields}


def _numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:[,.]\d+)*", text))


def test_every_bound_of_the_admin_is_documented() -> None:
    bounds = {
        rows.COUNT_MAX,
        rows.COUNT_MAX + 1,
        rows.SEARCH_ROWS,
        tasks.ATTEMPTS_SHOWN,
        tasks.EVENTS_SHOWN,
        presentation.ARGUMENTS_SHOWN,
        lifecycle.BATCH_SIZE,
        *(workflows.PER_PAGE, workflows.COUNTED_MAX, workflows.CHANGED_MAX),
        *(workflows.IGNORED_SHOWN, steps.PICTURED_MAX, steps.STEPS_SHOWN, steps.PARENTS_SHOWN),
        *(steps.ARROWS_MAX, steps.EDGES_MAX, steps.GROUPED_MAX),
    }
    documented = _numbers(section(read("reference/admin.md"), "Bounds").partition("**")[0])
    assert documented == {f"{bound:,}" for bound in bounds}
    assert str(rows.QUEUES_SHOWN) in section(read("reference/admin.md"), "Filters and search")


def test_every_column_part_and_action_of_the_admin_is_documented() -> None:
    page, shown = read("reference/admin.md"), admin.site._registry[TaskModel]
    columns = {
        str(label_for_field(name, TaskModel, shown)).lower()
        for name in tasks.TaskAdmin.list_display
    }
    assert set(table(section(page, "Columns"))) == columns
    actions = {*tasks.TaskAdmin.actions, *workflows.WorkflowAdmin.actions}
    assert set(table(section(page, "Actions"))) == actions
    parts = re.findall(r"^\| ([A-Z]\w+) \|", section(page, "One task"), re.MULTILINE)
    assert parts == [str(title) for title, _ in shown.fieldsets or () if title]


def test_every_column_and_part_of_a_workflow_in_the_admin_is_documented() -> None:
    text = section(read("reference/admin.md"), "Workflows")
    shown = admin.site._registry[WorkflowModel]
    columns = {
        str(label_for_field(name, WorkflowModel, shown)).lower()
        for name in workflows.WorkflowAdmin.list_display
    }
    parts = {str(title) for title, _ in shown.fieldsets or () if title}
    assert set(table(text)) == columns | parts
    words = {7: "seven", 8: "eight", 9: "nine", 10: "ten"}
    assert f"\n{words[layout.FRAME_MIN]} or more" in text


def test_losses_are_counted_as_the_page_says() -> None:
    claim = attempts.Claim(1, 1, "shop.f", "default", 0, None, "", 0, 0, 0, None, 0, 0)
    losses, status = 0, states.Status.CREATED
    while status is states.Status.CREATED:
        outcome = attempts.Outcome(claim=claim, duration=0.0, error=OSError(), is_lost=True)
        settlement = attempts.decide(outcome, max_rescues=conf.Settings().MAX_RESCUES)
        losses, status = losses + 1, settlement.status
        claim = claim._replace(
            rescues=claim.rescues + settlement.rescues,
            lost_alone=claim.lost_alone + settlement.losses_alone,
        )
    words = {3: "third", 4: "fourth", 5: "fifth", 6: "sixth", 7: "seventh"}
    text = section(read("explanation/failures.md"), "How many losses")
    assert f"that is the {words[losses]} loss at the earliest" in " ".join(text.split())
    assert text.count("| first, second | among others |") == 1
    assert attempts.ALONE_AFTER_RESCUES == 2


def test_the_pauses_between_probes_are_documented() -> None:
    claims = _numbers(section(read("explanation/claims.md"), "Claims"))
    pauses = {slots.PROBE_SECONDS_MIN, slots.PROBE_SECONDS_MAX, slots.SLOW_SECONDS}
    assert {f"{pause:g}" for pause in pauses} <= claims


def test_every_status_outcome_and_kind_of_event_is_documented() -> None:
    text = read("reference/models.md")
    assert set(table(section(text, "Status"))) == set(states.Status.values)
    assert set(table(section(text, "Outcomes"))) == {e.value for e in TaskAttempt.Outcome}
    assert set(table(section(text, "Kinds of events"))) == set(TaskEvent.Kind.values)


def test_every_benchmark_is_documented_with_its_sizes() -> None:
    rows = table(section(read("explanation/performance.md"), "Benchmarks"))
    documented = {name: cells[-1] for name, cells in rows.items()}
    assert documented == {
        benchmark.name: ", ".join(
            f"`--{name}` {size.default}" for name, size in benchmark.sizes.items()
        )
        for benchmark in BENCHMARKS
    }


def test_every_retry_strategy_is_documented_with_its_arguments() -> None:
    text = read("reference/retries.md")
    for name in ("Fixed", "Exponential", "RandomDelay"):
        strategy = getattr(retries, name)
        documented = {key: cells[0] for key, cells in table(section(text, name)).items()}
        assert documented == {f.name: f"`{f.default!r}`" for f in dataclasses.fields(strategy)}
    kinds = {cls.__name__ for cls in retries._KINDS.values() if cls.__module__ == retries.__name__}
    assert kinds == {"Fixed", "Exponential", "RandomDelay"}


@pytest.mark.parametrize("kind", [HTTPRequestJob, EmailJob, SQLQueryJob, CeleryJob])
def test_every_argument_of_a_ready_made_type_is_documented(kind: type[Job]) -> None:
    documented = set(table(section(read("reference/ready-made.md"), kind.__name__)))
    assert documented == set(kind.task.signature.plain.parameters)


def test_every_hook_and_every_signal_is_documented() -> None:
    page = read("reference/hooks.md")
    documented = set(re.findall(r"^\| `(\w+)\(", section(page, "TaskHooks"), re.MULTILINE))
    assert documented == set(hooks.EVENTS)
    answers = section(page, "What the failure of a step means")
    assert set(re.findall(r"^\| `\"?(\w+)\"?` \|", answers, re.MULTILINE)) == set(
        map(str, hooks.ANSWERS)
    )
    sent = {name for name, value in vars(signals).items() if isinstance(value, Signal)}
    assert set(table(section(page, "Signals"))) == sent


def test_every_address_field_and_code_of_the_http_interface_is_documented() -> None:
    page, described = read("reference/http-api.md"), api.description("/api/")
    addresses = table(page.partition("## ")[0])
    methods = {path: cells[0] for path, cells in addresses.items()}
    assert methods == {
        path: next(iter(operations)).upper() for path, operations in described["paths"].items()
    }
    fields = described["components"]["schemas"]["Task"]["properties"]
    assert set(table(section(page, "A task"))) == set(fields)
    codes = {
        code
        for operations in described["paths"].values()
        for operation in operations.values()
        for code in operation["responses"]
    }
    documented = set(re.findall(r"^\| (\d{3}) \|", section(page, "Who asks"), re.MULTILINE))
    # Another method is an answer of each address, and of no operation.
    assert documented == codes - {"200"} | {"405"}
    numbers = _numbers(addresses["/tasks/"][1])
    assert {str(api.PAGE_SIZE), str(api.PAGE_SIZE_MAX)} <= numbers


def test_every_argument_of_register_job_is_documented() -> None:
    text = section(read("reference/registered-jobs.md"), "register_job")
    assert list(table(text)) == list(inspect.signature(register_job).parameters)
    assert f"max_items={MAX_ITEMS}" in text


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    words = set(re.findall(r"[A-Za-z_]+", text))
    assert set(firefly_jobs._HOME_OF) - words == set()


def test_every_field_of_a_log_line_is_documented() -> None:
    actual: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "extra":
                actual |= _keys(node.value)
            is_fields = isinstance(node, ast.FunctionDef) and node.name in {
                "log_fields",
                "log_settled",
            }
            if is_fields:
                actual |= _keys(node)
    assert set(table(section(read("reference/logging.md"), "Fields"))) == actual


def _keys(tree: ast.AST) -> set[str]:
    """Return the texts used as keys in ``tree``: of dictionaries, and where one is set."""
    found: set[Any] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            found |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            found |= {node.slice.value} if isinstance(node.slice, ast.Constant) else set()
    return {key for key in found if isinstance(key, str)}


def test_the_drawing_and_the_table_of_states_equal_the_code() -> None:
    text = read("explanation/states.md")
    actual = {(str(a), str(b)) for a, targets in states.TRANSITIONS.items() for b in targets}
    drawn = set(re.findall(r"^\s*(\w+) --> (\w+)", text, re.MULTILINE))
    in_table = {
        tuple(pair) for pair in re.findall(r"^\| `(\w+)` \| `(\w+)` \|", text, re.MULTILINE)
    }
    assert drawn == actual
    assert in_table == actual
    ends = set(re.findall(r"^\s*(\w+) --> \[\*\]", text, re.MULTILINE))
    assert ends == {str(status) for status in states.TERMINAL}
