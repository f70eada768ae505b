"""The way of the bytes: an upload into the pool, by the socket and by path; the file out of it, to Gemini."""
from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from broken import padded_pdf
from conftest import (PATIENCE, ROOT, Answer, Emulator, Stack, TlsFront, eventually, form, free_port, listening,
                      start_nginx)

MIB = 1024 * 1024
ENVELOPE = len(form(b"")[0])  # of a form, without its file
BOUNDARY = "multipart/form-data; boundary=x"


@pytest.fixture(scope="module")
def _by_path(_emulator: Emulator, certificate: Path) -> Iterator[Stack]:
    stack = Stack(_emulator, certificate, by_path=True, env={"EXTRACT_SERVER_MAX_UPLOAD": "30M"})
    stack.token(key="key")
    yield stack
    stack.close()


@pytest.fixture
def by_path(_by_path: Stack, emulator: Emulator) -> Iterator[Stack]:
    """Uploads by path, at most 30 MB; company NT047 has a token."""
    yield _by_path
    _by_path.balanced()
    eventually(lambda: uploads(_by_path) == [], "nginx has removed the uploads")


@pytest.fixture(params=["stdin", "path"])
def either(request: pytest.FixtureRequest, stack: Stack, by_path: Stack) -> Stack:
    """Company NT047 has a token on both."""
    if request.param == "path":
        return by_path
    if not stack.sql("SELECT 1 FROM TokenMaster WHERE CompanyID = 'NT047'"):
        stack.token()
    return stack


def uploads(stack: Stack) -> list[Path]:
    """The files that nginx keeps for uploads; the tests' own names begin with a letter."""
    return [path for path in (stack.dir / "body").rglob("*") if path.name[0].isdigit() and path.is_file()]


def arrived(emulator: Emulator, file: bytes) -> bool:
    """Is it the one file that Gemini was sent, byte for byte?"""
    calls = emulator.log()
    return [(call["file_bytes"], call["file_sha256"]) for call in calls] == [
        (len(file), hashlib.sha256(file).hexdigest())]


def is_internal_error(answer: Answer, *secrets: object) -> None:
    """A 500 with the words of the table, that says nothing of paths."""
    problem = answer.json()
    assert (answer.status, problem["code"], problem["detail"]) == (500, "internal_error", "An internal error occurred.")
    assert (problem["retryable"], problem["spent"]) == (False, False)
    for secret in secrets:
        assert str(secret).encode() not in answer.body


# ---- into the pool ----


@pytest.mark.parametrize("size", [MIB, 8 * MIB, 8 * MIB + 1, 20 * MIB], ids=["1MiB", "8MiB", "8MiB+1", "20MiB"])
def test_upload_of_size(either: Stack, emulator: Emulator, size: int) -> None:
    """The whole body has this size: it lies in memory up to 8 MiB, in a file above."""
    file = padded_pdf(size - ENVELOPE)
    assert len(form(file)[0]) == size
    assert either.post(file).status == 200
    assert arrived(emulator, file)


def test_upload_over_http2(either: Stack, emulator: Emulator, tmp_path: Path) -> None:
    file = padded_pdf(3 * MIB)
    (tmp_path / "file").write_bytes(file)
    out = subprocess.run(
        ["curl", "-sS", "--http2", "--cacert", str(either.dir / "tls/cert.pem"), "-w", "%{http_version} %{http_code}",
         "-o", "/dev/null", "-F", "companyID=NT047", "-F", "username=anna", "-F", f"file=@{tmp_path / 'file'}",
         f"https://localhost:{either.https_port}/extract"], capture_output=True, text=True, timeout=PATIENCE)
    assert out.stdout == "2 200", out
    assert arrived(emulator, file)


def test_upload_in_chunks(either: Stack, emulator: Emulator) -> None:
    """HTTP/1.1 without a Content-Length."""
    file = padded_pdf(2 * MIB)
    body, content_type = form(file)
    with closing(http.client.HTTPConnection("127.0.0.1", either.port, timeout=PATIENCE)) as client:
        client.request("POST", "/extract", iter([body[:7], body[7:MIB], body[MIB:]]),
                       {"Content-Type": content_type, "Transfer-Encoding": "chunked"}, encode_chunked=True)
        assert client.getresponse().status == 200
    assert arrived(emulator, file)


