"""nginx/ as it ships: limits, nginx's own answers, CORS, what is refused, the log, and the site for production.

The client is curl, which speaks HTTP/2, or a socket where a client should misbehave. Behind nginx is the real pool, or
a stand-in that dies on demand and shows what reached it. The site is installed as nginx/README.md says.
"""
from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from conftest import (BUILD, NGINX, PATIENCE, ROOT, Answer, Emulator, FastCgi, Stack, eventually, free_port, listening,
                      start_nginx)

ALLOWED, DENIED = "http://localhost:5173", "https://evil.example"
LIMIT = 50 * 1024 * 1024
BOTH = pytest.mark.parametrize("http", [1, 2], ids=["http1", "http2"])
CORS = {"access-control-allow-origin": [ALLOWED], "vary": ["Origin"],
        "access-control-expose-headers": ["X-Request-ID, Retry-After"]}
FORM = ["-F", "file=@/etc/hostname;type=application/pdf", "-F", "companyID=nobody", "-F", "username=anna"]
HARDENED = {"x-content-type-options": ["nosniff"], "referrer-policy": ["no-referrer"], "cache-control": ["no-store"],
            "content-security-policy": ["default-src 'none'; frame-ancestors 'none'"], "server": ["nginx"]}


class Reply:
    """What curl -i printed."""

    def __init__(self, output: bytes) -> None:
        head, _, self.body = output.partition(b"\r\n\r\n")
        while head.startswith(b"HTTP/1.1 100"):
            head, _, self.body = self.body.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        self.version, self.status = first.split()[0], int(first.split()[1])
        self.headers: dict[str, list[str]] = {}
        for line in lines:
            name, _, value = line.partition(":")
            self.headers.setdefault(name.lower(), []).append(value.strip())

    def __getitem__(self, name: str) -> str | None:
        values = self.headers.get(name.lower(), [])
        assert len(values) < 2, f"{name} more than once: {values}"
        return values[0] if values else None

    def cors(self) -> dict[str, list[str]]:
        return {name: v for name, v in self.headers.items() if name.startswith("access-control-") or name == "vary"}


def curl(url: str, *arguments: str) -> Reply:
    out = subprocess.run(["curl", "-sik", "--max-time", str(PATIENCE), *arguments, url], capture_output=True)
    assert out.stdout, (out.returncode, out.stderr)
    return Reply(out.stdout)


def is_hardened(reply: Reply) -> None:
    """Has it what an answer of JSON should have, once, and nothing that tells of the machine?"""
    assert {name: reply.headers.get(name) for name in HARDENED} == HARDENED
    assert not {"x-powered-by", "via", "set-cookie", "etag"} & reply.headers.keys()
    assert not re.search(rb"nginx|/tmp|/etc|/var|/run|fcgi", reply.body)


def raw(port: int, request: bytes, source: str = "127.0.0.1") -> bytes:
    """All that comes back until the server closes; over plain HTTP."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE, (source, 0)) as client:
        client.sendall(request)
        return until_closed(client)


def until_closed(client: socket.socket) -> bytes:
    out = b""
    try:
        while piece := client.recv(1 << 16):
            out += piece
    except ConnectionResetError:
        pass
    return out


def url(stack: Stack | Front, path: str = "/extract", http: int = 2) -> str:
    return f"https://127.0.0.1:{stack.https_port}{path}" if http == 2 else f"http://127.0.0.1:{stack.port}{path}"


def is_own(reply: Reply, status: int, code: str, retryable: bool, spent: bool, retry_after: str | None = None) -> None:
    """Is it nginx's answer, in the application's shape?"""
    assert reply.status == status, reply.body
    problem = json.loads(reply.body)
    assert list(problem) == ["type", "title", "status", "detail", "code", "request_id", "retryable", "spent"]
    assert (problem["type"], problem["status"], problem["code"]) == ("about:blank", status, code)
    assert (problem["retryable"], problem["spent"]) == (retryable, spent)
    assert re.fullmatch("[0-9a-f]{32}", problem["request_id"])
    assert reply["X-Request-ID"] == problem["request_id"]
    assert reply["Content-Type"] == "application/problem+json"
    assert reply["Retry-After"] == retry_after
    is_hardened(reply)


def is_the_applications(reply: Reply, status: int, code: str) -> None:
    assert (reply.status, json.loads(reply.body)["code"]) == (status, code)
    assert reply["X-Request-ID"] == json.loads(reply.body)["request_id"]
    assert re.fullmatch("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", reply["X-Request-ID"] or "")
    assert reply["Content-Type"] == "application/problem+json"
    is_hardened(reply)


# ---- limits ----


@BOTH
@pytest.mark.parametrize("how", [[], ["-H", "Transfer-Encoding: chunked"]], ids=["length", "chunked"])
def test_upload_over_the_limit(stack: Stack, emulator: Emulator, tmp_path: Path, http: int, how: list[str]) -> None:
    (tmp_path / "file").touch()
    os.truncate(tmp_path / "file", LIMIT + 1024)
    reply = curl(url(stack, http=http), "-F", f"file=@{tmp_path / 'file'}", "-H", f"Origin: {ALLOWED}", *how)
    is_own(reply, 413, "file_too_large", False, False)
    assert json.loads(reply.body)["detail"] == "The upload is larger than the limit of 50 MB (52428800 bytes)."
    assert reply.version == ("HTTP/2" if http == 2 else "HTTP/1.1") and reply.cors() == CORS


@pytest.mark.parametrize("size, status", [(LIMIT, 400), (LIMIT + 1, 413)])
def test_limit_is_exact(stack: Stack, tmp_path: Path, size: int, status: int) -> None:
    """One byte less reaches the application, which finds no form in it."""
    (tmp_path / "file").touch()
    os.truncate(tmp_path / "file", size)
    reply = curl(url(stack), "--data-binary", f"@{tmp_path / 'file'}")
    if status == 413:
        is_own(reply, 413, "file_too_large", False, False)
    else:
        is_the_applications(reply, 400, "bad_request")


def test_requests_of_one_address(stack: Stack, crowd: ThreadPoolExecutor) -> None:
    """10 a second and 50 at a burst; 127.0.0.1 is not counted."""
    def posts(source: str | None) -> list[Answer]:
        answers = [crowd.submit(stack.request, "POST", "/extract", b"x", {"Origin": ALLOWED}, source=source)
                   for _ in range(120)]
        return [answer.result(PATIENCE) for answer in answers]

    refused = [answer for answer in posts("127.0.0.2") if answer.status != 400]
    assert 30 <= len(refused) <= 120 - 50
    assert "limiting requests" in (stack.dir / "error.log").read_text()
    for answer in refused:
        head = "\r\n".join([f"HTTP/1.1 {answer.status} -", *(": ".join(pair) for pair in answer.headers.items())])
        reply = Reply(head.encode() + b"\r\n\r\n" + answer.body)
        is_own(reply, 429, "rate_limited", True, False, "5")
        assert reply.cors() == CORS
    assert {answer.status for answer in posts(None)} <= {400, 503}  # the pool has its own limits


def test_requests_at_once_of_one_address(stack: Stack, emulator: Emulator, crowd: ThreadPoolExecutor, company: str,
                                         pdf: bytes) -> None:
    """50 at the same time, whether a worker has them or they wait for one."""
    stack.token(company, "key-crowd")
    emulator.script("key-crowd", {"hold": True}, repeat=True)
    answers = [crowd.submit(stack.post, pdf, company, source="127.0.0.3") for _ in range(50)]
    emulator.wait(held=8)
    eventually(lambda: stack.metric("extract_requests_queued") == 42)
    is_own(curl(url(stack), "--interface", "127.0.0.3", "-d", "x"), 429, "rate_limited", True, False, "5")
    assert "limiting connections by zone \"extract_at_once\"" in (stack.dir / "error.log").read_text()
    emulator.script("key-crowd")
    emulator.release()
    assert {answer.result(PATIENCE).status for answer in answers} == {200}


# ---- nginx's own answers ----


def no_socket(path: Path) -> None:
    path.unlink()


def nobody_listens(path: Path) -> None:
    pass


def backlog_is_full(path: Path) -> socket.socket:
    path.unlink()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    path.chmod(0o777)
    listener.listen(0)
    FastCgi(path)  # its place is the only one
    return listener


@pytest.mark.parametrize("trouble", [no_socket, nobody_listens, backlog_is_full])
def test_pool_that_takes_nothing(make_stack: Callable[..., Stack], trouble: Callable[[Path], object]) -> None:
    """Only what no process can have seen is "overloaded"."""
    stack = make_stack()
    assert stack.stop_pool() == 0
    kept = trouble(stack.socket)
    for http in (1, 2):
        reply = curl(url(stack, http=http), *FORM, "-H", f"Origin: {ALLOWED}")
        is_own(reply, 503, "overloaded", True, False, "5")
        assert reply.cors() == CORS
    line = eventually(lambda: next((line for line in (stack.dir / "access.log").read_text().splitlines()
                                    if f"request_id={reply['X-Request-ID']} " in line), None))
    assert re.search(r" 503 request_id=\S+ app_request_id=- .* connect=- .* upstream_status=502 ", line)
    if isinstance(kept, socket.socket):
        kept.close()


class StandIn:
    """A FastCGI server that answers "{}", or does what the query's do= says."""

    def __init__(self, path: Path) -> None:
        self.connections = 0
        self.seen: list[dict[str, str]] = []  # the parameters of each request
        self.answered = 0
        self.over = threading.Event()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        path.chmod(0o777)
        self.listener.listen(256)
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            params = b""
            while len(head := stream.read(8)) == 8:
                _, kind, _, size, padding, _ = struct.unpack(">BBHHBB", head)
                content = stream.read(size + padding)[:size]
                params += content if kind == FastCgi.PARAMS else b""
                if kind == FastCgi.STDIN and size == 0 or kind == FastCgi.PARAMS and b"do=die-early" in params:
                    break
            values = self.parse(params)
            self.seen.append(values)
            do = values["QUERY_STRING"].partition("do=")[2]
            if do == "die-in-header":
                self.write(connection, b"X-Request-ID: 0190\n")
            elif do == "die-in-body":
                self.write(connection, b"Content-Type: text/plain\r\nContent-Length: 1000\r\n\r\nabc")
            elif do == "silence":
                self.over.wait(PATIENCE)
            elif not do.startswith("die"):
                size = 32 << 20 if do == "much" else 0
                head = b"Content-Type: application/json\r\nCache-Control: no-store\r\n\r\n"
                self.write(connection, head + b"{}" + bytes(size))
                self.answered += 1
                connection.sendall(struct.pack(">BBHHBB8x", 1, FastCgi.END, 1, 8, 0, 0))

    @staticmethod
    def parse(params: bytes) -> dict[str, str]:
        values, at = {}, 0
        while at < len(params):
            sizes = []
            for _ in range(2):
                width = 4 if params[at] & 0x80 else 1
                sizes.append(int.from_bytes(params[at:at + width], "big") & 0x7FFFFFFF)
                at += width
            name, value = params[at:at + sizes[0]], params[at + sizes[0]:at + sum(sizes)]
            assert name.decode() not in values, f"{name!r} twice"
            values[name.decode()] = value.decode("latin-1")
            at += sum(sizes)
        return values

    @staticmethod
    def write(connection: socket.socket, content: bytes) -> None:
        for at in range(0, len(content), 0xFFFF):
            piece = content[at:at + 0xFFFF]
            connection.sendall(struct.pack(">BBHHBB", 1, FastCgi.STDOUT, 1, len(piece), 0, 0) + piece)

    def close(self) -> None:
        self.over.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


