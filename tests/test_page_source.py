"""How the page's script is written: one decision a line, and each object has one owner."""

import re
from bisect import bisect
from collections import Counter
from collections.abc import Iterator

from page_actions import SOURCE

MAX_TOKENS = 25
MAX_COLUMNS = 110
TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|/\*.*?\*/)
    |(?P<string>`(?:[^`\\]|\\.)*`|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    |(?P<word>[\w$]+)
    |(?P<sign>=>|[=!]==|\.\.\.|&&|\|\||\?\?|[<>=!+*/|-]=|\+\+|--|\S)""",
    re.DOTALL | re.VERBOSE,
)
EXPRESSION = re.compile(r"/(?![*/])(?:[^/\\\n\[]|\\.|\[(?:[^\]\\\n]|\\.)*\])+/[a-z]*")
SPACE = re.compile(r"\s*")
BEFORE_EXPRESSION = {
    "(",
    ",",
    "=",
    ":",
    "[",
    "!",
    "&&",
    "||",
    "?",
    "{",
    "}",
    ";",
    "=>",
    "return",
    "===",
}
BANNER = re.compile(r"// ---- (.+?)(?:: owns ([\w, ]+))? ----$")
CHANGES = "push|pop|shift|unshift|splice|sort|reverse|fill|set|add|delete|clear"


def script() -> list[str]:
    return SOURCE.read_text().partition("<script>")[2].partition("</script>")[0].split("\n")


def tokens(code: str) -> Iterator[tuple[int, str]]:
    """(offset, token); a comment is none, a regular expression is one."""
    at, last = 0, ""
    while match := (
        EXPRESSION.match(code, at) if last in BEFORE_EXPRESSION else None
    ) or TOKEN.match(code, at):
        if match.re is EXPRESSION or match.lastgroup != "comment":
            last = match[0]
            yield match.start(), last
        at = SPACE.match(code, match.end()).end()


def test_a_line_of_the_page_holds_one_decision() -> None:
    lines = script()
    code = "\n".join(lines).lstrip()
    first = len("\n".join(lines)) - len(code)
    ends = [at for at, sign in enumerate(code) if sign == "\n"]
    held = Counter(bisect(ends, at) for at, _ in tokens(code))
    table = re.compile(r"^ {2}[\w\"\[].*[,\]]$|^const [A-Z_]+ = ")

    shown = code.split("\n")
    dense = [(shown[line], count) for line, count in held.items() if count > MAX_TOKENS]

    assert first >= 0 and sum(held.values()) > 10_000
    assert [line for line in dense if not table.match(line[0])] == []
    assert [line for line in lines if len(line) > MAX_COLUMNS] == []


def test_no_conditional_expression_stands_in_another() -> None:
    code = "\n".join(script()).lstrip()
    nested, depth = [], []
    for at, token in tokens(code):
        if token in "([{`" and len(token) == 1:
            depth.append(0)
        elif token in ")]}" and depth:
            depth.pop()
        elif token == ";" and depth:
            depth[-1] = 0
        elif token == "?" and depth:
            depth[-1] += 1
            if sum(depth) > 1:
                nested.append(code[code.rfind("\n", 0, at) + 1 : code.find("\n", at)])
        elif token in (",", "=>") and depth:
            depth[-1] = 0

    assert nested == []


def sections() -> Iterator[tuple[str, list[str], str]]:
    """(name, what it owns, code)."""
    name = ""
    owned: list[str] = []
    lines: list[str] = []
    for line in script():
        if not line.startswith("// ---- "):
            lines.append(line)
            continue
        yield name, owned, "\n".join(lines)
        banner = BANNER.match(line)
        assert banner, line
        name, owned, lines = (
            banner[1],
            [one.strip() for one in (banner[2] or "").split(",") if one.strip()],
            [],
        )
    yield name, owned, "\n".join(lines)


def test_no_name_is_declared_twice() -> None:
    declared = re.findall(
        r"^(?:async )?(?:function|const|let) (\w+)", "\n".join(script()), re.MULTILINE
    )

    assert len(declared) > 300
    assert [name for name, count in Counter(declared).items() if count > 1] == []


def test_each_object_is_changed_by_its_own_section_alone() -> None:
    found = list(sections())
    owner = {one: name for name, owned, _ in found for one in owned}
    assert len(owner) > 15
    trespasses = []

    for name, _, code in found:
        for one, home in owner.items():
            place = rf"(?<![\w.$]){one}(?:\.\w+|\[[^\]]*\])+"
            writes = (
                rf"{place}\s*(?:=(?![=>])|[-+*/|&]=|\+\+|--)|(?:\+\+|--){place}|\bdelete {place}"
            )
            changes = rf"(?<![\w.$]){one}(?:\.\w+)*\.(?:{CHANGES})\(|Object\.assign\({one}\b"
            if home != name:
                trespasses += [
                    (name, match[0]) for match in re.finditer(f"{writes}|{changes}", code)
                ]

    assert trespasses == []


def test_the_page_has_one_file_and_no_way_for_log_text_into_markup() -> None:
    code = "\n".join(script())

    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", code
    )
    assert re.search(r"textContent", code)
