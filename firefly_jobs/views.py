"""Registered jobs over HTTP: list them, start one, look what became of it.

Every answer is JSON; that of a refusal is ``{"message": ...}``.  The description of it all is
served as ``openapi.json``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from django.core.exceptions import (
    BadRequest,
    PermissionDenied,
    RequestDataTooBig,
    SuspiciousOperation,
)
from django.db.models import QuerySet
from django.http import (
    Http404,
    HttpRequest,
    HttpResponse,
    JsonResponse,
    RawPostDataException,
    UnreadablePostError,
)
from django.http.multipartparser import MultiPartParserError
from django.middleware.csrf import CsrfViewMiddleware
from django.urls import reverse
from django.utils.decorators import method_decorator
from django.utils.module_loading import import_string
from django.views import View
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import csrf_exempt

from . import api
from .conf import get_settings
from .exceptions import JobRefused
from .job_registry import find, get_job_from_name, is_staff, registered_jobs
from .models import JobStart, TaskModel

_SAFE = {"GET", "HEAD", "OPTIONS"}
_SEES_ALL = "firefly_jobs.view_taskmodel"


class _CsrfCheck(CsrfViewMiddleware):
    """Tells the reason instead of answering with a page."""

    def _reject(self, request: HttpRequest, reason: str) -> Any:  # noqa: ARG002 - Django calls it
        return reason


@lru_cache(maxsize=8)
def _authenticator(name: str) -> Callable[[HttpRequest], Any]:
    found: Callable[[HttpRequest], Any] = import_string(name)
    return found


# It changes nothing, and what it answers to a POST is 405, with or without a token.
@method_decorator(csrf_exempt, name="dispatch")
class JsonView(View):
    """A view that says in JSON, too, which methods it has."""

    def http_method_not_allowed(self, request: HttpRequest, *_args: Any, **_kwargs: Any) -> Any:
        """Answer in JSON, too."""
        allowed = ", ".join(name.upper() for name in self.http_method_names if hasattr(self, name))
        message = f"{request.method} is not allowed here, but {allowed}."
        return JsonResponse({"message": message}, status=405, headers={"Allow": allowed})


# Looked at in dispatch: a request that another authenticator accepts needs no token.
@method_decorator(csrf_exempt, name="dispatch")
# What one user may see is kept for no other, and a status is asked for again and again.
@method_decorator(never_cache, name="dispatch")
class ApiView(JsonView):
    """A view for users, by session or by ``FIREFLY_JOBS["API_AUTHENTICATOR"]``."""

    user: Any = None

    def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        """Find out who asks, and answer what is refused."""
        try:
            self._authenticate(request)
            return super().dispatch(request, *args, **kwargs)
        except JobRefused as refusal:
            found = refusal
        except _TOLD as error:
            found = _refusal(error)
        return JsonResponse({"message": found.message}, status=found.status_code)

    def _authenticate(self, request: HttpRequest) -> None:
        if name := get_settings().API_AUTHENTICATOR:
            self.user = _authenticator(name)(request)
        if self.user is None:
            self.user = getattr(request, "user", None)
            if request.method not in _SAFE and self._is_known:
                # Before the check: that looks for a token in a form, and nobody could read the
                # body of a form in parts afterwards.
                request.body  # noqa: B018 - reading it keeps it
                check: Any = _CsrfCheck(lambda _request: HttpResponse())
                check.process_request(request)
                if reason := check.process_view(request, None, (), {}):
                    message = f"CSRF check failed: {reason}"
                    raise JobRefused(message, 403)
        if not self._is_known:
            message = "Sign in first."
            raise JobRefused(message, 401)
        if not self.user.is_active:
            message = "This user is not active."
            raise JobRefused(message, 403)

    @property
    def _is_known(self) -> bool:
        return self.user is not None and bool(self.user.is_authenticated)

    def visible(self) -> QuerySet[TaskModel]:
        """Return the tasks that this user may see."""
        rows = TaskModel.objects.using(get_settings().DATABASE)
        if is_staff(self.user) and self.user.has_perm(_SEES_ALL):
            return rows
        starts = JobStart.objects.using(rows.db).filter(user_pk=str(self.user.pk))
        return rows.filter(pk__in=starts.values("task"))


class Jobs(ApiView):
    """What the user may start."""

    def get(self, _request: HttpRequest) -> JsonResponse:
        """List it."""
        return JsonResponse({"jobs": [api.job_as_json(job) for job in registered_jobs(self.user)]})


class Start(ApiView):
    """Start a job."""

    def post(self, request: HttpRequest, task_name: str) -> JsonResponse:
        """Start it on the objects in the body."""
        body = _body(request)
        registered = find(task_name)
        named = get_job_from_name(
            task_name,
            body.get("obj_type", registered.task_data_type),
            body.get("obj_pks", ()),
            registered.arguments_from_json(body.get("job_args")),
            user_pk=self.user.pk,
        )
        row = named.start()
        row.refresh_from_db()
        message = f"Started {registered.name!r} as task {row.pk}."
        return JsonResponse({"message": message, "task": api.task_as_json(row)})


class Tasks(ApiView):
    """What the user has started."""

    def get(self, request: HttpRequest) -> JsonResponse:
        """List it, the latest first."""
        rows = self.visible().order_by("-pk")
        limit = _number(request, "limit", api.PAGE_SIZE_MAX) or api.PAGE_SIZE
        if before := _number(request, "before", api.ID_MAX):
            rows = rows.filter(pk__lt=before)
        found = list(rows[: limit + 1])
        following = found[limit - 1].pk if len(found) > limit else None
        tasks = [api.task_as_json(row) for row in found[:limit]]
        return JsonResponse({"tasks": tasks, "next": following})


class OneTask(ApiView):
    """One of them."""

    def get(self, _request: HttpRequest, task_id: str) -> JsonResponse:
        """Return its state and its result."""
        # Not longer than any id: Python makes no number of thousands of digits.
        is_short = len(task_id) <= len(str(api.ID_MAX))
        is_id = is_short and task_id.isascii() and task_id.isdigit() and int(task_id) <= api.ID_MAX
        row = self.visible().filter(pk=int(task_id)).first() if is_id else None
        if row is None:
            message = f"There is no task {task_id} that you may see."
            raise JobRefused(message, 404)
        return JsonResponse(api.task_as_json(row))


class OpenApi(JsonView):
    """The description, for everybody."""

    def get(self, request: HttpRequest) -> JsonResponse:
        """Return it."""
        namespace = f"{request.resolver_match.namespace}:" if request.resolver_match else ""
        path = reverse(f"{namespace}openapi")
        return JsonResponse(api.description(path.removesuffix("openapi.json")))


# What Django answers with a page of its own: an authenticator, a job's can_start and whatever
# reads a body may raise it.  Anything else is a mistake of the project's, and is not hidden.
_TOLD = (
    *(Http404, PermissionDenied, SuspiciousOperation, BadRequest),
    *(MultiPartParserError, UnreadablePostError, RawPostDataException),
)


def _refusal(error: Exception) -> JobRefused:
    match error:
        case RequestDataTooBig():
            return JobRefused("The body is too large. Start the job on fewer objects.", 413)
        case Http404():
            return JobRefused(str(error) or "There is no such thing.", 404)
        case PermissionDenied():
            return JobRefused(str(error) or "You may not do this.", 403)
        case SuspiciousOperation():
            # What it says is for the log, as Django has it.
            logging.getLogger(f"django.security.{type(error).__name__}").error(str(error))
            return JobRefused("The request was refused.", 400)
        case UnreadablePostError() | RawPostDataException():
            return JobRefused("The body could not be read.", 400)
        case _:
            return JobRefused(str(error) or "The request makes no sense.", 400)


def _body(request: HttpRequest) -> dict[str, Any]:
    try:
        body = json.loads(request.body)
    except (ValueError, RecursionError) as error:
        message = f"The body is no JSON: {error}"
        raise JobRefused(message, 400) from error
    if not isinstance(body, dict):
        message = 'The body is an object such as {"obj_pks": [1, 2]}.'
        raise JobRefused(message, 400)
    if unknown := sorted(set(body) - {"obj_pks", "job_args", "obj_type"}):
        message = f"The body has obj_pks, job_args and obj_type, not {', '.join(unknown)}."
        raise JobRefused(message, 400)
    return body


def _number(request: HttpRequest, word: str, maximum: int) -> int | None:
    text = request.GET.get(word)
    if text is None:
        return None
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 1 <= number <= maximum:
        message = f"{word} must be a whole number from 1 to {maximum}."
        raise JobRefused(message, 400)
    return number
