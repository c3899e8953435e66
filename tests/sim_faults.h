/* The fault plan: what goes wrong, when, for how long, on which host. It
 * follows from the seed alone and is a list, so that a failing run can be
 * repeated with fewer of them. Each fault has a begin and an end; several may
 * overlap, on one host too. */
#ifndef SIM_FAULTS_H
#define SIM_FAULTS_H

#define SIM_FAULTS_MAX 40

enum sim_fault_kind {
    SIM_F_KILL, SIM_F_END, SIM_F_POWER, SIM_F_STOP,
    SIM_F_PART, SIM_F_PART_IN, SIM_F_PART_OUT, SIM_F_CUT, SIM_F_RESET,
    SIM_F_LATE, SIM_F_THIN, SIM_F_NAMES,
    SIM_F_FULL, SIM_F_DISK, SIM_F_SYNC, SIM_F_SLOW_SYNC,
    SIM_F_CLOCK,
    SIM_F_E_KILLED, SIM_F_E_KEPT, SIM_F_E_WIPED, SIM_F_E_HUNG, SIM_F_E_500,
    SIM_F_E_CUT, SIM_F_E_SLOW, SIM_F_E_PULL, SIM_F_E_EXIT, SIM_F_E_OOM,
    SIM_F_E_HAND, SIM_F_E_PORT, SIM_F_E_SICK,
    SIM_F_C_KILL, SIM_F_C_STOP, SIM_F_C_PART, SIM_F_C_THIN,
    SIM_FAULT_KINDS
};

/* Whom it can hit. */
enum { SIM_ON_M = 1, SIM_ON_W = 2, SIM_ON_C = 4 };

static const struct sim_fault_row {
    const char *name;
    int on;
    int least_s, most_s;      /* how long */
    int weight;
} sim_fault_rows[SIM_FAULT_KINDS] = {
    [SIM_F_KILL] = {"kill -9", SIM_ON_M | SIM_ON_W, 0, 20, 4},
    [SIM_F_END] = {"SIGTERM", SIM_ON_M | SIM_ON_W, 0, 20, 2},
    [SIM_F_POWER] = {"power cut", SIM_ON_M | SIM_ON_W, 1, 40, 4},
    [SIM_F_STOP] = {"SIGSTOP", SIM_ON_M | SIM_ON_W, 1, 30, 4},
    [SIM_F_PART] = {"partition", SIM_ON_M | SIM_ON_W, 1, 40, 4},
    [SIM_F_PART_IN] = {"partition, inward", SIM_ON_M | SIM_ON_W, 1, 40, 2},
    [SIM_F_PART_OUT] = {"partition, outward", SIM_ON_M | SIM_ON_W, 1, 40, 2},
    [SIM_F_CUT] = {"half-open connections", SIM_ON_M | SIM_ON_W, 10, 10, 2},
    [SIM_F_RESET] = {"connections reset", SIM_ON_M | SIM_ON_W, 1, 1, 3},
    [SIM_F_LATE] = {"latency", SIM_ON_M | SIM_ON_W, 1, 40, 2},
    [SIM_F_THIN] = {"bandwidth", SIM_ON_M | SIM_ON_W, 1, 40, 2},
    [SIM_F_NAMES] = {"names not found", SIM_ON_M | SIM_ON_W, 1, 40, 1},
    [SIM_F_FULL] = {"disk full", SIM_ON_M | SIM_ON_W, 1, 40, 2},
    [SIM_F_DISK] = {"disk fails", SIM_ON_M | SIM_ON_W, 1, 20, 2},
    [SIM_F_SYNC] = {"a sync fails", SIM_ON_M | SIM_ON_W, 5, 5, 2},
    [SIM_F_SLOW_SYNC] = {"slow disk", SIM_ON_M | SIM_ON_W, 1, 20, 2},
    [SIM_F_CLOCK] = {"wall clock jumps", SIM_ON_M | SIM_ON_W, 1, 1, 3},
    [SIM_F_E_KILLED] = {"engine killed", SIM_ON_W, 1, 20, 2},
    [SIM_F_E_KEPT] = {"engine restarted", SIM_ON_W, 1, 20, 2},
    [SIM_F_E_WIPED] = {"engine wiped", SIM_ON_W, 1, 20, 2},
    [SIM_F_E_HUNG] = {"engine hangs", SIM_ON_W, 1, 40, 2},
    [SIM_F_E_500] = {"engine says 500", SIM_ON_W, 1, 40, 2},
    [SIM_F_E_CUT] = {"engine hangs up", SIM_ON_W, 1, 40, 2},
    [SIM_F_E_SLOW] = {"engine slow", SIM_ON_W, 1, 40, 1},
    [SIM_F_E_PULL] = {"pulls fail", SIM_ON_W, 1, 60, 2},
    [SIM_F_E_EXIT] = {"containers end early", SIM_ON_W, 10, 60, 2},
    [SIM_F_E_OOM] = {"killed for memory", SIM_ON_W, 10, 60, 2},
    [SIM_F_E_HAND] = {"removed by hand", SIM_ON_W, 1, 1, 3},
    [SIM_F_E_PORT] = {"port taken by others", SIM_ON_W, 10, 60, 2},
    [SIM_F_E_SICK] = {"unhealthy", SIM_ON_W, 5, 60, 2},
    [SIM_F_C_KILL] = {"client killed", SIM_ON_C, 0, 20, 2},
    [SIM_F_C_STOP] = {"client asleep", SIM_ON_C, 1, 60, 2},
    [SIM_F_C_PART] = {"client cut off", SIM_ON_C, 1, 60, 2},
    [SIM_F_C_THIN] = {"client reads slowly", SIM_ON_C, 1, 60, 2},
};

