/* test_upload.c - both ways of an upload into memory, and what is made of a request that fails. */
#include <dirent.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "upload.h"

#define COUNT(a) (sizeof(a) / sizeof((a)[0]))
#define MB ((int64_t)1024 * 1024)

static char directory[] = "/tmp/test_upload.XXXXXX";
static char spool[64], bodies[64];

/* ---- helpers ---- */

static void make_path(char *out, size_t size, const char *name)
{
    assert_true((size_t)snprintf(out, size, "%s/%s", directory, name) < size);
}

static void write_file(const char *name, int64_t size)
{
    char path[256];
    make_path(path, sizeof path, name);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    for (int64_t i = 0; i < size; i++)
        fputc((int)(i % 251), file);
    assert_int_equal(fclose(file), 0);
}

static int set_up_all(void **state)
{
    (void)state;
    if (mkdtemp(directory) == NULL)
        return -1;
    make_path(spool, sizeof spool, "spool");
    make_path(bodies, sizeof bodies, "bodies");
    return mkdir(spool, 0700) == 0 && mkdir(bodies, 0700) == 0 ? 0 : -1;
}

static int tear_down_all(void **state)
{
    (void)state;
    return rmdir(bodies) == 0 && rmdir(spool) == 0 && rmdir(directory) == 0 ? 0 : -1;
}

static size_t entries(const char *path)
{
    DIR *dir = opendir(path);
    size_t n = 0;
    assert_non_null(dir);
    while (readdir(dir) != NULL)
        n++;
    closedir(dir);
    return n - 2;
}

static int open_files(void)
{
    return (int)entries("/proc/self/fd");
}

static bool is_pattern(const char *data, size_t len)
{
    for (size_t i = 0; i < len; i++)
        if ((unsigned char)data[i] != i % 251)
            return false;
    return true;
}

/* The web server's side of stdin: size bytes of a pattern. */
struct source {
    int64_t size, at;
};

static size_t read_source(void *io, void *into, size_t size)
{
    struct source *source = io;
    unsigned char *out = into;
    size_t n = 0;

    while (n < size && source->at < source->size)
        out[n++] = (unsigned char)(source->at++ % 251);
    return n;
}

static struct request request_of(struct source *source, int64_t content_length,
                                 const char *body_file)
{
    return (struct request){.id = "0193",
                            .content_length = content_length,
                            .body_file = body_file,
                            .read = read_source,
                            .io = source};
}

static struct config config_of(int64_t max_upload, char *body_file_dir)
{
    return (struct config){
        .server = {.max_upload = max_upload, .state_dir = spool, .body_file_dir = body_file_dir}};
}

static char unset[] = "";

/* ---- from stdin ---- */

#define LARGEST (8 * MB) /* that goes to memory */
#define AT_ONCE 16       /* of those */
#define KEPT 2

static bool is_mapped(void *map)
{
    return msync(map, 1, MS_ASYNC) == 0;
}

static enum err_code open_pattern(struct upload *upload, int64_t size, char *state_dir)
{
    struct source source = {size, 0};
    struct request request = request_of(&source, size, "");
    struct config config = config_of(2 * LARGEST, unset);
    struct err err = {0};

    config.server.state_dir = state_dir;
    enum err_code code = upload_open(upload, &request, &config, NULL, 0, &err);
    assert_int_equal(err.code, code);
    assert_int_equal(source.at, size); /* what is refused is read all the same */
    return code;
}

static void test_stdin(void **state)
{
    static const int64_t sizes[] = {1,      4095,   4096,       4097,   MB - 1,  MB,
                                    MB + 1, 2 * MB, 2 * MB + 1, 5 * MB, LARGEST, LARGEST + 1};
    int files = open_files();
    (void)state;

    for (size_t i = 0; i < COUNT(sizes); i++) {
        struct upload upload;
        assert_int_equal(open_pattern(&upload, sizes[i], spool), ERR_NONE);
        assert_int_equal(upload.len, sizes[i]);
        assert_true(is_pattern(upload.data, upload.len));
        assert_int_equal(entries(spool), 0); /* nothing is left whatever happens */
        void *map = upload.map;
        upload_close(&upload);
        assert_int_equal(is_mapped(map), sizes[i] <= LARGEST);
        assert_null(upload.map);
        assert_int_equal(upload.len, 0);
        upload_close(&upload);
    }
    assert_int_equal(open_files(), files);
}

