"""What the HTTP interface says: values as JSON, and its description.

No request is looked at here; ``views`` does that.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin
from uuid import UUID

from django.core.serializers.json import DjangoJSONEncoder

from .job_registry import Argument, RegisteredJob
from .models import TaskModel
from .states import Status

TEXT_LENGTH_MAX = 1_000
PAGE_SIZE, PAGE_SIZE_MAX = 50, 200
ID_MAX = 2**63 - 1
_KINDS: dict[Any, dict[str, Any]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    datetime: {"type": "string", "format": "date-time"},
    date: {"type": "string", "format": "date"},
    list: {"type": "array"},
    tuple: {"type": "array"},
    Sequence: {"type": "array"},
    dict: {"type": "object"},
    Mapping: {"type": "object"},
    UUID: {"type": "string", "format": "uuid"},
    time: {"type": "string", "format": "time"},
    timedelta: {"type": "number", "description": "seconds"},
    Decimal: {"type": ["string", "number"], "description": "a decimal number, best as a text"},
    set: {"type": "array"},
    frozenset: {"type": "array"},
    type(None): {"type": "null"},
}


def as_json(value: Any) -> Any:
    """Return what a value is in JSON; moments and decimals as Django writes them.

    Raises:
        TypeError, ValueError: If it is nothing there.
    """
    return json.loads(json.dumps(value, cls=DjangoJSONEncoder, allow_nan=False))


def job_as_json(job: RegisteredJob) -> dict[str, Any]:
    """Return what people need to know to start a job."""
    return {
        "task_name": job.task_name,
        "name": job.name,
        "description": job.description,
        "obj_type": job.task_data_type,
        "max_items": job.max_items,
        "is_for_staff": job.task_admin_only,
        "arguments": [_argument_as_json(argument) for argument in job.arguments],
    }


def _argument_as_json(argument: Argument) -> dict[str, Any]:
    found = {
        "name": argument.name,
        "schema": schema_of(argument.type),
        "is_required": argument.is_required,
        "help": argument.help,
    }
    if not argument.is_required:
        try:
            found["default"] = _default_as_json(argument.default)
        except (TypeError, ValueError, RecursionError):
            found["default"] = _text_of(argument.default)
    return found


def _default_as_json(value: Any) -> Any:
    """Return a default as a start may say it."""
    if isinstance(value, enum.Enum):
        return value.name
    return value.total_seconds() if isinstance(value, timedelta) else as_json(value)


def schema_of(annotation: Any) -> dict[str, Any]:
    """Return the JSON schema of an annotation, as far as that is simple; else that of anything."""
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        is_json = all(isinstance(one, str | int | None) for one in members)
        return {"enum": list(members)} if is_json else {}
    if origin in {Union, UnionType}:
        found = [schema_of(one) for one in members]
        return {"anyOf": found} if all(found) else {}
    # What is subscripted with something else is hashable whatever that is.
    kind = origin or annotation
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {"enum": list(kind.__members__)}
    return dict(_KINDS.get(kind, {})) if isinstance(kind, type) else {}


def task_as_json(task: TaskModel) -> dict[str, Any]:
    """Return a task's state, and what came of it.

    ``result`` is what it has returned.  If that is no JSON, or cannot be read, ``result`` is
    null and ``result_text`` says what there is.
    """
    result, text = None, None
    if task.status == Status.COMPLETED:
        try:
            value = task.returned
        except Exception as error:  # noqa: BLE001 - a payload of another key, a class that has gone
            text = f"{type(error).__name__}: {error}"[:TEXT_LENGTH_MAX]
        else:
            try:
                result = as_json(value)
            except (TypeError, ValueError, RecursionError):
                text = _text_of(value)
    return {
        "id": task.pk,
        "func_name": task.func_name,
        "label": task.label,
        "status": str(task.status),
        "progress": _progress(task),
        "created": as_json(task.created),
        "started": as_json(task.started),
        "ended": as_json(task.ended),
        "duration": task.duration,
        "retry_attempts": task.retry_attempts,
        "result": result,
        "result_text": text,
        "error": task.error,
    }


def _text_of(value: Any) -> str:
    try:
        return repr(value)[:TEXT_LENGTH_MAX]
    except Exception as error:  # noqa: BLE001 - repr() is the project's code, and one row of many
        return f"a {type(value).__name__}, whose repr() raises {type(error).__name__}"


def _progress(task: TaskModel) -> float:
    told = task.metadata.get("progress")
    if isinstance(told, int | float) and not isinstance(told, bool) and 0 <= told <= 1:
        return float(told)
    return 1.0 if task.status == Status.COMPLETED else 0.0


# --- the description


def description(base: str) -> dict[str, Any]:
    """Return the interface as OpenAPI 3.1 describes it.

    Args:
        base: Where it is mounted.
    """
    key = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    start = {
        "type": "object",
        "required": ["obj_pks"],
        "additionalProperties": False,
        "properties": {
            "obj_pks": {
                "type": "array",
                "items": key,
                "minItems": 1,
                "description": "Keys of the objects.",
            },
            "job_args": {"type": "object", "description": "Arguments, by name."},
            "obj_type": {"type": "string", "description": "The type, if it is to be checked."},
        },
    }
    task_path = {
        "name": "task_id",
        "in": "path",
        "required": True,
        "schema": {"type": "integer", "minimum": 0, "maximum": ID_MAX},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Registered jobs", "version": "1"},
        "servers": [{"url": base.rstrip("/") or "/"}],
        "paths": {
            "/jobs/": {
                "get": _operation(
                    "listJobs",
                    "What you may start.",
                    _object(jobs=_array("Job")),
                    errors=(401, 403),
                )
            },
            "/jobs/{task_name}/start/": {
                "post": {
                    **_operation(
                        "startJob",
                        "Start a job on some objects.",
                        _object(message={"type": "string"}, task=_ref("Task")),
                        errors=(400, 401, 403, 404, 413),
                    ),
                    "parameters": [
                        {
                            "name": "task_name",
                            "in": "path",
                            "required": True,
                            "schema": {"type": "string", "pattern": "^[^/]+$"},
                        }
                    ],
                    "requestBody": {
                        "required": True,
                        "content": {"application/json": {"schema": start}},
                    },
                }
            },
            "/tasks/": {
                "get": {
                    **_operation(
                        "listTasks",
                        "What you have started, the latest first.",
                        _object(
                            tasks=_array("Task"),
                            next={"type": ["integer", "null"], "description": "Pass as before."},
                        ),
                        errors=(400, 401, 403),
                    ),
                    "parameters": [
                        _query("before", "Only tasks with a smaller id.", ID_MAX),
                        _query("limit", f"How many; {PAGE_SIZE} if not said.", PAGE_SIZE_MAX),
                    ],
                }
            },
            "/tasks/{task_id}/": {
                "get": {
                    **_operation(
                        "getTask",
                        "The state of a task, and its result.",
                        _ref("Task"),
                        errors=(401, 403, 404),
                    ),
                    "parameters": [task_path],
                }
            },
        },
        "components": {"schemas": _SCHEMAS},
    }


def _operation(
    name: str, summary: str, schema: dict[str, Any], *, errors: tuple[int, ...]
) -> dict[str, Any]:
    responses = {"200": _response("It worked.", schema)}
    responses |= {str(code): _response(_ERRORS[code], _ref("Error")) for code in errors}
    return {"operationId": name, "summary": summary, "responses": responses}


def _response(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _query(name: str, text: str, maximum: int) -> dict[str, Any]:
    schema = {"type": "integer", "minimum": 1, "maximum": maximum}
    return {"name": name, "in": "query", "description": text, "schema": schema}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _array(name: str) -> dict[str, Any]:
    return {"type": "array", "items": _ref(name)}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


_ERRORS = {
    400: "Something in the request does not fit; the message says what.",
    401: "Nobody has signed in.",
    403: "You may not, or the CSRF token is missing.",
    404: "There is no such job or user, or no such task that you may see.",
    413: "The body is larger than DATA_UPLOAD_MAX_MEMORY_SIZE.",
}
_TEXT = {"type": "string"}
_MOMENT = {"type": ["string", "null"], "format": "date-time"}
_SCHEMAS = {
    "Error": _object(message=_TEXT),
    "Job": _object(
        task_name=_TEXT,
        name=_TEXT,
        description=_TEXT,
        obj_type=_TEXT,
        max_items={"type": "integer"},
        is_for_staff={"type": "boolean"},
        arguments={
            "type": "array",
            "items": _object(
                name=_TEXT, schema={"type": "object"}, is_required={"type": "boolean"}, help=_TEXT
            ),
        },
    ),
    "Task": _object(
        id={"type": "integer"},
        func_name=_TEXT,
        label=_TEXT,
        status={"enum": [status.value for status in Status]},
        progress={"type": "number", "minimum": 0, "maximum": 1},
        created=_MOMENT,
        started=_MOMENT,
        ended=_MOMENT,
        duration={"type": ["number", "null"]},
        retry_attempts={"type": "integer"},
        result={},
        result_text={"type": ["string", "null"]},
        error=_TEXT,
    ),
}
