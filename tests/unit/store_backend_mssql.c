/* store_backend_mssql.c - databases on a SQL Server for test_store.c, one for each test.
 *
 * The rows are looked at through tests/tds_server/tds_client.py, which shares nothing with the driver:
 * db-lib's handlers belong to the driver alone. Run from the top of the source tree. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "store_backend.h"

#define PYTHON "/usr/bin/python3"
#define CLIENT "tests/tds_server/tds_client.py"
#define SERVER "tests/tds_server/tds_server.py"
#define PATIENCE_MS 30000

static struct {
    bool ours;
    pid_t pid;
    char directory[64]; /* of ours: databases, the password */
    char server[256];
    char control[64];
    char user[128];
    char password_file[512];
    int encrypt;
    char ca_file[512];
} server;

/* What looks at the rows: statements in, a line for each out, NUL after each. */
static struct {
    pid_t pid;
    FILE *in;
    FILE *out;
} client;

/* ---- children ---- */

/* Starts a program that ends with this one. *in (may be NULL) and *out: its standard streams. */
static pid_t start(char *const argv[], FILE **in, FILE **out)
{
    int to[2];
    int from[2];

    assert_int_equal(0, pipe2(to, O_CLOEXEC));
    assert_int_equal(0, pipe2(from, O_CLOEXEC));
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        setenv("PYTHONDONTWRITEBYTECODE", "1", 1);
        /* what a sanitized program was preloaded with is no business of Python's */
        unsetenv("LD_PRELOAD");
        if (dup2(to[0], STDIN_FILENO) < 0 || dup2(from[1], STDOUT_FILENO) < 0)
            _exit(126);
        execv(argv[0], argv);
        _exit(127);
    }
    close(to[0]);
    close(from[1]);
    if (in != NULL)
        *in = fdopen(to[1], "w");
    else
        close(to[1]);
    *out = fdopen(from[0], "r");
    return pid;
}

static void end(pid_t *pid, int number)
{
    if (*pid > 0) {
        kill(*pid, number);
        waitpid(*pid, NULL, 0);
    }
    *pid = 0;
}

/* ---- the client ---- */

static void start_client(void)
{
    char server_flag[] = "--server";
    char user_flag[] = "--user";
    char password_flag[] = "--password-file";
    char python[] = PYTHON;
    char program[] = CLIENT;
    char *const argv[] = {python,    program,     server_flag,   server.server,
                          user_flag, server.user, password_flag, server.password_file,
                          NULL};

    client.pid = start(argv, &client.in, &client.out);
}

