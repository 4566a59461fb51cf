"""The filter language and times, in server and page by one table; and the page's levels, colours, fields, digests."""

import concurrent.futures
import hashlib
import json
import os
import random
import re
import subprocess
import time
from datetime import UTC, datetime
from urllib.parse import quote, urlencode

import pytest
from harness import ROOT, append, eventually

FILTER_CASES = json.loads((ROOT / "tests" / "filter_cases.json").read_text())
TIME_CASES = json.loads((ROOT / "tests" / "time_cases.json").read_text())
LEVEL_CASES = json.loads((ROOT / "tests" / "level_cases.json").read_text())
PIECES = 300  # asked of the server
MORE_PIECES = 20_000  # asked of the page
EXPRESSIONS = 500
LATEST = datetime(2026, 2, 1, tzinfo=UTC).timestamp()  # the time of change of the logs of the table
NOW, LOOKED_AT = datetime(2026, 11, 27, 21, tzinfo=UTC), datetime(2026, 11, 20, 10, tzinfo=UTC)

# The language of expressions once more, from its description alone.
ORACLE = r"""
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

function asText(word, flags) {
  return new RegExp(Array.from(word, (c) => (SYNTAX.includes(c) ? "\\" + c : c)).join(""), flags)
}

function matcher(word, quoted, flags) {
  const inner = /^\/.+\/$/s.test(word) && word.length > 2 && !quoted ? sourceOf(word.slice(1, -1)) : null
  if (inner === null) return asText(word, flags)
  try { return new RegExp(inner, flags) } catch (error) { return asText(word, flags) }
}

function termsOf(query, flags) {
  const terms = []
  for (let at = 0; at < query.length;) {
    if (/\s/.test(query[at])) { at++; continue }
    const exclude = query[at] === "!" && /\S/.test(query[at + 1] || "")
    at += exclude
    const close = query[at] === '"' ? query.indexOf('"', at + 1) : -1
    const quoted = close > at + 1
    const end = quoted ? close + 1 : at + query.slice(at).search(/\s|$/)
    terms.push([exclude, matcher(quoted ? query.slice(at + 1, close) : query.slice(at, end), quoted, flags)])
    at = end
  }
  return terms
}
const texts = input.lines.map((hex) => new TextDecoder("utf-8", { ignoreBOM: true }).decode(Buffer.from(hex, "hex")))
const shown = texts.map((text) => text.replace(/\r$/, ""))
const numbers = (test) => shown.flatMap((text, number) => (test(text) ? [number] : []))
return input.queries.map(([query, cased]) => {
  const terms = termsOf(query, cased ? "su" : "isu"), own = parseQuery(query, cased)
  return {
    oracle: numbers((text) => terms.every(([exclude, test]) => test.test(text) !== exclude)),
    page: numbers((text) => matchesTerms(text, own)),
  }
})
"""


def in_page(code, given=None):
    """What JavaScript code returns, with the pure functions of the page and `input`."""
    page = (ROOT / "static" / "index.html").read_text()
    block = re.search(
        r"\n// ---- The filter language .*?\n// ---- SHA-256 .*?(?=\n// ---- )", page, re.DOTALL
    )[0]
    read = 'const input = JSON.parse(require("fs").readFileSync(0, "utf8"));'
    script = f'"use strict"; {read}\n{block}\nconst result = (() => {{ {code} }})()\n'
    script += "process.stdout.write(JSON.stringify(result === undefined ? null : result))"
    environment = {"PATH": os.environ["PATH"], "TZ": "Asia/Kolkata"}
    finished = subprocess.run(
        ["node", "-e", script],
        input=json.dumps(given).encode(),
        capture_output=True,
        env=environment,
        timeout=60,
    )
    assert finished.returncode == 0, finished.stderr.decode()
    return json.loads(finished.stdout)


def raw(line):
    return line.encode("utf-8", "surrogateescape")


def search(server, query, **more):
    """The answer to a search that must be one."""
    status, _, body = server.get("/api/search?" + urlencode({"q": query, **more}))
    assert status == 200, f"{query!r}: {status} {body!r}"
    return json.loads(body)


