/* A manager and workers on fake engines, all on one loop whose time jumps,
 * and questions to them over HTTP. */
#ifndef CLUSTER_H
#define CLUSTER_H

#include "fake_runtime.h"
#include "jump_world.h"

#define NODES 5

struct cluster {
    struct jump_world world;
    struct cube_loop *loop;
    char dir[200];
    struct fake_engine engines[NODES];
    struct fake_runtime *runtimes[NODES];
    struct cube_worker *workers[NODES];
    uint16_t ports[NODES]; /* of workers, kept over restarts */
    struct cube_manager *manager;
    uint16_t port;
    const char *store, *worker_store;
    int node_count;
    bool is_loud;
    int complaints; /* errors in the log of all of them */
    /* the last answer */
    int status;
    struct cube_buf body;
    bool is_done;
};

static void cluster_log(void *arg, enum cube_level level, const char *text)
{
    struct cluster *k = arg;

    k->complaints += level == CUBE_ERROR;
    if (k->is_loud)
        (void)fprintf(stderr, "%8.3f [%d] %s\n",
                      (double)(k->world.now_ms - 1000000) / 1000, level, text);
}

static void cluster_worker_up(struct cluster *k, int i)
{
    struct cube_worker_options o;
    struct cube_err err = {0, ""};
    char where[40], name[20], dir[240];

    memset(&o, 0, sizeof o);
    (void)snprintf(where, sizeof where, "127.0.0.1:%u", k->ports[i]);
    (void)snprintf(name, sizeof name, "w%d", i);
    (void)snprintf(dir, sizeof dir, "%s/w", k->dir);
    k->runtimes[i] = fake_runtime_new(k->loop, &k->engines[i]);
    o.name = name;
    o.listen = where;
    o.data_dir = dir;
    o.store = k->worker_store;
    o.own_runtime = &k->runtimes[i]->base;
    k->workers[i] = cube_worker_new(k->loop, &o, &err);
    if (!k->workers[i])
        FAIL("worker %d: %s", i, err.text);
    else
        k->ports[i] = cube_worker_port(k->workers[i]);
}

/* Gone, as after kill -9 as far as the others can tell: its engine's
 * containers run on. */
static void cluster_worker_down(struct cluster *k, int i)
{
    cube_worker_free(k->workers[i]);
    k->workers[i] = NULL;
    k->runtimes[i] = NULL;
}

static void cluster_manager_up(struct cluster *k)
{
    struct cube_manager_options o;
    struct cube_err err = {0, ""};
    char where[40], list[100] = "", dir[240];

    memset(&o, 0, sizeof o);
    (void)snprintf(where, sizeof where, "127.0.0.1:%u", k->port);
    for (int i = 0; i < k->node_count; i++)
        (void)snprintf(list + strlen(list), sizeof list - strlen(list),
                       "%s127.0.0.1:%u", i ? "," : "", k->ports[i]);
    (void)snprintf(dir, sizeof dir, "%s/m", k->dir);
    o.listen = where;
    o.data_dir = dir;
    o.store = k->store;
    o.workers = list;
    o.scheduler_name = "roundrobin";
    k->manager = cube_manager_new(k->loop, &o, &err);
    if (!k->manager)
        FAIL("manager: %s", err.text);
    else
        k->port = cube_manager_port(k->manager);
}

static void cluster_manager_down(struct cluster *k)
{
    cube_manager_free(k->manager);
    k->manager = NULL;
}

static void cluster_turn(struct cluster *k)
{
    struct cube_err err = {0, ""};

    CHECK_INT(cube_loop_turn(k->loop, 1000, &err), 0);
}

/* Lets `ms` of the cluster's time pass. */
static void cluster_run(struct cluster *k, int64_t ms)
{
    int64_t end = k->world.now_ms + ms;

    while (k->world.now_ms < end)
        cluster_turn(k);
}

/* Workers and manager, with their stores in files. */
static void cluster_open(struct cluster *k, int nodes)
{
    struct cube_err err = {0, ""};

    static int opened; /* a test may open several, one after the other */

    memset(k, 0, sizeof *k);
    jump_world_init(&k->world);
    k->is_loud = getenv("CLUSTER_LOUD") != NULL;
    (void)snprintf(k->dir, sizeof k->dir, "%.100s/%d", test_dir(), ++opened);
    k->loop = cube_loop_new(&k->world.table, &err);
    cube_loop_set_log(k->loop, cluster_log, k);
    k->node_count = nodes;
    for (int i = 0; i < nodes; i++) {
        fake_engine_init(&k->engines[i]);
        cluster_worker_up(k, i);
    }
    cluster_manager_up(k);
    cluster_run(k, 1000);
}

