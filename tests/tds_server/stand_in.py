"""The database behind the TDS server: a stand-in for SQL Server and sql/setup_database.sql.

The tables are those of sql/setup_sqlite.sql in a SQLite database; the procedures are written here once more,
in Python, with the names, parameters, result sets and errors that the T-SQL ones have. It is a third
implementation of the store's rules, for the driver's sake: it proves the driver, not the T-SQL. It is stricter than the
original where that finds mistakes: a member of the JSON that is missing or not known is an error here.
"""
from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tds import T_BIGINT, T_FLOAT, T_INT, T_TEXT, Type, t_nvarchar

ROOT = Path(__file__).resolve().parents[2]
COUNT_MAX = 10 ** 15
SPAN_MAX = 366 * 86400 * 1000
GUARD_WINDOW_MS, GUARD_OTHERS, GUARD_COOLDOWN_MS = 60_000, 2, 600_000
IDEMPOTENCY_MS = 86_400_000
SERVICE = "extract-fcgi"
SERVED = "(t.Provider IS NULL OR t.Provider IN ('', 'Google', 'Gemini'))"
USED_BY_ROWS = """((SELECT IFNULL(SUM(u.TotalTokensUsed), 0) FROM TokenUsageLogs u WHERE u.TokenID = t.TokenID)
    + (SELECT IFNULL(SUM(m.TotalTokensUsed), 0) FROM TokenUsageMonthly m WHERE m.TokenID = t.TokenID))"""
# NVARCHAR(n) of the original, where n is what a value may overrun
WIDTHS = {"Branch": 256, "RequestedBy": 256, "CompanyID": 256, "RequestID": 64, "ClientKeyID": 64}
BLANKS = "".join(map(chr, range(1, 33))) + "\x7f"  # what clings to a key that was pasted
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class ServerError(Exception):
    """What the client gets as an ERROR token."""

    def __init__(self, number: int, message: str, severity: int = 16, state: int = 1) -> None:
        super().__init__(message)
        self.number, self.message, self.severity, self.state = number, message, severity, state


class BadItem(Exception):
    """One item's data is refused; the others of the batch stay."""


@dataclasses.dataclass
class Result:
    columns: list[tuple[str, Type]]
    rows: list[list[Any]]


