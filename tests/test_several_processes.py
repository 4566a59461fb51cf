"""Tests that are shared by processes: one that is skipped or fails there is told like any other."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
WAITS = """
import os, pathlib, time, pytest

def test_it():
    here = pathlib.Path(__file__).parent / "processes"
    (here / str(os.getpid())).touch()
    ends = time.monotonic() + 20
    while len(list(here.iterdir())) < 3:
        assert time.monotonic() < ends, "only one process takes tests"
        time.sleep(0.01)
"""
SKIPPED = f"{WAITS}    pytest.skip('no such program here')\n"
FAILED = f"{WAITS}    assert 1 + 1 == 3\n"


def test_what_another_process_skips_or_fails_is_in_the_summary(tmp_path):
    """Each of three processes gets hold of at least one test; one of them runs this summary."""
    (tmp_path / "processes").mkdir()
    (tmp_path / "conftest.py").write_text("from several_processes import pytest_runtestloop\n")
    for number in range(6):
        (tmp_path / f"test_{number}.py").write_text(SKIPPED if number % 2 else FAILED)
    variables = os.environ | {"PYTHONPATH": str(HERE), "AUDIT_STREAM_TESTS": "3"}
    variables.pop("TESTS_SHARED_IN", None)

    command = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", tmp_path]
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "3 failed, 3 skipped" in done.stdout, done.stdout
    assert done.stdout.count("FAILED test_") == done.stdout.count("no such program here") == 3
