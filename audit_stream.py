#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=17"]
# ///
"""Watch one audit log live in a browser, and trust what you see.

Map     log file --check()--> segments --next_message_at()--> viewer         sections 1 to 5
        request --respond()--> authorize() --> page, history, proof          sections 6 to 9
        main() --> run() --> follow() for all viewers                        sections 10 and 11

Idea    The file is the queue. A viewer is a Position in it. The first screen, catching up, resuming
        and passing through a rotation are the same step: read the next message from a position.
        A viewer at the end is live and gets the broadcast.

Invariants
  1  Only the last segment grows. Every other one has an end_limit and a next.
  2  Bytes before LogFile.end do not change, as far as the first and last 4 KiB of them tell. If they
     do, a new generation begins (truncated, rewritten).
  3  What this process has published is never published again, whatever it is called by now. Where
     nobody can know what lay between two files, the link between them says so (a gap).
  4  A live viewer has no position of its own (None): all of them are at Broadcaster.position.
  5  A cursor covers only bytes that were sent. It proves itself by the 4 KiB before it.
  6  One event loop. What runs in a thread gets arguments and returns values, and touches nothing else.

Glossary
  generation  one life of the log; a rename, truncation or rewrite begins the next one
  segment     a range of one generation, in the order in which it was published
  draining    a rotated file is still read: for 30 seconds, and as long as it grows
  cursor      text form of a position: OFFSET.HINTPROOF for each file still read, joined by ~
  hole        a range without data: sparse, or zero bytes that a writer reserved or a crash left
  gap         a place where lines may be missing, and the reason in words
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"audit_stream.py: Python 3.11 or newer is needed; this is {sys.version.split()[0]}")

import argparse
import asyncio
import asyncio.sslproto
import base64
import bisect
import bz2
import codecs
import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import datetime
import email.utils
import errno
import functools
import gc
import gzip
import hashlib
import hmac
import http
import ipaddress
import itertools
import json
import logging
import lzma
import math
import os
import random
import re
import secrets
import signal
import socket
import ssl
import stat
import struct
import subprocess
import tempfile
import threading
import time
import types
import urllib.parse
import warnings
import weakref
import zlib
import zoneinfo
from collections.abc import Callable, Container, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, TypeVar

try:
    import fcntl
    import resource
    import termios
except ImportError:
    sys.exit("audit_stream.py: this system has no fcntl; it takes Linux, macOS or BSD (on Windows: WSL)")

try:
    import websockets.version
    from websockets.asyncio.server import Server, ServerConnection, serve
    from websockets.datastructures import Headers
    from websockets.exceptions import ConnectionClosed
    from websockets.frames import Frame, Opcode
    from websockets.http11 import Request, Response
    from websockets.protocol import State
    from websockets.typing import Subprotocol

    if int(websockets.version.version.partition(".")[0]) < 17:
        raise ImportError
except ImportError:
    sys.exit("audit_stream.py: websockets 17 or newer is missing; type: python3 -m pip install 'websockets>=17'")

VERSION = "1.0"
KIB, MIB = 1024, 1024 * 1024
MAX_MESSAGE = 128 * KIB  # of the log in one message; as JSON at most six times as long
PROTOCOL = Subprotocol("audit.v1.json")
TEXT, HTML, JSON = "text/plain; charset=utf-8", "text/html; charset=utf-8", "application/json"

T = TypeVar("T")
logger = logging.getLogger("audit_stream")
counters: collections.Counter[str] = collections.Counter()  # what /metrics says


# ---- 1 Log files ---------------------------------------------------------------------------------
# Reads one file as bytes, remembers what was published of it, and lists the rotated ones beside it.
# Owns a descriptor each: no other section sees one.

FINGERPRINT_BYTES = 4 * KIB
HOLE_BYTES = KIB  # so many zero bytes in a row are no log
SCAN_BYTES = 256 * KIB  # of one read while looking for the end of a hole
MAX_SCANS = 64  # reads until a hole is taken to go on to the end of the file
MAX_ROTATED = 64  # rotated files that are looked at, and parts of a cursor
MAX_DECOMPRESSED = 1024 * MIB  # of all compressed files that one look, or one resumed viewer, needs


class Fingerprint(NamedTuple):
    """How far a file was published, and the first and last 4 KiB of that."""

    end: int = 0
    head: bytes = b""
    tail: bytes = b""

    def extended(self, data: bytes) -> Fingerprint:
        """Return the fingerprint after `data` was published as well."""
        head = self.head
        if len(head) < FINGERPRINT_BYTES:
            head = (head + data)[:FINGERPRINT_BYTES]
        tail = (self.tail + data)[-FINGERPRINT_BYTES:]
        return Fingerprint(self.end + len(data), head, tail)


class LogFile:
    """One generation of the log: an open file, and how far it was published."""

    def __init__(self, fd: int, end: int = 0) -> None:
        self._fd = fd
        self._recent = (0, b"")  # offset and bytes of what was published last: read once, sent to all
        self.name = ""  # of the generation; empty until somebody is told
        self.sequence = 0  # of the generations that this process published; 0 for others
        self.fingerprint = Fingerprint()
        self.last_growth_s = 0.0  # when something of it was published last
        self.unfinished = (0, 0.0)  # (first unsent byte of an unfinished line, when it was seen)
        self.identity = self._identify()
        if end:
            self.record_published(end)

    def __del__(self) -> None:
        self.release()

    def release(self) -> None:
        """Close the descriptor. From now on every read raises OSError."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def replace_descriptor(self, other: LogFile) -> None:
        """Go on in another file that holds the same bytes, for everybody who refers to this one."""
        os.dup2(other._fd, self._fd, inheritable=False)
        self.identity = other.identity

    def duplicate(self) -> LogFile:
        """Return another generation of the same file; nothing of it is published yet."""
        return LogFile(os.dup(self._fd))

    def _identify(self) -> tuple[int, int]:
        status = os.fstat(self._fd)
        return status.st_dev, status.st_ino

    # What it is

    @property
    def end(self) -> int:
        """How far the file was published."""
        return self.fingerprint.end

    @property
    def released(self) -> bool:
        return self._fd < 0

    @property
    def proc_path(self) -> str:
        """A path that leads to this very file, whatever its name is (proc(5))."""
        return f"/proc/self/fd/{self._fd}"

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def status(self) -> os.stat_result:
        return os.fstat(self._fd)

    def modified_s(self) -> float:
        """Return the time of the last change, in seconds since 1970."""
        return os.fstat(self._fd).st_mtime

    def is_deleted(self) -> bool:
        return os.fstat(self._fd).st_nlink == 0

    def same_file(self, other: LogFile) -> bool:
        return self.identity == other.identity

    # Reading

    def open(self) -> IO[bytes]:
        """Return a file object for reading it from the start, once."""
        return open(os.dup(self._fd), "rb")

    def read_bytes(self, start: int, end: int) -> bytes:
        """Return the bytes from start to end; fewer only at the end of the file."""
        data = os.pread(self._fd, max(0, end - start), start)
        while data and start + len(data) < end:  # files of a network or of FUSE may read short
            more = os.pread(self._fd, end - start - len(data), start + len(data))
            if not more:
                break
            data += more
        return data

    def read_data(self, start: int, end: int) -> bytes:
        """Return the bytes from start to end, or to the next hole and the zero bytes beside it."""
        data = self.read_bytes(start, end)
        return self._before_hole(data, start) if b"\0" in data else data

    def _before_hole(self, data: bytes, start: int) -> bytes:
        reserved = data.find(bytes(HOLE_BYTES))
        sparse = os.lseek(self._fd, start, os.SEEK_HOLE) - start
        hole = sparse if reserved < 0 else min(sparse, reserved)
        return data[:hole].rstrip(b"\0") if hole < len(data) else data

    def read_new(self) -> tuple[bytes, bool] | None:
        """Return what follows the published bytes: at most a message, and whether a hole ends it.

        None if the last published bytes have changed: they are read, and compared, in the same call.
        """
        end, _, tail = self.fingerprint
        data = os.pread(self._fd, len(tail) + MAX_MESSAGE, end - len(tail))
        if len(data) < len(tail):
            data = self.read_bytes(end - len(tail), end + MAX_MESSAGE)
        if not data.startswith(tail):
            return None

        data = data[len(tail) :]
        if b"\0" not in data:
            return data, False
        kept = self._before_hole(data, end)
        return kept, len(kept) < len(data)

    def read_published(self, start: int, end: int) -> bytes | None:
        """Return published bytes that are still in memory, else None."""
        offset, data = self._recent
        if offset <= start and end <= offset + len(data):
            return data[start - offset : end - offset]
        return None

    def next_data(self, start: int) -> int | None:
        """Return where data goes on at or after start; None if only a hole follows.

        Sparse ranges are passed by lseek(2), SEEK_DATA; zero bytes that were written are read.
        """
        offset = start
        with contextlib.suppress(OSError):  # ENXIO: nothing there yet
            for _ in range(MAX_SCANS):
                offset = os.lseek(self._fd, offset, os.SEEK_DATA)
                block = self.read_bytes(offset, offset + SCAN_BYTES)
                if data := block.lstrip(b"\0"):
                    return offset + len(block) - len(data)
                offset += len(block)
        return None

    def data_end(self) -> int:
        """Return the end of the file without the holes and zero bytes that end it."""
        size = self.size
        if self.read_bytes(max(0, size - 1), size) != b"\0":
            return size

        for start, end in reversed(self._extents()):
            while end > start:
                low = max(start, end - SCAN_BYTES)
                if data := self.read_bytes(low, end).rstrip(b"\0"):
                    return low + len(data)
                end = low
        return 0

    def _extents(self) -> list[tuple[int, int]]:
        """Return the ranges that are not sparse."""
        extents, offset = [], 0
        with contextlib.suppress(OSError):  # ENXIO: no more of them
            while True:
                start = os.lseek(self._fd, offset, os.SEEK_DATA)
                offset = os.lseek(self._fd, start, os.SEEK_HOLE)
                extents.append((start, offset))
        return extents

    def complete_end(self) -> int:
        """Return the end of the last complete line, or of the file within a very long line."""
        end = self.data_end()
        low = max(0, end - MAX_MESSAGE)
        data = self.read_bytes(low, end)
        complete = data.rfind(b"\n") + 1
        if not complete and low:
            complete = whole_characters(data)
        return low + complete

    def line_start(self, end: int, most: int) -> int:
        """Return where the last lines before end begin, at most so many bytes before it.

        Of a longer last line, it is where a character begins.
        """
        low = max(0, end - most)
        while low + len(self.read_data(low, end)) < end:
            low = self.next_data(low + len(self.read_data(low, end))) or end
        if low == 0 or low == end or self.read_bytes(low - 1, low) in (b"\n", b"\0"):
            return low

        data = self.read_bytes(low, end)
        line = data.find(b"\n") + 1
        if 0 < line < len(data):
            return low + line
        return low + character_start(data)

    # What was published

    def starts_with(self, published: Fingerprint) -> bool:
        """Return True if the file begins with these bytes, as far as their first and last 4 KiB tell."""
        end, head, tail = published
        if self.read_bytes(end - len(tail), end) != tail:
            return False
        return self.read_bytes(0, len(head)) == head

    def is_unchanged(self) -> bool:
        return self.starts_with(self.fingerprint)

    def fingerprint_at(self, end: int) -> Fingerprint:
        edge = min(FINGERPRINT_BYTES, end)
        return Fingerprint(end, self.read_bytes(0, edge), self.read_bytes(end - edge, end))

    def record_published(self, end: int) -> None:
        """Note that everything before end is published."""
        fingerprint = self.fingerprint_at(end)
        if len(fingerprint.tail) == min(FINGERPRINT_BYTES, end):  # else it is being cut: wait
            self.fingerprint = fingerprint
            self._recent = (0, b"")

    def record_appended(self, data: bytes) -> None:
        """Note that `data`, which was just read, is published as well."""
        self._recent = self.end, data
        self.fingerprint = self.fingerprint.extended(data)

    def was_compressed_to(self, other: LogFile) -> bool:
        """Return True if this file was deleted and `other` holds all of its bytes."""
        size = self.size
        if not self.is_deleted() or other.size != size:
            return False
        return other.starts_with(self.fingerprint_at(size))

    def change(self) -> tuple[str, int]:
        """Return how a file that is no longer unchanged was changed, and where the stream goes on.

        "cut": at the end of the file; "edited": at the start of the line in which the first byte
        lies that is no longer what was published; "trimmed": after the last published lines, with
        which the file begins now; "replaced": at 0.
        """
        end, head, tail = self.fingerprint
        size, start = self.size, 0
        if end == len(tail) or self.read_bytes(0, len(head)) == head[:size]:
            low = end - len(tail)
            now = self.read_bytes(low, end)
            changed = low + len(os.path.commonprefix([now, tail]))
            if changed >= size:
                return "cut", size
            start = self._start_of_line_at(changed)

        if start:
            return "edited", start
        kept = self._kept_lines_end()
        return ("trimmed", kept) if kept else ("replaced", 0)

    def _start_of_line_at(self, offset: int) -> int:
        low = max(0, offset - MIB)
        before = self.read_bytes(low, offset)
        line = before.rfind(b"\n") + 1
        if line or not low:
            return low + line
        return low + whole_characters(before)

    def _kept_lines_end(self) -> int:
        """Return the end of the last published lines if the file begins with them, else 0."""
        _, _, tail = self.fingerprint
        if len(tail) == FINGERPRINT_BYTES:
            found = self.read_bytes(0, min(self.end - 1, MAX_KEPT)).find(tail)
            if found >= 0:
                return found + len(tail)

        start = self.read_bytes(0, len(tail))
        line = tail.find(b"\n") + 1
        while 0 < line < len(tail):
            if start.startswith(tail[line:]):
                return len(tail) - line
            line = (tail.find(b"\n", line) + 1) or len(tail)
        return 0

    # Cursors

    def cursor_part(self, offset: int, hint: str = "") -> str:
        """Return OFFSET.HINTPROOF: the inode as a hint, and 12 bytes that prove it and the log."""
        if not hint:
            hint = short_hash(b"%d:%d" % self.identity)[:4]
        published = self.fingerprint
        if offset != published.end:
            published = self.fingerprint_at(offset)
        return f"{offset}.{hint}{short_hash(published.head + published.tail + hint.encode())}"

    def validates(self, part: str) -> bool:
        """Return True if the bytes are those of the cursor, whichever inode they are in."""
        offset, _, proof = part.partition(".")
        if int(offset) > self.size:
            return False
        return self.cursor_part(int(offset), proof[:4]) == part


MAX_KEPT = 16 * MIB  # of a log that was trimmed to its last lines


def short_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()[:12]).decode()


def whole_characters(data: bytes) -> int:
    """Return how many bytes there are before a UTF-8 character that is not complete yet."""
    end = data[-4:]
    return len(data) - len(end) + codecs.utf_8_decode(end, "replace", False)[1]


