"""The whole past: rotated files, packed or not, are part of the log."""

import gzip
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from browsers import Page
from harness import Server, pack, shift
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
    click,
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
    (tmp_path / "app.log.6.gz").write_bytes(b"nothing that can be unpacked")
    page: Page = watch(serve(log).url, trouble=True)
    ends_with(page, entry(LAST))
    page.wait("document.querySelector('#railFiles').getAttribute('d') !== ''")

    page.press("Home")
    page.wait(
        f"{FIRST}[0] === {entry(EACH * 2)!r} && /app.log.5.gz is damaged and was not read/.test({TOLD})"
    )
    ask_time(page, "2025-12-02 12:00")
    page.wait(
        f"/after 2025-12-02 12:00:00 UTC; app.log.5.gz is damaged and was not searched/.test({TOLD})"
    )
    page.wait(f"{HERE} === {entry(EACH * 2)!r}")
    page.press("End", "Escape")
    search(page, "needle")

    page.wait(
        f"/7 files.* searched at.*; app.log.5.gz is damaged and was not searched/.test({COVER})"
    )
    lost = range(2 * EACH)
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


ABOUT = "document.querySelector('#about')"
FOCUS = "document.activeElement.id"


def test_what_is_known_of_the_log_stands_in_a_panel(
    serve: Serve, tmp_path: Path, watch: Watch
) -> None:
    log = tmp_path / "app.log"
    write_past(log)
    log.chmod(0o640)
    damaged = tmp_path / "app.log.4.gz"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    (tmp_path / "app.log.bak").write_text("a copy\n")
    page = watch(serve(log, "--zone", "+01:00").url, trouble=True)
    ends_with(page, entry(LAST))

    page.press("i")
    page.wait(f"!{ABOUT}.hidden && !!{ABOUT}.querySelector('.files')")

    words = page.js(f"{ABOUT}.innerText")
    rows = page.js(
        f"[...{ABOUT}.querySelectorAll('.files tbody tr')].map(row => row.innerText.split(/\\s*\\t\\s*/))"
    )
    for fact in (
        "Oldest entry\t2025-12-01 01:00:00 +01:00",
        "ISO 8601; a stamp without a zone is in UTC+01:00",
        "mode -rw-r-----",
        "Append-only\tno",
        "not recognised, or no files\napp.log.bak",
    ):
        assert fact in words.replace("\n\t", "\t")
    names = ["app.log", *(f"app.log.{n}{'.gz' if n > 3 else ''}" for n in range(1, FILES + 1))]
    assert [row[0] for row in rows] == names
    assert rows[0][2:] == ["2025-12-07 07:00:00", "2025-12-07 07:19:00", "the log"]
    assert rows[-1][-1].startswith("packed, ") and "\tplain" in words
    search(page, "needle")
    page.wait(f"/app.log.4.gz.*damaged/.test({ABOUT}.innerText)")


def test_a_panel_has_the_keyboard_and_gives_it_back(site: Server, watch: Watch) -> None:
    page = watch(site.url)
    page.resize(800, 300)
    ends_with(page, entry(LAST))
    page.js("document.querySelector('#auditBox').focus() || 1")
    before = page.js(FIRST)

    page.press("i")
    page.wait(f"{FOCUS} === 'about' && {ABOUT}.scrollHeight > {ABOUT}.clientHeight")
    page.press("PageDown")
    page.wait(f"{ABOUT}.scrollTop > 0")
    page.press("Escape")
    page.wait(f"{FOCUS} === 'auditBox' && {ABOUT}.hidden")
    assert page.js(FIRST) == before
    page.resize(1000, 700)
    click(page, "Menu")
    click(page, "About")

    page.wait(f"{FOCUS} === 'about'")
    page.press("i")
    page.wait(f"{ABOUT}.hidden && {FOCUS} === 'more'")


@pytest.mark.parametrize("zone", ["Europe/Berlin", "-05:00"])
def test_stamps_without_a_zone_are_read_and_told_in_that_of_the_server(
    serve: Serve, tmp_path: Path, watch: Watch, zone: str
) -> None:
    log = tmp_path / "app.log"
    write(log, [f"2025-12-17 {hour:02}:30:00 entry {hour}" for hour in range(24)])
    page = watch(serve(log, "--zone", zone).url)
    ends_with(page, "2025-12-17 23:30:00 entry 23")

    page.press("g")
    page.type("2025-12-17 08:00")
    page.press("Enter")

    page.wait(f"{HERE} === '2025-12-17 08:30:00 entry 8'")
    place = {"-05:00": "XXX+05:00"}.get(zone, zone)
    told = page.js(TOLD)
    assert told.endswith(f" {date('2025-12-17 08:00', '%F %T %:z', place)}.")
    click(page, "Menu")
    click(page, "Local times")
    page.wait(f"{LINES}.every(line => line.querySelector('time').dataset.local)")
    stamped = page.js(f"{LINES}.map(line => line.querySelector('time').dataset.local)")
    moment = date("2025-12-17 08:30", "%s", place)
    browsers = page.js("Intl.DateTimeFormat().resolvedOptions().timeZone")
    assert stamped[8] == date(f"@{moment}", "%F %T", browsers)


