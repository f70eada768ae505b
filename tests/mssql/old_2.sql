-- old_2.sql: another one: BIGINT keys, NVARCHAR, DATETIME2, no foreign keys at all, and everything
-- odd in its data: duplicate summaries, orphans, statuses nobody knows, thresholds as percentages and
-- as numbers of tokens, totals below their rows.
CREATE TABLE dbo.TokenMaster (
    TokenID         BIGINT IDENTITY(1, 1) NOT NULL CONSTRAINT PK_Tok PRIMARY KEY,
    CompanyID       NVARCHAR(100) NOT NULL,
    CompanyName     NVARCHAR(200) NULL,
    ApiKey          NVARCHAR(MAX) NOT NULL,
    Provider        NVARCHAR(50) NULL,
    TotalTokenLimit BIGINT NULL,
    Status          NVARCHAR(50) NULL,
    CreatedAt       DATETIME2 NOT NULL DEFAULT SYSDATETIME()
)
GO
CREATE TABLE dbo.TokenUsageLogs (
    UsageID              BIGINT IDENTITY(1, 1) NOT NULL PRIMARY KEY,
    TokenID              BIGINT NULL,
    Branch               NVARCHAR(400) NULL,
    RequestedBy          NVARCHAR(100) NULL,
    InputTokens          BIGINT NULL,
    OutputTokens         BIGINT NULL,
    TextPromptTokens     BIGINT NULL,
    ImagePromptTokens    BIGINT NULL,
    TextCandidatesTokens BIGINT NULL,
    TotalTokensUsed      BIGINT NULL,
    RequestCount         BIGINT NULL,
    LoggedAt             DATETIME2 NOT NULL DEFAULT SYSDATETIME()
)
GO
CREATE INDEX ix_branch_logged ON dbo.TokenUsageLogs (Branch, LoggedAt)
GO
CREATE TABLE dbo.TokenUsageSummary (
    SummaryID            BIGINT IDENTITY(1, 1) NOT NULL PRIMARY KEY,
    TokenID              BIGINT NOT NULL,
    TotalUsedTokens      BIGINT NULL,
    TotalRemainingTokens BIGINT NULL,
    Threshold            DECIMAL(18, 2) NULL,
    LastUpdated          DATETIME2 NULL
)
GO
CREATE TABLE dbo.ApplicationLogs (
    LogID        BIGINT IDENTITY(1, 1) NOT NULL PRIMARY KEY,
    Timestamp    DATETIME2 NOT NULL,
    LogLevel     NVARCHAR(50) NOT NULL,
    Logger       NVARCHAR(255) NULL,
    Message      NVARCHAR(MAX) NULL,
    Exception    NVARCHAR(MAX) NULL,
    Module       NVARCHAR(255) NULL,
    FunctionName NVARCHAR(255) NULL,
    LineNumber   INT NULL
)
GO
CREATE TABLE dbo.RetryAttempts (
    RetryID      BIGINT IDENTITY(1, 1) NOT NULL PRIMARY KEY,
    TokenID      BIGINT NULL,
    CompanyID    NVARCHAR(100) NULL,
    Attempt      INT NOT NULL,
    ErrorMessage NVARCHAR(MAX) NULL,
    IsRetryable  INT NOT NULL,
    Timestamp    DATETIME2 NOT NULL
)
GO
INSERT INTO dbo.TokenMaster (CompanyID, ApiKey, TotalTokenLimit, Status)
VALUES (N'Ärzte', N'AIza-odd-0001', 1000, N'active'), (N'Ärzte', N'AIza-odd-0002', 1000, N'Paused'), (N'NT047', N'AIza-odd-0003', 200000, N'Active'),
       (N'NT047', N'AIza-odd-0004', NULL, NULL)
GO
INSERT INTO dbo.TokenUsageLogs (TokenID, Branch, RequestedBy, TotalTokensUsed, RequestCount)
VALUES (1, N'Köln', N'jürgen', 300, 1), (1, N'Köln', N'jürgen', 400, NULL), (2, NULL, NULL, NULL, 1), (3, N'x', N'y', 50000, 2), (99, N'x', N'y', 77, 1)
GO
INSERT INTO dbo.TokenUsageSummary (TokenID, TotalUsedTokens, TotalRemainingTokens, Threshold)
VALUES (1, 600, 400, 80), (1, 650, 350, 80), (2, NULL, NULL, NULL), (3, 60000, 140000, 150000), (88, 5, 5, 0.5), (4, 10, NULL, 0)
GO
INSERT INTO dbo.ApplicationLogs (Timestamp, LogLevel, Message) VALUES (SYSDATETIME(), N'ERROR', N'naïve')
GO
INSERT INTO dbo.RetryAttempts (TokenID, CompanyID, Attempt, IsRetryable, Timestamp) VALUES (1, N'Ärzte', 1, 1, SYSDATETIME())
GO
