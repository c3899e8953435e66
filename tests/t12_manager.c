/* Chapter 12: the manager, with real workers on engines that a test owns. */
#include "test.h"

#include "cluster.h"

#define A "aaaaaaaa-0000-4000-8000-000000000001"
#define B "bbbbbbbb-0000-4000-8000-000000000002"
#define C "cccccccc-0000-4000-8000-000000000003"
#define TASK_A "{\"ID\":\"" A "\",\"Name\":\"web\",\"Image\":\"nginx\"}"
#define TASK_B "{\"ID\":\"" B "\",\"Name\":\"web\",\"Image\":\"nginx\"}"

TEST(a_task_runs_and_stops)
{
    struct cluster k;
    struct cube_task *t;

    cluster_open(&k, 1);
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_A), 201);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 2000));
    CHECK_INT(cluster_running(&k), 1);
    t = cluster_task(&k, A);
    CHECK_STR(t->container_id, "box-1");
    CHECK(cube_time_is_set(&t->start_time));
    CHECK_INT(t->attempt, 1);
    cube_task_free(t);
    CHECK_INT(ask(&k, "DELETE", "/tasks/" A, NULL), 204);
    CHECK(cluster_await(&k, A, CUBE_COMPLETED, 2000));
    CHECK_INT(cluster_running(&k), 0);
    CHECK_INT(ask(&k, "DELETE", "/tasks/" A, NULL), 204); /* for every state */
    CHECK_INT(ask(&k, "DELETE", "/tasks/" B, NULL), 404);
    CHECK_INT((int)k.body.len, 0);
    cluster_close(&k);
}

/* A second commit placed it once, and each start had to wait for that. */
TEST(a_task_is_placed_by_the_commit_that_keeps_it)
{
    struct cluster k;
    struct follower f;
    struct cube_task *t = NULL;
    struct cube_record *rec;
    uint64_t number;

    cluster_open(&k, 1);
    follower_open(&f, &k, k.port, "/events");
    cluster_run(&k, 1000);
    CHECK_INT(cube_task_parse(TASK_A, strlen(TASK_A), true, &t, NULL), 0);
    cube_manager_accept(k.manager, NULL, t);
    number = cube_commit_number(k.manager->commit);
    rec = cube_ledger_find(k.manager->ledger, A);
    while (!rec->now)
        cluster_turn(&k);
    CHECK_INT(rec->now->task->state, CUBE_SCHEDULED);
    CHECK_INT((int64_t)rec->now->commit, (int64_t)number);
    cluster_run(&k, 1000);
    CHECK_INT(follower_count(&f, "it was submitted, and placed"), 1);
    CHECK_INT(follower_count(&f, "it was placed"), 0);
    follower_close(&f);
    cluster_close(&k);
}

TEST(a_task_that_is_stopped_in_the_turn_of_its_submission_never_runs)
{
    struct cluster k;
    struct cube_task *t = NULL;

    cluster_open(&k, 1);
    cluster_run(&k, 1000);
    CHECK_INT(cube_task_parse(TASK_A, strlen(TASK_A), true, &t, NULL), 0);
    cube_manager_accept(k.manager, NULL, t);
    cube_manager_want_stop(k.manager, cube_ledger_find(k.manager->ledger, A));
    CHECK(cluster_await(&k, A, CUBE_COMPLETED, 2000));
    t = cluster_task(&k, A);
    CHECK_INT(t->attempt, 1);
    CHECK(!cube_time_is_set(&t->start_time));
    cube_task_free(t);
    cluster_close(&k);
}

/* The syncs of this world wait until the test lets them go. */
static struct {
    struct cube_poll *poll;
    struct cube_job *job;
} held;

static int held_job_start(void *ctx, struct cube_poll *p, struct cube_job *job)
{
    if (job->kind != CUBE_JOB_SYNC)
        return jump_job_start(ctx, p, job);
    held.poll = p;
    held.job = job;
    return 0;
}

static void let_go(struct cluster *k)
{
    k->world.table.job_start = jump_job_start;
    CHECK(held.job && jump_job_start(&k->world, held.poll, held.job) >= 0);
}

/* A worker was asked for the log of a task that was placed there, but not on
 * disk yet; and one that was removed was there again with its old end while
 * its new life was on its way to the disk. */
TEST(what_is_not_on_disk_is_neither_shown_nor_asked_for)
{
    struct cluster k;
    struct cube_task *t = NULL;

    cluster_open(&k, 1);
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_B), 201);
    CHECK(cluster_await(&k, B, CUBE_RUNNING, 2000));
    ask(&k, "DELETE", "/tasks/" B, NULL);
    CHECK(cluster_await(&k, B, CUBE_COMPLETED, 2000));
    cluster_worker_down(&k, 0); /* it still has B, and would be asked for A */
    CHECK_INT(ask(&k, "DELETE", "/tasks/" B "?forget=1", NULL), 204);
    CHECK_INT(ask(&k, "GET", "/tasks/" B, NULL), 404);
    k.world.table.job_start = held_job_start;
    CHECK_INT(cube_task_parse(TASK_A, strlen(TASK_A), true, &t, NULL), 0);
    cube_manager_accept(k.manager, NULL, t);
    CHECK_INT(cube_task_parse(TASK_B, strlen(TASK_B), true, &t, NULL), 0);
    cube_manager_accept(k.manager, cube_ledger_find(k.manager->ledger, B), t);
    CHECK_INT(ask(&k, "GET", "/tasks/" A, NULL), 404);
    CHECK_INT(ask(&k, "GET", "/tasks/" A "/logs", NULL), 404);
    CHECK_INT(ask(&k, "GET", "/tasks/" B, NULL), 404);
    let_go(&k);
    CHECK(cluster_await(&k, A, CUBE_SCHEDULED, 1000));
    CHECK(cluster_await(&k, B, CUBE_SCHEDULED, 1000));
    cluster_close(&k);
}

/* Its end was on disk, its return was not: what was left of it in memory was
 * neither there nor gone, and stayed until the manager ended. */
TEST(a_task_that_could_not_return_after_its_removal_is_gone)
{
    struct cluster k;
    struct cube_task *t = NULL;
    struct cube_ledger *g;

    cluster_open(&k, 1);
    g = k.manager->ledger;
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_A), 201);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 2000));
    ask(&k, "DELETE", "/tasks/" A, NULL);
    CHECK(cluster_await(&k, A, CUBE_COMPLETED, 2000));
    cluster_worker_down(&k, 0);
    k.world.table.job_start = held_job_start;
    cube_record_remove(g, cube_ledger_find(g, A));
    cluster_turn(&k);
    CHECK_INT(cube_task_parse(TASK_A, strlen(TASK_A), true, &t, NULL), 0);
    cube_manager_accept(k.manager, cube_ledger_find(g, A), t);
    k.world.full = ENOSPC;
    let_go(&k);
    cluster_run(&k, 1000);
    CHECK(cube_ledger_find(g, A) == NULL);
    k.world.full = 0;
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_A), 201);
    cluster_close(&k);
}

