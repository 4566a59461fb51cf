"""The whole past: the log and its rotated files as one; against cat, zgrep, GNU date."""

import bz2
import concurrent.futures
import contextlib
import gzip
import json
import lzma
import os
import shutil
import subprocess
import time
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
from harness import append, eventually, lines, pack, shift

MIB = 1 << 20
PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def entries(count, start):
    """Return numbered lines, a second apart; those of a day are a file's."""
    moments = (time.gmtime(1_766_000_000 + number) for number in range(start, start + count))
    stamps = (time.strftime("[%Y-%m-%dT%H:%M:%SZ]", moment) for moment in moments)
    return "".join(f"{stamp} entry {start + n:07} – ✅\n" for n, stamp in enumerate(stamps))


def past_of(log, count=12, packed=range(4, 13), size=50, suffix="gz"):
    """Write a log and its rotated files, some of them packed; return their names, oldest first."""
    names = []
    for number in range(count, -1, -1):
        data = entries(size, (count - number) * size).encode()
        path = log if number == 0 else Path(f"{log}.{number}")
        if number in packed:
            path = Path(f"{path}.{suffix}")
            data = PACKERS[suffix](data)
        path.write_bytes(data)
        names.append(path.name)
    return names


def content(path):
    """Return the bytes of a file as cat and its kin write them."""
    tool = {".gz": "zcat", ".bz2": "bzcat", ".xz": "xzcat"}.get(path.suffix, "cat")
    return subprocess.run([tool, path], capture_output=True, check=True).stdout


def ask(server, path, **query):
    """Return status and answer, once the file is decompressed."""

    def answer():
        status, headers, body = server.get(f"{path}?{urlencode(query)}")
        assert status != 503 or int(headers["Retry-After"]) > 0
        return (status, headers, body) if status != 503 else None

    return eventually(answer, 60)


def files_of(server):
    status, headers, body = server.get("/api/files")
    assert status == 200 and headers["ETag"]
    return json.loads(body)["files"]


def bytes_of(server, generation):
    """Return all bytes of a file, read as the page does."""
    data, size = b"", 1
    while len(data) < size:
        status, headers, body = range_of(server, generation, len(data))
        assert status == 206 and headers["ETag"] == f'"{generation}"'
        size = int(headers["Content-Range"].rpartition("/")[2])
        data += body
    return data


def range_of(server, generation, start):
    def answer():
        path = f"/api/audit?generation={quote(generation)}"
        found = server.get(path, Range=f"bytes={start}-")
        return found[0] != 503 and found

    return eventually(answer, 60)


def seconds(line):
    """Return the time of a line as GNU date reads it."""
    stamp = line[1:].partition(b"]")[0].decode()
    return int(subprocess.run(["date", "-d", stamp, "+%s"], capture_output=True).stdout)


def open_copies(server):
    """Return how many files without a name the server has open."""
    found = 0
    for path in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += os.readlink(path).endswith("(deleted)")
    return found


@pytest.mark.parametrize("suffix", PACKERS)
def test_the_files_are_listed_and_joined_they_are_the_whole_past(suffix, serve, log):
    names = past_of(log, suffix=suffix)
    server = serve(log, "--rate-limit", 0)

    before = files_of(server)
    joined = [bytes_of(server, file["generation"]) for file in before]
    after = files_of(server)

    contents = [content(log.parent / name) for name in names]
    assert [file["name"] for file in before] == [file["name"] for file in after] == names
    assert joined == contents and b"".join(joined).decode() == entries(13 * 50, 0)
    for name, data, first, then in zip(names, contents, before, after, strict=True):
        packed = name.endswith(suffix)
        rows = data.splitlines()
        size = (log.parent / name).stat().st_size
        assert first["packed"] == then["packed"] == (size if packed else None)
        assert first["size"] == (None if packed else size) and then["size"] == len(data)
        assert first["first"] == then["first"] == seconds(rows[0])
        assert first["last"] == (None if packed else seconds(rows[-1]))
        assert then["last"] == seconds(rows[-1])
        assert {*first} == {"generation", "name", "size", "packed", "first", "last"}


