/*
 * Chapter 13, Client: each call against a server on the same loop, which
 * answers as the test's table says; refusals, silence and broken streams.
 */
#include "test.h"

/* ---- One loop, a server and a client on it ---- */

static struct cube_world world;
static struct cube_loop *loop;
static struct cube_http_server *server;
static struct cube_client *client;
static struct cube_err err;

static int answer_status;
static const char *answer_body;   /* NULL: never answers */
static size_t piece;              /* bytes a write of a stream */
static bool is_cut;               /* a stream ends without its end */
static char asked[300];           /* "METHOD target-as-decoded" of the last */
static char asked_body[2000];

static int64_t clock_moved_ms;

static int64_t moved_now_ms(void *ctx)
{
    return cube_world_real()->now_ms(ctx) + clock_moved_ms;
}

static void note(struct cube_http_req *req)
{
    const char *after = cube_http_query(req, "after");
    const char *forget = cube_http_query(req, "forget");
    const char *tail = cube_http_query(req, "tail");
    const char *follow = cube_http_query(req, "follow");
    size_t len;
    const char *body = cube_http_body(req, &len);

    snprintf(asked, sizeof asked, "%s %s%s%s%s%s%s%s%s", cube_http_method(req),
             cube_http_path(req), after ? " after=" : "", after ? after : "",
             forget ? " forget" : "", tail ? " tail=" : "", tail ? tail : "",
             follow ? " follow=" : "", follow ? follow : "");
    snprintf(asked_body, sizeof asked_body, "%.*s", (int)len, body);
}

static void on_gone(void *arg)
{
    (void)arg;
}

static void do_answer(void *arg, struct cube_http_req *req)
{
    (void)arg;
    note(req);
    cube_http_on_gone(req, on_gone, NULL);
    if (!answer_body)
        return;
    cube_http_reply(req, answer_status, "application/json", answer_body,
                    strlen(answer_body));
}

static void do_stream(void *arg, struct cube_http_req *req)
{
    size_t len = answer_body ? strlen(answer_body) : 0;

    (void)arg;
    note(req);
    if (answer_status != 200) {
        cube_http_reply_error(req, answer_status, "no stream");
        return;
    }
    cube_http_on_gone(req, on_gone, NULL);
    cube_http_stream(req, 200, "application/x-ndjson");
    for (size_t i = 0; i < len; i += piece)
        cube_http_stream_write(req, answer_body + i,
                               len - i < piece ? len - i : piece);
    if (is_cut)
        cube_http_stream_abort(req);
    else if (answer_body)
        cube_http_stream_end(req);
}

static void open_all(int status, const char *body)
{
    static const struct cube_http_route routes[] = {
        {"GET", "/events", do_stream},
        {"GET", "/tasks/{id}/logs", do_stream},
        {"GET", "/tasks", do_answer},
        {"POST", "/tasks", do_answer},
        {"GET", "/nodes", do_answer},
        {"DELETE", "/tasks/{id}", do_answer},
        {"DELETE", "/nodes/{id}", do_answer},
        {"GET", "/tasks/{id}/inspect", do_answer},
        {NULL, NULL, NULL}};
    struct cube_http_options options = {.tokens = {"secret", NULL}};
    char where[100];

    world = *cube_world_real();
    world.now_ms = moved_now_ms;
    clock_moved_ms = 0;
    answer_status = status;
    answer_body = body;
    piece = 1000;
    is_cut = false;
    loop = cube_loop_new(&world, &err);
    REQUIRE(loop);
    server = cube_http_listen(loop, "127.0.0.1:0", routes, NULL, &options,
                              &err);
    REQUIRE(server);
    snprintf(where, sizeof where, "127.0.0.1:%d", cube_http_port(server));
    client = cube_client_new(loop, where, "secret", &err);
    REQUIRE(client);
}

static void close_all(void)
{
    cube_client_free(client);
    cube_http_close(server);
    cube_loop_free(loop);
}

/* ---- Tests ---- */

TEST(an_address_is_a_host_and_a_port_or_a_url)
{
    static const struct {
        const char *where;
        bool is_right;
    } rows[] = {{"localhost:5555", true},        {"127.0.0.1:1", true},
                {"[::1]:5555", true},            {"http://h:1", true},
                {"http://h:1/", true},           {"unix:///run/x", true},
                {"", false},                     {"host", false},
                {"host:port", false},            {"host:70000", false},
                {"https://h:1", CUBE_WITH_CURL}};

    loop = cube_loop_new(cube_world_real(), &err);
    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_client *c = cube_client_new(loop, rows[i].where, NULL,
                                                &err);

        test_row("address \"%s\"", rows[i].where);
        CHECK_INT(c != NULL, rows[i].is_right);
        if (!c)
            CHECK_INT(err.code, CUBE_EINVAL);
        cube_client_free(c);
    }
    cube_loop_free(loop);
    cube_client_free(NULL);
}

