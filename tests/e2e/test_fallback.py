"""The fallback key, and what is journalled while the store is away: nothing lost, nothing twice."""
from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, Answer, Emulator, Stack, eventually, refused, start_refused

MakeStack = Callable[..., Stack]
KEY = "AIzaSyFallback0123456789-_abc"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


@pytest.fixture
def fallback(make_stack: MakeStack, tmp_path: Path) -> Callable[..., Stack]:
    """A stack with a fallback key, that gives the store up quickly."""
    def make(when: str = "store_unavailable", content: str = KEY + "\n") -> Stack:
        (tmp_path / "appSetting.txt").write_bytes(content.encode())
        stack = make_stack(env={"EXTRACT_FALLBACK_KEY_FILE": str(tmp_path / "appSetting.txt"),
                                "EXTRACT_FALLBACK_WHEN": when, "EXTRACT_STORE_QUERY_TIMEOUT": "200ms"})
        # log entries go there while the store is away; they are looked at for the key
        stack.allowed_stderr = [r"^\S+Z (INFO|WARNING|ERROR|CRITICAL) "]
        return stack
    return make


def outbox(stack: Stack) -> list[dict[str, Any]]:
    """What waits, oldest first; but for the releases of acquires whose answer nobody heard, which a SQL Server that went
    away in the midst of them leaves."""
    with closing(sqlite3.connect(stack.dir / "outbox.db", timeout=PATIENCE)) as db:
        db.row_factory = sqlite3.Row
        return [dict(row) for row in db.execute("SELECT * FROM Outbox WHERE IFNULL(json_extract(Payload, '$.release_sequence'), 0) = 0 ORDER BY Seq")]


def request_id(answer: Answer) -> str:
    return answer.headers["X-Request-ID"]


def of(stack: Stack, table: str, answer: Answer) -> list[dict[str, Any]]:
    """But for what stands in the place of an acquire that never came."""
    rows = stack.sql(f"SELECT * FROM {table} WHERE RequestID = ?", request_id(answer))
    return [row for row in rows if (row.get("State"), row.get("EstimatedTokens")) != ("released", 0)]


def drained(stack: Stack) -> None:
    """Until the service itself has replayed all that waited."""
    eventually(lambda: stack.get("/readyz").json()["outbox"]["waiting"] == 0, "the outbox is empty")
    assert outbox(stack) == []


def drain(stack: Stack) -> None:
    """By the command, which says so while the service is at it already."""
    eventually(lambda: stack.ctl("outbox", "drain", check=False).returncode == 0, "the outbox is empty")


def keys(emulator: Emulator) -> list[str]:
    return [call["key"] for call in emulator.log()]


# ---- the store is away ----


def test_served_without_the_store(fallback: Callable[..., Stack], emulator: Emulator, pdf: bytes) -> None:
    stack = fallback()
    stack.token("NT047", "key-of-the-company")
    with stack.store_away():
        answer = stack.post(pdf, "nt047", user="Jörg", branch="Süd")
        assert answer.status == 200, answer.body
        assert keys(emulator) == [KEY]
        assert of(stack, "TokenReservations", answer) == [] == of(stack, "TokenUsageLogs", answer)
        entries = outbox(stack)
        assert [(e["Kind"], e["RequestID"], e["TokenID"] or None) for e in entries] \
            == [("reservation", request_id(answer), None), ("settlement", request_id(answer), None)]
        assert all(KEY not in str(e) for e in entries)
        status = stack.get("/readyz").json()
        assert status["outbox"]["waiting"] in (2, 3) and status["fallback"] is True  # 3: with a release
    drained(stack)
    [row] = of(stack, "TokenUsageLogs", answer)
    usage = answer.json()["usage"]
    assert (row["TokenID"], row["TokenSource"], row["RequestCount"], row["UnknownCalls"]) == (None, "fallback", 1, 0)
    assert (row["CompanyID"], row["Branch"], row["RequestedBy"], row["Model"]) \
        == ("NT047", "Süd", "Jörg", "gemini-3.5-flash")
    assert (row["InputTokens"], row["OutputTokens"], row["TotalTokensUsed"], row["ThoughtsTokens"]) \
        == tuple(usage[name] for name in ("input_tokens", "output_tokens", "total_tokens", "thoughts_tokens"))
    [row] = of(stack, "TokenReservations", answer)
    assert (row["TokenID"], row["TokenSource"], row["State"], row["UnknownCalls"], row["EstimatedTokens"]) \
        == (None, "fallback", "settled", 0, 8000)
    # with the store back, the company's token serves
    assert stack.post(pdf).status == 200
    assert keys(emulator) == [KEY, "key-of-the-company"]
    drain(stack)
    assert len(of(stack, "TokenUsageLogs", answer)) == 1
    stack.balanced()


