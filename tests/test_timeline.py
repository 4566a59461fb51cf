"""The timeline and the rail as instruments: ticks, readout, levels, matches, silences, a range, zoom."""

from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from browsers import Page
from harness import Server
from page_actions import COUNT, FIRST, LINES, SHOWS, TEXTS, TOLD, Serve, Watch, click, search, write

BEGIN = datetime(2025, 12, 1, tzinfo=UTC)
LINES_WRITTEN = 20_000
ERRORS = range(5000, 5040)
READOUT = "document.querySelector('#readout').textContent"
PATH = "document.querySelector('#{}').getAttribute('d')"


def entry(number: int) -> str:
    """Ten days, one line in 43 s; between 12,000 and 12,001 there is a silence of a week."""
    at = (
        BEGIN
        + timedelta(seconds=43 * number)
        + (timedelta(days=7) if number > 12_000 else timedelta())
    )
    return f"[{at.isoformat()[:19]}Z] {'ERROR' if number in ERRORS else 'INFO'} entry {number}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("timeline")
    log = folder / "AUTO_REPAIR_AUDIT.log"
    log.write_text("".join(f"{entry(number)}\n" for number in range(LINES_WRITTEN)))
    with ExitStack() as stack:
        server = Server(log, folder=folder)
        stack.callback(server.check)
        yield server


@pytest.fixture
def page(site: Server, watch: Watch) -> Page:
    page = watch(site.url)
    page.wait("!document.querySelector('#timeline').hasAttribute('data-off')")
    page.wait("/^errors \\d+$/.test(document.querySelector('#errors').textContent)")
    return page


def at(page: Page, share: float) -> tuple[float, float]:
    area = page.js("document.querySelector('#picture').getBoundingClientRect()")
    return area["x"] + share * area["width"], area["y"] + area["height"] / 2


def test_ticks_say_when_and_a_long_silence_is_a_break(page: Page) -> None:
    ticks = page.js("[...document.querySelectorAll('#ticks span')].map(tick => tick.textContent)")

    assert len(ticks) == 6 and ticks[0].startswith("Mon") and "Dec" in ticks[0]
    page.wait(f"{PATH.format('breaks')} !== ''")


def test_errors_and_matches_are_drawn_over_the_time_and_on_the_rail(page: Page) -> None:
    page.wait(f"{PATH.format('errorBars')} !== '' && {PATH.format('railErrors')} !== ''")
    assert page.js(PATH.format("matchBars")) == ""

    search(page, '"entry 19"')
    page.wait(f"{COUNT} === '1,111 matches'")
    page.wait(f"{PATH.format('matchBars')} !== '' && {PATH.format('railMatches')} !== ''")
    page.drag(at(page, 0.3), at(page, 0.32), at(page, 0.35), pause_s=0.02)
    page.wait("!document.querySelector('#range').hidden")
    page.wait(f"/^\\d+ match/.test({COUNT}) && {COUNT} !== '1,111 matches'")
    page.wait(f"{PATH.format('matchBars')} !== '' && {PATH.format('railMatches')} !== ''")
    click(page, "Clear")

    page.wait(f"{PATH.format('matchBars')} === ''")


def test_the_pointer_reads_the_time_and_a_drawn_stretch_limits_the_filter_to_it(page: Page) -> None:
    page.drag(at(page, 0.3), at(page, 0.32), at(page, 0.35), pause_s=0.02)
    page.wait("!document.querySelector('#range').hidden")
    page.wait(f"{LINES}.length > 10")
    words = page.js("document.querySelector('#range').textContent")
    first, last = page.js(f"[{TEXTS}[0], {TEXTS}.pop()]")

    assert words[:10] <= first[1:11] <= last[1:11] <= words[27:37]
    assert page.js("/from=2025-12-0.*to=2025-12-0/.test(location.hash)")
    address = page.js("location.href")
    page.js("document.querySelector('#range').click() || 1")
    page.wait("document.querySelector('#range').hidden && !/from=/.test(location.hash)")
    page.goto("about:blank")
    page.goto(address)
    page.wait(f"document.querySelector('#range').textContent === {words!r}")


def test_hovering_shows_a_time_and_the_wheel_zooms(page: Page) -> None:
    ticks = "[...document.querySelectorAll('#ticks span')].map(tick => tick.textContent).join()"
    before = page.js(ticks)

    x, y = at(page, 0.5)
    page.mouse(x, y, wheel=-100)
    page.wait(f"{ticks} !== {before!r}")
    page.mouse(x, y, wheel=-100)
    page.drag((x, y), (x, y))
    page.wait(f"{SHOWS} === 'held'")

    page.js(
        "document.querySelector('#timeline').dispatchEvent(new PointerEvent('pointermove', { clientX: 300 })) || 1"
    )
    page.wait(f"/^2025-12-\\d\\d \\d\\d:\\d\\d:\\d\\d UTC/.test({READOUT})")


