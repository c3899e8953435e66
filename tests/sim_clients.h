/* Clients that submit, submit again, stop, remove, list and watch at random,
 * and remember what they were answered. What was acknowledged must be true from
 * then on; what was not answered may be true or not.
 *
 *      sent ----201----> acknowledged        the manager has it, always
 *       |
 *       +--- no answer, 503, 507: unknown; sent again until it is answered
 */
#ifndef SIM_CLIENTS_H
#define SIM_CLIENTS_H

#define SIM_TASKS 48          /* of one run, at most */
#define SIM_HEALTH_PORT 9000  /* and a task's number: where it is asked */
#define SIM_CALL_MS 8000
#define SIM_IMAGES 3

/* What there is to be pulled, so that pulls happen all the time. */
static const char *const sim_image_names[SIM_IMAGES] = {
    "busybox", "busybox:1.35", "busybox:1.36"
};

/* What kind of task it is. */
enum sim_kind {
    SIM_SERVICE,              /* runs for good */
    SIM_HEALTHY,              /* the same, with a health check and a port */
    SIM_JOB,                  /* ends with 0 */
    SIM_FAILING,              /* ends with 3, always */
    SIM_NO_COMMAND,           /* cannot be started */
    SIM_NO_IMAGE,
    SIM_BIG,                  /* two of them fit on a node */
    SIM_PORTED,               /* wants a host port that others want too */
    SIM_KINDS
};

/* A task in the histories of the clients. */
struct sim_task {
    char id[CUBE_UUID_TEXT];
    int number;
    enum sim_kind kind;
    int owner;                /* the client */
    const char *policy;
    int port;                 /* the host port it asked for, or 0 */
    char body[500];
    int64_t sent_us, acked_us;
    int64_t stop_us, stop_acked_us;
    int64_t remove_us, remove_acked_us;
    bool may_be_gone;         /* a removal was not answered */
    bool may_be_back;         /* nor was a submission, which may come yet */
    bool is_asking;           /* a call for it is under way */
    /* for checks.h */
    int starts;               /* of containers */
    int failures[64];         /* ends with 3, by attempt */
    int spent;                /* the attempt that it was moved off for having
                                 used up its restarts; 0: none */
    bool codes[256];          /* containers have ended with these */
    bool was_oom;             /* one of them of too much memory */
    int64_t ended_us;         /* the last of them */
    int run_attempt, run_restart; /* of the newest container, by its labels */
    int first_restart;        /* of the first one of that attempt */
    int64_t told_attempt;     /* the newest that a client was told of */
    int running;              /* containers, at the last look */
    bool is_deaf;             /* one of them does not heed SIGTERM */
    int64_t reached_us;       /* its nodes, by the manager, since then */
    int64_t twin_us;          /* two of it run since then; 0: no */
    bool has_ended;           /* the manager has said Completed */
    int64_t attempt, moves;   /* at the last look, of the manager's record */
    int node;                 /* and where it was; -1: nowhere */
    int64_t had[SIM_NODES];   /* the attempt on each worker */
    struct cube_record *rec;  /* the manager's, of this look; NULL: none */
};

/* All tasks, by number; and by the first byte of their IDs, since they are
 * looked for all the time: a place is taken by the next that is free. */
#define SIM_PLACES 256

struct sim_history {
    struct sim_task *tasks[SIM_TASKS];
    int count;
    struct sim_task *places[SIM_PLACES];
};

/* What a client has been told of a task by its stream. */
struct sim_seen {
    enum cube_state state;
    uint64_t seq;
    bool is_known;
};

struct sim_client {
    struct sim *sim;
    int number;
    struct room_proc *proc;
    struct cube_http_client *http;
    struct cube_timer act, rewatch;
    struct cube_http_call *watch;
    struct cube_buf line;
    char stream[CUBE_UUID_TEXT];
    uint64_t seq;             /* the last of the stream */
    bool is_listing, has_cursor;
    struct sim_seen seen[SIM_TASKS];
    long answers, silences, events, resets;
};

enum sim_request {
    SIM_SUBMIT, SIM_RESUBMIT, SIM_TWIST, SIM_STOP, SIM_RM, SIM_GET, SIM_LIST
};

/* One request of a client. */
struct sim_ask {
    struct sim_client *client;
    struct sim_task *task;    /* NULL: a list */
    enum sim_request what;
    int64_t sent_us;
};

static void sim_check(struct sim *s, int which);

