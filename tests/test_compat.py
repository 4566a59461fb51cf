"""The page keeps to what Chrome 88, Firefox 85 and Safari 14 know, as compat.mjs reads it."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from browsers import unavailable
from harness import ROOT

MODULES = ("acorn@8.19.0", "acorn-walk@8.3.5", "postcss@8.5.33", "@mdn/browser-compat-data@8.1.9")

# a piece of a page -> how the check names what is wrong with it
TOO_NEW = {
    "<script>({ at: [1] }).at.at(-1)</script>": ".at",
    "<script>[1].findLast(Boolean)</script>": ".findLast",
    "<script>Object.hasOwn({}, 'a')</script>": "Object.hasOwn",
    "<script>structuredClone({})</script>": "structuredClone",
    "<script>crypto.randomUUID()</script>": ".randomUUID",
    "<script>AbortSignal.timeout(5)</script>": "AbortSignal.timeout",
    "<script>requestIdleCallback(f)</script>": "requestIdleCallback",
    "<script>box.addEventListener('scrollend', f)</script>": "event scrollend",
    "<script>new BroadcastChannel('a')</script>": "BroadcastChannel",
    "<script>new RegExp('(?<!a)b')</script>": "look-behind",
    "<script>/(?<=a)b/</script>": "look-behind",
    "<script>/a/d</script>": "regular expression flag d",
    "<script>class A { #secret() {} }</script>": "syntax",
    "<script>class A { static { f() } }</script>": "syntax",
    "<style>p { inset: 0 }</style>": "css inset",
    "<style>p { display: flex; gap: 1em }</style>": "css gap in a flex box",
    "<style>p { height: 100dvh }</style>": "css unit",
    "<style>p { color: oklch(50% 0 0) }</style>": "css oklch()",
    "<style>p { overflow: clip }</style>": "css overflow: clip",
    "<style>p { aspect-ratio: 1 }</style>": "css aspect-ratio",
    "<style>p:has(b) { color: red }</style>": "css :has",
    "<style>p { b { color: red } }</style>": "css nesting",
    "<style>@layer a { p { color: red } }</style>": "css @layer",
    "<dialog>a</dialog>": "<dialog>",
    "<p inert>a</p>": "<p inert>",
}
OLD_ENOUGH = """<p hidden>a</p>
<style>p { display: grid; gap: 1em; color: rgba(0, 0, 0, .5) } p:hover { color: var(--a) }</style>
<script>
const at = [1], own = { lost: 1 }
own.lost; at?.[0] ?? at.flatMap(String); at.b ||= /(?<year>\\d)/u;
box.addEventListener('scroll', at)</script>
"""


@pytest.fixture(scope="module")
def modules(npm: Callable[..., Path]) -> Path:
    if not shutil.which("node"):
        unavailable("node is not installed")
    return npm(*MODULES)


def check(page: Path, modules: Path) -> tuple[int, list[str]]:
    command = ["node", str(ROOT / "tests" / "compat.mjs"), str(page), str(modules)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_old_browsers_know_all_that_the_page_uses(modules: Path) -> None:
    assert check(ROOT / "static" / "index.html", modules) == (0, [])


def test_the_check_finds_what_is_too_new(modules: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(OLD_ENOUGH + "\n".join(TOO_NEW))

    code, found = check(page, modules)

    assert code == 1
    wanted = [
        f"line {line}: {what}"
        for line, what in enumerate(TOO_NEW.values(), OLD_ENOUGH.count("\n") + 1)
    ]
    assert [want for want in wanted if not any(line.startswith(want) for line in found)] == []


def test_the_check_lets_old_features_pass(modules: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(OLD_ENOUGH)

    assert check(page, modules) == (0, [])
