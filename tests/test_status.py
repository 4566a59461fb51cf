"""One look from three metres: what state the log is in, and nothing that is not so."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from browsers import Browser, Page
from harness import append, eventually
from page_actions import (
    LINES,
    SHOWS,
    STATE,
    TOLD,
    Serve,
    Watch,
    click,
    ends_with,
    entries,
    frames,
    numbered,
    shows,
    write,
)

PROOF = "document.querySelector('#proof').textContent"
PROVED = "document.querySelector('#proof').dataset.state"
SEAMS = "[...document.querySelectorAll('#auditBox .seam')].map(seam => seam.dataset.kind)"
AGE = "document.querySelector('#age').textContent"
ALARM = "document.querySelector('#alarm').hidden"
HEADER = """[...document.querySelectorAll('header button, header input, #count')].filter(one => one.offsetWidth)
    .map(one => [one.id, ...['x', 'y', 'width', 'height'].map(name => Math.round(one.getBoundingClientRect()[name]))])
    .filter(([id]) => !/stop|count|searchBox/.test(id))"""


def tell(page: Page, message: str) -> None:
    """What a server says that this log cannot be brought to say."""
    page.js(f"onMessage({message}) || 1")


def test_a_missing_log_is_red_in_the_pill_the_title_and_the_header(
    serve: Serve, log: Path, watch: Watch
) -> None:
    written = write(log, entries("one"))
    # A question that is under way when the log goes gets 503, a word in the console.
    page = watch(serve(log, "--interval", "0.2").url, trouble=True)
    page.wait(f"{SHOWS} === 'live' && {PROVED} === 'ok'")
    icon = page.js("document.querySelector('#icon').href")

    log.unlink()
    page.wait(f"{SHOWS} === 'missing' && {PROVED} === 'unknown'")
    page.wait("document.title.startsWith('MISSING')")
    assert page.js("document.querySelector('#header').hasAttribute('data-alarm')")
    assert page.js("document.querySelector('#icon').href") != icon
    assert page.js(STATE) == "live"
    write(log, ["two"])

    page.wait(f"{SHOWS} === 'live' && document.title.startsWith('AUTO')")
    shows(page, [*written, "two"])


def test_an_alarm_stays_over_view_and_reload_and_on_every_tab_until_it_is_dismissed(
    serve: Serve, log: Path, watch: Watch
) -> None:
    write(log, numbered(0, 300))
    server = serve(log, "--interval", "0.2")
    url = server.url
    page = watch(url)
    ends_with(page, "[2025-12-17T17:40:37Z] entry 299")

    with open(log, "r+b") as file:
        file.seek(-60, os.SEEK_END)
        file.write(b"X" * 20)
    append(log, "and on\n")
    page.wait(f"{SHOWS} === 'altered' && {PROVED} === 'altered' && !{ALARM}")
    click(page, "View Audit Log")
    page.wait(f"{SEAMS}.length === 0 && {SHOWS} === 'altered'")
    page.goto(url)
    page.wait(f"{SHOWS} === 'altered'")
    eventually(lambda: "<3>" in server.errors(), 20)  # else the server finds it only afterwards
    click(page, "Dismiss")

    page.wait(f"{SHOWS} === 'live' && {ALARM}")
    page.goto(url)
    page.wait(f"{SHOWS} === 'live'")


@pytest.mark.parametrize("width", [1280, 360])
def test_no_word_of_the_state_is_cut_off(serve: Serve, log: Path, watch: Watch, width: int) -> None:
    write(log, entries("one"))
    page = watch(serve(log).url)
    page.resize(width, 700)
    frames(page, 5)

    for word in ("reconnecting", "connecting", "unreadable", "missing", "altered", "paused"):
        cut_off = page.js(
            f"""(pill => {{
                pill.dataset.shows = pill.textContent = {word!r};
                return pill.scrollWidth - pill.clientWidth;
            }})(document.querySelector('#status'))"""
        )
        assert cut_off == 0, word


def test_a_gap_between_generations_is_a_seam_and_no_complete(
    serve: Serve, log: Path, watch: Watch
) -> None:
    write(log, entries("one"))
    page = watch(serve(log).url)
    page.wait(f"{PROVED} === 'ok'")

    tell(
        page,
        """{ type: "generation", reason: "rotated", generation: "g2", start: 0, cursor: "",
                    gap: "app.log.2 cannot be read" }""",
    )

    page.wait(f"{SEAMS}.join() === 'rotated,gap'")
    assert "app.log.2 cannot be read" in page.js("document.querySelector('#lines').textContent")
    page.wait(f"{PROVED} !== 'ok'")


def test_an_unfinished_line_is_named_beside_complete(serve: Serve, log: Path, watch: Watch) -> None:
    write(log, entries("one"))
    page = watch(serve(log).url)
    page.wait(f"{PROVED} === 'ok'")
    end = log.stat().st_size

    tell(page, f"{{ type: 'checked', size: {end + 21}, end: {end}, unfinished: 21 }}")
    page.wait(f"{PROOF} === 'complete, but for 21 bytes of an unfinished line'")
    tell(page, f"{{ type: 'checked', size: {end + 99}, end: {end - 9}, unfinished: 21 }}")

    page.wait(f"{PROVED} === 'behind'")


def test_what_the_server_says_beside_ok_is_shown(serve: Serve, log: Path, watch: Watch) -> None:
    write(log, entries("one"))
    page = watch(serve(log).url)
    page.wait(f"{PROVED} === 'ok'")

    tell(page, "{ type: 'state', state: 'ok', detail: 'this file has no name any more' }")

    page.wait(f"{PROOF}.includes('this file has no name any more')")


def test_a_server_that_is_behind_us_is_asked_again_before_a_gap_is_shown(
    serve: Serve, log: Path, watch: Watch
) -> None:
    written = write(log, numbered(0, 50))
    kept = log.read_bytes()
    server = serve(log)
    page = watch(server.url, trouble=True)
    ends_with(page, written[-1])

    server.stop()
    page.wait(f"{SHOWS} === 'reconnecting'")
    log.write_bytes(kept[:1000])
    serve(log, port=server.port)
    eventually(lambda: sum("Connecting" in text for _, text in page.console) >= 3, 20)
    assert page.js(f"[{SEAMS}.length, {SHOWS}]") == [0, "reconnecting"]
    append(log, kept[1000:])

    page.wait(f"{SHOWS} === 'live'", timeout=30)
    assert page.js(SEAMS) == []


def test_an_entry_is_as_old_as_its_arrival_and_a_stamp_in_the_future_is_said(
    serve: Serve, log: Path, watch: Watch
) -> None:
    def stamped(ahead: timedelta) -> str:
        return f"[{(datetime.now(UTC) + ahead).isoformat()[:19]}Z] entry"

    write(log, [stamped(-timedelta(hours=5, minutes=1))])
    page = watch(serve(log).url)
    page.wait(f"{AGE} === 'last entry 5 h ago'")

    write(log, [stamped(-timedelta(hours=5))])
    page.wait(f"/^last entry \\d+ s ago$/.test({AGE})")
    write(log, [stamped(timedelta(hours=3, minutes=1))])

    page.wait(f"{AGE} === 'last entry stamped 3 h in the future'")


def test_the_header_never_moves(serve: Serve, log: Path, watch: Watch) -> None:
    written = write(log, numbered(0, 3000))
    page = watch(serve(log, "--interval", "0.2").url)
    for width in (1440, 360):
        page.resize(width, 700)
        page.wait(f"innerWidth === {width}")
        ends_with(page, written[-1])
        before, top = (
            page.js(HEADER),
            page.js("document.querySelector('#auditBox').getBoundingClientRect().top"),
        )

        page.press("/")
        page.type("entry 29")
        page.press("Enter")
        page.wait("!!document.querySelector('mark')")
        page.press("n")
        page.wait(f"{SHOWS} === 'held'")
        filtered = page.js(HEADER)
        page.press("Enter")
        page.wait("!document.querySelector('#back').hidden")
        page.press("Escape", "Escape")
        page.press("g")
        page.type("nonsense")
        page.press("Enter")
        page.wait(f"{TOLD} !== ''")
        page.press("Escape", "End")
        page.wait(f"{SHOWS} === 'live'")
        after = page.js(HEADER)

        assert page.js("document.querySelector('#auditBox').getBoundingClientRect().top") == top
        assert before == filtered == after, width


def test_what_is_new_since_one_looked_away_is_in_the_title_and_below_a_divider(
    serve: Serve, log: Path, watch: Watch, browser: Browser
) -> None:
    written = write(log, numbered(0, 10))
    page = watch(serve(log).url)
    ends_with(page, written[-1])
    cover = browser.page(window=False)
    page.wait("document.hidden")

    write(log, numbered(10, 13))
    page.wait("document.title.startsWith('(3) ')")
    cover.close()
    page.to_front()

    page.wait("!document.hidden && !document.title.startsWith('(')")
    page.wait("!!document.querySelector('.fresh')")
    assert (
        page.js("document.querySelector('.fresh').nextSibling.textContent")
        == "[2025-12-17T17:40:37Z] entry 10"
    )
    assert page.js(f"{LINES}.length") == 13


def test_a_refused_websocket_is_not_explained_by_guesses(
    serve: Serve, log: Path, watch: Watch
) -> None:
    write(log, entries("one"))
    server = serve(log)
    page = watch(server.url, trouble=True)

    page.js("explainRefusal('ws://127.0.0.1/ws/audit')")

    said = [text for _, text in page.console if text.startswith("❌")]
    assert len(said) == 1 and "426" not in said[0]
    assert "the server answers, but the WebSocket does not open" in said[0]