def test_what_is_typed_as_a_time_may_be_a_range(page: Page) -> None:
    page.press("g")
    page.type("2025-12-03 08:00 to 2025-12-03 09:00")
    page.press("Enter")

    page.wait(f"{LINES}.length > 10 && {TEXTS}[0].startsWith('[2025-12-03T08:00')")
    page.wait(f"{TEXTS}.pop().startsWith('[2025-12-03T08:59')")
    page.press("Escape")
    page.wait("document.querySelector('#range').hidden")
    page.press("g")
    page.type("2025-12-03 08:00")
    page.press("Enter")
    page.wait(f"/^The first entry at or after 2025-12-03 08:00:00/.test({TOLD})")
    page.press("g")
    page.type("09:00")
    page.press("Enter")

    page.wait(f"/after 2025-12-03 09:00:00/.test({TOLD})")
    assert page.js(FIRST)


def test_a_log_without_times_says_so_and_claims_nothing(
    serve: Serve, log: Path, watch: Watch
) -> None:
    write(log, [f"no time here, line {number}" for number in range(300)])
    page = watch(serve(log).url, trouble=True)

    page.wait("/no time that is known/.test(document.querySelector('#noTimes').textContent)")
    page.press("g")
    page.type("2025-12-03 08:00")
    page.press("Enter")

    page.wait(f"/time/.test({TOLD}) && !/at or after/.test({TOLD})")
    assert page.js(SHOWS) == "live"


def test_a_stamp_of_another_century_stretches_no_timeline(
    serve: Serve, log: Path, watch: Watch
) -> None:
    def stamp(number: int) -> str:
        year = {40: 2060, 90: 1970}.get(number, 2025)
        return (BEGIN + timedelta(minutes=number)).replace(year=year).isoformat()[:19]

    write(log, [f"[{stamp(number)}Z] entry {number}" for number in range(150)])
    page = watch(serve(log).url)
    page.wait("!document.querySelector('#timeline').hasAttribute('data-off')")

    for share, hour in ((0.02, "00"), (0.98, "02")):
        x, _ = at(page, share)
        move = f"new PointerEvent('pointermove', {{ clientX: {x} }})"
        page.js(f"document.querySelector('#timeline').dispatchEvent({move}) || 1")

        page.wait(f"{READOUT}.startsWith('2025-12-01 {hour}:')")


TICKS = "[...document.querySelectorAll('#ticks span')].map(tick => tick.textContent)"
SECONDS = f"({PATH}.match(/M[\\d.]+/g) || []).map(bar => Math.round(bar.slice(1) * 60 / 1000))"


@pytest.mark.parametrize("stamps", [[0], [0, 0, 1, 1, 3, 5, 6, 6, 6], [0, 40], [*[0] * 300, 9, 9]])
def test_in_a_log_of_some_seconds_bars_stand_only_where_lines_are(
    serve: Serve, log: Path, watch: Watch, stamps: list[int]
) -> None:
    begin = BEGIN.replace(second=45, minute=17)
    moments = [(begin + timedelta(seconds=second)).isoformat()[:19] for second in stamps]
    write(log, [f"[{at}Z] ERROR entry {number}" for number, at in enumerate(moments)])
    page = watch(serve(log).url)

    page.wait(f"/M/.test({PATH.format('errorBars')})")

    expected = sorted(set(stamps))
    for series in ("bars", "errorBars"):
        assert page.js(SECONDS.format(series)) == expected
    ticks = page.js(TICKS)
    assert ticks[:2] == ["00:17:45", "00:17:57"] and len(set(ticks)) == len(ticks) == 6
    assert page.js(PATH.format("breaks")) == ""


MARKS = "({}.match(/M/g) || []).length"


def test_what_comes_while_one_looks_is_marked_too(serve: Serve, log: Path, watch: Watch) -> None:
    begun = datetime(2025, 12, 17, tzinfo=UTC)

    def entry(number: int) -> str:
        level = "ERROR" if number % 10 == 0 else "INFO"
        return f"[{begun + timedelta(seconds=number):%Y-%m-%dT%H:%M:%SZ}] {level} entry {number}"

    write(log, list(map(entry, range(100))))
    page = watch(serve(log).url)
    search(page, "entry")
    errors, matches = (MARKS.format(PATH.format(f"rail{name}")) for name in ("Errors", "Matches"))
    page.wait(f"{errors} === 10 && {matches} === 100")

    write(log, list(map(entry, range(100, 150))))

    page.wait(f"{errors} === 15 && {matches} === 150 && {COUNT} === '150 matches'")
    newest = f"Math.max(...{PATH.format('railErrors')}.match(/ [\\d.]+/g).map(Number))"
    assert page.js(newest) > 900  # of 1,000, entry 140 of 150
    page.wait(
        f"Math.max(...{PATH.format('errorBars')}.match(/M[\\d.]+/g).map(x => +x.slice(1))) > 900"
    )
