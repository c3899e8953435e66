/*
 * A Docker Engine that is only simulated: its API, served by chapter 6 on any
 * loop in any world, and containers that are records with a life planned
 * ahead. Include after test.h (or cube.c).
 *
 *     struct sim_engine *e = sim_engine_new(loop, seed);
 *     sim_engine_up(e, "unix:/run/docker.sock", &err);
 *     ...
 *     sim_engine_down(e, SIM_KILLED);     the daemon, not the containers
 *     sim_engine_up(e, "unix:/run/docker.sock", &err);
 *     ...
 *     sim_engine_free(e);
 *
 * A request takes its time (`ms` of its route, with jitter), then it is done
 * at once and answered. A client that hangs up changes nothing of it, but for
 * a pull, which is dropped; so a create whose answer was lost has been made.
 *
 *    request --> (waits) --ms--> act --> answer      pull, stop, wait, logs
 *                   |                                and events stay longer
 *              is_hung: until it is not
 *
 * What a container does is told by its command, or by the hook `on_start`:
 *
 *     sleep 5              ends with 0 after 5 s; as process 1 deaf to SIGTERM
 *     sh -c "echo a; exit 3"            trap "exit 4" TERM; sleep 9 & wait
 *     (none)               runs for good, SIGTERM ends it with 143
 *     any other            no such command: its start is refused
 *
 * Faults are fields, to be set at any time, and functions of their own. All
 * that is chance comes from the seed. How this behaves is compared with the
 * real engine by t14_sim_engine.c.
 */
#ifndef SIM_ENGINE_H
#define SIM_ENGINE_H

#include <ctype.h>

#define SIM_PORTS 8
#define SIM_LABELS 8 /* of which sim_label knows; containers may have more */
#define SIM_EVENTS 256 /* remembered for `since`, as the engine does */
#define SIM_NEVER INT64_MAX

enum sim_box_state { SIM_CREATED, SIM_RUNNING, SIM_EXITED };

/* What one run of a container will be like. */
struct sim_life {
    int64_t runs_ms; /* SIM_NEVER: until somebody ends it */
    int code;        /* of that end; OOM: 137 whatever stands here */
    bool is_oom;
    int term_code;   /* of an end by SIGTERM; below 0: it is deaf to it */
    int64_t term_ms; /* and how long that takes */
    char no[300];    /* set: the start is refused with these words */
};

struct sim_port {
    char port[32]; /* "80/tcp" */
    int host;      /* 0: not published */
};

struct sim_engine;

/* A container. Lives from its create to its removal. */
struct sim_box {
    struct cube_list link;
    struct sim_engine *e;
    char id[65], name[300], image[256];
    char *text;                /* what it was created from */
    struct json_value_s *spec; /* the same, parsed */
    struct {
        const char *name, *value; /* the spec's */
    } labels[SIM_LABELS];
    int label_count;
    enum sim_box_state state;
    int code;
    bool is_oom;
    bool is_unhealthy; /* for whoever answers its health checks */
    char error[400];   /* of a start that failed */
    int64_t created_ns, started_ns, ended_ns; /* by the wall's clock */
    int64_t started_ms, end_ms;               /* by the loop's; planned */
    int end_code;
    struct sim_life life;
    struct cube_timer end;
    struct sim_port ports[SIM_PORTS];
    size_t port_count;
    struct cube_buf log; /* frames */
    void *user;          /* free for on_change */
};

/* Zeros are an engine that is well. Chances are of a thousand. */
struct sim_engine_faults {
    bool is_hung;          /* it is: set by sim_engine_hang */
    int error;             /* a 500; in half of the cases the deed was done */
    int cut;               /* the connection breaks; done in half as well */
    int slow;              /* a hundred times slower */
    int pull_missing, pull_error, pull_cut, pull_slow;
    int exit_early, oom;   /* a run ends within 60 s */
};

/* How often each thing happened, for the report of a run. */
struct sim_engine_counts {
    int requests, errors, cuts, slow, hung;
    int creates, conflicts, starts, ports_taken, refused, removes;
    int pulls, pull_missing, pull_error, pull_cut, pull_slow;
    int exit_early, oom; /* planned; the next two have happened */
    int exits, ooms, by_hand, downs, kept, ended, wiped, powers;
};

/* How the daemon goes, and what is there when it is back. */
enum sim_down {
    SIM_KILLED,  /* kill -9: containers run on, and are ended at its return */
    SIM_KEPT,    /* live-restore: they run on, and stay */
    SIM_WIPED,   /* it comes back without any container */
    SIM_POWER    /* the machine: all have ended with it */
};

struct sim_engine {
    struct cube_loop *loop;
    struct cube_http_server *server;
    char where[200];
    const char *api;    /* the newest version that it speaks */
    const char *oldest;
    char id[40];        /* of /info */
    uint64_t random;
    int latency;        /* percent of the usual */
    int first_port, next_port; /* of those that it chooses itself */
    int64_t pull_ms;
    int64_t stop_ms;    /* grace of sim_engine_stop */
    struct sim_engine_faults faults;
    struct sim_engine_counts counts;
    /* Hooks, each may be NULL. on_start may change the life of a run that
     * begins; on_change is told of each start, end and removal (`is_gone`),
     * and of all that ports and health depend on. */
    void (*on_start)(void *arg, struct sim_box *b, struct sim_life *life);
    void (*on_change)(void *arg, struct sim_box *b, bool is_gone);
    void *arg;

    struct cube_list boxes, calls, streams;
    struct cube_map images;  /* present */
    struct cube_map taken;   /* host ports of others, as texts */
    struct cube_buf events[SIM_EVENTS];
    int64_t event_ns[SIM_EVENTS];
    uint64_t event_count;
    enum sim_down how;       /* it went last */
    bool is_stopping;
    bool is_keeping;         /* live-restore, as /info tells */
    int64_t away_ms;         /* of a restart under way; below 0: none */
    int64_t stopping_ms;     /* when its stop began */
    struct cube_timer stop, back;
    unsigned made;
};

/* ---- Chance ---- */