def character_start(data: bytes) -> int:
    """Return how many bytes at the beginning belong to a character that began before."""
    return next((n for n, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)


def open_log_file(path: str) -> LogFile:
    """Open the regular file at path, without waiting for a FIFO. Raises OSError for anything else."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "not a regular file but a directory", path)
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", path)
    return LogFile(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY))


class GenerationNames:
    """The names of generations: derived from the bytes, and unique within this process."""

    def __init__(self) -> None:
        self._open: weakref.WeakValueDictionary[str, LogFile] = weakref.WeakValueDictionary()
        self._known: dict[str, Fingerprint] = {}  # 8 KiB for each of the last 256

    def assign(self, file: LogFile) -> str:
        """Return the name of a generation; choose it at the first call.

        It is a hash of the first two complete lines (at most 4 KiB of them), of the first one if
        there is no second; random while there is none.
        """
        if not file.name:
            base = self._base(file.read_bytes(0, FINGERPRINT_BYTES))
            names = itertools.chain([base], (f"{base}-{n}" for n in itertools.count(2)))
            file.name = next(name for name in names if self._may_take(file, name))
            self._open[file.name] = file
        self._remember(file)
        return file.name

    def same_inode(self, file: LogFile) -> list[LogFile]:
        """Return all named generations that are read from the same file."""
        return [other for other in self._open.values() if other.same_file(file)]

    @staticmethod
    def _base(start: bytes) -> str:
        first = start.find(b"\n") + 1
        second = start.find(b"\n", first) + 1 if first else 0
        if len(start) == FINGERPRINT_BYTES and not second:
            second = len(start)
        lines = start[: second or first] or os.urandom(16)
        return hashlib.sha256(lines).hexdigest()[:16]

    def _may_take(self, file: LogFile, name: str) -> bool:
        """Return True unless another generation owns this name."""
        other = self._open.get(name)
        if other and not other.released and not other.is_deleted() and not other.same_file(file):
            return False
        return name not in self._known or file.starts_with(self._known[name])

    def _remember(self, file: LogFile) -> None:
        known = self._known.pop(file.name, Fingerprint())
        longer = max(known, file.fingerprint, key=lambda fingerprint: fingerprint.end)
        self._known[file.name] = longer  # a shorter file must not hide the longer one
        if len(self._known) > 256:
            del self._known[next(iter(self._known))]


# -- rotated files --

COMPRESSED: dict[str, Callable[..., Any]] = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}
DATE = r"(?:(?:19|20|21)\d\d[-_.:T\d]*\d|\d{9,11})"
TIME_SLACK_S = 2.0  # a compressed file bears a time shortly before its last line


class RotatedName(NamedTuple):
    """A rotated file beside the log, as its name says it."""

    path: str
    kind: str  # "number" or "date", and where it stands: only names of one kind can be compared
    rank: tuple[int, ...]  # within a kind, larger is newer
    compressed: str  # "", "gz", "bz2" or "xz"
    identity: tuple[int, int]
    size: int
    modified_s: float
    changed_s: float  # of the inode: a rename counts


def rotated_files(path: str) -> list[RotatedName]:
    """Return the rotated files beside the log, newest first: NAME.1, NAME-20251217, STEM.1.EXT …"""
    found: dict[str, tuple[str, tuple[int, ...], str]] = {}
    for log in dict.fromkeys((path, real_path(path))):
        folder, name = os.path.split(log)
        with contextlib.suppress(OSError), os.scandir(folder or ".") as entries:
            for entry in entries:
                if parsed := parse_rotated_name(name, entry.name):
                    found.setdefault(entry.path, parsed)

    # A compressed file beside the plain one is not complete yet.
    names = [name for name in found if not (found[name][2] and os.path.splitext(name)[0] in found)]
    names.sort(key=lambda name: found[name][1], reverse=True)
    return newest_first(path, [(name, *found[name]) for name in names])


def newest_first(
    path: str, names: list[tuple[str, str, tuple[int, ...], str]]
) -> list[RotatedName]:
    """Return the newest 64 of each kind, once each, the kind that was written last first."""
    kinds: dict[str, list[RotatedName]] = {}
    seen = {file_identity(path)}
    for name, kind, rank, compressed in names:
        files = kinds.setdefault(kind, [])
        if len(files) >= MAX_ROTATED:
            continue
        with contextlib.suppress(OSError):
            status = os.stat(name)
            identity = (status.st_dev, status.st_ino)
            if identity not in seen and stat.S_ISREG(status.st_mode):
                seen.add(identity)
                times = status.st_mtime, status.st_ctime
                files.append(
                    RotatedName(name, kind, rank, compressed, identity, status.st_size, *times)
                )

    newest = sorted(kinds.values(), key=lambda files: -max((f.modified_s for f in files), default=0))
    return list(itertools.chain(*newest))[:MAX_ROTATED]


@functools.lru_cache(1 << 16)
def parse_rotated_name(log: str, name: str) -> tuple[str, tuple[int, ...], str] | None:
    """Return kind, rank and compression of a rotated file's name; None for any other name."""
    stem, extension = os.path.splitext(log)
    compressed = ""
    base, last = os.path.splitext(name)
    if last[1:] in COMPRESSED:
        name, compressed = base, last[1:]

    if name.startswith(log) and (match := re.fullmatch(r"\.(\d{1,6})", name[len(log) :])):
        return "number", (-int(match[1]),), compressed
    if name.startswith(log) and (match := re.fullmatch(f"[-.]({DATE})", name[len(log) :])):
        return "date", date_rank(match[1]), compressed

    inside = name[len(stem) : len(name) - len(extension)]
    if not extension or not name.startswith(stem) or not name.endswith(extension):
        return None
    if match := re.fullmatch(r"\.(\d{1,6})", inside):
        return "number inside", (-int(match[1]),), compressed
    if match := re.fullmatch(f"[-.]({DATE}(?:-\\d+)?)", inside):
        return "date inside", date_rank(match[1]), compressed
    return None


COMPACT_DATE = r"(?:19|20|21)\d\d(?:0[1-9]|1[0-2])(?:[0-2]\d|3[01])(?:\d\d){0,3}"


def date_rank(text: str) -> tuple[int, ...]:
    """Return a date, and the number after it, as numbers: 2025-12-17.9 is (2025, 12, 17, 9)."""
    if text.isdecimal() and not re.fullmatch(COMPACT_DATE, text):
        return tuple(time.gmtime(int(text))[:6])

    numbers, rest = [int(text[:4])], text[4:]
    for group in re.findall(r"\d+", rest):
        compact = rest[0].isdecimal() if len(numbers) == 1 else len(numbers) == 3
        if compact and len(group) in (4, 6, 8, 10):
            numbers += [int(group[at : at + 2]) for at in range(0, len(group), 2)]
        else:
            numbers.append(int(group))
    return tuple(numbers)


def real_path(path: str) -> str:
    """Return the path without symbolic links; as it is if one of them is just being replaced."""
    try:
        return os.path.realpath(path)
    except OSError:
        return path


def file_identity(path: str) -> tuple[int, int]:
    """Return device and inode; (0, 0) if there is no such file."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_dev, status.st_ino
    return 0, 0


def compression_of(path: str) -> str:
    extension = os.path.splitext(path)[1][1:]
    return extension if extension in COMPRESSED else ""


def decompress(path: str, most_bytes: int, cancelled: threading.Event) -> LogFile:
    """Return the content of a compressed file, in a temporary file without a name.

    Raises OSError if it is damaged, larger than most_bytes or half of what the disk has left, or if
    the caller has gone.
    """
    source = open_log_file(path)
    with tempfile.TemporaryFile(dir=spacious_folder()) as copy, source.open() as file:
        disk = os.fstatvfs(copy.fileno())
        most_bytes = min(most_bytes, disk.f_bavail * disk.f_frsize // 2)
        try:
            with COMPRESSED[compression_of(path)](file) as stream:
                while data := stream.read(MIB):
                    if copy.tell() + len(data) > most_bytes or cancelled.is_set():
                        raise OSError(errno.EFBIG, "is too large to decompress", path)
                    copy.write(data)
        except (EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
            raise OSError(errno.EINVAL, "is damaged", path) from error
        copy.flush()
        return LogFile(os.dup(copy.fileno()))


def first_bytes(path: str, count: int) -> bytes:
    """Return the beginning of a rotated file, compressed or not. Raises OSError."""
    file = open_log_file(path)
    if not compression_of(path):
        return file.read_bytes(0, count)
    try:
        with file.open() as raw, COMPRESSED[compression_of(path)](raw) as stream:
            return bytes(stream.read(count))
    except (EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise OSError(errno.EINVAL, "is damaged", path) from error


def spacious_folder() -> str | None:
    """Return a folder for large temporary files: /tmp may lie in memory, /var/tmp does not."""
    if "TMPDIR" in os.environ or not os.access("/var/tmp", os.W_OK):
        return None  # as tempfile chooses
    return "/var/tmp"


async def run_in_thread(work: Callable[..., T], *arguments: Any) -> T:
    """Run `work` in a thread. Its last argument is an Event that is set when the caller has gone."""
    cancelled = threading.Event()
    try:
        return await asyncio.to_thread(work, *arguments, cancelled)
    finally:
        cancelled.set()


# ---- 2 The stream --------------------------------------------------------------------------------
# Tells what comes next from any position, and what that looks like on the wire. Owns the linked list
# of segments; only link_to() and link_segments() change it.
#
#   [ app.log, 0 to 900 ] --rotated--> [ app.log, 0 to 400 ] --------> [ old file, 900 to 950 ] --+
#                                        late lines of the old file:   a segment without an event |
#                                      [ app.log, 400 to … ] <--------- the tail: it still grows -+

EMPTY_CURSOR = "0.nothing-was-sent-yet"  # before the first byte of the first file


class Segment:
    """A range of one generation. The last one of the list grows with its generation."""

    def __init__(self, file: LogFile, older: Iterable[str] = (), newer: Iterable[str] = ()) -> None:
        self.file = file
        self.older_parts = tuple(older)  # of a cursor: how far the other files still read were sent
        self.newer_parts = tuple(newer)
        self.start_cursor = EMPTY_CURSOR  # at offset 0, with no bytes to prove: the end before it
        self.end_limit: int | None = None  # None: it grows
        self.next: Link | None = None

    @property
    def end(self) -> int:
        if self.end_limit is None:
            return self.file.end
        return min(self.end_limit, self.file.end)

    def cursor(self, offset: int) -> str:
        if not offset:
            return self.start_cursor
        return "~".join((*self.older_parts, self.file.cursor_part(offset), *self.newer_parts))

    def link_to(self, following: Segment, offset: int, event: str = "", gap: str = "") -> Segment:
        """Close this segment, and go on at that offset of the next one. Return the next one."""
        self.end_limit = self.end
        following.start_cursor = self.cursor(self.end_limit)
        self.next = Link(following, offset, event, gap)
        return following


class Link(NamedTuple):
    """The way to the next segment. An event is the reason why another generation begins there."""

    segment: Segment
    offset: int
    event: str  # "rotated", "truncated", "rewritten"; "" within a generation
    gap: str  # why lines may be missing here, "" if none can be


class Position(NamedTuple):
    """How far a viewer has been served."""

    segment: Segment
    offset: int

    @property
    def cursor(self) -> str:
        return self.segment.cursor(self.offset)


class Message:
    """What one step brings: bytes of the log, a hole, or the beginning of another generation."""

    def __init__(
        self, kind: str, reason: str, start: int, next_position: Position, data: bytes = b""
    ) -> None:
        self.kind, self.reason, self.start = kind, reason, start
        self.next_position, self.data = next_position, data
        self.gap = ""

    @property
    def file(self) -> LogFile:
        return self.next_position.segment.file

    @functools.cached_property
    def text(self) -> str:
        return self.data.decode(errors="replace")

    @functools.cached_property
    def plain(self) -> bytes:
        return self.text.encode()

    @functools.cached_property
    def json(self) -> bytes:
        return stream_message(self)


def normalize(position: Position) -> Position:
    """Return the same place at the start of the next segment if one is at the end of its own."""
    segment, offset = position
    while offset >= segment.end and segment.next and not segment.next.event:
        segment, offset = segment.next[:2]
    return Position(segment, offset)


def next_message_at(position: Position) -> Message | None:
    """Return the next message from a position.

    None at the end of the stream, and where the follower has to look first: the bytes there are no
    longer what was published. Raises OSError.
    """
    segment, offset = normalize(position)
    file, end = segment.file, segment.end
    if offset >= end:
        return following_generation(segment)

    wanted = min(end, offset + MAX_MESSAGE)
    data = file.read_published(offset, wanted)
    if data is None and not file.released:
        data = file.read_data(offset, wanted)
        if not file.is_unchanged():
            if last_file(segment) is file:
                return None
            data = None  # a rotated file that changed can no longer be trusted: skip the rest of it
    if not data:
        return hole_message(segment, offset, readable=data is not None)

    if len(data) == MAX_MESSAGE and offset + MAX_MESSAGE < end:
        data = data[: data.rfind(b"\n") + 1 or whole_characters(data)]
    return Message("append", "", offset, Position(segment, offset + len(data)), data)


def last_file(segment: Segment) -> LogFile:
    """Return the file at the end of the stream: the follower looks after it."""
    while segment.next:
        segment = segment.next.segment
    return segment.file


def following_generation(segment: Segment) -> Message | None:
    if segment.next is None:
        return None
    message = Message("generation", segment.next.event, segment.next.offset, Position(*segment.next[:2]))
    message.gap = segment.next.gap
    return message


def hole_message(segment: Segment, offset: int, readable: bool) -> Message:
    end = segment.end
    if readable:
        end = min(end, segment.file.next_data(offset) or end)
    return Message("skip", "hole", offset, Position(segment, end))


# -- wire messages: the subprotocol audit.v1.json --


def stream_message(message: Message) -> bytes:
    fields: dict[str, Any] = {
        "type": message.kind,
        "start": message.start,
        "cursor": message.next_position.cursor,
    }
    if message.kind == "append":
        fields |= {"end": message.next_position.offset, "generation": message.file.name}
        fields["text"] = message.text
    elif message.kind == "skip":
        fields |= {"end": message.next_position.offset, "reason": message.reason}
    else:
        fields |= {"reason": message.reason, "generation": message.file.name}
        fields["gap"] = message.gap or None
    return wire_text(fields)


def snapshot_message(
    log: str, start: int, position: Position, text: str, resumed: bool, reason: str | None
) -> bytes:
    file = position.segment.file
    fields = {
        "type": "snapshot",
        "log": log,
        "generation": file.name,
        "resumed": resumed,
        "reason": reason,
        "start": start,
        "end": position.offset,
        "cursor": position.cursor,
        "size": max(file.size, position.offset),
        "text": text,
    }
    return wire_text(fields)


def state_message(state: LogState) -> bytes:
    return wire_text({"type": "state", "state": state.state, "detail": state.detail})


def checked_message(size: int, end: int, unfinished: int) -> bytes:
    return wire_text({"type": "checked", "size": size, "end": end, "unfinished": unfinished})


def wire_text(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode()


# -- the text of a cursor --


def parse_cursor(cursor: str) -> list[str] | None:
    """Return its parts, the oldest file first; [] if nothing was sent yet, None for nonsense."""
    if cursor == EMPTY_CURSOR:
        return []
    part = r"[1-9]\d{0,17}\.[\w-]{20}"
    parts = re.fullmatch(f"{part}(?:~{part}){{0,63}}", cursor, re.ASCII)
    return cursor.split("~") if parts else None


def offset_of(part: str) -> int:
    return int(part.partition(".")[0])


def match_parts(parts: list[str], files: list[LogFile]) -> dict[str, LogFile]:
    """Return which file proves which part of a cursor.

    Of several that do it is the one with the right inode, else the first: files come newest first.
    """
    owners: dict[str, LogFile] = {}
    for part in reversed(parts):
        free = [file for file in files if file not in owners.values()]
        proving = [file for file in free if file.validates(part)]
        right = [file for file in proving if file.cursor_part(offset_of(part)) == part]
        if proving:
            owners[part] = (right or proving)[0]
    return owners


# ---- 3 The follower ------------------------------------------------------------------------------
# Reads what was appended, and decides what else happened: rotated, truncated, rewritten, missing.
# Owns everything that is read: the current file, the draining ones, the tail, the log's state.
#
#   the open file        the path                  beside it                    then
#   -------------------  ------------------------  ---------------------------  -----------------------
#   changed, now empty   any                       any                          wait up to GRACE_S
#   changed              any                       a copy of what was read      truncated: the copies,
#                                                                               then our file from 0
#   changed: shorter     any                       no copy                      truncated: go on where
#                                                                               it is no longer the same
#   changed otherwise    any                       no copy                      rewritten: likewise
#   unchanged            our file                  –                            nothing: state ok
#   unchanged            missing, or no file       –                            missing or unreadable
#                                                                               after GRACE_S
#   none yet             a file                    what was the log before it   adopt the first of them
#   unchanged, deleted   begins with all we read   –                            the same log
#   unchanged            an empty file             –                            wait up to GRACE_S
#   unchanged            another file              what was the log between     rotated, once for each;
#                                                                               drain the old one

COALESCE_S = 0.02  # between two checks: bursts are put together
DRAIN_S = 30.0  # for so long after its last growth a rotated file is still read
MAX_DRAINING = 60  # such files at a time: a cursor names 64
GRACE_S = 1.0  # before a missing or emptied log is reported: a rotation is faster
HELD_S = 60.0  # for so long a deleted file is kept for viewers that lag
STALL_S = 0.75  # a wait that took so much too long: the process stood still
WAIT_SLICE_S = 1.0
WATCHDOG_S = int(os.environ.get("WATCHDOG_USEC", 86_400_000_000)) / 2e6  # sd_watchdog_enabled(3)


class LogState(NamedTuple):
    """What viewers are told about the log itself."""

    state: str  # "ok", "missing", "unreadable"
    detail: str  # why; with "ok", something unusual


async def follow(follower: LogFollower, broadcaster: Broadcaster) -> None:
    """Check the size, read what is new once, broadcast it: one loop for all viewers."""
    while True:
        while await follower.check():
            broadcaster.publish()
            await asyncio.sleep(0)
        broadcaster.publish()
        sd_notify("WATCHDOG=1")  # after a completed check only

        await asyncio.sleep(COALESCE_S)
        await follower.wait()


class Successor(NamedTuple):
    """A file that was the log after another one, and why lines may be missing between them."""

    file: LogFile
    reason: str
    gap: str


class LogFollower:
    """The one reader of the log for all viewers."""

    def __init__(self, path: str, interval_s: float) -> None:
        self.path, self.interval_s = path, interval_s
        self.current = LogFile(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))  # until there is a log
        self.tail = Segment(self.current)
        self.draining: dict[LogFile, float] = {}  # rotated files, and until when they are read
        self.state = LogState("missing", "No such file or directory")
        self.size = 0  # of the log as it was last seen, without reserved space
        self.unfinished_bytes = 0  # of a line at the end that is not due
        self.names = GenerationNames()

        self._found = False
        self._pending: collections.deque[Successor] = collections.deque()
        self._published = PublishedFiles()
        self._watcher = DirectoryWatcher()
        self._arrivals = Arrivals()
        self._anomaly_since_s = 0.0  # something else than our file is at the path; 0: nothing is
        self._next_open_s = 0.0  # when the path is opened afresh, whatever its inode says
        self._encoding = EncodingCheck()
        self._check_lock = asyncio.Lock()
        self.next_check = asyncio.Event()
        self._watch()
        self._open()
        self._arrivals = Arrivals()  # the folders are watched from before the log was opened

    @property
    def name(self) -> str:
        return os.fsencode(os.path.basename(self.path)).decode(errors="replace")

    def _open(self) -> None:
        """Begin at the end of the log, and with what is still written to rotated files."""
        with contextlib.suppress(OSError):
            file = open_log_file(self.path)
            self.current.replace_descriptor(file)
            self.current.record_published(file.complete_end())
            self.current.sequence, self.current.last_growth_s = 1, time.monotonic()
            self._found, self.state = True, LogState("ok", "")
            self._watcher.watch_file(self.current)

        rotated = rotated_files(self.path)
        self._published.add_present(rotated)
        self._drain_changed(rotated)
        self.tail = self._segment(self.current)
        if not self.current.end:
            self.tail.start_cursor = self._end_of_newest(rotated)

    def _drain_changed(self, rotated: list[RotatedName]) -> None:
        """Read on in the rotated files that changed lately, the oldest first."""
        for name in reversed(rotated):
            changed_s = max(name.modified_s, name.changed_s)
            if name.compressed or time.time() - changed_s >= DRAIN_S:
                continue
            with contextlib.suppress(OSError):
                file = open_log_file(name.path)
                file.record_published(file.data_end())
                self._drain(file)

    def _end_of_newest(self, rotated: list[RotatedName]) -> str:
        """Return the cursor for the end of the newest rotated file that is not empty."""
        for name in rotated:
            with contextlib.suppress(OSError):
                file = next((f for f in self.draining if f.identity == name.identity), None)
                if file is None:
                    file = open_rotated(name.path, MAX_DECOMPRESSED, threading.Event())
                if end := file.data_end():
                    return file.cursor_part(end)
        return EMPTY_CURSOR

    def _segment(self, file: LogFile) -> Segment:
        """Return a new segment of one of the files that are read."""
        files = [*self.draining, self.current]
        parts = [other.cursor_part(other.end) if other.end else "" for other in files]
        place = files.index(file)
        return Segment(file, filter(None, parts[:place]), filter(None, parts[place + 1 :]))

    # Waiting

    def _watch(self) -> None:
        folders = {os.path.dirname(path) or "." for path in log_paths(self.path)}
        if not self._watcher.watch_folders(folders):
            self._arrivals.reliable = False

    async def wait(self) -> None:
        """Wait for an event, or until the next check is due."""
        timeout_s = min(self.interval_s, WATCHDOG_S)
        if self._anomaly_since_s and self.state.state == "ok":
            timeout_s = min(timeout_s, GRACE_S)
        if self.unfinished_bytes:
            due_s = self.current.unfinished[1] + self.interval_s - time.monotonic()
            timeout_s = min(timeout_s, max(due_s, COALESCE_S))
        await self._watcher.wait(max(0.0, timeout_s - COALESCE_S), log_paths(self.path))

    # Checking

    async def check(self) -> bool:
        """Read at most a message of what is new, or see what else happened.

        Return True if there may be more.
        """
        async with self._check_lock:
            try:
                if self.publish_new_bytes(self.current):
                    return True  # broadcast first, look around afterwards
                if self._drain_rotated():
                    return True
                return await self._look_around()
            except OSError as error:
                self._report_problem("unreadable", error.strerror or "cannot be read")
                return False
            finally:
                self.next_check.set()
                self.next_check = asyncio.Event()

    def publish_new_bytes(self, file: LogFile, final: bool = False) -> bool:
        """Publish the complete lines, and an unfinished one if it has waited long enough.

        Return True if anything was published.
        """
        new = file.read_new()
        if new is None:
            return False  # it was cut or rewritten
        data, before_hole = new
        complete = data.rfind(b"\n") + 1
        if not complete and len(data) == MAX_MESSAGE:
            complete = whole_characters(data)  # a very long line comes in pieces

        hole_end = file.next_data(file.end + len(data)) if before_hole else None
        rest = data[complete:].rstrip(b"\0") if len(data) < MAX_MESSAGE else b""
        if rest and (final or hole_end):
            complete, rest = complete + len(rest), b""
        elif rest and self._is_due(file, file.end + complete):
            complete += whole_characters(rest)
            rest = b""

        if complete:
            file.record_appended(data[:complete])
            file.last_growth_s = time.monotonic()
            counters["read_bytes_total"] += complete
            counters["read_lines_total"] += data.count(b"\n", 0, complete)
        if hole_end:
            file.record_published(hole_end)
        if file is self.current:
            self.unfinished_bytes = len(rest)
            self.size = file.end + len(rest)
        return complete > 0 or hole_end is not None

    def _is_due(self, file: LogFile, offset: int) -> bool:
        """Return True if the first unsent byte, at that offset, has waited for an interval."""
        now_s = time.monotonic()
        if file.unfinished[0] != offset or not file.unfinished[1]:
            file.unfinished = offset, now_s
        return now_s - file.unfinished[1] >= self.interval_s

    def _drain_rotated(self) -> bool:
        """Publish what is still written to rotated files: a segment of an older generation each."""
        more = False
        for file, until_s in list(self.draining.items()):
            start, over = file.end, time.monotonic() > until_s
            self.publish_new_bytes(file, final=over)
            grew = file.end > start
            if grew:
                more = True
                self.draining[file] = max(until_s, time.monotonic() + DRAIN_S)
                self.tail = self.tail.link_to(self._segment(file), start)
            elif over:
                self._stop_draining(file)
            if grew or over:
                self.tail = self.tail.link_to(self._segment(self.current), self.current.end)
        return more

    def _drain(self, file: LogFile) -> None:
        file.last_growth_s = 0.0  # from now on it is the growth of a rotated file
        self.draining[file] = time.monotonic() + DRAIN_S
        self._watcher.watch_file(file)
        if len(self.draining) > MAX_DRAINING:
            self.draining[next(iter(self.draining))] = 0.0

    def _stop_draining(self, file: LogFile) -> None:
        del self.draining[file]
        self._watcher.forget_file(file)

    # Looking around: is the log still the file that is open?

    async def _look_around(self) -> bool:
        """Return True if something happened, and there may be more to read."""
        if self._pending:
            self._switch_to(self._pending.popleft())
            return True
        self._watch()
        self._arrivals.apply(self._watcher.take_events(), log_paths(self.path))
        self._published.release_old(self.draining)
        if not self.current.is_unchanged():
            return await self._handle_rewrite()
        if not self.current.end and self._found and await self._find_unseen():
            return True

        try:
            new = self._other_file()
        except OSError as error:
            gone = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._published.release_deleted()
            self._report_problem("missing" if gone else "unreadable", problem_of(error))
            return False
        if new:
            return await self._handle_other_file(new)

        chain, gap = await self._open_successors(self._arrivals.visits(), "")
        if chain:  # our file is back after others
            self._enqueue([*chain, Successor(self.current, "rotated", gap)])
            self._arrivals = Arrivals()
            return True
        self._watcher.stalled = False
        self._arrivals.forget_visits()
        self._report_ok()
        return False

    def _other_file(self) -> LogFile | None:
        """Return the file at the path if it is not the one that is open. Raises OSError.

        At each interval it is opened afresh: some file systems (FUSE, sshfs) tell by the path, not
        by the descriptor, so that a rotated file still seems to be the log.
        """
        now_s = time.monotonic()
        status = os.stat(self.path)
        same = self._found and (status.st_dev, status.st_ino) == self.current.identity
        if same and now_s < self._next_open_s:
            return None

        self._next_open_s = now_s + self.interval_s
        new = open_log_file(self.path)
        same = self._found and new.same_file(self.current)
        if same and (new.starts_with(self.current.fingerprint) or not self.current.is_unchanged()):
            return None
        return next((file for file in self.draining if file.same_file(new)), new)

    async def _handle_other_file(self, new: LogFile) -> bool:
        """Go on in the file that is at the path now, after those that were there in between."""
        old = self.current
        if self._found and old.is_deleted() and (old.end or not old.size):
            if new.starts_with(old.fingerprint):
                self._adopt(new)
                return True
        if self._found and not new.size and self._in_grace_period():
            return False

        chain, gap = await self._files_between(new)
        if self._arrivals.apply(self._watcher.take_events(), log_paths(self.path)):
            return True  # renamed while they were opened: look again
        successors = [*chain, Successor(new, "rotated", gap)]
        if not self._found:
            self._adopt(successors.pop(0).file)
        self._enqueue(successors)
        self._arrivals = Arrivals()
        return True

    def _adopt(self, file: LogFile) -> None:
        """Go on in another file as the same generation."""
        self._watcher.forget_file(self.current)
        self.current.replace_descriptor(file)
        self._watcher.watch_file(self.current)
        self._arrivals = Arrivals()
        self._found = True
        self._report_ok()

    def _enqueue(self, successors: list[Successor]) -> None:
        """Read on in these files, one after the other, once the open one is read to its end."""
        for successor in successors:
            if not successor.file.end and (end := self._published.published_end(successor.file)):
                successor.file.record_published(end)
        self._pending.extend(successors)
        self._arrivals.created.clear()
        self._watcher.stalled = False
        self._report_ok()

    def _switch_to(self, successor: Successor) -> None:
        """Make the next file the log; the open one is read to its end and then drained."""
        old, new = self.current, successor.file
        self.publish_new_bytes(old, final=True)
        self._published.add(old)
        if not new.same_file(old):
            self._drain(old)
        self.draining.pop(new, None)

        self.current = new
        self._begin_generation(new.end, successor.reason, successor.gap)

    # Rotations: which files were the log in between?

    async def _files_between(self, new: LogFile) -> tuple[list[Successor], str]:
        """Return the files that were the log between the open one and `new`, and a last gap."""
        if self._arrivals.can_tell():
            return await self._open_successors(self._arrivals.visits(), "")

        rotated = [name for name in rotated_files(self.path) if name.identity != new.identity]
        unseen = [name for name in rotated if self._is_unseen(name)]
        if not self._found:
            names, gap = successors_of(None, unseen)
        elif ours := await self._find_own(rotated):
            names, gap = successors_of(ours, unseen)
        else:
            return [], "the file that was read before is nowhere beside the log"
        return await self._open_successors(names, gap)

    async def _find_own(self, rotated: list[RotatedName]) -> RotatedName | None:
        """Return the rotated file that is the open one, or holds all of its bytes."""
        for name in rotated:
            if name.identity == self.current.identity:
                return name
        if not self.current.is_deleted():
            return None
        for name in rotated:
            if name.compressed and await self._is_copy(name.path):
                return name
        return None

    def _is_unseen(self, name: RotatedName) -> bool:
        return not self._published.includes(name)

    async def _open_successors(
        self, names: list[tuple[str, str]], last_gap: str
    ) -> tuple[list[Successor], str]:
        """Open these files, given as (path, gap before it); what cannot be opened is a gap."""
        successors: list[Successor] = []
        left_bytes, pending_gap = MAX_DECOMPRESSED, ""
        for path, gap in names:
            try:
                if not path:
                    raise OSError(errno.ENOENT, "is gone")
                file = await run_in_thread(open_rotated, path, left_bytes)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    raise
                name = os.path.basename(path) or "a file that was the log for a while"
                pending_gap = f"{name} {problem_of(error)}"
                continue
            if compression_of(path):
                left_bytes -= file.size
            successors.append(Successor(file, "rotated", pending_gap or gap))
            pending_gap = ""
        return successors, pending_gap or last_gap

    async def _find_unseen(self) -> bool:
        """Take in rotated files that were the log before anything of it was read."""
        if not self._arrivals.created and self._arrivals.reliable and self._watcher.works:
            return False
        unseen = [name for name in rotated_files(self.path) if self._is_unseen(name) and name.size]
        if not unseen:
            return False
        names, gap = successors_of(None, unseen)
        chain, gap = await self._open_successors(names, gap)
        if not chain:
            return False
        own = self.current.duplicate()
        self._reread(chain[0].file)
        self._enqueue([*chain[1:], Successor(own, "truncated", gap)])
        return True

    # Cuts and rewrites

    async def _handle_rewrite(self) -> bool:
        """Go on where the file changed; what was unread may be in a copy of it."""
        old = self.current
        shorter = old.size < old.end
        if old.size == 0 and self._in_grace_period():
            return False

        copies, gap = await self._copies()
        if self._arrivals.apply(self._watcher.take_events(), log_paths(self.path)):
            return True
        if copies:
            ahead = copies[-1].file.size > old.end
            own = Successor(old.duplicate(), "truncated", gap or self._doubt(ahead))
            self._reread(copies[0].file)
            self._enqueue([*copies[1:], own])
            return True

        change, start = old.change()
        new = old.duplicate()
        new.record_published(start)
        if change in ("cut", "edited"):  # what is before it can still be read by those who lag
            for file in [*self.names.same_inode(old), old]:
                file.record_published(min(start, file.end))
        self.current = new
        lost = change == "replaced" or (shorter and change != "trimmed")
        reason = "truncated" if shorter else "rewritten"
        self._begin_generation(start, reason, self._doubt() if lost else "")
        self._arrivals.created.clear()
        self._report_ok()
        return True

    def _begin_generation(self, start: int, reason: str, gap: str) -> None:
        self._watcher.watch_file(self.current)
        self.current.sequence = self.tail.file.sequence + 1
        self.current.last_growth_s = time.monotonic()
        self.tail = self.tail.link_to(self._segment(self.current), start, reason, gap)
        counters[f'generations_total{{reason="{reason}"}}'] += 1
        logger.info("log was %s%s", reason, f"; lines may be missing: {gap}" if gap else "")

    def _doubt(self, ahead: bool = False) -> str:
        """Return why lines may be missing that were written just before a cut; "" if hardly any."""
        if ahead or self._watcher.stalled or not self._watcher.works:
            return "nobody can know what was written between the last look and the cut"
        return ""

    def _reread(self, copy: LogFile) -> None:
        """Read on in a copy of our file from before it was cut."""
        for file in [*self.names.same_inode(self.current), self.current]:
            file.replace_descriptor(copy)

    async def _copies(self) -> tuple[list[Successor], str]:
        """Return a copy of our file from before it was cut, and what was rotated since."""
        old = self.current
        if not old.end:
            return [], ""
        paths = self._names_of_copies()
        while paths and not await self._is_copy(paths[0]):
            del paths[0]
        if not paths:
            return [], ""

        rotated = [name.path for name in rotated_files(self.path)]
        shape = shape_of(paths[0])
        found = [path for path in paths if path in rotated or shape_of(path) == shape]
        copies, gap = await self._open_successors([(path, "") for path in found], "")
        copies = [copy for copy in copies if not old.was_compressed_to(copy.file)]
        if not copies or not copies[0].file.starts_with(old.fingerprint):
            return [], gap
        return copies, gap

    def _names_of_copies(self) -> list[str]:
        """Return files that appeared beside the log and may be copies of it, the oldest first."""
        if self._watcher.works and self._arrivals.reliable:
            return self._arrivals.candidates()
        rotated = rotated_files(self.path)
        ours = [name.identity == self.current.identity for name in rotated]
        if True in ours:  # what is newer than our file comes after it, not after its copy
            rotated = rotated[ours.index(True) + 1 :]
        return [name.path for name in reversed(rotated) if self._is_unseen(name)]

    async def _is_copy(self, path: str) -> bool:
        """Return True if the file holds all that was published of ours."""
        published = self.current.fingerprint
        with contextlib.suppress(OSError):
            if first_bytes(path, len(published.head)) != published.head:
                return False
            file = await run_in_thread(open_rotated, path, MAX_DECOMPRESSED)
            return not file.same_file(self.current) and file.starts_with(published)
        return False

    # The log's state

    def _in_grace_period(self) -> bool:
        self._anomaly_since_s = self._anomaly_since_s or time.monotonic()
        return time.monotonic() - self._anomaly_since_s < GRACE_S

    def _report_problem(self, state: str, detail: str) -> None:
        if self.state.state != "ok" or not self._in_grace_period():
            self._set_state(LogState(state, detail))

    def _report_ok(self) -> None:
        self._anomaly_since_s = 0.0
        self._set_state(LogState("ok", self._unusual()))

    def _unusual(self) -> str:
        """Return what is unusual about a log that can be read, in words; "" if nothing is."""
        if self._found and self.current.is_deleted():
            return "this file has no name left: nobody else can find it, and a rotation is not seen"
        grown_s = max((file.last_growth_s for file in self.draining), default=0.0)
        if grown_s > self.current.last_growth_s + 2 * self.interval_s:
            return "a rotated file is still written to, the log is not"
        return self._encoding.words(self.current)

    def _set_state(self, state: LogState) -> None:
        if state != self.state:
            detail = f" ({state.detail})" if state.detail else ""
            logger.info("log is %s%s", state.state, detail)
        self.state = state


def log_paths(path: str) -> tuple[str, str]:
    """Return the paths at which another file can become the log: a link, and what it leads to."""
    folder, name = os.path.split(path)
    return os.path.join(real_path(folder or "."), name), real_path(path)


def problem_of(error: OSError) -> str:
    return error.strerror or "cannot be read"


def open_rotated(path: str, most_bytes: int, cancelled: threading.Event) -> LogFile:
    """Open a rotated file, compressed or not. Raises OSError."""
    if compression_of(path):
        return decompress(path, most_bytes, cancelled)
    return open_log_file(path)


def successors_of(
    ours: RotatedName | None, unseen: list[RotatedName]
) -> tuple[list[tuple[str, str]], str]:
    """Return the files that were the log after ours, oldest first, by their names.

    Each is (path, gap before it); the last gap is the one before the log. Times of change are the
    second witness: if they contradict the names, no file is taken, and the gap says so. Without a
    file of ours, all are after it.
    """
    newest = ours or max(unseen, key=lambda name: name.modified_s, default=None)
    newer = [name for name in unseen if newest and name.kind == newest.kind]
    if ours:
        newer = [name for name in newer if name.rank > ours.rank]
    newer.sort(key=lambda name: name.rank)
    if contradiction := contradicting(ours, newer, unseen):
        return [], contradiction

    plan, before = [], ours
    for name in newer:
        plan.append((name.path, missing_between(before, name)))
        before = name
    return plan, missing_between(before, None)


def contradicting(
    ours: RotatedName | None, newer: list[RotatedName], unseen: list[RotatedName]
) -> str:
    """Return where names and times of change contradict each other, in words; "" if nowhere."""
    written_s = ours.modified_s if ours and ours.size else 0.0
    for name in newer:
        if name.size and name.modified_s < written_s - TIME_SLACK_S:
            return f"name and time of change of {os.path.basename(name.path)} contradict each other"
        written_s = max(written_s, name.modified_s if name.size else 0.0)

    for name in unseen:
        later = ours and name.size and name.modified_s > ours.modified_s + TIME_SLACK_S
        if later and name is not ours and name not in newer:
            return f"{os.path.basename(name.path)} may have been the log in between"
    return ""


def missing_between(older: RotatedName | None, newer: RotatedName | None) -> str:
    """Return which number is missing between two rotated files, or before the log, in words."""
    if not older or not older.kind.startswith("number"):
        return ""
    number = -older.rank[0]
    next_number = -newer.rank[0] if newer else min(number, 1) - 1
    if number - next_number <= 1 or (not newer and number <= 1):
        return ""
    return f"rotated file number {number - 1} is missing"


class PublishedFiles:
    """Other files that were published, or lay beside the log at the start: never published again."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[Fingerprint, int]] = {}  # with the time of change
        self._held: list[tuple[float, weakref.ref[LogFile]]] = []  # since when

    def add(self, file: LogFile) -> None:
        """Note a file that is no longer the log, up to where it was published."""
        self._remember(file)
        self._held.append((time.monotonic(), weakref.ref(file)))

    def add_present(self, rotated: list[RotatedName]) -> None:
        """Note the files that were there before anything was published."""
        for name in rotated:
            with contextlib.suppress(OSError):
                file = open_log_file(name.path)
                file.record_published(file.size)
                self._remember(file)

    def _remember(self, file: LogFile) -> None:
        self._known.pop(file.identity, None)
        self._known[file.identity] = file.fingerprint, file.status().st_mtime_ns
        if len(self._known) > 1024:
            del self._known[next(iter(self._known))]

    def published_end(self, file: LogFile) -> int:
        """Return how far this file was published; 0 if it never was, or is another one.

        The number of an inode is given again: the bytes decide, of a short file its time too.
        """
        fingerprint, mtime_ns = self._known.get(file.identity, (Fingerprint(), 0))
        if not fingerprint.end or not file.starts_with(fingerprint):
            return 0
        same_time = file.status().st_mtime_ns == mtime_ns
        return fingerprint.end if same_time or fingerprint.end >= FINGERPRINT_BYTES else 0

    def includes(self, name: RotatedName) -> bool:
        """Return True if this rotated file was published, or there at the start."""
        if name.identity not in self._known:
            return False
        with contextlib.suppress(OSError):
            return not name.size or self.published_end(open_log_file(name.path)) > 0
        return False

    def release_old(self, keep: Container[LogFile]) -> None:
        """Let go of deleted files that only lagging viewers still read, after a minute."""
        now_s = time.monotonic()
        while self._held and now_s - self._held[0][0] > HELD_S:
            _, reference = self._held.pop(0)
            file = reference()
            if file in keep:
                self._held.append((now_s, reference))
            else:
                self._release(file)

    def release_deleted(self) -> None:
        """Let go of all deleted files: descriptors have run out."""
        for _, reference in self._held:
            self._release(reference())
        self._held.clear()

    @staticmethod
    def _release(file: LogFile | None) -> None:
        if file and not file.released and file.is_deleted():
            file.release()


class EncodingCheck:
    """What a log that is not UTF-8 probably is, judged anew whenever it has doubled."""

    def __init__(self) -> None:
        self._next_size = 1
        self._words = ""

    def words(self, file: LogFile) -> str:
        """Return what to tell of the encoding; "" if it is UTF-8."""
        if file.end >= self._next_size or file.end < self._next_size // 4:
            self._next_size = 2 * max(file.end, KIB)
            self._words = encoding_words(file)
        return self._words


def encoding_words(file: LogFile) -> str:
    return ""


# -- events of the kernel --

# inotify(7)
MODIFY, ATTRIB, MOVED_FROM, MOVED_TO, CREATE, DELETE = 0x2, 0x4, 0x40, 0x80, 0x100, 0x200
DELETE_SELF, MOVE_SELF, Q_OVERFLOW, IGNORED = 0x400, 0x800, 0x4000, 0x8000
FILE_EVENTS = MODIFY | ATTRIB | DELETE_SELF | MOVE_SELF
FOLDER_EVENTS = MOVED_FROM | MOVED_TO | CREATE | DELETE | DELETE_SELF | MOVE_SELF
MAX_EVENTS = 10_000  # kept until they are looked at; then their order is unknown


class NameEvent(NamedTuple):
    """A name that appeared in a folder, or went; the two halves of a rename share a cookie."""

    mask: int
    cookie: int
    path: str


class DirectoryWatcher:
    """Events of the kernel: the log for its changes, its folders for names (inotify(7)).

    A neighbour that is written to in the same folder wakes nobody. Losing events loses no byte:
    they only shorten a wait, and say in which order files were renamed.
    """

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._add = getattr(libc, "inotify_add_watch", None)
        self._remove = getattr(libc, "inotify_rm_watch", None)
        self._fd: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC) if self._add else -1
        self._folders: dict[int, str] = {}
        self._files: dict[LogFile, int] = {}
        self._events: list[NameEvent] = []
        self._log_paths: tuple[str, ...] = ()
        self._woken: asyncio.Future[None] | None = None
        self._happened = False  # something that matters, since the last wait
        self._listening = False
        self.works = self._fd >= 0
        self.stalled = False  # the process stood still: what happened meanwhile came all at once
        if not self.works:
            logger.info("no file events here: new entries come with the regular check")

    def watch_folders(self, folders: set[str]) -> bool:
        """Watch these folders. Return False if one of them was not watched before."""
        if self._fd < 0 or not self._add or not self._remove:
            return False
        watched = {self._add(self._fd, os.fsencode(name), FOLDER_EVENTS): name for name in folders}
        watched.pop(-1, None)
        known = watched.keys() <= self._folders.keys()
        for watch in self._folders.keys() - watched.keys():
            self._remove(self._fd, watch)
        self._folders = watched
        return known and len(watched) == len(folders)

    def watch_file(self, file: LogFile) -> None:
        """Watch a file for changes, under whatever name; a second time changes nothing."""
        if self._fd >= 0 and self._add:
            self._files[file] = self._add(self._fd, file.proc_path.encode(), FILE_EVENTS)

    def forget_file(self, file: LogFile) -> None:
        watch = self._files.pop(file, -1)
        if self._remove and watch >= 0 and watch not in self._files.values():
            self._remove(self._fd, watch)

    def take_events(self) -> list[NameEvent]:
        """Return what happened to names since the last call, in order."""
        self._read_queue()
        events, self._events = self._events, []
        return events

    async def wait(self, timeout_s: float, log_paths: tuple[str, ...]) -> None:
        """Wait until something happens to the log, at most so long."""
        self._log_paths = log_paths
        loop = asyncio.get_running_loop()
        if self._fd >= 0 and not self._listening:
            loop.add_reader(self._fd, self._read_queue)
            self._listening = True

        until_s = time.monotonic() + timeout_s
        while not self._happened and (left_s := until_s - time.monotonic()) > 0:
            begun_s, slice_s = time.monotonic(), min(left_s, WAIT_SLICE_S)
            self._woken = loop.create_future()
            timer = loop.call_later(slice_s, self._wake)
            try:
                await self._woken
            finally:
                timer.cancel()
            if time.monotonic() - begun_s > slice_s + STALL_S:
                self.stalled = True
        self._happened = False

    def _wake(self) -> None:
        if self._woken and not self._woken.done():
            self._woken.set_result(None)

    def _read_queue(self) -> None:
        try:
            data = os.read(self._fd, 64 * KIB) if self._fd >= 0 else b""
        except OSError:  # nothing there
            return
        offset, matters = 0, False
        while offset < len(data):
            watch, mask, cookie, length = struct.unpack_from("iIII", data, offset)
            name = os.fsdecode(data[offset + 16 : offset + 16 + length].rstrip(b"\0"))
            offset += 16 + length
            matters |= self._take_event(watch, mask, cookie, name)
        if matters:
            self._happened = True
            self._wake()

    def _take_event(self, watch: int, mask: int, cookie: int, name: str) -> bool:
        """Note one event. Return True if the log may have changed by it."""
        folder = self._folders.get(watch)
        if mask & Q_OVERFLOW or len(self._events) >= MAX_EVENTS:
            self._events = [NameEvent(Q_OVERFLOW, 0, "")]
            return True
        if mask & IGNORED:
            self._folders.pop(watch, None)
            return False
        if folder is None or not name:
            return True
        path = os.path.join(folder, name)
        self._events.append(NameEvent(mask, cookie, path))
        return path in self._log_paths


