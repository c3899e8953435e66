/* What must hold. Some is looked at all the time (sim_watch_over, four times a
 * simulated second), some when the faults have ended and the cluster has had a
 * minute (sim_final). Each test of an invariant is counted by its name. */
#ifndef SIM_CHECKS_H
#define SIM_CHECKS_H

#define SIM_TICK_US (ROOM_SEC / 4)
#define SIM_TWIN_US (5 * ROOM_SEC)
#define SIM_SILENT_US (8 * ROOM_SEC) /* 5 s, the tick, and a sign on its way */
#define SIM_GRACE_US (11 * ROOM_SEC) /* a container that is deaf to SIGTERM */
#define SIM_ODD_US (15 * ROOM_SEC)   /* an engine is trusted again after it */
#define SIM_SICK_US (75 * ROOM_SEC)  /* a start period, and three checks */
#define SIM_RESTARTS 3

static void sim_check(struct sim *s, int which)
{
    s->check_counts[which]++;
}

#define SIM_BREAK(s, which, ...) \
    sim_break(s, sim_check_names[which], __VA_ARGS__)

/* ---- What containers do ---- */

/* What is noted at a container. */
struct sim_note {
    struct sim_task *task;           /* that it runs; NULL: of no client */
    struct cube_http_server *server; /* answers its health checks */
    bool is_counted, has_failed;
};

/* The task of a container, by its label; NULL: of none that clients know. */
static struct sim_task *sim_box_task(struct sim *s, const struct sim_box *b)
{
    const struct sim_note *n = b->user;

    return n ? n->task : sim_task_find(s, sim_label(b, "cube.task"));
}

static void sim_port_answer(void *arg, struct cube_http_req *req)
{
    struct sim_box *b = arg;

    cube_http_reply(req, b->is_unhealthy ? 503 : 200, "text/plain", "", 0);
}

static const struct cube_http_route sim_port_routes[] = {
    {"GET", "/health", sim_port_answer},
    {NULL, NULL, NULL},
};

/* What a worker counts as a restart: a run that has failed by itself. Of one
 * attempt there may be the first, and one for each restart. An end while the
 * engine is away, or not well, may cost nothing: it may have been the engine's
 * doing. */
static void sim_box_failed(struct sim *s, struct sim_task *t,
                           const struct sim_box *b, int host)
{
    int attempt = atoi(sim_label(b, "cube.attempt"));
    int most = !strcmp(t->policy, "no") ? 1 : 1 + SIM_RESTARTS;

    /* where it was moved to for that, it is started once */
    most = t->spent > 0 && attempt > t->spent ? 1 : most;
    if (!strcmp(t->policy, "always") || !strcmp(t->policy, "unless-stopped") ||
        !b->e->server || s->odd[host] > 0 ||
        t->remove_us > 0 || /* what was removed may be submitted anew */
        s->room.now_us - s->odd_us[host] < SIM_ODD_US)
        return;
    sim_check(s, SIM_CHECK_BUDGET);
    if (attempt <= 0 || attempt >= (int)COUNT(t->failures))
        return;
    if (++t->failures[attempt] > most)
        SIM_BREAK(s, SIM_CHECK_BUDGET, "t%d, policy \"%s\", has failed %d "
                  "times in attempt %d", t->number, t->policy,
                  t->failures[attempt], attempt);
}

/* A container starts: its attempt, and how often it was started again, must be
 * on the worker's disk by then, or a crash would forget them. */
static void sim_box_written(struct sim *s, const struct sim_box *b,
                            const struct sim_task *t, int host)
{
    struct cube_worker *w = s->nodes[host - 1].worker.worker;
    struct cube_record *rec = w ? cube_ledger_find(w->ledger, t->id) : NULL;
    const struct cube_task *had = rec && rec->now ? rec->now->task : NULL;
    int attempt = atoi(sim_label(b, "cube.attempt"));
    int restart = atoi(sim_label(b, "cube.restart"));

    if (!w || (!had && t->remove_us > 0))
        return;
    sim_check(s, SIM_CHECK_WRITTEN);
    if (!had || had->attempt < attempt ||
        (had->attempt == attempt && had->restart_count < restart))
        SIM_BREAK(s, SIM_CHECK_WRITTEN, "%s starts t%d in attempt %d.%d, and "
                  "has %d.%d on disk", w->name, t->number, attempt, restart,
                  had ? (int)had->attempt : -1,
                  had ? (int)had->restart_count : -1);
}

/* How long has it waited since it ended? The second before its first restart
 * is doubled with each one. */
static void sim_box_waited(struct sim *s, const struct sim_box *b,
                           struct sim_task *t, int host)
{
    int attempt = atoi(sim_label(b, "cube.attempt"));
    int restart = atoi(sim_label(b, "cube.restart"));
    int64_t waited = s->room.now_us - t->ended_us;
    int64_t least;

    if (attempt < t->run_attempt ||
        (attempt == t->run_attempt && restart <= t->run_restart))
        return;
    if (attempt > t->run_attempt)
        t->first_restart = restart;
    least = cube_doubled(ROOM_SEC, restart - t->first_restart - 1,
                         300 * ROOM_SEC) - ROOM_SEC / 100;
    t->run_attempt = attempt;
    t->run_restart = restart;
    if (restart == t->first_restart || s->odd[host] > 0 ||
        t->ended_us - s->odd_us[host] < SIM_ODD_US || t->remove_us > 0)
        return;
    sim_check(s, SIM_CHECK_BACKOFF);
    if (waited < least)
        SIM_BREAK(s, SIM_CHECK_BACKOFF, "t%d was started again in attempt "
                  "%d.%d after %.1f s, and not %.1f", t->number, attempt,
                  restart, (double)waited / 1e6, (double)least / 1e6);
}