/* One that stands nowhere, and one that comes every 251 bytes. */
static void init_marks(struct find_marks *marks)
{
    find_marks_init(&marks[0], "\1\1", 2);
    find_marks_init(&marks[1], "\372\0", 2);
}

static void check_marks(const struct find_marks *marks, size_t len)
{
    assert_int_equal(marks[0].count, 0);
    assert_int_equal(marks[0].seen, len - 1); /* all was looked at */
    assert_int_equal(marks[1].count, FIND_MARKS);
    for (size_t i = 0; i < FIND_MARKS; i++)
        assert_int_equal(marks[1].at[i], i * 251 + 250);
}

static void test_marks_of_stdin(void **state)
{
    struct source source = {MB, 0};
    struct request request = request_of(&source, MB, "");
    struct config config = config_of(MB, unset);
    struct find_marks marks[2];
    struct upload upload;
    struct err err;
    (void)state;

    init_marks(marks);
    assert_int_equal(upload_open(&upload, &request, &config, marks, 2, &err), ERR_NONE);
    check_marks(marks, (size_t)MB);
    upload_close(&upload);
}

/* Small uploads need no disk, large ones do not stay in memory. */
static void test_where_the_spool_is(void **state)
{
    char nowhere[] = "/nonexistent/spool";
    struct upload upload;
    (void)state;

    assert_int_equal(open_pattern(&upload, LARGEST, nowhere), ERR_NONE);
    upload_close(&upload);
    assert_int_equal(open_pattern(&upload, LARGEST + 1, nowhere), ERR_STORAGE_FULL);
    assert_int_equal(upload.len, 0);
    upload_close(&upload);
}

/* It is used again, and there is an end to it. */
static void test_memory(void **state)
{
    char nowhere[] = "/nonexistent/spool";
    struct upload uploads[AT_ONCE], one_more, other;
    void *maps[AT_ONCE];
    size_t kept = 0;
    (void)state;

    for (size_t i = 0; i < AT_ONCE; i++) {
        assert_int_equal(open_pattern(&uploads[i], LARGEST, nowhere), ERR_NONE);
        maps[i] = uploads[i].map;
    }
    assert_int_equal(open_pattern(&one_more, 1, nowhere), ERR_STORAGE_FULL);
    assert_int_equal(open_pattern(&one_more, 5000, spool), ERR_NONE);
    assert_true(is_pattern(one_more.data, 5000));
    upload_close(&one_more);

    upload_close(&uploads[3]);
    assert_int_equal(open_pattern(&other, 100000, nowhere), ERR_NONE);
    assert_ptr_not_equal(other.map, maps[3]); /* it is too large for that */
    upload_close(&other);
    assert_int_equal(open_pattern(&uploads[3], LARGEST - 5000, nowhere), ERR_NONE);
    assert_ptr_equal(uploads[3].map, maps[3]);
    assert_true(is_pattern(uploads[3].data, uploads[3].len));
    for (size_t i = 0; i < AT_ONCE; i++)
        upload_close(&uploads[i]);
    for (size_t i = 0; i < AT_ONCE; i++)
        kept += is_mapped(maps[i]);
    assert_int_equal(kept, KEPT);
    assert_true(is_mapped(maps[AT_ONCE - 1])); /* those given back last */

    /* What nobody asks for any more does not take the place of what comes every day. */
    assert_int_equal(open_pattern(&other, 200000, nowhere), ERR_NONE);
    void *map = other.map;
    upload_close(&other);
    assert_true(is_mapped(map));
    assert_true(is_mapped(maps[AT_ONCE - 1]));
    assert_false(is_mapped(maps[AT_ONCE - KEPT]));
}

