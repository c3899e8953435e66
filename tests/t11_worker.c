/* Chapter 11: the worker alone, given orders as managers send them. */
#include "test.h"

#include "cluster.h"

#define A "aaaaaaaa-0000-4000-8000-000000000001"
#define B "bbbbbbbb-0000-4000-8000-000000000002"
#define C1 "cccccccc-0000-4000-8000-000000000001"
#define C2 "cccccccc-0000-4000-8000-000000000002"

static void worker_open(struct cluster *k)
{
    cluster_open(k, 1);
    cluster_manager_down(k);
}

/* An order: run task A, with these numbers and further fields of the task. */
static int order(struct cluster *k, const char *cluster, int epoch,
                 int attempt, const char *fields)
{
    char body[1000];

    (void)snprintf(body, sizeof body, "{\"ID\":\"" B "\",\"State\":2,"
                   "\"Timestamp\":\"2026-01-01T00:00:00Z\",\"Task\":{\"ID\":"
                   "\"" A "\",\"State\":1,\"Name\":\"web\",\"Image\":\"nginx\","
                   "\"Attempt\":%d%s},\"Cluster\":\"%s\",\"Epoch\":%d}",
                   attempt, fields, cluster, epoch);
    return cluster_ask(k, k->ports[0], "POST", "/tasks", body);
}

/* The task as the worker lists it, or NULL. The caller frees it. */
static struct cube_task *listed(struct cluster *k)
{
    struct cube_task *t = NULL;
    struct json_value_s *root;

    CHECK_INT(cluster_ask(k, k->ports[0], "GET", "/tasks", NULL), 200);
    root = cube_json_parse(k->body.data, k->body.len, NULL);
    if (cube_json_items(root))
        t = cube_task_from_json(cube_json_items(root)->value, false, NULL);
    cube_json_free(root);
    return t;
}

static int state(struct cluster *k)
{
    struct cube_task *t = listed(k);
    int s = t ? (int)t->state : -1;

    cube_task_free(t);
    return s;
}

static bool await(struct cluster *k, int want, int64_t ms)
{
    int64_t end = k->world.now_ms + ms;

    while (state(k) != want && k->world.now_ms < end)
        cluster_run(k, 50);
    return state(k) == want;
}

TEST(an_order_that_comes_twice_starts_one_container)
{
    struct cluster k;

    worker_open(&k);
    CHECK_INT(order(&k, C1, 1, 1, ""), 201);
    CHECK_INT(order(&k, C1, 1, 1, ""), 201);
    CHECK(await(&k, CUBE_RUNNING, 2000));
    CHECK_INT(order(&k, C1, 1, 1, ""), 201);
    CHECK_HAS(k.body.data, "\"State\":2");
    cluster_run(&k, 2000);
    CHECK_INT(k.engines[0].made, 1);
    cluster_close(&k);
}

TEST(orders_are_obeyed_by_cluster_epoch_and_attempt)
{
    static const struct {
        const char *cluster;
        int epoch, attempt, status, made;
        const char *why;
    } rows[] = {
        {C1, 3, 2, 201, 1, "the first that comes is whose it is"},
        {C2, 9, 9, 409, 1, "another cluster"},
        {C1, 2, 9, 409, 1, "a manager that was replaced"},
        {C1, 3, 1, 409, 1, "an attempt that is over"},
        {C1, 3, 2, 201, 1, "the same again"},
        {C1, 4, 2, 201, 1, "the manager has restarted"},
        {C1, 3, 3, 409, 1, "and its forerunner is late"},
        {C1, 4, 3, 201, 2, "a new attempt replaces the container"},
    };
    struct cluster k;

    worker_open(&k);
    for (size_t i = 0; i < COUNT(rows); i++) {
        test_row("%d: %s", (int)i, rows[i].why);
        CHECK_INT(order(&k, rows[i].cluster, rows[i].epoch, rows[i].attempt,
                        ""), rows[i].status);
        if (rows[i].status == 409)
            CHECK_HAS(k.body.data, "\"HTTPStatusCode\":409");
        cluster_run(&k, 1000);
        CHECK_INT(k.engines[0].made, rows[i].made);
        CHECK_INT(cluster_running(&k), 1);
    }
    cluster_worker_down(&k, 0);
    cluster_worker_up(&k, 0);
    CHECK_INT(order(&k, C2, 9, 9, ""), 409); /* it is on disk */
    CHECK_INT(order(&k, C1, 3, 9, ""), 409);
    cluster_close(&k);
}

