"""kill -9 of a process, at each step of a request.

Whatever the step: what it had reserved is shown as unsettled when its time is over, unless it was settled; another process
goes on serving; a settlement that was journalled is replayed by the others.
"""
from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from door import Door
from e2e.conftest import PATIENCE, Answer, Emulator, eventually
from rig import LARGE, Rig

MakeRig = Callable[..., Rig]
KEY = "key-of-the-doomed"
LONG_STATEMENT = ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000000)"
                  " SELECT MAX(i) FROM n")


def broken_off(answer: Answer) -> None:
    """What nginx says of a process that died with the request: it may have been paid for."""
    problem = answer.json()
    assert (answer.status, problem["code"], problem["spent"], problem["retryable"]) == (502, "internal_error", True, False)
    assert answer.headers["Retry-After"] is None


def serves(rig: Rig) -> None:
    """Another process in its place."""
    rig.start()
    rig.settle_in()
    rig.token("After", "key-of-the-one-after")
    assert rig.send("After").status == 200


def is_written_to(database: Path) -> bool:
    """Nobody is let in for longer than any transaction of the service takes."""
    with closing(sqlite3.connect(database, timeout=1, isolation_level=None)) as db:
        try:
            db.execute("BEGIN IMMEDIATE")
            return False
        except sqlite3.OperationalError:
            return True


@pytest.mark.parametrize("size", [0, LARGE])
def test_while_it_reads_the_upload(make_rig: MakeRig, emulator: Emulator, size: int) -> None:
    rig = make_rig()
    rig.token(key=KEY)
    request = rig.upload(size=size)
    with closing(rig.begin(request, upto=40_000)) as client:
        eventually(lambda: rig.metric("extract_requests_in_flight") == 1)
        rig.kill()
        assert client.read() == b""
    assert rig.reservations(request[0]) == []
    serves(rig)
    assert [call["key"] for call in emulator.log()] == ["key-of-the-one-after"]
    rig.accounted()


def test_before_it_acquires(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor) -> None:
    rig = make_rig()
    rig.token(key=KEY)
    request = rig.upload()
    with rig.store_away():
        answer = crowd.submit(rig.send, sent=request)
        eventually(lambda: rig.metric("extract_upload_bytes_total") > 0)
        rig.kill()
        broken_off(answer.result(PATIENCE))
    assert rig.reservations(request[0]) == []
    serves(rig)
    assert [call["key"] for call in emulator.log()] == ["key-of-the-one-after"]
    rig.accounted()


def test_while_it_waits_in_the_queue(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor) -> None:
    """Only what a worker had is reserved."""
    rig = make_rig(env={"EXTRACT_SERVER_THREADS": "1"})
    rig.token(key=KEY)
    emulator.script(KEY, {"hold": True})
    doomed = rig.upload()
    answers = [crowd.submit(rig.send, sent=doomed)]
    emulator.wait(held=1)
    queued = [rig.upload() for _ in range(3)]
    answers += [crowd.submit(rig.send, sent=request) for request in queued]
    eventually(lambda: rig.metric("extract_requests_queued") == 3)
    rig.kill()
    for answer in answers:
        broken_off(answer.result(PATIENCE))
    assert [rig.reservations(sent) for sent, _ in queued] == [[]] * 3
    serves(rig)
    rig.accounted(unsettled=[doomed[0]])


def test_between_acquire_and_call(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor, door: Door) -> None:
    """It is connected and has sent what it could; nobody has read any of it."""
    rig = make_rig(base_url=door.url)
    rig.token(key=KEY)
    door.turn("black_hole")
    request = rig.upload()
    answer = crowd.submit(rig.send, sent=request)
    eventually(lambda: door.taken == 1)
    assert rig.states(request[0]) == ["open"]
    rig.kill()
    broken_off(answer.result(PATIENCE))
    door.turn("open")
    serves(rig)
    assert [call["key"] for call in emulator.log()] == ["key-of-the-one-after"]
    rig.accounted(unsettled=[request[0]])