class Front:
    """nginx with a stand-in behind it, which it knows as two servers. Some of its times are others than shipped, and
    proxies on 127.0.0.1 and 127.0.0.6 may name their clients in X-Client.
    """

    def __init__(self, directory: Path, certificate: Path, times: dict[str, tuple[str, str]]) -> None:
        directory.chmod(0o755)
        self.dir = directory
        self.port, self.https_port = free_port(), free_port()
        nginx = directory / "nginx"
        shutil.copytree(ROOT / "nginx", nginx)
        for name, (old, new) in times.items():
            file = next(f for f in nginx.glob("*.conf") if f"\n{name} " in f.read_text())
            text, count = re.subn(rf"^{name}( +){old};", rf"{name} {new};", file.read_text(), flags=re.M)
            assert count == 1, f"{name} is not {old}"
            file.write_text(text)
        template = (nginx / "run.conf.in").read_text()
        assert "server unix:@SOCKET@;" in template
        (nginx / "run.conf.in").write_text(template.replace("server unix:@SOCKET@;",
                                                            "server unix:@SOCKET@ max_fails=0;" * 2))
        (directory / "server.d").mkdir()
        (directory / "server.d/proxy.conf").write_text(
            "set_real_ip_from 127.0.0.1; set_real_ip_from 127.0.0.6; real_ip_header X-Client;")
        shutil.copytree(certificate, directory / "tls")
        self.stand_in = StandIn(directory / "pool.sock")
        self.process = start_nginx(directory, nginx / "run.conf.in", DIR=directory, NGINX=nginx,
                                   SOCKET=directory / "pool.sock", HTTPS_PORT=self.https_port, HTTP_PORT=self.port)
        eventually(lambda: listening(self.port), "nginx listens")

    def log(self) -> list[str]:
        return (self.dir / "access.log").read_text().splitlines()

    def close(self) -> None:
        self.stand_in.close()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(PATIENCE)


@pytest.fixture(scope="module")
def front(certificate: Path) -> Iterator[Front]:
    """It waits 1 s for an answer."""
    with tempfile.TemporaryDirectory(prefix="extract-front-") as name:
        front = Front(Path(name), certificate, {"fastcgi_read_timeout": ("150s", "1s")})
        yield front
        front.close()


@pytest.fixture(scope="module")
def impatient(certificate: Path) -> Iterator[Front]:
    """It waits 1 s for its clients; what is shipped is longer than the tests wait, but for the header's time."""
    times = {"client_header_timeout": ("15s", "1s"), "client_body_timeout": ("30s", "1s"),
             "send_timeout": ("30s", "1s"), "keepalive_timeout": ("65s", "1s")}
    with tempfile.TemporaryDirectory(prefix="extract-front-") as name:
        front = Front(Path(name), certificate, times)
        yield front
        front.close()


@BOTH
@pytest.mark.parametrize("do", ["die", "die-early", "die-in-header"])
def test_process_that_dies(front: Front, do: str, http: int) -> None:
    reply = curl(url(front, f"/extract?do={do}", http), *FORM, "-H", f"Origin: {ALLOWED}")
    is_own(reply, 502, "internal_error", False, True)
    assert reply.cors() == CORS


@BOTH
def test_process_that_does_not_answer(front: Front, http: int) -> None:
    reply = curl(url(front, "/extract?do=silence", http), *FORM, "-H", f"Origin: {ALLOWED}")
    is_own(reply, 504, "deadline_exceeded", False, True)
    assert reply.cors() == CORS


def test_process_that_dies_in_its_answer(front: Front) -> None:
    """The client sees that the answer is not whole."""
    out = subprocess.run(["curl", "-sk", *FORM, url(front, "/extract?do=die-in-body")],
                         capture_output=True, timeout=PATIENCE)
    assert out.returncode in (18, 92)


def test_request_is_sent_once(front: Front) -> None:
    before = len(front.stand_in.seen)
    curl(url(front, "/extract?do=die"), *FORM)
    assert len(front.stand_in.seen) == before + 1


