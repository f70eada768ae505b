/* store_sqlite_many.c - where to look among the many tokens of a company. See store_sqlite.h.
 *
 * Reading a thousand rows to choose one of them would take longer than all the rest of a request, and
 * so would finding the nth of them in the index, which SQLite counts through. So which of them could
 * serve is kept for a second. It only tells where to look: whoever chooses from it reads the token's
 * row as it is now, and reads all rows where those it names don't serve. So what is out of date costs
 * time, and never a wrong answer; a token that is new, or has cooled down, is chosen a second later.
 *
 * One company has one place, by its name; two that have the same one take it from each other. */
#include "store_sqlite.h"

#include <stdlib.h>
#include <string.h>

#define KEPT_MS 1000

static struct sqlite_usable **find_place(struct sqlite_db *db, const char *company_id)
{
    uint32_t hash = 2166136261; /* FNV-1a */

    for (const char *c = company_id; *c != '\0'; c++)
        hash = (hash ^ (unsigned char)*c) * 16777619;
    return &db->usable[hash % SQLITE_USABLE_PLACES];
}

const struct sqlite_usable *sqlite_recall_usable(struct sqlite_db *db, const char *company_id)
{
    const struct sqlite_usable *usable = *find_place(db, company_id);

    if (usable == NULL || strcmp(usable->company_id, company_id) != 0 ||
        usable->until_ms < clock_monotonic_ms())
        return NULL;
    return usable;
}

struct sqlite_usable *sqlite_keep_usable(struct sqlite_db *db, const char *company_id, size_t room)
{
    struct sqlite_usable **place = find_place(db, company_id);

    free(*place);
    *place = malloc(sizeof **place + room * sizeof(*place)->token_ids[0]);
    if (*place == NULL)
        return NULL;
    (*place)->until_ms = clock_monotonic_ms() + KEPT_MS;
    (*place)->count = 0;
    memcpy((*place)->company_id, company_id, strlen(company_id) + 1);
    return *place;
}

void sqlite_forget_usable(struct sqlite_db *db)
{
    for (size_t i = 0; i < SQLITE_USABLE_PLACES; i++) {
        free(db->usable[i]);
        db->usable[i] = NULL;
    }
}
