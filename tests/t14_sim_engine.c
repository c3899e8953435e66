/*
 * The simulated engine (sim_engine.h). First: it answers as the real one does.
 * One script of requests is played to both, and what they answered is compared
 * line by line: status codes, what chapter 9 reads of each answer, words, and
 * the order of events. CUBE_TEST_DOCKER and CUBE_TEST_PODMAN name the real ones
 * (tools/engine sets them); with CUBE_TEST_ENGINE=required one that is missing
 * is a failure. Podman has an accent of its own, so there only those steps are
 * compared that are said to be the same.
 *
 * Then: the real client lives with each of its faults.
 */
#include "test.h"

#include "jump_world.h"
#include "sim_engine.h"
#include <arpa/inet.h>
#include <sys/socket.h>

static const char real_image[] = "cube-test/busybox:latest";

/* ---- The script ---- */

/* What of an answer is compared, beside its status. */
enum look {
    STATUS,  /* nothing */
    WORDS,   /* "message" */
    BOX,     /* an inspection: state, times, name, label, ports */
    LIST,    /* names and states */
    BYTES,   /* the body, as it is */
    CODE,    /* "StatusCode" */
    EVENTS   /* actions, names, codes, signals */
};

/* In targets and bodies $a is the ID of container a, $N a prefix that is this
 * run's own, $I the image, $P a free port, $Q one that somebody else has, $T
 * the time of the beginning, $U now, $R a registry. */
enum podman { SAME, DIFFERS, NOT }; /* NOT: it is not asked */

struct step {
    const char *method, *target, *body;
    enum look look;
    enum podman podman;
};

#define LABELS "\"Labels\":{\"cube.task\":\"$Nt\",\"cube.worker\":\"$Nw\"}"
#define RUN(cmd) "{\"Image\":\"$I\",\"Cmd\":[" cmd "]," LABELS "}"
#define PORT(cmd, port)                                                     \
    "{\"Image\":\"$I\",\"Cmd\":[" cmd "]," LABELS ",\"ExposedPorts\":{"     \
    "\"80/tcp\":{}},\"HostConfig\":{\"PublishAllPorts\":false,"            \
    "\"PortBindings\":{\"80/tcp\":[{\"HostPort\":\"" port "\"}]}}}"
#define SH(script) "\"sh\",\"-c\",\"" script "\""
#define OURS "filters={\"label\":[\"cube.task=$Nt\"]}"