enum {
    SIM_CHECK_KEPT, SIM_CHECK_STOP_KEPT, SIM_CHECK_LISTED, SIM_CHECK_STATES,
    SIM_CHECK_EVENTS, SIM_CHECK_RESET, SIM_CHECK_MEMORY, SIM_CHECK_TWINS,
    SIM_CHECK_BUDGET, SIM_CHECK_STORM, SIM_CHECK_LEAKS,
    SIM_CHECK_FIRST, SIM_CHECK_BACK, SIM_CHECK_EPOCH, SIM_CHECK_CAUSE,
    SIM_CHECK_LOST, SIM_CHECK_ASKED, SIM_CHECK_PROMISED, SIM_CHECK_NODES,
    SIM_CHECK_REMOVED, SIM_CHECK_TOLD, SIM_CHECK_WRITTEN, SIM_CHECK_BACKOFF,
    SIM_CHECK_ONCE, SIM_CHECK_PORTS, SIM_CHECK_ROOM, SIM_CHECK_STOPPED,
    SIM_CHECK_GHOSTS, SIM_CHECK_REASONS, SIM_CHECK_AGREE, SIM_CHECK_STORES,
    SIM_CHECK_STREAMS, SIM_CHECK_ENDED, SIM_CHECK_SICK, SIM_CHECKS
};

static const char *const sim_check_names[SIM_CHECKS] = {
    "no acknowledged task is forgotten",
    "no acknowledged stop is forgotten",
    "a list has all that was acknowledged",
    "states change along the state machine",
    "each change is told once, in order",
    "who missed changes is told so",
    "memory is bounded",
    "no two attempts run for more than 5 s",
    "no restart budget is exceeded",
    "restarts, deliveries, reconnections are paced",
    "nothing leaks",
    "what a worker has, its manager has on disk",
    "no worker goes back to an older attempt",
    "each start of a manager has a higher epoch",
    "no task leaves its node without a cause",
    "a node without a sign of life is lost",
    "only what runs is asked for its health",
    "a node has promised what its tasks ask for",
    "no acknowledged node is forgotten",
    "no acknowledged removal is forgotten",
    "what clients were told is on disk",
    "what an engine starts, its worker has on disk",
    "each restart waits twice as long as the last",
    "what should run runs exactly once",
    "it has the ports it asked for",
    "its node has room for it",
    "what was stopped has stopped",
    "nothing else runs",
    "what failed has a true reason",
    "manager, workers and engines agree",
    "stores pass their check",
    "what clients were told is what is",
    "nothing has ended that should run",
    "what is sick is started again",
};

static int sim_hex(char c)
{
    return c >= 'a' ? c - 'a' + 10 : c - '0';
}

/* Where it is, or where it would be. */
static struct sim_task **sim_task_place(struct sim_history *h, const char *id)
{
    unsigned at = (unsigned)(sim_hex(id[0]) * 16 + sim_hex(id[1]));

    while (h->places[at % SIM_PLACES] &&
           strcmp(h->places[at % SIM_PLACES]->id, id) != 0)
        at++;
    return &h->places[at % SIM_PLACES];
}

static struct sim_task *sim_task_find(struct sim *s, const char *id)
{
    return *id ? *sim_task_place(s->history, id) : NULL;
}

/* ---- Tasks ---- */

static const char *sim_command(struct sim *s, struct sim_task *t, char *out,
                               size_t size)
{
    switch (t->kind) {
    case SIM_JOB:
        (void)snprintf(out, size, ",\"Cmd\":[\"sleep\",\"%d\"]",
                       1 + (int)room_below(&s->room, 60));
        break;
    case SIM_FAILING:
        (void)snprintf(out, size, ",\"Cmd\":[\"sh\",\"-c\",\"sleep %d; "
                       "exit 3\"]", 1 + (int)room_below(&s->room, 20));
        break;
    case SIM_NO_COMMAND:
        (void)snprintf(out, size, ",\"Cmd\":[\"nosuchcommand\"]");
        break;
    case SIM_BIG:
        (void)snprintf(out, size, ",\"Memory\":%lld", 6LL << 30);
        break;
    case SIM_PORTED:
    case SIM_HEALTHY:
        t->port = t->kind == SIM_HEALTHY
                      ? SIM_HEALTH_PORT + t->number
                      : 8000 + (int)room_below(&s->room,
                                               s->is_crowded ? 1 : SIM_SCARCE);
        (void)snprintf(out, size, ",\"ExposedPorts\":{\"80/tcp\":{}},"
                       "\"PortBindings\":{\"80/tcp\":\"%d\"}%s", t->port,
                       t->kind == SIM_HEALTHY ? ",\"HealthCheck\":\"/health\""
                                              : "");
        break;
    case SIM_SERVICE:
    case SIM_NO_IMAGE:
    case SIM_KINDS:
        *out = 0;
    }
    return out;
}

