"""The browser as a witness: what was seen before is still there, or it says that it is not."""

import hashlib
import http.server
import json
import os
import re
import socketserver
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browsers import Browser, ChromiumPage, Page
from harness import append, eventually, faulty, free_port, lines, pack, run, shift
from page_actions import (
    LINES,
    SHOWS,
    SOURCE,
    STATE,
    TOLD,
    Serve,
    Watch,
    click,
    ends_with,
    fill,
    numbered,
    search,
    write,
)

ALARM = "(bar => bar.hidden ? '' : bar.textContent)(document.querySelector('#alarm'))"
KEPT = "Object.keys(localStorage).some(key => key.startsWith('seen '))"
PROOF = "document.querySelector('#proof').textContent"
PROOF_STATE = "document.querySelector('#proof').dataset.state"
MEMORY = "localStorage.getItem(Object.keys(localStorage).find(key => key.startsWith('seen ')))"
UNCHANGED = f"/unchanged since you last looked/.test({PROOF})"
LATER = "[2025-12-18T17:40:37Z] later {}\n"
HEADER = "# audit log, version 1\n# fields: time, what\n"


def seen(serve: Serve, log: Path, watch: Watch) -> tuple[Page, str]:
    """A page that has watched the log, and will come back to it."""
    write(log, numbered(0, 400))
    url = serve(log, "--interval", "0.2").url
    page = watch(url)
    ends_with(page, "[2025-12-17T17:40:37Z] entry 399")
    page.wait(KEPT, timeout=25)
    return page, url


def test_what_only_grew_is_unchanged_and_the_new_part_is_divided(
    serve: Serve, log: Path, watch: Watch
) -> None:
    page, url = seen(serve, log, watch)
    page.goto("about:blank")

    write(log, numbered(400, 410))
    page.goto(url)

    page.wait(f"/unchanged since you last looked/.test({PROOF})", timeout=25)
    page.wait("!!document.querySelector('.fresh')")
    first = page.js("document.querySelector('.fresh').nextSibling.textContent")
    assert first == "[2025-12-17T17:40:37Z] entry 400"
    assert page.js(ALARM) == ""


def test_an_edit_while_nobody_looked_is_red_and_stays(
    serve: Serve, log: Path, watch: Watch
) -> None:
    log.write_text("")
    page, url = seen(serve, log, watch)
    page.goto("about:blank")

    with open(log, "r+b") as file:
        file.seek(5000)
        file.write(b"X")
    page.goto(url)

    page.wait(f"{SHOWS} === 'altered'", timeout=25)
    page.goto(url)
    page.wait(f"{SHOWS} === 'altered'")
    click(page, "Dismiss")
    page.wait(f"{SHOWS} === 'live'")


def test_a_rotation_is_no_alarm_and_a_lost_old_file_none_either(
    serve: Serve, log: Path, watch: Watch
) -> None:
    page, url = seen(serve, log, watch)
    page.goto("about:blank")

    os.rename(log, f"{log}.1")
    write(log, [f"[2025-12-18T17:40:37Z] later {number}" for number in range(20)])
    page.goto(url)
    page.wait(f"/unchanged since you last looked/.test({PROOF})", timeout=25)
    assert page.js(ALARM) == ""
    page.wait(f"{LINES}.length > 20")


def visited(serve: Serve, log: Path, watch: Watch, content: str = "") -> tuple[Page, int, Any]:
    """A page that has seen the log and then left; the port, which stays the same; the server."""
    append(log, content or lines(400))
    port = free_port()
    server = serve(log, "--interval", 0.2, port=port)
    page = watch(server.url)
    page.wait(KEPT, timeout=25)
    page.goto("about:blank")
    return page, port, server


def edit(log: Path) -> None:
    with open(log, "r+b") as file:
        file.seek(20_000)
        file.write(b"#")


def rewrite_the_first_line(log: Path) -> None:
    with open(log, "r+b") as file:
        file.seek(30)
        file.write(b"#")


def replace_the_first_line(log: Path) -> None:
    subprocess.run(["sed", "-i", "1s/^/[2025-12-17T17:40:36Z] forged\\n/", log], check=True)


def remove_the_newest_entry(log: Path) -> None:
    os.truncate(log, log.stat().st_size - len(lines(1).encode()))