static const struct step script[] = {
    /* who is there */
    {"GET", "/_ping", NULL, BYTES, SAME},
    {"GET", "/v9.99/info", NULL, WORDS, DIFFERS},
    {"GET", "/v1.1/info", NULL, WORDS, DIFFERS},
    {"GET", "/v1.41/nosuch", NULL, STATUS, SAME},
    {"GET", "/v1.41/images/$I/json", NULL, STATUS, SAME},
    {"GET", "/v1.41/images/nosuch/json", NULL, STATUS, SAME},
    /* what cannot be created */
    {"POST", "/v1.41/containers/create?name=$Na", "", WORDS, DIFFERS},
    {"POST", "/v1.41/containers/create?name=$Na", "{\"Image", WORDS, DIFFERS},
    {"POST", "/v1.41/containers/create?name=$Na", "{\"Image\":\"nosuch\"}",
     WORDS, DIFFERS},
    {"POST", "/v1.41/containers/create?name=$Na", "{\"Image\":\"nosuch:9\"}",
     STATUS, SAME},
    {"POST", "/v1.41/containers/create?name=-$Na", RUN("\"true\""), WORDS,
     NOT},
    {"POST", "/v1.41/containers/create?name=x", RUN("\"true\""), WORDS, NOT},
    {"POST", "/v1.41/containers/create?name=$Na", "{\"Image\":\"$I\","
     "\"HostConfig\":{\"Memory\":1000}}", WORDS, NOT},
    /* a life: created, running, killed, started again, stopped, removed */
    {"POST", "/v1.41/containers/create?name=$Na", PORT("\"sleep\",\"100\"",
     "$P"), STATUS, SAME},
    {"POST", "/v1.41/containers/create?name=$Na", RUN("\"true\""), WORDS,
     DIFFERS},
    {"GET", "/v1.41/containers/$a/json", NULL, BOX, DIFFERS},
    {"POST", "/v1.41/containers/$a/kill", NULL, WORDS, DIFFERS},
    {"POST", "/v1.41/containers/$a/stop?t=1", NULL, STATUS, DIFFERS},
    {"GET", "/v1.41/containers/json?" OURS, NULL, LIST, SAME},
    {"GET", "/v1.41/containers/json?all=1&" OURS, NULL, LIST, SAME},
    {"POST", "/v1.41/containers/$a/start", NULL, STATUS, SAME},
    {"POST", "/v1.41/containers/$a/start", NULL, STATUS, SAME},
    {"GET", "/v1.41/containers/$a/json", NULL, BOX, DIFFERS},
    {"GET", "/v1.41/containers/$Na/json", NULL, BOX, DIFFERS},
    {"GET", "/v1.41/containers/json?" OURS, NULL, LIST, SAME},
    {"DELETE", "/v1.41/containers/$a", NULL, WORDS, DIFFERS},
    /* ports that are taken */
    {"POST", "/v1.41/containers/create?name=$Nb", PORT("\"sleep\",\"100\"",
     "$P"), STATUS, SAME},
    {"POST", "/v1.41/containers/$b/start", NULL, WORDS, DIFFERS},
    {"GET", "/v1.41/containers/$b/json", NULL, BOX, DIFFERS},
    {"DELETE", "/v1.41/containers/$b", NULL, STATUS, SAME},
    {"POST", "/v1.41/containers/create?name=$Nc", PORT("\"sleep\",\"100\"",
     "$Q"), STATUS, SAME},
    {"POST", "/v1.41/containers/$c/start", NULL, WORDS, DIFFERS},
    {"DELETE", "/v1.41/containers/$c", NULL, STATUS, SAME},
    /* ends */
    {"POST", "/v1.41/containers/$a/kill", NULL, STATUS, SAME},
    {"POST", "/v1.41/containers/$a/wait", NULL, CODE, SAME},
    {"GET", "/v1.41/containers/$a/json", NULL, BOX, DIFFERS},
    {"POST", "/v1.41/containers/$a/start", NULL, STATUS, SAME},
    {"POST", "/v1.41/containers/$a/stop?t=1", NULL, STATUS, SAME},
    {"GET", "/v1.41/containers/$a/json", NULL, BOX, DIFFERS},
    {"POST", "/v1.41/containers/$a/stop?t=1", NULL, STATUS, SAME},
    {"DELETE", "/v1.41/containers/$a?force=1&v=1", NULL, STATUS, SAME},
    {"GET", "/v1.41/containers/json?all=1&" OURS, NULL, LIST, SAME},
    /* nobody */
    {"GET", "/v1.41/containers/$a/json", NULL, WORDS, DIFFERS},
    {"POST", "/v1.41/containers/$a/start", NULL, WORDS, DIFFERS},
    {"POST", "/v1.41/containers/$a/stop", NULL, WORDS, DIFFERS},
    {"POST", "/v1.41/containers/$a/kill", NULL, WORDS, DIFFERS},
    {"GET", "/v1.41/containers/$a/logs?stdout=1", NULL, WORDS, DIFFERS},
    {"DELETE", "/v1.41/containers/$a?force=1&v=1", NULL, WORDS, DIFFERS},
    {"POST", "/v1.41/containers/$a/stop", NULL, STATUS, SAME},
    {"DELETE", "/v1.41/containers/$a?force=1&v=1", NULL, STATUS, SAME},
    /* a command that is none */
    {"POST", "/v1.41/containers/create?name=$Nd", RUN("\"nosuchcommand\""),
     STATUS, SAME},
    {"POST", "/v1.41/containers/$d/start", NULL, WORDS, DIFFERS},
    {"GET", "/v1.41/containers/$d/json", NULL, BOX, DIFFERS},
    {"DELETE", "/v1.41/containers/$d?force=1&v=1", NULL, STATUS, SAME},
    /* output, and a code of its own */
    {"POST", "/v1.41/containers/create?name=$Ne",
     RUN(SH("echo one; echo two; exit 3")), STATUS, SAME},
    {"POST", "/v1.41/containers/$e/start", NULL, STATUS, SAME},
    {"POST", "/v1.41/containers/$e/wait", NULL, CODE, SAME},
    {"GET", "/v1.41/containers/$e/json", NULL, BOX, SAME},
    {"GET", "/v1.41/containers/$e/logs?stdout=1&stderr=1&tail=all", NULL,
     BYTES, SAME},
    {"GET", "/v1.41/containers/$e/logs?stdout=1&stderr=1&tail=1", NULL, BYTES,
     SAME},
    {"GET", "/v1.41/containers/$e/logs?stdout=1&stderr=1&follow=1&tail=all",
     NULL, BYTES, SAME},
    {"DELETE", "/v1.41/containers/$e?force=1&v=1", NULL, STATUS, SAME},
    /* one that heeds SIGTERM, removed as it runs */
    {"POST", "/v1.41/containers/create?name=$Nf",
     RUN(SH("trap 'exit 4' TERM; sleep 100 & wait")), STATUS, SAME},
    {"POST", "/v1.41/containers/$f/start", NULL, STATUS, SAME},
    {"POST", "/v1.41/containers/$f/stop?t=5", NULL, STATUS, SAME},
    {"GET", "/v1.41/containers/$f/json", NULL, BOX, SAME},
    {"POST", "/v1.41/containers/$f/start", NULL, STATUS, SAME},
    {"DELETE", "/v1.41/containers/$f?force=1&v=1", NULL, STATUS, SAME},
    /* killed for its memory */
    {"POST", "/v1.41/containers/create?name=$Ng", "{\"Image\":\"$I\",\"Cmd\":["
     SH("a=xxxxxxxxxxxxxxxx; while :; do a=$a$a; done") "]," LABELS
     ",\"HostConfig\":{\"Memory\":8000000}}", STATUS, SAME},
    {"POST", "/v1.41/containers/$g/start", NULL, STATUS, SAME},
    {"POST", "/v1.41/containers/$g/wait", NULL, CODE, SAME},
    {"GET", "/v1.41/containers/$g/json", NULL, BOX, DIFFERS},
    {"DELETE", "/v1.41/containers/$g?force=1&v=1", NULL, STATUS, SAME},
    /* pulls */
    {"POST", "/v1.41/images/create?fromImage=$R/nosuch&tag=latest", NULL,
     WORDS, DIFFERS},
    {"POST", "/v1.41/images/create?fromImage=$R/cube-test/busybox&tag=latest",
     NULL, STATUS, SAME},
    /* all of it again, as events */
    {"GET", "/v1.41/events?since=$T&until=$U&filters={\"type\":[\"container\"]"
     ",\"label\":[\"cube.task=$Nt\"]}", NULL, EVENTS, DIFFERS},
};

