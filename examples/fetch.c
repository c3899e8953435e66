/*
 * An HTTP client: one request, whose answer is printed as it comes.
 *
 *     cc -O2 -o fetch examples/fetch.c cube.c -lpthread
 *     ./fetch http://localhost:7777 /health
 *     ./fetch unix:///run/docker.sock /_ping
 *     ./fetch localhost:5555 /tasks POST '{"Image":"nginx"}'
 *
 * Exit code: 0 for a 2xx answer, 1 for another one, 3 when none came. With
 * CUBE_TOKEN set it is sent.
 */
#include "../cube.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct fetch {
    struct cube_loop *loop;
    int exit_code;
};

static void on_head(void *arg, const struct cube_http_head *head)
{
    (void)arg;
    fprintf(stderr, "%d\n", cube_http_head_status(head));
}

static void on_data(void *arg, const char *data, size_t len)
{
    (void)arg;
    fwrite(data, 1, len, stdout);
    fflush(stdout);
}

static void on_done(void *arg, const struct cube_http_answer *answer)
{
    struct fetch *f = arg;

    if (answer->err)
        fprintf(stderr, "fetch: %s\n", answer->err->text);
    f->exit_code = answer->err ? 3 : answer->status / 100 == 2 ? 0 : 1;
    cube_loop_stop(f->loop);
}

int main(int argc, char **argv)
{
    struct cube_http_request request = {0};
    struct cube_http_client *client;
    struct fetch f = {0};
    struct cube_err err;

    if (argc < 3) {
        fprintf(stderr, "usage: fetch BASE TARGET [METHOD [BODY]]\n");
        return 2;
    }
    f.loop = cube_loop_new(cube_world_real(), &err);
    client = f.loop ? cube_http_client_new(f.loop, argv[1],
                                           getenv("CUBE_TOKEN"), &err) : NULL;
    if (!client) {
        fprintf(stderr, "fetch: %s\n", err.text);
        return 2;
    }
    request.target = argv[2];
    request.method = argc > 3 ? argv[3] : "GET";
    request.body = argc > 4 ? argv[4] : NULL;
    request.body_len = argc > 4 ? strlen(argv[4]) : 0;
    request.idle_timeout_ms = 60000;
    request.on_head = on_head;
    request.on_data = on_data;
    request.on_done = on_done;
    request.arg = &f;
    cube_http_call(client, &request);
    cube_loop_run(f.loop, &err);
    cube_http_client_free(client);
    cube_loop_free(f.loop);
    return f.exit_code;
}