def on_the_server(server, queries, texts):
    """For each (query, case): the numbers of the matching lines of a log of these lines."""
    starts, at = {}, 0
    for number, line in enumerate(texts):
        starts[at] = number
        at += len(line) + 1

    def ask(asked):
        query, case = asked
        found = search(server, query, limit=1000, **({"case": 1} if case else {}))
        return [starts[match["start"]] for match in found["matches"]]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(ask, queries))


def compare(serve, log, queries, texts):
    """-> the answers of the oracle, and what differs from them, as [who, query, case, line]"""
    append(log, b"\n".join(texts) + b"\n")
    server = serve(log, "--rate-limit", 0, dev=False)
    answers = on_the_server(server, queries, texts)
    told = in_page(ORACLE, {"queries": queries, "lines": [line.hex() for line in texts]})
    wrong = []
    for (query, case), answer, found in zip(queries, told, answers, strict=True):
        for who, numbers in (("server", found), ("page", answer["page"])):
            wrong += [
                [who, query, case, texts[number]] for number in {*numbers} ^ {*answer["oracle"]}
            ]
    return [answer["oracle"] for answer in told], wrong


# the filter language


def test_the_table_of_the_filter_language_holds_in_server_and_page(serve, log):
    texts = list(dict.fromkeys(raw(line) for _, line, *_ in FILTER_CASES))
    queries = [[query, bool(case)] for query, _, _, *case in FILTER_CASES]
    append(log, b"\n".join(texts) + b"\n")
    server = serve(log, "--rate-limit", 0, dev=False)

    in_server = on_the_server(server, queries, texts)
    told = in_page(ORACLE, {"queries": queries, "lines": [line.hex() for line in texts]})

    for (query, line, expected, *_), found, answer in zip(
        FILTER_CASES, in_server, told, strict=True
    ):
        number = texts.index(raw(line))
        assert [number in found, number in answer["page"]] == [expected, expected], [query, line]


HOSTS, USERS = ["web1", "db-2", "10.0.0.1", "[2001:db8::7]"], ["op1", "root", "svc_backup", "jörg"]
LINES = [
    "{month} 17 17:40:37 {host} sshd[{n}]: pam_unix(sshd:session): session opened for user {user}(uid={n})",
    'type=SYSCALL msg=audit(1765993237.{n:03}:{n}): arch=c000003e syscall=59 success=yes exe="/usr/bin/sudo"',
    '{host} - {user} [17/Dec/2025:17:40:37 +0000] "GET /api/users?id={n}&x=a|b HTTP/1.1" 200 {n} "-" "curl/7.88"',
    "sudo: {user} : TTY=pts/{n} ; PWD=/ ; USER=root ; COMMAND=/bin/rm -rf /tmp/build-{n}/*",
    '{{"level":"info","time":"2025-12-17T17:40:37.{n:03}Z","user":"{user}","path":"C:\\\\tmp\\\\{n}","ok":null}}',
    "[2025-12-17T17:40:37Z] [ERROR] {host}: it's {n}% full (+{n}) – $HOME/.cache ✅ \"{user} said: 'no'\"",
    "\tat com.example.Main$Inner.<init>(Main.java:{n}) ~[app-1.{n}.jar:?]",
    '2025/12/17 17:40:37 [error] 12#12: *{n} open() "/srv/{user}/^a{{2}}.html" failed (2: No such file)\r',
    "I1217 17:40:37.{n:03} {n} main.go:{n}] E=mc^2; a\\b; x != y && !z || -{n} \u201c{user}\u201d \u00abQ\u00bb",
    'http://{host}:{n}/a//b/?q=%20#top {user}@{host} `cmd` ~/x {{a,b}} a*b?c 5" <{n}>',
]


def realistic_lines(dice, count):
    def value(number):
        host, user, month = dice.choice(HOSTS), dice.choice(USERS), dice.choice(["Dec", "Nov"])
        return {"n": number, "host": host, "user": user, "month": month}

    return [dice.choice(LINES).format(**value(dice.randrange(10_000))) for _ in range(count)]


