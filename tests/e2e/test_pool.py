"""The pool: who takes a request, what happens when nobody can, and how processes come and go."""
from __future__ import annotations

import hashlib
import http.client
import os
import random
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from conftest import PATIENCE, Answer, Emulator, FastCgi, Stack, eventually, form

HELD = {"hold": True}
MULTIWATCH = r"^(Child|Spawning child)\["  # it says which one has ended


def invoice_number(file: bytes) -> str:
    return "INV-" + hashlib.sha256(file).hexdigest()[:8].upper()


def different(pdf: bytes, count: int) -> list[bytes]:
    """Files that are told apart by bytes after their end."""
    return [pdf + b"%% %d\n" % n for n in range(count)]


def statuses(answers: list[Future[Answer]]) -> list[int]:
    return [answer.result(2 * PATIENCE).status for answer in answers]


def is_overloaded(answer: Answer) -> None:
    problem = answer.json()
    assert (answer.status, problem["code"]) == (503, "overloaded")
    assert (problem["retryable"], problem["spent"]) == (True, False)
    assert int(answer.headers["Retry-After"]) > 0
    assert answer.headers["X-Request-ID"] == problem["request_id"]


def threads_of(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


# ---- many at once ----


@pytest.mark.parametrize("processes", [1, 3])
def test_200_at_once(make_stack: Callable[..., Stack], emulator: Emulator, crowd: ThreadPoolExecutor, pdf: bytes,
                     processes: int) -> None:
    """All are answered, each with its own invoice, and each is charged once."""
    stack = make_stack(processes=processes, env={"EXTRACT_SERVER_QUEUE": "256"})
    token = stack.token()
    files = different(pdf, 200)
    answers = [answer.result(2 * PATIENCE) for answer in [crowd.submit(stack.post, file) for file in files]]
    assert [answer.status for answer in answers] == [200] * 200
    assert [answer.json()["data"]["invoice_number"] for answer in answers] == [invoice_number(f) for f in files]
    rows = stack.sql("SELECT RequestID, TokenID, TotalTokensUsed FROM TokenUsageLogs")
    assert len(rows) == 200
    assert {row["RequestID"] for row in rows} == {answer.json()["request_id"] for answer in answers}
    total = sum(answer.json()["usage"]["total_tokens"] for answer in answers)
    assert stack.sql("SELECT TotalUsedTokens, ReservedTokens FROM TokenUsageSummary WHERE TokenID = ?", token) == [
        {"TotalUsedTokens": total, "ReservedTokens": 0}]
    assert emulator.wait(finished=200)["calls"] == 200
    stack.balanced()


def test_three_processes_start_at_once_on_an_empty_store(make_stack: Callable[..., Stack], pdf: bytes) -> None:
    """Each serves, none has to be started a second time, and the schema is there once."""
    stack = make_stack(processes=3)
    for _ in range(3):
        started = stack.rows("SELECT Message FROM ApplicationLogs WHERE Message LIKE 'started: %'", count=3)
        assert sorted(int(row["Message"].split("pid=")[1].split()[0]) for row in started) == sorted(stack.pids())
        assert len(stack.sql("SELECT Version FROM SchemaVersion")) == 1
        stack.token()
        assert stack.post(pdf).status == 200
        assert stack.stop_pool() == 0
        stack.balanced()
        stack.empty_store()
        stack.start_pool(3)
        eventually(lambda: stack.get("/healthz").status == 200)


# ---- a pool that is full ----


def test_full_queue_refuses_at_once(make_stack: Callable[..., Stack], emulator: Emulator, crowd: ThreadPoolExecutor,
                                    pdf: bytes) -> None:
    """With 2 workers and 2 places in the queue the 5th request is refused, at once and after its upload was read;
    what needs no worker is answered still; those that were taken are served in the end."""
    stack = make_stack(env={"EXTRACT_SERVER_THREADS": "2", "EXTRACT_SERVER_QUEUE": "2",
                            "EXTRACT_SERVER_QUEUE_WAIT": "60s"})
    stack.token(key="key")
    emulator.script("key", HELD, repeat=True)
    taken = [crowd.submit(stack.post, pdf) for _ in range(4)]
    emulator.wait(held=2)
    eventually(lambda: stack.metric("extract_requests_queued") == 2)
    assert stack.metric("extract_requests_in_flight") == 2

    large = pdf + bytes(4 << 20)
    refused = [answer.result(PATIENCE) for answer in [crowd.submit(stack.post, large) for _ in range(12)]]
    for answer in refused:
        is_overloaded(answer)
    body, content_type = form(large)
    is_overloaded(stack.fastcgi(body, CONTENT_TYPE=content_type))
    begun = time.monotonic()
    is_overloaded(stack.post(pdf))
    assert time.monotonic() - begun < 2  # the contract says 100 ms
    for path in ("/healthz", "/readyz", "/metrics"):
        assert stack.get(path).status == 200
    assert stack.get("/nothing").status == 404
    assert stack.metric('extract_requests_total{code="overloaded"}') == 14
    assert not any(answer.done() for answer in taken)

    emulator.script("key")
    emulator.release()
    assert statuses(taken) == [200] * 4
    assert emulator.wait(finished=4)["calls"] == 4
    assert len(stack.sql("SELECT 1 FROM TokenUsageLogs")) == 4
    assert len(stack.rows("SELECT 1 FROM ApplicationLogs WHERE Message LIKE 'overloaded:%'", count=14)) == 14
    stack.balanced()


def test_queue_wait_passed(make_stack: Callable[..., Stack], emulator: Emulator, crowd: ThreadPoolExecutor,
                           pdf: bytes) -> None:
    """A request that no worker takes within queue_wait is refused; the one before it goes on."""
    stack = make_stack(env={"EXTRACT_SERVER_THREADS": "1", "EXTRACT_SERVER_QUEUE": "8",
                            "EXTRACT_SERVER_QUEUE_WAIT": "300ms"})
    stack.token(key="key")
    emulator.script("key", HELD)
    first = crowd.submit(stack.post, pdf)
    emulator.wait(held=1)
    waiting = [crowd.submit(stack.post, pdf + bytes(4 << 20)) for _ in range(3)]
    for answer in waiting:
        is_overloaded(answer.result(PATIENCE))
    assert emulator.wait(held=1)["calls"] == 1 and not first.done()
    assert stack.metric("extract_requests_queued") == 0
    emulator.release()
    assert first.result(PATIENCE).status == 200
    assert stack.post(pdf).status == 200
    stack.balanced()


def test_slow_peer_delays_no_other_refusal(make_stack: Callable[..., Stack], emulator: Emulator,
                                           crowd: ThreadPoolExecutor, pdf: bytes) -> None:
    """Two are past queue_wait; the first has a body that does not come: the second is refused meanwhile."""
    stack = make_stack(env={"EXTRACT_SERVER_THREADS": "1", "EXTRACT_SERVER_QUEUE": "8",
                            "EXTRACT_SERVER_QUEUE_WAIT": "500ms"})
    stack.token(key="key")
    emulator.script("key", HELD)
    served = crowd.submit(stack.post, pdf)
    emulator.wait(held=1)
    body, content_type = form(pdf)

    def second_is_first() -> bool:
        with closing(FastCgi(stack.socket)) as slow:
            slow.begin()
            slow.params({"REQUEST_METHOD": "POST", "DOCUMENT_URI": "/extract", "CONTENT_LENGTH": "10"})
            eventually(lambda: stack.metric("extract_requests_queued") == 1)
            is_overloaded(stack.fastcgi(body, CONTENT_TYPE=content_type))
            is_first = not select.select([slow.socket], [], [], 0)[0]
            is_overloaded(slow.answer())
            return is_first

    assert any(second_is_first() for _ in range(5))  # a machine that stands still for two seconds may turn them round
    emulator.release()
    assert served.result(PATIENCE).status == 200
    stack.balanced()


def test_full_process_lets_others_go_first(make_stack: Callable[..., Stack], emulator: Emulator,
                                           crowd: ThreadPoolExecutor, pdf: bytes) -> None:
    """As many calls as there are workers in the pool are all under way: none waits in the queue of a full process."""
    stack = make_stack(processes=4, env={"EXTRACT_SERVER_THREADS": "1"})
    eventually(lambda: stack.metric("extract_workers") == 4)
    stack.token(key="key")
    emulator.script("key", HELD, repeat=True)
    for _ in range(5):
        answers = [crowd.submit(stack.post, pdf) for _ in range(4)]
        emulator.wait(held=4)
        holders = stack.sql("SELECT ProcessID FROM TokenReservations WHERE State = 'open'")
        assert sorted(row["ProcessID"] for row in holders) == sorted(stack.pids())
        emulator.release()
        assert statuses(answers) == [200] * 4
    stack.balanced()


def test_quota_of_one_company_does_not_stop_others(make_stack: Callable[..., Stack], emulator: Emulator,
                                                   crowd: ThreadPoolExecutor, pdf: bytes) -> None:
    """All 8 workers call for company A when its quota is used up: a quarter of them wait for it, the rest says so at
    once, and B is served meanwhile."""
    stack = make_stack()
    stack.token("A", "key-a")
    stack.token("B", "key-b")
    emulator.script("key-a", *[{"hold": True, "status": 429, "retry_delay": "4s"}] * 8)
    answers = [crowd.submit(stack.post, pdf, "A") for _ in range(8)]
    emulator.wait(held=8)
    emulator.release()
    eventually(lambda: sum(answer.done() for answer in answers) == 6)
    assert stack.post(pdf, "B").status == 200
    assert sum(answer.done() for answer in answers) == 6
    assert stack.metric("extract_hint_waiters") == 2

    refused = [answer.result() for answer in answers if answer.done()]
    for answer in refused:
        assert (answer.status, answer.code) == (503, "upstream_rate_limited")
        assert 1 <= int(answer.headers["Retry-After"]) <= 4
        assert answer.json()["spent"] is False
    assert sorted(statuses(answers)) == [200] * 2 + [503] * 6
    assert stack.metric("extract_hint_waiters") == 0
    attempts = stack.rows("SELECT StatusCode, DelayMs FROM RetryAttempts", count=8)
    assert [row["StatusCode"] for row in attempts] == [429] * 8
    assert sum((row["DelayMs"] or 0) > 0 for row in attempts) == 2
    stack.balanced()


def test_company_share(make_stack: Callable[..., Stack], emulator: Emulator, crowd: ThreadPoolExecutor,
                       pdf: bytes) -> None:
    """With a quarter of 8 workers, a company's third request at a time is refused, however it writes its name."""
    stack = make_stack(env={"EXTRACT_SERVER_COMPANY_SHARE": "0.25"})
    stack.token("Müller", "key-a")
    stack.token("B", "key-b")
    emulator.script("key-a", HELD, HELD)
    held = [crowd.submit(stack.post, pdf, name) for name in ("Müller", "MÜLLER")]
    emulator.wait(held=2)
    answer = stack.post(pdf, "müller")
    assert (answer.status, answer.code) == (429, "rate_limited")
    assert int(answer.headers["Retry-After"]) > 0
    assert answer.json()["spent"] is False and answer.json()["retryable"] is True
    assert stack.post(pdf, "B").status == 200
    emulator.release()
    assert statuses(held) == [200] * 2
    assert stack.post(pdf, "Müller").status == 200
    stack.balanced()


# ---- clients that go ----


def test_client_hangs_up_after_its_upload(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    """The call goes on, is settled and recorded; nginx waits for it and logs whose it was."""
    stack.token(company, "key-gone")
    emulator.script("key-gone", HELD)
    body, content_type = form(pdf, company)
    client = http.client.HTTPConnection("127.0.0.1", stack.port)
    client.request("POST", "/extract", body, {"Content-Type": content_type})
    emulator.wait(held=1)
    client.close()
    emulator.release()
    usage = stack.rows("SELECT RequestID, RequestCount FROM TokenUsageLogs WHERE CompanyID = ?", company)
    assert [row["RequestCount"] for row in usage] == [1]
    request = usage[0]["RequestID"]
    assert stack.rows("SELECT State FROM TokenReservations WHERE RequestID = ?", request) == [{"State": "settled"}]
    stack.rows("SELECT 1 FROM ApplicationLogs WHERE RequestID = ? AND Message LIKE 'extracted:%'", request)
    eventually(lambda: f" app_request_id={request} " in (stack.dir / "access.log").read_text())
    assert emulator.wait(finished=1) == {"calls": 1, "complete": 1, "gone": 0, "answered": 1, "finished": 1, "held": 0}


def test_web_server_hangs_up_after_the_upload(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    """The same where the FastCGI connection itself is gone: the answer finds nobody, and that is all."""
    stack.token(company, "key-gone")
    emulator.script("key-gone", HELD)
    body, content_type = form(pdf, company)
    with closing(FastCgi(stack.socket)) as client:
        client.begin()
        client.params({"REQUEST_METHOD": "POST", "DOCUMENT_URI": "/extract", "CONTENT_TYPE": content_type,
                       "CONTENT_LENGTH": str(len(body))})
        client.send(FastCgi.STDIN, body)
        client.send(FastCgi.STDIN)
        emulator.wait(held=1)
    emulator.release()
    stack.rows("SELECT 1 FROM TokenUsageLogs WHERE CompanyID = ? AND RequestCount = 1", company)
    assert stack.post(pdf, company).status == 200
    assert emulator.wait(finished=2)["gone"] == 0


def test_upload_stops_half_way_before_nginx(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    """nginx keeps it to itself."""
    stack.token(company)
    before = stack.metric("extract_upload_bytes_total")
    body, content_type = form(pdf + bytes(1 << 20), company)
    log = stack.dir / "access.log"
    lines = len(log.read_text().splitlines())
    with socket.create_connection(("127.0.0.1", stack.port)) as client:
        client.sendall(f"POST /extract HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n"
                       f"Content-Length: {len(body)}\r\n\r\n".encode() + body[:len(body) // 2])
    eventually(lambda: any('"POST /extract' in line for line in log.read_text().splitlines()[lines:]))
    assert emulator.log() == []
    assert stack.metric("extract_upload_bytes_total") == before
    assert stack.post(pdf, company).status == 200


@pytest.mark.parametrize("size", [1 << 16, 4 << 20])
def test_upload_stops_half_way_before_the_pool(stack: Stack, emulator: Emulator, company: str, pdf: bytes,
                                               size: int) -> None:
    """Nothing is spent or reserved, and the worker is free again."""
    stack.token(company)
    body, content_type = form(pdf + bytes(size), company)
    mark = f"half-{company}"
    with closing(FastCgi(stack.socket)) as client:
        client.begin()
        client.params({"REQUEST_METHOD": "POST", "DOCUMENT_URI": "/extract", "CONTENT_TYPE": content_type,
                       "CONTENT_LENGTH": str(len(body)), "PROXY_REQUEST_ID": mark})
        client.send(FastCgi.STDIN, body[:len(body) // 2])
    entry = stack.rows("SELECT LogLevel, Message, Exception FROM ApplicationLogs WHERE Message LIKE ?",
                       f"%proxy_request_id={mark}%")[0]
    assert entry["Message"].startswith("bad_request: ") and "stopped before its end" in entry["Exception"]
    assert emulator.log() == []
    assert stack.sql("SELECT 1 FROM TokenReservations WHERE CompanyID = ?", company) == []
    assert stack.metric("extract_requests_in_flight") == 0
    assert stack.post(pdf, company).status == 200


# ---- FastCGI that no web server would send ----


@pytest.mark.parametrize("name, params, status, code", [
    ("no length", {"CONTENT_LENGTH": None}, 400, "bad_request"),
    ("empty length", {"CONTENT_LENGTH": ""}, 400, "bad_request"),
    ("length 12abc", {"CONTENT_LENGTH": "12abc"}, 400, "bad_request"),
    ("length -1", {"CONTENT_LENGTH": "-1"}, 400, "bad_request"),
    ("length with a blank", {"CONTENT_LENGTH": " 12"}, 400, "bad_request"),
    ("length 0", {"CONTENT_LENGTH": "0"}, 400, "bad_request"),
    ("length beyond 64 bits", {"CONTENT_LENGTH": "99999999999999999999"}, 400, "bad_request"),
    ("length over the limit", {"CONTENT_LENGTH": str(50 * 1024 * 1024 + 1)}, 413, "file_too_large"),
    ("length too small", {"CONTENT_LENGTH": "-40"}, 400, "bad_request"),
    ("length too large", {"CONTENT_LENGTH": "+40"}, 400, "bad_request"),
    ("no content type", {"CONTENT_TYPE": None}, 400, "bad_request"),
    ("no method", {"REQUEST_METHOD": None}, 405, "method_not_allowed"),
    ("method in lower case", {"REQUEST_METHOD": "post"}, 405, "method_not_allowed"),
    ("no path", {"DOCUMENT_URI": None}, 404, "not_found"),
    ("path in SCRIPT_NAME", {"DOCUMENT_URI": None, "SCRIPT_NAME": "/extract"}, 200, None),
    ("path in REQUEST_URI", {"DOCUMENT_URI": None, "REQUEST_URI": "/extract?a=b"}, 200, None),
    ("a parameter of 1 MB", {"HTTP_X_LARGE": "x" * 1_000_000}, 200, None),
    ("5000 parameters", {f"HTTP_X_{n}": str(n) for n in range(5000)}, 200, None),
], ids=lambda value: value if isinstance(value, str) and " " in value else "")
def test_odd_parameters(stack: Stack, emulator: Emulator, company: str, pdf: bytes, name: str,
                        params: dict[str, str | None], status: int, code: str | None) -> None:
    stack.token(company)
    body, content_type = form(pdf, company)
    length = params.get("CONTENT_LENGTH") or ""
    if len(length) == 3:  # so much more or less than there is
        params = {"CONTENT_LENGTH": str(len(body) + int(length))}
    answer = stack.fastcgi(body, **{"CONTENT_TYPE": content_type, **params})
    assert (answer.status, answer.json().get("code")) == (status, code)
    assert answer.headers["X-Request-ID"] == answer.json()["request_id"]
    assert len(emulator.log()) == (status == 200)
    assert stack.post(pdf, company).status == 200


def garbage(client: FastCgi) -> None:
    client.socket.sendall(random.Random(1).randbytes(70_000))


def another_version(client: FastCgi) -> None:
    client.socket.sendall(b"\x02\x01\0\x01\0\x08\0\0" + bytes(8))


def http_instead(client: FastCgi) -> None:
    client.socket.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")


def half_a_header(client: FastCgi) -> None:
    client.socket.sendall(b"\x01\x01\0")


def head_without_params(client: FastCgi) -> None:
    client.begin()


def params_cut_off(client: FastCgi) -> None:
    client.begin()
    client.send(FastCgi.PARAMS, b"\x0e\x04REQUEST_METH")


def params_of_impossible_size(client: FastCgi) -> None:
    client.begin()
    client.send(FastCgi.PARAMS, b"\xff\xff\xff\xff\xff\xff\xff\xff" + b"x" * 100)
    client.send(FastCgi.PARAMS)


def unknown_role(client: FastCgi) -> None:
    client.begin(role=9)
    client.params({"REQUEST_METHOD": "POST", "DOCUMENT_URI": "/extract"})


def unknown_record(client: FastCgi) -> None:
    client.begin()
    client.send(99, b"what?")


def params_before_begin(client: FastCgi) -> None:
    client.params({"REQUEST_METHOD": "POST", "DOCUMENT_URI": "/extract"})


def abort_half_way(client: FastCgi) -> None:
    client.begin()
    client.params({"REQUEST_METHOD": "POST", "DOCUMENT_URI": "/extract", "CONTENT_LENGTH": "1000"})
    client.send(FastCgi.STDIN, b"x" * 500)
    client.send(FastCgi.ABORT)


@pytest.mark.parametrize("oddity", [
    lambda client: None, garbage, another_version, http_instead, half_a_header, head_without_params, params_cut_off,
    params_of_impossible_size, unknown_role, unknown_record, params_before_begin, abort_half_way,
], ids=lambda f: f.__name__.replace("<lambda>", "nothing"))
def test_odd_connections(stack: Stack, emulator: Emulator, pdf: bytes, company: str,
                         oddity: Callable[[FastCgi], None]) -> None:
    """They end, the process does not, and the next request is served."""
    pids = stack.pids()
    with closing(FastCgi(stack.socket)) as client:
        try:
            oddity(client)
            client.socket.shutdown(socket.SHUT_WR)
            client.read()
        except (BrokenPipeError, ConnectionResetError):
            pass
    stack.token(company)
    assert stack.post(pdf, company).status == 200
    assert len(emulator.log()) == 1
    assert stack.pids() == pids


@pytest.mark.parametrize("begun", [b"", b"\x01\x01\0", b"\x01\x01\0\x01\0\x08\0\0\0\x01" + bytes(6)],
                         ids=["nothing", "half a header", "no parameters"])
def test_silent_connection_does_not_stop_the_pool(stack: Stack, pdf: bytes, company: str, begun: bytes) -> None:
    """One that stops before its head is complete stays open meanwhile; the next request is served."""
    stack.token(company)
    with closing(FastCgi(stack.socket)) as silent:
        silent.socket.sendall(begun)
        assert stack.post(pdf, company, timeout=PATIENCE).status == 200


HEAD = {"REQUEST_METHOD": "POST", "DOCUMENT_URI": "/extract", "CONTENT_TYPE": "multipart/form-data; boundary=x"}


def test_connections_are_not_kept(stack: Stack) -> None:
    """A web server that wants to keep its connections gets its answer and the end of the connection."""
    pid = stack.pids()[0]
    before = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    for _ in range(30):
        with closing(FastCgi(stack.socket)) as client:
            client.begin(keep=True)
            client.params({"REQUEST_METHOD": "GET", "DOCUMENT_URI": "/healthz"})
            client.send(FastCgi.STDIN)
            assert client.answer().status == 200
            assert client.socket.recv(1) == b""
    eventually(lambda: len(list(Path(f"/proc/{pid}/fd").iterdir())) <= before + 2, "the descriptors are closed")


def test_silent_connections_do_not_add_up(stack: Stack) -> None:
    """Many that say nothing: health is answered meanwhile, and they are closed after a while."""
    silent = [FastCgi(stack.socket) for _ in range(20)]
    assert stack.get("/healthz", timeout=PATIENCE).status == 200
    for client in silent:
        assert client.socket.recv(1) == b""
        client.close()


@pytest.mark.parametrize("path", ["/nothing", "/healthz"])
def test_uploads_that_nobody_wants_hold_no_thread(stack: Stack, path: str) -> None:
    """More peers than there are threads for it stop in the middle of an upload that would only be passed over."""
    stalled = [FastCgi(stack.socket) for _ in range(6)]
    for client in stalled:
        client.begin()
        client.params({**HEAD, "DOCUMENT_URI": path, "CONTENT_LENGTH": "100000"})
        client.send(FastCgi.STDIN, b"ten bytes.")
    assert stack.get("/healthz", timeout=PATIENCE).status == 200
    for client in stalled:
        assert client.answer().status in (404, 405)
        client.close()


def test_upload_that_drips_ends_with_the_deadline(make_stack: Callable[..., Stack]) -> None:
    """An upload that goes on for ever: the deadline ends it, and SIGTERM need not wait longer."""
    stack = make_stack(env={"EXTRACT_SERVER_DEADLINE": "6s"})
    stop = threading.Event()
    with closing(FastCgi(stack.socket)) as client:
        client.begin()
        client.params({**HEAD, "CONTENT_LENGTH": "100000"})

        def drip() -> None:
            try:
                while not stop.wait(0.2):
                    client.send(FastCgi.STDIN, b".")
            except OSError:
                pass

        thread = threading.Thread(target=drip)
        thread.start()
        eventually(lambda: stack.metric("extract_requests_in_flight") == 1)
        assert stack.stop_pool() == 0
        stop.set()
        thread.join()


def test_a_burst_goes_where_there_is_room(make_stack: Callable[..., Stack], emulator: Emulator,
                                          crowd: ThreadPoolExecutor, pdf: bytes) -> None:
    """As many requests as the workers and queues of two processes hold: none is refused."""
    stack = make_stack(processes=2, env={"EXTRACT_SERVER_THREADS": "1", "EXTRACT_SERVER_QUEUE": "4",
                                         "EXTRACT_SERVER_QUEUE_WAIT": "60s"})
    eventually(lambda: stack.metric("extract_workers") == 2)
    stack.token(key="key")
    emulator.script("key", *[HELD] * 10)
    answers = [crowd.submit(stack.post, pdf) for _ in range(2)]
    emulator.wait(held=2)
    answers += [crowd.submit(stack.post, pdf) for _ in range(8)]
    eventually(lambda: stack.metric("extract_requests_queued") == 8)
    for held in range(5):
        emulator.wait(held=2)
        emulator.release()
    assert statuses(answers) == [200] * 10


# ---- processes that end ----


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_with_requests_in_flight(make_stack: Callable[..., Stack], emulator: Emulator,
                                         crowd: ThreadPoolExecutor, pdf: bytes, processes: int) -> None:
    """Those that a worker has and those that wait in the queue are all answered; then the processes end."""
    stack = make_stack(processes=processes, env={"EXTRACT_SERVER_THREADS": "2", "EXTRACT_SERVER_QUEUE": "8",
                                                 "EXTRACT_SERVER_QUEUE_WAIT": "60s"})
    busy = 2 * processes
    eventually(lambda: stack.metric("extract_workers") == busy)
    stack.token(key="key")
    emulator.script("key", *[HELD] * busy)
    files = different(pdf, busy + 4)
    answers = [crowd.submit(stack.post, file) for file in files[:busy]]
    emulator.wait(held=busy)
    answers += [crowd.submit(stack.post, file) for file in files[busy:]]
    eventually(lambda: stack.metric("extract_requests_queued") == 4)

    pids = stack.pids()
    before = {pid: threads_of(pid) for pid in pids}
    assert stack.pool is not None
    stack.pool.send_signal(signal.SIGTERM)
    for pid in pids:  # those that answer health and refuse end as soon as the drain has begun
        eventually(lambda: threads_of(pid) < before[pid] - 2, "the drain begins")
    assert not any(answer.done() for answer in answers)
    emulator.release()
    assert statuses(answers) == [200] * len(files)
    assert [a.result().json()["data"]["invoice_number"] for a in answers] == [invoice_number(f) for f in files]
    assert stack.pool.wait(PATIENCE) == 0
    stopped = stack.sql("SELECT Message FROM ApplicationLogs WHERE Message LIKE 'stopped: %'")
    assert sorted(row["Message"] for row in stopped) == sorted(f"stopped: pid={pid}" for pid in pids)
    assert len(stack.sql("SELECT 1 FROM TokenUsageLogs")) == len(files)
    assert len(stack.sql("SELECT 1 FROM ApplicationLogs WHERE Message LIKE 'extracted: %'")) == len(files)
    assert stack.sql("SELECT 1 FROM TokenReservations WHERE State <> 'settled'") == []
    stack.balanced()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_idle_process_ends_promptly(make_stack: Callable[..., Stack], number: signal.Signals) -> None:
    stack = make_stack()
    pid = stack.pids()[0]
    begun = time.monotonic()
    assert stack.stop_pool(number) == 0
    assert time.monotonic() - begun < 5
    assert stack.sql("SELECT LogLevel FROM ApplicationLogs WHERE Message = ?", f"stopped: pid={pid}") == [
        {"LogLevel": "INFO"}]


def test_sigterm_with_a_silent_connection(make_stack: Callable[..., Stack]) -> None:
    """Nobody is waited for who has not said what he wants."""
    stack = make_stack()
    with closing(FastCgi(stack.socket)) as silent:
        silent.socket.sendall(b"\x01\x01\0")
        assert stack.stop_pool() == 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGPIPE])
def test_other_signals_mean_nothing(stack: Stack, emulator: Emulator, crowd: ThreadPoolExecutor, company: str,
                                    pdf: bytes, number: signal.Signals) -> None:
    stack.token(company, "key-signal")
    emulator.script("key-signal", HELD)
    answer = crowd.submit(stack.post, pdf, company)
    emulator.wait(held=1)
    pids = stack.pids()
    os.kill(pids[0], number)
    emulator.release()
    assert answer.result(PATIENCE).status == 200
    assert stack.post(pdf, company).status == 200
    assert stack.pids() == pids


def test_rolling_restart_loses_no_request(make_stack: Callable[..., Stack], emulator: Emulator,
                                          crowd: ThreadPoolExecutor, pdf: bytes) -> None:
    """Under load each process is ended and started again, one after the other: every request is answered."""
    stack = make_stack(processes=2, env={"EXTRACT_SERVER_THREADS": "1"})
    stack.allowed_stderr.append(MULTIWATCH)
    stack.token(key="key")
    emulator.script("key", {"delay": 0.01}, repeat=True)  # so that there is always a queue
    seen: list[int] = []
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            seen.append(stack.post(pdf).status)

    clients = [crowd.submit(keep_asking) for _ in range(8)]
    try:
        for _ in range(2):
            for pid in stack.pids():
                os.kill(pid, signal.SIGTERM)
                eventually(lambda: pid not in stack.pids() and len(stack.pids()) == 2, "it is started again")
                stack.rows("SELECT 1 FROM ApplicationLogs WHERE Message = ?", f"stopped: pid={pid}")
                so_far = len(seen)
                eventually(lambda: len(seen) >= so_far + 40)
    finally:
        stop.set()
    for client in clients:
        client.result(2 * PATIENCE)
    assert set(seen) == {200}
    assert len(stack.sql("SELECT 1 FROM TokenUsageLogs")) == len(seen)
    assert len(stack.rows("SELECT 1 FROM ApplicationLogs WHERE Message LIKE 'started: %'", count=6)) == 6
    stack.balanced()


def test_process_killed_in_a_call(make_stack: Callable[..., Stack], emulator: Emulator, crowd: ThreadPoolExecutor,
                                  pdf: bytes) -> None:
    """Its client is told that the call may have been paid for; the others notice nothing; the reservation is kept
    and becomes unsettled when its time is over."""
    stack = make_stack(processes=2, env={"EXTRACT_SERVER_THREADS": "1"})
    stack.allowed_stderr.append(MULTIWATCH)
    eventually(lambda: stack.metric("extract_workers") == 2)
    stack.token("A", "key-a")
    stack.token("B", "key-b")
    emulator.script("key-a", HELD)
    emulator.script("key-b", HELD)
    doomed = crowd.submit(stack.post, pdf, "A")
    emulator.wait(held=1)
    spared = crowd.submit(stack.post, pdf, "B")
    emulator.wait(held=2)
    processes = {row["CompanyID"]: row["ProcessID"]
                 for row in stack.sql("SELECT CompanyID, ProcessID FROM TokenReservations WHERE State = 'open'")}
    assert sorted(processes.values()) == sorted(stack.pids())
    os.kill(processes["A"], signal.SIGKILL)

    answer = doomed.result(PATIENCE)
    problem = answer.json()
    assert (answer.status, problem["code"]) == (502, "internal_error")
    assert (problem["retryable"], problem["spent"]) == (False, True)
    assert answer.headers["Retry-After"] is None
    others = [spared, crowd.submit(stack.post, pdf, "B")]
    eventually(lambda: len(stack.pids()) == 2, "another process is started in its place")
    emulator.release()
    assert statuses(others) == [200] * 2

    states = "SELECT State, UnknownCalls FROM TokenReservations WHERE CompanyID = 'A'"
    assert stack.sql(states) == [{"State": "open", "UnknownCalls": 0}]
    assert stack.stop_pool() == 0
    stack.sql("UPDATE TokenReservations SET ExpiresAt = '2026-01-01T00:00:00.000Z' WHERE CompanyID = 'A'")
    stack.start_pool()
    eventually(lambda: stack.sql(states) == [{"State": "unsettled", "UnknownCalls": 1}])
    assert "unsettled" in stack.ctl("reservations", "--unsettled").stdout
    stack.rows("SELECT 1 FROM ApplicationLogs WHERE LogLevel = 'WARNING' AND Message LIKE '%unsettled now'")
    assert len(stack.sql("SELECT 1 FROM TokenUsageLogs WHERE CompanyID = 'A'")) == 0
    stack.balanced()
    assert stack.post(pdf, "A").status == 200
