/* mssql_double.h - stands in for SQL Server below store_mssql.c: the linker puts it in mssql_call's place
 * (--wrap). What a call sends must be JSON; the rows that come back are the target's. */
#ifndef EXTRACT_FUZZ_MSSQL_DOUBLE_H
#define EXTRACT_FUZZ_MSSQL_DOUBLE_H

#include "store_mssql.h"

struct mssql_double {
    /* Makes rows, by call->row; NULL: none come. items: of @Items, NULL without that parameter. */
    void (*answer)(void *context, const struct mssql_call *call, struct json_object *items);
    void *context;
    enum err_code code; /* the call's, after the rows */
    int calls;          /* so far */
};

/* All calls go there from now on. */
void mssql_double_use(struct mssql_double *take_calls);

#endif
