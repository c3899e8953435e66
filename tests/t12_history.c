/* Chapter 12: what was, read off the events; with a manager and workers on
 * engines that the test owns, and a clock that jumps. */
#include "test.h"

#include "cluster.h"

#define A "aaaaaaaa-0000-4000-8000-000000000001"
#define B "bbbbbbbb-0000-4000-8000-000000000002"
#define TASK_A "{\"ID\":\"" A "\",\"Name\":\"web\",\"Image\":\"nginx\"}"
#define TASK_B "{\"ID\":\"" B "\",\"Name\":\"api\",\"Image\":\"nginx\"}"

/* The texts of one member of each object of a list, with the number in
 * another (or without, for NULL), sorted: "A:2 B:0". */
static void summary(const char *body, const char *name, const char *number,
                    char out[1000])
{
    struct json_value_s *root = cube_json_parse(body, strlen(body), NULL);
    char rows[20][80];
    int n = 0;

    *out = 0;
    CHECK(root && json_value_as_array(root));
    for (struct json_array_element_s *i = cube_json_items(root); i && n < 20;
         i = i->next, n++) {
        int64_t v = 0;

        (void)cube_json_i64(cube_json_get(i->value, number ? number : "-"),
                            &v);
        (void)snprintf(rows[n], sizeof rows[n], "%.60s:%lld",
                       cube_json_str(cube_json_get(i->value, name), NULL),
                       (long long)v);
        for (int k = n; k > 0 && strcmp(rows[k - 1], rows[k]) > 0; k--) {
            char swap[80];

            memcpy(swap, rows[k], 80);
            memcpy(rows[k], rows[k - 1], 80);
            memcpy(rows[k - 1], swap, 80);
        }
    }
    for (int i = 0; i < n; i++)
        (void)snprintf(out + strlen(out), 1000 - strlen(out), "%s ", rows[i]);
    cube_json_free(root);
}

/* Asks what was at a time of the cluster's clock. */
static int ask_at(struct cluster *k, const char *path, int64_t ms)
{
    struct cube_time t =
        cube_time_from_ns(JUMP_SINCE_NS + ms * 1000000);
    char target[100], text[CUBE_TIME_TEXT];

    cube_time_format(&t, text);
    (void)snprintf(target, sizeof target, "%s?at=%s", path, text);
    return ask(k, "GET", target, NULL);
}

/* What was asked at some moment, and what was said then. */
struct moment {
    int64_t ms;
    char tasks[1000], nodes[1000];
};

static void remember(struct cluster *k, struct moment *m)
{
    cluster_run(k, 20);
    m->ms = k->world.now_ms;
    CHECK_INT(ask(k, "GET", "/tasks", NULL), 200);
    summary(k->body.data, "ID", "State", m->tasks);
    CHECK_INT(ask(k, "GET", "/nodes", NULL), 200);
    summary(k->body.data, "Name", NULL, m->nodes);
    cluster_run(k, 20);
}

static void recall(struct cluster *k, const struct moment *m)
{
    char now[1000];

    CHECK_INT(ask_at(k, "/tasks", m->ms), 200);
    summary(k->body.data, "ID", "State", now);
    CHECK_STR(now, m->tasks);
    CHECK_INT(ask_at(k, "/nodes", m->ms), 200);
    summary(k->body.data, "Name", NULL, now);
    CHECK_STR(now, m->nodes);
}

/* Tasks come, run, end and are removed, nodes are lost, the manager is started
 * again: what is told of each moment afterwards is what was told in it. */
static int live(struct cluster *k, struct moment *m)
{
    int n = 0;

    remember(k, &m[n++]);
    CHECK_INT(ask(k, "POST", "/tasks", TASK_A), 201);
    CHECK(cluster_await(k, A, CUBE_RUNNING, 2000));
    remember(k, &m[n++]);
    CHECK_INT(ask(k, "POST", "/tasks", TASK_B), 201);
    CHECK(cluster_await(k, B, CUBE_RUNNING, 2000));
    remember(k, &m[n++]);
    CHECK_INT(ask(k, "DELETE", "/tasks/" B, NULL), 204);
    CHECK(cluster_await(k, B, CUBE_COMPLETED, 2000));
    remember(k, &m[n++]);
    CHECK_INT(ask(k, "DELETE", "/tasks/" B "?forget=1", NULL), 204);
    remember(k, &m[n++]);
    cluster_manager_down(k);
    cluster_run(k, 500);
    k->node_count--; /* its name is not on the command line any more */
    cluster_manager_up(k);
    cluster_run(k, 1000);
    remember(k, &m[n++]);
    return n;
}

TEST(what_was_at_a_moment_is_what_was_told_in_it)
{
    struct cluster k;
    struct moment m[8];
    int n;

    cluster_open(&k, 3);
    n = live(&k, m);
    for (int i = 0; i < n; i++) {
        test_row("moment %d", i);
        recall(&k, &m[i]);
    }
    CHECK(strcmp(m[0].nodes, m[n - 1].nodes) != 0);
    k.node_count++;
    cluster_close(&k);
}

