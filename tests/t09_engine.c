/*
 * Chapter 9 on real engines: the lines of the engine's own behaviour that a
 * fake can only imitate. CUBE_TEST_DOCKER and CUBE_TEST_PODMAN name sockets,
 * CUBE_TEST_IMAGE an image that both have, CUBE_TEST_REGISTRY and
 * CUBE_TEST_PRIVATE registries that hold it (tools/engine sets them). Each
 * test runs on every engine there is; with CUBE_TEST_ENGINE=required one that
 * is missing is a failure.
 */
#include "test.h"

#define TURN_LIMIT_MS 60000

static const char image[] = "cube-test/busybox:latest";

/* ---- One engine, and what the test makes on it ---- */

struct engine {
    struct cube_loop *loop;
    struct cube_runtime *rt;
    char worker[CUBE_UUID_TEXT];
    bool is_podman;
};

/* What a callback said, and that it came. */
struct heard {
    bool is_done, is_failed;
    struct cube_err err;
    struct cube_container c; /* texts point into `texts` */
    char id[100], name[200], spec[4000], error[600], host_port[20];
    size_t count;
    struct cube_buf text;
};

static char docker_config[600];

static const char *engine_env(void *ctx, const char *name)
{
    (void)ctx;
    if (!strcmp(name, "DOCKER_CONFIG"))
        return *docker_config ? docker_config : "/nonexistent";
    return getenv(name);
}

static void put(char *to, size_t size, const char *from)
{
    (void)snprintf(to, size, "%s", from);
}

static void hear_err(struct heard *h, const struct cube_err *err)
{
    h->is_done = true;
    h->is_failed = err != NULL;
    if (err)
        h->err = *err;
}

static void on_container(void *arg, const struct cube_container *c,
                         const struct cube_err *err)
{
    struct heard *h = arg;

    if (h->is_done)
        FAIL("a callback came twice");
    hear_err(h, err);
    if (!c)
        return;
    h->c = *c;
    put(h->id, sizeof h->id, c->id);
    put(h->name, sizeof h->name, c->name);
    put(h->spec, sizeof h->spec, c->spec);
    put(h->error, sizeof h->error, c->error);
    h->host_port[0] = 0;
    for (size_t i = 0; i < c->ports.count; i++) {
        if (c->ports.list[i].count > 0)
            put(h->host_port, sizeof h->host_port,
                c->ports.list[i].bindings[0].port);
    }
    h->c.id = h->id;
    h->c.name = h->name;
    h->c.spec = h->spec;
    h->c.error = h->error;
}

static void on_done(void *arg, const struct cube_err *err)
{
    if (((struct heard *)arg)->is_done)
        FAIL("a callback came twice");
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

    hear_err(h, err);
    h->count = count;
    for (size_t i = 0; i < count; i++)
        cube_buf_printf(&h->text, "%s ", list[i].id);
}

static void turn_until(struct engine *e, const bool *flag)
{
    int64_t end = cube_loop_now_ms(e->loop) + TURN_LIMIT_MS;

    while (!*flag && cube_loop_now_ms(e->loop) < end)
        (void)cube_loop_turn(e->loop, 100, NULL);
    if (!*flag)
        FAIL("no callback within %d ms", TURN_LIMIT_MS);
}

static void turn_for(struct engine *e, int64_t ms)
{
    int64_t end = cube_loop_now_ms(e->loop) + ms;

    while (cube_loop_now_ms(e->loop) < end)
        (void)cube_loop_turn(e->loop, 20, NULL);
}

static bool is_required(void)
{
    const char *text = getenv("CUBE_TEST_ENGINE");

    return text && !strcmp(text, "required");
}

static struct cube_world engine_world;

/* Opens the engine of row `i`; false: there is none. */
static bool open_engine(struct engine *e, size_t i)
{
    static const char *const names[] = {"CUBE_TEST_DOCKER",
                                        "CUBE_TEST_PODMAN"};
    const char *where = getenv(names[i]);

    test_row("%s", names[i]);
    memset(e, 0, sizeof *e);
    if (!where || !*where) {
        if (is_required())
            FAIL("%s is not set, and CUBE_TEST_ENGINE=required", names[i]);
        return false;
    }
    engine_world = *cube_world_real();
    engine_world.env = engine_env;
    *docker_config = 0;
    e->loop = cube_loop_new(&engine_world, NULL);
    e->rt = cube_docker_new(e->loop, where, NULL);
    e->is_podman = i == 1;
    cube_uuid_new(&engine_world, e->worker);
    return true;
}