TEST(the_same_id_is_the_same_task)
{
    struct cluster k;

    cluster_open(&k, 1);
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_A), 201);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 2000));
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_A), 201);
    CHECK_HAS(k.body.data, "\"State\":2"); /* its present state */
    CHECK_INT(ask(&k, "POST", "/tasks", "{\"ID\":\"" A "\",\"Name\":\"web\","
                  "\"Image\":\"redis\"}"), 409);
    cluster_run(&k, 3000);
    CHECK_INT(k.engines[0].starts, 1);
    ask(&k, "DELETE", "/tasks/" A, NULL);
    CHECK(cluster_await(&k, A, CUBE_COMPLETED, 2000));
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_A), 409);
    CHECK_HAS(k.body.data, "cube rm");
    CHECK_INT(ask(&k, "DELETE", "/tasks/" A "?forget=1", NULL), 204);
    CHECK_INT(ask(&k, "GET", "/tasks/" A, NULL), 404);
    CHECK_INT(ask(&k, "GET", "/tasks", NULL), 200);
    CHECK_STR(k.body.data, "[]\n");
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_A), 201);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 2000));
    CHECK_INT(cluster_running(&k), 1);
    cluster_close(&k);
}

TEST(what_cannot_be_right_is_refused_and_changes_nothing)
{
    static const struct {
        const char *body, *names, *why;
    } rows[] = {
        {"", "", "nothing"},
        {"{", "", "half an object"},
        {"{}", "", "a task without anything"},
        {"null", "", "no object"},
        {"[]", "", "no object"},
        {"{\"Nme\":\"x\",\"Image\":\"nginx\"}", "Nme", "an unknown field"},
        {"{\"Name\":\"x\",\"Image\":\"UPPER\"}", "Image", "no engine takes it"},
        {"{\"Name\":\"x\",\"Image\":\"nginx\",\"Memory\":-1}", "Memory", ""},
        {"{\"Name\":\"x\",\"Image\":\"nginx\",\"State\":9}", "State", ""},
        {"{\"ID\":\"no\",\"Name\":\"x\",\"Image\":\"nginx\"}", "ID", ""},
        {"{\"State\":1,\"Task\":{\"Name\":\"x\",\"Image\":\"nginx\"}}", "State",
         "an event asks for 2 or 3"},
    };
    struct cluster k;

    cluster_open(&k, 1);
    for (size_t i = 0; i < COUNT(rows); i++) {
        test_row("%s: %s", rows[i].body, rows[i].why);
        CHECK_INT(ask(&k, "POST", "/tasks", rows[i].body), 400);
        CHECK_HAS(k.body.data, rows[i].names);
        CHECK_HAS(k.body.data, "\"HTTPStatusCode\":400");
    }
    CHECK_INT(ask(&k, "GET", "/tasks", NULL), 200);
    CHECK_STR(k.body.data, "[]\n");
    cluster_close(&k);
}

/* Asked was only its last home. A node that it had been moved off came back
 * after a new manager had removed the record, and the old copy was adopted. */
TEST(what_was_removed_stays_removed_while_a_former_home_is_away)
{
    struct cluster k;
    int home;

    cluster_open(&k, 2);
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_A), 201);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 2000));
    home = k.engines[0].starts > 0 ? 0 : 1;
    cluster_worker_down(&k, home);
    cluster_run(&k, 10000);
    CHECK_INT(k.engines[1 - home].starts, 1);
    cluster_manager_down(&k);
    cluster_manager_up(&k);
    cluster_run(&k, 10000);
    CHECK_INT(ask(&k, "DELETE", "/tasks/" A, NULL), 204);
    CHECK(cluster_await(&k, A, CUBE_COMPLETED, 2000));
    CHECK_INT(ask(&k, "DELETE", "/tasks/" A "?forget=1", NULL), 204);
    cluster_run(&k, 10000);
    cluster_worker_up(&k, home);
    cluster_run(&k, 10000);
    CHECK_INT(ask(&k, "GET", "/tasks/" A, NULL), 404);
    CHECK_INT(cluster_running(&k), 0);
    cluster_close(&k);
}

/* A manager that was told of no worker takes the default one for a guess, for
 * whose list it does not wait; but not when it may still run a task. */
TEST(a_node_that_was_lost_with_its_tasks_is_no_guess)
{
    struct cluster k;
    char name[40];

    cluster_open(&k, 1);
    (void)snprintf(name, sizeof name, "127.0.0.1:%u", k.ports[0]);
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_A), 201);
    CHECK(!cube_manager_has_task_on(k.manager, "127.0.0.1:1"));
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 2000));
    CHECK(cube_manager_has_task_on(k.manager, name));
    cluster_worker_down(&k, 0);
    CHECK(cluster_await(&k, A, CUBE_PENDING, 10000));
    CHECK(cube_manager_has_task_on(k.manager, name));
    CHECK_INT(ask(&k, "DELETE", "/tasks/" A, NULL), 204);
    CHECK(cluster_await(&k, A, CUBE_COMPLETED, 2000));
    CHECK(!cube_manager_has_task_on(k.manager, name));
    cluster_close(&k);
}

/* The removal was held back for as long as the stop before it would have been,
 * had that been repeated once more: up to 2 s. */
TEST(what_took_long_to_stop_is_removed_without_delay)
{
    struct cluster k;

    cluster_open(&k, 1);
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_A), 201);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 2000));
    k.engines[0].is_down = true;
    CHECK_INT(ask(&k, "DELETE", "/tasks/" A, NULL), 204);
    cluster_run(&k, 9000); /* stopped again and again */
    k.engines[0].is_down = false;
    CHECK(cluster_await(&k, A, CUBE_COMPLETED, 20000));
    CHECK_INT(ask(&k, "DELETE", "/tasks/" A "?forget=1", NULL), 204);
    cluster_run(&k, 100);
    CHECK_INT(cluster_ask(&k, k.ports[0], "GET", "/tasks", NULL), 200);
    CHECK(!strstr(k.body.data, A));
    cluster_close(&k);
}

TEST(a_manager_killed_after_its_201_forgets_nothing)
{
    struct cluster k;

    cluster_open(&k, 1);
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_A), 201);
    cluster_manager_down(&k);
    cluster_manager_up(&k);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 5000));
    cluster_run(&k, 10000);
    CHECK_INT(k.engines[0].starts, 1);
    CHECK_INT(ask(&k, "DELETE", "/tasks/" A, NULL), 204);
    cluster_manager_down(&k);
    cluster_manager_up(&k);
    CHECK(cluster_await(&k, A, CUBE_COMPLETED, 5000));
    CHECK_INT(cluster_running(&k), 0);
    cluster_run(&k, 10000);
    CHECK_INT(k.engines[0].starts, 1); /* a stop does not start it again */
    cluster_close(&k);
}

TEST(restarts_of_both_sides_leave_one_copy)
{
    struct cluster k;

    cluster_open(&k, 2);
    ask(&k, "POST", "/tasks", TASK_A);
    ask(&k, "POST", "/tasks", TASK_B);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 2000));
    CHECK(cluster_await(&k, B, CUBE_RUNNING, 2000));
    for (int round = 0; round < 3; round++) {
        cluster_manager_down(&k);
        for (int i = 0; i < 2; i++)
            cluster_worker_down(&k, i);
        for (int i = 0; i < 2; i++)
            cluster_worker_up(&k, i);
        cluster_manager_up(&k);
        cluster_run(&k, 10000);
        CHECK_INT(cluster_running(&k), 2);
    }
    CHECK_INT(k.engines[0].made + k.engines[1].made, 2);
    cluster_close(&k);
}

