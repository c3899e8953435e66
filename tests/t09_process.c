/* Chapter 9: the process runtime, on the machine itself. */
#include "test.h"
#include <sched.h>
#include <sys/mount.h>

#define TASK "11111111-2222-4333-8444-555555555555"
#define OTHER "99999999-2222-4333-8444-555555555555"
#define WORKER "aaaaaaaa-2222-4333-8444-555555555555"
#define ID1 TASK "-1-0"

/* ---- A runtime on a loop, and what it answered last ---- */

static struct bench {
    struct cube_loop *loop;
    struct cube_runtime *rt;
    int answers;             /* callbacks so far */
    struct cube_err err;     /* of the last one; CUBE_OK: none */
    char id[100], error[300], spec[4000], host_port[16], task[40];
    enum cube_box_state state;
    bool has_exit, is_oom;
    int exit_code;
    int64_t attempt, restart;
    bool has_started, has_finished;
    size_t count;            /* of the last list */
    struct cube_buf text;    /* of the last inspection, or log */
    int log_ends;
    int changes, all_changes; /* named, and NULL */
    char changed[40];
} b;

static void open_runtime(void)
{
    struct cube_err err;

    b.rt = cube_process_new(b.loop, test_dir(), &err);
    REQUIRE(b.rt != NULL);
}

static void set_up(void)
{
    int fd = cube_world_real()->pid_open(NULL, getpid());

    if (fd == -ENOSYS)
        SKIP("no pidfd_open: an old kernel, or valgrind");
    close(fd);
    memset(&b, 0, sizeof b);
    b.loop = cube_loop_new(cube_world_real(), NULL);
    REQUIRE(b.loop != NULL);
    open_runtime();
}

/* As a worker that restarts: nothing in memory survives. */
static void restart(void)
{
    cube_runtime_free(b.rt);
    open_runtime();
}

/* Turns until the condition holds, at most 20 s; without sleeping longer
 * than the loop has nothing to do. */
#define UNTIL(condition)                                                    \
    do {                                                                    \
        int64_t until_ = cube_loop_now_ms(b.loop) + 20000;                  \
        while (!(condition) && cube_loop_now_ms(b.loop) < until_)           \
            cube_loop_turn(b.loop, 10, NULL);                               \
        CHECK(condition);                                                   \
    } while (0)

static void take_err(const struct cube_err *err)
{
    memset(&b.err, 0, sizeof b.err);
    if (err)
        b.err = *err;
    b.answers++;
}

static void take_container(const struct cube_container *c)
{
    snprintf(b.id, sizeof b.id, "%s", c->id);
    snprintf(b.error, sizeof b.error, "%s", c->error);
    snprintf(b.spec, sizeof b.spec, "%s", c->spec);
    snprintf(b.task, sizeof b.task, "%s", c->task);
    snprintf(b.host_port, sizeof b.host_port, "%s",
             c->ports.count > 0 && c->ports.list[0].count > 0
                 ? c->ports.list[0].bindings[0].port
                 : "");
    b.state = c->state;
    b.has_exit = c->has_exit;
    b.exit_code = c->exit_code;
    b.is_oom = c->is_oom_killed;
    b.attempt = c->attempt;
    b.restart = c->restart;
    b.has_started = cube_time_is_set(&c->started);
    b.has_finished = cube_time_is_set(&c->finished);
}

static void on_container(void *arg, const struct cube_container *c,
                         const struct cube_err *err)
{
    (void)arg;
    take_err(err);
    if (c)
        take_container(c);
}

static void on_list(void *arg, const struct cube_container *list,
                    size_t count, const struct cube_err *err)
{
    (void)arg;
    take_err(err);
    b.count = count;
    for (size_t i = 0; i < count; i++)
        take_container(&list[i]);
}

static void on_text(void *arg, const char *text, size_t len,
                    const struct cube_err *err)
{
    (void)arg;
    take_err(err);
    cube_buf_clear(&b.text);
    cube_buf_add(&b.text, text, len);
}

static void on_done(void *arg, const struct cube_err *err)
{
    (void)arg;
    take_err(err);
}

static void on_data(void *arg, const char *p, size_t len)
{
    (void)arg;
    cube_buf_add(&b.text, p, len);
}

static void on_log_end(void *arg, const struct cube_err *err)
{
    (void)arg;
    take_err(err);
    b.log_ends++;
}

static void on_change(void *arg, const char *task)
{
    (void)arg;
    if (task)
        snprintf(b.changed, sizeof b.changed, "%s", task);
    if (task)
        b.changes++;
    else
        b.all_changes++;
}

/* Waits for the one answer to what was just asked, which comes later. */
static void answered(void)
{
    int before = b.answers;

    CHECK_INT(b.answers, before);
    UNTIL(b.answers > before);
    CHECK_INT(b.answers, before + 1);
}

/* ---- What to run ---- */

static struct cube_task *shell(const char *script)
{
    struct cube_task *t = cube_task_new();

    snprintf(t->id, sizeof t->id, "%s", TASK);
    cube_task_set(&t->name, "web");
    cube_task_add(&t->cmd, "sh");
    cube_task_add(&t->cmd, "-c");
    cube_task_add(&t->cmd, script);
    return t;
}

static void begin_start(const struct cube_task *t, int64_t attempt)
{
    struct cube_start what = {.task = t, .cluster = OTHER, .worker = WORKER,
                              .attempt = attempt};

    b.rt->ops->start(b.rt, &what, on_container, NULL);
}

static void start_task(struct cube_task *t, int64_t attempt)
{
    begin_start(t, attempt);
    answered();
    cube_task_free(t);
}

static void start(const char *script)
{
    start_task(shell(script), 1);
    CHECK_STR(b.err.text, "");
}

static void inspect(const char *id)
{
    b.rt->ops->inspect(b.rt, id, on_container, NULL);
    answered();
}

static void list(void)
{
    b.rt->ops->list(b.rt, WORKER, on_list, NULL);
    answered();
}

static void stop(const char *id, int64_t grace_ms)
{
    b.rt->ops->stop(b.rt, id, grace_ms, on_done, NULL);
    answered();
}

static void remove_it(const char *id)
{
    b.rt->ops->remove(b.rt, id, on_done, NULL);
    answered();
}

static void exits(void)
{
    int64_t until = cube_loop_now_ms(b.loop) + 20000;

    do
        inspect(ID1);
    while (b.state != CUBE_BOX_EXITED && cube_loop_now_ms(b.loop) < until);
    CHECK_INT(b.state, CUBE_BOX_EXITED);
}

static char *at(const char *id, const char *name)
{
    static char path[4][600];
    static int next;
    char *p = path[next++ % 4];

    snprintf(p, sizeof path[0], "%s/run/%s/%s/%s", test_dir(), WORKER, id,
             name);
    return p;
}

static const char *log_text(const struct cube_logs_options *options)
{
    cube_buf_clear(&b.text);
    b.rt->ops->logs(b.rt, ID1, options, on_data, on_log_end, NULL);
    answered();
    return b.text.data ? b.text.data : "";
}

static const char *all_log(void)
{
    static const struct cube_logs_options all = {.tail = -1};

    return log_text(&all);
}

static const char *file_text(const char *path)
{
    static char text[8192];
    FILE *f = fopen(path, "r");
    size_t n = f ? fread(text, 1, sizeof text - 1, f) : 0;

    text[n] = 0;
    if (f)
        fclose(f);
    return text;
}

static void write_file(const char *path, const char *text)
{
    FILE *f = fopen(path, "w");

    REQUIRE(f != NULL);
    fputs(text, f);
    fclose(f);
}

/* The number that the task wrote into a file of its directory. */
static int number_in(const char *name)
{
    UNTIL(strchr(file_text(at(ID1, name)), '\n') != NULL);
    return atoi(file_text(at(ID1, name)));
}

static bool is_alive(int pid)
{
    char path[64];
    const char *p;

    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    p = strrchr(file_text(path), ')');
    return p && p[2] != 'Z' && p[2] != 'X';
}

static int supervisor(const char *id)
{
    return cube_world_real()->lock_owner(NULL, at(id, "lock"));
}

