"""Some hundred random steps, one equation.

Joined, what a viewer got is what was written, or a seam stands there: a gap that is told, a hole, a
cut, a refused cursor.

python3 tests/test_random.py FIRST [LAST]    repeats a seed, or tries many
"""

import contextlib
import errno
import gzip
import itertools
import math
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
from faults import Faults, build_shim
from harness import Server, Viewer, append, eventually, free_port, pack, shift

STEPS = 150
PROVED = 4096  # first and last bytes of what was sent: they tell where the stream goes on
ODD = [
    word.encode()
    for word in ("a", "b ", "é", "✅", "😀", "\u2028", "\r", "\0.", "\x1b[0m", "\ufeff", "\t")
]
ODD += [b"\xff", b"\xe2\x82", b"\xf0\x9f\x98", b"\xed\xa0\x80"]


class Life:
    """What was written to the file in one of its lives; the next may begin with the same bytes."""

    def __init__(self, number, parent=None, kept=0):
        self.number, self.parent, self.kept = number, parent, kept
        self.data = bytearray(parent.data[:kept] if parent else b"")
        self.sent = 0  # so much had the server published for sure
        self.gone = math.inf  # from here on no file has it any more
        self.trimmed = 0  # so many bytes are the end of what its parent had
        self.cut_off = False  # it ended where it was cut or rewritten in its place
        self.hidden = False  # its file has a name that counts only with file events
        self.unseen = False  # some of it went while no server ran: nobody can know
        self.removed = False  # somebody deleted its numbered file: the number is missing
        self.late = False  # it was written after the next one: names and times contradict
        self.copied = False  # before it the same file was copied and cut, and nobody looked

    def __repr__(self):
        return f"life {self.number} of {len(self.data)} bytes"

    def odd(self):
        """Is there something about its file that may be told as a gap?"""
        return self.hidden or self.late or self.gone < math.inf

    def shared(self):
        """How many bytes it has in common with its parent."""
        if not self.parent:
            return 0
        return len(os.path.commonprefix([bytes(self.data), bytes(self.parent.data)]))

    def line_start(self, at):
        return self.data.rfind(b"\n", 0, at) + 1

    def says(self, start, end, text):
        return end <= len(self.data) and self.data[start:end].decode(errors="replace") == text