class TrackedName:
    """A file that appeared in the log's folder, by its present name; "" when it has none."""

    def __init__(self, path: str) -> None:
        self.path = path


class Arrivals:
    """Which files became the log since the last switch, and what they are called now.

    Read off the kernel's events, in their order, so that a scheme of renaming needs no known names.
    """

    def __init__(self) -> None:
        self.reliable = True  # no event since the last switch was lost
        self.created: list[TrackedName] = []  # other files: a copy of the log may be among them
        self._visitors: list[TrackedName] = []  # were at the log's path, one after the other
        self._moving: dict[int, list[TrackedName]] = {}
        self._real_path = ""

    def forget_visits(self) -> None:
        self._visitors.clear()

    def apply(self, events: list[NameEvent], log_paths: tuple[str, str]) -> bool:
        """Follow the names through these events. Return True if a file of interest has another."""
        self._real_path = log_paths[1]
        before = [(name, name.path) for name in self._visitors + self.created]
        for event in events:
            if event.mask & Q_OVERFLOW:
                self.reliable = False
            elif event.mask & (MOVED_FROM | DELETE):
                self._leave(event)
            elif event.mask & (MOVED_TO | CREATE):
                self._come(event, log_paths)
        del self.created[:-256]
        return before != [(name, name.path) for name in self._visitors + self.created]

    def _leave(self, event: NameEvent) -> None:
        named = [name for name in self._visitors + self.created if name.path == event.path]
        if event.mask & MOVED_FROM:
            self._moving[event.cookie] = named
        packed = [name for name in self.created if is_compressed_name(name.path, event.path)]
        for name in named:
            name.path = packed[-1].path if event.mask & DELETE and packed else ""
        if event.mask & DELETE and not named:  # an older file was compressed
            self.created = [name for name in self.created if name not in packed]

    def _come(self, event: NameEvent, log_paths: tuple[str, str]) -> None:
        for name in self._visitors + self.created:
            if name.path == event.path:
                name.path = ""  # replaced
        known = event.mask & MOVED_TO and event.cookie in self._moving  # it was in a folder before
        moved = self._moving.pop(event.cookie, []) if event.mask & MOVED_TO else []
        for name in moved:
            name.path = event.path
        arrived = moved[0] if moved else TrackedName(event.path)
        if event.path in log_paths:
            self._visitors.append(arrived)
        elif not known:
            self.created.append(arrived)

    def can_tell(self) -> bool:
        """Return True if the events say which files were the log in between."""
        return self.reliable and bool(self._visitors)

    def visits(self) -> list[tuple[str, str]]:
        """Return the present paths of the files before the last one, as (path, gap before it)."""
        paths = [name.path for name in self._visitors[:-1] if not is_other_kind(name.path)]
        if not all(paths) and self._visitors[-1].path != self._real_path:
            paths = self._links_led_to()
        return [(path, "") for path in paths]

    def _links_led_to(self) -> list[str]:
        """Return the files that a link led to in between: named like the one that it leads to now."""
        shape = shape_of(self._real_path)
        paths = [name.path for name in self.created if shape_of(name.path) == shape]
        if self._real_path in paths:
            return paths[: paths.index(self._real_path)]
        return paths

    def candidates(self) -> list[str]:
        """Return files that appeared beside the log, and may be copies of it, the oldest first."""
        visited = {name.path for name in self._visitors}
        paths = dict.fromkeys(name.path for name in self.created if name.path)
        return [path for path in paths if path not in visited and is_complete(path)]


