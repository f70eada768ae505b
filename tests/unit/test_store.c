/* test_store.c - what every driver of the store promises (store.h, store_driver.h).
 *
 * The tests speak to a driver through its interface, and look at the rows with plain SQL through
 * struct backend (store_backend.h): each driver passes the same suite, the second over a live server
 * named by the environment, or over tests/tds_server. What only the embedded store promises (files,
 * locks), and what only the other does (a network, a server that fails), stands at the end. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sqlite3.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "embed.h"
#include "store_backend.h"
#include "store_sqlite.h"

/* ---- helpers ---- */

static const struct backend *backend;
static const struct store_driver *driver;
static void *store;

static void *open_store(bool migrate, struct err *err)
{
    return driver->open(&fixture.config, migrate, err);
}

static int setup(void **state)
{
    struct err err = {0};
    (void)state;
    driver = backend->driver;
    backend->create();
    store = open_store(false, &err);
    if (store == NULL)
        fail_msg("%s", err.message);
    backend->attach();
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    driver->close(store);
    store = NULL;
    backend->destroy();
    return 0;
}

static int setup_closed(void **state)
{
    (void)state;
    driver = backend->driver;
    backend->create();
    return 0;
}

static int teardown_closed(void **state)
{
    (void)state;
    backend->destroy();
    return 0;
}

