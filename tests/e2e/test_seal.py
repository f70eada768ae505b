"""API keys sealed at rest: what the tables hold, and what happens without the sealing key."""
from __future__ import annotations

import base64
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Emulator, Stack, refused

MakeStack = Callable[..., Stack]


def sealing_key() -> str:
    return base64.b64encode(os.urandom(32)).decode()


def write_keys(path: Path, *keys: str) -> None:
    path.write_text("".join(f"{key}\n" for key in keys))
    path.chmod(0o600)


def new_key() -> str:
    return f"key-{uuid.uuid4().hex}"


def stored(stack: Stack, token: int) -> str:
    [row] = stack.sql("SELECT ApiKey FROM TokenMaster WHERE TokenID = ?", token)
    return row["ApiKey"]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    write_keys(tmp_path / "seal.key", sealing_key())
    return tmp_path / "seal.key"


@pytest.fixture
def sealed(make_stack: MakeStack, key_file: Path) -> Stack:
    """A stack with seal.key_file."""
    return make_stack(env={"EXTRACT_SEAL_KEY_FILE": str(key_file)})


def test_keys_are_sealed_in_the_table_and_plain_to_gemini(sealed: Stack, emulator: Emulator, company: str,
                                                          pdf: bytes) -> None:
    first, second = new_key(), new_key()
    token = sealed.token(company, first)
    assert stored(sealed, token).startswith("sealed:v1:") and first not in stored(sealed, token)
    assert sealed.post(pdf, company).status == 200
    sealed.ctl("token", "set-key", str(token), stdin=second + "\n")
    assert stored(sealed, token).startswith("sealed:v1:")
    assert sealed.post(pdf, company).status == 200
    assert [call["key"] for call in emulator.log()] == [first, second]
    [row] = json.loads(sealed.ctl("token", "list", "--company", company, "--json").stdout)
    assert (row["ApiKey"], row["Status"]) == ("sealed", "Active")


def test_longest_key_is_sealed_and_a_longer_one_refused(sealed: Stack, company: str) -> None:
    assert stored(sealed, sealed.token(company, "k" * 700)).startswith("sealed:v1:")
    done = sealed.ctl("token", "add", "--company", company, stdin="k" * 701 + "\n", check=False)
    assert done.returncode == 1 and "700 bytes" in done.stderr
    assert sealed.sql("SELECT COUNT(*) AS n FROM TokenMaster WHERE CompanyID = ?", company) == [{"n": 1}]


def test_another_rows_key_does_not_open(sealed: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    mine, other = sealed.token(company), sealed.token(f"{company}-other")
    sealed.sql("UPDATE TokenMaster SET ApiKey = ? WHERE TokenID = ?", stored(sealed, other), mine)
    answer = sealed.post(pdf, company)
    refused(answer, "internal_error")
    assert emulator.log() == []
    entries = sealed.rows("SELECT LogLevel, Exception FROM ApplicationLogs WHERE RequestID = ? AND LogLevel = 'CRITICAL'",
                          answer.headers["X-Request-ID"])
    assert f"token {mine} does not open" in entries[0]["Exception"]
    # nothing is held, and the token itself stays as it was: perhaps only this host is at fault
    assert sealed.sql("SELECT Status, CooldownUntil FROM TokenMaster WHERE TokenID = ?", mine) == [
        {"Status": "Active", "CooldownUntil": None}]
    assert sealed.sql("SELECT ReservedTokens FROM TokenUsageSummary WHERE TokenID = ?", mine) == [{"ReservedTokens": 0}]
    sealed.balanced()


def test_request_goes_on_to_a_token_that_opens(sealed: Stack, company: str, pdf: bytes) -> None:
    bad, good = sealed.token(company), sealed.token(company)
    sealed.sql("UPDATE TokenMaster SET ApiKey = ? WHERE TokenID = ?", stored(sealed, good), bad)
    for _ in range(8):  # whichever is chosen first
        answer = sealed.post(pdf, company)
        assert answer.status == 200, answer.body
        [usage] = sealed.rows("SELECT TokenID FROM TokenUsageLogs WHERE RequestID = ?", answer.json()["request_id"])
        assert usage["TokenID"] == good
    sealed.balanced()


def test_plain_keys_keep_working_and_are_converted(make_stack: MakeStack, key_file: Path, company: str,
                                                   pdf: bytes) -> None:
    stack = make_stack()
    key = new_key()
    token = stack.token(company, f"{key}")
    stack.sql("UPDATE TokenMaster SET ApiKey = ? WHERE TokenID = ?", f"{key}\r\n", token)  # as pasted by hand
    stack.stop_pool()
    stack.socket.unlink()
    stack.env["EXTRACT_SEAL_KEY_FILE"] = str(key_file)
    stack.start_pool()
    stack.answers()
    assert stack.post(pdf, company).status == 200
    assert f"in clear: token {token}" in stack.ctl("check", check=False).stdout
    assert json.loads(stack.ctl("seal", "--json").stdout) == [{"Sealed": 1, "Unreadable": 0}]
    assert stored(stack, token).startswith("sealed:v1:")
    assert stack.post(pdf, company).status == 200
    assert "in clear: token" not in stack.ctl("check", check=False).stdout
    assert json.loads(stack.ctl("seal", "--json").stdout) == [{"Sealed": 0, "Unreadable": 0}]
    audit = stack.sql("SELECT Action FROM AuditLog WHERE ObjectID = ? ORDER BY AuditID", str(token))
    assert audit[-1]["Action"] == "token key sealed"


def test_sealing_key_is_replaced_without_a_pause(make_stack: MakeStack, tmp_path: Path, company: str,
                                                 pdf: bytes) -> None:
    old, new, file = sealing_key(), sealing_key(), tmp_path / "seal.key"
    write_keys(file, old)
    stack = make_stack(env={"EXTRACT_SEAL_KEY_FILE": str(file)})
    token = stack.token(company)
    before = stored(stack, token)
    write_keys(file, new, old)  # extractctl seals by the new one
    restart(stack)
    assert stack.post(pdf, company).status == 200
    assert json.loads(stack.ctl("seal", "--json").stdout) == [{"Sealed": 1, "Unreadable": 0}]
    assert stored(stack, token) != before
    write_keys(file, new)
    restart(stack)
    assert stack.post(pdf, company).status == 200


def test_without_the_sealing_key_it_is_said(make_stack: MakeStack, tmp_path: Path, company: str, pdf: bytes) -> None:
    file = tmp_path / "seal.key"
    write_keys(file, sealing_key())
    stack = make_stack(env={"EXTRACT_SEAL_KEY_FILE": str(file)})
    token = stack.token(company)
    write_keys(file, sealing_key())
    restart(stack)
    refused(stack.post(pdf, company), "internal_error")
    done = stack.ctl("seal", "--json", check=False)
    assert (done.returncode, json.loads(done.stdout)) == (1, [{"Sealed": 0, "Unreadable": 1}])
    checked = stack.ctl("check", check=False)
    assert f"token {token}" in checked.stdout and "seal.key_file does not hold" in checked.stdout
    del stack.env["EXTRACT_SEAL_KEY_FILE"]
    done = stack.ctl("seal", check=False)
    assert done.returncode == 2 and "seal.key_file" in done.stderr
    restart(stack)
    refused(stack.post(pdf, company), "internal_error")


def restart(stack: Stack) -> None:
    stack.stop_pool()
    stack.socket.unlink()
    stack.start_pool()
    stack.answers()
