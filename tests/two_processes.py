"""Two processes share the test files, because a test waits more than it works.

Each takes the next file that is free.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = "TESTS_SHARED_IN"  # environment variable of the second process


class Share:
    """What one of the two processes takes; the second one writes down how it went."""

    def __init__(self, config: pytest.Config, folder: Path, second: bool) -> None:
        self.config, self.folder, self.second = config, folder, second
        self.mine: dict[Path, bool] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if item.path not in self.mine:
            self.mine[item.path] = self.takes(item.path.name)
        return None if self.mine[item.path] else True

    def takes(self, name: str) -> bool:
        with contextlib.suppress(FileExistsError):
            (self.folder / name).mkdir()
            return True
        return False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not self.second:
            return
        write = self.config.hook.pytest_report_to_serializable
        with open(self.folder / "reports", "a") as reports:
            reports.write(json.dumps(write(config=self.config, report=report)) + "\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, Any, Any]:
    if FOLDER in os.environ:
        session.config.pluginmanager.register(
            Share(session.config, Path(os.environ[FOLDER]), second=True)
        )
    elif len({item.path for item in session.items}) > 1 and not session.config.option.collectonly:
        with tempfile.TemporaryDirectory() as folder, second_process(session, Path(folder)):
            session.config.pluginmanager.register(Share(session.config, Path(folder), second=False))
            return (yield)
    return (yield)


@contextlib.contextmanager
def second_process(session: pytest.Session, folder: Path) -> Generator[None]:
    """Its results count as if they were of this one."""
    command = [sys.executable, "-m", "pytest", *session.config.invocation_params.args]
    with open(folder / "output", "w+b") as output:
        variables = os.environ | {FOLDER: str(folder)}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=variables
        )
        try:
            yield
            code = process.wait()
        finally:
            process.terminate()
            process.wait()
        for report in reports_in(session.config, folder / "reports"):
            session.config.hook.pytest_runtest_logreport(report=report)
        if code not in (0, 1):
            session.shouldfail = (
                f"the second process ended with {code}: {Path(output.name).read_text()}"
            )
            raise session.Failed(session.shouldfail)


def reports_in(config: pytest.Config, file: Path) -> Iterator[pytest.TestReport]:
    read = config.hook.pytest_report_from_serializable
    for line in file.read_text().splitlines() if file.exists() else ():
        report: pytest.TestReport = read(config=config, data=json.loads(line))
        if isinstance(report.longrepr, list):  # where and why a test was skipped: JSON has no tuple
            report.longrepr = tuple(report.longrepr)
        yield report
