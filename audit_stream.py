#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=17"]
# ///
"""Watch an audit log live in a browser, and trust what you see.

    the log -> the stream -> one viewer -> history -> HTTP -> the doors -> running -> command line

This file reads in the order in which a log line travels. One idea carries it: the file is the queue.
A viewer is a position in it. The first screen, catching up when slow, resuming after a cut and passing
through a rotation are the same step, which reads the file from a position; a viewer at the end is live
and gets what everyone gets, in one broadcast.

Guarantees: joined, the frames that a viewer gets are the log, no byte twice and none missing, through
rotations, reconnects and restarts; where bytes are truly gone, a frame says so at that place. The bytes
around what was sent are compared with the file at every read: a cut or rewritten log is noticed at any size.

Limits: one log; a frame holds 128 KiB of it, a cursor resumes through at most 64 rotated files beside it,
and only the first and last 4 KiB of what was sent are compared with the file.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import bisect
import codecs
import collections
import concurrent.futures
import contextlib
import ctypes
import datetime
import email.utils
import errno
import fcntl
import functools
import gzip
import hashlib
import hmac
import http
import ipaddress
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import secrets
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import urllib.parse
import warnings
import weakref
import zlib
from collections.abc import Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, TypeVar

try:
    import websockets.version
    from websockets.asyncio.server import Server, ServerConnection, broadcast, serve
    from websockets.datastructures import Headers
    from websockets.exceptions import ConnectionClosed
    from websockets.http11 import Request, Response
    from websockets.typing import Subprotocol

    if int(websockets.version.version.partition(".")[0]) < 17:
        raise ImportError
except ImportError:
    sys.exit("audit_stream.py: websockets 17 or newer is missing; type: python3 -m pip install 'websockets>=17'")

VERSION = "1.0"
STARTED = time.time()
KIB, MIB = 1024, 1024 * 1024
EDGE = 4 * KIB  # so many of the first and of the last published bytes are compared with the file
FRAME = 128 * KIB  # of the log in one frame; as JSON at most six times as long
BROADCAST = 64 * KIB  # a larger batch everyone reads from the file
BACKLOG = 64 * KIB  # in a viewer's write buffer; with more it is no longer live
WINDOW = 0.02  # seconds between two checks: bursts are put together
LATE = 30.0  # seconds for which a rotated file is still read
LATE_FILES = 60  # so many of them; a cursor names 64
HESITATE = 1.0  # seconds until a missing or emptied log is one: a rotation takes less
QUIET = 10.0  # seconds without a frame until `checked` is sent
STUCK = 60.0  # seconds without progress until a viewer is given up
SIBLINGS = 64  # rotated files that are looked at
UNPACKED = 1024 * MIB  # of .gz files for one resumed viewer
WATCHDOG = int(os.environ.get("WATCHDOG_USEC", 86_400_000_000)) / 2e6  # seconds; sd_watchdog_enabled(3)
PROTOCOL = Subprotocol("audit.v1.json")
TEXT, HTML, JSON = "text/plain; charset=utf-8", "text/html; charset=utf-8", "application/json"
NOTHING = "0.nothing-was-sent-yet"  # the cursor before the first byte of the first file

T = TypeVar("T")
logger = logging.getLogger("audit_stream")
counted: collections.Counter[str] = collections.Counter()  # what /metrics says


# The log: its lives, and the files beside it


class Marks(NamedTuple):
    """What was published of a file: how far, and its first and last 4 KiB."""

    end: int = 0
    head: bytes = b""
    tail: bytes = b""


class Generation:
    """One life of the log, its file kept open as long as anybody needs it."""

    living: weakref.WeakValueDictionary[str, Generation] = weakref.WeakValueDictionary()
    known: dict[str, Marks] = {}  # by name, 8 KiB for each of the last 256

    def __init__(self, fd: int, start: int = 0) -> None:
        self.fd = fd
        self.marks = Marks()
        self.modified = 0  # of the file when it was last read, in ns
        self.grown = (0, 0.0)  # where it ended, and since when
        self.given = ""
        self.mark(start)

    def __del__(self) -> None:
        os.close(self.fd)

    @property
    def end(self) -> int:
        return self.marks.end

    @property
    def size(self) -> int:
        return os.fstat(self.fd).st_size

    @property
    def name(self) -> str:
        """Derived from the first line, of a long one from its first 4 KiB; before that is there, by chance."""
        if not self.given:
            first, newline, _ = os.pread(self.fd, EDGE, 0).partition(b"\n")
            base = hashlib.sha256(first if newline or len(first) == EDGE else os.urandom(16)).hexdigest()[:16]
            names = itertools.chain([base], (f"{base}-{n}" for n in itertools.count(2)))
            self.given = next(name for name in names if self.may_be(name))
            self.living[self.given] = self
        return self.given

    def may_be(self, name: str) -> bool:
        """Is it the life that has this name, or has none?"""
        other = self.living.get(name)
        if other and os.fstat(other.fd).st_nlink and not os.path.sameopenfile(other.fd, self.fd):
            return False
        return name not in self.known or self.has(self.known[name])

    def has(self, marks: Marks) -> bool:
        """Does the file begin with all that was published, as far as its first and last 4 KiB tell?"""
        end, head, tail = marks
        return os.pread(self.fd, len(head), 0) == head and os.pread(self.fd, len(tail), end - len(tail)) == tail

    def intact(self) -> bool:
        return self.has(self.marks)

    def marks_at(self, end: int) -> Marks:
        edge = min(EDGE, end)
        return Marks(end, os.pread(self.fd, edge, 0), os.pread(self.fd, edge, end - edge))

    def mark(self, end: int) -> None:
        """Everything before end is published from now on."""
        marks = self.marks_at(end)
        if len(marks.tail) < min(EDGE, end):
            return  # cut in this moment; the next check sees it
        self.marks = marks
        self.modified = os.fstat(self.fd).st_mtime_ns
        named = self.given or b"\n" in self.marks.head or len(self.marks.head) == EDGE
        if named and end >= self.known.get(self.name, Marks()).end:  # what was cut off stays another life's
            self.known[self.name] = self.marks
            while len(self.known) > 256:
                del self.known[next(iter(self.known))]

    def is_packed_as(self, other: Generation) -> bool:
        """Has it no name left, and does the other one hold all of it?"""
        end = self.size
        return os.fstat(self.fd).st_nlink == 0 and other.size == end and other.has(self.marks_at(end))

    def swap(self, other: Generation) -> None:
        """Go on in another file that has the same bytes."""
        os.dup2(other.fd, self.fd, inheritable=False)

    def read(self, start: int, end: int) -> bytes:
        """The bytes from start to end, or to the next hole and the NULs beside it."""
        data = os.pread(self.fd, end - start, start)
        if b"\0" in data and (hole := os.lseek(self.fd, start, os.SEEK_HOLE)) < start + len(data):
            return data[: hole - start].rstrip(b"\0")
        return data

    def after_hole(self, start: int) -> int | None:
        """Where the log goes on behind the next hole (lseek(2), SEEK_DATA); None where only room follows."""
        with contextlib.suppress(OSError):  # ENXIO: nothing there yet
            at = os.lseek(self.fd, start, os.SEEK_HOLE)
            for _ in range(16):  # of 256 KiB: allocated and read before, room is no hole but NULs
                at = os.lseek(self.fd, at, os.SEEK_DATA)
                block = os.pread(self.fd, 256 * KIB, at)
                if data := block.lstrip(b"\0"):
                    return at + len(block) - len(data)
                at += len(block)
        return None

    def goes_on(self, offset: int) -> bool:
        """Is there more behind these NULs than room?"""
        size = self.size
        return size > offset and os.pread(self.fd, 1, size - 1) not in (b"", b"\0")

    def settled(self) -> int:
        """Where the last whole line ends; within a line longer than a frame, where the file does."""
        end = self.last_byte()
        low = max(0, end - FRAME)
        data = os.pread(self.fd, end - low, low)
        return low + (data.rfind(b"\n") + 1 or (whole_characters(data) if low else 0))

    def last_byte(self) -> int:
        """The end of the file, without holes and NULs."""
        if os.pread(self.fd, 1, max(0, self.size - 1)) != b"\0":
            return self.size
        stretches = [0]
        with contextlib.suppress(OSError):
            while True:
                stretches.append(os.lseek(self.fd, stretches[-1], os.SEEK_DATA))
                stretches.append(os.lseek(self.fd, stretches[-1], os.SEEK_HOLE))
        while len(stretches) > 1:
            end, low = stretches.pop(), stretches.pop()
            while end > low:
                at = max(low, end - 256 * KIB)
                if data := os.pread(self.fd, end - at, at).rstrip(b"\0"):
                    return at + len(data)
                end = at
        return 0

    def line_start(self, end: int, most: int) -> int:
        """Where the last lines before end begin, at most so many bytes; of a longer last line, its end."""
        low = max(0, end - most)
        while low + len(self.read(low, end)) < end:
            low = self.after_hole(low) or end
        if low == 0 or low == end or os.pread(self.fd, 1, low - 1) in b"\n\0":
            return low
        data = os.pread(self.fd, end - low, low)
        line = data.find(b"\n") + 1
        return low + (line if 0 < line < len(data) else character_start(data))

    def survivor(self) -> int:
        """After a cut or a rewrite: the first byte that is no longer what was published.

        The last 4 KiB decide; else it is the end of a file whose first 4 KiB are unchanged, else 0.
        """
        end, head, tail = self.marks
        low = end - len(tail)
        same = len(os.path.commonprefix([os.pread(self.fd, len(tail), low), tail]))
        if same:
            return low + same - len(tail[:same]) + whole_characters(tail[:same])
        size = self.size
        return min(size, end) if os.pread(self.fd, EDGE, 0) == head[:size] else 0

    def part(self, offset: int, hint: str = "") -> str:
        """Of a cursor: an offset, the inode as a hint, and 12 bytes that prove both and the log's bytes."""
        if not hint:
            where = os.fstat(self.fd)
            hint = short_hash(b"%d:%d" % (where.st_dev, where.st_ino))[:4]
        edge = min(EDGE, offset)
        proof = os.pread(self.fd, edge, 0) + os.pread(self.fd, edge, offset - edge) + hint.encode()
        return f"{offset}.{hint}{short_hash(proof)}"

    def proves(self, part: str) -> bool:
        """Are the bytes those of the cursor, whichever inode they are in?"""
        offset, _, proof = part.partition(".")
        return int(offset) <= self.size and self.part(int(offset), proof[:4]) == part


