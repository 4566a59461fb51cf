#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=17"]
# ///
"""Watch one audit log live in a browser, and trust what you see.

Map     log file --check()--> segments --next_message_at()--> viewer         sections 1 to 5
        request --respond()--> authorize() --> page, history, proof          sections 6 to 9
        main() --> run() --> follow(), once; handle_viewer(), for each       sections 10 and 11

Idea    The file is the queue. A viewer is a Position in it. The first screen, catching up, resuming
        and passing through a rotation are the same step: read the next message from a position.
        A viewer at the end is live and gets the broadcast.

Invariants
  1  Only the last segment grows. Every other one has an end_limit and a next.
  2  Bytes before LogFile.end do not change, as far as the first and last 4 KiB of them tell. If
     they do, a new generation begins (truncated, rewritten).
  3  What this process has published is never published again, whatever it is called by now. Where
     nobody can know what lay between two files, the link between them says so (a gap).
  4  A live viewer has no position of its own (None): all of them are at Broadcaster.position.
     It has none either before its first message, and after it left.
  5  A cursor covers only bytes that were sent. It proves itself by the 4 KiB before it.
  6  One event loop. What runs in a thread gets arguments and returns values. It changes nothing
     else, apart from counters, a Checker, and what a FileSet knows: one has these at a time.

Glossary
  generation  one life of the log; a rename, truncation or rewrite begins the next one
  segment     a range of one generation, in the order in which it was published
  draining    a rotated file is still read: for 30 seconds, and as long as it grows
  cursor      text form of a position: OFFSET.HINTHEADPROOF for each file still read, joined by ~
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
import io
import ipaddress
import itertools
import json
import logging
import lzma
import math
import operator
import os
import random
import re
import secrets
import select
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
from collections.abc import Callable, Container, Coroutine, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, TypeVar

try:
    import fcntl
    import grp
    import pwd
    import resource
    import termios
except ImportError:
    sys.exit("audit_stream.py: no fcntl here: it takes Linux, macOS or BSD (on Windows: WSL)")

try:
    import websockets.version
    from websockets.asyncio.server import Server, ServerConnection, serve
    from websockets.datastructures import Headers
    from websockets.exceptions import ConnectionClosed
    from websockets.frames import Frame, Opcode
    from websockets.http11 import Request, Response
    from websockets.protocol import OPEN
    from websockets.typing import Subprotocol

    if int(websockets.version.version.partition(".")[0]) < 17:
        raise ImportError
except ImportError:
    sys.exit(
        "audit_stream.py: websockets 17 or newer is missing;"
        " type: python3 -m pip install 'websockets>=17'"
    )

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
# Owns a descriptor each: who opens one gives it to a LogFile at once.

OPEN_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
FS_IOC_GETVERSION, FS_IOC_GETFLAGS, FS_APPEND_FL = 0x80087601, 0x80086601, 0x20  # ioctl_iflags(2)
secret_files: set[Identity] = set()  # of this program; filled at the start and at each reload

FINGERPRINT_BYTES = 4 * KIB
LIFE_BYTES = 64  # of a file tell it from the file before it
MAX_KEPT = 16 * MIB  # of a log that was trimmed to its last lines
# So many zero bytes are no log: a crash leaves some where a line would begin.
RESERVED = re.compile(rb"(?:\A|\n)\0{16,}|\0{1024,}")
SCAN_BYTES = 256 * KIB  # of one read while looking for the end of a hole
MAX_SCANS = 64  # reads until a hole is taken to go on to the end of the file
MAX_ROTATED = 64  # rotated files that are looked at, and parts of a cursor
MAX_UNRECOGNISED = 100  # names that are listed
MAX_DECOMPRESSED = 1024 * MIB  # of all compressed files that one look, or one resumed viewer, needs


Identity = tuple[int, int]  # of a file: device and inode


class Began(NamedTuple):
    """How a generation began."""

    reason: str  # why the one before it ended: "rotated", "truncated", "rewritten"
    gap: str  # why lines may be missing between them, "" if none can be


# What was read at once, and whether a hole ends it; None if the last published bytes, which the
# same call reads and compares, have changed.
NewBytes = tuple[bytes, bool] | None


class LogFile:
    """One generation of the log: an open file, and how far it was published."""

    def __init__(self, fd: int, end: int = 0) -> None:
        self._fd = fd
        self._recent = (0, b"")  # offset and bytes of what was published last: read only once
        self.name = ""  # of the generation; empty until somebody is told
        self.sequence = 0  # of the generations that this process published; 0 for others
        self.began = Began("rotated", "")
        self.lost = ""  # why something that this file held cannot be read any more
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

    def _identify(self) -> Identity:
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

    def inode_version(self) -> int:
        """Return a number that another file in the same inode does not share; 0 if unknown.

        ioctl_iflags(2), FS_IOC_GETVERSION: ext4, xfs and btrfs have it.
        """
        with contextlib.suppress(OSError):
            version = fcntl.ioctl(self._fd, FS_IOC_GETVERSION, bytes(8))
            return int.from_bytes(version[:4], sys.byteorder)
        return 0

    def is_append_only(self) -> bool | None:
        """Return True if chattr(1) lets nobody change what is there; None if nobody knows."""
        flags = getattr(self.status(), "st_flags", None)  # BSD, macOS
        if flags is not None:
            return bool(flags & (stat.UF_APPEND | stat.SF_APPEND))
        with contextlib.suppress(OSError):
            attributes = fcntl.ioctl(self._fd, FS_IOC_GETFLAGS, bytes(8))
            return bool(int.from_bytes(attributes[:4], sys.byteorder) & FS_APPEND_FL)
        return None

    def is_deleted(self) -> bool:
        return os.fstat(self._fd).st_nlink == 0

    def same_file(self, other: LogFile) -> bool:
        return self.identity == other.identity

    # Reading

    def open(self) -> io.BufferedReader:
        """Return a file object with a position of its own."""
        return io.BufferedReader(LogFileReader(self), 64 * KIB)

    def read_bytes(self, start: int, end: int) -> bytes:
        """Return the bytes from start to end; fewer only at the end of the file."""
        data = os.pread(self._fd, max(0, end - start), start)
        while data and start + len(data) < end:  # files of a network or of FUSE may read short
            offset = start + len(data)
            more = os.pread(self._fd, end - offset, offset)
            if not more:
                break
            data += more
        return data

    def write_to(self, pipe: io.FileIO, start: int, end: int) -> None:
        """Write these bytes into a pipe, as far as they are there; splice(2) needs no copy."""
        try:
            while start < end:
                moved = os.splice(self._fd, pipe.fileno(), end - start, offset_src=start)
                start = start + moved if moved else end
        except (AttributeError, OSError) as error:  # macOS has none, nor have some file systems
            if getattr(error, "errno", errno.EINVAL) != errno.EINVAL:
                raise
            pipe.write(self.read_bytes(start, end))

    def read_data(self, start: int, end: int) -> bytes:
        """Return the bytes from start to end, or to the next hole and the zero bytes beside it."""
        data = self.read_bytes(start, end)
        return self._before_hole(data, start) if b"\0" in data else data

    def _before_hole(self, data: bytes, start: int) -> bytes:
        hole = os.lseek(self._fd, start, os.SEEK_HOLE) - start
        if reserved := RESERVED.search(data):
            hole = min(hole, reserved.end())
        return data[:hole].rstrip(b"\0") if hole < len(data) or reserved else data

    def read_new(self) -> NewBytes:
        """Return what follows the published bytes: at most a message."""
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

    def next_hole(self, start: int) -> int:
        """Return where the next hole begins, lseek(2), or the file ends; start behind its end."""
        try:
            return os.lseek(self._fd, start, os.SEEK_HOLE)
        except OSError:  # ENXIO
            return start

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
        if low in (0, end):
            return low
        if self.read_bytes(low - 1, low) in (b"\n", b"\0"):
            return low

        data = self.read_bytes(low, end)
        line = data.find(b"\n") + 1
        if 0 < line < len(data):
            return low + line
        return low + character_start(data)

    # What was published

    def starts_with(self, published: Fingerprint) -> bool:
        """Return True if the file begins with these bytes, as far as the fingerprint tells."""
        end, head, tail = published
        if self.read_bytes(end - len(tail), end) != tail:
            return False
        return self.read_bytes(0, len(head)) == head

    def holds(self, copy: LogFile) -> bool:
        """Return True if this file begins with all of the other one, as far as 4 KiB tell."""
        return self.starts_with(copy.fingerprint_at(copy.size))

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
        lies that is no longer what was published, of the 4 KiB that are known; "trimmed": after the
        last published lines, with which the file begins now; "replaced": at 0.
        """
        end, head, tail = self.fingerprint
        size, start = self.size, 0
        all_is_known = end == len(tail)
        if all_is_known or self.read_bytes(0, len(head)) == head[:size]:
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
        """Return OFFSET.HINTHEADPROOF: the inode as a hint, how the file begins, and a proof."""
        if not hint:
            hint = short_hash(b"%d:%d" % self.identity)[:4]
        published = self.fingerprint
        if offset != published.end:
            published = self.fingerprint_at(offset)
        head = short_hash(published.head[:LIFE_BYTES])[:4]
        proof = short_hash(published.head + published.tail + hint.encode())
        return f"{offset}.{hint}{head}{proof}"

    def may_become(self, part: str) -> bool:
        """Return True if this file, once it is longer, may be the one of the cursor."""
        offset, _, code = part.partition(".")
        length = min(int(offset), LIFE_BYTES)
        head = self.read_bytes(0, length)
        return len(head) < length or short_hash(head)[:4] == code[4:8]

    def validates(self, part: str) -> bool:
        """Return True if the bytes are those of the cursor, whichever inode they are in."""
        offset, _, code = part.partition(".")
        if int(offset) > self.size:
            return False
        return self.cursor_part(int(offset), hint=code[:4]) == part


class Fingerprint(NamedTuple):
    """How far a file was published, and the first and last 4 KiB of that."""

    end: int = 0
    head: bytes = b""
    tail: bytes = b""

    def begins_like(self, start: bytes) -> bool:
        """Return True if there were lines, and they were these, as far as 4 KiB tell."""
        return b"\n" in self.head and start.startswith(self.head)

    def extended(self, data: bytes) -> Fingerprint:
        """Return the fingerprint after `data` was published as well."""
        head = self.head
        if len(head) < FINGERPRINT_BYTES:
            head = (head + data)[:FINGERPRINT_BYTES]
        tail = (self.tail + data)[-FINGERPRINT_BYTES:]
        return Fingerprint(self.end + len(data), head, tail)


class LogFileReader(io.RawIOBase):
    """The bytes of a log file as a stream, for gzip, bz2 and lzma."""

    def __init__(self, file: LogFile) -> None:
        self.file, self.offset = file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.file.read_bytes(self.offset, self.offset + len(buffer))
        buffer[: len(data)] = data
        self.offset += len(data)
        return len(data)


def short_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()[:12]).decode()


def whole_characters(data: bytes) -> int:
    """Return how many bytes there are before a UTF-8 character that is not complete yet."""
    end = data[-4:]
    return len(data) - len(end) + codecs.utf_8_decode(end, "replace", False)[1]


def character_start(data: bytes) -> int:
    """Return how many bytes at the beginning belong to a character that began before."""
    for offset, byte in enumerate(data[:4]):
        if byte & 0xC0 != 0x80:
            return offset
    return 0


def open_log_file(path: str) -> LogFile:
    """Open the regular file at path, never waiting for a FIFO. Raises OSError for anything else."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file but a directory", path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", path)
    if (status.st_dev, status.st_ino) in secret_files:
        raise OSError(errno.EACCES, "a secret of this server, and not a log", path)
    return LogFile(os.open(path, OPEN_FLAGS))


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
            names = generation_names(file.read_bytes(0, FINGERPRINT_BYTES))
            file.name = next(name for name in names if self._may_take(file, name))
            self._open[file.name] = file
        self._remember(file)
        return file.name

    def same_inode(self, file: LogFile) -> list[LogFile]:
        """Return all named generations that are read from the same file."""
        return [other for other in self._open.values() if other.same_file(file)]

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


def generation_names(start: bytes) -> Iterator[str]:
    """Return the names, without an end, that a generation with this beginning may have."""
    first = start.find(b"\n") + 1
    second = start.find(b"\n", first) + 1 if first else 0
    if len(start) == FINGERPRINT_BYTES and not second:
        second = len(start)
    lines = start[: second or first] or os.urandom(16)
    name = hashlib.sha256(lines).hexdigest()[:16]
    return itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))


# -- rotated files --

COMPRESSED: dict[str, Callable[..., Any]]
COMPRESSED = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}
DATE = r"(?:(?:19|20|21)\d\d[-_.:T\d]*\d|\d{9,11})"
PLAIN_SLACK_S, COMPRESSED_SLACK_S = 0.02, 1.0  # a compressed file's time is before its last line


class ParsedName(NamedTuple):
    """What the name of a rotated file says."""

    kind: str  # "number" or "date", and where it stands: only names of one kind can be compared
    rank: tuple[int, ...]  # within a kind, larger is newer
    compressed: str  # "", "gz", "bz2" or "xz"


class RotatedName(NamedTuple):
    """A rotated file beside the log."""

    path: str
    kind: str
    rank: tuple[int, ...]
    compressed: str
    identity: Identity
    size: int
    modified_s: float
    changed_s: float  # of the inode: a rename counts


def rotated_files(path: str) -> list[RotatedName]:
    """Return the rotated files beside the log, newest first: NAME.1, NAME-20251217, STEM.1.EXT …"""
    found: dict[str, ParsedName] = {}
    for log in dict.fromkeys((path, real_path(path))):
        folder, name = os.path.split(log)
        with contextlib.suppress(OSError), os.scandir(folder or ".") as entries:
            for entry in entries:
                if parsed := parse_rotated_name(name, entry.name):
                    found.setdefault(entry.path, parsed)

    for name in list(found):  # a compressed file beside the plain one is not complete yet
        if found[name].compressed and os.path.splitext(name)[0] in found:
            del found[name]
    return newest_first(path, found)


def newest_first(path: str, found: dict[str, ParsedName]) -> list[RotatedName]:
    """Return the newest 64 files, once each; of several kinds, the one written last comes first."""
    kinds: dict[str, list[RotatedName]] = {}
    seen = {file_identity(path)}
    for name in sorted(found, key=lambda name: found[name].rank, reverse=True):
        files = kinds.setdefault(found[name].kind, [])
        if len(files) >= MAX_ROTATED:
            continue
        with contextlib.suppress(OSError):
            status = os.stat(name)
            identity = (status.st_dev, status.st_ino)
            if identity not in seen and stat.S_ISREG(status.st_mode):
                seen.add(identity)
                size, times = status.st_size, (status.st_mtime, status.st_ctime)
                files.append(RotatedName(name, *found[name], identity, size, *times))

    filled = [files for files in kinds.values() if files]
    filled.sort(key=lambda files: max(file.modified_s for file in files), reverse=True)
    return list(itertools.chain(*filled))[:MAX_ROTATED]


def unrecognised_names(path: str, read: Container[str]) -> list[str]:
    """Return names that begin like the log's own, but are none of the files that are read."""
    found = set[str]()
    for log in dict.fromkeys((path, real_path(path))):
        folder, name = os.path.split(log)
        stem = os.path.splitext(name)[0]
        with contextlib.suppress(OSError):
            for other in os.listdir(folder or "."):
                behind = other[len(stem) : len(stem) + 1]
                is_like = other.startswith(name) or other.startswith(stem) and not behind.isalnum()
                if is_like and other != name and other not in read:
                    found.add(other)
    return sorted(found)[:MAX_UNRECOGNISED]


@functools.lru_cache(1 << 16)
def parse_rotated_name(log: str, name: str) -> ParsedName | None:
    """Return what a rotated file's name says; None for any other name."""
    compressed = compression_of(name)
    if compressed:
        name = os.path.splitext(name)[0]
    if name.startswith(log):
        return parse_suffix(name[len(log) :], "", compressed)

    stem, extension = os.path.splitext(log)
    if extension and name.startswith(stem) and name.endswith(extension):
        inside = name[len(stem) : len(name) - len(extension)]
        return parse_suffix(inside, " inside", compressed)
    return None


def parse_suffix(suffix: str, where: str, compressed: str) -> ParsedName | None:
    if match := re.fullmatch(r"\.(\d{1,6})", suffix):
        return ParsedName(f"number{where}", (-int(match[1]),), compressed)
    if match := re.fullmatch(f"[-.]({DATE})", suffix):
        return ParsedName(f"date{where}", date_rank(match[1]), compressed)
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
            numbers += map(int, re.findall(r"\d\d", group))
        else:
            numbers.append(int(group))
    return tuple(numbers)


def file_name(path: str) -> str:
    """Return the name without the folder, as text."""
    return os.fsencode(os.path.basename(path)).decode(errors="replace")


def real_path(path: str) -> str:
    """Return the path without symbolic links; as it is if one of them is just being replaced."""
    try:
        return os.path.realpath(path)
    except OSError:
        return path