static void test_stdin_refused(void **state)
{
    static const struct {
        const char *what;
        int64_t length, sent, max;
        enum err_code code;
        const char *words;
    } cases[] = {
        {"stopped half-way", 1000, 999, MB, ERR_BAD_REQUEST, "stopped"},
        {"stopped at once", 1000, 0, MB, ERR_BAD_REQUEST, "stopped"},
        {"stopped half-way, large", 2 * MB, MB, 3 * MB, ERR_BAD_REQUEST, "stopped"},
        {"no length", -1, 50000, MB, ERR_BAD_REQUEST, "Content-Length"},
        {"no body", 0, 0, MB, ERR_BAD_REQUEST, "no body"},
        {"one byte too large", MB + 1, MB + 1, MB, ERR_FILE_TOO_LARGE,
         "limit of 1 MB (1048576 bytes)"},
        {"too large, an odd limit", 1001, 1001, 1000, ERR_FILE_TOO_LARGE, "limit of 1000 bytes"},
        {"50 MB", 50 * MB + 1, 100000, 50 * MB, ERR_FILE_TOO_LARGE,
         "limit of 50 MB (52428800 bytes)"},
        {"an absurd length", INT64_MAX, 100000, MB, ERR_FILE_TOO_LARGE, "1 MB"},
    };
    int files = open_files();
    (void)state;

    for (size_t i = 0; i < COUNT(cases); i++) {
        struct source source = {cases[i].sent, 0};
        struct request request = request_of(&source, cases[i].length, "");
        struct config config = config_of(cases[i].max, unset);
        struct upload upload;
        struct err err = {0};
        enum err_code code = upload_open(&upload, &request, &config, NULL, 0, &err);
        if (code != cases[i].code || err.code != code ||
            strstr(err.message, cases[i].words) == NULL)
            fail_msg("%s: %s: %s", cases[i].what, err_info(code)->name, err.message);
        if (source.at != source.size)
            fail_msg("%s: not drained", cases[i].what);
        upload_close(&upload);
    }
    assert_int_equal(open_files(), files);
    assert_int_equal(entries(spool), 0);
}

static void test_up_to_the_limit(void **state)
{
    struct source source = {1000, 0};
    struct request request = request_of(&source, 1000, "");
    struct config config = config_of(1000, unset);
    struct upload upload;
    struct err err;
    (void)state;

    assert_int_equal(upload_open(&upload, &request, &config, NULL, 0, &err), ERR_NONE);
    upload_close(&upload);
}

/* ---- by path ---- */

/* Opens the body file called path, which is below the test's directory unless it begins with "/". */
static enum err_code open_body(const char *path, int64_t length, int64_t max, char *dir,
                               struct upload *upload, struct err *err)
{
    char whole[256];
    struct source source = {0, 0};
    snprintf(whole, sizeof whole, "%s/%s", directory, path);
    struct request request = request_of(&source, length, path[0] == '/' ? path : whole);
    struct config config = config_of(max, dir);
    *err = (struct err){0};
    return upload_open(upload, &request, &config, NULL, 0, err);
}

static int set_up_bodies(void **state)
{
    char from[256], path[256];
    (void)state;

    write_file("outside", 1000);
    write_file("bodies/0000000001", 1000);
    write_file("bodies/empty", 0);
    make_path(path, sizeof path, "bodies/1");
    assert_int_equal(mkdir(path, 0700), 0);
    write_file("bodies/1/0000000002", 1000);
    make_path(from, sizeof from, "outside");
    make_path(path, sizeof path, "bodies/link-out");
    assert_int_equal(symlink(from, path), 0);
    make_path(path, sizeof path, "bodies/link-in");
    assert_int_equal(symlink("0000000001", path), 0);
    make_path(path, sizeof path, "bodies/link-dir");
    assert_int_equal(symlink("1", path), 0);
    make_path(path, sizeof path, "bodies/pipe");
    assert_int_equal(mkfifo(path, 0600), 0);
    make_path(path, sizeof path, "bodies2");
    assert_int_equal(mkdir(path, 0700), 0);
    write_file("bodies2/0000000003", 1000);
    make_path(path, sizeof path, "bodies/2");
    assert_int_equal(mkdir(path, 0700), 0);
    write_file("bodies/2/0000000003", 1000);
    return 0;
}