TEST(tasks_of_a_lost_node_move_and_a_copy_that_comes_back_is_stopped)
{
    struct cluster k;
    struct cube_task *t;
    int from, to;

    cluster_open(&k, 2);
    ask(&k, "POST", "/tasks", TASK_A);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 2000));
    from = cluster_where(&k, A);
    to = 1 - from;
    cluster_worker_down(&k, from); /* its container runs on */
    cluster_run(&k, 7000);
    CHECK_INT(fake_count(&k.engines[to], CUBE_BOX_RUNNING), 1);
    t = cluster_task(&k, A);
    CHECK_INT(t->attempt, 2);
    CHECK_INT(t->state, CUBE_RUNNING);
    cube_task_free(t);
    cluster_worker_up(&k, from);
    cluster_run(&k, 5000);
    CHECK_INT(fake_count(&k.engines[from], CUBE_BOX_RUNNING), 0);
    CHECK_INT(fake_count(&k.engines[to], CUBE_BOX_RUNNING), 1);
    cluster_close(&k);
}

TEST(a_task_that_fits_nowhere_waits_with_reasons_and_runs_when_it_fits)
{
    struct cluster k;
    struct cube_task *t;

    cluster_open(&k, 1);
    CHECK_INT(ask(&k, "POST", "/tasks", "{\"ID\":\"" A "\",\"Name\":\"web\","
                  "\"Image\":\"nginx\",\"PortBindings\":{\"80/tcp\":\"8080\"}"
                  "}"),
              201);
    CHECK_INT(ask(&k, "POST", "/tasks", "{\"ID\":\"" B "\",\"Name\":\"two\","
                  "\"Image\":\"nginx\",\"PortBindings\":{\"80/tcp\":\"8080\"}"
                  "}"),
              201);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 2000));
    cluster_run(&k, 3000);
    t = cluster_task(&k, B);
    CHECK_INT(t->state, CUBE_PENDING);
    CHECK_HAS(t->error, "8080");
    cube_task_free(t);
    ask(&k, "DELETE", "/tasks/" A, NULL);
    CHECK(cluster_await(&k, B, CUBE_RUNNING, 5000));
    cluster_close(&k);
}

/* A node was lost and came back. Of its tasks, which by then waited for another
 * one, each was found there again; but one that had waited before them, for
 * room that they had, was looked at first, and was given that room. */
TEST(the_room_of_tasks_that_are_found_on_a_node_again_is_given_to_nobody)
{
    struct cluster k;
    struct cube_task *t;

    cluster_open(&k, 1);
    ask(&k, "POST", "/tasks", "{\"ID\":\"" A "\",\"Name\":\"web\",\"Image\":"
        "\"nginx\",\"PortBindings\":{\"80/tcp\":\"8080\"}}");
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 2000));
    ask(&k, "POST", "/tasks", "{\"ID\":\"" B "\",\"Name\":\"both\",\"Image\":"
        "\"nginx\",\"PortBindings\":{\"80/tcp\":\"8080\","
        "\"81/tcp\":\"8081\"}}");
    ask(&k, "POST", "/tasks", "{\"ID\":\"" C "\",\"Name\":\"one\",\"Image\":"
        "\"nginx\",\"PortBindings\":{\"81/tcp\":\"8081\"}}");
    CHECK(cluster_await(&k, C, CUBE_RUNNING, 2000));
    ask(&k, "DELETE", "/tasks/" A, NULL);
    CHECK(cluster_await(&k, A, CUBE_COMPLETED, 2000));
    CHECK_INT(cluster_state(&k, B), CUBE_PENDING); /* for 8081, now */
    cluster_worker_down(&k, 0);
    cluster_run(&k, 7000);
    CHECK_INT(cluster_state(&k, C), CUBE_PENDING);
    cluster_worker_up(&k, 0);
    cluster_run(&k, 5000);
    t = cluster_task(&k, C);
    CHECK_INT(t->state, CUBE_RUNNING);
    CHECK_INT(t->attempt, 1);
    cube_task_free(t);
    t = cluster_task(&k, B);
    CHECK_INT(t->state, CUBE_PENDING);
    CHECK_INT(t->attempt, 0);
    cube_task_free(t);
    cluster_close(&k);
}

/* A burst of tasks for which there was no room took twice the disk and half as
 * much processor again: each was written as submitted, and once more with the
 * reason why it waits. */
TEST(a_task_that_will_wait_is_written_once_with_its_reason)
{
    struct cluster k;
    const char *line;

    cluster_open(&k, 1);
    cluster_run(&k, 1000);
    CHECK_INT(ask(&k, "POST", "/tasks", "{\"ID\":\"" A "\",\"Name\":\"big\","
                  "\"Image\":\"nginx\",\"Memory\":99999999999999}"), 201);
    CHECK_HAS(k.body.data, "memory");
    cluster_run(&k, 5000);
    CHECK_INT(ask(&k, "GET", "/tasks/" A "/history", NULL), 200);
    line = strstr(k.body.data, "it was submitted, and waits for a node");
    CHECK(line && !strstr(line + 1, "\"Type\""));
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_B), 201);
    CHECK(!strstr(k.body.data, "\"Error\""));
    CHECK(cluster_await(&k, B, CUBE_RUNNING, 2000));
    cluster_close(&k);
}

/* A scheduler that takes its time to refuse a task. */
struct slow_scheduler {
    struct cube_scheduler base;
    struct jump_world *world;
    int takes_ms;
    int asked, asked_last; /* the second for a task of the name "last" */
};

static bool slow_refusal(void *ctx, const struct cube_placement *p,
                         const struct cube_node *node, struct cube_buf *why)
{
    struct slow_scheduler *s = ctx;

    (void)node;
    s->world->now_ms += s->takes_ms;
    s->asked++;
    s->asked_last += !strcmp(p->task->name, "last");
    cube_buf_puts(why, "not today");
    return false;
}

/* When a node came while 40,000 tasks waited, nobody else was answered for a
 * second and a half. */
TEST(many_who_wait_are_looked_at_in_slices)
{
    struct slow_scheduler slow = {.base.candidate = slow_refusal,
                                  .takes_ms = 1};
    struct cluster k;
    int asked = 0;

    cluster_open(&k, 1);
    slow.base.ctx = &slow;
    slow.world = &k.world;
    k.manager->scheduler = &slow.base;
    for (int i = 0; i < 40; i++)
        CHECK_INT(ask(&k, "POST", "/tasks", "{\"Name\":\"x\",\"Image\":"
                      "\"nginx\"}"), 201);
    cluster_run(&k, 1000);
    k.manager->has_room = true;
    slow.asked = 0;
    for (int i = 0; i < 1000 && slow.asked < 40; i++) {
        asked = slow.asked;
        cluster_turn(&k);
        CHECK(slow.asked - asked <= CUBE_SLICE_MS);
    }
    CHECK(slow.asked >= 40);
    cluster_close(&k);
}

/* Tasks end all the time, and each time all who wait are looked at again: the
 * first of them, for whom there is no room, must not keep the last from its
 * turn. */
