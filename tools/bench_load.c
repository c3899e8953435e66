/*
 * Clients that do nothing but ask, for tools/bench: so little work of their
 * own that what they measure is the server. One thread, plain epoll, nothing
 * of Cube in it.
 *
 *     bench_load get  PORT PATH CONNS SECONDS [RATE]
 *     bench_load post PORT PATH CONNS SECONDS
 *     bench_load sync FILE BYTES SECONDS
 *
 * `get` keeps CONNS connections busy, each asking again when it was answered;
 * with RATE it sends so many requests a second, a few each millisecond, and
 * counts a wait from when a request was due (else a server that stalls would
 * look as if nobody had asked meanwhile). `post` sends tasks, each with
 * an ID of its own, and takes only a 201 for an answer. Both print
 *
 *     ANSWERS_PER_SECOND P50_US P99_US BODY_BYTES
 *
 * `sync` appends so many bytes and has them on disk, again and again, on room
 * that was written before: the limit of whoever keeps what it was told. It
 * prints SYNCS_PER_SECOND.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#define MAX_CONNS 1024
#define MAX_WAITS (1 << 24)

struct conn {
    int fd;
    int64_t asked_ns; /* when the open request was due; 0: none is open */
    char head[4096];  /* of the answer, as far as it came */
    size_t head_len;
    bool has_head, is_chunked;
    int64_t left;     /* bytes of the body to come */
    char tail[7];     /* of a chunked body: what came last */
    int64_t got;      /* of a chunked body, with its framing */
};

static struct conn conns[MAX_CONNS];
static uint32_t *waits_us;
static size_t wait_count;
static bool is_post;
static const char *path;
static int port;
static int64_t body_bytes, posted;

static int64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void die(const char *what)
{
    fprintf(stderr, "bench_load: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* A run's IDs begin with its process and time, so that no two runs share
 * one. The body is what `cube run` sends. */
static int put_task(char *out, size_t size)
{
    static unsigned run;
    char id[40];

    if (!run)
        run = (unsigned)(now_ns() >> 10) ^ (unsigned)getpid() << 16;
    posted++;
    (void)snprintf(id, sizeof id, "%08x-0000-4000-8000-%012llx", run,
                   (unsigned long long)posted);
    return snprintf(
        out, size,
        "{\"ID\":\"%s\",\"State\":2,\"Timestamp\":\"2025-03-01T10:00:00Z\","
        "\"Task\":{\"ID\":\"%s\",\"ContainerID\":\"\",\"Name\":\"bench-%lld\","
        "\"State\":1,\"Image\":\"nginx:latest\",\"Cpu\":0,\"Memory\":0,"
        "\"Disk\":0,\"HostPorts\":null,\"ExposedPorts\":null,"
        "\"PortBindings\":null,\"RestartPolicy\":\"\","
        "\"StartTime\":\"0001-01-01T00:00:00Z\","
        "\"FinishTime\":\"0001-01-01T00:00:00Z\",\"HealthCheck\":\"\","
        "\"RestartCount\":0}}\n", id, id, (long long)posted);
}

static void ask(struct conn *c, int64_t due_ns)
{
    char text[3000], body[1500] = "";
    int len, body_len = 0;

    if (is_post)
        body_len = put_task(body, sizeof body);
    len = snprintf(text, sizeof text, is_post
                   ? "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n"
                     "Content-Type: application/json\r\n"
                     "Content-Length: %d\r\n\r\n%s"
                   : "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n",
                   path, port, body_len, body);
    if (write(c->fd, text, (size_t)len) != len)
        die("write");
    c->asked_ns = due_ns;
    c->has_head = false;
    c->head_len = 0;
}

/* A chunked body ends with an empty chunk. Chunks are not counted, only their
 * end is looked for: no JSON holds these seven bytes. */
static void take_chunks(struct conn *c, const char *data, size_t len)
{
    size_t keep = len < sizeof c->tail ? sizeof c->tail - len : 0;

    memmove(c->tail, c->tail + sizeof c->tail - keep, keep);
    memcpy(c->tail + keep, data + len - (sizeof c->tail - keep),
           sizeof c->tail - keep);
    c->got += (int64_t)len;
    if (memcmp(c->tail, "\r\n0\r\n\r\n", sizeof c->tail) == 0) {
        c->left = 0;
        body_bytes = c->got;
    }
}

/* The end of a head: checks the status, finds the length of the body. */
static bool take_head(struct conn *c)
{
    const char *want = is_post ? "HTTP/1.1 201" : "HTTP/1.1 200", *length;
    char *end;

    c->head[c->head_len] = 0;
    end = strstr(c->head, "\r\n\r\n");
    if (!end)
        return false;
    if (strncmp(c->head, want, 12) != 0) {
        fprintf(stderr, "bench_load: not %s but: %.600s\n", want, c->head);
        exit(1);
    }
    c->has_head = true;
    *end = 0;
    length = strcasestr(c->head, "\r\nContent-Length:");
    c->is_chunked = !length;
    *end = '\r';
    c->got = 0;
    if (c->is_chunked) {
        c->left = 1;
        take_chunks(c, end + 4, (size_t)(c->head + c->head_len - (end + 4)));
        return true;
    }
    body_bytes = strtoll(length + 17, NULL, 10);
    c->left = body_bytes - (c->head + c->head_len - (end + 4));
    return true;
}

/* Reads what is there. True: the answer is complete. */
static bool take(struct conn *c)
{
    static char sink[1 << 18];

    for (;;) {
        ssize_t n = c->has_head
            ? read(c->fd, sink, sizeof sink)
            : read(c->fd, c->head + c->head_len,
                   sizeof c->head - 1 - c->head_len);

        if (n < 0 && errno == EAGAIN)
            return false;
        if (n <= 0)
            die("read");
        if (c->has_head && c->is_chunked)
            take_chunks(c, sink, (size_t)n);
        else if (c->has_head)
            c->left -= n;
        else
            c->head_len += (size_t)n;
        if (!c->has_head && !take_head(c))
            continue;
        if (c->left == 0)
            return true;
    }
}

static void answered(struct conn *c)
{
    int64_t wait = now_ns() - c->asked_ns;

    c->asked_ns = 0;
    if (wait_count < MAX_WAITS)
        waits_us[wait_count++] = (uint32_t)(wait / 1000);
}

static void connect_all(int poll, int count)
{
    struct sockaddr_in to = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};

    for (int i = 0; i < count; i++) {
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = &conns[i]};
        int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);

        if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof to) < 0)
            die("connect");
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        fcntl(fd, F_SETFL, O_NONBLOCK);
        conns[i].fd = fd;
        if (epoll_ctl(poll, EPOLL_CTL_ADD, fd, &e) < 0)
            die("epoll_ctl");
    }
}

