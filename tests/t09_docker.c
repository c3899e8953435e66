/*
 * Chapter 9, Docker and Podman: each line of what engines were seen to do,
 * against a fake engine on a unix socket of the same loop. It answers by rules
 * that a test sets, and like a small healthy engine where no rule fits. The
 * clock is the test's: it is moved to the next timer when nothing happens.
 */
#include "test.h"
#include <poll.h>

/* ---- A world with a clock of our own ---- */

static int64_t clock_ms;
static const char *env_home, *env_docker_host, *env_container_host;

static int64_t virtual_now_ms(void *ctx)
{
    (void)ctx;
    return clock_ms;
}

static const char *virtual_env(void *ctx, const char *name)
{
    (void)ctx;
    if (!strcmp(name, "HOME"))
        return env_home;
    if (!strcmp(name, "DOCKER_HOST"))
        return env_docker_host;
    if (!strcmp(name, "CONTAINER_HOST"))
        return env_container_host;
    return NULL;
}

/* ---- The fake engine ---- */

enum how { PLAIN, BYTES, CUT, HANG };

/* An answer to requests that begin with `to` ("POST /containers/create"),
 * without the version. `times` 0: for good. BYTES: each byte in a chunk of its
 * own; CUT: the connection breaks before the end; HANG: no answer. */
struct rule {
    const char *to;
    int status;
    const char *body;
    int times;
    enum how how;
};

#define RULES_MAX 16

struct fake {
    struct cube_world world;
    struct cube_loop *loop;
    struct cube_http_server *server;
    struct cube_runtime *rt;
    char where[300];
    struct rule rules[RULES_MAX];
    size_t rule_count;
    struct cube_buf trace; /* "POST /v1.41/containers/create;" ... */
    struct cube_buf body, target, auth; /* of the last create, pull */
    const char *api;                    /* NULL: no Api-Version at all */
    bool is_podman;
    struct cube_http_req *open[16]; /* streams and hung requests */
    size_t open_count;
    int gone_count;
};

static struct fake fake;

static const char healthy[] =
    "{\"Id\":\"c1\",\"Name\":\"/web\",\"State\":{\"Status\":\"running\","
    "\"Running\":true,\"StartedAt\":\"2025-03-01T10:11:12.5Z\","
    "\"FinishedAt\":\"0001-01-01T00:00:00Z\"},\"Config\":{\"Tty\":false},"
    "\"NetworkSettings\":{\"Ports\":{\"80/tcp\":[{\"HostIp\":\"0.0.0.0\","
    "\"HostPort\":\"32768\"}],\"81/tcp\":null}}}";

static const struct rule defaults[] = {
    {"GET /_ping", 200, "OK", 0, PLAIN},
    {"GET /info", 200,
     "{\"ID\":\"ENGINE\",\"Name\":\"host\",\"ServerVersion\":\"20.10.24\","
     "\"DockerRootDir\":\"/var/lib/x\"}", 0, PLAIN},
    {"GET /containers/json", 200, "[]", 0, PLAIN},
    {"POST /containers/create", 201, "{\"Id\":\"c1\",\"Warnings\":null}", 0,
     PLAIN},
    {"POST /images/create", 200, "{\"status\":\"x\"}", 0, PLAIN},
    {"GET /containers/", 200, healthy, 0, PLAIN},
    {"POST /containers/", 204, "", 0, PLAIN},
    {"DELETE /containers/", 204, "", 0, PLAIN},
    {"GET /events", 200, "", 0, HANG},
    {NULL, 0, NULL, 0, PLAIN},
};

static void on_gone(void *arg)
{
    (void)arg;
    fake.gone_count++;
}

/* "/v1.41/containers/c1/json" without the version. */
static const char *bare(const char *path)
{
    const char *slash = strchr(path + 1, '/');

    return path[1] == 'v' && path[2] == '1' && slash ? slash : path;
}

static struct rule *find_rule(const char *method, const char *path)
{
    char line[400];

    (void)snprintf(line, sizeof line, "%s %s", method, bare(path));
    for (size_t i = 0; i < fake.rule_count; i++) {
        struct rule *r = &fake.rules[i];

        if (r->times < 0 || !cube_text_starts(line, r->to))
            continue;
        if (r->times > 0 && --r->times == 0)
            r->times = -1;
        return r;
    }
    for (size_t i = 0; defaults[i].to; i++) {
        if (cube_text_starts(line, defaults[i].to))
            return (struct rule *)(uintptr_t)&defaults[i];
    }
    return NULL;
}

static void remember(struct cube_http_req *req)
{
    const char *path = bare(cube_http_path(req));
    size_t len;
    const char *body = cube_http_body(req, &len);
    const char *auth = cube_http_header(req, "X-Registry-Auth");

    cube_buf_printf(&fake.trace, "%s %s;", cube_http_method(req),
                    cube_http_path(req));
    if (!strcmp(path, "/containers/create")) {
        const char *name = cube_http_query(req, "name");

        cube_buf_clear(&fake.body);
        cube_buf_add(&fake.body, body, len);
        cube_buf_printf(&fake.target, "%s;", name ? name : "-");
    }
    if (!strcmp(path, "/images/create")) {
        cube_buf_clear(&fake.auth);
        cube_buf_puts(&fake.auth, auth ? auth : "");
        cube_buf_printf(&fake.target, "pull %s %s;",
                        cube_http_query(req, "fromImage"),
                        cube_http_query(req, "tag"));
    }
}

static void answer_stream(struct cube_http_req *req, const struct rule *r)
{
    size_t step = r->how == BYTES ? 1 : strlen(r->body) + 1;

    cube_http_stream(req, r->status, "application/json");
    for (const char *p = r->body; *p; p += strlen(p) < step ? strlen(p) : step)
        cube_http_stream_write(req, p, strlen(p) < step ? strlen(p) : step);
    if (r->how == CUT)
        cube_http_stream_abort(req);
    else if (r->how == BYTES)
        cube_http_stream_end(req);
    else
        fake.open[fake.open_count++] = req;
}

static void answer(void *arg, struct cube_http_req *req)
{
    const struct rule *r = find_rule(cube_http_method(req),
                                     cube_http_path(req));

    (void)arg;
    remember(req);
    if (fake.api)
        cube_http_reply_header(req, "Api-Version", fake.api);
    if (fake.is_podman)
        cube_http_reply_header(req, "Libpod-Api-Version", "4.3.1");
    if (!r) {
        cube_http_reply(req, 404, "text/plain", "Not Found\n", 10);
    } else if (r->how == HANG && !r->body) {
        cube_http_on_gone(req, on_gone, NULL);
    } else if (r->how == PLAIN) {
        cube_http_reply(req, r->status,
                        *r->body == '{' ? "application/json" : "text/plain",
                        r->body, strlen(r->body));
    } else {
        if (r->how == HANG)
            cube_http_on_gone(req, on_gone, NULL);
        answer_stream(req, r);
    }
}

static const struct cube_http_route routes[] = {
    {"GET", "/{a}", answer},
    {"GET", "/{a}/{b}", answer},
    {"GET", "/{a}/{b}/{c}", answer},
    {"GET", "/{a}/{b}/{c}/{d}", answer},
    {"POST", "/{a}/{b}/{c}", answer},
    {"POST", "/{a}/{b}/{c}/{d}", answer},
    {"DELETE", "/{a}/{b}/{c}", answer},
    {NULL, NULL, NULL},
};

static void serve(void)
{
    fake.server = cube_http_listen(fake.loop, fake.where, routes, NULL, NULL,
                                   NULL);
    if (!fake.server)
        FAIL("the fake engine cannot listen at %s", fake.where);
}

static void open_fake(void)
{
    struct cube_err err;

    memset(&fake, 0, sizeof fake);
    env_home = "/nonexistent";
    env_docker_host = env_container_host = NULL;
    clock_ms = 1000000;
    fake.world = *cube_world_real();
    fake.world.now_ms = virtual_now_ms;
    fake.world.env = virtual_env;
    fake.loop = cube_loop_new(&fake.world, NULL);
    fake.api = "1.41";
    (void)snprintf(fake.where, sizeof fake.where, "unix:%s/engine.sock",
                   test_dir());
    serve();
    fake.rt = cube_docker_new(fake.loop, fake.where, &err);
}

static void close_fake(void)
{
    cube_runtime_free(fake.rt);
    for (int i = 0; i < 4; i++)
        (void)cube_loop_turn(fake.loop, 0, NULL);
    if (fake.server)
        cube_http_close(fake.server);
    cube_loop_free(fake.loop);
    cube_buf_free(&fake.trace);
    cube_buf_free(&fake.body);
    cube_buf_free(&fake.target);
    cube_buf_free(&fake.auth);
}

static void rule(const char *to, int times, int status, const char *body,
                 enum how how)
{
    fake.rules[fake.rule_count++] =
        (struct rule){to, status, body, times, how};
}

static void forget(void)
{
    cube_buf_clear(&fake.trace);
    cube_buf_clear(&fake.target);
    fake.rule_count = 0;
}

/* The requests so far, without versions, as one text. */
static const char *trace(void)
{
    return fake.trace.data ? fake.trace.data : "";
}

/* ---- Hearing callbacks ---- */

struct heard {
    bool is_done, is_failed;
    int count;
    struct cube_err err;
    enum cube_box_state state;
    bool has_exit, is_oom_killed;
    int exit_code;
    char id[100], error[300], ports[300];
    size_t list_count;
    struct cube_buf text;
};

static void hear_err(struct heard *h, const struct cube_err *err)
{
    h->is_done = true;
    h->count++;
    h->is_failed = err != NULL;
    if (err)
        h->err = *err;
}

static void on_container(void *arg, const struct cube_container *c,
                         const struct cube_err *err)
{
    struct heard *h = arg;
    size_t at = 0;

    hear_err(h, err);
    if (!c)
        return;
    h->state = c->state;
    h->has_exit = c->has_exit;
    h->exit_code = c->exit_code;
    h->is_oom_killed = c->is_oom_killed;
    (void)snprintf(h->id, sizeof h->id, "%s", c->id);
    (void)snprintf(h->error, sizeof h->error, "%s", c->error);
    h->ports[0] = 0;
    for (size_t i = 0; i < c->ports.count; i++) {
        const struct cube_port *p = &c->ports.list[i];

        at += (size_t)snprintf(h->ports + at, sizeof h->ports - at,
                               "%s=%s:%s ", p->port,
                               p->count ? p->bindings[0].ip : "null",
                               p->count ? p->bindings[0].port : "null");
    }
}