static void remove_ours(struct engine *e)
{
    struct heard h = {0}, gone;
    char *id, *rest;

    e->rt->ops->list(e->rt, e->worker, on_list, &h);
    turn_until(e, &h.is_done);
    for (rest = h.text.data; rest && (id = strtok_r(rest, " ", &rest));) {
        memset(&gone, 0, sizeof gone);
        e->rt->ops->remove(e->rt, id, on_done, &gone);
        turn_until(e, &gone.is_done);
        CHECK(!gone.is_failed);
    }
    cube_buf_free(&h.text);
}

static void close_engine(struct engine *e)
{
    remove_ours(e);
    cube_runtime_free(e->rt);
    cube_loop_free(e->loop);
}

/* Runs `test` on each engine that there is. */
static int on_each_engine(void (*test)(struct engine *e))
{
    struct engine e;
    int count = 0;

    for (size_t i = 0; i < 2; i++) {
        if (!open_engine(&e, i))
            continue;
        test(&e);
        close_engine(&e);
        count++;
    }
    return count;
}

/* Leaves the test, which has nothing open yet. NULL: it needs no variable. */
static void need(const char *variable)
{
    const char *value = variable ? getenv(variable) : "none";
    char words[80];

    if (value && *value)
        return;
    if (is_required())
        FAIL("%s is not set, and CUBE_TEST_ENGINE=required", variable);
    (void)snprintf(words, sizeof words, "no %s", variable);
    SKIP(words);
}

/* A test that needs more than an engine names it here, and not in its body,
 * which runs with an engine open. */
