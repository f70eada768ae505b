-- sample_data.sql: a few companies, tokens and rows to look at, for a test database. Never for
-- production: the keys are no keys. It may be run again, and then adds nothing.
SET ANSI_NULLS, ANSI_PADDING, ANSI_WARNINGS, ARITHABORT, CONCAT_NULL_YIELDS_NULL, QUOTED_IDENTIFIER ON
GO
SET NUMERIC_ROUNDABORT OFF
GO
SET NOCOUNT ON
GO
SET XACT_ABORT ON
GO

-- Five tokens, one of each kind, made as an administrator makes them. NT047 has two that serve.
IF NOT EXISTS (SELECT 1 FROM dbo.TokenMaster WHERE ApiKey LIKE N'sample-key-%')
BEGIN
    EXEC dbo.usp_AddToken @Actor = N'sample_data.sql', @CompanyID = N'NT047', @CompanyName = N'Nordtrade Ltd', @ApiKey = N'sample-key-0001',
         @TotalTokenLimit = 1000000
    EXEC dbo.usp_AddToken @Actor = N'sample_data.sql', @CompanyID = N'NT047', @CompanyName = N'Nordtrade Ltd', @ApiKey = N'sample-key-0002',
         @TotalTokenLimit = NULL
    EXEC dbo.usp_AddToken @Actor = N'sample_data.sql', @CompanyID = N'SU001', @CompanyName = N'South GmbH', @ApiKey = N'sample-key-0003',
         @TotalTokenLimit = 20000, @Threshold = 0.5
    EXEC dbo.usp_AddToken @Actor = N'sample_data.sql', @CompanyID = N'EX001', @CompanyName = N'Expired SA', @ApiKey = N'sample-key-0004'
    EXEC dbo.usp_AddToken @Actor = N'sample_data.sql', @CompanyID = N'DI001', @CompanyName = N'Disabled Inc', @ApiKey = N'sample-key-0005'
    UPDATE dbo.TokenMaster SET Status = N'Expired' WHERE ApiKey = N'sample-key-0004'
    UPDATE dbo.TokenMaster SET Status = N'Disabled', StatusReason = N'sample' WHERE ApiKey = N'sample-key-0005'
END
GO

-- What requests leave, written by the procedures that the service calls: usage, a request that is
-- unsettled, failed calls, log entries.
DECLARE @first BIGINT = (SELECT MIN(TokenID) FROM dbo.TokenMaster WHERE ApiKey = N'sample-key-0001')
DECLARE @third BIGINT = (SELECT MIN(TokenID) FROM dbo.TokenMaster WHERE ApiKey = N'sample-key-0003')
DECLARE @items NVARCHAR(MAX), @entries NVARCHAR(MAX), @attempts NVARCHAR(MAX), @n INT = 0, @token BIGINT
DECLARE @common NVARCHAR(400) = N'"tokenSource":"store","model":"gemini-3.5-flash","textPromptTokens":900,"imagePromptTokens":300,'
        + N'"textCandidatesTokens":350,"thoughtsTokens":120,"cachedTokens":0,"unknownCalls":0,"durationMs":2400'
IF NOT EXISTS (SELECT 1 FROM dbo.TokenUsageLogs WHERE RequestID LIKE N'00000000-0000-7000-8000-%')
BEGIN
    WHILE @n < 6
    BEGIN
        SET @n = @n + 1
        SET @token = CASE WHEN @n % 2 = 0 THEN @third ELSE @first END
        SET @items = N'[{"i":0,"requestId":"00000000-0000-7000-8000-00000000000' + CAST(@n AS NVARCHAR(1)) + N'","tokenId":'
                   + CAST(@token AS NVARCHAR(40)) + N',"companyId":"sample","branch":"' + CASE WHEN @n < 4 THEN N'North' ELSE N'South' END
                   + N'","requestedBy":"ann","inputTokens":1200,"outputTokens":350,"totalTokens":' + CAST(1550 + 120 * @n AS NVARCHAR(10))
                   + N',"requestCount":1,' + @common + N'}]'
        EXEC dbo.usp_SettleUsage @Items = @items
    END
    SET @items = N'[{"i":0,"requestId":"00000000-0000-7000-8000-000000000007","tokenId":' + CAST(@first AS NVARCHAR(40))
               + N',"companyId":"sample","branch":"North","requestedBy":"bob","inputTokens":0,"outputTokens":0,"totalTokens":0,"requestCount":0,'
               + REPLACE(@common, N'"unknownCalls":0', N'"unknownCalls":1') + N'}]'
    EXEC dbo.usp_SettleUsage @Items = @items
    SET @entries = N'[{"level":"INFO","logger":"main","message":"started","module":"main.c","function":"main","line":1,"host":"sample"},'
                 + N'{"level":"ERROR","logger":"gemini","message":"no answer","exception":"503 UNAVAILABLE","module":"gemini.c",'
                 + N'"function":"call","line":2,"requestId":"00000000-0000-7000-8000-000000000007","host":"sample"}]'
    SET @attempts = N'[{"tokenId":' + CAST(@first AS NVARCHAR(40)) + N',"companyId":"NT047","attempt":1,"errorMessage":"503 UNAVAILABLE",'
                  + N'"isRetryable":1,"requestId":"00000000-0000-7000-8000-000000000007","statusCode":503,"delayMs":1000}]'
    EXEC dbo.usp_RecordLogs @Entries = @entries, @Attempts = @attempts
END
GO
SELECT * FROM dbo.vw_TokenStatus ORDER BY TokenID
GO