def file_identity(path: str) -> Identity:
    """Return device and inode; (0, 0) if there is no such file."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_dev, status.st_ino
    return 0, 0


def compression_of(path: str) -> str:
    extension = os.path.splitext(path)[1][1:]
    return extension if extension in COMPRESSED else ""


def decompress(
    path: str, most_bytes: int, cancelled: threading.Event, source: LogFile | None = None
) -> LogFile:
    """Return the content of a compressed file, in a temporary file without a name.

    Raises OSError if it is damaged, larger than most_bytes or half of what the disk has left, or if
    the caller has gone.
    """
    source = source or open_log_file(path)
    with tempfile.TemporaryFile(dir=spacious_folder()) as copy:
        disk = os.fstatvfs(copy.fileno())
        most_bytes = min(most_bytes, disk.f_bavail * disk.f_frsize // 2)

        for data in decompressed_pieces(source, compression_of(path), cancelled, MIB):
            if copy.tell() + len(data) > most_bytes:
                raise OSError(errno.EFBIG, "is too large to decompress", path)
            copy.write(data)
        if cancelled.is_set():
            raise OSError(errno.ECANCELED, "was not decompressed to its end", path)
        copy.flush()
        modified_ns = source.status().st_mtime_ns
        os.utime(copy.fileno(), ns=(modified_ns, modified_ns))
        return LogFile(os.dup(copy.fileno()))


def decompressed_pieces(
    file: LogFile, compressed: str, cancelled: threading.Event, size: int
) -> Iterator[bytes]:
    """Yield the content of a compressed file. Raises OSError if it is damaged."""
    try:
        with file.open() as source, COMPRESSED[compressed](source) as stream:
            while not cancelled.is_set() and (piece := stream.read(size)):
                yield piece
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        if getattr(error, "errno", None):
            raise  # it cannot be read now, whatever is in it
        raise OSError(errno.EINVAL, "is damaged") from error


def left_after(left_bytes: int, path: str, opened: LogFile | OSError) -> int:
    """Return how much may be unpacked on the same occasion after this file was opened, or was not.

    One that is too large takes half of it: so much work it was to find that out.
    """
    if isinstance(opened, OSError):
        return left_bytes // 2 if opened.errno == errno.EFBIG else left_bytes
    return left_bytes - opened.size if compression_of(path) else left_bytes


def first_bytes(path: str, count: int) -> bytes:
    """Return the beginning of a rotated file, compressed or not. Raises OSError."""
    file = open_log_file(path)
    compressed = compression_of(path)
    if not compressed:
        return file.read_bytes(0, count)
    return next(decompressed_pieces(file, compressed, threading.Event(), count), b"")


def spacious_folder() -> str | None:
    """Return a folder for large temporary files: /tmp may lie in memory, /var/tmp does not."""
    if "TMPDIR" in os.environ or not os.access("/var/tmp", os.W_OK):
        return None  # as tempfile chooses
    return "/var/tmp"


async def run_in_thread(work: Callable[..., T], *arguments: Any) -> T:
    """Run `work` in a thread; its last argument is an Event, set when the caller has gone."""
    cancelled = threading.Event()
    try:
        return await asyncio.to_thread(work, *arguments, cancelled)
    finally:
        cancelled.set()


# ---- 2 The stream --------------------------------------------------------------------------------
# Tells what comes next from any position, and what that looks like on the wire. Owns the linked
# list of segments: link_to() alone adds to it, and Resumer puts others before it.
#
#   [ app.log, 0 to 900 ] --rotated--> [ new app.log, 0 to 400 ] --> [ old file, 900 to 950 ] --+
#                                            late lines of the old file: a link without an event |
#                                      [ new app.log, 400 to … ] <------ the tail: it still grows

EMPTY_CURSOR = "0.nothing-was-sent-yet"  # before the first byte of the first file


def next_message_at(position: Position, most_bytes: int = MAX_MESSAGE) -> Message | None:
    """Return the next message from a position, with at most so many bytes of the log.

    None at the end of the stream, and where the follower has to look first: the bytes there are no
    longer what was published. Raises OSError.
    """
    segment, offset = normalize(position)
    file, end = segment.file, segment.end
    if offset >= end:
        return following_generation(segment)

    wanted = min(end, offset + most_bytes)
    data = file.read_published(offset, wanted)
    if data is None and not file.released:
        data = file.read_data(offset, wanted)
        if not file.is_unchanged():
            if last_file(segment) is file:
                return None
            data = None  # a rotated file that changed can no longer be trusted: skip the rest of it
    if not data:
        return hole_message(segment, offset, readable=data is not None)

    if len(data) == most_bytes and wanted < end:
        data = data[: data.rfind(b"\n") + 1 or whole_characters(data)]
    return Message("append", "", offset, Position(segment, offset + len(data)), data)


def normalize(position: Position) -> Position:
    """Return the same place at the start of the next segment if one is at the end of its own."""
    segment, offset = position
    while offset >= segment.end and segment.next and not segment.next.event:
        segment, offset = segment.next[:2]
    return Position(segment, offset)


def last_file(segment: Segment) -> LogFile:
    """Return the file at the end of the stream: the follower looks after it."""
    while segment.next:
        segment = segment.next.segment
    return segment.file


def following_generation(segment: Segment) -> Message | None:
    """Return the beginning of the next generation; None at the end of the stream."""
    if segment.next is None:
        return None
    following, offset, event, gap = segment.next
    message = Message("generation", event, offset, Position(following, offset))
    message.gap = gap
    return message


def hole_message(segment: Segment, offset: int, readable: bool) -> Message:
    """Return the way over a hole, or over all that can no longer be read of a segment."""
    end = segment.end
    if readable:
        end = min(end, segment.file.next_data(offset) or end)
    return Message("skip", "hole", offset, Position(segment, end))


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


class Link(NamedTuple):
    """The way to the next segment. An event is the reason why another generation begins there.

    Gaps are found by _files_between and _open_successors (events), successors_of (names and times),
    _doubt (a cut), known_gap (what this process remembers), and for a cursor by Resumer.
    """

    segment: Segment
    offset: int
    event: str  # "rotated", "truncated", "rewritten"; "" within a generation
    gap: str  # why lines may be missing here, "" if none can be


class Segment:
    """A range of one generation. The last one of the list grows with its generation."""

    def __init__(
        self, file: LogFile, older: Iterable[str] = (), newer: Iterable[str] = ()
    ) -> None:
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
        own_part = self.file.cursor_part(offset)
        return "~".join((*self.older_parts, own_part, *self.newer_parts))

    def link_to(
        self, following: Segment, offset: int, event: str = "", gap: str = ""
    ) -> Segment:
        """Close this segment, and go on at that offset of the next one. Return the next one."""
        self.end_limit = self.end
        following.start_cursor = self.cursor(self.end_limit)
        self.next = Link(following, offset, event, gap)
        return following


class Position(NamedTuple):
    """How far a viewer has been served."""

    segment: Segment
    offset: int

    @property
    def cursor(self) -> str:
        return self.segment.cursor(self.offset)


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
    part = r"[1-9]\d{0,17}\.[\w-]{24}"
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
        right = [file for file in proving if is_right(file, part)]
        if proving:
            owners[part] = (right or proving)[0]
    return owners


def is_right(file: LogFile, part: str) -> bool:
    """Return True if the part was made from this very file, and not from a copy of it."""
    return file.cursor_part(offset_of(part)) == part


# ---- 3 The follower ------------------------------------------------------------------------------
# Reads what was appended, and decides what else happened: rotated, truncated, rewritten, missing.
# Owns everything that is read: the current file, the draining ones, the tail, the log's state.
#
#   the open file        the path                beside it                then
#   -------------------  ----------------------  -----------------------  ------------------------
#   changed, now empty   any                     any                      wait up to GRACE_S
#   changed              any                     a copy of what was read  truncated: the copies,
#                                                                         then our file from 0
#   changed: shorter     any                     no copy                  truncated: go on where it
#                                                                         is no longer the same
#   changed otherwise    any                     no copy                  rewritten: likewise
#   unchanged            our file                –                        nothing: state ok
#   unchanged            missing, or no file     –                        missing or unreadable,
#                                                                         after GRACE_S
#   none yet             a file                  what was the log before  adopt the first of them
#   unchanged, deleted   begins with all we read –                        the same log
#   unchanged            an empty file           –                        wait up to GRACE_S
#   unchanged            another file            what was the log since   rotated, once for each;
#                                                                         drain the old one

COALESCE_S = 0.02  # between two checks: bursts are put together
DRAIN_S = 30.0  # for so long after its last growth a rotated file is still read
MAX_DRAINING = 60  # such files at a time: a cursor names 64
GRACE_S = 1.0  # before a missing or emptied log is reported: a rotation is faster
HELD_S = 60.0  # for so long a deleted file is kept for viewers that lag
STALL_S = 0.75  # a wait that took so much too long: the process stood still
WAIT_SLICE_S = 1.0


class LogState(NamedTuple):
    """What viewers are told about the log itself."""

    state: str  # "ok", "missing", "unreadable"
    detail: str  # why; with "ok", something unusual


async def follow(follower: LogFollower, broadcaster: Broadcaster) -> None:
    """Check the size, read what is new once, broadcast it: one loop for all viewers."""
    while True:
        begun_s = time.monotonic()
        while await follower.check():
            broadcaster.broadcast_news()
            await asyncio.sleep(0)
            begun_s = follower.note_stall(begun_s)
        broadcaster.broadcast_news()
        sd_notify("WATCHDOG=1")  # after a completed check only

        await asyncio.sleep(COALESCE_S)
        follower.note_stall(begun_s)
        await follower.wait(WATCHDOG_S)


NO_COPIES: dict[str, Callable[[LogFile], bool]] = {}


class Successor(NamedTuple):
    """A file that was the log after another one, and why lines may be missing between them."""

    file: LogFile
    reason: str
    gap: str


class LogFollower:
    """The one reader of the log for all viewers."""

    def __init__(self, path: str, interval_s: float) -> None:
        self.path, self.interval_s = path, interval_s
        self.current = LogFile(os.open(os.devnull, OPEN_FLAGS))  # until there is a log
        self.current.sequence = 1
        self.tail = Segment(self.current)
        self.draining: dict[LogFile, float] = {}  # rotated files, and until when they are read
        self.state = LogState("missing", "No such file or directory")
        self.size = 0  # of the log as it was last seen, without reserved space
        self.unfinished_bytes = 0  # of a line at the end that is not due
        self.names = GenerationNames()

        self._found = False
        self._reads_failed = False
        self._pending: collections.deque[Successor] = collections.deque()
        self._published = PublishedFiles()
        self._listed: list[RotatedName] = []  # by whose names the last look decided
        self._left_out: set[str] = set()  # copies that it did not need: all of them is in the log
        self._watcher = DirectoryWatcher()
        self._arrivals = Arrivals(log_paths(path))
        self._opened_s = time.time()  # since 1970, when the current file became the log
        self._anomaly_since_s = 0.0  # something else than our file is at the path; 0: nothing is
        self._look_again_since_s = 0.0  # names change while one looks; 0: they do not
        self._looked_s = time.monotonic()  # when the last check began
        self._next_open_s = 0.0  # when the path is opened afresh, whatever its inode says
        self._encoding = EncodingCheck()
        self._check_lock = asyncio.Lock()
        self.next_check = asyncio.Event()  # set, and replaced, by each check
        self.on_generation: Callable[[], None] = lambda: None  # called when another one begins
        self._watch()
        self._open()
        # The folders are watched from before the log was opened.
        self._arrivals = Arrivals(log_paths(path))

    @property
    def name(self) -> str:
        return file_name(self.path)

    def _open(self) -> None:
        """Begin at the end of the log, and with what is still written to rotated files."""
        with contextlib.suppress(OSError):
            file = open_log_file(self.path)
            self.current.replace_descriptor(file)
            self.current.record_published(file.complete_end())
            self.current.last_growth_s = time.monotonic()
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
        for name in reversed(rotated[:MAX_DRAINING]):
            changed_s = max(name.modified_s, name.changed_s)
            if name.compressed or time.time() - changed_s >= DRAIN_S:
                continue
            with contextlib.suppress(OSError):
                file = open_log_file(name.path)
                file.record_published(file.data_end())
                self._drain(file)

    def _end_of_newest(self, rotated: list[RotatedName]) -> str:
        """Return the cursor for the end of the newest rotated file that is not empty."""
        left_bytes = MAX_DECOMPRESSED
        for name in rotated:
            try:
                file = next((f for f in self.draining if f.identity == name.identity), None)
                if file is None:
                    file = open_rotated(name.path, left_bytes, threading.Event())
                    left_bytes = left_after(left_bytes, name.path, file)
                if end := file.data_end():
                    return file.cursor_part(end)
            except OSError as error:
                left_bytes = left_after(left_bytes, name.path, error)
        return EMPTY_CURSOR

    def _segment(self, file: LogFile) -> Segment:
        """Return a new segment of one of the files that are read."""
        files = [*self.draining, self.current]
        parts = [other.cursor_part(other.end) if other.end else "" for other in files]
        place = files.index(file)
        older, newer = parts[:place], parts[place + 1 :]
        return Segment(file, filter(None, older), filter(None, newer))

    # Waiting

    def _watch(self) -> None:
        folders = {os.path.dirname(path) or "." for path in log_paths(self.path)}
        if not self._watcher.watch_folders(folders):
            self._arrivals.reliable = False

    async def wait(self, most_s: float) -> None:
        """Wait for an event, or until the next check is due, at most so long."""
        timeout_s = min(self.interval_s, most_s)
        if self._anomaly_since_s and self.state.state == "ok":
            timeout_s = min(timeout_s, GRACE_S / 4)
        if self.unfinished_bytes:
            due_s = self.current.unfinished[1] + self.interval_s - time.monotonic()
            timeout_s = min(timeout_s, max(due_s, COALESCE_S))
        await self._watcher.wait(max(0.0, timeout_s - COALESCE_S), log_paths(self.path))

    @property
    def has_file_events(self) -> bool:
        return self._watcher.works

    def note_stall(self, since_s: float) -> float:
        """Note if the process stood still since then, and what happened comes all at once.

        Return the time (monotonic).
        """
        now_s = time.monotonic()
        if now_s - since_s > STALL_S:
            self._watcher.stalled = True
        return now_s

    # Checking

    async def check(self) -> bool:
        """Read at most a message of what is new, or see what else happened.

        In this order: what was rotated before anything of the log was read, new bytes, late lines
        of rotated files, and whether the log is still the same file. Return True if there may be
        more.
        """
        async with self._check_lock:
            self._looked_s = time.monotonic()
            try:
                new = self.current.read_new()  # before the events that tell of copies are taken
                if await self._find_unseen():
                    return True
                if self._publish(self.current, new):
                    if self._reads_failed:
                        self._report_ok()  # before the first bytes
                    return True  # broadcast first, look around afterwards
                if self._drain_rotated():
                    return True
                return await self._look_around()

            except OSError as error:  # it is told, and passes
                self._reads_failed = True
                self._report_problem("unreadable", error.strerror or "cannot be read")
                return False
            finally:
                self.next_check.set()
                self.next_check = asyncio.Event()

    def _publish_new(self, file: LogFile, final: bool) -> bool:
        return self._publish(file, file.read_new(), final)

    def _publish(self, file: LogFile, new: NewBytes, final: bool = False) -> bool:
        """Publish the complete lines of what is new, and an unfinished one if it is due.

        Return True if anything was published.
        """
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
            crowded = len(self.draining) > MAX_DRAINING  # then the oldest silent one goes
            start, over = file.end, crowded or time.monotonic() > until_s
            self._publish_new(file, final=over)
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

    def _stop_draining(self, file: LogFile) -> None:
        del self.draining[file]
        self._watcher.forget_file(file)

    # Looking around: is the log still the file that is open?

    async def _look_around(self) -> bool:
        """Return True if something happened, and there may be more to read."""
        if self._pending:
            self._publish_new(self.current, final=True)  # if it fails, nothing has changed yet
            self._switch_to(self._pending.popleft())
            return True
        self._watch()
        self._arrivals.apply(self._watcher.take_events())
        self._published.release_old(self._needed())
        if not self.current.is_unchanged():
            return await self._handle_rewrite()

        try:
            new = self._other_file()
        except OSError as error:
            gone = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
            if error.errno in (errno.EMFILE, errno.ENFILE) and self._free_descriptors():
                return True
            self._report_problem("missing" if gone else "unreadable", problem_of(error))
            return False
        if new:
            return await self._handle_other_file(new)

        chain, gap = await self._open_successors(self._arrivals.visits(), "")
        if chain:  # our file is back after others
            self._enqueue([*chain, Successor(self.current, "rotated", gap)])
            self._arrivals = Arrivals(log_paths(self.path))
            return True
        self._watcher.stalled = False
        self._arrivals.forget_visits()
        self._report_ok(self._unusual())
        return False

    def _free_descriptors(self) -> bool:
        """Let go of deleted files, the newest aside. Return False if there were none."""
        draining = [file for file in self.draining if file.is_deleted()][:-2]
        for file in draining:
            self._stop_draining(file)
        self._published.release_deleted(self._needed())
        return bool(draining)

    def _needed(self) -> set[LogFile | None]:
        """Return the files that are still read, whatever their names."""
        return {self.current, *self.draining, *(successor.file for successor in self._pending)}

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
        replaced = self._found and old.is_deleted() and (old.end or not old.size)
        if replaced and new.starts_with(old.fingerprint):
            self._adopt(new)
            return True
        if self._found and not new.size and self._in_grace_period():
            return False

        chain, gap = await self._files_between(new)
        chain = [successor for successor in chain if not successor.file.same_file(new)]
        if self._renamed_meanwhile():
            return True
        if chain and replaced and chain[0].file.starts_with(old.fingerprint):
            self._reread(chain.pop(0).file)  # the same log, renamed after it was replaced
        self._pass_published(new)
        successors = [*chain, Successor(new, "rotated", gap)]
        if not self._found:
            self._adopt(successors.pop(0).file)
        self._enqueue(successors)
        self._arrivals = Arrivals(log_paths(self.path))
        return True

    def _adopt(self, file: LogFile) -> None:
        """Go on in another file as the same generation."""
        self._watcher.forget_file(self.current)
        self.current.replace_descriptor(file)
        self._watcher.watch_file(self.current)
        self._arrivals = Arrivals(log_paths(self.path), self._arrivals)
        self._found = True
        self._report_ok()

    def _enqueue(self, successors: list[Successor]) -> None:
        """Read on in these files, one after the other, once the open one is read to its end."""
        self._pending.extend(successors)
        present = [name for name in self._listed if name.path not in self._left_out]
        self._published.add_present(present)
        self._listed = []
        self._watcher.stalled = False
        self._report_ok()

    def _switch_to(self, successor: Successor) -> None:
        """Make the next file the log; the open one is read to its end and then drained."""
        old, new = self.current, successor.file
        self._published.add(old)
        new.sequence = old.sequence + 1
        if not new.same_file(old):
            self._drain(old)
        self.draining.pop(new, None)

        self.current = new
        self._begin_generation(new.end, successor.reason, successor.gap)

    # Rotations: which files were the log in between?

    async def _files_between(self, new: LogFile) -> tuple[list[Successor], str]:
        """Return the files that were the log between the open one and `new`, and a last gap."""
        if self._arrivals.can_tell():
            copies = dict.fromkeys(self._arrivals.copies_of_log(), new.holds)
            copies |= dict.fromkeys(self._arrivals.copies_of_own(), self._is_read_anyway)
            chain, gap = await self._open_successors(self._arrivals.visits(), "", copies)
            told = sum(bool(successor.gap) for successor in chain)
            if not gap and len(chain) + told < self._arrivals.expected_files():
                gap = "a file that was the log for a while is gone"
            return chain, gap

        self._listed = rotated_files(self.path)
        rotated = [name for name in self._listed if name.identity != new.identity]
        unseen = [name for name in rotated if self._is_unseen(name)]
        if not self._found:
            names, gap = successors_of(None, unseen, rotated)
        elif ours := await self._find_own(rotated):
            names, gap = successors_of(ours, unseen, rotated)
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

    def _renamed_meanwhile(self) -> bool:
        """Return True if files were renamed while they were opened, so that one looks again.

        No longer than a grace period: a neighbour in the folder may never stop renaming.
        """
        if not self._arrivals.apply(self._watcher.take_events()):
            return False
        self._look_again_since_s = self._look_again_since_s or time.monotonic()
        return time.monotonic() - self._look_again_since_s < GRACE_S

    def _is_unseen(self, name: RotatedName) -> bool:
        return not self._published.includes(name)

    async def _open_successors(
        self,
        names: list[tuple[str, str]],
        last_gap: str,
        copies: Mapping[str, Callable[[LogFile], bool]] = NO_COPIES,
    ) -> tuple[list[Successor], str]:
        """Open these files, given as (path, gap before it); what cannot be opened is a gap.

        `copies` has those that may be needless, since all of it is read elsewhere, and a check.
        """
        self._left_out = set()
        successors: list[Successor] = []
        left_bytes, pending_gap = MAX_DECOMPRESSED, ""
        appeared = {name.path for name in self._arrivals.created} - {""}
        opened: dict[str, LogFile] = {}
        for path, gap in names:
            try:
                if not path:
                    raise OSError(errno.ENOENT, "is gone")
                file = await run_in_thread(open_rotated, path, left_bytes)
            except OSError as error:
                left_bytes = left_after(left_bytes, path, error)
                if path and self._in_grace_period():
                    raise  # it may pass: look again
                name = os.path.basename(path) or "a file that was the log for a while"
                pending_gap = f"{name} {problem_of(error)}"
                continue

            known = [self.current, *opened.values()]
            if any(file.same_file(other) for other in known):
                continue  # it came back, and is drained; or has two names
            if path in copies and copies[path](file):
                self._left_out.add(path)
                continue
            last = next(reversed(opened), "")
            if last in appeared and file.holds(opened[last]):
                gap = successors.pop().gap  # the same was copied before, and not cut then
            opened[path] = file
            self._pass_published(file)
            left_bytes = left_after(left_bytes, path, file)
            successors.append(Successor(file, "rotated", pending_gap or gap))
            pending_gap = ""
        return successors, pending_gap or last_gap

    def _is_read_anyway(self, copy: LogFile) -> bool:
        """Return True if the open file was copied after it was read, or not cut since."""
        own = self.current
        return own.holds(copy) or (own.end > 0 and copy.starts_with(own.fingerprint))

    def _pass_published(self, file: LogFile) -> None:
        """Go on behind what this process has published of that file. Raises OSError."""
        if not file.end and (end := self._published.published_end(file)):
            file.record_published(end)

    async def _find_unseen(self) -> bool:
        """Read first what was rotated away while nothing of the log was read yet."""
        if self.current.end or self._pending or not self._found:
            return False
        self._arrivals.apply(self._watcher.take_events())
        paths = self._names_of_copies()
        if not paths:
            return False
        rotated = rotated_files(self.path)
        unseen = self._unseen_copies(paths, rotated)
        if not unseen:
            return False

        names, gap = successors_of(None, unseen, rotated)
        copies = dict.fromkeys(paths, self.current.holds)
        chain, gap = await self._open_successors(names, gap, copies)
        if self._renamed_meanwhile():
            return True
        if not chain:
            return False
        own = self.current.duplicate()
        self._reread(chain[0].file)
        self._enqueue([*chain[1:], Successor(own, "truncated", gap)])
        self._forget_candidates([path for path, _ in names if path not in self._left_out])
        return True

    def _unseen_copies(self, paths: list[str], rotated: list[RotatedName]) -> list[RotatedName]:
        """Return which of these copies are new and hold anything; none where nobody can tell."""
        later = {path for path, _ in self._arrivals.visits()}
        self._listed = [name for name in rotated if name.path not in later]
        events_tell = self._events_tell()
        renamed = any(name.identity == self.current.identity for name in rotated)
        if renamed and not events_tell:
            return []

        unseen = [name for name in rotated if name.path in paths and name.size]
        unseen = [name for name in unseen if self._is_unseen(name)]
        since_s = self._arrivals.since_s if events_tell else self._opened_s
        return [name for name in unseen if name.modified_s >= since_s - PLAIN_SLACK_S]

    def known_gap(self, older: Identity, newer: Identity) -> str:
        """Return why lines are missing between two files, by identity, if this process knows it."""
        sequences = self._published.sequences | {self.current.identity: self.current.sequence}
        first, second = sequences.get(older, 0), sequences.get(newer, 0)
        if first and second > first + 1:
            return "a file that was the log in between is gone"
        return self._published.lost.get(newer, "")

    # Cuts and rewrites

    async def _handle_rewrite(self) -> bool:
        """Go on where the file changed; what was unread may be in a copy of it."""
        old = self.current
        shorter = old.size < old.end
        if old.size == 0 and self._in_grace_period():
            return False

        copies, used, gap = await self._copies()
        if self._renamed_meanwhile():
            return True
        if copies:
            own = Successor(old.duplicate(), "truncated", gap)
            self._reread(copies[0].file)
            self._enqueue([*copies[1:], own])
            self._forget_candidates(used)
            return True

        change, start = old.change()
        new = old.duplicate()
        new.sequence = old.sequence
        new.lost = old.lost
        if old.end > start:
            new.lost = "the log was cut or rewritten meanwhile"
        new.record_published(start)
        if change in ("cut", "edited"):  # what is before it can still be read by those who lag
            self._end_at(start)
        self.current = new
        lost = change == "replaced" or (shorter and change != "trimmed")
        reason = "truncated" if shorter else "rewritten"
        self._begin_generation(start, reason, self._doubt() if lost else "")
        self._forget_candidates(self._arrivals.candidates())
        self._report_ok()
        return True

    def _forget_candidates(self, used: Container[str]) -> None:
        """Forget copies that were read, and what came before them; later ones may be needed yet."""
        kept: list[str] = []
        for path in self._arrivals.candidates():
            kept = [] if path in used else [*kept, path]
        self._arrivals.forget_candidates({*kept, *self._left_out})

    def _end_at(self, end: int) -> None:
        """Note where our file, and those before it with the same bytes, were cut or edited."""
        head = self.current.fingerprint.head
        for file in [*self.names.same_inode(self.current), self.current]:
            if file is self.current or file.fingerprint.begins_like(head):
                file.record_published(min(end, file.end))

    def _begin_generation(self, start: int, reason: str, gap: str) -> None:
        self._watcher.watch_file(self.current)
        self.current.began = Began(reason, gap)
        self._opened_s = time.time()
        self.current.last_growth_s = time.monotonic()
        self.tail = self.tail.link_to(self._segment(self.current), start, reason, gap)
        counters[f'generations_total{{reason="{reason}"}}'] += 1
        logger.info("log was %s%s", reason, f"; lines may be missing: {gap}" if gap else "")
        with contextlib.suppress(OSError):
            self.names.assign(self.current)
        self.on_generation()

    def _doubt(self) -> str:
        """Return why lines may be missing that were written just before a cut; "" if hardly any."""
        stalled = self._watcher.stalled or time.monotonic() - self._looked_s > STALL_S
        if stalled or not self._watcher.works:
            return "nobody can know what was written between the last look and the cut"
        return ""

    def _reread(self, copy: LogFile) -> None:
        """Read on in a copy of our file from before it was cut."""
        for file in [*self.names.same_inode(self.current), self.current]:
            file.replace_descriptor(copy)

    async def _copies(self) -> tuple[list[Successor], list[str], str]:
        """Return a copy of our file from before it was cut, what was rotated since, and the paths.

        And a last gap, as _open_successors does.
        """
        old = self.current
        if not old.end:
            return [], [], ""
        paths = self._names_of_copies()
        while paths and not await self._is_copy(paths[0]):
            del paths[0]
        if not paths:
            return [], [], ""

        rotated = [name.path for name in rotated_files(self.path)]
        shape = shape_of(paths[0])
        found = [path for path in paths if path in rotated or shape_of(path) == shape]
        found = [path for path in found if not self._published.knows_packed(path)]
        names = [(path, "") for path in found]
        copies, gap = await self._open_successors(names, "", dict.fromkeys(found, old.holds))
        copies = [copy for copy in copies if not old.was_compressed_to(copy.file)]
        if not copies or not copies[0].file.starts_with(old.fingerprint):
            return [], [], gap
        return copies, [path for path in found if path not in self._left_out], gap

    def _names_of_copies(self) -> list[str]:
        """Return files that appeared beside the log and may be copies of it, the oldest first."""
        if self._events_tell():
            return self._arrivals.candidates()
        rotated = self._listed = rotated_files(self.path)
        ours = [name.identity == self.current.identity for name in rotated]
        if True in ours:  # what is newer than our file comes after it, not after its copy
            rotated = rotated[ours.index(True) + 1 :]
        return [name.path for name in reversed(rotated) if self._is_unseen(name)]

    def _events_tell(self) -> bool:
        return self._watcher.works and self._arrivals.reliable

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
        """Return True for a while after the first call since all was well: it begins the period."""
        self._anomaly_since_s = self._anomaly_since_s or time.monotonic()
        return time.monotonic() - self._anomaly_since_s < GRACE_S

    def _report_problem(self, state: str, detail: str) -> None:
        if self.state.state != "ok" or not self._in_grace_period():
            self._set_state(LogState(state, detail))

    def _report_ok(self, detail: str = "") -> None:
        self._reads_failed = False
        self._anomaly_since_s = self._look_again_since_s = 0.0
        self._set_state(LogState("ok", detail))

    def _unusual(self) -> str:
        """Return what is unusual about a log that can be read, in words; "" if nothing is."""
        if self.current.is_deleted():
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
    file = open_log_file(path)
    if file.read_bytes(0, 6).startswith(PACKED):
        raise OSError(errno.EINVAL, "is packed in a way that is not known here", path)
    return file


# How packed files begin: gzip, bzip2, xz, zstd, lz4, zip, compress(1).
PACKED = (
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ\0",
    b"\x28\xb5\x2f\xfd",
    b"\x04\x22\x4d\x18",
    b"PK\x03\x04",
    b"\x1f\x9d",
)


def successors_of(
    ours: RotatedName | None, unseen: list[RotatedName], listed: list[RotatedName]
) -> tuple[list[tuple[str, str]], str]:
    """Return the unseen files that were the log after ours, oldest first, by their names.

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

    numbers = {-name.rank[0] for name in listed if newest and name.kind == newest.kind}
    plan, before = [], ours
    for name in newer:
        plan.append((name.path, missing_between(before, name, numbers)))
        before = name
    return plan, missing_between(before, None, numbers)


def contradicting(
    ours: RotatedName | None, newer: list[RotatedName], unseen: list[RotatedName]
) -> str:
    """Return where names and times of change contradict each other, in words; "" if nowhere."""
    older = [ours] if ours else []
    for name in newer:
        if name.size and name.modified_s < written_before(name, older) - slack_s(name, ours):
            return f"name and time of change of {os.path.basename(name.path)} contradict each other"
        older.append(name)

    for name in unseen:
        if not ours or not name.size or name is ours or name in newer:
            continue
        if name.modified_s > ours.modified_s + slack_s(name, ours):
            return f"{os.path.basename(name.path)} may have been the log in between"
    return ""


def written_before(name: RotatedName, older: list[RotatedName]) -> float:
    """Return when the older files were written last, as far as it tells something of this one.

    A compressed file may bear the time at which it was compressed: long after a newer plain one.
    """
    telling = [other for other in older if other.size and (name.compressed or not other.compressed)]
    return max((other.modified_s for other in telling), default=0.0)


def slack_s(name: RotatedName, ours: RotatedName | None) -> float:
    compressed = name.compressed or (ours and ours.compressed)
    return COMPRESSED_SLACK_S if compressed else PLAIN_SLACK_S


def missing_between(
    older: RotatedName | None, newer: RotatedName | None, numbers: set[int]
) -> str:
    """Return which number is missing between two rotated files, or before the log, in words."""
    if not older or not older.kind.startswith("number"):
        return ""
    next_number = -newer.rank[0] if newer else 0
    for number in range(-older.rank[0] - 1, next_number, -1):
        if number not in numbers:
            return f"rotated file number {number} is missing"
    return ""


UNKNOWN_FILE = Fingerprint(), (0, 0)


class PublishedFiles:
    """Files that were published, or lay beside the log at the start: never published again."""

    def __init__(self) -> None:
        self.sequences: dict[Identity, int] = {}  # in which order they were the log
        self.lost: dict[Identity, str] = {}  # why bytes of them are gone, if any are
        # How far each was published, and what tells it from a later file in the same inode.
        self._known: dict[Identity, tuple[Fingerprint, tuple[int, int]]] = {}
        self._held: list[tuple[float, weakref.ref[LogFile]]] = []  # since when

    def add(self, file: LogFile) -> None:
        """Note a file that is no longer the log, up to where it was published."""
        self.sequences[file.identity] = file.sequence
        self.lost[file.identity] = file.lost
        self._remember(file)
        self._held.append((time.monotonic(), weakref.ref(file)))

    def add_present(self, rotated: list[RotatedName]) -> None:
        """Note the files that are there, and were published, will be, or came before all that."""
        for name in rotated:
            if name.identity in self._known:
                continue
            with contextlib.suppress(OSError):
                file = open_log_file(name.path)
                file.record_published(file.size)
                self._remember(file)

    def _remember(self, file: LogFile) -> None:
        self._known.pop(file.identity, None)
        with contextlib.suppress(OSError):
            marks = file.inode_version(), file.status().st_mtime_ns
            self._known[file.identity] = file.fingerprint, marks
        if len(self._known) > 1024:
            oldest = next(iter(self._known))
            del self._known[oldest]
            self.sequences.pop(oldest, None)
            self.lost.pop(oldest, None)

    def published_end(self, file: LogFile) -> int:
        """Return how far this file was published; 0 if it never was, or is another one.

        The number of an inode is given again: its version and the bytes decide, or the time.
        """
        fingerprint, (version, mtime_ns) = self._known.get(file.identity, UNKNOWN_FILE)
        if not fingerprint.end or not file.starts_with(fingerprint):
            return 0
        if version or file.inode_version():
            return fingerprint.end if version == file.inode_version() else 0
        same_time = file.status().st_mtime_ns == mtime_ns
        return fingerprint.end if same_time or fingerprint.end >= FINGERPRINT_BYTES else 0

    def includes(self, name: RotatedName) -> bool:
        """Return True if this rotated file was published, or there at the start."""
        if name.identity not in self._known:
            return self.knows_packed(name.path)
        with contextlib.suppress(OSError):
            return not name.size or self.published_end(open_log_file(name.path)) > 0
        return False

    def knows_packed(self, path: str) -> bool:
        """Return True for a compressed file that begins like one that was published."""
        if not compression_of(path):
            return False
        with contextlib.suppress(OSError):
            start = first_bytes(path, FINGERPRINT_BYTES)
            return any(known.begins_like(start) for known, _ in self._known.values())
        return False

    def release_old(self, keep: Container[LogFile | None]) -> None:
        """Let go of deleted files that only lagging viewers still read, after a minute."""
        now_s = time.monotonic()
        while self._held and now_s - self._held[0][0] > HELD_S:
            _, reference = self._held.pop(0)
            file = reference()
            if file in keep:
                self._held.append((now_s, reference))
            else:
                self._release(file)

    def release_deleted(self, keep: Container[LogFile | None]) -> None:
        """Let go of all deleted files at once: descriptors have run out."""
        held = [(since_s, reference) for since_s, reference in self._held if reference() in keep]
        for _, reference in self._held:
            if reference() not in keep:
                self._release(reference())
        self._held = held

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
    encoding = encoding_of(file)
    return f"the log is not UTF-8: {encoding}" if encoding else ""


# -- events of the kernel --

