/*
 * cube: the command line of Cube, and its largest example. It uses nothing
 * but cube.h and libc.
 *
 *     cube manager                         a manager on 127.0.0.1:5555
 *     cube worker --join localhost:5555    a worker on 127.0.0.1:5556
 *     cube run -p 8080:80 nginx:latest     a task, on some worker
 *     cube status                          what runs where
 *
 * Two tables stand at the beginning: the commands, and their flags. All that
 * depends on them is made from them: the parser, its complaints, the help,
 * and what a shell completes. So a flag that is added to its table is parsed,
 * checked, explained and completed without a further line.
 *
 * In the order of the file:
 *
 *     the tables           what there is
 *     the command line     struct line: which command, flags, arguments
 *     help, completion     the tables for people, and for shells
 *     texts                sizes, durations, ages, tables
 *     the servers          manager, worker, dev
 *     run                  from flags to a task
 *     the clients          status, stop, node, logs, ...
 *
 * Exit codes: 0 done, 1 the work failed, 2 wrong usage, 3 no manager answered.
 */

#define _POSIX_C_SOURCE 200809L
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "../cube.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))
#define ID_SHOWN 8 /* digits of an ID in tables */
#define HOUR_NS (3600 * INT64_C(1000000000))
#define FILE_MAX_BYTES (1 << 20) /* of a task file */

enum exit_code { DONE = 0, FAILED = 1, USAGE = 2, NO_MANAGER = 3 };

/* ---- The tables ---- */

enum flag_id {
    F_ADVERTISE, F_ALL, F_ALLOW_HOST, F_AT, F_COUNT, F_CPU, F_DATA, F_DB,
    F_DETACH, F_DISK, F_ENV, F_EPOCH, F_FILE, F_FOLLOW, F_FORCE, F_HEALTH,
    F_HEALTH_INTERVAL, F_HEALTH_RETRIES, F_HEALTH_START, F_HEALTH_TIMEOUT,
    F_HELP, F_HOST, F_JOIN, F_KEEP, F_LOST_AFTER, F_MANAGER, F_MEMORY,
    F_NAME, F_OUTPUT, F_PORT, F_PUBLISH, F_RESTART, F_RUNTIME, F_SCHEDULER,
    F_STOP_GRACE, F_TAIL, F_TAKE_OVER, F_TOKEN_FILE, F_VERBOSE, F_WORKERS
};

/*
 * One flag of one or several commands. `values` says what it takes: words
 * with bars between them are all there is; a word with @ names a kind of
 * thing that a shell can complete (@task, @node, @any, @file, @dir).
 */
struct flag {
    enum flag_id id;
    char letter;          /* 0: it has none */
    const char *name;
    const char *commands; /* with commas between them; "*": all */
    const char *value;    /* in the help; NULL: a switch, which takes none */
    const char *values;   /* NULL: anything */
    const char *help;
};

#define SERVERS "manager,worker,dev"
#define CLIENTS \
    "run,status,stop,node,node rm,logs,inspect,events,history,rm,backup"

static const struct flag flags[] = {
    {F_HOST, 'H', "host", "manager,worker", "ADDRESS", NULL,
     "Address to listen on (127.0.0.1; with a token 0.0.0.0)"},
    {F_PORT, 'p', "port", "manager", "PORT", NULL,
     "Port to listen on (5555)"},
    {F_PORT, 'p', "port", "worker", "PORT", NULL,
     "Port to listen on (5556)"},
    {F_PORT, 'p', "port", "dev", "PORT", NULL,
     "Port of the manager; the workers take the next ones (5555)"},
    {F_WORKERS, 'w', "workers", "manager", "HOST:PORT,...", NULL,
     "Workers on which the manager will schedule tasks (localhost:5556; "
     "\"\": none but those that join)"},
    {F_NAME, 'n', "name", "worker", "NAME", NULL,
     "Name of the worker, and of its files (the host's, and the port)"},
    {F_COUNT, 'n', "nodes", "dev", "N", NULL, "Number of workers (2)"},
    {F_SCHEDULER, 's', "scheduler", "manager,dev", "NAME",
     "epvm|greedy|roundrobin", "What chooses the node of a task (epvm)"},
    {F_DB, 'd', "dbType", "manager,dev", "KIND", "persistent|memory",
     "Where state is kept (persistent)"},
    {F_DB, 'd', "dbtype", "worker", "KIND", "persistent|memory",
     "Where state is kept (persistent)"},
    {F_RUNTIME, 'r', "runtime", "worker,dev", "KIND",
     "auto|docker|podman|process",
     "What runs the tasks; auto takes the first that answers (auto)"},
    {F_DATA, 0, "data", SERVERS, "DIR", "@dir",
     "Directory of the state (root: /var/lib/cube; others: "
     "$XDG_STATE_HOME/cube)"},
    {F_JOIN, 0, "join", "worker", "HOST:PORT", NULL,
     "Manager to register with"},
    {F_ADVERTISE, 0, "advertise", "worker", "HOST:PORT", NULL,
     "Address under which the manager reaches this worker"},
    {F_TAKE_OVER, 0, "take-over", "worker", NULL, NULL,
     "Leave the cluster this worker belongs to for that of the "
     "next manager that speaks to it"},
    {F_KEEP, 0, "keep", SERVERS, "TIME", NULL,
     "How long finished tasks are remembered (168h)"},
    {F_LOST_AFTER, 0, "lost-after", "manager,dev", "TIME", NULL,
     "Silence after which a node counts as lost (5s)"},
    {F_EPOCH, 0, "epoch", "manager", "N", NULL,
     "Begin with this epoch at least: after a backup was put in place, where "
     "no worker can be asked"},
    {F_ALLOW_HOST, 0, "allow-host", SERVERS, "NAME", NULL,
     "Also accept requests that call this server NAME, and not by an "
     "address, localhost or this machine's name; repeatable"},

    {F_FILE, 'f', "filename", "run", "FILE", "@file",
     "Task or TaskEvent as JSON; - is standard input (task.json)"},
    {F_NAME, 0, "name", "run", "NAME", NULL, "Name of the task"},
    {F_PUBLISH, 'p', "publish", "run", "PORT", NULL,
     "Port of the task: 80 or 53/udp; with its port on the host: "
     "8080:80; repeatable"},
    {F_ENV, 'e', "env", "run", "NAME[=VALUE]", NULL,
     "Environment variable, by default with its value here; "
     "repeatable"},
    {F_MEMORY, 0, "memory", "run", "SIZE", NULL, "Memory, as in 64m or 1g"},
    {F_CPU, 0, "cpu", "run", "CORES", NULL, "CPU, as in 0.5"},
    {F_DISK, 0, "disk", "run", "SIZE", NULL, "Disk, as in 10g"},
    {F_RESTART, 0, "restart", "run", "POLICY",
     "no|on-failure|always|unless-stopped",
     "What happens when it ends by itself (on-failure)"},
    {F_HEALTH, 0, "health", "run", "PATH", NULL,
     "Path that answers a GET with 2xx or 3xx while the task is well"},
    {F_HEALTH_START, 0, "health-start", "run", "TIME", NULL,
     "Time a task has until it must be well (30s)"},
    {F_HEALTH_INTERVAL, 0, "health-interval", "run", "TIME", NULL,
     "Time between two checks (10s)"},
    {F_HEALTH_TIMEOUT, 0, "health-timeout", "run", "TIME", NULL,
     "Time a check may take (5s)"},
    {F_HEALTH_RETRIES, 0, "health-retries", "run", "N", NULL,
     "Failed checks in a row that fail the task (3)"},
    {F_STOP_GRACE, 0, "stop-grace", "run", "TIME", NULL,
     "Time between SIGTERM and SIGKILL (10s)"},
    {F_DETACH, 'd', "detach", "run,stop", NULL, NULL,
     "Do not wait until it is so"},

    {F_ALL, 'a', "all", "status", NULL, NULL,
     "Show also what ended more than an hour ago"},
    {F_AT, 0, "at", "status,node", "TIME", NULL,
     "Show what was then: 10:32, -5m, \"2006-01-02 10:32\", or a time of "
     "RFC 3339"},
    {F_FOLLOW, 'f', "follow", "logs,events", NULL, NULL,
     "Wait for more, until interrupted"},
    {F_TAIL, 'n', "tail", "logs", "N", NULL, "Only the last N lines"},
    {F_FORCE, 'f', "force", "rm", NULL, NULL, "Stop it first if it runs"},
    {F_FORCE, 'f', "force", "backup", NULL, NULL,
     "Replace FILE if it is there"},

    {F_MANAGER, 'm', "manager", CLIENTS, "HOST:PORT", NULL,
     "Manager to talk to; also an http:// or https:// URL "
     "(localhost:5555)"},
    {F_OUTPUT, 'o', "output", "run,status,node,events,history", "FORMAT",
     "text|json", "For people, or for programs (text)"},
    {F_TOKEN_FILE, 0, "token-file", SERVERS "," CLIENTS, "FILE", "@file",
     "File with the cluster's token ($CUBE_TOKEN); servers accept "
     "two, one a line"},
    {F_VERBOSE, 'v', "verbose", SERVERS, NULL, NULL, "Log more"},
    {F_HELP, 'h', "help", "*", NULL, NULL, "Explain the command"},
};

struct app;

struct command {
    const char *name;     /* one word or two */
    const char *args;     /* as the help shows them */
    const char *summary;  /* NULL: the help does not list it */
    const char *details;
    int min_args, max_args;
    const char *values;   /* of its arguments, as in struct flag */
    int (*run)(struct app *);
    bool has_words;       /* words that follow the first are not ours */
};

static int run_manager(struct app *);
static int run_worker(struct app *);
static int run_dev(struct app *);
static int run_run(struct app *);
static int run_status(struct app *);
static int run_stop(struct app *);
static int run_rm(struct app *);
static int run_node(struct app *);
static int run_node_rm(struct app *);
static int run_logs(struct app *);
static int run_inspect(struct app *);
static int run_events(struct app *);
static int run_history(struct app *);
static int run_backup(struct app *);
static int run_store_check(struct app *);
static int run_store_dump(struct app *);
static int run_store_compact(struct app *);
static int run_completion(struct app *);
static int run_help(struct app *);
static int run_version(struct app *);
static int run_complete(struct app *);

static const struct command commands[] = {
    {"manager", "", "Run a manager, which places tasks on workers",
     "A manager accepts tasks, places each on a node that has room for it,\n"
     "and watches over it: the tasks of a node that is lost are started\n"
     "again elsewhere. SIGTERM ends it and leaves the tasks running.",
     0, 0, NULL, run_manager, false},
    {"worker", "", "Run a worker, which runs the tasks of one machine",
     "A worker runs the tasks it is given, as containers of Docker or Podman\n"
     "or as processes, checks their health, and starts them again when they\n"
     "fail. SIGTERM ends it and leaves the tasks running.\n"
     "\n"
     "Docker is looked for at $DOCKER_HOST, else /var/run/docker.sock; Podman\n"
     "at $CONTAINER_HOST, else at the user's socket, or root's.",
     0, 0, NULL, run_worker, false},
    {"dev", "", "Run a manager and some workers in one process, to try things",
     "All of them listen on loopback. SIGTERM or Ctrl-C ends them and leaves\n"
     "the tasks running; the next `cube dev` finds them again.",
     0, 0, NULL, run_dev, false},
    {"run", "[IMAGE] [-- COMMAND [ARG...]]", "Run a new task",
     "The task is described by flags, or in a file, as a TaskEvent or as a\n"
     "bare Task. Prints the ID of the task, and waits until it runs or has\n"
     "failed, unless --detach.\n"
     "\n"
     "  cube run --name web -p 8080:80 -e A=b nginx:latest -- nginx -v\n"
     "  cube run -f task.json\n"
     "  cube run -- sleep 60        (workers with the process runtime)\n"
     "\n"
     "A process starts in a directory of its own, so name a command that is\n"
     "not on the PATH by its full path.\n"
     "\n"
     "A file has these fields, or some of them, with sizes in bytes and times\n"
     "in milliseconds; an event has this as its \"Task\":\n"
     "\n"
     "  {\"Name\": \"web\", \"Image\": \"nginx:latest\",\n"
     "   \"Cmd\": [\"sh\", \"-c\", \"exit\"], \"Env\": [\"A=b\"],\n"
     "   \"ExposedPorts\": {\"80/tcp\": {}},\n"
     "   \"PortBindings\": {\"80/tcp\": \"8080\"},\n"
     "   \"Memory\": 67108864, \"Cpu\": 0.5, \"Disk\": 1073741824,\n"
     "   \"RestartPolicy\": \"always\", \"StopGrace\": 10000,\n"
     "   \"HealthCheck\": \"/\", \"HealthStart\": 30000,\n"
     "   \"HealthInterval\": 10000, \"HealthTimeout\": 5000,\n"
     "   \"HealthRetries\": 3}",
     0, -1, NULL, run_run, true},
    {"status", "", "List tasks",
     "Lists the tasks of the cluster, and why they are not as they should\n"
     "be. What ended more than an hour ago is left out, unless --all. With\n"
     "--at it lists the tasks of that time, as long as the manager's --keep\n"
     "reaches back.",
     0, 0, NULL, run_status, false},
    {"stop", "TASK...", "Stop running tasks",
     "Stops tasks, named by name or by a unique beginning of the ID, and\n"
     "waits until they have ended, unless --detach.",
     1, -1, "@task", run_stop, false},
    {"rm", "TASK...", "Remove finished tasks from the records",
     "Afterwards the ID can be used again.",
     1, -1, "@task", run_rm, false},
    {"logs", "TASK", "Print what a task has written",
     "Prints standard output and standard error of the task. They are kept\n"
     "with its container: also of a task that has ended, but no more of one\n"
     "that was stopped, or was started again.",
     1, 1, "@task", run_logs, false},
    {"inspect", "TASK|NODE", "Print all that is known of a task or node",
     "Prints JSON: of a task its record, and what the engine says of its\n"
     "container; of a node its record with its metrics.",
     1, 1, "@any", run_inspect, false},
    {"events", "", "Print the state of all tasks; with -f, each change to come",
     "Prints each task as it is, with the time at which it last started or\n"
     "ended, or else was submitted; with --follow also each change to come,\n"
     "and when it came.",
     0, 0, NULL, run_events, false},
    {"history", "TASK", "Print what became of a task, when, and why",
     "Prints each change of the task, as long as the manager's --keep reaches\n"
     "back. A task that was removed is named by its whole ID.",
     1, 1, "@task", run_history, false},
    {"node", "", "List nodes",
     "Lists the workers of the cluster. CPU is what was in use during the\n"
     "last seconds, of all cores. With --at it lists the nodes of that time;\n"
     "their metrics are those of their last change before it.",
     0, 0, NULL, run_node, false},
    {"node rm", "NODE...", "Forget nodes that had joined",
     "For nodes that are gone: their tasks are started elsewhere. One whose\n"
     "worker is still up would join again, so stop the worker first.",
     1, -1, "@node", run_node_rm, false},
    {"backup", "FILE", "Copy all that the manager has stored",
     "The copy has all that was acknowledged when it began; the manager\n"
     "works on meanwhile. FILE is there once the copy is whole, was read\n"
     "through and is on disk, or not at all. To go on from it, put it into a\n"
     "manager's --data DIR as manager.cube and start that manager, with the\n"
     "--workers of the one before, if it had any: it asks the workers what\n"
     "runs, and from then on they obey it and no manager before it.",
     1, 1, "@file", run_backup, false},
    {"store check", "FILE", "Check a store's file that no process has open",
     "Reads all of FILE: checksums, order, counts. Exit codes: 0 it is whole;\n"
     "1 it is damaged, or cannot be read, or a process has it open; 2 wrong\n"
     "usage.",
     1, 1, "@file", run_store_check, false},
    {"store dump", "FILE [TREE]", "Print the records of a store's file",
     "Prints a line for each record: tree, key, value, with tabs between.\n"
     "Keys that are no text are numbers; JSON is as it is. Exit codes: 0 all\n"
     "was printed; 1 FILE is damaged, or cannot be read, or a process has it\n"
     "open; 2 wrong usage.",
     1, 2, "@file", run_store_dump, false},
    {"store compact", "FILE", "Write a store's file anew, without garbage",
     "The old file is replaced when the new one is on disk. Exit codes: 0\n"
     "done; 1 it failed, or a process has FILE open, and nothing is lost;\n"
     "2 wrong usage.",
     1, 1, "@file", run_store_compact, false},
    {"completion", "bash|zsh|fish|powershell",
     "Print the completion script of a shell",
     "  bash:        source <(cube completion bash)\n"
     "  zsh:         source <(cube completion zsh)\n"
     "  fish:        cube completion fish | source\n"
     "  powershell:  cube completion powershell | Out-String |\n"
     "               Invoke-Expression",
     1, 1, "bash|zsh|fish|powershell", run_completion, false},
    {"help", "[COMMAND]", "Explain Cube, or one of its commands", NULL,
     0, 2, "@command", run_help, false},
    {"version", "", "Print the version", NULL, 0, 0, NULL, run_version,
     false},
    {"__complete", "WORD...", NULL, NULL, 0, -1, NULL, run_complete, true},
};

