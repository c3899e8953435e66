/*
 * Chapter 7, Tasks: the wire, byte for byte; what input is taken and what is
 * refused, by the name of the field; the table of states.
 */
#include "test.h"

/* Lines that a Go implementation's manager and workers have sent. */
static const char *const go_lines[] = {
    "{\"ID\":\"dc5750f3-51b1-49ef-be00-0f3a7b2137f9\",\"ContainerID\""
    ":\"8d043f3d3ff6fcfa382e0c21a4f67145dfbcad7a9a844874bd118c0bbe789"
    "979\",\"Name\":\"lm-sick\",\"State\":2,\"Image\":\"127.0.0.1:500"
    "0/sick:latest\",\"Cpu\":0,\"Memory\":0,\"Disk\":0,\"HostPorts\":"
    "{\"7777/tcp\":[{\"HostIp\":\"0.0.0.0\",\"HostPort\":\"32773\"},{"
    "\"HostIp\":\"::\",\"HostPort\":\"32773\"}]},\"ExposedPorts\":{\""
    "7777/tcp\":{}},\"PortBindings\":{\"7777/tcp\":\"7777\"},\"Restar"
    "tPolicy\":\"\",\"StartTime\":\"0001-01-01T00:00:00Z\",\"FinishTi"
    "me\":\"0001-01-01T00:00:00Z\",\"HealthCheck\":\"/health\",\"Rest"
    "artCount\":1}",
    "{\"ID\":\"efeadce0-d016-4a39-882a-d2c5196cce1c\",\"ContainerID\""
    ":\"1e8098a8974d7e37321e62cff8c862ecd1b3ca789c9c05ae9115bd6a2cb29"
    "7d9\",\"Name\":\"lm-echo\",\"State\":3,\"Image\":\"127.0.0.1:500"
    "0/echo:latest\",\"Cpu\":0,\"Memory\":0,\"Disk\":0,\"HostPorts\":"
    "{\"7777/tcp\":[{\"HostIp\":\"0.0.0.0\",\"HostPort\":\"32771\"},{"
    "\"HostIp\":\"::\",\"HostPort\":\"32771\"}]},\"ExposedPorts\":{\""
    "7777/tcp\":{}},\"PortBindings\":{\"7777/tcp\":\"7777\"},\"Restar"
    "tPolicy\":\"\",\"StartTime\":\"0001-01-01T00:00:00Z\",\"FinishTi"
    "me\":\"0001-01-01T00:00:00Z\",\"HealthCheck\":\"/health\",\"Rest"
    "artCount\":0}",
    "{\"ID\":\"dc5750f3-51b1-49ef-be00-0f3a7b2137f9\",\"ContainerID\""
    ":\"d1a1852afcc1863b204c0854ff82b58f5dad27f176335bebc6839d283eba3"
    "8bd\",\"Name\":\"lm-sick\",\"State\":1,\"Image\":\"127.0.0.1:500"
    "0/sick:latest\",\"Cpu\":0,\"Memory\":0,\"Disk\":0,\"HostPorts\":"
    "{\"7777/tcp\":[{\"HostIp\":\"0.0.0.0\",\"HostPort\":\"32787\"},{"
    "\"HostIp\":\"::\",\"HostPort\":\"32787\"}]},\"ExposedPorts\":{\""
    "7777/tcp\":{}},\"PortBindings\":{\"7777/tcp\":\"7777\"},\"Restar"
    "tPolicy\":\"\",\"StartTime\":\"0001-01-01T00:00:00Z\",\"FinishTi"
    "me\":\"0001-01-01T00:00:00Z\",\"HealthCheck\":\"/health\",\"Rest"
    "artCount\":3}",
    "{\"ID\":\"25ad450c-9212-4396-98b8-3bc015774003\",\"ContainerID\""
    ":\"\",\"Name\":\"lm-nosuch\",\"State\":4,\"Image\":\"127.0.0.1:5"
    "000/nosuch:latest\",\"Cpu\":0,\"Memory\":0,\"Disk\":0,\"HostPort"
    "s\":null,\"ExposedPorts\":{\"7777/tcp\":{}},\"PortBindings\":{\""
    "7777/tcp\":\"7777\"},\"RestartPolicy\":\"\",\"StartTime\":\"0001"
    "-01-01T00:00:00Z\",\"FinishTime\":\"0001-01-01T00:00:00Z\",\"Hea"
    "lthCheck\":\"/health\",\"RestartCount\":0}",
    "{\"ID\":\"dc5750f3-51b1-49ef-be00-0f3a7b2137f9\",\"ContainerID\""
    ":\"8d043f3d3ff6fcfa382e0c21a4f67145dfbcad7a9a844874bd118c0bbe789"
    "979\",\"Name\":\"lm-sick\",\"State\":1,\"Image\":\"127.0.0.1:500"
    "0/sick:latest\",\"Cpu\":0,\"Memory\":0,\"Disk\":0,\"HostPorts\":"
    "{\"7777/tcp\":[{\"HostIp\":\"0.0.0.0\",\"HostPort\":\"32773\"},{"
    "\"HostIp\":\"::\",\"HostPort\":\"32773\"}]},\"ExposedPorts\":{\""
    "7777/tcp\":{}},\"PortBindings\":{\"7777/tcp\":\"7777\"},\"Restar"
    "tPolicy\":\"\",\"StartTime\":\"0001-01-01T00:00:00Z\",\"FinishTi"
    "me\":\"0001-01-01T00:00:00Z\",\"HealthCheck\":\"/health\",\"Rest"
    "artCount\":1}",
    "{\"ID\":\"efeadce0-d016-4a39-882a-d2c5196cce1c\",\"ContainerID\""
    ":\"\",\"Name\":\"lm-echo\",\"State\":1,\"Image\":\"127.0.0.1:500"
    "0/echo:latest\",\"Cpu\":0,\"Memory\":0,\"Disk\":0,\"HostPorts\":"
    "null,\"ExposedPorts\":{\"7777/tcp\":{}},\"PortBindings\":{\"7777"
    "/tcp\":\"7777\"},\"RestartPolicy\":\"\",\"StartTime\":\"0001-01-"
    "01T00:00:00Z\",\"FinishTime\":\"0001-01-01T00:00:00Z\",\"HealthC"
    "heck\":\"/health\",\"RestartCount\":0}",
    "{\"ID\":\"efeadce0-d016-4a39-882a-d2c5196cce1c\",\"ContainerID\""
    ":\"1e8098a8974d7e37321e62cff8c862ecd1b3ca789c9c05ae9115bd6a2cb29"
    "7d9\",\"Name\":\"lm-echo\",\"State\":3,\"Image\":\"127.0.0.1:500"
    "0/echo:latest\",\"Cpu\":0,\"Memory\":0,\"Disk\":0,\"HostPorts\":"
    "{\"7777/tcp\":[{\"HostIp\":\"0.0.0.0\",\"HostPort\":\"32771\"},{"
    "\"HostIp\":\"::\",\"HostPort\":\"32771\"}]},\"ExposedPorts\":{\""
    "7777/tcp\":{}},\"PortBindings\":{\"7777/tcp\":\"7777\"},\"Restar"
    "tPolicy\":\"\",\"StartTime\":\"0001-01-01T00:00:00Z\",\"FinishTi"
    "me\":\"2026-11-22T09:49:43.616327894Z\",\"HealthCheck\":\"/healt"
    "h\",\"RestartCount\":0}",
    "{\"ID\":\"9fd31141-4332-4095-a215-0f9fb19043f0\",\"ContainerID\""
    ":\"1635231f8372cb2386ec8c2b1d6d069a1d2dc28cfb9dc1d9fba0aa52a5634"
    "d06\",\"Name\":\"lm-exit3\",\"State\":4,\"Image\":\"127.0.0.1:50"
    "00/exit3:latest\",\"Cpu\":0,\"Memory\":0,\"Disk\":0,\"HostPorts"
    "\":{},\"ExposedPorts\":null,\"PortBindings\":null,\"RestartPolic"
    "y\":\"\",\"StartTime\":\"0001-01-01T00:00:00Z\",\"FinishTime\":"
    "\"0001-01-01T00:00:00Z\",\"HealthCheck\":\"/health\",\"RestartCo"
    "unt\":0}",
    "{\"ID\":\"9fd31141-4332-4095-a215-0f9fb19043f0\",\"ContainerID\""
    ":\"adac8a14e2d9919ff1b9771a9e16fe6967add773906c802dc10d4a177c443"
    "2ee\",\"Name\":\"lm-exit3\",\"State\":2,\"Image\":\"127.0.0.1:50"
    "00/exit3:latest\",\"Cpu\":0,\"Memory\":0,\"Disk\":0,\"HostPorts"
    "\":{},\"ExposedPorts\":null,\"PortBindings\":null,\"RestartPolic"
    "y\":\"\",\"StartTime\":\"0001-01-01T00:00:00Z\",\"FinishTime\":"
    "\"0001-01-01T00:00:00Z\",\"HealthCheck\":\"/health\",\"RestartCo"
    "unt\":1}"};

