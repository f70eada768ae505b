"""The scripts on a server that runs T-SQL (MSSQL_SERVER): setup twice, and over old databases with data in them; samples,
maintenance, and what the guide for DBAs says to type."""
from __future__ import annotations

import json
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Emulator, SqlServer, Stack
from tds_client import Connection, batches, run_script

OLD = sorted((ROOT / "tests/mssql").glob("old_*.sql"))


def schema(connection: Connection) -> list[tuple[Any, ...]]:
    """All that the script makes, as far as any server tells."""
    rows = connection.rows("SELECT TABLE_NAME, COLUMN_NAME, DATA_TYPE, CHARACTER_MAXIMUM_LENGTH, IS_NULLABLE, COLUMN_DEFAULT"
                           " FROM INFORMATION_SCHEMA.COLUMNS WHERE TABLE_SCHEMA = 'dbo'"
                           " ORDER BY TABLE_NAME, ORDINAL_POSITION")
    routines = connection.rows("SELECT ROUTINE_NAME FROM INFORMATION_SCHEMA.ROUTINES ORDER BY ROUTINE_NAME")
    return [tuple(r.values()) for r in rows + routines]


def counts(connection: Connection) -> dict[str, int]:
    tables = [r["TABLE_NAME"] for r in connection.rows(
        "SELECT TABLE_NAME FROM INFORMATION_SCHEMA.TABLES WHERE TABLE_TYPE = 'BASE TABLE' AND TABLE_SCHEMA = 'dbo'")]
    return {t: connection.rows(f"SELECT COUNT(*) AS n FROM dbo.[{t}]")[0]["n"] for t in tables}


def unequal_sums(connection: Connection) -> int:
    [sums] = connection.rows("""SELECT COUNT(*) AS n FROM TokenUsageSummary s WHERE s.TotalUsedTokens <>
        (SELECT COALESCE(SUM(TotalTokensUsed), 0) FROM TokenUsageLogs u WHERE u.TokenID = s.TokenID) +
        (SELECT COALESCE(SUM(TotalTokensUsed), 0) FROM TokenUsageMonthly m WHERE m.TokenID = s.TokenID)""")
    return sums["n"]


@pytest.mark.parametrize("old", [None, *OLD], ids=lambda path: path.stem if path else "new")
def test_setup_script_twice(live: SqlServer, tmp_path: Path, old: Path | None) -> None:
    """On a new database, and over each kind of old one: it runs, loses nothing, and the second time changes nothing."""
    with closing(live.connect(live.database(tmp_path))) as connection:
        if old is not None:
            run_script(connection, old)
        before = counts(connection)
        run_script(connection, ROOT / "sql/setup_database.sql")
        first = schema(connection), counts(connection)
        run_script(connection, ROOT / "sql/setup_database.sql")
        assert (schema(connection), counts(connection)) == first
        for table, count in before.items():
            assert first[1][table] >= count or table == "TokenUsageSummary", f"{table} has lost rows"
        assert unequal_sums(connection) == 0


@pytest.fixture
def directory(live: SqlServer) -> Iterator[Path]:
    """For a stack whose database is there before it."""
    with tempfile.TemporaryDirectory(prefix="extract-stack-") as name:
        yield Path(name)
        live.drop(Path(name))


@pytest.mark.parametrize("old", OLD, ids=lambda path: path.stem)
def test_old_database_serves(live: SqlServer, directory: Path, make_stack: Callable[..., Stack], emulator: Emulator,
                             pdf: bytes, old: Path) -> None:
    """The service upgrades an old database when it starts, and extracts with a token that was in it."""
    with closing(live.connect(live.database(directory))) as connection:
        run_script(connection, old)
        connection.query("INSERT INTO TokenMaster (CompanyID, ApiKey, Status) VALUES ('NT047-old', 'key-old', 'Active')")
    stack = make_stack(sql_server=live, directory=directory)
    answer = stack.post(pdf, "NT047-old")
    assert answer.status == 200, answer.body
    assert [call["key"] for call in emulator.log()] == ["key-old"]
    stack.balanced()


