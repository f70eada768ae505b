"""GET /admin/…: what an administrator reads, as JSON and as CSV, in pages; and who may not."""
from __future__ import annotations

import csv
import io
import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from conftest import IS_LIVE, PATIENCE, TEST_STORE, Answer, Emulator, FastCgi, Stack, eventually, refused

MakeStack = Callable[..., Stack]
PATHS = ["tokens", "usage", "errors", "retries", "unsettled", "outbox"]
VIEWS = [("tokens", None), ("tokens", "token"), ("tokens", "status"), ("usage", None), ("usage", "day"),
         ("usage", "company"), ("usage", "branch"), ("usage", "user"), ("usage", "token"), ("errors", None),
         ("retries", None), ("unsettled", None), ("outbox", None), ("outbox", "entry"), ("outbox", "state")]
SUMS = ["Requests", "RequestCount", "InputTokens", "OutputTokens", "TextPromptTokens", "ImagePromptTokens",
        "TextCandidatesTokens", "ThoughtsTokens", "CachedTokens", "TotalTokensUsed", "UnknownCalls"]
COLUMNS = {
    "tokens": ["TokenID", "CompanyID", "CompanyName", "Provider", "ApiKey", "Status", "StatusReason", "TotalTokenLimit",
               "TotalUsedTokens", "TotalRemainingTokens", "ReservedTokens", "Threshold", "ThresholdCrossedAt",
               "CooldownUntil", "CreatedAt", "UpdatedAt", "LastUpdated"],
    "tokens/status": ["Status", "Count", "Unlimited", "TotalTokenLimit", "TotalUsedTokens", "TotalRemainingTokens",
                      "ReservedTokens", "OverThreshold", "Cooling"],
    "usage": ["Day", *SUMS],
    "usage/company": ["CompanyID", *SUMS],
    "usage/branch": ["CompanyID", "Branch", *SUMS],
    "usage/user": ["CompanyID", "RequestedBy", *SUMS],
    "usage/token": ["CompanyID", "TokenID", "TokenSource", *SUMS],
    "errors": ["LogID", "Timestamp", "LogLevel", "Logger", "Message", "Exception", "Module", "FunctionName", "LineNumber",
               "RequestID", "Host", "TraceID"],
    "retries": ["RetryID", "TokenID", "CompanyID", "Attempt", "ErrorMessage", "IsRetryable", "Timestamp", "RequestID",
                "StatusCode", "DelayMs"],
    "unsettled": ["ReservationID", "RequestID", "Sequence", "TokenID", "CompanyID", "Branch", "RequestedBy",
                  "EstimatedTokens", "State", "UnknownCalls", "TokenSource", "Host", "ProcessID", "CreatedAt", "ExpiresAt"],
    "outbox": ["State", "Kind", "RequestID", "TokenID", "CompanyID", "Branch", "RequestedBy", "TotalTokensUsed",
               "CreatedAt", "Attempts", "LastError"],
    "outbox/state": ["State", "Count", "OldestSeconds", "Host"],
}


