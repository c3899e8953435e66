/*
 * Chapter 8, Machine: texts of /proc as kernels write them, JSON as the Go
 * implementation wrote it on a running cluster, and the difference of two
 * readings.
 */
#include "test.h"

/* What running workers of the Go implementation have answered: GET /stats,
 * and the stats within a manager's GET /nodes. */
static const char go_stats[] =
    "{\"MemStats\":{\"mem_total\":24684096,\"mem_free\":22959224,"
    "\"mem_available\":24158876,\"buffers\":15364,\"cached\":1322288,"
    "\"swap_cached\":0,\"active\":693916,\"inactive\":738360,"
    "\"active_anon\":1644,\"inactive_anon\":101852,\"active_file\":692272,"
    "\"inactive_file\":636508,\"unevictable\":16380,\"mlocked\":15404,"
    "\"swap_total\":0,\"swap_free\":0,\"dirty\":79876,\"write_back\":0,"
    "\"anon_pages\":111104,\"mapped\":148848,\"shmem\":8872,"
    "\"slab\":200044,\"s_reclaimable\":165352,\"s_unclaim\":34692,"
    "\"kernel_stack\":3136,\"page_tables\":3388,\"nfs_unstable\":0,"
    "\"bounce\":0,\"writeback_tmp\":0,\"commit_limit\":12342048,"
    "\"committed_as\":1200148,\"vmalloc_total\":34359738367,"
    "\"vmalloc_used\":15948,\"vmalloc_chunk\":0,\"hardware_corrupted\":0,"
    "\"anon_huge_pages\":0,\"huge_pages_total\":0,\"huge_pages_free\":0,"
    "\"huge_pages_rsvd\":0,\"huge_pages_surp\":0,\"hugepagesize\":2048,"
    "\"direct_map_4k\":28672,\"direct_map_2M\":2068480,"
    "\"direct_map_1G\":25165824},\"DiskStats\":{\"all\":270553174016,"
    "\"used\":19940401152,\"free\":250612772864,\"freeInodes\":16318366},"
    "\"CpuStats\":{\"id\":\"cpu\",\"user\":87060,\"nice\":0,"
    "\"system\":14858,\"idle\":106606,\"iowait\":1419,\"irq\":0,"
    "\"softirq\":358,\"steal\":3304,\"guest\":0,\"guest_nice\":0},"
    "\"LoadStats\":{\"last1min\":1.99,\"last5min\":2.92,\"last15min\":1.73,"
    "\"process_running\":8,\"process_total\":195,\"last_pid\":23382},"
    "\"TaskCount\":0}";

static const char go_node_stats[] =
    "{\"MemStats\":{\"mem_total\":24684096,\"mem_free\":22991548,"
    "\"mem_available\":24149564,\"buffers\":11948,\"cached\":1287180,"
    "\"swap_cached\":0,\"active\":704644,\"inactive\":720088,"
    "\"active_anon\":1632,\"inactive_anon\":132944,\"active_file\":703012,"
    "\"inactive_file\":587144,\"unevictable\":16344,\"mlocked\":15368,"
    "\"swap_total\":0,\"swap_free\":0,\"dirty\":540,\"write_back\":0,"
    "\"anon_pages\":142156,\"mapped\":169240,\"shmem\":8872,"
    "\"slab\":193996,\"s_reclaimable\":159324,\"s_unclaim\":34672,"
    "\"kernel_stack\":3140,\"page_tables\":4016,\"nfs_unstable\":0,"
    "\"bounce\":0,\"writeback_tmp\":0,\"commit_limit\":12342048,"
    "\"committed_as\":1197364,\"vmalloc_total\":34359738367,"
    "\"vmalloc_used\":15916,\"vmalloc_chunk\":0,\"hardware_corrupted\":0,"
    "\"anon_huge_pages\":0,\"huge_pages_total\":0,\"huge_pages_free\":0,"
    "\"huge_pages_rsvd\":0,\"huge_pages_surp\":0,\"hugepagesize\":2048,"
    "\"direct_map_4k\":28672,\"direct_map_2M\":2068480,"
    "\"direct_map_1G\":25165824},\"DiskStats\":{\"all\":270553174016,"
    "\"used\":19860897792,\"free\":250692276224,\"freeInodes\":16322377},"
    "\"CpuStats\":{\"id\":\"cpu\",\"user\":82049,\"nice\":0,"
    "\"system\":14674,\"idle\":105825,\"iowait\":1414,\"irq\":0,"
    "\"softirq\":357,\"steal\":3291,\"guest\":0,\"guest_nice\":0},"
    "\"LoadStats\":{\"last1min\":2.15,\"last5min\":3.03,\"last15min\":1.72,"
    "\"process_running\":6,\"process_total\":197,\"last_pid\":23161},"
    "\"TaskCount\":0}";

