"""What the Go implementation of Cube was seen to do, and Cube must not do:
fifteen faults, in the order of the list, each a class that says what holds
instead. Manager, workers and command line are the built program; tasks are
processes. Where a fault is about an engine there is one that is replayed
(harness_engine.py), and the real Docker as well when it is there.
"""

import json
import os
import re
import signal
import socket
import subprocess
import time
import uuid

import harness
import harness_engine
import harness_go as go
from cli_cluster import Case as ClusterCase
from cli_cluster import Cluster, is_alive, kill_all_in, processes_in
from harness import CUBE, wait_until
from harness_go import COMPLETED, FAILED, PENDING, RUNNING, SCHEDULED, holds

SLEEP = ["--", "sleep", "1000"]


class Case(ClusterCase):
    def bare(self, *args, **more):
        """A cluster of which nothing was started yet."""
        c = Cluster(*args, **more)
        self.addCleanup(c.close)
        self.addCleanup(self.look_at_logs, c)
        return c

    def post(self, c, status=201, **task):
        """POST /tasks with these fields; the ID."""
        got, _, body = harness.http("POST", c.url + "/tasks",
                                    {"State": 2, "Task": task})
        self.assertEqual(got, status, body)
        return json.loads(body).get("ID")

    def sleeper(self, c, **task):
        return self.post(c, Cmd=["sleep", "1000"], **task)

    @staticmethod
    def commands(c):
        """The command lines of all tasks' processes, without supervisors."""
        found = []
        for pid in processes_in(c.dir):
            try:
                with open("/proc/%d/cmdline" % pid, "rb") as f:
                    words = f.read().split(b"\0")[:-1]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if words and os.path.basename(CUBE).encode() not in words[0]:
                found.append(b" ".join(words).decode())
        return found

    @staticmethod
    def node(c, name):
        return [n for n in harness.get(c.url + "/nodes")
                if n["Name"] == name][0]

    def all_up(self, c):
        wait_until("all nodes tell of themselves", lambda: all(
            n["State"] == "up" and n["Memory"]
            for n in harness.get(c.url + "/nodes")))

    def on_fake_engine(self, **more):
        engine = harness_engine.Engine(images=["web:1"], **more)
        self.addCleanup(engine.close)
        c = self.bare(env={"DOCKER_HOST": engine.where}, worker=[
            "-r", "docker"])
        return c.start(), engine

    def on_docker(self):
        where = harness.need("DOCKER")
        c = self.bare(env={"DOCKER_HOST": where}, worker=["-r", "docker"])
        self.addCleanup(self.remove_containers, where, c)
        return c.start(), where

    def docker(self, where, *argv):
        return harness.run("docker", "-H", where, *argv)[1]

    def remove_containers(self, where, c):
        """Those of this cluster: of the workers in its directory."""
        for t in c.tasks() if c.manager.is_running() else []:
            ids = self.docker(where, "ps", "-aq", "--filter",
                              "label=cube.task=" + t["ID"]).split()
            if ids:
                self.docker(where, "rm", "-f", *ids)


class Fault01(Case):
    """A worker lives with an engine that is older than it, and with
    containers that somebody removes by hand."""

    def test_an_engine_of_an_older_version_is_spoken_to_in_its_own(self):
        c, engine = self.on_fake_engine(api="1.24")
        self.ok(c, "run", "--name", "web", "web:1")
        self.assertEqual(engine.too_new, 0)
        self.assertEqual(len(engine.running()), 1)
        self.ok(c, "stop", "web")
        self.assertEqual(engine.containers, {})
        self.assertTrue(c.workers[0].is_running())

    def test_a_container_removed_by_hand_is_started_again_and_counted(self):
        c, engine = self.on_fake_engine()
        self.ok(c, "run", "--name", "web", "web:1")
        engine.remove_by_hand(engine.running()[0])
        wait_until("another one", engine.running)
        t = c.wait_for("web", RUNNING)
        wait_until("its count", lambda: c.task("web")["RestartCount"] == 1)
        self.assertEqual(len(engine.containers), 1, t)
        self.assertTrue(c.workers[0].is_running())

    def test_the_same_on_docker(self):
        c, where = self.on_docker()
        self.ok(c, "run", "--name", "fault1", harness.IMAGE, *SLEEP)
        first = c.task("fault1")["ContainerID"]
        self.docker(where, "rm", "-f", first)
        wait_until("another one", lambda: c.task("fault1")["State"] ==
                   RUNNING and c.task("fault1")["ContainerID"] != first)
        self.assertTrue(c.workers[0].is_running())
        self.ok(c, "stop", "fault1")