def test_each_file_is_searched_counted_and_jumped_into(serve, log):
    names = past_of(log, size=300)
    server = serve(log, "--rate-limit", 0)

    for file, name in zip(files_of(server), names, strict=True):
        of = {"generation": file["generation"]}
        wanted = subprocess.run(["zgrep", "-c", "7 – ", log.parent / name], capture_output=True)
        found = json.loads(ask(server, "/api/search", q='"7 – "', limit=1000, **of)[2])
        counted = json.loads(ask(server, "/api/counts", q='"7 – "', **of)[2])
        rows = content(log.parent / name).splitlines(keepends=True)
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds(rows[100])))
        sought = json.loads(ask(server, "/api/seek", time=moment, **of)[2])
        timeline = json.loads(ask(server, "/api/timeline", points=1, **of)[2])

        assert len(found["matches"]) == int(wanted.stdout)
        assert sum(number for *_, number in counted["stretches"]) == int(wanted.stdout)
        assert sought == {"offset": sum(map(len, rows[:100])), "time": seconds(rows[100])}
        assert timeline["points"] == [[0, seconds(rows[0])]]


def test_a_renamed_and_a_packed_file_stay_themselves(serve, log):
    past_of(log, 3, packed=())
    server = serve(log, "--rate-limit", 0, "--interval", 0.2)
    before = {bytes_of(server, file["generation"]): file["generation"] for file in files_of(server)}

    shift(log)
    append(log, entries(50, 1000))
    pack(Path(f"{log}.2"))
    eventually(lambda: files_of(server)[-1]["generation"] not in before.values())
    once = files_of(server)
    pack(Path(f"{log}.1"))
    shift(log)
    append(log, entries(50, 2000))
    eventually(lambda: files_of(server)[-1]["generation"] not in [f["generation"] for f in once])

    assert [file["generation"] for file in once[:-1]] == list(before.values())
    assert (once[-2]["first"], once[-2]["last"]) == (1_766_000_150, 1_766_000_199)
    for data, generation in before.items():
        assert bytes_of(server, generation) == data
    assert [file["generation"] for file in files_of(server)[:-1]] == [
        file["generation"] for file in once
    ]


def test_the_names_are_the_same_in_every_process(serve, log):
    past_of(log, 5, packed=(4, 5))

    first, second = files_of(serve(log)), files_of(serve(log))

    assert first == second and len({file["generation"] for file in first}) == 6


def test_files_that_begin_alike_have_names_of_their_own(serve, log):
    for number in (3, 2, 1):
        data = "# a header\n" * 1000 + f"file {number}\n"
        Path(f"{log}.{number}").write_text(data)
    pack(Path(f"{log}.3"))
    append(log, lines(3))
    server = serve(log, "--rate-limit", 0)

    files = files_of(server)

    assert len({file["generation"] for file in files}) == 4
    texts = [bytes_of(server, file["generation"]).decode() for file in files[:-1]]
    assert [text.splitlines()[-1] for text in texts] == ["file 3", "file 2", "file 1"]


def test_a_file_is_unpacked_once_for_all_who_ask(serve, log):
    append(log, lines(3))
    with gzip.open(f"{log}.1.gz", "wb", 1) as packed:
        for start in range(0, 600_000, 100_000):
            packed.write(lines(100_000, start).encode())
    server = serve(log, "--rate-limit", 0, dev=False)
    generation = files_of(server)[0]["generation"]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(ask, server, "/api/search", q="00599999", generation=generation)
            for _ in range(8)
        ]
        begun = time.monotonic()
        healthy = server.get("/healthz")[0]
        waited = time.monotonic() - begun
        answers = [each.result() for each in asked]

    assert healthy == 200 and waited < 1
    assert {status for status, *_ in answers} == {200} and open_copies(server) == 1
    assert {len(json.loads(body)["matches"]) for *_, body in answers} == {1}


