"""One open file, without a process: what is read, where lines end, what proves that it is the same.

A quick place to try an idea; whether the log arrives is told by the tests that start a server.
"""

import bz2
import gzip
import lzma
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import audit_stream
from audit_stream import KIB, MAX_MESSAGE, GenerationNames, LogFile, open_log_file

HOLE = 64 * KIB  # bytes of a hole, where a number stands among the pieces of a file
AFTER = HOLE + 64 * KIB  # where the log goes on behind one block and a hole
BLOCK = b"a" * (64 * KIB - 1) + b"\n"
LONG = b"x" * (MAX_MESSAGE + 100)
TWO, THREE = b"one\ntwo\n", b"one\ntwo\nthree\n"
E = "é".encode()


def fill(path: Path, pieces: tuple[bytes | int, ...]) -> LogFile:
    """Write the pieces, where a number is a hole, and open the file."""
    with open(path, "wb") as file:
        for piece in pieces:
            if isinstance(piece, int):
                file.seek(piece, os.SEEK_CUR)
            else:
                file.write(piece)
        file.truncate()
    return open_log_file(str(path))


# what is in the file -> what a method returns
ANSWERS: dict[str, tuple[tuple[bytes | int, ...], Callable[[LogFile], Any], Any]] = {
    "bytes in the middle": ((TWO,), lambda log: log.read_bytes(2, 6), b"e\ntw"),
    "bytes, fewer at the end": ((TWO,), lambda log: log.read_bytes(6, 99), b"o\n"),
    "bytes behind the end": ((TWO,), lambda log: log.read_bytes(8, 99), b""),
    "bytes of a hole": (
        (BLOCK, HOLE, TWO),
        lambda log: log.read_bytes(AFTER - 2, AFTER + 1),
        b"\0\0o",
    ),
    "the size is that of the file": ((BLOCK, HOLE, TWO), lambda log: log.size, AFTER + 8),
    "the size has room in it": ((TWO, bytes(99)), lambda log: log.size, 107),
    # data ends at a hole
    "data up to a hole": ((BLOCK, HOLE, TWO), lambda log: log.read_data(0, AFTER + 8), BLOCK),
    "data without NULs at a hole": (
        (BLOCK, TWO, bytes(64 * KIB - 8), HOLE, TWO),
        lambda log: log.read_data(0, 999 * KIB),
        BLOCK + TWO,
    ),
    "data in a hole": ((BLOCK, HOLE, TWO), lambda log: log.read_data(64 * KIB, AFTER), b""),
    "data behind a hole": ((BLOCK, HOLE, TWO), lambda log: log.read_data(AFTER, AFTER + 8), TWO),
    "data with a NUL in a line": ((b"a\0b\n",), lambda log: log.read_data(0, 4), b"a\0b\n"),
    "data up to zero bytes that were written": (
        (TWO, bytes(2000), TWO),
        lambda log: log.read_data(0, 9999),
        TWO,
    ),
    "data with a few NULs": (
        (TWO, bytes(15), TWO),
        lambda log: log.read_data(0, 9999),
        TWO + bytes(15) + TWO,
    ),
    # where it goes on
    "behind a hole": ((BLOCK, HOLE, TWO), lambda log: log.next_data(64 * KIB), AFTER),
    "at once where there is data": ((BLOCK, HOLE, TWO), lambda log: log.next_data(9), 9),
    "in the middle of a hole": ((BLOCK, HOLE, TWO), lambda log: log.next_data(99 * KIB), AFTER),
    "behind a hole that ends in a block": (
        (BLOCK, HOLE + 7, TWO),
        lambda log: log.next_data(64 * KIB),
        AFTER + 7,
    ),
    "behind the second hole": (
        (BLOCK, HOLE, BLOCK, HOLE, TWO),
        lambda log: log.next_data(AFTER + 64 * KIB),
        2 * AFTER,
    ),
    "behind zero bytes that were written": (
        (TWO, bytes(2000), TWO),
        lambda log: log.next_data(8),
        2008,
    ),
    "nothing behind the last line": ((TWO,), lambda log: log.next_data(8), None),
    "nothing behind a hole at the end": ((BLOCK, HOLE), lambda log: log.next_data(64 * KIB), None),
    "nothing but room behind a hole": (
        (BLOCK, HOLE, bytes(HOLE)),
        lambda log: log.next_data(64 * KIB),
        None,
    ),
    # where the complete lines end
    "no line in an empty file": ((), LogFile.complete_end, 0),
    "complete lines": ((TWO,), LogFile.complete_end, 8),
    "an unfinished line": ((TWO, b"thr"), LogFile.complete_end, 8),
    "only an unfinished line": ((b"thr",), LogFile.complete_end, 0),
    "lines and room": ((TWO, bytes(9999)), LogFile.complete_end, 8),
    "lines and a hole": ((TWO, HOLE), LogFile.complete_end, 8),
    "an unfinished line and room": ((TWO, b"thr", bytes(9999)), LogFile.complete_end, 8),
    "NULs between lines": ((TWO, bytes(3), TWO), LogFile.complete_end, 19),
    "nothing but room": ((bytes(9999),), LogFile.complete_end, 0),
    "a line too long for a message": ((TWO, LONG), LogFile.complete_end, 8 + len(LONG)),
    "a long line with half a character": ((TWO, LONG, E[:1]), LogFile.complete_end, 8 + len(LONG)),
    # where the last lines begin
    "the last lines, all of them": ((THREE,), lambda log: log.line_start(14, 99), 0),
    "the last lines, one of them": ((THREE,), lambda log: log.line_start(14, 9), 8),
    "the last lines, just one": ((THREE,), lambda log: log.line_start(14, 6), 8),
    "the last lines before an offset": ((THREE,), lambda log: log.line_start(8, 5), 4),
    "of a longer line its end": (
        (LONG, b"\n"),
        lambda log: log.line_start(len(LONG) + 1, 9),
        len(LONG) - 8,
    ),
    "of a longer line whole characters": ((E * 9,), lambda log: log.line_start(18, 5), 14),
    "the last lines behind a hole": (
        (BLOCK, HOLE, TWO),
        lambda log: log.line_start(AFTER + 8, 999 * KIB),
        AFTER,
    ),
    "the last lines of nothing": ((), lambda log: log.line_start(0, 99), 0),
}


