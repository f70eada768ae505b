/* store_mssql_conn.c - one connection to SQL Server, by db-lib (FreeTDS): logins and calls. See
 * store_mssql.h. No other file knows db-lib.
 *
 * db-lib has one state for the whole process: its handlers and the name of its configuration file.
 * The handlers are ours from the first moment, because db-lib's own end the process; they find the
 * failure that they fill by the connection's user data, and during a login, when there is none yet,
 * by a variable of the thread.
 *
 * TLS can only be asked for in a freetds.conf. So there is one, in memory (memfd_create), with a
 * section for each store that was opened; it is named to db-lib as /proc/self/fd/N and holds no
 * secret. Where a section is found there, no other freetds.conf is looked at, so nothing that a host
 * has in its own changes anything here (FreeTDS 1.3: src/tds/config.c, tds_read_conf_file). Where it
 * is not, for want of descriptors, db-lib would take its name for a host's: such a name no host has.
 *
 * A call that ends any other way than by reading all that the server says leaves a connection that
 * nobody may use again. The watch (store_mssql_watch.c) sees to it that it ends.
 *
 * Text: up to 4,000 bytes of UTF-8 travel as NVARCHAR, more as NTEXT, which procedures take for
 * NVARCHAR(MAX). db-lib sends empty text as NULL. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sqlfront.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sybdb.h>
#include <sys/mman.h>
#include <unistd.h>
#include <unistr.h>

#include "clock.h"
#include "log.h"
#include "store_mssql.h"

#define SECTION_SIZE 1024
#define SESSION_SIZE 512
#define LAST_HARMLESS_SEVERITY 10
#define NVARCHAR_MAX 4000
#define ROW_MAX ((size_t)4 * 1024 * 1024) /* bytes of text in one row */
#define COLUMNS_MAX 64
#define FAILED_RESULTS_MAX 64

/* Used by one thread at a time. */
struct mssql_conn {
    DBPROCESS *dbproc;
    struct mssql_failure *failure; /* of the call under way; NULL between calls */
    bool prints;                   /* what the server prints is logged */
    struct mssql_guard guard;
    int64_t login_ms; /* monotonic */
    struct buf row;   /* the texts of a row; may hold a key: wiped after each call */
};

/* Of the process, as db-lib's own state is. */
static struct {
    pthread_once_t once;
    bool ok;
    pthread_mutex_t lock; /* guards what follows */
    int conf;             /* descriptor of freetds.conf */
    int sections;
} library = {.once = PTHREAD_ONCE_INIT, .lock = PTHREAD_MUTEX_INITIALIZER, .conf = -1};

static _Thread_local struct mssql_failure *login_failure;

/* ---- what db-lib and the server say ---- */

static struct mssql_failure *listener(DBPROCESS *dbproc)
{
    struct mssql_conn *conn = dbproc != NULL ? (struct mssql_conn *)dbgetuserdata(dbproc) : NULL;

    return conn != NULL ? conn->failure : login_failure;
}

static enum mssql_cause cause_of(int library_error)
{
    switch (library_error) {
    case SYBETIME:
        return MSSQL_TIMEOUT;
    case SYBECONN: /* no connection by TCP */
    case SYBESOCK:
    case SYBEUHST: /* its name is unknown */
    case SYBEINTF:
        return MSSQL_UNREACHABLE;
    case SYBEREAD:
    case SYBEWRIT:
    case SYBESEOF:
    case SYBEDDNE:
    case SYBECLOS:
    case SYBEBTOK: /* what comes makes no sense */
        return MSSQL_BROKEN;
    case SYBEFCON: /* connected, and then no login */
        return MSSQL_REFUSED;
    default:
        return MSSQL_LOCAL;
    }
}

/* The first error tells; those after it are what follows from it. */
static int on_error(DBPROCESS *dbproc, int severity, int number, int os_error, char *text,
                    char *os_text)
{
    struct mssql_failure *failure = listener(dbproc);

    (void)severity;
    (void)text;
    (void)os_text;
    if (number == SYBESMSG || number == SYBEICONVI) /* told by on_message; a '?' in what was read */
        return INT_CANCEL;
    if (failure == NULL || failure->library != 0)
        return INT_CANCEL;
    failure->library = number;
    failure->must_drop = true;
    if (failure->number == 0) {
        failure->cause = cause_of(number);
        if (failure->cause == MSSQL_UNREACHABLE && os_error != 0)
            snprintf(failure->text, sizeof failure->text, "%s", strerrordesc_np(os_error));
        else if (number == SYBEUHST)
            snprintf(failure->text, sizeof failure->text, "its name is not known");
    }
    return INT_CANCEL;
}