def test_many_in_an_outage(fallback: Callable[..., Stack], emulator: Emulator, pdf: bytes,
                           pool: ThreadPoolExecutor) -> None:
    stack = fallback()
    stack.token()
    with stack.store_away():
        answers = list(pool.map(lambda _: stack.post(pdf), range(12)))
        assert {answer.status for answer in answers} == {200}
        assert len(outbox(stack)) == 24
    stack.ctl("outbox", "drain", check=False)  # beside the service, which does so too: it may be the only one
    drained(stack)
    for answer in answers:
        assert [row["TokenSource"] for row in of(stack, "TokenUsageLogs", answer)] == ["fallback"]
        assert [row["State"] for row in of(stack, "TokenReservations", answer)] == ["settled"]


@pytest.mark.parametrize("when", ["store_unavailable", "no_active_token"])
def test_readiness_without_the_store(fallback: Callable[..., Stack], emulator: Emulator, pdf: bytes,
                                     when: str) -> None:
    """Either setting serves where the store cannot be reached."""
    stack = fallback(when)
    stack.token()
    with stack.store_away():
        assert stack.post(pdf).status == 200
        assert stack.get("/readyz").json()["fallback"] is True
    assert keys(emulator) == [KEY]
    drained(stack)


@pytest.mark.parametrize("step, code, spent, state, unknown, calls", [
    ({"status": 404}, "upstream_rejected", False, "released", 0, 1),
    ({"status": 503}, "upstream_unavailable", False, "released", 0, 4),
    ({"finish_reason": "SAFETY"}, "invalid_file", True, "settled", 0, 1),
    ({"reset": "after_read"}, "upstream_unavailable", True, "unsettled", 4, 4),
    ({"status": 400, "reason": "API_KEY_INVALID"}, "token_unavailable", False, "released", 0, 1),
    ({"status": 402}, "token_unavailable", False, "released", 0, 1),
    ({"status": 403}, "upstream_rate_limited", False, "released", 0, 1),
    ({"status": 429, "retry_delay": "3600s"}, "upstream_rate_limited", False, "released", 0, 1),
], ids=lambda value: json.dumps(value) if isinstance(value, dict) else str(value))
def test_failures_of_the_fallback_key(fallback: Callable[..., Stack], emulator: Emulator, pdf: bytes,
                                      step: dict[str, Any], code: str, spent: bool, state: str, unknown: int,
                                      calls: int) -> None:
    stack = fallback()
    emulator.script(KEY, step, repeat=True)
    with stack.store_away():
        answer = stack.post(pdf)
        refused(answer, code, spent=spent)
    assert keys(emulator) == [KEY] * calls
    drain(stack)
    drained(stack)
    [row] = of(stack, "TokenReservations", answer)
    assert (row["State"], row["UnknownCalls"], row["TokenID"]) == (state, unknown, None)
    assert len(of(stack, "TokenUsageLogs", answer)) == (state == "settled")
    attempts = stack.rows("SELECT TokenID FROM RetryAttempts WHERE RequestID = ?", request_id(answer), count=calls)
    assert attempts == [{"TokenID": None}] * calls


def test_fallback_key_waits_for_a_hint(fallback: Callable[..., Stack], emulator: Emulator, pdf: bytes) -> None:
    stack = fallback()
    emulator.script(KEY, {"status": 429, "retry_delay": "0.05s"}, {"text": "no"})
    with stack.store_away():
        answer = stack.post(pdf)
        assert answer.json()["attempts"] == 3
    drain(stack)
    drained(stack)
    [row] = of(stack, "TokenUsageLogs", answer)
    assert (row["RequestCount"], row["TotalTokensUsed"]) == (2, answer.json()["usage"]["total_tokens"])


