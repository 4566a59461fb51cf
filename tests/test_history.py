"""The whole log: ranges, search, timeline, seek; against grep, JavaScript and the bytes written."""

import concurrent.futures
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
from harness import ROOT, append, eventually, lines

MIB = 1 << 20
QUERIES = 3000
PAGE = ROOT / "static" / "index.html"
CASES = json.loads((ROOT / "tests" / "filter_cases.json").read_text())

# The language once more, from its description alone; and the page's own half of it, taken from its script.
JAVASCRIPT = r"""
const { readFileSync } = require("fs"), vm = require("vm")
const { queries, lines, page } = JSON.parse(readFileSync(0, "utf8"))
const texts = lines.map((hex) => new TextDecoder("utf-8", { ignoreBOM: true }).decode(Buffer.from(hex, "hex")))

const SYNTAX = "^$\\.*+?()[]{}|/"
const isSign = (sign) => /^[!-~]$/.test(sign) && !/[A-Za-z0-9]/.test(sign)
const asSign = (sign) => (SYNTAX.includes(sign) ? "\\" + sign : "\\x" + sign.charCodeAt(0).toString(16))

function readEscape(word, at, letters) {
  const next = word[at + 1] || ""
  if (next && letters.includes(next)) return ["\\" + next, at + 2]
  return isSign(next) ? [asSign(next), at + 2] : null
}

function readClass(word, at) {
  let source = "[", begin = at + 1
  if (word[begin] === "^") source += word[begin++]
  for (let i = begin; i < word.length;) {
    if (word[i] === "]") return i === begin ? null : [source + "]", i + 1]
    if (word[i] === "[") return null
    const read = word[i] === "\\" ? readEscape(word, i, "dwst") : [word[i], i + 1]
    if (!read) return null
    source += read[0], i = read[1]
  }
  return null
}

function readGroup(word, at) {
  const kind = word[at + 1] === "?" ? word.slice(at, at + 3) : "("
  return ["(", "(?:", "(?=", "(?!"].includes(kind) ? [kind, at + kind.length] : null
}

/** The source of a JavaScript regular expression, or null for plain text. */
function sourceOf(word) {
  let source = ""
  for (let at = 0; at < word.length;) {
    const read = { "\\": readEscape, "[": readClass, "(": readGroup }[word[at]]
    const piece = read ? read(word, at, "bBdDwWsSt") : [word[at], at + 1]
    if (!piece) return null
    source += piece[0], at = piece[1]
  }
  return source
}

function matcher(word, plain, flags) {
  const source = plain ? null : sourceOf(word)
  try {
    if (source !== null) return new RegExp(source, flags)
  } catch (error) {}
  return new RegExp(Array.from(word, (c) => (SYNTAX.includes(c) ? "\\" + c : c)).join(""), flags)
}

function termsOf(query, flags) {
  const terms = []
  for (let at = 0; at < query.length;) {
    if (/\s/.test(query[at])) { at++; continue }
    const exclude = query[at] === "-" && /\S/.test(query[at + 1] || "")
    at += exclude
    const close = query[at] === '"' ? query.indexOf('"', at + 1) : -1
    const end = close > 0 ? close + 1 : at + query.slice(at).search(/\s|$/)
    terms.push([exclude, matcher(close > 0 ? query.slice(at + 1, close) : query.slice(at, end), close > 0, flags)])
    at = end
  }
  return terms
}

function pageJudge() {
  const nothing = new Proxy(function () {}, {
    get: (target, name) => (name === Symbol.toPrimitive ? () => "" : name === Symbol.iterator ? undefined : nothing),
    set: () => true, apply: () => nothing, construct: () => nothing,
  })
  const globals = { console: nothing, TextEncoder, TextDecoder, URL, URLSearchParams }
  for (const name of ["document", "window", "location", "history", "navigator", "WebSocket", "fetch", "setTimeout",
    "setInterval", "clearTimeout", "requestAnimationFrame", "addEventListener", "matchMedia", "localStorage"])
    globals[name] = nothing
  const script = readFileSync(page, "utf8").match(/<script>([^]*?)<\/script>/)[1]
  vm.createContext(globals)
  try { vm.runInContext(script, globals) } catch (error) {} // its last part starts the page, which there is none of
  vm.runInContext(`globalThis.matchersOf = (query) => {
    const filter = { words: query, terms: parseQuery(query) }
    return (text) => judge({ kind: "", text, filter: null, passes: true }, filter)
  }`, globals)
  return globals.matchersOf
}

const numbers = (test) => texts.flatMap((text, number) => (test(text) ? [number] : []))
const matchersOf = pageJudge()
process.stdout.write(JSON.stringify(queries.map(([query, cased]) => {
  const terms = termsOf(query, cased ? "su" : "isu")
  const oracle = numbers((text) => terms.every(([exclude, test]) => test.test(text) !== exclude))
  return { oracle, page: cased ? oracle : numbers(matchersOf(query)) }
})))
"""


