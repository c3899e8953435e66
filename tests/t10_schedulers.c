/*
 * Chapter 10, Schedulers: who may run a task and the words for who may not;
 * the numbers of E-PVM against those that Python's decimals give; and what
 * holds for every scheduler on random clusters.
 */
#include "test.h"

#define KB_OF_GIB (1024 * 1024) /* in kB */
#define GIB ((int64_t)1 << 30)

/* ---- Clusters made by hand ---- */

struct cluster {
    struct cube_node nodes[24];
    struct cube_stats stats[24];
    char names[24][16];
    size_t count;
    struct cube_task *task; /* the one to place */
    struct cube_task *other; /* one to promise */
};

/* `count` nodes n00:1, n01:1, ... alike: 8 GiB, 4 cores, 100 GiB, idle. */
static struct cluster *cluster_new(size_t count)
{
    struct cluster *c = cube_alloc(sizeof *c);

    c->count = count;
    for (size_t i = 0; i < count; i++) {
        struct cube_stats *s = &c->stats[i];

        snprintf(c->names[i], sizeof c->names[i], "n%02zu:1", i);
        snprintf(s->machine, sizeof s->machine, "machine-%zu", i);
        strcpy(s->runtime, "docker");
        s->mem.mem_total = s->mem.mem_available = 8 * KB_OF_GIB;
        s->disk.all = s->disk.free = 100 * (uint64_t)GIB;
        s->cpus = 4;
        c->nodes[i].name = c->names[i];
        c->nodes[i].is_up = true;
        c->nodes[i].stats = s;
    }
    c->task = cube_task_new();
    c->other = cube_task_new();
    cube_task_set(&c->task->image, "nginx");
    cube_task_set(&c->other->name, "web");
    return c;
}

static void cluster_free(struct cluster *c)
{
    for (size_t i = 0; i < c->count; i++)
        cube_node_clear(&c->nodes[i]);
    cube_task_free(c->task);
    cube_task_free(c->other);
    cube_free(c);
}

static struct cube_placement placement(const struct cluster *c)
{
    struct cube_placement p = {c->task, c->nodes, c->count, NULL, 0};

    return p;
}

/* The node that a scheduler names, or its reason in `why`. */
static const char *place(const struct cube_scheduler *s,
                         const struct cluster *c, struct cube_buf *why)
{
    struct cube_placement p = placement(c);
    const struct cube_node *node = cube_schedule(s, &p, why);

    return node ? node->name : NULL;
}

/* Checks the reason for which `node` is refused; NULL: it fits. */
static void check_fits(const struct cluster *c, size_t node, const char *why)
{
    struct cube_placement p = placement(c);
    struct cube_buf got = {NULL, 0, 0};
    bool fits = cube_schedule_fits(&p, &c->nodes[node], &got);

    CHECK_INT(fits, !why);
    CHECK_STR(got.len ? got.data : NULL, why);
    cube_buf_free(&got);
}

/* ---- Candidates ---- */

