"""Everyone: both schemes, no mouse, no animation, high contrast, 400 % zoom, print, a screen reader."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from browsers import ChromiumPage, Page
from harness import eventually
from page_actions import (
    BOX,
    LINES,
    SHOWS,
    TEXTS,
    Serve,
    Watch,
    click,
    ends_with,
    entries,
    frames,
    numbered,
    search,
    write,
)

AXE = "axe-core@4.14.1"
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
in_chromium = pytest.mark.parametrize("browser", ["chromium"], indirect=True)

GROUND = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"


@pytest.fixture(scope="module")
def axe(npm: Callable[..., Path]) -> str:
    return (npm(AXE) / "node_modules" / "axe-core" / "axe.min.js").read_text()


def violations(page: Page, axe: str) -> list[str]:
    """What axe-core finds, without what is drawn outside of the window."""
    if not page.js("!!window.axe"):
        for start in range(0, len(axe), 100_000):
            page.js(
                f"(window.part = (window.part || '') + {json.dumps(axe[start : start + 100_000])}).length"
            )
        page.js("(0, window['ev' + 'al'])(window.part) || 1")
    found: list[str] = page.js(
        f"axe.run({{ runOnly: {RULES} }}).then(({{ violations }}) => violations.map(({{ id, nodes }}) =>"
        " `${id}: ${nodes.map(({ html, failureSummary }) => html.slice(0, 90) + failureSummary).join()}`))",
        60,
    )
    return found


def say_nonsense(page: Page) -> None:
    page.press("Escape", "Escape", "g")
    page.type("nonsense")
    page.press("Enter")


STATES: dict[str, Callable[[Page], None]] = {
    "live": lambda page: None,
    "held": lambda page: page.press("PageUp"),
    "filter": lambda page: search(page, "error"),
    "no match": lambda page: search(page, "zzz"),
    "menu": lambda page: click(page, "Menu"),
    "help": lambda page: page.press("Escape", "?"),
    "about": lambda page: page.press("Escape", "i"),
    "message": say_nonsense,
}


def media(page: Page, **features: str) -> None:
    assert isinstance(page, ChromiumPage)  # only Chromium lets a test choose
    page.cdp(
        "Emulation.setEmulatedMedia",
        features=[
            {"name": name.replace("_", "-"), "value": value} for name, value in features.items()
        ],
    )


@in_chromium
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_axe_finds_nothing_in_any_state(
    serve: Serve, log: Path, watch: Watch, axe: str, scheme: str
) -> None:
    write(
        log, [*numbered(0, 50), *entries("ERROR one", "WARN two", "INFO three", '{"a":1,"b":"c"}')]
    )
    page = watch(serve(log).url)
    page.wait(f"{LINES}.length > 40")
    click(page, "Menu")
    click(page, scheme.title())
    page.press("Escape")
    found = {}

    for name, enter in STATES.items():
        enter(page)
        frames(page, 10)
        found[name] = violations(page, axe)

    assert {name: bad for name, bad in found.items() if bad} == {}


@in_chromium
def test_the_look_follows_the_system_until_somebody_chooses(
    serve: Serve, log: Path, watch: Watch
) -> None:
    write(log, entries("one"))
    page = watch(serve(log).url)

    media(page, prefers_color_scheme="dark")
    page.wait(f"Math.max(...{GROUND}) < 40")
    media(page, prefers_color_scheme="light")
    page.wait(f"Math.min(...{GROUND}) > 200")
    click(page, "Dark or light")

    page.wait(f"Math.max(...{GROUND}) < 40")
    media(page, prefers_color_scheme="dark")
    click(page, "Menu")
    click(page, "As the system")


@in_chromium
def test_nothing_moves_for_who_wants_no_motion(serve: Serve, log: Path, watch: Watch) -> None:
    write(log, entries("ERROR one", "two"))
    page = watch(serve(log).url)
    page.wait(f"{LINES}.length === 2")
    media(page, prefers_reduced_motion="reduce")

    page.press("e")

    page.wait("!!document.querySelector('.here')")
    assert page.js("getComputedStyle(document.querySelector('.here')).animationName") == "none"


@in_chromium
def test_in_forced_colours_the_mark_the_thumb_and_the_levels_are_seen(
    serve: Serve, log: Path, watch: Watch
) -> None:
    write(log, [*numbered(0, 3000), *entries("ERROR one", "two")])
    page = watch(serve(log).url)
    page.wait(f"{LINES}.length > 60")
    media(page, forced_colors="active")

    page.press("E")
    page.wait("!!document.querySelector('.here')")

    style = "(what => getComputedStyle(document.querySelector(what)))"
    assert page.js(f"{style}('.here').outlineStyle") == "solid"
    assert page.js(f"{style}('#thumb').borderTopWidth") == "2px"
    assert page.js(f"{style}('[data-level=error]').borderLeftStyle") == "solid"


def test_at_400_percent_zoom_the_log_has_room_and_a_time_can_be_typed(
    serve: Serve, log: Path, watch: Watch
) -> None:
    written = write(log, numbered(0, 500))
    page = watch(serve(log).url)
    page.resize(320, 256)

    ends_with(page, written[-1])

    assert page.js(f"{BOX}.clientHeight") > 150
    assert page.js("document.querySelector('#searchBox').offsetWidth") > 60
    page.press("g")
    page.wait("document.activeElement.id === 'when' && document.activeElement.offsetWidth > 100")
    page.type("2025-12-17 17:40:37")
    page.press("Enter")
    page.wait(f"{SHOWS} === 'held'")


def test_print_gives_all_that_is_loaded(serve: Serve, log: Path, watch: Watch) -> None:
    written = write(log, numbered(0, 2000))
    page = watch(serve(log).url)
    ends_with(page, written[-1])
    page.wait(
        f"{LINES}.length > 200 && {LINES}.length < 1000 && document.querySelector('#above').textContent === ''"
    )

    def printed() -> list[str]:
        page.js("dispatchEvent(new Event('beforeprint')) || 1")
        texts: list[str] = page.js(TEXTS)
        page.js("dispatchEvent(new Event('afterprint')) || 1")
        return texts

    eventually(lambda: printed() == written)  # loading may go on meanwhile
    ends_with(page, written[-1])
    page.wait(f"{LINES}.length < 1000")


def test_new_entries_are_announced_but_not_each_of_them(
    serve: Serve, log: Path, watch: Watch
) -> None:
    write(log, entries("one"))
    page = watch(serve(log).url)
    page.wait(f"{LINES}.length === 1")
    said = "document.querySelector('#said').textContent"
    page.js(
        f"(window.heard = [], new MutationObserver(() => heard.push({said}))"
        ".observe(document.querySelector('#said'), { childList: true, characterData: true, subtree: true }))"
    )

    for number in range(20):
        write(log, [f"entry {number}"])
        frames(page, 2)
    page.wait(f"{LINES}.length === 21")

    heard = page.js("heard")
    assert 1 <= len(heard) <= 3 and heard[0].startswith("entry ")


def test_help_is_on_question_mark_and_every_key_has_a_button(
    serve: Serve, log: Path, watch: Watch
) -> None:
    write(log, entries("one"))
    page = watch(serve(log).url)

    page.press("?")
    page.wait("!document.querySelector('#help').hidden")
    assert "last 15 min" in page.js("document.querySelector('#help').innerText")
    page.press("Escape")
    page.wait("document.querySelector('#help').hidden")
    click(page, "Menu")
    names = page.js(
        "[...document.querySelectorAll('#menu button')].map(button => button.textContent).join()"
    )

    for name in (
        "Wrap",
        "Local times",
        "Beginning",
        "End",
        "Time…",
        "Previous error",
        "Next error",
        "Export",
        "About",
        "Keys",
    ):
        assert name in names
