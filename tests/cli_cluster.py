"""A whole cluster, seen from outside: the built program as manager, workers
and client, on the process runtime, with processes that are killed, ports
that are taken, and requests that make no sense.
"""

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
import unittest
import urllib.error

import harness
from harness import CUBE, EXAMPLES, wait_until

ECHO = os.path.join(EXAMPLES, "echo")


def processes_in(directory):
    """PIDs of what works in a directory: the tasks of its workers."""
    found = []
    for pid in os.listdir("/proc"):
        if not pid.isdigit():
            continue
        try:
            if os.readlink("/proc/%s/cwd" % pid).startswith(directory + "/"):
                found.append(int(pid))
        except OSError:
            pass
    return found


def kill_all_in(directory):
    """What the loss of a host does to its tasks and their supervisors."""
    while True:
        pids = processes_in(directory)
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if not pids:
            return
        time.sleep(0.02)


class Cluster:
    """A manager and workers with directories of their own. Fixed ports, so
    that each can be started again where it was."""

    def __init__(self, workers=1, env=None, manager=(), worker=(), under=()):
        self.dir = os.path.realpath(tempfile.mkdtemp(prefix="cube-cluster-"))
        self.env = dict({"CUBE_TOKEN": ""}, **(env or {}))
        self.more = {"manager": list(manager), "worker": list(worker)}
        self.under = list(under)  # what a worker is started by
        self.port = harness.free_port()
        self.ports = [harness.free_port() for _ in range(workers)]
        self.where = "127.0.0.1:%d" % self.port
        self.url = "http://" + self.where
        self.manager, self.workers = None, [None] * workers

    def names(self):
        return ["127.0.0.1:%d" % port for port in self.ports]

    def start(self):
        for i in range(len(self.workers)):
            self.start_worker(i)
        self.start_manager()
        headers = {"Authorization": "Bearer " + self.env["CUBE_TOKEN"]}
        wait_until("each node has told of itself", lambda: all(
            "Runtime" in n["Stats"]
            for n in harness.get(self.url + "/nodes", headers=headers)))
        return self

    def start_manager(self, *more):
        self.manager = harness.Process(
            CUBE, "manager", "-p", self.port, "--data", self.dir + "/m", "-w",
            ",".join(self.names()), *self.more["manager"], *more,
            env=self.env)
        self.await_log(self.manager, "listens on")
        return self.manager

    def start_worker(self, i=0, *more):
        self.workers[i] = harness.Process(
            *self.under, CUBE, "worker", "-p", self.ports[i], "-n",
            "w%d" % i, "-r", "process", "--data", "%s/w%d" % (self.dir, i),
            *self.more["worker"], *more, env=self.env)
        self.await_log(self.workers[i], "listens on")
        return self.workers[i]

    @staticmethod
    def await_log(process, words):
        def seen():
            if not process.is_running():
                raise AssertionError("it ended: " + process.output())
            return words in process.output()
        wait_until(words, seen)

    def cube(self, *argv, stdin="", timeout=30):
        argv = list(argv)
        at = argv.index("--") if "--" in argv else len(argv)
        argv[at:at] = ["-m", self.where]
        try:
            return harness.run(CUBE, *argv, stdin=stdin, env=self.env,
                               timeout=timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError("%s takes too long\n%s" % (
                argv, self.logs())) from None

    def logs(self):
        """What the servers had to say, the end of it."""
        return "\n".join("--- " + " ".join(p.argv) + "\n" +
                         p.output()[-3000:]
                         for p in [self.manager] + self.workers if p)

    def tasks(self):
        return harness.get(self.url + "/tasks")

    def task(self, name):
        found = [t for t in self.tasks() if name in (t["Name"], t["ID"])]
        return found[-1] if found else None

    def wait_for(self, name, state, timeout=20):
        """Until the task is in that state (of those states)."""
        states = state if isinstance(state, tuple) else (state,)

        def look():
            t = self.task(name)
            return t if t and t["State"] in states else None
        try:
            return wait_until("task %s in state %s" % (name, state), look,
                              timeout)
        except AssertionError as e:
            raise AssertionError("%s\n%s\n%s" % (
                e, self.task(name), self.logs())) from None

    def close(self):
        for process in [self.manager] + self.workers:
            if process:
                process.close()
        kill_all_in(self.dir)
        shutil.rmtree(self.dir, ignore_errors=True)


class Case(unittest.TestCase):
    def cluster(self, *args, **more):
        c = Cluster(*args, **more)
        self.addCleanup(c.close)
        self.addCleanup(self.look_at_logs, c)
        return c.start()

    def look_at_logs(self, c):
        """A failed test shows what its servers had to say; no test may make
        one of them abort."""
        for process in [c.manager] + c.workers:
            text = process.output() if process else ""
            self.assertNotIn("AddressSanitizer", text)
            self.assertNotIn("runtime error", text)
            self.assertNotRegex(text, r"Assertion .* failed")

    def ok(self, c, *argv, **more):
        code, out, err = c.cube(*argv, **more)
        self.assertEqual(code, 0, "%s\n%s%s%s" % (argv, out, err, c.logs()))
        return out

    def refused(self, c, words, *argv, **more):
        code, _, err = c.cube(*argv, **more)
        self.assertEqual(code, 1, err)
        self.assertIn(words, err)

    def run_pid(self, c, name, *flags):
        """Runs a task that writes its PID; gives the PID."""
        self.ok(c, "run", "--name", name, *flags, "--", "sh", "-c",
                "echo $$; exec sleep 1000")
        return self.pid_of(c, name)

    def pid_of(self, c, name):
        """The PID in the task's log."""
        lines = wait_until("a PID in the log of " + name,
                           lambda: self.log_lines(c, name))
        return int(lines[-1])

    @staticmethod
    def log_lines(c, name):
        code, out, _ = c.cube("logs", name)
        return out.split() if code == 0 else None


def bytes_read(pid):
    """All that a process has read so far, from files and sockets."""
    with open("/proc/%d/io" % pid, encoding="utf-8") as f:
        return int(f.readline().split()[1])


def is_alive(pid):
    try:
        with open("/proc/%d/stat" % pid, encoding="utf-8") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Life(Case):
    """What a person does with a cluster that is well."""

    def test_a_task_from_run_to_rm(self):
        c = self.cluster()
        out = self.ok(c, "run", "--name", "web", "--", "sh", "-c",
                      "echo hello; sleep 1000")
        self.assertRegex(out, r"^[0-9a-f-]{36}\n$")
        lines = self.ok(c, "status").splitlines()
        row = re.split(r"   +", lines[1])
        self.assertEqual(row[:2] + row[3:4], [out[:8], "web", "Running"])
        self.assertRegex(row[2], "second.* ago")
        self.assertIn(c.names()[0], row)
        wait_until("its output", lambda: c.cube("logs", "web")[1] ==
                   "hello\n")
        self.refused(c, "stop", "rm", "web")
        self.assertEqual(self.ok(c, "stop", "web"),
                         "stopped web (%s)\n" % out[:8])
        self.assertEqual(c.task("web")["State"], 3)
        self.assertEqual(processes_in(c.dir), [])
        self.assertIn("Completed", self.ok(c, "status"))
        self.ok(c, "rm", "web")
        self.assertEqual(c.tasks(), [])
        self.assertEqual(len(self.ok(c, "status", "-a").splitlines()), 1)

    def test_a_server_answers_on_the_port_that_it_was_given(self):
        c = self.cluster()
        self.ok(c, "run", "--name", "echo", "-p", "7777", "--health",
                "/health", "--", ECHO)
        binding = c.task("echo")["HostPorts"]["7777/tcp"][0]
        url = "http://127.0.0.1:" + binding["HostPort"]
        body = wait_until("the page", lambda: self.page(url))
        self.assertIn("echo", body)
        self.assertIn(binding["HostPort"] + "->7777/tcp",
                      self.ok(c, "status"))

    @staticmethod
    def page(url):
        try:
            return harness.http("GET", url + "/")[2]
        except (urllib.error.URLError, ConnectionError):
            return None

    def test_a_server_has_the_port_that_it_asked_for(self):
        c = self.cluster()
        port = harness.free_port()
        self.ok(c, "run", "--name", "echo", "-p", "%d:7777" % port, "--",
                ECHO)
        wait_until("the page", lambda: self.page("http://127.0.0.1:%d" %
                                                 port))

    def test_exit_codes_decide_between_completed_and_failed(self):
        c = self.cluster()
        for code, state in ((0, 3), (3, 4), (1, 4)):
            name = "exit%d" % code
            c.cube("run", "-d", "--name", name, "--restart", "no", "--",
                   "sh", "-c", "exit %d" % code)
            t = c.wait_for(name, (3, 4))
            self.assertEqual((t["State"], t["ExitCode"]), (state, code))
            if code:
                self.assertIn(str(code), t["Error"])

    def test_a_command_that_is_none_fails_with_its_reason(self):
        c = self.cluster()
        code, out, err = c.cube("run", "--restart", "no", "--",
                                "/no/such/program")
        self.assertEqual((code, len(out)), (1, 37))
        self.assertIn("/no/such/program", err)
        self.assertIn("No such file", err)

    def test_environment_and_words_arrive_as_they_are(self):
        c = self.cluster()
        self.ok(c, "run", "--name", "e", "--restart", "no", "-e",
                "A=x  y\"z", "--", "sh", "-c", "printf '%s|' \"$A\" \"$@\"",
                "-", "a b", "", "$HOME")
        c.wait_for("e", 3)
        self.assertEqual(self.ok(c, "logs", "e"), "x  y\"z|a b||$HOME|")

    def test_a_crash_is_restarted_and_counted(self):
        c = self.cluster()
        pid = self.run_pid(c, "web", "--restart", "always")
        os.kill(pid, signal.SIGKILL)
        wait_until("another PID", lambda: self.pid_of(c, "web") != pid)
        t = c.wait_for("web", 2)
        self.assertEqual(t["RestartCount"], 1)
        self.assertIn("restarted 1 time", self.ok(c, "status"))

    def test_a_sick_server_is_started_again(self):
        c = self.cluster()
        self.ok(c, "run", "--name", "echo", "-p", "7777", "--health",
                "/health", "--health-start", "300ms", "--health-interval",
                "200ms", "--health-retries", "2", "--restart", "always",
                "--", ECHO)
        port = c.task("echo")["HostPorts"]["7777/tcp"][0]["HostPort"]
        url = "http://127.0.0.1:%s" % port
        wait_until("it answers", lambda: self.page(url))
        harness.http("GET", url + "/sick")
        wait_until("a restart",
                   lambda: c.task("echo")["RestartCount"] >= 1)

    def test_stop_ends_what_waits_and_what_ignores_sigterm(self):
        c = self.cluster()
        self.ok(c, "run", "--name", "deaf", "--stop-grace", "300ms", "--",
                "sh", "-c", "trap '' TERM; while :; do sleep 1; done")
        self.ok(c, "run", "-d", "--name", "huge", "--memory", "9999g", "--",
                "sleep", "1")
        t = c.wait_for("huge", 0)
        wait_until("a reason", lambda: c.task("huge").get("Error"))
        self.ok(c, "stop", "deaf", "huge")
        self.assertEqual([c.task(n)["State"] for n in ("deaf", "huge")],
                         [3, 3], t)

    def test_a_task_that_fits_nowhere_waits_with_its_reason(self):
        c = self.cluster()
        self.ok(c, "run", "-d", "--name", "huge", "--memory", "9999g", "--",
                "sleep", "1")
        wait_until("a reason", lambda: "emory" in
                   c.task("huge").get("Error", ""))
        t = c.task("huge")
        self.assertEqual(t["State"], 0)
        self.assertIn(c.names()[0], t["Error"])
        self.assertIn("emory", self.ok(c, "status"))

    def test_a_task_waits_for_a_worker_to_come(self):
        c = Cluster()
        self.addCleanup(c.close)
        c.start_manager()
        self.ok(c, "run", "-d", "--name", "early", "--", "sleep", "1000")
        self.assertEqual(c.task("early")["State"], 0)
        c.start_worker()
        c.wait_for("early", 2)

    def test_two_tasks_of_one_name_both_run(self):
        c = self.cluster()
        for _ in range(2):
            self.ok(c, "run", "--name", "twin", "--", "sleep", "1000")
        self.assertEqual([t["State"] for t in c.tasks()], [2, 2])
        self.refused(c, "can be each of these", "stop", "twin")

    def test_a_taken_port_fails_with_words(self):
        c = self.cluster()
        with socket.socket() as s:
            s.bind(("", 0))
            s.listen()
            port = s.getsockname()[1]
            code, _, err = c.cube("run", "--restart", "no", "-p", "%d:80" %
                                  port, "--", "sleep", "1000")
            if code == 0:
                self.skipTest("this runtime cannot know")
            self.assertIn(str(port), err)

    def test_twenty_at_once(self):
        c = self.cluster(2)
        begin = time.monotonic()
        for i in range(20):
            self.ok(c, "run", "-d", "--name", "t%d" % i, "--", "sleep",
                    "1000")
        wait_until("all run", lambda: [t["State"] for t in c.tasks()] ==
                   [2] * 20)
        self.assertLess(time.monotonic() - begin, 10)
        nodes = harness.get(c.url + "/nodes")
        self.assertEqual(sum(n["TaskCount"] for n in nodes), 20)
        self.assertTrue(all(n["TaskCount"] for n in nodes), nodes)
        self.ok(c, "stop", *["t%d" % i for i in range(20)])
        self.assertEqual(processes_in(c.dir), [])
        wait_until("counts fall", lambda: not any(
            n["TaskCount"] for n in harness.get(c.url + "/nodes")))

    def test_events_tell_of_each_change(self):
        c = self.cluster()
        with harness.Process(CUBE, "events", "-f", "-m", c.where) as p:
            self.ok(c, "run", "--name", "web", "--", "sleep", "1000")
            self.ok(c, "stop", "web")
            self.ok(c, "rm", "web")
            wait_until("all of it", lambda: "removed" in p.output())
            self.assertRegex(
                p.output(), r"(?s)Pending|Scheduled.*"
                            r"Running.*Completed.*removed")

    def test_inspect_shows_task_container_and_node(self):
        c = self.cluster()
        self.ok(c, "run", "--name", "web", "--", "sleep", "1000")
        got = json.loads(self.ok(c, "inspect", "web"))
        self.assertEqual(got["Task"]["Cmd"], ["sleep", "1000"])
        self.assertTrue(got["Container"]["State"]["Running"])
        node = json.loads(self.ok(c, "inspect", c.names()[0]))
        self.assertEqual(node["TaskCount"], 1)

    def test_node_shows_the_machine(self):
        c = self.cluster(2)
        wait_until("both are up and tell of themselves", lambda: self.ok(
            c, "node").count(" process") == 2)
        row = re.split(r"   +", self.ok(c, "node").splitlines()[1])
        self.assertEqual(row[0], c.names()[0])
        self.assertGreater(int(row[1]), 100)
        self.assertEqual(row[3:6], ["worker", "0", "up"])

    def test_a_task_that_never_started_has_no_logs_and_that_is_an_error(self):
        c = self.cluster()
        c.cube("run", "--name", "n", "--restart", "no", "--", "/no/such")
        for flags in ([], ["-f"]):
            code, out, err = c.cube("logs", "n", *flags)
            self.assertEqual((code, out), (1, ""))
            self.assertIn("no container", err)
        code, _, err = c.cube("node", "rm", "nowhere:1")
        self.assertEqual(code, 1)
        self.assertIn("there is no such node", err)

    def test_logs_follow_until_the_task_ends(self):
        c = self.cluster()
        self.ok(c, "run", "--name", "l", "--restart", "no", "--", "sh", "-c",
                "echo one; echo two >&2; sleep 1; echo three")
        out = self.ok(c, "logs", "-f", "l")
        self.assertEqual(sorted(out.split()), ["one", "three", "two"])
        self.assertEqual(self.ok(c, "logs", "--tail", "1", "l"), "three\n")

    def test_a_long_log_waits_for_its_reader(self):
        """A pager reads a page and then nothing. What it had not read beyond
        16 MB was cut off; now it stays in its file until it is wanted."""
        c = self.cluster()
        self.ok(c, "run", "--name", "l", "--restart", "no", "--", "sh", "-c",
                "yes 0123456789abcdef | head -c 25000000")
        c.wait_for("l", 3)
        with subprocess.Popen([CUBE, "logs", "l", "-m", c.where],
                              stdout=subprocess.PIPE) as reader:
            first = reader.stdout.read(1000)
            reads = [-1, 0]
            while reads[-1] != reads[-2]:  # until nobody reads any more
                time.sleep(0.3)
                reads.append(bytes_read(c.manager.pid))
            rest = reader.stdout.read()
        self.assertEqual(reader.returncode, 0)
        self.assertEqual(len(first) + len(rest), 25000000)


class Deaths(Case):
    """Processes that end without a word."""

    def test_a_killed_manager_knows_all_afterwards(self):
        c = self.cluster()
        pid = self.run_pid(c, "web")
        for _ in range(3):
            c.manager.kill()
            self.assertEqual(c.cube("status")[0], 3)
            c.start_manager()
            wait_until("it is seen", lambda: c.task("web")["State"] == 2)
        self.assertTrue(is_alive(pid))
        self.assertEqual(c.task("web")["RestartCount"], 0)
        self.ok(c, "stop", "web")
        self.assertFalse(is_alive(pid))

    def test_an_accepted_task_outlives_a_manager_killed_at_once(self):
        c = self.cluster()
        names = []
        for i in range(5):
            self.ok(c, "run", "-d", "--name", "t%d" % i, "--", "sleep",
                    "1000")
            c.manager.kill()
            names.append("t%d" % i)
            c.start_manager()
        for name in names:
            c.wait_for(name, 2)
        self.assertEqual(len(c.tasks()), 5)

    def test_a_killed_worker_finds_its_tasks_again(self):
        c = self.cluster()
        pid = self.run_pid(c, "web")
        for _ in range(3):
            c.workers[0].kill()
            self.assertTrue(is_alive(pid))
            c.start_worker()
            c.wait_for("web", 2)
        self.assertTrue(is_alive(pid))
        self.assertEqual(self.log_lines(c, "web"), [str(pid)])
        self.assertEqual(c.task("web")["RestartCount"], 0)
        self.ok(c, "stop", "web")
        self.assertFalse(is_alive(pid))

    def test_an_exit_while_the_worker_was_dead_is_not_lost(self):
        c = self.cluster()
        pid = self.run_pid(c, "web", "--restart", "no")
        c.workers[0].kill()
        os.kill(pid, signal.SIGKILL)
        wait_until("it is dead", lambda: not is_alive(pid))
        c.start_worker()
        t = c.wait_for("web", 4)
        self.assertEqual(t["ExitCode"], 137)

    def test_a_stop_while_the_worker_is_dead_is_done_later(self):
        c = self.cluster()
        pid = self.run_pid(c, "web")
        c.workers[0].kill()
        self.ok(c, "stop", "-d", "web")
        self.assertTrue(is_alive(pid))
        c.start_worker()
        c.wait_for("web", 3)
        self.assertFalse(is_alive(pid))

    def test_sigterm_ends_both_and_leaves_the_tasks(self):
        c = self.cluster()
        pid = self.run_pid(c, "web")
        self.assertEqual(c.workers[0].kill(signal.SIGTERM), 0)
        c.manager.kill(signal.SIGHUP) # its terminal was closed
        self.assertEqual(c.manager.wait(), 0)
        self.assertIn("manager ends", c.manager.output())
        self.assertTrue(is_alive(pid))
        c.start()
        wait_until("it is seen", lambda: c.task("web")["State"] == 2)
        self.assertTrue(is_alive(pid))
        self.assertEqual(self.log_lines(c, "web"), [str(pid)])

    def test_the_tasks_of_a_lost_host_move(self):
        c = self.cluster(2)
        pids = {name: self.run_pid(c, name) for name in ("a", "b", "c")}
        lost = c.names().index(c.task("a")["Node"])
        begin = time.monotonic()
        c.workers[lost].kill()
        kill_all_in("%s/w%d" % (c.dir, lost))
        other = c.names()[1 - lost]
        wait_until("all run elsewhere", lambda: all(
            t["Node"] == other and t["State"] == 2 for t in c.tasks()))
        self.assertLess(time.monotonic() - begin, 8)
        row = [line for line in self.ok(c, "node").splitlines()
               if line.startswith(c.names()[lost])]
        self.assertIn("lost", row[0])
        c.start_worker(lost)
        wait_until("it is back", lambda: self.ok(c, "node").count(" up ") ==
                   2)
        self.assertEqual({t["Node"] for t in c.tasks()}, {other})
        for name, pid in pids.items():
            self.assertLessEqual(is_alive(pid), c.task(name)["Attempt"] == 1)

    def test_a_worker_cut_off_stops_what_runs_elsewhere_by_then(self):
        c = self.cluster(2)
        pid = self.run_pid(c, "web")
        old = c.names().index(c.task("web")["Node"])
        c.workers[old].kill()  # its task runs on
        wait_until("it runs elsewhere too", lambda: c.task("web")["Node"] ==
                   c.names()[1 - old] and c.task("web")["State"] == 2)
        self.assertTrue(is_alive(pid))
        c.start_worker(old)
        wait_until("the old one is gone", lambda: not is_alive(pid))
        self.assertEqual(c.task("web")["Node"], c.names()[1 - old])

    def test_a_manager_without_memory_takes_over_what_runs(self):
        c = self.cluster(manager=["-d", "memory"])
        pid = self.run_pid(c, "web")
        c.manager.kill()
        c.start_manager()
        wait_until("it is reported", lambda: c.task("web") and
                   c.task("web")["State"] == 2)
        self.ok(c, "stop", "web")
        self.assertFalse(is_alive(pid))


class Refusals(Case):
    """What must not be done, and is told in words."""

    def fails(self, words, *argv, env=None):
        code, out, err = harness.run(CUBE, *argv,
                                     env=dict({"CUBE_TOKEN": ""},
                                              **(env or {})))
        self.assertEqual((code, out), (1, ""), err)
        for word in words:
            self.assertIn(word, err)

    def test_a_taken_port_ends_a_server_with_1(self):
        c = self.cluster()
        for kind, port in (("manager", c.port), ("worker", c.ports[0])):
            self.fails([str(port)], kind, "-p", str(port), "--data",
                       c.dir + "/other", *(["-r", "process"]
                                           if kind == "worker" else []))

    def test_a_second_server_on_one_file_is_refused(self):
        c = self.cluster()
        self.fails(["manager.cube"], "manager", "-p", "0", "--data",
                   c.dir + "/m")
        self.fails(["worker-w0.cube"], "worker", "-p", "0", "-n", "w0",
                   "-r", "process", "--data", c.dir + "/w0")

    def test_a_directory_that_cannot_be_is_told(self):
        self.fails(["/proc/nothing"], "manager", "-p", "0", "--data",
                   "/proc/nothing")

    def test_tasks_that_make_no_sense_are_refused(self):
        c = self.cluster()
        for body in ("{}", "null", "[]", "", "{", "{\"Task\":null}",
                     {"Task": {"Image": "UPPER CASE"}},
                     {"Task": {"Image": "a", "Memory": -1}},
                     {"Task": {"Image": "a", "State": 9}},
                     {"Task": {"Image": "a", "NoSuchField": 1}},
                     {"Task": {"Image": "a", "ID": "not-a-uuid"}},
                     {"Task": {"Image": "a",
                               "ExposedPorts": {"99999/tcp": {}}}}):
            status, _, answer = harness.http("POST", c.url + "/tasks", body)
            self.assertEqual(status, 400, (body, answer))
            self.assertEqual(json.loads(answer)["HTTPStatusCode"], 400)
            self.assertTrue(json.loads(answer)["Message"])
        self.assertEqual(c.tasks(), [])

    def test_one_id_is_one_task(self):
        c = self.cluster()
        event = {"State": 2, "Task": {
            "ID": "11111111-2222-4333-8444-555555555555", "Name": "x",
            "Cmd": ["sleep", "1000"]}}
        for _ in range(2):
            self.ok(c, "run", "-f", "-", stdin=json.dumps(event))
        self.assertEqual(len(c.tasks()), 1)
        event["Task"]["Cmd"] = ["sleep", "2000"]
        self.refused(c, "409", "run", "-f", "-", stdin=json.dumps(event))
        self.ok(c, "stop", "x")
        event["Task"]["Cmd"] = ["sleep", "1000"]
        self.refused(c, "rm", "run", "-f", "-", stdin=json.dumps(event))
        self.ok(c, "rm", "x")
        self.ok(c, "run", "-f", "-", stdin=json.dumps(event))

    def test_garbage_on_the_socket_hurts_nobody(self):
        c = self.cluster()
        for port in (c.port, c.ports[0]):
            for text in (b"\0" * 5000, b"GET\r\n\r\n", b"\x16\x03\x01" * 99,
                         b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
                         b"POST /tasks HTTP/1.1\r\nHost: localhost\r\n"
                         b"Content-Length: 5\r\nTransfer-Encoding: chunked"
                         b"\r\n\r\n", b"A" * 300000, b""):
                with socket.create_connection(("127.0.0.1", port)) as s:
                    try:
                        s.sendall(text)
                        s.shutdown(socket.SHUT_WR)
                        s.settimeout(15)
                        while s.recv(4096):
                            pass
                    except (ConnectionError, BrokenPipeError):
                        pass
            self.assertEqual(harness.http("GET", "http://127.0.0.1:%d/healthz"
                                          % port)[0], 200)
        self.assertTrue(c.manager.is_running())

    def test_a_manager_takes_the_descriptors_that_it_may_have(self):
        """A shell's soft limit is for programs that use select."""
        c = Cluster(0)
        self.addCleanup(c.close)
        c.manager = harness.Process(
            "sh", "-c", 'ulimit -Hn 600; ulimit -Sn 40; exec "$@"', "sh",
            CUBE, "manager", "-p", c.port, "--data", c.dir + "/m", "-w", "",
            env=c.env)
        c.await_log(c.manager, "listens on")
        readers = []
        for _ in range(100):
            s = socket.create_connection(("127.0.0.1", c.port), 10)
            self.addCleanup(s.close)
            s.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            readers.append(s)
        for s in readers:
            self.assertIn(b"200 OK", s.recv(100))
        self.ok(c, "run", "-d", "--", "sleep", "1000")

    def test_a_server_outlives_the_reader_of_its_log(self):
        """`cube manager 2>&1 | head`: its next word would have been its
        last."""
        c = Cluster(1)
        self.addCleanup(c.close)
        with subprocess.Popen(
                [CUBE, "manager", "-p", str(c.port), "--data", c.dir + "/m",
                 "-w", c.names()[0], "--lost-after", "2s"], env=dict(
                     os.environ, CUBE_TOKEN=""), stderr=subprocess.PIPE) as p:
            self.addCleanup(p.kill)
            self.assertIn(b"listens on", p.stderr.readline())
            p.stderr.close()
            wait_until("it has something to say", lambda: any(
                n["State"] == "lost" for n in harness.get(c.url + "/nodes")))
            self.assertEqual(harness.http("GET", c.url + "/healthz")[0], 200)
            p.terminate()
            self.assertEqual(p.wait(10), 0)

    def test_a_worker_that_is_process_1_leaves_no_zombie(self):
        """`docker run ... cube worker`: whatever loses its parent in there
        becomes its child, and a supervisor that has ended before it was
        watched has nobody else. An orphan of the shell that was process 1
        before stands for those, as it ends when the test says so."""
        unshare = ["unshare", "--pid", "--fork", "--mount-proc"]
        if not shutil.which("unshare") or harness.run(*unshare, "true")[0]:
            self.skipTest("no PID namespace can be made here (unshare)")
        c = self.cluster(under=unshare + [
            "sh", "-c", '(sleep 1000 & sleep 1000 &); exec "$@"', "sh"])
        worker = self.children(c.workers[0].pid)[0]
        self.addCleanup(os.kill, worker, signal.SIGTERM)
        orphans = self.children(worker)
        self.assertEqual(len(orphans), 2)
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
        for i in range(20):
            self.ok(c, "run", "-d", "--name", "t%d" % i, "--restart", "no",
                    "--", "sh", "-c", "grep SigIgn /proc/self/status; "
                    "exit 3")
        for i in range(20):
            self.assertEqual(c.wait_for("t%d" % i, 4)["ExitCode"], 3)
        ignored = int(self.log_lines(c, "t0")[1], 16)
        self.assertEqual(ignored & 1 << (signal.SIGCHLD - 1), 0)
        wait_until("nobody is left", lambda: not self.children(worker))
        self.assertTrue(c.workers[0].is_running())

    @staticmethod
    def children(pid):
        """Those that have not been collected yet."""
        with open("/proc/%d/task/%d/children" % (pid, pid)) as f:
            return [int(word) for word in f.read().split()]

    def test_unknown_things_are_404_and_405(self):
        c = self.cluster()
        for url in (c.url, "http://" + c.names()[0]):
            self.assertEqual(harness.http("GET", url + "/nothing")[0], 404)
            status, headers, _ = harness.http("PUT", url + "/tasks", "{}")
            self.assertEqual(status, 405)
            self.assertIn("POST", headers["Allow"])
            for task_id in ("00000000-0000-4000-8000-000000000000", "nonsense"):
                self.assertEqual(harness.http("DELETE", url + "/tasks/" +
                                              task_id)[0], 404)

    def test_web_pages_cannot_drive_a_cluster(self):
        c = self.cluster()
        for headers in ({"Origin": "http://evil.example"},
                        {"Host": "evil.example"}):
            for url in (c.url, "http://" + c.names()[0]):
                self.assertEqual(harness.http("GET", url + "/tasks",
                                              headers=headers)[0], 403)
        self.assertEqual(harness.http("GET", c.url + "/tasks", headers={
            "Host": "localhost:1"})[0], 200)


class Members(Case):
    def test_a_worker_joins_and_is_forgotten(self):
        c = Cluster(0)
        self.addCleanup(c.close)
        c.more["manager"] = ["-w", ""]
        c.start_manager()
        port = harness.free_port()
        with harness.Process(CUBE, "worker", "-p", port, "-n", "joiner",
                             "-r", "process", "--data", c.dir + "/j",
                             "--join", c.where, env=c.env):
            wait_until("it joins", lambda: any(
                n["Api"].endswith(":%d" % port) and n.get("State") == "up"
                for n in harness.get(c.url + "/nodes")))
            self.ok(c, "run", "--name", "web", "--", "sleep", "1000")
            c.manager.kill()
            c.start_manager()
            wait_until("it is remembered", lambda: c.task("web") and
                       c.task("web")["State"] == 2)
            self.ok(c, "stop", "web")
        name = [n["Name"] for n in harness.get(c.url + "/nodes")
                if n["Api"].endswith(":%d" % port)][0]
        self.ok(c, "node", "rm", name)
        self.assertNotIn(name, self.ok(c, "node"))
        self.refused(c, "nobody", "node", "rm", "nobody")

    def test_a_worker_serves_one_cluster_until_told_otherwise(self):
        c = self.cluster()
        pid = self.run_pid(c, "web")
        other = Cluster(0)
        self.addCleanup(other.close)
        other.ports = c.ports
        other.start_manager()
        self.ok(other, "run", "-d", "--name", "theirs", "--", "sleep", "1000")
        time.sleep(1.5)
        self.assertEqual(other.task("theirs")["State"], 0)
        self.assertTrue(is_alive(pid))
        c.manager.kill()
        c.workers[0].kill()
        c.start_worker(0, "--take-over")
        other.wait_for("theirs", 2)

    def test_a_token_is_needed_where_there_is_one(self):
        c = self.cluster(env={"CUBE_TOKEN": "secret"})
        self.ok(c, "run", "--name", "web", "--", "sleep", "1000")
        for url in (c.url, "http://" + c.names()[0]):
            self.assertEqual(harness.http("GET", url + "/tasks")[0], 401)
            self.assertEqual(harness.http("GET", url + "/healthz")[0], 200)
            self.assertEqual(harness.http("GET", url + "/tasks", headers={
                "Authorization": "Bearer secret"})[0], 200)
        c.env = {"CUBE_TOKEN": "wrong"}
        self.assertEqual(c.cube("status")[0], 1)
        c.env = {"CUBE_TOKEN": ""}
        self.refused(c, "--token-file", "status")

    def test_a_machine_is_known_by_its_name(self):
        """What the README starts on a machine that is called `manager` was
        refused by it, with a hint that did not help: the name with a port."""
        c = self.cluster()
        for name, status in ((socket.gethostname(), 200),
                             (socket.gethostname().split(".")[0], 200),
                             ("evil.example", 403)):
            for port in [c.port] + c.ports:
                got, _, body = harness.http(
                    "GET", "http://127.0.0.1:%d/tasks" % port,
                    headers={"Host": "%s:%d" % (name, port)})
                self.assertEqual(got, status, body)
        self.assertIn("(--allow-host evil.example)", body)

    def test_a_worker_with_another_token_says_why_it_cannot_join(self):
        c = self.cluster(env={"CUBE_TOKEN": "secret"})
        c.workers[0].kill()
        c.env = {"CUBE_TOKEN": "wrong"}
        worker = c.start_worker(0, "-H", "127.0.0.1", "--join", c.where)
        c.await_log(worker, "it refused: the token is not the one of this "
                    "server\n")

    def test_two_tokens_hold_while_one_replaces_the_other(self):
        with tempfile.NamedTemporaryFile("w") as f:
            f.write("new\nold\n")
            f.flush()
            c = self.cluster(manager=["--token-file", f.name],
                             worker=["--token-file", f.name],
                             env={"CUBE_TOKEN": "new"})
            for token in ("new", "old"):
                c.env = {"CUBE_TOKEN": token}
                self.ok(c, "status")

    def test_listening_for_all_without_a_token_warns(self):
        for argv, is_warned in (
                (["-H", "0.0.0.0"], True), ([], False),
                (["-H", "127.0.0.2"], False), (["-H", "::1"], False)):
            with tempfile.TemporaryDirectory() as data, harness.Process(
                    CUBE, "manager", "-p", "0", "--data", data, *argv,
                    env={"CUBE_TOKEN": ""}) as p:
                wait_until("it starts", lambda p=p: "listens on" in
                           p.output() and "port" in p.output() or
                           not p.is_running())
                if "::1" in argv and not p.is_running():
                    continue  # a machine without IPv6
                self.assertEqual("without a token" in p.output(), is_warned,
                                 p.output())

    def test_state_is_for_its_owner_only(self):
        c = self.cluster()
        for name in ("m", "m/manager.cube", "w0", "w0/worker-w0.cube"):
            mode = os.stat(os.path.join(c.dir, name)).st_mode
            self.assertEqual(stat.S_IMODE(mode) & 0o077, 0, name)


class Dev(Case):
    @staticmethod
    def free_ports(count):
        """The first of some ports in a row that are free."""
        while True:
            port = harness.free_port()
            try:
                for i in range(count):
                    with socket.socket() as s:
                        s.bind(("127.0.0.1", port + i))
                return port
            except OSError:
                pass

    def test_dev_is_a_cluster_in_one_command(self):
        c = Cluster(0)
        self.addCleanup(c.close)
        argv = [CUBE, "dev", "-p", self.free_ports(4), "-n", "3", "-r",
                "process", "--data", c.dir + "/dev"]
        pid = None
        for start in range(2):
            with harness.Process(*argv, env=c.env) as p:
                c.await_log(p, "manager listens on")
                port = re.search(r"manager listens on .*?port (\d+)",
                                 p.output()).group(1)
                c.where = "127.0.0.1:" + port
                c.url = "http://" + c.where
                c.manager = p
                wait_until("three nodes", lambda: self.ok(c, "node").count(
                    " up ") == 3)
                if start == 0:
                    pid = self.run_pid(c, "web")
                else:
                    c.wait_for("web", 2)
                    self.assertTrue(is_alive(pid))
                    self.ok(c, "stop", "web")
                p.kill(signal.SIGINT)
                self.assertEqual(p.wait(), 0)
            c.manager = None
            self.assertEqual(is_alive(pid), start == 0)


if __name__ == "__main__":
    harness.main()