def is_other_kind(path: str) -> bool:
    """Return True for a name that leads to no lines: a link, a folder, a FIFO …"""
    with contextlib.suppress(OSError):
        return not stat.S_ISREG(os.lstat(path).st_mode)
    return False


def is_complete(path: str) -> bool:
    """Return False for a compressed file beside the plain one: it is still being written."""
    return not compression_of(path) or not os.path.lexists(os.path.splitext(path)[0])


def is_compressed_name(path: str, plain_path: str) -> bool:
    base, extension = os.path.splitext(path)
    return base == plain_path and extension[1:] in COMPRESSED


def shape_of(path: str) -> str:
    return re.sub(r"\d+", "0", path)


# ---- 4 Resuming ----------------------------------------------------------------------------------
# Turns a cursor into a position: finds the files that it speaks of, by their bytes, and links what
# came after them to the stream. Owns the compressed files that were unpacked for it.

MAX_TRIES = 20  # while the folder changes at every moment


class Chain(NamedTuple):
    """The files behind a cursor: who proves its parts, and what was the log after the newest."""

    owners: dict[str, LogFile]
    newer: list[Successor]
    last_gap: str  # before the current log


class FolderChanged(Exception):
    """Files were renamed while they were looked for."""


class Resumer:
    """The way back into the stream from a cursor."""

    def __init__(self, follower: LogFollower) -> None:
        self.follower = follower
        self._lock = asyncio.Lock()
        self._decompressed: weakref.WeakValueDictionary[tuple[Any, ...], LogFile]
        self._decompressed = weakref.WeakValueDictionary()

    async def resume(self, cursor: str) -> Position | str:
        """Return the position of a cursor, or the reason why there is none. Raises OSError."""
        parts = parse_cursor(cursor)
        if parts is None:
            return "malformed"

        for tries in itertools.count(1):
            while await self.follower.check():  # else segments would come out of order
                await asyncio.sleep(0)
            current = self.follower.current
            try:
                chain = await self._find_chain(parts, patient=tries < MAX_TRIES)
            except FolderChanged:
                continue
            if current is not self.follower.current:
                continue

            if self._is_ahead_of_reader(chain) or not current.is_unchanged():
                await self.follower.next_check.wait()
            elif not parts or parts[-1] in chain.owners:
                return self._link_segments(parts, chain)
            else:
                return "ahead" if offset_of(parts[-1]) > current.size else "changed"
        raise AssertionError

    def _is_ahead_of_reader(self, chain: Chain) -> bool:
        """Return True if the cursor names bytes that this process has yet to read."""
        reading = {self.follower.current, *self.follower.draining}
        ends = ((offset_of(part), file) for part, file in chain.owners.items())
        return any(file in reading and offset > file.end for offset, file in ends)

    # Finding the files

    async def _find_chain(self, parts: list[str], patient: bool) -> Chain:
        """Raises FolderChanged if it is worth while to look again."""
        live = [self.follower.current, *reversed(self.follower.draining)]
        owners = match_parts(parts, live)
        proven = all(part in owners and is_right(owners[part], part) for part in parts)
        if parts and proven and (newer := follow_up(owners[parts[-1]], live)) is not None:
            return Chain(owners, newer, "")

        names = rotated_files(self.follower.path)
        found = await self._open_owners(parts, names, live, patient)
        owners = match_parts(parts, [*live, *(file for file in found.values() if file not in live)])
        if parts and parts[-1] not in owners:
            return Chain(owners, [], "")

        newest = owners[parts[-1]] if parts else None
        if newest is self.follower.current:
            return Chain(owners, [], "")
        own_path = next((path for path, file in found.items() if file is newest), "")
        ours = next((name for name in names if name.path == own_path), None)
        if newest and not ours:
            newer = follow_up(newest, live) or []
            return Chain(owners, newer, "" if newer else "the file that was read is nowhere")
        others = [name for name in names if name is not ours]
        return await self._open_newer(owners, *successors_of(ours, others), found, patient)

    async def _open_owners(
        self, parts: list[str], names: list[RotatedName], live: list[LogFile], patient: bool
    ) -> dict[str, LogFile]:
        """Open the rotated files, by path: the compressed ones only until every part has an owner."""
        found: dict[str, LogFile] = {}
        for name in names:
            if not name.compressed:
                with contextlib.suppress(OSError):
                    found[name.path] = self._open_plain(name, live, patient)

        left_bytes = MAX_DECOMPRESSED
        for name in names:
            if len(match_parts(parts, [*live, *found.values()])) == len(parts):
                break
            if name.compressed:
                with contextlib.suppress(OSError):
                    found[name.path] = await self._decompress_once(name, left_bytes)
                    left_bytes -= found[name.path].size
        return found

    def _open_plain(self, name: RotatedName, live: list[LogFile], patient: bool) -> LogFile:
        for file in live:
            if file.identity == name.identity:
                return file
        file = open_log_file(name.path)
        if file.identity != name.identity and patient:
            raise FolderChanged
        return file

    async def _decompress_once(self, name: RotatedName, most_bytes: int) -> LogFile:
        """Return the content of a compressed file: one copy for all who resume in it.

        A file that is still drained, although it was compressed meanwhile, stands for its copy.
        """
        async with self._lock:
            key = (*name.identity, name.modified_s)
            file = self._decompressed.get(key)
            if file is None:
                file = await run_in_thread(decompress, name.path, most_bytes)
                self._decompressed[key] = file
        for twin in self.follower.draining:
            if twin.size == file.size and file.starts_with(twin.fingerprint):
                return twin
        return file

    async def _open_newer(
        self,
        owners: dict[str, LogFile],
        plan: list[tuple[str, str]],
        last_gap: str,
        found: dict[str, LogFile],
        patient: bool,
    ) -> Chain:
        """Open what came after the newest owner; what cannot be opened is a gap."""
        newer: list[Successor] = []
        pending_gap, left_bytes = "", MAX_DECOMPRESSED
        names = {name.path: name for name in rotated_files(self.follower.path)}
        for path, gap in plan:
            try:
                if path not in names:
                    raise FolderChanged if patient else OSError(errno.ENOENT, "is gone")
                if path not in found:
                    found[path] = await self._open_named(names[path], left_bytes)
                    left_bytes -= found[path].size if names[path].compressed else 0
                newer.append(Successor(found[path], "rotated", pending_gap or gap))
                pending_gap = ""
            except OSError as error:
                pending_gap = f"{os.path.basename(path)} {problem_of(error)}"
        return Chain(owners, newer, pending_gap or last_gap)

    async def _open_named(self, name: RotatedName, most_bytes: int) -> LogFile:
        if name.compressed:
            return await self._decompress_once(name, most_bytes)
        return open_log_file(name.path)

    # Linking them

    def _link_segments(self, parts: list[str], chain: Chain) -> Position:
        """Link the segments from a cursor to the tail, in one step, so that no change is missed.

            [ older files, as far as their parts say ] -> [ newest ] -> [ newer ]* -> the tail
        """
        follower = self.follower
        reading = {follower.current, *follower.draining}
        for file in [*chain.owners.values(), *(successor.file for successor in chain.newer)]:
            if file not in reading:
                file.record_published(file.data_end())

        newer = list(chain.newer)
        event = "rotated"
        if parts:
            newest = chain.owners[parts[-1]]
            event = "" if newest is follower.current else event
        else:
            newest = newer.pop(0).file if newer else follower.current
            event = "" if newest is follower.current else event
        sent = [(chain.owners[part], part) for part in parts[:-1] if part in chain.owners]

        first = last = Segment(newest, (part for _, part in sent))
        for file, part in sent:
            segment = Segment(file, newer=[newest.cursor_part(newest.end)])
            last = last.link_to(segment, offset_of(part))
        for successor in newer:
            last = last.link_to(Segment(successor.file), 0, "rotated", successor.gap)

        last.end_limit = last.end
        owned = follower.current in (newest, *chain.owners.values())
        start = follower.current.end if owned else 0
        last.next = Link(follower.tail, start, event, chain.last_gap)
        if not follower.current.end and event:
            follower.tail.start_cursor = last.cursor(last.end)
        return Position(first, offset_of(parts[-1]) if parts else 0)


def is_right(file: LogFile, part: str) -> bool:
    """Return True if the part was made from this very file, and not from a copy of it."""
    return file.cursor_part(offset_of(part)) == part


def follow_up(file: LogFile, live: list[LogFile]) -> list[Successor] | None:
    """Return what was the log between a file and the current one, if this process published it all.

    `live` are the files that are read, the newest first. None if one of them is missing.
    """
    later = live[: live.index(file)] if file in live else []
    sequences = [file.sequence, *(other.sequence for other in reversed(later))]
    first = sequences[0]
    if later and (not first or sequences != list(range(first, first + len(sequences)))):
        return None
    return [Successor(other, "rotated", "") for other in reversed(later[1:])]


# ---- 5 Viewers: connections ---------------------------------------------------------------------
#
# Who is connected, in which phase, and how much each client may make the server hold: a number and
# a budget of bytes for every phase. Owns open, awaiting_request, answered and viewers.

REQUEST_S = 10.0  # for a request to be complete, and for every ENOUGH_BYTES of its answer
STALL_S = 60.0  # without any progress until a viewer is given up
ENOUGH_BYTES = 20 * KIB  # an answer that moves at 2 kB/s may take as long as it needs
READ_BYTES = 4 * KIB  # in one go: 680 small messages are parsed before anybody else has a turn
REQUEST_BYTES = 64 * KIB  # from a client before its request is complete, TLS handshake included
VIEWER_BYTES = 256 * KIB  # from a viewer, who has nothing to say
REFILL_BYTES_S = 4 * KIB  # so fast these budgets fill up again
MESSAGE_BYTES = 64  # what a message costs of the budget beside its own bytes
ANSWERS_BYTES = 64 * MIB  # in all answers that are under way
SMALL_BYTES = 16 * KIB  # an answer of this size is never refused
UNSENT_BYTES = 64 * KIB  # in the kernel for one client


class Connections:
    """All connections, from the first byte on, and what they hold together."""

    def __init__(self, max_viewers: int, max_others: int, tls: ssl.SSLContext | None) -> None:
        self.max_viewers = max_viewers
        self.max_others = max_others  # connections that are no viewers
        self.tls = tls
        self.open: set[Connection] = set()
        self.viewers: set[Connection] = set()
        self.awaiting_request: dict[Connection, None] = {}  # the oldest first
        self.answered: dict[Connection, None] = {}  # the oldest first
        self.answer_bytes = 0

    def add(self, connection: Connection) -> None:
        """Take in a new connection; if there are too many, another one has to go."""
        self.open.add(connection)
        self.awaiting_request[connection] = None
        if len(self.open) - len(self.viewers) > self.max_others:
            self.evict(connection)

    def evict(self, newest: Connection) -> None:
        """Abort the oldest that has its answer, else the oldest without a request."""
        delivered = (each for each in self.answered if not each.buffered)
        silent = (each for each in self.awaiting_request if each is not newest)
        victim = next(itertools.chain(delivered, silent, self.answered), newest)
        self.remove(victim)
        victim.abort()

    def remove(self, connection: Connection) -> None:
        """Forget a connection that is lost, or about to be; the socket is still open."""
        connection.record_departure()
        self.open.discard(connection)
        self.viewers.discard(connection)
        self.awaiting_request.pop(connection, None)
        self.answered.pop(connection, None)
        self.answer_bytes -= connection.answer_bytes
        connection.answer_bytes = 0

    def begin_request(self, connection: Connection) -> None:
        self.awaiting_request.pop(connection, None)

    def reserve(self, connection: Connection, size_bytes: int) -> bool:
        """Set memory aside for an answer. Return False if too much of it is under way."""
        others_bytes = self.answer_bytes - connection.answer_bytes
        if size_bytes > SMALL_BYTES and others_bytes + size_bytes > ANSWERS_BYTES:
            return False
        if connection in self.open:  # else it has just left
            self.answer_bytes = others_bytes + size_bytes
            connection.answer_bytes = size_bytes
        return True

    def begin_answer(self, connection: Connection) -> None:
        if connection in self.open:
            self.answered[connection] = None
            connection.progress = connection.progress[0], time.monotonic()
            connection.close_timeout = None  # else the library cuts an answer that takes longer

    def abort_all(self) -> None:
        for connection in list(self.open):
            connection.abort()

    async def abort_stalled(self) -> None:
        """Abort, for ever, whoever makes no progress. A viewer can resume with its cursor."""
        while True:
            await asyncio.sleep(5)
            for connection in [each for each in self.open if each.is_stalled()]:
                connection.abort()