/* ---- The command line ---- */

struct given {
    const struct flag *flag;
    const char *value; /* "" for a switch */
};

/* One command line, taken apart. It borrows from argv. */
struct line {
    const struct command *command;
    struct given *given; /* in the order of the line */
    size_t given_count;
    char **args;
    int arg_count;
    int own_args; /* of these, so many stood before a "--" */
    bool has_dashes;
};

/* What every command is given. */
struct app {
    struct line line;
    struct cube_loop *loop;
    struct cube_client *client;
    struct cube_err err;
    struct cube_buf token_text; /* tokens, one after another */
    const char *tokens[2];
};

/* What comes from elsewhere (an engine's error, a name) can hold line ends,
 * terminal commands, and what turns the direction of writing. How many bytes
 * of that stand at `text`? In UTF-8:
 *
 *      c2 80 .. c2 9f           U+0080 .. U+009F, terminal commands
 *      e2 80 aa .. e2 80 ae     U+202A .. U+202E, directions
 *      e2 81 a6 .. e2 81 a9     U+2066 .. U+2069, directions
 */
static size_t unprintable(const char *text)
{
    const unsigned char *p = (const unsigned char *)text;

    if (iscntrl(p[0]))
        return 1;
    if (p[0] == 0xc2 && p[1] >= 0x80 && p[1] <= 0x9f)
        return 2;
    if (p[0] != 0xe2)
        return 0;
    return (p[1] == 0x80 && p[2] >= 0xaa && p[2] <= 0xae) ||
                   (p[1] == 0x81 && p[2] >= 0xa6 && p[2] <= 0xa9)
               ? 3 : 0;
}

/* All of that becomes spaces. */
static void flatten(char *text)
{
    while (*text) {
        size_t n = unprintable(text);

        memset(text, ' ', n);
        text += n ? n : 1;
    }
}

/* Tells stderr what may hold words from elsewhere: its lines, flattened. */
__attribute__((format(printf, 1, 2))) static void
complain(const char *format, ...)
{
    char text[4096], *line = text, *end;
    va_list args;

    va_start(args, format);
    (void)vsnprintf(text, sizeof text, format, args);
    va_end(args);
    while ((end = strchr(line, '\n'))) {
        *end = 0;
        flatten(line);
        fprintf(stderr, "%s\n", line);
        line = end + 1;
    }
    flatten(line);
    fputs(line, stderr);
}

/* "cube run: WORDS", then how to get help. */
__attribute__((format(printf, 2, 3))) static int
usage_error(const struct command *c, const char *format, ...)
{
    va_list args;

    fprintf(stderr, "cube%s%s: ", c ? " " : "", c ? c->name : "");
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    if (c)
        fprintf(stderr, "\nUsage: cube %s [flags]%s%s", c->name,
                *c->args ? " " : "", c->args);
    fprintf(stderr, "\nSee: cube help%s%s\n", c ? " " : "",
            c ? c->name : "");
    return USAGE;
}

/* Is `name` one of the words in `list`, which has `separator` between them? */
static bool in_list(const char *list, char separator, const char *name,
                    size_t len)
{
    while (list) {
        const char *end = strchr(list, separator);
        size_t n = end ? (size_t)(end - list) : strlen(list);

        if (n == len && strncasecmp(list, name, len) == 0)
            return true;
        list = end ? end + 1 : NULL;
    }
    return false;
}

static bool has_flag(const struct command *c, const struct flag *f)
{
    return *f->commands == '*' ||
           in_list(f->commands, ',', c->name, strlen(c->name));
}

/* By its name, in either case: the Go program's --dbType and --dbtype are
 * one flag. */
static const struct flag *flag_by_name(const struct command *c,
                                       const char *name, size_t len)
{
    for (size_t i = 0; i < COUNT(flags); i++) {
        if (has_flag(c, &flags[i]) && strlen(flags[i].name) == len &&
            strncasecmp(flags[i].name, name, len) == 0)
            return &flags[i];
    }
    return NULL;
}

static const struct flag *flag_by_letter(const struct command *c, char letter)
{
    for (size_t i = 0; i < COUNT(flags); i++) {
        if (flags[i].letter == letter && has_flag(c, &flags[i]))
            return &flags[i];
    }
    return NULL;
}

/* How many letters must be changed, put in or left out to get from one to the
 * other (Levenshtein); words of up to 31 letters. */
static int distance(const char *a, const char *b)
{
    int row[32], n = (int)strlen(b);

    if (strlen(a) > 31 || n > 31)
        return 99;
    for (int j = 0; j <= n; j++)
        row[j] = j;
    for (int i = 1; a[i - 1]; i++) {
        int before = row[0];

        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int change = before + (a[i - 1] != b[j - 1]);

            before = row[j];
            row[j] = row[j] < row[j - 1] ? row[j] + 1 : row[j - 1] + 1;
            row[j] = change < row[j] ? change : row[j];
        }
    }
    return row[n];
}

/* From how many changes on a word is no slip of another: three, or all of its
 * letters. */
static int nearest_of(const char *word)
{
    return strlen(word) < 3 ? (int)strlen(word) : 3;
}

static int unknown_flag(const struct command *c, const char *word)
{
    const char *best = NULL;
    char name[32];
    int least;

    (void)snprintf(name, sizeof name, "%.*s", (int)strcspn(word + 2, "="),
                   word[1] == '-' ? word + 2 : "");
    least = nearest_of(name);
    for (size_t i = 0; i < COUNT(flags) && *name; i++) {
        int d = has_flag(c, &flags[i]) ? distance(name, flags[i].name) : 99;

        if (d < least) {
            least = d;
            best = flags[i].name;
        }
    }
    if (best)
        return usage_error(c, "unknown flag %s; did you mean --%s?", word,
                           best);
    return usage_error(c, "unknown flag %s%s", word,
                       c->has_words ? "; what belongs to the task's own "
                                      "command comes after --"
                                    : "");
}

static int unknown_command(const char *word)
{
    const char *best = NULL;
    size_t len = strlen(word);
    int least = nearest_of(word);

    for (size_t i = 0; i < COUNT(commands); i++) {
        if (strncmp(commands[i].name, word, len) == 0 &&
            commands[i].name[len] == ' ')
            return usage_error(NULL, "%s needs another word, as in %s; "
                               "`cube help %s` lists them", word,
                               commands[i].name, word);
    }
    if (*word == '-')
        return usage_error(NULL, "no command before the flag %s; flags come "
                           "after it: cube COMMAND [flags]", word);
    for (size_t i = 0; i < COUNT(commands); i++) {
        int d = distance(word, commands[i].name);

        if (commands[i].summary && d < least) {
            least = d;
            best = commands[i].name;
        }
    }
    if (best)
        return usage_error(NULL, "unknown command %s; did you mean %s?", word,
                           best);
    return usage_error(NULL, "unknown command \"%s\"", word);
}

/* Finds the command that the words begin with, the longest one; `*used` is
 * how many words name it. */
static const struct command *find_command(char **words, int count, int *used)
{
    const struct command *found = NULL;
    char two[64];

    *used = 0;
    if (count > 1)
        (void)snprintf(two, sizeof two, "%s %s", words[0], words[1]);
    for (size_t i = 0; i < COUNT(commands) && count > 0; i++) {
        if (*used < 1 && strcmp(commands[i].name, words[0]) == 0) {
            found = &commands[i];
            *used = 1;
        } else if (count > 1 && strcmp(commands[i].name, two) == 0) {
            found = &commands[i];
            *used = 2;
        }
    }
    return found;
}

/* Notes a flag, after a look whether it may have that value. An empty one is
 * what is left of a variable that is not set, as in --data "$DIR"; no workers
 * at all are some that can be meant. */
static int give(struct line *l, const struct flag *f, const char *value)
{
    if (f->value && !*value && f->id != F_WORKERS)
        return usage_error(l->command, "--%s is empty: --%s %s", f->name,
                           f->name, f->value);
    if (f->values && *f->values != '@' &&
        !in_list(f->values, '|', value, strlen(value)))
        return usage_error(l->command, "--%s cannot be \"%s\"; it is one of %s",
                           f->name, value, f->values);
    l->given[l->given_count].flag = f;
    l->given[l->given_count++].value = value;
    return DONE;
}

static int needs_value(struct line *l, const struct flag *f)
{
    return usage_error(l->command, "--%s needs a value: --%s %s", f->name,
                       f->name, f->value);
}

/* --name, --name value, --name=value. `next` is the word behind, or NULL;
 * `*used` says whether it was taken. */
static int take_long(struct line *l, char *word, char *next, bool *used)
{
    char *equals = strchr(word, '=');
    size_t len = equals ? (size_t)(equals - word - 2) : strlen(word + 2);
    const struct flag *f = flag_by_name(l->command, word + 2, len);

    if (!f)
        return unknown_flag(l->command, word);
    if (!f->value) {
        if (equals && strcmp(equals, "=true") && strcmp(equals, "=false"))
            return usage_error(l->command, "--%s takes no value", f->name);
        return equals && equals[1] == 'f' ? DONE : give(l, f, "");
    }
    if (equals)
        return give(l, f, equals + 1);
    if (!next)
        return needs_value(l, f);
    *used = true;
    return give(l, f, next);
}

/* -f value, -fvalue, -f=value, and switches in one word: -af value. */
static int take_letters(struct line *l, char *word, char *next, bool *used)
{
    for (char *p = word + 1; *p; p++) {
        const struct flag *f = flag_by_letter(l->command, *p);
        int code;

        if (!f)
            return unknown_flag(l->command, word);
        if (f->value && p[1])
            return give(l, f, p + (p[1] == '=' ? 2 : 1));
        if (f->value && !next)
            return needs_value(l, f);
        *used = f->value != NULL;
        code = give(l, f, f->value ? next : "");
        if (code != DONE)
            return code;
    }
    return DONE;
}

/* Takes one word; returns an exit code. */
static int take_word(struct line *l, char *word, char *next, bool *used)
{
    bool is_flag = word[0] == '-' && word[1] && !l->has_dashes;

    if (is_flag && strcmp(word, "--") == 0) {
        l->has_dashes = true;
        l->own_args = l->arg_count;
        return DONE;
    }
    if (is_flag && word[1] == '-')
        return take_long(l, word, next, used);
    if (is_flag)
        return take_letters(l, word, next, used);
    l->args[l->arg_count++] = word;
    if (l->command->has_words && l->arg_count == 2 && !l->has_dashes) {
        l->has_dashes = true; /* the command of the task begins here */
        l->own_args = 1;
    }
    return DONE;
}

static const char *flag(const struct line *l, enum flag_id id)
{
    for (size_t i = l->given_count; i-- > 0;) {
        if (l->given[i].flag->id == id)
            return l->given[i].value;
    }
    return NULL;
}

/* The values of a repeatable flag, one after the other; starts at `*at` 0. */
static const char *next_flag(const struct line *l, enum flag_id id,
                             size_t *at)
{
    while (*at < l->given_count) {
        const struct given *g = &l->given[(*at)++];

        if (g->flag->id == id)
            return g->value;
    }
    return NULL;
}

static int check_args(const struct line *l)
{
    const struct command *c = l->command;

    if (l->arg_count < c->min_args)
        return usage_error(c, "needs %s", c->args);
    if (c->max_args >= 0 && l->arg_count > c->max_args)
        return usage_error(c, "does not know what to do with \"%s\"",
                           l->args[c->max_args]);
    for (int i = 0; i < l->own_args; i++) {
        if (!*l->args[i])
            return usage_error(c, "an argument is empty: %s", c->args);
    }
    if (c->values && *c->values != '@' &&
        !in_list(c->values, '|', l->args[0], strlen(l->args[0])))
        return usage_error(c, "cannot be \"%s\"; it is one of %s", l->args[0],
                           c->values);
    return DONE;
}

static void help_commands(FILE *out)
{
    fprintf(out, "Cube runs tasks on a cluster of machines.\n\n"
            "Usage: cube COMMAND [flags] [arguments]\n\nCommands:\n");
    for (size_t i = 0; i < COUNT(commands); i++) {
        if (commands[i].summary)
            fprintf(out, "  %-14s %s\n", commands[i].name,
                    commands[i].summary);
    }
    fprintf(out, "\nFlags and examples of a command: cube help COMMAND\n"
            "Exit codes: 0 done, 1 the work failed, 2 wrong usage, "
            "3 no manager answered\n");
}

/* Takes the words behind the program's name apart. */
static int parse_line(struct line *l, char **words, int count)
{
    int used;

    if (count == 0) {
        help_commands(stderr);
        return USAGE;
    }
    l->command = find_command(words, count, &used);
    if (!l->command)
        return unknown_command(words[0]);
    l->has_dashes = strcmp(l->command->name, "__complete") == 0;
    for (int i = used; i < count; i++) {
        bool took_next = false;
        int code = take_word(l, words[i], i + 1 < count ? words[i + 1] : NULL,
                             &took_next);

        if (code != DONE)
            return code;
        i += took_next;
    }
    if (!l->has_dashes)
        l->own_args = l->arg_count;
    return flag(l, F_HELP) ? DONE : check_args(l);
}

/* ---- Help ---- */

#define HELP_COLUMNS 79

/* Prints `left`, and the text beside it in as many lines as it takes. */
static void print_beside(const char *left, int width, const char *text,
                         int columns)
{
    int room = columns - width - 4;

    while (*text) {
        int len = (int)strlen(text), fits = len;

        if (len > room) {
            fits = room;
            while (fits > 0 && text[fits] != ' ')
                fits--;
            fits = fits ? fits : len;
        }
        printf("  %-*s  %.*s\n", width, left, fits, text);
        text += fits;
        while (*text == ' ')
            text++;
        left = "";
    }
}

/* "  -p, --port PORT  Port to listen on" */
static void help_flag(const struct flag *f, int width)
{
    char left[80], letter[8] = "    ";

    if (f->letter)
        (void)snprintf(letter, sizeof letter, "-%c, ", f->letter);
    (void)snprintf(left, sizeof left, "%s--%s%s%s", letter, f->name,
                   f->value ? " " : "", f->value ? f->value : "");
    print_beside(left, width, f->help, HELP_COLUMNS);
    if (f->values && *f->values != '@')
        print_beside("", width, f->values, HELP_COLUMNS);
}

/* The commands that begin with this word and have another one, in a list;
 * false: there are none. */