static struct sim_task *sim_task_new(struct sim_client *c)
{
    static const char *const policies[] = {
        "", "", "always", "on-failure", "no", "unless-stopped"
    };
    static const enum sim_kind kinds[] = {
        SIM_SERVICE, SIM_SERVICE, SIM_SERVICE, SIM_HEALTHY, SIM_JOB, SIM_JOB,
        SIM_FAILING, SIM_NO_COMMAND, SIM_NO_IMAGE, SIM_BIG, SIM_PORTED,
        SIM_PORTED
    };
    struct sim *s = c->sim;
    struct sim_history *h = s->history;
    struct sim_task *t;
    char command[200] = "";

    if (h->count == SIM_TASKS)
        return NULL;
    t = room_new(sizeof *t);
    t->number = h->count;
    t->owner = c->number;
    h->tasks[h->count++] = t;
    cube_uuid_new(&c->proc->table, t->id);
    *sim_task_place(h, t->id) = t;
    t->kind = kinds[room_below(&s->room, COUNT(kinds))];
    if (s->is_crowded && !room_one_in(&s->room, 5))
        t->kind = room_one_in(&s->room, 2) ? SIM_BIG : SIM_PORTED;
    t->policy = policies[room_below(&s->room, COUNT(policies))];
    (void)snprintf(t->body, sizeof t->body,
                   "{\"ID\":\"%s\",\"Name\":\"t%d\",\"Image\":\"%s\","
                   "\"RestartPolicy\":\"%s\"%s}", t->id,
                   t->number % 4, /* names are no identities */
                   t->kind == SIM_NO_IMAGE
                       ? "nosuch" : sim_image_names[t->number % SIM_IMAGES],
                   t->policy,
                   sim_command(s, t, command, sizeof command));
    return t;
}

/* One of this client's own that is such and such; NULL: there is none. */
static struct sim_task *sim_task_pick(struct sim_client *c,
                                      bool (*is_fit)(const struct sim_task *t))
{
    struct sim_history *h = c->sim->history;
    int from = (int)room_below(&c->sim->room, h->count);

    for (int i = 0; i < h->count; i++) {
        struct sim_task *t = h->tasks[(from + i) % h->count];

        if (t->owner == c->number && !t->is_asking && is_fit(t))
            return t;
    }
    return NULL;
}

static bool sim_task_is_unknown(const struct sim_task *t)
{
    return t->acked_us == 0 && t->stop_us == 0;
}

static bool sim_task_is_acked(const struct sim_task *t)
{
    return t->acked_us > 0 && t->remove_us == 0;
}

static bool sim_task_may_stop(const struct sim_task *t)
{
    return sim_task_is_acked(t) && t->stop_us == 0;
}

static bool sim_task_must_stop(const struct sim_task *t)
{
    return t->stop_us > 0 && t->stop_acked_us == 0 && t->remove_us == 0;
}

static bool sim_task_may_go(const struct sim_task *t)
{
    return t->stop_acked_us > 0 && t->remove_acked_us == 0;
}

/* ---- Answers ---- */

/* Does the list have all that was acknowledged before it was asked for? */
static void sim_list_check(struct sim_ask *a, const struct cube_http_answer *w)
{
    struct sim *s = a->client->sim;
    struct json_value_s *root = cube_json_parse(w->body, w->body_len, NULL);
    bool is_there[SIM_TASKS] = {false};

    for (struct json_array_element_s *e = cube_json_items(root); e;
         e = e->next) {
        const char *id = cube_json_str(cube_json_get(e->value, "ID"), NULL);
        struct sim_task *t = id ? sim_task_find(s, id) : NULL;

        if (t)
            is_there[t->number] = true;
    }
    cube_json_free(root);
    for (int i = 0; i < s->history->count; i++) {
        struct sim_task *t = s->history->tasks[i];

        if (t->acked_us == 0 || t->acked_us > a->sent_us || t->remove_us > 0)
            continue;
        sim_check(s, SIM_CHECK_LISTED);
        if (!is_there[i])
            sim_break(s, sim_check_names[SIM_CHECK_LISTED],
                      "t%d %s is not in the list that c%d got", i, t->id,
                      a->client->number + 1);
    }
}

