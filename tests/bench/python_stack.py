"""The kind of stack people would use instead: FastAPI under uvicorn, httpx, synchronous handlers in a thread pool, a
database row for each log entry; SQLite, or ODBC where there is a server. Written as generously as that allows: HTTP
and database connections are kept, nothing is checked that need not be. No reservation, no exactly-once, no deadline.

    python3 python_stack.py COMPANY…                    makes the tables, and a token for each company
    python3 -m uvicorn --workers 2 python_stack:app     serves POST /extract

    UPSTREAM   what stands before /models/…     CA_FILE   certificate of an https UPSTREAM
    SQLITE     the database file                DSN       an ODBC connection string instead
"""
import base64
import os
import random
import sqlite3
import sys
import threading
import time

import httpx
from fastapi import FastAPI, File, Form, UploadFile
from fastapi.responses import JSONResponse

UPSTREAM = os.environ["UPSTREAM"]
MODEL = os.environ.get("MODEL", "gemini-3.5-flash")
DSN = os.environ.get("DSN")
PROMPT = "Extract the invoice as JSON."

app = FastAPI()
client = httpx.Client(timeout=120, limits=httpx.Limits(max_connections=None), verify=os.environ.get("CA_FILE") or True)
local = threading.local()

COLUMNS = {
    "TokenMaster": "CompanyID {text}, ApiKey {text}, Status {text}, TotalTokenLimit {number}",
    "TokenUsageLogs": "TokenID {number}, Branch {text}, RequestedBy {text}, InputTokens {number}, OutputTokens {number},"
                      " TextPromptTokens {number}, ImagePromptTokens {number}, TextCandidatesTokens {number},"
                      " TotalTokensUsed {number}, RequestCount {number}, LoggedAt {time} DEFAULT CURRENT_TIMESTAMP",
    "TokenUsageSummary": "TokenID {number}, TotalUsedTokens {number}, TotalRemainingTokens {number}",
    "ApplicationLogs": "LogLevel {text}, Logger {text}, Message {text}, LoggedAt {time} DEFAULT CURRENT_TIMESTAMP",
    "RetryAttempts": "TokenID {number}, CompanyID {text}, Attempt {number}, ErrorMessage {text}, IsRetryable {number}",
}
INDEXES = ("CREATE INDEX IX_TokenMaster_CompanyID ON TokenMaster(CompanyID)",
           "CREATE INDEX IX_TokenUsageSummary_TokenID ON TokenUsageSummary(TokenID)")


def db():
    """This thread's connection."""
    if getattr(local, "connection", None) is None:
        if DSN:
            import pyodbc
            local.connection = pyodbc.connect(DSN, autocommit=True)
        else:
            local.connection = sqlite3.connect(os.environ["SQLITE"], isolation_level=None, timeout=60)
            local.connection.execute("PRAGMA journal_mode=WAL")
    return local.connection


def set_up(companies):
    types = ({"text": "NVARCHAR(256)", "number": "BIGINT", "time": "DATETIME2", "id": "BIGINT IDENTITY PRIMARY KEY"} if DSN
             else {"text": "TEXT", "number": "INTEGER", "time": "TEXT", "id": "INTEGER PRIMARY KEY"})
    cursor = db().cursor()
    for table, columns in COLUMNS.items():
        cursor.execute(f"CREATE TABLE {table}(ID {types['id']}, {columns.format(**types)})")
    for statement in INDEXES:
        cursor.execute(statement)
    for company in companies:
        cursor.execute("INSERT INTO TokenMaster(CompanyID, ApiKey, Status, TotalTokenLimit) VALUES(?, 'k', 'Active', 1000000000000)",
                       (company,))
    cursor.execute("INSERT INTO TokenUsageSummary(TokenID, TotalUsedTokens, TotalRemainingTokens)"
                   " SELECT ID, 0, TotalTokenLimit FROM TokenMaster")


def log(level, message):
    db().cursor().execute("INSERT INTO ApplicationLogs(LogLevel, Logger, Message) VALUES(?, ?, ?)", (level, "api", message))


@app.get("/healthz")
def healthz():
    return {}


@app.post("/extract")
def extract(file: UploadFile = File(...), companyID: str = Form(...), username: str = Form(...), branch: str = Form("")):
    cursor = db().cursor()
    log("INFO", f"extract for {companyID}")
    rows = cursor.execute("SELECT ID, ApiKey FROM TokenMaster WHERE CompanyID = ? AND Status = 'Active'", (companyID,)).fetchall()
    if not rows:
        return JSONResponse({"detail": "No active token found for your company. Please contact support."}, 403)
    token, key = random.choice(rows)
    data = base64.b64encode(file.file.read()).decode()
    body = {"contents": [{"parts": [{"text": PROMPT}, {"inlineData": {"mimeType": file.content_type, "data": data}}]}]}
    delay = 1.0
    for attempt in range(4):
        answer = client.post(f"{UPSTREAM}/models/{MODEL}:generateContent", json=body, headers={"x-goog-api-key": key})
        if answer.status_code == 200:
            break
        cursor.execute("INSERT INTO RetryAttempts(TokenID, CompanyID, Attempt, ErrorMessage, IsRetryable) VALUES(?, ?, ?, ?, 1)",
                       (token, companyID, attempt + 1, answer.text[:200]))
        time.sleep(min(30, delay) * random.uniform(0.5, 1.5))
        delay *= 2
    else:
        return JSONResponse({"detail": "Failed to process invoice"}, 502)
    content = answer.json()
    used = content["usageMetadata"]
    by = {detail["modality"]: detail["tokenCount"] for detail in used.get("promptTokensDetails", [])}
    cursor.execute("INSERT INTO TokenUsageLogs(TokenID, Branch, RequestedBy, InputTokens, OutputTokens, TextPromptTokens,"
                   " ImagePromptTokens, TextCandidatesTokens, TotalTokensUsed, RequestCount) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, 1)",
                   (token, branch, username, used["promptTokenCount"], used["candidatesTokenCount"], by.get("TEXT", 0),
                    by.get("IMAGE", 0), used["candidatesTokenCount"], used["totalTokenCount"]))
    cursor.execute("UPDATE TokenUsageSummary SET TotalUsedTokens = TotalUsedTokens + ?,"
                   " TotalRemainingTokens = TotalRemainingTokens - ? WHERE TokenID = ?",
                   (used["totalTokenCount"], used["totalTokenCount"], token))
    log("INFO", "extracted")
    return {"data": content["candidates"][0]["content"]["parts"][0]["text"]}


if __name__ == "__main__":
    set_up(sys.argv[1:])