static void on_done(void *arg, const struct cube_err *err)
{
    hear_err(arg, err);
}

static void on_text(void *arg, const char *text, size_t len,
                    const struct cube_err *err)
{
    struct heard *h = arg;

    hear_err(h, err);
    cube_buf_add(&h->text, text, len);
}

static void on_data(void *arg, const char *p, size_t len)
{
    cube_buf_add(&((struct heard *)arg)->text, p, len);
}

static void on_list(void *arg, const struct cube_container *list,
                    size_t count, const struct cube_err *err)
{
    struct heard *h = arg;

    (void)list;
    hear_err(h, err);
    h->list_count = count;
}

/* Turns until nothing is left to do without the clock. */
static void settle(void)
{
    struct pollfd p = {cube_loop_fd(fake.loop), POLLIN, 0};

    for (int quiet = 0; quiet < 3;) {
        bool is_due = cube_loop_timeout_ms(fake.loop) == 0;

        quiet = is_due || poll(&p, 1, 0) > 0 ? 0 : quiet + 1;
        (void)cube_loop_turn(fake.loop, 0, NULL);
    }
}

static void pass(int64_t ms)
{
    int64_t end = clock_ms + ms;

    for (;;) {
        int next;

        settle();
        next = cube_loop_timeout_ms(fake.loop);
        if (next < 0 || clock_ms + next > end)
            break;
        clock_ms += next > 0 ? next : 1;
    }
    clock_ms = end;
    settle();
}

/* Turns, and lets time pass, until the flag is set. Returns how long. */
static int64_t until(const bool *flag)
{
    int64_t before = clock_ms;

    for (int i = 0; i < 5000 && !*flag; i++) {
        settle();
        if (!*flag) {
            int next = cube_loop_timeout_ms(fake.loop);

            clock_ms += next > 0 ? next : 1;
        }
    }
    if (!*flag)
        FAIL("no callback");
    return clock_ms - before;
}

/* ---- Short ways ---- */

static char progress[4000];

static void on_progress(void *arg, const char *words)
{
    (void)arg;
    strncat(progress, words, sizeof progress - strlen(progress) - 1);
    strncat(progress, ";", sizeof progress - strlen(progress) - 1);
}

static const char id_text[] = "efeadce0-d016-4a39-882a-d2c5196cce1c";

static struct cube_task *new_task(void)
{
    struct cube_task *t = cube_task_new();

    memcpy(t->id, id_text, sizeof id_text);
    cube_task_set(&t->name, "web");
    cube_task_set(&t->image, "nginx");
    return t;
}

static struct heard start_task(const struct cube_task *t)
{
    struct cube_start what = {t, "cluster", "worker", 3, on_progress};
    struct heard h = {0};

    progress[0] = 0;
    fake.rt->ops->start(fake.rt, &what, on_container, &h);
    CHECK(!h.is_done);
    (void)until(&h.is_done);
    settle();
    CHECK_INT(h.count, 1);
    return h;
}

static struct heard start(void)
{
    struct cube_task *t = new_task();
    struct heard h = start_task(t);

    cube_task_free(t);
    return h;
}

static struct heard inspect(void)
{
    struct heard h = {0};

    fake.rt->ops->inspect(fake.rt, "c1", on_container, &h);
    CHECK(!h.is_done);
    (void)until(&h.is_done);
    return h;
}

enum verb { STOP, KILL, REMOVE, INSPECT, JSON, LIST, LOGS, START, VERBS };

static const char *const verb_names[] = {
    "stop", "kill", "remove", "inspect", "inspect_json", "list", "logs",
    "start"};

static void call(enum verb verb, struct heard *h)
{
    const struct cube_runtime_ops *ops = fake.rt->ops;
    struct cube_logs_options o = {false, -1};
    struct cube_task *t = new_task();
    struct cube_start what = {t, "", "worker", 3, NULL};

    switch (verb) {
    case STOP: ops->stop(fake.rt, "c1", 1500, on_done, h); break;
    case KILL: ops->kill(fake.rt, "c1", on_done, h); break;
    case REMOVE: ops->remove(fake.rt, "c1", on_done, h); break;
    case INSPECT: ops->inspect(fake.rt, "c1", on_container, h); break;
    case JSON: ops->inspect_json(fake.rt, "c1", on_text, h); break;
    case LIST: ops->list(fake.rt, NULL, on_list, h); break;
    case LOGS:
        (void)ops->logs(fake.rt, "c1", &o, on_data, on_done, h);
        break;
    case START: ops->start(fake.rt, &what, on_container, h); break;
    case VERBS: break;
    }
    cube_task_free(t);
}

static struct heard do_call(enum verb verb)
{
    struct heard h = {0};

    call(verb, &h);
    CHECK(!h.is_done);
    (void)until(&h.is_done);
    settle();
    CHECK_INT(h.count, 1);
    cube_buf_free(&h.text);
    return h;
}

/* ---- Version ---- */

TEST(the_smaller_version_of_both_is_spoken)
{
    static const struct {
        const char *theirs, *want;
    } rows[] = {
        {"1.41", "/v1.41/"}, /* Debian's */
        {"1.24", "/v1.24/"},
        {"1.44", "/v1.44/"},
        {"1.51", "/v1.44/"}, /* newer than we know */
        {NULL, "/v1.44/"},   /* says nothing */
        {"nonsense", "/v1.44/"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct heard h;

        test_row("%s", rows[i].theirs ? rows[i].theirs : "none");
        open_fake();
        fake.api = rows[i].theirs;
        h = inspect();
        CHECK(!h.is_failed);
        CHECK_HAS(trace(), "GET /_ping;");
        CHECK_HAS(trace(), rows[i].want);
        close_fake();
    }
}

TEST(a_refused_version_is_negotiated_again)
{
    static const struct {
        const char *words, *api_after, *want;
    } rows[] = {
        {"client version 1.41 is too old. Minimum supported API version is "
         "1.46, please upgrade your client to a newer version\n",
         "1.50", "/v1.46/"},
        {"{\"message\":\"client version 1.41 is too new. Maximum supported "
         "API version is 1.40\"}",
         "1.40", "/v1.40/"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct heard h;

        test_row("row %zu", i);
        open_fake();
        (void)inspect();
        rule("GET /containers/c1", 1, 400, rows[i].words, PLAIN);
        fake.api = rows[i].api_after; /* upgraded under us */
        cube_buf_clear(&fake.trace);
        h = inspect();
        CHECK(!h.is_failed);
        CHECK_HAS(trace(), "/v1.41/containers/c1/json;GET /_ping;");
        CHECK_HAS(trace(), rows[i].want);
        close_fake();
    }
}

TEST(a_version_refused_twice_is_an_error_and_no_loop)
{
    struct heard h;

    open_fake();
    rule("GET /containers/c1", 0, 400, "client version 1.41 is too old.",
         PLAIN);
    h = inspect();
    CHECK(h.is_failed);
    CHECK_HAS(h.err.text, "is too old");
    close_fake();
}

/* ---- Objects ---- */

/* The rows that are drawn at the opening of streams. */
TEST(a_brace_in_a_string_is_a_letter)
{
    static const char bytes[] = "{\"status\":\"}\"}";
    static const char depth[] = "11111111111110";
    static const char quoted[] = "-xxxxxxx--xx--";
    struct cube_objects o = {.depth = 0};

    for (size_t i = 0; bytes[i]; i++) {
        test_row("byte %zu", i);
        CHECK_INT(cube_objects_step(&o, bytes[i]), !bytes[i + 1]);
        CHECK_INT(o.depth, depth[i] - '0');
        CHECK_INT(o.is_string, quoted[i] == 'x');
    }
}

/* ---- Errors ---- */

TEST(errors_carry_the_engines_words_whatever_their_form)
{
    static const struct {
        int status;
        const char *body, *want;
        enum cube_code code;
        bool is_trouble;
    } rows[] = {
        {404, "{\"message\":\"No such container: c1\"}",
         "inspect: No such container: c1", CUBE_ENOENT, false},
        {404, "{\"cause\":\"no such container\",\"message\":\"no container "
              "c1\",\"response\":404}", "inspect: no container c1",
         CUBE_ENOENT, false},
        {404, "", "inspect: the engine answered with status 404", CUBE_ENOENT,
         false},
        {404, "Not Found\n", "inspect: Not Found", CUBE_ENOENT, false},
        {400, "{}", "inspect: the engine answered with status 400",
         CUBE_EINVAL, false},
        {400, "{\"message\":null}", "status 400", CUBE_EINVAL, false},
        {403, "{\"message\":\"no\"}", "inspect: no", CUBE_EACCES, false},
        {500, "{\"message\":\"boom\"}", "inspect: boom", CUBE_EIO, true},
        {503, "upstream\r\n", "inspect: upstream", CUBE_EIO, true},
        {200, "[not json", "inspect: JSON", CUBE_EPROTO, true},
        {200, "{}", "no Id", CUBE_EPROTO, true},
        {302, "", "status 302", CUBE_EPROTO, true},
    };

    open_fake();
    for (size_t i = 0; i < COUNT(rows); i++) {
        struct heard h;

        test_row("%d %s", rows[i].status, rows[i].body);
        forget();
        rule("GET /containers/c1", 0, rows[i].status, rows[i].body, PLAIN);
        h = inspect();
        CHECK(h.is_failed);
        CHECK_HAS(h.err.text, rows[i].want);
        CHECK_INT(h.err.code, rows[i].code);
        CHECK_INT(cube_runtime_is_trouble(&h.err), rows[i].is_trouble);
    }
    close_fake();
}

/* ---- Create ---- */

TEST(create_says_what_the_task_says)
{
    struct cube_task *t;
    struct cube_buf spec = {0}, want = {0};

    open_fake();
    t = new_task();
    t->mem_bytes = 32 << 20;
    t->cpu = 0.1;
    t->restart_count = 2;
    cube_task_add(&t->cmd, "sh");
    cube_task_add(&t->cmd, "a\"b");
    cube_task_add(&t->env, "A=b");
    cube_task_expose(t, "80");
    cube_task_expose(t, "81/udp");
    cube_task_publish(t, "80/tcp", "8080");
    cube_task_publish(t, "90", "");
    cube_task_set(&t->restart_policy, "always"); /* never the engine's */
    (void)start_task(t);
    cube_task_print(t, &spec);
    cube_buf_puts(&want,
                  "{\"Image\":\"nginx\",\"Cmd\":[\"sh\",\"a\\\"b\"],"
                  "\"Env\":[\"A=b\"],\"Labels\":{\"cube.task\":"
                  "\"efeadce0-d016-4a39-882a-d2c5196cce1c\",\"cube.cluster\":"
                  "\"cluster\",\"cube.worker\":\"worker\",\"cube.attempt\":"
                  "\"3\",\"cube.restart\":\"2\",\"cube.spec\":");
    cube_json_put_str(&want, spec.data, spec.len);
    cube_buf_puts(&want,
                  "},\"ExposedPorts\":{\"81/udp\":{},\"80/tcp\":{},"
                  "\"90/tcp\":{}},\"HostConfig\":{\"PublishAllPorts\":true,"
                  "\"Memory\":33554432,\"NanoCpus\":100000000,"
                  "\"PortBindings\":{\"80/tcp\":[{\"HostPort\":\"8080\"}],"
                  "\"90/tcp\":[{\"HostPort\":\"\"}]}}}");
    CHECK_STR(fake.body.data, want.data);
    cube_buf_free(&spec);
    cube_buf_free(&want);
    cube_task_free(t);
    close_fake();
}

/* Docker 20.10 creates a container with less, and then fails to start it:
 * "failed to write 100: ... cpu.cfs_quota_us: invalid argument". */
TEST(less_than_a_hundredth_of_a_core_is_one)
{
    static const struct {
        double cores;
        const char *want;
    } rows[] = {
        {0, "\"PublishAllPorts\":true,\"PortBindings\""}, /* no limit */
        {1e-7, "\"NanoCpus\":10000000,"},
        {0.01, "\"NanoCpus\":10000000,"},
        {0.0125, "\"NanoCpus\":12500000,"},
        {64, "\"NanoCpus\":64000000000,"},
    };

    open_fake();
    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_task *t = new_task();

        test_row("%g", rows[i].cores);
        t->cpu = rows[i].cores;
        (void)start_task(t);
        CHECK_HAS(fake.body.data, rows[i].want);
        cube_task_free(t);
    }
    close_fake();
}

TEST(ports_are_the_engines_choice_unless_the_task_binds_them)
{
    static const struct {
        const char *exposed, *bound, *want, *why;
    } rows[] = {
        {NULL, NULL, "\"PublishAllPorts\":true", "what the image exposes"},
        {"80", NULL, "\"PublishAllPorts\":true", "exposed, not bound"},
        {NULL, "80", "\"PublishAllPorts\":false", "bound"},
        {"80/tcp", "80", "\"PublishAllPorts\":false", "the same port"},
        {"80/udp", "80", "\"PublishAllPorts\":true", "another port"},
    };

    open_fake();
    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_task *t = new_task();

        test_row("%s", rows[i].why);
        if (rows[i].exposed)
            cube_task_expose(t, rows[i].exposed);
        if (rows[i].bound)
            cube_task_publish(t, rows[i].bound, "8080");
        (void)start_task(t);
        CHECK_HAS(fake.body.data, rows[i].want);
        cube_task_free(t);
    }
    close_fake();
}

