"""Every example of the documentation runs; see ``pages`` for how they are marked."""

import ast
import inspect
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.core.management import call_command, get_commands, load_command_class

from firefly_jobs import conf

from .pages import PAGES, TUTORIALS, Block, blocks, checked, name_of

OUR_COMMANDS = sorted(name for name, app in get_commands().items() if app == "firefly_jobs")
WITH_EXAMPLES = [
    page
    for page in PAGES
    if page not in TUTORIALS and any(b.language == "python" for b in blocks(page))
]
WITH_COMMANDS = [page for page in PAGES if any(block.commands for block in blocks(page))]


def _expect(value: object, text: str) -> None:
    assert repr(value) == text


class Page:
    """The namespaces of one page's examples, and how to run a block in them."""

    def __init__(self) -> None:
        self._modules: dict[str, ModuleType] = {}

    def run(self, block: Block) -> None:
        """Run a block where it belongs."""
        if block.language == "python" and "no-run" in block.marks:
            ast.parse(block.text)
        elif block.language == "python":
            self._run_python(block)
        elif block.language == "console":
            for name, *arguments in block.commands:
                if name == "consume_tasks" and "--burst" in arguments:
                    call_command(name, *arguments)

    def _run_python(self, block: Block) -> None:
        module = self._module(block.module or "page")
        module.__dict__["_expect"] = _expect
        filename = f"{name_of(block.page)}:{block.line}"
        code = compile(
            checked(block.text),
            filename,
            "exec",
            flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
            dont_inherit=True,
        )
        if code.co_flags & inspect.CO_COROUTINE:

            async def main() -> None:
                await eval(code, module.__dict__)

            async_to_sync(main)()
        else:
            exec(code, module.__dict__)
        settings = module.__dict__.pop(conf.SETTING, None)
        assert settings is None or conf.problems(settings) == []

    def _module(self, name: str) -> ModuleType:
        if name not in self._modules:
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, loader=None)
            self._modules[name] = module
            if name != "page":
                sys.modules[name] = module
                parent, _, child = name.rpartition(".")
                if parent in sys.modules:
                    setattr(sys.modules[parent], child, module)
        return self._modules[name]


@pytest.mark.usefixtures("shop")
@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=name_of)
def test_the_examples_of_a_page_run_in_order(page: Path) -> None:
    session = Page()
    for block in blocks(page):
        try:
            session.run(block)
        except Exception as error:
            error.add_note(f"in the example at {name_of(page)}:{block.line}")
            raise


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
def test_the_commands_of_a_page_are_accepted_by_their_parsers(page: Path) -> None:
    for block in blocks(page):
        for name, *arguments in block.commands:
            if name in OUR_COMMANDS:
                command: Any = load_command_class("firefly_jobs", name)
                command.create_parser("manage.py", name).parse_args(arguments)


def test_a_page_that_names_an_unknown_command_would_be_noticed() -> None:
    named = {
        name for page in WITH_COMMANDS for block in blocks(page) for name, *_ in block.commands
    }
    assert named <= set(get_commands())