TEST(a_stop_of_an_older_attempt_changes_nothing)
{
    struct cluster k;

    worker_open(&k);
    order(&k, C1, 1, 5, "");
    CHECK(await(&k, CUBE_RUNNING, 2000));
    CHECK_INT(cluster_ask(&k, k.ports[0], "DELETE", "/tasks/" A "?attempt=4",
                          NULL), 204);
    cluster_run(&k, 2000);
    CHECK_INT(state(&k), CUBE_RUNNING);
    CHECK_INT(cluster_ask(&k, k.ports[0], "DELETE", "/tasks/" A
                          "?attempt=5&cluster=" C2 "&epoch=9", NULL), 409);
    CHECK_INT(cluster_ask(&k, k.ports[0], "DELETE", "/tasks/" A "?attempt=5",
                          NULL), 204);
    CHECK(await(&k, CUBE_COMPLETED, 2000));
    CHECK_INT(fake_count(&k.engines[0], CUBE_BOX_EXITED), 0); /* removed */
    CHECK_INT(cluster_ask(&k, k.ports[0], "DELETE", "/tasks/" B, NULL), 404);
    CHECK_INT((int)k.body.len, 0);
    CHECK_INT(cluster_ask(&k, k.ports[0], "DELETE", "/tasks/nonsense", NULL),
              404);
    cluster_close(&k);
}

TEST(how_a_task_ends_is_told_by_its_exit_code_and_policy)
{
    static const struct {
        const char *policy;
        int code, state, made;
        const char *why;
    } rows[] = {
        {"", 0, CUBE_COMPLETED, 1, "exit code 0 is a success"},
        {"", 3, CUBE_FAILED, 4, "three restarts"},
        {"on-failure", 3, CUBE_FAILED, 4, "the same by name"},
        {"no", 3, CUBE_FAILED, 1, "no restart"},
        {"no", 0, CUBE_COMPLETED, 1, ""},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cluster k;
        struct cube_task *t;
        char fields[60];

        worker_open(&k);
        test_row("policy \"%s\", code %d: %s", rows[i].policy, rows[i].code,
                 rows[i].why);
        k.engines[0].exit_at_once = rows[i].code;
        (void)snprintf(fields, sizeof fields, ",\"RestartPolicy\":\"%s\"",
                       rows[i].policy);
        CHECK_INT(order(&k, C1, 1, 1, fields), 201);
        cluster_run(&k, 30000);
        t = listed(&k);
        CHECK_INT(t->state, rows[i].state);
        CHECK(cube_task_is_finished(t));
        CHECK(t->has_exit_code);
        CHECK_INT(t->exit_code, rows[i].code);
        CHECK(cube_time_is_set(&t->finish_time));
        CHECK_INT(t->restart_count, rows[i].made - 1);
        CHECK_INT(k.engines[0].made, rows[i].made);
        cube_task_free(t);
        cluster_close(&k);
    }
}

TEST(restarts_come_after_the_times_that_are_drawn)
{
    static const int after_s[] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300};

    for (int i = 0; i < (int)COUNT(after_s); i++)
        CHECK_INT(cube_backoff_ms(i), after_s[i] * 1000);
}

TEST(restarts_back_off_and_are_counted_across_a_restart_of_the_worker)
{
    struct cluster k;
    struct cube_task *t;
    int64_t since;

    worker_open(&k);
    k.engines[0].exit_at_once = 1;
    since = k.world.now_ms;
    order(&k, C1, 1, 1, "");
    while (k.engines[0].made < 3)
        cluster_run(&k, 20);
    CHECK(k.world.now_ms - since >= 3000); /* 1 s, then 2 s */
    CHECK(k.world.now_ms - since <= 4500); /* time jumps up to a beat */
    cluster_worker_down(&k, 0);
    cluster_worker_up(&k, 0);
    cluster_run(&k, 30000);
    CHECK_INT(k.engines[0].made, 4);
    t = listed(&k);
    CHECK_INT(t->restart_count, 3);
    CHECK_INT(t->state, CUBE_FAILED);
    cube_task_free(t);
    cluster_close(&k);
}

