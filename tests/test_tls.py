"""TLS: which versions, certificates that are renewed, certificates that cannot be used."""

import contextlib
import functools
import http.client
import http.server
import os
import pty
import re
import shutil
import signal
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from harness import (
    FIRST,
    OTHER,
    RIGHT,
    SCRIPT,
    TOKEN,
    add,
    append,
    cookie_of,
    environment,
    eventually,
    policy_of,
    said_by,
)
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect


def openssl(*arguments):
    return subprocess.run(
        ["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=20
    ).stdout


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """The files NAME.cert and NAME.key of two certificates, in one folder."""
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("first", "second"):
        kind = (
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            2,
            "-subj",
            f"/CN={name}",
        )
        names = ("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
        files = ("-keyout", folder / f"{name}.key", "-out", folder / f"{name}.cert")
        openssl("req", "-x509", *kind, *names, *files)
    openssl(
        "ec",
        "-in",
        folder / "first.key",
        "-aes256",
        "-passout",
        "pass:example",
        "-out",
        folder / "locked.key",
    )
    (folder / "garbage").write_bytes(b"no certificate\n" * 10)
    return folder


@pytest.fixture
def tls_files(certificates, tmp_path):
    """A certificate and a key that a test may replace."""
    return [
        Path(shutil.copy(certificates / f"first.{kind}", tmp_path / kind))
        for kind in ("cert", "key")
    ]


@pytest.fixture
def encrypted(serve, log, tls_files, secret):
    append(log, FIRST)
    cert, key = tls_files
    return serve(log, "--tls-cert", cert, "--tls-key", key, "--token-file", secret)


def trusting(folder, name="first"):
    return ssl.create_default_context(cafile=folder / f"{name}.cert")


def https(server, context, path="/", **headers):
    connection = http.client.HTTPSConnection("127.0.0.1", server.port, timeout=15, context=context)
    with contextlib.closing(connection):
        connection.request(
            "GET", path, headers={name.replace("_", "-"): text for name, text in headers.items()}
        )
        answer = connection.getresponse()
        answer.read()
        return answer.status, answer.headers


def shown(server):
    """The certificate that the server shows now."""
    pem = ssl.get_server_certificate(("127.0.0.1", server.port), timeout=15)
    return pem.replace("\r", "").strip()


def test_tls_is_1_2_or_newer(encrypted, certificates):
    address = f"127.0.0.1:{encrypted.port}"
    client = ["openssl", "s_client", "-connect", address, "-cipher", "DEFAULT@SECLEVEL=0"]

    tries = [
        subprocess.run([*client, f"-{version}"], input=b"", capture_output=True, timeout=15)
        for version in ("tls1", "tls1_1", "tls1_2", "tls1_3")
    ]

    assert encrypted.url == f"https://{address}/"
    assert [each.returncode for each in tries] == [1, 1, 0, 0]
    assert not any(
        b"no protocols available" in each.stderr for each in tries
    )  # the client would have
    assert encrypted.raw(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").find(b" 200 ") == -1
    assert https(encrypted, trusting(certificates), Authorization=RIGHT)[0] == 200


def test_under_tls_everything_is_for_tls_only(encrypted, certificates):
    context = trusting(certificates)
    own = f"https://127.0.0.1:{encrypted.port}"

    answers = [
        https(encrypted, context, path) for path in (f"/?token={TOKEN}", "/", "/other", "/ws/audit")
    ]
    pair, attributes = cookie_of(answers[0][1])
    websocket = functools.partial(
        connect, f"wss://127.0.0.1:{encrypted.port}/ws/audit", ssl=context
    )
    with websocket(additional_headers={"Cookie": pair}, origin=own) as viewer:
        first = viewer.recv(timeout=10)
    with pytest.raises(InvalidStatus) as refused:
        websocket(additional_headers={"Cookie": pair}, origin=own.replace("https", "http"))

    assert attributes == {"HttpOnly", "SameSite=Lax", "Path=/", "Secure"}
    for code, headers in answers:
        (transport,) = headers.get_all("Strict-Transport-Security")
        assert int(re.search(r"max-age=(\d+)", transport)[1]) > 0, code
        assert f"wss://127.0.0.1:{encrypted.port}" in policy_of(headers)["connect-src"]
    assert FIRST.endswith(first) and refused.value.response.status_code == 403


def test_a_renewed_certificate_is_taken_up_on_sighup(encrypted, certificates, tls_files):
    pem = {
        name: (certificates / f"{name}.cert").read_text().strip() for name in ("first", "second")
    }
    before = shown(encrypted)
    context = trusting(certificates)
    headers = {"Authorization": RIGHT}

    with connect(
        f"wss://127.0.0.1:{encrypted.port}/ws/audit", ssl=context, additional_headers=headers
    ) as viewer:
        viewer.recv(timeout=10)
        for file, kind in zip(tls_files, ("cert", "key"), strict=True):
            shutil.copy(certificates / f"second.{kind}", file)
        encrypted.process.send_signal(signal.SIGHUP)
        eventually(lambda: shown(encrypted) == pem["second"])
        added = add(encrypted.log, "still here")

        assert before == pem["first"]
        assert viewer.recv(timeout=10) == added
        assert https(encrypted, trusting(certificates, "second"), **headers)[0] == 200


SPOILED = {
    "mismatch": ("second.cert", "first.key"),
    "other key": ("first.cert", "second.key"),
    "garbage certificate": ("garbage", "first.key"),
    "garbage key": ("first.cert", "garbage"),
    "no certificate": (None, "first.key"),
    "no key": ("first.cert", None),
    "encrypted key": ("first.cert", "locked.key"),
    "only a key": ("first.key", "first.key"),
}


def test_files_that_do_not_load_leave_the_certificate_as_it_is(encrypted, certificates, tls_files):
    context = trusting(certificates)

    for name, files in SPOILED.items():
        said = len(said_by(encrypted))
        for target, source in zip(tls_files, files, strict=True):
            target.unlink(missing_ok=True)
            if source:
                shutil.copy(certificates / source, target)
        encrypted.process.send_signal(signal.SIGHUP)
        words = eventually(
            lambda said=said: said_by(encrypted)[said:], message=f"not a word about {name}"
        )

        assert len(words.splitlines()) == 1 and any(str(file) in words for file in tls_files), (
            name,
            words,
        )
        assert https(encrypted, context, Authorization=RIGHT)[0] == 200, name


def test_a_bad_certificate_does_not_keep_an_old_token_valid(
    encrypted, certificates, tls_files, secret
):
    context = trusting(certificates)
    shutil.copy(certificates / "garbage", tls_files[0])
    secret.write_text(OTHER)

    encrypted.process.send_signal(signal.SIGHUP)

    eventually(
        lambda: https(encrypted, context, Authorization=RIGHT)[0] == 401,
        message="the old token still opens",
    )
    assert https(encrypted, context, Authorization=f"Bearer {OTHER}")[0] == 200


@pytest.mark.parametrize("files", SPOILED.values(), ids=SPOILED)
def test_a_certificate_that_cannot_be_used_is_one_clear_line(files, certificates, log):
    cert, key = (certificates / (name or "nowhere") for name in files)
    master, slave = pty.openpty()
    try:
        terminal = [
            "setsid",
            "--ctty",
            "--wait",
            sys.executable,
            str(SCRIPT),
            "--log",
            str(log),
            "--port",
            "0",
        ]
        command = [*terminal, "--tls-cert", str(cert), "--tls-key", str(key)]

        finished = subprocess.run(
            command, stdin=slave, capture_output=True, text=True, timeout=20, env=environment()
        )

        os.set_blocking(master, False)
        with pytest.raises(BlockingIOError):  # nobody was asked for a pass phrase
            os.read(master, 100)
    finally:
        os.close(master)
        os.close(slave)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert len(finished.stderr.splitlines()) == 1 and "Traceback" not in finished.stderr
    assert str(cert) in finished.stderr or str(key) in finished.stderr