static bool help_group(const char *word, const char *head)
{
    size_t len = strlen(word);
    bool is_found = false;

    for (size_t i = 0; i < COUNT(commands); i++) {
        const struct command *c = &commands[i];

        if (strncmp(c->name, word, len) != 0 || c->name[len] != ' ')
            continue;
        printf("%s  %-14s %s\n", is_found ? "" : head, c->name, c->summary);
        is_found = true;
    }
    return is_found;
}

static void help_command(const struct command *c)
{
    int width = 0;

    printf("%s.\n\nUsage: cube %s [flags]%s%s\n",
           c->summary ? c->summary : "For shells", c->name,
           *c->args ? " " : "", c->args);
    if (c->details)
        printf("\n%s\n", c->details);
    printf("\nFlags:\n");
    for (size_t i = 0; i < COUNT(flags); i++) {
        const struct flag *f = &flags[i];
        int len = 6 + (int)strlen(f->name) +
                  (f->value ? (int)strlen(f->value) + 1 : 0);

        if (has_flag(c, f) && len > width)
            width = len;
    }
    for (size_t i = 0; i < COUNT(flags); i++) {
        if (has_flag(c, &flags[i]))
            help_flag(&flags[i], width);
    }
    (void)help_group(c->name, "\nSee also, with cube help:\n");
}

static int run_help(struct app *a)
{
    int used;
    const struct command *c =
        find_command(a->line.args, a->line.arg_count, &used);

    if (!c && a->line.arg_count == 1 &&
        help_group(a->line.args[0], "Commands:\n"))
        return DONE;
    if (a->line.arg_count > 0 && (!c || used < a->line.arg_count))
        return unknown_command(a->line.args[used]);
    if (c)
        help_command(c);
    else
        help_commands(stdout);
    return DONE;
}

static int run_version(struct app *a)
{
    (void)a;
    printf("cube %s\n", CUBE_VERSION);
    return DONE;
}

/* ---- Completion ---- */

/*
 * The scripts are short, since they know nothing: they hand the words of the
 * line up to the cursor to `cube __complete`, which answers with one
 * candidate a line, a tab and its explanation behind it. `:file` and `:dir`
 * ask the shell to complete paths.
 */
static const char bash_script[] =
    "# bash completion of cube: source <(cube completion bash)\n"
    "_cube() {\n"
    "    local line=${COMP_LINE:0:COMP_POINT} cur cut item\n"
    "    local -a words\n"
    "    read -ra words <<< \"$line\"\n"
    "    [[ $line == *[[:space:]] ]] && words+=('')\n"
    "    cur=${words[${#words[@]}-1]}\n"
    "    COMPREPLY=()\n"
    "    while IFS=$'\\t' read -r item _; do\n"
    "        case $item in\n"
    "        :file) compopt -o filenames 2>/dev/null\n"
    "            mapfile -t COMPREPLY < <(compgen -f -- \"${cur#--*=}\") ;;\n"
    "        :dir) compopt -o filenames 2>/dev/null\n"
    "            mapfile -t COMPREPLY < <(compgen -d -- \"${cur#--*=}\") ;;\n"
    "        *) COMPREPLY+=(\"$item\") ;;\n"
    "        esac\n"
    "    done < <(\"${words[0]}\" __complete \"${words[@]:1}\" 2>/dev/null)\n"
    "    # What readline replaces begins behind the last : or =\n"
    "    cut=${cur%\"${cur##*[:=]}\"}\n"
    "    COMPREPLY=(\"${COMPREPLY[@]#\"$cut\"}\")\n"
    "}\n"
    "complete -F _cube cube\n";

static const char zsh_script[] =
    "#compdef cube\n"
    "# zsh completion of cube: source <(cube completion zsh)\n"
    "_cube() {\n"
    "    local -a items\n"
    "    local item about\n"
    "    while IFS=$'\\t' read -r item about; do\n"
    "        case $item in\n"
    "        :file) compset -P '--*='; _files; return ;;\n"
    "        :dir) compset -P '--*='; _files -/; return ;;\n"
    "        *) items+=(\"${item//:/\\\\:}${about:+:$about}\") ;;\n"
    "        esac\n"
    "    done < <(\"${words[1]}\" __complete \"${(@)words[2,CURRENT-1]}\" \\\n"
    "        \"$PREFIX\" 2>/dev/null)\n"
    "    _describe cube items\n"
    "}\n"
    "if [ \"${funcstack[1]}\" = _cube ]; then\n"
    "    _cube\n"
    "else\n"
    "    compdef _cube cube\n"
    "fi\n";

static const char fish_script[] =
    "# fish completion of cube: cube completion fish | source\n"
    "function __cube_complete\n"
    "    set -l words (commandline -opc)\n"
    "    set -l cur (commandline -ct)\n"
    "    test (count $cur) -eq 0; and set cur ''\n"
    "    for line in ($words[1] __complete $words[2..-1] \"$cur\" "
    "2>/dev/null)\n"
    "        switch $line\n"
    "            case :file\n"
    "                __fish_complete_path \"$cur\"\n"
    "            case :dir\n"
    "                __fish_complete_directories \"$cur\" ''\n"
    "            case '*'\n"
    "                echo $line\n"
    "        end\n"
    "    end\n"
    "end\n"
    "complete -c cube -f -a '(__cube_complete)'\n";

static const char powershell_script[] =
    "# PowerShell completion of cube:\n"
    "# cube completion powershell | Out-String | Invoke-Expression\n"
    "Register-ArgumentCompleter -Native -CommandName cube -ScriptBlock {\n"
    "    param($wordToComplete, $commandAst, $cursorPosition)\n"
    "    $words = @($commandAst.CommandElements |\n"
    "        ForEach-Object { $_.ToString() })\n"
    "    $program = $words[0]\n"
    "    $rest = @($words | Select-Object -Skip 1)\n"
    "    # Older shells drop an empty argument, so it has a name\n"
    "    if ($wordToComplete -eq '') { $rest += ':empty' }\n"
    "    & $program __complete @rest 2>$null | ForEach-Object {\n"
    "        $item, $about = $_ -split \"`t\", 2\n"
    "        if (-not $about) { $about = $item }\n"
    "        if (-not $item.StartsWith(':')) {\n"
    "            [System.Management.Automation.CompletionResult]::new(\n"
    "                $item, $item, 'ParameterValue', $about)\n"
    "        }\n"
    "    }\n"
    "}\n";

static int run_completion(struct app *a)
{
    static const struct {
        const char *shell, *script;
    } scripts[] = {{"bash", bash_script},
                   {"zsh", zsh_script},
                   {"fish", fish_script},
                   {"powershell", powershell_script}};

    for (size_t i = 0; i < COUNT(scripts); i++) {
        if (strcasecmp(a->line.args[0], scripts[i].shell) == 0)
            fputs(scripts[i].script, stdout);
    }
    return DONE;
}

/* A candidate, if it begins with what is typed. `before` is put in front. */
static void offer(const char *before, const char *typed, const char *word,
                  int len, const char *about)
{
    if (strncmp(word, typed, strlen(typed)) == 0)
        printf("%s%.*s%s%s\n", before, len, word, about ? "\t" : "",
               about ? about : "");
}

static int open_client(struct app *a);

/* A task by its name; by its ID where it has none, or where an ID was begun. */
static void offer_tasks(struct app *a, const char *before, const char *typed)
{
    const char *command = a->line.command->name;
    bool only_unfinished = strcmp(command, "stop") == 0;
    struct cube_task_list l;

    if (cube_client_tasks(a->client, &l, NULL))
        return;
    for (size_t i = 0; i < l.count; i++) {
        const struct cube_task *t = l.list[i];

        if (only_unfinished && cube_task_is_finished(t))
            continue;
        if (*t->name)
            offer(before, typed, t->name, (int)strlen(t->name), t->image);
        if (!*t->name || *typed)
            offer(before, typed, t->id, (int)sizeof t->id - 1, t->image);
    }
    cube_task_list_free(&l);
}

static void offer_nodes(struct app *a, const char *before, const char *typed)
{
    struct cube_node_list l;

    if (cube_client_nodes(a->client, &l, NULL))
        return;
    for (size_t i = 0; i < l.count; i++)
        offer(before, typed, l.list[i].name, (int)strlen(l.list[i].name),
              l.list[i].state);
    cube_node_list_free(&l);
}

/* First words, each once: those that have the same one stand together. */
static void offer_commands(const char *typed)
{
    for (size_t i = 0; i < COUNT(commands); i++) {
        const char *name = commands[i].name;
        size_t len = strcspn(name, " ");

        if (commands[i].summary &&
            (i == 0 || strncmp(commands[i - 1].name, name, len) != 0 ||
             strcspn(commands[i - 1].name, " ") != len))
            offer("", typed, name, (int)len,
                  name[len] ? NULL : commands[i].summary);
    }
}

/* The second words of commands that have two: `rm` of `node rm`. */
static void offer_second(const char *first, const char *typed)
{
    size_t len = strlen(first);

    for (size_t i = 0; i < COUNT(commands); i++) {
        const char *name = commands[i].name;

        if (strncmp(name, first, len) == 0 && name[len] == ' ')
            offer("", typed, name + len + 1, (int)strlen(name + len + 1),
                  commands[i].summary);
    }
}

/* What `cube help` can be asked for. */
static void offer_topic(struct app *a, const char *typed)
{
    if (a->line.arg_count == 0)
        offer_commands(typed);
    else if (a->line.arg_count == 1)
        offer_second(a->line.args[0], typed);
}

/* What `values` of a flag or a command stands for. */
static void offer_values(struct app *a, const char *values,
                         const char *before, const char *typed)
{
    if (!values)
        return;
    if (strcmp(values, "@file") == 0 || strcmp(values, "@dir") == 0) {
        printf(":%s\n", values + 1);
    } else if (strcmp(values, "@command") == 0) {
        offer_topic(a, typed);
    } else if (*values == '@') {
        if (open_client(a) != DONE)
            return;
        cube_client_set_timeout(a->client, 2000);
        if (strcmp(values, "@node") != 0)
            offer_tasks(a, before, typed);
        if (strcmp(values, "@task") != 0)
            offer_nodes(a, before, typed);
    } else {
        while (values) {
            int len = (int)strcspn(values, "|");

            offer(before, typed, values, len, NULL);
            values = values[len] ? values + len + 1 : NULL;
        }
    }
}

static void offer_flags(const struct command *c, const char *typed)
{
    for (size_t i = 0; i < COUNT(flags); i++) {
        char name[40];

        (void)snprintf(name, sizeof name, "--%s", flags[i].name);
        if (has_flag(c, &flags[i]))
            offer("", typed, name, (int)strlen(name), flags[i].help);
    }
}

/* The flag that waits for a value behind this word, or NULL. */
static const struct flag *open_flag(const struct command *c, const char *word)
{
    const struct flag *f = NULL;

    if (word[0] != '-' || !word[1])
        return NULL;
    if (word[1] == '-')
        return flag_by_name(c, word + 2, strlen(word + 2));
    for (const char *p = word + 1; *p && (!f || !f->value); p++) {
        f = flag_by_letter(c, *p);
        if (!f || (f->value && p[1]))
            return NULL;
    }
    return f;
}

/* Reads what stands before the cursor as far as it is right, so that --manager
 * and --token-file hold for the completion too. Returns the flag that the
 * word at the cursor belongs to. */
static const struct flag *read_before(struct line *l, char **words, int count)
{
    const struct flag *waits = NULL;

    for (int i = 0; i < count; i++) {
        bool took_next = false;

        waits = l->has_dashes ? NULL : open_flag(l->command, words[i]);
        if (waits && waits->value && i + 1 == count)
            return waits;
        if (waits || words[i][0] != '-' || strchr(words[i], '=') ||
            strcmp(words[i], "--") == 0)
            (void)take_word(l, words[i], i + 1 < count ? words[i + 1] : NULL,
                            &took_next);
        i += took_next;
    }
    return NULL;
}

/* The word at the cursor, which no flag before it waits for. */
static void offer_word(struct app *a, const char *typed)
{
    const struct command *c = a->line.command;
    const char *equals = strchr(typed, '=');

    if (equals && strncmp(typed, "--", 2) == 0) {
        size_t len = (size_t)(equals - typed - 2);
        const struct flag *f = flag_by_name(c, typed + 2, len);
        char before[40];

        (void)snprintf(before, sizeof before, "%.*s=", (int)len + 2, typed);
        if (f)
            offer_values(a, f->values, before, equals + 1);
    } else if (*typed == '-') {
        offer_flags(c, typed);
    } else {
        if (a->line.arg_count == 0)
            offer_second(c->name, typed);
        offer_values(a, c->values, "", typed);
    }
}

/* `cube __complete WORD...`: the words of a line behind `cube`, up to the one
 * at the cursor. */
static int run_complete(struct app *a)
{
    char **words = a->line.args;
    int count = a->line.arg_count, used;
    const char *typed = count > 0 ? words[count - 1] : "";
    const struct flag *f;

    if (strcmp(typed, ":empty") == 0)
        typed = "";
    a->line.command = find_command(words, count - 1, &used);
    if (count <= 1)
        offer_commands(typed);
    if (count == 2 && !a->line.command)
        offer_second(words[0], typed);
    if (!a->line.command)
        return DONE;
    a->line.arg_count = a->line.own_args = 0;
    a->line.has_dashes = false;
    /* Arguments are noted where the words stand: that never overtakes. */
    f = read_before(&a->line, words + used, count - 1 - used);
    if (f)
        offer_values(a, f->values, "", typed);
    else if (!a->line.has_dashes)
        offer_word(a, typed);
    return DONE;
}

/* ---- Texts ---- */

/* "64m", "1.5g", "512k", "1024", with an i or b behind: bytes, by 1024. */
static int parse_size(const char *text, int64_t *out)
{
    static const char units[] = "bkmgt";
    char *end;
    double v = strtod(text, &end);
    const char *unit = strchr(units, tolower((unsigned char)*end));

    if (end == text || !isdigit((unsigned char)*text) || !unit)
        return -1;
    for (; *unit && unit > units; unit--)
        v *= 1024;
    if (*end && *unit)
        end++;
    if (strcasecmp(end, "ib") == 0 || strcasecmp(end, "b") == 0)
        end += strlen(end);
    if (*end || !(v < 9e18))
        return -1;
    *out = (int64_t)v;
    return 0;
}

/* "168h", "1h30m", "1.5s", "200ms", "7d", as milliseconds. */
static int parse_duration(const char *text, int64_t *out_ms)
{
    static const struct {
        const char *name;
        double ms;
    } units[] = {{"ms", 1}, {"s", 1e3}, {"m", 6e4}, {"h", 36e5}, {"d", 864e5}};
    double sum = 0;

    if (!*text)
        return -1;
    while (*text) {
        char *end;
        double v = strtod(text, &end);
        size_t len = strcspn(end, "0123456789."), i = 0;

        if (end == text || !isdigit((unsigned char)*text))
            return -1;
        while (i < COUNT(units) && (strlen(units[i].name) != len ||
                                    strncmp(units[i].name, end, len) != 0))
            i++;
        if (i == COUNT(units))
            return -1;
        sum += v * units[i].ms;
        text = end + len;
    }
    *out_ms = (int64_t)sum;
    return sum < 9e15 ? 0 : -1;
}

static int parse_number(const char *text, long min, long max, long *out)
{
    char *end;

    errno = 0;
    *out = strtol(text, &end, 10);
    return errno || end == text || *end || *out < min || *out > max ? -1 : 0;
}

