"""How the server's source is written: one decision a line, phases apart, one word for one thing.

`python3 tests/test_source.py [FILE]` prints all that is found, with lines, and the figures.
"""

import ast
import io
import itertools
import re
import statistics
import sys
import token
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "audit_stream.py"
MAX_TOKENS = 25  # on one line, outside of tables
MAX_COLUMNS = 100
MAX_PARAGRAPH = 12  # lines of a function without a blank one
MAX_FUNCTION = 50  # lines: about a screen
SECTIONS = (
    *("Log files", "The stream", "The follower", "Resuming", "Viewers"),
    *("HTTP", "Access", "History", "Proof", "Service", "Command line"),
)
NO_VERB = re.compile(
    r"(A|After|All|An|And|Any|As|At|Before|Both|By|Does|Each|Every|For|From|Has|How|If|In|Is|Its?"
    r"|Like|No|None|Not|Of|On|One|Only|Or|Our|Same|So|Some|Such|That|The|Their|These|They|This"
    r"|Those|To|True|Two|Under|What|When|Where|Whether|Which|While|Who|Whose|Why|With|Without)"
)
DESCRIPTORS = {"fd", "_fd", "descriptor", "_descriptor"}
LAYOUT = {
    *(token.NEWLINE, token.INDENT, token.DEDENT, token.ENDMARKER),
    *(tokenize.NL, tokenize.COMMENT, tokenize.ENCODING),
}
NESTED = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
Function = ast.FunctionDef | ast.AsyncFunctionDef
Finding = tuple[int, str]


class Source(NamedTuple):
    lines: list[str]
    tree: ast.Module
    tokens: Counter[int]  # of each line

    def nodes(self, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
        return (node for node in ast.walk(self.tree) if isinstance(node, kinds))

    def functions(self) -> list[Function]:
        found = self.nodes(ast.FunctionDef, ast.AsyncFunctionDef)
        return [node for node in found if isinstance(node, Function)]


def read_source(path: Path) -> Source:
    text = path.read_text()
    tree = ast.parse(text)
    return Source(text.split("\n"), tree, count_tokens(text, tree))


def count_tokens(text: str, tree: ast.Module) -> Counter[int]:
    """Count those of each line; a docstring is none, an f-string is one in every Python."""
    documents = {node.lineno for node in map(docstring, ast.walk(tree)) if node}
    count: Counter[int] = Counter()
    inside = 0
    for each in tokenize.generate_tokens(io.StringIO(text).readline):
        name, line = token.tok_name[each.type], each.start[0]
        ends = name in ("FSTRING_END", "TSTRING_END")
        is_document = each.type == token.STRING and line in documents
        if not inside and each.type not in LAYOUT and not is_document:
            count[line] += 1
        inside += (name in ("FSTRING_START", "TSTRING_START")) - ends
    return count


def docstring(node: ast.AST) -> ast.Expr | None:
    if not may_have_docstring(node):
        return None
    first = next(iter(getattr(node, "body", ())), None)
    if not isinstance(first, ast.Expr) or not isinstance(first.value, ast.Constant):
        return None
    return first if isinstance(first.value.value, str) else None


def may_have_docstring(node: ast.AST) -> bool:
    return isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))


def rows(node: Any) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


# -- lines -----------------------------------------------------------------------------------------


def lines_are_not_dense(source: Source) -> Iterator[Finding]:
    allowed = set(itertools.chain.from_iterable(map(rows, tables(source))))
    for line, count in sorted(source.tokens.items()):
        if count > MAX_TOKENS and line not in allowed:
            yield line, f"{count} tokens: {source.lines[line - 1].strip()[:60]}"


def tables(source: Source) -> Iterator[Any]:
    """Yield the constants of the module, regular expressions over several lines, options."""
    yield from (node for node in source.tree.body if is_constant(node))
    options = {"add_argument"}
    for node in source.nodes(ast.Assign, ast.Call):
        if isinstance(node, ast.Assign) and called(node.value) in options:
            options |= {each.id for each in node.targets if isinstance(each, ast.Name)}
        function = called(node.func) if isinstance(node, ast.Call) else ""
        if function in options or (function == "compile" and len(rows(node)) > 1):
            yield node


def is_constant(node: ast.stmt) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    names = [each.id for each in targets if isinstance(each, ast.Name)]
    return bool(names) and all(name.isupper() for name in names)


def called(function: ast.expr) -> str:
    return str(getattr(function, "attr", getattr(function, "id", "")))