def raw(line):
    return line.encode("utf-8", "surrogateescape")


def search(server, query, **more):
    """The answer to a search that must be one."""
    status, _, body = server.get("/api/search?" + urlencode({"q": query, **more}))
    assert status == 200, f"{query!r}: {status} {body!r}"
    return json.loads(body)


def search_status(server, query, **more):
    return server.get("/api/search?" + urlencode({"q": query, **more}))[0]


def in_javascript(queries, texts):
    """For each (query, case): the numbers of the matching lines, by the language and by the page."""
    asked = {"queries": queries, "lines": [line.hex() for line in texts], "page": str(PAGE)}
    finished = subprocess.run(
        ["node", "-e", JAVASCRIPT], input=json.dumps(asked), capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def starts_of(texts):
    starts = [0]
    for line in texts:
        starts.append(starts[-1] + len(line) + 1)
    return starts


def on_the_server(server, queries, texts):
    """The same from the server, whose log holds these lines."""
    numbers = {start: number for number, start in enumerate(starts_of(texts))}

    def ask(asked):
        query, case = asked
        found = search(server, query, limit=1000, **({"case": 1} if case else {}))
        return [numbers[match["start"]] for match in found["matches"]]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(ask, queries))


def compare(serve, log, queries, texts):
    """-> what differs from the language, as [who, query, case, line]."""
    append(log, b"\n".join(texts) + b"\n")
    server = serve(log, "--rate-limit", 0, dev=False)
    answers = on_the_server(server, queries, texts)
    wrong = []
    for (query, case), told, found in zip(
        queries, in_javascript(queries, texts), answers, strict=True
    ):
        for who, numbers in (("server", found), ("page", told["page"])):
            wrong += [
                [who, query, case, texts[number]] for number in {*numbers} ^ {*told["oracle"]}
            ]
    return wrong


ODD_LINES = [
    "", " ", "\t", "a", "ab", "abc", "aab", "aabb", "b a", "A-B", "a b  c", "ab1 2b", "x_y", "a.b", "a|b",
    "a(b", "a[b]{2}", 'say "a b" -', "-", "--a", "\\", "\\d", "\\1", "\\x41", "(?<=a)b", "[[:alpha:]]",
    "a{,3}", "**", "a++", "^a$", "(a)\\1", "ſ", "sS", "aſb", "\u212a", "kK", "ß", "ẞ", "ss", "SS", "İ", "ı",
    "iI", "ΟΔΟΣ", "οδος σ", "é", "e\u0301", "É b", "ab é a", "✅ a – b", "😀", "a😀", "a\u2028b", "a\u2029",
    "a\u00a0b", "\ufeffa", "a\ufeff", "a\u0085b", "a\0b", "\0", "a\r", "\ra", "a\rb", "a\tb", "a\x0bb\x0c",
    "a\u3000b", "a\u200bb", "1", "a1", "١", "Å\u212b", "µμ", "a" * 24, "ab" * 12, "a\udcffb", "\udce2\udc82",
    "a\udcf0\udc9f\udc98b", "\udcff\udcfe ab", "\udcc3(a", "é\udcc3", "[2025-12-17T17:40:37Z] Ab: é – ✅",
]  # fmt: skip
ATOMS = [
    *"aabbcABsSkKiI12 _-:", *"ſßẞ\u212aİıΣσςé😀✅\u0085\0\u200bµ", *("\\" + letter for letter in "bBdDwWsSt"),
    *(".", "^", "$", "|", ".*", "\\.", "\\-", "\\[", "\\|", "\\é", "\\\\", "\\:"),
    *("[ab]", "[^a]", "[a-k]", "[^\\d]", "[\\w.]", "[\\s-]", "[^\\sb]"),
    *("[ſ-ƀ]", "[é-ẞ]", "[.*]", "[^ -~]", "[\\-\\]]", "[\\t\\\\]"),
    *("(", ")", "{", "}", "[", "]", "\\1", "(?<=a)", "\\x41", "**", "{,3}", "\\p{L}", "(?i)", "\\A", "\\Z"),
    *("\\n", "[]", "[b-a]", '"'),
]  # fmt: skip
GROUPS = ("({})", "(?:{})", "(?={})", "(?!{})", "(a|{})", "(?:{}|)")
REPEATS = ("*", "+", "?", "*?", "+?", "??", "{2}", "{1,}", "{1,2}", "{0,2}?", "{2}?")


