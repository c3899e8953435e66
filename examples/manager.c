/*
 * A manager in a main loop of your own. The program waits with poll(2) for
 * what it watches itself, here the keyboard, and for Cube's one descriptor.
 *
 *     manager [HOST:PORT,...]     the workers, by default localhost:5556
 *
 *     cc -o manager examples/manager.c cube.c
 *
 * Each line that is typed is answered with what the manager's API says: try
 * /tasks or /nodes. The end of the input ends the program; tasks run on.
 */
#include "../cube.h"

#include <poll.h>
#include <stdio.h>
#include <string.h>

static void on_log(void *arg, enum cube_level level, const char *text)
{
    (void)arg;
    if (level > CUBE_DEBUG)
        fprintf(stderr, "%s\n", text);
}

static void on_answer(void *arg, const struct cube_http_answer *a)
{
    (void)arg;
    if (a->err)
        printf("%s\n", a->err->text);
    else
        printf("%d %.*s\n", a->status, (int)a->body_len, a->body);
}

/* Asks the manager as any client would; the answer comes in a later turn. */
static void ask(struct cube_http_client *client, char *line)
{
    struct cube_http_request r;

    line[strcspn(line, "\n")] = 0;
    memset(&r, 0, sizeof r);
    r.method = "GET";
    r.target = line;
    r.timeout_ms = 5000;
    r.on_done = on_answer;
    cube_http_call(client, &r);
}

static int run(struct cube_loop *l, struct cube_http_client *client,
               struct cube_err *err)
{
    char line[200];

    for (;;) {
        struct pollfd fds[2] = {{0, POLLIN, 0}, {cube_loop_fd(l), POLLIN, 0}};

        poll(fds, 2, cube_loop_timeout_ms(l));
        if (fds[0].revents) {
            if (!fgets(line, sizeof line, stdin))
                return 0;
            if (line[0] == '/')
                ask(client, line);
        }
        if (cube_loop_turn(l, 0, err) < 0)
            return -1;
    }
}

int main(int argc, char **argv)
{
    struct cube_err err = {CUBE_OK, ""};
    struct cube_loop *l = cube_loop_new(cube_world_real(), &err);
    struct cube_manager_options o = {.store = "memory",
                                     .workers = argc > 1 ? argv[1] : NULL};
    struct cube_http_client *client = NULL;
    struct cube_manager *m = NULL;
    int status = 1;

    setvbuf(stdin, NULL, _IONBF, 0); /* poll sees what stdio has not read */
    if (l) {
        cube_loop_set_log(l, on_log, NULL);
        m = cube_manager_new(l, &o, &err);
    }
    if (m)
        client = cube_http_client_new(l, "http://127.0.0.1:5555", NULL, &err);
    if (client && run(l, client, &err) == 0)
        status = 0;
    else
        fprintf(stderr, "manager: %s\n", err.text);
    cube_http_client_free(client);
    cube_manager_free(m);
    cube_loop_free(l);
    return status;
}
