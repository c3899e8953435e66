/*
 * What each embedding program does, whichever way it has got at Cube: with
 * nothing but cube.h, in a main loop of its own. Valid C and C++. The program
 * includes cube.h, and then this; its main returns embed_main().
 *
 * A loop that is turned from outside, a timer; a task read, checked and
 * printed; and a whole cluster: a manager and a worker on that loop, which
 * run a task as a process and stop it again.
 */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int embed_passed, embed_failed;

static void embed_check(bool holds, const char *claim)
{
    if (holds) {
        embed_passed++;
        return;
    }
    embed_failed++;
    printf("FAILED: %s\n", claim);
}

#define EMBED_CHECK(claim) embed_check(claim, #claim)

static void embed_tick(void *arg)
{
    ++*(int *)arg;
}

/* A main loop of the program's own: poll(2) over what it watches itself and
 * Cube's one descriptor. */
static void embed_turn_until(struct cube_loop *l, const int *done)
{
    while (!*done) {
        struct pollfd p;

        p.fd = cube_loop_fd(l);
        p.events = POLLIN;
        p.revents = 0;
        poll(&p, 1, cube_loop_timeout_ms(l));
        if (cube_loop_turn(l, 0, NULL) < 0)
            return;
    }
}

static void embed_loop(void)
{
    struct cube_err err;
    struct cube_loop *l = cube_loop_new(cube_world_real(), &err);
    struct cube_timer timer;
    int ticks = 0;

    memset(&timer, 0, sizeof timer);
    EMBED_CHECK(l != NULL);
    cube_timer_set(l, &timer, 5, embed_tick, &ticks);
    embed_turn_until(l, &ticks);
    EMBED_CHECK(ticks == 1);
    cube_loop_free(l);
}

static void embed_task(void)
{
    static const char json[] =
        "{\"Name\":\"web\",\"Image\":\"nginx:latest\",\"Memory\":16777216,"
        "\"ExposedPorts\":{\"80/tcp\":{}},\"Cmd\":[\"a\",\"b\"],"
        "\"HealthCheck\":null}";
    struct cube_err err;
    struct cube_task *t = NULL;
    struct cube_buf out;

    memset(&out, 0, sizeof out);
    EMBED_CHECK(cube_task_parse(json, sizeof json - 1, true, &t, &err) == 0);
    if (!t)
        return;
    EMBED_CHECK(strcmp(t->name, "web") == 0);
    EMBED_CHECK(t->mem_bytes == 16777216);
    EMBED_CHECK(cube_task_check(t, &err) == 0);
    cube_task_print(t, &out);
    EMBED_CHECK(strstr(out.data, "\"Image\":\"nginx:latest\"") != NULL);
    EMBED_CHECK(strstr(out.data, "\"Cmd\":[\"a\",\"b\"]") != NULL);
    cube_buf_free(&out);
    cube_task_free(t);
}

/* ---- A manager, a worker, and a task ---- */

#define EMBED_ID "0b5e55ed-0000-4000-8000-00000000000a"
#define EMBED_TRIES 2000 /* looks, 10 ms apart */

struct embed_cluster {
    struct cube_loop *loop;
    struct cube_worker *worker;
    struct cube_manager *manager;
    struct cube_http_client *client;
    char dir[64];
    int is_done, status; /* of the request that is under way */
    char body[8192];
};

static void embed_answered(void *arg, const struct cube_http_answer *a)
{
    struct embed_cluster *e = (struct embed_cluster *)arg;

    e->status = a->status;
    snprintf(e->body, sizeof e->body, "%.*s", (int)a->body_len,
             a->body_len ? a->body : "");
    e->is_done = 1;
}

/* Sends one request to the manager and turns the loop until its answer. */
static void embed_ask(struct embed_cluster *e, const char *method,
                      const char *target, const char *body)
{
    struct cube_http_request r;

    memset(&r, 0, sizeof r);
    r.method = method;
    r.target = target;
    r.body = body;
    r.body_len = strlen(body);
    r.timeout_ms = 20000;
    r.on_done = embed_answered;
    r.arg = e;
    e->is_done = 0;
    cube_http_call(e->client, &r);
    embed_turn_until(e->loop, &e->is_done);
}

/* Asks for the task until it is in that state ("\"State\":2"). */
static void embed_wait_for(struct embed_cluster *e, const char *state)
{
    for (int i = 0; i < EMBED_TRIES; i++) {
        struct cube_timer timer;
        int is_over = 0;

        embed_ask(e, "GET", "/tasks/" EMBED_ID, "");
        if (e->status == 200 && strstr(e->body, state))
            return;
        memset(&timer, 0, sizeof timer);
        cube_timer_set(e->loop, &timer, 10, embed_tick, &is_over);
        embed_turn_until(e->loop, &is_over);
    }
    printf("never saw %s, last: %d %s\n", state, e->status, e->body);
    embed_failed++;
}

static void embed_start(struct embed_cluster *e)
{
    struct cube_worker_options wo;
    struct cube_manager_options mo;
    struct cube_err err;
    char where[64];

    memset(&err, 0, sizeof err);
    memset(&wo, 0, sizeof wo);
    wo.name = "embedded";
    wo.listen = "127.0.0.1:0";
    wo.data_dir = e->dir;
    wo.runtime = "process";
    e->worker = cube_worker_new(e->loop, &wo, &err);
    if (!e->worker) {
        printf("worker: %s\n", err.text);
        return;
    }
    snprintf(where, sizeof where, "127.0.0.1:%u",
             (unsigned)cube_worker_port(e->worker));
    memset(&mo, 0, sizeof mo);
    mo.listen = "127.0.0.1:0";
    mo.data_dir = e->dir;
    mo.workers = where;
    e->manager = cube_manager_new(e->loop, &mo, &err);
    if (!e->manager) {
        printf("manager: %s\n", err.text);
        return;
    }
    snprintf(where, sizeof where, "http://127.0.0.1:%u",
             (unsigned)cube_manager_port(e->manager));
    e->client = cube_http_client_new(e->loop, where, NULL, &err);
}

static void embed_run_task(struct embed_cluster *e)
{
    embed_ask(e, "POST", "/tasks",
              "{\"ID\":\"" EMBED_ID "\",\"Name\":\"embedded\","
              "\"Image\":\"none\",\"Cmd\":[\"sleep\",\"1000\"]}");
    EMBED_CHECK(e->status == 201);
    embed_wait_for(e, "\"State\":2");
    EMBED_CHECK(strstr(e->body, "\"Name\":\"embedded\"") != NULL);
    embed_ask(e, "DELETE", "/tasks/" EMBED_ID, "");
    EMBED_CHECK(e->status == 204);
    embed_wait_for(e, "\"State\":3");
}

static void embed_cluster(void)
{
    struct embed_cluster e;
    char command[100];

    memset(&e, 0, sizeof e);
    snprintf(e.dir, sizeof e.dir, "/tmp/cube-embed-%d", (int)getpid());
    e.loop = cube_loop_new(cube_world_real(), NULL);
    embed_start(&e);
    EMBED_CHECK(e.client != NULL);
    if (e.client)
        embed_run_task(&e);
    cube_http_client_free(e.client);
    cube_manager_free(e.manager);
    cube_worker_free(e.worker);
    cube_loop_free(e.loop);
    snprintf(command, sizeof command, "rm -rf %s", e.dir);
    EMBED_CHECK(system(command) == 0);
}

static int embed_main(void)
{
    embed_loop();
    embed_task();
    embed_cluster();
    printf("%d passed, %d failed, 0 skipped\n", embed_passed, embed_failed);
    return embed_failed > 0;
}
