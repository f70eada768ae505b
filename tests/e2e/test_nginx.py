"""nginx/ as it ships: limits, nginx's own answers, CORS, what is for this machine only, and the log.

The client is curl, which speaks HTTP/2. Behind nginx is the real pool, but for the ways to die, which a stand-in
dies on demand.
"""
from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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


def is_the_applications(reply: Reply, status: int, code: str) -> None:
    assert (reply.status, json.loads(reply.body)["code"]) == (status, code)
    assert reply["X-Request-ID"] == json.loads(reply.body)["request_id"]
    assert re.fullmatch("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", reply["X-Request-ID"] or "")
    assert reply["Content-Type"] == "application/problem+json"


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
    """A FastCGI server that reads a request and then does what its header X-Do says."""

    def __init__(self, path: Path) -> None:
        self.seen: list[bytes] = []  # parameters, as they came
        self.over = threading.Event()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        path.chmod(0o777)
        self.listener.listen(64)
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            params = b""
            while len(head := stream.read(8)) == 8:
                _, kind, _, size, padding, _ = struct.unpack(">BBHHBB", head)
                content = stream.read(size + padding)[:size]
                params += content if kind == FastCgi.PARAMS else b""
                if kind == FastCgi.STDIN and size == 0 or kind == FastCgi.PARAMS and b"HTTP_X_DOdie early" in params:
                    break
            self.seen.append(params)
            do = params.partition(b"HTTP_X_DO")[2]
            if do.startswith(b"die in header"):
                self.write(connection, b"X-Request-ID: 0190\n")
            elif do.startswith(b"die in body"):
                self.write(connection, b"Content-Type: text/plain\r\nContent-Length: 1000\r\n\r\nabc")
            elif do.startswith(b"silence"):
                self.over.wait(PATIENCE)

    @staticmethod
    def write(connection: socket.socket, content: bytes) -> None:
        connection.sendall(struct.pack(">BBHHBB", 1, FastCgi.STDOUT, 1, len(content), 0, 0) + content)

    def close(self) -> None:
        self.over.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


class Front:
    """nginx with a stand-in behind it, which it knows as two servers; it waits 1 s for an answer, not 150."""

    def __init__(self, directory: Path, certificate: Path) -> None:
        directory.chmod(0o755)
        self.port, self.https_port = free_port(), free_port()
        nginx = directory / "nginx"
        shutil.copytree(ROOT / "nginx", nginx)
        text = (nginx / "extract-fcgi-locations.conf").read_text()
        assert "fastcgi_read_timeout        150s;" in text
        (nginx / "extract-fcgi-locations.conf").write_text(text.replace("fastcgi_read_timeout        150s;",
                                                                        "fastcgi_read_timeout 1s;"))
        template = (nginx / "run.conf.in").read_text()
        assert "server unix:@SOCKET@;" in template
        (nginx / "run.conf.in").write_text(template.replace("server unix:@SOCKET@;",
                                                            "server unix:@SOCKET@ max_fails=0;" * 2))
        (directory / "server.d").mkdir()
        shutil.copytree(certificate, directory / "tls")
        self.stand_in = StandIn(directory / "pool.sock")
        self.process = start_nginx(directory, nginx / "run.conf.in", DIR=directory, NGINX=nginx,
                                   SOCKET=directory / "pool.sock", HTTPS_PORT=self.https_port, HTTP_PORT=self.port)
        eventually(lambda: listening(self.port), "nginx listens")

    def close(self) -> None:
        self.stand_in.close()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(PATIENCE)


@pytest.fixture(scope="module")
def front(certificate: Path) -> Iterator[Front]:
    with tempfile.TemporaryDirectory(prefix="extract-front-") as name:
        front = Front(Path(name), certificate)
        yield front
        front.close()


@BOTH
@pytest.mark.parametrize("do", ["die", "die early", "die in header"])
def test_process_that_dies(front: Front, do: str, http: int) -> None:
    reply = curl(url(front, http=http), *FORM, "-H", f"X-Do: {do}", "-H", f"Origin: {ALLOWED}")
    is_own(reply, 502, "internal_error", False, True)
    assert reply.cors() == CORS


