"""A client that submits and stops tasks, while manager and workers are killed
and the engine restarts. In the end each task that was accepted must be in the
state that was last asked for, with exactly one process or container for each
that should run, and none for the rest.

DISTURB_SECONDS is how long that goes on (25 by default; 600 is the full
length), DISTURB_SEED repeats the choices of a run, though not its timing.
Restarting an engine hurts all who use it, so that part runs only with
CUBE_TEST_ENGINE=required, and with an engine that tools/engine has started;
CUBE_TEST_RESTART is the command for another one.
"""

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
import unittest
import urllib.error
import urllib.parse
import uuid

import harness
from cli_cluster import Cluster
from harness import CUBE, TOP

SECONDS = float(os.environ.get("DISTURB_SECONDS", "25"))
SEED = int(os.environ.get("DISTURB_SEED") or random.randrange(1 << 30))
RESTART = os.environ.get("CUBE_TEST_RESTART",
                         TOP + "/tools/engine restart docker")
SETTLE = 90  # seconds, from the last disturbance until all is as wished


class Disturbed(Cluster):
    """A cluster whose servers are killed at any time. Each has a lock: it is
    held by who kills it or starts it."""

    def __init__(self, runtime, workers=2):
        super().__init__(workers)
        self.runtime = runtime
        self.kills = 0
        self.past = []  # what servers said before they were killed

    def start_manager(self, *more):
        self.manager = harness.Process(
            CUBE, "manager", "-p", self.port, "--data", self.dir + "/m", "-w",
            ",".join(self.names()), env=self.env)

    def start_worker(self, i=0, *more):
        self.workers[i] = harness.Process(
            CUBE, "worker", "-p", self.ports[i], "-n", "w%d" % i, "-r",
            self.runtime, "--data", "%s/w%d" % (self.dir, i), env=self.env)

    def start(self):
        self.start_manager()
        self.await_log(self.manager, "listens on")
        for i in range(len(self.workers)):
            self.start_worker(i)
        return self

    def kill_one(self, choice, pause):
        """Kills one of them as a power cut would, and starts it again after a
        pause. Its tasks run on."""
        victim = choice.randrange(len(self.workers) + 1)
        process = self.manager if victim == 0 else self.workers[victim - 1]
        process.kill(signal.SIGKILL)
        self.past.append((time.strftime("%X"), process.argv[1],
                          process.output()[-1500:]))
        process.close()
        self.kills += 1
        time.sleep(pause)
        if victim == 0:
            self.start_manager()
        else:
            self.start_worker(victim - 1)