class Reading:
    """What one viewer has by its frames: how far it is in each life, checked frame by frame."""

    def __init__(self, lives, life, start):
        self.lives, self.first, self.start = lives, life, start
        self.current, self.entered = life, None  # a new generation has no life until bytes come
        self.names, self.leapt = {}, False
        self.reasons, self.told = set(), False  # since the last bytes of the current life
        self.parts = {life: [(start, start, "")]}
        self.gaps = []  # (life, next life) between which it was told that lines may be missing
        self.unknown = 0  # up to this life the server may not know what lay between

    def position(self, life):
        return self.parts[life][-1][1] if life in self.parts else None

    def take(self, frame):
        if frame["type"] == "generation":
            self.names[frame["generation"]] = None
            self.entered, self.leapt = frame["start"], False
            self.reasons.add(frame["reason"])
            self.told |= frame["gap"] is not None
        elif frame["type"] == "skip" and frame["end"] > frame["start"]:
            self.skip(frame["start"], frame["end"])
        elif frame.get("text"):
            self.add(self.life_of(frame), frame["start"], frame["end"], frame["text"])

    def skip(self, start, end):
        if self.entered is None:
            return self.add(self.current, start, end, None)
        assert self.entered == start
        self.entered, self.leapt, self.told = end, True, True

    def life_of(self, frame):
        """Whose bytes these are, at the place where the reading has to go on."""
        name, start, fits = frame["generation"], frame["start"], self.says(frame)
        known = self.names.get(name)
        if known in fits and self.position(known) == start:
            return known
        joining = [life for life in fits if self.joins(life, start)]
        assert joining, (
            f"{name} {start} {frame['end']} {frame['text'][-80:]!r} fits {fits},"
            f" does not join {self}"
        )
        now = self.current.number + (self.entered is not None)  # a new generation: a later life
        life = min(joining, key=lambda life: (life.number < now, life.number))
        self.names[name] = life
        if life.number > self.current.number:
            self.enter(life)
        return life

    def enter(self, life):
        """Nothing is passed over without a word."""
        if self.told:
            self.gaps.append((self.current.number, life.number))
        for passed in self.lives[self.current.number + 1 : life.number]:
            cut = passed.cut_off and not (passed.sent and self.reasons == {"rotated"})
            known = passed.number > self.unknown or passed.removed
            if not known:
                self.gaps.append((passed.number, passed.number))
            excused = self.told or cut or passed.unseen or not known
            silent = f"{passed} is passed over without a word before {life}, in {self}"
            assert excused or not list(self.missing(passed, life)), silent
        self.current, self.entered, self.reasons, self.told = life, None, set(), False

    def may_miss(self, life, doubt):
        """Was it told that lines may be missing there, and is there a reason for it?"""
        for first, last in self.gaps:
            between = self.lives[first : last + 1]
            if first <= life.number <= last and (doubt or any(each.odd() for each in between)):
                return True
        return False

    def says(self, frame):
        return [
            life for life in self.lives if life.says(frame["start"], frame["end"], frame["text"])
        ]

    def joins(self, life, start):
        if life in self.parts:
            return self.position(life) == start
        if life.number < self.current.number:  # written late to a file rotated before we came,
            return life.number < self.first.number or self.may_miss(life, True)  # or left out
        if self.entered is not None:
            known = max(life.shared(), life.trimmed)
            return self.entered == start and (self.leapt or start <= known)
        return self.position(self.current) == start <= life.shared()  # it was cut behind this place

    def add(self, life, start, end, text):
        parts = self.parts.setdefault(life, [])
        assert not parts or parts[-1][1] == start, f"{life} at {start} and not at {parts[-1][1]}"
        parts.append((start, end, text))

    def covered(self, life):
        """The stretches of a life that came, by its name or as what it shares with another one."""
        own = self.got(life) + [(0, life.trimmed)]
        while life.parent and life is not self.first:
            shared, life = life.shared(), life.parent
            stretches = self.got(life) + [(0, life.trimmed)]
            own += [(start, min(end, shared)) for start, end in stretches if start < shared]
        return own

    def inherited(self, life):
        """What came of a life as the beginning of a later one."""
        heirs = [each for each in self.lives if each.parent is life]
        stretches = [(heir, self.got(heir) + self.inherited(heir)) for heir in heirs]
        return [(a, min(b, heir.shared())) for heir, spans in stretches for a, b in spans]

    def got(self, life):
        before = [(0, self.start)] if life is self.first else []
        parts = self.parts.get(life, [])
        return before + [(start, end) for start, end, text in parts if text is not None]

    def missing(self, life, following=None):
        """What never came of a life, nor comes as the beginning of the following one."""
        at, heir = 0, following and following.parent is life
        own = [(0, following.shared())] if heir else []
        for start, end in sorted(self.covered(life) + self.inherited(life) + own):
            if start > at:
                yield at, start
            at = max(at, end)
        if at < len(life.data):
            yield at, len(life.data)

    def check(self, last, doubt, refused=False):
        """Nothing is missing, up to the last life, that is still there; nothing came twice.

        Where a cursor was refused, a seam says that what came after it may be missing; where there
        is doubt, or a name tells nothing over a restart, a gap does.
        """
        for life in self.lives[self.first.number : last.number + 1]:
            told = self.position(life) if refused and life in self.parts else math.inf
            if self.may_miss(life, doubt):
                told = 0
            for start, end in self.missing(life):
                message = f"{start} to {end} of {life} never came, in {self}"
                assert start >= min(life.gone, told), message
            self.check_text(life)

    def check_text(self, life):
        """Whole characters; and after a cut no more again than the line in which it lies."""
        spans = [(start, end) for start, end, text in self.parts.get(life, []) if text]
        joined = "".join(text for _, _, text in self.parts.get(life, []) if text)
        expected = b"".join(bytes(life.data[slice(*span)]) for span in spans)
        assert joined == expected.decode(errors="replace")
        if not spans or life is self.first or not self.parts.get(life.parent):
            return
        if life.trimmed:
            again = f"{life} begins at {spans[0][0]}, {life.trimmed} bytes of it were sent before"
            assert spans[0][0] >= life.trimmed or self.may_miss(life, True), again
        if life.kept > PROVED:  # else the first 4 KiB are no longer what was sent
            kept = life.line_start(min(life.kept, self.position(life.parent)))
            assert spans[0][0] >= kept, f"{life} again from {spans[0][0]}, {life.kept} was kept"

    def __repr__(self):
        places = [
            f"{life.number}: {parts[-1][0]}-{parts[-1][1]}" for life, parts in self.parts.items()
        ]
        now = f"now in {self.current} ({self.entered})"
        return f"reading from {self.start} of {self.first}, {now}: {places[-9:]}"