/* Is it what our own script says (THROW), rather than SQL Server about data? */
static bool is_ours(DBINT number)
{
    return number >= 50000 && number < 60000;
}

static int on_message(DBPROCESS *dbproc, DBINT number, int state, int severity, char *text,
                      char *server, char *procedure, int line)
{
    struct mssql_failure *failure = listener(dbproc);
    struct mssql_conn *conn = dbproc != NULL ? (struct mssql_conn *)dbgetuserdata(dbproc) : NULL;

    (void)state;
    (void)server;
    (void)procedure;
    if (severity <= LAST_HARMLESS_SEVERITY) {
        if (number == 0 && conn != NULL && conn->prints)
            log_info(NULL, "setting up the schema: %s", text);
        return 0;
    }
    if (failure == NULL || failure->number != 0)
        return 0;
    failure->cause = MSSQL_SERVER;
    failure->number = number;
    failure->severity = severity;
    failure->line = line;
    if (is_ours(number))
        snprintf(failure->text, sizeof failure->text, "%s", text);
    return 0;
}

/* ---- the library ---- */

static void start_library(void)
{
    library.ok = dbinit() == SUCCEED;
    dberrhandle(on_error);
    dbmsghandle(on_message);
}

/* The file of all targets; opened once, and then there as long as the process. */
static enum err_code open_conf(struct err *err)
{
    char path[64];

    if (library.conf >= 0)
        return ERR_NONE;
    library.conf = memfd_create("freetds.conf", MFD_CLOEXEC);
    if (library.conf < 0)
        return err_set(err, ERR_INTERNAL, "no memory file for FreeTDS: %s", strerror(errno));
    snprintf(path, sizeof path, "/proc/self/fd/%d", library.conf);
    if (access(path, R_OK) != 0)
        return err_set(err, ERR_INTERNAL, "FreeTDS cannot read its configuration: /proc: %s",
                       strerror(errno));
    dbsetifile(path);
    return ERR_NONE;
}

enum err_code mssql_library_start(struct err *err)
{
    enum err_code code;

    pthread_once(&library.once, start_library);
    if (!library.ok)
        return err_set(err, ERR_INTERNAL, "FreeTDS does not start");
    pthread_mutex_lock(&library.lock);
    code = open_conf(err);
    pthread_mutex_unlock(&library.lock);
    return code;
}

/* freetds.conf has no quotes, and lines of 255 bytes. */
static bool fits_conf(const char *path)
{
    size_t len = strlen(path);

    return len < 200 && path[strcspn(path, "#;\n\r\t")] == '\0' && strstr(path, "  ") == NULL &&
           (len == 0 || (path[0] != ' ' && path[len - 1] != ' '));
}

enum err_code mssql_library_add(struct mssql_target *target, struct err *err)
{
    static const char *const levels[] = {
        [ENCRYPT_REQUIRE] = "require", [ENCRYPT_REQUEST] = "request", [ENCRYPT_OFF] = "off"};
    enum err_code code = ERR_NONE;
    struct buf conf;

    if (!fits_conf(target->ca_file))
        return err_set(err, ERR_CONFIG,
                       "store.ca_file: FreeTDS takes paths of at most 199 bytes, without # and ;");
    buf_init(&conf, SECTION_SIZE);
    pthread_mutex_lock(&library.lock);
    snprintf(target->section, sizeof target->section, "extract-fcgi-%d.invalid.",
             ++library.sections);
    buf_printf(&conf, "\n[%s]\nhost = %s\n", target->section, target->server.host);
    if (target->server.instance[0] != '\0')
        buf_printf(&conf, "instance = %s\n", target->server.instance);
    else
        buf_printf(&conf, "port = %d\n", target->server.port);
    buf_printf(&conf, "tds version = 7.4\nencryption = %s\nconnect timeout = %d\n",
               levels[target->encrypt], target->login_timeout_s);
    if (target->ca_file[0] != '\0')
        buf_printf(&conf, "ca file = %s\ncheck certificate hostname = %s\n", target->ca_file,
                   target->any_name ? "no" : "yes");
    /* In one write: another thread that reads the file meanwhile looks for another section. */
    if (!buf_ok(&conf) || write(library.conf, conf.data, conf.len) != (ssize_t)conf.len)
        code = err_set(err, ERR_INTERNAL, "cannot write the configuration of FreeTDS");
    pthread_mutex_unlock(&library.lock);
    buf_reset(&conf);
    return code;
}