TEST(a_task_fits_where_all_that_it_needs_remains)
{
    static const struct {
        int64_t mem, disk, promised_mem, promised_disk;
        double cpu, promised_cpu;
        int64_t mem_free, disk_free;
        const char *why; /* NULL: it fits */
    } rows[] = {
        {0, 0, 0, 0, 0, 0, 8 * GIB, 100 * GIB, NULL},
        {8 * GIB, 0, 0, 0, 0, 0, 8 * GIB, 100 * GIB, NULL},
        {8 * GIB + 1, 0, 0, 0, 0, 0, 8 * GIB, 100 * GIB,
         "needs 8.1 GiB of memory, 8 GiB left"},
        /* promised, if not used yet */
        {8 * GIB, 0, 6 * GIB, 0, 0, 0, 8 * GIB, 100 * GIB,
         "needs 8 GiB of memory, 2 GiB left"},
        {2 * GIB, 0, 6 * GIB, 0, 0, 0, 8 * GIB, 100 * GIB, NULL},
        /* used, if by nobody that we know */
        {GIB, 0, 0, 0, 0, 0, 600 << 20, 100 * GIB,
         "needs 1 GiB of memory, 600 MiB left"},
        /* promised too much (it was restored, or shrank) */
        {1, 0, 9 * GIB, 0, 0, 0, 8 * GIB, 100 * GIB,
         "needs 1 bytes of memory, 0 bytes left"},
        {0, 0, 9 * GIB, 0, 0, 9, 8 * GIB, 100 * GIB, NULL},
        {0, 0, INT64_MAX, 0, 0, 0, 8 * GIB, 100 * GIB, NULL},
        {INT64_MAX, 0, 0, 0, 0, 0, 8 * GIB, 100 * GIB,
         "needs 8192 PiB of memory, 8 GiB left"},
        {0, 50 * GIB, 0, 60 * GIB, 0, 0, 8 * GIB, 100 * GIB,
         "needs 50 GiB of disk, 40 GiB left"},
        {0, 50 * GIB, 0, 0, 0, 0, 8 * GIB, 20 * GIB,
         "needs 50 GiB of disk, 20 GiB left"},
        {0, 0, 0, 0, 4, 0, 8 * GIB, 100 * GIB, NULL},
        {0, 0, 0, 0, 4, 2.5, 8 * GIB, 100 * GIB,
         "needs 4 cores, 1.5 left"},
        {0, 0, 0, 0, 0.05, 3.96, 8 * GIB, 100 * GIB,
         "needs 0.05 cores, 0.04 left"},
        {0, 0, 0, 0, 1e300, 0, 8 * GIB, 100 * GIB,
         "needs 1000000000 cores, 4 left"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cluster *c = cluster_new(1);

        test_row("row %zu", i);
        c->task->mem_bytes = rows[i].mem;
        c->task->disk_bytes = rows[i].disk;
        c->task->cpu = rows[i].cpu;
        c->other->mem_bytes = rows[i].promised_mem;
        c->other->disk_bytes = rows[i].promised_disk;
        c->other->cpu = rows[i].promised_cpu;
        cube_node_promise(&c->nodes[0], c->other);
        c->stats[0].mem.mem_available = (uint64_t)rows[i].mem_free / 1024;
        c->stats[0].disk.free = (uint64_t)rows[i].disk_free;
        check_fits(c, 0, rows[i].why);
        cluster_free(c);
    }
}

TEST(ten_tenths_of_a_core_fill_one_core)
{
    struct cluster *c = cluster_new(1);

    c->stats[0].cpus = 1;
    c->task->cpu = c->other->cpu = 0.1;
    for (int i = 0; i < 10; i++) {
        check_fits(c, 0, NULL);
        cube_node_promise(&c->nodes[0], c->other);
    }
    check_fits(c, 0, "needs 0.1 cores, 0 left");
    cluster_free(c);
}

TEST(cores_are_not_counted_where_nobody_knows_them)
{
    struct cluster *c = cluster_new(1);

    c->stats[0].cpus = 0; /* a worker of the Go implementation */
    c->stats[0].runtime[0] = 0;
    c->task->cpu = 64;
    check_fits(c, 0, NULL);
    cluster_free(c);
}

TEST(memory_is_estimated_where_the_kernel_does_not_say_what_is_available)
{
    struct cluster *c = cluster_new(1);

    c->stats[0].mem.mem_available = 0;
    c->stats[0].mem.mem_free = KB_OF_GIB;
    c->stats[0].mem.buffers = KB_OF_GIB;
    c->stats[0].mem.cached = KB_OF_GIB;
    c->task->mem_bytes = 3 * GIB;
    check_fits(c, 0, NULL);
    c->task->mem_bytes = 4 * GIB;
    check_fits(c, 0, "needs 4 GiB of memory, 3 GiB left");
    cluster_free(c);
}

TEST(a_node_must_answer_have_sent_metrics_and_not_have_failed_the_task)
{
    struct cluster *c = cluster_new(1);
    struct cube_placement p = placement(c);
    struct cube_buf why = {NULL, 0, 0};

    c->nodes[0].is_up = false;
    check_fits(c, 0, "does not answer");
    c->nodes[0].why_down = "lost 12 s ago";
    check_fits(c, 0, "lost 12 s ago");
    c->nodes[0].is_up = true;
    check_fits(c, 0, NULL);
    c->nodes[0].stats = NULL;
    check_fits(c, 0, "has sent no metrics yet");
    c->nodes[0].stats = &c->stats[0];
    p.avoid = "n00:1";
    CHECK(!cube_schedule_fits(&p, &c->nodes[0], &why));
    CHECK_STR(why.data, "the task has failed there");
    cube_buf_free(&why);
    cluster_free(c);
}

TEST(containers_go_to_engines_and_commands_to_processes)
{
    static const struct {
        const char *runtime, *image, *cmd, *why;
    } rows[] = {
        {"docker", "nginx", NULL, NULL},
        {"podman", "nginx", "sh", NULL},
        {"", "nginx", NULL, NULL},
        {"process", "nginx", "sh", NULL},
        {"process", "", "sh", NULL},
        {"process", "nginx", NULL,
         "has no engine, and the task no Cmd that could run as a process"},
        {"docker", "", "sh", "runs containers, and the task has no Image"},
        {"", "", "sh", "runs containers, and the task has no Image"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cluster *c = cluster_new(1);

        test_row("row %zu", i);
        strcpy(c->stats[0].runtime, rows[i].runtime);
        cube_task_set(&c->task->image, rows[i].image);
        if (rows[i].cmd)
            cube_task_add(&c->task->cmd, rows[i].cmd);
        check_fits(c, 0, rows[i].why);
        cluster_free(c);
    }
}

/* ---- Ports ---- */

TEST(a_host_port_is_given_once)
{
    static const struct {
        const char *port, *host_port, *taken_port, *taken_host, *why;
    } rows[] = {
        {"80/tcp", "8080", "80/tcp", "8080",
         "host port 8080 is taken by task web"},
        {"80", "8080", "7777/tcp", "8080",
         "host port 8080 is taken by task web"},
        {"80/tcp", "8080", "80/tcp", "8081", NULL},
        {"53/udp", "53", "53/tcp", "53", NULL},
        {"53/udp", "53", "5353/udp", "53",
         "host port 53/udp is taken by task web"},
        {"80/tcp", "", "80/tcp", "8080", NULL},
        {"80/tcp", "0", "80/tcp", "8080", NULL},
        {"80/tcp", "", "80/tcp", "", NULL},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        for (int is_observed = 0; is_observed < 2; is_observed++) {
            struct cluster *c = cluster_new(1);

            test_row("row %zu, %s", i, is_observed ? "observed" : "promised");
            cube_task_publish(c->task, rows[i].port, rows[i].host_port);
            if (is_observed) /* also a port that the engine chose */
                cube_task_bind(c->other, rows[i].taken_port, "0.0.0.0",
                               rows[i].taken_host);
            else
                cube_task_publish(c->other, rows[i].taken_port,
                                  rows[i].taken_host);
            cube_node_promise(&c->nodes[0], c->other);
            check_fits(c, 0, rows[i].why);
            cluster_free(c);
        }
    }
}

TEST(a_port_that_is_asked_for_and_observed_counts_once)
{
    struct cluster *c = cluster_new(1);

    cube_task_publish(c->other, "80/tcp", "8080");
    cube_task_bind(c->other, "80/tcp", "0.0.0.0", "8080");
    cube_task_bind(c->other, "80/tcp", "::", "8080");
    cube_node_promise(&c->nodes[0], c->other);
    CHECK_UINT(c->nodes[0].port_count, 1);
    cube_node_clear(&c->nodes[0]);
    CHECK_UINT(c->nodes[0].port_count, 0);
    CHECK_INT(c->nodes[0].promised.tasks, 0);
    cluster_free(c);
}

TEST(workers_of_one_machine_or_one_engine_share_what_there_is)
{
    static const struct {
        const char *name, *machine, *engine;    /* of the second worker */
        bool shares;
        const char *why;
    } rows[] = {
        {"b:1", "other", "", false, "another machine"},
        {"b:1", "m", "", true, "one machine under two names"},
        {"b:1", "other", "e", true, "two machines at one engine"},
        {"b:1", "m", "f", true, "two engines on one machine"},
        {"a:2", "other", "", false, "forwarded ports: the IDs decide"},
        {"a:2", "", "", true, "no ID: then the host's name does"},
        {"b:1", "", "", false, "no ID, and another host"},
        {"a", "", "", true, "a name without a port"},
        {"ab:1", "", "", false, "a host whose name begins alike"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cluster *c = cluster_new(2);

        test_row("%s", rows[i].why);
        strcpy(c->names[0], "a:1");
        strcpy(c->stats[0].machine, "m");
        strcpy(c->stats[0].engine, "e");
        strcpy(c->names[1], rows[i].name);
        strcpy(c->stats[1].machine, rows[i].machine);
        strcpy(c->stats[1].engine, rows[i].engine);
        cube_task_publish(c->task, "80/tcp", "8080");
        cube_task_publish(c->other, "80/tcp", "8080");
        cube_node_promise(&c->nodes[1], c->other);
        check_fits(c, 0, rows[i].shares ? "host port 8080 is taken by task "
                                          "web" : NULL);
        check_fits(c, 1, "host port 8080 is taken by task web");

        cube_node_clear(&c->nodes[1]);
        cube_task_free(c->task);
        c->task = cube_task_new();
        cube_task_set(&c->task->image, "nginx");
        c->task->mem_bytes = 5 * GIB;
        c->other->mem_bytes = 4 * GIB;
        cube_node_promise(&c->nodes[1], c->other);
        check_fits(c, 0, rows[i].shares
                             ? "needs 5 GiB of memory, 4 GiB left" : NULL);
        cluster_free(c);
    }
}

TEST(a_task_is_not_hindered_by_the_port_that_it_leaves)
{
    struct cluster *c = cluster_new(2);

    strcpy(c->stats[1].machine, c->stats[0].machine);
    strcpy(c->task->id, "efeadce0-d016-4a39-882a-d2c5196cce1c");
    strcpy(c->other->id, "0b5e55ed-0000-4000-8000-00000000000a");
    cube_task_publish(c->task, "80/tcp", "8080");
    cube_task_publish(c->other, "80/tcp", "9090");
    cube_node_promise(&c->nodes[0], c->task);
    check_fits(c, 1, NULL);
    cube_task_publish(c->task, "443/tcp", "9090");
    check_fits(c, 1, NULL);
    cube_node_promise(&c->nodes[0], c->other);
    check_fits(c, 1, "host port 9090 is taken by task web");
    cluster_free(c);
}

TEST(a_promise_names_a_task_without_name_by_its_id)
{
    struct cluster *c = cluster_new(1);

    cube_task_set(&c->other->name, "");
    strcpy(c->other->id, "efeadce0-d016-4a39-882a-d2c5196cce1c");
    cube_task_publish(c->task, "80/tcp", "80");
    cube_task_publish(c->other, "80/tcp", "80");
    cube_node_promise(&c->nodes[0], c->other);
    check_fits(c, 0, "host port 80 is taken by task "
                     "efeadce0-d016-4a39-882a-d2c5196cce1c");
    cluster_free(c);
}

/* ---- Reasons ---- */

TEST(a_task_that_fits_nowhere_is_told_why_for_each_node)
{
    struct cluster *c = cluster_new(2);
    struct cube_scheduler *s = cube_scheduler_new("epvm", NULL);
    struct cube_buf why = {NULL, 0, 0};

    strcpy(c->names[0], "a:5556");
    strcpy(c->names[1], "b:5557");
    c->stats[0].mem.mem_available = 2200000;
    c->stats[1].mem.mem_total = c->stats[1].mem.mem_available =
        16 * KB_OF_GIB;
    c->task->mem_bytes = 8 * GIB;
    cube_task_publish(c->task, "80/tcp", "8080");
    cube_task_publish(c->other, "80/tcp", "8080");
    cube_node_promise(&c->nodes[1], c->other);
    CHECK_STR(place(s, c, &why), NULL);
    CHECK_STR(why.data,
              "node a:5556: needs 8 GiB of memory, 2 GiB left; "
              "node b:5557: host port 8080 is taken by task web");
    cube_buf_clear(&why);
    c->stats[0].mem.mem_available = 2300000;
    CHECK_STR(place(s, c, &why), NULL);
    CHECK_HAS(why.data, "needs 8 GiB of memory, 2.1 GiB left");
    CHECK_STR(place(s, c, NULL), NULL);

    /* and is placed once one fits, and then there is nothing to say */
    cube_buf_clear(&why);
    cube_node_clear(&c->nodes[1]);
    CHECK_STR(place(s, c, &why), "b:5557");
    CHECK_STR(why.data, "");
    cube_buf_free(&why);
    cube_scheduler_free(s);
    cluster_free(c);
}

/* What is drawn where numbers are put into words. */
TEST(numbers_are_rounded_against_the_task)
{
    static const struct {
        double cores; /* below 0: bytes */
        int64_t bytes;
        bool is_need;
        const char *want;
    } rows[] = {
        {0.101, 0, true, "0.11"},
        {1.999, 0, false, "1.99"},
        {-1, GIB + 1, true, "1.1 GiB"},
        {-1, 2 * GIB - 1, false, "1.9 GiB"},
        {-1, 1536 << 10, true, "1.5 MiB"},
        {-1, 1536 << 10, false, "1.5 MiB"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_buf got = {NULL, 0, 0};

        test_row("%s", rows[i].want);
        if (rows[i].cores >= 0)
            cube_sched_put_cores(&got, rows[i].cores, rows[i].is_need);
        else
            cube_sched_put_bytes(&got, rows[i].bytes, rows[i].is_need);
        CHECK_STR(got.data, rows[i].want);
        cube_buf_free(&got);
    }
}

/* What is drawn at the opening of candidates. */
TEST(what_is_left_is_the_lesser_of_unpromised_and_available)
{
    struct cluster *c = cluster_new(1);

    c->other->mem_bytes = 6 * GIB;
    cube_node_promise(&c->nodes[0], c->other);
    c->stats[0].mem.mem_available = KB_OF_GIB;
    c->task->mem_bytes = 3 * GIB / 2;
    check_fits(c, 0, "needs 1.5 GiB of memory, 1 GiB left");
    cluster_free(c);
}

/* What is drawn at the opening of loads. */
TEST(load_is_the_larger_of_what_is_used_and_what_is_promised)
{
    struct cluster *c = cluster_new(1);
    struct cube_placement p = placement(c);
    struct cube_sched_load load;

    c->stats[0].mem.mem_available = 6 * KB_OF_GIB;
    c->stats[0].cpu_use = 0.5;
    c->other->mem_bytes = 4 * GIB;
    c->other->cpu = 1;
    cube_node_promise(&c->nodes[0], c->other);
    c->task->mem_bytes = 2 * GIB;
    c->task->cpu = 1;
    load = cube_sched_load(&p, &c->nodes[0]);
    CHECK_INT((int)(load.mem * 100), 50);
    CHECK_INT((int)(load.mem_added * 100), 25);
    CHECK_INT((int)(load.cpu * 100), 50);
    CHECK_INT((int)(load.cpu_added * 100), 25);
    CHECK_INT((int)load.jobs, 1);
    cluster_free(c);
}

TEST(reasons_of_a_large_cluster_end_in_a_count)
{
    static struct cube_node nodes[1000];
    static char names[1000][16];
    struct cube_scheduler *s = cube_scheduler_new("greedy", NULL);
    struct cube_task *task = cube_task_new();
    struct cube_placement p = {task, nodes, COUNT(nodes), NULL, 0};
    struct cube_buf why = {NULL, 0, 0};

    for (size_t i = 0; i < COUNT(nodes); i++) {
        snprintf(names[i], sizeof names[i], "node%zu:5556", i);
        nodes[i].name = names[i];
    }
    CHECK(!cube_schedule(s, &p, &why));
    CHECK(why.len < CUBE_SCHED_WHY_MAX + 100);
    CHECK_HAS(why.data, "node node0:5556: does not answer; node node1:5556");
    CHECK_HAS(why.data, " more nodes");
    p.node_count = 0;
    cube_buf_clear(&why);
    CHECK(!cube_schedule(s, &p, &why));
    CHECK_STR(why.data, "there is no node yet");
    cube_buf_free(&why);
    cube_task_free(task);
    cube_scheduler_free(s);
}

/* ---- Round robin ---- */

TEST(round_robin_gives_each_node_the_same)
{
    struct cluster *c = cluster_new(7);
    struct cube_scheduler *s = cube_scheduler_new("roundrobin", NULL);
    int got[7] = {0};

    for (int i = 0; i < 70; i++) {
        const char *name = place(s, c, NULL);

        REQUIRE(name);
        CHECK_INT(atoi(name + 1), i % 7);
        got[atoi(name + 1)]++;
    }
    for (int i = 0; i < 7; i++)
        CHECK_INT(got[i], 10);
    cube_scheduler_free(s);
    cluster_free(c);
}

TEST(round_robin_goes_on_when_nodes_come_and_go)
{
    struct cluster *c = cluster_new(4);
    struct cube_scheduler *s = cube_scheduler_new("roundrobin", NULL);
    struct cube_scheduler *mine = cube_scheduler_new("roundrobin", NULL);

    CHECK_STR(place(s, c, NULL), "n00:1");
    CHECK_STR(place(s, c, NULL), "n01:1");
    CHECK_STR(place(mine, c, NULL), "n00:1"); /* another one's own turn */
    c->nodes[1].is_up = c->nodes[2].is_up = false;
    CHECK_STR(place(s, c, NULL), "n03:1");
    CHECK_STR(place(s, c, NULL), "n00:1");
    c->nodes[1].is_up = true;
    CHECK_STR(place(s, c, NULL), "n01:1");
    cube_scheduler_free(mine);
    cube_scheduler_free(s);
    cluster_free(c);
}

/* ---- Greedy ---- */

TEST(greedy_takes_the_node_whose_scarcest_resource_is_least_loaded)
{
    static const struct {
        double use[2];            /* measured share of the CPUs */
        int64_t mem_used_gib[2];  /* measured, of 8 */
        double promised_cpu[2];   /* of 4 cores */
        const char *want, *why;
    } rows[] = {
        {{0, 0}, {0, 0}, {0, 0}, "n00:1", "equal: the first by name"},
        {{0.5, 0.4}, {0, 0}, {0, 0}, "n01:1", "CPU is the scarcest"},
        {{0.1, 0.4}, {6, 2}, {0, 0}, "n01:1", "memory is for n00"},
        {{0.1, 0.1}, {0, 0}, {3, 1}, "n01:1", "promised, not used yet"},
        {{0.9, 0.1}, {0, 0}, {1, 2}, "n01:1", "used, not promised"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cluster *c = cluster_new(2);
        struct cube_scheduler *s = cube_scheduler_new("greedy", NULL);

        test_row("%s", rows[i].why);
        for (size_t n = 0; n < 2; n++) {
            c->stats[n].cpu_use = rows[i].use[n];
            c->stats[n].mem.mem_available -=
                (uint64_t)rows[i].mem_used_gib[n] * KB_OF_GIB;
            c->other->cpu = rows[i].promised_cpu[n];
            c->other->mem_bytes = 1;
            cube_node_promise(&c->nodes[n], c->other);
        }
        CHECK_STR(place(s, c, NULL), rows[i].want);
        cube_scheduler_free(s);
        cluster_free(c);
    }
}

/* Metrics are a second old, and twenty tasks come at once that ask for
 * nothing in particular: nobody may get them all. */
TEST(tasks_between_two_metrics_spread)
{
    static const char *const names[] = {"roundrobin", "greedy", "epvm"};

    for (size_t k = 0; k < COUNT(names); k++) {
        struct cluster *c = cluster_new(4);
        struct cube_scheduler *s = cube_scheduler_new(names[k], NULL);

        test_row("%s", names[k]);
        c->stats[2].cpu_use = 0.05; /* a little busier than the rest */
        for (int i = 0; i < 20; i++) {
            const char *name = place(s, c, NULL);

            REQUIRE(name);
            cube_node_promise(&c->nodes[atoi(name + 1)], c->task);
        }
        for (size_t i = 0; i < 4; i++)
            CHECK(c->nodes[i].promised.tasks >= 4 &&
                  c->nodes[i].promised.tasks <= 6);
        cube_scheduler_free(s);
        cluster_free(c);
    }
}

/* On a busy machine its two workers measured the same CPUs in two moments, 0.92
 * and 1.0, and twenty tasks went to the first of them. */
TEST(workers_of_one_machine_are_given_tasks_in_turn_whatever_each_measures)
{
    static const char *const names[] = {"roundrobin", "greedy", "epvm"};

    for (size_t k = 0; k < COUNT(names); k++) {
        struct cluster *c = cluster_new(2);
        struct cube_scheduler *s = cube_scheduler_new(names[k], NULL);

        test_row("%s", names[k]);
        strcpy(c->stats[1].machine, c->stats[0].machine);
        c->stats[0].cpu_use = 1;
        c->stats[1].cpu_use = 0.92;
        c->stats[1].mem.mem_available -= KB_OF_GIB;
        for (int i = 0; i < 20; i++) {
            const char *name = place(s, c, NULL);

            REQUIRE(name);
            cube_node_promise(&c->nodes[atoi(name + 1)], c->task);
        }
        CHECK_INT(c->nodes[0].promised.tasks, 10);
        CHECK_INT(c->nodes[1].promised.tasks, 10);
        cube_scheduler_free(s);
        cluster_free(c);
    }
}

/* ---- E-PVM ---- */

static bool is_near(double got, double want)
{
    double off = got - want, size = want < 0 ? -want : want;

    return (off < 0 ? -off : off) <= size * 1e-13;
}

TEST(powers_are_those_of_python)
{
    static const struct {
        double base, x, want; /* decimal, 40 digits, rounded */
    } rows[] = {
        {2, 0, 1.00000000000000000e+00},
        {2, 1, 2.00000000000000000e+00},
        {2, 0.5, 1.41421356237309515e+00},
        {2, 0.001, 1.00069338746258074e+00},
        {3, 0.3333, 1.44219675550442195e+00},
        {3, 0.999999, 2.99999670416494446e+00},
        {7, 1.75, 3.01246194946119523e+01},
        {10, 0.1, 1.25892541179416728e+00},
        {10, 2.0000001, 1.00000023025853537e+02},
        {100, 0.015625, 1.07460782832131740e+00},
        {1000, 0.9, 5.01187233627272349e+02},
        {1000, 3.25, 5.62341325190349102e+09},
        {65536, 1.5, 1.67772160000000000e+07},
        {2, 39.5, 7.77472127993868774e+11},
        {1000, 40, 9.99999999999999980e+119},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        double got = cube_sched_pow(rows[i].base, rows[i].x);

        test_row("%g^%g = %.17g", rows[i].base, rows[i].x, got);
        CHECK(is_near(got, rows[i].want));
    }
    /* b^x b^(1-x) = b, all over the range */
    for (int i = 0; i < 2000; i++) {
        double base = 1 + test_below(1000000) / 100.0;
        double x = test_below(1000001) / 1000000.0;

        test_row("%.17g^%.17g", base, x);
        CHECK(is_near(cube_sched_pow(base, x) * cube_sched_pow(base, 1 - x),
                      base));
    }
}

TEST(marginal_costs_are_those_of_python)
{
    static const struct {
        double n, before, added, want;
    } rows[] = {
        {2, 0, 1, 1.00000000000000000e+00},
        {2, 0, 0.25, 1.89207115002721027e-01}, /* as drawn in chapter 10 */
        {2, 0, 0.5, 4.14213562373095145e-01},
        {2, 0.25, 0.25, 2.25006447370373980e-01},
        {2, 0.5, 0.25, 2.67579268134334025e-01},
        {5, 0.1, 0.0001, 1.89062839803917339e-04},
        {5, 0.9, 0.0001, 6.85144507235166248e-04},
        {100, 0.5, 0.5, 9.00000000000000000e+01},
        {100, 0.999, 0.001, 4.59458264847303788e-01},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        double got = cube_sched_marginal(rows[i].n, rows[i].before,
                                         rows[i].added);
        double off = got / rows[i].want - 1;

        test_row("row %zu: %.17g", i, got);
        CHECK(off < 1e-10 && off > -1e-10);
    }
    CHECK(cube_sched_marginal(1e6, 1e300, 1e300) <= 1e300 * 1e180);
    CHECK(cube_sched_marginal(1e3, 1e300, 1e300) < 1e300);
}

/* Three nodes up, so n = 3; one task on the second, so L = 2. */
TEST(the_cost_is_the_sum_over_memory_cpu_and_jobs)
{
    struct cluster *c = cluster_new(4);
    struct cube_placement p = placement(c);
    double want;

    c->nodes[3].is_up = false;
    c->task->mem_bytes = 2 * GIB;                            /* 1/4 */
    c->task->cpu = 1;                                        /* 1/4 */
    c->stats[0].mem.mem_available = 6 * KB_OF_GIB;           /* 1/4 used */
    c->stats[0].cpu_use = 0.5;
    c->other->mem_bytes = 4 * GIB;                           /* 1/2 promised */
    c->other->cpu = 1;                                       /* 1/4 */
    cube_node_promise(&c->nodes[1], c->other);
    p.most_tasks = 1;

    /* python: 3**.5-3**.25 + 3**.75-3**.5 + 3**.5-3**0 */
    want = cube_sched_pow(3, 0.5) - cube_sched_pow(3, 0.25) +
           cube_sched_pow(3, 0.75) - cube_sched_pow(3, 0.5) +
           cube_sched_pow(3, 0.5) - 1;
    CHECK(is_near(cube_sched_epvm(NULL, &p, &c->nodes[0]), want));
    CHECK(is_near(want, 1.6954838515711623));
    /* python: 3**.75-3**.5 + 3**.5-3**.25 + 3**1-3**.5 */
    CHECK(is_near(cube_sched_epvm(NULL, &p, &c->nodes[1]),
                  cube_sched_pow(3, 0.75) - cube_sched_pow(3, 0.25) + 3 -
                      cube_sched_pow(3, 0.5)));
    cluster_free(c);
}

static int64_t told_most;

static double most_told(void *ctx, const struct cube_placement *p,
                        const struct cube_node *node)
{
    struct cube_scheduler *epvm = ctx;

    told_most = p->most_tasks;
    return epvm->score(epvm->ctx, p, node);
}

/* L was of workers and the load of machines: two workers on one machine made
 * its jobs count double against memory and CPU. Five tasks there, four on the
 * other one: L is 8, and four are half of it, not all. */
TEST(the_most_jobs_are_those_of_a_machine)
{
    struct cluster *c = cluster_new(3);
    struct cube_scheduler *epvm = cube_scheduler_new("epvm", NULL);
    struct cube_scheduler mine = {"mine", epvm, NULL, most_told, NULL};

    strcpy(c->stats[0].machine, "m1");
    strcpy(c->stats[1].machine, "m1");
    strcpy(c->stats[2].machine, "m2");
    for (int i = 0; i < 9; i++)
        cube_node_promise(&c->nodes[i < 2 ? 0 : i < 5 ? 1 : 2], c->other);
    CHECK(place(&mine, c, NULL) != NULL);
    CHECK_INT(told_most, 5);
    c->nodes[0].is_up = c->nodes[1].is_up = false;
    CHECK(place(&mine, c, NULL) != NULL);
    CHECK_INT(told_most, 4); /* only machines that are there */
    cube_scheduler_free(epvm);
    cluster_free(c);
}

TEST(epvm_takes_the_node_where_the_task_costs_least)
{
    static const struct {
        double use[2];
        int64_t mem_used_gib[2];
        int tasks[2];
        double cpu;
        int64_t mem_gib;
        const char *want, *why;
    } rows[] = {
        {{0, 0}, {0, 0}, {0, 0}, 1, 1, "n00:1", "equal: by name"},
        {{0.6, 0.1}, {0, 0}, {0, 0}, 1, 1, "n01:1",
         "the CPU counts, which cancelled itself out in the Go program"},
        {{0, 0}, {4, 1}, {0, 0}, 1, 1, "n01:1", "memory counts"},
        {{0, 0}, {0, 0}, {3, 1}, 0, 0, "n01:1", "jobs count"},
        {{0.7, 0.1}, {0, 4}, {0, 0}, 0.1, 4, "n00:1",
         "a task for memory goes to the busy node with free memory"},
        {{0.7, 0.1}, {0, 4}, {0, 0}, 1, 1, "n01:1",
         "and a task for the CPU to the other"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cluster *c = cluster_new(2);
        struct cube_scheduler *s = cube_scheduler_new("epvm", NULL);

        test_row("%s", rows[i].why);
        for (size_t n = 0; n < 2; n++) {
            c->stats[n].cpu_use = rows[i].use[n];
            c->stats[n].mem.mem_available -=
                (uint64_t)rows[i].mem_used_gib[n] * KB_OF_GIB;
            for (int k = 0; k < rows[i].tasks[n]; k++)
                cube_node_promise(&c->nodes[n], c->other);
        }
        c->task->cpu = rows[i].cpu;
        c->task->mem_bytes = rows[i].mem_gib * GIB;
        CHECK_STR(place(s, c, NULL), rows[i].want);
        cube_scheduler_free(s);
        cluster_free(c);
    }
}

/* The Go program gave a worker that cannot be reached the score 0, the best
 * there is, and then crashed on the delivery. */
TEST(a_node_that_does_not_answer_is_never_the_cheapest)
{
    static const char *const names[] = {"roundrobin", "greedy", "epvm"};

    for (size_t k = 0; k < COUNT(names); k++) {
        struct cluster *c = cluster_new(3);
        struct cube_scheduler *s = cube_scheduler_new(names[k], NULL);

        test_row("%s", names[k]);
        c->nodes[0].is_up = false;
        c->nodes[0].stats = NULL;
        c->nodes[1].stats = NULL; /* answers, and has said nothing yet */
        c->stats[2].cpu_use = 1;
        CHECK_STR(place(s, c, NULL), "n02:1");
        cube_scheduler_free(s);
        cluster_free(c);
    }
}

/* ---- What holds for each of them ---- */

static void randomize_node(struct cluster *c, size_t i)
{
    struct cube_stats *s = &c->stats[i];
    char port[8];

    s->mem.mem_total = test_below(16 * KB_OF_GIB);
    s->mem.mem_available = test_below((uint32_t)s->mem.mem_total + 1);
    s->disk.all = test_below(1000) * (uint64_t)GIB;
    s->disk.free = s->disk.all / (1 + test_below(3));
    s->cpus = test_below(9);
    s->cpu_use = test_below(1001) / 1000.0;
    snprintf(s->machine, sizeof s->machine, "%u", test_below(8));
    c->nodes[i].is_up = test_below(5) > 0;
    if (test_below(10) == 0)
        c->nodes[i].stats = NULL;
    for (uint32_t k = test_below(4); k > 0; k--) {
        struct cube_task *t = cube_task_new();

        t->cpu = test_below(30) / 10.0;
        t->mem_bytes = test_below(4096) * ((int64_t)1 << 20);
        snprintf(port, sizeof port, "%u", 1 + test_below(5));
        cube_task_publish(t, "80/tcp", port);
        cube_node_promise(&c->nodes[i], t);
        cube_task_free(t);
    }
}

/* The task fits by sums that are written out here once more, plainly. */
static bool model_fits(const struct cluster *c, size_t at)
{
    const struct cube_node *n = &c->nodes[at];
    int64_t mem = c->task->mem_bytes;
    double cpu = c->task->cpu;
    int port = c->task->port_bindings.count
                   ? atoi(c->task->port_bindings.list[0].host_port) : 0;

    if (!n->is_up || !n->stats)
        return false;
    for (size_t i = 0; i < c->count; i++) {
        const struct cube_node *o = &c->nodes[i];

        /* hosts differ, so without stats nobody shares */
        if (i != at && (!o->stats ||
                        strcmp(o->stats->machine, n->stats->machine)))
            continue;
        mem += o->promised.mem_bytes;
        cpu += o->promised.cpu;
        for (size_t k = 0; k < o->port_count; k++) {
            if (o->ports[k].number == port)
                return false;
        }
    }
    if (c->task->mem_bytes > 0 &&
        (mem > (int64_t)n->stats->mem.mem_total * 1024 ||
         c->task->mem_bytes > (int64_t)n->stats->mem.mem_available * 1024))
        return false;
    return c->task->cpu == 0 || n->stats->cpus == 0 ||
           cpu <= (double)n->stats->cpus + 1e-9;
}

TEST(no_scheduler_takes_a_node_that_does_not_fit_or_refuses_all_that_do)
{
    static const char *const names[] = {"roundrobin", "greedy", "epvm"};
    int placed = 0, refused = 0;

    for (int round = 0; round < 2000; round++) {
        struct cluster *c = cluster_new(1 + test_below(8));
        struct cube_scheduler *s =
            cube_scheduler_new(names[test_below(3)], NULL);
        struct cube_buf why = {NULL, 0, 0};
        const char *name, *again;
        size_t fit = 0;
        char port[8];

        test_row("round %d, %s", round, s->name);
        for (size_t i = 0; i < c->count; i++)
            randomize_node(c, i);
        c->task->cpu = test_below(30) / 10.0;
        c->task->mem_bytes = test_below(2) ? test_below(4096) * (GIB / 1024)
                                           : 0;
        snprintf(port, sizeof port, "%u", 1 + test_below(5));
        if (test_below(2))
            cube_task_publish(c->task, "80/tcp", port);
        for (size_t i = 0; i < c->count; i++)
            fit += model_fits(c, i) ? 1 : 0;
        name = place(s, c, &why);
        CHECK_INT(name != NULL, fit > 0);
        if (name) {
            CHECK(model_fits(c, (size_t)atoi(name + 1)));
            placed++;
        } else {
            for (size_t i = 0; i < c->count; i++)
                CHECK_HAS(why.data, c->names[i]);
            refused++;
        }
        again = place(s, c, NULL);
        if (strcmp(s->name, "roundrobin"))
            CHECK_STR(again, name); /* equal input, equal answer */
        cube_buf_free(&why);
        cube_scheduler_free(s);
        cluster_free(c);
    }
    CHECK(placed > 500 && refused > 200); /* both sides were tried */
}

/* The answer depends on names, not on the order in which nodes are given. */
TEST(the_order_of_the_nodes_does_not_matter)
{
    static const char *const names[] = {"greedy", "epvm"};

    for (int round = 0; round < 500; round++) {
        struct cluster *c = cluster_new(6);
        struct cube_scheduler *s =
            cube_scheduler_new(names[round % 2], NULL);
        const char *first;

        test_row("round %d", round);
        for (size_t i = 0; i < c->count; i++)
            c->stats[i].cpu_use = test_below(3) / 10.0; /* many are equal */
        first = place(s, c, NULL);
        for (size_t i = 5; i > 0; i--) {
            size_t j = test_below((uint32_t)i + 1);
            struct cube_node swap = c->nodes[i];

            c->nodes[i] = c->nodes[j];
            c->nodes[j] = swap;
        }
        CHECK_STR(place(s, c, NULL), first);
        cube_scheduler_free(s);
        cluster_free(c);
    }
}

/* ---- A scheduler of one's own ---- */

/* Tasks go where their name says: "n02-web" to n02. */
static bool pin_candidate(void *ctx, const struct cube_placement *p,
                          const struct cube_node *node, struct cube_buf *why)
{
    ++*(int *)ctx;
    if (!cube_schedule_fits(p, node, why))
        return false;
    if (strncmp(p->task->name, node->name, 3) == 0)
        return true;
    cube_buf_printf(why, "the name %s belongs elsewhere", p->task->name);
    return false;
}

static double most_free_disk(void *ctx, const struct cube_placement *p,
                             const struct cube_node *node)
{
    (void)ctx;
    (void)p;
    return -(double)node->stats->disk.free;
}

static size_t pick_last(void *ctx, const struct cube_placement *p,
                        const struct cube_choice *choices, size_t count)
{
    (void)p;
    (void)choices;
    return count - 1 + (ctx ? 1 : 0);
}

TEST(each_step_can_be_written_by_the_program)
{
    struct cluster *c = cluster_new(4);
    int calls = 0;
    struct cube_scheduler pin = {"pin", &calls, pin_candidate, NULL, NULL};
    struct cube_scheduler disk = {"disk", NULL, NULL, most_free_disk, NULL};
    struct cube_scheduler last = {"last", NULL, NULL, NULL, pick_last};
    struct cube_scheduler none = {.name = "none"};
    struct cube_buf why = {NULL, 0, 0};

    cube_task_set(&c->task->name, "n02-web");
    CHECK_STR(place(&pin, c, NULL), "n02:1");
    CHECK_INT(calls, 4);
    c->nodes[2].is_up = false;
    CHECK_STR(place(&pin, c, &why), NULL);
    CHECK_HAS(why.data, "node n01:1: the name n02-web belongs elsewhere; "
                        "node n02:1: does not answer");
    cube_buf_clear(&why);

    c->stats[1].disk.all = c->stats[1].disk.free = 500 * (uint64_t)GIB;
    CHECK_STR(place(&disk, c, NULL), "n01:1");
    CHECK_STR(place(&last, c, NULL), "n03:1");
    last.ctx = &calls; /* an index beyond: none */
    CHECK_STR(place(&last, c, &why), NULL);
    CHECK_HAS(why.data, "scheduler last chose none of 3 nodes");

    /* no step at all: what fits, with the fewest tasks */
    cube_node_promise(&c->nodes[0], c->other);
    CHECK_STR(place(&none, c, NULL), "n01:1");
    cube_buf_free(&why);
    cluster_free(c);
}

TEST(a_scheduler_of_an_unknown_name_is_refused_in_words)
{
    struct cube_err err = {CUBE_OK, ""};

    CHECK(!cube_scheduler_new("random", &err));
    CHECK_INT(err.code, CUBE_EINVAL);
    CHECK_STR(err.text, "there is no scheduler \"random\", only roundrobin, "
                        "greedy and epvm");
    cube_scheduler_free(NULL);
}
