/* store_mssql_conn.c - one connection to SQL Server, by db-lib (FreeTDS). See store_mssql.h.
 *
 * db-lib has one state for the whole process: its handlers and the name of its configuration file.
 * The handlers are ours from the first moment, because db-lib's own end the process; they find the
 * failure that they fill by the connection's user data, and during a login, when there is none yet,
 * by a variable of the thread.
 *
 * TLS can only be asked for in a freetds.conf. So there is one, in memory (memfd_create), with a
 * section for each store that was opened; it is named to db-lib as /proc/self/fd/N, comes before any
 * other freetds.conf, and holds no secret (FreeTDS 1.3: src/tds/config.c, tds_read_conf_file). */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "clock.h"
#include "log.h"
#include "store_mssql_conn.h"

#define SECTION_SIZE 1024
#define SESSION_SIZE 512
#define LAST_HARMLESS_SEVERITY 10

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
    snprintf(target->section, sizeof target->section, "extract-fcgi-%d", ++library.sections);
    buf_printf(&conf, "\n[%s]\nhost = %s\n", target->section, target->server.host);
    if (target->server.instance[0] != '\0')
        buf_printf(&conf, "instance = %s\n", target->server.instance);
    else
        buf_printf(&conf, "port = %d\n", target->server.port);
    buf_printf(&conf, "tds version = 7.4\nencryption = %s\nconnect timeout = %d\n",
               levels[target->encrypt], target->login_timeout_s);
    if (target->ca_file[0] != '\0')
        buf_printf(&conf, "ca file = %s\ncheck certificate hostname = yes\n", target->ca_file);
    /* In one write: another thread that reads the file meanwhile looks for another section. */
    if (!buf_ok(&conf) || write(library.conf, conf.data, conf.len) != (ssize_t)conf.len)
        code = err_set(err, ERR_INTERNAL, "cannot write the configuration of FreeTDS");
    pthread_mutex_unlock(&library.lock);
    buf_reset(&conf);
    return code;
}

/* ---- login ---- */

static bool fill_login(LOGINREC *login, const struct mssql_target *target,
                       struct mssql_failure *failure)
{
    char password[CONNECTION_TEXT_SIZE] = "";
    struct err err = {.message = ""};
    bool ok = mssql_target_password(target, password, &err) == ERR_NONE;

    if (!ok)
        snprintf(failure->text, sizeof failure->text, "%.390s", err.message);
    ok = ok && DBSETLUSER(login, target->user) == SUCCEED &&
         DBSETLPWD(login, password) == SUCCEED &&
         DBSETLDBNAME(login, target->database) == SUCCEED &&
         DBSETLAPP(login, target->application) == SUCCEED &&
         DBSETLHOST(login, target->workstation) == SUCCEED &&
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
    buf_init(&conn->row, MSSQL_ROW_MAX);
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