class Fault02(Case):
    """A worker that cannot be reached is given no task, and the manager
    survives it."""

    def test_all_tasks_go_to_the_one_that_answers(self):
        for scheduler in ("epvm", "greedy", "roundrobin"):
            c = self.bare(2, manager=["-s", scheduler])
            c.start_worker(1)  # nobody listens on the first one's port
            c.start_manager()
            wait_until("one is up", lambda c=c: self.node(
                c, c.names()[1])["Memory"])
            for i in range(4):
                self.ok(c, "run", "--name", "t%d" % i, *SLEEP)
            self.assertEqual({t["Node"] for t in c.tasks()}, {c.names()[1]},
                             scheduler)
            self.assertTrue(c.manager.is_running())

    def test_without_any_other_the_task_waits_and_names_it(self):
        c = self.bare()
        c.start_manager()
        task_id = self.sleeper(c)
        wait_until("the reason", lambda: c.names()[0] in c.task(task_id).get(
            "Error", ""))
        self.assertEqual(c.task(task_id)["State"], PENDING)
        holds(c.manager.is_running, 1)
        c.start_worker()
        c.wait_for(task_id, RUNNING)


class Fault03(Case):
    """A task for which no node fits waits, says why for each node, and runs
    as soon as one fits."""

    def test_it_waits_for_a_port_that_another_task_has(self):
        c = self.cluster()
        port = harness.free_port()
        first = self.sleeper(c, PortBindings={"80/tcp": str(port)})
        c.wait_for(first, RUNNING)
        second = self.sleeper(c, PortBindings={"80/tcp": str(port)})
        t = wait_until("the reason", lambda: c.task(second).get("Error") and
                       c.task(second))
        self.assertEqual(t["State"], PENDING)
        self.assertIn(c.names()[0], t["Error"])
        self.assertIn(str(port), t["Error"])
        self.ok(c, "stop", first)
        c.wait_for(second, RUNNING)

    def test_it_waits_for_memory_and_status_says_so(self):
        c = self.cluster(2)
        self.all_up(c)
        task_id = self.sleeper(c, Memory=1 << 50)
        wait_until("a reason for each node", lambda: all(
            name in c.task(task_id).get("Error", "") for name in c.names()))
        self.assertIn("emory", self.ok(c, "status"))
        self.assertEqual(c.task(task_id)["State"], PENDING)
        c.manager.kill()
        c.start_manager()
        self.assertEqual(c.task(task_id)["State"], PENDING)


class Fault04(Case):
    """What was answered with 201 or 204 is on disk, whatever happens next."""

    def test_a_manager_killed_right_after_its_201_runs_the_task(self):
        c = self.cluster()
        ids = []
        for _ in range(5):
            ids.append(self.sleeper(c))
            c.manager.kill(signal.SIGKILL)
            c.start_manager()
            self.assertEqual([t["ID"] for t in c.tasks()], ids)
        for task_id in ids:
            c.wait_for(task_id, RUNNING)
        wait_until("one process for each", lambda: len(self.commands(c)) == 5)

    def test_a_manager_killed_right_after_its_204_stops_the_task(self):
        c = self.cluster()
        for _ in range(3):
            task_id = self.sleeper(c)
            c.wait_for(task_id, RUNNING)
            status = harness.http("DELETE", c.url + "/tasks/" + task_id)[0]
            c.manager.kill(signal.SIGKILL)
            self.assertEqual(status, 204)
            c.start_manager()
            c.wait_for(task_id, COMPLETED)
            self.assertEqual(self.commands(c), [])

    def test_after_a_restart_it_still_knows_which_worker_has_a_task(self):
        c = self.cluster(2)
        ids = [self.sleeper(c) for _ in range(4)]
        for task_id in ids:
            c.wait_for(task_id, RUNNING)
        nodes = [c.task(i)["Node"] for i in ids]
        c.manager.kill(signal.SIGKILL)
        c.start_manager()
        self.assertEqual([c.task(i)["Node"] for i in ids], nodes)
        self.ok(c, "stop", *ids)
        self.assertEqual(self.commands(c), [])
        holds(lambda: not self.commands(c), 1)

    def test_a_worker_killed_right_after_its_201_runs_the_task(self):
        c = self.bare()
        c.start_worker()
        url = "http://" + c.names()[0]
        for count in range(1, 4):
            t = go.task(Cmd=["sleep", "1000"])
            status = harness.http("POST", url + "/tasks", go.event(t))[0]
            c.workers[0].kill(signal.SIGKILL)
            self.assertEqual(status, 201)
            c.start_worker()
            wait_until("all run", lambda n=count: [
                t["State"] for t in harness.get(url + "/tasks")] ==
                [RUNNING] * n)
        wait_until("one process each", lambda: len(self.commands(c)) == 3)