static int tear_down_bodies(void **state)
{
    static const char *const made[] = {
        "outside",     "bodies/0000000001",   "bodies/empty",   "bodies/1/0000000002",
        "bodies/1",    "bodies/link-out",     "bodies/link-in", "bodies/link-dir",
        "bodies/pipe", "bodies/2/0000000003", "bodies/2",       "bodies2/0000000003",
        "bodies2"};
    (void)state;

    for (size_t i = 0; i < COUNT(made); i++) {
        char path[256];
        make_path(path, sizeof path, made[i]);
        if (remove(path) != 0)
            return -1;
    }
    return 0;
}

static void test_body_file(void **state)
{
    static const struct {
        const char *path;
        int64_t length;
        enum err_code code;
    } cases[] = {
        {"bodies/0000000001", 1000, ERR_NONE},
        {"bodies/1/0000000002", 1000, ERR_NONE}, /* client_body_temp_path with levels */
        {"bodies//0000000001", 1000, ERR_NONE},
        {"bodies/0000000001", 999, ERR_BAD_REQUEST}, /* not what was announced */
        {"bodies/0000000001", 1001, ERR_BAD_REQUEST},
        {"bodies/0000000001", -1, ERR_BAD_REQUEST},
        {"bodies/empty", 0, ERR_BAD_REQUEST},
        {"outside", 1000, ERR_INTERNAL},
        {"bodies2/0000000003", 1000, ERR_INTERNAL}, /* a name that only begins alike */
        {"bodies/../outside", 1000, ERR_INTERNAL},
        {"bodies/1/../../outside", 1000, ERR_INTERNAL},
        {"bodies/link-out", 1000, ERR_INTERNAL},
        {"bodies/link-in", 1000, ERR_INTERNAL},
        {"bodies/link-dir/0000000002", 1000, ERR_INTERNAL},
        {"bodies/1", 1000, ERR_INTERNAL},
        {"bodies/pipe", 1000, ERR_INTERNAL},
        {"bodies/missing", 1000, ERR_INTERNAL},
        {"bodies", 1000, ERR_INTERNAL},
        {"bodies/", 1000, ERR_INTERNAL},
        {"/etc/passwd", 1000, ERR_INTERNAL},
        {"/dev/zero", 1000, ERR_INTERNAL},
    };
    char with_slashes[80];
    int files = open_files();
    struct upload upload;
    struct err err;
    (void)state;

    snprintf(with_slashes, sizeof with_slashes, "%s//", bodies);
    for (size_t i = 0; i < 2 * COUNT(cases); i++) {
        size_t k = i / 2;
        char *dir = i % 2 == 0 ? bodies : with_slashes;
        enum err_code code = open_body(cases[k].path, cases[k].length, MB, dir, &upload, &err);
        if (code != cases[k].code || err.code != code)
            fail_msg("%s, %lld: %s: %s", cases[k].path, (long long)cases[k].length,
                     err_info(code)->name, err.message);
        if (code == ERR_NONE)
            assert_true(upload.len == 1000 && is_pattern(upload.data, upload.len));
        upload_close(&upload);
    }
    assert_int_equal(open_files(), files);
}