/* A container runs for the first time. */
static void sim_box_begins(struct sim *s, const struct sim_box *b,
                           struct sim_task *t, int host)
{
    t->starts++;
    sim_box_written(s, b, t, host);
    sim_box_waited(s, b, t, host);
}

/* A container has ended; one of an attempt that is over does not begin the wait
 * for a restart. */
static void sim_box_ended(struct sim *s, const struct sim_box *b,
                          struct sim_task *t)
{
    t->codes[b->code & 255] = true;
    t->was_oom |= b->is_oom;
    if (atoi(sim_label(b, "cube.attempt")) == t->run_attempt)
        t->ended_us = s->room.now_us;
}

static void sim_note_free(struct sim_box *b)
{
    struct sim_note *n = b->user;

    if (n)
        cube_http_close(n->server);
    free(n);
    b->user = NULL;
}

/* The engine tells of a start, an end, a removal. A task with a health check
 * gets somebody who answers it, as long as its container runs. */
static void sim_box_changed(void *arg, struct sim_box *b, bool is_gone)
{
    struct sim *s = arg;
    struct sim_task *t = sim_box_task(s, b);
    struct sim_note *n = b->user;
    bool is_running = b->state == SIM_RUNNING && !is_gone;
    char where[40];

    if (!t)
        return;
    room_say(&s->room, room_running ? room_running->name : "", "t%d, attempt "
             "%s.%s: %s %d", t->number, sim_label(b, "cube.attempt"),
             sim_label(b, "cube.restart"),
             is_gone      ? "removed"
             : is_running ? "runs" : "ended", b->code);
    if (!n)
        n = b->user = room_new(sizeof *n);
    n->task = t;
    if (is_running && !n->is_counted)
        sim_box_begins(s, b, t, room_running->host->number);
    n->is_counted |= is_running;
    if (b->state == SIM_EXITED && !is_gone)
        sim_box_ended(s, b, t);
    if (t->kind == SIM_FAILING && b->state == SIM_EXITED && b->code == 3 &&
        !n->has_failed) {
        n->has_failed = true;
        sim_box_failed(s, t, b, room_running->host->number);
    }
    (void)snprintf(where, sizeof where, "127.0.0.1:%d", t->port);
    if (is_running && !n->server && t->kind == SIM_HEALTHY)
        n->server = cube_http_listen(b->e->loop, where, sim_port_routes, b,
                                     NULL, NULL);
    if (!is_running && n->server) {
        cube_http_close(n->server);
        n->server = NULL;
    }
    if (is_gone)
        sim_note_free(b);
}

/* A worker asks a task for its health: only one that runs, as its record on
 * disk says, since a watch that goes on beyond that finds somebody else there,
 * or nobody, and calls the next start sick for it. */
static void sim_health_asked(void *arg, struct room_proc *p,
                             const struct cube_addr *addr)
{
    struct sim *s = arg;
    int number = addr->kind == CUBE_ADDR_IP4 ? addr->port - SIM_HEALTH_PORT
                                             : -1;
    struct sim_daemon *d = NULL;
    struct cube_record *rec;

    for (int i = 0; i < SIM_NODES; i++) {
        if (s->nodes[i].worker.proc == p)
            d = &s->nodes[i].worker;
    }
    if (!d || !d->worker || number < 0 || number >= s->history->count)
        return;
    rec = cube_ledger_find(d->worker->ledger, s->history->tasks[number]->id);
    sim_check(s, SIM_CHECK_ASKED);
    if (!rec || !rec->now || rec->now->task->state != CUBE_RUNNING)
        SIM_BREAK(s, SIM_CHECK_ASKED, "%s asks t%d for its health, which is "
                  "%s", p->name, number, rec && rec->now
                      ? cube_state_name(rec->now->task->state) : "nothing");
}

/* How many containers of a task run, and on which node one of them does. */
static int sim_running(struct sim *s, const char *id, int *node,
                       struct sim_box **box)
{
    int n = 0;

    for (int i = 0; i < SIM_NODES; i++) {
        struct sim_engine *e = s->nodes[i].engine;

        for (struct cube_list *l = e->boxes.next; l != &e->boxes;
             l = l->next) {
            struct sim_box *b = CUBE_OF(l, struct sim_box, link);

            if (b->state != SIM_RUNNING || strcmp(sim_label(b, "cube.task"),
                                                  id) != 0)
                continue;
            n++;
            *node = i;
            *box = b;
        }
    }
    return n;
}

/* ---- At every moment ---- */

/* A host is fine while no fault hits it and all of it is up. */
static void sim_note_fine(struct sim *s)
{
    for (int i = 0; i <= SIM_NODES; i++) {
        struct sim_daemon *d = sim_fault_daemon(s, i);

        if (s->trouble[i] > 0 || !d->proc->is_up ||
            (i > 0 && !s->nodes[i - 1].engine->server))
            s->fine_us[i] = s->room.now_us;
    }
}