def restore_an_older_copy(log: Path) -> None:
    older = log.read_bytes()[:10_000]
    log.unlink()
    log.write_bytes(older)


def remove_from_the_middle(log: Path) -> None:
    """The file that was seen goes, the one that was older then stays."""
    shift(log)
    append(log, LATER.format(1) * 20)
    Path(f"{log}.1").unlink()


@pytest.mark.parametrize(
    "tamper",
    [
        edit,
        remove_from_the_middle,
        pytest.param(rewrite_the_first_line, marks=pytest.mark.slow),
        pytest.param(replace_the_first_line, marks=pytest.mark.slow),
        pytest.param(remove_the_newest_entry, marks=pytest.mark.slow),
        pytest.param(restore_an_older_copy, marks=pytest.mark.slow),
    ],
)
def test_what_was_changed_while_the_server_was_down_is_red(
    serve: Serve, log: Path, watch: Watch, tamper: Callable[[Path], None]
) -> None:
    append(Path(f"{log}.1"), lines(50).replace("-17T", "-16T"))
    page, port, server = visited(serve, log, watch)
    before = log.read_bytes()

    server.stop()
    tamper(log)
    server = serve(log, "--interval", 0.2, port=port)
    page.goto(server.url)

    page.wait(f"{SHOWS} === 'altered' && {PROOF_STATE} === 'altered'", timeout=25)
    page.wait("document.title.startsWith('ALTERED')")
    said = eventually(lambda: [line for line in server.errors().splitlines() if "<3>" in line])
    assert said[0].startswith("<3>audit_stream: altered: a browser at 127.0.0.1 says: ")
    receipt = re.search(r"bytes=(\d+) sha256=([0-9a-f]{64})", said[0])
    assert receipt and hashlib.sha256(before[: int(receipt[1])]).hexdigest() == receipt[2]

    click(page, "Dismiss")
    page.wait(f"{SHOWS} === 'live'")
    accepted = eventually(lambda: [line for line in server.record() if "event=accepted" in line])
    assert receipt[0] in accepted[0]
    page.goto(server.url)
    page.wait(f"{LINES}.length > 5 && {SHOWS} === 'live' && {PROOF_STATE} === 'ok'")
    assert page.js(ALARM) == ""


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "content", [pytest.param(lines(400), marks=pytest.mark.slow), HEADER + lines(400)]
)
def test_a_rotation_while_the_server_was_down_is_no_alarm(
    serve: Serve, log: Path, watch: Watch, content: str, packed: bool
) -> None:
    page, port, server = visited(serve, log, watch, content)

    server.stop()
    shift(log)
    if packed:
        pack(Path(f"{log}.1"))
    append(log, HEADER + "".join(map(LATER.format, range(20))))
    page.goto(serve(log, "--interval", 0.2, port=port).url)

    page.wait(UNCHANGED, timeout=25)
    assert page.js(ALARM) == "" and page.js(PROOF_STATE) == "ok"


def test_what_retention_removed_is_grey(serve: Serve, log: Path, watch: Watch) -> None:
    append(log, lines(50).replace("-17T", "-16T"))
    shift(log)
    page, port, server = visited(serve, log, watch)

    server.stop()
    for day in (18, 19):
        shift(log)
        append(log, lines(50, 1000).replace("-17T", f"-{day}T"))
    for number in (2, 3):
        Path(f"{log}.{number}").unlink()
    server = serve(log, "--interval", 0.2, port=port)
    page.goto(server.url)

    page.wait(f"/was removed since, as retention does/.test({PROOF})", timeout=25)
    assert page.js(ALARM) == "" and page.js(SHOWS) == "live" and "<3>" not in server.errors()


def test_a_tab_that_stays_open_over_a_restart_compares_again(
    serve: Serve, log: Path, watch: Watch
) -> None:
    append(log, lines(400))
    port = free_port()
    server = serve(log, "--interval", 0.2, port=port)
    page = watch(server.url, trouble=True)
    page.wait(KEPT, timeout=25)
    memory = page.js(MEMORY)

    server.stop()
    edit(log)
    server = serve(log, "--interval", 0.2, port=port)

    page.wait(f"{SHOWS} === 'altered'", timeout=40)
    assert page.js(MEMORY) == memory


