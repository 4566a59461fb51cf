"""What the tests are given: a log, servers, viewers, browsers; two processes share the files."""

import contextlib
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("harness", "page_actions")  # before they are imported

from browsers import BROWSERS, Browser, Page, unavailable
from harness import FAULTS, FIRST, TOKEN, Server, Viewer, append
from page_actions import Watch, watching
from proxies import BELOW, nginx_before
from several_processes import pytest_runtestloop as pytest_runtestloop

# Firefox does everything with hands; the rest of the page is tried in it by --all.
IN_BOTH_BROWSERS = ("test_hands.py",)
WITHOUT_EVENTS = ("test_cuts.py", "test_following.py", "test_order.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="the tests that take long, too")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than half a minute: only with --all")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes long, unless --all asks for it; put first what takes longest."""
    chosen = list(items)
    if not config.option.all and not any("::" in argument for argument in config.args):
        chosen = [item for item in items if not takes_long(item)]
        left_out = [item for item in items if takes_long(item)]
        config.hook.pytest_deselected(items=left_out)

    slow = {item.path for item in chosen if item.get_closest_marker("slow")}
    in_browsers = {item.path for item in chosen if "browser" in getattr(item, "fixturenames", ())}
    count = Counter(item.path for item in chosen)

    def urgency(item: pytest.Item) -> tuple[bool, bool, int]:
        return item.path not in slow, item.path not in in_browsers, -count[item.path]

    chosen.sort(key=urgency)
    items[:] = chosen


def takes_long(item: pytest.Item) -> bool:
    """Return True for slow tests, and for one more round of the same in another way."""
    if item.get_closest_marker("slow") or "later" in getattr(item, "fixturenames", ()):
        return True
    variants = item.name.partition("[")[2]
    if item.path.name in WITHOUT_EVENTS and "polling" in variants:
        return True
    if variants in ("firefox-0]", "firefox-200]"):  # 20 lines a second are tried in both
        return True
    return "firefox" in variants and item.path.name not in IN_BOTH_BROWSERS


@pytest.fixture(scope="session")
def npm(pytestconfig: pytest.Config) -> Callable[..., Path]:
    """Install modules (NAME@VERSION) where the next run finds them; return that folder."""

    def install(*modules: str) -> Path:
        if not shutil.which("npm"):
            unavailable("npm is not installed")
        assert pytestconfig.cache
        folder = pytestconfig.cache.mkdir("-".join(modules).replace("@", "-").replace("/", "-"))
        options = ("--silent", "--no-save", "--no-audit", "--no-fund")
        command = ["npm", "install", *options, "--prefix", str(folder), *modules]
        if not all(
            (folder / "node_modules" / name.rpartition("@")[0]).is_dir() for name in modules
        ):
            try:
                subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
            except subprocess.SubprocessError as error:
                unavailable(f"npm install failed: {error}: {getattr(error, 'stderr', '')}")
        return folder

    return install


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


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Puts NGINX in front of servers; the first of them, as one reaches it through that."""
    with contextlib.ExitStack() as stack:

        def start(*servers: Server, **options: Any) -> Server:
            behind = stack.enter_context(nginx_before(tmp_path, {BELOW: [*servers]}, **options))
            return behind(BELOW)

        yield start


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


@pytest.fixture
def faults(tmp_path: Path) -> Iterator[Path]:
    """What goes wrong when the server reads: `slow SECONDS` for each piece, `flip OFFSET` once."""
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults" / "sitecustomize.py").write_text(FAULTS)
    control = tmp_path / "faults" / "now"
    control.write_text("")
    yield control
    control.write_text("")