/* ---- login ---- */

/* All that /etc/freetds/locales.conf could say otherwise is said here, too. */
static bool fill_login(LOGINREC *login, const struct mssql_target *target,
                       struct mssql_failure *failure)
{
    char password[CONNECTION_TEXT_SIZE] = "";
    struct err err = {.message = ""};
    bool ok =
        target->password_file == NULL || mssql_target_password(target, password, &err) == ERR_NONE;

    if (!ok)
        snprintf(failure->text, sizeof failure->text, "%.390s", err.message);
    ok = ok && DBSETLUSER(login, target->user) == SUCCEED &&
         DBSETLPWD(login, password) == SUCCEED &&
         DBSETLDBNAME(login, target->database) == SUCCEED &&
         DBSETLAPP(login, target->application) == SUCCEED &&
         DBSETLHOST(login, target->workstation) == SUCCEED &&
         DBSETLNATLANG(login, "us_english") == SUCCEED &&
         DBSETLCHARSET(login, "UTF-8") == SUCCEED && DBSETLVERSION(login, DBVERSION_74) == SUCCEED;
    explicit_bzero(password, sizeof password);
    return ok;
}

static DBPROCESS *log_in(const struct mssql_target *target, struct mssql_watch *watch,
                         int64_t deadline_ms, struct mssql_failure *failure)
{
    LOGINREC *login = dblogin();
    DBPROCESS *dbproc = NULL;
    struct mssql_guard guard;

    if (login == NULL)
        return NULL;
    mssql_guard_init(&guard, watch, -1);
    mssql_guard_arm(&guard, deadline_ms);
    login_failure = failure;
    if (fill_login(login, target, failure))
        dbproc = dbopen(login, target->section);
    login_failure = NULL;
    if (mssql_guard_disarm(&guard) && dbproc == NULL && failure->number == 0)
        failure->cause = MSSQL_TIMEOUT;
    mssql_guard_reset(&guard);
    dbloginfree(login); /* overwrites the password */
    return dbproc;
}

/* A login of db-lib starts with settings under which SQL Server refuses to write to tables with
 * filtered indexes (error 1934). A lock that is not had in time is to end as error 1222, before the
 * client loses patience and the connection. */
static bool set_session(struct mssql_conn *conn, const struct mssql_target *target,
                        int64_t deadline_ms, struct mssql_failure *failure)
{
    char sql[SESSION_SIZE];

    snprintf(sql, sizeof sql,
             "SET ANSI_DEFAULTS ON; SET IMPLICIT_TRANSACTIONS OFF; SET CURSOR_CLOSE_ON_COMMIT OFF; "
             "SET ARITHABORT ON; SET CONCAT_NULL_YIELDS_NULL ON; SET NUMERIC_ROUNDABORT OFF; "
             "SET XACT_ABORT ON; SET NOCOUNT ON; SET TEXTSIZE 2147483647; "
             "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; SET LOCK_TIMEOUT %lld;",
             (long long)(target->timeout_ms - target->timeout_ms / 5));
    return mssql_batch(conn, sql, deadline_ms, failure);
}

struct mssql_conn *mssql_login(const struct mssql_target *target, struct mssql_watch *watch,
                               struct mssql_failure *failure)
{
    struct mssql_conn *conn = calloc(1, sizeof *conn);
    int fd = -1;
    int64_t deadline_ms = clock_monotonic_ms() + (int64_t)target->login_timeout_s * 1000;

