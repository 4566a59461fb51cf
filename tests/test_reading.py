"""Reading: long lines, fields, colours, times, wrapping, and what is around a line."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from browsers import Page
from page_actions import (
    AT_REST,
    BOX,
    CENTRE,
    COUNT,
    HERE,
    LINES,
    TEXTS,
    Serve,
    Watch,
    click,
    ends_with,
    entries,
    frames,
    numbered,
    search,
    shows,
    write,
)

DETAILS = "((document.querySelector('#auditBox .details') || 0).innerText || '')"


def open_details(page: Page, text: str) -> None:
    line = f"{LINES}.find(line => line.textContent === {text!r})"
    area = page.js(f"{line}.getBoundingClientRect()")
    page.mouse(area["x"] + 8, area["y"] + 8)
    page.wait(f"{DETAILS} !== ''")


def test_a_json_line_is_unfolded_into_its_fields_and_filtered_by_one(
    serve: Serve, log: Path, watch: Watch
) -> None:
    written = [
        '{"level":"info","user":"ann","n":1}',
        '{"level":"warn","user":"bob","n":2}',
        "a=1 user=cy b=3",
    ]
    write(log, written)
    page = watch(serve(log).url)
    page.wait(f"{LINES}.length === 3")

    open_details(page, written[0])
    page.wait(f"/user/.test({DETAILS}) && /ann/.test({DETAILS})")
    page.js("document.querySelector('.details [aria-label=\"Only user ann\"]').click() || 1")
    shows(page, written[:1])
    page.press("Escape")
    page.wait(f"{LINES}.length === 3")
    open_details(page, written[2])
    page.js("document.querySelector('.details [aria-label=\"Without user cy\"]').click() || 1")

    shows(page, written[:2])


def test_the_rest_of_a_long_line_comes_on_a_click_and_a_match_in_it_into_view(
    serve: Serve, log: Path, watch: Watch
) -> None:
    long = "x " * 15_000 + "the needle at the end"
    write(log, ["first", long, "last"])
    page = watch(serve(log).url)
    page.wait(f"{LINES}.length === 3 && !!document.querySelector('.more')")

    search(page, "needle")
    page.wait("document.querySelectorAll('mark').length === 1")
    page.press("n")
    page.wait(AT_REST)
    mark = page.js("document.querySelector('mark').getBoundingClientRect()")
    assert page.js(f"{BOX}.getBoundingClientRect().top") < mark["top"] < 700
    page.js("document.querySelector('.more').click() || 1")

    page.wait(f"{TEXTS}[0] === {long!r}")
    assert page.js("document.querySelectorAll('.more').length") == 0


def test_colours_of_a_terminal_are_shown_and_their_codes_are_not(
    serve: Serve, log: Path, watch: Watch
) -> None:
    write(log, ["\x1b[1;31mred\x1b[0m and plain \x1b[42mground\x1b[m end"])
    page = watch(serve(log).url)

    shows(page, ["red and plain ground end"])
    assert page.js("document.querySelector('.c1.bold').textContent") == "red"
    search(page, "plain")
    page.wait(f"{COUNT} === '1 match'")
    assert page.js("document.querySelector('mark').textContent") == "plain"


def test_wrapping_and_times_are_a_matter_of_choice_that_is_remembered(
    serve: Serve, log: Path, watch: Watch
) -> None:
    write(log, entries("many words " * 40, "end"))
    url = serve(log).url
    page = watch(url)
    page.wait(f"{LINES}.length === 2")
    height = page.js(f"{LINES}[0].offsetHeight")

    page.press("w")
    page.wait(f"{LINES}[0].offsetHeight < {height}")
    assert page.js(f"{BOX}.scrollWidth > {BOX}.clientWidth")
    page.goto(url)
    page.wait(f"{LINES}.length === 2 && {BOX}.dataset.wrap === 'off'")
    page.press("w")
    page.wait(f"{LINES}[0].offsetHeight === {height}")
    click(page, "Menu")
    click(page, "Local times")
    page.wait(f"{BOX}.dataset.times === 'local'")
    page.wait("(document.querySelector('time').dataset.local || '').startsWith('2025-12-1')")
    click(page, "Local times")


def test_a_wrapped_line_hangs_below_its_beginning(serve: Serve, log: Path, watch: Watch) -> None:
    write(log, entries("many words " * 40))
    page = watch(serve(log).url)
    page.wait(f"{LINES}.length === 1")

    lefts = page.js(
        f"""(() => {{
            const range = document.createRange();
            range.selectNodeContents({LINES}[0]);
            return [...range.getClientRects()].filter(area => area.width > 20).map(area => Math.round(area.left));
        }})()"""
    )

    assert min(lefts[2:]) > lefts[0] + 5


def test_lines_around_a_match_are_shown_in_place(serve: Serve, log: Path, watch: Watch) -> None:
    written = write(log, numbered(0, 400))
    page = watch(serve(log).url)
    ends_with(page, written[-1])
    search(page, '"entry 200"')
    shows(page, written[200:201])

    open_details(page, written[200])
    click(page, "Lines around")

    page.wait(f"{DETAILS}.includes({written[196]!r}) && {DETAILS}.includes({written[204]!r})")
    assert page.js(TEXTS) == written[200:201]


def test_the_marked_line_is_in_the_address_and_a_link_shows_that_line_and_no_other(
    serve: Serve, log: Path, watch: Watch
) -> None:
    written = write(log, numbered(0, 3000))
    server = serve(log)
    page = watch(server.url)
    ends_with(page, written[-1])

    page.press("PageUp")
    page.wait(AT_REST)
    meant = page.js(
        f"{LINES}.filter(line => line.getBoundingClientRect().top > 200)[0].textContent"
    )
    open_details(page, meant)
    page.wait("/^#at=\\d+&line=[0-9a-f]{16}$/.test(location.hash)")
    address = page.js("location.href")
    other = watch(address)
    other.wait(f"{HERE} === {meant!r}")

    log.write_text("".join(f"{line}\n" for line in ["something else"] * 5000))
    third = watch(address)

    third.wait("/not in the log any more/.test(document.querySelector('#told').textContent)")
    assert third.js(HERE) is None


def test_a_match_is_not_marked_in_the_middle_of_another_ones_text(
    serve: Serve, log: Path, watch: Watch
) -> None:
    write(log, ["\x1b[31mab\x1b[0mcd"])
    page = watch(serve(log).url)

    search(page, "ab")

    page.wait(f"{COUNT} === '1 match'")
    assert page.js("[...document.querySelectorAll('mark')].map(mark => mark.textContent)") == ["ab"]
    frames(page)
    assert page.js(f"{CENTRE.format('document.querySelector(`mark`)')}.length") == 2


def test_a_silence_a_stamp_that_goes_back_and_one_in_the_future_are_marked(
    serve: Serve, log: Path, watch: Watch
) -> None:
    stamps = [
        "2025-12-17T08:00:00Z",
        "2025-12-17T13:30:00Z",
        "2025-12-17T12:00:00Z",
        "2099-01-01T00:00:00Z",
        "2099-01-01T00:00:01Z",
        "2025-12-17T12:00:02Z",
    ]
    write(log, [f"[{stamp}] entry" for stamp in stamps])
    page = watch(serve(log).url)
    page.wait(f"{LINES}.length === 6")

    seams = page.js(
        "[...document.querySelectorAll('.seam')].map(seam => seam.dataset.kind + seam.textContent)"
    )
    below = page.js("[...document.querySelectorAll('.seam + .line')].map(line => line.textContent)")

    assert below == [f"[{stamp}] entry" for stamp in (*stamps[1:4], stamps[5])]
    assert seams[:2] == ["silence5 h without an entry", "clockThe stamps go back by 1 h here."]
    assert seams[2].startswith("clockStamped ") and seams[2].endswith(" days in the future:")
    assert seams[3].startswith("clockThe stamps go back by ")


def test_an_entry_every_two_hours_scrolls_without_a_line_missing(
    serve: Serve, log: Path, watch: Watch
) -> None:
    begin = datetime(2024, 1, 1, tzinfo=UTC)
    moments = [begin + timedelta(hours=2 * number) for number in range(3000)]
    write(log, [f"[{at.isoformat()[:19]}Z] entry {number}" for number, at in enumerate(moments)])
    page = watch(serve(log).url)
    page.wait(f"{LINES}.length > 50")
    numbers = f"{LINES}.map(line => Number(line.textContent.split(' ').pop()))"
    seen: set[int] = set()

    for _ in range(100):
        shown = page.js(numbers)
        assert shown == list(range(shown[0], shown[0] + len(shown)))
        above = page.js(f"{BOX}.scrollTop")
        assert above > 3000 or shown[0] == 0 or not seen
        seen.update(shown)
        if 0 in seen:
            break
        page.js(f"{BOX}.scrollBy(0, -3000)")
        frames(page, 4)

    assert seen == set(range(3000))
    assert page.js("document.querySelectorAll('.seam[data-kind=silence]').length") > 50
