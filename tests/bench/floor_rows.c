/* floor_rows.c - the rows of the floor with rows. See floor_rows.h.
 *
 * Two transactions stand in the way of a request: its reservation, and its settlement with the log entry.
 * Those that wait at the same moment share one, whichever of the two they are: who finds no writer at work
 * becomes the writer and takes all that wait. A run's rows are each of its own, but a token that many of
 * them use is read once, and its sums are written once.
 *
 * As in the product (fcgi-app/store_sqlite_db.c says why), processes take turns by flock(), and a turn
 * ends with the commit: another process writes while this one waits for the disk, and only then is anyone
 * answered. Within a process the next writer begins after that wait: measured, runs are larger then, and a
 * request costs an eighth (two processes) to a quarter (one) less processor time.
 *
 * No request is looked for that came before, none is refused, nothing is tried again, no limit is held. */
#include "floor_rows.h"

#include <fcntl.h>
#include <pthread.h>
#include <sqlite3.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#define ESTIMATE 8000      /* gemini.reserve_tokens, as shipped */
#define RESERVED_MS 180000 /* server.deadline, and a minute */
#define TIME_SIZE 25

enum { BEGIN, COMMIT, TOKEN, SUMS, RESERVE, CLOSE, USAGE, ENTRY, STATEMENTS };

static const char *const sql[STATEMENTS] = {
    [BEGIN] = "BEGIN IMMEDIATE",
    [COMMIT] = "COMMIT",
    [TOKEN] = "SELECT TokenID, ApiKey FROM TokenMaster WHERE CompanyID = ?1 AND Status = 'Active'",
    [SUMS] = "UPDATE TokenUsageSummary"
             " SET TotalUsedTokens = TotalUsedTokens + ?2, ReservedTokens = ReservedTokens + ?3,"
             "     TotalRemainingTokens = TotalRemainingTokens - ?2, LastUpdated = ?4"
             " WHERE TokenID = ?1",
    [RESERVE] = "INSERT INTO TokenReservations (RequestID, Sequence, TokenID, CompanyID, Branch,"
                " RequestedBy, EstimatedTokens, State, UnknownCalls, TokenSource, Host, ProcessID,"
                " CreatedAt, ExpiresAt)"
                " VALUES (?1, 1, ?2, ?3, ?4, ?5, ?6, 'open', 0, 'store', ?7, ?8, ?9, ?10)",
    [CLOSE] = "UPDATE TokenReservations SET State = 'settled', ClosedAt = ?2"
              " WHERE ReservationID = ?1",
    [USAGE] = "INSERT INTO TokenUsageLogs (TokenID, Branch, RequestedBy, InputTokens, OutputTokens,"
              " TextPromptTokens, ImagePromptTokens, TextCandidatesTokens, TotalTokensUsed,"
              " RequestCount, LoggedAt, RequestID, CompanyID, TokenSource, Model, DurationMs)"
              " VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, 1, ?10, ?11, ?12, 'store', ?13, ?14)",
    [ENTRY] = "INSERT INTO ApplicationLogs (Timestamp, LogLevel, Logger, Message, Module,"
              " FunctionName, LineNumber, RequestID, Host)"
              " VALUES (?1, 'INFO', 'floor_rows', ?2, 'floor_rows.c', 'settle', ?3, ?4, ?5)",
};

struct rows {
    sqlite3 *db; /* of whoever is the writer, and so without locks of SQLite's own */
    sqlite3_stmt *statements[STATEMENTS];
    int turn_fd, log_fd;
    char host[256];
    int64_t pid;
    _Atomic uint64_t next_id; /* from a random one on */

    pthread_mutex_t lock;
    struct rows_request *first, **last; /* those that wait */
    int has_writer;
};

/* What all of one transaction share. */
struct run {
    struct rows *rows;
    char now[TIME_SIZE], expires[TIME_SIZE];
    const struct rows_request *known; /* whose company's token is read */
    int64_t token_id, used, reserved; /* sums that are to be written yet */
};

