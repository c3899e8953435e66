"""A cluster that is broken on purpose, in more ways than disturb.py has:
beside kills of its servers they are stopped for seconds, the links between
manager and workers are cut, stall, or lose what is on its way, nodes count
as lost after two seconds so that tasks move all the time, garbage comes on
every port, and each request is sent more than once.

Then all is healed. Each task that should run must run in exactly one process;
each that was stopped, in none; and nothing else may run.

SOAK_SECONDS is how long that goes on (20 by default), SOAK_SEED repeats the
choices of a run, though not its timing.
"""

import json
import os
import random
import signal
import socket
import threading
import time
import unittest
import urllib.error
import http.client

import harness
from cli_cluster import Cluster, processes_in
from harness_go import COMPLETED, RUNNING

SECONDS = float(os.environ.get("SOAK_SECONDS", "20"))
SEED = int(os.environ.get("SOAK_SEED") or random.randrange(1 << 30))
SETTLE = 60   # seconds, from the last fault until all is as wished
TASKS = 8     # at most, that should run at one time


class Link:
    """A TCP connection's way from a port of its own to a worker's, which can
    be cut. As a cable does, it tells neither side."""

    def __init__(self, to):
        self.to = to
        self.is_open = True
        self.is_whole = threading.Event()
        self.is_whole.set()
        self.pairs = set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while self.is_open:
            try:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.to), 5)
                far.settimeout(None)
            except OSError:
                if self.is_open:
                    near.close()
                continue
            self.pairs.add((near, far))
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self.carry, args=(a, b),
                                 daemon=True).start()

    def carry(self, a, b):
        """What comes while the cable is cut waits, or is dropped with its
        connection when reset() comes first."""
        try:
            while True:
                data = a.recv(65536)
                self.is_whole.wait()
                if not data:
                    break
                b.sendall(data)
            b.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def reset(self):
        """All connections end, with what was on its way."""
        for pair in list(self.pairs):
            for s in pair:
                try:
                    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                 b"\1\0\0\0\0\0\0\0")
                    s.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
                s.close()
            self.pairs.discard(pair)

    def close(self):
        self.is_open = False
        self.is_whole.set()
        try:
            self.listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.listener.close()
        self.reset()


class Linked(Cluster):
    """A cluster whose manager reaches its workers by links only."""

    def __init__(self):
        super().__init__(2, manager=["--lost-after", "2s"])
        self.links = [Link(port) for port in self.ports]
        self.locks = [threading.Lock() for _ in range(5)]
        self.past = []
        self.counts = {}

    def names(self):
        return ["127.0.0.1:%d" % link.port for link in self.links]

    def close(self):
        for link in self.links:
            link.close()
        super().close()

    def kill_9(self, which):
        process = self.servers()[which]
        process.kill(signal.SIGKILL)
        self.past.append((process.argv[1], process.output()))
        process.close()

    def restart(self, which):
        if which == 0:
            self.start_manager()
        else:
            self.start_worker(which - 1)

    def servers(self):
        return [self.manager] + self.workers


class Faults:
    """Several at a time, but one for each server or link; each heals what it
    broke."""

    def __init__(self, cluster, choice):
        self.cluster, self.choice = cluster, choice

    def kill(self):
        which = self.choice.randrange(3)
        pause = self.choice.choice((0, 0, 0.5, 3))
        with self.cluster.locks[which]:
            self.cluster.kill_9(which)
            time.sleep(pause)
            self.cluster.restart(which)

    def stop(self):
        """It sleeps: to the others it is lost, and wakes up with what it
        knew."""
        which = self.choice.randrange(3)
        pause = self.choice.choice((0.2, 1.5, 3.5))
        with self.cluster.locks[which]:
            process = self.cluster.servers()[which]
            process.kill(signal.SIGSTOP)
            time.sleep(pause)
            process.kill(signal.SIGCONT)

    def cut(self):
        """For a moment, or for longer than it takes to be lost; with what is
        on its way, or not."""
        which = self.choice.randrange(2)
        pause = self.choice.choice((0.2, 1.5, 3.5))
        is_reset = self.choice.random() < 0.5
        link = self.cluster.links[which]
        with self.cluster.locks[3 + which]:
            link.is_whole.clear()
            time.sleep(pause)
            if is_reset:
                link.reset()
            link.is_whole.set()

    def garbage(self):
        port = self.choice.choice([self.cluster.port] + self.cluster.ports)
        text = self.choice.choice((
            os.urandom(3000), b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r",
            b"POST /tasks HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999"
            b"\r\n\r\n{\"Task\"", b"\r\n" * 5000, b"{}",
            b"DELETE /tasks/%00 HTTP/1.0\r\n\r\n"))
        try:
            with socket.create_connection(("127.0.0.1", port), 1) as s:
                s.sendall(text)
        except OSError:
            pass

    def go_on(self, until):
        """One fault after the other, until it is over."""
        while time.monotonic() < until:
            fault = self.choice.choice((self.kill, self.stop, self.cut,
                                        self.garbage))
            name = fault.__name__
            self.cluster.counts[name] = self.cluster.counts.get(name, 0) + 1
            fault()
            time.sleep(self.choice.uniform(0, 0.5))


