"""The page as a window on the whole log: the rail, the timeline, the search, a match in its place, the address."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import page_actions
import pytest
from browsers import Page
from harness import Server, append
from page_actions import (
    AT_REST,
    CENTRE,
    COVER,
    FIRST,
    HERE,
    LINES,
    SCROLLER,
    SHOWS,
    TEXTS,
    TOLD,
    Watch,
    click,
    ends_with,
    frames,
    search,
    shows,
)

COUNT_WORDS = page_actions.COUNT
EMPTY = "document.querySelector('#empty').textContent"
COUNT = 100_000
NEEDLES = (777, 33_333, 50_777, 98_000)
BEGIN = datetime(2025, 12, 1, tzinfo=UTC)
NUMBERS = f"{LINES}.map(line => Number(line.textContent.split(' ').pop()))"
AT = "Number(({}).split(' ').pop())".format(f"{FIRST}[0]")


def entry(number: int) -> str:
    text = "Found a needle" if number in NEEDLES else "Created PostgreSQL database"
    text = {40_000: "ERROR: it says 7", 40_010: "DISCONNECTED terror", 40_020: "WARNING: low"}.get(
        number, text
    )
    return f"[{(BEGIN + timedelta(seconds=10 * number)).isoformat()[:19]}Z] {text} {number}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A log of 5\\.\\d MB, to be looked at only."""
    folder = tmp_path_factory.mktemp("window")
    log = folder / "AUTO_REPAIR_AUDIT.log"
    log.write_text("".join(f"{entry(number)}\n" for number in range(COUNT)))
    with ExitStack() as stack:
        server = Server(log, folder=folder)
        stack.callback(server.check)
        yield server


@pytest.fixture
def page(site: Server, watch: Watch) -> Page:
    page = watch(site.url)
    page.wait("!document.querySelector('#timeline').hasAttribute('data-off')")
    ends_with(page, entry(COUNT - 1))
    return page


def offset_of(number: int) -> int:
    return sum(len(entry(before)) + 1 for before in range(number))


def stretch(page: Page) -> list[int]:
    """The numbers of the lines that are drawn: none is missing between them."""
    page.wait(AT_REST)
    numbers: list[int] = page.js(NUMBERS)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return numbers


def press_at(page: Page, selector: str, across: float, down: float) -> None:
    area = page.js(f"document.querySelector({selector!r}).getBoundingClientRect()")
    page.mouse(area["x"] + across * area["width"], area["y"] + down * area["height"])


def click_line(page: Page, number: int) -> None:
    line = f"{LINES}.find(line => line.textContent.endsWith(' {number}'))"
    page.wait(f"!!{line}")
    page.mouse(*page.js(CENTRE.format(line)))


def test_the_rail_goes_anywhere_at_once_and_back_to_the_live_end(page: Page) -> None:
    for share in (0.5, 0.0, 0.8):
        press_at(page, "#rail", 0.5, share)
        page.wait(f"Math.abs({AT} / {COUNT} - {share}) < 0.04")
        stretch(page)

    press_at(page, "#rail", 0.5, 0.999)

    ends_with(page, entry(COUNT - 1))
    assert page.js("document.querySelector('#rail').getAttribute('aria-valuenow') > 5000000")


def test_scrolling_goes_on_from_there_in_both_directions(page: Page) -> None:
    page.press("Home")
    page.wait(f"{AT} === 0")
    seen = set(stretch(page))

    while max(seen) < 6_000:
        page.js(f"({SCROLLER}).scrollBy(0, 3900)")
        frames(page, 2)
        shown = page.js(NUMBERS)
        assert shown == list(range(shown[0], shown[0] + len(shown)))
        seen.update(shown)
    while page.js(AT) > 0:
        page.js(f"({SCROLLER}).scrollBy(0, -3900)")
        frames(page, 2)

    assert seen == set(range(max(seen) + 1))
    assert stretch(page)[0] == 0
    page.press("End")
    ends_with(page, entry(COUNT - 1))


def test_the_end_of_the_log_is_joined_again_by_scrolling(page: Page) -> None:
    press_at(page, "#rail", 0.5, 0.9)
    page.wait(f"{AT} < {COUNT - 1000}")
    stretch(page)

    behind = f"({SCROLLER}).scrollTop < ({SCROLLER}).scrollHeight - ({SCROLLER}).clientHeight - 4"
    while page.js(behind):
        page.js(f"({SCROLLER}).scrollBy(0, 3900)")
        frames(page, 2)
        page.wait(AT_REST)  # what is on its way has come: the lowest line is the last one

    assert stretch(page)[-1] == COUNT - 1
    page.wait(f"{SHOWS} === 'live'")


