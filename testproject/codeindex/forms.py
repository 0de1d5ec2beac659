"""What a visitor may send."""

from django import forms

from .library import OutsideLibraryError, resolve_source_file


class ScheduleForm(forms.Form):
    """Names a file of the standard library; cleaned to its absolute path."""

    path = forms.CharField(
        max_length=500,
        label="File",
        help_text="For example asyncio/tasks.py, or the absolute path.",
        widget=forms.TextInput(attrs={"spellcheck": "false", "autocomplete": "off"}),
    )

    def clean_path(self) -> str:
        """Refuse whatever is no source file of the standard library."""
        try:
            return str(resolve_source_file(self.cleaned_data["path"]))
        except OutsideLibraryError as error:
            raise forms.ValidationError(str(error), code="outside_library") from error


class SearchForm(forms.Form):
    """Part of a function's name; empty shows no results."""

    q = forms.CharField(
        max_length=100,
        required=False,
        label="Function name",
        widget=forms.TextInput(attrs={"type": "search", "spellcheck": "false"}),
    )