def a_piece(dice, line):
    """Some of a line, as one copies it, without words that begin with ! or stand in slashes: these have a meaning."""
    while True:
        start, length = dice.randrange(len(line)), dice.choice([3, 8, 15, 40, 200])
        piece = line[start : start + length]
        has_meaning = re.search(r"(?:^|\s)(?:!\S|/\S+/(?:\s|$))", piece)
        if piece.strip() and not has_meaning and not is_cut_in_quotes(piece):
            return piece


def is_cut_in_quotes(piece):
    """Words behind a quoted term begin anew: there, too, ! and slashes have a meaning."""
    return re.search(r"[\"\u201c\u201d\u201e\u00bb](?:!\S|/\S+/)", piece)


def test_text_copied_out_of_a_line_finds_that_line(serve, log):
    dice = random.Random(10)
    lines = list(dict.fromkeys(realistic_lines(dice, 300)))
    pieces = [
        [number := dice.randrange(len(lines)), a_piece(dice, lines[number])]
        for _ in range(MORE_PIECES)
    ]
    append(log, "\n".join(lines) + "\n")
    server = serve(log, "--rate-limit", 0, dev=False)

    code = """const lines = input.lines.map(withoutReturn)
      return input.pieces.map(([, piece]) => {
        const terms = parseQuery(piece)
        return lines.flatMap((line, number) => (matchesTerms(line, terms) ? [number] : []))
      })"""
    in_browser = in_page(code, {"lines": lines, "pieces": pieces})
    in_server = on_the_server(
        server, [[piece, False] for _, piece in pieces[:PIECES]], [raw(line) for line in lines]
    )

    for (number, piece), found in zip(pieces, in_browser, strict=True):
        assert number in found, [piece, lines[number]]
    for (_, piece), found, same in zip(pieces, in_server, in_browser, strict=False):
        assert found == same, piece


def test_a_word_finds_what_grep_finds(serve, log):
    dice = random.Random(11)
    lines = list(dict.fromkeys(realistic_lines(dice, 300)))
    append(log, "\n".join(lines) + "\n")
    pieces = [a_piece(dice, dice.choice(lines)).strip() for _ in range(1500)]
    words = list(
        dict.fromkeys(
            piece for piece in pieces if not re.search(r'\s|^["\u201c-\u201e\u00ab!]', piece)
        )
    )[:150]
    server = serve(log, "--rate-limit", 0, dev=False)

    answers = on_the_server(
        server, [[word, False] for word in words], [raw(line) for line in lines]
    )

    for word, found in zip(words, answers, strict=True):
        command = ["grep", "-n", "-i", "-F", "-e", word, str(log)]
        told = subprocess.run(
            command, capture_output=True, env={**os.environ, "LC_ALL": "C.UTF-8"}
        ).stdout
        assert found == [int(line.split(b":")[0]) - 1 for line in told.splitlines()], word


