"""What a request leaves behind: every column of every row, and what must stand nowhere."""
from __future__ import annotations

import json
import re
import socket
import time
import uuid
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Answer, Emulator, Stack, eventually, refused
from gemini_answer import SCENARIOS

MakeStack = Callable[..., Stack]
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
TABLES = ["TokenMaster", "TokenUsageLogs", "TokenUsageSummary", "TokenUsageMonthly", "TokenReservations",
          "RetryAttempts", "ApplicationLogs", "ClientKeys", "IdempotencyKeys", "AuditLog", "SchemaVersion"]


def new_key() -> str:
    return f"key-{uuid.uuid4().hex}"


class Clock:
    """What was stamped while it was open."""

    def __init__(self) -> None:
        self.begin = time.time()

    def holds(self, text: str) -> bool:
        at = datetime.fromisoformat(text.replace("Z", "+00:00")).replace(tzinfo=timezone.utc).timestamp()
        return STAMP.fullmatch(text) is not None and self.begin - 0.002 <= at <= time.time() + 0.002


def only(stack: Stack, table: str, answer: Answer) -> dict[str, Any]:
    [row] = stack.rows(f"SELECT * FROM {table} WHERE RequestID = ?", answer.headers["X-Request-ID"])
    return row


def log_entries(stack: Stack, answer: Answer) -> list[dict[str, Any]]:
    """All entries of a request: the one that ends it comes last."""
    end = stack.rows("SELECT LogID FROM ApplicationLogs WHERE RequestID = ? AND FunctionName = 'log_end'",
                     answer.headers["X-Request-ID"])
    return stack.sql("SELECT * FROM ApplicationLogs WHERE RequestID = ? AND LogID <= ? ORDER BY LogID",
                     answer.headers["X-Request-ID"], end[0]["LogID"])


def nginx_request_id(stack: Stack, answer: Answer) -> str:
    """nginx's own number of the request, which its log has beside ours."""
    def find() -> list[str]:
        return re.findall(rf" request_id=(\w+) app_request_id={answer.headers['X-Request-ID']} ",
                          (stack.dir / "access.log").read_text())
    [found] = eventually(find, "nginx has logged the request")
    return found


def is_line_of(file: str, function: str, line: int) -> bool:
    """Does the line lie in the function's body?"""
    lines = (ROOT / "fcgi-app" / file).read_text().splitlines()
    begin = next(n for n, text in enumerate(lines, 1) if re.match(rf"[\w ]+\*?{function}\(", text) and
                 not text.endswith(";"))
    end = next(n for n, text in enumerate(lines[begin:], begin + 1) if text == "}")
    return begin < line < end


# ---- a success ----