/* The nodes that were named to the manager, and the one that has joined. */
static void sim_watch_nodes(struct sim *s)
{
    struct cube_worker *last = s->nodes[SIM_NODES - 1].worker.worker;

    s->has_joined |= last && last->has_joined;
    for (int i = 1; i <= SIM_NODES - !s->has_joined; i++) {
        char name[20];

        (void)snprintf(name, sizeof name, "w%d:5556", i);
        sim_check(s, SIM_CHECK_NODES);
        if (!cube_manager_member(s->manager.manager, name))
            SIM_BREAK(s, SIM_CHECK_NODES, "node %s is not known", name);
    }
}

/* A manager that is well gives up a node that nothing can have come from. */
static void sim_watch_lost(struct sim *s)
{
    int64_t now = s->room.now_us;

    sim_note_heard(s);
    for (int i = 1; i <= SIM_NODES; i++) {
        char name[20];
        struct cube_member *n;
        int64_t since = s->fine_us[0];

        if (since < s->heard_us[i])
            since = s->heard_us[i];
        if (!s->manager.manager || now - since < SIM_SILENT_US)
            continue;
        (void)snprintf(name, sizeof name, "w%d:5556", i);
        n = cube_manager_member(s->manager.manager, name);
        sim_check(s, SIM_CHECK_LOST);
        if (n && n->state == CUBE_NODE_UP)
            SIM_BREAK(s, SIM_CHECK_LOST, "w%d is up, %.1f s after its last",
                      i, (double)(now - since) / 1e6);
    }
}

/* Counts what runs of each task, and since when the manager can reach all the
 * nodes that run it. */
static void sim_count_running(struct sim *s)
{
    for (int i = 0; i < s->history->count; i++) {
        s->history->tasks[i]->running = 0;
        s->history->tasks[i]->is_deaf = false;
        s->history->tasks[i]->reached_us = s->fine_us[0];
    }
    for (int i = 0; i < SIM_NODES; i++) {
        struct cube_list *all = &s->nodes[i].engine->boxes;

        for (struct cube_list *l = all->next; l != all; l = l->next) {
            struct sim_box *b = CUBE_OF(l, struct sim_box, link);
            struct sim_note *n = b->user;

            if (b->state != SIM_RUNNING || !n || !n->task)
                continue;
            n->task->running++;
            n->task->is_deaf |= b->life.term_code < 0;
            if (n->task->reached_us < s->fine_us[i + 1])
                n->task->reached_us = s->fine_us[i + 1];
        }
    }
}

static void sim_watch_twins(struct sim *s, struct sim_task *t)
{
    int64_t since = t->reached_us;

    if (t->running < 2) {
        t->twin_us = 0;
        return;
    }
    if (t->twin_us == 0)
        t->twin_us = s->room.now_us;
    if (since < t->twin_us)
        since = t->twin_us;
    sim_check(s, SIM_CHECK_TWINS);
    if (s->room.now_us - since >
        SIM_TWIN_US + (t->is_deaf ? SIM_GRACE_US : 0))
        SIM_BREAK(s, SIM_CHECK_TWINS, "t%d runs twice for %.1f s, in reach "
                  "of the manager for %.1f s", t->number,
                  (double)(s->room.now_us - t->twin_us) / 1e6,
                  (double)(s->room.now_us - since) / 1e6);
}

/* What the manager has in its ledger of what was acknowledged. */
static void sim_watch_record(struct sim *s, struct sim_task *t)
{
    const struct cube_version *v = t->rec ? t->rec->now : NULL;
    bool is_there = v && !v->is_gone && !v->keep.is_hidden;

    if (t->remove_acked_us > 0 && t->remove_us > 0 && !t->may_be_back) {
        sim_check(s, SIM_CHECK_REMOVED);
        if (is_there)
            SIM_BREAK(s, SIM_CHECK_REMOVED, "the removal of t%d was "
                      "acknowledged at %.3f", t->number,
                      (double)t->remove_acked_us / 1e6);
    }
    if (t->remove_us > 0)
        return;
    if (t->told_attempt > 0) {
        sim_check(s, SIM_CHECK_TOLD);
        if (!v || v->task->attempt < t->told_attempt)
            SIM_BREAK(s, SIM_CHECK_TOLD, "t%d is in attempt %d, and clients "
                      "were told of attempt %d", t->number,
                      v ? (int)v->task->attempt : -1, (int)t->told_attempt);
    }
    if (t->acked_us > 0) {
        sim_check(s, SIM_CHECK_KEPT);
        if (!is_there) {
            SIM_BREAK(s, SIM_CHECK_KEPT, "t%d %s was acknowledged at %.3f",
                      t->number, t->id, (double)t->acked_us / 1e6);
            return;
        }
    }
    if (t->stop_acked_us > 0) {
        sim_check(s, SIM_CHECK_STOP_KEPT);
        if (!v || (v->task->wanted != CUBE_WANT_STOP &&
                   !cube_task_is_finished(v->task)))
            SIM_BREAK(s, SIM_CHECK_STOP_KEPT, "the stop of t%d was "
                      "acknowledged at %.3f", t->number,
                      (double)t->stop_acked_us / 1e6);
    }
    if (v && t->has_ended && v->task->state != CUBE_COMPLETED)
        SIM_BREAK(s, SIM_CHECK_STATES, "t%d was Completed and is %s",
                  t->number, cube_state_name(v->task->state));
    t->has_ended |= v && v->task->state == CUBE_COMPLETED;
}

