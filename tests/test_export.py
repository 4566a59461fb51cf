"""Export: the bytes as they are, with a manifest that anybody can check with coreutils.

The oracles: the bytes that were written, grep, sha256sum, and the commands in the manifest, run by a shell.
"""

import base64
import gzip
import re
import subprocess
from pathlib import Path

import pytest
from browsers import ChromiumPage, Page
from harness import append, eventually, lines, numbered_files, shift
from page_actions import LINES, TOLD, Serve, Watch, click, ends_with, search

CATCH = """(() => {
    const made = URL.createObjectURL.bind(URL);
    const blobs = {};
    window.saved = {};
    URL.createObjectURL = blob => {
        const url = made(blob);
        blobs[url] = blob;
        return url;
    };
    HTMLAnchorElement.prototype.click = function () { window.saved[this.download] = blobs[this.href]; };
    return true;
})()"""
BASE64 = """new Promise((done, failed) => {{
    const reader = new FileReader();
    reader.onload = () => done(reader.result.split(',')[1] || '');
    reader.onerror = failed;
    reader.readAsDataURL(window.saved[{name!r}]);
}})"""


def export(page: Page, folder: Path) -> tuple[bytes, str]:
    """What the page saves, both files of it, also put into a folder."""
    page.js(CATCH)
    click(page, "Menu")
    click(page, "Export")
    page.wait("Object.keys(window.saved).length === 2", timeout=60)
    manifest, data = sorted(
        page.js("Object.keys(window.saved)"), key=lambda name: name[-5:] != "t.txt"
    )
    if not manifest.endswith(".manifest.txt"):
        manifest, data = data, manifest
    folder.mkdir()
    for name in (manifest, data):
        (folder / name).write_bytes(base64.b64decode(page.js(BASE64.format(name=name))))
    return (folder / data).read_bytes(), (folder / manifest).read_text()


def shell(command: str, folder: Path) -> str:
    """What a plain shell prints, in a folder; coreutils and zcat are all that it may find."""
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=folder,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert not done.stderr, done.stderr
    return done.stdout


def holds(manifest: str, saved: Path, logs: Path) -> bool:
    """Do all commands of a manifest agree?"""
    _, _, commands = manifest.partition("# Is the exported file")
    _, first, rest = commands.split("\n", 2)
    in_saved = shell(first, saved)
    in_logs = shell(rest.rpartition("# For the first command:")[0], logs)
    receipts = len(re.findall(r"^  audit-stream: receipt ", manifest, re.MULTILINE))
    assert receipts
    return in_saved.endswith(": OK\n") and in_logs == "OK\n" * (receipts + 1)


def history(log: Path) -> bytes:
    """A log with three rotated files; all bytes, oldest first."""
    return b"".join(numbered_files(log, 4, 300))


def opened(serve: Serve, log: Path, watch: Watch, *options: object, trouble: bool = False) -> Page:
    page = watch(serve(log, "--interval", 0.2, *options).url, trouble=trouble)
    page.wait(f"{LINES}.length > 5")
    page.wait("document.querySelector('#proof').dataset.state === 'ok'")
    return page


