-- old_4.sql: a fourth one: made by hand, without a single primary key or index, with CHAR columns that
-- are filled up with spaces, and API keys that were pasted with a line end.
CREATE TABLE dbo.TokenMaster (
    TokenID         INT IDENTITY(1, 1) NOT NULL,
    CompanyID       CHAR(20) NOT NULL,
    CompanyName     NCHAR(40) NULL,
    ApiKey          CHAR(100) NOT NULL,
    TotalTokenLimit NUMERIC(18, 0) NULL,
    Status          CHAR(10) NOT NULL
)
GO
CREATE TABLE dbo.TokenUsageLogs (
    UsageID         INT IDENTITY(1, 1) NOT NULL,
    TokenID         INT NULL,
    Branch          CHAR(20) NULL,
    TotalTokensUsed INT NULL,
    LoggedAt        DATETIME NOT NULL
)
GO
CREATE TABLE dbo.TokenUsageSummary (
    SummaryID       INT IDENTITY(1, 1) NOT NULL,
    TokenID         INT NOT NULL,
    TotalUsedTokens INT NOT NULL
)
GO
INSERT INTO dbo.TokenMaster (CompanyID, CompanyName, ApiKey, TotalTokenLimit, Status)
VALUES ('NT047', N'Nord', 'AIza-hand-0001' + CHAR(13) + CHAR(10), 1000, 'Active'), ('SU001', NULL, 'AIza-hand-0002', 500, 'Exceeded')
GO
INSERT INTO dbo.TokenUsageLogs (TokenID, Branch, TotalTokensUsed, LoggedAt)
VALUES (1, 'North', 300, '2026-02-01T10:00:00'), (2, 'North', 500, '2026-02-01T11:00:00')
GO
INSERT INTO dbo.TokenUsageSummary (TokenID, TotalUsedTokens) VALUES (1, 300), (2, 500)
GO