TEST(policy_always_restarts_a_success_without_end_and_a_stop_ends_it)
{
    struct cluster k;

    worker_open(&k);
    k.engines[0].exit_at_once = 0;
    order(&k, C1, 1, 1, ",\"RestartPolicy\":\"always\"");
    cluster_run(&k, 400000);
    CHECK(k.engines[0].made >= 8);  /* 1 2 4 8 16 32 64 128 s */
    CHECK(k.engines[0].made <= 10);
    CHECK_INT(cluster_ask(&k, k.ports[0], "DELETE", "/tasks/" A, NULL), 204);
    CHECK(await(&k, CUBE_COMPLETED, 2000));
    cluster_run(&k, 700000);
    CHECK(k.engines[0].made <= 10);
    cluster_close(&k);
}

TEST(ten_minutes_of_running_earn_a_new_budget)
{
    struct cluster k;

    worker_open(&k);
    order(&k, C1, 1, 1, "");
    for (int i = 0; i < 6; i++) { /* twice the budget */
        CHECK(await(&k, CUBE_RUNNING, 20000));
        cluster_run(&k, 601000);
        fake_exit(k.runtimes[0], A, 1);
        cluster_run(&k, 500);
    }
    CHECK(await(&k, CUBE_RUNNING, 20000));
    CHECK_INT(k.engines[0].made, 7);
    cluster_close(&k);
}

TEST(a_wall_clock_that_jumps_ahead_earns_nothing)
{
    struct cluster k;

    worker_open(&k);
    order(&k, C1, 1, 1, "");
    for (int i = 0; i < 4; i++) {
        CHECK(await(&k, CUBE_RUNNING, 20000));
        k.world.ahead_ns += INT64_C(3600) * 1000000000;
        cluster_run(&k, 1000);
        fake_exit(k.runtimes[0], A, 1);
        cluster_run(&k, 500);
    }
    cluster_run(&k, 60000);
    CHECK(await(&k, CUBE_FAILED, 1000));
    CHECK_INT(k.engines[0].made, 4);
    cluster_close(&k);
}

TEST(a_container_removed_by_hand_is_started_again)
{
    struct cluster k;
    struct cube_task *t;

    worker_open(&k);
    order(&k, C1, 1, 1, "");
    CHECK(await(&k, CUBE_RUNNING, 2000));
    fake_drop(fake_of_task(&k.engines[0], A));
    k.runtimes[0]->on_change(k.runtimes[0]->arg, A);
    cluster_run(&k, 200);
    t = listed(&k);
    CHECK_INT(t->state, CUBE_FAILED);
    CHECK_HAS(t->error, "removed");
    cube_task_free(t);
    CHECK(await(&k, CUBE_RUNNING, 5000));
    CHECK_INT(k.engines[0].made, 2);
    cluster_close(&k);
}

TEST(what_its_engine_took_along_starts_again_and_that_counts_as_nothing)
{
    struct cluster k;
    struct cube_task *t;

    worker_open(&k);
    order(&k, C1, 1, 1, "");
    CHECK(await(&k, CUBE_RUNNING, 2000));
    for (int i = 1; i <= 5; i++) {
        struct fake_box *b = fake_of_task(&k.engines[0], A);

        REQUIRE(b);
        b->c.state = CUBE_BOX_EXITED; /* with 0, as a tidy server does */
        b->c.has_exit = b->c.is_interrupted = true;
        k.runtimes[0]->on_change(k.runtimes[0]->arg, A);
        cluster_run(&k, 300);
        CHECK(await(&k, CUBE_RUNNING, 1000));
        CHECK_INT(k.engines[0].made, i + 1);
        CHECK_INT(fake_count(&k.engines[0], CUBE_BOX_EXITED), 0);
    }
    t = listed(&k);
    CHECK_INT(t->restart_count, 0);
    CHECK_STR(t->error, "");
    cube_task_free(t);
    cluster_close(&k);
}

