/* main.c - extract-fcgi: start, signals, drain, end.
 *
 * The signals that ask it to end (SIGTERM, SIGINT, and SIGUSR1, which FastCGI process managers such as
 * multiwatch send) are blocked in every thread and taken by one of their own, since libfcgi's reads and
 * writes are not safe against interruption: it writes to an eventfd, at which the acceptor stops and
 * the rest finishes what it has. Between signals the same thread, the keeper, tells the service manager
 * how the process is. */
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <sqlite3.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "app.h"
#include "clock.h"
#include "fallback.h"
#include "log.h"
#include "metrics.h"
#include "notify.h"
#include "retry.h"
#include "server.h"

#define EXIT_USAGE 2
#define READER_CONNECTIONS 2

/* How long the recorder may take in the end to write what is left. */
#define FLUSH_MS 10000

/* What may follow a request's deadline: its settlement, and a peer that reads its answer slowly. */
#define AFTER_DEADLINE_MS 60000

static int usage(FILE *out)
{
    fputs("usage: extract-fcgi [--config FILE] [--check-config] [--version] [--help]\n"
          "\n"
          "Serves POST /extract by FastCGI on the listening socket at file descriptor 0, as "
          "systemd,\n"
          "spawn-fcgi and multiwatch give it:\n"
          "\n"
          "    spawn-fcgi -n -s /run/extract-fcgi/pool.sock -- /usr/bin/multiwatch -f 4 -- "
          "/usr/sbin/extract-fcgi\n"
          "\n"
          "  --config FILE    configuration (default: EXTRACT_CONFIG, else " CONFIG_DEFAULT_FILE
          ")\n"
          "  --check-config   print what it would run with, secrets masked, and exit\n"
          "  --version        print the version and exit\n"
          "\n"
          "Each key is also an environment variable: [server] threads is EXTRACT_SERVER_THREADS.\n",
          out);
    return out == stdout ? EXIT_SUCCESS : EXIT_USAGE;
}

/* The signals that ask for the end. */
static void end_signals(sigset_t *set)
{
    sigemptyset(set);
    sigaddset(set, SIGTERM);
    sigaddset(set, SIGINT);
    sigaddset(set, SIGUSR1);
}

struct keeper {
    const struct config *config;
    int drain_fd;
    atomic_bool ended;
};

static void tell_status(const struct config *config, bool draining)
{
    long long busy = metrics_own(METRIC_IN_FLIGHT), waiting = metrics_own(METRIC_QUEUED);
    char status[128];

    if (draining)
        snprintf(status, sizeof status, "draining: %lld requests to finish", busy + waiting);
    else
        snprintf(status, sizeof status, "serving: %lld of %d workers busy, %lld requests waiting",
                 busy, config->server.threads, waiting);
    notify_alive(status);
}

/* The first signal starts the drain; one after the end ends the thread, whose main this is. */
static void *keep(void *argument)
{
    struct keeper *keeper = argument;
    int64_t interval_ms = notify_interval_ms();
    const struct timespec interval = {.tv_sec = (time_t)(interval_ms / 1000),
                                      .tv_nsec = (long)(interval_ms % 1000) * 1000000};
    bool draining = false;
    sigset_t set;

    end_signals(&set);
    for (;;) {
        int number = sigtimedwait(&set, NULL, interval_ms < 0 ? NULL : &interval);
        if (atomic_load(&keeper->ended))
            return NULL;
        if (number > 0 && !draining) {
            draining = true;
            notify_stopping(keeper->config->server.deadline_ms + AFTER_DEADLINE_MS + FLUSH_MS);
            eventfd_write(keeper->drain_fd, 1);
        }
        tell_status(keeper->config, draining);
    }
}

/* Before any thread. A terminal's SIGHUP means nothing here; a peer that is gone is an error of a
 * write. */
static void block_signals(void)
{
    sigset_t set;

    end_signals(&set);
    sigaddset(&set, SIGHUP);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
}

/* Each connection, upload and call to Gemini is a descriptor or two. */
static void raise_descriptor_limit(void)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

/* Administrators read by a login of its own, where there is one: it may not change anything, and its few
 * connections are not the extractions'. */
static struct store *open_reader(const struct config *config, struct store *store, struct err *err)
{
    struct config reader = *config;

    if (config->store.driver != DRIVER_MSSQL || config->store.reader_user[0] == '\0')
        return store;
    reader.store.login = LOGIN_READER;
    reader.store.pool_size = READER_CONNECTIONS;
    return store_open(&reader, err);
}

static enum err_code open_app(struct app *app, struct err *err)
{
    const struct config *config = app->config;
    int most = (int)(config->server.company_share * config->server.threads);