struct sim_fault {
    enum sim_fault_kind kind;
    int64_t at_us, for_us;
    int host;                 /* 0: the manager's, 1..5: w1.., 6..: clients */
    int64_t size;
    bool is_on;               /* it has begun, and not ended */
    bool is_left_out;
};

struct sim_plan {
    struct sim_fault list[SIM_FAULTS_MAX];
    int count;
};

static int64_t sim_plan_below(struct sim *s, int64_t limit)
{
    return limit <= 0 ? 0 : (int64_t)(room_mix(&s->plan) % (uint64_t)limit);
}

/* ---- Making the plan ---- */

static enum sim_fault_kind sim_plan_kind(struct sim *s)
{
    int all = 0, at;

    for (int i = 0; i < SIM_FAULT_KINDS; i++)
        all += sim_fault_rows[i].weight;
    at = (int)sim_plan_below(s, all);
    for (int i = 0;; i++) {
        at -= sim_fault_rows[i].weight;
        if (at < 0)
            return (enum sim_fault_kind)i;
    }
}

static int sim_plan_host(struct sim *s, int on)
{
    if (on & SIM_ON_C)
        return 1 + SIM_NODES + (int)sim_plan_below(s, SIM_CLIENTS);
    if ((on & SIM_ON_M) && sim_plan_below(s, 3) == 0)
        return 0;
    return 1 + (int)sim_plan_below(s, SIM_NODES);
}

/* Some seeds are quiet, some are wild, and some have one kind only. */
static void sim_plan_make(struct sim *s, struct sim_plan *p)
{
    enum sim_fault_kind only;
    bool is_one_kind;
    int64_t begin = 10 * ROOM_SEC;
    uint64_t from = s->seed;

    s->plan = room_mix(&from); /* far from that of any other seed */
    p->count = 1 + (int)sim_plan_below(s, sim_plan_below(s, 3) ? 16 : 39);
    only = sim_plan_kind(s);
    is_one_kind = sim_plan_below(s, 4) == 0;
    for (int i = 0; i < p->count; i++) {
        struct sim_fault *f = &p->list[i];
        const struct sim_fault_row *row;

        memset(f, 0, sizeof *f);
        f->kind = is_one_kind ? only : sim_plan_kind(s);
        row = &sim_fault_rows[f->kind];
        f->host = sim_plan_host(s, row->on);
        f->for_us = row->least_s * ROOM_SEC +
                    sim_plan_below(s, (row->most_s - row->least_s) * ROOM_SEC);
        f->at_us = begin +
                   sim_plan_below(s, s->end_us - begin - f->for_us);
        f->size = sim_plan_below(s, 1000000);
    }
}

/* ---- Hosts ---- */

static struct room_host *sim_fault_host(struct sim *s, int host)
{
    return &s->room.hosts[host];
}

static struct sim_daemon *sim_fault_daemon(struct sim *s, int host)
{
    return host == 0 ? &s->manager : &s->nodes[host - 1].worker;
}

/* Of the faults of this kind that are on at this host, this one too, the
 * largest size, from 1 on; 0: none is on. Those that overlap end each for
 * itself: what a kind does is set by what is left of it. */
static int64_t sim_fault_left(const struct sim *s, const struct sim_fault *f)
{
    int64_t most = 0;

    for (int i = 0; i < s->faults->count; i++) {
        const struct sim_fault *o = &s->faults->list[i];

        if (o->is_on && o->kind == f->kind && o->host == f->host &&
            o->size >= most)
            most = o->size + 1;
    }
    return most;
}