def test_a_stop_does_not_wait_for_what_is_being_unpacked(serve, log):
    append(log, lines(3))
    Path(f"{log}.1.gz").write_bytes(gzip.compress(b"a line\n" * 130_000_000, 1))
    server = serve(log, dev=False)
    path = f"/api/audit?generation={files_of(server)[0]['generation']}"

    with server.connect() as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
        eventually(lambda: open_copies(server))
        code = server.stop(within=2)

    assert code == 0


DAMAGE = {
    "cut": lambda data: data[:-9],
    "its end changed": lambda data: data[:-8] + b"12345678",
    "in the middle": lambda data: data[: len(data) // 2] + b"\0" * 99 + data[len(data) // 2 :],
    "not packed at all": lambda data: b"not packed at all\n" * 9,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("suffix", PACKERS)
def test_nothing_of_a_damaged_file_is_shown(suffix, damage, serve, log):
    append(log, lines(3))
    packed = PACKERS[suffix](os.urandom(100_000).hex().encode() + lines(1000).encode())
    Path(f"{log}.1.{suffix}").write_bytes(damage(packed))
    server = serve(log)

    for _ in range(2):
        generation = files_of(server)[0]["generation"]
        for path in ("/api/audit", "/api/search", "/api/timeline"):
            status, _, body = ask(server, path, generation=generation, q="entry")
            assert status == 422 and f"{log.name}.1.{suffix}" in json.loads(body)["error"]
    assert open_copies(server) == 0


def test_what_is_too_large_when_unpacked_is_refused(serve, log):
    append(log, lines(3))
    with gzip.open(f"{log}.1.gz", "wb", 1) as packed:
        for _ in range(1100):
            packed.write(bytes(MIB))
    server = serve(log, "--rate-limit", 0, dev=False)

    answer = ask(server, "/api/audit", generation=files_of(server)[0]["generation"])

    assert answer[0] == 422 and "large" in json.loads(answer[2])["error"]
    assert open_copies(server) == 0


def test_what_is_no_file_is_no_file_and_an_empty_one_is_empty(serve, log):
    append(log, lines(3))
    os.mkfifo(f"{log}.1")
    os.mkfifo(f"{log}.2.gz")
    Path(f"{log}.3").mkdir()
    Path(f"{log}.4").touch()
    Path(f"{log}.5.gz").write_bytes(gzip.compress(b""))
    server = serve(log)

    files = files_of(server)

    assert [file["name"] for file in files] == [f"{log.name}.5.gz", f"{log.name}.4", log.name]
    for file in files[:2]:
        status, _, body = ask(server, "/api/search", generation=file["generation"], q="x")
        assert status == 200 and json.loads(body)["size"] == 0


def test_an_unknown_or_deleted_generation_gets_404(serve, log):
    past_of(log, 2, packed=(1,))
    server = serve(log)
    generations = [file["generation"] for file in files_of(server)]

    Path(f"{log}.2").unlink()
    Path(f"{log}.1.gz").unlink()

    for generation in ("0123456789abcdef", "", "..", *generations[:2]):
        assert ask(server, "/api/audit", generation=generation)[0] == 404
    assert ask(server, "/api/audit", generation=generations[2])[0] == 200


def test_if_match_names_the_generation_that_is_asked_about(serve, log):
    past_of(log, 2, packed=(1,))
    server = serve(log)
    old, packed, current = (file["generation"] for file in files_of(server))

    for mine, other in ((old, current), (packed, old), (current, packed)):
        path = f"/api/search?q=entry&generation={mine}"
        assert server.get(path, If_Match=f'"{mine}"')[0] == 200
        assert server.get(path, If_Match=f'"{other}"')[0] == 412
        assert server.get(path)[1]["ETag"] == f'"{mine}"'
    assert server.get("/api/audit")[1]["ETag"] == f'"{current}"'


def test_of_many_packed_files_only_some_stay_unpacked(serve, log):
    names = past_of(log, 64, packed=range(1, 65), size=3)
    server = serve(log, "--rate-limit", 0, dev=False)

    files = files_of(server)
    for file in files:
        assert ask(server, "/api/search", q="entry", generation=file["generation"])[0] == 200

    assert [file["name"] for file in files] == names
    assert open_copies(server) <= 16


def test_a_file_that_is_renamed_while_it_waits_to_be_unpacked_is_still_itself(serve, log):
    append(log, lines(3))
    for number in range(1, 6):
        own = f"{number}\n" * (60_000_000 if number < 3 else 1000)
        Path(f"{log}.{number}.gz").write_bytes(gzip.compress(own.encode(), 1))
    server = serve(log, "--rate-limit", 0, dev=False)
    files = [file for file in files_of(server) if file["packed"]]
    copies = open_copies(server)

    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        large = [
            pool.submit(ask, server, "/api/audit", generation=file["generation"])
            for file in files[3:]
        ]
        eventually(lambda: open_copies(server) == copies + 2)  # both places are taken
        waiting = [pool.submit(bytes_of, server, file["generation"]) for file in files[:3]]
        time.sleep(0.1)
        shift(log)
        append(log, lines(1))
        told = [each.result() for each in waiting]
        assert [each.result()[0] for each in large] == [200, 200]

    assert told == [f"{number}\n".encode() * 1000 for number in (5, 4, 3)]


def test_reading_goes_on_while_the_log_is_rotated_twice(serve, log):
    past_of(log, 11, packed=range(3, 12), size=8000)
    server = serve(log, "--rate-limit", 0, "--interval", 0.2, dev=False)
    files = files_of(server)
    read = []

    for number, file in enumerate(files):
        if number in (4, 8):
            shift(log)
            append(log, entries(8000, (12 + number // 4 - 1) * 8000))
            pack(Path(f"{log}.2"))
        read.append(bytes_of(server, file["generation"]))

    assert b"".join(read).decode() == entries(12 * 8000, 0)


def test_what_may_be_asked_about_the_log_is_what_stat_and_lsattr_say(serve, log):
    log.write_bytes(entries(3, 0).encode() + "Köln, Zürich\n".encode("latin-1"))
    log.chmod(0o640)
    server = serve(log, "--zone", "Europe/Berlin")

    told = json.loads(server.get("/api/files")[2])["log"]

    owner, group, mode = said("stat", "-c", "%U %G %A", log).split()
    assert (told["owner"], told["group"], told["mode"]) == (owner, group, mode)
    assert told["format"] == "ISO 8601" and told["zone"] == "Europe/Berlin"
    assert "Latin-1" in told["encoding"] and told["append_only"] in (False, None)


@pytest.mark.skipif(not shutil.which("chattr"), reason="no chattr")
def test_a_log_that_can_only_grow_is_told_as_such(serve, log):
    append(log, lines(3))
    if subprocess.run(["chattr", "+a", log], capture_output=True).returncode:
        pytest.skip("no file here can be made append-only")
    try:
        server = serve(log)
        told = json.loads(server.get("/api/files")[2])["log"]
        flags = said("lsattr", log).split()[0]
    finally:
        subprocess.run(["chattr", "-a", log], check=True)

    assert told["append_only"] is True and "a" in flags


def test_names_that_are_not_recognised_are_listed_and_not_guessed_at(serve, log):
    past_of(log, 2, packed=(2,))
    own = log.name
    stem = log.stem
    odd = [f"{own}.bak", f"{own}.3.zst", f"{own}~", f"{stem}-old{log.suffix}", f"{own}.4"]
    for name in (*odd[:-1], "OTHER.log", f"{stem}2.log"):
        (log.parent / name).write_text("2025-01-01 00:00:00 not of this log\n")
    os.mkfifo(log.parent / odd[-1])
    server = serve(log)

    answer = json.loads(server.get("/api/files")[2])

    assert answer["unrecognised"] == sorted(odd)
    assert len(answer["files"]) == 3


def said(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