ODD_LINES = [
    "", " ", "\t", "a", "ab", "abc", "aab", "aabb", "b a", "A-B", "a b  c", "ab1 2b", "x_y", "a.b", "a|b",
    "a(b", "a[b]{2}", 'say "a b" -', "-", "--a", "\\", "\\d", "\\1", "/\\x41/", "/(?<=a)b/", "/[[:alpha:]]/",
    "/a{,3}/", "/**/", "/a++/", "^a$", "/(a)\\1/", "ſ", "sS", "aſb", "\u212a", "kK", "ß", "ẞ", "ss", "SS", "İ", "ı",
    "iI", "ΟΔΟΣ", "οδος σ", "é", "e\u0301", "É b", "ab é a", "✅ a – b", "😀", "a😀", "a\u2028b", "a\u2029",
    "a\u00a0b", "\ufeffa", "a\ufeff", "a\u0085b", "a\0b", "\0", "a\r", "\ra", "a\rb", "\r", "\r\r", "a \r", "a\tb",
    "a\x0bb\x0c", "a\u3000b", "a\u200bb", "1", "a1", "١", "Å\u212b", "µμ", "a" * 24, "ab" * 12, "a\udcffb",
    "\udce2\udc82", "a\udcf0\udc9f\udc98b", "\udcff\udcfe ab", "\udcc3(a", "é\udcc3", "é\udcc3\r", "!a", "/", "//",
]  # fmt: skip
ATOMS = [
    *"aabbcABsSkKiI12_-:/!", *"ſßẞ\u212aİıΣσςé😀✅\u0085\0\u200bµ", *("\\" + letter for letter in "bBdDwWsSt"),
    *(".", "^", "$", "$", "|", ".*", "\\.", "\\-", "\\[", "\\|", "\\é", "\\\\", "\\:", "\ufffd"),
    *("[ab]", "[^a]", "[a-k]", "[^\\d]", "[\\w.]", "[\\s-]", "[^\\sb]", "[a-\\d]", "[--a]", "[a-]", "[&&a]"),
    *("[ſ-ƀ]", "[é-ẞ]", "[.*]", "[^ -~]".replace(" ", "!"), "[\\-\\]]", "[\\t\\\\]", "[a\ufffd]", "[\\\\d]"),
    *("(", ")", "{", "}", "[", "]", "\\1", "(?<=a)", "\\x41", "**", "{,3}", "\\p{L}", "(?i)", "\\A", "\\Z"),
    *("\\n", "[]", "[b-a]", '"'),
]  # fmt: skip
GROUPS = ("({})", "(?:{})", "(?={})", "(?!{})", "(a|{})", "(?:{}|)")
REPEATS = ("*", "+", "?", "*?", "+?", "??", "{2}", "{1,}", "{1,2}", "{0,2}?", "{2}?", "{2,1}")


def a_word(dice, depth=0):
    parts = []
    for _ in range(dice.randint(1, 4)):
        nested = depth < 2 and dice.random() < 0.25
        part = dice.choice(GROUPS).format(a_word(dice, depth + 1)) if nested else dice.choice(ATOMS)
        parts.append(part + (dice.choice(REPEATS) if dice.random() < 0.2 else ""))
    return "".join(parts)


def a_query(dice):
    words = []
    for _ in range(dice.choice([1, 1, 1, 2, 2, 3])):
        phrase = dice.choice(
            ["a b", "ab", "é", "\0", "[", "s", "b  c", "\ufeff", ".", "σ", "- b", "a "]
        )
        kind = dice.random()
        word = f'"{phrase}"' if kind < 0.1 else a_word(dice).lstrip('"!') or "a"
        words.append(dice.choice(["", "", "", "!"]) + (f"/{word}/" if kind > 0.25 else word))
    return dice.choice([" ", "  ", "\t", "\u00a0", "\u2028"]).join(words)


def test_random_queries_find_the_same_in_server_and_page(serve, log):
    dice = random.Random(4)
    queries = [[a_query(dice), dice.random() < 0.3] for _ in range(EXPRESSIONS)]

    oracle, wrong = compare(serve, log, queries, [raw(line) for line in ODD_LINES])

    assert not wrong
    assert sum(map(bool, oracle)) > EXPRESSIONS / 4


def test_bytes_that_are_no_characters_never_hide_a_line(serve, log):
    bads = (b"\xff", b"\xe2\x82", b"\xf0\x9f\x98", b"\xc3(", b"\xed\xa0\x80", b"")
    texts = [b"%b needle \xff%b" % (bad, bad) for bad in bads]

    queries = [["/needle/ /.+x?$/ !absent", False], ["needle !/^.{1,3}needle/", False]]
    oracle, wrong = compare(serve, log, queries, texts)

    assert not wrong and len(oracle[0]) == len(texts)


HEAVY_LINKS = [
    "/" + "[^a]" * 31 + "\\1/", "/" + "[^" * 4000 + "/", "/" + "(" * 4000 + "/", "/" + "(" * 2000 + ")" * 2000 + "/",
    "/" + "[a-" * 3000, '"' * 7000, "!" * 7000, "/" * 7000, "/" + "a{2}" * 2000 + "(/", "/" + "\\" * 7001 + "/",
]  # fmt: skip