static void check_round_trip(const char *text)
{
    struct cube_stats stats;
    struct cube_buf out = {NULL, 0, 0};
    struct cube_err err = {CUBE_OK, ""};

    CHECK_INT(cube_stats_parse(text, strlen(text), &stats, &err), 0);
    CHECK_STR(err.text, "");
    cube_stats_print(&stats, &out);
    CHECK_STR(out.data, text);
    cube_buf_free(&out);
}

TEST(go_stats_print_as_they_were_read)
{
    check_round_trip(go_stats);
    check_round_trip(go_node_stats);
}

TEST(every_number_of_the_go_stats_lands_in_its_place)
{
    struct cube_stats s;

    REQUIRE(cube_stats_parse(go_stats, strlen(go_stats), &s, NULL) == 0);
    CHECK_UINT(s.mem.mem_total, 24684096);
    CHECK_UINT(s.mem.mem_available, 24158876);
    CHECK_UINT(s.mem.write_back, 0);
    CHECK_UINT(s.mem.s_unclaim, 34692);
    CHECK_UINT(s.mem.vmalloc_total, 34359738367);
    CHECK_UINT(s.mem.direct_map_1G, 25165824);
    CHECK_UINT(s.disk.all, 270553174016);
    CHECK_UINT(s.disk.free_inodes, 16318366);
    CHECK_UINT(s.cpu.user, 87060);
    CHECK_UINT(s.cpu.steal, 3304);
    CHECK(s.load.last1min == 1.99);
    CHECK(s.load.last15min == 1.73);
    CHECK_UINT(s.load.process_total, 195);
    CHECK_UINT(s.load.last_pid, 23382);
    CHECK_INT(s.task_count, 0);
    CHECK_STR(s.machine, "");
    CHECK_INT(s.cpus, 0);
}

TEST(own_fields_follow_the_go_fields_and_only_when_set)
{
    struct cube_stats s, back;
    struct cube_buf out = {NULL, 0, 0};

    memset(&s, 0, sizeof s);
    cube_stats_print(&s, &out);
    CHECK(!strstr(out.data, "Machine"));
    CHECK(!strstr(out.data, "Cpus"));
    CHECK_HAS(out.data, "\"last_pid\":0},\"TaskCount\":0}");
    cube_buf_clear(&out);

    s.task_count = 7;
    strcpy(s.machine, "3d1219c7c4c5404aaa1f6d2a48adfda4");
    strcpy(s.engine, "a<b"); /* rules of the wire for strings hold */
    strcpy(s.runtime, "docker");
    s.cpu_use = 0.25;
    s.cpus = 4;
    cube_stats_print(&s, &out);
    CHECK_HAS(out.data, "\"TaskCount\":7,\"Machine\":"
                        "\"3d1219c7c4c5404aaa1f6d2a48adfda4\",\"Engine\":"
                        "\"a\\u003cb\",\"Runtime\":\"docker\",\"CpuUse\":0.25,"
                        "\"Cpus\":4}");
    CHECK_INT(cube_stats_parse(out.data, out.len, &back, NULL), 0);
    CHECK_MEM(&back, &s, sizeof s);
    cube_buf_free(&out);
}

TEST(random_stats_print_and_read_back)
{
    for (int round = 0; round < 50; round++) {
        struct cube_stats s, back;
        struct cube_buf out = {NULL, 0, 0};
        uint64_t *numbers = (uint64_t *)&s.mem;

        memset(&s, 0, sizeof s);
        for (size_t i = 0; i < offsetof(struct cube_stats, load) / 8; i++)
            numbers[i] = test_random() >> (1 + test_below(63));
        s.load.last5min = test_below(100000) / 100.0;
        s.load.last_pid = test_random() >> 1;
        s.cpus = test_below(3);
        s.cpu_use = s.cpus > 0 ? test_below(1000) / 1000.0 : 0;
        cube_stats_print(&s, &out);
        CHECK_INT(cube_stats_parse(out.data, out.len, &back, NULL), 0);
        CHECK_MEM(&back, &s, sizeof s);
        cube_buf_free(&out);
    }
}