/* How long that is, for people: "About an hour", "3 weeks". */
static void print_span(int64_t ns, char *out, size_t size)
{
    static const struct {
        int64_t below_s, unit_s;
        const char *text;
    } steps[] = {
        {1, 1, "Less than a second"}, {2, 1, "1 second"},
        {60, 1, "%d seconds"},        {120, 60, "About a minute"},
        {3600, 60, "%d minutes"},     {7200, 3600, "About an hour"},
        {48 * 3600, 3600, "%d hours"}, {14 * 86400, 86400, "%d days"},
        {60 * 86400, 7 * 86400, "%d weeks"},
        {2 * 365 * 86400, 30 * 86400, "%d months"},
        {INT64_MAX, 365 * 86400, "%d years"}};
    int64_t s = ns < 0 ? 0 : ns / 1000000000;
    size_t i = 0;
    const char *number;

    while (s >= steps[i].below_s)
        i++;
    number = strstr(steps[i].text, "%d");
    if (number)
        (void)snprintf(out, size, "%d%s", (int)(s / steps[i].unit_s),
                       number + 2);
    else
        (void)snprintf(out, size, "%s", steps[i].text);
}

static int64_t wall_ns(void)
{
    const struct cube_world *w = cube_world_real();

    return w->wall_ns(w->ctx);
}

static int64_t shown_at_ns; /* of --at; 0: now */

/* The time that is shown: ages are counted up to it. */
static int64_t shown_ns(void)
{
    return shown_at_ns ? shown_at_ns : wall_ns();
}

static void print_ago(const struct cube_time *t, char *out, size_t size)
{
    size_t len;

    if (!cube_time_is_set(t)) {
        (void)snprintf(out, size, "-");
        return;
    }
    print_span(shown_ns() - cube_time_to_ns(t), out, size);
    len = strlen(out);
    (void)snprintf(out + len, size - len, " ago");
}

/* ---- Tables: texts in aligned columns ----
 *
 * A terminal that is too narrow for a table gets the columns that fit, without
 * those that are empty and with long texts cut, and the rest of a row below:
 *
 *     ID         NAME                     CREATED         STATE
 *     1111aaaa   web                      2 minutes ago   Failed
 *         NODE n1:5556   REASON gave up after 3 restarts: exited with code 1
 *     2222cccc   a-service-with-a-rat..   3 weeks ago     Running
 *         NAME a-service-with-a-rather-long-name   NODE n1:5556
 *
 * What is no terminal gets all of it, each row in one line.
 */

#define TABLE_COLUMNS 16
#define TABLE_GAP 3 /* spaces between two columns */
#define TABLE_CUT 22 /* a longer text is cut, where there is no room */

enum color { PLAIN, GREEN, YELLOW, RED };

struct cell {
    char *text;
    enum color color;
};

struct table {
    size_t columns;
    struct cell *cells; /* row by row */
    size_t count, cap;
};

static void add_cell(struct table *t, enum color color, const char *text)
{
    char *copy = strdup(text);

    if (t->count == t->cap) {
        t->cap = t->cap ? t->cap * 2 : 64;
        t->cells = realloc(t->cells, t->cap * sizeof *t->cells);
    }
    if (!copy || !t->cells)
        abort();
    flatten(copy);
    t->cells[t->count].color = color;
    t->cells[t->count++].text = copy;
}

static void table_free(struct table *t)
{
    for (size_t i = 0; i < t->count; i++)
        free(t->cells[i].text);
    free(t->cells);
}

/* Characters of UTF-8, each taken as one column wide. */
static int width_of(const char *text)
{
    int n = 0;

    for (; *text; text++)
        n += ((unsigned char)*text & 0xc0) != 0x80;
    return n;
}

static bool has_colors(void)
{
    const char *term = getenv("TERM");

    return isatty(STDOUT_FILENO) && !getenv("NO_COLOR") && term &&
           strcmp(term, "dumb") != 0;
}

/* Prints the text, or as many of its characters as are `width` columns wide
 * together with the two dots that stand for the others. */
static void print_cell(const struct cell *c, int width)
{
    static const char *const codes[] = {"", "\033[32m", "\033[33m",
                                        "\033[31m"};
    bool is_cut = width_of(c->text) > width;
    size_t len = 0;

    for (int n = 0; c->text[len]; len++) {
        n += ((unsigned char)c->text[len] & 0xc0) != 0x80;
        if (is_cut && n > width - 2)
            break;
    }
    if (c->color != PLAIN && has_colors())
        printf("%s%s\033[0m", codes[c->color], c->text);
    else
        printf("%.*s%s", (int)len, c->text, is_cut ? ".." : "");
}

/* How wide each column is; -1: it is empty, but for its head. */
static void measure_table(const struct table *t, int *widths)
{
    for (size_t i = 0; i < t->columns; i++)
        widths[i] = -1;
    for (size_t i = t->columns; i < t->count; i++) {
        int w = width_of(t->cells[i].text);

        if (w > 0 && w > widths[i % t->columns])
            widths[i % t->columns] = w;
    }
    for (size_t i = 0; i < t->columns; i++) {
        int w = width_of(t->cells[i].text);

        if (w > widths[i] && (widths[i] > 0 || t->count == t->columns))
            widths[i] = w;
    }
}

/* Of standard output; 0: it is no terminal, does not say, or is too narrow for
 * anything. */
static int terminal_columns(void)
{
    struct winsize size;

    if (!isatty(STDOUT_FILENO) || ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) < 0)
        return 0;
    return size.ws_col < 20 ? 0 : size.ws_col;
}

/* How many columns fit into `room`, which is 0 for no limit. Where not all do,
 * those that are empty have no width and none is wider than TABLE_CUT. */
static size_t fit_table(const struct table *t, int *widths, int room)
{
    int sum = 0, all = 0;
    size_t i;

    for (i = 0; i < t->columns; i++)
        all += TABLE_GAP + (widths[i] < 0 ? width_of(t->cells[i].text)
                                          : widths[i]);
    if (room == 0 || all - TABLE_GAP <= room) {
        for (i = 0; i < t->columns; i++) {
            if (widths[i] < 0)
                widths[i] = width_of(t->cells[i].text);
        }
        return t->columns;
    }
    for (i = 0; i < t->columns; i++) {
        if (i + 1 < t->columns && widths[i] > TABLE_CUT)
            widths[i] = TABLE_CUT;
        if (i > 0 && sum + widths[i] > room)
            break;
        sum += widths[i] < 0 ? 0 : widths[i] + TABLE_GAP;
    }
    return i;
}

/* The first `shown` cells of a row, without spaces behind the last text. */
static void print_row(const struct cell *row, const int *widths, size_t shown)
{
    int pad = 0;

    for (size_t i = 0; i < shown; i++) {
        if (widths[i] < 0)
            continue;
        if (*row[i].text) {
            printf("%*s", pad, "");
            print_cell(&row[i], widths[i]);
            pad = -width_of(row[i].text);
            if (pad < -widths[i])
                pad = -widths[i];
        }
        pad += widths[i] + TABLE_GAP;
    }
    putchar('\n');
}

/* Prints all and frees the table's memory. */
static void print_table(struct table *t)
{
    int widths[TABLE_COLUMNS], room = terminal_columns();
    size_t shown;

    measure_table(t, widths);
    shown = fit_table(t, widths, room);
    for (size_t i = 0; i < t->count; i += t->columns) {
        struct cube_buf below = {NULL, 0, 0};

        print_row(&t->cells[i], widths, shown);
        for (size_t k = 0; k < t->columns && i > 0; k++) {
            const char *text = t->cells[i + k].text;

            if (k < shown ? width_of(text) > widths[k] && *text : *text)
                cube_buf_printf(&below, "%s%s %s", below.len ? "   " : "",
                                t->cells[k].text, text);
        }
        print_beside("", 0, below.data ? below.data : "", room);
        cube_buf_free(&below);
    }
    table_free(t);
}

/* JSON with line ends and spaces, as people read it. */
static void print_json(const char *p, size_t len)
{
    int depth = 0;
    bool in_string = false;

    for (size_t i = 0; i < len; i++) {
        bool opens = p[i] == '{' || p[i] == '[';
        bool closes = p[i] == '}' || p[i] == ']';

        if (in_string || p[i] == '"') {
            putchar(p[i]);
            if (in_string && p[i] == '\\' && i + 1 < len)
                putchar(p[++i]);
            else if (p[i] == '"')
                in_string = !in_string;
            continue;
        }
        if (strchr(" \t\r\n", p[i]))
            continue;
        if (closes && i > 0 && p[i - 1] != '{' && p[i - 1] != '[')
            printf("\n%*s", (depth - 1) * 4, "");
        depth += opens - closes;
        putchar(p[i]);
        if (p[i] == ':')
            putchar(' ');
        if (p[i] == ',' ||
            (opens && i + 1 < len && p[i + 1] != '}' && p[i + 1] != ']'))
            printf("\n%*s", depth * 4, "");
    }
    putchar('\n');
}

/* ---- Files, tokens, durations of flags ---- */

/* All of a file, or of standard input for "-". Says why not. */
static int read_file(struct app *a, const char *path, struct cube_buf *out)
{
    FILE *f = strcmp(path, "-") ? fopen(path, "r") : stdin;
    char piece[4096];
    size_t n;

    if (!f) {
        fprintf(stderr, "cube %s: cannot open %s: %s\n",
                a->line.command->name, path, strerror(errno));
        return FAILED;
    }
    errno = 0;
    while ((n = fread(piece, 1, sizeof piece, f)) > 0) {
        cube_buf_add(out, piece, n);
        if (out->len > FILE_MAX_BYTES)
            errno = EFBIG;
        if (errno)
            break;
    }
    if (errno)
        fprintf(stderr, "cube %s: cannot read %s: %s\n",
                a->line.command->name, path, strerror(errno));
    n = errno ? 1 : 0;
    if (f != stdin)
        fclose(f);
    return n ? FAILED : DONE;
}

/* Finds the tokens: the first two lines of --token-file that are not empty,
 * without blanks around them, or CUBE_TOKEN. */
static int read_tokens(struct app *a)
{
    const char *path = flag(&a->line, F_TOKEN_FILE);
    size_t count = 0;
    char *p;

    if (!path) {
        const char *token = getenv("CUBE_TOKEN");

        a->tokens[0] = token && *token ? token : NULL;
        return DONE;
    }
    if (read_file(a, path, &a->token_text) != DONE)
        return FAILED;
    for (p = a->token_text.data; p && *p && count < 2;) {
        size_t len = strcspn(p, "\r\n"), begin = strspn(p, " \t"), end = len;
        bool is_last = !p[len];

        while (end > begin && strchr(" \t", p[end - 1]))
            end--;
        p[end] = 0;
        if (end > begin)
            a->tokens[count++] = p + begin;
        p += len + !is_last;
    }
    if (count > 0)
        return DONE;
    fprintf(stderr, "cube %s: %s holds no token\n", a->line.command->name,
            path);
    return FAILED;
}

/* "cube run: --memory cannot be "5q"; WORDS". */
static int wrong_value(struct app *a, enum flag_id id, const char *words)
{
    const struct given *g = &a->line.given[0];

    while (g->flag->id != id || g->value != flag(&a->line, id))
        g++;
    return usage_error(a->line.command, "--%s cannot be \"%s\"; %s",
                       g->flag->name, g->value, words);
}

/* The value of a flag as milliseconds; `*out` stays if it was not given. No
 * time at all is refused: to what is told it, 0 is the default. */
static int flag_duration(struct app *a, enum flag_id id, int64_t *out_ms)
{
    const char *text = flag(&a->line, id);
    bool is_time = text && parse_duration(text, out_ms) == 0;

    if (!text || (is_time && *out_ms > 0))
        return DONE;
    return wrong_value(a, id, is_time ? "it is too short, the least is 1ms"
                                      : "a time is written as 90s, 15m, 168h "
                                        "or 7d");
}

static int flag_size(struct app *a, enum flag_id id, int64_t *out)
{
    const char *text = flag(&a->line, id);

    if (!text || parse_size(text, out) == 0)
        return DONE;
    return wrong_value(a, id, "a size is written as 512k, 64m, 1g or in "
                              "bytes");
}

static int flag_number(struct app *a, enum flag_id id, long min, long max,
                       long *out)
{
    const char *text = flag(&a->line, id);
    char words[80];

    if (!text || parse_number(text, min, max, out) == 0)
        return DONE;
    (void)snprintf(words, sizeof words, "it is a number from %ld to %ld", min,
                   max);
    return wrong_value(a, id, words);
}

/* "10:32", "10:32:07", "2006-01-02 10:32": local time; without a date the last
 * time that clocks showed it. */
static int parse_clock(const char *text, int64_t *out_ns)
{
    time_t now = (time_t)(wall_ns() / 1000000000);
    const char *clock = strlen(text) > 10 ? text + 11 : text;
    int second = 0, used = 0;
    struct tm tm;

    if (!localtime_r(&now, &tm))
        return -1;
    if (clock > text && (sscanf(text, "%4d-%2d-%2d%n", &tm.tm_year, &tm.tm_mon,
                                &tm.tm_mday, &used) != 3 ||
                         used != 10 || !strchr(" T", text[10])))
        return -1;
    if (clock > text) {
        tm.tm_year -= 1900;
        tm.tm_mon--;
    }
    if (sscanf(clock, "%2d:%2d%n:%2d%n", &tm.tm_hour, &tm.tm_min, &used,
               &second, &used) < 2 || clock[used] || tm.tm_hour > 23 ||
        tm.tm_min > 59 || second > 60)
        return -1;
    tm.tm_sec = second;
    tm.tm_isdst = -1;
    if (clock == text && mktime(&tm) > now)
        tm.tm_mday--;
    tm.tm_isdst = -1;
    *out_ns = (int64_t)mktime(&tm) * 1000000000;
    return 0;
}

/* --at: what is shown from now on is what was then. `*at` is NULL without. */
static int read_at(struct app *a, struct cube_time *time,
                   const struct cube_time **at)
{
    const char *text = flag(&a->line, F_AT);
    int64_t ago_ms;

    *at = NULL;
    if (!text)
        return DONE;
    if (*text == '-' && parse_duration(text + 1, &ago_ms) == 0)
        shown_at_ns = wall_ns() - ago_ms * 1000000;
    else if (cube_time_parse(text, strlen(text), time) == 0)
        shown_at_ns = cube_time_to_ns(time);
    else if (parse_clock(text, &shown_at_ns))
        return wrong_value(a, F_AT, "a time is written as 10:32, -5m, "
                           "\"2006-01-02 10:32\" or 2006-01-02T10:32:00Z");
    if (shown_at_ns > wall_ns())
        return wrong_value(a, F_AT, "that is yet to come");
    *time = cube_time_from_ns(shown_at_ns);
    *at = time;
    return DONE;
}

/* ---- The servers ---- */

static volatile sig_atomic_t asked_to_end;
static struct cube_loop *signal_loop; /* what a signal wakes */

static void on_signal(int number)
{
    (void)number;
    asked_to_end = 1;
    cube_loop_wake(signal_loop);
}

static void on_log(void *arg, enum cube_level level, const char *text)
{
    static const char *const names[] = {"debug", "info", "warn", "error"};
    const bool *is_verbose = arg;
    struct timespec now;
    struct tm tm;
    char when[32];

    if (level == CUBE_DEBUG && !*is_verbose)
        return;
    clock_gettime(CLOCK_REALTIME, &now);
    localtime_r(&now.tv_sec, &tm);
    strftime(when, sizeof when, "%Y-%m-%d %H:%M:%S", &tm);
    fprintf(stderr, "%s.%03d %-5s ", when, (int)(now.tv_nsec / 1000000),
            names[level]);
    while (*text) {
        size_t n = unprintable(text);

        fputc(n ? ' ' : *text, stderr);
        text += n ? n : 1;
    }
    fputc('\n', stderr);
}

/* What manager, worker and dev have in common. */
struct server {
    char listen[300], data[512];
    char machine[256], machine_short[256]; /* its name, and up to the dot */
    const char *host;
    long port;
    const char **host_names; /* ends with NULL */
    int64_t keep_ms, lost_after_ms;
    long epoch;
    bool is_verbose;
};

