/* fuzz_mssql.c - any rows from SQL Server, and any text on its way there. The first byte chooses what is
 * called; texts of the items follow, each up to a line end, and the rows: how many columns, and for each
 * its type and value. */
#include <json.h>
#include <stdlib.h>
#include <string.h>

#include "log.h"
#include "mssql_double.h"
#include "support.h"
#include "table.h"

#define ITEMS 3
#define COLUMNS_MAX 12
#define ROWS_MAX 64
#define TEXTS_MAX (ITEMS * 8)

/* Texts that live as long as the input. */
static struct {
    char *all[TEXTS_MAX];
    size_t count;
} texts;

static const char *text(struct fuzz_input *input)
{
    CHECK(texts.count < TEXTS_MAX);
    return texts.all[texts.count++] = fuzz_text(input, '\n');
}

static void take_texts(struct fuzz_input *input, const char **into, size_t count)
{
    for (size_t i = 0; i < count; i++)
        into[i] = text(input);
}

static void free_texts(void)
{
    while (texts.count > 0)
        free(texts.all[--texts.count]);
}

/* ---- rows ---- */

static struct store_value value(struct fuzz_input *input, char **owned)
{
    switch (fuzz_byte(input) % 5) {
    case 0:
        return (struct store_value){.type = STORE_NULL};
    case 1:
        return (struct store_value){.type = STORE_INTEGER, .integer = (int8_t)fuzz_byte(input)};
    case 2:
        return (struct store_value){.type = STORE_INTEGER, .integer = fuzz_int64(input)};
    case 3:
        return (struct store_value){.type = STORE_REAL, .real = (double)fuzz_int64(input) / 256};
    default:
        *owned = fuzz_text(input, '\n');
        return (struct store_value){.type = STORE_TEXT, .text = *owned};
    }
}

static void answer_rows(void *context, const struct mssql_call *call, struct json_object *items)
{
    static const char *const names[COLUMNS_MAX] = {"i",       "Code",         "Message",   "Grant",
                                                   "TokenID", "ApiKey",       "CompanyID", "H",
                                                   "I\"\x1B", "\xE2\x80\xA8", "K",         "L"};
    struct fuzz_input *input = context;
    size_t columns = 0;
    bool more = call->row != NULL;

    (void)items;
    for (int row = 0; more && row < ROWS_MAX && input->left > 0; row++) {
        struct store_value values[COLUMNS_MAX];
        char *owned[COLUMNS_MAX] = {NULL};
        size_t count = fuzz_byte(input) % (COLUMNS_MAX + 1);
        if (row == 0 || !call->row_once) /* one result has rows of one width */
            columns = count;
        for (size_t i = 0; i < columns; i++)
            values[i] = value(input, &owned[i]);
        more = call->row(call->context, columns, names, values);
        for (size_t i = 0; i < columns; i++)
            free(owned[i]);
    }
}

/* ---- what is called ---- */

static void fuzz_acquire(struct fuzz_input *input)
{
    static const struct store_exclusion excluded[] = {{7, false}, {INT64_MAX, true}};
    struct store_acquire acquires[ITEMS], *items[ITEMS];
    struct err err = {.message = ""};

    for (size_t i = 0; i < ITEMS; i++) {
        const char *t[5];
        take_texts(input, t, 5);
        acquires[i] = (struct store_acquire){.request_id = t[0],
                                             .sequence = (int8_t)fuzz_byte(input),
                                             .company_id = t[1],
                                             .branch = t[2],
                                             .requested_by = t[3],
                                             .estimate_tokens = 8000,
                                             .expires_ms = 60000,
                                             .choice = UINT64_MAX,
                                             .excluded = excluded,
                                             .excluded_count = 2,
                                             .previous_token_id = 7,
                                             .previous = {STORE_FAULT_COOLDOWN, 1000, t[4]}};
        items[i] = &acquires[i];
    }
    enum err_code code = mssql_acquire(NULL, items, ITEMS, &err);
    for (size_t i = 0; i < ITEMS; i++) {
        const struct store_acquire *a = items[i];
        CHECK(code == ERR_NONE || a->code != ERR_NONE);
        CHECK(memchr(a->api_key, '\0', sizeof a->api_key) != NULL);
        CHECK(memchr(a->company_id_stored, '\0', sizeof a->company_id_stored) != NULL);
        CHECK(a->code == ERR_NONE || (a->token_id == 0 && a->api_key[0] == '\0'));
        CHECK(a->grant <= GRANT_DUPLICATE);
        CHECK(a->code != ERR_NONE || a->grant != GRANT_TOKEN || a->token_id == 0 ||
              a->api_key[0] != '\0');
    }
}

