"""What the roles may do, and that it is enough: on a server with ownership chaining (not MSSQL_RIGHTS=no)."""
from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from conftest import ROOT, Emulator, SqlServer, Stack, eventually
from tds_client import Connection, SqlError, run_script

APP, READER, ADMIN = "extract_app", "extract_reader", "extract_admin"
DENIED = (229, 262, 297, 2760, 3701, 15151, 15247)

# Who may, being a member of that role and of nothing else. An error that is not about rights comes after them.
STATEMENTS: dict[str, set[str]] = {
    **{f"EXEC dbo.{call}": {APP} for call in (
        "usp_AcquireTokens @Items = N'[]'", "usp_SettleUsage @Items = N'[]'", "usp_ExpireReservations",
        "usp_RecordLogs @Entries = N'[]', @Attempts = N'[]'")},
    **{f"EXEC dbo.{call}": {APP, ADMIN} for call in (
        "usp_SchemaVersion", "usp_Ping")},
    **{f"EXEC dbo.{call}": {APP, READER, ADMIN} for call in (
        "usp_ListTokens", "usp_UsageReport @By = N'day'", "usp_ListLogs", "usp_ListRetries", "usp_ListReservations",
        "usp_CountTokens", "usp_ListAudit")},
    **{f"EXEC dbo.{call}": {ADMIN} for call in (
        "usp_AddToken @Actor = N'x', @CompanyID = N'x', @CompanyName = NULL, @Provider = NULL, @ApiKey = N'x',"
        " @TotalTokenLimit = NULL, @Threshold = NULL",
        "usp_SetTokenStatus @Actor = N'x', @TokenID = 1, @Status = N'Active', @Reason = NULL",
        "usp_SetTokenKey @Actor = N'x', @TokenID = 1, @ApiKey = N'y'",
        "usp_SetTokenLimit @Actor = N'x', @TokenID = 1, @TotalTokenLimit = NULL, @Threshold = NULL")},
    **{f"SELECT COUNT(*) FROM dbo.{view}": {READER} for view in (
        "vw_TokenStatus", "vw_UsageSummary", "vw_RecentErrors", "vw_FailedRetries", "vw_UnsettledRequests")},
    **{f"SELECT COUNT(*) FROM dbo.{table}": set() for table in (
        "TokenMaster", "TokenUsageLogs", "TokenUsageSummary", "TokenUsageMonthly", "TokenReservations", "ApplicationLogs",
        "RetryAttempts", "ClientKeys", "IdempotencyKeys", "AuditLog", "SchemaVersion")},
    **{f"EXEC dbo.{call}": set() for call in (  # what the other procedures call
        "usp_AcquireOneByOne @Items = N'[]'", "usp_SettleOneByOne @Items = N'[]'",
        "usp_EnsureSummary @TokenID = 1", "usp_TextFault @Text = N'x', @Fault = N''",
        "usp_UsableKey @ApiKey = N'x', @Usable = N''",
        "usp_ChangeToken @TokenID = 1, @Status = NULL, @CooldownMs = NULL, @Reason = NULL, @Detail = NULL, @RequestID = NULL,"
        " @Now = NULL")},
    "DELETE FROM dbo.ApplicationLogs": set(),
    "UPDATE dbo.TokenMaster SET Status = 'Active'": set(),
    "INSERT INTO dbo.AuditLog (Actor, Action) VALUES (N'x', N'x')": set(),
    "CREATE TABLE dbo.Mine (a INT)": set(),
    "ALTER ROLE extract_admin ADD MEMBER extract_app": set(),
    "DROP PROCEDURE dbo.usp_Ping": set(),
}


@dataclasses.dataclass
class Logins:
    """A database with the schema, and a login for each role."""
    database: str
    password: str
    password_file: Path
    names: dict[str, str]


@pytest.fixture
def logins(live: SqlServer) -> Iterator[Logins]:
    with tempfile.TemporaryDirectory(prefix="extract-rights-") as place:
        directory, mark = Path(place), uuid.uuid4().hex
        made = Logins(live.database(directory), f"Aa1!{mark}", directory / "password",
                      {role: f"{role}_{mark[:10]}" for role in (APP, READER, ADMIN)})
        made.password_file.write_text(made.password + "\n")
        with closing(live.connect(made.database)) as owner:
            run_script(owner, ROOT / "sql/setup_database.sql")
            for role, name in made.names.items():
                owner.query(f"CREATE LOGIN {name} WITH PASSWORD = N'{made.password}'")
                owner.query(f"CREATE USER {name} FOR LOGIN {name}")
                owner.query(f"ALTER ROLE {role} ADD MEMBER {name}")
        yield made
        live.drop(directory)
    for name in made.names.values():
        eventually(lambda: dropped(live, name), "sessions that have just ended hold their login for a moment")