static void die(struct rows *rows, const char *what)
{
    fprintf(stderr, "floor: %s: %s\n", what, sqlite3_errmsg(rows->db));
    exit(1);
}

/* types: i, an int64_t, or t, a text, for each parameter. Returns the first row, or NULL. */
static sqlite3_stmt *run_sql(struct rows *rows, int which, const char *types, ...)
{
    sqlite3_stmt *statement = rows->statements[which];
    va_list values;

    va_start(values, types);
    for (int at = 1; *types != '\0'; types++, at++) {
        if (*types == 'i')
            sqlite3_bind_int64(statement, at, va_arg(values, int64_t));
        else
            sqlite3_bind_text(statement, at, va_arg(values, const char *), -1, SQLITE_STATIC);
    }
    va_end(values);
    int result = sqlite3_step(statement);
    if (result == SQLITE_ROW)
        return statement;
    if (result != SQLITE_DONE)
        die(rows, sql[which]);
    sqlite3_reset(statement);
    return NULL;
}

static int64_t now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_REALTIME, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void format_time(int64_t ms, char out[TIME_SIZE])
{
    time_t seconds = (time_t)(ms / 1000);
    char date[20];
    struct tm tm;

    strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%S", gmtime_r(&seconds, &tm));
    snprintf(out, TIME_SIZE, "%s.%03uZ", date, (unsigned)(ms % 1000) % 1000u);
}

/* ---- one transaction ---- */

static void write_sums(struct run *run)
{
    if (run->used != 0 || run->reserved != 0)
        run_sql(run->rows, SUMS, "iiit", run->token_id, run->used, run->reserved, run->now);
    run->used = run->reserved = 0;
}

static void add_sums(struct run *run, int64_t token_id, int64_t used, int64_t reserved)
{
    if (run->token_id != token_id)
        write_sums(run);
    run->token_id = token_id;
    run->used += used;
    run->reserved += reserved;
}

static void find_token(struct run *run, struct rows_request *r)
{
    if (run->known != NULL && strcmp(run->known->company, r->company) == 0) {
        r->token_id = run->known->token_id;
        memcpy(r->api_key, run->known->api_key, sizeof r->api_key);
        return;
    }
    sqlite3_stmt *row = run_sql(run->rows, TOKEN, "t", r->company);
    if (row == NULL)
        return;
    r->token_id = sqlite3_column_int64(row, 0);
    snprintf(r->api_key, sizeof r->api_key, "%s", (const char *)sqlite3_column_text(row, 1));
    sqlite3_reset(row);
    run->known = r;
}

static void reserve(struct run *run, struct rows_request *r)
{
    find_token(run, r);
    if (r->token_id == 0)
        return;
    add_sums(run, r->token_id, 0, ESTIMATE);
    run_sql(run->rows, RESERVE, "titttititt", r->id, r->token_id, r->company, r->branch, r->user,
            (int64_t)ESTIMATE, run->rows->host, run->rows->pid, run->now, run->expires);
    r->reservation_id = sqlite3_last_insert_rowid(run->rows->db);
}

static void settle(struct run *run, const struct rows_request *r)
{
    add_sums(run, r->token_id, r->tokens[ROWS_TOTAL], -ESTIMATE);
    run_sql(run->rows, CLOSE, "it", r->reservation_id, run->now);
    run_sql(run->rows, USAGE, "ittiiiiiitttti", r->token_id, r->branch, r->user,
            r->tokens[ROWS_INPUT], r->tokens[ROWS_OUTPUT], r->tokens[ROWS_TEXT_PROMPT],
            r->tokens[ROWS_IMAGE_PROMPT], r->tokens[ROWS_TEXT_CANDIDATES], r->tokens[ROWS_TOTAL],
            run->now, r->id, r->company, r->model, r->duration_ms);
    run_sql(run->rows, ENTRY, "ttitt", run->now, r->message, (int64_t)__LINE__, r->id,
            run->rows->host);
}

