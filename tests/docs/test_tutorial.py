"""The tutorials, followed step by step in an empty directory with this Python.

Blocks whose first line is a path are written to that file ("at the end": appended).  Lines of
``console`` blocks that start with ``$`` are run; the others must be in their output, in
order, with ``…`` for anything.  ``^C`` interrupts the command once it has printed what is
above.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from threading import Timer

import pytest

from .pages import TUTORIALS, Block, blocks, name_of

SECONDS_MAX = 60
INTERRUPT = "^C"
# What the page tells to look at in a browser, once the file is mended.
LOOK_AT_THE_PICTURE = """
from django.contrib.auth.models import User
from django.test import Client

client = Client(SERVER_NAME='localhost')
client.force_login(User.objects.get(username='anna'))
page = client.get('/admin/firefly_jobs/workflowmodel/1/change/').content.decode()
picture = page.partition('firefly-picture')[2].partition('</svg>')[0]
print(picture.count('<a '), 'boxes, and', *(w for w in ('failed 1', 'completed 6') if w in picture))
"""


def _environment() -> dict[str, str]:
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("FIREFLY", "DJANGO", "PYTHON"))
    }
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def _write(block: Block, directory: Path) -> None:
    first = block.text.splitlines()[0]
    match = re.match(r"# (\S+\.py)(, at the end)?$", first)
    assert match, f"line {block.line}: the first line does not name a file"
    path = directory / match[1]
    before = path.read_text() if match[2] else ""
    path.write_text(f"{before}\n{block.text}")


def _steps(block: Block) -> list[tuple[str, list[str]]]:
    """Return each command, which goes on while a double quote is open, and its output."""
    steps: list[tuple[str, list[str]]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            steps.append((line[2:], []))
        elif steps[-1][0].count('"') % 2:
            steps[-1] = (f"{steps[-1][0]}\n{line}", [])
        else:
            steps[-1][1].append(line)
    return steps


def _run(command: str, expected: list[str], directory: Path) -> None:
    with subprocess.Popen(
        ["bash", "-c", f"exec {command}" if INTERRUPT in expected else command],
        cwd=directory,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        overdue = Timer(SECONDS_MAX, process.kill)
        overdue.start()
        printed: list[str] = []
        for text in expected:
            if text == INTERRUPT:
                process.send_signal(signal.SIGINT)
                continue
            pattern = ".*".join(re.escape(part) for part in text.split("…"))
            for line in process.stdout:
                printed.append(line)
                if re.fullmatch(pattern, line.rstrip("\n")):
                    break
            else:
                pytest.fail(f"{text}\n{''.join(printed)}")
        printed += process.stdout
        code = process.wait()
        overdue.cancel()
    assert code == 0, f"{command}\n{''.join(printed)}"


def _follow(page: Path, directory: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            _write(block, directory)
        for command, expected in _steps(block) if block.language == "console" else []:
            _run(command, expected, directory)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("page", TUTORIALS, ids=name_of)
def test_every_step_of_a_tutorial_works(tmp_path: Path, page: Path) -> None:
    _follow(page, tmp_path)
    if page.name == "etl.md":
        _run(
            f'python manage.py shell -c "{LOOK_AT_THE_PICTURE}"',
            ["7 boxes, and failed 1 completed 6"],
            tmp_path,
        )