TEST(names_are_made_such_as_engines_accept)
{
    static const struct {
        const char *name, *want;
    } rows[] = {
        {"web", "web;"},
        {"my web/1", "my-web-1;"},
        {"_.-x1", "x1;"},
        {"x", "x-efeadce0;"}, /* one character is too short */
        {"", "cube-efeadce0;"},
        {"\303\244", "cube;"},
        {"a_b.c-d", "a_b.c-d;"},
    };

    open_fake();
    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_task *t = new_task();

        test_row("'%s'", rows[i].name);
        forget();
        cube_task_set(&t->name, rows[i].name);
        (void)start_task(t);
        CHECK_STR(fake.target.data, rows[i].want);
        cube_task_free(t);
    }
    close_fake();
}

TEST(a_taken_name_gets_a_suffix_and_then_is_the_engines)
{
    static const struct {
        int status;
        const char *body;
    } rows[] = {
        {409, "{\"message\":\"Conflict. The container name \\\"/web\\\" is "
              "already in use by container\"}"},
        {500, "{\"cause\":\"that name is already in use\",\"message\":"
              "\"container create: creating container storage: the container "
              "name \\\"web\\\" is already in use by e5a6\","
              "\"response\":500}"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct heard h;

        test_row("%d", rows[i].status);
        open_fake();
        rule("POST /containers/create", 1, rows[i].status, rows[i].body,
             PLAIN);
        h = start();
        CHECK(!h.is_failed);
        CHECK_STR(fake.target.data, "web;web-efeadce0;");
        forget();
        rule("POST /containers/create", 2, rows[i].status, rows[i].body,
             PLAIN);
        h = start();
        CHECK(!h.is_failed);
        CHECK_STR(fake.target.data, "web;web-efeadce0;-;");
        forget();
        rule("POST /containers/create", 0, rows[i].status, rows[i].body,
             PLAIN);
        h = start();
        CHECK(h.is_failed);
        CHECK(!cube_runtime_is_trouble(&h.err));
        close_fake();
    }
}

TEST(create_answers_are_a_no_or_trouble)
{
    static const struct {
        int status;
        const char *body, *want;
        bool is_well, is_trouble;
    } rows[] = {
        {400, "{\"message\":\"Minimum memory limit allowed is 6MB\"}",
         "create: Minimum memory limit allowed is 6MB", true, false},
        {500, "{\"message\":\"unexpected EOF\"}", "create: unexpected EOF",
         true, false},
        {500, "{\"message\":\"unexpected EOF\"}", "create: unexpected EOF",
         false, true}, /* it answers so to everything */
        {201, "garbage", "create: garbage", true, true},
        {201, "{}", "create: the engine answered", true, true},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct heard h;

        test_row("row %zu", i);
        open_fake();
        rule("GET /containers/json", 1, 200, "[]", PLAIN);
        rule("POST /containers/create", 0, rows[i].status, rows[i].body,
             PLAIN);
        if (!rows[i].is_well)
            rule("GET /containers/json", 0, 500, "{\"message\":\"x\"}", PLAIN);
        h = start();
        CHECK(h.is_failed);
        CHECK_HAS(h.err.text, rows[i].want);
        CHECK_INT(cube_runtime_is_trouble(&h.err), rows[i].is_trouble);
        close_fake();
    }
}

/* ---- Start ---- */

TEST(a_start_asks_for_as_little_as_it_needs)
{
    struct heard h;

    open_fake();
    h = start();
    CHECK(!h.is_failed);
    CHECK_STR(h.id, "c1");
    CHECK_STR(h.ports, "80/tcp=0.0.0.0:32768 81/tcp=null:null ");
    CHECK_STR(trace(), "GET /_ping;GET /v1.41/info;"
                       "GET /v1.41/containers/json;"
                       "POST /v1.41/containers/create;"
                       "POST /v1.41/containers/c1/start;"
                       "GET /v1.41/containers/c1/json;");
    close_fake();
}

static const char never_started[] =
    "{\"Id\":\"c1\",\"State\":{\"Status\":\"created\",\"Running\":false,"
    "\"ExitCode\":128,\"Error\":\"port is already allocated\"}}";

#define LOOK "GET /v1.41/containers/json;"
#define MAKE "POST /v1.41/containers/create;"
#define RUN "POST /v1.41/containers/c1/start;GET /v1.41/containers/c1/json;"

/* The exchanges that are drawn where a start begins, word for word. */
TEST(a_start_takes_the_ways_that_are_drawn)
{
    static const struct {
        const char *to;
        int times, status;
        const char *body, *trace, *targets;
        enum cube_code code;
    } rows[] = {
        {"POST /containers/create", 1, 404, "{\"message\":\"no such image\"}",
         LOOK MAKE "POST /v1.41/images/create;" MAKE RUN,
         "web;pull nginx latest;web;", CUBE_OK},
        {"POST /containers/create", 2, 409, "{\"message\":\"in use\"}",
         LOOK MAKE MAKE MAKE RUN, "web;web-efeadce0;-;", CUBE_OK},
        {"POST /containers/c1/start", 0, 500,
         "{\"message\":\"port is already allocated\"}",
         LOOK MAKE RUN "DELETE /v1.41/containers/c1;", "web;", CUBE_EINVAL},
        {"POST /containers/create", 0, 200, NULL, LOOK MAKE, "web;",
         CUBE_ETIMEOUT},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct heard h;

        test_row("row %zu", i);
        open_fake();
        (void)inspect();
        forget();
        rule(rows[i].to, rows[i].times, rows[i].status, rows[i].body,
             rows[i].body ? PLAIN : HANG);
        if (rows[i].code == CUBE_EINVAL)
            rule("GET /containers/c1/json", 0, 200, never_started, PLAIN);
        h = start();
        CHECK_INT(h.is_failed ? h.err.code : CUBE_OK, rows[i].code);
        CHECK_STR(fake.target.data, rows[i].targets);
        CHECK_STR(trace(), rows[i].trace);
        close_fake();
    }
}

TEST(one_that_runs_already_was_started)
{
    struct heard h;

    open_fake();
    rule("POST /containers/c1/start", 0, 304, "", PLAIN);
    h = start();
    CHECK(!h.is_failed);
    CHECK_INT(h.state, CUBE_BOX_RUNNING);
    close_fake();
}

TEST(a_refused_start_removes_the_container)
{
    static const struct {
        int status;
        const char *words;
        bool is_podman;
    } rows[] = {
        {500, "Bind for 0.0.0.0:80 failed: port is already allocated", false},
        {500, "listen tcp4 :18181: bind: address already in use", true},
        {400, "exec: \\\"x\\\": executable file not found in $PATH", false},
        {404, "no such file or directory", false},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_buf body = {0};
        struct heard h;

        test_row("%d %s", rows[i].status, rows[i].words);
        open_fake();
        fake.is_podman = rows[i].is_podman;
        cube_buf_printf(&body, "{\"message\":\"%s\"}", rows[i].words);
        rule("POST /containers/c1/start", 0, rows[i].status, body.data, PLAIN);
        rule("GET /containers/c1/json", 0, 200, never_started, PLAIN);
        h = start();
        CHECK(h.is_failed);
        CHECK(!cube_runtime_is_trouble(&h.err));
        CHECK_HAS(h.err.text, "start: ");
        CHECK_HAS(trace(), "DELETE /v1.41/containers/c1;");
        cube_buf_free(&body);
        close_fake();
    }
}

static const char left_behind[] =
    "[{\"Id\":\"c1\",\"State\":\"created\",\"Labels\":{\"cube.task\":"
    "\"efeadce0-d016-4a39-882a-d2c5196cce1c\",\"cube.worker\":\"worker\","
    "\"cube.attempt\":\"3\",\"cube.restart\":\"0\"}}]";

TEST(a_failed_start_of_an_engine_in_trouble_can_be_repeated)
{
    struct heard h;

    open_fake();
    rule("POST /containers/c1/start", 1, 500, "{\"message\":\"x\"}", PLAIN);
    rule("GET /containers/c1/json", 1, 500, "{\"message\":\"x\"}", PLAIN);
    h = start();
    CHECK(h.is_failed);
    CHECK(cube_runtime_is_trouble(&h.err));
    CHECK(!strstr(trace(), "DELETE"));
    forget();
    rule("GET /containers/json", 0, 200, left_behind, PLAIN);
    h = start();
    CHECK(!h.is_failed);
    CHECK_STR(trace(), "GET /v1.41/containers/json;"
                       "POST /v1.41/containers/c1/start;"
                       "GET /v1.41/containers/c1/json;");
    close_fake();
}

TEST(one_that_was_left_half_started_is_made_anew)
{
    /* Docker, killed over a start: that container never starts again. */
    struct heard h;

    open_fake();
    rule("GET /containers/json", 1, 200, left_behind, PLAIN);
    rule("POST /containers/c1/start", 1, 500,
         "{\"message\":\"task 1a2b: already exists\"}", PLAIN);
    rule("GET /containers/c1/json", 1, 200, never_started, PLAIN);
    h = start();
    CHECK(!h.is_failed);
    CHECK_HAS(trace(), "DELETE /v1.41/containers/c1;");
    CHECK_STR(fake.target.data, "web;");
    close_fake();
}

TEST(what_an_engine_says_while_it_shuts_down_is_not_believed)
{
    static const char words[] = "{\"message\":\"transport is closing\"}";
    struct heard h;

    open_fake();
    rule("POST /containers/c1/start", 1, 500, words, PLAIN);
    rule("GET /containers/c1/json", 1, 200, never_started, PLAIN);
    rule("GET /containers/json", 1, 200, "[]", PLAIN);
    rule("GET /containers/json", 0, 200, "[", CUT); /* it is gone by then */
    h = start();
    CHECK(h.is_failed);
    CHECK(cube_runtime_is_trouble(&h.err));
    close_fake();
    open_fake();
    rule("POST /containers/c1/start", 0, 500, words, PLAIN);
    rule("GET /containers/c1/json", 0, 200, never_started, PLAIN);
    h = start();
    CHECK(h.is_failed); /* it means it */
    CHECK(!cube_runtime_is_trouble(&h.err));
    CHECK_STR(h.err.text, "start: transport is closing");
    close_fake();
}

static bool was_interrupted;

static void on_interrupted(void *arg, const struct cube_container *c,
                           const struct cube_err *err)
{
    on_container(arg, c, err);
    was_interrupted = c && c->is_interrupted;
}

static int64_t wall_ns;

static int64_t virtual_wall_ns(void *ctx)
{
    (void)ctx;
    return wall_ns;
}

TEST(what_ended_while_the_engine_was_away_was_interrupted)
{
    static const struct {
        const char *finished, *info;
        bool is_podman, want;
        const char *why;
    } rows[] = {
        {"2025-03-01T10:00:10Z", "{}", false, true, "inside"},
        {"2025-03-01T09:59:50Z", "{}", false, false, "before"},
        {"2025-03-01T10:00:40Z", "{}", false, false, "after"},
        {"2025-03-01T10:00:10Z", "{\"LiveRestoreEnabled\":true}", false,
         false, "an engine that lets them live"},
        {"2025-03-01T10:00:10Z", "{}", true, false,
         "Podman, whose containers do not depend on it"},
    };
    struct cube_time t;

    CHECK(!cube_time_parse("2025-03-01T10:00:00Z", 20, &t));
    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_buf body = {0};
        struct heard h = {0};

        test_row("%s", rows[i].why);
        open_fake();
        fake.is_podman = rows[i].is_podman;
        fake.world.wall_ns = virtual_wall_ns;
        wall_ns = cube_time_to_ns(&t);
        rule("GET /info", 0, 200, rows[i].info, PLAIN);
        (void)inspect();
        cube_http_close(fake.server);
        fake.server = NULL;
        (void)inspect(); /* is noticed */
        wall_ns += 20000000000;
        serve();
        (void)inspect();
        cube_buf_printf(&body, "{\"Id\":\"c1\",\"State\":{\"Status\":"
                        "\"exited\",\"ExitCode\":0,\"FinishedAt\":\"%s\"}}",
                        rows[i].finished);
        rule("GET /containers/c1/json", 0, 200, body.data, PLAIN);
        fake.rt->ops->inspect(fake.rt, "c1", on_interrupted, &h);
        (void)until(&h.is_done);
        CHECK(!h.is_failed);
        CHECK_INT(was_interrupted, rows[i].want);
        cube_buf_free(&body);
        close_fake();
    }
}

