"""A quick selection of tests/rotators.py: real programs rotate the log, each line comes once."""

import concurrent.futures

import pytest
from rotating_programs import SETUPS, have
from rotators import run_one

QUICK = [
    ("logrotate-compress", "stop"),
    ("logrotate-xz", "kill"),
    ("logrotate-olddir", "stop"),
    ("python-timed-log", "blind"),
    ("svlogd", "stop"),
    ("rsyslog-outchannel", "kill"),
]


def test_each_line_of_a_rotating_program_comes_once_or_its_absence_is_told(tmp_path):
    runs = [(name, way) for name, way in QUICK if not have(SETUPS[name], tmp_path)]
    if not runs:
        pytest.skip("none of these programs is here")
    with concurrent.futures.ThreadPoolExecutor(len(runs)) as pool:
        results = dict(zip(runs, pool.map(lambda run: run_one(*run, tmp_path), runs), strict=True))

    assert not {run: each for run, each in results.items() if "WRONG" in str(each)}