def test_outbox_cannot_be_written(fallback: Callable[..., Stack], emulator: Emulator, pdf: bytes) -> None:
    """Seen before Gemini is called."""
    stack = fallback()
    with closing(sqlite3.connect(stack.dir / "outbox.db", timeout=PATIENCE, isolation_level=None)) as db:
        db.execute("CREATE TRIGGER Full BEFORE INSERT ON Outbox BEGIN SELECT RAISE(ABORT, 'full'); END")
    with stack.store_away():
        answer = stack.post(pdf)
        refused(answer, "storage_full")
        assert emulator.log() == []
        with closing(sqlite3.connect(stack.dir / "outbox.db", timeout=PATIENCE, isolation_level=None)) as db:
            db.execute("DROP TRIGGER Full")
        assert stack.post(pdf).status == 200
    drained(stack)
    assert of(stack, "TokenReservations", answer) == []


def test_no_fallback_without_a_key_file(make_stack: MakeStack, emulator: Emulator, pdf: bytes) -> None:
    stack = make_stack(env={"EXTRACT_STORE_QUERY_TIMEOUT": "100ms"})
    stack.allowed_stderr = [r"^\S+Z (INFO|WARNING|ERROR) "]
    stack.token()
    with stack.store_away():
        refused(stack.post(pdf), "store_unavailable")
    assert emulator.log() == []
    assert stack.post(pdf).status == 200


# ---- the store goes away during a request ----


def test_settlement_without_the_store(make_stack: MakeStack, emulator: Emulator, pdf: bytes,
                                      pool: ThreadPoolExecutor) -> None:
    """No fallback needed: the token was acquired before."""
    stack = make_stack(env={"EXTRACT_STORE_QUERY_TIMEOUT": "200ms"})
    stack.allowed_stderr = [r"^\S+Z (INFO|WARNING|ERROR) "]
    token = stack.token("NT047", "key-of-the-company", "--limit", "1000")
    emulator.script("key-of-the-company", {"hold": True})
    future = pool.submit(stack.post, pdf)
    emulator.wait(held=1)
    with stack.store_away():
        emulator.release()
        answer = future.result()
        assert answer.status == 200
        [entry] = outbox(stack)
        assert (entry["Kind"], entry["RequestID"], entry["TokenID"]) == ("settlement", request_id(answer), token)
        assert of(stack, "TokenUsageLogs", answer) == []
        assert [r["State"] for r in of(stack, "TokenReservations", answer)] == ["open"]
    drained(stack)
    [row] = of(stack, "TokenUsageLogs", answer)
    assert (row["TokenID"], row["TokenSource"]) == (token, "store")
    assert row["TotalTokensUsed"] == answer.json()["usage"]["total_tokens"] > 1000
    assert [r["State"] for r in of(stack, "TokenReservations", answer)] == ["settled"]
    assert stack.sql("SELECT Status FROM TokenMaster") == [{"Status": "Exceeded"}], "a late settlement counts as well"
    stack.rows("SELECT 1 FROM ApplicationLogs WHERE RequestID = ? AND Message LIKE '%waits in the outbox%'",
               request_id(answer))
    stack.balanced()


def test_failover_without_the_store(make_stack: MakeStack, emulator: Emulator, pdf: bytes,
                                    pool: ThreadPoolExecutor) -> None:
    """Another token cannot be had; what this one did is written down later, its cooldown too."""
    stack = make_stack(env={"EXTRACT_STORE_QUERY_TIMEOUT": "200ms"})
    stack.allowed_stderr = [r"^\S+Z (INFO|WARNING|ERROR) "]
    token = stack.token("NT047", "key-of-the-company")
    emulator.script("key-of-the-company", {"hold": True, "status": 429, "retry_delay": "3600s"})
    future = pool.submit(stack.post, pdf)
    emulator.wait(held=1)
    with stack.store_away():
        emulator.release()
        answer = future.result()
        refused(answer, "store_unavailable")
    drained(stack)
    assert [r["State"] for r in of(stack, "TokenReservations", answer)] == ["released"]
    assert of(stack, "TokenUsageLogs", answer) == []
    [row] = stack.sql("SELECT CooldownUntil, Status FROM TokenMaster WHERE TokenID = ?", token)
    assert row["CooldownUntil"] is not None and row["Status"] == "Active"
    refused(stack.post(pdf), "upstream_rate_limited")
    stack.balanced()