/* ---- One side of the comparison ---- */

struct side {
    const char *name;
    struct jump_world world; /* the simulated one's */
    struct cube_loop *loop;
    struct cube_http_client *client;
    struct sim_engine *e;    /* NULL: a real one */
    char prefix[20], port[8], other[8], registry[60], since[30];
    char ids[26][80];
    int stranger; /* who listens on `other` */
    struct cube_buf answers[COUNT(script)]; /* as they are compared */
    int status;
    bool is_done;
    struct cube_buf body;
};

static void replace(struct cube_buf *b, const char *from, const char *to)
{
    struct cube_buf out = {0};
    char *at = b->data, *found;

    while (*from && at && (found = strstr(at, from)) != NULL) {
        cube_buf_add(&out, at, (size_t)(found - at));
        cube_buf_puts(&out, to);
        at = found + strlen(from);
    }
    cube_buf_puts(&out, at ? at : "");
    cube_buf_free(b);
    *b = out;
}

/* Seconds since 1970, as the engine takes them. */
static void put_now(struct side *s, char out[30])
{
    const struct cube_world *w = cube_loop_world(s->loop);
    long long now = w->wall_ns(w->ctx);

    (void)snprintf(out, 30, "%lld.%09lld", now / 1000000000, now % 1000000000);
}

/* The dollars; see the script. `is_target`: percent-encodes what must be. */
static void expand(struct side *s, const char *text, bool is_target,
                   struct cube_buf *out)
{
    char ids[2] = "a", dollar[3] = "$a", until[30];

    put_now(s, until);
    cube_buf_puts(out, text);
    replace(out, "$N", s->prefix);
    replace(out, "$I", real_image);
    replace(out, "$P", s->port);
    replace(out, "$Q", s->other);
    replace(out, "$R", s->registry);
    replace(out, "$T", s->since);
    replace(out, "$U", until);
    for (*ids = 'a'; is_target && *ids <= 'z'; ids[0]++) {
        dollar[1] = *ids;
        replace(out, dollar, s->ids[*ids - 'a']);
    }
    if (is_target) {
        replace(out, "{", "%7B");
        replace(out, "}", "%7D");
        replace(out, "[", "%5B");
        replace(out, "]", "%5D");
        replace(out, "\"", "%22");
    }
}

static void on_answer(void *arg, const struct cube_http_answer *a)
{
    struct side *s = arg;

    s->is_done = true;
    s->status = a->status;
    cube_buf_clear(&s->body);
    cube_buf_add(&s->body, a->body, a->body_len);
    if (a->err)
        FAIL("%s: %s", s->name, a->err->text);
}

static void ask(struct side *s, const struct step *t)
{
    struct cube_buf target = {0}, body = {0};
    struct cube_http_request r;
    int64_t end = cube_loop_now_ms(s->loop) + 60000;

    expand(s, t->target, true, &target);
    expand(s, t->body ? t->body : "", false, &body);
    memset(&r, 0, sizeof r);
    r.method = t->method;
    r.target = target.data;
    r.body = body.data;
    r.body_len = body.len;
    r.on_done = on_answer;
    r.arg = s;
    s->is_done = false;
    (void)cube_http_call(s->client, &r);
    while (!s->is_done && cube_loop_now_ms(s->loop) < end)
        (void)cube_loop_turn(s->loop, 100, NULL);
    if (!s->is_done)
        FAIL("%s: no answer to %s %s", s->name, t->method, target.data);
    cube_buf_free(&target);
    cube_buf_free(&body);
}

