/* upload.c - the request body in memory, by whichever transport it comes. See upload.h. */
#include "upload.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define IN_MEMORY_BELOW (1024 * 1024)

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

/* A nameless file of size bytes, its space allocated: writing to its mapping can't fail later. */
static int open_spool(const char *state_dir, size_t size)
{
    int fd;

    if (size < IN_MEMORY_BELOW) {
        fd = memfd_create("upload", MFD_CLOEXEC);
    } else {
        fd = open(state_dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
        if (fd < 0 && (errno == EOPNOTSUPP || errno == EISDIR)) { /* a file system without it */
            char path[4096];
            if ((size_t)snprintf(path, sizeof path, "%s/upload-XXXXXX", state_dir) < sizeof path &&
                (fd = mkostemp(path, O_CLOEXEC)) >= 0)
                unlink(path);
        }
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

static enum err_code open_stdin(struct upload *upload, struct request *request,
                                const struct config *config, struct err *err)
{
    size_t size = (size_t)request->content_length;
    int fd = open_spool(config->server.state_dir, size);

    if (fd < 0)
        return err_set(err, ERR_STORAGE_FULL, "no spool of %zu bytes for the upload: %s", size,
                       strerror(errno));
    void *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (map == MAP_FAILED)
        return err_set(err, ERR_STORAGE_FULL, "the upload cannot be mapped: %s", strerror(errno));
    upload->map = map;
    upload->data = map;
    upload->len = size;
    if (request->read(request->io, map, size) < size)
        return err_set(err, ERR_BAD_REQUEST, "The upload stopped before its end.");
    return ERR_NONE;
}

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
        code = err_set(err, ERR_BAD_REQUEST, "The upload stopped before its end.");
    } else {
        void *map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (map == MAP_FAILED) {
            code =
                err_set(err, ERR_STORAGE_FULL, "the upload cannot be mapped: %s", strerror(errno));
        } else {
            upload->map = map;
            upload->data = map;
            upload->len = (size_t)st.st_size;
        }
    }
    close(fd);
    return code;
}

enum err_code upload_open(struct upload *upload, struct request *request,
                          const struct config *config, struct err *err)
{
    enum err_code code;

    *upload = (struct upload){.data = ""};
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
    if (upload->map != NULL)
        munmap(upload->map, upload->len);
    *upload = (struct upload){.data = ""};
}
