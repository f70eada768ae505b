/* store_sqlite_file.c - the files of the embedded store, and what happens when somebody replaces the
 * database while it is in use (mv backup.db store.db). See store_sqlite.h.
 *
 * SQLite opens a database once, and goes on with that file whatever becomes of its name: what is
 * written then is lost with the process. So each connection remembers which file it opened, and each
 * use of it begins with one stat(). Where the name is gone, the store is unavailable until it is
 * back; where it is another file's, all connections are opened anew.
 *
 * That must be done with care, for the log (store.db-wal) and its index (store.db-shm) are found by
 * name, too: they still are those of the old file, and SQLite would take their pages for the new
 * one's. So a file is opened and left under the host's lock only, and all connections to it have read
 * something before that ends: SQLite opens the log with the first read. The lock file says whose the
 * log is that has the name; the process that comes to another file first removes it.
 *
 * Who leaves a file that was replaced writes what the log holds where it belongs, into that file
 * (somebody may have moved it elsewhere). SQLite itself, which removes a log that nobody uses any more,
 * leaves that of a file without its name alone; it looks just before, hence the lock. */
#include "store_sqlite.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "buf.h"

/* ---- files ---- */

/* As stat() for the directory of that path. */
static int stat_directory(const char *path, struct stat *status, struct buf *name)
{
    char *copy = strdup(path); /* dirname() writes into it */
    int result = -1;

    if (copy != NULL) {
        const char *directory = dirname(copy);
        result = stat(directory, status);
        if (name != NULL)
            buf_append_str(name, directory);
    }
    free(copy);
    return result;
}

enum err_code sqlite_check_directory(const char *path, struct err *err)
{
    enum err_code code = ERR_NONE;
    struct stat status;
    struct buf name;

    buf_init(&name, 4096);
    if (stat_directory(path, &status, &name) == 0) {
        if (!S_ISDIR(status.st_mode))
            code = err_set(err, ERR_STORE_UNAVAILABLE, "%s is not a directory", buf_str(&name));
    } else if (errno == ENOENT) {
        code = err_set(err, ERR_STORE_UNAVAILABLE, "the directory %s is missing", buf_str(&name));
    } else {
        code = err_set(err, ERR_STORE_UNAVAILABLE, "the directory %s: %s", buf_str(&name),
                       strerror(errno));
    }
    buf_reset(&name);
    return code;
}

/* The owner of the directory: the service, where an administrator sets it up as root. */
static int give_to_directory_owner(int fd, const char *path)
{
    struct stat directory;

    if (stat_directory(path, &directory, NULL) != 0)
        return -1;
    return fchown(fd, directory.st_uid, directory.st_gid);
}

enum err_code sqlite_create_file(const char *path, struct err *err)
{
    /* O_EXCL: closing a descriptor of a database that is in use would drop SQLite's locks. */
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    enum err_code code = ERR_NONE;

    if (fd < 0 && errno == EEXIST)
        return ERR_NONE;
    if (fd < 0 || (geteuid() == 0 && give_to_directory_owner(fd, path) != 0))
        code = err_set(
            err, errno == ENOSPC || errno == EDQUOT ? ERR_STORAGE_FULL : ERR_STORE_UNAVAILABLE,
            "cannot create %s: %s", path, strerror(errno));
    if (fd >= 0)
        close(fd);
    return code;
}

/* ---- which file it is ---- */

bool sqlite_same_file(struct sqlite_file a, struct sqlite_file b)
{
    return a.inode == b.inode && a.device == b.device;
}

enum err_code sqlite_file_at(const char *path, struct sqlite_file *file, struct err *err)
{
    struct stat status;

    *file = (struct sqlite_file){0};
    if (stat(path, &status) != 0)
        return err_set(err, ERR_STORE_UNAVAILABLE, "embedded store: the file %s",
                       errno == ENOENT ? "is missing" : "cannot be reached");
    *file = (struct sqlite_file){status.st_dev, status.st_ino};
    return ERR_NONE;
}

/* The name of the file beside the database. NULL: no memory. */
static char *name_beside(const struct store_sqlite *store, const char *suffix)
{
    size_t size = strlen(store->path) + strlen(suffix) + 1;
    char *name = malloc(size);

    if (name != NULL)
        snprintf(name, size, "%s%s", store->path, suffix);
    return name;
}

static struct sqlite_file find_beside(const struct store_sqlite *store, const char *suffix)
{
    struct sqlite_file file = {0};
    struct err ignored = {0};
    char *name = name_beside(store, suffix);

