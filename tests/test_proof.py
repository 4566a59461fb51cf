"""Receipts, anchors, --verify, and bytes that change.

The oracles: sha256sum, openssl dgst, zcat.
"""

import bz2
import fcntl
import gzip
import hashlib
import json
import lzma
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from harness import (
    Server,
    Viewer,
    append,
    eventually,
    faulty,
    lines,
    numbered_files,
    pack,
    run,
    shift,
)

Serve = Callable[..., Server]
View = Callable[..., Viewer]
RECEIPT = re.compile(
    r"audit-stream: receipt log=(\S+) generation=(\S+) head=([0-9a-f]{64}) bytes=(\d+)"
    r" sha256=([0-9a-f]{64}) time=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)(?: (\w+)=(\S+))?"
)
MIB = 2**20


def sha256sum(path: Path, size: int | None = None) -> str:
    """What coreutils say of the first bytes of a file."""
    pipe = f"head -c {path.stat().st_size if size is None else size} '{path}' | sha256sum"
    return subprocess.run(
        pipe, shell=True, capture_output=True, text=True, check=True
    ).stdout.split()[0]


def head_of(path: Path, size: int) -> str:
    return sha256sum(path, min(4096, size))


def receipt(server: Server, size: int | None = None) -> dict[str, Any]:
    status, _, body = server.get("/api/receipt" + ("" if size is None else f"?bytes={size}"))
    assert status == 200, body
    return dict(json.loads(body))


def receipts_in(text: str) -> list[tuple[str, ...]]:
    return [match.groups() for match in RECEIPT.finditer(text)]


def verify(log: Path, text: str) -> tuple[int, str]:
    """The exit code and what --verify says about receipts on standard input."""
    done = run("--log", log, "--verify", "-", input=text)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def last_line(text: str) -> str:
    return text.rstrip("\n").rpartition("\n")[2]


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """Change bytes in place, as `dd conv=notrunc` does."""
    with open(path, "r+b", buffering=0) as file:
        file.seek(offset)
        file.write(data)


def altered(server: Server) -> bool:
    return "<3>audit_stream: altered: " in server.errors()


def metric(server: Server, name: str) -> float:
    text = server.get("/metrics")[2].decode()
    return float(text.partition(f"\naudit_stream_{name} ")[2].split()[0])


def proved(server: Server, size: int) -> None:
    """Until the server has read so many bytes."""
    eventually(lambda: metric(server, "proof_known_bytes") >= size)