def lines_are_not_long(source: Source) -> Iterator[Finding]:
    for line, text in enumerate(source.lines, 1):
        if len(text) > MAX_COLUMNS:
            yield line, f"{len(text)} columns"


def a_condition_stands_on_one_line_and_in_no_other(source: Source) -> Iterator[Finding]:
    for node in source.nodes(ast.IfExp):
        assert isinstance(node, ast.IfExp)
        inner = [each for each in ast.walk(node) if isinstance(each, ast.IfExp)]
        if len(inner) > 1:
            yield node.lineno, "a conditional expression in another"
        if len(rows(node)) > 1:
            yield node.lineno, f"a conditional expression over {len(rows(node))} lines"


# -- functions -------------------------------------------------------------------------------------


def body_of(function: Function) -> range:
    """Return the lines behind the docstring."""
    statements = function.body[1:] if docstring(function) else function.body
    if not statements:
        return range(0)
    return range(statements[0].lineno, (function.end_lineno or 0) + 1)


def phases_are_paragraphs(source: Source) -> Iterator[Finding]:
    in_tables = set(itertools.chain.from_iterable(map(rows, tables(source))))
    for function in source.functions():
        body = [source.lines[line - 1] for line in body_of(function)]
        count = len(body) - len(in_tables & set(body_of(function)))
        has_phases = count > MAX_PARAGRAPH and not only_sets_fields(function)
        if has_phases and all(line.strip() for line in body):
            yield function.lineno, f"{function.name}: {count} lines without a blank one"
        if len(body) > MAX_FUNCTION:
            yield function.lineno, f"{function.name}: {len(body)} lines"


def only_sets_fields(function: Function) -> bool:
    return function.name == "__init__" and all(
        isinstance(statement, (ast.Assign, ast.AnnAssign)) for statement in function.body
    )


def docstrings_of_functions_begin_with_a_verb(source: Source) -> Iterator[Finding]:
    for function in source.functions():
        text = ast.get_docstring(function) or "Do"
        first = re.split(r"[\s,;:.(]", text, maxsplit=1)[0]
        third_person = first.endswith("s") and not first.endswith("ss") and first != "Raises"
        is_word = re.fullmatch(r"[A-Z][a-z]+(-[a-z]+)?", first)
        is_verb = is_word and not third_person and not NO_VERB.fullmatch(first)
        if not is_verb and not is_property(function):
            yield function.lineno, f"{function.name}: {text[:60]}"


def is_property(function: Function) -> bool:
    """Tell whether it reads like a field: then its docstring may be a noun."""
    return any(called(each) in ("property", "cached_property") for each in function.decorator_list)


def no_local_has_a_name_of_the_module(source: Source) -> Iterator[Finding]:
    of_module = set(names_bound(source.tree))
    for function in source.functions():
        shared = {
            name
            for node in own_nodes(function)
            if isinstance(node, (ast.Global, ast.Nonlocal))
            for name in node.names
        }
        for name in sorted((set(names_bound(function)) & of_module) - shared):
            yield function.lineno, f"{function.name}: {name} is a name of the module, too"


def names_bound(scope: ast.Module | Function) -> Iterator[str]:
    """Yield what is assigned, imported or defined in this scope, arguments included."""
    for node in own_nodes(scope):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).partition(".")[0]
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            yield node.name


def own_nodes(scope: ast.Module | Function) -> Iterator[ast.AST]:
    """Yield the nodes of this scope without those of the functions and classes in it."""
    ahead = list(ast.iter_child_nodes(scope))
    while ahead:
        node = ahead.pop()
        yield node
        if isinstance(scope, ast.Module) and isinstance(node, NESTED):
            continue
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            ahead += ast.iter_child_nodes(node)


def no_name_of_the_module_is_given_twice(source: Source) -> Iterator[Finding]:
    """The second would count everywhere, also where the first is meant."""
    seen: set[str] = set()
    for statement in source.tree.body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [statement.name]
        else:
            targets = targets_of(statement)
            names = [node.id for each in targets for node in ast.walk(each) if is_bound(node)]
        for name in names:
            if name in seen:
                yield statement.lineno, f"{name} is given a second time"
            seen.add(name)


def targets_of(statement: ast.stmt) -> list[ast.expr]:
    if isinstance(statement, ast.AnnAssign):
        return [statement.target] if statement.value else []
    return statement.targets if isinstance(statement, ast.Assign) else []


def is_bound(node: ast.AST) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


# -- owners ----------------------------------------------------------------------------------------