static void cluster_close(struct cluster *k)
{
    cluster_manager_down(k);
    for (int i = 0; i < k->node_count; i++) {
        cluster_worker_down(k, i);
        fake_engine_clear(&k->engines[i]);
    }
    cube_buf_free(&k->body);
    cube_loop_free(k->loop);
}

static void cluster_answered(void *arg, const struct cube_http_answer *a)
{
    struct cluster *k = arg;

    k->status = a->err ? 0 : a->status;
    cube_buf_clear(&k->body);
    cube_buf_add(&k->body, a->body ? a->body : "", a->body_len);
    k->is_done = true;
}

/* Asks whoever listens on `port`, and returns the status; 0: no answer. The
 * body is in k->body. */
static int cluster_ask(struct cluster *k, uint16_t port, const char *method,
                       const char *target, const char *body)
{
    struct cube_http_request r;
    struct cube_http_client *c;
    char base[60];

    (void)snprintf(base, sizeof base, "http://127.0.0.1:%u", port);
    c = cube_http_client_new(k->loop, base, NULL, NULL);
    memset(&r, 0, sizeof r);
    r.method = method;
    r.target = target;
    r.body = body;
    r.body_len = body ? strlen(body) : 0;
    r.timeout_ms = 30000;
    r.on_done = cluster_answered;
    r.arg = k;
    k->is_done = false;
    cube_http_call(c, &r);
    while (!k->is_done)
        cluster_turn(k);
    cube_http_client_free(c);
    return k->status;
}

/* Asks the manager. */
static int ask(struct cluster *k, const char *method, const char *target,
               const char *body)
{
    return cluster_ask(k, k->port, method, target, body);
}

/* Somebody who follows the events of whoever listens on a port. */
struct follower {
    struct cube_http_client *client;
    struct cube_http_call *call;
    struct cube_buf text; /* all that came */
    bool is_over;
};

static void follower_data(void *arg, const char *p, size_t len)
{
    cube_buf_add(&((struct follower *)arg)->text, p, len);
}

static void follower_over(void *arg, const struct cube_http_answer *a)
{
    struct follower *f = arg;

    (void)a;
    f->call = NULL;
    f->is_over = true;
}

static void follower_open(struct follower *f, struct cluster *k, uint16_t port,
                          const char *target)
{
    struct cube_http_request r;
    char base[60];

    memset(f, 0, sizeof *f);
    (void)snprintf(base, sizeof base, "http://127.0.0.1:%u", port);
    f->client = cube_http_client_new(k->loop, base, NULL, NULL);
    memset(&r, 0, sizeof r);
    r.method = "GET";
    r.target = target;
    r.on_data = follower_data;
    r.on_done = follower_over;
    r.arg = f;
    f->call = cube_http_call(f->client, &r);
}

static void follower_close(struct follower *f)
{
    if (f->call)
        cube_http_call_cancel(f->call);
    cube_http_client_free(f->client);
    cube_buf_free(&f->text);
}

/* How often a text stands in what came. */
static int follower_count(const struct follower *f, const char *part)
{
    int n = 0;

    for (const char *p = f->text.data; p && (p = strstr(p, part)); p++)
        n++;
    return n;
}

/* The task as the manager knows it, or NULL. The caller frees it. */
static struct cube_task *cluster_task(struct cluster *k, const char *id)
{
    struct cube_task *t = NULL;
    char target[80];

    (void)snprintf(target, sizeof target, "/tasks/%s", id);
    if (ask(k, "GET", target, NULL) == 200)
        (void)cube_task_parse(k->body.data, k->body.len, false, &t, NULL);
    return t;
}

static int cluster_state(struct cluster *k, const char *id)
{
    struct cube_task *t = cluster_task(k, id);
    int state = t ? (int)t->state : -1;

    cube_task_free(t);
    return state;
}

/* Turns until the task is in a state, at most `ms`; true when it is. */
static bool cluster_await(struct cluster *k, const char *id, int state,
                          int64_t ms)
{
    int64_t end = k->world.now_ms + ms;

    while (cluster_state(k, id) != state) {
        if (k->world.now_ms >= end)
            return false;
        cluster_run(k, 50);
    }
    return true;
}

static int cluster_running(struct cluster *k)
{
    int n = 0;

    for (int i = 0; i < k->node_count; i++)
        n += fake_count(&k->engines[i], CUBE_BOX_RUNNING);
    return n;
}

/* The engine that runs a task, or -1. */
static int cluster_where(struct cluster *k, const char *id)
{
    for (int i = 0; i < k->node_count; i++) {
        struct fake_box *b = fake_of_task(&k->engines[i], id);

        if (b && b->c.state == CUBE_BOX_RUNNING)
            return i;
    }
    return -1;
}

#endif