/* Nothing may be left: each test ends with its processes removed. */
static void tear_down(void)
{
    list();
    while (b.count > 0 && b.err.code == CUBE_OK) {
        remove_it(b.id);
        CHECK_STR(b.err.text, "");
        list();
    }
    cube_runtime_free(b.rt);
    cube_buf_free(&b.text);
    cube_loop_free(b.loop);
}

/* ---- Starting ---- */

TEST(a_started_process_is_reported_as_it_is)
{
    set_up();
    start("exec sleep 1000");
    CHECK_STR(b.id, ID1);
    CHECK_STR(b.task, TASK);
    CHECK_INT(b.state, CUBE_BOX_RUNNING);
    CHECK_INT(b.attempt, 1);
    CHECK(b.has_started && !b.has_finished && !b.has_exit);
    CHECK_HAS(b.spec, "\"ID\":\"" TASK "\"");
    CHECK_HAS(b.spec, "\"Cmd\":[\"sh\",\"-c\",\"exec sleep 1000\"]");
    CHECK_STR(b.rt->name, "process");
    CHECK(b.rt->is_up);
    CHECK_HAS(b.rt->words, "processes in ");
    tear_down();
}

TEST(no_callback_runs_before_the_call_has_returned)
{
    struct cube_task *t;
    struct cube_logs_options all = {.tail = -1};

    set_up();
    t = shell("exec sleep 1000");
    begin_start(t, 1);
    b.rt->ops->list(b.rt, NULL, on_list, NULL);
    b.rt->ops->inspect(b.rt, ID1, on_container, NULL);
    b.rt->ops->inspect_json(b.rt, ID1, on_text, NULL);
    b.rt->ops->logs(b.rt, ID1, &all, on_data, on_log_end, NULL);
    b.rt->ops->watch(b.rt, NULL, on_change, NULL);
    b.rt->ops->kill(b.rt, ID1, on_done, NULL);
    b.rt->ops->stop(b.rt, "none", 0, on_done, NULL);
    b.rt->ops->remove(b.rt, "none", on_done, NULL);
    CHECK_INT(b.answers + b.all_changes, 0);
    UNTIL(b.answers == 8 && b.all_changes == 1);
    cube_task_free(t);
    tear_down();
}

TEST(no_callback_runs_after_the_runtime_is_freed)
{
    struct cube_task *t;
    struct cube_logs_options follow = {.is_following = true, .tail = -1};
    int before;

    set_up();
    t = shell("exec sleep 1000");
    start_task(t, 1);
    b.rt->ops->watch(b.rt, NULL, on_change, NULL);
    b.rt->ops->stop(b.rt, ID1, 1, on_done, NULL);
    b.rt->ops->list(b.rt, NULL, on_list, NULL);
    b.rt->ops->logs(b.rt, ID1, &follow, on_data, on_log_end, NULL);
    b.rt->ops->remove(b.rt, ID1, on_done, NULL);
    before = b.answers;
    cube_runtime_free(b.rt);
    for (int i = 0; i < 5; i++)
        cube_loop_turn(b.loop, 1, NULL);
    CHECK_INT(b.answers, before);
    CHECK_INT(b.all_changes, 0);
    open_runtime();
    tear_down();
}

TEST(a_task_without_a_command_is_refused_by_the_name_of_the_field)
{
    struct cube_task *t;

    set_up();
    t = cube_task_new();
    snprintf(t->id, sizeof t->id, "%s", TASK);
    cube_task_set(&t->image, "nginx:latest");
    start_task(t, 1);
    CHECK_INT(b.err.code, CUBE_EINVAL);
    CHECK_HAS(b.err.text, "Cmd: ");
    CHECK_HAS(b.err.text, "nginx:latest");
    list();
    CHECK_UINT(b.count, 0);
    tear_down();
}

TEST(what_cannot_be_executed_is_a_no_in_words_and_leaves_nothing)
{
    static const struct {
        const char *command, *words;
    } rows[] = {
        {"cube-no-such", "exec: \"cube-no-such\": executable file not found "
                         "in $PATH (exit code 127)"},
        {"/no/such", "exec: \"/no/such\": No such file or directory "
                     "(exit code 127)"},
        {"/etc/passwd", "exec: \"/etc/passwd\": Permission denied "
                        "(exit code 126)"},
    };

    set_up();
    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_task *t = cube_task_new();

        test_row("%s", rows[i].command);
        snprintf(t->id, sizeof t->id, "%s", TASK);
        cube_task_add(&t->cmd, rows[i].command);
        start_task(t, 1);
        CHECK_STR(b.err.text, rows[i].words);
        CHECK(!cube_runtime_is_trouble(&b.err));
        list();
        CHECK_UINT(b.count, 0);
        UNTIL(access(at(ID1, ""), F_OK) != 0);
    }
    tear_down();
}

TEST(a_repeated_start_uses_what_the_first_one_left)
{
    set_up();
    start("echo $$ >> pids; exec sleep 1000");
    restart();
    start("echo $$ >> pids; exec sleep 1000");
    CHECK_STR(b.id, ID1);
    CHECK_INT(b.state, CUBE_BOX_RUNNING);
    stop(ID1, 10000);
    start("echo $$ >> pids; exec sleep 1000");
    CHECK_INT(b.state, CUBE_BOX_EXITED); /* it has run, and that counts */
    CHECK(strchr(file_text(at(ID1, "work/pids")), '\n') ==
          strrchr(file_text(at(ID1, "work/pids")), '\n'));
    tear_down();
}

TEST(a_start_that_got_no_further_than_its_directory_is_begun_again)
{
    set_up();
    start("exec sleep 1000");
    stop(ID1, 10000);
    CHECK_INT(unlink(at(ID1, "lock")), 0);
    CHECK_INT(unlink(at(ID1, "exit")), 0);
    restart();
    inspect(ID1);
    CHECK_INT(b.state, CUBE_BOX_CREATED);
    start("exec sleep 1000");
    CHECK_INT(b.state, CUBE_BOX_RUNNING);
    tear_down();
}

TEST(a_newer_attempt_or_restart_replaces_an_older_one)
{
    struct cube_task *t;
    int old;

    set_up();
    start("echo $$ > pid; trap '' TERM; while :; do sleep 1000; done");
    old = number_in("work/pid");
    start_task(shell("exec sleep 1000"), 2);
    CHECK_STR(b.id, TASK "-2-0");
    CHECK(!is_alive(old));
    t = shell("exec sleep 1000");
    t->restart_count = 3;
    start_task(t, 2);
    CHECK_STR(b.id, TASK "-2-3");
    CHECK_INT(b.restart, 3);
    list();
    CHECK_UINT(b.count, 1);
    tear_down();
}

TEST(a_start_that_waits_for_an_older_one_can_be_given_up)
{
    struct cube_task *t;

    set_up();
    t = shell("exec sleep 1000");
    start("exec sleep 1000");
    begin_start(t, 2);
    cube_loop_turn(b.loop, 0, NULL); /* the older one is told to go */
    if (b.answers < 2) {
        b.rt->ops->start_cancel(b.rt, TASK);
        answered();
        CHECK_INT(b.err.code, CUBE_ECANCELED);
    }
    cube_task_free(t);
    tear_down();
}

/* ---- Ending ---- */

TEST(exit_codes_survive_a_restart_of_the_worker)
{
    static const struct {
        const char *script;
        int code;
    } rows[] = {{"exit 0", 0}, {"exit 3", 3}, {"kill -9 $$", 137}};

    set_up();
    for (size_t i = 0; i < COUNT(rows); i++) {
        test_row("%s", rows[i].script);
        start(rows[i].script);
        restart();
        exits();
        restart();
        list();
        CHECK_UINT(b.count, 1);
        CHECK_INT(b.state, CUBE_BOX_EXITED);
        CHECK(b.has_exit && b.has_started && b.has_finished);
        CHECK_INT(b.exit_code, rows[i].code);
        CHECK_STR(b.error, "");
        CHECK(!b.is_oom);
        remove_it(ID1);
    }
    tear_down();
}