@pytest.mark.parametrize("body", [b"", b"x"], ids=["0 B", "1 B"])
def test_tiny_body(either: Stack, emulator: Emulator, body: bytes) -> None:
    answer = either.request("POST", "/extract", body, {"Content-Type": BOUNDARY})
    assert (answer.status, answer.code) == (400, "bad_request")
    assert emulator.log() == []


@pytest.mark.parametrize("file, status, code", [(b"", 422, "invalid_file"), (b"%", 415, "unsupported_media_type")],
                         ids=["0 B", "1 B"])
def test_tiny_file(either: Stack, emulator: Emulator, file: bytes, status: int, code: str) -> None:
    answer = either.post(file)
    assert (answer.status, answer.code) == (status, code)
    assert emulator.log() == []


def test_upload_over_the_limit_of_the_pool(by_path: Stack, emulator: Emulator) -> None:
    """30 MB here, below nginx's 50 MB: the application answers, in the same shape."""
    over = by_path.request("POST", "/extract", bytes(30 * MIB + 1), {"Content-Type": BOUNDARY})
    problem = over.json()
    assert (over.status, problem["code"], problem["spent"]) == (413, "file_too_large", False)
    assert problem["detail"] == "The upload is larger than the limit of 30 MB (31457280 bytes)."
    nginx = by_path.request("POST", "/extract", bytes(50 * MIB + 1), {"Content-Type": BOUNDARY}).json()
    assert nginx["detail"] == "The upload is larger than the limit of 50 MB (52428800 bytes)."
    assert list(nginx) == list(problem)
    assert {**nginx, "detail": 0, "request_id": 0} == {**problem, "detail": 0, "request_id": 0}
    file = padded_pdf(30 * MIB - ENVELOPE)
    assert by_path.post(file).status == 200
    assert arrived(emulator, file)


def test_upload_is_there_until_the_answer(by_path: Stack, emulator: Emulator, crowd: ThreadPoolExecutor,
                                          pdf: bytes) -> None:
    """One file, nginx's own, while the call runs; none afterwards."""
    emulator.script("key", {"hold": True})
    answer = crowd.submit(by_path.post, pdf)
    emulator.wait(held=1)
    files = uploads(by_path)
    assert [path.stat().st_mode & 0o777 for path in files] == [0o600]
    emulator.release()
    assert answer.result(PATIENCE).status == 200
    eventually(lambda: uploads(by_path) == [])


def test_many_uploads_by_path(by_path: Stack, emulator: Emulator, crowd: ThreadPoolExecutor, pdf: bytes) -> None:
    files = [pdf + b"%% %d\n" % n for n in range(40)]
    answers = [crowd.submit(by_path.post, file) for file in files]
    assert {answer.result(PATIENCE).status for answer in answers} == {200}
    assert {call["file_sha256"] for call in emulator.log()} == {hashlib.sha256(file).hexdigest() for file in files}


def test_no_spool_is_left(stack: Stack, company: str) -> None:
    """Uploads by the socket leave no file behind, and are in none that has a name."""
    stack.token(company)
    before = sorted(path.name for path in stack.dir.iterdir())
    assert stack.post(padded_pdf(2 * MIB), company).status == 200
    assert sorted(path.name for path in stack.dir.iterdir()) == before


# ---- REQUEST_BODY_FILE from who should not be trusted ----


@pytest.fixture
def body_dir(by_path: Stack, pdf: bytes) -> Iterator[Path]:
    """A directory of the test's own below body_file_dir. Beside body_file_dir lies an upload that is in order."""
    directory = by_path.dir / "body" / "mine"
    directory.mkdir()
    body, _ = plain_form(pdf)
    (by_path.dir / "outside").write_bytes(body)
    sibling = by_path.dir / "body-2"
    sibling.mkdir()
    (sibling / "file").write_bytes(body)
    yield directory
    shutil.rmtree(directory)
    shutil.rmtree(sibling)
    (by_path.dir / "outside").unlink()


def plain_form(file: bytes) -> tuple[bytes, str]:
    """A form with a boundary that is always the same."""
    body, content_type = form(file)
    boundary = content_type.partition("=")[2]
    return body.replace(boundary.encode(), b"x"), BOUNDARY


def outside(directory: Path) -> Path:
    return directory.parent.parent / "outside"


def link(directory: Path, name: str, target: Path) -> Path:
    (directory / name).symlink_to(target)
    return directory / name


def fifo(directory: Path) -> Path:
    os.mkfifo(directory / "fifo")
    return directory / "fifo"