def test_settlement_lines_up_behind_its_reservation(fallback: Callable[..., Stack], emulator: Emulator, pdf: bytes,
                                                    pool: ThreadPoolExecutor) -> None:
    """The store is back before the call has ended: the reservation must not come after the settlement."""
    stack = fallback()
    emulator.script(KEY, {"hold": True})
    with stack.store_away():
        future = pool.submit(stack.post, pdf)
        emulator.wait(held=1)
    emulator.release()
    answer = future.result()
    assert answer.status == 200
    drained(stack)
    assert [row["State"] for row in of(stack, "TokenReservations", answer)] == ["settled"]
    assert len(of(stack, "TokenUsageLogs", answer)) == 1


def test_outbox_outlives_the_process(fallback: Callable[..., Stack], emulator: Emulator, pdf: bytes) -> None:
    stack = fallback()
    with stack.store_away():
        answer = stack.post(pdf)
        assert answer.status == 200
        stack.stop_pool()
        assert len(outbox(stack)) == 2
    stack.start_pool()
    eventually(lambda: stack.get("/healthz").status == 200, "the pool answers")
    drained(stack)
    assert len(of(stack, "TokenUsageLogs", answer)) == 1


# ---- no Active token ----


@pytest.mark.parametrize("status", ["Expired", "Disabled", "Exceeded"])
def test_no_active_token(fallback: Callable[..., Stack], emulator: Emulator, pdf: bytes, status: str) -> None:
    stack = fallback("no_active_token")
    stack.ctl("token", "set-status", str(stack.token("Acme")), status)
    answer = stack.post(pdf, "ACME")
    assert answer.status == 200
    assert keys(emulator) == [KEY]
    [row] = of(stack, "TokenUsageLogs", answer)
    assert (row["TokenID"], row["TokenSource"], row["CompanyID"], row["RequestCount"]) == (None, "fallback", "Acme", 1)
    [row] = of(stack, "TokenReservations", answer)
    assert (row["TokenID"], row["TokenSource"], row["State"]) == (None, "fallback", "settled")
    assert outbox(stack) == []
    refused(stack.post(pdf, "Stranger"), "no_active_token")
    assert len(emulator.log()) == 1
    stack.token("Acme", "key-of-acme")
    assert stack.post(pdf, "acme").status == 200
    assert keys(emulator)[-1] == "key-of-acme"


def test_all_tokens_lost_on_the_way(fallback: Callable[..., Stack], emulator: Emulator, pdf: bytes) -> None:
    """A company whose last token was used up by this very request has none left either."""
    stack = fallback("no_active_token")
    token = stack.token("NT047", "key-of-the-company")
    emulator.script("key-of-the-company", {"status": 402})
    answer = stack.post(pdf)
    assert answer.json()["attempts"] == 2
    assert keys(emulator) == ["key-of-the-company", KEY]
    assert [(r["TokenID"], r["State"]) for r in of(stack, "TokenReservations", answer)] \
        == [(token, "released"), (None, "settled")]


def test_fallback_for_no_active_token_is_asked_for(fallback: Callable[..., Stack], emulator: Emulator,
                                                   pdf: bytes) -> None:
    stack = fallback("store_unavailable")
    stack.ctl("token", "set-status", str(stack.token()), "Expired")
    refused(stack.post(pdf), "token_expired")
    refused(stack.post(pdf, "Stranger"), "no_active_token")
    assert emulator.log() == []


def test_cooling_tokens_are_active(fallback: Callable[..., Stack], emulator: Emulator, pdf: bytes) -> None:
    stack = fallback("no_active_token")
    stack.token("NT047", "key-of-the-company")
    emulator.script("key-of-the-company", {"status": 429, "retry_delay": "3600s"})
    refused(stack.post(pdf), "upstream_rate_limited")
    assert keys(emulator) == ["key-of-the-company"]


# ---- the key file ----


