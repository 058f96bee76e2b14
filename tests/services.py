"""Real servers for tests. Each is started on first use, private to this process of the suite, and stopped with the
process."""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def missing(what: str) -> None:
    """Skip a test because a program is not installed.

    If the suite must be complete (SUMUS_REQUIRE_SERVICES), the test fails instead, unless CI has tried in vain to
    install the program (SUMUS_CANNOT_INSTALL).

    Args:
        what: The program's name, and how a person installs it.
    """
    in_vain = any(program in what.lower() for program in os.environ.get("SUMUS_CANNOT_INSTALL", "").split())
    if os.environ.get("SUMUS_REQUIRE_SERVICES") and not in_vain:
        pytest.fail(f"{what} is not installed, and SUMUS_REQUIRE_SERVICES is set")
    pytest.skip(f"{what} is not installed{', and cannot be' if in_vain else ''}")


def _programs() -> Path | None:
    """Return the folder of PostgreSQL's programs. Debian does not put them into PATH."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """Start a new PostgreSQL that listens on a socket in a folder of its own; yield its URL for SQLAlchemy."""
    programs = _programs()
    if programs is None:
        missing("PostgreSQL (Debian: apt-get install postgresql)")
        return
    folder = Path(tempfile.mkdtemp(prefix="sumus-pg-"))
    who: dict[str, Any] = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        shutil.chown(folder, "postgres", "postgres")
        who = {"user": "postgres", "group": "postgres", "extra_groups": []}

    def run(program: str, *arguments: str) -> None:
        command = [str(programs / program), "-D", f"{folder}/data", *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120, **who)
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"

    try:
        run("initdb", "-U", "sumus", "-A", "trust", "-E", "UTF8", "--no-sync")
        options = f"-k {folder} -c listen_addresses='' -c max_connections=40 -c shared_buffers=16MB"
        run("pg_ctl", "-w", "-l", f"{folder}/log", "-o", options, "start")
        try:
            yield f"postgresql+psycopg://sumus@/postgres?host={folder}"
        finally:
            run("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def nginx(server: str, folder: Path) -> Iterator[Path]:
    """Start an nginx with one `server` block; yield its log of errors and warnings. folder: for all files that it
    writes."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        missing("nginx (Debian: apt-get install nginx)")
        return
    log = folder / "error.log"
    temporary = "\n".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {log} info;\n"
        f"events {{}}\nhttp {{ access_log off;\n{temporary}\n{server}\n}}\n"
    )
    command = [program, "-p", str(folder), "-e", str(log), "-c", str(folder / "nginx.conf")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 30
        while not (folder / "pid").exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until
            time.sleep(0.02)
        yield log
    finally:
        process.kill()
        process.wait()


def at_another_time(offset: str) -> list[str]:
    """Return the words before a command that set its clock wrong. offset: such as `-3h`, or a moment. Durations are not
    changed."""
    if shutil.which("faketime") is None:
        missing("faketime (Debian: apt-get install faketime)")
    return ["env", "FAKETIME_DONT_FAKE_MONOTONIC=1", "faketime", "-f", offset]


@contextlib.contextmanager
def pgbouncer(url: str, mode: str = "transaction", size: int = 20) -> Iterator[str]:
    """Start a PgBouncer before a server of `postgresql`; yield the URL of the same database behind it.

    Args:
        url: The database's URL, as `postgresql` yields it.
        mode: When a connection of PostgreSQL may serve another client: session, transaction or statement.
        size: The most connections to PostgreSQL.
    """
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        missing("PgBouncer (Debian: apt-get install pgbouncer)")
        return
    folder = Path(tempfile.mkdtemp(prefix="sumus-pool-"))
    (folder / "pool.ini").write_text(
        f"[databases]\n* = host={url.rpartition('host=')[2]} user=sumus\n[pgbouncer]\n"
        f"unix_socket_dir = {folder}\nauth_type = any\npool_mode = {mode}\ndefault_pool_size = {size}\n"
        f"max_client_conn = 200\nlogfile = {folder}/log\npidfile = {folder}/pid\n"
    )
    who: dict[str, Any] = {}
    if os.geteuid() == 0:  # PgBouncer refuses to run as root
        for path in (folder, folder / "pool.ini"):
            shutil.chown(path, "postgres", "postgres")
        who = {"user": "postgres", "group": "postgres", "extra_groups": []}
    process = subprocess.Popen(
        [program, "-q", str(folder / "pool.ini")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **who
    )
    try:
        until = time.monotonic() + 30
        while not (folder / ".s.PGSQL.6432").exists():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.02)
        yield f"{url.partition('?')[0]}?host={folder}&port=6432"
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def restart_postgresql(url: str) -> None:
    """Kill and restart a server of `postgresql`. All connections end, and what was not committed is lost."""
    programs, folder = _programs(), Path(url.rpartition("host=")[2])
    assert programs is not None
    who: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    command = [
        str(programs / "pg_ctl"),
        "-D",
        f"{folder}/data",
        "-w",
        "-m",
        "immediate",
        "-l",
        f"{folder}/log",
        "restart",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120, **who)
    assert done.returncode == 0, f"pg_ctl: {done.stdout}{done.stderr}"