@pytest.mark.parametrize("attack", [
    pytest.param(lambda d: outside(d), id="outside"),
    pytest.param(lambda d: f"{d.parent}/../outside", id="dot dot"),
    pytest.param(lambda d: f"{d}/../../outside", id="dot dot further down"),
    pytest.param(lambda d: link(d, "link", outside(d)), id="link to a file outside"),
    pytest.param(lambda d: link(d, "up", d.parent.parent) / "outside", id="link to a directory outside"),
    pytest.param(lambda d: link(d, "self", Path(".")) / "file", id="link to a directory inside"),
    pytest.param(lambda d: link(d, "link", Path("file")), id="link to a file inside"),
    pytest.param(lambda d: d.parent.parent / "body-2" / "file", id="directory of nearly the same name"),
    pytest.param(lambda d: d, id="directory"),
    pytest.param(lambda d: d.parent, id="the directory itself"),
    pytest.param(fifo, id="FIFO"),
    pytest.param(lambda d: d / "missing", id="missing"),
    pytest.param(lambda d: "outside", id="relative"),
    pytest.param(lambda d: "/dev/zero", id="device"),
    pytest.param(lambda d: "/proc/self/fd/0", id="descriptor"),
    pytest.param(lambda d: f"{d}/{'x' * 5000}", id="too long"),
])
def test_body_file_that_is_none(by_path: Stack, emulator: Emulator, body_dir: Path, pdf: bytes,
                                attack: Callable[[Path], object]) -> None:
    body, content_type = plain_form(pdf)
    (body_dir / "file").write_bytes(body)
    path = attack(body_dir)
    answer = by_path.fastcgi(b"", CONTENT_TYPE=content_type, CONTENT_LENGTH=str(len(body)), REQUEST_BODY_FILE=str(path))
    is_internal_error(answer, by_path.dir, "outside", "file")
    entry = by_path.rows("SELECT LogLevel, Message, Exception FROM ApplicationLogs WHERE RequestID = ?",
                         answer.json()["request_id"])[0]
    assert entry["LogLevel"] == "ERROR" and "REQUEST_BODY_FILE" in entry["Exception"]
    assert str(by_path.dir) not in entry["Message"] + entry["Exception"]
    assert emulator.log() == []


@pytest.mark.parametrize("spelling", ["{}/file", "{}//file", "{}/./file"])
def test_body_file_that_is_one(by_path: Stack, emulator: Emulator, body_dir: Path, pdf: bytes, spelling: str) -> None:
    body, content_type = plain_form(pdf)
    (body_dir / "file").write_bytes(body)
    answer = by_path.fastcgi(b"", CONTENT_TYPE=content_type, CONTENT_LENGTH=str(len(body)),
                             REQUEST_BODY_FILE=spelling.format(body_dir))
    assert answer.status == 200
    assert arrived(emulator, pdf)


@pytest.mark.parametrize("difference", [-1, 1])
def test_body_file_of_another_length(by_path: Stack, emulator: Emulator, body_dir: Path, pdf: bytes,
                                     difference: int) -> None:
    body, content_type = plain_form(pdf)
    (body_dir / "file").write_bytes(body)
    answer = by_path.fastcgi(b"", CONTENT_TYPE=content_type, CONTENT_LENGTH=str(len(body) + difference),
                             REQUEST_BODY_FILE=str(body_dir / "file"))
    assert (answer.status, answer.code) == (400, "bad_request")
    assert emulator.log() == []


def test_body_file_where_none_is_expected(stack: Stack, emulator: Emulator, pdf: bytes, tmp_path: Path) -> None:
    """Without body_file_dir every path is refused."""
    body, content_type = plain_form(pdf)
    (tmp_path / "file").write_bytes(body)
    answer = stack.fastcgi(body, CONTENT_TYPE=content_type, REQUEST_BODY_FILE=str(tmp_path / "file"))
    is_internal_error(answer, tmp_path)
    entry = stack.rows("SELECT Exception FROM ApplicationLogs WHERE RequestID = ?", answer.json()["request_id"])[0]
    assert "server.body_file_dir is not set" in entry["Exception"]
    assert emulator.log() == []


# ---- out of the pool ----


def test_connections_to_gemini_are_kept(make_stack: Callable[..., Stack], emulator: Emulator, pdf: bytes) -> None:
    """One worker needs one connection for all its calls."""
    stack = make_stack(env={"EXTRACT_SERVER_THREADS": "1"})
    stack.token()
    for _ in range(20):
        assert stack.post(pdf).status == 200
    calls = emulator.log()
    assert len(calls) == 20 and len({call["connection"] for call in calls}) == 1
    assert all(int(call["http_headers"]["content-length"]) == call["request_bytes"] for call in calls)
    assert not any("expect" in call["http_headers"] or "transfer-encoding" in call["http_headers"] for call in calls)