def test_an_alarm_is_on_every_tab_until_somebody_accepts_it(
    serve: Serve, log: Path, watch: Watch, browser: Browser
) -> None:
    append(log, lines(400))
    port = free_port()
    server = serve(log, "--interval", 0.2, port=port)
    page = watch(server.url, trouble=True)
    other = browser.page(window=False)
    try:
        other.goto(server.url)
        other.wait(f"{STATE} === 'live'")
        page.wait(KEPT, timeout=25)

        edit(log)
        for tab in (page, other):
            tab.to_front()
            tab.wait(f"{SHOWS} === 'altered'", timeout=25)
        server.stop()  # a new process knows nothing of it
        server = serve(log, "--interval", 0.2, port=port)
        other.goto(server.url)
        for tab in (other, page):
            tab.to_front()
            tab.wait(
                "/unchanged since it was first read/.test(document.querySelector('#proof').title)"
            )
            assert tab.js(SHOWS) == "altered"
        click(page, "Dismiss")

        for tab in (page, other):
            tab.to_front()
            tab.wait(f"{SHOWS} === 'live'")
    finally:
        other.close()


@pytest.mark.slow
def test_an_edit_in_the_file_of_the_first_visit_is_red(
    serve: Serve, log: Path, watch: Watch
) -> None:
    page, port, server = visited(serve, log, watch)
    page.goto(server.url)
    page.wait(UNCHANGED, timeout=25)
    shift(log)
    size = len(append(log, LATER.format(1) * 200))
    page.wait(f"JSON.parse({MEMORY}).bytes === {size}", timeout=40)
    page.goto("about:blank")

    server.stop()
    edit(Path(f"{log}.1"))
    page.goto(serve(log, "--interval", 0.2, port=port).url)

    page.wait(f"{SHOWS} === 'altered'", timeout=25)
    assert f"bytes of {log.name}.1 are no longer what they were" in page.js(ALARM)


def test_the_newest_entry_that_goes_while_somebody_looks_is_red(
    serve: Serve, log: Path, watch: Watch
) -> None:
    append(log, lines(400))
    page = watch(serve(log, "--interval", 0.2).url)
    page.wait(KEPT, timeout=25)

    remove_the_newest_entry(log)

    page.wait(f"{SHOWS} === 'altered'", timeout=25)


@pytest.mark.slow
def test_a_stale_tab_overwrites_nothing(serve: Serve, log: Path, watch: Watch) -> None:
    append(log, lines(400))
    page = watch(serve(log, "--interval", 0.2).url)
    page.wait(KEPT, timeout=25)

    memory = json.loads(page.js(MEMORY))
    memory["said"] = "2999-01-01T00:00:00Z"  # another tab heard the server later than this one
    page.js(f"{MEMORY.replace('getItem(', 'setItem(')[:-1]}, {json.dumps(json.dumps(memory))})")
    page.js("new Promise(done => setTimeout(done, 12000))")

    assert json.loads(page.js(MEMORY)) == memory