/* As much as is managed in ten minutes, and not what grows beside it. */
static void sim_watch_memory(struct sim *s)
{
    for (int i = 0; i <= SIM_NODES; i++) {
        struct room_proc *p = sim_fault_daemon(s, i)->proc;
        long most = i == 0 ? 4L << 20 : 3L << 19;

        sim_check(s, SIM_CHECK_MEMORY);
        s->most_bytes[i > 0] = p->heap_bytes > s->most_bytes[i > 0]
                                   ? p->heap_bytes : s->most_bytes[i > 0];
        if (p->heap_bytes > most)
            SIM_BREAK(s, SIM_CHECK_MEMORY, "%s has %ld bytes", p->name,
                      p->heap_bytes);
    }
}

/* Once a second: how much has been done in it. */
static void sim_watch_pace(struct sim *s)
{
    for (int i = 0; i < s->room.proc_count; i++) {
        struct room_proc *p = s->room.procs[i];
        uint64_t connects = p->connects - p->seen_connects;
        uint64_t turns = p->turns - p->seen_turns;

        p->seen_connects = p->connects;
        p->seen_turns = p->turns;
        s->most_connects = connects > s->most_connects ? connects
                                                       : s->most_connects;
        s->most_turns = turns > s->most_turns ? turns : s->most_turns;
        sim_check(s, SIM_CHECK_STORM);
        if (connects > 45 || turns > 1000)
            SIM_BREAK(s, SIM_CHECK_STORM, "%s made %llu connections and "
                      "%llu turns in a second", p->name,
                      (unsigned long long)connects,
                      (unsigned long long)turns);
    }
    for (int i = 0; i < SIM_NODES; i++) {
        int now = s->nodes[i].engine->counts.requests;
        int n = now - s->nodes[i].seen_requests;

        s->nodes[i].seen_requests = now;
        s->most_requests = n > s->most_requests ? n : s->most_requests;
        if (n > 150)
            SIM_BREAK(s, SIM_CHECK_STORM, "engine of w%d got %d requests in a "
                      "second", i + 1, n);
    }
}

/* The manager's records of the tasks, found in one walk. */
static void sim_watch_ledger(struct sim *s)
{
    struct cube_ledger *g = s->manager.manager->ledger;
    struct cube_record *rec;

    for (int i = 0; i < s->history->count; i++)
        s->history->tasks[i]->rec = NULL;
    for (size_t at = 0; (rec = cube_ledger_next(g, &at));) {
        struct sim_task *t = sim_task_find(s, rec->id);

        if (t)
            t->rec = rec;
    }
}

/* A worker's record of an order says that its manager had sent it: then it must
 * be on the manager's disk. */
static void sim_watch_order(struct sim *s, const struct cube_worker *w,
                            struct cube_record *rec, const struct sim_task *t)
{
    int64_t attempt;

    if (t->remove_us > 0 && (!t->rec || t->rec->now->is_gone))
        return;
    sim_check(s, SIM_CHECK_FIRST);
    if (!t->rec) {
        SIM_BREAK(s, SIM_CHECK_FIRST, "%s has t%d, the manager does not",
                  w->name, t->number);
        return;
    }
    attempt = cube_record_latest(rec)->task->attempt;
    if (t->rec->now->task->attempt < attempt)
        SIM_BREAK(s, SIM_CHECK_FIRST, "%s has attempt %d of %s, the "
                  "manager %d", w->name, (int)attempt, rec->id,
                  (int)t->rec->now->task->attempt);
}

/* What a worker has once, no order of older days may bring back. What was
 * removed may be submitted anew, and begins with its first attempt. */
static void sim_watch_attempt(struct sim *s, int node,
                              const struct cube_record *rec,
                              struct sim_task *t)
{
    if (t->remove_us > 0)
        return;
    sim_check(s, SIM_CHECK_BACK);
    if (rec->now->task->attempt < t->had[node])
        SIM_BREAK(s, SIM_CHECK_BACK, "t%d was in attempt %d on w%d and is in "
                  "attempt %d", t->number, (int)t->had[node], node + 1,
                  (int)rec->now->task->attempt);
    t->had[node] = rec->now->task->attempt;
}

static void sim_watch_worker(struct sim *s, int node, bool is_second)
{
    struct cube_worker *w = s->nodes[node].worker.worker;
    struct cube_record *rec;

    for (size_t at = 0; w && (rec = cube_ledger_next(w->ledger, &at));) {
        struct sim_task *t = sim_task_find(s, rec->id);

        if (!t)
            continue;
        if (s->manager.manager)
            sim_watch_order(s, w, rec, t);
        if (is_second)
            sim_watch_attempt(s, node, rec, t);
    }
}

/* Fifteen seconds ago, by a clock that stops while the manager sleeps: what it
 * had begun before it fell asleep, it goes on with. */
static int64_t sim_long_ago(const struct sim *s)
{
    int64_t awake_us = s->room.now_us - s->woke_us;
    int64_t long_us = 15 * ROOM_SEC;

    return awake_us >= long_us ? s->room.now_us - long_us
                               : s->slept_us - (long_us - awake_us);
}