TEST(who_waits_last_is_looked_at_however_often_there_is_room)
{
    struct slow_scheduler slow = {.base.candidate = slow_refusal};
    struct cluster k;

    cluster_open(&k, 1);
    slow.base.ctx = &slow;
    slow.world = &k.world;
    k.manager->scheduler = &slow.base;
    for (int i = 0; i < 40; i++)
        CHECK_INT(ask(&k, "POST", "/tasks", "{\"Name\":\"x\",\"Image\":"
                      "\"nginx\"}"), 201);
    CHECK_INT(ask(&k, "POST", "/tasks", "{\"Name\":\"last\",\"Image\":"
                  "\"nginx\"}"), 201);
    cluster_run(&k, 1000);
    slow.takes_ms = CUBE_TICK_MS / 10;
    slow.asked = slow.asked_last = 0;
    while (slow.asked < 41 * 3) {
        k.manager->has_room = true;
        cluster_turn(&k);
    }
    CHECK(slow.asked_last >= 2);
    cluster_close(&k);
}

TEST(a_pending_task_is_stopped_before_it_ran)
{
    struct cluster k;

    cluster_open(&k, 1);
    ask(&k, "POST", "/tasks", "{\"ID\":\"" A "\",\"Name\":\"big\",\"Image\":"
        "\"nginx\",\"Memory\":99999999999999}");
    CHECK(cluster_await(&k, A, CUBE_PENDING, 1000));
    CHECK_INT(ask(&k, "DELETE", "/tasks/" A, NULL), 204);
    CHECK(cluster_await(&k, A, CUBE_COMPLETED, 2000));
    cluster_run(&k, 5000);
    CHECK_INT(k.engines[0].starts, 0);
    cluster_close(&k);
}

TEST(a_task_that_keeps_failing_is_restarted_moved_once_and_then_failed)
{
    struct cluster k;
    struct cube_task *t;

    cluster_open(&k, 2);
    k.engines[0].exit_at_once = k.engines[1].exit_at_once = 3;
    ask(&k, "POST", "/tasks", TASK_A);
    cluster_run(&k, 60000);
    t = cluster_task(&k, A);
    CHECK_INT(t->state, CUBE_FAILED);
    CHECK(cube_task_is_finished(t));
    CHECK_INT(t->exit_code, 3);
    CHECK_HAS(t->error, "3");
    CHECK_INT(k.engines[0].starts + k.engines[1].starts, 5); /* 1+3, then 1 */
    CHECK(k.engines[0].starts == 4 || k.engines[1].starts == 4);
    cube_task_free(t);
    cluster_close(&k);
}

TEST(a_store_in_memory_loses_no_running_task)
{
    struct cluster k;
    struct cube_task *t;

    cluster_open(&k, 1);
    cluster_manager_down(&k);
    k.store = "memory";
    cluster_manager_up(&k);
    cluster_run(&k, 1000);
    CHECK_INT(cluster_ask(&k, k.ports[0], "GET", "/healthz", NULL), 200);
    ask(&k, "POST", "/tasks", TASK_A);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 2000));
    cluster_manager_down(&k);
    cluster_manager_up(&k);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 5000));
    t = cluster_task(&k, A);
    CHECK_STR(t->name, "web");
    cube_task_free(t);
    CHECK_INT(ask(&k, "DELETE", "/tasks/" A, NULL), 204);
    CHECK(cluster_await(&k, A, CUBE_COMPLETED, 5000));
    CHECK_INT(cluster_running(&k), 0);
    cluster_close(&k);
}

TEST(a_task_that_is_just_being_adopted_can_be_stopped)
{
    struct cluster k;
    struct cube_task *t = NULL;

    cluster_open(&k, 1);
    CHECK_INT(cube_task_parse(TASK_A, strlen(TASK_A), true, &t, NULL), 0);
    t->state = CUBE_RUNNING;
    cube_promises_add_up(k.manager);
    cube_manager_adopt(k.manager, CUBE_OF(k.manager->members.next,
                                          struct cube_member, link), t);
    cube_manager_want_stop(k.manager, cube_ledger_find(k.manager->ledger, A));
    cube_task_free(t);
    CHECK(cluster_await(&k, A, CUBE_COMPLETED, 5000));
    cluster_close(&k);
}

TEST(a_manager_in_memory_keeps_cluster_and_epoch_in_a_line)
{
    struct cluster k;
    struct cube_buf line = {0};
    char path[240], want[60];

    cluster_open(&k, 0);
    k.store = "memory";
    for (int starts = 1; starts <= 2; starts++) {
        cluster_manager_down(&k);
        cluster_manager_up(&k);
        (void)snprintf(path, sizeof path, "%s/m/manager.id", k.dir);
        (void)snprintf(want, sizeof want, "%s %d", k.manager->cluster, starts);
        CHECK_INT(cube_file_read(&k.world.table, path, &line, 100, NULL), 0);
        CHECK_STR(line.data, want);
    }
    CHECK_INT(line.data[36], ' '); /* as drawn in chapter 12 */
    CHECK_STR(line.data + 37, "2");
    cube_buf_free(&line);
    cluster_close(&k);
}

/* One tree, a line for each key: of a number's eight bytes the last two in
 * hex (the others are 0), and what is told of the value: of an event Type and
 * Why, of a record whose number it is, of others nothing. */
static void tree_text(struct cube_store *s, const char *tree,
                      struct cube_buf *out)
{
    struct cube_cursor *c = cube_cursor_open(s, tree, NULL);

    cube_buf_clear(out);
    for (int r = cube_cursor_first(c, NULL); r > 0;
         r = cube_cursor_next(c, NULL)) {
        size_t key_len, len;
        const unsigned char *key = cube_cursor_key(c, &key_len);
        const void *value;
        struct json_value_s *root;
        const char *type, *why;
        int64_t number;

        CHECK_INT(cube_cursor_value(c, &value, &len, NULL), 0);
        root = cube_json_parse(value, len, NULL);
        type = cube_json_str(cube_json_get(root, "Type"), NULL);
        why = cube_json_str(cube_json_get(root, "Why"), NULL);
        if (strcmp(tree, "meta") == 0) {
            cube_buf_printf(out, "%.*s\n", (int)key_len, (const char *)key);
        } else {
            CHECK_INT(key_len, 8);
            CHECK_INT(memcmp(key, "\0\0\0\0\0\0", 6), 0);
            cube_buf_printf(out, "%02x %02x %s%s%s\n", key[6], key[7],
                            type ? type : "", why ? ": " : "",
                            why ? why : "");
        }
        if (strcmp(tree, "tasks") == 0 &&
            !cube_json_i64(cube_json_get(root, "Number"), &number))
            cube_buf_printf(out, "number %lld\n", (long long)number);
        cube_json_free(root);
    }
    cube_cursor_close(c);
}

TEST(the_trees_of_a_first_start_are_as_drawn)
{
    static const struct {
        const char *tree, *holds;
    } rows[] = {
        {"tasks", "00 01 \nnumber 1\n"},
        {"meta", "cluster\nepoch\nsince\n"},
        {"nodes", ""},
        {"past", ""},
        {"events", "00 01 start\n"
                   "00 02 node: the manager has started\n"
                   "00 03 node: it answers\n"
                   "00 04 node: it told of its machine\n"
                   "00 05 task: it was submitted, and placed\n"
                   "00 06 task: it was started\n"},
    };
    struct cluster k;
    struct cube_buf text = {0};

    cluster_open(&k, 1);
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_A), 201);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 2000));
    cluster_run(&k, 3000); /* a task that runs well is written no more */
    for (size_t i = 0; i < CUBE_COUNT(rows); i++) {
        test_row("%s", rows[i].tree);
        tree_text(k.manager->store, rows[i].tree, &text);
        CHECK_STR(text.data ? text.data : "", rows[i].holds);
    }
    cube_buf_free(&text);
    cluster_close(&k);
}