# ---- time and text ----


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def stamp(ms: int) -> str:
    return datetime.fromtimestamp(ms // 1000, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S") + f".{ms % 1000:03d}Z"


def to_ms(text: str | None) -> int | None:
    """A time as the programs and as people write it, in milliseconds; None where it is none."""
    try:
        at = datetime.fromisoformat(text.replace("Z", "")).replace(tzinfo=timezone.utc)  # type: ignore[union-attr]
    except (AttributeError, ValueError):
        return None
    return round(at.timestamp() * 1000)


def fold(text: str | None) -> str | None:
    return None if text is None else unicodedata.normalize("NFC", text).casefold()


def compare(a: str, b: str) -> int:
    """A collation that ignores case, for all scripts."""
    left, right = fold(a), fold(b)
    return (left > right) - (left < right)  # type: ignore[operator]


def usable_key(stored: str | None) -> str | None:
    """usp_UsableKey."""
    key = (stored or "").strip(BLANKS)
    return key if re.fullmatch("[!-~]{1,1024}", key) else None


def text_fault(text: str | None) -> str | None:
    """usp_TextFault."""
    if text is None:
        return None
    if len(text.encode("utf-16-le")) > 2 * 256:
        return "is too long: at most 256 characters"
    if CONTROLS.search(text):
        return "must not have control characters"
    return "must not begin or end with a space" if text.strip(" ") != text else None


def cut_reason(reason: str | None) -> str:
    return "no reason given" if not reason else reason.encode()[:800].decode(errors="ignore")


# ---- databases ----


class Database:
    """One database: a SQLite file, the procedures that its setup has created, and a lock: one call at a time."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.RLock()
        self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self.db.create_collation("NOCASE", compare)  # also where the schema says so
        self.db.create_function("to_ms", 1, to_ms, deterministic=True)
        self.db.create_function("fold", 1, fold, deterministic=True)
        self.db.create_function("usable_key", 1, usable_key, deterministic=True)
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = OFF")  # the process may be killed, the machine not
        self.db.execute("PRAGMA foreign_keys = ON")
        self.db.execute("CREATE TABLE IF NOT EXISTS _procedures (name TEXT PRIMARY KEY COLLATE NOCASE)")
        types = {row[0]: row[1] for row in self.db.execute(
            "SELECT p.name, p.type FROM sqlite_master m JOIN pragma_table_info(m.name) p WHERE m.type = 'table'")}
        self.types: dict[str, str] = types

    def run(self, sql: str, *values: Any) -> sqlite3.Cursor:
        return self.db.execute(sql, values)

    def row(self, sql: str, *values: Any) -> tuple[Any, ...] | None:
        return self.db.execute(sql, values).fetchone()

    def one(self, sql: str, *values: Any) -> Any:
        row = self.row(sql, *values)
        return None if row is None else row[0]

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing (SET XACT_ABORT ON); inside a transaction of the session, a part of that."""
        with self.lock:
            inside = self.db.in_transaction
            if not inside:
                self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except sqlite3.IntegrityError as error:
                self.db.execute("ROLLBACK")
                raise ServerError(547, f"The statement conflicted with a constraint: {error}") from error
            except sqlite3.OperationalError as error:
                self.db.execute("ROLLBACK")
                number = 1105 if "full" in str(error) else 208 if "no such table" in str(error) else 50000
                raise ServerError(number, str(error)) from error
            except BaseException:
                self.db.execute("ROLLBACK")
                raise
            if not inside:
                self.db.execute("COMMIT")

    def has_procedure(self, name: str) -> bool:
        with self.lock:
            return self.row("SELECT 1 FROM _procedures WHERE name = ?", name) is not None

    def create_tables(self) -> None:
        """What the setup script's CREATE TABLE amounts to, with its own idea of the version left out."""
        with self.lock:
            if self.row("SELECT 1 FROM sqlite_master WHERE name = 'SchemaVersion'") is None:
                self.db.executescript((ROOT / "sql/setup_sqlite.sql").read_text())
                self.run("DELETE FROM SchemaVersion")
                self.types = {row[0]: row[1] for row in self.db.execute(
                    "SELECT p.name, p.type FROM sqlite_master m JOIN pragma_table_info(m.name) p"
                    " WHERE m.type = 'table'")}

    def create_views(self) -> None:
        """Again, where one was dropped."""
        with self.lock:
            text = (ROOT / "sql/setup_sqlite.sql").read_text()
            for statement in re.findall(r"^(?:DROP|CREATE) VIEW.*?;$", text, re.M | re.S):
                self.run(statement)

    def create_procedure(self, name: str) -> None:
        with self.lock:
            self.run("INSERT OR IGNORE INTO _procedures VALUES (?)", name)

    def close(self) -> None:
        with self.lock:
            self.db.close()


def exists(db: Database, table: str) -> bool:
    return db.row("SELECT 1 FROM sqlite_master WHERE name = ?", table) is not None


# ---- JSON ----

ACQUIRE = {"i": int, "requestId": str, "sequence": int, "companyId": str, "branch": str, "requestedBy": str,
           "estimate": int, "expiresMs": int, "choice": int, "previousTokenId": int, "fault": str, "cooldownMs": int,
           "reason": str, "previousSpent": int, "fallbackIfNone": int, "fallbackOnly": int, "idempotencyKey": str,
           "host": str, "processId": int, "excluded": list}
EXCLUDED = {"t": int, "f": int}
SETTLE = {"i": int, "requestId": str, "tokenId": int, "companyId": str, "branch": str, "requestedBy": str,
          "clientKeyId": str, "tokenSource": str, "model": str, "inputTokens": int, "outputTokens": int,
          "textPromptTokens": int, "imagePromptTokens": int, "textCandidatesTokens": int, "thoughtsTokens": int,
          "cachedTokens": int, "totalTokens": int, "requestCount": int, "unknownCalls": int, "durationMs": int,
          "loggedAt": str, "fault": str, "cooldownMs": int, "reason": str, "idempotency": int, "releaseSequence": int,
          "host": str, "processId": int, "traceId": str}
ENTRY = {"timestamp": str, "level": str, "logger": str, "message": str, "exception": str, "module": str,
         "function": str, "line": int, "requestId": str, "host": str, "traceId": str}
ATTEMPT = {"tokenId": int, "companyId": str, "attempt": int, "errorMessage": str, "isRetryable": int,
           "timestamp": str, "requestId": str, "statusCode": int, "delayMs": int}
NULLABLE = {"branch", "requestedBy", "clientKeyId", "model", "reason", "exception", "function", "requestId", "module",
            "logger", "host", "loggedAt", "message", "idempotencyKey", "traceId"}


def parse(text: str | None, shape: dict[str, type], what: str) -> list[dict[str, Any]]:
    try:
        items = json.loads(text or "", strict=True)
    except ValueError as error:
        raise ServerError(13609, f"JSON text is not properly formatted ({what}: {error}).") from error
    if not isinstance(items, list):
        raise ServerError(13607, f"{what} is no JSON array.")
    for item in items:
        check_shape(item, shape, what)
    return items


def check_shape(item: Any, shape: dict[str, type], what: str) -> None:
    if not isinstance(item, dict):
        raise ServerError(13607, f"An element of {what} is no JSON object.")
    for name in item.keys() - shape.keys():
        raise ServerError(50901, f"{what} has the member {name}, which nobody knows.")
    for name in shape.keys() - item.keys():
        raise ServerError(13608, f"Property cannot be found on the specified JSON path: {what}, {name}.")
    for name, kind in shape.items():
        value = item[name]
        if value is None and name in NULLABLE:
            continue
        if kind is int and isinstance(value, bool):
            item[name] = value = int(value)  # true and false are BIT's words in JSON
        if type(value) is not kind:
            raise ServerError(245, f"Conversion failed when converting {what}, {name}.")
        if kind is int and not -2 ** 63 <= value < 2 ** 63:
            raise ServerError(8115, f"Arithmetic overflow error converting {what}, {name} to data type bigint.")
    if "timestamp" in shape and not is_time(item["timestamp"]):
        raise ServerError(241, f"Conversion failed when converting date and/or time: {what}, timestamp.")


def is_time(text: str) -> bool:
    """In the one form that the programs write."""
    at = to_ms(text)
    return at is not None and stamp(at) == text


def fits(name: str, value: str | None) -> str | None:
    if value is not None and len(value.encode("utf-16-le")) > 2 * WIDTHS[name]:
        raise ServerError(2628, f"String or binary data would be truncated in column '{name}'.")
    return value


# ---- rows that several procedures write ----


def ensure_summary(db: Database, token: int, now: str) -> None:
    db.run(f"""INSERT INTO TokenUsageSummary (TokenID, TotalUsedTokens, TotalRemainingTokens, ReservedTokens, LastUpdated)
        SELECT TokenID, Used, TotalTokenLimit - Used, Reserved, ?2
        FROM (SELECT t.TokenID, t.TotalTokenLimit, {USED_BY_ROWS} AS Used,
                     (SELECT IFNULL(SUM(r.EstimatedTokens), 0) FROM TokenReservations r
                      WHERE r.State = 'open' AND r.TokenID = t.TokenID) AS Reserved
              FROM TokenMaster t
              WHERE t.TokenID = ?1 AND NOT EXISTS (SELECT 1 FROM TokenUsageSummary s WHERE s.TokenID = ?1))""",
           token, now)


def unreserve(db: Database, token: int, tokens: int) -> None:
    db.run("UPDATE TokenUsageSummary SET ReservedTokens = MAX(0, ReservedTokens - ?2) WHERE TokenID = ?1", token, tokens)


def audit(db: Database, now: str, actor: str, action: str, token: int, request: str | None, detail: str | None) -> None:
    db.run("INSERT INTO AuditLog (Timestamp, Actor, Action, ObjectType, ObjectID, CompanyID, RequestID, Detail)"
           " VALUES (?1, ?2, ?3, 'TokenMaster', CAST(?4 AS TEXT),"
           " (SELECT CompanyID FROM TokenMaster WHERE TokenID = ?4), ?5, SUBSTR(?6, 1, 2000))",
           now, actor, action, token, request, detail)


def insert_reservation(db: Database, now: int, item: dict[str, Any], sequence: int, token: int, company: str,
                       state: str, estimate: int, expires_ms: int, unknown: int) -> None:
    db.run("INSERT INTO TokenReservations (RequestID, Sequence, TokenID, CompanyID, Branch, RequestedBy,"
           " EstimatedTokens, State, UnknownCalls, TokenSource, Host, ProcessID, CreatedAt, ExpiresAt, ClosedAt)"
           " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
           item["requestId"], sequence, token or None, fits("CompanyID", company), fits("Branch", item["branch"]),
           fits("RequestedBy", item["requestedBy"]), estimate, state, unknown, "store" if token else "fallback",
           item["host"], item["processId"], stamp(now), stamp(now + expires_ms), stamp(now) if state == "released" else None)


# ---- faults ----


def cool(db: Database, now: int, token: int, cooldown_ms: int, reason: str) -> None:
    db.run("""UPDATE TokenMaster
        SET CooldownUntil = CASE WHEN to_ms(CooldownUntil) > ?2 THEN CooldownUntil ELSE ?3 END,
            StatusReason = CASE WHEN Status = 'Active' THEN ?4 ELSE StatusReason END,
            UpdatedAt = CASE WHEN Status = 'Active' THEN ?5 ELSE UpdatedAt END
        WHERE TokenID = ?1""", token, now + cooldown_ms, stamp(now + cooldown_ms), reason, stamp(now))


def lose_status(db: Database, now: int, token: int, status: str, reason: str, request: str) -> None:
    changed = db.run("UPDATE TokenMaster SET Status = ?2, StatusReason = ?3, UpdatedAt = ?4"
                     " WHERE TokenID = ?1 AND Status = 'Active'", token, status, reason, stamp(now))
    if changed.rowcount:
        audit(db, stamp(now), SERVICE, "token status changed", token, request, f"Active to {status}: {reason}")


def disable(db: Database, now: int, token: int, reason: str, request: str) -> int:
    if not db.row("SELECT 1 FROM TokenMaster WHERE TokenID = ? AND Status = 'Active'", token):
        return 0
    others = db.one("""SELECT COUNT(DISTINCT fold(t.CompanyID)) FROM TokenMaster t
        WHERE SUBSTR(t.StatusReason, 1, 9) = 'at fault:' AND to_ms(t.UpdatedAt) >= ?2
          AND t.CompanyID <> (SELECT CompanyID FROM TokenMaster WHERE TokenID = ?1)""", token, now - GUARD_WINDOW_MS)
    if others < GUARD_OTHERS:
        lose_status(db, now, token, "Disabled", f"at fault: {reason}", request)
        return 0
    text = f"at fault: {reason} (not disabled: tokens of several companies at fault within a minute)"
    cool(db, now, token, GUARD_COOLDOWN_MS, text)
    if db.row("SELECT 1 FROM AuditLog WHERE to_ms(Timestamp) >= ? AND Action = 'disabling stopped'",
              now - GUARD_WINDOW_MS):
        return 0
    audit(db, stamp(now), SERVICE, "disabling stopped", token, request, text)
    return 1


def apply_fault(db: Database, now: int, token: int, item: dict[str, Any]) -> int:
    """1 where the guard against disabling a fleet has just set in."""
    if item["fault"] not in ("none", "cooldown", "disable", "exceed"):
        raise BadItem("fault is none, cooldown, disable or exceed")
    reason = cut_reason(item["reason"])
    if item["fault"] == "cooldown":
        cool(db, now, token, item["cooldownMs"], reason)
    elif item["fault"] == "disable":
        return disable(db, now, token, reason, item["requestId"])
    elif item["fault"] == "exceed":
        lose_status(db, now, token, "Exceeded", reason, item["requestId"])
    return 0


# ---- usp_AcquireTokens ----

GRANT = [("i", T_INT), ("Code", t_nvarchar(20)), ("Message", t_nvarchar(400)), ("Grant", t_nvarchar(20)),
         ("TokenID", T_BIGINT), ("ApiKey", t_nvarchar(1024)), ("CompanyID", t_nvarchar(256)),
         ("FirstUsableMs", T_BIGINT), ("BusyToo", T_INT), ("DisablingStopped", T_INT),
         ("FirstRequestID", t_nvarchar(64)), ("FirstIsDone", T_INT)]


def grant_again(db: Database, item: dict[str, Any]) -> dict[str, Any] | None:
    row = db.row("SELECT r.TokenID, IFNULL(t.CompanyID, r.CompanyID), t.ApiKey FROM TokenReservations r"
                 " LEFT JOIN TokenMaster t ON t.TokenID = r.TokenID WHERE r.RequestID = ? AND r.Sequence = ?",
                 item["requestId"], item["sequence"])
    if row and row[0] and usable_key(row[2]) is None:
        raise BadItem(f"token {row[0]} has no usable CompanyID or ApiKey")
    return row and {"Grant": "token", "TokenID": row[0] or 0, "CompanyID": row[1], "ApiKey": usable_key(row[2])}


def release_previous(db: Database, now: int, item: dict[str, Any]) -> None:
    row = db.row("SELECT ReservationID, EstimatedTokens FROM TokenReservations"
                 " WHERE RequestID = ? AND TokenID = ? AND State = 'open' ORDER BY Sequence DESC LIMIT 1",
                 item["requestId"], item["previousTokenId"])
    if row is not None:
        db.run("UPDATE TokenReservations SET State = 'released', ClosedAt = ? WHERE ReservationID = ?", stamp(now), row[0])
        unreserve(db, item["previousTokenId"], row[1])


def classify(c: tuple[Any, ...], item: dict[str, Any], now: int) -> str:
    token, limit, used, reserved, cooling, has_key = c
    tried = [e["f"] for e in item["excluded"] if e["t"] == token]
    if any(tried) or not has_key or (limit is not None and used >= limit):
        return "never"
    if cooling is not None and cooling > now:
        return "cooling"
    if limit is not None and reserved > 0 and item["estimate"] > limit - used - reserved:
        return "busy"
    return "cooling" if tried else "usable"


def reserve(db: Database, now: int, item: dict[str, Any], token: int, company: str) -> dict[str, Any]:
    key = None
    if token:
        company, key = db.row(  # type: ignore[misc]
            "SELECT CompanyID, usable_key(ApiKey) FROM TokenMaster WHERE TokenID = ?", token)
        ensure_summary(db, token, stamp(now))
        db.run("UPDATE TokenUsageSummary SET ReservedTokens = ReservedTokens + ? WHERE TokenID = ?",
               item["estimate"], token)
    insert_reservation(db, now, item, item["sequence"], token, company, "open", item["estimate"], item["expiresMs"], 0)
    return {"Grant": "token", "TokenID": token, "CompanyID": company, "ApiKey": key}


def choose(db: Database, now: int, item: dict[str, Any]) -> dict[str, Any]:
    candidates = [] if item["fallbackOnly"] else db.run(
        f"""SELECT t.TokenID, t.TotalTokenLimit, IFNULL(s.TotalUsedTokens, {USED_BY_ROWS}),
                  IFNULL(s.ReservedTokens, 0), to_ms(t.CooldownUntil), usable_key(t.ApiKey) IS NOT NULL
            FROM TokenMaster t LEFT JOIN TokenUsageSummary s ON s.TokenID = t.TokenID
            WHERE t.CompanyID = ? AND t.Status = 'Active' AND {SERVED} ORDER BY t.TokenID""",
        item["companyId"]).fetchall()
    fitness = [classify(c, item, now) for c in candidates]
    usable = [c[0] for c, f in zip(candidates, fitness, strict=True) if f == "usable"]
    if usable:
        return reserve(db, now, item, usable[item["choice"] % len(usable)], "")
    newest = db.row(f"SELECT t.CompanyID, {SERVED} AS Served, t.Status = 'Expired' FROM TokenMaster t"
                    " WHERE t.CompanyID = ? ORDER BY Served DESC, to_ms(t.CreatedAt) DESC, t.TokenID DESC",
                    item["companyId"])
    company = newest[0] if newest else item["companyId"]
    known = bool(newest and newest[1])
    if candidates:
        waits = [max(0, (c[4] or 0) - now) for c, f in zip(candidates, fitness, strict=True) if f == "cooling"]
        if waits:
            return {"Grant": "cooling", "CompanyID": company, "FirstUsableMs": min(waits),
                    "BusyToo": int("busy" in fitness)}
        return {"Grant": "busy" if "busy" in fitness else "unavailable", "CompanyID": company}
    if item["fallbackOnly"] or (item["fallbackIfNone"] and known):
        return reserve(db, now, item, 0, company)
    assert newest is not None or not known
    return {"Grant": "no_token" if not known else "expired" if newest[2] else "unavailable", "CompanyID": company}


def choose_once(db: Database, now: int, item: dict[str, Any]) -> dict[str, Any]:
    """The same with an idempotency key, which the request takes with its first token."""
    key, request = item["idempotencyKey"], item["requestId"]
    company = db.one(f"SELECT t.CompanyID FROM TokenMaster t WHERE t.CompanyID = ? ORDER BY {SERVED} DESC,"
                     " to_ms(t.CreatedAt) DESC, t.TokenID DESC", item["companyId"]) or item["companyId"]
    first = db.row("SELECT RequestID, State = 'done' FROM IdempotencyKeys WHERE CompanyID = ? AND IdempotencyKey = ?"
                   " AND to_ms(ExpiresAt) > ?", company, key, now)
    if first and first[0] != request and not item["fallbackOnly"]:
        return {"Grant": "duplicate", "CompanyID": item["companyId"], "FirstRequestID": first[0], "FirstIsDone": first[1]}
    out = choose(db, now, item)
    if out["Grant"] == "token" and first is None:
        db.run("REPLACE INTO IdempotencyKeys (CompanyID, IdempotencyKey, RequestID, CreatedAt, ExpiresAt)"
               " VALUES (?, ?, ?, ?, ?)", company, key, request, stamp(now), stamp(now + IDEMPOTENCY_MS))
    return out


def acquire_one(db: Database, now: int, item: dict[str, Any]) -> dict[str, Any]:
    if item["choice"] < 0:
        raise BadItem("choice must not be negative")
    if item["idempotencyKey"] is not None and not 1 <= len(item["idempotencyKey"]) <= 128:
        raise BadItem("idempotency_key must have 1 to 128 bytes")
    if item["sequence"] < 1 or not 0 <= item["estimate"] <= COUNT_MAX or not 0 <= item["expiresMs"] <= SPAN_MAX:
        raise BadItem("sequence, estimate or expiresMs is out of range")
    for one in item["excluded"]:
        check_shape(one, EXCLUDED, "excluded")
    again = grant_again(db, item)
    if again is not None:
        return again
    stopped = 0
    if item["previousTokenId"] != 0:
        stopped = apply_fault(db, now, item["previousTokenId"], item)
        if not item["previousSpent"]:
            release_previous(db, now, item)
    chosen = choose(db, now, item) if item["idempotencyKey"] is None else choose_once(db, now, item)
    return chosen | {"DisablingStopped": stopped}


def each_item(db: Database, items: list[dict[str, Any]], columns: list[tuple[str, Type]],
              work: Callable[[Database, int, dict[str, Any]], dict[str, Any]]) -> Result:
    """One row for each item; a bad one fails alone. The time is that of the turn to write: who waited for it must not
    take a cooldown that began meanwhile for longer than it is."""
    rows = []
    with db.transaction():
        now = now_ms()
        for item in items:
            db.run("SAVEPOINT item")
            try:
                out = {"Code": "ok"} | work(db, now, item)
            except BadItem as error:
                db.run("ROLLBACK TO item")
                out = {"Code": "bad_value", "Message": str(error), "Grant": "no_token"}
            db.run("RELEASE item")
            out["i"] = item["i"]
            rows.append([out.get(name, None if t.code == T_TEXT.code else 0) for name, t in columns])
    return Result(columns, rows)


def usp_AcquireTokens(db: Database, Items: str) -> Result:
    return each_item(db, parse(Items, ACQUIRE, "@Items"), GRANT, acquire_one)


# ---- usp_SettleUsage ----

SETTLED = [("i", T_INT), ("Code", t_nvarchar(20)), ("Message", t_nvarchar(400)), ("ThresholdCrossed", T_INT),
           ("Exceeded", T_INT), ("DisablingStopped", T_INT)]
COUNTS = ["inputTokens", "outputTokens", "textPromptTokens", "imagePromptTokens", "textCandidatesTokens",
          "thoughtsTokens", "cachedTokens", "totalTokens"]


def add_usage(db: Database, now: int, item: dict[str, Any], limit: int | None) -> dict[str, Any]:
    token, total, out = item["tokenId"], item["totalTokens"], {}
    db.run("UPDATE TokenUsageSummary SET TotalUsedTokens = TotalUsedTokens + ?2,"
           " TotalRemainingTokens = ?3 - (TotalUsedTokens + ?2), LastUpdated = ?4 WHERE TokenID = ?1",
           token, total, limit, stamp(now))
    used, threshold = db.row(  # type: ignore[misc]
        "SELECT TotalUsedTokens, Threshold FROM TokenUsageSummary WHERE TokenID = ?", token)
    if limit is None:
        return out
    if used >= limit or used / limit >= threshold:
        out["ThresholdCrossed"] = db.run(
            "UPDATE TokenUsageSummary SET ThresholdCrossedAt = ? WHERE TokenID = ? AND ThresholdCrossedAt IS NULL",
            stamp(now), token).rowcount
    if used >= limit:
        out["Exceeded"] = db.run(
            "UPDATE TokenMaster SET Status = 'Exceeded', StatusReason = ?, UpdatedAt = ?"
            " WHERE TokenID = ? AND Status = 'Active'",
            f"limit of {limit} tokens reached", stamp(now), token).rowcount
        if out["Exceeded"]:
            audit(db, stamp(now), SERVICE, "token status changed", token, item["requestId"],
                  "Active to Exceeded: limit reached")
    return out


def close_reservations(db: Database, now: int, item: dict[str, Any], state: str) -> None:
    db.run("UPDATE TokenReservations SET State = ?, ClosedAt = ?, UnknownCalls = ?"
           " WHERE RequestID = ? AND TokenID IS ? AND ClosedAt IS NULL",
           state, stamp(now), item["unknownCalls"], item["requestId"], item["tokenId"] or None)


def leave_unsettled(db: Database, now: int, item: dict[str, Any], company: str, last: int | None) -> None:
    request = item["requestId"]
    if last is None:
        sequence = db.one("SELECT MIN(0, IFNULL(MIN(Sequence), 0)) - 1 FROM TokenReservations WHERE RequestID = ?", request)
        insert_reservation(db, now, item, sequence, item["tokenId"], company, "unsettled", 0, 0, item["unknownCalls"])
        return
    db.run("""UPDATE TokenReservations
        SET State = CASE WHEN ReservationID = ?3 THEN 'unsettled' ELSE 'released' END,
            UnknownCalls = CASE WHEN ReservationID = ?3 THEN ?4 ELSE 0 END,
            ClosedAt = CASE WHEN ReservationID = ?3 THEN NULL ELSE ?5 END
        WHERE RequestID = ?1 AND TokenID IS ?2 AND ClosedAt IS NULL""",
           request, item["tokenId"] or None, last, item["unknownCalls"], stamp(now))


def insert_usage(db: Database, now: int, item: dict[str, Any], company: str) -> None:
    model = item["model"] and item["model"][:256]
    db.run("INSERT INTO TokenUsageLogs (TokenID, Branch, RequestedBy, InputTokens, OutputTokens, TextPromptTokens,"
           " ImagePromptTokens, TextCandidatesTokens, ThoughtsTokens, CachedTokens, TotalTokensUsed, RequestCount,"
           " LoggedAt, RequestID, CompanyID, ClientKeyID, TokenSource, UnknownCalls, Model, DurationMs, TraceID)"
           " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
           item["tokenId"] or None, fits("Branch", item["branch"]), fits("RequestedBy", item["requestedBy"]),
           *[item[name] for name in COUNTS], item["requestCount"], item["loggedAt"] or stamp(now), item["requestId"],
           company, item["clientKeyId"], item["tokenSource"], item["unknownCalls"], model, item["durationMs"],
           item["traceId"])


def settle_key(db: Database, item: dict[str, Any]) -> None:
    if item["idempotency"] == 1:
        db.run("DELETE FROM IdempotencyKeys WHERE RequestID = ? AND State = 'in_progress'", item["requestId"])
    elif item["idempotency"] == 2:
        db.run("UPDATE IdempotencyKeys SET State = 'done' WHERE RequestID = ?", item["requestId"])


def release_unheard(db: Database, now: int, item: dict[str, Any]) -> None:
    """What that acquire has reserved, or will yet reserve."""
    which = item["requestId"], item["releaseSequence"]
    row = db.row("SELECT IFNULL(TokenID, 0), EstimatedTokens, State FROM TokenReservations"
                 " WHERE RequestID = ? AND Sequence = ?", *which)
    if row is None:
        insert_reservation(db, now, item, item["releaseSequence"], 0, item["companyId"], "released", 0, 0, 0)
        return
    if row[2] == "open":
        unreserve(db, row[0], row[1])
    db.run("UPDATE TokenReservations SET State = 'released', ClosedAt = ?, UnknownCalls = 0"
           " WHERE RequestID = ? AND Sequence = ? AND ClosedAt IS NULL", stamp(now), *which)


def settle_one(db: Database, now: int, item: dict[str, Any]) -> dict[str, Any]:
    request, token = item["requestId"], item["tokenId"]
    if any(not 0 <= item[name] <= COUNT_MAX for name in COUNTS) or item["requestCount"] < 0 \
            or item["unknownCalls"] < 0 or item["durationMs"] < 0 or item["tokenSource"] not in ("store", "fallback"):
        raise BadItem("a count is out of range")
    if item["loggedAt"] is not None and not is_time(item["loggedAt"]):
        raise BadItem("loggedAt is no time")
    if item["idempotency"] not in (0, 1, 2) or not 0 <= item["releaseSequence"] < 2 ** 31:
        raise BadItem("idempotency or releaseSequence is out of range")
    if item["traceId"] is not None and not 1 <= len(item["traceId"]) <= 32:
        raise BadItem("traceId must have 1 to 32 bytes")
    settle_key(db, item)
    if item["releaseSequence"] > 0:
        release_unheard(db, now, item)
        return {}
    if db.row("SELECT 1 FROM TokenUsageLogs WHERE RequestID = ? AND IFNULL(TokenID, 0) = ?", request, token):
        return {}
    last, opened, company = db.row(  # type: ignore[misc]
        "SELECT MAX(ReservationID), IFNULL(SUM(CASE State WHEN 'open' THEN EstimatedTokens ELSE 0 END), 0),"
        " MAX(CompanyID) FROM TokenReservations WHERE RequestID = ? AND TokenID IS ? AND ClosedAt IS NULL",
        request, token or None)
    master = db.row("SELECT CompanyID, TotalTokenLimit FROM TokenMaster WHERE TokenID = ?", token)
    company = master[0] if master else company or item["companyId"]
    out: dict[str, Any] = {}
    if item["requestCount"] > 0:
        if token and not master:
            raise BadItem(f"token {token} was deleted")
        if token:
            ensure_summary(db, token, stamp(now))
        insert_usage(db, now, item, company)
        unreserve(db, token, opened)
        close_reservations(db, now, item, "settled")
        if master:
            out = add_usage(db, now, item, master[1])
    elif item["unknownCalls"] > 0:
        if token and not master and last is None:
            raise BadItem(f"token {token} was deleted")
        unreserve(db, token, opened)
        leave_unsettled(db, now, item, company, last)
    else:
        unreserve(db, token, opened)
        close_reservations(db, now, item, "released")
    if token:
        out["DisablingStopped"] = apply_fault(db, now, token, item)
    return out


def usp_SettleUsage(db: Database, Items: str) -> Result:
    return each_item(db, parse(Items, SETTLE, "@Items"), SETTLED, settle_one)


# ---- in the background ----


def is_recorded(db: Database, entry: dict[str, Any]) -> bool:
    return db.row("SELECT 1 FROM ApplicationLogs WHERE to_ms(Timestamp) = to_ms(?) AND Message = ? AND Module = ?"
                  " AND LineNumber = ? AND RequestID IS ? AND Host = ?",
                  *[entry[name] for name in ("timestamp", "message", "module", "line", "requestId", "host")]) is not None


def is_attempted(db: Database, attempt: dict[str, Any]) -> bool:
    return db.row("SELECT 1 FROM RetryAttempts WHERE to_ms(Timestamp) = to_ms(?) AND RequestID = ? AND Attempt = ?",
                  *[attempt[name] for name in ("timestamp", "requestId", "attempt")]) is not None


def usp_RecordLogs(db: Database, Entries: str, Attempts: str, Again: int | None) -> None:
    entries, attempts = parse(Entries, ENTRY, "@Entries"), parse(Attempts, ATTEMPT, "@Attempts")
    with db.transaction():
        if Again:
            entries = [e for e in entries if not is_recorded(db, e)]
            attempts = [a for a in attempts if not is_attempted(db, a)]
        for e in entries:
            db.run("INSERT INTO ApplicationLogs (Timestamp, LogLevel, Logger, Message, Exception, Module, FunctionName,"
                   " LineNumber, RequestID, Host, TraceID) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", *[e[name] for name in ENTRY])
        for a in attempts:
            db.run("INSERT INTO RetryAttempts (TokenID, CompanyID, Attempt, ErrorMessage, IsRetryable, Timestamp,"
                   " RequestID, StatusCode, DelayMs) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                   *[a[name] or None if name in ("tokenId", "statusCode") else a[name] for name in ATTEMPT])


def usp_ExpireReservations(db: Database) -> Result:
    now = stamp(now_ms())
    with db.transaction():
        rows = db.run("SELECT ReservationID, TokenID, EstimatedTokens, RequestID FROM TokenReservations"
                      " WHERE State = 'open' AND ClosedAt IS NULL AND to_ms(ExpiresAt) < to_ms(?)", now).fetchall()
        for reservation, token, tokens, request in rows:
            db.run("UPDATE IdempotencyKeys SET State = 'done' WHERE RequestID = ?", request)
            unreserve(db, token or 0, tokens)
            db.run("UPDATE TokenReservations SET State = 'unsettled', UnknownCalls = UnknownCalls + 1"
                   " WHERE ReservationID = ?", reservation)
        db.run("DELETE FROM IdempotencyKeys WHERE to_ms(ExpiresAt) < to_ms(?)", now)
    return Result([("Expired", T_INT)], [[len(rows)]])


# ---- administration ----

OUTCOME = [("Code", t_nvarchar(20)), ("Message", t_nvarchar(400))]


def outcome(code: str = "ok", message: str | None = None) -> Result:
    return Result(OUTCOME, [[code, message]])


def describe(limit: int | None, threshold: float | None) -> str:
    return f"limit {'none' if limit is None else limit}" + (f", threshold {threshold:g}" if threshold else "")


def usp_AddToken(db: Database, Actor: str, CompanyID: str, ApiKey: str, CompanyName: str | None, Provider: str | None,
                 TotalTokenLimit: int | None, Threshold: float | None, Pending: int | None) -> Result:
    now = stamp(now_ms())
    provider, threshold = Provider or "Gemini", Threshold or 0.8
    key = "" if Pending and not ApiKey else None if Pending else usable_key(ApiKey)
    faults = [text_fault(text) for text in (Actor, CompanyID, CompanyName, provider)]
    if any(faults) or not Actor or not CompanyID or key is None or not 0 < threshold <= 1:
        return Result([*OUTCOME, ("TokenID", T_BIGINT)], [["bad_value", "a value is missing or out of range", 0]])
    with db.transaction():
        token = db.run("INSERT INTO TokenMaster (CompanyID, CompanyName, ApiKey, Provider, TotalTokenLimit, Status,"
                       " CreatedAt, UpdatedAt) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?7)", CompanyID, CompanyName, key,
                       provider, TotalTokenLimit, "Disabled" if Pending else "Active", now).lastrowid
        assert token is not None
        db.run("INSERT INTO TokenUsageSummary (TokenID, TotalRemainingTokens, Threshold, LastUpdated)"
               " VALUES (?, ?, ?, ?)", token, TotalTokenLimit, threshold, now)
        audit(db, now, Actor, "token added", token, None, f"{describe(TotalTokenLimit, threshold)}, provider {provider}")
    return Result([*OUTCOME, ("TokenID", T_BIGINT)], [["ok", None, token]])


def usp_ActivateToken(db: Database, TokenID: int, ApiKey: str) -> Result:
    key = usable_key(ApiKey)
    if key is None:
        return outcome("bad_value", "an API key must have 1 to 1024 bytes, without spaces or characters beyond ASCII")
    with db.transaction():
        changed = db.run("UPDATE TokenMaster SET ApiKey = ?, Status = 'Active', UpdatedAt = ?"
                         " WHERE TokenID = ? AND ApiKey = '' AND Status = 'Disabled'", key, stamp(now_ms()), TokenID)
        if not changed.rowcount:
            return outcome("no_such_row", f"there is no token {TokenID} that waits for its key")
    return outcome()


def usp_ListTokenKeys(db: Database, AfterID: int, Rows: int) -> Result:
    with db.lock:
        rows = db.run("SELECT TokenID, IFNULL(ApiKey, '') FROM TokenMaster"
                      " WHERE TokenID > ? AND LENGTH(IFNULL(ApiKey, '')) <= 1024 ORDER BY TokenID LIMIT ?", AfterID, Rows)
        return Result([("TokenID", T_BIGINT), ("ApiKey", t_nvarchar(1024))], [list(row) for row in rows])


def usp_ResealToken(db: Database, Actor: str, TokenID: int, ApiKey: str, Expected: str | None) -> Result:
    now, key = stamp(now_ms()), usable_key(ApiKey)
    if key is None:
        return outcome("bad_value", "an API key must have 1 to 1024 bytes, without spaces or characters beyond ASCII")
    with db.transaction():
        if not db.run("UPDATE TokenMaster SET ApiKey = ?, UpdatedAt = ? WHERE TokenID = ? AND ApiKey = ?",
                      key, now, TokenID, Expected or "").rowcount:
            return outcome("no_such_row", f"there is no token {TokenID}, or its key is another by now")
        audit(db, now, Actor, "token key sealed", TokenID, None, None)
    return outcome()


def usp_SetTokenStatus(db: Database, Actor: str, TokenID: int, Status: str, Reason: str | None) -> Result:
    now = stamp(now_ms())
    if Status not in ("Active", "Expired", "Exceeded", "Disabled"):
        return outcome("bad_value", "a status must be Active, Expired, Exceeded or Disabled")
    for name, text in (("the actor's name", Actor), ("the reason", Reason)):
        if fault := text_fault(text):
            return outcome("bad_value", f"{name} {fault}")
    with db.transaction():
        old = db.one("SELECT Status FROM TokenMaster WHERE TokenID = ?", TokenID)
        if old is None:
            return outcome("no_such_row", f"there is no token {TokenID}")
        db.run("UPDATE TokenMaster SET Status = ?2, StatusReason = ?3, UpdatedAt = ?4,"
               " CooldownUntil = CASE WHEN ?2 = 'Active' THEN NULL ELSE CooldownUntil END WHERE TokenID = ?1",
               TokenID, Status, Reason, now)
        audit(db, now, Actor, "token status changed", TokenID, None,
              f"{old} to {Status}" + (f": {Reason}" if Reason is not None else ""))
    return outcome()


def usp_SetTokenKey(db: Database, Actor: str, TokenID: int, ApiKey: str) -> Result:
    now, key = stamp(now_ms()), usable_key(ApiKey)
    if key is None:
        return outcome("bad_value", "an API key must have 1 to 1024 bytes, without spaces or characters beyond ASCII")
    with db.transaction():
        if not db.run("UPDATE TokenMaster SET ApiKey = ?, UpdatedAt = ? WHERE TokenID = ?", key, now, TokenID).rowcount:
            return outcome("no_such_row", f"there is no token {TokenID}")
        audit(db, now, Actor, "token key changed", TokenID, None, None)
    return outcome()


def usp_SetTokenLimit(db: Database, Actor: str, TokenID: int, TotalTokenLimit: int | None,
                      Threshold: float | None) -> Result:
    now, Threshold = stamp(now_ms()), Threshold or None
    room = ("(TotalTokenLimit IS NULL OR TotalTokenLimit > (SELECT s.TotalUsedTokens FROM TokenUsageSummary s"
            " WHERE s.TokenID = TokenMaster.TokenID))")
    with db.transaction():
        before = db.one("SELECT Status FROM TokenMaster WHERE TokenID = ?", TokenID)
        if before is None:
            return outcome("no_such_row", f"there is no token {TokenID}")
        # the trigger of the schema does some of what follows, where the limit was raised
        db.run("UPDATE TokenMaster SET TotalTokenLimit = ?, UpdatedAt = ? WHERE TokenID = ?", TotalTokenLimit, now, TokenID)
        ensure_summary(db, TokenID, now)
        db.run("""UPDATE TokenUsageSummary
            SET TotalRemainingTokens = ?2 - TotalUsedTokens, Threshold = IFNULL(?3, Threshold),
                ThresholdCrossedAt = CASE WHEN TotalUsedTokens >= ?2
                                               OR CAST(TotalUsedTokens AS REAL) / ?2 >= IFNULL(?3, Threshold)
                                          THEN IFNULL(ThresholdCrossedAt, ?4) END,
                LastUpdated = ?4
            WHERE TokenID = ?1""", TokenID, TotalTokenLimit, Threshold, now)
        db.run("UPDATE TokenMaster SET Status = 'Active', StatusReason = NULL"
               f" WHERE TokenID = ? AND Status = 'Exceeded' AND {room}", TokenID)
        db.run("UPDATE TokenMaster SET Status = 'Exceeded', StatusReason = 'limit reached'"
               f" WHERE TokenID = ? AND Status = 'Active' AND NOT {room}", TokenID)
        after = db.one("SELECT Status FROM TokenMaster WHERE TokenID = ?", TokenID)
        audit(db, now, Actor, "token limit changed", TokenID, None,
              describe(TotalTokenLimit, Threshold) + (f", now {after}" if fold(after) != fold(before) else ""))
    return outcome()


# ---- client keys ----


def usp_FindClientKey(db: Database, KeyHash: str) -> Result:
    with db.lock:
        rows = db.run("SELECT ClientKeyID, CompanyID, IsAdmin FROM ClientKeys WHERE KeyHash = ? AND RevokedAt IS NULL", KeyHash)
        return Result([("ClientKeyID", t_nvarchar(64)), ("CompanyID", t_nvarchar(256)), ("IsAdmin", T_INT)],
                      [list(row) for row in rows])


def audit_client_key(db: Database, now: str, actor: str, action: str, key: str, detail: str | None) -> None:
    db.run("INSERT INTO AuditLog (Timestamp, Actor, Action, ObjectType, ObjectID, CompanyID, Detail)"
           " VALUES (?1, ?2, ?3, 'ClientKeys', ?4, (SELECT CompanyID FROM ClientKeys WHERE ClientKeyID = ?4), ?5)",
           now, actor, action, key, detail)


def usp_AddClientKey(db: Database, Actor: str, ClientKeyID: str, KeyHash: str, CompanyID: str | None,
                     Label: str | None) -> Result:
    now = stamp(now_ms())
    if not Actor or CompanyID == "" or any(text_fault(text) for text in (Actor, CompanyID, Label)):
        return outcome("bad_value", "a value is missing or out of range")
    if not re.fullmatch("[0-9a-f]{1,32}", ClientKeyID or "") or not re.fullmatch("[0-9a-f]{64}", KeyHash or ""):
        return outcome("bad_value", "an ID is 1 to 32 hexadecimal digits, a hash 64")
    with db.transaction():
        if db.row("SELECT 1 FROM ClientKeys WHERE ClientKeyID = ? OR KeyHash = ?", ClientKeyID, KeyHash):
            return outcome("bad_value", "there is such a client key already")
        db.run("INSERT INTO ClientKeys (ClientKeyID, KeyHash, CompanyID, IsAdmin, Label, CreatedAt)"
               " VALUES (?, ?, ?, ?, ?, ?)", ClientKeyID, KeyHash, CompanyID, int(CompanyID is None), Label, now)
        audit_client_key(db, now, Actor, "client key added", ClientKeyID, Label)
    return outcome()


def usp_RevokeClientKey(db: Database, Actor: str, ClientKeyID: str) -> Result:
    now = stamp(now_ms())
    with db.transaction():
        if db.row("SELECT 1 FROM ClientKeys WHERE ClientKeyID = ?", ClientKeyID) is None:
            return outcome("no_such_row", f"there is no client key {ClientKeyID}")
        if db.run("UPDATE ClientKeys SET RevokedAt = ? WHERE ClientKeyID = ? AND RevokedAt IS NULL", now, ClientKeyID).rowcount:
            audit_client_key(db, now, Actor, "client key revoked", ClientKeyID, None)
    return outcome()


# ---- reading ----

SUMS = """COUNT(*) AS Requests, SUM(RequestCount) AS RequestCount, SUM(InputTokens) AS InputTokens,
    SUM(OutputTokens) AS OutputTokens, SUM(TextPromptTokens) AS TextPromptTokens,
    SUM(ImagePromptTokens) AS ImagePromptTokens, SUM(TextCandidatesTokens) AS TextCandidatesTokens,
    SUM(ThoughtsTokens) AS ThoughtsTokens, SUM(CachedTokens) AS CachedTokens,
    SUM(TotalTokensUsed) AS TotalTokensUsed, SUM(UnknownCalls) AS UnknownCalls
    FROM (SELECT u.*, IFNULL(u.CompanyID, t.CompanyID) AS Company FROM TokenUsageLogs u
          LEFT JOIN TokenMaster t ON t.TokenID = u.TokenID)"""
BY = {
    "day": ("SUBSTR(LoggedAt, 1, 10) AS Day", "SUBSTR(LoggedAt, 1, 10)", "Day DESC"),
    "company": ("Company AS CompanyID", "fold(Company)", "TotalTokensUsed DESC, CompanyID"),
    "branch": ("Company AS CompanyID, Branch", "fold(Company), Branch", "TotalTokensUsed DESC, CompanyID, Branch"),
    "user": ("Company AS CompanyID, RequestedBy", "fold(Company), RequestedBy",
             "TotalTokensUsed DESC, CompanyID, RequestedBy"),
    "token": ("Company AS CompanyID, TokenID, TokenSource", "fold(Company), TokenID",
              "TotalTokensUsed DESC, CompanyID, TokenID"),
}
HEALTH = """COUNT(*) AS Count, SUM(TotalTokenLimit IS NULL) AS Unlimited, SUM(TotalTokenLimit) AS TotalTokenLimit,
    SUM(TotalUsedTokens) AS TotalUsedTokens, SUM(ReservedTokens) AS ReservedTokens,
    SUM(TotalRemainingTokens) AS TotalRemainingTokens,
    SUM(IFNULL(TotalUsedTokens >= Threshold * TotalTokenLimit, 0)) AS OverThreshold,
    SUM(IFNULL(to_ms(CooldownUntil) > to_ms(:Now), 0)) AS Cooling FROM vw_TokenStatus"""
COMPUTED = {"Requests": "INTEGER", "Count": "INTEGER", "Day": "TEXT", "TotalTokensUsed": "INTEGER",
            "Unlimited": "INTEGER", "OverThreshold": "INTEGER", "Cooling": "INTEGER"}


@dataclasses.dataclass
class View:
    select: str
    order: str
    id: str | None = None
    time: str | None = None
    company: str | None = "fold(CompanyID) = fold(:CompanyID)"  # the condition
    request: str | None = "RequestID"
    where: str = "1"
    group: str | None = None


def show(db: Database, view: View, f: dict[str, Any]) -> Result:
    """What the embedded store shows in the same view."""
    conditions, values = [view.where], {}
    for name, column, condition in (
            ("CompanyID", view.company, "{}"), ("RequestID", view.request, "{} = :RequestID"),
            ("Since", view.time, "to_ms({}) >= to_ms(:Since)"), ("Until", view.time, "to_ms({}) < to_ms(:Until)"),
            ("BeforeID", view.id, "{} < :BeforeID")):
        if f.get(name) is None:
            continue
        if column is None:
            continue  # as the T-SQL: the driver has refused it
        conditions.append(condition.format(column))
        values[name] = f[name]
    sql = f"{view.select} WHERE {' AND '.join(conditions)}" + (f" GROUP BY {view.group}" if view.group else "")
    sql += f" ORDER BY {view.order} LIMIT :Rows"
    with db.lock:
        cursor = db.db.execute(sql, values | {"Now": stamp(now_ms()), "Rows": -1 if f.get("Rows") is None else f["Rows"]})
        rows = [list(row) for row in cursor]
    names = [column[0] for column in cursor.description]
    types = [COMPUTED.get(name) or db.types.get(name, "TEXT") for name in names]
    return Result([(n, {"INTEGER": T_BIGINT, "REAL": T_FLOAT}.get(t, T_TEXT))
                   for n, t in zip(names, types, strict=True)], rows)


def usp_ListTokens(db: Database, **f: Any) -> Result:
    return show(db, View("SELECT * FROM vw_TokenStatus", "TokenID DESC", "TokenID", "CreatedAt", request=None), f)


def usp_CountTokens(db: Database, **f: Any) -> Result:
    return show(db, View(f"SELECT Status, {HEALTH}", "Status", request=None, group="Status"), f)


def usp_UsageReport(db: Database, By: str, **f: Any) -> Result:
    if By not in BY:
        raise ServerError(50001, "@By must be day, company, branch, user or token")
    names, group, order = BY[By]
    return show(db, View(f"SELECT {names}, {SUMS}", order, None, "LoggedAt", "fold(Company) = fold(:CompanyID)",
                         group=group), f)


def usp_ListLogs(db: Database, ErrorsOnly: int | None, **f: Any) -> Result:
    where = "LogLevel IN ('ERROR', 'CRITICAL')" if ErrorsOnly else "1"
    company = "RequestID IN (SELECT RequestID FROM TokenReservations WHERE fold(CompanyID) = fold(:CompanyID))"
    return show(db, View("SELECT * FROM ApplicationLogs", "LogID DESC", "LogID", "Timestamp", company, where=where), f)


def usp_ListRetries(db: Database, **f: Any) -> Result:
    return show(db, View("SELECT * FROM RetryAttempts", "RetryID DESC", "RetryID", "Timestamp"), f)


def usp_ListReservations(db: Database, UnsettledOnly: int | None, **f: Any) -> Result:
    if UnsettledOnly:
        select, where = "SELECT * FROM vw_UnsettledRequests", "1"
    else:
        select, where = "SELECT * FROM TokenReservations", "State IN ('open', 'unsettled') AND ClosedAt IS NULL"
    return show(db, View(select, "ReservationID DESC", "ReservationID", "CreatedAt", where=where), f)


def usp_ListAudit(db: Database, **f: Any) -> Result:
    return show(db, View("SELECT * FROM AuditLog", "AuditID DESC", "AuditID", "Timestamp"), f)


def usp_ListClientKeys(db: Database, **f: Any) -> Result:
    return show(db, View("SELECT ClientKeyID, CompanyID, IsAdmin, Label, CreatedAt, RevokedAt FROM ClientKeys",
                         "CreatedAt DESC, ClientKeyID", None, "CreatedAt", request=None), f)


def usp_SchemaVersion(db: Database) -> Result:
    with db.lock:
        row = db.row("SELECT Version, Major FROM SchemaVersion") if exists(db, "SchemaVersion") else None
    return Result([("Version", T_INT), ("Major", T_INT)], [list(row)] if row else [])


def usp_Ping(db: Database) -> Result:
    with db.lock:
        if not exists(db, "SchemaVersion"):
            raise ServerError(208, "Invalid object name 'dbo.SchemaVersion'.")
    return Result([("Ok", T_INT)], [[1]])


# ---- calling them ----

TEXT, INTEGER, REAL = "text", "integer", "real"
FILTER = {"CompanyID": TEXT, "RequestID": TEXT, "Since": TEXT, "Until": TEXT, "BeforeID": INTEGER, "Rows": INTEGER}


@dataclasses.dataclass(frozen=True)
class Procedure:
    work: Callable[..., Result | None]
    parameters: dict[str, str]
    optional: frozenset[str] = frozenset()


PROCEDURES = {
    p.work.__name__.lower(): p for p in (
        Procedure(usp_SchemaVersion, {}), Procedure(usp_Ping, {}), Procedure(usp_ExpireReservations, {}),
        Procedure(usp_AcquireTokens, {"Items": TEXT}), Procedure(usp_SettleUsage, {"Items": TEXT}),
        Procedure(usp_RecordLogs, {"Entries": TEXT, "Attempts": TEXT, "Again": INTEGER}, frozenset({"Again"})),
        Procedure(usp_AddToken, {"Actor": TEXT, "CompanyID": TEXT, "CompanyName": TEXT, "Provider": TEXT,
                                 "ApiKey": TEXT, "TotalTokenLimit": INTEGER, "Threshold": REAL, "Pending": INTEGER},
                  frozenset({"CompanyName", "Provider", "TotalTokenLimit", "Threshold", "Pending"})),
        Procedure(usp_ActivateToken, {"TokenID": INTEGER, "ApiKey": TEXT}),
        Procedure(usp_ListTokenKeys, {"AfterID": INTEGER, "Rows": INTEGER}),
        Procedure(usp_ResealToken, {"Actor": TEXT, "TokenID": INTEGER, "ApiKey": TEXT, "Expected": TEXT}),
        Procedure(usp_FindClientKey, {"KeyHash": TEXT}),
        Procedure(usp_AddClientKey, {"Actor": TEXT, "ClientKeyID": TEXT, "KeyHash": TEXT, "CompanyID": TEXT,
                                     "Label": TEXT}, frozenset({"CompanyID", "Label"})),
        Procedure(usp_RevokeClientKey, {"Actor": TEXT, "ClientKeyID": TEXT}),
        Procedure(usp_SetTokenStatus, {"Actor": TEXT, "TokenID": INTEGER, "Status": TEXT, "Reason": TEXT}),
        Procedure(usp_SetTokenKey, {"Actor": TEXT, "TokenID": INTEGER, "ApiKey": TEXT}),
        Procedure(usp_SetTokenLimit, {"Actor": TEXT, "TokenID": INTEGER, "TotalTokenLimit": INTEGER,
                                      "Threshold": REAL}),
        Procedure(usp_ListTokens, FILTER, frozenset(FILTER)), Procedure(usp_CountTokens, FILTER, frozenset(FILTER)),
        Procedure(usp_UsageReport, FILTER | {"By": TEXT}, frozenset(FILTER)),
        Procedure(usp_ListLogs, FILTER | {"ErrorsOnly": INTEGER}, frozenset(FILTER) | {"ErrorsOnly"}),
        Procedure(usp_ListRetries, FILTER, frozenset(FILTER)),
        Procedure(usp_ListReservations, FILTER | {"UnsettledOnly": INTEGER}, frozenset(FILTER) | {"UnsettledOnly"}),
        Procedure(usp_ListAudit, FILTER, frozenset(FILTER)), Procedure(usp_ListClientKeys, FILTER, frozenset(FILTER)),
    )}
KINDS: dict[str, tuple[type, ...]] = {TEXT: (str,), INTEGER: (int,), REAL: (int, float)}


def call(db: Database, name: str, arguments: list[tuple[str, Any]]) -> Result | None:
    """Runs a procedure as `EXECUTE name @a = …` would. arguments: names with their @."""
    bare = re.sub(r"^\[?dbo\]?\.", "", name, flags=re.I).strip("[]")
    procedure = PROCEDURES.get(bare.lower())
    if procedure is None or not db.has_procedure(bare):
        raise ServerError(2812, f"Could not find stored procedure '{name}'.", state=62)
    known = {p.lower(): p for p in procedure.parameters}
    if len(arguments) > len(known):
        raise ServerError(8144, f"Procedure or function {bare} has too many arguments specified.", state=2)
    values: dict[str, Any] = {}
    for given, value in arguments:
        parameter = known.get(given.removeprefix("@").lower())
        if parameter is None or not given.startswith("@"):
            raise ServerError(8145, f"{given} is not a parameter for procedure {bare}.")
        if value is not None and not isinstance(value, KINDS[procedure.parameters[parameter]]):
            raise ServerError(8114, f"Error converting data type {type(value).__name__} of {given}.")
        values[parameter] = value
    for parameter in known.values():
        if parameter in values:
            continue
        if parameter not in procedure.optional:
            raise ServerError(201, f"Procedure or function '{bare}' expects parameter '@{parameter}',"
                                   " which was not supplied.", state=4)
        values[parameter] = None
    return procedure.work(db, **values)
