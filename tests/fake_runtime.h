/* A runtime in memory: containers that do what a test tells them. Include
 * after test.h. Every callback comes from a deferred call, as it must. */
#ifndef FAKE_RUNTIME_H
#define FAKE_RUNTIME_H

struct fake_box {
    struct cube_container c;
    struct cube_list link;
};

/* The engine: outlives the runtimes (and workers) that use it. */
struct fake_engine {
    struct cube_list boxes;
    int made, starts, stops, removes;
    bool is_down;            /* every call ends in trouble */
    const char *no;          /* every start is refused with these words */
    const char *no_removal;  /* every removal is refused with these words */
    int refused;             /* so often */
    int exit_at_once;        /* a start gives a container that ended; -1: no */
    bool hangs;              /* calls are kept and never answered */
    int host_port;           /* where a container's port 80 is; 0: nowhere */
};

struct fake_call {
    struct fake_runtime *rt;
    struct cube_list link;
    struct cube_defer defer;
    enum fake_kind {
        FAKE_START, FAKE_STOP, FAKE_REMOVE, FAKE_LIST, FAKE_INSPECT, FAKE_JSON
    } kind;
    char id[80];
    struct cube_task *task;
    char cluster[40], worker[40];
    int64_t attempt;
    void (*fn)(void);
    void *arg;
};

struct fake_runtime {
    struct cube_runtime base;
    struct fake_engine *engine;
    struct cube_list calls;
    cube_change_fn *on_change;
    void *arg;
    struct cube_defer stir;
};

static struct fake_box *fake_find(struct fake_engine *e, const char *id)
{
    struct cube_list *l;

    for (l = e->boxes.next; l != &e->boxes; l = l->next) {
        struct fake_box *b = CUBE_OF(l, struct fake_box, link);

        if (strcmp(b->c.id, id) == 0)
            return b;
    }
    return NULL;
}

static struct fake_box *fake_of_task(struct fake_engine *e, const char *task)
{
    struct cube_list *l;

    for (l = e->boxes.prev; l != &e->boxes; l = l->prev) {
        struct fake_box *b = CUBE_OF(l, struct fake_box, link);

        if (strcmp(b->c.task, task) == 0)
            return b;
    }
    return NULL;
}

static int fake_count(struct fake_engine *e, enum cube_box_state state)
{
    struct cube_list *l;
    int n = 0;

    for (l = e->boxes.next; l != &e->boxes; l = l->next)
        n += CUBE_OF(l, struct fake_box, link)->c.state == state;
    return n;
}

static void fake_drop(struct fake_box *b)
{
    cube_list_remove(&b->link);
    cube_free(b->c.id);
    cube_free(b->c.name);
    cube_free(b->c.task);
    cube_free(b->c.cluster);
    cube_free(b->c.worker);
    cube_free(b->c.spec);
    cube_free(b->c.error);
    cube_ports_free(&b->c.ports);
    cube_free(b);
}

static void fake_engine_init(struct fake_engine *e)
{
    memset(e, 0, sizeof *e);
    e->exit_at_once = -1;
    cube_list_init(&e->boxes);
}

static void fake_engine_clear(struct fake_engine *e)
{
    while (!cube_list_is_empty(&e->boxes))
        fake_drop(CUBE_OF(e->boxes.next, struct fake_box, link));
}

static struct cube_time fake_now(struct fake_runtime *rt)
{
    const struct cube_world *w = cube_loop_world(rt->base.loop);

    return cube_time_from_ns(w->wall_ns(w->ctx));
}

static struct fake_box *fake_make(struct fake_call *k)
{
    struct fake_engine *e = k->rt->engine;
    struct fake_box *b = cube_alloc(sizeof *b);
    struct cube_buf spec = {0};
    char id[40];

    (void)snprintf(id, sizeof id, "box-%d", ++e->made);
    b->c.id = cube_text_dup(id);
    b->c.name = cube_text_dup(k->task->name);
    b->c.task = cube_text_dup(k->task->id);
    b->c.cluster = cube_text_dup(k->cluster);
    b->c.worker = cube_text_dup(k->worker);
    b->c.attempt = k->attempt;
    b->c.restart = k->task->restart_count;
    cube_task_print(k->task, &spec);
    b->c.spec = cube_buf_take(&spec);
    b->c.error = cube_text_dup("");
    b->c.started = fake_now(k->rt);
    b->c.state = e->exit_at_once < 0 ? CUBE_BOX_RUNNING : CUBE_BOX_EXITED;
    if (e->exit_at_once >= 0) {
        b->c.has_exit = true;
        b->c.exit_code = e->exit_at_once;
        b->c.finished = b->c.started;
    }
    b->c.ports.is_null = true;
    if (e->host_port) {
        struct cube_task *t = cube_task_new();

        (void)snprintf(id, sizeof id, "%d", e->host_port);
        cube_task_bind(t, "80/tcp", "0.0.0.0", id);
        cube_task_bind(t, "443/tcp", "0.0.0.0", "1");
        cube_ports_copy(&b->c.ports, &t->host_ports);
        cube_task_free(t);
    }
    cube_list_add(&e->boxes, &b->link);
    return b;
}

