"""Calls about one folder that fail, or stop the process, in a server that runs under a shim."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "writers" / "shim.c"


def build_shim(folder: Path) -> Path | None:
    """Compile the library; None without a compiler."""
    library, compiler = folder / "shim.so", shutil.which("cc")
    if not compiler:
        return None
    if not library.exists():
        command = [compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"]
        subprocess.run(command, check=True)
    return library


class Faults:
    """What fails from now on, of the calls of a server that has these variables."""

    def __init__(self, shim: Path, logs: Path, control: Path) -> None:
        self.control = control
        self.variables = {
            "SHIM_CONTROL": str(control),
            "SHIM_FOLDER": os.path.realpath(logs),
            "LD_PRELOAD": str(shim),
        }
        control.touch()
        self.nothing()

    def happen(
        self,
        reads: int = 0,
        of: int = errno.EIO,
        short: int = 0,
        opens: int = 0,
        because: int = errno.ENFILE,
        stats: int = 0,
        stop_at: int = 0,
    ) -> None:
        """Of 1000 calls so many; and the process stops at one of the next calls."""
        text = f"{reads} {of} {short} {opens} {because} {stats} {stop_at}\n".ljust(100)
        with open(self.control, "r+b", buffering=0) as file:
            file.write(text.encode())

    def nothing(self) -> None:
        self.happen()
