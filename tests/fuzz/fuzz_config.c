/* fuzz_config.c - any bytes as a configuration file; behind a byte 1E, variables of the environment, each up
 * to the next one. What is accepted must be within its bounds, and what --check-config prints of it must
 * be a configuration that means the same. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "config.h"
#include "log.h"
#include "support.h"

#define VARIABLES_MAX 32
#define SEPARATOR 0x1E

static void check_values(const struct config *c)
{
    CHECK(c->server.threads >= 1 && c->server.threads <= 1024);
    CHECK(c->server.queue >= 1 && c->server.queue <= 65536);
    CHECK(c->server.queue_wait_ms >= 10 && c->server.deadline_ms >= 1000);
    CHECK(c->server.company_share > 0 && c->server.company_share <= 1);
    CHECK(c->server.max_upload >= 1024 && c->server.max_upload <= 1 << 30);
    CHECK(c->retry.initial_delay_ms >= 0 && c->retry.initial_delay_ms <= c->retry.max_delay_ms);
    CHECK(c->retry.backoff_multiplier >= 1 && c->retry.backoff_multiplier <= 100);
    CHECK(c->gemini.reserve_tokens >= 0 && c->gemini.max_output_tokens >= 0);
    CHECK(strncmp(c->gemini.base_url, "https://", 8) == 0 ||
          strncmp(c->gemini.base_url, "http://", 7) == 0);
    CHECK(c->gemini.base_url[strlen(c->gemini.base_url) - 1] != '/');
    CHECK(c->store.path[0] != '\0');
    CHECK(c->log.level >= LOG_DEBUG && c->log.level <= LOG_CRITICAL);
    CHECK(c->fallback.when == FALLBACK_STORE_UNAVAILABLE ||
          c->fallback.when == FALLBACK_NO_ACTIVE_TOKEN);
    CHECK(c->store.driver == DRIVER_SQLITE || c->store.database[0] != '\0' ||
          c->store.connection_file[0] != '\0');
}

/* Without the lines that say where a value came from. The caller's, to free(). */
static char *print(const struct config *config)
{
    char *text = NULL, *out;
    size_t len = 0;
    FILE *f = open_memstream(&text, &len);

    CHECK(f != NULL);
    config_print(config, f);
    CHECK(fclose(f) == 0);
    out = text;
    for (char *line = text; line < text + len;) {
        char *end = strchr(line, '\n');
        size_t n = (size_t)(end + 1 - line);
        CHECK(end != NULL);
        if (*line != '#') {
            memmove(out, line, n);
            out += n;
        }
        line += n;
    }
    *out = '\0';
    return text;
}

/* The proxy's password must not be printed with it. */
static void check_masked(const struct config *config, const char *printed)
{
    const char *proxy = config->gemini.proxy, *at = strchr(proxy, '@');
    const char *line = strstr(printed, "\nproxy = ");
    const char *colon =
        at == NULL ? NULL : memchr(strchr(proxy, '/'), ':', (size_t)(at - strchr(proxy, '/')));

    CHECK(line != NULL);
    if (colon == NULL)
        return;
    char *shown = strndup(line + 1, strcspn(line + 1, "\n"));
    char *password = strndup(colon, (size_t)(at + 1 - colon)); /* ":secret@" */
    CHECK(shown != NULL && password != NULL);
    CHECK(strstr(shown, ":***@") != NULL);
    CHECK(strcmp(password, ":***@") == 0 || strstr(shown, password) == NULL);
    free(password);
    free(shown);
}

static void check_printed(const struct config *config)
{
    char *nothing[] = {NULL};
    struct err err = {.message = ""};
    char *printed = print(config);

    CHECK(fuzz_is_utf8(printed, strlen(printed)));
    check_masked(config, printed);
    environ = nothing;
    struct config *again = config_load(fuzz_file(1, printed, strlen(printed)), &err);
    if (again == NULL)
        fuzz_fail(err.message, __FILE__, __LINE__, __func__);
    char *printed_again = print(again);
    CHECK(strcmp(printed, printed_again) == 0);
    CHECK(config->server.queue_wait_ms == again->server.queue_wait_ms &&
          config->server.deadline_ms == again->server.deadline_ms &&
          config->retry.initial_delay_ms == again->retry.initial_delay_ms &&
          config->auth.offline_grace_ms == again->auth.offline_grace_ms &&
          config->server.max_upload == again->server.max_upload);
    free(printed_again);
    config_free(again);
    free(printed);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char **before = environ, *variables[VARIABLES_MAX + 1] = {NULL};
    struct fuzz_input input = {data, size};
    struct err err = {.message = ""};
    size_t count = 0;

    const uint8_t *end = size > 0 ? memchr(data, SEPARATOR, size) : NULL;
    size_t file_size = end == NULL ? size : (size_t)(end - data);
    const char *path = fuzz_file(0, data, file_size);
    free(fuzz_text(&input, SEPARATOR));
    while (input.left > 0 && count < VARIABLES_MAX)
        variables[count++] = fuzz_text(&input, SEPARATOR);
    environ = variables;
    struct config *config = config_load(path, &err);
    if (config != NULL) {
        check_values(config);
        check_printed(config);
    } else {
        CHECK(err.code == ERR_CONFIG && err.message[0] != '\0');
    }
    environ = before;
    config_free(config);
    for (size_t i = 0; i < count; i++)
        free(variables[i]);
    return 0;
}
