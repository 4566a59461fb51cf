"""Hands: keys, wheel, finger and mouse as people use them, on a quiet log and on one that never stops."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import page_actions
import pytest
from browsers import Page
from harness import Server, append, eventually
from page_actions import (
    AT_REST,
    BOX,
    CENTRE,
    FIRST,
    HERE,
    LINES,
    NEWER,
    SHOWS,
    TOLD,
    Watch,
    ends_with,
    frames,
    numbered,
    search,
    write,
)

Feeding = Callable[[Path, int], None]

UNTIL_HELD = f"{SHOWS} === 'held'"
SELECTED = "getSelection().toString()"


@contextmanager
def fed(log: Path, a_second: int) -> Iterator[None]:
    """A program that writes so many lines a second meanwhile."""
    stop = threading.Event()

    def feed() -> None:
        number = 0
        while a_second and not stop.wait(max(0.05, 1 / a_second)):
            batch = max(1, a_second // 20)
            append(
                log, "".join(f"[2025-12-17T18:00:00Z] live {number + n}\n" for n in range(batch))
            )
            number += batch

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    folder = tmp_path_factory.mktemp("hands")
    log = folder / "AUTO_REPAIR_AUDIT.log"
    write(log, numbered(0, 2000))
    with ExitStack() as stack:
        server = Server(log, folder=folder)
        stack.callback(server.check)
        yield server, log


def middle(page: Page) -> tuple[float, float]:
    x, y = page.js(CENTRE.format(BOX))
    return x, y


def line_at(page: Page, index: int, across: float = 0.2) -> tuple[float, float]:
    """A point on the line that is so many lines below the first one in view; -1 is the last one."""
    seen = f"{LINES}.filter(line => line.getBoundingClientRect().bottom < innerHeight)"
    lines = f"{seen}.filter(line => line.getBoundingClientRect().top > {page_actions.TOP})"
    area = page.js(
        f"(all => all[({index} + all.length) % all.length].getBoundingClientRect())({lines})"
    )
    return area["x"] + across * area["width"], area["y"] + area["height"] / 2


def wheel_slowly(page: Page) -> None:
    for _ in range(6):
        page.mouse(*middle(page), wheel=-3)


def swipe(page: Page) -> None:
    x, y = middle(page)
    page.swipe(x, y, by=90, step=3)


LOOKING_UP: dict[str, Callable[[Page], None]] = {
    "ArrowUp": lambda page: page.press("ArrowUp"),
    "PageUp": lambda page: page.press("PageUp"),
    "Home": lambda page: page.press("Home"),
    "Space": lambda page: page.press(" "),
    "wheel by 3 pixels": wheel_slowly,
    "wheel by 100 pixels": lambda page: page.mouse(*middle(page), wheel=-100),
    "a finger": swipe,
    "the mouse on the rail": lambda page: page.mouse(
        *page.js(CENTRE.format("document.querySelector('#rail')"))
    ),
}


@pytest.mark.parametrize("a_second", [0, 20, 200])
def test_whatever_looks_up_holds_the_view_at_once(
    site: tuple[Server, Path], watch: Watch, a_second: int
) -> None:
    server, log = site
    page = watch(server.url)
    page.wait(f"{SHOWS} === 'live' && {LINES}.length > 60")
    failed = []

    with fed(log, a_second):
        for name, look_up in LOOKING_UP.items():
            look_up(page)
            try:
                page.wait(UNTIL_HELD, timeout=2)
                page.wait(AT_REST)
                before = page.js(FIRST)
                frames(page, 12)
                assert page.js(FIRST) == before and page.js(UNTIL_HELD)
            except AssertionError as error:
                failed.append((name, str(error)[:200]))
            page.press("End")
            page.wait(f"{SHOWS} === 'live'")

    assert failed == []


def test_keys_work_on_a_fresh_page_before_anything_has_the_focus(
    site: tuple[Server, Path], watch: Watch
) -> None:
    page = watch(site[0].url)
    page.wait(f"{LINES}.length > 60")
    before = page.js(FIRST)

    page.press("PageUp")

    page.wait(f"{FIRST}[0] !== {before[0]!r}")
    page.press("End")
    page.wait(f"{SHOWS} === 'live'")


def test_end_in_the_frame_of_another_key_is_the_live_end(
    site: tuple[Server, Path], watch: Watch
) -> None:
    page = watch(site[0].url)
    page.wait(f"{LINES}.length > 60")
    key = "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {{ key: '{}', bubbles: true }}));"

    page.js(f"(() => {{ {key.format('PageUp')} {key.format('End')} }})()")
    frames(page, 12)

    assert page.js(SHOWS) == "live"


def test_a_click_that_does_nothing_else_lets_the_view_follow_again(
    site: tuple[Server, Path], watch: Watch
) -> None:
    page = watch(site[0].url)
    page.wait(f"{LINES}.length > 60")

    page.mouse(*line_at(page, -4))

    page.wait(f"{SHOWS} === 'live'")


def test_a_selection_with_the_mouse_stays_what_was_meant_while_lines_arrive(
    site: tuple[Server, Path], watch: Watch
) -> None:
    server, log = site
    page = watch(server.url)
    page.wait(f"{LINES}.length > 60")
    begin, end = line_at(page, -12, 0.1), line_at(page, -2, 0.1)
    between = [(begin[0], begin[1] + (end[1] - begin[1]) * n / 10) for n in range(1, 10)]

    with fed(log, 50):
        page.drag(begin, *between, end, pause_s=0.05)
        selected = page.copy()
        frames(page, 30)

        assert page.js(UNTIL_HELD)
        assert page.copy() == selected
    assert 9 <= selected.count("\n") <= 11
    assert page.js(SELECTED)
    page.press("End")


def test_a_selection_over_lines_that_are_not_drawn_copies_all_of_them(
    serve: page_actions.Serve, log: Path, watch: Watch
) -> None:
    written = write(log, numbered(0, 3000))
    page = watch(serve(log).url)
    ends_with(page, written[-1])
    page.wait(f"{LINES}.length > 300")

    page.mouse(*line_at(page, -1))
    page.press("Home")
    page.wait(f"{FIRST}[0] === {written[0]!r}")
    page.drag(line_at(page, 0), shift=True)

    # The next frame extends the selection over the rows that are not drawn.
    eventually(lambda: page.copy().count("\n") > 2980)
    copied = page.copy().split("\n")
    start = written.index(copied[1])
    assert copied[1:-1] == written[start : start + len(copied) - 2]


def test_ctrl_a_selects_the_log_and_nothing_else(
    serve: page_actions.Serve, log: Path, watch: Watch
) -> None:
    written = write(log, numbered(0, 5000))
    page = watch(serve(log).url)
    ends_with(page, written[-1])
    page.wait(f"{LINES}.length > 300")

    page.js(
        "document.dispatchEvent(new KeyboardEvent('keydown', { key: 'a', ctrlKey: true, bubbles: true })) || 1"
    )

    page.wait(f"/selected/.test({TOLD})")
    copied = page.copy().split("\n")
    assert copied == written[-len(copied) :] and len(copied) > page.js(f"{LINES}.length")


def test_what_is_copied_is_the_log_with_blank_lines_control_signs_and_the_end_of_long_lines(
    serve: page_actions.Serve, log: Path, watch: Watch
) -> None:
    odd = "a\ttab, a\x1b[31mcolour\x1b[0m, a bell \x07, \u200b."
    written = ["first", "", odd, "x" * 20_000 + "end", "  漢字 שלום ", "last"]
    write(log, written)
    page = watch(serve(log).url)
    page.wait(f"{LINES}.length === 6")

    page.js(
        "document.dispatchEvent(new KeyboardEvent('keydown', { key: 'a', ctrlKey: true, bubbles: true })) || 1"
    )
    page.wait(f"/selected/.test({TOLD})")
    page.copy()  # reads the rest of the long line first
    page.wait(f"/^Copied|copy once more/.test({TOLD})")

    assert page.copy() == "\n".join(written)


def test_a_double_click_selects_a_word_in_a_filtered_view(
    site: tuple[Server, Path], watch: Watch
) -> None:
    page = watch(site[0].url)
    search(page, "entry")
    page.wait("!!document.querySelector('mark')")
    page.wait(AT_REST)

    page.double_click(
        *page.js(CENTRE.format("[...document.querySelectorAll('mark')].slice(-3)[0]"))
    )

    page.wait(f"{SELECTED}.trim() === 'entry'")
    frames(page, 30)
    assert page.js(f"{SELECTED}.trim()") == "entry" and page.js(
        "document.querySelector('#back').hidden"
    )


def test_slash_and_g_select_what_is_in_their_field(site: tuple[Server, Path], watch: Watch) -> None:
    page = watch(site[0].url)

    for key, field, typed in (("/", "#searchBox", "errors"), ("g", "#when", "2025-12-17 17:40")):
        page.press(key)
        page.type(typed)
        page.press("Enter")
        page.wait("document.activeElement.id === 'auditBox'")
        page.press(key)
        page.type("12:00")
        assert page.js(f"document.querySelector({field!r}).value") == "12:00"
        page.press("Escape")


def test_after_enter_in_the_time_field_the_log_has_the_keys(
    site: tuple[Server, Path], watch: Watch
) -> None:
    page = watch(site[0].url)
    page.wait(f"{LINES}.length > 60")

    page.press("g")
    page.type("2025-12-17 17:40:37")
    page.press("Enter")
    page.wait(f"{HERE} === '[2025-12-17T17:40:37Z] entry 0'")
    page.press("End")

    page.wait(f"{SHOWS} === 'live'")


def test_previous_error_at_the_beginning_says_that_there_is_none(
    serve: page_actions.Serve, log: Path, watch: Watch
) -> None:
    written = numbered(0, 300)
    written[5] = "[2025-12-17T17:40:37Z] ERROR five"
    page = watch(serve(log if write(log, written) else log).url)
    page.wait(f"{LINES}.length > 60")

    page.press("Home")
    page.wait(f"{FIRST}[0] === {written[0]!r}")
    page.press("E")
    page.wait(f"/no earlier one/.test({TOLD})")
    page.press("e")
    page.wait(f"{HERE} === {written[5]!r}")


def test_back_undoes_a_jump_a_context_and_a_filter_and_brings_a_cleared_one_back(
    serve: page_actions.Serve, log: Path, watch: Watch
) -> None:
    written = write(log, numbered(0, 3000))
    page = watch(serve(log).url)
    ends_with(page, written[-1])

    search(page, "99")
    page.wait("!!document.querySelector('mark')")
    page.press("Escape", "Escape")
    page.wait("!location.hash && document.querySelector('#searchBox').value === ''")
    page.js("history.back() || 1")
    page.wait("location.hash === '#q=99' && document.querySelector('#searchBox').value === '99'")
    page.wait("!!document.querySelector('mark')")
    page.wait(AT_REST)
    page.mouse(*line_at(page, -3))
    page.wait("!document.querySelector('#back').hidden && /context=1/.test(location.hash)")
    page.js("history.back() || 1")
    page.wait("document.querySelector('#back').hidden && location.hash.startsWith('#q=99')")
    page.js("history.back() || 1")
    page.wait("document.querySelector('#searchBox').value === ''")
    page.press("Home")
    page.wait(f"{FIRST}[0] === {written[0]!r}")
    page.js("history.back() || 1")
    page.wait(f"{SHOWS} === 'live'")


def test_a_click_draws_no_frame_around_the_log(site: tuple[Server, Path], watch: Watch) -> None:
    page = watch(site[0].url)
    page.wait(f"{LINES}.length > 60")

    page.mouse(*line_at(page, -4))

    assert page.js(f"getComputedStyle({BOX}).outlineStyle") == "none"
    page.press("PageUp")
    page.js(f"{BOX}.focus() || 1")
    assert page.js(f"getComputedStyle({BOX}).outlineStyle") == "solid"
    page.press("End")


def test_the_pill_says_held_and_the_button_how_many_came(
    serve: page_actions.Serve, log: Path, watch: Watch
) -> None:
    written = write(log, numbered(0, 500))
    page = watch(serve(log).url)
    ends_with(page, written[-1])

    page.press("PageUp")
    write(log, ["one more", "and another"])

    page.wait("document.querySelector('#status').textContent === 'held +2'")
    page.wait(f"{NEWER}.startsWith('2 new entries')")
    page.press("End")
    ends_with(page, "and another")
    assert page.js("document.querySelector('#status').textContent") == "live"