static void sql(const char *format, ...) PRINTF_LIKE(1, 2);
static void sql(const char *format, ...)
{
    char text[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    backend->exec(text);
}

/* The rows must say so: a query, and its first row as text. */
static void expect(const char *expected, const char *format, ...) PRINTF_LIKE(2, 3);
static void expect(const char *expected, const char *format, ...)
{
    char text[2048];
    char value[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    backend->row(text, value, sizeof value);
    if (strcmp(expected, value) != 0)
        fail_msg("%s: expected %s, found %s", text, expected, value);
}

static int64_t number(const char *text)
{
    char value[64];
    backend->row(text, value, sizeof value);
    return strtoll(value, NULL, 10);
}

static int64_t add_token(const char *company, int64_t limit)
{
    static int n;
    char key[64];
    struct err err = {0};
    int64_t id = 0;
    snprintf(key, sizeof key, "AIza-test-key-%06d", ++n);
    struct store_new_token token = {.company_id = company, .api_key = key, .limit = limit};
    if (driver->token_add(store, "tester", &token, &id, &err) != ERR_NONE)
        fail_msg("token_add: %s", err.message);
    assert_true(id > 0);
    return id;
}

static struct store_acquire an_acquire(const char *request_id, const char *company)
{
    return (struct store_acquire){.request_id = request_id,
                                  .sequence = 1,
                                  .company_id = company,
                                  .branch = "Köln",
                                  .requested_by = "jürgen",
                                  .estimate_tokens = 100,
                                  .expires_ms = 60000};
}

static enum store_grant acquire(struct store_acquire *a)
{
    struct err err = {0};
    if (driver->acquire(store, &a, 1, &err) != ERR_NONE)
        fail_msg("acquire: %s", err.message);
    if (a->code != ERR_NONE)
        fail_msg("acquire of one: %s", a->err.message);
    return a->grant;
}

static enum store_grant acquire_chosen(const char *company, uint64_t choice,
                                       struct store_acquire *a)
{
    static char id[UUID_TEXT_SIZE];
    uuid_v7(id);
    *a = an_acquire(id, company);
    a->choice = choice;
    return acquire(a);
}

static enum store_grant acquire_new(const char *company, struct store_acquire *a)
{
    return acquire_chosen(company, 0, a);
}

static struct store_settlement a_settlement(const char *request_id, int64_t token_id, int64_t total)
{
    return (struct store_settlement){.request_id = request_id,
                                     .token_id = token_id,
                                     .company_id = "NT047",
                                     .branch = "Köln",
                                     .requested_by = "jürgen",
                                     .client_key_id = "ck1",
                                     .token_source = token_id == 0 ? "fallback" : "store",
                                     .model = "gemini-3.5-flash",
                                     .usage = {.input_tokens = 11,
                                               .output_tokens = 12,
                                               .text_prompt_tokens = 13,
                                               .image_prompt_tokens = 14,
                                               .text_candidates_tokens = 15,
                                               .thoughts_tokens = 16,
                                               .cached_tokens = 17,
                                               .total_tokens = total},
                                     .request_count = 2,
                                     .duration_ms = 1234,
                                     .logged_ms = INT64_C(1795349601123)};
}

static void settle(struct store_settlement *s)
{
    struct err err = {0};
    if (driver->settle(store, &s, 1, &err) != ERR_NONE)
        fail_msg("settle: %s", err.message);
    if (s->code != ERR_NONE)
        fail_msg("settle of one: %s", s->err.message);
}

/* What must always be true. */
static void expect_sums(void)
{
    expect("0", "SELECT COUNT(*) FROM TokenUsageSummary s WHERE s.TotalUsedTokens <> "
                "(SELECT COALESCE(SUM(TotalTokensUsed), 0) FROM TokenUsageLogs u "
                " WHERE u.TokenID = s.TokenID) + "
                "(SELECT COALESCE(SUM(TotalTokensUsed), 0) FROM TokenUsageMonthly m "
                " WHERE m.TokenID = s.TokenID)");
    expect("0", "SELECT COUNT(*) FROM TokenUsageSummary s WHERE s.ReservedTokens <> "
                "(SELECT COALESCE(SUM(EstimatedTokens), 0) FROM TokenReservations r "
                " WHERE r.TokenID = s.TokenID AND r.State = 'open')");
    expect("0", "SELECT COUNT(*) FROM TokenUsageSummary s "
                "JOIN TokenMaster t ON t.TokenID = s.TokenID "
                "WHERE t.TotalTokenLimit IS NOT NULL "
                "AND s.TotalRemainingTokens <> t.TotalTokenLimit - s.TotalUsedTokens");
    expect("0", "SELECT COUNT(*) FROM TokenUsageSummary s "
                "JOIN TokenMaster t ON t.TokenID = s.TokenID "
                "WHERE t.TotalTokenLimit IS NULL AND s.TotalRemainingTokens IS NOT NULL");
}

/* SQL: 1 where the column is not NULL, else 0. */
#define A_DAY_MS INT64_C(86400000) /* the contract's, whatever the program says */
#define IS_SET(column) "CASE WHEN " column " IS NULL THEN 0 ELSE 1 END"
#define ID(n) "01900000-0000-7000-8000-00000000000" #n
#define TRACE "4bf92f3577b34da6a3ce929d0e0e4736"

/* ---- acquire: who gets a token ---- */

static void grants_a_token_and_reserves(void **state)
{
    (void)state;
    add_token("NT047", 1000);
    struct store_acquire a = an_acquire(ID(1), "nt047");
    char earliest[CLOCK_TEXT_SIZE];
    char latest[CLOCK_TEXT_SIZE];
    char text[64];

    clock_format(clock_wall_ms() + 60000, earliest);
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    clock_format(clock_wall_ms() + 60000, latest);
    assert_int_equal(1, a.token_id);
    assert_string_equal("NT047", a.company_id_stored);
    backend->row("SELECT ApiKey FROM TokenMaster", text, sizeof text);
    assert_string_equal(text, a.api_key);
    expect(ID(1) "|1|1|NT047|Köln|jürgen|100|open|0|store|NULL",
           "SELECT RequestID, Sequence, TokenID, CompanyID, Branch, RequestedBy, EstimatedTokens,"
           " State, UnknownCalls, TokenSource, ClosedAt FROM TokenReservations");
    assert_int_equal(getpid(), number("SELECT ProcessID FROM TokenReservations"));
    expect(log_host(), "SELECT Host FROM TokenReservations");
    backend->row("SELECT ExpiresAt FROM TokenReservations", text, sizeof text);
    assert_true(strcmp(earliest, text) <= 0 && strcmp(text, latest) <= 0);
    expect("100|0", "SELECT ReservedTokens, TotalUsedTokens FROM TokenUsageSummary");
    expect_sums();
}

static void grants_again_without_reserving_twice(void **state)
{
    (void)state;
    for (int i = 0; i < 3; i++)
        add_token("NT047", 1000);
    struct store_acquire a = an_acquire(ID(1), "NT047");
    a.choice = 1;
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    assert_int_equal(2, a.token_id);
    char key[STORE_API_KEY_SIZE];
    memcpy(key, a.api_key, sizeof key);

    a.choice = 0;
    a.previous_token_id = 2;
    a.previous.fault = STORE_FAULT_DISABLE;
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    assert_int_equal(2, a.token_id);
    assert_string_equal(key, a.api_key);
    assert_string_equal("NT047", a.company_id_stored);
    expect("1", "SELECT COUNT(*) FROM TokenReservations");
    expect("100", "SELECT SUM(ReservedTokens) FROM TokenUsageSummary");
    expect("Active", "SELECT Status FROM TokenMaster WHERE TokenID = 2");

    a = an_acquire(ID(1), "NT047");
    a.sequence = 2;
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    expect("2", "SELECT COUNT(*) FROM TokenReservations");
}

static void knows_rows_written_by_hand(void **state)
{
    (void)state;
    struct store_acquire a;
    sql("INSERT INTO TokenMaster (CompanyID, ApiKey) VALUES ('Hand', 'key-by-hand')");
    expect("Active|NULL|NULL", "SELECT Status, TotalTokenLimit, CooldownUntil FROM TokenMaster");
    assert_int_equal(GRANT_TOKEN, acquire_new("HAND", &a));
    assert_string_equal("key-by-hand", a.api_key);
    assert_string_equal("Hand", a.company_id_stored);

    sql("INSERT INTO TokenMaster (CompanyID, ApiKey, Status) VALUES ('Odd', '', 'Active')");
    assert_int_equal(GRANT_UNAVAILABLE, acquire_new("Odd", &a));
}

/* Pasted through plain SQL, with what clings to a key in a clipboard. */
static void a_pasted_key_is_trimmed(void **state)
{
    (void)state;
    static const char *const unusable[] = {
        "", " ", "\r\n", "two words", "two\nlines", "schl\xC3\xBCssel", "key\x7Fkey", "\x01",
    };
    static const char *const pasted[] = {
        "AIza-pasted\n",
        "AIza-pasted\r\n",
        " AIza-pasted",
        "\t\nAIza-pasted \x01\x7F",
    };
    struct store_acquire a;
    sql("INSERT INTO TokenMaster (CompanyID, ApiKey) VALUES ('NT047', '')");
    for (size_t i = 0; i < sizeof pasted / sizeof pasted[0]; i++) {
        sql("UPDATE TokenMaster SET ApiKey = '%s' WHERE TokenID = 1", pasted[i]);
        assert_int_equal(GRANT_TOKEN, acquire_new("NT047", &a));
        assert_string_equal("AIza-pasted", a.api_key);
        assert_int_equal(GRANT_TOKEN, acquire(&a)); /* the repeat of a lost answer */
        assert_string_equal("AIza-pasted", a.api_key);
    }
    for (size_t i = 0; i < sizeof unusable / sizeof unusable[0]; i++) {
        sql("UPDATE TokenMaster SET ApiKey = '%s' WHERE TokenID = 1", unusable[i]);
        assert_int_equal(GRANT_UNAVAILABLE, acquire_new("NT047", &a));
    }
    backend->widen_keys();
    sql("UPDATE TokenMaster SET ApiKey = '%01025d'", 7);
    assert_int_equal(GRANT_UNAVAILABLE, acquire_new("NT047", &a));
    sql("UPDATE TokenMaster SET ApiKey = '%01024d\r\n'", 7);
    assert_int_equal(GRANT_TOKEN, acquire_new("NT047", &a));
    assert_int_equal(1024, strlen(a.api_key));
    /* another that can serve does */
    sql("UPDATE TokenMaster SET ApiKey = 'two words' WHERE TokenID = 1");
    sql("INSERT INTO TokenMaster (CompanyID, ApiKey) VALUES ('NT047', 'the-good-one\n')");
    for (int i = 0; i < 4; i++) {
        a.choice = (uint64_t)i;
        assert_int_equal(GRANT_TOKEN, acquire_new("NT047", &a));
        assert_string_equal("the-good-one", a.api_key);
    }
    /* one that was granted and spoilt since: the repeat has no key to give */
    sql("UPDATE TokenMaster SET ApiKey = 'two words'");
    struct store_acquire *again = &a;
    struct err err = {0};
    assert_int_equal(ERR_NONE, driver->acquire(store, &again, 1, &err));
    assert_int_equal(ERR_BAD_VALUE, a.code);
    assert_string_equal("", a.api_key);
    expect_sums();
}

static void compares_companies_without_case(void **state)
{
    (void)state;
    struct store_acquire a;
    add_token("Müller GmbH", -1);
    add_token("ΟΔΟΣ", -1);
    assert_int_equal(GRANT_TOKEN, acquire_new("MÜLLER gmbh", &a));
    assert_string_equal("Müller GmbH", a.company_id_stored);
    expect("Müller GmbH", "SELECT CompanyID FROM TokenReservations");
    assert_int_equal(GRANT_TOKEN, acquire_new("οδος", &a));
    assert_int_equal(2, a.token_id);
    assert_int_equal(GRANT_NO_TOKEN, acquire_new("Muller GmbH", &a));
    assert_int_equal(GRANT_NO_TOKEN, acquire_new("NT047' OR '1'='1", &a));
    sql("UPDATE TokenMaster SET Status = 'Expired'");
    assert_int_equal(GRANT_EXPIRED, acquire_new("mÜLLER GMBH", &a));
    assert_string_equal("Müller GmbH", a.company_id_stored);
}

static void serves_its_provider_only(void **state)
{
    (void)state;
    static const char *const served[] = {"NULL", "''", "'GOOGLE'", "'gemini'"};
    struct store_acquire a;
    for (size_t i = 0; i < 4; i++)
        sql("INSERT INTO TokenMaster (CompanyID, ApiKey, Provider) VALUES ('P%zu', 'key', %s)", i,
            served[i]);
    assert_int_equal(GRANT_TOKEN, acquire_new("P0", &a));
    assert_int_equal(GRANT_TOKEN, acquire_new("P1", &a));
    assert_int_equal(GRANT_TOKEN, acquire_new("P2", &a));
    assert_int_equal(GRANT_TOKEN, acquire_new("P3", &a));
    sql("INSERT INTO TokenMaster (CompanyID, ApiKey, Provider) VALUES ('X', 'key', 'OpenAI')");
    a = an_acquire(ID(1), "x");
    a.fallback_if_none = true;
    assert_int_equal(GRANT_NO_TOKEN, acquire(&a));
    assert_string_equal("X", a.company_id_stored);
    /* one that would decide, were its provider ours */
    sql("INSERT INTO TokenMaster (CompanyID, ApiKey, Provider, Status, CreatedAt)"
        " VALUES ('X', 'key', 'Gemini', 'Expired', '2020-01-01 00:00:00')");
    assert_int_equal(GRANT_EXPIRED, acquire_new("x", &a));
}

static void chooses_among_the_usable(void **state)
{
    (void)state;
    struct store_acquire a;
    int64_t ids[4];
    for (int i = 0; i < 4; i++)
        ids[i] = add_token("NT047", -1);
    sql("UPDATE TokenMaster SET Status = 'Disabled' WHERE TokenID = %lld", (long long)ids[1]);
    const int64_t expected[] = {ids[0], ids[2], ids[3], ids[0], ids[2]};
    for (uint64_t choice = 0; choice < 5; choice++) {
        assert_int_equal(GRANT_TOKEN, acquire_chosen("NT047", choice, &a));
        assert_int_equal(expected[choice], a.token_id);
    }
    char id[UUID_TEXT_SIZE];
    uuid_v7(id);
    a = an_acquire(id, "NT047");
    a.choice = UINT64_MAX; /* 2^64 - 1 is a multiple of 3 */
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    assert_int_equal(ids[0], a.token_id);
}

static void the_newest_token_decides_the_message(void **state)
{
    (void)state;
    struct store_acquire a;
    assert_int_equal(GRANT_NO_TOKEN, acquire_new("NT047", &a));
    assert_string_equal("NT047", a.company_id_stored);
    assert_int_equal(0, a.token_id);
    assert_string_equal("", a.api_key);
    sql("INSERT INTO TokenMaster (CompanyID, ApiKey, Status, CreatedAt)"
        " VALUES ('NT047', 'key', 'expired', '2026-03-01 12:00:00')");
    assert_int_equal(GRANT_EXPIRED, acquire_new("NT047", &a));
    /* later on the same day, in the other form: as text it would come first */
    sql("INSERT INTO TokenMaster (CompanyID, ApiKey, Status, CreatedAt)"
        " VALUES ('NT047', 'key', 'DISABLED', '2026-03-01T11:59:59.999Z')");
    assert_int_equal(GRANT_EXPIRED, acquire_new("NT047", &a));
    sql("INSERT INTO TokenMaster (CompanyID, ApiKey, Status, CreatedAt)"
        " VALUES ('NT047', 'key', 'Exceeded', '2026-03-01T12:00:00.000Z')");
    assert_int_equal(GRANT_UNAVAILABLE, acquire_new("NT047", &a));
    sql("UPDATE TokenMaster SET Status = 'who knows' WHERE TokenID = 3");
    assert_int_equal(GRANT_UNAVAILABLE, acquire_new("NT047", &a));
    sql("UPDATE TokenMaster SET Status = 'aCTIVE' WHERE TokenID = 1");
    assert_int_equal(GRANT_TOKEN, acquire_new("NT047", &a));
    assert_int_equal(1, a.token_id);
    expect("1", "SELECT COUNT(*) FROM TokenReservations");
}

/* ---- acquire: room ---- */

static void keeps_to_the_limit(void **state)
{
    (void)state;
    struct store_acquire a;
    int64_t id = add_token("NT047", 250);
    assert_int_equal(GRANT_TOKEN, acquire_new("NT047", &a)); /* 100 */
    assert_int_equal(GRANT_TOKEN, acquire_new("NT047", &a)); /* 200 */
    assert_int_equal(GRANT_BUSY, acquire_new("NT047", &a));
    a = an_acquire(ID(1), "NT047");
    a.estimate_tokens = 50;
    assert_int_equal(GRANT_TOKEN, acquire(&a)); /* 250: exactly */
    expect("250", "SELECT ReservedTokens FROM TokenUsageSummary");

    /* nothing reserved: used < limit is enough, whatever the estimate */
    sql("UPDATE TokenReservations SET State = 'released', ClosedAt = CreatedAt");
    sql("UPDATE TokenUsageSummary SET ReservedTokens = 0");
    struct store_settlement s = a_settlement(ID(2), id, 249);
    settle(&s);
    a = an_acquire(ID(3), "NT047");
    a.estimate_tokens = 1000000;
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    assert_int_equal(GRANT_BUSY, acquire_new("NT047", &a));

    /* used up, although still Active: by hand */
    sql("UPDATE TokenMaster SET TotalTokenLimit = 249");
    assert_int_equal(GRANT_UNAVAILABLE, acquire_new("NT047", &a));
    sql("UPDATE TokenMaster SET TotalTokenLimit = NULL");
    assert_int_equal(GRANT_TOKEN, acquire_new("NT047", &a));
}

static void makes_a_missing_summary(void **state)
{
    (void)state;
    struct store_acquire a;
    sql("INSERT INTO TokenMaster (CompanyID, ApiKey, TotalTokenLimit) VALUES ('NT047', 'key', "
        "1000)");
    sql("INSERT INTO TokenUsageLogs (TokenID, TotalTokensUsed) VALUES (1, 300)");
    sql("INSERT INTO TokenUsageMonthly (TokenID, Month, TotalTokensUsed) VALUES (1, '2026-01', "
        "400)");
    a = an_acquire(ID(1), "NT047");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    expect("700|300|100|0.8",
           "SELECT TotalUsedTokens, TotalRemainingTokens, ReservedTokens, Threshold"
           " FROM TokenUsageSummary");
    expect_sums();
    /* and one that was deleted while reservations are open; settling makes it, too */
    sql("DELETE FROM TokenUsageSummary");
    struct store_settlement s = a_settlement(ID(2), 1, 50);
    settle(&s);
    assert_false(s.threshold_crossed || s.exceeded);
    expect("750|250|100",
           "SELECT TotalUsedTokens, TotalRemainingTokens, ReservedTokens FROM TokenUsageSummary");
    /* and knows then how far the token has come */
    sql("DELETE FROM TokenUsageSummary");
    sql("UPDATE TokenMaster SET TotalTokenLimit = 800");
    s = a_settlement(ID(3), 1, 49);
    settle(&s);
    assert_true(s.threshold_crossed);
    assert_false(s.exceeded);
    expect("799|1|100",
           "SELECT TotalUsedTokens, TotalRemainingTokens, ReservedTokens FROM TokenUsageSummary");
    expect_sums();
    /* what was used counts before the row is there */
    sql("DELETE FROM TokenUsageSummary");
    sql("UPDATE TokenMaster SET TotalTokenLimit = 750");
    assert_int_equal(GRANT_UNAVAILABLE, acquire_new("NT047", &a));
}

/* ---- acquire: cooling, tried, at fault ---- */

static void waits_for_what_cools_or_was_tried(void **state)
{
    (void)state;
    struct store_acquire a;
    int64_t first = add_token("NT047", -1);
    int64_t second = add_token("NT047", -1);
    const struct store_exclusion both_tried[] = {{first, false}, {second, false}};
    const struct store_exclusion both_at_fault[] = {{first, true}, {second, true}};

    a = an_acquire(ID(1), "NT047");
    a.excluded = both_tried;
    a.excluded_count = 1;
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    assert_int_equal(second, a.token_id);

    a = an_acquire(ID(2), "NT047");
    a.excluded = both_tried;
    a.excluded_count = 2;
    assert_int_equal(GRANT_COOLING, acquire(&a));
    assert_int_equal(0, a.first_usable_ms);
    assert_false(a.busy_too);

    a.excluded = both_at_fault;
    assert_int_equal(GRANT_UNAVAILABLE, acquire(&a));
    assert_int_equal(0, a.first_usable_ms);

    /* both cool down: the one that is first usable counts, whichever comes first */
    a = an_acquire(ID(3), "NT047");
    a.excluded = both_at_fault + 1;
    a.excluded_count = 1;
    a.previous_token_id = first;
    a.previous = (struct store_token_fault){STORE_FAULT_COOLDOWN, 30000, "quota"};
    assert_int_equal(GRANT_COOLING, acquire(&a));
    assert_true(a.first_usable_ms > 25000 && a.first_usable_ms <= 30000);
    a = an_acquire(ID(4), "NT047");
    a.previous_token_id = second;
    a.previous = (struct store_token_fault){STORE_FAULT_COOLDOWN, 60000, "quota"};
    assert_int_equal(GRANT_COOLING, acquire(&a));
    assert_true(a.first_usable_ms > 25000 && a.first_usable_ms <= 30000);
    sql("UPDATE TokenMaster SET CooldownUntil = NULL WHERE TokenID = %lld", (long long)second);
    a.previous.cooldown_ms = 10000;
    assert_int_equal(GRANT_COOLING, acquire(&a));
    assert_true(a.first_usable_ms > 5000 && a.first_usable_ms <= 10000);
    assert_false(a.busy_too);

    /* tried, and it cools down: the cooldown is waited for */
    a.previous_token_id = 0;
    a.excluded = both_tried;
    a.excluded_count = 2;
    assert_int_equal(GRANT_COOLING, acquire(&a));
    assert_true(a.first_usable_ms > 5000 && a.first_usable_ms <= 10000);

    /* over: usable again */
    sql("UPDATE TokenMaster SET CooldownUntil = %s WHERE TokenID = 1", backend->a_minute_ago);
    assert_int_equal(GRANT_TOKEN, acquire_new("NT047", &a));
    assert_int_equal(first, a.token_id);
}

static void tells_cooling_from_busy(void **state)
{
    (void)state;
    struct store_acquire a;
    int64_t busy = add_token("NT047", 150);
    assert_int_equal(GRANT_TOKEN, acquire_new("NT047", &a));
    int64_t cooling = add_token("NT047", -1);
    sql("UPDATE TokenMaster SET CooldownUntil = %s WHERE TokenID = %lld", backend->in_an_hour,
        (long long)cooling);
    assert_int_equal(GRANT_COOLING, acquire_new("NT047", &a));
    assert_true(a.first_usable_ms > 3500000 && a.first_usable_ms <= 3600000);
    assert_true(a.busy_too);

    /* tried, but without room: room is what to wait for */
    const struct store_exclusion excluded[] = {{busy, false}, {cooling, true}};
    a = an_acquire(ID(1), "NT047");
    a.excluded = excluded;
    a.excluded_count = 2;
    assert_int_equal(GRANT_BUSY, acquire(&a));

    /* a cooling one that is used up is not waited for */
    sql("UPDATE TokenMaster SET TotalTokenLimit = 0 WHERE TokenID = %lld", (long long)cooling);
    assert_int_equal(GRANT_BUSY, acquire_new("NT047", &a));
}

/* ---- acquire: the token before ---- */

static void a_cooldown_is_never_shortened(void **state)
{
    (void)state;
    char until[64];
    char again[64];
    add_token("NT047", -1);
    struct store_acquire a = an_acquire(ID(1), "NT047");
    a.previous_token_id = 1;
    a.previous = (struct store_token_fault){STORE_FAULT_COOLDOWN, 60000, "429: quota"};
    int64_t before = clock_wall_ms();
    assert_int_equal(GRANT_COOLING, acquire(&a));
    backend->row("SELECT CooldownUntil FROM TokenMaster", until, sizeof until);
    clock_format(before + 60000, again);
    assert_true(strcmp(until, again) >= 0);
    expect("429: quota|Active", "SELECT StatusReason, Status FROM TokenMaster");

    a.previous = (struct store_token_fault){STORE_FAULT_COOLDOWN, 1000, "again"};
    assert_int_equal(GRANT_COOLING, acquire(&a));
    expect(until, "SELECT CooldownUntil FROM TokenMaster");
    expect("0", "SELECT COUNT(*) FROM AuditLog WHERE Action <> 'token added'");
}

static void releases_what_the_token_before_held(void **state)
{
    (void)state;
    int64_t first = add_token("NT047", -1);
    int64_t second = add_token("NT047", -1);
    struct store_acquire a = an_acquire(ID(1), "NT047");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    struct store_acquire other = an_acquire(ID(2), "NT047");
    assert_int_equal(GRANT_TOKEN, acquire(&other));

    a.sequence = 2;
    a.previous_token_id = first;
    a.previous = (struct store_token_fault){STORE_FAULT_COOLDOWN, 60000, NULL};
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    assert_int_equal(second, a.token_id);
    expect("released", "SELECT State FROM TokenReservations WHERE RequestID = '" ID(
                           1) "'"
                              " AND Sequence = 1 AND ClosedAt IS NOT NULL");
    expect("open", "SELECT State FROM TokenReservations WHERE RequestID = '" ID(2) "'");
    expect("100", "SELECT ReservedTokens FROM TokenUsageSummary WHERE TokenID = 1");
    /* what is released already is not released again */
    a.sequence = 12;
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    expect("100|200", "SELECT MIN(ReservedTokens), MAX(ReservedTokens) FROM TokenUsageSummary");
    expect_sums();
    sql("UPDATE TokenReservations SET State = 'released' WHERE Sequence = 12");
    sql("UPDATE TokenUsageSummary SET ReservedTokens = 100");

    /* spent: a settlement will follow */
    a.sequence = 3;
    a.previous_token_id = second;
    a.previous_spent = true;
    assert_int_equal(GRANT_COOLING, acquire(&a));
    expect("open", "SELECT State FROM TokenReservations WHERE TokenID = 2 AND Sequence = 2");
    expect("100", "SELECT ReservedTokens FROM TokenUsageSummary WHERE TokenID = 2");

    /* asked again, not spent: once */
    a.previous_spent = false;
    assert_int_equal(GRANT_COOLING, acquire(&a));
    assert_int_equal(GRANT_COOLING, acquire(&a));
    expect("0", "SELECT ReservedTokens FROM TokenUsageSummary WHERE TokenID = 2");
    expect_sums();
}

static void releases_only_the_last_reservation_of_a_token(void **state)
{
    (void)state;
    int64_t first = add_token("NT047", -1);
    struct store_acquire a = an_acquire(ID(1), "NT047");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    a.sequence = 2;
    a.previous_token_id = first;
    a.previous_spent = true;
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    a.sequence = 3;
    a.previous_spent = false;
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    expect("open", "SELECT State FROM TokenReservations WHERE Sequence = 1");
    expect("released", "SELECT State FROM TokenReservations WHERE Sequence = 2");
    expect_sums();
}

static void disables_a_token_at_fault(void **state)
{
    (void)state;
    int64_t first = add_token("NT047", -1);
    int64_t second = add_token("NT047", -1);
    struct store_acquire a = an_acquire(ID(1), "NT047");
    a.previous_token_id = first;
    a.previous = (struct store_token_fault){STORE_FAULT_DISABLE, 0, "API_KEY_INVALID: no"};
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    assert_int_equal(second, a.token_id);
    assert_false(a.disabling_stopped);
    expect("Disabled|at fault: API_KEY_INVALID: no",
           "SELECT Status, StatusReason FROM TokenMaster WHERE TokenID = 1");
    expect("extract-fcgi|token status changed|TokenMaster|1|NT047|" ID(1),
           "SELECT Actor, Action, ObjectType, ObjectID, CompanyID, RequestID FROM AuditLog"
           " WHERE AuditID = (SELECT MAX(AuditID) FROM AuditLog)");

    struct store_acquire b = an_acquire(ID(2), "NT047");
    b.previous_token_id = second;
    b.previous = (struct store_token_fault){STORE_FAULT_EXCEED, 0, "402: credit used up"};
    assert_int_equal(GRANT_UNAVAILABLE, acquire(&b));
    expect("Exceeded|402: credit used up",
           "SELECT Status, StatusReason FROM TokenMaster WHERE TokenID = 2");

    /* only an Active token loses its status, and keeps the reason; nothing more is audited */
    b.previous_token_id = first;
    assert_int_equal(GRANT_UNAVAILABLE, acquire(&b));
    b.previous_token_id = second;
    b.previous.fault = STORE_FAULT_DISABLE;
    assert_int_equal(GRANT_UNAVAILABLE, acquire(&b));
    b.previous_token_id = first;
    b.previous = (struct store_token_fault){STORE_FAULT_COOLDOWN, 1000, "late"};
    assert_int_equal(GRANT_UNAVAILABLE, acquire(&b));
    expect("Disabled|at fault: API_KEY_INVALID: no",
           "SELECT Status, StatusReason FROM TokenMaster WHERE TokenID = 1");
    expect("Exceeded|402: credit used up",
           "SELECT Status, StatusReason FROM TokenMaster WHERE TokenID = 2");
    expect("2", "SELECT COUNT(*) FROM AuditLog WHERE Actor = 'extract-fcgi'");
}

static void a_long_reason_is_cut_between_characters(void **state)
{
    (void)state;
    char reason[3000];
    add_token("NT047", -1);
    memset(reason, 'x', sizeof reason);
    reason[sizeof reason - 1] = '\0';
    memcpy(reason + 799, "é", 2); /* its second byte is the first too many */
    struct store_acquire a = an_acquire(ID(1), "NT047");
    a.previous_token_id = 1;
    a.previous = (struct store_token_fault){STORE_FAULT_COOLDOWN, 1000, reason};
    assert_int_equal(GRANT_COOLING, acquire(&a));
    char stored[2048];
    backend->row("SELECT StatusReason FROM TokenMaster", stored, sizeof stored);
    assert_int_equal(799, strlen(stored));
}

static enum store_grant fail_token(int64_t token_id, const char *company, bool *stopped)
{
    char id[UUID_TEXT_SIZE];
    uuid_v7(id);
    struct store_acquire a = an_acquire(id, company);
    a.previous_token_id = token_id;
    a.previous = (struct store_token_fault){STORE_FAULT_DISABLE, 0, "bad key"};
    enum store_grant grant = acquire(&a);
    *stopped = a.disabling_stopped;
    return grant;
}

static void disabling_stops_at_three_companies_in_a_minute(void **state)
{
    (void)state;
    bool stopped = true;
    int64_t a1 = add_token("A", -1);
    int64_t a2 = add_token("a", -1);
    int64_t a3 = add_token("A", -1);
    int64_t b1 = add_token("B", -1);
    int64_t c1 = add_token("C", -1);
    int64_t d1 = add_token("D", -1);

    /* three tokens of one company, however spelled, are one company */
    fail_token(a1, "A", &stopped);
    fail_token(a2, "A", &stopped);
    assert_int_equal(GRANT_UNAVAILABLE, fail_token(a3, "A", &stopped));
    assert_int_equal(GRANT_UNAVAILABLE, fail_token(b1, "B", &stopped));
    assert_false(stopped);
    expect("4", "SELECT COUNT(*) FROM TokenMaster WHERE Status = 'Disabled'");

    /* one that is not Active is left alone */
    sql("UPDATE TokenMaster SET Status = 'Disabled' WHERE CompanyID = 'C'");
    assert_int_equal(GRANT_UNAVAILABLE, fail_token(c1, "C", &stopped));
    assert_false(stopped);
    expect("NULL", "SELECT CooldownUntil FROM TokenMaster WHERE CompanyID = 'C'");
    sql("UPDATE TokenMaster SET Status = 'Active' WHERE CompanyID = 'C'");

    assert_int_equal(GRANT_COOLING, fail_token(c1, "C", &stopped));
    assert_true(stopped);
    expect("Active|at fault: bad key (not disabled: tokens of several companies at fault within a "
           "minute)",
           "SELECT Status, StatusReason FROM TokenMaster WHERE CompanyID = 'C'");
    char until[64];
    char expected[CLOCK_TEXT_SIZE];
    backend->row("SELECT CooldownUntil FROM TokenMaster WHERE CompanyID = 'C'", until,
                 sizeof until);
    clock_format(clock_wall_ms() + 595000, expected);
    assert_true(strcmp(until, expected) > 0);

    /* said once */
    assert_int_equal(GRANT_COOLING, fail_token(d1, "D", &stopped));
    assert_false(stopped);
    expect("1", "SELECT COUNT(*) FROM AuditLog WHERE Action = 'disabling stopped'");

    /* a minute later: again */
    sql("UPDATE TokenMaster SET UpdatedAt = %s", backend->a_minute_ago);
    sql("UPDATE AuditLog SET Timestamp = %s", backend->a_minute_ago);
    assert_int_equal(GRANT_UNAVAILABLE, fail_token(d1, "D", &stopped));
    expect("Disabled", "SELECT Status FROM TokenMaster WHERE CompanyID = 'D'");
    sql("UPDATE TokenMaster SET UpdatedAt = (SELECT MAX(UpdatedAt) FROM TokenMaster)");
    assert_int_equal(GRANT_COOLING, fail_token(c1, "C", &stopped));
    assert_true(stopped);
}

/* ---- acquire: the fallback key ---- */

static void falls_back_for_known_companies_only(void **state)
{
    (void)state;
    struct store_acquire a = an_acquire(ID(1), "nt047");
    a.fallback_if_none = true;
    assert_int_equal(GRANT_NO_TOKEN, acquire(&a));
    add_token("NT047", -1);
    sql("UPDATE TokenMaster SET Status = 'Expired'");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    assert_int_equal(0, a.token_id);
    assert_string_equal("", a.api_key);
    assert_string_equal("NT047", a.company_id_stored);
    expect("NULL|NT047|open|fallback",
           "SELECT TokenID, CompanyID, State, TokenSource FROM TokenReservations");
    /* again */
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    assert_int_equal(0, a.token_id);
    assert_string_equal("NT047", a.company_id_stored);
    expect("1", "SELECT COUNT(*) FROM TokenReservations");

    sql("UPDATE TokenMaster SET Status = 'Disabled'");
    a = an_acquire(ID(2), "NT047");
    a.fallback_if_none = true;
    assert_int_equal(GRANT_TOKEN, acquire(&a));

    /* an Active token that cannot serve now is no want of one */
    sql("UPDATE TokenMaster SET Status = 'Active', CooldownUntil = %s", backend->in_an_hour);
    a = an_acquire(ID(3), "NT047");
    a.fallback_if_none = true;
    assert_int_equal(GRANT_COOLING, acquire(&a));
}

static void reserves_for_the_fallback_key_alone(void **state)
{
    (void)state;
    add_token("NT047", -1);
    struct store_acquire a = an_acquire(ID(1), "nt047");
    a.fallback_only = true;
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    assert_int_equal(0, a.token_id);
    assert_string_equal("NT047", a.company_id_stored);
    a = an_acquire(ID(2), "Nobody");
    a.fallback_only = true;
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    expect("Nobody|NULL|fallback", "SELECT CompanyID, TokenID, TokenSource FROM TokenReservations"
                                   " WHERE RequestID = '" ID(2) "'");
    expect("0", "SELECT SUM(ReservedTokens) FROM TokenUsageSummary");
}

/* ---- batches ---- */

static void a_bad_acquire_fails_alone(void **state)
{
    (void)state;
    char long_text[300];
    struct store_acquire items[9];
    struct store_acquire *pointers[9];
    struct err err = {0};
    static const char *const ids[] = {ID(1), ID(2), ID(3), ID(4), ID(5),
                                      ID(6), ID(7), ID(8), ID(9)};

    memset(long_text, 'x', sizeof long_text);
    long_text[sizeof long_text - 1] = '\0';
    add_token("NT047", -1);
    for (size_t i = 0; i < 9; i++) {
        items[i] = an_acquire(ids[i], "NT047");
        pointers[i] = &items[i];
    }
    items[0].company_id = "";
    items[1].company_id = long_text;
    items[2].estimate_tokens = -1;
    items[3].branch = long_text;
    items[4].sequence = 0;
    items[5].request_id = "";
    items[6].previous = (struct store_token_fault){STORE_FAULT_COOLDOWN, -1, NULL};
    items[7].expires_ms = -1;
    assert_int_equal(ERR_NONE, driver->acquire(store, pointers, 9, &err));
    for (size_t i = 0; i < 8; i++) {
        assert_int_equal(ERR_BAD_VALUE, items[i].code);
        assert_int_equal(ERR_BAD_VALUE, items[i].err.code);
        assert_true(items[i].err.message[0] != '\0');
        assert_null(strstr(items[i].err.message, "xxx"));
        assert_string_equal("", items[i].api_key);
    }
    assert_int_equal(ERR_NONE, items[8].code);
    assert_int_equal(GRANT_TOKEN, items[8].grant);
    expect("1", "SELECT COUNT(*) FROM TokenReservations");
}

static void a_batch_sees_itself(void **state)
{
    (void)state;
    struct store_acquire items[4];
    struct store_acquire *pointers[4];
    struct err err = {0};
    static const char *const ids[] = {ID(1), ID(2), ID(3), ID(1)};

    add_token("NT047", 250);
    for (size_t i = 0; i < 4; i++) {
        items[i] = an_acquire(ids[i], "NT047");
        pointers[i] = &items[i];
    }
    assert_int_equal(ERR_NONE, driver->acquire(store, pointers, 4, &err));
    assert_int_equal(GRANT_TOKEN, items[0].grant);
    assert_int_equal(GRANT_TOKEN, items[1].grant);
    assert_int_equal(GRANT_BUSY, items[2].grant);
    assert_int_equal(GRANT_TOKEN, items[3].grant); /* the first again */
    expect("2", "SELECT COUNT(*) FROM TokenReservations");
    expect_sums();
}

/* What most batches are: nothing in them has to see what is before it. As good as one by one. */
static void an_ordinary_batch(void **state)
{
    (void)state;
    enum { COUNT_OF_ALL = 8 };
    static const char *const ids[] = {ID(1), ID(2), ID(3), ID(4), ID(5), ID(6), ID(7), ID(8)};
    struct store_acquire acquires[COUNT_OF_ALL], *asked[COUNT_OF_ALL];
    struct store_settlement settlements[COUNT_OF_ALL], *told[COUNT_OF_ALL];
    struct store_acquire a;
    struct err err = {0};
    add_token("NT047", -1);
    add_token("NT047", 1000000);
    add_token("NT048", -1);
    for (uint64_t i = 0; i < 2; i++)
        assert_int_equal(GRANT_TOKEN, acquire_chosen("NT047", i, &a));
    assert_int_equal(GRANT_TOKEN, acquire_new("NT048", &a));

    for (int again = 0; again < 2; again++) {
        for (size_t i = 0; i < COUNT_OF_ALL; i++) {
            acquires[i] = an_acquire(ids[i], i == 4 ? "nt048" : "nt047");
            acquires[i].choice = i;
            acquires[i].idempotency_key = i == 3 ? "k" : NULL;
            asked[i] = &acquires[i];
        }
        assert_int_equal(ERR_NONE, driver->acquire(store, asked, COUNT_OF_ALL, &err));
        for (size_t i = 0; i < COUNT_OF_ALL; i++) {
            assert_int_equal(ERR_NONE, acquires[i].code);
            assert_int_equal(GRANT_TOKEN, acquires[i].grant);
            assert_int_equal(i == 4 ? 3 : 1 + i % 2, acquires[i].token_id);
            assert_string_equal(i == 4 ? "NT048" : "NT047", acquires[i].company_id_stored);
            assert_true(acquires[i].api_key[0] != '\0');
        }
        expect("11|1100", "SELECT COUNT(*), SUM(EstimatedTokens) FROM TokenReservations");
        expect_sums();
    }
    expect("NT048|Köln|jürgen|100|open|store|0",
           "SELECT CompanyID, Branch, RequestedBy, EstimatedTokens, State, TokenSource, " IS_SET(
               "ClosedAt") " FROM TokenReservations WHERE RequestID = '" ID(5) "'");
    expect("NT047|k|" ID(4) "|in_progress",
           "SELECT CompanyID, IdempotencyKey, RequestID, State FROM IdempotencyKeys");

    for (int again = 0; again < 2; again++) {
        for (size_t i = 0; i < COUNT_OF_ALL; i++) {
            settlements[i] = a_settlement(ids[i], acquires[i].token_id, 10 + (int64_t)i);
            settlements[i].idempotency = i == 3 ? STORE_KEY_DONE : STORE_KEY_NONE;
            told[i] = &settlements[i];
        }
        assert_int_equal(ERR_NONE, driver->settle(store, told, COUNT_OF_ALL, &err));
        for (size_t i = 0; i < COUNT_OF_ALL; i++) {
            assert_int_equal(ERR_NONE, settlements[i].code);
            assert_false(settlements[i].threshold_crossed || settlements[i].exceeded);
        }
        expect("8|108", "SELECT COUNT(*), SUM(TotalTokensUsed) FROM TokenUsageLogs");
        expect("8", "SELECT COUNT(*) FROM TokenReservations WHERE State = 'settled'");
        expect("38|NULL|100", "SELECT TotalUsedTokens, TotalRemainingTokens, ReservedTokens"
                              " FROM TokenUsageSummary WHERE TokenID = 1");
        expect_sums();
    }
    expect("NT048|done", "SELECT u.CompanyID, k.State FROM TokenUsageLogs u, IdempotencyKeys k"
                         " WHERE u.RequestID = '" ID(5) "'");
}

/* Whose tokens went over it, one after the other? */
static void a_batch_goes_over_threshold_and_limit(void **state)
{
    (void)state;
    enum { COUNT_OF_ALL = 5 };
    static const char *const ids[] = {ID(1), ID(2), ID(3), ID(4), ID(5)};
    struct store_settlement items[COUNT_OF_ALL], *pointers[COUNT_OF_ALL];
    struct err err = {0};
    int64_t id = add_token("NT047", 1000);
    for (size_t i = 0; i < COUNT_OF_ALL; i++) {
        items[i] = a_settlement(ids[i], id, 300);
        pointers[i] = &items[i];
    }
    assert_int_equal(ERR_NONE, driver->settle(store, pointers, COUNT_OF_ALL, &err));
    for (size_t i = 0; i < COUNT_OF_ALL; i++) {
        assert_int_equal(i == 2, items[i].threshold_crossed);
        assert_int_equal(i == 3, items[i].exceeded);
    }
    expect("Exceeded", "SELECT Status FROM TokenMaster");
    expect("1500|-500|1", "SELECT TotalUsedTokens, TotalRemainingTokens, " IS_SET(
                              "ThresholdCrossedAt") " FROM TokenUsageSummary");
    expect_sums();
}

static void a_bad_settlement_fails_alone(void **state)
{
    (void)state;
    char long_text[300];
    struct store_settlement items[12];
    struct store_settlement *pointers[12];
    struct err err = {0};

    memset(long_text, 'x', sizeof long_text);
    long_text[sizeof long_text - 1] = '\0';
    int64_t id = add_token("NT047", -1);
    for (size_t i = 0; i < 12; i++) {
        items[i] = a_settlement(ID(1), id, 30);
        pointers[i] = &items[i];
    }
    items[0].usage.cached_tokens = -1;
    items[1].request_count = -1;
    items[2].requested_by = long_text;
    items[3].token_source = "elsewhere";
    items[4].request_id = long_text;
    items[5].token_id = 4711; /* deleted meanwhile: found out inside the transaction */
    items[6].duration_ms = -1;
    items[7].usage.total_tokens = INT64_MAX;
    items[8].logged_ms = -1;
    items[9].trace_id = TRACE "0";
    items[10].trace_id = "";
    assert_int_equal(ERR_NONE, driver->settle(store, pointers, 12, &err));
    for (size_t i = 0; i < 11; i++) {
        assert_int_equal(ERR_BAD_VALUE, items[i].code);
        assert_null(strstr(items[i].err.message, "xxx"));
    }
    assert_non_null(strstr(items[5].err.message, "deleted"));
    assert_int_equal(ERR_NONE, items[11].code);
    expect("1|30", "SELECT COUNT(*), SUM(TotalTokensUsed) FROM TokenUsageLogs");
    expect("0", "SELECT COUNT(*) FROM TokenReservations");
    expect_sums();
}

/* ---- settle ---- */

static void writes_every_column_of_a_usage_row(void **state)
{
    (void)state;
    add_token("NT047", 1000);
    struct store_acquire a = an_acquire(ID(1), "nt047");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    struct store_settlement s = a_settlement(ID(1), 1, 99);
    s.company_id = "nt047";
    s.unknown_calls = 3;
    s.trace_id = TRACE;
    settle(&s);
    expect("1|Köln|jürgen|11|12|13|14|15|99|2|2026-11-22T12:13:21.123Z",
           "SELECT TokenID, Branch, RequestedBy, InputTokens, OutputTokens,"
           " TextPromptTokens, ImagePromptTokens, TextCandidatesTokens, TotalTokensUsed,"
           " RequestCount, LoggedAt FROM TokenUsageLogs");
    expect(ID(1) "|NT047|ck1|store|16|17|3|gemini-3.5-flash|1234|" TRACE,
           "SELECT RequestID, CompanyID, ClientKeyID, TokenSource, ThoughtsTokens, CachedTokens,"
           " UnknownCalls, Model, DurationMs, TraceID FROM TokenUsageLogs");
    expect("99|901|0|NULL", "SELECT TotalUsedTokens, TotalRemainingTokens, ReservedTokens,"
                            " ThresholdCrossedAt FROM TokenUsageSummary");
    expect("settled", "SELECT State FROM TokenReservations WHERE ClosedAt IS NOT NULL");
    assert_false(s.threshold_crossed || s.exceeded || s.disabling_stopped);
    expect_sums();
    s = a_settlement(ID(2), 1, 1);
    settle(&s);
    expect("NULL", "SELECT TraceID FROM TokenUsageLogs WHERE RequestID = '" ID(2) "'");
}

static void settles_once(void **state)
{
    (void)state;
    int64_t id = add_token("NT047", 100);
    struct store_acquire a = an_acquire(ID(1), "NT047");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    struct store_settlement s = a_settlement(ID(1), id, 100);
    settle(&s);
    assert_true(s.threshold_crossed && s.exceeded);
    s.fault.fault = STORE_FAULT_COOLDOWN;
    s.fault.cooldown_ms = 1000;
    settle(&s);
    assert_false(s.threshold_crossed || s.exceeded);
    expect("NULL", "SELECT CooldownUntil FROM TokenMaster");
    /* late news of less changes nothing either */
    s.request_count = 0;
    s.unknown_calls = 1;
    settle(&s);
    expect("1|100", "SELECT COUNT(*), SUM(TotalTokensUsed) FROM TokenUsageLogs");
    expect("settled|0", "SELECT State, UnknownCalls FROM TokenReservations");
    expect_sums();

    /* another token of the same request is another row; so is the fallback key, once */
    int64_t other = add_token("NT047", -1);
    s = a_settlement(ID(1), other, 7);
    settle(&s);
    s = a_settlement(ID(1), 0, 8);
    settle(&s);
    settle(&s);
    expect("3", "SELECT COUNT(*) FROM TokenUsageLogs");
    expect("1|fallback", "SELECT COUNT(*), MIN(TokenSource) FROM TokenUsageLogs"
                         " WHERE TokenID IS NULL");
    expect_sums();
}

static void settles_all_reservations_of_a_token(void **state)
{
    (void)state;
    int64_t id = add_token("NT047", -1);
    struct store_acquire a = an_acquire(ID(1), "NT047");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    a.sequence = 2;
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    expect("200", "SELECT ReservedTokens FROM TokenUsageSummary");
    struct store_settlement s = a_settlement(ID(1), id, 5);
    settle(&s);
    expect("2", "SELECT COUNT(*) FROM TokenReservations"
                " WHERE State = 'settled' AND ClosedAt IS NOT NULL");
    expect("0", "SELECT ReservedTokens FROM TokenUsageSummary");
    expect("5|NULL", "SELECT TotalUsedTokens, TotalRemainingTokens FROM TokenUsageSummary");
    expect_sums();
}

static void unknown_calls_stay_unsettled_until_a_settlement_comes(void **state)
{
    (void)state;
    int64_t id = add_token("NT047", -1);
    struct store_acquire a = an_acquire(ID(1), "NT047");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    a.sequence = 2;
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    struct store_settlement s = a_settlement(ID(1), id, 0);
    s.request_count = 0;
    s.unknown_calls = 2;
    settle(&s);
    settle(&s);
    expect("1|2|NULL", "SELECT COUNT(*), SUM(UnknownCalls), MAX(ClosedAt) FROM TokenReservations"
                       " WHERE State = 'unsettled'");
    expect("1|0", "SELECT COUNT(*), SUM(UnknownCalls) FROM TokenReservations"
                  " WHERE State = 'released'");
    expect(ID(1), "SELECT RequestID FROM vw_UnsettledRequests");
    expect("0", "SELECT ReservedTokens FROM TokenUsageSummary");
    expect("0", "SELECT COUNT(*) FROM TokenUsageLogs");

    s = a_settlement(ID(1), id, 50);
    settle(&s);
    expect("settled|1", "SELECT State, " IS_SET("ClosedAt") " FROM TokenReservations"
                                                            " WHERE Sequence = 2");
    expect("0", "SELECT COUNT(*) FROM vw_UnsettledRequests");
    expect_sums();
}

static void a_lost_reservation_is_left_unsettled(void **state)
{
    (void)state;
    int64_t id = add_token("NT047", -1);
    struct store_settlement s = a_settlement(ID(1), id, 0);
    s.request_count = 0;
    s.unknown_calls = 1;
    settle(&s);
    settle(&s);
    struct store_settlement fallback = a_settlement(ID(1), 0, 0);
    fallback.request_count = 0;
    fallback.unknown_calls = 1;
    settle(&fallback);
    expect("2", "SELECT COUNT(*) FROM vw_UnsettledRequests");
    expect("1|NT047|store|1", "SELECT TokenID, CompanyID, TokenSource, UnknownCalls"
                              " FROM TokenReservations WHERE TokenID IS NOT NULL");
    /* an acquire that comes after all finds its own number free */
    struct store_acquire a = an_acquire(ID(1), "NT047");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    expect("open", "SELECT State FROM TokenReservations WHERE Sequence = 1");
    expect_sums();
}

static void nothing_spent_is_released(void **state)
{
    (void)state;
    int64_t id = add_token("NT047", -1);
    struct store_acquire a = an_acquire(ID(1), "NT047");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    struct store_settlement s = a_settlement(ID(1), id, 0);
    s.request_count = 0;
    settle(&s);
    settle(&s);
    expect("released|1", "SELECT State, " IS_SET("ClosedAt") " FROM TokenReservations");
    expect("0|0", "SELECT ReservedTokens, TotalUsedTokens FROM TokenUsageSummary");
    expect("0", "SELECT COUNT(*) FROM TokenUsageLogs");

    a = an_acquire(ID(2), "Someone");
    a.fallback_only = true;
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    s = a_settlement(ID(2), 0, 5);
    s.company_id = "SOMEONE";
    settle(&s);
    expect("settled", "SELECT State FROM TokenReservations WHERE TokenID IS NULL");
    expect("Someone|NULL", "SELECT CompanyID, TokenID FROM TokenUsageLogs");
    expect_sums();
}

static void the_threshold_is_crossed_once_and_the_limit_ends_a_token(void **state)
{
    (void)state;
    char crossed[64];
    int64_t id = add_token("NT047", 100);
    struct store_settlement s = a_settlement(ID(1), id, 79);
    settle(&s);
    assert_false(s.threshold_crossed || s.exceeded);
    expect("NULL", "SELECT ThresholdCrossedAt FROM TokenUsageSummary");
    s = a_settlement(ID(2), id, 1);
    settle(&s);
    assert_true(s.threshold_crossed);
    assert_false(s.exceeded);
    expect("1", "SELECT " IS_SET("ThresholdCrossedAt") " FROM TokenUsageSummary");
    sql("UPDATE TokenUsageSummary SET ThresholdCrossedAt = %s", backend->a_minute_ago);
    backend->row("SELECT ThresholdCrossedAt FROM TokenUsageSummary", crossed, sizeof crossed);
    s = a_settlement(ID(3), id, 19);
    settle(&s);
    assert_false(s.threshold_crossed || s.exceeded);
    expect(crossed, "SELECT ThresholdCrossedAt FROM TokenUsageSummary");
    expect("Active", "SELECT Status FROM TokenMaster");
    s = a_settlement(ID(4), id, 5);
    settle(&s);
    assert_true(s.exceeded);
    expect("Exceeded|limit of 100 tokens reached", "SELECT Status, StatusReason FROM TokenMaster");
    expect("104|-4", "SELECT TotalUsedTokens, TotalRemainingTokens FROM TokenUsageSummary");
    expect("extract-fcgi", "SELECT Actor FROM AuditLog WHERE Action = 'token status changed'");
    s = a_settlement(ID(5), id, 5);
    settle(&s);
    assert_false(s.exceeded);
    expect_sums();

    /* a status that somebody set stays */
    id = add_token("Other", 10);
    sql("UPDATE TokenMaster SET Status = 'Expired' WHERE TokenID = %lld", (long long)id);
    s = a_settlement(ID(6), id, 10);
    settle(&s);
    assert_false(s.exceeded);
    expect("Expired", "SELECT Status FROM TokenMaster WHERE TokenID = %lld", (long long)id);
}

static void a_settlement_brings_a_fault(void **state)
{
    (void)state;
    bool stopped = false;
    int64_t id = add_token("NT047", -1);
    struct store_settlement s = a_settlement(ID(1), id, 0);
    s.request_count = 0;
    s.fault = (struct store_token_fault){STORE_FAULT_DISABLE, 0, "leaked"};
    settle(&s);
    expect("Disabled|at fault: leaked", "SELECT Status, StatusReason FROM TokenMaster");
    int64_t other = add_token("Other", -1);
    fail_token(other, "Other", &stopped);
    int64_t third = add_token("Third", -1);
    s = a_settlement(ID(2), third, 5);
    s.fault = (struct store_token_fault){STORE_FAULT_DISABLE, 0, "leaked"};
    settle(&s);
    assert_true(s.disabling_stopped);
    expect("Active", "SELECT Status FROM TokenMaster WHERE CompanyID = 'Third'");
    expect("1", "SELECT COUNT(*) FROM TokenUsageLogs");
}

/* ---- in the background ---- */

static void reservations_of_the_dead_become_unsettled(void **state)
{
    (void)state;
    struct err err = {0};
    int expired = -1;
    int64_t id = add_token("NT047", -1);
    struct store_acquire a = an_acquire(ID(1), "NT047");
    a.expires_ms = 0;
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    struct store_acquire fallback = an_acquire(ID(2), "NT047");
    fallback.expires_ms = 0;
    fallback.fallback_only = true;
    assert_int_equal(GRANT_TOKEN, acquire(&fallback));
    struct store_acquire alive = an_acquire(ID(3), "NT047");
    assert_int_equal(GRANT_TOKEN, acquire(&alive));
    usleep(5000);
    assert_int_equal(ERR_NONE, driver->expire_reservations(store, &expired, &err));
    assert_int_equal(2, expired);
    expect("2|2", "SELECT COUNT(*), SUM(UnknownCalls) FROM vw_UnsettledRequests");
    expect("open|0", "SELECT State, UnknownCalls FROM TokenReservations"
                     " WHERE RequestID = '" ID(3) "'");
    expect("100", "SELECT ReservedTokens FROM TokenUsageSummary");
    assert_int_equal(ERR_NONE, driver->expire_reservations(store, &expired, &err));
    assert_int_equal(0, expired);
    expect_sums();

    /* not dead after all */
    struct store_settlement s = a_settlement(ID(1), id, 5);
    settle(&s);
    expect("settled|0", "SELECT State, UnknownCalls FROM TokenReservations"
                        " WHERE RequestID = '" ID(1) "'");
    expect("100", "SELECT ReservedTokens FROM TokenUsageSummary");
    expect_sums();
}

static void records_entries_and_attempts(void **state)
{
    (void)state;
    struct err err = {0};
    struct log_entry full = {.wall_ms = INT64_C(1795349601123),
                             .level = LOG_CRITICAL,
                             .logger = "gemini",
                             .message = "naïve",
                             .exception = "because",
                             .module = "gemini.c",
                             .function = "call",
                             .line = 42,
                             .request_id = ID(1),
                             .trace_id = TRACE};
    struct log_entry bare = {
        .level = LOG_INFO, .logger = "main", .message = "up", .module = "main.c"};
    struct log_entry *entries[] = {&full, &bare};
    struct store_retry_attempt answered = {.token_id = 77,
                                           .wall_ms = INT64_C(1795349601123),
                                           .attempt = 2,
                                           .is_retryable = true,
                                           .status_code = 503,
                                           .delay_ms = 1500,
                                           .request_id = ID(1),
                                           .company_id = "NT047",
                                           .error_message = "overloaded"};
    struct store_retry_attempt broken = {.attempt = 1, .request_id = ID(2), .company_id = "NT047"};
    const struct store_retry_attempt *attempts[] = {&answered, &broken};

    assert_int_equal(ERR_NONE, driver->record(store, entries, 2, attempts, 2, false, &err));
    expect(
        "2026-11-22T12:13:21.123Z|CRITICAL|gemini|naïve|because|gemini.c|call|42|" ID(1) "|" TRACE,
        "SELECT Timestamp, LogLevel, Logger, Message, Exception, Module, FunctionName,"
        " LineNumber, RequestID, TraceID FROM ApplicationLogs WHERE LogID = 1");
    expect(log_host(), "SELECT Host FROM ApplicationLogs WHERE LogID = 1");
    expect("INFO|NULL|NULL|NULL", "SELECT LogLevel, Exception, RequestID, TraceID"
                                  " FROM ApplicationLogs WHERE LogID = 2");
    expect("77|NT047|2|overloaded|1|2026-11-22T12:13:21.123Z|" ID(1) "|503|1500",
           "SELECT TokenID, CompanyID, Attempt, ErrorMessage, IsRetryable, Timestamp, RequestID,"
           " StatusCode, DelayMs FROM RetryAttempts WHERE RetryID = 1");
    expect("NULL|0|NULL|0", "SELECT TokenID, IsRetryable, StatusCode, DelayMs FROM RetryAttempts"
                            " WHERE RetryID = 2");
    assert_int_equal(ERR_NONE, driver->record(store, NULL, 0, NULL, 0, false, &err));
    expect("2", "SELECT COUNT(*) FROM vw_FailedRetries");
    sql("UPDATE ApplicationLogs SET Timestamp = %s", backend->in_an_hour);
    expect("1|" TRACE, "SELECT COUNT(*), MAX(TraceID) FROM vw_RecentErrors");
}

/* ---- administration ---- */

static void adds_tokens(void **state)
{
    (void)state;
    struct err err = {0};
    int64_t id = 0;
    struct store_new_token t = {.company_id = "NT047",
                                .company_name = "Nord Ltd",
                                .api_key = "AIza-very-secret",
                                .limit = 500,
                                .threshold = 0.5};
    assert_int_equal(ERR_NONE, driver->token_add(store, "anna", &t, &id, &err));
    assert_int_equal(1, id);
    expect("1|NT047|Nord Ltd|AIza-very-secret|Gemini|500|Active",
           "SELECT TokenID, CompanyID, CompanyName, ApiKey, Provider, TotalTokenLimit, Status"
           " FROM TokenMaster");
    expect("0|500|0.5|0", "SELECT TotalUsedTokens, TotalRemainingTokens, Threshold, ReservedTokens"
                          " FROM TokenUsageSummary WHERE TokenID = 1");
    expect("anna|token added|TokenMaster|1|NT047",
           "SELECT Actor, Action, ObjectType, ObjectID, CompanyID FROM AuditLog");
    expect("0", "SELECT COUNT(*) FROM AuditLog WHERE Detail LIKE '%%secret%%'");

    t.limit = -1;
    t.threshold = 0;
    t.provider = "Google";
    assert_int_equal(ERR_NONE, driver->token_add(store, "anna", &t, &id, &err));
    expect("Google|NULL|0.8|NULL",
           "SELECT Provider, TotalTokenLimit, Threshold, TotalRemainingTokens FROM TokenMaster t"
           " JOIN TokenUsageSummary s ON s.TokenID = t.TokenID WHERE t.TokenID = 2");
}

static void refuses_bad_tokens(void **state)
{
    (void)state;
    static const struct store_new_token bad[] = {
        {.company_id = "", .api_key = "key", .limit = -1},
        {.company_id = " NT047", .api_key = "key", .limit = -1},
        {.company_id = "NT\n047", .api_key = "key", .limit = -1},
        {.company_id = "NT047", .api_key = "", .limit = -1},
        {.company_id = "NT047", .api_key = NULL, .limit = -1},
        {.company_id = "NT047", .api_key = "two words", .limit = -1},
        {.company_id = "NT047", .api_key = "key\n", .limit = -1},
        {.company_id = "NT047", .api_key = "key", .limit = -2},
        {.company_id = "NT047", .api_key = "key", .limit = -1, .threshold = 1.1},
        {.company_id = "NT047", .api_key = "key", .limit = -1, .threshold = -0.1},
        {.company_id = NULL, .api_key = "key", .limit = -1},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct err err = {0};
        int64_t id = 0;
        assert_int_equal(ERR_BAD_VALUE, driver->token_add(store, "anna", &bad[i], &id, &err));
        assert_int_equal(ERR_BAD_VALUE, err.code);
    }
    struct err err = {0};
    int64_t id = 0;
    struct store_new_token good = {.company_id = "NT047", .api_key = "key", .limit = -1};
    assert_int_equal(ERR_BAD_VALUE, driver->token_add(store, "", &good, &id, &err));
    expect("0", "SELECT COUNT(*) FROM TokenMaster");
    expect("0", "SELECT COUNT(*) FROM AuditLog");
}

static void sets_a_status(void **state)
{
    (void)state;
    struct err err = {0};
    int64_t id = add_token("NT047", -1);
    sql("UPDATE TokenMaster SET CooldownUntil = %s", backend->in_an_hour);
    assert_int_equal(ERR_NONE,
                     driver->token_set_status(store, "anna", id, "disabled", "lost", &err));
    expect("Disabled|lost|1",
           "SELECT Status, StatusReason, " IS_SET("CooldownUntil") " FROM TokenMaster");
    expect("anna|token status changed|Active to Disabled: lost",
           "SELECT Actor, Action, Detail FROM AuditLog WHERE AuditID = (SELECT MAX(AuditID) FROM "
           "AuditLog)");
    assert_int_equal(ERR_NONE, driver->token_set_status(store, "anna", id, "ACTIVE", NULL, &err));
    expect("Active|NULL|NULL", "SELECT Status, StatusReason, CooldownUntil FROM TokenMaster");
    expect("3", "SELECT COUNT(*) FROM AuditLog");

    assert_int_equal(ERR_BAD_VALUE, driver->token_set_status(store, "anna", id, "Off", NULL, &err));
    assert_int_equal(ERR_NO_SUCH_ROW,
                     driver->token_set_status(store, "anna", 99, "Active", NULL, &err));
    assert_int_equal(ERR_NO_SUCH_ROW, err.code);
    expect("3", "SELECT COUNT(*) FROM AuditLog");
}

static void sets_a_key(void **state)
{
    (void)state;
    struct err err = {0};
    struct store_acquire a;
    int64_t id = add_token("NT047", -1);
    assert_int_equal(ERR_NONE, driver->token_set_key(store, "anna", id, "brand-new-secret", &err));
    assert_int_equal(GRANT_TOKEN, acquire_new("NT047", &a));
    assert_string_equal("brand-new-secret", a.api_key);
    expect("anna|token key changed|1", "SELECT Actor, Action, ObjectID FROM AuditLog WHERE AuditID "
                                       "= (SELECT MAX(AuditID) FROM AuditLog)");
    expect("0", "SELECT COUNT(*) FROM AuditLog WHERE Detail LIKE '%%secret%%'");
    assert_int_equal(ERR_BAD_VALUE, driver->token_set_key(store, "anna", id, "a b", &err));
    assert_int_equal(ERR_NO_SUCH_ROW, driver->token_set_key(store, "anna", 99, "key", &err));
}

static void sets_a_limit(void **state)
{
    (void)state;
    struct err err = {0};
    int64_t id = add_token("NT047", 100);
    struct store_settlement s = a_settlement(ID(1), id, 100);
    settle(&s);
    expect("Exceeded", "SELECT Status FROM TokenMaster");

    /* no room yet: stays */
    assert_int_equal(ERR_NONE, driver->token_set_limit(store, "anna", id, 100, 0, &err));
    expect("Exceeded", "SELECT Status FROM TokenMaster");
    assert_int_equal(ERR_NONE, driver->token_set_limit(store, "anna", id, 110, 0, &err));
    expect("Active|NULL|110", "SELECT Status, StatusReason, TotalTokenLimit FROM TokenMaster");
    expect("10|1",
           "SELECT TotalRemainingTokens, " IS_SET("ThresholdCrossedAt") " FROM TokenUsageSummary");
    assert_int_equal(ERR_NONE, driver->token_set_limit(store, "anna", id, 1000, 0, &err));
    expect("900|NULL|0.8", "SELECT TotalRemainingTokens, ThresholdCrossedAt, Threshold"
                           " FROM TokenUsageSummary");
    /* cleared, so that it can be crossed again */
    s = a_settlement(ID(2), id, 700);
    settle(&s);
    assert_true(s.threshold_crossed);
    assert_int_equal(ERR_NONE, driver->token_set_limit(store, "anna", id, 1000, 0.9, &err));
    expect("NULL|0.9", "SELECT ThresholdCrossedAt, Threshold FROM TokenUsageSummary");
    assert_int_equal(ERR_NONE, driver->token_set_limit(store, "anna", id, 1000, 0.7, &err));
    expect("1", "SELECT " IS_SET("ThresholdCrossedAt") " FROM TokenUsageSummary");
    assert_int_equal(ERR_NONE, driver->token_set_limit(store, "anna", id, -1, 0, &err));
    expect("NULL|NULL|NULL",
           "SELECT TotalTokenLimit, TotalRemainingTokens, ThresholdCrossedAt FROM TokenMaster t"
           " JOIN TokenUsageSummary s ON s.TokenID = t.TokenID");
    /* below what was used: at the limit a token is Exceeded, whoever takes it there */
    assert_int_equal(ERR_NONE, driver->token_set_limit(store, "anna", id, 800, 0, &err));
    expect("Exceeded|0", "SELECT Status, TotalRemainingTokens FROM TokenMaster t"
                         " JOIN TokenUsageSummary s ON s.TokenID = t.TokenID");
    assert_int_equal(ERR_NONE, driver->token_set_limit(store, "anna", id, -1, 0, &err));
    expect("Active", "SELECT Status FROM TokenMaster");
    expect("8", "SELECT COUNT(*) FROM AuditLog WHERE Action = 'token limit changed'");

    sql("UPDATE TokenMaster SET Status = 'Disabled'");
    assert_int_equal(ERR_NONE, driver->token_set_limit(store, "anna", id, -1, 0, &err));
    expect("Disabled", "SELECT Status FROM TokenMaster");
    sql("INSERT INTO TokenMaster (CompanyID, ApiKey) VALUES ('Hand', 'key')");
    assert_int_equal(ERR_NONE, driver->token_set_limit(store, "anna", 2, 50, 0, &err));
    expect("50", "SELECT TotalRemainingTokens FROM TokenUsageSummary WHERE TokenID = 2");
    assert_int_equal(ERR_NO_SUCH_ROW, driver->token_set_limit(store, "anna", 99, 1, 0, &err));
    assert_int_equal(ERR_BAD_VALUE, driver->token_set_limit(store, "anna", id, -2, 0, &err));
    assert_int_equal(ERR_BAD_VALUE, driver->token_set_limit(store, "anna", id, 1, 2, &err));
    expect_sums();
}

#define NEWEST_DETAIL \
    "SELECT Detail FROM AuditLog WHERE AuditID = (SELECT MAX(AuditID) FROM AuditLog)"

/* By plain SQL as by extractctl. */
static void a_limit_that_is_raised_by_hand_frees_a_token(void **state)
{
    (void)state;
    static const char look[] =
        "SELECT t.Status, t.StatusReason, s.TotalUsedTokens, s.TotalRemainingTokens"
        " FROM TokenMaster t LEFT JOIN TokenUsageSummary s ON s.TokenID = t.TokenID"
        " WHERE t.TokenID = 1";
    struct err err = {0};
    struct store_acquire a;
    int64_t id = add_token("NT047", 100);
    struct store_settlement s = a_settlement(ID(1), id, 100);
    settle(&s);
    sql("UPDATE TokenMaster SET UpdatedAt = '2026-01-01T00:00:00.000Z'");
    sql("UPDATE TokenUsageSummary SET LastUpdated = '2026-01-01T00:00:00.000Z'");
    expect("Exceeded|limit of 100 tokens reached|100|0", look);

    sql("UPDATE TokenMaster SET TotalTokenLimit = 100"); /* nothing new */
    expect("Exceeded|limit of 100 tokens reached|100|0", look);
    sql("UPDATE TokenMaster SET TotalTokenLimit = 90"); /* lower */
    expect("Exceeded|limit of 100 tokens reached|100|-10", look);
    sql("UPDATE TokenMaster SET TotalTokenLimit = 99"); /* raised, without room */
    expect("Exceeded|limit of 100 tokens reached|100|-1", look);
    sql("UPDATE TokenMaster SET TotalTokenLimit = 150");
    expect("Active|NULL|100|50", look);
    expect("2026-01-01T00:00:00.000Z|2026-01-01T00:00:00.000Z|1|0",
           "SELECT t.UpdatedAt, s.LastUpdated, " IS_SET(
               "s.ThresholdCrossedAt") ", s.ReservedTokens"
                                       " FROM TokenMaster t JOIN TokenUsageSummary s ON s.TokenID "
                                       "= t.TokenID");
    expect("0", "SELECT COUNT(*) FROM AuditLog WHERE Action = 'token limit changed'");
    assert_int_equal(GRANT_TOKEN, acquire_new("NT047", &a));
    s = a_settlement(a.request_id, id, 50);
    settle(&s);
    assert_true(s.exceeded);
    sql("UPDATE TokenMaster SET TotalTokenLimit = NULL");
    expect("Active|NULL|150|NULL", look);
    sql("UPDATE TokenMaster SET Status = 'Exceeded', TotalTokenLimit = 400"); /* that's no raise */
    expect("Exceeded|NULL|150|250", look);
    /* other statuses are not about the limit */
    sql("UPDATE TokenMaster SET Status = 'Disabled', StatusReason = 'lost'");
    sql("UPDATE TokenMaster SET TotalTokenLimit = 500");
    expect("Disabled|lost|150|350", look);
    sql("UPDATE TokenMaster SET Status = 'exceeded', TotalTokenLimit = 600"); /* in one statement */
    expect("Active|NULL|150|450", look);

    /* without a summary the rows say what was used */
    sql("DELETE FROM TokenUsageSummary");
    sql("UPDATE TokenMaster SET Status = 'Exceeded', TotalTokenLimit = 100");
    sql("UPDATE TokenMaster SET TotalTokenLimit = 150");
    expect("Exceeded", "SELECT Status FROM TokenMaster");
    sql("UPDATE TokenMaster SET TotalTokenLimit = 151");
    expect("Active", "SELECT Status FROM TokenMaster");
    assert_int_equal(GRANT_TOKEN, acquire_new("NT047", &a));
    expect("Active|NULL|150|1", look);

    /* extractctl says in its record that it was so */
    sql("UPDATE TokenMaster SET Status = 'Exceeded'");
    assert_int_equal(ERR_NONE, driver->token_set_limit(store, "anna", id, 1000, 0, &err));
    expect("Active|NULL|150|850", look);
    expect("limit 1000, now Active", NEWEST_DETAIL);
    assert_int_equal(ERR_NONE, driver->token_set_limit(store, "anna", id, 100, 0, &err));
    expect("limit 100, now Exceeded", NEWEST_DETAIL);
    expect_sums();
}

/* One statement, several tokens: each by its own limit and use. */
static void limits_that_are_raised_together_free_each_token(void **state)
{
    (void)state;
    static const struct {
        int64_t limit;
        const char *status; /* and whether it is as it was, after all limits are doubled */
        const char *after;
    } tokens[] = {
        {100, "Exceeded", "Active|100"},   /* used 100 of 200 */
        {50, "Exceeded", "Exceeded|0"},    /* used 100 of 100 */
        {100, "Disabled", "Disabled|100"}, /* not for the limit's sake */
        {-1, "Exceeded", "Exceeded|NULL"}, /* none before, none now */
        {500, "Active", "Active|900"},
    };
    const size_t count = sizeof tokens / sizeof tokens[0];
    for (size_t i = 0; i < count; i++) {
        char request_id[UUID_TEXT_SIZE];
        int64_t id = add_token("NT047", tokens[i].limit);
        uuid_v7(request_id);
        struct store_settlement s = a_settlement(request_id, id, 100);
        settle(&s);
        sql("UPDATE TokenMaster SET Status = '%s' WHERE TokenID = %lld", tokens[i].status,
            (long long)id);
    }
    sql("UPDATE TokenMaster SET TotalTokenLimit = TotalTokenLimit * 2");
    for (size_t i = 0; i < count; i++)
        expect(tokens[i].after,
               "SELECT t.Status, s.TotalRemainingTokens FROM TokenMaster t"
               " JOIN TokenUsageSummary s ON s.TokenID = t.TokenID WHERE t.TokenID = %zu",
               i + 1);
    expect_sums();
    sql("UPDATE TokenMaster SET TotalTokenLimit = NULL, Status = 'Exceeded' WHERE TokenID > 1");
    expect("Active|NULL", "SELECT t.Status, s.TotalRemainingTokens FROM TokenMaster t"
                          " JOIN TokenUsageSummary s ON s.TokenID = t.TokenID WHERE t.TokenID = 2");
    expect("Exceeded", "SELECT Status FROM TokenMaster WHERE TokenID = 4");
    expect_sums();
}

/* ---- queries ---- */

/* What a query showed: of each row the columns asked for, "|" between them, ";" between rows. */
struct shown {
    const char *columns; /* "TokenID Status" */
    char text[4096];
    size_t rows;
    size_t stop_after;
    bool missing;
};

static void show_value(struct shown *shown, const struct store_value *v)
{
    size_t len = strlen(shown->text);
    char *end = shown->text + len;
    size_t room = sizeof shown->text - len;
    switch (v->type) {
    case STORE_NULL:
        snprintf(end, room, "NULL");
        break;
    case STORE_INTEGER:
        snprintf(end, room, "%lld", (long long)v->integer);
        break;
    case STORE_REAL:
        snprintf(end, room, "%g", v->real);
        break;
    case STORE_TEXT:
        snprintf(end, room, "%s", v->text);
        break;
    }
}

static void append(struct shown *shown, const char *s)
{
    size_t len = strlen(shown->text);
    snprintf(shown->text + len, sizeof shown->text - len, "%s", s);
}

static bool show_row(void *context, size_t columns, const char *const *names,
                     const struct store_value *values)
{
    struct shown *shown = context;
    char wanted[512];
    char *rest = NULL;
    if (shown->rows++ > 0)
        append(shown, ";");
    snprintf(wanted, sizeof wanted, "%s", shown->columns);
    for (char *name = strtok_r(wanted, " ", &rest); name != NULL;
         name = strtok_r(NULL, " ", &rest)) {
        size_t i = 0;
        while (i < columns && strcmp(names[i], name) != 0)
            i++;
        if (name != wanted)
            append(shown, "|");
        if (i < columns)
            show_value(shown, &values[i]);
        else
            shown->missing = true;
    }
    return shown->rows != shown->stop_after;
}

static void expect_view(const char *expected, enum store_view view, struct store_filter filter,
                        const char *columns)
{
    struct shown shown = {.columns = columns};
    struct err err = {0};
    if (driver->query(store, view, &filter, show_row, &shown, &err) != ERR_NONE)
        fail_msg("view %d: %s", (int)view, err.message);
    if (shown.missing)
        fail_msg("view %d has not all columns of %s", (int)view, columns);
    if (strcmp(expected, shown.text) != 0)
        fail_msg("view %d: expected %s, found %s", (int)view, expected, shown.text);
}

#define ALL ((struct store_filter){0})
#define DAY_MS INT64_C(86400000)
#define T0 INT64_C(1795349601123) /* 2026-11-22T12:13:21.123Z */

static void settle_for(const char *request_id, int64_t token_id, const char *company,
                       const char *branch, const char *user, int64_t total, int64_t logged_ms)
{
    struct store_settlement s = a_settlement(request_id, token_id, total);
    s.company_id = company;
    s.branch = branch;
    s.requested_by = user;
    s.logged_ms = logged_ms;
    settle(&s);
}

static void shows_tokens(void **state)
{
    (void)state;
    struct err err = {0};
    int64_t id = 0;
    struct store_new_token t = {.company_id = "Ärzte", .api_key = "AIza-hidden-abcd", .limit = 100};
    assert_int_equal(ERR_NONE, driver->token_add(store, "anna", &t, &id, &err));
    t = (struct store_new_token){.company_id = "B", .api_key = "short", .limit = -1};
    assert_int_equal(ERR_NONE, driver->token_add(store, "anna", &t, &id, &err));
    sql("INSERT INTO TokenMaster (CompanyID, ApiKey, Status) VALUES ('C', 'key-by-hand', "
        "'Expired')");
    struct store_acquire a = an_acquire(ID(1), "Ärzte");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    settle_for(ID(2), 1, "Ärzte", "b", "u", 40, T0);

    expect_view("3|…hand|Expired|NULL;2|…|Active|NULL;1|…abcd|Active|100", VIEW_TOKENS, ALL,
                "TokenID ApiKey Status TotalTokenLimit");
    expect_view("1|Ärzte|Gemini|40|60|100|0.8|NULL|NULL|NULL", VIEW_TOKENS,
                (struct store_filter){.company_id = "ärzte"},
                "TokenID CompanyID Provider TotalUsedTokens TotalRemainingTokens ReservedTokens"
                " Threshold ThresholdCrossedAt CooldownUntil StatusReason");
    expect_view("1", VIEW_TOKENS, (struct store_filter){.before_id = 2}, "TokenID");
    expect_view("3;2", VIEW_TOKENS, (struct store_filter){.limit = 2}, "TokenID");
    expect_view("", VIEW_TOKENS, (struct store_filter){.until_ms = T0 - 3650 * DAY_MS}, "TokenID");
    expect_view("Active|2;Expired|1", VIEW_TOKENS_BY_STATUS, ALL, "Status Count");
    expect_view("Active|1", VIEW_TOKENS_BY_STATUS, (struct store_filter){.company_id = "b"},
                "Status Count");

    expect_view("Active|2|1|100|40|100|60|0|0;Expired|1|1|NULL|0|0|NULL|0|0", VIEW_TOKENS_BY_STATUS,
                ALL,
                "Status Count Unlimited TotalTokenLimit TotalUsedTokens ReservedTokens"
                " TotalRemainingTokens OverThreshold Cooling");
    settle_for(ID(3), 1, "Ärzte", "b", "u", 39, T0);
    expect_view("0", VIEW_TOKENS_BY_STATUS, (struct store_filter){.company_id = "Ärzte"},
                "OverThreshold");
    settle_for(ID(4), 1, "Ärzte", "b", "u", 1, T0);
    sql("UPDATE TokenMaster SET CooldownUntil = '2100-01-01T00:00:00.000Z' WHERE TokenID = 2");
    expect_view("Active|1|1;Expired|0|0", VIEW_TOKENS_BY_STATUS, ALL,
                "Status OverThreshold Cooling");

    struct shown shown = {.columns = "TokenID", .stop_after = 1};
    assert_int_equal(ERR_NONE, driver->query(store, VIEW_TOKENS, &ALL, show_row, &shown, &err));
    assert_int_equal(1, shown.rows);
    /* a filter that a view cannot have is refused, not ignored */
    assert_int_equal(ERR_BAD_VALUE,
                     driver->query(store, VIEW_TOKENS, &(struct store_filter){.request_id = ID(1)},
                                   show_row, &shown, &err));
    assert_int_equal(ERR_BAD_VALUE,
                     driver->query(store, VIEW_USAGE_BY_DAY, &(struct store_filter){.before_id = 5},
                                   show_row, &shown, &err));
}

static void shows_usage(void **state)
{
    (void)state;
    int64_t first = add_token("NT047", -1);
    int64_t other = add_token("Other", -1);
    settle_for(ID(1), first, "NT047", "North", "ann", 10, T0);
    settle_for(ID(2), first, "nt047", "South", "ann", 20, T0 + DAY_MS);
    settle_for(ID(3), first, "NT047", "South", "bob", 40, T0 + DAY_MS);
    settle_for(ID(4), other, "Other", "South", "eve", 5, T0 + 2 * DAY_MS);
    settle_for(ID(5), 0, "NT047", "North", "ann", 3, T0 + 2 * DAY_MS);
    sql("INSERT INTO TokenUsageLogs (TokenID, TotalTokensUsed, LoggedAt)"
        " VALUES (%lld, 100, '2026-01-01T00:00:00.000Z')",
        (long long)first); /* as others write them */

    expect_view("2026-11-24|2|8|4|22|24|26|28|30|32|34;2026-11-23|2|60|4|22|24|26|28|30|32|34;"
                "2026-11-22|1|10|2|11|12|13|14|15|16|17;2026-01-01|1|100|1|0|0|0|0|0|0|0",
                VIEW_USAGE_BY_DAY, ALL,
                "Day Requests TotalTokensUsed RequestCount InputTokens OutputTokens"
                " TextPromptTokens ImagePromptTokens TextCandidatesTokens ThoughtsTokens"
                " CachedTokens");
    expect_view("2026-11-24|3;2026-11-23|60;2026-11-22|10", VIEW_USAGE_BY_DAY,
                (struct store_filter){.company_id = "nt047", .since_ms = T0},
                "Day TotalTokensUsed");
    expect_view("2026-11-22|10", VIEW_USAGE_BY_DAY,
                (struct store_filter){.since_ms = T0, .until_ms = T0 + DAY_MS},
                "Day TotalTokensUsed");
    expect_view("NT047|5|173|0;Other|1|5|0", VIEW_USAGE_BY_COMPANY, ALL,
                "CompanyID Requests TotalTokensUsed UnknownCalls");
    expect_view("NT047|63", VIEW_USAGE_BY_COMPANY,
                (struct store_filter){.company_id = "nt047", .since_ms = T0 + DAY_MS},
                "CompanyID TotalTokensUsed");
    expect_view("NT047|NULL|100;NT047|South|60;NT047|North|13;Other|South|5", VIEW_USAGE_BY_BRANCH,
                ALL, "CompanyID Branch TotalTokensUsed");
    expect_view("bob|40;ann|33", VIEW_USAGE_BY_USER,
                (struct store_filter){.company_id = "NT047", .since_ms = T0},
                "RequestedBy TotalTokensUsed");
    expect_view("NT047|1|store|170;Other|2|store|5;NT047|NULL|fallback|3", VIEW_USAGE_BY_TOKEN, ALL,
                "CompanyID TokenID TokenSource TotalTokensUsed");
    expect_view("40", VIEW_USAGE_BY_TOKEN, (struct store_filter){.request_id = ID(3)},
                "TotalTokensUsed");
    expect("175", "SELECT SUM(TotalTokensUsed) FROM vw_UsageSummary WHERE TokenID IS NOT NULL");
}

/* Names of branches and people are as they are; a company's is one in any case. */
static void reports_tell_names_apart_by_case(void **state)
{
    (void)state;
    int64_t id = add_token("NT047", -1);
    settle_for(ID(1), id, "NT047", "North", "Ann", 1, T0);
    settle_for(ID(2), id, "nt047", "north", "ANN", 2, T0);
    settle_for(ID(3), id, "NT047", "NORTH", "ann", 4, T0);
    settle_for(ID(4), id, "nt047", "North", "Ann", 8, T0);
    settle_for(ID(5), id, "NT047", "Nörth", "Änn", 16, T0);
    settle_for(ID(6), id, "NT047", "NÖrth", "änn", 32, T0);
    expect_view("NÖrth|32;Nörth|16;North|9;NORTH|4;north|2", VIEW_USAGE_BY_BRANCH, ALL,
                "Branch TotalTokensUsed");
    expect_view("änn|32;Änn|16;Ann|9;ann|4;ANN|2", VIEW_USAGE_BY_USER, ALL,
                "RequestedBy TotalTokensUsed");
    expect_view("1|63", VIEW_USAGE_BY_TOKEN, ALL, "TokenID TotalTokensUsed");
}

static void shows_logs_and_the_rest(void **state)
{
    (void)state;
    struct err err = {0};
    struct log_entry a = {.wall_ms = T0,
                          .level = LOG_INFO,
                          .logger = "x",
                          .message = "one",
                          .module = "x.c",
                          .request_id = ID(1)};
    struct log_entry b = {.wall_ms = T0 + DAY_MS,
                          .level = LOG_ERROR,
                          .logger = "x",
                          .message = "two",
                          .module = "x.c"};
    struct log_entry c = {.wall_ms = T0 + 2 * DAY_MS,
                          .level = LOG_CRITICAL,
                          .logger = "x",
                          .message = "three",
                          .module = "x.c",
                          .request_id = ID(2),
                          .trace_id = TRACE};
    struct log_entry *entries[] = {&a, &b, &c};
    struct store_retry_attempt r1 = {
        .token_id = 1, .wall_ms = T0, .attempt = 1, .request_id = ID(1), .company_id = "NT047"};
    struct store_retry_attempt r2 = {.token_id = 2,
                                     .wall_ms = T0 + DAY_MS,
                                     .attempt = 1,
                                     .request_id = ID(2),
                                     .company_id = "Other"};
    const struct store_retry_attempt *attempts[] = {&r1, &r2};
    assert_int_equal(ERR_NONE, driver->record(store, entries, 3, attempts, 2, false, &err));
    int64_t id = add_token("NT047", -1);
    struct store_acquire open = an_acquire(ID(1), "NT047");
    assert_int_equal(GRANT_TOKEN, acquire(&open));
    struct store_settlement lost = a_settlement(ID(3), id, 0);
    lost.request_count = 0;
    lost.unknown_calls = 1;
    settle(&lost);
    open.request_id = ID(4);
    assert_int_equal(GRANT_TOKEN, acquire(&open));
    settle_for(ID(4), id, "NT047", "b", "u", 1, T0);

    expect_view("3|three|CRITICAL;2|two|ERROR;1|one|INFO", VIEW_LOGS, ALL,
                "LogID Message LogLevel");
    expect_view("three|" TRACE ";two|NULL", VIEW_ERRORS, ALL, "Message TraceID");
    expect_view("one", VIEW_LOGS, (struct store_filter){.request_id = ID(1)}, "Message");
    expect_view("one", VIEW_LOGS, (struct store_filter){.company_id = "nt047"}, "Message");
    expect_view("two", VIEW_LOGS,
                (struct store_filter){.since_ms = T0 + 1, .until_ms = T0 + 2 * DAY_MS}, "Message");
    expect_view("two", VIEW_LOGS, (struct store_filter){.before_id = 3, .limit = 1}, "Message");
    expect_view("2|Other;1|NT047", VIEW_RETRIES, ALL, "RetryID CompanyID");
    expect_view("1", VIEW_RETRIES, (struct store_filter){.company_id = "nt047"}, "RetryID");
    expect_view("2", VIEW_RETRIES, (struct store_filter){.request_id = ID(2)}, "RetryID");
    expect_view("unsettled|" ID(3) ";open|" ID(1), VIEW_RESERVATIONS, ALL, "State RequestID");
    expect_view(ID(3) "|1|NT047", VIEW_UNSETTLED, (struct store_filter){.company_id = "nt047"},
                "RequestID UnknownCalls CompanyID");
    expect_view("", VIEW_UNSETTLED, (struct store_filter){.request_id = ID(1)}, "RequestID");
    expect_view("tester|token added|1", VIEW_AUDIT, (struct store_filter){.company_id = "NT047"},
                "Actor Action ObjectID");
}

/* ---- texts ---- */

/* What VIEW_LOGS shows of one entry, whatever its length. */
struct one_entry {
    const char *message;
    const char *exception;
    bool equal;
};

static bool compare_entry(void *context, size_t columns, const char *const *names,
                          const struct store_value *values)
{
    struct one_entry *wanted = context;
    int found = 0;
    for (size_t i = 0; i < columns; i++) {
        const char *text = values[i].type == STORE_TEXT ? values[i].text : NULL;
        if (strcmp(names[i], "Message") == 0)
            found += text != NULL && strcmp(text, wanted->message) == 0;
        if (strcmp(names[i], "Exception") == 0)
            found += text == NULL
                         ? wanted->exception == NULL || wanted->exception[0] == '\0'
                         : wanted->exception != NULL && strcmp(text, wanted->exception) == 0;
    }
    wanted->equal = found == 2;
    return true;
}

static void expect_kept(const char *message, const char *exception)
{
    struct err err = {0};
    struct log_entry entry = {.wall_ms = INT64_C(1795349601123),
                              .level = LOG_ERROR,
                              .logger = "x",
                              .message = message,
                              .exception = exception,
                              .module = "x.c"};
    struct log_entry *entries[] = {&entry};
    struct one_entry wanted = {.message = message, .exception = exception};
    const struct store_filter newest = {.limit = 1};

    if (driver->record(store, entries, 1, NULL, 0, false, &err) != ERR_NONE ||
        driver->query(store, VIEW_LOGS, &newest, compare_entry, &wanted, &err) != ERR_NONE)
        fail_msg("%.40s: %s", message, err.message);
    if (!wanted.equal)
        fail_msg("not kept as it was: %.80s", message);
}

static void keeps_texts_of_any_script_and_length(void **state)
{
    (void)state;
    static const char *const texts[] = {"Ünïcödé ß",
                                        "Ánh Dương",
                                        "Ωμέγα",
                                        "Кириллица",
                                        "漢字かな交じり文",
                                        "한국어",
                                        "עברית",
                                        "عربي",
                                        "ไทย",
                                        "😀🧾",
                                        "a\xF4\x8F\xBF\xBFz" /* the last of all characters */,
                                        "e\xCC\x81",
                                        "it's \"quoted\" \\ back\\n",
                                        "\x7F",
                                        "%s%n{}[]",
                                        "'; DROP TABLE TokenMaster; --",
                                        " x "};
    static const char *const units[] = {"x", "é", "漢", "😀", "\\", "\"", "'"};
    static const size_t lengths[] = {1, 3999, 4000, 4001, 8001, 100000};
    const bool all = backend->unescapes_json();
    char *text = malloc(4 * 100000 + 1);

    assert_non_null(text);
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++)
        if (all || strpbrk(texts[i], "\"\\") == NULL)
            expect_kept(texts[i], texts[i]);
    expect_kept("with nothing", "");
    expect_kept("with NULL", NULL);
    for (size_t i = 0; i < sizeof units / sizeof units[0]; i++) {
        for (size_t k = 0; k < sizeof lengths / sizeof lengths[0]; k++) {
            if (!all && strpbrk(units[i], "\"\\") != NULL)
                continue;
            char *end = text;
            for (size_t n = 0; n < lengths[k]; n++)
                end = stpcpy(end, units[i]);
            expect_kept("long", text);
        }
    }
    free(text);

    /* names: 256 bytes are the most, of any script; an empty branch stays empty */
    struct store_acquire a;
    char company[STORE_TEXT_SIZE] = "";
    for (int i = 0; i < 64; i++)
        strncat(company, "🧾", sizeof company - strlen(company) - 1);
    int64_t id = add_token(company, -1);
    assert_int_equal(GRANT_TOKEN, acquire_new(company, &a));
    assert_int_equal(id, a.token_id);
    assert_string_equal(company, a.company_id_stored);
    a = an_acquire(ID(9), company);
    a.branch = "";
    a.requested_by = "東京 O'Neill";
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    expect("|東京 O'Neill", "SELECT Branch, RequestedBy FROM TokenReservations"
                            " WHERE RequestID = '" ID(9) "'");
    /* they are names, not patterns, nor padded */
    assert_int_equal(GRANT_NO_TOKEN, acquire_new("%", &a));
    assert_int_equal(GRANT_NO_TOKEN, acquire_new("🧾", &a));
}

/* Of very many: as likely one as another, and the only one that can serve is found. */
static void chooses_among_many(void **state)
{
    (void)state;
    enum { COUNT_OF_MANY = 100 };
    struct store_acquire a;
    int64_t ids[COUNT_OF_MANY];
    int taken[COUNT_OF_MANY] = {0};
    char id[UUID_TEXT_SIZE];
    sql("BEGIN TRANSACTION");
    for (int i = 0; i < COUNT_OF_MANY; i++)
        sql("INSERT INTO TokenMaster (CompanyID, ApiKey, TotalTokenLimit)"
            " VALUES ('NT047', 'AIza-of-many-%d', 1000000)",
            i);
    sql("COMMIT TRANSACTION");
    for (int i = 0; i < COUNT_OF_MANY; i++)
        ids[i] = number("SELECT MIN(TokenID) FROM TokenMaster") + i;
    for (int i = 0; i < COUNT_OF_MANY; i++) {
        uuid_v7(id);
        a = an_acquire(id, "NT047");
        a.choice = (uint64_t)i;
        assert_int_equal(GRANT_TOKEN, acquire(&a));
        assert_in_range(a.token_id, ids[0], ids[COUNT_OF_MANY - 1]);
        taken[a.token_id - ids[0]]++;
    }
    for (int i = 0; i < COUNT_OF_MANY; i++)
        assert_int_equal(1, taken[i]);
    sql("UPDATE TokenMaster SET CooldownUntil = '2099-01-01T00:00:00.000Z' WHERE TokenID <> %lld",
        (long long)ids[77]);
    for (uint64_t choice = 0; choice < 8; choice++) {
        assert_int_equal(GRANT_TOKEN, acquire_chosen("NT047", choice, &a));
        assert_int_equal(ids[77], a.token_id);
    }
    sql("UPDATE TokenMaster SET Provider = 'Another' WHERE TokenID = %lld", (long long)ids[77]);
    uuid_v7(id);
    a = an_acquire(id, "NT047");
    assert_int_equal(GRANT_COOLING, acquire(&a));
}

static void add_many(int count)
{
    sql("BEGIN TRANSACTION");
    for (int i = 0; i < count; i++)
        sql("INSERT INTO TokenMaster (CompanyID, ApiKey) VALUES ('NT047', 'AIza-of-many-%d')", i);
    sql("COMMIT TRANSACTION");
}

/* Whatever the store remembers of them, what the rows say now is what counts. */
static void many_are_taken_as_they_are_now(void **state)
{
    (void)state;
    struct store_acquire a;
    add_many(60);
    assert_int_equal(GRANT_TOKEN, acquire_new("NT047", &a));
    sql("UPDATE TokenMaster SET Status = 'Disabled' WHERE TokenID %% 3 = 0");
    sql("UPDATE TokenMaster SET CompanyID = 'Other' WHERE TokenID %% 3 = 1");
    sql("UPDATE TokenMaster SET ApiKey = 'AIza-new' WHERE TokenID %% 3 = 2");
    for (uint64_t choice = 0; choice < 40; choice++) {
        assert_int_equal(GRANT_TOKEN, acquire_chosen("NT047", choice, &a));
        assert_int_equal(2, a.token_id % 3);
        assert_string_equal("AIza-new", a.api_key);
        assert_string_equal("NT047", a.company_id_stored);
    }
    sql("UPDATE TokenMaster SET TotalTokenLimit = 0");
    assert_int_equal(GRANT_UNAVAILABLE, acquire_new("NT047", &a));
    assert_string_equal("", a.api_key);
    int64_t added = add_token("NT047", -1);
    assert_int_equal(GRANT_TOKEN, acquire_new("NT047", &a));
    assert_int_equal(added, a.token_id);
    expect_sums();
}

/* One that can serve again is chosen before long, also while others can. */
static void one_of_many_comes_back(void **state)
{
    (void)state;
    struct store_acquire a;
    int64_t deadline_ms = clock_monotonic_ms() + 30000;
    add_many(40);
    sql("UPDATE TokenMaster SET Status = 'Disabled' WHERE ApiKey = 'AIza-of-many-7'");
    assert_int_equal(GRANT_TOKEN, acquire_new("NT047", &a));
    sql("UPDATE TokenMaster SET Status = 'Active' WHERE ApiKey = 'AIza-of-many-7'");
    for (uint64_t choice = 0; strcmp("AIza-of-many-7", a.api_key) != 0; choice++) {
        assert_true(clock_monotonic_ms() < deadline_ms);
        assert_int_equal(GRANT_TOKEN, acquire_chosen("NT047", choice, &a));
    }
}

/* Nobody gets the share of a neighbour that can't serve. */
static void many_are_equally_likely(void **state)
{
    (void)state;
    enum { MANY = 40, ROUNDS = 20, BATCH = 50 };
    struct store_acquire items[BATCH];
    struct store_acquire *pointers[BATCH];
    char ids[BATCH][UUID_TEXT_SIZE];
    int taken[MANY + 1] = {0};
    uint64_t choice = 1;
    struct err err = {0};
    add_many(MANY);
    assert_int_equal(GRANT_TOKEN, acquire_new("NT047", &items[0]));
    sql("UPDATE TokenMaster SET CooldownUntil = '2099-01-01T00:00:00.000Z' WHERE TokenID %% 8 < 3");
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < BATCH; i++) {
            uuid_v7(ids[i]);
            items[i] = an_acquire(ids[i], "NT047");
            choice = choice * UINT64_C(2862933555777941757) + UINT64_C(3037000493);
            items[i].choice = choice ^ choice >> 32;
            pointers[i] = &items[i];
        }
        assert_int_equal(ERR_NONE, driver->acquire(store, pointers, BATCH, &err));
        for (int i = 0; i < BATCH; i++) {
            assert_int_equal(GRANT_TOKEN, items[i].grant);
            taken[items[i].token_id]++;
        }
    }
    for (int id = 1; id <= MANY; id++) /* 40 each */
        assert_in_range(taken[id], id % 8 < 3 ? 0 : 15, id % 8 < 3 ? 0 : 75);
}

