/* ctl_client.c - extractctl client-key ...: who may call the service. See ctl.h.
 *
 * A key is made here, shown once on standard output, and kept nowhere: the store gets its hash. */
#include <stdio.h>
#include <string.h>

#include "auth.h"
#include "ctl.h"

/* A company (at most 256 bytes) as one word of a shell's command line. */
static void quote(const char *company, char out[4 * STORE_TEXT_SIZE])
{
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.";
    size_t len = 0;

    if (company[strspn(company, plain)] == '\0') {
        snprintf(out, STORE_TEXT_SIZE, "%s", company);
        return;
    }
    out[len++] = '\'';
    for (; *company != '\0' && len <= 4 * STORE_TEXT_SIZE - 6; company++) {
        if (*company == '\'') { /* ends the word, adds a quote, goes on */
            memcpy(out + len, "'\\'", 3);
            len += 3;
        }
        out[len++] = *company;
    }
    out[len++] = '\'';
    out[len] = '\0';
}

/* Shows the key; the identifier beside it goes to people only: a script reads one line. */
static int show_key(struct ctl *ctl, const char *id, const char *key)
{
    if (ctl_given(ctl, FLAG_JSON)) {
        const struct ctl_cell cells[] = {{"ClientKeyID", ctl_text(id)},
                                         {"ClientKey", ctl_text(key)}};
        return ctl_show_row(ctl, cells, 2);
    }
    const char *company = ctl->values[FLAG_COMPANY];
    bool shown = printf("%s\n", key) > 0 && fflush(stdout) == 0;
    ctl_note(ctl, "client key %s; it is shown this once only", id);
    if (company != NULL && !ctl_has_token(ctl, company)) {
        char word[4 * STORE_TEXT_SIZE];
        quote(company, word);
        ctl_next(ctl, "no token is of company %s yet: `" CTL_NAME " token add --company %s`",
                 company, word);
    }
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
    enum err_code code;
    int status;

    if (ctl_given(ctl, FLAG_ADMIN) == ctl_given(ctl, FLAG_COMPANY))
        return ctl_usage_error(ctl, "either --company ID or --admin must be given");
    status = ctl_open_store(ctl);
    if (status != EXIT_OK)
        return status;
    auth_new_key(key, id, hash);
    ctl_work_begin(ctl, WORK_CHANGES, "adding client key %s", id);
    code = store_client_key_add(ctl->store, ctl->actor, &row, &err);
    ctl_work_end(ctl);
    if (code == ERR_NONE)
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
    enum err_code code;
    int status = ctl_open_store(ctl);

    if (status != EXIT_OK)
        return status;
    ctl_work_begin(ctl, WORK_CHANGES, "revoking client key %s", ctl->arguments[0]);
    code = store_client_key_revoke(ctl->store, ctl->actor, ctl->arguments[0], &err);
    ctl_work_end(ctl);
    if (code != ERR_NONE) {
        status = ctl_store_error(ctl, &err);
        if (code == ERR_NO_SUCH_ROW || code == ERR_BAD_VALUE)
            ctl_next(ctl, "see which there are: `" CTL_NAME " client-key list`");
        return status;
    }
    const struct ctl_cell cells[] = {{"ClientKeyID", ctl_text(ctl->arguments[0])},
                                     {"State", ctl_text("revoked")}};
    return ctl_show_row(ctl, cells, 2);
}
