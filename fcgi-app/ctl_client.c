/* ctl_client.c - extractctl client-key ...: who may call the service. See ctl.h.
 *
 * A key is made here, shown once on standard output, and kept nowhere: the store gets its hash. */
#include <stdio.h>
#include <string.h>

#include "auth.h"
#include "ctl.h"

/* Shows the key; the identifier beside it goes to people only: a script reads one line. */
static int show_key(struct ctl *ctl, const char *id, const char *key)
{
    if (ctl_given(ctl, FLAG_JSON)) {
        const struct ctl_cell cells[] = {{"ClientKeyID", ctl_text(id)},
                                         {"ClientKey", ctl_text(key)}};
        return ctl_show_row(ctl, cells, 2);
    }
    bool shown = printf("%s\n", key) > 0 && fflush(stdout) == 0;
    fprintf(stderr, CTL_NAME ": client key %s; it is shown this once only\n", id);
    return shown ? EXIT_OK : EXIT_NO;
}

int ctl_client_key_add(struct ctl *ctl)
{
    char key[AUTH_KEY_SIZE], id[STORE_CLIENT_KEY_ID_SIZE], hash[STORE_HASH_SIZE];
    const struct store_new_client_key row = {.id = id,
                                             .hash = hash,
                                             .company_id = ctl->values[FLAG_COMPANY],
                                             .label = ctl->values[FLAG_LABEL]};
    struct err err = {0};
    int status;

    if (ctl_given(ctl, FLAG_ADMIN) == ctl_given(ctl, FLAG_COMPANY))
        return ctl_usage_error(ctl, "either --company ID or --admin must be given");
    status = ctl_open_store(ctl);
    if (status != EXIT_OK)
        return status;
    auth_new_key(key, id, hash);
    if (store_client_key_add(ctl->store, ctl->actor, &row, &err) == ERR_NONE)
        status = show_key(ctl, id, key);
    else
        status = ctl_store_error(ctl, &err);
    explicit_bzero(key, sizeof key);
    return status;
}

int ctl_client_key_list(struct ctl *ctl)
{
    return ctl_show_view(ctl, VIEW_CLIENT_KEYS, NULL);
}

int ctl_client_key_revoke(struct ctl *ctl)
{
    struct err err = {0};
    int status = ctl_open_store(ctl);

    if (status != EXIT_OK)
        return status;
    if (store_client_key_revoke(ctl->store, ctl->actor, ctl->arguments[0], &err) != ERR_NONE)
        return ctl_store_error(ctl, &err);
    const struct ctl_cell cells[] = {{"ClientKeyID", ctl_text(ctl->arguments[0])},
                                     {"State", ctl_text("revoked")}};
    return ctl_show_row(ctl, cells, 2);
}