    if (metrics_open(config->server.runtime_dir, err) != ERR_NONE)
        return err->code;
    if (access(config->server.state_dir, R_OK | W_OK | X_OK) != 0)
        return err_set(err, ERR_CONFIG,
                       "server.state_dir: %s must be a directory that this user may "
                       "write to",
                       config->server.state_dir);
    if (config->fallback.key_file[0] != '\0' &&
        fallback_load(config->fallback.key_file, &app->fallback_key, err) != ERR_NONE)
        return err->code;
    if ((app->schema = invoice_schema_load(config, err)) == NULL ||
        (app->gemini = gemini_new(config, app->schema, err)) == NULL ||
        (app->store = store_open(config, err)) == NULL ||
        (app->recorder = recorder_start(app->store, err)) == NULL)
        return err->code;
    if (config->log.sink == SINK_STORE)
        log_set_sink(recorder_log, app->recorder);
    if ((app->share = share_new(most)) == NULL)
        return err_set(err, ERR_INTERNAL, "out of memory");
    if ((app->auth = auth_open(config, app->store, err)) == NULL ||
        (app->reader = open_reader(config, app->store, err)) == NULL ||
        (app->gauges =
             gauges_start(app->store, app->reader, GAUGES_WAIT_MS, GAUGES_SERVE_MS, err)) == NULL)
        return err->code;
    return store_start_background(app->store, err);
}

static void close_app(struct app *app)
{
    if (app->recorder != NULL) {
        log_set_sink(NULL, NULL);
        recorder_stop(app->recorder, FLUSH_MS);
    }
    gauges_stop(app->gauges);
    auth_close(app->auth);
    if (app->reader != app->store)
        store_close(app->reader);
    store_close(app->store);
    gemini_free(app->gemini);
    invoice_schema_free(app->schema);
    share_free(app->share);
    if (app->fallback_key != NULL)
        explicit_bzero(app->fallback_key, strlen(app->fallback_key));
    free(app->fallback_key);
    metrics_close();
}

static enum err_code serve(const struct config *config, struct err *err)
{
    struct app app = {.config = config};
    struct keeper keeper = {.config = config, .drain_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
    pthread_t thread = 0;
    enum err_code code = server_check(err);

    notify_open();
    if (code == ERR_NONE)
        code = open_app(&app, err);
    if (code == ERR_NONE &&
        (keeper.drain_fd < 0 || pthread_create(&thread, NULL, keep, &keeper) != 0))
        code = err_set(err, ERR_INTERNAL, "the keeper's thread cannot be started");
    if (code == ERR_NONE) {
        log_info(NULL, "started: pid=%ld version=%s workers=%d store=%s", (long)getpid(),
                 EXTRACT_VERSION, config->server.threads,
                 config->store.driver == DRIVER_MSSQL ? "mssql" : "sqlite");
        if (config->server.deadline_ms <= RETRY_MIN_ATTEMPT_MS)
            log_warning(
                NULL, NULL,
                "server.deadline leaves no time for any call: none starts with less than %d s "
                "left",
                RETRY_MIN_ATTEMPT_MS / 1000);
        code = server_run(&app, keeper.drain_fd, err);
        atomic_store(&keeper.ended, true);
        pthread_kill(thread, SIGUSR1);
        pthread_join(thread, NULL);
        log_info(NULL, "stopped: pid=%ld", (long)getpid());
    }
    close_app(&app);
    notify_close();
    close(keeper.drain_fd);
    return code;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"config", required_argument, NULL, 'c'},
                                            {"check-config", no_argument, NULL, 'k'},
                                            {"version", no_argument, NULL, 'v'},
                                            {"help", no_argument, NULL, 'h'},
                                            {0}};
    const char *path = NULL;
    bool check = false;
    struct err err = {0};
    int option;

    while ((option = getopt_long(argc, argv, "c:h", options, NULL)) != -1) {
        switch (option) {
        case 'c':
            path = optarg;
            break;
        case 'k':
            check = true;
            break;
        case 'v':
            puts("extract-fcgi " EXTRACT_VERSION);
            return EXIT_SUCCESS;
        case 'h':
            return usage(stdout);
        default:
            return usage(stderr);
        }
    }
    if (optind < argc)
        return usage(stderr);
    /* Nobody asks SQLite how much memory it has, and to know it takes a lock for each piece. */
    sqlite3_config(SQLITE_CONFIG_MEMSTATUS, 0);

    block_signals();
    raise_descriptor_limit();
    unsetenv("SSLKEYLOGFILE"); /* TLS secrets go nowhere */
    struct config *config = config_load(path, &err);
    if (config != NULL && check) {
        config_print(config, stdout);
    } else if (config != NULL) {
        log_set_level((enum log_level)config->log.level);
        if (serve(config, &err) == ERR_NONE)
            err.code = ERR_NONE;
    }
    if (err.code != ERR_NONE)
        fprintf(stderr, "extract-fcgi: %s\n", err.message);
    config_free(config);
    return err.code == ERR_NONE ? EXIT_SUCCESS : EXIT_FAILURE;
}
