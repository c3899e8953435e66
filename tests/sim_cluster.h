/* A manager, workers with an engine each, and clients, every one of them a
 * process on a simulated host (sim_world.h). Supervised as systemd would: what
 * dies is started again after a second, unless a fault says otherwise.
 *
 *      host  m            w1 .. w5                        c1 .. c3
 *            manager      worker --unix socket-- engine   client
 */
#ifndef SIM_CLUSTER_H
#define SIM_CLUSTER_H

#define SIM_NODES 5
#define SIM_CLIENTS 3
#define SIM_SCARCE 4          /* ports that tasks compete for, from 8000 on */
#define SIM_DATA "/data"
#define SIM_SOCKET "unix:///run/docker.sock"

struct sim;
struct sim_plan;

/* A manager or a worker: what its supervisor keeps alive. */
struct sim_daemon {
    struct sim *sim;
    struct room_proc *proc;
    struct cube_manager *manager; /* one of them, while it is up */
    struct cube_worker *worker;
    int node;                 /* -1: the manager */
    int held;                 /* so many faults keep it from being started */
    bool is_starting;         /* in a second */
    int64_t since_us;         /* it started then */
    int64_t first_epoch;      /* of a manager, as it started */
};

struct sim_node {
    struct room_host *host;
    struct room_proc *proc;   /* the engine's */
    struct sim_engine *engine;
    int held;                 /* so many faults keep the engine away */
    int taken[SIM_SCARCE];    /* and so many its ports from 8000 on */
    int seen_requests;
    struct sim_daemon worker;
};

struct sim {
    struct room room;
    uint64_t seed;
    uint64_t plan;            /* randomness of the fault plan alone */
    int64_t end_us;           /* when the faults and the clients end */
    bool is_crowded;          /* there is less room than tasks want */
    struct sim_daemon manager;
    struct sim_node nodes[SIM_NODES];
    struct sim_client *clients[SIM_CLIENTS];
    struct sim_history *history;
    bool is_over;             /* something did not hold */
    char broken[40];          /* which invariant */
    char words[1000];
    bool has_joined;          /* the last worker was told that it has */
    bool was_odd;             /* there was a fault that tasks may fail of */
    struct sim_plan *faults;
    int trouble[ROOM_HOSTS];  /* faults that hit a host just now */
    int odd[ROOM_HOSTS];      /* of these: of its engine, clock, or power */
    int64_t odd_us[ROOM_HOSTS]; /* the last of them was on then */
    int64_t heard_us[ROOM_HOSTS]; /* the manager could hear it then */
    int64_t fine_us[ROOM_HOSTS]; /* none since then, and all is up */
    int64_t epoch, epoch_us;  /* the manager's last, which started then */
    int64_t awake_us;         /* its last fault that was more than sleep */
    int64_t slept_us, woke_us; /* its last sleep, from and to */
    bool is_asleep;
    uint64_t most_connects, most_turns; /* in a second */
    int most_requests;
    long most_bytes[2];       /* of the manager, of a worker */
    long *fault_counts, *check_counts;
};

/* The first thing that does not hold ends the run. */
__attribute__((format(printf, 3, 4)))
static void sim_break(struct sim *s, const char *invariant,
                      const char *format, ...)
{
    va_list args;

    if (s->is_over)
        return;
    va_start(args, format);
    (void)vsnprintf(s->words, sizeof s->words, format, args);
    va_end(args);
    (void)snprintf(s->broken, sizeof s->broken, "%s", invariant);
    room_say(&s->room, "", "BROKEN %s: %s", s->broken, s->words);
    s->is_over = true;
}

static void sim_proc_turn(void *arg)
{
    struct room_proc *p = arg;
    struct cube_err err = {CUBE_OK, ""};

    if (cube_loop_turn(p->loop, 0, &err) < 0)
        abort();
}

/* see sim_checks.h */
static void sim_node_lost(struct sim *s, const char *text);

