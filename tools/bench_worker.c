/*
 * A worker whose containers are records in memory, for tools/bench: so that a
 * manager has a thousand tasks that run, and so many changes a second, while
 * next to nothing else goes on. It is a runtime of one's own, as cube.h
 * describes it.
 *
 *     bench_worker PORT DIR CHANGES_PER_SECOND
 *
 * On SIGUSR1 it begins: so often a second one of its tasks, in turn, exits
 * with a failure. The worker then reports it, and starts it again.
 */
#include "../cube.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_BOXES 20000

struct box {
    struct cube_container c;
    char id[70], task[40], cluster[40], worker[40];
};

/* One call that waits for its answer; callbacks come from the loop. */
struct call {
    struct cube_defer defer;
    struct box *box;
    cube_container_fn *on_box;
    cube_containers_fn *on_list;
    cube_done_fn *on_done;
    void *arg;
};

static struct cube_loop *loop;
static struct cube_timer timer;
static struct box *boxes[MAX_BOXES];
static struct cube_container list[MAX_BOXES];
static size_t count, next_exit;
static int64_t exits, begin_ms;
static double rate;
static cube_change_fn *on_change;
static void *change_arg;
static char nothing[] = "";
static volatile sig_atomic_t is_begun;

static void *need(void *p)
{
    if (!p)
        abort();
    return p;
}

static struct cube_time now(void)
{
    const struct cube_world *w = cube_loop_world(loop);

    return cube_time_from_ns(w->wall_ns(w->ctx));
}

static struct box *find(const char *id)
{
    for (size_t i = 0; id && i < count; i++) {
        if (strcmp(boxes[i]->id, id) == 0 || strcmp(boxes[i]->task, id) == 0)
            return boxes[i];
    }
    return NULL;
}

static void answer(void *arg)
{
    struct call *k = arg;
    struct cube_err none = {CUBE_ENOENT, "no such container"};

    if (k->on_box) {
        k->on_box(k->arg, k->box ? &k->box->c : NULL, k->box ? NULL : &none);
    } else if (k->on_list) {
        for (size_t i = 0; i < count; i++)
            list[i] = boxes[i]->c;
        k->on_list(k->arg, list, count, NULL);
    } else {
        k->on_done(k->arg, NULL);
    }
    free(k);
}

static void later(struct call k)
{
    struct call *copy = need(malloc(sizeof *copy));

    *copy = k;
    cube_defer_set(loop, &copy->defer, answer, copy);
}

/* A task's box is made once; each start after that runs it again, under
 * another ID. */
static void start(struct cube_runtime *rt, const struct cube_start *what,
                  cube_container_fn *fn, void *arg)
{
    static unsigned made;
    struct box *b = find(what->task->id);

    (void)rt;
    if (!b) {
        if (count == MAX_BOXES)
            abort();
        b = boxes[count++] = need(calloc(1, sizeof *b));
    }
    (void)snprintf(b->id, sizeof b->id, "%064x", ++made);
    (void)snprintf(b->task, sizeof b->task, "%s", what->task->id);
    (void)snprintf(b->cluster, sizeof b->cluster, "%s", what->cluster);
    (void)snprintf(b->worker, sizeof b->worker, "%s", what->worker);
    b->c = (struct cube_container){
        .id = b->id, .name = nothing, .task = b->task,
        .cluster = b->cluster, .worker = b->worker,
        .attempt = what->attempt, .restart = what->task->restart_count,
        .spec = nothing, .state = CUBE_BOX_RUNNING, .error = nothing,
        .started = now(), .ports = {.is_null = true}};
    later((struct call){.box = b, .on_box = fn, .arg = arg});
}

static void start_cancel(struct cube_runtime *rt, const char *task)
{
    (void)rt;
    (void)task;
}

static void ended(struct box *b, int code)
{
    b->c.state = CUBE_BOX_EXITED;
    b->c.has_exit = true;
    b->c.exit_code = code;
    b->c.finished = now();
}

static void kill_box(struct cube_runtime *rt, const char *id,
                     cube_done_fn *fn, void *arg)
{
    struct box *b = find(id);

    (void)rt;
    if (b)
        ended(b, 143);
    later((struct call){.on_done = fn, .arg = arg});
}

static void stop(struct cube_runtime *rt, const char *id, int64_t grace_ms,
                 cube_done_fn *fn, void *arg)
{
    (void)grace_ms;
    kill_box(rt, id, fn, arg);
}

static void list_all(struct cube_runtime *rt, const char *worker,
                     cube_containers_fn *fn, void *arg)
{
    (void)rt;
    (void)worker;
    later((struct call){.on_list = fn, .arg = arg});
}

static void inspect(struct cube_runtime *rt, const char *id,
                    cube_container_fn *fn, void *arg)
{
    (void)rt;
    later((struct call){.box = find(id), .on_box = fn, .arg = arg});
}

static void watch(struct cube_runtime *rt, const char *worker,
                  cube_change_fn *fn, void *arg)
{
    (void)rt;
    (void)worker;
    on_change = fn;
    change_arg = arg;
}

static void nothing_to_free(struct cube_runtime *rt)
{
    (void)rt;
}

/* No logs and no inspection by its own JSON: nobody asks for them here. */
static const struct cube_runtime_ops ops = {
    .start = start, .start_cancel = start_cancel, .stop = stop,
    .kill = kill_box, .remove = kill_box, .list = list_all,
    .inspect = inspect, .watch = watch, .free = nothing_to_free};

/* As many exits as are due by now: of tasks that run, in turn. */
static void tick(void *arg)
{
    int64_t now_ms = cube_loop_now_ms(loop);
    int64_t due = (int64_t)((double)(now_ms - begin_ms) / 1e3 * rate);

    (void)arg;
    for (size_t tried = 0; exits < due && tried < count; tried++) {
        struct box *b = boxes[next_exit++ % count];

        if (b->c.state != CUBE_BOX_RUNNING)
            continue;
        exits++;
        ended(b, 1);
        if (on_change)
            on_change(change_arg, b->task);
    }
    cube_timer_set(loop, &timer, 5, tick, NULL);
}

static void on_signal(int number)
{
    (void)number;
    is_begun = 1;
    cube_loop_wake(loop);
}

int main(int argc, char **argv)
{
    static struct cube_runtime rt = {.ops = &ops, .name = "bench",
                                     .is_up = true};
    static char words[] = "records in memory", engine_id[] = "bench";
    struct cube_err err = {CUBE_OK, ""};
    struct cube_worker_options o = {.name = "bench", .own_runtime = &rt};
    struct cube_worker *w = NULL;
    char listen[40];

    if (argc != 4) {
        fprintf(stderr, "usage: bench_worker PORT DIR CHANGES_PER_SECOND\n");
        return 2;
    }
    (void)snprintf(listen, sizeof listen, "127.0.0.1:%s", argv[1]);
    o.listen = listen;
    o.data_dir = argv[2];
    rate = atof(argv[3]);
    rt.loop = loop = cube_loop_new(cube_world_real(), &err);
    rt.words = words;
    rt.engine_id = engine_id;
    if (loop) {
        signal(SIGUSR1, on_signal);
        w = cube_worker_new(loop, &o, &err);
    }
    while (w && cube_loop_turn(loop, -1, &err) == 0) {
        if (is_begun && begin_ms == 0) {
            begin_ms = cube_loop_now_ms(loop);
            tick(NULL);
        }
    }
    fprintf(stderr, "bench_worker: %s\n", err.text);
    return 1;
}