/* ---- What is compared of an answer ---- */

/* Each of 64 hexadecimal digits is an ID, and none is like another. */
static void hide_ids(struct cube_buf *b)
{
    char id[65];

    for (size_t i = 0; i + 64 <= b->len; i++) {
        if (strspn(b->data + i, "0123456789abcdef") < 64)
            continue;
        memcpy(id, b->data + i, 64);
        id[64] = 0;
        replace(b, id, "ID");
    }
}

static void put_ports(struct side *s, struct json_value_s *ports,
                      struct cube_buf *out)
{
    for (struct json_object_element_s *m = cube_json_members(ports); m;
         m = m->next) {
        struct json_array_element_s *first = cube_json_items(m->value);
        const char *host = first ? sim_text(first->value, "HostPort") : "";

        cube_buf_printf(out, " %s=%s", m->name->string,
                        !strcmp(host, s->port) ? "PORT" : *host ? "any" : "-");
    }
}

static void put_box(struct side *s, struct json_value_s *root,
                    struct cube_buf *out)
{
    struct json_value_s *state = cube_json_get(root, "State");
    struct json_value_s *config = cube_json_get(root, "Config");
    static const char *const flags[] = {"Running", "OOMKilled"};
    static const char *const times[] = {"StartedAt", "FinishedAt"};
    int64_t code = -1;

    (void)cube_json_i64(cube_json_get(state, "ExitCode"), &code);
    cube_buf_printf(out, " %s %s code=%d error='%s'", sim_text(root, "Name"),
                    sim_text(state, "Status"), (int)code,
                    sim_text(state, "Error"));
    for (int i = 0; i < 2; i++) {
        bool is = false;

        (void)cube_json_bool(cube_json_get(state, flags[i]), &is);
        cube_buf_printf(out, "%s%s", is ? " " : "", is ? flags[i] : "");
    }
    for (int i = 0; i < 2; i++)
        cube_buf_printf(out, " %s=%d", times[i],
                        !cube_text_starts(sim_text(state, times[i]), "0001"));
    cube_buf_printf(out, " %s", sim_text(cube_json_get(config, "Labels"),
                                         "cube.task"));
    put_ports(s, cube_json_get(cube_json_get(root, "NetworkSettings"),
                               "Ports"), out);
}

static void put_list(struct json_value_s *root, struct cube_buf *out)
{
    for (struct json_array_element_s *i = cube_json_items(root); i;
         i = i->next) {
        struct json_array_element_s *name =
            cube_json_items(cube_json_get(i->value, "Names"));

        cube_buf_printf(out, " %s %s %s", name ? cube_json_str(name->value,
                                                               NULL) : "",
                        sim_text(i->value, "State"),
                        sim_text(cube_json_get(i->value, "Labels"),
                                 "cube.worker"));
    }
}

static void put_event(void *arg, struct json_value_s *event)
{
    struct json_value_s *actor = cube_json_get(event, "Actor");
    struct json_value_s *more = cube_json_get(actor, "Attributes");

    cube_buf_printf(arg, "\n    %s %s %s %s%s", sim_text(event, "Type"),
                    sim_text(event, "Action"), sim_text(more, "name"),
                    sim_text(more, "exitCode"), sim_text(more, "signal"));
}

static void put_answer(struct side *s, enum look look, struct cube_buf *out)
{
    struct json_value_s *root =
        cube_json_parse(s->body.data ? s->body.data : "", s->body.len, NULL);
    struct cube_objects objects;
    int64_t code = -1;

    cube_buf_printf(out, "%d", s->status);
    switch (look) {
    case STATUS: break;
    case WORDS:
        cube_buf_printf(out, " %s", root ? sim_text(root, "message")
                                         : s->body.data);
        break;
    case BOX: put_box(s, root, out); break;
    case LIST: put_list(root, out); break;
    case BYTES:
        for (size_t i = 0; i < s->body.len; i++)
            cube_buf_printf(out, " %02x", (unsigned char)s->body.data[i]);
        break;
    case CODE:
        (void)cube_json_i64(cube_json_get(root, "StatusCode"), &code);
        cube_buf_printf(out, " %d", (int)code);
        break;
    case EVENTS:
        memset(&objects, 0, sizeof objects);
        cube_objects_feed(&objects, s->body.data ? s->body.data : "",
                          s->body.len, put_event, out);
        cube_buf_free(&objects.buf);
        break;
    }
    cube_json_free(root);
    hide_ids(out);
    replace(out, s->prefix, "N-");
    replace(out, s->port, "PORT");
    replace(out, s->other, "OTHER");
}

