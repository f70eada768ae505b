-- setup_database.sql: the SQL Server database of extract-fcgi, all of it.
--
-- For SQL Server 2016 SP1 or later and Azure SQL. Run it in the database that shall hold the tables,
-- as a member of db_owner, with sqlcmd, SSMS or tsql:
--
--     sqlcmd -S server -d database -b -I -i setup_database.sql
--
-- or let `extractctl migrate` run it: the same text is compiled in. It may be run again at any time:
-- it creates what is missing, replaces views, procedures and the trigger, and leaves every row as it
-- is. Over the five plain tables of the system before this one it is the upgrade: what it found there,
-- and what it did about it, is printed and stays in dbo.AuditLog (README.md, "Replacing the Python
-- service"). When all is well, the last that it prints is "schema version 6 is complete".
--
-- It comes in numbered steps, and each wants the one before done: a tool that goes on after an error
-- (SSMS, tsql, sqlcmd without -b) gets no further, and the version is noted by the last step only.
--
-- All times are UTC. Always true, and worth a query after any change by hand (maintenance.sql):
--   TokenUsageSummary.TotalUsedTokens = sum of TokenUsageMonthly + sum of TokenUsageLogs, per token
--   TokenUsageSummary.ReservedTokens  = sum of EstimatedTokens of its 'open' TokenReservations
--
-- Locks, for who writes another procedure: rows of TokenUsageSummary first, one by one in ascending
-- TokenID; then TokenReservations; then the logs; then IdempotencyKeys, by company and key; then
-- TokenMaster, in ascending TokenID. Reading TokenMaster by another way than its primary key and
-- holding a lock of it do not go together. The hints (INDEX, FORCESEEK, ROWLOCK) belong to that: on a
-- table of a few rows SQL Server would rather scan, and a scan asks for the locks of everybody.
-- TR_TokenMaster_TotalTokenLimit alone goes the other way, and says why that is safe.
--
-- Every view, procedure and trigger says "(schema 6)" in its first line: with a new version of this
-- script all of them change, and the last step looks for it.
--
-- The SETs are needed: tables with filtered indexes take no change from a session without them
-- (error 1934), and procedures remember those of their creation.
SET ANSI_NULLS, ANSI_PADDING, ANSI_WARNINGS, ARITHABORT, CONCAT_NULL_YIELDS_NULL, QUOTED_IDENTIFIER ON
GO
SET NUMERIC_ROUNDABORT OFF
GO
SET NOCOUNT ON
GO
SET XACT_ABORT ON
GO

-- ---- may it run here? ----------------------------------------------------------------------

-- Nothing has been changed when one of these says no. NOEXEC then keeps the rest from running in
-- tools that go on after an error. (Babelfish, which reports an older version, has what is needed.)
-- The session keeps the number of the last step that was done; older servers cannot, and are refused.
IF OBJECT_ID(N'sys.sp_set_session_context') IS NOT NULL
    EXEC sp_set_session_context N'extract-fcgi setup', NULL
DECLARE @no NVARCHAR(1000) = NULL
DECLARE @version NVARCHAR(50) = CAST(SERVERPROPERTY(N'ProductVersion') AS NVARCHAR(50))
DECLARE @major INT = CAST(LEFT(@version, CHARINDEX(N'.', @version) - 1) AS INT)
DECLARE @build INT = CAST(PARSENAME(@version, 2) AS INT)
DECLARE @azure INT = CASE WHEN CAST(SERVERPROPERTY(N'EngineEdition') AS INT) IN (5, 6, 8, 11, 12) THEN 1 ELSE 0 END
DECLARE @level INT = (SELECT CAST(compatibility_level AS INT) FROM sys.databases WHERE name = DB_NAME())
IF SERVERPROPERTY(N'BabelfishVersion') IS NULL
BEGIN
    IF DB_NAME() IN (N'master', N'model', N'msdb', N'tempdb')
        SET @no = N'this is the system database ' + DB_NAME() + N': choose the database first (sqlcmd -d, or USE)'
    ELSE IF @azure = 0 AND (@major < 13 OR (@major = 13 AND @build < 4001))
        SET @no = N'SQL Server 2016 SP1 (13.0.4001) or later is needed, this is ' + @version
    ELSE IF @level < 130
        SET @no = N'compatibility level 130 or above is needed (OPENJSON), this database has '
                + CAST(@level AS NVARCHAR(10)) + N'. Run: ALTER DATABASE ' + QUOTENAME(DB_NAME())
                + N' SET COMPATIBILITY_LEVEL = 130'
    ELSE IF CAST(DATABASEPROPERTYEX(DB_NAME(), N'Updateability') AS NVARCHAR(20)) <> N'READ_WRITE'
        SET @no = N'the database is read-only'
END
IF @no IS NULL
   AND EXISTS (SELECT 1 FROM INFORMATION_SCHEMA.TABLES
               WHERE TABLE_SCHEMA = N'dbo' AND TABLE_TYPE <> N'BASE TABLE'
                 AND TABLE_NAME IN (N'TokenMaster', N'TokenUsageLogs', N'TokenUsageSummary', N'ApplicationLogs', N'RetryAttempts'))
    SET @no = N'one of TokenMaster, TokenUsageLogs, TokenUsageSummary, ApplicationLogs, RetryAttempts is a view, not a table'
IF @no IS NOT NULL
BEGIN
    SET @no = N'extract-fcgi: ' + @no;
    THROW 50001, @no, 1;
END
EXEC sp_set_session_context N'extract-fcgi setup', 1
GO
IF @@ERROR <> 0 SET NOEXEC ON
GO

-- One session at a time: of ten processes that start at once, one sets up and nine find it done.
IF ISNULL(CAST(SESSION_CONTEXT(N'extract-fcgi setup') AS INT), 0) <> 1
    THROW 50001, N'extract-fcgi: the step before this one has failed', 1;
DECLARE @lock INT
EXEC @lock = sp_getapplock @Resource = N'extract-fcgi setup', @LockMode = N'Exclusive', @LockOwner = N'Session', @LockTimeout = 60000
IF @lock < 0
    THROW 50001, N'extract-fcgi: another session is setting the schema up, and has not ended within a minute', 1;
EXEC sp_set_session_context N'extract-fcgi setup', 2
GO
IF @@ERROR <> 0 SET NOEXEC ON
GO

-- ---- the tables of the system before this one ----------------------------------------------

-- Nobody knows their exact types, so they are looked at first: what cannot be handled is refused by
-- name, and only then are columns altered, all in one transaction. On a new database, and on one
-- that this script has set up before, there is nothing to do here.
IF ISNULL(CAST(SESSION_CONTEXT(N'extract-fcgi setup') AS INT), 0) <> 2
    THROW 50001, N'extract-fcgi: the step before this one has failed', 1;
DECLARE @want TABLE (
    n           INT IDENTITY(1, 1) PRIMARY KEY,
    TableName   NVARCHAR(128) NOT NULL,
    ColumnName  NVARCHAR(128) NOT NULL,
    Kind        NVARCHAR(10) NOT NULL, -- id, token, name (indexed), text, count, share, time, flag
    Size        INT NULL,              -- characters; -1: MAX
    MayBeNull   INT NOT NULL,          -- 1: this program writes NULL there
    Folded      INT NOT NULL           -- 1: compared without regard to case
)
INSERT INTO @want (TableName, ColumnName, Kind, Size, MayBeNull, Folded)
VALUES (N'TokenMaster', N'TokenID', N'id', NULL, 0, 0),
       (N'TokenMaster', N'CompanyID', N'name', 256, 0, 1),
       (N'TokenMaster', N'CompanyName', N'text', 256, 1, 0),
       (N'TokenMaster', N'ApiKey', N'text', 1024, 0, 0),
       (N'TokenMaster', N'Provider', N'text', 256, 1, 1),
       (N'TokenMaster', N'TotalTokenLimit', N'count', NULL, 1, 0),
       (N'TokenMaster', N'Status', N'name', 50, 0, 1),
       (N'TokenMaster', N'CreatedAt', N'time', NULL, 0, 0),
       (N'TokenUsageLogs', N'UsageID', N'id', NULL, 0, 0),
       (N'TokenUsageLogs', N'TokenID', N'token', NULL, 1, 0),
       (N'TokenUsageLogs', N'Branch', N'name', 256, 1, 0),
       (N'TokenUsageLogs', N'RequestedBy', N'text', 256, 1, 0),
       (N'TokenUsageLogs', N'InputTokens', N'count', NULL, 0, 0),
       (N'TokenUsageLogs', N'OutputTokens', N'count', NULL, 0, 0),
       (N'TokenUsageLogs', N'TextPromptTokens', N'count', NULL, 0, 0),
       (N'TokenUsageLogs', N'ImagePromptTokens', N'count', NULL, 0, 0),
       (N'TokenUsageLogs', N'TextCandidatesTokens', N'count', NULL, 0, 0),
       (N'TokenUsageLogs', N'TotalTokensUsed', N'count', NULL, 0, 0),
       (N'TokenUsageLogs', N'RequestCount', N'count', NULL, 0, 0),
       (N'TokenUsageLogs', N'LoggedAt', N'time', NULL, 0, 0),
       (N'TokenUsageSummary', N'SummaryID', N'id', NULL, 0, 0),
       (N'TokenUsageSummary', N'TokenID', N'token', NULL, 0, 0),
       (N'TokenUsageSummary', N'TotalUsedTokens', N'count', NULL, 0, 0),
       (N'TokenUsageSummary', N'TotalRemainingTokens', N'count', NULL, 1, 0),
       (N'TokenUsageSummary', N'Threshold', N'share', NULL, 0, 0),
       (N'TokenUsageSummary', N'LastUpdated', N'time', NULL, 0, 0),
       (N'ApplicationLogs', N'LogID', N'id', NULL, 0, 0),
       (N'ApplicationLogs', N'Timestamp', N'time', NULL, 0, 0),
       (N'ApplicationLogs', N'LogLevel', N'name', 20, 0, 0),
       (N'ApplicationLogs', N'Logger', N'name', 256, 1, 0),
       (N'ApplicationLogs', N'Message', N'text', -1, 1, 0),
       (N'ApplicationLogs', N'Exception', N'text', -1, 1, 0),
       (N'ApplicationLogs', N'Module', N'text', 256, 1, 0),
       (N'ApplicationLogs', N'FunctionName', N'text', 256, 1, 0),
       (N'ApplicationLogs', N'LineNumber', N'count', NULL, 1, 0),
       (N'RetryAttempts', N'RetryID', N'id', NULL, 0, 0),
       (N'RetryAttempts', N'TokenID', N'token', NULL, 1, 0),
       (N'RetryAttempts', N'CompanyID', N'name', 256, 1, 1),
       (N'RetryAttempts', N'Attempt', N'count', NULL, 0, 0),
       (N'RetryAttempts', N'ErrorMessage', N'text', 4000, 1, 0),
       (N'RetryAttempts', N'IsRetryable', N'flag', NULL, 0, 0),
       (N'RetryAttempts', N'Timestamp', N'time', NULL, 0, 0)

DECLARE @babelfish INT = CASE WHEN SERVERPROPERTY(N'BabelfishVersion') IS NULL THEN 0 ELSE 1 END
DECLARE @plan TABLE (n INT IDENTITY(1, 1) PRIMARY KEY, Phase INT NOT NULL, Statement NVARCHAR(MAX) NOT NULL)
DECLARE @altered TABLE (TableName NVARCHAR(128) NOT NULL, ColumnName NVARCHAR(128) NOT NULL)
DECLARE @refusals NVARCHAR(2000) = N''
DECLARE @n INT = 0, @last INT = (SELECT MAX(n) FROM @want), @sql NVARCHAR(MAX), @longest BIGINT
DECLARE @table NVARCHAR(128), @column NVARCHAR(128), @kind NVARCHAR(10), @size INT, @may_be_null INT, @folded INT
DECLARE @is NVARCHAR(128), @is_size INT, @is_null INT, @scale INT, @collation NVARCHAR(128)
DECLARE @token_type NVARCHAR(128), @type NVARCHAR(200), @place NVARCHAR(300), @old INT

-- Was it this script that made them? Then their types are right. (DATABASE_DEFAULT: the catalog may have
-- a collation of its own, as in Azure SQL and in contained databases.)
SET @old = CASE WHEN OBJECT_ID(N'dbo.SchemaVersion', N'U') IS NOT NULL THEN 0
                WHEN EXISTS (SELECT 1 FROM INFORMATION_SCHEMA.TABLES t
                             WHERE t.TABLE_SCHEMA = N'dbo'
                               AND t.TABLE_NAME COLLATE DATABASE_DEFAULT IN (SELECT w.TableName FROM @want w)) THEN 1
                ELSE 0 END
SET @token_type = ISNULL((SELECT DATA_TYPE FROM INFORMATION_SCHEMA.COLUMNS
                          WHERE TABLE_SCHEMA = N'dbo' AND TABLE_NAME = N'TokenMaster' AND COLUMN_NAME = N'TokenID'), N'bigint')

WHILE @old = 1 AND @n < @last
BEGIN
    SET @n = @n + 1
    SELECT @table = TableName, @column = ColumnName, @kind = Kind, @size = Size, @may_be_null = MayBeNull,
           @folded = Folded, @place = TableName + N'.' + ColumnName
    FROM @want
    WHERE n = @n
    SET @is = NULL
    SELECT @is = DATA_TYPE, @is_size = CHARACTER_MAXIMUM_LENGTH, @scale = NUMERIC_SCALE, @collation = COLLATION_NAME,
           @is_null = CASE WHEN IS_NULLABLE = N'YES' THEN 1 ELSE 0 END
    FROM INFORMATION_SCHEMA.COLUMNS
    WHERE TABLE_SCHEMA = N'dbo' AND TABLE_NAME = @table AND COLUMN_NAME = @column
    IF @is IS NULL
    BEGIN
        -- A missing column is added later. Not so these, without which the rows make no sense.
        IF OBJECT_ID(N'dbo.' + @table) IS NOT NULL
           AND (@kind IN (N'id', N'token') OR @place IN (N'TokenMaster.CompanyID', N'TokenMaster.ApiKey', N'TokenMaster.Status'))
            SET @refusals = @refusals + N' ' + @place + N' is missing;'
        CONTINUE
    END
    IF @is_size > 1000000000
        SET @is_size = -1

    -- 1. Can it be handled?
    IF COLUMNPROPERTY(OBJECT_ID(N'dbo.' + @table), @column, N'IsComputed') = 1
    BEGIN
        SET @refusals = @refusals + N' ' + @place + N' is a computed column;'
        CONTINUE
    END
    IF (@kind IN (N'id', N'token') AND @is NOT IN (N'int', N'bigint', N'smallint'))
       OR (@kind IN (N'name', N'text') AND @is NOT IN (N'char', N'varchar', N'nchar', N'nvarchar', N'text', N'ntext'))
       OR (@kind = N'count' AND @is NOT IN (N'tinyint', N'smallint', N'int', N'bigint')
           AND NOT (@is IN (N'decimal', N'numeric') AND @scale = 0))
       OR (@kind = N'share' AND @is NOT IN (N'float', N'real', N'decimal', N'numeric', N'tinyint', N'smallint', N'int', N'bigint'))
       OR (@kind = N'time' AND @is NOT IN (N'datetime', N'smalldatetime', N'datetime2'))
       OR (@kind = N'flag' AND @is NOT IN (N'bit', N'tinyint', N'smallint', N'int', N'bigint'))
    BEGIN
        SET @refusals = @refusals + N' ' + @place + N' is ' + UPPER(@is) + N';'
        CONTINUE
    END
    IF @kind = N'id' AND ISNULL(COLUMNPROPERTY(OBJECT_ID(N'dbo.' + @table), @column, N'IsIdentity'), 0) = 0
    BEGIN
        SET @refusals = @refusals + N' ' + @place + N' is no IDENTITY column;'
        CONTINUE
    END
    IF @kind = N'name' AND (@is_size > @size OR @is_size = -1)
    BEGIN
        SET @sql = N'SELECT @longest = MAX(LEN(CAST(' + QUOTENAME(@column) + N' AS NVARCHAR(MAX)))) FROM dbo.' + QUOTENAME(@table)
        SET @longest = 0
        EXEC sp_executesql @sql, N'@longest BIGINT OUTPUT', @longest = @longest OUTPUT
        IF @longest > @size
        BEGIN
            SET @refusals = @refusals + N' ' + @place + N' has values of more than ' + CAST(@size AS NVARCHAR(10)) + N' characters;'
            CONTINUE
        END
    END

    -- 2. The type that it shall have.
    SET @type = NULL
    IF @kind = N'name'
    BEGIN
        IF @is <> N'nvarchar' OR @is_size <> @size
           OR (@folded = 1 AND @babelfish = 0 AND @collation <> N'Latin1_General_CI_AS')
            SET @type = N'NVARCHAR(' + CAST(@size AS NVARCHAR(10)) + N')'
    END
    ELSE IF @kind = N'text'
    BEGIN
        IF @is IN (N'text', N'ntext') OR @is_size = -1 OR @size = -1 OR @is_size > 4000
        BEGIN
            IF @is <> N'nvarchar' OR @is_size <> -1
                SET @type = N'NVARCHAR(MAX)'
        END
        ELSE IF @is <> N'nvarchar' OR @is_size < @size
                OR (@folded = 1 AND @babelfish = 0 AND @collation <> N'Latin1_General_CI_AS')
            SET @type = N'NVARCHAR(' + CAST(CASE WHEN @is_size > @size THEN @is_size ELSE @size END AS NVARCHAR(10)) + N')'
    END
    ELSE IF @kind = N'token' AND @is <> @token_type
        SET @type = UPPER(@token_type)
    ELSE IF @kind = N'count' AND @is <> N'bigint'
        SET @type = N'BIGINT'
    ELSE IF @kind = N'share' AND @is <> N'float'
        SET @type = N'FLOAT'
    ELSE IF @kind = N'time' AND (@is <> N'datetime2'
            OR (SELECT DATETIME_PRECISION FROM INFORMATION_SCHEMA.COLUMNS
                WHERE TABLE_SCHEMA = N'dbo' AND TABLE_NAME = @table AND COLUMN_NAME = @column) <> 3)
        SET @type = N'DATETIME2(3)'
    IF @type IS NULL AND @may_be_null = 1 AND @is_null = 0
        SET @type = CASE WHEN @kind IN (N'name', N'text')
                         THEN N'NVARCHAR(' + CASE WHEN @is_size = -1 THEN N'MAX' ELSE CAST(@is_size AS NVARCHAR(10)) END + N')'
                         WHEN @kind = N'token' THEN UPPER(@token_type)
                         ELSE N'BIGINT' END
    IF @type IS NULL
        CONTINUE
    INSERT INTO @altered (TableName, ColumnName) VALUES (@table, @column)

    -- 3. The statement. Without NULL or NOT NULL SQL Server would make it nullable; Babelfish takes
    -- neither, nor a collation, and keeps what is there. What CHAR has filled up with spaces loses them.
    IF @babelfish = 1
    BEGIN
        IF @may_be_null = 1 AND @is_null = 0
            SET @refusals = @refusals + N' ' + @place + N' is NOT NULL, and Babelfish cannot change that;'
        INSERT INTO @plan (Phase, Statement)
        VALUES (5, N'ALTER TABLE dbo.' + QUOTENAME(@table) + N' ALTER COLUMN ' + QUOTENAME(@column) + N' ' + @type)
    END
    ELSE
    BEGIN
        IF @is IN (N'text', N'ntext') -- have no way to other types but by these
            INSERT INTO @plan (Phase, Statement)
            VALUES (5, N'ALTER TABLE dbo.' + QUOTENAME(@table) + N' ALTER COLUMN ' + QUOTENAME(@column)
                       + CASE WHEN @is = N'text' THEN N' VARCHAR(MAX)' ELSE N' NVARCHAR(MAX)' END
                       + CASE WHEN @is_null = 1 THEN N' NULL' ELSE N' NOT NULL' END)
        INSERT INTO @plan (Phase, Statement)
        VALUES (5, N'ALTER TABLE dbo.' + QUOTENAME(@table) + N' ALTER COLUMN ' + QUOTENAME(@column) + N' ' + @type
                   + CASE WHEN @folded = 1 THEN N' COLLATE Latin1_General_CI_AS' ELSE N'' END
                   + CASE WHEN @is_null = 1 OR @may_be_null = 1 THEN N' NULL' ELSE N' NOT NULL' END)
    END
    IF @is IN (N'char', N'nchar')
        INSERT INTO @plan (Phase, Statement)
        VALUES (6, N'UPDATE dbo.' + QUOTENAME(@table) + N' SET ' + QUOTENAME(@column) + N' = RTRIM(' + QUOTENAME(@column) + N')')
END

-- Columns that this program does not know, and could not leave out.
SELECT @refusals = @refusals + N' ' + c.TABLE_NAME + N'.' + c.COLUMN_NAME + N' is unknown, NOT NULL and has no default;'
FROM INFORMATION_SCHEMA.COLUMNS c
WHERE @old = 1
  AND c.TABLE_SCHEMA = N'dbo'
  AND c.TABLE_NAME COLLATE DATABASE_DEFAULT IN (SELECT w.TableName FROM @want w)
  AND c.COLUMN_NAME COLLATE DATABASE_DEFAULT NOT IN (SELECT w.ColumnName FROM @want w WHERE w.TableName = c.TABLE_NAME COLLATE DATABASE_DEFAULT)
  AND c.COLUMN_NAME NOT IN (N'RequestID', N'CompanyID', N'UpdatedAt', N'ReservedTokens', N'TokenSource',
                            N'ThoughtsTokens', N'CachedTokens', N'UnknownCalls')
  AND c.IS_NULLABLE = N'NO'
  AND c.COLUMN_DEFAULT IS NULL
  AND c.DATA_TYPE <> N'timestamp'
  AND ISNULL(COLUMNPROPERTY(OBJECT_ID(N'dbo.' + c.TABLE_NAME), c.COLUMN_NAME, N'IsComputed'), 0) = 0
  AND ISNULL(COLUMNPROPERTY(OBJECT_ID(N'dbo.' + c.TABLE_NAME), c.COLUMN_NAME, N'IsIdentity'), 0) = 0

IF @refusals <> N''
BEGIN
    SET @refusals = N'extract-fcgi: these tables cannot be upgraded, and nothing was changed:' + @refusals;
    THROW 50001, @refusals, 1;
END

-- What stands in the way of ALTER COLUMN on SQL Server is dropped and made again: default and check
-- constraints, indexes, foreign keys. Statistics that somebody made by hand do not come back: the server
-- makes those that it needs. (PostgreSQL, under Babelfish, sees to that itself.)
IF @old = 1 AND @babelfish = 0
BEGIN
    INSERT INTO @plan (Phase, Statement)
    SELECT 1, N'ALTER TABLE dbo.' + QUOTENAME(OBJECT_NAME(k.parent_object_id)) + N' DROP CONSTRAINT ' + QUOTENAME(k.name)
    FROM sys.foreign_keys k
    WHERE EXISTS (SELECT 1 FROM sys.foreign_key_columns x
                  JOIN @altered a ON x.parent_object_id = OBJECT_ID(N'dbo.' + a.TableName)
                                 AND COL_NAME(x.parent_object_id, x.parent_column_id) = a.ColumnName
                  WHERE x.constraint_object_id = k.object_id)

    INSERT INTO @plan (Phase, Statement)
    SELECT 2, N'ALTER TABLE dbo.' + QUOTENAME(a.TableName) + N' DROP CONSTRAINT ' + QUOTENAME(d.name) COLLATE DATABASE_DEFAULT
    FROM @altered a
    JOIN sys.default_constraints d ON d.parent_object_id = OBJECT_ID(N'dbo.' + a.TableName)
                                  AND COL_NAME(d.parent_object_id, d.parent_column_id) = a.ColumnName
    -- Times get a new default below, in UTC.
    INSERT INTO @plan (Phase, Statement)
    SELECT 6, N'ALTER TABLE dbo.' + QUOTENAME(a.TableName) + N' ADD CONSTRAINT ' + QUOTENAME(d.name) COLLATE DATABASE_DEFAULT
              + N' DEFAULT ' + d.definition COLLATE DATABASE_DEFAULT + N' FOR ' + QUOTENAME(a.ColumnName)
    FROM @altered a
    JOIN @want w ON w.TableName = a.TableName AND w.ColumnName = a.ColumnName
    JOIN sys.default_constraints d ON d.parent_object_id = OBJECT_ID(N'dbo.' + a.TableName)
                                  AND COL_NAME(d.parent_object_id, d.parent_column_id) = a.ColumnName
    WHERE w.Kind NOT IN (N'time', N'share')

    INSERT INTO @plan (Phase, Statement)
    SELECT DISTINCT 3, N'ALTER TABLE dbo.' + QUOTENAME(OBJECT_NAME(c.parent_object_id)) + N' DROP CONSTRAINT ' + QUOTENAME(c.name)
    FROM sys.check_constraints c
    WHERE c.parent_object_id IN (SELECT OBJECT_ID(N'dbo.' + a.TableName) FROM @altered a)
    INSERT INTO @plan (Phase, Statement)
    SELECT DISTINCT 7, N'ALTER TABLE dbo.' + QUOTENAME(OBJECT_NAME(c.parent_object_id)) + N' WITH NOCHECK ADD CONSTRAINT '
                       + QUOTENAME(c.name) + N' CHECK ' + c.definition
    FROM sys.check_constraints c
    WHERE c.parent_object_id IN (SELECT OBJECT_ID(N'dbo.' + a.TableName) FROM @altered a)

    INSERT INTO @plan (Phase, Statement)
    SELECT DISTINCT 4, N'DROP STATISTICS dbo.' + QUOTENAME(OBJECT_NAME(x.object_id)) + N'.' + QUOTENAME(x.name)
    FROM sys.stats x
    JOIN sys.stats_columns c ON c.object_id = x.object_id AND c.stats_id = x.stats_id
    WHERE x.user_created = 1
      AND EXISTS (SELECT 1 FROM @altered a
                  WHERE x.object_id = OBJECT_ID(N'dbo.' + a.TableName) AND COL_NAME(c.object_id, c.column_id) = a.ColumnName)

    -- Indexes, unique constraints too (they come back as unique indexes). Primary keys are on columns
    -- that keep their type. An index that says what one of ours says does not come back.
    DECLARE @index TABLE (n INT IDENTITY(1, 1) PRIMARY KEY, TableName NVARCHAR(128), ObjectID INT, IndexID INT,
                          IndexName NVARCHAR(128), IsConstraint INT, IsUnique INT, Kind NVARCHAR(20), Filter NVARCHAR(MAX), Ours INT)
    DECLARE @keys NVARCHAR(MAX), @included NVARCHAR(MAX), @i INT, @from INT = 1, @to INT
    INSERT INTO @index (TableName, ObjectID, IndexID, IndexName, IsConstraint, IsUnique, Kind, Filter, Ours)
    SELECT OBJECT_NAME(x.object_id), x.object_id, x.index_id, x.name, x.is_unique_constraint, x.is_unique, x.type_desc, x.filter_definition, 0
    FROM sys.indexes x
    WHERE x.is_primary_key = 0
      AND x.type IN (1, 2)
      AND EXISTS (SELECT 1 FROM sys.index_columns ic
                  JOIN @altered a ON ic.object_id = OBJECT_ID(N'dbo.' + a.TableName)
                                 AND COL_NAME(ic.object_id, ic.column_id) = a.ColumnName
                  WHERE ic.object_id = x.object_id AND ic.index_id = x.index_id)
    SET @to = (SELECT MAX(n) FROM @index)
    WHILE @from <= @to
    BEGIN
        SET @keys = N''
        SET @included = N''
        SET @i = 0
        WHILE 1 = 1 -- the key's columns, in their order
        BEGIN
            SET @i = @i + 1
            SET @column = NULL
            SELECT @column = COL_NAME(ic.object_id, ic.column_id), @is_null = CAST(ic.is_descending_key AS INT)
            FROM sys.index_columns ic
            JOIN @index x ON x.ObjectID = ic.object_id AND x.IndexID = ic.index_id
            WHERE x.n = @from AND ic.key_ordinal = @i
            IF @column IS NULL
                BREAK
            SET @keys = @keys + CASE WHEN @i = 1 THEN N'' ELSE N', ' END + QUOTENAME(@column)
                      + CASE WHEN @is_null = 1 THEN N' DESC' ELSE N'' END
        END
        SELECT @included = @included + CASE WHEN @included = N'' THEN N'' ELSE N', ' END + QUOTENAME(COL_NAME(ic.object_id, ic.column_id))
        FROM sys.index_columns ic
        JOIN @index x ON x.ObjectID = ic.object_id AND x.IndexID = ic.index_id
        WHERE x.n = @from AND ic.is_included_column = 1
        INSERT INTO @plan (Phase, Statement)
        SELECT 4, CASE WHEN IsConstraint = 1 THEN N'ALTER TABLE dbo.' + QUOTENAME(TableName) + N' DROP CONSTRAINT ' + QUOTENAME(IndexName)
                       ELSE N'DROP INDEX ' + QUOTENAME(IndexName) + N' ON dbo.' + QUOTENAME(TableName) END
        FROM @index
        WHERE n = @from
        INSERT INTO @plan (Phase, Statement)
        SELECT 8, N'CREATE ' + CASE WHEN IsUnique = 1 THEN N'UNIQUE ' ELSE N'' END + Kind + N' INDEX ' + QUOTENAME(IndexName)
                  + N' ON dbo.' + QUOTENAME(TableName) + N' (' + @keys + N')'
                  + CASE WHEN @included = N'' THEN N'' ELSE N' INCLUDE (' + @included + N')' END
                  + CASE WHEN Filter IS NULL THEN N'' ELSE N' WHERE ' + Filter END
        FROM @index
        WHERE n = @from
          AND NOT (IsUnique = 0 AND Kind = N'NONCLUSTERED' AND Filter IS NULL AND @included = N''
                   AND TableName + N' ' + @keys IN (
                       N'TokenMaster [CompanyID], [Status]', N'TokenMaster [CreatedAt]', N'TokenUsageLogs [TokenID]',
                       N'TokenUsageLogs [LoggedAt]', N'TokenUsageLogs [Branch]', N'ApplicationLogs [Timestamp]',
                       N'ApplicationLogs [LogLevel]', N'ApplicationLogs [Logger]', N'RetryAttempts [TokenID]',
                       N'RetryAttempts [CompanyID]', N'RetryAttempts [Timestamp]'))
        SET @from = @from + 1
    END
END

-- A time's default in local time would now be two kinds of time in one column.
IF @old = 1 AND @babelfish = 0
    INSERT INTO @plan (Phase, Statement)
    SELECT 2, N'ALTER TABLE dbo.' + QUOTENAME(w.TableName) + N' DROP CONSTRAINT ' + QUOTENAME(d.name) COLLATE DATABASE_DEFAULT
    FROM @want w
    JOIN sys.default_constraints d ON d.parent_object_id = OBJECT_ID(N'dbo.' + w.TableName)
                                  AND COL_NAME(d.parent_object_id, d.parent_column_id) = w.ColumnName
    WHERE w.Kind IN (N'time', N'share')
      AND NOT EXISTS (SELECT 1 FROM @altered a WHERE a.TableName = w.TableName AND a.ColumnName = w.ColumnName)
IF @old = 1 AND @babelfish = 0
    INSERT INTO @plan (Phase, Statement)
    SELECT 6, N'ALTER TABLE dbo.' + QUOTENAME(c.TABLE_NAME) + N' ADD CONSTRAINT ' + QUOTENAME(N'DF_' + c.TABLE_NAME + N'_' + c.COLUMN_NAME)
              + N' DEFAULT ' + CASE WHEN w.Kind = N'time' THEN N'(SYSUTCDATETIME())' ELSE N'(0.8)' END + N' FOR ' + QUOTENAME(c.COLUMN_NAME)
    FROM @want w
    JOIN INFORMATION_SCHEMA.COLUMNS c ON c.TABLE_SCHEMA = N'dbo' AND c.TABLE_NAME COLLATE DATABASE_DEFAULT = w.TableName
                                     AND c.COLUMN_NAME COLLATE DATABASE_DEFAULT = w.ColumnName
    WHERE w.Kind IN (N'time', N'share')

IF @old = 1
BEGIN
    PRINT N'extract-fcgi: tables of the system before this one: upgrading them'
    BEGIN TRANSACTION
    DECLARE @phase INT = 1
    WHILE @phase <= 8
    BEGIN
        SET @n = 0
        WHILE 1 = 1
        BEGIN
            SET @n = (SELECT MIN(p.n) FROM @plan p WHERE p.Phase = @phase AND p.n > @n)
            IF @n IS NULL
                BREAK
            SET @sql = (SELECT p.Statement FROM @plan p WHERE p.n = @n)
            PRINT @sql
            EXEC (@sql)
        END
        SET @phase = @phase + 1
    END
    COMMIT TRANSACTION
END
EXEC sp_set_session_context N'extract-fcgi setup', 3
GO
IF @@ERROR <> 0 SET NOEXEC ON
GO

-- ---- tables --------------------------------------------------------------------------------

IF ISNULL(CAST(SESSION_CONTEXT(N'extract-fcgi setup') AS INT), 0) <> 3
    THROW 50001, N'extract-fcgi: the step before this one has failed', 1;

-- The API keys of each company. To add one by hand, CompanyID and ApiKey are enough.
-- Status is Active, Expired, Exceeded or Disabled; anything else counts as Disabled. Provider NULL,
-- '', Google and Gemini are served. TotalTokenLimit NULL: no limit. CooldownUntil: not used before
-- that time. StatusReason: why it has its status, or cools down.
IF OBJECT_ID(N'dbo.TokenMaster', N'U') IS NULL
    CREATE TABLE dbo.TokenMaster (
        TokenID         BIGINT IDENTITY(1, 1) NOT NULL,
        CompanyID       NVARCHAR(256) COLLATE Latin1_General_CI_AS NOT NULL,
        CompanyName     NVARCHAR(256) NULL,
        ApiKey          NVARCHAR(1024) NOT NULL,
        Provider        NVARCHAR(256) COLLATE Latin1_General_CI_AS NULL CONSTRAINT DF_TokenMaster_Provider DEFAULT (N'Gemini'),
        TotalTokenLimit BIGINT NULL,
        Status          NVARCHAR(50) COLLATE Latin1_General_CI_AS NOT NULL CONSTRAINT DF_TokenMaster_Status DEFAULT (N'Active'),
        CreatedAt       DATETIME2(3) NOT NULL CONSTRAINT DF_TokenMaster_CreatedAt DEFAULT (SYSUTCDATETIME()),
        CooldownUntil   DATETIME2(3) NULL,
        StatusReason    NVARCHAR(1000) NULL,
        UpdatedAt       DATETIME2(3) NOT NULL CONSTRAINT DF_TokenMaster_UpdatedAt DEFAULT (SYSUTCDATETIME()),
        CONSTRAINT PK_TokenMaster PRIMARY KEY CLUSTERED (TokenID)
    )

-- What was used: one row for each request and token, summed over all its answers (RequestCount).
-- Never more than one: RequestID and TokenID are unique together, a NULL TokenID (the fallback key)
-- counting as one value. CachedTokens are part of InputTokens, ThoughtsTokens of TotalTokensUsed.
-- TokenSource: 'store' or 'fallback'. UnknownCalls: calls that may have been billed besides.
-- TraceID: of the trace (W3C traceparent) that the client named. Rows without a RequestID are those of
-- the system before this one.
IF OBJECT_ID(N'dbo.TokenUsageLogs', N'U') IS NULL
    CREATE TABLE dbo.TokenUsageLogs (
        UsageID              BIGINT IDENTITY(1, 1) NOT NULL,
        TokenID              BIGINT NULL,
        Branch               NVARCHAR(256) NULL,
        RequestedBy          NVARCHAR(256) NULL,
        InputTokens          BIGINT NOT NULL CONSTRAINT DF_TokenUsageLogs_InputTokens DEFAULT (0),
        OutputTokens         BIGINT NOT NULL CONSTRAINT DF_TokenUsageLogs_OutputTokens DEFAULT (0),
        TextPromptTokens     BIGINT NOT NULL CONSTRAINT DF_TokenUsageLogs_TextPromptTokens DEFAULT (0),
        ImagePromptTokens    BIGINT NOT NULL CONSTRAINT DF_TokenUsageLogs_ImagePromptTokens DEFAULT (0),
        TextCandidatesTokens BIGINT NOT NULL CONSTRAINT DF_TokenUsageLogs_TextCandidatesTokens DEFAULT (0),
        TotalTokensUsed      BIGINT NOT NULL CONSTRAINT DF_TokenUsageLogs_TotalTokensUsed DEFAULT (0),
        RequestCount         BIGINT NOT NULL CONSTRAINT DF_TokenUsageLogs_RequestCount DEFAULT (1),
        LoggedAt             DATETIME2(3) NOT NULL CONSTRAINT DF_TokenUsageLogs_LoggedAt DEFAULT (SYSUTCDATETIME()),
        RequestID            NVARCHAR(64) NULL,
        CompanyID            NVARCHAR(256) COLLATE Latin1_General_CI_AS NULL,
        ClientKeyID          NVARCHAR(64) NULL,
        TokenSource          NVARCHAR(20) NULL CONSTRAINT DF_TokenUsageLogs_TokenSource DEFAULT (N'store'),
        ThoughtsTokens       BIGINT NOT NULL CONSTRAINT DF_TokenUsageLogs_ThoughtsTokens DEFAULT (0),
        CachedTokens         BIGINT NOT NULL CONSTRAINT DF_TokenUsageLogs_CachedTokens DEFAULT (0),
        UnknownCalls         BIGINT NOT NULL CONSTRAINT DF_TokenUsageLogs_UnknownCalls DEFAULT (0),
        Model                NVARCHAR(256) NULL,
        DurationMs           BIGINT NULL,
        TraceID              NVARCHAR(32) NULL,
        CONSTRAINT PK_TokenUsageLogs PRIMARY KEY CLUSTERED (UsageID)
    )

-- The running totals of each token: one row, made when the token is first used.
-- TotalRemainingTokens = limit - used, NULL without a limit. ReservedTokens: what requests in flight
-- may still use. Threshold: the share of the limit at which one warning is logged, at
-- ThresholdCrossedAt.
IF OBJECT_ID(N'dbo.TokenUsageSummary', N'U') IS NULL
    CREATE TABLE dbo.TokenUsageSummary (
        SummaryID            BIGINT IDENTITY(1, 1) NOT NULL,
        TokenID              BIGINT NOT NULL,
        TotalUsedTokens      BIGINT NOT NULL CONSTRAINT DF_TokenUsageSummary_TotalUsedTokens DEFAULT (0),
        TotalRemainingTokens BIGINT NULL,
        Threshold            FLOAT NOT NULL CONSTRAINT DF_TokenUsageSummary_Threshold DEFAULT (0.8),
        LastUpdated          DATETIME2(3) NOT NULL CONSTRAINT DF_TokenUsageSummary_LastUpdated DEFAULT (SYSUTCDATETIME()),
        ReservedTokens       BIGINT NOT NULL CONSTRAINT DF_TokenUsageSummary_ReservedTokens DEFAULT (0),
        ThresholdCrossedAt   DATETIME2(3) NULL,
        CONSTRAINT PK_TokenUsageSummary PRIMARY KEY CLUSTERED (SummaryID)
    )

-- What the programs logged. No API key, invoice content or file name is ever in it. LogLevel: DEBUG,
-- INFO, WARNING, ERROR, CRITICAL. Logger: the module. Module: the source file. Exception: the whole
-- chain of causes. TraceID: in the entry that ends a request, where its client named a trace.
IF OBJECT_ID(N'dbo.ApplicationLogs', N'U') IS NULL
    CREATE TABLE dbo.ApplicationLogs (
        LogID        BIGINT IDENTITY(1, 1) NOT NULL,
        Timestamp    DATETIME2(3) NOT NULL CONSTRAINT DF_ApplicationLogs_Timestamp DEFAULT (SYSUTCDATETIME()),
        LogLevel     NVARCHAR(20) NOT NULL,
        Logger       NVARCHAR(256) NULL,
        Message      NVARCHAR(MAX) NULL,
        Exception    NVARCHAR(MAX) NULL,
        Module       NVARCHAR(256) NULL,
        FunctionName NVARCHAR(256) NULL,
        LineNumber   BIGINT NULL,
        RequestID    NVARCHAR(64) NULL,
        Host         NVARCHAR(256) NULL,
        TraceID      NVARCHAR(32) NULL,
        CONSTRAINT PK_ApplicationLogs PRIMARY KEY CLUSTERED (LogID)
    )

-- Each call to Gemini that failed. TokenID is no foreign key: the record outlives the token.
-- Attempt: 1 for the first call of the request. StatusCode: HTTP; NULL: no answer came. DelayMs: the
-- wait that followed.
IF OBJECT_ID(N'dbo.RetryAttempts', N'U') IS NULL
    CREATE TABLE dbo.RetryAttempts (
        RetryID      BIGINT IDENTITY(1, 1) NOT NULL,
        TokenID      BIGINT NULL,
        CompanyID    NVARCHAR(256) COLLATE Latin1_General_CI_AS NULL,
        Attempt      BIGINT NOT NULL,
        ErrorMessage NVARCHAR(4000) NULL,
        IsRetryable  BIT NOT NULL CONSTRAINT DF_RetryAttempts_IsRetryable DEFAULT (0),
        Timestamp    DATETIME2(3) NOT NULL CONSTRAINT DF_RetryAttempts_Timestamp DEFAULT (SYSUTCDATETIME()),
        RequestID    NVARCHAR(64) NULL,
        StatusCode   INT NULL,
        DelayMs      BIGINT NULL,
        CONSTRAINT PK_RetryAttempts PRIMARY KEY CLUSTERED (RetryID)
    )

-- What retention has taken out of TokenUsageLogs, summed by token, company and month ('2026-11').
-- Month 'opening': what a token had used before its rows were kept here.
IF OBJECT_ID(N'dbo.TokenUsageMonthly', N'U') IS NULL
    CREATE TABLE dbo.TokenUsageMonthly (
        MonthlyID            BIGINT IDENTITY(1, 1) NOT NULL,
        TokenID              BIGINT NULL,
        CompanyID            NVARCHAR(256) COLLATE Latin1_General_CI_AS NULL,
        Month                NVARCHAR(7) NOT NULL,
        InputTokens          BIGINT NOT NULL CONSTRAINT DF_TokenUsageMonthly_InputTokens DEFAULT (0),
        OutputTokens         BIGINT NOT NULL CONSTRAINT DF_TokenUsageMonthly_OutputTokens DEFAULT (0),
        TextPromptTokens     BIGINT NOT NULL CONSTRAINT DF_TokenUsageMonthly_TextPromptTokens DEFAULT (0),
        ImagePromptTokens    BIGINT NOT NULL CONSTRAINT DF_TokenUsageMonthly_ImagePromptTokens DEFAULT (0),
        TextCandidatesTokens BIGINT NOT NULL CONSTRAINT DF_TokenUsageMonthly_TextCandidatesTokens DEFAULT (0),
        ThoughtsTokens       BIGINT NOT NULL CONSTRAINT DF_TokenUsageMonthly_ThoughtsTokens DEFAULT (0),
        CachedTokens         BIGINT NOT NULL CONSTRAINT DF_TokenUsageMonthly_CachedTokens DEFAULT (0),
        TotalTokensUsed      BIGINT NOT NULL CONSTRAINT DF_TokenUsageMonthly_TotalTokensUsed DEFAULT (0),
        RequestCount         BIGINT NOT NULL CONSTRAINT DF_TokenUsageMonthly_RequestCount DEFAULT (0),
        UnknownCalls         BIGINT NOT NULL CONSTRAINT DF_TokenUsageMonthly_UnknownCalls DEFAULT (0),
        CONSTRAINT PK_TokenUsageMonthly PRIMARY KEY CLUSTERED (MonthlyID)
    )

-- A promise of tokens to a request in flight, written before Gemini is called.
-- State: 'open' while the request runs; then 'settled' (a usage row was written), 'released' (nothing
-- was spent) or 'unsettled' (the process died, or a call may have been billed and nobody knows how
-- much: to be reconciled by hand). ClosedAt stays NULL while open or unsettled. TokenID NULL: the
-- fallback key. Sequence: 1 for the first token of the request; below 1: a settlement found no
-- reservation, and left this row for it. ExpiresAt: past this, an open one is that of a process that
-- died.
IF OBJECT_ID(N'dbo.TokenReservations', N'U') IS NULL
    CREATE TABLE dbo.TokenReservations (
        ReservationID   BIGINT IDENTITY(1, 1) NOT NULL,
        RequestID       NVARCHAR(64) NOT NULL,
        Sequence        INT NOT NULL,
        TokenID         BIGINT NULL,
        CompanyID       NVARCHAR(256) COLLATE Latin1_General_CI_AS NOT NULL,
        Branch          NVARCHAR(256) NULL,
        RequestedBy     NVARCHAR(256) NULL,
        EstimatedTokens BIGINT NOT NULL CONSTRAINT DF_TokenReservations_EstimatedTokens DEFAULT (0),
        State           NVARCHAR(10) NOT NULL CONSTRAINT DF_TokenReservations_State DEFAULT (N'open'),
        UnknownCalls    BIGINT NOT NULL CONSTRAINT DF_TokenReservations_UnknownCalls DEFAULT (0),
        TokenSource     NVARCHAR(20) NOT NULL CONSTRAINT DF_TokenReservations_TokenSource DEFAULT (N'store'),
        Host            NVARCHAR(256) NULL,
        ProcessID       INT NULL,
        CreatedAt       DATETIME2(3) NOT NULL CONSTRAINT DF_TokenReservations_CreatedAt DEFAULT (SYSUTCDATETIME()),
        ExpiresAt       DATETIME2(3) NOT NULL,
        ClosedAt        DATETIME2(3) NULL,
        CONSTRAINT PK_TokenReservations PRIMARY KEY CLUSTERED (ReservationID),
        CONSTRAINT CK_TokenReservations_State CHECK (State IN (N'open', N'settled', N'released', N'unsettled'))
    )

-- The keys that clients show. Only their hashes are kept (SHA-256, hexadecimal); a key itself is
-- shown once, when made. CompanyID NULL: an administrator's key.
IF OBJECT_ID(N'dbo.ClientKeys', N'U') IS NULL
    CREATE TABLE dbo.ClientKeys (
        ClientKeyID NVARCHAR(64) NOT NULL,
        KeyHash     NVARCHAR(64) NOT NULL,
        CompanyID   NVARCHAR(256) COLLATE Latin1_General_CI_AS NULL,
        IsAdmin     BIT NOT NULL CONSTRAINT DF_ClientKeys_IsAdmin DEFAULT (0),
        Label       NVARCHAR(256) NULL,
        CreatedAt   DATETIME2(3) NOT NULL CONSTRAINT DF_ClientKeys_CreatedAt DEFAULT (SYSUTCDATETIME()),
        RevokedAt   DATETIME2(3) NULL,
        CONSTRAINT PK_ClientKeys PRIMARY KEY CLUSTERED (ClientKeyID),
        CONSTRAINT UQ_ClientKeys_KeyHash UNIQUE (KeyHash),
        CONSTRAINT CK_ClientKeys_CompanyID CHECK (IsAdmin = 1 OR CompanyID IS NOT NULL)
    )

-- Idempotency-Key headers that were seen, and the request that each one belongs to, for 24 hours.
-- State: 'in_progress' or 'done'. CompanyID: as the company's newest token spells it.
IF OBJECT_ID(N'dbo.IdempotencyKeys', N'U') IS NULL
    CREATE TABLE dbo.IdempotencyKeys (
        CompanyID      NVARCHAR(256) COLLATE Latin1_General_CI_AS NOT NULL,
        IdempotencyKey NVARCHAR(128) COLLATE Latin1_General_BIN2 NOT NULL,
        RequestID      NVARCHAR(64) NOT NULL,
        State          NVARCHAR(20) NOT NULL CONSTRAINT DF_IdempotencyKeys_State DEFAULT (N'in_progress'),
        CreatedAt      DATETIME2(3) NOT NULL CONSTRAINT DF_IdempotencyKeys_CreatedAt DEFAULT (SYSUTCDATETIME()),
        ExpiresAt      DATETIME2(3) NOT NULL,
        CONSTRAINT PK_IdempotencyKeys PRIMARY KEY CLUSTERED (CompanyID, IdempotencyKey),
        CONSTRAINT CK_IdempotencyKeys_State CHECK (State IN (N'in_progress', N'done'))
    )

-- Who changed what, and when: administrators by extractctl, the service itself ('extract-fcgi') when
-- it changes a token's status, and this script when it upgrades. Never a secret.
-- Action: 'token added', 'token status changed', ... ObjectType: the table. ObjectID: its key.
-- RequestID: where a request was the cause.
IF OBJECT_ID(N'dbo.AuditLog', N'U') IS NULL
    CREATE TABLE dbo.AuditLog (
        AuditID    BIGINT IDENTITY(1, 1) NOT NULL,
        Timestamp  DATETIME2(3) NOT NULL CONSTRAINT DF_AuditLog_Timestamp DEFAULT (SYSUTCDATETIME()),
        Actor      NVARCHAR(256) NOT NULL,
        Action     NVARCHAR(100) NOT NULL,
        ObjectType NVARCHAR(100) NOT NULL,
        ObjectID   NVARCHAR(100) NULL,
        CompanyID  NVARCHAR(256) COLLATE Latin1_General_CI_AS NULL,
        RequestID  NVARCHAR(64) NULL,
        Detail     NVARCHAR(2000) NULL,
        CONSTRAINT PK_AuditLog PRIMARY KEY CLUSTERED (AuditID)
    )
EXEC sp_set_session_context N'extract-fcgi setup', 4
GO
IF @@ERROR <> 0 SET NOEXEC ON
GO

-- Columns that older tables lack: nullable or with a default, so that the service before this one
-- can go on writing. And TokenID has the same type everywhere: that of TokenMaster.
IF ISNULL(CAST(SESSION_CONTEXT(N'extract-fcgi setup') AS INT), 0) <> 4
    THROW 50001, N'extract-fcgi: the step before this one has failed', 1;
DECLARE @add TABLE (n INT IDENTITY(1, 1) PRIMARY KEY, TableName NVARCHAR(128), ColumnName NVARCHAR(128), Definition NVARCHAR(200), DefaultValue NVARCHAR(100) NULL)
INSERT INTO @add (TableName, ColumnName, Definition, DefaultValue)
VALUES (N'TokenMaster', N'CompanyName', N'NVARCHAR(256) NULL', NULL),
       (N'TokenMaster', N'Provider', N'NVARCHAR(256) COLLATE Latin1_General_CI_AS NULL', N'N''Gemini'''),
       (N'TokenMaster', N'TotalTokenLimit', N'BIGINT NULL', NULL),
       (N'TokenMaster', N'CreatedAt', N'DATETIME2(3) NOT NULL', N'SYSUTCDATETIME()'),
       (N'TokenMaster', N'CooldownUntil', N'DATETIME2(3) NULL', NULL),
       (N'TokenMaster', N'StatusReason', N'NVARCHAR(1000) NULL', NULL),
       (N'TokenMaster', N'UpdatedAt', N'DATETIME2(3) NOT NULL', N'SYSUTCDATETIME()'),
       (N'TokenUsageLogs', N'Branch', N'NVARCHAR(256) NULL', NULL),
       (N'TokenUsageLogs', N'RequestedBy', N'NVARCHAR(256) NULL', NULL),
       (N'TokenUsageLogs', N'InputTokens', N'BIGINT NOT NULL', N'0'),
       (N'TokenUsageLogs', N'OutputTokens', N'BIGINT NOT NULL', N'0'),
       (N'TokenUsageLogs', N'TextPromptTokens', N'BIGINT NOT NULL', N'0'),
       (N'TokenUsageLogs', N'ImagePromptTokens', N'BIGINT NOT NULL', N'0'),
       (N'TokenUsageLogs', N'TextCandidatesTokens', N'BIGINT NOT NULL', N'0'),
       (N'TokenUsageLogs', N'TotalTokensUsed', N'BIGINT NOT NULL', N'0'),
       (N'TokenUsageLogs', N'RequestCount', N'BIGINT NOT NULL', N'1'),
       (N'TokenUsageLogs', N'LoggedAt', N'DATETIME2(3) NOT NULL', N'SYSUTCDATETIME()'),
       (N'TokenUsageLogs', N'RequestID', N'NVARCHAR(64) NULL', NULL),
       (N'TokenUsageLogs', N'CompanyID', N'NVARCHAR(256) COLLATE Latin1_General_CI_AS NULL', NULL),
       (N'TokenUsageLogs', N'ClientKeyID', N'NVARCHAR(64) NULL', NULL),
       (N'TokenUsageLogs', N'TokenSource', N'NVARCHAR(20) NULL', N'N''store'''),
       (N'TokenUsageLogs', N'ThoughtsTokens', N'BIGINT NOT NULL', N'0'),
       (N'TokenUsageLogs', N'CachedTokens', N'BIGINT NOT NULL', N'0'),
       (N'TokenUsageLogs', N'UnknownCalls', N'BIGINT NOT NULL', N'0'),
       (N'TokenUsageLogs', N'Model', N'NVARCHAR(256) NULL', NULL),
       (N'TokenUsageLogs', N'DurationMs', N'BIGINT NULL', NULL),
       (N'TokenUsageLogs', N'TraceID', N'NVARCHAR(32) NULL', NULL),
       (N'TokenUsageSummary', N'TotalUsedTokens', N'BIGINT NOT NULL', N'0'),
       (N'TokenUsageSummary', N'TotalRemainingTokens', N'BIGINT NULL', NULL),
       (N'TokenUsageSummary', N'Threshold', N'FLOAT NOT NULL', N'0.8'),
       (N'TokenUsageSummary', N'LastUpdated', N'DATETIME2(3) NOT NULL', N'SYSUTCDATETIME()'),
       (N'TokenUsageSummary', N'ReservedTokens', N'BIGINT NOT NULL', N'0'),
       (N'TokenUsageSummary', N'ThresholdCrossedAt', N'DATETIME2(3) NULL', NULL),
       (N'ApplicationLogs', N'Timestamp', N'DATETIME2(3) NOT NULL', N'SYSUTCDATETIME()'),
       (N'ApplicationLogs', N'LogLevel', N'NVARCHAR(20) NOT NULL', N'N''INFO'''),
       (N'ApplicationLogs', N'Logger', N'NVARCHAR(256) NULL', NULL),
       (N'ApplicationLogs', N'Message', N'NVARCHAR(MAX) NULL', NULL),
       (N'ApplicationLogs', N'Exception', N'NVARCHAR(MAX) NULL', NULL),
       (N'ApplicationLogs', N'Module', N'NVARCHAR(256) NULL', NULL),
       (N'ApplicationLogs', N'FunctionName', N'NVARCHAR(256) NULL', NULL),
       (N'ApplicationLogs', N'LineNumber', N'BIGINT NULL', NULL),
       (N'ApplicationLogs', N'RequestID', N'NVARCHAR(64) NULL', NULL),
       (N'ApplicationLogs', N'Host', N'NVARCHAR(256) NULL', NULL),
       (N'ApplicationLogs', N'TraceID', N'NVARCHAR(32) NULL', NULL),
       (N'RetryAttempts', N'CompanyID', N'NVARCHAR(256) COLLATE Latin1_General_CI_AS NULL', NULL),
       (N'RetryAttempts', N'Attempt', N'BIGINT NOT NULL', N'1'),
       (N'RetryAttempts', N'ErrorMessage', N'NVARCHAR(4000) NULL', NULL),
       (N'RetryAttempts', N'IsRetryable', N'BIT NOT NULL', N'0'),
       (N'RetryAttempts', N'Timestamp', N'DATETIME2(3) NOT NULL', N'SYSUTCDATETIME()'),
       (N'RetryAttempts', N'RequestID', N'NVARCHAR(64) NULL', NULL),
       (N'RetryAttempts', N'StatusCode', N'INT NULL', NULL),
       (N'RetryAttempts', N'DelayMs', N'BIGINT NULL', NULL)
DECLARE @n INT = 0, @last INT = (SELECT MAX(n) FROM @add), @sql NVARCHAR(MAX), @token_type NVARCHAR(128)
WHILE @n < @last
BEGIN
    SET @n = @n + 1
    SET @sql = NULL
    SELECT @sql = N'ALTER TABLE dbo.' + TableName + N' ADD ' + ColumnName + N' ' + Definition
                + CASE WHEN DefaultValue IS NULL THEN N''
                       ELSE N' CONSTRAINT DF_' + TableName + N'_' + ColumnName + N' DEFAULT (' + DefaultValue + N')' END
    FROM @add
    WHERE n = @n AND COL_LENGTH(N'dbo.' + TableName, ColumnName) IS NULL
    IF @sql IS NOT NULL
    BEGIN
        PRINT @sql
        EXEC (@sql)
    END
END

SET @token_type = (SELECT UPPER(DATA_TYPE) FROM INFORMATION_SCHEMA.COLUMNS
                   WHERE TABLE_SCHEMA = N'dbo' AND TABLE_NAME = N'TokenMaster' AND COLUMN_NAME = N'TokenID')
DECLARE @table NVARCHAR(128) = N''
WHILE 1 = 1 -- tables that were just created: they have neither rows nor indexes
BEGIN
    SET @table = (SELECT MIN(TABLE_NAME) FROM INFORMATION_SCHEMA.COLUMNS
                  WHERE TABLE_SCHEMA = N'dbo' AND COLUMN_NAME = N'TokenID' AND UPPER(DATA_TYPE) <> @token_type AND TABLE_NAME > @table
                    AND TABLE_NAME IN (N'TokenUsageLogs', N'TokenUsageSummary', N'TokenUsageMonthly', N'TokenReservations', N'RetryAttempts'))
    IF @table IS NULL
        BREAK
    SET @sql = N'ALTER TABLE dbo.' + @table + N' ALTER COLUMN TokenID ' + @token_type
             + CASE WHEN SERVERPROPERTY(N'BabelfishVersion') IS NOT NULL THEN N''
                    WHEN @table = N'TokenUsageSummary' THEN N' NOT NULL' ELSE N' NULL' END
    PRINT @sql
    EXEC (@sql)
END
EXEC sp_set_session_context N'extract-fcgi setup', 5
GO
IF @@ERROR <> 0 SET NOEXEC ON
GO

-- ---- what was found in the older rows ------------------------------------------------------

-- Once, before the first version is noted. Everything that is changed here, and everything that is
-- odd and stays, becomes a row of dbo.AuditLog with Actor 'setup_database.sql'.
IF ISNULL(CAST(SESSION_CONTEXT(N'extract-fcgi setup') AS INT), 0) <> 5
    THROW 50001, N'extract-fcgi: the step before this one has failed', 1;
DECLARE @rows INT, @now DATETIME2(3) = SYSUTCDATETIME(), @local DATETIME2(3) = SYSDATETIME()
IF OBJECT_ID(N'dbo.SchemaVersion', N'U') IS NULL
   AND (EXISTS (SELECT 1 FROM dbo.TokenMaster) OR EXISTS (SELECT 1 FROM dbo.TokenUsageLogs) OR EXISTS (SELECT 1 FROM dbo.TokenUsageSummary)
        OR EXISTS (SELECT 1 FROM dbo.ApplicationLogs) OR EXISTS (SELECT 1 FROM dbo.RetryAttempts))
   AND NOT EXISTS (SELECT 1 FROM dbo.AuditLog WHERE Actor = N'setup_database.sql' AND Action = N'upgrade: cut-over')
BEGIN
    BEGIN TRANSACTION

    -- NULL where the older table allowed it and sums cannot do with it.
    UPDATE dbo.TokenUsageLogs SET TotalTokensUsed = 0 WHERE TotalTokensUsed IS NULL
    UPDATE dbo.TokenUsageLogs SET RequestCount = 1 WHERE RequestCount IS NULL
    UPDATE dbo.TokenUsageSummary SET TotalUsedTokens = 0 WHERE TotalUsedTokens IS NULL

    -- Two rows of one token in TokenUsageSummary: the largest total stays, in the oldest row.
    INSERT INTO dbo.AuditLog (Timestamp, Actor, Action, ObjectType, ObjectID, Detail)
    SELECT @now, N'setup_database.sql', N'upgrade: duplicate summary removed', N'TokenUsageSummary', CAST(s.SummaryID AS NVARCHAR(40)),
           N'TokenID ' + CAST(s.TokenID AS NVARCHAR(40)) + N', TotalUsedTokens ' + CAST(s.TotalUsedTokens AS NVARCHAR(40))
    FROM dbo.TokenUsageSummary s
    WHERE EXISTS (SELECT 1 FROM dbo.TokenUsageSummary k WHERE k.TokenID = s.TokenID AND k.SummaryID < s.SummaryID)
    SET @rows = @@ROWCOUNT
    UPDATE dbo.TokenUsageSummary
    SET TotalUsedTokens = (SELECT MAX(k.TotalUsedTokens) FROM dbo.TokenUsageSummary k WHERE k.TokenID = TokenUsageSummary.TokenID)
    WHERE EXISTS (SELECT 1 FROM dbo.TokenUsageSummary k WHERE k.TokenID = TokenUsageSummary.TokenID
                                                          AND k.SummaryID <> TokenUsageSummary.SummaryID)
    DELETE FROM dbo.TokenUsageSummary
    WHERE SummaryID > (SELECT MIN(k.SummaryID) FROM dbo.TokenUsageSummary k WHERE k.TokenID = TokenUsageSummary.TokenID)
    IF @rows > 0
        PRINT N'TokenUsageSummary: ' + CAST(@rows AS NVARCHAR(20)) + N' duplicate row(s) removed; the largest total of each token stays'

    -- Rows of tokens that are not there. They stay, and the foreign key will not be trusted.
    INSERT INTO dbo.AuditLog (Timestamp, Actor, Action, ObjectType, ObjectID, Detail)
    SELECT @now, N'setup_database.sql', N'upgrade: rows of an unknown token', N'TokenUsageLogs', CAST(u.TokenID AS NVARCHAR(40)),
           CAST(COUNT(*) AS NVARCHAR(40)) + N' rows, TotalTokensUsed ' + CAST(SUM(u.TotalTokensUsed) AS NVARCHAR(40))
    FROM dbo.TokenUsageLogs u
    WHERE u.TokenID IS NOT NULL AND NOT EXISTS (SELECT 1 FROM dbo.TokenMaster t WHERE t.TokenID = u.TokenID)
    GROUP BY u.TokenID
    SET @rows = @@ROWCOUNT
    IF @rows > 0
        PRINT N'TokenUsageLogs: rows of ' + CAST(@rows AS NVARCHAR(20)) + N' token(s) that TokenMaster does not have; they stay'
    INSERT INTO dbo.AuditLog (Timestamp, Actor, Action, ObjectType, ObjectID, Detail)
    SELECT @now, N'setup_database.sql', N'upgrade: rows of an unknown token', N'TokenUsageSummary', CAST(s.TokenID AS NVARCHAR(40)),
           N'TotalUsedTokens ' + CAST(s.TotalUsedTokens AS NVARCHAR(40))
    FROM dbo.TokenUsageSummary s
    WHERE NOT EXISTS (SELECT 1 FROM dbo.TokenMaster t WHERE t.TokenID = s.TokenID)
    SET @rows = @@ROWCOUNT
    IF @rows > 0
        PRINT N'TokenUsageSummary: ' + CAST(@rows AS NVARCHAR(20)) + N' row(s) of tokens that TokenMaster does not have; they stay'

    -- A status that is none of the four: counts as Disabled, stays as it is.
    INSERT INTO dbo.AuditLog (Timestamp, Actor, Action, ObjectType, ObjectID, CompanyID, Detail)
    SELECT @now, N'setup_database.sql', N'upgrade: odd status', N'TokenMaster', CAST(TokenID AS NVARCHAR(40)), CompanyID,
           N'Status ''' + ISNULL(Status, N'NULL') + N''' counts as Disabled'
    FROM dbo.TokenMaster
    WHERE Status IS NULL OR Status NOT IN (N'Active', N'Expired', N'Exceeded', N'Disabled')
    SET @rows = @@ROWCOUNT
    IF @rows > 0
        PRINT N'TokenMaster: ' + CAST(@rows AS NVARCHAR(20)) + N' token(s) with a Status other than Active, Expired, Exceeded, Disabled: they count as Disabled'

    -- A threshold is a share of the limit. Above 1 and up to 100 it was a percentage; above that, a
    -- number of tokens.
    INSERT INTO dbo.AuditLog (Timestamp, Actor, Action, ObjectType, ObjectID, Detail)
    SELECT @now, N'setup_database.sql', N'upgrade: threshold', N'TokenUsageSummary', CAST(s.TokenID AS NVARCHAR(40)),
           N'was ' + ISNULL(CAST(CAST(s.Threshold AS DECIMAL(28, 4)) AS NVARCHAR(40)), N'NULL') + N': made a share of the limit'
    FROM dbo.TokenUsageSummary s
    WHERE s.Threshold IS NULL OR s.Threshold <= 0 OR s.Threshold > 1
    SET @rows = @@ROWCOUNT
    UPDATE dbo.TokenUsageSummary
    SET Threshold = CASE WHEN Threshold > 1 AND Threshold <= 100 THEN Threshold / 100.0
                         WHEN Threshold > 100 AND (SELECT t.TotalTokenLimit FROM dbo.TokenMaster t WHERE t.TokenID = TokenUsageSummary.TokenID) >= Threshold
                             THEN Threshold / (SELECT t.TotalTokenLimit FROM dbo.TokenMaster t WHERE t.TokenID = TokenUsageSummary.TokenID)
                         ELSE 0.8 END
    WHERE Threshold IS NULL OR Threshold <= 0 OR Threshold > 1
    IF @rows > 0
        PRINT N'TokenUsageSummary: ' + CAST(@rows AS NVARCHAR(20)) + N' Threshold(s) that were no share of the limit: made one (80 becomes 0.8), or the default 0.8'

    -- The opening balance: what the total says beyond the rows. Where the rows say more, they are right.
    INSERT INTO dbo.TokenUsageMonthly (TokenID, CompanyID, Month, TotalTokensUsed)
    SELECT s.TokenID, (SELECT t.CompanyID FROM dbo.TokenMaster t WHERE t.TokenID = s.TokenID), N'opening',
           s.TotalUsedTokens - (SELECT ISNULL(SUM(u.TotalTokensUsed), 0) FROM dbo.TokenUsageLogs u WHERE u.TokenID = s.TokenID)
    FROM dbo.TokenUsageSummary s
    WHERE s.TotalUsedTokens > (SELECT ISNULL(SUM(u.TotalTokensUsed), 0) FROM dbo.TokenUsageLogs u WHERE u.TokenID = s.TokenID)
    SET @rows = @@ROWCOUNT
    IF @rows > 0
        PRINT N'TokenUsageMonthly: opening balances of ' + CAST(@rows AS NVARCHAR(20)) + N' token(s) whose total is above the sum of their rows'
    INSERT INTO dbo.AuditLog (Timestamp, Actor, Action, ObjectType, ObjectID, CompanyID, Detail)
    SELECT @now, N'setup_database.sql', N'upgrade: opening balance', N'TokenUsageMonthly', CAST(m.TokenID AS NVARCHAR(40)), m.CompanyID,
           CAST(m.TotalTokensUsed AS NVARCHAR(40)) + N' tokens'
    FROM dbo.TokenUsageMonthly m
    WHERE m.Month = N'opening'
    INSERT INTO dbo.AuditLog (Timestamp, Actor, Action, ObjectType, ObjectID, Detail)
    SELECT @now, N'setup_database.sql', N'upgrade: total below its rows', N'TokenUsageSummary', CAST(s.TokenID AS NVARCHAR(40)),
           N'was ' + CAST(s.TotalUsedTokens AS NVARCHAR(40)) + N': set to the sum of the rows'
    FROM dbo.TokenUsageSummary s
    WHERE s.TotalUsedTokens < (SELECT ISNULL(SUM(u.TotalTokensUsed), 0) FROM dbo.TokenUsageLogs u WHERE u.TokenID = s.TokenID)
    SET @rows = @@ROWCOUNT
    IF @rows > 0
        PRINT N'TokenUsageSummary: ' + CAST(@rows AS NVARCHAR(20)) + N' total(s) below the sum of their rows: raised to it'
    UPDATE dbo.TokenUsageSummary
    SET TotalUsedTokens = (SELECT SUM(u.TotalTokensUsed) FROM dbo.TokenUsageLogs u WHERE u.TokenID = TokenUsageSummary.TokenID)
    WHERE TotalUsedTokens < (SELECT ISNULL(SUM(u.TotalTokensUsed), 0) FROM dbo.TokenUsageLogs u WHERE u.TokenID = TokenUsageSummary.TokenID)
    UPDATE dbo.TokenUsageSummary
    SET TotalRemainingTokens = (SELECT t.TotalTokenLimit FROM dbo.TokenMaster t WHERE t.TokenID = TokenUsageSummary.TokenID) - TotalUsedTokens

    -- Whoever is past the threshold already has been warned; the warning is for those to come.
    UPDATE dbo.TokenUsageSummary
    SET ThresholdCrossedAt = @now
    WHERE ThresholdCrossedAt IS NULL
      AND TotalUsedTokens >= Threshold * (SELECT NULLIF(t.TotalTokenLimit, 0) FROM dbo.TokenMaster t WHERE t.TokenID = TokenUsageSummary.TokenID)

    INSERT INTO dbo.AuditLog (Timestamp, Actor, Action, ObjectType, Detail)
    VALUES (@now, N'setup_database.sql', N'upgrade: cut-over', N'SchemaVersion',
            N'Times before this row were written in the local time of whoever wrote them and are not converted; the server''s local time was '
            + CONVERT(NVARCHAR(19), @local, 126) + N' at this moment, ' + CONVERT(NVARCHAR(19), @now, 126) + N' UTC')
    COMMIT TRANSACTION
    PRINT N'Cut-over at ' + CONVERT(NVARCHAR(19), @now, 126) + N' UTC (' + CONVERT(NVARCHAR(19), @local, 126)
        + N' here): older times are not converted, newer ones are UTC. All that was found: SELECT * FROM dbo.AuditLog WHERE Actor = ''setup_database.sql'''
END
EXEC sp_set_session_context N'extract-fcgi setup', 6
GO
IF @@ERROR <> 0 SET NOEXEC ON
GO

-- ---- foreign keys and indexes --------------------------------------------------------------

IF ISNULL(CAST(SESSION_CONTEXT(N'extract-fcgi setup') AS INT), 0) <> 6
    THROW 50001, N'extract-fcgi: the step before this one has failed', 1;
-- TokenMaster may have come without a key that the others can refer to.
IF NOT EXISTS (SELECT 1 FROM sys.indexes x
               WHERE x.object_id = OBJECT_ID(N'dbo.TokenMaster') AND x.is_unique = 1 AND x.has_filter = 0
                 AND EXISTS (SELECT 1 FROM sys.index_columns c
                             WHERE c.object_id = x.object_id AND c.index_id = x.index_id
                               AND c.key_ordinal = 1 AND COL_NAME(c.object_id, c.column_id) = N'TokenID')
                 AND NOT EXISTS (SELECT 1 FROM sys.index_columns c
                                 WHERE c.object_id = x.object_id AND c.index_id = x.index_id AND c.key_ordinal > 1))
    ALTER TABLE dbo.TokenMaster ADD CONSTRAINT UQ_TokenMaster_TokenID UNIQUE (TokenID)

-- One for each table, where no other foreign key says the same. Rows that break it (listed above)
-- leave it untrusted: it holds for what comes.
DECLARE @key TABLE (n INT IDENTITY(1, 1) PRIMARY KEY, TableName NVARCHAR(128), OnDelete NVARCHAR(40))
INSERT INTO @key (TableName, OnDelete)
VALUES (N'TokenUsageLogs', N''), (N'TokenUsageSummary', N' ON DELETE CASCADE'), (N'TokenUsageMonthly', N''), (N'TokenReservations', N'')
DECLARE @n INT = 0, @table NVARCHAR(128), @delete NVARCHAR(40), @sql NVARCHAR(MAX), @orphans INT
WHILE @n < 4
BEGIN
    SET @n = @n + 1
    SELECT @table = TableName, @delete = OnDelete FROM @key WHERE n = @n
    IF EXISTS (SELECT 1 FROM sys.foreign_key_columns c
               WHERE c.parent_object_id = OBJECT_ID(N'dbo.' + @table) AND c.referenced_object_id = OBJECT_ID(N'dbo.TokenMaster')
                 AND COL_NAME(c.parent_object_id, c.parent_column_id) = N'TokenID')
        CONTINUE
    SET @sql = N'SELECT @orphans = COUNT(*) FROM dbo.' + @table + N' x WHERE x.TokenID IS NOT NULL'
             + N' AND NOT EXISTS (SELECT 1 FROM dbo.TokenMaster t WHERE t.TokenID = x.TokenID)'
    EXEC sp_executesql @sql, N'@orphans INT OUTPUT', @orphans = @orphans OUTPUT
    SET @sql = N'ALTER TABLE dbo.' + @table + CASE WHEN @orphans > 0 THEN N' WITH NOCHECK' ELSE N'' END
             + N' ADD CONSTRAINT FK_' + @table + N'_TokenMaster FOREIGN KEY (TokenID) REFERENCES dbo.TokenMaster (TokenID)' + @delete
    IF @orphans > 0 AND SERVERPROPERTY(N'BabelfishVersion') IS NOT NULL
        PRINT N'FK_' + @table + N'_TokenMaster: left out, Babelfish knows no WITH NOCHECK'
    ELSE
        EXEC (@sql)
END
EXEC sp_set_session_context N'extract-fcgi setup', 7
GO
IF @@ERROR <> 0 SET NOEXEC ON
GO

-- Indexes are found by name on SQL Server; under Babelfish names have a suffix there.
IF ISNULL(CAST(SESSION_CONTEXT(N'extract-fcgi setup') AS INT), 0) <> 7
    THROW 50001, N'extract-fcgi: the step before this one has failed', 1;
-- Finds a company's Active tokens.
IF NOT EXISTS (SELECT 1 FROM sys.indexes WHERE object_id = OBJECT_ID(N'dbo.TokenMaster') AND name LIKE N'IX[_]TokenMaster[_]CompanyID[_]Status%')
    CREATE INDEX IX_TokenMaster_CompanyID_Status ON dbo.TokenMaster (CompanyID, Status)
-- Newest tokens first.
IF NOT EXISTS (SELECT 1 FROM sys.indexes WHERE object_id = OBJECT_ID(N'dbo.TokenMaster') AND name LIKE N'IX[_]TokenMaster[_]CreatedAt%')
    CREATE INDEX IX_TokenMaster_CreatedAt ON dbo.TokenMaster (CreatedAt)
IF NOT EXISTS (SELECT 1 FROM sys.indexes WHERE object_id = OBJECT_ID(N'dbo.TokenUsageLogs') AND name LIKE N'IX[_]TokenUsageLogs[_]TokenID%')
    CREATE INDEX IX_TokenUsageLogs_TokenID ON dbo.TokenUsageLogs (TokenID) INCLUDE (TotalTokensUsed)
IF NOT EXISTS (SELECT 1 FROM sys.indexes WHERE object_id = OBJECT_ID(N'dbo.TokenUsageLogs') AND name LIKE N'IX[_]TokenUsageLogs[_]LoggedAt%')
    CREATE INDEX IX_TokenUsageLogs_LoggedAt ON dbo.TokenUsageLogs (LoggedAt)
IF NOT EXISTS (SELECT 1 FROM sys.indexes WHERE object_id = OBJECT_ID(N'dbo.TokenUsageLogs') AND name LIKE N'IX[_]TokenUsageLogs[_]Branch%')
    CREATE INDEX IX_TokenUsageLogs_Branch ON dbo.TokenUsageLogs (Branch)
-- What makes settling a request twice count once.
IF NOT EXISTS (SELECT 1 FROM sys.indexes WHERE object_id = OBJECT_ID(N'dbo.TokenUsageLogs') AND name LIKE N'UX[_]TokenUsageLogs[_]RequestID%')
    CREATE UNIQUE INDEX UX_TokenUsageLogs_RequestID_TokenID ON dbo.TokenUsageLogs (RequestID, TokenID) WHERE RequestID IS NOT NULL
IF NOT EXISTS (SELECT 1 FROM sys.indexes WHERE object_id = OBJECT_ID(N'dbo.TokenUsageSummary') AND name LIKE N'UX[_]TokenUsageSummary[_]TokenID%')
    CREATE UNIQUE INDEX UX_TokenUsageSummary_TokenID ON dbo.TokenUsageSummary (TokenID)
IF NOT EXISTS (SELECT 1 FROM sys.indexes WHERE object_id = OBJECT_ID(N'dbo.TokenUsageMonthly') AND name LIKE N'UX[_]TokenUsageMonthly[_]TokenID%')
    CREATE UNIQUE INDEX UX_TokenUsageMonthly_TokenID_CompanyID_Month ON dbo.TokenUsageMonthly (TokenID, CompanyID, Month)
-- What makes acquiring twice reserve once.
IF NOT EXISTS (SELECT 1 FROM sys.indexes WHERE object_id = OBJECT_ID(N'dbo.TokenReservations') AND name LIKE N'UX[_]TokenReservations[_]RequestID%')
    CREATE UNIQUE INDEX UX_TokenReservations_RequestID_Sequence ON dbo.TokenReservations (RequestID, Sequence)
-- Holds only those that are open or unsettled, so it stays small.
IF NOT EXISTS (SELECT 1 FROM sys.indexes WHERE object_id = OBJECT_ID(N'dbo.TokenReservations') AND name LIKE N'IX[_]TokenReservations[_]Pending%')
    CREATE INDEX IX_TokenReservations_Pending ON dbo.TokenReservations (State, ExpiresAt) INCLUDE (TokenID, EstimatedTokens) WHERE ClosedAt IS NULL
IF NOT EXISTS (SELECT 1 FROM sys.indexes WHERE object_id = OBJECT_ID(N'dbo.ApplicationLogs') AND name LIKE N'IX[_]ApplicationLogs[_]Timestamp%')
    CREATE INDEX IX_ApplicationLogs_Timestamp ON dbo.ApplicationLogs (Timestamp)
IF NOT EXISTS (SELECT 1 FROM sys.indexes WHERE object_id = OBJECT_ID(N'dbo.ApplicationLogs') AND name LIKE N'IX[_]ApplicationLogs[_]LogLevel%')
    CREATE INDEX IX_ApplicationLogs_LogLevel ON dbo.ApplicationLogs (LogLevel)
IF NOT EXISTS (SELECT 1 FROM sys.indexes WHERE object_id = OBJECT_ID(N'dbo.ApplicationLogs') AND name LIKE N'IX[_]ApplicationLogs[_]Logger%')
    CREATE INDEX IX_ApplicationLogs_Logger ON dbo.ApplicationLogs (Logger)
-- All that one request left: support looks here first.
IF NOT EXISTS (SELECT 1 FROM sys.indexes WHERE object_id = OBJECT_ID(N'dbo.ApplicationLogs') AND name LIKE N'IX[_]ApplicationLogs[_]RequestID%')
    CREATE INDEX IX_ApplicationLogs_RequestID ON dbo.ApplicationLogs (RequestID) WHERE RequestID IS NOT NULL
-- From a trace to its requests. Holds only the requests of those who send a traceparent.
IF NOT EXISTS (SELECT 1 FROM sys.indexes WHERE object_id = OBJECT_ID(N'dbo.ApplicationLogs') AND name LIKE N'IX[_]ApplicationLogs[_]TraceID%')
    CREATE INDEX IX_ApplicationLogs_TraceID ON dbo.ApplicationLogs (TraceID) WHERE TraceID IS NOT NULL
IF NOT EXISTS (SELECT 1 FROM sys.indexes WHERE object_id = OBJECT_ID(N'dbo.RetryAttempts') AND name LIKE N'IX[_]RetryAttempts[_]TokenID%')
    CREATE INDEX IX_RetryAttempts_TokenID ON dbo.RetryAttempts (TokenID)
IF NOT EXISTS (SELECT 1 FROM sys.indexes WHERE object_id = OBJECT_ID(N'dbo.RetryAttempts') AND name LIKE N'IX[_]RetryAttempts[_]CompanyID%')
    CREATE INDEX IX_RetryAttempts_CompanyID ON dbo.RetryAttempts (CompanyID)
IF NOT EXISTS (SELECT 1 FROM sys.indexes WHERE object_id = OBJECT_ID(N'dbo.RetryAttempts') AND name LIKE N'IX[_]RetryAttempts[_]Timestamp%')
    CREATE INDEX IX_RetryAttempts_Timestamp ON dbo.RetryAttempts (Timestamp)
IF NOT EXISTS (SELECT 1 FROM sys.indexes WHERE object_id = OBJECT_ID(N'dbo.IdempotencyKeys') AND name LIKE N'IX[_]IdempotencyKeys[_]ExpiresAt%')
    CREATE INDEX IX_IdempotencyKeys_ExpiresAt ON dbo.IdempotencyKeys (ExpiresAt)
-- What a settlement knows of its key.
IF NOT EXISTS (SELECT 1 FROM sys.indexes WHERE object_id = OBJECT_ID(N'dbo.IdempotencyKeys') AND name LIKE N'IX[_]IdempotencyKeys[_]RequestID%')
    CREATE INDEX IX_IdempotencyKeys_RequestID ON dbo.IdempotencyKeys (RequestID)
IF NOT EXISTS (SELECT 1 FROM sys.indexes WHERE object_id = OBJECT_ID(N'dbo.AuditLog') AND name LIKE N'IX[_]AuditLog[_]Timestamp%')
    CREATE INDEX IX_AuditLog_Timestamp ON dbo.AuditLog (Timestamp)
EXEC sp_set_session_context N'extract-fcgi setup', 8
GO
IF @@ERROR <> 0 SET NOEXEC ON
GO

-- ---- views ---------------------------------------------------------------------------------

-- Each token with its limit and use; of the key only its end.
DROP VIEW IF EXISTS dbo.vw_TokenStatus
GO
CREATE VIEW dbo.vw_TokenStatus AS -- (schema 6)
SELECT t.TokenID,
       t.CompanyID,
       t.CompanyName,
       t.Provider,
       CAST(CASE WHEN t.ApiKey LIKE N'sealed:%' THEN N'sealed'
                 ELSE NCHAR(8230) + CASE WHEN LEN(t.ApiKey) >= 8 THEN RIGHT(t.ApiKey, 4) ELSE N'' END END AS NVARCHAR(6)) AS ApiKey,
       t.Status,
       t.StatusReason,
       t.TotalTokenLimit,
       ISNULL(s.TotalUsedTokens, 0) AS TotalUsedTokens,
       t.TotalTokenLimit - ISNULL(s.TotalUsedTokens, 0) AS TotalRemainingTokens,
       ISNULL(s.ReservedTokens, 0) AS ReservedTokens,
       ISNULL(s.Threshold, 0.8) AS Threshold,
       s.ThresholdCrossedAt,
       t.CooldownUntil,
       t.CreatedAt,
       t.UpdatedAt,
       s.LastUpdated
FROM dbo.TokenMaster t
LEFT JOIN dbo.TokenUsageSummary s ON s.TokenID = t.TokenID
GO

-- What each company used with each token since the beginning, rolled-up months included.
DROP VIEW IF EXISTS dbo.vw_UsageSummary
GO
CREATE VIEW dbo.vw_UsageSummary AS -- (schema 6)
SELECT ISNULL(u.CompanyID, t.CompanyID) AS CompanyID,
       u.TokenID,
       SUM(u.RequestCount) AS RequestCount,
       SUM(u.InputTokens) AS InputTokens,
       SUM(u.OutputTokens) AS OutputTokens,
       SUM(u.ThoughtsTokens) AS ThoughtsTokens,
       SUM(u.CachedTokens) AS CachedTokens,
       SUM(u.TotalTokensUsed) AS TotalTokensUsed,
       SUM(u.UnknownCalls) AS UnknownCalls,
       MAX(u.LastUsed) AS LastUsed
FROM (SELECT CompanyID, TokenID, RequestCount, InputTokens, OutputTokens, ThoughtsTokens,
             CachedTokens, TotalTokensUsed, UnknownCalls, CONVERT(NVARCHAR(19), LoggedAt, 126) AS LastUsed
      FROM dbo.TokenUsageLogs
      UNION ALL
      SELECT CompanyID, TokenID, RequestCount, InputTokens, OutputTokens, ThoughtsTokens,
             CachedTokens, TotalTokensUsed, UnknownCalls, NULLIF(Month, N'opening')
      FROM dbo.TokenUsageMonthly) u
LEFT JOIN dbo.TokenMaster t ON t.TokenID = u.TokenID
GROUP BY ISNULL(u.CompanyID, t.CompanyID), u.TokenID
GO

-- Errors of the last seven days. Newest first: ORDER BY LogID DESC.
DROP VIEW IF EXISTS dbo.vw_RecentErrors
GO
CREATE VIEW dbo.vw_RecentErrors AS -- (schema 6)
SELECT LogID, Timestamp, LogLevel, Logger, Message, Exception, Module, FunctionName, LineNumber,
       RequestID, Host, TraceID
FROM dbo.ApplicationLogs
WHERE LogLevel IN (N'ERROR', N'CRITICAL')
  AND Timestamp >= DATEADD(DAY, -7, SYSUTCDATETIME())
GO

-- Failed calls of requests that never got an answer from Gemini (they have no usage row).
DROP VIEW IF EXISTS dbo.vw_FailedRetries
GO
CREATE VIEW dbo.vw_FailedRetries AS -- (schema 6)
SELECT r.RetryID, r.TokenID, r.CompanyID, r.Attempt, r.ErrorMessage, r.IsRetryable, r.Timestamp,
       r.RequestID, r.StatusCode, r.DelayMs
FROM dbo.RetryAttempts r
WHERE NOT EXISTS (SELECT 1 FROM dbo.TokenUsageLogs u WHERE u.RequestID = r.RequestID)
GO

-- Requests that may have been billed without a usage row, for a DBA to reconcile with Google's bill.
DROP VIEW IF EXISTS dbo.vw_UnsettledRequests
GO
CREATE VIEW dbo.vw_UnsettledRequests AS -- (schema 6)
SELECT r.ReservationID, r.RequestID, r.Sequence, r.TokenID, r.CompanyID, r.Branch, r.RequestedBy,
       r.EstimatedTokens, r.State, r.UnknownCalls, r.TokenSource, r.Host, r.ProcessID, r.CreatedAt,
       r.ExpiresAt
FROM dbo.TokenReservations r
WHERE r.State = N'unsettled'
  AND r.ClosedAt IS NULL
GO

-- ---- what a change of a limit brings with it ------------------------------------------------

-- What remains follows the limit, whoever changes it; and raising it (or taking it away) makes an
-- Exceeded token with room again Active. `extractctl token set-limit` (usp_SetTokenLimit) does this, and
-- more: it also looks at the threshold, and keeps a record in AuditLog.
--
-- Its locks come in the wrong order: the UPDATE has the rows of TokenMaster, and TokenUsageSummary comes
-- after. So it may meet a procedure in a deadlock; with its priority it is not the victim, and the
-- service repeats such a call. It fires itself with its second UPDATE where the database has
-- RECURSIVE_TRIGGERS, and then finds that the limit is not touched.
DROP TRIGGER IF EXISTS dbo.TR_TokenMaster_TotalTokenLimit
GO
CREATE TRIGGER dbo.TR_TokenMaster_TotalTokenLimit ON dbo.TokenMaster -- (schema 6)
AFTER UPDATE
AS
BEGIN
    IF NOT UPDATE(TotalTokenLimit)
        RETURN
    SET NOCOUNT ON
    SET DEADLOCK_PRIORITY HIGH
    UPDATE s
    SET TotalRemainingTokens = i.TotalTokenLimit - s.TotalUsedTokens
    FROM inserted i
    JOIN deleted d ON d.TokenID = i.TokenID
    JOIN dbo.TokenUsageSummary s WITH (FORCESEEK, ROWLOCK) ON s.TokenID = i.TokenID
    WHERE i.TotalTokenLimit <> d.TotalTokenLimit
       OR (i.TotalTokenLimit IS NULL AND d.TotalTokenLimit IS NOT NULL)
       OR (i.TotalTokenLimit IS NOT NULL AND d.TotalTokenLimit IS NULL)

    UPDATE t
    SET Status = N'Active', StatusReason = NULL
    FROM inserted i
    JOIN deleted d ON d.TokenID = i.TokenID
    JOIN dbo.TokenMaster t WITH (FORCESEEK, ROWLOCK) ON t.TokenID = i.TokenID
    LEFT JOIN dbo.TokenUsageSummary s WITH (FORCESEEK) ON s.TokenID = i.TokenID
    WHERE t.Status = N'Exceeded'
      AND ((i.TotalTokenLimit IS NULL AND d.TotalTokenLimit IS NOT NULL)
           OR (i.TotalTokenLimit > d.TotalTokenLimit
               AND i.TotalTokenLimit > ISNULL(s.TotalUsedTokens,
                       (SELECT ISNULL(SUM(u.TotalTokensUsed), 0) FROM dbo.TokenUsageLogs u WHERE u.TokenID = i.TokenID)
                       + (SELECT ISNULL(SUM(m.TotalTokensUsed), 0) FROM dbo.TokenUsageMonthly m WHERE m.TokenID = i.TokenID))))
END
GO

-- ---- procedures: what every process calls --------------------------------------------------

-- Stubs first, so that an ALTER below keeps the rights that somebody has granted.
DECLARE @name NVARCHAR(128) = N'', @sql NVARCHAR(400)
WHILE 1 = 1
BEGIN
    SET @name = (SELECT MIN(v.name)
                 FROM (VALUES (N'usp_SchemaVersion'), (N'usp_Ping'), (N'usp_EnsureSummary'), (N'usp_ChangeToken'), (N'usp_UsableKey'), (N'usp_AcquireOneByOne'),
                              (N'usp_AcquireTokens'), (N'usp_SettleOneByOne'), (N'usp_SettleUsage'), (N'usp_RecordLogs'), (N'usp_ExpireReservations'), (N'usp_TextFault'), (N'usp_AddToken'),
                              (N'usp_SetTokenStatus'), (N'usp_SetTokenKey'), (N'usp_SetTokenLimit'), (N'usp_ListTokens'),
                              (N'usp_UsageReport'), (N'usp_ListLogs'), (N'usp_ListRetries'), (N'usp_ListReservations'),
                              (N'usp_CountTokens'), (N'usp_ListAudit'), (N'usp_ActivateToken'), (N'usp_ListTokenKeys'),
                              (N'usp_ResealToken'), (N'usp_FindClientKey'), (N'usp_AddClientKey'), (N'usp_RevokeClientKey'),
                              (N'usp_ListClientKeys')) AS v (name)
                 WHERE v.name > @name)
    IF @name IS NULL
        BREAK
    SET @sql = N'CREATE PROCEDURE dbo.' + @name + N' AS RETURN 0'
    IF OBJECT_ID(N'dbo.' + @name, N'P') IS NULL
        EXEC (@sql)
END
GO

-- Which schema is this? Where the procedure is missing, there is none.
ALTER PROCEDURE dbo.usp_SchemaVersion -- (schema 6)
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    SELECT Version, Major FROM dbo.SchemaVersion WHERE SchemaVersionID = 1
END
GO

-- Is the store there? One row of a table, so that a database that is merely recovering says no.
ALTER PROCEDURE dbo.usp_Ping -- (schema 6)
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    SELECT COUNT(*) AS Ok FROM dbo.SchemaVersion WHERE SchemaVersionID = 1
END
GO

-- For the procedures below: makes a token's row of TokenUsageSummary where it is missing, from what
-- the other tables say. Whoever comes second gets a duplicate key, and the caller starts again.
ALTER PROCEDURE dbo.usp_EnsureSummary -- (schema 6)
    @TokenID BIGINT
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    DECLARE @used BIGINT, @reserved BIGINT
    IF EXISTS (SELECT 1 FROM dbo.TokenUsageSummary WITH (FORCESEEK) WHERE TokenID = @TokenID)
        RETURN 0
    -- In one statement: retention moves rows from one table to the other meanwhile.
    SELECT @used = ISNULL(SUM(q.TotalTokensUsed), 0)
    FROM (SELECT TotalTokensUsed FROM dbo.TokenUsageLogs WHERE TokenID = @TokenID
          UNION ALL
          SELECT TotalTokensUsed FROM dbo.TokenUsageMonthly WHERE TokenID = @TokenID) q
    SELECT @reserved = ISNULL(SUM(EstimatedTokens), 0)
    FROM dbo.TokenReservations
    WHERE State = N'open' AND ClosedAt IS NULL AND TokenID = @TokenID
    INSERT INTO dbo.TokenUsageSummary (TokenID, TotalUsedTokens, TotalRemainingTokens, Threshold, ReservedTokens, LastUpdated)
    SELECT TokenID, @used, TotalTokenLimit - @used, 0.8, @reserved, SYSUTCDATETIME()
    FROM dbo.TokenMaster
    WHERE TokenID = @TokenID
END
GO

-- For the procedures below: what a failed call, or a limit, does to a token. @Status NULL: it cools
-- down, and a cooldown is never shortened; else it gets that status, if it is still Active: whoever
-- comes second changes nothing, and what took a token its status stays readable.
ALTER PROCEDURE dbo.usp_ChangeToken -- (schema 6)
    @TokenID    BIGINT,
    @Status     NVARCHAR(20),
    @CooldownMs BIGINT,
    @Reason     NVARCHAR(1000),
    @Detail     NVARCHAR(2000), -- for AuditLog, where the status changes; NULL: from @Reason
    @RequestID  NVARCHAR(64),
    @Now        DATETIME2(3),
    @Changed    INT = 0 OUTPUT
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    DECLARE @until DATETIME2(3)
    SET @Changed = 0
    IF @Status IS NULL
    BEGIN
        SET @until = DATEADD(MILLISECOND, CAST(@CooldownMs % 1000 AS INT), DATEADD(SECOND, CAST(@CooldownMs / 1000 AS INT), @Now))
        UPDATE dbo.TokenMaster
        SET CooldownUntil = CASE WHEN CooldownUntil > @until THEN CooldownUntil ELSE @until END,
            StatusReason = CASE WHEN Status = N'Active' THEN @Reason ELSE StatusReason END,
            UpdatedAt = CASE WHEN Status = N'Active' THEN @Now ELSE UpdatedAt END
        WHERE TokenID = @TokenID
        RETURN 0
    END
    UPDATE dbo.TokenMaster
    SET Status = @Status, StatusReason = @Reason, UpdatedAt = @Now
    WHERE TokenID = @TokenID AND Status = N'Active'
    SET @Changed = @@ROWCOUNT
    IF @Changed > 0
        INSERT INTO dbo.AuditLog (Timestamp, Actor, Action, ObjectType, ObjectID, CompanyID, RequestID, Detail)
        SELECT @Now, N'extract-fcgi', N'token status changed', N'TokenMaster', CAST(@TokenID AS NVARCHAR(40)), CompanyID, @RequestID,
               N'Active to ' + @Status + N': ' + ISNULL(@Detail, @Reason)
        FROM dbo.TokenMaster
        WHERE TokenID = @TokenID
END
GO

-- For the procedures below: an API key without what clings to one that was pasted (line ends, spaces,
-- control characters, at both ends). @Usable NULL: what is left is not 1 to 1024 visible ASCII
-- characters, and could not be sent.
ALTER PROCEDURE dbo.usp_UsableKey -- (schema 6)
    @ApiKey NVARCHAR(4000),
    @Usable NVARCHAR(1024) OUTPUT
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    DECLARE @kept NVARCHAR(40) = N'%[^' + NCHAR(1) + N'-' + NCHAR(32) + NCHAR(127) + N']%'
    DECLARE @first INT = PATINDEX(@kept COLLATE Latin1_General_BIN2, @ApiKey)
    DECLARE @after INT = PATINDEX(@kept COLLATE Latin1_General_BIN2, REVERSE(@ApiKey))
    DECLARE @length INT = LEN(@ApiKey + N'.') - @first - @after + 1 -- LEN forgets trailing spaces, hence the dot
    SET @Usable = NULL
    IF @first > 0 AND @length <= 1024
       AND SUBSTRING(@ApiKey, @first, @length) NOT LIKE N'%[^!-~]%' COLLATE Latin1_General_BIN2
        SET @Usable = SUBSTRING(@ApiKey, @first, @length)
END
GO

-- All that usp_AcquireTokens promises, for any batch.
--
-- The plan is made without locks, then carried out: each Summary row of the plan, in ascending
-- TokenID, takes its reservation only if there is still room. Where one has none left, all is taken
-- back and done again with the Summary rows of every token in question locked first, in the same
-- order; then what was read holds.
ALTER PROCEDURE dbo.usp_AcquireOneByOne -- (schema 6)
    @Items NVARCHAR(MAX)
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON

    DECLARE @item TABLE (
        i              INT NOT NULL PRIMARY KEY,
        RequestID      NVARCHAR(4000) NULL,
        Sequence       BIGINT NULL,
        CompanyID      NVARCHAR(4000) COLLATE Latin1_General_CI_AS NULL,
        Branch         NVARCHAR(4000) NULL,
        RequestedBy    NVARCHAR(4000) NULL,
        Estimate       BIGINT NULL,
        ExpiresMs      BIGINT NULL,
        Choice         BIGINT NULL,
        PreviousID     BIGINT NULL,
        Fault          NVARCHAR(20) NULL,
        CooldownMs     BIGINT NULL,
        Reason         NVARCHAR(4000) NULL,
        Spent          INT NULL,
        FallbackIfNone INT NULL,
        FallbackOnly   INT NULL,
        IdempotencyKey NVARCHAR(4000) COLLATE Latin1_General_BIN2 NULL,
        Host           NVARCHAR(4000) NULL,
        ProcessID      BIGINT NULL,
        Problem        NVARCHAR(400) NULL, -- not NULL: bad_value
        Granted        NVARCHAR(20) NULL,
        TokenID        BIGINT NULL,
        ApiKey         NVARCHAR(1024) NULL,
        Stored         NVARCHAR(256) COLLATE Latin1_General_CI_AS NULL,
        FirstUsableMs  BIGINT NULL,
        BusyToo        INT NULL,
        Stopped        INT NULL,
        IsNew          INT NULL, -- 1: a reservation is to be written
        TakesKey       INT NULL, -- 1: the idempotency key is to be written; 2: it was
        KeyCompany     NVARCHAR(256) COLLATE Latin1_General_CI_AS NULL,
        FirstRequestID NVARCHAR(64) NULL,
        FirstIsDone    INT NULL
    )
    DECLARE @excluded TABLE (i INT NOT NULL, TokenID BIGINT NOT NULL, AtFault INT NOT NULL)
    DECLARE @id TABLE (TokenID BIGINT NOT NULL PRIMARY KEY)
    DECLARE @token TABLE (
        TokenID    BIGINT NOT NULL PRIMARY KEY,
        CompanyID  NVARCHAR(256) COLLATE Latin1_General_CI_AS NULL,
        Folded     NVARCHAR(256) COLLATE Latin1_General_BIN2 NULL,
        ApiKey     NVARCHAR(4000) NULL, -- NULL: none that can be sent
        IsServed   INT NOT NULL,
        IsActive   INT NOT NULL,
        IsExpired  INT NOT NULL,
        Limit      BIGINT NULL,
        HasSummary INT NOT NULL,
        Used       BIGINT NOT NULL,
        Reserved   BIGINT NOT NULL,
        CoolingMs  BIGINT NOT NULL,
        CreatedAt  DATETIME2(3) NULL,
        Fit        INT NULL -- 0 usable, 1 cooling or tried, 2 busy, 3 never
    )
    DECLARE @release TABLE (ReservationID BIGINT NOT NULL PRIMARY KEY, TokenID BIGINT NOT NULL)
    DECLARE @change TABLE (n INT IDENTITY(1, 1) PRIMARY KEY, i INT, TokenID BIGINT, Status NVARCHAR(20) NULL, CooldownMs BIGINT NULL,
                           Reason NVARCHAR(1000), RequestID NVARCHAR(64), Stopped INT)
    DECLARE @at_fault TABLE (Folded NVARCHAR(256) COLLATE Latin1_General_BIN2 NULL)

    DECLARE @now DATETIME2(3), @attempt INT = 1, @done INT = 0, @missed INT, @lock INT, @told INT, @others INT, @n INT, @t BIGINT
    DECLARE @i INT, @request NVARCHAR(64), @sequence INT, @company NVARCHAR(256), @folded NVARCHAR(256), @estimate BIGINT, @choice BIGINT
    DECLARE @previous BIGINT, @fault NVARCHAR(20), @cooldown BIGINT, @reason NVARCHAR(1000), @text NVARCHAR(1000), @spent INT
    DECLARE @if_none INT, @only INT, @stored NVARCHAR(256), @again BIGINT, @reservation BIGINT, @amount BIGINT, @active INT
    DECLARE @usable INT, @cooling INT, @busy INT, @first BIGINT, @key NVARCHAR(4000), @limit BIGINT, @has_summary INT, @status NVARCHAR(20)
    DECLARE @late BIGINT, @stopped INT, @served INT, @expired INT, @owner NVARCHAR(256)
    DECLARE @idempotency NVARCHAR(4000), @key_company NVARCHAR(256), @holder NVARCHAR(64), @holder_done INT, @takes INT

    INSERT INTO @item (i, RequestID, Sequence, CompanyID, Branch, RequestedBy, Estimate, ExpiresMs, Choice, PreviousID, Fault, CooldownMs,
                       Reason, Spent, FallbackIfNone, FallbackOnly, IdempotencyKey, Host, ProcessID)
    SELECT j.i, j.requestId, j.sequence, j.companyId, j.branch, j.requestedBy, j.estimate, j.expiresMs, ISNULL(j.choice, 0),
           ISNULL(j.previousTokenId, 0), ISNULL(j.fault, N'none'), ISNULL(j.cooldownMs, 0), j.reason, ISNULL(j.previousSpent, 0),
           ISNULL(j.fallbackIfNone, 0), ISNULL(j.fallbackOnly, 0), j.idempotencyKey, j.host, j.processId
    FROM OPENJSON(@Items) WITH (
        i INT, requestId NVARCHAR(4000) '$.requestId', sequence BIGINT, companyId NVARCHAR(4000) '$.companyId', branch NVARCHAR(4000),
        requestedBy NVARCHAR(4000) '$.requestedBy', estimate BIGINT, expiresMs BIGINT '$.expiresMs', choice BIGINT,
        previousTokenId BIGINT '$.previousTokenId', fault NVARCHAR(20), cooldownMs BIGINT '$.cooldownMs', reason NVARCHAR(4000),
        previousSpent INT '$.previousSpent', fallbackIfNone INT '$.fallbackIfNone', fallbackOnly INT '$.fallbackOnly',
        idempotencyKey NVARCHAR(4000) '$.idempotencyKey', host NVARCHAR(4000), processId BIGINT '$.processId') j
    INSERT INTO @excluded (i, TokenID, AtFault)
    SELECT j.i, x.t, ISNULL(x.f, 0)
    FROM OPENJSON(@Items) WITH (
        i INT, excluded NVARCHAR(MAX) AS JSON) j
    CROSS APPLY OPENJSON(j.excluded) WITH (
        t BIGINT, f INT) x
    WHERE x.t IS NOT NULL

    -- LEN forgets trailing spaces, hence the dot.
    UPDATE @item
    SET Problem = CASE
            WHEN ISNULL(LEN(RequestID + N'.'), 0) NOT BETWEEN 2 AND 65 THEN N'request_id must have 1 to 64 bytes'
            WHEN ISNULL(LEN(CompanyID + N'.'), 0) NOT BETWEEN 2 AND 257 THEN N'company_id must have 1 to 256 bytes'
            WHEN ISNULL(LEN(Branch + N'.'), 0) > 257 OR ISNULL(LEN(RequestedBy + N'.'), 0) > 257
                THEN N'branch and requested_by must have at most 256 bytes'
            WHEN ISNULL(Sequence, 0) NOT BETWEEN 1 AND 2147483647 THEN N'sequence must be 1 or more'
            WHEN ISNULL(Estimate, -1) NOT BETWEEN 0 AND 1000000000000000 THEN N'estimate_tokens must be 0 to 10^15'
            WHEN ISNULL(ExpiresMs, -1) NOT BETWEEN 0 AND 31622400000 THEN N'expires_ms must be 0 to 366 days'
            WHEN PreviousID < 0 THEN N'previous_token_id must not be negative'
            WHEN Choice < 0 THEN N'choice must not be negative'
            WHEN LEN(IdempotencyKey + N'.') NOT BETWEEN 2 AND 129 THEN N'idempotency_key must have 1 to 128 bytes'
            WHEN CooldownMs NOT BETWEEN 0 AND 31622400000 THEN N'a cooldown must be 0 to 366 days'
            WHEN Fault NOT IN (N'none', N'cooldown', N'disable', N'exceed') THEN N'fault must be none, cooldown, disable or exceed'
        END
    UPDATE @item
    SET Reason = CASE WHEN ISNULL(Reason, N'') = N'' THEN N'no reason given' ELSE LEFT(Reason, 800) END

    -- Whose tokens are in question: by the index alone, and never holding a lock of it.
    INSERT INTO @id (TokenID)
    SELECT DISTINCT t.TokenID
    FROM @item i
    JOIN dbo.TokenMaster t WITH (INDEX (IX_TokenMaster_CompanyID_Status), FORCESEEK) ON t.CompanyID = i.CompanyID
    WHERE i.Problem IS NULL
    INSERT INTO @id (TokenID)
    SELECT DISTINCT i.PreviousID
    FROM @item i
    WHERE i.Problem IS NULL AND i.PreviousID <> 0
      AND NOT EXISTS (SELECT 1 FROM @id d WHERE d.TokenID = i.PreviousID)

    IF NOT EXISTS (SELECT 1 FROM @item WHERE Problem IS NULL)
        SET @done = 1
    WHILE @done = 0
    BEGIN
        BEGIN TRY
            SET @missed = 0
            DELETE FROM @token
            DELETE FROM @release
            DELETE FROM @change
            DELETE FROM @at_fault
            UPDATE @item
            SET Granted = N'no_token', TokenID = 0, ApiKey = NULL, Stored = LEFT(CompanyID, 256), FirstUsableMs = 0, BusyToo = 0,
                Stopped = 0, IsNew = 0, TakesKey = 0, FirstRequestID = NULL, FirstIsDone = 0
            WHERE Problem IS NULL
            BEGIN TRANSACTION

            -- Who disables tokens does so one at a time, and knows what those before did.
            SET @told = 0
            IF EXISTS (SELECT 1 FROM @item WHERE Fault = N'disable' AND PreviousID <> 0 AND Problem IS NULL)
            BEGIN
                EXEC @lock = sp_getapplock @Resource = N'extract-fcgi disabling', @LockMode = N'Exclusive', @LockOwner = N'Transaction'
                IF @lock < 0
                    THROW 50010, N'extract-fcgi: the lock for disabling tokens was not granted', 1;
                SET @now = SYSUTCDATETIME()
                INSERT INTO @at_fault (Folded)
                SELECT UPPER(CompanyID)
                FROM dbo.TokenMaster
                WHERE StatusReason LIKE N'at fault:%' AND UpdatedAt >= DATEADD(MINUTE, -1, @now)
                IF EXISTS (SELECT 1 FROM dbo.AuditLog WHERE Timestamp >= DATEADD(MINUTE, -1, @now) AND Action = N'disabling stopped')
                    SET @told = 1
            END

            -- The second time around: every Summary row in question, in order.
            SET @t = CASE WHEN @attempt = 1 THEN NULL ELSE 0 END
            WHILE @t IS NOT NULL
            BEGIN
                SET @t = (SELECT MIN(TokenID) FROM @id WHERE TokenID > @t)
                IF @t IS NOT NULL
                BEGIN
                    UPDATE s SET ReservedTokens = s.ReservedTokens FROM dbo.TokenUsageSummary s WITH (INDEX (UX_TokenUsageSummary_TokenID), ROWLOCK) WHERE s.TokenID = @t
                    IF @@ROWCOUNT = 0
                    BEGIN
                        EXEC dbo.usp_EnsureSummary @TokenID = @t
                        UPDATE s SET ReservedTokens = s.ReservedTokens FROM dbo.TokenUsageSummary s WITH (INDEX (UX_TokenUsageSummary_TokenID), ROWLOCK) WHERE s.TokenID = @t
                    END
                END
            END

            SET @now = SYSUTCDATETIME()
            INSERT INTO @token (TokenID, CompanyID, Folded, ApiKey, IsServed, IsActive, IsExpired, Limit, HasSummary, Used, Reserved, CoolingMs, CreatedAt)
            SELECT t.TokenID, LEFT(t.CompanyID, 256), UPPER(LEFT(t.CompanyID, 256)), LEFT(t.ApiKey, 4000),
                   CASE WHEN t.Provider IS NULL OR t.Provider IN (N'', N'Google', N'Gemini') THEN 1 ELSE 0 END,
                   CASE WHEN t.Status = N'Active' THEN 1 ELSE 0 END,
                   CASE WHEN t.Status = N'Expired' THEN 1 ELSE 0 END,
                   t.TotalTokenLimit,
                   CASE WHEN s.TokenID IS NULL THEN 0 ELSE 1 END,
                   ISNULL(s.TotalUsedTokens, 0), ISNULL(s.ReservedTokens, 0),
                   CASE WHEN t.CooldownUntil > @now THEN DATEDIFF_BIG(MILLISECOND, @now, t.CooldownUntil) ELSE 0 END,
                   t.CreatedAt
            FROM @id d
            JOIN dbo.TokenMaster t WITH (FORCESEEK) ON t.TokenID = d.TokenID
            LEFT JOIN dbo.TokenUsageSummary s WITH (FORCESEEK) ON s.TokenID = t.TokenID
            IF EXISTS (SELECT 1 FROM @token WHERE HasSummary = 0)
                UPDATE k
                SET Used = (SELECT ISNULL(SUM(u.TotalTokensUsed), 0) FROM dbo.TokenUsageLogs u WHERE u.TokenID = k.TokenID)
                         + (SELECT ISNULL(SUM(m.TotalTokensUsed), 0) FROM dbo.TokenUsageMonthly m WHERE m.TokenID = k.TokenID)
                FROM @token k
                WHERE k.HasSummary = 0
            -- Keys that were pasted by hand. One that is as it should be costs this look and no more.
            SET @t = 0
            WHILE 1 = 1
            BEGIN
                SET @t = (SELECT MIN(TokenID) FROM @token
                          WHERE TokenID > @t
                            AND (LEN(ApiKey) NOT BETWEEN 1 AND 1024 OR ApiKey LIKE N'%[^!-~]%' COLLATE Latin1_General_BIN2))
                IF @t IS NULL
                    BREAK
                SELECT @key = ApiKey FROM @token WHERE TokenID = @t
                EXEC dbo.usp_UsableKey @ApiKey = @key, @Usable = @key OUTPUT
                UPDATE @token SET ApiKey = @key WHERE TokenID = @t
            END

            -- 1. The plan, item by item in their order, each seeing what those before it will do.
            SET @i = -1
            WHILE 1 = 1
            BEGIN
                SET @i = (SELECT MIN(i) FROM @item WHERE i > @i AND Problem IS NULL)
                IF @i IS NULL
                    BREAK
                SELECT @request = RequestID, @sequence = Sequence, @company = CompanyID, @folded = UPPER(CompanyID), @estimate = Estimate,
                       @choice = Choice, @previous = PreviousID, @fault = Fault, @cooldown = CooldownMs, @reason = Reason, @spent = Spent,
                       @if_none = FallbackIfNone, @only = FallbackOnly, @idempotency = IdempotencyKey
                FROM @item
                WHERE i = @i

                -- The same acquire came before: the same answer.
                SET @again = NULL
                SELECT @again = ISNULL(TokenID, 0), @stored = CompanyID
                FROM dbo.TokenReservations WITH (FORCESEEK)
                WHERE RequestID = @request AND Sequence = @sequence
                IF @again IS NULL
                    SELECT @again = TokenID, @stored = Stored
                    FROM @item
                    WHERE RequestID = @request AND Sequence = @sequence AND IsNew = 1
                IF @again IS NOT NULL
                BEGIN
                    SET @key = NULL
                    IF @again <> 0
                    BEGIN
                        SELECT @stored = LEFT(CompanyID, 256), @key = LEFT(ApiKey, 4000)
                        FROM dbo.TokenMaster
                        WHERE TokenID = @again
                        EXEC dbo.usp_UsableKey @ApiKey = @key, @Usable = @key OUTPUT
                    END
                    UPDATE @item
                    SET Granted = N'token', TokenID = @again, ApiKey = @key, Stored = @stored,
                        Problem = CASE WHEN @again <> 0 AND @key IS NULL
                                       THEN N'token ' + CAST(@again AS NVARCHAR(40)) + N' has no usable CompanyID or ApiKey' END
                    WHERE i = @i
                    CONTINUE
                END

                -- What went wrong with the token before.
                IF @previous <> 0 AND @fault <> N'none' AND EXISTS (SELECT 1 FROM @token WHERE TokenID = @previous)
                BEGIN
                    SELECT @active = IsActive, @owner = Folded FROM @token WHERE TokenID = @previous
                    SET @status = CASE @fault WHEN N'disable' THEN N'Disabled' WHEN N'exceed' THEN N'Exceeded' END
                    SET @text = @reason
                    SET @stopped = 0
                    IF @fault = N'disable' AND @active = 1
                    BEGIN
                        SET @text = N'at fault: ' + @reason
                        SELECT @others = COUNT(DISTINCT Folded) FROM @at_fault WHERE Folded <> @owner
                        IF @others >= 2
                        BEGIN
                            SET @status = NULL
                            SET @cooldown = 600000
                            SET @text = @text + N' (not disabled: tokens of several companies at fault within a minute)'
                            SET @stopped = 1 - @told
                            SET @told = 1
                        END
                        INSERT INTO @at_fault (Folded) VALUES (@owner)
                    END
                    IF @status IS NULL OR @active = 1
                        INSERT INTO @change (i, TokenID, Status, CooldownMs, Reason, RequestID, Stopped)
                        VALUES (@i, @previous, @status, @cooldown, @text, @request, @stopped)
                    UPDATE @token
                    SET IsActive = CASE WHEN @status IS NULL THEN IsActive ELSE 0 END,
                        CoolingMs = CASE WHEN @status IS NULL AND CoolingMs < @cooldown THEN @cooldown ELSE CoolingMs END
                    WHERE TokenID = @previous
                    UPDATE @item SET Stopped = @stopped WHERE i = @i
                END

                -- Its reservation: the last one only; an earlier one that is open waits for a settlement.
                IF @previous <> 0 AND @spent = 0
                BEGIN
                    SET @reservation = NULL
                    SELECT TOP (1) @reservation = r.ReservationID, @amount = r.EstimatedTokens
                    FROM dbo.TokenReservations r WITH (FORCESEEK)
                    WHERE r.RequestID = @request AND r.TokenID = @previous AND r.State = N'open'
                      AND NOT EXISTS (SELECT 1 FROM @release x WHERE x.ReservationID = r.ReservationID)
                    ORDER BY r.Sequence DESC
                    IF @reservation IS NOT NULL
                    BEGIN
                        INSERT INTO @release (ReservationID, TokenID) VALUES (@reservation, @previous)
                        UPDATE @token
                        SET Reserved = CASE WHEN Reserved > @amount THEN Reserved - @amount ELSE 0 END
                        WHERE TokenID = @previous
                    END
                END

                -- Has another request of the company come with this idempotency key? What is replayed (@only) is not
                -- asked: its tokens are spent.
                SET @takes = 0
                IF @idempotency IS NOT NULL
                BEGIN
                    SET @key_company = NULL
                    SET @holder = NULL
                    SELECT TOP (1) @key_company = CompanyID
                    FROM @token
                    WHERE Folded = @folded
                    ORDER BY IsServed DESC, CreatedAt DESC, TokenID DESC
                    SET @key_company = ISNULL(@key_company, @company)
                    SELECT @holder = RequestID, @holder_done = CASE WHEN State = N'done' THEN 1 ELSE 0 END
                    FROM dbo.IdempotencyKeys WITH (FORCESEEK)
                    WHERE CompanyID = @key_company AND IdempotencyKey = @idempotency AND ExpiresAt > @now
                    IF @holder IS NULL
                        SELECT @holder = RequestID, @holder_done = 0
                        FROM @item
                        WHERE TakesKey = 1 AND KeyCompany = @key_company AND IdempotencyKey = @idempotency
                    IF @only = 0 AND @holder <> @request
                    BEGIN
                        UPDATE @item SET Granted = N'duplicate', FirstRequestID = @holder, FirstIsDone = @holder_done WHERE i = @i
                        CONTINUE
                    END
                    SET @takes = CASE WHEN @holder IS NULL THEN 1 ELSE 0 END
                END

                -- Each Active token of the company: can it serve? The only place that knows why not.
                SET @usable = 0
                SET @cooling = 0
                SET @busy = 0
                SET @active = 0
                IF @only = 0
                BEGIN
                    UPDATE k
                    SET Fit = CASE WHEN k.IsServed = 0 OR k.IsActive = 0 OR k.Folded IS NULL OR k.Folded <> @folded THEN NULL
                                   WHEN EXISTS (SELECT 1 FROM @excluded x WHERE x.i = @i AND x.TokenID = k.TokenID AND x.AtFault = 1) THEN 3
                                   WHEN k.ApiKey IS NULL OR k.Used >= k.Limit THEN 3
                                   WHEN k.CoolingMs > 0 THEN 1
                                   WHEN k.Reserved > 0 AND @estimate > k.Limit - k.Used - k.Reserved THEN 2
                                   WHEN EXISTS (SELECT 1 FROM @excluded x WHERE x.i = @i AND x.TokenID = k.TokenID) THEN 1
                                   ELSE 0 END
                    FROM @token k
                    SELECT @active = COUNT(Fit),
                           @usable = ISNULL(SUM(CASE WHEN Fit = 0 THEN 1 ELSE 0 END), 0),
                           @cooling = ISNULL(SUM(CASE WHEN Fit = 1 THEN 1 ELSE 0 END), 0),
                           @busy = ISNULL(SUM(CASE WHEN Fit = 2 THEN 1 ELSE 0 END), 0),
                           @first = MIN(CASE WHEN Fit = 1 THEN CoolingMs END)
                    FROM @token
                END
                IF @usable > 0
                BEGIN
                    SELECT @t = q.TokenID, @stored = q.CompanyID, @key = q.ApiKey
                    FROM (SELECT TokenID, CompanyID, ApiKey, ROW_NUMBER() OVER (ORDER BY TokenID) AS Nth FROM @token WHERE Fit = 0) q
                    WHERE q.Nth = @choice % @usable + 1
                    UPDATE @token SET Reserved = Reserved + @estimate WHERE TokenID = @t
                    UPDATE @item
                    SET Granted = N'token', TokenID = @t, ApiKey = @key, Stored = @stored, IsNew = 1, TakesKey = @takes, KeyCompany = @key_company
                    WHERE i = @i
                    CONTINUE
                END

                -- None. The newest token decides what is said, where none is Active; rows of other
                -- providers give the spelling, but do not count.
                SET @stored = NULL
                SET @served = 0
                SET @expired = 0
                SELECT TOP (1) @stored = CompanyID, @served = IsServed, @expired = IsExpired
                FROM @token
                WHERE Folded = @folded
                ORDER BY IsServed DESC, CreatedAt DESC, TokenID DESC
                UPDATE @item
                SET Stored = ISNULL(@stored, Stored)
                WHERE i = @i
                IF @active > 0
                    UPDATE @item
                    SET Granted = CASE WHEN @cooling > 0 THEN N'cooling' WHEN @busy > 0 THEN N'busy' ELSE N'unavailable' END,
                        FirstUsableMs = CASE WHEN @cooling > 0 THEN @first ELSE 0 END,
                        BusyToo = CASE WHEN @cooling > 0 AND @busy > 0 THEN 1 ELSE 0 END
                    WHERE i = @i
                ELSE IF @only = 1 OR (@if_none = 1 AND @served = 1)
                    UPDATE @item SET Granted = N'token', TokenID = 0, IsNew = 1, TakesKey = @takes, KeyCompany = @key_company WHERE i = @i
                ELSE
                    UPDATE @item
                    SET Granted = CASE WHEN @served = 0 THEN N'no_token' WHEN @expired = 1 THEN N'expired' ELSE N'unavailable' END
                    WHERE i = @i
            END

            -- 2. TokenUsageSummary, in ascending TokenID: first what is given back, then what is taken.
            SET @t = 0
            WHILE @missed = 0
            BEGIN
                SELECT @t = MIN(q.TokenID)
                FROM (SELECT TokenID FROM @item WHERE IsNew = 1 UNION ALL SELECT TokenID FROM @release) q
                WHERE q.TokenID > @t
                IF @t IS NULL
                    BREAK
                SELECT @limit = Limit, @has_summary = HasSummary FROM @token WHERE TokenID = @t
                IF @has_summary = 0 AND @attempt = 1
                    EXEC dbo.usp_EnsureSummary @TokenID = @t
                IF EXISTS (SELECT 1 FROM @release WHERE TokenID = @t)
                BEGIN
                    UPDATE s SET ReservedTokens = s.ReservedTokens FROM dbo.TokenUsageSummary s WITH (INDEX (UX_TokenUsageSummary_TokenID), ROWLOCK) WHERE s.TokenID = @t
                    SELECT @amount = ISNULL(SUM(r.EstimatedTokens), 0)
                    FROM @release x
                    JOIN dbo.TokenReservations r ON r.ReservationID = x.ReservationID
                    WHERE x.TokenID = @t AND r.State = N'open'
                    UPDATE s
                    SET ReservedTokens = CASE WHEN ReservedTokens > @amount THEN ReservedTokens - @amount ELSE 0 END
                    FROM dbo.TokenUsageSummary s WITH (INDEX (UX_TokenUsageSummary_TokenID), ROWLOCK)
                    WHERE s.TokenID = @t
                END
                SET @i = -1
                WHILE 1 = 1
                BEGIN
                    SET @i = (SELECT MIN(i) FROM @item WHERE i > @i AND IsNew = 1 AND TokenID = @t)
                    IF @i IS NULL
                        BREAK
                    SELECT @estimate = Estimate FROM @item WHERE i = @i
                    UPDATE s
                    SET ReservedTokens = ReservedTokens + @estimate
                    FROM dbo.TokenUsageSummary s WITH (INDEX (UX_TokenUsageSummary_TokenID), ROWLOCK)
                    WHERE s.TokenID = @t
                      AND (@limit IS NULL
                           OR (TotalUsedTokens < @limit AND (ReservedTokens <= 0 OR TotalUsedTokens + ReservedTokens + @estimate <= @limit)))
                    IF @@ROWCOUNT = 0
                    BEGIN
                        IF @attempt < 3
                        BEGIN
                            SET @missed = 1
                            BREAK
                        END
                        UPDATE @item SET Granted = N'busy', TokenID = 0, ApiKey = NULL, IsNew = 0, TakesKey = 0 WHERE i = @i
                    END
                END
            END

            IF @missed = 1
            BEGIN
                ROLLBACK TRANSACTION
                SET @attempt = @attempt + 1
            END
            ELSE
            BEGIN
                -- 3. TokenReservations.
                IF EXISTS (SELECT 1 FROM @release)
                    UPDATE dbo.TokenReservations
                    SET State = N'released', ClosedAt = @now
                    WHERE ReservationID IN (SELECT x.ReservationID FROM @release x) AND State = N'open'
                IF EXISTS (SELECT 1 FROM @item WHERE IsNew = 1)
                    INSERT INTO dbo.TokenReservations (RequestID, Sequence, TokenID, CompanyID, Branch, RequestedBy, EstimatedTokens, State,
                                                       TokenSource, Host, ProcessID, CreatedAt, ExpiresAt)
                    SELECT RequestID, Sequence, NULLIF(TokenID, 0), Stored, Branch, RequestedBy, Estimate, N'open',
                           CASE WHEN TokenID = 0 THEN N'fallback' ELSE N'store' END, LEFT(Host, 256), CAST(ProcessID AS INT), @now,
                           DATEADD(MILLISECOND, CAST(ExpiresMs % 1000 AS INT), DATEADD(SECOND, CAST(ExpiresMs / 1000 AS INT), @now))
                    FROM @item
                    WHERE IsNew = 1
                    ORDER BY i
                    OPTION (LOOP JOIN) -- for the foreign keys: no look at tokens that are not in question

                -- 4. IdempotencyKeys, in the order of their key. Of two sessions that want the same, the second gets a
                -- duplicate key, starts again, and finds the first.
                WHILE EXISTS (SELECT 1 FROM @item WHERE TakesKey = 1)
                BEGIN
                    SELECT TOP (1) @i = i, @request = RequestID, @key_company = KeyCompany, @idempotency = IdempotencyKey
                    FROM @item
                    WHERE TakesKey = 1
                    ORDER BY KeyCompany, IdempotencyKey
                    UPDATE k
                    SET RequestID = @request, State = N'in_progress', CreatedAt = @now, ExpiresAt = DATEADD(HOUR, 24, @now)
                    FROM dbo.IdempotencyKeys k WITH (INDEX (PK_IdempotencyKeys), ROWLOCK)
                    WHERE k.CompanyID = @key_company AND k.IdempotencyKey = @idempotency AND k.ExpiresAt <= @now
                    IF @@ROWCOUNT = 0
                        INSERT INTO dbo.IdempotencyKeys (CompanyID, IdempotencyKey, RequestID, State, CreatedAt, ExpiresAt)
                        VALUES (@key_company, @idempotency, @request, N'in_progress', @now, DATEADD(HOUR, 24, @now))
                    UPDATE @item SET TakesKey = 2 WHERE i = @i
                END

                -- 5. TokenMaster, in ascending TokenID.
                SET @t = 0
                WHILE 1 = 1
                BEGIN
                    SET @t = (SELECT MIN(TokenID) FROM @change WHERE TokenID > @t)
                    IF @t IS NULL
                        BREAK
                    SET @n = 0
                    WHILE 1 = 1
                    BEGIN
                        SET @n = (SELECT MIN(n) FROM @change WHERE TokenID = @t AND n > @n)
                        IF @n IS NULL
                            BREAK
                        SELECT @status = Status, @cooldown = CooldownMs, @text = Reason, @request = RequestID, @stopped = Stopped
                        FROM @change
                        WHERE n = @n
                        EXEC dbo.usp_ChangeToken @TokenID = @t, @Status = @status, @CooldownMs = @cooldown, @Reason = @text, @Detail = NULL,
                             @RequestID = @request, @Now = @now
                        IF @stopped = 1
                            INSERT INTO dbo.AuditLog (Timestamp, Actor, Action, ObjectType, ObjectID, CompanyID, RequestID, Detail)
                            SELECT @now, N'extract-fcgi', N'disabling stopped', N'TokenMaster', CAST(@t AS NVARCHAR(40)), CompanyID, @request, @text
                            FROM @token
                            WHERE TokenID = @t
                    END
                END
                COMMIT TRANSACTION
                SET @done = 1
            END
        END TRY
        BEGIN CATCH
            IF @@TRANCOUNT > 0
                ROLLBACK TRANSACTION;
            -- A duplicate key: the same acquire, Summary row or idempotency key was written meanwhile.
            IF ERROR_NUMBER() NOT IN (2601, 2627) OR @attempt >= 3
                THROW;
            SET @attempt = @attempt + 1
        END CATCH
    END

    -- From now on, not from when it was read: whoever waited for a lock has waited for some of it already.
    SET @late = DATEDIFF_BIG(MILLISECOND, @now, SYSUTCDATETIME())
    SELECT i,
           CAST(CASE WHEN Problem IS NULL THEN N'ok' ELSE N'bad_value' END AS NVARCHAR(20)) AS Code,
           Problem AS Message,
           CAST(CASE WHEN Problem IS NULL THEN Granted ELSE N'no_token' END AS NVARCHAR(20)) AS [Grant],
           CASE WHEN Problem IS NULL THEN TokenID ELSE 0 END AS TokenID,
           CAST(CASE WHEN Problem IS NULL THEN ApiKey END AS NVARCHAR(1024)) AS ApiKey,
           CAST(CASE WHEN Problem IS NULL THEN Stored END AS NVARCHAR(256)) AS CompanyID,
           CASE WHEN Problem IS NULL AND FirstUsableMs > @late THEN FirstUsableMs - @late ELSE 0 END AS FirstUsableMs,
           CASE WHEN Problem IS NULL THEN BusyToo ELSE 0 END AS BusyToo,
           CASE WHEN Problem IS NULL THEN Stopped ELSE 0 END AS DisablingStopped,
           CAST(CASE WHEN Problem IS NULL THEN FirstRequestID END AS NVARCHAR(64)) AS FirstRequestID,
           CASE WHEN Problem IS NULL THEN FirstIsDone ELSE 0 END AS FirstIsDone
    FROM @item
    ORDER BY i
END
GO

-- A token for each request of @Items (a JSON array): records what went wrong with the token before,
-- closes its reservation unless it was spent, chooses among the usable ones and reserves. Idempotent
-- on (requestId, sequence). A request with an idempotency key takes it with its first token; another of
-- the company that comes with the same one within 24 hours gets none ('duplicate').
--
-- Most batches ask for first tokens that can all be had: of companies whose tokens have room for everything
-- that the batch asks for, so that no request has to see what those before it do. These are served here,
-- in a few statements for all of them. Where one request is not so, nothing is done, and the whole batch goes
-- to usp_AcquireOneByOne.
ALTER PROCEDURE dbo.usp_AcquireTokens -- (schema 6)
    @Items NVARCHAR(MAX)
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON

    DECLARE @item TABLE (
        i              INT NOT NULL,
        IsOrdinary     INT NOT NULL,
        RequestID      NVARCHAR(4000) NULL,
        Sequence       BIGINT NULL,
        CompanyID      NVARCHAR(4000) COLLATE Latin1_General_CI_AS NULL,
        Branch         NVARCHAR(4000) NULL,
        RequestedBy    NVARCHAR(4000) NULL,
        Estimate       BIGINT NULL,
        ExpiresMs      BIGINT NULL,
        Choice         BIGINT NULL,
        IdempotencyKey NVARCHAR(4000) COLLATE Latin1_General_BIN2 NULL,
        TakesKey       INT NOT NULL,
        Host           NVARCHAR(4000) NULL,
        ProcessID      BIGINT NULL,
        TokenID        BIGINT NULL, -- NULL: none yet
        ApiKey         NVARCHAR(1024) NULL,
        Stored         NVARCHAR(256) COLLATE Latin1_General_CI_AS NULL,
        Limit          BIGINT NULL
    )
    DECLARE @id TABLE (TokenID BIGINT NOT NULL)
    DECLARE @now DATETIME2(3) = SYSUTCDATETIME(), @is_ordinary INT, @keys INT, @asked BIGINT, @t BIGINT, @next BIGINT, @estimate BIGINT, @limit BIGINT
    DECLARE @i INT, @key_company NVARCHAR(256), @idempotency NVARCHAR(128), @request NVARCHAR(64)
    DECLARE @most BIGINT = 9223372036854775807

    -- LEN forgets trailing spaces, hence the dot.
    INSERT INTO @item (i, IsOrdinary, RequestID, Sequence, CompanyID, Branch, RequestedBy, Estimate, ExpiresMs, Choice, IdempotencyKey, TakesKey, Host, ProcessID)
    SELECT j.i,
           CASE WHEN LEN(j.requestId + N'.') BETWEEN 2 AND 65 AND j.sequence BETWEEN 1 AND 2147483647 AND LEN(j.companyId + N'.') BETWEEN 2 AND 257
                     AND ISNULL(LEN(j.branch + N'.'), 0) <= 257 AND ISNULL(LEN(j.requestedBy + N'.'), 0) <= 257
                     AND j.estimate BETWEEN 0 AND 1000000000000000 AND j.expiresMs BETWEEN 0 AND 31622400000 AND j.choice >= 0
                     AND (j.idempotencyKey IS NULL OR LEN(j.idempotencyKey + N'.') BETWEEN 2 AND 129)
                     AND j.previousTokenId = 0 AND j.fault = N'none' AND j.cooldownMs = 0 AND j.fallbackOnly = 0
                     AND ISNULL(j.excluded, N'[]') NOT LIKE N'%{%' THEN 1
                ELSE 0 END,
           j.requestId, j.sequence, j.companyId, j.branch, j.requestedBy, j.estimate, j.expiresMs, j.choice, j.idempotencyKey,
           CASE WHEN j.idempotencyKey IS NULL THEN 0 ELSE 1 END, j.host, j.processId
    FROM OPENJSON(@Items) WITH (
        i INT, requestId NVARCHAR(4000) '$.requestId', sequence BIGINT, companyId NVARCHAR(4000) '$.companyId', branch NVARCHAR(4000),
        requestedBy NVARCHAR(4000) '$.requestedBy', estimate BIGINT, expiresMs BIGINT '$.expiresMs', choice BIGINT,
        previousTokenId BIGINT '$.previousTokenId', fault NVARCHAR(20), cooldownMs BIGINT '$.cooldownMs',
        fallbackOnly INT '$.fallbackOnly', idempotencyKey NVARCHAR(4000) '$.idempotencyKey', host NVARCHAR(4000),
        processId BIGINT '$.processId', excluded NVARCHAR(MAX) AS JSON) j
    SELECT @is_ordinary = ISNULL(MIN(IsOrdinary), 0), @asked = SUM(CASE WHEN IsOrdinary = 1 THEN Estimate ELSE 0 END), @keys = SUM(TakesKey) FROM @item
    IF @@TRANCOUNT > 0
        SET @is_ordinary = 0 -- to go back from here would take back the caller's transaction

    -- A token for each. Fit: 0 usable; 1 not now, or never; 2 for the other procedure to look at (a key that was pasted by
    -- hand, no Summary row, too little room for all).
    IF @is_ordinary = 1
    BEGIN
        -- Whose tokens are in question: by the index alone, and never holding a lock of it.
        INSERT INTO @id (TokenID)
        SELECT t.TokenID
        FROM (SELECT DISTINCT CompanyID FROM @item) c
        JOIN dbo.TokenMaster t WITH (INDEX (IX_TokenMaster_CompanyID_Status), FORCESEEK) ON t.CompanyID = c.CompanyID
        UPDATE i
        SET TokenID = k.TokenID, ApiKey = k.ApiKey, Stored = k.CompanyID, Limit = ISNULL(k.Limit, @most)
        FROM @item i
        JOIN (SELECT q.TokenID, q.CompanyID, q.Folded, q.ApiKey, q.Limit, q.Fit, MAX(q.Fit) OVER (PARTITION BY q.Folded) AS WorstFit,
                     ROW_NUMBER() OVER (PARTITION BY q.Folded, q.Fit ORDER BY q.TokenID) - 1 AS Nth,
                     COUNT(*) OVER (PARTITION BY q.Folded, q.Fit) AS Alike,
                     MIN(q.Spelling) OVER (PARTITION BY q.Folded) AS FirstSpelling, MAX(q.Spelling) OVER (PARTITION BY q.Folded) AS LastSpelling
              FROM (SELECT t.TokenID, LEFT(t.CompanyID, 256) AS CompanyID, LEFT(t.CompanyID, 256) COLLATE Latin1_General_BIN2 AS Spelling,
                           UPPER(LEFT(t.CompanyID, 256)) COLLATE Latin1_General_BIN2 AS Folded, LEFT(t.ApiKey, 1024) AS ApiKey,
                           t.TotalTokenLimit AS Limit,
                           CASE WHEN ISNULL(t.Status, N'') <> N'Active' OR t.Provider NOT IN (N'', N'Google', N'Gemini') THEN 1
                                WHEN s.TokenID IS NULL OR t.ApiKey IS NULL OR LEN(t.ApiKey) NOT BETWEEN 1 AND 1024
                                     OR t.ApiKey LIKE N'%[^!-~]%' COLLATE Latin1_General_BIN2 THEN 2
                                WHEN s.TotalUsedTokens >= t.TotalTokenLimit OR t.CooldownUntil > @now THEN 1
                                WHEN s.TotalUsedTokens + s.ReservedTokens + @asked > t.TotalTokenLimit THEN 2
                                ELSE 0 END AS Fit
                    FROM @id d
                    JOIN dbo.TokenMaster t WITH (FORCESEEK) ON t.TokenID = d.TokenID
                    LEFT JOIN dbo.TokenUsageSummary s WITH (FORCESEEK) ON s.TokenID = t.TokenID) q) k
            ON k.Folded = UPPER(i.CompanyID) COLLATE Latin1_General_BIN2 AND k.Nth = i.Choice % k.Alike
        WHERE k.Fit = 0 AND k.WorstFit < 2
          -- An idempotency key goes by the newest token's spelling of the company: here it must be that of all.
          AND (i.TakesKey = 0 OR k.FirstSpelling = k.LastSpelling)
        IF EXISTS (SELECT 1 FROM @item WHERE TokenID IS NULL)
            SET @is_ordinary = 0
    END
    IF @is_ordinary = 1
    BEGIN
        BEGIN TRY
            BEGIN TRANSACTION
            -- TokenUsageSummary, in ascending TokenID: whatever has changed since, there must be room still.
            SET @t = 0
            WHILE 1 = 1
            BEGIN
                SET @next = NULL
                SELECT TOP (1) @next = TokenID, @estimate = SUM(Estimate), @limit = MAX(Limit)
                FROM @item
                WHERE TokenID > @t
                GROUP BY TokenID
                ORDER BY TokenID
                IF @next IS NULL
                    BREAK
                SET @t = @next
                UPDATE s
                SET ReservedTokens = ReservedTokens + @estimate
                FROM dbo.TokenUsageSummary s WITH (INDEX (UX_TokenUsageSummary_TokenID), ROWLOCK)
                WHERE s.TokenID = @t AND TotalUsedTokens < @limit AND TotalUsedTokens + ReservedTokens + @estimate <= @limit
                IF @@ROWCOUNT = 0
                BEGIN
                    SET @is_ordinary = 0
                    BREAK
                END
            END
            IF @is_ordinary = 1
            BEGIN
                INSERT INTO dbo.TokenReservations (RequestID, Sequence, TokenID, CompanyID, Branch, RequestedBy, EstimatedTokens, State,
                                                   TokenSource, Host, ProcessID, CreatedAt, ExpiresAt)
                SELECT RequestID, Sequence, TokenID, Stored, Branch, RequestedBy, Estimate, N'open', N'store', LEFT(Host, 256),
                       CAST(ProcessID AS INT), @now,
                       DATEADD(MILLISECOND, CAST(ExpiresMs % 1000 AS INT), DATEADD(SECOND, CAST(ExpiresMs / 1000 AS INT), @now))
                FROM @item
                ORDER BY i
                OPTION (LOOP JOIN) -- for the foreign keys: no look at tokens that are not in question
                -- IdempotencyKeys, one by one in the order of their key.
                WHILE @keys > 0
                BEGIN
                    SELECT TOP (1) @i = i, @request = RequestID, @key_company = Stored, @idempotency = IdempotencyKey
                    FROM @item
                    WHERE TakesKey = 1
                    ORDER BY Stored, IdempotencyKey
                    INSERT INTO dbo.IdempotencyKeys (CompanyID, IdempotencyKey, RequestID, State, CreatedAt, ExpiresAt)
                    VALUES (@key_company, @idempotency, @request, N'in_progress', @now, DATEADD(HOUR, 24, @now))
                    UPDATE @item SET TakesKey = 2 WHERE i = @i
                    SET @keys = @keys - 1
                END
                COMMIT TRANSACTION
            END
            ELSE
                ROLLBACK TRANSACTION
        END TRY
        BEGIN CATCH
            IF @@TRANCOUNT > 0
                ROLLBACK TRANSACTION;
            -- A duplicate key: the same acquire or idempotency key came before, or twice in this batch.
            IF ERROR_NUMBER() NOT IN (2601, 2627)
                THROW;
            SET @is_ordinary = 0
        END CATCH
    END
    IF @is_ordinary = 0
    BEGIN
        EXEC dbo.usp_AcquireOneByOne @Items = @Items
        RETURN 0
    END
    SELECT i, CAST(N'ok' AS NVARCHAR(20)) AS Code, CAST(NULL AS NVARCHAR(400)) AS Message, CAST(N'token' AS NVARCHAR(20)) AS [Grant], TokenID,
           ApiKey, CAST(Stored AS NVARCHAR(256)) AS CompanyID, CAST(0 AS BIGINT) AS FirstUsableMs, 0 AS BusyToo, 0 AS DisablingStopped,
           CAST(NULL AS NVARCHAR(64)) AS FirstRequestID, 0 AS FirstIsDone
    FROM @item
    ORDER BY i
END
GO

-- All that usp_SettleUsage promises, for any batch. Since the token's Summary row is locked first, nobody else
-- settles or releases the same meanwhile.
ALTER PROCEDURE dbo.usp_SettleOneByOne -- (schema 6)
    @Items NVARCHAR(MAX)
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON

    DECLARE @item TABLE (
        i                    INT NOT NULL PRIMARY KEY,
        RequestID            NVARCHAR(4000) NULL,
        TokenID              BIGINT NULL,
        CompanyID            NVARCHAR(4000) COLLATE Latin1_General_CI_AS NULL,
        Branch               NVARCHAR(4000) NULL,
        RequestedBy          NVARCHAR(4000) NULL,
        ClientKeyID          NVARCHAR(4000) NULL,
        TraceID              NVARCHAR(4000) NULL,
        TokenSource          NVARCHAR(4000) NULL,
        Model                NVARCHAR(4000) NULL,
        InputTokens          BIGINT NULL,
        OutputTokens         BIGINT NULL,
        TextPromptTokens     BIGINT NULL,
        ImagePromptTokens    BIGINT NULL,
        TextCandidatesTokens BIGINT NULL,
        ThoughtsTokens       BIGINT NULL,
        CachedTokens         BIGINT NULL,
        TotalTokens          BIGINT NULL,
        RequestCount         BIGINT NULL,
        UnknownCalls         BIGINT NULL,
        DurationMs           BIGINT NULL,
        LoggedText           NVARCHAR(4000) NULL,
        LoggedAt             DATETIME2(3) NULL,
        Fault                NVARCHAR(20) NULL,
        CooldownMs           BIGINT NULL,
        Reason               NVARCHAR(4000) NULL,
        Idempotency          INT NULL,
        ReleaseSequence      BIGINT NULL,
        ReleaseTokenID       BIGINT NULL,        -- of the reservation that is released; NULL: there is none yet
        Host                 NVARCHAR(4000) NULL,
        ProcessID            BIGINT NULL,
        Problem              NVARCHAR(400) NULL, -- not NULL: bad_value
        Position             INT NULL,           -- by RequestID for the fallback key, else by TokenID
        Crossed              INT NULL,
        Exceeded             INT NULL,
        Stopped              INT NULL
    )
    DECLARE @token TABLE (
        TokenID   BIGINT NOT NULL PRIMARY KEY,
        CompanyID NVARCHAR(256) COLLATE Latin1_General_CI_AS NULL,
        Folded    NVARCHAR(256) COLLATE Latin1_General_BIN2 NULL,
        Limit     BIGINT NULL
    )
    DECLARE @change TABLE (n INT IDENTITY(1, 1) PRIMARY KEY, i INT, TokenID BIGINT, Fault NVARCHAR(20), CooldownMs BIGINT NULL,
                           Reason NVARCHAR(1000), Detail NVARCHAR(1000) NULL, RequestID NVARCHAR(64))
    DECLARE @at_fault TABLE (Folded NVARCHAR(256) COLLATE Latin1_General_BIN2 NULL)

    DECLARE @now DATETIME2(3), @attempt INT = 1, @done INT = 0, @lock INT, @told INT, @others INT, @n INT, @t BIGINT, @position INT
    DECLARE @i INT, @request NVARCHAR(64), @company NVARCHAR(256), @stored NVARCHAR(256), @owner NVARCHAR(256), @fault NVARCHAR(20)
    DECLARE @cooldown BIGINT, @reason NVARCHAR(1000), @detail NVARCHAR(1000), @status NVARCHAR(20), @changed INT, @stopped INT
    DECLARE @count BIGINT, @unknown BIGINT, @total BIGINT, @limit BIGINT, @used BIGINT, @threshold FLOAT, @crossed_at DATETIME2(3)
    DECLARE @pending INT, @last BIGINT, @open BIGINT, @known INT, @sequence INT, @release INT
    DECLARE @time NVARCHAR(100) = N'[12][0-9][0-9][0-9]-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9]%'

    INSERT INTO @item (i, RequestID, TokenID, CompanyID, Branch, RequestedBy, ClientKeyID, TraceID, TokenSource, Model, InputTokens, OutputTokens,
                       TextPromptTokens, ImagePromptTokens, TextCandidatesTokens, ThoughtsTokens, CachedTokens, TotalTokens, RequestCount,
                       UnknownCalls, DurationMs, LoggedText, LoggedAt, Fault, CooldownMs, Reason, Idempotency, ReleaseSequence, Host,
                       ProcessID)
    SELECT j.i, j.requestId, ISNULL(j.tokenId, 0), j.companyId, j.branch, j.requestedBy, j.clientKeyId, j.traceId, j.tokenSource, j.model,
           j.inputTokens, j.outputTokens, j.textPromptTokens, j.imagePromptTokens, j.textCandidatesTokens, j.thoughtsTokens,
           j.cachedTokens, j.totalTokens, j.requestCount, ISNULL(j.unknownCalls, 0), j.durationMs, j.loggedAt,
           CASE WHEN j.loggedAt LIKE @time THEN TRY_CONVERT(DATETIME2(3), LEFT(j.loggedAt, 23), 126) END, ISNULL(j.fault, N'none'), ISNULL(j.cooldownMs, 0), j.reason,
           ISNULL(j.idempotency, 0), ISNULL(j.releaseSequence, 0), j.host, j.processId
    FROM OPENJSON(@Items) WITH (
        i INT, requestId NVARCHAR(4000) '$.requestId', tokenId BIGINT '$.tokenId', companyId NVARCHAR(4000) '$.companyId',
        branch NVARCHAR(4000), requestedBy NVARCHAR(4000) '$.requestedBy', clientKeyId NVARCHAR(4000) '$.clientKeyId',
        traceId NVARCHAR(4000) '$.traceId', tokenSource NVARCHAR(4000) '$.tokenSource', model NVARCHAR(4000), inputTokens BIGINT '$.inputTokens',
        outputTokens BIGINT '$.outputTokens', textPromptTokens BIGINT '$.textPromptTokens',
        imagePromptTokens BIGINT '$.imagePromptTokens', textCandidatesTokens BIGINT '$.textCandidatesTokens',
        thoughtsTokens BIGINT '$.thoughtsTokens', cachedTokens BIGINT '$.cachedTokens', totalTokens BIGINT '$.totalTokens',
        requestCount BIGINT '$.requestCount', unknownCalls BIGINT '$.unknownCalls', durationMs BIGINT '$.durationMs',
        loggedAt NVARCHAR(4000) '$.loggedAt', fault NVARCHAR(20), cooldownMs BIGINT '$.cooldownMs', reason NVARCHAR(4000),
        idempotency INT, releaseSequence BIGINT '$.releaseSequence', host NVARCHAR(4000), processId BIGINT '$.processId') j

    UPDATE @item
    SET Crossed = 0, Exceeded = 0, Stopped = 0,
        Reason = CASE WHEN ISNULL(Reason, N'') = N'' THEN N'no reason given' ELSE LEFT(Reason, 800) END,
        Problem = CASE
            WHEN ISNULL(LEN(RequestID + N'.'), 0) NOT BETWEEN 2 AND 65 THEN N'request_id must have 1 to 64 bytes'
            WHEN TokenID < 0 THEN N'token_id must not be negative'
            WHEN ISNULL(LEN(CompanyID + N'.'), 0) NOT BETWEEN 2 AND 257 THEN N'company_id must have 1 to 256 bytes'
            WHEN ISNULL(LEN(Branch + N'.'), 0) > 257 OR ISNULL(LEN(RequestedBy + N'.'), 0) > 257
                THEN N'branch and requested_by must have at most 256 bytes'
            WHEN ISNULL(LEN(ClientKeyID + N'.'), 0) > 65 THEN N'client_key_id must have at most 64 bytes'
            WHEN LEN(TraceID + N'.') NOT BETWEEN 2 AND 33 THEN N'trace_id must have 1 to 32 bytes'
            WHEN ISNULL(TokenSource, N'') NOT IN (N'store', N'fallback') THEN N'token_source must be store or fallback'
            WHEN ISNULL(InputTokens, -1) NOT BETWEEN 0 AND 1000000000000000 OR ISNULL(OutputTokens, -1) NOT BETWEEN 0 AND 1000000000000000
                 OR ISNULL(TextPromptTokens, -1) NOT BETWEEN 0 AND 1000000000000000
                 OR ISNULL(ImagePromptTokens, -1) NOT BETWEEN 0 AND 1000000000000000
                 OR ISNULL(TextCandidatesTokens, -1) NOT BETWEEN 0 AND 1000000000000000
                 OR ISNULL(ThoughtsTokens, -1) NOT BETWEEN 0 AND 1000000000000000
                 OR ISNULL(CachedTokens, -1) NOT BETWEEN 0 AND 1000000000000000
                 OR ISNULL(TotalTokens, -1) NOT BETWEEN 0 AND 1000000000000000
                THEN N'each count of tokens must be 0 to 10^15'
            WHEN ISNULL(RequestCount, -1) < 0 OR UnknownCalls < 0 THEN N'counts of calls must not be negative'
            WHEN ISNULL(DurationMs, 0) < 0 THEN N'duration_ms must not be negative'
            WHEN LoggedText IS NOT NULL AND LoggedAt IS NULL THEN N'logged_ms is no time'
            WHEN Idempotency NOT IN (0, 1, 2) THEN N'idempotency must be 0, 1 or 2'
            WHEN ReleaseSequence NOT BETWEEN 0 AND 2147483647 THEN N'release_sequence must not be negative'
            WHEN CooldownMs NOT BETWEEN 0 AND 31622400000 THEN N'a cooldown must be 0 to 366 days'
            WHEN Fault NOT IN (N'none', N'cooldown', N'disable', N'exceed') THEN N'fault must be none, cooldown, disable or exceed'
        END
    UPDATE t
    SET Position = q.Position
    FROM @item t
    JOIN (SELECT i, CAST(ROW_NUMBER() OVER (ORDER BY TokenID, CASE WHEN TokenID = 0 THEN RequestID END, i) AS INT) AS Position FROM @item) q
        ON q.i = t.i

    IF NOT EXISTS (SELECT 1 FROM @item WHERE Problem IS NULL)
        SET @done = 1
    WHILE @done = 0
    BEGIN
        BEGIN TRY
            DELETE FROM @token
            DELETE FROM @change
            DELETE FROM @at_fault
            UPDATE @item SET Crossed = 0, Exceeded = 0, Stopped = 0
            BEGIN TRANSACTION

            -- Who disables tokens does so one at a time, and knows what those before did.
            SET @told = 0
            IF EXISTS (SELECT 1 FROM @item WHERE Fault = N'disable' AND TokenID <> 0 AND Problem IS NULL)
            BEGIN
                EXEC @lock = sp_getapplock @Resource = N'extract-fcgi disabling', @LockMode = N'Exclusive', @LockOwner = N'Transaction'
                IF @lock < 0
                    THROW 50010, N'extract-fcgi: the lock for disabling tokens was not granted', 1;
                SET @now = SYSUTCDATETIME()
                INSERT INTO @at_fault (Folded)
                SELECT UPPER(CompanyID)
                FROM dbo.TokenMaster
                WHERE StatusReason LIKE N'at fault:%' AND UpdatedAt >= DATEADD(MINUTE, -1, @now)
                IF EXISTS (SELECT 1 FROM dbo.AuditLog WHERE Timestamp >= DATEADD(MINUTE, -1, @now) AND Action = N'disabling stopped')
                    SET @told = 1
            END

            -- Whose reservation is released? The row keeps its token, so this may be read before it is locked.
            IF EXISTS (SELECT 1 FROM @item WHERE ReleaseSequence > 0)
                UPDATE q
                SET ReleaseTokenID = (SELECT ISNULL(r.TokenID, 0) FROM dbo.TokenReservations r WITH (FORCESEEK)
                                      WHERE r.RequestID = q.RequestID AND r.Sequence = q.ReleaseSequence)
                FROM @item q
                WHERE q.ReleaseSequence > 0

            -- 1. The Summary rows, one by one in ascending TokenID.
            SET @t = 0
            WHILE 1 = 1
            BEGIN
                SET @t = (SELECT MIN(q.TokenID)
                          FROM (SELECT TokenID FROM @item WHERE Problem IS NULL
                                UNION ALL
                                SELECT ReleaseTokenID FROM @item WHERE Problem IS NULL) q
                          WHERE q.TokenID > @t)
                IF @t IS NULL
                    BREAK
                UPDATE s SET ReservedTokens = s.ReservedTokens FROM dbo.TokenUsageSummary s WITH (INDEX (UX_TokenUsageSummary_TokenID), ROWLOCK) WHERE s.TokenID = @t
                IF @@ROWCOUNT = 0
                BEGIN
                    EXEC dbo.usp_EnsureSummary @TokenID = @t
                    UPDATE s SET ReservedTokens = s.ReservedTokens FROM dbo.TokenUsageSummary s WITH (INDEX (UX_TokenUsageSummary_TokenID), ROWLOCK) WHERE s.TokenID = @t
                END
                INSERT INTO @token (TokenID, CompanyID, Folded, Limit)
                SELECT TokenID, LEFT(CompanyID, 256), UPPER(LEFT(CompanyID, 256)), TotalTokenLimit
                FROM dbo.TokenMaster
                WHERE TokenID = @t
            END
            SET @now = SYSUTCDATETIME()

            -- 2. Item by item.
            SET @position = 0
            WHILE 1 = 1
            BEGIN
                SET @position = (SELECT MIN(Position) FROM @item WHERE Position > @position AND Problem IS NULL)
                IF @position IS NULL
                    BREAK
                SELECT @i = i, @request = RequestID, @t = TokenID, @company = CompanyID, @total = TotalTokens, @count = RequestCount,
                       @unknown = UnknownCalls, @fault = Fault, @cooldown = CooldownMs, @reason = Reason,
                       @release = CAST(ReleaseSequence AS INT), @open = ReleaseTokenID
                FROM @item
                WHERE Position = @position
                IF @release > 0
                BEGIN
                    IF @open IS NOT NULL
                    BEGIN
                        SET @t = @open
                        SET @open = 0
                        SELECT @open = EstimatedTokens
                        FROM dbo.TokenReservations WITH (FORCESEEK)
                        WHERE RequestID = @request AND Sequence = @release AND State = N'open'
                        IF @t <> 0 AND @open > 0
                            UPDATE s
                            SET ReservedTokens = CASE WHEN ReservedTokens > @open THEN ReservedTokens - @open ELSE 0 END
                            FROM dbo.TokenUsageSummary s WITH (INDEX (UX_TokenUsageSummary_TokenID), ROWLOCK)
                            WHERE s.TokenID = @t
                        UPDATE r
                        SET State = N'released', ClosedAt = @now, UnknownCalls = 0
                        FROM dbo.TokenReservations r WITH (INDEX (UX_TokenReservations_RequestID_Sequence), ROWLOCK)
                        WHERE r.RequestID = @request AND r.Sequence = @release AND r.ClosedAt IS NULL
                    END
                    -- The same twice in one batch: once. One that has come since: a duplicate key, and again.
                    ELSE IF NOT EXISTS (SELECT 1 FROM @item
                                        WHERE RequestID = @request AND ReleaseSequence = @release AND Position < @position AND Problem IS NULL)
                        INSERT INTO dbo.TokenReservations (RequestID, Sequence, TokenID, CompanyID, Branch, RequestedBy, EstimatedTokens, State,
                                                           UnknownCalls, TokenSource, Host, ProcessID, CreatedAt, ExpiresAt, ClosedAt)
                        SELECT RequestID, @release, NULL, LEFT(CompanyID, 256), Branch, RequestedBy, 0, N'released', 0, N'fallback', LEFT(Host, 256),
                               CAST(ProcessID AS INT), @now, @now, @now
                        FROM @item
                        WHERE i = @i
                    CONTINUE
                END
                IF EXISTS (SELECT 1 FROM dbo.TokenUsageLogs WITH (FORCESEEK) WHERE RequestID = @request AND TokenID = @t)
                   OR (@t = 0 AND EXISTS (SELECT 1 FROM dbo.TokenUsageLogs WITH (FORCESEEK) WHERE RequestID = @request AND TokenID IS NULL))
                    CONTINUE
                SET @known = 0
                SET @limit = NULL
                SET @stored = NULL
                SELECT @known = 1, @stored = CompanyID, @limit = Limit FROM @token WHERE TokenID = @t
                IF @t <> 0 AND @known = 0
                BEGIN
                    IF @count > 0 OR @unknown > 0
                        UPDATE @item SET Problem = N'token ' + CAST(@t AS NVARCHAR(40)) + N' was deleted' WHERE i = @i
                    CONTINUE
                END
                -- What the request still has with the token.
                SELECT @pending = COUNT(*), @last = MAX(ReservationID),
                       @open = ISNULL(SUM(CASE WHEN State = N'open' THEN EstimatedTokens ELSE 0 END), 0),
                       @stored = ISNULL(@stored, MAX(CompanyID))
                FROM dbo.TokenReservations WITH (FORCESEEK)
                WHERE RequestID = @request AND ClosedAt IS NULL
                  AND (TokenID = @t OR (@t = 0 AND TokenID IS NULL))
                SET @stored = ISNULL(@stored, @company)

                IF @count > 0
                BEGIN
                    INSERT INTO dbo.TokenUsageLogs (TokenID, Branch, RequestedBy, InputTokens, OutputTokens, TextPromptTokens,
                                                    ImagePromptTokens, TextCandidatesTokens, TotalTokensUsed, RequestCount, LoggedAt, RequestID,
                                                    CompanyID, ClientKeyID, TokenSource, ThoughtsTokens, CachedTokens, UnknownCalls, Model,
                                                    DurationMs, TraceID)
                    SELECT NULLIF(TokenID, 0), Branch, RequestedBy, InputTokens, OutputTokens, TextPromptTokens, ImagePromptTokens,
                           TextCandidatesTokens, TotalTokens, RequestCount, ISNULL(LoggedAt, @now), RequestID, @stored, ClientKeyID,
                           TokenSource, ThoughtsTokens, CachedTokens, UnknownCalls, LEFT(Model, 256), DurationMs, TraceID
                    FROM @item
                    WHERE i = @i
                    IF @pending > 0
                        UPDATE r
                        SET State = N'settled', ClosedAt = @now, UnknownCalls = @unknown
                        FROM dbo.TokenReservations r WITH (INDEX (UX_TokenReservations_RequestID_Sequence), ROWLOCK)
                        WHERE r.RequestID = @request AND ClosedAt IS NULL
                          AND (TokenID = @t OR (@t = 0 AND TokenID IS NULL))
                    IF @t <> 0
                    BEGIN
                        -- Divided, not multiplied: 7 of 100 is 0.07 exactly as it is written.
                        SELECT @used = TotalUsedTokens + @total, @crossed_at = ThresholdCrossedAt,
                               @threshold = CASE WHEN Threshold > 0 AND Threshold <= 1 THEN Threshold
                                                 WHEN Threshold > 1 AND Threshold <= 100 THEN Threshold / 100.0
                                                 ELSE 0.8 END
                        FROM dbo.TokenUsageSummary WITH (FORCESEEK)
                        WHERE TokenID = @t
                        IF @crossed_at IS NULL AND @limit IS NOT NULL
                           AND CASE WHEN @used >= @limit THEN 1
                                    WHEN CAST(@used AS FLOAT) / CAST(@limit AS FLOAT) >= @threshold THEN 1
                                    ELSE 0 END = 1
                        BEGIN
                            SET @crossed_at = @now
                            UPDATE @item SET Crossed = 1 WHERE i = @i
                        END
                        UPDATE s
                        SET TotalUsedTokens = @used,
                            TotalRemainingTokens = @limit - @used,
                            ReservedTokens = CASE WHEN ReservedTokens > @open THEN ReservedTokens - @open ELSE 0 END,
                            ThresholdCrossedAt = @crossed_at,
                            LastUpdated = @now
                        FROM dbo.TokenUsageSummary s WITH (INDEX (UX_TokenUsageSummary_TokenID), ROWLOCK)
                        WHERE s.TokenID = @t
                        IF @used >= @limit
                            INSERT INTO @change (i, TokenID, Fault, Reason, Detail, RequestID)
                            VALUES (@i, @t, N'limit', N'limit of ' + CAST(@limit AS NVARCHAR(40)) + N' tokens reached', N'limit reached', @request)
                    END
                END
                ELSE
                BEGIN
                    IF @t <> 0 AND @open > 0
                        UPDATE s
                        SET ReservedTokens = CASE WHEN ReservedTokens > @open THEN ReservedTokens - @open ELSE 0 END
                        FROM dbo.TokenUsageSummary s WITH (INDEX (UX_TokenUsageSummary_TokenID), ROWLOCK)
                        WHERE s.TokenID = @t
                    IF @unknown = 0
                    BEGIN
                        IF @pending > 0
                            UPDATE r
                            SET State = N'released', ClosedAt = @now, UnknownCalls = 0
                            FROM dbo.TokenReservations r WITH (INDEX (UX_TokenReservations_RequestID_Sequence), ROWLOCK)
                            WHERE r.RequestID = @request AND ClosedAt IS NULL
                              AND (TokenID = @t OR (@t = 0 AND TokenID IS NULL))
                    END
                    ELSE IF @pending > 0
                        -- One row stands for all of the request's unknown calls with the token: the last.
                        -- Those before it are released, so that nobody counts them twice.
                        UPDATE r
                        SET State = CASE WHEN ReservationID = @last THEN N'unsettled' ELSE N'released' END,
                            UnknownCalls = CASE WHEN ReservationID = @last THEN @unknown ELSE 0 END,
                            ClosedAt = CASE WHEN ReservationID = @last THEN NULL ELSE @now END
                        FROM dbo.TokenReservations r WITH (INDEX (UX_TokenReservations_RequestID_Sequence), ROWLOCK)
                        WHERE r.RequestID = @request AND ClosedAt IS NULL
                          AND (TokenID = @t OR (@t = 0 AND TokenID IS NULL))
                    ELSE
                    BEGIN
                        -- No reservation (its acquire never reached this database): leave one, numbered
                        -- below those of acquires.
                        SELECT @sequence = ISNULL(MIN(Sequence), 0) FROM dbo.TokenReservations WITH (FORCESEEK) WHERE RequestID = @request
                        SET @sequence = CASE WHEN @sequence > 0 THEN -1 ELSE @sequence - 1 END
                        INSERT INTO dbo.TokenReservations (RequestID, Sequence, TokenID, CompanyID, Branch, RequestedBy, EstimatedTokens, State,
                                                           UnknownCalls, TokenSource, Host, ProcessID, CreatedAt, ExpiresAt)
                        SELECT RequestID, @sequence, NULLIF(TokenID, 0), @stored, Branch, RequestedBy, 0, N'unsettled', UnknownCalls,
                               CASE WHEN TokenID = 0 THEN N'fallback' ELSE N'store' END, LEFT(Host, 256), CAST(ProcessID AS INT), @now, @now
                        FROM @item
                        WHERE i = @i
                    END
                END
                IF @t <> 0 AND @fault <> N'none'
                    INSERT INTO @change (i, TokenID, Fault, CooldownMs, Reason, RequestID)
                    VALUES (@i, @t, @fault, @cooldown, @reason, @request)
            END

            -- 3. IdempotencyKeys: also of what was settled before. What was done stays done.
            IF EXISTS (SELECT 1 FROM @item WHERE Idempotency = 2 AND Problem IS NULL)
                UPDATE k
                SET State = N'done'
                FROM @item q
                JOIN dbo.IdempotencyKeys k WITH (INDEX (IX_IdempotencyKeys_RequestID), FORCESEEK, ROWLOCK) ON k.RequestID = q.RequestID
                WHERE q.Idempotency = 2 AND q.Problem IS NULL
            IF EXISTS (SELECT 1 FROM @item WHERE Idempotency = 1 AND Problem IS NULL)
                DELETE k
                FROM @item q
                JOIN dbo.IdempotencyKeys k WITH (INDEX (IX_IdempotencyKeys_RequestID), FORCESEEK, ROWLOCK) ON k.RequestID = q.RequestID
                WHERE q.Idempotency = 1 AND q.Problem IS NULL AND k.State = N'in_progress'

            -- 4. TokenMaster, in ascending TokenID (the order in which the items were taken).
            SET @n = 0
            WHILE 1 = 1
            BEGIN
                SET @n = (SELECT MIN(n) FROM @change WHERE n > @n)
                IF @n IS NULL
                    BREAK
                SELECT @i = c.i, @t = c.TokenID, @fault = c.Fault, @cooldown = c.CooldownMs, @reason = c.Reason, @detail = c.Detail,
                       @request = c.RequestID, @owner = k.Folded, @stored = k.CompanyID
                FROM @change c
                JOIN @token k ON k.TokenID = c.TokenID
                WHERE c.n = @n
                SET @status = CASE @fault WHEN N'disable' THEN N'Disabled' WHEN N'exceed' THEN N'Exceeded' WHEN N'limit' THEN N'Exceeded' END
                SET @stopped = 0
                IF @fault = N'disable'
                BEGIN
                    IF NOT EXISTS (SELECT 1 FROM dbo.TokenMaster WHERE TokenID = @t AND Status = N'Active')
                        CONTINUE
                    SET @reason = N'at fault: ' + @reason
                    SELECT @others = COUNT(DISTINCT Folded) FROM @at_fault WHERE Folded <> @owner
                    IF @others >= 2
                    BEGIN
                        SET @status = NULL
                        SET @cooldown = 600000
                        SET @reason = @reason + N' (not disabled: tokens of several companies at fault within a minute)'
                        SET @stopped = 1 - @told
                        SET @told = 1
                    END
                    INSERT INTO @at_fault (Folded) VALUES (@owner)
                END
                EXEC dbo.usp_ChangeToken @TokenID = @t, @Status = @status, @CooldownMs = @cooldown, @Reason = @reason, @Detail = @detail,
                     @RequestID = @request, @Now = @now, @Changed = @changed OUTPUT
                IF @fault = N'limit' AND @changed > 0
                    UPDATE @item SET Exceeded = 1 WHERE i = @i
                IF @stopped = 1
                BEGIN
                    UPDATE @item SET Stopped = 1 WHERE i = @i
                    INSERT INTO dbo.AuditLog (Timestamp, Actor, Action, ObjectType, ObjectID, CompanyID, RequestID, Detail)
                    VALUES (@now, N'extract-fcgi', N'disabling stopped', N'TokenMaster', CAST(@t AS NVARCHAR(40)), @stored, @request, @reason)
                END
            END
            COMMIT TRANSACTION
            SET @done = 1
        END TRY
        BEGIN CATCH
            IF @@TRANCOUNT > 0
                ROLLBACK TRANSACTION;
            -- A duplicate key: the same settlement, Summary row or released acquire was written meanwhile.
            IF ERROR_NUMBER() NOT IN (2601, 2627) OR @attempt >= 3
                THROW;
            SET @attempt = @attempt + 1
        END CATCH
    END

    SELECT i,
           CAST(CASE WHEN Problem IS NULL THEN N'ok' ELSE N'bad_value' END AS NVARCHAR(20)) AS Code,
           Problem AS Message,
           CASE WHEN Problem IS NULL THEN Crossed ELSE 0 END AS ThresholdCrossed,
           CASE WHEN Problem IS NULL THEN Exceeded ELSE 0 END AS Exceeded,
           CASE WHEN Problem IS NULL THEN Stopped ELSE 0 END AS DisablingStopped
    FROM @item
    ORDER BY i
END
GO

-- Settles each item of @Items (a JSON array): what a request did with one token. Idempotent on
-- (requestId, tokenId): the usage row is what makes it happen once, and where it exists nothing is
-- done.
--   requestCount > 0        a usage row, the sums, the reservation is settled
--   else unknownCalls > 0   no row: the reservation becomes unsettled
--   else                    the reservation is released
-- releaseSequence > 0: of an acquire whose answer nobody heard. What it has reserved is released; where it
-- has not come yet, a row in its place makes it reserve nothing when it does.
-- idempotency 1: nothing was spent, the request's idempotency key may come again; 2: it is done.
--
-- Most batches settle calls that were answered, by tokens that stay below threshold and limit. These are served
-- here, in a few statements for all of them. Where one is not so, nothing is done, and the whole batch goes to
-- usp_SettleOneByOne.
ALTER PROCEDURE dbo.usp_SettleUsage -- (schema 6)
    @Items NVARCHAR(MAX)
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON

    DECLARE @item TABLE (
        i                    INT NOT NULL,
        IsOrdinary           INT NOT NULL,
        RequestID            NVARCHAR(4000) NULL,
        TokenID              BIGINT NULL,
        Branch               NVARCHAR(4000) NULL,
        RequestedBy          NVARCHAR(4000) NULL,
        ClientKeyID          NVARCHAR(4000) NULL,
        TraceID              NVARCHAR(4000) NULL,
        TokenSource          NVARCHAR(4000) NULL,
        Model                NVARCHAR(4000) NULL,
        InputTokens          BIGINT NULL,
        OutputTokens         BIGINT NULL,
        TextPromptTokens     BIGINT NULL,
        ImagePromptTokens    BIGINT NULL,
        TextCandidatesTokens BIGINT NULL,
        ThoughtsTokens       BIGINT NULL,
        CachedTokens         BIGINT NULL,
        TotalTokens          BIGINT NULL,
        RequestCount         BIGINT NULL,
        UnknownCalls         BIGINT NULL,
        DurationMs           BIGINT NULL,
        LoggedAt             DATETIME2(3) NULL,
        Idempotency          INT NULL
    )
    DECLARE @now DATETIME2(3), @is_ordinary INT, @keys INT, @t BIGINT, @next BIGINT, @total BIGINT, @open BIGINT, @known INT, @limit BIGINT, @used BIGINT
    DECLARE @threshold FLOAT, @crossed_at DATETIME2(3)
    DECLARE @time NVARCHAR(100) = N'[12][0-9][0-9][0-9]-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9]%'
    DECLARE @most BIGINT = 1000000000000000

    -- LEN forgets trailing spaces, hence the dot.
    INSERT INTO @item (i, IsOrdinary, RequestID, TokenID, Branch, RequestedBy, ClientKeyID, TraceID, TokenSource, Model, InputTokens,
                       OutputTokens, TextPromptTokens, ImagePromptTokens, TextCandidatesTokens, ThoughtsTokens, CachedTokens, TotalTokens,
                       RequestCount, UnknownCalls, DurationMs, LoggedAt, Idempotency)
    SELECT j.i,
           CASE WHEN LEN(j.requestId + N'.') BETWEEN 2 AND 65 AND j.tokenId > 0 AND LEN(j.companyId + N'.') BETWEEN 2 AND 257
                     AND ISNULL(LEN(j.branch + N'.'), 0) <= 257 AND ISNULL(LEN(j.requestedBy + N'.'), 0) <= 257
                     AND ISNULL(LEN(j.clientKeyId + N'.'), 0) <= 65 AND (j.traceId IS NULL OR LEN(j.traceId + N'.') BETWEEN 2 AND 33)
                     AND j.tokenSource = N'store'
                     AND j.inputTokens BETWEEN 0 AND @most AND j.outputTokens BETWEEN 0 AND @most AND j.textPromptTokens BETWEEN 0 AND @most
                     AND j.imagePromptTokens BETWEEN 0 AND @most AND j.textCandidatesTokens BETWEEN 0 AND @most
                     AND j.thoughtsTokens BETWEEN 0 AND @most AND j.cachedTokens BETWEEN 0 AND @most AND j.totalTokens BETWEEN 0 AND @most
                     AND j.requestCount > 0 AND j.unknownCalls >= 0 AND ISNULL(j.durationMs, 0) >= 0
                     AND (j.loggedAt IS NULL OR j.loggedAt LIKE @time) AND ISNULL(j.idempotency, 0) IN (0, 2)
                     AND ISNULL(j.releaseSequence, 0) = 0 AND ISNULL(j.fault, N'none') = N'none' AND ISNULL(j.cooldownMs, 0) = 0 THEN 1
                ELSE 0 END,
           j.requestId, j.tokenId, j.branch, j.requestedBy, j.clientKeyId, j.traceId, j.tokenSource, LEFT(j.model, 256), j.inputTokens,
           j.outputTokens, j.textPromptTokens, j.imagePromptTokens, j.textCandidatesTokens, j.thoughtsTokens, j.cachedTokens, j.totalTokens,
           j.requestCount, j.unknownCalls, j.durationMs,
           CASE WHEN j.loggedAt LIKE @time THEN TRY_CONVERT(DATETIME2(3), LEFT(j.loggedAt, 23), 126) END, ISNULL(j.idempotency, 0)
    FROM OPENJSON(@Items) WITH (
        i INT, requestId NVARCHAR(4000) '$.requestId', tokenId BIGINT '$.tokenId', companyId NVARCHAR(4000) '$.companyId',
        branch NVARCHAR(4000), requestedBy NVARCHAR(4000) '$.requestedBy', clientKeyId NVARCHAR(4000) '$.clientKeyId',
        traceId NVARCHAR(4000) '$.traceId', tokenSource NVARCHAR(4000) '$.tokenSource', model NVARCHAR(4000), inputTokens BIGINT '$.inputTokens',
        outputTokens BIGINT '$.outputTokens', textPromptTokens BIGINT '$.textPromptTokens',
        imagePromptTokens BIGINT '$.imagePromptTokens', textCandidatesTokens BIGINT '$.textCandidatesTokens',
        thoughtsTokens BIGINT '$.thoughtsTokens', cachedTokens BIGINT '$.cachedTokens', totalTokens BIGINT '$.totalTokens',
        requestCount BIGINT '$.requestCount', unknownCalls BIGINT '$.unknownCalls', durationMs BIGINT '$.durationMs',
        loggedAt NVARCHAR(4000) '$.loggedAt', fault NVARCHAR(20), cooldownMs BIGINT '$.cooldownMs', idempotency INT,
        releaseSequence BIGINT '$.releaseSequence') j
    SELECT @is_ordinary = ISNULL(MIN(CASE WHEN LoggedAt IS NULL THEN 0 ELSE IsOrdinary END), 0), @keys = MAX(Idempotency) FROM @item

    IF @@TRANCOUNT > 0
        SET @is_ordinary = 0 -- to go back from here would take back the caller's transaction
    IF @is_ordinary = 1
    BEGIN
        BEGIN TRY
            BEGIN TRANSACTION
            -- TokenUsageSummary, in ascending TokenID. Since its row is locked first, nobody else settles or releases the same
            -- meanwhile, and the limit stays what is read.
            SET @t = 0
            WHILE 1 = 1
            BEGIN
                SET @next = NULL
                SELECT TOP (1) @next = TokenID, @total = SUM(TotalTokens) FROM @item WHERE TokenID > @t GROUP BY TokenID ORDER BY TokenID
                IF @next IS NULL
                    BREAK
                SET @t = @next
                UPDATE s SET ReservedTokens = s.ReservedTokens FROM dbo.TokenUsageSummary s WITH (INDEX (UX_TokenUsageSummary_TokenID), ROWLOCK) WHERE s.TokenID = @t
                IF @@ROWCOUNT = 0
                BEGIN
                    SET @is_ordinary = 0
                    BREAK
                END
                SET @known = 0
                SELECT @known = CASE WHEN t.CompanyID IS NULL THEN 0 ELSE 1 END, @limit = t.TotalTokenLimit, @used = s.TotalUsedTokens,
                       @crossed_at = s.ThresholdCrossedAt,
                       @threshold = CASE WHEN s.Threshold > 0 AND s.Threshold <= 1 THEN s.Threshold
                                         WHEN s.Threshold > 1 AND s.Threshold <= 100 THEN s.Threshold / 100.0
                                         ELSE 0.8 END
                FROM dbo.TokenUsageSummary s WITH (FORCESEEK)
                JOIN dbo.TokenMaster t ON t.TokenID = s.TokenID
                WHERE s.TokenID = @t
                IF @known = 0
                   OR CASE WHEN @limit IS NULL THEN 0
                           WHEN @used + @total >= @limit THEN 1
                           WHEN @crossed_at IS NULL AND CAST(@used + @total AS FLOAT) / CAST(@limit AS FLOAT) >= @threshold THEN 1
                           ELSE 0 END = 1
                BEGIN
                    SET @is_ordinary = 0
                    BREAK
                END
                -- (A sum, which is looked for once for each: a join might read all of the table.)
                SELECT @open = SUM(c.EstimatedTokens)
                FROM @item i
                CROSS APPLY (SELECT ISNULL(SUM(r.EstimatedTokens), 0) AS EstimatedTokens
                             FROM dbo.TokenReservations r WITH (INDEX (UX_TokenReservations_RequestID_Sequence), FORCESEEK)
                             WHERE r.RequestID = i.RequestID AND r.TokenID = @t AND r.State = N'open' AND r.ClosedAt IS NULL) c
                WHERE i.TokenID = @t
                SET @now = SYSUTCDATETIME()
                UPDATE s
                SET TotalUsedTokens = TotalUsedTokens + @total,
                    TotalRemainingTokens = @limit - (TotalUsedTokens + @total),
                    ReservedTokens = CASE WHEN ReservedTokens > @open THEN ReservedTokens - @open ELSE 0 END,
                    LastUpdated = @now
                FROM dbo.TokenUsageSummary s WITH (INDEX (UX_TokenUsageSummary_TokenID), ROWLOCK)
                WHERE s.TokenID = @t
            END
            IF @is_ordinary = 1
            BEGIN
                UPDATE r
                SET State = N'settled', ClosedAt = @now, UnknownCalls = i.UnknownCalls
                FROM @item i
                JOIN dbo.TokenReservations r WITH (INDEX (UX_TokenReservations_RequestID_Sequence), FORCESEEK, ROWLOCK) ON r.RequestID = i.RequestID
                WHERE r.TokenID = i.TokenID AND r.ClosedAt IS NULL
                INSERT INTO dbo.TokenUsageLogs (TokenID, Branch, RequestedBy, InputTokens, OutputTokens, TextPromptTokens, ImagePromptTokens,
                                                TextCandidatesTokens, TotalTokensUsed, RequestCount, LoggedAt, RequestID, CompanyID,
                                                ClientKeyID, TokenSource, ThoughtsTokens, CachedTokens, UnknownCalls, Model, DurationMs, TraceID)
                SELECT i.TokenID, i.Branch, i.RequestedBy, i.InputTokens, i.OutputTokens, i.TextPromptTokens, i.ImagePromptTokens,
                       i.TextCandidatesTokens, i.TotalTokens, i.RequestCount, i.LoggedAt, i.RequestID, LEFT(t.CompanyID, 256),
                       i.ClientKeyID, i.TokenSource, i.ThoughtsTokens, i.CachedTokens, i.UnknownCalls, i.Model, i.DurationMs, i.TraceID
                FROM @item i
                JOIN dbo.TokenMaster t WITH (FORCESEEK) ON t.TokenID = i.TokenID
                ORDER BY i.TokenID, i.i
                OPTION (LOOP JOIN) -- for the foreign keys, too: no look at tokens that are not in question
                IF @keys = 2
                    UPDATE k
                    SET State = N'done'
                    FROM @item i
                    JOIN dbo.IdempotencyKeys k WITH (INDEX (IX_IdempotencyKeys_RequestID), FORCESEEK, ROWLOCK) ON k.RequestID = i.RequestID
                    WHERE i.Idempotency = 2
                COMMIT TRANSACTION
            END
            ELSE
                ROLLBACK TRANSACTION
        END TRY
        BEGIN CATCH
            IF @@TRANCOUNT > 0
                ROLLBACK TRANSACTION;
            -- A duplicate key: the same was settled before, or comes twice in this batch.
            IF ERROR_NUMBER() NOT IN (2601, 2627)
                THROW;
            SET @is_ordinary = 0
        END CATCH
    END
    IF @is_ordinary = 0
    BEGIN
        EXEC dbo.usp_SettleOneByOne @Items = @Items
        RETURN 0
    END
    SELECT i, CAST(N'ok' AS NVARCHAR(20)) AS Code, CAST(NULL AS NVARCHAR(400)) AS Message, 0 AS ThresholdCrossed, 0 AS Exceeded, 0 AS DisablingStopped
    FROM @item
    ORDER BY i
END
GO

-- Writes log entries and failed calls (two JSON arrays), all in one transaction. A text too long for
-- its column is cut: a log entry is never refused. @Again 1: an earlier call with them may have
-- succeeded; those that are there are not kept twice.
ALTER PROCEDURE dbo.usp_RecordLogs -- (schema 6)
    @Entries  NVARCHAR(MAX),
    @Attempts NVARCHAR(MAX),
    @Again    INT = 0
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    DECLARE @time NVARCHAR(100) = N'[12][0-9][0-9][0-9]-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9]%'
    BEGIN TRANSACTION
    INSERT INTO dbo.ApplicationLogs (Timestamp, LogLevel, Logger, Message, Exception, Module, FunctionName, LineNumber, RequestID, Host, TraceID)
    SELECT ISNULL(CASE WHEN j.t LIKE @time THEN TRY_CONVERT(DATETIME2(3), LEFT(j.t, 23), 126) END, SYSUTCDATETIME()), ISNULL(LEFT(j.level, 20), N'INFO'), LEFT(j.logger, 256),
           (SELECT f.value FROM OPENJSON(a.value) f WHERE f.[key] = N'message'),
           (SELECT f.value FROM OPENJSON(a.value) f WHERE f.[key] = N'exception'),
           LEFT(j.module, 256), LEFT(j.func, 256), j.line, LEFT(j.requestId, 64), LEFT(j.host, 256), LEFT(j.traceId, 32)
    FROM OPENJSON(ISNULL(@Entries, N'[]')) a
    CROSS APPLY OPENJSON(a.value) WITH (
        t NVARCHAR(4000) '$.timestamp', level NVARCHAR(4000), logger NVARCHAR(4000), module NVARCHAR(4000),
        func NVARCHAR(4000) '$.function', line BIGINT, requestId NVARCHAR(4000) '$.requestId', host NVARCHAR(4000),
        traceId NVARCHAR(4000) '$.traceId') j
    WHERE @Again = 0
       OR NOT EXISTS (SELECT 1 FROM dbo.ApplicationLogs x
                      WHERE j.t LIKE @time
                        AND x.Timestamp = TRY_CONVERT(DATETIME2(3), LEFT(j.t, 23), 126)
                        AND x.Message COLLATE Latin1_General_BIN2 = (SELECT f.value FROM OPENJSON(a.value) f WHERE f.[key] = N'message')
                        AND x.Module = LEFT(j.module, 256)
                        AND x.LineNumber = j.line
                        AND ISNULL(x.RequestID, N'') = ISNULL(LEFT(j.requestId, 64), N'')
                        AND x.Host = LEFT(j.host, 256))
    ORDER BY CAST(a.[key] AS INT)
    IF @Attempts <> N'[]'
        INSERT INTO dbo.RetryAttempts (TokenID, CompanyID, Attempt, ErrorMessage, IsRetryable, Timestamp, RequestID, StatusCode, DelayMs)
        SELECT NULLIF(j.tokenId, 0), LEFT(j.companyId, 256), ISNULL(j.attempt, 1), LEFT(j.errorMessage, 4000),
               CASE WHEN j.isRetryable = N'1' OR j.isRetryable = N'true' THEN 1 ELSE 0 END,
               ISNULL(CASE WHEN j.t LIKE @time THEN TRY_CONVERT(DATETIME2(3), LEFT(j.t, 23), 126) END, SYSUTCDATETIME()), LEFT(j.requestId, 64), NULLIF(j.statusCode, 0), j.delayMs
        FROM OPENJSON(ISNULL(@Attempts, N'[]')) a
        CROSS APPLY OPENJSON(a.value) WITH (
            tokenId BIGINT '$.tokenId', companyId NVARCHAR(4000) '$.companyId', attempt BIGINT, errorMessage NVARCHAR(4000) '$.errorMessage',
            isRetryable NVARCHAR(10) '$.isRetryable', t NVARCHAR(4000) '$.timestamp', requestId NVARCHAR(4000) '$.requestId',
            statusCode INT '$.statusCode', delayMs BIGINT '$.delayMs') j
        WHERE @Again = 0
           OR NOT EXISTS (SELECT 1 FROM dbo.RetryAttempts x
                          WHERE j.t LIKE @time
                            AND x.Timestamp = TRY_CONVERT(DATETIME2(3), LEFT(j.t, 23), 126)
                            AND x.RequestID = LEFT(j.requestId, 64)
                            AND x.Attempt = ISNULL(j.attempt, 1))
        ORDER BY CAST(a.[key] AS INT)
    COMMIT TRANSACTION
END
GO

-- Reservations past their time (their process died) become unsettled, with an unknown call. Called
-- about once a minute, by any process; each token is a transaction of its own. Their requests'
-- idempotency keys count as done; keys older than 24 hours go.
ALTER PROCEDURE dbo.usp_ExpireReservations -- (schema 6)
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    DECLARE @late TABLE (ReservationID BIGINT NOT NULL PRIMARY KEY, TokenID BIGINT NULL, RequestID NVARCHAR(64) NOT NULL)
    DECLARE @gone TABLE (EstimatedTokens BIGINT NOT NULL, RequestID NVARCHAR(64) NOT NULL)
    DECLARE @now DATETIME2(3) = SYSUTCDATETIME(), @t BIGINT = 0, @r BIGINT = 0, @tokens BIGINT, @expired INT = 0, @rows INT
    INSERT INTO @late (ReservationID, TokenID, RequestID)
    SELECT ReservationID, TokenID, RequestID
    FROM dbo.TokenReservations
    WHERE State = N'open' AND ClosedAt IS NULL AND ExpiresAt < @now
    WHILE 1 = 1
    BEGIN
        SET @t = (SELECT MIN(TokenID) FROM @late WHERE TokenID > @t)
        IF @t IS NULL
            BREAK
        DELETE FROM @gone
        BEGIN TRANSACTION
        UPDATE s SET ReservedTokens = s.ReservedTokens FROM dbo.TokenUsageSummary s WITH (INDEX (UX_TokenUsageSummary_TokenID), ROWLOCK) WHERE s.TokenID = @t
        UPDATE dbo.TokenReservations
        SET State = N'unsettled', UnknownCalls = UnknownCalls + 1
        OUTPUT inserted.EstimatedTokens, inserted.RequestID INTO @gone (EstimatedTokens, RequestID)
        WHERE ReservationID IN (SELECT x.ReservationID FROM @late x WHERE x.TokenID = @t)
          AND State = N'open'
        SET @expired = @expired + @@ROWCOUNT
        SELECT @tokens = ISNULL(SUM(EstimatedTokens), 0) FROM @gone
        UPDATE s
        SET ReservedTokens = CASE WHEN ReservedTokens > @tokens THEN ReservedTokens - @tokens ELSE 0 END
        FROM dbo.TokenUsageSummary s WITH (INDEX (UX_TokenUsageSummary_TokenID), ROWLOCK)
        WHERE s.TokenID = @t
        UPDATE k
        SET State = N'done'
        FROM @gone g
        JOIN dbo.IdempotencyKeys k WITH (INDEX (IX_IdempotencyKeys_RequestID), FORCESEEK, ROWLOCK) ON k.RequestID = g.RequestID
        COMMIT TRANSACTION
    END
    WHILE 1 = 1 -- those for the fallback key, one by one
    BEGIN
        SET @r = (SELECT MIN(ReservationID) FROM @late WHERE TokenID IS NULL AND ReservationID > @r)
        IF @r IS NULL
            BREAK
        BEGIN TRANSACTION
        UPDATE dbo.TokenReservations
        SET State = N'unsettled', UnknownCalls = UnknownCalls + 1
        WHERE ReservationID = @r AND State = N'open'
        SET @rows = @@ROWCOUNT
        IF @rows > 0
            UPDATE k
            SET State = N'done'
            FROM @late x
            JOIN dbo.IdempotencyKeys k WITH (INDEX (IX_IdempotencyKeys_RequestID), FORCESEEK, ROWLOCK) ON k.RequestID = x.RequestID
            WHERE x.ReservationID = @r
        COMMIT TRANSACTION
        SET @expired = @expired + @rows
    END
    -- READPAST: a row that somebody takes over now is no business of this.
    SET @rows = 2000
    WHILE @rows = 2000
    BEGIN
        DELETE TOP (2000) FROM dbo.IdempotencyKeys WITH (READPAST, ROWLOCK) WHERE ExpiresAt < @now
        SET @rows = @@ROWCOUNT
    END
    SELECT @expired AS Expired
END
GO

-- ---- procedures: administration ------------------------------------------------------------

-- Each change writes its AuditLog row in the same transaction, and never a key into it. The result is
-- a row with Code ('ok', 'bad_value', 'no_such_row') and Message. Texts come in wider than their columns,
-- so that what is too long is refused, not cut.

-- For the procedures below: what is wrong with a text, NULL where nothing is; the phrase completes a
-- sentence that begins with its name.
ALTER PROCEDURE dbo.usp_TextFault -- (schema 6)
    @Text  NVARCHAR(4000),
    @Fault NVARCHAR(100) OUTPUT
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    -- Cc, Zl and Zp of Unicode
    DECLARE @control NVARCHAR(40) = N'%[' + NCHAR(1) + N'-' + NCHAR(31) + NCHAR(127) + N'-' + NCHAR(159) + NCHAR(8232) + NCHAR(8233) + N']%'
    SET @Fault = CASE
            WHEN LEN(@Text + N'.') > 257 THEN N'is too long: at most 256 characters'
            WHEN PATINDEX(@control COLLATE Latin1_General_BIN2, @Text) > 0 THEN N'must not have control characters'
            WHEN LEN(LTRIM(RTRIM(@Text)) + N'.') <> LEN(@Text + N'.') THEN N'must not begin or end with a space'
        END
END
GO

-- A new token. @TotalTokenLimit NULL: no limit. @Threshold: the share of the limit at which one
-- warning is logged; NULL or 0: 0.8. @Pending 1: it has no key yet and is Disabled; usp_ActivateToken, in
-- the same transaction, brings the key, which may have been sealed for this TokenID.
ALTER PROCEDURE dbo.usp_AddToken -- (schema 6)
    @Actor           NVARCHAR(4000),
    @CompanyID       NVARCHAR(4000),
    @CompanyName     NVARCHAR(4000) = NULL,
    @Provider        NVARCHAR(4000) = NULL,
    @ApiKey          NVARCHAR(4000),
    @TotalTokenLimit BIGINT = NULL,
    @Threshold       FLOAT = NULL,
    @Pending         INT = 0
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    DECLARE @now DATETIME2(3) = SYSUTCDATETIME(), @id BIGINT, @message NVARCHAR(400)
    DECLARE @actor_fault NVARCHAR(100), @company_fault NVARCHAR(100), @name_fault NVARCHAR(100), @provider_fault NVARCHAR(100)
    DECLARE @key NVARCHAR(1024)
    EXEC dbo.usp_TextFault @Text = @Actor, @Fault = @actor_fault OUTPUT
    EXEC dbo.usp_TextFault @Text = @CompanyID, @Fault = @company_fault OUTPUT
    EXEC dbo.usp_TextFault @Text = @CompanyName, @Fault = @name_fault OUTPUT
    EXEC dbo.usp_TextFault @Text = @Provider, @Fault = @provider_fault OUTPUT
    EXEC dbo.usp_UsableKey @ApiKey = @ApiKey, @Usable = @key OUTPUT
    SET @message = CASE
            WHEN ISNULL(@Actor, N'') = N'' THEN N'the actor''s name must not be empty'
            WHEN @actor_fault IS NOT NULL THEN N'the actor''s name ' + @actor_fault
            WHEN ISNULL(@CompanyID, N'') = N'' THEN N'CompanyID must not be empty'
            WHEN @company_fault IS NOT NULL THEN N'CompanyID ' + @company_fault
            WHEN @name_fault IS NOT NULL THEN N'CompanyName ' + @name_fault
            WHEN @provider_fault IS NOT NULL THEN N'Provider ' + @provider_fault
            WHEN @Pending = 1 AND ISNULL(@ApiKey, N'') <> N'' THEN N'a token that waits for its key has none yet'
            WHEN @key IS NULL AND @Pending = 0 THEN N'an API key must have 1 to 1024 bytes, without spaces or characters beyond ASCII'
            WHEN @Pending NOT IN (0, 1) THEN N'@Pending must be 0 or 1'
            WHEN @TotalTokenLimit NOT BETWEEN 0 AND 1000000000000000 THEN N'a limit must be 0 to 10^15, or none'
            WHEN @Threshold NOT BETWEEN 0 AND 1 THEN N'a threshold must be above 0 and at most 1'
        END
    IF @message IS NULL
    BEGIN
        SET @Threshold = CASE WHEN @Threshold > 0 THEN @Threshold ELSE 0.8 END
        SET @Provider = ISNULL(@Provider, N'Gemini')
        BEGIN TRANSACTION
        INSERT INTO dbo.TokenMaster (CompanyID, CompanyName, ApiKey, Provider, TotalTokenLimit, Status, CreatedAt, UpdatedAt)
        VALUES (@CompanyID, @CompanyName, ISNULL(@key, N''), @Provider, @TotalTokenLimit,
                CASE WHEN @Pending = 1 THEN N'Disabled' ELSE N'Active' END, @now, @now)
        SET @id = CAST(SCOPE_IDENTITY() AS BIGINT)
        INSERT INTO dbo.TokenUsageSummary (TokenID, TotalUsedTokens, TotalRemainingTokens, Threshold, ReservedTokens, LastUpdated)
        VALUES (@id, 0, @TotalTokenLimit, @Threshold, 0, @now)
        INSERT INTO dbo.AuditLog (Timestamp, Actor, Action, ObjectType, ObjectID, CompanyID, Detail)
        VALUES (@now, @Actor, N'token added', N'TokenMaster', CAST(@id AS NVARCHAR(40)), @CompanyID,
                N'limit ' + ISNULL(CAST(@TotalTokenLimit AS NVARCHAR(40)), N'none')
                + N', threshold ' + CAST(CAST(@Threshold AS DECIMAL(9, 4)) AS NVARCHAR(40)) + N', provider ' + @Provider)
        COMMIT TRANSACTION
    END
    SELECT CAST(CASE WHEN @message IS NULL THEN N'ok' ELSE N'bad_value' END AS NVARCHAR(20)) AS Code, @message AS Message,
           ISNULL(@id, 0) AS TokenID
END
GO

-- The key of a token that usp_AddToken has added without one; it is Active from now on.
ALTER PROCEDURE dbo.usp_ActivateToken -- (schema 6)
    @TokenID BIGINT,
    @ApiKey  NVARCHAR(4000)
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    DECLARE @code NVARCHAR(20) = N'ok', @message NVARCHAR(400), @key NVARCHAR(1024)
    EXEC dbo.usp_UsableKey @ApiKey = @ApiKey, @Usable = @key OUTPUT
    IF @key IS NULL
    BEGIN
        SET @code = N'bad_value'
        SET @message = N'an API key must have 1 to 1024 bytes, without spaces or characters beyond ASCII'
    END
    ELSE
    BEGIN
        UPDATE dbo.TokenMaster
        SET ApiKey = @key, Status = N'Active', UpdatedAt = SYSUTCDATETIME()
        WHERE TokenID = @TokenID AND ApiKey = N'' AND Status = N'Disabled'
        IF @@ROWCOUNT = 0
        BEGIN
            SET @code = N'no_such_row'
            SET @message = N'there is no token ' + ISNULL(CAST(@TokenID AS NVARCHAR(40)), N'NULL') + N' that waits for its key'
        END
    END
    SELECT @code AS Code, @message AS Message
END
GO

-- A token's status, by hand: Active, Expired, Exceeded or Disabled. Active ends a cooldown.
ALTER PROCEDURE dbo.usp_SetTokenStatus -- (schema 6)
    @Actor   NVARCHAR(4000),
    @TokenID BIGINT,
    @Status  NVARCHAR(4000),
    @Reason  NVARCHAR(4000) = NULL
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    DECLARE @now DATETIME2(3) = SYSUTCDATETIME(), @code NVARCHAR(20) = N'ok', @message NVARCHAR(400), @known NVARCHAR(20), @old NVARCHAR(50)
    DECLARE @company NVARCHAR(256), @actor_fault NVARCHAR(100), @reason_fault NVARCHAR(100)
    EXEC dbo.usp_TextFault @Text = @Actor, @Fault = @actor_fault OUTPUT
    EXEC dbo.usp_TextFault @Text = @Reason, @Fault = @reason_fault OUTPUT
    SET @known = (SELECT v.name FROM (VALUES (N'Active'), (N'Expired'), (N'Exceeded'), (N'Disabled')) AS v (name)
                  WHERE UPPER(v.name) = UPPER(@Status))
    SET @message = CASE
            WHEN ISNULL(@Actor, N'') = N'' THEN N'the actor''s name must not be empty'
            WHEN @actor_fault IS NOT NULL THEN N'the actor''s name ' + @actor_fault
            WHEN @known IS NULL THEN N'a status must be Active, Expired, Exceeded or Disabled'
            WHEN @reason_fault IS NOT NULL THEN N'the reason ' + @reason_fault
        END
    IF @message IS NOT NULL
        SET @code = N'bad_value'
    ELSE
    BEGIN
        BEGIN TRANSACTION
        UPDATE dbo.TokenMaster SET UpdatedAt = @now WHERE TokenID = @TokenID
        SELECT @old = ISNULL(Status, N'NULL'), @company = CompanyID FROM dbo.TokenMaster WHERE TokenID = @TokenID
        IF @old IS NULL
        BEGIN
            SET @code = N'no_such_row'
            SET @message = N'there is no token ' + ISNULL(CAST(@TokenID AS NVARCHAR(40)), N'NULL')
        END
        ELSE
        BEGIN
            UPDATE dbo.TokenMaster
            SET Status = @known, StatusReason = NULLIF(@Reason, N''), CooldownUntil = CASE WHEN @known = N'Active' THEN NULL ELSE CooldownUntil END
            WHERE TokenID = @TokenID
            INSERT INTO dbo.AuditLog (Timestamp, Actor, Action, ObjectType, ObjectID, CompanyID, Detail)
            VALUES (@now, @Actor, N'token status changed', N'TokenMaster', CAST(@TokenID AS NVARCHAR(40)), @company,
                    @old + N' to ' + @known + ISNULL(N': ' + NULLIF(@Reason, N''), N''))
        END
        COMMIT TRANSACTION
    END
    SELECT @code AS Code, @message AS Message
END
GO

-- Another key for a token: the old one serves no request that begins after this.
ALTER PROCEDURE dbo.usp_SetTokenKey -- (schema 6)
    @Actor   NVARCHAR(4000),
    @TokenID BIGINT,
    @ApiKey  NVARCHAR(4000)
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    DECLARE @now DATETIME2(3) = SYSUTCDATETIME(), @code NVARCHAR(20) = N'ok', @message NVARCHAR(400)
    DECLARE @actor_fault NVARCHAR(100), @key NVARCHAR(1024)
    EXEC dbo.usp_TextFault @Text = @Actor, @Fault = @actor_fault OUTPUT
    EXEC dbo.usp_UsableKey @ApiKey = @ApiKey, @Usable = @key OUTPUT
    SET @message = CASE
            WHEN ISNULL(@Actor, N'') = N'' THEN N'the actor''s name must not be empty'
            WHEN @actor_fault IS NOT NULL THEN N'the actor''s name ' + @actor_fault
            WHEN @key IS NULL THEN N'an API key must have 1 to 1024 bytes, without spaces or characters beyond ASCII'
        END
    IF @message IS NOT NULL
        SET @code = N'bad_value'
    ELSE
    BEGIN
        BEGIN TRANSACTION
        UPDATE dbo.TokenMaster SET ApiKey = @key, UpdatedAt = @now WHERE TokenID = @TokenID
        IF @@ROWCOUNT = 0
        BEGIN
            SET @code = N'no_such_row'
            SET @message = N'there is no token ' + ISNULL(CAST(@TokenID AS NVARCHAR(40)), N'NULL')
        END
        ELSE
            INSERT INTO dbo.AuditLog (Timestamp, Actor, Action, ObjectType, ObjectID, CompanyID)
            SELECT @now, @Actor, N'token key changed', N'TokenMaster', CAST(@TokenID AS NVARCHAR(40)), CompanyID
            FROM dbo.TokenMaster
            WHERE TokenID = @TokenID
        COMMIT TRANSACTION
    END
    SELECT @code AS Code, @message AS Message
END
GO

-- The API keys as they are, plain or sealed, of up to @Rows tokens after that one; those that are longer
-- than any key are left out. For extractctl, which seals them.
ALTER PROCEDURE dbo.usp_ListTokenKeys -- (schema 6)
    @AfterID BIGINT,
    @Rows    INT
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    SELECT TOP (@Rows) TokenID, CAST(ISNULL(ApiKey, N'') AS NVARCHAR(1024)) AS ApiKey
    FROM dbo.TokenMaster
    WHERE TokenID > @AfterID AND ISNULL(LEN(ApiKey + N'.'), 1) <= 1025
    ORDER BY TokenID
END
GO

-- The same key in another form, sealed or sealed anew: only from what usp_ListTokenKeys said of it.
ALTER PROCEDURE dbo.usp_ResealToken -- (schema 6)
    @Actor    NVARCHAR(4000),
    @TokenID  BIGINT,
    @ApiKey   NVARCHAR(4000),
    @Expected NVARCHAR(1024)
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    DECLARE @now DATETIME2(3) = SYSUTCDATETIME(), @code NVARCHAR(20) = N'ok', @message NVARCHAR(400)
    DECLARE @actor_fault NVARCHAR(100), @key NVARCHAR(1024)
    EXEC dbo.usp_TextFault @Text = @Actor, @Fault = @actor_fault OUTPUT
    EXEC dbo.usp_UsableKey @ApiKey = @ApiKey, @Usable = @key OUTPUT
    SET @message = CASE
            WHEN ISNULL(@Actor, N'') = N'' THEN N'the actor''s name must not be empty'
            WHEN @actor_fault IS NOT NULL THEN N'the actor''s name ' + @actor_fault
            WHEN @key IS NULL THEN N'an API key must have 1 to 1024 bytes, without spaces or characters beyond ASCII'
        END
    IF @message IS NOT NULL
        SET @code = N'bad_value'
    ELSE
    BEGIN
        BEGIN TRANSACTION
        -- The dots: a comparison forgets trailing spaces.
        UPDATE dbo.TokenMaster
        SET ApiKey = @key, UpdatedAt = @now
        WHERE TokenID = @TokenID
          AND (ISNULL(ApiKey, N'') + N'.') COLLATE Latin1_General_BIN2 = ISNULL(@Expected, N'') + N'.'
        IF @@ROWCOUNT = 0
        BEGIN
            SET @code = N'no_such_row'
            SET @message = N'there is no token ' + ISNULL(CAST(@TokenID AS NVARCHAR(40)), N'NULL') + N', or its key is another by now'
        END
        ELSE
            INSERT INTO dbo.AuditLog (Timestamp, Actor, Action, ObjectType, ObjectID, CompanyID)
            SELECT @now, @Actor, N'token key sealed', N'TokenMaster', CAST(@TokenID AS NVARCHAR(40)), CompanyID
            FROM dbo.TokenMaster
            WHERE TokenID = @TokenID
        COMMIT TRANSACTION
    END
    SELECT @code AS Code, @message AS Message
END
GO

-- A token's limit (NULL: none) and threshold (NULL or 0: unchanged). The sums follow; an Exceeded
-- token with room again becomes Active, an Active one without becomes Exceeded.
ALTER PROCEDURE dbo.usp_SetTokenLimit -- (schema 6)
    @Actor           NVARCHAR(4000),
    @TokenID         BIGINT,
    @TotalTokenLimit BIGINT,
    @Threshold       FLOAT = NULL
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    DECLARE @now DATETIME2(3) = SYSUTCDATETIME(), @code NVARCHAR(20) = N'ok', @message NVARCHAR(400), @used BIGINT, @share FLOAT
    DECLARE @actor_fault NVARCHAR(100), @before NVARCHAR(50), @after NVARCHAR(50)
    EXEC dbo.usp_TextFault @Text = @Actor, @Fault = @actor_fault OUTPUT
    SET @message = CASE
            WHEN ISNULL(@Actor, N'') = N'' THEN N'the actor''s name must not be empty'
            WHEN @actor_fault IS NOT NULL THEN N'the actor''s name ' + @actor_fault
            WHEN @TotalTokenLimit NOT BETWEEN 0 AND 1000000000000000 THEN N'a limit must be 0 to 10^15, or none'
            WHEN @Threshold NOT BETWEEN 0 AND 1 THEN N'a threshold must be above 0 and at most 1'
        END
    IF @message IS NOT NULL
        SET @code = N'bad_value'
    ELSE IF NOT EXISTS (SELECT 1 FROM dbo.TokenMaster WHERE TokenID = @TokenID)
    BEGIN
        SET @code = N'no_such_row'
        SET @message = N'there is no token ' + ISNULL(CAST(@TokenID AS NVARCHAR(40)), N'NULL')
    END
    ELSE
    BEGIN
        BEGIN TRANSACTION
        UPDATE s SET ReservedTokens = s.ReservedTokens FROM dbo.TokenUsageSummary s WITH (INDEX (UX_TokenUsageSummary_TokenID), ROWLOCK) WHERE s.TokenID = @TokenID
        IF @@ROWCOUNT = 0
            EXEC dbo.usp_EnsureSummary @TokenID = @TokenID
        SELECT @used = TotalUsedTokens, @share = CASE WHEN @Threshold > 0 THEN @Threshold ELSE Threshold END
        FROM dbo.TokenUsageSummary WITH (FORCESEEK)
        WHERE TokenID = @TokenID
        UPDATE s
        SET TotalRemainingTokens = @TotalTokenLimit - @used,
            Threshold = @share,
            ThresholdCrossedAt = CASE WHEN @used >= @TotalTokenLimit THEN ISNULL(ThresholdCrossedAt, @now)
                                      WHEN CAST(@used AS FLOAT) / CAST(NULLIF(@TotalTokenLimit, 0) AS FLOAT) >= @share
                                          THEN ISNULL(ThresholdCrossedAt, @now) END,
            LastUpdated = @now
        FROM dbo.TokenUsageSummary s WITH (INDEX (UX_TokenUsageSummary_TokenID), ROWLOCK)
        WHERE s.TokenID = @TokenID
        UPDATE dbo.TokenMaster SET UpdatedAt = @now WHERE TokenID = @TokenID
        SELECT @before = Status FROM dbo.TokenMaster WHERE TokenID = @TokenID
        -- The trigger does some of what follows, where the limit was raised.
        UPDATE dbo.TokenMaster SET TotalTokenLimit = @TotalTokenLimit WHERE TokenID = @TokenID
        IF @TotalTokenLimit IS NULL OR @TotalTokenLimit > @used
            UPDATE dbo.TokenMaster SET Status = N'Active', StatusReason = NULL WHERE TokenID = @TokenID AND Status = N'Exceeded'
        ELSE
            UPDATE dbo.TokenMaster SET Status = N'Exceeded', StatusReason = N'limit reached' WHERE TokenID = @TokenID AND Status = N'Active'
        SELECT @after = Status FROM dbo.TokenMaster WHERE TokenID = @TokenID
        INSERT INTO dbo.AuditLog (Timestamp, Actor, Action, ObjectType, ObjectID, CompanyID, Detail)
        SELECT @now, @Actor, N'token limit changed', N'TokenMaster', CAST(@TokenID AS NVARCHAR(40)), CompanyID,
               N'limit ' + ISNULL(CAST(@TotalTokenLimit AS NVARCHAR(40)), N'none')
               + CASE WHEN @Threshold > 0 THEN N', threshold ' + CAST(CAST(@Threshold AS DECIMAL(9, 4)) AS NVARCHAR(40)) ELSE N'' END
               + CASE WHEN @after <> @before THEN N', now ' + @after ELSE N'' END
        FROM dbo.TokenMaster
        WHERE TokenID = @TokenID
        COMMIT TRANSACTION
    END
    SELECT @code AS Code, @message AS Message
END
GO

-- Whose client key has this hash (SHA-256, 64 hexadecimal digits)? No row: unknown, or revoked.
-- CompanyID NULL: an administrator's.
ALTER PROCEDURE dbo.usp_FindClientKey -- (schema 6)
    @KeyHash NVARCHAR(64)
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    SELECT ClientKeyID, CompanyID, CAST(IsAdmin AS INT) AS IsAdmin
    FROM dbo.ClientKeys
    WHERE KeyHash = @KeyHash AND RevokedAt IS NULL
END
GO

-- A new client key: its ID (up to 32 hexadecimal digits) and hash; the key itself comes nowhere near the
-- database. @CompanyID NULL: an administrator's.
ALTER PROCEDURE dbo.usp_AddClientKey -- (schema 6)
    @Actor       NVARCHAR(4000),
    @ClientKeyID NVARCHAR(4000),
    @KeyHash     NVARCHAR(4000),
    @CompanyID   NVARCHAR(4000) = NULL,
    @Label       NVARCHAR(4000) = NULL
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    DECLARE @now DATETIME2(3) = SYSUTCDATETIME(), @code NVARCHAR(20) = N'ok', @message NVARCHAR(400)
    DECLARE @actor_fault NVARCHAR(100), @company_fault NVARCHAR(100), @label_fault NVARCHAR(100)
    EXEC dbo.usp_TextFault @Text = @Actor, @Fault = @actor_fault OUTPUT
    EXEC dbo.usp_TextFault @Text = @CompanyID, @Fault = @company_fault OUTPUT
    EXEC dbo.usp_TextFault @Text = @Label, @Fault = @label_fault OUTPUT
    SET @message = CASE
            WHEN ISNULL(@Actor, N'') = N'' THEN N'the actor''s name must not be empty'
            WHEN @actor_fault IS NOT NULL THEN N'the actor''s name ' + @actor_fault
            WHEN ISNULL(LEN(@ClientKeyID + N'.'), 0) NOT BETWEEN 2 AND 33 OR @ClientKeyID LIKE N'%[^0-9a-f]%' COLLATE Latin1_General_BIN2
                THEN N'a client key''s ID is 1 to 32 hexadecimal digits'
            WHEN @CompanyID = N'' THEN N'CompanyID must not be empty'
            WHEN @company_fault IS NOT NULL THEN N'CompanyID ' + @company_fault
            WHEN @label_fault IS NOT NULL THEN N'the label ' + @label_fault
            WHEN ISNULL(LEN(@KeyHash + N'.'), 0) <> 65 OR @KeyHash LIKE N'%[^0-9a-f]%' COLLATE Latin1_General_BIN2
                THEN N'a client key''s hash must be SHA-256 in hexadecimal'
            WHEN EXISTS (SELECT 1 FROM dbo.ClientKeys WHERE ClientKeyID = @ClientKeyID OR KeyHash = @KeyHash)
                THEN N'there is such a client key already'
        END
    IF @message IS NOT NULL
        SET @code = N'bad_value'
    ELSE
    BEGIN TRY
        BEGIN TRANSACTION
        INSERT INTO dbo.ClientKeys (ClientKeyID, KeyHash, CompanyID, IsAdmin, Label, CreatedAt)
        VALUES (@ClientKeyID, @KeyHash, @CompanyID, CASE WHEN @CompanyID IS NULL THEN 1 ELSE 0 END, @Label, @now)
        INSERT INTO dbo.AuditLog (Timestamp, Actor, Action, ObjectType, ObjectID, CompanyID, Detail)
        VALUES (@now, @Actor, N'client key added', N'ClientKeys', @ClientKeyID, @CompanyID, @Label)
        COMMIT TRANSACTION
    END TRY
    BEGIN CATCH
        IF @@TRANCOUNT > 0
            ROLLBACK TRANSACTION;
        IF ERROR_NUMBER() NOT IN (2601, 2627)
            THROW;
        SET @code = N'bad_value'
        SET @message = N'there is such a client key already'
    END CATCH
    SELECT @code AS Code, @message AS Message
END
GO

-- Ends a client key: no request that begins after this is let in by it. One that is revoked stays as it is.
ALTER PROCEDURE dbo.usp_RevokeClientKey -- (schema 6)
    @Actor       NVARCHAR(4000),
    @ClientKeyID NVARCHAR(4000)
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    DECLARE @now DATETIME2(3) = SYSUTCDATETIME(), @code NVARCHAR(20) = N'ok', @message NVARCHAR(400), @actor_fault NVARCHAR(100)
    EXEC dbo.usp_TextFault @Text = @Actor, @Fault = @actor_fault OUTPUT
    SET @message = CASE
            WHEN ISNULL(@Actor, N'') = N'' THEN N'the actor''s name must not be empty'
            WHEN @actor_fault IS NOT NULL THEN N'the actor''s name ' + @actor_fault
        END
    IF @message IS NOT NULL
        SET @code = N'bad_value'
    ELSE
    BEGIN
        BEGIN TRANSACTION
        UPDATE dbo.ClientKeys SET RevokedAt = @now WHERE ClientKeyID = @ClientKeyID AND RevokedAt IS NULL
        IF @@ROWCOUNT > 0
            INSERT INTO dbo.AuditLog (Timestamp, Actor, Action, ObjectType, ObjectID, CompanyID)
            SELECT @now, @Actor, N'client key revoked', N'ClientKeys', ClientKeyID, CompanyID
            FROM dbo.ClientKeys
            WHERE ClientKeyID = @ClientKeyID
        ELSE IF NOT EXISTS (SELECT 1 FROM dbo.ClientKeys WHERE ClientKeyID = @ClientKeyID)
        BEGIN
            SET @code = N'no_such_row'
            SET @message = N'there is no client key ' + ISNULL(LEFT(@ClientKeyID, 64), N'NULL')
        END
        COMMIT TRANSACTION
    END
    SELECT @code AS Code, @message AS Message
END
GO

-- ---- procedures: reading -------------------------------------------------------------------

-- What extractctl and the administration pages show. All take the same filters, NULL for no bound:
-- company (without regard to case), request, from @Since to before @Until (UTC,
-- 2026-11-22T12:13:21.123Z), IDs below @BeforeID (the next page), at most @Rows rows. Times come out
-- as text in that form, newest rows first. RECOMPILE: one plan for all filters would be a bad one.
-- vw_TokenStatus.
ALTER PROCEDURE dbo.usp_ListTokens -- (schema 6)
    @CompanyID NVARCHAR(256) = NULL,
    @RequestID NVARCHAR(64) = NULL,
    @Since     NVARCHAR(24) = NULL,
    @Until     NVARCHAR(24) = NULL,
    @BeforeID  BIGINT = NULL,
    @Rows      INT = NULL
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    DECLARE @from DATETIME2(3) = CONVERT(DATETIME2(3), LEFT(@Since, 23), 126), @to DATETIME2(3) = CONVERT(DATETIME2(3), LEFT(@Until, 23), 126)
    SET @Rows = ISNULL(@Rows, 2147483647)
    SELECT TOP (@Rows)
           TokenID,
           CompanyID,
           CompanyName,
           Provider,
           ApiKey,
           Status,
           StatusReason,
           TotalTokenLimit,
           TotalUsedTokens,
           TotalRemainingTokens,
           ReservedTokens,
           Threshold,
           REPLACE(LEFT(CONVERT(NVARCHAR(23), ThresholdCrossedAt, 121) + CASE WHEN DATEPART(MILLISECOND, ThresholdCrossedAt) = 0 THEN N'.000' ELSE N'00' END, 23), N' ', N'T') + N'Z' AS ThresholdCrossedAt,
           REPLACE(LEFT(CONVERT(NVARCHAR(23), CooldownUntil, 121) + CASE WHEN DATEPART(MILLISECOND, CooldownUntil) = 0 THEN N'.000' ELSE N'00' END, 23), N' ', N'T') + N'Z' AS CooldownUntil,
           REPLACE(LEFT(CONVERT(NVARCHAR(23), CreatedAt, 121) + CASE WHEN DATEPART(MILLISECOND, CreatedAt) = 0 THEN N'.000' ELSE N'00' END, 23), N' ', N'T') + N'Z' AS CreatedAt,
           REPLACE(LEFT(CONVERT(NVARCHAR(23), UpdatedAt, 121) + CASE WHEN DATEPART(MILLISECOND, UpdatedAt) = 0 THEN N'.000' ELSE N'00' END, 23), N' ', N'T') + N'Z' AS UpdatedAt,
           REPLACE(LEFT(CONVERT(NVARCHAR(23), LastUpdated, 121) + CASE WHEN DATEPART(MILLISECOND, LastUpdated) = 0 THEN N'.000' ELSE N'00' END, 23), N' ', N'T') + N'Z' AS LastUpdated
    FROM dbo.vw_TokenStatus
    WHERE (@CompanyID IS NULL OR UPPER(CompanyID) = UPPER(@CompanyID))
      AND (@from IS NULL OR CreatedAt >= @from)
      AND (@to IS NULL OR CreatedAt < @to)
      AND (@BeforeID IS NULL OR TokenID < @BeforeID)
    ORDER BY TokenID DESC
    OPTION (RECOMPILE)
END
GO

-- What was used, by @By: day, company, branch, user or token. Rolled-up months are not in it (vw_UsageSummary).
-- North and north are two branches, whatever this database's collation; a company is one in any case.
ALTER PROCEDURE dbo.usp_UsageReport -- (schema 6)
    @CompanyID NVARCHAR(256) = NULL,
    @RequestID NVARCHAR(64) = NULL,
    @Since     NVARCHAR(24) = NULL,
    @Until     NVARCHAR(24) = NULL,
    @BeforeID  BIGINT = NULL,
    @Rows      INT = NULL,
    @By        NVARCHAR(10) = N'day'
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    DECLARE @from DATETIME2(3) = CONVERT(DATETIME2(3), LEFT(@Since, 23), 126), @to DATETIME2(3) = CONVERT(DATETIME2(3), LEFT(@Until, 23), 126)
    SET @Rows = ISNULL(@Rows, 2147483647)
    IF @By = N'day'
        SELECT TOP (@Rows)
               CAST(Day AS NVARCHAR(10)) AS Day,
               COUNT(*) AS Requests,
               SUM(RequestCount) AS RequestCount,
               SUM(InputTokens) AS InputTokens,
               SUM(OutputTokens) AS OutputTokens,
               SUM(TextPromptTokens) AS TextPromptTokens,
               SUM(ImagePromptTokens) AS ImagePromptTokens,
               SUM(TextCandidatesTokens) AS TextCandidatesTokens,
               SUM(ThoughtsTokens) AS ThoughtsTokens,
               SUM(CachedTokens) AS CachedTokens,
               SUM(TotalTokensUsed) AS TotalTokensUsed,
               SUM(UnknownCalls) AS UnknownCalls
        FROM (SELECT u.*, ISNULL(u.CompanyID, t.CompanyID) AS Company, CONVERT(NVARCHAR(10), u.LoggedAt, 126) AS Day,
                     u.Branch COLLATE Latin1_General_BIN2 AS ExactBranch, u.RequestedBy COLLATE Latin1_General_BIN2 AS ExactUser
              FROM dbo.TokenUsageLogs u
              LEFT JOIN dbo.TokenMaster t ON t.TokenID = u.TokenID) q
        WHERE (@CompanyID IS NULL OR UPPER(Company) = UPPER(@CompanyID))
          AND (@RequestID IS NULL OR RequestID = @RequestID)
          AND (@from IS NULL OR LoggedAt >= @from)
          AND (@to IS NULL OR LoggedAt < @to)
        GROUP BY Day
        ORDER BY Day DESC
        OPTION (RECOMPILE)
    ELSE IF @By = N'company'
        SELECT TOP (@Rows)
               CAST(MIN(Company) AS NVARCHAR(256)) AS CompanyID,
               COUNT(*) AS Requests,
               SUM(RequestCount) AS RequestCount,
               SUM(InputTokens) AS InputTokens,
               SUM(OutputTokens) AS OutputTokens,
               SUM(TextPromptTokens) AS TextPromptTokens,
               SUM(ImagePromptTokens) AS ImagePromptTokens,
               SUM(TextCandidatesTokens) AS TextCandidatesTokens,
               SUM(ThoughtsTokens) AS ThoughtsTokens,
               SUM(CachedTokens) AS CachedTokens,
               SUM(TotalTokensUsed) AS TotalTokensUsed,
               SUM(UnknownCalls) AS UnknownCalls
        FROM (SELECT u.*, ISNULL(u.CompanyID, t.CompanyID) AS Company, CONVERT(NVARCHAR(10), u.LoggedAt, 126) AS Day,
                     u.Branch COLLATE Latin1_General_BIN2 AS ExactBranch, u.RequestedBy COLLATE Latin1_General_BIN2 AS ExactUser
              FROM dbo.TokenUsageLogs u
              LEFT JOIN dbo.TokenMaster t ON t.TokenID = u.TokenID) q
        WHERE (@CompanyID IS NULL OR UPPER(Company) = UPPER(@CompanyID))
          AND (@RequestID IS NULL OR RequestID = @RequestID)
          AND (@from IS NULL OR LoggedAt >= @from)
          AND (@to IS NULL OR LoggedAt < @to)
        GROUP BY Company
        ORDER BY TotalTokensUsed DESC, MIN(Company)
        OPTION (RECOMPILE)
    ELSE IF @By = N'branch'
        SELECT TOP (@Rows)
               CAST(MIN(Company) AS NVARCHAR(256)) AS CompanyID,
               CAST(ExactBranch AS NVARCHAR(256)) AS Branch,
               COUNT(*) AS Requests,
               SUM(RequestCount) AS RequestCount,
               SUM(InputTokens) AS InputTokens,
               SUM(OutputTokens) AS OutputTokens,
               SUM(TextPromptTokens) AS TextPromptTokens,
               SUM(ImagePromptTokens) AS ImagePromptTokens,
               SUM(TextCandidatesTokens) AS TextCandidatesTokens,
               SUM(ThoughtsTokens) AS ThoughtsTokens,
               SUM(CachedTokens) AS CachedTokens,
               SUM(TotalTokensUsed) AS TotalTokensUsed,
               SUM(UnknownCalls) AS UnknownCalls
        FROM (SELECT u.*, ISNULL(u.CompanyID, t.CompanyID) AS Company, CONVERT(NVARCHAR(10), u.LoggedAt, 126) AS Day,
                     u.Branch COLLATE Latin1_General_BIN2 AS ExactBranch, u.RequestedBy COLLATE Latin1_General_BIN2 AS ExactUser
              FROM dbo.TokenUsageLogs u
              LEFT JOIN dbo.TokenMaster t ON t.TokenID = u.TokenID) q
        WHERE (@CompanyID IS NULL OR UPPER(Company) = UPPER(@CompanyID))
          AND (@RequestID IS NULL OR RequestID = @RequestID)
          AND (@from IS NULL OR LoggedAt >= @from)
          AND (@to IS NULL OR LoggedAt < @to)
        GROUP BY Company, ExactBranch
        ORDER BY TotalTokensUsed DESC, MIN(Company), ExactBranch
        OPTION (RECOMPILE)
    ELSE IF @By = N'user'
        SELECT TOP (@Rows)
               CAST(MIN(Company) AS NVARCHAR(256)) AS CompanyID,
               CAST(ExactUser AS NVARCHAR(256)) AS RequestedBy,
               COUNT(*) AS Requests,
               SUM(RequestCount) AS RequestCount,
               SUM(InputTokens) AS InputTokens,
               SUM(OutputTokens) AS OutputTokens,
               SUM(TextPromptTokens) AS TextPromptTokens,
               SUM(ImagePromptTokens) AS ImagePromptTokens,
               SUM(TextCandidatesTokens) AS TextCandidatesTokens,
               SUM(ThoughtsTokens) AS ThoughtsTokens,
               SUM(CachedTokens) AS CachedTokens,
               SUM(TotalTokensUsed) AS TotalTokensUsed,
               SUM(UnknownCalls) AS UnknownCalls
        FROM (SELECT u.*, ISNULL(u.CompanyID, t.CompanyID) AS Company, CONVERT(NVARCHAR(10), u.LoggedAt, 126) AS Day,
                     u.Branch COLLATE Latin1_General_BIN2 AS ExactBranch, u.RequestedBy COLLATE Latin1_General_BIN2 AS ExactUser
              FROM dbo.TokenUsageLogs u
              LEFT JOIN dbo.TokenMaster t ON t.TokenID = u.TokenID) q
        WHERE (@CompanyID IS NULL OR UPPER(Company) = UPPER(@CompanyID))
          AND (@RequestID IS NULL OR RequestID = @RequestID)
          AND (@from IS NULL OR LoggedAt >= @from)
          AND (@to IS NULL OR LoggedAt < @to)
        GROUP BY Company, ExactUser
        ORDER BY TotalTokensUsed DESC, MIN(Company), ExactUser
        OPTION (RECOMPILE)
    ELSE IF @By = N'token'
        SELECT TOP (@Rows)
               CAST(MIN(Company) AS NVARCHAR(256)) AS CompanyID,
               TokenID,
               CAST(MAX(TokenSource) AS NVARCHAR(20)) AS TokenSource,
               COUNT(*) AS Requests,
               SUM(RequestCount) AS RequestCount,
               SUM(InputTokens) AS InputTokens,
               SUM(OutputTokens) AS OutputTokens,
               SUM(TextPromptTokens) AS TextPromptTokens,
               SUM(ImagePromptTokens) AS ImagePromptTokens,
               SUM(TextCandidatesTokens) AS TextCandidatesTokens,
               SUM(ThoughtsTokens) AS ThoughtsTokens,
               SUM(CachedTokens) AS CachedTokens,
               SUM(TotalTokensUsed) AS TotalTokensUsed,
               SUM(UnknownCalls) AS UnknownCalls
        FROM (SELECT u.*, ISNULL(u.CompanyID, t.CompanyID) AS Company, CONVERT(NVARCHAR(10), u.LoggedAt, 126) AS Day,
                     u.Branch COLLATE Latin1_General_BIN2 AS ExactBranch, u.RequestedBy COLLATE Latin1_General_BIN2 AS ExactUser
              FROM dbo.TokenUsageLogs u
              LEFT JOIN dbo.TokenMaster t ON t.TokenID = u.TokenID) q
        WHERE (@CompanyID IS NULL OR UPPER(Company) = UPPER(@CompanyID))
          AND (@RequestID IS NULL OR RequestID = @RequestID)
          AND (@from IS NULL OR LoggedAt >= @from)
          AND (@to IS NULL OR LoggedAt < @to)
        GROUP BY Company, TokenID
        ORDER BY TotalTokensUsed DESC, MIN(Company), TokenID
        OPTION (RECOMPILE)
    ELSE
        THROW 50001, N'@By must be day, company, branch, user or token', 1;
END
GO

-- ApplicationLogs. An entry has no company but that of its request. @ErrorsOnly 1: ERROR and CRITICAL.
ALTER PROCEDURE dbo.usp_ListLogs -- (schema 6)
    @CompanyID NVARCHAR(256) = NULL,
    @RequestID NVARCHAR(64) = NULL,
    @Since     NVARCHAR(24) = NULL,
    @Until     NVARCHAR(24) = NULL,
    @BeforeID  BIGINT = NULL,
    @Rows      INT = NULL,
    @ErrorsOnly INT = 0
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    DECLARE @from DATETIME2(3) = CONVERT(DATETIME2(3), LEFT(@Since, 23), 126), @to DATETIME2(3) = CONVERT(DATETIME2(3), LEFT(@Until, 23), 126)
    SET @Rows = ISNULL(@Rows, 2147483647)
    SELECT TOP (@Rows)
           LogID,
           REPLACE(LEFT(CONVERT(NVARCHAR(23), Timestamp, 121) + CASE WHEN DATEPART(MILLISECOND, Timestamp) = 0 THEN N'.000' ELSE N'00' END, 23), N' ', N'T') + N'Z' AS Timestamp,
           LogLevel,
           Logger,
           Message,
           Exception,
           Module,
           FunctionName,
           LineNumber,
           RequestID,
           Host,
           TraceID
    FROM dbo.ApplicationLogs
    WHERE (@ErrorsOnly = 0 OR LogLevel IN (N'ERROR', N'CRITICAL'))
      AND (@CompanyID IS NULL OR RequestID IN (SELECT r.RequestID FROM dbo.TokenReservations r WHERE UPPER(r.CompanyID) = UPPER(@CompanyID)))
      AND (@RequestID IS NULL OR RequestID = @RequestID)
      AND (@from IS NULL OR Timestamp >= @from)
      AND (@to IS NULL OR Timestamp < @to)
      AND (@BeforeID IS NULL OR LogID < @BeforeID)
    ORDER BY LogID DESC
    OPTION (RECOMPILE)
END
GO

-- RetryAttempts.
ALTER PROCEDURE dbo.usp_ListRetries -- (schema 6)
    @CompanyID NVARCHAR(256) = NULL,
    @RequestID NVARCHAR(64) = NULL,
    @Since     NVARCHAR(24) = NULL,
    @Until     NVARCHAR(24) = NULL,
    @BeforeID  BIGINT = NULL,
    @Rows      INT = NULL
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    DECLARE @from DATETIME2(3) = CONVERT(DATETIME2(3), LEFT(@Since, 23), 126), @to DATETIME2(3) = CONVERT(DATETIME2(3), LEFT(@Until, 23), 126)
    SET @Rows = ISNULL(@Rows, 2147483647)
    SELECT TOP (@Rows)
           RetryID,
           TokenID,
           CompanyID,
           Attempt,
           ErrorMessage,
           CAST(IsRetryable AS INT) AS IsRetryable,
           REPLACE(LEFT(CONVERT(NVARCHAR(23), Timestamp, 121) + CASE WHEN DATEPART(MILLISECOND, Timestamp) = 0 THEN N'.000' ELSE N'00' END, 23), N' ', N'T') + N'Z' AS Timestamp,
           RequestID,
           StatusCode,
           DelayMs
    FROM dbo.RetryAttempts
    WHERE (@CompanyID IS NULL OR UPPER(CompanyID) = UPPER(@CompanyID))
      AND (@RequestID IS NULL OR RequestID = @RequestID)
      AND (@from IS NULL OR Timestamp >= @from)
      AND (@to IS NULL OR Timestamp < @to)
      AND (@BeforeID IS NULL OR RetryID < @BeforeID)
    ORDER BY RetryID DESC
    OPTION (RECOMPILE)
END
GO

-- Reservations that are open or unsettled. @UnsettledOnly 1: vw_UnsettledRequests.
ALTER PROCEDURE dbo.usp_ListReservations -- (schema 6)
    @CompanyID NVARCHAR(256) = NULL,
    @RequestID NVARCHAR(64) = NULL,
    @Since     NVARCHAR(24) = NULL,
    @Until     NVARCHAR(24) = NULL,
    @BeforeID  BIGINT = NULL,
    @Rows      INT = NULL,
    @UnsettledOnly INT = 0
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    DECLARE @from DATETIME2(3) = CONVERT(DATETIME2(3), LEFT(@Since, 23), 126), @to DATETIME2(3) = CONVERT(DATETIME2(3), LEFT(@Until, 23), 126)
    SET @Rows = ISNULL(@Rows, 2147483647)
    IF @UnsettledOnly = 1
        SELECT TOP (@Rows)
               ReservationID,
               RequestID,
               Sequence,
               TokenID,
               CompanyID,
               Branch,
               RequestedBy,
               EstimatedTokens,
               State,
               UnknownCalls,
               TokenSource,
               Host,
               ProcessID,
               REPLACE(LEFT(CONVERT(NVARCHAR(23), CreatedAt, 121) + CASE WHEN DATEPART(MILLISECOND, CreatedAt) = 0 THEN N'.000' ELSE N'00' END, 23), N' ', N'T') + N'Z' AS CreatedAt,
               REPLACE(LEFT(CONVERT(NVARCHAR(23), ExpiresAt, 121) + CASE WHEN DATEPART(MILLISECOND, ExpiresAt) = 0 THEN N'.000' ELSE N'00' END, 23), N' ', N'T') + N'Z' AS ExpiresAt
        FROM dbo.vw_UnsettledRequests
        WHERE (@CompanyID IS NULL OR UPPER(CompanyID) = UPPER(@CompanyID))
          AND (@RequestID IS NULL OR RequestID = @RequestID)
          AND (@from IS NULL OR CreatedAt >= @from)
          AND (@to IS NULL OR CreatedAt < @to)
          AND (@BeforeID IS NULL OR ReservationID < @BeforeID)
        ORDER BY ReservationID DESC
        OPTION (RECOMPILE)
    ELSE
        SELECT TOP (@Rows)
               ReservationID,
               RequestID,
               Sequence,
               TokenID,
               CompanyID,
               Branch,
               RequestedBy,
               EstimatedTokens,
               State,
               UnknownCalls,
               TokenSource,
               Host,
               ProcessID,
               REPLACE(LEFT(CONVERT(NVARCHAR(23), CreatedAt, 121) + CASE WHEN DATEPART(MILLISECOND, CreatedAt) = 0 THEN N'.000' ELSE N'00' END, 23), N' ', N'T') + N'Z' AS CreatedAt,
               REPLACE(LEFT(CONVERT(NVARCHAR(23), ExpiresAt, 121) + CASE WHEN DATEPART(MILLISECOND, ExpiresAt) = 0 THEN N'.000' ELSE N'00' END, 23), N' ', N'T') + N'Z' AS ExpiresAt,
               REPLACE(LEFT(CONVERT(NVARCHAR(23), ClosedAt, 121) + CASE WHEN DATEPART(MILLISECOND, ClosedAt) = 0 THEN N'.000' ELSE N'00' END, 23), N' ', N'T') + N'Z' AS ClosedAt
        FROM dbo.TokenReservations
        WHERE State IN (N'open', N'unsettled')
          AND ClosedAt IS NULL
          AND (@CompanyID IS NULL OR UPPER(CompanyID) = UPPER(@CompanyID))
          AND (@RequestID IS NULL OR RequestID = @RequestID)
          AND (@from IS NULL OR CreatedAt >= @from)
          AND (@to IS NULL OR CreatedAt < @to)
          AND (@BeforeID IS NULL OR ReservationID < @BeforeID)
        ORDER BY ReservationID DESC
        OPTION (RECOMPILE)
END
GO

-- How many tokens have which status; what they have together. What remains, remains of a limit: a token
-- without one (Unlimited) adds nothing to it. OverThreshold counts also what is used up. Cooling: not to be
-- used at this moment.
ALTER PROCEDURE dbo.usp_CountTokens -- (schema 6)
    @CompanyID NVARCHAR(256) = NULL,
    @RequestID NVARCHAR(64) = NULL,
    @Since     NVARCHAR(24) = NULL,
    @Until     NVARCHAR(24) = NULL,
    @BeforeID  BIGINT = NULL,
    @Rows      INT = NULL
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    SET @Rows = ISNULL(@Rows, 2147483647)
    SELECT TOP (@Rows)
           Status,
           COUNT(*) AS Count,
           SUM(CASE WHEN TotalTokenLimit IS NULL THEN 1 ELSE 0 END) AS Unlimited,
           SUM(CAST(TotalTokenLimit AS BIGINT)) AS TotalTokenLimit,
           SUM(CAST(TotalUsedTokens AS BIGINT)) AS TotalUsedTokens,
           SUM(CAST(ReservedTokens AS BIGINT)) AS ReservedTokens,
           SUM(CAST(TotalRemainingTokens AS BIGINT)) AS TotalRemainingTokens,
           SUM(CASE WHEN TotalUsedTokens >= CASE WHEN Threshold > 1 THEN Threshold / 100 ELSE Threshold END * TotalTokenLimit THEN 1 ELSE 0 END) AS OverThreshold,
           SUM(CASE WHEN CooldownUntil > SYSUTCDATETIME() THEN 1 ELSE 0 END) AS Cooling
    FROM dbo.vw_TokenStatus
    WHERE (@CompanyID IS NULL OR UPPER(CompanyID) = UPPER(@CompanyID))
    GROUP BY Status
    ORDER BY Status
    OPTION (RECOMPILE)
END
GO

-- AuditLog.
ALTER PROCEDURE dbo.usp_ListAudit -- (schema 6)
    @CompanyID NVARCHAR(256) = NULL,
    @RequestID NVARCHAR(64) = NULL,
    @Since     NVARCHAR(24) = NULL,
    @Until     NVARCHAR(24) = NULL,
    @BeforeID  BIGINT = NULL,
    @Rows      INT = NULL
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    DECLARE @from DATETIME2(3) = CONVERT(DATETIME2(3), LEFT(@Since, 23), 126), @to DATETIME2(3) = CONVERT(DATETIME2(3), LEFT(@Until, 23), 126)
    SET @Rows = ISNULL(@Rows, 2147483647)
    SELECT TOP (@Rows)
           AuditID,
           REPLACE(LEFT(CONVERT(NVARCHAR(23), Timestamp, 121) + CASE WHEN DATEPART(MILLISECOND, Timestamp) = 0 THEN N'.000' ELSE N'00' END, 23), N' ', N'T') + N'Z' AS Timestamp,
           Actor,
           Action,
           ObjectType,
           ObjectID,
           CompanyID,
           RequestID,
           Detail
    FROM dbo.AuditLog
    WHERE (@CompanyID IS NULL OR UPPER(CompanyID) = UPPER(@CompanyID))
      AND (@RequestID IS NULL OR RequestID = @RequestID)
      AND (@from IS NULL OR Timestamp >= @from)
      AND (@to IS NULL OR Timestamp < @to)
      AND (@BeforeID IS NULL OR AuditID < @BeforeID)
    ORDER BY AuditID DESC
    OPTION (RECOMPILE)
END
GO

-- ClientKeys, but for the hashes.
ALTER PROCEDURE dbo.usp_ListClientKeys -- (schema 6)
    @CompanyID NVARCHAR(256) = NULL,
    @RequestID NVARCHAR(64) = NULL,
    @Since     NVARCHAR(24) = NULL,
    @Until     NVARCHAR(24) = NULL,
    @BeforeID  BIGINT = NULL,
    @Rows      INT = NULL
AS
BEGIN
    SET NOCOUNT ON
    SET XACT_ABORT ON
    DECLARE @from DATETIME2(3) = CONVERT(DATETIME2(3), LEFT(@Since, 23), 126), @to DATETIME2(3) = CONVERT(DATETIME2(3), LEFT(@Until, 23), 126)
    SET @Rows = ISNULL(@Rows, 2147483647)
    SELECT TOP (@Rows)
           ClientKeyID,
           CompanyID,
           CAST(IsAdmin AS INT) AS IsAdmin,
           Label,
           REPLACE(LEFT(CONVERT(NVARCHAR(23), CreatedAt, 121) + CASE WHEN DATEPART(MILLISECOND, CreatedAt) = 0 THEN N'.000' ELSE N'00' END, 23), N' ', N'T') + N'Z' AS CreatedAt,
           REPLACE(LEFT(CONVERT(NVARCHAR(23), RevokedAt, 121) + CASE WHEN DATEPART(MILLISECOND, RevokedAt) = 0 THEN N'.000' ELSE N'00' END, 23), N' ', N'T') + N'Z' AS RevokedAt
    FROM dbo.ClientKeys k
    WHERE (@CompanyID IS NULL OR UPPER(CompanyID) = UPPER(@CompanyID))
      AND (@from IS NULL OR k.CreatedAt >= @from)
      AND (@to IS NULL OR k.CreatedAt < @to)
    ORDER BY k.CreatedAt DESC, ClientKeyID
    OPTION (RECOMPILE)
END
GO

-- ---- roles ---------------------------------------------------------------------------------

-- extract_app: the service. It may execute these procedures and touch no table: they reach the tables
-- by ownership (both belong to dbo).
-- extract_reader: people who look, and the service's second login for /admin (store.reader_user): views, and
-- the procedures that read. extract_admin: people who administrate tokens, with extractctl.
IF ISNULL(CAST(SESSION_CONTEXT(N'extract-fcgi setup') AS INT), 0) <> 8
    THROW 50001, N'extract-fcgi: the step before this one has failed', 1;
IF NOT EXISTS (SELECT 1 FROM sys.database_principals WHERE name = N'extract_app')
    CREATE ROLE extract_app
IF NOT EXISTS (SELECT 1 FROM sys.database_principals WHERE name = N'extract_reader')
    CREATE ROLE extract_reader
IF NOT EXISTS (SELECT 1 FROM sys.database_principals WHERE name = N'extract_admin')
    CREATE ROLE extract_admin
GRANT EXECUTE ON dbo.usp_SchemaVersion TO extract_app
GRANT EXECUTE ON dbo.usp_Ping TO extract_app
GRANT EXECUTE ON dbo.usp_AcquireTokens TO extract_app
GRANT EXECUTE ON dbo.usp_SettleUsage TO extract_app
GRANT EXECUTE ON dbo.usp_RecordLogs TO extract_app
GRANT EXECUTE ON dbo.usp_ExpireReservations TO extract_app
GRANT EXECUTE ON dbo.usp_FindClientKey TO extract_app
GRANT EXECUTE ON dbo.usp_ListTokens TO extract_app
GRANT EXECUTE ON dbo.usp_UsageReport TO extract_app
GRANT EXECUTE ON dbo.usp_ListLogs TO extract_app
GRANT EXECUTE ON dbo.usp_ListRetries TO extract_app
GRANT EXECUTE ON dbo.usp_ListReservations TO extract_app
GRANT EXECUTE ON dbo.usp_CountTokens TO extract_app
GRANT EXECUTE ON dbo.usp_ListAudit TO extract_app
GRANT EXECUTE ON dbo.usp_SchemaVersion TO extract_admin
GRANT EXECUTE ON dbo.usp_Ping TO extract_admin
GRANT EXECUTE ON dbo.usp_AddToken TO extract_admin
GRANT EXECUTE ON dbo.usp_SetTokenStatus TO extract_admin
GRANT EXECUTE ON dbo.usp_SetTokenKey TO extract_admin
GRANT EXECUTE ON dbo.usp_SetTokenLimit TO extract_admin
GRANT EXECUTE ON dbo.usp_ActivateToken TO extract_admin
GRANT EXECUTE ON dbo.usp_ListTokenKeys TO extract_admin
GRANT EXECUTE ON dbo.usp_ResealToken TO extract_admin
GRANT EXECUTE ON dbo.usp_FindClientKey TO extract_admin
GRANT EXECUTE ON dbo.usp_AddClientKey TO extract_admin
GRANT EXECUTE ON dbo.usp_RevokeClientKey TO extract_admin
GRANT EXECUTE ON dbo.usp_ListClientKeys TO extract_admin
GRANT EXECUTE ON dbo.usp_ListTokens TO extract_admin
GRANT EXECUTE ON dbo.usp_UsageReport TO extract_admin
GRANT EXECUTE ON dbo.usp_ListLogs TO extract_admin
GRANT EXECUTE ON dbo.usp_ListRetries TO extract_admin
GRANT EXECUTE ON dbo.usp_ListReservations TO extract_admin
GRANT EXECUTE ON dbo.usp_CountTokens TO extract_admin
GRANT EXECUTE ON dbo.usp_ListAudit TO extract_admin
GRANT EXECUTE ON dbo.usp_ListTokens TO extract_reader
GRANT EXECUTE ON dbo.usp_UsageReport TO extract_reader
GRANT EXECUTE ON dbo.usp_ListLogs TO extract_reader
GRANT EXECUTE ON dbo.usp_ListRetries TO extract_reader
GRANT EXECUTE ON dbo.usp_ListReservations TO extract_reader
GRANT EXECUTE ON dbo.usp_CountTokens TO extract_reader
GRANT EXECUTE ON dbo.usp_ListAudit TO extract_reader
GRANT SELECT ON dbo.vw_TokenStatus TO extract_reader
GRANT SELECT ON dbo.vw_UsageSummary TO extract_reader
GRANT SELECT ON dbo.vw_RecentErrors TO extract_reader
GRANT SELECT ON dbo.vw_FailedRetries TO extract_reader
GRANT SELECT ON dbo.vw_UnsettledRequests TO extract_reader
EXEC sp_set_session_context N'extract-fcgi setup', 9
GO
IF @@ERROR <> 0 SET NOEXEC ON
GO

-- ---- version -------------------------------------------------------------------------------

-- The version of this schema: one row, written last, and only when all of it is there, also where a tool
-- has gone on after an error. Version grows with every change; Major only with one that older programs
-- cannot work with, and they refuse to. Never lowered.
IF ISNULL(CAST(SESSION_CONTEXT(N'extract-fcgi setup') AS INT), 0) <> 9
    THROW 50001, N'extract-fcgi: the step before this one has failed', 1;
DECLARE @missing NVARCHAR(2000) = N''
SELECT @missing = @missing + N' ' + v.name
FROM (VALUES (N'vw_TokenStatus'), (N'vw_UsageSummary'), (N'vw_RecentErrors'), (N'vw_FailedRetries'), (N'vw_UnsettledRequests'),
             (N'TR_TokenMaster_TotalTokenLimit'), (N'usp_SchemaVersion'), (N'usp_Ping'), (N'usp_EnsureSummary'), (N'usp_ChangeToken'),
             (N'usp_UsableKey'), (N'usp_AcquireOneByOne'), (N'usp_AcquireTokens'), (N'usp_SettleOneByOne'), (N'usp_SettleUsage'),
             (N'usp_RecordLogs'), (N'usp_ExpireReservations'),
             (N'usp_TextFault'), (N'usp_AddToken'), (N'usp_SetTokenStatus'), (N'usp_SetTokenKey'), (N'usp_SetTokenLimit'),
             (N'usp_ListTokens'), (N'usp_UsageReport'), (N'usp_ListLogs'), (N'usp_ListRetries'), (N'usp_ListReservations'),
             (N'usp_CountTokens'), (N'usp_ListAudit'), (N'usp_ActivateToken'), (N'usp_ListTokenKeys'), (N'usp_ResealToken'),
             (N'usp_FindClientKey'), (N'usp_AddClientKey'), (N'usp_RevokeClientKey'), (N'usp_ListClientKeys')) AS v (name)
WHERE NOT EXISTS (SELECT 1 FROM sys.sql_modules m
                  WHERE m.object_id = OBJECT_ID(N'dbo.' + v.name) AND m.definition LIKE N'%(schema 6)%')
IF @missing <> N''
BEGIN
    SET @missing = N'extract-fcgi: the setup is not complete, and no version was noted. These are missing, or older:' + @missing;
    THROW 50001, @missing, 1;
END
BEGIN TRANSACTION
IF OBJECT_ID(N'dbo.SchemaVersion', N'U') IS NULL
    CREATE TABLE dbo.SchemaVersion (
        SchemaVersionID INT NOT NULL, Version INT NOT NULL, -- on one line: at the start of one tsql takes it for a command
        Major           INT NOT NULL,
        AppliedAt       DATETIME2(3) NOT NULL CONSTRAINT DF_SchemaVersion_AppliedAt DEFAULT (SYSUTCDATETIME()),
        CONSTRAINT PK_SchemaVersion PRIMARY KEY CLUSTERED (SchemaVersionID),
        CONSTRAINT CK_SchemaVersion_OneRow CHECK (SchemaVersionID = 1)
    )
UPDATE dbo.SchemaVersion
SET Version = 6, Major = 1, AppliedAt = SYSUTCDATETIME()
WHERE SchemaVersionID = 1 AND Version < 6
IF NOT EXISTS (SELECT 1 FROM dbo.SchemaVersion WHERE SchemaVersionID = 1)
    INSERT INTO dbo.SchemaVersion (SchemaVersionID, Version, Major) VALUES (1, 6, 1)
COMMIT TRANSACTION
PRINT N'extract-fcgi: schema version 6 is complete'
GO
SET NOEXEC OFF
GO
-- Also after a failure, where the session goes on: others may try.
IF APPLOCK_MODE(N'public', N'extract-fcgi setup', N'Session') <> N'NoLock'
    EXEC sp_releaseapplock @Resource = N'extract-fcgi setup', @LockOwner = N'Session'
GO