@pytest.mark.parametrize("store", ["sqlite", "mssql"])
def test_during_the_call(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor, store: str) -> None:
    """And it is one of a pool of two: the other goes on with what it has."""
    rig = make_rig(store, processes=2, env={"EXTRACT_SERVER_THREADS": "1"})
    rig.token("A", KEY)
    rig.token("B", "key-of-the-other")
    for key in (KEY, "key-of-the-other"):
        emulator.script(key, {"hold": True})
    doomed, other = rig.upload("A"), rig.upload("B")
    answer = crowd.submit(rig.send, sent=doomed)
    emulator.wait(held=1)
    spared = crowd.submit(rig.send, sent=other)
    emulator.wait(held=2)
    rig.kill(rig.reservations(doomed[0])[0]["ProcessID"])
    broken_off(answer.result(PATIENCE))
    emulator.release()
    assert spared.result(PATIENCE).status == 200
    serves(rig)
    rig.accounted(unsettled=[doomed[0]])


@pytest.mark.parametrize("step, held", [({"status": 503}, ["open"]), ({"close": "after_read"}, ["open"]),
                                        ({"status": 429, "retry_delay": "60s"}, ["released"])],
                         ids=["unavailable", "broken", "hint"])
def test_between_two_calls(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor, step: dict[str, Any],
                           held: list[str]) -> None:
    """It waits for the next attempt with the reservation of the first; for a token that cools down without any."""
    rig = make_rig(env={"EXTRACT_RETRY_INITIAL_DELAY": "60", "EXTRACT_RETRY_MAX_DELAY": "60"})
    rig.token(key=KEY)
    emulator.script(KEY, step)
    request = rig.upload()
    answer = crowd.submit(rig.send, sent=request)
    emulator.wait(finished=1)
    eventually(lambda: rig.states(request[0]) == held and rig.sql("SELECT 1 AS x FROM RetryAttempts"), "it waits")
    rig.kill()
    broken_off(answer.result(PATIENCE))
    serves(rig)
    rig.accounted(unsettled=[request[0]] if held == ["open"] else [])


def test_between_two_tokens(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor) -> None:
    """Gemini has taken one away, and the store cannot be asked for another."""
    rig = make_rig()
    rig.token(key=KEY)
    emulator.script(KEY, {"hold": True, "status": 403})
    request = rig.upload()
    answer = crowd.submit(rig.send, sent=request)
    emulator.wait(held=1)
    with rig.store_away():
        emulator.release()
        eventually(lambda: rig.metric('extract_attempts_total{class="key_doubtful"}') == 1)
        rig.kill()
        broken_off(answer.result(PATIENCE))
    serves(rig)
    rig.accounted(unsettled=[request[0]])


def test_back_at_its_first_token(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor) -> None:
    """It has two reservations of that one: what an earlier call may have spent, and the call under way."""
    rig = make_rig()
    for n in range(2):
        rig.token(key=f"{KEY}-{n}")
    emulator.script("*", {"close": "after_read"}, {"status": 429, "retry_delay": "0.3s"},
                    {"status": 429, "retry_delay": "60s"}, {"hold": True})
    request = rig.upload()
    answer = crowd.submit(rig.send, sent=request)
    emulator.wait(held=1)
    assert rig.states(request[0]).count("open") == 2
    rig.kill()
    broken_off(answer.result(PATIENCE))
    serves(rig)
    rig.accounted(unsettled=[request[0]])
    first, _, *rest = rig.reservations(request[0])
    for row in (first, rest[-1]):
        assert (row["TokenID"], row["State"], row["UnknownCalls"]) == (first["TokenID"], "unsettled", 1)


def test_between_answer_and_settlement(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor) -> None:
    """Gemini has answered, and the store cannot be written to."""
    rig = make_rig()
    rig.token(key=KEY)
    emulator.script(KEY, {"hold": True})
    request = rig.upload()
    answer = crowd.submit(rig.send, sent=request)
    emulator.wait(held=1)
    with rig.store_away():
        emulator.release()
        eventually(lambda: rig.metric('extract_attempts_total{class="success"}') == 1)
        rig.kill()
        broken_off(answer.result(PATIENCE))
    serves(rig)
    rig.accounted(unsettled=[request[0]])


