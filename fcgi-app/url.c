/* url.c - URLs, read strictly. See url.h.
 *
 * From left to right, each part only as far as its own characters go: what then stands where the
 * next part has to begin decides. */
#include "url.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define LETTERS "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
#define DIGITS "0123456789"
#define HOST LETTERS DIGITS "-._"
#define ADDRESS DIGITS "ABCDEFabcdef:."
#define USER LETTERS DIGITS "-._~!$&'()*+,;=:%" /* RFC 3986 section 3.2.1 */

/* host or [address]; moves *at past it. */
static bool take_host(const char **at, struct url *url)
{
    struct in6_addr address;
    size_t len;

    url->bracketed = **at == '[';
    *at += url->bracketed;
    len = strspn(*at, url->bracketed ? ADDRESS : HOST);
    if (len == 0 || len >= sizeof url->host)
        return false;
    memcpy(url->host, *at, len);
    url->host[len] = '\0';
    *at += len;
    if (!url->bracketed)
        return true;
    return *(*at)++ == ']' && inet_pton(AF_INET6, url->host, &address) == 1;
}

/* :port or nothing; moves *at past it. */
static bool take_port(const char **at)
{
    const char *digits = *at + 1;
    size_t len;
    long port;

    if (**at != ':')
        return true;
    len = strspn(digits, DIGITS);
    port = len >= 1 && len <= 5 ? strtol(digits, NULL, 10) : 0;
    *at = digits + len;
    return port >= 1 && port <= 65535;
}

bool url_split(const char *text, struct url *url)
{
    size_t len = strcspn(text, ":");

    *url = (struct url){.path = ""};
    if (len >= sizeof url->scheme || strncmp(text + len, "://", 3) != 0)
        return false;
    memcpy(url->scheme, text, len);
    text += len + 3;
    len = strspn(text, USER);
    if (text[len] == '@') {
        url->has_user = true;
        text += len + 1;
    }
    if (!take_host(&text, url) || !take_port(&text))
        return false;
    url->path = text;
    return *text == '\0' || *text == '/';
}

bool url_is_loopback(const struct url *url)
{
    struct in_addr four;
    struct in6_addr six;

    if (url->bracketed)
        return inet_pton(AF_INET6, url->host, &six) == 1 && IN6_IS_ADDR_LOOPBACK(&six);
    if (inet_pton(AF_INET, url->host, &four) == 1)
        return ntohl(four.s_addr) >> 24 == 127;
    return strcasecmp(url->host, "localhost") == 0;
}

void url_print_masked(const char *text, FILE *out)
{
    const char *scheme_end = strstr(text, "://");
    const char *user = scheme_end != NULL ? scheme_end + 3 : text;
    size_t user_len = strcspn(user, ":@/");
    const char *at = user + strcspn(user, "@/");

    if (user[user_len] == ':' && *at == '@')
        fprintf(out, "%.*s:***%s", (int)(user + user_len - text), text, at);
    else
        fputs(text, out);
}