#define GO_EMPTY                                                           \
    "{\"ID\":\"00000000-0000-0000-0000-000000000000\",\"ContainerID\":\"\"," \
    "\"Name\":\"\",\"State\":0,\"Image\":\"\",\"Cpu\":0,\"Memory\":0,"     \
    "\"Disk\":0,\"HostPorts\":null,\"ExposedPorts\":null,"                 \
    "\"PortBindings\":null,\"RestartPolicy\":\"\","                        \
    "\"StartTime\":\"0001-01-01T00:00:00Z\","                              \
    "\"FinishTime\":\"0001-01-01T00:00:00Z\",\"HealthCheck\":\"\","        \
    "\"RestartCount\":0}"

/* Reads a task that must be right. */
static struct cube_task *task_of(const char *json)
{
    struct cube_err err = {0};
    struct cube_task *t;

    if (cube_task_parse(json, strlen(json), true, &t, &err))
        FAIL("%s: %s", json, err.text);
    return t;
}

static void check_prints(const struct cube_task *t, const char *want)
{
    struct cube_buf out = {0};

    cube_task_print(t, &out);
    CHECK_STR(out.data, want);
    cube_buf_free(&out);
}

/* Reads `json` and expects it to print as `want`. */
static void check_task(const char *json, const char *want)
{
    struct cube_task *t = task_of(json);

    if (t)
        check_prints(t, want);
    cube_task_free(t);
}

/* Expects `part` within what the task prints as. */
static void check_task_has(const char *json, const char *part)
{
    struct cube_task *t = task_of(json);
    struct cube_buf out = {0};

    if (t) {
        cube_task_print(t, &out);
        CHECK_HAS(out.data, part);
    }
    cube_buf_free(&out);
    cube_task_free(t);
}

TEST(lines_of_the_go_implementation_print_as_they_came)
{
    for (size_t i = 0; i < COUNT(go_lines); i++) {
        test_row("line %zu", i);
        check_task(go_lines[i], go_lines[i]);
    }
}

TEST(events_with_those_tasks_print_as_they_came)
{
    for (size_t i = 0; i < COUNT(go_lines); i++) {
        struct cube_buf text = {0}, out = {0};
        struct cube_event *e;
        struct cube_err err = {0};

        cube_buf_printf(&text,
                        "{\"ID\":\"266592cd-960d-4091-981c-8c25c44b1018\","
                        "\"State\":2,\"Timestamp\":"
                        "\"2025-03-01T10:11:12.123456789+01:00\","
                        "\"Task\":%s}",
                        go_lines[i]);
        REQUIRE(!cube_event_parse(text.data, text.len, true, &e, &err));
        cube_event_print(e, &out);
        CHECK_STR(out.data, text.data);
        cube_event_free(e);
        cube_buf_free(&text);
        cube_buf_free(&out);
    }
}

TEST(an_empty_task_has_nulls_and_the_zero_uuid)
{
    struct cube_task *t = cube_task_new();

    check_prints(t, GO_EMPTY);
    cube_task_free(t);
    check_task("{}", GO_EMPTY);
    check_task(GO_EMPTY, GO_EMPTY);
    t = task_of(GO_EMPTY);
    CHECK_STR(t->id, ""); /* which is to say: none */
    cube_task_free(t);
}

