"""Who may call: client keys, and what they open while the store is away."""
from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Answer, Emulator, Stack, eventually, form, refused

MakeStack = Callable[..., Stack]
BEARER = {"EXTRACT_AUTH_MODE": "bearer"}
KEY = re.compile(r"extract_[A-Za-z0-9_-]{43}")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def client_key(stack: Stack, company: str, *arguments: str) -> str:
    return stack.ctl("client-key", "add", "--company", company, *arguments, patient=True).stdout.strip()


def key_id(stack: Stack, key: str) -> str:
    [row] = stack.sql("SELECT ClientKeyID FROM ClientKeys WHERE KeyHash = ?", hashlib.sha256(key.encode()).hexdigest())
    return row["ClientKeyID"]


def last_warning(stack: Stack, answer: Answer) -> str:
    [row] = stack.rows("SELECT Message, Exception FROM ApplicationLogs WHERE RequestID = ? AND FunctionName = 'log_end'",
                       answer.headers["X-Request-ID"])
    return f"{row['Message']} {row['Exception']}"


@pytest.fixture(scope="module")
def _guarded(_emulator: Emulator, certificate: object) -> Iterator[Stack]:
    stack = Stack(_emulator, certificate, env=BEARER)  # type: ignore[arg-type]
    yield stack
    stack.close()


@pytest.fixture
def guarded(_guarded: Stack, emulator: Emulator) -> Iterator[Stack]:
    """A stack with auth.mode = bearer, of the module."""
    yield _guarded
    _guarded.balanced()


# ---- who gets in ----


def test_key_of_the_company_opens(guarded: Stack, company: str, pdf: bytes) -> None:
    guarded.token(company)
    key = client_key(guarded, company.lower(), "--label", "web shop")
    for headers in (bearer(key), {"Authorization": f"bearer   {key}"}):
        answer = guarded.post(pdf, company, headers=headers)
        assert answer.status == 200, answer.body
        [usage] = guarded.rows("SELECT ClientKeyID FROM TokenUsageLogs WHERE RequestID = ?", answer.json()["request_id"])
        assert usage["ClientKeyID"] == key_id(guarded, key)


def test_company_is_compared_without_regard_to_case(guarded: Stack, pdf: bytes) -> None:
    guarded.token("Käufer & Söhne")
    key = client_key(guarded, "Käufer & Söhne")
    assert guarded.post(pdf, "KÄUFER & SÖHNE", headers=bearer(key)).status == 200


@pytest.mark.parametrize("headers", [
    {}, {"Authorization": ""}, {"Authorization": "Bearer"}, {"Authorization": "Bearer "},
    {"Authorization": "Basic YTpi"}, {"Authorization": "Bearer no-key"},
    {"Authorization": "Bearer extract_" + "A" * 42}, {"Authorization": "Bearer extract_" + "A" * 44},
    {"Authorization": "Bearer extract_" + "A" * 42 + "!"}, {"Authorization": "Bearer extract_" + "A" * 43},
    {"Authorization": "Bearer extract_" + "A" * 43 + " x"}, {"X-Api-Key": "extract_" + "A" * 43},
], ids=repr)
def test_without_a_key_nobody_gets_in(guarded: Stack, emulator: Emulator, company: str, pdf: bytes,
                                      headers: dict[str, str]) -> None:
    guarded.token(company)
    answer = guarded.post(pdf, company, headers=headers)
    refused(answer, "unauthenticated")
    assert answer.headers["WWW-Authenticate"] == 'Bearer realm="extract-fcgi"'
    assert emulator.log() == []
    assert "peer=127.0.0.1" in last_warning(guarded, answer)


def test_a_refusal_comes_before_the_form_is_read(guarded: Stack) -> None:
    refused(guarded.request("POST", "/extract", b"nonsense", {"Content-Type": "text/plain"}), "unauthenticated")


def test_large_upload_without_a_key_is_read_and_refused(guarded: Stack) -> None:
    body, content_type = form(b"x" * (20 << 20))
    refused(guarded.request("POST", "/extract", body, {"Content-Type": content_type}), "unauthenticated")