def short_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()[:12]).decode()


def whole_characters(data: bytes) -> int:
    """How many bytes there are before a UTF-8 character at the end of which a part has yet to come."""
    end = data[-4:]
    return len(data) - len(end) + codecs.utf_8_decode(end, "replace", False)[1]


def character_start(data: bytes) -> int:
    """How many bytes at the beginning belong to a character that began before."""
    return next((n for n, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)


def open_file(path: str) -> Generation:
    """The regular file at path, never waiting for a FIFO; OSError says what else is there."""
    kind = os.stat(path).st_mode
    if not stat.S_ISREG(kind):
        raise OSError(errno.EINVAL, "no regular file, a directory" if stat.S_ISDIR(kind) else "no regular file")
    return Generation(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY))


def siblings(path: str) -> list[str]:
    """The rotated files beside the log, newest first: NAME.1, NAME.2.gz, NAME-20251217, NAME.2025-12-16."""
    return [name for name, *_ in listing(path) if name != path]


def listing(path: str) -> list[tuple[str, int, int]]:
    """The log and its siblings, each file once, and which ones they are."""
    found: dict[str, re.Match[str]] = {}
    for log in dict.fromkeys((path, os.path.realpath(path))):
        folder, name = os.path.split(log)
        shape = re.compile(re.escape(name) + r"(?:\.(\d{1,5})|[-.](\d{4}[-_.:T\d]*\d))(\.gz)?")
        with contextlib.suppress(OSError), os.scandir(folder or ".") as entries:
            found |= {entry.path: match for entry in entries if (match := shape.fullmatch(entry.name))}
    names = [name for name, match in found.items() if not match[3] or name[:-3] not in found]  # else not packed yet
    names.sort(key=lambda name: found[name][2] or "", reverse=True)
    names.sort(key=lambda name: int(found[name][1] or 0))  # stable: the dated ones stay in their order
    files: dict[tuple[int, int], str] = {}
    for name in (path, *names[:SIBLINGS]):
        with contextlib.suppress(OSError):
            status = os.stat(name)
            files.setdefault((status.st_dev, status.st_ino), name)
    return [(name, *which) for which, name in files.items()]


def is_file(path: str, fd: int) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.stat(path), os.fstat(fd))
    return False


def unpack(path: str, most: int, unwanted: threading.Event) -> Generation:
    """A .gz file as an ordinary one, in a temporary file without a name; OSError if broken, larger or unwanted."""
    source = open_file(path)
    with tempfile.TemporaryFile() as copy, open(os.dup(source.fd), "rb") as file, gzip.open(file) as packed:
        try:
            while data := packed.read(MIB):
                if copy.tell() + len(data) > most or unwanted.is_set():
                    raise OSError(errno.EFBIG, "is too large to unpack")
                copy.write(data)
        except (EOFError, zlib.error) as error:
            raise OSError(errno.EINVAL, "is no whole .gz file") from error
        copy.flush()
        return Generation(os.dup(copy.fileno()))


async def off_loop(work: Callable[..., T], *args: Any) -> T:
    """In a thread. What may take long looks at its last argument: it is set when nobody waits for it any more."""
    unwanted = threading.Event()
    try:
        return await asyncio.to_thread(work, *args, unwanted)
    finally:
        unwanted.set()


# The stream: what was published, as a linked list of stretches


class Segment:
    """A stretch of one generation, up to `end`; the last one of the list grows with its generation."""

    def __init__(self, gen: Generation, older: Iterable[str] = (), newer: Iterable[str] = ()) -> None:
        self.gen = gen
        self.older, self.newer = tuple(older), tuple(newer)  # how far the other files that are still read were sent
        self.before = NOTHING  # the cursor at offset 0, which proves nothing: the end of what came before
        self.stop: int | None = None
        self.next: Link | None = None

    @property
    def end(self) -> int:
        return self.gen.end if self.stop is None else min(self.stop, self.gen.end)

    def cursor(self, offset: int) -> str:
        return "~".join((*self.older, self.gen.part(offset), *self.newer)) if offset else self.before

    def lead(self, following: Segment, offset: int, event: str = "") -> Segment:
        """End here, and go on there."""
        self.stop = self.end
        following.before = self.cursor(self.stop)
        self.next = Link(following, offset, event)
        return following


class Link(NamedTuple):
    """The way from a segment to the next one, with the reason if another generation begins there."""

    segment: Segment
    offset: int
    event: str


class Position(NamedTuple):
    """A viewer: so far it was served."""

    segment: Segment
    offset: int

    @property
    def cursor(self) -> str:
        return self.segment.cursor(self.offset)


class Frame:
    """What one step brings: bytes of the log, a hole, or the beginning of another generation."""

    def __init__(self, kind: str, reason: str, start: int, to: Position, data: bytes = b"") -> None:
        self.kind, self.reason, self.start, self.to, self.data = kind, reason, start, to, data

    @functools.cached_property
    def text(self) -> str:
        return self.data.decode(errors="replace")

    @functools.cached_property
    def plain(self) -> bytes:
        return self.text.encode()

    @functools.cached_property
    def json(self) -> bytes:
        gen, end = self.to.segment.gen, self.to.offset
        fields: dict[str, Any] = {"type": self.kind, "start": self.start, "cursor": self.to.cursor}
        if self.kind == "append":
            fields |= {"generation": gen.name, "end": end, "text": self.text}
        elif self.kind == "skip":
            fields |= {"reason": self.reason, "end": end}
        else:
            fields |= {"reason": self.reason, "generation": gen.name}
        return json.dumps(fields, ensure_ascii=False).encode()


def settled(at: Position) -> Position:
    """The same place, at the beginning of the next stretch where one is at its end."""
    segment, offset = at
    while offset >= segment.end and segment.next and not segment.next.event:
        segment, offset, _ = segment.next
    return Position(segment, offset)


def last_generation(segment: Segment) -> Generation:
    """The one at the end of the stream: the follower looks after it."""
    while segment.next:
        segment = segment.next.segment
    return segment.gen


def step(at: Position) -> Frame | None:
    """The next frame from a position; None at the end, and where the follower has to look first."""
    segment, offset = settled(at)
    gen, end = segment.gen, segment.end
    if offset >= end:
        if segment.next is None:
            return None
        segment, offset, event = segment.next
        return Frame("generation", event, offset, Position(segment, offset))
    data = gen.read(offset, min(end, offset + FRAME))
    if not gen.intact() and last_generation(segment) is gen:
        return None
    if not data or not gen.intact():  # a rotated file that was changed is as good as a hole
        to = (gen.intact() and gen.after_hole(offset)) or end
        return Frame("skip", "hole", offset, Position(segment, min(to, end)))
    if len(data) == FRAME and offset + FRAME < end:
        data = data[: data.rfind(b"\n") + 1 or whole_characters(data)]
    return Frame("append", "", offset, Position(segment, offset + len(data)), data)