def test_while_it_settles(make_rig: MakeRig, crowd: ThreadPoolExecutor) -> None:
    """In the middle of the transaction, which is undone."""
    rig = make_rig()
    rig.token(key=KEY)
    rig.sql(f"CREATE TRIGGER Slow AFTER INSERT ON TokenUsageLogs BEGIN {LONG_STATEMENT}; END")
    request = rig.upload()
    answer = crowd.submit(rig.send, sent=request)
    eventually(lambda: rig.metric('extract_attempts_total{class="success"}') == 1)
    eventually(lambda: is_written_to(rig.dir / "store.db"), "it is in its transaction")
    rig.kill()
    broken_off(answer.result(PATIENCE))
    rig.sql("DROP TRIGGER Slow")
    assert rig.states(request[0]) == ["open"]
    serves(rig)
    rig.accounted(unsettled=[request[0]])


@pytest.mark.parametrize("kind", ["slow", "drop_after_commit"])
def test_while_sql_server_settles(make_rig: MakeRig, crowd: ThreadPoolExecutor, kind: str) -> None:
    """The call has arrived there: it is not done yet, or it is done and nobody was told."""
    rig = make_rig("mssql")
    assert rig.sql_server is not None and (tds := rig.sql_server.tds) is not None
    rig.token(key=KEY)
    tds.control(do="fault", kind=kind, procedure="usp_SettleUsage", seconds=60)
    tds.control(do="fault", kind="slow", procedure="usp_SettleUsage", seconds=60, times=100)
    request = rig.upload()
    answer = crowd.submit(rig.send, sent=request)
    calls = 1 if kind == "slow" else 2  # what got no answer is tried again
    eventually(lambda: tds.control(do="state")["calls"].get("usp_SettleUsage", 0) == calls)
    rig.kill()
    broken_off(answer.result(PATIENCE))
    tds.control(do="reset")
    serves(rig)
    rig.accounted(unsettled=[request[0]] if kind == "slow" else [])


def test_after_it_settled_before_it_answers(make_rig: MakeRig, emulator: Emulator) -> None:
    """The answer is larger than a socket holds, and nobody reads it."""
    rig = make_rig()
    rig.token(key=KEY)
    lines = [{"description": "x" * 1000}] * 2000
    emulator.script(KEY, {"text": json.dumps({"invoice_number": "1", "line_items": lines})})
    request = rig.upload()
    with closing(rig.begin(request)) as client:
        eventually(lambda: rig.states(request[0]) == ["settled"])
        rig.kill()
        with suppress(ConnectionResetError):
            assert len(client.read()) < 1_000_000
    serves(rig)
    rig.accounted()


def test_on_the_fallback_key_while_the_store_is_away(make_rig: MakeRig, emulator: Emulator,
                                                     crowd: ThreadPoolExecutor) -> None:
    """The reservation is in the outbox, and reaches the store by another process."""
    rig = make_rig(fallback=True, env={"EXTRACT_STORE_QUERY_TIMEOUT": "300ms"})
    emulator.script("*", {"hold": True})
    request = rig.upload()
    with rig.store_away():
        answer = crowd.submit(rig.send, sent=request)
        emulator.wait(held=1)
        rig.kill()
        broken_off(answer.result(PATIENCE))
        assert rig.reservations(request[0]) == []
    serves(rig)
    rig.accounted(unsettled=[request[0]])


def test_with_settlements_in_the_outbox(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor) -> None:
    """They were answered; that must be true whatever becomes of the process."""
    rig = make_rig(env={"EXTRACT_STORE_QUERY_TIMEOUT": "300ms"})
    rig.token(key=KEY)
    emulator.script(KEY, *[{"hold": True}] * 6)
    answers = [crowd.submit(rig.send) for _ in range(6)]
    emulator.wait(held=6)
    with rig.store_away():
        emulator.release()
        assert {answer.result(PATIENCE).status for answer in answers} == {200}
        rig.kill()
    serves(rig)
    rig.accounted()