TEST(an_older_copy_of_the_store_takes_a_higher_epoch_and_the_newer_attempt)
{
    struct cluster k;
    char copy[500];
    int from;

    cluster_open(&k, 2);
    ask(&k, "POST", "/tasks", TASK_A);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 2000));
    from = cluster_where(&k, A);
    cluster_manager_down(&k);
    (void)snprintf(copy, sizeof copy, "cp %s/m/manager.cube %s/copy", k.dir,
                   k.dir);
    CHECK_INT(system(copy), 0);
    cluster_manager_up(&k);
    cluster_run(&k, 1000);
    cluster_worker_down(&k, from); /* attempt 2 runs on the other */
    cluster_run(&k, 8000);
    cluster_manager_down(&k);
    (void)snprintf(copy, sizeof copy, "cp %s/copy %s/m/manager.cube", k.dir,
                   k.dir);
    CHECK_INT(system(copy), 0);
    cluster_worker_up(&k, from);
    cluster_manager_up(&k);
    cluster_run(&k, 15000);
    CHECK_INT(cluster_running(&k), 1);
    CHECK_INT(cluster_where(&k, A), 1 - from);
    CHECK_INT(cluster_state(&k, A), CUBE_RUNNING);
    cluster_close(&k);
}

TEST(a_manager_that_slept_blames_itself)
{
    struct cluster k;

    cluster_open(&k, 2);
    ask(&k, "POST", "/tasks", TASK_A);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 2000));
    k.world.now_ms += 20000; /* nobody ran, as after a suspend */
    cluster_run(&k, 10000);
    CHECK_INT(k.engines[0].made + k.engines[1].made, 1);
    cluster_close(&k);
}

/* How many tasks have been placed a second time. */
static int moved(struct cluster *k)
{
    struct cube_record *rec;
    int n = 0;

    for (size_t at = 0; (rec = cube_ledger_next(k->manager->ledger, &at));)
        n += rec->now->task->attempt > 1;
    return n;
}

/* As drawn in chapter 12, under Time, with fewer tasks on each node. */
TEST(of_many_lost_nodes_a_task_moves_each_second_and_the_rest_after_a_minute)
{
    struct cluster k;

    cluster_open(&k, 5);
    for (int i = 0; i < 200; i++)
        CHECK_INT(ask(&k, "POST", "/tasks", "{\"Image\":\"nginx\"}"), 201);
    cluster_run(&k, 5000);
    CHECK_INT(cluster_running(&k), 200);
    for (int i = 0; i < 3; i++)
        cluster_worker_down(&k, i);
    cluster_run(&k, 4000);
    CHECK_INT(moved(&k), 0);
    cluster_run(&k, 61000);
    CHECK(moved(&k) >= 50 && moved(&k) <= 62);
    cluster_run(&k, 5000);
    CHECK_INT(moved(&k), 120);
    cluster_close(&k);
}

/* All nodes vanished at once, and the fault was in between: the first that was
 * back, half a second before the others, was given the tasks of all of them,
 * which still ran. A manager that was started anew meanwhile knew of no pace,
 * and did so too. */
TEST(of_many_lost_nodes_the_first_that_is_back_is_not_given_all_their_tasks)
{
    static const char *const rows[] = {"the same manager", "the next one"};

    for (int row = 0; row < 2; row++) {
        struct cluster k;
        int starts = 0;

        test_row("%s", rows[row]);
        cluster_open(&k, NODES);
        for (int i = 0; i < 2 * NODES; i++)
            CHECK_INT(ask(&k, "POST", "/tasks", "{\"Name\":\"x\",\"Image\":"
                          "\"nginx\"}"), 201);
        cluster_run(&k, 2000);
        CHECK_INT(cluster_running(&k), 2 * NODES);
        for (int i = 0; i < NODES; i++)
            cluster_worker_down(&k, i);
        cluster_run(&k, 30000); /* all wait by now */
        if (row == 1) {
            cluster_manager_down(&k);
            cluster_manager_up(&k);
        }
        for (int i = 0; i < NODES; i++) {
            cluster_worker_up(&k, i);
            cluster_run(&k, 500);
        }
        cluster_run(&k, 10000);
        CHECK_INT(cluster_running(&k), 2 * NODES);
        for (int i = 0; i < NODES; i++)
            starts += k.engines[i].starts;
        CHECK(starts < 2 * NODES + 5); /* a move each second */
        cluster_close(&k);
    }
}

/* With --lost-after 3s, three workers of the Go program, which are polled each
 * two seconds, counted as about to be lost before each poll: so the tasks of a
 * node that was lost were moved one a second. */
TEST(moves_are_paced_for_nodes_that_are_late_by_their_own_measure)
{
    static const struct {
        bool is_polled;
        int64_t lost_after_ms, silent_ms;
        bool is_paced;
        const char *reason;
    } rows[] = {
        {true, 3000, 2200, false, "the next poll is about to come"},
        {true, 3000, 2700, true, "it should have come"},
        {true, 5000, 2700, true, "half of that time"},
        {false, 2000, 1200, false, "a beat is late"},
        {false, 2000, 1700, true, "it should have come"},
        {false, 5000, 2400, false, "not for half of that time"},
        {false, 5000, 2700, true, "half of that time"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cluster k;
        struct cube_list *link;
        int64_t now;

        test_row("row %zu, %s", i, rows[i].reason);
        cluster_open(&k, 3);
        now = k.world.now_ms;
        k.manager->lost_after_ms = rows[i].lost_after_ms;
        for (link = k.manager->members.next; link != &k.manager->members;
             link = link->next) {
            struct cube_member *n = CUBE_OF(link, struct cube_member, link);

            n->is_polled = rows[i].is_polled;
            n->last_sign_ms = now - rows[i].silent_ms;
        }
        cube_manager_count_lost(k.manager, now);
        CHECK_INT(k.manager->paced_ms > now, rows[i].is_paced);
        cluster_close(&k);
    }
}

/* It once tried several times a second, and logged each. */
TEST(a_manager_on_a_full_disk_tries_every_few_seconds_and_says_so_once)
{
    struct cluster k;

    cluster_open(&k, 1);
    cluster_worker_down(&k, 0); /* its disk is another */
    k.worker_store = "memory";
    cluster_worker_up(&k, 0);
    ask(&k, "POST", "/tasks", TASK_A);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 2000));
    k.complaints = 0;
    k.world.full = ENOSPC;
    fake_exit(k.runtimes[0], A, 0);
    cluster_run(&k, 40000);
    CHECK_INT(k.complaints, 1);
    CHECK(k.world.refused >= 5);
    CHECK(k.world.refused <= 40); /* a try may be two writes */
    CHECK_INT(ask(&k, "GET", "/tasks/" A, NULL), 200);
    k.world.full = 0;
    CHECK(cluster_await(&k, A, CUBE_COMPLETED, 10000));
    CHECK_INT(k.complaints, 1);
    cluster_close(&k);
}