def test_no_query_in_a_link_holds_up_page_or_server(serve, log):
    append(log, "entry\n")
    server = serve(log, "--rate-limit", 0)

    spent = in_page(
        """return input.map((query) => {
          const begun = Date.now()
          explainTerms(parseQuery(query))
          return Date.now() - begun
        })""",
        HEAVY_LINKS,
    )
    for query in HEAVY_LINKS:
        begun = time.monotonic()
        assert server.get("/api/search?q=" + quote(query))[0] in (200, 414, 422)
        assert time.monotonic() - begun < 2, query[:40]

    assert max(spent) < 100, spent


@pytest.mark.parametrize("query", ["", " ", "\t", "\u00a0"])
def test_an_empty_query_gets_400(query, serve, log):
    append(log, "entry\n")

    assert serve(log).get("/api/search?" + urlencode({"q": query}))[0] == 400


def test_the_page_says_how_it_understood_what_is_not_plain_text():
    queries = ['error sshd[1012] "a b"', "!cron", "/a|b/", "!/a|b/", "/foo(/", "rm -rf", "a OR b"]
    queries += ["al⟨U+034F⟩ice", "^[[31m"]

    told = in_page("return input.map((query) => explainTerms(parseQuery(query)))", queries)

    assert told == [
        [],
        ["`!cron` excludes"],
        ["`/a|b/` is an expression"],
        ["`!/a|b/` excludes what the expression matches"],
        ["`/foo(/` is text: not a common regular expression"],
        ["`-rf` is text; `!rf` excludes"],
        ["`OR` is text; `/one|other/` finds either"],
        ["`al⟨U+034F⟩ice` is text; copy the sign itself out of its line"],
        ["`^[[31m` is text; copy the sign itself out of its line"],
    ]


# times


def gnu_date(*moments, form="%s.%N", zone="UTC"):
    """What GNU date makes of some moments."""
    command = ["date", "-f", "-", "+" + form]
    environment = {**os.environ, "LC_ALL": "C", "TZ": zone}
    return subprocess.run(
        command,
        input="\n".join(moments) + "\n",
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    ).stdout.splitlines()


def replace(log, data, modified):
    """Another file in the log's place, with this time of change."""
    new = log.with_name("new")
    new.write_bytes(data)
    os.utime(new, (modified, modified))
    new.rename(log)


def timeline(server, size, points=2000):
    """The times that the server knows, as soon as it reads a log of that size."""

    def answer():
        status, _, body = server.get(f"/api/timeline?points={points}")
        found = json.loads(body) if status == 200 else {}
        return found if found.get("size") == size else None

    return eventually(answer)


def test_the_table_of_times_holds_in_server_and_page(serve, log):
    dates = [date for _, date, *_ in TIME_CASES["lines"] if date]
    moments = dict(zip(dates, map(float, gnu_date(*dates)), strict=True))
    append(log, "begin\n")
    zones = {zone for *_, zone in TIME_CASES["lines"]}
    servers = {zone: serve(log, f"--zone={zone}", "--rate-limit", 0, dev=False) for zone in zones}

    code = """return input.lines.map(([line, , , zone]) => {
      const format = detectTimeFormat([line], zone, input.latest)
      return [format && format.name, format && format.timeOf(line)]
    })"""
    in_browser = in_page(code, {"lines": TIME_CASES["lines"], "latest": LATEST * 1000})

    for number, ((line, date, name, zone), told) in enumerate(
        zip(TIME_CASES["lines"], in_browser, strict=True)
    ):
        data = line.encode().ljust(500 + number) + b"\n"  # each of another size
        replace(log, data, LATEST)
        answer = timeline(servers[zone], len(data))
        found = [answer["format"], answer["points"][0][1]]
        assert [found[0], told[0]] == [name, name], line
        for seconds in (found[1], told[1] if told[1] is None else told[1] / 1000):
            assert seconds == (date and pytest.approx(moments[date], abs=0.001)), line


