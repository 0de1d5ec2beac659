"""Forms: one from the signature of a registered job, those of schedules and of saved jobs."""

from __future__ import annotations

import enum
import json
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin
from uuid import UUID

from django import forms
from django.contrib.admin.widgets import AdminDateWidget, AdminTextInputWidget
from django.core.exceptions import ValidationError
from django.core.serializers.json import DjangoJSONEncoder
from django.forms.fields import InvalidJSONInput
from django.utils.translation import gettext_lazy as _

from firefly_jobs import registry
from firefly_jobs.job_registry import Argument, RegisteredJob, registered_jobs
from firefly_jobs.json_arguments import NoSuchValueError, from_json
from firefly_jobs.models import SavedJob, ScheduleModel
from firefly_jobs.planning import check_call
from firefly_jobs.storable import is_storable

if TYPE_CHECKING:
    _ScheduleForm = forms.ModelForm[ScheduleModel]
    _SavedForm = forms.ModelForm[SavedJob]
else:
    _ScheduleForm = _SavedForm = forms.ModelForm

# Arguments may be called like anything else that the page posts.
PREFIX = "arg"


class JsonField(forms.CharField):
    """Any value, written as JSON, and read as an annotation asks for it."""

    widget = forms.Textarea(attrs={"rows": 2, "class": "vLargeTextField"})

    def __init__(self, *, hint: Any = None, initial: Any = None, **words: Any) -> None:
        super().__init__(initial=_as_json(initial), **words)
        self._hint = hint

    def to_python(self, value: Any) -> Any:
        """Read it."""
        text = super().to_python(value)
        if text in self.empty_values:
            return None
        try:
            return from_json(self._hint, json.loads(str(text)))
        except NoSuchValueError as error:
            message = _("This must be %(wanted)s.")
            raise ValidationError(message % {"wanted": error}) from None
        except (ValueError, RecursionError) as error:
            message = _("This is no JSON: %(error)s. A text needs double quotes.")
            raise ValidationError(message % {"error": error}) from None


def _as_json(value: Any) -> str | None:
    """Return a default as JSON; none, and nothing that JSON has no word for."""
    try:
        return None if value is None else json.dumps(value, cls=DjangoJSONEncoder)
    except (TypeError, ValueError):
        return None


def arguments_form(job: RegisteredJob) -> type[forms.Form]:
    """Return a form for the arguments of a registered job, made from its signature."""
    fields: dict[str, Any] = {a.name: _field(a) for a in job.arguments}

    def start(form: Any, data: Any = None) -> None:
        forms.Form.__init__(form, data, prefix=PREFIX)

    return type("ArgumentsForm", (forms.Form,), {**fields, "__init__": start})


def entered(form: forms.Form) -> dict[str, Any]:
    """Return what was entered; what was left empty, and cannot be empty, is left to its default."""
    found = {}
    for name, value in form.cleaned_data.items():
        field: Any = form.fields[name]
        is_empty = value is None or value == ""
        if is_empty and not field.required and not field.may_be_empty:
            continue
        found[name] = None if is_empty and field.may_be_none else value
    return found


def _field(argument: Argument) -> forms.Field:
    annotation, may_be_none = _without_none(argument.type)
    if argument.type is None and isinstance(argument.default, bool | str):
        # What nobody has annotated is like its default.
        annotation = type(argument.default)
    words: dict[str, Any] = {
        "label": argument.name.replace("_", " ").capitalize(),
        "help_text": argument.help,
        "required": argument.is_required and not may_be_none,
    }
    if not argument.is_required:
        words["initial"] = argument.default
    found: Any = _field_for(annotation, words, may_be_none=may_be_none)
    found.may_be_none = may_be_none
    # A default that is shown and then deleted was deleted on purpose.
    found.may_be_empty = may_be_none or annotation is str
    field: forms.Field = found
    return field


def _field_for(annotation: Any, words: dict[str, Any], *, may_be_none: bool) -> Any:
    if get_origin(annotation) is Literal:
        return _choice([(one, str(one)) for one in get_args(annotation)], words)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return _choice([(one, one.name) for one in annotation], words)
    if annotation is bool and may_be_none:
        # Yes, no, or neither.
        return forms.NullBooleanField(**words)
    if annotation not in _FIELDS:
        return JsonField(hint=annotation, **words)
    kind, more = _FIELDS[annotation]
    return kind(**{**words, **more})


_FIELDS: dict[Any, tuple[Any, dict[str, Any]]] = {
    # Not ticked is False.
    bool: (forms.BooleanField, {"required": False}),
    int: (forms.IntegerField, {}),
    float: (forms.FloatField, {}),
    Decimal: (forms.DecimalField, {}),
    datetime: (forms.DateTimeField, {}),
    date: (forms.DateField, {"widget": AdminDateWidget}),
    time: (forms.TimeField, {}),
    timedelta: (forms.DurationField, {}),
    UUID: (forms.UUIDField, {}),
    str: (forms.CharField, {"widget": AdminTextInputWidget, "strip": False}),
}


