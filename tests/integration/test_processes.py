import re
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from django.conf import settings
from django.db import connections

from tests.support.waiting import eventually
from tests.testapp.models import Effect

WRITE_AND_WAIT = """
import sys, threading
from tests.testapp.models import Effect
print("there were", Effect.objects.count(), flush=True)
Effect.objects.create(task_key="from the process")
print("written", flush=True)
threading.Event().wait()
"""


def test_process_and_test_work_on_the_same_database(start_manage):
    Effect.objects.create(task_key="from the test")

    process = start_manage("shell", "--no-imports", "-c", WRITE_AND_WAIT)

    assert process.wait_for_line(r"there were (\d+)").group(1) == "1"
    process.wait_for_line("written")
    assert set(Effect.objects.values_list("task_key", flat=True)) == {
        "from the test",
        "from the process",
    }


def test_second_alias_is_shared_as_well(start_manage):
    code = "from django.db import connections; print(connections['other'].settings_dict['NAME'])"

    process = start_manage("shell", "--no-imports", "-c", code)

    name = re.escape(str(connections["other"].settings_dict["NAME"]))
    process.wait_for_line(f"{name}$")
    assert process.wait() == 0


def test_killed_process_ends_with_the_signal(start_manage):
    process = start_manage("shell", "--no-imports", "-c", WRITE_AND_WAIT)
    process.wait_for_line("written")

    assert process.kill9() == -signal.SIGKILL


def test_paused_process_goes_on_when_resumed(start_manage):
    process = start_manage("shell", "--no-imports", "-c", WRITE_AND_WAIT)
    process.wait_for_line("written")

    process.pause()
    assert process.returncode is None
    process.resume()
    process.terminate()

    assert process.wait() == -signal.SIGTERM


def test_missing_line_is_reported_with_the_output_as_soon_as_the_process_has_ended(start_manage):
    process = start_manage("shell", "--no-imports", "-c", "print('only this')")

    with pytest.raises(AssertionError, match=r"(?s)'never' *.* ended with 0.*only this"):
        process.wait_for_line("never", timeout_seconds=60)


def test_settings_of_a_process_can_be_overridden(start_manage):
    code = "from django.conf import settings; print(settings.FIREFLY_JOBS)"

    process = start_manage("shell", "--no-imports", "-c", code, jobs_settings={"LEASE_SECONDS": 2})

    process.wait_for_line("'LEASE_SECONDS': 2")
    assert "LEASE_SECONDS" not in settings.FIREFLY_JOBS


def test_closing_a_process_ends_its_children(start_manage):
    code = (
        "import subprocess, time\n"
        "child = subprocess.Popen(['sleep', '300'])\n"
        "print('child', child.pid, flush=True)\n"
        "child.wait()"
    )
    process = start_manage("shell", "--no-imports", "-c", code)
    child = process.wait_for_line(r"child (\d+)").group(1)

    process.close()

    def child_has_ended() -> None:
        with suppress(FileNotFoundError):
            assert Path(f"/proc/{child}/stat").read_text().split()[2] == "Z"

    eventually(child_has_ended)
