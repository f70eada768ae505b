/* config.h - the configuration: one table of keys feeds the parser, the environment, --check-config
 * and the manual.
 *
 * A value comes from, in ascending order of precedence: the table's default, the file, the
 * environment (EXTRACT_<SECTION>_<KEY>). An unknown key, a key given twice or a value that does not
 * fit is an error that names its place. */
#ifndef EXTRACT_CONFIG_H
#define EXTRACT_CONFIG_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "err.h"

#define CONFIG_DEFAULT_FILE "/etc/extract-fcgi/extract-fcgi.conf"

enum config_auth { AUTH_NONE, AUTH_BEARER };
enum config_driver { DRIVER_SQLITE, DRIVER_MSSQL };
enum config_encrypt { ENCRYPT_REQUIRE, ENCRYPT_REQUEST, ENCRYPT_OFF };
enum config_fallback { FALLBACK_STORE_UNAVAILABLE, FALLBACK_NO_ACTIVE_TOKEN };
enum config_login {
    LOGIN_SERVICE,
    LOGIN_ADMIN,
    LOGIN_READER
}; /* without one of its own: the service's */
enum config_sink { SINK_STORE, SINK_STDERR };

/* Strings are never NULL; an unset one is empty. Durations are in milliseconds, sizes in bytes. */
struct config {
    struct {
        int threads;
        int queue;
        int64_t queue_wait_ms;
        double company_share; /* 0 < share <= 1 of a process's workers */
        int64_t max_upload;
        int64_t deadline_ms;
        char *state_dir;
        char *runtime_dir;
        char *body_file_dir;
    } server;
    struct {
        int mode; /* enum config_auth */
        int64_t offline_grace_ms;
        int key_rate; /* requests a minute; 0: no limit */
    } auth;
    struct {
        char *base_url; /* without a slash at its end */
        char *model;
        int64_t connect_timeout_ms;
        int64_t timeout_ms;
        char *proxy;
        char *prompt_file;
        char *schema_file;
        char *ca_file;
        int max_output_tokens; /* 0: not sent */
        int reserve_tokens;
    } gemini;
    struct {
        int max_retries;
        int64_t initial_delay_ms;
        int64_t max_delay_ms;
        double backoff_multiplier;
        bool jitter;
        bool auto_disable;
    } retry;
    struct {
        int driver; /* enum config_driver */
        bool auto_create;
        int pool_size; /* 0: as the driver likes */
        int64_t query_timeout_ms;
        char *path;
        char *server;
        char *database;
        char *user;
        char *password_file;
        char *admin_user;
        char *admin_password_file;
        char *reader_user;
        char *reader_password_file;
        int encrypt; /* enum config_encrypt */
        char *ca_file;
        char *connection_file;
        enum config_login login; /* no key: whoever opens the store says as whom */
    } store;
    struct {
        char *key_file;
        int when; /* enum config_fallback */
    } fallback;
    struct {
        int level; /* enum log_level */
        int sink;  /* enum config_sink */
    } log;
    struct {
        char *key_file;
    } seal;
};

/* Reads the configuration. path NULL: EXTRACT_CONFIG, else CONFIG_DEFAULT_FILE, which alone may be
 * absent. Checks each value and what values say together. The result is released by config_free.
 * Errors: ERR_CONFIG, the message naming file and line, or the environment variable. */
struct config *config_load(const char *path, struct err *err) MUST_CHECK;
void config_free(struct config *config);

/* Writes the configuration as a file that config_load would read, each key with where it came from
 * as a comment, secrets masked (the password in a proxy's URL; all others are in files of their own). */
void config_print(const struct config *config, FILE *out);

#endif