/* Its last sleep. Two that follow soon count as more than sleep. */
static void sim_watch_sleep(struct sim *s)
{
    bool is_asleep = s->manager.proc->is_stopped;

    if (is_asleep && !s->is_asleep) {
        if (s->room.now_us - s->woke_us < 15 * ROOM_SEC)
            s->awake_us = s->room.now_us;
        s->slept_us = s->room.now_us;
    }
    if (is_asleep)
        s->woke_us = s->room.now_us;
    s->is_asleep = is_asleep;
}

/* A task leaves its node when that is lost, or when it has failed there; not
 * because its manager has slept, which is no fault of the node's. It leaves it
 * when it is to wait for another one, however long that takes, or else with
 * its next attempt. */
static void sim_watch_moves(struct sim *s, struct sim_task *t)
{
    const struct cube_version *v = t->rec ? t->rec->now : NULL;
    int64_t long_ago = sim_long_ago(s);
    bool waits;

    if (!v)
        return;
    waits = v->task->state == CUBE_PENDING;
    if (v->keep.moves > 1)
        SIM_BREAK(s, SIM_CHECK_BUDGET, "t%d was moved %d times off nodes that "
                  "gave it up", t->number, (int)v->keep.moves);
    if (v->keep.moves > t->moves)
        t->spent = (int)t->attempt;
    sim_check(s, SIM_CHECK_CAUSE);
    if (t->attempt > 0 && (v->task->attempt > t->attempt || waits) &&
        t->node >= 0 && v->keep.moves == t->moves && t->remove_us == 0 &&
        s->awake_us < long_ago && s->fine_us[t->node + 1] < long_ago)
        SIM_BREAK(s, SIM_CHECK_CAUSE, "t%d left w%d, which was fine for "
                  "%.1f s", t->number, t->node + 1,
                  (double)(s->room.now_us - s->fine_us[t->node + 1]) / 1e6);
    t->attempt = v->task->attempt;
    t->moves = v->keep.moves;
    t->node = *v->task->node && !waits ? v->task->node[1] - '1' : -1;
}

/* The manager says "node w1:5556 is lost: ...": was there a reason? */
static void sim_node_lost(struct sim *s, const char *text)
{
    const char *name = strstr(text, "node w");
    int64_t long_ago = sim_long_ago(s);
    int node = name ? name[6] - '1' : 0;

    sim_check(s, SIM_CHECK_CAUSE);
    if (s->awake_us < long_ago && s->fine_us[node + 1] < long_ago)
        SIM_BREAK(s, SIM_CHECK_CAUSE, "w%d counts as lost, and was fine for "
                  "%.1f s", node + 1,
                  (double)(s->room.now_us - s->fine_us[node + 1]) / 1e6);
}

/* What the manager keeps of promises from pass to pass, against its records:
 * each task that has a node and has not ended counts there, once. One that
 * waits may count as well, where it was found to run still. */
static void sim_watch_promised(struct sim *s)
{
    const struct cube_manager *m = s->manager.manager;

    for (size_t i = 0; m->promises && i < m->promises->count; i++) {
        const struct cube_node *node = &m->promises->nodes[i];
        int64_t least = 0, found = 0;
        void *value;

        for (size_t at = 0;
             cube_map_next(&m->ledger->records, &at, NULL, &value);) {
            const struct cube_task *t = cube_record_latest(value)->task;

            if (strcmp(t->node, node->name) != 0)
                continue;
            least += t->state == CUBE_SCHEDULED || t->state == CUBE_RUNNING ||
                     (t->state == CUBE_FAILED && !cube_task_is_finished(t));
            found += t->state == CUBE_PENDING;
        }
        sim_check(s, SIM_CHECK_PROMISED);
        if (node->promised.tasks < least ||
            node->promised.tasks > least + found)
            SIM_BREAK(s, SIM_CHECK_PROMISED, "node %s has promised room to "
                      "%lld tasks; it has %lld, and %lld that wait",
                      node->name, (long long)node->promised.tasks,
                      (long long)least, (long long)found);
    }
}

/* Of the manager: its epochs, and when it was hit by more than sleep. */
static void sim_watch_manager(struct sim *s)
{
    struct sim_daemon *d = &s->manager;

    sim_watch_sleep(s);
    if (s->trouble[0] > d->proc->is_stopped || !d->proc->is_up)
        s->awake_us = s->room.now_us;
    if (!d->manager)
        return;
    if (s->epoch > 0 && d->since_us != s->epoch_us) {
        sim_check(s, SIM_CHECK_EPOCH);
        if (d->first_epoch <= s->epoch)
            SIM_BREAK(s, SIM_CHECK_EPOCH, "a manager started in epoch %d, "
                      "after one of epoch %d", (int)d->first_epoch,
                      (int)s->epoch);
    }
    s->epoch = d->manager->epoch;
    s->epoch_us = d->since_us;
}

static void sim_watch_over(struct room *r, void *arg, int64_t number)
{
    struct sim *s = arg;

    sim_note_fine(s);
    sim_count_running(s);
    sim_watch_lost(s);
    if (s->manager.manager) {
        sim_watch_ledger(s);
        sim_watch_promised(s);
        sim_watch_nodes(s);
    }
    for (int i = 0; i < s->history->count; i++) {
        struct sim_task *t = s->history->tasks[i];

        sim_watch_twins(s, t);
        if (s->manager.manager) {
            sim_watch_record(s, t);
            sim_watch_moves(s, t);
        }
    }
    for (int i = 0; i < SIM_NODES; i++)
        sim_watch_worker(s, i, number % 4 == 0);
    sim_watch_manager(s);
    if (number % 4 == 0) {
        sim_watch_pace(s);
        sim_watch_memory(s);
    }
    room_at(r, r->now_us + SIM_TICK_US, sim_watch_over, s, number + 1);
}