    *failure = (struct mssql_failure){.cause = MSSQL_LOCAL, .at_login = true};
    if (conn == NULL)
        return NULL;
    buf_init(&conn->row, ROW_MAX);
    conn->dbproc = log_in(target, watch, deadline_ms, failure);
    if (conn->dbproc != NULL)
        fd = fcntl(dbiordesc(conn->dbproc), F_DUPFD_CLOEXEC, 0);
    if (fd < 0) {
        mssql_close(conn);
        return NULL;
    }
    mssql_guard_init(&conn->guard, watch, fd);
    dbsetuserdata(conn->dbproc, (BYTE *)conn);
    conn->login_ms = clock_monotonic_ms();
    if (!set_session(conn, target, deadline_ms, failure)) {
        failure->at_login = true;
        mssql_close(conn);
        return NULL;
    }
    return conn;
}

void mssql_close(struct mssql_conn *conn)
{
    struct mssql_failure ignored = {.cause = MSSQL_LOCAL};

    if (conn == NULL)
        return;
    conn->failure = &ignored;
    if (conn->dbproc != NULL)
        dbclose(conn->dbproc);
    if (conn->guard.watch != NULL)
        mssql_guard_reset(&conn->guard);
    buf_wipe(&conn->row);
    free(conn);
}

/* ---- kept connections ---- */

int64_t mssql_age_ms(const struct mssql_conn *conn)
{
    return clock_monotonic_ms() - conn->login_ms;
}

bool mssql_is_alive(const struct mssql_conn *conn)
{
    struct pollfd fd = {.fd = dbiordesc(conn->dbproc), .events = POLLIN};

    /* Whatever there is to read now, nobody asked for it: mostly the end. */
    return !dbdead(conn->dbproc) && poll(&fd, 1, 0) == 0;
}

/* ---- a call: parameters ---- */

/* Text that is UTF-8; invalid bytes become U+FFFD. */
static const char *valid_text(struct arena *arena, const char *s)
{
    static const char replacement[] = "\xEF\xBF\xBD";
    size_t len = strlen(s);
    size_t out = 0;
    char *copy;

    if (u8_check((const uint8_t *)s, len) == NULL)
        return s;
    copy = arena_alloc(arena, 3 * len + 1);
    for (size_t i = 0; i < len;) {
        ucs4_t c;
        int n = u8_mbtoucr(&c, (const uint8_t *)s + i, len - i);
        if (n > 0)
            memcpy(copy + out, s + i, (size_t)n);
        else
            memcpy(copy + out, replacement, 3);
        out += n > 0 ? (size_t)n : 3;
        i += n > 0 ? (size_t)n : 1;
    }
    copy[out] = '\0';
    return copy;
}

/* db-lib keeps the address until the call is sent, and does not write there. */
static bool add_param(struct mssql_conn *conn, struct arena *arena, const struct mssql_param *param)
{
    const struct store_value *value = &param->value;
    bool is_null = value->type == STORE_NULL;
    const char *text;
    size_t len;

    switch (param->type) {
    case STORE_INTEGER:
        return dbrpcparam(conn->dbproc, param->name, 0, SYBINT8, -1, is_null ? 0 : -1,
                          (BYTE *)(uintptr_t)&value->integer) == SUCCEED;
    case STORE_REAL:
        return dbrpcparam(conn->dbproc, param->name, 0, SYBFLT8, -1, is_null ? 0 : -1,
                          (BYTE *)(uintptr_t)&value->real) == SUCCEED;
    case STORE_TEXT:
    case STORE_NULL:
        break;
    }
    text = is_null ? "" : valid_text(arena, value->text);
    len = strlen(text);
    if (len > INT32_MAX / 4)
        return false;
    return dbrpcparam(conn->dbproc, param->name, 0, len > NVARCHAR_MAX ? SYBNTEXT : SYBVARCHAR, -1,
                      (DBINT)len, (BYTE *)(uintptr_t)text) == SUCCEED;
}

/* ---- a call: rows ---- */

/* Any type that is no text, number or NULL: as db-lib writes it. */
static void append_converted(struct buf *row, DBPROCESS *dbproc, int column)
{
    char text[256];
    DBINT len = dbconvert(dbproc, dbcoltype(dbproc, column), dbdata(dbproc, column),
                          dbdatlen(dbproc, column), SYBCHAR, (BYTE *)text, sizeof text - 1);

    buf_append(row, text, len > 0 ? (size_t)len : 0);
}

