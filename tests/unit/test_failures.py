"""A client without memory ends in a sentence; it does not wait for a thread that will never begin."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lorabbit_client.execution.failures import FAILED, OUT_OF_MEMORY

PATIENCE = 60.0
GOES_ON = "it goes on"
WATCHED = f"""
import _thread, os, resource, threading
from lorabbit_client.execution.failures import exit_on_thread_memory_error

def fail(error):
    raise error

exit_on_thread_memory_error()
tasks = len(os.listdir("/proc/self/task"))
before = threading.Thread(target=print)
before.start()
before.join()
{{body}}
threading.Event().wait({{wait}})
print({GOES_ON!r})
"""
STARVED = """
while len(os.listdir("/proc/self/task")) > tasks:
    pass
resource.setrlimit(resource.RLIMIT_AS, (0, resource.RLIM_INFINITY))
threading.Thread(target=print).start()
"""
"""The stack of the thread that ended is used again, and then there is no memory for its first call."""
CLIENT = """
import resource, sys, threading
from pathlib import Path
from lorabbit.config.settings import ClientSettings
from lorabbit_client.__main__ import main

settings = ClientSettings(folder=Path(sys.argv[1]), address="a", broker_url="amqp://guest:guest@127.0.0.1:1/")
threading.stack_size(256 * 2**20)
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 64 * 2**20, resource.RLIM_INFINITY))
sys.exit(main(settings))
"""


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE)  # noqa: S603


@pytest.mark.parametrize(
    "body",
    [
        "threading.Thread(target=fail, args=(MemoryError(),)).start()",
        "_thread.start_new_thread(fail, (MemoryError(),))",
        STARVED,
    ],
    ids=["runs", "begins", "starved"],
)
def test_a_thread_that_finds_no_memory_ends_the_client_in_a_sentence(body: str) -> None:
    done = run(WATCHED.format(body=body, wait=PATIENCE))

    assert done.returncode == FAILED
    assert OUT_OF_MEMORY in done.stdout + done.stderr
    assert GOES_ON not in done.stdout
    assert "Traceback" not in done.stderr


def test_a_thread_that_fails_in_another_way_says_so_and_ends_nothing() -> None:
    done = run(WATCHED.format(body="_thread.start_new_thread(fail, (ValueError('odd'),))", wait=1))

    assert (done.returncode, done.stdout.split("\n")[-2]) == (0, GOES_ON)
    assert "ValueError: odd" in done.stderr


def test_a_client_that_gets_no_thread_at_its_start_ends_in_a_sentence(tmp_path: Path) -> None:
    done = run(CLIENT, str(tmp_path))

    assert done.returncode == FAILED
    assert OUT_OF_MEMORY in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
