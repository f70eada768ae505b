"""Idempotency-Key: a second click never pays twice."""
from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Answer, Emulator, Stack, eventually, refused

MakeStack = Callable[..., Stack]


def new_key() -> str:
    return f"key-{uuid.uuid4().hex}"


def with_key(key: str) -> dict[str, str]:
    return {"Idempotency-Key": key}


def names(answer: Answer, first: str) -> bool:
    return f"Its request_id is {first}." in answer.json()["detail"]


def states(stack: Stack, company: str) -> list[tuple[str, str]]:
    return [(row["IdempotencyKey"], row["State"]) for row in
            stack.sql("SELECT IdempotencyKey, State FROM IdempotencyKeys WHERE CompanyID = ? ORDER BY IdempotencyKey", company)]


def test_done_is_not_done_again(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    stack.token(company)
    first = stack.post(pdf, company, headers=with_key("order-1"))
    assert first.status == 200
    again = stack.post(pdf, company.lower(), headers=with_key("order-1"))
    refused(again, "already_processed")
    assert names(again, first.json()["request_id"])
    assert len(emulator.log()) == 1
    assert stack.post(pdf, company, headers=with_key("order-2")).status == 200
    assert stack.post(pdf, company).status == 200  # without a key each is its own
    assert states(stack, company) == [("order-1", "done"), ("order-2", "done")]


def test_in_flight_is_not_begun_again(stack: Stack, emulator: Emulator, crowd: ThreadPoolExecutor, company: str,
                                      pdf: bytes) -> None:
    key = new_key()
    stack.token(company, key)
    emulator.script(key, {"hold": True})
    first = crowd.submit(stack.post, pdf, company, headers=with_key("k"))
    emulator.wait(held=1)
    again = stack.post(pdf, company, headers=with_key("k"))
    refused(again, "request_in_progress")
    emulator.release()
    assert first.result().status == 200
    assert names(again, first.result().json()["request_id"])
    assert len(emulator.log()) == 1


def test_many_clicks_pay_once(make_stack: MakeStack, emulator: Emulator, crowd: ThreadPoolExecutor, company: str,
                              pdf: bytes) -> None:
    stack = make_stack(processes=2)
    stack.token(company)
    answers = [f.result() for f in [crowd.submit(stack.post, pdf, company, headers=with_key("k")) for _ in range(24)]]
    [paid] = [a for a in answers if a.status == 200]
    assert {a.code for a in answers if a is not paid} <= {"request_in_progress", "already_processed"}
    assert all(names(a, paid.json()["request_id"]) for a in answers if a is not paid)
    assert len(emulator.log()) == 1
    stack.balanced()


def test_keys_are_the_companys_own(stack: Stack, company: str, pdf: bytes) -> None:
    for name in (company, f"{company}-other"):
        stack.token(name)
        assert stack.post(pdf, name, headers=with_key("k")).status == 200


def test_company_beyond_ascii_in_any_case(stack: Stack, pdf: bytes) -> None:
    stack.token("Ölmühle Ñandú")
    first = stack.post(pdf, "ölmühle ñandú", headers=with_key("k"))
    assert first.status == 200
    refused(stack.post(pdf, "ÖLMÜHLE ÑANDÚ", headers=with_key("k")), "already_processed")
    stack.token("ÖLMÜHLE ÑANDÚ")  # the newest spelling
    refused(stack.post(pdf, "ölmühle ñandú", headers=with_key("k")), "already_processed")


@pytest.mark.parametrize("step, code", [({"status": 503}, "upstream_unavailable"), ({"status": 400}, "invalid_file")])
def test_what_spent_nothing_may_come_again(stack: Stack, emulator: Emulator, company: str, pdf: bytes,
                                           step: dict[str, int], code: str) -> None:
    key = new_key()
    stack.token(company, key)
    emulator.script(key, step, repeat=True)
    refused(stack.post(pdf, company, headers=with_key("k")), code)
    assert states(stack, company) == []
    emulator.script(key, {}, repeat=True)
    assert stack.post(pdf, company, headers=with_key("k")).status == 200
    assert states(stack, company) == [("k", "done")]


def test_refused_before_any_call_keeps_no_key(stack: Stack, company: str, pdf: bytes) -> None:
    token = stack.token(company)
    stack.ctl("token", "set-status", str(token), "Expired")
    refused(stack.post(pdf, company, headers=with_key("k")), "token_expired")
    refused(stack.post(b"%PDF-", company, headers=with_key("k")), "invalid_file")
    stack.ctl("token", "set-status", str(token), "Active")
    assert stack.post(pdf, company, headers=with_key("k")).status == 200


def test_every_token_at_fault_frees_the_key(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    """The token was released when the next was looked for; there is none left to settle the key with."""
    key = new_key()
    token = stack.token(company, key)
    emulator.script(key, {"status": 402})
    refused(stack.post(pdf, company, headers=with_key("k")), "token_unavailable")
    assert states(stack, company) == []
    stack.ctl("token", "set-status", str(token), "Active")
    assert stack.post(pdf, company, headers=with_key("k")).status == 200


def test_spent_without_an_answer_is_done(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    key = new_key()
    stack.token(company, key)
    emulator.script(key, {"close": "after_read"}, repeat=True)
    first = stack.post(pdf, company, headers=with_key("k"))
    refused(first, "upstream_unavailable", spent=True)
    again = stack.post(pdf, company, headers=with_key("k"))
    refused(again, "already_processed")
    assert names(again, first.json()["request_id"])


def test_one_day(stack: Stack, company: str, pdf: bytes) -> None:
    stack.token(company)
    first = stack.post(pdf, company, headers=with_key("k"))
    [row] = stack.sql("SELECT * FROM IdempotencyKeys WHERE CompanyID = ?", company)
    assert row["RequestID"] == first.json()["request_id"]
    stack.sql("UPDATE IdempotencyKeys SET ExpiresAt = CreatedAt WHERE CompanyID = ?", company)
    again = stack.post(pdf, company, headers=with_key("k"))
    assert again.status == 200
    [row] = stack.sql("SELECT * FROM IdempotencyKeys WHERE CompanyID = ?", company)
    assert (row["RequestID"], row["State"]) == (again.json()["request_id"], "done")


def test_killed_in_the_middle_counts_as_done(make_stack: MakeStack, emulator: Emulator, crowd: ThreadPoolExecutor,
                                             company: str, pdf: bytes) -> None:
    stack = make_stack()
    key = new_key()
    stack.token(company, key)
    emulator.script(key, {"hold": True})
    lost = crowd.submit(stack.post, pdf, company, headers=with_key("k"))
    emulator.wait(held=1)
    [pid] = stack.pids()
    os.kill(pid, signal.SIGKILL)
    assert lost.result().status == 502
    stack.stop_pool()
    stack.socket.unlink()
    # the reservation is over
    stack.sql("UPDATE TokenReservations SET ExpiresAt = CreatedAt WHERE CompanyID = ?", company)
    stack.start_pool()
    stack.answers()
    eventually(lambda: states(stack, company) == [("k", "done")], "the key is done")
    refused(stack.post(pdf, company, headers=with_key("k")), "already_processed")


@pytest.mark.parametrize("key", ["a" * 129, "a b", "ä", "a\tb"], ids=repr)
def test_faulty_key_is_named(stack: Stack, emulator: Emulator, company: str, pdf: bytes, key: str) -> None:
    stack.token(company)
    problem = refused(stack.post(pdf, company, headers=with_key(key)), "bad_request")
    assert problem["detail"] == "Idempotency-Key must have 1 to 128 visible ASCII characters."
    assert emulator.log() == []


def test_longest_key(stack: Stack, company: str, pdf: bytes) -> None:
    stack.token(company)
    assert stack.post(pdf, company, headers=with_key("~" * 128)).status == 200
    refused(stack.post(pdf, company, headers=with_key("~" * 128)), "already_processed")


# ---- while the store is away ----


def test_through_an_outage(make_stack: MakeStack, emulator: Emulator, tmp_path: Path, company: str, pdf: bytes) -> None:
    (tmp_path / "appSetting.txt").write_text("key-fallback\n")
    stack = make_stack(processes=2, env={"EXTRACT_FALLBACK_KEY_FILE": str(tmp_path / "appSetting.txt"),
                                         "EXTRACT_STORE_QUERY_TIMEOUT": "300ms"})
    stack.allowed_stderr += [r" (INFO|WARNING|ERROR) "]
    stack.token(company)
    with stack.store_away():
        first = stack.post(pdf, company, headers=with_key("k"))
        assert first.status == 200, first.body
        again = stack.post(pdf, company, headers=with_key("k"))
        refused(again, "already_processed")
        assert names(again, first.json()["request_id"])
        assert stack.post(pdf, company, headers=with_key("other")).status == 200
    assert len(emulator.log()) == 2
    # and when it is back
    eventually(lambda: states(stack, company) == [("k", "done"), ("other", "done")], "the outbox is drained")
    again = stack.post(pdf, company, headers=with_key("k"))
    refused(again, "already_processed")
    assert names(again, first.json()["request_id"])
