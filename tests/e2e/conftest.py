"""Fixtures: the real thing, in processes of its own.

    emulator    the Gemini emulator (tests/emulator), one for all tests, reset before each
    tls_front   an nginx with TLS and HTTP/2 before the emulator, which closes connections often
    stack       an nginx and a pool of one process with quick retries; made once for each module
    make_stack  the same with settings of the test's own, ended with the test

A stack is a directory with nginx, a unix socket, spawn-fcgi, multiwatch, N processes and a store. When it
ends, its processes must have ended too, neither a sanitizer nor an unexpected line may stand on its standard
error, and none of its API keys and client keys in any file or table that is not the keys' own. What it answers
and what extractctl says is searched for them at once.

The store is the embedded one; with EXTRACT_TEST_STORE=mssql all of it runs over tests/tds_server instead, or over the
live server that MSSQL_SERVER, MSSQL_USER and MSSQL_PASSWORD_FILE name (MSSQL_ENCRYPT and MSSQL_CA_FILE where needed), each
stack in a database of its own. A live server is reached through a relay on localhost, which can be cut: with MSSQL_CA_FILE
its certificate must be for localhost too (else MSSQL_ENCRYPT=request alone, and it is not checked). Nothing is skipped: what only
one store has stands in a module of its own, which is not collected where there is no such store.
"""
from __future__ import annotations

import dataclasses
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("BUILD", ROOT / "build")).resolve()
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin") or "nginx"
sys.path[:0] = [str(ROOT / "tests" / name) for name in ("emulator", "samples", "tds_server")]

import openapi  # noqa: E402
from relay import Relay  # noqa: E402
from tds import Closed  # noqa: E402
from tds_client import Connection, SqlError  # noqa: E402
from tds_process import TdsServer, free_port  # noqa: E402

# Taken out: the programs refuse variables of theirs that they do not know. The other name is for pytest's own processes.
TEST_STORE = os.environ.pop("EXTRACT_TEST_STORE", os.environ.get("TEST_STORE", "sqlite"))
os.environ["TEST_STORE"] = TEST_STORE
IS_LIVE = bool(os.environ.get("MSSQL_SERVER"))
PATIENCE = 120.0 if IS_LIVE else 30.0  # seconds: an upper bound for what must happen, never a delay

# Modules of what is not everywhere: the embedded store's file; a server that runs T-SQL, that may be stopped; its ownership
# chaining.
collect_ignore = [name for name, is_there in (
    ("test_embedded.py", TEST_STORE == "sqlite"),
    ("test_mssql_live.py", IS_LIVE),
    ("test_mssql_restart.py", IS_LIVE and "MSSQL_STOP" in os.environ and "MSSQL_START" in os.environ),
    ("test_mssql_rights.py", IS_LIVE and os.environ.get("MSSQL_RIGHTS") != "no")) if not is_there]

# Quick retries for tests; what a test is about it sets itself.
QUICK = {
    "EXTRACT_AUTH_MODE": "none",
    "EXTRACT_SERVER_THREADS": "8",
    "EXTRACT_RETRY_INITIAL_DELAY": "0.02",
    "EXTRACT_RETRY_MAX_DELAY": "0.2",
}


def eventually(probe: Callable[[], Any], what: str = "") -> Any:
    """Asks until the answer is true; its last answer."""
    end = time.monotonic() + PATIENCE
    while not (answer := probe()):
        assert time.monotonic() < end, f"never came true: {what or probe}"
        time.sleep(0.01)
    return answer


# ---- the emulator ----


class Emulator:
    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def _call(self, method: str, path: str, body: Any = None, timeout: float = PATIENCE + 10) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/__emulator/{path}", data=data, method=method)
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)

    def reset(self) -> None:
        self._call("POST", "reset", {})

    def script(self, key: str, *steps: dict[str, Any], repeat: bool = False) -> None:
        """The next calls with this API key play these steps (tests/emulator/README.md)."""
        self._call("POST", "script", {"key": key, "steps": list(steps), "repeat": repeat})

    def scenario(self, key: str, name: str, repeat: bool = False) -> None:
        self._call("POST", "script", {"key": key, "scenario": name, "repeat": repeat})

    def log(self) -> list[dict[str, Any]]:
        return self._call("GET", "log")

    def wait(self, **counts: int) -> dict[str, int]:
        """Until so many calls were received (calls=), are held (held=), have ended (finished=)."""
        query = "&".join(f"{k}={v}" for k, v in counts.items())
        return self._call("GET", f"wait?{query}&timeout={PATIENCE}")

    def release(self, count: int | None = None) -> None:
        self._call("POST", "release", {"count": count})