@pytest.fixture
def tls_stack(make_stack: Callable[..., Stack], tls_front: TlsFront) -> Stack:
    stack = make_stack(base_url=tls_front.url, env={
        "EXTRACT_GEMINI_CA_FILE": str(tls_front.ca_file), "EXTRACT_SERVER_THREADS": "16"})
    stack.token()
    return stack


def test_gemini_over_tls(tls_stack: Stack, emulator: Emulator, crowd: ThreadPoolExecutor,
                         pdf: bytes) -> None:
    """Connections end after three requests; 50 one after the other and 64 at once all succeed, and no call is made
    that nobody knows of."""
    files = [pdf + b"%% %d\n" % n for n in range(50 + 64)]
    answers = [tls_stack.post(file) for file in files[:50]]
    answers += [answer.result(2 * PATIENCE) for answer in [crowd.submit(tls_stack.post, file) for file in files[50:]]]
    assert {answer.status for answer in answers} == {200}
    calls = emulator.log()
    assert len(calls) == sum(answer.json()["attempts"] for answer in answers)
    assert {call["file_sha256"] for call in calls} == {hashlib.sha256(file).hexdigest() for file in files}
    assert {call["http_headers"]["x-front-protocol"] for call in calls} == {"HTTP/1.1"}
    connections = [call["http_headers"]["x-front-connection"] for call in calls]
    assert max(connections.count(connection) for connection in connections) == 3
    assert len(tls_stack.sql("SELECT 1 FROM TokenUsageLogs WHERE RequestCount = 1 AND UnknownCalls = 0")) == 114
    tls_stack.balanced()


def test_large_file_over_tls(tls_stack: Stack, emulator: Emulator) -> None:
    file = padded_pdf(20 * MIB)
    assert tls_stack.post(file).status == 200
    assert arrived(emulator, file)


@pytest.fixture(scope="module")
def stranger(_emulator: Emulator) -> Iterator[TlsFront]:
    """The emulator behind a certificate for another name than localhost."""
    directory = Path(tempfile.mkdtemp(prefix="extract-stranger-"))
    directory.chmod(0o755)
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
                    "/CN=gemini.example", "-addext", "subjectAltName=DNS:gemini.example", "-keyout", "key.pem", "-out",
                    "cert.pem"], cwd=directory, check=True, capture_output=True)
    port = free_port()
    process = start_nginx(directory, ROOT / "tests/emulator/tls_front.conf.in", DIR=directory, PORT=port,
                          UPSTREAM=f"127.0.0.1:{_emulator.port}")
    eventually(lambda: listening(port), "the stranger listens")
    yield TlsFront(f"https://localhost:{port}", directory / "cert.pem")
    process.send_signal(signal.SIGTERM)
    process.wait(PATIENCE)
    shutil.rmtree(directory)


@pytest.mark.parametrize("case", ["another name", "another authority", "the system's authorities"])
def test_certificate_is_checked(make_stack: Callable[..., Stack], emulator: Emulator, tls_front: TlsFront,
                                stranger: TlsFront, pdf: bytes, case: str) -> None:
    """Nothing is sent, and so nothing is spent."""
    url, ca_file = {"another name": (stranger.url, stranger.ca_file),
                    "another authority": (tls_front.url, stranger.ca_file),
                    "the system's authorities": (tls_front.url, None)}[case]
    stack = make_stack(base_url=url, env={"EXTRACT_GEMINI_CA_FILE": str(ca_file)} if ca_file else {})
    stack.token()
    answer = stack.post(pdf)
    problem = answer.json()
    assert (answer.status, problem["code"], problem["detail"]) == (
        502, "upstream_unavailable", "Failed to process invoice")
    assert (problem["retryable"], problem["spent"]) == (True, False)
    assert int(answer.headers["Retry-After"]) > 0
    assert emulator.log() == []
    attempts = stack.rows("SELECT ErrorMessage, StatusCode FROM RetryAttempts", count=4)
    assert len(attempts) == 4
    assert all(row["StatusCode"] is None and "certificate" in row["ErrorMessage"].lower() for row in attempts), attempts
    assert stack.sql("SELECT State, UnknownCalls FROM TokenReservations") == [{"State": "released", "UnknownCalls": 0}]
    stack.balanced()
