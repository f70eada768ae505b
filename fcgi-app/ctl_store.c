/* ctl_store.c - configuration and store, as the commands of extractctl open them. See ctl.h.
 *
 * Run by root, the program goes on as the owner of state_dir once it has read its configuration:
 * the database's files must never come to belong to another user than the service's. */
#include <errno.h>
#include <grp.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ctl.h"
#include "log.h"
#include "text.h"

const char *ctl_user_name(void)
{
    const struct passwd *user = getpwuid(geteuid());
    return user != NULL ? user->pw_name : "this user";
}

/* ---- what goes wrong ---- */

static int exit_status(enum err_code code)
{
    switch (code) {
    case ERR_NONE:
        return EXIT_OK;
    case ERR_NO_SUCH_ROW:
    case ERR_BAD_VALUE:
        return EXIT_NO;
    case ERR_CONFIG:
        return EXIT_USAGE;
    default:
        return EXIT_STORE;
    }
}

const char *ctl_store_place(const struct config *config)
{
    if (config->store.driver == DRIVER_SQLITE)
        return config->store.path;
    return config->store.connection_file[0] != '\0' ? config->store.connection_file
                                                    : config->store.server;
}

/* Is there no directory for the embedded store? */
static bool missing_directory(const struct config *config, char *out, size_t size)
{
    const char *slash = strrchr(config->store.path, '/');
    int len = slash == NULL ? 0 : (int)(slash - config->store.path);

    if (len == 0)
        return false;
    return snprintf(out, size, "%.*s", len, config->store.path) < (int)size &&
           access(out, F_OK) != 0 && errno == ENOENT;
}

/* May the file be what SQLite writes? An empty one is, too. */
static bool is_database(const char *path)
{
    static const char magic[] = "SQLite format 3";
    char head[sizeof magic] = "";
    FILE *file = fopen(path, "re");
    size_t got = file != NULL ? fread(head, 1, sizeof head, file) : 1;
    bool failed = file != NULL && ferror(file);

    if (file != NULL)
        fclose(file);
    return !failed && (got == 0 || (got == sizeof head && memcmp(head, magic, sizeof magic) == 0));
}

void ctl_store_remedy(const struct config *config, enum err_code code, char *out, size_t size)
{
    char directory[256];

    if (code == ERR_SCHEMA || code == ERR_CONFIG || config->store.driver != DRIVER_SQLITE)
        *out = '\0';
    else if (code == ERR_STORAGE_FULL)
        snprintf(out, size, "make room on the disk of %s", ctl_store_place(config));
    else if (missing_directory(config, directory, sizeof directory))
        snprintf(out, size, "make the directory %s for user %s, or correct store.path", directory,
                 ctl_user_name());
    else if (access(config->store.path, R_OK | W_OK) != 0)
        snprintf(out, size, "see that store.path is right and that user %s may write there",
                 ctl_user_name());
    else if (!is_database(config->store.path))
        snprintf(out, size, "correct store.path, or put a backup there: %s holds something else",
                 config->store.path);
    else
        snprintf(out, size,
                 "see who holds it (fuser -v %s) and try again, or whether it is whole (sqlite3 "
                 "%s 'PRAGMA integrity_check')",
                 config->store.path, config->store.path);
}

void ctl_store_describe(const struct config *config, const struct err *err, char *out, size_t size)
{
    const char *place = ctl_store_place(config);
    bool named = strstr(err->message, place) != NULL;

    snprintf(out, size, "%s%s%s", named ? "" : place, named ? "" : ": ", err->message);
}

int ctl_store_error(const struct ctl *ctl, const struct err *err)
{
    int status = exit_status(err->code);
    char what[sizeof err->message + 400];
    char remedy[600];

    if (status != EXIT_STORE) {
        ctl_error(ctl, "%s", err->message);
        return status;
    }
    ctl_store_describe(ctl->config, err, what, sizeof what);
    ctl_error(ctl, "the store: %s", what);
    ctl_store_remedy(ctl->config, err->code, remedy, sizeof remedy);
    if (remedy[0] != '\0')
        ctl_next(ctl, "%s", remedy);
    return status;
}