/* These say that it is not known whether it was done, or that it was not. */
static bool sim_answer_is_vague(const struct cube_http_answer *w)
{
    return w->err || w->status == 503 || w->status == 507 ||
           w->status == 500;
}

static const char *const sim_request_names[] = {
    "submit", "resubmit", "twist", "stop", "rm", "get", "list"
};

static void sim_answered(void *arg, const struct cube_http_answer *w)
{
    struct sim_ask *a = arg;
    struct sim *s = a->client->sim;
    struct sim_task *t = a->task;
    int64_t now = s->room.now_us;
    bool is_odd = false;

    if (t)
        t->is_asking = false;
    room_say(&s->room, a->client->proc->name, "%s t%d: %d %s",
             sim_request_names[a->what], t ? t->number : -1, w->status,
             w->err ? w->err->text : "");
    if (sim_answer_is_vague(w)) {
        a->client->silences++;
        if (a->what == SIM_RM)
            t->may_be_gone = true;
        if (a->what <= SIM_TWIST)
            t->may_be_back = true;
        free(a);
        return;
    }
    a->client->answers++;
    switch (a->what) {
    case SIM_SUBMIT:
    case SIM_RESUBMIT: /* 409: it is over, or gone, by now */
        if (w->status == 201 && t->acked_us == 0)
            t->acked_us = now;
        is_odd = w->status != 201 &&
                 !(w->status == 409 && a->what == SIM_RESUBMIT);
        break;
    case SIM_TWIST:
        is_odd = w->status != 409;
        break;
    case SIM_STOP:
        if (w->status == 204)
            t->stop_acked_us = now;
        is_odd = w->status != 204;
        break;
    case SIM_RM: /* 409: it has not ended yet, or is back, by a late submission
                    behind an earlier one; 404: gone by an earlier one */
        if (w->status == 204 || w->status == 404)
            t->remove_acked_us = now;
        else if (!t->may_be_gone)
            t->remove_us = t->remove_acked_us; /* not asked, so far */
        is_odd = w->status != 204 && w->status != 409 && w->status != 404;
        break;
    case SIM_GET:
        is_odd = w->status != 200 && t->remove_us == 0;
        break;
    case SIM_LIST:
        is_odd = w->status != 200;
        if (!is_odd)
            sim_list_check(a, w);
    }
    if (is_odd)
        sim_break(s, sim_check_names[SIM_CHECK_KEPT],
                  "c%d asked %d of t%d and was answered %d %.200s",
                  a->client->number + 1, (int)a->what, t ? t->number : -1,
                  w->status, w->body ? w->body : "");
    free(a);
}

/* ---- Requests ---- */

static void sim_client_ask(struct sim_client *c, enum sim_request what,
                           struct sim_task *t)
{
    static const char *const methods[] = {
        "POST", "POST", "POST", "DELETE", "DELETE", "GET", "GET"
    };
    struct sim_ask *a = room_new(sizeof *a);
    struct cube_http_request r;
    char target[80] = "/tasks", body[600] = "";

    a->client = c;
    a->task = t;
    a->what = what;
    a->sent_us = c->sim->room.now_us;
    memset(&r, 0, sizeof r);
    if (what == SIM_STOP || what == SIM_RM || what == SIM_GET)
        (void)snprintf(target, sizeof target, "/tasks/%s%s", t->id,
                       what == SIM_RM ? "?forget=1" : "");
    else if (what != SIM_LIST)
        (void)snprintf(body, sizeof body, "%s", t->body);
    if (what == SIM_TWIST)
        memcpy(strstr(body, "\"Name\":\"t"), "\"Name\":\"x", 9);
    if (t)
        t->is_asking = true;
    r.method = methods[what];
    r.target = target;
    r.body = *body ? body : NULL;
    r.body_len = strlen(body);
    r.timeout_ms = SIM_CALL_MS;
    r.on_done = sim_answered;
    r.arg = a;
    (void)cube_http_call(c->http, &r);
}