def test_a_click_on_the_timeline_and_its_keys_go_there(page: Page) -> None:
    text = "document.querySelector('#timeline').getAttribute('aria-valuetext')"

    press_at(page, "#picture", 0.25, 0.5)

    page.wait(f"Math.abs({AT} / {COUNT} - 0.25) < 0.02")
    assert page.js(FIRST)[0][1:20].replace("T", " ") + " UTC" == page.js(text)
    page.js("document.querySelector('#timeline').focus()")
    page.press("PageDown")
    page.wait(f"Math.abs({AT} / {COUNT} - 0.35) < 0.02")
    page.press("ArrowUp")
    page.wait(f"Math.abs({AT} / {COUNT} - 0.34) < 0.02")
    labels = page.js("[...document.querySelectorAll('#ticks span')].map(tick => tick.textContent)")
    assert len(labels) == 6 and labels[0].replace(",", "") == "Mon 1 Dec"
    bars = page.js("document.querySelector('#bars').getBoundingClientRect()")
    assert bars["width"] > 900 and bars["height"] > 20


@pytest.mark.parametrize(
    "typed", ["2025-12-04 12:00", "2025-12-04T14:00:00+02:00", "Dec 4 2025 12:00"]
)
def test_a_date_and_time_is_found(page: Page, typed: str) -> None:
    page.press("g")
    page.type(typed)
    page.press("Enter")

    page.wait(f"{HERE} === {entry(30_240)!r}")
    assert "2025-12-04 12:00:00 UTC" in page.js(TOLD)


def test_what_is_no_time_gets_one_line(page: Page) -> None:
    for typed in ("some day", "2025-02-30", "2025-12-04 25:00"):
        page.press("g")
        page.type(typed)
        click(page, "Jump")
        page.wait(f"{TOLD}.includes('not a time')")
        page.press("Escape")

    ends_with(page, entry(COUNT - 1))


def test_the_filter_reaches_through_the_whole_log(page: Page) -> None:
    search(page, "needle")

    page.wait(f"/^whole log searched at \\d\\d:\\d\\d:\\d\\d UTC/.test({COVER})")
    page.wait(f"{COUNT_WORDS} === '4 matches'")
    assert page.js(TEXTS) == [entry(number) for number in NEEDLES]
    search(page, "nothing-like-that")
    page.wait(f"{EMPTY}.includes('No line matches') && {COVER}.includes('whole log')")
    click(page, "Clear")
    ends_with(page, entry(COUNT - 1))
    stretch(page)


def test_of_very_many_matches_enough_are_fetched_and_more_when_one_scrolls_up(page: Page) -> None:
    search(page, "PostgreSQL")
    page.wait(f"/^searched [\\d.]+ [kM]B of 5\\.\\d MB.*scroll up/.test({COVER})")
    page.wait(f"{COUNT_WORDS} === '99,993 matches'")
    assert page.js("document.getElementById('stop').classList.contains('off')")
    before = page.js(COVER)

    for _ in range(12):
        page.js(f"({SCROLLER}).scrollBy(0, -5000)")
        page.wait(AT_REST)

    shown, start = page.js(NUMBERS), int(page.js(NUMBERS)[0])
    assert shown == [
        number for number in range(start, shown[-1] + 1) if "PostgreSQL" in entry(number)
    ]
    assert start < COUNT - 3000 and page.js(COVER) != before


def test_a_match_is_shown_in_its_place_and_escape_goes_back(
    serve: Callable[..., Server], log: Path, watch: Watch
) -> None:
    log.write_text("".join(f"{entry(number)}\n" for number in range(COUNT)))
    page = watch(serve(log).url)
    search(page, "needle")
    page.wait(f"{LINES}.length === 4 && {COVER}.includes('whole')")

    click_line(page, 50_777)

    page.wait(f"{HERE} === {entry(50_777)!r}")
    around = stretch(page)
    assert around[0] < 50_700 and around[-1] > 50_850
    append(log, "a needle that arrived meanwhile\n")
    page.press("Escape")
    expected = [*(entry(number) for number in NEEDLES), "a needle that arrived meanwhile"]
    shows(page, expected)
    page.press("Escape")
    ends_with(page, expected[-1])


def test_a_match_beyond_what_is_kept_of_a_line_is_there_again_after_a_look_aside(
    serve: Callable[..., Server], log: Path, watch: Watch
) -> None:
    log.write_text("needle one\n" + "x" * 20_000 + " needle\nneedle three\nother\n")
    page = watch(serve(log).url)
    search(page, "needle")
    page.wait(f"{LINES}.length === 3 && {COVER}.includes('whole')")

    page.js(f"{LINES}[0].dispatchEvent(new MouseEvent('click', {{ bubbles: true, clientX: 200 }}))")
    page.wait(f"{LINES}.length === 4")
    click(page, "Back")

    page.wait(f"{LINES}.length === 3")
    page.wait(f"/of 3$/.test({COUNT_WORDS})")