DATE_FORMS = {
    "%Y-%m-%dT%H:%M:%S.%6NZ": "UTC",
    "[%Y-%m-%d %H:%M:%S,%3N]": "UTC",
    "%Y-%m-%dT%H:%M:%S.%3N%:z": "America/New_York",
    "INFO  %F %T %z": "Asia/Kolkata",
    "%F %T UTC": "UTC",
    "%F %I:%M:%S %p": "UTC",
    "<13>%b %e %T host": "UTC",
    '10.0.0.1 - - [%d/%b/%Y:%T %z] "GET /"': "Europe/Berlin",
    "%Y/%m/%d %T": "UTC",
    "msg=audit(%s.%3N:24287):": "UTC",
    "%s.%6N": "UTC",
    '{"a":1,"time":%s%3N}': "UTC",
    '{"msg":"x 2030-01-01T00:00:00Z","ts":"%FT%T.%3NZ"}': "UTC",
    "I%m%d %T.%6N": "UTC",
    "\x1b[2m%FT%T.%3NZ\x1b[0m": "UTC",
}


def random_moments(dice, count, days, end=LATEST):
    return sorted(round(end - dice.uniform(0, days * 86400), 3) for _ in range(count))


def test_random_times_are_read_as_gnu_date_writes_them(serve, log):
    dice = random.Random(7)
    append(log, "begin\n")
    server = serve(log, "--rate-limit", 0)
    for form, zone in DATE_FORMS.items():
        moments = random_moments(dice, 300, 300)
        stamps = gnu_date(*(f"@{moment}" for moment in moments), form=form, zone=zone)
        lines = [
            f"{stamp} entry of 2019-01-01 00:00:00" if dice.random() < 0.1 else f"{stamp} x"
            for stamp in stamps
        ]
        data = "".join(
            f"{line}\n\tat 2018-01-01 00:00:00\n" if dice.random() < 0.1 else f"{line}\n"
            for line in lines
        )
        replace(log, data.encode(), LATEST)

        points = [
            seconds
            for _, seconds in timeline(server, len(data.encode()))["points"]
            if seconds is not None
        ]
        code = """const format = detectTimeFormat(input.lines, "UTC", input.latest)
          return input.lines.map((line) => format.timeOf(line)).filter((ms) => ms !== null)"""
        told = in_page(code, {"lines": data.splitlines(), "latest": LATEST * 1000})

        precision = 0.001 if re.search(r"%\dN", form) else 1
        assert [ms / 1000 for ms in told] == pytest.approx(moments, abs=precision), form
        assert set(points) <= {ms / 1000 for ms in told} and len(points) > 150, form


@pytest.mark.parametrize(
    "zone", ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "+05:30", "-05:00"]
)
def test_times_without_a_zone_are_in_that_of_the_option(zone, serve, log):
    moments = random_moments(random.Random(zone), 300, 900)
    place = {"+05:30": "XXX-05:30", "-05:00": "XXX+05:00"}.get(zone, zone)
    lines = gnu_date(*(f"@{moment}" for moment in moments), form="%F %T.%3N", zone=place)
    append(log, "\n".join(lines) + "\n")
    server = serve(log, "--zone", zone)

    points = timeline(server, log.stat().st_size)["points"]
    code = "const format = detectTimeFormat(input[0], input[1]); return input[0].map((line) => format.timeOf(line))"
    told = in_page(code, [lines, zone])

    off = [1 for moment, ms in zip(moments, told, strict=True) if abs(ms / 1000 - moment) > 0.001]
    assert len(off) <= 2  # an hour that comes twice
    assert {seconds for _, seconds in points} <= {ms / 1000 for ms in told}


