/* share.c - how many of a process's workers one company may hold. See share.h.
 *
 * A list of those that hold any: no longer than there are workers. */
#include "share.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

struct holder {
    struct holder *next;
    int count;
    char company[];
};

struct share {
    pthread_mutex_t mutex;
    struct holder *holders;
    int most;
};

struct share *share_new(int most)
{
    struct share *share = calloc(1, sizeof *share);

    if (share == NULL)
        return NULL;
    pthread_mutex_init(&share->mutex, NULL);
    share->most = most < 1 ? 1 : most;
    return share;
}

void share_free(struct share *share)
{
    if (share == NULL)
        return;
    while (share->holders != NULL) {
        struct holder *next = share->holders->next;
        free(share->holders);
        share->holders = next;
    }
    pthread_mutex_destroy(&share->mutex);
    free(share);
}

/* The link that points to the company's holder, or the list's end. */
static struct holder **find(struct share *share, const char *company)
{
    struct holder **link = &share->holders;

    while (*link != NULL && strcmp((*link)->company, company) != 0)
        link = &(*link)->next;
    return link;
}

bool share_enter(struct share *share, const char *company)
{
    bool entered = false;

    pthread_mutex_lock(&share->mutex);
    struct holder **link = find(share, company);
    if (*link == NULL) {
        size_t size = strlen(company) + 1;
        struct holder *holder = calloc(1, sizeof *holder + size);
        if (holder != NULL) {
            memcpy(holder->company, company, size);
            *link = holder;
        }
    }
    if (*link != NULL && (*link)->count < share->most) {
        (*link)->count++;
        entered = true;
    }
    pthread_mutex_unlock(&share->mutex);
    return entered;
}

void share_leave(struct share *share, const char *company)
{
    pthread_mutex_lock(&share->mutex);
    struct holder **link = find(share, company);
    struct holder *holder = *link;
    if (holder != NULL && --holder->count == 0) {
        *link = holder->next;
        free(holder);
    }
    pthread_mutex_unlock(&share->mutex);
}