/* ---- many at once ---- */

static int count_threads(void)
{
    DIR *tasks = opendir("/proc/self/task");
    int count = -2; /* . and .. */
    assert_non_null(tasks);
    while (readdir(tasks) != NULL)
        count++;
    closedir(tasks);
    return count;
}

static int threads_at_start;

/* Runs work in count processes that begin at the same moment; each must return 0. A thread that is
 * about to end (a login of the SQL Server driver is nobody's to join) does so before: in the child it
 * would never end for ThreadSanitizer, and one that gets its place would be taken for a second one. */
static void in_processes(int count, int (*work)(int n))
{
    int start[2];
    pid_t children[16];
    while (count_threads() > threads_at_start)
        clock_sleep_until(clock_monotonic_ms() + 1);
    assert_int_equal(0, pipe(start));
    for (int n = 0; n < count; n++) {
        children[n] = fork();
        assert_true(children[n] >= 0);
        if (children[n] == 0) {
            char c;
            close(start[1]);
            if (read(start[0], &c, 1) != 0)
                _exit(99);
            _exit(work(n));
        }
    }
    close(start[0]);
    close(start[1]);
    for (int n = 0; n < count; n++) {
        int status = 0;
        assert_int_equal(children[n], waitpid(children[n], &status, 0));
        assert_true(WIFEXITED(status));
        assert_int_equal(0, WEXITSTATUS(status));
    }
}