/* ---- When the faults have ended ---- */

/* What does not hold at the end may be just on its way: a task that fails and
 * is restarted all the time has moments in which it does neither. So each
 * look is repeated for some seconds, and only what holds in none of them is
 * broken. */
struct sim_look {
    int which;                /* the first that does not hold; -1: all do */
    char words[600];
};

__attribute__((format(printf, 3, 4)))
static void sim_doubt(struct sim_look *l, int which, const char *format, ...)
{
    va_list args;

    if (l->which >= 0)
        return;
    l->which = which;
    va_start(args, format);
    (void)vsnprintf(l->words, sizeof l->words, format, args);
    va_end(args);
}

/* Does a container keep its room? It does until its task has ended: one that
 * has exited may be about to be started again. */
static bool sim_box_holds(struct sim *s, const struct sim_box *b)
{
    struct cube_record *rec = cube_ledger_find(s->manager.manager->ledger,
                                               sim_label(b, "cube.task"));

    return b->state == SIM_RUNNING || !rec || !rec->now ||
           !cube_task_is_finished(rec->now->task);
}

/* Is there a node that could take this waiting task? */
static int sim_free_node(struct sim *s, const struct sim_task *t)
{
    for (int i = 0; i < SIM_NODES; i++) {
        struct sim_engine *e = s->nodes[i].engine;
        int big = 0;
        bool has_port = false;

        for (struct cube_list *l = e->boxes.next; l != &e->boxes;
             l = l->next) {
            struct sim_box *b = CUBE_OF(l, struct sim_box, link);
            struct sim_task *o = sim_box_task(s, b);

            if (!o || !sim_box_holds(s, b))
                continue;
            big += o->kind == SIM_BIG;
            has_port |= t->port > 0 && o->port == t->port;
        }
        if (t->kind == SIM_BIG ? big < 2 : t->port == 0 || !has_port)
            return i;
    }
    return -1;
}

/* A task that should run and says that it does. */
static void sim_look_running(struct sim *s, struct sim_look *l,
                             const struct cube_task *t, struct sim_task *h)
{
    int node = 0, n;
    struct sim_box *b = NULL;
    struct cube_record *rec;
    struct cube_worker *w;

    n = sim_running(s, t->id, &node, &b);
    sim_check(s, SIM_CHECK_ONCE);
    if (n != 1) {
        sim_doubt(l, SIM_CHECK_ONCE, "t%d should run on %s: %d containers of "
                  "it run", h ? h->number : -1, t->node, n);
        return;
    }
    if (t->node[1] - '1' != node ||
        atoi(sim_label(b, "cube.attempt")) != (int)t->attempt)
        sim_doubt(l, SIM_CHECK_ONCE, "t%d runs on w%d, attempt %s, and not on "
                  "%s, attempt %d", h ? h->number : -1, node + 1,
                  sim_label(b, "cube.attempt"), t->node, (int)t->attempt);
    if (h && h->port > 0) {
        sim_check(s, SIM_CHECK_PORTS);
        if (b->port_count != 1 || b->ports[0].host != h->port)
            sim_doubt(l, SIM_CHECK_PORTS, "t%d has port %d and not %d",
                      h->number, b->port_count ? b->ports[0].host : 0,
                      h->port);
    }
    if (h && h->kind == SIM_HEALTHY &&
        s->room.now_us - s->fine_us[node + 1] > SIM_SICK_US) {
        sim_check(s, SIM_CHECK_SICK);
        if (b->is_unhealthy)
            sim_doubt(l, SIM_CHECK_SICK, "t%d is sick, and nothing has "
                      "happened to w%d", h->number, node + 1);
    }
    w = s->nodes[node].worker.worker;
    rec = w ? cube_ledger_find(w->ledger, t->id) : NULL;
    sim_check(s, SIM_CHECK_AGREE);
    if (!rec || !rec->now || rec->now->task->state != CUBE_RUNNING ||
        rec->now->task->attempt != t->attempt ||
        strcmp(t->container_id, b->id) != 0)
        sim_doubt(l, SIM_CHECK_AGREE, "t%d runs; w%d says %s, the manager "
                  "names container %.12s and not %.12s", h ? h->number : -1,
                  node + 1, rec && rec->now
                                ? cube_state_name(rec->now->task->state)
                                : "nothing", t->container_id, b->id);
}

/* Is this why it failed? What it says of its end must have happened; where no
 * fault can have been the reason, it is what the task is made to fail of. */
static bool sim_reason_is_true(const struct sim *s, const char *error,
                               const struct sim_task *h)
{
    const char *code = strstr(error, "exited with code ");
    const char *part = h->kind == SIM_NO_IMAGE     ? "nosuch"
                       : h->kind == SIM_NO_COMMAND ? "nosuchcommand"
                       : h->kind == SIM_FAILING    ? "exited with code 3"
                       : h->kind == SIM_JOB        ? "exited with code 0"
                                                   : "(no reason)";

    if (code && !h->codes[atoi(code + strlen("exited with code ")) & 255])
        return false;
    if (strstr(error, "out of memory") && !h->was_oom)
        return false;
    return *error && (s->was_odd || strstr(error, part));
}

