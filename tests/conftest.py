"""What the tests are given: a log, servers, viewers, browsers; two processes share the files."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("harness", "page_actions")  # before they are imported

from browsers import BROWSERS, Browser, Page
from harness import FIRST, TOKEN, Server, Viewer, append
from page_actions import Watch, watching
from several_processes import pytest_runtestloop as pytest_runtestloop


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a minute, so its file comes first")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put first what takes longest: else one of the two processes waits for it in the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    in_browsers = {item.path for item in items if "browser" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: (item.path not in slow, item.path not in in_browsers))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "AUTO_REPAIR_AUDIT.log"


@pytest.fixture
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(log: Path, *options: object, **more: Any) -> Server:
        servers.append(Server(log, *options, folder=tmp_path_factory.mktemp("server"), **more))
        return servers[-1]

    with contextlib.ExitStack() as stack:
        yield start
        for server in servers:
            stack.callback(server.check)


@pytest.fixture
def view() -> Iterator[Callable[..., Viewer]]:
    with contextlib.ExitStack() as stack:

        def start(server: Server, **options: Any) -> Viewer:
            viewer = Viewer(server, **options)
            stack.callback(viewer.close)
            return viewer

        yield start


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    return path


@pytest.fixture
def locked(serve: Callable[..., Server], log: Path, secret: Path) -> Server:
    append(log, FIRST)
    return serve(log, "--token-file", secret)


@pytest.fixture
def unlocked(serve: Callable[..., Server], log: Path) -> Server:
    append(log, FIRST)
    return serve(log)


@pytest.fixture(scope="module", params=["chromium", "firefox"])
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    with ExitStack() as stack:
        started = BROWSERS[request.param]()
        stack.callback(started.quit)
        yield started


@pytest.fixture
def watch(browser: Browser) -> Iterator[Watch]:
    yield from watching(browser)


@pytest.fixture
def window(browser: Browser) -> Iterator[Page]:
    page = browser.page()
    yield page
    page.close()
