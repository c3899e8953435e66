/* The cluster simulator: a manager, five workers with an engine each, and
 * three clients run for ten simulated minutes per seed, with faults by a plan
 * that follows from the seed (sim_faults.h), and everything that must hold is
 * put to the test (sim_checks.h).
 *
 *     build/tests/sim                    the suite: SIM_SEEDS seeds (2000)
 *     build/tests/sim -n 500 [-f 1000]   so many seeds [from that one on]
 *     build/tests/sim -x -n 500          until one of them fails
 *     build/tests/sim -s 42              one seed, with its trace
 *     build/tests/sim -s 42 -k 3,7       with these faults of its plan alone
 *     build/tests/sim -s 42 -k -         with none of them
 *
 * Runs are spread over SIM_JOBS processes (one for each core). A failing seed
 * is printed at once with its command, and in the end the first ones with the
 * shortest list of faults found that still makes them fail in the same way.
 * SIGINT or SIGTERM ends a hunt with the sum so far. Each 20th seed is run
 * twice, and the hashes of both traces must be the same. A kind of fault that
 * was never injected, or an invariant that was never put to the test, fails
 * the suite.
 */
#define _GNU_SOURCE
#include <malloc.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void *room_malloc(size_t size);
static void *room_realloc(void *p, size_t size);
static void room_free(void *p);
#define CUBE_MALLOC(size) room_malloc(size)
#define CUBE_REALLOC(p, size) room_realloc(p, size)
#define CUBE_FREE(p) room_free(p)
#include "../cube.c"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))
#include "sim_world.h"
#include "sim_engine.h"
#include "sim_cluster.h"
#include "sim_clients.h"
#include "sim_faults.h"
#include "sim_checks.h"

#define SIM_FAULTS_END_US (530 * ROOM_SEC)
#define SIM_LOOK_US (SIM_FAULTS_END_US + 60 * ROOM_SEC)
#define SIM_END_US (600 * ROOM_SEC)
#if defined(__SANITIZE_ADDRESS__)
#define SIM_SUITE "30"
#else
#define SIM_SUITE "2000"
#endif
#define SIM_TWICE 20          /* one in so many seeds is run twice */
#define SIM_LONG 500          /* seeds after which all has happened once */
#define SIM_CHILDREN 64
#define SIM_SHRUNK 2          /* failing seeds that are shrunk */
#define SIM_LIMIT_S 60        /* of processor time, for a seed */

static const char sim_crashes[] = "it neither crashes nor hangs";

/* What engines have done, as they count it (struct sim_engine_counts). */
static const struct {
    const char *name;
    size_t at;
} sim_deeds[] = {
    {"answered 500", offsetof(struct sim_engine_counts, errors)},
    {"hung up", offsetof(struct sim_engine_counts, cuts)},
    {"slow", offsetof(struct sim_engine_counts, slow)},
    {"hung", offsetof(struct sim_engine_counts, hung)},
    {"create: name in use", offsetof(struct sim_engine_counts, conflicts)},
    {"start: port taken", offsetof(struct sim_engine_counts, ports_taken)},
    {"start: no such command", offsetof(struct sim_engine_counts, refused)},
    {"pull: not found", offsetof(struct sim_engine_counts, pull_missing)},
    {"pull: failed", offsetof(struct sim_engine_counts, pull_error)},
    {"pull: hung up", offsetof(struct sim_engine_counts, pull_cut)},
    {"pull: slow", offsetof(struct sim_engine_counts, pull_slow)},
    {"ended early", offsetof(struct sim_engine_counts, exit_early)},
    {"killed for memory", offsetof(struct sim_engine_counts, ooms)},
    {"removed by hand", offsetof(struct sim_engine_counts, by_hand)},
    {"back, all run on", offsetof(struct sim_engine_counts, kept)},
    {"back, all ended", offsetof(struct sim_engine_counts, ended)},
    {"back, all gone", offsetof(struct sim_engine_counts, wiped)},
    {"back after a power cut", offsetof(struct sim_engine_counts, powers)},
};
#define SIM_DEEDS COUNT(sim_deeds)

/* What one run gave; sent through a pipe as it is. */
struct sim_outcome {
    uint64_t seed, hash, steps;
    bool is_begin;            /* the seed has only begun */
    char broken[60];          /* "": all held */
    char words[1000];
    long faults[SIM_FAULT_KINDS], checks[SIM_CHECKS], deeds[SIM_DEEDS];
    uint64_t most_connects, most_turns, most_requests, short_calls, torn;
    uint64_t most_bytes[2];
    long tasks, answers, events, resets;
};