/* One thing after the other; after the end only what is open is finished. */
static void sim_client_act(void *arg)
{
    struct sim_client *c = arg;
    struct room *r = &c->sim->room;
    bool is_over = r->now_us >= c->sim->end_us;
    int dice = is_over ? 100 : (int)room_below(r, 100);
    struct sim_task *t = NULL;

    if ((t = sim_task_pick(c, sim_task_is_unknown)) != NULL) {
        sim_client_ask(c, SIM_RESUBMIT, t);
    } else if ((t = sim_task_pick(c, sim_task_must_stop)) != NULL) {
        sim_client_ask(c, SIM_STOP, t);
    } else if (dice < 30 && (t = sim_task_new(c)) != NULL) {
        t->sent_us = r->now_us;
        sim_client_ask(c, SIM_SUBMIT, t);
    } else if (dice < 40 && (t = sim_task_pick(c, sim_task_is_acked))) {
        sim_client_ask(c, SIM_RESUBMIT, t);
    } else if (dice < 45 && (t = sim_task_pick(c, sim_task_is_acked))) {
        sim_client_ask(c, SIM_TWIST, t);
    } else if (dice < 60 && (t = sim_task_pick(c, sim_task_may_stop))) {
        t->stop_us = r->now_us;
        sim_client_ask(c, SIM_STOP, t);
    } else if (dice < 70 && (t = sim_task_pick(c, sim_task_may_go))) {
        t->remove_us = r->now_us;
        sim_client_ask(c, SIM_RM, t);
    } else if (dice < 85 && (t = sim_task_pick(c, sim_task_is_acked))) {
        sim_client_ask(c, SIM_GET, t);
    } else if (!is_over) {
        sim_client_ask(c, SIM_LIST, NULL);
    }
    cube_timer_set(c->proc->loop, &c->act,
                   is_over ? 1000 : 200 + room_below(r, 12000),
                   sim_client_act, c);
}

/* ---- Watching ---- */

static void sim_client_watch(void *arg);

/* A task's line of the stream: it follows from what was told before. */
static void sim_watch_task(struct sim_client *c, struct json_value_s *task,
                           uint64_t seq)
{
    const char *id = cube_json_str(cube_json_get(task, "ID"), NULL);
    struct sim_task *t = id ? sim_task_find(c->sim, id) : NULL;
    struct sim_seen *seen;
    int64_t state = -1, attempt = 0;

    (void)cube_json_i64(cube_json_get(task, "State"), &state);
    (void)cube_json_i64(cube_json_get(task, "Attempt"), &attempt);
    if (!t)
        return;
    t->has_ended |= state == CUBE_COMPLETED && t->remove_us == 0;
    if (t->told_attempt < attempt)
        t->told_attempt = attempt;
    seen = &c->seen[t->number];
    if (seen->is_known && !c->is_listing && seq > seen->seq) {
        sim_check(c->sim, SIM_CHECK_STATES);
        if ((int64_t)seen->state != state &&
            !cube_state_may(seen->state, (enum cube_state)state))
            sim_break(c->sim, sim_check_names[SIM_CHECK_STATES],
                      "c%d was told that t%d went from %s to %s at event "
                      "%llu", c->number + 1, t->number,
                      cube_state_name(seen->state),
                      cube_state_name((enum cube_state)state),
                      (unsigned long long)seq);
    }
    if (seen->is_known && seq < seen->seq)
        return; /* changed while it was listed: told again, as it was */
    seen->is_known = true;
    seen->state = (enum cube_state)state;
    seen->seq = seq;
}

/* Events have the number after the last one, or a reset comes before. */
static void sim_watch_line(struct sim_client *c, const char *p, size_t len)
{
    struct sim *s = c->sim;
    struct json_value_s *root = cube_json_parse(p, len, NULL);
    const char *type = cube_json_str(cube_json_get(root, "Type"), NULL);
    const char *stream = cube_json_str(cube_json_get(root, "Stream"), NULL);
    int64_t seq = 0;
    bool is_event;

    is_event = cube_json_i64(cube_json_get(root, "Seq"), &seq) == 0;
    if (!type) {
        sim_break(s, sim_check_names[SIM_CHECK_EVENTS],
                  "c%d got the line %.100s", c->number + 1, p);
        cube_json_free(root);
        return;
    }
    is_event &= strcmp(type, "hello") && strcmp(type, "reset") &&
                strcmp(type, "listed");
    if (!strcmp(type, "reset")) {
        c->is_listing = true;
        c->resets++;
        sim_check(s, SIM_CHECK_RESET);
        memset(c->seen, 0, sizeof c->seen);
    } else if (!strcmp(type, "listed")) {
        c->is_listing = false;
        c->has_cursor = true;
        c->seq = (uint64_t)seq;
        (void)snprintf(c->stream, sizeof c->stream, "%s", stream);
    } else if (is_event && !c->is_listing) {
        c->events++;
        sim_check(s, SIM_CHECK_EVENTS);
        if (!c->has_cursor || (uint64_t)seq != c->seq + 1 ||
            strcmp(stream, c->stream) != 0)
            sim_break(s, sim_check_names[SIM_CHECK_EVENTS],
                      "c%d was told event %lld behind %llu",
                      c->number + 1, (long long)seq,
                      (unsigned long long)c->seq);
        c->seq = (uint64_t)seq;
    }
    if (!strcmp(type, "task"))
        sim_watch_task(c, cube_json_get(root, "Task"), (uint64_t)seq);
    if (!strcmp(type, "gone")) {
        const char *id = cube_json_str(cube_json_get(root, "ID"), NULL);
        struct sim_task *t = id ? sim_task_find(s, id) : NULL;

        if (t)
            c->seen[t->number].is_known = false;
    }
    cube_json_free(root);
}