/* A number with decimals that are all 0 is whole: sums of BIGINT are DECIMAL to some servers. */
static void read_decimal(DBPROCESS *dbproc, int column, struct store_value *value)
{
    DBNUMERIC number;
    DBFLT8 real = 0;
    DBBIGINT integer = 0;

    memset(&number, 0, sizeof number);
    memcpy(&number, dbdata(dbproc, column), (size_t)dbdatlen(dbproc, column));
    if (number.scale == 0 &&
        dbconvert(dbproc, SYBNUMERIC, (BYTE *)&number, -1, SYBINT8, (BYTE *)&integer, -1) > 0) {
        *value = (struct store_value){.type = STORE_INTEGER, .integer = integer};
        return;
    }
    if (dbconvert(dbproc, SYBNUMERIC, (BYTE *)&number, -1, SYBFLT8, (BYTE *)&real, -1) > 0)
        *value = (struct store_value){.type = STORE_REAL, .real = real};
}

/* Text is appended to conn->row; value->integer tells where until the whole row is there. */
static void read_value(struct mssql_conn *conn, int column, struct store_value *value)
{
    DBPROCESS *dbproc = conn->dbproc;
    const BYTE *data = dbdata(dbproc, column);
    DBBIGINT integer = 0;
    DBFLT8 real = 0;

    *value = (struct store_value){.type = STORE_NULL};
    if (data == NULL)
        return;
    switch (dbcoltype(dbproc, column)) {
    case SYBBIT:
    case SYBINT1:
    case SYBINT2:
    case SYBINT4:
    case SYBINT8:
        dbconvert(dbproc, dbcoltype(dbproc, column), data, dbdatlen(dbproc, column), SYBINT8,
                  (BYTE *)&integer, -1);
        *value = (struct store_value){.type = STORE_INTEGER, .integer = integer};
        return;
    case SYBREAL:
    case SYBFLT8:
        dbconvert(dbproc, dbcoltype(dbproc, column), data, dbdatlen(dbproc, column), SYBFLT8,
                  (BYTE *)&real, -1);
        *value = (struct store_value){.type = STORE_REAL, .real = real};
        return;
    case SYBNUMERIC:
    case SYBDECIMAL:
        read_decimal(dbproc, column, value);
        return;
    default:
        break;
    }
    *value = (struct store_value){.type = STORE_TEXT, .integer = (int64_t)conn->row.len};
    switch (dbcoltype(dbproc, column)) {
    case SYBCHAR:
    case SYBVARCHAR:
    case SYBNVARCHAR:
    case SYBTEXT:
    case SYBNTEXT:
        buf_append(&conn->row, data, (size_t)dbdatlen(dbproc, column));
        break;
    default:
        append_converted(&conn->row, dbproc, column);
    }
    buf_append_char(&conn->row, '\0');
}

/* False: no more rows are wanted. */
static bool hand_out(struct mssql_conn *conn, const struct mssql_call *call,
                     struct mssql_failure *failure)
{
    struct store_value values[COLUMNS_MAX];
    const char *names[COLUMNS_MAX];
    int columns = dbnumcols(conn->dbproc);

    buf_clear(&conn->row);
    for (int i = 0; i < columns && i < COLUMNS_MAX; i++) {
        names[i] = dbcolname(conn->dbproc, i + 1);
        read_value(conn, i + 1, &values[i]);
    }
    if (columns > COLUMNS_MAX || !buf_ok(&conn->row)) {
        failure->cause = MSSQL_LOCAL;
        failure->must_drop = true;
        snprintf(failure->text, sizeof failure->text, "a row has too many columns or bytes");
        return false;
    }
    for (int i = 0; i < columns; i++)
        if (values[i].type == STORE_TEXT)
            values[i].text = buf_str(&conn->row) + values[i].integer;
    failure->has_rows = true;
    return call->row(call->context, (size_t)columns, names, values);
}

