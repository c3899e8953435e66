/*
 * A web server to run as a task: it says where it runs, can be asked for its
 * health, can fall ill, and can end with an exit code of your choice.
 *
 *     GET /               who answers, where
 *     GET /health         200, or 500 once it is sick
 *     GET /sick           makes it so
 *     GET /exit?code=3    ends the program
 *
 *     cc -O2 -o echo examples/echo.c cube.c -lpthread
 *     ./echo [PORT]
 *
 * The port is the argument, else CUBE_PORT_7777 (what the process runtime
 * calls the host port of its container port 7777), else PORT, else 7777.
 * SIGTERM ends it: the handler is the program's own and wakes the loop.
 */
#define _GNU_SOURCE /* gethostname, whatever -std says */
#include "../cube.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

struct echo {
    struct cube_loop *loop;
    char host[100];
    const char *port;
    int exit_code;
    bool is_sick, is_over;
};

static struct cube_loop *woken_loop;
static volatile sig_atomic_t is_terminated;

static void on_signal(int number)
{
    (void)number;
    is_terminated = 1;
    cube_loop_wake(woken_loop);
}

static void do_page(void *arg, struct cube_http_req *req)
{
    const struct echo *e = arg;
    const char *name = getenv("NAME") ? getenv("NAME") : "echo";
    char page[500];
    int len = snprintf(page, sizeof page,
                       "<!doctype html>\n<title>%.100s</title>\n"
                       "<p>%.100s on %s, port %s\n",
                       name, name, e->host, e->port);

    cube_http_reply(req, 200, "text/html; charset=utf-8", page, (size_t)len);
}

static void do_health(void *arg, struct cube_http_req *req)
{
    const struct echo *e = arg;

    cube_http_reply(req, e->is_sick ? 500 : 200, "text/plain",
                    e->is_sick ? "sick\n" : "well\n", 5);
}

static void do_sick(void *arg, struct cube_http_req *req)
{
    struct echo *e = arg;

    e->is_sick = true;
    cube_http_reply(req, 200, "text/plain", "oh\n", 3);
}

static void do_exit(void *arg, struct cube_http_req *req)
{
    struct echo *e = arg;
    const char *code = cube_http_query(req, "code");

    e->exit_code = code ? atoi(code) : 0;
    e->is_over = true;
    cube_http_reply(req, 200, "text/plain", "bye\n", 4);
}

static const char *port_of(int argc, char **argv)
{
    const char *given = argc > 1 ? argv[1] : getenv("CUBE_PORT_7777");

    given = given ? given : getenv("PORT");
    return given ? given : "7777";
}

int main(int argc, char **argv)
{
    static const struct cube_http_route routes[] = {
        {"GET", "/", do_page},
        {"GET", "/health", do_health},
        {"GET", "/sick", do_sick},
        {"GET", "/exit", do_exit},
        {NULL, NULL, NULL},
    };
    struct cube_http_options options = {.is_public = true};
    struct echo e = {.port = port_of(argc, argv)};
    struct cube_http_server *server;
    struct cube_err err;
    char where[32];

    gethostname(e.host, sizeof e.host - 1);
    snprintf(where, sizeof where, ":%s", e.port);
    e.loop = woken_loop = cube_loop_new(cube_world_real(), &err);
    server = e.loop ? cube_http_listen(e.loop, where, routes, &e, &options,
                                       &err) : NULL;
    if (!server) {
        fprintf(stderr, "echo: %s\n", err.text);
        return 1;
    }
    signal(SIGTERM, on_signal);
    signal(SIGINT, on_signal);
    while (!e.is_over && !is_terminated)
        cube_loop_turn(e.loop, -1, &err);
    cube_http_close(server);
    cube_loop_free(e.loop);
    return e.exit_code;
}