def _choice(pairs: list[tuple[Any, str]], words: dict[str, Any]) -> forms.Field:
    by_text = {text: value for value, text in pairs}
    default = next((text for value, text in pairs if value == words.get("initial")), None)
    choices = [(text, text) for text in by_text]
    if not words["required"] and default is None:
        choices.insert(0, ("", "---------"))
    return forms.TypedChoiceField(
        choices=choices,
        coerce=by_text.__getitem__,
        empty_value=None,
        **{**words, "initial": default},
    )


def _without_none(annotation: Any) -> tuple[Any, bool]:
    members = get_args(annotation)
    if type(None) in members and get_origin(annotation) is not Literal:
        others = [one for one in members if one is not type(None)]
        return (others[0] if len(others) == 1 else Any), True
    return annotation, False


# --- schedules


class ArgumentsField(forms.JSONField):
    """Arguments as JSON, which may be none."""

    widget = forms.Textarea(attrs={"rows": 3, "class": "vLargeTextField"})

    def prepare_value(self, value: Any) -> Any:
        """Show nothing where there is nothing."""
        text = "" if value is None else super().prepare_value(value)
        # As it may have been entered: no page could hold half a surrogate pair.
        return text if is_storable(text) else json.dumps(value)

    def to_python(self, value: Any) -> Any:
        """Read it."""
        try:
            return super().to_python(value)
        except RecursionError:
            raise ValidationError(_("This is nested too deeply.")) from None

    def bound_data(self, data: Any, initial: Any) -> Any:
        """Return what was entered, to be shown again."""
        try:
            return super().bound_data(data, initial)
        except RecursionError:
            return InvalidJSONInput(data)


class ScheduleForm(_ScheduleForm):
    """A schedule: what it calls, checked against the code, and when."""

    class Meta:
        model = ScheduleModel
        field_classes = {"arguments": ArgumentsField}  # noqa: RUF012 - as Django reads it
        fields = (
            *("name", "func_name", "saved_job", "arguments", "cron", "timezone", "every"),
            *("starts_at", "ends_at", "max_runs", "misfire", "overlap", "jitter", "is_paused"),
        )
        help_texts = {  # noqa: RUF012 - as Django reads it
            "saved_job": _("Or a saved job, in place of a function."),
            "arguments": _('{"args": [...], "kwargs": {...}}; empty: none, or as declared.'),
            "cron": _("minute hour day-of-month month day-of-week, such as */5 * * * *"),
            "timezone": _("Such as Europe/Oslo; empty: that of the project."),
            "every": _("Or an interval. With neither it runs by hand only."),
        }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "func_name" in self.fields:
            present = self.instance.func_name
            names = sorted({*registry.names(), *([present] if present else [])})
            self.fields["func_name"] = forms.ChoiceField(
                label=_("Function"),
                choices=[("", "---------"), *((name, name) for name in names)],
                required=False,
            )

    def clean(self) -> dict[str, Any]:
        """Check what is called as well."""
        found: dict[str, Any] = super().clean() or {}
        if not self.instance.owner and not self.instance.raw_call:
            is_one = bool(found.get("func_name")) != bool(found.get("saved_job"))
            if not is_one and "func_name" in self.fields:
                self.add_error("func_name", _("Choose a function, or a saved job."))
        return found

    def _post_clean(self) -> None:
        super()._post_clean()  # type: ignore[misc]
        if not self.errors:
            try:
                check_call(self.instance)
            except ValidationError as error:
                self._update_errors(error)  # type: ignore[attr-defined]


class SavedJobForm(_SavedForm):
    """A start that is kept by name."""

    class Meta:
        model = SavedJob
        field_classes = {"job_args": ArgumentsField}  # noqa: RUF012 - as Django reads it
        fields = (
            *("name", "task_name", "job_args"),
            *("target_type", "target_pk", "relation"),
        )
        help_texts = {  # noqa: RUF012 - as Django reads it
            "target_type": _(
                "Label of a model, such as shop.project; with its key it is optional."
            ),
            "relation": _("Name of a relation of the target, such as datafiles."),
            "job_args": _('By name, such as {"days": 7}.'),
        }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        jobs = registered_jobs()
        choices = [(job.task_name, f"{job.name} ({job.task_data_type})") for job in jobs]
        self.fields["task_name"] = forms.ChoiceField(label=_("Job"), choices=choices)

    def clean(self) -> dict[str, Any]:
        """Take over the type of objects, which the job says."""
        found: dict[str, Any] = super().clean() or {}
        kinds = {job.task_name: job.task_data_type for job in registered_jobs()}
        if found.get("task_name") in kinds:
            self.instance.obj_type = kinds[found["task_name"]]
        return found