static bool is_loopback(const char *host)
{
    return strncmp(host, "127.", 4) == 0 || strcmp(host, "::1") == 0 ||
           strcmp(host, "[::1]") == 0 || strcasecmp(host, "localhost") == 0;
}

static void join_host_port(char *out, size_t size, const char *host, long port)
{
    bool is_bare_ip6 = strchr(host, ':') && *host != '[';

    (void)snprintf(out, size, is_bare_ip6 ? "[%s]:%ld" : "%s:%ld", host, port);
}

/* The directory of the state, if no flag names one. */
static void default_data(char *out, size_t size)
{
    const char *state = getenv("XDG_STATE_HOME"), *home = getenv("HOME");

    if (geteuid() == 0)
        (void)snprintf(out, size, "/var/lib/cube");
    else if (state && *state == '/')
        (void)snprintf(out, size, "%s/cube", state);
    else
        (void)snprintf(out, size, "%s/.local/state/cube", home ? home : ".");
}

/* Reads the common flags. `below` is where in the default directory. */
static int read_server(struct app *a, struct server *s, long port,
                       const char *below)
{
    const char *data = flag(&a->line, F_DATA), *name;
    size_t at = 0, count = 0;
    int code = read_tokens(a);

    if (code == DONE)
        code = flag_duration(a, F_KEEP, &s->keep_ms);
    if (code == DONE)
        code = flag_duration(a, F_LOST_AFTER, &s->lost_after_ms);
    s->port = port;
    if (code == DONE)
        code = flag_number(a, F_PORT, 0, 65535, &s->port);
    if (code == DONE)
        code = flag_number(a, F_EPOCH, 1, 1000000000, &s->epoch);
    s->host = flag(&a->line, F_HOST);
    if (!s->host)
        s->host = a->tokens[0] && !*below ? "0.0.0.0" : "127.0.0.1";
    join_host_port(s->listen, sizeof s->listen, s->host, s->port);
    default_data(s->data, sizeof s->data - 8);
    (void)strcat(s->data, below);
    if (data)
        (void)snprintf(s->data, sizeof s->data, "%s", data);
    s->is_verbose = flag(&a->line, F_VERBOSE) != NULL;
    s->host_names = calloc(a->line.given_count + 3, sizeof *s->host_names);
    if (gethostname(s->machine, sizeof s->machine - 1) == 0) {
        (void)snprintf(s->machine_short, sizeof s->machine_short, "%.*s",
                       (int)strcspn(s->machine, "."), s->machine);
        s->host_names[count++] = s->machine;
        s->host_names[count++] = s->machine_short;
    }
    while ((name = next_flag(&a->line, F_ALLOW_HOST, &at)))
        s->host_names[count++] = name;
    return code;
}

/* Says what failed; returns the exit code. What a server refuses as such is a
 * flag that cannot be right. */
static int server_failed(struct app *a)
{
    if (a->err.code == CUBE_EINVAL)
        return usage_error(a->line.command, "%s", a->err.text);
    complain("cube %s: %s\n", a->line.command->name, a->err.text);
    return FAILED;
}

/* The same, of a manager or worker alone. */
static int start_failed(struct app *a)
{
    int code = server_failed(a);

    if (a->err.code == CUBE_EBUSY)
        fprintf(stderr, "End what is there, or start this one beside it: "
                "--port PORT --data DIR\n");
    return code;
}

/* Process 1, as in a container of its own, is the parent of whatever loses
 * one: of a supervisor that ended before the worker could watch it, say. The
 * kernel collects them then, at no signal; the library waits for none but its
 * own, which it asks for as such (chapter 1). */
static void collect_orphans(void)
{
    struct sigaction action;

    memset(&action, 0, sizeof action);
    action.sa_handler = SIG_DFL;
    action.sa_flags = SA_NOCLDWAIT;
    sigaction(SIGCHLD, &action, NULL);
}

/* A server outlives whoever reads its log through a pipe. Its tasks get their
 * signals as they were. */
static int open_loop(struct app *a, struct server *s)
{
    (void)signal(SIGPIPE, SIG_IGN);
    if (getpid() == 1)
        collect_orphans();
    a->loop = cube_loop_new(cube_world_real(), &a->err);
    if (!a->loop)
        return server_failed(a);
    cube_loop_set_log(a->loop, on_log, &s->is_verbose);
    signal_loop = a->loop;
    return DONE;
}

/* Turns the loop until SIGTERM, SIGINT, or the terminal has gone: SIGHUP,
 * unless that is ignored, as by nohup. */
static int serve(struct app *a)
{
    struct sigaction action, before;

    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGHUP, NULL, &before);
    if (before.sa_handler != SIG_IGN)
        sigaction(SIGHUP, &action, NULL);
    while (!asked_to_end) {
        if (cube_loop_turn(a->loop, -1, &a->err))
            return server_failed(a);
    }
    return DONE;
}

__attribute__((format(printf, 3, 4))) static void
say(struct server *s, enum cube_level level, const char *format, ...)
{
    char text[800];
    va_list args;

    va_start(args, format);
    (void)vsnprintf(text, sizeof text, format, args);
    va_end(args);
    on_log(&s->is_verbose, level, text);
}

static void warn_if_open(struct app *a, struct server *s)
{
    if (!a->tokens[0] && !is_loopback(s->host))
        say(s, CUBE_WARN,
            "listens on %s without a token: whoever reaches it can run "
            "programs here; give one with --token-file or CUBE_TOKEN",
            s->listen);
}

/* All of --workers with commas between them; NULL if there is none. */
static const char *workers_of(struct app *a, struct cube_buf *out)
{
    const char *value;
    size_t at = 0;

    while ((value = next_flag(&a->line, F_WORKERS, &at)))
        cube_buf_printf(out, "%s%s", out->len ? "," : "", value);
    return out->data;
}

static void manager_options(struct app *a, struct server *s,
                            struct cube_manager_options *o)
{
    memset(o, 0, sizeof *o);
    o->listen = s->listen;
    o->data_dir = s->data;
    o->store = flag(&a->line, F_DB);
    o->scheduler_name = flag(&a->line, F_SCHEDULER);
    o->tokens[0] = a->tokens[0];
    o->tokens[1] = a->tokens[1];
    o->host_names = s->host_names;
    o->keep_ms = s->keep_ms;
    o->lost_after_ms = s->lost_after_ms;
    o->epoch = s->epoch;
}

/* Where a server's state is, for the line that it begins with. */
static const char *state_place(const struct app *a, const struct server *s)
{
    const char *kind = flag(&a->line, F_DB);

    return kind && strcmp(kind, "memory") == 0 ? "memory" : s->data;
}

/* A manager has a connection or more to each worker, and those of its clients:
 * the 1024 descriptors that a shell allows are used up at about a hundred
 * workers. The hard limit is the machine's word. A worker keeps the soft one:
 * its tasks have it from there, and programs that use select rely on it. */
static void allow_descriptors(void)
{
    struct rlimit most;

    if (getrlimit(RLIMIT_NOFILE, &most) < 0 || most.rlim_cur >= 65536)
        return;
    most.rlim_cur = most.rlim_max < 65536 ? most.rlim_max : 65536;
    (void)setrlimit(RLIMIT_NOFILE, &most);
}

static int run_manager(struct app *a)
{
    struct server s = {.keep_ms = 0};
    struct cube_manager_options o;
    struct cube_manager *m = NULL;
    struct cube_buf workers = {NULL, 0, 0};
    int code = read_server(a, &s, 5555, "");

    allow_descriptors();
    if (code == DONE)
        code = open_loop(a, &s);
    if (code == DONE) {
        manager_options(a, &s, &o);
        o.workers = workers_of(a, &workers);
        m = cube_manager_new(a->loop, &o, &a->err);
        code = m ? DONE : start_failed(a);
    }
    if (m) {
        say(&s, CUBE_INFO, "manager listens on %s, port %d; state in %s",
            s.host, cube_manager_port(m), state_place(a, &s));
        warn_if_open(a, &s);
        code = serve(a);
        say(&s, CUBE_INFO, "manager ends; its tasks go on");
    }
    cube_manager_free(m);
    cube_buf_free(&workers);
    free((void *)s.host_names);
    return code;
}

static void worker_options(struct app *a, struct server *s,
                           struct cube_worker_options *o)
{
    memset(o, 0, sizeof *o);
    o->name = flag(&a->line, F_NAME);
    o->listen = s->listen;
    o->data_dir = s->data;
    o->store = flag(&a->line, F_DB);
    o->runtime = flag(&a->line, F_RUNTIME);
    o->join = flag(&a->line, F_JOIN);
    o->advertise = flag(&a->line, F_ADVERTISE);
    o->tokens[0] = a->tokens[0];
    o->tokens[1] = a->tokens[1];
    o->host_names = s->host_names;
    o->take_over = flag(&a->line, F_TAKE_OVER) != NULL;
    o->keep_ms = s->keep_ms;
}

/* A manager elsewhere could never reach a worker that listens on loopback. */
static int check_join(struct app *a, struct server *s)
{
    const char *join = flag(&a->line, F_JOIN);
    char host[256];

    if (!join || flag(&a->line, F_ADVERTISE) || !is_loopback(s->host))
        return DONE;
    (void)snprintf(host, sizeof host, "%.*s",
                   *join == '[' ? (int)strcspn(join, "]") + 1
                                : (int)strcspn(join, ":"), join);
    if (is_loopback(host))
        return DONE;
    return usage_error(a->line.command,
                       "a worker that listens on %s cannot be reached by the "
                       "manager at %s; listen elsewhere with --host, and "
                       "protect it with --token-file", s->host, join);
}

/* The name must be the same at the next start, and differ from that of
 * another worker on this host, or of another host. */
static void default_name(char *out, size_t size, long port)
{
    char host[200] = "worker";

    (void)gethostname(host, sizeof host - 1);
    host[strcspn(host, ".")] = 0;
    (void)snprintf(out, size, "%s-%ld", host, port);
}

static int run_worker(struct app *a)
{
    struct server s = {.keep_ms = 0};
    struct cube_worker_options o;
    struct cube_worker *w = NULL;
    char name[256];
    int code = read_server(a, &s, 5556, "");

    if (code == DONE)
        code = check_join(a, &s);
    if (code == DONE)
        code = open_loop(a, &s);
    if (code == DONE) {
        worker_options(a, &s, &o);
        default_name(name, sizeof name, s.port);
        if (!o.name)
            o.name = name;
        w = cube_worker_new(a->loop, &o, &a->err);
        code = w ? DONE : start_failed(a);
    }
    if (w) {
        say(&s, CUBE_INFO, "worker %s listens on %s, port %d; state in %s",
            o.name, s.host, cube_worker_port(w), state_place(a, &s));
        warn_if_open(a, &s);
        code = serve(a);
        say(&s, CUBE_INFO, "worker %s ends; its tasks go on", o.name);
    }
    cube_worker_free(w);
    free((void *)s.host_names);
    return code;
}

#define DEV_WORKERS_MAX 100

/* A manager and its workers, on one loop. */
struct dev {
    struct cube_worker *workers[DEV_WORKERS_MAX];
    long count;
    struct cube_manager *manager;
    struct cube_buf addresses; /* of the workers */
};

/* Says what failed; if that is that somebody is there already, then who. */
static int dev_failed(struct app *a, struct server *s)
{
    int code = server_failed(a);
    char where[300];
    struct cube_client *c;
    struct cube_node_list l;

    if (a->err.code != CUBE_EBUSY)
        return code;
    join_host_port(where, sizeof where, s->host, s->port);
    c = cube_client_new(a->loop, where, a->tokens[0], NULL);
    if (c)
        cube_client_set_timeout(c, 2000);
    if (c && cube_client_nodes(c, &l, NULL) == 0) {
        fprintf(stderr, "A manager with %zu node%s runs at %s already: `cube "
                "status -m %s` shows its tasks.\nEnd it first, or", l.count,
                l.count == 1 ? "" : "s", where, where);
        cube_node_list_free(&l);
    } else {
        fprintf(stderr, "End what runs there, or");
    }
    fprintf(stderr, " start another cluster beside it: cube dev --port %ld "
            "--data DIR\n", s->port + 100);
    cube_client_free(c);
    return code;
}

static int dev_start(struct app *a, struct server *s, struct dev *d)
{
    struct cube_manager_options m;

    for (long i = 0; i < d->count; i++) {
        struct cube_worker_options w;
        char name[32], listen[300];

        worker_options(a, s, &w);
        (void)snprintf(name, sizeof name, "dev-%ld", i + 1);
        join_host_port(listen, sizeof listen, s->host,
                       s->port ? s->port + i + 1 : 0);
        w.name = name;
        w.listen = listen;
        d->workers[i] = cube_worker_new(a->loop, &w, &a->err);
        if (!d->workers[i])
            return dev_failed(a, s);
        cube_buf_printf(&d->addresses, "%s127.0.0.1:%d", i ? "," : "",
                        cube_worker_port(d->workers[i]));
    }
    manager_options(a, s, &m);
    m.workers = d->addresses.data;
    d->manager = cube_manager_new(a->loop, &m, &a->err);
    return d->manager ? DONE : dev_failed(a, s);
}

static int run_dev(struct app *a)
{
    struct server s = {.keep_ms = 0};
    struct dev d;
    int code = read_server(a, &s, 5555, "/dev");

    memset(&d, 0, sizeof d);
    d.count = 2;
    if (code == DONE)
        code = flag_number(a, F_COUNT, 1, DEV_WORKERS_MAX, &d.count);
    if (code == DONE && s.port > 65535 - d.count)
        code = usage_error(a->line.command, "--port %ld leaves no ports behind "
                           "it for the workers, up to 65535", s.port);
    if (code == DONE)
        code = open_loop(a, &s);
    if (code == DONE)
        code = dev_start(a, &s, &d);
    if (code == DONE) {
        say(&s, CUBE_INFO, "manager listens on %s, port %d; %ld worker%s on "
            "%s; state in %s", s.host, cube_manager_port(d.manager), d.count,
            d.count == 1 ? "" : "s", d.addresses.data, state_place(a, &s));
        code = serve(a);
        say(&s, CUBE_INFO, "dev ends; its tasks go on");
    }
    cube_manager_free(d.manager);
    for (long i = 0; i < DEV_WORKERS_MAX; i++)
        cube_worker_free(d.workers[i]);
    cube_buf_free(&d.addresses);
    free((void *)s.host_names);
    return code;
}

/* ---- From flags to a task ---- */

/* "8080:80", "80", "5353:53/udp": exposes the port, and binds it to that of
 * the host, if one is named. */
static int add_port(struct app *a, struct cube_task *t, const char *text)
{
    const char *colon = strrchr(text, ':');
    const char *port = colon ? colon + 1 : text;
    const char *protocol;
    char host[8] = "", full[40];
    long host_port;
    int number;

    if (colon)
        (void)snprintf(host, sizeof host, "%.*s", (int)(colon - text), text);
    if (cube_port_parse(port, &number, &protocol) ||
        (colon && (colon - text > 5 ||
                   parse_number(host, 0, 65535, &host_port))))
        return usage_error(a->line.command,
                           "--publish cannot be \"%s\"; a port is written as "
                           "80, 8080:80 (host:task) or 5353:53/udp", text);
    (void)snprintf(full, sizeof full, "%d/%s", number, protocol);
    for (size_t i = 0; colon && i < t->port_bindings.count; i++) {
        const struct cube_publish *p = &t->port_bindings.list[i];

        if (!strcmp(p->port, full) && strcmp(p->host_port, host))
            return usage_error(a->line.command,
                               "port %s of the task has one port of the host, "
                               "%s or %s", full, p->host_port, host);
    }
    cube_task_expose(t, full);
    if (colon)
        cube_task_publish(t, full, host);
    return DONE;
}