/* Bars or frees all ways from and to a host; +1 or -1. */
static void sim_bar(struct sim *s, int host, bool in, bool out, int by)
{
    for (int i = 0; i < s->room.host_count; i++) {
        if (i == host)
            continue;
        if (in)
            s->room.links[i][host].barred += by;
        if (out)
            s->room.links[host][i].barred += by;
    }
}

static void sim_delay(struct sim *s, int host, int64_t extra_us)
{
    for (int i = 0; i < s->room.host_count; i++) {
        if (i == host)
            continue;
        s->room.links[i][host].extra_us += extra_us;
        s->room.links[host][i].extra_us += extra_us;
    }
}

/* 500 to 20,500 bytes a second. */
static void sim_thin(struct sim *s, const struct sim_fault *f)
{
    struct room_host *h = sim_fault_host(s, f->host);
    int64_t left = sim_fault_left(s, f);

    h->bytes_per_sec = left ? 500 + (1000000 - left) / 50 : 0;
    if (left == 0)
        room_hasten(&s->room, h);
}

/* Each connection of the host to others, with a chance of one half: reset, or
 * from now on silent, with nobody told. */
static void sim_hit_connections(struct sim *s, int host, bool is_cut)
{
    for (struct room_conn *c = s->room.conns; c; c = c->next) {
        if (c->is_local || (c->end[0].host->number != host &&
                            c->end[1].host->number != host) ||
            room_one_in(&s->room, 2))
            continue;
        if (is_cut) {
            c->is_cut = true;
            continue;
        }
        s->room.resets++;
        for (int i = 0; i < 2; i++)
            if (c->end[i].is_open && !c->end[i].is_dead)
                room_end_reset(&c->end[i], ECONNRESET);
    }
}

/* ---- Engines ---- */

/* Between these two the engine's memory is counted as its own, and its loop
 * looks at what has changed. */
static struct sim_engine *sim_visit(struct sim *s, int host)
{
    room_running = s->nodes[host - 1].proc;
    return s->nodes[host - 1].engine;
}

static void sim_leave(void)
{
    room_poke(room_running);
    room_running = NULL;
}

/* Whatever is started next is pulled again. */
static void sim_prune(struct sim_engine *e)
{
    for (int i = 0; i < SIM_IMAGES; i++)
        sim_engine_remove_image(e, sim_image_names[i]);
}

static void sim_engine_go(struct sim *s, int host, enum sim_down how)
{
    struct sim_engine *e = sim_visit(s, host);

    if (e->server)
        sim_engine_down(e, how);
    if (how == SIM_WIPED)
        sim_prune(e);
    sim_leave();
}

static void sim_engine_come(struct room *r, void *arg, int64_t host)
{
    struct sim *s = arg;
    struct sim_engine *e = sim_visit(s, (int)host);
    struct cube_err err = {CUBE_OK, ""};

    (void)r;
    if (!e->server && !s->nodes[host - 1].host->is_down &&
        s->nodes[host - 1].held == 0 && sim_engine_up(e, SIM_SOCKET, &err) < 0)
        abort();
    sim_leave();
}

/* Somebody removes a container. */
static void sim_engine_touch(struct sim *s, int host, int64_t size)
{
    struct sim_engine *e = sim_visit(s, host);
    struct cube_list *l = e->boxes.next;

    for (int i = 0; l != &e->boxes && i < size % 5; i++)
        l = l->next;
    if (l != &e->boxes)
        (void)sim_engine_remove_by_hand(CUBE_OF(l, struct sim_box, link));
    sim_leave();
}

/* All that are there fall ill: those that are asked for their health tell. */
static void sim_engine_sicken(struct sim_engine *e)
{
    for (struct cube_list *l = e->boxes.next; l != &e->boxes; l = l->next)
        CUBE_OF(l, struct sim_box, link)->is_unhealthy = true;
}

/* ---- Begin and end ---- */

static void sim_power_off(struct sim *s, int host)
{
    struct sim_daemon *d = sim_fault_daemon(s, host);
    struct room_host *h = sim_fault_host(s, host);

    if (h->is_down)
        return;
    h->is_down = true;
    sim_daemon_kill(d, true);
    if (host > 0)
        sim_engine_go(s, host, SIM_POWER);
    room_host_crash(&s->room, h);
}

static void sim_power_on(struct sim *s, int host)
{
    struct room_host *h = sim_fault_host(s, host);

    if (!h->is_down)
        return;
    room_host_boot(&s->room, h);
    if (host > 0)
        room_at(&s->room, s->room.now_us + room_below(&s->room, 5 * ROOM_SEC),
                sim_engine_come, s, host);
    sim_daemon_later(sim_fault_daemon(s, host),
                     room_below(&s->room, 5 * ROOM_SEC));
}