TEST(a_task_that_did_not_change_outlives_the_events_that_told_of_it)
{
    struct cluster k;
    struct moment before, after;

    cluster_open(&k, 2);
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_A), 201);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 2000));
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_B), 201);
    CHECK(cluster_await(&k, B, CUBE_RUNNING, 2000));
    CHECK_INT(ask(&k, "DELETE", "/tasks/" B, NULL), 204);
    CHECK(cluster_await(&k, B, CUBE_COMPLETED, 2000));
    CHECK_INT(ask(&k, "DELETE", "/tasks/" B "?forget=1", NULL), 204);
    remember(&k, &before);
    cluster_run(&k, 60000);
    k.manager->keep_ms = 30000;
    cluster_run(&k, 3000);
    remember(&k, &after);
    recall(&k, &after);
    CHECK_HAS(after.tasks, A);
    CHECK_INT(ask_at(&k, "/tasks", before.ms - 5000), 404);
    CHECK_HAS(k.body.data, "what is kept begins at 2025-06-15T");
    CHECK_INT(ask(&k, "GET", "/tasks/" A "/history", NULL), 200);
    CHECK_HAS(k.body.data, "\"State\":2");
    CHECK_INT(ask(&k, "GET", "/tasks/" B "/history", NULL), 200);
    CHECK_INT((int)k.body.len, 0);
    cluster_manager_down(&k);
    cluster_manager_up(&k);
    cluster_run(&k, 1000);
    recall(&k, &after);
    cluster_close(&k);
}

TEST(a_history_tells_each_change_and_why)
{
    static const char *const steps[] = {
        "it was submitted", "and placed", "it was started",
        "a user wants it stopped", "it was stopped", "a user removed it"};
    struct cluster k;
    const char *at;

    cluster_open(&k, 1);
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_A), 201);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 2000));
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_B), 201);
    CHECK_INT(ask(&k, "DELETE", "/tasks/" A, NULL), 204);
    CHECK(cluster_await(&k, A, CUBE_COMPLETED, 2000));
    CHECK_INT(ask(&k, "DELETE", "/tasks/" A "?forget=1", NULL), 204);
    CHECK_INT(ask(&k, "GET", "/tasks/" A "/history", NULL), 200);
    at = k.body.data;
    for (size_t i = 0; i < COUNT(steps); i++) {
        test_row("%s", steps[i]);
        CHECK(at && (at = strstr(at, steps[i])));
    }
    CHECK(!strstr(k.body.data, B));
    CHECK_INT(ask(&k, "GET", "/tasks/none/history", NULL), 404);
    CHECK_INT(ask(&k, "GET", "/tasks?at=yesterday", NULL), 400);
    cluster_close(&k);
}

TEST(who_follows_one_task_hears_of_no_other)
{
    struct cluster k;
    struct follower f;

    cluster_open(&k, 1);
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_B), 201);
    CHECK(cluster_await(&k, B, CUBE_RUNNING, 2000));
    follower_open(&f, &k, k.port, "/events?task=" A);
    cluster_run(&k, 100);
    CHECK_INT(follower_count(&f, "\"listed\""), 1);
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_A), 201);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 2000));
    CHECK_INT(ask(&k, "DELETE", "/tasks/" B, NULL), 204);
    CHECK(cluster_await(&k, B, CUBE_COMPLETED, 2000));
    CHECK_INT(ask(&k, "DELETE", "/tasks/" B "?forget=1", NULL), 204);
    cluster_run(&k, 1500);
    CHECK(follower_count(&f, A) >= 2);
    CHECK_INT(follower_count(&f, B), 0);
    CHECK_INT(follower_count(&f, "\"Type\":\"node\""), 0);
    CHECK(follower_count(&f, "\"beat\"") >= 1);
    follower_close(&f);
    follower_open(&f, &k, k.port, "/events?task=" A);
    cluster_run(&k, 100);
    CHECK_INT(follower_count(&f, "\"Type\":\"task\""), 1); /* the list */
    follower_close(&f);
    CHECK_INT(ask(&k, "GET", "/events?task=web", NULL), 400);
    cluster_close(&k);
}

/* Many events are walked in slices: other answers come in between. */
TEST(a_long_look_back_does_not_hold_others_up)
{
    struct cluster k;
    struct follower f;
    struct cube_buf line = {0};
    struct cube_time t;
    int turns = 0;
    char text[CUBE_TIME_TEXT], target[80];

    cluster_open(&k, 1);
    for (int i = 0; i < 50000; i++) {
        unsigned char key[8];

        cube_number_key((int64_t)++k.manager->staged_seq, key);
        cube_buf_clear(&line);
        cube_buf_printf(&line, "{\"Type\":\"gone\",\"Seq\":%llu,\"Time\":"
                        "\"2025-06-15T15:06:41Z\",\"ID\":\"%08x-0000-4000-8000"
                        "-000000000000\"}\n",
                        (unsigned long long)k.manager->staged_seq, i);
        CHECK_INT(cube_store_put(k.manager->store, CUBE_TREE_EVENTS, key, 8,
                                 line.data, line.len, NULL), 0);
    }
    cube_buf_free(&line);
    cluster_run(&k, 100);
    t = cube_time_from_ns(JUMP_SINCE_NS + k.world.now_ms * 1000000);
    cube_time_format(&t, text);
    (void)snprintf(target, sizeof target, "/tasks?at=%s", text);
    follower_open(&f, &k, k.port, target);
    while (!f.is_over && turns < 100000) {
        cluster_turn(&k);
        turns++;
    }
    CHECK(turns > 50000 / CUBE_SLICED_PIECES);
    CHECK_STR(f.text.data, "[]\n");
    follower_close(&f);
    cluster_close(&k);
}
