/* share.h - how many of a process's workers one company may hold (server.company_share). */
#ifndef EXTRACT_SHARE_H
#define EXTRACT_SHARE_H

#include <stdbool.h>

#include "err.h"

struct share;

/* most: how many a company may hold at the same time, at least 1. NULL without memory. */
struct share *share_new(int most) MUST_CHECK;
void share_free(struct share *share);

/* company: folded (text_fold). False where the company holds its share already; else share_leave
 * must follow. */
bool share_enter(struct share *share, const char *company) MUST_CHECK;
void share_leave(struct share *share, const char *company);

#endif