class Fault05(Case):
    """A restart of a worker or manager, however it ended, leaves the tasks
    as they are, and starts no twins."""

    def test_kill_9_of_one_the_other_and_both(self):
        c = self.cluster()
        pid = self.run_pid(c, "web")
        before = c.task("web")
        for which in ("worker", "manager", "both"):
            if which != "manager":
                c.workers[0].kill(signal.SIGKILL)
            if which != "worker":
                c.manager.kill(signal.SIGKILL)
            self.assertTrue(is_alive(pid), which)
            if which != "manager":
                c.start_worker()
            if which != "worker":
                c.start_manager()
            wait_until("the node is back", lambda: self.node(
                c, c.names()[0])["State"] == "up")
            again = self.sleeper(c, Name="after-" + which)
            c.wait_for(again, RUNNING)
            self.ok(c, "stop", again)
            t = c.task("web")
            for key in ("State", "ContainerID", "StartTime", "RestartCount",
                        "Attempt", "Node"):
                self.assertEqual(t.get(key), before.get(key), which)
            self.assertEqual(len(self.commands(c)), 1, which)
        self.ok(c, "stop", "web")
        self.assertFalse(is_alive(pid))

    def test_what_ended_meanwhile_is_known_with_its_exit_code(self):
        c = self.cluster()
        pid = self.run_pid(c, "web", "--restart", "no")
        c.workers[0].kill(signal.SIGKILL)
        os.kill(pid, signal.SIGTERM)
        wait_until("its end", lambda: not is_alive(pid))
        c.start_worker()
        t = c.wait_for("web", FAILED)
        self.assertEqual(t["ExitCode"], 128 + signal.SIGTERM)

    def test_a_worker_that_lost_its_store_adopts_what_runs(self):
        c = self.cluster(worker=["-d", "memory"])
        pid = self.run_pid(c, "web")
        c.workers[0].kill(signal.SIGKILL)
        c.start_worker()
        wait_until("the node is back", lambda: self.node(
            c, c.names()[0])["TaskCount"] == 1)
        c.wait_for("web", RUNNING)
        self.assertTrue(is_alive(pid))
        self.assertEqual(len(self.commands(c)), 1)
        self.ok(c, "stop", "web")
        self.assertFalse(is_alive(pid))


class Fault06(Case):
    """The tasks of a lost worker run elsewhere; what comes back is told to
    stop what by then runs there."""

    def test_they_move_and_the_count_is_right_when_it_is_back(self):
        c = self.cluster(2, manager=["--lost-after", "2s"])
        self.all_up(c)
        ids = [self.sleeper(c) for _ in range(4)]
        for task_id in ids:
            c.wait_for(task_id, RUNNING)
        node = c.task(ids[0])["Node"]
        lost = c.names().index(node)
        c.workers[lost].kill(signal.SIGKILL)  # its tasks go on
        begin = time.monotonic()
        wait_until("all run on the other", lambda: all(
            (t["State"], t["Node"]) == (RUNNING, c.names()[1 - lost])
            for t in c.tasks()))
        print("fault 6: moved after %.1f s, with --lost-after 2s" %
              (time.monotonic() - begin))
        self.assertGreater(len(self.commands(c)), 4)
        c.start_worker(lost)
        wait_until("one process for each", lambda: len(self.commands(c)) == 4)
        self.assertEqual({t["State"] for t in c.tasks()}, {RUNNING})
        self.assertEqual({t["Node"] for t in c.tasks()},
                         {c.names()[1 - lost]})

    def test_a_host_that_dies_with_its_tasks(self):
        c = self.cluster(2, manager=["--lost-after", "2s"])
        task_id = self.sleeper(c)
        node = c.wait_for(task_id, RUNNING)["Node"]
        lost = c.names().index(node)
        c.workers[lost].kill(signal.SIGKILL)
        kill_all_in("%s/w%d" % (c.dir, lost))
        wait_until("it runs elsewhere", lambda: (
            c.task(task_id)["State"], c.task(task_id)["Node"]) ==
            (RUNNING, c.names()[1 - lost]))
        t = c.task(task_id)
        self.assertEqual(t["RestartCount"], 0)  # it was not its fault


