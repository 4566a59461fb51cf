"""The whole log: ranges, search, timeline and seek, against grep, a JavaScript engine and the bytes that were written."""

import concurrent.futures
import contextlib
import functools
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
from conftest import ROOT, append, eventually, lines

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
  vm.runInContext(script + `
    ;globalThis.matchersOf = (query) => {
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
    """For each (query, case): the numbers of the matching lines, as the language says and as the page finds them."""
    asked = {"queries": queries, "lines": [line.hex() for line in texts], "page": str(PAGE)}
    finished = subprocess.run(["node", "-e", JAVASCRIPT], input=json.dumps(asked), capture_output=True, text=True)
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
    for (query, case), told, found in zip(queries, in_javascript(queries, texts), answers, strict=True):
        for who, numbers in (("server", found), ("page", told["page"])):
            wrong += [[who, query, case, texts[number]] for number in {*numbers} ^ {*told["oracle"]}]
    return wrong


ODD_LINES = [
    "", " ", "\t", "a", "ab", "abc", "aab", "aabb", "b a", "A-B", "a b  c", "ab1 2b", "x_y", "a.b", "a|b", "a(b", "a[b]{2}",
    'say "a b" -', "-", "--a", "\\", "\\d", "\\1", "\\x41", "(?<=a)b", "[[:alpha:]]", "a{,3}", "**", "a++", "^a$", "(a)\\1",
    "ſ", "sS", "aſb", "\u212a", "kK", "ß", "ẞ", "ss", "SS", "İ", "ı", "iI", "ΟΔΟΣ", "οδος σ", "é", "e\u0301", "É b", "ab é a",
    "✅ a – b", "😀", "a😀b", "a\u2028b", "a\u2029", "a\u00a0b", "\ufeffa", "a\ufeff", "a\u0085b", "a\0b", "\0", "a\r", "\ra", "a\rb",
    "a\tb", "a\x0bb\x0c", "a\u3000b", "a\u200bb", "1", "a1", "١", "Å\u212b", "µμ", "a" * 24, "ab" * 12,
    "a\udcffb", "\udce2\udc82", "a\udcf0\udc9f\udc98b", "\udcff\udcfe ab", "\udcc3(a", "é\udcc3", "[2025-12-17T17:40:37Z] Ab: é – ✅",
]  # fmt: skip
ATOMS = [
    *"aabbcABsSkKiI12 _-:", *"ſßẞ\u212aİıΣσςé😀✅\u0085\0\u200bµ", *("\\" + letter for letter in "bBdDwWsSt"),
    *(".", "^", "$", "|", ".*", "\\.", "\\-", "\\[", "\\|", "\\é", "\\\\", "\\:"),
    *("[ab]", "[^a]", "[a-k]", "[^\\d]", "[\\w.]", "[\\s-]", "[^\\sb]", "[ſ-ƀ]", "[é-ẞ]", "[.*]", "[^ -~]", "[\\-\\]]", "[\\t\\\\]"),
    *("(", ")", "{", "}", "[", "]", "\\1", "(?<=a)", "\\x41", "**", "{,3}", "\\p{L}", "(?i)", "\\A", "\\Z", "\\n", "[]", "[b-a]", '"'),
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