@pytest.mark.parametrize(("pieces", "ask", "expected"), ANSWERS.values(), ids=ANSWERS)
def test_a_file_is_read(
    pieces: tuple[bytes | int, ...], ask: Callable[[LogFile], Any], expected: Any, tmp_path: Path
) -> None:
    log = fill(tmp_path / "log", pieces)

    assert ask(log) == expected


def put(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


NUMBERS = b"".join(b"%07d\n" % number for number in range(3 * 8192))
END = 2 * 64 * KIB  # how far NUMBERS was published
LAST = END - 8  # where the last published line begins

# what happens to a log of which two thirds were published -> what that is, and where it goes on
CHANGES: dict[str, tuple[Callable[[Path], object], tuple[str, int] | None]] = {
    "nothing": (lambda path: None, None),
    "growth": (lambda path: put(path, len(NUMBERS), TWO), None),
    "what was not published": (lambda path: put(path, END, b"X"), None),
    "what nobody compares": (lambda path: put(path, END // 2, b"X"), None),
    "the first byte": (lambda path: put(path, 0, b"X"), ("replaced", 0)),
    "the last byte": (lambda path: put(path, END - 1, b"X"), ("edited", LAST)),
    "the last 4 KiB": (lambda path: put(path, END - 4 * KIB, b"X"), ("edited", END - 4 * KIB)),
    "a cut in the last 4 KiB": (lambda path: os.truncate(path, END - 9), ("cut", END - 9)),
    "a cut far before": (lambda path: os.truncate(path, 9 * KIB), ("cut", 9 * KIB)),
    "a cut to nothing": (lambda path: os.truncate(path, 0), ("cut", 0)),
    "a cut, and other lines": (
        lambda path: path.write_bytes(NUMBERS[: LAST - 1] + b"other\n"),
        ("edited", LAST - 8),
    ),
    "all but the last lines": (
        lambda path: path.write_bytes(NUMBERS[END - 8000 : END] + TWO),
        ("trimmed", 8000),
    ),
    "another log": (lambda path: path.write_bytes(b"B" * 999), ("replaced", 0)),
}


@pytest.mark.parametrize(("happens", "change"), CHANGES.values(), ids=CHANGES)
def test_what_was_published_is_compared(
    happens: Callable[[Path], object], change: tuple[str, int] | None, tmp_path: Path
) -> None:
    log = fill(tmp_path / "log", (NUMBERS,))
    log.record_published(END)

    happens(tmp_path / "log")

    assert log.is_unchanged() == (change is None)
    assert change is None or log.change() == change


def test_what_is_new_is_read_behind_what_was_published(tmp_path: Path) -> None:
    log = fill(tmp_path / "log", (TWO,))

    log.record_published(4)
    first = log.read_new()
    log.record_appended(b"two\n")
    put(tmp_path / "log", 8, b"three\n" + bytes(2000) + b"four\n")
    second = log.read_new()
    put(tmp_path / "log", 7, b"!")

    assert (first, second, log.read_new()) == ((b"two\n", False), (b"three\n", True), None)
    assert log.fingerprint == (8, TWO, TWO) and log.end == 8
    assert (log.read_published(4, 8), log.read_published(0, 8)) == (b"two\n", None)


# what happens to a copy -> does it hold what a part of a cursor says of the first two blocks?
COPIES: dict[str, tuple[Callable[[Path], object], bool]] = {
    "nothing": (lambda path: None, True),
    "growth": (lambda path: put(path, len(NUMBERS), TWO), True),
    "a cut at its end": (lambda path: os.truncate(path, END), True),
    "a cut before it": (lambda path: os.truncate(path, END - 1), False),
    "another first byte": (lambda path: put(path, 0, b"X"), False),
    "another last byte": (lambda path: put(path, END - 1, b"X"), False),
}


@pytest.mark.parametrize(("happens", "holds"), COPIES.values(), ids=COPIES)
def test_a_part_of_a_cursor_is_checked_against_the_bytes(
    happens: Callable[[Path], object], holds: bool, tmp_path: Path
) -> None:
    part = fill(tmp_path / "log", (NUMBERS,)).cursor_part(END)
    shutil.copyfile(tmp_path / "log", tmp_path / "copy")

    happens(tmp_path / "copy")

    copy = open_log_file(str(tmp_path / "copy"))
    assert copy.validates(part) == holds
    assert not copy.validates(part.replace(str(END), str(END - 1), 1))


def test_a_part_of_a_cursor_knows_the_file_that_it_is_of(tmp_path: Path) -> None:
    log, other = (fill(tmp_path / name, (TWO,)) for name in ("log", "other"))

    assert log.cursor_part(8) != other.cursor_part(8)
    assert log.cursor_part(8) == open_log_file(str(tmp_path / "log")).cursor_part(8)
    assert log.cursor_part(8) != log.cursor_part(4)


# -- files beside it -------------------------------------------------------------------------------

PLACES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path),
    "a device": lambda path: path.symlink_to("/dev/null"),
}


@pytest.mark.parametrize("put_there", PLACES.values(), ids=PLACES)
def test_only_a_file_is_opened(put_there: Callable[[Path], object], tmp_path: Path) -> None:
    put_there(tmp_path / "log")

    with pytest.raises(OSError):
        open_log_file(str(tmp_path / "log"))


def test_a_renamed_file_is_the_same_and_a_copy_is_not(tmp_path: Path) -> None:
    log = fill(tmp_path / "log", (TWO,))
    shutil.copy2(tmp_path / "log", tmp_path / "copy")
    os.rename(tmp_path / "log", tmp_path / "log.1")

    renamed, copy = (open_log_file(str(tmp_path / name)) for name in ("log.1", "copy"))

    assert log.same_file(renamed) and not log.same_file(copy)
    assert log.status().st_ino == renamed.status().st_ino != copy.status().st_ino
    assert log.modified_s() == pytest.approx(copy.modified_s())


# names beside app.log, newest first
ORDERS = {
    "numbers": ["app.log.1", "app.log.2.gz", "app.log.10.xz"],
    "dates": ["app.log-20251218", "app.log-20251217.gz", "app.log-20251216.bz2"],
    "dates after a dot": ["app.log.2026-01-01", "app.log.2025-12-31", "app.log.2025-12-30.gz"],
    "dates with times": ["app.log-2025-12-17T10:00", "app.log-2025-12-17T09:59"],
    "dates with numbers": [
        "app.log.2025-12-17.10",
        "app.log.2025-12-17.9",
        "app.log.2025-12-16.11",
    ],
    "numbers inside": ["app.1.log", "app.2.log.gz", "app.10.log"],
    "dates inside": ["app-20251218.log", "app-20251217.log.xz"],
    "dates with numbers inside": ["app-20251217-10.log", "app-20251217-9.log"],
    "seconds since 1970": ["app.log-1766000001", "app.log-1766000000"],
    "none of them": [],
}
OTHERS = ["app.log.1.bak", "app.log1", "other.log.1", "app.log.", "app.log-x", "app.log.gz", "app"]
OTHERS += ["xapp.log.1", "app.log.1.gz.tmp", "app.log-17", "app.txt", "app.1.txt"]


@pytest.mark.parametrize("names", ORDERS.values(), ids=ORDERS)
def test_rotated_files_are_found_newest_first(names: list[str], tmp_path: Path) -> None:
    for name in ("app.log", *sorted(names), *OTHERS):
        (tmp_path / name).write_text(f"{name}\n")

    found = audit_stream.rotated_files(str(tmp_path / "app.log"))

    assert [os.path.basename(each.path) for each in found] == names
    packed = [each.path.rpartition(".")[2] for each in found if each.compressed]
    assert [each.compressed for each in found if each.compressed] == packed


# the beginnings of two logs -> have they one name?
NAMES = {
    "the same two lines": (THREE, TWO + b"four\n", True),
    "another second line": (TWO, b"one\nother\n", False),
    "another first line": (TWO, b"other\ntwo\n", False),
    "an unfinished second line": (TWO, b"one\ntw", False),
    "only one line, the same": (b"one\n", b"one\ntw", True),
    "long lines, alike in 4 KiB": (b"x" * 4 * KIB + b"a\n", b"x" * 4 * KIB + b"b\n", True),
    "none yet": (b"", b"", False),
}


@pytest.mark.parametrize(("first", "second", "same"), NAMES.values(), ids=NAMES)
def test_the_first_two_lines_are_the_name_of_a_generation(
    first: bytes, second: bytes, same: bool, tmp_path: Path
) -> None:
    logs = [fill(tmp_path / str(at), (data,)) for at, data in enumerate((first, second))]

    here, there = (GenerationNames().assign(log) for log in logs)

    assert (here == there) == same


def test_two_open_files_with_the_same_lines_have_two_names(tmp_path: Path) -> None:
    log, other = (fill(tmp_path / name, (TWO,)) for name in ("log", "other"))
    names = GenerationNames()

    assert names.assign(log) != names.assign(other)
    assert names.assign(log) == names.assign(open_log_file(str(tmp_path / "log")))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


@pytest.mark.parametrize("kind", PACKERS)
def test_a_packed_file_is_read_like_any_other(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"log.1.{kind}"
    path.write_bytes(PACKERS[kind](THREE))

    log = audit_stream.decompress(str(path), 14, threading.Event())

    assert log.read_bytes(0, 99) == THREE and log.complete_end() == 14
    assert log.validates(fill(tmp_path / "log", (THREE, TWO)).cursor_part(14))


@pytest.mark.parametrize("kind", PACKERS)
def test_what_cannot_be_unpacked_is_an_error(kind: str, tmp_path: Path) -> None:
    packed = PACKERS[kind](THREE * 999)
    path = tmp_path / f"log.1.{kind}"

    for content, most_bytes in ((packed, 99), (packed[:-9], KIB * KIB), (THREE, KIB * KIB)):
        path.write_bytes(content)
        with pytest.raises(OSError):
            audit_stream.decompress(str(path), most_bytes, threading.Event())


def test_unpacking_ends_when_nobody_waits_for_it(tmp_path: Path) -> None:
    (tmp_path / "log.1.gz").write_bytes(gzip.compress(THREE))
    cancelled = threading.Event()
    cancelled.set()

    with pytest.raises(OSError):
        audit_stream.decompress(str(tmp_path / "log.1.gz"), KIB * KIB, cancelled)
