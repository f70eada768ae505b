/* floor_rows.h - the rows of the floor with rows: what the product writes for a request that goes well,
 * as durably, and nothing else. See floor_rows.c. */
#ifndef FLOOR_ROWS_H
#define FLOOR_ROWS_H

#include <semaphore.h>
#include <stddef.h>
#include <stdint.h>

#define ROWS_TEXT_SIZE 257
#define ROWS_ID_SIZE 37

enum {
    ROWS_INPUT,
    ROWS_OUTPUT,
    ROWS_TEXT_PROMPT,
    ROWS_IMAGE_PROMPT,
    ROWS_TEXT_CANDIDATES,
    ROWS_TOTAL,
    ROWS_COUNTS
};

struct rows;

/* What a thread has in hand; used again for each of its requests. */
struct rows_request {
    char company[ROWS_TEXT_SIZE], user[ROWS_TEXT_SIZE], branch[ROWS_TEXT_SIZE]; /* of the form */
    size_t bytes;                                                               /* of the file */
    const char *proxy_id; /* nginx's, or NULL */
    char api_key[1025];   /* what rows_reserve found for the company */

    /* floor_rows.c's own */
    char id[ROWS_ID_SIZE];
    int64_t begun_ms, duration_ms, token_id, reservation_id, tokens[ROWS_COUNTS];
    char model[64], message[1024];
    int is_answered; /* and so to be settled, else to be reserved */
    int leads;
    struct rows_request *next;
    sem_t wake;
};

/* Opens the database at path, which `extractctl` has made. Ends the program where that fails, as all
 * here do where the store does. */
struct rows *rows_open(const char *path);

/* Once, before the first request of a thread. */
void rows_init(struct rows_request *r);

/* Returns when the reservation is on the disk. 0: the company has no token. */
int rows_reserve(struct rows *rows, struct rows_request *r);

/* Returns when the usage row, the sums, the end of the reservation and the log entry are on the disk.
 * answer: Gemini's, with a NUL at its end. */
void rows_settle(struct rows *rows, struct rows_request *r, const char *answer);

#endif