TEST(own_fields_follow_those_of_go_and_only_when_set)
{
    static const char own[] =
        "\"Cmd\":[\"sh\",\"-c\",\"\"],\"Env\":[\"A=b\"],\"ExitCode\":0,"
        "\"Node\":\"a:5556\",\"Wanted\":\"stop\",\"Attempt\":3,"
        "\"Error\":\"no \\u003cnode\\u003e\","
        "\"RestartTime\":\"2025-03-01T10:11:12Z\",\"StopGrace\":1500,"
        "\"HealthStart\":1,\"HealthInterval\":2,\"HealthTimeout\":3,"
        "\"HealthRetries\":4,\"Progress\":\"3 of 7\","
        "\"CreatedTime\":\"2025-03-01T10:11:12.5Z\"}";
    struct cube_buf text = {0};
    struct cube_task *t, *copy;

    cube_buf_add(&text, GO_EMPTY, strlen(GO_EMPTY) - 1);
    cube_buf_printf(&text, ",%s", own);
    check_task(text.data, text.data);
    t = task_of(text.data);
    copy = cube_task_copy(t);
    cube_task_free(t);
    check_prints(copy, text.data);
    CHECK(copy->has_exit_code);
    CHECK_INT(copy->wanted, CUBE_WANT_STOP);
    cube_task_free(copy);
    cube_buf_free(&text);
}

TEST(a_delivery_carries_cluster_epoch_and_budget)
{
    static const char text[] =
        "{\"ID\":\"266592cd-960d-4091-981c-8c25c44b1018\",\"State\":3,"
        "\"Timestamp\":\"2025-03-01T10:11:12Z\",\"Task\":" GO_EMPTY ","
        "\"Cluster\":\"efeadce0-d016-4a39-882a-d2c5196cce1c\",\"Epoch\":7,"
        "\"Budget\":0}";
    struct cube_buf out = {0};
    struct cube_event *e;

    REQUIRE(!cube_event_parse(text, strlen(text), true, &e, NULL));
    CHECK_INT(e->budget, 0);
    CHECK_INT(e->epoch, 7);
    cube_event_print(e, &out);
    CHECK_STR(out.data, text);
    cube_event_free(e);
    e = cube_event_new();
    CHECK_INT(e->budget, -1);
    cube_buf_clear(&out);
    cube_event_print(e, &out);
    CHECK_STR(out.data, "{\"ID\":\"00000000-0000-0000-0000-000000000000\","
                        "\"State\":0,\"Timestamp\":\"0001-01-01T00:00:00Z\","
                        "\"Task\":null}");
    cube_event_free(e);
    cube_buf_free(&out);
}