TEST(a_worker_without_its_store_adopts_what_runs_by_its_labels)
{
    struct cluster k;
    struct cube_task *t;
    char command[300];

    worker_open(&k);
    order(&k, C1, 1, 4, ",\"Env\":[\"X=1\"]");
    CHECK(await(&k, CUBE_RUNNING, 2000));
    cluster_worker_down(&k, 0);
    (void)snprintf(command, sizeof command, "rm %s/w/*.cube", k.dir);
    CHECK_INT(system(command), 0);
    cluster_worker_up(&k, 0);
    CHECK(await(&k, CUBE_RUNNING, 2000));
    t = listed(&k);
    CHECK_STR(t->id, A);
    CHECK_INT(t->attempt, 4);
    CHECK_INT((int)t->env.count, 1);
    cube_task_free(t);
    CHECK_INT(k.engines[0].made, 1);
    CHECK_INT(order(&k, C1, 2, 3, ""), 409); /* the attempt is known again */
    cluster_close(&k);
}

TEST(containers_of_others_are_left_alone)
{
    struct cluster k;

    worker_open(&k);
    order(&k, C1, 1, 1, "");
    CHECK(await(&k, CUBE_RUNNING, 2000));
    cube_text_set(&fake_of_task(&k.engines[0], A)->c.worker, C2);
    cluster_worker_down(&k, 0);
    cluster_worker_up(&k, 0);
    cluster_run(&k, 500);
    CHECK_INT(k.engines[0].stops, 0);
    CHECK_INT(k.engines[0].removes, 0);
    cluster_close(&k);
}

/* A manager of the Go program numbers nothing and restarts by itself. */
TEST(a_go_manager_is_followed)
{
    static const char go[] =
        "{\"ID\":\"" B "\",\"State\":2,\"Timestamp\":\"2026-01-01T00:00:00Z\","
        "\"Task\":{\"ID\":\"" A "\",\"ContainerID\":\"%s\",\"Name\":\"web\","
        "\"State\":1,\"Image\":\"nginx\",\"Cpu\":0,\"Memory\":0,\"Disk\":0,"
        "\"HostPorts\":null,\"ExposedPorts\":null,\"PortBindings\":null,"
        "\"RestartPolicy\":\"\",\"StartTime\":\"0001-01-01T00:00:00Z\","
        "\"FinishTime\":\"0001-01-01T00:00:00Z\",\"HealthCheck\":\"/health\","
        "\"RestartCount\":0}}";
    struct cluster k;
    char body[1000];

    worker_open(&k);
    (void)snprintf(body, sizeof body, go, "");
    CHECK_INT(cluster_ask(&k, k.ports[0], "POST", "/tasks", body), 201);
    CHECK(await(&k, CUBE_RUNNING, 2000));
    fake_exit(k.runtimes[0], A, 1);
    CHECK(await(&k, CUBE_FAILED, 2000));
    cluster_run(&k, 60000);
    CHECK_INT(k.engines[0].made, 1); /* it does not restart by itself */
    (void)snprintf(body, sizeof body, go, "box-1");
    CHECK_INT(cluster_ask(&k, k.ports[0], "POST", "/tasks", body), 201);
    CHECK(await(&k, CUBE_RUNNING, 2000));
    CHECK_INT(k.engines[0].made, 2);
    CHECK_INT(cluster_running(&k), 1);
    CHECK_INT(fake_count(&k.engines[0], CUBE_BOX_EXITED), 0);
    CHECK_INT(cluster_ask(&k, k.ports[0], "DELETE", "/tasks/" A, NULL), 204);
    CHECK(await(&k, CUBE_COMPLETED, 2000));
    cluster_close(&k);
}

