-- setup_sqlite.sql: the embedded store of extract-fcgi, all of it.
--
-- extract-fcgi and extractctl run this text themselves (it is compiled in), in one transaction, when
-- the database is missing or older. Every statement may be run again and then changes nothing that
-- is there: by hand, `sqlite3 store.db < setup_sqlite.sql`. An older database is theirs to upgrade
-- (`extractctl migrate`): they first add the columns that its tables lack, which SQLite's SQL cannot
-- do twice.
--
-- All times are UTC, ISO 8601 with milliseconds: 2026-11-22T12:13:21.123Z. Rows written by hand may
-- also say 2026-11-22 12:13:21. CompanyID, Status and Provider compare without regard to case.
--
-- Always true, and worth a query after any change by hand:
--   TokenUsageSummary.TotalUsedTokens = sum of TokenUsageMonthly + sum of TokenUsageLogs, per token
--   TokenUsageSummary.ReservedTokens  = sum of EstimatedTokens of its 'open' TokenReservations

-- The version of this schema: one row. Version grows with every change; Major only with one that
-- older programs cannot work with, and they refuse to.
CREATE TABLE IF NOT EXISTS SchemaVersion (
    SchemaVersionID INTEGER PRIMARY KEY CHECK (SchemaVersionID = 1),
    Version         INTEGER NOT NULL,
    Major           INTEGER NOT NULL,
    AppliedAt       TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
);

-- The API keys of each company. To add one by hand, CompanyID and ApiKey are enough.
-- Status is Active, Expired, Exceeded or Disabled; anything else counts as Disabled. Provider NULL,
-- '', Google and Gemini are served. TotalTokenLimit NULL: no limit.
CREATE TABLE IF NOT EXISTS TokenMaster (
    TokenID         INTEGER PRIMARY KEY AUTOINCREMENT,
    CompanyID       TEXT NOT NULL COLLATE NOCASE,
    CompanyName     TEXT,
    ApiKey          TEXT NOT NULL,
    Provider        TEXT COLLATE NOCASE DEFAULT 'Gemini',
    TotalTokenLimit INTEGER,
    Status          TEXT NOT NULL COLLATE NOCASE DEFAULT 'Active',
    CreatedAt       TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    CooldownUntil   TEXT, -- not used before this time
    StatusReason    TEXT, -- why it has this status or cools down
    UpdatedAt       TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
);
-- Finds a company's Active tokens.
CREATE INDEX IF NOT EXISTS IX_TokenMaster_CompanyID_Status ON TokenMaster (CompanyID, Status);
-- Newest tokens first.
CREATE INDEX IF NOT EXISTS IX_TokenMaster_CreatedAt ON TokenMaster (CreatedAt);

-- What was used: one row for each request and token, summed over all its answers (RequestCount).
-- Never more than one: RequestID and TokenID are unique together, a NULL TokenID (the fallback key)
-- counting as one value. CachedTokens are part of InputTokens, ThoughtsTokens of TotalTokensUsed.
CREATE TABLE IF NOT EXISTS TokenUsageLogs (
    UsageID              INTEGER PRIMARY KEY AUTOINCREMENT,
    TokenID              INTEGER REFERENCES TokenMaster (TokenID),
    Branch               TEXT,
    RequestedBy          TEXT,
    InputTokens          INTEGER NOT NULL DEFAULT 0,
    OutputTokens         INTEGER NOT NULL DEFAULT 0,
    TextPromptTokens     INTEGER NOT NULL DEFAULT 0,
    ImagePromptTokens    INTEGER NOT NULL DEFAULT 0,
    TextCandidatesTokens INTEGER NOT NULL DEFAULT 0,
    TotalTokensUsed      INTEGER NOT NULL DEFAULT 0,
    RequestCount         INTEGER NOT NULL DEFAULT 1,
    LoggedAt             TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    RequestID            TEXT,
    CompanyID            TEXT COLLATE NOCASE,
    ClientKeyID          TEXT,
    TokenSource          TEXT DEFAULT 'store', -- 'store' or 'fallback'
    ThoughtsTokens       INTEGER NOT NULL DEFAULT 0,
    CachedTokens         INTEGER NOT NULL DEFAULT 0,
    UnknownCalls         INTEGER NOT NULL DEFAULT 0, -- calls that may have been billed besides
    Model                TEXT,
    DurationMs           INTEGER,
    TraceID              TEXT -- of the trace (W3C traceparent) that the client named; NULL: none
);
CREATE INDEX IF NOT EXISTS IX_TokenUsageLogs_TokenID ON TokenUsageLogs (TokenID);
CREATE INDEX IF NOT EXISTS IX_TokenUsageLogs_LoggedAt ON TokenUsageLogs (LoggedAt);
CREATE INDEX IF NOT EXISTS IX_TokenUsageLogs_Branch ON TokenUsageLogs (Branch);
-- What makes settling a request twice count once.
CREATE UNIQUE INDEX IF NOT EXISTS UX_TokenUsageLogs_RequestID_TokenID
    ON TokenUsageLogs (RequestID, IFNULL(TokenID, 0))
    WHERE RequestID IS NOT NULL;