/* Failed: why? */
static void sim_look_reason(struct sim *s, struct sim_look *l,
                            const struct cube_task *t,
                            const struct sim_task *h)
{
    sim_check(s, SIM_CHECK_REASONS);
    if (!sim_reason_is_true(s, t->error, h))
        sim_doubt(l, SIM_CHECK_REASONS, "t%d is Failed, and its Error is "
                  "\"%s\"", h->number, t->error);
}

/* Failed, and to be started again: is that still to come? */
static void sim_look_backoff(struct sim *s, struct sim_look *l,
                             const struct cube_task *t,
                             const struct sim_task *h)
{
    int node = t->node[0] ? t->node[1] - '1' : -1;
    int64_t due_ns = cube_time_to_ns(&t->restart_time);
    int64_t left_ns;

    if (node < 0 || s->odd[node + 1] > 0) /* its clock has jumped since */
        return;
    left_ns = due_ns - (ROOM_SINCE_NS + s->room.now_us * 1000 +
                        s->nodes[node].host->wall_ns);
    sim_check(s, SIM_CHECK_ONCE);
    if (left_ns < -30 * INT64_C(1000000000))
        sim_doubt(l, SIM_CHECK_ONCE, "t%d waits for a restart that was due "
                  "%.1f s ago: %s", h->number, -(double)left_ns / 1e9,
                  t->error);
}

/* Over, though nobody had it stopped: is it one that ends? It is Completed when
 * it has ended with 0, and Failed when its policy gives it up, which takes as
 * many runs as there are restarts, where no fault has made a start fail. */
static void sim_look_ended(struct sim *s, struct sim_look *l,
                           const struct cube_task *t, const struct sim_task *h)
{
    bool is_endless = !strcmp(h->policy, "always") ||
                      !strcmp(h->policy, "unless-stopped");
    bool may_fail = h->kind == SIM_FAILING || h->kind == SIM_NO_COMMAND ||
                    h->kind == SIM_NO_IMAGE;
    int least = h->kind == SIM_FAILING && strcmp(h->policy, "no") != 0
                    ? 1 + SIM_RESTARTS : 0;

    sim_check(s, SIM_CHECK_ENDED);
    if (is_endless || (t->state == CUBE_COMPLETED && !h->codes[0]) ||
        (!s->was_odd && t->state == CUBE_FAILED &&
         (!may_fail || h->starts < least)))
        sim_doubt(l, SIM_CHECK_ENDED, "t%d, policy \"%s\", is %s after %d "
                  "starts: \"%s\"", h->number, h->policy,
                  cube_state_name(t->state), h->starts, t->error);
}

static void sim_look_task(struct sim *s, struct sim_look *l,
                          const struct cube_task *t, struct sim_task *h)
{
    int node = 0;
    struct sim_box *b;

    if (t->wanted == CUBE_WANT_STOP || cube_task_is_finished(t)) {
        sim_check(s, SIM_CHECK_STOPPED);
        if (!cube_task_is_finished(t))
            sim_doubt(l, SIM_CHECK_STOPPED, "t%d is to stop and is %s",
                      h->number, cube_state_name(t->state));
        sim_check(s, SIM_CHECK_GHOSTS);
        if (sim_running(s, t->id, &node, &b) > 0)
            sim_doubt(l, SIM_CHECK_GHOSTS, "t%d is %s (%s) and runs on w%d",
                      h->number, cube_state_name(t->state), t->error,
                      node + 1);
        if (t->state == CUBE_FAILED)
            sim_look_reason(s, l, t, h);
        if (t->wanted != CUBE_WANT_STOP && h->remove_us == 0)
            sim_look_ended(s, l, t, h);
    } else if (t->state == CUBE_RUNNING) {
        sim_look_running(s, l, t, h);
    } else if (t->state == CUBE_PENDING) {
        sim_check(s, SIM_CHECK_ROOM);
        node = sim_free_node(s, h);
        if (!*t->error || node >= 0)
            sim_doubt(l, SIM_CHECK_ONCE, "t%d waits though w%d has room for "
                      "it: \"%s\"", h->number, node + 1, t->error);
    } else if (t->state == CUBE_FAILED) {
        sim_look_reason(s, l, t, h);
        sim_look_backoff(s, l, t, h);
    } else {
        sim_doubt(l, SIM_CHECK_ONCE, "t%d is %s on %s: \"%s\"", h->number,
                  cube_state_name(t->state), t->node, t->error);
    }
}

