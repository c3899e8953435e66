/*
 * The least that anybody must do to run containers: create and start, on the
 * engine's socket, with nothing between. tools/bench sets `cube run` beside
 * it.
 *
 *     bench_engine SOCKET COUNT NAME BODY
 *
 * Runs COUNT containers at once, each on a connection of its own, named
 * NAME-0, NAME-1, ...; BODY is that of the create. Prints the milliseconds
 * until the last of them was started.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MAX 100

struct conn {
    char answer[8192];
    size_t len;
    bool is_created, is_started;
};

static struct conn conns[MAX];
static struct pollfd fds[MAX];

static void die(const char *what)
{
    fprintf(stderr, "bench_engine: %s\n", what);
    exit(1);
}

static double now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static void say(int i, const char *target, const char *body)
{
    char text[8192];
    int len = snprintf(text, sizeof text,
                       "POST %s HTTP/1.1\r\nHost: localhost\r\n"
                       "Content-Type: application/json\r\n"
                       "Content-Length: %zu\r\n\r\n%s",
                       target, strlen(body), body);

    if (write(fds[i].fd, text, (size_t)len) != len)
        die("write to the engine");
    conns[i].len = 0;
}

static void create(int i, const char *socket_path, const char *name,
                   const char *body)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    char target[200];

    (void)snprintf(to.sun_path, sizeof to.sun_path, "%s", socket_path);
    fds[i].fd = socket(AF_UNIX, SOCK_STREAM, 0);
    fds[i].events = POLLIN;
    if (fds[i].fd < 0 ||
        connect(fds[i].fd, (struct sockaddr *)&to, sizeof to) < 0)
        die("connect to the engine");
    (void)snprintf(target, sizeof target, "/containers/create?name=%s-%d",
                   name, i);
    say(i, target, body);
}

/* The create's answer holds the ID: the start follows on the same
 * connection. */
static void on_answer(int i)
{
    struct conn *c = &conns[i];
    const char *id = strstr(c->answer, "\"Id\":\"");
    char target[200];

    if (c->is_created && strstr(c->answer, "\r\n\r\n")) {
        if (strncmp(c->answer, "HTTP/1.1 204", 12) != 0)
            die(c->answer);
        c->is_started = true;
        fds[i].events = 0;
    } else if (id && strchr(id, '}')) {
        if (strncmp(c->answer, "HTTP/1.1 201", 12) != 0)
            die(c->answer);
        c->is_created = true;
        (void)snprintf(target, sizeof target, "/containers/%.64s/start",
                       id + 6);
        say(i, target, "");
    } else if (strncmp(c->answer, "HTTP/1.1 4", 10) == 0) {
        die(c->answer);
    }
}

int main(int argc, char **argv)
{
    int count = argc == 5 ? atoi(argv[2]) : 0, left = count;
    double begin = now_ms();

    if (count < 1 || count > MAX) {
        fprintf(stderr, "usage: bench_engine SOCKET COUNT NAME BODY\n");
        return 2;
    }
    for (int i = 0; i < count; i++)
        create(i, argv[1], argv[3], argv[4]);
    while (left > 0) {
        if (poll(fds, (nfds_t)count, -1) < 0 && errno != EINTR)
            die("poll");
        for (int i = 0; i < count; i++) {
            struct conn *c = &conns[i];
            ssize_t n;

            if (!fds[i].revents || c->is_started)
                continue;
            n = read(fds[i].fd, c->answer + c->len,
                     sizeof c->answer - 1 - c->len);
            if (n <= 0)
                die("the engine ended the connection");
            c->len += (size_t)n;
            c->answer[c->len] = 0;
            on_answer(i);
            left -= c->is_started;
        }
    }
    printf("%.1f\n", now_ms() - begin);
    return 0;
}