-- The running totals of each token: one row, made when the token is first used.
-- TotalRemainingTokens = limit - used, NULL without a limit. ReservedTokens: what requests in flight
-- may still use. Threshold: the share of the limit at which one warning is logged.
CREATE TABLE IF NOT EXISTS TokenUsageSummary (
    SummaryID            INTEGER PRIMARY KEY AUTOINCREMENT,
    TokenID              INTEGER NOT NULL REFERENCES TokenMaster (TokenID) ON DELETE CASCADE,
    TotalUsedTokens      INTEGER NOT NULL DEFAULT 0,
    TotalRemainingTokens INTEGER,
    Threshold            REAL NOT NULL DEFAULT 0.8,
    LastUpdated          TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    ReservedTokens       INTEGER NOT NULL DEFAULT 0,
    ThresholdCrossedAt   TEXT -- when the warning was logged
);
CREATE UNIQUE INDEX IF NOT EXISTS UX_TokenUsageSummary_TokenID ON TokenUsageSummary (TokenID);

-- What remains follows the limit, whoever changes it; and raising it (or taking it away) makes an
-- Exceeded token with room again Active. `extractctl token set-limit` does this, and more: it also
-- looks at the threshold, and keeps a record in AuditLog.
DROP TRIGGER IF EXISTS TR_TokenMaster_TotalTokenLimit;
CREATE TRIGGER TR_TokenMaster_TotalTokenLimit
AFTER UPDATE OF TotalTokenLimit ON TokenMaster
WHEN NEW.TotalTokenLimit IS NOT OLD.TotalTokenLimit
BEGIN
    UPDATE TokenUsageSummary
    SET TotalRemainingTokens = NEW.TotalTokenLimit - TotalUsedTokens
    WHERE TokenID = NEW.TokenID;

    UPDATE TokenMaster
    SET Status = 'Active',
        StatusReason = NULL
    WHERE TokenID = NEW.TokenID
      AND Status = 'Exceeded'
      AND (NEW.TotalTokenLimit IS NULL
           OR (NEW.TotalTokenLimit > OLD.TotalTokenLimit
               AND NEW.TotalTokenLimit >
                   IFNULL((SELECT s.TotalUsedTokens FROM TokenUsageSummary s
                           WHERE s.TokenID = NEW.TokenID),
                          (SELECT IFNULL(SUM(u.TotalTokensUsed), 0) FROM TokenUsageLogs u
                           WHERE u.TokenID = NEW.TokenID)
                          + (SELECT IFNULL(SUM(m.TotalTokensUsed), 0) FROM TokenUsageMonthly m
                             WHERE IFNULL(m.TokenID, 0) = NEW.TokenID))));
END;