def make_room(log):
    """log.1 becomes log.2 and so on; the log stays."""
    for number, packed in itertools.product(range(63, 0, -1), ("", ".gz")):
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{log}.{number}{packed}", f"{log}.{number + 1}{packed}")


class Eye:
    """A JSON viewer through all its connections."""

    def __init__(self, scene, **options):
        self.scene, self.options, self.cursor, self.seen = scene, options, None, 0
        self.sessions = []  # (viewer, the life of the log in which it connected)
        self.open()

    @property
    def viewer(self):
        return self.sessions[-1][0]

    def open(self):
        viewer = Viewer(self.scene.server, json=True, since=self.cursor, **self.options)
        self.sessions.append((viewer, self.scene.life, self.scene.server))
        self.seen = 0

    def close(self):
        self.viewer.close()
        with contextlib.suppress(StopIteration):
            self.cursor = self.viewer.cursor
        self.options = {}

    def has(self, marker):
        fresh = self.viewer.frames[self.seen :]
        found = any(marker in frame.get("text", "") for frame in fresh)
        self.seen += 0 if found else max(0, len(fresh) - 1)
        return found

    def check(self):
        reading = before = None
        for viewer, life, server in self.sessions:
            if reading and server is not before:
                reading.unknown = life.number
            before = server
            frames = [frame for frame in viewer.frames if "cursor" in frame]
            if frames and not frames[0]["resumed"]:
                reading = self.begin(reading, frames[0], life)
            for frame in frames:
                reading.take(frame)
        reading.check(self.scene.life, self.scene.doubt)

    def begin(self, reading, snapshot, life):
        """A snapshot that goes on nowhere: the first, or one for a cursor whose bytes are gone."""
        if reading:
            places = [(each, parts[-1][1]) for each, parts in reading.parts.items()]
            places = [each for each in places if each[0].number >= reading.current.number - 1]
            lost = any(self.is_hidden(each) or each.gone < at for each, at in places)
            refused = f"refused: {snapshot['reason']}, {reading}"
            assert snapshot["reason"] in ("ahead", "changed", "gone"), refused
            assert lost or self.scene.doubt, refused
            reading.check(reading.current, self.scene.doubt, refused=True)
        return Reading(self.scene.lives, life, snapshot["start"])

    def is_hidden(self, life):
        """Is its file, whatever became of it in its place, where only file events lead?"""
        heirs = [each for each in self.scene.lives if each.parent is life]
        return life.hidden or any(self.is_hidden(heir) for heir in heirs)