TEST(input_follows_the_rules_of_the_wire)
{
    static const struct {
        const char *json, *part, *why;
    } rows[] = {
        {"{\"nAmE\":\"a\"}", "\"Name\":\"a\"", "case does not matter"},
        {"{\"Name\":\"a\",\"NAME\":\"b\"}", "\"Name\":\"b\"", "last wins"},
        {"{\"NAME\":\"a\",\"Name\":null}", "\"Name\":\"a\"",
         "null changes nothing"},
        {"{\"Cpu\":null,\"State\":null,\"ID\":null,\"HostPorts\":null,"
         "\"StartTime\":null,\"Cmd\":null,\"Wanted\":null}",
         "\"Cpu\":0,", "null fits every kind"},
        {"{\"ID\":\"EFEADCE0-D016-4A39-882A-D2C5196CCE1C\"}",
         "\"ID\":\"efeadce0-d016-4a39-882a-d2c5196cce1c\"", "lower case"},
        {"{\"ID\":\"urn:uuid:efeadce0-d016-4a39-882a-d2c5196cce1c\"}",
         "\"ID\":\"efeadce0-d016-4a39-882a-d2c5196cce1c\"", "as a URN"},
        {"{\"ID\":\"{efeadce0-d016-4a39-882a-d2c5196cce1c}\"}",
         "\"ID\":\"efeadce0-d016-4a39-882a-d2c5196cce1c\"", "in braces"},
        {"{\"ID\":\"efeadce0d0164a39882ad2c5196cce1c\"}",
         "\"ID\":\"efeadce0-d016-4a39-882a-d2c5196cce1c\"", "digits only"},
        {"{\"Cpu\":1.50}", "\"Cpu\":1.5,", "shortest number"},
        {"{\"Cpu\":1e-7}", "\"Cpu\":1e-7,", "small number"},
        {"{\"Memory\":9223372036854775807}",
         "\"Memory\":9223372036854775807,", "largest integer"},
        {"{\"Disk\":-9223372036854775808}", "\"Disk\":-9223372036854775808,",
         "smallest integer; checked later"},
        {"{\"Name\":\"a&<>\\u2028\\u0001\\n\\b\\u007f\"}",
         "\"a\\u0026\\u003c\\u003e\\u2028\\u0001\\n\\u0008\x7f\"",
         "what is escaped"},
        {"{\"Name\":\"\\ud800x\"}", "\"\xef\xbf\xbdx\"", "lone surrogate"},
        {"{\"Name\":\"\xff\"}", "\"\xef\xbf\xbd\"", "no UTF-8"},
        {"{\"Name\":\"\\ud83d\\ude00\"}", "\"\xf0\x9f\x98\x80\"", "a pair"},
        {"{\"ExposedPorts\":{\"9/tcp\":{},\"80/tcp\":{},\"9/tcp\":{}}}",
         "\"ExposedPorts\":{\"80/tcp\":{},\"9/tcp\":{}}", "sorted as texts"},
        {"{\"ExposedPorts\":{}}", "\"ExposedPorts\":{}", "empty, not null"},
        {"{\"ExposedPorts\":{\"80/tcp\":null}}",
         "\"ExposedPorts\":{\"80/tcp\":{}}", "null for nothing"},
        {"{\"PortBindings\":{\"b\":\"2\",\"a\":\"1\",\"b\":\"3\"}}",
         "\"PortBindings\":{\"a\":\"1\",\"b\":\"3\"}", "last port wins"},
        {"{\"HostPorts\":{\"80/tcp\":null,\"79/tcp\":[]}}",
         "\"HostPorts\":{\"79/tcp\":[],\"80/tcp\":null}", "no list, empty"},
        {"{\"HostPorts\":{\"80/tcp\":[{\"hostport\":\"1\"},null]}}",
         "{\"80/tcp\":[{\"HostIp\":\"\",\"HostPort\":\"1\"},"
         "{\"HostIp\":\"\",\"HostPort\":\"\"}]}",
         "inner keys, too, in any case"},
        {"{\"StartTime\":\"2025-03-01T10:11:12.120+02:00\"}",
         "\"StartTime\":\"2025-03-01T10:11:12.12+02:00\"", "zeros cut"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        test_row("%s: %s", rows[i].why, rows[i].json);
        check_task_has(rows[i].json, rows[i].part);
    }
}

TEST(what_is_no_task_is_refused_with_the_field)
{
    static const struct {
        const char *json, *words;
    } rows[] = {
        {"", "ends too early"},
        {"null", "expected an object"},
        {"[]", "expected an object"},
        {"{} {}", "more text"},
        {"{\"ID\":\"x\"}", "ID: expected a UUID"},
        {"{\"ID\":\"\"}", "ID: expected a UUID"},
        {"{\"ID\":1}", "ID: expected a UUID"},
        {"{\"Name\":1}", "Name: expected a text"},
        {"{\"Name\":\"a\\u0000b\"}", "Name: expected a text without NUL"},
        {"{\"State\":5}", "State: expected 0 (Pending)"},
        {"{\"State\":-1}", "State: expected"},
        {"{\"State\":\"Running\"}", "State: expected"},
        {"{\"State\":1.0}", "State: expected"},
        {"{\"Cpu\":\"1\"}", "Cpu: expected a number"},
        {"{\"Cpu\":1e999}", "Cpu: expected a number"},
        {"{\"Memory\":1.5}", "Memory: expected an integer"},
        {"{\"Memory\":1e3}", "Memory: expected an integer"},
        {"{\"Memory\":9223372036854775808}", "Memory: expected an integer"},
        {"{\"HostPorts\":[]}", "HostPorts: expected ports"},
        {"{\"HostPorts\":{\"80/tcp\":[1]}}", "HostPorts: expected ports"},
        {"{\"HostPorts\":{\"80/tcp\":{}}}", "HostPorts: expected ports"},
        {"{\"HostPorts\":{\"80/tcp\":[{\"HostIp\":1}]}}", "HostPorts"},
        {"{\"ExposedPorts\":[\"80/tcp\"]}", "ExposedPorts: expected ports"},
        {"{\"ExposedPorts\":{\"80/tcp\":1}}", "ExposedPorts: expected ports"},
        {"{\"PortBindings\":{\"80/tcp\":8080}}", "PortBindings: expected"},
        {"{\"StartTime\":\"\"}", "StartTime: expected a time"},
        {"{\"StartTime\":\"2025-02-29T00:00:00Z\"}", "StartTime"},
        {"{\"Cmd\":\"ls\"}", "Cmd: expected a list"},
        {"{\"Cmd\":[null]}", "Cmd: expected a list"},
        {"{\"Env\":[1]}", "Env: expected a list"},
        {"{\"Wanted\":\"walk\"}", "Wanted: expected run or stop"},
        {"{\"Task\":{\"Cpu\":{}},\"State\":2}", "Task: Cpu: expected"},
        {"{\"Task\":7}", "Task: expected an object"},
        {"{\"Timestamp\":\"today\"}", "TaskEvent: Timestamp: expected"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        for (int is_strict = 0; is_strict < 2; is_strict++) {
            struct cube_err err = {0};
            struct cube_event *e;

            test_row("%s", rows[i].json);
            CHECK_INT(cube_task_or_event_parse(rows[i].json,
                                               strlen(rows[i].json),
                                               is_strict, &e, &err),
                      -1);
            CHECK(e == NULL);
            CHECK_INT(err.code, CUBE_EINVAL);
            CHECK_HAS(err.text, rows[i].words);
            cube_event_free(e);
        }
    }
}

TEST(unknown_fields_are_refused_by_managers_and_left_out_by_workers)
{
    static const struct {
        const char *json, *words;
    } rows[] = {
        {"{\"Imgae\":\"a\"}", "Task: unknown field \"Imgae\""},
        {"{\"Task\":{\"x\":null}}", "Task: unknown field \"x\""},
        {"{\"Task\":{},\"y\":1}", "TaskEvent: unknown field \"y\""},
        {"{\"ExposedPorts\":{\"80/tcp\":{\"a\":1}}}", "ExposedPorts"},
        {"{\"HostPorts\":{\"80/tcp\":[{\"a\":1}]}}", "HostPorts"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_err err = {0};
        struct cube_event *e;
        size_t len = strlen(rows[i].json);

        test_row("%s", rows[i].json);
        CHECK_INT(
            cube_task_or_event_parse(rows[i].json, len, true, &e, &err), -1);
        CHECK_HAS(err.text, rows[i].words);
        CHECK_INT(
            cube_task_or_event_parse(rows[i].json, len, false, &e, &err), 0);
        cube_event_free(e);
    }
}

TEST(a_bare_task_is_a_wish_to_run_it)
{
    static const struct {
        const char *json;
        enum cube_state state;
        bool has_task;
    } rows[] = {
        {"{\"Name\":\"a\"}", CUBE_RUNNING, true},
        {"{\"Name\":\"a\",\"State\":3}", CUBE_RUNNING, true},
        {"{\"State\":3,\"task\":{\"Name\":\"a\"}}", CUBE_COMPLETED, true},
        {"{\"State\":3,\"Timestamp\":\"2025-03-01T10:11:12Z\"}",
         CUBE_COMPLETED, false},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_event *e;

        test_row("%s", rows[i].json);
        REQUIRE(!cube_task_or_event_parse(rows[i].json, strlen(rows[i].json),
                                          true, &e, NULL));
        CHECK_INT(e->state, rows[i].state);
        CHECK_INT(e->task != NULL, rows[i].has_task);
        if (e->task)
            CHECK_STR(e->task->name, "a");
        cube_event_free(e);
    }
}

TEST(what_cannot_run_is_refused_with_the_field)
{
    static const struct {
        const char *json, *words; /* words NULL: it could run */
    } rows[] = {
        {"{\"Image\":\"nginx\"}", NULL},
        {"{\"Image\":\"127.0.0.1:5000/echo:latest\"}", NULL},
        {"{\"Image\":\"localhost/a__b/c--d.e:V1.0_x\"}", NULL},
        {"{\"Image\":\"[::1]:5000/a\"}", NULL},
        {"{\"Image\":\"Registry.example/a\"}", NULL},
        {"{\"Image\":\"a@sha256:0123456789abcdef0123456789abcdef\"}", NULL},
        {"{\"Image\":\"a:1@sha256:0123456789abcdef0123456789abcdef\"}", NULL},
        {"{\"Cmd\":[\"sleep\",\"\"]}", NULL}, /* a process needs no image */
        {"{}", "Image: there is none"},
        {"{\"Image\":\"Nginx\"}", "Image: \"Nginx\""},
        {"{\"Image\":\"a b\"}", "Image:"},
        {"{\"Image\":\"a:\"}", "Image:"},
        {"{\"Image\":\":a\"}", "Image:"},
        {"{\"Image\":\"a:.b\"}", "Image:"},
        {"{\"Image\":\"a/\"}", "Image:"},
        {"{\"Image\":\"/a\"}", "Image:"},
        {"{\"Image\":\"a//b\"}", "Image:"},
        {"{\"Image\":\"a:b/c\"}", "Image:"}, /* b is no port */
        {"{\"Image\":\"-a\"}", "Image:"},
        {"{\"Image\":\"a-\"}", "Image:"},
        {"{\"Image\":\"a..b\"}", "Image:"},
        {"{\"Image\":\"a___b\"}", "Image:"},
        {"{\"Image\":\"a@sha256:01\"}", "Image:"},
        {"{\"Image\":\"a@\"}", "Image:"},
        {"{\"Image\":\"[::1:5000/a\"}", "Image:"},
        {"{\"Image\":\"a.b:66000/c\"}", "Image:"},
        {"{\"Image\":\"../a\"}", "Image:"},
        {"{\"Image\":\"a\",\"Name\":\"web-1.x_y\"}", NULL},
        {"{\"Image\":\"a\",\"Name\":\"-web\"}", "Name: \"-web\""},
        {"{\"Image\":\"a\",\"Name\":\"we/b\"}", "Name:"},
        {"{\"Image\":\"a\",\"Name\":\"we b\"}", "Name:"},
        {"{\"Image\":\"a\",\"Name\":\"w\xc3\xa9\"}", "Name:"},
        {"{\"Image\":\"a\",\"Cpu\":-0.1}", "Cpu:"},
        {"{\"Image\":\"a\",\"Cpu\":1e300}", "Cpu:"},
        {"{\"Image\":\"a\",\"Memory\":-1}", "Memory: -1 is negative"},
        {"{\"Image\":\"a\",\"Memory\":1}", "Memory: 1 bytes are less than"},
        {"{\"Image\":\"a\",\"Memory\":6291455}", "at least 6291456 (6m)"},
        {"{\"Image\":\"a\",\"Memory\":6291456}", NULL},
        {"{\"Image\":\"a\",\"Disk\":-1}", "Disk:"},
        {"{\"Image\":\"a\",\"RestartCount\":-1}", "RestartCount:"},
        {"{\"Image\":\"a\",\"StopGrace\":-1}", "StopGrace:"},
        {"{\"Image\":\"a\",\"HealthRetries\":-1}", "HealthRetries:"},
        {"{\"Image\":\"a\",\"ExposedPorts\":{\"80\":{}}}", NULL},
        {"{\"Image\":\"a\",\"ExposedPorts\":{\"0/tcp\":{}}}",
         "ExposedPorts: \"0/tcp\""},
        {"{\"Image\":\"a\",\"ExposedPorts\":{\"65536/tcp\":{}}}",
         "ExposedPorts:"},
        {"{\"Image\":\"a\",\"ExposedPorts\":{\"80/TCP\":{}}}",
         "ExposedPorts:"},
        {"{\"Image\":\"a\",\"ExposedPorts\":{\"\":{}}}", "ExposedPorts:"},
        {"{\"Image\":\"a\",\"PortBindings\":{\"80/udp\":\"\"}}", NULL},
        {"{\"Image\":\"a\",\"PortBindings\":{\"80/tcp\":\"0\"}}", NULL},
        {"{\"Image\":\"a\",\"PortBindings\":{\"http\":\"80\"}}",
         "PortBindings: \"http\""},
        {"{\"Image\":\"a\",\"PortBindings\":{\"80/tcp\":\"65536\"}}",
         "PortBindings: \"65536\""},
        {"{\"Image\":\"a\",\"PortBindings\":{\"80/tcp\":\"8080/tcp\"}}",
         "PortBindings:"},
        {"{\"Image\":\"a\",\"PortBindings\":{\"80/tcp\":\"8080\","
         "\"81/tcp\":\"8080\"}}",
         "PortBindings: host port 8080 is given to both"},
        {"{\"Image\":\"a\",\"PortBindings\":{\"53/tcp\":\"53\","
         "\"53/udp\":\"53\"}}", NULL}, /* two ports of one number */
        {"{\"Image\":\"a\",\"PortBindings\":{\"80/tcp\":\"\","
         "\"81/tcp\":\"\",\"82/tcp\":\"0\"}}", NULL},
        {"{\"Image\":\"a\",\"PortBindings\":{\"80\":\"1\",\"80/tcp\":"
         "\"2\"}}", "PortBindings: \"80\" and \"80/tcp\" are the same"},
        {"{\"Image\":\"a\",\"RestartPolicy\":\"unless-stopped\"}", NULL},
        {"{\"Image\":\"a\",\"RestartPolicy\":\"sometimes\"}",
         "RestartPolicy:"},
        {"{\"Image\":\"a\",\"HealthCheck\":\"/health?a=b\"}", NULL},
        {"{\"Image\":\"a\",\"HealthCheck\":\"health\"}", "HealthCheck:"},
        {"{\"Image\":\"a\",\"HealthCheck\":\"/a b\"}", "HealthCheck:"},
        {"{\"Image\":\"a\",\"HealthCheck\":\"/\\r\\nX: y\"}", "HealthCheck:"},
        {"{\"Image\":\"a\",\"Cmd\":[\"\"]}", "Cmd:"},
        {"{\"Image\":\"a\",\"Env\":[\"A=\"]}", NULL},
        {"{\"Image\":\"a\",\"Env\":[\"=b\"]}", "Env:"},
        {"{\"Image\":\"a\",\"Env\":[\"A\"]}", "Env:"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_task *t = task_of(rows[i].json);
        struct cube_err err = {0};

        test_row("%s", rows[i].json);
        REQUIRE(t != NULL);
        CHECK_INT(cube_task_check(t, &err), rows[i].words ? -1 : 0);
        CHECK_HAS(err.text, rows[i].words ? rows[i].words : "");
        cube_task_free(t);
    }
    CHECK_INT(cube_task_check(NULL, NULL), -1);
}

static int64_t cpu_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Each binding was read again for each other one: 8 ms for a thousand of them,
 * where a turn has 5. Less than a fifth of that reading is left. */
TEST(many_bindings_are_checked_without_reading_each_anew)
{
    struct cube_task *t = cube_task_new();
    const char *protocol;
    char port[20], host[20];
    int64_t begin, middle;
    int number;

    for (int i = 1; i <= 1000; i++) {
        (void)snprintf(port, sizeof port, "%d/tcp", i);
        (void)snprintf(host, sizeof host, "%d", 20000 + i);
        cube_task_publish(t, port, host);
    }
    cube_task_set(&t->image, "nginx");
    begin = cpu_ns();
    for (int i = 0; i < 100000; i++)
        CHECK_INT(cube_port_parse("1000/tcp", &number, &protocol), 0);
    middle = cpu_ns();
    CHECK_INT(cube_task_check(t, NULL), 0);
    CHECK(cpu_ns() - middle < middle - begin);
    cube_task_free(t);
}

TEST(more_ports_than_the_limit_are_refused)
{
    struct cube_buf json = {0};
    struct cube_task *t;

    for (int extra = 0; extra < 2; extra++) {
        cube_buf_clear(&json);
        cube_buf_puts(&json, "{\"ExposedPorts\":{\"x\":{}");
        for (int i = 1; i < CUBE_TASK_PORTS_MAX + extra; i++)
            cube_buf_printf(&json, ",\"%d\":{}", i);
        cube_buf_puts(&json, "}}");
        CHECK_INT(cube_task_parse(json.data, json.len, true, &t, NULL),
                  -extra);
        cube_task_free(t);
    }
    cube_buf_free(&json);
}

TEST(same_specification_looks_at_what_the_user_sets)
{
    static const struct {
        const char *a, *b;
        bool is_same;
    } rows[] = {
        {"{}", "{}", true},
        {"{\"ExposedPorts\":{}}", "{\"ExposedPorts\":null}", true},
        {"{\"State\":1}", "{\"State\":2}", true},
        {"{\"ID\":\"efeadce0-d016-4a39-882a-d2c5196cce1c\"}", "{}", true},
        {"{\"RestartCount\":3,\"Error\":\"x\",\"Node\":\"n\"}", "{}", true},
        {"{\"HostPorts\":{\"80/tcp\":null}}", "{}", true},
        {"{\"Name\":\"a\"}", "{\"Name\":\"b\"}", false},
        {"{\"Image\":\"a\"}", "{\"Image\":\"b\"}", false},
        {"{\"Cpu\":1}", "{\"Cpu\":1.0}", true},
        {"{\"Cpu\":1}", "{\"Cpu\":2}", false},
        {"{\"Memory\":1}", "{}", false},
        {"{\"Cmd\":[\"a\",\"b\"]}", "{\"Cmd\":[\"ab\"]}", false},
        {"{\"PortBindings\":{\"1\":\"2\",\"3\":\"4\"}}",
         "{\"PortBindings\":{\"3\":\"4\",\"1\":\"2\"}}", true},
        {"{\"PortBindings\":{\"1\":\"2\"}}", "{\"PortBindings\":{\"1\":\"3\"}}",
         false},
        {"{\"StopGrace\":1}", "{}", false},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_task *a = task_of(rows[i].a), *b = task_of(rows[i].b);

        test_row("%s and %s", rows[i].a, rows[i].b);
        CHECK_INT(cube_task_same_spec(a, b), rows[i].is_same);
        CHECK_INT(cube_task_same_spec(b, a), rows[i].is_same);
        cube_task_free(a);
        cube_task_free(b);
    }
}

TEST(setters_keep_ports_sorted_and_single)
{
    struct cube_task *t = cube_task_new(), *copy;
    struct cube_buf out = {0};

    cube_task_set(&t->name, "web");
    cube_task_set(&t->image, NULL);
    for (int i = 0; i < 5; i++)
        cube_task_add(&t->cmd, i % 2 ? "b" : "a");
    cube_task_expose(t, "9");
    cube_task_expose(t, "80/tcp");
    cube_task_expose(t, "9/tcp");
    cube_task_publish(t, "80", "1");
    cube_task_publish(t, "80/tcp", "2");
    cube_task_publish(t, "443", NULL);
    cube_task_bind(t, "80/tcp", "0.0.0.0", "32771");
    cube_task_bind(t, "80/tcp", "::", "32771");
    cube_task_bind(t, "443/tcp", NULL, NULL);
    copy = cube_task_copy(t);
    cube_task_free(t);
    cube_task_print(copy, &out);
    CHECK_HAS(out.data,
              "\"HostPorts\":{\"443/tcp\":null,\"80/tcp\":["
              "{\"HostIp\":\"0.0.0.0\",\"HostPort\":\"32771\"},"
              "{\"HostIp\":\"::\",\"HostPort\":\"32771\"}]},"
              "\"ExposedPorts\":{\"80/tcp\":{},\"9/tcp\":{}},"
              "\"PortBindings\":{\"443/tcp\":\"\",\"80/tcp\":\"2\"}");
    CHECK_HAS(out.data, "\"Cmd\":[\"a\",\"b\",\"a\",\"b\",\"a\"]");
    cube_task_add(&copy->cmd, "c");
    CHECK_UINT(copy->cmd.count, 6);
    cube_task_unbind(copy);
    cube_buf_clear(&out);
    cube_task_print(copy, &out);
    CHECK_HAS(out.data, "\"HostPorts\":null");
    cube_task_free(copy);
    cube_buf_free(&out);
}

TEST(ports_are_numbers_with_a_protocol)
{
    static const struct {
        const char *text;
        int number;
        const char *protocol; /* NULL: no port */
    } rows[] = {
        {"80", 80, "tcp"},        {"80/tcp", 80, "tcp"},
        {"53/udp", 53, "udp"},    {"9/sctp", 9, "sctp"},
        {"65535", 65535, "tcp"},  {"65536", 0, NULL},
        {"0", 0, NULL},           {"", 0, NULL},
        {"/tcp", 0, NULL},        {"80/", 0, NULL},
        {"80/icmp", 0, NULL},     {"80 /tcp", 0, NULL},
        {"-1", 0, NULL},          {"80/tcp ", 0, NULL},
        {"99999999999999999999", 0, NULL},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        const char *protocol = NULL;
        int number = 0;

        test_row("%s", rows[i].text);
        CHECK_INT(cube_port_parse(rows[i].text, &number, &protocol),
                  rows[i].protocol ? 0 : -1);
        CHECK_INT(number, rows[i].number);
        CHECK_STR(protocol ? protocol : "none",
                  rows[i].protocol ? rows[i].protocol : "none");
    }
}

TEST(states_change_as_the_table_says)
{
    /* from a letter's row to the letters behind it: Pending, Scheduled,
     * Running, Completed, Failed */
    static const char *const rows[] = {"P:SC", "S:PSRCF", "R:PSRCF", "C:",
                                       "F:PSC"};
    static const char letters[] = "PSRCF";

    for (int from = 0; from < 5; from++) {
        for (int to = 0; to < 5; to++) {
            test_row("%c to %c", letters[from], letters[to]);
            CHECK_INT(cube_state_may((enum cube_state)from,
                                     (enum cube_state)to),
                      strchr(rows[from] + 2, letters[to]) != NULL);
        }
        CHECK_INT(cube_state_name((enum cube_state)from)[0], letters[from]);
    }
}

/* ---- Drawings ---- */

/* At cube_listing_add and cube_number_key: what a store holds of a record. */
TEST(a_record_lies_in_the_store_as_it_is_drawn)
{
    struct cube_version v = {.task = cube_task_new(), .keep = {.number = 7}};
    struct cube_listing list = {0};
    struct cube_buf value = {0}, task = {0}, out = {0};
    unsigned char key[8];

    cube_number_key(7, key);
    CHECK(memcmp(key, "\0\0\0\0\0\0\0\7", 8) == 0);
    CHECK_INT(cube_number_of_key(key, 8), 7);
    cube_text_set(&v.task->name, "\"Hidden\":1, \"Task\":");
    cube_task_print(v.task, &task);
    cube_version_print(&v, task.data, task.len, &value);
    CHECK(cube_text_starts(value.data, "{\"Number\":7,\"Epoch\":0,"));
    CHECK_HAS(value.data, ",\"Hidden\":0,\"Cluster\":\"\",\"Avoid\":\"\","
                          "\"Task\":{");
    CHECK_STR(strstr(value.data, ",\"Task\":") + 8 + task.len, "}");
    cube_listing_add(&list, value.data, value.len, &out);
    CHECK_STR(out.data + 1, task.data);
    cube_buf_clear(&out);
    cube_buf_clear(&value);
    v.keep.is_hidden = true;
    cube_version_print(&v, task.data, task.len, &value);
    cube_listing_add(&list, value.data, value.len, &out);
    CHECK_STR(out.data, "");
    cube_task_free(v.task);
    cube_buf_free(&value);
    cube_buf_free(&task);
    cube_buf_free(&out);
}

/* At cube_task_add and cube_ports_slot. */
TEST(lists_grow_and_are_sorted_as_they_are_drawn)
{
    static const size_t room[] = {0, 1, 2, 4, 4, 8, 8, 8, 8};
    struct cube_task *t = cube_task_new();

    for (size_t n = 1; n < COUNT(room); n++) {
        cube_task_add(&t->cmd, "x");
        if (room[n] > room[n - 1]) /* the new room is ours to write to */
            memset(t->cmd.list + n, 0, (room[n] - n) * sizeof *t->cmd.list);
    }
    cube_task_expose(t, "443");
    cube_task_expose(t, "80");
    cube_task_expose(t, "53/udp");
    REQUIRE(t->exposed_ports.count == 3);
    CHECK_STR(t->exposed_ports.list[0], "443/tcp");
    CHECK_STR(t->exposed_ports.list[1], "53/udp");
    CHECK_STR(t->exposed_ports.list[2], "80/tcp");
    cube_task_free(t);
}

static bool list_nothing(void *arg, size_t *at, const char *only,
                         struct cube_buf *out)
{
    (void)arg;
    (void)at;
    (void)only;
    (void)out;
    return false;
}

/* At cube_feed_push, with the ring as large as it is; and at struct
 * cube_feed: what can be resumed from. */
TEST(a_ring_of_lines_turns_as_it_is_drawn)
{
    struct cube_loop *l = cube_loop_new(cube_world_real(), NULL);
    struct cube_feed f;
    uint64_t next = 0;

    cube_feed_init(&f, l, "S", 0);
    f.list = list_nothing;
    CHECK_UINT(f.first, 1);
    for (int i = 0; i < CUBE_FEED_RING; i++)
        cube_feed_push(&f, cube_text_dup("x\n"));
    CHECK_UINT(f.first, 1);
    CHECK_UINT(f.last, CUBE_FEED_RING);
    CHECK(cube_feed_can_resume(&f, "S:0", &next));
    cube_feed_push(&f, cube_text_dup("new\n"));
    CHECK_UINT(f.first, 2);
    CHECK_UINT(f.last, CUBE_FEED_RING + 1);
    CHECK_STR(f.ring[f.last % CUBE_FEED_RING], "new\n");
    CHECK(!cube_feed_can_resume(&f, "S:0", &next));   /* line 1 is gone */
    CHECK(cube_feed_can_resume(&f, "S:1", &next));
    CHECK_UINT(next, 2);
    CHECK(cube_feed_can_resume(&f, "S:4097", &next)); /* has seen all */
    CHECK(!cube_feed_can_resume(&f, "S:4098", &next));
    CHECK(!cube_feed_can_resume(&f, "T:4097", &next));
    CHECK(!cube_feed_can_resume(&f, NULL, &next));
    cube_feed_close(&f);
    cube_loop_free(l);
}

/* At cube_line_is and cube_line_task. */
TEST(lines_say_what_they_are_and_of_whom)
{
    static const char task[] =
        "{\"Type\":\"task\",\"Seq\":1,\"Task\":{\"ID\":"
        "\"efeadce0-d016-4a39-882a-d2c5196cce1c\",\"Name\":\"a\"}}\n";
    static const char gone[] =
        "{\"Type\":\"gone\",\"Seq\":2,\"Why\":\"\\\"ID\\\":\\\"x\","
        "\"ID\":\"efeadce0-d016-4a39-882a-d2c5196cce1c\"}\n";
    static const char node[] = "{\"Type\":\"node\",\"Node\":{}}\n";
    char id[CUBE_UUID_TEXT];

    CHECK(cube_line_is(task, sizeof task - 1, "task"));
    CHECK(!cube_line_is(task, sizeof task - 1, "tas"));
    CHECK(cube_line_task(task, sizeof task - 1, id));
    CHECK_STR(id, "efeadce0-d016-4a39-882a-d2c5196cce1c");
    id[0] = 0;
    CHECK(cube_line_task(gone, sizeof gone - 1, id));
    CHECK_STR(id, "efeadce0-d016-4a39-882a-d2c5196cce1c");
    CHECK(!cube_line_task(node, sizeof node - 1, id));
}

TEST(failed_is_finished_only_when_no_restart_is_due)
{
    struct cube_task *t = cube_task_new();

    for (int state = 0; state < 5; state++) {
        t->state = (enum cube_state)state;
        CHECK_INT(cube_task_is_finished(t), state >= CUBE_COMPLETED);
    }
    t->restart_time = cube_time_from_ns(1);
    CHECK(!cube_task_is_finished(t));
    cube_task_free(t);
}

/* Changes single bytes of real lines: whatever is accepted must print to a
 * text that reads back as the same. */
TEST(damaged_lines_are_refused_or_read_consistently)
{
    for (int round = 0; round < 20000; round++) {
        char line[2048];
        size_t len = strlen(go_lines[(size_t)round % COUNT(go_lines)]);
        struct cube_task *t, *again;
        struct cube_buf first = {0}, second = {0};

        memcpy(line, go_lines[(size_t)round % COUNT(go_lines)], len);
        for (uint32_t n = test_below(3) + 1; n > 0; n--)
            line[test_below((uint32_t)len)] = (char)test_below(256);
        if (cube_task_parse(line, len, test_below(2), &t, NULL))
            continue;
        cube_task_print(t, &first);
        if (cube_task_parse(first.data, first.len, true, &again, NULL))
            FAIL("does not read back: %s", first.data);
        else
            cube_task_print(again, &second);
        CHECK_STR(second.data ? second.data : "", first.data);
        cube_task_free(t);
        cube_task_free(again);
        cube_buf_free(&first);
        cube_buf_free(&second);
    }
}

/* All that a copy of this store is, as it is sent. */
static void copy_of(struct cube_store *s, struct cube_buf *out)
{
    struct cube_copy *y = cube_alloc(sizeof *y);

    y->store = s;
    y->snap = cube_store_snapshot(s);
    while (cube_copy_piece(y, out) > 0)
        continue;
    cube_copy_free(y);
}

TEST(a_copy_is_what_the_drawing_says)
{
    static const unsigned char drawn[] = {
        0x54, 1, 0, 0, 0, 0, 0, 0, 0, 0x74,
        0x52, 1, 0, 0, 0, 1, 0, 0, 0, 0x6b, 0x76,
        0x45, 1, 0, 0, 0, 0, 0, 0, 0, 0x31};
    struct cube_store *s = cube_store_open(NULL, NULL, NULL, NULL);
    struct cube_buf out = {0};

    CHECK_INT(cube_store_put(s, "t", "k", 1, "v", 1, NULL), 0);
    CHECK_INT(cube_store_commit(s, NULL), 0);
    CHECK_INT(cube_store_put(s, "t", "later", 5, "v", 1, NULL), 0);
    copy_of(s, &out);
    CHECK_INT((int)out.len, (int)sizeof drawn);
    CHECK_MEM(out.data, drawn, sizeof drawn);
    cube_buf_free(&out);
    cube_store_close(s);
}

/* Cut anywhere, changed anywhere in its heads: a copy is the same, or none. */
TEST(a_copy_arrives_whole_or_not_at_all)
{
    struct cube_store *from = cube_store_open(NULL, NULL, NULL, NULL);
    struct cube_buf sent = {0}, again = {0};
    struct cube_err err;

    CHECK_INT(cube_store_put(from, "a", "1", 1, "one", 3, NULL), 0);
    CHECK_INT(cube_store_put(from, "a", "2", 1, "", 0, NULL), 0);
    CHECK_INT(cube_store_put(from, "b", "1", 1, "uno", 3, NULL), 0);
    CHECK_INT(cube_store_commit(from, NULL), 0);
    copy_of(from, &sent);
    for (size_t cut = 0; cut <= sent.len; cut++) {
        struct cube_copy_reader r;

        test_row("cut at %d", (int)cut);
        memset(&r, 0, sizeof r);
        r.store = cube_store_open(NULL, NULL, NULL, NULL);
        for (size_t i = 0; i < cut; i++)
            CHECK_INT(cube_copy_take(&r, sent.data + i, 1, &err), 0);
        CHECK(r.is_whole == (cut == sent.len));
        if (r.is_whole) {
            CHECK_INT(cube_copy_take(&r, sent.data, sent.len, &err), -1);
            CHECK_INT(cube_store_commit(r.store, NULL), 0);
            copy_of(r.store, &again);
            CHECK_INT((int)again.len, (int)sent.len);
            CHECK_MEM(again.data, sent.data, sent.len);
        }
        cube_buf_free(&r.rest);
        cube_store_close(r.store);
    }
    cube_buf_free(&sent);
    cube_buf_free(&again);
    cube_store_close(from);
}