TEST(a_commit_that_fails_is_said_and_changes_nothing)
{
    struct cluster k;

    worker_open(&k);
    k.world.full = ENOSPC;
    CHECK_INT(order(&k, C1, 1, 1, ""), 507);
    cluster_run(&k, 2000);
    CHECK_INT(state(&k), -1);
    CHECK_INT(k.engines[0].starts, 0); /* the rule of the 201 */
    k.world.full = 0;
    CHECK_INT(order(&k, C2, 1, 1, ""), 201); /* it belongs to nobody yet */
    CHECK(await(&k, CUBE_RUNNING, 2000));
    k.world.full = EIO;
    fake_exit(k.runtimes[0], A, 1);
    cluster_run(&k, 3000);
    CHECK_INT(state(&k), CUBE_RUNNING); /* what is on disk */
    k.world.full = 0;
    cluster_run(&k, 6000);
    CHECK_INT(state(&k), CUBE_RUNNING); /* restarted by then */
    CHECK_INT(k.engines[0].made, 2);
    cluster_close(&k);
}

TEST(an_engine_that_hangs_holds_up_nothing_but_its_tasks)
{
    struct cluster k;

    worker_open(&k);
    k.engines[0].hangs = true;
    CHECK_INT(order(&k, C1, 1, 1, ""), 201);
    cluster_run(&k, 3000);
    CHECK_INT(state(&k), CUBE_SCHEDULED);
    CHECK_INT(cluster_ask(&k, k.ports[0], "GET", "/stats", NULL), 200);
    CHECK_INT(cluster_ask(&k, k.ports[0], "GET", "/healthz", NULL), 200);
    CHECK_INT(cluster_ask(&k, k.ports[0], "DELETE", "/tasks/" A, NULL), 204);
    cluster_close(&k); /* with a call open */
}

TEST(requests_are_answered_as_the_wire_has_them)
{
    static const struct {
        const char *method, *target, *body;
        int status;
        const char *has;
    } rows[] = {
        {"GET", "/tasks", NULL, 200, "[]"},
        {"GET", "/tasks/", NULL, 200, "[]"},
        {"GET", "/tasks/" A, NULL, 404, ""},
        {"POST", "/tasks", "{", 400, "\"HTTPStatusCode\":400"},
        {"POST", "/tasks", "null", 400, ""},
        {"POST", "/tasks", "{\"ID\":\"" B "\",\"State\":2}", 400, "Task"},
        {"GET", "/stats", NULL, 200, "{\"MemStats\":{\"mem_total\":"},
        {"GET", "/nothing", NULL, 404, ""},
        {"PUT", "/tasks", NULL, 405, ""},
        {"GET", "/healthz", NULL, 200, "ok"},
    };
    struct cluster k;

    worker_open(&k);
    for (size_t i = 0; i < COUNT(rows); i++) {
        test_row("%s %s", rows[i].method, rows[i].target);
        CHECK_INT(cluster_ask(&k, k.ports[0], rows[i].method, rows[i].target,
                              rows[i].body), rows[i].status);
        CHECK_HAS(k.body.data ? k.body.data : "", rows[i].has);
    }
    cluster_close(&k);
}

struct patient {
    int status, checks;
};

static void patient_answer(void *arg, struct cube_http_req *req)
{
    struct patient *p = arg;

    p->checks++;
    cube_http_reply(req, p->status, NULL, NULL, 0);
}

static const struct cube_http_route patient_routes[] = {
    {"GET", "/health", patient_answer},
    {NULL, NULL, NULL},
};

/* Lets so many checks come, and answers each with the status. */
static void answer_checks(struct cluster *k, struct patient *p, int status,
                          int count)
{
    int64_t end = k->world.now_ms + 60000;

    p->status = status;
    count += p->checks;
    while (p->checks < count && k->world.now_ms < end)
        cluster_run(k, 20);
    CHECK_INT(p->checks, count);
}