class Scene:
    """The log, its server and its viewers, and what may happen to them."""

    def __init__(self, seed, folder):
        self.dice = random.Random(seed)
        self.doubts = seed % 3 == 0  # clocks are set, and calls fail: lines may be told as missing
        self.doubt, self.faults = False, None
        self.log, self.folder = folder / "logs" / "log", folder / "logs"
        self.folder.mkdir()
        if self.doubts and (shim := build_shim(folder)):
            self.faults = Faults(shim, self.folder, folder / "control")
        self.port, self.server = free_port(), None
        self.lives, self.count = [Life(0)], itertools.count()
        self.late = None  # the life that was renamed last, if something may be written to it
        self.open_line = self.unnoticed = self.down = False
        self.plain, self.eyes, self.away = [], [], []
        self.done = []

    @property
    def life(self):
        return self.lives[-1]

    # writing

    def write(self, data):
        self.life.data += append(self.log, data)
        self.open_line = not data.endswith(b"\n")

    def line(self, most=60):
        return b"%d:%b\n" % (
            next(self.count),
            b"".join(self.dice.choices(ODD, k=self.dice.randint(0, most))),
        )

    def append(self):
        data = b"".join(self.line() for _ in range(self.dice.choice([1, 1, 2, 5, 40])))
        kind = self.dice.random()
        if kind < 0.03:
            data = self.line()[:-1] + "é✅".encode() * self.dice.randint(25_000, 60_000) + b"\n"
        elif kind < 0.06:
            data *= self.dice.randint(1, 3) * 100_000 // len(data) + 1
        elif kind < 0.3:
            data += b"unfinished \xe2\x9c"[: self.dice.randint(1, 13)]
        self.write(data)

    def finish_line(self):
        if self.open_line or not self.life.data:
            self.write(b"\x85%d\n" % next(self.count))

    # rotating

    def begin_life(self, kept=0, parent=None):
        self.life.cut_off = parent is not None
        self.lives.append(Life(len(self.lives), parent, kept))
        self.open_line = bool(kept) and self.life.data[-1:] != b"\n"
        self.late = None

    def round_off(self):
        """A file gets its name from its first line.

        Half a character in a file that was found as a rotated one may wait for 30 s.
        """
        if self.down or b"\n" not in self.life.data:
            self.finish_line()

    def rename(self):
        self.round_off()
        old = self.life
        shift(self.log)
        self.begin_life()
        self.late = old
        if self.dice.random() < 0.5:
            self.log.touch()
        if self.dice.random() < 0.7:
            self.append()

    def copytruncate(self):
        self.round_off()
        make_room(self.log)
        shutil.copy(self.log, f"{self.log}.1")
        os.truncate(self.log, 0)
        unseen = not self.life.sent
        self.begin_life()
        self.life.copied = unseen
        self.append()

    def replace_unseen(self):
        """By an identical copy."""
        if self.log.exists():
            shutil.copy(self.log, f"{self.log}.tmp")
            os.rename(f"{self.log}.tmp", self.log)

    def replace(self):
        self.replace_unseen()
        eventually(
            lambda: self.down or not self.log.exists() or self.is_open(),
            5,
            "the copy is not opened",
        )

    def is_open(self):
        for file in Path(f"/proc/{self.server.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
                if os.path.samefile(file, self.log):
                    return True
        return False

    def compress(self):
        for number in range(1 if self.late is None else 2, 60):
            path = Path(f"{self.log}.{number}")
            if path.exists():
                return pack(path)

    def pack_newest(self):
        self.late = None
        pack(Path(f"{self.log}.1"))

    def pack_all(self):
        self.late = None
        for path in self.folder.glob("log.*[0-9]"):
            pack(path)

    def lose(self, kept=0):
        """What comes after these bytes is no longer on disk."""
        for life in reversed(self.lives):
            life.gone = min(life.gone, kept)
            life.unseen |= self.down
            if not life.kept:
                break

    def rename_aside(self):
        """To a name that counts as long as there are file events, and tells nothing later."""
        self.round_off()
        self.life.hidden = True
        self.log.rename(self.folder / f"aside {len(self.lives)}")
        self.begin_life()
        if self.dice.random() < 0.7:
            self.append()

    def rename_empty(self):
        """And the empty file after it."""
        self.round_off()
        for _ in range(2):
            shift(self.log)
            self.begin_life()
            self.log.touch()

    def lose_rotated(self):
        """Somebody deletes a rotated file, of those that are no longer read."""
        names = [*self.folder.glob("log.*[0-9]"), *self.folder.glob("log.*.gz")]
        path = self.dice.choice(sorted(names) or [None])
        if path is None or path.name in ("log.1", "log.1.gz"):
            return
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as file:
            content = file.read()
        path.unlink()
        for life in self.lives:
            if life.data and content.startswith(life.data):
                life.gone, life.removed = 0, True

    def set_clock_back(self):
        """Or forward: the times of change no longer say what the names say."""
        names = [*self.folder.glob("log.*[0-9]"), *self.folder.glob("log.*.gz"), self.log]
        for path in self.dice.sample(names, min(2, len(names))):
            if path.exists():
                moment = time.time() + self.dice.choice([-90_000, -3600, -60, 3600])
                os.utime(path, (moment, moment))
        self.doubt = True

    def trouble(self):
        """Calls that fail, while lines and rotations come."""
        if self.faults and not self.down:
            self.settle()
            chances = self.dice.choice(
                [{"reads": 200}, {"short": 300}, {"opens": 200}, {"stats": 200}]
            )
            self.doubt |= "short" not in chances
            self.faults.happen(**chances, because=self.dice.choice([errno.ENFILE, errno.EIO]))
            for _ in range(self.dice.randint(1, 4)):
                self.act(self.dice.choice([self.append, self.rename]))
                time.sleep(self.dice.choice([0, 0.1, 0.4]))
            self.faults.nothing()
            self.settle()

    def delete(self):
        """After an unseen copytruncate: nothing tells it from a rotation by copy and removal."""
        self.finish_line()
        self.log.unlink()
        self.lose()
        self.life.unseen |= self.life.copied and not self.life.sent
        self.begin_life()
        self.write(self.line())

    def truncate(self):
        """And write less at once than could be taken for what was there."""
        if PROVED < self.life.sent < PROVED + 3000 or not self.life.data:
            return self.append()
        os.truncate(self.log, 0)
        self.lose()
        self.begin_life(0, self.life)
        self.write(self.line())

    def cut(self):
        near = self.dice.random() < 0.7
        sent, size = self.life.sent, len(self.life.data)
        low = max(1, sent - PROVED + 8) if near else 1
        if size < 2 or low >= (sent or size):
            return self.append()
        kept = self.dice.randrange(low, sent or size)
        os.truncate(self.log, kept)
        self.unnoticed = sent > PROVED and kept < sent - PROVED + 8
        self.lose(kept)
        self.begin_life(kept, self.life)
        if not self.unnoticed:
            self.write(b"+" + self.line())

    def trim(self):
        """To its last lines, as cron does it."""
        data = bytes(self.life.data)
        starts = [at + 1 for at in range(len(data) - 1) if data[at : at + 1] == b"\n"][-40:]
        kept = data[self.dice.choice(starts or [0]) :]
        if len(kept) == len(data) or kept.find(data[-PROVED:][-len(kept) :]) + PROVED < len(kept):
            return self.append()
        with open(self.log, "wb", buffering=0) as file:
            file.write(kept)
        self.lose()
        self.begin_life(0, self.life)
        self.life.data += kept
        self.life.trimmed = len(kept)

    def edit(self):
        """One byte of the first or the last 4 KiB, in its place."""
        data = self.life.data
        size = len(data)
        place = self.dice.choice([self.dice.randrange(min(size, PROVED)), size - 1 - PROVED // 2])
        if place < 0 or data[place] in b"\n#":
            return self.append()
        with open(self.log, "r+b", buffering=0) as file:
            file.seek(place)
            file.write(b"#")
        self.lose(place)
        self.begin_life(place, self.life)
        self.life.data += b"#" + self.life.parent.data[place + 1 :]
        self.unnoticed = True

    # looking on

    def settle(self):
        """Everybody who reads has everything."""
        # what changed far away: anything written before the server looked would be taken for old
        if self.unnoticed:
            eventually(lambda: {*self.witness.viewer.reasons()[self.reasons :]} - {"rotated"})
        self.unnoticed = False
        self.finish_line()
        marker = f"settled {next(self.count)}\n"
        self.write(marker.encode())
        self.wait(marker)
        self.life.sent = len(self.life.data)

    def wait(self, marker):
        for eye in self.eyes:
            if not eye.options:
                eye.viewer.wait(lambda _, eye=eye: eye.has(marker), 15)
        for viewer, *_ in self.plain:
            viewer.wait(marker, 15)
        self.reasons = len(self.witness.viewer.reasons())

    @property
    def witness(self):
        return self.eyes[0]

    def start(self):
        options = {"env": self.faults.variables, "dev": False} if self.faults else {}
        options["folder"] = Path(tempfile.mkdtemp(dir=self.folder.parent))
        options["port"] = self.port
        self.server = Server(self.log, "--interval", 0.3, "--rate-limit", 0, **options)

    def mishap(self, *steps):
        """While the server does not look."""
        if steps:
            return [self.act(step) for step in steps]
        harmless = [self.append, self.append, self.rename, self.copytruncate, self.compress]
        harmless += [self.rename_empty, self.rename_aside]
        harmless += [self.replace] if self.down else []
        for _ in range(self.dice.randint(1, 4)):
            self.act(self.dice.choice(harmless))
        if self.log.exists() and self.dice.random() < 0.4:
            self.act(self.dice.choice([self.delete, self.truncate, self.cut]))

    def stand_still(self, *steps):
        self.settle()
        with self.server.looking_away():
            self.mishap(*steps)
        self.settle()

    def restart(self, *steps):
        if self.dice.random() < 0.5:
            self.server.kill()
        self.server.check()
        for eye in self.eyes:
            eye.viewer.closed()
            eye.close()
        for viewer, *_ in self.plain:
            viewer.closed()
        self.check_plain(whole=False)
        self.down, self.life.sent = True, 0
        self.mishap(*steps)
        self.down = self.unnoticed = False
        self.start()
        for eye in self.eyes:
            eye.open()
        self.late = None
        self.settle()

    def destroy(self):
        """With everything sent to everybody who reads."""
        self.settle()
        steps = [self.delete, self.truncate, self.cut, self.trim, self.edit]
        self.act(self.dice.choice(steps))
        self.settle()

    def copy_and_truncate(self):
        self.settle()
        self.copytruncate()

    def write_late(self):
        if self.late:
            self.settle()
            line = self.line()
            self.late.data += append(Path(f"{self.log}.1"), line)
            self.late.late = True
            number = line.partition(b":")[0].decode()
            self.wait(f"{number}:")

    # viewers

    def join(self):
        self.settle()
        slow = self.dice.random() < 0.4
        self.eyes.append(Eye(self, **({"pace": 30_000, "receive_buffer": 4096} if slow else {})))
        self.settle()

    def leave(self):
        if len(self.eyes) > 1:
            eye = self.eyes.pop(self.dice.randrange(1, len(self.eyes)))
            if eye.viewer.frames:
                eye.close()
                self.away.append(eye)
            else:
                self.eyes.append(eye)

    def come_back(self):
        if self.away:
            eye = self.away.pop(self.dice.randrange(len(self.away)))
            self.settle()
            eye.open()
            self.eyes.append(eye)
            self.settle()

    def join_plainly(self):
        self.settle()
        self.plain.append(
            (Viewer(self.server), self.witness.viewer, len(self.witness.viewer.frames))
        )
        self.plain[-1][0].wait(lambda it: it.frames)

    def check_plain(self, whole=True):
        """A plain viewer gets the text of the others."""
        for viewer, witness, begun in self.plain:
            frames = [viewer.frames[0]] + [
                frame.get("text", "") for frame in witness.frames[begun:]
            ]
            expected, size = "".join(frames), 1 << 60
            if whole:
                viewer.wait(lambda it, expected=expected: len(it.text) >= len(expected))
            else:
                size = min(len(expected), len(viewer.text))
            assert viewer.text[:size] == expected[:size], "the plain text differs"
            viewer.close()
        self.plain = []

    # all of it

    def act(self, step):
        self.done.append(step.__name__)
        step()

    def happen(self, steps):
        weights = {
            self.append: 60,
            self.settle: 5,
            self.rename: 8,
            self.copy_and_truncate: 4,
            self.replace: 3,
        }
        weights |= {
            self.destroy: 5,
            self.stand_still: 5,
            self.restart: 3,
            self.compress: 4,
            self.write_late: 4,
        }
        weights |= {self.join: 4, self.leave: 4, self.come_back: 4, self.join_plainly: 3}
        weights |= {self.rename_aside: 2, self.rename_empty: 2, self.lose_rotated: 2}
        weights |= {self.set_clock_back: self.doubts, self.trouble: 3 * self.doubts}
        for step in self.dice.choices(list(weights), list(weights.values()), k=steps):
            self.act(step)

    def begin(self):
        self.write(self.line() + self.line())
        self.start()
        self.eyes.append(Eye(self))
        self.settle()

    def finish(self):
        self.settle()
        for eye in self.away:
            eye.open()
        self.eyes += self.away
        for eye in self.eyes:
            eye.viewer.hurry()
            eye.options = {}
        self.settle()
        self.check_plain()
        for eye in self.eyes:
            eye.check()

    def clear(self):
        for eye in self.eyes + self.away:
            eye.viewer.close()
        for viewer, *_ in self.plain:
            viewer.close()
        if self.server:
            self.server.stop()


def play(seed, folder, story=lambda scene: scene.happen(STEPS)):
    """One seed; an AssertionError says how to repeat it."""
    scene = Scene(seed, folder)
    try:
        scene.begin()
        story(scene)
        scene.finish()
        scene.server.check()
    except BaseException as error:
        recent = " ".join(scene.done[-12:])
        raise AssertionError(
            f"{error}\nafter {recent}\nrepeat: python3 tests/test_random.py {seed}"
        ) from error
    finally:
        scene.clear()


# what seeds have found, each with the fewest steps that show it


def rotated_and_packed_in_one_look(scene):
    scene.stand_still(scene.rename, scene.copytruncate, scene.pack_newest)


def rotated_and_packed_while_no_server_runs(scene):
    scene.rename()
    scene.settle()
    scene.restart(scene.copytruncate, scene.pack_newest)


def packed_before_a_viewer_comes_back(scene):
    scene.join()
    scene.leave()
    for _ in range(2):
        scene.rename()
        scene.settle()
    scene.restart(scene.append)
    scene.pack_all()
    scene.rename()
    scene.settle()
    scene.pack_all()
    scene.come_back()


def replaced_written_and_renamed_in_one_look(scene):
    scene.stand_still(scene.append, scene.replace_unseen, scene.append, scene.rename)


def rotated_twelve_times_in_half_a_minute(scene):
    scene.join()
    for _ in range(12):
        scene.rename()
        scene.settle()
    scene.leave()
    scene.come_back()


STORIES = [
    rotated_and_packed_in_one_look,
    rotated_and_packed_while_no_server_runs,
    packed_before_a_viewer_comes_back,
    replaced_written_and_renamed_in_one_look,
    rotated_twelve_times_in_half_a_minute,
]


@pytest.mark.parametrize("story", STORIES)
def test_nothing_is_lost_nor_repeated_when(story, tmp_path):
    play(0, tmp_path, story)


@pytest.mark.parametrize("seed", [4, 7, 8, 12])
def test_joined_text_is_written_text_or_a_seam_stands_there(seed, tmp_path):
    play(seed, tmp_path)


def main(first, last=None):
    failed = []
    for seed in range(int(first), int(last or first) + 1):
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                play(seed, Path(folder))
            except AssertionError:
                failed.append(seed)
                traceback.print_exc()
        print(f"seed {seed}: {time.monotonic() - begun:.1f} s", flush=True)
    print(f"failed: {failed or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