TEST(a_process_that_ends_while_no_worker_looks_keeps_its_exit_code)
{
    int pid_fd;

    set_up();
    start("read x < fifo; exit 42");
    REQUIRE(mkfifo(at(ID1, "work/fifo"), 0600) == 0 || errno == EEXIST);
    tear_down();
    set_up();
    start("until [ -e go ]; do sleep 0.01; done; exit 42");
    pid_fd = cube_world_real()->pid_open(NULL, supervisor(ID1));
    cube_runtime_free(b.rt);
    write_file(at(ID1, "work/go"), "");
    CHECK_INT(poll(&(struct pollfd){pid_fd, POLLIN, 0}, 1, 20000), 1);
    close(pid_fd);
    open_runtime();
    list();
    CHECK_INT(b.state, CUBE_BOX_EXITED);
    CHECK_INT(b.exit_code, 42);
    tear_down();
}

TEST(the_end_of_a_process_is_reported_by_its_task)
{
    set_up();
    b.rt->ops->watch(b.rt, NULL, on_change, NULL);
    UNTIL(b.all_changes == 1);
    start("until [ -e go ]; do sleep 0.01; done");
    CHECK_INT(b.changes, 0);
    write_file(at(ID1, "work/go"), "");
    UNTIL(b.changes == 1);
    CHECK_STR(b.changed, TASK);
    inspect(ID1);
    CHECK_INT(b.state, CUBE_BOX_EXITED);
    tear_down();
}

TEST(the_end_of_another_workers_process_is_not_reported)
{
    set_up();
    b.rt->ops->watch(b.rt, OTHER, on_change, NULL);
    UNTIL(b.all_changes == 1);
    start("exit 0");
    do /* that it has ended is seen, and told to nobody */
        inspect(ID1);
    while (b.state != CUBE_BOX_EXITED);
    CHECK_INT(b.changes, 0);
    tear_down();
}

TEST(an_adopted_process_is_watched_as_well)
{
    set_up();
    start("until [ -e go ]; do sleep 0.01; done");
    restart();
    b.rt->ops->watch(b.rt, WORKER, on_change, NULL);
    UNTIL(b.all_changes == 1);
    write_file(at(ID1, "work/go"), "");
    UNTIL(b.changes == 1);
    CHECK_STR(b.changed, TASK);
    tear_down();
}

/* The files that are drawn at the opening of processes. */
TEST(the_files_of_a_process_are_as_they_are_drawn)
{
    struct cube_buf want = {0};
    struct cube_task *t;
    long long started, finished;
    const char *text;
    int pid;

    set_up();
    t = shell("exec sleep 1000");
    cube_task_expose(t, "80");
    start_task(t, 1);
    CHECK_STR(b.err.text, "");
    text = file_text(at(ID1, "spec"));
    CHECK(cube_text_starts(text, "{\"Name\":\"web\",\"Cluster\":\"" OTHER
                                 "\",\"Worker\":\"" WORKER "\",\"Attempt\":1,"
                                 "\"Restart\":0,\"Created\":\"20"));
    cube_buf_printf(&want, "Z\",\"Limits\":\"\",\"Ports\":{\"80/tcp\":[{"
                           "\"HostIp\":\"0.0.0.0\",\"HostPort\":\"%s\"}]},"
                           "\"Task\":%s}\n", b.host_port, b.spec);
    CHECK_HAS(text, want.data);
    text = file_text(at(ID1, "lock"));
    REQUIRE(sscanf(text, "started %lld\npid %d", &started, &pid) == 2);
    cube_buf_clear(&want);
    cube_buf_printf(&want, "started %lld\npid %d\n", started, pid);
    CHECK_STR(text, want.data);
    CHECK_INT(kill(supervisor(ID1), SIGKILL), 0);
    exits();
    text = file_text(at(ID1, "exit"));
    REQUIRE(strstr(text, "finished ") != NULL);
    finished = atoll(strstr(text, "finished ") + 9);
    CHECK(finished > started);
    cube_buf_clear(&want);
    cube_buf_printf(&want, "code 137\nsignal 9\noom 0\nerror 0\n"
                           "started %lld\nfinished %lld\nlost 1\n", started,
                    finished);
    CHECK_STR(text, want.data);
    cube_buf_free(&want);
    tear_down();
}

TEST(a_killed_supervisor_takes_all_of_the_task_with_it)
{
    int pid, daemon;

    set_up();
    b.rt->ops->watch(b.rt, NULL, on_change, NULL);
    start("setsid sh -c 'echo $$ > daemon; while :; do sleep 1000; done' & "
          "echo $$ > pid; wait");
    pid = number_in("work/pid");
    daemon = number_in("work/daemon");
    CHECK(is_alive(pid) && is_alive(daemon));
    CHECK_INT(kill(supervisor(ID1), SIGKILL), 0);
    UNTIL(b.changes == 1);
    UNTIL(!is_alive(pid) && !is_alive(daemon));
    inspect(ID1);
    CHECK_INT(b.state, CUBE_BOX_EXITED);
    CHECK(!b.has_exit && b.has_finished);
    CHECK_HAS(b.error, "its supervisor was killed");
    restart(); /* and so it is remembered */
    inspect(ID1);
    CHECK(!b.has_exit);
    CHECK_HAS(b.error, "its supervisor was killed");
    tear_down();
}

TEST(a_supervisor_that_was_killed_while_no_worker_looked_is_noticed)
{
    int pid, owner;

    set_up();
    start("(setsid sh -c 'echo $$ > daemon; while :; do sleep 1000; done' &)"
          "; exec sleep 1000");
    pid = number_in("work/daemon");
    owner = supervisor(ID1);
    cube_runtime_free(b.rt);
    CHECK_INT(kill(owner, SIGKILL), 0);
    UNTIL(supervisor(ID1) == 0);
    open_runtime();
    list();
    CHECK_INT(b.state, CUBE_BOX_EXITED);
    CHECK(!b.has_exit);
    UNTIL(!is_alive(pid));
    tear_down();
}

TEST(the_pid_in_a_lock_file_says_nothing)
{
    char text[100];

    set_up();
    start("exec sleep 1000");
    stop(ID1, 10000);
    CHECK_INT(unlink(at(ID1, "exit")), 0);
    /* As after a reboot, when our own PID is what the supervisor's was. */
    snprintf(text, sizeof text, "started 1700000000000000000\npid %d\n",
             getpid());
    write_file(at(ID1, "lock"), text);
    restart();
    inspect(ID1);
    CHECK_INT(b.state, CUBE_BOX_EXITED);
    CHECK(!b.has_exit);
    tear_down();
}

/* ---- Stopping ---- */

TEST(a_stop_is_sigterm_and_the_process_may_clean_up)
{
    set_up();
    start("trap 'echo bye; exit 5' TERM; echo 1 > ready; "
          "while :; do sleep 0.01; done");
    (void)number_in("work/ready");
    stop(ID1, 20000);
    CHECK_STR(b.err.text, "");
    inspect(ID1);
    CHECK_INT(b.state, CUBE_BOX_EXITED);
    CHECK_INT(b.exit_code, 5);
    CHECK_HAS(all_log(), "bye\n"); /* dash may say "Terminated" before */
    tear_down();
}

TEST(what_ignores_sigterm_is_killed_after_its_grace)
{
    int64_t began;

    set_up();
    start("trap '' TERM; echo 1 > ready; while :; do sleep 1000; done");
    (void)number_in("work/ready");
    began = cube_loop_now_ms(b.loop);
    stop(ID1, 300);
    CHECK_STR(b.err.text, "");
    CHECK(cube_loop_now_ms(b.loop) - began >= 300);
    CHECK(cube_loop_now_ms(b.loop) - began < 10000);
    inspect(ID1);
    CHECK_INT(b.exit_code, 137);
    tear_down();
}

TEST(a_stop_ends_the_group_and_the_daemons_that_left_it)
{
    int inner, daemon;

    set_up();
    start("sh -c 'echo $$ > inner; while :; do sleep 1000; done' & "
          "(setsid sh -c 'trap \"\" TERM; echo $$ > daemon; "
          "while :; do sleep 1000; done' &) ; wait");
    inner = number_in("work/inner");
    daemon = number_in("work/daemon");
    stop(ID1, 20000);
    CHECK_STR(b.err.text, "");
    CHECK(!is_alive(inner));
    CHECK(!is_alive(daemon));
    tear_down();
}

/* Each in a session of its own, so that each has to be killed by itself, and
 * only the death of one makes the next a child of the supervisor. It gave up
 * after 500 rounds, and left the rest of the line running. */