class Log:
    """The follower: reads what is appended, and notices what else happens to the file."""

    def __init__(self, path: str, interval: float) -> None:
        self.path, self.interval = path, interval
        self.gen = Generation(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))  # until there is a log
        self.tail = Segment(self.gen)
        self.pending: collections.deque[tuple[Generation, str]] = collections.deque()
        self.late: dict[Generation, float] = {}  # rotated files, and until when they are read
        self.state, self.detail = "missing", "No such file or directory"
        self.found = False
        self.amiss = 0.0  # since when something else than our file is at the path, or nothing
        self.busy, self.unpacking = asyncio.Lock(), asyncio.Lock()
        self.unpacked: weakref.WeakValueDictionary[tuple[int, int, int], Generation] = weakref.WeakValueDictionary()
        self.round = asyncio.Event()
        self.open()

    @property
    def name(self) -> str:
        return os.fsencode(os.path.basename(self.path)).decode(errors="replace")

    def open(self) -> None:
        """Begin at the end of the log, and with what is still written to a file that was just rotated."""
        with contextlib.suppress(OSError):
            gen = open_file(self.path)
            self.gen.swap(gen)
            self.gen.mark(gen.settled())
            self.found, self.state, self.detail = True, "ok", ""
        with contextlib.suppress(OSError, StopIteration):
            newest = next(iter(siblings(self.path)))
            if newest.endswith(".gz") and self.gen.end:
                return
            old = unpack(newest, UNPACKED, threading.Event()) if newest.endswith(".gz") else open_file(newest)
            old.mark(old.last_byte())
            self.tail.before = old.part(old.end) if old.end else NOTHING
            if time.time() - os.fstat(old.fd).st_ctime < LATE:
                self.late[old] = time.monotonic() + LATE
                self.tail.older = self.segment(self.gen).older

    def segment(self, gen: Generation) -> Segment:
        """A new stretch of one of the files that are read."""
        files = [*self.late, self.gen]
        parts = [other.part(other.end) if other.end else "" for other in files]
        at = files.index(gen)
        return Segment(gen, filter(None, parts[:at]), filter(None, parts[at + 1 :]))

    def patience(self) -> float:
        """Seconds until the next check, if no event shortens them."""
        return min(self.interval, HESITATE) if self.amiss and self.state == "ok" else self.interval

    def folders(self) -> set[str]:
        return {os.path.dirname(path) or "." for path in (self.path, os.path.realpath(self.path))}

    async def check(self) -> bool:
        """Read at most a frame of what is new, or see what else happened; true where there may be more."""
        async with self.busy:
            try:
                if not self.gen.intact():
                    return await self.overwritten()
                more = self.pull(self.gen)
                more |= self.read_late()
                return more or await self.look()
            except OSError as error:
                self.trouble("unreadable", error.strerror or "cannot be read")
                return False
            finally:
                self.round.set()
                self.round = asyncio.Event()

    def pull(self, gen: Generation, final: bool = False) -> bool:
        """Publish whole lines, and of an unfinished one what is due; true where there may be more."""
        start = gen.end
        data = gen.read(start, start + FRAME)
        if not gen.intact():
            return True
        whole = data.rfind(b"\n") + 1
        if not whole and len(data) == FRAME and (data.strip(b"\0") or gen.goes_on(start + FRAME)):
            whole = whole_characters(data)
        rest = data[whole:].rstrip(b"\0") if len(data) < FRAME else b""
        hole = gen.after_hole(start + whole) if len(data) < FRAME and gen.size > start + len(data) else None
        if rest and (final or hole or self.overdue(gen, start + whole + len(rest))):
            whole += len(rest) if final or hole else whole_characters(rest)
        if whole or hole:
            gen.mark(hole or start + whole)
            counted["read_bytes_total"] += whole
            counted["read_lines_total"] += data.count(b"\n", 0, whole)
        return hole is not None or (len(data) == FRAME and whole > 0)

    def overdue(self, gen: Generation, end: int) -> bool:
        """Has nothing been added for an interval?"""
        now = time.monotonic()
        if gen.grown[0] != end:
            gen.grown = end, now
        return now - gen.grown[1] >= self.interval

    def read_late(self) -> bool:
        """What is still written to rotated files: a stretch of an older generation each."""
        more = False
        for gen, until in list(self.late.items()):
            start, over = gen.end, time.monotonic() > until
            if gen.intact():
                more |= self.pull(gen, final=over)
            if gen.end > start:
                self.tail = self.tail.lead(self.segment(gen), start)
            if over and not more:
                del self.late[gen]
            if gen.end > start or over:
                self.tail = self.tail.lead(self.segment(self.gen), self.gen.end)
        return more

    async def look(self) -> bool:
        """Is the log still the file that is open?"""
        if self.pending:
            self.begin(*self.pending.popleft())
            return True
        try:
            if self.found and os.path.samestat(os.stat(self.path), os.fstat(self.gen.fd)):
                return self.fine()
            before = listing(self.path)
            new = open_file(self.path)
            new = next((gen for gen in self.late if os.path.sameopenfile(gen.fd, new.fd)), new)  # it is back
        except OSError as error:
            gone = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
            self.trouble("missing" if gone else "unreadable", error.strerror or "cannot be read")
            return False
        old = self.gen
        if not self.found or (os.fstat(old.fd).st_nlink == 0 and (old.end or not old.size) and new.has(old.marks)):
            old.swap(new)
            self.found = True
        elif new.size == 0 and self.hesitates():
            return False
        else:
            chain = await self.rotated()
            if listing(self.path) != before:
                return True  # the files were renamed while we opened them: look again
            self.queue(chain, (new, "rotated"))
        self.fine()
        return True

    async def overwritten(self) -> bool:
        """The log was cut or rewritten: go on where it changed; what was unread may be in a copy of it."""
        old = self.gen
        cut = old.size < old.end or os.pread(old.fd, 4, max(0, old.end - 4)) != old.marks.tail[-4:]
        if old.size == 0 and self.hesitates():
            return False
        before = listing(self.path)
        copies = await self.rotated()
        if listing(self.path) != before:
            return True
        start = 0 if copies else old.survivor()
        new = Generation(os.dup(old.fd), start)
        reason = "truncated" if cut or copies else "rewritten"
        self.note(reason)
        if any(old.is_packed_as(gen) for gen in copies[1:]):
            self.queue(copies[:-1], (copies[-1], "rotated"))
        elif copies:
            self.queue(copies, (new, reason))
        else:
            old.mark(min(start, old.end))
            self.gen = new
            self.tail = self.tail.lead(self.segment(new), start, reason)
        self.fine()
        return True

    async def rotated(self) -> list[Generation]:
        """Our file, or a copy from before it was cut or packed, and what was rotated since, oldest first."""
        paths = siblings(self.path)
        ours = next((at for at, path in enumerate(paths) if is_file(path, self.gen.fd)), None)
        if ours is not None and not self.gen.intact():
            paths, ours = paths[ours + 1 :], None  # what is newer than our file comes after it, not after its copy
        found: list[Generation] = []
        for at, path in enumerate(paths):
            try:
                if ours is None and (not self.gen.end or os.stat(path).st_mtime_ns < self.gen.modified):
                    break  # a copy was written after the log was
                found.insert(0, Generation(os.dup(self.gen.fd)) if at == ours else await self.open_rotated(path))
                if at == ours or (ours is None and found[0].has(self.gen.marks)):
                    return found
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    raise  # there may be one all the same
        return []

    async def open_rotated(self, path: str) -> Generation:
        if not path.endswith(".gz"):
            return open_file(path)
        async with self.unpacking:
            return await off_loop(unpack, path, UNPACKED)

    async def unpack_once(self, path: str, most: int) -> Generation:
        """A .gz file, one copy for all viewers that resume in it or before it."""
        async with self.unpacking:
            status = os.stat(path)
            which = status.st_dev, status.st_ino, status.st_mtime_ns
            gen = self.unpacked.get(which)
            if gen is None:
                gen = self.unpacked[which] = await off_loop(unpack, path, most)
            return gen

    def queue(self, chain: list[Generation], last: tuple[Generation, str]) -> None:
        """Read on in the first of the chain, then the files that came after it, and then the last."""
        if chain:
            lives = {self.gen, *Generation.living.values()}  # the copy also has what came before a cut
            for gen in [gen for gen in lives if os.path.sameopenfile(gen.fd, self.gen.fd)]:
                gen.swap(chain[0])
        self.pending.extend([*((gen, "rotated") for gen in chain[1:]), last])

    def begin(self, new: Generation, reason: str) -> None:
        """The open file is read to its end: from now on the next one is the log."""
        old = self.gen
        self.pull(old, final=True)
        self.late.pop(new, None)
        self.late[old] = time.monotonic() + LATE
        if len(self.late) > LATE_FILES:
            self.late[next(iter(self.late))] = 0.0
        self.gen = new
        self.tail = self.tail.lead(self.segment(new), new.end, reason)
        if reason == "rotated":
            self.note(reason)

    def note(self, reason: str) -> None:
        counted[f'generations_total{{reason="{reason}"}}'] += 1
        logger.info("log was %s", reason)

    def hesitates(self) -> bool:
        self.amiss = self.amiss or time.monotonic()
        return time.monotonic() - self.amiss < HESITATE

    def trouble(self, state: str, detail: str) -> None:
        if self.state != "ok" or not self.hesitates():
            self.change(state, detail)

    def fine(self) -> bool:
        self.amiss = 0.0
        self.change("ok", "")
        return False

    def change(self, state: str, detail: str) -> None:
        if (state, detail) != (self.state, self.detail):
            logger.info("log is %s", f"{state} ({detail})" if detail else state)
        self.state, self.detail = state, detail

    async def resume(self, cursor: str) -> Position | str:
        """The position of a cursor, or the reason why there is none: it is checked against the files."""
        parts = parse_cursor(cursor)
        if parts is None:
            return "malformed"
        while True:
            before = listing(self.path)
            while await self.check():  # the files as they are: what the follower has yet to see would be out of order
                await asyncio.sleep(0)
            current = self.gen
            files, owners = await self.locate(parts)
            if current is not self.gen or listing(self.path) != before:
                continue  # rotated meanwhile
            read = {current, *self.late}
            if not current.intact() or any(gen in read and offset_of(part) > gen.end for part, gen in owners.items()):
                await self.round.wait()  # the reader has to pass first
            elif not parts or parts[-1] in owners:
                return self.thread(parts, files, owners)
            else:
                return "ahead" if offset_of(parts[-1]) > current.size else "changed"

    async def locate(self, parts: list[str]) -> tuple[list[Generation], dict[str, Generation]]:
        """The files, newest first, as far as they are wanted, and which of them proves which part of a cursor."""
        files = [self.gen, *reversed(self.late)]
        owners = assign(parts, files)
        if parts and all(part in owners and owners[part].part(offset_of(part)) == part for part in parts):
            return files, owners
        packed = []
        for path in siblings(self.path):
            with contextlib.suppress(OSError):
                if path.endswith(".gz"):
                    packed.append((len(files), path))
                elif not any(os.path.sameopenfile((gen := open_file(path)).fd, known.fd) for known in files):
                    files.append(gen)
        owners = assign(parts, files)
        left, opened = UNPACKED, 0
        for place, path in packed:
            if parts and len(owners) == len(parts) and all(gen in files[: place + opened] for gen in owners.values()):
                break
            with contextlib.suppress(OSError):
                gen = await self.unpack_once(path, left)
                left -= gen.size
                open_yet = (known for known in self.late if known.size == gen.size)
                if not any(gen.has(known.marks) for known in open_yet):
                    files.insert(place + opened, gen)
                    opened += 1
                    owners = assign(parts, files)
        return files, owners

    def thread(self, parts: list[str], files: list[Generation], owners: dict[str, Generation]) -> Position:
        """The stretches from a cursor to the end of the stream, in one step, so that nothing falls between."""
        for gen in files:
            if gen is not self.gen and gen not in self.late:
                gen.mark(gen.last_byte())
        newest = owners[parts[-1]] if parts else files[-1]
        sent = [(owners[part], part) for part in parts[:-1] if part in owners]
        first = last = Segment(newest, (part for _, part in sent))
        for gen, part in sent:
            last = last.lead(Segment(gen, newer=[newest.part(newest.end)]), offset_of(part))
        for gen in reversed(files[1 : files.index(newest)]):
            last = last.lead(Segment(gen), 0, "rotated")
        last.stop = last.end
        start = self.gen.end if self.gen in (newest, *owners.values()) else 0
        last.next = Link(self.tail, start, "" if newest is self.gen else "rotated")
        return Position(first, offset_of(parts[-1]) if parts else 0)