/* A store with tokens of NT047, closed again: no child may inherit an open database. */
static void prepare_for_processes(int tokens, int64_t limit)
{
    struct err err = {0};
    store = open_store(false, &err);
    assert_non_null(store);
    for (int i = 0; i < tokens; i++)
        add_token("NT047", limit);
    driver->close(store);
    store = NULL;
}

#define PAIRS 60
#define WORKERS 4

/* In a child: no cmocka there. Every eighth settlement is sent twice. */
static int acquire_and_settle(int n)
{
    struct err err = {0};
    void *own = open_store(false, &err);
    if (own == NULL)
        return 1;
    for (int i = 0; i < PAIRS; i++) {
        char id[UUID_TEXT_SIZE];
        uuid_v7(id);
        struct store_acquire a = an_acquire(id, "NT047");
        struct store_acquire *acquires = &a;
        a.choice = clock_random();
        if (driver->acquire(own, &acquires, 1, &err) != ERR_NONE || a.grant != GRANT_TOKEN)
            return 2;
        struct store_settlement s = a_settlement(id, a.token_id, n + 1);
        struct store_settlement *settlements[] = {&s, &s};
        size_t count = i % 8 == 0 ? 2 : 1;
        if (driver->settle(own, settlements, count, &err) != ERR_NONE || s.code != ERR_NONE)
            return 3;
    }
    driver->close(own);
    return 0;
}

static void processes_keep_the_sums(void **state)
{
    (void)state;
    prepare_for_processes(3, -1);
    in_processes(WORKERS, acquire_and_settle);
    backend->attach();
    assert_int_equal(PAIRS * (1 + 2 + 3 + 4), number("SELECT SUM(TotalUsedTokens)"
                                                     " FROM TokenUsageSummary"));
    assert_int_equal(PAIRS * WORKERS, number("SELECT COUNT(*) FROM TokenUsageLogs"));
    assert_int_equal(PAIRS * WORKERS, number("SELECT COUNT(*) FROM TokenReservations"
                                             " WHERE State = 'settled'"));
    expect("0", "SELECT SUM(ReservedTokens) FROM TokenUsageSummary");
    expect_sums();
}

/* Reserves what it can get, and settles half of that with less than was reserved. */
static int grab(int n)
{
    struct err err = {0};
    void *own = open_store(false, &err);
    (void)n;
    if (own == NULL)
        return 1;
    for (int i = 0; i < 30; i++) {
        char id[UUID_TEXT_SIZE];
        uuid_v7(id);
        struct store_acquire a = an_acquire(id, "NT047");
        struct store_acquire *acquires = &a;
        if (driver->acquire(own, &acquires, 1, &err) != ERR_NONE || a.code != ERR_NONE)
            return 2;
        if (a.grant != GRANT_TOKEN || i % 2 == 0)
            continue;
        struct store_settlement s = a_settlement(id, a.token_id, 60);
        struct store_settlement *settlements = &s;
        if (driver->settle(own, &settlements, 1, &err) != ERR_NONE || s.code != ERR_NONE)
            return 3;
    }
    driver->close(own);
    return 0;
}

static void processes_keep_to_the_limit(void **state)
{
    (void)state;
    prepare_for_processes(1, 3000);
    in_processes(WORKERS, grab);
    backend->attach();
    int64_t taken = number("SELECT TotalUsedTokens + ReservedTokens FROM TokenUsageSummary");
    assert_true(taken > 2800 && taken <= 3000);
    expect_sums();
}

static int open_and_add(int n)
{
    struct err err = {0};
    struct store_new_token t = {.company_id = "NT047", .api_key = "key-0123456789", .limit = n};
    int64_t id = 0;
    void *own = open_store(false, &err);
    if (own == NULL || driver->token_add(own, "tester", &t, &id, &err) != ERR_NONE) {
        fprintf(stderr, "process %d: %s\n", n, err.message);
        return 1;
    }
    driver->close(own);
    return 0;
}

static void ten_processes_set_up_at_once(void **state)
{
    (void)state;
    in_processes(10, open_and_add);
    backend->attach();
    expect("10|1", "SELECT COUNT(*), (SELECT COUNT(*) FROM SchemaVersion) FROM TokenMaster");
}

static void *acquire_in_thread(void *context)
{
    struct err err = {0};
    struct store_acquire *a = context;
    if (driver->acquire(store, &a, 1, &err) != ERR_NONE)
        return NULL;
    return context;
}

static void threads_share_a_store(void **state)
{
    (void)state;
    pthread_t threads[8];
    struct store_acquire items[8];
    char ids[8][UUID_TEXT_SIZE];
    add_token("NT047", -1);
    for (int i = 0; i < 8; i++) {
        uuid_v7(ids[i]);
        items[i] = an_acquire(ids[i], "NT047");
        assert_int_equal(0, pthread_create(&threads[i], NULL, acquire_in_thread, &items[i]));
    }
    for (int i = 0; i < 8; i++) {
        void *done = NULL;
        expect_view("Active|1", VIEW_TOKENS_BY_STATUS, ALL, "Status Count");
        pthread_join(threads[i], &done);
        assert_ptr_equal(&items[i], done);
        assert_int_equal(GRANT_TOKEN, items[i].grant);
    }
    expect("800", "SELECT ReservedTokens FROM TokenUsageSummary");
}

/* ---- idempotency keys ---- */

#define COUNT_KEYS "SELECT COUNT(*) FROM IdempotencyKeys"
#define THE_KEYS "SELECT CompanyID, IdempotencyKey, RequestID, State FROM IdempotencyKeys"

static struct store_acquire a_keyed(const char *request_id, const char *company, const char *key)
{
    struct store_acquire a = an_acquire(request_id, company);
    a.idempotency_key = key;
    return a;
}

/* Another request's: nothing is granted, and the first is named. */
static void expect_duplicate(struct store_acquire *a, const char *first, bool done)
{
    assert_int_equal(GRANT_DUPLICATE, acquire(a));
    assert_string_equal(first, a->first_request_id);
    assert_true(done == a->first_is_done);
    assert_int_equal(0, a->token_id);
    assert_string_equal("", a->api_key);
}

static void settle_key_of(const char *request_id, int64_t token_id,
                          enum store_idempotency idempotency)
{
    struct store_settlement s = a_settlement(request_id, token_id, 5);
    s.request_count = idempotency == STORE_KEY_DONE;
    s.idempotency = idempotency;
    settle(&s);
}

static void a_request_takes_its_key_with_a_token(void **state)
{
    (void)state;
    char earliest[CLOCK_TEXT_SIZE];
    char latest[CLOCK_TEXT_SIZE];
    char text[64];
    add_token("NT047", -1);
    struct store_acquire a = a_keyed(ID(1), "nt047", "Order-7");
    clock_format(clock_wall_ms() + A_DAY_MS, earliest);
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    clock_format(clock_wall_ms() + A_DAY_MS, latest);
    assert_string_equal("", a.first_request_id);
    expect("NT047|Order-7|" ID(1) "|in_progress", THE_KEYS);
    backend->row("SELECT ExpiresAt FROM IdempotencyKeys", text, sizeof text);
    assert_true(strcmp(earliest, text) <= 0 && strcmp(text, latest) <= 0);

    /* its own: the same acquire again, and the next */
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    a.sequence = 2;
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    expect("1", COUNT_KEYS);
    struct store_acquire other = a_keyed(ID(2), "NT047", "Order-7");
    expect_duplicate(&other, ID(1), false);
    expect("2", "SELECT COUNT(*) FROM TokenReservations");
    settle_key_of(ID(1), 1, STORE_KEY_DONE);
    expect_duplicate(&other, ID(1), true);

    /* other keys: case counts; and none at all */
    other = a_keyed(ID(2), "NT047", "order-7");
    assert_int_equal(GRANT_TOKEN, acquire(&other));
    other = a_keyed(ID(3), "NT047", NULL);
    assert_int_equal(GRANT_TOKEN, acquire(&other));
    expect("2", COUNT_KEYS);
    expect_sums();
}

static void a_key_is_of_its_company(void **state)
{
    (void)state;
    add_token("Müller GmbH", -1);
    add_token("ΟΔΟΣ", -1);
    struct store_acquire a = a_keyed(ID(1), "MÜLLER gmbh", "k");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    expect("Müller GmbH", "SELECT CompanyID FROM IdempotencyKeys");
    a = a_keyed(ID(2), "οδος", "k");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    a = a_keyed(ID(3), "müller gmbh", "k");
    expect_duplicate(&a, ID(1), false);
    a = a_keyed(ID(3), "Οδος", "k");
    expect_duplicate(&a, ID(2), false);
    expect("2", COUNT_KEYS);
    /* none of its tokens is Active any more; and then a newer one, in another spelling */
    sql("UPDATE TokenMaster SET Status = 'Expired'");
    a = a_keyed(ID(3), "müller GMBH", "k");
    expect_duplicate(&a, ID(1), false);
    add_token("Müller GMBH", -1);
    expect_duplicate(&a, ID(1), false);
}

static void a_key_that_spent_nothing_may_come_again(void **state)
{
    (void)state;
    int64_t id = add_token("NT047", -1);
    struct store_acquire a = a_keyed(ID(1), "NT047", "k");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    settle_key_of(ID(2), id, STORE_KEY_FREE); /* not its request */
    settle_key_of(ID(2), id, STORE_KEY_DONE);
    settle_key_of(ID(1), id, STORE_KEY_NONE);
    expect("NT047|k|" ID(1) "|in_progress", THE_KEYS);
    settle_key_of(ID(1), id, STORE_KEY_FREE);
    expect("0", COUNT_KEYS);
    a = a_keyed(ID(3), "NT047", "k");
    assert_int_equal(GRANT_TOKEN, acquire(&a));

    /* done, and stays so; also where the usage row came before */
    settle_for(ID(3), id, "NT047", "b", "u", 5, T0);
    settle_key_of(ID(3), id, STORE_KEY_DONE);
    expect("NT047|k|" ID(3) "|done", THE_KEYS);
    settle_key_of(ID(3), id, STORE_KEY_FREE);
    expect("NT047|k|" ID(3) "|done", THE_KEYS);
    expect("2", "SELECT COUNT(*) FROM TokenUsageLogs");
    expect_sums();
}

static void a_key_is_kept_for_a_day(void **state)
{
    (void)state;
    int64_t id = add_token("NT047", -1);
    struct store_acquire a = a_keyed(ID(1), "NT047", "k");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    settle_key_of(ID(1), id, STORE_KEY_DONE);
    sql("UPDATE IdempotencyKeys SET ExpiresAt = %s, CreatedAt = '2020-01-01T00:00:00.000Z'",
        backend->a_minute_ago);
    a = a_keyed(ID(2), "nt047", "k");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    expect("NT047|k|" ID(2) "|in_progress", THE_KEYS);
    expect("0", COUNT_KEYS " WHERE ExpiresAt < %s OR CreatedAt < %s", backend->in_an_hour,
           backend->a_minute_ago);
    a = a_keyed(ID(3), "NT047", "k");
    expect_duplicate(&a, ID(2), false);
    settle_key_of(ID(1), id, STORE_KEY_FREE);
    expect("1", COUNT_KEYS);
    /* one's own that is over: another day of it */
    sql("UPDATE IdempotencyKeys SET ExpiresAt = %s", backend->a_minute_ago);
    a = a_keyed(ID(2), "NT047", "k");
    a.sequence = 2;
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    expect("1", COUNT_KEYS " WHERE ExpiresAt > %s", backend->in_an_hour);
}

static void a_refused_request_keeps_no_key(void **state)
{
    (void)state;
    struct store_acquire a = a_keyed(ID(1), "Nobody", "k");
    assert_int_equal(GRANT_NO_TOKEN, acquire(&a));
    int64_t id = add_token("NT047", 100);
    struct store_acquire first = an_acquire(ID(2), "NT047");
    assert_int_equal(GRANT_TOKEN, acquire(&first));
    a = a_keyed(ID(3), "NT047", "k");
    assert_int_equal(GRANT_BUSY, acquire(&a));
    sql("UPDATE TokenMaster SET CooldownUntil = %s", backend->in_an_hour);
    assert_int_equal(GRANT_COOLING, acquire(&a));
    sql("UPDATE TokenMaster SET Status = 'Expired'");
    assert_int_equal(GRANT_EXPIRED, acquire(&a));
    expect("0", COUNT_KEYS);
    /* the fallback key is as good as a token */
    a.fallback_if_none = true;
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    assert_int_equal(0, a.token_id);
    expect("NT047|k|" ID(3) "|in_progress", THE_KEYS);

    static const char *const bad[] = {
        "", "1234567890123456789012345678901234567890123456789012345678901234"
            "12345678901234567890123456789012345678901234567890123456789012345"};
    for (size_t i = 0; i < 2; i++) {
        struct err err = {0};
        struct store_acquire *item = &a;
        a = a_keyed(ID(4), "NT047", bad[i]);
        assert_int_equal(ERR_NONE, driver->acquire(store, &item, 1, &err));
        assert_int_equal(ERR_BAD_VALUE, a.code);
    }
    sql("UPDATE TokenMaster SET Status = 'Active', CooldownUntil = NULL, TotalTokenLimit = NULL"
        " WHERE TokenID = %lld",
        (long long)id);
    a = a_keyed(ID(4), "NT047", bad[1] + 1); /* 128 */
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    if (!backend->unescapes_json())
        return;
    a = a_keyed(ID(5), "NT047", "\\ \"'%_[a]{}~!");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    a = a_keyed(ID(6), "NT047", "\\ \"'%_[a]{}~!");
    expect_duplicate(&a, ID(5), false);
}