/* "A=b", or "A" for the value that A has here. */
static void add_env(struct cube_task *t, const char *text)
{
    struct cube_buf b = {NULL, 0, 0};
    const char *value = strchr(text, '=') ? NULL : getenv(text);

    cube_buf_printf(&b, "%s%s%s", text, value ? "=" : "", value ? value : "");
    if (value || strchr(text, '='))
        cube_task_add(&t->env, b.data);
    cube_buf_free(&b);
}

static int set_cpu(struct app *a, struct cube_task *t)
{
    const char *text = flag(&a->line, F_CPU);
    char *end;

    if (!text)
        return DONE;
    t->cpu = strtod(text, &end);
    if (end != text && !*end && t->cpu >= 0 && isfinite(t->cpu))
        return DONE;
    return wrong_value(a, F_CPU, "cores are written as 0.5 or 2");
}

/* The flags whose values are sizes, times and numbers. */
static int set_numbers(struct app *a, struct cube_task *t)
{
    const struct {
        enum flag_id id;
        int64_t *field;
    } times[] = {{F_STOP_GRACE, &t->grace_ms},
                 {F_HEALTH_START, &t->health_start_ms},
                 {F_HEALTH_INTERVAL, &t->health_interval_ms},
                 {F_HEALTH_TIMEOUT, &t->health_timeout_ms}};
    long retries = 0;
    int code = set_cpu(a, t);

    if (code == DONE)
        code = flag_size(a, F_MEMORY, &t->mem_bytes);
    if (code == DONE)
        code = flag_size(a, F_DISK, &t->disk_bytes);
    if (code == DONE)
        code = flag_number(a, F_HEALTH_RETRIES, 1, 1000, &retries);
    t->health_retries = retries;
    for (size_t i = 0; i < COUNT(times) && code == DONE; i++)
        code = flag_duration(a, times[i].id, times[i].field);
    return code;
}

static int task_from_flags(struct app *a, struct cube_task *t)
{
    const struct line *l = &a->line;
    const char *value;
    size_t at = 0;
    int code = set_numbers(a, t);

    if (l->own_args > 0)
        cube_task_set(&t->image, l->args[0]);
    cube_task_set(&t->name, flag(l, F_NAME));
    cube_task_set(&t->restart_policy, flag(l, F_RESTART));
    cube_task_set(&t->health_check, flag(l, F_HEALTH));
    while (code == DONE && (value = next_flag(l, F_PUBLISH, &at)))
        code = add_port(a, t, value);
    for (at = 0; (value = next_flag(l, F_ENV, &at));)
        add_env(t, value);
    for (int i = l->own_args; i < l->arg_count; i++)
        cube_task_add(&t->cmd, l->args[i]);
    return code;
}

/* The first flag that says something of the task, or NULL. */
static const struct flag *describing_flag(const struct line *l)
{
    for (size_t i = 0; i < l->given_count; i++) {
        const struct flag *f = l->given[i].flag;

        if (strcmp(f->commands, "run") == 0 && f->id != F_FILE)
            return f;
    }
    return NULL;
}

/* Which file describes the task? NULL: none, the flags do. */
static int task_file(struct app *a, const char **out)
{
    const struct line *l = &a->line;
    const struct flag *f = describing_flag(l);

    *out = flag(l, F_FILE);
    if (*out && f)
        return usage_error(l->command, "takes the task from a file or from "
                           "flags such as --%s, not from both", f->name);
    if (*out && l->arg_count > 0)
        return usage_error(l->command, "takes the task from a file or from "
                           "an image and flags, not from both");
    if (*out || l->arg_count > 0)
        return DONE;
    if (f || access("task.json", R_OK) != 0)
        return usage_error(l->command, "needs an image, a command after --, "
                           "or a file with --filename");
    *out = "task.json"; /* as the Go program has it */
    return DONE;
}

static int event_from_file(struct app *a, const char *path,
                           struct cube_event **out)
{
    struct cube_buf text = {NULL, 0, 0};
    int code = read_file(a, path, &text);

    if (code == DONE &&
        cube_task_or_event_parse(text.data ? text.data : "", text.len, true,
                                 out, &a->err)) {
        complain("cube run: %s: %s\n",
                 strcmp(path, "-") ? path : "standard input", a->err.text);
        code = FAILED;
    }
    cube_buf_free(&text);
    return code;
}

/* The event that asks for the task, with an ID of its own: an answer that is
 * lost on the way can then be asked for again. NULL: said why not. */
static struct cube_event *make_event(struct app *a, int *code)
{
    struct cube_event *e = NULL;
    const char *path;

    *code = task_file(a, &path);
    if (*code == DONE && path) {
        *code = event_from_file(a, path, &e);
    } else if (*code == DONE) {
        e = cube_event_new();
        e->task = cube_task_new();
        e->state = CUBE_RUNNING;
        *code = task_from_flags(a, e->task);
    }
    if (*code != DONE) {
        cube_event_free(e);
        return NULL;
    }
    if (!*e->id)
        cube_uuid_new(cube_world_real(), e->id);
    if (e->task && !*e->task->id)
        cube_uuid_new(cube_world_real(), e->task->id);
    if (!cube_time_is_set(&e->timestamp))
        e->timestamp = cube_time_from_ns(wall_ns());
    return e;
}

/* ---- The clients ---- */

static const char *manager_of(struct app *a)
{
    const char *where = flag(&a->line, F_MANAGER);

    return where ? where : "localhost:5555";
}

/* Says what was tried and failed; returns the exit code. */
__attribute__((format(printf, 2, 3))) static int
client_failed(struct app *a, const char *format, ...)
{
    bool is_away = a->err.code == CUBE_ECONN || a->err.code == CUBE_ETIMEOUT;
    char what[400];
    va_list args;

    va_start(args, format);
    (void)vsnprintf(what, sizeof what, format, args);
    va_end(args);
    complain("cube %s: %s: ", a->line.command->name, what);
    if (!is_away) {
        complain("%s\n", a->err.text);
        if (strstr(a->err.text, "(401)") && !a->tokens[0])
            fprintf(stderr, "Give the cluster's token with --token-file or "
                            "CUBE_TOKEN.\n");
        return FAILED;
    }
    complain("no manager answered at %s: %s\n"
             "Start one with `cube manager`, or name another one with "
             "--manager HOST:PORT.\n", manager_of(a), a->err.text);
    return NO_MANAGER;
}

static int open_client(struct app *a)
{
    int code = read_tokens(a);

    if (code != DONE)
        return code;
    a->loop = cube_loop_new(cube_world_real(), &a->err);
    if (!a->loop)
        return server_failed(a);
    a->client = cube_client_new(a->loop, manager_of(a), a->tokens[0],
                                &a->err);
    if (a->client)
        return DONE;
    return usage_error(a->line.command, "--manager: %s", a->err.text);
}

static bool wants_json(struct app *a)
{
    const char *format = flag(&a->line, F_OUTPUT);

    return format && strcasecmp(format, "json") == 0;
}

/* "web (1234abcd)", or the ID alone. */
static const char *title_of(const struct cube_task *t, char out[160])
{
    if (*t->name)
        (void)snprintf(out, 160, "%.128s (%.*s)", t->name, ID_SHOWN, t->id);
    else
        (void)snprintf(out, 160, "%.*s", ID_SHOWN, t->id);
    flatten(out);
    return out;
}

/* How good a name is for a task: 4 the whole ID; 3 its name, and it is not
 * over yet (or is, with `wants_finished`); 2 its name; 1 a beginning of the
 * ID; 0 no name of it. */
static int match(const struct cube_task *t, const char *text,
                 bool wants_finished)
{
    if (strcasecmp(t->id, text) == 0)
        return 4;
    if (*t->name && strcmp(t->name, text) == 0)
        return cube_task_is_finished(t) == wants_finished ? 3 : 2;
    return *text && strncasecmp(t->id, text, strlen(text)) == 0;
}

static int say_ambiguous(struct app *a, const struct cube_task_list *l,
                         const char *text, bool wants_finished, int best)
{
    char created[64];

    fprintf(stderr, "cube %s: \"%s\" can be each of these; name one by its "
            "ID:\n", a->line.command->name, text);
    for (size_t i = 0; i < l->count; i++) {
        const struct cube_task *t = l->list[i];

        if (match(t, text, wants_finished) != best)
            continue;
        print_ago(&t->created_time, created, sizeof created);
        created[0] = (char)tolower((unsigned char)created[0]);
        complain("  %s  %s%s%s, created %s\n", t->id, t->name,
                 *t->name ? ", " : "", cube_state_name(t->state), created);
    }
    return FAILED;
}

/* Finds the task that is meant. A name that several tasks have means the one
 * that is not over yet, if that is one alone. NULL, and `*code` is still DONE:
 * there is none. */
static const struct cube_task *find_task(struct app *a,
                                         const struct cube_task_list *l,
                                         const char *text, int *code)
{
    bool wants_finished = strcmp(a->line.command->name, "rm") == 0;
    const struct cube_task *found = NULL;
    int best = 0, count = 0;

    for (size_t i = 0; i < l->count; i++) {
        int m = match(l->list[i], text, wants_finished);

        if (m > best) {
            best = m;
            count = 0;
            found = l->list[i];
        }
        count += m > 0 && m == best;
    }
    *code = DONE;
    if (count > 1)
        *code = say_ambiguous(a, l, text, wants_finished, best);
    return count > 1 ? NULL : found;
}

/* Asks for all tasks and finds one; on success a copy that the caller
 * frees. */
static int get_task(struct app *a, const char *text, struct cube_task **out)
{
    const struct cube_task *t;
    struct cube_task_list l;
    int code;

    *out = NULL;
    if (cube_client_tasks(a->client, &l, &a->err))
        return client_failed(a, "cannot list the tasks");
    t = find_task(a, &l, text, &code);
    if (t)
        *out = cube_task_copy(t);
    cube_task_list_free(&l);
    return code;
}

static int no_such_task(struct app *a, const char *text)
{
    fprintf(stderr, "cube %s: the manager at %s knows no task \"%s\"; "
            "`cube status -a` lists all\n", a->line.command->name,
            manager_of(a), text);
    return FAILED;
}

/* ---- Waiting until a task runs, or is over ---- */

#define MANAGER_AWAY_MAX 20 /* tries, one a second, before it is given up */

struct wait {
    struct app *app;
    const char *id;
    bool for_end;       /* until it has ended; else until it runs */
    bool is_done;
    int code;
    int tries;          /* in a row without a manager */
    bool is_line_open;  /* progress stands on the terminal's line */
    char said[300];     /* last on stderr */
};

static void close_line(struct wait *w)
{
    if (w->is_line_open)
        fprintf(stderr, "\r\033[K");
    w->is_line_open = false;
}

/* Says what is awaited: on a terminal in one line that changes; else, but not
 * for progress, in lines of their own. */
static void say_waiting(struct wait *w, const struct cube_task *t)
{
    const char *text = *t->progress ? t->progress : t->error;
    char title[160];

    if (!*text || strncmp(w->said, text, sizeof w->said - 1) == 0 ||
        (w->for_end && t->state == CUBE_PENDING))
        return;
    (void)snprintf(w->said, sizeof w->said, "%s", text);
    flatten(w->said);
    close_line(w);
    if (isatty(STDERR_FILENO)) {
        fprintf(stderr, "%s: %.60s", title_of(t, title), w->said);
        w->is_line_open = true;
    } else if (!*t->progress) {
        fprintf(stderr, "cube %s: %s is %s: %s\n",
                w->app->line.command->name, title_of(t, title),
                cube_state_name(t->state), w->said);
    }
}

static void end_wait(struct wait *w, int code)
{
    close_line(w);
    w->is_done = true;
    w->code = code;
}

static void say_failed(struct wait *w, const struct cube_task *t)
{
    char title[160];

    end_wait(w, FAILED);
    complain("cube run: task %s failed: %s\n", title_of(t, title),
             *t->error ? t->error : "the worker gives no reason");
    if (!cube_task_is_finished(t))
        fprintf(stderr, "It will be started again; `cube stop %.*s` ends "
                "that.\n", ID_SHOWN, t->id);
}

/* It is over as far as the manager can tell, and may have words on that: of a
 * node that was lost before it was told. */
static void say_ended(struct wait *w, const struct cube_task *t)
{
    char title[160];

    end_wait(w, DONE);
    if (*t->error)
        complain("cube %s: %s is %s: %s\n", w->app->line.command->name,
                 title_of(t, title), cube_state_name(t->state), t->error);
}

static void look_at_task(struct wait *w, const struct cube_task *t)
{
    if (w->for_end && cube_task_is_finished(t))
        say_ended(w, t);
    else if (!w->for_end && t->state == CUBE_FAILED)
        say_failed(w, t);
    else if (!w->for_end &&
             (t->state == CUBE_RUNNING || t->state == CUBE_COMPLETED))
        end_wait(w, DONE);
    else
        say_waiting(w, t);
}

static bool on_notice(void *arg, const struct cube_notice *n)
{
    struct wait *w = arg;
    bool is_gone = n->type == CUBE_NOTICE_GONE && n->id &&
                   strcmp(n->id, w->id) == 0;

    w->tries = 0;
    if (n->type == CUBE_NOTICE_TASK && strcmp(n->task->id, w->id) == 0)
        look_at_task(w, n->task);
    if (is_gone) {
        end_wait(w, w->for_end ? DONE : FAILED);
        if (!w->for_end)
            fprintf(stderr, "cube run: task %.*s was removed\n", ID_SHOWN,
                    w->id);
    }
    return !w->is_done;
}

static char last_words[160]; /* of a command that is interrupted */

/* The signal is blocked while this runs: it ends us when we return. */
static void on_interrupt(int number)
{
    if (write(STDERR_FILENO, last_words, strlen(last_words)) < 0)
        last_words[0] = 0;
    signal(number, SIG_DFL);
    raise(number);
}

/* To stop waiting is not to take back what was asked for: says so, unless the
 * signal is ignored, as that of a command in the background of a script is.
 * `before` is what to put back. */
static void set_last_words(const struct wait *w, struct sigaction *before)
{
    struct sigaction action;

    (void)snprintf(last_words, sizeof last_words,
                   w->for_end ? "\ncube %s: task %.*s will be stopped all the "
                                "same\n"
                              : "\ncube %s: task %.*s stays; `cube stop %.*s` "
                                "ends it\n",
                   w->app->line.command->name, ID_SHOWN, w->id, ID_SHOWN,
                   w->id);
    memset(&action, 0, sizeof action);
    action.sa_handler = on_interrupt;
    sigaction(SIGINT, NULL, before);
    if (before->sa_handler != SIG_IGN)
        sigaction(SIGINT, &action, NULL);
}

/* Is the manager away, or has it too many readers just now? */
static bool is_worth_waiting(const struct app *a)
{
    return a->err.code == CUBE_ECONN || a->err.code == CUBE_ETIMEOUT ||
           a->err.code == CUBE_EBUSY;
}

/* Waits on the manager's events, through restarts of the manager. */
static int wait_for_task(struct app *a, const char *id, bool for_end)
{
    struct sigaction before;
    struct wait w;

    memset(&w, 0, sizeof w);
    w.app = a;
    w.id = id;
    w.for_end = for_end;
    set_last_words(&w, &before);
    while (!w.is_done) {
        struct timespec second = {1, 0};

        if (cube_client_events(a->client, id, NULL, on_notice, &w, &a->err) ==
            0)
            continue;
        if (is_worth_waiting(a) && ++w.tries <= MANAGER_AWAY_MAX)
            nanosleep(&second, NULL);
        else {
            close_line(&w);
            end_wait(&w, client_failed(a, "cannot wait for task %.*s",
                                       ID_SHOWN, id));
        }
    }
    sigaction(SIGINT, &before, NULL);
    return w.code;
}

/* ---- run, stop, rm ---- */