TEST(a_stop_ends_a_long_line_of_descendants)
{
    int pid;

    set_up();
    start("cat > line <<'END'\n"
          "if [ $1 -gt 0 ]; then setsid sh line $(($1 - 1)) &\n"
          "else echo $$ > last; exec sleep 1000; fi\n"
          "wait\n"
          "END\n"
          "exec sh line 530");
    pid = number_in("work/last");
    CHECK(is_alive(pid));
    stop(ID1, 1);
    CHECK_STR(b.err.text, "");
    CHECK(!is_alive(pid));
    tear_down();
}

TEST(stopping_what_has_ended_or_is_unknown_is_a_success)
{
    set_up();
    start("exit 3");
    exits();
    stop(ID1, 10000);
    CHECK_STR(b.err.text, "");
    stop("unknown", 10000);
    CHECK_STR(b.err.text, "");
    stop("../../etc", 10000);
    CHECK_STR(b.err.text, "");
    inspect(ID1);
    CHECK_INT(b.exit_code, 3);
    tear_down();
}

TEST(several_stops_and_a_removal_of_one_process_are_all_answered)
{
    set_up();
    start("trap '' TERM; echo 1 > ready; while :; do sleep 1000; done");
    (void)number_in("work/ready");
    b.answers = 0;
    b.rt->ops->stop(b.rt, ID1, 600000, on_done, NULL);
    b.rt->ops->stop(b.rt, ID1, 600000, on_done, NULL);
    cube_loop_turn(b.loop, 0, NULL);
    b.rt->ops->remove(b.rt, ID1, on_done, NULL);
    UNTIL(b.answers == 3);
    CHECK_STR(b.err.text, "");
    tear_down();
}

/* ---- Removing and finding ---- */

TEST(a_removal_takes_the_files_with_it)
{
    struct cube_buf path = {0};
    int pid;

    set_up();
    start("mkdir -p a/b/c d; ln -s /etc link; i=0; while [ $i -lt 600 ]; do "
          ": > a/b/$i; i=$((i+1)); done; : > a/b/c/x; mkfifo f; "
          "echo $$ > pid; exec sleep 1000");
    pid = number_in("work/pid");
    remove_it(ID1);
    CHECK_STR(b.err.text, "");
    CHECK(!is_alive(pid));
    CHECK(access("/etc/passwd", F_OK) == 0);
    cube_buf_printf(&path, "%s/run/%s", test_dir(), WORKER);
    CHECK_INT(rmdir(path.data), 0); /* so it was empty */
    cube_buf_free(&path);
    inspect(ID1);
    CHECK_INT(b.err.code, CUBE_ENOENT);
    remove_it(ID1);
    CHECK_STR(b.err.text, "");
    tear_down();
}

TEST(a_removal_that_was_cut_off_is_completed_by_the_next_runtime)
{
    char gone[600];

    set_up();
    start("exit 0");
    exits();
    snprintf(gone, sizeof gone, "%s/run/%s/.gone-%s-1", test_dir(), WORKER,
             ID1);
    CHECK_INT(rename(at(ID1, ""), gone), 0);
    restart();
    list();
    CHECK_UINT(b.count, 0);
    UNTIL(access(gone, F_OK) != 0);
    tear_down();
}

TEST(a_directory_removed_by_hand_is_a_process_removed_by_hand)
{
    char away[600];
    int pid;

    set_up();
    start("echo $$ > pid; exec sleep 1000");
    pid = number_in("work/pid");
    snprintf(away, sizeof away, "%s/away", test_dir());
    CHECK_INT(rename(at(ID1, ""), away), 0);
    list();
    CHECK_UINT(b.count, 0);
    UNTIL(!is_alive(pid));
    tear_down();
}

TEST(a_stop_of_what_is_removed_by_hand_meanwhile_is_answered)
{
    char away[600];

    set_up();
    start("trap '' TERM; echo 1 > ready; while :; do sleep 1000; done");
    (void)number_in("work/ready");
    snprintf(away, sizeof away, "%s/away", test_dir());
    b.answers = 0;
    b.rt->ops->stop(b.rt, ID1, 600000, on_done, NULL);
    cube_loop_turn(b.loop, 0, NULL);
    CHECK_INT(rename(at(ID1, ""), away), 0);
    b.rt->ops->list(b.rt, NULL, on_list, NULL);
    UNTIL(b.answers == 2);
    CHECK_STR(b.err.text, "");
    tear_down();
}

TEST(a_list_is_of_one_worker_or_of_all)
{
    struct cube_task *t;
    struct cube_start what = {.cluster = "", .worker = OTHER, .attempt = 7};

    set_up();
    what.task = t = shell("exit 0");
    start("exit 0");
    b.rt->ops->start(b.rt, &what, on_container, NULL);
    answered();
    cube_task_free(t);
    list();
    CHECK_UINT(b.count, 1);
    CHECK_STR(b.id, ID1);
    b.rt->ops->list(b.rt, OTHER, on_list, NULL);
    answered();
    CHECK_UINT(b.count, 1);
    CHECK_INT(b.attempt, 7);
    b.rt->ops->list(b.rt, NULL, on_list, NULL);
    answered();
    CHECK_UINT(b.count, 2);
    remove_it(TASK "-7-0");
    tear_down();
}

TEST(directories_that_make_no_sense_are_left_alone)
{
    char path[600];

    set_up();
    start("exit 0");
    CHECK_INT(mkdir(at("strange", ""), 0700), 0);
    CHECK_INT(mkdir(at("half", ""), 0700), 0);
    write_file(at("half", "spec"), "{\"Name\":");
    snprintf(path, sizeof path, "%s/run/file", test_dir());
    write_file(path, "");
    restart();
    list();
    CHECK_STR(b.err.text, "");
    CHECK_UINT(b.count, 1);
    CHECK(access(at("half", "spec"), F_OK) == 0);
    tear_down();
}

/* ---- Environment and ports ---- */

TEST(the_environment_is_the_tasks_and_what_it_cannot_know)
{
    struct cube_task *t;
    const char *text;

    set_up();
    t = shell("env | sort");
    setenv("CUBE_TEST_SECRET", "x", 1);
    cube_task_add(&t->env, "A=b c");
    cube_task_add(&t->env, "HOME=/elsewhere");
    cube_task_add(&t->env, "CUBE_TASK_ID=mine");
    start_task(t, 1);
    exits();
    text = all_log();
    CHECK_HAS(text, "A=b c\n");
    CHECK_HAS(text, "HOME=/elsewhere\n");
    CHECK_HAS(text, "CUBE_TASK_ID=" TASK "\n");
    CHECK_HAS(text, "CUBE_TASK_NAME=web\n");
    CHECK_HAS(text, "CUBE_CONTAINER_ID=" ID1 "\n");
    CHECK_HAS(text, "PATH=");
    CHECK(strstr(text, "CUBE_TEST_SECRET") == NULL);
    CHECK(strstr(text, "PORT=") == NULL);
    unsetenv("CUBE_TEST_SECRET");
    tear_down();
}

TEST(a_process_has_no_descriptor_of_the_workers)
{
    set_up();
    start("ls /proc/self/fd | tr '\\n' ' '");
    exits();
    CHECK_STR(all_log(), "0 1 2 3 "); /* 3: the directory that ls reads */
    tear_down();
}

/* A port that is free now, by asking the kernel. */
static int free_port(int *fd)
{
    struct cube_addr addr = {.kind = CUBE_ADDR_IP4};

    *fd = cube_world_real()->listen(NULL, &addr);
    cube_world_real()->local_addr(NULL, *fd, &addr);
    return addr.port;
}

TEST(ports_are_chosen_or_asked_for_and_told)
{
    struct cube_task *t;
    char wanted[16], line[64];
    int fd;

    set_up();
    t = shell("env | grep PORT | sort");
    snprintf(wanted, sizeof wanted, "%d", free_port(&fd));
    close(fd);
    cube_task_publish(t, "80/tcp", wanted);
    cube_task_expose(t, "80/tcp"); /* the same port, not a second one */
    cube_task_expose(t, "7777/tcp");
    cube_task_expose(t, "9/udp");
    start_task(t, 1);
    CHECK_STR(b.err.text, "");
    exits();
    snprintf(line, sizeof line, "CUBE_PORT_80=%s\n", wanted);
    CHECK_HAS(all_log(), line);
    CHECK_HAS(all_log(), "CUBE_PORT_7777=");
    CHECK_HAS(all_log(), "CUBE_PORT_9_UDP=");
    CHECK(atoi(strstr(all_log(), "CUBE_PORT_7777=") + 15) > 0);
    snprintf(line, sizeof line, "\nPORT=%d\n", /* the lowest: 9 */
             atoi(strstr(all_log(), "CUBE_PORT_9_UDP=") + 16));
    CHECK_HAS(all_log(), line);
    tear_down();
}

