/* upload.c - the request body in memory, by whichever transport it comes. See upload.h. */
#include "upload.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* ---- memory for uploads, used again: to the kernel, fresh pages cost more than filling them ---- */

#define SMALLEST ((size_t)64 * 1024)        /* room is a power of two from here … */
#define LARGEST ((size_t)8 * 1024 * 1024)   /* … to here; a larger upload goes to a file, */
#define AT_ONCE ((size_t)128 * 1024 * 1024) /* and so does one that comes while so much is taken */
#define KEPT ((size_t)16 * 1024 * 1024)     /* beside those, for the next uploads, at most */
#define HUGE_PAGE ((size_t)2 * 1024 * 1024)

/* Lies in the memory itself. */
struct spare {
    struct spare *next;
    size_t room;
};

static struct {
    pthread_mutex_t lock;
    struct spare *first; /* the one given back last */
    size_t taken;
} memory = {.lock = PTHREAD_MUTEX_INITIALIZER};

static struct spare *find_spare(size_t room)
{
    for (struct spare **at = &memory.first; *at != NULL; at = &(*at)->next) {
        struct spare *found = *at;
        if (found->room == room) {
            *at = found->next;
            return found;
        }
    }
    return NULL;
}

/* Huge pages are for what lies between two of their borders, so the memory begins at one. Those that
 * size fills are asked for, and what is beyond comes in small ones: nothing is used that is not filled.
 * (A system may give them to all who do not ask.) Where they are of another size, or there are none, all
 * is in small ones. */
