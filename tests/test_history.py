"""Questions about the whole log: ranges, search, counts, times; against grep and the bytes."""

import bisect
import concurrent.futures
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
from harness import FIRST, append, eventually, lines

MIB = 1 << 20


def search(server, query, **more):
    """The answer to a search that must be one."""
    status, _, body = server.get("/api/search?" + urlencode({"q": query, **more}))
    assert status == 200, f"{query!r}: {status} {body!r}"
    return json.loads(body)


def search_status(server, query, **more):
    return server.get("/api/search?" + urlencode({"q": query, **more}))[0]


# what a search says


def grep(log, *options):
    """(start, end) of the lines that GNU grep finds."""
    command = ["grep", "-a", "-b", *options, str(log)]
    found = subprocess.run(
        command, capture_output=True, env={"LC_ALL": "C.UTF-8", "PATH": os.environ["PATH"]}
    ).stdout
    rows = [line.partition(b":") for line in found.split(b"\n")[:-1]]
    return [
        (int(start), min(int(start) + len(text) + 1, log.stat().st_size)) for start, _, text in rows
    ]


def check_answer(answer, expected, low=0):
    """In what was searched: exactly the expected places, oldest first."""
    start, end = answer["scanned"]
    places = [(match["start"], match["end"]) for match in answer["matches"]]
    assert places == [place for place in expected if start <= place[0] < end]
    assert low <= start <= end <= answer["size"]
    return places


def all_pages(server, query, limit, before=None, **more):
    """Every answer down to the beginning of the log, the newest first; they join."""
    answers = [
        search(
            server, query, limit=limit, **({"before": before} if before is not None else {}), **more
        )
    ]
    while before := answers[-1]["scanned"][0]:
        answers.append(search(server, query, limit=limit, before=before, **more))
        assert answers[-1]["scanned"][1] == before > answers[-1]["scanned"][0]
    return answers


def numbered(count, every, seed=1):
    """Lines of odd lengths and bytes, of which each so-manieth is a needle with a number."""
    dice = random.Random(seed)
    for number in range(count):
        body = b"hay \xff\0 \xc3\xa9\r"[: dice.randint(0, 10)] + b"x" * int(
            dice.expovariate(1 / 80)
        )
        yield body + (b" Needle-%06d" % number if number % every == 0 else b"") + b"\n"


@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_paging_visits_every_match_once_and_ends_at_the_beginning(limit, serve, log):
    append(log, b"".join(numbered(30_000 if limit > 1 else 1000, 40)) + b"unfinished needle")
    expected = grep(log, "-i", "needle")
    server = serve(log, "--rate-limit", 0)

    answers = all_pages(server, "needle", limit)

    assert answers[0]["scanned"][1] == answers[0]["size"] == log.stat().st_size == expected[-1][1]
    assert [
        place for answer in reversed(answers) for place in check_answer(answer, expected)
    ] == expected
    for answer in answers[:-1]:
        assert (
            len(answer["matches"]) == limit
            and answer["scanned"][0] == answer["matches"][0]["start"]
        )
    assert "skipped" not in answers[0] or not answers[0]["skipped"]


def test_every_needle_is_found_by_its_number_and_no_other(serve, log):
    append(log, b"".join(numbered(60_000, 3000)))
    server = serve(log, "--rate-limit", 0)

    for number in range(0, 60_000, 3000):
        (place,) = grep(log, "-F", f"Needle-{number:06d}")
        answers = all_pages(server, f"needle-{number:06d}", 200)
        found = [match for answer in answers for match in answer["matches"]]

        assert [(match["start"], match["end"]) for match in found] == [place]
        assert (
            found[0]["text"].encode()
            == log.read_bytes()[slice(*place)][:-1].decode(errors="replace").encode()
        )
    assert all_pages(server, "needle-000001", 200)[-1]["matches"] == []


def test_a_search_begins_anywhere(serve, log):
    written = append(log, b"".join(numbered(2000, 3)))
    expected = grep(log, "-i", "needle")
    server, dice = serve(log, "--rate-limit", 0), random.Random(2)
    ends = {match.end() for match in re.finditer(rb"\n", written)}

    for before in [
        *(dice.randrange(len(written)) for _ in range(60)),
        *dice.sample(sorted(ends), 10),
        1,
        0,
        len(written),
    ]:
        answer = search(server, "needle", before=before, limit=1000)
        check_answer(answer, expected)

        assert answer["scanned"][1] <= before
        assert [
            place for place in expected if answer["scanned"][1] <= place[0] and place[1] <= before
        ] == []
        assert before not in ends or answer["scanned"][1] == before


