/*
 * Chapter 6, HTTP: the parser from bytes alone, then server and client with
 * one another and with raw sockets, over loopback and unix sockets, all on
 * one loop. The clock of a test that waits is the test's own: it is moved.
 */
#include "test.h"

#include <sys/mman.h>

/* ---- A world whose clock can be moved ---- */

static int64_t clock_moved_ms;

static int64_t moved_now_ms(void *ctx)
{
    return cube_world_real()->now_ms(ctx) + clock_moved_ms;
}

/* ---- One loop, a server and a client on it ---- */

static struct cube_world world;
static struct cube_loop *loop;
static struct cube_http_server *server;
static struct cube_http_client *client;
static struct cube_http_req *held;    /* a request that was not answered */
static int handled;                   /* requests that reached a handler */
static int gone;                      /* calls of on_gone */
static char base[200];

static void open_loop(void)
{
    struct cube_err err;

    world = *cube_world_real();
    world.now_ms = moved_now_ms;
    clock_moved_ms = 0;
    held = NULL;
    handled = gone = 0;
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
    (void)arg;
    gone++;
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

static void do_hold(void *arg, struct cube_http_req *req)
{
    (void)arg;
    handled++;
    held = req;
    cube_http_on_gone(req, on_gone, NULL);
}

/* Holds it and does not ask when the peer goes. */
static void do_keep(void *arg, struct cube_http_req *req)
{
    (void)arg;
    handled++;
    held = req;
}

static void do_stream(void *arg, struct cube_http_req *req)
{
    (void)arg;
    handled++;
    held = req;
    cube_http_on_gone(req, on_gone, NULL);
    cube_http_stream(req, 200, "text/plain");
}

static const struct cube_http_route routes[] = {
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
