/*
 * The simulated engine: that the real client (chapter 9) lives with it, and
 * that it answers as the real one does.
 */
#include "test.h"

#include "jump_world.h"
#include "sim_engine.h"

struct heard {
    bool is_done, is_failed;
    struct cube_err err;
    enum cube_box_state state;
    int exit_code;
    char id[100], port[20], error[300];
    size_t count;
};

static void on_container(void *arg, const struct cube_container *c,
                         const struct cube_err *err)
{
    struct heard *h = arg;

    h->is_done = true;
    h->is_failed = err != NULL;
    if (err)
        h->err = *err;
    if (!c)
        return;
    h->state = c->state;
    h->exit_code = c->exit_code;
    (void)snprintf(h->id, sizeof h->id, "%s", c->id);
    (void)snprintf(h->error, sizeof h->error, "%s", c->error);
    if (c->ports.count > 0 && c->ports.list[0].count > 0)
        (void)snprintf(h->port, sizeof h->port, "%s",
                       c->ports.list[0].bindings[0].port);
}

static void on_done(void *arg, const struct cube_err *err)
{
    struct heard *h = arg;

    h->is_done = true;
    h->is_failed = err != NULL;
    if (err)
        h->err = *err;
}

static struct {
    struct jump_world world;
    struct cube_loop *loop;
    struct sim_engine *e;
    struct cube_runtime *rt;
    char where[300];
} k;

static void open_all(void)
{
    struct cube_err err = {0, ""};

    memset(&k, 0, sizeof k);
    jump_world_init(&k.world);
    k.loop = cube_loop_new(&k.world.table, NULL);
    k.e = sim_engine_new(k.loop, test_random());
    (void)snprintf(k.where, sizeof k.where, "unix:%s/sim.sock", test_dir());
    CHECK_INT(sim_engine_up(k.e, k.where, &err), 0);
    CHECK_STR(err.text, "");
    k.rt = cube_docker_new(k.loop, k.where, NULL);
    sim_engine_add_image(k.e, "web");
}

static void close_all(void)
{
    cube_runtime_free(k.rt);
    sim_engine_free(k.e);
    cube_loop_free(k.loop);
}

static void until(const bool *flag)
{
    int64_t end = k.world.now_ms + 600000;

    while (!*flag && k.world.now_ms < end)
        CHECK_INT(cube_loop_turn(k.loop, 1000, NULL), 0);
    CHECK(*flag);
}

static struct heard start(const char *name, const char *port)
{
    struct cube_task *t = cube_task_new();
    struct cube_start what = {t, "cluster", "worker", 1, NULL};
    struct heard h = {0};

    cube_uuid_new(&k.world.table, t->id);
    cube_task_set(&t->name, name);
    cube_task_set(&t->image, "web");
    cube_task_publish(t, "80/tcp", port);
    k.rt->ops->start(k.rt, &what, on_container, &h);
    until(&h.is_done);
    cube_task_free(t);
    return h;
}

static struct heard stop(const char *id)
{
    struct heard h = {0};

    k.rt->ops->stop(k.rt, id, 1000, on_done, &h);
    until(&h.is_done);
    return h;
}

TEST(the_client_starts_and_stops_on_it)
{
    struct heard h;

    open_all();
    h = start("web", "8080");
    CHECK_STR(h.err.text, "");
    CHECK_STR(h.port, "8080");
    CHECK_INT(h.state, CUBE_BOX_RUNNING);
    CHECK(start("web", "8080").is_failed);
    CHECK_INT(sim_count(k.e, SIM_RUNNING, NULL, NULL), 1);
    CHECK_INT(sim_count(k.e, SIM_CREATED, NULL, NULL), 0);
    CHECK(!stop(h.id).is_failed);
    CHECK_INT(sim_count(k.e, SIM_EXITED, "cube.worker", "worker"), 1);
    CHECK(!start("web", "8080").is_failed);
    close_all();
}