/* Which faults of the plan are left in. */
struct sim_keep {
    bool is_all;
    bool list[SIM_FAULTS_MAX];
};

/* ---- One run ---- */

static void sim_outcome_fill(struct sim *s, struct sim_outcome *o)
{
    o->hash = s->room.hash;
    o->steps = s->room.steps;
    (void)snprintf(o->broken, sizeof o->broken, "%s", s->broken);
    (void)snprintf(o->words, sizeof o->words, "%s", s->words);
    o->most_connects = s->most_connects;
    o->most_turns = s->most_turns;
    o->most_requests = (uint64_t)s->most_requests;
    o->short_calls = s->room.short_calls;
    o->torn = s->room.torn + s->room.unsynced_names;
    for (int i = 0; i < 2; i++)
        o->most_bytes[i] = (uint64_t)s->most_bytes[i];
    for (int i = 0; i < SIM_NODES; i++)
        for (size_t k = 0; k < SIM_DEEDS; k++)
            o->deeds[k] += *(int *)((char *)&s->nodes[i].engine->counts +
                                    sim_deeds[k].at);
    o->tasks = s->history->count;
    for (int i = 0; i < SIM_CLIENTS; i++) {
        o->answers += s->clients[i]->answers;
        o->events += s->clients[i]->events;
        o->resets += s->clients[i]->resets;
    }
}

/* The whole life of a cluster. Returns how many faults its plan has. */
static int sim_run_seed(uint64_t seed, const struct sim_keep *keep,
                        bool is_loud, struct sim_outcome *o)
{
    struct sim *s = room_new(sizeof *s);
    struct sim_plan plan;

    memset(o, 0, sizeof *o);
    memset(&plan, 0, sizeof plan);
    o->seed = s->seed = seed;
    s->end_us = SIM_FAULTS_END_US;
    s->faults = &plan;
    s->fault_counts = o->faults;
    s->check_counts = o->checks;
    room_open_world(&s->room, seed);
    s->room.is_loud = is_loud;
    s->room.on_connect = sim_health_asked;
    s->room.connect_arg = s;
    s->is_crowded = seed % 4 == 0;
    sim_plan_make(s, &plan);
    for (int i = 0; i < plan.count; i++)
        plan.list[i].is_left_out = !keep->is_all && !keep->list[i];
    sim_cluster_open(s);
    sim_clients_open(s);
    sim_faults_start(s);
    sim_watch_over(&s->room, s, 0);
    room_at(&s->room, SIM_LOOK_US, sim_final, s, 38);
    room_run(&s->room, SIM_END_US, &s->is_over);
    sim_outcome_fill(s, o);
    sim_clients_close(s);
    sim_cluster_close(s);
    sim_check(s, SIM_CHECK_LEAKS);
    (void)snprintf(o->broken, sizeof o->broken, "%s", s->broken);
    (void)snprintf(o->words, sizeof o->words, "%s", s->words);
    room_close_world(&s->room);
    free(s);
    return plan.count;
}

/* ---- Children ---- */

/* The program's, told by a signal to end. */
static volatile sig_atomic_t sim_is_told;

static void sim_on_signal(int number)
{
    (void)number;
    sim_is_told = 1;
}

/* A seed that takes longer than this, from now on, ends its process. */
static void sim_limit(void)
{
    struct itimerval t = {.it_value = {.tv_sec = SIM_LIMIT_S}};

    (void)setitimer(ITIMER_PROF, &t, NULL);
}

/* Runs seeds first, first + step, ... in a process of its own, which tells of
 * each through the pipe before and after, so that a crash has a seed. */
static pid_t sim_child(int out, uint64_t first, uint64_t end, uint64_t step,
                       const struct sim_keep *keep)
{
    pid_t pid;

    (void)fflush(stdout);
    pid = fork();
    if (pid != 0)
        return pid;
    (void)signal(SIGINT, SIG_IGN); /* its parent ends it */
    (void)signal(SIGTERM, SIG_IGN);
    for (uint64_t seed = first; seed < end; seed += step) {
        struct sim_outcome o, again;

        memset(&o, 0, sizeof o);
        o.seed = seed;
        o.is_begin = true;
        sim_limit();
        if (write(out, &o, sizeof o) < 0)
            _exit(2);
        (void)sim_run_seed(seed, keep, false, &o);
        if (keep->is_all && !*o.broken && seed % SIM_TWICE == 0) {
            (void)sim_run_seed(seed, keep, false, &again);
            if (again.hash != o.hash)
                (void)snprintf(o.broken, sizeof o.broken,
                               "the same seed, the same trace");
        }
        if (write(out, &o, sizeof o) < 0)
            _exit(2);
    }
    _exit(0);
}