/* Plays the script; keeps what is compared, and the ID of each container. */
static void play(struct side *s, bool is_podman)
{
    for (size_t i = 0; i < COUNT(script); i++) {
        const struct step *t = &script[i];
        const char *name = strstr(t->target, "create?name=$N");
        struct json_value_s *root;

        test_row("%s: step %zu, %s %s", s->name, i, t->method, t->target);
        if (is_podman && t->podman == NOT)
            continue;
        ask(s, t);
        put_answer(s, t->look, &s->answers[i]);
        if (!name || s->status != 201)
            continue;
        root = cube_json_parse(s->body.data, s->body.len, NULL);
        (void)snprintf(s->ids[name[14] - 'a'], sizeof s->ids[0], "%s",
                       sim_text(root, "Id"));
        cube_json_free(root);
    }
}

/* ---- Both sides ---- */

/* A port of this machine; stays listened on when `keep` is set. */
static void free_port(char out[8], int *keep)
{
    struct sockaddr_in a = {.sin_family = AF_INET};
    socklen_t len = sizeof a;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (fd < 0 || bind(fd, (struct sockaddr *)&a, sizeof a) < 0 ||
        listen(fd, 1) < 0 ||
        getsockname(fd, (struct sockaddr *)&a, &len) < 0)
        FAIL("no free port");
    (void)snprintf(out, 8, "%d", ntohs(a.sin_port));
    if (keep)
        *keep = fd;
    else if (fd >= 0)
        (void)close(fd);
}

static void side_open(struct side *s, const char *name, const char *where)
{
    const struct cube_world *w = cube_world_real();
    const char *registry = getenv("CUBE_TEST_REGISTRY");
    char simulated[300];
    uint32_t random;

    memset(s, 0, sizeof *s);
    s->name = name;
    (void)w->random(NULL, &random, sizeof random);
    (void)snprintf(s->prefix, sizeof s->prefix, "cubesim%x-", random);
    (void)snprintf(s->registry, sizeof s->registry, "%s",
                   registry ? registry : "127.0.0.1:5000");
    free_port(s->port, NULL);
    free_port(s->other, &s->stranger);
    if (where) {
        s->loop = cube_loop_new(w, NULL);
    } else {
        jump_world_init(&s->world);
        w = &s->world.table;
        s->loop = cube_loop_new(w, NULL);
        s->e = sim_engine_new(s->loop, 1);
        sim_engine_add_image(s->e, real_image);
        sim_engine_take_port(s->e, atoi(s->other), true);
        (void)snprintf(simulated, sizeof simulated, "unix:%s/sim.sock",
                       test_dir());
        where = simulated;
        CHECK_INT(sim_engine_up(s->e, where, NULL), 0);
    }
    put_now(s, s->since);
    s->client = cube_http_client_new(s->loop, where, NULL, NULL);
}

static void side_close(struct side *s)
{
    cube_http_client_free(s->client);
    sim_engine_free(s->e);
    cube_loop_free(s->loop);
    (void)close(s->stranger);
    for (size_t i = 0; i < COUNT(script); i++)
        cube_buf_free(&s->answers[i]);
    cube_buf_free(&s->body);
}

/* What a script that broke off has left. */
static void sweep(struct side *s)
{
    static const struct step gone = {"DELETE", "/v1.41/containers/$a?force=1",
                                     NULL, STATUS, SAME};

    for (int i = 0; i < 26; i++) {
        if (!*s->ids[i])
            continue;
        memmove(s->ids[0], s->ids[i], sizeof s->ids[0]);
        ask(s, &gone);
    }
}

static void compare(const char *variable, bool is_podman)
{
    const char *where = getenv(variable);
    const char *mode = getenv("CUBE_TEST_ENGINE");
    struct side real, sim;

    if (!where || !*where) {
        if (mode && !strcmp(mode, "required"))
            FAIL("%s is not set, and CUBE_TEST_ENGINE=required", variable);
        else
            SKIP("no engine: tools/engine use");
        return;
    }
    side_open(&sim, "simulated", NULL);
    side_open(&real, variable, where);
    play(&sim, is_podman);
    play(&real, is_podman);
    for (size_t i = 0; i < COUNT(script); i++) {
        test_row("step %zu: %s %s", i, script[i].method, script[i].target);
        if (!is_podman || script[i].podman == SAME)
            CHECK_STR(sim.answers[i].data, real.answers[i].data);
    }
    sweep(&real);
    side_close(&real);
    side_close(&sim);
}

TEST(it_answers_as_docker_does)
{
    compare("CUBE_TEST_DOCKER", false);
}

TEST(and_where_it_can_as_podman)
{
    compare("CUBE_TEST_PODMAN", true);
}

/* ---- The client, on a simulated engine ---- */

struct heard {
    bool is_done, is_failed, is_oom, is_interrupted;
    struct cube_err err;
    enum cube_box_state state;
    int exit_code, count;
    char id[100], name[100], error[300];
};