@BOTH
def test_parameters(front: Front, http: int) -> None:
    """What passes on to the application: of a client's headers five, and nothing that looks like them."""
    curl(url(front, "/extract?a=b", http), "-d", "x", "-H", "Authorization: Bearer k", "-H", "Idempotency-Key: i",
         "-H", "Accept: text/csv", "-H", "traceparent: p", "-H", "tracestate: s", "-H", "Proxy: evil", "-H", "Idempotency_Key: evil", "-H", "Request-Body-File: evil", "-H", "Cookie: evil",
         "-H", "Remote-Addr: evil", "-H", "X-Forwarded-For: 6.6.6.6", "-H", "X-Request-ID: evil", "-A", "evil")
    params = front.stand_in.seen[-1]
    assert re.fullmatch("[0-9a-f]{32}", params.pop("PROXY_REQUEST_ID")) and params.pop("REMOTE_PORT").isdigit()
    assert params == {
        "REQUEST_METHOD": "POST", "DOCUMENT_URI": "/extract", "SCRIPT_NAME": "/extract", "REQUEST_URI": "/extract?a=b",
        "QUERY_STRING": "a=b", "CONTENT_TYPE": "application/x-www-form-urlencoded", "CONTENT_LENGTH": "1",
        "GATEWAY_INTERFACE": "CGI/1.1", "SERVER_PROTOCOL": "HTTP/2.0" if http == 2 else "HTTP/1.1", "SERVER_NAME": "",
        "SERVER_PORT": str(front.https_port if http == 2 else front.port), "REMOTE_ADDR": "127.0.0.1",
        "HTTP_AUTHORIZATION": "Bearer k", "HTTP_ACCEPT": "text/csv", "HTTP_IDEMPOTENCY_KEY": "i",
        "HTTP_TRACEPARENT": "p", "HTTP_TRACESTATE": "s", **({"HTTPS": "on"} if http == 2 else {})}


def test_parameters_that_are_absent(front: Front) -> None:
    """An empty header is like none, and so is one with an underscore."""
    for http, key in ((1, "Idempotency-Key;"), (1, "Idempotency_Key: evil"), (2, "Idempotency_Key: evil")):
        curl(url(front, http=http), "-d", "x", "-H", "Authorization;", "-H", "Accept;", "-H", "traceparent;", "-H", "tracestate;",
             "-H", key)
        assert not [name for name in front.stand_in.seen[-1] if name.startswith("HTTP_")]


@BOTH
def test_traceparent_twice(front: Front, http: int) -> None:
    """Two are none by the rules. nginx from 1.23 on joins them, which is none; before, the first is all there is."""
    first, second = (f"00-{digit * 32}-00f067aa0ba902b7-01" for digit in "12")
    curl(url(front, http=http), "-d", "x", "-H", f"traceparent: {first}", "-H", f"traceparent: {second}")
    seen = front.stand_in.seen[-1]
    [logged] = eventually(lambda: re.findall(rf" request_id={seen['PROXY_REQUEST_ID']} app_request_id=\S+ trace_id=(\S+) ",
                                             (front.dir / "access.log").read_text()), "nginx has logged it")
    assert (seen["HTTP_TRACEPARENT"], logged) in [(first, "1" * 32), (f"{first}, {second}", "-")]


# ---- malformed requests ----


@pytest.mark.parametrize("request_, status", [
    (b"GET /" + b"a" * 40000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 40000 + b"\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/3.7\r\nHost: x\r\n\r\n", 400),
    (b"nonsense\r\n\r\n", 400),
    (b"POST /extract HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n", 400),
    (b"POST /extract HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: foo\r\n\r\n", 400),
    (b"POST /extract HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    (b"TRACE / HTTP/1.1\r\nHost: x\r\n\r\n", 405),
], ids=["uri", "header", "host", "version", "nonsense", "length", "encoding", "chunk", "trace"])
def test_malformed_request(stack: Stack, request_: bytes, status: int) -> None:
    reply = Reply(raw(stack.port, request_.replace(b"Host: x", b"Host: x\r\nConnection: close")))
    is_own(reply, status, "bad_request" if status == 400 else "method_not_allowed", False, False)
    assert status == 400 or reply["Allow"]


def test_plain_http_on_the_tls_port(stack: Stack) -> None:
    is_own(curl(f"http://127.0.0.1:{stack.https_port}/extract"), 400, "bad_request", False, False)


@pytest.mark.parametrize("head", [
    "Content-Length: 4\r\nContent-Length: 40", "Content-Length: 4\r\nContent-Length: 4", "Content-Length: 4, 40",
    "Content-Length: +4", "Content-Length: -1", "Content-Length: 0x4", "Content-Length: 4 0", "Content-Length:\r\n 4",
    "Content-Length: 99999999999999999999", "Content-Length: 4\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked\r\nContent-Length: 4", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked, identity", "Transfer-Encoding: xchunked", "Transfer-Encoding: identity",
    "Transfer-Encoding : chunked", "Transfer-Encoding\t: chunked", "Content-Length : 4",
    "X-A: b\rContent-Length: 4\r\nTransfer-Encoding : chunked", "Content-Length: 4\0", "X-A: \0\r\nContent-Length: 4",
    "Host: y\r\nContent-Length: 4", "Authorization: a\r\nAuthorization: b\r\nContent-Length: 4",
])
def test_two_ways_to_read_a_request(front: Front, head: str) -> None:
    """Refused, the connection closed: what follows is nobody's request."""
    before = len(front.stand_in.seen)
    out = raw(front.port, (f"POST /extract HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n"
                           "0\r\n\r\n"
                           "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").encode("latin-1"))
    is_own(Reply(out), 400, "bad_request", False, False)
    assert out.count(b"HTTP/1.1") == 1 and len(front.stand_in.seen) == before


@pytest.mark.parametrize("chunk", ["-1\r\nx", "0x1\r\nx", "fffffffffffffffff\r\nx", "1\r\nxx\r\n", "1 \n;\r\nx", ""])
def test_malformed_chunk(front: Front, chunk: str) -> None:
    before = len(front.stand_in.seen)
    out = raw(front.port, ("POST /extract HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
                           f"{chunk}\r\n0\r\n\r\n"
                           "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").encode())
    is_own(Reply(out), 400, "bad_request", False, False)
    assert out.count(b"HTTP/1.1") == 1 and len(front.stand_in.seen) == before


def http2(connection: socket.socket, headers: list[tuple[str, str]], body: bytes) -> None:
    """One request as it is, without a library's scruples, until its answer ends or it is reset."""
    def frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
        return len(content).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + content

    data, headers_, reset, settings, go_away = 0, 1, 3, 4, 7
    block = b"".join(b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
                     for name, value in headers)  # literal, in no table
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(settings, 0, 0, b"")
                       + frame(headers_, 4, 1, block) + frame(data, 1, 1, body))
    with connection.makefile("rb") as stream:
        while head := stream.read(9):
            stream.read(int.from_bytes(head[:3], "big"))
            if head[3] in (reset, go_away) or head[3] in (data, headers_) and head[4] & 1:
                return