def parse_cursor(cursor: str) -> list[str] | None:
    """Its parts, oldest file first; none of them where nothing was sent yet; None for nonsense."""
    if cursor == NOTHING:
        return []
    part = r"[1-9]\d{0,17}\.[\w-]{20}"
    return cursor.split("~") if re.fullmatch(f"{part}(?:~{part}){{0,63}}", cursor, re.ASCII) else None


def offset_of(part: str) -> int:
    return int(part.partition(".")[0])


def assign(parts: list[str], files: list[Generation]) -> dict[str, Generation]:
    """Which file proves which part: of several that do, the one with the right inode, else the newest."""
    owners: dict[str, Generation] = {}
    for part in reversed(parts):
        proving = [gen for gen in files if gen not in owners.values() and gen.proves(part)]
        if proving:
            owners[part] = next((gen for gen in proving if gen.part(offset_of(part)) == part), proving[0])
    return owners


# inotify(7): MODIFY, ATTRIB, MOVED_FROM, MOVED_TO, CREATE, DELETE, DELETE_SELF, MOVE_SELF
EVENTS = 0x2 | 0x4 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800


class Watch:
    """Events of the log's folders (inotify(7)): they only shorten a wait, so that losing them loses no byte."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.add = getattr(libc, "inotify_add_watch", None)
        self.remove = getattr(libc, "inotify_rm_watch", None)
        self.fd: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC) if self.add else -1
        self.watched: set[int] = set()
        if self.fd < 0:
            logger.info("no file events here: new entries come with the regular check")

    def arm(self, folders: set[str]) -> None:
        """Watch these folders; adding one again changes nothing, a new one in its place is found."""
        if self.fd >= 0 and self.add and self.remove:
            watched = {self.add(self.fd, os.fsencode(folder), EVENTS) for folder in folders} - {-1}
            for gone in self.watched - watched:
                self.remove(self.fd, gone)
            self.watched = watched

    async def wait(self, seconds: float) -> None:
        """Until something happens in the folders, at most so long."""
        if self.fd < 0:
            return await asyncio.sleep(seconds)
        happened = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self.fd, happened.set)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await happened.wait()
        loop.remove_reader(self.fd)
        with contextlib.suppress(BlockingIOError):
            while os.read(self.fd, 64 * KIB):
                pass


# One viewer


class Connection(ServerConnection):
    """One client's connection, from its first byte on; the set of all is what a stop ends."""

    everyone: set[Connection] = set()
    viewers: set[Connection] = set()
    unasked: dict[Connection, None] = {}  # without a complete request, the oldest first
    most_unasked = 4096

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.everyone.add(self)
        self.unasked[self] = None
        if len(self.unasked) > self.most_unasked:
            oldest = next(iter(self.unasked))
            del self.unasked[oldest]
            oldest.transport.abort()
        self.progress = 0, time.monotonic()
        self.told = "ok", ""
        self.at: Position | None = None  # so far it was served; none while it is live
        # The kernel takes 2.8 MB for a client that reads nothing: with this the write buffer tells the truth.
        with contextlib.suppress(OSError, AttributeError):
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 64 * KIB)

    def connection_lost(self, exc: Exception | None) -> None:
        self.everyone.discard(self)
        self.viewers.discard(self)
        self.unasked.pop(self, None)
        super().connection_lost(exc)

    @property
    def socket(self) -> socket.socket:
        sock: socket.socket = self.transport.get_extra_info("socket")
        return sock

    @property
    def buffered(self) -> int:
        return self.transport.get_write_buffer_size()

    @property
    def speaks_json(self) -> bool:
        return self.subprotocol == PROTOCOL

    def stuck(self) -> bool:
        """Has the client taken nothing of what there is for it for a minute? (tcp(7), TCP_INFO)"""
        try:
            (queued,) = struct.unpack("i", fcntl.ioctl(self.socket.fileno(), termios.TIOCOUTQ, bytes(4)))
            (taken,) = struct.unpack_from("=Q", self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), 120)
        except (OSError, AttributeError, struct.error):
            queued, taken = 0, -self.buffered
        if taken != self.progress[0] or not (queued or self.buffered):
            self.progress = taken, time.monotonic()
        return time.monotonic() - self.progress[1] > STUCK


class Viewers:
    """Those who are live: all at one position, the end of the stream."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.at = Position(log.tail, log.tail.end)
        self.live: dict[Connection, asyncio.Future[None]] = {}
        self.waiting: list[asyncio.Future[None]] = []
        self.recent: dict[Position, Frame] = {}  # the last 16, read and written out once for all who catch up
        self.spoke = time.monotonic()

    async def join(self, viewer: Connection) -> None:
        """Be live, until there is something to read for oneself."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        assert viewer.at
        if settled(viewer.at) != self.at:  # the follower has yet to say what happened
            self.waiting.append(future)
            return await future
        viewer.at = None  # it moves with all the others: a position of its own would keep rotated files open
        self.live[viewer] = future
        try:
            await future
        finally:
            del self.live[viewer]

    def release(self, viewer: Connection, future: asyncio.Future[None]) -> None:
        if not future.done():  # else it has just left
            viewer.at = self.at
            future.set_result(None)

    def advance(self) -> None:
        """Send the live ones what was published since; those who are slow, or all if it is much, read the file."""
        waiting, self.waiting = self.waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)
        self.tell((self.log.state, self.log.detail))
        end = Position(self.log.tail, self.log.tail.end)
        frames = self.batch(end)
        for viewer, future in self.live.items():
            if frames is None or viewer.buffered > BACKLOG:
                self.release(viewer, future)
        self.at = end
        for frame in frames or ():
            self.send(frame.plain, frame.json)
        if time.monotonic() - self.spoke > QUIET:
            checked = {"type": "checked", "size": self.log.gen.size, "end": self.log.gen.end}
            self.send(b"", json.dumps(checked).encode())
        if len(self.live) == len(Connection.viewers):
            self.recent.clear()  # frames keep their files open

    def batch(self, end: Position) -> list[Frame] | None:
        """What all who are live get now; None where each has to read it."""
        at, size, frames = self.at, 0, []
        while self.live and size <= BROADCAST and (frame := step(at)):
            frames.append(frame)
            at, size = frame.to, size + len(frame.data)
        return frames if size <= BROADCAST and (settled(at) == end or not self.live) else None

    def tell(self, state: tuple[str, str]) -> None:
        news = [viewer for viewer in self.live if viewer.told != state and viewer.speaks_json]
        broadcast(news, state_frame(state), text=True)
        for viewer in news:
            viewer.told = state

    def send(self, plain: bytes, as_json: bytes) -> None:
        """To all who are live and not about to leave."""
        here = [viewer for viewer, future in self.live.items() if not future.done()]
        broadcast([viewer for viewer in here if viewer.speaks_json], as_json, text=True)
        if plain:
            broadcast([viewer for viewer in here if not viewer.speaks_json], plain, text=True)
        counted["sent_bytes_total"] += len(plain) * len(here)
        self.spoke = time.monotonic()

    def next_message(self, viewer: Connection) -> bytes | None:
        """What comes next for one that catches up, empty where it is not told; None at the end."""
        assert viewer.at
        frame = self.recent.get(viewer.at) or step(viewer.at)
        if frame is None:
            return None
        self.recent[viewer.at] = frame
        if len(self.recent) > 16:
            del self.recent[next(iter(self.recent))]
        viewer.at = frame.to
        counted["sent_bytes_total"] += len(frame.data)
        return frame.json if viewer.speaks_json else frame.plain


def state_frame(state: tuple[str, str]) -> bytes:
    return json.dumps({"type": "state", "state": state[0], "detail": state[1]}).encode()