#define ENGINE_TEST_WITH(name, variable)          \
    static void name##_on(struct engine *e);      \
    TEST(name)                                    \
    {                                             \
        need(variable);                           \
        if (on_each_engine(name##_on) == 0 &&     \
            !is_required())                       \
            SKIP("no engine: tools/engine use");  \
    }                                             \
    static void name##_on(struct engine *e)

#define ENGINE_TEST(name) ENGINE_TEST_WITH(name, NULL)

/* ---- Short ways ---- */

static struct cube_task *new_task(const char *name, const char *script)
{
    struct cube_task *t = cube_task_new();

    cube_uuid_new(&engine_world, t->id);
    cube_task_set(&t->name, name);
    cube_task_set(&t->image, image);
    cube_task_add(&t->cmd, "sh");
    cube_task_add(&t->cmd, "-c");
    cube_task_add(&t->cmd, script);
    return t;
}

static char last_progress[300];
static int progress_count;

static void on_progress(void *arg, const char *words)
{
    (void)arg;
    put(last_progress, sizeof last_progress, words);
    progress_count++;
}

static struct heard start(struct engine *e, const struct cube_task *t,
                          int64_t attempt)
{
    struct cube_start what = {t, "", e->worker, attempt, on_progress};
    struct heard *h = calloc(1, sizeof *h), result;

    e->rt->ops->start(e->rt, &what, on_container, h);
    if (h->is_done)
        FAIL("the callback came before the call returned");
    turn_until(e, &h->is_done);
    result = *h;
    free(h);
    return result;
}

static struct heard inspect(struct engine *e, const char *id)
{
    struct heard h = {0};

    e->rt->ops->inspect(e->rt, id, on_container, &h);
    turn_until(e, &h.is_done);
    return h;
}

/* Looks until it has ended. */
static struct heard wait_for_end(struct engine *e, const char *id)
{
    struct heard h = inspect(e, id);

    for (int i = 0; i < 200 && h.c.state == CUBE_BOX_RUNNING; i++) {
        turn_for(e, 50);
        h = inspect(e, id);
    }
    return h;
}

static void stop(struct engine *e, const char *id, int64_t grace_ms)
{
    struct heard h = {0};

    e->rt->ops->stop(e->rt, id, grace_ms, on_done, &h);
    turn_until(e, &h.is_done);
    CHECK(!h.is_failed);
}

static size_t count_ours(struct engine *e)
{
    struct heard h = {0};

    e->rt->ops->list(e->rt, e->worker, on_list, &h);
    turn_until(e, &h.is_done);
    CHECK(!h.is_failed);
    cube_buf_free(&h.text);
    return h.count;
}

static void logs(struct engine *e, const char *id, bool is_following,
                 int64_t tail, struct cube_buf *out)
{
    struct cube_logs_options o = {is_following, tail};
    struct heard h = {0};

    (void)e->rt->ops->logs(e->rt, id, &o, on_data, on_done, &h);
    turn_until(e, &h.is_done);
    CHECK(!h.is_failed);
    *out = h.text;
}

/* ---- The tests ---- */

ENGINE_TEST(a_task_runs_with_its_command_environment_and_ports)
{
    struct cube_task *t = new_task("docker-runs", "echo $A; exec sleep 100");
    struct cube_buf out = {0};
    struct heard h;

    cube_task_add(&t->env, "A=b c");
    cube_task_expose(t, "8080");
    h = start(e, t, 7);
    CHECK(!h.is_failed);
    CHECK_STR(h.err.text, "");
    CHECK_INT(h.c.state, CUBE_BOX_RUNNING);
    CHECK_STR(h.name, "docker-runs");
    CHECK_INT(h.c.attempt, 7);
    CHECK_INT(h.c.restart, 0);
    CHECK(atoi(h.host_port) > 0);
    CHECK(cube_time_is_set(&h.c.started));
    CHECK(!cube_time_is_set(&h.c.finished));
    cube_task_print(t, &out);
    CHECK_STR(h.spec, out.data);
    cube_buf_free(&out);
    turn_for(e, 300);
    logs(e, h.id, false, -1, &out);
    CHECK_STR(out.data, "b c\n");
    cube_buf_free(&out);
    CHECK(e->rt->is_up);
    CHECK_STR(e->rt->name, e->is_podman ? "podman" : "docker");
    CHECK_HAS(e->rt->words, e->is_podman ? "Podman 4" : "Docker Engine 20");
    CHECK(*e->rt->engine_id);
    cube_task_free(t);
}

ENGINE_TEST(a_port_that_is_asked_for_is_the_one)
{
    struct cube_task *t = new_task("docker-port", "exec sleep 100");
    struct cube_task *other = new_task("docker-port-2", "exec sleep 100");
    struct heard h;

    cube_task_publish(t, "80/tcp", "18471");
    cube_task_publish(other, "81", "18471");
    h = start(e, t, 1);
    CHECK(!h.is_failed);
    CHECK_STR(h.host_port, "18471");
    h = start(e, other, 1);
    CHECK(h.is_failed);
    CHECK(!cube_runtime_is_trouble(&h.err));
    CHECK_HAS(h.err.text, e->is_podman ? "address already in use"
                                       : "port is already allocated");
    CHECK_UINT(count_ours(e), 1); /* nothing is left of the second */
    remove_ours(e);
    h = start(e, other, 1); /* and its port is free again */
    CHECK(!h.is_failed);
    cube_task_free(t);
    cube_task_free(other);
}

ENGINE_TEST(exit_codes_and_times_are_reported)
{
    struct cube_task *t = new_task("docker-exit", "exit 3");
    struct heard h = start(e, t, 1);

    CHECK(!h.is_failed);
    h = wait_for_end(e, h.id);
    CHECK_INT(h.c.state, CUBE_BOX_EXITED);
    CHECK(h.c.has_exit);
    CHECK_INT(h.c.exit_code, 3);
    CHECK(cube_time_is_set(&h.c.finished));
    CHECK(cube_time_to_ns(&h.c.finished) >= cube_time_to_ns(&h.c.started));
    CHECK(!h.c.is_oom_killed);
    cube_task_free(t);
}

ENGINE_TEST(a_command_that_does_not_exist_is_a_no_in_words)
{
    struct cube_task *t = new_task("docker-nocmd", "");
    struct heard h;

    cube_task_set(&t->cmd.list[0], "nosuchcommand");
    h = start(e, t, 1);
    CHECK(h.is_failed);
    CHECK(!cube_runtime_is_trouble(&h.err));
    CHECK_HAS(h.err.text, "nosuchcommand");
    CHECK_HAS(h.err.text, "not found");
    CHECK_UINT(count_ours(e), 0);
    cube_task_free(t);
}

ENGINE_TEST(two_tasks_of_one_name_both_run)
{
    struct cube_task *a = new_task("docker-twin", "exec sleep 100");
    struct cube_task *b = new_task("docker-twin", "exec sleep 100");
    char want[60];
    struct heard h = start(e, a, 1);

    CHECK_STR(h.name, "docker-twin");
    h = start(e, b, 1);
    CHECK(!h.is_failed);
    (void)snprintf(want, sizeof want, "docker-twin-%.8s", b->id);
    CHECK_STR(h.name, want);
    CHECK_UINT(count_ours(e), 2);
    cube_task_free(a);
    cube_task_free(b);
}

ENGINE_TEST(a_repeated_start_finds_what_is_there_and_a_newer_one_replaces_it)
{
    struct cube_task *t = new_task("docker-again", "exec sleep 100");
    struct heard first = start(e, t, 1), h;

    h = start(e, t, 1);
    CHECK(!h.is_failed);
    CHECK_STR(h.id, first.id);
    t->restart_count = 1;
    h = start(e, t, 1);
    CHECK(!h.is_failed);
    CHECK(strcmp(h.id, first.id));
    CHECK_INT(h.c.restart, 1);
    CHECK_STR(h.name, "docker-again");
    h = start(e, t, 2);
    CHECK_INT(h.c.attempt, 2);
    CHECK_UINT(count_ours(e), 1);
    cube_task_free(t);
}

ENGINE_TEST(one_that_ended_before_it_was_seen_is_not_run_again)
{
    struct cube_task *t = new_task("docker-once", "exit 4");
    struct heard first = start(e, t, 1), h;

    (void)wait_for_end(e, first.id);
    h = start(e, t, 1);
    CHECK_STR(h.id, first.id);
    CHECK_INT(h.c.state, CUBE_BOX_EXITED);
    CHECK_INT(h.c.exit_code, 4);
    cube_task_free(t);
}

ENGINE_TEST(stop_waits_for_the_grace_and_then_kills)
{
    struct cube_task *t = new_task("docker-stop",
                                   "trap '' TERM; while :; do sleep 1; done");
    struct heard h = start(e, t, 1);
    char id[100];
    int64_t before = cube_loop_now_ms(e->loop), took;

    put(id, sizeof id, h.id);
    stop(e, id, 1000);
    took = cube_loop_now_ms(e->loop) - before;
    CHECK(took >= 900 && took < 20000);
    h = inspect(e, id);
    CHECK_INT(h.c.state, CUBE_BOX_EXITED);
    CHECK_INT(h.c.exit_code, 137);
    stop(e, id, 1000); /* stopped already: a success */
    remove_ours(e);
    stop(e, id, 1000); /* gone: too */
    cube_task_free(t);
}

ENGINE_TEST(kill_and_remove_succeed_whatever_there_is)
{
    struct cube_task *t = new_task("docker-kill", "exec sleep 100");
    struct heard h = start(e, t, 1), done;
    char id[100];

    put(id, sizeof id, h.id);
    for (int i = 0; i < 2; i++) {
        memset(&done, 0, sizeof done);
        e->rt->ops->kill(e->rt, id, on_done, &done);
        turn_until(e, &done.is_done);
        CHECK(!done.is_failed);
        h = wait_for_end(e, id);
        CHECK_INT(h.c.exit_code, 137);
    }
    for (int i = 0; i < 2; i++) {
        memset(&done, 0, sizeof done);
        e->rt->ops->remove(e->rt, id, on_done, &done);
        turn_until(e, &done.is_done);
        CHECK(!done.is_failed);
    }
    memset(&done, 0, sizeof done);
    e->rt->ops->kill(e->rt, id, on_done, &done);
    turn_until(e, &done.is_done);
    CHECK(!done.is_failed);
    h = inspect(e, id);
    CHECK(h.is_failed);
    CHECK_INT(h.err.code, CUBE_ENOENT);
    CHECK(!cube_runtime_is_trouble(&h.err));
    cube_task_free(t);
}

ENGINE_TEST(limits_reach_the_engine)
{
    struct cube_task *t = new_task("docker-limits", "exec sleep 100");
    struct heard h, json = {0};

    t->cpu = 0.5;
    t->mem_bytes = 64 << 20;
    h = start(e, t, 1);
    CHECK(!h.is_failed);
    e->rt->ops->inspect_json(e->rt, h.id, on_text, &json);
    turn_until(e, &json.is_done);
    REQUIRE(json.text.data);
    CHECK_HAS(json.text.data, "\"Memory\":67108864");
    CHECK_HAS(json.text.data, "\"NanoCpus\":500000000");
    CHECK_HAS(json.text.data, "\"RestartPolicy\":{\"Name\":\"");
    cube_buf_free(&json.text);
    cube_task_free(t);
}

ENGINE_TEST(out_of_memory_is_said)
{
    struct cube_task *t = new_task("docker-oom",
                                   "a=x; while :; do a=$a$a; done");
    struct heard h;

    t->mem_bytes = 8000000;
    h = start(e, t, 1);
    CHECK(!h.is_failed);
    h = wait_for_end(e, h.id);
    CHECK_INT(h.c.exit_code, 137);
    if (!e->is_podman) { /* Podman 4.3 does not notice */
        CHECK(h.c.is_oom_killed);
        CHECK_STR(h.error, "killed: out of memory");
    }
    cube_task_free(t);
}

ENGINE_TEST_WITH(a_missing_image_is_pulled_with_progress,
                 "CUBE_TEST_REGISTRY")
{
    struct cube_task *t = new_task("docker-pull", "exec sleep 100");
    const char *registry = getenv("CUBE_TEST_REGISTRY");
    struct cube_buf path = {0};
    struct heard h;

    cube_buf_printf(&path, "%s/cube-test/busybox:latest", registry);
    cube_task_set(&t->image, path.data);
    progress_count = 0;
    h = start(e, t, 1);
    CHECK_STR(h.err.text, "");
    CHECK(!h.is_failed);
    if (progress_count > 0) /* else somebody had pulled it */
        CHECK_HAS(last_progress, "pulling 127.0.0.1:5000/cube-test/busybox");
    cube_buf_free(&path);
    cube_task_free(t);
}

ENGINE_TEST_WITH(an_image_that_nobody_has_is_a_no_in_the_engines_words,
                 "CUBE_TEST_REGISTRY")
{
    static const struct {
        const char *image, *want;
    } rows[] = {
        {"127.0.0.1:5000/cube-test/nosuch:1", "manifest unknown"},
        {"nosuchhost.invalid/x:1", "no such host"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_task *t = new_task("docker-noimage", "true");
        struct heard h;

        cube_task_set(&t->image, rows[i].image);
        h = start(e, t, 1);
        CHECK(h.is_failed);
        CHECK(!cube_runtime_is_trouble(&h.err));
        CHECK_HAS(h.err.text, rows[i].want);
        CHECK_HAS(h.err.text, rows[i].image);
        cube_task_free(t);
    }
}

/* Removes the image so that it has to be pulled; by the engine's own API. */
static void remove_image(struct engine *e, const char *name)
{
    struct cube_http_client *c = cube_http_client_new(
        e->loop, getenv(e->is_podman ? "CUBE_TEST_PODMAN"
                                     : "CUBE_TEST_DOCKER"), NULL, NULL);
    struct cube_http_request r = {0};
    struct cube_http_call *call;
    struct cube_buf target = {0};

    cube_buf_printf(&target, "/v1.41/images/%s?force=1", name);
    r.method = "DELETE";
    r.target = target.data;
    call = cube_http_call(c, &r);
    (void)call;
    turn_for(e, 1000);
    cube_http_client_free(c);
    cube_buf_free(&target);
}

ENGINE_TEST_WITH(a_private_registry_takes_what_docker_login_has_left,
                 "CUBE_TEST_PRIVATE")
{
    static const char name[] = "127.0.0.1:5001/cube-test/busybox:latest";
    struct cube_task *t = new_task("docker-private", "exec sleep 100");
    char path[700];
    FILE *f;
    struct heard h;

    remove_image(e, name);
    cube_task_set(&t->image, name);
    h = start(e, t, 1);
    CHECK(h.is_failed);
    CHECK(!cube_runtime_is_trouble(&h.err));
    put(docker_config, sizeof docker_config, test_dir());
    (void)snprintf(path, sizeof path, "%s/config.json", docker_config);
    f = fopen(path, "w");
    REQUIRE(f);
    fputs("{\"auths\":{\"other:1\":{\"auth\":\"eDp5\"},\"http://127.0.0.1:5001"
          "/v1/\":{\"auth\":\"Y3ViZTpzZWNyZXQ=\"}}}", f);
    fclose(f);
    progress_count = 0;
    h = start(e, t, 1);
    CHECK_STR(h.err.text, "");
    CHECK(!h.is_failed);
    CHECK(progress_count > 0);
    remove_ours(e);
    remove_image(e, name);
    cube_task_free(t);
}

ENGINE_TEST(logs_follow_cut_at_a_tail_and_can_be_given_up)
{
    struct cube_task *t = new_task(
        "docker-logs", "for i in 1 2 3 4; do echo out $i; echo err $i >&2; "
                       "done; sleep 1; echo last");
    struct cube_logs_options o = {true, -1};
    struct heard h = start(e, t, 1), heard = {0};
    struct cube_logs *handle;
    struct cube_buf out;
    char id[100];

    put(id, sizeof id, h.id);
    handle = e->rt->ops->logs(e->rt, id, &o, on_data, on_done, &heard);
    while (heard.text.len == 0)
        turn_for(e, 50);
    e->rt->ops->logs_cancel(e->rt, handle);
    cube_buf_free(&heard.text);
    logs(e, id, true, -1, &out);
    CHECK(!heard.is_done);
    CHECK_HAS(out.data, "out 4\n");
    CHECK_HAS(out.data, "err 4\n");
    CHECK_HAS(out.data, "last\n");
    cube_buf_free(&out);
    logs(e, id, false, 1, &out);
    CHECK_STR(out.data, "last\n");
    cube_buf_free(&out);
    cube_task_free(t);
}

ENGINE_TEST(list_tells_ours_from_other_workers)
{
    struct cube_task *t = new_task("docker-list", "exec sleep 100");
    struct heard h = start(e, t, 1), all = {0};
    char ours[CUBE_UUID_TEXT];

    memcpy(ours, e->worker, sizeof ours);
    CHECK_UINT(count_ours(e), 1);
    cube_uuid_new(&engine_world, e->worker);
    CHECK_UINT(count_ours(e), 0);
    memcpy(e->worker, ours, sizeof ours);
    e->rt->ops->list(e->rt, NULL, on_list, &all);
    turn_until(e, &all.is_done);
    REQUIRE(all.text.data);
    CHECK_HAS(all.text.data, h.id);
    cube_buf_free(&all.text);
    cube_task_free(t);
}

static int everything_count, change_count;
static char watched[CUBE_UUID_TEXT];

static void on_change(void *arg, const char *task)
{
    (void)arg;
    if (!task)
        everything_count++;
    else if (!strcmp(task, watched))
        change_count++;
}

ENGINE_TEST(changes_are_told_by_task)
{
    struct cube_task *t = new_task("docker-events", "exit 1");
    struct heard h;
    int before;

    put(watched, sizeof watched, t->id);
    everything_count = change_count = 0;
    e->rt->ops->watch(e->rt, e->worker, on_change, NULL);
    for (int i = 0; i < 100 && everything_count == 0; i++)
        turn_for(e, 50);
    CHECK_INT(everything_count, 1);
    h = start(e, t, 1);
    before = change_count;
    (void)wait_for_end(e, h.id);
    for (int i = 0; i < 40 && change_count < 3; i++)
        turn_for(e, 50);
    CHECK(change_count > before || before >= 3);
    CHECK(change_count >= 3); /* create, start, die */
    e->rt->ops->watch(e->rt, NULL, NULL, NULL);
    before = change_count;
    remove_ours(e);
    turn_for(e, 300);
    CHECK_INT(change_count, before);
    cube_task_free(t);
}

ENGINE_TEST(a_start_can_be_cancelled_and_leaves_nothing)
{
    for (int turns = 0; turns < 40; turns += 3) {
        struct cube_task *t = new_task("docker-cancel", "exec sleep 100");
        struct cube_start what = {t, "", e->worker, 1, NULL};
        struct heard h = {0};

        test_row("cancelled after %d turns", turns);
        e->rt->ops->start(e->rt, &what, on_container, &h);
        for (int i = 0; i < turns; i++)
            (void)cube_loop_turn(e->loop, 20, NULL);
        e->rt->ops->start_cancel(e->rt, t->id);
        turn_until(e, &h.is_done);
        if (h.is_failed) {
            CHECK_INT(h.err.code, CUBE_ECANCELED);
            CHECK_UINT(count_ours(e), 0);
        } else { /* it was too late */
            CHECK_UINT(count_ours(e), 1);
            remove_ours(e);
        }
        cube_task_free(t);
    }
}