@BOTH
def test_process_that_does_not_answer(front: Front, http: int) -> None:
    reply = curl(url(front, http=http), *FORM, "-H", "X-Do: silence", "-H", f"Origin: {ALLOWED}")
    is_own(reply, 504, "deadline_exceeded", False, True)
    assert reply.cors() == CORS


def test_process_that_dies_in_its_answer(front: Front) -> None:
    """The client sees that the answer is not whole."""
    out = subprocess.run(["curl", "-sk", *FORM, "-H", "X-Do: die in body", url(front)],
                         capture_output=True, timeout=PATIENCE)
    assert out.returncode in (18, 92)


def test_request_is_sent_once(front: Front) -> None:
    before = len(front.stand_in.seen)
    curl(url(front), *FORM, "-H", "X-Do: die")
    assert len(front.stand_in.seen) == before + 1


def test_parameters(front: Front) -> None:
    """What passes on to the application; a client's "Proxy:" header does not."""
    curl(url(front, "/extract?a=b"), "-d", "x", "-H", "Proxy: http://evil", "-H", "Authorization: Bearer k",
         "-H", "Idempotency-Key: i", "-H", "X-Do: die")
    params = front.stand_in.seen[-1]
    for pair in (b"REQUEST_METHODPOST", b"DOCUMENT_URI/extract", b"REQUEST_URI/extract?a=b", b"CONTENT_LENGTH1",
                 b"HTTP_AUTHORIZATIONBearer k", b"HTTP_IDEMPOTENCY_KEYi", b"REMOTE_ADDR127.0.0.1", b"HTTPSon"):
        assert pair in params, pair
    assert re.search(rb"PROXY_REQUEST_ID[0-9a-f]{32}", params)
    assert b"evil" not in params and b"REQUEST_BODY_FILE" not in params