# inotify(7)
MODIFY, ATTRIB, MOVED_FROM, MOVED_TO, CREATE, DELETE = 0x2, 0x4, 0x40, 0x80, 0x100, 0x200
DELETE_SELF, MOVE_SELF, Q_OVERFLOW, IGNORED = 0x400, 0x800, 0x4000, 0x8000
FILE_EVENTS = MODIFY | ATTRIB | DELETE_SELF | MOVE_SELF
FOLDER_EVENTS = MOVED_FROM | MOVED_TO | CREATE | DELETE | DELETE_SELF | MOVE_SELF
MAX_EVENTS = 10_000  # kept until they are looked at; then their order is unknown
MAX_NAMES = 256  # followed: of files that appeared beside the log, were the log, or are on the way


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
        self._files: weakref.WeakKeyDictionary[LogFile, int] = weakref.WeakKeyDictionary()
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
        watched: dict[int, str] = {}
        for folder in folders:
            watched[self._add(self._fd, os.fsencode(folder), FOLDER_EVENTS)] = folder
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
        for _ in range(100):  # more than the queue holds; a neighbour may go on filling it
            if not self._read_queue():
                break
        events, self._events = self._events, []
        return events

    async def wait(self, timeout_s: float, paths: tuple[str, ...]) -> None:
        """Wait until something happens to the log, at most so long."""
        self._log_paths = paths
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

    def _read_queue(self) -> bool:
        """Read events. Return True if there may be more."""
        try:
            data = os.read(self._fd, 64 * KIB) if self._fd >= 0 else b""
        except OSError:  # nothing there
            return False

        offset, matters = 0, False
        while offset < len(data):
            watch, mask, cookie, length = struct.unpack_from("iIII", data, offset)
            name = os.fsdecode(data[offset + 16 : offset + 16 + length].rstrip(b"\0"))
            offset += 16 + length
            matters |= self._take_event(watch, mask, cookie, name)
        if matters:
            self._happened = True
            self._wake()
        return bool(data)

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
        many = len(self._events) > MAX_EVENTS // 10  # to be looked at before there are too many
        return path in self._log_paths or many


class TrackedName:
    """A file that appeared in the log's folder, by its present name; "" when it has none."""

    def __init__(self, path: str, during: TrackedName | None = None) -> None:
        self.path = path
        self.during = during  # what was the log at that moment
        self.removed = False  # from the log's path: it may have another name, by a link or a copy


class Arrivals:
    """Which files became the log since the last switch, and what they are called now.

    Read off the kernel's events, in their order, so that a scheme of renaming needs no known names.
    """

    def __init__(self, paths_of_log: tuple[str, str], before: Arrivals | None = None) -> None:
        self._paths_of_log = paths_of_log
        self.reliable = True  # no event since the last switch was lost
        self.since_s: float = before.since_s if before else time.time()  # since 1970
        self._own = TrackedName(paths_of_log[1])  # the file that is open
        self._visitors: list[TrackedName] = []  # were at the log's path after it
        self._at_path: TrackedName | None = self._own
        self._moving: dict[int, list[TrackedName]] = {}
        self.created: list[TrackedName] = []  # other files: copies of the log may be among them
        self._newest = self._own  # of all that were created, also if it is gone
        if before:  # what has appeared already, for the next file
            later = [name.path for name in before.created if name.during is before._at_path]
            self.created = [TrackedName(path, self._own) for path in later if path]

    # Following the names

    def apply(self, events: list[NameEvent]) -> bool:
        """Follow the names through these events. Return True if one may have to look again.

        That is: something else was at the log's path, what may be a copy by its name came or went,
        or a file has another name. A neighbour's file that comes or goes is no reason.
        """
        before, interesting = {name: name.path for name in self.created}, self._of_interest()
        for event in events:
            if event.mask & Q_OVERFLOW:
                self.reliable = False
            elif event.mask & MOVED_FROM:
                self._moving[event.cookie] = self._leave(event.path)
            elif event.mask & DELETE:
                self._remove(event.path)
            elif event.mask & (MOVED_TO | CREATE):
                self._come(event)
        for cookie in list(self._moving)[:-MAX_NAMES]:
            del self._moving[cookie]

        known = [name for name in self.created if name.path and name in before]
        renamed = any(name.path != before[name] for name in known)
        return renamed or interesting != self._of_interest()

    def _of_interest(self) -> dict[TrackedName, str]:
        """Return what was at the log's path, and what may be a copy of it by its name."""
        copies = [name for name in self.created if self._is_rotated(name.path)]
        return {name: name.path for name in self._visitors + copies}

    def _leave(self, path: str) -> list[TrackedName]:
        """Take this name away. Return who had it."""
        everything = [self._own, *self._visitors, *self.created]
        named = [name for name in everything if name.path == path]
        for name in named:
            name.path = ""
        if self._at_path in named:
            self._at_path = None
        return named

    def _remove(self, path: str) -> None:
        """Follow a file that has another name still: it was compressed, or linked and removed."""
        at_path = self._at_path
        named = self._leave(path)
        packed_paths = {f"{path}.{extension}" for extension in COMPRESSED}
        packed = [name for name in self.created if name.path in packed_paths]

        if path in self._paths_of_log:
            for name in named:
                name.removed = name is at_path
        elif not named:  # an older file was compressed
            self.created = [name for name in self.created if name not in packed]
        elif packed:
            self._rename(named[0], packed[-1])
        elif named[0] not in self.created:
            self._rename_to_newest(named[0], path)
        self.created = [name for name in self.created if name.path or name not in named]

    def _rename_to_newest(self, tracked: TrackedName, path: str) -> None:
        """Follow a file to the name that appeared last, just before it was removed."""
        newest = self._newest
        if newest in self.created and not newest.path.startswith(f"{path}."):
            self._rename(tracked, newest)

    def _rename(self, tracked: TrackedName, other: TrackedName) -> None:
        """Take two names for one file: the place of the first, the path of the other."""
        tracked.path = other.path
        self.created.remove(other)

    def _come(self, event: NameEvent) -> None:
        self._leave(event.path)  # what was there is replaced
        known = event.mask & MOVED_TO and event.cookie in self._moving  # it was in a folder before
        moved = self._moving.pop(event.cookie, []) if event.mask & MOVED_TO else []
        for name in moved:
            name.path = event.path

        arrived = moved[0] if moved else TrackedName(event.path, self._at_path)
        if event.path in self._paths_of_log:
            self._at_path = arrived
            self._visitors.append(arrived)
        elif not known:
            self._add_created(arrived)
        if len(self._visitors) > MAX_NAMES:
            self.reliable = False
            del self._visitors[0]

    def _add_created(self, arrived: TrackedName) -> None:
        """Note a file that appeared; of too many, one that is no copy by its name is forgotten."""
        self._newest = arrived
        self.created.append(arrived)
        if len(self.created) > MAX_NAMES:
            others = (name for name in self.created if not self._is_rotated(name.path))
            self.created.remove(next(others, self.created[0]))

    # Answers

    def can_tell(self) -> bool:
        """Return True if the events say which files were the log in between."""
        return self.reliable and bool(self._visitors)

    def forget_visits(self) -> None:
        self._visitors.clear()

    def visits(self) -> list[tuple[str, str]]:
        """Return what was the log before the last file, as (present path, gap before it).

        A file comes after copies of it from before it was cut. Of a file that was removed from the
        log's path, listed names that appeared meanwhile count as its other names.
        """
        target = real_path(self._paths_of_log[0])
        earlier = [name.path for name in self._visitors[:-1]]
        gone = [path for path in earlier if not path or os.path.islink(path)]
        if gone and target != self._paths_of_log[0]:
            return [(path, "") for path in self._links_led_to(target)]

        paths = self._copies_of(self._own) if self._own.removed else []
        for visitor in self._visitors:
            if visitor is self._own:
                continue  # it came back
            copies = self._copies_of(visitor)
            paths += copies
            if visitor.path or not visitor.removed or not copies:
                paths.append(visitor.path)
        if self._visitors and paths[-1:] == [self._visitors[-1].path]:
            paths.pop()  # the log itself
        return [(path, "") for path in paths if not is_other_kind(path)]

    def copies_of_log(self) -> list[str]:
        """Return what appeared under rotated names while the file at the path was the log."""
        return self._copies_of(self._visitors[-1])

    def copies_of_own(self) -> list[str]:
        """Return what appeared under rotated names while the open file was the log."""
        return self._copies_of(self._own)

    def expected_files(self) -> int:
        """Return how many files were the log before the last one, at least."""
        if real_path(self._paths_of_log[0]) != self._paths_of_log[0]:
            return 0  # links may have led to the same file
        earlier = [name.path for name in self._visitors[:-1] if name is not self._own]
        return sum(not is_other_kind(path) for path in earlier)

    def _copies_of(self, visitor: TrackedName) -> list[str]:
        """Return what appeared under rotated names while it was the log, the oldest first."""
        return [path for path in self._appeared_during(visitor) if self._is_rotated(path)]

    def _is_rotated(self, path: str) -> bool:
        log_name = os.path.basename(self._paths_of_log[0])
        return parse_rotated_name(log_name, os.path.basename(path)) is not None

    def _links_led_to(self, target: str) -> list[str]:
        """Return the files that a link led to in between, named like the one it leads to now."""
        shape = shape_of(target)
        paths = [name.path for name in self.created if shape_of(name.path) == shape]
        if target in paths:
            return paths[: paths.index(target)]
        return paths

    def candidates(self) -> list[str]:
        """Return what appeared while the open file was the log, the oldest first: its copies?"""
        return self._appeared_during(self._own)

    def forget_candidates(self, kept: Container[str]) -> None:
        mine = [name for name in self.created if name.during is self._own]
        forgotten = [name for name in mine if name.path not in kept]
        self.created = [name for name in self.created if name not in forgotten]

    def _appeared_during(self, visitor: TrackedName) -> list[str]:
        visited = {name.path for name in self._visitors}
        appeared = [name.path for name in self.created if name.during is visitor]
        paths = dict.fromkeys(filter(None, appeared))
        return [path for path in paths if path not in visited and is_complete(path)]


def is_other_kind(path: str) -> bool:
    """Return True for a name that leads to no lines: a link, a folder, a FIFO …"""
    with contextlib.suppress(OSError):
        return not stat.S_ISREG(os.lstat(path).st_mode)
    return False


def is_complete(path: str) -> bool:
    """Return False for a compressed file beside the plain one: it is still being written."""
    plain_path = os.path.splitext(path)[0]
    return not compression_of(path) or not os.path.lexists(plain_path)


def shape_of(path: str) -> str:
    return re.sub(r"\d+", "0", path)


# ---- 4 Resuming ----------------------------------------------------------------------------------
# Turns a cursor into a position: finds the files that it speaks of, by their bytes, and links what
# came after them to the stream. Owns the compressed files that were unpacked for it.

MAX_TRIES = 20  # while the folder changes at every moment
KEEP_S = 60.0  # what was unpacked, and what could not be: forged cursors cost no more than one


class Chain(NamedTuple):
    """The files behind a cursor: who proves its parts, and what was the log after the newest."""

    owners: dict[str, LogFile]
    newer: list[Successor]
    last_gap: str  # before the current log


class FolderChanged(Exception):
    """Files were renamed while they were looked for."""


CompressedFile = tuple[int, int, float]  # device, inode and time of change


class Resumer:
    """The way back into the stream from a cursor."""

    def __init__(self, follower: LogFollower) -> None:
        self.follower = follower
        self._lock = asyncio.Lock()
        self._decompressed: weakref.WeakValueDictionary[CompressedFile, LogFile]
        self._decompressed = weakref.WeakValueDictionary()
        self._kept: dict[CompressedFile, LogFile] = {}  # some of them, at most 1 GiB
        self._refused: dict[CompressedFile, tuple[float, int, str]] = {}  # bytes tried, and why

    async def resume(self, cursor: str) -> Position | str:
        """Return the position of a cursor, or the reason why there is none. Raises OSError."""
        parts = parse_cursor(cursor)
        if parts is None:
            return "malformed"

        tries = 0
        while True:
            while await self.follower.check():  # else segments would come out of order
                await asyncio.sleep(0)
            current, tries = self.follower.current, tries + 1
            try:
                chain = await self._find_chain(parts, patient=tries < MAX_TRIES)
            except FolderChanged:
                continue

            if current is not self.follower.current:
                continue  # rotated meanwhile
            if self._is_ahead_of_reader(chain) or not current.is_unchanged():
                await self.follower.next_check.wait()
                continue
            if not parts or parts[-1] in chain.owners:
                return self._link_segments(parts, chain)
            return self._refusal(parts[-1])

    def _refusal(self, part: str) -> str:
        """Return why no file proves the newest part of a cursor."""
        current = self.follower.current
        ahead = offset_of(part) > current.size and current.may_become(part)
        return "ahead" if ahead else "changed"

    def _is_ahead_of_reader(self, chain: Chain) -> bool:
        """Return True if the cursor names bytes that this process has yet to read."""
        reading = {self.follower.current, *self.follower.draining}
        ends = ((offset_of(part), file) for part, file in chain.owners.items())
        return any(file in reading and offset > file.end for offset, file in ends)

    # Finding the files

    async def _find_chain(self, parts: list[str], patient: bool) -> Chain:
        """Return who proves the parts, and what was the log after the newest of them.

        The open files answer first, then those beside the log. Raises FolderChanged if it is worth
        while to look again.
        """
        live = [self.follower.current, *reversed(self.follower.draining)]
        owners = match_parts(parts, live)
        proven = all(part in owners and is_right(owners[part], part) for part in parts)
        newer = follow_up(owners[parts[-1]], live) if parts and proven else None
        if newer is not None:
            return Chain(owners, newer, self.follower.current.began.gap)

        # Not all of them are open: look beside the log.
        names = rotated_files(self.follower.path)
        found = await self._open_owners(parts, names, live, patient)
        more = [file for file in found.values() if file not in live]
        owners = match_parts(parts, [*live, *more])
        if parts and parts[-1] not in owners:
            return Chain(owners, [], "")

        newest = owners[parts[-1]] if parts else None
        if newest is self.follower.current:
            return Chain(owners, [], "")
        newer = follow_up(newest, live)
        if newer is not None:
            return Chain(owners, newer, self.follower.current.began.gap)

        # What came after the newest owner is not all open: its name tells.
        own_path = next((path for path, file in found.items() if file is newest), "")
        ours = next((name for name in names if name.path == own_path), None)
        if newest and not ours:
            ours = await self._find_packed(newest, names)
        if newest and not ours:
            return Chain(owners, [], "the file that was read before is nowhere beside the log")
        mine = self.follower.current.identity
        others = [name for name in names if name is not ours and name.identity != mine]
        plan, last_gap = successors_of(ours, others, names)
        return await self._open_newer(owners, newest, plan, last_gap, found, patient)

    async def _find_packed(
        self, file: LogFile, names: list[RotatedName]
    ) -> RotatedName | None:
        """Return the name under which a file that is still drained was compressed."""
        head = file.fingerprint.head
        for name in names:
            with contextlib.suppress(OSError):
                if not name.compressed or first_bytes(name.path, len(head)) != head:
                    continue
                if await self._decompress_once(name, MAX_DECOMPRESSED) is file:
                    return name
        return None

    async def _open_owners(
        self,
        parts: list[str],
        names: list[RotatedName],
        live: list[LogFile],
        patient: bool,
    ) -> dict[str, LogFile]:
        """Open the rotated files; the compressed ones only until every part has an owner."""
        found: dict[str, LogFile] = {}
        for name in names:
            if not name.compressed:
                with contextlib.suppress(OSError):
                    found[name.path] = self._open_plain(name, live, patient)

        left_bytes = MAX_DECOMPRESSED
        for name in names:
            owners = match_parts(parts, [*live, *found.values()])
            if len(owners) == len(parts):
                break
            if not name.compressed:
                continue
            try:
                file = await self._decompress_once(name, left_bytes)
                found[name.path] = file
                left_bytes = left_after(left_bytes, name.path, file)
            except OSError as error:
                left_bytes = left_after(left_bytes, name.path, error)
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
                file = await self._decompress(name.path, key, most_bytes)
                self._decompressed[key] = file
        for twin in self.follower.draining:
            if twin.size == file.size and file.starts_with(twin.fingerprint):
                return twin
        return file

    async def _decompress(self, path: str, key: CompressedFile, most_bytes: int) -> LogFile:
        """Unpack a file, and remember for a while what came of it. Raises OSError."""
        loop = asyncio.get_running_loop()
        tried_bytes, *reason = self._refused.get(key, (-1, 0, ""))
        if most_bytes <= tried_bytes:
            raise OSError(*reason, path)

        try:
            file = await run_in_thread(decompress, path, most_bytes)
        except OSError as error:
            if error.errno in (errno.EFBIG, errno.EINVAL):  # too large, or damaged
                tried_bytes = most_bytes if error.errno == errno.EFBIG else math.inf
                self._refused[key] = tried_bytes, error.errno, error.strerror or ""
                loop.call_later(KEEP_S, self._refused.pop, key, None)
            raise

        kept_bytes = sum(other.size for other in self._kept.values())
        if kept_bytes + file.size <= MAX_DECOMPRESSED:
            self._kept[key] = file
            loop.call_later(KEEP_S, self._kept.pop, key, None)
        return file

    async def _open_newer(
        self,
        owners: dict[str, LogFile],
        newest: LogFile | None,
        plan: list[tuple[str, str]],
        last_gap: str,
        found: dict[str, LogFile],
        patient: bool,
    ) -> Chain:
        """Open what came after the newest owner; what cannot be opened is a gap."""
        newer: list[Successor] = []
        pending_gap, left_bytes = "", MAX_DECOMPRESSED
        names = {name.path: name for name in rotated_files(self.follower.path)}
        before = newest.identity if newest else (0, 0)

        for path, gap in plan:
            try:
                if path not in names:
                    raise FolderChanged if patient else OSError(errno.ENOENT, "is gone")
                if path not in found:
                    found[path] = await self._open_named(names[path], left_bytes)
                    left_bytes = left_after(left_bytes, path, found[path])
                gap = pending_gap or gap or self.follower.known_gap(before, names[path].identity)
                newer.append(Successor(found[path], "rotated", gap))
                before, pending_gap = names[path].identity, ""
            except OSError as error:
                left_bytes = left_after(left_bytes, path, error)
                pending_gap = f"{os.path.basename(path)} {problem_of(error)}"
        known_gap = self.follower.known_gap(before, self.follower.current.identity)
        return Chain(owners, newer, pending_gap or last_gap or known_gap)

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
        successors = [successor.file for successor in chain.newer]
        for file in [*chain.owners.values(), *successors]:
            if file not in reading:
                file.record_published(file.data_end())

        newer = list(chain.newer)
        if parts:
            newest = chain.owners[parts[-1]]
        else:  # nothing was sent yet: from the first file on
            newest = newer.pop(0).file if newer else follower.current
        event = "" if newest is follower.current else "rotated"
        owned_parts = [part for part in parts[:-1] if part in chain.owners]
        sent = [(chain.owners[part], part) for part in owned_parts]

        first = last = Segment(newest, (part for _, part in sent))
        for file, part in sent:
            segment = Segment(file, newer=[newest.cursor_part(newest.end)])
            last = last.link_to(segment, offset_of(part))
        for successor in newer:
            last = last.link_to(Segment(successor.file), 0, successor.reason, successor.gap)

        # The log comes last: from its first byte, unless the cursor covers some of it.
        covered = follower.current in (newest, *chain.owners.values())
        start = follower.current.end if covered else 0
        gap = chain.last_gap or ("" if covered else follower.current.lost)
        last.end_limit = last.end
        last.next = Link(follower.tail, start, event, gap)

        # Before its first byte, a cursor is that of the end of the file before it, found just now.
        nothing_known = not follower.current.end or follower.tail.start_cursor == EMPTY_CURSOR
        if event and not start and nothing_known:
            follower.tail.start_cursor = last.cursor(last.end)
        return Position(first, offset_of(parts[-1]) if parts else 0)


def follow_up(file: LogFile | None, live: list[LogFile]) -> list[Successor] | None:
    """Return what was the log between a file and the current one, if this process published it all.

    `live` are the files that are read, the newest first. Without a file, it is all since the first
    one. None if one of them is missing.
    """
    if file is None:
        file = live[-1]
        newer = follow_up(file, live) if file.sequence == 1 and len(live) > 1 else None
        return None if newer is None else [successor_of(file), *newer]

    if file not in live:
        return None
    later = live[: live.index(file)]
    sequences = [file.sequence, *(other.sequence for other in reversed(later))]
    first = sequences[0]
    if later and (not first or sequences != list(range(first, first + len(sequences)))):
        return None
    return [successor_of(other) for other in reversed(later[1:])]


def successor_of(file: LogFile) -> Successor:
    """Return what to tell whoever comes to the beginning of a file that was published."""
    reason, gap = file.began
    return Successor(file, reason, gap or file.lost)


# ---- 5 Viewers -----------------------------------------------------------------------------------
# Sends each viewer what is new. Who is connected, in which phase, and how much each client may make
# the server hold: a number and a budget of bytes for every phase. Owns all connections.

MAX_BROADCAST = 64 * KIB  # larger batches are not broadcast: each viewer reads them from the file
MAX_LAG_BYTES = 64 * KIB  # with more unsent bytes, or its share, a viewer leaves the broadcast
HEARTBEAT_S = 10.0  # without a message until `checked` is sent
MAX_CACHED = 16  # messages, read and written out once for all who catch up at the same time


class Broadcaster:
    """The live viewers: all of them at one position, the end of the stream.

    It alone writes a viewer's `position`, `detached`, `state_sent` and `proof_sent`.
    """

    def __init__(
        self, follower: LogFollower, connections: Connections, initial_bytes: int
    ) -> None:
        self.follower, self.connections = follower, connections
        self.initial_bytes = initial_bytes  # of the end of the log, for a new viewer
        self.resumer = Resumer(follower)
        self.position = Position(follower.tail, follower.tail.end)
        self.state = follower.state  # what all live viewers know
        self.checked = asyncio.Event()  # set, and replaced, after each check of the follower
        self._cache: dict[Position, Message] = {}
        self._last_send_s = time.monotonic()
        self._proof = b""  # what all viewers were told last about the log's integrity

    # For all viewers

    def broadcast_news(self) -> None:
        """Broadcast what was published since the last call.

        The position moves with each message: whoever lags leaves with it, and reads on in the file
        from there. All do if the batch is large.
        """
        self.checked.set()
        self.checked = asyncio.Event()
        self._broadcast_state()
        end = Position(self.follower.tail, self.follower.tail.end)
        messages = self._pending_messages(end) if end != self.position else []
        if messages is None:
            for viewer in self.connections.live:
                self._detach(viewer)
        for message in messages or ():
            self._send(message.plain, message.json)
            self.position = message.next_position
        self.position = end

        if time.monotonic() - self._last_send_s > HEARTBEAT_S:
            size = max(self.follower.size, end.offset)
            checked = checked_message(size, end.offset, self.follower.unfinished_bytes)
            self._send(b"", checked)
        if self.connections.live_count == len(self.connections.viewers):
            self._cache.clear()  # messages keep their files open

    def _pending_messages(self, end: Position) -> list[Message] | None:
        """Return what all live viewers get now; None if each has to read it."""
        if not self.connections.live_count:
            return []
        position, size, messages = self.position, 0, list[Message]()
        try:
            while size <= MAX_BROADCAST and (message := self._read_message(position)):
                messages.append(message)
                position, size = message.next_position, size + len(message.data)
        except OSError:
            return None  # the follower tells the state at its next check
        if size > MAX_BROADCAST or normalize(position) != end:
            return None
        return messages

    def _read_message(self, position: Position) -> Message | None:
        """Return the next message, with the name of its generation. Raises OSError."""
        message = next_message_at(position, self.connections.unsent_bytes)
        if message:
            self.follower.names.assign(message.file)
        return message

    def _broadcast_state(self) -> None:
        state = self.follower.state
        if state == self.state:
            return
        self.state = state
        self._send(b"", state_message(state))
        for viewer in self.connections.live:  # who lagged has left, and is told later
            viewer.state_sent = state

    def broadcast_json(self, message: dict[str, Any]) -> None:
        """Tell all viewers, and those who come later, about the log's integrity."""
        self._proof = wire_text(message)
        self._send(b"", self._proof)
        for viewer in self.connections.live:
            viewer.proof_sent = self._proof

    def _send(self, plain: bytes, as_json: bytes) -> None:
        """Write one message to all live viewers; those who lag leave the broadcast before."""
        for viewer in self.connections.lagging:
            if viewer in self.connections.broadcast[viewer.speaks_json]:
                self._detach(viewer)

        frames = {False: text_frame(plain) if plain else b"", True: text_frame(as_json)}
        for speaks_json, transports in self.connections.broadcast.items():
            frame = frames[speaks_json]
            for transport in transports.values():
                transport.write(frame)
        counters["sent_bytes_total"] += len(plain) * self.connections.live_count
        self._last_send_s = time.monotonic()

    def _detach(self, viewer: Connection) -> None:
        """Let a viewer read on in the file, from the end of what was sent to it."""
        self.connections.end_broadcast(viewer)
        if not viewer.detached.done():
            viewer.position = self.position
            viewer.detached.set_result(None)

    # For one viewer

    async def serve_first(self, viewer: Connection, since: str | None) -> bytes:
        """Find the viewer's position, and return its first message. Raises OSError."""
        resumed = None if since is None else await self.resumer.resume(since)
        if isinstance(resumed, Position):
            message = next_message_at(resumed, self.connections.unsent_bytes)
            position, text = resumed, ""
            if message and message.kind == "append" and message.file is resumed.segment.file:
                position, text = message.next_position, message.text
            start, reason = resumed.offset, None
        else:
            position, start, text = await self._end_of_log()
            reason = resumed

        viewer.position = position
        self.follower.names.assign(position.segment.file)
        found = isinstance(resumed, Position)
        first = text.encode()
        if viewer.speaks_json:
            name = self.follower.name
            first = snapshot_message(name, start, position, text, found, reason)
        viewer.record_arrival(resumed=found)
        return first

    async def _end_of_log(self) -> tuple[Position, int, str]:
        """Return the end of the stream, and where and what the last lines before it are."""
        follower = self.follower
        while not follower.current.is_unchanged() and await follower.check():
            await asyncio.sleep(0)  # otherwise the cursor would cover bytes that were never sent
        file, end = follower.current, follower.tail.end
        start = file.line_start(end, self.initial_bytes) if file.is_unchanged() else end
        text = file.read_data(start, end).decode(errors="replace")
        return Position(follower.tail, end), start, text

    async def serve_next(self, viewer: Connection) -> bytes:
        """Wait for what comes next for one viewer; b"" if its protocol has no such message.

        Raises OSError.
        """
        if viewer.state_sent != self.follower.state:
            viewer.state_sent = self.follower.state
            return state_message(viewer.state_sent) if viewer.speaks_json else b""
        if viewer.speaks_json and viewer.proof_sent is not self._proof:
            viewer.proof_sent = self._proof
            return self._proof
        assert viewer.position  # it is not live

        message = self._cache.get(viewer.position) or self._read_message(viewer.position)
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
        assert viewer.position
        at_end = normalize(viewer.position) == self.position
        if not at_end or viewer.state_sent != self.state:
            await self.checked.wait()  # the follower has yet to say what happened
            return

        viewer.detached = viewer.loop.create_future()
        self.connections.begin_broadcast(viewer)
        viewer.position = None  # a position of its own would keep rotated files open
        try:
            await viewer.detached
        finally:
            self.connections.end_broadcast(viewer)

    async def tell_trouble(self, viewer: Connection) -> None:
        """Tell a viewer the state, if it is news, and wait for the next check."""
        checked = self.checked
        if viewer.speaks_json and viewer.state_sent != self.follower.state:
            viewer.state_sent = self.follower.state
            await viewer.send(state_message(viewer.state_sent), text=True)
        await checked.wait()

    def remove(self, viewer: Connection) -> None:
        """Forget a viewer that has gone: it must not keep files open."""
        viewer.position = None


