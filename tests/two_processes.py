"""Two processes share the test files, because a test waits more than it works: each takes the next one that is free."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

FOLDER = "TESTS_SHARED_IN"  # environment variable of the second process


class Share:
    """What one of the two processes takes; the second one writes down how it went."""

    def __init__(self, folder: Path, second: bool) -> None:
        self.folder, self.second = folder, second
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
        if self.second:
            with open(self.folder / "reports", "a") as reports:
                reports.write(json.dumps(report._to_json()) + "\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, Any, Any]:
    if FOLDER in os.environ:
        session.config.pluginmanager.register(Share(Path(os.environ[FOLDER]), second=True))
    elif len({item.path for item in session.items}) > 1 and not session.config.option.collectonly:
        with tempfile.TemporaryDirectory() as folder, second_process(session, Path(folder)):
            session.config.pluginmanager.register(Share(Path(folder), second=False))
            return (yield)
    return (yield)


@contextlib.contextmanager
def second_process(session: pytest.Session, folder: Path) -> Generator[None]:
    """Its results count as if they were of this one."""
    command = [sys.executable, "-m", "pytest", *session.config.invocation_params.args]
    with open(folder / "output", "w+b") as output:
        variables = os.environ | {FOLDER: str(folder)}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=variables)
        try:
            yield
            code = process.wait()
        finally:
            process.terminate()
            process.wait()
        for line in (folder / "reports").read_text().splitlines() if (folder / "reports").exists() else ():
            session.config.hook.pytest_runtest_logreport(report=pytest.TestReport._from_json(json.loads(line)))
        if code not in (0, 1):
            session.shouldfail = f"the second process ended with {code}: {Path(output.name).read_text()}"
            raise session.Failed(session.shouldfail)