def test_years_are_counted_backwards_over_several_new_years(serve, log):
    dice = random.Random(3)
    moments = [float(int(moment)) for moment in random_moments(dice, 20_000, 1400)]
    stamps = gnu_date(*(f"@{moment}" for moment in moments), form="%b %e %T")
    lines = [f"{stamp} web1 app[{number}]: entry" for number, stamp in enumerate(stamps)]
    lines[7000] = "Jan  1 00:00:05 web1 kernel: a clock that is not set"
    append(log, "begin\n")
    server = serve(log)
    replace(log, ("\n".join(lines) + "\n").encode(), LATEST)

    points = timeline(server, log.stat().st_size)["points"]

    starts, at = {}, 0
    for number, line in enumerate(lines):
        starts[at] = number
        at += len(line) + 1
    wrong = [
        [lines[starts[at]], seconds]
        for at, seconds in points
        if seconds not in (moments[starts[at]], None)
    ]
    assert not [each for each in wrong if "not set" not in each[0]]
    assert len([seconds for _, seconds in points if seconds is not None]) > 1900


def test_one_stamp_of_another_century_misleads_no_jump(serve, log):
    moments = [1765993237 + 60 * number for number in range(150)]
    stamps = [
        datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") for moment in moments
    ]
    lines = [f"[{stamp}] entry\n" for stamp in stamps]
    bad = {40: "[2060-01-01T00:00:00Z] entry\n", 90: "[2025-12-25T00:00:00Z] entry\n"}
    lines = [bad.get(number, line) for number, line in enumerate(lines)]
    append(log, "".join(lines))
    server = serve(log, "--rate-limit", 0)

    for number, stamp in [*enumerate(stamps)][30:100]:
        answer = json.loads(server.get(f"/api/seek?time={stamp}")[2])
        expected = number + 1 if number in bad else number
        assert answer["offset"] == len("".join(lines[:expected])), stamp


def test_a_log_without_times_has_no_format(serve, log):
    append(
        log,
        "".join(f"entry {number}\n" for number in range(1000))
        + "valid until 2030-01-01 00:00:00\n" * 20,
    )

    answer = timeline(serve(log), log.stat().st_size)

    assert answer["format"] is None and {seconds for _, seconds in answer["points"]} == {None}


def test_what_a_person_types_as_a_time_is_understood():
    dates = [date for _, *written in TIME_CASES["typed"] for date in written]
    moments = dict(zip(dates, map(float, gnu_date(*dates)), strict=True))

    code = "return input.typed.map(([text]) => typedMoment(text, input.now, input.at))"
    given = {
        "typed": TIME_CASES["typed"],
        "now": NOW.timestamp() * 1000,
        "at": LOOKED_AT.timestamp() * 1000,
    }
    told = in_page(code, given)

    for (text, *written), found in zip(TIME_CASES["typed"], told, strict=True):
        expected = [moments[date] * 1000 for date in written]
        assert (
            list(found.values()) if isinstance(found, dict) else [found] if found else []
        ) == expected, text


@pytest.mark.parametrize("zone", ["UTC", "local", "Europe/Berlin", "-03:30"])
def test_a_time_of_day_is_that_of_the_zone_shown(zone):
    place = {"local": "Asia/Kolkata", "-03:30": "XXX+03:30"}.get(zone, zone)
    (expected,) = gnu_date("2026-11-20 08:00:00", zone=place)
    (words,) = gnu_date("2026-11-20 08:00:00", zone=place, form="%F %T %:z")

    code = "const ms = typedMoment('08:00', input[0], input[1], input[2]); return [ms, timeWords(ms, input[2])]"
    told = in_page(code, [NOW.timestamp() * 1000, LOOKED_AT.timestamp() * 1000, zone])

    assert told == [float(expected) * 1000, words.replace("+00:00", "UTC")]


# levels, colours, signs, fields, digests


def test_the_table_of_levels_holds():
    told = in_page("return input.map(([line]) => levelOf(line))", LEVEL_CASES)

    for (line, level, *word), found in zip(LEVEL_CASES, told, strict=True):
        assert found["level"] == level, line
        assert not word or line[found["from"] : found["to"]] == word[0], line