TEST(what_an_earlier_try_left_is_judged_by_its_labels)
{
    static const struct {
        const char *worker, *attempt, *restart, *state, *want, *why;
    } rows[] = {
        {"worker", "3", "0", "running",
         "GET /v1.41/containers/json;GET /v1.41/containers/old/json;",
         "this very start, whose answer was lost"},
        {"worker", "3", "0", "exited",
         "GET /v1.41/containers/json;GET /v1.41/containers/old/json;",
         "the same, and it has ended: it is not run again"},
        {"worker", "3", "0", "created",
         "GET /v1.41/containers/json;POST /v1.41/containers/old/start;"
         "GET /v1.41/containers/old/json;", "it was only made"},
        {"worker", "2", "0", "running",
         "GET /v1.41/containers/json;DELETE /v1.41/containers/old;"
         "GET /v1.41/containers/json;POST /v1.41/containers/create;"
         "POST /v1.41/containers/c1/start;GET /v1.41/containers/c1/json;",
         "an older attempt"},
        {"other", "2", "0", "running",
         "GET /v1.41/containers/json;POST /v1.41/containers/create;"
         "POST /v1.41/containers/c1/start;GET /v1.41/containers/c1/json;",
         "another worker's: not ours to touch"},
        {"worker", "4", "0", "running",
         "GET /v1.41/containers/json;POST /v1.41/containers/create;"
         "POST /v1.41/containers/c1/start;GET /v1.41/containers/c1/json;",
         "a newer one: not ours to touch either"},
    };

    open_fake();
    (void)inspect();
    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_buf list = {0};
        struct heard h;

        test_row("%s", rows[i].why);
        forget();
        cube_buf_printf(&list, "[{\"Id\":\"old\",\"State\":\"%s\",\"Labels\":"
                        "{\"cube.task\":\"%s\",\"cube.worker\":\"%s\","
                        "\"cube.attempt\":\"%s\",\"cube.restart\":\"%s\"}}]",
                        rows[i].state, id_text, rows[i].worker,
                        rows[i].attempt, rows[i].restart);
        rule("GET /containers/json", 1, 200, list.data, PLAIN);
        h = start();
        CHECK(!h.is_failed);
        CHECK_STR(trace(), rows[i].want);
        cube_buf_free(&list);
    }
    close_fake();
}

TEST(an_old_one_that_cannot_be_removed_does_not_hold_us_for_good)
{
    static const char listed[] =
        "[{\"Id\":\"old\",\"State\":\"dead\",\"Labels\":{\"cube.task\":"
        "\"efeadce0-d016-4a39-882a-d2c5196cce1c\",\"cube.worker\":\"worker\","
        "\"cube.attempt\":\"1\"}}]";
    struct heard h;

    open_fake();
    rule("GET /containers/json", 0, 200, listed, PLAIN);
    h = start();
    CHECK(h.is_failed);
    CHECK(cube_runtime_is_trouble(&h.err));
    CHECK_STR(h.err.text, "start: container old was removed and is there "
              "again, in each of 8 tries, and cannot be used: it is of an "
              "older attempt");
    close_fake();
    open_fake();
    rule("GET /containers/json", 0, 200, left_behind, PLAIN);
    rule("POST /containers/c1/start", 0, 500,
         "{\"message\":\"task 1a2b: already exists\"}", PLAIN);
    rule("GET /containers/c1/json", 0, 200, never_started, PLAIN);
    h = start();
    CHECK(h.is_failed);
    CHECK(cube_runtime_is_trouble(&h.err));
    CHECK_STR(h.err.text, "start: container c1 was removed and is there "
              "again, in each of 8 tries, and cannot be used: start: task "
              "1a2b: already exists");
    close_fake();
}

TEST(a_container_removed_between_create_and_start_is_made_again)
{
    struct heard h;

    open_fake();
    rule("POST /containers/c1/start", 1, 404, "{\"message\":\"No such "
         "container: c1\"}", PLAIN);
    rule("GET /containers/c1/json", 1, 404, "", PLAIN);
    h = start();
    CHECK(!h.is_failed);
    CHECK_STR(fake.target.data, "web;web;");
    close_fake();
}

/* ---- Pull ---- */

TEST(an_image_that_is_there_is_not_pulled)
{
    struct heard h;

    open_fake();
    h = start();
    CHECK(!h.is_failed);
    CHECK(!strstr(trace(), "/images/create"));
    CHECK_STR(progress, "");
    close_fake();
}