def test_everything_is_saved_over_all_files_and_checked_with_coreutils(
    serve: Serve, log: Path, watch: Watch, tmp_path: Path
) -> None:
    everything = history(log)
    page = opened(serve, log, watch)

    data, manifest = export(page, tmp_path / "saved")

    assert data == everything
    assert holds(manifest, tmp_path / "saved", log.parent)
    for words in (
        "content: everything",
        "who: 127.0.0.1",
        "machine: ",
        f"log: {log.name}",
        "Gaps: none",
    ):
        assert words in manifest
    assert f"zcat {log.name}.3.gz | head -c " in manifest
    with gzip.open(f"{log}.3.gz", "wb") as packed:
        packed.write(everything[: len(everything) // 4].replace(b"00000100", b"00000101"))
    assert not holds(manifest, tmp_path / "saved", log.parent)


def test_both_files_land_in_the_folder_for_downloads(
    serve: Serve, log: Path, watch: Watch, tmp_path: Path
) -> None:
    everything = history(log)
    page = opened(serve, log, watch)
    if not isinstance(page, ChromiumPage):
        pytest.skip("only Chromium is told where downloads go")
    saved = tmp_path / "saved"
    where = {"downloadPath": str(saved), "browserContextId": page.context}
    page.wire.call("Browser.setDownloadBehavior", {"behavior": "allow", **where})

    click(page, "Menu")
    click(page, "Export")

    done = eventually(lambda: sorted(saved.glob("*.log")), 30)
    ended = f"  {done[0].name}\n"  # the last line, once all of it was written
    eventually(lambda: [it for it in saved.glob("*.txt") if it.read_text().endswith(ended)], 30)
    (manifest,) = saved.glob("*.txt")
    assert done[0].read_bytes() == everything
    assert holds(manifest.read_text(), saved, log.parent)


def test_what_the_filter_shows_is_saved_as_the_bytes_that_they_are(
    serve: Serve, log: Path, watch: Watch, tmp_path: Path
) -> None:
    append(log, "odd old line\r\n")
    append(log, lines(300))
    shift(log)
    append(log, b"odd caf\xe9 \xff\n" + lines(5).encode() + "odd \ufffd\n".encode())
    append(log, "odd " + "x" * 40_000 + "\nodd and unfinished")
    page = opened(serve, log, watch)
    search(page, "odd")
    page.wait(f"{LINES}.length === 5")

    data, manifest = export(page, tmp_path / "saved")

    files = f"{log}.1 {log}"
    grepped = subprocess.run(f"cat {files} | grep -a odd", shell=True, capture_output=True).stdout
    assert data == grepped.rstrip(b"\n")
    assert holds(manifest, tmp_path / "saved", log.parent)
    assert 'content: lines that match "odd", 5 lines' in manifest


TRACE = """[2025-12-17T17:40:37Z] ERROR request {0} failed
java.lang.IllegalStateException: odd {0}
\tat com.example.Main.run(Main.java:{0})
Caused by: java.io.IOException: pipe {0}
"""


@pytest.mark.parametrize(
    "query",
    [
        "Main.java !42",
        pytest.param("odd", marks=pytest.mark.slow),
        pytest.param("IOException", marks=pytest.mark.slow),
        pytest.param("failed", marks=pytest.mark.slow),
    ],
)
def test_a_match_is_saved_with_its_entry_as_the_page_shows_it(
    query: str, serve: Serve, log: Path, watch: Watch, tmp_path: Path
) -> None:
    append(log, lines(3) + "".join(TRACE.format(number) + lines(40) for number in range(100)))
    shift(log)
    append(log, lines(300) + "".join(TRACE.format(number) for number in range(1000)) + lines(50))
    page = opened(serve, log, watch)
    search(page, query)
    page.wait("document.querySelector('#count').dataset.total > 0")

    data, manifest = export(page, tmp_path / "saved")

    words, _, without = query.partition(" !")
    traces = [TRACE.format(number) for number in [*range(100), *range(1000)]]
    matches = [
        [line for line in trace.splitlines() if words in line and not (without and without in line)]
        for trace in traces
    ]
    shown = [trace for trace, found in zip(traces, matches, strict=True) if found]
    assert data.decode() == "".join(shown)
    assert holds(manifest, tmp_path / "saved", log.parent)
    count = sum(map(len, matches))
    assert f", {count:,} line" in manifest
    assert f"with {4 * len(shown) - count:,} other lines of their entries" in manifest


def test_a_match_behind_zero_bytes_is_saved(
    serve: Serve, log: Path, watch: Watch, tmp_path: Path
) -> None:
    """A crash left them: the line begins behind them."""
    append(log, lines(5).encode() + b"\0" * 50 + b"odd one\n" + lines(3).encode())
    append(log, b"\0" * 9000 + b"odd two\n\r\nodd three\r\n" + lines(300).encode())
    page = opened(serve, log, watch)
    search(page, "odd")
    page.wait("document.querySelector('#count').dataset.total === '3'")

    data, manifest = export(page, tmp_path / "saved")

    assert data == b"odd one\nodd two\nodd three\r\n"
    assert holds(manifest, tmp_path / "saved", log.parent)


@pytest.mark.slow
def test_entries_of_very_many_matches_far_apart_are_not_read_and_that_is_said(
    serve: Serve, log: Path, watch: Watch, tmp_path: Path
) -> None:
    far = lines(13_000)  # more than one answer holds
    append(log, "".join(TRACE.format(number) + far for number in range(410)))
    page = opened(serve, log, watch, "--rate-limit", 0)
    search(page, "odd")
    page.wait("document.querySelector('#count').dataset.total === '410'", timeout=60)

    data, manifest = export(page, tmp_path / "saved")

    (bare,) = re.findall(r"before byte (\d+), and what is older: only lines that match", manifest)
    position, expected = 0, ""
    for number in range(410):
        trace = TRACE.format(number)
        alone = position < int(bare)
        expected += trace.splitlines(True)[1] if alone else trace
        position += len((trace + far).encode())
    assert data.decode() == expected and 0 < int(bare) < position
    assert holds(manifest, tmp_path / "saved", log.parent)


def test_a_selection_is_saved_from_character_to_character(
    serve: Serve, log: Path, watch: Watch, tmp_path: Path
) -> None:
    text = append(log, lines(10)).decode()
    page = opened(serve, log, watch)
    place = f"(i => (at => [at.x, at.y + 8])({LINES}[i].getBoundingClientRect()))"
    (x, top), (_, bottom) = page.js(f"[{place}(2), {place}(4)]")
    page.drag((x + 300, top), (x + 400, top + 5), (x + 500, bottom))
    selected = page.copy()

    data, manifest = export(page, tmp_path / "saved")

    assert data == selected.encode() and selected in text
    assert 2 * 84 < len(data) < 3 * 84 and selected.count("\n") == 2
    assert "content: the selection" in manifest
    assert holds(manifest, tmp_path / "saved", log.parent)


def test_a_range_of_time_is_saved_over_all_files(
    serve: Serve, log: Path, watch: Watch, tmp_path: Path
) -> None:
    entry = "[2025-12-{:02d}T{:02d}:00:00Z] entry\n"
    for day in (15, 16, 17):
        if day > 15:
            shift(log)
        append(log, "".join(entry.format(day, hour) for hour in range(24)))
    page = opened(serve, log, watch)
    page.js("location.hash = '#from=2025-12-16T12:00:00.000Z&to=2025-12-17T06:00:00.000Z'")
    page.wait(f"{LINES}.length === 6")

    data, manifest = export(page, tmp_path / "saved")

    hours = [(16, hour) for hour in range(12, 24)] + [(17, hour) for hour in range(6)]
    assert data.decode() == "".join(entry.format(*hour) for hour in hours)
    assert "content: from 2025-12-16T12:00:00.000Z to 2025-12-17T06:00:00.000Z" in manifest
    assert holds(manifest, tmp_path / "saved", log.parent)


def test_an_export_goes_on_through_a_rotation(
    serve: Serve, log: Path, watch: Watch, tmp_path: Path
) -> None:
    text = append(log, lines(60_000))
    page = opened(serve, log, watch, trouble=True)  # what is asked of the log just then gets 412
    page.js(CATCH)
    click(page, "Menu")
    click(page, "Export")

    shift(log)
    append(log, lines(10, 10**6))
    ends_with(page, lines(1, 10**6 + 9).rstrip("\n"))
    page.wait("Object.keys(window.saved).length === 2", timeout=60)

    (name,) = [name for name in page.js("Object.keys(window.saved)") if "manifest" not in name]
    data = base64.b64decode(page.js(BASE64.format(name=name)))
    assert data[: len(text)] == text and data[len(text) :] in (b"", lines(10, 10**6).encode())


def test_an_export_shows_how_far_it_is_and_can_be_stopped(
    serve: Serve, log: Path, watch: Watch
) -> None:
    append(log, lines(300_000))
    server = serve(log, "--interval", 0.2, "--rate-limit", 30)  # so that it has to wait
    page = watch(server.url, trouble=True)
    page.wait(f"{LINES}.length > 5")
    page.js(CATCH)

    click(page, "Menu")
    click(page, "Export")
    page.wait(f"/exporting… [0-9.]+ MB of 2[0-9.]+ MB/.test({TOLD})")
    click(page, "Cancel")

    page.wait(f"{TOLD} === 'Export stopped.'")
    assert page.js("Object.keys(window.saved)") == []
    assert not any(line.startswith("event=exported") for line in server.record())


def test_an_export_is_recorded(serve: Serve, log: Path, watch: Watch, tmp_path: Path) -> None:
    append(log, lines(10))
    server = serve(log, "--interval", 0.2)
    page = watch(server.url)
    page.wait(f"{LINES}.length > 5")

    export(page, tmp_path / "saved")

    said = eventually(lambda: [one for one in server.record() if one.startswith("event=exported")])
    digest = subprocess.run(["sha256sum", log], capture_output=True, text=True).stdout.split()[0]
    assert "client=127.0.0.1" in said[0] and f"sha256={digest}" in said[0]