/* SIGSTOP and SIGCONT, of the process that is up. */
static void sim_sleep(struct sim *s, const struct sim_fault *f,
                      struct room_proc *p)
{
    if (f->is_on)
        p->is_stopped = p->is_up;
    else if (sim_fault_left(s, f) == 0)
        p->is_stopped = false;
}

static void sim_client_fault(struct sim *s, struct sim_fault *f)
{
    struct sim_client *c = s->clients[f->host - 1 - SIM_NODES];

    if (f->kind == SIM_F_C_STOP)
        sim_sleep(s, f, c->proc);
    else if (f->is_on && c->proc->is_up)
        sim_client_end(c, false);
    else if (!f->is_on && sim_fault_left(s, f) == 0)
        sim_client_begin(c);
}

static void sim_daemon_fault(struct sim *s, struct sim_fault *f)
{
    struct sim_daemon *d = sim_fault_daemon(s, f->host);

    if (f->kind == SIM_F_STOP) {
        sim_sleep(s, f, d->proc);
    } else if (f->is_on) {
        d->held++;
        if (f->kind == SIM_F_END && !d->proc->is_stopped)
            sim_daemon_end(d);
        else
            sim_daemon_kill(d, false);
    } else {
        d->held--;
        sim_daemon_later(d, ROOM_SEC);
    }
}

static void sim_disk_fault(struct sim *s, struct sim_fault *f, int by)
{
    struct room_host *h = sim_fault_host(s, f->host);

    if (f->kind == SIM_F_FULL)
        h->full += by;
    else if (f->kind == SIM_F_DISK)
        h->failing += by;
    else if (f->kind == SIM_F_SYNC)
        h->sync_fails = by > 0                       ? 1 + (int)(f->size % 3)
                        : sim_fault_left(s, f) == 0 ? 0 : h->sync_fails;
    else
        h->sync_us += by * f->size * 3;
}

static void sim_net_fault(struct sim *s, struct sim_fault *f, int by)
{
    if (f->kind == SIM_F_PART || f->kind == SIM_F_C_PART)
        sim_bar(s, f->host, true, true, by);
    else if (f->kind == SIM_F_PART_IN)
        sim_bar(s, f->host, true, false, by);
    else if (f->kind == SIM_F_PART_OUT)
        sim_bar(s, f->host, false, true, by);
    else if (f->kind == SIM_F_LATE)
        sim_delay(s, f->host, by * f->size);
    else if (f->kind == SIM_F_THIN || f->kind == SIM_F_C_THIN)
        sim_thin(s, f);
    else if (f->kind == SIM_F_NAMES)
        sim_fault_host(s, f->host)->no_names += by;
    else if (by > 0)
        sim_hit_connections(s, f->host, f->kind == SIM_F_CUT);
}

static void sim_engine_fault(struct sim *s, struct sim_fault *f)
{
    struct sim_node *n = &s->nodes[f->host - 1];
    struct sim_engine *e = n->engine;
    int64_t left = sim_fault_left(s, f);
    int chance = left ? 100 + (int)(left / 2500) : 0;
    int port = (int)(f->size % SIM_SCARCE);

    if (f->kind == SIM_F_E_500)
        e->faults.error = chance;
    else if (f->kind == SIM_F_E_CUT)
        e->faults.cut = chance;
    else if (f->kind == SIM_F_E_SLOW)
        e->faults.slow = chance / 4;
    else if (f->kind == SIM_F_E_EXIT)
        e->faults.exit_early = chance;
    else if (f->kind == SIM_F_E_OOM)
        e->faults.oom = chance;
    else if (f->kind == SIM_F_E_PULL) {
        e->faults.pull_missing = e->faults.pull_error = e->faults.pull_cut =
            e->faults.pull_slow = chance / 2;
        if (f->is_on)
            sim_prune(e);
    } else if (f->kind == SIM_F_E_PORT) {
        n->taken[port] += f->is_on ? 1 : -1;
        (void)sim_visit(s, f->host);
        sim_engine_take_port(e, 8000 + port, n->taken[port] > 0);
        sim_leave();
    } else if (f->kind == SIM_F_E_HUNG) {
        (void)sim_visit(s, f->host);
        if (e->server && (f->is_on || left == 0))
            sim_engine_hang(e, f->is_on);
        sim_leave();
    } else if (f->is_on && f->kind == SIM_F_E_HAND) {
        sim_engine_touch(s, f->host, f->size);
    } else if (f->is_on && f->kind == SIM_F_E_SICK) {
        sim_engine_sicken(e);
    }
    if (f->is_on && (f->kind == SIM_F_E_EXIT || f->kind == SIM_F_E_OOM)) {
        (void)sim_visit(s, f->host);
        if (e->server)
            sim_engine_shorten(e);
        sim_leave();
    }
}