class Fault07(Case):
    """Stop works in every state, is not undone, and says what happened."""

    def test_a_scheduled_task(self):
        c = self.cluster()
        c.workers[0].kill(signal.SIGSTOP)
        try:
            task_id = self.sleeper(c)
            c.wait_for(task_id, SCHEDULED)
            self.assertEqual(harness.http("DELETE", c.url + "/tasks/" +
                                          task_id)[0], 204)
        finally:
            c.workers[0].kill(signal.SIGCONT)
        c.wait_for(task_id, COMPLETED)
        wait_until("nothing runs", lambda: not self.commands(c))
        holds(lambda: not self.commands(c), 1)

    def test_a_failed_task_that_waits_for_its_restart(self):
        c = self.cluster()
        task_id = self.post(c, Cmd=["sh", "-c", "exit 1"],
                            RestartPolicy="always")
        c.wait_for(task_id, FAILED)
        self.ok(c, "stop", task_id)
        t = c.task(task_id)
        self.assertEqual(t["State"], COMPLETED)
        holds(lambda: c.task(task_id) == t)

    def test_a_pending_task_does_not_run_later(self):
        c = self.bare()
        c.start_manager()
        task_id = self.sleeper(c)
        self.assertEqual(c.task(task_id)["State"], PENDING)
        self.ok(c, "stop", task_id)
        self.assertEqual(c.task(task_id)["State"], COMPLETED)
        c.start_worker()
        c.wait_for(self.sleeper(c), RUNNING)
        self.assertEqual(c.task(task_id)["State"], COMPLETED)
        self.assertEqual(len(self.commands(c)), 1)

    def test_it_says_stopped_only_when_it_is_true(self):
        c = self.cluster()
        code, out, err = c.cube("stop", "nobody")
        self.assertEqual((code, out), (1, ""))
        self.assertIn("nobody", err)
        pid = self.run_pid(c, "web")
        self.assertIn("stopped", self.ok(c, "stop", "web"))
        self.assertFalse(is_alive(pid))
        for name in (str(uuid.uuid4()), "nonsense"):
            self.assertEqual(harness.http("DELETE", c.url + "/tasks/" +
                                          name)[0], 404)

    def test_what_has_ended_can_be_stopped_without_harm(self):
        c = self.cluster()
        self.ok(c, "run", "-d", "--name", "a", "--restart", "no", "--",
                "sh", "-c", "exit 3")
        t = c.wait_for("a", FAILED)
        self.assertEqual(harness.http("DELETE", c.url + "/tasks/" +
                                      t["ID"])[0], 204)
        self.assertEqual(c.task("a")["State"], FAILED)


class Fault08(Case):
    """Exit code 0 is Completed, others are Failed and kept; a crash loop
    looks like one."""

    def test_exit_codes(self):
        c = self.cluster()
        ids = {code: self.post(c, Cmd=["sh", "-c", "exit %d" % code],
                               RestartPolicy="no") for code in (0, 1, 3)}
        for code, task_id in ids.items():
            t = c.wait_for(task_id, (COMPLETED, FAILED))
            self.assertEqual((t["State"], t["ExitCode"]),
                             (FAILED if code else COMPLETED, code))
            self.assertEqual(str(code) in t.get("Error", ""), code != 0)

    def test_a_crash_loop_is_failed_between_its_starts(self):
        c = self.cluster()
        task_id = self.post(c, Cmd=["sh", "-c", "exit 7"], Name="loop",
                            RestartPolicy="always")
        wait_until("two restarts",
                   lambda: c.task(task_id)["RestartCount"] == 2)
        t = c.wait_for(task_id, FAILED)
        self.assertIn("7", t["Error"])
        row = [line for line in self.ok(c, "status").splitlines()
               if "loop" in line][0]
        self.assertIn("starts again", row)
        self.assertNotIn("Running", row)

    def test_restarts_end_when_the_policy_says_so(self):
        c = self.cluster()
        task_id = self.post(c, Cmd=["sh", "-c", "exit 7"])
        t = wait_until("the last of three restarts", lambda: c.task(task_id)[
            "RestartCount"] == 3 and c.wait_for(task_id, FAILED), 30)
        holds(lambda: c.task(task_id)["RestartCount"] == 3)
        self.assertNotIn("RestartTime", c.task(task_id), t)