class Client:
    """Submits, submits again, stops, stops again."""

    def __init__(self, cluster, choice):
        self.cluster, self.choice = cluster, choice
        self.wanted, self.tasks = {}, {}

    def ask(self, method, path, body, good):
        """What was not answered is asked again: only an answer promises."""
        end = time.monotonic() + 60
        got = None
        while time.monotonic() < end:
            try:
                got = harness.http(method, self.cluster.url + path, body,
                                   timeout=5)
                if got[0] == good:
                    return
            except (OSError, http.client.HTTPException,
                    urllib.error.URLError):
                pass
            time.sleep(0.05)
        raise AssertionError("%s %s: no %d in a minute, but %s" % (
            method, path, good, got))

    def submit(self, task_id):
        self.ask("POST", "/tasks", self.tasks[task_id], 201)
        self.wanted[task_id] = RUNNING

    def stop(self, task_id):
        self.ask("DELETE", "/tasks/" + task_id, None, 204)
        self.wanted[task_id] = COMPLETED

    def step(self):
        running = [i for i, s in self.wanted.items() if s == RUNNING]
        stopped = [i for i, s in self.wanted.items() if s == COMPLETED]
        dice = self.choice.random()
        if len(running) < TASKS and dice < 0.5:
            task_id = "%08x-0000-4000-8000-%012x" % (
                len(self.tasks), self.choice.getrandbits(48))
            self.tasks[task_id] = {"State": 2, "Task": {
                "ID": task_id, "Cmd": ["sleep", "1000"], "StopGrace": 500,
                "RestartPolicy": "always"}}
            self.submit(task_id)
        elif running and dice < 0.6:
            self.submit(self.choice.choice(running))  # the same: no twin
        elif running and dice < 0.9:
            self.stop(self.choice.choice(running))
        elif stopped:
            self.stop(self.choice.choice(stopped))


class Soak(unittest.TestCase):
    @staticmethod
    def processes(cluster):
        """How many processes each task has, by the ID in its environment.
        Supervisors have none."""
        counts = {}
        for pid in processes_in(cluster.dir):
            try:
                with open("/proc/%d/environ" % pid, "rb") as f:
                    words = f.read().split(b"\0")
            except OSError:
                continue
            for word in words:
                if word.startswith(b"CUBE_TASK_ID="):
                    task_id = word.split(b"=", 1)[1].decode()
                    counts[task_id] = counts.get(task_id, 0) + 1
        return counts

    def differences(self, cluster, client):
        try:
            known = {t["ID"]: t for t in cluster.tasks()}
        except (OSError, http.client.HTTPException) as e:
            return ["the manager: %s" % e]
        counts = self.processes(cluster)
        found = []
        for task_id, state in client.wanted.items():
            t = known.pop(task_id, None)
            count, want = counts.pop(task_id, 0), int(state == RUNNING)
            if not t or t["State"] != state or count != want:
                found.append("wanted %d in %d processes, has %d: %s" % (
                    state, want, count, json.dumps(t)))
        found += ["unknown task " + i for i in known]
        found += ["unknown process of " + i for i in counts]
        return found

    def settle(self, cluster, client, end):
        """Since when all is as wished, and stays so for three seconds: what
        was broken last may have been noticed only after it was healed."""
        since = None
        while since is None or time.monotonic() < since + 3:
            found = self.differences(cluster, client)
            if not found:
                since = since or time.monotonic()
            elif time.monotonic() < end:
                since = None
            else:
                self.fail("SOAK_SEED=%d\n%s\n%s" % (
                    SEED, "\n".join(found[:8]), cluster.logs()))
            time.sleep(0.05)
        return since

    def test_broken_on_purpose(self):
        cluster = Linked()
        self.addCleanup(cluster.close)
        cluster.start()
        client = Client(cluster, random.Random(SEED + 1))
        end = time.monotonic() + SECONDS
        breakers = [threading.Thread(
            target=Faults(cluster, random.Random(SEED + 2 + i)).go_on,
            args=(end,)) for i in range(2)]
        for breaker in breakers:
            breaker.start()
        try:
            while time.monotonic() < end:
                client.step()
                time.sleep(client.choice.uniform(0, 0.15))
        finally:
            for breaker in breakers:
                breaker.join()
        healed = time.monotonic()
        took = self.settle(cluster, client, healed + SETTLE) - healed
        for name, text in cluster.past + [
                (p.argv[1], p.output()) for p in cluster.servers()]:
            self.assertNotIn("AddressSanitizer", text, name)
            self.assertNotIn("runtime error", text, name)
            self.assertNotRegex(text, r"ssertion .* failed", name)
        print("soak: %d tasks, %s; as wished %.1f s after it was healed "
              "(SOAK_SEED=%d)" % (len(client.wanted), cluster.counts, took,
                                  SEED))


if __name__ == "__main__":
    harness.main()
