/* state_db.c - databases in server.state_dir. See state_db.h. */
#include "state_db.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

/* Is there no room, rather than no right? */
static bool is_full(int rc)
{
    return (rc & 0xff) == SQLITE_FULL || (rc & 0xff) == SQLITE_IOERR ||
           (rc & 0xff) == SQLITE_NOMEM || (rc & 0xff) == SQLITE_BUSY;
}

static int flock_wait(int fd, int operation)
{
    int rc;

    do
        rc = flock(fd, operation);
    while (rc != 0 && errno == EINTR);
    return rc;
}

/* Root, who sets a host up, leaves files that the service can use. */
static int give_to_directory_owner(int fd, int directory)
{
    struct stat st;

    if (geteuid() != 0)
        return 0;
    return fstat(directory, &st) != 0 ? -1 : fchown(fd, st.st_uid, st.st_gid);
}

/* With its mode, which SQLite's -wal and -shm inherit. A file that exists is not opened: closing it
 * again would drop the locks of another connection of this process (fcntl(2)). */
enum err_code state_db_create_file(const struct state_db *state, const char *name, struct err *err)
{
    enum err_code code = ERR_NONE;
    int fd = openat(state->directory, name, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600);

    if (fd < 0 && errno == EEXIST)
        return ERR_NONE;
    if (fd < 0 || give_to_directory_owner(fd, state->directory) != 0 ||
        fsync(state->directory) != 0) /* the name must survive a power cut as well */
        code = err_set(err, errno == ENOSPC || errno == EDQUOT ? ERR_STORAGE_FULL : ERR_CONFIG,
                       "server.state_dir: cannot create %s: %s", name, strerror(errno));
    if (fd >= 0)
        close(fd);
    return code;
}

static enum err_code open_database(struct state_db *state, const char *path, const char *setup,
                                   int busy_ms, struct err *err)
{
    int rc = sqlite3_open_v2(path, &state->db, SQLITE_OPEN_READWRITE, NULL);

    if (rc == SQLITE_OK)
        rc = sqlite3_busy_timeout(state->db, busy_ms);
    if (rc == SQLITE_OK && sqlite3_db_readonly(state->db, "main") != 0)
        return err_set(err, ERR_CONFIG, "server.state_dir: %s is not writable", path);
    if (rc == SQLITE_OK)
        rc = sqlite3_exec(state->db, setup, NULL, NULL, NULL);
    if (rc == SQLITE_OK)
        return ERR_NONE;
    return err_set(err, is_full(rc) ? ERR_STORAGE_FULL : ERR_CONFIG,
                   "server.state_dir: cannot use %s: %s", path, sqlite3_errmsg(state->db));
}

enum err_code state_db_open(struct state_db *state, const char *state_dir, const char *name,
                            const char *setup, int busy_ms, struct err *err)
{
    char path[PATH_MAX];
    enum err_code code;

    *state = (struct state_db){.directory = -1};
    if (state_dir[0] == '\0')
        return err_set(err, ERR_CONFIG, "server.state_dir is not set");
    if (snprintf(path, sizeof path, "%s/%s", state_dir, name) >= (int)sizeof path)
        return err_set(err, ERR_CONFIG, "server.state_dir is too long");
    state->directory = open(state_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (state->directory < 0)
        return err_set(err, ERR_CONFIG, "server.state_dir: %s: %s", state_dir, strerror(errno));
    if (flock_wait(state->directory, LOCK_EX) != 0)
        return err_set(err, ERR_CONFIG, "server.state_dir: cannot lock %s: %s", state_dir,
                       strerror(errno));
    code = state_db_create_file(state, name, err);
    if (code == ERR_NONE)
        code = open_database(state, path, setup, busy_ms, err);
    flock_wait(state->directory, LOCK_UN);
    return code;
}

void state_db_close(struct state_db *state)
{
    if (state->directory >= 0)
        flock_wait(state->directory, LOCK_EX);
    sqlite3_close(state->db);
    if (state->directory >= 0)
        close(state->directory); /* and with it the lock */
    *state = (struct state_db){.directory = -1};
}