/* The same start as one that is there already is that one. */
static struct fake_box *fake_start(struct fake_call *k)
{
    struct fake_engine *e = k->rt->engine;
    struct fake_box *b = fake_of_task(e, k->task->id);

    e->starts++;
    if (b && b->c.attempt == k->attempt &&
        b->c.restart == k->task->restart_count)
        return b;
    return fake_make(k);
}

static void fake_answer_list(struct fake_call *k, const struct cube_err *err)
{
    struct fake_engine *e = k->rt->engine;
    struct cube_container list[64];
    struct cube_list *l;
    size_t n = 0;

    for (l = e->boxes.next; l != &e->boxes && n < 64; l = l->next) {
        struct fake_box *b = CUBE_OF(l, struct fake_box, link);

        if (strcmp(b->c.worker, k->worker) == 0)
            list[n++] = b->c;
    }
    ((cube_containers_fn *)k->fn)(k->arg, err ? NULL : list, err ? 0 : n, err);
}

static void fake_act(struct fake_call *k, const struct cube_err *err)
{
    struct fake_engine *e = k->rt->engine;
    struct fake_box *b = fake_find(e, k->id);

    if (k->kind == FAKE_STOP && !err && b) {
        e->stops++;
        if (b->c.state == CUBE_BOX_RUNNING) {
            b->c.state = CUBE_BOX_EXITED;
            b->c.has_exit = true;
            b->c.exit_code = 143;
            b->c.finished = fake_now(k->rt);
        }
    }
    if (k->kind == FAKE_REMOVE && !err && b) {
        e->removes++;
        fake_drop(b);
    }
    ((cube_done_fn *)k->fn)(k->arg, err);
}

static void fake_answer(void *arg)
{
    struct fake_call *k = arg;
    struct fake_engine *e = k->rt->engine;
    struct cube_err err = {0, ""};
    struct fake_box *b = fake_find(e, k->id);

    cube_list_remove(&k->link);
    if (e->is_down)
        (void)cube_fail(&err, CUBE_ECONN, "the engine does not answer");
    else if (k->kind == FAKE_START && e->no)
        (void)cube_fail(&err, CUBE_EINVAL, "%s", e->no);
    else if ((k->kind == FAKE_INSPECT || k->kind == FAKE_JSON) && !b)
        (void)cube_fail(&err, CUBE_ENOENT, "no such container");
    else if (k->kind == FAKE_REMOVE && e->no_removal) {
        e->refused++;
        (void)cube_fail(&err, CUBE_EINVAL, "%s", e->no_removal);
    }
    if (k->kind == FAKE_START && !err.code)
        b = fake_start(k);
    if (k->kind == FAKE_START || k->kind == FAKE_INSPECT)
        ((cube_container_fn *)k->fn)(k->arg, err.code ? NULL : &b->c,
                                     err.code ? &err : NULL);
    else if (k->kind == FAKE_LIST)
        fake_answer_list(k, err.code ? &err : NULL);
    else if (k->kind == FAKE_JSON)
        ((cube_text_fn *)k->fn)(k->arg, "{\"Id\":\"fake\"}", 13,
                                err.code ? &err : NULL);
    else
        fake_act(k, err.code ? &err : NULL);
    cube_task_free(k->task);
    cube_free(k);
}

static struct fake_call *fake_call(struct cube_runtime *base,
                                   enum fake_kind kind,
                                   const char *id, void (*fn)(void),
                                   void *arg)
{
    struct fake_runtime *rt = (struct fake_runtime *)base;
    struct fake_call *k = cube_alloc(sizeof *k);

    k->rt = rt;
    k->kind = kind;
    k->fn = fn;
    k->arg = arg;
    (void)snprintf(k->id, sizeof k->id, "%s", id ? id : "");
    cube_list_add(&rt->calls, &k->link);
    if (!rt->engine->hangs)
        cube_defer_set(base->loop, &k->defer, fake_answer, k);
    return k;
}

static void fake_op_start(struct cube_runtime *rt,
                          const struct cube_start *what,
                          cube_container_fn *fn, void *arg)
{
    struct fake_call *k = fake_call(rt, FAKE_START, NULL, (void (*)(void))fn,
                                    arg);

    k->task = cube_task_copy(what->task);
    k->attempt = what->attempt;
    (void)snprintf(k->cluster, sizeof k->cluster, "%s", what->cluster);
    (void)snprintf(k->worker, sizeof k->worker, "%s", what->worker);
}