TEST(a_full_disk_answers_507_and_goes_on_when_there_is_room)
{
    struct cluster k;

    cluster_open(&k, 1);
    ask(&k, "POST", "/tasks", TASK_A);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 2000));
    k.world.full = ENOSPC;
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_B), 507);
    CHECK_INT(ask(&k, "GET", "/tasks/" B, NULL), 404);
    CHECK_INT(ask(&k, "GET", "/tasks/" A, NULL), 200);
    cluster_run(&k, 5000);
    CHECK_INT(cluster_running(&k), 1);
    k.world.full = 0;
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_B), 201);
    CHECK(cluster_await(&k, B, CUBE_RUNNING, 5000));
    cluster_close(&k);
}

static int told[2];

static void on_told(void *arg, const struct cube_http_answer *a)
{
    *(int *)arg = a->status;
}

/* The second one was told that the first one's task was another, when that was
 * not on disk, and never came there. */
TEST(nobody_is_refused_for_a_task_that_is_lost_with_its_commit)
{
    static const char *const bodies[] = {
        TASK_A, "{\"ID\":\"" A "\",\"Name\":\"b\",\"Image\":\"other\"}"};
    struct cube_http_client *client;
    struct cluster k;
    char base[60];

    cluster_open(&k, 1);
    cluster_run(&k, 1000);
    (void)snprintf(base, sizeof base, "http://127.0.0.1:%u", k.port);
    client = cube_http_client_new(k.loop, base, NULL, NULL);
    for (int row = 0; row < 2; row++) {
        k.world.full = row == 0 ? ENOSPC : 0;
        test_row(row == 0 ? "lost" : "kept");
        for (int i = 0; i < 2; i++) {
            struct cube_http_request r = {.method = "POST",
                                          .target = "/tasks",
                                          .body = bodies[i],
                                          .body_len = strlen(bodies[i]),
                                          .timeout_ms = 30000,
                                          .on_done = on_told,
                                          .arg = &told[i]};

            told[i] = 0;
            cube_http_call(client, &r);
        }
        while (!told[0] || !told[1])
            cluster_turn(&k);
        CHECK_INT(told[0], row == 0 ? 507 : 201);
        CHECK_INT(told[1], row == 0 ? 507 : 409);
    }
    cube_http_client_free(client);
    cluster_close(&k);
}

TEST(an_engine_that_is_away_costs_no_task)
{
    struct cluster k;
    struct cube_task *t;

    cluster_open(&k, 1);
    ask(&k, "POST", "/tasks", TASK_A);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 2000));
    k.engines[0].is_down = true;
    ask(&k, "POST", "/tasks", TASK_B);
    cluster_run(&k, 60000);
    CHECK_INT(cluster_state(&k, A), CUBE_RUNNING);
    t = cluster_task(&k, B);
    CHECK_INT(t->state, CUBE_SCHEDULED);
    CHECK_HAS(t->error, "does not answer");
    cube_task_free(t);
    k.engines[0].is_down = false;
    CHECK(cluster_await(&k, B, CUBE_RUNNING, 15000));
    CHECK_INT(cluster_running(&k), 2);
    CHECK_INT(k.engines[0].made, 2);
    cluster_close(&k);
}

TEST(what_the_engine_refuses_is_failed_in_its_words)
{
    struct cluster k;
    struct cube_task *t;

    cluster_open(&k, 1);
    k.engines[0].no = "no such image: nginx";
    ask(&k, "POST", "/tasks", "{\"ID\":\"" A "\",\"Name\":\"web\",\"Image\":"
        "\"nginx\",\"RestartPolicy\":\"no\"}");
    CHECK(cluster_await(&k, A, CUBE_FAILED, 2000));
    t = cluster_task(&k, A);
    CHECK_STR(t->error, "no such image: nginx");
    CHECK(cube_time_is_set(&t->finish_time));
    cube_task_free(t);
    CHECK_INT(ask(&k, "DELETE", "/tasks/" A "?forget=1", NULL), 204);
    cluster_run(&k, 5000);
    cluster_close(&k);
}

/* "localhost-2" was taken for this machine, as it begins so. */
TEST(a_worker_that_no_manager_elsewhere_can_reach_does_not_start)
{
    static const struct {
        const char *advertise, *join;
        bool starts;
    } rows[] = {
        {"127.0.0.1:5556", "127.0.0.1:5555", true},
        {"[::1]:5556", "LOCALHOST:5555", true},
        {"127.0.0.1:5556", "10.0.0.1:5555", false},
        {"localhost:5556", "localhost-2:5555", false},
        {"[::1]:5556", "127.example:5555", false},
        {"localhost-3:5556", "localhost-2:5555", true},
    };
    struct cluster k;

    cluster_open(&k, 0);
    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_worker_options o = {
            .name = "w", .listen = "127.0.0.1:0", .data_dir = k.dir,
            .store = "memory", .runtime = "process",
            .advertise = rows[i].advertise, .join = rows[i].join};
        struct cube_err err = {0, ""};
        struct cube_worker *w = cube_worker_new(k.loop, &o, &err);

        test_row("%s at %s", rows[i].advertise, rows[i].join);
        CHECK_INT(w != NULL, rows[i].starts);
        CHECK(w || strstr(err.text, "which no other machine can reach"));
        cube_worker_free(w);
    }
    cluster_close(&k);
}

TEST(a_node_joins_and_is_forgotten)
{
    struct cluster k;
    char body[200], target[100];

    cluster_open(&k, 1);
    fake_engine_init(&k.engines[1]);
    k.node_count = 2;
    cluster_worker_up(&k, 1);
    (void)snprintf(body, sizeof body, "{\"Name\":\"127.0.0.1:%u\",\"Worker\":"
                   "\"%s\"}", k.ports[1], A);
    CHECK_INT(ask(&k, "POST", "/nodes", body), 201);
    CHECK_INT(ask(&k, "POST", "/nodes", "{\"Name\":\"x\",\"Worker\":\"" A
                  "\"}"), 400);
    cluster_manager_down(&k);
    k.node_count = 1;  /* the flag does not name it; the store does */
    cluster_manager_up(&k);
    k.node_count = 2;
    cluster_run(&k, 1000);
    ask(&k, "GET", "/nodes", NULL);
    (void)snprintf(target, sizeof target, "127.0.0.1:%u", k.ports[1]);
    CHECK_HAS(k.body.data, target);
    (void)snprintf(target, sizeof target, "/nodes/127.0.0.1:%u", k.ports[1]);
    CHECK_INT(ask(&k, "DELETE", target, NULL), 409); /* it would be back */
    CHECK_HAS(k.body.data, "stop the worker first");
    cluster_worker_down(&k, 1);
    cluster_run(&k, 100);
    CHECK_INT(ask(&k, "DELETE", target, NULL), 204);
    CHECK_INT(ask(&k, "DELETE", target, NULL), 404);
    cluster_close(&k);
}

/* A thousand readers of events shut out all others: not even a question for
 * health was accepted. */
TEST(readers_of_events_leave_connections_to_others)
{
    struct cluster k;
    struct follower f[4];

    cluster_open(&k, 1);
    k.manager->server->options.max_connections = 4;
    for (int i = 0; i < 4; i++) {
        follower_open(&f[i], &k, k.port, "/events");
        cluster_run(&k, 100);
        CHECK_INT(f[i].is_over, i == 3);
    }
    CHECK_HAS(f[3].text.data, "\"HTTPStatusCode\":429");
    CHECK_INT(ask(&k, "GET", "/healthz", NULL), 200);
    CHECK_INT(ask(&k, "GET", "/tasks/" A "/logs", NULL), 429);
    follower_close(&f[3]);
    follower_close(&f[0]); /* and its place is free again */
    cluster_run(&k, 100);
    follower_open(&f[0], &k, k.port, "/events");
    cluster_run(&k, 100);
    CHECK_INT(f[0].is_over, false);
    for (int i = 0; i < 3; i++)
        follower_close(&f[i]);
    CHECK_INT(ask(&k, "GET", "/tasks/" A "/logs", NULL), 404);
    CHECK_INT(k.manager->server->lasting_count, 0);
    cluster_close(&k);
}