TEST(tasks_come_as_records_in_the_order_of_the_manager)
{
    struct cube_task_list l;

    open_all(200, "[{\"Name\":\"b\",\"State\":2},{\"Name\":\"a\","
                  "\"Unknown\":[1]}]");
    CHECK_INT(cube_client_tasks(client, &l, &err), 0);
    CHECK_STR(asked, "GET /tasks");
    CHECK_UINT(l.count, 2);
    CHECK_STR(l.list[0]->name, "b");
    CHECK_INT(l.list[0]->state, CUBE_RUNNING);
    CHECK_STR(l.list[1]->name, "a");
    cube_task_list_free(&l);
    CHECK_UINT(l.count, 0);
    close_all();
}

TEST(lists_can_be_empty_or_null)
{
    static const char *const bodies[] = {"[]", "null", " [ ] \n"};

    for (size_t i = 0; i < COUNT(bodies); i++) {
        struct cube_task_list tasks;
        struct cube_node_list nodes;

        test_row("body %s", bodies[i]);
        open_all(200, bodies[i]);
        CHECK_INT(cube_client_tasks(client, &tasks, &err), 0);
        CHECK_UINT(tasks.count, 0);
        CHECK_INT(cube_client_nodes(client, &nodes, &err), 0);
        CHECK_UINT(nodes.count, 0);
        cube_task_list_free(&tasks);
        cube_node_list_free(&nodes);
        close_all();
    }
}

TEST(what_no_manager_would_answer_is_an_error_and_leaves_nothing)
{
    static const char *const bodies[] = {
        "", "{", "{}", "7", "<html>", "[1]", "[{\"Name\":\"a\"},{\"State\":9}]",
        "[{\"State\":\"x\"}]"};

    for (size_t i = 0; i < COUNT(bodies); i++) {
        struct cube_task_list l;

        test_row("body %s", bodies[i]);
        open_all(200, bodies[i]);
        CHECK_INT(cube_client_tasks(client, &l, &err), -1);
        CHECK_INT(err.code, CUBE_EPROTO);
        CHECK_HAS(err.text, "/tasks");
        CHECK(!l.list && l.count == 0);
        close_all();
    }
}

TEST(a_node_keeps_its_own_text)
{
    static const char one[] =
        "{\"Name\":\"a\\\"]}:1\",\"Api\":\"http://a:1\",\"Memory\":2048,"
        "\"Disk\":5,\"Role\":\"worker\",\"TaskCount\":3,\"State\":\"up\","
        "\"Stats\":{\"CpuUse\":0.5,\"Runtime\":\"process\"}}";
    struct cube_node_list l;
    char body[600];

    snprintf(body, sizeof body, " [%s , {\"Name\":\"old\"}]", one);
    open_all(200, body);
    CHECK_INT(cube_client_nodes(client, &l, &err), 0);
    CHECK_UINT(l.count, 2);
    CHECK_STR(l.list[0].json, one);
    CHECK_STR(l.list[0].name, "a\"]}:1");
    CHECK_INT(l.list[0].mem_kb, 2048);
    CHECK_INT(l.list[0].disk_bytes, 5);
    CHECK_INT(l.list[0].task_count, 3);
    CHECK_STR(l.list[0].runtime, "process");
    CHECK(l.list[0].cpu_use > 0.49 && l.list[0].cpu_use < 0.51);
    CHECK_STR(l.list[1].json, "{\"Name\":\"old\"}");
    CHECK_STR(l.list[1].state, "");
    CHECK(l.list[1].cpu_use < 0);
    cube_node_list_free(&l);
    close_all();
}

TEST(a_refusal_has_a_kind_and_the_words_of_the_manager)
{
    static const struct {
        int status;
        enum cube_code code;
    } rows[] = {{400, CUBE_EINVAL}, {401, CUBE_EACCES}, {403, CUBE_EACCES},
                {404, CUBE_ENOENT}, {409, CUBE_EEXIST}, {500, CUBE_EPROTO},
                {429, CUBE_EBUSY},
                {503, CUBE_ESYNC},  {507, CUBE_ENOSPC}, {302, CUBE_EPROTO}};

    for (size_t i = 0; i < COUNT(rows); i++) {
        test_row("status %d", rows[i].status);
        open_all(rows[i].status,
                 "{\"HTTPStatusCode\":1,\"Message\":\"not so\"}");
        CHECK_INT(cube_client_stop(client, "x", &err), -1);
        CHECK_INT(err.code, rows[i].code);
        CHECK_HAS(err.text, "not so");
        close_all();
    }
    open_all(404, "");
    CHECK_INT(cube_client_stop(client, "x", &err), -1);
    CHECK_HAS(err.text, "404");
    close_all();
}