/* Sends what is due by now, each on a connection that is free; what finds
 * none waits, and its wait counts. */
static void ask_due(int count, double rate, int64_t begin, int64_t *sent)
{
    static int next;
    int64_t tick = (now_ns() - begin) / 1000000;
    int64_t due = (int64_t)((double)tick / 1e3 * rate);

    for (int tried = 0; *sent < due && tried < count; tried++) {
        struct conn *c = &conns[next++ % count];

        if (c->asked_ns == 0)
            ask(c, begin + (int64_t)((double)++*sent / rate * 1e3 + 0.999) *
                               1000000);
    }
}

static int compare(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return x < y ? -1 : x > y;
}

static void load(int count, double seconds, double rate)
{
    int poll = epoll_create1(0);
    int64_t begin, end, sent = 0;
    struct epoll_event ready[MAX_CONNS];

    connect_all(poll, count);
    begin = now_ns();
    end = begin + (int64_t)(seconds * 1e9);
    for (int i = 0; rate <= 0 && i < count; i++)
        ask(&conns[i], now_ns());
    while (now_ns() < end) {
        int n = epoll_wait(poll, ready, MAX_CONNS, rate > 0 ? 1 : 1000);

        for (int i = 0; i < n; i++) {
            struct conn *c = ready[i].data.ptr;

            if (!take(c))
                continue;
            answered(c);
            if (rate <= 0)
                ask(c, now_ns());
        }
        if (rate > 0)
            ask_due(count, rate, begin, &sent);
    }
    seconds = (double)(now_ns() - begin) / 1e9;
    if (wait_count == 0)
        die("no answer at all");
    qsort(waits_us, wait_count, sizeof *waits_us, compare);
    printf("%.0f %u %u %lld\n", (double)wait_count / seconds,
           waits_us[wait_count / 2], waits_us[wait_count * 99 / 100],
           (long long)body_bytes);
}

static void sync_only(const char *file, size_t bytes, double seconds)
{
    static char zeros[1 << 20];
    char *data = malloc(bytes);
    int fd = open(file, O_RDWR | O_CREAT | O_TRUNC, 0600);
    int64_t begin = now_ns(), count = 0;
    off_t at = 0, end = 0;

    if (fd < 0 || !data)
        die(file);
    memset(data, 'x', bytes);
    while (now_ns() - begin < (int64_t)(seconds * 1e9)) {
        if (at + (off_t)bytes > end) {
            if (pwrite(fd, zeros, sizeof zeros, end) < 0)
                die("write");
            end += (off_t)sizeof zeros;
        }
        if (pwrite(fd, data, bytes, at) < 0 || fdatasync(fd) < 0)
            die("write");
        at += (off_t)bytes;
        count++;
    }
    printf("%.0f\n", (double)count / ((double)(now_ns() - begin) / 1e9));
    free(data);
}

int main(int argc, char **argv)
{
    if (argc == 5 && strcmp(argv[1], "sync") == 0) {
        sync_only(argv[2], (size_t)atol(argv[3]), atof(argv[4]));
        return 0;
    }
    if (argc < 6) {
        fprintf(stderr, "usage: see tools/bench_load.c\n");
        return 2;
    }
    is_post = strcmp(argv[1], "post") == 0;
    port = atoi(argv[2]);
    path = argv[3];
    waits_us = malloc(MAX_WAITS * sizeof *waits_us);
    if (!waits_us || atoi(argv[4]) > MAX_CONNS)
        die("too much");
    load(atoi(argv[4]), atof(argv[5]), argc > 6 ? atof(argv[6]) : 0);
    return 0;
}