class Admin:
    """An administrator of a stack."""

    def __init__(self, stack: Stack) -> None:
        self.stack, self.headers = stack, bearer(stack.ctl("client-key", "add", "--admin").stdout.strip())

    def ask(self, name: str, *, accept: str | None = None, **parameters: Any) -> Answer:
        query = urlencode({k: v for k, v in parameters.items() if v is not None})
        return self.stack.get(f"/admin/{name}" + (f"?{query}" if query else ""),
                              headers=self.headers | ({"Accept": accept} if accept else {}))

    def page(self, name: str, **parameters: Any) -> dict[str, Any]:
        answer = self.ask(name, **parameters)
        assert answer.status == 200, answer.body
        assert answer.headers["Content-Type"] == "application/json"
        page = answer.json()
        assert list(page) == ["request_id", "rows", "next_cursor"]
        assert page["request_id"] == answer.headers["X-Request-ID"]
        assert page["next_cursor"] == answer.headers["X-Next-Cursor"]
        return page

    def rows(self, name: str, **parameters: Any) -> list[dict[str, Any]]:
        return self.page(name, **parameters)["rows"]

    def pages(self, name: str, between: Callable[[], Any] = lambda: None, **parameters: Any) -> list[list[dict[str, Any]]]:
        """All of them; between: what happens after each."""
        pages, cursor = [], None
        while len(pages) < 50:
            page = self.page(name, cursor=cursor, **parameters)
            pages.append(page["rows"])
            if (cursor := page["next_cursor"]) is None:
                return pages
            between()
        raise AssertionError("the pages have no end")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def ago(**span: float) -> str:
    return (datetime.now(timezone.utc) - timedelta(**span)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def use(stack: Stack, company: str, branch: str, user: str, tokens: int, at: str, token: int | None = None) -> None:
    """A row of usage, as a settlement leaves it."""
    stack.sql("INSERT INTO TokenUsageLogs (TokenID, CompanyID, Branch, RequestedBy, InputTokens, OutputTokens,"
              " TotalTokensUsed, RequestCount, LoggedAt, TokenSource) VALUES (?, ?, ?, ?, ?, ?, ?, 1, ?, 'store')",
              token, company, branch, user, tokens - 1, 1, tokens, at)


def fail(stack: Stack, message: str, at: str | None = None, level: str = "ERROR", request_id: str | None = None) -> None:
    stack.sql("INSERT INTO ApplicationLogs (Timestamp, LogLevel, Logger, Message, RequestID) VALUES (?, ?, 'tests', ?, ?)",
              at or ago(), level, message, request_id)


@pytest.fixture(scope="module")
def _admin(_stack: Stack) -> Admin:
    return Admin(_stack)


@pytest.fixture
def admin(_admin: Admin, stack: Stack) -> Admin:
    """The administrator of the module's stack."""
    return _admin


# ---- who may ----


@pytest.mark.parametrize("mode", ["none", "bearer"])
def test_administrators_only(make_stack: MakeStack, mode: str) -> None:
    """Also where anybody may extract."""
    stack = make_stack(env={"EXTRACT_AUTH_MODE": mode})
    client = stack.ctl("client-key", "add", "--company", "NT047").stdout.strip()
    admin = Admin(stack)
    for name in PATHS:
        for headers in ({}, bearer("extract_" + "A" * 43), {"Authorization": "Basic YTpi"}):
            answer = stack.get(f"/admin/{name}", headers=headers)
            refused(answer, "unauthenticated")
            assert answer.headers["WWW-Authenticate"] == 'Bearer realm="extract-fcgi"'
        assert "extractctl client-key add --admin" in refused(
            stack.get(f"/admin/{name}", headers=bearer(client)), "forbidden")["detail"]
        assert admin.ask(name).status == 200
    [row] = stack.rows("SELECT Exception FROM ApplicationLogs WHERE Message LIKE 'forbidden: path=/admin/usage %'")
    assert "is not an administrator's" in row["Exception"] and client not in row["Exception"]


def test_nobody_is_told_what_was_wrong_before_he_is_known(stack: Stack) -> None:
    refused(stack.get("/admin/usage?limit=bad"), "unauthenticated")


@pytest.mark.parametrize("name", PATHS)
def test_methods(admin: Admin, stack: Stack, name: str) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        answer = stack.request(method, f"/admin/{name}", b"{}" if method != "DELETE" else None, admin.headers)
        refused(answer, "method_not_allowed")
        assert answer.headers["Allow"] == "GET, HEAD"
    head = stack.request("HEAD", f"/admin/{name}", headers=admin.headers)
    assert (head.status, head.body) == (200, b"")


@pytest.mark.parametrize("path", ["/admin/token", "/admin/tokens/", "/admin/Tokens", "/admin/logs", "/admin/"])
def test_no_such_path(admin: Admin, stack: Stack, path: str) -> None:
    refused(stack.get(path, headers=admin.headers), "not_found")


def test_answers_to_this_machine_only(admin: Admin, stack: Stack) -> None:
    answer = stack.get("/admin/tokens", headers=admin.headers | {"X-Forwarded-For": "192.0.2.1"})
    assert (answer.status, answer.code) == (404, "not_found")


def test_revoked_key(stack: Stack) -> None:
    admin = Admin(stack)
    assert admin.ask("tokens").status == 200
    [row] = json.loads(stack.ctl("client-key", "list", "--json", "--rows", "1").stdout)
    stack.ctl("client-key", "revoke", row["ClientKeyID"])
    eventually(lambda: admin.ask("tokens").status == 401, "the key is refused")


# ---- rows ----


@pytest.mark.parametrize(("name", "by"), VIEWS)
def test_columns(admin: Admin, stack: Stack, company: str, name: str, by: str | None) -> None:
    """The same ones from either store, in the same order; a head without rows, too."""
    head = admin.ask(name, by=by, format="csv").body.decode().split("\r\n")[0].split(",")
    assert head == COLUMNS.get(f"{name}/{by}", COLUMNS[name])
    for row in admin.rows(name, by=by):
        assert list(row) == head


def test_tokens(admin: Admin, stack: Stack, company: str) -> None:
    key = "AIza-not-a-real-key-of-anybody-7f3c"
    first = stack.token(company, key, "--limit", "1000", "--threshold", "0.5", "--company-name", "Käufer & Söhne")
    second = stack.token(company)
    rows = admin.rows("tokens", company=company.lower())
    assert [row["TokenID"] for row in rows] == [second, first]
    assert rows[1] | {"CreatedAt": 0, "UpdatedAt": 0, "LastUpdated": 0} == {
        "TokenID": first, "CompanyID": company, "CompanyName": "Käufer & Söhne", "Provider": "Gemini", "ApiKey": "…7f3c",
        "Status": "Active", "StatusReason": None, "TotalTokenLimit": 1000, "TotalUsedTokens": 0,
        "TotalRemainingTokens": 1000, "ReservedTokens": 0, "Threshold": 0.5, "ThresholdCrossedAt": None,
        "CooldownUntil": None, "CreatedAt": 0, "UpdatedAt": 0, "LastUpdated": 0}
    assert rows[0]["TotalTokenLimit"] is None and rows[0]["TotalRemainingTokens"] is None
    assert datetime.fromisoformat(rows[1]["CreatedAt"].replace("Z", "+00:00")) > datetime.now(timezone.utc) - timedelta(hours=1)


def test_health_of_tokens(admin: Admin, stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    """Used, reserved and remaining, against limit and threshold; per token, and summed by status."""
    key = f"key-{company}"
    token = stack.token(company, key, "--limit", "100000", "--threshold", "0.01")
    used = stack.post(pdf, company).json()["usage"]["total_tokens"]
    stack.token(company)  # without a limit
    stack.ctl("token", "set-status", str(stack.token(company, None, "--limit", "5")), "Disabled")
    emulator.script(key, {"hold": True})
    emulator.script("*", {"hold": True})
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(stack.post, pdf, company)
        emulator.wait(held=1)
        reserved = sum(row["ReservedTokens"] for row in admin.rows("tokens", company=company))
        sums = admin.rows("tokens", by="status", company=company)
        emulator.release()
        assert running.result().status == 200
    assert reserved == 8000
    assert sums == [
        {"Status": "Active", "Count": 2, "Unlimited": 1, "TotalTokenLimit": 100000, "TotalUsedTokens": used,
         "TotalRemainingTokens": 100000 - used, "ReservedTokens": reserved, "OverThreshold": 1, "Cooling": 0},
        {"Status": "Disabled", "Count": 1, "Unlimited": 0, "TotalTokenLimit": 5, "TotalUsedTokens": 0,
         "TotalRemainingTokens": 5, "ReservedTokens": 0, "OverThreshold": 0, "Cooling": 0}]
    [row] = [row for row in admin.rows("tokens", company=company) if row["TokenID"] == token]
    assert row["ThresholdCrossedAt"] is not None


def test_cooling_tokens_are_counted(admin: Admin, stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    key = f"key-{company}"
    stack.token(company, key)
    emulator.scenario(key, "daily_quota")
    refused(stack.post(pdf, company), "upstream_rate_limited")
    [row] = admin.rows("tokens", by="status", company=company)
    assert (row["Status"], row["Count"], row["Cooling"]) == ("Active", 1, 1)


def test_usage(admin: Admin, stack: Stack, company: str, pdf: bytes) -> None:
    token = stack.token(company)
    usage = [stack.post(pdf, company, user=user, branch=branch).json()["usage"]
             for user, branch in (("anna", "North"), ("anna", "South"), ("Bo", "North"))]
    total = sum(u["total_tokens"] for u in usage)
    [day] = admin.rows("usage", company=company)
    assert day == {
        "Day": ago()[:10], "Requests": 3, "RequestCount": 3, "InputTokens": sum(u["input_tokens"] for u in usage),
        "OutputTokens": sum(u["output_tokens"] for u in usage),
        "TextPromptTokens": sum(u["text_prompt_tokens"] for u in usage),
        "ImagePromptTokens": sum(u["image_prompt_tokens"] for u in usage),
        "TextCandidatesTokens": sum(u["text_candidates_tokens"] for u in usage),
        "ThoughtsTokens": sum(u["thoughts_tokens"] for u in usage),
        "CachedTokens": sum(u["cached_tokens"] for u in usage), "TotalTokensUsed": total, "UnknownCalls": 0}
    sums = {name: value for name, value in day.items() if name != "Day"}
    assert admin.rows("usage", by="company", company=company) == [{"CompanyID": company} | sums]
    assert admin.rows("usage", by="token", company=company) == [
        {"CompanyID": company, "TokenID": token, "TokenSource": "store"} | sums]
    assert [(r["Branch"], r["Requests"]) for r in admin.rows("usage", by="branch", company=company)] == [
        ("North", 2), ("South", 1)]
    assert [(r["RequestedBy"], r["Requests"]) for r in admin.rows("usage", by="user", company=company)] == [
        ("anna", 2), ("Bo", 1)]


def test_usage_over_time(admin: Admin, stack: Stack, company: str) -> None:
    for day, tokens in ((3, 10), (2, 20), (2, 30), (1, 40)):
        use(stack, company, "North", "anna", tokens, ago(days=day))
    assert [(r["Day"], r["TotalTokensUsed"]) for r in admin.rows("usage", company=company, since="7d")] == [
        (ago(days=1)[:10], 40), (ago(days=2)[:10], 50), (ago(days=3)[:10], 10)]
    assert [r["TotalTokensUsed"] for r in admin.rows("usage", company=company, since=ago(days=2.5), until="36h")] == [50]
    assert [r["TotalTokensUsed"] for r in admin.rows("usage", company=company, until=ago(days=2)[:10])] == [10]


def test_companies_side_by_side(admin: Admin, stack: Stack, company: str) -> None:
    """One company in any case; each other for itself, the largest first."""
    when = ago(days=1)
    for name, tokens in ((f"{company}-a", 10), (f"{company}-A", 15), (f"{company}-b", 20), (f"{company}-c", 5)):
        use(stack, name, "North", "anna", tokens, when)
    rows = [r for r in admin.rows("usage", by="company", limit=1000) if r["CompanyID"].startswith(company)]
    assert [(r["CompanyID"].lower(), r["TotalTokensUsed"]) for r in rows] == [
        (f"{company}-a".lower(), 25), (f"{company}-b".lower(), 20), (f"{company}-c".lower(), 5)]


def test_errors(admin: Admin, stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    key = f"key-{company}"
    stack.token(company, key)
    emulator.script(key, {"status": 500}, repeat=True)
    failed = stack.post(pdf, company)
    refused(failed, "upstream_unavailable")
    request_id = failed.headers["X-Request-ID"]
    [row] = eventually(lambda: admin.rows("errors", request_id=request_id), "the entry is written")
    assert row["LogLevel"] == "ERROR" and row["Message"].startswith("upstream_unavailable: ") and row["RequestID"] == request_id
    assert admin.rows("errors", company=company) == [row]
    retries = admin.rows("retries", request_id=request_id)
    assert [(r["Attempt"], r["StatusCode"], r["IsRetryable"]) for r in retries] == [
        (4, 500, 1), (3, 500, 1), (2, 500, 1), (1, 500, 1)]
    assert admin.rows("retries", company=company.upper()) == retries
    assert admin.rows("retries", company=f"{company}-other") == []
    assert key not in json.dumps(admin.rows("errors") + admin.rows("retries"))


def test_warnings_are_no_errors(admin: Admin, stack: Stack) -> None:
    for level in ("WARNING", "INFO", "ERROR", "CRITICAL"):
        fail(stack, f"levels {level}", level=level)
    assert [r["LogLevel"] for r in admin.rows("errors") if (r["Message"] or "").startswith("levels ")] == ["CRITICAL", "ERROR"]


def test_unsettled(admin: Admin, stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    key = f"key-{company}"
    stack.token(company, key)
    emulator.script(key, {"usage": None})
    request_id = stack.post(pdf, company, user="bo", branch="West").json()["request_id"]
    [row] = admin.rows("unsettled", company=company)
    assert (row["RequestID"], row["RequestedBy"], row["Branch"], row["State"], row["UnknownCalls"]) == (
        request_id, "bo", "West", "unsettled", 1)


def test_answer_says_what_is_not_there(admin: Admin, company: str) -> None:
    assert [admin.rows(name, company=company) for name in PATHS] == [[]] * 6


def test_nothing_else_of_a_table_is_shown(admin: Admin, stack: Stack, company: str) -> None:
    """Whatever a DBA adds to it, while the service runs."""
    stack.sql("INSERT INTO RetryAttempts (CompanyID, Attempt, ErrorMessage) VALUES (?, 1, 'so it is')", company)
    before = admin.rows("retries", company=company)
    if IS_LIVE or TEST_STORE == "sqlite":
        stack.sql(f"ALTER TABLE RetryAttempts ADD {'COLUMN ' if TEST_STORE == 'sqlite' else ''}Secret VARCHAR(20)")
    assert admin.rows("retries", company=company) == before
    assert [(list(row), row["ErrorMessage"]) for row in before] == [(COLUMNS["retries"], "so it is")]


# ---- the outbox ----


def test_outbox(make_stack: MakeStack, tmp_path: Path, pdf: bytes) -> None:
    """What waits and what is dead; also while the store is away."""
    (tmp_path / "key").write_text("key-fallback\n")
    stack = make_stack(env={"EXTRACT_FALLBACK_KEY_FILE": str(tmp_path / "key"), "EXTRACT_STORE_QUERY_TIMEOUT": "300ms"})
    stack.allowed_stderr = [r"^\S+Z (INFO|WARNING|ERROR|CRITICAL) "]
    admin = Admin(stack)
    assert admin.rows("outbox") == []
    assert [(r["State"], r["Count"], r["OldestSeconds"]) for r in admin.rows("outbox", by="state")] == [
        ("waiting", 0, None), ("records", 0, None), ("dead", 0, None)]
    with stack.store_away():
        done = stack.post(pdf, "NT047", user="anna", branch="West").json()
        rows = admin.rows("outbox", company="nt047", request_id=done["request_id"])
        # Over a network nobody knows whether the store has reserved: then a settlement of nothing releases it.
        assert {(r["State"], r["Kind"], r["CompanyID"], r["Branch"], r["RequestedBy"], r["TokenID"]) for r in rows} == {
            ("waiting", kind, "NT047", "West", "anna", None) for kind in ("settlement", "reservation")}
        assert [r["TotalTokensUsed"] for r in rows if r["Kind"] == "settlement" and r["TotalTokensUsed"]] == [
            done["usage"]["total_tokens"]]
        assert rows[0]["CreatedAt"] > ago(minutes=5)
        assert admin.rows("outbox", until="1d") == admin.rows("outbox", company="other") == []
        [waiting, _, _] = admin.rows("outbox", by="state")
        assert waiting["Count"] == len(rows) >= 2 and waiting["OldestSeconds"] >= 0 and waiting["Host"]
        assert [row for [row] in admin.pages("outbox", limit=1)] == rows
    eventually(lambda: admin.rows("outbox") == [], "the outbox is empty")
    with closing(sqlite3.connect(stack.dir / "outbox.db", timeout=PATIENCE)) as outbox, outbox:
        outbox.execute("INSERT INTO OutboxDead (Kind, RequestID, TokenID, Payload, CreatedAt, Attempts, LastError)"
                       " VALUES ('settlement', 'r-1', 7, 'no JSON', 1700000000000, 20, 'no')")
    assert admin.rows("outbox") == [
        {"State": "dead", "Kind": "settlement", "RequestID": "r-1", "TokenID": 7, "CompanyID": None, "Branch": None,
         "RequestedBy": None, "TotalTokensUsed": 0, "CreatedAt": "2023-11-14T22:13:20.000Z", "Attempts": 20, "LastError": "no"}]
    assert admin.rows("outbox", by="state")[2]["Count"] == 1


# ---- pages ----


def test_pages_hold_while_rows_come(admin: Admin, stack: Stack, company: str) -> None:
    """Each row once, in its order; what comes later is on no page."""
    for i in range(25):
        fail(stack, f"{company} {i}", request_id=company)
    pages = admin.pages("errors", lambda: fail(stack, f"{company} later", request_id=company), request_id=company, limit=10)
    assert [len(page) for page in pages] == [10, 10, 5]
    assert [r["Message"] for page in pages for r in page] == [f"{company} {i}" for i in reversed(range(25))]


@pytest.mark.parametrize(("by", "column"), [("branch", "Branch"), ("user", "RequestedBy")])
def test_pages_of_sums_hold_while_they_grow(admin: Admin, stack: Stack, company: str, by: str, column: str) -> None:
    """The last would be the first by now."""
    for i in range(7):
        use(stack, company, f"b{i}", f"b{i}", 100 - i, ago(hours=1))
    pages = admin.pages("usage", lambda: use(stack, company, "b6", "b6", 10_000, ago()), by=by, company=company, limit=3,
                        since="24h")
    assert [[r[column] for r in page] for page in pages] == [["b0", "b1", "b2"], ["b3", "b4", "b5"], ["b6"]]
    assert [r["TotalTokensUsed"] for page in pages for r in page] == [100 - i for i in range(7)]


def test_pages_of_days(admin: Admin, stack: Stack, company: str) -> None:
    for day in range(9):
        use(stack, company, "North", "anna", 10 + day, ago(days=day + 1))
    pages = admin.pages("usage", lambda: use(stack, company, "North", "anna", 5, ago()), company=company, limit=4)
    assert [[r["TotalTokensUsed"] for r in page] for page in pages] == [[10, 11, 12, 13], [14, 15, 16, 17], [18]]


def test_last_page_has_no_cursor(admin: Admin, stack: Stack, company: str) -> None:
    for _ in range(2):
        stack.token(company)
    assert [len(page) for page in admin.pages("tokens", company=company, limit=1)] == [1, 1]
    assert [len(page) for page in admin.pages("tokens", company=company, limit=2)] == [2]
    assert [len(page) for page in admin.pages("usage", by="token", company=company, limit=2)] == [0]


def test_limits(admin: Admin, stack: Stack, company: str) -> None:
    for i in range(102):
        fail(stack, str(i), request_id=company)
    assert [len(page) for page in admin.pages("errors", request_id=company)] == [100, 2]
    assert [len(page) for page in admin.pages("errors", request_id=company, limit=1000)] == [102]


def test_large_rows_make_short_pages(admin: Admin, stack: Stack, company: str) -> None:
    """A page ends after 4 MiB, wherever its limit is; none is lost."""
    for i in range(7):
        fail(stack, f"{i} " + "x" * 1_000_000, request_id=company)
    pages = admin.pages("errors", request_id=company)
    assert [len(page) for page in pages] == [5, 2]
    assert [r["Message"][0] for page in pages for r in page] == list("6543210")


@pytest.mark.parametrize("change", [{"company": "other"}, {"since": "1d"}, {"until": "1h"}, {"by": "user"},
                                    {"request_id": "r"}], ids=repr)
def test_cursor_of_another_query(admin: Admin, stack: Stack, company: str, change: dict[str, str]) -> None:
    for i in range(3):
        use(stack, company, f"b{i}", "anna", 10, ago(hours=2))
    query = {"by": "branch", "company": company, "limit": 1}
    cursor = admin.page("usage", **query)["next_cursor"]
    assert len(admin.rows("usage", **query, cursor=cursor)) == 1
    assert len(admin.rows("usage", **query | {"limit": 2}, cursor=cursor)) == 2
    problem = refused(admin.ask("usage", **query | change, cursor=cursor), "bad_request")
    assert problem["detail"].startswith("cursor ") and "begin again without it" in problem["detail"]


# ---- CSV ----


def cells(answer: Answer) -> list[list[str]]:
    assert answer.status == 200, answer.body
    assert answer.headers["Content-Type"] == "text/csv; charset=utf-8; header=present"
    assert answer.body.endswith(b"\r\n")
    return list(csv.reader(io.StringIO(answer.body.decode(), newline="")))


def test_csv(admin: Admin, stack: Stack, company: str) -> None:
    texts = ['plain', 'with "quotes", a comma', "two\nlines\r\nthree", "Ümlaut ✓", " spaces ", "a=b", "'quoted'"]
    for text in texts:
        fail(stack, text, request_id=company)
    answer = admin.ask("errors", request_id=company, format="csv")
    assert answer.headers["Content-Disposition"] == 'attachment; filename="errors.csv"'
    head, *rows = cells(answer)
    assert head == COLUMNS["errors"]
    assert [row[head.index("Message")] for row in rows] == texts[::-1]
    assert {row[head.index("Exception")] for row in rows} == {""}
    assert [dict(zip(head, row, strict=True))["LogID"] for row in rows] == [
        str(row["LogID"]) for row in admin.rows("errors", request_id=company)]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\r=1", '=HYPERLINK("http://x","y")',
                                  "-2+3+cmd|' /C calc'!A0"])
def test_no_cell_is_a_formula(admin: Admin, stack: Stack, company: str, text: str) -> None:
    fail(stack, text, request_id=company)
    head, row = cells(admin.ask("errors", request_id=company, format="csv"))
    assert row[head.index("Message")] == "'" + text
    assert admin.rows("errors", request_id=company)[0]["Message"] == text  # JSON as it is


def test_numbers_stay_numbers(admin: Admin, stack: Stack, company: str) -> None:
    """Also below zero: a number is no formula."""
    token = stack.token(company, None, "--limit", "10", "--threshold", "0.25")
    stack.sql("UPDATE TokenUsageSummary SET TotalUsedTokens = 25, TotalRemainingTokens = -15 WHERE TokenID = ?", token)
    head, row = cells(admin.ask("tokens", company=company, format="csv"))
    stack.sql("UPDATE TokenUsageSummary SET TotalUsedTokens = 0, TotalRemainingTokens = 10 WHERE TokenID = ?", token)
    shown = dict(zip(head, row, strict=True))
    assert (shown["TotalRemainingTokens"], shown["Threshold"], shown["StatusReason"]) == ("-15", "0.25", "")


@pytest.mark.parametrize(("accept", "form", "is_csv"), [
    (None, None, False), ("*/*", None, False), ("text/csv", None, True), ("TEXT/CSV", None, True),
    ("text/csv;header=present", None, True), ("text/csv, */*;q=0.1", None, True),
    ("application/json, text/csv", None, False), ("application/json;q=0.5, text/csv", None, True),
    ("text/csv;q=0.4,application/json;q=0.5", None, False), ("text/csv;q=0", None, False),
    ("text/html, text/csvx", None, False), ("text/csv", "json", False), ("application/json", "csv", True),
    ("text/csv;q=" + "9" * 400, None, True)], ids=repr)
def test_which_format(admin: Admin, accept: str | None, form: str | None, is_csv: bool) -> None:
    answer = admin.ask("tokens", accept=accept, format=form)
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/csv" if is_csv else "application/json")


def test_pages_of_csv(admin: Admin, stack: Stack, company: str) -> None:
    for i in range(5):
        fail(stack, str(i), request_id=company)
    seen, cursor = [], None
    while len(seen) < 10:
        answer = admin.ask("errors", request_id=company, format="csv", limit=2, cursor=cursor)
        head, *rows = cells(answer)
        seen += [row[head.index("Message")] for row in rows]
        if (cursor := answer.headers["X-Next-Cursor"]) is None:
            break
    assert seen == list("43210")


# ---- what is refused ----


@pytest.mark.parametrize(("name", "query", "words"), [
    ("errors", "limit=0", "limit must be a whole number from 1 to 1000"),
    ("errors", "limit=1001", "limit must be a whole number from 1 to 1000"),
    ("errors", "limit=-1", "limit must be"), ("errors", "limit=1e2", "limit must be"),
    ("errors", "limit=99999999999999999999", "limit must be"), ("errors", "limit=%201", "limit must be"),
    ("usage", "since=yesterday", "since must be a time like 2026-01-31"),
    ("usage", "since=2026-02-30", "since must be a time"), ("usage", "until=2026-13-01", "until must be a time"),
    ("usage", "since=2026-01-31T12:00:00+02:00", "%2B02:00"), ("usage", "since=0", "since must be a time"),
    ("usage", "by=month", "by must be one of: day, company, branch, user, token."),
    ("tokens", "by=Status", "by must be one of: token, status."), ("outbox", "by=day", "by must be one of: entry, state."),
    ("errors", "by=day", "by is not a parameter of /admin/errors: leave it out."),
    ("errors", "format=xml", "format must be json or csv."),
    ("errors", "company=%ff", "company "), ("errors", "company=" + "x" * 257, "company "),
    ("errors", "company=a%0ab", "company "), ("errors", "company=+a", "company "),
    ("errors", "request_id=" + "x" * 65, "request_id "), ("tokens", "request_id=x", "request_id does not go with /admin/tokens"),
    ("tokens", "by=status&since=1d", "since does not go with /admin/tokens by status: leave it out."),
    ("outbox", "by=state&company=x", "company does not go with /admin/outbox by state: leave it out."),
    ("errors", "company=%4", "%25"), ("errors", "company=%zz", "%25"), ("errors", "company=a%00b", "%25"),
    ("errors", "company=a&company=b", "company is given twice: leave one out."),
    ("errors", "limits=5", "limits is not a parameter: use since, until"),
    ("errors", "%0a%22=5", '\\n" is not a parameter'),
    ("errors", "cursor=x", "cursor "), ("errors", "cursor=" + "0" * 56, "cursor "),
    ("errors", "company=" + "&" * 5000, "at most 4096 bytes"),
])
def test_bad_requests(admin: Admin, stack: Stack, name: str, query: str, words: str) -> None:
    """Each says which parameter, what it may be and what to do."""
    problem = refused(stack.get(f"/admin/{name}?{query}", headers=admin.headers), "bad_request")
    assert words in problem["detail"]


@pytest.mark.parametrize("query", ["", "&&", "company=&since=&until=&limit=&cursor=&format=&by=&request_id=",
                                   "since=2026-01-31", "since=2026-01-31T12%3A00%3A00Z", "since=2026-01-31+12:00",
                                   "since=2026-01-31T12:00:00.250%2B02:00", "since=7d&until=0h", "limit=1000", "c%6Fmpany=x",
                                   "since=99w&until=2200-01-01"])
def test_good_requests(admin: Admin, stack: Stack, query: str) -> None:
    answer = stack.get(f"/admin/errors?{query}", headers=admin.headers)
    assert answer.status == 200, answer.body


def test_characters_of_all_kinds(admin: Admin, stack: Stack) -> None:
    name = "Käufer & Söhne = 100 % + более"
    stack.token(name)
    assert [r["CompanyID"] for r in admin.rows("tokens", company=name.upper())] == [name]


# ---- while something else is going on ----


def test_store_is_away(make_stack: MakeStack) -> None:
    """Said at once, or after store.query_timeout; the health endpoints go on. Back again: as before."""
    if TEST_STORE == "sqlite":
        stack = make_stack()
        stack.allowed_stderr = [r"^\S+Z (INFO|WARNING|ERROR|CRITICAL) "]
        admin = Admin(stack)
        assert admin.ask("tokens").status == 200
        (stack.dir / "store.db").rename(stack.dir / "elsewhere.db")
        refused(admin.ask("tokens"), "store_unavailable")
        (stack.dir / "elsewhere.db").rename(stack.dir / "store.db")
    else:
        stack = make_stack(env={"EXTRACT_STORE_QUERY_TIMEOUT": "500ms"})
        stack.allowed_stderr = [r"^\S+Z (INFO|WARNING|ERROR|CRITICAL) "]
        admin = Admin(stack)
        assert admin.ask("tokens").status == 200
        with stack.store_away():
            refused(admin.ask("tokens"), "store_unavailable")
            assert stack.get("/healthz").status == 200
    eventually(lambda: admin.ask("tokens").status == 200, "the store is found again")


def test_busy_workers_do_not_matter(make_stack: MakeStack, emulator: Emulator, crowd: ThreadPoolExecutor, pdf: bytes) -> None:
    stack = make_stack(env={"EXTRACT_SERVER_THREADS": "2", "EXTRACT_SERVER_QUEUE": "1"})
    admin = Admin(stack)
    stack.token(key="key-1")
    emulator.script("key-1", {"hold": True}, repeat=True)
    running = [crowd.submit(stack.post, pdf) for _ in range(2)]
    emulator.wait(held=2)
    assert admin.ask("tokens").status == 200
    emulator.release()
    assert {r.result().status for r in running} == {200}


def test_slow_readers_hold_no_connection_of_the_store(make_stack: MakeStack, pdf: bytes) -> None:
    """As many as there are threads and connections, each with megabytes that it does not read."""
    stack = make_stack(env={"EXTRACT_STORE_POOL_SIZE": "1"})
    admin = Admin(stack)
    stack.token()
    for _ in range(4):
        fail(stack, "x" * 1_000_000)
    slow = [FastCgi(stack.socket) for _ in range(2)]
    try:
        for client in slow:
            client.begin()
            client.params({"REQUEST_METHOD": "GET", "DOCUMENT_URI": "/admin/errors", "REMOTE_ADDR": "127.0.0.1",
                           "HTTP_AUTHORIZATION": admin.headers["Authorization"]})
            client.send(FastCgi.STDIN)
            assert client.socket.recv(1) == b"\x01"  # the answer has begun
        assert stack.post(pdf).status == 200
        assert [stack.get(path).status for path in ("/healthz", "/readyz", "/metrics")] == [200] * 3
    finally:
        for client in slow:
            client.close()


def test_many_at_once(admin: Admin, crowd: ThreadPoolExecutor) -> None:
    """Each is answered, or told to come again; nothing else suffers."""
    answers = list(crowd.map(lambda i: admin.ask(PATHS[i % 6]), range(120)))
    assert {a.status for a in answers} <= {200, 503}
    for answer in answers:
        if answer.status == 503:
            refused(answer, "overloaded")
    assert admin.ask("tokens").status == 200


def test_key_rate(make_stack: MakeStack) -> None:
    stack = make_stack(env={"EXTRACT_AUTH_KEY_RATE": "2"})
    admin = Admin(stack)
    answers = [admin.ask("tokens") for _ in range(20)]
    assert answers[0].status == 200
    refused(answers[-1], "rate_limited")


def test_without_a_query_string(stack: Stack, admin: Admin) -> None:
    """A web server that sends none."""
    with closing(FastCgi(stack.socket)) as client:
        client.begin()
        client.params({"REQUEST_METHOD": "GET", "DOCUMENT_URI": "/admin/tokens",
                       "HTTP_AUTHORIZATION": admin.headers["Authorization"]})
        client.send(FastCgi.STDIN)
        assert client.answer().status == 200