static void fuzz_settle(struct fuzz_input *input)
{
    struct store_settlement settlements[ITEMS], *items[ITEMS];
    struct err err = {.message = ""};

    for (size_t i = 0; i < ITEMS; i++) {
        const char *t[8];
        take_texts(input, t, 8);
        int64_t token_id = fuzz_byte(input), tokens = fuzz_int64(input);
        settlements[i] =
            (struct store_settlement){.request_id = t[0],
                                      .token_id = token_id,
                                      .company_id = t[1],
                                      .branch = t[2],
                                      .requested_by = t[3],
                                      .client_key_id = t[4],
                                      .trace_id = t[7],
                                      .token_source = token_id != 0 ? "store" : "fallback",
                                      .model = t[5],
                                      .usage = {.total_tokens = tokens},
                                      .request_count = 1,
                                      .logged_ms = fuzz_int64(input),
                                      .fault = {STORE_FAULT_EXCEED, 0, t[6]}};
        items[i] = &settlements[i];
    }
    enum err_code code = mssql_settle(NULL, items, ITEMS, &err);
    for (size_t i = 0; i < ITEMS; i++)
        CHECK(code == ERR_NONE || items[i]->code != ERR_NONE);
}

static void fuzz_record(struct fuzz_input *input)
{
    struct store_retry_attempt attempt = {.token_id = fuzz_byte(input), .attempt = 1};
    const struct store_retry_attempt *attempts[] = {&attempt};
    const char *t[3];
    struct err err = {.message = ""};

    take_texts(input, t, 3);
    struct log_entry *entry =
        log_entry_new(LOG_ERROR, __FILE__, __LINE__, __func__, t[1], t[0], "%s", t[0]);
    CHECK(entry != NULL);
    attempt.wall_ms = fuzz_int64(input) % INT64_C(253402300799999);
    snprintf(attempt.company_id, sizeof attempt.company_id, "%s", t[2]);
    snprintf(attempt.error_message, sizeof attempt.error_message, "%s", t[0]);
    (void)!store_mssql.record(NULL, &entry, 1, attempts, 1, false, &err);
    free(entry);
}

static void fuzz_client_key(struct fuzz_input *input)
{
    struct store_client_key key = {.id = "left over"};
    struct err err = {.message = ""};

    if (store_mssql.client_key_find(NULL, text(input), &key, &err) != ERR_NONE)
        return;
    CHECK(memchr(key.id, '\0', sizeof key.id) != NULL && key.id[0] != '\0');
    CHECK(memchr(key.company_id, '\0', sizeof key.company_id) != NULL);
    CHECK(key.is_admin || key.company_id[0] != '\0'); /* nobody's key is no administrator's */
}

#define KEYS 4

static void fuzz_token_keys(struct fuzz_input *input)
{
    struct store_token_key keys[KEYS];
    struct err err = {.message = ""};
    size_t count = 99;

    enum err_code code = store_mssql.token_keys(NULL, 0, keys, KEYS, &count, &err);
    (void)input;
    CHECK(code == ERR_NONE ? count <= KEYS : count == 0);
    for (size_t i = 0; i < count; i++)
        CHECK(memchr(keys[i].api_key, '\0', sizeof keys[i].api_key) != NULL);
}

/* What a view has goes to a terminal. */
static void fuzz_query(struct fuzz_input *input)
{
    const struct store_filter filter = {.company_id = text(input)};
    struct err err = {.message = ""};
    struct table *table = table_new();
    char *printed = NULL;
    size_t len;

    CHECK(table != NULL);
    (void)!store_mssql.query(NULL, VIEW_TOKENS, &filter, table_row, table, &err);
    FILE *out = open_memstream(&printed, &len);
    CHECK(out != NULL && table_print(table, NULL, NULL, out) && fclose(out) == 0);
    for (char *line = printed, *end; (end = strchr(line, '\n')) != NULL; line = end + 1) {
        *end = '\0';
        CHECK(fuzz_is_line(line));
    }
    free(printed);
    out = open_memstream(&printed, &len);
    CHECK(out != NULL && table_print_json(table, out) && fclose(out) == 0);
    json_object_put(fuzz_parse_own(printed, len));
    free(printed);
    table_free(table);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static void (*const calls[])(struct fuzz_input *) = {
        fuzz_acquire, fuzz_settle, fuzz_record, fuzz_query, fuzz_client_key, fuzz_token_keys};
    static const enum err_code codes[] = {ERR_NONE, ERR_STORE_UNAVAILABLE, ERR_BAD_VALUE};
    struct fuzz_input input = {data, size};
    uint8_t mode = fuzz_byte(&input);
    struct mssql_double sql_server = {
        .answer = answer_rows, .context = &input, .code = codes[mode / 8 % 3]};

    fuzz_check_log();
    mssql_double_use(&sql_server);
    calls[mode % 8 % (sizeof calls / sizeof *calls)](&input);
    CHECK(sql_server.calls <= 1 || mode % 8 == 5); /* keys come in pages */
    free_texts();
    return 0;
}
