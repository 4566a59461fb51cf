"""NGINX in front of servers, with the configuration of the README."""

import contextlib
import copy
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from browsers import unavailable
from harness import ROOT, Server, eventually, free_port

BELOW = "/logs/audit"
CONFIGURATION = """
daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1; {user} {files}
events {{ {connections} }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {site}
}}
"""


def configuration_of_the_readme(
    folder: Path, port: int, places: dict[str, list[int]], replace: tuple[str, str]
) -> str:
    """Return what the README says, for these {path: ports} in place of its own."""
    text = (ROOT / "README.md").read_text()
    connections, files = re.findall(r"`(worker_\w+ \d+;)`", text)
    (site,) = re.findall(r"```nginx\n(.*?)```", text, re.DOTALL)
    (upstream,) = re.findall(r"upstream audit \{.*?\n\}\n", site, re.DOTALL)
    (location,) = re.findall(r" +location /audit/ \{.*?\n    \}\n", site, re.DOTALL)
    (option,) = re.findall(r"\n    server \S+(.*?;)", upstream)

    upstreams = locations = ""
    for number, (path, ports) in enumerate(places.items()):
        servers = "".join(f"server 127.0.0.1:{each}{option}" for each in ports)
        upstreams += f"upstream audit{number} {{ {servers} }}\n"
        there = location.replace("location /audit/", f"location {path}/").replace(*replace)
        locations += there.replace("http://audit/", f"http://audit{number}/")

    site = site.replace(upstream, upstreams).replace(location, locations)
    site = site.replace("listen 443 ssl", f"listen 127.0.0.1:{port}")
    site = site.replace("/var/log/nginx/access.log", str(folder / "access.log"))
    user = "user root;" if os.geteuid() == 0 else ""
    return CONFIGURATION.format(
        folder=folder, user=user, files=files, connections=connections, site=site
    )


@contextlib.contextmanager
def nginx_before(
    folder: Path, places: dict[str, list[Server]], replace: tuple[str, str] = ("", "")
) -> Iterator[Callable[[str], Server]]:
    """Start NGINX, with something else in each location if that is asked for.

    What it yields is the first server of a path, as one reaches it through NGINX.
    """
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if not program:
        unavailable("nginx is not installed")
    ports = {path: [server.port for server in servers] for path, servers in places.items()}
    file, port = folder / "nginx.conf", free_port()
    file.write_text(configuration_of_the_readme(folder, port, ports, replace))

    def behind(path: str) -> Server:
        server = copy.copy(places[path][0])
        server.port = port
        server.url = f"http://127.0.0.1:{port}{path}/"
        server.ws = f"ws://127.0.0.1:{port}{path}/ws/audit"
        return server

    command = [program, "-e", str(folder / "error.log"), "-c", str(file)]
    process = subprocess.Popen(command)
    try:
        eventually(behind(next(iter(places))).listens)
        yield behind
    finally:
        process.terminate()
        process.wait(10)