/* Prints the accepted task, and waits for it. */
static int follow_run(struct app *a, const struct cube_task *t)
{
    struct cube_buf json = {NULL, 0, 0};
    int code = DONE;

    if (!wants_json(a)) {
        printf("%s\n", t->id);
        fflush(stdout);
    }
    if (!flag(&a->line, F_DETACH))
        code = wait_for_task(a, t->id, false);
    if (wants_json(a)) {
        struct cube_task *now = NULL;

        if (code != NO_MANAGER)
            (void)get_task(a, t->id, &now);
        cube_task_print(now ? now : t, &json);
        printf("%s\n", json.data);
        cube_task_free(now);
        cube_buf_free(&json);
    }
    return code;
}

static int run_run(struct app *a)
{
    struct cube_task *t = NULL;
    int code;
    struct cube_event *e = make_event(a, &code);

    if (!e)
        return code;
    code = open_client(a);
    if (code == DONE && cube_client_submit(a->client, e, &t, &a->err))
        code = client_failed(a, "cannot run the task");
    if (code == DONE)
        code = follow_run(a, t);
    cube_task_free(t);
    cube_event_free(e);
    return code;
}

/* What stop and rm do to each task that is named. */
static int stop_one(struct app *a, const struct cube_task *t)
{
    char title[160];

    if (cube_task_is_finished(t))
        return DONE;
    if (cube_client_stop(a->client, t->id, &a->err))
        return client_failed(a, "cannot stop task %s", title_of(t, title));
    return DONE;
}

static int stopped_one(struct app *a, const struct cube_task *t)
{
    bool is_detached = flag(&a->line, F_DETACH) != NULL;
    char title[160], reason[800];
    int code = DONE;

    if (cube_task_is_finished(t)) {
        (void)snprintf(reason, sizeof reason, "%s", t->error);
        flatten(reason);
        printf("%s is %s already%s%s\n", title_of(t, title),
               cube_state_name(t->state), *reason ? ": " : "", reason);
        return DONE;
    }
    if (!is_detached)
        code = wait_for_task(a, t->id, true);
    if (code == DONE)
        printf("%s %s\n", is_detached ? "stopping" : "stopped",
               title_of(t, title));
    return code;
}

static int remove_one(struct app *a, const struct cube_task *t)
{
    char title[160];
    int code = DONE;

    if (flag(&a->line, F_FORCE) && !cube_task_is_finished(t)) {
        code = stop_one(a, t);
        if (code == DONE)
            code = wait_for_task(a, t->id, true);
    }
    if (code != DONE)
        return code;
    if (cube_client_remove(a->client, t->id, &a->err))
        return client_failed(a, "cannot remove task %s", title_of(t, title));
    printf("removed %s\n", title_of(t, title));
    return DONE;
}

/* The tasks that are named, each found once. */
struct named {
    struct cube_task_list all;
    const struct cube_task **list; /* NULL: not found, and said so */
    int count, code;
};

static int find_named(struct app *a, struct named *n)
{
    memset(n, 0, sizeof *n);
    if (cube_client_tasks(a->client, &n->all, &a->err))
        return client_failed(a, "cannot list the tasks");
    n->count = a->line.arg_count;
    n->list = calloc((size_t)n->count + 1, sizeof *n->list);
    for (int i = 0; i < n->count && n->list; i++) {
        const char *text = a->line.args[i];
        int code;

        n->list[i] = find_task(a, &n->all, text, &code);
        if (!n->list[i] && code == DONE)
            code = no_such_task(a, text);
        n->code = code > n->code ? code : n->code;
    }
    return DONE;
}

/* Does `fn` to each; one that fails does not keep it from the others. */
static void each_named(struct app *a, struct named *n,
                       int (*fn)(struct app *, const struct cube_task *))
{
    for (int i = 0; i < n->count && n->code != NO_MANAGER; i++) {
        int code = n->list[i] ? fn(a, n->list[i]) : DONE;

        if (code != DONE)
            n->list[i] = NULL;
        n->code = code > n->code ? code : n->code;
    }
}

static int end_named(struct named *n)
{
    cube_task_list_free(&n->all);
    free(n->list);
    return n->code;
}

/* All are told first, so that they end side by side. */
static int run_stop(struct app *a)
{
    struct named n;
    int code = open_client(a);

    if (code == DONE)
        code = find_named(a, &n);
    if (code != DONE)
        return code;
    each_named(a, &n, stop_one);
    each_named(a, &n, stopped_one);
    return end_named(&n);
}

static int run_rm(struct app *a)
{
    struct named n;
    int code = open_client(a);

    if (code == DONE)
        code = find_named(a, &n);
    if (code != DONE)
        return code;
    each_named(a, &n, remove_one);
    return end_named(&n);
}

/* ---- status ---- */

/* Why a task is not as it should be, or what else there is to say. */
static void print_reason(const struct cube_task *t, char *out, size_t size)
{
    char span[64] = "";
    size_t n = 0;

    *out = 0;
    if (t->wanted == CUBE_WANT_STOP && !cube_task_is_finished(t))
        n = (size_t)snprintf(out, size, "stopping");
    else if (*t->progress)
        n = (size_t)snprintf(out, size, "%.200s", t->progress);
    else if (t->state == CUBE_FAILED && cube_time_is_set(&t->restart_time)) {
        print_span(cube_time_to_ns(&t->restart_time) - shown_ns(), span,
                   sizeof span);
        span[0] = (char)tolower((unsigned char)span[0]);
        n = (size_t)snprintf(out, size, "starts again in %s", span);
    } else if (t->restart_count > 0 && (t->state == CUBE_RUNNING ||
                                        t->state == CUBE_FAILED))
        n = (size_t)snprintf(out, size, "%s %d %s%s",
                             t->state == CUBE_FAILED ? "gave up after"
                                                     : "restarted",
                             (int)t->restart_count,
                             t->state == CUBE_FAILED ? "restart" : "time",
                             t->restart_count == 1 ? "" : "s");
    if (*t->error && n < size)
        (void)snprintf(out + n, size - n, "%s%s", n ? ": " : "", t->error);
    flatten(out);
}

/* "8080->80/tcp, 9090->90/udp"; the same port over IPv4 and IPv6 once. */
static void print_ports(const struct cube_task *t, struct cube_buf *out)
{
    const char *last = "";

    for (size_t i = 0; i < t->host_ports.count; i++) {
        const struct cube_port *p = &t->host_ports.list[i];

        last = "";
        for (size_t k = 0; k < p->count; k++) {
            if (strcmp(p->bindings[k].port, last) != 0)
                cube_buf_printf(out, "%s%s->%s", out->len ? ", " : "",
                                p->bindings[k].port, p->port);
            last = p->bindings[k].port;
        }
    }
}

static enum color color_of(const struct cube_task *t)
{
    static const enum color colors[] = {YELLOW, YELLOW, GREEN, PLAIN, RED};

    return (size_t)t->state < COUNT(colors) ? colors[t->state] : PLAIN;
}

static void add_task(struct table *table, const struct cube_task *t)
{
    const struct cube_time *begin = cube_time_is_set(&t->created_time)
                                        ? &t->created_time : &t->start_time;
    struct cube_buf ports = {NULL, 0, 0};
    char id[ID_SHOWN + 1], created[64], container[13], reason[800];

    (void)snprintf(id, sizeof id, "%.*s", ID_SHOWN, t->id);
    (void)snprintf(container, sizeof container, "%.12s", t->container_id);
    print_ago(begin, created, sizeof created);
    print_reason(t, reason, sizeof reason);
    print_ports(t, &ports);
    add_cell(table, PLAIN, id);
    add_cell(table, PLAIN, t->name);
    add_cell(table, PLAIN, created);
    add_cell(table, color_of(t), cube_state_name(t->state));
    add_cell(table, PLAIN, container);
    add_cell(table, PLAIN, t->image);
    add_cell(table, PLAIN, t->node);
    add_cell(table, PLAIN, ports.data ? ports.data : "");
    add_cell(table, PLAIN, reason);
    cube_buf_free(&ports);
}

/* Without --all: is it long over? */
static bool is_old(const struct cube_task *t)
{
    return cube_task_is_finished(t) && cube_time_is_set(&t->finish_time) &&
           shown_ns() - cube_time_to_ns(&t->finish_time) > HOUR_NS;
}

static void add_heads(struct table *t, const char *const *heads,
                        size_t count)
{
    memset(t, 0, sizeof *t);
    t->columns = count;
    for (size_t i = 0; i < count; i++)
        add_cell(t, PLAIN, heads[i]);
}

static void print_tasks(const struct cube_task_list *l, bool shows_all)
{
    static const char *const heads[] = {
        "ID", "NAME", "CREATED", "STATE", "CONTAINERNAME", "IMAGE", "NODE",
        "PORTS", "REASON"};
    struct table table;

    add_heads(&table, heads, COUNT(heads));
    for (size_t i = 0; i < l->count; i++) {
        if (shows_all || !is_old(l->list[i]))
            add_task(&table, l->list[i]);
    }
    print_table(&table);
}

static void print_tasks_json(const struct cube_task_list *l, bool shows_all)
{
    struct cube_buf json = {NULL, 0, 0};

    for (size_t i = 0; i < l->count; i++) {
        if (!shows_all && is_old(l->list[i]))
            continue;
        cube_buf_puts(&json, json.len ? ",\n" : "");
        cube_task_print(l->list[i], &json);
    }
    printf("[%s]\n", json.data ? json.data : "");
    cube_buf_free(&json);
}

/* By age: a list of what was comes in the order of changes. */
static int by_age(const void *a, const void *b)
{
    const struct cube_task *const *x = a, *const *y = b;
    int64_t s = cube_time_to_ns(&(*x)->created_time);
    int64_t t = cube_time_to_ns(&(*y)->created_time);

    return s != t ? (s > t) - (s < t) : strcmp((*x)->id, (*y)->id);
}

static int run_status(struct app *a)
{
    bool shows_all = flag(&a->line, F_ALL) != NULL;
    const struct cube_time *at;
    struct cube_time time;
    struct cube_task_list l;
    int code = read_at(a, &time, &at);

    if (code == DONE)
        code = open_client(a);
    if (code != DONE)
        return code;
    if (cube_client_tasks_at(a->client, at, &l, &a->err))
        return client_failed(a, "cannot list the tasks");
    if (at && l.count > 0)
        qsort(l.list, l.count, sizeof *l.list, by_age);
    if (wants_json(a))
        print_tasks_json(&l, shows_all);
    else
        print_tasks(&l, shows_all);
    cube_task_list_free(&l);
    return DONE;
}

/* ---- node ---- */

static void add_node(struct table *table, const struct cube_node_info *n)
{
    bool is_up = !*n->state || strcmp(n->state, "up") == 0;
    char text[64];

    add_cell(table, PLAIN, n->name);
    (void)snprintf(text, sizeof text, "%lld", (long long)n->mem_kb / 1024);
    add_cell(table, PLAIN, text);
    (void)snprintf(text, sizeof text, "%lld",
                   (long long)(n->disk_bytes >> 30));
    add_cell(table, PLAIN, text);
    add_cell(table, PLAIN, n->role);
    (void)snprintf(text, sizeof text, "%lld", (long long)n->task_count);
    add_cell(table, PLAIN, text);
    add_cell(table, is_up ? GREEN : RED, *n->state ? n->state : "-");
    (void)snprintf(text, sizeof text, "%.0f %%", n->cpu_use * 100);
    add_cell(table, PLAIN, n->cpu_use < 0 || !is_up ? "-" : text);
    add_cell(table, PLAIN, *n->runtime ? n->runtime : "-");
    add_cell(table, PLAIN, n->error);
}

static void print_nodes(const struct cube_node_list *l)
{
    static const char *const heads[] = {
        "NAME", "MEMORY (MiB)", "DISK (GiB)", "ROLE", "TASKS", "STATE", "CPU",
        "RUNTIME", "REASON"};
    struct table table;

    add_heads(&table, heads, COUNT(heads));
    for (size_t i = 0; i < l->count; i++)
        add_node(&table, &l->list[i]);
    print_table(&table);
}

/* What was on each node then: its own record counts what was there when that
 * was written. */
static int count_tasks(struct app *a, const struct cube_time *at,
                       struct cube_node_list *nodes)
{
    struct cube_task_list tasks;

    if (cube_client_tasks_at(a->client, at, &tasks, &a->err))
        return client_failed(a, "cannot list the tasks");
    for (size_t i = 0; i < nodes->count; i++) {
        nodes->list[i].task_count = 0;
        for (size_t k = 0; k < tasks.count; k++) {
            const struct cube_task *t = tasks.list[k];

            nodes->list[i].task_count +=
                t->state != CUBE_PENDING && !cube_task_is_finished(t) &&
                strcmp(t->node, nodes->list[i].name) == 0;
        }
    }
    cube_task_list_free(&tasks);
    return DONE;
}

static int by_name(const void *a, const void *b)
{
    const struct cube_node_info *x = a, *y = b;

    return strcmp(x->name, y->name);
}

static int run_node(struct app *a)
{
    const struct cube_time *at;
    struct cube_time time;
    struct cube_node_list l;
    int code = read_at(a, &time, &at);

    if (code == DONE)
        code = open_client(a);
    if (code != DONE)
        return code;
    if (cube_client_nodes_at(a->client, at, &l, &a->err))
        return client_failed(a, "cannot list the nodes");
    if (at && l.count > 0)
        qsort(l.list, l.count, sizeof *l.list, by_name);
    if (at && !wants_json(a))
        code = count_tasks(a, at, &l);
    if (!wants_json(a) && code == DONE)
        print_nodes(&l);
    for (size_t i = 0; i < l.count && wants_json(a); i++)
        printf("%s%s", i ? ",\n" : "[", l.list[i].json);
    if (wants_json(a))
        printf(l.count ? "]\n" : "[]\n");
    cube_node_list_free(&l);
    return code;
}

static int run_node_rm(struct app *a)
{
    int code = open_client(a);

    if (code != DONE)
        return code;
    for (int i = 0; i < a->line.arg_count && code != NO_MANAGER; i++) {
        const char *name = a->line.args[i];

        if (cube_client_node_remove(a->client, name, &a->err))
            code = client_failed(a, "cannot forget node %s", name);
        else
            printf("removed %s\n", name);
    }
    return code;
}

/* ---- logs, inspect, events ---- */

static bool on_text(void *arg, const char *data, size_t len)
{
    *(bool *)arg = true;
    return fwrite(data, 1, len, stdout) == len && fflush(stdout) == 0;
}

static int run_logs(struct app *a)
{
    bool follows = flag(&a->line, F_FOLLOW) != NULL, has_begun = false;
    struct cube_task *t = NULL;
    long tail = -1;
    int code = flag_number(a, F_TAIL, 0, 1000000000, &tail);

    if (code == DONE)
        code = open_client(a);
    if (code == DONE)
        code = get_task(a, a->line.args[0], &t);
    if (code == DONE && !t)
        return no_such_task(a, a->line.args[0]);
    if (code == DONE && cube_client_logs(a->client, t->id, follows, tail,
                                         on_text, &has_begun, &a->err)) {
        if (has_begun) /* so a manager did answer */
            a->err.code = CUBE_EIO;
        code = client_failed(a, has_begun ? "the log of %s breaks off here"
                                          : "cannot read the logs of %s",
                             a->line.args[0]);
    }
    cube_task_free(t);
    return code;
}