/* Runs one seed in a child, so that it may crash. Not to the end when the
 * program is told to end. */
static void sim_try(uint64_t seed, const struct sim_keep *keep,
                    struct sim_outcome *o)
{
    int pipes[2], status = 0;
    ssize_t n;
    pid_t pid;

    if (pipe(pipes) < 0)
        abort();
    pid = sim_child(pipes[1], seed, seed + 1, 1, keep);
    close(pipes[1]);
    do
        n = read(pipes[0], o, sizeof *o);
    while (n == (ssize_t)sizeof *o ||
           (n < 0 && errno == EINTR && !sim_is_told));
    close(pipes[0]);
    if (sim_is_told)
        (void)kill(pid, SIGKILL);
    (void)waitpid(pid, &status, 0);
    if (o->is_begin || status != 0)
        (void)snprintf(o->broken, sizeof o->broken, "%s", sim_crashes);
}

/* ---- Failing seeds ---- */

static void sim_print_kept(const struct sim_keep *keep, int count)
{
    bool is_first = true;

    for (int i = 0; i < count; i++) {
        if (!keep->list[i])
            continue;
        printf("%s%d", is_first ? "" : ",", i);
        is_first = false;
    }
    printf("%s\n", is_first ? "-" : "");
}

/* Leaves out one fault after the other, halves first, as long as the run
 * still breaks the same thing; until none can be left out. */
static void sim_shrink(const struct sim_outcome *bad, struct sim_keep *keep,
                       int count)
{
    bool has_shrunk = false;

    for (int size = count; size > 0; size = has_shrunk ? 1 : size / 2) {
        has_shrunk = false;
        for (int from = 0; from < count; from += size) {
            struct sim_keep less = *keep;
            struct sim_outcome o;
            bool is_less = false;

            for (int i = from; i < from + size && i < count; i++) {
                is_less |= less.list[i];
                less.list[i] = false;
            }
            if (!is_less)
                continue;
            sim_try(bad->seed, &less, &o);
            if (sim_is_told)
                return;
            if (strcmp(o.broken, bad->broken) != 0)
                continue;
            *keep = less;
            has_shrunk = size == 1;
        }
    }
}

static void sim_report(const char *program, const struct sim_outcome *bad)
{
    struct sim_keep keep;
    struct sim s;
    struct sim_plan plan;

    memset(&s, 0, sizeof s);
    s.seed = bad->seed;
    s.end_us = SIM_FAULTS_END_US;
    sim_plan_make(&s, &plan);
    memset(&keep, 0, sizeof keep);
    for (int i = 0; i < plan.count; i++)
        keep.list[i] = true;
    sim_shrink(bad, &keep, plan.count);
    printf("seed %llu:\n", (unsigned long long)bad->seed);
    for (int i = 0; i < plan.count; i++) {
        const struct sim_fault *f = &plan.list[i];

        if (keep.list[i])
            printf("  fault %d: %s on host %d, %.3f s to %.3f s\n", i,
                   sim_fault_rows[f->kind].name, f->host,
                   (double)f->at_us / 1e6, (double)(f->at_us + f->for_us) /
                       1e6);
    }
    printf("  shorter: %s -s %llu -k ", program,
           (unsigned long long)bad->seed);
    sim_print_kept(&keep, plan.count);
}

/* ---- Many seeds ---- */

struct sim_sum {
    const char *program;
    struct sim_outcome all;
    long passed, failed;
    struct sim_outcome bad[SIM_SHRUNK];
};

/* Said at once: the hunt may be ended by force. */
static void sim_print_bad(const struct sim_sum *sum,
                          const struct sim_outcome *o)
{
    printf("FAILED seed %llu, the %ldth: %s: %s\n  again: %s -s %llu\n",
           (unsigned long long)o->seed, sum->passed + sum->failed, o->broken,
           o->words, sum->program, (unsigned long long)o->seed);
    (void)fflush(stdout);
}