int mssql_run_script(const char *path)
{
    char python[] = PYTHON;
    char program[] = CLIENT;
    char server_flag[] = "--server";
    char user_flag[] = "--user";
    char password_flag[] = "--password-file";
    char database_flag[] = "--database";
    char script_flag[] = "--script";
    char keep_going[] = "--keep-going";
    char script[512];
    char *const argv[] = {
        python,      program,       server_flag,          server.server, user_flag,
        server.user, password_flag, server.password_file, database_flag, fixture.database,
        script_flag, script,        keep_going,           NULL};
    FILE *out = NULL;
    int status = 0;

    snprintf(script, sizeof script, "%s", path);
    pid_t pid = start(argv, NULL, &out);
    while (fgetc(out) != EOF) /* what it prints is not looked at */
        ;
    fclose(out);
    assert_int_equal(pid, waitpid(pid, &status, 0));
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void stop_client(void)
{
    if (client.in != NULL)
        fclose(client.in);
    if (client.out != NULL)
        fclose(client.out);
    client.in = client.out = NULL;
    end(&client.pid, SIGTERM);
}

/* The answer, from its first character ('=' or '!'); valid until the next call. */
static const char *ask(const char *sql)
{
    static char *line;
    static size_t room;

    if (client.in == NULL)
        start_client();
    fwrite(sql, 1, strlen(sql) + 1, client.in);
    fflush(client.in);
    if (getdelim(&line, &room, '\0', client.out) <= 0)
        fail_msg("tds_client.py ended at: %s", sql);
    return line;
}

static void exec(const char *sql)
{
    const char *answer = ask(sql);
    if (answer[0] != '=')
        fail_msg("%s: %s", sql, answer + 1);
}

static void row(const char *sql, char *out, size_t size)
{
    const char *answer = ask(sql);
    if (answer[0] != '=')
        fail_msg("%s: %s", sql, answer + 1);
    assert_true(strlen(answer) <= size);
    snprintf(out, size, "%s", answer + 1);
}

/* ---- the server ---- */

static void run_server(void)
{
    char python[] = PYTHON;
    char program[] = SERVER;
    char listen_flag[] = "--listen";
    char control_flag[] = "--control";
    char directory_flag[] = "--directory";
    char password_flag[] = "--password-file";
    char tls_flag[] = "--tls";
    char encryption_flag[] = "--encryption";
    char on[] = "on";
    char *const argv[] = {python,
                          program,
                          listen_flag,
                          server.server,
                          control_flag,
                          server.control,
                          directory_flag,
                          server.directory,
                          password_flag,
                          server.password_file,
                          tls_flag,
                          server.directory,
                          encryption_flag,
                          on,
                          NULL};
    FILE *out = NULL;

    server.pid = start(argv, NULL, &out);
    if (fscanf(out, "listening on %255s control on %63s", server.server, server.control) != 2)
        fail_msg("%s does not start: run this from the top of the source tree", SERVER);
    fclose(out);
}

static void use_ours(void)
{
    const char *tmp = getenv("TMPDIR");

    server.ours = true;
    snprintf(server.directory, sizeof server.directory, "%.40s/test_tds.XXXXXX",
             tmp != NULL ? tmp : "/tmp");
    assert_non_null(mkdtemp(server.directory));
    snprintf(server.password_file, sizeof server.password_file, "%s/password", server.directory);
    FILE *f = fopen(server.password_file, "w");
    assert_non_null(f);
    fputs("Pa€ss 'w0rd\n", f);
    fclose(f);
    snprintf(server.user, sizeof server.user, "sa");
    snprintf(server.server, sizeof server.server, "127.0.0.1:0");
    snprintf(server.control, sizeof server.control, "127.0.0.1:0");
    server.encrypt = ENCRYPT_REQUIRE;
    run_server();
    snprintf(server.ca_file, sizeof server.ca_file, "%s/good.pem", server.directory);
}

static void use_live(const char *address)
{
    static const char *const words[] = {"require", "request", "off"};
    const char *user = getenv("MSSQL_USER");
    const char *password_file = getenv("MSSQL_PASSWORD_FILE");
    const char *encrypt = getenv("MSSQL_ENCRYPT");
    const char *ca_file = getenv("MSSQL_CA_FILE");

    if (user == NULL || password_file == NULL)
        fail_msg("MSSQL_SERVER goes with MSSQL_USER and MSSQL_PASSWORD_FILE");
    snprintf(server.server, sizeof server.server, "%s", address);
    snprintf(server.user, sizeof server.user, "%s", user);
    snprintf(server.password_file, sizeof server.password_file, "%s", password_file);
    snprintf(server.ca_file, sizeof server.ca_file, "%s", ca_file != NULL ? ca_file : "");
    server.encrypt = server.ca_file[0] != '\0' ? ENCRYPT_REQUIRE : ENCRYPT_OFF;
    for (int i = 0; encrypt != NULL && i < 3; i++)
        if (strcmp(encrypt, words[i]) == 0)
            server.encrypt = i;
}

int mssql_server_start(void **state)
{
    const char *address = getenv("MSSQL_SERVER");

    (void)state;
    signal(SIGPIPE, SIG_IGN);
    if (address != NULL && address[0] != '\0')
        use_live(address);
    else
        use_ours();
    return 0;
}

int mssql_server_stop(void **state)
{
    (void)state;
    stop_client();
    if (server.ours) {
        char rm[] = "/bin/rm";
        char flags[] = "-rf";
        char *const argv[] = {rm, flags, server.directory, NULL};
        FILE *out = NULL;

        end(&server.pid, SIGTERM);
        waitpid(start(argv, NULL, &out), NULL, 0);
        fclose(out);
    }
    return 0;
}

bool mssql_server_is_ours(void)
{
    return server.ours;
}

void mssql_server_kill(void)
{
    stop_client();
    end(&server.pid, SIGKILL);
}

void mssql_server_restart(void)
{
    run_server();
}

const char *mssql_server_control(const char *command)
{
    static char answer[8192];
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    size_t len = 0;
    ssize_t n = 1;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

    to.sin_port = htons((uint16_t)strtoul(strrchr(server.control, ':') + 1, NULL, 10));
    assert_int_equal(0, connect(fd, (const struct sockaddr *)&to, sizeof to));
    assert_int_equal(strlen(command), write(fd, command, strlen(command)));
    assert_int_equal(1, write(fd, "\n", 1));
    while (n > 0 && (len == 0 || answer[len - 1] != '\n') && len < sizeof answer - 1) {
        n = read(fd, answer + len, sizeof answer - 1 - len);
        len += n > 0 ? (size_t)n : 0;
    }
    answer[len] = '\0';
    close(fd);
    if (len == 0 || strstr(answer, "\"error\"") != NULL)
        fail_msg("%s: %s", command, answer);
    return answer;
}

/* ---- databases ---- */

static void create(void)
{
    static int n;
    char sql[128];

    backend_make_directory();
    snprintf(fixture.database, sizeof fixture.database, "extract_test_%d_%d", (int)getpid(), ++n);
    fixture.config.store.driver = DRIVER_MSSQL;
    fixture.config.store.server = server.server;
    fixture.config.store.database = fixture.database;
    fixture.config.store.user = server.user;
    fixture.config.store.password_file = server.password_file;
    fixture.config.store.encrypt = server.encrypt;
    fixture.config.store.ca_file = server.ca_file;
    if (server.ours)
        mssql_server_control("{\"do\": \"reset\"}");
    else
        fixture.config.store.query_timeout_ms =
            30000; /* a live server may be slow, and that is no fault */
    snprintf(sql, sizeof sql, "CREATE DATABASE %s", fixture.database);
    exec(sql);
}

static void attach(void)
{
    char sql[128];
    snprintf(sql, sizeof sql, "USE %s", fixture.database);
    exec(sql);
}

/* Connections that the driver has just closed may still hold the database for a moment. */
static void destroy(void)
{
    int64_t deadline_ms = clock_monotonic_ms() + PATIENCE_MS;
    char sql[128];
    const char *answer = NULL;

    exec("USE master");
    snprintf(sql, sizeof sql, "DROP DATABASE %s", fixture.database);
    while ((answer = ask(sql))[0] != '=' && clock_monotonic_ms() < deadline_ms)
        clock_sleep_until(clock_monotonic_ms() + 50);
    if (answer[0] != '=')
        fail_msg("%s: %s", sql, answer + 1);
    backend_remove_directory();
}

static void widen_keys(void)
{
    exec("DROP VIEW vw_TokenStatus"); /* PostgreSQL, under Babelfish, wants that */
    exec("ALTER TABLE TokenMaster ALTER COLUMN ApiKey NVARCHAR(MAX)");
}

static bool unescapes_json(void)
{
    return server.ours || strcmp(ask("SELECT value FROM OPENJSON('[\"\\\\\"]')"), "=\\") == 0;
}

const struct backend mssql_backend = {
    .name = "mssql",
    .driver = &store_mssql,
    .create = create,
    .attach = attach,
    .destroy = destroy,
    .exec = exec,
    .row = row,
    .widen_keys = widen_keys,
    .unescapes_json = unescapes_json,
    .a_minute_ago = "DATEADD(SECOND, -61, SYSUTCDATETIME())",
    .in_an_hour = "DATEADD(SECOND, 3600, SYSUTCDATETIME())",
};