class Fault09(Case):
    """Two tasks of one name both run."""

    def test_as_processes(self):
        c = self.cluster()
        ids = [self.sleeper(c, Name="twin") for _ in range(2)]
        for task_id in ids:
            t = c.wait_for(task_id, RUNNING)
            self.assertEqual(t["RestartCount"], 0)

    def test_in_an_engine_that_has_the_name(self):
        c, engine = self.on_fake_engine()
        for _ in range(2):
            self.ok(c, "run", "--name", "twin", "web:1")
        self.assertEqual([t["RestartCount"] for t in c.tasks()], [0, 0])
        first, second = sorted(e["Name"] for e in engine.running())
        self.assertEqual(first, "twin")
        self.assertRegex(second, "^twin-[0-9a-f]+$")

    def test_on_docker(self):
        c, _ = self.on_docker()
        for _ in range(2):
            self.ok(c, "run", "--name", "fault9", harness.IMAGE, *SLEEP)
        self.assertEqual([t["State"] for t in c.tasks()], [RUNNING] * 2)
        self.ok(c, "stop", *[t["ID"] for t in c.tasks()])


class Fault10(Case):
    """A task without an ID gets one; what is no task, or has a state that is
    none, is refused; the worker survives it."""

    def test_each_task_without_an_id_gets_its_own(self):
        c = self.cluster()
        ids = {self.sleeper(c), self.sleeper(c, ID=None)}
        self.assertEqual(len(ids), 2)
        self.assertNotIn("00000000-0000-0000-0000-000000000000", ids)
        for task_id in ids:
            uuid.UUID(task_id)
            c.wait_for(task_id, RUNNING)

    def test_nonsense_is_400_on_both(self):
        c = self.cluster()
        worker = "http://" + c.names()[0]
        task = go.task(Cmd=["true"])
        for body in ("{}", "null", "", "[]", "7", '{"Task":{}}',
                     '{"State":2,"Task":null}', '{"State":2,"Task":{}}',
                     dict(go.event(task), State=9),
                     go.event(dict(task, State=5)),
                     go.event(dict(task, State=-1)),
                     go.event(dict(task, State=1.5)),
                     go.event(dict(task, State="Running"))):
            for url in (c.url, worker):
                if url == worker and isinstance(body, dict) and \
                        body["State"] == 9:
                    continue  # it acts on the task's
                status, _, text = harness.http("POST", url + "/tasks", body)
                self.assertEqual(status, 400, (url, body, text))
                self.assertTrue(json.loads(text)["Message"])
        self.assertEqual(c.tasks(), [])
        self.assertEqual(harness.get(worker + "/tasks"), [])
        c.wait_for(self.sleeper(c), RUNNING)