static uint64_t sim_larger(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

static void sim_sum_add(struct sim_sum *sum, const struct sim_outcome *o)
{
    struct sim_outcome *all = &sum->all;

    if (*o->broken && sum->failed < SIM_SHRUNK)
        sum->bad[sum->failed] = *o;
    sum->failed += *o->broken != 0;
    sum->passed += *o->broken == 0;
    if (*o->broken)
        sim_print_bad(sum, o);
    for (size_t i = 0; i < SIM_DEEDS; i++)
        all->deeds[i] += o->deeds[i];
    for (int i = 0; i < SIM_FAULT_KINDS; i++)
        all->faults[i] += o->faults[i];
    for (int i = 0; i < SIM_CHECKS; i++)
        all->checks[i] += o->checks[i];
    all->steps += o->steps;
    all->most_connects = sim_larger(all->most_connects, o->most_connects);
    all->most_turns = sim_larger(all->most_turns, o->most_turns);
    all->most_requests = sim_larger(all->most_requests, o->most_requests);
    for (int i = 0; i < 2; i++)
        all->most_bytes[i] = sim_larger(all->most_bytes[i], o->most_bytes[i]);
    all->short_calls += o->short_calls;
    all->torn += o->torn;
    all->tasks += o->tasks;
    all->answers += o->answers;
    all->events += o->events;
    all->resets += o->resets;
}

struct sim_job {
    pid_t pid;
    int in;
    uint64_t next, now;       /* to run, and under way */
    bool has_begun;
};

/* Reads what one child tells; when it has crashed, another one goes on. False:
 * it is done. */
static bool sim_job_read(struct sim_job *j, struct sim_sum *sum, uint64_t end,
                         uint64_t step, const struct sim_keep *keep)
{
    struct sim_outcome o;
    int pipes[2];

    if (j->pid > 0 && read(j->in, &o, sizeof o) == (ssize_t)sizeof o) {
        j->has_begun = o.is_begin;
        j->now = o.seed;
        j->next = o.seed + step;
        if (!o.is_begin)
            sim_sum_add(sum, &o);
        return true;
    }
    if (j->pid > 0) {
        close(j->in);
        (void)waitpid(j->pid, NULL, 0);
        if (j->has_begun) {
            memset(&o, 0, sizeof o);
            o.seed = j->now;
            (void)snprintf(o.broken, sizeof o.broken, "%s", sim_crashes);
            sim_sum_add(sum, &o);
        }
    }
    if (j->next >= end)
        return false;
    if (pipe(pipes) < 0)
        abort();
    j->has_begun = false;
    j->pid = sim_child(pipes[1], j->next, end, step, keep);
    close(pipes[1]);
    j->in = pipes[0];
    return true;
}

/* Ends the children. */
static void sim_stop_many(const struct sim_job *list, int jobs)
{
    for (int i = 0; i < jobs; i++) {
        if (list[i].pid <= 0)
            continue;
        (void)kill(list[i].pid, SIGKILL);
        (void)waitpid(list[i].pid, NULL, 0);
        close(list[i].in);
    }
}

static void sim_run_many(uint64_t first, uint64_t count, int jobs,
                         bool until_bad, struct sim_sum *sum)
{
    struct sim_keep keep = {.is_all = true};
    struct sim_job list[SIM_CHILDREN];
    struct pollfd fds[SIM_CHILDREN];
    int open = jobs;

    memset(list, 0, sizeof list);
    for (int i = 0; i < jobs; i++) {
        list[i].next = first + (uint64_t)i;
        (void)sim_job_read(&list[i], sum, first + count, (uint64_t)jobs,
                           &keep);
    }
    while (open > 0) {
        if (sim_is_told || (until_bad && sum->failed > 0)) {
            sim_stop_many(list, jobs);
            return;
        }
        open = 0;
        for (int i = 0; i < jobs; i++) {
            fds[i].fd = list[i].pid > 0 ? list[i].in : -1;
            fds[i].events = POLLIN;
            fds[i].revents = 0;
            open += fds[i].fd >= 0;
        }
        if (open == 0 || poll(fds, (nfds_t)jobs, -1) < 0)
            continue;
        for (int i = 0; i < jobs; i++)
            if (fds[i].revents &&
                !sim_job_read(&list[i], sum, first + count, (uint64_t)jobs,
                              &keep))
                list[i].pid = 0;
    }
}

/* Prints one. Is it zero? */
static int sim_print_count(const char *what, uint64_t count, const char *name)
{
    printf("%s %8llu  %s\n", what, (unsigned long long)count, name);
    return count == 0;
}

/* Prints the counts. Returns how many of them are zero and must not be. Some of
 * what engines do comes once in twenty seeds: not surely in the few that are
 * run under the sanitizers. */
static int sim_print_sum(const struct sim_sum *sum, long ms)
{
    const struct sim_outcome *all = &sum->all;
    bool is_long = sum->passed + sum->failed >= SIM_LONG;
    int zeros = 0;

    for (int i = 0; i < SIM_FAULT_KINDS; i++)
        zeros += sim_print_count("fault ", (uint64_t)all->faults[i],
                                 sim_fault_rows[i].name);
    zeros += sim_print_count("fault ", all->short_calls,
                             "short reads and writes");
    zeros += sim_print_count("fault ", all->torn,
                             "unsynced sectors and names lost");
    for (size_t i = 0; i < SIM_DEEDS; i++)
        zeros += sim_print_count("engine", (uint64_t)all->deeds[i],
                                 sim_deeds[i].name) && is_long;
    for (int i = 0; i < SIM_CHECKS; i++)
        zeros += sim_print_count("check ", (uint64_t)all->checks[i],
                                 sim_check_names[i]);
    printf("%ld seeds in %.1f s, %llu steps; %ld tasks, %ld answers, "
           "%ld events, %ld resets; at most %llu connections, %llu turns of "
           "one process, %llu requests to one engine in a second, %llu KiB "
           "in a manager, %llu in a worker\n",
           sum->passed + sum->failed, (double)ms / 1000,
           (unsigned long long)all->steps, all->tasks, all->answers,
           all->events, all->resets, (unsigned long long)all->most_connects,
           (unsigned long long)all->most_turns,
           (unsigned long long)all->most_requests,
           (unsigned long long)all->most_bytes[0] >> 10,
           (unsigned long long)all->most_bytes[1] >> 10);
    return zeros;
}

static long sim_clock_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static int sim_many(const char *program, uint64_t first, uint64_t count,
                    int jobs, bool is_suite, bool until_bad)
{
    struct sim_sum *sum = room_new(sizeof *sum);
    struct sigaction told = {.sa_handler = sim_on_signal};
    long begin = sim_clock_ms();
    int zeros, bad;

    (void)sigaction(SIGINT, &told, NULL);
    (void)sigaction(SIGTERM, &told, NULL);
    sum->program = program;
    sim_run_many(first, count, jobs, until_bad, sum);
    zeros = sim_print_sum(sum, sim_clock_ms() - begin);
    if (sim_is_told)
        printf("ended by a signal, of %llu seeds\n",
               (unsigned long long)count);
    for (int i = 0; i < SIM_SHRUNK && i < sum->failed && !until_bad &&
                    !sim_is_told; i++)
        sim_report(program, &sum->bad[i]);
    if (is_suite && zeros > 0)
        printf("FAILED: %d counts are zero\n", zeros);
    printf("%ld passed, %ld failed, 0 skipped\n", sum->passed,
           sum->failed + (is_suite && zeros > 0));
    bad = sum->failed > 0 || (is_suite && zeros > 0) || sim_is_told;
    free(sum);
    return bad;
}

/* ---- The command line ---- */

static int sim_one(uint64_t seed, const char *kept)
{
    struct sim_keep keep = {.is_all = kept == NULL};
    struct sim_outcome o;

    for (const char *p = kept; p && *p; p += strcspn(p, ",")) {
        p += *p == ',';
        if (*p >= '0' && *p <= '9' && atoi(p) < SIM_FAULTS_MAX)
            keep.list[atoi(p)] = true;
    }
    (void)sim_run_seed(seed, &keep, true, &o);
    printf("seed %llu: hash %016llx, %llu steps: %s%s%s\n",
           (unsigned long long)seed, (unsigned long long)o.hash,
           (unsigned long long)o.steps, *o.broken ? o.broken : "all holds",
           *o.broken ? ": " : "", o.words);
    return *o.broken != 0;
}

int main(int argc, char **argv)
{
    const char *seeds = getenv("SIM_SEEDS"), *jobs = getenv("SIM_JOBS");
    const char *one = NULL, *kept = NULL, *count = NULL, *first = "1";
    int workers = jobs ? atoi(jobs) : (int)sysconf(_SC_NPROCESSORS_ONLN);
    bool until_bad = false;
    int option;

    while ((option = getopt(argc, argv, "s:k:n:f:j:x")) > 0) {
        if (option == 's')
            one = optarg;
        else if (option == 'k')
            kept = optarg;
        else if (option == 'n')
            count = optarg;
        else if (option == 'f')
            first = optarg;
        else if (option == 'x')
            until_bad = true;
        else if (option == 'j')
            workers = atoi(optarg);
        else
            return 2;
    }
    if (one)
        return sim_one(strtoull(one, NULL, 0), kept);
    workers = workers < 1 ? 1 : workers > SIM_CHILDREN ? SIM_CHILDREN
                                                       : workers;
    return sim_many(argv[0], strtoull(first, NULL, 0),
                    strtoull(count   ? count
                             : seeds ? seeds
                                     : SIM_SUITE, NULL, 0),
                    workers, !count, until_bad);
}