def a_word(dice, depth=0):
    parts = []
    for _ in range(dice.randint(1, 4)):
        nested = depth < 2 and dice.random() < 0.25
        part = dice.choice(GROUPS).format(a_word(dice, depth + 1)) if nested else dice.choice(ATOMS)
        parts.append(part + (dice.choice(REPEATS) if dice.random() < 0.2 else ""))
    return "".join(parts).replace(" ", "")


def a_query(dice):
    """Some terms; a quote only where it is sure whether it is closed."""
    words = []
    for _ in range(dice.choice([1, 1, 1, 2, 2, 3])):
        phrase = dice.choice(["a b", "ab", "é", "\0", "[", "s", "b  c", "\ufeff", ".", "σ", "- b"])
        word = f'"{phrase}"' if dice.random() < 0.15 else a_word(dice).lstrip('-"') or "a"
        words.append(dice.choice(["", "", "", "-"]) + word)
    return dice.choice([" ", "  ", "\t", "\u00a0", "\u2028"]).join(words)


def test_the_table_of_the_filter_language_holds(serve, log):
    texts = list(dict.fromkeys(raw(line) for _, line, *_ in CASES))
    queries = [[query, bool(case)] for query, _, _, *case in CASES]

    oracle = in_javascript(queries, texts)
    wrong = compare(serve, log, queries, texts)

    for (query, line, expected, *_), told in zip(CASES, oracle, strict=True):
        assert (texts.index(raw(line)) in told["oracle"]) == expected, [query, line]
    assert not wrong


def test_random_queries_find_the_same_in_the_server_and_in_the_page(serve, log):
    dice = random.Random(4)
    queries = [[a_query(dice), dice.random() < 0.3] for _ in range(QUERIES)]

    wrong = compare(serve, log, queries, [raw(line) for line in ODD_LINES])

    assert not wrong


def test_bytes_that_are_no_characters_never_hide_a_line(serve, log):
    texts = [
        b"%b needle \xff%b" % (bad, bad)
        for bad in (b"\xff", b"\xe2\x82", b"\xf0\x9f\x98", b"\xc3(", b"\xed\xa0\x80", b"")
    ]

    wrong = compare(
        serve, log, [["needle .+x?$ -absent", False], ["needle -^.{1,3}needle", False]], texts
    )

    assert not wrong


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

    matches = search(serve(log), "x|é", limit=len(sizes))["matches"]

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
    assert len(search(server, "--help")["matches"]) == len(odd)
    assert len(search(server, "\\-\\-help")["matches"]) == 1
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
        "/api/timeline?points=0",
        "/api/seek?time=soon",
    ]
    tag = server.get(paths[0])[1]["ETag"]
    assert {(answer[0], answer[1]["ETag"]) for answer in map(server.get, bad)} == {(400, tag)}
    assert server.get(paths[0], If_Match=f'"x", {tag}')[0] == 200
    assert [server.get(path, If_Match=tags[0])[0] for path in paths] == [412] * 4
    assert [server.get(path, If_Match=server.get(path)[1]["ETag"])[0] for path in paths] == [
        200
    ] * 4


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


EXPENSIVE = r"(.+)(.+)(.+)(.+)\W\W\W$|(.+)(.+)(.+)(.+)\W\W\W\W$|(.+)(.+)(.+)(.+)\W\W\W\W\W$"


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

    with in_background(lambda: search_status(server, "nothing|like|zebra -grafana"), 3):
        eventually(lambda: children(server))
        spent = delays(large, viewer, 9, "beside searches")

    assert statistics.median(spent) < 0.25, spent


@pytest.mark.parametrize("query", ["(a+)+$", EXPENSIVE, "(?=(a+)+b)|^(\\w+\\s?)*$"])
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
    assert len(search(server, "needle -first")["matches"]) == 1


def test_without_a_free_place_a_search_gets_503_after_a_while(serve, large):
    server = serve(large, dev=False)

    def ask():
        begun = time.monotonic()
        status, headers, body = server.get(f"/api/search?q={quote(EXPENSIVE)}")
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
    """One without -P."""
    (folder / "grep").write_text("#!/bin/sh\necho 'grep: -P is not supported' >&2\nexit 2\n")
    (folder / "grep").chmod(0o755)