@pytest.fixture
def samples(live: SqlServer, tmp_path: Path) -> Iterator[Connection]:
    """A database with sample_data.sql in it."""
    with closing(live.connect(live.database(tmp_path))) as connection:
        run_script(connection, ROOT / "sql/setup_database.sql")
        run_script(connection, ROOT / "sql/sample_data.sql")
        yield connection


def test_sample_data_twice(samples: Connection) -> None:
    first = counts(samples)
    assert (first["TokenMaster"], first["TokenUsageLogs"], first["RetryAttempts"], first["ApplicationLogs"]) == (5, 6, 1, 2)
    run_script(samples, ROOT / "sql/sample_data.sql")
    assert counts(samples) == first
    assert unequal_sums(samples) == 0


def maintained(connection: Connection) -> list[dict[str, Any]]:
    """After maintenance.sql, in batches of two rows: what its reconciliation finds wrong."""
    script = (ROOT / "sql/maintenance.sql").read_text().replace("@batch_rows INT = 2000", "@batch_rows INT = 2")
    results = [result for batch in batches(script) for result in connection.query(batch)]
    [(names, rows)] = [result for result in results if result[0][0] == "Wrong"]
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_maintenance(samples: Connection) -> None:
    """Old rows go, their sums stay, and a total that is wrong is found."""
    before = counts(samples)
    old = "DATEADD(DAY, -1200, SYSUTCDATETIME())"
    samples.query(f"UPDATE dbo.TokenUsageLogs SET LoggedAt = {old} WHERE UsageID <= (SELECT MIN(UsageID) + 4 FROM dbo.TokenUsageLogs)")
    samples.query(f"UPDATE dbo.ApplicationLogs SET Timestamp = {old}; UPDATE dbo.RetryAttempts SET Timestamp = {old};"
                  f" UPDATE dbo.AuditLog SET Timestamp = {old} WHERE Actor = N'sample_data.sql'")
    samples.query("INSERT INTO dbo.IdempotencyKeys (CompanyID, IdempotencyKey, RequestID, State, CreatedAt, ExpiresAt)"
                  f" VALUES (N'NT047', N'order 1', N'{uuid.uuid4()}', N'done', {old}, {old})")
    used = "SELECT TokenID, TotalUsedTokens FROM dbo.TokenUsageSummary ORDER BY TokenID"
    totals = samples.rows(used)
    for _ in range(2):
        assert maintained(samples) == []
        after = counts(samples)
        assert {name: after[name] for name in ("TokenUsageLogs", "TokenUsageMonthly", "ApplicationLogs", "RetryAttempts",
                                               "IdempotencyKeys", "TokenReservations")} == {
            "TokenUsageLogs": 1, "TokenUsageMonthly": 2, "ApplicationLogs": 0, "RetryAttempts": 0, "IdempotencyKeys": 0,
            "TokenReservations": before["TokenReservations"]}
        assert samples.rows(used) == totals
        assert unequal_sums(samples) == 0
    samples.query("UPDATE dbo.TokenUsageSummary SET TotalUsedTokens = TotalUsedTokens + 7"
                  " WHERE TokenID = (SELECT MIN(TokenID) FROM dbo.TokenUsageSummary)")
    wrong = maintained(samples)
    assert [(row["Wrong"], row["IsNow"] - row["ShouldBe"]) for row in wrong if row["Wrong"] == "TotalUsedTokens"] == [("TotalUsedTokens", 7)]


def everyday_statements(token: int, reservation: int, request: str) -> Iterator[str]:
    """Those that the guide shows, with values in the place of its dots and examples."""
    guide = (ROOT / "sql/README.md").read_text()
    chapters = (guide[guide.index("\n## Everyday queries"):guide.index("\n## Size, indexes")]
                + guide[guide.index("\n### Unsettled requests"):guide.index("\n## While the database")])
    for statement in re.findall(r"(?m)^    ((?:EXEC|SELECT|INSERT|UPDATE|DELETE) .*(?:\n     +\S.*)*)", chapters):
        for old, new in ((r"\b12\b", str(token)), (r"\b4711\b", str(reservation)), (r"(?i)(requestid\"?(?: = N'|:\"))…", rf"\g<1>{request}"),
                         (r"(ClientKeyID = N')…", r"\g<1>4f1d09"), (r"(INTO dbo.ClientKeys .*)4f1d09", r"\g<1>4f1d0b"),
                         ("…", uuid.uuid4().hex + uuid.uuid4().hex)):
            statement = re.sub(old, new, statement)
        yield statement