TEST(a_missing_image_is_pulled_once_and_once_more_if_it_vanishes)
{
    struct heard h;

    for (int missing = 1; missing <= 3; missing++) {
        test_row("missing %d times", missing);
        open_fake();
        rule("POST /containers/create", missing, 404,
             "{\"message\":\"No such image: nginx:latest\"}", PLAIN);
        h = start();
        CHECK_INT(h.is_failed, missing == 3);
        if (missing == 1)
            CHECK_STR(fake.target.data, "web;pull nginx latest;web;");
        if (missing == 3) {
            CHECK(!cube_runtime_is_trouble(&h.err));
            CHECK_STR(h.err.text, "create: No such image: nginx:latest");
            CHECK_STR(fake.target.data, "web;pull nginx latest;web;"
                                        "pull nginx latest;web;");
        }
        close_fake();
    }
}

TEST(images_are_asked_for_by_name_and_tag_or_digest)
{
    static const struct {
        const char *image, *want;
    } rows[] = {
        {"nginx", "pull nginx latest;"},
        {"nginx:1.25", "pull nginx 1.25;"},
        {"host:5000/a/b", "pull host:5000/a/b latest;"},
        {"host:5000/a/b:x", "pull host:5000/a/b x;"},
        {"a@sha256:12", "pull a sha256:12;"},
        {"host:5000/a:x@sha256:12", "pull host:5000/a sha256:12;"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_task *t;

        test_row("%s", rows[i].image);
        open_fake();
        t = new_task();
        cube_task_set(&t->image, rows[i].image);
        rule("POST /containers/create", 1, 404, "", PLAIN);
        (void)start_task(t);
        CHECK_HAS(fake.target.data, rows[i].want);
        cube_task_free(t);
        close_fake();
    }
}

TEST(a_failed_pull_is_a_no_in_the_engines_words)
{
    static const struct {
        int status;
        const char *body;
        enum how how;
        const char *want, *why;
    } rows[] = {
        {404, "{\"message\":\"manifest unknown\"}", PLAIN,
         "pull nginx: manifest unknown", "Docker, at once"},
        {500, "{\"message\":\"no such host\"}", PLAIN,
         "pull nginx: no such host", "Docker, no registry"},
        {200, "{\"error\":\"manifest unknown\",\"errorDetail\":{}}", BYTES,
         "pull nginx: manifest unknown", "Podman, in a 200"},
        {200, "{\"status\":\"Pulling fs layer\",\"id\":\"a\"}\r\n{\"error\":"
              "\"toomanyrequests: }{\"}\r\n", BYTES,
         "pull nginx: toomanyrequests: }{", "late"},
        {200, "{\"status\":\"a\"}{\"error\":\"x\"}{\"status\":\"b\"}", PLAIN,
         "pull nginx: x", "lines that are joined"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct heard h;

        test_row("%s", rows[i].why);
        open_fake();
        rule("POST /containers/create", 0, 404, "", PLAIN);
        rule("POST /images/create", 0, rows[i].status, rows[i].body,
             rows[i].how);
        h = start();
        CHECK(h.is_failed);
        CHECK_STR(h.err.text, rows[i].want);
        CHECK(!cube_runtime_is_trouble(&h.err));
        close_fake();
    }
}

TEST(a_pull_that_is_cut_or_goes_silent_is_trouble)
{
    static const struct {
        enum how how;
        const char *body;
        enum cube_code code;
        const char *why;
    } rows[] = {
        {CUT, "{\"status\":\"Pulling\"}", CUBE_ECONN, "EOF inside a chunk"},
        {HANG, "{\"status\":\"Pulling\"}", CUBE_ETIMEOUT, "silence"},
        {HANG, NULL, CUBE_ETIMEOUT, "no answer at all"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct heard h;

        test_row("%s", rows[i].why);
        open_fake();
        rule("POST /containers/create", 0, 404, "", PLAIN);
        rule("POST /images/create", 0, 200, rows[i].body, rows[i].how);
        h = start();
        CHECK(h.is_failed);
        CHECK(cube_runtime_is_trouble(&h.err));
        CHECK_INT(h.err.code, rows[i].code);
        close_fake();
    }
}

TEST(progress_is_told_in_words_and_not_too_often)
{
    static const char *const lines[] = {
        "{\"status\":\"Pulling from library/nginx\",\"id\":\"latest\"}",
        "{\"status\":\"Already exists\",\"id\":\"a\"}"
        "{\"status\":\"Pulling fs layer\",\"id\":\"b\"}",
        "{\"status\":\"Downloading\",\"progressDetail\":{\"current\":12300000,"
        "\"total\":20000000},\"id\":\"b\"}",
        "{\"status\":\"Pull complete\",\"id\":\"b\"}",
    };
    struct cube_task *t;
    struct cube_start what = {NULL, "", "worker", 3, on_progress};
    struct heard h = {0};

    open_fake();
    t = new_task();
    what.task = t;
    progress[0] = 0;
    rule("POST /containers/create", 1, 404, "", PLAIN);
    rule("POST /images/create", 0, 200, "", HANG);
    fake.rt->ops->start(fake.rt, &what, on_container, &h);
    settle();
    CHECK_STR(progress, "pulling nginx;");
    REQUIRE(fake.open_count == 1);
    for (size_t i = 0; i < COUNT(lines); i++) {
        pass(1000);
        cube_http_stream_write(fake.open[0], lines[i], strlen(lines[i]));
        cube_http_stream_write(fake.open[0], "\r\n", 2);
    }
    cube_http_stream_end(fake.open[0]);
    (void)until(&h.is_done);
    CHECK_STR(progress, "pulling nginx;pulling nginx: 1 of 2 layers;"
                        "pulling nginx: 1 of 2 layers, 12.3 MB;"
                        "pulling nginx: 2 of 2 layers, 12.3 MB;");
    CHECK(!h.is_failed);
    cube_task_free(t);
    close_fake();
}

TEST(a_login_is_taken_from_the_users_configuration)
{
    static const struct {
        const char *image, *auths, *want;
    } rows[] = {
        {"r.example:5000/a", "{\"r.example:5000\":{\"auth\":\"dTpwOnE=\"}}",
         "{\"username\":\"u\",\"password\":\"p:q\",\"serveraddress\":"
         "\"r.example:5000\"}"},
        {"nginx", "{\"https://index.docker.io/v1/\":{\"auth\":\"dTpw\"}}",
         "{\"username\":\"u\",\"password\":\"p\",\"serveraddress\":"
         "\"index.docker.io\"}"},
        {"docker.io/library/nginx",
         "{\"https://index.docker.io/v1/\":{\"username\":\"u\","
         "\"password\":\"p\"}}",
         "{\"username\":\"u\",\"password\":\"p\",\"serveraddress\":"
         "\"index.docker.io\"}"},
        {"localhost/a", "{\"localhost\":{\"identitytoken\":\"t\"}}",
         "{\"username\":\"\",\"password\":\"\",\"serveraddress\":"
         "\"localhost\",\"identitytoken\":\"t\"}"},
        {"other.example/a", "{\"r.example\":{\"auth\":\"dTpw\"}}", NULL},
        {"a/b", "null", NULL},
        {"a/b", "{\"x\":", NULL}, /* a broken file is none */
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_task *t;
        struct cube_buf plain = {0};
        char path[400];
        FILE *f;

        test_row("%s %s", rows[i].image, rows[i].auths);
        open_fake();
        env_home = test_dir();
        (void)snprintf(path, sizeof path, "%s/.docker", env_home);
        (void)fake.world.mkdir(fake.world.ctx, path);
        (void)snprintf(path, sizeof path, "%s/.docker/config.json", env_home);
        f = fopen(path, "w");
        REQUIRE(f);
        fprintf(f, "{\"auths\":%s}", rows[i].auths);
        fclose(f);
        t = new_task();
        cube_task_set(&t->image, rows[i].image);
        rule("POST /containers/create", 1, 404, "", PLAIN);
        (void)start_task(t);
        if (rows[i].want) {
            REQUIRE(fake.auth.data);
            CHECK(!strpbrk(fake.auth.data, "+/"));
            CHECK(!cube_base64_decode(&plain, fake.auth.data, fake.auth.len));
            CHECK_STR(plain.data ? plain.data : "", rows[i].want);
        } else {
            CHECK_STR(fake.auth.data, "");
        }
        cube_buf_free(&plain);
        cube_task_free(t);
        close_fake();
    }
}

TEST(a_pull_can_be_cancelled_and_the_engine_notices)
{
    struct cube_task *t;
    struct cube_start what = {NULL, "", "worker", 3, NULL};
    struct heard h = {0};

    open_fake();
    t = new_task();
    what.task = t;
    rule("POST /containers/create", 0, 404, "", PLAIN);
    rule("POST /images/create", 0, 200, NULL, HANG);
    fake.rt->ops->start(fake.rt, &what, on_container, &h);
    settle();
    CHECK_HAS(trace(), "/images/create;");
    fake.rt->ops->start_cancel(fake.rt, "another");
    settle();
    CHECK(!h.is_done);
    fake.rt->ops->start_cancel(fake.rt, t->id);
    CHECK(!h.is_done);
    settle();
    CHECK(h.is_failed);
    CHECK_INT(h.err.code, CUBE_ECANCELED);
    CHECK_INT(fake.gone_count, 1);
    cube_task_free(t);
    close_fake();
}

TEST(a_start_cancelled_while_it_is_made_removes_what_was_made)
{
    static const char *const held[] = {"POST /containers/create",
                                       "POST /containers/c1/start",
                                       "GET /containers/c1/json"};

    for (size_t i = 0; i < COUNT(held); i++) {
        struct cube_task *t;
        struct cube_start what = {NULL, "", "worker", 3, NULL};
        struct heard h = {0};

        test_row("%s", held[i]);
        open_fake();
        t = new_task();
        what.task = t;
        rule(held[i], 0, i == 0 ? 201 : i == 1 ? 200 : 200,
             i == 0 ? "{\"Id\":\"c1\"}" : i == 1 ? "" : healthy, HANG);
        fake.rt->ops->start(fake.rt, &what, on_container, &h);
        settle();
        REQUIRE(fake.open_count == 1);
        fake.rt->ops->start_cancel(fake.rt, t->id);
        settle();
        CHECK(!h.is_done);
        cube_http_stream_end(fake.open[0]); /* its answer comes now */
        (void)until(&h.is_done);
        CHECK_INT(h.err.code, CUBE_ECANCELED);
        CHECK_HAS(trace(), "DELETE /v1.41/containers/c1;");
        cube_task_free(t);
        close_fake();
    }
}

TEST(a_start_cancelled_over_its_refusal_is_cancelled_all_the_same)
{
    static const struct {
        int status;
        const char *body;
        enum cube_code code;
    } rows[] = {
        {200, "", CUBE_ECANCELED},
        {404, "{\"message\":\"No such container: c1\"}", CUBE_ECANCELED},
        {500, "{\"message\":\"it is busy\"}", CUBE_EIO}, /* it may be there */
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct heard h = {0};

        test_row("removal: %d", rows[i].status);
        open_fake();
        rule("POST /containers/c1/start", 0, 500, "{\"message\":\"port is "
             "already allocated\"}", PLAIN);
        rule("GET /containers/c1/json", 0, 200, never_started, PLAIN);
        rule("DELETE /containers/c1", 0, rows[i].status, rows[i].body, HANG);
        call(START, &h);
        settle();
        CHECK_HAS(trace(), "DELETE /v1.41/containers/c1;");
        REQUIRE(fake.open_count == 1);
        fake.rt->ops->start_cancel(fake.rt, id_text);
        settle();
        CHECK(!h.is_done);
        cube_http_stream_end(fake.open[0]);
        (void)until(&h.is_done);
        CHECK_INT(h.err.code, rows[i].code);
        close_fake();
    }
}

/* ---- Stop, kill, remove ---- */

TEST(some_refusals_are_successes)
{
    static const char conflict[] = "{\"message\":\"is not running\"}";
    static const struct {
        enum verb verb;
        const char *to;
        int status;
        const char *after; /* what an inspection says then; or NULL */
        bool is_fine, is_trouble;
    } rows[] = {
        {STOP, "POST /containers/c1/stop", 204, NULL, true, false},
        {STOP, "POST /containers/c1/stop", 304, NULL, true, false},
        {STOP, "POST /containers/c1/stop", 404, NULL, true, false},
        {STOP, "POST /containers/c1/stop", 500, NULL, false, true},
        {KILL, "POST /containers/c1/kill", 204, NULL, true, false},
        {KILL, "POST /containers/c1/kill", 409, NULL, true, false},
        {KILL, "POST /containers/c1/kill", 404, NULL, true, false},
        {KILL, "POST /containers/c1/kill", 500, never_started, true, false},
        {KILL, "POST /containers/c1/kill", 500, healthy, false, true},
        {REMOVE, "DELETE /containers/c1", 204, NULL, true, false},
        {REMOVE, "DELETE /containers/c1", 404, NULL, true, false},
        {REMOVE, "DELETE /containers/c1", 409, NULL, false, true},
        {REMOVE, "DELETE /containers/c1", 500, NULL, false, true},
    };

    open_fake();
    for (size_t i = 0; i < COUNT(rows); i++) {
        struct heard h;

        test_row("%s %d", rows[i].to, rows[i].status);
        forget();
        rule(rows[i].to, 0, rows[i].status,
             rows[i].status >= 400 ? conflict : "", PLAIN);
        if (rows[i].after)
            rule("GET /containers/c1/json", 0, 200, rows[i].after, PLAIN);
        h = do_call(rows[i].verb);
        CHECK_INT(!h.is_failed, rows[i].is_fine);
        if (h.is_failed)
            CHECK_INT(cube_runtime_is_trouble(&h.err), rows[i].is_trouble);
    }
    close_fake();
}

TEST(a_stop_waits_for_its_grace_and_not_for_ever)
{
    struct heard h = {0};
    int64_t took;

    open_fake();
    (void)inspect();
    rule("POST /containers/c1/stop", 0, 204, NULL, HANG);
    fake.rt->ops->stop(fake.rt, "c1", 60000, on_done, &h);
    took = until(&h.is_done);
    CHECK(took >= 60000 + 30000);
    CHECK(took < 60000 + 200000);
    CHECK(cube_runtime_is_trouble(&h.err));
    close_fake();
}

/* ---- What an inspection says ---- */

TEST(inspections_are_read_whatever_is_missing)
{
    static const struct {
        const char *json;
        enum cube_box_state state;
        bool has_exit;
        int exit_code;
        const char *error, *ports;
    } rows[] = {
        {"{\"Id\":\"c1\"}", CUBE_BOX_EXITED, true, 0, "", ""},
        {"{\"Id\":\"c1\",\"State\":null,\"Config\":null,"
         "\"NetworkSettings\":null}", CUBE_BOX_EXITED, true, 0, "", ""},
        {"{\"Id\":\"c1\",\"State\":{\"Running\":true},\"Config\":{\"Labels\":"
         "null},\"NetworkSettings\":{\"Ports\":null}}", CUBE_BOX_RUNNING,
         false, 0, "", ""},
        {"{\"NetworkSettings\":{\"New\":[1],\"Ports\":{\"1/udp\":[]}},"
         "\"State\":{\"ExitCode\":0,\"Status\":\"running\"},\"X\":{},"
         "\"Id\":\"c1\"}", CUBE_BOX_RUNNING, false, 0, "",
         "1/udp=null:null "},
        {"{\"Id\":\"c1\",\"State\":{\"Status\":\"paused\"}}",
         CUBE_BOX_RUNNING, false, 0, "", ""},
        {"{\"Id\":\"c1\",\"State\":{\"Status\":\"created\",\"ExitCode\":128,"
         "\"Error\":\"port is already allocated\"}}", CUBE_BOX_CREATED, false,
         128, "port is already allocated", ""},
        {"{\"Id\":\"c1\",\"State\":{\"Status\":\"exited\",\"ExitCode\":137,"
         "\"OOMKilled\":true,\"Error\":\"\"}}", CUBE_BOX_EXITED, true, 137,
         "killed: out of memory", ""},
        {"{\"Id\":\"c1\",\"State\":{\"Status\":\"exited\",\"ExitCode\":137,"
         "\"OOMKilled\":false}}", CUBE_BOX_EXITED, true, 137, "", ""},
        {"{\"Id\":\"c1\",\"State\":{\"Status\":\"exited\",\"ExitCode\":0,"
         "\"OOMKilled\":true}}", CUBE_BOX_EXITED, true, 0, "", ""},
        {"{\"Id\":\"c1\",\"State\":{\"Status\":\"dead\",\"ExitCode\":1}}",
         CUBE_BOX_EXITED, true, 1, "", ""},
        {"{\"Id\":\"c1\",\"State\":{\"Running\":true},\"NetworkSettings\":"
         "{\"Ports\":{\"80/tcp\":[{\"HostIp\":\"\",\"HostPort\":\"1\"}]}}}",
         CUBE_BOX_RUNNING, false, 0, "", "80/tcp=0.0.0.0:1 "},
    };

    open_fake();
    for (size_t i = 0; i < COUNT(rows); i++) {
        struct heard h;

        test_row("%s", rows[i].json);
        forget();
        rule("GET /containers/c1/json", 0, 200, rows[i].json,
             i % 2 ? BYTES : PLAIN);
        h = inspect();
        CHECK(!h.is_failed);
        CHECK_INT(h.state, rows[i].state);
        CHECK_INT(h.has_exit, rows[i].has_exit);
        CHECK_INT(h.exit_code, rows[i].exit_code);
        CHECK_STR(h.error, rows[i].error);
        CHECK_STR(h.ports, rows[i].ports);
    }
    close_fake();
}

TEST(an_inspection_of_a_megabyte_is_read)
{
    struct cube_buf big = {0};
    struct heard h;

    open_fake();
    cube_buf_puts(&big, "{\"Id\":\"c1\",\"State\":{\"Running\":true},"
                        "\"Mounts\":[");
    while (big.len < 3 << 20)
        cube_buf_puts(&big, "{\"Source\":\"/a/b/c/d/e/f/g\"},");
    cube_buf_puts(&big, "0]}");
    rule("GET /containers/c1/json", 0, 200, big.data, PLAIN);
    h = inspect();
    CHECK(!h.is_failed);
    CHECK_INT(h.state, CUBE_BOX_RUNNING);
    cube_buf_free(&big);
    close_fake();
}

TEST(a_list_leaves_out_what_is_gone_and_takes_null)
{
    static const struct {
        const char *list;
        size_t want;
    } rows[] = {
        {"null", 0},
        {"[]", 0},
        {"[{\"Id\":\"c1\"},{\"Id\":\"c2\"}]", 2},
        {"[{\"Id\":\"c1\"},{\"Id\":\"gone\"},{\"Id\":\"c2\"},{}]", 2},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct heard h;

        test_row("%s", rows[i].list);
        open_fake();
        rule("GET /containers/json", 0, 200, rows[i].list, PLAIN);
        rule("GET /containers/gone/json", 0, 404, "", PLAIN);
        h = do_call(LIST);
        CHECK(!h.is_failed);
        CHECK_UINT(h.list_count, rows[i].want);
        close_fake();
    }
}

/* ---- Logs ---- */

static const char frames[] =
    "\001\0\0\0\0\0\0\003abc\002\0\0\0\0\0\0\002de\001\0\0\0\0\0\0\0"
    "\001\0\0\0\0\0\0\001f";

/* Sends the frames in pieces of `step` bytes. */
static void logs_in_pieces(size_t step, bool is_tty, bool is_cut,
                           struct heard *h)
{
    struct cube_logs_options o = {true, 5};

    rule("GET /containers/c1/json", 0, 200,
         is_tty ? "{\"Id\":\"c1\",\"Config\":{\"Tty\":true}}" : healthy,
         PLAIN);
    rule("GET /containers/c1/logs", 0, 200, "", HANG);
    (void)fake.rt->ops->logs(fake.rt, "c1", &o, on_data, on_done, h);
    settle();
    if (fake.open_count != 1) {
        FAIL("no log was asked for");
        return;
    }
    for (size_t at = 0; at < sizeof frames - 1; at += step) {
        size_t n = sizeof frames - 1 - at < step ? sizeof frames - 1 - at
                                                 : step;

        cube_http_stream_write(fake.open[0], frames + at, n);
        settle();
    }
    if (is_cut)
        cube_http_stream_abort(fake.open[0]);
    else
        cube_http_stream_end(fake.open[0]);
    (void)until(&h->is_done);
}

TEST(log_frames_may_be_cut_anywhere)
{
    for (size_t step = 1; step < sizeof frames; step++) {
        struct heard h = {0};

        test_row("pieces of %zu", step);
        open_fake();
        logs_in_pieces(step, false, false, &h);
        CHECK(!h.is_failed);
        CHECK_STR(h.text.data, "abcdef");
        cube_buf_free(&h.text);
        close_fake();
    }
}

static void on_piece(void *arg, const char *p, size_t len)
{
    cube_buf_printf(arg, "[%.*s]", (int)len, p);
}

/* The bytes that are drawn where logs begin, cut where they are cut there. */
TEST(a_log_frame_is_as_it_is_drawn)
{
    static const char bytes[] = "\1\0\0\0\0\0\0\4out\n\2\0\0\0\0\0\0\2e\n";
    struct cube_docker_logs l = {.logs = {.on_data = on_piece}};
    struct cube_buf got = {0};

    l.logs.arg = &got;
    cube_docker_logs_piece(&l.op, bytes, 10);
    cube_docker_logs_piece(&l.op, bytes + 10, sizeof bytes - 1 - 10);
    CHECK_STR(got.data, "[ou][t\n][e\n]");
    CHECK_INT(l.left + l.have, 0);
    cube_buf_free(&got);
}

TEST(a_terminals_log_is_raw_and_a_cut_log_says_so)
{
    struct heard h = {0}, cut = {0};

    open_fake();
    logs_in_pieces(5, true, false, &h);
    CHECK_MEM(h.text.data, frames, sizeof frames - 1);
    cube_buf_free(&h.text);
    close_fake();
    open_fake();
    logs_in_pieces(5, false, true, &cut);
    CHECK(cut.is_failed);
    CHECK(cube_runtime_is_trouble(&cut.err));
    CHECK_STR(cut.text.data, "abcdef");
    cube_buf_free(&cut.text);
    close_fake();
}

static struct cube_logs *cancel_handle;

static void on_data_cancel(void *arg, const char *p, size_t len)
{
    on_data(arg, p, len);
    fake.rt->ops->logs_cancel(fake.rt, cancel_handle);
}

TEST(a_log_can_be_given_up_from_its_own_callback)
{
    struct cube_logs_options o = {true, -1};
    struct heard h = {0};

    open_fake();
    rule("GET /containers/c1/logs", 0, 200, "", HANG);
    cancel_handle = fake.rt->ops->logs(fake.rt, "c1", &o, on_data_cancel,
                                       on_done, &h);
    settle();
    REQUIRE(fake.open_count == 1);
    cube_http_stream_write(fake.open[0], frames, sizeof frames - 1);
    settle();
    CHECK_STR(h.text.data, "abc");
    CHECK(!h.is_done);
    cube_buf_free(&h.text);
    close_fake();
}

static void on_data_hold(void *arg, const char *p, size_t len)
{
    on_data(arg, p, len);
    fake.rt->ops->logs_hold(fake.rt, cancel_handle, true);
}

TEST(a_log_that_is_held_is_left_with_the_engine)
{
    struct cube_logs_options o = {true, -1};
    struct heard h = {0};
    char piece[8 + 50000] = {1, 0, 0, 0, 0, 0, (char)(50000 >> 8),
                             (char)(50000 & 255)};

    open_fake();
    rule("GET /containers/c1/logs", 0, 200, "", HANG);
    cancel_handle = fake.rt->ops->logs(fake.rt, "c1", &o, on_data_hold,
                                       on_done, &h);
    settle();
    REQUIRE(fake.open_count == 1);
    for (int i = 0; i < 200; i++)
        cube_http_stream_write(fake.open[0], piece, sizeof piece);
    settle();
    CHECK(h.text.len < 1 << 20);
    CHECK(cube_http_stream_backlog(fake.open[0]) > 1 << 20);
    cube_http_stream_end(fake.open[0]);
    for (int i = 0; i < 20000 && !h.is_done; i++) {
        fake.rt->ops->logs_hold(fake.rt, cancel_handle, false);
        cube_loop_turn(fake.loop, 1, NULL);
    }
    CHECK(h.is_done && !h.is_failed);
    CHECK_UINT(h.text.len, 200 * 50000);
    cube_buf_free(&h.text);
    close_fake();
}

/* ---- Events ---- */

static char changes[2000];
static bool is_unwatching;

static void on_change(void *arg, const char *task)
{
    (void)arg;
    strncat(changes, task ? task : "all", sizeof changes - strlen(changes) - 1);
    strncat(changes, ";", sizeof changes - strlen(changes) - 1);
    if (is_unwatching)
        fake.rt->ops->watch(fake.rt, NULL, NULL, NULL);
}

static void watch(void)
{
    changes[0] = 0;
    is_unwatching = false;
    fake.rt->ops->watch(fake.rt, NULL, on_change, NULL);
    settle();
}

static const char two_events[] =
    "{\"Type\":\"container\",\"Action\":\"die\",\"Actor\":{\"ID\":\"c1\","
    "\"Attributes\":{\"cube.task\":\"t1\",\"exitCode\":\"3\"}},\"time\":1}"
    "{\"Type\":\"container\",\"Action\":\"exec_start: }{\",\"Actor\":{"
    "\"Attributes\":{\"cube.task\":\"t1\"}}}{\"Action\":\"die\",\"Actor\":"
    "{\"Attributes\":{\"image\":\"x\"}}}{\"Actor\":null}{]}\n"
    "{\"status\":\"start\",\"Action\":\"start\",\"Actor\":{\"Attributes\":{"
    "\"name\":\"\\\"}{\",\"cube.task\":\"t2\"}}}";

TEST(events_name_tasks_however_they_are_cut)
{
    for (size_t step = 1; step < sizeof two_events; step += 7) {
        test_row("pieces of %zu", step);
        open_fake();
        watch();
        CHECK_STR(changes, "all;");
        REQUIRE(fake.open_count == 1);
        for (size_t at = 0; at < sizeof two_events - 1; at += step) {
            size_t left = sizeof two_events - 1 - at;

            cube_http_stream_write(fake.open[0], two_events + at,
                                   left < step ? left : step);
            settle();
        }
        CHECK_STR(changes, "all;t1;t2;");
        close_fake();
    }
}

/* Each event of a neighbour once made a worker inspect all that it had. */
TEST(events_of_another_workers_containers_are_not_told)
{
    static const char events[] =
        "{\"Action\":\"die\",\"Actor\":{\"ID\":\"c1\",\"Attributes\":{"
        "\"cube.task\":\"t1\",\"cube.worker\":\"they\"}}}"
        "{\"Action\":\"die\",\"Actor\":{\"ID\":\"c2\",\"Attributes\":{"
        "\"cube.task\":\"t2\",\"cube.worker\":\"we\"}}}"
        "{\"Action\":\"die\",\"Actor\":{\"ID\":\"c3\",\"Attributes\":{"
        "\"cube.task\":\"t3\"}}}";
    static const struct {
        const char *worker, *told;
    } rows[] = {{"we", "all;t2;"}, {"they", "all;t1;"},
                {NULL, "all;t1;t2;t3;"}};

    for (size_t i = 0; i < COUNT(rows); i++) {
        test_row("worker %s", rows[i].worker ? rows[i].worker : "NULL");
        open_fake();
        watch();
        fake.rt->ops->watch(fake.rt, rows[i].worker, on_change, NULL);
        changes[0] = 0;
        settle();
        REQUIRE(fake.open_count == 2);
        cube_http_stream_write(fake.open[1], events, sizeof events - 1);
        settle();
        CHECK_STR(changes, rows[i].told);
        close_fake();
    }
}

TEST(a_cut_event_stream_is_opened_again_and_everything_looked_at)
{
    open_fake();
    watch();
    for (int i = 0; i < 3; i++) {
        changes[0] = 0;
        cube_http_stream_abort(fake.open[i]);
        settle();
        CHECK_STR(changes, "");
        pass(200);
        CHECK_STR(changes, "all;");
        REQUIRE(fake.open_count == (size_t)i + 2);
    }
    close_fake();
}

TEST(an_engine_that_is_away_is_tried_with_a_growing_delay)
{
    size_t tries;

    open_fake();
    watch();
    cube_http_close(fake.server);
    fake.server = NULL;
    fake.open_count = 0;
    changes[0] = 0;
    pass(60000);
    CHECK_STR(changes, "");
    CHECK(!fake.rt->is_up);
    serve();
    tries = fake.trace.len;
    pass(6000); /* the longest delay is 5 s */
    CHECK_STR(changes, "all;");
    CHECK(fake.trace.len > tries);
    CHECK(fake.rt->is_up);
    close_fake();
}

TEST(an_engine_that_hangs_is_noticed_by_its_ping)
{
    open_fake();
    watch();
    rule("GET /_ping", 0, 200, NULL, HANG);
    rule("GET /events", 0, 200, NULL, HANG);
    changes[0] = 0;
    pass(60000);
    CHECK(!fake.rt->is_up);
    forget();
    pass(60000);
    CHECK(fake.rt->is_up);
    CHECK_HAS(changes, "all;");
    close_fake();
}

TEST(what_somebody_sent_a_signal_to_was_interrupted)
{
    static const struct {
        const char *actions[3];
        bool want;
    } rows[] = {
        {{"die"}, false},                 /* its own end */
        {{"kill", "die"}, true},          /* as an engine does that stops */
        {{"kill", "start", "die"}, false}, /* and was started again */
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct heard h = {0};

        test_row("row %zu", i);
        open_fake();
        rule("GET /containers/c1/json", 0, 200,
             "{\"Id\":\"c1\",\"State\":{\"Status\":\"exited\","
             "\"ExitCode\":0,\"FinishedAt\":\"2025-03-01T10:00:00Z\"}}",
             PLAIN);
        watch();
        REQUIRE(fake.open_count == 1);
        for (size_t k = 0; k < 3 && rows[i].actions[k]; k++) {
            struct cube_buf event = {0};

            cube_buf_printf(&event, "{\"Action\":\"%s\",\"Actor\":{\"ID\":"
                            "\"c1\",\"Attributes\":{\"cube.task\":\"t1\"}}}",
                            rows[i].actions[k]);
            cube_http_stream_write(fake.open[0], event.data, event.len);
            settle();
            cube_buf_free(&event);
        }
        fake.rt->ops->inspect(fake.rt, "c1", on_interrupted, &h);
        (void)until(&h.is_done);
        CHECK_INT(was_interrupted, rows[i].want);
        close_fake();
    }
}

TEST(watching_can_end_in_its_own_callback)
{
    open_fake();
    watch();
    is_unwatching = true;
    cube_http_stream_write(fake.open[0], two_events, sizeof two_events - 1);
    pass(30000);
    CHECK_STR(changes, "all;t1;");
    CHECK_INT(fake.gone_count, 1);
    close_fake();
}

/* ---- An engine in trouble ---- */

TEST(no_call_waits_for_an_engine_that_never_answers)
{
    for (int verb = 0; verb < VERBS; verb++) {
        static const char *const all[] = {"GET /", "POST /", "DELETE /"};
        struct heard h;

        for (int is_known = 0; is_known < 2; is_known++) {
            test_row("%s, version %s", verb_names[verb],
                     is_known ? "known" : "not known");
            open_fake();
            if (is_known)
                (void)inspect();
            for (size_t i = 0; i < COUNT(all); i++)
                rule(all[i], 0, 0, NULL, HANG);
            h = do_call((enum verb)verb);
            CHECK(h.is_failed);
            CHECK_INT(h.err.code, CUBE_ETIMEOUT);
            CHECK(cube_runtime_is_trouble(&h.err));
            close_fake();
        }
    }
}

TEST(an_engine_that_answers_500_to_everything_is_in_trouble)
{
    for (int verb = 0; verb < VERBS; verb++) {
        static const char *const all[] = {"GET /", "POST /", "DELETE /"};

        for (int is_known = 0; is_known < 2; is_known++) {
            struct heard h;

            test_row("%s, version %s", verb_names[verb],
                     is_known ? "known" : "not known");
            open_fake();
            if (is_known)
                (void)inspect();
            for (size_t i = 0; i < COUNT(all); i++)
                rule(all[i], 0, 500, "{\"message\":\"boom\"}", PLAIN);
            h = do_call((enum verb)verb);
            CHECK(h.is_failed);
            CHECK(cube_runtime_is_trouble(&h.err));
            CHECK_HAS(h.err.text, "boom");
            close_fake();
        }
    }
}

TEST(an_engine_that_is_not_there_is_in_trouble_and_comes_back)
{
    for (int verb = 0; verb < VERBS; verb++) {
        struct heard h;

        test_row("%s", verb_names[verb]);
        open_fake();
        (void)inspect();
        cube_http_close(fake.server);
        fake.server = NULL;
        h = do_call((enum verb)verb);
        CHECK(h.is_failed);
        CHECK(cube_runtime_is_trouble(&h.err));
        CHECK(!fake.rt->is_up);
        serve();
        if (verb != LOGS) { /* whose stream would stay open */
            h = do_call((enum verb)verb);
            CHECK(!h.is_failed || h.err.code == CUBE_ENOENT);
            CHECK(fake.rt->is_up);
        }
        close_fake();
    }
}

TEST(answers_that_are_cut_are_trouble)
{
    for (int verb = 0; verb < VERBS; verb++) {
        static const char *const all[] = {"GET /", "POST /", "DELETE /"};
        struct heard h;

        test_row("%s", verb_names[verb]);
        open_fake();
        (void)inspect();
        for (size_t i = 0; i < COUNT(all); i++)
            rule(all[i], 0, 200, "[{\"Id\":", CUT);
        h = do_call((enum verb)verb);
        CHECK(h.is_failed);
        CHECK(cube_runtime_is_trouble(&h.err));
        close_fake();
    }
}

TEST(what_is_freed_with_calls_in_flight_calls_back_no_more)
{
    struct heard h[VERBS];

    memset(h, 0, sizeof h);
    open_fake();
    (void)inspect();
    watch();
    for (int verb = 0; verb < VERBS; verb++)
        call((enum verb)verb, &h[verb]);
    (void)cube_loop_turn(fake.loop, 0, NULL);
    close_fake();
    for (int verb = 0; verb < VERBS; verb++)
        CHECK(!h[verb].is_done);
}

/* ---- Finding a runtime ---- */

struct found {
    bool is_done;
    struct cube_runtime *rt;
    char words[700];
    struct cube_err err;
};

static void on_found(void *arg, struct cube_runtime *rt, const char *words,
                     const struct cube_err *err)
{
    struct found *f = arg;

    f->is_done = true;
    f->rt = rt;
    (void)snprintf(f->words, sizeof f->words, "%s", words);
    if (err)
        f->err = *err;
}

static unsigned root(void *ctx)
{
    (void)ctx;
    return 0;
}

/* Not under valgrind, nor on an old kernel: t09_process skips there too. */
static bool has_pidfd(void)
{
    const struct cube_world *w = cube_world_real();
    int fd = w->pid_open(w->ctx, getpid());

    if (fd >= 0)
        w->close(w->ctx, fd);
    return fd >= 0;
}

TEST(a_runtime_is_found_and_it_is_said_why)
{
    static const struct {
        const char *which, *docker, *podman; /* "x" is the fake engine */
        const char *name, *words;
        bool is_up;
    } rows[] = {
        {"auto", "x", "unix:///nosuch/p", "docker",
         "Docker Engine 20.10.24 at", true},
        {"docker", "x", "unix:///nosuch/p", "docker", "Docker Engine", true},
        {NULL, "x", "unix:///nosuch/p", "docker", "Docker Engine", true},
        {"auto", "unix:///nosuch/d", "x", "podman",
         ", since GET unix:///nosuch/d", true},
        {"auto", "ssh://me@host", "x", "podman", "ssh:", true},
        {"podman", "unix:///nosuch/d", "x", "podman", "Podman 20.10.24 at",
         true},
        {"auto", "unix:///nosuch/d", "unix:///nosuch/p", "process",
         "unix:///nosuch/p", true},
        {"process", "x", "x", "process", "process", true},
        {"docker", "unix:///nosuch/d", "x", "docker", "for which we wait",
         false},
        {"podman", "x", "unix:///nosuch/p", "podman", "for which we wait",
         false},
        {"lxc", "x", "x", NULL, "", false},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct found f = {0};

        if (rows[i].name && !strcmp(rows[i].name, "process") && !has_pidfd())
            continue;
        test_row("%s %s %s", rows[i].which, rows[i].docker, rows[i].podman);
        open_fake();
        fake.world.uid = root;
        fake.is_podman = rows[i].name && !strcmp(rows[i].name, "podman");
        env_docker_host = strcmp(rows[i].docker, "x") ? rows[i].docker
                                                      : fake.where;
        env_container_host = strcmp(rows[i].podman, "x") ? rows[i].podman
                                                         : fake.where;
        (void)cube_runtime_find(fake.loop, rows[i].which, test_dir(), on_found,
                                &f);
        CHECK(!f.is_done);
        (void)until(&f.is_done);
        CHECK_INT(f.rt != NULL, rows[i].name != NULL);
        if (f.rt) {
            CHECK_STR(f.rt->name, rows[i].name);
            CHECK_HAS(f.words, rows[i].words);
            CHECK_INT(f.rt->is_up, rows[i].is_up);
        } else {
            CHECK_INT(f.err.code, CUBE_EINVAL);
            CHECK_HAS(f.err.text, "lxc is no runtime");
        }
        cube_runtime_free(f.rt);
        close_fake();
    }
}

TEST(a_search_can_be_given_up_at_any_time)
{
    for (int turns = 0; turns < 12; turns++) {
        struct found f = {0};
        struct cube_runtime_search *s;

        test_row("after %d turns", turns);
        open_fake();
        env_docker_host = "unix:///nosuch/d";
        env_container_host = fake.where;
        rule("GET /_ping", 0, 200, NULL, HANG);
        s = cube_runtime_find(fake.loop, "auto", test_dir(), on_found, &f);
        for (int i = 0; i < turns; i++)
            (void)cube_loop_turn(fake.loop, 0, NULL);
        cube_runtime_find_cancel(s);
        settle();
        CHECK(!f.is_done);
        close_fake();
    }
    cube_runtime_find_cancel(NULL);
}

TEST(who_the_engine_is_can_be_said)
{
    open_fake();
    (void)inspect();
    CHECK_STR(fake.rt->name, "docker");
    CHECK_HAS(fake.rt->words, "Docker Engine 20.10.24 at unix:");
    CHECK_STR(fake.rt->engine_id, "ENGINE");
    close_fake();
    open_fake();
    fake.is_podman = true;
    (void)inspect();
    CHECK_STR(fake.rt->name, "podman");
    CHECK_HAS(fake.rt->words, "Podman 20.10.24 at unix:");
    CHECK_STR(fake.rt->engine_id, "podman:host:/var/lib/x");
    close_fake();
}

TEST(the_host_of_an_engine_elsewhere_is_known)
{
    static const struct {
        const char *where, *host;
    } rows[] = {
        {"unix:///var/run/docker.sock", NULL},
        {"tcp://127.0.0.1:2375", NULL},
        {"tcp://localhost", NULL},
        {"tcp://[::1]:2375", NULL},
        {"tcp://LocalHost:2375", NULL},
        {"tcp://127.example:2375", "127.example"},
        {"tcp://engine.example:2375", "engine.example"},
        {"tcp://[fd00::5]:2375", "fd00::5"},
        {"http://10.0.0.7:2375", "10.0.0.7"},
    };
    struct cube_loop *l = cube_loop_new(cube_world_real(), NULL);

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_runtime *rt = cube_docker_new(l, rows[i].where, NULL);

        test_row("%s", rows[i].where);
        REQUIRE(rt);
        CHECK_STR(rt->host ? rt->host : "(here)",
                  rows[i].host ? rows[i].host : "(here)");
        cube_runtime_free(rt);
    }
    cube_loop_free(l);
}

TEST(places_that_make_no_sense_are_refused)
{
    static const char *const rows[] = {"", "ssh://me@host", "tcp://",
                                       "https://x:2376", "unix:"};
    struct cube_loop *l = cube_loop_new(cube_world_real(), NULL);

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_err err = {0};
        struct cube_runtime *rt = cube_docker_new(l, rows[i], &err);

        test_row("'%s'", rows[i]);
        CHECK(!rt);
        CHECK_INT(err.code, CUBE_EINVAL);
        CHECK(*err.text);
        cube_runtime_free(rt);
    }
    cube_loop_free(l);
}
