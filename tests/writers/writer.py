"""A program that logs each line of its standard input: writer.py HOW LOG"""

import gzip
import logging
import logging.handlers
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator

KEPT = 30
MOST = 24_000  # bytes of a file that rotates by its size: about a second's lines
BY_THE_SECOND = {"when": "S", "backupCount": KEPT}
Write = Callable[[bytes], object]


def by_signal(path: str) -> Iterator[bytes]:
    """The file is opened again before the next line after SIGUSR1."""
    asked = []
    signal.signal(signal.SIGUSR1, lambda *_: asked.append(True))
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    with open(path + ".pid", "w") as pid:
        pid.write(str(os.getpid()))
    while line := (yield b""):
        if asked:
            asked.clear()
            os.close(file)
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(file, line)


def started(generator: Iterator[bytes]) -> Write:
    next(generator)
    return generator.send  # type: ignore[attr-defined,no-any-return]


def each_time(path: str) -> Write:
    def write(line: bytes) -> None:
        with open(path, "ab", buffering=0) as file:
            file.write(line)

    return write


def for_ever(path: str) -> Write:
    return open(path, "ab", buffering=0).write


def at_its_own_offset(path: str) -> Write:
    """Without O_APPEND: after a cut the next line leaves a hole before it."""
    return open(path, "wb", buffering=0).write


def to_socket(path: str) -> Write:
    client = socket.socket(socket.AF_UNIX)
    while True:
        try:
            client.connect(path + ".socket")
            return client.sendall
        except OSError:
            time.sleep(0.05)


def by_handler(handler: logging.Handler) -> Write:
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("writer")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    return lambda line: logger.info(line.decode().rstrip("\n"))


def rotating(path: str, kept: int = KEPT) -> Write:
    return by_handler(logging.handlers.RotatingFileHandler(path, maxBytes=MOST, backupCount=kept))


def timed(path: str) -> Write:
    return by_handler(logging.handlers.TimedRotatingFileHandler(path, **BY_THE_SECOND))


def pack(source: str, target: str) -> None:
    with open(source, "rb") as file, gzip.open(target, "wb") as packed:
        shutil.copyfileobj(file, packed)
    os.unlink(source)


def timed_gz(path: str) -> Write:
    handler = logging.handlers.TimedRotatingFileHandler(path, **BY_THE_SECOND)
    handler.namer, handler.rotator = "{}.gz".format, pack
    return by_handler(handler)


def timed_before_extension(path: str) -> Write:
    """AUDIT.DATE.log instead of AUDIT.log.DATE."""
    handler = logging.handlers.TimedRotatingFileHandler(path, **BY_THE_SECOND)
    handler.namer = lambda name: f"{os.path.splitext(path)[0]}{name.removeprefix(path)}.log"
    return by_handler(handler)


def watched(path: str) -> Write:
    return by_handler(logging.handlers.WatchedFileHandler(path))


def concurrent(path: str, **options: object) -> Write:
    from concurrent_log_handler import ConcurrentRotatingFileHandler

    return by_handler(ConcurrentRotatingFileHandler(path, "a", MOST, KEPT, **options))


def concurrent_timed(path: str) -> Write:
    from concurrent_log_handler import ConcurrentTimedRotatingFileHandler

    return by_handler(ConcurrentTimedRotatingFileHandler(path, **BY_THE_SECOND))


def by_loguru(path: str, **options: object) -> Write:
    from loguru import logger

    logger.remove()
    logger.add(path, rotation="24 KB", retention=KEPT, format="{message}", **options)
    return lambda line: logger.info(line.decode().rstrip("\n"))


WAYS: dict[str, Callable[[str], Write]] = {
    "signal": lambda path: started(by_signal(path)),
    "each": each_time,
    "never": for_ever,
    "offset": at_its_own_offset,
    "socket": to_socket,
    "rotating": rotating,
    "rotating-one": lambda path: rotating(path, kept=1),
    "timed": timed,
    "timed-gz": timed_gz,
    "timed-log": timed_before_extension,
    "watched": watched,
    "concurrent": concurrent,
    "concurrent-gz": lambda path: concurrent(path, use_gzip=True),
    "concurrent-timed": concurrent_timed,
    "loguru": by_loguru,
    "loguru-gz": lambda path: by_loguru(path, compression="gz"),
}


def main(how: str, path: str) -> None:
    write = WAYS[how](path)
    for line in iter(sys.stdin.buffer.readline, b""):
        write(line)
    logging.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
