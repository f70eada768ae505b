-- maintenance.sql: what keeps the database of extract-fcgi small, and the questions worth asking it.
--
-- Run it whole once a day, at a quiet hour (it may run beside the service at any time), or take single
-- parts of it. Part 1 deletes; all others only read. As an Agent job:
--
--     EXEC msdb.dbo.sp_add_job @job_name = N'extract-fcgi maintenance'
--     EXEC msdb.dbo.sp_add_jobstep @job_name = N'extract-fcgi maintenance', @step_name = N'run', @subsystem = N'CmdExec',
--          @command = N'sqlcmd -S localhost -d ExtractDB -E -b -I -i C:\extract-fcgi\maintenance.sql'
--     EXEC msdb.dbo.sp_add_schedule @schedule_name = N'extract-fcgi daily', @freq_type = 4, @freq_interval = 1, @active_start_time = 23000
--     EXEC msdb.dbo.sp_attach_schedule @job_name = N'extract-fcgi maintenance', @schedule_name = N'extract-fcgi daily'
--     EXEC msdb.dbo.sp_add_jobserver @job_name = N'extract-fcgi maintenance'
--
-- The SETs are needed: the Agent and sqlcmd run with QUOTED_IDENTIFIER OFF, and tables with filtered
-- indexes then take no change (error 1934).
SET ANSI_NULLS, ANSI_PADDING, ANSI_WARNINGS, ARITHABORT, CONCAT_NULL_YIELDS_NULL, QUOTED_IDENTIFIER ON
GO
SET NUMERIC_ROUNDABORT OFF
GO
SET NOCOUNT ON
GO
SET XACT_ABORT ON
GO

-- ---- 1. retention --------------------------------------------------------------------------

-- How long rows stay. Usage rows go into TokenUsageMonthly in the transaction that deletes them, so
-- no total changes; keep at least 35 days, for what an outbox may still replay. Small batches: no
-- lock escalation, a short log, and the service hardly notices.
DECLARE @usage_days INT = 400, @log_days INT = 90, @retry_days INT = 90, @reservation_days INT = 90, @audit_days INT = 1100
DECLARE @batch_rows INT = 2000 -- below 5000, where locks escalate to the table
DECLARE @now DATETIME2(3) = SYSUTCDATETIME(), @rows INT, @total INT, @lock INT
DECLARE @batch TABLE (ID BIGINT NOT NULL PRIMARY KEY)
DECLARE @sum TABLE (TokenID BIGINT NULL, CompanyID NVARCHAR(256) COLLATE Latin1_General_CI_AS NULL, Month NVARCHAR(7), InputTokens BIGINT,
                    OutputTokens BIGINT, TextPromptTokens BIGINT, ImagePromptTokens BIGINT, TextCandidatesTokens BIGINT,
                    ThoughtsTokens BIGINT, CachedTokens BIGINT, TotalTokensUsed BIGINT, RequestCount BIGINT, UnknownCalls BIGINT)

-- Two at once would roll the same rows up twice.
EXEC @lock = sp_getapplock @Resource = N'extract-fcgi retention', @LockMode = N'Exclusive', @LockOwner = N'Session', @LockTimeout = 0
IF @lock < 0
    THROW 50001, N'extract-fcgi: retention runs in another session', 1;