def test_key_of_another_company_is_forbidden(guarded: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    guarded.token(company)
    key = client_key(guarded, f"{company}-other")
    answer = guarded.post(pdf, company, headers=bearer(key))
    refused(answer, "forbidden")
    assert emulator.log() == []
    assert "peer=127.0.0.1" in (said := last_warning(guarded, answer)) and key_id(guarded, key) in said


def test_administrators_key_extracts_nothing(guarded: Stack, company: str, pdf: bytes) -> None:
    guarded.token(company)
    key = guarded.ctl("client-key", "add", "--admin").stdout.strip()
    refused(guarded.post(pdf, company, headers=bearer(key)), "forbidden")


def test_revoked_key_ends_within_ten_seconds(guarded: Stack, company: str, pdf: bytes) -> None:
    guarded.token(company)
    key, other = client_key(guarded, company), client_key(guarded, company)
    assert guarded.post(pdf, company, headers=bearer(key)).status == 200
    revoked = guarded.ctl("client-key", "revoke", key_id(guarded, key))
    assert "revoked" in revoked.stdout
    begun = time.monotonic()
    refused(eventually(lambda: a if (a := guarded.post(None, company, headers=bearer(key))).status == 401 else None,
                       "the key is refused"), "unauthenticated")
    assert time.monotonic() - begun < 10
    assert guarded.post(pdf, company, headers=bearer(other)).status == 200


def test_health_needs_no_key(guarded: Stack) -> None:
    assert [guarded.get(path).status for path in ("/healthz", "/readyz", "/metrics")] == [200, 200, 200]


# ---- keys by hand ----


def test_key_is_shown_once_and_kept_as_a_hash(guarded: Stack, company: str) -> None:
    added = guarded.ctl("client-key", "add", "--company", company, "--label", "Büro")
    key = added.stdout.rstrip("\n")
    assert KEY.fullmatch(key)
    [row] = guarded.sql("SELECT * FROM ClientKeys WHERE CompanyID = ?", company)
    assert row["KeyHash"] == hashlib.sha256(key.encode()).hexdigest()
    assert (row["Label"], row["IsAdmin"], row["RevokedAt"]) == ("Büro", 0, None)
    assert row["ClientKeyID"] in added.stderr and key not in added.stderr
    listed = guarded.ctl("client-key", "list", "--company", company, "--json").stdout
    assert json.loads(listed)[0] | {"CreatedAt": ""} == {
        "ClientKeyID": row["ClientKeyID"], "CompanyID": company, "IsAdmin": 0, "Label": "Büro", "CreatedAt": "",
        "RevokedAt": None}
    guarded.ctl("client-key", "revoke", row["ClientKeyID"])
    guarded.ctl("client-key", "revoke", row["ClientKeyID"])  # no error, no second entry
    audit = guarded.sql("SELECT Action, CompanyID, Detail FROM AuditLog WHERE ObjectID = ? ORDER BY AuditID",
                        row["ClientKeyID"])
    assert [(a["Action"], a["CompanyID"]) for a in audit] == [("client key added", company),
                                                              ("client key revoked", company)]
    dump = "\n".join(json.dumps(r, default=str) for table in ("ClientKeys", "AuditLog", "ApplicationLogs")
                     for r in guarded.sql(f"SELECT * FROM {table}"))
    assert key not in dump and key.removeprefix("extract_") not in dump


def test_key_as_json(guarded: Stack, company: str) -> None:
    [made] = json.loads(guarded.ctl("client-key", "add", "--company", company, "--json").stdout)
    assert KEY.fullmatch(made["ClientKey"]) and made["ClientKeyID"] == key_id(guarded, made["ClientKey"])


@pytest.mark.parametrize("arguments, status, says", [
    (["add"], 2, "either --company ID or --admin"),
    (["add", "--admin", "--company", "A"], 2, "either --company ID or --admin"),
    (["add", "--company", ""], 2, "--company"),
    (["add", "--company", "A" * 257], 2, "--company"),
    (["add", "--company", "A", "--label", "a\nb"], 2, "--label"),
    (["revoke", "0123456789abcdef"], 1, "there is no client key 0123456789abcdef"),
    (["revoke", "'; --"], 1, "hexadecimal"),
    (["revoke"], 2, "ID"),
])
def test_faulty_command_is_refused(guarded: Stack, arguments: list[str], status: int, says: str) -> None:
    done = guarded.ctl("client-key", *arguments, check=False)
    assert (done.returncode, done.stdout) == (status, "")
    assert says in done.stderr


# ---- how often ----


def test_key_rate_holds_for_the_whole_pool(make_stack: MakeStack, company: str, pdf: bytes) -> None:
    stack = make_stack(processes=2, env=BEARER | {"EXTRACT_AUTH_KEY_RATE": "5"})
    stack.token(company)
    key, other = client_key(stack, company), client_key(stack, company)
    answers = [stack.post(pdf, company, headers=bearer(key)) for _ in range(8)]
    assert [a.status for a in answers] == [200] * 5 + [429] * 3
    problem = refused(answers[-1], "rate_limited")
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 12, problem
    assert stack.post(pdf, company, headers=bearer(other)).status == 200


# ---- while the store is away ----


@contextmanager
def away(stack: Stack) -> Iterator[None]:
    """The store can be neither read nor written."""
    if stack.sql_server is not None:
        with stack.store_away():
            yield
        return
    os.rename(stack.dir / "store.db", stack.dir / "elsewhere.db")
    yield
    os.rename(stack.dir / "elsewhere.db", stack.dir / "store.db")


@pytest.fixture
def with_fallback(make_stack: MakeStack, tmp_path: Path) -> Callable[..., Stack]:
    """Makes stacks of two processes with one worker each."""
    (tmp_path / "appSetting.txt").write_text("key-fallback\n")

    def make(**env: str) -> Stack:
        stack = make_stack(processes=2, env=BEARER | {
            "EXTRACT_FALLBACK_KEY_FILE": str(tmp_path / "appSetting.txt"), "EXTRACT_SERVER_THREADS": "1",
            "EXTRACT_STORE_QUERY_TIMEOUT": "500ms"} | env)
        stack.allowed_stderr += [r" (INFO|WARNING|ERROR) "]
        return stack

    return make


def test_key_confirmed_before_an_outage_stays_valid(with_fallback: Callable[..., Stack], emulator: Emulator,
                                                    crowd: ThreadPoolExecutor, company: str, pdf: bytes) -> None:
    stack = with_fallback()
    stack.token(company)
    known, unknown = client_key(stack, company), client_key(stack, company)
    assert stack.post(pdf, company, headers=bearer(known)).status == 200
    emulator.reset()
    emulator.script("key-fallback", {"hold": True}, repeat=True)
    with away(stack):
        # both processes: the one that has seen the key, and the one that has not
        both = [crowd.submit(stack.post, pdf, company, headers=bearer(known)) for _ in range(2)]
        emulator.wait(held=2)
        emulator.script("key-fallback", {}, repeat=True)
        emulator.release()
        assert [answer.result().status for answer in both] == [200, 200]
        refused(stack.post(pdf, company, headers=bearer(unknown)), "store_unavailable")
    usage = stack.rows("SELECT ClientKeyID, TokenSource FROM TokenUsageLogs WHERE TokenSource = 'fallback'", count=2)
    assert usage == [{"ClientKeyID": key_id(stack, known), "TokenSource": "fallback"}] * 2


def test_without_grace_an_outage_closes(with_fallback: Callable[..., Stack], company: str, pdf: bytes) -> None:
    stack = with_fallback(EXTRACT_AUTH_OFFLINE_GRACE="0")
    stack.token(company)
    key = client_key(stack, company)
    assert stack.post(pdf, company, headers=bearer(key)).status == 200
    with away(stack):
        refused(eventually(lambda: a if (a := stack.post(pdf, company, headers=bearer(key))).status != 200 else None,
                           "the key is not believed any more"), "store_unavailable")