static void sim_watch_data(void *arg, const char *p, size_t len)
{
    struct sim_client *c = arg;
    const char *end;

    cube_buf_add(&c->line, p, len);
    while (c->line.len > 0 &&
           (end = memchr(c->line.data, '\n', c->line.len)) != NULL) {
        size_t size = (size_t)(end - c->line.data);

        sim_watch_line(c, c->line.data, size);
        cube_buf_drop(&c->line, size + 1);
    }
}

static void sim_watch_done(void *arg, const struct cube_http_answer *a)
{
    struct sim_client *c = arg;

    (void)a;
    c->watch = NULL;
    cube_buf_clear(&c->line);
    if (c->is_listing) /* half a list is none */
        c->has_cursor = c->is_listing = false;
    cube_timer_set(c->proc->loop, &c->rewatch, 500, sim_client_watch, c);
}

static void sim_client_watch(void *arg)
{
    struct sim_client *c = arg;
    struct cube_http_request r;
    char target[100] = "/events";

    if (c->has_cursor)
        (void)snprintf(target, sizeof target, "/events?after=%s:%llu",
                       c->stream, (unsigned long long)c->seq);
    memset(&r, 0, sizeof r);
    r.method = "GET";
    r.target = target;
    r.idle_timeout_ms = 5000;
    r.on_data = sim_watch_data;
    r.on_done = sim_watch_done;
    r.arg = c;
    c->watch = cube_http_call(c->http, &r);
}

/* ---- Beginning and end ---- */

/* It starts, with nothing but what the histories know. */
static void sim_client_begin(struct sim_client *c)
{
    (void)sim_proc_open(c->proc);
    c->has_cursor = c->is_listing = false;
    c->http = cube_http_client_new(c->proc->loop,
                                   c->number ? "http://10.0.0.1:5555"
                                             : "http://m:5555", NULL, NULL);
    cube_timer_set(c->proc->loop, &c->act, 2000 + 300 * c->number,
                   sim_client_act, c);
    cube_timer_set(c->proc->loop, &c->rewatch, 1000 + 100 * c->number,
                   sim_client_watch, c);
    room_running = NULL;
}

/* kill -9, or, `is_silent`, the end of the world. What it had asked and was
 * not answered it does not know. */
static void sim_client_end(struct sim_client *c, bool is_silent)
{
    room_proc_end(c->proc, is_silent);
    room_running = c->proc;
    cube_timer_clear(c->proc->loop, &c->act);
    cube_http_client_free(c->http);
    cube_timer_clear(c->proc->loop, &c->rewatch);
    cube_buf_free(&c->line);
    cube_loop_free(c->proc->loop);
    room_running = NULL;
}

static void sim_clients_open(struct sim *s)
{
    s->history = room_new(sizeof *s->history);
    for (int i = 0; i < SIM_CLIENTS; i++) {
        struct sim_client *c = s->clients[i] = room_new(sizeof *c);
        struct room_host *h;
        char name[16];

        (void)snprintf(name, sizeof name, "c%d", i + 1);
        h = room_host_add(&s->room, name);
        c->sim = s;
        c->number = i;
        c->proc = room_proc_add(&s->room, h, name);
        sim_client_begin(c);
    }
}

static void sim_clients_close(struct sim *s)
{
    for (int i = 0; i < SIM_CLIENTS; i++) {
        if (s->clients[i]->proc->is_up)
            sim_client_end(s->clients[i], true);
        free(s->clients[i]);
    }
    for (int i = 0; i < s->history->count; i++)
        free(s->history->tasks[i]);
    free(s->history);
}

#endif