SET @total = 0
WHILE 1 = 1
BEGIN
    DELETE FROM @batch
    DELETE FROM @sum
    INSERT INTO @batch (ID)
    SELECT TOP (@batch_rows) UsageID FROM dbo.TokenUsageLogs WHERE LoggedAt < DATEADD(DAY, -@usage_days, @now) ORDER BY LoggedAt
    SET @rows = @@ROWCOUNT
    IF @rows = 0
        BREAK
    INSERT INTO @sum (TokenID, CompanyID, Month, InputTokens, OutputTokens, TextPromptTokens, ImagePromptTokens, TextCandidatesTokens,
                      ThoughtsTokens, CachedTokens, TotalTokensUsed, RequestCount, UnknownCalls)
    SELECT u.TokenID, ISNULL(u.CompanyID, t.CompanyID), CONVERT(NVARCHAR(7), u.LoggedAt, 126), ISNULL(SUM(u.InputTokens), 0),
           ISNULL(SUM(u.OutputTokens), 0), ISNULL(SUM(u.TextPromptTokens), 0), ISNULL(SUM(u.ImagePromptTokens), 0),
           ISNULL(SUM(u.TextCandidatesTokens), 0), ISNULL(SUM(u.ThoughtsTokens), 0), ISNULL(SUM(u.CachedTokens), 0),
           ISNULL(SUM(u.TotalTokensUsed), 0), ISNULL(SUM(u.RequestCount), 0), ISNULL(SUM(u.UnknownCalls), 0)
    FROM @batch b
    JOIN dbo.TokenUsageLogs u ON u.UsageID = b.ID
    LEFT JOIN dbo.TokenMaster t ON t.TokenID = u.TokenID
    GROUP BY u.TokenID, ISNULL(u.CompanyID, t.CompanyID), CONVERT(NVARCHAR(7), u.LoggedAt, 126)
    BEGIN TRANSACTION
    UPDATE m
    SET InputTokens = m.InputTokens + s.InputTokens,
        OutputTokens = m.OutputTokens + s.OutputTokens,
        TextPromptTokens = m.TextPromptTokens + s.TextPromptTokens,
        ImagePromptTokens = m.ImagePromptTokens + s.ImagePromptTokens,
        TextCandidatesTokens = m.TextCandidatesTokens + s.TextCandidatesTokens,
        ThoughtsTokens = m.ThoughtsTokens + s.ThoughtsTokens,
        CachedTokens = m.CachedTokens + s.CachedTokens,
        TotalTokensUsed = m.TotalTokensUsed + s.TotalTokensUsed,
        RequestCount = m.RequestCount + s.RequestCount,
        UnknownCalls = m.UnknownCalls + s.UnknownCalls
    FROM dbo.TokenUsageMonthly m
    JOIN @sum s ON s.Month = m.Month AND ISNULL(s.TokenID, 0) = ISNULL(m.TokenID, 0) AND ISNULL(s.CompanyID, N'') = ISNULL(m.CompanyID, N'')
    INSERT INTO dbo.TokenUsageMonthly (TokenID, CompanyID, Month, InputTokens, OutputTokens, TextPromptTokens, ImagePromptTokens,
                                       TextCandidatesTokens, ThoughtsTokens, CachedTokens, TotalTokensUsed, RequestCount, UnknownCalls)
    SELECT s.TokenID, s.CompanyID, s.Month, s.InputTokens, s.OutputTokens, s.TextPromptTokens, s.ImagePromptTokens,
           s.TextCandidatesTokens, s.ThoughtsTokens, s.CachedTokens, s.TotalTokensUsed, s.RequestCount, s.UnknownCalls
    FROM @sum s
    WHERE NOT EXISTS (SELECT 1 FROM dbo.TokenUsageMonthly m
                      WHERE s.Month = m.Month AND ISNULL(s.TokenID, 0) = ISNULL(m.TokenID, 0)
                        AND ISNULL(s.CompanyID, N'') = ISNULL(m.CompanyID, N''))
    DELETE FROM dbo.TokenUsageLogs WHERE UsageID IN (SELECT b.ID FROM @batch b)
    IF @@ROWCOUNT <> @rows
        THROW 50001, N'extract-fcgi: somebody else deletes usage rows, too; nothing was rolled up', 1;
    COMMIT TRANSACTION
    SET @total = @total + @rows
END
PRINT N'TokenUsageLogs: ' + CAST(@total AS NVARCHAR(20)) + N' row(s) rolled up into TokenUsageMonthly'

SET @total = 0
WHILE 1 = 1
BEGIN
    DELETE FROM dbo.ApplicationLogs
    WHERE LogID IN (SELECT TOP (@batch_rows) x.LogID FROM dbo.ApplicationLogs x
                    WHERE x.Timestamp < DATEADD(DAY, -@log_days, @now) ORDER BY x.Timestamp)
    SET @rows = @@ROWCOUNT
    SET @total = @total + @rows
    IF @rows = 0
        BREAK
END
PRINT N'ApplicationLogs: ' + CAST(@total AS NVARCHAR(20)) + N' row(s) deleted'

SET @total = 0
WHILE 1 = 1
BEGIN
    DELETE FROM dbo.RetryAttempts
    WHERE RetryID IN (SELECT TOP (@batch_rows) x.RetryID FROM dbo.RetryAttempts x
                      WHERE x.Timestamp < DATEADD(DAY, -@retry_days, @now) ORDER BY x.Timestamp)
    SET @rows = @@ROWCOUNT
    SET @total = @total + @rows
    IF @rows = 0
        BREAK