    if (name != NULL && sqlite_file_at(name, &file, &ignored) != ERR_NONE)
        file = (struct sqlite_file){0};
    free(name);
    return file;
}

/* ---- whose the log is ---- */

/* What the lock file holds. All 0: nothing is known, or no log was left. */
struct log_record {
    struct sqlite_file database, log, log_index;
};

static struct log_record read_record(const struct store_sqlite *store)
{
    struct log_record record;

    if (pread(store->lock_fd, &record, sizeof record, 0) != (ssize_t)sizeof record)
        memset(&record, 0, sizeof record);
    return record;
}

/* It survives a power cut: a stale one would name files whose numbers have others by then. */
static enum err_code write_record(const struct store_sqlite *store, const struct log_record *record,
                                  struct err *err)
{
    if (pwrite(store->lock_fd, record, sizeof *record, 0) == (ssize_t)sizeof *record &&
        fdatasync(store->lock_fd) == 0)
        return ERR_NONE;
    return err_set(err,
                   errno == ENOSPC || errno == EDQUOT ? ERR_STORAGE_FULL : ERR_STORE_UNAVAILABLE,
                   "embedded store: cannot write %s.lock: %s", store->path, strerror(errno));
}

static enum err_code remove_stale(const struct store_sqlite *store, const char *suffix,
                                  struct sqlite_file stale, struct err *err)
{
    enum err_code code = ERR_NONE;
    char *name = NULL;

    if (stale.inode == 0 || !sqlite_same_file(find_beside(store, suffix), stale))
        return ERR_NONE;
    name = name_beside(store, suffix);
    if (name == NULL || unlink(name) != 0)
        code = err_set(err, ERR_STORE_UNAVAILABLE,
                       "embedded store: cannot remove the log of the file that was replaced: %s",
                       strerror(errno));
    free(name);
    return code;
}

/* Removes what another file has left. A log that came with the file (from a backup of all of them)
 * stays. */
static enum err_code clear_log(const struct store_sqlite *store, struct sqlite_file file,
                               struct err *err)
{
    static const struct log_record nothing;
    const struct log_record record = read_record(store);

    if (sqlite_same_file(record.database, file) || record.database.inode == 0)
        return ERR_NONE;
    if (remove_stale(store, "-wal", record.log, err) != ERR_NONE ||
        remove_stale(store, "-shm", record.log_index, err) != ERR_NONE)
        return err->code;
    return write_record(store, &nothing, err);
}

/* SQLite removes a log that nobody uses any more. */
static void forget_log(const struct store_sqlite *store)
{
    static const struct log_record nothing;
    struct err ignored = {.message = ""};

    if (find_beside(store, "-wal").inode == 0 &&
        write_record(store, &nothing, &ignored) != ERR_NONE)
        log_warning(NULL, NULL, "%s", ignored.message);
}

static enum err_code claim_log(const struct store_sqlite *store, struct err *err)
{
    const struct log_record before = read_record(store);
    struct log_record record;

    memset(&record, 0, sizeof record);
    record.database = store->writer.file;
    record.log = find_beside(store, "-wal");
    record.log_index = find_beside(store, "-shm");
    return memcmp(&record, &before, sizeof record) == 0 ? ERR_NONE
                                                        : write_record(store, &record, err);
}

/* Only to bring it to the disk. What setting up the schema has left there is the first. */
static enum err_code open_log(struct store_sqlite *store, struct err *err)
{
    char *name = name_beside(store, "-wal");
    int fd = name == NULL ? -1 : open(name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);

    free(name);
    pthread_rwlock_wrlock(&store->log_lock);
    store->log_fd = fd;
    pthread_rwlock_unlock(&store->log_lock);
    if (fd >= 0 && fdatasync(fd) == 0)
        return ERR_NONE;
    return err_set(err, ERR_STORE_UNAVAILABLE, "embedded store: the log cannot be used: %s",
                   strerror(errno));
}

/* Waits for those who bring it to the disk. */
static void close_log(struct store_sqlite *store)
{
    pthread_rwlock_wrlock(&store->log_lock);
    if (store->log_fd >= 0)
        close(store->log_fd);
    store->log_fd = -1;
    pthread_rwlock_unlock(&store->log_lock);
}

/* ---- coming and leaving ---- */

static enum err_code connect_reader(struct store_sqlite *store, struct sqlite_db *db,
                                    struct err *err)
{
    enum err_code code =
        sqlite_connect(db, store->path, store->writer.file, store->timeout_ms, err);

    if (code == ERR_NONE)
        code = sqlite_exec(db, "PRAGMA query_only = ON; SELECT 1 FROM sqlite_master LIMIT 1", err);
    return code;
}