/* What became of the token before is on record all the same. */
static void a_duplicate_brings_its_fault(void **state)
{
    (void)state;
    int64_t id = add_token("NT047", -1);
    struct store_acquire a = an_acquire(ID(1), "NT047");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    struct store_acquire first = a_keyed(ID(2), "NT047", "k");
    assert_int_equal(GRANT_TOKEN, acquire(&first));
    a = a_keyed(ID(1), "NT047", "k");
    a.sequence = 2;
    a.previous_token_id = id;
    a.previous = (struct store_token_fault){STORE_FAULT_COOLDOWN, 60000, "slow down"};
    expect_duplicate(&a, ID(2), false);
    expect("slow down|1", "SELECT StatusReason, " IS_SET("CooldownUntil") " FROM TokenMaster");
    expect("released", "SELECT State FROM TokenReservations WHERE RequestID = '" ID(1) "'");
    expect("100", "SELECT ReservedTokens FROM TokenUsageSummary");
    expect_sums();
}

static void a_batch_pays_once_for_a_key(void **state)
{
    (void)state;
    static const char *const ids[] = {ID(1), ID(2), ID(2), ID(3), ID(4)};
    static const char *const keys[] = {"k", "k", NULL, "other", "other"};
    struct store_acquire items[5];
    struct store_acquire *pointers[5];
    struct err err = {0};
    add_token("NT047", 200);
    for (size_t i = 0; i < 5; i++) {
        items[i] = a_keyed(ids[i], i == 3 ? "Nobody" : "nt047", keys[i]);
        items[i].sequence = i == 2 ? 2 : 1;
        pointers[i] = &items[i];
    }
    assert_int_equal(ERR_NONE, driver->acquire(store, pointers, 5, &err));
    assert_int_equal(GRANT_TOKEN, items[0].grant);
    assert_int_equal(GRANT_DUPLICATE, items[1].grant);
    assert_string_equal(ID(1), items[1].first_request_id);
    assert_false(items[1].first_is_done);
    assert_int_equal(GRANT_TOKEN, items[2].grant);
    assert_int_equal(GRANT_NO_TOKEN, items[3].grant);
    assert_int_equal(GRANT_BUSY, items[4].grant);
    expect("NT047|k|" ID(1) "|in_progress", THE_KEYS);
    expect("2|1", "SELECT COUNT(*), (" COUNT_KEYS ") FROM TokenReservations");

    /* one request's two acquires; two keys at once */
    sql("UPDATE TokenMaster SET TotalTokenLimit = NULL");
    for (size_t i = 0; i < 4; i++) {
        items[i] = a_keyed(i < 2 ? ID(5) : ids[i], "NT047", i < 3 ? "k2" : "k3");
        items[i].sequence = i == 1 ? 2 : 1;
    }
    items[2].request_id = ID(6);
    assert_int_equal(ERR_NONE, driver->acquire(store, pointers, 4, &err));
    assert_int_equal(GRANT_TOKEN, items[0].grant);
    assert_int_equal(GRANT_TOKEN, items[1].grant);
    assert_int_equal(GRANT_DUPLICATE, items[2].grant);
    assert_string_equal(ID(5), items[2].first_request_id);
    assert_int_equal(GRANT_TOKEN, items[3].grant);
    expect("3", COUNT_KEYS);
    expect_sums();
}

/* Its tokens are spent: it is reserved, whoever has the key. */
static void what_is_replayed_takes_no_key_from_others(void **state)
{
    (void)state;
    add_token("NT047", -1);
    struct store_acquire a = a_keyed(ID(1), "NT047", "k");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    struct store_acquire late = a_keyed(ID(2), "nt047", "k");
    late.fallback_only = true;
    assert_int_equal(GRANT_TOKEN, acquire(&late));
    assert_int_equal(0, late.token_id);
    expect("NT047|k|" ID(1) "|in_progress", THE_KEYS);
    settle_key_of(ID(2), 0, STORE_KEY_DONE);
    expect("NT047|k|" ID(1) "|in_progress", THE_KEYS);

    late = a_keyed(ID(3), "nt047", "late");
    late.fallback_only = true;
    assert_int_equal(GRANT_TOKEN, acquire(&late));
    expect("NT047|" ID(3),
           "SELECT CompanyID, RequestID FROM IdempotencyKeys WHERE IdempotencyKey = 'late'");
    a = a_keyed(ID(4), "NT047", "late");
    expect_duplicate(&a, ID(3), false);
    sql("UPDATE IdempotencyKeys SET ExpiresAt = %s", backend->a_minute_ago);
    late = a_keyed(ID(5), "NT047", "k");
    late.fallback_only = true;
    assert_int_equal(GRANT_TOKEN, acquire(&late));
    expect(ID(5), "SELECT RequestID FROM IdempotencyKeys WHERE IdempotencyKey = 'k'");
}

static void keys_of_the_dead_are_done_and_old_ones_go(void **state)
{
    (void)state;
    struct err err = {0};
    int expired = -1;
    add_token("NT047", -1);
    struct store_acquire a = a_keyed(ID(1), "NT047", "dead");
    a.expires_ms = 0;
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    a = a_keyed(ID(2), "NT047", "dead too");
    a.expires_ms = 0;
    a.fallback_only = true;
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    a = a_keyed(ID(3), "NT047", "alive");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    a = a_keyed(ID(4), "NT047", "old");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    sql("UPDATE IdempotencyKeys SET ExpiresAt = %s WHERE IdempotencyKey = 'old'",
        backend->a_minute_ago);
    sql("UPDATE TokenReservations SET ExpiresAt = %s WHERE RequestID IN ('" ID(1) "', '" ID(2) "')",
        backend->a_minute_ago);
    assert_int_equal(ERR_NONE, driver->expire_reservations(store, &expired, &err));
    assert_int_equal(2, expired);
    expect("3|2",
           "SELECT COUNT(*), SUM(CASE State WHEN 'done' THEN 1 ELSE 0 END) FROM IdempotencyKeys");
    expect(ID(3), "SELECT RequestID FROM IdempotencyKeys WHERE State = 'in_progress'");
    a = a_keyed(ID(5), "NT047", "dead");
    expect_duplicate(&a, ID(1), true);
    assert_int_equal(ERR_NONE, driver->expire_reservations(store, &expired, &err));
    assert_int_equal(0, expired);
    /* nothing but a key that is over */
    sql("UPDATE IdempotencyKeys SET ExpiresAt = %s WHERE State = 'done'", backend->a_minute_ago);
    assert_int_equal(ERR_NONE, driver->expire_reservations(store, &expired, &err));
    assert_int_equal(0, expired);
    expect("1", COUNT_KEYS);
}

static void threads_pay_once_for_a_key(void **state)
{
    (void)state;
    pthread_t threads[8];
    struct store_acquire items[8];
    char ids[8][UUID_TEXT_SIZE];
    add_token("NT047", -1);
    sql("INSERT INTO IdempotencyKeys (CompanyID, IdempotencyKey, RequestID, ExpiresAt)"
        " VALUES ('NT047', 'round 1', 'of yesterday', %s)",
        backend->a_minute_ago);
    for (int round = 0; round < 3; round++) {
        char key[16];
        int winner = -1;
        snprintf(key, sizeof key, "round %d", round);
        for (int i = 0; i < 8; i++) {
            uuid_v7(ids[i]);
            items[i] = a_keyed(ids[i], "NT047", key);
            assert_int_equal(0, pthread_create(&threads[i], NULL, acquire_in_thread, &items[i]));
        }
        for (int i = 0; i < 8; i++) {
            void *done = NULL;
            pthread_join(threads[i], &done);
            assert_ptr_equal(&items[i], done);
            assert_int_equal(ERR_NONE, items[i].code);
            assert_true(items[i].grant == GRANT_TOKEN || items[i].grant == GRANT_DUPLICATE);
            assert_true(items[i].grant == GRANT_DUPLICATE || winner < 0);
            winner = items[i].grant == GRANT_TOKEN ? i : winner;
        }
        assert_true(winner >= 0);
        for (int i = 0; i < 8; i++)
            if (i != winner)
                assert_string_equal(ids[winner], items[i].first_request_id);
    }
    expect("3|300", "SELECT COUNT(*), SUM(EstimatedTokens) FROM TokenReservations");
    expect_sums();
}

/* ---- acquires whose answer nobody heard ---- */

#define SEQUENCE_2                                                                \
    "SELECT State, TokenID, EstimatedTokens, UnknownCalls, " IS_SET(              \
        "ClosedAt") ","                                                           \
                    " TokenSource FROM TokenReservations WHERE RequestID = '" ID( \
                        1) "' AND Sequence = 2"

static struct store_settlement a_release(const char *request_id, int sequence)
{
    return (struct store_settlement){.request_id = request_id,
                                     .company_id = "nt047",
                                     .branch = "Köln",
                                     .requested_by = "jürgen",
                                     .token_source = "fallback",
                                     .release_sequence = sequence};
}

static void an_acquire_that_nobody_heard_of_is_released(void **state)
{
    (void)state;
    int64_t id = add_token("NT047", 1000);
    struct store_settlement s = a_release(ID(1), 2);
    struct store_acquire a = an_acquire(ID(1), "NT047");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    a.sequence = 2;
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    for (int i = 0; i < 2; i++) {
        settle(&s);
        expect("released|1|100|0|1|store", SEQUENCE_2);
        expect("100|0", "SELECT ReservedTokens, TotalUsedTokens FROM TokenUsageSummary");
    }
    expect("open", "SELECT State FROM TokenReservations WHERE Sequence = 1");
    expect("0", "SELECT COUNT(*) FROM TokenUsageLogs");

    /* of the fallback key; one that was given up as dead; one that was settled stays */
    a = an_acquire(ID(2), "NT047");
    a.fallback_only = true;
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    s = a_release(ID(2), 1);
    settle(&s);
    expect("released|1", "SELECT State, " IS_SET(
                             "ClosedAt") " FROM TokenReservations WHERE RequestID = '" ID(2) "'");
    struct err err = {0};
    int expired = 0;
    a = an_acquire(ID(3), "NT047");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    sql("UPDATE TokenReservations SET ExpiresAt = %s WHERE RequestID = '" ID(3) "'",
        backend->a_minute_ago);
    assert_int_equal(ERR_NONE, driver->expire_reservations(store, &expired, &err));
    expect("unsettled|1|100",
           "SELECT r.State, r.UnknownCalls, s.ReservedTokens FROM TokenReservations r"
           " JOIN TokenUsageSummary s ON s.TokenID = r.TokenID WHERE r.RequestID = '" ID(3) "'");
    s = a_release(ID(3), 1);
    settle(&s);
    expect("released|0|100",
           "SELECT r.State, r.UnknownCalls, s.ReservedTokens FROM TokenReservations r"
           " JOIN TokenUsageSummary s ON s.TokenID = r.TokenID WHERE r.RequestID = '" ID(3) "'");
    settle_for(ID(1), id, "NT047", "b", "u", 7, T0);
    s = a_release(ID(1), 1);
    settle(&s);
    expect("settled",
           "SELECT State FROM TokenReservations WHERE RequestID = '" ID(1) "' AND Sequence = 1");
    expect("0|7", "SELECT ReservedTokens, TotalUsedTokens FROM TokenUsageSummary");
    expect_sums();
}

static void a_late_acquire_that_nobody_waits_for_reserves_nothing(void **state)
{
    (void)state;
    struct err err = {0};
    add_token("NT047", 1000);
    /* twice in one batch, with another's */
    struct store_settlement items[3] = {a_release(ID(1), 2), a_release(ID(1), 2),
                                        a_release(ID(2), 1)};
    struct store_settlement *pointers[3] = {&items[0], &items[1], &items[2]};
    items[2].idempotency = STORE_KEY_FREE;
    assert_int_equal(ERR_NONE, driver->settle(store, pointers, 3, &err));
    for (int i = 0; i < 3; i++)
        assert_int_equal(ERR_NONE, items[i].code);
    for (int i = 0; i < 2; i++) {
        struct store_settlement s = a_release(ID(1), 2);
        struct store_acquire late = a_keyed(ID(1), "NT047", "k");
        late.sequence = 2;
        expect("released|NULL|0|0|1|fallback", SEQUENCE_2);
        assert_int_equal(GRANT_TOKEN, acquire(&late));
        assert_int_equal(0, late.token_id);
        assert_string_equal("", late.api_key);
        settle(&s);
    }
    expect("nt047|Köln|jürgen",
           "SELECT CompanyID, Branch, RequestedBy FROM TokenReservations WHERE Sequence = 2");
    expect(log_host(), "SELECT Host FROM TokenReservations WHERE Sequence = 2");
    expect("2|0", "SELECT COUNT(*), (" COUNT_KEYS ") FROM TokenReservations");
    expect("0", "SELECT SUM(ReservedTokens) FROM TokenUsageSummary");
    expect("0", "SELECT COUNT(*) FROM vw_UnsettledRequests");
    expect("released|1", "SELECT State, " IS_SET("ClosedAt") " FROM TokenReservations"
                                                             " WHERE RequestID = '" ID(2) "'");
    /* the next of the same request does */
    struct store_acquire next = an_acquire(ID(1), "NT047");
    next.sequence = 3;
    assert_int_equal(GRANT_TOKEN, acquire(&next));
    assert_int_equal(1, next.token_id);
    expect("100", "SELECT ReservedTokens FROM TokenUsageSummary");

    struct store_settlement bad = a_release(ID(1), -1);
    struct store_settlement *item = &bad;
    assert_int_equal(ERR_NONE, driver->settle(store, &item, 1, &err));
    assert_int_equal(ERR_BAD_VALUE, bad.code);
}

/* The key goes with what is released. */
static void a_released_acquire_frees_its_key(void **state)
{
    (void)state;
    add_token("NT047", -1);
    struct store_acquire a = a_keyed(ID(1), "NT047", "k");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    struct store_settlement s = a_release(ID(1), 1);
    s.idempotency = STORE_KEY_FREE;
    settle(&s);
    expect("0|0", "SELECT COUNT(*), (SELECT SUM(ReservedTokens) FROM TokenUsageSummary) FROM "
                  "IdempotencyKeys");
    a = a_keyed(ID(2), "NT047", "k");
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    expect_sums();
}

/* ---- records that may have been kept already ---- */

static void records_that_come_again_are_kept_once(void **state)
{
    (void)state;
    struct err err = {0};
    struct log_entry of_request = {.wall_ms = T0,
                                   .level = LOG_ERROR,
                                   .logger = "gemini",
                                   .message = "naïve 漢字",
                                   .exception = "because",
                                   .module = "gemini.c",
                                   .function = "call",
                                   .line = 42,
                                   .request_id = ID(1)};
    struct log_entry of_none = {.wall_ms = T0,
                                .level = LOG_INFO,
                                .logger = "main",
                                .message = "up",
                                .module = "main.c",
                                .line = 7};
    struct log_entry new_ones[6] = {of_request, of_request, of_request,
                                    of_request, of_request, of_none};
    struct log_entry *entries[8] = {&of_request, &of_none};
    struct store_retry_attempt known = {.wall_ms = T0,
                                        .attempt = 1,
                                        .request_id = ID(1),
                                        .company_id = "NT047",
                                        .error_message = "x"};
    struct store_retry_attempt new_attempts[3] = {known, known, known};
    const struct store_retry_attempt *attempts[4] = {&known};

    for (int i = 0; i < 3; i++) {
        assert_int_equal(ERR_NONE, driver->record(store, entries, 2, attempts, 1, i > 0, &err));
        expect("2|1", "SELECT COUNT(*), (SELECT COUNT(*) FROM RetryAttempts) FROM ApplicationLogs");
    }
    /* each differs in one thing */
    new_ones[0].wall_ms++;
    new_ones[1].message = "Naïve 漢字";
    new_ones[2].module = "extract.c";
    new_ones[3].line++;
    new_ones[4].request_id = NULL;
    new_ones[5].request_id = ID(2);
    new_attempts[0].wall_ms++;
    new_attempts[1].attempt++;
    memcpy(new_attempts[2].request_id, ID(2), sizeof ID(2));
    for (int i = 0; i < 6; i++)
        entries[2 + i] = &new_ones[i];
    for (int i = 0; i < 3; i++)
        attempts[1 + i] = &new_attempts[i];
    for (int i = 0; i < 2; i++) {
        assert_int_equal(ERR_NONE, driver->record(store, entries, 8, attempts, 4, true, &err));
        expect("8|4", "SELECT COUNT(*), (SELECT COUNT(*) FROM RetryAttempts) FROM ApplicationLogs");
    }
    expect("1",
           "SELECT COUNT(*) FROM ApplicationLogs WHERE Module = 'main.c' AND RequestID IS NULL");
    /* without again nobody looks */
    assert_int_equal(ERR_NONE, driver->record(store, entries, 1, attempts, 1, false, &err));
    expect("9|5", "SELECT COUNT(*), (SELECT COUNT(*) FROM RetryAttempts) FROM ApplicationLogs");
}

/* ---- client keys ---- */

#define HASH(c)                                                     \
    c c c c c c c c c c c c c c c c c c c c c c c c c c c c c c c c \
        "0123456789abcdef0123456789abcdef"

static enum err_code add_client_key(const char *id, const char *hash, const char *company,
                                    const char *label)
{
    struct err err = {0};
    const struct store_new_client_key key = {
        .id = id, .hash = hash, .company_id = company, .label = label};
    enum err_code code = driver->client_key_add(store, "anna", &key, &err);
    assert_int_equal(code, err.code);
    return code;
}

static void knows_client_keys_by_their_hash(void **state)
{
    (void)state;
    struct err err = {0};
    struct store_client_key key = {.id = "?"};
    assert_int_equal(ERR_NO_SUCH_ROW, driver->client_key_find(store, HASH("a"), &key, &err));
    assert_int_equal(ERR_NONE, add_client_key("c0ffee", HASH("a"), "Müller GmbH", "front end ü"));
    assert_int_equal(ERR_NONE,
                     add_client_key("0123456789abcdef0123456789abcdef", HASH("b"), NULL, NULL));
    expect("c0ffee|" HASH("a") "|Müller GmbH|0|front end ü|NULL",
           "SELECT ClientKeyID, KeyHash, CompanyID, IsAdmin, Label, RevokedAt FROM ClientKeys "
           "WHERE CompanyID IS NOT NULL");
    assert_int_equal(ERR_NONE, driver->client_key_find(store, HASH("a"), &key, &err));
    assert_string_equal("c0ffee", key.id);
    assert_string_equal("Müller GmbH", key.company_id);
    assert_false(key.is_admin);
    assert_int_equal(ERR_NONE, driver->client_key_find(store, HASH("b"), &key, &err));
    assert_string_equal("0123456789abcdef0123456789abcdef", key.id);
    assert_string_equal("", key.company_id);
    assert_true(key.is_admin);
    assert_int_equal(ERR_NO_SUCH_ROW, driver->client_key_find(store, HASH("c"), &key, &err));
    assert_int_equal(ERR_NO_SUCH_ROW, driver->client_key_find(store, "' OR 1 = 1", &key, &err));
    expect("anna|client key added|ClientKeys|c0ffee|Müller GmbH|NULL|front end ü",
           "SELECT Actor, Action, ObjectType, ObjectID, CompanyID, RequestID, Detail FROM AuditLog "
           "WHERE AuditID = 1");
    expect("NULL|NULL", "SELECT CompanyID, Detail FROM AuditLog WHERE AuditID = 2");
    expect("0", "SELECT COUNT(*) FROM AuditLog WHERE Detail LIKE '%%0123456789%%'");

    /* there already; or no such thing */
    static const char sixty_five[] = HASH("a") "0";
    assert_int_equal(ERR_BAD_VALUE, add_client_key("c0ffee", HASH("c"), "Other", NULL));
    assert_int_equal(ERR_BAD_VALUE, add_client_key("d0", HASH("a"), "Other", NULL));
    assert_int_equal(ERR_BAD_VALUE, add_client_key("d0", sixty_five, "Other", NULL));
    assert_int_equal(ERR_BAD_VALUE, add_client_key("d0", "abc", "Other", NULL));
    assert_int_equal(ERR_BAD_VALUE, add_client_key("", HASH("c"), "Other", NULL));
    assert_int_equal(ERR_BAD_VALUE, add_client_key("xyz", HASH("c"), "Other", NULL));
    assert_int_equal(ERR_BAD_VALUE, add_client_key("d0", HASH("c"), "", NULL));
    assert_int_equal(ERR_BAD_VALUE, add_client_key("d0", HASH("c"), "Other", "two\nlines"));
    expect("2|2", "SELECT COUNT(*), (SELECT COUNT(*) FROM AuditLog) FROM ClientKeys");
}

static void a_revoked_client_key_opens_nothing(void **state)
{
    (void)state;
    struct err err = {0};
    struct store_client_key key;
    char before[64];
    assert_int_equal(ERR_NONE, add_client_key("a1", HASH("a"), "NT047", NULL));
    assert_int_equal(ERR_NONE, add_client_key("b2", HASH("b"), "NT047", NULL));
    assert_int_equal(ERR_NONE, driver->client_key_revoke(store, "otto", "a1", &err));
    assert_int_equal(ERR_NO_SUCH_ROW, driver->client_key_find(store, HASH("a"), &key, &err));
    assert_int_equal(ERR_NONE, driver->client_key_find(store, HASH("b"), &key, &err));
    expect("otto|client key revoked|ClientKeys|a1|NT047|NULL",
           "SELECT Actor, Action, ObjectType, ObjectID, CompanyID, Detail FROM AuditLog WHERE "
           "AuditID = 3");
    backend->row("SELECT RevokedAt FROM ClientKeys WHERE ClientKeyID = 'a1'", before,
                 sizeof before);
    usleep(2000);
    assert_int_equal(ERR_NONE, driver->client_key_revoke(store, "anna", "a1", &err));
    expect(before, "SELECT RevokedAt FROM ClientKeys WHERE ClientKeyID = 'a1'");
    expect("3", "SELECT COUNT(*) FROM AuditLog");
    assert_int_equal(ERR_NO_SUCH_ROW, driver->client_key_revoke(store, "anna", "c3", &err));
    assert_int_equal(ERR_BAD_VALUE, driver->client_key_revoke(store, "anna", "'; --", &err));
    /* it stays: neither its ID nor its hash comes back */
    assert_int_equal(ERR_BAD_VALUE, add_client_key("a1", HASH("c"), "NT047", NULL));
    assert_int_equal(ERR_BAD_VALUE, add_client_key("d4", HASH("a"), "NT047", NULL));
}

static void shows_client_keys(void **state)
{
    (void)state;
    struct err err = {0};
    struct shown shown = {.columns = "KeyHash"};
    expect_view("", VIEW_CLIENT_KEYS, ALL, "ClientKeyID");
    assert_int_equal(ERR_NONE, add_client_key("a1", HASH("a"), "Ärzte", "one"));
    assert_int_equal(ERR_NONE, add_client_key("b2", HASH("b"), NULL, NULL));
    assert_int_equal(ERR_NONE, add_client_key("c3", HASH("c"), "NT047", NULL));
    assert_int_equal(ERR_NONE, driver->client_key_revoke(store, "anna", "c3", &err));
    sql("UPDATE ClientKeys SET CreatedAt = '2026-11-22T12:13:21.123Z' WHERE ClientKeyID = 'a1'");
    sql("UPDATE ClientKeys SET CreatedAt = '2026-11-22T12:13:21.120Z' WHERE ClientKeyID = 'b2'");
    sql("UPDATE ClientKeys SET CreatedAt = '2026-11-22T12:13:21.123Z', RevokedAt = "
        "'2026-11-23T00:00:00.000Z'"
        " WHERE ClientKeyID = 'c3'");
    expect_view("a1|Ärzte|0|one|2026-11-22T12:13:21.123Z|NULL;c3|NT047|0|NULL|2026-11-22T12:13:21."
                "123Z|2026-11-23T00:00:00.000Z;"
                "b2|NULL|1|NULL|2026-11-22T12:13:21.120Z|NULL",
                VIEW_CLIENT_KEYS, ALL, "ClientKeyID CompanyID IsAdmin Label CreatedAt RevokedAt");
    expect_view("a1", VIEW_CLIENT_KEYS, (struct store_filter){.company_id = "ärzte"},
                "ClientKeyID");
    expect_view("a1;c3", VIEW_CLIENT_KEYS, (struct store_filter){.since_ms = T0}, "ClientKeyID");
    expect_view("b2", VIEW_CLIENT_KEYS, (struct store_filter){.until_ms = T0}, "ClientKeyID");
    expect_view("a1;c3", VIEW_CLIENT_KEYS, (struct store_filter){.limit = 2}, "ClientKeyID");
    /* never the hash */
    assert_int_equal(ERR_NONE,
                     driver->query(store, VIEW_CLIENT_KEYS, &ALL, show_row, &shown, &err));
    assert_true(shown.missing);
    assert_int_equal(ERR_BAD_VALUE,
                     driver->query(store, VIEW_CLIENT_KEYS, &(struct store_filter){.before_id = 5},
                                   show_row, &shown, &err));
    assert_int_equal(ERR_BAD_VALUE, driver->query(store, VIEW_CLIENT_KEYS,
                                                  &(struct store_filter){.request_id = ID(1)},
                                                  show_row, &shown, &err));
}

/* ---- sealed API keys ---- */

/* Not a seal, but it tells the TokenID. */
static enum err_code seal_openly(void *context, int64_t token_id, const char *api_key,
                                 char out[STORE_API_KEY_SIZE], struct err *err)
{
    const char *refused = context;
    if (strcmp(api_key, refused) == 0)
        return err_set(err, ERR_CONFIG, "cannot seal that");
    snprintf(out, STORE_API_KEY_SIZE, "sealed:test:%lld:%.900s", (long long)token_id, api_key);
    return ERR_NONE;
}

static enum err_code add_sealed(const char *company, const char *key, int64_t *id, struct err *err)
{
    static char refused[] = "no-way";
    const struct store_sealer sealer = {.seal = seal_openly, .context = refused};
    const struct store_new_token token = {
        .company_id = company, .api_key = key, .limit = 500, .threshold = 0.5, .sealer = &sealer};
    return driver->token_add(store, "anna", &token, id, err);
}

static void seals_the_key_of_a_token_with_the_row(void **state)
{
    (void)state;
    struct err err = {0};
    int64_t id = 0;
    assert_int_equal(ERR_NONE, add_sealed("NT047", "AIza-very-secret", &id, &err));
    assert_int_equal(1, id);
    expect("sealed:test:1:AIza-very-secret|Active|Gemini|500|NULL",
           "SELECT ApiKey, Status, Provider, TotalTokenLimit, StatusReason FROM TokenMaster");
    expect("1|0.5|500", "SELECT TokenID, Threshold, TotalRemainingTokens FROM TokenUsageSummary");
    expect("1|token added|1|anna",
           "SELECT COUNT(*), MAX(Action), MAX(ObjectID), MAX(Actor) FROM AuditLog");
    expect("0", "SELECT COUNT(*) FROM AuditLog WHERE Detail LIKE '%%secret%%'");
    expect_view("1|sealed|Active", VIEW_TOKENS, ALL, "TokenID ApiKey Status");
    struct store_acquire a = an_acquire(ID(1), "NT047"); /* the driver knows nothing of seals */
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    assert_string_equal("sealed:test:1:AIza-very-secret", a.api_key);

    /* one that cannot be sealed leaves nothing */
    err = (struct err){0};
    assert_int_equal(ERR_CONFIG, add_sealed("NT047", "no-way", &id, &err));
    assert_string_equal("cannot seal that", err.message);
    err = (struct err){0};
    assert_int_equal(ERR_BAD_VALUE, add_sealed("NT047", "two words", &id, &err));
    expect("1|1|1", "SELECT COUNT(*), (SELECT COUNT(*) FROM TokenUsageSummary), (SELECT COUNT(*) "
                    "FROM AuditLog) FROM TokenMaster");
    expect_sums();

    /* and nothing in the way of the next */
    assert_int_equal(ERR_NONE, add_sealed("NT047", "AIza-2", &id, &err));
    char sealed[64];
    snprintf(sealed, sizeof sealed, "sealed:test:%lld:AIza-2|Active", (long long)id);
    expect(sealed, "SELECT ApiKey, Status FROM TokenMaster WHERE TokenID = %lld", (long long)id);
    expect("2|2", "SELECT COUNT(*), (SELECT COUNT(*) FROM AuditLog) FROM TokenMaster");
}