TEST(reading_stats_forgives_what_it_does_not_know_and_no_more)
{
    static const struct {
        const char *json;
        int status;
        const char *words; /* of the error, or why it is fine */
    } rows[] = {
        {"{}", 0, "nothing is known"},
        {"{\"MemStats\":null,\"TaskCount\":null}", 0, "Go prints a null for "
         "what it could not read"},
        {"{\"Gpus\":4,\"MemStats\":{\"zram\":{}}}", 0, "a newer worker"},
        {"{\"memstats\":{\"MEM_TOTAL\":5}}", 0, "Go ignores case"},
        {"", -1, "JSON"},
        {"[]", -1, "no object"},
        {"{\"MemStats\":{\"mem_total\":\"5\"}}", -1, "MemStats.mem_total"},
        {"{\"MemStats\":{\"mem_total\":-5}}", -1, "MemStats.mem_total"},
        {"{\"MemStats\":{\"mem_total\":9223372036854775808}}", -1,
         "MemStats.mem_total"},
        {"{\"LoadStats\":{\"last1min\":1e999}}", -1, "LoadStats.last1min"},
        {"{\"LoadStats\":{\"last1min\":-1}}", -1, "LoadStats.last1min"},
        {"{\"TaskCount\":-1}", -1, "TaskCount"},
        {"{\"Cpus\":1.5}", -1, "Cpus"},
        {"{\"CpuUse\":1.5}", -1, "CpuUse"},
        {"{\"Machine\":7}", -1, "Machine"},
        {"{\"Runtime\":\"a name that is longer than any\"}", -1, "Runtime"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_stats s;
        struct cube_err err = {CUBE_OK, ""};

        test_row("%s", rows[i].json);
        CHECK_INT(cube_stats_parse(rows[i].json, strlen(rows[i].json), &s,
                                   &err),
                  rows[i].status);
        if (rows[i].status)
            CHECK_HAS(err.text, rows[i].words);
    }
}

/* ---- /proc ---- */

static const char meminfo[] =
    "MemTotal:       24684096 kB\n"
    "MemFree:        22959224 kB\n"
    "MemAvailable:   24158876 kB\n"
    "Active:           693916 kB\n"
    "Active(anon):       1644 kB\n"
    "Zswap:                12 kB\n"
    "Writeback:             3 kB\n"
    "KReclaimable:     165352 kB\n"
    "SReclaimable:     165350 kB\n"
    "SUnreclaim:        34692 kB\n"
    "HugePages_Total:       9\n"
    "DirectMap2M:     2068480 kB\n";

TEST(meminfo_is_read_by_name_whatever_else_is_in_it)
{
    struct cube_mem m;

    cube_machine_parse_mem(meminfo, strlen(meminfo), &m);
    CHECK_UINT(m.mem_total, 24684096);
    CHECK_UINT(m.mem_free, 22959224);
    CHECK_UINT(m.mem_available, 24158876);
    CHECK_UINT(m.active, 693916);
    CHECK_UINT(m.active_anon, 1644);
    CHECK_UINT(m.write_back, 3);
    CHECK_UINT(m.s_reclaimable, 165350);
    CHECK_UINT(m.s_unclaim, 34692);
    CHECK_UINT(m.huge_pages_total, 9);
    CHECK_UINT(m.direct_map_2M, 2068480);
    CHECK_UINT(m.swap_total, 0);
}

TEST(torn_and_strange_meminfo_never_reads_beyond_its_end)
{
    size_t len = strlen(meminfo);

    for (size_t cut = 0; cut <= len; cut++) {
        char *exact = malloc(cut + 1); /* ASan sees a byte beyond the cut */
        struct cube_mem m;

        memcpy(exact, meminfo, cut);
        exact = realloc(exact, cut ? cut : 1);
        cube_machine_parse_mem(exact, cut, &m);
        if (cut >= 24)
            CHECK_UINT(m.mem_total, 24684096);
        free(exact);
    }
    {
        static const char odd[] = "\n\n: 5\nMemTotal\nMemTotal:\nMemFree: x\n"
                                  "MemFree: 99999999999999999999 kB\n"
                                  "Cached:   7 kB";
        struct cube_mem m;

        cube_machine_parse_mem(odd, strlen(odd), &m);
        CHECK_UINT(m.mem_total, 0);
        CHECK_UINT(m.mem_free, 0);
        CHECK_UINT(m.cached, 7);
    }
}

TEST(stat_gives_the_sum_of_all_cpus_and_how_many_there_are)
{
    static const struct {
        const char *text;
        unsigned user, idle, guest_nice;
        int cpus;
        const char *why;
    } rows[] = {
        {"cpu  87060 0 14858 106606 1419 0 358 3304 0 4\n"
         "cpu0 43530 0 7429 53303 709 0 179 1652 0 0\n"
         "cpu1 43530 0 7429 53303 709 0 179 1652 0 0\n"
         "intr 7 0 0\ncpu9 1 1 1 1\n",
         87060, 106606, 4, 2, "Linux 6; what follows the CPUs is not read"},
        {"cpu  10 1 2 30\ncpu0 10 1 2 30\n", 10, 30, 0, 1,
         "Linux 2.4 had four numbers"},
        {"cpu  10 1 2 30", 10, 30, 0, 0, "torn"},
        {"", 0, 0, 0, 0, "empty"},
        {"ctxt 5\n", 0, 0, 0, 0, "no CPU at all"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_cpu c;
        int64_t cpus;

        test_row("%s", rows[i].why);
        cube_machine_parse_cpu(rows[i].text, strlen(rows[i].text), &c, &cpus);
        CHECK_UINT(c.user, rows[i].user);
        CHECK_UINT(c.idle, rows[i].idle);
        CHECK_UINT(c.guest_nice, rows[i].guest_nice);
        CHECK_INT(cpus, rows[i].cpus);
    }
}

TEST(loadavg_has_three_averages_and_three_counts)
{
    static const char text[] = "1.99 2.92 1.73 8/195 23382\n";
    struct cube_load l;

    cube_machine_parse_load(text, strlen(text), &l);
    CHECK(l.last1min == 1.99);
    CHECK(l.last5min == 2.92);
    CHECK(l.last15min == 1.73);
    CHECK_UINT(l.process_running, 8);
    CHECK_UINT(l.process_total, 195);
    CHECK_UINT(l.last_pid, 23382);
}

/* Found by fuzzing: a float was read by the function for JSON's numbers,
 * which are checked before, and its exponent ran below all limits. */
TEST(loadavg_that_is_no_number_is_zero)
{
    static const char text[] = "1e-e-e-e-e-e-e-e-e-e-e-e-e-e -1 x 8/195 \v\n";
    struct cube_load l;

    cube_machine_parse_load(text, strlen(text), &l);
    CHECK(l.last1min == 0 && l.last5min == 0 && l.last15min == 0);
    CHECK_UINT(l.process_running, 8);
    CHECK_UINT(l.last_pid, 0);
}

TEST(cpu_use_is_the_busy_share_of_what_passed)
{
    static const struct {
        struct cube_cpu before, after;
        double use;
        const char *why;
    } rows[] = {
        {{.user = 100, .idle = 100}, {.user = 150, .idle = 150}, 0.5, "half"},
        {{.user = 100, .system = 20, .idle = 800, .iowait = 80},
         {.user = 130, .system = 30, .idle = 850, .iowait = 90}, 0.4,
         "as it is drawn"},
        {{.idle = 100}, {.idle = 200}, 0, "idle"},
        {{.idle = 100}, {.idle = 150, .iowait = 50}, 0,
         "waiting for a disk leaves the CPU free"},
        {{.user = 9}, {.user = 10, .system = 1, .irq = 1, .softirq = 1,
                       .nice = 1, .steal = 1}, 1, "all of these are busy"},
        {{.user = 100}, {.user = 110, .guest = 10, .idle = 30}, 0.25,
         "guest time is in user already"},
        {{.idle = 50, .iowait = 90}, {.idle = 60, .iowait = 70, .user = 5}, 1,
         "a counter that steps back is no change"},
        {{.user = 7, .idle = 7}, {.user = 7, .idle = 7}, -1, "no tick yet"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        test_row("%s", rows[i].why);
        CHECK(cube_machine_use(&rows[i].before, &rows[i].after) ==
              rows[i].use);
    }
}

/* ---- A machine of texts ---- */

struct fake {
    struct cube_world world;
    const char *meminfo, *stat, *machine_id, *boot_id; /* NULL: no such file */
    const char *open; /* the text of the one open file */
    int64_t now_ms;
    int space_status;
};

static int64_t fake_now_ms(void *ctx)
{
    return ((struct fake *)ctx)->now_ms;
}

static int fake_open(void *ctx, const char *path, unsigned flags)
{
    struct fake *f = ctx;

    (void)flags;
    f->open = strcmp(path, "/proc/meminfo") == 0    ? f->meminfo
              : strcmp(path, "/proc/stat") == 0     ? f->stat
              : strcmp(path, "/proc/loadavg") == 0  ? "0.10 0.20 0.30 1/2 3\n"
              : strcmp(path, "/etc/machine-id") == 0 ? f->machine_id
              : strcmp(path, "/proc/sys/kernel/random/boot_id") == 0
                  ? f->boot_id
                  : NULL;
    return f->open ? 5 : -ENOENT;
}

static int64_t fake_pread(void *ctx, int fd, void *buf, size_t len,
                          int64_t at)
{
    struct fake *f = ctx;
    size_t size = strlen(f->open), from = (size_t)at;
    size_t n = from < size ? size - from : 0;

    CHECK_INT(fd, 5);
    if (n > len)
        n = len;
    memcpy(buf, f->open + from, n);
    return (int64_t)n;
}

static int fake_close(void *ctx, int fd)
{
    (void)ctx;
    CHECK_INT(fd, 5);
    return 0;
}

static int fake_space(void *ctx, const char *path, struct cube_space *out)
{
    CHECK_STR(path, "/");
    out->all = 1000;
    out->free = 400;
    out->free_inodes = 30;
    return ((struct fake *)ctx)->space_status;
}

static struct cube_machine *fake_machine(struct fake *f)
{
    f->world.ctx = f;
    f->world.now_ms = fake_now_ms;
    f->world.open = fake_open;
    f->world.pread = fake_pread;
    f->world.close = fake_close;
    f->world.space = fake_space;
    f->meminfo = meminfo;
    if (!f->stat)
        f->stat = "cpu 10 0 0 90\ncpu0 10 0 0 90\n";
    return cube_machine_new(&f->world);
}

TEST(cpu_use_is_of_the_last_interval)
{
    static const struct {
        int64_t in_ms;
        const char *stat;
        double use;
        const char *why;
    } rows[] = {
        {0, "cpu 10 0 0 90\n", 0.1, "the first is since the start"},
        {100, "cpu 20 0 0 90\n", 0.1, "100 ms are too few ticks"},
        {900, "cpu 50 0 0 150\n", 0.4, "40 of 100 since the first"},
        {1000, "cpu 50 0 0 150\n", 0.4, "no tick: what was known stays"},
        {1000, "cpu 50 0 0 250\n", 0, "idle"},
        {499, "cpu 99 0 0 250\n", 0, "still too few"},
        {1, "cpu 150 0 0 250\n", 1, "busy since that idle reading"},
    };
    struct fake f = {.now_ms = 5000};
    struct cube_machine *m = fake_machine(&f);
    struct cube_stats s;

    memset(&s, 0, sizeof s);
    for (size_t i = 0; i < COUNT(rows); i++) {
        test_row("%s", rows[i].why);
        f.now_ms += rows[i].in_ms;
        f.stat = rows[i].stat;
        CHECK_INT(cube_machine_read(m, "/", &s, NULL), 0);
        CHECK(s.cpu_use == rows[i].use);
    }
    cube_machine_free(m);
}

TEST(a_reading_fills_all_but_what_the_worker_knows)
{
    struct fake f = {.machine_id = "0123456789abcdef0123456789abcdef\n"};
    struct cube_machine *m = fake_machine(&f);
    struct cube_stats s;

    memset(&s, 0, sizeof s);
    s.task_count = 3;
    strcpy(s.engine, "E");
    CHECK_INT(cube_machine_read(m, "/", &s, NULL), 0);
    CHECK_UINT(s.mem.mem_total, 24684096);
    CHECK_UINT(s.disk.all, 1000);
    CHECK_UINT(s.disk.used, 600);
    CHECK_UINT(s.disk.free, 400);
    CHECK_UINT(s.disk.free_inodes, 30);
    CHECK_UINT(s.cpu.idle, 90);
    CHECK_UINT(s.load.last_pid, 3);
    CHECK_INT(s.cpus, 1);
    CHECK_STR(s.machine, "0123456789abcdef0123456789abcdef");
    CHECK_INT(s.task_count, 3);
    CHECK_STR(s.engine, "E");
    cube_machine_free(m);
}

TEST(what_cannot_be_read_is_zero_and_said)
{
    struct fake f = {.machine_id = NULL};
    struct cube_machine *m = fake_machine(&f);
    struct cube_err err = {CUBE_OK, ""};
    struct cube_stats s;

    memset(&s, 0xff, sizeof s);
    f.meminfo = NULL;
    CHECK_INT(cube_machine_read(m, "/", &s, &err), -1);
    CHECK_HAS(err.text, "/proc/meminfo");
    CHECK_UINT(s.mem.mem_total, 0);
    CHECK_UINT(s.disk.all, 1000);
    f.meminfo = meminfo;
    f.space_status = -EIO;
    CHECK_INT(cube_machine_read(m, "/", &s, &err), -1);
    CHECK_HAS(err.text, "space on /");
    CHECK_UINT(s.mem.mem_total, 24684096);
    cube_machine_free(m);
}

TEST(the_machine_id_is_its_own_or_that_of_its_boot)
{
    static const char own[] = "0123456789abcdef0123456789abcdef";
    static const char boot[] = "ac345b70-1cf9-4e30-b7ee-ffbc3313cc92";
    static const struct {
        const char *machine_id, *boot_id, *want, *why;
    } rows[] = {
        {"0123456789abcdef0123456789abcdef\n",
         "ac345b70-1cf9-4e30-b7ee-ffbc3313cc92\n", own, "its own"},
        {NULL, "ac345b70-1cf9-4e30-b7ee-ffbc3313cc92\n", boot, "no file"},
        {"", "ac345b70-1cf9-4e30-b7ee-ffbc3313cc92\n", boot, "an empty file"},
        {"uninitialized\n", "ac345b70-1cf9-4e30-b7ee-ffbc3313cc92\n", boot,
         "the first boot of an image"},
        {NULL, NULL, "", "neither: unknown"},
        {"0123456789abcdef0123456789abcdef0123456789abcdef", NULL, "",
         "too long to be one"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct fake f = {.machine_id = rows[i].machine_id,
                         .boot_id = rows[i].boot_id};
        struct cube_machine *m = fake_machine(&f);
        struct cube_stats s;

        test_row("%s", rows[i].why);
        memset(&s, 0, sizeof s);
        (void)cube_machine_read(m, "/", &s, NULL);
        CHECK_STR(s.machine, rows[i].want);
        cube_machine_free(m);
    }
}

TEST(this_machine_can_be_read)
{
    const struct cube_world *w = cube_world_real();
    struct cube_machine *m = cube_machine_new(w);
    struct cube_err err = {CUBE_OK, ""};
    struct cube_stats s;

    memset(&s, 0, sizeof s);
    CHECK_INT(cube_machine_read(m, "/", &s, &err), 0);
    CHECK_STR(err.text, "");
    CHECK(s.mem.mem_total > 0 && s.mem.mem_total >= s.mem.mem_available);
    CHECK(s.disk.all > 0 && s.disk.all == s.disk.used + s.disk.free);
    CHECK(s.cpus > 0);
    CHECK(s.cpu.idle > 0);
    CHECK(s.cpu_use >= 0 && s.cpu_use <= 1);
    CHECK(strlen(s.machine) >= 32);
    CHECK(s.load.process_total > 0);
    cube_machine_free(m);
}