TEST(requests_about_one_thing_name_it)
{
    struct cube_buf json = {NULL, 0, 0};

    open_all(200, "{\"Id\":1}");
    CHECK_INT(cube_client_stop(client, "id", &err), 0);
    CHECK_STR(asked, "DELETE /tasks/id");
    CHECK_INT(cube_client_remove(client, "id", &err), 0);
    CHECK_STR(asked, "DELETE /tasks/id forget");
    CHECK_INT(cube_client_node_remove(client, "a/b?c", &err), 0);
    CHECK_STR(asked, "DELETE /nodes/a%2fb%3fc");
    CHECK_INT(cube_client_inspect(client, "id", &json, &err), 0);
    CHECK_STR(asked, "GET /tasks/id/inspect");
    CHECK_STR(json.data, "{\"Id\":1}");
    cube_buf_free(&json);
    close_all();
}

TEST(a_submitted_event_comes_back_as_the_accepted_task)
{
    struct cube_event *e = cube_event_new();
    struct cube_task *t = NULL;

    e->state = CUBE_RUNNING;
    e->task = cube_task_new();
    cube_task_set(&e->task->name, "web");
    open_all(201, "{\"Name\":\"web\",\"State\":1}");
    CHECK_INT(cube_client_submit(client, e, &t, &err), 0);
    CHECK_STR(asked, "POST /tasks");
    CHECK_HAS(asked_body, "\"State\":2");
    CHECK_HAS(asked_body, "\"Name\":\"web\"");
    REQUIRE(t);
    CHECK_INT(t->state, CUBE_SCHEDULED);
    cube_task_free(t);
    CHECK_INT(cube_client_submit(client, e, NULL, &err), 0);
    answer_body = "well done";
    CHECK_INT(cube_client_submit(client, e, &t, &err), -1);
    CHECK_INT(err.code, CUBE_EPROTO);
    cube_event_free(e);
    close_all();
}

TEST(nobody_there_is_told_apart_from_no)
{
    struct cube_task_list l;

    open_all(200, "[]");
    cube_http_close(server);
    server = NULL;
    CHECK_INT(cube_client_tasks(client, &l, &err), -1);
    CHECK_INT(err.code, CUBE_ECONN);
    CHECK(err.text[0]);
    close_all();
}

static void skip_a_minute(void *arg)
{
    (void)arg;
    clock_moved_ms += 60000;
}

TEST(a_manager_that_never_answers_is_given_up)
{
    struct cube_task_list l;
    struct cube_timer timer = {0, 0, 0, NULL, NULL};

    open_all(200, NULL);
    cube_timer_set(loop, &timer, 50, skip_a_minute, NULL);
    CHECK_INT(cube_client_tasks(client, &l, &err), -1);
    CHECK_INT(err.code, CUBE_ETIMEOUT);
    close_all();
}

/* ---- Streams ---- */

static struct cube_buf seen;
static int wanted_calls; /* so many calls, then enough; 0: all */

static bool on_data(void *arg, const char *data, size_t len)
{
    (void)arg;
    cube_buf_add(&seen, data, len);
    return --wanted_calls != 0;
}

TEST(logs_arrive_as_they_are_and_end)
{
    open_all(200, "one\ntwo\n");
    piece = 3;
    CHECK_INT(cube_client_logs(client, "id", false, -1, on_data, NULL, &err),
              0);
    CHECK_STR(asked, "GET /tasks/id/logs follow=0");
    CHECK_STR(seen.data, "one\ntwo\n");
    cube_buf_free(&seen);
    CHECK_INT(cube_client_logs(client, "id", true, 5, on_data, NULL, &err),
              0);
    CHECK_STR(asked, "GET /tasks/id/logs tail=5 follow=1");
    cube_buf_free(&seen);
    close_all();
}

