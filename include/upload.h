/* upload.h - the request body in memory, by whichever transport it comes.
 *
 * From FastCGI's stdin: into memory up to 8 MiB, or where many are in hand already (128 MiB in all) or it
 * is larger, into a nameless file in server.state_dir, mapped. Beside what is in hand, up to 16 MiB of
 * memory are kept for the next uploads.
 * By path (REQUEST_BODY_FILE): the web server's own file, opened only below server.body_file_dir and
 * never through a symbolic link, mapped. */
#ifndef EXTRACT_UPLOAD_H
#define EXTRACT_UPLOAD_H

#include "config.h"
#include "find.h"
#include "request.h"

struct upload {
    const char *data;
    size_t len;
    void *map;   /* memory, or a file's; NULL: nothing */
    size_t room; /* of memory; 0: a file's */
    struct find_marks *marks;
    size_t mark_count;
};

/* marks (mark_count of them, the caller's): what to look for while the upload comes in.
 * Errors: ERR_BAD_REQUEST (no Content-Length, upload stopped half-way), ERR_FILE_TOO_LARGE,
 * ERR_STORAGE_FULL (no room for the spool), ERR_INTERNAL (a path that is not allowed; no memory).
 * To be closed after an error, too. */
enum err_code upload_open(struct upload *upload, struct request *request,
                          const struct config *config, struct find_marks *marks, size_t mark_count,
                          struct err *err) MUST_CHECK;
void upload_close(struct upload *upload);

#endif
