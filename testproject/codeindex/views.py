"""The web pages: look at the index, schedule a file, ask how its task fares."""

from http import HTTPStatus
from typing import Any

from django.core.paginator import Page, Paginator
from django.db import transaction
from django.db.models.functions import Length
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_GET, require_POST, require_safe

from firefly_jobs import TaskModel
from firefly_jobs.exceptions import BadSignature, PayloadError

from .forms import ScheduleForm, SearchForm
from .library import library_directory
from .models import FileMetadata, Function, IndexRequest, SourceFile, index_totals
from .tasks import index_file

FUNCTIONS_PER_PAGE = 25
NEWEST_FILES_SHOWN = 10
REQUESTS_SHOWN = 5
TASK_ID_DIGITS_MAX = 18


@require_safe
def index(request: HttpRequest) -> HttpResponse:
    """Show the index: counts, newest files, and the functions that were searched for."""
    return _render_index(request, ScheduleForm())


@require_POST
@transaction.atomic
def schedule(request: HttpRequest) -> HttpResponse:
    """Schedule one file, and note who asked for what.

    The task is a row like the note: both are there, or, if anything here fails, neither.
    """
    form = ScheduleForm(request.POST)
    if not form.is_valid():
        return _render_index(request, form, status=HTTPStatus.BAD_REQUEST)
    path = form.cleaned_data["path"]
    scheduled = index_file.schedule(path)
    IndexRequest.objects.create(path=path, task_id=scheduled.id)
    return redirect(reverse("codeindex:index", query={"scheduled": scheduled.id}))


@require_GET
def task_status(_request: HttpRequest, task_id: int) -> JsonResponse:
    """Answer with the status of a task, and its result or error once it has ended."""
    task = TaskModel.objects.filter(pk=task_id).first()
    if task is None:
        return JsonResponse({"error": f"There is no task {task_id}."}, status=HTTPStatus.NOT_FOUND)
    error = task.error or None
    try:
        returned = task.returned
    except (BadSignature, PayloadError) as unreadable:
        returned, error = None, str(unreadable)
    return JsonResponse(
        {
            "id": task.id,
            "status": task.status,
            "func_name": task.func_name,
            "returned": returned,
            "error": error,
            "retry_attempts": task.retry_attempts,
        }
    )


def _render_index(
    request: HttpRequest, schedule_form: ScheduleForm, *, status: int = HTTPStatus.OK
) -> HttpResponse:
    search_form = SearchForm(request.GET)
    query = search_form.cleaned_data["q"] if search_form.is_valid() else ""
    context = {
        "schedule_form": schedule_form,
        "search_form": search_form,
        "query": query,
        "found": _functions_named(query, request.GET.get("page")) if query else None,
        "totals": {label: f"{count:,}" for label, count in index_totals().items()},
        "newest_files": _newest_files(),
        "requests": _latest_requests(),
        "scheduled_id": _task_id(request.GET.get("scheduled", "")),
        "library": library_directory(),
    }
    return render(request, "codeindex/index.html", context, status=status)


def _task_id(text: str) -> int | None:
    """Return the id in the address after a redirect; anyone can type another address."""
    is_id = text.isascii() and text.isdecimal() and len(text) <= TASK_ID_DIGITS_MAX
    return int(text) if is_id else None


def _newest_files() -> list[dict[str, Any]]:
    files = list(SourceFile.objects.order_by("-parsed_at", "-pk")[:NEWEST_FILES_SHOWN])
    metadata = {
        row.path: row for row in FileMetadata.objects.filter(path__in=[file.path for file in files])
    }
    return [{"file": file, "metadata": metadata.get(file.path)} for file in files]


def _latest_requests() -> list[dict[str, Any]]:
    wishes = list(IndexRequest.objects.all()[:REQUESTS_SHOWN])
    statuses = dict(
        TaskModel.objects.filter(pk__in=[wish.task_id for wish in wishes]).values_list(
            "pk", "status"
        )
    )
    root = f"{library_directory()}/"
    return [
        {
            "path": wish.path.removeprefix(root),
            "task_id": wish.task_id,
            "status": statuses.get(wish.task_id, "deleted"),
            "requested_at": wish.requested_at,
        }
        for wish in wishes
    ]


def _functions_named(query: str, page: str | None) -> Page[Function]:
    # The shortest name comes first, so an exact match does.
    found = (
        Function.objects.filter(name__icontains=query)
        .select_related("source_file")
        .order_by(Length("name"), "name", "pk")
    )
    return Paginator(found, FUNCTIONS_PER_PAGE).get_page(page)