@pytest.fixture(scope="session")
def _emulator() -> Iterator[Emulator]:
    process = subprocess.Popen(
        ["/usr/bin/python3", str(ROOT / "tests/emulator/gemini_emulator.py"), "--listen", "127.0.0.1:0"],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert process.stdout is not None
    line = process.stdout.readline()
    yield Emulator(int(line.rsplit(":", 1)[1]))
    process.terminate()
    process.wait(PATIENCE)


@pytest.fixture
def emulator(_emulator: Emulator) -> Emulator:
    _emulator.reset()
    return _emulator


# ---- certificates and nginx ----


def make_certificate(directory: Path) -> None:
    """cert.pem and key.pem for localhost, signed by itself."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=directory, check=True, capture_output=True)


@pytest.fixture(scope="session")
def certificate() -> Iterator[Path]:
    """A directory with cert.pem and key.pem for localhost."""
    directory = Path(tempfile.mkdtemp(prefix="extract-tls-"))
    make_certificate(directory)
    yield directory
    shutil.rmtree(directory)


def start_nginx(directory: Path, template: Path, **values: object) -> subprocess.Popen[bytes]:
    text = template.read_text()
    for name, value in values.items():
        text = text.replace(f"@{name}@", str(value))
    (directory / "nginx.conf").write_text(text)
    return subprocess.Popen([NGINX, "-e", str(directory / "error.log"), "-p", str(directory), "-c",
                             str(directory / "nginx.conf")])


def listening(port: int) -> bool:
    with closing(socket.socket()) as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@dataclasses.dataclass
class TlsFront:
    url: str
    ca_file: Path


@pytest.fixture(scope="session")
def tls_front(_emulator: Emulator, certificate: Path) -> Iterator[TlsFront]:
    directory = Path(tempfile.mkdtemp(prefix="extract-front-"))
    directory.chmod(0o755)
    for name in ("cert.pem", "key.pem"):
        shutil.copy(certificate / name, directory)
    port = free_port()
    process = start_nginx(directory, ROOT / "tests/emulator/tls_front.conf.in", DIR=directory, PORT=port,
                          UPSTREAM=f"127.0.0.1:{_emulator.port}")
    eventually(lambda: listening(port), "the TLS front listens")
    yield TlsFront(f"https://localhost:{port}", certificate / "cert.pem")
    process.send_signal(signal.SIGQUIT)
    process.wait(PATIENCE)
    shutil.rmtree(directory)


# ---- SQL Server, live or tests/tds_server ----

# A live server may plan each procedure when a session calls it first: none is given up sooner than this, and whoever waits
# for it in the queue waits, too. Tests that want a call to be given up get that from store_away.
LIVE_QUERY_TIMEOUT = os.environ.get("MSSQL_QUERY_TIMEOUT", "20s")


def seconds(duration: str) -> float:
    """Of a setting: 200ms, 0.2s, 20s."""
    return float(duration[:-2]) / 1000 if duration.endswith("ms") else float(duration.removesuffix("s"))


# Said on standard error, since there is no table for it yet.
SETTING_UP = r"^\S+Z INFO store_mssql_\w+ \S+ \w+ setting up the schema"


def to_tsql(statement: str) -> str:
    """The few spellings of tests' statements that SQL Server has otherwise."""
    for old, new in ((r"\bIFNULL\(", "COALESCE("), (r"\bSUBSTR\(", "SUBSTRING("), (r"\?\d", "?"),
                     (r"STRFTIME\('%Y-%m-%dT%H:%M:%fZ', 'now', '\+0\.5 seconds'\)",
                      "DATEADD(MILLISECOND, 500, SYSUTCDATETIME())"),
                     (r"^ALTER TABLE (\w+) RENAME TO (\w+)$", r"EXEC sp_rename N'\1', N'\2', N'OBJECT'")):
        statement = re.sub(old, new, statement, flags=re.I)
    return statement


def unescaped(value: Any) -> Any:
    """A text that came by JSON and was stored with its escapes."""
    if isinstance(value, str) and "\\" in value:
        with suppress(ValueError):
            return json.loads(f'"{value}"', strict=False)
    return value


class SqlServer:
    """Databases for stacks, each of its own."""

    def __init__(self, address: str, user: str, password_file: Path, encrypt: str, ca_file: str,
                 tds: TdsServer | None = None) -> None:
        self.address, self.user, self.password_file, self.tds = address, user, password_file, tds
        self.settings = {"EXTRACT_STORE_DRIVER": "mssql", "EXTRACT_STORE_SERVER": address, "EXTRACT_STORE_USER": user,
                         "EXTRACT_STORE_PASSWORD_FILE": str(password_file), "EXTRACT_STORE_ENCRYPT": encrypt,
                         **({"EXTRACT_STORE_CA_FILE": ca_file} if ca_file else {})}
        self.databases: dict[Path, str] = {}
        self.sessions: dict[str, Connection] = {}
        self.lock = threading.RLock()

    @staticmethod
    def of(tds: TdsServer, encrypt: str = "require") -> SqlServer:
        port = tds.address.rpartition(":")[2]
        return SqlServer(f"localhost:{port}", "sa", tds.password_file, encrypt,
                         str(tds.directory / "tls/good.pem") if encrypt == "require" else "", tds)

    def connect(self, database: str = "") -> Connection:
        password = self.password_file.read_text().rstrip("\r\n")
        host, _, port = self.address.rpartition(":")
        return Connection(f"{host.replace('localhost', '127.0.0.1')}:{port}", self.user, password, database, PATIENCE)

    def database(self, directory: Path) -> str:
        """The database of a stack in this directory; made when first asked for."""
        with self.lock:
            if directory not in self.databases:
                name = f"extract_e2e_{uuid.uuid4().hex[:12]}"
                with closing(self.connect()) as connection:
                    connection.query(f"CREATE DATABASE {name}")
                self.databases[directory] = name
            return self.databases[directory]

    @cached_property
    def keeps_escapes(self) -> bool:
        """Does its OPENJSON give \\n as two characters? SQL Server's gives a line feed; a server that only resembles it may
        not, and then what is looked at here is taken for what SQL Server would have stored."""
        if self.tds is not None:
            return False
        with closing(self.connect()) as connection:
            return connection.query("SELECT value FROM OPENJSON(N'[\"\\n\"]')")[0][1] != [["\n"]]

    def sql(self, directory: Path, statement: str, *values: Any) -> list[dict[str, Any]]:
        rows = self._sql(directory, statement, *values)
        return [{n: unescaped(v) for n, v in row.items()} for row in rows] if self.keeps_escapes else rows

    def _sql(self, directory: Path, statement: str, *values: Any) -> list[dict[str, Any]]:
        name = self.database(directory)
        if re.search(r"\?\d", statement):  # numbered: each in its place
            values = tuple(values[int(n) - 1] for n in re.findall(r"\?(\d)", statement))
        with self.lock:
            for last in (False, True):
                if name not in self.sessions:
                    self.sessions[name] = self.connect(name)
                try:
                    return self.sessions[name].rows(to_tsql(statement), *values)
                except (Closed, OSError):
                    self.sessions.pop(name).close()
                    if last:
                        raise
        raise AssertionError

    def drop(self, directory: Path) -> None:
        with self.lock:
            name = self.databases.pop(directory, None)
            if name is None:
                return
            if name in self.sessions:
                self.sessions.pop(name).close()

        def dropped() -> bool:  # connections just closed may hold it for a moment
            with closing(self.connect()) as connection:
                try:
                    connection.query(f"DROP DATABASE {name}")
                    return True
                except SqlError:
                    return False

        eventually(dropped, f"{name} is dropped")

    def close(self) -> None:
        for directory in list(self.databases):
            self.drop(directory)


def live_server() -> SqlServer | None:
    """The server that the environment names."""
    address = os.environ.get("MSSQL_SERVER")
    if not address:
        return None
    ca_file = os.environ.get("MSSQL_CA_FILE", "")
    return SqlServer(address, os.environ["MSSQL_USER"], Path(os.environ["MSSQL_PASSWORD_FILE"]).resolve(),
                     os.environ.get("MSSQL_ENCRYPT") or ("require" if ca_file else "off"), ca_file)


def keeps_escapes() -> bool:
    """Does the live server not know what a backslash in JSON means? Not SQL Server."""
    server = live_server()
    return server is not None and server.keeps_escapes


@pytest.fixture
def live() -> Iterator[SqlServer]:
    """For the modules that are not collected without one."""
    server = live_server()
    assert server is not None
    yield server
    server.close()


@pytest.fixture(scope="session", autouse=True)
def _sql_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where stacks have their store when EXTRACT_TEST_STORE says so."""
    if TEST_STORE != "mssql":
        yield
        return
    tds = None if os.environ.get("MSSQL_SERVER") else TdsServer(tmp_path_factory.mktemp("tds"), "on")
    Stack.sql_server = SqlServer.of(tds) if tds else live_server()
    yield
    if Stack.sql_server is not None and tds is None:
        Stack.sql_server.close()
    if tds is not None:
        tds.stop()
    Stack.sql_server = None


# ---- a stack ----


@dataclasses.dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The problem's code."""
        return self.json()["code"]


def form(file: bytes | None, company: str | None = "NT047", user: str | None = "anna",
         branch: str | None = "Berlin", more: list[tuple[str, bytes]] | None = None) -> tuple[bytes, str]:
    """A multipart/form-data body and its content type. None leaves a field out."""
    boundary = uuid.uuid4().hex
    fields: list[tuple[str, bytes]] = []
    for name, text in (("companyID", company), ("username", user), ("branch", branch)):
        if text is not None:
            fields.append((name, text.encode()))
    body = b""
    for name, value in fields + (more or []):
        body += f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + value + b"\r\n"
    if file is not None:
        body += (f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="invoice.bin"\r\n'
                 "Content-Type: application/octet-stream\r\n\r\n").encode() + file + b"\r\n"
    return body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


class FastCgi:
    """A FastCGI client on the pool's socket, without a web server's good manners."""

    BEGIN, ABORT, END, PARAMS, STDIN, STDOUT = 1, 2, 3, 4, 5, 6

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(str(path))
        self.protocol_status: int | None = None  # of END_REQUEST

    def send(self, kind: int, content: bytes = b"") -> None:
        for at in range(0, len(content) or 1, 0xFFFF):
            piece = content[at:at + 0xFFFF]
            self.socket.sendall(struct.pack(">BBHHBB", 1, kind, 1, len(piece), 0, 0) + piece)

    def begin(self, role: int = 1, keep: bool = False) -> None:
        self.send(self.BEGIN, struct.pack(">HB5x", role, keep))

    def params(self, values: dict[str, str | None]) -> None:
        """All parameters but those that are None."""
        pairs = [(name.encode(), value.encode()) for name, value in values.items() if value is not None]
        content = b"".join(struct.pack(">II", len(n) | 1 << 31, len(v) | 1 << 31) + n + v for n, v in pairs)
        if content:
            self.send(self.PARAMS, content)
        self.send(self.PARAMS)

    def read(self) -> bytes:
        """What comes on STDOUT until the end of the request or of the connection."""
        stream, out = self.socket.makefile("rb"), b""
        while len(head := stream.read(8)) == 8:
            _, kind, _, size, padding, _ = struct.unpack(">BBHHBB", head)
            content = stream.read(size + padding)[:size]
            if kind == self.STDOUT:
                out += content
            if kind == self.END:
                self.protocol_status = content[4]
                break
        return out

    def answer(self) -> Answer:
        head, _, body = self.read().partition(b"\r\n\r\n")
        headers = http.client.parse_headers(io.BytesIO(head + b"\r\n\r\n"))
        return Answer(int(headers["Status"].split()[0]), headers, body)

    def close(self) -> None:
        self.socket.close()


class Stack:
    """An nginx, a pool and a store in a directory."""

    sql_server: SqlServer | None = None  # None: the embedded store
    is_the_service = True  # whose answers nginx/openapi.yaml describes

    def __init__(self, emulator: Emulator, certificate: Path, *, processes: int = 1, by_path: bool = False,
                 base_url: str | None = None, env: dict[str, str] | None = None,
                 directory: Path | None = None, sql_server: SqlServer | None = None) -> None:
        self.sql_server = sql_server or Stack.sql_server
        self.own_directory = directory is None
        self.dir = directory or Path(tempfile.mkdtemp(prefix="extract-stack-"))
        self.dir.chmod(0o755)
        self.socket = self.dir / f"pool-{uuid.uuid4().hex[:8]}.sock"
        self.port, self.https_port = free_port(), free_port()
        self.allowed_stderr: list[str] = []  # patterns of lines that the test expects
        self.secrets: set[str] = set()  # API keys and client keys: see keeps_secret
        (self.dir / "tls").mkdir(exist_ok=True)
        (self.dir / "server.d").mkdir(exist_ok=True)
        for name in ("cert.pem", "key.pem"):
            shutil.copy(certificate / name, self.dir / "tls")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("EXTRACT_")} | QUICK | {
            "EXTRACT_STORE_DRIVER": "sqlite",
            "EXTRACT_STORE_PATH": str(self.dir / "store.db"),
            "EXTRACT_SERVER_STATE_DIR": str(self.dir),
            "EXTRACT_SERVER_RUNTIME_DIR": str(self.dir),
            "EXTRACT_GEMINI_BASE_URL": base_url or emulator.url,
        }
        if self.sql_server is not None:
            self.env |= self.sql_server.settings | {"EXTRACT_STORE_DATABASE": self.sql_server.database(self.dir)}
        self.env |= env or {}
        self.relay = None
        if self.sql_server is not None and self.sql_server.tds is None:
            self.relay = Relay(self.sql_server.address)
            self.env.setdefault("EXTRACT_SERVER_QUEUE_WAIT", "100s")
            own = self.env.get("EXTRACT_STORE_QUERY_TIMEOUT", LIVE_QUERY_TIMEOUT)
            self.env |= {"EXTRACT_STORE_SERVER": self.relay.address,
                         "EXTRACT_STORE_QUERY_TIMEOUT": max(own, LIVE_QUERY_TIMEOUT, key=seconds)}
        if by_path:
            (self.dir / "server.d" / "transport.conf").symlink_to(ROOT / "nginx/extract-fcgi-body-file.conf")
            self.env["EXTRACT_SERVER_BODY_FILE_DIR"] = str(self.dir / "body")
        self.stderr = (self.dir / "pool.log").open("ab")
        self.pool: subprocess.Popen[bytes] | None = None
        self.start_pool(processes)
        self.nginx = start_nginx(self.dir, ROOT / "nginx/run.conf.in", DIR=self.dir, NGINX=ROOT / "nginx",
                                 SOCKET=self.socket, HTTPS_PORT=self.https_port, HTTP_PORT=self.port)
        eventually(lambda: listening(self.port), "nginx listens")
        self.answers()

    # -- processes --

    def start_pool(self, processes: int = 1) -> None:
        command = ["spawn-fcgi", "-n", "-b", "1024", "-M", "0666", "-s", str(self.socket), "--"]
        if processes > 1:
            command += ["/usr/bin/multiwatch", "-f", str(processes), "--"]
        self.pool = subprocess.Popen([*command, str(BUILD / "extract-fcgi")], env=self.env, stderr=self.stderr,
                                     start_new_session=True)

    def answers(self) -> None:
        eventually(lambda: self.get("/healthz").status == 200, "the pool answers")

    def pids(self) -> list[int]:
        """The extract-fcgi processes of this stack."""
        assert self.pool is not None
        found = subprocess.run(["pgrep", "-s", str(self.pool.pid), "-x", "extract-fcgi"], capture_output=True,
                               text=True)
        return [int(pid) for pid in found.stdout.split()]

    def stop_pool(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Asks the pool to end and waits for it; its exit status."""
        assert self.pool is not None
        if self.pool.poll() is None:
            self.pool.send_signal(number)
        return self.pool.wait(PATIENCE)

    def close(self) -> None:
        try:
            self.stop_pool()
        finally:
            self.nginx.send_signal(signal.SIGTERM)
            self.nginx.wait(PATIENCE)
            self.stderr.close()
            if self.relay is not None:
                self.relay.cut()
        self.keeps_secrets()
        noise = [line for line in (self.dir / "pool.log").read_text(errors="replace").splitlines()
                 if not any(re.search(pattern, line) for pattern in [*self.allowed_stderr, SETTING_UP])]
        if self.own_directory:
            if self.sql_server is not None:
                self.sql_server.drop(self.dir)
            shutil.rmtree(self.dir)
        assert not noise, "on standard error:\n" + "\n".join(noise[:60])

    # -- HTTP --

    def request(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None,
                source: str | None = None, tls: bool = False, timeout: float = 2 * PATIENCE) -> Answer:
        where = (source, 0) if source else None
        connection: http.client.HTTPConnection
        if tls:
            context = ssl.create_default_context(cafile=str(self.dir / "tls" / "cert.pem"))
            connection = http.client.HTTPSConnection("localhost", self.https_port, timeout=timeout, context=context)
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout, source_address=where)
        with closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            answer = Answer(response.status, response.headers, response.read())
        if self.is_the_service:
            openapi.hold(method, path, answer.status, answer.headers, answer.body)
        self.keeps_secret(f"the answer to {method} {path}", str(answer.headers).encode() + answer.body)
        return answer

    def get(self, path: str, **arguments: Any) -> Answer:
        return self.request("GET", path, **arguments)

    def post(self, file: bytes | None, company: str | None = "NT047", user: str | None = "anna",
             branch: str | None = "Berlin", headers: dict[str, str] | None = None,
             more: list[tuple[str, bytes]] | None = None, **arguments: Any) -> Answer:
        body, content_type = form(file, company, user, branch, more)
        return self.request("POST", "/extract", body, {"Content-Type": content_type, **(headers or {})}, **arguments)

    def fastcgi(self, body: bytes, **params: str | None) -> Answer:
        """POST /extract without nginx; params over the usual ones, None leaves one out."""
        with closing(FastCgi(self.socket)) as client:
            client.begin()
            client.params({"REQUEST_METHOD": "POST", "DOCUMENT_URI": "/extract", "REMOTE_ADDR": "127.0.0.1",
                           "CONTENT_LENGTH": str(len(body)), **params})
            if body:
                client.send(FastCgi.STDIN, body)
            client.send(FastCgi.STDIN)
            return client.answer()

    def metric(self, sample: str) -> float:
        """A number of /metrics, by its name and labels."""
        lines = self.get("/metrics").body.decode().splitlines()
        return float(next(line for line in lines if line.startswith(f"{sample} ")).rpartition(" ")[2])

    # -- extractctl and the store --

    def ctl(self, *arguments: str, stdin: str = "", check: bool = True, patient: bool = False) -> subprocess.CompletedProcess[str]:
        """patient: where a test is about a short store.query_timeout, but this command is not."""
        env = self.env | ({"EXTRACT_STORE_QUERY_TIMEOUT": f"{PATIENCE:.0f}s"} if patient else {})
        result = subprocess.run([str(BUILD / "extractctl"), *arguments], input=stdin, env=env, text=True, capture_output=True,
                                timeout=2 * PATIENCE)
        assert not check or result.returncode == 0, result.stderr
        made = re.findall(r"extract_[\w-]{43}", result.stdout) if arguments[:2] == ("client-key", "add") else []
        self.keeps_secret(f"what extractctl {arguments} says", (result.stdout + result.stderr).encode())
        self.secrets.update(made)
        return result

    def token(self, company: str = "NT047", key: str | None = None, *arguments: str) -> int:
        """Adds a token; its TokenID. The key defaults to one of its own."""
        key = key or f"key-{uuid.uuid4().hex}"
        self.secrets.add(key.strip())
        return int(self.ctl("token", "add", "--company", company, *arguments, stdin=key + "\n", patient=True).stdout)

    # -- what must stand nowhere --

    def keeps_secret(self, where: str, content: bytes) -> None:
        """No key of this stack stands there. (Of a few letters only, it is a test's own about odd keys.)"""
        assert not [key for key in self.secrets if len(key) >= 12 and key.encode() in content], where

    def keeps_secrets(self) -> None:
        """In no file and no table that this stack has written, but for the keys' own."""
        key_files = [Path(path) for name, path in self.env.items() if name.endswith("_KEY_FILE")]
        for path in key_files:
            if path.is_file():
                self.secrets.update(path.read_text(errors="replace").split())
        for path in self.dir.rglob("*"):
            if path.is_file() and path not in key_files and not path.name.startswith("store.db"):
                self.keeps_secret(str(path), path.read_bytes())
        with suppress(sqlite3.Error, SqlError, OSError, Closed):  # a test may have broken its store
            for table in self.tables():
                for row in self.sql(f'SELECT * FROM "{table}"'):
                    if table == "TokenMaster":
                        del row["ApiKey"]
                    self.keeps_secret(table, json.dumps(row, ensure_ascii=False, default=str).encode())

    def sql(self, statement: str, *values: Any) -> list[dict[str, Any]]:
        if self.sql_server is not None:
            return self.sql_server.sql(self.dir, statement, *values)
        with closing(sqlite3.connect(self.dir / "store.db", timeout=PATIENCE, isolation_level=None)) as db:
            db.row_factory = sqlite3.Row
            return [dict(row) for row in db.execute(statement, values)]

    def rows(self, statement: str, *values: Any, count: int = 1) -> list[dict[str, Any]]:
        """The rows, once there are count of them: for what is recorded in the background."""
        return eventually(lambda: (r := self.sql(statement, *values)) if len(self.sql(statement, *values)) >= count
                          else None, f"{count} row(s): {statement}")

    def tables(self) -> list[str]:
        """The store's tables and views."""
        if self.sql_server is None or self.sql_server.tds is not None:
            return [row["name"] for row in self.sql("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")]
        return [row["TABLE_NAME"] for row in self.sql("SELECT TABLE_NAME FROM INFORMATION_SCHEMA.TABLES"
                                                      " WHERE TABLE_SCHEMA = 'dbo'")]

    def empty_store(self) -> None:
        """In the store's place there is nothing, as before the first start. For a pool that does not run."""
        if self.sql_server is None:
            for path in self.dir.glob("store.db*"):
                path.unlink()
        else:
            self.sql_server.drop(self.dir)
            self.env["EXTRACT_STORE_DATABASE"] = self.sql_server.database(self.dir)

    @contextmanager
    def store_away(self) -> Iterator[None]:
        """Nothing can be written to the store. Nobody is told why: calls wait until they give up (store.query_timeout).
        A live server is cut off instead: calls fail at once."""
        if self.sql_server is None:
            with closing(sqlite3.connect(self.dir / "store.db", timeout=PATIENCE, isolation_level=None)) as db:
                db.execute("BEGIN IMMEDIATE")
                try:
                    yield
                finally:
                    db.execute("ROLLBACK")
        elif self.relay is None:
            self.sql_server.tds.control(do="away", away=True)
            try:
                yield
            finally:
                self.sql_server.tds.control(do="away", away=False)
        else:
            self.relay.cut()
            try:
                yield
            finally:
                self.relay.mend()
            eventually(self._misses_no_store, "the store is found again")

    def _misses_no_store(self) -> bool:
        """Also where there is no pool. One that runs does not try to log in all the time."""
        status = self.get("/readyz").json()
        return status.get("code") != "store_unavailable" and status.get("store") != "unreachable"

    def balanced(self) -> None:
        """The equations of the store: sums equal rows, nothing is reserved by nobody. The embedded one's file is whole."""
        if self.sql_server is None:
            assert self.sql("PRAGMA integrity_check") == [{"integrity_check": "ok"}]
        for row in self.sql("""
                SELECT t.TokenID, t.TotalTokenLimit AS "limit", s.TotalUsedTokens AS used,
                       s.TotalRemainingTokens AS remaining, s.ReservedTokens AS reserved,
                       (SELECT IFNULL(SUM(TotalTokensUsed), 0) FROM TokenUsageLogs l WHERE l.TokenID = t.TokenID)
                       + (SELECT IFNULL(SUM(TotalTokensUsed), 0) FROM TokenUsageMonthly m WHERE m.TokenID = t.TokenID)
                       AS logged,
                       (SELECT IFNULL(SUM(EstimatedTokens), 0) FROM TokenReservations r
                        WHERE r.TokenID = t.TokenID AND r.State = 'open') AS held
                FROM TokenMaster t JOIN TokenUsageSummary s ON s.TokenID = t.TokenID"""):
            assert row["used"] == row["logged"], row
            assert row["remaining"] == (None if row["limit"] is None else row["limit"] - row["used"]), row
            assert row["reserved"] == row["held"], row


@pytest.fixture
def make_stack(emulator: Emulator, certificate: Path) -> Iterator[Callable[..., Stack]]:
    stacks: list[Stack] = []

    def make(**settings: Any) -> Stack:
        stacks.append(Stack(emulator, certificate, **settings))
        return stacks[-1]

    yield make
    for stack in stacks:
        stack.close()


@pytest.fixture(scope="module")
def _stack(_emulator: Emulator, certificate: Path) -> Iterator[Stack]:
    stack = Stack(_emulator, certificate)
    yield stack
    stack.close()


@pytest.fixture
def stack(_stack: Stack, emulator: Emulator) -> Iterator[Stack]:
    """The module's stack. Tests take a company of their own (`company`), so that they don't meet."""
    yield _stack
    _stack.balanced()


@pytest.fixture
def crowd(emulator: Emulator) -> Iterator[ThreadPoolExecutor]:
    """Threads for requests at the same time. In the end the emulator lets go of what it still holds."""
    with ThreadPoolExecutor(256) as threads:
        yield threads
        emulator.reset()


@pytest.fixture
def company() -> str:
    return f"C-{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def pdf() -> bytes:
    return (ROOT / "tests/samples/invoice-de.pdf").read_bytes()


def start_refused(directory: Path, **env: str) -> str:
    """What the program says on standard error when it refuses to start with these settings."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "refused.sock"))
        listener.listen()
        done = subprocess.run([str(BUILD / "extract-fcgi")], stdin=listener, capture_output=True, text=True,
                              timeout=PATIENCE, env=os.environ | {
                                  "EXTRACT_STORE_PATH": str(directory / "store.db"),
                                  "EXTRACT_SERVER_STATE_DIR": str(directory),
                                  "EXTRACT_SERVER_RUNTIME_DIR": str(directory)} | env)
    assert done.returncode == 1, done
    return done.stderr


# ---- the contract's problems ----

FAILED = "Failed to process invoice"
UUID_V7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")

# code: (status, title, retryable, Retry-After is sent, detail where it is fixed)
PROBLEMS: dict[str, tuple[int, str, bool, bool, str | None]] = {
    "token_expired": (403, "Forbidden", False, False,
                      "Your AI token has expired. Please renew your subscription."),
    "token_unavailable": (403, "Forbidden", False, False,
                          "Your AI token is no longer available or has been disabled. Please contact support."),
    "no_active_token": (403, "Forbidden", False, False,
                        "No active token found for your company. Please contact support."),
    "invalid_file": (422, "Unprocessable Content", False, False, FAILED),
    "unsupported_media_type": (415, "Unsupported Media Type", False, False, FAILED),
    "bad_request": (400, "Bad Request", False, False, None),
    "file_too_large": (413, "Content Too Large", False, False, None),
    "unauthenticated": (401, "Unauthorized", False, False, None),
    "forbidden": (403, "Forbidden", False, False, None),
    "request_in_progress": (409, "Conflict", True, False, None),
    "already_processed": (409, "Conflict", False, False, None),
    "rate_limited": (429, "Too Many Requests", True, True, None),
    "upstream_unavailable": (502, "Bad Gateway", True, True, FAILED),
    "upstream_rejected": (502, "Bad Gateway", False, False, FAILED),
    "invalid_answer": (502, "Bad Gateway", True, False, FAILED),
    "upstream_rate_limited": (503, "Service Unavailable", True, True, None),
    "token_busy": (503, "Service Unavailable", True, True, None),
    "store_unavailable": (503, "Service Unavailable", True, True, None),
    "storage_full": (503, "Service Unavailable", True, True, None),
    "overloaded": (503, "Service Unavailable", True, True, None),
    "deadline_exceeded": (504, "Gateway Timeout", True, False, None),
    "internal_error": (500, "Internal Server Error", False, False, None),
    "not_found": (404, "Not Found", False, False, None),
    "method_not_allowed": (405, "Method Not Allowed", False, False, None),
}


def refused(answer: Answer, code: str, *, spent: bool = False, retry_after: int | None = None) -> dict[str, Any]:
    """Checks that the application's answer is this problem, whole; the problem."""
    status, title, retryable, with_retry_after, detail = PROBLEMS[code]
    problem = answer.json()
    assert problem.get("code") == code, problem
    assert list(problem) == ["type", "title", "status", "detail", "code", "request_id", "retryable", "spent"]
    assert (answer.status, problem["status"], problem["title"]) == (status, status, title)
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert problem["type"] == "about:blank"
    assert problem["detail"] == detail if detail is not None else len(problem["detail"]) > 10
    assert problem["request_id"] == answer.headers["X-Request-ID"]
    assert UUID_V7.fullmatch(problem["request_id"])
    assert (problem["retryable"], problem["spent"]) == (retryable, spent), problem
    seconds = answer.headers["Retry-After"]
    assert (seconds is not None) == with_retry_after, seconds
    assert seconds is None or int(seconds) > 0
    # on a live server, which may be slow, so much of it may have gone by while it was asked
    assert retry_after is None or retry_after - (5 if IS_LIVE else 0) <= int(seconds) <= retry_after, seconds
    return problem
