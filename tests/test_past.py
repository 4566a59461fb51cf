"""The whole past: rotated files, packed or not, are part of the log."""

import gzip
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from browsers import Page
from harness import Server
from page_actions import (
    CENTRE,
    COUNT,
    COVER,
    FIRST,
    HERE,
    LINES,
    SCROLLER,
    SHOWS,
    TOLD,
    Serve,
    Watch,
    ends_with,
    frames,
    search,
    write,
)

FILES = 6
EACH = 1500
BEGIN = datetime(2025, 12, 1, tzinfo=UTC)
SEAMS = "[...document.querySelectorAll('#auditBox .seam')].map(seam => seam.textContent)"
NUMBERS = f"{LINES}.map(line => Number(line.textContent.split(' ').pop()))"


def entry(number: int) -> str:
    word = "needle" if number % 500 == 7 else "entry"
    return f"[{(BEGIN + timedelta(minutes=number)).isoformat()[:19]}Z] Created {word} {number}"


def write_past(log: Path) -> None:
    """Six files, the oldest three of them packed; the log itself has 20 lines."""
    for age in range(FILES, 0, -1):
        first = (FILES - age) * EACH
        data = "".join(f"{entry(number)}\n" for number in range(first, first + EACH)).encode()
        path = log.with_name(f"{log.name}.{age}")
        if age > 3:
            path = path.with_name(path.name + ".gz")
            data = gzip.compress(data)
        path.write_bytes(data)
    write(log, [entry(number) for number in range(FILES * EACH, FILES * EACH + 20)])


LAST = FILES * EACH + 19


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("past")
    log = folder / "app.log"
    write_past(log)
    with ExitStack() as stack:
        server = Server(log, folder=folder)
        stack.callback(server.check)
        yield server


def test_scrolling_up_goes_on_into_older_files_and_misses_no_line(
    site: Server, watch: Watch
) -> None:
    page = watch(site.url)
    ends_with(page, entry(LAST))
    page.wait(f"{LINES}.length > 200")
    seen: set[int] = set()
    seams: set[str] = set()

    for _ in range(400):
        shown = page.js(NUMBERS)
        assert shown == list(range(shown[0], shown[0] + len(shown)))
        seen.update(shown)
        seams.update(page.js(SEAMS))
        if 0 in seen:
            break
        page.js(f"({SCROLLER}).scrollBy(0, -3900)")
        frames(page, 3)

    assert seen == set(range(LAST + 1))
    assert any(seam.startswith("app.log.1, until 2025-12-07 05:59:00") for seam in seams)
    assert any(seam.startswith("app.log.6.gz") for seam in seams)
    while page.js(NUMBERS)[-1] < LAST:
        page.js(f"({SCROLLER}).scrollBy(0, 3900)")
        frames(page, 3)
        shown = page.js(NUMBERS)
        assert shown == list(range(shown[0], shown[0] + len(shown)))


def test_a_filter_and_its_total_go_through_all_files_and_say_so(site: Server, watch: Watch) -> None:
    page = watch(site.url)
    ends_with(page, entry(LAST))
    wanted = [entry(number) for number in range(LAST + 1) if "needle" in entry(number)]

    search(page, "needle")

    page.wait(f"/^7 files, 2025-12-01 to now searched at/.test({COVER})")
    page.wait(f"{COUNT} === '{len(wanted)} matches'")
    assert page.js(f"{LINES}.map(line => line.textContent)") == wanted
    page.js(f"{LINES}[1].scrollIntoView({{ block: 'center' }}) || 1")
    frames(page, 5)
    page.mouse(*page.js(CENTRE.format(f"{LINES}[1]")))
    page.wait(f"{HERE} === {wanted[1]!r} && {LINES}.length > 50")
    page.press("Escape")
    page.wait(f"{LINES}.length === {len(wanted)}")


def test_home_the_rail_and_a_time_lead_into_any_file(site: Server, watch: Watch) -> None:
    page = watch(site.url)
    ends_with(page, entry(LAST))
    page.wait("document.querySelector('#railFiles').getAttribute('d') !== ''")

    page.press("Home")
    page.wait(f"{FIRST}[0] === {entry(0)!r}")
    page.press("g")
    page.type("2025-12-05 12:00")
    page.press("Enter")
    page.wait(f"{HERE} === {entry(4 * 1440 + 720)!r}")
    page.press("g")
    page.type("2025-12-02 12:00")
    page.press("Enter")
    page.wait(f"{HERE} === {entry(1440 + 720)!r}")
    page.press("End")
    ends_with(page, entry(LAST))


def test_a_link_finds_its_line_in_the_file_where_it_is_by_now(
    serve: Serve, tmp_path: Path, watch: Watch
) -> None:
    log = tmp_path / "app.log"
    write(log, [entry(number) for number in range(300)])
    server = serve(log, "--interval", "0.2")
    page = watch(server.url)
    ends_with(page, entry(299))
    page.press("E", "PageUp")
    page.js("document.querySelectorAll('.line')[250].scrollIntoView() || 1")
    area = page.js("document.querySelectorAll('.line')[255].getBoundingClientRect()")
    page.mouse(area["x"] + 8, area["y"] + 8)
    page.wait("/line=/.test(location.hash)")
    address, marked = page.js(f"[location.href, {HERE}]")

    log.rename(tmp_path / "app.log.1")
    write(log, [entry(number) for number in range(300, 900)])
    other = watch(address)

    other.wait(f"/in app.log.1 by now/.test({TOLD}) && {HERE} === {marked!r}")


def test_a_damaged_file_is_said_and_passed_over(serve: Serve, tmp_path: Path, watch: Watch) -> None:
    log = tmp_path / "app.log"
    write_past(log)
    packed = tmp_path / "app.log.5.gz"
    packed.write_bytes(packed.read_bytes()[:-200])
    page: Page = watch(serve(log).url, trouble=True)
    ends_with(page, entry(LAST))

    search(page, "needle")

    page.wait(f"/7 files.* searched at.*not app.log.5.gz: damaged/.test({COVER})")
    lost = range(EACH, 2 * EACH)
    wanted = [entry(n) for n in range(LAST + 1) if "needle" in entry(n) and n not in lost]
    assert page.js(f"{LINES}.map(line => line.textContent)") == wanted


def test_what_is_only_in_a_rotated_file_is_found_and_the_files_are_named(
    serve: Serve, log: Path, watch: Watch
) -> None:
    write(log.with_name(f"{log.name}.1"), [entry(number) for number in range(20)])
    log.touch()
    page = watch(serve(log).url)
    page.wait(f"{SHOWS} === 'live'")

    search(page, "needle")
    page.wait(f"{COUNT} === '1 match' && /^2 files/.test({COVER})")
    search(page, "nowhere")

    page.wait(f"{COUNT} === '0 matches' && /^2 files.* searched at/.test({COVER})")