/* What each member is said to have, against the records, one by one. */
static void check_homes(const struct cube_manager *m)
{
    for (struct cube_list *p = m->members.next; p != &m->members;
         p = p->next) {
        struct cube_member *n = CUBE_OF(p, struct cube_member, link);
        struct cube_list *at = &n->charges;
        int64_t have = 0, want = 0;
        struct cube_record *rec;

        while (cube_member_next(n, &at))
            have++;
        for (size_t i = 0; (rec = cube_ledger_next(m->ledger, &i));)
            want += cube_member_holds(n, rec->now->task);
        CHECK_INT(have, want);
    }
}

/* GET /nodes, and the event of each node, looked at all the tasks there are,
 * once for each node: 30 ms in one turn for 20,000 tasks on 100 nodes. */
TEST(a_node_is_printed_without_a_look_at_the_tasks_of_others)
{
    struct cluster k;
    struct cube_member *n;
    char target[100];

    cluster_open(&k, 2);
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_A), 201);
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_B), 201);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 2000));
    CHECK(cluster_await(&k, B, CUBE_RUNNING, 2000));
    check_homes(k.manager);
    ask(&k, "GET", "/nodes", NULL); /* the two were placed in turn */
    CHECK(strstr(strstr(k.body.data, "\"TaskCount\":1") + 1,
                 "\"TaskCount\":1"));
    n = CUBE_OF(k.manager->members.next, struct cube_member, link);
    CHECK(n->charges.next->next == &n->charges); /* one is all it looks at */
    cluster_manager_down(&k);
    cluster_manager_up(&k); /* from records that were read */
    check_homes(k.manager);
    cluster_worker_down(&k, 0);
    cluster_run(&k, 8000); /* what it had is on the other one */
    check_homes(k.manager);
    ask(&k, "GET", "/nodes", NULL);
    CHECK_HAS(k.body.data, "\"TaskCount\":0");
    CHECK_HAS(k.body.data, "\"TaskCount\":2");
    (void)snprintf(target, sizeof target, "/nodes/127.0.0.1:%u", k.ports[0]);
    CHECK_INT(ask(&k, "DELETE", target, NULL), 204);
    check_homes(k.manager);
    ask(&k, "DELETE", "/tasks/" A, NULL);
    CHECK(cluster_await(&k, A, CUBE_COMPLETED, 2000));
    check_homes(k.manager);
    ask(&k, "GET", "/nodes", NULL);
    CHECK_HAS(k.body.data, "\"TaskCount\":1");
    cluster_close(&k);
}

/* The number of the newest line that came, and the stream's name. */
static uint64_t newest(const struct follower *f, char stream[CUBE_UUID_TEXT])
{
    uint64_t last = 0;

    for (const char *p = f->text.data; p && *p;) {
        const char *end = strchr(p, '\n');
        struct json_value_s *line =
            end ? cube_json_parse(p, (size_t)(end - p), NULL) : NULL;
        int64_t seq;

        if (line && cube_json_i64(cube_json_get(line, "Seq"), &seq) == 0) {
            last = (uint64_t)seq;
            cube_json_uuid(cube_json_get(line, "Stream"), stream);
        }
        cube_json_free(line);
        p = end ? end + 1 : NULL;
    }
    return last;
}

/* A worker that was named by --workers and joins as well, under another name
 * for the same address: its task was taken for a copy elsewhere and stopped. */
TEST(a_worker_under_two_names_keeps_its_tasks)
{
    struct cluster k;
    char body[100];

    cluster_open(&k, 1);
    (void)snprintf(body, sizeof body, "{\"Name\":\"localhost:%u\",\"Worker\":"
                   "\"%s\"}", k.ports[0], A);
    CHECK_INT(ask(&k, "POST", "/nodes", body), 201);
    cluster_run(&k, 2000);
    for (int i = 0; i < 2; i++) { /* round robin: one by each name */
        CHECK_INT(ask(&k, "POST", "/tasks", i ? TASK_B : TASK_A), 201);
        CHECK(cluster_await(&k, i ? B : A, CUBE_RUNNING, 5000));
    }
    cluster_run(&k, 10000);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 0));
    CHECK(cluster_await(&k, B, CUBE_RUNNING, 0));
    CHECK_INT(cluster_running(&k), 2);
    CHECK_INT(k.engines[0].starts, 2);
    CHECK_INT(ask(&k, "DELETE", "/tasks/" A, NULL), 204);
    CHECK_INT(ask(&k, "DELETE", "/tasks/" B, NULL), 204);
    CHECK(cluster_await(&k, A, CUBE_COMPLETED, 5000));
    CHECK(cluster_await(&k, B, CUBE_COMPLETED, 5000));
    CHECK_INT(cluster_running(&k), 0);
    cluster_close(&k);
}

TEST(events_resume_after_a_break_and_after_a_restart_of_the_manager)
{
    struct cluster k;
    struct follower f;
    char stream[CUBE_UUID_TEXT] = "", target[100];
    uint64_t last;

    cluster_open(&k, 1);
    follower_open(&f, &k, k.port, "/events");
    ask(&k, "POST", "/tasks", TASK_A);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 2000));
    CHECK_INT(follower_count(&f, "\"Type\":\"hello\""), 1);
    CHECK_INT(follower_count(&f, "\"Type\":\"reset\""), 1);
    CHECK_INT(follower_count(&f, "\"Type\":\"listed\""), 1);
    CHECK_INT(follower_count(&f, "it was submitted"), 1); /* each change once */
    CHECK_INT(follower_count(&f, "\"State\":2"), 1);
    last = newest(&f, stream);
    follower_close(&f);
    CHECK(last > 0);
    ask(&k, "DELETE", "/tasks/" A, NULL); /* while nobody looks */
    CHECK(cluster_await(&k, A, CUBE_COMPLETED, 2000));
    cluster_manager_down(&k);
    cluster_manager_up(&k);
    (void)snprintf(target, sizeof target, "/events?after=%s:%llu", stream,
                   (unsigned long long)last);
    follower_open(&f, &k, k.port, target);
    cluster_run(&k, 1500);
    CHECK_INT(follower_count(&f, "\"Type\":\"reset\""), 0);
    CHECK_INT(follower_count(&f, "\"State\":3"), 1);
    CHECK(follower_count(&f, "\"Wanted\":\"stop\"") >= 2);
    CHECK(follower_count(&f, "\"Type\":\"beat\"") >= 1);
    follower_close(&f);
    follower_open(&f, &k, k.port, "/events?after=nonsense");
    cluster_run(&k, 500);
    CHECK_INT(follower_count(&f, "\"Type\":\"reset\""), 1);
    follower_close(&f);
    cluster_close(&k);
}

