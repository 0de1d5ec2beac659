"""The index in the admin."""

from django.contrib import admin

from .models import Class, FileMetadata, Function, IndexRequest, SourceFile

admin.site.register(
    SourceFile,
    list_display=("path", "module", "lines", "class_count", "function_count", "parsed_at"),
    search_fields=("path", "module"),
)
admin.site.register(
    FileMetadata, list_display=("path", "size_bytes", "modified_at"), search_fields=("path",)
)
admin.site.register(
    Class,
    list_display=("qualified_name", "source_file", "line"),
    list_select_related=("source_file",),
    raw_id_fields=("source_file",),
    search_fields=("name",),
)
admin.site.register(
    Function,
    list_display=("qualified_name", "source_file", "line", "is_async"),
    list_select_related=("source_file",),
    raw_id_fields=("source_file",),
    search_fields=("name",),
)
admin.site.register(IndexRequest, list_display=("path", "task_id", "requested_at"))