enum err_code sqlite_come_to(struct store_sqlite *store, struct sqlite_file file, bool may_set_up,
                             int64_t deadline_ms, struct err *err)
{
    enum err_code code = clear_log(store, file, err);

    if (code == ERR_NONE)
        code = sqlite_connect(&store->writer, store->path, file, store->timeout_ms, err);
    if (code == ERR_NONE)
        code = sqlite_prepare_schema(store, may_set_up, deadline_ms, err);
    for (int i = 0; i < SQLITE_READERS && code == ERR_NONE; i++)
        code = connect_reader(store, &store->readers[i].db, err);
    if (code == ERR_NONE)
        code = claim_log(store, err);
    return code == ERR_NONE ? open_log(store, err) : code;
}

/* Writes into the old file what its log still holds. Where that is impossible, so it is. */
static enum err_code empty_log(struct store_sqlite *store, int64_t deadline_ms, struct err *err)
{
    int64_t left_ms = deadline_ms - clock_monotonic_ms();

    if (store->writer.handle == NULL)
        return ERR_NONE;
    sqlite3_busy_timeout(store->writer.handle, left_ms > 1 ? (int)left_ms : 1);
    int result =
        sqlite3_wal_checkpoint_v2(store->writer.handle, NULL, SQLITE_CHECKPOINT_FULL, NULL, NULL);
    if ((result & 0xff) == SQLITE_BUSY)
        return err_set(err, ERR_STORE_UNAVAILABLE,
                       "embedded store: the file was replaced, and the old one is still in use");
    return ERR_NONE;
}

static void disconnect_all(struct store_sqlite *store)
{
    close_log(store);
    atomic_store(&store->log_in_doubt, false);
    for (int i = 0; i < SQLITE_READERS; i++)
        sqlite_disconnect(&store->readers[i].db);
    sqlite_disconnect(&store->writer);
}

void sqlite_leave(struct store_sqlite *store)
{
    struct err err = {.message = ""};
    struct sqlite_file there;
    int64_t deadline_ms = clock_monotonic_ms() + store->timeout_ms;
    bool is_locked = store->lock_fd >= 0 && sqlite_host_lock(store, deadline_ms, &err) == ERR_NONE;
    bool is_there = sqlite_file_at(store->path, &there, &err) == ERR_NONE;

    if ((!is_there || !sqlite_same_file(there, store->writer.file)) &&
        empty_log(store, deadline_ms, &err) != ERR_NONE)
        log_warning(NULL, NULL, "%s", err.message);
    disconnect_all(store);
    if (is_locked) {
        forget_log(store);
        sqlite_host_unlock(store);
    }
}

/* ---- following ---- */

static enum err_code lock_readers(struct store_sqlite *store, int64_t deadline_ms, struct err *err)
{
    for (int i = 0; i < SQLITE_READERS; i++) {
        if (sqlite_lock_mutex(&store->readers[i].mutex, deadline_ms) == 0)
            continue;
        while (i-- > 0)
            pthread_mutex_unlock(&store->readers[i].mutex);
        return err_set(err, ERR_STORE_UNAVAILABLE,
                       "embedded store: the file was replaced, and a reader is still busy");
    }
    return ERR_NONE;
}

static void unlock_readers(struct store_sqlite *store)
{
    for (int i = 0; i < SQLITE_READERS; i++)
        pthread_mutex_unlock(&store->readers[i].mutex);
}

/* Between readers' locks. */
static enum err_code change_to(struct store_sqlite *store, struct sqlite_file file,
                               int64_t deadline_ms, struct err *err)
{
    struct err why = {.message = ""};

    if (empty_log(store, deadline_ms, err) != ERR_NONE)
        return err->code;
    disconnect_all(store);
    if (sqlite_come_to(store, file, false, deadline_ms, &why) == ERR_NONE)
        return ERR_NONE;
    disconnect_all(store);
    return err_set(err, ERR_STORE_UNAVAILABLE, "the file was replaced: %s", why.message);
}

enum err_code sqlite_follow(struct store_sqlite *store, int64_t deadline_ms, struct err *err)
{
    struct sqlite_file file;
    enum err_code code = sqlite_file_at(store->path, &file, err);

    if (code != ERR_NONE || sqlite_same_file(file, store->writer.file))
        return code;
    code = lock_readers(store, deadline_ms, err);
    if (code != ERR_NONE)
        return code;
    code = change_to(store, file, deadline_ms, err);
    unlock_readers(store);
    if (code == ERR_NONE)
        log_warning(NULL, NULL, "the file of the embedded store was replaced: the new one is used");
    return code;
}