def test_requests_of_one_connection(front: Front) -> None:
    """A thousand, and by HTTP/2 so many at the same time."""
    out = raw(front.port, b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n" * 1001)
    assert out.count(b"HTTP/1.1 404") == 1000
    context = ssl.create_default_context(cafile=str(front.dir / "tls/cert.pem"))
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(("127.0.0.1", front.https_port), PATIENCE) as plain, \
            context.wrap_socket(plain, server_hostname="localhost") as connection, connection.makefile("rb") as stream:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        head = stream.read(9)
        assert head[3] == 4  # SETTINGS
        settings = dict(struct.iter_unpack(">HI", stream.read(int.from_bytes(head[:3], "big"))))
    assert settings[3] == 64  # MAX_CONCURRENT_STREAMS


@pytest.mark.parametrize("headers", [
    [("content-length", "3")], [("content-length", "30")], [("content-length", "6"), ("content-length", "6")],
    [("x-a", "b\r\ncontent-length: 3")], [("x\r\na", "b")], [("Content-Length", "6")], [("host", "other")],
    [("content-length", "6"), ("transfer-encoding", "chunked")],
    [("authorization", "a"), ("authorization", "b")], [(":path", "/healthz")], [(":authority", "other")],
], ids=str)
def test_two_ways_to_read_an_http2_request(front: Front, headers: list[tuple[str, str]]) -> None:
    context = ssl.create_default_context(cafile=str(front.dir / "tls/cert.pem"))
    context.set_alpn_protocols(["h2"])
    usual = [(":method", "POST"), (":scheme", "https"), (":path", "/extract"), (":authority", "localhost")]

    def reaches(more: list[tuple[str, str]]) -> bool:
        before = len(front.stand_in.seen)
        with socket.create_connection(("127.0.0.1", front.https_port), PATIENCE) as plain, \
                context.wrap_socket(plain, server_hostname="localhost") as connection:
            http2(connection, usual + more, b"abcdef")
        return len(front.stand_in.seen) > before

    assert reaches([("transfer-encoding", "chunked")])  # which does not exist in HTTP/2
    assert front.stand_in.seen[-1]["CONTENT_LENGTH"] == "6"
    assert not reaches(headers)


def test_old_protocols(front: Front) -> None:
    """HTTP/1.0 knows no chunks; HTTP/0.9 gets what HTTP/1 does."""
    before = len(front.stand_in.seen)
    chunked = Reply(raw(front.port, b"POST /extract HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"))
    is_own(chunked, 400, "bad_request", False, False)
    assert b"not_found" in raw(front.port, b"GET /metrics/\r\n")
    assert len(front.stand_in.seen) == before


@BOTH
@pytest.mark.parametrize("path", ["/extract", "/healthz", "/metrics"])
@pytest.mark.parametrize("method", ["TRACE", "PROPFIND", "LOCK", "MOVE", "PURGE", "SSTP_DUPLEX_POST"])
def test_odd_method(front: Front, method: str, path: str, http: int) -> None:
    before = len(front.stand_in.seen)
    reply = curl(url(front, path, http), "-X", method, "-d", "x")
    is_own(reply, 405, "method_not_allowed", False, False)
    assert reply["Allow"] == "GET, HEAD, POST, OPTIONS" and len(front.stand_in.seen) == before


def test_connect(front: Front) -> None:
    for target, status, code in ((b"x:443", 400, "bad_request"), (b"/extract", 405, "method_not_allowed")):
        out = raw(front.port, b"CONNECT " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        is_own(Reply(out), status, code, False, False)


def test_upload_that_nginx_cannot_keep(make_stack: Callable[..., Stack], tmp_path: Path) -> None:
    stack = make_stack()
    shutil.rmtree(stack.dir / "body")
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    is_own(curl(url(stack), "--data-binary", f"@{tmp_path / 'file'}"), 500, "internal_error", False, False)


@BOTH
@pytest.mark.parametrize("path", ["/nothing", "/index.html", "/extract/", "/extract-fcgi", "/extract-fcgi/", "/extract-fcgi/x.js",
                                  "/.extract-fcgi/413", "/.extract-fcgi/", "/admin"])
def test_unknown_path(stack: Stack, path: str, http: int) -> None:
    is_own(curl(url(stack, path, http)), 404, "not_found", False, False)


# ---- the page ----

PAGE = ROOT / "nginx/www/extract-fcgi"
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
         ".svg": "image/svg+xml; charset=utf-8", ".txt": "text/plain; charset=utf-8"}
PATHS = {"/": "page.html", "/dashboard": "dashboard.html", **{f"/extract-fcgi/{file.name}": file.name for file in sorted(PAGE.iterdir())}}


def is_of_the_page(reply: Reply, content_type: str) -> None:
    """Has it what a file of the page should have? Its policy allows no inline script or style, and nothing from elsewhere."""
    assert (reply.status, reply["Content-Type"]) == (200, content_type)
    policy = dict(rule.strip().split(" ", 1) for rule in (reply["Content-Security-Policy"] or "").split(";"))
    assert policy == {
        "default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "img-src": "'self' blob:",
        "frame-src": "blob:", "connect-src": "'self'", "base-uri": "'none'", "form-action": "'none'",
        "frame-ancestors": "'none'", "require-trusted-types-for": "'script'", "trusted-types": "'none'"}
    assert reply["Cache-Control"] == "no-cache" and reply["X-Content-Type-Options"] == "nosniff"
    assert reply["Referrer-Policy"] == "no-referrer" and reply["Server"] == "nginx" and reply.cors() == {}


@BOTH
@pytest.mark.parametrize("path", PATHS)
def test_page(front: Front, path: str, http: int) -> None:
    """Served by nginx alone; asked for again, it is not sent again."""
    before = len(front.stand_in.seen)
    file = PAGE / PATHS[path]
    reply = curl(url(front, path, http), "-H", f"Origin: {DENIED}")
    is_of_the_page(reply, TYPES[file.suffix])
    assert reply.body == file.read_bytes() and reply["X-Request-ID"] is None
    again = curl(url(front, path, http), "-H", f"If-None-Match: {reply['ETag']}")
    assert (again.status, again.body) == (304, b"")
    assert curl(url(front, path, http), "-I").status == 200
    is_own(curl(url(front, path, http), "-d", "x"), 405, "method_not_allowed", False, False)
    assert len(front.stand_in.seen) == before


def test_page_is_told_the_limit(stack: Stack) -> None:
    """As a number, and in the words of the 413."""
    reply = curl(url(stack, "/extract-fcgi/settings.json"))
    is_of_the_page(reply, "application/json")
    assert json.loads(reply.body) == {"upload_limit": LIMIT, "upload_limit_text": "50 MB (52428800 bytes)"}


def test_page_loads_nothing_from_elsewhere() -> None:
    """Nor does it hold inline scripts, styles or listeners, which its policy would refuse."""
    for file in PAGE.iterdir():
        if file.stem == "uplot":
            continue  # its comments name its author's page; tests/browser sees what it does
        text = file.read_text()
        found = set(re.findall(r"https?://[^\s\"'<>)]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not found, (file.name, found)
        if file.suffix == ".html":
            assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)", text), file.name
        if file.suffix == ".js":
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), file.name


# ---- slow clients ----


def stall(port: int, sent: bytes) -> list[socket.socket]:
    """Clients that have sent this, and send nothing more."""
    clients = [socket.create_connection(("127.0.0.1", port), PATIENCE) for _ in range(20)]
    for client in clients:
        client.sendall(sent)
    return clients


HEAD = b"POST /extract HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"


@pytest.mark.parametrize("sent, tls, logged", [
    (b"", True, 0), (b"", False, 0), (b"POST /extract HT", False, 20), (HEAD[:-2], False, 20), (HEAD, False, 20),
    (HEAD + bytes(1000), False, 20), (HEAD + bytes(500000), False, 20),
    (HEAD.replace(b"Content-Length: 1000000", b"Transfer-Encoding: chunked") + b"10\r\nabc", False, 20),
], ids=["tls", "nothing", "line", "header", "body-begins", "body", "body-on-disk", "chunk"])
def test_client_that_stalls(impatient: Front, sent: bytes, tls: bool, logged: int) -> None:
    """No worker ever hears of it, whatever was sent; nginx hangs up."""
    def hung_up() -> int:
        return sum(" 408 " in line for line in impatient.log())

    connections, before = impatient.stand_in.connections, hung_up()
    clients = stall(impatient.https_port if tls else impatient.port, sent)
    for client in clients:
        with closing(client):
            assert until_closed(client) == b""
    assert impatient.stand_in.connections == connections
    eventually(lambda: hung_up() == before + logged, "nginx has logged them")
    assert curl(url(impatient, "/healthz")).status == 200


def test_http2_upload_that_stalls(impatient: Front) -> None:
    connections = impatient.stand_in.connections
    with subprocess.Popen(["curl", "-sk", "-X", "POST", "-T", "-", url(impatient)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as client:
        assert client.stdin is not None
        client.stdin.write(bytes(1000))
        client.stdin.flush()
        eventually(lambda: any('"POST /extract HTTP/2.0" 408 ' in line for line in impatient.log()))
        client.stdin.close()
        assert client.wait(PATIENCE) in (55, 56, 92)  # the stream was reset
    assert impatient.stand_in.connections == connections


def test_client_that_does_not_read(impatient: Front) -> None:
    """Its answer is taken from the worker at once; nginx holds it, and hangs up when nobody takes it."""
    before = impatient.stand_in.answered
    with socket.create_connection(("127.0.0.1", impatient.port), PATIENCE) as client:
        client.sendall(b"GET /healthz?do=much HTTP/1.1\r\nHost: x\r\n\r\n")
        eventually(lambda: impatient.stand_in.answered > before, "the worker is free")
        line = eventually(lambda: next((line for line in impatient.log() if "/healthz?... " in line), None))
        assert len(until_closed(client)) < 32 << 20
    assert int(re.search(r"bytes_out=(\d+)", line)[1]) < 32 << 20


def test_idle_connection_is_closed(impatient: Front) -> None:
    out = raw(impatient.port, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert out.count(b"HTTP/1.1 200") == 1


def test_stalled_uploads_leave_the_pool_free(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    """More of them than the pool has threads and places."""
    stack.token(company)
    clients = [client for _ in range(6) for client in stall(stack.port, HEAD + bytes(300000))]
    assert stack.post(pdf, company).status == 200
    assert stack.metric("extract_requests_queued") == stack.metric("extract_requests_in_flight") == 0
    for client in clients:
        client.close()


def test_upload_on_disk_has_no_name(front: Front) -> None:
    """It goes with the process that holds it, however that ends."""
    def held() -> list[str]:
        workers = subprocess.run(["pgrep", "-P", str(front.process.pid)], capture_output=True, text=True).stdout.split()
        links = [os.readlink(fd) for pid in workers for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()]
        return [link for link in links if link.startswith(f"{front.dir}/body/")]

    with socket.create_connection(("127.0.0.1", front.port), PATIENCE) as client:
        client.sendall(HEAD + bytes(500000))
        [link] = eventually(held)
        assert link.endswith(" (deleted)")
        assert [f for f in (front.dir / "body").rglob("*") if f.is_file()] == []
    eventually(lambda: not held())


# ---- the application's answers ----


@BOTH
def test_applications_answers_pass_as_they_are(stack: Stack, http: int) -> None:
    """With one X-Request-ID, its own, and with CORS headers."""
    with_origin = ["-H", f"Origin: {ALLOWED}", "-H", "X-Request-ID: mine"]
    refused = curl(url(stack, http=http), *FORM, *with_origin)
    is_the_applications(refused, 415, "unsupported_media_type")
    malformed = curl(url(stack, http=http), "-d", "x", *with_origin)
    is_the_applications(malformed, 400, "bad_request")
    method = curl(url(stack, http=http), *with_origin)
    is_the_applications(method, 405, "method_not_allowed")
    assert method["Allow"] == "POST"
    for reply in (refused, malformed, method):
        assert reply.cors() == CORS and reply["Retry-After"] is None


def test_log_has_both_request_ids(stack: Stack, company: str, pdf: bytes) -> None:
    stack.token(company)
    answer = stack.post(pdf, company)
    ours = answer.json()["request_id"]
    assert answer.headers.get_all("X-Request-ID") == [ours]
    line = eventually(lambda: next((line for line in (stack.dir / "access.log").read_text().splitlines()
                                    if f"app_request_id={ours} " in line), None))
    found = re.search(r'"POST /extract HTTP/1.1" 200 request_id=([0-9a-f]{32}) app_request_id=\S+ trace_id=- bytes_in=\d+ '
                      r'bytes_out=\d+ time=[0-9.]+ connect=[0-9.]+ header=[0-9.]+ upstream=[0-9.]+ '
                      r'upstream_status=200 ', line)
    assert found, line
    entry = stack.rows("SELECT Message FROM ApplicationLogs WHERE RequestID = ?", ours)[0]
    assert entry["Message"].endswith(f"proxy_request_id={found[1]}")


@BOTH
def test_log_has_no_secret(front: Front, http: int) -> None:
    """Neither keys nor what a query says, whether a request is served or refused; the error log has no header."""
    secret, client = os.urandom(8).hex(), f"client-{os.urandom(8).hex()}"
    bearer, query = f"bearer-{secret}", f"query-{secret}"
    for path in ("/extract", "/nothing", "/extract?do=die&", "/extract?do=silence&", "/metrics"):
        curl(url(front, f"{path}{'' if '?' in path else '?'}{query}", http), "-d", "x", "-e", f"https://x/?{query}",
             "-A", client, "-H", f"Authorization: Bearer {bearer}", "-H", f"Authorization_: {bearer}",
             "-H", f"Cookie: {bearer}")
    headers = f"Authorization: Bearer {bearer}\r\nConnection: close"
    for end in ("HTTP/1.1\r\nHost: x", "x HTTP/1.1\r\nHost: x", "HTTP/1.1\r\nHost: x\r\nHost: x", "HTTP/9"):
        raw(front.port, f"GET /{client}?{query} {end}\r\n{headers}\r\n\r\n".encode())
    raw(front.port, f"\x16\x03GET {client}?{query}\r\n\r\n".encode())
    eventually(lambda: sum(client in line for line in front.log()) == 10, "all are logged")
    written = "".join(path.read_text() for path in front.dir.glob("*.log"))
    assert secret not in (front.dir / "access.log").read_text() and bearer not in written
    assert f'"POST /extract?... HTTP/{"2.0" if http == 2 else "1.1"}" 502 ' in written


def test_log_is_one_line_a_request(front: Front) -> None:
    """Whatever a client writes into it."""
    raw(front.port, b'GET /no%0Athing"\xff HTTP/1.1\r\nHost: x\r\nConnection: close\r\n'
        b'User-Agent: a" 200 \x1b[31m\r\n\r\n')
    [line] = eventually(lambda: [line for line in front.log() if "/no%0Athing" in line])
    assert r'"GET /no%0Athing\x22\xFF HTTP/1.1" 404 ' in line and line.endswith(r'"a\x22 200 \x1B[31m"')


# ---- this machine only ----


@BOTH
@pytest.mark.parametrize("path", ["/readyz", "/metrics", "/admin/tokens", "/admin/usage?limit=1"])
def test_loopback_only(stack: Stack, path: str, http: int) -> None:
    here = curl(url(stack, path, http))
    if path.startswith("/admin"):
        is_the_applications(here, 401, "unauthenticated")
    else:
        assert here.status == 200
    is_own(curl(url(stack, path, http), "--interface", "127.0.0.2"), 404, "not_found", False, False)


@pytest.mark.parametrize("path", [
    "/metrics", "//metrics", "/./metrics", "/healthz/../metrics", "/extract/..//metrics", "/%6detrics", "/metrics%00",
    "/metrics%0a", "/metrics?/healthz", "/metrics#/healthz", "/metrics/", "/metrics;/healthz", "/METRICS",
    "/admin/tokens", "/admin%2ftokens", "/healthz/../admin/tokens", "/admin//tokens", "/.extract-fcgi/../admin/tokens",
    "http://localhost/metrics", "https://127.0.0.1/admin/tokens"])
def test_tricks_from_elsewhere(front: Front, path: str) -> None:
    before = len(front.stand_in.seen)
    for headers in ("Host: localhost", "Host: 127.0.0.1", "Host: x\r\nX-Forwarded-For: 127.0.0.1",
                    "Host: x\r\nX-Forwarded-For: 1:", "Host: x\r\nX-Real-IP: ::1", "Host: x\r\nForwarded: for=::1",
                    "Host: x\r\nX-Original-URL: /metrics", "Host: x\r\nX-Rewrite-URL: /metrics"):
        request = f"GET {path} HTTP/1.1\r\n{headers}\r\nConnection: close\r\n\r\n"
        reply = Reply(raw(front.port, request.encode(), "127.0.0.2"))
        assert reply.status in (400, 404)
        is_own(reply, reply.status, "not_found" if reply.status == 404 else "bad_request", False, False)
    assert len(front.stand_in.seen) == before


@BOTH
@pytest.mark.parametrize("header", ["X-Forwarded-For: 127.0.0.1", "X-Forwarded-For: 203.0.113.9",
                                    "X-Real-IP: 203.0.113.9", "Forwarded: for=203.0.113.9", "Via: 1.1 balancer",
                                    "X-Client: 203.0.113.9"])
@pytest.mark.parametrize("path", ["/readyz", "/metrics", "/admin/tokens"])
def test_passed_on_by_a_proxy_of_this_machine(front: Front, path: str, header: str, http: int) -> None:
    """It comes from 127.0.0.1, and yet from elsewhere."""
    is_own(curl(url(front, path, http), "-H", header), 404, "not_found", False, False)
    assert curl(url(front, path, http)).status == 200
    assert curl(url(front, "/healthz", http), "-H", header).status == 200


@pytest.mark.parametrize("client", ["127.0.0.1", "::1", "127.0.0.6"])
def test_passed_on_by_another_machine(front: Front, client: str) -> None:
    """A proxy that is believed may say that its client is here; it is the proxy that is not."""
    for path in ("/readyz", "/metrics", "/admin/tokens"):
        reply = curl(url(front, path), "--interface", "127.0.0.6", "-H", f"X-Client: {client}")
        is_own(reply, 404, "not_found", False, False)


def test_healthz_is_for_everybody(stack: Stack) -> None:
    assert curl(url(stack, "/healthz"), "--interface", "127.0.0.2").status == 200


# ---- CORS ----


@BOTH
def test_preflight(stack: Stack, http: int) -> None:
    """Answered by nginx, and not counted by its limits."""
    for _ in range(60):
        reply = curl(url(stack, http=http), "-X", "OPTIONS", "-H", f"Origin: {ALLOWED}", "-H",
                     "Access-Control-Request-Method: POST", "--interface", "127.0.0.9")
        assert reply.status == 204
    assert reply.body == b"" and reply["Content-Type"] is None
    assert re.fullmatch("[0-9a-f]{32}", reply["X-Request-ID"] or "")
    assert reply.cors() == {
        **CORS, "access-control-allow-methods": ["POST, OPTIONS"], "access-control-max-age": ["7200"],
        "access-control-allow-headers": ["Authorization, Content-Type, Idempotency-Key, traceparent, tracestate"]}


@pytest.mark.parametrize("origin", [DENIED, "null", "http://localhost.evil.example", "http://localhost:1/x",
                                    "https://127.0.0.1.evil.example"])
def test_other_origins(stack: Stack, origin: str) -> None:
    """Their preflight is an OPTIONS like any other; no answer carries a CORS header."""
    preflight = curl(url(stack), "-X", "OPTIONS", "-H", f"Origin: {origin}", "-H",
                     "Access-Control-Request-Method: POST")
    is_the_applications(preflight, 405, "method_not_allowed")
    for reply in (preflight, curl(url(stack), *FORM, "-H", f"Origin: {origin}"),
                  curl(url(stack, "/nothing"), "-H", f"Origin: {origin}")):
        assert reply.cors() == {}


# ---- the site for production ----


NAME = "invoices.example.org"  # as in nginx/README.md


def can_bind(address: str) -> bool:
    with closing(socket.socket(socket.AF_INET6)) as s:
        try:
            s.bind((address, 0))
        except OSError:
            return False
        return True


# The other address that the site listens on; on a machine without IPv6 a second one of IPv4.
OTHER = "[::1]" if can_bind("::1") else "127.0.0.4"

# What Debian's nginx.conf has, and what the site must not depend on.
NGINX_CONF = """
daemon off;
pid @DIR@/run/nginx.pid;
error_log @DIR@/error.log;
events { worker_connections 768; }
http {
    sendfile on;
    tcp_nopush on;
    types_hash_max_size 2048;
    default_type application/octet-stream;
    ssl_protocols TLSv1 TLSv1.1 TLSv1.2 TLSv1.3;
    ssl_prefer_server_ciphers on;
    access_log @DIR@/var/log/nginx/access.log;
    gzip on;
    client_body_temp_path @DIR@/var/lib/nginx/body;
    fastcgi_temp_path @DIR@/var/lib/nginx/fastcgi;
    proxy_temp_path @DIR@/var/lib/nginx/proxy;
    scgi_temp_path @DIR@/var/lib/nginx/scgi;
    uwsgi_temp_path @DIR@/var/lib/nginx/uwsgi;
    include @DIR@/etc/nginx/conf.d/*.conf;
    include @DIR@/etc/nginx/sites-enabled/*;
}
"""


class Site:
    """The site as an administrator installs it, below a directory in the root's place; a stand-in behind it."""

    def __init__(self, directory: Path, edit: Callable[[str], str] = lambda text: text) -> None:
        """edit: what the administrator changes in it."""
        directory.chmod(0o755)
        self.dir, self.port, self.https_port = directory, free_port(), free_port()
        for name in ("etc/nginx/sites-available", "etc/nginx/sites-enabled", "etc/nginx/conf.d", "var/log/nginx",
                     "var/lib/nginx", "var/www/html/.well-known/acme-challenge", "run/extract-fcgi", "etc/ssl"):
            (directory / name).mkdir(parents=True)
        (directory / "etc/nginx/sites-available/default").write_text("server { listen 80 default_server; }\n")
        (directory / "etc/nginx/sites-enabled/default").symlink_to("../sites-available/default")
        subprocess.run(["sh", "-e"], input=self.below(installation()), cwd=ROOT / "nginx", text=True, check=True,
                       capture_output=True)
        (directory / "etc/ssl/extract-fcgi").chmod(0o755)  # nginx is not started by root in every test
        site = directory / "etc/nginx/sites-available/extract-fcgi"
        site.write_text(self.with_ports(self.below(edit(site.read_text()))))
        (directory / "template").write_text(NGINX_CONF)
        self.stand_in = StandIn(directory / "run/extract-fcgi/pool.sock")
        self.process = start_nginx(directory / "etc/nginx", directory / "template", DIR=directory)
        eventually(lambda: listening(self.https_port), "the site listens")
        test = subprocess.run([NGINX, "-t", "-e", str(directory / "error.log"), "-c",
                               str(directory / "etc/nginx/nginx.conf")], capture_output=True, text=True)
        assert test.returncode == 0 and "[warn]" not in test.stderr, test.stderr

    def below(self, text: str) -> str:
        return re.sub(r"(?<=[\s':])/(?=(etc|var|run)/)", f"{self.dir}/", text)

    def with_ports(self, text: str) -> str:
        ports = {"80": self.port, "443": self.https_port}
        text, count = re.subn(r"(?m)^( +listen +)(\[::\]:)?(80|443)\b",
                              lambda m: f"{m[1]}{OTHER if m[2] else '127.0.0.1'}:{ports[m[3]]}", text)
        assert count in (6, 8)
        return text

    def curl(self, path: str, *arguments: str, to: str = "127.0.0.1") -> Reply:
        address = f"{NAME}:{self.https_port}"
        return curl(f"https://{address}{path}", "--resolve", f"{address}:{to}", *arguments)

    def fails(self, *arguments: str) -> int:
        """How curl ends where no answer comes."""
        out = subprocess.run(["curl", "-sik", "--max-time", str(PATIENCE), *arguments], capture_output=True)
        assert out.stdout == b""
        return out.returncode

    def s_client(self, *arguments: str) -> str:
        request = f"GET /healthz HTTP/1.1\nHost: {NAME}\nConnection: close\n\n" if "-ign_eof" in arguments else ""
        out = subprocess.run(["openssl", "s_client", "-connect", f"127.0.0.1:{self.https_port}", "-servername", NAME,
                              *arguments], input=request, capture_output=True, text=True, timeout=PATIENCE)
        return out.stdout + out.stderr

    def burst(self, *requests: str, source: str = "127.0.0.5") -> list[int]:
        """All at once over one connection; the statuses."""
        context = ssl.create_default_context(cafile=str(self.dir / "etc/ssl/extract-fcgi/cert.pem"))
        with socket.create_connection(("127.0.0.1", self.https_port), PATIENCE, (source, 0)) as plain, \
                context.wrap_socket(plain, server_hostname=NAME) as client:
            heads = [f"{request}\r\nHost: {NAME}\r\n" for request in requests]
            client.sendall(("\r\n".join(heads) + "Connection: close\r\n\r\n").encode())
            found = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", until_closed(client))]
        assert len(found) == len(requests)
        return found

    def close(self) -> None:
        self.stand_in.close()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(PATIENCE)


def installation() -> str:
    """The commands that nginx/README.md gives for installing the site, but for those that need a running nginx."""
    section = (ROOT / "nginx/README.md").read_text().partition("## Installing the site\n")[2].partition("\n## ")[0]
    commands = "\n".join(re.findall(r"(?m)^    (.*)$", section)).partition("\nnginx -t")[0]
    assert commands.startswith("install -d /etc/nginx/extract-fcgi\n") and "openssl req" in commands
    return commands


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="extract-site-") as name:
        site = Site(Path(name))
        yield site
        site.close()


@pytest.fixture(scope="module")
def balanced() -> Iterator[Site]:
    """As the README says: behind a load balancer, 127.0.0.5; a monitoring host, 127.0.0.7, let in; a front end."""
    def edit(text: str) -> str:
        text, lines = re.subn(r"# (set_real_ip_from|real_ip_header|real_ip_recursive)\b", r"\1", text)
        text, listens = re.subn(r"\n +listen +\S*443 .*default_server;", "", text)
        assert (lines, listens) == (3, 2)
        readme = (ROOT / "nginx/README.md").read_text()
        [location] = re.findall(r"(?m)^    location = /metrics \{\n(?:     .*\n)+    \}\n", readme)
        end = "    # Everything else."
        assert text.count(end) == 1
        text = text.replace(end, location.replace("192.0.2.5", "127.0.0.7") + end).replace("192.0.2.0/24", "127.0.0.5")
        text, pages = re.subn(r"(Everything else\..*\n    location / \{\n)        return 404;",
                              r"\1        root /var/www/html;", text)
        text, ours = re.subn(r"\n +root +/var/www/extract-fcgi;\n +include extract-fcgi/extract-fcgi-page\.conf;", "", text)
        assert pages == ours == 1
        return text

    with tempfile.TemporaryDirectory(prefix="extract-site-") as name:
        site = Site(Path(name), edit)
        (site.dir / "var/www/html/page.css").write_text("body {}")
        (site.dir / "var/www/html/index.html").write_text("<!doctype html>")
        yield site
        site.close()


def test_site(site: Site) -> None:
    """HTTP/2, no origin allowed, HSTS on every answer."""
    answers = [site.curl("/healthz"), site.curl("/nothing", "-H", f"Origin: {ALLOWED}"),
               site.curl("/extract?do=die", "-d", "x"), site.curl("/extract", "-X", "LOCK"),
               site.curl("/extract", "-d", "x", "--http1.1"),
               site.curl("/extract", "--http1.1", "-H", "Content-Length: 99999999999"),
               site.curl("/", "--http1.1", "-H", "X-A: " + "a" * 9000)]
    assert [answer.status for answer in answers] == [200, 404, 502, 405, 200, 413, 400]
    assert [answer.version for answer in answers] == ["HTTP/2"] * 4 + ["HTTP/1.1"] * 3
    for answer in answers:
        assert answer["Strict-Transport-Security"] == "max-age=63072000" and answer.cors() == {}
        is_hardened(answer)
    log = site.dir / "var/log/nginx/extract-fcgi.access.log"
    eventually(lambda: f"request_id={answers[1]['X-Request-ID']} app_request_id=-" in log.read_text())


def test_site_sends_to_https(site: Site) -> None:
    """Browsers, that is; a program that posts in the clear is told."""
    address = f"http://127.0.0.1:{site.port}"
    reply = curl(f"{address}/invoices?a=1", "-H", f"Host: {NAME}")
    assert (reply.status, reply["Location"], reply["Server"]) == (308, f"https://{NAME}/invoices?a=1", "nginx")
    before = len(site.stand_in.seen)
    refused = curl(f"{address}/extract", "-H", f"Host: {NAME}", "-d", "x")
    assert (refused.status, json.loads(refused.body)["code"], refused["Location"]) == (400, "bad_request", None)
    assert refused["X-Request-ID"] == json.loads(refused.body)["request_id"]
    assert len(site.stand_in.seen) == before
    (site.dir / "var/www/html/.well-known/acme-challenge/token").write_text("proof")
    challenge = curl(f"{address}/.well-known/acme-challenge/token", "-H", f"Host: {NAME}")
    assert (challenge.status, challenge.body) == (200, b"proof")


@pytest.mark.parametrize("arguments, shown", [
    (["-tls1_3"], r"New, TLSv1\.3, Cipher is TLS_(AES_(128|256)_GCM|CHACHA20_POLY1305)_SHA"),
    (["-tls1_2"], r"New, TLSv1\.2, Cipher is ECDHE-ECDSA-"),
    (["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-GCM-SHA256"], "Cipher is ECDHE-ECDSA-AES128-GCM-SHA256"),
    (["-tls1_2", "-cipher", "ECDHE-ECDSA-AES256-GCM-SHA384"], "Cipher is ECDHE-ECDSA-AES256-GCM-SHA384"),
    (["-tls1_2", "-cipher", "ECDHE-ECDSA-CHACHA20-POLY1305"], "Cipher is ECDHE-ECDSA-CHACHA20-POLY1305"),
    (["-groups", "X25519"], "Server Temp Key: X25519"), (["-groups", "P-256"], "Server Temp Key: ECDH, prime256v1"),
    (["-groups", "P-384"], "Server Temp Key: ECDH, secp384r1"),
    (["-tls1_2", "-cipher", "ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-ECDSA-AES128-GCM-SHA256"],
     "Cipher is ECDHE-ECDSA-CHACHA20"),
    (["-tls1_2", "-reconnect"], "Reused, TLSv1.2"), (["-tls1_2"], "Compression: NONE"),
    (["-tls1_3", "-ign_eof"], "Max Early Data: 0"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else value)
def test_tls(site: Site, arguments: list[str], shown: str) -> None:
    """Mozilla's "intermediate": what it offers; the client's order of ciphers counts; no ticket, no early data."""
    out = site.s_client(*arguments)
    assert re.search(shown, out), out
    assert "TLS session ticket:" not in out or "TLSv1.3" in out


@pytest.mark.parametrize("arguments", [
    ["-tls1_1", "-cipher", "ALL@SECLEVEL=0"], ["-tls1", "-cipher", "ALL@SECLEVEL=0"],
    ["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA256"], ["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA@SECLEVEL=0"],
    ["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-CCM"], ["-tls1_2", "-cipher", "AES128-GCM-SHA256"],
    ["-tls1_2", "-cipher", "DHE-RSA-AES128-GCM-SHA256"], ["-tls1_2", "-cipher", "aNULL@SECLEVEL=0"],
    ["-groups", "P-521"], ["-tls1_3", "-groups", "X448"], ["-tls1_3", "-groups", "ffdhe2048"],
], ids=" ".join)
def test_tls_refuses(site: Site, arguments: list[str]) -> None:
    out = site.s_client(*arguments)
    assert "alert" in out and "no peer certificate available" in out, out


def test_unknown_names(site: Site) -> None:
    """No certificate without the site's name, and no answer where the request asks for another."""
    address, before = f"https://127.0.0.1:{site.https_port}", len(site.stand_in.seen)
    assert site.fails(address) == 35
    other = f"other.example:{site.https_port}"
    assert site.fails(f"https://{other}", "--resolve", f"{other}:127.0.0.1") == 35
    ours = [f"https://{NAME}:{site.https_port}/healthz", "--resolve", f"{NAME}:{site.https_port}:127.0.0.1"]
    for host in ("other.example", "localhost", "127.0.0.1", f"{NAME}.evil.example", f"evil.{NAME}"):
        assert site.fails(*ours, "--http1.1", "-H", f"Host: {host}") in (52, 56)
        assert site.fails(*ours, "-H", f"Host: {host}") in (16, 52, 56, 92)
        assert site.fails(f"http://127.0.0.1:{site.port}/healthz", "-H", f"Host: {host}") in (52, 56)
    assert raw(site.port, b"GET / HTTP/1.0\r\n\r\n") == b""
    assert len(site.stand_in.seen) == before
    assert site.curl("/healthz", "-H", f"Host: {NAME.upper()}.:443").status == 200


@pytest.mark.parametrize("request_", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
                                      b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n"], ids=["nonsense", "host", "uri"])
def test_malformed_request_without_a_name(site: Site, request_: bytes) -> None:
    """nginx says what is wrong, and not who it is."""
    for port in (site.port, site.https_port):
        reply = Reply(raw(port, request_))
        assert 400 <= reply.status < 500 and reply["Server"] == "nginx"
        assert not re.search(rb"nginx/|/etc|/tmp|extract", reply.body)


def test_plain_http_on_the_sites_tls_port(site: Site) -> None:
    reply = curl(f"http://127.0.0.1:{site.https_port}/extract", "-H", f"Host: {NAME}", "-d", "x")
    is_own(reply, 400, "bad_request", False, False)


@pytest.mark.parametrize("path", ["/readyz", "/metrics", "/admin/tokens"])
def test_this_machine_is_also_its_ipv6_address(site: Site, path: str) -> None:
    assert site.curl(path, "--interface", "127.0.0.1").status == 200
    assert (site.curl(path, to=OTHER).status == 200) == (OTHER == "[::1]")
    assert site.curl(path, "--interface", "127.0.0.2").status == 404


def test_monitoring_host(balanced: Site) -> None:
    metrics = balanced.curl("/metrics", "--interface", "127.0.0.7")
    assert metrics.status == 200
    is_hardened(metrics)
    for source in ("127.0.0.1", "127.0.0.5", "127.0.0.8"):
        is_own(balanced.curl("/metrics", "--interface", source), 404, "not_found", False, False)
    is_own(balanced.curl("/readyz", "--interface", "127.0.0.7"), 404, "not_found", False, False)


def test_page_of_the_site(site: Site) -> None:
    """It is where the README has it put."""
    for path, name in PATHS.items():
        page = site.curl(path)
        is_of_the_page(page, TYPES[Path(name).suffix])
        assert page.body == (PAGE / name).read_bytes() and page["Strict-Transport-Security"]


def test_front_end(balanced: Site) -> None:
    """Its pages have no policy of ours, and caches may keep them; what is not there is answered as everywhere."""
    for path, body in (("/page.css", b"body {}"), ("/", b"<!doctype html>")):
        page = balanced.curl(path, "-H", f"Origin: {DENIED}")
        assert (page.status, page.body) == (200, body)
        assert page["Strict-Transport-Security"] and page["X-Content-Type-Options"] == "nosniff"
        assert not {"content-security-policy", "cache-control", "x-request-id"} & page.headers.keys() and page.cors() == {}
    is_own(balanced.curl("/extract-fcgi/page.js"), 404, "not_found", False, False)
    is_own(balanced.curl("/nothing.css"), 404, "not_found", False, False)


def test_balancer_that_says_no_name(balanced: Site) -> None:
    assert curl(f"https://127.0.0.1:{balanced.https_port}/healthz", "--interface", "127.0.0.5").status == 200


@pytest.mark.parametrize("path", ["/readyz", "/metrics", "/admin/tokens"])
def test_balancer_is_not_this_machine(balanced: Site, path: str) -> None:
    """Whatever it says of its client."""
    for header in ("A: b", "X-Forwarded-For: 127.0.0.1", "X-Forwarded-For: ::1", "X-Forwarded-For: ::1, 127.0.0.1",
                   "X-Forwarded-For: 203.0.113.9", "X-Forwarded-For: unix:"):
        is_own(balanced.curl(path, "--interface", "127.0.0.5", "-H", header), 404, "not_found", False, False)


def test_address_behind_a_balancer(balanced: Site) -> None:
    """The one that the balancer has seen; what its client or a stranger claims does not count."""
    def seen(source: str, header: str) -> str:
        assert balanced.curl("/healthz", "--interface", source, "-H", header).status == 200
        return balanced.stand_in.seen[-1]["REMOTE_ADDR"]

    assert seen("127.0.0.5", "X-Forwarded-For: 203.0.113.9") == "203.0.113.9"
    assert seen("127.0.0.5", "X-Forwarded-For: 127.0.0.1, 203.0.113.9") == "203.0.113.9"
    assert seen("127.0.0.5", "X-Forwarded-For: 203.0.113.9, 127.0.0.5") == "203.0.113.9"
    assert seen("127.0.0.5", "X-Real-IP: 203.0.113.9") == "127.0.0.5"
    assert seen("127.0.0.6", "X-Forwarded-For: 203.0.113.9") == "127.0.0.6"


def test_limit_counts_the_client_not_its_balancer(balanced: Site) -> None:
    """An IPv6 network counts as one, an IPv4 address by itself; what no process serves is not counted."""
    def refused(*clients: str, path: str = "/healthz") -> int:
        return balanced.burst(*(f"GET {path} HTTP/1.1\r\nX-Forwarded-For: {client}" for client in clients)).count(429)

    assert refused(*(f"203.0.113.{n}" for n in range(120))) == 0
    assert refused(*["198.51.100.1"] * 120) > 30
    assert refused("198.51.100.2") == 0
    assert refused(*(f"2001:db8:0:1::{n:x}" for n in range(120))) > 30
    assert refused(*["2001:db8:0:1:a:b:c:d"] * 20) > 0  # twenty: on a slow machine there is room again for some
    assert refused(*(f"2001:db8:0:{n + 2:x}::1" for n in range(120))) == 0
    assert refused(*["::ffff:198.51.100.3"] * 120) > 30
    assert refused("::ffff:198.51.100.4") == 0
    assert refused(*["127.0.0.1"] * 120) == 0
    assert refused(*["198.51.100.5"] * 120, path="/page.css") == 0


def test_site_agrees_with_the_service() -> None:
    """Numbers that stand in two places: the limit of an upload, times above the service's deadline, limits."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("EXTRACT_")}
    config = subprocess.run([str(BUILD / "extract-fcgi"), "--check-config"], env=env, capture_output=True, text=True,
                            check=True).stdout
    locations, site, run = ((ROOT / "nginx" / name).read_text() for name in
                            ("extract-fcgi-locations.conf", "extract-fcgi.site.conf", "run.conf.in"))
    assert "\nmax_upload = 50M\n" in config and re.search(r"^ +client_max_body_size 50m;", site, re.M)
    assert "\ndeadline = 2m\n" in config and re.search(r"^fastcgi_read_timeout +150s;", locations, re.M)
    limits = r"(?m)^ *((?:limit_|client_max_body_size|set \$).*;)$"
    assert re.findall(limits, site) == re.findall(limits, run) != []