async def handle_viewer(broadcaster: Broadcaster, viewer: ServerConnection) -> None:
    """Serve a viewer until it leaves; what it sends is read and ignored."""
    assert isinstance(viewer, Connection)
    viewer.speaks_json = viewer.subprotocol == PROTOCOL
    sending = asyncio.create_task(send_loop(broadcaster, viewer))
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


async def send_loop(broadcaster: Broadcaster, viewer: Connection) -> None:
    """Send the first message, then message by message, and wait live at the end."""
    since = viewer.query.get("since")
    first = True

    try:
        while True:
            try:
                if first:
                    message = await broadcaster.serve_first(viewer, since)
                    await viewer.send(message, text=True)
                    first = False
                elif message := await broadcaster.serve_next(viewer):
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


# -- connections --

REQUEST_S = 10.0  # for a request to be complete, and for every ENOUGH_BYTES of its answer
STALLED_S = 60.0  # without any progress until a viewer is given up
ENOUGH_BYTES = 20 * KIB  # an answer that moves at 2 kB/s may take as long as it needs
READ_BYTES = KIB  # in one go: 150 messages of a byte, before anybody else has a turn
REQUEST_BYTES = 64 * KIB  # from a client before its request is complete, TLS handshake included
VIEWER_BYTES = 256 * KIB  # from a viewer, who has nothing to say
REFILL_BYTES_S = 4 * KIB  # so fast these budgets fill up again
MESSAGE_BYTES = 256  # what a message costs of this budget besides
TURN_S = 0.05  # in such a turn all connections together may send
TURN_BYTES = 64 * KIB  # this; whoever sends more then waits
TURN_CONNECTIONS = 64  # that are heard again in each of the next turns
ANSWERS_BYTES = 64 * MIB  # in all answers that are under way
SMALL_BYTES = 16 * KIB  # an answer of this size is never refused
KERNEL_BYTES = 64 * KIB  # in the kernel for one client


