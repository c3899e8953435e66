/*
 * A web server to run as a task: it can be asked for its health, can fall
 * ill, and can end with an exit code of your choice.
 *
 *     GET /               who answers
 *     GET /health         200, or 500 once it is sick
 *     GET /sick           makes it so
 *     GET /exit?code=3    ends the program
 *
 *     cc -O2 -o echo examples/echo.c cube.c -lpthread
 *     ./echo [PORT]
 *
 * The port is the argument, else CUBE_PORT_7777 (what the process runtime
 * calls the host port of its container port 7777), else 7777.
 */
#include "../cube.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct echo {
    struct cube_loop *loop;
    const char *port;
    bool is_sick;
    int exit_code;
};

/* Every handler answers with a line of text. */
static void say(struct cube_http_req *req, int status, const char *text)
{
    cube_http_reply(req, status, "text/plain", text, strlen(text));
}

static void do_page(void *arg, struct cube_http_req *req)
{
    const struct echo *e = arg;
    const char *name = getenv("NAME");
    char page[200];

    snprintf(page, sizeof page, "%.100s on port %.20s\n",
             name ? name : "echo", e->port);
    say(req, 200, page);
}

static void do_health(void *arg, struct cube_http_req *req)
{
    const struct echo *e = arg;

    say(req, e->is_sick ? 500 : 200, e->is_sick ? "sick\n" : "well\n");
}

static void do_sick(void *arg, struct cube_http_req *req)
{
    struct echo *e = arg;

    e->is_sick = true;
    say(req, 200, "oh\n");
}

/* The loop stops behind this turn, with which the answer leaves. */
static void do_exit(void *arg, struct cube_http_req *req)
{
    struct echo *e = arg;
    const char *code = cube_http_query(req, "code");

    e->exit_code = code ? atoi(code) : 0;
    cube_loop_stop(e->loop);
    say(req, 200, "bye\n");
}

static const struct cube_http_route routes[] = {
    {"GET", "/", do_page},
    {"GET", "/health", do_health},
    {"GET", "/sick", do_sick},
    {"GET", "/exit", do_exit},
    {NULL, NULL, NULL},
};

/* The first process of a container has to handle SIGTERM to be ended by it. */
static void on_signal(int number)
{
    (void)number;
    _exit(0);
}

int main(int argc, char **argv)
{
    const char *given = argc > 1 ? argv[1] : getenv("CUBE_PORT_7777");
    struct echo e = {.port = given ? given : "7777", .exit_code = 1};
    struct cube_http_options options = {.is_public = true};
    struct cube_http_server *server = NULL;
    struct cube_err err;
    char where[32];

    signal(SIGTERM, on_signal);
    snprintf(where, sizeof where, ":%s", e.port);
    e.loop = cube_loop_new(cube_world_real(), &err);
    if (e.loop)
        server = cube_http_listen(e.loop, where, routes, &e, &options, &err);
    if (!server || cube_loop_run(e.loop, &err))
        fprintf(stderr, "echo: %s\n", err.text);
    cube_http_close(server);
    cube_loop_free(e.loop);
    return e.exit_code;
}