END
PRINT N'RetryAttempts: ' + CAST(@total AS NVARCHAR(20)) + N' row(s) deleted'

-- Closed ones only: what is unsettled stays until somebody has reconciled it.
SET @total = 0
WHILE 1 = 1
BEGIN
    DELETE FROM dbo.TokenReservations
    WHERE ReservationID IN (SELECT TOP (@batch_rows) x.ReservationID FROM dbo.TokenReservations x
                            WHERE x.ClosedAt < DATEADD(DAY, -@reservation_days, @now) ORDER BY x.ReservationID)
    SET @rows = @@ROWCOUNT
    SET @total = @total + @rows
    IF @rows = 0
        BREAK
END
PRINT N'TokenReservations: ' + CAST(@total AS NVARCHAR(20)) + N' row(s) deleted'

-- The service does this itself, once a minute: here is what is left where none runs.
SET @total = 0
WHILE 1 = 1
BEGIN
    DELETE FROM dbo.IdempotencyKeys
    WHERE RequestID IN (SELECT TOP (@batch_rows) x.RequestID FROM dbo.IdempotencyKeys x
                        WHERE x.ExpiresAt < @now ORDER BY x.ExpiresAt)
      AND ExpiresAt < @now
    SET @rows = @@ROWCOUNT
    SET @total = @total + @rows
    IF @rows = 0
        BREAK
END
PRINT N'IdempotencyKeys: ' + CAST(@total AS NVARCHAR(20)) + N' row(s) deleted'

DELETE FROM dbo.AuditLog WHERE Timestamp < DATEADD(DAY, -@audit_days, @now)
EXEC sp_releaseapplock @Resource = N'extract-fcgi retention', @LockOwner = N'Session'
GO

-- ---- 2. reconciliation: is what must always be true, true? ---------------------------------

-- No row means yes. On a busy server take it twice: a row that is there only once was in motion.
-- After a parallel run with the older service a difference is a usage row without its sum.
SELECT N'TotalUsedTokens' AS Wrong, s.TokenID, s.TotalUsedTokens AS IsNow,
       ISNULL(m.Tokens, 0) + ISNULL(u.Tokens, 0) AS ShouldBe
FROM dbo.TokenUsageSummary s
LEFT JOIN (SELECT TokenID, SUM(TotalTokensUsed) AS Tokens FROM dbo.TokenUsageMonthly GROUP BY TokenID) m ON m.TokenID = s.TokenID
LEFT JOIN (SELECT TokenID, SUM(TotalTokensUsed) AS Tokens FROM dbo.TokenUsageLogs GROUP BY TokenID) u ON u.TokenID = s.TokenID
WHERE s.TotalUsedTokens <> ISNULL(m.Tokens, 0) + ISNULL(u.Tokens, 0)
UNION ALL
SELECT N'ReservedTokens', s.TokenID, s.ReservedTokens, ISNULL(r.Tokens, 0)
FROM dbo.TokenUsageSummary s
LEFT JOIN (SELECT TokenID, SUM(EstimatedTokens) AS Tokens FROM dbo.TokenReservations
           WHERE State = N'open' AND ClosedAt IS NULL GROUP BY TokenID) r ON r.TokenID = s.TokenID
WHERE s.ReservedTokens <> ISNULL(r.Tokens, 0)
UNION ALL
SELECT N'TotalRemainingTokens', s.TokenID, s.TotalRemainingTokens, t.TotalTokenLimit - s.TotalUsedTokens
FROM dbo.TokenUsageSummary s
JOIN dbo.TokenMaster t ON t.TokenID = s.TokenID
WHERE ISNULL(s.TotalRemainingTokens, -1) <> ISNULL(t.TotalTokenLimit - s.TotalUsedTokens, -1)
GO
-- To mend one token's row (put its TokenID for 0): delete it. The next request makes it again, from
-- the rows; a Threshold other than 0.8 must be set again (usp_SetTokenLimit).
--     DELETE FROM dbo.TokenUsageSummary WHERE TokenID = 0

-- ---- 3. usage of each company and month ----------------------------------------------------