/* As hand_out, without counting the time that the caller spends on a row. */
static bool hand_out_untimed(struct mssql_conn *conn, const struct mssql_call *call,
                             int64_t *deadline_ms, struct mssql_failure *failure)
{
    int64_t start_ms = clock_monotonic_ms();
    bool wanted;

    if (mssql_guard_disarm(&conn->guard))
        return false;
    wanted = hand_out(conn, call, failure);
    *deadline_ms += clock_monotonic_ms() - start_ms;
    mssql_guard_arm(&conn->guard, *deadline_ms);
    return wanted;
}

/* The rows of one result. *wanted: whether they go on. False: the connection is lost. */
static bool read_rows(struct mssql_conn *conn, const struct mssql_call *call, bool *wanted,
                      int64_t *deadline_ms, struct mssql_failure *failure)
{
    STATUS status;

    while ((status = dbnextrow(conn->dbproc)) != NO_MORE_ROWS) {
        if (status != REG_ROW)
            return false;
        if (!*wanted || failure->number != 0)
            continue;
        *wanted = call->row_once ? hand_out_untimed(conn, call, deadline_ms, failure)
                                 : hand_out(conn, call, failure);
        if (failure->must_drop)
            return false;
    }
    return true;
}

/* Reads all that the server says. False: the connection is lost, or errors have no end. */
static bool read_results(struct mssql_conn *conn, const struct mssql_call *call,
                         int64_t deadline_ms, struct mssql_failure *failure)
{
    bool wanted = call->row != NULL;
    int failed = dbsqlok(conn->dbproc) != SUCCEED;
    RETCODE code;

    while (!failure->must_drop && (code = dbresults(conn->dbproc)) != NO_MORE_RESULTS) {
        if (code == SUCCEED) {
            if (!read_rows(conn, call, &wanted, &deadline_ms, failure))
                return false;
        } else if (++failed > FAILED_RESULTS_MAX || dbdead(conn->dbproc)) {
            return false;
        }
    }
    return !failure->must_drop;
}

/* ---- a call: the whole ---- */

static void begin(struct mssql_conn *conn, int64_t deadline_ms, struct mssql_failure *failure)
{
    *failure = (struct mssql_failure){.cause = MSSQL_LOCAL};
    conn->failure = failure;
    mssql_guard_arm(&conn->guard, deadline_ms);
}

static bool end(struct mssql_conn *conn, bool ok, struct mssql_failure *failure)
{
    bool late = mssql_guard_disarm(&conn->guard);

    if (!ok || late || dbdead(conn->dbproc))
        failure->must_drop = true;
    if (late && failure->number == 0)
        failure->cause = MSSQL_TIMEOUT;
    else if (failure->must_drop && failure->number == 0 && failure->library == 0 &&
             failure->text[0] == '\0')
        failure->cause = MSSQL_BROKEN;
    conn->failure = NULL;
    buf_wipe(&conn->row);
    return !failure->must_drop && failure->number == 0;
}

bool mssql_rpc(struct mssql_conn *conn, const struct mssql_call *call, int64_t deadline_ms,
               struct mssql_failure *failure)
{
    struct arena arena;
    bool ok;

    begin(conn, deadline_ms, failure);
    arena_init(&arena);
    ok = dbrpcinit(conn->dbproc, call->procedure, 0) == SUCCEED;
    for (size_t i = 0; i < call->count && ok; i++)
        ok = add_param(conn, &arena, &call->params[i]);
    ok = ok && dbrpcsend(conn->dbproc) == SUCCEED;
    arena_reset(&arena);
    ok = ok && read_results(conn, call, deadline_ms, failure);
    if (ok && call->status != NULL)
        *call->status = dbhasretstat(conn->dbproc) ? (int)dbretstatus(conn->dbproc) : 0;
    return end(conn, ok, failure);
}

bool mssql_batch(struct mssql_conn *conn, const char *sql, int64_t deadline_ms,
                 struct mssql_failure *failure)
{
    static const struct mssql_call nothing = {.row = NULL};
    bool ok;

    begin(conn, deadline_ms, failure);
    conn->prints = true;
    ok = dbcmd(conn->dbproc, sql) == SUCCEED && dbsqlsend(conn->dbproc) == SUCCEED &&
         read_results(conn, &nothing, deadline_ms, failure);
    conn->prints = false;
    return end(conn, ok, failure);
}