TEST(a_taken_port_is_refused_in_dockers_words)
{
    struct cube_task *t;
    char wanted[16], words[100];
    int fd;

    set_up();
    t = shell("exec sleep 1000");
    snprintf(wanted, sizeof wanted, "%d", free_port(&fd));
    snprintf(words, sizeof words,
             "Bind for 0.0.0.0:%s failed: port is already allocated", wanted);
    cube_task_publish(t, "80/tcp", wanted);
    start_task(cube_task_copy(t), 1);
    CHECK_STR(b.err.text, words);
    CHECK(!cube_runtime_is_trouble(&b.err));
    list();
    CHECK_UINT(b.count, 0);
    close(fd);
    start_task(t, 1);
    CHECK_STR(b.err.text, "");
    CHECK_STR(b.host_port, wanted);
    tear_down();
}

/* A name server asks for 53/tcp and 53/udp; the second of them was refused as
 * taken by the first. */
TEST(one_number_is_a_port_of_each_protocol)
{
    struct cube_task *t;
    char wanted[16], line[64];
    int fd;

    set_up();
    snprintf(wanted, sizeof wanted, "%d", free_port(&fd));
    close(fd);
    t = shell("env | grep PORT_53 | sort; exec sleep 1000");
    cube_task_publish(t, "53/tcp", wanted);
    cube_task_publish(t, "53/udp", wanted);
    start_task(cube_task_copy(t), 1);
    CHECK_STR(b.err.text, "");
    snprintf(line, sizeof line, "CUBE_PORT_53=%s\nCUBE_PORT_53_UDP=%s\n",
             wanted, wanted);
    UNTIL(strstr(all_log(), line) != NULL);
    snprintf(t->id, sizeof t->id, "%s", OTHER); /* both are promised */
    cube_task_publish(t, "53/tcp", "");
    start_task(t, 1);
    CHECK_INT(b.err.code, CUBE_EBUSY);
    tear_down();
}

/* "80" bound and "80/tcp" exposed were two ports, and the process was told the
 * wrong one. */
TEST(a_port_without_a_protocol_is_one_of_tcp)
{
    struct cube_task *t = NULL;
    char wanted[16], line[100], json[300];
    int fd;

    set_up();
    snprintf(wanted, sizeof wanted, "%d", free_port(&fd));
    close(fd);
    snprintf(json, sizeof json, "{\"ID\":\"" TASK "\",\"Cmd\":[\"env\"],"
             "\"PortBindings\":{\"80\":\"%s\"},"
             "\"ExposedPorts\":{\"80/tcp\":{}}}", wanted);
    CHECK_INT(cube_task_parse(json, strlen(json), true, &t, NULL), 0);
    start_task(t, 1);
    CHECK_STR(b.err.text, "");
    exits();
    snprintf(line, sizeof line, "CUBE_PORT_80=%s\n", wanted);
    CHECK_HAS(all_log(), line);
    b.rt->ops->inspect_json(b.rt, ID1, on_text, NULL);
    answered();
    snprintf(line, sizeof line, "\"Ports\":{\"80/tcp\":[{\"HostIp\":"
             "\"0.0.0.0\",\"HostPort\":\"%s\"}]}", wanted);
    CHECK_HAS(b.text.data, line);
    tear_down();
}

TEST(a_port_taken_on_ipv6_alone_is_taken)
{
    struct cube_addr addr = {.kind = CUBE_ADDR_IP6};
    struct cube_task *t;
    char wanted[16];
    int fd;

    set_up();
    fd = cube_world_real()->listen(NULL, &addr);
    if (fd < 0) {
        tear_down();
        SKIP("no IPv6 here");
    }
    cube_world_real()->local_addr(NULL, fd, &addr);
    snprintf(wanted, sizeof wanted, "%d", addr.port);
    t = shell("true");
    cube_task_publish(t, "80/tcp", wanted);
    start_task(t, 1);
    CHECK_INT(b.err.code, CUBE_EBUSY);
    close(fd);
    tear_down();
}

TEST(a_port_promised_to_a_running_process_is_taken_bound_or_not)
{
    struct cube_task *t;
    char port[16];

    set_up();
    t = shell("exec sleep 1000");
    cube_task_expose(t, "80/tcp");
    start_task(t, 1);
    snprintf(port, sizeof port, "%s", b.host_port);
    restart(); /* also by a worker that has just found it */
    t = shell("exec sleep 1000");
    snprintf(t->id, sizeof t->id, "%s", OTHER);
    cube_task_publish(t, "80/tcp", port);
    start_task(cube_task_copy(t), 1);
    CHECK_INT(b.err.code, CUBE_EBUSY);
    stop(ID1, 10000);
    start_task(t, 1);
    CHECK_STR(b.err.text, "");
    tear_down();
}

TEST(a_newer_attempt_gets_the_port_of_the_older_one)
{
    struct cube_task *t;
    char port[16];

    set_up();
    t = shell("exec sleep 1000");
    cube_task_expose(t, "80/tcp");
    start_task(cube_task_copy(t), 1);
    snprintf(port, sizeof port, "%s", b.host_port);
    cube_task_publish(t, "80/tcp", port);
    start_task(t, 2);
    CHECK_STR(b.err.text, "");
    CHECK_STR(b.host_port, port);
    tear_down();
}

/* ---- Inspection ---- */

TEST(an_inspection_has_the_shape_of_dockers)
{
    static const char *const parts[] = {
        "{\"Id\":\"" ID1 "\",\"Created\":\"2",
        "\"Path\":\"sh\",\"Args\":[\"-c\",\"exit 3\"]",
        "\"State\":{\"Status\":\"exited\",\"Running\":false,",
        "\"OOMKilled\":false", "\"ExitCode\":3", "\"FinishedAt\":\"2",
        "\"Name\":\"/web\"", "\"Cmd\":[\"sh\",\"-c\",\"exit 3\"]",
        "\"Env\":[\"A=b\"]", "\"cube.task\":\"" TASK "\"",
        "\"NetworkSettings\":{\"Ports\":{\"80/tcp\":[{\"HostIp\":\"0.0.0.0\"",
        "\"Image\":\"nginx\"", "\"ExposedPorts\":{\"80/tcp\":{}}",
    };
    struct cube_task *t;
    struct json_value_s *root;

    set_up();
    t = shell("exit 3");
    cube_task_set(&t->image, "nginx");
    cube_task_add(&t->env, "A=b");
    cube_task_expose(t, "80/tcp");
    start_task(t, 1);
    exits();
    b.rt->ops->inspect_json(b.rt, ID1, on_text, NULL);
    answered();
    for (size_t i = 0; i < COUNT(parts); i++)
        CHECK_HAS(b.text.data, parts[i]);
    root = cube_json_parse(b.text.data, b.text.len, NULL);
    CHECK(root != NULL);
    cube_json_free(root);
    b.rt->ops->inspect_json(b.rt, "unknown", on_text, NULL);
    answered();
    CHECK_INT(b.err.code, CUBE_ENOENT);
    inspect("../" ID1);
    CHECK_INT(b.err.code, CUBE_ENOENT);
    tear_down();
}

TEST(the_pid_of_an_inspection_is_the_commands)
{
    int pid;
    char line[40];

    set_up();
    start("echo $$ > pid; exec sleep 1000");
    pid = number_in("work/pid");
    b.rt->ops->inspect_json(b.rt, ID1, on_text, NULL);
    answered();
    snprintf(line, sizeof line, "\"Pid\":%d,", pid);
    CHECK_HAS(b.text.data, line);
    CHECK_HAS(b.text.data, "\"Running\":true");
    tear_down();
}

/* ---- Logs ---- */

