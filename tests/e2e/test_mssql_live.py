"""The setup script on a server that runs T-SQL (MSSQL_SERVER): twice, and over old databases with data in them."""
from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Emulator, SqlServer, Stack
from tds_client import Connection, run_script

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
        [sums] = connection.rows("""SELECT COUNT(*) AS n FROM TokenUsageSummary s WHERE s.TotalUsedTokens <>
            (SELECT COALESCE(SUM(TotalTokensUsed), 0) FROM TokenUsageLogs u WHERE u.TokenID = s.TokenID) +
            (SELECT COALESCE(SUM(TotalTokensUsed), 0) FROM TokenUsageMonthly m WHERE m.TokenID = s.TokenID)""")
        assert sums["n"] == 0


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