class Unavailable(http.server.BaseHTTPRequestHandler):
    """Has the page, and 503 for everything else."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/" else 503)
        self.end_headers()
        self.wfile.write(SOURCE.read_bytes() if self.path == "/" else b"")

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_that_answers_503_is_neither_green_nor_red(
    serve: Serve, log: Path, watch: Watch
) -> None:
    page, port, server = visited(serve, log, lambda url: watch(url, trouble=True))
    server.stop()

    socketserver.ThreadingTCPServer.allow_reuse_address = True
    with socketserver.ThreadingTCPServer(("127.0.0.1", port), Unavailable) as broken:
        threading.Thread(target=broken.serve_forever, daemon=True).start()
        page.goto(server.url)
        memory = page.js(MEMORY)
        page.wait(f"{STATE} === 'reconnecting'")
        assert page.js(PROOF_STATE) == "unknown" and page.js(ALARM) == ""
        assert page.js(MEMORY) == memory
        broken.shutdown()

    page.goto(serve(log, "--interval", 0.2, port=port).url)
    page.wait(UNCHANGED, timeout=25)


def test_what_cannot_be_compared_is_unknown_and_stays_remembered(
    serve: Serve, log: Path, watch: Watch
) -> None:
    page, port, server = visited(serve, log, lambda url: watch(url, trouble=True))
    server.stop()
    shift(log)
    pack(Path(f"{log}.1"))
    damaged = Path(f"{log}.1.gz")
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-200])
    append(log, "".join(map(LATER.format, range(20))))

    server = serve(log, "--interval", 0.2, port=port)
    page.goto(server.url)
    memory = page.js(MEMORY)
    page.wait(f"{PROOF_STATE} === 'unknown' && /was not compared/.test({PROOF})", timeout=25)

    assert page.js(ALARM) == "" and page.js(MEMORY) == memory and page.js(SHOWS) == "live"
    damaged.write_bytes(whole)
    page.goto(server.url)
    page.wait(UNCHANGED, timeout=25)


@pytest.mark.slow
def test_while_the_server_reads_again_the_page_says_how_far_it_is(
    serve: Serve, log: Path, watch: Watch, faults: Path
) -> None:
    page, port, server = visited(serve, log, watch, lines(100_000))
    server.stop()
    server = serve(log, "--interval", 0.2, port=port, env=faulty(faults))
    faults.write_text("slow 0.4")

    page.goto(server.url)

    said = f"/^comparing what you saw before: the server reads: .* of 8.7 MB$/.test({PROOF})"
    page.wait(f"{PROOF_STATE} === 'unknown' && {said}", timeout=40)
    faults.write_text("")
    page.wait(f"{UNCHANGED} && {PROOF_STATE} === 'ok'", timeout=25)


@pytest.mark.slow
def test_what_can_never_be_compared_may_be_forgotten(serve: Serve, log: Path, watch: Watch) -> None:
    page, port, server = visited(serve, log, lambda url: watch(url, trouble=True))
    server.stop()
    shift(log)
    Path(f"{log}.1").rename(f"{log}.1.gz")  # not packed at all
    append(log, "".join(map(LATER.format, range(20))))

    server = serve(log, "--interval", 0.2, port=port)
    page.goto(server.url)
    page.wait(f"/^Twice what you saw/.test({TOLD})", timeout=40)
    click(page, "Forget it")

    page.wait(f"{PROOF_STATE} === 'ok'")
    said = eventually(lambda: [line for line in server.record() if "event=accepted" in line])
    assert "sha256=" in said[0]
    page.wait(KEPT, timeout=25)


def test_an_empty_log_is_never_green(serve: Serve, log: Path, watch: Watch) -> None:
    log.touch()
    page = watch(serve(log, "--interval", 0.2).url)

    page.wait(f"/empty/.test({PROOF})")
    assert page.js(PROOF_STATE) == "unknown" and not page.js(KEPT)
    append(log, lines(1))
    page.wait(f"{PROOF_STATE} === 'ok'")


def test_a_browser_that_keeps_nothing_is_a_first_visit_each_time(
    serve: Serve, log: Path, watch: Watch
) -> None:
    append(log, lines(400))
    server = serve(log, "--interval", 0.2)
    page = watch(server.url)
    if not isinstance(page, ChromiumPage):
        pytest.skip("only Chromium is told what to run before the page")
    forbidden = (
        "Object.defineProperty(window, 'localStorage', { get() { throw new Error('no'); } })"
    )
    page.cdp("Page.addScriptToEvaluateOnNewDocument", source=forbidden)

    for _ in range(2):
        page.goto(server.url)
        page.wait(f"{LINES}.length > 5 && {PROOF_STATE} === 'ok'")
        page.js("new Promise(done => setTimeout(done, 4000))")  # it would be remembered by now
        assert page.js(ALARM) == "" and not page.js(UNCHANGED) and page.js(SHOWS) == "live"


# -- receipts that a person keeps ----


def paste(page: Page, text: str) -> str:
    """Paste it where the menu asks for it; what the page says in the end."""
    click(page, "Menu")
    fill(page, "#pasted", text)
    page.wait(f"/^(The receipt|That receipt)/.test({TOLD})", timeout=25)
    said = str(page.js(TOLD))
    click(page, "Close")
    page.wait(f"{TOLD} === ''")
    return said


def test_a_receipt_that_is_pasted_is_checked(serve: Serve, log: Path, watch: Watch) -> None:
    size = len(append(log, lines(400)))
    server = serve(log, "--interval", 0.2)
    page = watch(server.url)
    page.wait(f"{LINES}.length > 5")
    line = json.loads(server.get("/api/receipt")[2])["line"]
    added = len(append(log, lines(5, 400)))
    ends_with(page, lines(1, 404).rstrip("\n"))

    holds = paste(page, f"In the ticket: {line} (kept)")
    other = paste(page, line.replace(log.name, "other.log"))
    more = paste(page, re.sub(r"bytes=\d+", f"bytes={size + 10_000}", line))
    wrong = paste(page, re.sub("sha256=....", "sha256=0000", line))

    as_json = paste(page, server.get(f"/api/receipt?bytes={size}")[2].decode())

    assert f" holds: the first {size:,} bytes of {log.name}" in as_json
    assert f" holds: the first {size:,} bytes of {log.name}, read again just now. " in holds
    assert f"{added} bytes came after them." in holds
    assert "another log" in other and "not checked" in other
    assert "does not hold" in more and f"has fewer than {size + 10_000:,} bytes" in more
    assert "does not hold" in wrong and "are no longer what they were" in wrong
    assert page.js(ALARM) == "" and page.js("document.querySelector('#searchBox').value") == ""


def test_a_pasted_receipt_finds_its_file_or_says_that_it_is_gone(
    serve: Serve, log: Path, watch: Watch
) -> None:
    append(log, lines(400).replace("2025-", "2099-"))
    server = serve(log, "--interval", 0.2)
    page = watch(server.url, trouble=True)  # what is asked of a file that just went gets 404
    page.wait(f"{LINES}.length > 5")
    line = json.loads(server.get("/api/receipt")[2])["line"]
    shift(log)
    append(log, lines(10, 1000).replace("2025-", "2099-"))
    ends_with(page, lines(1, 1009).replace("2025-", "2099-").rstrip("\n"))

    rotated = paste(page, line)
    Path(f"{log}.1").unlink()
    gone = paste(page, line)
    append(Path(f"{log}.2"), lines(10))
    middle = paste(page, line)

    assert f"bytes of {log.name}.1, read again just now" in rotated
    assert "can no longer be checked. Its file is gone, together with all that is older" in gone
    assert f"does not hold. Its file is gone, although {log.name}.2 has what is older" in middle


def test_a_receipt_in_the_filter_is_checked_and_filters_nothing(
    serve: Serve, log: Path, watch: Watch
) -> None:
    append(log, lines(400))
    server = serve(log, "--interval", 0.2)
    page = watch(server.url)
    page.wait(f"{LINES}.length > 5")
    line = json.loads(server.get("/api/receipt")[2])["line"]

    search(page, line)

    page.wait(f"/^The receipt of .* holds/.test({TOLD})", timeout=25)
    assert page.js("document.querySelector('#searchBox').value") == ""
    assert page.js(f"{LINES}.length > 5")


def test_a_copied_receipt_is_what_verify_takes(serve: Serve, log: Path, watch: Watch) -> None:
    append(log, lines(400))
    page = watch(serve(log, "--interval", 0.2).url)
    page.wait(f"{LINES}.length > 5")
    page.js(
        "(window.copied = '', navigator.clipboard.writeText = async text => { copied = text; }, 1)"
    )

    click(page, "Menu")
    click(page, "Copy receipt")

    page.wait("copied !== ''", timeout=25)
    checked = run("--log", log, "--verify", page.js("copied"))
    assert checked.returncode == 0 and "1 holds" in checked.stdout

    page.js("(navigator.clipboard.writeText = async () => { throw new Error(); }, 1)")
    click(page, "Menu")
    click(page, "Copy receipt")
    page.wait("document.activeElement.id === 'pasted' && document.activeElement.selectionEnd > 0")
    chosen = "(field => field.value.slice(field.selectionStart, field.selectionEnd))"
    selected = page.js(f"{chosen}(document.activeElement)")
    assert run("--log", log, "--verify", selected).returncode == 0


def test_a_first_visit_claims_nothing(serve: Serve, log: Path, watch: Watch) -> None:
    write(log, numbered(0, 20))
    page = watch(serve(log).url)
    page.wait(f"{LINES}.length === 20")

    page.wait(KEPT, timeout=25)

    assert "since you last looked" not in page.js(PROOF) and page.js(ALARM) == ""