/* All that wait are the writer's from now on. */
static struct rows_request *take_all(struct rows *rows)
{
    pthread_mutex_lock(&rows->lock);
    struct rows_request *first = rows->first;
    rows->first = NULL;
    rows->last = &rows->first;
    pthread_mutex_unlock(&rows->lock);
    return first;
}

/* Returns those who are to be told, once it is on the disk. */
static struct rows_request *write_all(struct rows *rows)
{
    struct run run = {.rows = rows};

    if (flock(rows->turn_fd, LOCK_EX) != 0)
        die(rows, "flock");
    struct rows_request *all = take_all(rows); /* with those that have come during the wait */
    int64_t ms = now_ms();
    format_time(ms, run.now);
    format_time(ms + RESERVED_MS, run.expires);
    run_sql(rows, BEGIN, "");
    for (struct rows_request *r = all; r != NULL; r = r->next) {
        if (r->is_answered)
            settle(&run, r);
        else
            reserve(&run, r);
    }
    write_sums(&run);
    run_sql(rows, COMMIT, "");
    flock(rows->turn_fd, LOCK_UN);
    return all;
}

/* ---- those who wait ---- */

/* The first of those that have come meanwhile is the next writer. */
static void pass_on(struct rows *rows)
{
    pthread_mutex_lock(&rows->lock);
    struct rows_request *next = rows->first;
    rows->has_writer = next != NULL;
    if (next != NULL)
        next->leads = 1; /* it sees that once it is woken */
    pthread_mutex_unlock(&rows->lock);
    if (next != NULL)
        sem_post(&next->wake);
}

static void wait_for(struct rows_request *r)
{
    while (sem_wait(&r->wake) != 0)
        ;
}

static void submit(struct rows *rows, struct rows_request *r)
{
    pthread_mutex_lock(&rows->lock);
    int waits = rows->has_writer;
    rows->has_writer = 1;
    r->leads = 0;
    r->next = NULL;
    *rows->last = r;
    rows->last = &r->next;
    pthread_mutex_unlock(&rows->lock);
    if (waits) {
        wait_for(r);
        if (!r->leads) /* another has written it */
            return;
    }
    struct rows_request *all = write_all(rows);
    if (fdatasync(rows->log_fd) != 0)
        die(rows, "fdatasync");
    pass_on(rows);
    for (struct rows_request *next; all != NULL; all = next) {
        next = all->next;
        if (all != r)
            sem_post(&all->wake);
    }
}

/* ---- for each request ---- */

void rows_init(struct rows_request *r)
{
    sem_init(&r->wake, 0, 0);
}

/* A UUIDv7: those of the same time stand side by side in an index. */
static void make_id(struct rows *rows, int64_t ms, char out[ROWS_ID_SIZE])
{
    uint64_t n = atomic_fetch_add(&rows->next_id, 1);

    snprintf(out, ROWS_ID_SIZE, "%08x-%04x-7%03x-%04x-%012llx", (unsigned)(ms >> 16),
             (unsigned)(ms & 0xffff), (unsigned)(n >> 48 & 0xfff), (unsigned)(0x8000 | n >> 60),
             (unsigned long long)(n & 0xffffffffffff));
}

int rows_reserve(struct rows *rows, struct rows_request *r)
{
    r->begun_ms = now_ms();
    make_id(rows, r->begun_ms, r->id);
    r->token_id = 0;
    r->is_answered = 0;
    submit(rows, r);
    return r->token_id != 0;
}

/* What comes from a name on. */
static const char *from(const char *json, const char *name)
{
    const char *at = strstr(json, name);
    return at == NULL ? "" : at;
}

static int64_t count_of(const char *json, const char *name)
{
    const char *at = from(json, name);
    return strtoll(at + strcspn(at, "0123456789"), NULL, 10);
}