/* Containers that run, whose they are, and whether they fit. */
static void sim_look_nodes(struct sim *s, struct sim_look *l)
{
    for (int i = 0; i < SIM_NODES; i++) {
        struct sim_engine *e = s->nodes[i].engine;
        int big = 0;

        for (struct cube_list *at = e->boxes.next; at != &e->boxes;
             at = at->next) {
            struct sim_box *b = CUBE_OF(at, struct sim_box, link);
            struct cube_record *rec = cube_ledger_find(
                s->manager.manager->ledger, sim_label(b, "cube.task"));
            struct sim_task *t = sim_box_task(s, b);

            if (b->state != SIM_RUNNING)
                continue;
            big += t && t->kind == SIM_BIG;
            sim_check(s, SIM_CHECK_GHOSTS);
            if (!rec || !rec->now || rec->now->is_gone ||
                rec->now->keep.is_hidden ||
                cube_task_is_finished(rec->now->task))
                sim_doubt(l, SIM_CHECK_GHOSTS, "a container of t%d, which is "
                          "over, runs on w%d", t ? t->number : -1, i + 1);
        }
        sim_check(s, SIM_CHECK_ROOM);
        if (big > 2)
            sim_doubt(l, SIM_CHECK_ROOM, "w%d runs %d tasks of 6 GiB", i + 1,
                      big);
    }
}

/* What a worker would still run is what the manager has given it. */
static void sim_look_workers(struct sim *s, struct sim_look *l)
{
    for (int i = 0; i < SIM_NODES; i++) {
        struct cube_worker *w = s->nodes[i].worker.worker;
        struct cube_record *rec;

        for (size_t at = 0; w && (rec = cube_ledger_next(w->ledger, &at));) {
            const struct cube_task *has = rec->now ? rec->now->task : NULL;
            struct cube_record *own = cube_ledger_find(
                s->manager.manager->ledger, rec->id);

            if (!has || rec->now->is_gone || cube_task_is_finished(has) ||
                has->wanted == CUBE_WANT_STOP)
                continue;
            sim_check(s, SIM_CHECK_AGREE);
            if (!own || !own->now || own->now->is_gone ||
                own->now->task->attempt != has->attempt ||
                own->now->task->node[1] - '1' != i)
                sim_doubt(l, SIM_CHECK_AGREE, "w%d keeps %s in attempt %d, "
                          "which the manager has given to %s", i + 1,
                          rec->id, (int)has->attempt,
                          own && own->now ? own->now->task->node : "nobody");
        }
    }
}

/* What clients were told of each task is what is. */
static void sim_look_clients(struct sim *s, struct sim_look *l)
{
    struct cube_manager *m = s->manager.manager;

    for (int i = 0; i < SIM_CLIENTS; i++) {
        struct sim_client *c = s->clients[i];

        sim_check(s, SIM_CHECK_STREAMS);
        if (c->is_listing || c->seq != m->feed.last)
            sim_doubt(l, SIM_CHECK_STREAMS, "c%d was told %llu of %llu "
                      "events", i + 1, (unsigned long long)c->seq,
                      (unsigned long long)m->feed.last);
        for (int j = 0; j < s->history->count; j++) {
            struct sim_task *t = s->history->tasks[j];
            struct cube_record *rec = cube_ledger_find(m->ledger, t->id);
            bool is_there = rec && rec->now && !rec->now->is_gone &&
                            !rec->now->keep.is_hidden;

            if (is_there != c->seen[j].is_known ||
                (is_there && rec->now->task->state != c->seen[j].state))
                sim_doubt(l, SIM_CHECK_STREAMS, "c%d was told that t%d is %s",
                          i + 1, j, c->seen[j].is_known
                                        ? cube_state_name(c->seen[j].state)
                                        : "not there");
        }
    }
}

/* All that must hold at the end, looked at once. */
static void sim_look(struct sim *s, struct sim_look *l)
{
    struct cube_manager *m = s->manager.manager;

    l->which = -1;
    if (!m) {
        sim_doubt(l, SIM_CHECK_AGREE, "the manager is down");
        return;
    }
    for (int i = 0; i < SIM_NODES; i++)
        if (!s->nodes[i].worker.worker)
            sim_doubt(l, SIM_CHECK_AGREE, "w%d is down", i + 1);
    for (int i = 0; i < s->history->count; i++) {
        struct sim_task *t = s->history->tasks[i];
        struct cube_record *rec = cube_ledger_find(m->ledger, t->id);

        if (rec && rec->now && !rec->now->is_gone &&
            !rec->now->keep.is_hidden)
            sim_look_task(s, l, rec->now->task, t);
    }
    sim_look_nodes(s, l);
    sim_look_workers(s, l);
    sim_look_clients(s, l);
}

static void sim_check_store(struct sim *s, struct cube_store *store,
                            const char *name)
{
    struct cube_err err = {CUBE_OK, ""};

    sim_check(s, SIM_CHECK_STORES);
    if (cube_store_check(store, &err) < 0)
        SIM_BREAK(s, SIM_CHECK_STORES, "%s: %s", name, err.text);
}

static void sim_check_stores(struct sim *s)
{
    for (int i = 0; i <= SIM_NODES; i++) {
        struct sim_daemon *d = sim_fault_daemon(s, i);

        room_running = d->proc;
        sim_check_store(s, d->manager ? d->manager->store : d->worker->store,
                        d->proc->name);
        room_running = NULL;
    }
}

/* Looks again and again, until all holds or it is too late. */
static void sim_final(struct room *r, void *arg, int64_t tries)
{
    struct sim *s = arg;
    struct sim_look l;

    sim_look(s, &l);
    if (l.which < 0)
        sim_check_stores(s);
    else if (tries > 0)
        room_at(r, r->now_us + ROOM_SEC / 4, sim_final, s, tries - 1);
    else
        SIM_BREAK(s, l.which, "%s", l.words);
}

#endif