def test_colours_are_read_and_their_codes_are_not_shown():
    line = "a\x1b[1;31mERR\x1b[0m b\x1b[38;5;208mx\x1b[48;2;1;2;3my\x1b[39;4mz\x1b[K\x1b[97;27m!"

    runs = in_page("return ansiRuns(input)", line)

    assert [run["text"] for run in runs] == ["a", "ERR", " b", "x", "y", "z", "!"]
    assert all(line[run["start"] : run["end"]] == run["text"] for run in runs)
    assert [run["style"] for run in runs] == [
        {},
        {"bold": True, "colour": 1},
        {},
        {"colour": "#ff8700"},
        {"colour": "#ff8700", "ground": "#010203"},
        {"ground": "#010203", "underline": True},
        {"ground": "#010203", "underline": True, "colour": 15},
    ]


def test_a_line_of_nothing_but_colours_is_bounded():
    runs = in_page("return ansiRuns(input)", "\x1b[31mx\x1b[0my" * 5000)

    assert len(runs) <= 201


HIDDEN = "034F 115F 1160 17B4 200C 200D 2800 3164 FE0E FE0F FFA0 1D173 E0101 202E 200B 0085 0007"


@pytest.mark.parametrize("code", re.findall(r"\w+", HIDDEN))
def test_signs_that_do_not_show_are_found(code):
    text = f"al{chr(int(code, 16))}ice"

    assert in_page("return visibleSigns(input)", text) == [
        [2, 2 + len(text.encode("utf-16-le")) // 2 - 5]
    ]


def test_emoji_are_no_hidden_signs():
    assert in_page("return visibleSigns(input)", "👨‍👩‍👧 ✅ ❤️ é – a") == []


FIELD_LINES = [
    '{"level":"info","req":{"id":5,"url":"/a b","tags":["x",null]},"ok":true,"say":"a \\"b\\""}',
    'time="2025-12-17T17:40:37Z" level=info msg="session \\"opened\\"" user=op1 n=5 empty=',
    'type=USER_AUTH msg=audit(1765993237.243:24287): pid=1012 exe="/usr/bin/sudo" res=success',
    '2025-12-17T17:40:37Z app {"a": "b c", "d": 1.5}',
]


def test_fields_have_names_values_and_a_filter_that_finds_them():
    code = "return input.map((line) => fieldsOf(line).map((f) => [...f, matchesTerms(line, parseQuery(f[2]))]))"

    first, second, third, fourth = in_page(code, FIELD_LINES)

    assert [field[:2] for field in first] == [
        *(
            ["level", "info"],
            ["req.id", "5"],
            ["req.url", "/a b"],
            ["req.tags.0", "x"],
            ["req.tags.1", "null"],
        ),
        *(["ok", "true"], ["say", 'a "b"']),
    ]
    assert [field[:2] for field in second][2:4] == [["msg", 'session "opened"'], ["user", "op1"]]
    assert [field[:2] for field in third] == [
        *(["type", "USER_AUTH"], ["msg", "audit(1765993237.243:24287):"], ["pid", "1012"]),
        *(["exe", "/usr/bin/sudo"], ["res", "success"]),
    ]
    assert [field[:2] for field in fourth] == [["a", "b c"], ["d", "1.5"]]
    assert all(found for fields in (first, second, third, fourth) for *_, found in fields)


@pytest.mark.parametrize("line", ["", "no fields", "a = b", "{", '{"a":', "x=1", "[1,2]", '"{}"'])
def test_what_has_no_fields_has_none(line):
    assert in_page("return fieldsOf(input)", line) is None


def test_the_digest_is_that_of_hashlib():
    sizes = [0, 1, 3, 55, 56, 63, 64, 65, 119, 120, 128, 1000, 65_537]
    data = [random.Random(size).randbytes(size) for size in sizes]

    code = """return input.map((hex) => {
      const bytes = Uint8Array.from(Buffer.from(hex, "hex")), digest = sha256(), cut = bytes.length * 0.37 | 0
      digest.update(bytes.subarray(0, cut))
      digest.update(bytes.subarray(cut))
      return digest.hex()
    })"""

    assert in_page(code, [each.hex() for each in data]) == [
        hashlib.sha256(each).hexdigest() for each in data
    ]