int ctl_outbox_error(const struct ctl *ctl, const struct err *err)
{
    ctl_error(ctl, "%s", err->message);
    ctl_next(
        ctl,
        "see that the directory %s is there, that user %s may write to it (as root, this runs as "
        "its owner), that its disk has room, and outbox.db in it is whole",
        ctl->config->server.state_dir, ctl_user_name());
    return EXIT_STORE;
}

/* ---- opening ---- */

/* The login of the person, also behind sudo, and the host: for AuditLog. */
static void find_actor(char *out, size_t size)
{
    const char *name = getuid() == 0 ? getenv("SUDO_USER") : NULL;
    char login[256];
    const struct passwd *user;

    if (name == NULL && getlogin_r(login, sizeof login) == 0)
        name = login;
    if (name == NULL) {
        user = getpwuid(getuid());
        name = user != NULL ? user->pw_name : NULL;
    }
    if (name != NULL && text_fault(name, strlen(name), 1, 128) == NULL)
        snprintf(out, size, "%s@%.120s", name, log_host());
    else
        snprintf(out, size, "uid %lu@%.120s", (unsigned long)getuid(), log_host());
}

bool ctl_become_owner(const struct ctl *ctl)
{
    const struct config *config = ctl->config;
    struct stat status;
    const struct passwd *owner;

    if (geteuid() != 0 || stat(config->server.state_dir, &status) != 0 || status.st_uid == 0)
        return true;
    owner = getpwuid(status.st_uid);
    if ((owner != NULL ? initgroups(owner->pw_name, owner->pw_gid) : setgroups(0, NULL)) == 0 &&
        setgid(owner != NULL ? owner->pw_gid : status.st_gid) == 0 && setuid(status.st_uid) == 0)
        return true;
    ctl_error(ctl, "cannot become the owner of %s: %s", config->server.state_dir, strerror(errno));
    return false;
}

int ctl_open_config(struct ctl *ctl)
{
    struct err err = {0};

    ctl->config = config_load(ctl->values[FLAG_CONFIG], &err);
    if (ctl->config == NULL) {
        ctl_error(ctl, "%s", err.message);
        if (strstr(err.message, strerror(EACCES)) != NULL)
            ctl_next(ctl, "run it as root, or let user %s read that file", ctl_user_name());
        return EXIT_USAGE;
    }
    ctl->config->store.login = LOGIN_ADMIN;
    find_actor(ctl->actor, sizeof ctl->actor); /* before root becomes somebody else */
    return ctl_become_owner(ctl) ? EXIT_OK : EXIT_STORE;
}

int ctl_open_store(struct ctl *ctl)
{
    struct err err = {0};
    int status = ctl->config != NULL ? EXIT_OK : ctl_open_config(ctl);

    if (status != EXIT_OK)
        return status;
    ctl_work_begin(ctl, WORK_READS, "opening the store (%s)", ctl_store_place(ctl->config));
    ctl->store = store_open(ctl->config, &err);
    ctl_work_end(ctl);
    if (ctl->signal != 0)
        return EXIT_NO; /* before anything was begun */
    return ctl->store != NULL ? EXIT_OK : ctl_store_error(ctl, &err);
}

/* ---- migrate ---- */

int ctl_migrate(struct ctl *ctl)
{
    struct err err = {0};
    int version = 0;
    enum err_code code;
    int status = ctl_open_config(ctl);

    if (status != EXIT_OK)
        return status;
    ctl_work_begin(ctl, WORK_SETUP, "setting up the schema of %s", ctl_store_place(ctl->config));
    code = store_migrate(ctl->config, &version, &err);
    ctl_work_end(ctl);
    if (code != ERR_NONE)
        return ctl_store_error(ctl, &err);
    return ctl_show_row(ctl, &(struct ctl_cell){"SchemaVersion", ctl_integer(version)}, 1);
}