def test_while_it_writes_to_the_outbox(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor) -> None:
    """In the middle of its transaction, which is undone."""
    rig = make_rig(env={"EXTRACT_STORE_QUERY_TIMEOUT": "300ms"})
    rig.token(key=KEY)
    rig.in_outbox(f"CREATE TRIGGER Slow AFTER INSERT ON Outbox BEGIN {LONG_STATEMENT}; END")
    emulator.script(KEY, {"hold": True})
    request = rig.upload()
    answer = crowd.submit(rig.send, sent=request)
    emulator.wait(held=1)
    with rig.store_away():
        emulator.release()
        eventually(lambda: is_written_to(rig.state_dir / "outbox.db"), "it is in its transaction")
        rig.kill()
        broken_off(answer.result(PATIENCE))
    rig.in_outbox("DROP TRIGGER Slow")
    assert rig.outbox_rows() == 0
    serves(rig)
    rig.accounted(unsettled=[request[0]])


def test_while_it_replays_the_outbox(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor) -> None:
    """In the middle of its transaction with the store: the next one replays it again, and it counts once."""
    rig = make_rig(env={"EXTRACT_STORE_QUERY_TIMEOUT": "300ms"})
    rig.token(key=KEY)
    # Of four the third takes for ever.
    rig.sql("CREATE TRIGGER Slow AFTER INSERT ON TokenUsageLogs"
            f" WHEN (SELECT COUNT(*) FROM TokenUsageLogs) = 3 BEGIN {LONG_STATEMENT}; END")
    emulator.script(KEY, *[{"hold": True}] * 4)
    answers = [crowd.submit(rig.send) for _ in range(4)]
    emulator.wait(held=4)
    with rig.store_away():
        emulator.release()
        assert {answer.result(PATIENCE).status for answer in answers} == {200}
    eventually(lambda: len(rig.sql("SELECT 1 AS x FROM TokenUsageLogs")) == 2)
    rig.kill()
    rig.sql("DROP TRIGGER Slow")
    serves(rig)
    rig.accounted()


def test_between_the_store_and_its_outbox(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor) -> None:
    """The store has the settlement, the outbox has it still: it is replayed once more, and counts once."""
    rig = make_rig(env={"EXTRACT_STORE_QUERY_TIMEOUT": "300ms"})
    rig.token(key=KEY)
    rig.in_outbox(f"CREATE TRIGGER Slow BEFORE DELETE ON Outbox BEGIN {LONG_STATEMENT}; END")
    emulator.script(KEY, {"hold": True})
    request = rig.upload()
    answer = crowd.submit(rig.send, sent=request)
    emulator.wait(held=1)
    with rig.store_away():
        emulator.release()
        assert answer.result(PATIENCE).status == 200
    eventually(lambda: rig.states(request[0]) == ["settled"])
    rig.kill()
    rig.in_outbox("DROP TRIGGER Slow")
    assert rig.outbox_rows() == 1
    serves(rig)
    rig.accounted()


@pytest.mark.parametrize("seed", range(3))
def test_at_any_moment(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor, seed: int) -> None:
    """Under load, again and again. Each client knows which of its requests broke off; of those, what Gemini answered is
    either settled or unsettled."""
    rig = make_rig(processes=3, env={"EXTRACT_SERVER_THREADS": "4", "EXTRACT_SERVER_QUEUE": "256"})
    for n in range(3):
        rig.token(key=f"key-of-the-test-{n}")
    emulator.script("*", {"delay": 0.01 * (seed + 1)}, repeat=True)
    begun = [rig.upload() for _ in range(160)]
    answers = [crowd.submit(rig.send, sent=request) for request in begun]
    for n in range(5):
        eventually(lambda: sum(answer.done() for answer in answers) > 20 * n)
        rig.kill(rig.pids()[0])
        rig.start()
        rig.settle_in()
    for answer in answers:
        if answer.result(PATIENCE).status != 200:
            broken_off(answer.result())
    rig.is_quiet()
    lost = [sent for sent, _ in begun if "open" in rig.states(sent)]
    assert {sent.answer.status for sent in lost if sent.answer is not None} <= {502}
    rig.accounted(unsettled=lost)
