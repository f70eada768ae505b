/* tsan.c - what ThreadSanitizer must know of this program; linked where SANITIZE=thread.
 *
 * It sees only what it has compiled. OpenSSL counts the references of what threads share (here: TLS
 * sessions, in libcurl's common cache) by atomic instructions of its own, so that the last one's free()
 * looks like a race with those before. And reset_logins() looks at descriptors that others open and
 * close meanwhile: it must, and says why that is safe (store_mssql_watch.c). */
const char *__tsan_default_suppressions(void);
const char *__tsan_default_options(void);

const char *__tsan_default_suppressions(void)
{
    return "called_from_lib:libssl.so\n"
           "called_from_lib:libcrypto.so\n"
           "race:reset_logins\n";
}

/* Tests of several processes fork after threads were there. */
const char *__tsan_default_options(void)
{
    return "die_after_fork=0";
}