async def watch_along(viewers: Viewers, initial: int, viewer: ServerConnection) -> None:
    """A viewer's life: fed until it leaves; what it says is read and ignored."""
    assert isinstance(viewer, Connection)
    feeding = asyncio.create_task(feed(viewers, initial, viewer))
    try:
        async for _ in viewer:
            pass
    except ConnectionClosed:
        pass
    finally:
        feeding.cancel()
        await asyncio.wait([feeding])
        if not feeding.cancelled() and (error := feeding.exception()):
            raise error


async def feed(viewers: Viewers, initial: int, viewer: Connection) -> None:
    """First the end of the log, or what came since the cursor; then step by step, and live at the end."""
    log = viewers.log
    with contextlib.suppress(ConnectionClosed):
        viewer.at, first = await opening(log, initial, query_of(viewer).get("since"))
        await viewer.send(json.dumps(first, ensure_ascii=False) if viewer.speaks_json else first["text"])
        while viewer.at:
            if viewer.speaks_json and viewer.told != (log.state, log.detail):
                viewer.told = log.state, log.detail
                await viewer.send(state_frame(viewer.told), text=True)
            elif (message := viewers.next_message(viewer)) is None:
                await viewers.join(viewer)
            elif message:
                await viewer.send(message, text=True)


async def opening(log: Log, initial: int, since: str | None) -> tuple[Position, dict[str, Any]]:
    """Where a viewer begins, and its first frame."""
    resumed = None if since is None else await log.resume(since)
    if isinstance(resumed, Position):
        frame = step(resumed)
        at = frame.to if frame and frame.kind == "append" and frame.to.segment is resumed.segment else resumed
        start, text = resumed.offset, frame.text if frame and at is frame.to else ""
    else:
        while not log.gen.intact() and await log.check():
            await asyncio.sleep(0)  # else the cursor would prove bytes that nobody got
        at = Position(log.tail, log.tail.end)
        start = log.gen.line_start(at.offset, initial) if log.gen.intact() else at.offset
        text = log.gen.read(start, at.offset).decode(errors="replace")
    gen = at.segment.gen
    return at, {
        "type": "snapshot",
        "log": log.name,
        "generation": gen.name,
        "resumed": isinstance(resumed, Position),
        "reason": resumed if isinstance(resumed, str) else None,
        "start": start,
        "end": at.offset,
        "cursor": at.cursor,
        "size": gen.size,
        "text": text,
    }


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
    """The filter language: all terms must match; see the README. Trouble for an empty query."""
    terms = []
    for minus, quoted, word in TERM.findall(query):
        if quoted or word:
            plain = quoted or (None if is_expression(word) and re.search(r"[\\^$.*+?()[\]{}|]", word) else word)
            terms.append(Term(bool(minus), plain, as_text(plain) if plain else as_pcre(word)))
    if not terms:
        raise Trouble(400, "the query is empty")
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
            return await off_loop(work, *args)
    except TimeoutError:
        raise Trouble(422, "too few lines of the log have a time") from None


async def search(gen: Generation, query: dict[str, str]) -> dict[str, Any]:
    """Trouble, when it cannot be done or takes too long."""
    terms = await apart(terms_of, query.get("q", ""))
    limit = natural(query, "limit", 200, 1, 1000)
    before = natural(query, "before", gen.size, 0, 1 << 62)
    child = child_for(terms, query.get("case") == "1")
    try:
        await asyncio.wait_for(search_places.acquire(), 3)
    except TimeoutError:
        raise Trouble(503, "too many searches at a time", Retry_After="3") from None
    counted["searches_total"] += 1
    try:
        return await backwards(gen, min(before, gen.size), child, limit)
    finally:
        search_places.release()


async def backwards(gen: Generation, before: int, child: Child, limit: int) -> dict[str, Any]:
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
                raise Trouble(422, "the search is too expensive: simplify it") from None
            break
        found, searched, at, piece = more + found, fed + searched, start, piece * 4
    matches = await apart(matches_at, gen, found)
    at = matches[0]["start"] if len(found) >= limit or len(matches) < len(found) else at
    edges = [at, *(offset for stretch in searched for offset in stretch if stretch[1] > at), top]
    skipped = [[start, end] for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]
    answer = {"matches": matches, "scanned": [at, top], "size": size}
    return answer | ({"skipped": skipped} if skipped else {})


async def search_piece(
    gen: Generation, start: int, end: int, size: int, child: Child, most: int
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
        raise Trouble(422, "the search is too expensive: simplify it")
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
    """Trouble where there is none for a query."""
    if has_pcre():
        first, alone = terms[0], len(terms) == 1 and not terms[0].exclude
        every = "^" + "".join(f"(?{'!' if exclude else '='}.*(?:{pattern}))" for exclude, _, pattern in terms)
        mend = not (alone and first.plain) or "\ufffd" in first.plain  # else it can only be found between such bytes
        return ["grep", "-abP" if case else "-abPi", "-e", first.pattern if alone else every], mend
    if any(term.plain is None for term in terms):
        raise Trouble(501, "regular expressions need GNU grep with -P on this server; plain text does not")
    return [sys.executable, "-I", "-c", PLAIN_SEARCH, json.dumps([case, *(term[:2] for term in terms)])], True


def start_child(command: list[str]) -> subprocess.Popen[bytes]:
    """With limits, so that it ends even if we do not live to end it."""
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    environment = {"LC_ALL": "C.UTF-8", "PATH": os.environ.get("PATH", os.defpath)}
    try:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=quiet, env=environment)
    except OSError as error:
        raise Trouble(503, f"no search can be started: {error.strerror}") from None
    with contextlib.suppress(OSError, ValueError):
        resource.prlimit(process.pid, resource.RLIMIT_AS, (512 * MIB, 512 * MIB))
        resource.prlimit(process.pid, resource.RLIMIT_CPU, (10, 10))
    return process


def line_before(gen: Generation, offset: int, size: int) -> int:
    """The last line start at or before offset; offset itself within a line over 1 MiB."""
    for most in (4 * KIB, MIB + 1) if 0 < offset < size else ():
        low = max(0, offset - most)
        at = os.pread(gen.fd, offset - low, low).rfind(b"\n") + 1
        if at or not low:
            return low + at
    return offset


