/*
 * The JSON chapter beside cJSON: parses and writes 20,000 tasks, as a manager
 * lists them. Both build a tree of all of it and write that tree again; each
 * figure is the best of seven turns, taken alternately, in processor time:
 * what else the machine does costs neither of them.
 *
 *     bench_json
 *
 * Prints PARSE_MB_S WRITE_MB_S, and behind them those of cJSON, if it was
 * built with WITH_CJSON (Debian: libcjson-dev).
 */
#include "../cube.c"

#ifdef WITH_CJSON
#include <cjson/cJSON.h>
#endif

#define TASKS 20000
#define TURNS 7

static double bench_now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void bench_keep(double *best, double begin)
{
    double took = bench_now() - begin;

    if (*best == 0 || took < *best)
        *best = took;
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

int main(void)
{
    struct cube_buf b = {0};
    double parse = 0, write = 0, mb;

    cube_buf_puts(&b, "[");
    for (int i = 0; i < TASKS; i++)
        bench_put_task(&b, i);
    cube_buf_puts(&b, "]");
    mb = (double)b.len / 1e6;
#ifdef WITH_CJSON
    double peer_parse = 0, peer_write = 0;
#endif
    for (int turn = 0; turn < TURNS; turn++) {
        double begin = bench_now();
        struct json_value_s *v = json_parse(b.data, b.len);
        size_t size = 0;
        char *text;

        bench_keep(&parse, begin);
        begin = bench_now();
        text = json_write_minified(v, &size);
        bench_keep(&write, begin);
        if (!v || !text || size != b.len + 1 ||
            memcmp(text, b.data, b.len) != 0) {
            fprintf(stderr, "bench_json: what was written is not what was "
                            "read\n");
            return 1;
        }
        free(text);
        free(v);
#ifdef WITH_CJSON
        begin = bench_now();
        cJSON *peer = cJSON_ParseWithLength(b.data, b.len);
        bench_keep(&peer_parse, begin);
        begin = bench_now();
        text = cJSON_PrintUnformatted(peer);
        bench_keep(&peer_write, begin);
        free(text);
        cJSON_Delete(peer);
#endif
    }
    printf("%.0f %.0f", mb / parse, mb / write);
#ifdef WITH_CJSON
    printf(" %.0f %.0f", mb / peer_parse, mb / peer_write);
#endif
    printf("\n");
    cube_buf_free(&b);
    return 0;
}
