"""Several processes share the tests, because a test waits more than it works: three for each core.

A unit is some tests of a file, or of what one browser does in it. Each process takes the next unit
that is free, every other one from the end: so what works (browsers, which come first) runs beside
what waits. The results of the others count as if they were of the first.
AUDIT_STREAM_TESTS=1 is one process.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

MOST = 16  # tests in a unit: what its fixtures cost is paid once for each
FOLDER = "TESTS_SHARED_IN"  # environment variables of the other processes
FROM_END = "TESTS_FROM_END"
PROCESSES = int(os.environ.get("AUDIT_STREAM_TESTS") or min(12, 3 * (os.cpu_count() or 1)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    if session.config.option.collectonly or session.testsfailed:
        return None
    if FOLDER in os.environ:
        folder = Path(os.environ[FOLDER])
        reports = folder / f"{os.getpid()}.reports"
        session.config.pluginmanager.register(Recorder(session.config, reports))
        run_share(session, folder)
        return True

    others = min(PROCESSES, len({unit_of(item) for item in session.items})) - 1
    if others < 1:
        return None
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        for number in range(others):
            stack.enter_context(other_process(session, Path(name), number))
        run_share(session, Path(name))
    return True


def run_share(session: pytest.Session, folder: Path) -> None:
    """Run what this process takes, one test after the other, as pytest does it."""
    mine = itertools.chain(take(session.items, folder), [None])
    for item, following in itertools.pairwise(mine):
        assert item
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)


def take(items: list[pytest.Item], folder: Path) -> Iterator[pytest.Item]:
    """Yield the tests of each unit that is still free: whoever makes its folder has it."""
    units: dict[str, list[pytest.Item]] = {}
    count: Counter[str] = Counter()
    for item in items:
        file = unit_of(item)
        units.setdefault(f"{file}-{count[file] // MOST}", []).append(item)
        count[file] += 1
    order = reversed(units) if os.environ.get(FROM_END) else iter(units)
    for unit in order:
        with contextlib.suppress(FileExistsError):
            (folder / unit).mkdir()
            yield from units[unit]


def unit_of(item: pytest.Item) -> str:
    variant = getattr(item, "callspec", None)
    return f"{item.path.name}-{variant.params.get('browser', '') if variant else ''}"


class Recorder:
    """Writes down how the tests of another process went."""

    def __init__(self, config: pytest.Config, file: Path) -> None:
        self.config, self.file = config, file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        write = self.config.hook.pytest_report_to_serializable
        with open(self.file, "a") as reports:
            reports.write(json.dumps(write(config=self.config, report=report)) + "\n")


@contextlib.contextmanager
def other_process(session: pytest.Session, folder: Path, number: int) -> Iterator[None]:
    command = [sys.executable, "-m", "pytest", *session.config.invocation_params.args]
    variables = os.environ | {FOLDER: str(folder), FROM_END: "" if number % 2 else "1"}
    with open(folder / f"{number}.output", "wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=variables
        )
        try:
            yield
            code = process.wait()
        finally:
            process.send_signal(signal.SIGINT)  # so that it stops the servers that it started
            process.wait()

    for report in reports_in(session.config, folder / f"{process.pid}.reports"):
        session.config.hook.pytest_runtest_logreport(report=report)
    if code not in (0, 1, pytest.ExitCode.NO_TESTS_COLLECTED):
        said = (folder / f"{number}.output").read_text()
        session.shouldfail = f"another process ended with {code}: {said}"
        raise session.Failed(session.shouldfail)


def reports_in(config: pytest.Config, file: Path) -> Iterator[pytest.TestReport]:
    read = config.hook.pytest_report_from_serializable
    for line in file.read_text().splitlines() if file.exists() else ():
        report: pytest.TestReport = read(config=config, data=json.loads(line))
        if isinstance(report.longrepr, list):  # where and why a test was skipped: JSON has no tuple
            report.longrepr = tuple(report.longrepr)
        yield report
