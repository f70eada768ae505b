"""What SECURITY.md says of data: what Google receives, what may be deleted, how a person is erased."""
from __future__ import annotations

import http.server
import json
import os
import re
import sqlite3
import subprocess
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, ROOT, Stack, eventually, form

MakeStack = Callable[..., Stack]
ANNA, NAMESAKE = "FIRMA\\Anna O'Öz", "FIRMA\\Anna O'Öz II"


class Google(http.server.ThreadingHTTPServer):
    """Answers any call, and keeps it as it came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Call)
        self.calls: list[tuple[str, dict[str, str], bytes]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Call(http.server.BaseHTTPRequestHandler):
    server: Google
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        answer = json.dumps({"candidates": [{"content": {"parts": [{"text": "{}"}]}, "finishReason": "STOP"}],
                             "usageMetadata": {"totalTokenCount": 3}, "modelVersion": "m"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def google() -> Iterator[Google]:
    with Google() as server:
        yield server
        server.shutdown()


def test_what_google_receives(make_stack: MakeStack, google: Google, company: str, pdf: bytes) -> None:
    """The document, the prompt, the schema and the API key; nobody's name, and nothing else that the client sent."""
    stack = make_stack(base_url=f"http://127.0.0.1:{google.server_port}")
    stack.token(company, "key-of-this-test")
    body, content_type = form(pdf, company, "user-anna", "branch-lyon")
    body = body.replace(b"invoice.bin", b"name-of-the-file.pdf")
    answer = stack.request("POST", "/extract?query-of-client", body, {
        "Content-Type": content_type, "Idempotency-Key": "key-of-client", "User-Agent": "browser-of-client",
        "Cookie": "cookie-of-client", "X-Request-ID": "id-of-client"}, source="127.0.0.3")
    assert answer.status == 200
    [(path, headers, sent)] = google.calls
    assert path == "/v1beta/models/gemini-3.5-flash:generateContent"
    assert headers.pop("x-goog-api-key") == "key-of-this-test"
    assert re.fullmatch(r"extract-fcgi/[\d.]+", headers.pop("user-agent"))
    assert headers == {"host": f"127.0.0.1:{google.server_port}", "accept": "*/*", "accept-encoding": "gzip",
                       "content-type": "application/json", "content-length": str(len(sent))}
    call = json.loads(sent)
    schema = json.loads((ROOT / "fcgi-app/invoice.schema.json").read_text())
    [content] = call.pop("contents")
    assert b64decode(content["parts"][0]["inlineData"].pop("data")) == pdf
    assert content == {"role": "user", "parts": [{"inlineData": {"mimeType": "application/pdf"}},
                                                 {"text": (ROOT / "fcgi-app/prompt.txt").read_text()}]}
    assert call == {"generationConfig": {"responseMimeType": "application/json", "responseJsonSchema": schema}}
    assert answer.headers["X-Request-ID"].encode() not in sent


# ---- SECURITY.md's statements ----


def blocks(language: str) -> list[str]:
    """The blocks of SECURITY.md that begin like this."""
    found = re.findall(r"(?m)(?:^    .*\n)+", (ROOT / "SECURITY.md").read_text())
    return [block for block in (re.sub(r"(?m)^    ", "", block) for block in found) if block.startswith(language)]


def run(stack: Stack, block: str, name: str | None = None) -> None:
    """As the administrator of a stack would, with this name put for 'anna'."""
    if name is not None:
        assert block.count("'anna'") == 1
        block = block.replace("'anna'", "'" + name.replace("'", "''") + "'")
    block = block.replace("runuser -u extract-fcgi -- ", "").replace("/var/lib/extract-fcgi/", f"{stack.dir}/")
    done = subprocess.run(["sh", "-e"], input=block, text=True, capture_output=True, timeout=3 * PATIENCE)
    assert (done.returncode, done.stderr) == (0, ""), done


@pytest.fixture
def embedded(make_stack: MakeStack, monkeypatch: pytest.MonkeyPatch) -> Stack:
    """With the embedded store, whatever the other tests have."""
    monkeypatch.setattr(Stack, "sql_server", None)
    return make_stack()


def names(stack: Stack) -> set[str]:
    """All that the store says of who requested something."""
    found = {row["RequestedBy"] for table in ("TokenUsageLogs", "TokenReservations")
             for row in stack.sql(f"SELECT RequestedBy FROM {table}")}
    messages = [row["Message"] for row in stack.sql("SELECT Message FROM ApplicationLogs")]
    return found | {match[1].replace("\\\\", "\\") for message in messages
                    if (match := re.search(r" user=(.*?) (?:type|attempts)=", message))}


def request_as(stack: Stack, pdf: bytes, *users: str) -> None:
    """Each extracts an invoice, and tries another that fails."""
    stack.token()
    for user in users:
        assert stack.post(pdf, user=user).status == 200
        assert stack.post(b"no invoice", user=user).status == 415
    logged = "SELECT Message FROM ApplicationLogs WHERE Message LIKE '% user=%'"
    eventually(lambda: len(stack.sql(logged)) == 2 * len(users), "all is logged")