def whole_lines(gen: Generation, start: int, end: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Where they begin, and many at a time; without those over 1 MiB, and holes."""
    at = end_of_line(gen, start - 1, end) if start else 0
    while at < end:
        data = gen.read(at, min(end, at + MIB + 1))
        whole = len(data) if at + len(data) == size else data.rfind(b"\n") + 1
        if whole:
            yield at, data[:whole]
        at = at + whole if whole else end_of_line(gen, at, end)


def end_of_line(gen: Generation, at: int, end: int) -> int:
    """Behind the next newline, or behind the next hole."""
    while at < end:
        data = gen.read(at, min(end, at + MIB))
        if not data:
            return min(end, gen.after_hole(at) or end)
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


def matches_at(gen: Generation, places: list[Stretch]) -> list[dict[str, Any]]:
    """The last of these matches, 1 MiB of text or little more, each with its first 16 KiB."""
    matches: list[dict[str, Any]] = []
    left, most = MIB, 16 * KIB
    for start, end in reversed(places):
        if left > 0:
            text = os.pread(gen.fd, min(end - start, most + 1), start).removesuffix(b"\n")[:most]
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


def timeline(gen: Generation, points: int, unwanted: threading.Event) -> dict[str, Any]:
    """The times at the beginning of lines that are spread evenly over the log."""
    size = gen.size
    wanted = (size * n // points for n in range(points) if size and not unwanted.is_set())
    offsets = sorted({line_before(gen, offset, size) for offset in wanted})
    stamps = (STAMP.match(b"\n" + os.pread(gen.fd, 64, at)) for at in offsets)
    times = (parse_time(stamp[1].decode()) if stamp else None for stamp in stamps)
    return {"size": size, "points": list(zip(offsets, times, strict=True))}


def seek(gen: Generation, wanted: float, unwanted: threading.Event) -> dict[str, Any]:
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


def timed_lines(gen: Generation, start: int, end: int, unwanted: threading.Event) -> Iterator[tuple[int, float]]:
    """Offset and time of the lines that begin from start to end."""
    at = end_of_line(gen, start - 1, end) if start else 0
    while at < end and not unwanted.is_set():
        data = gen.read(at, at + 64 * KIB)
        for stamp in STAMP.finditer(b"\n" + data):
            if at + stamp.start() < end and (time := parse_time(stamp[1].decode())) is not None:
                yield at + stamp.start(), time
        whole_lines = data.rfind(b"\n") + 1
        at = at + whole_lines if whole_lines else end_of_line(gen, at, end)


# HTTP


class Trouble(Exception):
    """What a client is told instead of an answer."""

    def __init__(self, status: int, sentence: str, **headers: str) -> None:
        super().__init__(sentence)
        self.status, self.headers = status, headers


def answer(status: int, body: bytes, kind: str, **headers: str) -> Response:
    fixed = {
        "Date": email.utils.formatdate(usegmt=True),
        "Content-Type": kind,
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


def refusal(path: str, trouble: Trouble) -> Response:
    body, kind = json.dumps({"error": str(trouble)}).encode(), JSON
    if path in ("/", "/healthz"):
        body, kind = f"{trouble}\n".encode(), TEXT
    if path == "/" and trouble.status == 401:
        body, kind = LOGIN, HTML
    return answer(trouble.status, body, kind, **trouble.headers)


def query_of(connection: ServerConnection) -> dict[str, str]:
    """The parameters of the request, the last one of a name."""
    assert connection.request
    query = connection.request.path.partition("?")[2]
    return dict(urllib.parse.parse_qsl(query, keep_blank_values=True, errors="replace"))


class Call(NamedTuple):
    """A request, and who makes it: the client, the scheme of the page's address, and the host in it."""

    connection: Connection
    request: Request
    path: str
    upgrade: bool  # to a WebSocket
    client: str  # an IPv4 address, or the /64 of an IPv6 address
    scheme: str
    host: str  # in lower case; empty where it is missing or malformed
    port: str


async def respond(doors: Doors, viewers: Viewers, connection: ServerConnection, request: Request) -> Response:
    """Answer a request over HTTP, or accept a WebSocket."""
    call = doors.receive(connection, request)
    call.connection.unasked.pop(call.connection, None)
    try:
        response = await admit(doors, viewers, call)
    except Trouble as trouble:
        response = refusal(call.path, trouble)
    if connection.protocol.eof_sent:  # more came than one request: the library gave up, and would fail to answer
        connection.transport.abort()
        await connection.wait_closed()
    return response if response.status_code in (101, 500, 505) else finished(doors, call, response)


def finished(doors: Doors, call: Call, response: Response) -> Response:
    """With what every answer needs."""
    if call.upgrade:  # a WebSocket counts as an answer only where it is refused
        try:
            doors.answers.take(call.client)
        except Trouble as too_many:
            response = refusal(call.path, too_many) if response.status_code != 400 else response
    if response.status_code >= 400:
        counted[f'refused_requests_total{{status="{response.status_code}"}}'] += 1
    if call.request.method == "HEAD":
        response.body = b""
    response.headers.update(doors.policy(call))
    return response


async def admit(doors: Doors, viewers: Viewers, call: Call) -> Response:
    """Through all doors, in the order that the README gives."""
    check_form(call)
    if not call.upgrade:
        doors.answers.take(call.client)
    doors.check_host(call)
    credential = doors.check_token(call)
    if call.request.method not in ("GET", "HEAD"):
        raise Trouble(405, "only GET and HEAD are answered", Allow="GET, HEAD")
    doors.check_origin(call)
    if call.upgrade:
        return doors.seat(call)
    if call.path != "/" or credential not in ("header", "address"):
        return await route(doors, viewers, call)
    response = answer(303, b"", TEXT, Location="./") if credential == "address" else answer(200, doors.page, HTML)
    secure = "; Secure" if call.scheme == "https" else ""
    response.headers["Set-Cookie"] = f"{doors.cookie(call)}; HttpOnly; SameSite=Lax; Path=/{secure}"
    return response


def check_form(call: Call) -> None:
    """Refuse what can be read in two ways (RFC 9110, section 5.3; RFC 9112, section 3.2)."""
    for name in ("Host", "Origin", "Authorization", "Range", "If-Match"):
        if len(call.request.headers.get_all(name)) > 1:
            raise Trouble(400, f"{name} is there twice")
    if not call.host:
        raise Trouble(400, "Host is missing or malformed")


async def route(doors: Doors, viewers: Viewers, call: Call) -> Response:
    log = viewers.log
    if call.path == "/":
        return answer(200, doors.page, HTML)
    if call.path == "/metrics":
        return answer(200, metrics(viewers).encode(), "text/plain; version=0.0.4; charset=utf-8")
    if call.path == "/ws/audit":
        raise Trouble(426, "this address speaks WebSocket", Upgrade="websocket")
    if call.path not in ("/healthz", "/api/audit", "/api/search", "/api/timeline", "/api/seek"):
        raise Trouble(404, "there is nothing here")
    if log.state != "ok":
        raise Trouble(503, f"the log is {log.state}: {log.detail}")
    return answer(200, b"ok\n", TEXT) if call.path == "/healthz" else await history(log.gen, call)


async def history(gen: Generation, call: Call) -> Response:
    """The log as it is, by range, search or time, unless it is another one by now."""
    etag = f'"{gen.name}"'
    try:
        if not {"*", etag} & {tag.strip() for tag in call.request.headers.get("If-Match", "*").split(",")}:
            raise Trouble(412, "the log is another one by now")
        if call.path == "/api/audit":
            response = await excerpt(gen, call.request.headers.get("Range", ""))
        else:
            found = await while_connected(call.connection, question(gen, call))
            response = answer(200, json.dumps(found, ensure_ascii=False).encode(), JSON)
    except Trouble as trouble:
        response = refusal(call.path, trouble)
    response.headers["ETag"] = etag
    return response


def question(gen: Generation, call: Call) -> Coroutine[Any, Any, dict[str, Any]]:
    query = query_of(call.connection)
    if call.path == "/api/search":
        return search(gen, query)
    if call.path == "/api/timeline":
        return walk(timeline, gen, natural(query, "points", 200, 1, 2000))
    return walk(seek, gen, wanted_time(query))


async def while_connected(connection: ServerConnection, work: Coroutine[Any, Any, T]) -> T:
    """What nobody waits for any more is cancelled."""
    working, gone = asyncio.create_task(work), asyncio.create_task(connection.wait_closed())
    try:
        await asyncio.wait([working, gone], return_when=asyncio.FIRST_COMPLETED)
    finally:
        working.cancel(), gone.cancel()
        await asyncio.wait([working, gone])
    if working.cancelled():
        raise Trouble(503, "the client went away")
    return working.result()


def wanted_time(query: dict[str, str]) -> float:
    text = query.get("time", "").strip("[] ")
    # A plus sign in an address is a space.
    wanted = parse_time(re.sub(r"(?<=:\d\d)([.,]\d+)? (?=\d\d(:?\d\d)?$)", r"\1+", text))
    if wanted is None:
        raise Trouble(400, "time is no date and time as in 2025-12-17T17:40:37Z")
    return wanted


def natural(query: dict[str, str], name: str, default: int, low: int, high: int) -> int:
    """A whole number of the query; Trouble for anything else."""
    text = query.get(name, str(default))
    if not re.fullmatch(r"\d{1,19}", text, re.ASCII) or not low <= int(text) <= high:
        raise Trouble(400, f"{name} is no whole number from {low} to {high}")
    return int(text)


async def excerpt(gen: Generation, wanted: str) -> Response:
    """The latest whole lines, or the range that is wanted, at most 1 MiB of it (RFC 9110, section 14)."""
    if not wanted.lower().startswith("bytes="):
        return answer(200, await asyncio.to_thread(latest_lines, gen), TEXT, Accept_Ranges="bytes")
    match = re.fullmatch(r"bytes=[ \t]*(\d{0,4000})-(\d{0,4000})[ \t]*", wanted, re.ASCII | re.IGNORECASE)
    first, last = match.groups() if match else ("", "")
    size = gen.size
    start = int(first) if first else max(0, size - int(last or 0))
    end = min(int(last) + 1, size) if first and last else size
    if start >= end:
        raise Trouble(416, "there is no such range", Accept_Ranges="bytes", Content_Range=f"bytes */{size}")
    body = await asyncio.to_thread(os.pread, gen.fd, min(end - start, MIB), start)
    content = f"bytes {start}-{start + len(body) - 1}/{size}"
    return answer(206, body, TEXT, Accept_Ranges="bytes", Content_Range=content)


def latest_lines(gen: Generation) -> bytes:
    end = gen.settled()
    start = gen.line_start(end, 64 * KIB)
    return os.pread(gen.fd, end - start, start)


def metrics(viewers: Viewers) -> str:
    """The text format of Prometheus."""
    live, gen = len(viewers.live), viewers.log.gen
    now = {
        'viewers{state="live"}': live,
        'viewers{state="catching_up"}': len(Connection.viewers) - live,
        "behind_bytes": max(0, gen.size - gen.end),
        "start_time_seconds": STARTED,
        f'build_info{{version="{VERSION}",websockets="{websockets.version.version}"}}': 1,
    }
    lines, values = [], sorted({**now, **counted}.items())
    for family, samples in itertools.groupby(values, lambda value: value[0].partition("{")[0]):
        lines.append(f"# TYPE audit_stream_{family} {'counter' if family.endswith('_total') else 'gauge'}")
        lines += [f"audit_stream_{name} {value}" for name, value in samples]
    return "\n".join(lines) + "\n"


# The doors

HOST = re.compile(r"(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(\d{1,5}))?", re.ASCII)
POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; worker-src blob:; child-src blob:; connect-src 'self' {socket}"
)  # Safari: child-src is worker-src before 15.5, and 'self' is no WebSocket before 15.4
LOGIN = b"""<!DOCTYPE html>
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
document.forms[0].onsubmit = async function (event) {
  event.preventDefault()
  const said = document.querySelector('output')
  const token = unescape(encodeURIComponent(document.getElementById('token').value.trim()))
  try {
    const reply = await fetch('./', { headers: { Authorization: 'Bearer ' + token } })
    if (reply.ok) location.replace('./' + location.hash)
    else said.textContent = reply.status === 429 ? 'Too many wrong tokens: wait a minute.' : 'That is not the token.'
  } catch (error) {
    said.textContent = 'The server does not answer.'
  }
}
</script>
"""


class Buckets:
    """A token bucket for each of the last 10,000 clients: so many a minute, and as many at once; 0 is no limit."""

    def __init__(self, a_minute: int) -> None:
        self.size = a_minute
        self.levels: dict[str, tuple[float, float]] = {}

    def take(self, client: str) -> None:
        """Trouble 429 when there is none left."""
        if not self.size:
            return
        now = time.monotonic()
        level, then = self.levels.pop(client, (self.size, now))
        level = min(self.size, level + (now - then) * self.size / 60)
        self.levels[client] = level - 1 if level >= 1 else level, now
        if len(self.levels) > 10_000:
            del self.levels[next(iter(self.levels))]
        if level < 1:
            raise Trouble(429, "too many requests", Retry_After=str(math.ceil((1 - level) * 60 / self.size)))