static void read_usage(struct rows_request *r, const char *answer)
{
    const char *usage = from(answer, "\"usageMetadata\"");
    const char *prompt = from(usage, "\"promptTokensDetails\"");
    const char *candidates = from(usage, "\"candidatesTokensDetails\"");
    const char *model = from(usage, "\"modelVersion\"");

    r->tokens[ROWS_INPUT] = count_of(usage, "\"promptTokenCount\"");
    r->tokens[ROWS_OUTPUT] = count_of(usage, "\"candidatesTokenCount\"");
    r->tokens[ROWS_TEXT_PROMPT] = count_of(from(prompt, "\"TEXT\""), "\"tokenCount\"");
    r->tokens[ROWS_IMAGE_PROMPT] = count_of(from(prompt, "\"IMAGE\""), "\"tokenCount\"");
    r->tokens[ROWS_TEXT_CANDIDATES] = count_of(from(candidates, "\"TEXT\""), "\"tokenCount\"");
    r->tokens[ROWS_TOTAL] = count_of(usage, "\"totalTokenCount\"");
    model += strcspn(model, ":");
    model += strcspn(model, "\"");
    model += *model == '"';
    snprintf(r->model, sizeof r->model, "%.*s", (int)strcspn(model, "\""), model);
}

void rows_settle(struct rows *rows, struct rows_request *r, const char *answer)
{
    read_usage(r, answer);
    r->duration_ms = now_ms() - r->begun_ms;
    snprintf(r->message, sizeof r->message,
             "extracted: company=%s user=%s type=application/pdf bytes=%zu attempts=1 tokens=%lld "
             "model=%s ms=%lld proxy_request_id=%s",
             r->company, r->user, r->bytes, (long long)r->tokens[ROWS_TOTAL], r->model,
             (long long)r->duration_ms, r->proxy_id == NULL ? "-" : r->proxy_id);
    r->is_answered = 1;
    submit(rows, r);
}

/* ---- opening ---- */

static int open_beside(const char *path, const char *suffix, int flags)
{
    char name[4096];

    snprintf(name, sizeof name, "%s%s", path, suffix);
    return open(name, flags | O_RDWR | O_CLOEXEC, 0600);
}

struct rows *rows_open(const char *path)
{
    struct rows *rows = calloc(1, sizeof *rows);

    /* One thread at a time has it: the writer. */
    if (rows == NULL || sqlite3_config(SQLITE_CONFIG_SINGLETHREAD) != SQLITE_OK ||
        sqlite3_config(SQLITE_CONFIG_MEMSTATUS, 0) != SQLITE_OK)
        exit(1);
    pthread_mutex_init(&rows->lock, NULL);
    rows->last = &rows->first;
    gethostname(rows->host, sizeof rows->host - 1);
    rows->pid = getpid();
    uint64_t first_id = 0;
    if (getrandom(&first_id, sizeof first_id, 0) != (ssize_t)sizeof first_id)
        exit(1);
    atomic_init(&rows->next_id, first_id);
    rows->turn_fd = open_beside(path, ".lock", O_CREAT);
    if (sqlite3_open_v2(path, &rows->db, SQLITE_OPEN_READWRITE, NULL) != SQLITE_OK ||
        rows->turn_fd < 0 || flock(rows->turn_fd, LOCK_EX) != 0 ||
        sqlite3_busy_timeout(rows->db, 10000) != SQLITE_OK ||
        sqlite3_exec(rows->db,
                     "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;"
                     " INSERT OR IGNORE INTO TokenUsageSummary (TokenID, TotalRemainingTokens)"
                     " SELECT TokenID, TotalTokenLimit FROM TokenMaster",
                     NULL, NULL, NULL) != SQLITE_OK)
        die(rows, path);
    flock(rows->turn_fd, LOCK_UN);
    rows->log_fd = open_beside(path, "-wal", 0);
    for (int i = 0; i < STATEMENTS; i++)
        if (sqlite3_prepare_v3(rows->db, sql[i], -1, SQLITE_PREPARE_PERSISTENT,
                               &rows->statements[i], NULL) != SQLITE_OK)
            die(rows, sql[i]);
    if (rows->log_fd < 0)
        die(rows, "the log");
    return rows;
}