static void sim_fault_switch(struct sim *s, struct sim_fault *f)
{
    static const enum sim_down downs[] = {SIM_KILLED, SIM_KEPT, SIM_WIPED};
    int by = f->is_on ? 1 : -1;

    if (f->kind <= SIM_F_STOP && f->kind != SIM_F_POWER)
        sim_daemon_fault(s, f);
    else if (f->kind == SIM_F_POWER && f->is_on)
        sim_power_off(s, f->host);
    else if (f->kind == SIM_F_POWER && sim_fault_left(s, f) == 0)
        sim_power_on(s, f->host);
    else if (f->kind <= SIM_F_NAMES)
        sim_net_fault(s, f, by);
    else if (f->kind <= SIM_F_SLOW_SYNC)
        sim_disk_fault(s, f, by);
    else if (f->kind == SIM_F_CLOCK && f->is_on)
        sim_fault_host(s, f->host)->wall_ns +=
            (f->size - 500000) * 20000000;
    else if (f->kind >= SIM_F_E_KILLED && f->kind <= SIM_F_E_WIPED) {
        s->nodes[f->host - 1].held += by;
        if (f->is_on)
            sim_engine_go(s, f->host, downs[f->kind - SIM_F_E_KILLED]);
        else
            sim_engine_come(&s->room, s, f->host);
    } else if (f->kind > SIM_F_E_WIPED && f->kind <= SIM_F_E_SICK)
        sim_engine_fault(s, f);
    else if (f->kind == SIM_F_C_KILL || f->kind == SIM_F_C_STOP)
        sim_client_fault(s, f);
    else if (f->kind >= SIM_F_C_PART)
        sim_net_fault(s, f, by);
}

/* Can this node give a sign of life, for all that is known here? */
static bool sim_is_heard(struct sim *s, int host)
{
    const struct room_proc *p = s->nodes[host - 1].worker.proc;

    return p->is_up && !p->is_stopped && !s->room.links[host][0].barred;
}

/* Noted at each look, and before each fault: one that sleeps, is awake for a
 * moment, and sleeps again has been heard. */
static void sim_note_heard(struct sim *s)
{
    for (int i = 1; i <= SIM_NODES; i++)
        if (sim_is_heard(s, i))
            s->heard_us[i] = s->room.now_us;
}

static void sim_fault_event(struct room *r, void *arg, int64_t number)
{
    struct sim *s = arg;
    struct sim_fault *f = &s->faults->list[number / 2];

    sim_note_heard(s);
    f->is_on = number % 2 == 0;
    s->trouble[f->host] += f->is_on ? 1 : -1;
    /* A clock that jumped stays odd: a run that it hit may seem to have been
     * long, which earns a new budget of restarts. */
    if (f->kind == SIM_F_POWER ||
        (f->kind >= SIM_F_CLOCK && f->kind <= SIM_F_E_SICK)) {
        s->odd[f->host] += f->is_on ? 1 : f->kind == SIM_F_CLOCK ? 0 : -1;
        s->was_odd = true;
    }
    s->odd_us[f->host] = r->now_us;
    s->fault_counts[f->kind] += f->is_on;
    room_say(r, sim_fault_host(s, f->host)->name, "%s: fault %d, %s%s",
             f->is_on ? "BEGIN" : "END", (int)(number / 2),
             sim_fault_rows[f->kind].name,
             f->kind == SIM_F_CLOCK && !f->is_on ? " (once)" : "");
    sim_fault_switch(s, f);
    /* What was said into a way that is cut, or thin, comes through when that
     * ends, from its kernel, even if the worker sleeps or is gone by then. */
    if (!f->is_on && f->kind >= SIM_F_PART && f->kind <= SIM_F_THIN)
        s->heard_us[f->host] = r->now_us;
}

static void sim_faults_start(struct sim *s)
{
    for (int i = 0; i < s->faults->count; i++) {
        struct sim_fault *f = &s->faults->list[i];

        if (f->is_left_out)
            continue;
        room_at(&s->room, f->at_us, sim_fault_event, s, 2 * i);
        room_at(&s->room, f->at_us + f->for_us, sim_fault_event, s, 2 * i + 1);
    }
}

#endif