def test_enter_shows_the_match_that_n_went_to(page: Page) -> None:
    search(page, "needle")
    page.wait(f"{LINES}.length === 4 && {COVER}.includes('whole')")
    page.js("document.activeElement.blur()")

    page.press("n", "n", "Enter")

    page.wait(f"{HERE} === {entry(33_333)!r} && {LINES}.length > 100")
    page.press("n")
    page.wait(f"{HERE} === {entry(50_777)!r}")
    for number in (33_333, 777):
        page.press("N")
        page.wait(f"{HERE} === {entry(number)!r}")


def test_entries_that_say_error_by_word_stand_out_and_keys_go_to_them(page: Page) -> None:
    looks = f"{LINES}.filter(line => line.dataset.level).map(line => [line.dataset.level, line.textContent])"

    page.press("E")
    page.wait(f"{HERE} === {entry(40_020)!r}")
    page.press("E")
    page.wait(f"{HERE} === {entry(40_000)!r}")

    assert page.js(looks) == [["error", entry(40_000)], ["warning", entry(40_020)]]
    page.press("E")
    page.wait(f"{TOLD}.includes('no earlier one')")
    page.press("Home")
    page.wait(f"{AT} === 0")
    page.press("e")
    page.wait(f"{HERE} === {entry(40_000)!r}")


def test_a_link_opens_the_same_view(page: Page, site: Server, watch: Watch) -> None:
    press_at(page, "#rail", 0.5, 0.4)
    page.wait(f"{AT} < 50000")
    page.wait(AT_REST)
    place = page.js(FIRST)[0]
    line = f"{LINES}.find(line => line.textContent === {place!r})"
    page.mouse(page.js(f"{line}.getBoundingClientRect().left + 8"), page.js(CENTRE.format(line))[1])
    page.wait(f"location.hash.startsWith('#at=' + {line}.dataset.offset + '&line=')")

    other = watch(page.js("location.href"))

    other.wait(f"{FIRST}[0] === {place!r}")
    third = watch(f"{site.url}#q=needle")
    third.wait(f"{LINES}.length === 4 && document.querySelector('#searchBox').value === 'needle'")
    other.js("(location.hash = '#q=needle')")
    other.wait(f"{LINES}.length === 4 && document.querySelector('#searchBox').value === 'needle'")
    other.js(f"(location.hash = '#q=needle&at={offset_of(33_333)}&context=1')")
    other.wait(f"{HERE} === {entry(33_333)!r} && {LINES}.length > 100")
    other.press("Escape")
    shows(other, [entry(number) for number in NEEDLES])


def test_the_look_can_be_switched_and_is_remembered(page: Page, site: Server) -> None:
    ground = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    before = page.js(ground)

    page.press("t")
    after = page.js(ground)
    page.goto(site.url)

    dark, light = sorted((before, after))
    assert max(dark) < 40 and min(light) > 200
    assert page.js(ground) == after


def test_a_search_can_be_stopped_and_a_refusal_is_told(
    serve: Callable[..., Any], log: Path, watch: Watch
) -> None:
    log.write_text(("x" * 200 + "\n") * 150_000 + "the end\n")
    page = watch(serve(log).url, trouble=True)
    page.js("(window.fetchFirst = window.fetch)")
    stall = "(window.fetch = (path, more) => /search/.test(path) ? new Promise(() => 0) : fetchFirst(path, more))"
    page.js(f"{stall} && 1")

    search(page, "needle")
    page.wait(f"/^searched [\\d.]+ [kM]B of 30.2 MB/.test({COVER}) && {COUNT_WORDS} !== ''")
    click(page, "Stop")

    page.wait(f"{COVER}.includes('search stopped')")
    assert "No line matches" not in page.js(EMPTY)
    page.js("(window.fetch = fetchFirst) && 1")
    click(page, "Continue")
    page.wait(f"{COVER}.includes('whole log searched')")
    refuse = 'new Response(\'{"error": "too expensive"}\', { status: 422 })'
    answer = f"/search/.test(path) ? Promise.resolve({refuse}) : fetchFirst(path, more)"
    page.js(f"(window.fetch = (path, more) => {answer}) && 1")
    search(page, "another")
    page.wait(f"{COVER}.includes('too expensive')")
    assert "No line matches" not in page.js(EMPTY)