static void sim_proc_log(void *arg, enum cube_level level, const char *text)
{
    struct room_proc *p = arg;

    (void)level;
    room_say(p->room, p->name, "%s", text);
    if (strstr(text, " is lost: "))
        sim_node_lost(CUBE_OF(p->room, struct sim, room), text);
}

/* A loop for the process, in its own world. */
static struct cube_loop *sim_proc_open(struct room_proc *p)
{
    room_proc_begin(p);
    room_running = p;
    p->loop = cube_loop_new(&p->table, NULL);
    cube_loop_set_log(p->loop, sim_proc_log, p);
    p->turn = sim_proc_turn;
    p->arg = p;
    return p->loop;
}

static const char *const sim_node_env[] = {
    "HOME=/root", "DOCKER_HOST=unix:///run/docker.sock", NULL
};

static void sim_daemon_later(struct sim_daemon *d, int64_t in_us);

static bool sim_worker_new(struct sim_daemon *d, struct cube_err *err)
{
    static const char *const names[] = {"w1", "w2", "w3", "w4", "w5", NULL};
    struct cube_worker_options o;
    char name[16], where[40], advertise[40];

    memset(&o, 0, sizeof o);
    (void)snprintf(name, sizeof name, "w%d", d->node + 1);
    (void)snprintf(where, sizeof where, "10.0.0.%d:5556",
                   d->proc->host->number + 1);
    (void)snprintf(advertise, sizeof advertise, "%s:5556", name);
    o.name = name;
    o.listen = where;
    o.data_dir = SIM_DATA;
    o.runtime = "docker";
    o.host_names = names;
    if (d->node == SIM_NODES - 1) { /* this one joins by itself */
        o.join = "m:5555";
        o.advertise = advertise;
    }
    d->worker = cube_worker_new(d->proc->loop, &o, err);
    return d->worker != NULL;
}

static bool sim_manager_new(struct sim_daemon *d, struct cube_err *err)
{
    static const char *const names[] = {"m", NULL};
    static const char *const schedulers[] = {"epvm", "roundrobin", "greedy"};
    struct cube_manager_options o;

    memset(&o, 0, sizeof o);
    o.listen = "10.0.0.1:5555";
    o.data_dir = SIM_DATA;
    o.host_names = names;
    o.workers = "w1:5556,w2:5556,w3:5556,w4:5556";
    o.scheduler_name = schedulers[d->sim->seed % 3];
    d->manager = cube_manager_new(d->proc->loop, &o, err);
    return d->manager != NULL;
}

/* Frees what the process had, after the kernel's part of its death or, for an
 * orderly end, before it. Whatever is not freed is a leak. */
static void sim_daemon_free(struct sim_daemon *d)
{
    room_running = d->proc;
    cube_manager_free(d->manager);
    cube_worker_free(d->worker);
    d->manager = NULL;
    d->worker = NULL;
    cube_loop_free(d->proc->loop);
    d->proc->loop = NULL;
    room_running = NULL;
    if (d->proc->heap_blocks != 0)
        sim_break(d->sim, "nothing leaks", "%s ended with %ld blocks of "
                  "memory", d->proc->name, d->proc->heap_blocks);
}

static void sim_daemon_start(struct room *r, void *arg, int64_t number)
{
    struct sim_daemon *d = arg;
    struct cube_err err = {CUBE_OK, ""};

    (void)number;
    d->is_starting = false;
    if (d->proc->is_up || d->held || d->proc->host->is_down)
        return;
    room_say(r, d->proc->name, "starts");
    (void)sim_proc_open(d->proc);
    d->since_us = r->now_us;
    if (!(d->node < 0 ? sim_manager_new(d, &err) : sim_worker_new(d, &err))) {
        room_say(r, d->proc->name, "cannot start: %s", err.text);
        if (err.code == CUBE_ECORRUPT)
            sim_break(d->sim, "stores pass their check", "%s: %s",
                      d->proc->name, err.text);
        room_proc_end(d->proc, false);
        sim_daemon_free(d);
        sim_daemon_later(d, ROOM_SEC);
    }
    d->first_epoch = d->manager ? d->manager->epoch : 0;
    room_running = NULL;
}