def test_erasing_a_person(embedded: Stack, pdf: bytes) -> None:
    """From the embedded store and the outbox's dead table, also from what lies unused in their files; nobody else."""
    stack = embedded
    request_as(stack, pdf, ANNA, NAMESAKE, "carl")
    with closing(sqlite3.connect(stack.dir / "outbox.db", isolation_level=None)) as outbox:
        for user in (ANNA, NAMESAKE, "carl"):
            payload = json.dumps({"request_id": "1", "requested_by": user}, ensure_ascii=False)
            outbox.execute("INSERT INTO OutboxDead (Kind, RequestID, Payload, CreatedAt)"
                           " VALUES ('settlement', '1', ?, 1)", [payload])
    used = stack.sql("SELECT * FROM TokenUsageSummary")
    _, store, dead = blocks("runuser")
    assert names(stack) == {ANNA, NAMESAKE, "carl"}
    run(stack, store, ANNA)
    run(stack, dead, ANNA)
    assert names(stack) == {"erased", NAMESAKE, "carl"}
    run(stack, store, NAMESAKE)
    run(stack, dead, NAMESAKE)
    assert names(stack) == {"erased", "carl"}
    assert len(stack.sql("SELECT 1 FROM TokenUsageLogs WHERE RequestedBy = 'erased'")) == 2
    assert stack.sql("SELECT * FROM TokenUsageSummary") == used
    stack.balanced()
    for path in [path for path in stack.dir.rglob("*") if path.is_file()]:
        assert not re.search("Anna O.{1,3}Öz".encode(), path.read_bytes()), path
    with closing(sqlite3.connect(stack.dir / "outbox.db")) as outbox:
        payloads = [json.loads(row[0]) for row in outbox.execute("SELECT Payload FROM OutboxDead ORDER BY Seq")]
    assert [payload["requested_by"] for payload in payloads] == ["erased", "erased", "carl"]


def test_deleting_what_is_old(embedded: Stack, pdf: bytes) -> None:
    """From the embedded store, which does not do it by itself: no total changes, and nothing unsettled goes."""
    stack = embedded
    request_as(stack, pdf, ANNA)
    tables = ("ApplicationLogs", "RetryAttempts", "TokenReservations", "IdempotencyKeys")

    def counts() -> list[int]:
        return [stack.sql(f"SELECT COUNT(*) AS n FROM {table}")[0]["n"] for table in tables]

    def add(age: str, state: str, closed: str) -> None:
        when = f"strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '{age}')"
        stack.sql(f"INSERT INTO ApplicationLogs (Timestamp, LogLevel) VALUES ({when}, 'INFO')")
        stack.sql(f"INSERT INTO RetryAttempts (Timestamp, Attempt) VALUES ({when}, 1)")
        stack.sql(f"""INSERT INTO TokenReservations (RequestID, Sequence, CompanyID, State, ExpiresAt, ClosedAt)
                      VALUES ('{age}', 1, 'C', '{state}', {when}, {closed.format(when=when)})""")
        stack.sql("INSERT INTO IdempotencyKeys (CompanyID, IdempotencyKey, RequestID, ExpiresAt)"
                  f" VALUES ('C', '{age}', '1', {when})")

    add("-89 days", "settled", "{when}")
    stack.sql("UPDATE IdempotencyKeys SET ExpiresAt = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '+1 hour')")
    add("-91 days", "unsettled", "NULL")
    kept = counts()
    add("-92 days", "released", "{when}")
    used = stack.sql("SELECT * FROM TokenUsageLogs")
    run(stack, blocks("runuser")[0])
    assert counts() == [kept[0] - 1, kept[1] - 1, kept[2], kept[3] - 1]
    assert stack.sql("SELECT RequestID FROM TokenReservations WHERE State = 'unsettled'") == [{"RequestID": "-91 days"}]
    assert stack.sql("SELECT * FROM TokenUsageLogs") == used
    stack.balanced()


if os.environ.get("MSSQL_SERVER"):  # nothing else runs T-SQL
    def test_erasing_a_person_on_sql_server(make_stack: MakeStack, pdf: bytes) -> None:
        stack = make_stack()
        assert stack.sql_server is not None
        # Babelfish's REPLACE takes a backslash in what it puts in for an escape.
        anna, namesake = (name.replace("\\", "" if os.environ.get("MSSQL_RIGHTS") == "no" else "\\")
                          for name in (ANNA, NAMESAKE))
        request_as(stack, pdf, anna, namesake, "carl")
        used = stack.sql("SELECT * FROM TokenUsageSummary")
        [script] = blocks("SET ANSI_NULLS")
        for who, left in ((anna, {"erased", namesake, "carl"}), (namesake, {"erased", "carl"})):
            with closing(stack.sql_server.connect(stack.sql_server.database(stack.dir))) as connection:
                for batch in script.replace("'anna'", "'" + who.replace("'", "''") + "'").split("\nGO\n"):
                    if batch.strip():
                        connection.query(batch)
            assert names(stack) == left
        assert stack.sql("SELECT * FROM TokenUsageSummary") == used
        stack.balanced()
