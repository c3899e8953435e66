/*
 * Chapter 6, HTTP: the parser from bytes alone, then server and client with
 * one another and with raw sockets, over loopback and unix sockets, all on
 * one loop. The clock of a test that waits is the test's own: it is moved.
 */
#include "test.h"

#include <sys/mman.h>

/* ---- The parser alone ---- */

/* What a message, or several, came to, as one text:
 * "GET /a 1.1|Host=x|:body.  " for a request, "200|..." for an answer, "!400"
 * for a refusal, "..." when more is awaited. */
static void describe_head(const struct cube_http_parser *p,
                          struct cube_buf *out)
{
    const char *text = p->head.text.data;

    if (p->is_answer)
        cube_buf_printf(out, "%d 1.%d", p->head.status, p->head.minor);
    else
        cube_buf_printf(out, "%s %s 1.%d", text, text + p->head.target,
                        p->head.minor);
    for (size_t i = 0; i < p->head.field_count; i++)
        cube_buf_printf(out, "|%s=%s", text + p->head.fields[i].name,
                        text + p->head.fields[i].value);
    cube_buf_printf(out, "|%s:", p->is_kept ? "keep" : "close");
}

/* One event into the description; false at the end of it. */
static bool describe(struct cube_http_parser *p, enum cube_http_event e,
                     struct cube_buf *out)
{
    bool is_answer = p->is_answer, is_to_head = p->is_to_head;

    switch (e) {
    case CUBE_HTTP_HEAD:
        describe_head(p, out);
        return true;
    case CUBE_HTTP_DATA:
        cube_buf_add(out, p->piece, p->piece_len);
        return true;
    case CUBE_HTTP_END:
        cube_buf_puts(out, ".");
        cube_http_parser_reset(p);
        p->is_answer = is_answer;
        p->is_to_head = is_to_head;
        return true;
    case CUBE_HTTP_ERROR:
        cube_buf_printf(out, "!%d %s", p->status, p->words);
        return false;
    case CUBE_HTTP_MORE:
    case CUBE_HTTP_GO_ON:
        break;
    }
    return false;
}

/* Parses `text` fed in pieces of `step` bytes, each of which ends where a
 * page ends that may not be touched. */
static void parse_in_steps(const char *text, size_t len, size_t step,
                           const char *mode, struct cube_buf *out)
{
    struct cube_http_parser p;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t room = (len / page + 1) * page;
    char *map = mmap(NULL, room + page, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    bool goes_on = true;

    REQUIRE(map != MAP_FAILED);
    mprotect(map + room, page, PROT_NONE);
    memset(&p, 0, sizeof p);
    p.is_answer = strchr(mode, 'a') != NULL;
    p.is_to_head = strchr(mode, 'h') != NULL;
    for (size_t at = 0; at < len && goes_on; at += step) {
        size_t n = len - at < step ? len - at : step;
        struct cube_http_input in = {map + room - n, n};
        enum cube_http_event e;

        memcpy(map + room - n, text + at, n);
        do {
            e = cube_http_parse(&p, &in);
            goes_on = describe(&p, e, out);
            if (e == CUBE_HTTP_END && in.len == 0)
                break;
        } while (goes_on);
        goes_on = e != CUBE_HTTP_ERROR;
    }
    if (goes_on && strchr(mode, 'e')) {
        if (cube_http_parse_eof(&p) == CUBE_HTTP_END)
            cube_buf_puts(out, ".");
        else
            cube_buf_puts(out, "!early");
    } else if (goes_on && !cube_http_parser_is_fresh(&p)) {
        cube_buf_puts(out, "...");
    }
    cube_buf_free(&p.head.text);
    munmap(map, room + page);
}

struct message {
    const char *mode; /* a: answer, h: to a HEAD, e: then the input ends */
    const char *text, *want, *reason;
};

/* A row's expectation holds however the bytes are cut. */
static void check_messages(const struct message *rows, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        size_t len = strlen(rows[i].text);

        for (size_t step = 1; step <= len + 1; step = step * 2 + 1) {
            struct cube_buf out = {0};

            test_row("row %zu, %s, in steps of %zu", i, rows[i].reason, step);
            parse_in_steps(rows[i].text, len, step, rows[i].mode, &out);
            if (rows[i].want[0] == '!' && out.len > strlen(rows[i].want))
                out.data[strlen(rows[i].want)] = 0; /* without the words */
            CHECK_STR(out.data ? out.data : "", rows[i].want);
            cube_buf_free(&out);
        }
    }
}

TEST(good_requests_are_understood)
{
    static const struct message rows[] = {
        {"", "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
         "GET / 1.1|Host=a|keep:.", "the least there is"},
        {"", "GET / HTTP/1.1\r\nhOST:a\r\n\r\nGET /b HTTP/1.1\r\nHost:b\r\n"
         "\r\n", "GET / 1.1|hOST=a|keep:.GET /b 1.1|Host=b|keep:.",
         "two in one piece, no blank after the colon"},
        {"", "\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
         "GET / 1.1|Host=a|keep:.", "RFC 9112, 2.2: empty lines before"},
        {"", "GET / HTTP/1.0\r\n\r\n", "GET / 1.0|close:.",
         "1.0 needs no Host and does not keep"},
        {"", "GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n",
         "GET / 1.0|Connection=Keep-Alive|keep:.", "1.0 that keeps"},
        {"", "GET / HTTP/1.1\r\nHost: a\r\nConnection: foo , close\r\n\r\n",
         "GET / 1.1|Host=a|Connection=foo , close|close:.",
         "close in a list"},
        {"", "GET / HTTP/1.9\r\nHost: a\r\n\r\n", "GET / 1.1|Host=a|keep:.",
         "a later minor version is 1.1 to us"},
        {"", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
         "POST / 1.1|Host=a|Content-Length=5|keep:hello.", "a body"},
        {"", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 005\r\n"
         "Content-Length:5 , 5\r\n\r\nhello",
         "POST / 1.1|Host=a|Content-Length=005|Content-Length=5 , 5|keep:"
         "hello.", "RFC 9110, 8.6: the same length again and again"},
        {"", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhel",
         "POST / 1.1|Host=a|Content-Length=5|keep:hel...", "half a body"},
        {"", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n"
         "\r\n5\r\nhello\r\n00A;x=\"y\"\r\n 123456789\r\n0\r\n\r\n",
         "POST / 1.1|Host=a|Transfer-Encoding=Chunked|keep:hello 123456789.",
         "chunks, an extension, hexadecimal digits"},
        {"", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
         "\r\n1\r\nx\r\n0\r\nA: b\r\nC:\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n"
         "\r\n",
         "POST / 1.1|Host=a|Transfer-Encoding=chunked|keep:x."
         "GET / 1.1|Host=a|keep:.", "trailers, and the next request"},
        {"", "GET / HTTP/1.1\r\nHost:\r\nEmpty:\r\nTab:\t a\tb \t\r\n\r\n",
         "GET / 1.1|Host=|Empty=|Tab=a\tb|keep:.",
         "empty values, tabs, blanks around"},
        {"", "GET / HTTP/1.1\r\nHost: a\r\nX: \xc3\xa9\xff\r\n\r\n",
         "GET / 1.1|Host=a|X=\xc3\xa9\xff|keep:.",
         "RFC 9110, 5.5: obs-text in a value"},
        {"", "M-1 http://a/b?c=%20 HTTP/1.1\r\nHost: a\r\n!#$%&'*+-.^_`|~: b"
         "\r\n\r\n",
         "M-1 http://a/b?c=%20 1.1|Host=a|!#$%&'*+-.^_`|~=b|keep:.",
         "any token is a method or a name"},
        {"", "GET / HTTP/1.1\r\nHost: a\r\n\r", "...", "one byte is missing"},
    };

    check_messages(rows, COUNT(rows));
}

#define HEAD_OF "POST / HTTP/1.1\r\nHost: a\r\n"
#define CHUNKED HEAD_OF "Transfer-Encoding: chunked\r\n\r\n"
#define CHUNKED_OUT "POST / 1.1|Host=a|Transfer-Encoding=chunked|keep:"

TEST(bad_requests_are_refused)
{
    static const struct message rows[] = {
        {"", HEAD_OF "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"
         "\r\n", "!400", "smuggling: a length and a coding"},
        {"", HEAD_OF "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n"
         "\r\n", "!400", "the same the other way round"},
        {"", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\n"
         "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nG", "!400",
         "smuggling: the G that is drawn at cube_http_judge"},
        {"", HEAD_OF "Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
         "!400", "smuggling: two lengths"},
        {"", HEAD_OF "Content-Length: 5, 6\r\n\r\n", "!400",
         "two lengths in one field"},
        {"", HEAD_OF "Content-Length: +5\r\n\r\n", "!400", "a sign"},
        {"", HEAD_OF "Content-Length: -5\r\n\r\n", "!400", "a sign"},
        {"", HEAD_OF "Content-Length: 0x5\r\n\r\n", "!400", "hexadecimal"},
        {"", HEAD_OF "Content-Length: 5 5\r\n\r\n", "!400", "a blank inside"},
        {"", HEAD_OF "Content-Length:\r\n\r\n", "!400", "no number at all"},
        {"", HEAD_OF "Content-Length: ,\r\n\r\n", "!400", "an empty list"},
        {"", HEAD_OF "Content-Length: ,5\r\n\r\n", "!400",
         "smuggling: some read 0 there"},
        {"", HEAD_OF "Content-Length: 5,\r\n\r\n", "!400",
         "nothing behind a comma"},
        {"", HEAD_OF "Content-Length: 5,, 5\r\n\r\n", "!400",
         "nothing between two"},
        {"", HEAD_OF "Transfer-Encoding:\r\n\r\n", "!400", "no coding"},
        {"", HEAD_OF "Transfer-Encoding: chunked, gzip\r\n\r\n", "!400",
         "chunked is not last"},
        {"", HEAD_OF "Transfer-Encoding: chunked\r\n"
         "Transfer-Encoding: chunked\r\n\r\n", "!400", "chunked twice"},
        {"", HEAD_OF "Transfer-Encoding: chunked\r\n"
         "Transfer-Encoding: identity\r\n\r\n", "!400",
         "smuggling: a second field hides the first"},
        {"", HEAD_OF "Transfer-Encoding: gzip, chunked\r\n\r\n", "!501",
         "a coding that we do not know"},
        {"", HEAD_OF "Transfer-Encoding: xchunked\r\n\r\n", "!501",
         "smuggling: nearly chunked"},
        {"", HEAD_OF "Transfer-Encoding: \"chunked\"\r\n\r\n", "!501",
         "smuggling: in quotes"},
        {"", HEAD_OF "Transfer-Encoding: \x0b" "chunked\r\n\r\n", "!400",
         "smuggling: a vertical tab before it"},
        {"", "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", "!400",
         "HTTP/1.0 knows no chunks"},
        {"", HEAD_OF "Transfer-Encoding : chunked\r\n\r\n", "!400",
         "smuggling: space before the colon"},
        {"", HEAD_OF "A: b\r\n c\r\n\r\n", "!400", "smuggling: folded"},
        {"", "GET / HTTP/1.1\r\n Host: a\r\n\r\n", "!400",
         "a blank before the first field"},
        {"", HEAD_OF "A: b\n\r\n", "!400", "bare LF in the head"},
        {"", "GET / HTTP/1.1\nHost: a\r\n\r\n", "!400",
         "bare LF after the request line"},
        {"", HEAD_OF "A: b\rC: d\r\n\r\n", "!400", "bare CR in a value"},
        {"", HEAD_OF "A: b\r\r\n\r\n", "!400", "two CR"},
        {"", HEAD_OF ": b\r\n\r\n", "!400", "no name"},
        {"", HEAD_OF "A\r\n\r\n", "!400", "no colon"},
        {"", HEAD_OF "A b: c\r\n\r\n", "!400", "a blank in a name"},
        {"", HEAD_OF "\xc3\xa9: c\r\n\r\n", "!400", "a name not of ASCII"},
        {"", HEAD_OF "A: \x7f\r\n\r\n", "!400", "a control character"},
        {"", "GET / HTTP/1.1\r\n\r\n", "!400", "no Host"},
        {"", "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", "!400",
         "two Hosts"},
        {"", "GET / HTTP/1.1\r\nHost: a b\r\n\r\n", "!400",
         "a Host with a blank"},
        {"", "GET  / HTTP/1.1\r\nHost: a\r\n\r\n", "!400", "two spaces"},
        {"", "GET / HTTP/1.1 \r\nHost: a\r\n\r\n", "!400", "a space after"},
        {"", "GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n", "!400", "a tab"},
        {"", "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", "!400",
         "a blank in the target"},
        {"", "GET /\x80 HTTP/1.1\r\nHost: a\r\n\r\n", "!400",
         "a target not of ASCII"},
        {"", "G(T / HTTP/1.1\r\nHost: a\r\n\r\n", "!400",
         "the method is no token"},
        {"", "GET /\r\n\r\n", "!400", "HTTP/0.9"},
        {"", "GET / HTTP/2.0\r\nHost: a\r\n\r\n", "!505", "HTTP/2"},
        {"", "GET / HTTP/0.9\r\nHost: a\r\n\r\n", "!505", "HTTP/0.9 by name"},
        {"", "GET / http/1.1\r\nHost: a\r\n\r\n", "!400", "in lower case"},
        {"", "GET / HTTP/1.10\r\nHost: a\r\n\r\n", "!400", "two digits"},
        {"", "GET / HTTP/11\r\nHost: a\r\n\r\n", "!400", "no dot"},
        {"", "\x16\x03\x01\x02", "!400", "TLS is refused at its first byte"},
        {"", "\r\n\r\n\r\n\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", "!400",
         "too many empty lines before"},
    };

    check_messages(rows, COUNT(rows));
}