static uint64_t sim_random(struct sim_engine *e)
{
    uint64_t z = (e->random += 0x9e3779b97f4a7c15u); /* splitmix64 */

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* 0 to limit - 1. */
static int64_t sim_below(struct sim_engine *e, int64_t limit)
{
    return limit <= 1 ? 0 : (int64_t)(sim_random(e) % (uint64_t)limit);
}

/* Does a chance of so many in a thousand come true? Counted when it does. */
static bool sim_strikes(struct sim_engine *e, int chance, int *count)
{
    if (chance <= 0 || sim_below(e, 1000) >= chance)
        return false;
    (*count)++;
    return true;
}

static int64_t sim_now_ms(struct sim_engine *e)
{
    return e->loop ? cube_loop_now_ms(e->loop) : 0;
}

static int64_t sim_now_ns(struct sim_engine *e)
{
    const struct cube_world *w = cube_loop_world(e->loop);

    return w->wall_ns(w->ctx);
}

/* ---- Containers ---- */

static const char *sim_text(struct json_value_s *object, const char *key)
{
    const char *s = cube_json_str(cube_json_get(object, key), NULL);

    return s ? s : "";
}

static struct json_value_s *sim_labels(const struct sim_box *b)
{
    return cube_json_get(b->spec, "Labels");
}

/* "" when it has none of that name. Asked all the time by who looks for all
 * containers of a task, and so not of the JSON. */
static const char *sim_label(const struct sim_box *b, const char *name)
{
    for (int i = 0; i < b->label_count; i++) {
        if (!strcmp(b->labels[i].name, name))
            return b->labels[i].value;
    }
    return "";
}

/* By ID, the beginning of one, or name; NULL: there is none. */
static struct sim_box *sim_find(struct sim_engine *e, const char *id)
{
    size_t len = strlen(id);

    for (struct cube_list *l = e->boxes.next; l != &e->boxes; l = l->next) {
        struct sim_box *b = CUBE_OF(l, struct sim_box, link);

        if (!strcmp(b->name, id) || (len > 3 && !strncmp(b->id, id, len)))
            return b;
    }
    return NULL;
}

/* How many are in that state; with a label's value, of those that carry it. */
static int sim_count(struct sim_engine *e, enum sim_box_state state,
                     const char *label, const char *value)
{
    int n = 0;

    for (struct cube_list *l = e->boxes.next; l != &e->boxes; l = l->next) {
        struct sim_box *b = CUBE_OF(l, struct sim_box, link);

        n += b->state == state &&
             (!label || !strcmp(sim_label(b, label), value));
    }
    return n;
}

static void sim_changed(struct sim_box *b, bool is_gone)
{
    if (b->e->on_change)
        b->e->on_change(b->e->arg, b, is_gone);
}

/* ---- Streams: events, logs, waits ---- */

struct sim_stream {
    struct cube_list link;
    struct sim_engine *e;
    struct cube_http_req *req;
    struct sim_box *box; /* of logs and wait; NULL: events */
    bool is_wait;
    size_t sent;         /* bytes of the log */
    uint64_t event;      /* the next one */
    struct json_value_s *filters;
};

static void sim_stream_free(struct sim_stream *s)
{
    cube_list_remove(&s->link);
    cube_json_free(s->filters);
    cube_free(s);
}

static void sim_stream_gone(void *arg)
{
    sim_stream_free(arg);
}

static struct sim_stream *sim_stream_new(struct sim_engine *e,
                                         struct cube_http_req *req,
                                         const char *type)
{
    struct sim_stream *s = cube_alloc(sizeof *s);

    s->e = e;
    s->req = req;
    cube_list_add(&e->streams, &s->link);
    cube_http_stream(req, 200, type);
    cube_http_on_gone(req, sim_stream_gone, s);
    return s;
}

static void sim_stream_end(struct sim_stream *s)
{
    cube_http_stream_end(s->req);
    sim_stream_free(s);
}

/* Does a list of `key=value` or `key` (or a map with those as keys, as older
 * clients write it) agree with the object's texts? None agrees with all. */
static bool sim_matches(struct json_value_s *wanted, struct json_value_s *have)
{
    for (struct json_array_element_s *i = cube_json_items(wanted); i;
         i = i->next) {
        const char *text = cube_json_str(i->value, NULL);
        const char *sign = text ? strchr(text, '=') : NULL;
        char key[200];
        struct json_value_s *value;

        if (!text)
            continue;
        (void)snprintf(key, sizeof key, "%.*s",
                       (int)(sign ? (size_t)(sign - text) : strlen(text)),
                       text);
        value = cube_json_get(have, key);
        if (!value || (sign && strcmp(sim_text(have, key), sign + 1)))
            return false;
    }
    return true;
}

/* Does it want events of containers? There are no others. */
static bool sim_stream_is_wanting(const struct sim_stream *s)
{
    struct json_array_element_s *i =
        cube_json_items(cube_json_get(s->filters, "type"));

    if (!i)
        return true;
    for (; i; i = i->next) {
        const char *type = cube_json_str(i->value, NULL);

        if (type && !strcmp(type, "container"))
            return true;
    }
    return false;
}

/* One event of the log, if the stream's filters let it pass. */
static void sim_stream_event(struct sim_stream *s, const struct cube_buf *text)
{
    struct json_value_s *labels = cube_json_get(s->filters, "label");
    struct json_value_s *root = NULL;

    if (!sim_stream_is_wanting(s))
        return;
    if (labels)
        root = cube_json_parse(text->data, text->len, NULL);
    if (sim_matches(labels, cube_json_get(cube_json_get(root, "Actor"),
                                          "Attributes")))
        cube_http_stream_write(s->req, text->data, text->len);
    cube_json_free(root);
}

/* Sends what is new. False: the stream has come to its end. */
static bool sim_stream_pump(struct sim_stream *s)
{
    struct sim_engine *e = s->e;

    if (!s->box) {
        if (s->event + SIM_EVENTS < e->event_count)
            s->event = e->event_count - SIM_EVENTS;
        while (s->event < e->event_count)
            sim_stream_event(s, &e->events[s->event++ % SIM_EVENTS]);
        return true;
    }
    if (!s->is_wait && s->box->log.len > s->sent)
        cube_http_stream_write(s->req, s->box->log.data + s->sent,
                               s->box->log.len - s->sent);
    s->sent = s->box->log.len;
    if (s->box->state == SIM_RUNNING)
        return true;
    if (s->is_wait) {
        char text[80];

        (void)snprintf(text, sizeof text,
                       "{\"Error\":null,\"StatusCode\":%d}\n", s->box->code);
        cube_http_stream_write(s->req, text, strlen(text));
    }
    return false;
}

static void sim_pump(struct sim_engine *e)
{
    struct cube_list *l = e->streams.next;

    while (!e->faults.is_hung && l != &e->streams) {
        struct sim_stream *s = CUBE_OF(l, struct sim_stream, link);

        l = l->next;
        if (!sim_stream_pump(s))
            sim_stream_end(s);
    }
}

/* Adds an event; `more` are further attributes, as `,"a":"b"`. */
static void sim_tell(struct sim_box *b, const char *action, const char *more)
{
    struct sim_engine *e = b->e;
    struct cube_buf *out = &e->events[e->event_count % SIM_EVENTS];
    int64_t now = sim_now_ns(e);

    e->event_ns[e->event_count++ % SIM_EVENTS] = now;
    cube_buf_clear(out);
    cube_buf_printf(out, "{\"status\":\"%s\",\"id\":\"%s\",\"from\":", action,
                    b->id);
    cube_json_put_text(out, b->image);
    cube_buf_printf(out, ",\"Type\":\"container\",\"Action\":\"%s\",\"Actor\":"
                    "{\"ID\":\"%s\",\"Attributes\":{\"image\":", action, b->id);
    cube_json_put_text(out, b->image);
    cube_buf_puts(out, ",\"name\":");
    cube_json_put_text(out, b->name);
    for (struct json_object_element_s *m = cube_json_members(sim_labels(b));
         m; m = m->next) {
        const char *value = cube_json_str(m->value, NULL);

        cube_buf_addc(out, ',');
        cube_json_put_text(out, m->name->string);
        cube_buf_addc(out, ':');
        cube_json_put_text(out, value ? value : "");
    }
    cube_buf_printf(out, "%s}},\"scope\":\"local\",\"time\":%lld,"
                    "\"timeNano\":%lld}\n", more,
                    (long long)(now / 1000000000), (long long)now);
    sim_pump(e);
}

/* Mutual recursion: calls wait for the ends of containers. */
static void sim_settle(struct sim_engine *e);

/* ---- Ports ---- */

/* Who has it: a running container, or somebody else on this machine (the
 * container itself does not count). */
static bool sim_is_taken(struct sim_engine *e, int port, bool *is_stranger)
{
    char text[12];

    (void)snprintf(text, sizeof text, "%d", port);
    *is_stranger = cube_map_get(&e->taken, text) != NULL;
    if (*is_stranger)
        return true;
    for (struct cube_list *l = e->boxes.next; l != &e->boxes; l = l->next) {
        struct sim_box *b = CUBE_OF(l, struct sim_box, link);

        for (size_t i = 0; b->state == SIM_RUNNING && i < b->port_count; i++) {
            if (b->ports[i].host == port)
                return true;
        }
    }
    return false;
}

/* Somebody else on the machine listens on a port, or no longer does. */
static void sim_engine_take_port(struct sim_engine *e, int port, bool is_taken)
{
    char text[12];

    (void)snprintf(text, sizeof text, "%d", port);
    if (is_taken)
        (void)cube_map_put(&e->taken, text, e);
    else
        (void)cube_map_remove(&e->taken, text);
}

static int sim_free_port(struct sim_engine *e)
{
    bool is_stranger;

    for (int i = 0; i < 20000; i++) {
        int port = e->next_port++;

        if (e->next_port >= e->first_port + 20000)
            e->next_port = e->first_port;
        if (!sim_is_taken(e, port, &is_stranger))
            return port;
    }
    return 0;
}

/* Host ports for a start. -1: one is taken, and b->error says so. */
static int sim_bind(struct sim_box *b)
{
    struct json_value_s *host = cube_json_get(b->spec, "HostConfig");
    struct json_value_s *bindings = cube_json_get(host, "PortBindings");
    bool is_all = false, is_stranger;

    (void)cube_json_bool(cube_json_get(host, "PublishAllPorts"), &is_all);
    for (size_t i = 0; i < b->port_count; i++) {
        struct sim_port *p = &b->ports[i];
        struct json_array_element_s *first =
            cube_json_items(cube_json_get(bindings, p->port));
        int want = first ? atoi(sim_text(first->value, "HostPort")) : 0;

        p->host = 0;
        if (want == 0) {
            p->host = first || is_all ? sim_free_port(b->e) : 0;
            continue;
        }
        if (sim_is_taken(b->e, want, &is_stranger)) {
            (void)snprintf(b->error, sizeof b->error, is_stranger
                           ? "driver failed programming external connectivity "
                             "on endpoint %s (%s): Error starting userland "
                             "proxy: listen tcp4 0.0.0.0:%d: bind: address "
                             "already in use"
                           : "driver failed programming external connectivity "
                             "on endpoint %s (%s): Bind for 0.0.0.0:%d failed: "
                             "port is already allocated",
                           b->name, b->id, want);
            return -1;
        }
        p->host = want;
    }
    return 0;
}

/* ---- A run of a container ---- */

/* A word of Cmd, "" behind the last. */
static const char *sim_cmd(const struct sim_box *b, int at)
{
    struct json_array_element_s *i =
        cube_json_items(cube_json_get(b->spec, "Cmd"));
    const char *text;

    while (i && at-- > 0)
        i = i->next;
    text = i ? cube_json_str(i->value, NULL) : NULL;
    return text ? text : "";
}

/* Output of the container, as a frame. */
static void sim_say(struct sim_box *b, int stream, const char *text, size_t len)
{
    char head[8] = {(char)stream, 0, 0, 0, (char)(len >> 24),
                    (char)(len >> 16), (char)(len >> 8), (char)len};

    cube_buf_add(&b->log, head, sizeof head);
    cube_buf_add(&b->log, text, len);
}

/* One statement of a script; true: nothing of it runs behind this one. */
static bool sim_statement(struct sim_box *b, const char *p, size_t len,
                          struct sim_life *life)
{
    char text[300], word[300];
    int n;

    (void)snprintf(text, sizeof text, "%.*s", (int)len, p);
    if (sscanf(text, " trap 'exit %d' TERM", &n) == 1)
        life->term_code = n;
    else if (sscanf(text, " exit %d", &n) == 1) {
        life->code = n;
        return true;
    } else if (sscanf(text, " sleep %d", &n) == 1) {
        life->runs_ms += (int64_t)n * 1000;
    } else if (sscanf(text, " echo %290[^>]", word) == 1) {
        bool is_error = strstr(text, ">&2") != NULL;

        while (*word && word[strlen(word) - 1] == ' ')
            word[strlen(word) - 1] = 0;
        strcat(word, "\n");
        sim_say(b, is_error ? 2 : 1, word, strlen(word));
    }
    return false;
}

/* What its command will do; see the opening. */
static void sim_plan(struct sim_box *b, struct sim_life *life)
{
    const char *word = sim_cmd(b, 0);

    *life = (struct sim_life){SIM_NEVER, 0, false, 143, 20, ""};
    if (!*word)
        return;
    *life = (struct sim_life){0, 0, false, -1, 20, ""};
    if (strstr(sim_cmd(b, 2), "a=$a$a")) {
        life->is_oom = true; /* a script that eats all memory */
        life->runs_ms = 300;
    } else if (!strcmp(word, "sleep")) {
        life->runs_ms = (int64_t)atoi(sim_cmd(b, 1)) * 1000;
    } else if (!strcmp(word, "sh") && !strcmp(sim_cmd(b, 1), "-c")) {
        const char *p = sim_cmd(b, 2);

        for (size_t len; *p; p += len + (p[len] == ';')) {
            len = strcspn(p, ";");
            if (sim_statement(b, p, len, life))
                break;
        }
    } else if (!strcmp(word, "false")) {
        life->code = 1;
    } else if (strcmp(word, "true")) {
        (void)snprintf(life->no, sizeof life->no,
                       "failed to create shim task: OCI runtime create failed: "
                       "runc create failed: unable to start container process: "
                       "exec: \"%.100s\": executable file not found in $PATH: "
                       "unknown", word);
    }
}

/* Ends the run, at this moment. */
static void sim_end(struct sim_box *b, int code, bool is_oom)
{
    char more[40];

    if (b->state != SIM_RUNNING)
        return;
    if (b->e->loop)
        cube_timer_clear(b->e->loop, &b->end);
    b->state = SIM_EXITED;
    b->code = is_oom ? 137 : code;
    b->is_oom = is_oom;
    b->ended_ns = sim_now_ns(b->e);
    if (is_oom) {
        b->e->counts.ooms++;
        sim_tell(b, "oom", "");
    }
    b->e->counts.exits++;
    (void)snprintf(more, sizeof more, ",\"exitCode\":\"%d\"", b->code);
    sim_tell(b, "die", more);
    sim_changed(b, false);
    for (size_t i = 0; i < b->port_count; i++)
        b->ports[i].host = 0;
    sim_pump(b->e);
    sim_settle(b->e);
}

static void sim_end_due(void *arg)
{
    struct sim_box *b = arg;

    sim_end(b, b->end_code, b->life.is_oom);
}

/* The run will end in `ms`, if it does not before. */
static void sim_end_in(struct sim_box *b, int64_t ms, int code)
{
    int64_t at = ms == SIM_NEVER ? SIM_NEVER : sim_now_ms(b->e) + ms;

    if (b->end_ms <= at && b->end_ms != SIM_NEVER)
        return;
    b->end_ms = at;
    b->end_code = code;
    if (at != SIM_NEVER)
        cube_timer_set(b->e->loop, &b->end, ms, sim_end_due, b);
}

/* Chance may have it that this run ends early, or of too much memory. */
static void sim_shorten(struct sim_box *b)
{
    struct sim_engine *e = b->e;

    b->life.is_oom = sim_strikes(e, e->faults.oom, &e->counts.oom);
    if (!b->life.is_oom &&
        !sim_strikes(e, e->faults.exit_early, &e->counts.exit_early))
        return;
    b->life.runs_ms = sim_below(e, 60000);
    b->life.code = (int)sim_below(e, 4);
}

/* The faults that end runs early have begun: they meet what runs, too. */
static void sim_engine_shorten(struct sim_engine *e)
{
    for (struct cube_list *l = e->boxes.next; l != &e->boxes; l = l->next) {
        struct sim_box *b = CUBE_OF(l, struct sim_box, link);

        if (b->state != SIM_RUNNING || b->end_ms != SIM_NEVER)
            continue;
        sim_shorten(b);
        sim_end_in(b, b->life.runs_ms, b->life.code);
    }
}

/* A run begins. 0, or the status to refuse it with, and b->error. */
static int sim_start(struct sim_box *b)
{
    struct sim_engine *e = b->e;

    b->error[0] = 0;
    sim_plan(b, &b->life);
    if (e->on_start)
        e->on_start(e->arg, b, &b->life);
    if (b->life.runs_ms > 60000)
        sim_shorten(b);
    if (sim_bind(b) < 0) {
        b->code = 128;
        e->counts.ports_taken++;
        return 500;
    }
    if (*b->life.no) {
        (void)snprintf(b->error, sizeof b->error, "%s", b->life.no);
        b->code = 127;
        e->counts.refused++;
        return 400;
    }
    e->counts.starts++;
    b->state = SIM_RUNNING;
    b->code = 0;
    b->is_oom = false;
    b->started_ns = sim_now_ns(e);
    b->started_ms = sim_now_ms(e);
    b->end_ms = SIM_NEVER;
    sim_tell(b, "start", "");
    sim_changed(b, false);
    sim_end_in(b, b->life.runs_ms, b->life.code);
    return 0;
}

/* SIGTERM or SIGKILL. */
static void sim_signal(struct sim_box *b, int number)
{
    char more[40];

    (void)snprintf(more, sizeof more, ",\"signal\":\"%d\"", number);
    sim_tell(b, "kill", more);
    b->life.is_oom = false;
    if (number == 9)
        sim_end_in(b, 30 * b->e->latency / 100, 137);
    else if (b->life.term_code >= 0)
        sim_end_in(b, b->life.term_ms, b->life.term_code);
}

static void sim_box_free(struct sim_box *b)
{
    if (b->e->loop)
        cube_timer_clear(b->e->loop, &b->end);
    cube_list_remove(&b->link);
    cube_json_free(b->spec);
    cube_free(b->text);
    cube_buf_free(&b->log);
    cube_free(b);
}

/* Removes it, running or not. */
static void sim_remove(struct sim_box *b)
{
    struct sim_engine *e = b->e;
    struct cube_list *l;

    if (b->state == SIM_RUNNING) {
        sim_tell(b, "kill", ",\"signal\":\"9\"");
        sim_end(b, 137, false);
    }
    e->counts.removes++;
    sim_tell(b, "destroy", "");
    sim_changed(b, true);
    for (l = e->streams.next; l != &e->streams;) {
        struct sim_stream *s = CUBE_OF(l, struct sim_stream, link);

        l = l->next;
        if (s->box == b)
            sim_stream_end(s);
    }
    sim_box_free(b);
}

/* Somebody does so by hand: `docker rm -f`. False: the engine does not answer
 * him either. */
static bool sim_engine_remove_by_hand(struct sim_box *b)
{
    if (!b->e->server || b->e->faults.is_hung)
        return false;
    b->e->counts.by_hand++;
    sim_remove(b);
    return true;
}

/* ---- Calls ---- */

struct sim_call;

/* A way of the API: "/containers/" id "/start", and how long it takes. */
struct sim_route {
    const char *method, *before, *after;
    void (*act)(struct sim_call *c);
    int ms;
    bool is_deed; /* it changes something: a lost answer hides that */
};

/* A request from its coming to its answer. Everything is copied: the client
 * may go (req NULL), and it is done all the same. */
struct sim_call {
    struct cube_list link;
    struct sim_engine *e;
    struct cube_http_req *req;
    const struct sim_route *route;
    struct cube_timer timer;
    struct cube_buf body;
    char id[300], name[300], from[300], tag[200];
    char *filters;
    int grace_s, limit, tail;
    bool is_all, is_forced, is_following, is_since, is_until;
    int64_t since_ns;
    bool is_ripe;    /* its time came while the engine hung */
    bool is_spoiled; /* it is done, and then answered with 500 */
    bool is_cut;     /* or not at all */
    bool is_pulling, is_slow;
    struct sim_box *ending; /* it answers when that has ended */
    int step;        /* of a pull */
    int fate;
};

static void sim_call_free(struct sim_call *c)
{
    if (c->e->loop)
        cube_timer_clear(c->e->loop, &c->timer);
    cube_list_remove(&c->link);
    cube_buf_free(&c->body);
    cube_free(c->filters);
    cube_free(c);
}

static void sim_call_drop(struct sim_call *c)
{
    if (c->req) {
        cube_http_on_gone(c->req, NULL, NULL);
        cube_http_stream(c->req, 200, NULL);
        cube_http_stream_abort(c->req);
    }
    sim_call_free(c);
}

/* The end of a call: an answer with a body of JSON, or with none. */
static void sim_answer(struct sim_call *c, int status, const char *body)
{
    if (c->is_spoiled) {
        status = 500;
        body = "{\"message\":\"the engine has a bad day\"}\n";
    }
    if (c->is_cut) {
        sim_call_drop(c);
        return;
    }
    if (c->req) {
        cube_http_on_gone(c->req, NULL, NULL);
        cube_http_reply_header(c->req, "Api-Version", c->e->api);
        cube_http_reply(c->req, status, body ? "application/json" : NULL,
                        body ? body : "", body ? strlen(body) : 0);
    }
    sim_call_free(c);
}

__attribute__((format(printf, 3, 4)))
static void sim_refuse(struct sim_call *c, int status, const char *format, ...)
{
    struct cube_buf body = {0};
    char words[700];
    va_list args;

    va_start(args, format);
    (void)vsnprintf(words, sizeof words, format, args);
    va_end(args);
    cube_buf_puts(&body, "{\"message\":");
    cube_json_put_text(&body, words);
    cube_buf_puts(&body, "}\n");
    sim_answer(c, status, body.data);
    cube_buf_free(&body);
}

/* The container that is asked for; NULL: it was answered with 404. */
static struct sim_box *sim_asked(struct sim_call *c)
{
    struct sim_box *b = sim_find(c->e, c->id);

    if (!b)
        sim_refuse(c, 404, "No such container: %s", c->id);
    return b;
}

/* Answers those that wait for an end which has come. */
static void sim_settle(struct sim_engine *e)
{
    struct cube_list *l = e->calls.next;

    while (!e->faults.is_hung && l != &e->calls) {
        struct sim_call *c = CUBE_OF(l, struct sim_call, link);

        l = l->next;
        if (c->ending && c->ending->state != SIM_RUNNING) {
            if (!strcmp(c->route->after, "/stop"))
                sim_tell(c->ending, "stop", "");
            sim_answer(c, 204, NULL);
        }
    }
}

/* ---- The ways of the API ---- */

static void sim_do_ping(struct sim_call *c)
{
    if (c->req) {
        cube_http_on_gone(c->req, NULL, NULL);
        cube_http_reply_header(c->req, "Api-Version", c->e->api);
        cube_http_reply(c->req, 200, "text/plain; charset=utf-8", "OK", 2);
    }
    sim_call_free(c);
}

static void sim_do_info(struct sim_call *c)
{
    char text[300];

    (void)snprintf(text, sizeof text, "{\"ID\":\"%s\",\"Name\":\"sim\","
                   "\"ServerVersion\":\"20.10.24\",\"DockerRootDir\":"
                   "\"/var/lib/docker\",\"LiveRestoreEnabled\":%s}\n",
                   c->e->id, c->e->is_keeping ? "true" : "false");
    sim_answer(c, 200, text);
}

/* "nginx" is "nginx:latest"; what has a tag or a digest stays. */
static void sim_image_full(const char *image, char out[256])
{
    const char *slash = strrchr(image, '/');

    (void)snprintf(out, 256, "%s%s", image,
                   strchr(image, '@') || strchr(slash ? slash : image, ':')
                       ? "" : ":latest");
}

static void sim_engine_add_image(struct sim_engine *e, const char *image)
{
    char full[256];

    sim_image_full(image, full);
    (void)cube_map_put(&e->images, full, e);
}

static void sim_engine_remove_image(struct sim_engine *e, const char *image)
{
    char full[256];

    sim_image_full(image, full);
    (void)cube_map_remove(&e->images, full);
}

static bool sim_has_image(struct sim_engine *e, const char *image)
{
    char full[256];

    sim_image_full(image, full);
    return cube_map_get(&e->images, full) != NULL;
}

static void sim_do_image(struct sim_call *c)
{
    struct cube_buf body = {0};

    if (!sim_has_image(c->e, c->id)) {
        sim_refuse(c, 404, "No such image: %s", c->id);
        return;
    }
    cube_buf_puts(&body, "{\"Id\":\"sha256:0\",\"RepoTags\":[");
    cube_json_put_text(&body, c->id);
    cube_buf_puts(&body, "]}\n");
    sim_answer(c, 200, body.data);
    cube_buf_free(&body);
}

/* Why a spec cannot be created, into `why`; the status, or 0. */
static int sim_judge(struct sim_call *c, struct json_value_s *spec, char *why,
                     size_t size)
{
    const char *image = sim_text(spec, "Image"), *p = c->name;
    struct sim_box *other = sim_find(c->e, c->name);
    int64_t mem = 0;
    char full[256];

    (void)cube_json_i64(cube_json_get(cube_json_get(spec, "HostConfig"),
                                      "Memory"), &mem);
    sim_image_full(image, full);
    while (*p && (isalnum((unsigned char)*p) || (p > c->name &&
                                                 strchr("_.-", *p))))
        p++;
    if (*c->name && (*p || strlen(c->name) < 2)) {
        (void)snprintf(why, size, "Invalid container name (%s), only "
                       "[a-zA-Z0-9][a-zA-Z0-9_.-] are allowed", c->name);
        return 400;
    }
    if (mem > 0 && mem < 6291456) {
        (void)snprintf(why, size, "Minimum memory limit allowed is 6MB");
        return 400;
    }
    if (!sim_has_image(c->e, image)) {
        (void)snprintf(why, size, "No such image: %s", full);
        return 404;
    }
    if (*c->name && other && !strcmp(other->name, c->name)) {
        (void)snprintf(why, size, "Conflict. The container name \"/%s\" is "
                       "already in use by container \"%s\". You have to remove "
                       "(or rename) that container to be able to reuse that "
                       "name.", c->name, other->id);
        return 409;
    }
    return 0;
}

/* Its ports: those exposed, then those only bound. */
static void sim_box_ports(struct sim_box *b)
{
    struct json_value_s *lists[2] = {
        cube_json_get(b->spec, "ExposedPorts"),
        cube_json_get(cube_json_get(b->spec, "HostConfig"), "PortBindings")};

    for (int i = 0; i < 2; i++) {
        for (struct json_object_element_s *m = cube_json_members(lists[i]);
             m && b->port_count < SIM_PORTS; m = m->next) {
            if (i == 1 && cube_json_get(lists[0], m->name->string))
                continue;
            (void)snprintf(b->ports[b->port_count++].port, 32, "%s",
                           m->name->string);
        }
    }
}

static struct sim_box *sim_box_new(struct sim_call *c)
{
    struct sim_engine *e = c->e;
    struct sim_box *b = cube_alloc(sizeof *b);

    b->e = e;
    e->made++;
    for (int i = 0; i < 4; i++)
        (void)snprintf(b->id + i * 16, 17, "%016llx",
                       (unsigned long long)sim_random(e));
    if (*c->name)
        (void)snprintf(b->name, sizeof b->name, "%s", c->name);
    else
        (void)snprintf(b->name, sizeof b->name, "sim_%u", e->made);
    b->text = cube_text_ndup(c->body.data, c->body.len);
    b->spec = cube_json_parse(b->text, c->body.len, NULL);
    (void)snprintf(b->image, sizeof b->image, "%s",
                   sim_text(b->spec, "Image"));
    b->created_ns = sim_now_ns(e);
    b->end_ms = SIM_NEVER;
    sim_box_ports(b);
    for (struct json_object_element_s *m = cube_json_members(sim_labels(b));
         m && b->label_count < SIM_LABELS; m = m->next) {
        const char *value = cube_json_str(m->value, NULL);

        b->labels[b->label_count].name = m->name->string;
        b->labels[b->label_count++].value = value ? value : "";
    }
    cube_list_add(&e->boxes, &b->link);
    return b;
}

static void sim_do_create(struct sim_call *c)
{
    struct json_value_s *spec =
        cube_json_parse(c->body.data ? c->body.data : "", c->body.len, NULL);
    char why[700] = "";
    struct sim_box *b;
    int status;

    if (!spec) {
        sim_refuse(c, 500, "%s", c->body.len ? "unexpected EOF" : "EOF");
        return;
    }
    status = sim_judge(c, spec, why, sizeof why);
    cube_json_free(spec);
    if (status) {
        c->e->counts.conflicts += status == 409;
        sim_refuse(c, status, "%s", why);
        return;
    }
    b = sim_box_new(c);
    c->e->counts.creates++;
    sim_tell(b, "create", "");
    (void)snprintf(why, sizeof why, "{\"Id\":\"%s\",\"Warnings\":[]}\n", b->id);
    sim_answer(c, 201, why);
}

static void sim_do_start(struct sim_call *c)
{
    struct sim_box *b = sim_asked(c);
    int status;

    if (!b)
        return;
    if (b->state == SIM_RUNNING) {
        sim_answer(c, 304, NULL);
        return;
    }
    if (c->e->is_stopping) {
        sim_refuse(c, 500, "transport is closing: unavailable");
        return;
    }
    status = sim_start(b);
    if (status)
        sim_refuse(c, status, "%s", b->error);
    else
        sim_answer(c, 204, NULL);
}

/* The grace of a stop is over. */
static void sim_grace_over(void *arg)
{
    struct sim_call *c = arg;

    if (c->e->faults.is_hung)
        c->is_ripe = true;
    else if (c->ending)
        sim_signal(c->ending, 9);
}

static void sim_do_stop(struct sim_call *c)
{
    struct sim_box *b = sim_asked(c);

    if (!b)
        return;
    if (b->state != SIM_RUNNING) {
        sim_answer(c, 304, NULL);
        return;
    }
    c->ending = b;
    cube_timer_set(c->e->loop, &c->timer, (int64_t)c->grace_s * 1000,
                   sim_grace_over, c);
    sim_signal(b, 15);
}

static void sim_do_kill(struct sim_call *c)
{
    struct sim_box *b = sim_find(c->e, c->id);

    if (!b) {
        sim_refuse(c, 404, "Cannot kill container: %s: No such container: %s",
                   c->id, c->id);
    } else if (b->state != SIM_RUNNING) {
        sim_refuse(c, 409, "Cannot kill container: %s: Container %s is not "
                   "running", c->id, b->id);
    } else {
        c->ending = b;
        sim_signal(b, 9);
    }
}

static void sim_do_remove(struct sim_call *c)
{
    struct sim_box *b = sim_asked(c);

    if (!b)
        return;
    if (b->state == SIM_RUNNING && !c->is_forced) {
        sim_refuse(c, 409, "You cannot remove a running container %s. Stop "
                   "the container before attempting removal or force remove",
                   b->id);
        return;
    }
    sim_remove(b);
    sim_answer(c, 204, NULL);
}

/* "2025-03-01T10:11:12.5Z", or the engine's "never". */
static void sim_put_time(struct cube_buf *out, int64_t ns)
{
    struct cube_time t = cube_time_from_ns(ns);

    if (ns)
        cube_json_put_time(out, &t);
    else
        cube_buf_puts(out, "\"0001-01-01T00:00:00Z\"");
}

/* {"80/tcp":[{"HostIp":"0.0.0.0","HostPort":"32768"}],"81/tcp":null} */
static void sim_put_ports(struct cube_buf *out, const struct sim_box *b)
{
    cube_buf_addc(out, '{');
    for (size_t i = 0; b->state == SIM_RUNNING && i < b->port_count; i++) {
        cube_buf_puts(out, i ? "," : "");
        cube_json_put_text(out, b->ports[i].port);
        if (b->ports[i].host)
            cube_buf_printf(out, ":[{\"HostIp\":\"0.0.0.0\",\"HostPort\":"
                            "\"%d\"},{\"HostIp\":\"::\",\"HostPort\":\"%d\"}]",
                            b->ports[i].host, b->ports[i].host);
        else
            cube_buf_puts(out, ":null");
    }
    cube_buf_addc(out, '}');
}

static const char *const sim_state_names[] = {"created", "running", "exited"};

static void sim_put_state(struct cube_buf *out, const struct sim_box *b)
{
    cube_buf_printf(out, "{\"Status\":\"%s\",\"Running\":%s,\"Paused\":false,"
                    "\"Restarting\":false,\"OOMKilled\":%s,\"Dead\":false,"
                    "\"Pid\":%d,\"ExitCode\":%d,\"Error\":",
                    sim_state_names[b->state],
                    b->state == SIM_RUNNING ? "true" : "false",
                    b->is_oom ? "true" : "false",
                    b->state == SIM_RUNNING ? 4711 : 0, b->code);
    cube_json_put_text(out, b->error);
    cube_buf_puts(out, ",\"StartedAt\":");
    sim_put_time(out, b->started_ns);
    cube_buf_puts(out, ",\"FinishedAt\":");
    sim_put_time(out, b->ended_ns);
    cube_buf_addc(out, '}');
}

/* Its labels, as they came; "{}" when there were none. */
static void sim_put_labels(struct cube_buf *out, const struct sim_box *b)
{
    const char *comma = "";

    cube_buf_addc(out, '{');
    for (struct json_object_element_s *m = cube_json_members(sim_labels(b));
         m; m = m->next) {
        const char *value = cube_json_str(m->value, NULL);

        cube_buf_puts(out, comma);
        cube_json_put_text(out, m->name->string);
        cube_buf_addc(out, ':');
        cube_json_put_text(out, value ? value : "");
        comma = ",";
    }
    cube_buf_addc(out, '}');
}

static void sim_do_inspect(struct sim_call *c)
{
    struct sim_box *b = sim_asked(c);
    struct cube_buf out = {0};

    if (!b)
        return;
    cube_buf_printf(&out, "{\"Id\":\"%s\",\"Created\":", b->id);
    sim_put_time(&out, b->created_ns);
    cube_buf_puts(&out, ",\"State\":");
    sim_put_state(&out, b);
    cube_buf_printf(&out, ",\"Name\":\"/%s\",\"RestartCount\":0,\"Config\":{"
                    "\"Tty\":false,\"Image\":", b->name);
    cube_json_put_text(&out, b->image);
    cube_buf_puts(&out, ",\"Labels\":");
    sim_put_labels(&out, b);
    cube_buf_puts(&out, "},\"NetworkSettings\":{\"Ports\":");
    sim_put_ports(&out, b);
    cube_buf_puts(&out, "}}\n");
    sim_answer(c, 200, out.data);
    cube_buf_free(&out);
}

static void sim_do_list(struct sim_call *c)
{
    struct json_value_s *filters =
        cube_json_parse(c->filters, strlen(c->filters), NULL);
    struct cube_buf out = {0};
    int n = 0;

    cube_buf_addc(&out, '[');
    for (struct cube_list *l = c->e->boxes.prev;
         l != &c->e->boxes && (!c->limit || n < c->limit); l = l->prev) {
        struct sim_box *b = CUBE_OF(l, struct sim_box, link);

        if ((!c->is_all && !c->limit && b->state != SIM_RUNNING) ||
            !sim_matches(cube_json_get(filters, "label"), sim_labels(b)))
            continue;
        cube_buf_printf(&out, "%s{\"Id\":\"%s\",\"Names\":[\"/%s\"],\"Image\":",
                        n++ ? "," : "", b->id, b->name);
        cube_json_put_text(&out, b->image);
        cube_buf_puts(&out, ",\"Labels\":");
        sim_put_labels(&out, b);
        cube_buf_printf(&out, ",\"State\":\"%s\",\"Status\":\"%s\"}",
                        sim_state_names[b->state], sim_state_names[b->state]);
    }
    cube_buf_puts(&out, "]\n");
    sim_answer(c, 200, out.data);
    cube_buf_free(&out);
    cube_json_free(filters);
}

/* From a call to a stream; NULL: its client has gone. */
static struct sim_stream *sim_do_stream(struct sim_call *c, const char *type)
{
    struct sim_stream *s = NULL;

    if (c->req) {
        cube_http_on_gone(c->req, NULL, NULL);
        cube_http_reply_header(c->req, "Api-Version", c->e->api);
        s = sim_stream_new(c->e, c->req, type);
    }
    return s;
}

static void sim_do_events(struct sim_call *c)
{
    struct sim_engine *e = c->e;
    struct sim_stream *s = sim_do_stream(c, "application/json");

    if (s) {
        s->filters = cube_json_parse(c->filters, strlen(c->filters), NULL);
        s->event = e->event_count;
        while (c->is_since && s->event > 0 &&
               s->event + SIM_EVENTS > e->event_count &&
               e->event_ns[(s->event - 1) % SIM_EVENTS] >= c->since_ns)
            s->event--;
        (void)sim_stream_pump(s);
        if (c->is_until) /* which nobody asks for but of the past */
            sim_stream_end(s);
    }
    sim_call_free(c);
}

/* Where its last `tail` frames begin. */
static size_t sim_tail(const struct cube_buf *log, int tail)
{
    size_t starts[64] = {0}, n = 0;

    for (size_t at = 0; at + 8 <= log->len;) {
        const unsigned char *p = (const unsigned char *)log->data + at;

        starts[n++ % 64] = at;
        at += 8 + ((size_t)p[4] << 24 | (size_t)p[5] << 16 |
                   (size_t)p[6] << 8 | p[7]);
    }
    if (tail < 0 || (size_t)tail >= n)
        return 0;
    return tail == 0 ? log->len : starts[(n - (size_t)tail) % 64];
}

static void sim_do_logs(struct sim_call *c)
{
    struct sim_engine *e = c->e;
    struct sim_box *b = sim_asked(c);
    struct sim_stream *s = b ? sim_do_stream(c, NULL) : NULL;

    if (!b)
        return;
    if (s) {
        s->sent = sim_tail(&b->log, c->tail);
        if (!c->is_following) {
            cube_http_stream_write(s->req, b->log.data + s->sent,
                                   b->log.len - s->sent);
            sim_stream_end(s);
        } else {
            s->box = b;
        }
    }
    sim_call_free(c);
    sim_pump(e);
}

static void sim_do_wait(struct sim_call *c)
{
    struct sim_engine *e = c->e;
    struct sim_box *b = sim_asked(c);
    struct sim_stream *s = b ? sim_do_stream(c, "application/json") : NULL;

    if (!b)
        return;
    if (s) {
        s->box = b;
        s->is_wait = true;
    }
    sim_call_free(c);
    sim_pump(e);
}

/* ---- Pulls ---- */

enum sim_fate { SIM_PULLED, SIM_MISSING, SIM_ERROR, SIM_CUT };

#define SIM_STEPS 8

/* What will become of it. An image whose name says "nosuch" is nowhere. */
static enum sim_fate sim_pull_fate(struct sim_call *c)
{
    struct sim_engine *e = c->e;

    e->counts.pulls++;
    if (strstr(c->from, "nosuch"))
        return SIM_MISSING;
    if (sim_strikes(e, e->faults.pull_missing, &e->counts.pull_missing))
        return SIM_MISSING;
    if (sim_strikes(e, e->faults.pull_error, &e->counts.pull_error))
        return SIM_ERROR;
    if (sim_strikes(e, e->faults.pull_cut, &e->counts.pull_cut))
        return SIM_CUT;
    return SIM_PULLED;
}

static void sim_pull_line(struct sim_call *c)
{
    char line[300];

    if (c->step == 0)
        (void)snprintf(line, sizeof line, "{\"status\":\"Pulling from %.150s\","
                       "\"id\":\"%.50s\"}\r\n", c->from, c->tag);
    else if (c->step == SIM_STEPS - 1)
        (void)snprintf(line, sizeof line, "{\"status\":\"Pull complete\","
                       "\"progressDetail\":{},\"id\":\"a2abf6c4d29d\"}\r\n");
    else
        (void)snprintf(line, sizeof line, "{\"status\":\"Downloading\","
                       "\"progressDetail\":{\"current\":%d,\"total\":7000000},"
                       "\"id\":\"a2abf6c4d29d\"}\r\n", c->step * 1000000);
    cube_http_stream_write(c->req, line, strlen(line));
}

/* The last step. An engine that stops gives its pulls up. */
static void sim_pull_end(struct sim_call *c)
{
    static const char error[] =
        "{\"errorDetail\":{\"message\":\"unexpected EOF\"},"
        "\"error\":\"unexpected EOF\"}\r\n";
    char image[600];

    cube_http_on_gone(c->req, NULL, NULL);
    if (c->fate == SIM_CUT) {
        cube_http_stream_abort(c->req);
    } else {
        (void)snprintf(image, sizeof image, "%s%s%s", c->from,
                       strchr(c->tag, ':') ? "@" : ":", c->tag);
        if (c->fate == SIM_PULLED)
            sim_engine_add_image(c->e, image);
        else
            cube_http_stream_write(c->req, error, sizeof error - 1);
        cube_http_stream_end(c->req);
    }
    sim_call_free(c);
}

static void sim_pull_step(void *arg)
{
    struct sim_call *c = arg;
    struct sim_engine *e = c->e;
    int64_t ms = e->pull_ms * e->latency / 100 / SIM_STEPS;

    if (e->faults.is_hung) {
        c->is_ripe = true;
        return;
    }
    sim_pull_line(c);
    if (++c->step == SIM_STEPS || (c->fate != SIM_PULLED && c->step == 3)) {
        sim_pull_end(c);
        return;
    }
    if (c->is_slow && e->faults.pull_slow > 0)
        ms *= 20;
    cube_timer_set(e->loop, &c->timer, ms, sim_pull_step, c);
}

static void sim_do_pull(struct sim_call *c)
{
    if (!c->req) {
        sim_call_free(c);
        return;
    }
    c->fate = (int)sim_pull_fate(c);
    if (c->fate == SIM_MISSING) {
        sim_refuse(c, 404, "manifest for %s:%s not found: manifest unknown: "
                   "manifest unknown", c->from, c->tag);
        return;
    }
    c->is_slow = sim_strikes(c->e, c->e->faults.pull_slow,
                             &c->e->counts.pull_slow);
    cube_http_reply_header(c->req, "Api-Version", c->e->api);
    cube_http_stream(c->req, 200, "application/json");
    c->is_pulling = true;
    sim_pull_step(c);
}

/* ---- From a request to its act ---- */

static const struct sim_route sim_routes[] = {
    {"GET", "/_ping", "", sim_do_ping, 1, false},
    {"GET", "/info", "", sim_do_info, 20, false},
    {"GET", "/events", "", sim_do_events, 1, false},
    {"GET", "/containers/json", "", sim_do_list, 2, false},
    {"GET", "/images/", "/json", sim_do_image, 2, false},
    {"POST", "/images/create", "", sim_do_pull, 30, false},
    {"POST", "/containers/create", "", sim_do_create, 40, true},
    {"GET", "/containers/", "/json", sim_do_inspect, 1, false},
    {"GET", "/containers/", "/logs", sim_do_logs, 1, false},
    {"POST", "/containers/", "/start", sim_do_start, 500, true},
    {"POST", "/containers/", "/stop", sim_do_stop, 5, true},
    {"POST", "/containers/", "/kill", sim_do_kill, 5, true},
    {"POST", "/containers/", "/wait", sim_do_wait, 1, false},
    {"DELETE", "/containers/", "", sim_do_remove, 100, true},
};

/* The route of a path without its version; what stands in its middle goes
 * into `id`. */
static const struct sim_route *sim_route_of(const char *method,
                                            const char *path, char id[300])
{
    size_t len = strlen(path);

    for (size_t i = 0; i < sizeof sim_routes / sizeof *sim_routes; i++) {
        const struct sim_route *r = &sim_routes[i];
        size_t a = strlen(r->before), b = strlen(r->after);
        bool has_id = r->before[a - 1] == '/';

        if (strcmp(method, r->method) || strncmp(path, r->before, a) ||
            len < a + b || strcmp(path + len - b, r->after) ||
            has_id != (len > a + b))
            continue;
        (void)snprintf(id, 300, "%.*s", (int)(len - a - b), path + a);
        if (!*r->after && strchr(id, '/'))
            continue;
        return r;
    }
    return NULL;
}

/* Its time has come. */
static void sim_call_due(void *arg)
{
    struct sim_call *c = arg;
    struct sim_engine *e = c->e;

    if (e->faults.is_hung) {
        c->is_ripe = true;
        return;
    }
    if (sim_strikes(e, e->faults.error, &e->counts.errors))
        c->is_spoiled = true;
    else if (sim_strikes(e, e->faults.cut, &e->counts.cuts))
        c->is_cut = true;
    if ((c->is_spoiled || c->is_cut) &&
        (!c->route->is_deed || sim_below(e, 2) == 0))
        sim_answer(c, 500, NULL);
    else
        c->route->act(c);
}

/* Its client has gone: nobody hears the answer, and a pull ends. */
static void sim_call_gone(void *arg)
{
    struct sim_call *c = arg;

    c->req = NULL;
    if (c->is_pulling)
        sim_call_free(c);
}

static int sim_number(struct cube_http_req *req, const char *name, int other)
{
    const char *text = cube_http_query(req, name);

    return text && *text ? atoi(text) : other;
}

static bool sim_flag(struct cube_http_req *req, const char *name)
{
    const char *text = cube_http_query(req, name);

    return text && *text && strcmp(text, "0") && strcmp(text, "false");
}

static void sim_copy(char *to, size_t size, struct cube_http_req *req,
                     const char *name)
{
    const char *text = cube_http_query(req, name);

    (void)snprintf(to, size, "%s", text ? text : "");
}

static struct sim_call *sim_call_new(struct sim_engine *e,
                                     struct cube_http_req *req,
                                     const struct sim_route *route)
{
    struct sim_call *c = cube_alloc(sizeof *c);
    const char *filters = cube_http_query(req, "filters");
    const char *since = cube_http_query(req, "since");
    size_t len;
    const char *body = cube_http_body(req, &len);

    c->e = e;
    c->req = req;
    c->route = route;
    cube_buf_add(&c->body, body, len);
    sim_copy(c->name, sizeof c->name, req, "name");
    sim_copy(c->from, sizeof c->from, req, "fromImage");
    sim_copy(c->tag, sizeof c->tag, req, "tag");
    c->filters = cube_text_dup(filters ? filters : "{}");
    c->grace_s = sim_number(req, "t", 10);
    c->limit = sim_number(req, "limit", 0);
    c->tail = sim_number(req, "tail", -1);
    if (cube_http_query(req, "tail") &&
        !strcmp(cube_http_query(req, "tail"), "all"))
        c->tail = -1;
    c->is_all = sim_flag(req, "all");
    c->is_forced = sim_flag(req, "force");
    c->is_following = sim_flag(req, "follow");
    c->is_since = since && *since;
    c->is_until = cube_http_query(req, "until") != NULL;
    c->since_ns = c->is_since ? (int64_t)(strtod(since, NULL) * 1e9) : 0;
    cube_list_add(&e->calls, &c->link);
    cube_http_on_gone(req, sim_call_gone, c);
    return c;
}

/* 1041 of "1.41" or "v1.41/...". */
static int sim_version(const char *text)
{
    int major = 0, minor = 0;

    (void)sscanf(text + (*text == 'v'), "%d.%d", &major, &minor);
    return major * 1000 + minor;
}

/* Refuses a version that it does not speak; true: it did. */
static bool sim_is_other_version(struct sim_engine *e, struct cube_http_req *q,
                                 const char *path)
{
    int version = sim_version(path + 1);
    bool is_old = version < sim_version(e->oldest);
    char text[200];

    if (version > sim_version(e->api))
        (void)snprintf(text, sizeof text, "{\"message\":\"client version %d.%d "
                       "is too new. Maximum supported API version is %s\"}\n",
                       version / 1000, version % 1000, e->api);
    else if (is_old) /* by another part of it, in plain text */
        (void)snprintf(text, sizeof text, "client version %d.%d is too old. "
                       "Minimum supported API version is %s, please upgrade "
                       "your client to a newer version\n", version / 1000,
                       version % 1000, e->oldest);
    else
        return false;
    cube_http_reply_header(q, "Api-Version", e->api);
    cube_http_reply(q, 400, is_old ? "text/plain; charset=utf-8"
                                   : "application/json", text, strlen(text));
    return true;
}

static void sim_on_request(void *arg, struct cube_http_req *req)
{
    static const char unknown[] = "{\"message\":\"page not found\"}\n";
    struct sim_engine *e = arg;
    const char *path = cube_http_path(req);
    bool has_version = path[1] == 'v' && path[2] >= '0' && path[2] <= '9';
    const char *slash = has_version ? strchr(path + 1, '/') : path;
    const struct sim_route *route;
    struct sim_call *c;
    int64_t ms;
    char id[300];

    e->counts.requests++;
    if (has_version && sim_is_other_version(e, req, path))
        return;
    route = slash ? sim_route_of(cube_http_method(req), slash, id) : NULL;
    if (!route) {
        cube_http_reply(req, 404, "application/json", unknown,
                        sizeof unknown - 1);
        return;
    }
    c = sim_call_new(e, req, route);
    (void)snprintf(c->id, sizeof c->id, "%s", id);
    ms = route->ms * e->latency / 100;
    ms += sim_below(e, ms + 1);
    if (sim_strikes(e, e->faults.slow, &e->counts.slow))
        ms = ms * 100 + 100;
    if (ms > 0)
        cube_timer_set(e->loop, &c->timer, ms, sim_call_due, c);
    else
        sim_call_due(c);
}

static const struct cube_http_route sim_http_routes[] = {
    {"GET", "/{a}", sim_on_request},
    {"GET", "/{a}/{b}", sim_on_request},
    {"GET", "/{a}/{b}/{c}", sim_on_request},
    {"GET", "/{a}/{b}/{c}/{d}", sim_on_request},
    {"GET", "/{a}/{b}/{c}/{d}/{e}", sim_on_request},
    {"GET", "/{a}/{b}/{c}/{d}/{e}/{f}", sim_on_request},
    {"POST", "/{a}/{b}", sim_on_request},
    {"POST", "/{a}/{b}/{c}", sim_on_request},
    {"POST", "/{a}/{b}/{c}/{d}", sim_on_request},
    {"DELETE", "/{a}/{b}", sim_on_request},
    {"DELETE", "/{a}/{b}/{c}", sim_on_request},
    {NULL, NULL, NULL},
};

/* ---- The engine ---- */

/* An engine that does not serve yet, with no container and no image. */
static struct sim_engine *sim_engine_new(struct cube_loop *l, uint64_t seed)
{
    struct sim_engine *e = cube_alloc(sizeof *e);

    e->loop = l;
    e->random = seed;
    e->api = "1.41";
    e->oldest = "1.12";
    e->latency = 100;
    e->first_port = e->next_port = 32768;
    e->pull_ms = 4000;
    e->stop_ms = 10000;
    (void)snprintf(e->id, sizeof e->id, "SIM:%016llx",
                   (unsigned long long)sim_random(e));
    cube_list_init(&e->boxes);
    cube_list_init(&e->calls);
    cube_list_init(&e->streams);
    cube_map_init(&e->images, 0);
    cube_map_init(&e->taken, 0);
    return e;
}

/* Requests are taken and not answered, until it is called with false: then
 * all goes on, as after SIGSTOP and SIGCONT. Containers live their lives. */
static void sim_engine_hang(struct sim_engine *e, bool is_hung)
{
    struct cube_list *l = e->calls.next;

    e->counts.hung += is_hung && !e->faults.is_hung;
    e->faults.is_hung = is_hung;
    while (!is_hung && l != &e->calls) {
        struct sim_call *c = CUBE_OF(l, struct sim_call, link);

        l = l->next;
        if (!c->is_ripe)
            continue;
        c->is_ripe = false;
        cube_timer_set(e->loop, &c->timer, 0,
                       c->is_pulling ? sim_pull_step
                       : c->ending   ? sim_grace_over
                                     : sim_call_due, c);
    }
    sim_pump(e);
    sim_settle(e);
}

/* Ends or removes all, as one that comes back, or loses its machine, does. */
static void sim_engine_end_all(struct sim_engine *e, int code, bool is_wiped)
{
    struct cube_list *l = e->boxes.next;

    while (l != &e->boxes) {
        struct sim_box *b = CUBE_OF(l, struct sim_box, link);

        l = l->next;
        if (is_wiped)
            sim_remove(b);
        else
            sim_end(b, code, false);
    }
}

/* Closes its server at once: connections break, calls in flight are lost, of
 * which half were done. Containers are as `how` says. */
static void sim_engine_down(struct sim_engine *e, enum sim_down how)
{
    struct cube_http_server *server = e->server;

    cube_timer_clear(e->loop, &e->stop);
    cube_timer_clear(e->loop, &e->back);
    e->is_stopping = false;
    e->faults.is_hung = false;
    e->server = NULL;
    e->how = how;
    e->counts.downs++;
    cube_http_close(server);
    while (!cube_list_is_empty(&e->calls)) {
        struct sim_call *c = CUBE_OF(e->calls.next, struct sim_call, link);

        cube_timer_clear(e->loop, &c->timer);
        if (!c->ending && how != SIM_POWER && sim_below(e, 2) == 0)
            c->route->act(c); /* req is NULL: nobody is answered */
        else
            sim_call_free(c);
    }
    if (how == SIM_POWER)
        sim_engine_end_all(e, 255, false);
}

/* Serves at `where` ("unix:/path", "127.0.0.1:0"). What it finds of before is
 * treated as sim_engine_down was told. */
static int sim_engine_up(struct sim_engine *e, const char *where,
                         struct cube_err *err)
{
    cube_timer_clear(e->loop, &e->back);
    if (where != e->where)
        (void)snprintf(e->where, sizeof e->where, "%s", where);
    if (e->how == SIM_KILLED)
        sim_engine_end_all(e, 137, false);
    if (e->how == SIM_WIPED)
        sim_engine_end_all(e, 137, true);
    e->counts.kept += e->how == SIM_KEPT;
    e->counts.ended += e->how == SIM_KILLED && e->counts.downs > 0;
    e->counts.wiped += e->how == SIM_WIPED;
    e->counts.powers += e->how == SIM_POWER;
    e->how = SIM_KEPT;
    e->server = cube_http_listen(e->loop, e->where, sim_http_routes, e, NULL,
                                 err);
    return e->server ? 0 : -1;
}

static void sim_engine_is_back(void *arg)
{
    struct sim_engine *e = arg;
    struct cube_err err;

    if (sim_engine_up(e, e->where, &err) < 0) /* somebody has its place */
        cube_timer_set(e->loop, &e->back, 1000, sim_engine_is_back, e);
}

/* Goes down at once, and is back after `away_ms`. */
static void sim_engine_restart(struct sim_engine *e, enum sim_down how,
                               int64_t away_ms)
{
    sim_engine_down(e, how);
    cube_timer_set(e->loop, &e->back, away_ms, sim_engine_is_back, e);
}

/* Looks whether all containers have ended, so that it can go. */
static void sim_engine_stop_step(void *arg)
{
    struct sim_engine *e = arg;
    int64_t away_ms = e->away_ms;

    if (sim_now_ms(e) - e->stopping_ms >= e->stop_ms &&
        !e->is_keeping)
        sim_engine_end_all(e, 137, false);
    if (!e->is_keeping && sim_count(e, SIM_RUNNING, NULL, NULL) > 0) {
        cube_timer_set(e->loop, &e->stop, 100, sim_engine_stop_step, e);
        return;
    }
    sim_engine_down(e, SIM_KEPT);
    if (away_ms >= 0)
        cube_timer_set(e->loop, &e->back, away_ms, sim_engine_is_back, e);
}

/* Stops as on SIGTERM: unless it keeps its containers (is_keeping) it ends
 * them first, by signals, and answers meanwhile, but for starts. Then it is
 * away for `away_ms`; below 0: until sim_engine_up. */
static void sim_engine_stop(struct sim_engine *e, int64_t away_ms)
{
    struct cube_list *l = e->boxes.next;

    if (!e->server || e->is_stopping)
        return;
    e->is_stopping = true;
    e->stopping_ms = sim_now_ms(e);
    e->away_ms = away_ms;
    while (!e->is_keeping && l != &e->boxes) {
        struct sim_box *b = CUBE_OF(l, struct sim_box, link);

        l = l->next;
        if (b->state == SIM_RUNNING)
            sim_signal(b, 15);
    }
    cube_timer_set(e->loop, &e->stop, 100, sim_engine_stop_step, e);
}

/* Leaves its loop, which is about to be freed; only when it is down. Its
 * containers are kept, and live on unseen. */
static void sim_engine_leave(struct sim_engine *e)
{
    CUBE_ASSERT(!e->server);
    cube_timer_clear(e->loop, &e->back);
    cube_timer_clear(e->loop, &e->stop);
    for (struct cube_list *l = e->boxes.next; l != &e->boxes; l = l->next)
        cube_timer_clear(e->loop, &CUBE_OF(l, struct sim_box, link)->end);
    e->loop = NULL;
}

/* On another loop, of the same clock; what has ended meanwhile has. */
static void sim_engine_enter(struct sim_engine *e, struct cube_loop *loop)
{
    e->loop = loop;
    for (struct cube_list *l = e->boxes.next; l != &e->boxes; l = l->next) {
        struct sim_box *b = CUBE_OF(l, struct sim_box, link);
        int64_t in = b->end_ms - sim_now_ms(e);

        if (b->state == SIM_RUNNING && b->end_ms != SIM_NEVER)
            cube_timer_set(loop, &b->end, in > 0 ? in : 0, sim_end_due, b);
    }
}

static void sim_engine_free(struct sim_engine *e)
{
    if (!e)
        return;
    e->on_change = NULL;
    if (e->loop) {
        sim_engine_down(e, SIM_KEPT);
        cube_timer_clear(e->loop, &e->back);
    }
    while (!cube_list_is_empty(&e->boxes))
        sim_box_free(CUBE_OF(e->boxes.next, struct sim_box, link));
    for (int i = 0; i < SIM_EVENTS; i++)
        cube_buf_free(&e->events[i]);
    cube_map_free(&e->images);
    cube_map_free(&e->taken);
    cube_free(e);
}

#endif /* SIM_ENGINE_H */