TEST(logs_that_are_cut_off_are_an_error)
{
    open_all(200, "one\n");
    is_cut = true;
    CHECK_INT(cube_client_logs(client, "id", false, -1, on_data, NULL, &err),
              -1);
    CHECK_INT(err.code, CUBE_ECONN);
    cube_buf_free(&seen);
    answer_status = 404;
    CHECK_INT(cube_client_logs(client, "id", false, -1, on_data, NULL, &err),
              -1);
    CHECK_INT(err.code, CUBE_ENOENT);
    CHECK_HAS(err.text, "no stream");
    CHECK(!seen.data);
    close_all();
}

static bool on_notice(void *arg, const struct cube_notice *n)
{
    static const char *const names[] = {"hello", "reset", "listed", "task",
                                        "gone",  "node",  "beat"};

    (void)arg;
    cube_buf_printf(&seen, "%s[%s]", names[n->type],
                    n->cursor ? n->cursor : "");
    if (n->type == CUBE_NOTICE_TASK)
        cube_buf_printf(&seen, "%s", n->task->name);
    if (n->type == CUBE_NOTICE_GONE)
        cube_buf_printf(&seen, "%s", n->id);
    if (n->type == CUBE_NOTICE_NODE)
        cube_buf_printf(&seen, "%s", n->node->name);
    cube_buf_puts(&seen, " ");
    return --wanted_calls != 0;
}

static const char stream[] =
    "{\"Type\":\"hello\",\"Stream\":\"s\",\"Seq\":7}\n"
    "\n"
    "{\"Type\":\"task\",\"Stream\":\"s\",\"Seq\":8,\"Time\":"
    "\"2025-01-01T00:00:00Z\",\"Task\":{\"Name\":\"web\"}}\n"
    "{\"Type\":\"gone\",\"Stream\":\"s\",\"Seq\":9,\"ID\":\"x\"}\n"
    "{\"Type\":\"node\",\"Node\":{\"Name\":\"n1\"}}\n"
    "{\"Type\":\"from the future\"}\n"
    "{}\n"
    /* what is listed has the number of its moment, and no place to resume */
    "{\"Type\":\"reset\",\"Stream\":\"s\",\"Seq\":11}\n"
    "{\"Type\":\"task\",\"Stream\":\"s\",\"Seq\":12,"
    "\"Task\":{\"Name\":\"db\"}}\n"
    "{\"Type\":\"listed\",\"Stream\":\"s\",\"Seq\":11}\n";

TEST(events_are_whole_lines_in_pieces_of_any_size)
{
    for (size_t size = 1; size < sizeof stream; size += size < 20 ? 1 : 37) {
        test_row("pieces of %zu bytes", size);
        open_all(200, stream);
        piece = size;
        CHECK_INT(cube_client_events(client, NULL, NULL, on_notice, NULL,
                                     &err), -1);
        CHECK_INT(err.code, CUBE_ECONN); /* the manager ended them */
        CHECK_STR(seen.data,
                  "hello[] task[s:8]web gone[s:9]x node[]n1 beat[] beat[] "
                  "reset[] task[]db listed[s:11] ");
        cube_buf_free(&seen);
        close_all();
    }
}

TEST(enough_events_end_the_call_at_once)
{
    open_all(200, stream);
    wanted_calls = 2;
    CHECK_INT(cube_client_events(client, "a b", "s:3", on_notice, NULL, &err),
              0);
    CHECK_STR(asked, "GET /events after=s:3");
    CHECK_STR(seen.data, "hello[] task[s:8]web ");
    cube_buf_free(&seen);
    close_all();
}

TEST(an_event_that_makes_no_sense_ends_the_stream)
{
    static const char *const bodies[] = {
        "{\"Type\":\n", "x\n", "{\"Type\":\"task\"}\n",
        "{\"Type\":\"gone\"}\n",
        "{\"Type\":\"task\",\"Task\":{\"State\":9}}\n"};

    for (size_t i = 0; i < COUNT(bodies); i++) {
        test_row("body %s", bodies[i]);
        open_all(200, bodies[i]);
        CHECK_INT(cube_client_events(client, NULL, NULL, on_notice, NULL,
                                     &err), -1);
        CHECK_INT(err.code, CUBE_EPROTO);
        cube_buf_free(&seen);
        close_all();
    }
}

TEST(a_silent_event_stream_is_given_up)
{
    struct cube_timer timer = {0, 0, 0, NULL, NULL};

    open_all(200, NULL);
    cube_timer_set(loop, &timer, 100, skip_a_minute, NULL);
    CHECK_INT(cube_client_events(client, NULL, NULL, on_notice, NULL, &err),
              -1);
    CHECK_INT(err.code, CUBE_ETIMEOUT);
    cube_buf_free(&seen);
    close_all();
}