static void fake_op_start_cancel(struct cube_runtime *rt, const char *task)
{
    (void)rt;
    (void)task;
}

static void fake_op_stop(struct cube_runtime *rt, const char *id,
                         int64_t grace_ms, cube_done_fn *fn, void *arg)
{
    (void)grace_ms;
    fake_call(rt, FAKE_STOP, id, (void (*)(void))fn, arg);
}

static void fake_op_kill(struct cube_runtime *rt, const char *id,
                         cube_done_fn *fn, void *arg)
{
    fake_call(rt, FAKE_STOP, id, (void (*)(void))fn, arg);
}

static void fake_op_remove(struct cube_runtime *rt, const char *id,
                           cube_done_fn *fn, void *arg)
{
    fake_call(rt, FAKE_REMOVE, id, (void (*)(void))fn, arg);
}

static void fake_op_list(struct cube_runtime *rt, const char *worker,
                         cube_containers_fn *fn, void *arg)
{
    struct fake_call *k = fake_call(rt, FAKE_LIST, NULL, (void (*)(void))fn,
                                    arg);

    (void)snprintf(k->worker, sizeof k->worker, "%s", worker);
}

static void fake_op_inspect(struct cube_runtime *rt, const char *id,
                            cube_container_fn *fn, void *arg)
{
    fake_call(rt, FAKE_INSPECT, id, (void (*)(void))fn, arg);
}

static void fake_op_json(struct cube_runtime *rt, const char *id,
                         cube_text_fn *fn, void *arg)
{
    fake_call(rt, FAKE_JSON, id, (void (*)(void))fn, arg);
}

static struct cube_logs *fake_op_logs(struct cube_runtime *rt, const char *id,
                                      const struct cube_logs_options *o,
                                      cube_data_fn *on_data,
                                      cube_done_fn *on_end, void *arg)
{
    (void)o;
    (void)on_data;
    return (struct cube_logs *)fake_call(rt, FAKE_STOP, id,
                                         (void (*)(void))on_end, arg);
}

static void fake_op_logs_cancel(struct cube_runtime *rt, struct cube_logs *l)
{
    struct fake_call *k = (struct fake_call *)l;

    cube_defer_clear(rt->loop, &k->defer);
    cube_list_remove(&k->link);
    cube_free(k);
}

static void fake_op_watch(struct cube_runtime *base, const char *worker,
                          cube_change_fn *fn, void *arg)
{
    struct fake_runtime *rt = (struct fake_runtime *)base;

    (void)worker; /* an engine of a test has one */
    rt->on_change = fn;
    rt->arg = arg;
}

static void fake_op_free(struct cube_runtime *base)
{
    struct fake_runtime *rt = (struct fake_runtime *)base;

    while (!cube_list_is_empty(&rt->calls)) {
        struct fake_call *k =
            CUBE_OF(rt->calls.next, struct fake_call, link);

        cube_defer_clear(base->loop, &k->defer);
        cube_list_remove(&k->link);
        cube_task_free(k->task);
        cube_free(k);
    }
    cube_free(rt);
}

static const struct cube_runtime_ops fake_ops = {
    .start = fake_op_start,
    .start_cancel = fake_op_start_cancel,
    .stop = fake_op_stop,
    .kill = fake_op_kill,
    .remove = fake_op_remove,
    .list = fake_op_list,
    .inspect = fake_op_inspect,
    .inspect_json = fake_op_json,
    .logs = fake_op_logs,
    .logs_cancel = fake_op_logs_cancel,
    .watch = fake_op_watch,
    .free = fake_op_free,
};

static struct fake_runtime *fake_runtime_new(struct cube_loop *l,
                                             struct fake_engine *e)
{
    struct fake_runtime *rt = cube_alloc(sizeof *rt);

    rt->base.ops = &fake_ops;
    rt->base.loop = l;
    rt->base.name = "fake";
    rt->base.words = (char *)"a fake engine";
    rt->base.engine_id = (char *)"fake-engine";
    rt->base.is_up = true;
    rt->engine = e;
    cube_list_init(&rt->calls);
    return rt;
}

/* A container ends by itself, and the engine says so. */
static void fake_exit(struct fake_runtime *rt, const char *task, int code)
{
    struct fake_box *b = fake_of_task(rt->engine, task);

    b->c.state = CUBE_BOX_EXITED;
    b->c.has_exit = true;
    b->c.exit_code = code;
    b->c.finished = fake_now(rt);
    rt->on_change(rt->arg, task);
}

#endif