def test_rows_of_a_success(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    key = new_key()
    token = stack.token(company, key, "--limit", "50000", "--company-name", "Ánh Dương", "--threshold", "0.9")
    before = stack.sql("SELECT * FROM TokenMaster WHERE TokenID = ?", token)
    clock = Clock()
    answer = stack.post(pdf, company, user="Jörg", branch="Köln-Süd")
    took = time.time() - clock.begin
    assert answer.status == 200
    request, usage = answer.json()["request_id"], answer.json()["usage"]

    [row] = stack.sql("SELECT * FROM TokenUsageLogs WHERE RequestID = ?", request)
    assert clock.holds(row.pop("LoggedAt"))
    assert 0 <= row.pop("DurationMs") <= took * 1000 + 1
    assert type(row.pop("UsageID")) is int
    assert row == {
        "TokenID": token, "Branch": "Köln-Süd", "RequestedBy": "Jörg", "InputTokens": usage["input_tokens"],
        "OutputTokens": usage["output_tokens"], "TextPromptTokens": usage["text_prompt_tokens"],
        "ImagePromptTokens": usage["image_prompt_tokens"], "TextCandidatesTokens": usage["text_candidates_tokens"],
        "TotalTokensUsed": usage["total_tokens"], "RequestCount": 1, "RequestID": request, "CompanyID": company,
        "ClientKeyID": None, "TokenSource": "store", "ThoughtsTokens": usage["thoughts_tokens"],
        "CachedTokens": usage["cached_tokens"], "UnknownCalls": 0, "Model": "gemini-3.5-flash",
        "TraceID": None}

    [row] = stack.sql("SELECT * FROM TokenUsageSummary WHERE TokenID = ?", token)
    assert clock.holds(row.pop("LastUpdated"))
    assert type(row.pop("SummaryID")) is int
    assert row == {"TokenID": token, "TotalUsedTokens": usage["total_tokens"],
                   "TotalRemainingTokens": 50000 - usage["total_tokens"], "Threshold": 0.9, "ReservedTokens": 0,
                   "ThresholdCrossedAt": None}

    [row] = stack.sql("SELECT * FROM TokenReservations WHERE RequestID = ?", request)
    created, expires = row.pop("CreatedAt"), row.pop("ExpiresAt")
    assert clock.holds(created) and clock.holds(row.pop("ClosedAt"))
    span = datetime.fromisoformat(expires[:-1]) - datetime.fromisoformat(created[:-1])
    assert span.total_seconds() > 120, "longer than the deadline"
    assert type(row.pop("ReservationID")) is int
    assert row == {"RequestID": request, "Sequence": 1, "TokenID": token, "CompanyID": company, "Branch": "Köln-Süd",
                   "RequestedBy": "Jörg", "EstimatedTokens": 8000, "State": "settled", "UnknownCalls": 0,
                   "TokenSource": "store", "Host": socket.gethostname(), "ProcessID": stack.pids()[0]}

    [row] = log_entries(stack, answer)
    assert clock.holds(row.pop("Timestamp"))
    assert is_line_of("extract.c", "log_end", row.pop("LineNumber"))
    assert type(row.pop("LogID")) is int
    assert re.fullmatch(
        rf"extracted: company={company} user=Jörg type=application/pdf bytes={len(pdf)} attempts=1 "
        rf"tokens={usage['total_tokens']} model=gemini-3\.5-flash ms=\d+ "
        rf"proxy_request_id={nginx_request_id(stack, answer)}", row.pop("Message"))
    assert row == {"LogLevel": "INFO", "Logger": "extract", "Exception": None, "Module": "extract.c",
                   "FunctionName": "log_end", "RequestID": request, "Host": socket.gethostname(), "TraceID": None}

    assert stack.sql("SELECT * FROM RetryAttempts WHERE RequestID = ?", request) == []
    assert stack.sql("SELECT * FROM TokenMaster WHERE TokenID = ?", token) == before
    assert stack.sql("SELECT * FROM AuditLog WHERE RequestID = ?", request) == []


# ---- failures ----


def test_rows_of_a_failure(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    key = new_key()
    token = stack.token(company, key)
    emulator.scenario(key, "model_not_found")
    said = SCENARIOS["model_not_found"]["message"]
    clock = Clock()
    answer = stack.post(pdf, company, user="bo", branch="")
    refused(answer, "upstream_rejected")
    request = answer.headers["X-Request-ID"]

    row = only(stack, "RetryAttempts", answer)
    assert clock.holds(row.pop("Timestamp"))
    assert type(row.pop("RetryID")) is int
    assert row == {"TokenID": token, "CompanyID": company, "Attempt": 1, "ErrorMessage": f"HTTP 404 NOT_FOUND: {said}",
                   "IsRetryable": 0, "RequestID": request, "StatusCode": 404, "DelayMs": 0}

    row = only(stack, "TokenReservations", answer)
    assert (row["State"], row["TokenID"], row["Branch"], row["RequestedBy"]) == ("released", token, "", "bo")
    assert clock.holds(row["ClosedAt"])

    [row] = log_entries(stack, answer)
    assert is_line_of("extract.c", "log_end", row["LineNumber"])
    assert re.fullmatch(rf"upstream_rejected: company={company} user=bo attempts=1 tokens=0 ms=\d+ "
                        rf"peer=127\.0\.0\.1 "
                        rf"proxy_request_id={nginx_request_id(stack, answer)}", row["Message"])
    assert row["Exception"] == f"HTTP 404 NOT_FOUND: {said}"
    assert (row["LogLevel"], row["Logger"], row["Module"], row["FunctionName"]) \
        == ("ERROR", "extract", "extract.c", "log_end")

    assert stack.sql("SELECT * FROM TokenUsageLogs WHERE RequestID = ?", request) == []
    [row] = stack.sql("SELECT TotalUsedTokens, ReservedTokens, TotalRemainingTokens FROM TokenUsageSummary"
                      " WHERE TokenID = ?", token)
    assert row == {"TotalUsedTokens": 0, "ReservedTokens": 0, "TotalRemainingTokens": None}
    assert [r["RequestID"] for r in stack.sql("SELECT * FROM vw_FailedRetries WHERE CompanyID = ?", company)] \
        == [request]
    assert [r["RequestID"] for r in stack.sql("SELECT * FROM vw_RecentErrors WHERE RequestID = ?", request)] \
        == [request]


@pytest.mark.parametrize("file, user, code, exception", [
    (b"GIF89a;", "anna", "unsupported_media_type", "not a PDF"),
    (b"", "anna", "invalid_file", "empty file"),
    (b"%PDF-1.4", "anna", "invalid_file", "%%EOF"),
    (b"%PDF-1.4 %%EOF", "anna", "no_active_token", "No active token"),
    (b"%PDF-1.4 %%EOF", "", "bad_request", "username must not be empty"),
])
def test_rows_of_a_refusal(stack: Stack, company: str, file: bytes, user: str, code: str, exception: str) -> None:
    answer = stack.post(file, company, user=user)
    refused(answer, code)
    [row] = log_entries(stack, answer)
    assert row["LogLevel"] == "WARNING"
    assert row["Message"].startswith(f"{code}: company={company} user={user or '-'} attempts=0 tokens=0 ms=")
    assert exception in row["Exception"]
    for table in ("TokenReservations", "TokenUsageLogs", "RetryAttempts"):
        assert stack.sql(f"SELECT * FROM {table} WHERE RequestID = ?", answer.headers["X-Request-ID"]) == []


@pytest.mark.parametrize("step, code", [
    ({"status": 503, "message": "overloaded, sorry"}, "upstream_unavailable"),
    ({"status": 400, "message": "unreadable, sorry"}, "invalid_file"),
    ({"status": 400, "message": "not valid, sorry", "reason": "API_KEY_INVALID"}, "token_unavailable"),
    ({"status": 402, "message": "used up, sorry"}, "token_unavailable"),
    ({"status": 403, "message": "forbidden, sorry"}, "upstream_rate_limited"),
    ({"status": 429, "message": "too fast, sorry", "retry_delay": "3600s"}, "upstream_rate_limited"),
], ids=lambda value: str(value.get("status")) if isinstance(value, dict) else value)
def test_cause_chain(stack: Stack, emulator: Emulator, company: str, pdf: bytes, step: dict[str, Any],
                     code: str) -> None:
    """The log says what Gemini said: status and message."""
    key = new_key()
    stack.token(company, key)
    emulator.script(key, step, repeat=True)
    answer = stack.post(pdf, company)
    refused(answer, code)
    entry = log_entries(stack, answer)[-1]
    assert f"HTTP {step['status']} " in entry["Exception"] and step["message"] in entry["Exception"]
    assert entry["Message"].startswith(f"{code}: ")


def test_cause_chain_without_an_answer(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    key = new_key()
    stack.token(company, key)
    emulator.script(key, {"reset": "after_read"}, repeat=True)
    answer = stack.post(pdf, company)
    refused(answer, "upstream_unavailable", spent=True)
    entries = log_entries(stack, answer)
    assert len(entries[-1]["Exception"]) > 5
    [warning] = [e for e in entries if e["LogLevel"] == "WARNING"]
    assert warning["Module"] == "token.c" and "unsettled" in warning["Message"]


def test_rows_of_retries(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    key = new_key()
    token = stack.token(company, key)
    emulator.script(key, {"status": 503, "message": "one"}, {"status": 500, "message": "two"})
    clock = Clock()
    answer = stack.post(pdf, company)
    assert answer.status == 200
    rows = stack.rows("SELECT * FROM RetryAttempts WHERE RequestID = ? ORDER BY RetryID",
                      answer.json()["request_id"], count=2)
    assert all(clock.holds(row.pop("Timestamp")) and row.pop("RetryID") and 10 <= row.pop("DelayMs") <= 60
               for row in rows)
    common = {"TokenID": token, "CompanyID": company, "IsRetryable": 1, "RequestID": answer.json()["request_id"]}
    assert rows == [common | {"Attempt": 1, "StatusCode": 503, "ErrorMessage": "HTTP 503 UNAVAILABLE: one"},
                    common | {"Attempt": 2, "StatusCode": 500, "ErrorMessage": "HTTP 500 INTERNAL: two"}]
    [entry] = log_entries(stack, answer)
    assert (entry["LogLevel"], entry["Exception"]) == ("INFO", None)
    assert " attempts=3 " in entry["Message"]
    assert stack.sql("SELECT * FROM vw_FailedRetries WHERE CompanyID = ?", company) == [], "it was served in the end"
    assert only(stack, "TokenUsageLogs", answer)["RequestCount"] == 1


# ---- usage that nobody knows ----


def test_answer_without_usage(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    key = new_key()
    token = stack.token(company, key)
    emulator.script(key, {"usage": None})
    answer = stack.post(pdf, company)
    assert answer.status == 200
    assert set(answer.json()["usage"].values()) == {0}
    assert answer.json()["attempts"] == 1
    request = answer.json()["request_id"]
    assert stack.sql("SELECT * FROM TokenUsageLogs WHERE RequestID = ?", request) == []
    row = only(stack, "TokenReservations", answer)
    assert (row["State"], row["UnknownCalls"], row["ClosedAt"]) == ("unsettled", 1, None)
    assert [r["RequestID"] for r in stack.sql("SELECT * FROM vw_UnsettledRequests WHERE TokenID = ?", token)] \
        == [request]
    warnings = [e for e in log_entries(stack, answer) if e["LogLevel"] == "WARNING"]
    assert any("usageMetadata" in e["Message"] for e in warnings)


def test_one_answer_of_two_without_usage(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    key = new_key()
    stack.token(company, key)
    emulator.script(key, {"usage": None, "text": "no"})
    answer = stack.post(pdf, company)
    assert answer.json()["attempts"] == 2
    row = only(stack, "TokenUsageLogs", answer)
    assert (row["RequestCount"], row["UnknownCalls"], row["TotalTokensUsed"]) \
        == (1, 1, emulator.log()[1]["usage"]["totalTokenCount"])
    assert only(stack, "TokenReservations", answer)["State"] == "settled"


def test_without_usage_and_blocked(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    key = new_key()
    stack.token(company, key)
    emulator.script(key, {"usage": None, "block_reason": "SAFETY"})
    answer = stack.post(pdf, company)
    refused(answer, "invalid_file", spent=True)
    assert only(stack, "TokenReservations", answer)["State"] == "unsettled"


# ---- what comes from outside ----

FORGED = "stop\r\n2026-01-01T00:00:00.000Z CRITICAL forged\tentry\x1b[31m\u0085\u2028end\\n"
ESCAPED = "stop\\r\\n2026-01-01T00:00:00.000Z CRITICAL forged\\x09entry\\x1B[31m\\xC2\\x85\\xE2\\x80\\xA8end\\\\n"


def test_messages_are_escaped(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    key = new_key()
    stack.token(company, key)
    emulator.script(key, {"status": 404, "message": FORGED})
    answer = stack.post(pdf, company)
    refused(answer, "upstream_rejected")
    [entry] = log_entries(stack, answer)
    assert entry["Exception"] == f"HTTP 404 NOT_FOUND: {ESCAPED}"


def test_user_with_odd_characters(stack: Stack, company: str, pdf: bytes) -> None:
    stack.token(company)
    user = "a\\nb company=other attempts=9 %s%n \u202e"
    answer = stack.post(pdf, company, user=user.strip())
    assert answer.status == 200
    [entry] = log_entries(stack, answer)
    assert "user=a\\\\nb company=other" in entry["Message"] and "%s%n" in entry["Message"]


@pytest.mark.parametrize("length", [370, 371, 372, 373, 5000])
@pytest.mark.parametrize("character", ["ü", "€", "😀"])
def test_long_messages_are_cut_between_characters(stack: Stack, emulator: Emulator, company: str, pdf: bytes,
                                                  character: str, length: int) -> None:
    key = new_key()
    stack.token(company, key)
    emulator.script(key, {"status": 429, "retry_delay": "3600s",
                          "message": "x" * (length % 7) + character * (length // len(character.encode()))})
    answer = stack.post(pdf, company)
    refused(answer, "upstream_rate_limited")
    # sqlite3 raises where a text is not UTF-8
    message = only(stack, "RetryAttempts", answer)["ErrorMessage"]
    assert set(message.split(": ", 1)[1].strip("x")) <= {character, "?"}
    [token] = stack.sql("SELECT StatusReason FROM TokenMaster WHERE CompanyID = ?", company)
    assert token["StatusReason"] == message
    assert log_entries(stack, answer)[-1]["Exception"].endswith(message)


def test_message_that_is_no_text(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    key = new_key()
    stack.token(company, key)
    emulator.script(key, {"status": 404, "body": '{"error": {"message": "lone \\ud800 and \\u0000 end"}}'})
    answer = stack.post(pdf, company)
    refused(answer, "upstream_rejected")
    assert only(stack, "RetryAttempts", answer)["ErrorMessage"].startswith("HTTP 404 : lone ")
    assert log_entries(stack, answer)[-1]["Exception"].startswith("HTTP 404 : lone ")


# ---- levels and sinks ----


@pytest.mark.parametrize("level, kept", [("DEBUG", ["INFO", "WARNING", "ERROR"]), ("WARNING", ["WARNING", "ERROR"]),
                                         ("ERROR", ["ERROR"])])
def test_log_level(make_stack: MakeStack, emulator: Emulator, pdf: bytes, level: str, kept: list[str]) -> None:
    stack = make_stack(env={"EXTRACT_LOG_LEVEL": level})
    stack.token("NT047", "key-of-the-test")
    emulator.script("key-of-the-test", {}, {"status": 404})
    assert stack.post(pdf).status == 200
    refused(stack.post(b"GIF89a"), "unsupported_media_type")
    last = stack.post(pdf)
    refused(last, "upstream_rejected")
    log_entries(stack, last)
    levels = [row["LogLevel"] for row in stack.sql("SELECT LogLevel FROM ApplicationLogs WHERE RequestID IS NOT NULL"
                                                   " ORDER BY LogID")]
    assert levels == kept


def test_log_to_stderr(make_stack: MakeStack, emulator: Emulator, pdf: bytes) -> None:
    stack = make_stack(env={"EXTRACT_LOG_SINK": "stderr"})
    stack.allowed_stderr = [r"^\S+Z (INFO|WARNING|ERROR) "]
    stack.token("NT047", "key-of-the-test")
    emulator.script("key-of-the-test", {"status": 404, "message": FORGED})
    answer = stack.post(pdf)
    refused(answer, "upstream_rejected")
    only(stack, "RetryAttempts", answer)
    lines = [line for line in (stack.dir / "pool.log").read_text().splitlines()
             if answer.headers["X-Request-ID"] in line]
    assert len(lines) == 1
    match = re.fullmatch(
        rf"(\S+) ERROR extract extract\.c:(\d+) log_end \[{answer.headers['X-Request-ID']}\] "
        rf"upstream_rejected: company=NT047 user=anna .*proxy_request_id=\w+: HTTP 404 NOT_FOUND: (.*)", lines[0])
    assert match and STAMP.fullmatch(match[1]) and is_line_of("extract.c", "log_end", int(match[2]))
    assert match[3] == ESCAPED
    assert stack.sql("SELECT * FROM ApplicationLogs") == []


def test_entries_outside_requests(make_stack: MakeStack) -> None:
    stack = make_stack()
    pid = stack.pids()[0]
    [started] = stack.rows("SELECT * FROM ApplicationLogs WHERE Message LIKE 'started:%'")
    assert f"pid={pid} " in started["Message"]
    assert (started["LogLevel"], started["RequestID"], started["Logger"]) == ("INFO", None, "main")
    stack.stop_pool()
    [stopped] = stack.sql("SELECT * FROM ApplicationLogs WHERE Message LIKE 'stopped:%'")
    assert f"pid={pid}" in stopped["Message"]


# ---- what stands nowhere ----


def test_no_key_no_file_name_no_content(make_stack: MakeStack, emulator: Emulator, pdf: bytes) -> None:
    stack = make_stack()
    key, content, name = "AIzaSyC0ffee" + uuid.uuid4().hex, "GEHEIMKUNDE", "geheime-rechnung-4711"
    token = stack.token("NT047", key)
    gossip = f"Consumer 'api_key:{key}' has been suspended; {key}{key}."
    invoice = {"invoice_number": content, "vendor": {"name": content, "iban": "DE00" + content}, content: content,
               "totals": {"subtotal": "1", "tax": "1", "total": "9", "discount": content}, "line_items": content}

    def post(file: bytes) -> Answer:
        body = b"".join(
            b"--b\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (head, value) for head, value in (
                (b'name="companyID"', b"NT047"), (b'name="username"', b"anna"),
                (b'name="file"; filename="%s.pdf"' % name.encode(), file)))
        return stack.request("POST", "/extract", body + b"--b--\r\n",
                             {"Content-Type": "multipart/form-data; boundary=b"})

    answers = []
    for steps in ([{"text": json.dumps(invoice)}], [{"text": content + "{"}] * 2, [{"text": json.dumps([invoice])}] * 2,
                  [{"finish_reason": "SAFETY"}], [{"status": 403, "message": gossip, "reason": "CONSUMER_SUSPENDED"}],
                  [{"status": 404, "message": "x" * 360 + key}], [{"status": 400, "message": gossip}],
                  [{"status": 503, "message": gossip}] * 4,
                  [{"status": 429, "message": gossip, "retry_delay": "3600s"}],
                  [{"status": 500, "body": gossip}] * 4, [{"status": 403, "message": gossip}],
                  [{"reset": "after_read"}] * 4, [{"status": 402, "message": gossip}]):
        stack.ctl("token", "set-status", str(token), "Active")
        emulator.script(key, *steps)
        answers.append(post(pdf + content.encode()))
    answers.append(post(content.encode()))
    assert [answer.status for answer in answers] \
        == [200, 502, 502, 422, 403, 502, 422, 502, 503, 502, 503, 502, 403, 415]
    assert len(emulator.log()) == 1 + 2 + 2 + 1 + 1 + 1 + 1 + 4 + 1 + 4 + 1 + 4 + 1
    log_entries(stack, answers[-1])
    listed = stack.ctl("token", "list").stdout + stack.ctl("logs").stdout + stack.ctl("retries").stdout
    stack.stop_pool()

    for table in TABLES:
        for row in stack.sql(f"SELECT * FROM {table}"):
            if table == "TokenMaster":
                assert row.pop("ApiKey") == key
            text = json.dumps(row, ensure_ascii=False)
            assert key not in text and key[:20] not in text, (table, row)
            assert content not in text and name not in text, (table, row)
    assert key[:20] not in listed and content not in listed and name not in listed
    for file in files_below(stack.dir):
        data = file.read_bytes()
        assert content.encode() not in data, file
        assert name.encode() not in data, file
        assert file.name.startswith("store.db") or key.encode() not in data, file
    assert list((stack.dir / "body").rglob("*")) == [], "no upload is left"


def files_below(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]