class Doors:
    """Who may come in, by token, Host and Origin, and how often."""

    def __init__(self, options: argparse.Namespace, token: bytes, page: bytes) -> None:
        self.options, self.page, self.token = options, page, token  # no token: open
        self.tls = tls_context(options) if options.tls_cert else None
        self.answers, self.guesses = Buckets(options.rate_limit), Buckets(10)
        self.names = {"localhost", socket.gethostname().lower(), options.host.lower(), *options.allow_host}
        self.hashes = {kind: hashes(kind.encode(), page + LOGIN) for kind in ("script", "style")}

    def receive(self, connection: ServerConnection, request: Request) -> Call:
        """The last proxy's word counts where it is trusted."""
        assert isinstance(connection, Connection)
        address = ip((connection.remote_address or ("",))[0])
        scheme = "https" if self.tls else "http"
        trusted = self.options.trust_proxy
        if address and (address.is_loopback if trusted == "loopback" else str(address) == trusted):
            address = ip(last_of(request, "X-Forwarded-For")) or address
            said = last_of(request, "X-Forwarded-Proto").lower()
            scheme = said if said in ("http", "https") else scheme
        client = ipaddress.ip_network((address, 64), strict=False) if address and address.version == 6 else address
        path = request.path.partition("?")[0]
        upgrade = path == "/ws/audit" and "websocket" in ",".join(request.headers.get_all("Upgrade")).lower()
        host = ",".join(request.headers.get_all("Host")).lower()
        match = HOST.fullmatch(host)
        port = match and match[1] or ("443" if scheme == "https" else "80")
        host = host if match and int(port) <= 65535 else ""
        return Call(connection, request, path, upgrade, str(client), scheme, host, port)

    def check_host(self, call: Call) -> None:
        """An open server answers under names that no other site can point at it (DNS rebinding)."""
        name = call.host.removesuffix(f":{call.port}").strip("[]")
        if not self.token and not ip(name) and name not in self.names:
            raise Trouble(403, "this server is not open under that name; see --allow-host")

    def check_token(self, call: Call) -> str:
        """Where the right token was: "header", "address", "cookie", or "" where none is needed."""
        if not self.token or call.path == "/healthz":
            return ""
        scheme, _, bearer = call.request.headers.get("Authorization", "").strip().partition(" ")
        offered = [("header", bearer.strip().encode("latin-1"))] if scheme.lower() == "bearer" else []
        if call.path in ("/", "/ws/audit"):
            offered += [("address", token) for token in tokens_in(call.request.path.partition("?")[2])]
        for place, token in offered:
            if hmac.compare_digest(token, self.token):
                return place
        ours = self.cookie(call).encode()
        cookies = ";".join(call.request.headers.get_all("Cookie")).encode("latin-1").split(b";")
        if any(hmac.compare_digest(cookie.strip(), ours) for cookie in cookies):
            return "cookie"
        if offered:
            self.guesses.take(call.client)
        raise Trouble(401, "the access token is missing or wrong", WWW_Authenticate="Bearer")

    def cookie(self, call: Call) -> str:
        return f"audit_stream_{call.port}={hmac.new(self.token, b'audit_stream', 'sha256').hexdigest()}"

    def check_origin(self, call: Call) -> None:
        """No other site's page opens the WebSocket, or makes a browser fetch anything but the page."""
        if call.path == "/ws/audit":
            own = f"{call.scheme}://{call.host}"
            if origin_of(call.request.headers.get("Origin", own)) not in (origin_of(own), *self.options.allow_origin):
                raise Trouble(403, "a page of another origin may not open this; see --allow-origin")
        elif call.path != "/" and "cross-site" in call.request.headers.get_all("Sec-Fetch-Site"):
            raise Trouble(403, "a page of another site may not have this")

    def seat(self, call: Call) -> Response:
        """The library's answer to a handshake; what it refuses is Trouble like ours."""
        if len(call.connection.viewers) >= self.options.max_viewers:
            raise Trouble(503, "all places are taken", Retry_After="5")
        response = call.connection.protocol.accept(call.request)
        if response.status_code in (400, 403, 405, 426):
            sentence = bytes(response.body).decode().partition("\n")[0]
            kept = {name: response.headers[name] for name in ("Allow", "Upgrade") if name in response.headers}
            raise Trouble(response.status_code, sentence, **kept)
        if response.status_code == 101:
            call.connection.viewers.add(call.connection)
        return response

    def policy(self, call: Call) -> dict[str, str]:
        """What browsers may do with an answer."""
        address = f"{call.scheme.replace('http', 'ws')}://{call.host}" if call.host else ""
        policy = {"Content-Security-Policy": POLICY.format(**self.hashes, socket=address).strip()}
        return policy | ({"Strict-Transport-Security": "max-age=31536000"} if self.tls else {})


def hashes(kind: bytes, pages: bytes) -> str:
    """Of the scripts or styles that may run (CSP 3, section 6.7)."""
    texts = re.findall(rb"<%b>(.*?)</%b>" % (kind, kind), pages, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in texts]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def last_of(request: Request, name: str) -> str:
    return ",".join(request.headers.get_all(name)).rpartition(",")[2].strip()


def ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Without a scope, and IPv4 as such (RFC 4291, section 2.5.5.2); None for what is no address."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(text.partition("%")[0])
        return getattr(address, "ipv4_mapped", None) or address
    return None


def tokens_in(query: str) -> list[bytes]:
    """The values of ?token=; a plus sign is one, or a space."""
    ways = (urllib.parse.parse_qs(text, True, encoding="latin-1") for text in (query, query.replace("+", "%2B")))
    return [token.encode("latin-1") for parameters in ways for token in parameters.get("token", [])]


def origin_of(text: str) -> str:
    """As browsers write it (RFC 6454, section 6.2), without the default port."""
    scheme, _, host = text.lower().partition("://")
    return f"{scheme}://{host.removesuffix(':443' if scheme == 'https' else ':80')}"


def read_token(options: argparse.Namespace) -> bytes:
    """From the file, the environment or systemd's credentials; b"" where there is none; OSError for a bad one."""
    path, token = options.token_file, os.environb.get(b"AUDIT_STREAM_TOKEN")
    if not path and token is None and (folder := os.environ.get("CREDENTIALS_DIRECTORY")):
        credential = os.path.join(folder, "token")
        path = credential if os.path.lexists(credential) else None  # one that cannot be read must not open the server
    if options.no_auth or not path and token is None:
        return b""
    token = (Path(path).read_bytes() if path else token or b"").strip()
    if not token:
        raise OSError(errno.EINVAL, "the access token is empty", path or "AUDIT_STREAM_TOKEN")
    if len(token) < 16:
        logger.warning("the access token is shorter than 16 characters")
    return token


def tls_context(options: argparse.Namespace) -> ssl.SSLContext:
    """TLS 1.2 or newer; OSError (which SSLError is) when certificate and key cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_certificate(context, options)
    return context


def load_certificate(context: ssl.SSLContext, options: argparse.Namespace) -> None:
    for path in (options.tls_cert, options.tls_key):
        open(path, "rb").close()  # so that the error names the one that cannot be read
    try:
        context.load_cert_chain(options.tls_cert, options.tls_key, password=lambda: b"")
    except ssl.SSLError as error:
        why = "is not for that key" if error.reason == "KEY_VALUES_MISMATCH" else "or its key cannot be used"
        raise OSError(errno.EINVAL, f"certificate {why} ({error.reason or error})", options.tls_cert) from error


# Running


async def follow(log: Log, viewers: Viewers) -> None:
    """The loop for all viewers: check the size, read what is new once, broadcast it."""
    watch = Watch()
    while True:
        watch.arm(log.folders())  # before the check, so that nothing falls between
        while await log.check():
            viewers.advance()
            await asyncio.sleep(0)
        viewers.advance()
        notify("WATCHDOG=1")  # a completed check, not a task that goes on without one
        await asyncio.sleep(WINDOW)
        await watch.wait(max(0.0, min(log.patience(), WATCHDOG) - WINDOW))


async def give_up_stuck() -> None:
    """Who takes nothing for a minute is cut off; its cursor stays good."""
    while True:
        await asyncio.sleep(5)
        for connection in [connection for connection in Connection.everyone if connection.stuck()]:
            connection.transport.abort()


async def run(doors: Doors, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT."""
    options = doors.options
    log = Log(options.log, options.interval)
    await log.check()
    viewers = Viewers(log)
    stop, reload = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(Complaints())
    for number, event in ((signal.SIGTERM, stop), (signal.SIGINT, stop), (signal.SIGHUP, reload)):
        loop.add_signal_handler(number, event.set)
    server = await serve(
        functools.partial(watch_along, viewers, options.initial),
        sock=listener,
        ssl=doors.tls,
        ssl_handshake_timeout=5 if doors.tls else None,  # seconds; who says nothing is counted only after it
        backlog=min(1024, Connection.most_unasked // 2),  # the default drops some in a storm
        process_request=functools.partial(respond, doors, viewers),
        select_subprotocol=lambda _, offered: PROTOCOL if PROTOCOL in offered else None,
        create_connection=Connection,
        server_header=None,
        compression=None,
        max_size=KIB,
        ping_timeout=None,  # pongs wait behind data; `stuck` looks for progress instead
    )
    with contextlib.suppress(OSError):  # wherever standard output leads, even to a full disk
        os.write(1, f"{address_to_open(doors, listener.getsockname()[1])}\n".encode())
    notify("READY=1")
    works = [follow(log, viewers), give_up_stuck(), reread(doors, reload)]
    if options.demo:
        works.append(demonstrate(options.log))
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(work) for work in works]
            await stop.wait()
            for task in running:
                task.cancel()
    finally:
        notify("STOPPING=1")
        for number in (signal.SIGTERM, signal.SIGINT):  # a second one must not spoil the exit code
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        await close(server)