TEST(a_tail_is_so_many_last_lines)
{
    static const struct {
        const char *log;
        int64_t tail;
        const char *want, *why;
    } rows[] = {
        {"a\nb\nc\n", -1, "a\nb\nc\n", "all"},
        {"a\nb\nc\n", 0, "", "none"},
        {"a\nb\nc\n", 1, "c\n", "the last feed begins no line"},
        {"a\nb\nc\n", 2, "b\nc\n", ""},
        {"a\nb\nc\n", 3, "a\nb\nc\n", "exactly all"},
        {"a\nb\nc\n", 99, "a\nb\nc\n", "more than there are"},
        {"a\nb\nc", 1, "c", "an unfinished line is a line"},
        {"a\n\n\n", 2, "\n\n", "empty lines count"},
        {"", 5, "", "nothing"},
    };

    set_up();
    start("exit 0");
    exits();
    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_logs_options options = {.tail = rows[i].tail};

        test_row("row %zu: %s", i, rows[i].why);
        write_file(at(ID1, "log"), rows[i].log);
        CHECK_STR(log_text(&options), rows[i].want);
    }
    tear_down();
}

TEST(a_tail_reaches_back_into_full_logs)
{
    static const struct {
        int64_t tail;
        const char *want;
    } rows[] = {
        {-1, "ow\nthree\nfour\nfive\nsix\n"}, {2, "five\nsix\n"},
        {3, "four\nfive\nsix\n"}, {5, "ow\nthree\nfour\nfive\nsix\n"},
        {4, "three\nfour\nfive\nsix\n"}, {99, "ow\nthree\nfour\nfive\nsix\n"},
    };

    set_up();
    start("exit 0");
    exits();
    write_file(at(ID1, "log.7"), "ow\nthree\nfo"); /* cut anywhere */
    write_file(at(ID1, "log.8"), "ur\n");
    write_file(at(ID1, "log"), "five\nsix\n");
    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_logs_options options = {.tail = rows[i].tail};

        test_row("tail %lld", (long long)rows[i].tail);
        CHECK_STR(log_text(&options), rows[i].want);
    }
    tear_down();
}

TEST(a_long_log_comes_whole_and_its_tail_from_far_back)
{
    struct cube_logs_options options = {.tail = 300000};
    const char *text;

    set_up();
    start("i=0; while [ $i -lt 4 ]; do seq 100000; i=$((i+1)); done");
    exits();
    all_log();
    CHECK_UINT(b.text.len, 4 * 588895);
    text = log_text(&options);
    CHECK_UINT(b.text.len, 3 * 588895);
    CHECK(strncmp(text, "1\n2\n", 4) == 0);
    tear_down();
}

TEST(a_follower_gets_what_comes_and_ends_with_the_process)
{
    struct cube_logs_options follow = {.is_following = true, .tail = -1};

    set_up();
    start("echo one; until [ -e go ]; do sleep 0.01; done; echo two");
    b.rt->ops->logs(b.rt, ID1, &follow, on_data, on_log_end, NULL);
    UNTIL(b.text.data && strcmp(b.text.data, "one\n") == 0);
    CHECK_INT(b.log_ends, 0);
    write_file(at(ID1, "work/go"), "");
    UNTIL(b.log_ends == 1);
    CHECK_STR(b.text.data, "one\ntwo\n");
    CHECK_STR(b.err.text, "");
    tear_down();
}

TEST(a_follower_misses_nothing_when_logs_rotate)
{
    struct cube_logs_options follow = {.is_following = true, .tail = 0};
    char want[20];
    FILE *f;

    set_up();
    start("exec sleep 1000");
    b.rt->ops->logs(b.rt, ID1, &follow, on_data, on_log_end, NULL);
    cube_loop_turn(b.loop, 0, NULL);
    for (int i = 1; i <= 9; i++) { /* as the supervisor would */
        char name[20];

        f = fopen(at(ID1, "log"), "a");
        REQUIRE(f != NULL);
        fprintf(f, "%d", i);
        fclose(f);
        if (i % 3 == 0)
            UNTIL(b.text.len == (size_t)i);
        snprintf(name, sizeof name, "log.%d", i);
        CHECK_INT(rename(at(ID1, "log"), at(ID1, name)), 0);
    }
    write_file(at(ID1, "log"), "!");
    stop(ID1, 10000);
    UNTIL(b.log_ends == 1);
    snprintf(want, sizeof want, "123456789!");
    CHECK_STR(b.text.data, want);
    tear_down();
}

static struct cube_logs *to_cancel;

static void on_data_cancel(void *arg, const char *p, size_t len)
{
    on_data(arg, p, len);
    b.rt->ops->logs_cancel(b.rt, to_cancel);
}

static struct cube_logs *slow; /* that is held at each piece */

static void on_data_hold(void *arg, const char *p, size_t len)
{
    on_data(arg, p, len);
    b.rt->ops->logs_hold(b.rt, slow, true);
}

/* Its reader is slow: 4 MB wait in their file until they are wanted, and then
 * come whole. */
TEST(a_log_that_is_held_waits)
{
    static const struct cube_logs_options all = {.tail = -1};
    size_t len = 0;

    set_up();
    start("head -c 4000000 /dev/zero | tr '\\0' x");
    exits();
    slow = b.rt->ops->logs(b.rt, ID1, &all, on_data_hold, on_log_end, NULL);
    UNTIL(b.text.len > 0);
    do {
        len = b.text.len;
        for (int i = 0; i < 10; i++)
            cube_loop_turn(b.loop, 0, NULL);
        CHECK_UINT(b.text.len, len);
        b.rt->ops->logs_hold(b.rt, slow, false);
        UNTIL(b.text.len > len || b.log_ends > 0);
    } while (b.text.len > len && b.log_ends == 0);
    CHECK_UINT(b.text.len, 4000000);
    CHECK_INT(b.log_ends, 1);
    tear_down();
}

TEST(a_cancelled_log_says_no_more)
{
    struct cube_logs_options follow = {.is_following = true, .tail = -1};
    struct cube_logs *logs;

    set_up();
    start("echo one; echo 1 > ready; exec sleep 1000");
    (void)number_in("work/ready");
    logs = b.rt->ops->logs(b.rt, ID1, &follow, on_data, on_log_end, NULL);
    b.rt->ops->logs_cancel(b.rt, logs);
    to_cancel = b.rt->ops->logs(b.rt, ID1, &follow, on_data_cancel,
                                on_log_end, NULL);
    UNTIL(b.text.len > 0);
    stop(ID1, 10000);
    for (int i = 0; i < 3; i++)
        cube_loop_turn(b.loop, 10, NULL);
    CHECK_STR(b.text.data, "one\n");
    CHECK_INT(b.log_ends, 0);
    b.rt->ops->logs(b.rt, "unknown", &follow, on_data, on_log_end, NULL);
    UNTIL(b.log_ends == 1);
    CHECK_INT(b.err.code, CUBE_ENOENT);
    tear_down();
}

/* ---- Limits ---- */

#define EATER "exec awk 'BEGIN { s = \"x\"; while (length(s) < 1e9) s = s s }'"

static bool has_cgroups(void)
{
    return strstr(b.rt->words, "memory and CPU limited by cgroup") != NULL;
}

TEST(memory_beyond_the_limit_ends_a_process_and_is_told_as_such)
{
    struct cube_task *t;

    set_up();
    t = shell(EATER);
    t->mem_bytes = 32 << 20;
    start_task(t, 1);
    exits();
    CHECK(b.exit_code != 0);
    if (has_cgroups()) {
        CHECK_INT(b.exit_code, 137);
        CHECK(b.is_oom);
    }
    tear_down();
}

TEST(a_cgroup_holds_the_limits_and_goes_with_its_process)
{
    struct cube_task *t;
    char path[300];

    set_up();
    t = shell("cat /proc/self/cgroup; exec sleep 1000");
    if (!has_cgroups() || strstr(b.rt->words, "(version 1)") == NULL) {
        cube_task_free(t);
        tear_down();
        SKIP("no right to make a cgroup (version 1)");
    }
    t->mem_bytes = 64 << 20;
    t->cpu = 0.5;
    start_task(t, 1);
    snprintf(path, sizeof path,
             CUBE_PROCESS_CGROUPS "/memory/cube/%s/memory.limit_in_bytes",
             ID1);
    CHECK_STR(file_text(path), "67108864\n");
    snprintf(path, sizeof path,
             CUBE_PROCESS_CGROUPS "/cpu/cube/%s/cpu.cfs_quota_us", ID1);
    CHECK_STR(file_text(path), "50000\n");
    UNTIL(strstr(all_log(), ":memory:/cube/" ID1) != NULL);
    CHECK_HAS(all_log(), ":cpu:/cube/" ID1);
    b.rt->ops->inspect_json(b.rt, ID1, on_text, NULL);
    answered();
    CHECK_HAS(b.text.data, "\"Limits\":\"memory by cgroup (version 1), CPU "
                           "by cgroup (version 1)\"");
    CHECK_HAS(b.text.data, "\"Memory\":67108864,\"NanoCpus\":500000000");
    stop(ID1, 10000);
    *strrchr(path, '/') = 0;
    CHECK(access(path, F_OK) != 0);
    tear_down();
}