def dropped(live: SqlServer, login: str) -> bool:
    with closing(live.connect()) as owner:
        try:
            owner.query(f"DROP LOGIN {login}")
            return True
        except SqlError:
            return False


def is_allowed(connection: Connection, statement: str) -> bool:
    try:
        connection.query(statement)
        return True
    except SqlError as error:
        return error.number not in DENIED


def test_all_is_judged(live: SqlServer, logins: Logins) -> None:
    """Each table, view and procedure of the schema stands above."""
    with closing(live.connect(logins.database)) as owner:
        made = {row["name"] for row in owner.rows(
            "SELECT TABLE_NAME AS name FROM INFORMATION_SCHEMA.TABLES WHERE TABLE_SCHEMA = 'dbo'"
            " UNION SELECT ROUTINE_NAME FROM INFORMATION_SCHEMA.ROUTINES WHERE ROUTINE_SCHEMA = 'dbo'")}
    asked = {match[1].lower() for statement in STATEMENTS
             if (match := re.match(r"(?:EXEC|SELECT COUNT\(\*\) FROM) dbo\.(\w+)", statement))}
    assert {name.lower() for name in made} == asked


@pytest.mark.parametrize("role", [APP, READER, ADMIN])
def test_rights(live: SqlServer, logins: Logins, role: str) -> None:
    server = live.address.replace("localhost", "127.0.0.1")
    with closing(Connection(server, logins.names[role], logins.password, logins.database)) as connection:
        allowed = {statement for statement in STATEMENTS if is_allowed(connection, statement)}
    assert allowed == {statement for statement, roles in STATEMENTS.items() if role in roles}


def test_serves_with_the_rights_of_extract_app(live: SqlServer, logins: Logins, emulator: Emulator,
                                               make_stack: Callable[..., Stack], pdf: bytes) -> None:
    """Ownership chaining is all that lets the procedures at the tables."""
    stack = make_stack(sql_server=live, env={
        "EXTRACT_STORE_DATABASE": logins.database, "EXTRACT_STORE_USER": logins.names[APP],
        "EXTRACT_STORE_PASSWORD_FILE": str(logins.password_file)})
    with closing(live.connect(logins.database)) as owner:
        owner.query("EXEC dbo.usp_AddToken @Actor = N'tests', @CompanyID = N'NT047', @CompanyName = NULL, @Provider = NULL,"
                    " @ApiKey = N'key-of-the-test', @TotalTokenLimit = NULL, @Threshold = NULL")
        assert stack.post(pdf).status == 200
        assert owner.rows("SELECT RequestCount FROM TokenUsageLogs") == [{"RequestCount": 1}]


def test_administrators_read_with_the_rights_of_extract_reader(live: SqlServer, logins: Logins,
                                                               make_stack: Callable[..., Stack]) -> None:
    stack = make_stack(sql_server=live, env={
        "EXTRACT_STORE_DATABASE": logins.database, "EXTRACT_STORE_USER": logins.names[APP],
        "EXTRACT_STORE_PASSWORD_FILE": str(logins.password_file), "EXTRACT_STORE_READER_USER": logins.names[READER],
        "EXTRACT_STORE_READER_PASSWORD_FILE": str(logins.password_file)})
    key = f"extract_{base64.urlsafe_b64encode(os.urandom(32)).decode().rstrip('=')}"
    with closing(live.connect(logins.database)) as owner:
        owner.query("EXEC dbo.usp_AddClientKey @Actor = N'tests', @ClientKeyID = N'1',"
                    f" @KeyHash = N'{hashlib.sha256(key.encode()).hexdigest()}', @CompanyID = NULL, @Label = NULL")
    for path in ("tokens", "tokens?by=status", "usage?by=company", "errors", "retries", "unsettled", "outbox"):
        assert stack.get(f"/admin/{path}", headers={"Authorization": f"Bearer {key}"}).status == 200
    with closing(live.connect(logins.database)) as owner:
        assert owner.rows("SELECT COUNT(*) AS n FROM sys.dm_exec_sessions WHERE login_name = ?", logins.names[READER]) != [{"n": 0}]