/* {"Task":{...},"Container":{...}}; null if it has no container. */
static int inspect_task(struct app *a, const struct cube_task *t)
{
    struct cube_buf json = {NULL, 0, 0}, container = {NULL, 0, 0};
    int code = DONE;

    if (cube_client_inspect(a->client, t->id, &container, &a->err)) {
        cube_buf_free(&container);
        if (a->err.code == CUBE_ECONN || a->err.code == CUBE_ETIMEOUT)
            code = client_failed(a, "cannot inspect %s", a->line.args[0]);
    }
    if (code == DONE) {
        cube_buf_puts(&json, "{\"Task\":");
        cube_task_print(t, &json);
        cube_buf_printf(&json, ",\"Container\":%s}",
                        container.data ? container.data : "null");
        print_json(json.data, json.len);
    }
    cube_buf_free(&json);
    cube_buf_free(&container);
    return code;
}

static int inspect_node(struct app *a, const char *text)
{
    struct cube_node_list l;
    bool is_found = false;

    if (cube_client_nodes(a->client, &l, &a->err))
        return client_failed(a, "cannot list the nodes");
    for (size_t i = 0; i < l.count && !is_found; i++) {
        const struct cube_node_info *n = &l.list[i];

        is_found = strcmp(n->name, text) == 0 ||
                   (strlen(text) >= 4 &&
                    strncasecmp(n->worker, text, strlen(text)) == 0);
        if (is_found)
            print_json(n->json, strlen(n->json));
    }
    cube_node_list_free(&l);
    if (is_found)
        return DONE;
    fprintf(stderr, "cube inspect: the manager at %s knows no task and no "
            "node \"%s\"\n", manager_of(a), text);
    return FAILED;
}

static int run_inspect(struct app *a)
{
    const char *text = a->line.args[0];
    struct cube_task *t = NULL;
    int code = open_client(a);

    if (code == DONE)
        code = get_task(a, text, &t);
    if (code != DONE)
        return code;
    code = t ? inspect_task(a, t) : inspect_node(a, text);
    cube_task_free(t);
    return code;
}

struct watch {
    struct app *app;
    bool follows, has_begun, is_listing;
    char cursor[80]; /* of the last event; a broken stream goes on there */
};

/* "2006-01-02 10:32:00", local time, or "-". */
static void print_clock(const struct cube_time *t, char out[32])
{
    time_t sec = (time_t)(cube_time_to_ns(t) / 1000000000);
    struct tm tm;

    (void)snprintf(out, 32, "-");
    if (cube_time_is_set(t) && localtime_r(&sec, &tm))
        strftime(out, 32, "%Y-%m-%d %H:%M:%S", &tm);
}

/* The last thing that befell a task, as far as its record tells: a list shows
 * what is, and its lines bear the time at which it was asked for. */
static struct cube_time last_time(const struct cube_task *t)
{
    const struct cube_time *times[] = {&t->start_time, &t->finish_time};
    struct cube_time last = t->created_time;

    for (size_t i = 0; i < COUNT(times); i++) {
        if (cube_time_is_set(times[i]) &&
            (!cube_time_is_set(&last) ||
             cube_time_to_ns(times[i]) > cube_time_to_ns(&last)))
            last = *times[i];
    }
    return last;
}

static void print_notice(const struct cube_notice *n, bool is_listing)
{
    struct cube_time time = is_listing && n->task ? last_time(n->task)
                                                  : n->time;
    char reason[800], title[160], when[32], text[1600] = "";

    print_clock(&time, when);
    if (n->type == CUBE_NOTICE_GONE) {
        (void)snprintf(text, sizeof text, "task %.*s removed", ID_SHOWN,
                       n->id);
    } else if (n->type == CUBE_NOTICE_TASK) {
        print_reason(n->task, reason, sizeof reason);
        (void)snprintf(text, sizeof text, "task %s %s%s%s%s%s",
                       title_of(n->task, title),
                       cube_state_name(n->task->state),
                       *n->task->node ? " on " : "", n->task->node,
                       *reason ? ": " : "", reason);
    } else if (n->type == CUBE_NOTICE_NODE) {
        (void)snprintf(text, sizeof text, "node %s %s%s%s", n->node->name,
                       n->node->state, *n->node->error ? ": " : "",
                       n->node->error);
    }
    flatten(text);
    if (*text)
        printf("%-19s  %s\n", when, text);
}

static bool on_event(void *arg, const struct cube_notice *n)
{
    struct watch *w = arg;

    w->has_begun = true;
    if (n->cursor)
        (void)snprintf(w->cursor, sizeof w->cursor, "%s", n->cursor);
    w->is_listing = n->type == CUBE_NOTICE_RESET ||
                    (w->is_listing && n->type != CUBE_NOTICE_LISTED);
    if (wants_json(w->app) && n->type != CUBE_NOTICE_BEAT)
        printf("%.*s\n", (int)n->len, n->line);
    else
        print_notice(n, w->is_listing);
    return fflush(stdout) == 0 &&
           (w->follows || n->type != CUBE_NOTICE_LISTED);
}

/* With --follow it outlives restarts of the manager. */
static int run_events(struct app *a)
{
    struct watch w = {.app = a, .follows = flag(&a->line, F_FOLLOW) != NULL};
    int code = open_client(a);

    while (code == DONE) {
        struct timespec second = {1, 0};

        if (cube_client_events(a->client, NULL, *w.cursor ? w.cursor : NULL,
                               on_event, &w, &a->err) == 0)
            break;
        if (!w.follows || !w.has_begun || !is_worth_waiting(a))
            code = client_failed(a, "cannot follow the events");
        else
            nanosleep(&second, NULL);
    }
    return code;
}

/* ---- history ---- */

/* One change: when, what it was then, where, and why. */
static void print_change(const struct cube_notice *n)
{
    const char *state = "removed", *node = "-";
    char reason[800] = "", when[32], text[1600];

    print_clock(&n->time, when);
    if (n->task) {
        print_reason(n->task, reason, sizeof reason);
        if (n->why && strcmp(reason, "stopping") == 0)
            *reason = 0; /* which is what `why` says */
        state = cube_state_name(n->task->state);
        node = *n->task->node ? n->task->node : node;
    }
    (void)snprintf(text, sizeof text, "%-19s   %-9s   %-21s   %s%s%s", when,
                   state, node, n->why ? n->why : "",
                   n->why && *reason ? ": " : "", reason);
    flatten(text);
    printf("%s\n", text);
}

struct story {
    struct app *app;
    size_t count;
};

static bool on_change(void *arg, const struct cube_notice *n)
{
    struct story *s = arg;

    if (n->type != CUBE_NOTICE_TASK && n->type != CUBE_NOTICE_GONE)
        return true;
    shown_at_ns = cube_time_to_ns(&n->time); /* ages are those of then */
    if (wants_json(s->app))
        printf("%.*s\n", (int)n->len, n->line);
    else if (s->count == 0)
        printf("%-19s   %-9s   %-21s   %s\n", "TIME", "STATE", "NODE", "WHY");
    if (!wants_json(s->app))
        print_change(n);
    s->count++;
    return !ferror(stdout);
}

static int run_history(struct app *a)
{
    const char *text = a->line.args[0];
    struct story s = {a, 0};
    struct cube_task *t = NULL;
    char id[CUBE_UUID_TEXT];
    int code = open_client(a);

    if (code == DONE)
        code = get_task(a, text, &t);
    if (code != DONE)
        return code;
    if (t)
        memcpy(id, t->id, sizeof id);
    else if (cube_uuid_parse(text, strlen(text), id))
        return no_such_task(a, text);
    cube_task_free(t);
    if (cube_client_history(a->client, id, on_change, &s, &a->err))
        return client_failed(a, "cannot read the history of %s", text);
    return s.count > 0 ? DONE : no_such_task(a, text);
}

/* ---- backup, store ---- */

static int run_backup(struct app *a)
{
    const char *path = a->line.args[0];
    uint64_t records;
    int code = open_client(a);

    if (code != DONE)
        return code;
    if (cube_client_backup(a->client, path, flag(&a->line, F_FORCE) != NULL,
                           &records, &a->err) == 0) {
        printf("copied %llu records to %s\n", (unsigned long long)records,
               path);
        return DONE;
    }
    code = client_failed(a, "cannot copy to %s", path);
    if (a->err.code == CUBE_EEXIST)
        fprintf(stderr, "Name another file, or replace it with --force.\n");
    return code;
}

/* Says what is wrong with the file at rest; returns the exit code. */
static int store_failed(struct app *a)
{
    complain("cube %s: %s\n", a->line.command->name, a->err.text);
    if (a->err.code == CUBE_EBUSY)
        fprintf(stderr, "End that process first; `cube backup` copies the "
                "store of a manager that runs.\n");
    return FAILED;
}

/* Opens the file that the first argument names; NULL: said why not. It must be
 * there: opening for writing would make it. */
static struct cube_store *open_store(struct app *a, bool is_read_only)
{
    const char *path = a->line.args[0];
    struct cube_store_options o = {0, is_read_only, false};
    struct cube_store *s = NULL;

    if (access(path, F_OK) != 0)
        fprintf(stderr, "cube %s: cannot open %s: %s\n",
                a->line.command->name, path, strerror(errno));
    else if (!(s = cube_store_open(NULL, path, &o, &a->err)))
        (void)store_failed(a);
    return s;
}

/* One row of `store check`: what a tree holds. */
static int check_tree(struct app *a, struct cube_store *s, const char *name,
                      struct table *table)
{
    struct cube_cursor *c = cube_cursor_open(s, name, &a->err);
    long long keys = 0, bytes = 0;
    const void *value;
    size_t key_len, value_len;
    char text[32];
    int r = cube_cursor_first(c, &a->err);

    for (; r > 0; r = cube_cursor_next(c, &a->err)) {
        (void)cube_cursor_key(c, &key_len);
        if (cube_cursor_value(c, &value, &value_len, &a->err) < 0) {
            r = -1;
            break;
        }
        keys++;
        bytes += (long long)(key_len + value_len);
    }
    cube_cursor_close(c);
    add_cell(table, PLAIN, name);
    (void)snprintf(text, sizeof text, "%lld", keys);
    add_cell(table, PLAIN, text);
    (void)snprintf(text, sizeof text, "%lld", bytes);
    add_cell(table, PLAIN, text);
    return r < 0 ? store_failed(a) : DONE;
}

static int run_store_check(struct app *a)
{
    static const char *const heads[] = {"TREE", "KEYS", "BYTES"};
    struct cube_store *s = open_store(a, true);
    struct cube_store_stats stats;
    struct table table;
    int code = DONE;

    if (!s)
        return FAILED;
    add_heads(&table, heads, COUNT(heads));
    if (cube_store_check(s, &a->err))
        code = store_failed(a);
    for (int i = 0; code == DONE && cube_store_tree(s, i); i++)
        code = check_tree(a, s, cube_store_tree(s, i), &table);
    cube_store_stats(s, &stats);
    if (table.count == COUNT(heads))
        table_free(&table); /* nothing could be read */
    else
        print_table(&table);
    if (stats.dropped_bytes > 0)
        printf("%llu bytes of a commit that was not finished are at its end; "
               "nobody was told that it was.\n",
               (unsigned long long)stats.dropped_bytes);
    if (code == DONE)
        printf("%s is whole: commit %llu, %llu of %llu bytes used\n",
               a->line.args[0], (unsigned long long)stats.commits,
               (unsigned long long)stats.used_bytes,
               (unsigned long long)stats.file_bytes);
    cube_store_close(s);
    return code;
}

/* A key as text; if it is none, and has 8 bytes, as the number that they are,
 * the highest byte first; else as hex digits. */
static void print_key(const unsigned char *p, size_t len)
{
    unsigned long long number = 0;
    bool is_text = true;

    for (size_t i = 0; i < len; i++) {
        is_text = is_text && p[i] >= 0x20 && p[i] != 0x7f;
        number = number << 8 | p[i];
    }
    if (is_text)
        fwrite(p, 1, len, stdout);
    else if (len == 8)
        printf("%llu", number);
    for (size_t i = 0; !is_text && len != 8 && i < len; i++)
        printf("%02x", p[i]);
}

/* A value in one line: JSON, as other text, has no control characters but for
 * a line end behind it. */
static void print_value(const unsigned char *p, size_t len)
{
    while (len > 0 && p[len - 1] == '\n')
        len--;
    for (size_t i = 0; i < len; i++) {
        if (p[i] < 0x20 || p[i] == 0x7f)
            printf("\\x%02x", p[i]);
        else
            putchar(p[i]);
    }
    putchar('\n');
}

static int dump_tree(struct app *a, struct cube_store *s, const char *name)
{
    struct cube_cursor *c = cube_cursor_open(s, name, &a->err);
    int r = cube_cursor_first(c, &a->err);

    for (; r > 0 && !ferror(stdout); r = cube_cursor_next(c, &a->err)) {
        const void *value, *key;
        size_t key_len, value_len;

        if (cube_cursor_value(c, &value, &value_len, &a->err) < 0) {
            r = -1;
            break;
        }
        key = cube_cursor_key(c, &key_len);
        printf("%s\t", name);
        print_key(key, key_len);
        putchar('\t');
        print_value(value, value_len);
    }
    cube_cursor_close(c);
    return r < 0 ? store_failed(a) : DONE;
}

static int run_store_dump(struct app *a)
{
    const char *only = a->line.arg_count > 1 ? a->line.args[1] : NULL;
    struct cube_store *s = open_store(a, true);
    const char *name;
    bool is_found = !only;
    int code = DONE;

    if (!s)
        return FAILED;
    for (int i = 0; code == DONE && (name = cube_store_tree(s, i)); i++) {
        if (only && strcmp(only, name) != 0)
            continue;
        is_found = true;
        code = dump_tree(a, s, name);
    }
    cube_store_close(s);
    if (is_found)
        return code;
    fprintf(stderr, "cube store dump: %s has no tree \"%s\"\n",
            a->line.args[0], only);
    return FAILED;
}

static int run_store_compact(struct app *a)
{
    struct cube_store *s = open_store(a, false);
    struct cube_store_stats before, after;
    int code = DONE;

    if (!s)
        return FAILED;
    cube_store_stats(s, &before);
    if (cube_store_compact(s, &a->err))
        code = store_failed(a);
    cube_store_stats(s, &after);
    cube_store_close(s);
    if (code == DONE)
        printf("%s: %llu bytes, of %llu before\n", a->line.args[0],
               (unsigned long long)after.file_bytes,
               (unsigned long long)before.file_bytes);
    return code;
}

/* ---- main ---- */

static void app_free(struct app *a)
{
    cube_client_free(a->client);
    cube_loop_free(a->loop);
    cube_buf_free(&a->token_text);
    free(a->line.given);
    free(a->line.args);
}

/* `cube -h` and `cube --version` are commands too. */
static void rename_first(char **words, int count)
{
    static char help[] = "help", version[] = "version";

    if (count > 0 && (strcmp(words[0], "-h") == 0 ||
                      strcmp(words[0], "--help") == 0))
        words[0] = help;
    if (count > 0 && strcmp(words[0], "--version") == 0)
        words[0] = version;
}

/* What cannot be written down was not done: a full disk, a closed pipe. */
static int close_output(int code)
{
    if (fflush(stdout) == 0 && !ferror(stdout))
        return code;
    fprintf(stderr, "cube: cannot write to standard output: %s\n",
            strerror(errno));
    return code == DONE ? FAILED : code;
}

int main(int argc, char **argv)
{
    struct app a;
    size_t letters = 1;
    int code;

    memset(&a, 0, sizeof a);
    for (int i = 1; i < argc; i++)
        letters += strlen(argv[i]) + 1;
    a.line.given = calloc(letters, sizeof *a.line.given);
    a.line.args = calloc((size_t)argc + 1, sizeof *a.line.args);
    if (!a.line.given || !a.line.args)
        return FAILED;
    rename_first(argv + 1, argc - 1);
    code = parse_line(&a.line, argv + 1, argc - 1);
    if (code == DONE && flag(&a.line, F_HELP))
        help_command(a.line.command);
    else if (code == DONE)
        code = a.line.command->run(&a);
    app_free(&a);
    return close_output(code);
}