TEST(bad_chunks_are_refused)
{
    static const struct {
        const char *body, *out, *reason;
    } rows[] = {
        {"5\nhello\r\n0\r\n\r\n", "!400", "bare LF after a size"},
        {"5\r\nhello\n0\r\n\r\n", "hello!400", "bare LF after a chunk"},
        {"5\r\nhello\r\n0\n\r\n", "hello!400", "bare LF after the last"},
        {"5\r\nhello\r\n0\r\n\n", "hello!400", "bare LF at the end"},
        {"5\r\nhello0\r\n\r\n", "hello!400", "a chunk longer than its size"},
        {"5\r\nhel\r\n0\r\n\r\n", "hel\r\n!400", "a chunk shorter"},
        {"5 \r\nhello\r\n", "!400", "a blank after a size"},
        {" 5\r\nhello\r\n", "!400", "a blank before a size"},
        {"0x5\r\nhello\r\n", "!400", "a prefix"},
        {"+5\r\nhello\r\n", "!400", "a sign"},
        {"\r\nhello\r\n", "!400", "no size"},
        {";a=b\r\nhello\r\n", "!400", "an extension alone"},
        {"g\r\nhello\r\n", "!400", "no hexadecimal digit"},
        {"5;a\rb\r\nhello\r\n", "!400", "a CR in an extension"},
        {"5\r\r\nhello\r\n", "!400", "two CR"},
        {"fffffffffffffffff\r\nhello\r\n", "!400", "more than 64 bits"},
        {"8000000000000000\r\nhello\r\n", "!400", "more than 63 bits"},
        {"0\r\nA : b\r\n\r\n", "!400", "a bad trailer"},
        {"0\r\n A: b\r\n\r\n", "!400", "a folded trailer"},
        {"0\r\nA\r\n\r\n", "!400", "a trailer without colon"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        char text[400], want[400];
        struct message row = {"", text, want, rows[i].reason};
        size_t len;

        snprintf(text, sizeof text, "%s%s", CHUNKED, rows[i].body);
        snprintf(want, sizeof want, "%s%s", CHUNKED_OUT, rows[i].out);
        len = strlen(want);
        for (size_t step = 1; step < 80; step = step * 2 + 1) {
            struct cube_buf out = {0};

            test_row("row %zu, %s, steps of %zu", i, row.reason, step);
            parse_in_steps(text, strlen(text), step, "", &out);
            if (out.len > len)
                out.data[len] = 0;
            CHECK_STR(out.data, want);
            cube_buf_free(&out);
        }
    }
}

TEST(answers_are_understood)
{
    static const struct message rows[] = {
        {"a", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
         "200 1.1|Content-Length=2|keep:hi.", "the usual"},
        {"a", "HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 \r\n"
         "Content-Length: 0\r\n\r\n",
         "204 1.1|keep:.200 1.1|Content-Length=0|keep:.",
         "204 has no body; no words after 200"},
        {"a", "HTTP/1.1 304 X\r\nContent-Length: 9\r\n\r\n",
         "304 1.1|Content-Length=9|keep:.", "nor has 304"},
        {"a", "HTTP/1.1 100 Continue\r\n\r\n", "100 1.1|keep:.", "nor 1xx"},
        {"ah", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n",
         "200 1.1|Content-Length=9|keep:.", "nor what answers a HEAD"},
        {"ae", "HTTP/1.1 200 OK\r\n\r\nall of it",
         "200 1.1|close:all of it.", "a body up to the end"},
        {"ae", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nnot",
         "200 1.1|Content-Length=9|keep:not!early", "cut in its body"},
        {"ae", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
         "2\r\nhi\r\n", "200 1.1|Transfer-Encoding=chunked|keep:hi!early",
         "cut between chunks"},
        {"ae", "HTTP/1.1 200", "!early", "cut in its head"},
        {"a", "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi",
         "200 1.0|Content-Length=2|close:hi.", "HTTP/1.0"},
        {"a", "HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n",
         "200 1.1|Content-Length=0|keep:.", "nothing after 200 at all"},
        {"a", "HTTP/1.1 200 OK\nContent-Length: 2\n\nhi",
         "200 1.1|Content-Length=2|close:hi.",
         "bare LF, as scripts write: read, not kept"},
        {"a", "HTTP/1.1 20 OK\r\n\r\n", "!400", "two digits"},
        {"a", "HTTP/1.1 2000 OK\r\n\r\n", "!400", "four digits"},
        {"a", "HTTP/1.1 099 OK\r\n\r\n", "!400", "below 100"},
        {"a", "HTTP/2 200 OK\r\n\r\n", "!400", "HTTP/2"},
        {"a", "SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n", "!400", "not HTTP"},
        {"a", "\r\nHTTP/1.1 200 OK\r\n\r\n", "!400", "an empty line before"},
        {"a", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n"
         "Transfer-Encoding: chunked\r\n\r\n", "!400", "two framings"},
        {"a", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n"
         "Content-Length: 3\r\n\r\n", "!400", "two lengths"},
        {"a", "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", "!501",
         "an unknown coding"},
    };

    check_messages(rows, COUNT(rows));
}

/* The status for a head made of `lead`, `count` times `repeat`, and `tail`;
 * 0 when it is accepted. */
static int status_of(const char *lead, const char *repeat, size_t count,
                     const char *tail)
{
    struct cube_http_parser p;
    struct cube_buf text = {0};
    struct cube_http_input in;
    enum cube_http_event e;
    int status;

    memset(&p, 0, sizeof p);
    cube_buf_puts(&text, lead);
    for (size_t i = 0; i < count; i++)
        cube_buf_puts(&text, repeat);
    cube_buf_puts(&text, tail);
    in.data = text.data;
    in.len = text.len;
    do
        e = cube_http_parse(&p, &in);
    while (e != CUBE_HTTP_ERROR && e != CUBE_HTTP_MORE && e != CUBE_HTTP_END);
    status = e == CUBE_HTTP_ERROR ? p.status : 0;
    CHECK(p.head.text.cap <= 2 * CUBE_HTTP_MAX_HEAD);
    cube_buf_free(&text);
    cube_buf_free(&p.head.text);
    return status;
}

TEST(what_is_too_long_is_refused)
{
    const char *tail = "\r\n\r\n", *get = "GET / HTTP/1.1\r\nHost: a\r\n";
    const char *line = " HTTP/1.1\r\nHost: a\r\n\r\n";

    CHECK_INT(status_of("GET /", "a", 8000, line), 0);
    CHECK_INT(status_of("GET /", "a", 8192, line), 414);
    CHECK_INT(status_of("GET /", "a", 100000, ""), 414);
    CHECK_INT(status_of("GET / HTTP/1.1\r\nHost: a\r\nA: ", "a", 32000, tail),
              0);
    CHECK_INT(status_of("GET / HTTP/1.1\r\nHost: a\r\nA: ", "a", 33000, tail),
              431);
    CHECK_INT(status_of("GET / HTTP/1.1\r\nHost: a\r\nA: ", "a", 99999, ""),
              431);
    CHECK_INT(status_of(get, "A: b\r\n", 99, "\r\n"), 0);
    CHECK_INT(status_of(get, "A: b\r\n", 100, "\r\n"), 431);
    CHECK_INT(status_of(CHUNKED "1;", "a", 250, "\r\nx\r\n0\r\n\r\n"), 0);
    CHECK_INT(status_of(CHUNKED "1;", "a", 260, ""), 400);
    CHECK_INT(status_of(CHUNKED, "1;aaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\nx\r\n",
                        2000, ""), 400);
    CHECK_INT(status_of(CHUNKED, "1\r\nx\r\n", 100000, "0\r\n\r\n"), 0);
    CHECK_INT(status_of(CHUNKED "0\r\n", "A: b\r\n", 10000, ""), 431);
}

TEST(NUL_bytes_are_refused)
{
    static const struct {
        const char *text;
        size_t len;
    } rows[] = {
        {"GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n", 29},
        {"GET / HTTP/1.1\0\r\nHost: a\r\n\r\n", 29},
        {"GET / HTTP/1.1\r\nHost: a\0\r\n\r\n", 29},
        {"GET / HTTP/1.1\r\nHost: a\0b\r\n\r\n", 30},
        {"GET / HTTP/1.1\r\nHost\0: a\r\n\r\n", 29},
        {"GET / HTTP/1.1\r\nHost: a\r\n\0\r\n", 29},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_buf out = {0};

        test_row("row %zu", i);
        parse_in_steps(rows[i].text, rows[i].len, 7, "", &out);
        CHECK_HAS(out.data, "!400");
        cube_buf_free(&out);
    }
}

TEST(token_characters_are_those_of_the_RFC)
{
    for (int c = 0; c < 256; c++) {
        bool want = c && (strchr("!#$%&'*+-.^_`|~", c) ||
                          (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') ||
                          (c >= 'A' && c <= 'Z'));

        test_row("character %d", c);
        CHECK_INT(cube_http_is_token((char)c), want);
    }
}

/* A model: random valid streams of messages, cut at random, come out as they
 * went in. */
TEST(random_messages_survive_random_cuts)
{
    for (int round = 0; round < 200; round++) {
        struct cube_buf in = {0}, want = {0}, got = {0};
        int count = 1 + (int)test_below(4);

        test_row("round %d", round);
        for (int i = 0; i < count; i++) {
            size_t len = test_below(60);

            cube_buf_printf(&in, "POST /%d HTTP/1.1\r\nHost: a\r\n", i);
            cube_buf_printf(&want, "POST /%d 1.1|Host=a", i);
            if (test_below(2)) {
                cube_buf_printf(&in, "Content-Length: %zu\r\n\r\n", len);
                cube_buf_printf(&want, "|Content-Length=%zu|keep:", len);
                for (size_t k = 0; k < len; k++) {
                    cube_buf_addc(&in, '\n');
                    cube_buf_addc(&want, '\n');
                }
            } else {
                cube_buf_puts(&in, "Transfer-Encoding: chunked\r\n\r\n");
                cube_buf_puts(&want, "|Transfer-Encoding=chunked|keep:");
                for (size_t k = 0; k < len;) {
                    size_t n = 1 + test_below(20);

                    cube_buf_printf(&in, "%zx\r\n%.*s\r\n", n, (int)n,
                                    "\r\n0\r\n\r\n0123456789abcdef");
                    cube_buf_add(&want, "\r\n0\r\n\r\n0123456789abcdef", n);
                    k += n;
                }
                cube_buf_puts(&in, "0\r\n\r\n");
            }
            cube_buf_addc(&want, '.');
        }
        parse_in_steps(in.data, in.len, 1 + test_below(50), "", &got);
        CHECK_STR(got.data, want.data);
        cube_buf_free(&in);
        cube_buf_free(&want);
        cube_buf_free(&got);
    }
}

/* ---- A world that can be disturbed ---- */

static int64_t clock_moved_ms;
static int accepts;          /* calls of accept */
static int accept_failures;  /* that many more fail with EMFILE */
static int connects;         /* calls of connect */
static int sends_left;       /* calls of send before it says EAGAIN; -1: all */

/* Time stands still unless a test moves it. */
static int64_t moved_now_ms(void *ctx)
{
    (void)ctx;
    return 1000000 + clock_moved_ms;
}

static int counted_accept(void *ctx, int fd, struct cube_addr *peer)
{
    accepts++;
    if (accept_failures > 0) {
        accept_failures--;
        return -EMFILE;
    }
    return cube_world_real()->accept(ctx, fd, peer);
}

static int counted_connect(void *ctx, const struct cube_addr *addr)
{
    connects++;
    return cube_world_real()->connect(ctx, addr);
}

static int limited_send(void *ctx, int fd, const void *data, size_t len)
{
    if (sends_left == 0)
        return -EAGAIN;
    if (sends_left > 0)
        sends_left--;
    return cube_world_real()->send(ctx, fd, data, len);
}

/* "one.test" is this machine; other names are nobody's. No name server is
 * asked. */
static int fake_job_start(void *ctx, struct cube_poll *p,
                          struct cube_job *job)
{
    if (job->kind == CUBE_JOB_RESOLVE)
        snprintf(job->host, sizeof job->host, "%s",
                 strcmp(job->host, "one.test") == 0 ? "127.0.0.1" : "");
    return cube_world_real()->job_start(ctx, p, job);
}

/* ---- One loop, a server and a client on it ---- */

static struct cube_world world;
static struct cube_loop *loop;
static struct cube_http_server *server;
static struct cube_http_client *client;
static struct cube_http_req *held;    /* a request that was not answered */
static int handled;                   /* requests that reached a handler */
static int gone;                      /* calls of on_gone */
static struct cube_http_req *keeps[300]; /* all that do_keep has had */
static size_t keep_count;
static char base[200];

static void open_loop(void)
{
    struct cube_err err;

    world = *cube_world_real();
    world.now_ms = moved_now_ms;
    world.accept = counted_accept;
    world.connect = counted_connect;
    world.send = limited_send;
    world.job_start = fake_job_start;
    clock_moved_ms = 0;
    accepts = accept_failures = connects = 0;
    sends_left = -1;
    held = NULL;
    handled = gone = 0;
    keep_count = 0;
    server = NULL;
    client = NULL;
    loop = cube_loop_new(&world, &err);
    REQUIRE(loop);
}

static void close_all(void)
{
    cube_http_client_free(client);
    cube_http_close(server);
    cube_loop_free(loop);
    client = NULL;
    server = NULL;
    loop = NULL;
}

/* Turns until `*what` is `value`; false when that takes too long. */
static bool turn_until(const int *what, int value)
{
    int64_t until = cube_world_real()->now_ms(NULL) + 10000;

    while (*what != value && cube_world_real()->now_ms(NULL) < until)
        cube_loop_turn(loop, 100, NULL);
    return *what == value;
}

/* Turns until nothing happens any more. */
static void turn_idle(void)
{
    for (int i = 0; i < 20; i++)
        cube_loop_turn(loop, 1, NULL);
}

/* Turns with a clock that jumps: what is due by then happens. */
static void pass_ms(int64_t ms)
{
    turn_idle();
    clock_moved_ms += ms;
    turn_idle();
}

/* ---- Handlers ---- */

static void on_gone(void *arg)
{
    gone++;
    if (held == arg)
        held = NULL;
}

static void do_hello(void *arg, struct cube_http_req *req)
{
    (void)arg;
    handled++;
    cube_http_reply(req, 200, "text/plain", "hello", 5);
}

/* Tells what the server understood. */
static void do_echo(void *arg, struct cube_http_req *req)
{
    struct cube_buf out = {0};
    const char *x = cube_http_query(req, "x");
    const char *body;
    size_t len;

    (void)arg;
    handled++;
    body = cube_http_body(req, &len);
    cube_buf_printf(&out, "%s %s id=%s x=%s ", cube_http_method(req),
                    cube_http_path(req),
                    cube_http_param(req, "id") ? cube_http_param(req, "id")
                                               : "(none)",
                    x ? x : "(none)");
    cube_buf_add(&out, body, len);
    cube_http_reply(req, 200, "text/plain", out.data, out.len);
    cube_buf_free(&out);
}

/* With more than one it is the last that is held. */
static void do_hold(void *arg, struct cube_http_req *req)
{
    (void)arg;
    handled++;
    held = req;
    cube_http_on_gone(req, on_gone, req);
}

/* Holds it and does not ask when the peer goes. */
static void do_keep(void *arg, struct cube_http_req *req)
{
    (void)arg;
    handled++;
    held = keeps[keep_count++] = req;
    REQUIRE(keep_count < COUNT(keeps));
}

static void do_stream(void *arg, struct cube_http_req *req)
{
    (void)arg;
    handled++;
    held = req;
    cube_http_on_gone(req, on_gone, req);
    cube_http_stream(req, 200, "text/plain");
}

static struct cube_http_text *shared;

static void do_text(void *arg, struct cube_http_req *req)
{
    (void)arg;
    handled++;
    cube_http_reply_text(req, "text/plain", shared);
}

static const struct cube_http_route routes[] = {
    {"GET", "/text", do_text},
    {"GET", "/", do_hello},
    {"GET", "/healthz", do_hello},
    {"GET", "/echo/{id}", do_echo},
    {"POST", "/echo/{id}", do_echo},
    {"DELETE", "/echo/{id}/sub", do_echo},
    {"GET", "/hold", do_hold},
    {"POST", "/hold", do_hold},
    {"GET", "/keep", do_keep},
    {"GET", "/stream", do_stream},
    {NULL, NULL, NULL},
};

static void open_server(const char *where,
                        const struct cube_http_options *options)
{
    struct cube_err err = {0, ""};

    server = cube_http_listen(loop, where, routes, NULL, options, &err);
    CHECK_STR(err.text, "");
    REQUIRE(server);
    if (cube_text_starts(where, "unix:"))
        snprintf(base, sizeof base, "%s", where);
    else
        snprintf(base, sizeof base, "http://127.0.0.1:%u",
                 (unsigned)cube_http_port(server));
}

static void open_client(const char *to)
{
    struct cube_err err = {0, ""};

    client = cube_http_client_new(loop, to, NULL, &err);
    CHECK_STR(err.text, "");
    REQUIRE(client);
}

/* ---- What a call came to ---- */

struct outcome {
    int done, status, heads;
    char body[4096], field[64];
    char pieces[4096];
    size_t len, piece_len;
    enum cube_code code;
    char words[500];
};

static void on_done(void *arg, const struct cube_http_answer *a)
{
    struct outcome *o = arg;
    const char *field = a->head ? cube_http_head_get(a->head, "content-type")
                                : NULL;

    o->done++;
    o->status = a->status;
    o->len = a->body_len;
    snprintf(o->body, sizeof o->body, "%s", a->body);
    snprintf(o->field, sizeof o->field, "%s", field ? field : "");
    o->code = a->err ? a->err->code : CUBE_OK;
    snprintf(o->words, sizeof o->words, "%s", a->err ? a->err->text : "");
}

static void on_head(void *arg, const struct cube_http_head *head)
{
    struct outcome *o = arg;

    o->heads++;
    o->status = cube_http_head_status(head);
}

static void on_data(void *arg, const char *data, size_t len)
{
    struct outcome *o = arg;

    if (o->piece_len + len < sizeof o->pieces)
        memcpy(o->pieces + o->piece_len, data, len);
    o->piece_len += len;
}

static struct cube_http_call *call(struct outcome *o, const char *method,
                                   const char *target, const char *body)
{
    struct cube_http_request r = {0};

    memset(o, 0, sizeof *o);
    r.method = method;
    r.target = target;
    r.body = body;
    r.body_len = body ? strlen(body) : 0;
    r.on_done = on_done;
    r.arg = o;
    return cube_http_call(client, &r);
}

static void ask(struct outcome *o, const char *method, const char *target,
                const char *body)
{
    call(o, method, target, body);
    CHECK(turn_until(&o->done, 1));
}

TEST(client_and_server_talk)
{
    struct outcome o;

    open_loop();
    open_server("127.0.0.1:0", NULL);
    open_client(base);
    ask(&o, "GET", "/", NULL);
    CHECK_INT(o.status, 200);
    CHECK_STR(o.body, "hello");
    CHECK_STR(o.field, "text/plain");
    ask(&o, "POST", "/echo/a%20b/?x=%2B1", "body");
    CHECK_STR(o.body, "POST /echo/a%20b/ id=a b x=+1 body");
    ask(&o, "DELETE", "/echo/1", NULL);
    CHECK_INT(o.status, 405);
    ask(&o, "GET", "/nothing", NULL);
    CHECK_INT(o.status, 404);
    CHECK_STR(o.body, "{\"HTTPStatusCode\":404,\"Message\":\"there is no "
                      "/nothing here\"}\n");
    close_all();
}

TEST(stream_arrives_in_pieces)
{
    struct cube_http_request r = {0};
    struct outcome o = {0};

    open_loop();
    open_server("127.0.0.1:0", NULL);
    open_client(base);
    r.target = "/stream";
    r.on_head = on_head;
    r.on_data = on_data;
    r.on_done = on_done;
    r.arg = &o;
    cube_http_call(client, &r);
    CHECK(turn_until(&o.heads, 1));
    REQUIRE(held);
    cube_http_stream_write(held, "one ", 4);
    turn_idle();
    CHECK_STR(o.pieces, "one ");
    cube_http_stream_write(held, "two ", 4);
    cube_http_stream_write(held, "three", 5);
    turn_idle();
    CHECK_STR(o.pieces, "one two three");
    CHECK_INT(o.done, 0);
    cube_http_stream_end(held);
    CHECK(turn_until(&o.done, 1));
    CHECK_INT(o.code, CUBE_OK);
    CHECK_INT(gone, 0);
    close_all();
}

/* ---- A peer that writes and reads bytes ---- */

struct peer {
    int fd;
    struct cube_buf in;
    int is_eof;
};

static struct peer peer_to(const struct cube_addr *addr)
{
    const struct cube_world *w = cube_world_real();
    struct peer p = {-1, {0}, 0};

    p.fd = w->connect(w->ctx, addr);
    REQUIRE(p.fd >= 0);
    return p;
}

static struct peer peer_open(void)
{
    return peer_to(&server->listeners[0].addr);
}

static void peer_close(struct peer *p)
{
    if (p->fd >= 0)
        close(p->fd);
    p->fd = -1;
    cube_buf_free(&p->in);
}

static void peer_read(struct peer *p)
{
    char bytes[65536];
    ssize_t n;

    while ((n = recv(p->fd, bytes, sizeof bytes, MSG_DONTWAIT)) > 0)
        cube_buf_add(&p->in, bytes, (size_t)n);
    p->is_eof = n == 0 ? 1 : errno == EAGAIN ? 0 : -1;
}

/* Writes all of it, turning the loop when the socket is full. */
static void peer_write(struct peer *p, const char *data, size_t len)
{
    for (int i = 0; i < 10000 && len > 0; i++) {
        ssize_t n = send(p->fd, data, len, MSG_NOSIGNAL | MSG_DONTWAIT);

        if (n < 0 && errno != EAGAIN)
            return;
        if (n > 0) {
            data += n;
            len -= (size_t)n;
        }
        cube_loop_turn(loop, n > 0 ? 0 : 10, NULL);
    }
}

static void peer_say(struct peer *p, const char *text)
{
    peer_write(p, text, strlen(text));
}

/* Turns until what came holds `part`, or the other side has hung up. */
static void peer_hears(struct peer *p, const char *part)
{
    int64_t until = cube_world_real()->now_ms(NULL) + 5000;

    do {
        cube_loop_turn(loop, 10, NULL);
        peer_read(p);
    } while (!(p->in.data && strstr(p->in.data, part)) && !p->is_eof &&
             cube_world_real()->now_ms(NULL) < until);
    CHECK_HAS(p->in.data ? p->in.data : "", part);
}

/* Turns until the other side has hung up: 1 for an end, -1 for a reset. */
static int peer_ends(struct peer *p)
{
    int64_t until = cube_world_real()->now_ms(NULL) + 5000;

    do {
        cube_loop_turn(loop, 10, NULL);
        peer_read(p);
    } while (!p->is_eof && cube_world_real()->now_ms(NULL) < until);
    return p->is_eof;
}

static int count_of(const char *text, const char *part)
{
    int n = 0;

    for (; text && (text = strstr(text, part)); text += strlen(part))
        n++;
    return n;
}

#define HOST "Host: 127.0.0.1\r\n"
#define GET(target) "GET " target " HTTP/1.1\r\n" HOST "\r\n"

/* ---- The server ---- */

/* Says `text` on a connection of its own: the status of the first answer, 0
 * for none; `all` gets what came until nothing more does. */
static int status_to(const char *text, struct cube_buf *all)
{
    struct peer p = peer_open();
    int status = 0;

    peer_say(&p, text);
    for (int i = 0; i < 100 && !p.is_eof && p.in.len == 0; i++) {
        cube_loop_turn(loop, 20, NULL);
        peer_read(&p);
    }
    turn_idle();
    peer_read(&p);
    if (p.in.len > 12)
        status = atoi(p.in.data + 9);
    if (all) {
        cube_buf_clear(all);
        cube_buf_add(all, p.in.data ? p.in.data : "", p.in.len);
    }
    peer_close(&p);
    turn_idle();
    return status;
}

TEST(routes_are_found)
{
    static const struct {
        const char *line, *more;
        int status;
        const char *part, *reason;
    } rows[] = {
        {"GET / HTTP/1.1", "", 200, "hello", "the root"},
        {"GET /?a=b HTTP/1.1", "", 200, "hello", "with a query"},
        {"GET http://127.0.0.1/ HTTP/1.1", "", 200, "hello",
         "the absolute form"},
        {"GET http://127.0.0.1 HTTP/1.1", "", 200, "hello", "without path"},
        {"GET http://127.0.0.1?x=1 HTTP/1.1", "", 400, "", "nor slash"},
        {"GET /echo/7 HTTP/1.1", "", 200, "GET /echo/7 id=7 x=(none) ",
         "a variable"},
        {"GET /echo/7/ HTTP/1.1", "", 200, "id=7", "a trailing slash"},
        {"GET /echo/7// HTTP/1.1", "", 404, "", "two of them"},
        {"GET //echo/7 HTTP/1.1", "", 404, "", "an empty segment"},
        {"GET /echo// HTTP/1.1", "", 404, "", "an empty variable"},
        {"GET /echo HTTP/1.1", "", 404, "", "no variable"},
        {"GET /echo/a%2Fb%20c HTTP/1.1", "", 200, "id=a/b c ", "decoded"},
        {"GET /%65cho/7 HTTP/1.1", "", 200, "id=7",
         "literal parts are decoded as well"},
        {"GET /echo/7?y=1&x=a+b%26&x=2 HTTP/1.1", "", 200, "x=a b& ",
         "the first of a query, decoded"},
        {"GET /echo/7?x HTTP/1.1", "", 200, "x= ", "without a value"},
        {"GET /echo/7?&&x=1& HTTP/1.1", "", 200, "x=1 ", "empty pairs"},
        {"GET /echo/7?xx=1 HTTP/1.1", "", 200, "x=(none)", "another name"},
        {"GET /echo/%zz HTTP/1.1", "", 400, "", "no escape"},
        {"GET /echo/%4 HTTP/1.1", "", 400, "", "half an escape"},
        {"GET /echo/%00 HTTP/1.1", "", 400, "", "a NUL"},
        {"GET /echo/7?x=%0 HTTP/1.1", "", 400, "", "the same in a query"},
        {"GET echo HTTP/1.1", "", 400, "", "no slash"},
        {"OPTIONS * HTTP/1.1", "", 400, "", "no path"},
        {"GET /nothing HTTP/1.1", "", 404, "there is no /nothing here",
         "unknown"},
        {"GET /a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a HTTP/1.1", "", 400, "",
         "too many segments"},
        {"DELETE /echo/7 HTTP/1.1", "", 405, "Allow: GET, HEAD, POST\r\n",
         "another method"},
        {"HEAD /echo/7/sub HTTP/1.1", "", 405, "Allow: DELETE\r\n",
         "HEAD where there is no GET"},
        {"PUT /hold HTTP/1.1", "", 405, "\"HTTPStatusCode\":405", "in JSON"},
        {"GET / HTTP/1.1", "Expect: more\r\n", 417, "", "what we cannot do"},
    };
    struct cube_buf all = {0};

    open_loop();
    open_server("127.0.0.1:0", NULL);
    for (size_t i = 0; i < COUNT(rows); i++) {
        char text[500];

        test_row("row %zu, %s", i, rows[i].reason);
        snprintf(text, sizeof text, "%s\r\n" HOST "%s\r\n", rows[i].line,
                 rows[i].more);
        CHECK_INT(status_to(text, &all), rows[i].status);
        CHECK_HAS(all.data, rows[i].part);
    }
    cube_buf_free(&all);
    close_all();
}

TEST(answers_have_a_date_and_a_length)
{
    struct cube_buf all = {0};
    int64_t wall = cube_world_real()->wall_ns(NULL) / 1000000000;
    time_t now = (time_t)wall;
    char date[60], later[60];

    open_loop();
    open_server("127.0.0.1:0", NULL);
    strftime(date, sizeof date, "Date: %a, %d %b %Y %H:%M:%S GMT\r\n",
             gmtime(&now));
    status_to(GET("/"), &all);
    now++;
    strftime(later, sizeof later, "Date: %a, %d %b %Y %H:%M:%S GMT\r\n",
             gmtime(&now));
    CHECK(strstr(all.data, date) || strstr(all.data, later));
    CHECK_HAS(all.data, "Content-Type: text/plain\r\n");
    CHECK_HAS(all.data, "Content-Length: 5\r\n");
    CHECK(!strstr(all.data, "Connection:"));
    cube_buf_free(&all);
    close_all();
}

TEST(HEAD_has_a_length_and_no_body)
{
    struct peer p;

    open_loop();
    open_server("127.0.0.1:0", NULL);
    p = peer_open();
    peer_say(&p, "HEAD / HTTP/1.1\r\n" HOST "\r\n" GET("/echo/next"));
    peer_hears(&p, "id=next");
    CHECK_HAS(p.in.data, "Content-Length: 5\r\n");
    CHECK(!strstr(p.in.data, "hello"));
    peer_close(&p);
    close_all();
}

TEST(connections_are_kept_as_asked)
{
    static const struct {
        const char *head, *part;
        int ends;
        const char *reason;
    } rows[] = {
        {"GET / HTTP/1.1\r\n" HOST "\r\n", "Content-Length", 0, "by default"},
        {"GET / HTTP/1.1\r\n" HOST "Connection: close\r\n\r\n",
         "Connection: close\r\n", 1, "asked to close"},
        {"GET / HTTP/1.0\r\n\r\n", "Connection: close\r\n", 1, "1.0"},
        {"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
         "Connection: keep-alive\r\n", 0, "1.0 that asks to keep"},
        {"GET /none HTTP/1.1\r\n" HOST "\r\n", "404", 0,
         "a refusal without a body keeps it"},
        {"POST /none HTTP/1.1\r\n" HOST "Content-Length: 3\r\n\r\nabc",
         "Connection: close\r\n", 1, "one with a body does not"},
        {"GET /\r\n\r\n", "Connection: close\r\n", 1, "nor what is no HTTP"},
    };

    open_loop();
    open_server("127.0.0.1:0", NULL);
    for (size_t i = 0; i < COUNT(rows); i++) {
        struct peer p = peer_open();

        test_row("row %zu, %s", i, rows[i].reason);
        peer_say(&p, rows[i].head);
        peer_hears(&p, rows[i].part);
        if (rows[i].ends) {
            CHECK_INT(peer_ends(&p), 1);
        } else {
            peer_say(&p, "GET /echo/again HTTP/1.0\r\n\r\n");
            peer_hears(&p, "id=again");
        }
        peer_close(&p);
    }
    close_all();
}

TEST(pipelined_requests_are_answered_in_order)
{
    struct peer p;

    open_loop();
    open_server("127.0.0.1:0", NULL);
    p = peer_open();
    peer_say(&p, GET("/echo/1") GET("/hold") GET("/echo/2")
             "POST /echo/3 HTTP/1.1\r\n" HOST "Content-Length: 2\r\n\r\nab"
             GET("/echo/4"));
    peer_hears(&p, "id=1");
    turn_idle();
    CHECK_INT(handled, 2); /* the others wait for the one that is held */
    REQUIRE(held);
    peer_read(&p);
    CHECK(!strstr(p.in.data, "id=2"));
    cube_http_reply(held, 200, NULL, "held", 4);
    peer_hears(&p, "id=4");
    CHECK(strstr(p.in.data, "id=1") < strstr(p.in.data, "held"));
    CHECK(strstr(p.in.data, "held") < strstr(p.in.data, "id=2"));
    CHECK(strstr(p.in.data, "id=2") < strstr(p.in.data, "id=3 x=(none) ab"));
    CHECK_INT(gone, 0);
    peer_close(&p);
    close_all();
}

TEST(a_thousand_pipelined_requests_do_not_fill_memory)
{
    struct peer p;
    struct cube_buf text = {0};
    int count = 0;

    open_loop();
    open_server("127.0.0.1:0", NULL);
    p = peer_open();
    for (int i = 0; i < 20000; i++)
        cube_buf_puts(&text, GET("/echo/x"));
    /* Nothing is read while all of it is written. */
    for (size_t at = 0, still = 0; at < text.len && still < 50;) {
        ssize_t n = send(p.fd, text.data + at, text.len - at,
                         MSG_NOSIGNAL | MSG_DONTWAIT);

        at += n > 0 ? (size_t)n : 0;
        still = n > 0 ? 0 : still + 1;
        cube_loop_turn(loop, 0, NULL);
        if (at == text.len || still == 50)
            cube_buf_drop(&text, at);
        if (still == 50)
            break;
    }
    CHECK(test_heap_bytes < 6 << 20);
    for (int i = 0; i < 100000 && count < 20000; i++) {
        peer_read(&p);
        if (text.len > 0) {
            ssize_t n = send(p.fd, text.data, text.len,
                             MSG_NOSIGNAL | MSG_DONTWAIT);
            if (n > 0)
                cube_buf_drop(&text, (size_t)n);
        }
        cube_loop_turn(loop, 1, NULL);
        count = handled;
    }
    CHECK_INT(count, 20000);
    turn_idle();
    peer_read(&p);
    CHECK_INT(count_of(p.in.data, "HTTP/1.1 200"), 20000);
    cube_buf_free(&text);
    peer_close(&p);
    close_all();
}

TEST(request_bodies_come_chunked_and_in_bytes)
{
    struct peer p;
    const char *text = "POST /echo/1 HTTP/1.1\r\n" HOST
                       "Transfer-Encoding: chunked\r\n\r\n"
                       "3;a=b\r\nabc\r\n2\r\nde\r\n0\r\nX: y\r\n\r\n";

    open_loop();
    open_server("127.0.0.1:0", NULL);
    p = peer_open();
    for (size_t i = 0; text[i]; i++) {
        peer_write(&p, text + i, 1);
        cube_loop_turn(loop, 0, NULL);
    }
    peer_hears(&p, "x=(none) abcde");
    peer_close(&p);
    close_all();
}

TEST(expect_100_is_answered_before_the_body)
{
    struct peer p;
    const char *head = "POST /echo/1 HTTP/1.1\r\n" HOST
                       "Expect: 100-Continue\r\nContent-Length: 4\r\n\r\n";

    open_loop();
    open_server("127.0.0.1:0", NULL);
    p = peer_open();
    peer_say(&p, head);
    peer_hears(&p, "HTTP/1.1 100 Continue\r\n\r\n");
    CHECK_INT(handled, 0);
    peer_say(&p, "body");
    peer_hears(&p, "x=(none) body");
    peer_close(&p);
    p = peer_open(); /* one that would be refused hears so, not 100 */
    peer_say(&p, "POST /none HTTP/1.1\r\n" HOST
             "Expect: 100-continue\r\nContent-Length: 4\r\n\r\n");
    peer_hears(&p, "HTTP/1.1 404");
    CHECK(!strstr(p.in.data, "100 Continue"));
    CHECK_INT(peer_ends(&p), 1);
    peer_close(&p);
    close_all();
}

TEST(large_bodies_are_refused_and_the_refusal_arrives)
{
    static const char *const heads[] = {
        "POST /echo/1 HTTP/1.1\r\n" HOST "Content-Length: 9000000\r\n\r\n",
        "POST /echo/1 HTTP/1.1\r\n" HOST
        "Content-Length: 99999999999999999999999\r\n\r\n",
        "POST /echo/1 HTTP/1.1\r\n" HOST
        "Transfer-Encoding: chunked\r\n\r\n800000\r\n",
    };
    struct cube_http_options o = {.max_body = 100000};
    char *bytes = calloc(1, 1000000);

    open_loop();
    open_server("127.0.0.1:0", &o);
    for (size_t i = 0; i < COUNT(heads); i++) {
        struct peer p = peer_open();

        test_row("row %zu", i);
        peer_say(&p, heads[i]);
        /* The peer goes on sending, as real ones do, and reads afterwards:
         * no reset may have taken the answer away. */
        peer_write(&p, bytes, 1000000);
        peer_hears(&p, "HTTP/1.1 413");
        CHECK_INT(handled, 0);
        peer_close(&p);
    }
    free(bytes);
    close_all();
}

TEST(a_refusal_names_the_limit_and_what_to_do)
{
    static const struct {
        const char *lead, *repeat;
        size_t count;
        const char *words;
    } rows[] = {
        {"GET /", "a", 9000, "the first line is longer than 8192 bytes: put"},
        {"GET / HTTP/1.1\r\n" HOST "A: ", "a", 40000,
         "the head is longer than 32768 bytes: send fewer"},
        {"GET / HTTP/1.1\r\n" HOST, "A: b\r\n", 101,
         "the head has more than 100 fields: send fewer"},
        {"POST /echo/1 HTTP/1.1\r\n" HOST
         "Transfer-Encoding: chunked\r\n\r\n0\r\n", "A: b\r\n", 9000,
         "the trailers are longer than 32768 bytes: send fewer"},
        {"POST /echo/1 HTTP/1.1\r\n" HOST
         "Transfer-Encoding: chunked\r\n\r\n1;", "a", 300,
         "the line before a chunk is longer than 256 bytes"},
        {"POST /echo/1 HTTP/1.1\r\n" HOST "Content-Length: 5000\r\n\r\n",
         "", 0, "the body is longer than 4096 bytes: send less"},
    };
    struct cube_http_options o = {.max_body = 4096};

    open_loop();
    open_server("127.0.0.1:0", &o);
    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_buf text = {0};
        struct peer p = peer_open();

        test_row("row %zu", i);
        cube_buf_puts(&text, rows[i].lead);
        for (size_t n = 0; n < rows[i].count; n++)
            cube_buf_puts(&text, rows[i].repeat);
        peer_write(&p, text.data, text.len);
        peer_hears(&p, rows[i].words);
        peer_close(&p);
        cube_buf_free(&text);
    }
    close_all();
}

TEST(body_of_the_largest_size_is_taken)
{
    struct cube_http_options o = {.max_body = 100000};
    struct peer p;
    char *bytes = malloc(100000);

    open_loop();
    open_server("127.0.0.1:0", &o);
    memset(bytes, 'x', 100000);
    p = peer_open();
    peer_say(&p, "POST /echo/1 HTTP/1.1\r\n" HOST
             "Content-Length: 100000\r\n\r\n");
    peer_write(&p, bytes, 100000);
    peer_hears(&p, "HTTP/1.1 200");
    CHECK_INT(handled, 1);
    free(bytes);
    peer_close(&p);
    close_all();
}

/* Names end at 255 characters. */
#define TEN "evil-evil-"
#define LONG TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN \
    TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN "example"

TEST(access_is_checked)
{
    static const char *const names[] = {"cube.example", NULL};
    static const struct {
        const char *line, *fields;
        int status;
        const char *reason;
    } rows[] = {
        {"GET /", "Host: 127.0.0.1\r\n", 401, "no token"},
        {"GET /", "Host: 127.0.0.1\r\nAuthorization: Bearer one\r\n", 200,
         "the first token"},
        {"GET /", "Host: 127.0.0.1\r\nAuthorization: bearer  two\r\n", 200,
         "the second one, the scheme in any case"},
        {"GET /", "Host: 127.0.0.1\r\nAuthorization: Bearer on\r\n", 401,
         "a part of it"},
        {"GET /", "Host: 127.0.0.1\r\nAuthorization: Bearer onee\r\n", 401,
         "more than it"},
        {"GET /", "Host: 127.0.0.1\r\nAuthorization: Bearer\r\n", 401,
         "nothing of it"},
        {"GET /", "Host: 127.0.0.1\r\nAuthorization: Basic one\r\n", 401,
         "another scheme"},
        {"GET /none", "Host: 127.0.0.1\r\n", 401,
         "without a token one does not learn what there is"},
        {"GET /healthz", "Host: 127.0.0.1\r\n", 200, "health is open"},
        {"HEAD /healthz/", "Host: 127.0.0.1\r\n", 200, "and its head"},
        {"POST /healthz", "Host: 127.0.0.1\r\n", 401, "to GET alone"},
        {"GET /healthz", "Host: 127.0.0.1\r\nOrigin: null\r\n", 403,
         "a web page, which sends an Origin"},
        {"GET /", "Host: 127.0.0.1\r\nAuthorization: Bearer one\r\n"
         "Origin: http://127.0.0.1\r\n", 403, "also with a token"},
        {"GET /healthz", "Host: evil.example\r\n", 403, "DNS rebinding"},
        {"GET /healthz", "Host: evil.example:7777\r\n", 403, "with a port"},
        {"GET /healthz", "Host: 127.0.0.1.evil.example\r\n", 403,
         "nearly an address"},
        {"GET /healthz", "Host: localhost.evil.example\r\n", 403,
         "nearly localhost"},
        {"GET /healthz", "Host:\r\n", 403, "no name"},
        {"GET /healthz", "Host: 127.0.0.1:x\r\n", 403, "no port"},
        {"GET /healthz", "Host: 127.1\r\n", 403, "a strange address"},
        {"GET /healthz", "Host: [::1\r\n", 403, "half an address"},
        {"GET /healthz", "Host: [localhost]\r\n", 403, "a name in brackets"},
        {"GET /healthz", "Host: 10.0.0.7:5555\r\n", 200, "IPv4"},
        {"GET /healthz", "Host: [::1]\r\n", 200, "IPv6"},
        {"GET /healthz", "Host: [fe80::1]:5555\r\n", 200, "IPv6, a port"},
        {"GET /healthz", "Host: LocalHost:1\r\n", 200, "localhost"},
        {"GET /healthz", "Host: CUBE.example:1\r\n", 200, "a known name"},
        {"GET http://evil.example/healthz", "Host: 127.0.0.1\r\n", 403,
         "the authority of the target counts"},
        {"GET HTTP://evil.example/healthz", "Host: 127.0.0.1\r\n", 403,
         "a scheme has no case"},
        {"GET HTTP://cube.example/healthz", "Host: evil.example\r\n", 200,
         "nor here"},
        {"GET http://" LONG "/healthz", "Host: 127.0.0.1\r\n", 403,
         "however long it is"},
        {"GET http:///healthz", "Host: 127.0.0.1\r\n", 400,
         "an authority that is none"},
    };
    struct cube_http_options o = {.tokens = {"one", "two"},
                                  .host_names = names,
                                  .is_open_health = true};
    struct cube_buf all = {0};

    open_loop();
    open_server("127.0.0.1:0", &o);
    for (size_t i = 0; i < COUNT(rows); i++) {
        char text[1000];

        test_row("row %zu, %s", i, rows[i].reason);
        snprintf(text, sizeof text, "%s HTTP/1.1\r\n%s\r\n", rows[i].line,
                 rows[i].fields);
        CHECK_INT(status_to(text, &all), rows[i].status);
        CHECK_INT(strstr(all.data, "WWW-Authenticate: Bearer\r\n") != NULL,
                  rows[i].status == 401);
    }
    CHECK_INT(status_to("GET /healthz HTTP/1.0\r\n\r\n", NULL), 200);
    cube_buf_free(&all);
    close_all();
}

TEST(public_servers_serve_web_pages)
{
    struct cube_http_options o = {.is_public = true};

    open_loop();
    open_server("127.0.0.1:0", &o);
    CHECK_INT(status_to("GET / HTTP/1.1\r\nHost: any.example\r\n"
                        "Origin: http://any.example\r\n\r\n", NULL), 200);
    close_all();
}

TEST(slow_clients_are_cut)
{
    static const struct {
        const char *first, *second, *part;
        int64_t ms;
        const char *reason;
    } rows[] = {
        {"", NULL, "", 1000, "says nothing"},
        {GET("/"), NULL, "hello", 1000, "says nothing after a request"},
        {"GET / HT", NULL, "HTTP/1.1 408", 200, "stops in a head"},
        {"GET / HT", "TP/1.1\r\n", "the head was not whole after 0.2 s: send",
         200, "a head in drops"},
        {"POST /echo/1 HTTP/1.1\r\n" HOST "Content-Length: 9\r\n\r\na", "b",
         "the body was not whole after 0.4 s: send", 400, "a body in drops"},
    };
    struct cube_http_options o = {.idle_timeout_ms = 1000,
                                  .head_timeout_ms = 200,
                                  .body_timeout_ms = 400};

    open_loop();
    open_server("127.0.0.1:0", &o);
    for (size_t i = 0; i < COUNT(rows); i++) {
        struct peer p = peer_open();

        test_row("row %zu, %s", i, rows[i].reason);
        peer_say(&p, rows[i].first);
        turn_idle();
        clock_moved_ms += rows[i].ms - 100;
        turn_idle();
        peer_read(&p);
        CHECK_INT(p.is_eof, 0);
        if (rows[i].second)
            peer_say(&p, rows[i].second);
        pass_ms(100);
        CHECK_INT(peer_ends(&p), 1);
        CHECK_HAS(p.in.data ? p.in.data : "", rows[i].part);
        peer_close(&p);
    }
    turn_idle();
    clock_moved_ms += 100000;
    turn_idle();
    CHECK_INT(server->conn_count, 0);
    close_all();
}

TEST(a_handler_may_take_its_time)
{
    struct peer p;

    open_loop();
    open_server("127.0.0.1:0", NULL);
    p = peer_open();
    peer_say(&p, GET("/hold"));
    turn_idle();
    pass_ms(1000000);
    REQUIRE(held);
    CHECK_INT(gone, 0);
    cube_http_reply(held, 200, NULL, "at last", 7);
    peer_hears(&p, "at last");
    peer_close(&p);
    close_all();
}

/* A timer of the connection's own stands where it last had to be; the answer
 * below is given in the very moment in which that comes. What was waited for
 * then is over, and its deadline cuts nobody. */
static void answer_much(void *arg)
{
    cube_http_reply(held, 200, NULL, arg, 8 << 20);
}

TEST(an_answer_given_when_an_old_deadline_comes_is_not_cut)
{
    struct cube_http_options o = {.idle_timeout_ms = 1000};
    struct cube_timer timer = {0};
    char *bytes = calloc(1, 8 << 20);
    struct peer p;

    open_loop();
    open_server("127.0.0.1:0", &o);
    cube_timer_set(loop, &timer, 1000, answer_much, bytes);
    p = peer_open();
    turn_idle();                    /* idle, for 1000 ms at most */
    peer_say(&p, GET("/hold"));
    turn_idle();
    REQUIRE(held);
    pass_ms(1000);                  /* both timers are due in one turn */
    while (p.in.len < 8 << 20 && !p.is_eof) {
        cube_loop_turn(loop, 10, NULL);
        peer_read(&p);
    }
    CHECK(p.in.len > 8 << 20);
    cube_buf_clear(&p.in);
    peer_say(&p, GET("/"));         /* and the connection is kept */
    peer_hears(&p, "hello");
    free(bytes);
    peer_close(&p);
    close_all();
}

TEST(a_reader_that_stalls_is_cut)
{
    struct cube_http_options o = {.body_timeout_ms = 400};
    struct peer p;
    char *bytes = calloc(1, 1 << 20);

    open_loop();
    open_server("127.0.0.1:0", &o);
    p = peer_open();
    peer_say(&p, GET("/stream"));
    turn_idle();
    REQUIRE(held);
    for (int i = 0; i < 8; i++)
        cube_http_stream_write(held, bytes, 1 << 20);
    turn_idle();
    CHECK(cube_http_stream_backlog(held) > 0);
    pass_ms(300);
    CHECK_INT(gone, 0);
    pass_ms(200);
    CHECK_INT(gone, 1);
    free(bytes);
    peer_close(&p);
    close_all();
}

/* A worker that had been asleep carried out orders that its manager had given
 * up long ago. */
TEST(a_request_whose_sender_has_reset_the_connection_is_not_handled)
{
    struct linger none = {1, 0};
    struct peer p;

    open_loop();
    open_server("127.0.0.1:0", NULL);
    p = peer_open();
    turn_idle();
    CHECK(send(p.fd, GET("/stream"), strlen(GET("/stream")), 0) > 0);
    CHECK_INT(setsockopt(p.fd, SOL_SOCKET, SO_LINGER, &none, sizeof none), 0);
    peer_close(&p);
    turn_idle();
    CHECK_INT(handled, 0);
    CHECK_INT(server->conn_count, 0);
    p = peer_open();
    CHECK(send(p.fd, GET("/"), strlen(GET("/")), 0) > 0);
    CHECK_INT(shutdown(p.fd, SHUT_WR), 0); /* that was all: no reset */
    peer_hears(&p, "hello");
    peer_close(&p);
    close_all();
}

TEST(a_patient_stream_waits_for_a_reader_that_stalls)
{
    struct cube_http_options o = {.body_timeout_ms = 400,
                                  .idle_timeout_ms = 400};
    struct peer p;
    char *bytes = malloc(1 << 20);

    memset(bytes, 'x', 1 << 20);
    open_loop();
    open_server("127.0.0.1:0", &o);
    p = peer_open();
    peer_say(&p, GET("/stream"));
    turn_idle();
    REQUIRE(held);
    CHECK(cube_http_claim(held));
    cube_http_stream_patient(held);
    for (int i = 0; i < 8; i++)
        cube_http_stream_write(held, bytes, 1 << 20);
    turn_idle();
    CHECK(cube_http_stream_backlog(held) > 0);
    pass_ms(5000);
    CHECK_INT(gone, 0);
    cube_http_stream_end(held);
    pass_ms(5000); /* nor for what is left at the end */
    CHECK_INT(server->lasting_count, 1); /* and as long it counts */
    peer_hears(&p, "\r\n0\r\n\r\n");
    turn_idle();
    CHECK_INT(server->lasting_count, 0);
    pass_ms(500);
    CHECK_INT(peer_ends(&p), 1); /* idle, as after any answer */
    free(bytes);
    peer_close(&p);
    close_all();
}

/* ---- Streams ---- */

TEST(streams_are_chunked_or_end_with_the_connection)
{
    struct peer p;

    open_loop();
    open_server("127.0.0.1:0", NULL);
    p = peer_open();
    peer_say(&p, GET("/stream"));
    turn_idle();
    REQUIRE(held);
    cube_http_stream_write(held, "hello world, this is it", 23);
    cube_http_stream_write(held, "", 0); /* would be the end */
    peer_hears(&p, "\r\nTransfer-Encoding: chunked\r\n\r\n17\r\nhello world, "
                   "this is it\r\n");
    cube_http_stream_end(held);
    peer_hears(&p, "\r\n0\r\n\r\n");
    peer_say(&p, GET("/echo/next"));
    peer_hears(&p, "id=next");
    peer_close(&p);
    p = peer_open();
    peer_say(&p, "GET /stream HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    turn_idle();
    cube_http_stream_write(held, "hello", 5);
    cube_http_stream_end(held);
    peer_hears(&p, "Connection: close\r\n\r\nhello");
    CHECK_INT(peer_ends(&p), 1);
    CHECK(!strstr(p.in.data, "chunked"));
    peer_close(&p);
    close_all();
    CHECK_INT(gone, 0);
}

TEST(HEAD_of_a_stream_ends_at_once)
{
    struct peer p;

    open_loop();
    open_server("127.0.0.1:0", NULL);
    p = peer_open();
    peer_say(&p, "HEAD /stream HTTP/1.1\r\n" HOST "\r\n");
    peer_hears(&p, "Connection: close\r\n");
    CHECK_INT(peer_ends(&p), 1);
    CHECK_INT(gone, 1);
    peer_close(&p);
    close_all();
}

TEST(an_aborted_stream_is_cut)
{
    struct peer p;

    open_loop();
    open_server("127.0.0.1:0", NULL);
    p = peer_open();
    peer_say(&p, GET("/stream"));
    turn_idle();
    cube_http_stream_write(held, "hello", 5);
    cube_http_stream_abort(held);
    CHECK(peer_ends(&p) != 0);
    CHECK_HAS(p.in.data, "5\r\nhello\r\n");
    CHECK(!strstr(p.in.data, "0\r\n\r\n"));
    CHECK_INT(gone, 0);
    peer_close(&p);
    close_all();
}

/* A text of that many bytes, the last of which is a dot. */
static void share(size_t len)
{
    struct cube_buf b = {0};

    while (b.len + 1 < len)
        cube_buf_addc(&b, (char)('a' + b.len % 26));
    cube_buf_addc(&b, '.');
    shared = cube_http_text_new(&b);
}

TEST(a_shared_text_is_sent_whole_and_in_its_turn_to_all_who_ask)
{
    static const size_t lens[] = {1, 100, CUBE_HTTP_WITH_HEAD - 1,
                                  CUBE_HTTP_WITH_HEAD,
                                  CUBE_HTTP_WITH_HEAD + 1, 8 << 20};

    open_loop();
    open_server("127.0.0.1:0", NULL);
    for (size_t i = 0; i < COUNT(lens); i++) {
        struct peer p[2] = {peer_open(), peer_open()};
        char length[64];

        share(lens[i]);
        (void)snprintf(length, sizeof length, "Content-Length: %zu\r\n",
                       lens[i]);
        for (int j = 0; j < 2; j++) /* ahead of the answers, all at once */
            peer_say(&p[j], GET("/text") GET("/") "HEAD /text HTTP/1.1\r\n"
                     HOST "\r\n" GET("/text") GET("/"));
        for (int j = 0; j < 2; j++) {
            const char *at;

            for (int n = 0; n < 10000 && count_of(p[j].in.data, "hello") < 2;
                 n++) {
                cube_loop_turn(loop, 1, NULL);
                peer_read(&p[j]);
            }
            at = strstr(p[j].in.data, ".HTTP/1.1 200 OK\r\n");
            CHECK(at && strstr(at, "helloHTTP/1.1 200 OK\r\n"));
            CHECK_INT(count_of(p[j].in.data, length), 3);
            CHECK_INT(count_of(p[j].in.data, "hello"), 2);
            CHECK(p[j].in.len > 2 * lens[i] && p[j].in.len < 2 * lens[i] + 900);
            peer_close(&p[j]);
        }
        turn_idle();
        CHECK_INT(shared->holders, 1);
        cube_http_text_drop(shared);
    }
    close_all();
}

TEST(a_peer_that_leaves_while_a_shared_text_is_sent_lets_go_of_it)
{
    struct peer p;

    open_loop();
    open_server("127.0.0.1:0", NULL);
    p = peer_open();
    share(8 << 20);
    peer_say(&p, GET("/text") GET("/hold"));
    turn_idle();
    CHECK_INT(shared->holders, 2);
    CHECK_INT(handled, 1); /* the next one waits */
    cube_http_text_drop(shared); /* it lives on as long as it is sent */
    peer_close(&p);
    turn_idle();
    close_all();
}

static int drains;
static int to_write; /* pieces that on_drain still writes */

static void on_drain(void *arg)
{
    char piece[50000];

    drains++;
    memset(piece, 'x', sizeof piece);
    if (to_write-- > 0)
        cube_http_stream_write(*(struct cube_http_req **)arg, piece,
                               sizeof piece);
    else
        cube_http_stream_end(*(struct cube_http_req **)arg);
}

TEST(a_stream_is_paced_by_its_reader)
{
    struct peer p;
    size_t total = 0;

    open_loop();
    open_server("127.0.0.1:0", NULL);
    p = peer_open();
    peer_say(&p, GET("/stream"));
    turn_idle();
    REQUIRE(held);
    drains = 0;
    to_write = 400;
    cube_http_stream_on_drain(held, on_drain, &held);
    cube_http_stream_write(held, "go", 2);
    CHECK_INT(drains, 0);
    turn_idle();
    for (int i = 0; i < 400; i++)
        cube_loop_turn(loop, 0, NULL);
    CHECK(drains < 400); /* the peer has not read: the writer waits */
    CHECK(test_heap_bytes < 4 << 20);
    for (int i = 0; i < 20000 && drains < 401; i++) {
        peer_read(&p);
        total += p.in.len;
        cube_buf_clear(&p.in);
        cube_loop_turn(loop, 1, NULL);
    }
    CHECK_INT(drains, 401);
    peer_hears(&p, "0\r\n\r\n");
    CHECK(total + p.in.len > 20000000);
    peer_close(&p);
    close_all();
}

static struct cube_http_call *slow; /* that is held at its first bytes */

static void on_data_hold(void *arg, const char *data, size_t len)
{
    on_data(arg, data, len);
    cube_http_call_hold(slow, true);
}

TEST(a_call_that_is_held_reads_no_more_and_its_writer_waits)
{
    struct cube_http_request r = {0};
    struct outcome o = {0};

    open_loop();
    open_server("127.0.0.1:0", NULL);
    open_client(base);
    r.target = "/stream";
    r.on_data = on_data_hold;
    r.on_done = on_done;
    r.idle_timeout_ms = 1000;
    r.arg = &o;
    slow = cube_http_call(client, &r);
    for (int i = 0; i < 200 && !held; i++)
        cube_loop_turn(loop, 0, NULL);
    REQUIRE(held);
    drains = 0;
    to_write = 400;
    cube_http_stream_on_drain(held, on_drain, &held);
    cube_http_stream_write(held, "go", 2);
    for (int i = 0; i < 400; i++)
        cube_loop_turn(loop, 0, NULL);
    turn_idle();
    CHECK(drains < 400);
    CHECK(o.piece_len < 1 << 20);
    pass_ms(5000); /* of a silence that is our own */
    CHECK_INT(o.done, 0);
    for (int i = 0; i < 20000 && !o.done; i++) {
        cube_http_call_hold(slow, false);
        cube_loop_turn(loop, 1, NULL);
    }
    CHECK_STR(o.words, "");
    CHECK_UINT(o.piece_len, 400 * 50000 + 2);
    close_all();
}

/* Takes 5 s for what it gets, in which more comes. */
static void on_data_slowly(void *arg, const char *data, size_t len)
{
    struct outcome *o = arg;

    on_data(arg, data, len);
    if (o->piece_len == 12)
        return;
    cube_http_stream_write(held, "more", 4);
    cube_http_flush(held); /* it is in our socket */
    clock_moved_ms += 5000;
}

/* A client whose callback waited for a pager took that time for a silence of
 * the server's, though the next piece was there. */
TEST(who_did_not_listen_does_not_hear_silence)
{
    struct cube_http_request r = {0};
    struct outcome o = {0};

    open_loop();
    open_server("127.0.0.1:0", NULL);
    open_client(base);
    r.target = "/stream";
    r.on_data = on_data_slowly;
    r.on_done = on_done;
    r.idle_timeout_ms = 1000;
    r.arg = &o;
    cube_http_call(client, &r);
    for (int i = 0; i < 200 && !held; i++)
        cube_loop_turn(loop, 0, NULL);
    REQUIRE(held);
    cube_http_stream_write(held, "more", 4);
    turn_idle();
    CHECK_STR(o.words, "");
    CHECK_INT((int)o.piece_len, 12);
    pass_ms(1500);
    CHECK_HAS(o.words, "nothing came for 1000 ms");
    close_all();
}

TEST(a_stream_nobody_reads_is_cut_at_its_cap)
{
    struct peer p;
    char *bytes = calloc(1, 1 << 20);

    open_loop();
    open_server("127.0.0.1:0", NULL);
    p = peer_open();
    peer_say(&p, GET("/stream"));
    turn_idle();
    REQUIRE(held);
    for (int i = 0; i < 40 && held; i++)
        cube_http_stream_write(held, bytes, 1 << 20);
    CHECK_INT(gone, 0); /* never from inside a write */
    turn_idle();
    CHECK_INT(gone, 1);
    CHECK(test_heap_peak < 40 << 20);
    free(bytes);
    peer_close(&p);
    close_all();
}

/* ---- Peers that go, servers that close ---- */

TEST(a_peer_that_goes_is_reported_once)
{
    static const char *const targets[] = {"/hold", "/stream"};

    open_loop();
    open_server("127.0.0.1:0", NULL);
    for (size_t i = 0; i < COUNT(targets); i++) {
        struct peer p = peer_open();
        char text[200];

        test_row("%s", targets[i]);
        gone = 0;
        snprintf(text, sizeof text, "GET %s HTTP/1.1\r\n" HOST "\r\n",
                 targets[i]);
        peer_say(&p, text);
        turn_idle();
        REQUIRE(held);
        peer_close(&p);
        turn_idle();
        CHECK_INT(gone, 1);
        CHECK_INT(server->conn_count, 0);
    }
    close_all();
}

TEST(an_answer_to_a_peer_that_went_is_harmless)
{
    struct peer p;

    open_loop();
    open_server("127.0.0.1:0", NULL);
    p = peer_open();
    peer_say(&p, GET("/keep"));
    turn_idle();
    REQUIRE(held);
    setsockopt(p.fd, SOL_SOCKET, SO_LINGER,
               &(struct linger){.l_onoff = 1, .l_linger = 0},
               sizeof(struct linger));
    peer_close(&p); /* a reset */
    turn_idle();
    CHECK_INT(server->conn_count, 0);
    CHECK_STR(cube_http_path(held), "/keep");
    cube_http_reply(held, 200, NULL, "who hears?", 10);
    p = peer_open();
    peer_say(&p, GET("/keep"));
    turn_idle();
    peer_close(&p);
    turn_idle();
    cube_http_stream(held, 200, NULL);
    cube_http_stream_write(held, "who hears?", 10);
    cube_http_stream_end(held);
    close_all();
}

TEST(a_peer_that_shuts_its_side_gets_its_answer)
{
    struct peer p;

    open_loop();
    open_server("127.0.0.1:0", NULL);
    p = peer_open();
    peer_say(&p, GET("/echo/1") GET("/keep") GET("/echo/2"));
    shutdown(p.fd, SHUT_WR);
    turn_idle();
    REQUIRE(held);
    cube_http_reply(held, 200, NULL, "kept", 4);
    CHECK_INT(peer_ends(&p), 1);
    CHECK_HAS(p.in.data, "id=1");
    CHECK_HAS(p.in.data, "kept");
    CHECK_HAS(p.in.data, "id=2");
    peer_close(&p);
    p = peer_open();
    peer_say(&p, "GET / HTTP/1.1\r\nHost: 127");
    shutdown(p.fd, SHUT_WR);
    CHECK_INT(peer_ends(&p), 1);
    CHECK_HAS(p.in.data, "HTTP/1.1 400");
    peer_close(&p);
    turn_idle();
    CHECK_INT(server->conn_count, 0);
    close_all();
}

TEST(a_server_closes_with_requests_open)
{
    struct peer p[3];
    struct cube_http_req *kept;

    open_loop();
    open_server("127.0.0.1:0", NULL);
    p[0] = peer_open();
    peer_say(&p[0], GET("/keep"));
    turn_idle();
    kept = held;
    p[1] = peer_open();
    peer_say(&p[1], GET("/hold"));
    p[2] = peer_open();
    peer_say(&p[2], "GET / HT");
    turn_idle();
    cube_http_close(server);
    server = NULL;
    CHECK_INT(gone, 1);
    turn_idle();
    cube_http_reply_error(kept, 500, "too late for %s", cube_http_path(kept));
    for (int i = 0; i < 3; i++) {
        CHECK(peer_ends(&p[i]) != 0);
        peer_close(&p[i]);
    }
    close_all();
}

static void do_close(void *arg, struct cube_http_req *req)
{
    (void)arg;
    handled++;
    if (!cube_http_query(req, "late"))
        cube_http_reply(req, 200, NULL, "bye", 3);
    cube_http_close(server);
    server = NULL;
    if (cube_http_query(req, "late"))
        cube_http_reply(req, 200, NULL, "bye", 3);
}

TEST(a_handler_closes_its_server)
{
    static const struct cube_http_route closing[] = {
        {"GET", "/", do_close}, {NULL, NULL, NULL}};
    static const char *const texts[] = {GET("/") GET("/"),
                                        GET("/?late=1") GET("/")};

    open_loop();
    for (size_t i = 0; i < COUNT(texts); i++) {
        struct peer p;

        test_row("row %zu", i);
        handled = 0;
        server = cube_http_listen(loop, "127.0.0.1:0", closing, NULL, NULL,
                                  NULL);
        p = peer_open();
        peer_say(&p, texts[i]);
        turn_idle();
        CHECK_INT(handled, 1);
        CHECK(!server);
        peer_close(&p);
    }
    close_all();
}

/* ---- Limits of accepting ---- */

TEST(idle_connections_make_room_for_new_ones)
{
    struct cube_http_options o = {.max_connections = 3};
    struct peer p[5];

    open_loop();
    open_server("127.0.0.1:0", &o);
    for (int i = 0; i < 3; i++) {
        p[i] = peer_open();
        peer_say(&p[i], GET("/"));
        peer_hears(&p[i], "hello");
    }
    peer_say(&p[0], GET("/echo/0")); /* now the second is idle longest */
    peer_hears(&p[0], "id=0");
    p[3] = peer_open();
    peer_say(&p[3], GET("/echo/3"));
    turn_idle();
    CHECK_INT(handled, 4); /* one may have just sent a request */
    pass_ms(1000);
    peer_hears(&p[3], "id=3");
    CHECK_INT(peer_ends(&p[1]), 1);
    peer_read(&p[0]);
    CHECK_INT(p[0].is_eof, 0);
    for (int i = 0; i < 4; i++)
        peer_close(&p[i]);
    close_all();
}

/* Who has no token gets no further than to the end of a head. A manager was
 * shut for all by as many strangers as it takes connections, for as long as
 * they began a new request each ten seconds. */
TEST(strangers_who_end_no_request_make_room_for_those_who_do)
{
    static const struct {
        const char *text, *reason;
        bool is_stranger;
    } rows[] = {
        {"GET / HTTP/1.1\r\nHost: 127", "in the middle of a head", true},
        {"\r\n", "before it", true},
        {"POST /hold HTTP/1.1\r\n" HOST "Content-Length: 9\r\n\r\n1",
         "refused, and told so, but still there", true},
        {"POST /hold HTTP/1.1\r\n" HOST "Authorization: Bearer one\r\n"
         "Content-Length: 9\r\n\r\n1", "in a body, with the token", false},
        {"GET /hold HTTP/1.1\r\n" HOST "Authorization: Bearer one\r\n\r\n",
         "waiting for its answer", false},
    };
    struct cube_http_options o = {.tokens = {"one", NULL},
                                  .max_connections = COUNT(rows)};
    struct peer p[COUNT(rows)], more[COUNT(rows)];

    open_loop();
    open_server("127.0.0.1:0", &o);
    for (size_t i = 0; i < COUNT(rows); i++) {
        p[i] = peer_open();
        peer_say(&p[i], rows[i].text);
        turn_idle();
    }
    for (size_t i = 0; i < COUNT(rows); i++) {
        more[i] = peer_open();
        peer_say(&more[i], GET("/none"));
    }
    pass_ms(999);
    CHECK_INT(handled, 1);
    peer_read(&more[0]);
    CHECK_UINT(more[0].in.len, 0);  /* what they owe may be on its way */
    pass_ms(101);                   /* a pause later */
    for (size_t i = 0; i < 3; i++)
        peer_hears(&more[i], "HTTP/1.1 401");
    for (size_t i = 0; i < COUNT(rows); i++) {
        test_row("row %zu, %s", i, rows[i].reason);
        peer_read(&p[i]);
        CHECK_INT(p[i].is_eof != 0, rows[i].is_stranger);
        peer_close(&p[i]);
        peer_close(&more[i]);
    }
    close_all();
}

TEST(busy_connections_let_new_ones_wait)
{
    struct cube_http_options o = {.max_connections = 2};
    struct peer p[3];
    struct cube_http_req *first;

    open_loop();
    open_server("127.0.0.1:0", &o);
    p[0] = peer_open();
    peer_say(&p[0], GET("/hold"));
    turn_idle();
    first = held;
    p[1] = peer_open();
    peer_say(&p[1], GET("/hold"));
    p[2] = peer_open();
    peer_say(&p[2], GET("/"));
    turn_idle();
    CHECK_INT(handled, 2);
    accepts = 0;
    turn_idle();
    CHECK_INT(accepts, 0); /* it waits without turning in circles */
    cube_http_reply(first, 200, NULL, "", 0); /* and that one is idle */
    turn_idle();
    pass_ms(1000);
    peer_hears(&p[2], "hello");
    CHECK_INT(peer_ends(&p[0]), 1);
    peer_close(&p[0]);
    peer_close(&p[1]);
    peer_close(&p[2]);
    turn_idle();
    close_all();
}

static void count_words(void *arg, enum cube_level level, const char *words)
{
    CHECK_INT(level, CUBE_WARN);
    CHECK_HAS(words, "Too many open files");
    ++*(int *)arg;
}

/* The operator is told at once, and then once a minute: a log of ten lines a
 * second fills the disk, where it was descriptors that had run out. */
TEST(without_descriptors_accepting_pauses)
{
    struct peer p;
    int told = 0;

    open_loop();
    open_server("127.0.0.1:0", NULL);
    cube_loop_set_log(loop, count_words, &told);
    accept_failures = 700;
    p = peer_open();
    peer_say(&p, GET("/"));
    turn_idle();
    CHECK_INT(accepts, 1);
    CHECK_INT(told, 1);
    clock_moved_ms += 100;
    turn_idle();
    CHECK_INT(accepts, 2);
    for (int i = 3; i <= 700; i++) {
        clock_moved_ms += 100;
        while (accepts < i)
            cube_loop_turn(loop, 0, NULL);
    }
    CHECK_INT(told, 2);
    clock_moved_ms += 100;
    peer_hears(&p, "hello");
    peer_close(&p);
    close_all();
}

/* ---- Listening ---- */

TEST(a_taken_port_is_said_in_words)
{
    struct cube_err err = {0, ""};
    char where[100], want[200];

    open_loop();
    open_server("127.0.0.1:0", NULL);
    snprintf(where, sizeof where, "127.0.0.1:%u",
             (unsigned)cube_http_port(server));
    CHECK(!cube_http_listen(loop, where, routes, NULL, NULL, &err));
    CHECK_INT(err.code, CUBE_EBUSY);
    snprintf(want, sizeof want, "listen on %s: it is in use by another "
             "program", where);
    CHECK_STR(err.text, want);
    close_all();
}

TEST(localhost_is_both_loopbacks)
{
    struct outcome o;
    char to[100];

    open_loop();
    open_server("localhost:0", NULL);
    if (server->listener_count < 2) {
        close_all();
        SKIP("no IPv6 here");
    }
    CHECK_INT(server->listeners[1].addr.port, cube_http_port(server));
    snprintf(to, sizeof to, "http://[::1]:%u",
             (unsigned)cube_http_port(server));
    open_client(to);
    ask(&o, "GET", "/", NULL);
    CHECK_INT(o.status, 200);
    close_all();
}

TEST(places_are_read)
{
    static const struct {
        const char *text, *want, *reason;
    } rows[] = {
        {"127.0.0.1:80", "127.0.0.1 80", "IPv4"},
        {"[::1]:5", "::1 5", "IPv6"},
        {"[::1]", "::1 0", "IPv6 without port"},
        {"::1", NULL, "IPv6 without brackets"},
        {":80", " 80", "every address"},
        {"host", "host 0", "no port"},
        {"host:", NULL, "an empty port"},
        {"host:65536", NULL, "no port number"},
        {"host:1x", NULL, "nor this"},
        {"a b:1", NULL, "a blank"},
        {"http://host", "host 80", "the port of http"},
        {"http://host:8/", "host 8", "a slash"},
        {"http://host:8/a", NULL, "a path"},
        {"http://user@host:8", NULL, "a user"},
        {"tcp://host", "host 2375", "the port of engines"},
        {"tcp://[::1]:2375", "::1 2375", "an engine on IPv6"},
        {"unix:///a/b", "unix /a/b", "a socket as a URI"},
        {"unix:/a/b", "unix /a/b", "and shorter"},
        {"unix:", NULL, "no path"},
        {"[::1", NULL, "half an address"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_http_place place;
        char got[400];
        int r = cube_http_place_parse(rows[i].text, &place, NULL);

        test_row("row %zu, %s", i, rows[i].reason);
        if (place.is_unix)
            snprintf(got, sizeof got, "unix %s", place.host);
        else
            snprintf(got, sizeof got, "%s %u", place.host,
                     (unsigned)place.port);
        CHECK_STR(r < 0 ? NULL : got, rows[i].want);
        CHECK_INT(r, rows[i].want ? 0 : -1);
    }
}

TEST(unix_sockets_serve_and_are_removed)
{
    struct outcome o;
    char where[300];

    open_loop();
    snprintf(where, sizeof where, "unix:%s/s", test_dir());
    open_server(where, NULL);
    open_client(where);
    ask(&o, "GET", "/", NULL);
    CHECK_STR(o.body, "hello");
    close_all();
    CHECK_INT(access(where + 5, F_OK), -1);
}

TEST(a_stale_unix_socket_is_replaced_and_a_live_one_is_not)
{
    struct cube_err err = {0, ""};
    char where[300], *path = where + 5;
    struct cube_addr addr = {.kind = CUBE_ADDR_UNIX};
    struct outcome o;
    FILE *file;
    int fd;

    open_loop();
    snprintf(where, sizeof where, "unix:%s/s", test_dir());
    snprintf(addr.path, sizeof addr.path, "%s", path);
    fd = world.listen(world.ctx, &addr);
    close(fd); /* and the file stays */
    open_server(where, NULL);
    CHECK(!cube_http_listen(loop, where, routes, NULL, NULL, &err));
    CHECK_INT(err.code, CUBE_EBUSY);
    open_client(where);
    ask(&o, "GET", "/", NULL);
    CHECK_STR(o.body, "hello");
    cube_http_close(server);
    server = NULL;
    file = fopen(path, "w");
    REQUIRE(file);
    fputs("precious", file);
    fclose(file);
    CHECK(!cube_http_listen(loop, where, routes, NULL, NULL, &err));
    CHECK_INT(access(path, F_OK), 0);
    close_all();
}

TEST(names_to_listen_on_are_looked_up)
{
    struct cube_err err = {0, ""};
    struct cube_buf all = {0};

    open_loop();
    open_server("one.test:0", NULL);
    CHECK_INT(status_to("GET / HTTP/1.1\r\nHost: One.test:1\r\n\r\n", &all),
              200);
    cube_buf_free(&all);
    CHECK(!cube_http_listen(loop, "none.test:0", routes, NULL, NULL, &err));
    CHECK_HAS(err.text, "listen on none.test:0: find its address");
    close_all();
}

/* ---- The client, against a server that says what a row says ---- */

static struct cube_addr script_addr;
static int script_fd = -1; /* listens */

static void script_open(void)
{
    struct cube_addr a = cube_http_ip4(127, 1);
    char to[100];

    script_fd = world.listen(world.ctx, &a);
    REQUIRE(script_fd >= 0);
    world.local_addr(world.ctx, script_fd, &script_addr);
    snprintf(to, sizeof to, "http://127.0.0.1:%u",
             (unsigned)script_addr.port);
    open_client(to);
}

/* Takes the connection that the client makes. */
static struct peer script_accept(void)
{
    const struct cube_world *w = cube_world_real();
    struct peer p = {-1, {0}, 0};
    struct cube_addr from;

    for (int i = 0; i < 200 && p.fd < 0; i++) {
        cube_loop_turn(loop, 10, NULL);
        p.fd = w->accept(w->ctx, script_fd, &from);
    }
    REQUIRE(p.fd >= 0);
    return p;
}

static void script_close(void)
{
    close_all();
    close(script_fd);
}

/* A call like `like`, whose outcome goes to `o`. */
static struct cube_http_call *call_like(struct outcome *o,
                                        struct cube_http_request like)
{
    memset(o, 0, sizeof *o);
    like.target = like.target ? like.target : "/";
    like.on_done = on_done;
    like.arg = o;
    return cube_http_call(client, &like);
}

TEST(requests_are_written_as_they_should)
{
    static const char *const fields[] = {"X-A", "b", "Content-Type", "text/x",
                                         NULL};
    static const struct {
        struct cube_http_request want;
        const char *text;
    } rows[] = {
        {{.target = "/a?b=c"}, "GET /a?b=c HTTP/1.1\r\nHost: 127.0.0.1:%u"
         "\r\n\r\n"},
        {{.method = "POST", .body = "{}", .body_len = 2},
         "POST / HTTP/1.1\r\nHost: 127.0.0.1:%u\r\n"
         "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"},
        {{.method = "POST"}, "POST / HTTP/1.1\r\nHost: 127.0.0.1:%u\r\n"
         "Content-Length: 0\r\n\r\n"},
        {{.method = "DELETE"}, "DELETE / HTTP/1.1\r\nHost: 127.0.0.1:%u\r\n"
         "\r\n"},
        {{.method = "PUT", .body = "x", .body_len = 1, .headers = fields},
         "PUT / HTTP/1.1\r\nHost: 127.0.0.1:%u\r\nX-A: b\r\n"
         "Content-Type: text/x\r\nContent-Length: 1\r\n\r\nx"},
    };

    open_loop();
    script_open();
    for (size_t i = 0; i < COUNT(rows); i++) {
        struct outcome o;
        struct peer p;
        char text[400];

        test_row("row %zu", i);
        call_like(&o, rows[i].want);
        p = script_accept();
        turn_idle();
        peer_read(&p);
        snprintf(text, sizeof text, rows[i].text, (unsigned)script_addr.port);
        CHECK_STR(p.in.data, text);
        peer_say(&p, "HTTP/1.1 200 OK\r\nConnection: close\r\n"
                     "Content-Length: 0\r\n\r\n");
        CHECK(turn_until(&o.done, 1));
        peer_close(&p);
    }
    script_close();
}

TEST(what_would_break_a_request_is_refused)
{
    static const char *const field[] = {"A", "b\r\nC: d", NULL};
    static const char *const name[] = {"A\r\nC", "b", NULL};
    static const struct cube_http_request rows[] = {
        {.target = "/a b"}, {.target = "/a\r\nX: y"}, {.target = "a"},
        {.target = ""}, {.target = "/\xc3\xa9"}, {.headers = field},
        {.headers = name},
    };

    open_loop();
    script_open();
    for (size_t i = 0; i < COUNT(rows); i++) {
        struct outcome o;

        test_row("row %zu", i);
        call_like(&o, rows[i]);
        CHECK_INT(o.done, 0);
        CHECK(turn_until(&o.done, 1));
        CHECK_INT(o.code, CUBE_EINVAL);
    }
    CHECK_INT(connects, 0);
    CHECK(!cube_http_client_new(loop, "http://a:1", "a\r\nb", NULL));
    CHECK(!cube_http_client_new(loop, "https://a", NULL, NULL));
    CHECK(!cube_http_client_new(loop, "a", NULL, NULL));
    CHECK(!cube_http_client_new(loop, "", NULL, NULL));
    CHECK(!cube_http_client_new(loop, ":80", NULL, NULL));
    script_close();
}

TEST(answers_come_to_their_calls)
{
    static const struct {
        const char *method, *text;
        bool closes;
        int status;
        const char *body;
        enum cube_code code;
        const char *words, *reason;
    } rows[] = {
        {"GET", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", false,
         200, "hello", CUBE_OK, "", "a length"},
        {"GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
         "3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n", false, 200, "hello", CUBE_OK, "",
         "chunks"},
        {"GET", "HTTP/1.1 200 OK\r\n\r\nhello", true, 200, "hello", CUBE_OK,
         "", "up to the end"},
        {"GET", "HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", false,
         200, "hello", CUBE_OK, "", "HTTP/1.0"},
        {"GET", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: a"
         "\r\n\r\nHTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\nno", false, 404,
         "no", CUBE_OK, "", "1xx before it; 404 is an answer"},
        {"HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", false, 200,
         "", CUBE_OK, "", "to a HEAD"},
        {"DELETE", "HTTP/1.1 204 No Content\r\n\r\n", false, 204, "", CUBE_OK,
         "", "nothing"},
        {"GET", "", true, 0, "", CUBE_ECONN,
         "the connection was closed without an answer", "hung up at once"},
        {"GET", "HTTP/1.1 200 OK\r\nContent-Le", true, 0, "", CUBE_ECONN,
         "in the middle of the answer", "cut in the head"},
        {"GET", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhel", true, 200,
         "hel", CUBE_ECONN, "in the middle of the answer",
         "cut in the body"},
        {"GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
         "3\r\nhel\r\n", true, 200, "hel", CUBE_ECONN,
         "in the middle of the answer", "cut between chunks"},
        {"GET", "SSH-2.0-OpenSSH\r\n", false, 0, "", CUBE_EPROTO,
         "the answer is not HTTP", "something else"},
        {"GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
         "x\r\n", false, 200, "", CUBE_EPROTO, "a chunk size", "bad chunks"},
        {"GET", "HTTP/1.1 101 Switching\r\n\r\n", false, 0, "", CUBE_EPROTO,
         "another protocol", "an upgrade that nobody asked for"},
        {"GET", "HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n"
         "1234567890123456789012345678901234567890"
         "1234567890123456789012345678901234567890", false, 200, NULL,
         CUBE_ETOOBIG, "more than 64 bytes", "more than may be collected"},
    };

    open_loop();
    script_open();
    for (size_t i = 0; i < COUNT(rows); i++) {
        for (int is_cut = 0; is_cut < 2; is_cut++) {
            struct outcome o;
            struct peer p;

            test_row("row %zu, %s%s", i, rows[i].reason,
                     is_cut ? ", byte by byte" : "");
            call_like(&o, (struct cube_http_request){
                .method = rows[i].method, .max_body = 64});
            p = script_accept();
            peer_hears(&p, "\r\n\r\n"); /* or closing would be a reset */
            for (size_t k = 0; is_cut && rows[i].text[k]; k++)
                peer_write(&p, rows[i].text + k, 1);
            if (!is_cut)
                peer_say(&p, rows[i].text);
            if (rows[i].closes)
                peer_close(&p);
            CHECK(turn_until(&o.done, 1));
            CHECK_INT(o.status, rows[i].status);
            CHECK_INT(o.code, rows[i].code);
            CHECK_HAS(o.words, rows[i].words);
            if (rows[i].code)
                CHECK_HAS(o.words, " http://127.0.0.1:");
            if (rows[i].body)
                CHECK_STR(o.body, rows[i].body);
            peer_close(&p);
            turn_idle();
        }
    }
    script_close();
}

TEST(connections_are_used_again)
{
    struct outcome o[20];
    struct cube_http_call *last = NULL;

    open_loop();
    open_server("127.0.0.1:0", NULL);
    open_client(base);
    for (int i = 0; i < 5; i++)
        ask(&o[0], i % 2 ? "GET" : "POST", "/echo/1", i % 2 ? NULL : "x");
    CHECK_INT(connects, 1);
    for (int i = 0; i < 20; i++)
        last = call(&o[i], "GET", "/", NULL);
    CHECK(last != NULL);
    for (int i = 0; i < 20; i++)
        CHECK(turn_until(&o[i].done, 1));
    CHECK_INT(connects, 20); /* all at once: one for each */
    turn_idle();
    CHECK_INT(server->conn_count, CUBE_HTTP_MAX_IDLE);
    pass_ms(CUBE_HTTP_IDLE_MS);
    CHECK_INT(server->conn_count, 0); /* idle for too long */
    close_all();
}

TEST(a_dead_kept_connection_is_replaced_once)
{
    static const struct {
        const char *method;
        bool is_seen;  /* the request was read before the connection ended */
        bool retries;
        const char *reason;
    } rows[] = {
        {"GET", false, true, "it had ended before: nothing was sent"},
        {"POST", false, true, "the same: a POST was not sent either"},
        {"GET", true, true, "a GET can be sent twice"},
        {"DELETE", true, true, "so can a DELETE"},
        {"POST", true, false, "a POST could be done twice"},
    };

    open_loop();
    script_open();
    for (size_t i = 0; i < COUNT(rows); i++) {
        struct outcome o;
        struct peer p;

        test_row("row %zu, %s", i, rows[i].reason);
        call(&o, "GET", "/first", NULL);
        p = script_accept();
        peer_say(&p, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
        CHECK(turn_until(&o.done, 1));
        if (!rows[i].is_seen) /* the client has not looked since */
            peer_close(&p);
        call(&o, rows[i].method, "/second", NULL);
        if (rows[i].is_seen) {
            peer_hears(&p, "/second");
            peer_close(&p);
        }
        if (rows[i].retries) {
            p = script_accept();
            peer_hears(&p, "/second");
            CHECK_INT(count_of(p.in.data, "/second"), 1);
            peer_close(&p); /* and not a second time */
        }
        CHECK(turn_until(&o.done, 1));
        CHECK_INT(o.code, CUBE_ECONN);
        peer_close(&p);
    }
    script_close();
}

TEST(bytes_nobody_asked_for_end_a_connection)
{
    struct outcome o;
    struct peer p;

    open_loop();
    script_open();
    call(&o, "GET", "/", NULL);
    p = script_accept();
    peer_say(&p, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhiHTTP/1.1 200");
    CHECK(turn_until(&o.done, 1));
    CHECK_STR(o.body, "hi");
    CHECK_INT(client->idle_count, 0);
    peer_close(&p);
    call(&o, "GET", "/", NULL);
    p = script_accept();
    peer_say(&p, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi");
    CHECK(turn_until(&o.done, 1));
    CHECK_INT(client->idle_count, 1);
    peer_say(&p, "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil");
    turn_idle();
    CHECK_INT(client->idle_count, 0);
    peer_close(&p);
    script_close();
}

/* A way was cut, silently: a stop was sent into one dead connection that was
 * kept after the other, and each cost 10 s. */
TEST(a_call_that_gets_no_answer_ends_the_connections_that_are_kept)
{
    const char *answer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi";
    struct outcome one, two;
    struct peer p, q;

    open_loop();
    script_open();
    call(&one, "GET", "/", NULL);
    p = script_accept();
    call(&two, "GET", "/", NULL);
    q = script_accept();
    peer_say(&p, answer);
    peer_say(&q, answer);
    CHECK(turn_until(&one.done, 1) && turn_until(&two.done, 1));
    CHECK_INT(client->idle_count, 2);
    call_like(&one, (struct cube_http_request){.timeout_ms = 1000});
    pass_ms(1000);
    CHECK_INT(one.code, CUBE_ETIMEOUT);
    CHECK_INT(client->idle_count, 0);
    CHECK(peer_ends(&p) && peer_ends(&q));
    peer_close(&p);
    peer_close(&q);
    call(&two, "GET", "/", NULL);
    p = script_accept();
    peer_say(&p, answer);
    CHECK(turn_until(&two.done, 1));
    CHECK_STR(two.body, "hi");
    peer_close(&p);
    script_close();
}

TEST(time_limits_hold)
{
    struct outcome o;
    struct peer p;

    open_loop();
    script_open();
    call_like(&o, (struct cube_http_request){.timeout_ms = 1000});
    p = script_accept();
    pass_ms(900);
    CHECK_INT(o.done, 0);
    pass_ms(100);
    CHECK_INT(o.done, 1);
    CHECK_INT(o.code, CUBE_ETIMEOUT);
    CHECK_HAS(o.words, "no answer within 1000 ms");
    CHECK_INT(peer_ends(&p), -1); /* and nothing of it comes later */
    peer_close(&p);
    call_like(&o, (struct cube_http_request){.idle_timeout_ms = 500,
                                             .on_data = on_data});
    p = script_accept();
    peer_say(&p, "HTTP/1.1 200 OK\r\n\r\n");
    for (int i = 0; i < 5; i++) {
        pass_ms(400);
        peer_say(&p, ".");
        turn_idle();
    }
    CHECK_INT(o.done, 0);
    CHECK_UINT(o.piece_len, 5);
    pass_ms(500);
    CHECK_INT(o.code, CUBE_ETIMEOUT);
    CHECK_HAS(o.words, "nothing came for 500 ms");
    peer_close(&p);
    script_close();
}

TEST(a_deadline_says_what_was_tried)
{
    struct outcome o;

    open_loop();
    open_client("http://127.0.0.1:1");
    ask(&o, "GET", "/x", NULL);
    CHECK_INT(o.code, CUBE_ECONN);
    CHECK_STR(o.words, "GET http://127.0.0.1:1/x: connect to 127.0.0.1:1: "
                       "Connection refused");
    close_all();
    open_loop();
    open_client("unix:///nothing/here");
    ask(&o, "GET", "/x", NULL);
    CHECK_INT(o.code, CUBE_ENOENT);
    CHECK_STR(o.words, "GET unix:///nothing/here /x: connect to "
                       "/nothing/here: No such file or directory");
    close_all();
}

TEST(the_next_address_is_tried)
{
    struct outcome o;
    char to[100];

    open_loop();
    open_server("[::1]:0", NULL); /* 127.0.0.1 refuses */
    snprintf(to, sizeof to, "localhost:%u", (unsigned)cube_http_port(server));
    open_client(to);
    ask(&o, "GET", "/", NULL);
    CHECK_INT(o.status, 200);
    CHECK_INT(connects, 2);
    close_all();
}

TEST(names_are_looked_up)
{
    struct outcome o;
    struct cube_http_call *lost;
    char to[100];

    open_loop();
    open_server("one.test:0", NULL);
    snprintf(to, sizeof to, "http://one.test:%u",
             (unsigned)cube_http_port(server));
    open_client(to);
    ask(&o, "GET", "/", NULL); /* with a Host that the server knows */
    CHECK_INT(o.status, 200);
    cube_http_client_free(client);
    open_client("http://none.test:1");
    ask(&o, "GET", "/", NULL);
    CHECK_INT(o.code, CUBE_ECONN);
    CHECK_HAS(o.words,
              "find the address of none.test: no host has that name");
    lost = call(&o, "GET", "/", NULL);
    cube_loop_turn(loop, 0, NULL); /* now it is being looked up */
    cube_http_call_cancel(lost);
    turn_idle();
    CHECK_INT(o.done, 0);
    close_all();
}

TEST(tokens_are_sent)
{
    struct cube_http_options o = {.tokens = {"secret"}};
    struct outcome out;

    open_loop();
    open_server("127.0.0.1:0", &o);
    open_client(base);
    ask(&out, "GET", "/", NULL);
    CHECK_INT(out.status, 401);
    cube_http_client_free(client);
    client = cube_http_client_new(loop, base, "secret", NULL);
    ask(&out, "GET", "/", NULL);
    CHECK_INT(out.status, 200);
    close_all();
}

TEST(an_answer_counts_before_all_was_sent)
{
    struct cube_http_options o = {.max_body = 1000};
    struct outcome out;
    char *bytes = calloc(1, 8 << 20);

    open_loop();
    open_server("127.0.0.1:0", &o);
    open_client(base);
    call_like(&out, (struct cube_http_request){.method = "POST",
              .target = "/echo/1", .body = bytes, .body_len = 8 << 20});
    CHECK(turn_until(&out.done, 1));
    CHECK_INT(out.status, 413);
    CHECK_INT(client->idle_count, 0);
    free(bytes);
    close_all();
}

TEST(large_bodies_pass_through_narrow_sockets)
{
    struct cube_http_options o = {.max_body = 4 << 20};
    struct outcome out;
    char *bytes = malloc(3 << 20);

    open_loop();
    open_server("127.0.0.1:0", &o);
    open_client(base);
    memset(bytes, 'x', 3 << 20);
    sends_left = 3;
    call_like(&out, (struct cube_http_request){.method = "POST",
              .target = "/echo/1", .body = bytes, .body_len = 3 << 20});
    for (int i = 0; i < 300 && !out.done; i++) {
        cube_loop_turn(loop, 1, NULL);
        sends_left = i % 2;
    }
    sends_left = -1;
    CHECK(turn_until(&out.done, 1));
    CHECK_INT(out.status, 200);
    CHECK_UINT(out.len, (3 << 20) + strlen("POST /echo/1 id=1 x=(none) "));
    free(bytes);
    close_all();
}

/* ---- Cancelling and freeing anywhere ---- */

TEST(calls_are_cancelled_at_each_step)
{
    static const char *const said[] = {NULL, "", "HTTP/1.1 20",
        "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhel"};

    open_loop();
    script_open();
    for (size_t i = 0; i < COUNT(said); i++) {
        struct outcome o;
        struct cube_http_call *c = call(&o, "GET", "/", NULL);
        struct peer p = {-1, {0}, 0};

        test_row("row %zu", i);
        if (said[i]) {
            p = script_accept();
            peer_say(&p, said[i]);
            turn_idle();
        }
        cube_http_call_cancel(c);
        turn_idle();
        CHECK_INT(o.done, 0);
        if (p.fd >= 0)
            CHECK_INT(peer_ends(&p) != 0, 1);
        peer_close(&p);
    }
    script_close();
}

TEST(freeing_a_client_ends_its_calls)
{
    struct outcome o[4];

    open_loop();
    open_server("127.0.0.1:0", NULL);
    open_client(base);
    ask(&o[0], "GET", "/", NULL);
    call(&o[0], "GET", "/hold", NULL);
    call_like(&o[1], (struct cube_http_request){.target = "/stream",
                                                .on_data = on_data});
    turn_idle();
    call(&o[2], "GET", "/", NULL); /* not even begun */
    cube_http_client_free(client);
    client = NULL;
    for (int i = 0; i < 3; i++) {
        test_row("call %d", i);
        CHECK_INT(o[i].done, 1);
        CHECK_INT(o[i].code, CUBE_ECANCELED);
    }
    turn_idle();
    CHECK_INT(gone, 2); /* the server has seen both go */
    close_all();
}

static struct cube_http_call *victim;
static int step; /* at which callback: 0 on_head, 1 on_data, 2 on_done */
static bool frees_client;

static void strike(int now)
{
    if (now != step)
        return;
    if (frees_client) {
        cube_http_client_free(client);
        client = NULL;
    } else {
        cube_http_call_cancel(victim);
    }
}

static void strike_head(void *arg, const struct cube_http_head *head)
{
    on_head(arg, head);
    strike(0);
}

static void strike_data(void *arg, const char *data, size_t len)
{
    on_data(arg, data, len);
    strike(1);
}

static void strike_done(void *arg, const struct cube_http_answer *a)
{
    strike(2);
    on_done(arg, a); /* what was handed over is still there */
}

TEST(callbacks_cancel_and_free)
{
    open_loop();
    script_open();
    for (int i = 0; i < 6; i++) {
        struct outcome o = {0};
        struct cube_http_request r = {0};
        struct peer p;
        char to[100];

        test_row("step %d, %s", i % 3, i < 3 ? "cancel" : "free");
        step = i % 3;
        frees_client = i >= 3;
        r.on_head = strike_head;
        r.on_data = strike_data;
        r.on_done = strike_done;
        r.arg = &o;
        victim = cube_http_call(client, &r);
        p = script_accept();
        peer_say(&p, "HTTP/1.1 200 OK\r\nContent-Type: text/x\r\n"
                 "Transfer-Encoding: chunked\r\n\r\n"
                 "2\r\nhi\r\n2\r\nho\r\n0\r\n\r\n");
        turn_idle();
        CHECK_INT(o.heads, 1);
        CHECK_UINT(o.piece_len, step == 0 ? 0 : step == 1 ? 2 : 4);
        CHECK_INT(o.done, step == 2 || frees_client);
        CHECK_INT(o.code, step != 2 && frees_client ? CUBE_ECANCELED
                                                    : CUBE_OK);
        if (step == 2)
            CHECK_STR(o.field, "text/x");
        peer_close(&p);
        turn_idle();
        snprintf(to, sizeof to, "http://127.0.0.1:%u",
                 (unsigned)script_addr.port);
        if (!client)
            open_client(to);
    }
    script_close();
}

static int chained;

static void call_again(void *arg, const struct cube_http_answer *a)
{
    struct cube_http_request r = {0};

    CHECK_INT(a->status, 200);
    r.on_done = call_again;
    r.arg = arg;
    if (++chained < 50)
        cube_http_call(client, &r);
}

TEST(a_callback_calls_again_on_the_same_connection)
{
    struct cube_http_request r = {0};

    open_loop();
    open_server("127.0.0.1:0", NULL);
    open_client(base);
    chained = 0;
    r.on_done = call_again;
    cube_http_call(client, &r);
    CHECK(turn_until(&chained, 50));
    CHECK_INT(connects, 1);
    close_all();
}

/* Everything at once and in any order, from a seed: calls, answers, streams,
 * cancels, closed peers. In the end nothing is left. */
TEST(random_lives_end_clean)
{
    struct outcome o[12];
    struct cube_http_call *calls[12] = {0};

    for (int round = 0; round < 20; round++) {
        test_row("round %d", round);
        open_loop();
        open_server("127.0.0.1:0", NULL);
        open_client(base);
        memset(calls, 0, sizeof calls);
        memset(o, 0, sizeof o);
        for (int i = 0; i < 150; i++) {
            uint32_t k = test_below(12);
            static const char *const targets[] = {"/", "/hold", "/stream",
                                                  "/echo/1", "/keep"};

            if (!calls[k] || o[k].done)
                calls[k] = call_like(&o[k], (struct cube_http_request){
                    .target = targets[test_below(4)], .on_data = on_data});
            else if (test_below(4) == 0) {
                cube_http_call_cancel(calls[k]);
                calls[k] = NULL;
            } else if (held && held->phase == CUBE_HTTP_HANDLING) {
                cube_http_reply(held, 200, NULL, "late", 4);
                held = NULL;
            } else if (held && held->phase == CUBE_HTTP_STREAMING) {
                cube_http_stream_write(held, "piece", 5);
                if (test_below(3) == 0) {
                    cube_http_stream_end(held);
                    held = NULL;
                }
            }
            if (test_below(3))
                cube_loop_turn(loop, 0, NULL);
        }
        close_all();
    }
}

/* ---- The drawings of the chapter ---- */

static int64_t wall_of_1994(void *ctx)
{
    (void)ctx;
    return 784111777000000000;
}

TEST(drawing_of_an_answer_is_true)
{
    struct cube_world w = *cube_world_real();
    struct cube_http_server s = {.world = &w};
    struct cube_http_req req = {.server = &s};

    w.wall_ns = wall_of_1994;
    req.parser.head.minor = 1;
    cube_http_reply_header(&req, "Location", "/x");
    cube_http_put_head(&req, 201, "application/json", 12);
    CHECK_STR(req.out.data, "HTTP/1.1 201 Created\r\n"
                            "Date: Sun, 06 Nov 1994 08:49:37 GMT\r\n"
                            "Content-Type: application/json\r\n"
                            "Content-Length: 12\r\n"
                            "Connection: close\r\n"
                            "Location: /x\r\n\r\n");
    cube_buf_free(&req.out);
    cube_buf_free(&req.extra);
}

TEST(drawing_of_a_cut_field_is_true)
{
    char line[] = "Connection: close  ";
    char *value = NULL;

    CHECK(!cube_http_cut_field(line, 19, &value));
    CHECK_INT(value - line, 12);
    CHECK_MEM(line, "Connection\0 close\0\0", 20);
}

/* The two feeds of the essay, a letter for each event. */
TEST(drawing_of_feeds_and_events_is_true)
{
    static const struct {
        const char *feed[2], *events[2];
    } rows[] = {
        {{"GET /tasks HT", "TP/1.1\r\nHost: a\r\n\r\n"}, {"M", "HE"}},
        {{"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
          "5\r\nhel", "lo\r\n0\r\n\r\n"}, {"HDM", "DE"}},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_http_parser p = {0};

        for (int k = 0; k < 2; k++) {
            struct cube_http_input in = {rows[i].feed[k],
                                         strlen(rows[i].feed[k])};
            char seen[8] = "";

            while (strlen(seen) < strlen(rows[i].events[k]))
                seen[strlen(seen)] = "MHDEXG"[cube_http_parse(&p, &in)];
            CHECK_STR(seen, rows[i].events[k]);
            CHECK_UINT(in.len, 0);
        }
        cube_buf_free(&p.head.text);
    }
}

TEST(drawing_of_a_head_is_true)
{
    struct cube_http_parser p = {0};
    struct cube_http_input in = {"GET /tasks HTTP/1.1\r\nHost: a\r\n", 30};

    CHECK_INT(cube_http_parse(&p, &in), CUBE_HTTP_MORE);
    CHECK_UINT(p.head.text.len, 30);
    CHECK_MEM(p.head.text.data, "GET\0/tasks\0HTTP/1.1\0\nHost\0 a\0\n", 30);
    CHECK_UINT(p.head.target, 4);
    CHECK_UINT(p.head.fields[0].name, 21);
    CHECK_UINT(p.head.fields[0].value, 27);
    cube_buf_free(&p.head.text);
}

TEST(drawing_of_a_chunked_body_is_true)
{
    static const struct {
        const char *line;
        enum cube_http_state after;
    } rows[] = {
        {"5;x=y\r\n", CUBE_HTTP_CHUNK}, {"hello", CUBE_HTTP_CHUNK_END},
        {"\r\n", CUBE_HTTP_SIZE}, {"6\r\n", CUBE_HTTP_CHUNK},
        {" world\r\n", CUBE_HTTP_SIZE}, {"0\r\n", CUBE_HTTP_TRAILERS},
        {"Sum: 1\r\n", CUBE_HTTP_TRAILERS}, {"\r\n", CUBE_HTTP_DONE},
    };
    struct cube_http_parser p = {0};
    struct cube_http_input in = {CHUNKED, strlen(CHUNKED)};
    struct cube_buf body = {0};

    CHECK_INT(cube_http_parse(&p, &in), CUBE_HTTP_HEAD);
    for (size_t i = 0; i < COUNT(rows); i++) {
        enum cube_http_event e;

        in.data = rows[i].line;
        in.len = strlen(rows[i].line);
        do {
            e = cube_http_parse(&p, &in);
            if (e == CUBE_HTTP_DATA)
                cube_buf_add(&body, p.piece, p.piece_len);
        } while (e == CUBE_HTTP_DATA);
        test_row("after %zu lines", i + 1);
        CHECK_INT(p.state, rows[i].after);
    }
    CHECK_STR(body.data, "hello world");
    CHECK(p.head.text.len < strlen(CHUNKED) + 20); /* lines are forgotten */
    cube_buf_free(&body);
    cube_buf_free(&p.head.text);
}

TEST(drawing_of_a_target_is_true)
{
    static const char want[] = "/tasks/a%2Fb/logs\0tasks\0a/b\0logs\0"
                               "tail\0" "10\0follow\0";
    struct cube_http_req req = {0};

    CHECK_INT(cube_http_cut_target(&req, "/tasks/a%2Fb/logs?tail=10&follow"),
              0);
    CHECK_UINT(req.words.len, sizeof want);
    CHECK_MEM(req.words.data, want, sizeof want);
    CHECK_UINT(req.segment_count, 3);
    CHECK_UINT(req.segments[1], 24);
    CHECK_UINT(req.query_count, 2);
    CHECK_STR(cube_http_query(&req, "follow"), "");
    cube_buf_free(&req.words);
}

/* ---- Anything at all ---- */

/* Peers that say parts of good and bad requests, stop, shut and go at any
 * time, on sockets that are full at any time, while handlers answer when they
 * like. In the end nothing is left and nobody was told twice. */
TEST(random_peers_end_clean)
{
    static const char *const texts[] = {
        GET("/"), GET("/hold"), GET("/keep"), GET("/stream"), "GET / HT",
        "POST /echo/1 HTTP/1.1\r\n" HOST "Content-Length: 5\r\n\r\nhello",
        "POST /hold HTTP/1.1\r\n" HOST "Transfer-Encoding: chunked\r\n\r\n"
        "3\r\nabc\r\n0\r\n\r\n", "x\r\n\r\n", GET("/") GET("/keep") GET("/"),
        "HEAD /stream HTTP/1.1\r\n" HOST "\r\n", "GET / HTTP/1.0\r\n\r\n"};
    struct cube_http_options o = {.idle_timeout_ms = 300,
        .head_timeout_ms = 200, .body_timeout_ms = 200, .max_connections = 6};
    struct peer p[8];

    for (int round = 0; round < 30; round++) {
        test_row("round %d", round);
        open_loop();
        open_server("127.0.0.1:0", &o);
        for (int i = 0; i < 8; i++)
            p[i] = (struct peer){-1, {0}, 0};
        for (int i = 0; i < 200; i++) {
            struct peer *one = &p[test_below(8)];
            const char *text = texts[test_below(COUNT(texts))];
            uint32_t what = test_below(16);

            if (one->fd < 0)
                *one = peer_open();
            else if (what == 0)
                peer_close(one);
            else if (what == 1)
                shutdown(one->fd, SHUT_WR);
            else if (what == 2)
                peer_read(one);
            else if (what == 3)
                clock_moved_ms += test_below(150);
            else if (what == 4)
                sends_left = test_below(2) ? -1 : (int)test_below(3);
            else if (what == 5 && keep_count > 0) {
                held = held == keeps[keep_count - 1] ? NULL : held;
                cube_http_reply_error(keeps[--keep_count], 500, "late");
            }
            else if (what < 8 && held && held->on_gone) {
                if (held->phase == CUBE_HTTP_HANDLING)
                    cube_http_reply_error(held, 500, "late");
                else
                    cube_http_stream_end(held);
                held = NULL;
            } else
                peer_write(one, text, test_below(4) ? strlen(text)
                                : test_below((uint32_t)strlen(text)));
            cube_loop_turn(loop, 0, NULL);
        }
        cube_http_close(server);
        server = NULL;
        while (keep_count > 0) /* nobody told them that their peer is gone */
            cube_http_reply(keeps[--keep_count], 200, NULL, "late", 4);
        for (int i = 0; i < 8; i++)
            peer_close(&p[i]);
        close_all();
    }
}