static struct {
    struct jump_world world;
    struct cube_loop *loop;
    struct sim_engine *e;
    struct cube_runtime *rt;
    char where[300];
    struct cube_buf changes;
} k;

static void on_done(void *arg, const struct cube_err *err)
{
    struct heard *h = arg;

    h->is_done = true;
    h->is_failed = err != NULL;
    if (err)
        h->err = *err;
}

static void on_container(void *arg, const struct cube_container *c,
                         const struct cube_err *err)
{
    struct heard *h = arg;

    on_done(h, err);
    if (!c)
        return;
    h->state = c->state;
    h->exit_code = c->exit_code;
    h->is_oom = c->is_oom_killed;
    h->is_interrupted = c->is_interrupted;
    (void)snprintf(h->id, sizeof h->id, "%s", c->id);
    (void)snprintf(h->name, sizeof h->name, "%s", c->name);
    (void)snprintf(h->error, sizeof h->error, "%s", c->error);
}

static void on_change(void *arg, const char *task)
{
    (void)arg;
    cube_buf_puts(&k.changes, task ? "task;" : "all;");
}

static void open_all(void)
{
    memset(&k, 0, sizeof k);
    jump_world_init(&k.world);
    k.loop = cube_loop_new(&k.world.table, NULL);
    k.e = sim_engine_new(k.loop, test_random());
    (void)snprintf(k.where, sizeof k.where, "unix:%s/sim.sock", test_dir());
    CHECK_INT(sim_engine_up(k.e, k.where, NULL), 0);
    k.rt = cube_docker_new(k.loop, k.where, NULL);
    sim_engine_add_image(k.e, "web");
}

static void close_all(void)
{
    cube_runtime_free(k.rt);
    sim_engine_free(k.e);
    cube_loop_free(k.loop);
    cube_buf_free(&k.changes);
}

static void pass(int64_t ms)
{
    int64_t end = k.world.now_ms + ms;

    while (k.world.now_ms < end)
        CHECK_INT(cube_loop_turn(k.loop, (int)(end - k.world.now_ms), NULL),
                  0);
}

static void until(const bool *flag)
{
    int64_t end = k.world.now_ms + 3600000;

    while (!*flag && k.world.now_ms < end)
        CHECK_INT(cube_loop_turn(k.loop, 1000, NULL), 0);
    CHECK(*flag);
}

static char last_words[200];

static void on_progress(void *arg, const char *words)
{
    (void)arg;
    (void)snprintf(last_words, sizeof last_words, "%s", words);
}

#define TASK "efeadce0-d016-4a39-882a-d2c5196cce1c"

static struct heard start_of(const char *image, const char *id,
                             const char *port)
{
    struct cube_task *t = cube_task_new();
    struct cube_start what = {t, "cluster", "worker", 1, on_progress};
    struct heard h = {0};

    (void)snprintf(t->id, sizeof t->id, "%s", id);
    cube_task_set(&t->name, "web");
    cube_task_set(&t->image, image);
    if (*port)
        cube_task_publish(t, "80/tcp", port);
    last_words[0] = 0;
    k.rt->ops->start(k.rt, &what, on_container, &h);
    until(&h.is_done);
    cube_task_free(t);
    return h;
}

static struct heard start(void)
{
    return start_of("web", TASK, "8080");
}

static struct heard inspect(const char *id)
{
    struct heard h = {0};

    k.rt->ops->inspect(k.rt, id, on_container, &h);
    until(&h.is_done);
    return h;
}

static struct heard stop(const char *id, int grace_ms)
{
    struct heard h = {0};

    k.rt->ops->stop(k.rt, id, grace_ms, on_done, &h);
    until(&h.is_done);
    return h;
}

static int count(enum sim_box_state state)
{
    return sim_count(k.e, state, NULL, NULL);
}

TEST(a_task_runs_and_stops_and_its_port_is_free_again)
{
    struct heard h;

    open_all();
    h = start();
    CHECK_STR(h.err.text, "");
    CHECK_INT(h.state, CUBE_BOX_RUNNING);
    CHECK(start_of("web", "efeadce0-d016-4a39-882a-d2c5196cce1d",
                   "8080").is_failed);
    CHECK_INT(count(SIM_RUNNING), 1);
    CHECK_INT(count(SIM_CREATED), 0);
    CHECK(!stop(h.id, 1000).is_failed);
    CHECK_INT(sim_count(k.e, SIM_EXITED, "cube.worker", "worker"), 1);
    CHECK_INT(inspect(h.id).exit_code, 143);
    h = start_of("web", "efeadce0-d016-4a39-882a-d2c5196cce1d", "8080");
    CHECK(!h.is_failed);
    CHECK_STR(h.name, "web-efeadce0"); /* the first still has its name */
    close_all();
}