static void shows_keys_to_be_sealed_page_by_page(void **state)
{
    (void)state;
    struct err err = {0};
    struct store_token_key keys[4];
    size_t count = 9;
    assert_int_equal(ERR_NONE, driver->token_keys(store, 0, keys, 4, &count, &err));
    assert_int_equal(0, count);
    backend->widen_keys();
    sql("INSERT INTO TokenMaster (CompanyID, ApiKey) VALUES ('A', 'key-1')");
    sql("INSERT INTO TokenMaster (CompanyID, ApiKey, Status) VALUES ('A', ' key-2 \n', 'Expired')");
    sql("INSERT INTO TokenMaster (CompanyID, ApiKey) VALUES ('A', '%01025d')", 7);
    sql("INSERT INTO TokenMaster (CompanyID, ApiKey, Provider) VALUES ('A', '', 'Other')");
    sql("INSERT INTO TokenMaster (CompanyID, ApiKey) VALUES ('A', '%01024d')", 7);
    sql("INSERT INTO TokenMaster (CompanyID, ApiKey) VALUES ('A', 'schlüssel')");
    assert_int_equal(ERR_NONE, driver->token_keys(store, 0, keys, 2, &count, &err));
    assert_int_equal(2, count);
    assert_int_equal(1, keys[0].token_id);
    assert_string_equal("key-1", keys[0].api_key);
    assert_int_equal(2, keys[1].token_id);
    assert_string_equal(" key-2 \n", keys[1].api_key);
    assert_int_equal(ERR_NONE, driver->token_keys(store, 2, keys, 2, &count, &err));
    assert_int_equal(2, count);
    assert_int_equal(4, keys[0].token_id);
    assert_string_equal("", keys[0].api_key);
    assert_int_equal(5, keys[1].token_id);
    assert_int_equal(1024, strlen(keys[1].api_key));
    assert_int_equal(ERR_NONE, driver->token_keys(store, 5, keys, 4, &count, &err));
    assert_int_equal(1, count);
    assert_string_equal("schlüssel", keys[0].api_key);
    assert_int_equal(ERR_NONE, driver->token_keys(store, 6, keys, 4, &count, &err));
    assert_int_equal(0, count);
}

static void reseals_only_what_was_read(void **state)
{
    (void)state;
    struct err err = {0};
    static const char *const others[] = {"aiza-plain", "AIza-plain ", "AIza-plai", "",
                                         "AIza-plain\n"};
    struct store_token_key key = {.token_id = add_token("NT047", -1)};
    sql("UPDATE TokenMaster SET ApiKey = 'AIza-plain'");
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) {
        snprintf(key.api_key, sizeof key.api_key, "%s", others[i]);
        err = (struct err){0};
        assert_int_equal(ERR_NO_SUCH_ROW,
                         driver->token_reseal(store, "anna", &key, "sealed:x", &err));
    }
    snprintf(key.api_key, sizeof key.api_key, "AIza-plain");
    assert_int_equal(ERR_BAD_VALUE, driver->token_reseal(store, "anna", &key, "two words", &err));
    expect("AIza-plain|1", "SELECT ApiKey, (SELECT COUNT(*) FROM AuditLog) FROM TokenMaster");
    assert_int_equal(ERR_NONE, driver->token_reseal(store, "anna", &key, "sealed:x", &err));
    expect("sealed:x|Active", "SELECT ApiKey, Status FROM TokenMaster");
    expect("anna|token key sealed|TokenMaster|1|NT047|NULL",
           "SELECT Actor, Action, ObjectType, ObjectID, CompanyID, Detail FROM AuditLog WHERE "
           "AuditID = 2");
    assert_int_equal(ERR_NO_SUCH_ROW, driver->token_reseal(store, "anna", &key, "sealed:y", &err));
    key.token_id = 99;
    assert_int_equal(ERR_NO_SUCH_ROW, driver->token_reseal(store, "anna", &key, "sealed:y", &err));

    /* as it is there, with what clings to it; and one that is empty */
    static const char *const odd[] = {" pasted \n", "trailing ", "漢字", ""};
    key.token_id = 1;
    for (size_t i = 0; i < sizeof odd / sizeof odd[0]; i++) {
        snprintf(key.api_key, sizeof key.api_key, "%s", odd[i]);
        sql("UPDATE TokenMaster SET ApiKey = '%s'", odd[i]);
        assert_int_equal(ERR_NONE, driver->token_reseal(store, "anna", &key, "sealed:z", &err));
        expect("sealed:z", "SELECT ApiKey FROM TokenMaster");
    }
}

/* ---- the embedded store only ---- */

static bool one_row(void *context, size_t columns, const char *const *names,
                    const struct store_value *values)
{
    (void)context;
    (void)columns;
    (void)names;
    (void)values;
    return false;
}

static void the_files_are_private_and_durable(void **state)
{
    (void)state;
    static const char *const suffixes[] = {"", "-wal", "-shm", ".lock"};
    char path[160];
    struct stat st;
    add_token("NT047", -1);
    for (size_t i = 0; i < 4; i++) {
        snprintf(path, sizeof path, "%s%s", fixture.path, suffixes[i]);
        assert_int_equal(0, stat(path, &st));
        assert_int_equal(0600, st.st_mode & 0777);
    }
    expect("wal", "PRAGMA journal_mode");
    assert_int_equal(4, driver->schema_version(store));
    assert_int_equal(1, driver->leaders(store));
    struct err err = {0};
    assert_int_equal(ERR_NONE, driver->ping(store, &err));
    sql("DELETE FROM SchemaVersion");
    assert_int_equal(ERR_SCHEMA, driver->ping(store, &err));
}

static void sets_up_only_where_allowed(void **state)
{
    (void)state;
    struct err err = {0};
    fixture.config.store.auto_create = false;
    assert_null(open_store(false, &err));
    assert_int_equal(ERR_SCHEMA, err.code);
    assert_non_null(strstr(err.message, "extractctl migrate"));
    assert_int_equal(-1, access(fixture.path, F_OK));

    /* an empty file is a missing schema */
    close(open(fixture.path, O_CREAT | O_WRONLY, 0600));
    assert_null(open_store(false, &err));
    assert_int_equal(ERR_SCHEMA, err.code);
    assert_non_null(strstr(err.message, "extractctl migrate"));

    store = open_store(true, &err);
    assert_non_null(store);
    backend->attach();
    add_token("NT047", -1);
    driver->close(store);
    store = open_store(false, &err);
    assert_non_null(store);
    driver->close(store);
    expect("1", "SELECT COUNT(*) FROM TokenMaster");

    /* older: with nothing lost */
    sql("UPDATE SchemaVersion SET Version = 0");
    sql("DROP VIEW vw_TokenStatus");
    assert_null(open_store(false, &err));
    assert_int_equal(ERR_SCHEMA, err.code);
    store = open_store(true, &err);
    assert_non_null(store);
    driver->close(store);
    expect("1|4", "SELECT COUNT(*), (SELECT Version FROM SchemaVersion) FROM vw_TokenStatus");
    sql("UPDATE SchemaVersion SET Version = 1");
    sql("DROP TRIGGER TR_TokenMaster_TotalTokenLimit");
    assert_null(open_store(false, &err));
    assert_int_equal(ERR_SCHEMA, err.code);
    assert_non_null(strstr(err.message, "extractctl migrate"));
    fixture.config.store.auto_create = true;
    store = open_store(false, &err);
    assert_non_null(store);
    assert_int_equal(4, driver->schema_version(store));
    driver->close(store);
    expect("4|1|1",
           "SELECT Version, Major, (SELECT COUNT(*) FROM sqlite_master WHERE type = 'trigger')"
           " FROM SchemaVersion");

    /* newer, compatible: as it is */
    sql("UPDATE SchemaVersion SET Version = 7");
    store = open_store(true, &err);
    assert_non_null(store);
    assert_int_equal(7, driver->schema_version(store));
    driver->close(store);
    expect("7", "SELECT Version FROM SchemaVersion");
    sql("UPDATE SchemaVersion SET Major = 2");
    assert_null(open_store(true, &err));
    assert_int_equal(ERR_SCHEMA, err.code);
    assert_non_null(strstr(err.message, "newer"));
}

static void the_setup_script_changes_nothing_twice(void **state)
{
    (void)state;
    int64_t id = add_token("NT047", 100);
    settle_for(ID(1), id, "NT047", "b", "u", 10, T0);
    backend->exec(embed_setup_sqlite);
    expect("1|10|1", "SELECT COUNT(*), MAX(TotalUsedTokens), (SELECT COUNT(*) FROM SchemaVersion)"
                     " FROM TokenUsageSummary");
    sql("UPDATE SchemaVersion SET Version = 7"); /* a later one's database */
    backend->exec(embed_setup_sqlite);
    expect("7", "SELECT Version FROM SchemaVersion");
}

/* As version 3 has made it. By hand the script cannot add columns; it then notes no version. */
static void tables_of_an_older_version_get_their_columns(void **state)
{
    (void)state;
    struct err err = {0};
    int64_t id = add_token("NT047", 100);
    settle_for(ID(1), id, "NT047", "b", "u", 10, T0);
    driver->close(store);
    sql("DROP VIEW vw_RecentErrors");
    sql("DROP INDEX IX_ApplicationLogs_TraceID");
    sql("ALTER TABLE ApplicationLogs DROP COLUMN TraceID");
    sql("ALTER TABLE TokenUsageLogs DROP COLUMN TraceID");
    sql("UPDATE SchemaVersion SET Version = 3");
    store = open_store(false, &err);
    assert_non_null(store);
    assert_int_equal(4, driver->schema_version(store));
    struct store_settlement s = a_settlement(ID(2), id, 5);
    s.trace_id = TRACE;
    settle(&s);
    expect("2|15|" TRACE,
           "SELECT COUNT(*), SUM(TotalTokensUsed), MAX(TraceID) FROM TokenUsageLogs");
    expect("0", "SELECT COUNT(TraceID) FROM vw_RecentErrors");
    expect_sums();

    sql("DROP VIEW vw_RecentErrors");
    sql("DROP INDEX IX_ApplicationLogs_TraceID");
    sql("ALTER TABLE ApplicationLogs DROP COLUMN TraceID");
    sql("UPDATE SchemaVersion SET Version = 3");
    for (const char *at = embed_setup_sqlite; *at != '\0';) { /* as a shell does, past errors */
        sqlite3_stmt *statement = NULL;
        sqlite3_prepare_v2(fixture.raw, at, -1, &statement, &at);
        sqlite3_step(statement);
        sqlite3_finalize(statement);
    }
    expect("3", "SELECT Version FROM SchemaVersion");
}

static bool is_refused(const char *statement)
{
    return sqlite3_exec(fixture.raw, statement, NULL, NULL, NULL) == SQLITE_CONSTRAINT;
}

/* Whoever writes the rows: the old service during a parallel run, a DBA. */
static void the_tables_keep_their_rules(void **state)
{
    (void)state;
    add_token("NT047", 100);
    sql("PRAGMA foreign_keys = ON");
    static const char once[] = "INSERT INTO TokenUsageLogs (RequestID, TokenID) VALUES ('r', 1)";
    static const char fallback[] = "INSERT INTO TokenUsageLogs (RequestID) VALUES ('r')";
    static const char old[] = "INSERT INTO TokenUsageLogs (TokenID) VALUES (1)";
    assert_false(is_refused(once));
    assert_true(is_refused(once));
    assert_false(is_refused(fallback));
    assert_true(is_refused(fallback));
    assert_false(is_refused(old)); /* rows without a RequestID are not ours to count */
    assert_false(is_refused(old));
    assert_true(is_refused("INSERT INTO TokenUsageSummary (TokenID) VALUES (1)"));
    assert_true(is_refused("INSERT INTO TokenUsageLogs (TokenID) VALUES (99)"));
    assert_true(is_refused("DELETE FROM TokenMaster"));
    assert_true(is_refused("INSERT INTO TokenReservations (RequestID, Sequence, CompanyID, State,"
                           " ExpiresAt) VALUES ('r', 1, 'c', 'odd', '')"));
    assert_true(is_refused("INSERT INTO ClientKeys (ClientKeyID, KeyHash) VALUES ('k', 'h')"));
    assert_true(is_refused("INSERT INTO SchemaVersion VALUES (2, 1, 1, '')"));
}

static void refuses_what_is_no_store(void **state)
{
    (void)state;
    struct err err = {0};
    FILE *f = fopen(fixture.path, "w");
    fprintf(f, "%0*d", 8192, 7);
    fclose(f);
    assert_null(open_store(true, &err));
    assert_int_equal(ERR_STORE_UNAVAILABLE, err.code);

    /* no directory: whoever asks, and nothing that `extractctl migrate` could mend */
    char missing[] = "/nonexistent/sub/store.db";
    fixture.config.store.path = missing;
    for (int migrate = 0; migrate < 2; migrate++) {
        for (int may = 0; may < 2; may++) {
            fixture.config.store.auto_create = may != 0;
            assert_null(open_store(migrate != 0, &err));
            assert_int_equal(ERR_STORE_UNAVAILABLE, err.code);
            assert_non_null(strstr(err.message, "the directory /nonexistent/sub is missing"));
            assert_null(strstr(err.message, "migrate"));
        }
    }
    char beside[] = "no_such_directory/store.db";
    fixture.config.store.path = beside;
    assert_null(open_store(false, &err));
    assert_non_null(strstr(err.message, "the directory no_such_directory is missing"));
    char in_a_file[160];
    snprintf(in_a_file, sizeof in_a_file, "%s/store.db", fixture.path);
    fixture.config.store.path = in_a_file;
    fixture.config.store.auto_create = false;
    assert_null(open_store(false, &err));
    assert_int_equal(ERR_STORE_UNAVAILABLE, err.code);

    /* a directory in its place */
    unlink(fixture.path);
    assert_int_equal(0, mkdir(fixture.path, 0700));
    fixture.config.store.path = fixture.path;
    assert_null(open_store(true, &err));
    assert_int_equal(ERR_STORE_UNAVAILABLE, err.code);
    rmdir(fixture.path);
}

/* Bytes of the disk's own making, where a table or an index was: the store's trouble, not the data's. */
static void a_damaged_store_is_unavailable(void **state)
{
    (void)state;
    struct err err = {0};
    char garbage[4096];
    prepare_for_processes(1, -1);
    backend->attach();
    int64_t page = number("SELECT rootpage FROM sqlite_master"
                          " WHERE name = 'IX_TokenMaster_CompanyID_Status'");
    assert_int_equal(sizeof garbage, number("PRAGMA page_size"));
    sqlite3_close(fixture.raw);
    fixture.raw = NULL;
    memset(garbage, 0xA5, sizeof garbage);
    int fd = open(fixture.path, O_WRONLY);
    assert_int_equal(sizeof garbage,
                     pwrite(fd, garbage, sizeof garbage, (off_t)((page - 1) * 4096)));
    close(fd);
    store = open_store(false, &err);
    assert_non_null(store);
    struct store_acquire a = an_acquire(ID(1), "NT047");
    struct store_acquire *items = &a;
    assert_int_equal(ERR_STORE_UNAVAILABLE, driver->acquire(store, &items, 1, &err));
    assert_int_equal(ERR_STORE_UNAVAILABLE, a.code);
    driver->close(store);
    store = NULL;
}

/* Is that the log's descriptor, and not that of a file that was there before? */
static void expect_the_log(int fd)
{
    struct stat opened, named;
    char name[512];

    snprintf(name, sizeof name, "%s-wal", fixture.path);
    assert_int_equal(0, fstat(fd, &opened));
    assert_int_equal(0, stat(name, &named));
    assert_true(opened.st_ino == named.st_ino && opened.st_dev == named.st_dev);
}

/* Nothing is granted or settled before the disk has it. A pipe stands for a disk that refuses. */
static void what_the_disk_refuses_is_not_answered(void **state)
{
    (void)state;
    struct err err = {0};
    struct store_sqlite *inside = store;
    int refusing[2];
    add_token("NT047", -1);
    expect_the_log(inside->log_fd);
    int log_fd = inside->log_fd;
    assert_int_equal(0, pipe(refusing));

    inside->log_fd = refusing[0];
    struct store_acquire a = an_acquire(ID(1), "NT047");
    struct store_acquire *items = &a;
    assert_int_equal(ERR_STORE_UNAVAILABLE, driver->acquire(store, &items, 1, &err));
    assert_non_null(strstr(err.message, "cannot be brought to the disk"));
    assert_int_equal(ERR_STORE_UNAVAILABLE, a.code);
    assert_true(a.maybe_reserved);
    assert_string_equal("", a.api_key);

    inside->log_fd = log_fd; /* the same again: what was reserved is granted, once */
    assert_true(atomic_load(&inside->log_in_doubt));
    assert_int_equal(GRANT_TOKEN, acquire(&a));
    assert_false(atomic_load(&inside->log_in_doubt));
    expect("1", "SELECT COUNT(*) FROM TokenReservations");

    inside->log_fd = refusing[0];
    struct store_settlement s = a_settlement(ID(1), 1, 30);
    struct store_settlement *settlements = &s;
    assert_int_equal(ERR_STORE_UNAVAILABLE, driver->settle(store, &settlements, 1, &err));
    assert_int_equal(ERR_STORE_UNAVAILABLE, s.code);
    inside->log_fd = log_fd;
    settle(&s);
    expect("1|30", "SELECT COUNT(*), SUM(TotalTokensUsed) FROM TokenUsageLogs");
    expect_sums();
    close(refusing[0]);
    close(refusing[1]);
}

static void another_writer_is_waited_for_only_so_long(void **state)
{
    (void)state;
    struct err err = {0};
    fixture.config.store.query_timeout_ms = 300;
    void *impatient = open_store(false, &err);
    assert_non_null(impatient);
    add_token("NT047", -1);
    sql("BEGIN IMMEDIATE");
    struct store_acquire a = an_acquire(ID(1), "NT047");
    struct store_acquire *items = &a;
    int64_t start = clock_monotonic_ms();
    assert_int_equal(ERR_STORE_UNAVAILABLE, driver->acquire(impatient, &items, 1, &err));
    int64_t took = clock_monotonic_ms() - start;
    assert_true(took >= 250 && took < 2000);
    assert_int_equal(ERR_STORE_UNAVAILABLE, a.code);
    assert_string_equal("", a.api_key);
    assert_int_equal(ERR_NONE, driver->query(impatient, VIEW_TOKENS, &ALL, one_row, NULL, &err));
    sql("COMMIT");
    assert_int_equal(ERR_NONE, driver->acquire(impatient, &items, 1, &err));
    assert_int_equal(GRANT_TOKEN, a.grant);
    driver->close(impatient);
}

static void expect_ping(enum err_code expected, void *pinged, int64_t least_ms, int64_t most_ms)
{
    struct err err = {0};
    int64_t start = clock_monotonic_ms();
    assert_int_equal(expected, driver->ping(pinged, &err));
    assert_int_equal(expected, err.code);
    int64_t took = clock_monotonic_ms() - start;
    assert_in_range(took, least_ms, most_ms);
}

static void ping_tells_whether_it_can_be_written(void **state)
{
    (void)state;
    struct err err = {0};
    char path[160];
    void *other = open_store(false, &err); /* it waits 5 s for a transaction, but not for a ping */
    fixture.config.store.query_timeout_ms = 200;
    void *impatient = open_store(false, &err);
    assert_non_null(other);
    assert_non_null(impatient);
    expect_ping(ERR_NONE, other, 0, 500);
    expect("0", "SELECT COUNT(*) FROM AuditLog"); /* and it leaves nothing */
    sql("BEGIN EXCLUSIVE");
    expect_ping(ERR_STORE_UNAVAILABLE, other, 900, 1900);
    expect_ping(ERR_STORE_UNAVAILABLE, impatient, 150, 800);
    sql("ROLLBACK");
    expect_ping(ERR_NONE, other, 0, 500);
    expect_ping(ERR_NONE, impatient, 0, 500);

    /* another process that has the turn, and stands still */
    snprintf(path, sizeof path, "%s.lock", fixture.path);
    int fd = open(path, O_RDWR);
    assert_int_equal(0, flock(fd, LOCK_EX));
    expect_ping(ERR_STORE_UNAVAILABLE, impatient, 150, 800);
    close(fd);
    expect_ping(ERR_NONE, impatient, 0, 500);

    /* who has just written need not try */
    add_token("NT047", -1);
    sql("BEGIN IMMEDIATE");
    expect_ping(ERR_NONE, store, 0, 100);
    clock_sleep_until(clock_monotonic_ms() + 1100);
    expect_ping(ERR_STORE_UNAVAILABLE, store, 900, 1900);
    sql("ROLLBACK");
    expect_ping(ERR_NONE, store, 0, 500);
    driver->close(impatient);
    driver->close(other);
}

/* Holds the host's lock for a time, from another open file as another process would. */
static int take_host_lock(void)
{
    char path[160];
    snprintf(path, sizeof path, "%s.lock", fixture.path);
    int fd = open(path, O_RDWR);
    assert_true(fd >= 0);
    assert_int_equal(0, flock(fd, LOCK_EX));
    return fd;
}

static void *let_go(void *context)
{
    clock_sleep_until(clock_monotonic_ms() + 200);
    close(*(int *)context);
    return NULL;
}

static void the_host_lock_is_waited_for_only_so_long(void **state)
{
    (void)state;
    struct err err = {0};
    sigset_t all;
    sigset_t before;
    sigset_t after;
    pthread_t thread;
    fixture.config.store.query_timeout_ms = 400;
    void *impatient = open_store(false, &err);
    assert_non_null(impatient);
    add_token("NT047", -1);
    struct store_acquire a = an_acquire(ID(1), "NT047");
    struct store_acquire *items = &a;

    /* as in a worker: all signals are blocked, and stay so */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int fd = take_host_lock();
    int64_t start = clock_monotonic_ms();
    assert_int_equal(ERR_STORE_UNAVAILABLE, driver->acquire(impatient, &items, 1, &err));
    int64_t took = clock_monotonic_ms() - start;
    assert_true(took >= 350 && took < 2000);
    assert_int_equal(0, pthread_create(&thread, NULL, let_go, &fd));
    assert_int_equal(ERR_NONE, driver->acquire(impatient, &items, 1, &err));
    assert_int_equal(GRANT_TOKEN, a.grant);
    pthread_join(thread, NULL);
    pthread_sigmask(SIG_SETMASK, NULL, &after);
    assert_int_equal(1, sigismember(&after, SIGRTMIN + 1));
    sigset_t pending;
    sigpending(&pending);
    assert_int_equal(0, sigismember(&pending, SIGRTMIN + 1));
    pthread_sigmask(SIG_SETMASK, &before, NULL);

    /* and no tick comes later, into somebody's read() */
    fd = take_host_lock();
    assert_int_equal(ERR_STORE_UNAVAILABLE, driver->acquire(impatient, &items, 1, &err));
    close(fd);
    const struct timespec while_ticks_would_come = {.tv_nsec = 150000000};
    assert_int_equal(0, nanosleep(&while_ticks_would_come, NULL));
    driver->close(impatient);
}

/* In a child: the disk takes no more, then takes it again. */
static int fill_up(int n)
{
    struct err err = {0};
    struct rlimit limit;
    struct stat st;
    char wal[160];
    void *own = open_store(false, &err);
    (void)n;
    signal(SIGXFSZ, SIG_IGN);
    snprintf(wal, sizeof wal, "%s-wal", fixture.path);
    if (own == NULL || stat(wal, &st) != 0 || getrlimit(RLIMIT_FSIZE, &limit) != 0)
        return 1;
    struct rlimit small = {.rlim_cur = (rlim_t)st.st_size + 100, .rlim_max = limit.rlim_max};
    struct store_acquire a = an_acquire(ID(1), "NT047");
    struct store_acquire *items = &a;
    setrlimit(RLIMIT_FSIZE, &small);
    if (driver->acquire(own, &items, 1, &err) != ERR_STORE_UNAVAILABLE)
        return 2;
    setrlimit(RLIMIT_FSIZE, &limit);
    if (driver->acquire(own, &items, 1, &err) != ERR_NONE || a.grant != GRANT_TOKEN)
        return 3;
    driver->close(own);
    return 0;
}

static void rolls_back_after_an_io_error(void **state)
{
    (void)state;
    prepare_for_processes(1, -1);
    in_processes(1, fill_up);
    backend->attach();
    expect("1", "SELECT COUNT(*) FROM TokenReservations");
    expect_sums();
}

/* One item's data fails inside the transaction: here a rule of the DBA's own. */
static void a_refused_row_fails_alone(void **state)
{
    (void)state;
    struct err err = {0};
    static const char *const ids[] = {ID(1), ID(2), ID(3)};
    struct store_settlement items[3];
    struct store_settlement *pointers[3];
    int64_t id = add_token("NT047", -1);
    for (size_t i = 0; i < 3; i++) {
        struct store_acquire a = an_acquire(ids[i], "NT047");
        assert_int_equal(GRANT_TOKEN, acquire(&a));
        items[i] = a_settlement(ids[i], id, 10);
        pointers[i] = &items[i];
    }
    items[1].usage.total_tokens = 999;
    sql("CREATE TRIGGER no_more AFTER UPDATE ON TokenUsageSummary WHEN NEW.TotalUsedTokens > 900"
        " BEGIN SELECT RAISE(ABORT, 'secret row data'); END");
    assert_int_equal(ERR_NONE, driver->settle(store, pointers, 3, &err));
    assert_int_equal(ERR_NONE, items[0].code);
    assert_int_equal(ERR_BAD_VALUE, items[1].code);
    assert_null(strstr(items[1].err.message, "secret"));
    assert_int_equal(ERR_NONE, items[2].code);
    expect("2|20", "SELECT COUNT(*), SUM(TotalTokensUsed) FROM TokenUsageLogs");
    expect("open", "SELECT State FROM TokenReservations WHERE RequestID = '" ID(2) "'");
    expect_sums();
}

static void a_failed_batch_changes_nothing(void **state)
{
    (void)state;
    struct err err = {0};
    struct store_acquire items[2] = {an_acquire(ID(1), "NT047"), an_acquire(ID(2), "NT047")};
    struct store_acquire *pointers[] = {&items[0], &items[1]};
    add_token("NT047", -1);
    /* the second item meets an error that is nobody's data */
    sql("CREATE TRIGGER broken AFTER INSERT ON TokenReservations"
        " WHEN NEW.RequestID = '" ID(2) "' BEGIN SELECT ABS(-9223372036854775807 - 1); END");
    assert_int_equal(ERR_INTERNAL, driver->acquire(store, pointers, 2, &err));
    assert_int_equal(ERR_INTERNAL, items[0].code);
    assert_int_equal(ERR_INTERNAL, items[1].code);
    assert_string_equal("", items[0].api_key);
    assert_int_equal(0, items[0].token_id);
    expect("0", "SELECT COUNT(*) FROM TokenReservations");
    expect("0", "SELECT ReservedTokens FROM TokenUsageSummary");
    sql("DROP TRIGGER broken");
    assert_int_equal(ERR_NONE, driver->acquire(store, pointers, 2, &err));
    assert_int_equal(GRANT_TOKEN, items[1].grant);
}

/* ---- the file is replaced ---- */