def test_everyday_statements(samples: Connection) -> None:
    [unsettled] = samples.rows("SELECT ReservationID, RequestID, TokenID FROM dbo.vw_UnsettledRequests")
    statements = list(everyday_statements(unsettled["TokenID"], unsettled["ReservationID"], unsettled["RequestID"]))
    assert len(statements) > 25
    looked = {statement: samples.query(statement) for statement in statements}
    for statement, results in looked.items():
        if "vw_TokenStatus" in statement or "usp_ListLogs" in statement or "usp_ListAudit" in statement or "'branch'" in statement:
            assert results[-1][1], f"no row: {statement}"
    [token] = samples.rows("SELECT Status, StatusReason, TotalTokenLimit FROM dbo.TokenMaster WHERE TokenID = ?", unsettled["TokenID"])
    assert token == {"Status": "Disabled", "StatusReason": "rotated", "TotalTokenLimit": 10000000}
    assert counts(samples)["TokenMaster"] == 5 + 3
    assert samples.rows("SELECT COUNT(*) AS n FROM dbo.ClientKeys WHERE RevokedAt IS NULL") == [{"n": 2}]
    assert {row["Action"] for row in samples.rows("SELECT Action FROM dbo.AuditLog WHERE Actor = N'anna'")} == {
        "token added", "token key changed", "token limit changed", "token status changed", "client key added", "client key revoked"}
    assert samples.rows("SELECT State FROM dbo.TokenReservations WHERE ReservationID = ?", unsettled["ReservationID"])[0]["State"] != "unsettled"
    assert samples.rows("SELECT TotalTokensUsed FROM dbo.TokenUsageLogs WHERE RequestID = ?", unsettled["RequestID"]) == [{"TotalTokensUsed": 1900}]
    assert unequal_sums(samples) == 0


def test_settled_within_a_transaction(samples: Connection) -> None:
    """Whoever settles by hand can look at it and take it back, also where a limit is reached."""
    samples.query("INSERT INTO dbo.TokenMaster (CompanyID, ApiKey, Status, TotalTokenLimit) VALUES (N'Full', N'key-of-full', N'Active', 10)")
    [token] = samples.rows("SELECT TokenID FROM dbo.TokenMaster WHERE CompanyID = N'Full'")
    counters = ("inputTokens", "outputTokens", "textPromptTokens", "imagePromptTokens", "textCandidatesTokens", "thoughtsTokens",
                "cachedTokens")
    items = json.dumps([{"i": 0, "requestId": "by-hand", "tokenId": token["TokenID"], "companyId": "Full", "tokenSource": "store",
                         **dict.fromkeys(counters, 0), "totalTokens": 20, "requestCount": 1, "unknownCalls": 0,
                         "loggedAt": "2026-01-02T03:04:05.678"}])
    rows = "SELECT TotalTokensUsed AS n FROM dbo.TokenUsageLogs WHERE RequestID = N'by-hand'"
    status = "SELECT Status FROM dbo.TokenMaster WHERE CompanyID = N'Full'"
    samples.query("BEGIN TRANSACTION")
    samples.query(f"EXEC dbo.usp_SettleUsage @Items = N'{items}'")
    assert samples.rows("SELECT @@TRANCOUNT AS n") == [{"n": 1}]
    assert (samples.rows(rows), samples.rows(status)) == ([{"n": 20}], [{"Status": "Exceeded"}])
    samples.query("ROLLBACK TRANSACTION")
    assert (samples.rows(rows), samples.rows(status)) == ([], [{"Status": "Active"}])
    samples.query(f"EXEC dbo.usp_SettleUsage @Items = N'{items}'")
    samples.query(f"EXEC dbo.usp_SettleUsage @Items = N'{items}'")
    assert samples.rows(rows) == [{"n": 20}]
    assert unequal_sums(samples) == 0
