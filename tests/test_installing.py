"""Started from anywhere, by anything: it works, or says in one line what to do."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import zipapp
from pathlib import Path

import pytest
from browsers import unavailable
from harness import ROOT, SCRIPT, append, environment, eventually, lines, run


def started(command, **variables):
    """The page's status, of a server that this command starts."""
    process = subprocess.Popen(
        [*map(str, command), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**variables),
    )
    with process:
        url = process.stdout.readline().strip()
        assert url, process.stderr.read()
        page = subprocess.run(
            [sys.executable, "-c", f"import urllib.request as u; print(u.urlopen('{url}').status)"],
            capture_output=True,
            text=True,
            timeout=20,
        )
        process.terminate()
    assert process.returncode == 0
    return page.stdout.strip()


def refused(command, **variables):
    """The exit code and the one line of a start that fails."""
    finished = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        timeout=20,
        env=environment(**variables),
    )
    assert finished.stdout == "" and len(finished.stderr.splitlines()) == 1, finished.stderr
    return finished.returncode, finished.stderr


def test_through_a_symbolic_link_it_finds_its_page(tmp_path, log):
    link, again = tmp_path / "audit-stream", tmp_path / "again"
    link.symlink_to(SCRIPT)
    again.symlink_to("audit-stream")

    for path in (link, again):
        assert started([sys.executable, path, "--log", log]) == "200"


def test_the_script_runs_by_its_shebang(tmp_path, log):
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)

    assert os.access(SCRIPT, os.X_OK)
    assert started([SCRIPT, "--log", log], PATH=f"{tmp_path}:{os.environ['PATH']}") == "200"


@pytest.mark.parametrize("version", [(3, 8), (3, 10)], ids=str)
def test_too_old_a_python_is_named(version, tmp_path, log):
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.version_info = {(*version, 1)}\nsys.version = '3.x.1 (old)'\n"
    )

    code, said = refused([sys.executable, SCRIPT, "--log", log], PYTHONPATH=str(tmp_path))

    assert code == 1 and "Python 3.11 or newer" in said and "3.x.1" in said


def test_a_zipapp_says_that_copying_is_the_way(tmp_path, log):
    source, archive = tmp_path / "source", tmp_path / "a.pyz"
    source.mkdir()
    shutil.copy(SCRIPT, source / "__main__.py")
    shutil.copytree(ROOT / "static", source / "static")
    zipapp.create_archive(source, archive)

    code, said = refused([sys.executable, archive, "--log", log])

    assert code == 1 and "copy audit_stream.py and the folder static" in said


def test_without_its_page_it_says_what_to_copy(tmp_path, log):
    alone = shutil.copy(SCRIPT, tmp_path / "audit_stream.py")

    code, said = refused([sys.executable, alone, "--log", log])

    assert code == 1 and str(tmp_path / "static") in said and "copy" in said


def test_pip_installs_a_command_that_works(tmp_path, log):
    """What pip and uv would put into a folder of packages."""
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=lambda _, names: {name for name in names if name.startswith(".")}
    )
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
    target = tmp_path / "packages"

    finished = subprocess.run(
        [*command, "--target", str(target), str(source)], capture_output=True, timeout=120
    )

    if b"No matching distribution" in finished.stderr:
        unavailable("pip reaches no index from which it could have setuptools")
    assert finished.returncode == 0, finished.stderr
    assert (target / "bin" / "audit-stream").is_file()
    path = os.pathsep.join([str(target), *sys.path])
    assert started([sys.executable, "-m", "audit_stream", "--log", log], PYTHONPATH=path) == "200"


def test_a_demo_without_a_temporary_folder_is_one_clear_line(tmp_path):
    # Python runs a module of this name before the script.
    (tmp_path / "sitecustomize.py").write_text(
        "import tempfile\n\n"
        "def nowhere(*_):\n"
        "    raise FileNotFoundError(2, 'No usable temporary directory found')\n\n"
        "tempfile.mkdtemp = nowhere\n"
    )

    command = [sys.executable, SCRIPT, "--demo", "--port", "0"]
    code, said = refused(command, PYTHONPATH=str(tmp_path))

    assert code == 1 and "--demo" in said and "temporary directory" in said


# --append


def test_append_waits_for_no_lock_for_ever(log):
    append(log, lines(1))
    with open(log) as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)

        finished = run("--log", log, "--append", "an entry")

    assert finished.returncode == 1 and len(finished.stderr.splitlines()) == 1
    assert "lock" in finished.stderr and str(log) in finished.stderr
    assert log.read_text() == lines(1)


def test_append_does_not_create_what_a_link_points_at(log, tmp_path):
    log.symlink_to(tmp_path / "elsewhere")

    refusal = run("--log", log, "--append", "an entry")
    (tmp_path / "elsewhere").touch()
    accepted = run("--log", log, "--append", "an entry")

    assert refusal.returncode == 1 and accepted.returncode == 0
    assert (tmp_path / "elsewhere").read_text().endswith("] an entry\n")


# options


@pytest.mark.parametrize("zone", ["UTC", "Z", "+01:00", "-0330", "-05:00", "Europe/Berlin"])
def test_time_zones_that_are_taken(zone, serve, log):
    append(log, lines(1))

    server = serve(log, "--zone", zone)

    assert server.get("/healthz")[0] == 200


@pytest.mark.parametrize(
    "options",
    [
        *(
            ("--zone", zone)
            for zone in ("", "Mars", "+25:00", "-25:00", "+01:60", "Europe", "../etc/passwd")
        ),
        *(("--anchor", value) for value in ("-1", "nan", "1e9", "x")),
        *(("--expect-every", value) for value in ("0", "-3", "x")),
        *(("--port", value) for value in ("+1", " 1", "1_0", "１")),
    ],
    ids=" ".join,
)
def test_a_bad_value_of_an_option_is_one_clear_line(options, log):
    finished = run("--log", log, *options)

    assert finished.returncode == 2 and len(finished.stderr.splitlines()) == 1
    assert options[0] in finished.stderr


def test_a_log_that_is_silent_for_too_long_is_an_alarm(serve, log):
    append(log, lines(1))
    server = serve(log, "--expect-every", 0.5)

    eventually(lambda: "<3>" in server.errors(), 5)
    append(log, lines(1))
    eventually(lambda: "no longer silent" in server.errors(), 5)
    metrics = server.get("/metrics")[2].decode()

    assert server.errors().startswith("<3>audit_stream: the log has been silent")
    assert server.get("/healthz")[0] == 200
    assert re.search(r"^audit_stream_silences_total [1-9]", metrics, re.MULTILINE)
    assert "# HELP audit_stream_silent_seconds " in metrics


def test_every_metric_has_help_and_type(serve, log):
    append(log, lines(1))
    server = serve(log)
    server.get("/other")

    text = server.get("/metrics")[2].decode()

    families = {line.partition("{")[0].split()[0] for line in text.splitlines() if line[0] != "#"}
    for family in families:
        assert re.search(rf"^# HELP {family} [A-Z].*\.\n# TYPE {family} \w+\n{family}", text, re.M)
    assert Path(SCRIPT).read_text().count("# HELP") == 1