def test_a_long_text_is_cut_at_16_kib(serve, log):
    sizes = [16383, 16384, 16385, 16386, 16387, 100_000, MIB - 100]
    written = [append(log, "é" * (size // 2) + "x" * (size % 2) + "\n") for size in sizes]

    matches = search(serve(log), "/x|é/", limit=len(sizes))["matches"]

    assert [match["end"] - match["start"] for match in matches] == [len(line) for line in written]
    for size, line, match in zip(sizes, written, matches, strict=True):
        text = match["text"].encode()
        assert line.startswith(text)
        assert len(text) == size if size <= 16384 else 16380 < len(text) <= 16384


def test_an_answer_is_bounded_and_nothing_is_skipped_by_it(serve, log):
    append(log, "".join("\x01" * 20_000 + f" needle {number:03d}\n" for number in range(300)))
    server = serve(log, "--rate-limit", 0)

    answers = all_pages(server, "needle", 1000)

    assert all(
        sum(len(match["text"]) for match in answer["matches"]) < 1.1 * MIB for answer in answers
    )
    found = [match["start"] for answer in reversed(answers) for match in answer["matches"]]
    assert found == [number * 20_012 for number in range(300)]


def test_what_is_not_searched_is_named_and_what_is_around_it_is_found(serve, log):
    first = append(log, "first needle\n")
    long = append(log, "needle " + "x" * (3 * MIB // 2) + "\n")
    second = append(log, "second needle\n")
    with open(log, "r+b") as file:
        hole = file.seek(0, os.SEEK_END), file.seek(3 * MIB, os.SEEK_END)
        file.write(b"third needle\n")
    append(log, "last needle\n")
    whole = len(first), len(first) + len(long)

    answers = all_pages(serve(log), "needle", 200)

    found = [match for answer in reversed(answers) for match in answer["matches"]]
    assert [match["text"].lstrip("\0") for match in found] == [
        f"{word} needle" for word in ("first", "second", "third", "last")
    ]
    assert [found[1]["start"], found[1]["end"]] == [whole[1], whole[1] + len(second)] and found[2][
        "end"
    ] == hole[1] + 13
    (start, end), *holes = sorted(
        stretch for answer in answers for stretch in answer.get("skipped", [])
    )
    assert (start, end) == whole
    assert holes and all(hole[0] <= start < end <= hole[1] for start, end in holes)


@pytest.mark.parametrize("query", ['"a\nb"', '"\n"', '"a\r"', '"a\tb"', '"a b"', "a", "b"])
def test_a_count_is_the_number_of_lines_that_a_search_finds(serve, log, query):
    append(log, "a\nb\na b\na\tb\na\r\n\x1b[31ma\x1b[0m\n")
    server = serve(log)

    found = len(search(server, query)["matches"])

    assert sum(number for *_, number in count(server, query)["stretches"]) == found


@pytest.mark.parametrize("query", ("needle", "/^needle/", "needle !other"))
def test_a_line_begins_behind_zero_bytes_that_a_crash_left(serve, log, query):
    zeros = b"\0" * 100_000
    log.write_bytes(b"needle 1\n" + zeros + b"needle 2\nneedle 3" + zeros + b"needle 4\n")
    starts = [found.start() for found in re.finditer(b"needle", log.read_bytes())]
    server = serve(log)

    matches = search(server, query)["matches"]
    counted = sum(number for *_, number in count(server, query)["stretches"])

    # The line that the zero bytes broke off is one with them, unless the query asks for its end.
    assert [match["start"] for match in matches][:3] == starts[:3]
    assert [match["text"].rstrip("\0") for match in matches][:2] == ["needle 1", "needle 2"]
    assert matches[-1]["end"] == log.stat().st_size
    assert counted == len(matches)


def test_case_counts_only_with_case_1(serve, log):
    append(log, "Needle\nneedle\n")
    server = serve(log)

    counts = [
        len(search(server, "Needle", **more)["matches"]) for more in ({}, {"case": 1}, {"case": 0})
    ]

    assert counts == [2, 1, 2]


BAD_SEARCHES = [
    *({"q": query} for query in ("", " ", "\t \u00a0\u2028\ufeff")),
    *({"q": "a", "limit": limit} for limit in ("0", "1001", "-1", "x", "1.5", "", "٣")),
    *({"q": "a", "before": before} for before in ("-1", "x", "1.5", "", "0x10")),
    {},
]


def test_bad_questions_get_400(serve, log):
    append(log, lines(3))
    server = serve(log)

    for asked in BAD_SEARCHES:
        status, _, body = server.get("/api/search?" + urlencode(asked))
        assert status == 400 and json.loads(body)["error"], asked


def test_a_pattern_is_never_an_option_nor_seen_by_a_shell(serve, log, tmp_path):
    target = tmp_path / "made"
    odd = [
        "--help",
        "-v",
        "-f/etc/passwd",
        "-e",
        "--",
        "-r .",
        f"$(touch {target})",
        f"`touch {target}`",
        f"; touch {target}",
    ]
    odd += ["'", "\\", "*", "(*LIMIT_MATCH=1)", "(*UTF)x", "%s", "\\Ea"]
    append(log, "\n".join(f"{word} line" for word in odd) + "\nanother\n")
    server = serve(log)

    for word in odd:
        found = search(server, f'"{word} line"')["matches"]
        assert [match["text"] for match in found] == [
            f"{each} line" for each in odd if f"{word} line" in f"{each} line"
        ]
    assert len(search(server, "--help")["matches"]) == 1
    assert len(search(server, r"/\-\-help/")["matches"]) == 1
    assert not target.exists()


# /api/audit and If-Match


def test_any_range_is_the_bytes(serve, log):
    written = append(log, b"".join(numbered(3000, 9)))
    server, dice = serve(log), random.Random(3)

    for _ in range(50):
        first, length = dice.randrange(len(written)), dice.randint(1, 100_000)
        status, _, body = server.get("/api/audit", Range=f"bytes={first}-{first + length - 1}")

        assert (status, body) == (206, written[first : first + length])


def test_every_answer_names_its_generation(serve, log):
    append(log, lines(10))
    server = serve(log)
    paths = [
        "/api/audit",
        "/api/search?q=x",
        "/api/counts?q=x",
        "/api/timeline",
        "/api/seek?time=2025-12-17T17:40:37Z",
    ]

    tags = [server.get(path)[1]["ETag"] for path in paths]
    log.rename(f"{log}.1")
    append(log, lines(10, 500))
    eventually(lambda: server.get("/api/audit", If_Match=tags[0])[0] == 412)

    assert len(set(tags)) == 1 and tags[0]
    bad = [
        "/api/search?q=",
        "/api/search?q=x&limit=0",
        "/api/counts?q=x&stretches=0",
        "/api/timeline?points=0",
        "/api/seek?time=soon",
    ]
    tag = server.get(paths[0])[1]["ETag"]
    assert {(answer[0], answer[1]["ETag"]) for answer in map(server.get, bad)} == {(400, tag)}
    assert server.get(paths[0], If_Match=f'"x", {tag}')[0] == 200
    assert [server.get(path, If_Match=tags[0])[0] for path in paths] == [412] * 5
    assert [server.get(path, If_Match=server.get(path)[1]["ETag"])[0] for path in paths] == [
        200
    ] * 5


# a large log, expensive questions


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Some 300 MB, written once; nobody changes it but by appending."""
    log = tmp_path_factory.mktemp("large") / "AUTO_REPAIR_AUDIT.log"
    block = (lines(4000) + "a" * 60 + "!\n").encode()
    append(log, "the first needle\n")
    with open(log, "ab") as file:
        for _ in range(300_000_000 // len(block)):
            file.write(block)
    append(log, "the last needle\n")
    yield log
    log.unlink()


EXPENSIVE = r"/(.+)(.+)(.+)(.+)\W\W\W$|(.+)(.+)(.+)(.+)\W\W\W\W$|(.+)(.+)(.+)(.+)\W\W\W\W\W$/"


def children(server):
    """The process ids of the server's children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == server.process.pid and state != "Z":
                found.append(int(path.parent.name))
    return found


@contextlib.contextmanager
def in_background(work, count):
    """So many at a time, again and again, until the block ends."""
    over = []

    def repeat():
        while not over:
            work()

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        running = [pool.submit(repeat) for _ in range(count)]
        try:
            yield
        finally:
            over.append(True)
    for each in running:
        each.result()


def delays(log, viewer, count, tag):
    """Seconds until an appended line has reached a viewer."""
    spent = []
    for number in range(count):
        begun = time.monotonic()
        append(log, f"{tag} {number}\n")
        viewer.wait(f"{tag} {number}\n")
        spent.append(time.monotonic() - begun)
    return spent


def test_a_large_log_is_searched_in_calls_that_join(serve, large):
    server = serve(large, dev=False)
    expected = grep(large, "needle")

    answers = all_pages(server, "needle", 200)

    assert [
        place for answer in reversed(answers) for place in check_answer(answer, expected)
    ] == expected
    assert all(answer["scanned"][1] - answer["scanned"][0] <= 257 * MIB for answer in answers)


def test_the_stream_is_as_quick_beside_three_searches(serve, view, large):
    server = serve(large, "--rate-limit", 0, dev=False)
    viewer = view(server)

    with in_background(lambda: search_status(server, "/nothing|like|zebra/ !grafana"), 3):
        eventually(lambda: children(server))
        spent = delays(large, viewer, 9, "beside searches")

    assert statistics.median(spent) < 0.25, spent


@pytest.mark.parametrize("query", ["/(a+)+$/", EXPENSIVE, r"/(?=(a+)+b)|^(\w+\s?)*$/"])
def test_an_expensive_pattern_gets_422_and_slows_nobody_down(query, serve, view, large):
    server = serve(large, "--rate-limit", 0, dev=False)
    viewer = view(server)
    begun = time.monotonic()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        asked = pool.submit(server.get, f"/api/search?q={quote(query)}")
        spent = delays(large, viewer, 5, "beside an expensive one")
        status, _, body = asked.result()

    assert status == 422 and json.loads(body)["error"]
    assert time.monotonic() - begun < 7 and statistics.median(spent) < 0.25
    assert len(search(server, "needle !first")["matches"]) == 1


def hanging_grep(folder):
    """Make one that says nothing for longer than any search may take."""
    folder.mkdir()
    (folder / "grep").write_text("#!/bin/sh\nexec sleep 30\n")
    (folder / "grep").chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def test_without_a_free_place_a_search_gets_503_after_a_while(serve, log, tmp_path):
    append(log, FIRST)
    server = serve(log, env=hanging_grep(tmp_path / "bin"))

    def ask():
        begun = time.monotonic()
        status, headers, body = server.get("/api/search?q=entry")
        assert json.loads(body)["error"]
        return status, headers["Retry-After"], time.monotonic() - begun

    with concurrent.futures.ThreadPoolExecutor() as pool:
        answers = sorted(each.result() for each in [pool.submit(ask) for _ in range(4)])

    assert [status for status, *_ in answers] == [422, 422, 503, 503]
    for _, retry, seconds in answers[2:]:
        assert int(retry) > 0 and 2.5 < seconds < 4.5


def test_a_search_ends_when_its_client_goes_away(serve, large):
    server = serve(large, dev=False)

    with server.connect() as client:
        client.sendall(
            f"GET /api/search?q={quote(EXPENSIVE)} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        )
        eventually(lambda: children(server))
    eventually(lambda: not children(server), 1, "its grep goes on")


def test_a_stop_ends_the_searches(serve, large):
    server = serve(large, dev=False)

    with server.connect() as client:
        client.sendall(
            f"GET /api/search?q={quote(EXPENSIVE)} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        )
        (child,) = eventually(lambda: children(server))
        code = server.stop(signal.SIGTERM, within=2)

    assert code == 0
    eventually(lambda: not Path(f"/proc/{child}").exists(), 1, "its grep goes on")


def no_grep(folder):
    pass


def old_grep(folder):
    """Make one without -P."""
    (folder / "grep").write_text("#!/bin/sh\necho 'grep: -P is not supported' >&2\nexit 2\n")
    (folder / "grep").chmod(0o755)


@pytest.mark.parametrize("path", ["/api/search", "/api/counts"])
@pytest.mark.parametrize("grep", [no_grep, old_grep])
def test_without_grep_a_search_gets_501_that_says_what_to_install(path, grep, serve, log, tmp_path):
    (tmp_path / "bin").mkdir()
    grep(tmp_path / "bin")
    append(log, lines(3))
    server = serve(log, env={"PATH": str(tmp_path / "bin")})

    answers = [server.get(f"{path}?q={quote(query)}") for query in ("entry", "/err|warn/")]

    assert [status for status, *_ in answers] == [501] * 2
    assert all("grep" in json.loads(body)["error"] for *_, body in answers)


def test_a_search_that_could_not_start_spoils_no_later_one(serve, log, tmp_path):
    (tmp_path / "bin").mkdir()
    append(log, lines(3))
    server = serve(log, env={"PATH": f"{tmp_path / 'bin'}"})

    first = search_status(server, "/ent?ry/")
    (tmp_path / "bin" / "grep").symlink_to(shutil.which("grep"))

    assert first == 501
    assert len(search(server, "/ent?ry/")["matches"]) == 3


def grep_of(server):
    """The number of a process that is grep by now; None if there is none."""
    for child in children(server):
        with contextlib.suppress(FileNotFoundError):
            if b"grep" in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
    return None


def test_no_term_stands_in_the_process_list_and_the_stream_goes_first(serve, large):
    server = serve(large, dev=False)

    with server.connect() as client:
        query = quote(f"secret-term {EXPENSIVE}")
        client.sendall(f"GET /api/search?q={query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        child = eventually(lambda: grep_of(server))
        command = Path(f"/proc/{child}/cmdline").read_bytes()
        environment = Path(f"/proc/{child}/environ").read_bytes()
        eventually(lambda: os.getpriority(os.PRIO_PROCESS, child) == 10)

    assert b"secret" not in command + environment and b"(.+)" not in command


def test_a_large_log_is_searched_on_all_cores(serve, large):
    server = serve(large, "--rate-limit", 0, dev=False)
    cores = min(8, len(os.sched_getaffinity(0)))

    with in_background(lambda: search_status(server, "/[^ -~]x.*y[a-f]|q.*zebra/ !grafana"), 1):
        eventually(lambda: len(children(server)) == cores, message="never so many greps")


def test_bytes_that_are_no_characters_hide_no_line(serve, log):
    bad = (b"\xff", b"\xe2\x82", b"\xf0\x9f\x98", b"\xc3(", b"\xed\xa0\x80", b"")
    texts = [b"%d%b needle \xff%b end\n" % (number, each, each) for number, each in enumerate(bad)]
    append(log, b"".join(texts) + b"needle and absent\n")
    server = serve(log, "--rate-limit", 0)

    for query in ("needle !absent", "/needle.+end$/", "/^.*needle.*end/", "end needle", "!absent"):
        assert len(search(server, query)["matches"]) == len(texts), query
    starts = [match["start"] for match in search(server, "/^\\d.*end/")["matches"]]
    assert starts == [sum(map(len, texts[:number])) for number in range(len(texts))]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_said_not_to_be_searched(encoding, serve, log):
    append(log, lines(30).encode(encoding))
    server = serve(log)

    for path in ("/api/search?q=entry", "/api/counts?q=entry"):
        status, _, body = server.get(path)
        assert status == 422 and "UTF-16" in json.loads(body)["error"]


# counts


def count(server, query, **more):
    """Return the answer to a count that must be one."""
    status, _, body = server.get("/api/counts?" + urlencode({"q": query, **more}))
    assert status == 200, f"{query!r}: {status} {body!r}"
    return json.loads(body)


def all_counts(server, query, **more):
    """Return the stretches of all answers down to the beginning of the log, the newest first."""
    answer = count(server, query, **more)
    stretches = answer["stretches"]
    assert answer["scanned"][1] == answer["size"]
    while before := answer["scanned"][0]:
        answer = count(server, query, before=before, **more)
        assert answer["scanned"][1] == before > answer["scanned"][0]
        stretches += answer["stretches"]
    return stretches


def check_stretches(stretches, log, places):
    """Check that they join, begin at line starts, and count what grep found."""
    size = log.stat().st_size
    starts, ends = [start for start, *_ in stretches], [end for _, end, _ in stretches]
    assert ends == [size, *starts[:-1]] and starts[-1] == 0
    with open(log, "rb") as file:
        assert all(os.pread(file.fileno(), 1, start - 1) == b"\n" for start in starts[:-1])
    offsets = [start for start, _ in places]
    for start, end, number in stretches:
        assert number == bisect.bisect_left(offsets, end) - bisect.bisect_left(offsets, start)


@pytest.mark.parametrize("stretches", [1, 7, None, 400])
def test_counts_are_those_of_grep_in_stretches_of_about_equal_bytes(stretches, serve, log):
    append(log, b"".join(numbered(30_000, 7)) + b"unfinished needle")
    server = serve(log, "--rate-limit", 0)

    found = all_counts(server, "needle", **({"stretches": stretches} if stretches else {}))

    wanted = stretches or 200
    check_stretches(found, log, grep(log, "-i", "needle"))
    assert len(found) == wanted
    mean = log.stat().st_size / wanted
    assert all(mean - 800 < end - start < mean + 800 for start, end, _ in found)


@pytest.mark.parametrize("query, pattern", [("DATABASE", "database"), ("/1$|2$/ checked !9", "")])
def test_a_few_lines_have_a_stretch_each(query, pattern, serve, log):
    append(log, lines(9))
    server = serve(log)

    found = all_counts(server, query)

    check_stretches(found, log, grep(log, pattern) if pattern else [])
    assert len(found) == 9


def test_counting_begins_where_it_ended_and_case_counts_with_case_1(serve, log):
    append(log, "Needle\nneedle\n" * 1000)
    server = serve(log)

    half = count(server, "Needle", before=7000)
    cased = count(server, "Needle", case=1)

    assert half["scanned"] == [0, 7000] and half["size"] == 14_000
    assert sum(number for *_, number in half["stretches"]) == 1000
    assert sum(number for *_, number in cased["stretches"]) == 1000


@pytest.mark.parametrize(
    "query,stretches",
    [
        ("needle", 200),
        pytest.param("database", 1, marks=pytest.mark.slow),
        pytest.param("/entry.*[13579]\\D/ !needle", 200, marks=pytest.mark.slow),
    ],
)
def test_a_large_log_is_counted_in_calls_that_join(query, stretches, serve, large):
    server = serve(large, "--rate-limit", 0, dev=False)
    as_pcre = {"/entry.*[13579]\\D/ !needle": "entry.*[13579]\\D"}.get(query, query)

    found = all_counts(server, query, stretches=stretches)

    check_stretches(found, large, grep(large, "-P", as_pcre))
    assert len(found) == stretches or stretches == 1
    start, end = count(server, query, stretches=stretches)["scanned"]
    assert end - start <= 257 * MIB


def test_what_is_not_counted_is_named(serve, log):
    first = append(log, "first needle\n")
    long = append(log, "needle " + "x" * (3 * MIB // 2) + "\n")
    append(log, "last needle\n")

    answer = count(serve(log), "needle", stretches=4)

    assert sum(number for *_, number in answer["stretches"]) == 2
    assert answer["skipped"] == [[len(first), len(first) + len(long)]]


def test_bad_questions_for_counts_get_400(serve, log):
    append(log, lines(3))
    server = serve(log)

    for asked in ({}, {"q": ""}, *({"q": "a", "stretches": n} for n in ("0", "401", "-1", "x"))):
        status, _, body = server.get("/api/counts?" + urlencode(asked))
        assert status == 400 and json.loads(body)["error"], asked


def test_an_expensive_count_is_refused_and_ends_with_its_client(serve, log, tmp_path):
    append(log, FIRST)
    server = serve(log, env=hanging_grep(tmp_path / "bin"))

    status, _, body = server.get("/api/counts?q=entry")
    with server.connect() as client:
        path = "/api/counts?q=entry"
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        eventually(lambda: children(server))

    assert status == 422 and json.loads(body)["error"]
    eventually(lambda: not children(server), 1, "its grep goes on")


# the timeline


def stamped(moment, form):
    return form.format(datetime.fromtimestamp(moment, UTC))


def time_in(line):
    found = re.match(rb"\[(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)Z\]", line)
    return (
        datetime.fromisoformat(found[1].decode()).replace(tzinfo=UTC).timestamp() if found else None
    )


def journal(count, form="[{:%Y-%m-%dT%H:%M:%SZ}] ", seed=5, step=7, begin=1_766_000_000):
    """Entries with their times, tracebacks between: (moment or None, line)."""
    dice, moment = random.Random(seed), begin
    for number in range(count):
        yield (
            moment,
            stamped(moment, form) + f"entry {number} – " + "x" * dice.randint(0, 100) + "\n",
        )
        moment += dice.randint(0, step)
        for _ in range(dice.choice([0, 0, 0, 1, 5])):
            yield None, '  File "/srv/repair.py", line 17, in 2025-12-17T17:40:37Z\n'


def write_journal(log, entries):
    """The offsets of the entries, as [offset, moment]."""
    rows = list(entries)
    places, at = [], log.stat().st_size if log.exists() else 0
    for moment, line in rows:
        if moment is not None:
            places.append([at, moment])
        at += len(line.encode())
    append(log, "".join(line for _, line in rows))
    return places


@pytest.mark.parametrize("points", [1, 2, 77, None, 2000])
def test_the_timeline_is_points_spread_over_the_log(points, serve, log):
    write_journal(log, journal(20_000))
    written = log.read_bytes()
    starts = {0, *(match.end() for match in re.finditer(rb"\n", written))}

    answer = json.loads(
        serve(log).get("/api/timeline" + (f"?points={points}" if points else ""))[2]
    )

    offsets = [offset for offset, _ in answer["points"]]
    wanted = points or 200
    assert answer["size"] == len(written) and len(offsets) == wanted
    assert offsets == sorted(set(offsets)) and starts.issuperset(offsets)
    assert [moment for _, moment in answer["points"]] == [
        time_in(written[at : at + 64]) for at in offsets
    ]
    gaps = [end - start for start, end in zip([0, *offsets], [*offsets, len(written)], strict=True)]
    assert max(gaps) <= len(written) / wanted + 500


def test_the_timeline_of_few_lines_is_these_lines(serve, log):
    server = serve(log, "--interval", 0.2)
    log.touch()
    empty = eventually(lambda: (answer := server.get("/api/timeline"))[0] == 200 and answer)
    append(log, "no time\n[2025-12-17T17:40:37.5Z] one\n[2025-12-17 17:40:38+01:00] two\n")
    append(log, "\n2025-12-17 17:40:39 +01 three\n")

    few = json.loads(server.get("/api/timeline")[2])

    assert json.loads(empty[2]) == {"size": 0, "format": None, "points": []}
    assert few["format"] == "ISO 8601"
    assert few["points"] == [
        [0, None], [8, 1765993237.5], [37, 1765989638], [69, None], [70, 1765989639],
    ]  # fmt: skip


def test_a_bad_number_of_points_gets_400(serve, log):
    append(log, lines(3))
    server = serve(log)

    for points in ("0", "2001", "x", "-1", "1.5", ""):
        status, _, body = server.get(f"/api/timeline?points={points}")
        assert status == 400 and json.loads(body)["error"], points


# seeking a time


def test_a_walk_through_the_times_holds_up_neither_stream_nor_range_nor_stop(serve, view, log):
    append(log, lines(300).encode() + b"no\n" * 15_000_000)
    server = serve(log, "--rate-limit", 0, dev=False)
    viewer = view(server)
    end = log.stat().st_size

    with in_background(lambda: server.get("/api/seek?time=2026-12-17"), 2):
        eventually(lambda: server.cpu() > 0.5)
        spent = delays(log, viewer, 20, "beside a walk")
        status, _, body = server.get("/api/audit", Range=f"bytes={end - 9}-{end - 1}")
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            client = stack.enter_context(server.connect())
            head = (
                f"GET /api/seek?time=2026-12-17 HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n"
            )
            client.sendall(head.encode())
        busy = server.cpu() + 0.2
        eventually(lambda: server.cpu() > busy)

        assert server.stop(within=2) == 0
    assert sorted(spent)[-3] < 0.25, spent
    assert (status, body) == (206, b"no\n" * 3)


def seek(server, moment):
    status, _, body = server.get("/api/seek?" + urlencode({"time": moment}))
    assert status == 200, (moment, body)
    answer = json.loads(body)
    return [answer["offset"], answer["time"]]


def first_at(places, moment, size):
    return next((place for place in places if place[1] >= moment), [size, None])


FORMS = {
    "Z": "[{:%Y-%m-%dT%H:%M:%SZ}] ",
    "space": "[{:%Y-%m-%d %H:%M:%S}] ",
    "offset": "{:%Y-%m-%dT%H:%M:%S.000+00:00} ",
    "bare": "{:%Y-%m-%d %H:%M:%S,000}: ",
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_seek_finds_the_first_entry_at_or_after_a_time(form, serve, log):
    places = write_journal(log, journal(12_000, form))
    server, dice, size = (
        serve(log, "--rate-limit", 0, dev=False),
        random.Random(6),
        log.stat().st_size,
    )

    for _ in range(60):
        moment = dice.randint(places[0][1] - 5, places[-1][1] + 5)
        assert seek(server, stamped(moment, "{:%Y-%m-%dT%H:%M:%SZ}")) == first_at(
            places, moment, size
        ), moment


def test_seek_takes_the_usual_ways_to_write_a_time(serve, log):
    append(
        log,
        "[2025-12-17T17:40:36Z] a\n[2025-12-17T17:40:37.250Z] b\n"
        "  traceback\n[2025-12-17T17:40:38Z] c\n",
    )
    server, b = serve(log), [25, 1765993237.25]

    for text in (
        "2025-12-17T17:40:37Z",
        "2025-12-17 17:40:37",
        "2025-12-17T17:40:36.001Z",
        "2025-12-17T18:40:37+01:00",
    ):
        assert [seek(server, text), seek(server, f"[{text}]")] == [b, b], text
    assert seek(server, "2025-12-17T12:40:37.25-05:00") == b
    for text in (
        "2025-12-17T18:40:37+01:00",
        "2025-12-17T18:40:37.25+0100",
        "2025-12-17T18:40:36,5+01",
    ):
        assert json.loads(server.get(f"/api/seek?time={text}")[2])["offset"] == b[0], text
    assert seek(server, "2025-12-17T17:40:37.251Z")[1] == 1765993238
    assert seek(server, "1999-01-01T00:00:00Z") == [0, 1765993236]
    assert seek(server, "2025-12-17T17:40:38.001Z") == [log.stat().st_size, None]


def test_seek_finds_the_first_of_many_entries_of_one_time(serve, log):
    write_journal(log, journal(500))
    same = write_journal(
        log,
        ((1_770_000_000, f"[2026-02-02T02:40:00Z] same {number}\n") for number in range(20_000)),
    )
    write_journal(
        log, ((1_770_000_001, f"[2026-02-02T02:40:01Z] later {number}\n") for number in range(2000))
    )

    assert seek(serve(log), "2026-02-02T02:40:00Z") == same[0]


HOLE = "a hole of 4 GiB"
TRACEBACK = "  a traceback\n"
BETWEEN = [
    TRACEBACK * 20_000,
    TRACEBACK * 5_500_000,
    "x" * 2 * MIB + "\n",
    "x" * 200 * MIB + "\n",
    HOLE,
]


@pytest.mark.parametrize("between", BETWEEN, ids=lambda text: text[:4] + str(len(text)))
def test_seek_passes_what_has_no_time(between, serve, log):
    first = write_journal(log, journal(300))
    if between is HOLE:
        os.truncate(log, 4 << 30)
    else:
        append(log, between)
    second = write_journal(
        log, ((1_770_000_000 + n, f"[2026-02-02T02:40:{n:02d}Z] new {n}\n") for n in range(60))
    )
    server = serve(log, "--rate-limit", 0, dev=False)

    for place in (*first[::100], *second[::30]):
        moment = stamped(place[1], "{:%Y-%m-%dT%H:%M:%SZ}")
        assert seek(server, moment) == first_at([*first, *second], place[1], None), moment


def test_seek_without_any_known_time_is_refused_at_once(serve, log):
    append(log, "no time\n" * 50_000_000)
    server = serve(log, dev=False)
    begun = time.monotonic()

    status, _, body = server.get("/api/seek?time=2025-12-17T17:40:37Z")

    assert status == 422 and "time" in json.loads(body)["error"]
    assert time.monotonic() - begun < 1
    timeline = json.loads(server.get("/api/timeline?points=2")[2])
    assert timeline["format"] is None
    assert timeline["points"] == [[0, None], [200_000_000, None]]


@pytest.mark.parametrize("size", [150, 30_000])
def test_a_stamp_that_leaps_ahead_misleads_neither_seek_nor_timeline(size, serve, log):
    dice = random.Random(8)
    good = write_journal(log, journal(size // 2, step=20))
    append(log, "[2060-01-01T00:00:00Z] the clock was wrong\n")
    good += write_journal(log, journal(size // 2, step=20, begin=good[-1][1] + 5))
    append(log, stamped(good[-1][1] + 7200, "[{:%Y-%m-%dT%H:%M:%SZ}] wrong by two hours\n"))
    good += write_journal(log, journal(size // 2, step=20, begin=good[-1][1] + 5))
    server = serve(log, "--rate-limit", 0, dev=False)

    for _ in range(60):
        moment = dice.randint(good[0][1] - 5, good[-1][1])
        found = seek(server, stamped(moment, "{:%Y-%m-%dT%H:%M:%SZ}"))
        assert found == first_at(good, moment, None), moment
    points = json.loads(server.get("/api/timeline?points=2000")[2])["points"]
    times = [seconds for _, seconds in points if seconds is not None]
    assert times == sorted(times) and times[-1] <= good[-1][1]


def test_nonsense_for_a_time_gets_400(serve, log):
    append(log, lines(3))
    server = serve(log)

    for text in ("", "yesterday", "2025-13-45T00:00:00Z", "2025-12-17T25:00:00Z", "[]", "9" * 30):
        status, _, body = server.get("/api/seek?" + urlencode({"time": text}))
        assert status == 400 and json.loads(body)["error"], text
    assert server.get("/api/seek")[0] == 400
