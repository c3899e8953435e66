/*
 * What each embedding program does, whichever way it has got at Cube: with
 * nothing but cube.h, in a main loop of its own. Valid C and C++. The program
 * includes cube.h, and then this; its main returns embed_main().
 *
 * For now: a loop that is turned from outside, a timer, and a task read,
 * checked and printed.
 */
#include <poll.h>
#include <stdio.h>
#include <string.h>

static int embed_passed, embed_failed;

static void embed_check(bool holds, const char *claim)
{
    if (holds) {
        embed_passed++;
        return;
    }
    embed_failed++;
    printf("FAILED: %s\n", claim);
}

#define EMBED_CHECK(claim) embed_check(claim, #claim)

static void embed_tick(void *arg)
{
    ++*(int *)arg;
}

/* A main loop of the program's own: poll(2) over what it watches itself and
 * Cube's one descriptor. */
static void embed_turn_until(struct cube_loop *l, const int *done)
{
    while (!*done) {
        struct pollfd p;

        p.fd = cube_loop_fd(l);
        p.events = POLLIN;
        p.revents = 0;
        poll(&p, 1, cube_loop_timeout_ms(l));
        if (cube_loop_turn(l, 0, NULL) < 0)
            return;
    }
}

static void embed_loop(void)
{
    struct cube_err err;
    struct cube_loop *l = cube_loop_new(cube_world_real(), &err);
    struct cube_timer timer;
    int ticks = 0;

    memset(&timer, 0, sizeof timer);
    EMBED_CHECK(l != NULL);
    cube_timer_set(l, &timer, 5, embed_tick, &ticks);
    embed_turn_until(l, &ticks);
    EMBED_CHECK(ticks == 1);
    cube_loop_free(l);
}

static void embed_task(void)
{
    static const char json[] =
        "{\"Name\":\"web\",\"Image\":\"nginx:latest\",\"Memory\":1048576,"
        "\"ExposedPorts\":{\"80/tcp\":{}},\"Cmd\":[\"a\",\"b\"],"
        "\"HealthCheck\":null}";
    struct cube_err err;
    struct cube_task *t = NULL;
    struct cube_buf out;

    memset(&out, 0, sizeof out);
    EMBED_CHECK(cube_task_parse(json, sizeof json - 1, true, &t, &err) == 0);
    if (!t)
        return;
    EMBED_CHECK(strcmp(t->name, "web") == 0);
    EMBED_CHECK(t->mem_bytes == 1048576);
    EMBED_CHECK(cube_task_check(t, &err) == 0);
    cube_task_print(t, &out);
    EMBED_CHECK(strstr(out.data, "\"Image\":\"nginx:latest\"") != NULL);
    EMBED_CHECK(strstr(out.data, "\"Cmd\":[\"a\",\"b\"]") != NULL);
    cube_buf_free(&out);
    cube_task_free(t);
}

static int embed_main(void)
{
    embed_loop();
    embed_task();
    printf("%d passed, %d failed, 0 skipped\n", embed_passed, embed_failed);
    return embed_failed > 0;
}