TEST(a_cgroup_whose_supervisor_was_killed_goes_with_the_removal)
{
    struct cube_task *t;
    char path[300];

    set_up();
    if (!has_cgroups() || strstr(b.rt->words, "(version 1)") == NULL) {
        tear_down();
        SKIP("no right to make a cgroup (version 1)");
    }
    t = shell("exec sleep 1000");
    t->mem_bytes = 64 << 20;
    start_task(t, 1);
    snprintf(path, sizeof path, CUBE_PROCESS_CGROUPS "/memory/cube/%s", ID1);
    CHECK(access(path, F_OK) == 0);
    CHECK_INT(kill(supervisor(ID1), SIGKILL), 0);
    exits();
    remove_it(ID1);
    CHECK(access(path, F_OK) != 0);
    tear_down();
}

/* A machine with version 2: the kernel's part of it is played here, where a
 * new directory has its files at once. */
static char fake_root[300];

static int fake_mkdir(void *ctx, const char *path)
{
    static const char *const files[] = {"memory.max", "memory.swap.max",
                                        "cpu.max", "cgroup.procs",
                                        "cgroup.subtree_control"};
    int r = cube_world_real()->mkdir(ctx, path);
    char file[500];

    if (r == 0 && strncmp(path, fake_root, strlen(fake_root)) == 0) {
        for (size_t i = 0; i < COUNT(files); i++) {
            snprintf(file, sizeof file, "%s/%s", path, files[i]);
            write_file(file, "");
        }
    }
    return r;
}

/* What is written to a subtree_control is done as a whole or not at all, and
 * read back as the list of what is passed down. */
static int64_t fake_pwrite(void *ctx, int fd, const void *buf, size_t len,
                           int64_t at)
{
    char link[64], path[500] = "", words[100], line[400];
    const char *all;

    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (readlink(link, path, sizeof path - 1) < 0 ||
        !strstr(path, "cgroup.subtree_control"))
        return cube_world_real()->pwrite(ctx, fd, buf, len, at);
    snprintf(line, sizeof line, "%s/cgroup.controllers", fake_root);
    all = file_text(line);
    snprintf(words, sizeof words, "%.*s", (int)len, (const char *)buf);
    for (char *word = strtok(words, " "); word; word = strtok(NULL, " ")) {
        snprintf(line, sizeof line, " %s ", word + 1);
        if (!strstr(all, line))
            return -ENOENT;
    }
    snprintf(line, sizeof line, "%s", file_text(path));
    for (const char *p = buf; p < (const char *)buf + len; p++) {
        if (*p != '+')
            snprintf(line + strlen(line), 2, "%c", *p);
    }
    strcat(line, " ");
    write_file(path, line);
    return (int64_t)len;
}

/* A runtime on a machine with these controllers. */
static void open_version_2(struct cube_world *w, const char *controllers)
{
    char path[500];

    *w = *cube_world_real();
    snprintf(fake_root, sizeof fake_root, "%s/cgroup", test_dir());
    (void)mkdir(fake_root, 0700);
    snprintf(path, sizeof path, "%s/cgroup.controllers", fake_root);
    write_file(path, controllers);
    snprintf(path, sizeof path, "%s/cgroup.subtree_control", fake_root);
    write_file(path, "cpuset ");
    snprintf(path, sizeof path, "%s/cube", fake_root); /* of the last row */
    (void)nftw(path, test_remove_one, 16, FTW_DEPTH | FTW_PHYS);
    w->mkdir = fake_mkdir;
    w->pwrite = fake_pwrite;
    cube_runtime_free(b.rt);
    cube_loop_free(b.loop);
    b.loop = cube_loop_new(w, NULL);
    b.rt = cube_process_open(b.loop, test_dir(), fake_root, NULL);
    REQUIRE(b.rt != NULL);
}

TEST(version_2_of_cgroups_has_one_directory_for_both_limits)
{
    struct cube_world w;
    struct cube_task *t;
    char path[500];

    set_up();
    t = shell("exec sleep 1000");
    open_version_2(&w, " cpuset cpu io memory pids ");
    CHECK_HAS(b.rt->words, "memory and CPU limited by cgroup (version 2)");
    snprintf(path, sizeof path, "%s/cgroup.subtree_control", fake_root);
    CHECK_STR(file_text(path), "cpuset memory cpu ");
    t->mem_bytes = 64 << 20;
    t->cpu = 1.25;
    start_task(t, 1);
    CHECK_STR(b.err.text, "");
    snprintf(path, sizeof path, "%s/cube/%s/memory.max", fake_root, ID1);
    CHECK_STR(file_text(path), "67108864");
    snprintf(path, sizeof path, "%s/cube/%s/memory.swap.max", fake_root, ID1);
    CHECK_STR(file_text(path), "0");
    snprintf(path, sizeof path, "%s/cube/%s/cpu.max", fake_root, ID1);
    CHECK_STR(file_text(path), "125000 100000");
    snprintf(path, sizeof path, "%s/cube/%s/cgroup.procs", fake_root, ID1);
    CHECK_STR(file_text(path), "0"); /* the command joined before it ran */
    snprintf(path, sizeof path, "%s/cube/%s/memory.events", fake_root, ID1);
    write_file(path, "low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\n");
    b.rt->ops->kill(b.rt, ID1, on_done, NULL);
    answered();
    inspect(ID1);
    CHECK(b.is_oom);
    tear_down();
}

/* A kernel with real-time groups, say, passes no CPU down. Memory was then not
 * limited by cgroup either, since both were asked for in one write; and a
 * "cpuset" was taken for a "cpu". */
TEST(one_controller_of_version_2_does_not_need_the_other)
{
    static const struct {
        const char *controllers, *want;
    } rows[] = {
        {" cpuset memory pids ", "memory limited by cgroup, CPU not limited"},
        {" cpuset cpu pids ", "memory limited by rlimit, CPU by cgroup"},
        {" cpuset pids ", "memory limited by rlimit, CPU not limited"},
    };
    struct cube_world w;

    set_up();
    for (size_t i = 0; i < COUNT(rows); i++) {
        test_row("%s", rows[i].controllers);
        open_version_2(&w, rows[i].controllers);
        CHECK_HAS(b.rt->words, rows[i].want);
    }
    tear_down();
}

/* The tasks of the other one had no limit then, but for an rlimit. */
TEST(a_worker_that_ends_takes_no_cgroups_from_another)
{
    struct cube_world w;
    struct cube_task *t;
    char path[500];

    for (int version = 1; version <= 2; version++) {
        test_row("version %d", version);
        set_up();
        if (version == 2)
            open_version_2(&w, " cpu memory ");
        if (!strstr(b.rt->words, version == 1 ? "(version 1)"
                                              : "(version 2)")) {
            tear_down();
            continue; /* no right to make one here */
        }
        snprintf(path, sizeof path, "%s/cube", fake_root);
        if (version == 2) /* as the other one's rmdir does */
            (void)nftw(path, test_remove_one, 16, FTW_DEPTH | FTW_PHYS);
        else
            cube_runtime_free(cube_process_new(b.loop, test_dir(), NULL));
        t = shell("exec sleep 1000");
        t->mem_bytes = 64 << 20;
        t->cpu = 0.5;
        start_task(t, 1);
        CHECK_STR(b.err.text, "");
        b.rt->ops->inspect_json(b.rt, ID1, on_text, NULL);
        answered();
        CHECK_HAS(b.text.data, version == 1
                      ? "\"Limits\":\"memory by cgroup (version 1), CPU by "
                        "cgroup (version 1)\""
                      : "\"Limits\":\"memory by cgroup (version 2), CPU by "
                        "cgroup (version 2)\"");
        tear_down();
    }
}

