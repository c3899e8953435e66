/*
 * A worker in twenty lines of main: it joins a manager, runs tasks as plain
 * processes, and ends when it is told to, while its tasks run on.
 *
 *     worker [HOST:PORT]     the manager, by default localhost:5555
 *
 *     cc -o worker examples/worker.c cube.c
 *
 * The signal handler is the program's own: it wakes the loop, which is the
 * only thing that a handler may do with it. Start the worker again, and it
 * finds the tasks that it had.
 */
#include "../cube.h"

#include <signal.h>
#include <stdio.h>

static struct cube_loop *loop;
static volatile sig_atomic_t is_over;

static void on_signal(int number)
{
    (void)number;
    is_over = 1;
    cube_loop_wake(loop);
}

static void on_log(void *arg, enum cube_level level, const char *text)
{
    static const char *const names[] = {"debug", "info", "warn", "error"};

    (void)arg;
    fprintf(stderr, "%-5s %s\n", names[level], text);
}

int main(int argc, char **argv)
{
    struct cube_err err = {CUBE_OK, ""};
    struct cube_worker_options o = {
        .name = "example",
        .data_dir = "worker-data",
        .runtime = "process",
        .join = argc > 1 ? argv[1] : "localhost:5555",
    };
    struct cube_worker *w = NULL;

    loop = cube_loop_new(cube_world_real(), &err);
    if (loop) {
        cube_loop_set_log(loop, on_log, NULL);
        signal(SIGTERM, on_signal);
        signal(SIGINT, on_signal);
        w = cube_worker_new(loop, &o, &err);
    }
    while (w && !is_over && cube_loop_turn(loop, -1, &err) == 0)
        continue;
    if (!is_over)
        fprintf(stderr, "worker: %s\n", err.text);
    cube_worker_free(w);
    cube_loop_free(loop);
    return is_over ? 0 : 1;
}