class Fault11(Case):
    """Ports, times and counts are what they say, and E-PVM minds the CPU."""

    def test_port_bindings_are_honoured(self):
        c = self.cluster()
        port = harness.free_port()
        task_id = self.post(c, PortBindings={"7777/tcp": str(port)}, Cmd=[
            os.path.join(harness.EXAMPLES, "echo")])
        t = c.wait_for(task_id, RUNNING)
        self.assertEqual(t["HostPorts"]["7777/tcp"][0]["HostPort"], str(port))
        wait_until("it answers there", lambda: self.connects(port))

    @staticmethod
    def connects(port):
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", port)) == 0

    def test_the_age_of_a_task_grows(self):
        c = self.cluster()
        self.ok(c, "run", "--name", "web", *SLEEP)
        t = c.task("web")
        self.assertNotEqual(t["StartTime"], go.UNSET)
        wait_until("it is older than two seconds", lambda: re.search(
            r"[2-9] seconds ago", self.ok(c, "status")))
        self.ok(c, "stop", "web")
        self.assertNotEqual(c.task("web")["FinishTime"], go.UNSET)
        self.assertEqual(c.task("web")["StartTime"], t["StartTime"])

    def test_what_a_node_has_promised_rises_and_falls(self):
        c = self.cluster()
        name = c.names()[0]
        for count in (1, 2):
            self.ok(c, "run", "--name", "t%d" % count, "--memory", "64m",
                    "--disk", "1g", *SLEEP)
            n = self.node(c, name)
            self.assertEqual((n["TaskCount"], n["MemoryAllocated"],
                              n["DiskAllocated"]),
                             (count, count * 65536, count << 30))
        self.ok(c, "stop", "t1", "t2")
        n = self.node(c, name)
        self.assertEqual((n["TaskCount"], n["MemoryAllocated"],
                          n["DiskAllocated"]), (0, 0, 0))
        wait_until("the worker says so too",
                   lambda: self.node(c, name)["Stats"]["TaskCount"] == 0)

    def test_epvm_takes_the_node_whose_cpu_is_idle(self):
        """Two workers of the Go program that differ in nothing else, on hosts
        of their own, since those of one host share its CPUs; in both orders,
        lest the first is taken for being the first."""
        for busy in (0, 1):
            workers = [go.Worker(host="127.0.0.%d" % i) for i in (1, 2)]
            for w in workers:
                self.addCleanup(w.close)
            workers[busy].cpu = "user"
            c = self.bare(0, manager=["-s", "epvm"])
            names = [w.name for w in workers]
            c.names = lambda names=names: names
            c.start_manager()
            wait_until("two readings of each", lambda ws=workers: min(
                w.readings for w in ws) >= 3)
            task_id = self.post(c, Image="echo:latest", Cpu=0.5)
            t = c.wait_for(task_id, RUNNING)
            self.assertEqual(t["Node"], names[1 - busy])


class Fault12(Case):
    """An image that the engine has is not pulled."""

    def test_without_a_registry(self):
        c, engine = self.on_fake_engine()
        self.ok(c, "run", "--name", "web", "web:1")
        self.assertEqual(engine.pulled, [])

    def test_one_that_it_lacks_is_and_the_reason_is_told_when_that_fails(self):
        c, engine = self.on_fake_engine()
        code, _, err = c.cube("run", "--restart", "no", "web:2")
        self.assertEqual((code, engine.pulled), (1, ["web:2"]))
        self.assertIn("pull access denied for web:2", err)

    def test_on_docker(self):
        c, _ = self.on_docker()  # no registry knows the name of this image
        self.ok(c, "run", "--name", "fault12", harness.IMAGE, *SLEEP)
        self.ok(c, "stop", "fault12")


class Fault13(Case):
    """The command line says what went wrong, with an exit code; what is taken
    is refused at once."""

    def test_without_a_manager_every_command_ends_with_3_and_words(self):
        where = "127.0.0.1:%d" % harness.free_port()
        for argv in (["status"], ["node"], ["run", *SLEEP], ["stop", "web"],
                     ["logs", "web"], ["inspect", "web"], ["rm", "web"],
                     ["events"], ["node", "rm", "a:1"]):
            at = argv.index("--") if "--" in argv else len(argv)
            code, out, err = harness.run(
                CUBE, *argv[:at], "-m", where, *argv[at:],
                env={"CUBE_TOKEN": ""})
            self.assertEqual((code, out), (3, ""), argv)
            self.assertIn(where, err)
            self.assertLessEqual(len(err.splitlines()), 3, err)

    def test_a_400_is_a_failure_that_tells_the_reason(self):
        c = self.cluster()
        code, out, err = c.cube("run", "-f", "-", stdin='{"Task": {"ID": 7}}')
        self.assertEqual((code, out), (1, ""))
        self.assertIn("ID", err)
        self.assertNotIn("uccess", err)

    def test_a_taken_port_ends_it_with_1_and_words(self):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            s.listen()
            port = s.getsockname()[1]
            for command in ("manager", "worker"):
                c = self.bare()
                code, _, err = harness.run(
                    CUBE, command, "-p", port, "--data", c.dir, timeout=10)
                self.assertEqual(code, 1, err)
                self.assertIn(str(port), err)
                self.assertIn("in use", err)

    def test_a_second_one_on_the_same_data_is_refused_at_once(self):
        c = self.cluster()
        for command, data in (("manager", "m"), ("worker", "w0")):
            begin = time.monotonic()
            code, _, err = harness.run(
                CUBE, command, "-p", harness.free_port(), "--data",
                os.path.join(c.dir, data),
                *(["-n", "w0"] if command == "worker" else []), timeout=10)
            self.assertEqual(code, 1, err)
            self.assertIn(".cube", err)
            self.assertLess(time.monotonic() - begin, 5)
        self.ok(c, "run", "--name", "web", *SLEEP)  # the first ones go on