class Client:
    """Submits and stops tasks; repeats what was not answered, since only an
    answer is a promise. `wanted`: what was last accepted for each ID."""

    def __init__(self, cluster, choice, make, most):
        self.cluster, self.choice, self.make = cluster, choice, make
        self.most = most
        self.wanted = {}
        self.refusals = []

    def ask(self, method, path, body, good):
        """Until the answer is the one that was hoped for."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                status, _, text = harness.http(
                    method, self.cluster.url + path, body, timeout=5)
            except (OSError, http.client.HTTPException):
                time.sleep(0.05)
                continue
            if status == good:
                return
            self.refusals.append((method, path, status, text))
            time.sleep(0.05)
        raise AssertionError("%s %s: no %d in a minute; %s" % (
            method, path, good, self.refusals[-3:]))

    def step(self):
        running = [i for i, state in self.wanted.items() if state == 2]
        if len(running) < self.most and self.choice.random() < 0.6:
            task_id = str(uuid.UUID(int=self.choice.getrandbits(128),
                                    version=4))
            event = {"ID": task_id, "State": 2, "Task": dict(
                self.make(), ID=task_id, Name="d" + task_id[:6],
                RestartPolicy="always", StopGrace=1000)}
            self.ask("POST", "/tasks", event, 201)
            self.wanted[task_id] = 2
        elif running:
            task_id = self.choice.choice(running)
            self.ask("DELETE", "/tasks/" + task_id, None, 204)
            self.wanted[task_id] = 3


def processes_of_tasks():
    """How many processes each task has, by the ID in their environment."""
    counts = {}
    for pid in os.listdir("/proc"):
        try:
            with open("/proc/%s/environ" % pid, "rb") as f:
                words = f.read().split(b"\0")
        except OSError:
            continue
        for word in words:
            if word.startswith(b"CUBE_TASK_ID="):
                task_id = word.split(b"=", 1)[1].decode()
                counts[task_id] = counts.get(task_id, 0) + 1
    return counts


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("engine")
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(self.path)


def engine(where, method, target):
    connection = UnixConnection(where.replace("unix://", ""))
    try:
        connection.request(method, target)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def containers_of_tasks(where, everything=False):
    """How many running containers each task has, by their labels."""
    query = urllib.parse.urlencode({
        "all": int(everything),
        "filters": json.dumps({"label": ["cube.task"]})})
    status, body = engine(where, "GET", "/containers/json?" + query)
    assert status == 200, body
    counts = {}
    for c in json.loads(body):
        counts.setdefault(c["Labels"]["cube.task"], []).append(c["Id"])
    return counts if everything else {i: len(c) for i, c in counts.items()}


class Disturbances(unittest.TestCase):
    def disturb(self, cluster, client, pause_of):
        """Kills servers beside the client, which steps on meanwhile."""
        choice = random.Random(SEED + 1)
        is_over = threading.Event()

        def kill_on():
            while not is_over.wait(choice.uniform(0.2, 1.5)):
                cluster.kill_one(choice, pause_of(choice))

        killer = threading.Thread(target=kill_on)
        killer.start()
        end = time.monotonic() + SECONDS
        try:
            while time.monotonic() < end:
                client.step()
                time.sleep(client.choice.uniform(0, 0.3))
        finally:
            is_over.set()
            killer.join()

    @staticmethod
    def not_settled(cluster, client):
        """A node that is not back yet may still bring a copy that was given
        up when it was lost, and a worker may still be at work on a stop."""
        found = []
        for node in harness.get(cluster.url + "/nodes"):
            if node["State"] != "up":
                found.append("node %s is %s" % (node["Name"], node["State"]))
                continue
            try:
                found += ["%s is still in state %d on %s" % (
                    t["ID"], t["State"], node["Name"])
                    for t in harness.get(node["Api"] + "/tasks")
                    if t["State"] < 3 and client.wanted.get(t["ID"]) != 2]
            except (OSError, http.client.HTTPException) as e:
                found.append("node %s: %s" % (node["Name"], e))
        return found

    def differences(self, cluster, client, count):
        """What is not as it was last asked for, in words."""
        try:
            states = {t["ID"]: t for t in cluster.tasks()}
        except (OSError, http.client.HTTPException) as e:
            return ["the manager: %s" % e]
        counts = count()
        found = self.not_settled(cluster, client)
        for task_id, state in client.wanted.items():
            t = states.get(task_id)
            want = 1 if state == 2 else 0
            if t is None:
                found.append(task_id + " was forgotten")
            elif t["State"] != state or counts.get(task_id, 0) != want:
                found.append("%s: state %d, not %d; %d run, not %d; on %s, "
                             "attempt %s, %s" % (
                                 task_id, t["State"], state,
                                 counts.get(task_id, 0), want, t.get("Node"),
                                 t.get("Attempt"), t.get("Error")))
        found += ["%s: not one of ours" % i for i in states
                  if i not in client.wanted]
        return found

    def settle(self, cluster, client, count):
        end = time.monotonic() + SETTLE
        found = self.differences(cluster, client, count)
        while found and time.monotonic() < end:
            time.sleep(0.2)
            found = self.differences(cluster, client, count)
        if found:
            self.fail("DISTURB_SEED=%d, %d kills, %d tasks:\n%s\n%s\n%s" % (
                SEED, cluster.kills, len(client.wanted), "\n".join(found[:9]),
                cluster.logs(),
                "\n".join("%s %s: %s" % p for p in cluster.past[-4:])))
        # and it stays so
        time.sleep(1)
        self.assertEqual(self.differences(cluster, client, count), [])
        for _, name, text in cluster.past:
            self.assertNotIn("AddressSanitizer", text, name)
            self.assertNotIn("runtime error", text, name)
        print("%d tasks, %d kills, %d refusals on the way (seed %d)" % (
            len(client.wanted), cluster.kills, len(client.refusals), SEED))

    @staticmethod
    def pause_of(choice):
        """Mostly short; now and then so long that the node counts as lost,
        and its tasks run twice until it is back."""
        return 7 if choice.random() < 0.08 else choice.uniform(0, 1.2)

    def test_processes(self):
        cluster = Disturbed("process")
        self.addCleanup(cluster.close)
        cluster.start()
        client = Client(cluster, random.Random(SEED), lambda: {
            "Cmd": ["sleep", "100000"]}, 15)
        self.disturb(cluster, client, self.pause_of)
        self.settle(cluster, client, processes_of_tasks)

    def test_containers_of_an_engine_that_restarts(self):
        where = harness.need("DOCKER")
        if os.environ.get("CUBE_TEST_ENGINE") != "required":
            self.skipTest("would restart the engine; "
                          "CUBE_TEST_ENGINE=required allows it")
        cluster = Disturbed("docker")
        cluster.env["DOCKER_HOST"] = where
        self.addCleanup(cluster.close)
        cluster.start()
        client = Client(cluster, random.Random(SEED), lambda: {
            "Image": harness.IMAGE, "Cmd": ["sleep", "100000"]}, 6)
        self.addCleanup(self.remove_containers, where, client)
        is_over = threading.Event()

        def restart_on():
            while not is_over.wait(max(8, SECONDS / 10)):
                subprocess.run(RESTART.split(), check=False,
                               stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)

        restarter = threading.Thread(target=restart_on)
        restarter.start()
        try:
            self.disturb(cluster, client, self.pause_of)
        finally:
            is_over.set()
            restarter.join()
        self.settle(cluster, client, lambda: containers_of_tasks(where))

    @staticmethod
    def remove_containers(where, client):
        for task_id, ids in containers_of_tasks(where, True).items():
            if task_id in client.wanted:
                for i in ids:
                    engine(where, "DELETE", "/containers/%s?force=1" % i)


if __name__ == "__main__":
    harness.main()