TEST(who_is_too_slow_for_the_events_is_told_that_some_are_missing)
{
    struct cluster k;
    struct follower f;
    char body[400], target[100];
    int made = CUBE_FEED_RING + 50; /* an event each, at least */

    cluster_open(&k, 0);
    follower_open(&f, &k, k.port, "/events");
    cluster_run(&k, 300);
    (void)snprintf(target, sizeof target, "/events?after=%s:1",
                   k.manager->cluster);
    follower_close(&f);
    for (int i = 0; i < made; i++) {
        (void)snprintf(body, sizeof body, "{\"ID\":\"aaaaaaaa-0000-4000-8000-"
                       "%012d\",\"Name\":\"t%d\",\"Image\":\"nginx\"}", i, i);
        if (ask(&k, "POST", "/tasks", body) != 201)
            FAIL("task %d: %d", i, k.status);
    }
    cluster_run(&k, 3000);
    follower_open(&f, &k, k.port, target);
    cluster_run(&k, 3000);
    CHECK_INT(follower_count(&f, "\"Type\":\"reset\""), 1);
    CHECK_INT(follower_count(&f, "\"Type\":\"listed\""), 1);
    CHECK(follower_count(&f, "\"Type\":\"task\"") >= made);
    follower_close(&f);
    cluster_close(&k);
}

TEST(a_task_goes_to_the_node_that_answers)
{
    struct cluster k;

    cluster_open(&k, 2);
    cluster_worker_down(&k, 0);
    cluster_run(&k, 6000);
    for (int i = 0; i < 4; i++)
        CHECK_INT(ask(&k, "POST", "/tasks", "{\"Name\":\"x\",\"Image\":"
                      "\"nginx\"}"), 201);
    cluster_run(&k, 2000);
    CHECK_INT(fake_count(&k.engines[1], CUBE_BOX_RUNNING), 4);
    cluster_close(&k);
}

static size_t listed(struct cluster *k)
{
    struct json_value_s *root;
    struct json_array_s *array;
    size_t count;

    CHECK_INT(ask(k, "GET", "/tasks", NULL), 200);
    root = cube_json_parse(k->body.data, k->body.len, NULL);
    array = root ? json_value_as_array(root) : NULL;
    count = array ? array->length : 9999;
    cube_json_free(root);
    return count;
}

TEST(a_list_is_printed_once_and_anew_after_each_change)
{
    struct cluster k;
    const struct cube_http_text *first;

    cluster_open(&k, 0);
    CHECK_INT(listed(&k), 0);
    ask(&k, "POST", "/tasks", TASK_A);
    CHECK_INT(listed(&k), 1);
    cluster_run(&k, 2000); /* until its record says why it waits */
    CHECK_INT(listed(&k), 1);
    first = k.manager->ledger->list;
    CHECK(first != NULL);
    CHECK_INT(listed(&k), 1);
    CHECK(k.manager->ledger->list == first);
    ask(&k, "POST", "/tasks", TASK_B);
    CHECK_INT(listed(&k), 2);
    ask(&k, "DELETE", "/tasks/" A, NULL);
    CHECK(cluster_await(&k, A, CUBE_COMPLETED, 2000));
    CHECK_INT(listed(&k), 2);
    ask(&k, "DELETE", "/tasks/" A "?forget=1", NULL);
    CHECK_INT(listed(&k), 1);
    cluster_close(&k);
}

TEST(a_listing_is_of_one_commit_however_long)
{
    struct cluster k;
    struct cube_buf body = {0};

    cluster_open(&k, 0);
    for (int i = 0; i < 300; i++) { /* more than is printed at once */
        cube_buf_clear(&body);
        cube_buf_printf(&body, "{\"Name\":\"t%d\",\"Image\":\"nginx\","
                        "\"Env\":[\"A=%04000d\"]}", i, i);
        ask(&k, "POST", "/tasks", body.data);
    }
    CHECK_INT(listed(&k), 300);
    CHECK(k.manager->ledger->list == NULL);
    cube_buf_free(&body);
    cluster_close(&k);
}

TEST(a_failed_sync_is_an_unknown_outcome_and_then_the_file_is_written_anew)
{
    struct cluster k;

    cluster_open(&k, 1);
    ask(&k, "POST", "/tasks", TASK_A);
    CHECK(cluster_await(&k, A, CUBE_RUNNING, 2000));
    cluster_run(&k, 500);
    k.world.sync_fails = 1;
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_B), 503);
    CHECK_HAS(k.body.data, "outcome unknown");
    CHECK_INT(ask(&k, "GET", "/tasks/" A, NULL), 200); /* reads go on */
    CHECK_INT(cluster_running(&k), 1);
    cluster_run(&k, 3000);
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_B), 201);
    CHECK(cluster_await(&k, B, CUBE_RUNNING, 5000));
    cluster_manager_down(&k);
    cluster_manager_up(&k);
    cluster_run(&k, 3000);
    CHECK_INT(cluster_state(&k, A), CUBE_RUNNING);
    CHECK_INT(cluster_state(&k, B), CUBE_RUNNING);
    CHECK_INT(k.engines[0].made, 2);
    cluster_close(&k);
}

TEST(events_of_a_store_in_memory_are_another_stream_after_a_restart)
{
    struct cluster k;
    struct follower f;
    char first[80];

    cluster_open(&k, 1);
    cluster_manager_down(&k);
    k.store = "memory";
    for (int i = 0; i < 2; i++) {
        cluster_manager_up(&k);
        cluster_run(&k, 1000);
        follower_open(&f, &k, k.port, "/events");
        cluster_run(&k, 1000);
        CHECK_HAS(f.text.data, "\"hello\",\"Stream\":");
        if (i == 0)
            (void)snprintf(first, sizeof first, "%.70s", f.text.data);
        else
            CHECK(strncmp(first, f.text.data, 70) != 0);
        follower_close(&f);
        cluster_manager_down(&k);
    }
    cluster_manager_up(&k);
    cluster_close(&k);
}

TEST(a_change_that_cannot_be_stored_takes_all_of_its_commit_along)
{
    struct cluster k;
    struct cube_manager *m;
    struct cube_record *rec;

    cluster_open(&k, 0);
    m = k.manager;
    rec = cube_ledger_add(m->ledger, A);
    cube_task_set(&cube_record_edit(m->ledger, rec)->task->name, "fine");
    cube_manager_stage(m, rec, "a test");
    rec = cube_ledger_add(m->ledger, B);
    {
        /* Larger than any value that the store takes, and than any body. */
        char *huge = malloc(CUBE_STORE_VALUE_MAX + 100);

        REQUIRE(huge);
        memset(huge, 'x', CUBE_STORE_VALUE_MAX + 99);
        huge[CUBE_STORE_VALUE_MAX + 99] = 0;
        cube_task_set(&cube_record_edit(m->ledger, rec)->task->name, huge);
        free(huge);
    }
    cube_manager_stage(m, rec, "a test");
    CHECK_INT(ask(&k, "GET", "/tasks", NULL), 200);
    cluster_run(&k, 500);
    CHECK(!cube_ledger_find(m->ledger, A));
    CHECK(!cube_ledger_find(m->ledger, B));
    CHECK_INT(ask(&k, "GET", "/tasks", NULL), 200);
    CHECK_STR(k.body.data, "[]\n");
    CHECK_INT(ask(&k, "POST", "/tasks", TASK_A), 201);
    CHECK_INT(ask(&k, "GET", "/tasks/" A, NULL), 200);
    cluster_close(&k);
}