SELECT q.CompanyID, q.Month, SUM(q.RequestCount) AS RequestCount, SUM(q.TotalTokensUsed) AS TotalTokensUsed
FROM (SELECT ISNULL(u.CompanyID, t.CompanyID) AS CompanyID, CONVERT(NVARCHAR(7), u.LoggedAt, 126) AS Month, u.RequestCount, u.TotalTokensUsed
      FROM dbo.TokenUsageLogs u
      LEFT JOIN dbo.TokenMaster t ON t.TokenID = u.TokenID
      UNION ALL
      SELECT m.CompanyID, m.Month, m.RequestCount, m.TotalTokensUsed
      FROM dbo.TokenUsageMonthly m) q
GROUP BY q.CompanyID, q.Month
ORDER BY q.CompanyID, q.Month
GO

-- ---- 4. unsettled requests -----------------------------------------------------------------

-- Google may have billed these, and nobody knows how much. Compare with the bill of that key and day;
-- then close the row: State 'released' where nothing was billed; else usp_SettleUsage with the billed
-- tokens (README.md, "Unsettled requests").
SELECT ReservationID, RequestID, TokenID, CompanyID, Branch, RequestedBy, EstimatedTokens, UnknownCalls, Host, CreatedAt
FROM dbo.vw_UnsettledRequests
ORDER BY ReservationID
GO

-- ---- 5. slow and failing tokens ------------------------------------------------------------

-- Of the last day: calls that failed, and how long those that worked took.
SELECT t.TokenID, t.CompanyID, t.Status, t.StatusReason, t.CooldownUntil, f.Failed, f.RateLimited, u.Requests, u.AverageMs, u.SlowestMs
FROM dbo.TokenMaster t
LEFT JOIN (SELECT TokenID, COUNT(*) AS Failed, SUM(CASE WHEN StatusCode = 429 THEN 1 ELSE 0 END) AS RateLimited
           FROM dbo.RetryAttempts
           WHERE Timestamp >= DATEADD(DAY, -1, SYSUTCDATETIME())
           GROUP BY TokenID) f ON f.TokenID = t.TokenID
LEFT JOIN (SELECT TokenID, COUNT(*) AS Requests, AVG(DurationMs) AS AverageMs, MAX(DurationMs) AS SlowestMs
           FROM dbo.TokenUsageLogs
           WHERE LoggedAt >= DATEADD(DAY, -1, SYSUTCDATETIME())
           GROUP BY TokenID) u ON u.TokenID = t.TokenID
WHERE f.Failed IS NOT NULL OR u.Requests IS NOT NULL
ORDER BY f.Failed DESC, u.AverageMs DESC
GO

-- ---- 6. monitoring: each of these should be small, or empty --------------------------------

SELECT N'tokens that are not Active' AS Watch, COUNT(*) AS HowMany FROM dbo.TokenMaster WHERE Status <> N'Active'
UNION ALL
SELECT N'tokens past their threshold', COUNT(*) FROM dbo.vw_TokenStatus WHERE ThresholdCrossedAt IS NOT NULL AND Status = N'Active'
UNION ALL
SELECT N'tokens that cool down now', COUNT(*) FROM dbo.TokenMaster WHERE CooldownUntil > SYSUTCDATETIME()
UNION ALL
SELECT N'companies without an Active token', COUNT(*)
FROM (SELECT CompanyID FROM dbo.TokenMaster GROUP BY CompanyID HAVING SUM(CASE WHEN Status = N'Active' THEN 1 ELSE 0 END) = 0) q
UNION ALL
SELECT N'errors of the last hour', COUNT(*) FROM dbo.vw_RecentErrors WHERE Timestamp >= DATEADD(HOUR, -1, SYSUTCDATETIME())
UNION ALL
SELECT N'requests in flight', COUNT(*) FROM dbo.TokenReservations WHERE State = N'open' AND ClosedAt IS NULL
UNION ALL
SELECT N'reservations past their time', COUNT(*)
FROM dbo.TokenReservations
WHERE State = N'open' AND ClosedAt IS NULL AND ExpiresAt < DATEADD(MINUTE, -5, SYSUTCDATETIME())
UNION ALL
SELECT N'unsettled requests', COUNT(*) FROM dbo.vw_UnsettledRequests
UNION ALL
SELECT N'changes of tokens by the service itself, last day', COUNT(*)
FROM dbo.AuditLog
WHERE Actor = N'extract-fcgi' AND Timestamp >= DATEADD(DAY, -1, SYSUTCDATETIME())
GO