TEST(without_cgroups_memory_is_limited_by_rlimit_and_that_is_said)
{
    struct cube_task *t;
    char none[300];

    set_up();
    t = shell("ulimit -d; " EATER);
    cube_runtime_free(b.rt);
    snprintf(none, sizeof none, "%s/none", test_dir());
    b.rt = cube_process_open(b.loop, test_dir(), none, NULL);
    REQUIRE(b.rt != NULL);
    CHECK_HAS(b.rt->words, "memory limited by rlimit, CPU not limited");
    t->mem_bytes = 64 << 20;
    t->cpu = 1;
    start_task(t, 1);
    exits();
    CHECK(b.exit_code != 0);
    CHECK_HAS(all_log(), "65536\n");
    b.rt->ops->inspect_json(b.rt, ID1, on_text, NULL);
    answered();
    CHECK_HAS(b.text.data, "\"Limits\":\"memory by rlimit, CPU not limited\"");
    tear_down();
}

/* ---- Trouble ---- */

/* Counts what the loop gets to do between starts. */
static int spawns, most_spawns;

static int counted_spawn(void *ctx, const struct cube_spawn *spec)
{
    if (++spawns > most_spawns)
        most_spawns = spawns;
    return cube_world_real()->spawn(ctx, spec);
}

static int counted_poll_wait(void *ctx, struct cube_poll *p,
                             struct cube_ready *out, int max, int timeout_ms)
{
    spawns = 0;
    return cube_world_real()->poll_wait(ctx, p, out, max, timeout_ms);
}

TEST(of_many_starts_at_once_each_has_a_turn_of_its_own)
{
    struct cube_world w = *cube_world_real();
    struct cube_task *t;

    set_up();
    cube_runtime_free(b.rt);
    cube_loop_free(b.loop);
    w.spawn = counted_spawn;
    w.poll_wait = counted_poll_wait;
    most_spawns = 0;
    b.loop = cube_loop_new(&w, NULL);
    open_runtime();
    for (int i = 0; i < 5; i++) {
        t = shell("exit 0");
        t->id[0] = (char)('a' + i);
        begin_start(t, 1);
        cube_task_free(t);
    }
    UNTIL(b.answers == 5);
    CHECK_INT(most_spawns, 1);
    tear_down();
}

static int no_pid_open(void *ctx, int pid)
{
    (void)ctx;
    (void)pid;
    return -ENOSYS;
}

TEST(a_kernel_without_pidfds_is_refused_in_words)
{
    struct cube_world w = *cube_world_real();
    struct cube_loop *l;
    struct cube_err err;

    w.pid_open = no_pid_open;
    l = cube_loop_new(&w, NULL);
    CHECK(cube_process_new(l, test_dir(), &err) == NULL);
    CHECK_HAS(err.text, "Linux has it from 5.3 on");
    cube_loop_free(l);
}

/* A world whose files cannot be opened: no descriptor is left. */
static bool is_starved, is_lock_hidden;

static int starved_open(void *ctx, const char *path, unsigned flags)
{
    return is_starved ? -EMFILE : cube_world_real()->open(ctx, path, flags);
}

static int starved_lock_owner(void *ctx, const char *path)
{
    return is_starved || is_lock_hidden
               ? -EMFILE
               : cube_world_real()->lock_owner(ctx, path);
}

/* The same directory with another world under it. */
static void reopen_in(const struct cube_world *w)
{
    cube_runtime_free(b.rt);
    cube_loop_free(b.loop);
    b.loop = cube_loop_new(w, NULL);
    REQUIRE(b.loop != NULL);
    open_runtime();
}

TEST(a_process_that_cannot_be_looked_at_counts_as_running_not_as_lost)
{
    struct cube_world w = *cube_world_real();
    int pid;

    set_up();
    start("echo $$ > pid; exec sleep 1000");
    pid = number_in("work/pid");
    w.open = starved_open;
    w.lock_owner = starved_lock_owner;
    reopen_in(&w);
    is_starved = true;
    list();
    CHECK(cube_runtime_is_trouble(&b.err)); /* it is not known: not "none" */
    is_starved = false;
    list();
    CHECK_UINT(b.count, 1);
    is_starved = true;
    inspect(ID1);
    CHECK_INT(b.state, CUBE_BOX_RUNNING);
    is_starved = false;
    reopen_in(&w); /* now all can be read, only the lock cannot be seen */
    is_lock_hidden = true;
    inspect(ID1);
    CHECK_INT(b.state, CUBE_BOX_RUNNING);
    is_lock_hidden = false;
    CHECK(is_alive(pid));
    tear_down();
}

/* A world in which the PID of the lock's owner is, for a moment, that of a
 * bystander: the supervisor has ended and its PID was used again. */
static int bystander;

static int stale_lock_owner(void *ctx, const char *path)
{
    int pid = bystander;

    bystander = 0;
    return pid > 0 ? pid : cube_world_real()->lock_owner(ctx, path);
}

TEST(a_reused_pid_is_neither_watched_nor_killed)
{
    struct cube_world w = *cube_world_real();
    int innocent, status;

    set_up();
    start("exec sleep 1000");
    innocent = fork();
    if (innocent == 0) {
        pause();
        _exit(0);
    }
    w.lock_owner = stale_lock_owner;
    reopen_in(&w);
    bystander = innocent;
    list();
    CHECK_INT(b.state, CUBE_BOX_RUNNING);
    CHECK_INT(bystander, 0);
    stop(ID1, 10000);
    CHECK_STR(b.err.text, "");
    CHECK_INT(waitpid(innocent, &status, WNOHANG), 0); /* it still runs */
    CHECK_INT(kill(innocent, SIGKILL), 0);
    CHECK_INT(waitpid(innocent, &status, 0), innocent);
    tear_down();
}

/* A world in which the log gets its number just before it is opened. */
static bool is_turning;

static int turning_open(void *ctx, const char *path, unsigned flags)
{
    size_t len = strlen(path);

    if (is_turning && len > 4 && strcmp(path + len - 4, "/log") == 0) {
        is_turning = false;
        CHECK_INT(rename(path, at(ID1, "log.1")), 0);
        write_file(path, "two\n");
    }
    return cube_world_real()->open(ctx, path, flags);
}

TEST(a_log_that_turns_while_it_is_opened_is_read_in_order)
{
    struct cube_world w = *cube_world_real();

    set_up();
    start("echo one");
    exits();
    w.open = turning_open;
    reopen_in(&w);
    is_turning = true;
    CHECK_STR(all_log(), "one\ntwo\n");
    CHECK(!is_turning);
    tear_down();
}

/* A supervisor that has reported may need a moment more to be gone. */
static void unmount(const char *disk)
{
    int64_t until = cube_world_real()->now_ms(NULL) + 10000;

    while (umount(disk) < 0 && cube_world_real()->now_ms(NULL) < until)
        sched_yield();
    CHECK(umount(disk) < 0 && errno == EINVAL); /* not mounted any more */
}

TEST(a_full_disk_at_the_start_is_an_error_in_words)
{
    char disk[300], ballast[400];
    int fd, left;

    set_up();
    cube_runtime_free(b.rt);
    snprintf(disk, sizeof disk, "%s/disk", test_dir());
    REQUIRE(mkdir(disk, 0700) == 0);
    if (mount("cube", disk, "tmpfs", 0, "size=64k") < 0) {
        cube_loop_free(b.loop);
        SKIP("no right to mount a file system");
    }
    b.rt = cube_process_new(b.loop, disk, NULL);
    REQUIRE(b.rt != NULL);
    snprintf(ballast, sizeof ballast, "%s/ballast", disk);
    fd = open(ballast, O_WRONLY | O_CREAT, 0600);
    for (left = 64; left > 0 && write(fd, disk, 256) > 0;)
        continue;
    close(fd);
    start_task(shell("true"), 1);
    CHECK_INT(b.err.code, CUBE_ENOSPC);
    CHECK(!cube_runtime_is_trouble(&b.err));
    list();
    CHECK_UINT(b.count, 0);
    CHECK_INT(unlink(ballast), 0);
    start_task(shell("true"), 1);
    CHECK_STR(b.err.text, "");
    tear_down();
    unmount(disk);
}