static const char *beside(const char *name)
{
    static char paths[4][160];
    static unsigned n;
    char *path = paths[n++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", fixture.directory, name);
    return path;
}

/* A backup of the store as it is, under another name, in which all keys say so. */
static void back_up(const char *name)
{
    char text[256];
    sqlite3 *copy;
    sql("VACUUM INTO '%s'", beside(name));
    assert_int_equal(SQLITE_OK, sqlite3_open(beside(name), &copy));
    snprintf(text, sizeof text, "UPDATE TokenMaster SET ApiKey = 'key-of-%s'", name);
    assert_int_equal(SQLITE_OK, sqlite3_exec(copy, text, NULL, NULL, NULL));
    assert_int_equal(SQLITE_OK, sqlite3_close(copy));
    assert_int_equal(0, chmod(beside(name), 0600));
}

static void move(const char *from, const char *to)
{
    char source[160];
    snprintf(source, sizeof source, "%s", beside(from));
    assert_int_equal(0, rename(source, beside(to)));
}

/* The test's own connection, to the file that has the name now. */
static void attach_again(void)
{
    sqlite3_close(fixture.raw);
    fixture.raw = NULL;
    backend->attach();
}

static void expect_key(const char *key)
{
    struct store_acquire a;
    assert_int_equal(GRANT_TOKEN, acquire_new("NT047", &a));
    assert_string_equal(key, a.api_key);
}

/* As the middle of a request meets it. */
static void expect_unavailable(const char *words)
{
    struct err err = {0};
    char id[UUID_TEXT_SIZE];
    uuid_v7(id);
    struct store_acquire a = an_acquire(id, "NT047");
    struct store_acquire *items = &a;
    assert_int_equal(ERR_STORE_UNAVAILABLE, driver->acquire(store, &items, 1, &err));
    if (strstr(err.message, words) == NULL)
        fail_msg("%s", err.message);
    assert_int_equal(ERR_STORE_UNAVAILABLE, driver->ping(store, &err));
    assert_int_equal(ERR_STORE_UNAVAILABLE,
                     driver->query(store, VIEW_TOKENS, &ALL, one_row, NULL, &err));
}

static void remove_others(void)
{
    static const char *const names[] = {"old.db",    "old.db-wal", "old.db-shm",
                                        "backup.db", "a.db",       "b.db"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        unlink(beside(names[i]));
}

static int teardown_replaced(void **state)
{
    remove_others();
    return teardown(state);
}

static int teardown_closed_replaced(void **state)
{
    remove_others();
    return teardown_closed(state);
}

static void follows_a_replaced_file(void **state)
{
    (void)state;
    add_token("NT047", -1);
    back_up("backup.db");
    for (int i = 0; i < 20; i++) { /* a log full of what the backup does not have */
        struct store_acquire a;
        assert_int_equal(GRANT_TOKEN, acquire_new("NT047", &a));
        assert_true(strncmp("AIza-test", a.api_key, 9) == 0);
    }
    expect_view("1", VIEW_TOKENS, ALL, "TokenID"); /* the readers have it open */
    move("backup.db", "store.db");
    expect_key("key-of-backup.db");
    struct err err = {0};
    assert_int_equal(ERR_NONE, driver->ping(store, &err));
    expect_view("…p.db", VIEW_TOKENS, ALL, "ApiKey");
    expect_the_log(((struct store_sqlite *)store)->log_fd);
    attach_again();
    expect("1", "SELECT COUNT(*) FROM TokenReservations");
    expect("ok", "PRAGMA integrity_check");
    expect("wal", "PRAGMA journal_mode");
    /* and it is a store as any: for one who comes now, too */
    driver->close(store);
    store = open_store(false, &err);
    assert_non_null(store);
    expect_key("key-of-backup.db");
    expect("2", "SELECT COUNT(*) FROM TokenReservations");
    expect_sums();
}

/* A reader may be the first to see it; and what the old file's log held goes into the old file. */
static void loses_nothing_of_a_file_that_was_moved_away(void **state)
{
    (void)state;
    sqlite3 *old;
    add_token("NT047", -1);
    back_up("backup.db");
    for (int i = 0; i < 20; i++) {
        struct store_acquire a;
        assert_int_equal(GRANT_TOKEN, acquire_new("NT047", &a));
    }
    sqlite3_close(fixture.raw);
    fixture.raw = NULL;
    move("store.db", "old.db");
    move("backup.db", "store.db");
    expect_view("…p.db", VIEW_TOKENS, ALL, "ApiKey");
    expect_key("key-of-backup.db");
    backend->attach();
    expect("1", "SELECT COUNT(*) FROM TokenReservations");
    old = fixture.raw;
    assert_int_equal(SQLITE_OK, sqlite3_open(beside("old.db"), &fixture.raw));
    expect("20", "SELECT COUNT(*) FROM TokenReservations");
    expect("ok", "PRAGMA integrity_check");
    sqlite3_close(fixture.raw);
    fixture.raw = old;
}

static void a_file_that_was_moved_away_is_whole_at_the_end(void **state)
{
    (void)state;
    add_token("NT047", -1);
    for (int i = 0; i < 20; i++) {
        struct store_acquire a;
        assert_int_equal(GRANT_TOKEN, acquire_new("NT047", &a));
    }
    sqlite3_close(fixture.raw);
    fixture.raw = NULL;
    move("store.db", "old.db");
    driver->close(store);
    store = NULL;
    assert_int_equal(SQLITE_OK, sqlite3_open(beside("old.db"), &fixture.raw));
    expect("20", "SELECT COUNT(*) FROM TokenReservations");
    expect("ok", "PRAGMA integrity_check");
}

static void waits_for_a_file_that_vanished(void **state)
{
    (void)state;
    struct err err = {0};
    add_token("NT047", -1);
    move("store.db", "old.db");
    expect_unavailable("missing");
    assert_int_equal(-1, access(fixture.path, F_OK));
    move("old.db", "store.db");
    expect_view("1", VIEW_TOKENS, ALL, "TokenID");
    struct store_acquire a;
    assert_int_equal(GRANT_TOKEN, acquire_new("NT047", &a));
    assert_int_equal(ERR_NONE, driver->ping(store, &err));
    expect("1", "SELECT COUNT(*) FROM TokenReservations");
    expect("ok", "PRAGMA integrity_check");
}

static void write_file(const char *name, size_t size)
{
    FILE *f = fopen(beside(name), "w");
    assert_non_null(f);
    for (size_t i = 0; i < size; i++)
        fputc('x', f);
    fclose(f);
}

static void follows_to_a_store_only(void **state)
{
    (void)state;
    struct stat st;
    add_token("NT047", -1);
    back_up("a.db");
    back_up("b.db");
    sqlite3 *raw = fixture.raw;
    assert_int_equal(SQLITE_OK, sqlite3_open(beside("b.db"), &fixture.raw));
    sql("UPDATE SchemaVersion SET Version = 3, Major = 2");
    sqlite3_close(fixture.raw);
    fixture.raw = raw;
    write_file("backup.db", 0);
    move("backup.db", "store.db");
    expect_unavailable("schema");
    assert_int_equal(0, stat(fixture.path, &st));
    assert_int_equal(0, st.st_size);
    write_file("backup.db", 10000);
    move("backup.db", "store.db");
    expect_unavailable("SQLite 26");
    assert_int_equal(0, stat(fixture.path, &st));
    assert_int_equal(10000, st.st_size);
    move("b.db", "store.db");
    expect_unavailable("newer");
    assert_int_equal(0, unlink(fixture.path));
    assert_int_equal(0, mkdir(fixture.path, 0700));
    expect_unavailable("embedded store");
    assert_int_equal(0, rmdir(fixture.path));
    expect_unavailable("missing");
    move("a.db", "store.db");
    expect_key("key-of-a.db");
    attach_again();
    expect("1", "SELECT COUNT(*) FROM TokenReservations");
    expect("ok", "PRAGMA integrity_check");
}

static void expect_key_by(void *own, const char *key)
{
    void *first = store;
    store = own;
    expect_key(key);
    store = first;
}

/* One may come from the first file to the third, past the log of the second; and leave a file for good
 * while its name, and that of its log, are another's. */
static void follow_at_different_times(void **state)
{
    (void)state;
    struct err err = {0};
    add_token("NT047", -1);
    back_up("a.db");
    back_up("b.db");
    void *other = open_store(false, &err);
    assert_non_null(other);
    move("a.db", "store.db");
    expect_key("key-of-a.db");
    move("b.db", "store.db");
    expect_key_by(other, "key-of-b.db");
    expect_key_by(other, "key-of-b.db");
    driver->close(store);
    store = other;
    expect_key("key-of-b.db");
    attach_again();
    expect("3", "SELECT COUNT(*) FROM TokenReservations");
    expect("ok", "PRAGMA integrity_check");
    expect_sums();
}

/* As kill -9 leaves it: the log of a file that is not there any more. */
static void a_log_that_was_left_is_known_at_the_start(void **state)
{
    (void)state;
    struct err err = {0};
    int status = 0;
    sqlite3_close(fixture.raw);
    fixture.raw = NULL;
    driver->close(store);
    store = NULL;
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        store = open_store(false, &err);
        backend->attach();
        add_token("NT047", -1);
        back_up("a.db");
        struct store_acquire a;
        _exit(acquire_new("NT047", &a) == GRANT_TOKEN ? 0 : 1);
    }
    assert_int_equal(pid, waitpid(pid, &status, 0));
    assert_int_equal(0, status);
    assert_int_equal(0, access(beside("store.db-wal"), F_OK));
    move("a.db", "store.db");
    store = open_store(false, &err);
    assert_non_null(store);
    expect_key("key-of-a.db");
    backend->attach();
    expect("1", "SELECT COUNT(*) FROM TokenReservations");
    expect("ok", "PRAGMA integrity_check");
}

static atomic_bool replacing;
static atomic_int served;
static atomic_int *opened; /* by how many processes; shared by them */

static bool is_fine(enum err_code code)
{
    return code == ERR_NONE || code == ERR_STORE_UNAVAILABLE;
}

/* One round of all that a request and a probe do. 0, or what was wrong. */
static int one_round(void *own)
{
    struct err err = {0};
    char id[UUID_TEXT_SIZE];
    uuid_v7(id);
    struct store_acquire a = an_acquire(id, "NT047");
    struct store_acquire *acquires = &a;
    enum err_code code = driver->acquire(own, &acquires, 1, &err);
    if (!is_fine(code) || (code == ERR_NONE && (a.code != ERR_NONE || a.grant != GRANT_TOKEN)))
        return 1;
    if (code == ERR_NONE)
        atomic_fetch_add(&served, 1);
    if (!is_fine(driver->query(own, VIEW_TOKENS, &ALL, one_row, NULL, &err)))
        return 2;
    if (!is_fine(driver->ping(own, &err)))
        return 3;
    struct store_settlement s = a_settlement(id, a.token_id, 1);
    struct store_settlement *settlements = &s;
    code = driver->settle(own, &settlements, 1, &err);
    return is_fine(code) ? 0 : 4;
}

/* cp name backup.db && mv backup.db store.db; also for children. */
static bool copy_into_place(const char *name)
{
    char bytes[65536];
    int from = open(beside(name), O_RDONLY);
    int to = open(beside("backup.db"), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    ssize_t n = 0;
    bool good = from >= 0 && to >= 0;
    while (good && (n = read(from, bytes, sizeof bytes)) > 0)
        good = write(to, bytes, (size_t)n) == n;
    good = good && n == 0 && fsync(to) == 0;
    close(from);
    close(to);
    return good && rename(beside("backup.db"), fixture.path) == 0;
}

static void *rounds_in_thread(void *context)
{
    intptr_t wrong = 0;
    (void)context;
    while (atomic_load(&replacing) && wrong == 0)
        wrong = one_round(store);
    return (void *)wrong;
}

static int rounds_in_process(int n)
{
    struct err err = {0};
    void *own = open_store(false, &err);
    int wrong = own == NULL ? 9 : 0;
    atomic_fetch_add(opened, 1);
    while (n == 0 && atomic_load(opened) < WORKERS) /* a store that comes and goes is no start */
        clock_sleep_until(clock_monotonic_ms() + 1);
    int64_t end_ms = clock_monotonic_ms() + 2500;
    for (int i = 0; n == 0 && i < 12 && wrong == 0; i++) { /* the DBA */
        clock_sleep_until(clock_monotonic_ms() + 150);
        if (i % 3 == 1 && rename(fixture.path, beside("old.db")) != 0)
            wrong = 10;
        if (!copy_into_place("a.db"))
            wrong = 11;
    }
    /* On a busy machine all that time may be gone. The DBA's round is in the file that stays. */
    while (wrong == 0 && (clock_monotonic_ms() < end_ms || atomic_load(&served) < 1)) {
        wrong = one_round(own);
        if (clock_monotonic_ms() > end_ms + 120000)
            wrong = 12;
    }
    driver->close(own);
    return wrong;
}

static void threads_follow_together(void **state)
{
    (void)state;
    pthread_t threads[4];
    add_token("NT047", -1);
    back_up("a.db");
    atomic_store(&replacing, true);
    for (int i = 0; i < 4; i++)
        assert_int_equal(0, pthread_create(&threads[i], NULL, rounds_in_thread, NULL));
    for (int i = 0; i < 12; i++) {
        clock_sleep_until(clock_monotonic_ms() + 100);
        assert_true(copy_into_place("a.db"));
    }
    clock_sleep_until(clock_monotonic_ms() + 200);
    atomic_store(&replacing, false);
    for (int i = 0; i < 4; i++) {
        void *wrong = NULL;
        pthread_join(threads[i], &wrong);
        assert_int_equal(0, (intptr_t)wrong);
    }
    assert_true(atomic_load(&served) > 0);
    attach_again();
    expect("ok", "PRAGMA integrity_check");
    expect("key-of-a.db", "SELECT ApiKey FROM TokenMaster");
    expect_sums();
}

static void processes_follow_together(void **state)
{
    (void)state;
    prepare_for_processes(1, -1);
    backend->attach();
    back_up("a.db");
    sqlite3_close(fixture.raw);
    fixture.raw = NULL;
    atomic_store(&served, 0);
    opened = mmap(NULL, sizeof *opened, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(opened != MAP_FAILED);
    in_processes(WORKERS, rounds_in_process);
    munmap(opened, sizeof *opened);
    backend->attach();
    expect("ok", "PRAGMA integrity_check");
    expect("key-of-a.db", "SELECT ApiKey FROM TokenMaster");
    assert_true(number("SELECT COUNT(*) FROM TokenReservations") > 0);
    expect_sums();
}

/* ---- SQL Server only ---- */

static void sets_up_a_database_only_where_allowed(void **state)
{
    (void)state;
    struct err err = {0};
    fixture.config.store.auto_create = false;
    assert_null(open_store(false, &err));
    assert_int_equal(ERR_SCHEMA, err.code);
    assert_non_null(strstr(err.message, "extractctl migrate"));

    store = open_store(true, &err);
    if (store == NULL)
        fail_msg("%s", err.message);
    backend->attach();
    add_token("NT047", -1);
    driver->close(store);
    store = open_store(false, &err);
    assert_non_null(store);
    assert_int_equal(ERR_NONE, driver->ping(store, &err));
    assert_true(driver->leaders(store) >= 1);
    assert_int_equal(number("SELECT Version FROM SchemaVersion"), driver->schema_version(store));
    driver->close(store);

    /* older: with nothing lost */
    int64_t version = number("SELECT Version FROM SchemaVersion");
    sql("UPDATE SchemaVersion SET Version = 0");
    sql("DROP VIEW vw_TokenStatus");
    assert_null(open_store(false, &err));
    assert_int_equal(ERR_SCHEMA, err.code);
    assert_non_null(strstr(err.message, "extractctl migrate"));
    fixture.config.store.auto_create = true;
    store = open_store(false, &err);
    if (store == NULL)
        fail_msg("%s", err.message);
    driver->close(store);
    assert_int_equal(version, number("SELECT Version FROM SchemaVersion"));
    expect("1", "SELECT COUNT(*) FROM vw_TokenStatus");

    /* newer, compatible: as it is */
    sql("UPDATE SchemaVersion SET Version = 70");
    store = open_store(true, &err);
    assert_non_null(store);
    assert_int_equal(70, driver->schema_version(store));
    driver->close(store);
    expect("70", "SELECT Version FROM SchemaVersion");
    sql("UPDATE SchemaVersion SET Major = 2");
    assert_null(open_store(true, &err));
    assert_int_equal(ERR_SCHEMA, err.code);
    assert_non_null(strstr(err.message, "newer"));
    store = NULL;
}

/* A rule of the DBA's own fails a transaction of three, and then one of the three alone. */
static void a_refused_row_fails_alone_in_the_end(void **state)
{
    (void)state;
    struct err err = {0};
    static const char *const ids[] = {ID(1), ID(2), ID(3)};
    struct store_settlement items[3];
    struct store_settlement *pointers[3];
    int64_t id = add_token("NT047", -1);
    for (size_t i = 0; i < 3; i++) {
        struct store_acquire a = an_acquire(ids[i], "NT047");
        assert_int_equal(GRANT_TOKEN, acquire(&a));
        items[i] = a_settlement(ids[i], id, 10);
        pointers[i] = &items[i];
    }
    items[1].usage.total_tokens = 999;
    sql("ALTER TABLE TokenUsageSummary ADD CONSTRAINT CK_Test CHECK (TotalUsedTokens <= 900)");
    assert_int_equal(ERR_BAD_VALUE, driver->settle(store, pointers, 3, &err));
    for (size_t i = 0; i < 3; i++)
        assert_int_equal(ERR_BAD_VALUE, items[i].code);
    assert_null(strstr(err.message, "CK_Test"));
    expect("0", "SELECT COUNT(*) FROM TokenUsageLogs");
    expect("3", "SELECT COUNT(*) FROM TokenReservations WHERE State = 'open'");

    /* with what store.c does about it: each alone, and what is still refused is kept aside */
    struct store_outbox_status outbox = {0};
    struct store *whole = store_open_with(driver, &fixture.config, &err);
    assert_non_null(whole);
    assert_int_equal(ERR_NONE, store_settle(whole, items, 3, clock_monotonic_ms() + 60000));
    assert_int_equal(ERR_NONE, store_outbox_status(whole, &outbox, &err));
    assert_int_equal(1, outbox.dead);
    assert_int_equal(0, outbox.waiting);
    store_close(whole);
    expect("2|20", "SELECT COUNT(*), SUM(TotalTokensUsed) FROM TokenUsageLogs");
    expect("open", "SELECT State FROM TokenReservations WHERE RequestID = '" ID(2) "'");
    expect_sums();
}

/* Who calls the procedures by hand gets what the programs get. */
static void the_procedures_check_what_comes_in(void **state)
{
    (void)state;
#define ADD "usp_AddToken @Actor = 'anna', @CompanyID = 'B', @ApiKey = "
#define ADD_TO "usp_AddToken @Actor = 'anna', @ApiKey = 'key', @CompanyID = "
#define SET_KEY "usp_SetTokenKey @Actor = 'anna', @TokenID = 1, @ApiKey = "
#define RESEAL "usp_ResealToken @Actor = 'anna', @TokenID = 1, "
#define ADD_CLIENT_KEY "usp_AddClientKey @Actor = 'anna', @CompanyID = 'B', "
#define DISABLE "usp_SetTokenStatus @Actor = 'anna', @TokenID = 1, @Status = 'Disabled', @Reason = "
    static char sevens[1026];
    memset(sevens, '7', 1025);
    const char *const too_long_a_key = sevens;
    const char *const too_long_a_text = sevens + 1025 - 257;
    const struct {
        const char *expected; /* the beginning of the first row */
        const char *call;
        const char *last; /* parameter */
    } calls[] = {
        {"ok|NULL|1",
         "usp_AddToken @Actor = 'anna', @CompanyID = 'NT047', @TotalTokenLimit = 100, "
         "@ApiKey = ",
         "\r\n AIza-pasted\x7F \n"},
        {"bad_value", ADD, "two words"},
        {"bad_value", ADD, "\n"},
        {"bad_value", ADD, too_long_a_key},
        {"bad_value", ADD_TO, "B\nB"},
        {"bad_value", ADD_TO, " B"},
        {"bad_value", ADD_TO, too_long_a_text},
        {"bad_value", "usp_AddToken @CompanyID = 'B', @ApiKey = 'key', @Actor = ", "an\tna"},
        {"ok|NULL", SET_KEY, "\tAIza-new\n"},
        {"bad_value", SET_KEY, "schlüssel"},
        {"bad_value", SET_KEY, too_long_a_key},
        {"bad_value", DISABLE, "two\nlines"},
        {"bad_value", DISABLE, "next\xC2\x85line"},
        {"bad_value", DISABLE, "another\u2028line"},
        {"bad_value", DISABLE, "at the end "},
        {"bad_value", DISABLE, too_long_a_text},
        {"no_such_row",
         "usp_SetTokenStatus @Actor = 'anna', @TokenID = 9, @Reason = 'x', @Status = ", "Disabled"},
        {"bad_value",
         "usp_AddToken @Actor = 'anna', @CompanyID = 'B', @Pending = 1, @ApiKey = ", "key"},
        {"bad_value", "usp_ActivateToken @TokenID = 1, @ApiKey = ", "two words"},
        {"no_such_row", "usp_ActivateToken @TokenID = 1, @ApiKey = ", "key"},
        {"bad_value", RESEAL "@Expected = 'AIza-new', @ApiKey = ", "two words"},
        {"no_such_row", RESEAL "@ApiKey = 'sealed:x', @Expected = ", "AIza-old"},
        {"bad_value", ADD_CLIENT_KEY "@ClientKeyID = 'a1', @KeyHash = ", "abc"},
        {"bad_value", ADD_CLIENT_KEY "@ClientKeyID = 'a1', @KeyHash = ", HASH("A")},
        {"bad_value", ADD_CLIENT_KEY "@KeyHash = '" HASH("a") "', @ClientKeyID = ", "xyz"},
        {"bad_value", ADD_CLIENT_KEY "@KeyHash = '" HASH("a") "', @ClientKeyID = ",
         "0123456789abcdef0123456789abcdef0"},
        {"no_such_row", "usp_RevokeClientKey @Actor = 'anna', @ClientKeyID = ", "b2"},
    };
    for (size_t i = 0; i < sizeof calls / sizeof calls[0]; i++) {
        char text[2048];
        char value[512];
        snprintf(text, sizeof text, "EXEC dbo.%s'%s'", calls[i].call, calls[i].last);
        backend->row(text, value, sizeof value);
        if (strncmp(calls[i].expected, value, strlen(calls[i].expected)) != 0)
            fail_msg("%s: %s", text, value);
    }
    expect("1|AIza-new|Active", "SELECT COUNT(*), MAX(ApiKey), MAX(Status) FROM TokenMaster");
    expect("2", "SELECT COUNT(*) FROM AuditLog");
    expect("ok|NULL", "EXEC dbo.usp_SetTokenStatus @Actor = 'anna', @TokenID = 1,"
                      " @Status = 'Exceeded', @Reason = '漢字 it''s'");
    expect("Exceeded|漢字 it's", "SELECT Status, StatusReason FROM TokenMaster");
    expect("ok|NULL", "EXEC dbo.usp_SetTokenLimit @Actor = 'anna', @TokenID = 1,"
                      " @TotalTokenLimit = 200, @Threshold = NULL");
    expect("limit 200, now Active", NEWEST_DETAIL);
}

/* The repeat of an acquire, with what has become of the token's key since. */
static void a_repeat_without_a_key_is_refused(void **state)
{
    (void)state;
    static const char again[] =
        "EXEC dbo.usp_AcquireTokens @Items = '[{\"i\":0,\"requestId\":\"r\",\"sequence\":1,"
        "\"companyId\":\"NT047\",\"branch\":null,\"requestedBy\":null,\"estimate\":5,"
        "\"expiresMs\":60000,\"choice\":0,\"previousTokenId\":0,\"fault\":\"none\","
        "\"cooldownMs\":0,\"reason\":null,\"previousSpent\":0,\"fallbackIfNone\":0,"
        "\"fallbackOnly\":0,\"idempotencyKey\":null,\"host\":\"h\",\"processId\":1,"
        "\"excluded\":[]}]'";
    static const struct {
        const char *key;
        const char *expected; /* the beginning of the row */
    } keys[] = {
        {"key\r\n", "0|ok|NULL|token|1|key|NT047|0|0|0"},
        {" another ", "0|ok|NULL|token|1|another|NT047|0|0|0"},
        {"two words", "0|bad_value|token 1 has no usable CompanyID or ApiKey|no_token|0|NULL|"},
    };
    sql("INSERT INTO TokenMaster (CompanyID, ApiKey) VALUES ('NT047', '')");
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        char row[512];
        sql("UPDATE TokenMaster SET ApiKey = '%s'", keys[i].key);
        backend->row(again, row, sizeof row);
        if (strncmp(keys[i].expected, row, strlen(keys[i].expected)) != 0)
            fail_msg("'%s': %s", keys[i].key, row);
    }
    expect("1|5", "SELECT COUNT(*), SUM(EstimatedTokens) FROM TokenReservations");
}

/* ---- a live server only: the setup script itself ---- */

/* The setup script with the first old replaced, run by a tool that goes on after an error. */
static void run_broken_setup(const char *old, const char *new)
{
    const char *at = strstr(embed_setup_database, old);
    char path[128];

    assert_non_null(at);
    snprintf(path, sizeof path, "%s/broken.sql", fixture.directory);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fwrite(embed_setup_database, 1, (size_t)(at - embed_setup_database), f);
    fprintf(f, "%s%s", new, at + strlen(old));
    assert_int_equal(0, fclose(f));
    assert_int_equal(0, mssql_run_script(path));
}

/* In each of its steps. */
static void a_setup_that_failed_notes_no_version(void **state)
{
    (void)state;
    static const struct {
        const char *old;
        const char *new;
    } breakages[] = {
        {"IF @no IS NOT NULL", "SET @no = N'no'\nIF @no IS NOT NULL"},
        {"SET @old = CASE", "SELECT 1 / 0\nSET @old = CASE"},
        {"CREATE TABLE dbo.AuditLog",
         "CREATE TABLE dbo.AuditLog (Odd Odd)\nCREATE TABLE dbo.AuditLog"},
        {"SET @token_type = (SELECT UPPER", "SELECT 1 / 0\nSET @token_type = (SELECT UPPER"},
        {"ON dbo.AuditLog (Timestamp)", "ON dbo.AuditLog (Nothing)"},
        {"MAX(u.LastUsed) AS LastUsed", "MAX(u.Nothing) AS LastUsed"},
        {"AFTER UPDATE\nAS", "AFTER NOTHING\nAS"},
        {"ALTER PROCEDURE dbo.usp_SettleUsage", "ALTER PROCEDURE dbo.usp_SettleNothing"},
        {"GRANT EXECUTE ON dbo.usp_Ping TO extract_app",
         "GRANT EXECUTE ON dbo.usp_Nothing TO extract_app"},
    };
    struct err err = {0};
    backend->attach();
    for (size_t i = 0; i < sizeof breakages / sizeof breakages[0]; i++) {
        sql("DROP PROCEDURE IF EXISTS dbo.usp_SettleUsage"); /* that of the run before is good */
        run_broken_setup(breakages[i].old, breakages[i].new);
        char found[64];
        backend->row("SELECT OBJECT_ID('dbo.SchemaVersion')", found, sizeof found);
        if (strcmp(found, "NULL") != 0)
            fail_msg("a version was noted in spite of: %s", breakages[i].new);
    }
    run_broken_setup("", "");
    expect("6|1", "SELECT Version, Major FROM SchemaVersion");
    /* of an older schema all is replaced, or it stays the older one */
    sql("UPDATE SchemaVersion SET Version = 1");
    run_broken_setup("CREATE VIEW dbo.vw_FailedRetries AS", "CREATE VIEW dbo.vw_FailedRetries SA");
    expect("1", "SELECT Version FROM SchemaVersion");
    store = open_store(true, &err);
    if (store == NULL)
        fail_msg("%s", err.message);
    driver->close(store);
    store = NULL;
    expect("6|0", "SELECT Version, (SELECT COUNT(*) FROM vw_FailedRetries) FROM SchemaVersion");
}

/* ---- tests/tds_server only: faults ---- */

static enum err_code try_acquire(void *from, const char *id, struct store_acquire *a)
{
    struct err err = {0};
    struct store_acquire *items = a;
    *a = an_acquire(id, "NT047");
    enum err_code code = driver->acquire(from, &items, 1, &err);
    assert_int_equal(code, a->code);
    if (code != ERR_NONE) {
        assert_int_equal(code, err.code);
        assert_true(err.message[0] != '\0');
        assert_null(strstr(err.message, "w0rd"));
        assert_null(strstr(err.message, "NT047"));
        assert_null(strstr(err.message, "@Items"));
        assert_string_equal("", a->api_key);
    }
    return code;
}

static void order(const char *procedure, const char *fault)
{
    char command[256];
    snprintf(command, sizeof command, "{\"do\": \"fault\", \"procedure\": \"%s\", %s}", procedure,
             fault);
    mssql_server_control(command);
}

static void errors_have_their_codes(void **state)
{
    (void)state;
    static const struct {
        int number;
        int times; /* 0: for ever */
        enum err_code code;
    } cases[] = {
        {1205, 2, ERR_NONE},
        {1222, 1, ERR_NONE},
        {40613, 1, ERR_NONE},
        {40197, 1, ERR_NONE},
        {49918, 1, ERR_NONE},
        {1205, 1000, ERR_STORE_UNAVAILABLE},
        {1222, 1000, ERR_STORE_UNAVAILABLE},
        {40613, 1000, ERR_STORE_UNAVAILABLE},
        {1105, 1000, ERR_STORAGE_FULL},
        {9002, 1000, ERR_STORAGE_FULL},
        {2812, 1000, ERR_SCHEMA},
        {2628, 1000, ERR_BAD_VALUE},
        {8152, 1000, ERR_BAD_VALUE},
        {547, 1000, ERR_BAD_VALUE},
        {515, 1000, ERR_BAD_VALUE},
        {245, 1000, ERR_BAD_VALUE},
        {8114, 1000, ERR_BAD_VALUE},
        {8134, 1000, ERR_INTERNAL},
        {50000, 1000, ERR_INTERNAL},
    };
    struct err err = {0};
    add_token("NT047", -1);
    fixture.config.store.query_timeout_ms = 500;
    void *own = open_store(false, &err);
    assert_non_null(own);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct store_acquire a;
        char id[UUID_TEXT_SIZE];
        char fault[128];
        uuid_v7(id);
        snprintf(fault, sizeof fault, "\"kind\": \"error\", \"number\": %d, \"times\": %d",
                 cases[i].number, cases[i].times);
        order("usp_AcquireTokens", fault);
        int64_t start = clock_monotonic_ms();
        enum err_code code = try_acquire(own, id, &a);
        if (code != cases[i].code)
            fail_msg("error %d, %d times: code %d, not %d: %s", cases[i].number, cases[i].times,
                     (int)code, (int)cases[i].code, a.err.message);
        assert_true(clock_monotonic_ms() - start < 5000);
        if (cases[i].code == ERR_SCHEMA)
            assert_non_null(strstr(a.err.message, "extractctl migrate"));
        /* nothing is left of it */
        mssql_server_control("{\"do\": \"reset\"}");
        assert_int_equal(ERR_NONE, try_acquire(own, id, &a));
        assert_int_equal(GRANT_TOKEN, a.grant);
    }
    driver->close(own);
    expect_sums();
}

static void deadlocks_are_tried_again(void **state)
{
    (void)state;
    int64_t id = add_token("NT047", -1);
    struct err err = {0};
    int lost = 0;
    mssql_server_control("{\"do\": \"deadlocks\", \"share\": 0.1, \"seed\": 3}");
    for (int i = 0; i < 200; i++) {
        char request[UUID_TEXT_SIZE];
        struct store_acquire a;
        uuid_v7(request);
        if (try_acquire(store, request, &a) != ERR_NONE)
            lost++;
        struct store_settlement s = a_settlement(request, id, 3);
        struct store_settlement *items = &s;
        if (driver->settle(store, &items, 1, &err) != ERR_NONE)
            lost++;
    }
    mssql_server_control("{\"do\": \"deadlocks\", \"share\": 0}");
    assert_int_equal(0, lost);
    expect("200|600", "SELECT COUNT(*), SUM(TotalTokensUsed) FROM TokenUsageLogs");
    expect_sums();
}

static void a_slow_server_is_waited_for_only_so_long(void **state)
{
    (void)state;
    struct err err = {0};
    struct store_acquire a;
    add_token("NT047", -1);
    fixture.config.store.query_timeout_ms = 1000;
    void *impatient = open_store(false, &err);
    assert_non_null(impatient);
    order("usp_AcquireTokens", "\"kind\": \"slow\", \"seconds\": 30, \"times\": 1000");
    int64_t start = clock_monotonic_ms();
    assert_int_equal(ERR_STORE_UNAVAILABLE, try_acquire(impatient, ID(1), &a));
    int64_t took = clock_monotonic_ms() - start;
    assert_true(took >= 900 && took < 4000);
    mssql_server_control("{\"do\": \"reset\"}");
    assert_int_equal(ERR_NONE, try_acquire(impatient, ID(1), &a));
    assert_int_equal(GRANT_TOKEN, a.grant);
    /* it ends the TLS session in due form while it is waited for, which FreeTDS does not notice */
    for (int times = 1; times <= 3; times++) {
        struct timespec used[2];
        char fault[64];
        snprintf(fault, sizeof fault, "\"kind\": \"end_tls\", \"times\": %d", times);
        order("usp_AcquireTokens", fault);
        start = clock_monotonic_ms();
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used[0]);
        enum err_code code = try_acquire(impatient, ID(1), &a);
        assert_true(code == ERR_NONE || code == ERR_STORE_UNAVAILABLE);
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used[1]);
        took = clock_monotonic_ms() - start;
        if (took >= 4000 || used[1].tv_sec - used[0].tv_sec > 3)
            fail_msg("waited %lld ms", (long long)took);
        mssql_server_control("{\"do\": \"reset\"}");
        assert_int_equal(ERR_NONE, try_acquire(impatient, ID(1), &a));
    }
    /* slow, but not too slow */
    order("usp_AcquireTokens", "\"kind\": \"slow\", \"seconds\": 0.3");
    assert_int_equal(ERR_NONE, try_acquire(impatient, ID(2), &a));
    driver->close(impatient);
    expect("2", "SELECT COUNT(*) FROM TokenReservations");
}