static void sim_daemon_later(struct sim_daemon *d, int64_t in_us)
{
    if (d->is_starting)
        return;
    d->is_starting = true;
    room_at(&d->sim->room, d->sim->room.now_us + in_us, sim_daemon_start, d,
            0);
}

/* kill -9, or, `is_silent`, the power of its host. */
static void sim_daemon_kill(struct sim_daemon *d, bool is_silent)
{
    if (!d->proc->is_up)
        return;
    room_say(&d->sim->room, d->proc->name, "killed");
    d->proc->is_stopped = false;
    room_proc_end(d->proc, is_silent);
    sim_daemon_free(d);
}

/* SIGTERM: it ends in order. */
static void sim_daemon_end(struct sim_daemon *d)
{
    struct cube_loop *l = d->proc->loop;

    if (!d->proc->is_up)
        return;
    room_say(&d->sim->room, d->proc->name, "ends");
    room_running = d->proc;
    cube_manager_free(d->manager);
    cube_worker_free(d->worker);
    cube_loop_free(l);
    d->proc->loop = NULL;
    d->manager = NULL;
    d->worker = NULL;
    room_running = NULL;
    if (d->proc->heap_blocks != 0)
        sim_break(d->sim, "nothing leaks", "%s ended with %ld blocks of "
                  "memory", d->proc->name, d->proc->heap_blocks);
    room_proc_end(d->proc, false);
}

/* see sim_checks.h */
static void sim_box_changed(void *arg, struct sim_box *b, bool is_gone);
static void sim_note_free(struct sim_box *b);

static void sim_engine_begin(struct sim *s, struct sim_node *n, uint64_t seed)
{
    struct cube_err err = {CUBE_OK, ""};

    (void)sim_proc_open(n->proc);
    n->engine = sim_engine_new(n->proc->loop, seed);
    n->engine->on_change = sim_box_changed;
    n->engine->arg = s;
    if (sim_engine_up(n->engine, SIM_SOCKET, &err) < 0)
        abort();
    room_running = NULL;
}

/* In half of the seeds all wall clocks are right, until one jumps; else each
 * is wrong, by an hour at most. */
static struct room_host *sim_host_add(struct sim *s, const char *name)
{
    struct room_host *h = room_host_add(&s->room, name);

    if (s->seed % 2)
        h->wall_ns = (room_below(&s->room, 7200) - 3600) * 1000000000;
    return h;
}

static void sim_cluster_open(struct sim *s)
{
    struct room_host *h = sim_host_add(s, "m");

    s->manager.sim = s;
    s->manager.node = -1;
    s->manager.proc = room_proc_add(&s->room, h, "m");
    for (int i = 0; i < SIM_NODES; i++) {
        struct sim_node *n = &s->nodes[i];
        char name[16];

        (void)snprintf(name, sizeof name, "w%d", i + 1);
        n->host = sim_host_add(s, name);
        n->worker.sim = s;
        n->worker.node = i;
        n->worker.proc = room_proc_add(&s->room, n->host, name);
        n->worker.proc->env = sim_node_env;
        (void)snprintf(name, sizeof name, "e%d", i + 1);
        n->proc = room_proc_add(&s->room, n->host, name);
        sim_engine_begin(s, n, room_random(&s->room));
        sim_daemon_start(&s->room, &n->worker, 0);
    }
    sim_daemon_start(&s->room, &s->manager, 0);
}

static void sim_cluster_close(struct sim *s)
{
    sim_daemon_kill(&s->manager, true);
    for (int i = 0; i < SIM_NODES; i++) {
        struct sim_node *n = &s->nodes[i];

        sim_daemon_kill(&n->worker, true);
        room_proc_end(n->proc, true);
        room_running = n->proc;
        for (struct cube_list *l = n->engine->boxes.next;
             l != &n->engine->boxes; l = l->next)
            sim_note_free(CUBE_OF(l, struct sim_box, link));
        sim_engine_free(n->engine);
        cube_loop_free(n->proc->loop);
        room_running = NULL;
    }
}

#endif
