-- old_1.sql: a database of the system before this one. INT keys, VARCHAR, DATETIME in local time,
-- foreign keys, the indexes of its guide, and data with nothing odd in it but totals above the rows.
CREATE TABLE dbo.TokenMaster (
    TokenID         INT IDENTITY(1, 1) PRIMARY KEY,
    CompanyID       VARCHAR(50) NOT NULL,
    CompanyName     VARCHAR(255) NULL,
    ApiKey          VARCHAR(500) NOT NULL,
    Provider        VARCHAR(50) DEFAULT 'Gemini',
    TotalTokenLimit INT NULL,
    Status          VARCHAR(20) NOT NULL DEFAULT 'Active',
    CreatedAt       DATETIME DEFAULT GETDATE()
)
GO
CREATE INDEX idx_company_status ON dbo.TokenMaster (CompanyID, Status)
GO
CREATE INDEX idx_created ON dbo.TokenMaster (CreatedAt)
GO
CREATE TABLE dbo.TokenUsageLogs (
    UsageID              INT IDENTITY(1, 1) PRIMARY KEY,
    TokenID              INT NULL,
    Branch               VARCHAR(100) NULL,
    RequestedBy          VARCHAR(100) NULL,
    InputTokens          INT DEFAULT 0,
    OutputTokens         INT DEFAULT 0,
    TextPromptTokens     INT DEFAULT 0,
    ImagePromptTokens    INT DEFAULT 0,
    TextCandidatesTokens INT DEFAULT 0,
    TotalTokensUsed      INT DEFAULT 0,
    RequestCount         INT DEFAULT 1,
    LoggedAt             DATETIME DEFAULT GETDATE(),
    CONSTRAINT FK_Usage_Token FOREIGN KEY (TokenID) REFERENCES dbo.TokenMaster (TokenID)
)
GO
CREATE INDEX idx_tokenid ON dbo.TokenUsageLogs (TokenID)
GO
CREATE INDEX idx_loggedat ON dbo.TokenUsageLogs (LoggedAt)
GO
CREATE INDEX idx_branch ON dbo.TokenUsageLogs (Branch)
GO
CREATE TABLE dbo.TokenUsageSummary (
    SummaryID            INT IDENTITY(1, 1) PRIMARY KEY,
    TokenID              INT NOT NULL,
    TotalUsedTokens      INT DEFAULT 0,
    TotalRemainingTokens INT NULL,
    Threshold            FLOAT DEFAULT 0.8,
    LastUpdated          DATETIME DEFAULT GETDATE(),
    CONSTRAINT FK_Summary_Token FOREIGN KEY (TokenID) REFERENCES dbo.TokenMaster (TokenID)
)
GO
CREATE UNIQUE INDEX idx_summary_tokenid ON dbo.TokenUsageSummary (TokenID)
GO
CREATE TABLE dbo.ApplicationLogs (
    LogID        INT IDENTITY(1, 1) PRIMARY KEY,
    Timestamp    DATETIME DEFAULT GETDATE(),
    LogLevel     VARCHAR(20) NULL,
    Logger       VARCHAR(100) NULL,
    Message      VARCHAR(4000) NULL,
    Exception    VARCHAR(4000) NULL,
    Module       VARCHAR(100) NULL,
    FunctionName VARCHAR(100) NULL,
    LineNumber   INT NULL
)
GO
CREATE INDEX idx_timestamp ON dbo.ApplicationLogs (Timestamp)
GO
CREATE INDEX idx_level ON dbo.ApplicationLogs (LogLevel)
GO
CREATE INDEX idx_logger ON dbo.ApplicationLogs (Logger)
GO
CREATE TABLE dbo.RetryAttempts (
    RetryID      INT IDENTITY(1, 1) PRIMARY KEY,
    TokenID      INT NULL,
    CompanyID    VARCHAR(50) NULL,
    Attempt      INT NOT NULL,
    ErrorMessage VARCHAR(1000) NULL,
    IsRetryable  BIT DEFAULT 0,
    Timestamp    DATETIME DEFAULT GETDATE()
)
GO
CREATE INDEX idx_retry_tokenid ON dbo.RetryAttempts (TokenID)
GO
CREATE INDEX idx_retry_company ON dbo.RetryAttempts (CompanyID)
GO
INSERT INTO dbo.TokenMaster (CompanyID, CompanyName, ApiKey, TotalTokenLimit, Status)
VALUES ('NT047', 'Nord Trading', 'AIza-old-0001', 100000, 'Active'),
       ('NT047', 'Nord Trading', 'AIza-old-0002', NULL, 'Active'),
       ('SU001', 'Sud', 'AIza-old-0003', 5000, 'Exceeded')
GO
INSERT INTO dbo.TokenUsageLogs (TokenID, Branch, RequestedBy, InputTokens, OutputTokens, TotalTokensUsed)
VALUES (1, 'North', 'ann', 800, 200, 1000), (1, 'South', 'bob', 1600, 400, 2000), (2, 'North', 'ann', 10, 5, 15), (3, 'Main', 'eve', 4000, 1000, 5000)
GO
INSERT INTO dbo.TokenUsageSummary (TokenID, TotalUsedTokens, TotalRemainingTokens)
VALUES (1, 10000, 90000), (2, 15, NULL), (3, 5000, 0)
GO
INSERT INTO dbo.ApplicationLogs (LogLevel, Logger, Message) VALUES ('INFO', 'api', 'started'), ('ERROR', 'api', 'it broke')
GO
INSERT INTO dbo.RetryAttempts (TokenID, CompanyID, Attempt, ErrorMessage, IsRetryable) VALUES (1, 'NT047', 1, '503', 1)
GO