@pytest.mark.parametrize("content", [
    KEY, f"{KEY}\n", f"\ufeff{KEY}\r\n", f"\n  {KEY}  \n\n", f'"{KEY}"\n', f"# the key\n{KEY}\n",
    f"GEMINI_API_KEY={KEY}\n", f"GOOGLE_API_KEY = {KEY}\r\n", f"gemini_api_key: {KEY}\n", f'API_KEY="{KEY}"\n',
    f'{{\n  "Logging": {{"Level": "Debug"}},\n  "GEMINI_API_KEY": "{KEY}",\n  "Port": 5000\n}}\n',
    f"MODEL=gemini-pro\nGEMINI_API_KEY={KEY}\nOTHER=1\n",
], ids=lambda value: ascii(value)[:40])
def test_key_file(fallback: Callable[..., Stack], emulator: Emulator, pdf: bytes, content: str) -> None:
    stack = fallback("no_active_token", content)
    stack.ctl("token", "set-status", str(stack.token()), "Expired")
    assert stack.post(pdf).status == 200
    assert keys(emulator) == [KEY]


@pytest.mark.parametrize("content", ["", "\n\n", "# nothing\n", f"{KEY}\n{KEY}x\n", f"SECRET={KEY}\n", "API_KEY=\n",
                                     "API_KEY=two words\n", None], ids=ascii)
def test_bad_key_file_is_refused_at_start(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "appSetting.txt"
    if content is not None:
        path.write_text(content)
    said = start_refused(tmp_path, EXTRACT_FALLBACK_KEY_FILE=str(path))
    assert "key_file" in said.lower() and str(path) in said
    assert KEY not in said and "two words" not in said


def test_the_key_stands_nowhere(fallback: Callable[..., Stack], emulator: Emulator, pdf: bytes) -> None:
    stack = fallback()
    key = f"key-{uuid.uuid4().hex}"
    stack.token("NT047", key)
    emulator.script(KEY, {"status": 403, "message": f"Consumer 'api_key:{KEY}' has been suspended",
                          "reason": "CONSUMER_SUSPENDED"})
    with stack.store_away():
        refused(stack.post(pdf), "token_unavailable")
        assert stack.post(pdf).status == 200
    drained(stack)
    stack.stop_pool()
    for path in (path for path in stack.dir.rglob("*") if path.is_file()):
        assert KEY.encode() not in path.read_bytes(), path
        assert path.name.startswith("store.db") or key.encode() not in path.read_bytes(), path


def test_outage_in_mid_request(fallback: Callable[..., Stack], emulator: Emulator, pool: ThreadPoolExecutor,
                               pdf: bytes) -> None:
    """The store goes away while the first token is called; when that one is of no use, the fallback key takes over."""
    stack = fallback()
    token = stack.token(key="key-1")
    emulator.script("key-1", {"hold": True, "status": 429, "retry_delay": "3600s"})
    post = pool.submit(stack.post, pdf)
    emulator.wait(held=1)
    with stack.store_away():
        emulator.release()
        answer = post.result()
    assert answer.status == 200 and answer.json()["attempts"] == 2
    assert keys(emulator) == ["key-1", KEY]
    drain(stack)
    drained(stack)
    assert [(row["TokenID"], row["TokenSource"]) for row in of(stack, "TokenUsageLogs", answer)] == [(None, "fallback")]
    assert sorted((row["TokenID"] or 0, row["State"]) for row in of(stack, "TokenReservations", answer)) == [
        (0, "settled"), (token, "released")]
    assert stack.sql("SELECT CooldownUntil FROM TokenMaster WHERE TokenID = ?", token)[0]["CooldownUntil"] is not None


def test_trouble_that_is_not_the_data(fallback: Callable[..., Stack], emulator: Emulator, pool: ThreadPoolExecutor,
                                      pdf: bytes) -> None:
    """A table that a DBA has taken away: the settlement waits until it's back, and is not taken for refused."""
    stack = fallback()
    stack.token(key="key-1")
    emulator.script("key-1", {"hold": True})
    post = pool.submit(stack.post, pdf)
    emulator.wait(held=1)
    stack.sql("ALTER TABLE TokenUsageLogs RENAME TO Hidden")
    emulator.release()
    answer = post.result()
    assert answer.status == 200, answer.body
    assert [(e["Kind"], e["RequestID"]) for e in outbox(stack)] == [("settlement", request_id(answer))]
    assert stack.get("/readyz").json()["outbox"]["dead"] == 0
    stack.sql("ALTER TABLE Hidden RENAME TO TokenUsageLogs")
    drained(stack)
    assert len(of(stack, "TokenUsageLogs", answer)) == 1
    stack.balanced()