TEST(three_failed_health_checks_in_a_row_restart_a_task)
{
    struct cluster k;
    struct patient p = {500, 0};
    struct cube_http_server *server;
    struct follower f;

    worker_open(&k);
    follower_open(&f, &k, k.ports[0], "/events");
    server = cube_http_listen(k.loop, "127.0.0.1:0", patient_routes, &p, NULL,
                              NULL);
    k.engines[0].host_port = cube_http_port(server);
    order(&k, C1, 1, 1, ",\"HealthCheck\":\"/health\"");
    cluster_run(&k, 20000);
    CHECK_INT(state(&k), CUBE_RUNNING); /* in the start period */
    answer_checks(&k, &p, 200, 1);      /* ends the start period */
    answer_checks(&k, &p, 500, 2);
    answer_checks(&k, &p, 200, 1);      /* forgives those two */
    answer_checks(&k, &p, 500, 2);
    cluster_run(&k, 1000);
    CHECK_INT(state(&k), CUBE_RUNNING);
    CHECK_INT(k.engines[0].made, 1);
    answer_checks(&k, &p, 500, 1);
    cluster_run(&k, 900);
    CHECK_INT(follower_count(&f, "\"State\":4"), 1);
    CHECK(follower_count(&f, "health check GET /health failed 3 times: "
                         "status 500") >= 1); /* until it runs again */
    follower_close(&f);
    p.status = 200;
    CHECK(await(&k, CUBE_RUNNING, 5000));
    CHECK_INT(k.engines[0].made, 2);
    CHECK_INT(cluster_running(&k), 1);
    cube_http_close(server);
    cluster_close(&k);
}

/* Its worker asked its own machine, where nobody answers, and killed what was
 * well. 127.0.0.2 plays the other machine. */
TEST(health_is_asked_of_the_host_that_the_engine_is_on)
{
    char host[] = "127.0.0.2";
    struct cluster k;
    struct patient p = {200, 0};
    struct cube_http_server *server;

    worker_open(&k);
    k.runtimes[0]->base.host = host;
    server = cube_http_listen(k.loop, "127.0.0.2:0", patient_routes, &p, NULL,
                              NULL);
    REQUIRE(server);
    k.engines[0].host_port = cube_http_port(server);
    order(&k, C1, 1, 1, ",\"HealthCheck\":\"/health\"");
    answer_checks(&k, &p, 200, 5);
    CHECK_INT(state(&k), CUBE_RUNNING);
    cube_http_close(server);
    cluster_close(&k);
}

/* Does now what the engine was asked last, with what it thinks by now. */
static void answer_late(struct cluster *k, enum fake_kind kind)
{
    struct fake_runtime *rt = k->runtimes[0];
    struct cube_list *l;

    for (l = rt->calls.next; l != &rt->calls; l = l->next) {
        struct fake_call *c = CUBE_OF(l, struct fake_call, link);

        if (c->kind == kind)
            cube_defer_set(k->loop, &c->defer, fake_answer, c);
    }
    cluster_turn(k);
}

TEST(a_refusal_of_an_older_attempt_does_not_fail_the_newer_one)
{
    struct cluster k;

    worker_open(&k);
    k.engines[0].hangs = true;
    CHECK_INT(order(&k, C1, 1, 1, ",\"RestartPolicy\":\"no\""), 201);
    cluster_run(&k, 100);
    CHECK_INT(order(&k, C1, 1, 2, ",\"RestartPolicy\":\"no\""), 201);
    k.engines[0].no = "no such image";
    k.engines[0].hangs = false;
    answer_late(&k, FAKE_START);
    k.engines[0].no = NULL;
    CHECK(await(&k, CUBE_RUNNING, 5000));
    cluster_close(&k);
}

TEST(a_list_that_is_older_than_a_start_does_not_undo_it)
{
    struct cluster k;
    struct fake_box *b;

    worker_open(&k);
    k.engines[0].hangs = true;
    k.runtimes[0]->on_change(k.runtimes[0]->arg, NULL);
    cluster_run(&k, 100); /* the list is asked for */
    k.engines[0].hangs = false;
    order(&k, C1, 1, 1, "");
    CHECK(await(&k, CUBE_RUNNING, 2000));
    b = fake_of_task(&k.engines[0], A);
    cube_list_remove(&b->link); /* the list was made before */
    answer_late(&k, FAKE_LIST);
    cube_list_add(&k.engines[0].boxes, &b->link);
    cluster_run(&k, 5000);
    CHECK_INT(state(&k), CUBE_RUNNING);
    CHECK_INT(k.engines[0].made, 1);
    CHECK_INT(cluster_running(&k), 1);
    cluster_close(&k);
}