TEST(pulls_take_long_or_fail)
{
    static const struct {
        const char *image;
        int missing, error, cut, slow;
        bool is_trouble;
        const char *words;
    } rows[] = {
        {"new", 0, 0, 0, 0, false, NULL},
        {"new", 0, 0, 0, 1000, false, NULL},
        {"nosuch", 0, 0, 0, 0, false, "not found"},
        {"new", 1000, 0, 0, 0, false, "not found"},
        {"new", 0, 1000, 0, 0, false, "unexpected EOF"},
        {"new", 0, 0, 1000, 0, true, ""},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct heard h;
        int64_t before;

        test_row("row %zu", i);
        open_all();
        k.e->faults.pull_missing = rows[i].missing;
        k.e->faults.pull_error = rows[i].error;
        k.e->faults.pull_cut = rows[i].cut;
        k.e->faults.pull_slow = rows[i].slow;
        before = k.world.now_ms;
        h = start_of(rows[i].image, TASK, "");
        CHECK_INT(h.is_failed, rows[i].words != NULL);
        CHECK_INT(cube_runtime_is_trouble(&h.err) && h.is_failed,
                  rows[i].is_trouble);
        CHECK_HAS(h.err.text, rows[i].words ? rows[i].words : "");
        CHECK_INT(count(SIM_RUNNING), rows[i].words == NULL);
        CHECK_INT(k.world.now_ms - before > 60000, rows[i].slow > 0);
        if (!rows[i].words)
            CHECK_HAS(last_words, "pulling new: 1 of 1 layer");
        CHECK_INT(k.e->counts.pulls, 1);
        close_all();
    }
}

static void ends_soon(void *arg, struct sim_box *b, struct sim_life *life)
{
    (void)b;
    *life = *(struct sim_life *)arg;
}

TEST(containers_end_as_they_were_planned_to)
{
    struct sim_life rows[] = {
        {1000, 0, false, -1, 0, ""},
        {1000, 3, false, -1, 0, ""},
        {1000, 0, true, -1, 0, ""},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct heard h;

        test_row("row %zu", i);
        open_all();
        k.e->on_start = ends_soon;
        k.e->arg = &rows[i];
        k.rt->ops->watch(k.rt, NULL, on_change, NULL);
        h = start();
        CHECK_INT(h.state, CUBE_BOX_RUNNING);
        cube_buf_clear(&k.changes);
        pass(1000);
        CHECK_STR(k.changes.data, rows[i].is_oom ? "task;task;" : "task;");
        h = inspect(h.id);
        CHECK_INT(h.state, CUBE_BOX_EXITED);
        CHECK_INT(h.exit_code, rows[i].is_oom ? 137 : rows[i].code);
        CHECK_INT(h.is_oom, rows[i].is_oom);
        CHECK(!h.is_interrupted);
        CHECK_STR(h.error, rows[i].is_oom ? "killed: out of memory" : "");
        close_all();
    }
}

TEST(one_that_is_deaf_is_killed_after_its_grace)
{
    struct sim_life deaf = {SIM_NEVER, 0, false, -1, 0, ""};
    struct heard h;
    int64_t before;

    open_all();
    k.e->on_start = ends_soon;
    k.e->arg = &deaf;
    h = start();
    before = k.world.now_ms;
    CHECK(!stop(h.id, 7000).is_failed);
    CHECK(k.world.now_ms - before >= 7000 && k.world.now_ms - before < 7200);
    CHECK_INT(inspect(h.id).exit_code, 137);
    close_all();
}

TEST(who_removes_one_by_hand_is_told_of)
{
    struct heard h;

    open_all();
    k.rt->ops->watch(k.rt, NULL, on_change, NULL);
    h = start();
    pass(1000);
    cube_buf_clear(&k.changes);
    CHECK(sim_engine_remove_by_hand(sim_find(k.e, h.id)));
    pass(100);
    CHECK_STR(k.changes.data, "task;task;task;"); /* kill, die, destroy */
    CHECK_INT(inspect(h.id).err.code, CUBE_ENOENT);
    close_all();
}

TEST(one_that_hangs_answers_nobody_and_then_everybody)
{
    struct heard h, s = {0};

    open_all();
    h = start();
    sim_engine_hang(k.e, true);
    CHECK_INT(inspect(h.id).err.code, CUBE_ETIMEOUT);
    CHECK(!sim_engine_remove_by_hand(sim_find(k.e, h.id)));
    k.rt->ops->stop(k.rt, h.id, 1000, on_done, &s);
    pass(5000); /* the patience of its ping is 10 s */
    CHECK(!s.is_done);
    CHECK_INT(count(SIM_RUNNING), 1);
    sim_engine_hang(k.e, false);
    until(&s.is_done);
    CHECK(!s.is_failed);
    CHECK_INT(count(SIM_RUNNING), 0);
    close_all();
}