def a_descriptor_is_used_by_its_owner_only(source: Source) -> Iterator[Finding]:
    allowed: set[int] = set()
    for owner in source.nodes(ast.ClassDef):
        assert isinstance(owner, ast.ClassDef)
        if owns_descriptor(owner):
            allowed |= set(rows(owner))
    for node in source.nodes(ast.Attribute):
        assert isinstance(node, ast.Attribute)
        if node.attr in DESCRIPTORS and node.lineno not in allowed:
            yield node.lineno, f"{ast.unparse(node)} outside of the class that owns it"


def owns_descriptor(owner: ast.ClassDef) -> bool:
    declared = {
        each.target.id
        for each in owner.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }
    assigned = {
        node.attr
        for node in ast.walk(owner)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    return bool(DESCRIPTORS & (declared | assigned))


def sections_stand_in_their_order(source: Source) -> Iterator[Finding]:
    numbered = enumerate(source.lines, 1)
    banners = [(line, text) for line, text in numbered if re.match(r"# ---- \d+ ", text)]
    expected = [f"# ---- {number} {name} " for number, name in enumerate(SECTIONS, 1)]
    starts = [text.rstrip("-") for _, text in banners]

    if starts != expected:
        missing = [each for each in expected if each not in starts]
        yield 1, f"the banners are not those of the map, in its order; missing: {missing}"

    for line, text in banners:
        if len(text) != MAX_COLUMNS:
            yield line, f"a banner of {len(text)} columns"
        if not source.lines[line].startswith("# "):
            yield line, "a banner without a comment that says what its section does and owns"


CHECKS: list[Callable[[Source], Iterator[Finding]]] = [
    lines_are_not_dense,
    lines_are_not_long,
    a_condition_stands_on_one_line_and_in_no_other,
    phases_are_paragraphs,
    docstrings_of_functions_begin_with_a_verb,
    no_local_has_a_name_of_the_module,
    no_name_of_the_module_is_given_twice,
    a_descriptor_is_used_by_its_owner_only,
    sections_stand_in_their_order,
]


@pytest.fixture(scope="module")
def source() -> Source:
    return read_source(SCRIPT)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_in_the_source(check: Callable[[Source], Iterator[Finding]], source: Source) -> None:
    found = [f"line {line}: {what}" for line, what in check(source)]

    assert not found, "\n" + "\n".join(found)


def test_half_of_the_functions_have_under_ten_lines(source: Source) -> None:
    assert statistics.median(len(body_of(each)) for each in source.functions()) < 10


FAULTS = """
import time
A_TABLE = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24]
# ---- 2 The stream -----------
def step(time):
    \"""The next one.\"""
    one = 1
    two = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    three = one if two else (2 if one else 3)
    four = (
        one
        if two
        else three
    )
    five = four.fd
    six = "a long line" + LONG
    seven = (
        six
    )
    return seven
A_TABLE: list[int] = []
"""


def test_each_fault_is_found(tmp_path: Path) -> None:
    (tmp_path / "faults.py").write_text(FAULTS.replace("LONG", repr("x" * 90)))
    source = read_source(tmp_path / "faults.py")

    found = {check.__name__: [line for line, _ in check(source)] for check in CHECKS}

    assert found == {
        "lines_are_not_dense": [8],
        "lines_are_not_long": [16],
        "a_condition_stands_on_one_line_and_in_no_other": [9, 11],
        "phases_are_paragraphs": [5],
        "docstrings_of_functions_begin_with_a_verb": [5],
        "no_local_has_a_name_of_the_module": [5],
        "no_name_of_the_module_is_given_twice": [21],
        "a_descriptor_is_used_by_its_owner_only": [15],
        "sections_stand_in_their_order": [1, 4, 4],
    }


def figures(source: Source) -> str:
    code, total = len(source.tokens), sum(source.tokens.values())
    lengths = [len(body_of(function)) for function in source.functions()]
    return (
        f"{total:,} tokens on {code:,} of {len(source.lines):,} lines: {total / code:.1f} a line"
        f"; {len(lengths)} functions, median {statistics.median(lengths)}, longest {max(lengths)}"
    )


def main(path: Path) -> int:
    source = read_source(path)
    found = 0
    for check in CHECKS:
        for line, what in check(source):
            print(f"{path.name}:{line}: {check.__name__}: {what}")
            found += 1
    print(f"{found} findings; {figures(source)}")
    return min(found, 1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if sys.argv[1:] else SCRIPT)))