def date(moment: str, form: str, zone: str) -> str:
    """Return what GNU date makes of a moment."""
    command = ["date", "-d", moment, f"+{form}"]
    environment = {**os.environ, "TZ": zone}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, check=True
    ).stdout.strip()


RANGE = "document.querySelector('#range')"


def ask_time(page: Page, words: str) -> None:
    page.press("g")
    page.type(words)
    page.press("Enter")


def stamped(begin: str, end: str) -> list[str]:
    """Return the entries from one time to another, as text sorts them."""
    return [text for text in map(entry, range(LAST + 1)) if begin <= text[1:17] < end]


def test_a_range_of_time_goes_through_all_files(site: Server, watch: Watch) -> None:
    page = watch(site.url)
    ends_with(page, entry(LAST))

    ask_time(
        page, "2025-12-04 02:30 to 2025-12-04 04:00"
    )  # ends one packed file, begins a plain one
    expected = stamped("2025-12-04T02:30", "2025-12-04T04:00")
    page.wait(f"{COUNT} === '{len(expected)} lines'")

    assert page.js(f"{LINES}.map(line => line.textContent)") == expected
    page.wait(f"{SEAMS}.join() === 'app.log.4.gz, until 2025-12-04 02:59:00 UTC'")
    search(page, "needle")
    page.wait(f"{COUNT} === '1 match' && {LINES}.length === 1")
    ask_time(page, "2025-12-01 00:00 to 2025-12-03 12:00")
    needles = [text for text in stamped("2025-12-01T00:00", "2025-12-03T12:00") if "needle" in text]
    page.wait(f"{COUNT} === '{len(needles)} matches'")
    assert page.js(f"{LINES}.map(line => line.textContent)") == needles

    address = page.js("location.href")
    page.goto("about:blank")
    page.goto(address)
    page.wait(f"{COUNT} === '{len(needles)} matches' && !{RANGE}.hidden")
    assert page.js("location.href") == address
    page.js(f"{RANGE}.click() || 1")
    page.wait(f"{LINES}.length === {FILES * EACH // 500 + 1}")


def test_a_range_stays_what_it_is_when_the_log_is_rotated(
    serve: Serve, tmp_path: Path, watch: Watch
) -> None:
    log = tmp_path / "app.log"
    write_past(log)
    page = watch(serve(log, "--interval", "0.2").url)
    ends_with(page, entry(LAST))
    ask_time(page, "2025-12-07 04:30 to 2025-12-07 06:10")  # into the log itself
    expected = stamped("2025-12-07T04:30", "2025-12-07T06:10")
    page.wait(f"{COUNT} === '{len(expected)} lines'")

    for turn in range(2):
        shift(log)
        write(log, [entry(LAST + 1 + 60 * turn + number) for number in range(60)])
        page.wait(
            f"{SEAMS}.filter(words => words.startsWith('The log was rotated')).length > {turn}"
        )
        assert page.js(f"{LINES}.map(line => line.textContent)") == expected
    ask_time(page, "2025-12-07 06:05 to 2025-12-07 06:25")  # two files that were the log meanwhile
    later = [entry(number) for number in range(FILES * EACH + 5, FILES * EACH + 25)]
    page.wait(f"{COUNT} === '20 lines'")

    assert page.js(f"{LINES}.map(line => line.textContent)") == later


def test_a_time_in_the_newest_file_that_is_packed_is_found(
    serve: Serve, tmp_path: Path, watch: Watch
) -> None:
    log = tmp_path / "app.log"
    write_past(log)
    pack(tmp_path / "app.log.1")
    pack(tmp_path / "app.log.2")
    page = watch(serve(log).url)
    ends_with(page, entry(LAST))

    ask_time(page, "2025-12-07 05:00")
    page.wait(f"{HERE} === {entry(6 * 1440 + 300)!r}")
    ask_time(
        page, "2025-12-06 04:59:30"
    )  # between the last entry of one and the first of the other

    page.wait(f"{HERE} === {entry(5 * 1440 + 300)!r}")
    page.press("PageUp")
    page.wait(f"{SEAMS}.includes('app.log.2.gz, until 2025-12-06 04:59:00 UTC')")


ERRORS = "document.querySelector('#errors').textContent"
BARS = "document.querySelector('#{}').getAttribute('d')"