class Connection(ServerConnection):
    """One client's connection, from its first byte on."""

    tcp: asyncio.Transport  # the socket's own transport, also under TLS

    def __init__(self, connections: Connections, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.connections = connections
        self.since = time.monotonic()
        self.progress = 0, self.since  # bytes that the client took, and when it last took some
        self.received = 0.0, self.since  # bytes of the budget that are used up, as of that time
        self.answer_bytes = 0
        self.token = b""  # what opened the server to this viewer
        self.who: dict[str, str] = {}  # is that, in the access record
        self.arrived = False
        self.position: Position | None = None  # this and the next one belong to the Broadcaster
        self.state_sent = LogState("ok", "")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start with TCP, under TLS once more as soon as the handshake is done."""
        if hasattr(self, "tcp"):
            return super().connection_made(transport)

        assert isinstance(transport, asyncio.Transport)
        self.tcp = transport
        self.tcp.max_size = READ_BYTES  # type: ignore[attr-defined]  # asyncio's is 256 KiB
        self.connections.add(self)
        # The kernel takes 2.8 MB for a client that reads nothing. With this option the rest
        # stays in the write buffer, where it can be seen. macOS has no such option.
        with contextlib.suppress(OSError, AttributeError):
            option = socket.TCP_NOTSENT_LOWAT
            self.socket.setsockopt(socket.IPPROTO_TCP, option, UNSENT_BYTES)

        if self.connections.tls is None:
            return super().connection_made(transport)
        tls = TLSProtocol(self, self.connections.tls)
        self.tcp.set_protocol(tls)
        tls.connection_made(self.tcp)

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.remove(self)
        super().connection_lost(exc)
        self.break_cycles()

    def break_cycles(self) -> None:
        """Let go of what refers back to the connection.

        Garbage collection stops the loop for a second with 10,000 connections open. Without
        cycles it is hardly ever due.
        """
        protocol = self.protocol
        protocol.parser.close()
        for owner in (protocol, self.tcp):
            for name, value in list(vars(owner).items()):
                if isinstance(value, types.MethodType):
                    delattr(owner, name)
        for error in (protocol.handshake_exc, protocol.parser_exc, self.connection_exc):
            while error:
                error.__traceback__ = None
                error = error.__cause__ or error.__context__

    def data_received(self, data: bytes) -> None:
        if self.connections.tls or self.may_receive(len(data)):
            super().data_received(data)

    def process_event(self, event: Any) -> None:
        if self.may_receive(MESSAGE_BYTES):
            super().process_event(event)

    def may_receive(self, size_bytes: int) -> bool:
        """Count what the client sends. If it is more than it may send, abort and return False."""
        now = time.monotonic()
        used, then = self.received
        used = max(0.0, used - (now - then) * REFILL_BYTES_S) + size_bytes
        self.received = used, now

        budget = VIEWER_BYTES if self in self.connections.viewers else REQUEST_BYTES
        if used > budget:
            self.abort()
        return used <= budget

    def abort(self) -> None:
        self.tcp.abort()

    def write_frame(self, frame: bytes) -> None:
        """Write a frame to the socket, unless the connection is closing."""
        if self.protocol.state is State.OPEN:
            self.transport.write(frame)

    def record_arrival(self, resumed: bool) -> None:
        """Put a viewer into the access record; it stands there again when it leaves."""
        self.arrived = True
        record_access("came", **self.who, resumed=resumed)

    def record_departure(self) -> None:
        if self.arrived:
            self.arrived = False
            taken, _ = self.sent_and_queued()
            lasted_s = round(time.monotonic() - self.since)
            record_access("left", **self.who, seconds=lasted_s, bytes=max(0, taken))

    @property
    def socket(self) -> socket.socket:
        sock: socket.socket = self.tcp.get_extra_info("socket")
        return sock

    @property
    def buffered(self) -> int:
        """Bytes in the write buffer: what the kernel has not taken yet."""
        return self.transport.get_write_buffer_size()

    @property
    def speaks_json(self) -> bool:
        return self.subprotocol == PROTOCOL

    def is_stalled(self) -> bool:
        """Return True if the client makes no progress with what it has to send or to take."""
        now = time.monotonic()
        if self in self.connections.awaiting_request:
            return now - self.since > REQUEST_S

        answered = self in self.connections.answered
        enough = ENOUGH_BYTES if answered else 1
        taken, queued = self.sent_and_queued()
        idle = not queued and not self.buffered and not answered
        if idle or abs(taken - self.progress[0]) >= enough:
            self.progress = taken, now
        return now - self.progress[1] > (REQUEST_S if answered else STALL_S)

    def sent_and_queued(self) -> tuple[int, int]:
        """Return how many bytes the client has acknowledged, and how many the kernel has yet to
        deliver (tcp(7): TCP_INFO, SIOCOUTQ). What other systems know is in the write buffer."""
        try:
            outq = fcntl.ioctl(self.socket.fileno(), termios.TIOCOUTQ, bytes(4))
            info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            (queued,) = struct.unpack("i", outq)
            (acknowledged,) = struct.unpack_from("=Q", info, 120)
        except (OSError, ValueError, AttributeError, struct.error):
            return -self.buffered, 0
        return acknowledged, queued


class TLSProtocol(asyncio.sslproto.SSLProtocol):
    """TLS between the socket and a Connection.

    The loop could do it, but would not count a handshake under way among the connections.
    """

    max_size = READ_BYTES  # allocated for each connection; asyncio's is 256 KiB

    def __init__(self, connection: Connection, context: ssl.SSLContext) -> None:
        super().__init__(
            connection.loop,
            connection,
            context,
            None,  # type: ignore[arg-type]  # nobody waits for the handshake
            server_side=True,
            ssl_handshake_timeout=5,
            ssl_shutdown_timeout=3600,  # covers the delivery of an answer; see abort_stalled
        )
        self.connection = connection

    def buffer_updated(self, nbytes: int) -> None:
        if self.connection.may_receive(nbytes):
            super().buffer_updated(nbytes)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Tell of handshakes that failed, too."""
        self.connection.connections.remove(self.connection)
        super().connection_lost(exc)


# -- the broadcast --

MAX_BROADCAST = 64 * KIB  # larger batches are not broadcast: each viewer reads them from the file
MAX_UNSENT = 64 * KIB  # a viewer with more unsent bytes than this leaves the broadcast
HEARTBEAT_S = 10.0  # without a message until `checked` is sent
MAX_CACHED = 16  # messages, read and written out once for all who catch up at the same time


class Broadcaster:
    """The live viewers: all of them at one position, the end of the stream.

    It alone writes a viewer's `position` and `state_sent`.
    """

    def __init__(self, follower: LogFollower, connections: Connections) -> None:
        self.follower, self.connections = follower, connections
        self.resumer = Resumer(follower)
        self.position = Position(follower.tail, follower.tail.end)
        self.live: dict[Connection, asyncio.Future[None]] = {}
        self.published = asyncio.Event()  # set, and replaced, after each check of the follower
        self._cache: dict[Position, Message] = {}
        self._last_send_s = time.monotonic()
        self._proof = b""  # what all viewers were told last about the log's integrity

    # For all viewers

    def publish(self) -> None:
        """Broadcast what was published since the last call.

        Slow viewers, or all if the batch is large, read it from the file.
        """
        self.published.set()
        self.published = asyncio.Event()
        self._broadcast_state()
        end = Position(self.follower.tail, self.follower.tail.end)
        messages = self._pending_messages(end) if end != self.position else []
        if messages is None:
            for viewer in list(self.live):
                self._detach(viewer)
        self.position = end
        for message in messages or ():
            self._send(message.plain, message.json)

        if time.monotonic() - self._last_send_s > HEARTBEAT_S:
            size = max(self.follower.size, end.offset)
            checked = checked_message(size, end.offset, self.follower.unfinished_bytes)
            self._send(b"", checked)
        if len(self.live) == len(self.connections.viewers):
            self._cache.clear()  # messages keep their files open

    def _pending_messages(self, end: Position) -> list[Message] | None:
        """Return what all live viewers get now; None if each has to read it."""
        if not self.live:
            return []
        position, size, messages = self.position, 0, list[Message]()
        try:
            while size <= MAX_BROADCAST and (message := self._next_message(position)):
                messages.append(message)
                position, size = message.next_position, size + len(message.data)
        except OSError:
            return None  # the follower tells the state at its next check
        if size > MAX_BROADCAST or normalize(position) != end:
            return None
        return messages

    def _next_message(self, position: Position) -> Message | None:
        """Return the next message, with the name of its generation. Raises OSError."""
        message = next_message_at(position)
        if message:
            self.follower.names.assign(message.file)
        return message

    def _broadcast_state(self) -> None:
        state = self.follower.state
        if all(viewer.state_sent == state for viewer in self.live):
            return
        frame = text_frame(state_message(state))
        for viewer in self.live:
            if viewer.speaks_json and viewer.state_sent != state:
                viewer.write_frame(frame)
            viewer.state_sent = state

    def tell_proof(self, message: dict[str, Any]) -> None:
        """Tell all viewers, and those who come later, about the log's integrity."""
        self._proof = wire_text(message)
        self._send(b"", self._proof)

    def _send(self, plain: bytes, as_json: bytes) -> None:
        """Write one message to all live viewers; those who lag leave the broadcast."""
        frames = text_frame(plain) if plain else b"", text_frame(as_json)
        receivers = 0
        for viewer, future in list(self.live.items()):
            if future.done():
                continue
            if viewer.buffered > MAX_UNSENT:
                self._detach(viewer)
                continue
            if frame := frames[viewer.speaks_json]:
                viewer.write_frame(frame)
                receivers += 1
        counters["sent_bytes_total"] += len(plain) * receivers
        self._last_send_s = time.monotonic()

    def _detach(self, viewer: Connection) -> None:
        future = self.live[viewer]
        if not future.done():
            viewer.position = self.position
            future.set_result(None)

    # For one viewer

    async def first_message(self, viewer: Connection, initial_bytes: int, since: str | None) -> bytes:
        """Find the viewer's position, and return its first message. Raises OSError."""
        resumed = None if since is None else await self.resumer.resume(since)
        if isinstance(resumed, Position):
            message = next_message_at(resumed)
            position, text = resumed, ""
            if message and message.kind == "append" and message.file is resumed.segment.file:
                position, text = message.next_position, message.text
            start, reason = resumed.offset, None
        else:
            position, start, text = await self._end_of_log(initial_bytes)
            reason = resumed

        viewer.position = position
        self.follower.names.assign(position.segment.file)
        if not viewer.speaks_json:
            return text.encode()
        found = isinstance(resumed, Position)
        return snapshot_message(self.follower.name, start, position, text, found, reason)

    async def _end_of_log(self, initial_bytes: int) -> tuple[Position, int, str]:
        """Return the end of the stream, and where and what the last lines before it are."""
        follower = self.follower
        while not follower.current.is_unchanged() and await follower.check():
            await asyncio.sleep(0)  # otherwise the cursor would cover bytes that were never sent
        file, end = follower.current, follower.tail.end
        start = file.line_start(end, initial_bytes) if file.is_unchanged() else end
        text = file.read_data(start, end).decode(errors="replace")
        return Position(follower.tail, end), start, text

    async def next_message(self, viewer: Connection) -> bytes:
        """Wait for what comes next for one viewer; b"" if its protocol has no such message.

        Raises OSError.
        """
        if viewer.speaks_json and viewer.state_sent != self.follower.state:
            viewer.state_sent = self.follower.state
            return state_message(viewer.state_sent)
        if viewer.position is None:
            return b""  # removed meanwhile

        message = self._cache.get(viewer.position) or self._next_message(viewer.position)
        if message is None:
            await self._wait_live(viewer)
            return b""
        self._cache[viewer.position] = message
        if len(self._cache) > MAX_CACHED:
            del self._cache[next(iter(self._cache))]
        viewer.position = message.next_position
        counters["sent_bytes_total"] += len(message.data)
        return message.json if viewer.speaks_json else message.plain

    async def _wait_live(self, viewer: Connection) -> None:
        """Wait as a live viewer; return when this viewer has to read the file itself."""
        if viewer.position and normalize(viewer.position) != self.position:
            await self.published.wait()  # the follower has yet to say what happened
            return
        self.live[viewer] = asyncio.get_running_loop().create_future()
        viewer.position = None  # a position of its own would keep rotated files open
        try:
            await self.live[viewer]
        finally:
            del self.live[viewer]

    async def tell_trouble(self, viewer: Connection) -> None:
        """Tell a viewer the state, if it is news, and wait for the next check."""
        checked = self.published
        if viewer.speaks_json and viewer.state_sent != self.follower.state:
            viewer.state_sent = self.follower.state
            await viewer.send(state_message(viewer.state_sent), text=True)
        await checked.wait()

    def remove(self, viewer: Connection) -> None:
        """Forget a viewer that has gone: it must not keep files open."""
        viewer.position = None


async def handle_viewer(
    broadcaster: Broadcaster, initial_bytes: int, viewer: ServerConnection
) -> None:
    """Serve a viewer until it leaves; what it sends is read and ignored."""
    assert isinstance(viewer, Connection)
    sending = asyncio.create_task(send_loop(broadcaster, initial_bytes, viewer))
    try:
        async for _ in viewer:
            pass
    except ConnectionClosed:
        pass
    finally:
        sending.cancel()
        await asyncio.wait([sending])
        broadcaster.remove(viewer)
    if not sending.cancelled() and (error := sending.exception()):
        raise error


async def send_loop(broadcaster: Broadcaster, initial_bytes: int, viewer: Connection) -> None:
    """Send the first message, then message by message, and wait live at the end."""
    since = query_of(viewer).get("since")
    first = True
    try:
        while True:
            try:
                if first:
                    message = await broadcaster.first_message(viewer, initial_bytes, since)
                    await viewer.send(message, text=True)
                    first = False
                elif message := await broadcaster.next_message(viewer):
                    await viewer.send(message, text=True)
            except OSError:  # the log cannot be read: tell the state, and try again
                await broadcaster.tell_trouble(viewer)
    except ConnectionClosed:
        pass
    except Exception:
        viewer.transport.abort()  # nobody may be left mute
        raise


def text_frame(payload: bytes) -> bytes:
    """Return a WebSocket frame (RFC 6455, section 5.2), written out once for all viewers."""
    return Frame(Opcode.TEXT, payload).serialize(mask=False)


# ---- 6 HTTP -------------------------------------------------------------------------------------
#
# From a request to its answer: context, access, route, common headers. Owns nothing.

HISTORY = ("/api/audit", "/api/search", "/api/counts", "/api/timeline", "/api/seek")
PROOF = {"/api/receipt": "GET, HEAD", "/api/review": "POST", "/api/record": "POST"}


class HTTPError(Exception):
    """An error response: status, one sentence, headers (with _ for -)."""

    def __init__(self, status: int, sentence: str, **headers: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.headers = headers


def busy() -> HTTPError:
    return HTTPError(503, "too many answers are under way", Retry_After="5")


class Site(NamedTuple):
    """What there is to be served."""

    access: AccessControl
    broadcaster: Broadcaster
    history: History
    proof: Proof
    page: bytes


class RequestContext(NamedTuple):
    """A request, and who makes it."""

    connection: Connection
    request: Request
    path: str
    query: dict[str, str]  # the last one of each name
    upgrade: bool  # to a WebSocket
    client: str  # an IPv4 address, or the /64 of an IPv6 address
    scheme: str  # of the page's address
    host: str  # in lower case, with its port if it was given; empty if missing or malformed
    port: str
    user: str  # the name of the token, or who a trusted proxy says it is; may be empty

    @property
    def who(self) -> dict[str, str]:
        """Return how the access record names the client."""
        return {"client": self.client, "name": self.user}


async def respond(site: Site, connection: ServerConnection, request: Request) -> Response:
    """Answer a request over HTTP, or accept a WebSocket."""
    assert isinstance(connection, Connection)
    connection.connections.begin_request(connection)
    context = site.access.request_context(connection, request)

    try:
        response = await authorized_response(site, context)
    except HTTPError as error:
        response = error_response(context.path, error)

    if connection.protocol.eof_sent:
        # The client sent more than one request. The library cannot answer that: drop it.
        connection.abort()
        await connection.wait_closed()
    if response.status_code == 101:
        return response

    if response.status_code not in (500, 505):  # these are the library's own
        response = with_common_headers(site, context, response)
    if not connection.connections.reserve(connection, len(response.body)):
        response = with_common_headers(site, context, error_response(context.path, busy()))
    connection.connections.begin_answer(connection)
    return response


async def authorized_response(site: Site, context: RequestContext) -> Response:
    """Return the answer to a request. Raises HTTPError if it is refused."""
    credential = site.access.authorize(context)
    token = credential.token
    if token and not context.user:
        context = context._replace(user=token.name)

    if context.upgrade:
        response = accept_viewer(context)
        if token:
            context.connection.token = token.secret
        return response
    if context.path != "/" or not token or credential.place == "cookie":
        return await route(site, context)

    if credential.place == "address":
        response = make_response(303, b"", TEXT, Location="./")
    else:
        response = make_response(200, site.page, HTML)
    response.headers["Set-Cookie"] = site.access.set_cookie(context, token)
    return response


def accept_viewer(context: RequestContext) -> Response:
    """Return the library's answer to a handshake. Raises HTTPError for what it refuses."""
    connection, connections = context.connection, context.connection.connections
    check_room(connections)

    response = connection.protocol.accept(context.request)
    if response.status_code in (400, 403, 405, 426):
        sentence = bytes(response.body).decode().partition("\n")[0]
        names = {"Allow", "Upgrade"} & set(response.headers)
        headers = {name: response.headers[name] for name in names}
        raise HTTPError(response.status_code, sentence, **headers)

    if response.status_code == 101 and connection in connections.open:
        connections.viewers.add(connection)
        connection.who = context.who
    return response


def check_room(connections: Connections) -> None:
    if len(connections.viewers) >= connections.max_viewers:
        raise HTTPError(503, "too many viewers", Retry_After="5")


async def route(site: Site, context: RequestContext) -> Response:
    """Return what there is at the path. Raises HTTPError, 404 if there is nothing."""
    path = context.path
    if path == "/":
        return make_response(200, site.page, HTML)
    if path == "/metrics":
        content_type = "text/plain; version=0.0.4; charset=utf-8"
        return make_response(200, metrics(site.broadcaster).encode(), content_type)
    if path == "/ws/audit":
        if "origin" in context.query:  # a page asks why its WebSocket was refused
            check_room(context.connection.connections)
        raise HTTPError(426, "this address speaks WebSocket", Upgrade="websocket")
    if path in ("/healthz", *HISTORY, *PROOF):
        return await cancel_on_disconnect(context.connection, log_response(site, context))
    raise HTTPError(404, "not found")


async def log_response(site: Site, context: RequestContext) -> Response:
    """Return what is said about the log, 503 if there is none."""
    follower = site.broadcaster.follower
    state, detail = follower.state
    if state != "ok" and context.path != "/api/record":
        raise HTTPError(503, f"the log is {state}: {detail}")

    if context.path == "/healthz":
        return make_response(200, b"ok\n", TEXT)
    if context.path in PROOF:
        return await site.proof.respond(context)
    if not context.connection.connections.reserve(context.connection, MIB):
        raise busy()
    return await site.history.respond(follower.current, context)


async def cancel_on_disconnect(connection: Connection, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, and cancel it if the client disconnects."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(connection.wait_closed())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait([working, leaving])

    if working.cancelled():
        raise HTTPError(503, "the client went away")
    return working.result()


def make_response(status: int, body: bytes, content_type: str, **headers: str) -> Response:
    """Return a response; a header's name is written with _ for -."""
    fixed = {
        "Date": email.utils.formatdate(usegmt=True),
        "Content-Type": content_type,
        "Content-Length": str(len(body)),
        "Connection": "close",
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
    }
    more = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(status, http.HTTPStatus(status).phrase, Headers(fixed | more), body)


def error_response(path: str, error: HTTPError) -> Response:
    body, content_type = json.dumps({"error": str(error)}).encode(), JSON
    if path in ("/", "/healthz"):
        body, content_type = f"{error}\n".encode(), TEXT
    if path == "/" and error.status == 401:
        body, content_type = LOGIN_PAGE, HTML
    return make_response(error.status, body, content_type, **error.headers)


def with_common_headers(site: Site, context: RequestContext, response: Response) -> Response:
    """Return the answer with what every one needs, or 429 in place of a refused WebSocket."""
    if context.upgrade and response.status_code != 400:
        try:
            site.access.count_answer(context)  # an accepted WebSocket is none
        except HTTPError as too_many:
            response = error_response(context.path, too_many)

    if response.status_code >= 400:
        counters[f'refused_requests_total{{status="{response.status_code}"}}'] += 1
    if context.request.method == "HEAD":
        response.body = b""
    response.headers.update(site.access.security_headers(context))
    return response


def int_parameter(query: dict[str, str], name: str, default: int, low: int, high: int) -> int:
    """Return a whole number of the query. Raises HTTPError 400 for anything else."""
    try:
        return int_in_range(query.get(name, str(default)), name, low, high)
    except ValueError as error:
        raise HTTPError(400, str(error)) from None


def int_in_range(text: str, name: str, low: int, high: int) -> int:
    """Return the whole number that `text` is. Raises ValueError with a sentence."""
    if not re.fullmatch(r"\d{1,19}", text, re.ASCII) or not low <= int(text) <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}")
    return int(text)


# ---- 7 Access -----------------------------------------------------------------------------------
#
# Who may come in, by token, Host and Origin, how often, and what is recorded of it. Owns the
# tokens, the TLS context and the rate limits.

HOST = re.compile(r"(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(\d{1,5}))?", re.ASCII)
POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; worker-src blob:; child-src blob:; "
    "connect-src 'self' {socket}"
)  # Safari: child-src is worker-src before 15.5, and 'self' is no WebSocket before 15.4
LOGIN_PAGE = b"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Audit Stream</title>
<link rel="icon" href="data:,">
<style>
body { background: #07110b; color: #7ee8a0; font: 16px system-ui, sans-serif; max-width: 20em; margin: 20vh auto 0 }
label, input, button, output { display: block; box-sizing: border-box; font: inherit; margin: 8px 0 }
input, button { width: 100%; padding: 8px; color: #d5ffe2; background: #102018; border: 1px solid #2b4a38 }
output { color: #ff8a80; min-height: 1.5em }
</style>
<form>
<h1>Audit Stream</h1>
<label for="token">Access token</label>
<input id="token" type="password" autocomplete="current-password" required autofocus>
<button>Open</button>
<output></output>
</form>
<script>
const ANSWERS = {
  401: 'That is not the token.',
  403: 'The server does not answer under this name.',
  429: 'Too many wrong tokens: wait a minute.',
}
document.forms[0].onsubmit = async function (event) {
  event.preventDefault()
  const said = document.querySelector('output')
  const token = document.getElementById('token').value.trim()
  try {
    const bytes = unescape(encodeURIComponent(token))
    let reply = await fetch('./', { headers: { Authorization: 'Bearer ' + bytes } })
    // A proxy that wants Authorization for itself: the address is the other way in.
    if (reply.status === 401 && !/^Bearer/.test(reply.headers.get('WWW-Authenticate')))
      reply = await fetch('./?token=' + encodeURIComponent(token))
    if (reply.ok) location.replace('./' + location.hash)
    else said.textContent = ANSWERS[reply.status] || 'The server answers ' + reply.status + '.'
  } catch (error) {
    said.textContent = 'The server does not answer.'
  }
}
</script>
"""


class Token(NamedTuple):
    """An access token, and who has it."""

    name: str  # in the access record; may be empty
    secret: bytes

    def cookie(self, port: str) -> bytes:
        """Return NAME=VALUE. The name tells logs with other tokens on the same host apart."""
        mark, value = (hmac.digest(self.secret, use, "sha256").hex() for use in (b"name", b"value"))
        return f"audit_stream_{port}_{mark[:8]}={value}".encode()


class Credential(NamedTuple):
    """What a request came in with: nothing, or a token and the place it was found in."""

    place: str = ""  # "header", "address" or "cookie"
    token: Token | None = None


class RateLimiter:
    """A token bucket for each of the last 10,000 clients: so many a minute, and as many at once."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute  # 0: no limit
        self.buckets: dict[str, tuple[float, float]] = {}  # what is left, and when that was

    def acquire(self, client: str, cost: int = 1) -> None:
        """Raises HTTPError 429 if there is not so much left."""
        if not self.per_minute:
            return

        now = time.monotonic()
        left, then = self.buckets.pop(client, (self.per_minute, now))
        left = min(self.per_minute, left + (now - then) * self.per_minute / 60)
        cost = min(cost, self.per_minute)
        granted = left >= cost
        if granted:
            left -= cost
        self.buckets[client] = left, now
        if len(self.buckets) > 10_000:
            del self.buckets[next(iter(self.buckets))]

        if not granted:
            wait_s = math.ceil((cost - left) * 60 / self.per_minute)
            raise HTTPError(429, "too many requests", Retry_After=str(wait_s))


class AccessControl:
    """Who may come in: by token, Host and Origin, and how often."""

    def __init__(self, options: Options, page: bytes) -> None:
        self.options = options
        self.tokens = read_tokens(options)  # none: open
        self.generated = not self.tokens and not options.no_auth and not is_local(options.host)
        if self.generated:
            self.tokens = (Token("", secrets.token_urlsafe(24).encode()),)
        self.tls = load_tls(options) if options.tls_cert else None

        self.answers = RateLimiter(options.rate_limit)
        self.foreign_answers = RateLimiter(options.rate_limit)
        # All viewers of an office may come back at once, after each of a few restarts.
        resumes = max(10 * options.rate_limit, options.max_viewers)
        self.resumes = RateLimiter(resumes if options.rate_limit else 0)
        self.guesses = RateLimiter(10)

        own_names = ("localhost", socket.gethostname().lower(), options.host.lower())
        self.names = {*own_names, *options.allow_host}
        pages = page + LOGIN_PAGE
        self.hashes = {kind: csp_hashes(kind.encode(), pages) for kind in ("script", "style")}

    def authorize(self, context: RequestContext) -> Credential:
        """Return with what the client may come in. Raises HTTPError if it may not."""
        check_headers(context)
        if not context.upgrade:
            self.count_answer(context)  # a WebSocket is counted once it is refused

        if not self.is_own_name(context):
            raise HTTPError(403, "this server is not open under that name; see --allow-host")
        credential = self.check_token(context)

        allowed = PROOF.get(context.path, "GET, HEAD")
        if context.request.method not in allowed.split(", "):
            raise HTTPError(405, f"only {allowed} is answered here", Allow=allowed)
        self.check_origin(context)
        if "since" in context.query:
            self.count_resume(context)
        return credential

    def request_context(self, connection: Connection, request: Request) -> RequestContext:
        """Take client, scheme and user from the last proxy's word if it is trusted."""
        address = parse_ip((connection.remote_address or ("",))[0])
        scheme = "https" if self.tls else "http"
        user = ""
        if self.is_trusted_proxy(address):
            address = parse_ip(last_value(request, "X-Forwarded-For")) or address
            forwarded = last_value(request, "X-Forwarded-Proto").lower()
            scheme = forwarded if forwarded in ("http", "https") else scheme
            user = last_value(request, "X-Forwarded-User")[:200]
        client = str(address)
        if isinstance(address, ipaddress.IPv6Address):
            client = str(ipaddress.ip_network((address, 64), strict=False))

        path, _, query = request.path.partition("?")
        pairs = urllib.parse.parse_qsl(query, keep_blank_values=True, errors="replace")
        offers = ",".join(request.headers.get_all("Upgrade")).lower()
        upgrade = path == "/ws/audit" and "websocket" in offers
        host, port = parse_host(",".join(request.headers.get_all("Host")).lower(), scheme)
        return RequestContext(
            connection, request, path, dict(pairs), upgrade, client, scheme, host, port, user
        )

    def is_trusted_proxy(self, address: IPAddress | None) -> bool:
        trusted = self.options.trust_proxy
        if not address or not trusted:
            return False
        return address.is_loopback if trusted == "loopback" else str(address) == trusted

    def count_answer(self, context: RequestContext) -> None:
        """Count an answer. Other websites cannot use up what the user has: theirs count apart."""
        marks = context.request.headers.get_all("Sec-Fetch-Site")
        foreign = "cross-site" in marks or not self.is_own_origin(context)
        limiter = self.foreign_answers if foreign or not self.is_own_name(context) else self.answers
        limiter.acquire(context.client)

    def count_resume(self, context: RequestContext) -> None:
        """Count a cursor. An honest one names up to three files; checking 64 takes a second."""
        files = context.query["since"].count("~") + 1
        self.resumes.acquire(context.client, 1 if files <= 3 else files**2)

    def is_own_name(self, context: RequestContext) -> bool:
        """Return False if an open server is called by a name that another site could point at it
        (DNS rebinding)."""
        name = context.host.removesuffix(f":{context.port}").strip("[]")
        return bool(self.tokens) or name in self.names or parse_ip(name) is not None

    def check_token(self, context: RequestContext) -> Credential:
        """Return the token of the request. Raises HTTPError 401 or 429 if it has none."""
        if not self.tokens or context.path == "/healthz":
            return Credential()
        offered = offered_tokens(context)
        for place, secret in offered:
            for token in self.tokens:
                if hmac.compare_digest(secret, token.secret):
                    return Credential(place, token)

        cookies = ";".join(context.request.headers.get_all("Cookie")).encode("latin-1").split(b";")
        for token in self.tokens:
            ours = token.cookie(context.port)
            if any(hmac.compare_digest(cookie.strip(), ours) for cookie in cookies):
                return Credential("cookie", token)

        if offered:
            self.guesses.acquire(context.client)
            record_access("refused", **context.who)
        raise HTTPError(401, "the access token is missing or wrong", WWW_Authenticate="Bearer")

    def set_cookie(self, context: RequestContext, token: Token) -> str:
        secure = "; Secure" if context.scheme == "https" else ""
        cookie = token.cookie(context.port).decode()
        return f"{cookie}; HttpOnly; SameSite=Lax; Path=/{secure}"

    def check_origin(self, context: RequestContext) -> None:
        """Raises HTTPError 403 for a page of another site, except for the page itself."""
        sites = set(context.request.headers.get_all("Sec-Fetch-Site"))
        changes = context.request.method == "POST"
        if (changes or context.path == "/ws/audit") and not self.is_own_origin(context):
            raise HTTPError(403, "a page of another origin may not do this; see --allow-origin")
        if changes and not sites <= {"same-origin", "none"}:
            raise HTTPError(403, "cross-site request refused")
        if context.path not in ("/", "/ws/audit") and "cross-site" in sites:
            raise HTTPError(403, "cross-site request refused")

    def is_own_origin(self, context: RequestContext) -> bool:
        """Return True for the own page and for programs, which name no origin.

        A page that was refused asks why over HTTP, and names its origin in the query.
        """
        own = normalize_origin(f"{context.scheme}://{context.host}")
        named = own
        if context.path == "/ws/audit":
            named = context.query.get("origin", own)
        origin = normalize_origin(context.request.headers.get("Origin", named))
        return origin == own or origin in self.options.allow_origin

    def security_headers(self, context: RequestContext) -> dict[str, str]:
        """Return what browsers may do with an answer."""
        address = ""
        if context.host:
            address = f"{context.scheme.replace('http', 'ws')}://{context.host}"
        headers = {"Content-Security-Policy": POLICY.format(**self.hashes, socket=address).strip()}
        if self.tls:
            headers["Strict-Transport-Security"] = "max-age=31536000"
        return headers

    async def reload(self, viewers: Iterable[Connection]) -> None:
        """Read certificate and tokens again; what cannot be used leaves everything as it is."""
        try:
            if self.tls:
                load_tls(self.options)  # a failure must not touch the live one
                load_certificate(self.tls, self.options)
        except OSError as error:
            sentence = "the certificate stays as it is: %s: %s"
            logger.warning(sentence, error.filename, error.strerror)

        try:
            # There may be none: it was generated, or the credential is gone.
            self.tokens = read_tokens(self.options) or self.tokens
        except OSError as error:
            sentence = "the access token stays as it is: %s: %s"
            logger.warning(sentence, error.filename, error.strerror)

        valid = {token.secret for token in self.tokens} | {b""}
        lost = [viewer for viewer in viewers if viewer.token not in valid]
        closing = [viewer.close(1008, "the access token was changed") for viewer in lost]
        await asyncio.gather(*closing, return_exceptions=True)

    def is_secret(self, status: os.stat_result) -> bool:
        """Return True for a file that must not be served as a log: token, certificate and key."""
        options = self.options
        paths = (token_path(options), options.tls_key, options.tls_cert)
        for path in filter(None, paths):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(path), status):
                    return True
        return False


def check_headers(context: RequestContext) -> None:
    """Raises HTTPError 400 for what can be read in two ways (RFC 9110, 5.3; RFC 9112, 3.2)."""
    for name in ("Host", "Origin", "Authorization", "Range", "If-Match"):
        if len(context.request.headers.get_all(name)) > 1:
            raise HTTPError(400, f"duplicate {name} header")
    if not context.host:
        raise HTTPError(400, "the Host header is missing or malformed")


def offered_tokens(context: RequestContext) -> list[tuple[str, bytes]]:
    """Return the tokens of a request that may be right or wrong, each with its place."""
    header = context.request.headers.get("Authorization", "").strip()
    scheme, _, bearer = header.partition(" ")
    offered = []
    if scheme.lower() == "bearer":
        offered.append(("header", bearer.strip().encode("latin-1")))

    if context.path in ("/", "/ws/audit"):
        query = context.request.path.partition("?")[2]
        for text in (query, query.replace("+", "%2B")):  # a plus sign is a space, or one
            fields = urllib.parse.parse_qs(text, True, encoding="latin-1")
            tokens = [token.encode("latin-1") for token in fields.get("token", [])]
            offered += [("address", token) for token in tokens]
    return offered


IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


def parse_ip(text: str) -> IPAddress | None:
    """Return an address without its scope, IPv4 as such (RFC 4291, 2.5.5.2); None if it is none."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(text.partition("%")[0])
        return getattr(address, "ipv4_mapped", None) or address
    return None


def is_local(host: str) -> bool:
    address = parse_ip(host)
    return host == "localhost" or bool(address and address.is_loopback)


def parse_host(text: str, scheme: str) -> tuple[str, str]:
    """Return the host and its port; the host is empty if it is malformed."""
    match = HOST.fullmatch(text)
    port = "443" if scheme == "https" else "80"
    if match and match[1]:
        port = match[1]
    return (text if match and int(port) <= 65535 else ""), port


def last_value(request: Request, name: str) -> str:
    """Return what the last proxy says in this header."""
    return ",".join(request.headers.get_all(name)).rpartition(",")[2].strip()


def normalize_origin(text: str) -> str:
    """Return an origin as browsers write it, without the default port (RFC 6454, 6.2)."""
    scheme, _, host = text.lower().partition("://")
    default = ":443" if scheme == "https" else ":80"
    return f"{scheme}://{host.removesuffix(default)}"


def csp_hashes(kind: bytes, pages: bytes) -> str:
    """Return the hashes of the scripts or styles that may run (CSP 3, 6.7)."""
    texts = re.findall(rb"<%b>(.*?)</%b>" % (kind, kind), pages, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in texts]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def token_path(options: Options) -> str | None:
    """Return the file of the tokens; None if there is none, or they are in the environment."""
    if options.token_file or b"AUDIT_STREAM_TOKEN" in os.environb:
        return options.token_file
    if folder := os.environ.get("CREDENTIALS_DIRECTORY"):
        path = os.path.join(folder, "token")
        if os.path.lexists(path):  # one that cannot be read must not open the server
            return path
    return None


def read_tokens(options: Options) -> tuple[Token, ...]:
    """Return the access tokens, none if none are given. Raises OSError for bad ones."""
    path = token_path(options)
    text = Path(path).read_bytes() if path else os.environb.get(b"AUDIT_STREAM_TOKEN")
    if options.no_auth or text is None:
        return ()

    tokens = []
    for line in text.splitlines():
        *names, secret = line.rsplit(None, 1) or [b""]
        if secret:
            tokens.append(Token(b"".join(names).strip().decode(errors="replace"), secret))
    source = path or "AUDIT_STREAM_TOKEN"
    if not tokens:
        raise OSError(errno.EINVAL, "the access token is empty", source)
    if any(len(token.secret) < 16 for token in tokens):
        logger.warning("the access token is shorter than 16 characters")
    return tuple(tokens)


def load_tls(options: Options) -> ssl.SSLContext:
    """Return a context for TLS 1.2 or newer. Raises OSError if the files cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_certificate(context, options)
    return context


def load_certificate(context: ssl.SSLContext, options: Options) -> None:
    cert, key = options.tls_cert, options.tls_key
    assert cert and key
    for path in (cert, key):
        open(path, "rb").close()  # so that the error names the file that cannot be read
    try:
        context.load_cert_chain(cert, key, password=lambda: b"")
    except ssl.SSLError as error:
        why = f"or its key cannot be used ({error.reason or error})"
        if error.reason == "KEY_VALUES_MISMATCH":
            why = "is not for that key"
        raise OSError(errno.EINVAL, f"certificate {why}", cert) from error


PLAIN_VALUE = re.compile(r"[\w.:/@+~-]+", re.ASCII)


def record_access(event: str, **fields: object) -> None:
    """Write one line of the access record: who came, left, looked for something or was refused.

    Never a token, never log content.
    """
    words = [f"event={event}"]
    for name, value in fields.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if name in ("query", "detail") or not PLAIN_VALUE.fullmatch(text):
            text = json.dumps(text)
        if value not in ("", None):
            words.append(f"{name}={text}")
    logger.info("access %s", " ".join(words))


# ---- 8 History ----
# Shims

Call, answer, refusal, natural = RequestContext, make_response, error_response, int_parameter


def query_of(connection: ServerConnection) -> dict[str, str]:
    assert connection.request
    query = connection.request.path.partition("?")[2]
    return dict(urllib.parse.parse_qsl(query, keep_blank_values=True, errors="replace"))


class History:
    def __init__(self, zone: datetime.tzinfo) -> None:
        self.zone = zone

    async def respond(self, file: LogFile, context: RequestContext) -> Response:
        return await history(file, context)


# History: search, times

# The filter language. White space is what JavaScript calls so.
SPACE = "\t\n\v\f\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
TERM = re.compile(f'(-?)(?:"([^"]*)"|([^{SPACE}]+))')
SIGN = r"[!-/:-@\[-`{-~]"
TOKEN = re.compile(
    rf"\\[bBdDwWsSt]|\\{SIGN}|\(\?[:=!]|\((?!\?)|[)|.^$]|\[(?!\^?\])\^?(?:\\[dwst]|\\{SIGN}|[^\\\[\]])+\]"
    r"|(?:[*+?]|\{\d{1,4}(?:,\d{0,4})?\})\??(?![*+?{])|[^\\\[\](){}|*+?.^$]"
)
CLASSES = {
    "d": "0-9",
    "w": "A-Za-z0-9_",
    "s": r"\t\n\x0b\f\r \xa0\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}\x{feff}",
}
STAND_INS = r"[\x1a\x{9f}\x{fffd}]"  # what grep gets for bytes that are no character, and for U+FFFD itself
WORD_EDGE = r"(?<=[A-Za-z0-9_])(?![A-Za-z0-9_])|(?<![A-Za-z0-9_])(?=[A-Za-z0-9_])"
# Behind a newline: ten times as fast to look for as `^`.
STAMP = re.compile(rb"\n\[?(\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d(?:[.,]\d{1,9})?)?(?:Z| ?[+-]\d\d(?::?\d\d)?)?)")
# Where grep has no -P: plain text only, in a process of its own as well.
PLAIN_SEARCH = """
import json, sys
case, *terms = json.loads(sys.argv[1])
def fold(text):  # one character for one, as JavaScript does
    ways = ((c.casefold(), c.lower(), c) for c in text)
    return text if case else "".join(next(way for way in each if len(way) == 1) for each in ways)
offset = 0
for line in sys.stdin.buffer:
    text = fold(line.decode().translate({0x1a: 0xfffd, 0x9f: 0xfffd}))
    if all((fold(term) in text) != exclude for exclude, term in terms):
        sys.stdout.buffer.write(b"%d:%b" % (offset, line))
    offset += len(line)
"""


class Term(NamedTuple):
    """One term of the filter language: plain text, or a regular expression for PCRE."""

    exclude: bool
    plain: str | None
    pattern: str


def terms_of(query: str) -> list[Term]:
    """The filter language: all terms must match; see the README. HTTPError for an empty query."""
    terms = []
    for minus, quoted, word in TERM.findall(query):
        if quoted or word:
            plain = quoted or (None if is_expression(word) and re.search(r"[\\^$.*+?()[\]{}|]", word) else word)
            terms.append(Term(bool(minus), plain, as_text(plain) if plain else as_pcre(word)))
    if not terms:
        raise HTTPError(400, "the query is empty")
    return sorted(terms, key=lambda term: term.exclude)  # what must match first: PCRE gives up sooner


def is_expression(word: str) -> bool:
    """Does it consist only of what JavaScript, Python and PCRE mean alike?"""
    tokens = TOKEN.findall(word)
    with contextlib.suppress(re.error, OverflowError, RecursionError):
        return "".join(tokens) == word and not repeats_lookahead(tokens) and bool(re.compile(word))
    return False


def repeats_lookahead(tokens: list[str]) -> bool:
    """Python and PCRE take `(?=a)*`, JavaScript does not."""
    groups = []
    for token, following in zip(tokens, [*tokens[1:], "end"], strict=True):
        if token[0] == "(":
            groups.append(token)
        elif token == ")" and groups and groups.pop() in ("(?=", "(?!") and following[0] in "*+?{":
            return True
    return False


def as_text(text: str) -> str:
    hexed = re.sub(r"[^\w ]", lambda char: f"\\x{{{ord(char[0]):x}}}", text, flags=re.ASCII)
    return hexed.replace(r"\x{fffd}", STAND_INS)


def as_pcre(word: str) -> str:
    """With JavaScript's meaning of the classes; the PCRE2 of Debian 12 takes \\S, \\W and \\D for ASCII."""
    spelled = re.sub(r"\\.|\[(?:\\.|[^\]])*\]", spelled_out, word, flags=re.DOTALL)
    return spelled.replace("\0", r"\x00").replace("\ufffd", STAND_INS)


def spelled_out(piece: re.Match[str]) -> str:
    text, kind = piece[0], piece[0][1:]
    if text[0] == "[":
        return "[" + re.sub(r"\\([dws])", lambda found: CLASSES[found[1]], kind)
    if kind in ("b", "B"):
        return f"(?:{WORD_EDGE})" if kind == "b" else f"(?!{WORD_EDGE})"
    if kind.lower() in CLASSES:
        return f"[{'^' if kind.isupper() else ''}{CLASSES[kind.lower()]}]"
    return text


Stretch = tuple[int, int]  # of the log: its start and its end
Child = tuple[list[str], bool]  # prints matching lines with their offsets; needs characters for bytes that are none?

# What is asked of the whole log: two searches at a time, in child processes, and two walks through the times.
search_places, walk_places = asyncio.Semaphore(2), asyncio.Semaphore(2)
search_threads = concurrent.futures.ThreadPoolExecutor(4, "search")  # two for each: one feeds, one collects


def apart(work: Callable[..., T], *args: Any) -> asyncio.Future[T]:
    return asyncio.get_running_loop().run_in_executor(search_threads, work, *args)


async def walk(work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    try:
        async with asyncio.timeout(5), walk_places:
            return await run_in_thread(work, *args)
    except TimeoutError:
        raise HTTPError(422, "too few lines of the log have a time") from None


async def search(gen: LogFile, query: dict[str, str]) -> dict[str, Any]:
    """HTTPError, when it cannot be done or takes too long."""
    terms = await apart(terms_of, query.get("q", ""))
    limit = natural(query, "limit", 200, 1, 1000)
    before = natural(query, "before", gen.size, 0, 1 << 62)
    child = child_for(terms, query.get("case") == "1")
    try:
        await asyncio.wait_for(search_places.acquire(), 3)
    except TimeoutError:
        raise HTTPError(503, "too many searches at a time", Retry_After="3") from None
    counters["searches_total"] += 1
    try:
        return await backwards(gen, min(before, gen.size), child, limit)
    finally:
        search_places.release()


async def backwards(gen: LogFile, before: int, child: Child, limit: int) -> dict[str, Any]:
    """Growing pieces, from the end to the beginning, for 3 s and 256 MiB at most."""
    begun, size = time.monotonic(), gen.size
    top = at = await apart(line_before, gen, before, size)
    lowest, piece = max(0, top - 256 * MIB), MIB
    found, searched = list[Stretch](), list[Stretch]()
    while at > lowest and len(found) < limit:
        start = await apart(line_before, gen, max(lowest, at - piece), size)
        try:
            async with asyncio.timeout(5.0 if at == top else begun + 3 - time.monotonic()):
                more, fed = await search_piece(gen, start, at, size, child, limit - len(found))
        except TimeoutError:
            if at == top:
                raise HTTPError(422, "the search is too expensive: simplify it") from None
            break
        found, searched, at, piece = more + found, fed + searched, start, piece * 4
    matches = await apart(matches_at, gen, found)
    at = matches[0]["start"] if len(found) >= limit or len(matches) < len(found) else at
    edges = [at, *(offset for stretch in searched for offset in stretch if stretch[1] > at), top]
    skipped = [[start, end] for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]
    answer = {"matches": matches, "scanned": [at, top], "size": size}
    return answer | ({"skipped": skipped} if skipped else {})


async def search_piece(
    gen: LogFile, start: int, end: int, size: int, child: Child, most: int
) -> tuple[list[Stretch], list[Stretch]]:
    """The last matches between two offsets, and the stretches that were searched."""
    command, mend = child
    process = start_child(command)
    # Each thread owns one end of a pipe and closes it; ending the process is what ends both.
    feeding = apart(feed_child, whole_lines(gen, start, end, size), mend, process.stdin)
    threads: list[asyncio.Future[Any]] = [feeding, apart(collect, process.stdout, most)]
    try:
        await asyncio.wait(threads)
    except asyncio.CancelledError:
        process.kill()
        await asyncio.wait(threads)
        raise
    finally:
        process.wait()
    if process.returncode not in (0, 1):  # 2: the limits of PCRE; -9, -24: ours
        raise HTTPError(422, "the search is too expensive: simplify it")
    fed, found = feeding.result(), []
    offsets = list(itertools.accumulate((until - at for at, until in fed), initial=0))
    for offset, length in threads[1].result():
        number = bisect.bisect(offsets, offset) - 1
        at = fed[number][0] + offset - offsets[number]
        found.append((at, min(at + length, end)))
    return found, fed


@functools.cache
def has_pcre() -> bool:
    with contextlib.suppress(OSError):
        quiet = subprocess.DEVNULL
        return subprocess.run(["grep", "-abP", "-e", "x"], stdin=quiet, stdout=quiet, stderr=quiet).returncode == 1
    return False


def child_for(terms: list[Term], case: bool) -> Child:
    """HTTPError where there is none for a query."""
    if has_pcre():
        first, alone = terms[0], len(terms) == 1 and not terms[0].exclude
        every = "^" + "".join(f"(?{'!' if exclude else '='}.*(?:{pattern}))" for exclude, _, pattern in terms)
        mend = not (alone and first.plain) or "\ufffd" in first.plain  # else it can only be found between such bytes
        return ["grep", "-abP" if case else "-abPi", "-e", first.pattern if alone else every], mend
    if any(term.plain is None for term in terms):
        raise HTTPError(501, "regular expressions need GNU grep with -P on this server; plain text does not")
    return [sys.executable, "-I", "-c", PLAIN_SEARCH, json.dumps([case, *(term[:2] for term in terms)])], True


def start_child(command: list[str]) -> subprocess.Popen[bytes]:
    """With limits, so that it ends even if we do not live to end it."""
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    environment = {"LC_ALL": "C.UTF-8", "PATH": os.environ.get("PATH", os.defpath)}
    try:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=quiet, env=environment)
    except OSError as error:
        raise HTTPError(503, f"no search can be started: {error.strerror}") from None
    with contextlib.suppress(OSError, ValueError):
        resource.prlimit(process.pid, resource.RLIMIT_AS, (512 * MIB, 512 * MIB))
        resource.prlimit(process.pid, resource.RLIMIT_CPU, (10, 10))
    return process


def line_before(gen: LogFile, offset: int, size: int) -> int:
    """The last line start at or before offset; offset itself within a line over 1 MiB."""
    for most in (4 * KIB, MIB + 1) if 0 < offset < size else ():
        low = max(0, offset - most)
        at = gen.read_bytes(low, offset).rfind(b"\n") + 1
        if at or not low:
            return low + at
    return offset


def whole_lines(gen: LogFile, start: int, end: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Where they begin, and many at a time; without those over 1 MiB, and holes."""
    at = end_of_line(gen, start - 1, end) if start else 0
    while at < end:
        data = gen.read_data(at, min(end, at + MIB + 1))
        whole = len(data) if at + len(data) == size else data.rfind(b"\n") + 1
        if whole:
            yield at, data[:whole]
        at = at + whole if whole else end_of_line(gen, at, end)


def end_of_line(gen: LogFile, at: int, end: int) -> int:
    """Behind the next newline, or behind the next hole."""
    while at < end:
        data = gen.read_data(at, min(end, at + MIB))
        if not data:
            return min(end, gen.next_data(at) or end)
        if cut := data.find(b"\n") + 1:
            return at + cut
        at += len(data)
    return end


def feed_child(lines: Iterator[tuple[int, bytes]], mend: bool, pipe: IO[bytes]) -> list[Stretch]:
    """In a thread: the lines to the child. -> which stretches of the log it got"""
    with contextlib.suppress(OSError, AttributeError):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, MIB)
    fed = []
    with contextlib.suppress(BrokenPipeError), pipe:
        for at, data in lines:
            pipe.write(same_length(data) if mend else data)
            fed.append((at, at + len(data)))
    return fed


def same_length(data: bytes) -> bytes:
    """Valid UTF-8, for PCRE: what is no character becomes one that is as long as it, and neither letter nor space."""
    at = len(data) if data.isascii() else 0
    try:
        while at < len(data):  # in pieces that the processor's cache holds: twice as fast
            at += codecs.utf_8_decode(data[at : at + 64 * KIB], "strict", at + 64 * KIB >= len(data))[1]
        return data
    except UnicodeDecodeError:
        return data.decode(errors="audit_stream.stand_in").encode()


def stand_in(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\x1a\x9f\ufffd"[error.end - error.start - 1], error.end


codecs.register_error("audit_stream.stand_in", stand_in)


def collect(pipe: IO[bytes], most: int) -> collections.deque[Stretch]:
    """In a thread: offset and length of the last matches."""
    with pipe:
        matches = (line.partition(b":") for line in pipe)  # at most 1 MiB, as they were fed
        return collections.deque(((int(offset), len(line)) for offset, _, line in matches), most)


def matches_at(gen: LogFile, places: list[Stretch]) -> list[dict[str, Any]]:
    """The last of these matches, 1 MiB of text or little more, each with its first 16 KiB."""
    matches: list[dict[str, Any]] = []
    left, most = MIB, 16 * KIB
    for start, end in reversed(places):
        if left > 0:
            text = gen.read_bytes(start, start + min(end - start, most + 1)).removesuffix(b"\n")[:most]
            cut = whole_characters(text) if end - start > most else len(text)
            matches.append({"start": start, "end": end, "text": text[:cut].decode(errors="replace")})
            left -= min(end - start, most)
    return matches[::-1]


def parse_time(text: str) -> float | None:
    """In seconds since 1970; without a zone it is UTC."""
    with contextlib.suppress(ValueError, OverflowError):
        moment = datetime.datetime.fromisoformat(re.sub(r" (?=[+-])", "", text))
        return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
    return None


def timeline(gen: LogFile, points: int, unwanted: threading.Event) -> dict[str, Any]:
    """The times at the beginning of lines that are spread evenly over the log."""
    size = gen.size
    wanted = (size * n // points for n in range(points) if size and not unwanted.is_set())
    offsets = sorted({line_before(gen, offset, size) for offset in wanted})
    stamps = (STAMP.match(b"\n" + gen.read_bytes(at, at + 64)) for at in offsets)
    times = (parse_time(stamp[1].decode()) if stamp else None for stamp in stamps)
    return {"size": size, "points": list(zip(offsets, times, strict=True))}


def seek(gen: LogFile, wanted: float, unwanted: threading.Event) -> dict[str, Any]:
    """The first line at or after a time; a line without one belongs to the line above."""
    low, high = 0, gen.size
    found: tuple[int, float | None] = high, None
    while high - low > 64 * KIB:
        middle = (low + high) // 2
        line = next(timed_lines(gen, middle, high, unwanted), None)
        if line and line[1] < wanted:
            low = line[0]
        else:
            high, found = middle, line or found
    found = next((line for line in timed_lines(gen, low, high, unwanted) if line[1] >= wanted), found)
    return dict(zip(("offset", "time"), found, strict=True))


def timed_lines(gen: LogFile, start: int, end: int, unwanted: threading.Event) -> Iterator[tuple[int, float]]:
    """Offset and time of the lines that begin from start to end."""
    at = end_of_line(gen, start - 1, end) if start else 0
    while at < end and not unwanted.is_set():
        data = gen.read_data(at, at + 64 * KIB)
        for stamp in STAMP.finditer(b"\n" + data):
            if at + stamp.start() < end and (time := parse_time(stamp[1].decode())) is not None:
                yield at + stamp.start(), time
        whole_lines = data.rfind(b"\n") + 1
        at = at + whole_lines if whole_lines else end_of_line(gen, at, end)


async def history(gen: LogFile, call: RequestContext) -> Response:
    """The log as it is, by range, search or time, unless it is another one by now."""
    etag = f'"{gen.name}"'
    try:
        if not {"*", etag} & {tag.strip() for tag in call.request.headers.get("If-Match", "*").split(",")}:
            raise HTTPError(412, "the log is another one by now")
        if call.path == "/api/audit":
            response = await excerpt(gen, call.request.headers.get("Range", ""))
        else:
            found = await question(gen, call)
            response = answer(200, json.dumps(found, ensure_ascii=False).encode(), JSON)
    except HTTPError as trouble:
        response = refusal(call.path, trouble)
    response.headers["ETag"] = etag
    return response


def question(gen: LogFile, call: RequestContext) -> Coroutine[Any, Any, dict[str, Any]]:
    query = query_of(call.connection)
    if call.path == "/api/search":
        return search(gen, query)
    if call.path == "/api/timeline":
        return walk(timeline, gen, natural(query, "points", 200, 1, 2000))
    return walk(seek, gen, wanted_time(query))


def wanted_time(query: dict[str, str]) -> float:
    text = query.get("time", "").strip("[] ")
    # A plus sign in an address is a space.
    wanted = parse_time(re.sub(r"(?<=:\d\d)([.,]\d+)? (?=\d\d(:?\d\d)?$)", r"\1+", text))
    if wanted is None:
        raise HTTPError(400, "time is no date and time as in 2025-12-17T17:40:37Z")
    return wanted


async def excerpt(gen: LogFile, wanted: str) -> Response:
    """The latest whole lines, or the range that is wanted, at most 1 MiB of it (RFC 9110, section 14)."""
    if not wanted.lower().startswith("bytes="):
        return answer(200, await asyncio.to_thread(latest_lines, gen), TEXT, Accept_Ranges="bytes")
    match = re.fullmatch(r"bytes=[ \t]*(\d{0,4000})-(\d{0,4000})[ \t]*", wanted, re.ASCII | re.IGNORECASE)
    first, last = match.groups() if match else ("", "")
    size = gen.size
    start = int(first) if first else max(0, size - int(last or 0))
    end = min(int(last) + 1, size) if first and last else size
    if start >= end:
        raise HTTPError(416, "there is no such range", Accept_Ranges="bytes", Content_Range=f"bytes */{size}")
    body = await asyncio.to_thread(gen.read_bytes, start, start + min(end - start, MIB))
    content = f"bytes {start}-{start + len(body) - 1}/{size}"
    return answer(206, body, TEXT, Accept_Ranges="bytes", Content_Range=content)


def latest_lines(gen: LogFile) -> bytes:
    end = gen.complete_end()
    start = gen.line_start(end, 64 * KIB)
    return gen.read_bytes(start, end)


# ---- 9 Proof ----
class Proof:
    def __init__(self, follower: LogFollower) -> None:
        self.follower = follower

    async def respond(self, context: RequestContext) -> Response:
        if context.path == "/api/record":
            return make_response(204, b"", TEXT)
        raise HTTPError(404, "not found")


def verify_receipts(options: Options) -> int:
    raise OSError(errno.ENOSYS, "not there yet", options.log)


async def write_anchors(proof: Proof, anchor_s: float) -> None:
    await asyncio.Event().wait()


# ---- 10 Service ---------------------------------------------------------------------------------
#
# One process from its start to its stop, and the limits of the machine that it lives in.

START_TIME_S = time.time()
WATCHDOG_S = int(os.environ.get("WATCHDOG_USEC", 86_400_000_000)) / 2e6  # sd_watchdog_enabled(3)
ACCEPT_BATCH = 32  # connections in one go: asyncio would take as many as may wait
APPEND_WAIT_S = 5.0  # for the lock, which everybody who may read the log may hold


async def run(options: Options, access: AccessControl, page: bytes, limits: Limits) -> None:
    """Serve until SIGTERM or SIGINT. Raises OSError if the address is not to be had."""
    listener = open_listener(options)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(LoopErrorLog())
    # A full collection with 10,000 connections stops the loop for a second, and finds nothing:
    # see Connection.break_cycles.
    gc.freeze()
    gc.set_threshold(10_000, 10, 20)

    # What is served, and to whom.
    follower = LogFollower(options.log, options.interval)
    await follower.check()
    connections = Connections(limits.viewers, limits.others, access.tls)
    broadcaster = Broadcaster(follower, connections)
    site = Site(access, broadcaster, History(options.zone), Proof(follower), page)

    # Signals.
    stop, reload = asyncio.Event(), asyncio.Event()
    for number, event in ((signal.SIGTERM, stop), (signal.SIGINT, stop), (signal.SIGHUP, reload)):
        loop.add_signal_handler(number, event.set)

    # Open the port, then say so.
    server = await serve(
        functools.partial(handle_viewer, broadcaster, options.initial),
        sock=listener,
        backlog=ACCEPT_BATCH,
        process_request=functools.partial(respond, site),
        select_subprotocol=lambda _, offered: PROTOCOL if PROTOCOL in offered else None,
        create_connection=functools.partial(Connection, connections),  # type: ignore[arg-type]
        server_header=None,
        compression=None,
        max_size=KIB,
        open_timeout=None,  # an answer takes as long as it moves; see Connections.abort_stalled
        ping_timeout=None,  # pongs wait behind data
    )
    listener.listen(min(1024, limits.others // 2))  # the default drops some in a storm
    with contextlib.suppress(OSError):  # wherever standard output leads, even to a full disk
        os.write(1, f"{address_to_open(options, access, listener)}\n".encode())
    sd_notify("READY=1")

    # Work until the stop.
    works = [
        follow(follower, broadcaster),
        connections.abort_stalled(),
        reload_credentials(access, connections, reload),
        write_anchors(site.proof, options.anchor),
    ]
    if options.expect_every:
        works.append(watch_for_silence(options.expect_every))
    if options.demo:
        works.append(write_demo_entries(options.log))
    try:
        await run_until(stop, works)
    finally:
        sd_notify("STOPPING=1")
        for number in (signal.SIGTERM, signal.SIGINT):  # a second one must not spoil the exit code
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        await close(server, connections)


async def run_until(stop: asyncio.Event, works: Iterable[Coroutine[Any, Any, None]]) -> None:
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(work) for work in works]
        await stop.wait()
        for task in running:
            task.cancel()


async def close(server: Server, connections: Connections) -> None:
    """Close the viewers with 1001, and abort whatever has not ended after a second."""
    server.close()
    closed = asyncio.create_task(server.wait_closed())
    for connection in list(connections.awaiting_request):
        connection.abort()
    await asyncio.wait([closed], timeout=1)
    while not closed.done():
        connections.abort_all()
        await asyncio.wait([closed], timeout=0.1)


async def reload_credentials(
    access: AccessControl, connections: Connections, wanted: asyncio.Event
) -> None:
    while await wanted.wait():
        wanted.clear()
        await access.reload(connections.viewers)


async def watch_for_silence(expect_s: float) -> None:
    """Say so if the log has been silent for longer than it should, and when that ends."""
    seen, since, silent = 0, time.monotonic(), False
    while True:
        silence_s = time.monotonic() - since
        if counters["read_bytes_total"] != seen:
            if silent:
                logger.info("the log goes on after %.0f s of silence", silence_s)
            seen, since, silent = counters["read_bytes_total"], time.monotonic(), False
        elif silence_s > expect_s and not silent:
            silent = True
            counters["silences_total"] += 1
            raise_alarm(f"the log has been silent for longer than {expect_s:g} s")
        counters["silent_seconds"] = int(time.monotonic() - since)
        await asyncio.sleep(min(1.0, expect_s / 4))


def raise_alarm(sentence: str) -> None:
    """Write a line that the journal takes for an error (sd-daemon(3))."""
    with contextlib.suppress(OSError):
        print(f"<3>audit_stream: {sentence}", file=sys.stderr, flush=True)


def open_listener(options: Options) -> socket.socket:
    """Return a listening socket; `::` takes IPv4 too. Raises OSError if there is none."""
    host, kind = options.host, socket.SOCK_STREAM
    try:
        family, *_, address = socket.getaddrinfo(host, options.port, type=kind)[0]
    except UnicodeError:
        raise OSError(errno.EINVAL, "is not a valid host name", host) from None
    both = host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server(
        address, family=family, dualstack_ipv6=both, reuse_port=options.reuse_port
    )


def address_to_open(options: Options, access: AccessControl, listener: socket.socket) -> str:
    """Return the URL as it was given, or with this machine's name if it listens on all."""
    host = options.host
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    if ":" in host:
        host = f"[{host}]"
    scheme = "https" if access.tls else "http"
    token = f"?token={access.tokens[0].secret.decode()}" if access.generated else ""
    return f"{scheme}://{host}:{listener.getsockname()[1]}/{token}"


# Limits: file descriptors, and what asyncio says once there is none left.


class Limits(NamedTuple):
    """How many connections of which kind there may be."""

    viewers: int
    others: int


def raise_fd_limit(max_viewers: int) -> Limits:
    """Raise the soft limit of open files as far as it goes; return what fits into it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for soft in (hard, 65536, 10240):  # macOS names no hard limit, and takes 10240
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            break

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        soft = 1 << 20
    others = min(4096, soft // 4)
    fitting = soft - others - min(256, soft // 4)
    if max_viewers > fitting:
        logger.warning("only %d viewers: the limit of open files is %d", fitting, soft)
    return Limits(min(max_viewers, fitting), others)


class LoopErrorLog:
    """What fails outside of any task, once a minute: with no file descriptor left it is often."""

    last_s = -60.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, asyncio.CancelledError):
            return  # at the stop
        if not isinstance(error, OSError):
            return loop.default_exception_handler(context)
        if time.monotonic() - self.last_s > 60:
            self.last_s = time.monotonic()
            logger.warning("%s: %s", context["message"], error.strerror)


def sd_notify(state: str) -> None:
    """Tell systemd (sd_notify(3)); nothing happens without it."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        unix, datagram = socket.AF_UNIX, socket.SOCK_DGRAM
        with contextlib.suppress(OSError), socket.socket(unix, datagram) as channel:
            channel.sendto(state.encode(), re.sub("^@", "\0", address))


METRICS = {
    "answer_bytes": "Bytes in answers that are under way.",
    "behind_bytes": "Bytes in the log that were not published yet.",
    "build_info": "Versions, as labels.",
    "generations_total": "Lives of the log that began, by reason.",
    "read_bytes_total": "Bytes of the log that were read and published.",
    "read_lines_total": "Lines of the log that were read and published.",
    "refused_requests_total": "Requests that were refused, by status.",
    "searches_total": "Searches that were begun.",
    "sent_bytes_total": "Bytes of the log that were sent to viewers.",
    "silences_total": "Times that the log was silent for longer than --expect-every.",
    "silent_seconds": "Seconds since the log last grew, with --expect-every.",
    "start_time_seconds": "Start of the process, in seconds since 1970.",
    "viewers": "Viewers, by state.",
}


def metrics(broadcaster: Broadcaster) -> str:
    """Return the text format of Prometheus."""
    connections, current = broadcaster.connections, broadcaster.follower.current
    live = len(broadcaster.live)
    versions = f'version="{VERSION}",websockets="{websockets.version.version}"'
    now = {
        'viewers{state="live"}': live,
        'viewers{state="catching_up"}': len(connections.viewers) - live,
        "answer_bytes": connections.answer_bytes,
        "behind_bytes": max(0, current.size - current.end),
        "start_time_seconds": START_TIME_S,
        f"build_info{{{versions}}}": 1,
    }

    lines: list[str] = []
    family = ""
    for name, value in sorted({**now, **counters}.items()):
        if name.partition("{")[0] != family:
            family = name.partition("{")[0]
            kind = "counter" if family.endswith("_total") else "gauge"
            lines.append(f"# HELP audit_stream_{family} {METRICS.get(family, family)}")
            lines.append(f"# TYPE audit_stream_{family} {kind}")
        lines.append(f"audit_stream_{name} {value}")
    return "\n".join(lines) + "\n"


# Writing to the log: --append and --demo.


def append_entry(path: str, text: str) -> None:
    """Add an entry, durably, whole and on a line of its own. Raises OSError if it is not there."""
    flags = os.O_RDWR | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:  # a link that leads nowhere does not say where to create a file
        fd = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o640)

    with open(fd, "r+b", buffering=0) as log:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        lock(fd, path)
        now = datetime.datetime.now(datetime.UTC)
        entry = os.fsencode(f"[{now:%Y-%m-%dT%H:%M:%S.%fZ}] {text}\n")
        size = os.fstat(fd).st_size
        if size > 0 and os.pread(fd, 1, size - 1) != b"\n":
            entry = b"\n" + entry

        written = 0
        try:
            while written < len(entry):
                written += log.write(entry[written:])
        except OSError:
            if os.fstat(fd).st_size == size + written:
                os.truncate(fd, size)  # all of it or nothing
            raise
        os.fsync(fd)


def lock(fd: int, path: str) -> None:
    """Raises OSError if another process keeps the lock."""
    deadline = time.monotonic() + APPEND_WAIT_S
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise OSError(errno.EAGAIN, "another process keeps it locked", path) from None
        time.sleep(0.02)


DEMO_ENTRIES = (
    "Auto-repair: Created PostgreSQL database quantum",
    "Auto-repair: Restarted Grafana container",
    "Auto-repair: Fixed database issue",
    "Auto-repair: Retrained xgboost model",
    "Auto-repair: WARNING disk usage at 91 %",
    "Auto-repair: ERROR restart of prometheus failed, trying again",
    "Weekly self-heal: Completed – ✅ All checks passed",
)


async def write_demo_entries(path: str) -> None:
    while True:
        append_entry(path, random.choice(DEMO_ENTRIES))
        await asyncio.sleep(1)


# ---- 11 Command line ----------------------------------------------------------------------------
#
# Options, checked, and what is done with them. A failure is one line on standard error.


@dataclasses.dataclass(frozen=True)
class Options:
    """What was said on the command line."""

    log: str
    host: str
    port: int
    interval: float
    initial: int
    zone: datetime.tzinfo
    token_file: str | None
    no_auth: bool
    tls_cert: str | None
    tls_key: str | None
    allow_host: list[str]
    allow_origin: list[str]
    trust_proxy: str | None  # "loopback", or an address
    max_viewers: int
    rate_limit: int
    reuse_port: bool
    append: str | None
    anchor: float  # seconds; 0 is never
    verify: str | None
    expect_every: float | None  # seconds
    demo: bool


def main(argv: list[str] | None = None) -> int:
    """Return 0 after a stop, 1 for what cannot be done, 2 for bad usage."""
    logging.basicConfig(format="audit_stream: %(message)s")
    logger.setLevel(logging.INFO)
    logging.raiseExceptions = False  # standard error may be on a full disk
    logging.getLogger("websockets").setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # a line for each pong after a reset
    warnings.simplefilter("ignore", FutureWarning)  # [a&&b]: it may get a meaning one day
    options = parse_options(argv)

    try:
        if options.verify is not None:
            code = verify_receipts(options)
        elif options.append is not None:
            code = 0
            append_entry(options.log, options.append)
        else:
            code = serve_log(options)
    except OSError as error:
        subject = options.log
        if options.verify is None and options.append is None:
            subject = f"{options.host}:{options.port}"
        reason = error.strerror or error
        print(f"audit_stream.py: {error.filename or subject}: {reason}", file=sys.stderr)
        code = 1

    try:
        sys.stderr.flush()
    except OSError:  # a full disk: what is left in the buffer must not spoil the exit code
        with contextlib.suppress(OSError):
            sys.stderr.close()
    return code


def serve_log(options: Options) -> int:
    page = read_page()
    access = AccessControl(options, page)
    if access.generated and options.reuse_port:
        argument_parser().error("--reuse-port needs a token that all processes know")
    limits = raise_fd_limit(options.max_viewers)

    with demo_folder() if options.demo else contextlib.nullcontext("") as folder:
        if options.demo:
            options = dataclasses.replace(options, log=os.path.join(folder, "DEMO_AUDIT.log"))
        asyncio.run(run(options, access, page, limits))
    return 0


def read_page() -> bytes:
    """Return the page that lies beside this file. Raises OSError if there is none."""
    folder = Path(__file__).resolve().parent
    for name in ("static", "audit_stream_static"):  # the second one is pip's
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return (folder / name / "index.html").read_bytes()
    sentence = "the page is missing: copy audit_stream.py and the folder static (no zipapp)"
    raise OSError(errno.ENOENT, sentence, str(folder / "static" / "index.html"))


def demo_folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory()
    except OSError as error:
        raise OSError(error.errno, error.strerror, "--demo") from None


def parse_options(argv: list[str] | None) -> Options:
    options = Options(**vars(argument_parser().parse_args(argv)))
    own_log = options.append is not None or options.verify is not None
    line = options.append or ""
    wrong = {
        "one of --log PATH and --demo is needed": not options.log and not options.demo,
        "--demo has a log of its own": options.log and options.demo,
        "--append and --verify need --log PATH": own_log and options.demo,
        "--append and --verify exclude each other": None not in (options.append, options.verify),
        "--append takes one line of text": "\n" in line or "\r" in line,
        "--tls-cert and --tls-key need each other": bool(options.tls_cert) != bool(options.tls_key),
        "--no-auth and --token-file exclude each other": options.no_auth and options.token_file,
        "--host is empty": not options.host,
    }
    for sentence, applies in wrong.items():
        if applies:
            argument_parser().error(sentence)
    return options


class ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"audit_stream.py: {message}\n")


def argument_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="audit_stream.py",
        description="Watch an audit log live in a browser.",
        allow_abbrev=False,
    )
    option = parser.add_argument
    option("--log", metavar="PATH", help="the log; it may appear later, and may be rotated")
    option("--host", metavar="ADDRESS", default="127.0.0.1", help="listen address (%(default)s)")
    option("--port", metavar="N", type=integer(0, 65535), default=8080, help="0: any (8080)")
    option("--interval", metavar="SECONDS", type=seconds, default=3.0, help="of size checks (3)")
    option("--initial", metavar="BYTES", type=integer(0, MAX_MESSAGE), default=1000, help=INITIAL)
    option("--zone", metavar="ZONE", type=time_zone, default=datetime.UTC, help=ZONE)
    option("--token-file", metavar="PATH", help="tokens, each TOKEN or NAME TOKEN on its line")
    option("--no-auth", action="store_true", help="open to everyone who can reach the port")
    option("--tls-cert", metavar="PATH", help="serve HTTPS and WSS; read again on SIGHUP")
    option("--tls-key", metavar="PATH", help="the key of the certificate")
    option("--allow-host", metavar="NAME", type=str.lower, action="append", default=[], help=HOSTS)
    option("--allow-origin", metavar="ORIGIN", type=origin, action="append", default=[], help=PAGES)
    option("--trust-proxy", metavar="ADDRESS", type=proxy, nargs="?", const="loopback", help=PROXY)
    option("--max-viewers", metavar="N", type=integer(1, 10**6), default=10000, help="(10000)")
    option("--rate-limit", metavar="N", type=integer(0, 10**6), default=600, help=RATE)
    option("--reuse-port", action="store_true", help="several processes may share the port")
    option("--append", metavar="TEXT", help="write an entry to the log and exit")
    option("--anchor", metavar="SECONDS", type=seconds_or_0, default=3600.0, help=ANCHOR)
    option("--verify", metavar="RECEIPT", help="does the log hold it? - reads standard input")
    option("--expect-every", metavar="SECONDS", type=seconds, help="say so if it is silent longer")
    option("--demo", action="store_true", help="follow a throw-away log with an entry a second")
    option("--version", action="version", version=f"audit_stream.py {VERSION}")
    return parser


INITIAL = "how much of the end of the log a new viewer gets (1000)"
ZONE = "of time stamps that name none: +01:00 or Europe/Berlin (UTC)"
HOSTS = "a further name of an open server"
PAGES = "a further page origin that may open the WebSocket"
PROXY = "take its X-Forwarded-For, X-Forwarded-Proto and X-Forwarded-User"
RATE = "answers a minute and client address; 0: no limit (600)"
ANCHOR = "between two receipts on standard output; 0: never (3600)"


def integer(low: int, high: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            return int_in_range(text, repr(text), low, high)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 86400:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} must be seconds above 0, at most 86400")


def seconds_or_0(text: str) -> float:
    return 0.0 if text == "0" else seconds(text)


def time_zone(text: str) -> datetime.tzinfo:
    if match := re.fullmatch(r"([+-])([01]\d|2[0-3]):?([0-5]\d)", text, re.ASCII):
        offset = datetime.timedelta(hours=int(match[2]), minutes=int(match[3]))
        return datetime.timezone(-offset if match[1] == "-" else offset)
    if text.upper() in ("UTC", "Z"):
        return datetime.UTC
    with contextlib.suppress(zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        return zoneinfo.ZoneInfo(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not an offset like +01:00 nor a known time zone")


def origin(text: str) -> str:
    if not re.fullmatch(r"https?://[^/\s?#@]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an origin like https://example.org:8443")
    return normalize_origin(text)


def proxy(text: str) -> str:
    if text != "loopback" and not parse_ip(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an IP address")
    return str(parse_ip(text) or text)


if __name__ == "__main__":
    sys.exit(main())