Transports = dict["Connection", asyncio.Transport]


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
        self.waiting: dict[Connection, None] = {}  # nothing is read from them; the oldest first
        # The live viewers, by whether they speak JSON. A message needs their transports, no more:
        # with many of them whatever else one looks at comes from memory, not from a cache.
        self.broadcast: dict[bool, Transports] = {False: {}, True: {}}
        self.lagging: set[Connection] = set()  # live or not: they take less than is sent
        self.received_bytes = 0  # in this turn
        self.turn_timer: asyncio.TimerHandle | None = None

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
        self.waiting.pop(connection, None)
        self.lagging.discard(connection)
        self.end_broadcast(connection)
        self.answer_bytes -= connection.answer_bytes
        connection.answer_bytes = 0

    def count_received(self, connection: Connection, size_bytes: int) -> None:
        """Let a connection wait if all of them send more than what else there is to do bears."""
        if self.turn_timer is None:
            self.turn_timer = connection.loop.call_later(TURN_S, self.begin_turn)
        self.received_bytes += size_bytes
        if self.received_bytes > TURN_BYTES:
            connection.tcp.pause_reading()
            self.waiting[connection] = None

    def begin_turn(self) -> None:
        """Hear those who have waited longest."""
        self.received_bytes = 0
        self.turn_timer = None
        for connection in list(itertools.islice(self.waiting, TURN_CONNECTIONS)):
            del self.waiting[connection]
            connection.tcp.resume_reading()
        if self.waiting:
            loop = asyncio.get_running_loop()
            self.turn_timer = loop.call_later(TURN_S, self.begin_turn)

    def begin_request(self, connection: Connection) -> None:
        self.awaiting_request.pop(connection, None)

    @property
    def live(self) -> list[Connection]:
        return [*self.broadcast[False], *self.broadcast[True]]

    @property
    def live_count(self) -> int:
        return sum(map(len, self.broadcast.values()))

    def begin_broadcast(self, viewer: Connection) -> None:
        if viewer.protocol.state is OPEN:  # else it is closing
            viewer.limit_unsent()
            self.broadcast[viewer.speaks_json][viewer] = viewer.transport

    def end_broadcast(self, viewer: Connection) -> None:
        self.broadcast[viewer.speaks_json].pop(viewer, None)

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

    @property
    def unsent_bytes(self) -> int:
        """Return how much of the log may wait for one viewer in memory: all share 128 MiB."""
        share = 128 * MIB // max(1, len(self.viewers))
        return max(16 * KIB, min(MAX_MESSAGE, share))

    def abort_all(self) -> None:
        for connection in list(self.open):
            connection.abort()

    async def abort_stalled(self) -> None:
        """Abort, for ever, whoever makes no progress. A viewer can resume with its cursor."""
        while True:
            await asyncio.sleep(5)
            for connection in [each for each in self.open if each.is_stalled()]:
                connection.abort()
            for viewer in self.viewers:
                viewer.limit_unsent()


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

        self.who: dict[str, str] = {}  # how the access record names this viewer
        self.query: dict[str, str] = {}
        self.arrived = False
        self.speaks_json = False  # from the end of the handshake on
        self.position: Position | None = None  # this and the next ones belong to the Broadcaster
        self.detached: asyncio.Future[None]  # done as soon as a live viewer has to read the file
        self.state_sent = LogState("ok", "")
        self.proof_sent = b""

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
            self.socket.setsockopt(socket.IPPROTO_TCP, option, KERNEL_BYTES)

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
        for start in range(0, len(data), READ_BYTES):
            part = data[start : start + READ_BYTES]
            cost = 0 if self.connections.tls else len(part)  # TLSProtocol has counted it
            if self.may_receive(cost):
                super().data_received(part)

    def process_event(self, event: Any) -> None:
        if self.may_receive(MESSAGE_BYTES):
            super().process_event(event)

    def may_receive(self, size_bytes: int) -> bool:
        """Count what the client sends. If it is more than it may send, abort and return False."""
        now = time.monotonic()
        used, then = self.received
        used = max(0.0, used - (now - then) * REFILL_BYTES_S) + size_bytes
        self.received = used, now
        self.connections.count_received(self, size_bytes)

        budget = VIEWER_BYTES if self in self.connections.viewers else REQUEST_BYTES
        if used > budget:
            self.abort()
        return used <= budget

    def abort(self) -> None:
        self.tcp.abort()

    def limit_unsent(self) -> None:
        """Set with how many unsent bytes asyncio calls pause_writing(): it leaves the broadcast."""
        limit_bytes = min(MAX_LAG_BYTES, self.connections.unsent_bytes)
        self.transport.set_write_buffer_limits(limit_bytes)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.connections.lagging.add(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.connections.lagging.discard(self)

    def send_data(self) -> None:
        super().send_data()
        if self.protocol.state is not OPEN:  # nothing may follow a Close frame
            self.connections.end_broadcast(self)

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
        return now - self.progress[1] > (REQUEST_S if answered else STALLED_S)

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
        """Let go of the connection, also if the handshake failed: it does not hear of that."""
        connection = self.connection
        del self.connection
        connection.connections.remove(connection)
        if not hasattr(connection, "transport"):
            connection.break_cycles()
        super().connection_lost(exc)


# ---- 6 HTTP --------------------------------------------------------------------------------------
# From a request to its answer: context, access, route, common headers. Owns nothing.

LOG_PATHS = ("/api/audit", "/api/search", "/api/counts", "/api/timeline", "/api/seek", "/api/files")
PROOF = {"/api/receipt": "GET, HEAD", "/api/review": "POST", "/api/record": "POST"}


class HTTPError(Exception):
    """An error response: status, one sentence, headers (with _ for -)."""

    def __init__(self, status: int, sentence: str, **headers: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.headers = headers
        self.page = b""  # for people, instead of the sentence


def busy() -> HTTPError:
    return HTTPError(503, "too many answers are under way", Retry_After="5")


class Site(NamedTuple):
    """What there is to be served."""

    access: AccessControl
    broadcaster: Broadcaster
    history: History
    files: FileSet
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
        connection.query = context.query
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
        return make_response(200, metrics(site).encode(), content_type)

    if path == "/ws/audit":
        if "origin" in context.query:  # a page asks why its WebSocket was refused
            check_room(context.connection.connections)
        raise HTTPError(426, "this address speaks WebSocket", Upgrade="websocket")
    if path in ("/healthz", *LOG_PATHS, *PROOF):
        try:
            return await cancel_on_disconnect(context.connection, log_response(site, context))
        except OSError as error:
            raise unreadable(error) from None
    raise HTTPError(404, "not found")


async def log_response(site: Site, context: RequestContext) -> Response:
    """Return what is said about the log, 503 if there is none.

    What a person did is recorded all the same.
    """
    follower = site.broadcaster.follower
    state, detail = follower.state
    if state != "ok" and context.path != "/api/record":
        raise HTTPError(503, f"the log is {state}: {detail}")

    if context.path == "/healthz":
        return make_response(200, b"ok\n", TEXT)
    follower.names.assign(follower.current)
    if context.path == "/api/files":
        body = json.dumps(await site.files.describe(), ensure_ascii=False).encode()
        return make_response(200, body, JSON, ETag=f'"{follower.current.name}"')
    file = await site.files.file_of(context)
    etag = f'"{file.name}"'
    try:
        check_if_match(context.request, etag)
        response = await file_response(site, file, context)
    except HTTPError as error:
        response = error_response(context.path, error)
    except OSError as error:
        response = error_response(context.path, unreadable(error))
    response.headers["ETag"] = etag
    return response


def check_if_match(request: Request, etag: str) -> None:
    """Raises HTTPError 412 if the client means another generation (RFC 9110, 13.1.1)."""
    wanted = request.headers.get("If-Match", "*").split(",")
    if not {"*", etag} & {tag.strip() for tag in wanted}:
        raise HTTPError(412, "the log has been replaced since (If-Match)")


async def file_response(site: Site, file: LogFile, context: RequestContext) -> Response:
    """Return what is said about one file, the log or a rotated one. Raises HTTPError, OSError."""
    if context.path in PROOF:
        return await site.proof.respond(file, context)
    if not context.connection.connections.reserve(context.connection, MIB):
        raise busy()
    response = await site.history.respond(file, context)
    site.proof.reads.note(context, response)
    return response


def unreadable(error: OSError) -> HTTPError:
    return HTTPError(503, f"the log cannot be read: {error.strerror}")


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
    if error.page:
        body, content_type = error.page, HTML
    return make_response(error.status, body, content_type, **error.headers)


def with_common_headers(site: Site, context: RequestContext, response: Response) -> Response:
    """Return the answer with what every one needs, or 429 in place of a refused WebSocket."""
    if context.upgrade and response.status_code != 400:  # malformed is said before too many
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


def int_parameter(
    query: dict[str, str],
    name: str,
    default: int,
    low: int,
    high: int,
) -> int:
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


# ---- 7 Access ------------------------------------------------------------------------------------
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
body { background: #07110b; color: #7ee8a0; font: 16px system-ui, sans-serif }
body { max-width: 20em; margin: 20vh auto 0 }
label, input, button, output { display: block; box-sizing: border-box; font: inherit }
input, button { width: 100%; padding: 8px; color: #d5ffe2; background: #102018 }
input, button { border: 1px solid #2b4a38; margin: 8px 0 }
output { color: #ff8a80; min-height: 1.5em; margin: 8px 0 }
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
  const address = './?token=' + encodeURIComponent(token)
  const headers = { Authorization: 'Bearer ' + unescape(encodeURIComponent(token)) }
  try {
    const byAddress = 'address' in this.dataset
    let reply = await (byAddress ? fetch(address) : fetch('./', { headers: headers }))
    const isOurs = () => /^Bearer/.test(reply.headers.get('WWW-Authenticate'))
    if (reply.status === 401 && !isOurs()) reply = await fetch(address)
    const status = isOurs() ? 401 : reply.status
    if (reply.ok) location.replace('./' + location.hash)
    else said.textContent = ANSWERS[status] || 'The server answers ' + status + '.'
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
        mark = hmac.digest(self.secret, b"name", "sha256").hex()
        value = hmac.digest(self.secret, b"value", "sha256").hex()
        return f"audit_stream_{port}_{mark[:8]}={value}".encode()


class Credential(NamedTuple):
    """What a request came in with: nothing, or a token and the place it was found in."""

    place: str = ""  # "header", "address" or "cookie"
    token: Token | None = None


def check_headers(context: RequestContext) -> None:
    """Raises HTTPError 400 for what can be read in two ways (RFC 9110, 5.3; RFC 9112, 3.2)."""
    for name in ("Host", "Origin", "Authorization", "Range", "If-Match"):
        if len(context.request.headers.get_all(name)) > 1:
            raise HTTPError(400, f"duplicate {name} header")
    if not context.host:
        raise HTTPError(400, "the Host header is missing or malformed")


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

        names = ("localhost", socket.gethostname(), options.host, *options.allow_host)
        self.names = {name.lower() for name in names}
        self.hide_secrets()
        kinds = ("script", "style")
        self.hashes = {kind: csp_hashes(kind, page + LOGIN_PAGE) for kind in kinds}

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
        offers = joined(request, "Upgrade").lower()
        upgrade = path == "/ws/audit" and "websocket" in offers
        host, port = parse_host(joined(request, "Host").lower(), scheme)
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
        marked = "cross-site" in context.request.headers.get_all("Sec-Fetch-Site")
        own = not marked and self.is_own_origin(context) and self.is_own_name(context)
        limiter = self.answers if own else self.foreign_answers
        limiter.acquire(context.client)

    def count_resume(self, context: RequestContext) -> None:
        """Count a cursor. An honest one names up to three files; checking 64 takes a second."""
        files = context.query["since"].count("~") + 1
        self.resumes.acquire(context.client, 1 if files <= 3 else files**2)

    def is_own_name(self, context: RequestContext) -> bool:
        """Return False for a name that another site could point at an open server (rebinding)."""
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

        if remembered := self.token_of_cookie(context):
            return Credential("cookie", remembered)
        if offered:
            self.guesses.acquire(context.client)
            record_access("refused", **context.who)
        sentence = "the access token is missing or wrong"
        error = HTTPError(refusal_status(context), sentence, WWW_Authenticate="Bearer")
        if context.path == "/":
            error.page = login_page(context)
        raise error

    def token_of_cookie(self, context: RequestContext) -> Token | None:
        cookies = joined(context.request, "Cookie", ";").encode("latin-1").split(b";")
        for token in self.tokens:
            ours = token.cookie(context.port)
            if any(hmac.compare_digest(cookie.strip(), ours) for cookie in cookies):
                return token
        return None

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
        default = own
        if context.path == "/ws/audit":
            default = context.query.get("origin", own)
        named = normalize_origin(context.request.headers.get("Origin", default))
        return named == own or named in self.options.allow_origin

    def security_headers(self, context: RequestContext) -> dict[str, str]:
        """Return what browsers may do with an answer."""
        address = ""
        if context.host:
            address = f"{context.scheme.replace('http', 'ws')}://{context.host}"
        headers = {"Content-Security-Policy": POLICY.format(**self.hashes, socket=address).strip()}
        if self.tls:
            headers["Strict-Transport-Security"] = "max-age=31536000"
        return headers

    def hide_secrets(self) -> None:
        """Let token, certificate and key never be served as a log, whatever links to them."""
        paths = (token_path(self.options), self.options.tls_key, self.options.tls_cert)
        secret_files.update(file_identity(path) for path in paths if path)

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

        self.hide_secrets()
        valid = {token.secret for token in self.tokens} or {b""}
        lost = [viewer for viewer in viewers if viewer.token not in valid]
        closing = [viewer.close(1008, "the access token was changed") for viewer in lost]
        await asyncio.gather(*closing, return_exceptions=True)


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


def refusal_status(context: RequestContext) -> int:
    """Return 401, or 403 to a browser that holds the password of a proxy: at a 401, Chromium takes
    that password for the wrong one, forgets it and asks for it in a dialog."""
    scheme = context.request.headers.get("Authorization", "").partition(" ")[0]
    from_browser = joined(context.request, "User-Agent").startswith("Mozilla/")
    return 403 if from_browser and scheme.lower() == "basic" else 401


def login_page(context: RequestContext) -> bytes:
    """Return the form; behind a proxy that wants Authorization for itself it uses the address."""
    if context.request.headers.get("Authorization", "bearer").lower().startswith("bearer"):
        return LOGIN_PAGE
    return LOGIN_PAGE.replace(b"<form>", b"<form data-address>")


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


def joined(request: Request, name: str, separator: str = ",") -> str:
    """Return all values of a header as one."""
    return separator.join(request.headers.get_all(name))


def last_value(request: Request, name: str) -> str:
    """Return what the last proxy says in this header."""
    return joined(request, name).rpartition(",")[2].strip()


def normalize_origin(text: str) -> str:
    """Return an origin as browsers write it, without the default port (RFC 6454, 6.2)."""
    scheme, _, host = text.lower().partition("://")
    default = ":443" if scheme == "https" else ":80"
    return f"{scheme}://{host.removesuffix(default)}"


def csp_hashes(kind: str, pages: bytes) -> str:
    """Return the hashes of the scripts or styles that may run (CSP 3, 6.7)."""
    texts = re.findall(rf"<{kind}>(.*?)</{kind}>".encode(), pages, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text).digest()) for text in texts]
    return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)


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
    text = os.environb.get(b"AUDIT_STREAM_TOKEN")
    if path and not options.no_auth:
        text = Path(path).read_bytes()
    if text is None or options.no_auth:
        return ()

    tokens = []
    for line in text.splitlines():
        *names, secret = line.rsplit(None, 1) or [b""]
        if secret:
            name = b"".join(names).strip().decode(errors="replace")
            tokens.append(Token(name, secret))
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


# ---- 8 History -----------------------------------------------------------------------------------
# Answers questions about a whole file, the log or a rotated one: ranges, search, counts, times.
# Owns the places of searches and scans, the threads that feed greps and read what they find, and
# the rotated files that were unpacked.

PIPE_BYTES = 256 * KIB  # of the log, on their way to grep
MAX_LINE = MIB  # longer lines are not searched: grep would hold them in memory
MAX_MATCH_TEXT, MAX_ANSWER_TEXT = 16 * KIB, MIB
SEARCH_S = 3.0  # of one call
FIRST_PIECE_S = 5.0  # a search that does not get through its first piece is too expensive
SEARCH_BYTES = 256 * MIB  # of one call
# Each for one grep, the newest first: a frequent word costs no more than the first one.
PIECES_BYTES = [MIB, 4 * MIB, 16 * MIB, *[32 * MIB] * 8]
MAX_INPUTS = 32  # pipes to one grep
SCAN_S = 5.0
TIMES_BYTES = 64 * KIB

ByteRange = tuple[int, int]
Answer = dict[str, Any]
Query = dict[str, str]
Edges = list[int]  # of adjacent ranges, the newest first: [900, 500, 0] are 500 to 900 and 0 to 500
Stretch = list[int]  # its start, its end, how many lines match
Fed = list[ByteRange]  # of the file, what a grep got: it counts only these bytes
Reader = Callable[[IO[bytes], Fed], Any]  # of what a grep prints
Process = subprocess.Popen[bytes]
Work = Callable[..., T]


class History:
    """Answers about whole files: two searches at a time, each with a grep on every core."""

    def __init__(self, zone: datetime.tzinfo) -> None:
        self.zone = zone
        self.cores = min(8, usable_cores())
        self.search_places, self.scan_places = asyncio.Semaphore(2), asyncio.Semaphore(2)
        # For each grep one thread feeds and one reads.
        self.threads = concurrent.futures.ThreadPoolExecutor(4 * self.cores, "search")

    async def respond(self, file: LogFile, context: RequestContext) -> Response:
        """Answer a question about this file. Raises HTTPError, OSError."""
        if context.path == "/api/audit":
            return await range_response(file, context.request.headers.get("Range", ""))
        answer = await self.answer(file, context)
        return make_response(200, json.dumps(answer, ensure_ascii=False).encode(), JSON)

    async def answer(self, file: LogFile, context: RequestContext) -> Answer:
        query = context.query
        if context.path == "/api/search":
            return await self.search(file, query)
        if context.path == "/api/counts":
            return await self.count(file, query)
        if context.path == "/api/timeline":
            points = int_parameter(query, "points", 200, 1, 2000)
            return await self.scan(timeline, file, points, self.zone)
        return await self.scan(seek, file, wanted_time(query, self.zone), self.zone)

    async def scan(self, work: Work[T], *args: Any) -> T:
        try:
            async with asyncio.timeout(SCAN_S), self.scan_places:
                return await run_in_thread(work, *args)
        except TimeoutError:
            raise HTTPError(422, "too few lines of the log have a time") from None

    async def search(self, file: LogFile, query: Query) -> Answer:
        """Return the newest matching lines, and how far the search came. Raises HTTPError."""
        limit = int_parameter(query, "limit", 200, 1, 1000)
        search = await self.prepare(file, query, "-ab")
        edges = await self.in_pool(line_starts, search, piece_ends(search.before))
        pieces = [[end, start] for end, start in itertools.pairwise(edges)]

        done = await self.grep(search, pieces, limit, functools.partial(read_matches, limit))
        found = [match for piece in reversed(done) for match in piece.found][-limit:]
        matches = await self.in_pool(match_texts, file, found)

        start = done[-1].start if done else edges[0]
        if len(found) == limit or len(matches) < len(found):
            start = matches[0]["start"]
        return {"matches": matches, **coverage(search, done, start, edges[0])}

    async def count(self, file: LogFile, query: Query) -> Answer:
        """Return how many lines of each stretch match, and how far it came. Raises HTTPError."""
        number = int_parameter(query, "stretches", 200, 1, 400)
        search = await self.prepare(file, query, "-ach")
        # A stretch that is larger than a piece is counted in parts.
        parts = 1 + search.size // number // PIECES_BYTES[-1]
        edges = await self.in_pool(stretch_edges, search, number, parts)

        done = await self.grep(search, group_edges(edges), math.inf, read_counts)
        start = done[-1].start if done else edges[0]
        counts = [matches for piece in done for matches in reversed(piece.found)]
        counted = zip(itertools.pairwise(edges), counts, strict=False)
        parts_counted = [[low, high, matches] for (high, low), matches in counted]
        stretches = merge_parts(search.size, number, parts_counted)
        return {"stretches": stretches, **coverage(search, done, start, edges[0])}

    async def prepare(self, file: LogFile, query: Query, options: str) -> Search:
        """Return what a query asks for, and how grep answers it. Raises HTTPError."""
        size = file.size
        before = min(size, int_parameter(query, "before", size, 0, 1 << 62))
        if query.get("case") != "1":
            options += "i"
        pattern = await self.in_pool(grep_pattern, file, query.get("q", ""), options)
        return Search(file, size, before, pattern)

    async def grep(
        self, search: Search, pieces: list[Edges], enough: float, read: Reader
    ) -> list[Piece]:
        """Return the pieces that were searched, the newest first. Raises HTTPError."""
        try:
            await asyncio.wait_for(self.search_places.acquire(), 3)
        except TimeoutError:
            raise HTTPError(503, "too many searches at a time", Retry_After="3") from None

        counters["searches_total"] += 1
        begun = time.monotonic()
        waiting = collections.deque(pieces)
        running: collections.deque[asyncio.Task[Piece]] = collections.deque()
        done: list[Piece] = []
        # The first matches are searched for alone: often they are enough, or already too much.
        at_first = self.cores if enough == math.inf else 1
        try:
            while (waiting or running) and sum(len(piece.found) for piece in done) < enough:
                while waiting and len(running) < (self.cores if done else at_first):
                    work = self.grep_piece(search, waiting.popleft(), read)
                    running.append(asyncio.create_task(work))

                limit_s = SEARCH_S if done else FIRST_PIECE_S
                await asyncio.wait([running[0]], timeout=begun + limit_s - time.monotonic())
                if not running[0].done():
                    break
                done.append(running.popleft().result())
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            self.search_places.release()

        if pieces and not done:
            raise HTTPError(422, TOO_EXPENSIVE)
        return done

    async def grep_piece(self, search: Search, edges: Edges, read: Reader) -> Piece:
        """Search the lines between these offsets. Raises HTTPError."""
        process, pipes = start_grep(search.pattern, len(edges) - 1)
        assert process.stdout
        fed: Fed = []
        # Each thread owns ends of pipes and closes them; ending the process is what ends both.
        feeding = self.in_pool(feed_grep, search, edges, pipes, fed)
        reading = self.in_pool(read, process.stdout, fed)
        try:
            await asyncio.wait([feeding, reading])
        except asyncio.CancelledError:
            process.kill()
            await asyncio.wait([feeding, reading])
            raise
        finally:
            process.wait()

        if process.returncode not in (0, 1):  # 2: the limits of PCRE, or no PCRE; negative: ours
            raise await self.in_pool(grep_failure)
        feeding.result()
        return Piece(edges[-1], fed, reading.result())

    def in_pool(self, work: Work[T], *args: Any) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self.threads, work, *args)


def usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    return len(affinity(0)) if affinity else os.cpu_count() or 1


# -- ranges --


async def range_response(file: LogFile, header: str) -> Response:
    """Return the latest lines, or at most 1 MiB of the range (RFC 9110, 14). Raises HTTPError."""
    if not header.lower().startswith("bytes="):
        body = await asyncio.to_thread(latest_lines, file)
        return make_response(200, body, TEXT, Accept_Ranges="bytes")

    size = file.size
    start, end = requested_range(header, size)
    if start >= end:
        content_range = f"bytes */{size}"
        raise HTTPError(416, "no such range", Accept_Ranges="bytes", Content_Range=content_range)
    body = await asyncio.to_thread(file.read_bytes, start, min(end, start + MIB))
    content_range = f"bytes {start}-{start + len(body) - 1}/{size}"
    return make_response(206, body, TEXT, Accept_Ranges="bytes", Content_Range=content_range)


def requested_range(header: str, size: int) -> ByteRange:
    """Return the range that the header asks for, an empty one if there is none."""
    match = re.fullmatch(r"bytes=[ \t]*(\d{0,4000})-(\d{0,4000})[ \t]*", header, re.A | re.I)
    first, last = match.groups() if match else ("", "")
    if not first:
        return max(0, size - int(last or 0)), size
    return int(first), min(int(last) + 1, size) if last else size


def latest_lines(file: LogFile) -> bytes:
    end = file.complete_end()
    return file.read_bytes(file.line_start(end, 64 * KIB), end)


# -- search: pieces of the file through greps --

TOO_EXPENSIVE = "the search is too expensive: simplify it"


class Pattern(NamedTuple):
    """What grep looks for, in which locale, and whether invalid UTF-8 could hide it."""

    options: str
    text: bytes
    locale: str = "C.UTF-8"
    needs_valid_utf8: bool = False


class Search(NamedTuple):
    """What a call asks for: the file as long as it is now, from `before` backwards."""

    file: LogFile
    size: int
    before: int
    pattern: Pattern


class Piece(NamedTuple):
    """What one grep found in the lines from `start` on, and which ranges it was fed."""

    start: int
    fed: Fed
    found: Any


def grep_pattern(file: LogFile, query: str, options: str) -> Pattern:
    """Return what grep has to look for. Raises HTTPError."""
    terms = parse_query(query)
    if encoding := utf16_name(file.read_bytes(0, FINGERPRINT_BYTES)):
        raise HTTPError(422, f"the log is {encoding}: only UTF-8 can be searched")

    first = terms[0]
    if len(terms) > 1 or first.exclude:
        each = (f"(?{'!' if term.exclude else '='}.*{term.unit})" for term in terms)
        return Pattern(f"{options}P", f"^{''.join(each)}".encode(), needs_valid_utf8=True)

    text = first.text or ""
    is_plain = text.isascii() and text.isprintable()  # a line end parts patterns for -F
    if "c" in options and text and is_plain:  # twice as fast if many lines match
        return Pattern(f"{options}F", text.encode(), "C")

    # Plain text cannot match inside invalid bytes, so they can stay.
    spans_invalid = first.text is None or "\ufffd" in first.text
    return Pattern(f"{options}P", first.pattern.encode(), needs_valid_utf8=spans_invalid)


def piece_ends(before: int) -> list[int]:
    """Return where pieces end and begin, the newest first: at most SEARCH_BYTES."""
    ends = [before - back for back in itertools.accumulate(PIECES_BYTES, initial=0)]
    return [max(0, end, before - SEARCH_BYTES) for end in ends]


def stretch_edges(search: Search, number: int, parts: int) -> Edges:
    """Return where the parts of stretches end and begin: at most SEARCH_BYTES."""
    total = number * parts
    borders = (-(-search.size * n // total) for n in range(total))
    lowest = search.before - SEARCH_BYTES
    inner = [border for border in borders if lowest <= border < search.before]
    return line_starts(search, [search.before, *inner])


def group_edges(edges: Edges) -> list[Edges]:
    """Return pieces, as large as those of a search, that end and begin at these edges."""
    pieces = [edges[:1]]
    sizes = itertools.chain(PIECES_BYTES, itertools.repeat(PIECES_BYTES[-1]))
    enough = next(sizes)
    for edge in edges[1:]:
        piece = pieces[-1]
        if piece[0] - piece[-1] >= enough or len(piece) > MAX_INPUTS:
            pieces.append(piece[-1:])
            enough = next(sizes)
        pieces[-1].append(edge)
    return pieces if len(edges) > 1 else []


def merge_parts(size: int, number: int, parts: list[Stretch]) -> list[Stretch]:
    """Return the stretches of which these parts were counted, the newest first."""
    stretches: list[Stretch] = []
    last = -1
    for start, end, matches in parts:
        # A part begins in the line that holds its border: its last byte is behind that.
        stretch = (end - 1) * number // size
        if stretch != last:
            stretches.append([end, end, 0])
        stretches[-1][0] = start
        stretches[-1][2] += matches
        last = stretch
    return stretches


def line_starts(search: Search, offsets: list[int]) -> Edges:
    """Return the last line starts at or before these offsets, each once, the newest first."""
    starts = {line_before(search.file, offset, search.size) for offset in offsets}
    return sorted(starts, reverse=True)


def line_before(file: LogFile, offset: int, size: int) -> int:
    """Return the last line start at or before offset; offset itself in a line over 1 MiB."""
    if not 0 < offset < size:
        return offset
    low = max(0, offset - MAX_LINE - 1)
    start = behind_last_newline(file, low, offset)
    return start if start > low or not low else offset


def behind_last_newline(file: LogFile, start: int, end: int) -> int:
    """Return the offset behind the last newline between these; `start` if there is none."""
    for low in (max(start, end - 4 * KIB), start):
        if line := file.read_bytes(low, end).rfind(b"\n") + 1:
            return low + line
    return start


def start_grep(pattern: Pattern, inputs: int) -> tuple[Process, list[int]]:
    """Start a grep that reads its pattern, unseen by a process list, and lines from pipes."""
    pipes: list[tuple[int, int]] = []
    try:
        while len(pipes) < 1 + inputs:
            pipes.append(os.pipe())
            widen_pipe(pipes[-1][1])
        child_ends = [child_end for child_end, _ in pipes]
        files = [f"/dev/fd/{child_end}" for child_end in child_ends]
        process = subprocess.Popen(
            ["grep", pattern.options, "-f", *files],
            bufsize=PIPE_BYTES,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=child_ends,
            env={"LC_ALL": pattern.locale, "PATH": os.environ.get("PATH", os.defpath)},
        )
    except OSError as error:
        for _, our_end in pipes:
            os.close(our_end)
        if isinstance(error, FileNotFoundError):
            raise HTTPError(501, NO_PCRE) from None
        raise HTTPError(503, f"no search can be started: {error.strerror}") from None
    finally:
        for child_end, _ in pipes:
            os.close(child_end)

    limit_child(process.pid)
    return process, [our_end for _, our_end in pipes]


def widen_pipe(end: int) -> None:
    """Let a pipe hold more: fewer turns for both sides."""
    with contextlib.suppress(AttributeError, OSError):  # macOS; or enough for one user, pipe(7)
        fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def limit_child(pid: int) -> None:
    """Let grep end even if the server does not live to end it, and let the stream go first."""
    with contextlib.suppress(OSError):
        if hasattr(resource, "prlimit"):  # not on macOS
            resource.prlimit(pid, resource.RLIMIT_AS, (512 * MIB, 512 * MIB))
            resource.prlimit(pid, resource.RLIMIT_CPU, (10, 10))
        os.setpriority(os.PRIO_PROCESS, pid, 10)


NO_PCRE = "a search needs GNU grep with -P on this server: install the package grep"


def grep_failure() -> HTTPError:
    """Return why a grep failed: it was too much for it, or it knows no -P."""
    with contextlib.suppress(OSError):
        if not knows_pcre():
            return HTTPError(501, NO_PCRE)
    return HTTPError(422, TOO_EXPENSIVE)


def knows_pcre() -> bool:
    """Return True if grep knows -P. Raises OSError if there is none."""
    quiet = subprocess.DEVNULL
    command = ["grep", "-abP", "x"]
    return subprocess.run(command, stdin=quiet, stdout=quiet, stderr=quiet).returncode == 1


@functools.cache
def can_search() -> bool:
    try:
        return knows_pcre()
    except OSError:
        return False


def feed_grep(search: Search, edges: Edges, pipes: list[int], fed: Fed) -> None:
    """Write the pattern, and each range into its pipe; note in `fed` which bytes these are."""
    mends = search.pattern.needs_valid_utf8
    with contextlib.ExitStack() as stack, contextlib.suppress(BrokenPipeError):
        files = [stack.enter_context(open(pipe, "wb", buffering=0)) for pipe in pipes]
        files[0].write(search.pattern.text)
        files[0].close()

        for start, end in itertools.pairwise(reversed(edges)):
            pipe = files.pop(1)
            for low, high in whole_lines(search, start, end):
                first = fed.pop()[0] if fed and fed[-1][1] == low else low
                fed.append((first, high))
                if mends:
                    pipe.write(as_valid_lines(search.file.read_bytes(low, high)))
                else:
                    search.file.write_to(pipe, low, high)
            pipe.close()


def whole_lines(search: Search, start: int, end: int) -> Iterator[ByteRange]:
    """Yield ranges of many lines, without those over 1 MiB, and holes."""
    file = search.file
    at = next_line(file, start - 1, end) if start else 0
    while at < end:
        limit = min(end, file.next_hole(at))
        high = min(limit, at + MAX_LINE + 1)
        stop = high if high == search.size else behind_last_newline(file, at, high)
        if stop > at:
            yield at, stop
        at = stop if stop > at else next_line(file, at, end)


def next_line(file: LogFile, at: int, end: int) -> int:
    """Return the offset behind the next newline, or behind the next hole."""
    while at < end:
        data = file.read_data(at, min(end, at + MIB))
        if not data:
            return min(end, file.next_data(at) or end)
        if line := data.find(b"\n") + 1:
            return at + line
        at += len(data)
    return end


def as_valid_lines(data: bytes) -> bytes:
    """Return valid UTF-8 of the same length, in which zero bytes end with a newline."""
    if b"\0" in data:
        data = RESERVED.sub(lambda zeros: zeros[0][:-1] + b"\n", data)
    return replace_invalid_utf8(data)


def replace_invalid_utf8(data: bytes) -> bytes:
    """Return valid UTF-8 of the same length: PCRE matches no further than invalid bytes."""
    at = len(data) if data.isascii() else 0
    try:
        while at < len(data):  # chunks that fit into the processor's cache: twice as fast
            chunk = data[at : at + 64 * KIB]
            at += codecs.utf_8_decode(chunk, "strict", at + len(chunk) == len(data))[1]
        return data
    except UnicodeDecodeError:
        return data.decode(errors="audit_stream.stand_in").encode()


def stand_in(error: UnicodeError) -> tuple[str, int]:
    """Return a character as long as the invalid bytes, and neither letter nor space."""
    assert isinstance(error, UnicodeDecodeError)
    return "\x1a\x9f\ufffd"[error.end - error.start - 1], error.end


codecs.register_error("audit_stream.stand_in", stand_in)


def read_matches(most: int, pipe: IO[bytes], fed: Fed) -> list[ByteRange]:
    """Return the ranges of the last lines that grep found."""
    with pipe:
        lines = (line.partition(b":") for line in pipe)  # at most 1 MiB each, as they were fed
        matches = ((int(offset), len(line)) for offset, _, line in lines)
        last = collections.deque(matches, most)
    return [matched_range(fed, *match) for match in last]


def matched_range(fed: Fed, offset: int, length: int) -> ByteRange:
    start = file_offset(fed, offset)
    return start, min(start + length, fed[-1][1])  # grep ends the last line if nobody did


def read_counts(pipe: IO[bytes], _: Fed) -> list[int]:
    """Return how many lines grep counted in each range, the oldest first."""
    with pipe:
        return [int(line) for line in pipe]


def file_offset(fed: Fed, offset: int) -> int:
    """Return where in the file the byte is that grep got at an offset of its own."""
    for start, end in fed:
        if offset < end - start:
            return start + offset
        offset -= end - start
    raise AssertionError("grep found what it was not given")


def match_texts(file: LogFile, found: list[ByteRange]) -> list[Answer]:
    """Return the last of these lines, 1 MiB of text or little more, each with its first 16 KiB."""
    matches: list[Answer] = []
    left = MAX_ANSWER_TEXT
    for start, end in reversed(found):
        if left <= 0:
            break
        if RESERVED.match(file.read_bytes(start, start + LIFE_BYTES)):
            start = file.next_data(start) or start

        data = file.read_bytes(start, min(end, start + MAX_MATCH_TEXT + 1)).removesuffix(b"\n")
        text = data[:MAX_MATCH_TEXT]
        cut = whole_characters(text) if end - start > MAX_MATCH_TEXT else len(text)
        decoded = text[:cut].decode(errors="replace")
        matches.append({"start": start, "end": end, "text": decoded})
        left -= len(text)
    return matches[::-1]


def coverage(search: Search, pieces: list[Piece], start: int, end: int) -> Answer:
    """Return what an answer says about how far it came, and what was not searched."""
    skipped = []
    at = start
    fed = [one for piece in reversed(pieces) for one in piece.fed]
    for low, high in [*fed, (end, end)]:
        if at < low:
            skipped.append((at, low))
        at = max(at, high)

    covered: Answer = {"scanned": (start, end), "size": search.size}
    return covered | {"skipped": skipped} if skipped else covered


# -- encodings: what is not UTF-8 is searched as far as it is ASCII, UTF-16 not at all --

UTF16 = (
    ("UTF-16 (little-endian)", codecs.BOM_UTF16_LE, 1),
    ("UTF-16 (big-endian)", codecs.BOM_UTF16_BE, 0),
)


def encoding_of(file: LogFile) -> str | None:
    """Return in a few words what a log that is not UTF-8 probably is. Raises OSError."""
    size = file.size
    if name := utf16_name(file.read_bytes(0, FINGERPRINT_BYTES)):
        return name

    lines: list[bytes] = []
    for at in range(0, size, max(FINGERPRINT_BYTES, size // 16)):
        block = file.read_bytes(at, min(size, at + FINGERPRINT_BYTES)).split(b"\n")
        lines += block[bool(at) : -1]
    invalid = [line for line in lines if not is_utf8(line)]
    if 100 * len(invalid) < len(lines) or not invalid:
        return None

    foreign = re.findall(rb"[\x80-\xff]+", b"\n".join(invalid))
    single = sum(len(letters) == 1 for letters in foreign)
    kind = "Latin-1 or Windows-1252" if 2 * single > len(foreign) else "another encoding"
    percent = 100 * len(invalid) // len(lines)
    return f"not UTF-8 in {percent} % of its lines, perhaps {kind}"


def is_utf8(data: bytes) -> bool:
    try:
        return bool(data.decode() or True)
    except UnicodeDecodeError:
        return False


def utf16_name(head: bytes) -> str:
    """Return what a log is that begins like UTF-16: with its mark, or letters beside NULs."""
    for name, mark, high in UTF16:
        nuls = head[high::2].count(0)
        others = head[1 - high :: 2].count(0)
        if head.startswith(mark) or nuls > len(head) // 4 + 8 * others:
            return name
    return ""


# -- times of lines --


def wanted_time(query: Query, zone: datetime.tzinfo) -> float:
    wanted = parse_moment(query.get("time", ""), zone)
    if wanted is None:
        raise HTTPError(400, "time must be a date and time like 2025-12-17T17:40:37Z")
    return wanted


def timeline(
    file: LogFile, points: int, zone: datetime.tzinfo, cancelled: threading.Event
) -> Answer:
    """Return the times of lines that are spread evenly over the file."""
    size = file.size
    wanted = (size * n // points for n in range(points) if size and not cancelled.is_set())
    offsets = sorted({line_before(file, offset, size) for offset in wanted})
    time_format = detect_time_format(file, zone)
    if not time_format:
        return {"size": size, "format": None, "points": [(at, None) for at in offsets]}

    known = []
    for at in offsets:
        time_s = time_format.time_of(file.read_bytes(at, at + HEAD_BYTES), at)
        if time_s is not None:
            known.append((at, time_s))
    times = dict(plausible_times(known, time.time()))
    return {
        "size": size,
        "format": time_format.name,
        "points": [(at, times.get(at)) for at in offsets],
    }


def seek(
    file: LogFile, wanted_s: float, zone: datetime.tzinfo, cancelled: threading.Event
) -> Answer:
    """Find the first line at or after a time, by bisection. Raises HTTPError if no line has one."""
    time_format = detect_time_format(file, zone)
    if not time_format:
        raise HTTPError(422, "no line of the log has a time that is known")

    now_s = time.time()
    low, high = 0, file.size
    found: tuple[int, float | None] = high, None
    while high - low > TIMES_BYTES:
        middle = (low + high) // 2
        lines = timed_lines(file, time_format, middle, high, cancelled)
        some = plausible_times(list(itertools.islice(lines, 8)), now_s)
        # The first one has no neighbour before it here: if it is ahead of the second one, it leaps.
        line = min(some[:2], key=lambda line: line[1], default=None)
        if line and line[1] < wanted_s:
            low = line[0]
        else:
            high, found = middle, line or found

    # A little further, so that the last line has its neighbours too.
    lines = timed_lines(file, time_format, low, high + 4 * KIB, cancelled)
    for at, time_s in plausible_times(list(lines), now_s):
        if time_s >= wanted_s and at < high:
            found = at, time_s
            break
    return {"offset": found[0], "time": found[1]}


def timed_lines(
    file: LogFile, time_format: TimeFormat, start: int, end: int, cancelled: threading.Event
) -> Iterator[tuple[int, float]]:
    """Yield offset and time of the lines that begin from start to end."""
    size = file.size
    at = next_line(file, start - 1, end) if start else 0
    while at < min(end, size) and not cancelled.is_set():
        data = file.read_data(at, min(size, at + TIMES_BYTES))
        length = len(data) if at + len(data) == size else data.rfind(b"\n") + 1
        for line, time_s in time_format.times_in(data[:length] or data, at):
            if at + line < end:
                yield at + line, time_s
        at = at + length if length else next_line(file, at, end)


# -- the past: the log and its rotated files, each under the name of its generation --

MAX_UNPACKED = 16  # files at a time
MAX_UNPACKED_BYTES = 4096 * MIB  # together
MAX_FILE_BYTES = 1024 * MIB  # each, and half of what is free
UNUSED_S = 300.0  # after somebody looked at it
DECOMPRESS_S = 5.0  # a client waits no longer, but comes again
FOLLOWED_RENAMES = 3  # of a file while it is opened

FileKey = tuple[int, int, int, int]  # device, inode, size, time of change
NOT_READ: FileKey = (0, 0, 0, 0)
TimeSpan = tuple[float | None, float | None]


class PastFile(NamedTuple):
    """What is known of a rotated file; `size` and `last` are None before it is unpacked."""

    key: FileKey
    path: str
    compressed: str
    generation: str
    size: int | None
    first: float | None = None
    last: float | None = None

    def describe(self) -> dict[str, Any]:
        packed = self.key[2] if self.compressed else None
        about = {"generation": self.generation, "name": file_name(self.path), "size": self.size}
        return about | {"packed": packed, "first": self.first, "last": self.last}


class FileSet:
    """The log and its rotated files: their names, and those that were decompressed, for a while."""

    def __init__(self, follower: LogFollower, zone: datetime.tzinfo) -> None:
        self.follower, self.zone = follower, zone
        self.listing = asyncio.Lock()  # who has it may change these two: a look, in a thread
        self.known: dict[tuple[int, int], PastFile] = {}  # by device and inode
        self.heads: dict[str, bytes] = {}  # the first bytes of each generation, by its name
        self.places = asyncio.Semaphore(2)
        self.unpacking: dict[FileKey, asyncio.Task[LogFile]] = {}
        self.used_s: dict[FileKey, float] = {}

    async def describe(self) -> dict[str, Any]:
        """Return the answer of /api/files: the oldest file first, the log last; what is beside."""
        current = self.follower.current
        past = await self.past_files(current)
        log, about = await run_in_thread(self.look_at_log, current)

        files = [*past, log]
        read = {os.path.basename(file.path) for file in files}
        beside = await asyncio.to_thread(unrecognised_names, self.follower.path, read)
        return {
            "files": [file.describe() for file in files],
            "unrecognised": [file_name(name) for name in beside],
            "log": about,
            "server": {
                "version": VERSION,
                "has_file_events": self.follower.has_file_events,
                "interval": self.follower.interval_s,
                "can_search": await asyncio.to_thread(can_search),
                "unpacks": list(COMPRESSED),
                "max_unpacked": MAX_FILE_BYTES,
                "max_files": MAX_ROTATED,
            },
        }

    def look_at_log(
        self, current: LogFile, cancelled: threading.Event
    ) -> tuple[PastFile, dict[str, Any]]:
        """Return the log as one of the files, and what else a person may ask about it."""
        status = current.status()
        time_format = detect_time_format(current, self.zone)
        span = times_at_ends(current, time_format, cancelled)
        key, size = file_key(status), status.st_size
        log = PastFile(key, self.follower.path, "", current.name, size, *span)

        return log, {
            "format": time_format.name if time_format else None,
            "zone": str(self.zone),
            "encoding": encoding_of(current),
            "owner": account_name(pwd.getpwuid, status.st_uid),
            "group": account_name(grp.getgrgid, status.st_gid),
            "mode": stat.filemode(status.st_mode),
            "append_only": current.is_append_only(),
        }

    async def file_of(self, context: RequestContext) -> LogFile:
        """Return the file that a request is about, the log if it names none. Raises HTTPError."""
        current = self.follower.current
        generation = context.query.get("generation", current.name)
        if generation == current.name:
            return current

        for past in await self.past_files(current):
            if past.generation == generation and past.compressed:
                return await self.unpacked(past)
            if past.generation == generation:
                return await self.opened(past)
        raise HTTPError(404, "no file of this log has this generation")

    async def opened(self, past: PastFile) -> LogFile:
        try:
            return await self.follow_name(open_past_file, past)
        except OSError as error:
            status = 404 if isinstance(error, FileNotFoundError) else 422
            raise HTTPError(status, f"{file_name(past.path)}: {error.strerror}") from None

    async def follow_name(self, work: Work[LogFile], past: PastFile) -> LogFile:
        """Open a file by its path, or where a rotation put it meanwhile. Raises OSError."""
        for _ in range(FOLLOWED_RENAMES):
            with contextlib.suppress(FileNotFoundError):
                return await run_in_thread(work, past)
            listed = await self.past_files(self.follower.current)
            same = [file for file in listed if file.key[:2] == past.key[:2]]
            past = same[0] if same else past
        return await run_in_thread(work, past)

    async def past_files(self, current: LogFile) -> list[PastFile]:
        async with self.listing:
            return await run_in_thread(self.look, current)

    def look(
        self, current: LogFile, cancelled: threading.Event, looks: int = FOLLOWED_RENAMES
    ) -> list[PastFile]:
        """Return the rotated files, the oldest first. What is known is not read again."""
        log = file_key(current.status())
        found: dict[FileKey, RotatedName | None] = {log: None}
        for rotated in reversed(rotated_files(self.follower.path)):
            with contextlib.suppress(OSError):
                status = os.stat(rotated.path)
                if stat.S_ISREG(status.st_mode):
                    found.setdefault(file_key(status), rotated)

        # A renamed file keeps its name, a changed one too if it still begins with the same bytes.
        same_inode = ((key, self.known.get(key[:2])) for key in found)
        known = {key: file for key, file in same_inode if file}
        known[log] = PastFile(log, self.follower.path, "", current.name, current.size)
        self.heads[current.name] = current.read_bytes(0, FINGERPRINT_BYTES)
        taken = {file.generation for key, file in known.items() if file.key == key}
        files = {}
        for key, name in found.items():
            file = known.get(key)
            if file and file.key == key:
                files[key] = file._replace(path=name.path if name else file.path)
            elif name:
                files[key] = self.examine(name, key, file, taken, cancelled)
                taken.add(files[key].generation)

        current_log = files.pop(log)
        paths = {key[:2]: file.path for key, file in files.items()}
        moved = (file_identity(path) != identity for identity, path in paths.items())
        if looks and any(moved):  # a rotation came between: what was read may be of another file
            return self.look(current, cancelled, looks - 1)

        self.known = {key[:2]: file for key, file in files.items()}
        self.heads = {name: head for name, head in self.heads.items() if name in taken}
        # Its times were not read: that is done once it was rotated.
        self.known[log[:2]] = current_log._replace(key=NOT_READ)
        return list(files.values())

    def examine(
        self,
        rotated: RotatedName,
        key: FileKey,
        before: PastFile | None,
        taken: set[str],
        cancelled: threading.Event,
    ) -> PastFile:
        """Read the beginning of a file, and its end if it is not compressed."""
        size = None if rotated.compressed else key[2]
        try:
            file = open_beginning(rotated, cancelled)
            head = file.read_bytes(0, FINGERPRINT_BYTES)
            first, last = time_span(file, self.zone)
        except OSError:  # damaged, or not ours to read: it is named all the same
            return PastFile(key, rotated.path, rotated.compressed, unreadable_name(key), size)

        generation = self.name_of(head, before.generation if before else "", taken)
        if rotated.compressed:
            last = None
        return PastFile(key, rotated.path, rotated.compressed, generation, size, first, last)

    def name_of(self, head: bytes, before: str, taken: set[str]) -> str:
        """Return the name of the generation that begins like this, and is no other file's now."""
        names = itertools.chain([before] if before else [], generation_names(head))
        name = next(name for name in names if self.may_have(head, name, taken))
        self.heads[name] = head
        return name

    def may_have(self, head: bytes, name: str, taken: set[str]) -> bool:
        return name not in taken and head.startswith(self.heads.get(name, b""))

    async def unpacked(self, past: PastFile) -> LogFile:
        """Return the file, decompressed once for all who ask. Raises HTTPError."""
        job = self.unpacking.get(past.key)
        if not job:
            self.forget_unused(room=1)
            job = self.unpacking[past.key] = asyncio.create_task(self.unpack(past))
            job.add_done_callback(self.forget_later)
        self.used_s[past.key] = time.monotonic()
        self.forget_later(job)

        await asyncio.wait([job], timeout=DECOMPRESS_S)
        if not job.done():
            raise HTTPError(503, "the file is being decompressed", Retry_After="2")
        try:
            return job.result()
        except OSError as error:
            why = error.strerror or "is damaged"
            status = 404 if isinstance(error, FileNotFoundError) else 422
            raise HTTPError(status, f"{file_name(past.path)}: {why}") from None

    async def unpack(self, past: PastFile) -> LogFile:
        async with self.places:
            file = await self.follow_name(unpack_past_file, past)
            first, last = await run_in_thread(time_span, file, self.zone)
        async with self.listing:
            if self.known.get(past.key[:2], past).key == past.key:
                known = past._replace(size=file.size, first=first, last=last)
                self.known[past.key[:2]] = known
        return file

    def forget_later(self, job: asyncio.Task[LogFile]) -> None:
        if job.done():
            self.forget_unused()  # it sees the error, even if nobody waits any more
            asyncio.get_running_loop().call_later(UNUSED_S + 1, self.forget_unused)

    def forget_unused(self, room: int = 0) -> None:
        """Close what nobody has looked at for a while; if it is too much, the oldest of it too."""
        done = [key for key, job in self.unpacking.items() if job.done()]
        size = sum(job_bytes(self.unpacking[key]) for key in done)
        done.sort(key=self.used_s.__getitem__)
        for number, key in enumerate(done):
            unused = time.monotonic() - self.used_s[key] > UNUSED_S
            many = len(done) - number + room > MAX_UNPACKED
            if not (unused or many or size > MAX_UNPACKED_BYTES):
                break
            size -= job_bytes(self.unpacking.pop(key))
            del self.used_s[key]


def account_name(look_up: Callable[[int], Any], number: int) -> str:
    """Return the name of a user or group, its number if it has none here."""
    try:
        return str(look_up(number)[0])
    except (KeyError, OSError):
        return str(number)


def file_key(status: os.stat_result) -> FileKey:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def unreadable_name(key: FileKey) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()[:16]


def job_bytes(job: asyncio.Task[LogFile]) -> int:
    if job.cancelled() or job.exception():
        return 0
    return job.result().size


def open_beginning(rotated: RotatedName, cancelled: threading.Event) -> LogFile:
    """Return the file, or of a compressed one its beginning. Raises OSError."""
    if not rotated.compressed:
        return open_log_file(rotated.path)
    with tempfile.TemporaryFile() as copy:
        copy.write(first_bytes(rotated.path, TIMES_BYTES))
        copy.flush()
        modified_ns = os.stat(rotated.path).st_mtime_ns
        os.utime(copy.fileno(), ns=(modified_ns, modified_ns))  # a stamp may need its year
        return LogFile(os.dup(copy.fileno()))


def open_past_file(past: PastFile, _: threading.Event) -> LogFile:
    """Return a file that is not compressed. Raises FileNotFoundError if it was renamed."""
    file = open_log_file(past.path)
    check_identity(file, past)
    file.name = past.generation
    return file


def check_identity(file: LogFile, past: PastFile) -> None:
    if file.identity != past.key[:2]:
        raise FileNotFoundError(errno.ENOENT, "it has another name by now", past.path)


def unpack_past_file(past: PastFile, cancelled: threading.Event) -> LogFile:
    """Decompress a file into one without a name. Raises OSError; FileNotFoundError as above."""
    source = open_log_file(past.path)
    check_identity(source, past)
    file = decompress(past.path, MAX_FILE_BYTES, cancelled, source)
    file.name = past.generation
    return file


def time_span(
    file: LogFile, zone: datetime.tzinfo, cancelled: threading.Event | None = None
) -> TimeSpan:
    return times_at_ends(file, detect_time_format(file, zone), cancelled)


def times_at_ends(
    file: LogFile, time_format: TimeFormat | None, cancelled: threading.Event | None = None
) -> TimeSpan:
    """Return the first and the last time in a file, as far as they stand near its ends."""
    if not time_format:
        return None, None

    size = file.size
    cancelled = cancelled or threading.Event()
    first = timed_lines(file, time_format, 0, TIMES_BYTES, cancelled)
    last = timed_lines(file, time_format, max(0, size - TIMES_BYTES), size, cancelled)
    times = plausible_times([*first, *last], time.time())
    if not times:
        return None, None
    return times[0][1], times[-1][1]


# -- the filter language: a term means what it means in the page, so in JavaScript --

SPACE = "\t\n\v\f\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
QUOTED = '"([^"]+)"|[\u201c-\u201e]([^\u201c-\u201e]+)[\u201c\u201d]|\xab([^\xab\xbb]+)\xbb'
TERM = re.compile(f"(!?)(?:{QUOTED}|([^{SPACE}]+))")
PUNCTUATION = r"[!-/:-@\[-`{-~]"
SYNTAX = re.compile(
    rf"""
      \\[bBdDwWsSt] | \\{PUNCTUATION}
    | \(\?[:=!] | \((?!\?) | \)
    | \[ (?!\^?\]) \^? (?: \\[dwst] | \\{PUNCTUATION} | [^\\\[\]] )+ \]
    | (?: [*+?] | \{{\d{{1,4}}(?:,\d{{0,4}})?\}} ) \?? (?![*+?{{])
    | [|.^$]
    | [^\\\[\](){{}}|*+?.^$]
    """,
    re.VERBOSE,
)
CLASS_MEMBER = re.compile(r"\\?.", re.DOTALL)
LOOKAHEADS = ("(?=", "(?!")
MAX_NESTING = 50

# JavaScript's meaning of what PCRE means otherwise (Debian 12's takes \S, \W and \D for ASCII).
CLASSES = {
    "d": "0-9",
    "w": "A-Za-z0-9_",
    "s": r"\t\n\x0b\f\r \xa0\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}"
    r"\x{205f}\x{3000}\x{feff}",
}
WORD_EDGE = r"(?<=[A-Za-z0-9_])(?![A-Za-z0-9_])|(?<![A-Za-z0-9_])(?=[A-Za-z0-9_])"
NOT_BEHIND_RETURN = r"(?!(?<=\r)$)"  # a CR at the end is no part of the line
STAND_INS = r"\x1a\x{9f}\x{fffd}"  # what grep gets for invalid bytes, and U+FFFD itself
PCRE = {
    "(?=": "(?=(?:",
    "(?!": "(?!(?:",
    "$": r"(?=\r?$)",
    "\0": r"\x00",
    "\ufffd": f"[{STAND_INS}]",
    r"\b": f"(?:{WORD_EDGE})",
    r"\B": f"(?!{WORD_EDGE})",
    **{rf"\{letter}": f"[{members}]" for letter, members in CLASSES.items()},
    **{rf"\{letter.upper()}": f"[^{members}]" for letter, members in CLASSES.items()},
}


class Term(NamedTuple):
    """One term of a query: plain text, or a regular expression (then `text` is None)."""

    exclude: bool
    text: str | None
    pattern: str  # for grep -P

    @property
    def unit(self) -> str:
        """The pattern as one piece of a longer one; PCRE finds text sooner than a group."""
        return f"(?:{self.pattern})" if self.text is None else self.pattern


def parse_query(query: str) -> list[Term]:
    """Return the terms, excluding ones last: PCRE gives up sooner. Raises HTTPError for none."""
    terms = []
    for mark, *quoted, word in TERM.findall(query):
        phrase = "".join(quoted)
        terms.append(parse_term(bool(mark), phrase, word))

    if not terms:
        raise HTTPError(400, "the query is empty")
    return sorted(terms, key=lambda term: term.exclude)


def parse_term(exclude: bool, phrase: str, word: str) -> Term:
    if tokens := expression_tokens(word):
        if any(len(token) > 1 or token in "|.^$)*+?" for token in tokens):
            return Term(exclude, None, expression_pattern(tokens))
        word = "".join(tokens)

    text = phrase or word
    return Term(exclude, text, text_pattern(text))


def expression_tokens(word: str) -> list[str]:
    """Return the tokens between the slashes; none if the word is text."""
    if len(word) < 3 or word[0] != "/" or word[-1] != "/":
        return []
    inner = word[1:-1]
    tokens: list[str] = SYNTAX.findall(inner)
    return tokens if "".join(tokens) == inner and is_well_formed(tokens) else []


def is_well_formed(tokens: list[str]) -> bool:
    """Return True if groups close, repetitions follow something, and counts and ranges rise."""
    groups: list[str] = []
    repeatable = False
    for token in tokens:
        if token == ")" and not groups:
            return False
        if token[0] in "*+?{" and not (repeatable and counts_rise(token)):
            return False
        if token[0] == "[" and not ranges_rise(token):
            return False

        repeatable = token[0] not in "*+?{(^$|" and token not in (r"\b", r"\B")
        if token[0] == "(":
            groups.append(token)
        if token == ")":
            repeatable = groups.pop() not in LOOKAHEADS
        if len(groups) > MAX_NESTING:
            return False
    return not groups


def counts_rise(repetition: str) -> bool:
    low, _, high = repetition.strip("{}?").partition(",")
    return not high or int(low) <= int(high)


def ranges_rise(bracketed: str) -> bool:
    """Return True if each range of a class goes from a character to one that is not before it."""
    members = CLASS_MEMBER.findall(bracketed.removeprefix("[").removeprefix("^")[:-1])
    at = 0
    while at < len(members):
        is_range = members[at + 1 : at + 2] == ["-"] and at + 2 < len(members)
        if is_range and not is_range_of(members[at], members[at + 2]):
            return False
        at += 3 if is_range else 1
    return True


def is_range_of(low: str, high: str) -> bool:
    if any(re.fullmatch(r"\\[dws]", end) for end in (low, high)):
        return False
    first, last = ("\t" if end == r"\t" else end[-1] for end in (low, high))
    return first <= last


def text_pattern(text: str) -> str:
    """Return a pattern that matches the text as it stands."""
    hexed = re.sub(r"[^\w ]", lambda char: f"\\x{{{ord(char[0]):x}}}", text, flags=re.ASCII)
    behind = NOT_BEHIND_RETURN if text.endswith("\r") else ""
    return hexed.replace(r"\x{fffd}", f"[{STAND_INS}]") + behind


def expression_pattern(tokens: list[str]) -> str:
    """Return the pattern that matches in PCRE what the expression matches in JavaScript."""
    spelled, groups = [], []
    for token in tokens:
        if token[0] == "(":
            groups.append(token)
        closes_lookahead = token == ")" and groups.pop() in LOOKAHEADS

        if closes_lookahead:
            spelled.append(f"){NOT_BEHIND_RETURN})")
        elif token[0] == "[":
            spelled.append(class_pattern(token))
        else:
            spelled.append(PCRE.get(token, token))
    return f"(?:{''.join(spelled)}){NOT_BEHIND_RETURN}"


def class_pattern(bracketed: str) -> str:
    def spelled(member: re.Match[str]) -> str:
        return CLASSES.get(member[0][1:], member[0])

    body = CLASS_MEMBER.sub(spelled, bracketed[:-1])
    stand_ins = STAND_INS if "\ufffd" in body else ""
    return body.replace("\0", r"\x00") + stand_ins + "]"


# -- times: a log states them in one format, a kind of stamp and where in the line that stands --
#
# The page reads them by the same table (index.html, "Times"): whoever changes one, changes both.

DAY_S = 86400
YEAR_S = 365.2425 * DAY_S
STAMP_BYTES = 100  # a stamp begins within so many bytes of its line
HEAD_BYTES = 1024  # what is read of a line for it, colours and all
LOG_END = 1 << 62  # the offset of a line that is somewhere at the end
SAMPLE_PLACES, SAMPLE_BYTES, SAMPLE_LINES = 64, 8192, 320
EPOCH_S = range(1_000_000_000, 4_102_444_800)  # 2001 to 2099: other numbers are no times
DISORDER_S = 1  # between the lines of several writers
COLOUR = re.compile(rb"\x1b\[[0-9;:]*[mK]")
MONTHS = b"Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
# Stamps with these have no time: nobody knows which CST, IST or BST it is.
ZONE_NAMES = (
    rb"ACDT|ACST|ADT|AEDT|AEST|AKDT|AKST|AST|AWST|BRT|BST|CAT|CDT|CEST|CET|CST|EAT|EDT|EEST|EET|EST"
    rb"|HKT|HST|IDT|IST|JST|KST|MDT|MESZ|MEZ|MSD|MSK|MST|NDT|NST|NZDT|NZST|PDT|PHT|PKT|PST|SAST|SGT"
    rb"|SST|WAT|WEST|WET|WIB|YEKT"
    rb"|(?:Africa|America|Antarctica|Asia|Atlantic|Australia|Europe|Indian|Pacific|US)/\w+"
)
OFFSET = rb" ?[+-]\d\d(?::?\d\d)?"
UTC_NAME = rb" ?(?:UTC|GMT)(?:[+-]\d\d?(?::?\d\d)?)?|[Zz]"
ZONE = rb"(?P<zone>" + OFFSET + rb"|" + UTC_NAME + rb"| ?\[?(?:" + ZONE_NAMES + rb"))"
FRACTION = rb"(?:[.,](?P<fraction>\d{1,9}))?(?!\d)"
HALF_AND_ZONE = rb"(?: ?(?P<half>[AaPp])[Mm](?!\w))?(?:" + ZONE + rb"(?!\w))?"
SECOND = rb"(?P<second>\d\d)" + FRACTION
CLOCK = rb"(?P<hour>\d\d?):(?P<minute>\d\d)(?::" + SECOND + rb")?(?!\d)" + HALF_AND_ZONE
BASIC_CLOCK = rb"(?P<hour>\d\d)(?P<minute>\d\d)" + SECOND + HALF_AND_ZONE
MONTH_NAME = rb"(?P<name>" + b"|".join(MONTHS) + rb")"
YEAR = rb"(?P<year>[12]\d{3})"
YEAR_BEFORE = rb"(?:" + YEAR + rb",? )?"
YEAR_BEHIND = rb"(?: (?P<year_behind>[12]\d{3})(?![\w.:-]))?"
STAMPS = {
    "ISO 8601": YEAR + rb"-(?P<month>\d\d)-(?P<day>\d\d)[Tt _]" + CLOCK,
    "ISO 8601 basic": YEAR + rb"(?P<month>\d\d)(?P<day>\d\d)T" + BASIC_CLOCK,
    "YYYY/MM/DD": YEAR + rb"/(?P<month>\d\d)/(?P<day>\d\d) " + CLOCK,
    "Common Log Format": rb"(?P<day>\d\d)[/ -]" + MONTH_NAME + rb"[/ -]" + YEAR + rb"[: ]" + CLOCK,
    "RFC 3164": MONTH_NAME + rb" [ 0]?(?P<day>\d\d?),? " + YEAR_BEFORE + CLOCK + YEAR_BEHIND,
    "auditd": rb"audit\((?P<epoch>\d{10}(?:\.\d{1,9})?):\d+\)",
    "klog": rb"[IWEF](?P<year>[12]\d{3})?(?P<month>\d\d)(?P<day>\d\d) " + CLOCK,
    "epoch milliseconds": rb"(?P<epoch>\d{10}(?P<thousandths>\d{3}))(?![\w.])",
    "epoch seconds": rb"(?P<epoch>\d{10}(?:\.\d{1,9})?)(?!\w|\.\d)",
}
IS_STAMP = {name: re.compile(rb"(?<![0-9A-Za-z_])" + stamp) for name, stamp in STAMPS.items()}
# Before a stamp: the key whose value it is, in JSON or logfmt; or words, and the beginning of one.
KEY = re.compile(rb"""(?<![\w.@-])(?:"([\w.@-]{1,40})"[ \t]?:[ \t]?|([\w.@-]{1,40})=)"?\Z""")
TIME_KEY = re.compile(rb"time|stamp|date|epoch|(?:^|[^a-z])(?:ts?|at)$", re.IGNORECASE)
WORDS = rb"(?:[^ \t\n]{0,99}[ \t]{1,99}(?![ \t])){0,%d}?"
WORD_BEGINNING = rb"(?:[^ \t\n]{0,99}?[^\w \t\n])??"
LINE_BEGINNING = rb"(?:\xef\xbb\xbf)?[ -/:-@[-`{-~]{0,4}"


Timed = tuple[int, float]  # an offset, and a time in seconds since 1970
Parts = dict[str, bytes]  # of a stamp, by the names in its pattern; b"" for what it leaves out
Minute = tuple[int, int, int, int]  # month, day, hour, minute


class Hit(NamedTuple):
    """A stamp in a sample."""

    column: int
    words: int  # before it


class Place(NamedTuple):
    """Where in a line its stamp stands."""

    stamp: str
    key: bytes  # whose value it is; b"" for none
    words: int = 0  # without a key: at most so many stand before it

    def is_at_start(self) -> bool:
        return self.stamp.startswith("epoch") and not self.key

    def may_follow(self, before: bytes) -> bool:
        """Return False if what is before it rules it out: in JSON a stamp is the value of a key."""
        if len(before) >= STAMP_BYTES:
            return False
        if self.key:
            return True
        if self.is_at_start() and not re.fullmatch(LINE_BEGINNING, before):
            return False
        return not before.startswith(b"{")

    def pattern(self) -> re.Pattern[bytes]:
        stamp = rb"(?P<stamp>" + STAMPS[self.stamp] + rb")"
        if self.key:
            key = re.escape(self.key)
            key_and_sign = rb'"' + key + rb'"[ \t]?:[ \t]?|' + key + rb"="
            before = rb"[^\n]{0,99}?(?<![\w.@-])(?:" + key_and_sign + rb')"?'
        elif self.is_at_start():
            before = rb"(?!\{)" + LINE_BEGINNING
        else:
            before = rb"(?!\{)" + WORDS % self.words + WORD_BEGINNING
        return re.compile(b"\n" + before + stamp)


class TimeFormat:
    """How the lines of one log state their time."""

    def __init__(self, place: Place, zone: datetime.tzinfo, modified_s: float) -> None:
        self.name = place.stamp.removesuffix(" basic")
        self.zone = zone
        # Before each of these offsets, a stamp without a year is not after the time beside it.
        self.latest = [(math.inf, modified_s)]
        self.pattern = place.pattern()

    def time_of(self, line: bytes, at: int = LOG_END) -> float | None:
        """Return the time of a line whose offset in the log is `at`, in seconds since 1970."""
        head = line[:HEAD_BYTES].partition(b"\n")[0]
        return next((seconds for _, seconds in self.times_in(head, at)), None)

    def times_in(self, data: bytes, at: int = LOG_END) -> Iterator[Timed]:
        """Yield offset in the data and time of its lines. `at` is where in the log it begins."""
        if b"\x1b" in data:
            yield from self.coloured_times_in(data, at)
            return

        for found in self.pattern.finditer(b"\n" + data):
            start = found.start()
            if found.start("stamp") - start > STAMP_BYTES:
                continue
            seconds = stamp_seconds(found.groupdict(b""), self.zone, self.latest_s(at + start))
            if seconds is not None:
                yield start, seconds

    def coloured_times_in(self, data: bytes, at: int) -> Iterator[Timed]:
        start = 0
        for line in data.split(b"\n"):
            head = COLOUR.sub(b"", line[:HEAD_BYTES]).replace(b"\x1b", b"?")
            for _, seconds in self.times_in(head, at + start):
                yield start, seconds
            start += len(line) + 1

    def latest_s(self, at: int) -> float:
        return self.latest[bisect.bisect_right(self.latest, (at, math.inf))][1]

    def date_years(self, samples: list[tuple[int, bytes]]) -> None:
        """Learn from lines spread over the log where each year begins, counted from its end."""
        known = list[tuple[float, int, bytes]]()
        for at, line in samples:
            if (seconds := self.time_of(line)) is not None:
                known.append((seconds, at, line))

        later_s = [seconds for seconds, *_ in known[2:]]
        later_s.append(self.latest[-1][1])
        in_order = known[:1]
        for before, one, after_s in zip(known, known[1:], later_s, strict=False):
            if is_in_season(before[0], one[0], after_s):
                in_order.append(one)

        for _, at, line in reversed(in_order):
            if (seconds := self.time_of(line, at)) is not None:
                self.latest.insert(0, (at, seconds))


def detect_time_format(file: LogFile, zone: datetime.tzinfo) -> TimeFormat | None:
    """Return the format of samples of the file, None if they have no times. Raises OSError."""
    samples = list(sample_lines(file))
    place = stamp_place([line for _, line in samples], zone, file.modified_s())
    if not place:
        return None

    time_format = TimeFormat(place, zone, file.modified_s())
    if place.stamp in ("RFC 3164", "klog"):
        time_format.date_years(samples)
    return time_format


def sample_lines(file: LogFile) -> Iterator[tuple[int, bytes]]:
    """Yield offsets and beginnings of lines spread evenly over the file. Raises OSError."""
    size = file.size
    samples = range(0, size, max(SAMPLE_BYTES, size // SAMPLE_PLACES))
    for sample in samples:
        data = file.read_bytes(sample, min(size, sample + SAMPLE_BYTES))
        start = data.find(b"\n") + 1 if sample else 0
        lines = data[start:].split(b"\n") if start or not sample else []
        if lines and len(lines[-1]) < HEAD_BYTES and sample + len(data) < size:
            lines.pop()  # it may be cut in its stamp

        for line in lines[: SAMPLE_LINES // len(samples)]:
            if line.strip(b"\0\r"):
                yield sample + start, line[:HEAD_BYTES]
            start += len(line) + 1


def stamp_place(lines: list[bytes], zone: datetime.tzinfo, latest_s: float) -> Place | None:
    """Return where most of these lines have a stamp, and have it first; None if none has."""
    hits: dict[Place, list[Hit]] = {}
    for line in lines:
        for place, hit in stamps_of_line(line, zone, latest_s).items():
            hits.setdefault(place, []).append(hit)

    columns: dict[Place, list[int]] = {}
    for place, found in hits.items():
        words = usual_words(found)
        usual = sorted(hit.column for hit in found if hit.words <= words)
        if 10 * len(usual) >= len(lines) or not place.key and words == 0:
            columns[place._replace(words=words)] = usual

    most = max(map(len, columns.values()), default=0)
    often = [place for place, usual in columns.items() if 2 * len(usual) >= most]

    def rank(place: Place) -> tuple[bool, int]:
        is_odd_key = bool(place.key) and not TIME_KEY.search(place.key)
        return is_odd_key, columns[place][len(columns[place]) // 2]

    return min(often, key=rank, default=None)


def usual_words(hits: list[Hit]) -> int:
    """Return behind how many words the stamps stand that are no dates in messages."""
    numbers = collections.Counter(hit.words for hit in hits)
    usual = {words for words, times in numbers.items() if 10 * times >= len(hits)}
    words = min(usual or numbers)
    while words and words + 1 in usual:  # "[worker] ERROR 2025-…", "[worker 2] ERROR 2025-…"
        words += 1
    return words


def stamps_of_line(line: bytes, zone: datetime.tzinfo, latest_s: float) -> dict[Place, Hit]:
    """Return the first stamp of each kind and key, if it is a time."""
    head = COLOUR.sub(b"", line)
    stamps: dict[Place, Hit | None] = {}
    for name, kind in IS_STAMP.items():
        for found in kind.finditer(head, 0, 2 * STAMP_BYTES):
            before = head[: found.start()]
            place = Place(name, key_before(before))
            if place in stamps or not place.may_follow(before):
                continue
            is_time = stamp_seconds(found.groupdict(b""), zone, latest_s) is not None
            words = len(re.findall(rb"[ \t]+", before))
            stamps[place] = Hit(len(before), words) if is_time else None
    return {place: hit for place, hit in stamps.items() if hit}


def key_before(before: bytes) -> bytes:
    found = KEY.search(before[-50:])
    return found[1] or found[2] if found else b""


def stamp_seconds(part: Parts, zone: datetime.tzinfo, latest_s: float) -> float | None:
    """Return the time that a stamp states, None if there is none or its zone is not known."""
    if "epoch" in part:
        seconds = float(part["epoch"]) / (1000 if "thousandths" in part else 1)
        return seconds if int(seconds) in EPOCH_S else None

    own_zone = stated_zone(part["zone"], zone)
    minute = stated_minute(part)
    if own_zone is None or minute is None:
        return None

    year = part["year"] or part.get("year_behind")
    if year:
        start = minute_start(int(year), minute, own_zone)
    else:
        start = latest_start(minute, own_zone, latest_s)
    second = float(b"%b.%b" % (part["second"] or b"0", part["fraction"] or b"0"))
    return None if start is None or second >= 61 else start + second


def stated_minute(part: Parts) -> Minute | None:
    hour, half = int(part["hour"]), part["half"]
    if half and not 1 <= hour <= 12:
        return None
    if half:
        hour = hour % 12 + (12 if half in b"Pp" else 0)

    month = MONTHS.index(part["name"]) + 1 if "name" in part else int(part["month"])
    return month, int(part["day"]), hour, int(part["minute"])


def latest_start(minute: Minute, zone: datetime.tzinfo, latest_s: float) -> float | None:
    """Return the last time that a stamp without a year can mean, up to a day after `latest_s`."""
    end_s = latest_s + DAY_S
    last_year = time.gmtime(end_s).tm_year
    for year in range(last_year, last_year - 9, -1):  # February 29th may be 8 years ago
        start = minute_start(year, minute, zone)
        if start is not None and start <= end_s:
            return start
    return None


@functools.lru_cache(4096)
def minute_start(year: int, minute: Minute, zone: datetime.tzinfo) -> float | None:
    try:
        return datetime.datetime(year, *minute, tzinfo=zone).timestamp()
    except (ValueError, OverflowError):
        return None


@functools.lru_cache(256)
def stated_zone(stated: bytes, zone: datetime.tzinfo) -> datetime.tzinfo | None:
    """Return the zone of a stamp, None if it is not known."""
    name = stated.strip().upper()
    if not name:
        return zone
    found = re.fullmatch(rb"(?:Z|UTC|GMT)?(?:([+-])(\d\d?):?(\d\d)?)?", name)
    if not found:
        return None
    minutes = 60 * int(found[2] or 0) + int(found[3] or 0)
    if minutes >= 24 * 60:
        return None
    return datetime.timezone(datetime.timedelta(minutes=-minutes if found[1] == b"-" else minutes))


def is_in_season(before_s: float, one_s: float, after_s: float) -> bool:
    """Return False if the middle one, but for its year, is not between its neighbours."""
    return (one_s - before_s) % YEAR_S + (after_s - one_s) % YEAR_S < YEAR_S


def plausible_times(times: list[Timed], now_s: float) -> list[Timed]:
    """Return the times without those a day ahead of now, and without single leaps."""
    past = [one for one in times if one[1] <= now_s + DAY_S]
    return without_leaps(without_leaps(past, 1), -1)


def without_leaps(times: list[Timed], sign: int) -> list[Timed]:
    """Return the times without those that rise (sign 1) or fall (-1) and are back at once."""
    later = zip(times[1:], times[2:], strict=False)
    kept = times[:1]
    for before, (one, after) in zip(times, later, strict=False):
        leap_s = sign * (one[1] - before[1])
        way_back_s = sign * (one[1] - after[1])
        is_back = after[1] >= before[1] - DISORDER_S
        if min(leap_s, way_back_s) <= DISORDER_S or not is_back:
            kept.append(one)
    return kept + times[1:][-1:]


def parse_moment(text: str, zone: datetime.tzinfo) -> float | None:
    """Return the time of a stamp, or a date's midnight, in s since 1970; None for nonsense."""
    # A plus sign in an address is a space.
    text = re.sub(r"(\d:\d\d\S*) (\d\d(?::?\d\d)?)\Z", r"\1+\2", text.strip())
    if re.fullmatch(r"\d{4}[-/]\d\d[-/]\d\d", text):
        text += " 00:00"
    for stamp in STAMPS.values():
        if found := re.fullmatch(rb"\[?" + stamp + rb"\]?", text.encode(errors="replace")):
            return stamp_seconds(found.groupdict(b""), zone, time.time())
    return None


# ---- 9 Proof -------------------------------------------------------------------------------------
# Says how many bytes a file held and their SHA-256 (a receipt), and notices if bytes change later.
# Proof owns a Checker for each file in use; one thread works at a time, for one of them. Nothing is
# stored: what has to outlive the process is a line on standard output.

PIECE_BYTES = 256 * KIB  # read and hashed at once: other threads run meanwhile (hashlib, GIL)
BLOCK_BYTES = MIB  # a change is located as exactly as this
PASS_S = 3600.0  # the idle reader goes over the log in this time, or faster: a block a second
MOST_BLOCKS_PER_S = 80  # while nobody waits: about 5 % of a core
HURRY_BLOCKS = 64  # in one go, after a change without growth
CONFIRM_S = 1.5  # from a suspicion to the second read: a rotation takes less
RECEIPT_S = 5.0  # a receipt that takes longer is collected by a later request
TICKET_S = 120.0  # and is kept so long for it
MAX_ASKED = 10_000  # receipts that are waited for, or may still be collected
ALONE_S = 0.03  # a pass begins so long after it was asked for: others may ask, too
CROWD_S = 0.4  # if they do, it begins once nobody has come for so long,
MAX_CROWD_S = 4.0  # or after this time
LATE_LINES_S = 31.0  # a rotated file that grows within this time is sealed again
LAST_ANCHOR_S = 0.5  # of the stop
ANNOUNCE_S = 60.0  # at least between two `proof` messages of the same state
CLOCK_S = 60.0  # a rotation is noticed, and an entry written, at most so late
MAX_SHOWN = 100  # failed receipts that --verify names


class Receipt(NamedTuple):
    """The statement that a file began with so many bytes of that digest."""

    log: str
    generation: str
    head: str  # SHA-256 of the first 4 KiB, or of all bytes if there are fewer; "" if unknown
    end: int
    sha256: str
    time: str  # ISO 8601 in UTC, whole seconds
    note: str = ""  # " reviewed_by=…" or " sealed_before=…"

    @property
    def line(self) -> str:
        return (
            f"audit-stream: receipt log={quoted_value(self.log)} generation={self.generation}"
            f" head={self.head} bytes={self.end} sha256={self.sha256} time={self.time}{self.note}"
        )

    def json(self) -> bytes:
        fields: dict[str, Any] = {"log": self.log, "generation": self.generation}
        fields |= {"head": self.head, "bytes": self.end, "sha256": self.sha256}
        fields |= {"time": self.time, "line": self.line}
        return json.dumps(fields).encode()


class Digest(NamedTuple):
    """What a pass found out about a number of bytes."""

    head: str
    sha256: str
    time_s: float


class Wanted(NamedTuple):
    """Somebody who waits for the digest of so many bytes."""

    end: int
    future: asyncio.Future[Digest | None]  # None: they are not there

    def settle(self, digest: Digest | None) -> None:
        if not self.future.done():
            self.future.set_result(digest)


class Proof:
    """The receipts of a log, and the watch over what was published of it."""

    def __init__(
        self,
        follower: LogFollower,
        broadcaster: Broadcaster,
        anchor_s: float = 3600.0,  # 0: never
        expect_every_s: float = 0.0,  # 0: the log may be silent
    ) -> None:
        self.follower, self.broadcaster = follower, broadcaster
        follower.on_generation = self.on_generation
        self.anchor_s, self.expect_every_s = anchor_s, expect_every_s

        self.current = Checker(follower.current)
        self.checkers = {self.current.file: self.current}
        self.retired: asyncio.Queue[tuple[Checker, str]] = asyncio.Queue()
        self.unfinished: dict[Checker, str] = {}  # files that may still grow, and what came next
        self.tickets: dict[tuple[object, ...], Wanted] = {}  # what a later request may collect
        self.somebody_waits = asyncio.Event()

        self.alarm = ""  # what changed; until somebody accepts it
        self.alarm_receipt = ""  # the line from before that
        self.unreadable = ""
        self.anchored: tuple[str, int] = "", 0  # generation and bytes of the last anchor
        self.announced: tuple[str, str, LogFile] | None = None  # state, alarm, and of which file
        self.announced_s = 0.0  # when (monotonic)
        self.grown: tuple[str, int, float] = "", 0, time.time()  # generation, bytes, and when
        self.reads = ReadRecord()

    async def respond(self, file: LogFile, context: RequestContext) -> Response:
        """Answer /api/receipt, /api/review and /api/record. Raises HTTPError, OSError."""
        if context.path == "/api/record":
            return self.record(context)
        return await self.respond_with_receipt(file, context)

    async def respond_with_receipt(self, file: LogFile, context: RequestContext) -> Response:
        """Wait a few seconds for the pass; if it takes longer, the next request collects it."""
        whole = file.end if file is self.follower.current else file.size
        end = int_parameter(context.query, "bytes", whole, 0, 10**18)
        if end > file.size:
            raise HTTPError(416, "the log has fewer bytes than that")

        asker = context.client, context.user, context.path
        key = (*asker, context.query.get("bytes"), file)
        wanted = self.tickets.pop(key, None) or self.ask_for_request(file, end)
        end = wanted.end  # the log may have grown since the first request
        try:
            await asyncio.wait([wanted.future], timeout=RECEIPT_S)
        finally:
            if not wanted.future.done():
                self.keep_ticket(key, wanted)
        if not wanted.future.done():
            progress = {"read": self.checkers[file].progress(wanted), "bytes": end}
            body = json.dumps(progress).encode()
            return make_response(202, body, JSON, Retry_After="2")

        digest = wanted.future.result()
        if digest is None:
            raise HTTPError(416, "the log has fewer bytes than that, or cannot be read")
        receipt = self.receipt(file, end, digest)
        if context.path == "/api/review":
            who = quoted_value(context.user or context.client)
            receipt = receipt._replace(note=f" reviewed_by={who}")
            write_line(receipt.line)
            record_access("review", client=context.client, name=context.user, bytes=end)
        return make_response(200, receipt.json(), JSON)

    def record(self, context: RequestContext) -> Response:
        """Write down what a person did on the page; to accept a change ends the alarm."""
        event, detail = context.query.get("event", ""), context.query.get("detail", "")
        if event not in ("accepted", "altered", "exported"):
            raise HTTPError(400, "event must be accepted, altered or exported")
        if len(detail) > 500:
            raise HTTPError(400, "detail must have at most 500 characters")

        before = self.alarm_receipt if event == "accepted" else ""
        who = {"client": context.client, "name": context.user}
        record_access(event, **who, detail=detail, before=before)
        if event == "accepted":
            self.alarm = self.alarm_receipt = ""
            self.announce()
        elif event == "altered":
            write_alarm(f"altered: a browser at {context.client} says: {json.dumps(detail)}")

        response = make_response(204, b"", TEXT)
        response.headers["Audit-Stream-Who"] = json.dumps(context.user or context.client)
        response.headers["Audit-Stream-Machine"] = json.dumps(socket.gethostname())
        for header in ("Content-Type", "Content-Length"):  # RFC 9110, section 8.6
            del response.headers[header]
        return response

    def ask_for_request(self, file: LogFile, end: int) -> Wanted:
        asked = sum(len(checker.wanted) for checker in self.checkers.values())
        if asked + len(self.tickets) >= MAX_ASKED:
            raise HTTPError(503, "too many receipts are asked for", Retry_After="5")
        return self.ask(file, end)

    def keep_ticket(self, key: tuple[object, ...], wanted: Wanted) -> None:
        """Let a later request of the same client collect what nobody waits for now."""
        if self.tickets.setdefault(key, wanted) is not wanted:
            return
        loop = asyncio.get_running_loop()

        def drop() -> None:
            if self.tickets.get(key) is wanted:
                del self.tickets[key]

        wanted.future.add_done_callback(lambda _: loop.call_later(TICKET_S, drop))

    def ask(self, file: LogFile, end: int) -> Wanted:
        """Join the next pass over a file: what is read from now on."""
        checker = self.checkers.setdefault(file, Checker(file))
        wanted = Wanted(end, asyncio.get_running_loop().create_future())
        checker.wanted.append(wanted)
        self.somebody_waits.set()
        return wanted

    def receipt(self, file: LogFile, end: int, digest: Digest) -> Receipt:
        log, at = self.follower.name, utc(digest.time_s)
        generation = self.follower.names.assign(file)
        return Receipt(log, generation, digest.head, end, digest.sha256, at)

    def receipt_before(self, checker: Checker) -> Receipt:
        """Return the receipt of all that was known before the first change, if there was one."""
        if checker.remembered:
            return self.receipt(checker.file, checker.remembered_end, checker.remembered)
        return self.receipt(checker.file, checker.end, checker.known())

    # -- what goes on all the time --

    async def run(self) -> None:
        """Read, anchor and seal until cancelled; then write a last anchor."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for work in (self.read_forever, self.anchor_forever, self.watch_silence):
                    tasks.create_task(work())
                tasks.create_task(self.reads.flush_forever())
                while True:
                    tasks.create_task(self.finish_generation(*await self.retired.get()))
        finally:
            self.reads.flush()
            await self.write_last_anchor()

    async def read_forever(self) -> None:
        while True:
            self.somebody_waits.clear()
            self.on_generation()
            self.drop_idle_checkers()
            try:
                pause_s = await self.read_some()
                self.unreadable = ""
            except OSError as error:
                self.unreadable = error.strerror or "cannot be read"
                pause_s = 1.0

            self.announce()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self.somebody_waits.wait()

    async def read_some(self) -> float:
        """Serve who waits, or read on at leisure; return the seconds until the next piece."""
        waiting = [checker for checker in self.checkers.values() if checker.wanted]
        if waiting:
            await gather(waiting[0].wanted)
            await self.serve(waiting[0])
            return 0.0

        checker = self.current
        hurry = checker.was_touched()
        if not hurry and not checker.is_due():
            return 1.0
        await run_in_thread(checker.read_on, HURRY_BLOCKS if hurry else 1)
        if checker.suspect is not None:
            await self.confirm(checker)
        return 0.0 if hurry else checker.pause_s()

    async def serve(self, checker: Checker) -> None:
        """Go over a file once for all who wait now."""
        taken, checker.wanted = checker.wanted, []
        self.checkers[checker.file] = self.checkers.pop(checker.file)  # the others come first
        counters["proof_passes_total"] += 1
        try:
            await run_in_thread(checker.read_from_start, taken, asyncio.get_running_loop())
        except OSError:
            checker.suspect = None
        await asyncio.sleep(0)  # Python 3.14 may come here before what the thread has scheduled
        left = [wanted for wanted in taken if not wanted.future.done()]

        if checker.suspect is not None:
            checker.wanted = left + checker.wanted
            await self.confirm(checker)
            return
        for wanted in left:
            wanted.settle(None)

    async def confirm(self, checker: Checker) -> None:
        """Read suspect bytes again, after a rotation had time to settle; alarm if they changed."""
        await self.follow()
        await asyncio.sleep(CONFIRM_S)
        await self.follow()
        changes = await run_in_thread(checker.find_changes)
        self.on_generation()

        if not changes:
            counters["proof_false_suspicions_total"] += 1
            logger.warning("bytes that seemed to have changed are what they were, read again")
        elif checker is self.current:
            self.raise_alarm(checker, describe(changes))
        await run_in_thread(checker.go_on_from, changes)

    def drop_idle_checkers(self) -> None:
        """Let go of files that nobody asks about any more."""
        for file, checker in list(self.checkers.items()):
            needed = checker is self.current or checker in self.unfinished or checker.wanted
            if not needed:
                del self.checkers[file]

    async def follow(self) -> None:
        while await self.follower.check():
            await asyncio.sleep(0)

    def raise_alarm(self, checker: Checker, sentence: str) -> None:
        """Tell the operator and all viewers; the alarm stays until somebody accepts it."""
        before = self.receipt_before(checker)
        self.alarm, self.alarm_receipt = self.alarm or sentence, self.alarm_receipt or before.line
        counters["proof_alarms_total"] += 1
        write_alarm(f"altered: {sentence}; it was: {before.line}")
        self.announce()

    # -- rotations --

    def on_generation(self) -> None:
        """Notice that the follower went on in another file; call it at each generation."""
        file = self.follower.current
        if file is not self.current.file:
            self.unfinished[self.current] = file.name
            self.retired.put_nowait((self.current, file.name))
            self.current = self.checkers.setdefault(file, Checker(file))
            self.announce()

    async def finish_generation(self, checker: Checker, successor: str) -> None:
        """Seal a file that is no longer the log, and see whether it is still what it was."""
        try:
            await self.seal(checker, successor)
            await asyncio.sleep(CONFIRM_S)
            await self.judge_retired(checker)
            await asyncio.sleep(LATE_LINES_S)
            while checker.file.end > checker.sealed_end:
                await self.seal(checker, successor)
                await asyncio.sleep(LATE_LINES_S)
        except OSError as error:
            logger.warning("the rotated file cannot be checked: %s", error.strerror)
        self.unfinished.pop(checker, None)  # not at the stop: it may have to be sealed then

    async def seal(self, checker: Checker, successor: str) -> None:
        """Write the last anchor of a generation."""
        file, end = checker.file, checker.file.end
        digest = None
        if end and self.anchor_s and file.is_unchanged():
            digest = await self.ask(file, end).future
        self.write_seal(checker, end, digest, successor)

    def write_seal(
        self, checker: Checker, end: int, digest: Digest | None, successor: str
    ) -> None:
        checker.sealed_end = end
        if digest and not checker.changes:
            receipt = self.receipt(checker.file, end, digest)
            write_line(receipt._replace(note=f" sealed_before={successor}").line)

    async def judge_retired(self, checker: Checker) -> None:
        """Alarm unless all that was known of a former log is still there, here or in a copy."""
        file = checker.file
        if file.end < checker.end:  # it was cut, and something else may fill its place
            await run_in_thread(checker.go_on_from, await run_in_thread(checker.find_changes))
        changes, tail_changed = checker.changes, not file.is_unchanged()
        if not changes and not tail_changed and (not checker.end or file.status().st_nlink):
            return

        receipt = self.receipt_before(checker)
        path = self.follower.path
        check = await run_in_thread(check_receipts, path, [receipt], datetime.UTC)
        verdict = check.verdicts[0]
        if verdict.state == "holds" and (not tail_changed or checker.end >= file.end):
            return
        if changes:
            self.raise_alarm(checker, describe(changes))
        elif tail_changed:
            self.raise_alarm(checker, "the last bytes that were published changed, or are gone")
        elif verdict.state == "fails":
            self.raise_alarm(checker, verdict.detail)
        else:
            logger.warning("the former log was removed (%d bytes): %s", receipt.end, verdict.detail)

    # -- anchors, silence, news --

    async def anchor_forever(self) -> None:
        while self.anchor_s:
            await asyncio.sleep(self.anchor_s)
            if not self.is_anchored():
                file, end = self.follower.current, self.follower.current.end
                self.write_anchor(file, end, await self.ask(file, end).future)

    def is_anchored(self) -> bool:
        """Return True if there is nothing new to anchor."""
        file = self.follower.current
        return not file.end or (file.name, file.end) == self.anchored

    def write_anchor(self, file: LogFile, end: int, digest: Digest | None) -> None:
        if digest:
            receipt = self.receipt(file, end, digest)
            self.anchored = receipt.generation, end
            write_line(receipt.line)

    async def write_last_anchor(self) -> None:
        """Anchor what is known, also of a large log: only what is new is read, as time allows."""
        if not self.anchor_s:
            return
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(LAST_ANCHOR_S):
                await self.follow()
                self.on_generation()
                for checker in (*self.unfinished, self.current):
                    await run_in_thread(checker.catch_up)

        for checker, successor in self.unfinished.items():
            if checker.end == checker.file.end > checker.sealed_end:
                self.write_seal(checker, checker.end, checker.known(), successor)
        current = self.current
        if current.end and self.anchored != (current.file.name, current.end):
            self.write_anchor(current.file, current.end, current.known())

    async def watch_silence(self) -> None:
        """Say that the log has been silent for longer than it should."""
        with contextlib.suppress(OSError):
            file = self.follower.current
            self.grown = file.name, file.end, file.modified_s()

        silent = False
        while self.expect_every_s:
            await asyncio.sleep(min(1.0, self.expect_every_s / 4))
            overdue = self.silent_s() > self.expect_every_s
            if overdue and not silent:
                counters["silences_total"] += 1
                write_alarm(f"the log has been silent for over {self.expect_every_s:g} seconds")
            elif silent and not overdue:
                logger.info("the log is no longer silent")
            silent = overdue

    def silent_s(self) -> float:
        """Return the seconds since the log last grew."""
        file = self.follower.current
        if (file.name, file.end) != self.grown[:2]:
            self.grown = file.name, file.end, time.time()
        return max(0.0, time.time() - self.grown[2])

    def metrics(self) -> dict[str, float]:
        return {
            "proof_altered": 1 if self.alarm else 0,
            "proof_known_bytes": self.current.end,
            "proof_verified_time_seconds": self.current.verified_s,
            "silent_seconds": self.silent_s(),
        }

    def announce(self) -> None:
        """Tell all viewers: at once if the state or the file is another one, else now and then."""
        message = self.message()
        now_s = time.monotonic()
        news = message["state"], self.alarm, self.current.file
        pause_s = 10.0 if message["state"] == "unknown" else ANNOUNCE_S
        if news == self.announced and now_s - self.announced_s < pause_s:
            return
        self.announced, self.announced_s = news, now_s
        self.broadcaster.broadcast_json(message)

    def message(self) -> dict[str, Any]:
        """Return what viewers are told: the state of the proof, and what was read for it."""
        checker = self.current
        bytes_known, now = checker.end, utc(time.time())
        state, detail = "ok", f"unchanged since it was first read, {utc(checker.started_s)}"
        if self.alarm:
            state, detail = "altered", self.alarm
        elif self.unreadable:
            state, detail = "unknown", self.unreadable
        elif not bytes_known:
            state, detail = "unknown", "nothing has been read yet"
        elif not checker.caught_up:
            percent = 100 * bytes_known // max(1, checker.file.end)
            state, detail = "unknown", f"reading the log: {percent} %"

        message: dict[str, Any] = {"type": "proof", "state": state, "bytes": bytes_known}
        sha256 = checker.known().sha256 if bytes_known else None
        return message | {"sha256": sha256, "time": now, "detail": detail}


async def gather(wanted: list[Wanted]) -> None:
    """Wait while more of them come, so that one pass serves a crowd."""
    deadline_s, count = time.monotonic() + MAX_CROWD_S, 0
    while count < len(wanted) and time.monotonic() < deadline_s:
        count = len(wanted)
        await asyncio.sleep(ALONE_S if count == 1 else CROWD_S)


class Checkpoint(NamedTuple):
    """The hash state of all bytes before an offset, and when they were last read."""

    offset: int
    state: hashlib._Hash
    time_s: float


class Change(NamedTuple):
    """Bytes that are no longer what they were, since a time between two."""

    start: int
    end: int
    good_s: float
    found_s: float


BY_OFFSET = operator.itemgetter(0)


class Checker:
    """What is known of the bytes of one file, and who waits for a digest of them.

    `wanted` belongs to the event loop. The digests change in one thread at a time, under the lock.
    """

    def __init__(self, file: LogFile) -> None:
        self.file = file
        self.wanted: list[Wanted] = []

        self.started_s = time.time()
        self.verified_s = 0.0  # when the last pass over all of it ended
        self.checkpoints = [Checkpoint(0, hashlib.sha256(), self.started_s)]
        self.next_read_s = 0.0  # when the idle reader goes on, if nothing is new
        self.next_block = 0  # the index of the checkpoint where the idle reader goes on
        self.suspect: int | None = None  # after this checkpoint other bytes were read than before
        self.caught_up = False  # all that was published has been read once
        self.changes: list[Change] = []

        self.remembered: Digest | None = None  # of remembered_end bytes, before the first change
        self.remembered_end = 0
        self.sealed_end = 0  # of its last anchor, once it is no longer the log
        self.touched = 0, 0  # time of change and size at the last look
        self.hurry_blocks = 0  # still to be read at full speed
        self.read_so_far = 0  # of the running pass
        self.lock = threading.Lock()  # a cancelled thread may still be at its last piece

    @property
    def end(self) -> int:
        return self.checkpoints[-1].offset

    def known(self) -> Digest:
        """Return the digest of all that is known."""
        head = self.checkpoints[min(1, len(self.checkpoints) - 1)]
        last = self.checkpoints[-1]
        return Digest(head.state.hexdigest(), last.state.hexdigest(), last.time_s)

    def progress(self, wanted: Wanted) -> int:
        """Return how many bytes were read for somebody who waits."""
        return 0 if wanted in self.wanted else self.read_so_far

    def pause_s(self) -> float:
        """Return the time between two blocks of the idle reader."""
        if not self.caught_up:
            return 1 / MOST_BLOCKS_PER_S
        return min(1.0, max(1 / MOST_BLOCKS_PER_S, PASS_S / len(self.checkpoints)))

    def is_due(self) -> bool:
        """Return True if there are new bytes to read, or it is time for the next block."""
        now_s = time.monotonic()
        if self.caught_up and self.end == self.file.end and now_s < self.next_read_s:
            return False
        self.next_read_s = now_s + min(1.0, PASS_S / len(self.checkpoints))
        return True

    def was_touched(self) -> bool:
        """Return True while the file is to be read at full speed: it changed but did not grow."""
        status = self.file.status()
        before, self.touched = self.touched, (status.st_ctime_ns, status.st_size)
        if before[0] and before[0] != status.st_ctime_ns and before[1] == status.st_size:
            self.hurry_blocks = len(self.checkpoints)
            self.next_block = 0
        return self.hurry_blocks > 0

    def read_on(self, blocks: int, cancelled: threading.Event) -> None:
        """Read what is new, then some blocks again."""
        with self.lock:
            self.read_new_block(cancelled)
            for _ in range(blocks if self.caught_up else 0):
                if self.suspect is None and not cancelled.is_set():
                    self.read_known_block(cancelled)

    def catch_up(self, cancelled: threading.Event) -> None:
        """Read all that is new, at full speed."""
        with self.lock:
            while self.end < self.file.end and self.suspect is None and not cancelled.is_set():
                self.read_new_block(cancelled)

    def read_new_block(self, cancelled: threading.Event) -> None:
        """Read up to a block of what was published since."""
        last, published = self.checkpoints[-1], self.file.end
        if last.offset < published:
            index = len(self.checkpoints) - 1
            self.read_block(index, min(published, next_edge(last.offset)), cancelled)
        self.caught_up = self.caught_up or self.end == published

    def read_known_block(self, cancelled: threading.Event) -> None:
        """Read the next block again; after the last one begin with the first."""
        self.hurry_blocks = max(0, self.hurry_blocks - 1)
        index = self.next_block
        if index + 1 < len(self.checkpoints):
            self.read_block(index, self.checkpoints[index + 1].offset, cancelled)
            self.next_block += 1
        if self.next_block + 1 >= len(self.checkpoints):
            self.next_block = 0
            self.verified_s = time.time()

    def read_block(self, index: int, end: int, cancelled: threading.Event) -> None:
        """Read from a checkpoint to an offset, and compare the state there."""
        start, state, _ = self.checkpoints[index]
        reached, state = self.read_from(start, state, end, cancelled)
        if cancelled.is_set():
            return
        if reached < end:
            self.suspect = index
        else:
            self.compare(end, state)

    def read_from(
        self, start: int, state: hashlib._Hash, end: int, cancelled: threading.Event
    ) -> tuple[int, hashlib._Hash]:
        """Return how far there are bytes, and the state there."""
        state = state.copy()
        for piece in read_pieces(self.file, start, end, cancelled):
            state.update(piece)
            start += len(piece)
            counters["proof_read_bytes_total"] += len(piece)
        return start, state

    def compare(self, offset: int, state: hashlib._Hash) -> None:
        """Compare a state with the known one, or keep it if it is of new bytes."""
        index = bisect.bisect_left(self.checkpoints, offset, key=BY_OFFSET)
        checkpoint = Checkpoint(offset, state.copy(), time.time())
        if index == len(self.checkpoints):
            if offset > self.file.end:
                return  # not published: room that a writer reserved may still change
            if not is_edge(self.end):  # in the middle of a block, no longer needed
                self.checkpoints.pop()
            self.checkpoints.append(checkpoint)
            return

        known = self.checkpoints[index]
        if known.offset == offset and known.state.digest() == state.digest():
            self.checkpoints[index] = checkpoint
        elif known.offset == offset:
            self.suspect = index - 1

    def read_from_start(
        self, wanted: list[Wanted], loop: asyncio.AbstractEventLoop, cancelled: threading.Event
    ) -> None:
        """Go over the file from 0, and give those who wait their digests on the way.

        Stops at the first block that is not what it was; a digest is given only once the
        block that it ends in was compared.
        """
        stops = {stop for one in wanted for stop in (one.end, head_end(one.end))}
        waiting = sorted(wanted, key=BY_OFFSET, reverse=True)
        digests: dict[int, str] = {}
        with self.lock:
            edges = self.edges_for(stops)
            last = edges[-1]
            for offset, state in states_at(read_pieces(self.file, 0, last, cancelled), edges):
                counters["proof_read_bytes_total"] += offset - self.read_so_far
                self.read_so_far = offset
                if offset in stops:
                    digests[offset] = state.hexdigest()
                self.compare(offset, state)
                if self.suspect is not None or cancelled.is_set():
                    break
                while waiting and waiting[-1].end <= offset and (is_edge(offset) or offset == last):
                    self.answer(waiting.pop(), digests, loop)

            if self.read_so_far < min(self.end, last) and not cancelled.is_set():
                self.suspect = self.suspect or 0
            self.read_so_far = 0

    def answer(
        self, one: Wanted, digests: dict[int, str], loop: asyncio.AbstractEventLoop
    ) -> None:
        head, sha256 = digests[head_end(one.end)], digests[one.end]
        digest = Digest(head, sha256, time.time())
        loop.call_soon_threadsafe(one.settle, digest)

    def edges_for(self, stops: set[int]) -> list[int]:
        """Return where a pass stops: for those who wait, and to compare each block."""
        last = max(stops)
        index = bisect.bisect_left(self.checkpoints, last, key=BY_OFFSET)
        if index < len(self.checkpoints):
            last = self.checkpoints[index].offset
        blocks = range(BLOCK_BYTES, last, BLOCK_BYTES)
        known = {head_end(last), min(self.end, last), last}
        return sorted(known.union(stops, blocks))

    def find_changes(self, cancelled: threading.Event) -> list[Change]:
        """Read everything from the suspect checkpoint on again; return what is not as it was."""
        changes: list[Change] = []
        with self.lock:
            known = self.checkpoints[self.suspect or 0 :]

            for before, after in itertools.pairwise(known):
                _, state = self.read_from(before.offset, before.state, after.offset, cancelled)
                if cancelled.is_set() or state.digest() == after.state.digest():
                    continue
                change = Change(before.offset, after.offset, after.time_s, time.time())
                if changes and changes[-1].end == change.start:
                    change = changes.pop()._replace(end=change.end, found_s=change.found_s)
                changes.append(change)
        return changes

    def go_on_from(self, changes: list[Change], _: threading.Event) -> None:
        """Take the bytes as they are now; what was known before is remembered."""
        with self.lock:
            self.suspect = None
            if not changes:
                return
            if not self.remembered:
                self.remembered, self.remembered_end = self.known(), self.end
            self.changes += changes
            self.started_s = time.time()
            first = bisect.bisect_right(self.checkpoints, changes[0].start, key=BY_OFFSET)
            del self.checkpoints[first:]
            self.next_block = self.hurry_blocks = 0


def read_pieces(
    file: LogFile, start: int, end: int, cancelled: threading.Event
) -> Iterator[bytes]:
    """Read a file in pieces that end at multiples of their size."""
    while start < end and not cancelled.is_set():
        stop = min(end, start - start % PIECE_BYTES + PIECE_BYTES)
        piece = file.read_bytes(start, stop)
        if not piece:
            return
        yield piece
        start += len(piece)


def states_at(
    pieces: Iterable[bytes], edges: Iterable[int]
) -> Iterator[tuple[int, hashlib._Hash]]:
    """Hash pieces; yield the state at each edge (sorted offsets) that is reached, and at the end.

    The state goes on being updated: keep a copy.
    """
    state, offset = hashlib.sha256(), 0
    coming = iter(edges)
    edge = next(coming, None)

    for piece in itertools.chain([b""], pieces):
        view = memoryview(piece)
        while edge is not None and offset + len(view) >= edge:
            state.update(view[: edge - offset])
            view = view[edge - offset :]
            offset = edge
            yield offset, state
            edge = next(coming, None)
        state.update(view)
        offset += len(view)
    yield offset, state


def head_end(end: int) -> int:
    return min(FINGERPRINT_BYTES, end)


def is_edge(offset: int) -> bool:
    """Return True at the ends of blocks; the first 4 KiB are one, for the head."""
    return offset == FINGERPRINT_BYTES or offset % BLOCK_BYTES == 0


def next_edge(offset: int) -> int:
    if offset < FINGERPRINT_BYTES:
        return FINGERPRINT_BYTES
    return offset - offset % BLOCK_BYTES + BLOCK_BYTES


def describe(changes: list[Change]) -> str:
    """Return where bytes changed, and between which times."""
    first = changes[0]
    place = f"between byte {first.start:,} and {first.end:,}"
    more = " and elsewhere" if len(changes) > 1 else ""
    times = f"between {utc(first.good_s)} and {utc(first.found_s)}"
    return f"the log was changed {place}{more}, {times}"


def utc(seconds_since_1970: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds_since_1970, datetime.UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"


def quoted_value(text: str) -> str:
    """Return a value of a key=value line: as JSON text if it has white space or quotes in it."""
    plain = text and text.isprintable() and not set(' "') & set(text)
    return text if plain else json.dumps(text)


def write_line(line: str) -> None:
    """Write to standard output, wherever that leads; a full pipe or disk loses the line."""
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [1], [], 0)[1]:  # a pipe takes lines of up to 4 KiB whole
            os.write(1, f"{line}\n".encode())


def write_alarm(sentence: str) -> None:
    """Write to standard error at error priority (sd-daemon(3))."""
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [2], [], 0)[1]:
            os.write(2, f"<3>audit_stream: {sentence}\n".encode())


# -- who read the log --


class ReadRecord:
    """What clients read of a file: one line a minute for each client and generation."""

    def __init__(self) -> None:
        self.ranges: dict[tuple[str, str, str], list[ByteRange]] = {}  # client, name, and file
        self.queries: set[tuple[str, ...]] = set()

    def note(self, context: RequestContext, response: Response) -> None:
        """Note an answer of /api/audit, /api/search or /api/counts."""
        event = context.path.rpartition("/")[2]
        if response.status_code == 206:
            self.note_range(context, response.headers["Content-Range"])
        elif response.status_code == 200 and event in ("search", "counts"):
            self.note_query(event, context)

    def note_query(self, event: str, context: RequestContext) -> None:
        """Record a query once a minute: a page asks for a search piece by piece."""
        client, name = context.client, context.user
        query = context.query.get("q", "")[:500]
        key = event, client, name, query
        if key not in self.queries and len(self.queries) < 10_000:
            self.queries.add(key)
            record_access(event, client=client, name=name, query=query)

    def note_range(self, context: RequestContext, content_range: str) -> None:
        start, last = map(int, re.findall(r"\d+", content_range)[:2])
        whose = context.client, context.user, context.query.get("generation", "")
        ranges = self.ranges.setdefault(whose, [])
        ranges.append((start, last + 1))
        if len(ranges) > 256:
            self.ranges[whose] = merged(ranges)[:255]
        if len(self.ranges) > 1000:
            self.flush()

    def flush(self) -> None:
        """Write what was read in this minute."""
        everything, self.ranges = self.ranges, {}
        self.queries.clear()
        for (client, name, generation), ranges in everything.items():
            parts = merged(ranges)
            offsets = ",".join(f"{start}-{end}" for start, end in parts[:16])
            size = sum(end - start for start, end in parts)
            read = {"bytes": size, "offsets": offsets, "generation": generation}
            record_access("read", client=client, name=name, **read)

    async def flush_forever(self) -> None:
        while True:
            await asyncio.sleep(60)
            self.flush()


def merged(ranges: list[ByteRange]) -> list[ByteRange]:
    """Return ranges in order, those that touch as one."""
    result: list[ByteRange] = []
    for start, end in sorted(ranges):
        if result and start <= result[-1][1]:
            start, last = result.pop()
            end = max(end, last)
        result.append((start, end))
    return result


# -- do receipts still hold? --

RECEIPT = re.compile(
    r"""audit-stream:\ receipt
    \ log=(?P<log>"(?:[^"\\]|\\.)*"|[^\s"]+)
    \ generation=(?P<generation>\S+)
    \ head=(?P<head>[0-9a-f]{64})
    \ bytes=(?P<end>\d{1,18})
    \ sha256=(?P<sha256>[0-9a-f]{64})
    \ time=(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)""",
    re.VERBOSE | re.ASCII,
)
DIGEST_ONLY = re.compile(rb"(\d{1,18}):([0-9a-f]{64})", re.IGNORECASE)


class Verdict(NamedTuple):
    """What became of a receipt."""

    receipt: Receipt
    state: str  # "holds", "fails", "gone" (with all that is older), "unknown"
    detail: str
    place: int = -1  # the index of the file that it holds in


class Candidate(NamedTuple):
    """A file that receipts may be about: the log or a rotated one."""

    label: str  # its name without the folder
    file: LogFile
    compressed: str
    begin: bytes  # the first 4 KiB of log in it

    def pieces(self, cancelled: threading.Event) -> Iterator[bytes]:
        """Read what was there at the beginning; raises OSError if it is damaged."""
        if self.compressed:
            return decompressed_pieces(self.file, self.compressed, cancelled, PIECE_BYTES)
        return read_pieces(self.file, 0, self.file.size, cancelled)

    def heads(self, receipts: Iterable[Receipt]) -> dict[int, str]:
        """Return the digests of as many first bytes as receipts name, by their number."""
        sizes = {head_end(receipt.end) for receipt in receipts}
        return {size: hashlib.sha256(self.begin[:size]).hexdigest() for size in sizes}

    def is_older_than(self, moment_s: float, times: TimeFormat | None) -> bool:
        """Return True if the file was finished, or has entries from, before a moment."""
        if self.file.modified_s() < moment_s - CLOCK_S:
            return True
        if times is None:
            return False
        stamps = map(times.time_of, self.begin.split(b"\n"))
        oldest = min((stamp for stamp in stamps if stamp is not None), default=moment_s)
        return oldest < moment_s - CLOCK_S


def verify_receipts(options: Options) -> int:
    """Check receipts against the log and its rotated files.

    Returns 0 if all hold, 1 if one does not, 2 for nonsense, 3 if none could be checked.
    """
    lines: Iterable[bytes] = sys.stdin.buffer
    if options.verify != "-":
        lines = os.fsencode(options.verify or "").splitlines()
    receipts = [receipt for line in lines for receipt in receipts_in(line)]
    if options.verify != "-" and not receipts:
        print("audit_stream.py: --verify takes BYTES:SHA256, a receipt or -", file=sys.stderr)
        return 2

    check = check_receipts(options.log, receipts, options.zone, threading.Event())
    failed = [verdict for verdict in check.verdicts if verdict.state == "fails"]
    for receipt, _, detail, _ in failed[:MAX_SHOWN]:
        print(f"does not hold: {detail}: {receipt.line if receipt.head else receipt.end}")
    if len(failed) > MAX_SHOWN:
        print(f"and {len(failed) - MAX_SHOWN:,} more do not hold")
    print(check.summary())

    if failed:
        return 1
    return 0 if any(verdict.state == "holds" for verdict in check.verdicts) else 3


def receipts_in(line: bytes) -> list[Receipt]:
    """Find the receipts in a line of anything: text, a journal entry, JSON."""
    if bare := DIGEST_ONLY.fullmatch(line.strip()):
        end, sha256 = int(bare[1]), bare[2].decode().lower()
        return [Receipt("", "", "", end, sha256, "")]
    if b"audit-stream: receipt" not in line:
        return []
    text = line.decode(errors="replace")
    found = list(RECEIPT.finditer(text))
    if not found and "\\" in text:  # inside of a JSON text
        found = list(RECEIPT.finditer(re.sub(r"\\(.)", r"\1", text)))

    receipts = []
    for match in found:
        with contextlib.suppress(ValueError):
            receipts.append(receipt_of(match.groupdict()))
    return receipts


def receipt_of(fields: dict[str, str]) -> Receipt:
    """Return the receipt of a match. Raises ValueError if it is damaged."""
    datetime.datetime.fromisoformat(fields["time"])
    name = fields["log"]
    if name.startswith('"'):
        name = json.loads(name)
    end, sha256 = int(fields["end"]), fields["sha256"]
    return Receipt(name, fields["generation"], fields["head"], end, sha256, fields["time"])


def check_receipts(
    path: str, receipts: list[Receipt], zone: datetime.tzinfo, cancelled: threading.Event
) -> ReceiptCheck:
    """Check receipts in one pass over the log and its rotated files.

    What does not hold is read again before it is said: files may be rotated meanwhile.
    """
    check = ReceiptCheck(path, receipts, zone, cancelled)
    for _ in range(2):
        if not any(verdict.state == "fails" for verdict in check.verdicts):
            break
        before = check.verdicts
        check = ReceiptCheck(path, receipts, zone, cancelled)
        for index, verdict in enumerate(before):
            if verdict.state == "holds":
                check.verdicts[index] = verdict
    return check


class ReceiptCheck:
    """The verdicts about receipts, from one pass over the log and its rotated files."""

    def __init__(
        self,
        path: str,
        receipts: list[Receipt],
        zone: datetime.tzinfo,
        cancelled: threading.Event,
    ) -> None:
        self.name = file_name(path)
        self.receipts, self.zone, self.cancelled = receipts, zone, cancelled
        self.candidates: list[Candidate] = []  # newest first
        self.unreadable = ""  # a file that cannot be read, and why
        self.sizes: dict[int, int] = {}  # of candidates, in bytes of log
        self.found: dict[int, Verdict] = {}

        self.open(path, "")
        for name in rotated_files(path):
            self.open(name.path, name.compressed)
        for place in range(len(self.candidates)):
            self.compare(place)
        self.verdicts = [
            self.found.get(index) or self.judge_missing(receipt)
            for index, receipt in enumerate(receipts)
        ]

    def open(self, path: str, compressed: str) -> None:
        label = quoted_value(os.path.basename(path))
        try:
            file = open_log_file(path)
            begin = file.read_bytes(0, FINGERPRINT_BYTES)
            if compressed:
                pieces = decompressed_pieces(file, compressed, self.cancelled, FINGERPRINT_BYTES)
                begin = next(pieces, b"")

        except FileNotFoundError:
            return
        except OSError as error:
            self.unreadable = f"{label}: {error.strerror}"
            return
        self.candidates.append(Candidate(label, file, compressed, begin))

    def compare(self, place: int) -> None:
        """Compare the digests of one file with what is said of it."""
        candidate = self.candidates[place]
        heads = candidate.heads(self.receipts)
        mine = {
            index: receipt
            for index, receipt in enumerate(self.receipts)
            if receipt.head in ("", heads[head_end(receipt.end)])
            if receipt.end and not self.holds(index)
        }
        if not mine:
            return

        digests: dict[int, str] = {}
        size, damage = 0, ""
        try:
            stops = sorted({receipt.end for receipt in mine.values()})
            for size, state in states_at(candidate.pieces(self.cancelled), stops):
                digests[size] = state.hexdigest()
        except OSError as error:
            damage = f"{candidate.label} {error.strerror}"
            digests.clear()

        self.sizes[place] = size

        self.judge(place, mine, digests, size, damage)

    def judge(
        self,
        place: int,
        receipts: dict[int, Receipt],
        digests: dict[int, str],
        size: int,
        damage: str,
    ) -> None:
        """Say which receipts hold in a file, and between which of them it changed."""
        label, held = self.candidates[place].label, 0
        for index in sorted(receipts, key=lambda index: receipts[index].end):
            receipt = receipts[index]
            end = receipt.end
            if digests.get(end) == receipt.sha256:
                held = end
                self.found[index] = Verdict(receipt, "holds", label, place)
                continue

            detail = f"{label} was changed between byte {held:,} and {end:,}"
            if end > size:
                detail = f"{label} has only {size:,} of {end:,} bytes"
            self.found[index] = Verdict(receipt, "fails", damage or detail)

    def holds(self, index: int) -> bool:
        return index in self.found and self.found[index].state == "holds"

    def judge_missing(self, receipt: Receipt) -> Verdict:
        """Judge a receipt whose file is gone: together with all that is older, or on its own."""
        if self.unreadable or not self.candidates or not receipt.end:
            return Verdict(receipt, "unknown", self.unreadable or "there is nothing to check")
        if not receipt.head:
            return Verdict(receipt, "fails", "no file has these bytes")
        if receipt.log != self.name:
            return Verdict(receipt, "unknown", f"it is of another log: {receipt.log}")

        first = self.first_times[receipt.head]
        moment_s = datetime.datetime.fromisoformat(first).timestamp()
        for candidate in reversed(self.candidates):
            if candidate.is_older_than(moment_s, self.times):
                detail = f"its file is gone, although {candidate.label} has what is older"
                return Verdict(receipt, "fails", detail)
        return Verdict(receipt, "gone", "its file is gone, together with all that is older")

    @functools.cached_property
    def first_times(self) -> dict[str, str]:
        """Return when each file, by its head, had its first receipt."""
        latest_first = sorted(self.receipts, key=lambda receipt: receipt.time, reverse=True)
        return {receipt.head: receipt.time for receipt in latest_first}

    @functools.cached_property
    def times(self) -> TimeFormat | None:
        files = [candidate.file for candidate in self.candidates if not candidate.compressed]
        return detect_time_format(files[0], self.zone) if files else None

    def newer_bytes(self) -> int:
        """Return how many bytes came after the last receipt that holds."""
        newer = 0
        for place, candidate in enumerate(self.candidates):
            if place not in self.sizes:
                with contextlib.suppress(OSError):
                    self.sizes[place] = sum(map(len, candidate.pieces(self.cancelled)))
            held = [verdict.receipt.end for verdict in self.verdicts if verdict.place == place]
            newer += self.sizes.get(place, 0) - max(held, default=0)
            if held:
                break
        return newer

    def summary(self) -> str:
        """Return the one line that says it all."""
        states = collections.Counter(verdict.state for verdict in self.verdicts)
        holds, fails, newer = states["holds"], states["fails"], self.newer_bytes()
        parts = [f"{holds:,} {'holds' if holds == 1 else 'hold'}"]
        if fails:
            parts.append(f"{fails:,} {'does' if fails == 1 else 'do'} not hold")
        if states["unknown"]:
            parts.append(f"{states['unknown']:,} could not be checked")
        parts.append(f"{states['gone']:,} of a file that is gone")
        parts.append(f"{newer:,} {'byte is' if newer == 1 else 'bytes are'} newer than the last")

        count, plural = len(self.receipts), "s" if len(self.receipts) != 1 else ""
        return f"{count:,} receipt{plural}{receipt_span(self.receipts)}: {'; '.join(parts)}"


def receipt_span(receipts: list[Receipt]) -> str:
    """Return from when to when receipts are, as in ", 2026-01-02 to today"."""
    today = utc(time.time())[:10]
    days = sorted(receipt.time[:10] for receipt in receipts if receipt.time)
    if not days:
        return ""
    first, last = days[0], days[-1].replace(today, "today")
    return f", {last}" if days[0] == days[-1] else f", {first} to {last}"


# ---- 10 Service ----------------------------------------------------------------------------------
# One process from its start to its stop, and the limits of the machine that it lives in.

ServiceWork = Coroutine[Any, Any, None]
START_TIME_S = time.time()
WATCHDOG_S = int(os.environ.get("WATCHDOG_USEC", 86_400_000_000)) / 2e6  # sd_watchdog_enabled(3)
ACCEPT_BATCH = 32  # connections in one go: asyncio would take as many as may wait
STOP_S = 1.8  # from the signal to the end of the process
SWITCH_S = 0.0005  # threads make way for the event loop: with Python's 5 ms, lines waited a second
APPEND_WAIT_S = 5.0  # for the lock, which everybody who may read the log may hold


async def run(options: Options, access: AccessControl, page: bytes, limits: Limits) -> None:
    """Serve until SIGTERM or SIGINT. Raises OSError if the address is not to be had."""
    listener = open_listener(options)
    stop, reload = catch_signals()

    # What is served, and to whom.
    follower = LogFollower(options.log, options.interval)
    await follower.check()
    connections = Connections(limits.viewers, limits.others, access.tls)
    broadcaster = Broadcaster(follower, connections, options.initial)
    proof = Proof(follower, broadcaster, options.anchor, options.expect_every or 0.0)
    files = FileSet(follower, options.zone)
    site = Site(access, broadcaster, History(options.zone), files, proof, page)

    # Open the port, then say so.
    server = await open_server(site, listener)
    listener.listen(min(1024, limits.others // 2))  # the default drops some in a storm
    with contextlib.suppress(OSError):  # wherever standard output leads, even to a full disk
        os.write(1, f"{address_to_open(options, access, listener)}\n".encode())
    sd_notify("READY=1")

    # Work until the stop.
    works = [
        follow(follower, broadcaster),
        connections.abort_stalled(),
        reload_credentials(access, connections, reload),
        proof.run(),
    ]
    if options.demo:
        works.append(write_demo_entries(options.log))
    try:
        await run_until(stop, works)
    finally:
        sd_notify("STOPPING=1")
        await close(server, connections)


def catch_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Return what SIGTERM or SIGINT sets, and what SIGHUP sets."""
    stop, reload = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(LoopErrorLog())

    def end(*_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):  # a second one must not spoil the exit code
            signal.signal(number, signal.SIG_IGN)
        exit_after(STOP_S)  # the loop may be busy for longer
        loop.call_soon_threadsafe(stop.set)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    return stop, reload


def exit_after(delay_s: float) -> None:
    """End the process then, whatever is still going on: 10,000 viewers take longer."""
    timer = threading.Timer(delay_s, os._exit, (0,))
    timer.daemon = True
    timer.start()


async def open_server(site: Site, listener: socket.socket) -> Server:
    connections = site.broadcaster.connections

    return await serve(
        functools.partial(handle_viewer, site.broadcaster),
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


async def run_until(stop: asyncio.Event, works: list[ServiceWork]) -> None:
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(work) for work in works]
        await stop.wait()
        for task in running:
            task.cancel()


async def close(server: Server, connections: Connections) -> None:
    """Close the viewers with 1001, and abort whatever has not ended after a second."""
    # Stop accepting. asyncio would drop whoever it accepted just now, without closing the socket.
    loop = asyncio.get_running_loop()
    for listener in server.sockets:
        loop.remove_reader(listener.fileno())
    for _ in range(3):
        await asyncio.sleep(0)

    # Close.
    server.close()
    closed = asyncio.create_task(server.wait_closed())
    for connection in list(connections.awaiting_request):
        connection.abort()
    await asyncio.wait([closed], timeout=1)

    # Abort.
    while not closed.done():
        connections.abort_all()
        await asyncio.sleep(0.01)


async def reload_credentials(
    access: AccessControl, connections: Connections, wanted: asyncio.Event
) -> None:
    while await wanted.wait():
        wanted.clear()
        await access.reload(connections.viewers)


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


# -- limits: file descriptors, what asyncio says once there is none left, garbage collection --


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


def tame_garbage_collector() -> None:
    """Make full collections rare: with 10,000 connections one stops the loop for a second.

    It would find next to nothing, see Connection.break_cycles.
    """
    gc.freeze()
    gc.set_threshold(10_000, 10, 20)


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
    "proof_alarms_total": "Alarms about bytes that changed after they were published.",
    "proof_altered": "One while such bytes are there and nobody has accepted them.",
    "proof_false_suspicions_total": "Suspicions that a second read cleared.",
    "proof_known_bytes": "Bytes of the log whose digest is known.",
    "proof_passes_total": "Passes over a file for those who asked for a receipt.",
    "proof_read_bytes_total": "Bytes that were read to compare the log with what it was.",
    "proof_verified_time_seconds": "When the last pass over the log ended, in seconds since 1970.",
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


def metrics(site: Site) -> str:
    """Return the text format of Prometheus."""
    broadcaster = site.broadcaster
    connections, current = broadcaster.connections, broadcaster.follower.current
    catching_up = sum(viewer.position is not None for viewer in connections.viewers)
    versions = f'version="{VERSION}",websockets="{websockets.version.version}"'
    now = {
        'viewers{state="live"}': connections.live_count,
        'viewers{state="catching_up"}': catching_up,
        "answer_bytes": connections.answer_bytes,
        "behind_bytes": max(0, broadcaster.follower.size - current.end),
        "start_time_seconds": START_TIME_S,
        f"build_info{{{versions}}}": 1,
        **site.proof.metrics(),
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


# -- writing to the log: --append and --demo --


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


# ---- 11 Command line -----------------------------------------------------------------------------
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
    # The page reads stamps without a zone as the server does.
    page = read_page().replace(b'data-zone="UTC"', b'data-zone="%b"' % str(options.zone).encode())
    access = AccessControl(options, page)
    if access.generated and options.reuse_port:
        argument_parser().error("--reuse-port needs a token that all processes know")
    limits = raise_fd_limit(options.max_viewers)
    tame_garbage_collector()
    sys.setswitchinterval(SWITCH_S)

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
    arguments = join_signed_zone(sys.argv[1:] if argv is None else argv)
    options = Options(**vars(argument_parser().parse_args(arguments)))
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


def join_signed_zone(arguments: list[str]) -> list[str]:
    """Return them with `--zone -05:00` as one, which argparse takes for two options otherwise."""
    kept: list[str] = []
    for argument in arguments:
        if kept[-1:] == ["--zone"] and re.match(r"-\d", argument):
            argument = f"{kept.pop()}={argument}"
        kept.append(argument)
    return kept


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
    option(
        "--interval", metavar="SECONDS", type=duration, default=3.0, help="of size checks (3)"
    )
    option("--initial", metavar="BYTES", type=integer(0, MAX_MESSAGE), default=1000, help=INITIAL)
    option("--zone", metavar="ZONE", type=time_zone, default=datetime.UTC, help=ZONE_HELP)
    option("--token-file", metavar="PATH", help="tokens, each TOKEN or NAME TOKEN on its line")
    option("--no-auth", action="store_true", help="open to everyone who can reach the port")
    option("--tls-cert", metavar="PATH", help="serve HTTPS and WSS; read again on SIGHUP")
    option("--tls-key", metavar="PATH", help="the key of the certificate")
    option("--allow-host", metavar="NAME", action="append", default=[], help=HOSTS)
    option("--allow-origin", metavar="ORIGIN", type=origin, action="append", default=[], help=PAGES)
    option("--trust-proxy", metavar="ADDRESS", type=proxy, nargs="?", const="loopback", help=PROXY)
    option("--max-viewers", metavar="N", type=integer(1, 1_000_000), default=10000, help=VIEWERS)
    option("--rate-limit", metavar="N", type=integer(0, 1_000_000), default=600, help=RATE)
    option("--reuse-port", action="store_true", help="several processes may share the port")
    option("--append", metavar="TEXT", help="write an entry to the log and exit")
    option("--anchor", metavar="SECONDS", type=seconds_or_0, default=3600.0, help=ANCHOR)
    option("--verify", metavar="RECEIPT", help="does the log hold it? - reads standard input")
    option(
        "--expect-every", metavar="SECONDS", type=duration, help="say so if it is silent longer"
    )
    option("--demo", action="store_true", help="follow a throw-away log with an entry a second")
    option("--version", action="version", version=f"audit_stream.py {VERSION}")
    return parser


INITIAL = "how much of the end of the log a new viewer gets (1000)"
ZONE_HELP = "of time stamps that name none: +01:00 or Europe/Berlin (UTC)"
HOSTS = "a further name of an open server"
PAGES = "a further page origin that may open the WebSocket"
PROXY = "take its X-Forwarded-For, X-Forwarded-Proto and X-Forwarded-User"
VIEWERS = "at the same time (10000)"
RATE = "answers a minute and client address; 0: no limit (600)"
ANCHOR = "between two receipts on standard output; 0: never (3600)"


def integer(low: int, high: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            return int_in_range(text, repr(text), low, high)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def duration(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 86400:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} must be seconds above 0, at most 86400")


def seconds_or_0(text: str) -> float:
    return 0.0 if text == "0" else duration(text)


def time_zone(text: str) -> datetime.tzinfo:
    if match := re.fullmatch(r"([+-])([01]\d|2[0-3]):?([0-5]\d)", text, re.ASCII):
        minutes = int(match[2]) * 60 + int(match[3])
        offset = datetime.timedelta(minutes=minutes if match[1] == "+" else -minutes)
        return datetime.timezone(offset)
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
