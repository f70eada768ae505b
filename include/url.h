/* url.h - URLs, read strictly: what is not plainly understood is refused, so that nobody (curl, a
 * proxy) can understand it otherwise than the check for loopback did. */
#ifndef EXTRACT_URL_H
#define EXTRACT_URL_H

#include <stdbool.h>
#include <stdio.h>

#include "err.h"

struct url {
    char scheme[8]; /* as it was written */
    char host[256]; /* an IPv6 address without its brackets */
    bool bracketed;
    bool has_user;    /* with or without a password */
    const char *path; /* "" or from its slash to the end; within the text that was split */
};

/* scheme://[user[:password]@]host[:port][/path]. False: anything else. */
bool url_split(const char *text, struct url *url) MUST_CHECK;

/* 127.0.0.0/8 with all four numbers, ::1 in any spelling, or localhost. */
bool url_is_loopback(const struct url *url);

/* Writes a URL that url_split takes, with *** for its password. */
void url_print_masked(const char *text, FILE *out);

#endif
