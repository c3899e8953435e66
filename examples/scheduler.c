/*
 * A scheduler of your own: tasks whose name begins with "db-" go to the node
 * with the most free disk, all others to where they cost least.
 *
 *     scheduler                   decides on nodes that are made by hand
 *     scheduler HOST:PORT,...     is a manager of these workers
 *
 *     cc -o scheduler examples/scheduler.c cube.c
 *
 * A scheduler is three steps: candidates, score, pick. This one leaves two of
 * them to Cube and writes the second.
 */
#include "../cube.h"

#include <stdio.h>
#include <string.h>

#define GIB ((int64_t)1 << 30)

/* Lower is better: the node with the most free disk has the lowest score.
 * All others are left to E-PVM, which is kept in `ctx`. */
static double score(void *ctx, const struct cube_placement *p,
                    const struct cube_node *node)
{
    const struct cube_scheduler *epvm = ctx;

    if (strncmp(p->task->name, "db-", 3) == 0)
        return -(double)node->stats->disk.free;
    return epvm->score(epvm->ctx, p, node);
}

/* A node that has said: so much memory and disk, so busy. */
static void fill(struct cube_node *node, struct cube_stats *stats,
                 const char *name, int64_t mem_gib, int64_t disk_gib,
                 double cpu_use)
{
    memset(node, 0, sizeof *node);
    memset(stats, 0, sizeof *stats);
    stats->mem.mem_total = (uint64_t)mem_gib << 20; /* kB */
    stats->mem.mem_available = stats->mem.mem_total;
    stats->disk.all = stats->disk.free = (uint64_t)(disk_gib * GIB);
    stats->cpus = 4;
    stats->cpu_use = cpu_use;
    node->name = name;
    node->is_up = true;
    node->stats = stats;
}

static void decide(const struct cube_scheduler *s, struct cube_node *nodes,
                   size_t count, const char *name, int64_t mem_bytes)
{
    struct cube_task *task = cube_task_new();
    struct cube_placement p = {task, nodes, count, NULL, 0};
    struct cube_buf why = {NULL, 0, 0};
    const struct cube_node *where;

    cube_task_set(&task->name, name);
    cube_task_set(&task->image, "example");
    task->mem_bytes = mem_bytes;
    where = cube_schedule(s, &p, &why);
    if (where) {
        printf("%-9s goes to %s\n", name, where->name);
        cube_node_promise(&nodes[where - nodes], task);
    } else {
        printf("%-9s waits: %s\n", name, why.data);
    }
    cube_buf_free(&why);
    cube_task_free(task);
}

/* A manager calls the same functions, with the nodes that it knows. */
static int serve(const struct cube_scheduler *s, const char *workers)
{
    struct cube_err err = {CUBE_OK, ""};
    struct cube_loop *l = cube_loop_new(cube_world_real(), &err);
    struct cube_manager_options o = {
        .store = "memory", .workers = workers, .scheduler = s};
    struct cube_manager *m = l ? cube_manager_new(l, &o, &err) : NULL;

    if (m)
        (void)cube_loop_run(l, &err); /* until it fails, or Ctrl-C */
    fprintf(stderr, "scheduler: %s\n", err.text);
    cube_manager_free(m);
    cube_loop_free(l);
    return 1;
}

static void show(const struct cube_scheduler *mine)
{
    struct cube_stats stats[3];
    struct cube_node nodes[3];

    fill(&nodes[0], &stats[0], "small:5556", 4, 100, 0.05);
    fill(&nodes[1], &stats[1], "large:5556", 16, 200, 0.60);
    fill(&nodes[2], &stats[2], "store:5556", 8, 2000, 0.90);

    decide(mine, nodes, 3, "web", 1 * GIB);
    decide(mine, nodes, 3, "db-users", 2 * GIB);
    decide(mine, nodes, 3, "db-orders", 2 * GIB);
    decide(mine, nodes, 3, "cache", 6 * GIB);
    decide(mine, nodes, 3, "huge", 64 * GIB);

    for (size_t i = 0; i < 3; i++)
        cube_node_clear(&nodes[i]);
}

int main(int argc, char **argv)
{
    struct cube_scheduler *epvm = cube_scheduler_new("epvm", NULL);
    struct cube_scheduler mine = {"database", epvm, NULL, score, NULL};
    int status = 0;

    if (argc > 1)
        status = serve(&mine, argv[1]);
    else
        show(&mine);
    cube_scheduler_free(epvm);
    return status;
}