static void *map_memory(size_t size, size_t room)
{
    const size_t slack = size < HUGE_PAGE ? 0 : HUGE_PAGE;
    char *map =
        mmap(NULL, room + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (map == MAP_FAILED)
        return NULL;
    size_t before = slack == 0 ? 0 : -(uintptr_t)map & (HUGE_PAGE - 1);
    if (before > 0)
        munmap(map, before);
    if (slack > before)
        munmap(map + before + room, slack - before);
    map += before;
    madvise(map, room, MADV_DONTDUMP); /* people's invoices */
    if (slack > 0)
        madvise(map, size / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
    return map;
}

/* NULL: a file must do. */
static void *take_memory(size_t size, size_t *room)
{
    void *found = NULL;

    if (size > LARGEST)
        return NULL;
    for (*room = SMALLEST; *room < size; *room *= 2)
        ;
    pthread_mutex_lock(&memory.lock);
    bool may = memory.taken + *room <= AT_ONCE;
    if (may) {
        memory.taken += *room;
        found = find_spare(*room);
    }
    pthread_mutex_unlock(&memory.lock);
    if (!may || found != NULL || (found = map_memory(size, *room)) != NULL)
        return found;
    pthread_mutex_lock(&memory.lock);
    memory.taken -= *room;
    pthread_mutex_unlock(&memory.lock);
    return NULL;
}

/* Takes out the spares that are beyond what is kept: those that were given back first. */
static struct spare *take_surplus(void)
{
    size_t room = 0;
    struct spare **at = &memory.first;

    while (*at != NULL && room + (*at)->room <= KEPT) {
        room += (*at)->room;
        at = &(*at)->next;
    }
    struct spare *surplus = *at;
    *at = NULL;
    return surplus;
}

static void give_memory(void *data, size_t room)
{
    struct spare *spare = data;

    pthread_mutex_lock(&memory.lock);
    memory.taken -= room;
    *spare = (struct spare){.next = memory.first, .room = room};
    memory.first = spare;
    struct spare *surplus = take_surplus();
    pthread_mutex_unlock(&memory.lock);
    while (surplus != NULL) {
        struct spare *next = surplus->next;
        munmap(surplus, surplus->room);
        surplus = next;
    }
}

/* ---- looking at it ---- */

#define AT_A_TIME ((size_t)32 * 1024) /* stays in the nearest cache until it was looked at */

static size_t up_to(size_t at_a_time, size_t left)
{
    return left < at_a_time ? left : at_a_time;
}

static void look(const struct upload *upload, size_t len)
{
    for (size_t i = 0; i < upload->mark_count; i++)
        find_marks_look(&upload->marks[i], upload->data, len);
}

/* ---- by FastCGI's stdin ---- */

#define WRITTEN_AT_A_TIME ((size_t)128 * 1024) /* larger pieces cost the kernel less */

static enum err_code too_large(const struct config *config, struct err *err)
{
    int64_t max = config->server.max_upload;

    if (max % (1024 * 1024) == 0)
        return err_set(err, ERR_FILE_TOO_LARGE,
                       "The upload is larger than the limit of %lld MB (%lld bytes).",
                       (long long)max / (1024 * 1024), (long long)max);
    return err_set(err, ERR_FILE_TOO_LARGE, "The upload is larger than the limit of %lld bytes.",
                   (long long)max);
}

/* A nameless file of size bytes, its space allocated: what is lacking is known before anything is read. */
static int open_spool(const char *state_dir, size_t size)
{
    int fd = open(state_dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);

    if (fd < 0 && (errno == EOPNOTSUPP || errno == EISDIR)) { /* a file system without it */
        char path[4096];
        if ((size_t)snprintf(path, sizeof path, "%s/upload-XXXXXX", state_dir) < sizeof path &&
            (fd = mkostemp(path, O_CLOEXEC)) >= 0)
            unlink(path);
    }
    if (fd < 0)
        return -1;
    int failed = posix_fallocate(fd, 0, (off_t)size);
    if (failed != 0) {
        close(fd);
        errno = failed;
        return -1;
    }
    return fd;
}

static enum err_code broke_off(struct err *err)
{
    return err_set(err, ERR_BAD_REQUEST, "The upload stopped before its end.");
}

static enum err_code read_into_memory(struct upload *upload, struct request *request,
                                      struct err *err)
{
    for (size_t done = 0; done < upload->len; look(upload, done)) {
        size_t n = up_to(AT_A_TIME, upload->len - done);
        if (request->read(request->io, (char *)upload->map + done, n) < n)
            return broke_off(err);
        done += n;
    }
    return ERR_NONE;
}

static bool write_all(int fd, const char *data, size_t len, size_t at)
{
    while (len > 0) {
        ssize_t n = pwrite(fd, data, len, (off_t)at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        data += n;
        len -= (size_t)n;
        at += (size_t)n;
    }
    return true;
}

static enum err_code no_spool(size_t size, const char *what, struct err *err)
{
    return err_set(err, ERR_STORAGE_FULL, "no spool of %zu bytes for the upload: %s: %s", size,
                   what, strerror(errno));
}

/* Written, not filled through its mapping: the kernel has half the work with a page that is written. */
static enum err_code read_into_file(struct upload *upload, struct request *request, int fd,
                                    struct err *err)
{
    enum err_code code = ERR_NONE;
    char *piece = malloc(WRITTEN_AT_A_TIME);

    if (piece == NULL)
        return err_set(err, ERR_INTERNAL, "out of memory");
    for (size_t done = 0; code == ERR_NONE && done < upload->len; look(upload, done)) {
        size_t n = up_to(WRITTEN_AT_A_TIME, upload->len - done);
        if (request->read(request->io, piece, n) < n)
            code = broke_off(err);
        else if (!write_all(fd, piece, n, done))
            code = no_spool(upload->len, "write", err);
        else
            done += n;
    }
    free(piece);
    return code;
}

static enum err_code open_stdin(struct upload *upload, struct request *request,
                                const struct config *config, struct err *err)
{
    const size_t size = (size_t)request->content_length;
    enum err_code code;

    upload->map = take_memory(size, &upload->room);
    if (upload->map != NULL) {
        upload->data = upload->map;
        upload->len = size;
        return read_into_memory(upload, request, err);
    }
    upload->room = 0;
    int fd = open_spool(config->server.state_dir, size);
    if (fd < 0)
        return no_spool(size, "open or allocate", err);
    void *map = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) {
        code = no_spool(size, "map", err);
    } else {
        upload->data = upload->map = map;
        upload->len = size;
        code = read_into_file(upload, request, fd, err);
    }
    close(fd);
    return code;
}

/* ---- by path ---- */

/* Opens path below dir; a symbolic link on the way, or a way out, is refused by the kernel. */
static int open_beneath(const char *dir, const char *path)
{
    struct open_how how = {.flags = O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NOCTTY | O_NONBLOCK,
                           .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS};
    size_t n = strlen(dir);

    while (n > 0 && dir[n - 1] == '/')
        n--;
    if (strncmp(path, dir, n) != 0 || path[n] != '/') {
        errno = EXDEV;
        return -1;
    }
    int dir_fd = open(n == 0 ? "/" : dir, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (dir_fd < 0)
        return -1;
    path += n;
    while (*path == '/')
        path++;
    int fd = (int)syscall(SYS_openat2, dir_fd, path, &how, sizeof how);
    int saved = errno;
    close(dir_fd);
    errno = saved;
    return fd;
}

static enum err_code open_body_file(struct upload *upload, struct request *request,
                                    const struct config *config, struct err *err)
{
    const char *dir = config->server.body_file_dir;
    enum err_code code = ERR_NONE;
    struct stat st;

    if (dir[0] == '\0')
        return err_set(
            err, ERR_INTERNAL,
            "the web server passes REQUEST_BODY_FILE, but server.body_file_dir is not set");
    int fd = open_beneath(dir, request->body_file);
    if (fd < 0)
        return err_set(err, ERR_INTERNAL,
                       "REQUEST_BODY_FILE cannot be opened below server.body_file_dir: %s",
                       strerror(errno));
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
        code = err_set(err, ERR_INTERNAL, "REQUEST_BODY_FILE is not a regular file");
    } else if (st.st_size > config->server.max_upload) {
        code = too_large(config, err);
    } else if (st.st_size == 0 || st.st_size != request->content_length) {
        code = broke_off(err);
    } else {
        void *map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (map == MAP_FAILED) {
            code =
                err_set(err, ERR_STORAGE_FULL, "the upload cannot be mapped: %s", strerror(errno));
        } else {
            upload->map = map;
            upload->data = map;
            upload->len = (size_t)st.st_size;
            for (size_t seen = 0; seen < upload->len; look(upload, seen))
                seen += up_to(AT_A_TIME, upload->len - seen);
        }
    }
    close(fd);
    return code;
}

/* ---- either ---- */

enum err_code upload_open(struct upload *upload, struct request *request,
                          const struct config *config, struct find_marks *marks, size_t mark_count,
                          struct err *err)
{
    enum err_code code;

    *upload = (struct upload){.data = "", .marks = marks, .mark_count = mark_count};
    if (request->content_length > config->server.max_upload)
        code = too_large(config, err);
    else if (request->body_file[0] != '\0')
        return open_body_file(upload, request, config, err);
    else if (request->content_length < 0)
        code = err_set(err, ERR_BAD_REQUEST, "The request has no usable Content-Length.");
    else if (request->content_length == 0)
        code = err_set(err, ERR_BAD_REQUEST, "The request has no body.");
    else
        code = open_stdin(upload, request, config, err);
    if (code != ERR_NONE)
        request_drain(request);
    return code;
}

void upload_close(struct upload *upload)
{
    if (upload->room > 0)
        give_memory(upload->map, upload->room);
    else if (upload->map != NULL)
        munmap(upload->map, upload->len);
    *upload = (struct upload){.data = ""};
}