static void test_marks_of_body_file(void **state)
{
    char path[256];
    struct source source = {0, 0};
    struct find_marks marks[2];
    struct upload upload;
    struct err err;
    (void)state;

    write_file("bodies/large", MB);
    make_path(path, sizeof path, "bodies/large");
    struct request request = request_of(&source, MB, path);
    struct config config = config_of(MB, bodies);
    init_marks(marks);
    assert_int_equal(upload_open(&upload, &request, &config, marks, 2, &err), ERR_NONE);
    check_marks(marks, (size_t)MB);
    upload_close(&upload);
    assert_int_equal(remove(path), 0);
}

static void test_body_file_limits(void **state)
{
    struct upload upload;
    struct err err;
    char nowhere[] = "/nonexistent";
    (void)state;

    assert_int_equal(open_body("bodies/0000000001", 1000, 1000, bodies, &upload, &err), ERR_NONE);
    upload_close(&upload);
    assert_int_equal(open_body("bodies/0000000001", 1000, 999, bodies, &upload, &err),
                     ERR_FILE_TOO_LARGE);
    assert_non_null(strstr(err.message, "999 bytes"));
    /* the file's own size counts, whatever was announced */
    assert_int_equal(open_body("bodies/0000000001", 10, 999, bodies, &upload, &err),
                     ERR_FILE_TOO_LARGE);
    assert_int_equal(open_body("bodies/0000000001", 1000, MB, unset, &upload, &err), ERR_INTERNAL);
    assert_non_null(strstr(err.message, "server.body_file_dir is not set"));
    assert_int_equal(open_body("bodies/0000000001", 1000, MB, nowhere, &upload, &err),
                     ERR_INTERNAL);
    upload_close(&upload);
}

/* ---- what is answered ---- */

static void test_problem(void **state)
{
    struct request request = {.id = "0193-id"};
    struct response response;
    (void)state;

    response_init(&response);
    assert_int_equal(response.status, 200);
    assert_string_equal(response.content_type, "application/json");
    response_problem(&response, &request, ERR_TOKEN_EXPIRED, NULL, 0, false);
    assert_int_equal(response.status, 403);
    assert_string_equal(response.content_type, "application/problem+json");
    assert_int_equal(response.retry_after_s, 0);
    assert_string_equal(
        buf_str(&response.body),
        "{\"type\": \"about:blank\", \"title\": \"Forbidden\", \"status\": 403, "
        "\"detail\": \"Your AI token has expired. Please renew your subscription.\", "
        "\"code\": \"token_expired\", \"request_id\": \"0193-id\", "
        "\"retryable\": false, \"spent\": false}");
    response_problem(&response, &request, ERR_UPSTREAM_RATE_LIMITED, "a \"b\"\n\xFF", 26, true);
    assert_int_equal(response.status, 503);
    assert_int_equal(response.retry_after_s, 26);
    assert_string_equal(buf_str(&response.body),
                        "{\"type\": \"about:blank\", \"title\": \"Service Unavailable\", "
                        "\"status\": 503, \"detail\": \"a \\\"b\\\"\\u000a\xEF\xBF\xBD\", "
                        "\"code\": \"upstream_rate_limited\", \"request_id\": \"0193-id\", "
                        "\"retryable\": true, \"spent\": true}");
    response_problem(&response, &request, ERR_OVERLOADED, NULL, 0, false);
    assert_int_equal(response.retry_after_s, err_info(ERR_OVERLOADED)->retry_after_s);
    response_reset(&response);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_stdin),
        cmocka_unit_test(test_marks_of_stdin),
        cmocka_unit_test(test_where_the_spool_is),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_stdin_refused),
        cmocka_unit_test(test_up_to_the_limit),
        cmocka_unit_test_setup_teardown(test_body_file, set_up_bodies, tear_down_bodies),
        cmocka_unit_test(test_marks_of_body_file),
        cmocka_unit_test_setup_teardown(test_body_file_limits, set_up_bodies, tear_down_bodies),
        cmocka_unit_test(test_problem),
    };
    return cmocka_run_group_tests(tests, set_up_all, tear_down_all);
}
