-- old_3.sql: a third one: three of the five tables, columns missing, text columns of the old kind,
-- a foreign key with another name, an index nobody asked for, and SMALLDATETIME.
CREATE TABLE dbo.TokenMaster (
    TokenID   INT IDENTITY(100, 1) NOT NULL PRIMARY KEY,
    CompanyID NVARCHAR(256) NOT NULL,
    ApiKey    VARCHAR(100) NOT NULL,
    Status    VARCHAR(10) NOT NULL,
    Note      VARCHAR(100) NULL
)
GO
CREATE TABLE dbo.TokenUsageLogs (
    UsageID         INT IDENTITY(1, 1) NOT NULL PRIMARY KEY,
    TokenID         INT NULL CONSTRAINT fk_t REFERENCES dbo.TokenMaster (TokenID),
    Branch          VARCHAR(50) NULL,
    InputTokens     SMALLINT NULL,
    TotalTokensUsed INT NOT NULL,
    LoggedAt        SMALLDATETIME NOT NULL
)
GO
CREATE INDEX ix_nobody_asked ON dbo.TokenUsageLogs (Branch, TokenID, LoggedAt)
GO
CREATE TABLE dbo.ApplicationLogs (
    LogID     INT IDENTITY(1, 1) NOT NULL PRIMARY KEY,
    Timestamp SMALLDATETIME NOT NULL,
    LogLevel  VARCHAR(10) NOT NULL,
    Message   TEXT NULL
)
GO
INSERT INTO dbo.TokenMaster (CompanyID, ApiKey, Status) VALUES (N'NT047', 'AIza-few-0001', 'Active')
GO
INSERT INTO dbo.TokenUsageLogs (TokenID, Branch, InputTokens, TotalTokensUsed, LoggedAt)
VALUES (100, 'a', 100, 123, '2026-01-31 23:59:00'), (100, 'b', NULL, 77, '2026-02-01 00:00:00')
GO
INSERT INTO dbo.ApplicationLogs (Timestamp, LogLevel, Message) VALUES ('2026-01-31 23:59:00', 'INFO', 'old words')
GO