TEST(a_removal_that_is_refused_is_not_repeated_at_once)
{
    struct cluster k;
    int64_t start;

    worker_open(&k);
    order(&k, C1, 1, 1, "");
    CHECK(await(&k, CUBE_RUNNING, 2000));
    k.engines[0].no_removal = "device or resource busy";
    CHECK_INT(cluster_ask(&k, k.ports[0], "DELETE", "/tasks/" A, NULL), 204);
    start = k.world.now_ms;
    for (int i = 0; i < 50; i++)
        cluster_turn(&k);
    CHECK(k.engines[0].refused >= 1);
    CHECK(k.engines[0].refused <= 2 + (k.world.now_ms - start) / 2000);
    k.engines[0].no_removal = NULL;
    CHECK(await(&k, CUBE_COMPLETED, 10000));
    cluster_close(&k);
}

TEST(ten_minutes_of_running_earn_a_new_budget_also_before_a_removal_by_hand)
{
    struct cluster k;

    worker_open(&k);
    order(&k, C1, 1, 1, "");
    for (int i = 0; i < 6; i++) { /* twice the budget */
        CHECK(await(&k, CUBE_RUNNING, 20000));
        cluster_run(&k, 601000);
        fake_drop(fake_of_task(&k.engines[0], A));
        k.runtimes[0]->on_change(k.runtimes[0]->arg, A);
        cluster_run(&k, 500);
    }
    CHECK(await(&k, CUBE_RUNNING, 20000));
    CHECK_INT(k.engines[0].made, 7);
    cluster_close(&k);
}

TEST(an_order_that_is_on_its_way_to_the_disk_outdates_an_older_one)
{
    static const char *const bodies[] = {
        "{\"ID\":\"" B "\",\"State\":2,\"Timestamp\":\"2026-01-01T00:00:00Z\","
        "\"Task\":{\"ID\":\"" A "\",\"Name\":\"web\",\"Image\":\"nginx\","
        "\"Attempt\":1},\"Cluster\":\"" C1 "\",\"Epoch\":4}",
        "{\"ID\":\"" B "\",\"State\":2,\"Timestamp\":\"2026-01-01T00:00:00Z\","
        "\"Task\":{\"ID\":\"" A "\",\"Name\":\"web\",\"Image\":\"nginx\","
        "\"Attempt\":2},\"Cluster\":\"" C1 "\",\"Epoch\":3}"};
    struct cluster k, other;
    struct cube_http_client *c;
    struct cube_http_request r;
    char base[60];

    worker_open(&k);
    memset(&other, 0, sizeof other);
    (void)snprintf(base, sizeof base, "http://127.0.0.1:%u", k.ports[0]);
    c = cube_http_client_new(k.loop, base, NULL, NULL);
    memset(&r, 0, sizeof r);
    r.method = "POST";
    r.target = "/tasks";
    r.on_done = cluster_answered;
    for (int i = 0; i < 2; i++) {
        r.body = bodies[i];
        r.body_len = strlen(bodies[i]);
        r.arg = i == 0 ? &k : &other;
        cube_http_call(c, &r);
    }
    k.is_done = false;
    while (!k.is_done || !other.is_done)
        cluster_turn(&k);
    CHECK_INT(k.status, 201);
    CHECK_INT(other.status, 409);
    cube_http_client_free(c);
    cube_buf_free(&other.body);
    CHECK_INT(order(&k, C1, 3, 3, ""), 409);
    cluster_close(&k);
}

/* The engine's word came while the start was under way, and was dropped: the
 * task looked alive for a minute. */
TEST(an_exit_that_is_told_during_a_start_is_seen_when_the_start_is_over)
{
    struct cluster k;
    struct cube_unit *u;

    worker_open(&k);
    order(&k, C1, 1, 1, ",\"RestartPolicy\":\"no\"");
    CHECK(await(&k, CUBE_RUNNING, 2000));
    u = cube_ledger_find(k.workers[0]->ledger, A)->owner;
    u->is_busy = true; /* a step is under way */
    fake_exit(k.runtimes[0], A, 7);
    cluster_run(&k, 300);
    CHECK_INT(state(&k), CUBE_RUNNING);
    cube_unit_step_ends(u, NULL);
    CHECK(await(&k, CUBE_FAILED, 2000));
    cluster_close(&k);
}
