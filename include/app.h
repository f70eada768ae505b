/* app.h - what lives as long as the process, and what belongs to each worker thread. */
#ifndef EXTRACT_APP_H
#define EXTRACT_APP_H

#include <stdatomic.h>

#include "auth.h"
#include "config.h"
#include "gauges.h"
#include "gemini.h"
#include "invoice.h"
#include "record.h"
#include "share.h"
#include "store.h"

struct app {
    const struct config *config;
    struct store *store;
    struct recorder *recorder;
    struct invoice_schema *schema;
    struct gemini *gemini;
    struct share *share;
    struct store *reader; /* of /admin: the second login's, or the same */
    struct auth *auth;
    struct gauges *gauges;
    char *fallback_key;    /* NULL: no fallback */
    atomic_int long_waits; /* workers that wait on a rate limit's hint longer than max_delay */
};

struct worker {
    struct app *app;
    struct gemini_client *gemini;
};

#endif