class Fault14(Case):
    """No descriptor leaks on either side, with whatever comes and goes."""

    @staticmethod
    def descriptors(process):
        return len(os.listdir("/proc/%d/fd" % process.pid))

    def counts(self, c):
        return [self.descriptors(p) for p in [c.manager] + c.workers]

    def disturb(self, c):
        """Polls, streams that begin and end, garbage, tasks."""
        ports = [c.port] + c.ports
        for port in ports:
            poll = go.Caller(port)
            for i in range(300):
                poll.call("GET", ("/tasks", "/nodes", "/stats", "/nothing",
                                  "/healthz")[i % 5])
            poll.close()
            for i in range(60):
                with socket.create_connection(("127.0.0.1", port)) as s:
                    s.sendall((b"GET /events HTTP/1.1\r\nHost: a\r\n\r\n",
                               b"GET /events HTTP/1.1\r\nHost: localhost\r\n"
                               b"\r\n", b"\0\1\2\r\n\r\n", b"POST /tas",
                               b"")[i % 5])
                    if i % 5 == 1:
                        s.recv(100)
        for _ in range(3):
            task_id = self.sleeper(c)
            c.wait_for(task_id, RUNNING)
            c.cube("logs", task_id)
            self.ok(c, "stop", task_id)
            self.ok(c, "rm", task_id)

    def test_after_hundreds_of_polls_there_are_as_many_as_before(self):
        c = self.cluster()
        self.all_up(c)
        self.disturb(c)  # what is opened once, is open by now
        wait_until("connections close", lambda: self.is_quiet(c))
        before = self.counts(c)
        for _ in range(2):
            self.disturb(c)
        # Manager and worker keep some connections to each other for a while,
        # as many as they once needed at the same time. A leak has hundreds.
        wait_until("there are no more than %s, now %s" % (
            before, self.counts(c)), lambda: all(
                now <= was + 3 for now, was in zip(self.counts(c), before)))

    def is_quiet(self, c):
        """No change for a second."""
        counts = self.counts(c)
        end = time.monotonic() + 1
        while time.monotonic() < end:
            if self.counts(c) != counts:
                return False
            time.sleep(0.05)
        return True

    def test_a_manager_that_polls_and_is_refused_keeps_none(self):
        worker = go.Worker()
        self.addCleanup(worker.close)
        dead = "127.0.0.1:%d" % harness.free_port()
        c = self.bare(0)
        c.names = lambda: [worker.name, dead]
        c.start_manager()
        wait_until("two polls", lambda: worker.polls >= 2)
        before = self.descriptors(c.manager)
        wait_until("three more", lambda: worker.polls >= 5)
        worker.vanish()
        worker.listen()
        wait_until("three more", lambda: worker.polls >= 8)
        self.assertLessEqual(self.descriptors(c.manager), before + 1)


class Fault15(Case):
    """A task starts at once, and many do not wait for one another."""

    def test_one_task(self):
        c = self.cluster()
        self.all_up(c)
        begin = time.monotonic()
        task_id = self.sleeper(c)
        c.wait_for(task_id, RUNNING)
        took = time.monotonic() - begin
        print("fault 15: one task runs after %.3f s" % took)
        self.assertLess(took, 3)

    def test_twenty_tasks(self):
        c = self.cluster(2)
        self.all_up(c)
        begin = time.monotonic()
        for _ in range(20):
            self.sleeper(c)
        wait_until("all run", lambda: [t["State"] for t in c.tasks()] ==
                   [RUNNING] * 20)
        took = time.monotonic() - begin
        print("fault 15: twenty tasks run after %.3f s" % took)
        self.assertLess(took, 10)
        self.assertEqual(len(self.commands(c)), 20)


if __name__ == "__main__":
    harness.main(jobs=3)
