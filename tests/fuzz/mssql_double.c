/* mssql_double.c - SQL Server's double. See mssql_double.h. */
#include "mssql_double.h"

#include <json.h>
#include <string.h>

#include "support.h"

static struct mssql_double *the_double;

enum err_code __wrap_mssql_call(struct store_mssql *store, const struct mssql_call *call,
                                struct err *err);

void mssql_double_use(struct mssql_double *take_calls)
{
    the_double = take_calls;
}

static bool is_json(const struct mssql_param *param)
{
    return strcmp(param->name, "@Items") == 0 || strcmp(param->name, "@Entries") == 0 ||
           strcmp(param->name, "@Attempts") == 0;
}

enum err_code __wrap_mssql_call(struct store_mssql *store, const struct mssql_call *call,
                                struct err *err)
{
    struct json_object *items = NULL;

    (void)store;
    the_double->calls++;
    CHECK(strncmp(call->procedure, "dbo.usp_", 8) == 0);
    for (size_t i = 0; i < call->count; i++) {
        const struct mssql_param *param = &call->params[i];
        CHECK(param->name[0] == '@');
        if (!is_json(param))
            continue;
        struct json_object *array = fuzz_parse_own(param->value.text, strlen(param->value.text));
        CHECK(json_object_is_type(array, json_type_array));
        if (strcmp(param->name, "@Items") == 0)
            items = array;
        else
            json_object_put(array);
    }
    if (the_double->answer != NULL)
        the_double->answer(the_double->context, call, items);
    json_object_put(items);
    return the_double->code == ERR_NONE ? ERR_NONE
                                        : err_set(err, the_double->code, "the double says no");
}