TEST(what_was_done_before_its_answer_was_lost_is_found_again)
{
    for (int is_cut = 0; is_cut < 2; is_cut++) {
        struct heard h;
        int tries = 0;

        test_row("%s", is_cut ? "cut" : "500");
        open_all();
        k.e->faults.error = is_cut ? 0 : 300;
        k.e->faults.cut = is_cut ? 300 : 0;
        do {
            h = start();
            pass(1000);
        } while (h.is_failed && cube_runtime_is_trouble(&h.err) &&
                 ++tries < 200);
        CHECK_INT(h.state, CUBE_BOX_RUNNING);
        CHECK_INT(count(SIM_RUNNING), 1);
        CHECK_INT(count(SIM_CREATED) + count(SIM_EXITED), 0);
        CHECK((is_cut ? k.e->counts.cuts : k.e->counts.errors) > 0);
        close_all();
    }
}

/* Away for three seconds, while somebody watches. */
static void away(enum sim_down how, bool is_stop)
{
    cube_buf_clear(&k.changes);
    if (is_stop)
        sim_engine_stop(k.e, 3000);
    else
        sim_engine_restart(k.e, how, 3000);
    pass(2000);
    CHECK(is_stop || inspect("x").is_failed);
    pass(30000);
    CHECK_HAS(k.changes.data ? k.changes.data : "", "all;");
    CHECK(k.rt->is_up);
}

TEST(it_restarts_with_and_without_its_containers)
{
    static const struct {
        enum sim_down how;
        bool is_stop, is_keeping;
        int running, exited, code;
        bool is_interrupted;
    } rows[] = {
        {SIM_KILLED, false, false, 0, 1, 137, true},
        {SIM_KEPT, false, true, 1, 0, 0, false},
        {SIM_WIPED, false, false, 0, 0, 0, false},
        {SIM_POWER, false, false, 0, 1, 255, true},
        {SIM_KEPT, true, false, 0, 1, 143, true},
        {SIM_KEPT, true, true, 1, 0, 0, false},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct heard h;

        test_row("row %zu", i);
        open_all();
        k.e->is_keeping = rows[i].is_keeping;
        k.rt->ops->watch(k.rt, NULL, on_change, NULL);
        h = start();
        away(rows[i].how, rows[i].is_stop);
        CHECK_INT(count(SIM_RUNNING), rows[i].running);
        CHECK_INT(count(SIM_EXITED), rows[i].exited);
        h = inspect(h.id);
        CHECK_INT(h.exit_code, rows[i].code);
        CHECK_INT(h.is_interrupted, rows[i].is_interrupted);
        h = start_of("web", TASK, "8080");
        CHECK(!h.is_failed);
        close_all();
    }
}

TEST(it_moves_to_another_loop_with_its_containers)
{
    struct sim_life life = {9000, 5, false, -1, 0, ""};
    struct heard h;

    open_all();
    k.e->on_start = ends_soon;
    k.e->arg = &life;
    k.e->is_keeping = true;
    h = start();
    cube_runtime_free(k.rt);
    sim_engine_down(k.e, SIM_KEPT);
    sim_engine_leave(k.e);
    cube_loop_free(k.loop);
    k.world.now_ms += 60000;
    k.loop = cube_loop_new(&k.world.table, NULL);
    sim_engine_enter(k.e, k.loop);
    CHECK_INT(sim_engine_up(k.e, k.where, NULL), 0);
    k.rt = cube_docker_new(k.loop, k.where, NULL);
    h = inspect(h.id);
    CHECK_INT(h.state, CUBE_BOX_EXITED);
    CHECK_INT(h.exit_code, 5);
    close_all();
}

/* All that can go wrong, at once, and what came of it as a number. */
static uint64_t storm(void)
{
    uint64_t sum = 0;

    open_all();
    k.e->random = 4711;
    k.e->faults = (struct sim_engine_faults){
        .error = 100, .cut = 100, .slow = 50, .pull_missing = 200,
        .pull_error = 200, .pull_cut = 200, .pull_slow = 100,
        .exit_early = 300, .oom = 200};
    k.rt->ops->watch(k.rt, NULL, on_change, NULL);
    for (int i = 0; i < 60; i++) {
        struct heard h = start();

        sum = sum * 31 + (uint64_t)h.err.code * 7 + (uint64_t)h.state;
        if (i % 7 == 3)
            sim_engine_remove_image(k.e, "web");
        if (i % 9 == 5)
            sim_engine_restart(k.e, (enum sim_down)(i % 4), 1000);
        if (*h.id)
            (void)stop(h.id, 1000);
        pass(5000);
    }
    sum = sum * 31 + k.e->random;
    CHECK(k.e->counts.errors > 0 && k.e->counts.cuts > 0);
    CHECK(k.e->counts.slow > 0 && k.e->counts.pulls > 0);
    close_all();
    return sum;
}

TEST(the_same_seed_gives_the_same_faults)
{
    uint64_t first = storm();

    CHECK_UINT(storm(), first);
}