def is_plain(query):
    """Has it no sign that could be one of a regular expression?"""
    return not re.search(r"[\\^$.|?*+()\[\]{}]", re.sub(r'"[^"]*"', "", query))


# plain text, line, whether the one is in the other, where case does not count
FOLDED = [
    *(["ss", "ß", False], ["straße", "STRASSE", False], ["ẞ", "ß", True], ["S", "ſ", True], ["k", "\u212a", True]),
    *(["i", "İ", False], ["i", "ı", False], ["σ", "Σς", True], ["fi", "ﬁ", False]),
    *(["a.b", "A.B", True], ["a.b", "axb", False]),
]  # fmt: skip


@pytest.mark.parametrize("grep", [no_grep, old_grep])
def test_without_grep_plain_text_is_still_found(grep, serve, log, tmp_path):
    (tmp_path / "bin").mkdir()
    grep(tmp_path / "bin")
    cases = [case for case in CASES if is_plain(case[0])]
    cases += [[f'"{word}"', line, expected] for word, line, expected in FOLDED]
    texts = list(dict.fromkeys(raw(line) for _, line, *_ in cases))
    append(log, b"\n".join(texts) + b"\n")
    starts = starts_of(texts)
    server = serve(log, "--rate-limit", 0, dev=False, env={"PATH": str(tmp_path / "bin")})

    for query, line, expected, *case in cases:
        matches = search(server, query, limit=1000, **({"case": 1} if case else {}))["matches"]
        found = starts[texts.index(raw(line))] in [match["start"] for match in matches]
        assert found == expected, [query, line]


@pytest.mark.parametrize("grep", [no_grep, old_grep])
def test_without_grep_a_regular_expression_gets_501_each_time(grep, serve, log, tmp_path):
    (tmp_path / "bin").mkdir()
    grep(tmp_path / "bin")
    append(log, lines(3))
    server = serve(log, env={"PATH": str(tmp_path / "bin")})

    answers = [server.get(f"/api/search?q={quote('err|warn')}") for _ in range(4)]

    assert [status for status, *_ in answers] == [501] * 4
    assert all(json.loads(body)["error"] for *_, body in answers)
    assert len(search(server, '"entry 00000001"')["matches"]) == 1


# the timeline


def stamped(moment, form):
    return form.format(datetime.fromtimestamp(moment, UTC))


def time_in(line):
    found = re.match(rb"\[(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)Z\]", line)
    return (
        datetime.fromisoformat(found[1].decode()).replace(tzinfo=UTC).timestamp() if found else None
    )


def journal(count, form="[{:%Y-%m-%dT%H:%M:%SZ}] ", seed=5, step=7):
    """Entries with their times, tracebacks between: (moment or None, line)."""
    dice, moment = random.Random(seed), 1_766_000_000
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

    assert json.loads(empty[2]) == {"size": 0, "points": []}
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


def test_a_walk_through_the_times_holds_up_neither_a_range_nor_the_stop(serve, log):
    append(log, b"no\n" * 60_000_000)
    server = serve(log, "--rate-limit", 0, dev=False)

    with contextlib.ExitStack() as stack:
        for _ in range(8):
            client = stack.enter_context(server.connect())
            client.sendall(
                f"GET /api/seek?time=2025-12-17 HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode()
            )
        eventually(lambda: server.cpu() > 0.5)
        status, _, body = server.get("/api/audit", Range="bytes=999-1007")

        assert (status, body) == (206, b"no\n" * 3)
        assert server.stop(within=2) == 0


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
        "[2025-12-17T17:40:36Z] a\n[2025-12-17T17:40:37.250Z] b\n  traceback\n[2025-12-17T17:40:38Z] c\n",
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


def test_seek_without_any_time_is_the_end(serve, log):
    server = serve(log, "--interval", 0.2)
    log.touch()
    eventually(lambda: server.get("/healthz")[0] == 200)

    empty = seek(server, "2025-12-17T17:40:37Z")
    append(log, "no time\n" * 50_000)

    assert empty == [0, None]
    assert seek(server, "2025-12-17T17:40:37Z") == [400_000, None]


def test_nonsense_for_a_time_gets_400(serve, log):
    append(log, lines(3))
    server = serve(log)

    for text in ("", "yesterday", "2025-13-45T00:00:00Z", "2025-12-17T25:00:00Z", "[]", "9" * 30):
        status, _, body = server.get("/api/seek?" + urlencode({"time": text}))
        assert status == 400 and json.loads(body)["error"], text
    assert server.get("/api/seek")[0] == 400
