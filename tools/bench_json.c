/*
 * The JSON chapter beside cJSON: parses and writes 20,000 tasks, as a manager
 * lists them. Both build a tree of all of it and write that tree again, and
 * what they write is what they read.
 *
 *     bench_json
 *
 * Each turn of each of the two has a process of its own, forked when the text
 * stands ready; they take turns, and a figure is the median of eleven. In one
 * process each would find the heap as the other one left it: a million small
 * chunks that cJSON has freed are put together again by the next large malloc,
 * and that is the one of our tree. So both get fresh memory, and pay for it.
 * Time is processor time: what else the machine does costs neither of them.
 *
 * Prints PARSE_MB_S WRITE_MB_S, and behind them those of cJSON, if it was
 * built with WITH_CJSON (Debian: libcjson-dev).
 */
#include "../cube.c"

#ifdef WITH_CJSON
#include <cjson/cJSON.h>
#endif

#define TASKS 20000
#define TURNS 11

enum { PARSE, WRITE, FIGURES };

static double bench_now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void bench_put_task(struct cube_buf *b, int i)
{
    cube_buf_printf(
        b, "%s{\"ID\":\"%08x-51b1-49ef-be00-0f3a7b2137f9\",\"ContainerID\":"
        "\"8d043f3d3ff6fcfa382e0c21a4f67145dfbcad7a9a844874bd118c0bbe789979\","
        "\"Name\":\"task-%d\",\"State\":2,\"Image\":\"nginx:latest\","
        "\"Cpu\":0.5,\"Memory\":67108864,\"Disk\":0,\"HostPorts\":{"
        "\"80/tcp\":[{\"HostIp\":\"0.0.0.0\",\"HostPort\":\"%d\"}]},"
        "\"ExposedPorts\":{\"80/tcp\":{}},\"PortBindings\":{\"80/tcp\":"
        "\"%d\"},\"RestartPolicy\":\"\",\"StartTime\":"
        "\"2025-03-01T10:11:12.%09dZ\",\"FinishTime\":\"0001-01-01T00:00:00Z\""
        ",\"HealthCheck\":\"/health\",\"RestartCount\":%d}",
        i ? "," : "", (unsigned)i * 2654435761u, i, 30000 + i % 30000,
        30000 + i % 30000, i * 49999, i % 4);
}

/* One turn: parses and writes `text`; the seconds of both go to `took`.
 * Returns what was written, which the process leaves as it is. */
typedef const char *bench_turn(const struct cube_buf *text,
                               double took[FIGURES]);

static const char *bench_ours(const struct cube_buf *text,
                              double took[FIGURES])
{
    double begin = bench_now();
    struct json_value_s *v = json_parse(text->data, text->len);
    const char *written;

    took[PARSE] = bench_now() - begin;
    begin = bench_now();
    written = json_write_minified(v, NULL);
    took[WRITE] = bench_now() - begin;
    return written;
}

#ifdef WITH_CJSON
static const char *bench_peer(const struct cube_buf *text,
                              double took[FIGURES])
{
    double begin = bench_now();
    cJSON *v = cJSON_ParseWithLength(text->data, text->len);
    const char *written;

    took[PARSE] = bench_now() - begin;
    begin = bench_now();
    written = cJSON_PrintUnformatted(v);
    took[WRITE] = bench_now() - begin;
    return written;
}
#endif

/* A turn in a process of its own. */
static void bench_apart(bench_turn *turn, const struct cube_buf *text,
                        double took[FIGURES])
{
    int ends[2], status = 0;
    size_t size = sizeof *took * FIGURES;
    pid_t child;

    if (pipe(ends) || (child = fork()) < 0) {
        perror("bench_json");
        exit(1);
    }
    if (child == 0) {
        const char *written = turn(text, took);
        bool is_same = written && !strcmp(written, text->data);

        _exit(is_same && write(ends[1], took, size) == (ssize_t)size ? 0 : 1);
    }
    close(ends[1]);
    if (read(ends[0], took, size) != (ssize_t)size ||
        waitpid(child, &status, 0) != child || status != 0) {
        fprintf(stderr, "bench_json: what was written is not what was read\n");
        exit(1);
    }
    close(ends[0]);
}

static int bench_order(const void *a, const void *b)
{
    const double *x = a, *y = b;

    return (*x > *y) - (*x < *y);
}

/* The median in MB a second; sorts `took`. */
static double bench_speed(double took[TURNS], size_t bytes)
{
    qsort(took, TURNS, sizeof *took, bench_order);
    return (double)bytes / 1e6 / took[TURNS / 2];
}

int main(void)
{
    bench_turn *const turns[] = {
        bench_ours,
#ifdef WITH_CJSON
        bench_peer,
#endif
    };
    double took[CUBE_COUNT(turns)][FIGURES][TURNS], one[FIGURES];
    struct cube_buf text = {0};

    cube_buf_puts(&text, "[");
    for (int i = 0; i < TASKS; i++)
        bench_put_task(&text, i);
    cube_buf_puts(&text, "]");
    for (size_t i = 0; i < TURNS * CUBE_COUNT(turns); i++) {
        size_t who = i % CUBE_COUNT(turns), turn = i / CUBE_COUNT(turns);

        bench_apart(turns[who], &text, one);
        took[who][PARSE][turn] = one[PARSE];
        took[who][WRITE][turn] = one[WRITE];
    }
    for (size_t i = 0; i < FIGURES * CUBE_COUNT(turns); i++)
        printf("%s%.0f", i ? " " : "",
               bench_speed(took[i / FIGURES][i % FIGURES], text.len));
    printf("\n");
    cube_buf_free(&text);
    return 0;
}