@pytest.mark.parametrize("raw, status", [
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
def test_malformed_request(stack: Stack, raw: bytes, status: int) -> None:
    with socket.create_connection(("127.0.0.1", stack.port), timeout=PATIENCE) as client:
        client.sendall(raw)
        out = b""
        while not out.endswith(b"}") and (piece := client.recv(65536)):
            out += piece
    reply = Reply(out)
    is_own(reply, status, "bad_request" if status == 400 else "method_not_allowed", False, False)
    assert status == 400 or reply["Allow"]


def test_plain_http_on_the_tls_port(stack: Stack) -> None:
    is_own(curl(f"http://127.0.0.1:{stack.https_port}/extract"), 400, "bad_request", False, False)


def test_upload_that_nginx_cannot_keep(make_stack: Callable[..., Stack], tmp_path: Path) -> None:
    stack = make_stack()
    shutil.rmtree(stack.dir / "body")
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    is_own(curl(url(stack), "--data-binary", f"@{tmp_path / 'file'}"), 500, "internal_error", False, False)


@BOTH
@pytest.mark.parametrize("path", ["/", "/nothing", "/extract/", "/.extract-fcgi/413", "/.extract-fcgi/", "/admin"])
def test_unknown_path(stack: Stack, path: str, http: int) -> None:
    is_own(curl(url(stack, path, http)), 404, "not_found", False, False)


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
    found = re.search(r'"POST /extract HTTP/1.1" 200 request_id=([0-9a-f]{32}) app_request_id=\S+ bytes_in=\d+ '
                      r'bytes_out=\d+ time=[0-9.]+ connect=[0-9.]+ header=[0-9.]+ upstream=[0-9.]+ '
                      r'upstream_status=200 ', line)
    assert found, line
    entry = stack.rows("SELECT Message FROM ApplicationLogs WHERE RequestID = ?", ours)[0]
    assert entry["Message"].endswith(f"proxy_request_id={found[1]}")


# ---- this machine only ----


@BOTH
@pytest.mark.parametrize("path", ["/readyz", "/metrics", "/admin/tokens", "/admin/usage?limit=1"])
def test_loopback_only(stack: Stack, path: str, http: int) -> None:
    here = curl(url(stack, path, http))
    if path.startswith("/admin"):
        is_the_applications(here, 404, "not_found")
    else:
        assert here.status == 200
    is_own(curl(url(stack, path, http), "--interface", "127.0.0.2"), 404, "not_found", False, False)


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
        "access-control-allow-headers": ["Authorization, Content-Type, Idempotency-Key"]}


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


@pytest.fixture(scope="module")
def site(certificate: Path) -> Iterator[tuple[int, int, Path]]:
    """The site as it is installed, in an nginx.conf like Debian's; only ports and directories are others."""
    directory = Path(tempfile.mkdtemp(prefix="extract-site-"))
    directory.chmod(0o755)
    http, https = free_port(), free_port()
    (directory / "extract-fcgi").mkdir()
    for file in (ROOT / "nginx").glob("extract-fcgi-*.conf"):
        shutil.copy(file, directory / "extract-fcgi")
    shutil.copytree(certificate, directory / "tls")
    text = (ROOT / "nginx/extract-fcgi.site.conf").read_text()
    for old, new in {"      80;": f" 127.0.0.1:{http};", "[::]:80;": f"127.0.0.4:{http};",
                     "      443 ssl": f" 127.0.0.1:{https} ssl", "[::]:443 ssl": f"127.0.0.4:{https} ssl",
                     "/etc/ssl/extract-fcgi": f"{directory}/tls", "/var/log/nginx": str(directory),
                     "/run/extract-fcgi": str(directory)}.items():
        assert old in text
        text = text.replace(old, new)
    (directory / "site.conf").write_text(text)
    temporary = "".join(f"{name}_temp_path {directory}/{name};" for name in
                        ("client_body", "fastcgi", "proxy", "scgi", "uwsgi"))
    (directory / "template").write_text(
        f"daemon off; pid {directory}/nginx.pid; error_log {directory}/error.log; events {{}}\n"
        f"http {{ {temporary} default_type application/octet-stream; gzip on; access_log {directory}/access.log;\n"
        f"include {directory}/site.conf; }}\n")
    process = start_nginx(directory, directory / "template")
    test = subprocess.run([NGINX, "-t", "-p", str(directory), "-e", str(directory / "error.log"), "-c",
                           str(directory / "nginx.conf")], capture_output=True, text=True)
    assert test.returncode == 0 and "[warn]" not in test.stderr, test.stderr
    eventually(lambda: listening(https), "the site listens")
    yield http, https, directory
    process.send_signal(signal.SIGTERM)
    process.wait(PATIENCE)
    shutil.rmtree(directory)


def test_site_sends_to_https(site: tuple[int, int, Path]) -> None:
    reply = curl(f"http://127.0.0.1:{site[0]}/extract?a=1", "-H", "Host: extract.example.com", "-d", "x")
    assert (reply.status, reply["Location"]) == (308, "https://extract.example.com/extract?a=1")


def test_site(site: tuple[int, int, Path]) -> None:
    """HTTP/2, TLS 1.2 or later, HSTS also on errors, no origin allowed, nobody behind it."""
    address = f"https://127.0.0.1:{site[1]}"
    missing = curl(f"{address}/nothing", "-H", f"Origin: {ALLOWED}")
    is_own(missing, 404, "not_found", False, False)
    assert (missing.version, missing["Server"], missing.cors()) == ("HTTP/2", "nginx", {})
    assert curl(f"{address}/extract", "--tls-max", "1.2").status == 503
    refused = subprocess.run(["curl", "-sk", "--ciphers", "DEFAULT@SECLEVEL=0", "--tlsv1.1", "--tls-max", "1.1",
                              address], capture_output=True)
    assert refused.returncode == 35
    absent = curl(f"{address}/extract", "-d", "x")
    is_own(absent, 503, "overloaded", True, False, "5")
    assert absent["Strict-Transport-Security"] == missing["Strict-Transport-Security"] == "max-age=63072000"
    log = site[2] / "extract-fcgi.access.log"
    eventually(lambda: f"request_id={absent['X-Request-ID']} app_request_id=-" in log.read_text())


def test_site_agrees_with_the_service() -> None:
    """Numbers that stand in two places: the limit of an upload, and times above the service's deadline."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("EXTRACT_")}
    config = subprocess.run([str(BUILD / "extract-fcgi"), "--check-config"], env=env, capture_output=True, text=True,
                            check=True).stdout
    locations = (ROOT / "nginx/extract-fcgi-locations.conf").read_text()
    assert "\nmax_upload = 50M\n" in config and re.search(r"^client_max_body_size +50m;", locations, re.M)
    assert "\ndeadline = 2m\n" in config and re.search(r"^fastcgi_read_timeout +150s;", locations, re.M)