/* A connection breaks at each place of a call; the call is repeated, and nothing happens twice. */
static void a_broken_connection_changes_nothing(void **state)
{
    (void)state;
    static const char *const kinds[] = {"\"kind\": \"drop_before\"",
                                        "\"kind\": \"drop_mid_result\"",
                                        "\"kind\": \"drop_after_commit\""};
    struct err err = {0};
    int64_t id = add_token("NT047", -1);
    for (int i = 0; i < 3; i++) {
        struct store_acquire a;
        char request[UUID_TEXT_SIZE];
        uuid_v7(request);
        order("usp_AcquireTokens", kinds[i]);
        assert_int_equal(ERR_NONE, try_acquire(store, request, &a));
        assert_int_equal(GRANT_TOKEN, a.grant);
        struct store_settlement s = a_settlement(request, id, 5);
        struct store_settlement *items = &s;
        order("usp_SettleUsage", kinds[i]);
        assert_int_equal(ERR_NONE, driver->settle(store, &items, 1, &err));
        assert_int_equal(ERR_NONE, s.code);
        int expired = -1;
        order("usp_ExpireReservations", kinds[i]);
        assert_int_equal(ERR_NONE, driver->expire_reservations(store, &expired, &err));
    }
    expect("3|15", "SELECT COUNT(*), SUM(TotalTokensUsed) FROM TokenUsageLogs");
    expect("3", "SELECT COUNT(*) FROM TokenReservations WHERE State = 'settled'");

    /* what is not idempotent is not repeated: an added token, a batch of log entries */
    struct store_new_token t = {.company_id = "Once", .api_key = "key", .limit = -1};
    int64_t added = 0;
    order("usp_AddToken", kinds[2]);
    assert_int_equal(ERR_STORE_UNAVAILABLE, driver->token_add(store, "anna", &t, &added, &err));
    expect("1", "SELECT COUNT(*) FROM TokenMaster WHERE CompanyID = 'Once'");
    expect_sums();
}

static void a_server_that_dies_is_missed_and_found_again(void **state)
{
    (void)state;
    struct err err = {0};
    struct store_acquire a;
    add_token("NT047", -1);
    assert_int_equal(ERR_NONE, try_acquire(store, ID(1), &a));
    mssql_server_kill();
    int64_t start = clock_monotonic_ms();
    assert_int_equal(ERR_STORE_UNAVAILABLE, try_acquire(store, ID(2), &a));
    assert_int_equal(ERR_STORE_UNAVAILABLE, driver->ping(store, &err));
    assert_true(clock_monotonic_ms() - start < 15000);
    assert_null(open_store(false, &err));
    assert_int_equal(ERR_STORE_UNAVAILABLE, err.code);
    mssql_server_restart();
    backend->attach();
    int64_t deadline = clock_monotonic_ms() + 20000;
    while (try_acquire(store, ID(2), &a) != ERR_NONE && clock_monotonic_ms() < deadline)
        clock_sleep_until(clock_monotonic_ms() + 50);
    assert_int_equal(GRANT_TOKEN, a.grant);
    expect("2", "SELECT COUNT(*) FROM TokenReservations");
    expect_sums();
}

static bool logins_are(int64_t at_most)
{
    const char *state = mssql_server_control("{\"do\": \"state\"}");
    const char *logins = strstr(state, "\"logins\": ");
    return logins != NULL && strtoll(logins + 10, NULL, 10) <= at_most;
}

static void a_refused_login_is_said_and_not_hammered(void **state)
{
    (void)state;
    struct err err = {0};
    char wrong[128];
    char *right = fixture.config.store.password_file;
    snprintf(wrong, sizeof wrong, "%s/wrong", fixture.directory);
    FILE *f = fopen(wrong, "w");
    assert_non_null(f);
    fputs("not this one\n", f);
    fclose(f);
    fixture.config.store.password_file = wrong;
    mssql_server_control("{\"do\": \"reset\"}");
    assert_null(open_store(false, &err));
    assert_int_equal(ERR_STORE_UNAVAILABLE, err.code);
    assert_non_null(strstr(err.message, "ogin"));
    assert_null(strstr(err.message, "not this one"));
    assert_true(logins_are(2));
    fixture.config.store.password_file = right;

    /* while the service runs: one that tries again and again does not log in again and again */
    store = open_store(false, &err);
    assert_non_null(store);
    driver->close(store);
    mssql_server_control("{\"do\": \"reset\"}");
    mssql_server_control("{\"do\": \"logins\", \"refuse\": 18456}");
    for (int i = 0; i < 50; i++) {
        struct err again = {0};
        store = open_store(false, &again);
        assert_null(store);
    }
    /* a missing database */
    char nowhere[] = "nowhere";
    fixture.config.store.database = nowhere;
    mssql_server_control("{\"do\": \"reset\"}");
    int64_t start = clock_monotonic_ms();
    assert_null(open_store(false, &err));
    assert_true(err.code == ERR_STORE_UNAVAILABLE);
    assert_true(clock_monotonic_ms() - start < 15000);
    fixture.config.store.database = fixture.database;
}

static void a_certificate_is_checked(void **state)
{
    (void)state;
    struct err err = {0};
    char localhost[64];
    char *address = fixture.config.store.server;
    snprintf(localhost, sizeof localhost, "localhost%s", strrchr(address, ':'));

    fixture.config.store.server = localhost;
    store = open_store(false, &err);
    if (store == NULL)
        fail_msg("%s", err.message);
    driver->close(store);

    /* another's, and one that nobody has signed */
    mssql_server_control("{\"do\": \"certificate\", \"which\": \"bad\"}");
    assert_null(open_store(false, &err));
    assert_int_equal(ERR_STORE_UNAVAILABLE, err.code);
    char *ca_file = fixture.config.store.ca_file;
    char bad_ca[512];
    snprintf(bad_ca, sizeof bad_ca, "%.400s/bad.pem", "/nonexistent");
    snprintf(bad_ca, sizeof bad_ca, "%.*sbad.pem", (int)(strrchr(ca_file, '/') + 1 - ca_file),
             ca_file);
    fixture.config.store.ca_file = bad_ca; /* signed by the right one, for elsewhere.example */
    assert_null(open_store(false, &err));
    assert_int_equal(ERR_STORE_UNAVAILABLE, err.code);
    char system_ca[] = "system";
    mssql_server_control("{\"do\": \"certificate\", \"which\": \"good\"}");
    fixture.config.store.ca_file = system_ca;
    assert_null(open_store(false, &err));
    assert_int_equal(ERR_STORE_UNAVAILABLE, err.code);
    /* without TLS there is nothing to check */
    fixture.config.store.encrypt = ENCRYPT_OFF;
    store = open_store(false, &err);
    if (store == NULL)
        fail_msg("%s", err.message);
    driver->close(store);
    store = NULL;
    fixture.config.store.server = address;
}

static void threads_survive_a_bad_server(void **state)
{
    (void)state;
    pthread_t threads[8];
    struct store_acquire items[8];
    char ids[8][UUID_TEXT_SIZE];
    add_token("NT047", -1);
    mssql_server_control("{\"do\": \"deadlocks\", \"share\": 0.3, \"seed\": 1}");
    order("usp_AcquireTokens", "\"kind\": \"drop_mid_result\", \"times\": 3");
    for (int i = 0; i < 8; i++) {
        uuid_v7(ids[i]);
        items[i] = an_acquire(ids[i], "NT047");
        assert_int_equal(0, pthread_create(&threads[i], NULL, acquire_in_thread, &items[i]));
    }
    int granted = 0;
    for (int i = 0; i < 8; i++) {
        pthread_join(threads[i], NULL);
        assert_true(items[i].code == ERR_NONE || items[i].code == ERR_STORE_UNAVAILABLE);
        granted += items[i].code == ERR_NONE;
    }
    assert_true(granted >= 5);
    mssql_server_control("{\"do\": \"reset\"}");
    expect_sums();
}

/* Two good ones and one that is refused; the code of the batch. *maybe: for how many of them it is
 * unknown whether they have reserved. */
static enum err_code acquire_three(void *from, int *maybe)
{
    struct store_acquire all[3], *items[3];
    char ids[3][UUID_TEXT_SIZE];
    struct err err = {0};

    for (int i = 0; i < 3; i++) {
        uuid_v7(ids[i]);
        all[i] = an_acquire(ids[i], "NT047");
        items[i] = &all[i];
    }
    all[1].sequence = 0;
    enum err_code code = driver->acquire(from, items, 3, &err);
    assert_int_equal(ERR_BAD_VALUE, all[1].code);
    assert_false(all[1].maybe_reserved);
    assert_int_equal(all[0].code, all[2].code);
    assert_int_equal(all[0].maybe_reserved, all[2].maybe_reserved);
    *maybe = all[0].maybe_reserved + all[2].maybe_reserved;
    return code;
}

static void a_lost_answer_may_have_reserved(void **state)
{
    (void)state;
    static const struct {
        const char *fault;
        enum err_code code;
        int maybe;
    } cases[] = {
        {"\"kind\": \"drop_before\", \"times\": 2", ERR_STORE_UNAVAILABLE, 2},
        {"\"kind\": \"drop_mid_result\", \"times\": 2", ERR_STORE_UNAVAILABLE, 2},
        {"\"kind\": \"drop_after_commit\", \"times\": 2", ERR_STORE_UNAVAILABLE, 2},
        {"\"kind\": \"slow\", \"seconds\": 30", ERR_STORE_UNAVAILABLE, 2},
        {"\"kind\": \"drop_after_commit\"", ERR_NONE, 0}, /* repeated, and heard */
        {"\"kind\": \"error\", \"number\": 1205, \"times\": 9", ERR_STORE_UNAVAILABLE, 0},
        {"\"kind\": \"error\", \"number\": 9002", ERR_STORAGE_FULL, 0},
        {"\"kind\": \"error\", \"number\": 8134", ERR_INTERNAL, 0},
    };
    struct err err = {0};
    int maybe = 0;
    add_token("NT047", -1);
    fixture.config.store.query_timeout_ms = 1000;
    void *own = open_store(false, &err);
    assert_non_null(own);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        order("usp_AcquireTokens", cases[i].fault);
        if (acquire_three(own, &maybe) != cases[i].code || maybe != cases[i].maybe)
            fail_msg("%s: %d of 2 may have reserved", cases[i].fault, maybe);
        mssql_server_control("{\"do\": \"reset\"}");
        assert_int_equal(ERR_NONE, acquire_three(own, &maybe));
        assert_int_equal(0, maybe);
    }
    /* the repeat of one that is unknown ends otherwise */
    order("usp_AcquireTokens", "\"kind\": \"drop_after_commit\"");
    order("usp_AcquireTokens", "\"kind\": \"error\", \"number\": 9002");
    assert_int_equal(ERR_STORAGE_FULL, acquire_three(own, &maybe));
    assert_int_equal(2, maybe);
    /* never sent */
    mssql_server_control("{\"do\": \"logins\", \"refuse\": 18456}");
    order("usp_Ping", "\"kind\": \"drop_before\"");
    assert_int_equal(ERR_STORE_UNAVAILABLE, driver->ping(own, &err));
    assert_int_equal(ERR_STORE_UNAVAILABLE, acquire_three(own, &maybe));
    assert_int_equal(0, maybe);
    driver->close(own);
    mssql_server_control("{\"do\": \"reset\"}");
    expect_sums();
}

/* On one connection, so that a transaction that stays open is noticed. */
static void a_sealed_token_is_added_whole_or_not(void **state)
{
    (void)state;
    static const struct {
        const char *procedure, *fault;
        enum err_code code;
        int added;
    } cases[] = {
        /* nothing can have happened: repeated */
        {"usp_AddToken", "\"kind\": \"drop_before\"", ERR_NONE, 1},
        {"usp_AddToken", "\"kind\": \"drop_after_commit\"", ERR_NONE, 1},
        {"usp_ActivateToken", "\"kind\": \"drop_before\"", ERR_NONE, 1},
        {"usp_ActivateToken", "\"kind\": \"drop_mid_result\"", ERR_NONE, 1},
        {"usp_ActivateToken", "\"kind\": \"drop_after_commit\"", ERR_NONE, 1},
        {"usp_ActivateToken", "\"kind\": \"error\", \"number\": 1205", ERR_NONE, 1},
        /* in vain */
        {"usp_ActivateToken", "\"kind\": \"drop_before\", \"times\": 2", ERR_STORE_UNAVAILABLE, 0},
        {"usp_ActivateToken", "\"kind\": \"slow\", \"seconds\": 30", ERR_STORE_UNAVAILABLE, 0},
        {"usp_AddToken", "\"kind\": \"error\", \"number\": 547", ERR_BAD_VALUE, 0},
        {"usp_ActivateToken", "\"kind\": \"error\", \"number\": 547", ERR_BAD_VALUE, 0},
        {"usp_ActivateToken", "\"kind\": \"error\", \"number\": 8134", ERR_INTERNAL, 0},
        /* unknown: not repeated */
        {"COMMIT TRANSACTION", "\"kind\": \"drop_before\"", ERR_STORE_UNAVAILABLE, 0},
        {"COMMIT TRANSACTION", "\"kind\": \"drop_after_commit\"", ERR_STORE_UNAVAILABLE, 1},
    };
    struct err err = {0};
    struct store_acquire a;
    char count[16];
    int tokens = 0;
    int64_t id = 0;

    driver->close(store);
    fixture.config.store.query_timeout_ms = 1000;
    fixture.config.store.pool_size = 1;
    store = open_store(false, &err);
    assert_non_null(store);
    /* a connection is not used again when its transaction was not committed */
    mssql_server_control("{\"do\": \"reset\"}");
    assert_int_equal(ERR_CONFIG, add_sealed("NT047", "no-way", &id, &err));
    assert_true(logins_are(0));
    assert_int_equal(ERR_NONE, driver->ping(store, &err));
    assert_false(logins_are(0));
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        order(cases[i].procedure, cases[i].fault);
        enum err_code code = add_sealed("NT047", "key", &id, &err);
        if (code != cases[i].code)
            fail_msg("%s %s: %d: %s", cases[i].procedure, cases[i].fault, (int)code, err.message);
        assert_int_equal(code == ERR_NONE, id != 0);
        mssql_server_control("{\"do\": \"reset\"}");
        /* whatever it was, the next one is whole, and others see it */
        assert_int_equal(ERR_CONFIG, add_sealed("NT047", "no-way", &id, &err));
        assert_int_equal(0, id);
        if (tokens > 0) {
            assert_int_equal(ERR_NONE, try_acquire(store, ID((int)i + 1), &a));
            expect("1", "SELECT COUNT(*) FROM TokenReservations WHERE RequestID = '%s'",
                   ID((int)i + 1));
        }
        tokens += cases[i].added;
        snprintf(count, sizeof count, "%d|%d", tokens, tokens);
        expect(count, "SELECT COUNT(*), (SELECT COUNT(*) FROM AuditLog) FROM TokenMaster"
                      " WHERE Status = 'Active' AND ApiKey LIKE 'sealed:test:%%'");
        expect("0", "SELECT COUNT(*) FROM TokenMaster WHERE Status <> 'Active' OR ApiKey = ''");
    }
    expect_sums();
}

static void a_client_key_is_found_on_a_bad_connection(void **state)
{
    (void)state;
    static const char *const kinds[] = {
        "\"kind\": \"drop_before\"", "\"kind\": \"drop_mid_result\"",
        "\"kind\": \"drop_after_commit\"", "\"kind\": \"error\", \"number\": 1205"};
    static const char hash[] = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
    struct store_client_key key;
    struct err err = {0};

    /* not repeated, for the repeat would say that there is such a key */
    order("usp_AddClientKey", kinds[2]);
    assert_int_equal(ERR_STORE_UNAVAILABLE, add_client_key("c1", hash, "NT047", NULL));
    expect("1", "SELECT COUNT(*) FROM ClientKeys");
    for (int i = 0; i < 4; i++) {
        order("usp_FindClientKey", kinds[i]);
        assert_int_equal(ERR_NONE, driver->client_key_find(store, hash, &key, &err));
        assert_string_equal("c1", key.id);
    }
    order("usp_FindClientKey", "\"kind\": \"drop_mid_result\", \"times\": 9");
    assert_int_equal(ERR_STORE_UNAVAILABLE, driver->client_key_find(store, hash, &key, &err));
    assert_null(strstr(err.message, "00112233"));
}

/* ---- main ---- */

#define CONTRACT(test) cmocka_unit_test_setup_teardown(test, setup, teardown)
#define CLOSED(test) cmocka_unit_test_setup_teardown(test, setup_closed, teardown_closed)
#define REPLACED(test) cmocka_unit_test_setup_teardown(test, setup, teardown_replaced)

static const struct CMUnitTest contract[] = {
    CONTRACT(grants_a_token_and_reserves),
    CONTRACT(grants_again_without_reserving_twice),
    CONTRACT(knows_rows_written_by_hand),
    CONTRACT(a_pasted_key_is_trimmed),
    CONTRACT(compares_companies_without_case),
    CONTRACT(serves_its_provider_only),
    CONTRACT(chooses_among_the_usable),
    CONTRACT(chooses_among_many),
    CONTRACT(many_are_taken_as_they_are_now),
    CONTRACT(one_of_many_comes_back),
    CONTRACT(many_are_equally_likely),
    CONTRACT(the_newest_token_decides_the_message),
    CONTRACT(keeps_to_the_limit),
    CONTRACT(makes_a_missing_summary),
    CONTRACT(waits_for_what_cools_or_was_tried),
    CONTRACT(tells_cooling_from_busy),
    CONTRACT(a_cooldown_is_never_shortened),
    CONTRACT(releases_what_the_token_before_held),
    CONTRACT(releases_only_the_last_reservation_of_a_token),
    CONTRACT(disables_a_token_at_fault),
    CONTRACT(a_long_reason_is_cut_between_characters),
    CONTRACT(disabling_stops_at_three_companies_in_a_minute),
    CONTRACT(falls_back_for_known_companies_only),
    CONTRACT(reserves_for_the_fallback_key_alone),
    CONTRACT(a_bad_acquire_fails_alone),
    CONTRACT(a_batch_sees_itself),
    CONTRACT(an_ordinary_batch),
    CONTRACT(a_batch_goes_over_threshold_and_limit),
    CONTRACT(a_bad_settlement_fails_alone),
    CONTRACT(writes_every_column_of_a_usage_row),
    CONTRACT(settles_once),
    CONTRACT(settles_all_reservations_of_a_token),
    CONTRACT(unknown_calls_stay_unsettled_until_a_settlement_comes),
    CONTRACT(a_lost_reservation_is_left_unsettled),
    CONTRACT(nothing_spent_is_released),
    CONTRACT(the_threshold_is_crossed_once_and_the_limit_ends_a_token),
    CONTRACT(a_settlement_brings_a_fault),
    CONTRACT(reservations_of_the_dead_become_unsettled),
    CONTRACT(records_entries_and_attempts),
    CONTRACT(keeps_texts_of_any_script_and_length),
    CONTRACT(adds_tokens),
    CONTRACT(refuses_bad_tokens),
    CONTRACT(sets_a_status),
    CONTRACT(sets_a_key),
    CONTRACT(sets_a_limit),
    CONTRACT(a_limit_that_is_raised_by_hand_frees_a_token),
    CONTRACT(limits_that_are_raised_together_free_each_token),
    CONTRACT(shows_tokens),
    CONTRACT(shows_usage),
    CONTRACT(reports_tell_names_apart_by_case),
    CONTRACT(shows_logs_and_the_rest),
    CONTRACT(threads_share_a_store),
    CONTRACT(a_request_takes_its_key_with_a_token),
    CONTRACT(a_key_is_of_its_company),
    CONTRACT(a_key_that_spent_nothing_may_come_again),
    CONTRACT(a_key_is_kept_for_a_day),
    CONTRACT(a_refused_request_keeps_no_key),
    CONTRACT(a_duplicate_brings_its_fault),
    CONTRACT(a_batch_pays_once_for_a_key),
    CONTRACT(what_is_replayed_takes_no_key_from_others),
    CONTRACT(keys_of_the_dead_are_done_and_old_ones_go),
    CONTRACT(threads_pay_once_for_a_key),
    CONTRACT(an_acquire_that_nobody_heard_of_is_released),
    CONTRACT(a_late_acquire_that_nobody_waits_for_reserves_nothing),
    CONTRACT(a_released_acquire_frees_its_key),
    CONTRACT(records_that_come_again_are_kept_once),
    CONTRACT(knows_client_keys_by_their_hash),
    CONTRACT(a_revoked_client_key_opens_nothing),
    CONTRACT(shows_client_keys),
    CONTRACT(seals_the_key_of_a_token_with_the_row),
    CONTRACT(shows_keys_to_be_sealed_page_by_page),
    CONTRACT(reseals_only_what_was_read),
    CLOSED(processes_keep_the_sums),
    CLOSED(processes_keep_to_the_limit),
    CLOSED(ten_processes_set_up_at_once),
};

static const struct CMUnitTest embedded[] = {
    CONTRACT(the_files_are_private_and_durable),
    CLOSED(sets_up_only_where_allowed),
    CLOSED(refuses_what_is_no_store),
    CONTRACT(the_setup_script_changes_nothing_twice),
    CONTRACT(tables_of_an_older_version_get_their_columns),
    CONTRACT(the_tables_keep_their_rules),
    CLOSED(a_damaged_store_is_unavailable),
    CONTRACT(what_the_disk_refuses_is_not_answered),
    CONTRACT(another_writer_is_waited_for_only_so_long),
    CONTRACT(ping_tells_whether_it_can_be_written),
    CONTRACT(the_host_lock_is_waited_for_only_so_long),
    REPLACED(follows_a_replaced_file),
    REPLACED(loses_nothing_of_a_file_that_was_moved_away),
    REPLACED(a_file_that_was_moved_away_is_whole_at_the_end),
    REPLACED(waits_for_a_file_that_vanished),
    REPLACED(follows_to_a_store_only),
    REPLACED(follow_at_different_times),
    REPLACED(a_log_that_was_left_is_known_at_the_start),
    REPLACED(threads_follow_together),
    cmocka_unit_test_setup_teardown(processes_follow_together, setup_closed,
                                    teardown_closed_replaced),
    CLOSED(rolls_back_after_an_io_error),
    CONTRACT(a_refused_row_fails_alone),
    CONTRACT(a_failed_batch_changes_nothing),
};

static const struct CMUnitTest server_side[] = {
    CLOSED(sets_up_a_database_only_where_allowed),
    CONTRACT(a_refused_row_fails_alone_in_the_end),
    CONTRACT(the_procedures_check_what_comes_in),
    CONTRACT(a_repeat_without_a_key_is_refused),
};

static const struct CMUnitTest script[] = {
    CLOSED(a_setup_that_failed_notes_no_version),
};

static const struct CMUnitTest faults[] = {
    CONTRACT(errors_have_their_codes),
    CONTRACT(deadlocks_are_tried_again),
    CONTRACT(a_slow_server_is_waited_for_only_so_long),
    CONTRACT(a_broken_connection_changes_nothing),
    CONTRACT(a_server_that_dies_is_missed_and_found_again),
    CLOSED(a_refused_login_is_said_and_not_hammered),
    CLOSED(a_certificate_is_checked),
    CONTRACT(threads_survive_a_bad_server),
    CONTRACT(a_lost_answer_may_have_reserved),
    CONTRACT(a_sealed_token_is_added_whole_or_not),
    CONTRACT(a_client_key_is_found_on_a_bad_connection),
};

/* What the driver logs (a schema that is set up, servers that fail) is not looked at here. */
static void discard(struct log_entry *entry, void *context)
{
    (void)context;
    free(entry);
}

static void *do_nothing(void *context)
{
    return context;
}

/* With the first thread a sanitizer may add one of its own. */
static void find_threads_at_start(void)
{
    pthread_t thread;
    if (pthread_create(&thread, NULL, do_nothing, NULL) == 0)
        pthread_join(thread, NULL);
    clock_sleep_until(clock_monotonic_ms() + 50); /* it may be seen a moment longer */
    threads_at_start = count_threads();
}

/* test_store [sqlite|mssql [PATTERN]]: all of it without arguments. */
int main(int argc, char **argv)
{
    const char *only = argc > 1 ? argv[1] : "";
    int failed = 0;

    find_threads_at_start();
    log_set_sink(discard, NULL);
    if (argc > 2)
        cmocka_set_test_filter(argv[2]);
    if (strcmp(only, "mssql") != 0) {
        backend = &sqlite_backend;
        failed += cmocka_run_group_tests_name("store contract: sqlite", contract, NULL, NULL);
        failed += cmocka_run_group_tests_name("embedded store", embedded, NULL, NULL);
    }
    if (strcmp(only, "sqlite") != 0) {
        backend = &mssql_backend;
        mssql_server_start(NULL);
        failed += cmocka_run_group_tests_name("store contract: mssql", contract, NULL, NULL);
        failed += cmocka_run_group_tests_name("SQL Server", server_side, NULL, NULL);
        if (mssql_server_is_ours())
            failed += cmocka_run_group_tests_name("SQL Server: faults", faults, NULL, NULL);
        else
            failed += cmocka_run_group_tests_name("SQL Server: setup script", script, NULL, NULL);
        mssql_server_stop(NULL);
    }
    return failed == 0 ? 0 : 1;
}