def test_the_timeline_shows_what_is_in_older_files(
    serve: Serve, tmp_path: Path, watch: Watch
) -> None:
    log = tmp_path / "app.log"
    write_past(log)
    with open(tmp_path / "app.log.2", "a") as file:
        file.write("[2025-12-06T04:59:30Z] ERROR one\n[2025-12-06T04:59:40Z] ERROR two\n")
    page = watch(serve(log).url)
    ends_with(page, entry(LAST))

    page.wait(f"{ERRORS} === 'errors 2+'")  # packed files are not unpacked for it
    for series in ("guessBars", "bars", "errorBars"):
        page.wait(f"/M/.test({BARS.format(series)})")
    left, right = (
        page.js(
            f"Math.{end}(...{BARS.format('errorBars')}.match(/M[\\d.]+/g).map(x => +x.slice(1)))"
        )
        for end in ("min", "max")
    )
    middle = (5 * 1440 + 299) / (6 * 1500 + 20)
    assert abs(left / 1000 - middle) < 0.02 and right - left <= 8
    assert page.js(f"{BARS.format('borders')}.match(/M/g).length") == FILES

    guessed = page.js(f"{BARS.format('guessBars')}.length")
    search(page, "needle")
    page.wait(f"{COUNT} === '19 matches'")
    shares = [number / (6 * 1500 + 20) for number in range(7, LAST, 500)]
    places = f"{BARS.format('matchBars')}.match(/M[\\d.]+/g).map(x => x.slice(1) / 1000)"
    page.wait(f"{places}.length >= 19")
    for share in shares:
        page.wait(f"{places}.some(place => Math.abs(place - {share}) < 0.02)")
    page.wait(f"{BARS.format('guessBars')}.length < {guessed} / 10")


def test_a_silence_over_a_rotation_is_seen(serve: Serve, tmp_path: Path, watch: Watch) -> None:
    log = tmp_path / "app.log"
    write(log, [entry(number) for number in range(50)])
    page = watch(serve(log, "--interval", "0.2").url)
    ends_with(page, entry(49))
    kinds = (
        "[...document.querySelectorAll('#auditBox .seam')].map(seam => seam.dataset.kind).join()"
    )

    log.rename(tmp_path / "app.log.1")
    write(log, [entry(number) for number in range(400, 450)])
    ends_with(page, entry(449))
    assert page.js(kinds) == "rotated,silence"
    other = watch(page.js("location.href"))
    ends_with(other, entry(449))
    other.wait(f"{kinds} === 'file,silence'")


def test_a_file_that_a_rotation_deletes_is_said_to_be_gone(
    serve: Serve, tmp_path: Path, watch: Watch
) -> None:
    log = tmp_path / "app.log"
    write_past(log)
    page = watch(serve(log, "--interval", "0.2").url, trouble=True)  # it may be asked for once more
    ends_with(page, entry(LAST))
    page.wait("document.querySelector('#railFiles').getAttribute('d') !== ''")

    (tmp_path / f"app.log.{FILES}.gz").unlink()
    shift(log)
    write(log, [entry(LAST + 1)])
    ends_with(page, entry(LAST + 1))
    page.press("Home")
    page.wait(f"{FIRST}[0] === {entry(EACH)!r}")

    page.wait(f"{COVER} === 'app.log.6.gz stood here; it is gone by now'")


@pytest.mark.slow
def test_a_hundred_thousand_lines_are_scrolled_both_ways_while_the_log_is_rotated(
    serve: Serve, tmp_path: Path, watch: Watch
) -> None:
    log = tmp_path / "app.log"
    each, files = 7700, 12
    for age in range(files, -1, -1):
        begin = (files - age) * each
        data = "".join(f"{entry(number)}\n" for number in range(begin, begin + each)).encode()
        name = f"{log}.{age}.gz" if age > 3 else f"{log}.{age}" if age else str(log)
        Path(name).write_bytes(gzip.compress(data) if age > 3 else data)
    last = (files + 1) * each - 1
    page = watch(serve(log, "--interval", "0.2", "--rate-limit", "0", dev=False).url)
    ends_with(page, entry(last))
    seen: set[int] = set()
    seams: list[str] = []

    def scroll(pixels: int, end: int, at: list[int]) -> None:
        """Go on until that line is drawn; rotate when one of `at` is."""
        nonlocal last
        for _ in range(3000):
            shown = page.js(NUMBERS)
            assert shown == list(range(shown[0], shown[0] + len(shown)))
            seen.update(shown)
            seams.extend(page.js(SEAMS))
            if end in shown:
                return
            if at and at[0] in shown:
                at.pop(0)
                shift(log)
                pack(Path(f"{log}.4"))
                write(log, [entry(last + number) for number in range(1, 11)])
                last += 10
            page.js(f"({SCROLLER}).scrollBy(0, {pixels}) || 1")
            frames(page, 2)
        raise AssertionError(f"line {end} never came")

    scroll(-3900, 0, [80_000, 40_000])
    assert set(range((files + 1) * each)) <= seen
    seen.clear()
    scroll(3900, last, [])

    assert seen == set(range(last + 1))
    assert not [seam for seam in seams if "missing" in seam or "not read" in seam]