def big(log: Path, size: int = 3 * MIB) -> int:
    """A log of some MiB; its size."""
    entry = len(lines(1).encode())
    return len(append(log, lines(size // entry)))


# -- receipts ----


def test_a_receipt_is_what_coreutils_and_openssl_say(serve: Serve, log: Path) -> None:
    size = big(log)
    server = serve(log)

    answers = [
        receipt(server, wanted) for wanted in (1, 4095, 4096, 4097, 262_144, MIB, MIB + 1, size)
    ]
    whole = receipt(server)

    for answer in answers:
        assert answer["sha256"] == sha256sum(log, answer["bytes"])
        assert answer["head"] == head_of(log, answer["bytes"])
    openssl = subprocess.run(
        ["openssl", "dgst", "-sha256", log], capture_output=True, text=True, check=True
    )
    assert openssl.stdout.split()[-1] == whole["sha256"] == answers[-1]["sha256"]
    assert whole["bytes"] == size


def test_a_receipt_has_its_line(serve: Serve, log: Path) -> None:
    append(log, lines(100))
    server = serve(log)

    _, headers, body = server.get("/api/receipt")

    answer = json.loads(body)
    assert set(answer) == {"log", "generation", "head", "bytes", "sha256", "time", "line"}
    names = ("log", "generation", "head", "bytes", "sha256", "time")
    assert receipts_in(answer["line"]) == [(*(str(answer[name]) for name in names), None, None)]
    assert headers["ETag"] == f'"{answer["generation"]}"'
    assert answer["log"] == log.name


def test_a_line_of_coreutils_can_be_made_from_a_receipt(serve: Serve, log: Path) -> None:
    append(log, lines(1000))
    answer = receipt(serve(log))
    append(log, lines(10))

    command = f"head -c {answer['bytes']} {log} | sha256sum -c sum"
    (log.parent / "sum").write_text(f"{answer['sha256']}  -\n")
    checked = subprocess.run(command, shell=True, cwd=log.parent, capture_output=True, text=True)

    assert (checked.returncode, checked.stdout) == (0, "-: OK\n")


def test_a_name_with_white_space_or_quotes_is_json_text(serve: Serve, tmp_path: Path) -> None:
    log = tmp_path / 'my "audit" log.log'
    append(log, lines(100))
    server = serve(log)

    _, _, body = server.get("/api/receipt")

    answer = json.loads(body)
    assert f"receipt log={json.dumps(log.name)} generation=" in answer["line"]
    for text in (answer["line"], body.decode(), json.dumps({"MESSAGE": answer["line"]})):
        assert verify(log, text)[0] == 0, text


def test_more_bytes_than_there_are_is_416(serve: Serve, log: Path) -> None:
    size = len(append(log, lines(10)))
    server = serve(log)

    assert server.get(f"/api/receipt?bytes={size}")[0] == 200
    assert server.get(f"/api/receipt?bytes={size + 1}")[0] == 416
    assert server.get("/api/receipt?bytes=-1")[0] == 400
    assert server.get("/api/receipt?bytes=x")[0] == 400


def test_rotated_and_packed_files_have_receipts_too(serve: Serve, log: Path) -> None:
    contents = numbered_files(log, 3, 1000)
    server = serve(log)

    files = json.loads(server.get("/api/files")[2])["files"]
    answers = []
    for file in files:
        status, headers, body = server.get(f"/api/receipt?generation={file['generation']}")
        assert status == 200 and headers["ETag"] == f'"{file["generation"]}"'
        answers.append(json.loads(body))

    assert [answer["bytes"] for answer in answers] == [len(content) for content in contents]
    zcat = subprocess.run(
        f"zcat {log}.2.gz | sha256sum", shell=True, capture_output=True, text=True
    )
    assert answers[0]["sha256"] == zcat.stdout.split()[0]
    assert answers[1]["sha256"] == sha256sum(Path(f"{log}.1"))
    assert verify(log, "\n".join(answer["line"] for answer in answers))[0] == 0


def test_a_receipt_of_another_generation_is_412(serve: Serve, log: Path) -> None:
    append(log, lines(10))
    server = serve(log)

    assert server.get("/api/receipt", If_Match='"another"')[0] == 412
    assert server.get("/api/receipt", If_Match="*")[0] == 200


def test_a_receipt_is_of_bytes_that_were_read_after_it_was_asked_for(
    serve: Serve, log: Path
) -> None:
    size = big(log)
    server = serve(log)
    before = receipt(server, size)

    with open(log, "r+b", buffering=0) as file:  # in one tick, so that no time of change tells
        os.pwrite(file.fileno(), b"#", 2 * MIB)
        append(log, "one more\n")
    after = receipt(server, size)

    assert before["sha256"] != after["sha256"] == sha256sum(log, size)


def test_what_takes_longer_is_collected_later(serve: Serve, log: Path, faults: Path) -> None:
    size = big(log, 8 * MIB)
    server = serve(log, env=faulty(faults))
    proved(server, size)
    faults.write_text("slow 0.3")

    status, headers, body = server.get(f"/api/receipt?bytes={size}")
    assert server.get("/api/receipt")[0] == 202
    faults.write_text("")
    append(log, lines(10))
    eventually(lambda: metric(server, "behind_bytes") == 0)
    whole = receipt(server)

    assert (whole["bytes"], whole["sha256"]) == (size, sha256sum(log, size))
    assert status == 202 and int(headers["Retry-After"]) > 0
    progress = json.loads(body)
    assert set(progress) == {"read", "bytes"} and 0 < progress["read"] < progress["bytes"] == size
    passes = metric(server, "proof_passes_total")
    assert receipt(server, size)["sha256"] == sha256sum(log, size)
    assert metric(server, "proof_passes_total") == passes


def bytes_read(server: Server) -> int:
    """By all read calls of the process; what comes from sockets does not count."""
    return int(Path(f"/proc/{server.process.pid}/io").read_text().split()[1])


def test_a_thousand_returning_tabs_cost_one_pass(serve: Serve, log: Path) -> None:
    size = big(log, 8 * MIB)
    server = serve(log, "--rate-limit", 0, "--interval", 60)
    proved(server, size)
    before, begun = bytes_read(server), time.monotonic()
    waiting = []

    for number in range(1000):
        wanted = f"GET /api/receipt?bytes={size - number} HTTP/1.1\r\n"
        client = server.connect()
        client.settimeout(60)
        client.sendall(f"{wanted}Host: 127.0.0.1:{server.port}\r\n\r\n".encode())
        waiting.append(client)
    answers = []
    for client in waiting:
        with client, client.makefile("rb") as answer:
            answers.append(answer.read())

    took = time.monotonic() - begun
    found = [json.loads(answer.partition(b"\r\n\r\n")[2]) for answer in answers]
    digests = {answer["bytes"]: answer.get("sha256") for answer in found}
    assert len(digests) == 1000
    for number in (0, 500, 999):  # on a busy machine the first ones may have to come again
        digest = digests[size - number] or receipt(server, size - number)["sha256"]
        assert digest == sha256sum(log, size - number)
    read = bytes_read(server) - before
    passes = 2 + took // 4  # a crowd is waited for at most so long: a busy machine takes longer
    assert size <= read < (passes + 0.5) * size, f"{read / size} times the log in {took} s"


def test_two_who_ask_one_after_the_other_get_bytes_that_were_read_for_each(
    serve: Serve, log: Path, faults: Path
) -> None:
    size = big(log)
    server = serve(log, env=faulty(faults))
    proved(server, size)
    receipt(server, size)
    passes = metric(server, "proof_passes_total")
    faults.write_text("slow 0.1")  # for each piece: a pass takes over a second
    first: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: first.append(receipt(server, size)))

    asking.start()
    eventually(lambda: metric(server, "proof_passes_total") > passes)
    time.sleep(0.3)  # the first pass is behind the first piece
    with open(log, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"#", 10_000)
    hurry = threading.Timer(0.3, faults.write_text, ("",))
    hurry.start()
    second = receipt(server, size)
    asking.join()
    hurry.join()

    assert second["sha256"] == sha256sum(log, size) != first[0]["sha256"]


def test_the_digest_is_over_the_bytes_of_a_hole_too(serve: Serve, log: Path) -> None:
    append(log, lines(1000))
    with open(log, "r+b") as file:
        file.seek(5 * MIB)
        file.write(lines(1000).encode())
    server = serve(log)

    answer = receipt(server)

    assert answer["bytes"] == log.stat().st_size
    assert answer["sha256"] == sha256sum(log)
    assert verify(log, answer["line"])[0] == 0


def test_bytes_that_are_not_utf_8_count_as_they_are(serve: Serve, log: Path) -> None:
    append(log, b"\xff\xfe\x00 caf\xe9\r\n" * 1000)

    assert receipt(serve(log))["sha256"] == sha256sum(log)


def test_an_empty_log_has_nothing_to_prove(serve: Serve, view: View, log: Path) -> None:
    log.touch()
    server = serve(log)
    viewer = view(server, json=True)

    assert receipt(server)["bytes"] == 0
    assert verify(log, receipt(server)["line"])[0] == 3
    viewer.wait(lambda viewer: viewer.of("proof"))
    assert {frame["state"] for frame in viewer.of("proof")} == {"unknown"}
    append(log, lines(1))
    viewer.wait(lambda viewer: viewer.of("proof")[-1]["state"] == "ok")


# -- what people do ----


def test_a_review_is_a_line_on_standard_output(serve: Serve, log: Path) -> None:
    size = len(append(log, lines(100)))
    server = serve(log)

    status, _, body = server.get(f"/api/review?bytes={size}", method="POST")

    answer = json.loads(body)
    assert status == 200 and answer["sha256"] == sha256sum(log)
    assert answer["line"] in server.output().splitlines()
    assert receipts_in(answer["line"])[0][6:] == ("reviewed_by", "127.0.0.1")
    assert any(line.startswith("event=review client=127.0.0.1") for line in server.record())


def test_what_a_person_did_is_recorded(serve: Serve, log: Path) -> None:
    append(log, lines(1))
    server = serve(log)

    status, headers, body = server.get(
        "/api/record?event=exported&detail=2+%22files%22%0A", method="POST"
    )

    assert (status, body) == (204, b"") and headers["Content-Length"] is None
    assert json.loads(headers["Audit-Stream-Who"]) == "127.0.0.1"
    assert json.loads(headers["Audit-Stream-Machine"]) == socket.gethostname()
    assert r'event=exported client=127.0.0.1 detail="2 \"files\"\n"' in server.record()
    assert server.get("/api/record?event=else", method="POST")[0] == 400
    assert server.get(f"/api/record?event=accepted&detail={'x' * 501}", method="POST")[0] == 400


def test_what_a_browser_found_changed_is_an_alarm_for_the_operator(serve: Serve, log: Path) -> None:
    append(log, lines(100))
    server = serve(log)
    line = receipt(server)["line"]
    overwrite(log, 100, b"#")

    found = urlencode({"event": "altered", "detail": f"not what it was: {line}"})
    status, _, _ = server.get(f"/api/record?{found}", method="POST")

    said = "<3>audit_stream: altered: a browser at 127.0.0.1 says: "
    alarm = next(text for text in server.errors().splitlines() if text.startswith(said))
    assert status == 204 and json.loads(alarm.removeprefix(said)) == f"not what it was: {line}"
    assert verify(log, alarm)[0] == 1


def test_reads_and_searches_are_recorded(serve: Serve, log: Path) -> None:
    append(log, lines(1000))
    shift(log)
    append(log, lines(1000, 1000))
    server = serve(log)
    older = json.loads(server.get("/api/files")[2])["files"][0]["generation"]

    assert server.get(f"/api/audit?generation={older}", Range="bytes=1000-2999")[0] == 206
    for start in (0, 1000, 500, 9000):
        assert server.get("/api/audit", Range=f"bytes={start}-{start + 999}")[0] == 206
    for _ in range(3):
        assert server.get("/api/search?q=%22entry+1%22")[0] == 200
    server.stop()

    assert server.record().count(r'event=search client=127.0.0.1 query="\"entry 1\""') == 1
    assert 'event=read client=127.0.0.1 bytes=3000 offsets="0-2000,9000-10000"' in server.record()
    older_read = f"event=read client=127.0.0.1 bytes=2000 offsets=1000-3000 generation={older}"
    assert older_read in server.record()


# -- anchors ----


def test_anchors_come_at_their_pace_and_only_if_something_is_new(serve: Serve, log: Path) -> None:
    append(log, lines(100))
    server = serve(log, "--anchor", 0.2)
    eventually(lambda: receipts_in(server.output()))

    time.sleep(0.8)
    assert len(receipts_in(server.output())) == 1
    append(log, lines(1))
    eventually(lambda: len(receipts_in(server.output())) == 2)

    for _, _, head, size, digest, *_ in receipts_in(server.output()):
        assert digest == sha256sum(log, int(size)) and head == head_of(log, int(size))


def test_the_stop_is_anchored(serve: Serve, log: Path) -> None:
    append(log, lines(100))
    server = serve(log, "--interval", 0.1)
    view_size = len(append(log, lines(5)))
    eventually(lambda: metric(server, "behind_bytes") == 0)

    server.stop()

    assert [one[4] for one in receipts_in(server.output())] == [sha256sum(log)] and view_size


def test_the_stop_of_a_large_log_is_anchored(serve: Serve, log: Path, faults: Path) -> None:
    size = big(log, 64 * MIB)
    server = serve(log, env=faulty(faults))
    proved(server, size)
    end = size + len(append(log, lines(5)))
    eventually(lambda: metric(server, "behind_bytes") == 0)
    faults.write_text("slow 0.02")  # for each piece: a pass takes five seconds

    begun = time.monotonic()
    server.stop()

    assert time.monotonic() - begun < 2
    (line,) = receipts_in(server.output())
    assert line[2:5] == (head_of(log, end), str(end), sha256sum(log))


def test_a_stop_while_a_large_file_is_sealed_still_seals_it(
    serve: Serve, view: View, log: Path, faults: Path
) -> None:
    size = big(log, 64 * MIB)
    server = serve(log, env=faulty(faults))
    viewer = view(server, json=True)
    proved(server, size)
    faults.write_text("slow 0.02")
    shift(log)
    append(log, lines(10, 10**6))
    viewer.wait(lambda viewer: viewer.of("generation"))

    server.stop()

    sealed, last = receipts_in(server.output())
    assert sealed[3:5] == (str(size), sha256sum(Path(f"{log}.1"))) and sealed[6] == "sealed_before"
    assert last[4] == sha256sum(log)


def test_a_stop_seals_what_was_written_late(serve: Serve, view: View, log: Path) -> None:
    append(log, lines(100))
    server = serve(log, "--interval", 0.2)
    viewer = view(server, json=True)
    old = os.open(log, os.O_WRONLY | os.O_APPEND)
    shift(log)
    append(log, lines(10, 1000))
    eventually(lambda: any(one[6] for one in receipts_in(server.output())))

    os.write(old, lines(1, 5000).encode())
    os.close(old)
    viewer.wait("entry 00005000")
    server.stop()

    digests = [one[4] for one in receipts_in(server.output()) if one[6]]
    assert len(digests) == 2 and digests[1] == sha256sum(Path(f"{log}.1"))


def test_a_stop_before_all_was_read_anchors_what_was(serve: Serve, log: Path, faults: Path) -> None:
    size = big(log, 64 * MIB)
    faults.write_text("slow 0.02")
    server = serve(log, env=faulty(faults))
    eventually(lambda: metric(server, "proof_known_bytes") > 2 * MIB)

    server.stop()

    (line,) = receipts_in(server.output())
    assert 2 * MIB < int(line[3]) < size
    assert line[4] == sha256sum(log, int(line[3]))


def test_without_anchors_there_are_none(serve: Serve, log: Path) -> None:
    append(log, lines(100))
    server = serve(log, "--anchor", 0)
    shift(log)
    append(log, lines(10, 100))
    eventually(
        lambda: 'generations_total{reason="rotated"} 1' in server.get("/metrics")[2].decode()
    )

    server.stop()

    assert receipts_in(server.output()) == []


def test_a_rotation_seals_the_old_generation(serve: Serve, view: View, log: Path) -> None:
    append(log, lines(1000))
    server = serve(log)
    viewer = view(server, json=True)
    old = viewer.frames[0]["generation"] if viewer.frames else receipt(server)["generation"]

    shift(log)
    append(log, lines(10, 1000))
    viewer.wait(lambda viewer: viewer.of("generation"))
    new = viewer.of("generation")[0]["generation"]

    line = eventually(lambda: [one for one in receipts_in(server.output()) if one[6]])[0]
    assert line[1] == old and line[6:] == ("sealed_before", new)
    assert line[4] == sha256sum(Path(f"{log}.1"))
    time.sleep(2)
    assert not altered(server)


def test_after_a_rotation_all_are_told_about_the_new_file(
    serve: Serve, view: View, log: Path
) -> None:
    size = len(append(log, lines(1000)))
    server = serve(log)
    viewer = view(server, json=True)
    proved(server, size)
    shift(log)
    append(log, lines(10, 1000))
    viewer.wait(lambda viewer: viewer.of("generation"))

    for someone in (viewer, view(server, json=True)):
        someone.wait(
            lambda viewer: (
                viewer.of("proof")[-1:] and viewer.of("proof")[-1]["sha256"] == sha256sum(log)
            )
        )


def test_a_full_pipe_on_standard_output_stops_nothing(log: Path) -> None:
    append(log, lines(10))
    command = ["--log", str(log), "--port", "0", "--anchor", "0.05", "--interval", "0.05"]
    script = str(Path(__file__).resolve().parent.parent / "audit_stream.py")
    python = [sys.executable, "-W", "error", script]
    server = subprocess.Popen([*python, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert server.stdout and server.stdout.readline()
        fcntl.fcntl(server.stdout, fcntl.F_SETPIPE_SZ, 4096)
        for number in range(60):
            append(log, lines(1, number))
            time.sleep(0.05)
        assert server.poll() is None
    finally:
        server.terminate()
        assert server.wait(5) == 0
        assert server.communicate()[1] == b""


# -- bytes that change while it runs ----


def test_changed_bytes_are_told_with_their_place(serve: Serve, view: View, log: Path) -> None:
    size = big(log, 20 * MIB)
    server = serve(log)
    viewer = view(server, json=True)
    proved(server, size)

    overwrite(log, 16 * MIB + 100_000, b"#")

    viewer.wait(
        lambda viewer: viewer.of("proof") and viewer.of("proof")[-1]["state"] == "altered", 20
    )
    frame = viewer.of("proof")[-1]
    assert "between byte 16,777,216 and 17,825,792" in frame["detail"]
    assert re.search(r"between \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ and \d{4}-", frame["detail"])
    assert set(frame) == {"type", "state", "bytes", "sha256", "time", "detail"}
    alarm = next(line for line in server.errors().splitlines() if line.startswith("<3>"))
    assert "between byte 16,777,216 and 17,825,792" in alarm and len(receipts_in(alarm)) == 1
    assert metric(server, "proof_altered") == 1 and metric(server, "proof_alarms_total") == 1
    late = view(server, json=True)
    late.wait(lambda viewer: viewer.of("proof"))
    assert late.of("proof")[0]["state"] == "altered"


def test_a_viewer_that_lags_hears_of_the_change_once_it_has_caught_up(
    serve: Serve, view: View, log: Path
) -> None:
    size = big(log, 2 * MIB)
    server = serve(log)
    quick, slow = view(server, json=True), view(server, json=True, receive_buffer=4096)
    proved(server, size)
    slow.wait(lambda viewer: viewer.of("proof") and viewer.of("proof")[-1]["state"] == "ok")
    slow.hold()
    count = 60_000 // len(lines(1).encode())
    for number in range(3):  # more than the kernel takes, and at the last one the viewer lags
        size += len(append(log, lines(count, count * number)))
        quick.wait(lambda viewer, end=size: viewer.frames[-1].get("end") == end)

    overwrite(log, MIB, b"#")

    def altered(viewer: Viewer) -> bool:
        return bool(viewer.of("proof")) and viewer.of("proof")[-1]["state"] == "altered"

    quick.wait(altered, 20)
    slow.release()
    slow.wait(altered)


def test_a_change_in_two_places_is_one_alarm(serve: Serve, log: Path) -> None:
    size = big(log, 6 * MIB)
    server = serve(log)
    proved(server, size)

    with open(log, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"#", MIB + 5)
        os.pwrite(file.fileno(), b"#", 4 * MIB + 5)

    eventually(lambda: altered(server))
    assert "between byte 1,048,576 and 2,097,152 and elsewhere" in server.errors()
    time.sleep(2)
    assert server.errors().count("<3>") == 1


def test_an_edit_beside_an_append_is_noticed_by_the_next_pass(serve: Serve, log: Path) -> None:
    size = big(log)
    server = serve(log, "--interval", 0.1)
    proved(server, size)

    with open(log, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"#", MIB + 5)
        append(log, lines(1))

    eventually(lambda: altered(server), 15)
    assert "between byte 1,048,576 and 2,097,152" in server.errors()


def test_a_second_change_is_noticed_too(serve: Serve, log: Path) -> None:
    size = big(log)
    server = serve(log)
    proved(server, size)
    overwrite(log, MIB + 5, b"#")
    eventually(lambda: altered(server))
    proved(server, size)

    overwrite(log, 2 * MIB + 5, b"#")

    eventually(lambda: server.errors().count("<3>") == 2)
    assert "between byte 2,097,152" in server.errors()


def test_an_alarm_stays_until_somebody_accepts_it(serve: Serve, view: View, log: Path) -> None:
    size = big(log)
    server = serve(log)
    viewer = view(server, json=True)
    proved(server, size)
    overwrite(log, MIB + 5, b"#")
    viewer.wait(lambda viewer: viewer.of("proof") and viewer.of("proof")[-1]["state"] == "altered")

    assert server.get("/api/record?event=accepted&detail=redacted", method="POST")[0] == 204

    viewer.wait(lambda viewer: viewer.of("proof")[-1]["state"] == "ok")
    said = 'event=accepted client=127.0.0.1 detail="redacted" before='
    (accepted,) = [line for line in server.record() if line.startswith(said)]
    alarm = next(line for line in server.errors().splitlines() if line.startswith("<3>"))
    assert json.loads(accepted.removeprefix(said)) == alarm.partition("it was: ")[2]


def test_a_flipped_bit_in_memory_is_cleared_by_the_second_read(
    serve: Serve, log: Path, faults: Path
) -> None:
    size = big(log)
    server = serve(log, env=faulty(faults))
    proved(server, size)

    faults.write_text(f"flip {MIB + 5}")
    answer = receipt(server, size)

    assert faults.read_text() == ""
    assert answer["sha256"] == sha256sum(log)
    assert not altered(server) and metric(server, "proof_altered") == 0
    assert metric(server, "proof_false_suspicions_total") == 1


def test_growth_is_no_change(serve: Serve, view: View, log: Path) -> None:
    size = big(log)
    server = serve(log)
    viewer = view(server, json=True)
    proved(server, size)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            append(log, lines(500))
            time.sleep(0.01)

    writer = threading.Thread(target=write)
    writer.start()
    answers = [receipt(server) for _ in range(20)]
    stop.set()
    writer.join()

    assert all(answer["sha256"] == sha256sum(log, answer["bytes"]) for answer in answers)
    assert answers[-1]["bytes"] > answers[0]["bytes"]
    time.sleep(2)
    assert not altered(server) and "altered" not in {frame["state"] for frame in viewer.of("proof")}


@pytest.mark.parametrize("how", ["rename", "copytruncate", "gzip at once"])
def test_a_rotation_is_no_change(serve: Serve, view: View, log: Path, how: str) -> None:
    size = big(log)
    server = serve(log)
    viewer = view(server, json=True)
    proved(server, size)

    if how == "copytruncate":
        subprocess.run(["cp", "-p", log, f"{log}.1"], check=True)
        os.truncate(log, 0)
    else:
        shift(log)
    append(log, lines(10, 10**6))
    if how == "gzip at once":
        pack(Path(f"{log}.1"))
    viewer.wait("entry 01000009")
    time.sleep(4)

    assert not altered(server)
    assert "altered" not in {frame["state"] for frame in viewer.of("proof")}


def test_copytruncate_during_a_pass_is_no_change(serve: Serve, log: Path, faults: Path) -> None:
    size = big(log)
    server = serve(log, env=faulty(faults))
    proved(server, size)
    faults.write_text("slow 0.1")
    asking = threading.Thread(target=server.get, args=("/api/receipt",))
    asking.start()
    time.sleep(0.3)

    subprocess.run(["cp", "-p", log, f"{log}.1"], check=True)
    os.truncate(log, 0)
    append(log, lines(10, 10**6))
    asking.join()
    faults.write_text("")
    time.sleep(4)

    assert not altered(server)
    assert receipt(server)["sha256"] == sha256sum(log)


def cut_newest(log: Path) -> None:
    os.truncate(log, log.stat().st_size - 200)


def cut_all(log: Path) -> None:
    os.truncate(log, 0)


def rewrite_first_line(log: Path) -> None:
    overwrite(log, 3, b"XXXX")


def replace_first_line(log: Path) -> None:
    subprocess.run(["sed", "-i", "1s/2025/2026/", log], check=True)


def edit_by_replacing(log: Path) -> None:
    subprocess.run(["sed", "-i", "5000s/checked/dropped it/", log], check=True)


def same_length_by_replacing(log: Path) -> None:
    subprocess.run(["sed", "-i", "5000s/checked/dropped/", log], check=True)


def restore_older_copy(log: Path) -> None:
    data = log.read_bytes()
    log.write_bytes(data[: len(data) // 2])


def replace_by_older_copy(log: Path) -> None:
    older = Path(f"{log}.older")
    older.write_bytes(log.read_bytes()[: log.stat().st_size // 2])
    older.rename(log)


@pytest.mark.parametrize(
    "tamper",
    [
        cut_newest,
        cut_all,
        rewrite_first_line,
        replace_first_line,
        edit_by_replacing,
        same_length_by_replacing,
        restore_older_copy,
        replace_by_older_copy,
    ],
)
@pytest.mark.parametrize("running", [True, False])
def test_tampering_is_noticed(
    serve: Serve, view: View, log: Path, tamper: Callable[[Path], None], running: bool
) -> None:
    size = big(log, 2 * MIB)
    server = serve(log, "--interval", 0.2)
    proved(server, size)
    line = receipt(server)["line"]

    if not running:
        server.stop()
    tamper(log)

    code, said = verify(log, line)
    if tamper is cut_all:  # nothing is left that would be older
        assert code == 3 and "1 of a file that is gone" in said, said
    else:
        assert code == 1 and "1 does not hold" in last_line(said), said
    if running:
        eventually(lambda: altered(server), 15)


def test_a_removed_log_without_older_files_is_no_alarm(serve: Serve, log: Path) -> None:
    size = len(append(log, f"[{now()}] entry\n" * 1000))
    server = serve(log, "--interval", 0.2)
    proved(server, size)
    line = receipt(server)["line"]

    log.unlink()
    append(log, lines(10).replace("2025-", "2099-"))
    eventually(lambda: "was removed" in server.errors(), 15)

    assert not altered(server)
    code, said = verify(log, line)
    assert code == 3 and "1 of a file that is gone" in said, said


# -- --verify ----


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def line_for(path: Path, size: int, log: Path) -> str:
    """The receipt that a server would have given for the first bytes, made with coreutils."""
    return (
        f"audit-stream: receipt log={log.name} generation=0123456789abcdef"
        f" head={head_of(path, size)} bytes={size} sha256={sha256sum(path, size)} time={now()}"
    )


def anchored(log: Path, generations: int = 3, header: str = "") -> list[str]:
    """Receipts of several generations of a log, oldest first; the last one is the log."""
    found = []
    for number in range(generations):
        if number:
            shift(log)
        entries = lines(3000, number * 10**6).replace("2025-12-17T17:40:37Z", now())
        size = len(append(log, header + entries))
        found += [line_for(log, end, log) for end in (100, 5000, 200_000, size)]
    return found


def test_all_receipts_of_all_generations_hold(log: Path) -> None:
    found = anchored(log)
    pack(Path(f"{log}.2"))
    added = len(append(log, lines(3)))

    noise = "Nov 27 host audit_stream[1]: http://127.0.0.1:1/ \xff\n"
    code, said = verify(log, noise + f"\n{noise}prefix ".join(found) + " suffix\n")

    newer = f"{added} bytes are newer than the last"
    wanted = f"12 receipts, today: 12 hold; 0 of a file that is gone; {newer}\n"
    assert (code, said) == (0, wanted)


def test_one_receipt_is_enough(serve: Serve, log: Path) -> None:
    append(log, lines(1000))
    answer = receipt(serve(log), 50_000)

    line = run("--log", log, "--verify", answer["line"])
    short = run("--log", log, "--verify", f"50000:{sha256sum(log, 50_000)}")
    wrong = run("--log", log, "--verify", f"50001:{sha256sum(log, 50_000)}")
    nonsense = run("--log", log, "--verify", "50000")

    newer = f"{log.stat().st_size - 50_000:,} bytes are newer than the last"
    assert (line.returncode, line.stdout) == (
        0,
        f"1 receipt, today: 1 holds; 0 of a file that is gone; {newer}\n",
    )
    assert (short.returncode, short.stdout) == (
        0,
        f"1 receipt: 1 holds; 0 of a file that is gone; {newer}\n",
    )
    assert wrong.returncode == 1
    assert nonsense.returncode == 2 and nonsense.stderr.count("\n") == 1


def test_nothing_checked_is_never_green(serve: Serve, log: Path) -> None:
    append(log, lines(10))
    line = receipt(serve(log))["line"]

    assert verify(log, "")[0] == 3
    assert verify(log, "audit-stream: receipt log=x generation=y head=… bytes=1\n")[0] == 3
    assert verify(log.with_name("absent.log"), line)[0] == 3
    assert verify(log, re.sub("time=....-..", "time=2026-13", line))[0] == 3
    assert verify(log, line[:-30])[0] == 3


def test_a_changed_byte_is_between_two_receipts(log: Path) -> None:
    found = anchored(log)
    overwrite(Path(f"{log}.1"), 6000, b"#")

    code, said = verify(log, "\n".join(found))

    assert code == 1
    assert "12 receipts, today: 10 hold; 2 do not hold" in last_line(said)
    assert f"does not hold: {log.name}.1 was changed between byte 5,000 and 200,000: " in said


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_an_edit_inside_a_packed_file_is_noticed(log: Path, kind: str) -> None:
    found = anchored(log, 2)
    old = Path(f"{log}.1")
    data = bytearray(old.read_bytes())
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind]
    packed = Path(f"{log}.1.{kind}")
    old.unlink()

    packed.write_bytes(compress(bytes(data)))
    assert verify(log, "\n".join(found))[0] == 0
    data[6000] ^= 1
    packed.write_bytes(compress(bytes(data)))
    code, said = verify(log, "\n".join(found))

    assert code == 1 and "6 hold; 2 do not hold" in last_line(said), said


def test_what_is_appended_to_a_packed_file_is_never_silent(log: Path) -> None:
    found = anchored(log, 2)
    pack(Path(f"{log}.1"))
    packed = Path(f"{log}.1.gz")
    whole = packed.read_bytes()
    old = "\n".join(found[:4])
    size = log.stat().st_size

    packed.write_bytes(whole + gzip.compress(b"forged\n"))  # a second member, which zcat shows
    shown = subprocess.run(["zcat", packed], capture_output=True, check=True).stdout
    assert shown.endswith(b"forged\n")
    code, said = verify(log, old)
    assert code == 0 and f"{size + 7:,} bytes are newer than the last" in said, said
    packed.write_bytes(whole + b"garbage, which zcat ignores\n")
    code, said = verify(log, old)
    assert code == 1 and "damaged" in said, said
    packed.write_bytes(whole[:-200])
    assert verify(log, old)[0] == 1


def test_what_retention_removed_is_no_alarm(log: Path) -> None:
    found = anchored(log)
    Path(f"{log}.2").unlink()

    code, said = verify(log, "\n".join(found))

    assert code == 0
    assert "12 receipts, today: 8 hold; 4 of a file that is gone; " in said, said


def test_a_file_that_is_gone_from_the_middle_does_not_hold(log: Path) -> None:
    found = anchored(log)
    hour_ago = time.time() - 3600
    os.utime(f"{log}.2", (hour_ago, hour_ago))
    Path(f"{log}.1").unlink()

    code, said = verify(log, "\n".join(found))

    assert code == 1
    assert "12 receipts, today: 8 hold; 4 do not hold; 0 of a file that is gone" in said, said
    assert f"its file is gone, although {log.name}.2 has what is older" in said


def test_the_same_header_in_every_generation_misleads_nobody(log: Path) -> None:
    found = anchored(log, header="# audit log, version 1\n# fields: time, what\n")

    assert verify(log, "\n".join(found))[0] == 0
    overwrite(Path(f"{log}.1"), 6000, b"#")
    code, said = verify(log, "\n".join(found))
    assert code == 1 and "10 hold; 2 do not hold" in said, said


def test_files_are_found_under_any_names(log: Path) -> None:
    found = anchored(log, 3)
    Path(f"{log}.1").rename(f"{log}.3")  # older and newer are exchanged

    assert verify(log, "\n".join(found))[0] == 0


def test_receipts_of_another_log_accuse_nobody(serve: Serve, log: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.log"
    append(other, lines(100, 5000))
    append(log, lines(100))
    text = receipt(serve(log))["line"] + "\n" + receipt(serve(other))["line"]

    code, said = verify(log, text)

    assert code == 0 and "2 receipts, today: 1 holds; 1 could not be checked; " in said, said


def test_verify_holds_under_heavy_appending_and_rotation(serve: Serve, log: Path) -> None:
    append(log, lines(20_000))
    line = receipt(serve(log))["line"]
    stop = threading.Event()

    def write() -> None:
        for number in range(10**6):
            if stop.is_set():
                return
            append(log, lines(200, number))
            if number % 50 == 49:
                shift(log)
                time.sleep(0.2)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        codes = {verify(log, line) for _ in range(4)}
    finally:
        stop.set()
        writer.join()

    assert {code for code, _ in codes} == {0}, codes


def test_a_year_of_hours_is_one_pass(serve: Serve, log: Path) -> None:
    size = big(log, 16 * MIB)
    server = serve(log)
    template = receipt(server, 5000)["line"].partition(" bytes=")[0]
    data = log.read_bytes()
    state, found, start = hashlib.sha256(), [], 0
    for end in range(5000, size, size // 8760):
        state.update(data[start:end])
        start = end
        found.append(f"{template} bytes={end} sha256={state.hexdigest()} time=2026-01-02T00:00:00Z")
    assert found[-1].split("sha256=")[1][:64] == sha256sum(log, start)

    begun = time.monotonic()
    code, said = verify(log, "\n".join(found))

    assert code == 0 and said.startswith(
        f"{len(found):,} receipts, 2026-01-02: {len(found):,} hold; "
    ), said
    assert time.monotonic() - begun < 10


# -- silence ----


def test_a_silent_log_is_told_to_the_operator_alone(serve: Serve, log: Path) -> None:
    append(log, lines(1))
    server = serve(log, "--expect-every", 0.5, "--interval", 0.1)

    eventually(
        lambda: "<3>audit_stream: the log has been silent for over 0.5 seconds\n" in server.errors()
    )
    assert server.get("/healthz")[0] == 200
    assert metric(server, "silent_seconds") > 0.5 and metric(server, "silences_total") == 1
    append(log, lines(1))
    eventually(lambda: "the log is no longer silent" in server.errors())
    eventually(lambda: metric(server, "silences_total") == 2)