async def reread(doors: Doors, wanted: asyncio.Event) -> None:
    """On SIGHUP the certificate and the token; what cannot be used leaves everything as it is."""
    while await wanted.wait():
        wanted.clear()
        try:
            if doors.tls:
                tls_context(doors.options)  # a failure must not touch the live one
                load_certificate(doors.tls, doors.options)
        except OSError as error:
            logger.warning("the certificate stays as it is: %s: %s", error.filename, error.strerror)
        try:
            token = read_token(doors.options) or doors.token  # a generated one, or a credential that is gone
        except OSError as error:
            logger.warning("the access token stays as it is: %s: %s", error.filename, error.strerror)
            continue
        if token != doors.token:
            doors.token = token
            leaving = [viewer.close(1008, "the access token was changed") for viewer in Connection.viewers]
            await asyncio.gather(*leaving, return_exceptions=True)


async def close(server: Server) -> None:
    """Close the viewers with 1001; what has not ended after a second is cut off, half-sent requests too."""
    server.close()
    closed = asyncio.create_task(server.wait_closed())
    await asyncio.wait([closed], timeout=1)
    for connection in list(Connection.everyone):
        connection.transport.abort()
    await closed


class Complaints:
    """What goes wrong outside of any task, once a minute: with no file descriptor left it is very often."""

    last = -60.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, asyncio.CancelledError):
            return  # a TLS handshake at the stop
        if not isinstance(error, OSError):
            return loop.default_exception_handler(context)
        if time.monotonic() - self.last > 60:
            self.last = time.monotonic()
            logger.warning("%s: %s", context["message"], error.strerror)


def notify(state: str) -> None:
    """Tell systemd (sd_notify(3)); nothing happens without it."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(state.encode(), re.sub("^@", "\0", address))


def listen(options: argparse.Namespace) -> socket.socket:
    """A listening socket; `::` takes IPv4 too. OSError when the address is not to be had."""
    host = options.host
    try:
        family, *_, address = socket.getaddrinfo(host, options.port, type=socket.SOCK_STREAM)[0]
    except UnicodeError:
        raise OSError(errno.EINVAL, "is no host name", host) from None
    both = host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server(address, family=family, dualstack_ipv6=both, reuse_port=options.reuse_port)


def address_to_open(doors: Doors, port: int) -> str:
    """As it was given, or with this machine's name where all addresses are listened on."""
    host = socket.gethostname() if doors.options.host in ("0.0.0.0", "::") else doors.options.host
    host = f"[{host}]" if ":" in host else host
    token = f"?token={doors.token.decode()}" if doors.options.generated else ""
    return f"{'https' if doors.tls else 'http'}://{host}:{port}/{token}"


def limit_files(options: argparse.Namespace) -> None:
    """Raise the soft limit of open files as far as it goes, and cut what needs them to fit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    Connection.most_unasked = min(4096, most // 4)
    fitting = most - Connection.most_unasked - min(256, most // 4)
    if options.max_viewers > fitting:
        logger.warning("only %d viewers: the limit of open files is %d", fitting, most)
        options.max_viewers = fitting


def append_entry(path: str, text: str) -> None:
    """Add an entry, durably, whole and on a line of its own; OSError when it is not in the log."""
    now = datetime.datetime.now(datetime.UTC)
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o640)
    with open(fd, "r+b", buffering=0) as log:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "no regular file", path)
        fcntl.flock(fd, fcntl.LOCK_EX)
        size = os.fstat(fd).st_size
        begun = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        entry = b"\n" * begun + os.fsencode(f"[{now:%Y-%m-%dT%H:%M:%S.%fZ}] {text}\n")
        written = 0
        try:
            while written < len(entry):
                written += log.write(entry[written:])
        except OSError:
            if os.fstat(fd).st_size == size + written:
                os.truncate(fd, size)  # all of it or nothing
            raise
        os.fsync(fd)


DEMO = (
    "Auto-repair: Created PostgreSQL database quantum",
    "Auto-repair: Restarted Grafana container",
    "Auto-repair: Fixed database issue",
    "Auto-repair: Retrained xgboost model",
    "Auto-repair: WARNING disk usage at 91 %",
    "Auto-repair: ERROR restart of prometheus failed, trying again",
    "Weekly self-heal: Completed – ✅ All checks passed",
)


async def demonstrate(path: str) -> None:
    """A plausible entry every second."""
    while True:
        append_entry(path, random.choice(DEMO))
        await asyncio.sleep(1)


# Command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"audit_stream.py: {message}\n")


def whole(low: int, high: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {low} to {high}")
        return int(text)

    return convert


def seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 86400:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0, at most 86400")


def origin(text: str) -> str:
    if not re.fullmatch(r"https?://[^/\s?#@]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no origin such as https://example.org:8443")
    return origin_of(text)


def proxy(text: str) -> str:
    if text != "loopback" and not ip(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no IP address")
    return str(ip(text) or text)


def parser() -> Parser:
    parser = Parser(prog="audit_stream.py", description="Watch an audit log live in a browser.", allow_abbrev=False)
    option = parser.add_argument
    option("--log", metavar="PATH", help="the log; it may appear later, and may be rotated")
    option("--host", metavar="ADDRESS", default="127.0.0.1", help="listen address (default: %(default)s)")
    option("--port", metavar="N", type=whole(0, 65535), default=8080, help="0: any free one (default: %(default)s)")
    option("--interval", metavar="SECONDS", type=seconds, default=3.0, help="of the size check (default: 3)")
    option("--initial", metavar="BYTES", type=whole(0, FRAME), default=1000, help="first shown (default: %(default)s)")
    option("--token-file", metavar="PATH", help="access token; else AUDIT_STREAM_TOKEN or a systemd credential")
    option("--no-auth", action="store_true", help="open to everyone who can reach the port")
    option("--tls-cert", metavar="PATH", help="serve HTTPS and WSS; read again on SIGHUP")
    option("--tls-key", metavar="PATH", help="the key of the certificate")
    option("--allow-host", metavar="NAME", type=str.lower, action="append", default=[], help="a further own name")
    option("--allow-origin", metavar="ORIGIN", type=origin, action="append", default=[], help="of a further page")
    option("--trust-proxy", metavar="ADDRESS", type=proxy, nargs="?", const="loopback", help="take its X-Forwarded-…")
    option("--max-viewers", metavar="N", type=whole(1, 10**6), default=10000, help="(default: %(default)s)")
    option("--rate-limit", metavar="N", type=whole(0, 10**6), default=600, help="answers a minute and client address")
    option("--reuse-port", action="store_true", help="several processes may share the port")
    option("--append", metavar="TEXT", help="write an entry to the log and exit")
    option("--demo", action="store_true", help="follow a throw-away log that gains an entry every second")
    option("--version", action="version", version=f"audit_stream.py {VERSION}")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    options = parser().parse_args(argv)
    wrong = {
        "one of --log PATH and --demo is needed": not options.log and not options.demo,
        "--demo has a log of its own": options.log and options.demo,
        "--append needs --log PATH": options.append is not None and options.demo,
        "--append takes one line of text": re.search(r"[\r\n]", options.append or ""),
        "--tls-cert and --tls-key need each other": bool(options.tls_cert) != bool(options.tls_key),
        "--no-auth and --token-file exclude each other": options.no_auth and options.token_file,
        "--host is empty": not options.host,
    }
    for sentence, applies in wrong.items():
        if applies:
            parser().error(sentence)
    return options


def watch(options: argparse.Namespace) -> None:
    page = (Path(__file__).parent / "static" / "index.html").read_bytes()
    token = read_token(options)
    local = options.host == "localhost" or getattr(ip(options.host), "is_loopback", False)
    options.generated = not token and not options.no_auth and not local
    if options.generated and options.reuse_port:
        parser().error("--reuse-port needs a token that all processes know")
    doors = Doors(options, secrets.token_urlsafe(24).encode() if options.generated else token, page)
    limit_files(options)
    with tempfile.TemporaryDirectory() if options.demo else contextlib.nullcontext("") as folder:
        options.log = options.log or os.path.join(folder, "DEMO_AUDIT.log")
        with listen(options) as listener:
            asyncio.run(run(doors, listener))


def main(argv: list[str] | None = None) -> int:
    """0 after a stop, 1 for what cannot be done, 2 for bad usage."""
    logging.basicConfig(format="audit_stream: %(message)s")
    logger.setLevel(logging.INFO)
    logging.raiseExceptions = False  # standard error may be on a full disk
    warnings.simplefilter("ignore", FutureWarning)  # [a&&b] in a query: Python means to give that a meaning one day
    logging.getLogger("websockets").setLevel(logging.ERROR)
    options = parse(argv)
    try:
        if options.append is None:
            watch(options)
        else:
            append_entry(options.log, options.append)
    except OSError as error:
        what = error.filename or (options.log if options.append is not None else f"{options.host}:{options.port}")
        print(f"audit_stream.py: {what}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