-- What retention has taken out of TokenUsageLogs, summed by token, company and month ('2026-11').
CREATE TABLE IF NOT EXISTS TokenUsageMonthly (
    MonthlyID            INTEGER PRIMARY KEY AUTOINCREMENT,
    TokenID              INTEGER REFERENCES TokenMaster (TokenID),
    CompanyID            TEXT COLLATE NOCASE,
    Month                TEXT NOT NULL,
    InputTokens          INTEGER NOT NULL DEFAULT 0,
    OutputTokens         INTEGER NOT NULL DEFAULT 0,
    TextPromptTokens     INTEGER NOT NULL DEFAULT 0,
    ImagePromptTokens    INTEGER NOT NULL DEFAULT 0,
    TextCandidatesTokens INTEGER NOT NULL DEFAULT 0,
    ThoughtsTokens       INTEGER NOT NULL DEFAULT 0,
    CachedTokens         INTEGER NOT NULL DEFAULT 0,
    TotalTokensUsed      INTEGER NOT NULL DEFAULT 0,
    RequestCount         INTEGER NOT NULL DEFAULT 0,
    UnknownCalls         INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX IF NOT EXISTS UX_TokenUsageMonthly_TokenID_CompanyID_Month
    ON TokenUsageMonthly (IFNULL(TokenID, 0), IFNULL(CompanyID, ''), Month);

-- A promise of tokens to a request in flight, written before Gemini is called.
-- State: 'open' while the request runs; then 'settled' (a usage row was written), 'released' (nothing
-- was spent) or 'unsettled' (the process died, or a call may have been billed and nobody knows how
-- much: to be reconciled by hand). ClosedAt stays NULL while open or unsettled. TokenID NULL: the
-- fallback key. A Sequence below 1: a settlement found no reservation, and left this row for it.
CREATE TABLE IF NOT EXISTS TokenReservations (
    ReservationID   INTEGER PRIMARY KEY AUTOINCREMENT,
    RequestID       TEXT NOT NULL,
    Sequence        INTEGER NOT NULL, -- 1 for the first token of the request
    TokenID         INTEGER REFERENCES TokenMaster (TokenID),
    CompanyID       TEXT NOT NULL COLLATE NOCASE,
    Branch          TEXT,
    RequestedBy     TEXT,
    EstimatedTokens INTEGER NOT NULL DEFAULT 0,
    State           TEXT NOT NULL DEFAULT 'open'
                    CHECK (State IN ('open', 'settled', 'released', 'unsettled')),
    UnknownCalls    INTEGER NOT NULL DEFAULT 0,
    TokenSource     TEXT NOT NULL DEFAULT 'store',
    Host            TEXT,
    ProcessID       INTEGER,
    CreatedAt       TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    ExpiresAt       TEXT NOT NULL, -- past this, an open one is that of a process that died
    ClosedAt        TEXT
);
-- What makes acquiring twice reserve once.
CREATE UNIQUE INDEX IF NOT EXISTS UX_TokenReservations_RequestID_Sequence
    ON TokenReservations (RequestID, Sequence);
-- Holds only those that are open or unsettled, so it stays small.
CREATE INDEX IF NOT EXISTS IX_TokenReservations_Pending
    ON TokenReservations (State, ExpiresAt)
    WHERE ClosedAt IS NULL;

-- What the programs logged. No API key, invoice content or file name is ever in it.
CREATE TABLE IF NOT EXISTS ApplicationLogs (
    LogID        INTEGER PRIMARY KEY AUTOINCREMENT,
    Timestamp    TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    LogLevel     TEXT NOT NULL, -- DEBUG, INFO, WARNING, ERROR, CRITICAL
    Logger       TEXT,          -- the module
    Message      TEXT,
    Exception    TEXT,          -- the whole chain of causes
    Module       TEXT,          -- the source file
    FunctionName TEXT,
    LineNumber   INTEGER,
    RequestID    TEXT,
    Host         TEXT,
    TraceID      TEXT           -- in the entry that ends a request, where its client named a trace
);
CREATE INDEX IF NOT EXISTS IX_ApplicationLogs_Timestamp ON ApplicationLogs (Timestamp);
CREATE INDEX IF NOT EXISTS IX_ApplicationLogs_LogLevel ON ApplicationLogs (LogLevel);
CREATE INDEX IF NOT EXISTS IX_ApplicationLogs_Logger ON ApplicationLogs (Logger);
-- All that one request left: support looks here first.
CREATE INDEX IF NOT EXISTS IX_ApplicationLogs_RequestID
    ON ApplicationLogs (RequestID)
    WHERE RequestID IS NOT NULL;
-- From a trace to its requests. Holds only the requests of those who send a traceparent.
CREATE INDEX IF NOT EXISTS IX_ApplicationLogs_TraceID
    ON ApplicationLogs (TraceID)
    WHERE TraceID IS NOT NULL;

-- Each call to Gemini that failed. TokenID is no foreign key: the record outlives the token.
CREATE TABLE IF NOT EXISTS RetryAttempts (
    RetryID      INTEGER PRIMARY KEY AUTOINCREMENT,
    TokenID      INTEGER,
    CompanyID    TEXT COLLATE NOCASE,
    Attempt      INTEGER NOT NULL, -- 1 for the first call of the request
    ErrorMessage TEXT,
    IsRetryable  INTEGER NOT NULL DEFAULT 0,
    Timestamp    TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    RequestID    TEXT,
    StatusCode   INTEGER, -- HTTP; NULL: no answer came
    DelayMs      INTEGER  -- the wait that followed
);
CREATE INDEX IF NOT EXISTS IX_RetryAttempts_TokenID ON RetryAttempts (TokenID);
CREATE INDEX IF NOT EXISTS IX_RetryAttempts_CompanyID ON RetryAttempts (CompanyID);
CREATE INDEX IF NOT EXISTS IX_RetryAttempts_Timestamp ON RetryAttempts (Timestamp);

-- The keys that clients show. Only their hashes are kept; a key itself is shown once, when made.
CREATE TABLE IF NOT EXISTS ClientKeys (
    ClientKeyID TEXT PRIMARY KEY,
    KeyHash     TEXT NOT NULL UNIQUE, -- SHA-256, hexadecimal
    CompanyID   TEXT COLLATE NOCASE,  -- NULL: an administrator's key
    IsAdmin     INTEGER NOT NULL DEFAULT 0 CHECK (IsAdmin IN (0, 1)),
    Label       TEXT,
    CreatedAt   TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    RevokedAt   TEXT,
    CHECK (IsAdmin = 1 OR CompanyID IS NOT NULL)
);

-- Idempotency-Key headers that were seen, and the request that each one belongs to.
CREATE TABLE IF NOT EXISTS IdempotencyKeys (
    CompanyID      TEXT NOT NULL COLLATE NOCASE,
    IdempotencyKey TEXT NOT NULL,
    RequestID      TEXT NOT NULL,
    State          TEXT NOT NULL DEFAULT 'in_progress' CHECK (State IN ('in_progress', 'done')),
    CreatedAt      TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    ExpiresAt      TEXT NOT NULL,
    PRIMARY KEY (CompanyID, IdempotencyKey)
);
CREATE INDEX IF NOT EXISTS IX_IdempotencyKeys_ExpiresAt ON IdempotencyKeys (ExpiresAt);
-- For companies whose names go beyond ASCII: these are compared one by one.
CREATE INDEX IF NOT EXISTS IX_IdempotencyKeys_IdempotencyKey ON IdempotencyKeys (IdempotencyKey);
CREATE INDEX IF NOT EXISTS IX_IdempotencyKeys_RequestID ON IdempotencyKeys (RequestID);

-- Who changed what, and when: administrators by extractctl, and the service itself
-- ('extract-fcgi') when it changes a token's status. Never a secret.
CREATE TABLE IF NOT EXISTS AuditLog (
    AuditID    INTEGER PRIMARY KEY AUTOINCREMENT,
    Timestamp  TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    Actor      TEXT NOT NULL,
    Action     TEXT NOT NULL, -- 'token added', 'token status changed', …
    ObjectType TEXT NOT NULL, -- the table
    ObjectID   TEXT,
    CompanyID  TEXT COLLATE NOCASE,
    RequestID  TEXT, -- where a request was the cause
    Detail     TEXT
);
CREATE INDEX IF NOT EXISTS IX_AuditLog_Timestamp ON AuditLog (Timestamp);

-- Each token with its limit and use; of the key only its end.
DROP VIEW IF EXISTS vw_TokenStatus;
CREATE VIEW vw_TokenStatus AS
SELECT t.TokenID,
       t.CompanyID,
       t.CompanyName,
       t.Provider,
       CASE WHEN t.ApiKey LIKE 'sealed:%' THEN 'sealed'
            WHEN LENGTH(t.ApiKey) >= 8 THEN '…' || SUBSTR(t.ApiKey, -4) ELSE '…' END AS ApiKey,
       t.Status,
       t.StatusReason,
       t.TotalTokenLimit,
       IFNULL(s.TotalUsedTokens, 0) AS TotalUsedTokens,
       t.TotalTokenLimit - IFNULL(s.TotalUsedTokens, 0) AS TotalRemainingTokens,
       IFNULL(s.ReservedTokens, 0) AS ReservedTokens,
       IFNULL(s.Threshold, 0.8) AS Threshold,
       s.ThresholdCrossedAt,
       t.CooldownUntil,
       t.CreatedAt,
       t.UpdatedAt,
       s.LastUpdated
FROM TokenMaster t
LEFT JOIN TokenUsageSummary s ON s.TokenID = t.TokenID;

-- What each company used with each token since the beginning, rolled-up months included.
DROP VIEW IF EXISTS vw_UsageSummary;
CREATE VIEW vw_UsageSummary AS
SELECT IFNULL(u.CompanyID, t.CompanyID) AS CompanyID,
       u.TokenID,
       SUM(u.RequestCount) AS RequestCount,
       SUM(u.InputTokens) AS InputTokens,
       SUM(u.OutputTokens) AS OutputTokens,
       SUM(u.ThoughtsTokens) AS ThoughtsTokens,
       SUM(u.CachedTokens) AS CachedTokens,
       SUM(u.TotalTokensUsed) AS TotalTokensUsed,
       SUM(u.UnknownCalls) AS UnknownCalls,
       MAX(u.LoggedAt) AS LastUsed
FROM (SELECT CompanyID, TokenID, RequestCount, InputTokens, OutputTokens, ThoughtsTokens,
             CachedTokens, TotalTokensUsed, UnknownCalls, LoggedAt
      FROM TokenUsageLogs
      UNION ALL
      SELECT CompanyID, TokenID, RequestCount, InputTokens, OutputTokens, ThoughtsTokens,
             CachedTokens, TotalTokensUsed, UnknownCalls, Month
      FROM TokenUsageMonthly) u
LEFT JOIN TokenMaster t ON t.TokenID = u.TokenID
GROUP BY IFNULL(u.CompanyID, t.CompanyID) COLLATE NOCASE, u.TokenID;

-- Errors of the last seven days, newest first.
DROP VIEW IF EXISTS vw_RecentErrors;
CREATE VIEW vw_RecentErrors AS
SELECT LogID, Timestamp, LogLevel, Logger, Message, Exception, Module, FunctionName, LineNumber,
       RequestID, Host, TraceID
FROM ApplicationLogs
WHERE LogLevel IN ('ERROR', 'CRITICAL')
  AND Timestamp >= strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-7 days')
ORDER BY LogID DESC;

-- Failed calls of requests that never got an answer from Gemini (they have no usage row).
DROP VIEW IF EXISTS vw_FailedRetries;
CREATE VIEW vw_FailedRetries AS
SELECT r.RetryID, r.TokenID, r.CompanyID, r.Attempt, r.ErrorMessage, r.IsRetryable, r.Timestamp,
       r.RequestID, r.StatusCode, r.DelayMs
FROM RetryAttempts r
WHERE NOT EXISTS (SELECT 1 FROM TokenUsageLogs u WHERE u.RequestID = r.RequestID)
ORDER BY r.RetryID DESC;

-- Requests that may have been billed without a usage row, for a DBA to reconcile with Google's bill.
DROP VIEW IF EXISTS vw_UnsettledRequests;
CREATE VIEW vw_UnsettledRequests AS
SELECT r.ReservationID, r.RequestID, r.Sequence, r.TokenID, r.CompanyID, r.Branch, r.RequestedBy,
       r.EstimatedTokens, r.State, r.UnknownCalls, r.TokenSource, r.Host, r.ProcessID, r.CreatedAt,
       r.ExpiresAt
FROM TokenReservations r
WHERE r.State = 'unsettled'
  AND r.ClosedAt IS NULL
ORDER BY r.ReservationID DESC;

-- Never takes a newer version down, and says nothing of a database whose tables lack a column yet.
INSERT INTO SchemaVersion (SchemaVersionID, Version, Major)
SELECT 1, 4, 1
WHERE EXISTS (SELECT 1 FROM pragma_table_info('TokenUsageLogs') WHERE name = 'TraceID')
  AND EXISTS (SELECT 1 FROM pragma_table_info('ApplicationLogs') WHERE name = 'TraceID')
ON CONFLICT (SchemaVersionID) DO UPDATE
    SET Version = excluded.Version,
        Major = excluded.Major,
        AppliedAt = excluded.AppliedAt
    WHERE excluded.Version > SchemaVersion.Version;
