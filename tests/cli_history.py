"""What was, and copies of it: status, node and history of the past; backup of
a manager that works, managers started on copies; store files at rest.
"""

import http.server
import json
import os
import shutil
import socket
import tempfile
import threading
import time
import unittest

import harness
from cli_cluster import Case, Cluster, is_alive
from harness import CUBE, wait_until


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + (
        "%.9fZ" % (time.time() % 1))[1:]


class Past(Case):
    def test_a_cluster_as_it_was(self):
        c = self.cluster(2)
        self.run_pid(c, "web")
        running = now()
        self.ok(c, "stop", "web")
        ended = now()
        self.ok(c, "rm", "web")
        self.assertNotIn("web", self.ok(c, "status", "-a"))
        self.assertIn("Running", self.ok(c, "status", "--at", running))
        self.assertIn("Completed", self.ok(c, "status", "--at", ended))
        tasks = json.loads(self.ok(c, "status", "-o", "json", "--at",
                                   running))
        self.assertEqual([(t["Name"], t["State"]) for t in tasks],
                         [("web", 2)])
        rows = [line.split() for line in
                self.ok(c, "node", "--at", running).splitlines()[1:]]
        self.assertEqual([r[0] for r in rows], sorted(c.names()))
        self.assertEqual(sorted(r[4] for r in rows), ["0", "1"])
        self.assertTrue(all(int(r[1]) > 0 for r in rows), rows)
        c.workers[1].kill()
        lost = wait_until("it is lost", lambda: any(
            n["State"] == "lost" for n in harness.get(c.url + "/nodes")) and
            now())
        self.assertEqual(self.ok(c, "node", "--at", running).count(" up "), 2)
        self.assertIn(" lost ", self.ok(c, "node", "--at", lost))
        task = tasks[0]["ID"]
        lines = self.ok(c, "history", task).splitlines()
        self.assertEqual([line[22:].split()[0] for line in lines],
                         ["STATE", "Scheduled", "Running",
                          "Running", "Completed", "removed"])
        self.assertIn("a user wants it stopped", lines[3])
        first = json.loads(self.ok(c, "history", "-o", "json",
                                   task).splitlines()[0])
        self.assertEqual(first["Why"], "it was submitted, and placed")

    def test_times_that_cannot_be_answered_are_told(self):
        c = self.cluster()
        for at in ("10:99", "soon", "2999-01-01T00:00:00Z", ""):
            code, _, err = c.cube("status", "--at", at)
            self.assertEqual(code, 2, err)
        self.refused(c, "what is kept begins at", "status", "--at", "-1h")
        self.refused(c, "what is kept begins at", "node", "--at",
                     "2020-01-01 10:32")
        self.refused(c, "knows no task", "history", "nobody")
        self.run_pid(c, "web")
        time.sleep(1.1)          # a clock shows whole seconds
        for form in ("%H:%M:%S", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S"):
            self.assertIn("Running", self.ok(
                c, "status", "--at", time.strftime(form)))
        self.assertIn("Running", self.ok(c, "status", "--at", "-0.05s"))

    def test_what_is_removed_after_keep_is_forgotten_and_said_so(self):
        c = self.cluster(manager=["--keep", "2s"])
        self.run_pid(c, "web")
        self.ok(c, "run", "--name", "done", "--restart", "no", "--", "true")
        begin = now()
        wait_until("it is over and removed", lambda: not c.task("done"))
        wait_until("its events too", lambda: c.cube(
            "status", "--at", begin)[0] == 1)
        self.assertIn("Running", self.ok(c, "status", "--at", now()))
        self.assertIn("Running", self.ok(c, "history", "web"))


class Backups(Case):
    def copy(self, c, name="copy.cube", *flags):
        path = os.path.join(c.dir, name)
        self.assertIn("copied", self.ok(c, "backup", path, *flags))
        self.assertEqual([f for f in os.listdir(c.dir)
                          if f.startswith(name + ".part")], [])
        return path

    def manager_on(self, c, path, *flags, port=None):
        """A manager on a copy, in a directory of its own."""
        data = tempfile.mkdtemp(dir=c.dir)
        shutil.copy(path, data + "/manager.cube")
        p = harness.Process(CUBE, "manager", "-p", port or c.port, "--data",
                            data, "-w", ",".join(c.names()), *flags,
                            env=c.env)
        self.addCleanup(p.close)
        c.await_log(p, "listens on")
        return p

    def test_a_manager_on_a_copy_adopts_what_runs(self):
        c = self.cluster(2)
        old = self.run_pid(c, "old")
        gone = self.run_pid(c, "gone")
        path = self.copy(c)
        new = self.run_pid(c, "new")
        self.ok(c, "stop", "gone")
        for _ in range(3):       # epochs that the copy knows nothing of
            c.manager.kill()
            c.start_manager()
            wait_until("it leads", lambda: all(
                n["State"] == "up" for n in harness.get(c.url + "/nodes")))
        c.manager.kill()
        p = self.manager_on(c, path)
        wait_until("all is known", lambda: {
            t["Name"]: t["State"] for t in c.tasks()} ==
            {"old": 2, "new": 2, "gone": 3}, timeout=30)
        self.assertIn("older copy", p.output())
        self.assertTrue(is_alive(old) and is_alive(new))
        self.assertFalse(is_alive(gone))
        self.assertEqual([t["RestartCount"] for t in c.tasks()], [0, 0, 0])
        self.run_pid(c, "after")
        self.ok(c, "stop", "old", "new")
        self.assertFalse(is_alive(old) or is_alive(new))

    def test_the_manager_that_was_started_last_leads(self):
        c = self.cluster(1)
        pid = self.run_pid(c, "web")
        path = self.copy(c)
        port = harness.free_port()
        p = self.manager_on(c, path, port=port)
        wait_until("the old one knows", lambda: "stop one of them" in
                   c.manager.output())
        self.refused(c, "leads now", "run", "-d", "--", "sleep", "1000")
        self.refused(c, "leads now", "stop", "web")
        self.assertIn("obeys another manager", self.ok(c, "node"))
        self.assertTrue(is_alive(pid))
        code, out, err = harness.run(
            CUBE, "run", "-m", "127.0.0.1:%d" % port, "--name", "late", "--",
            "sleep", "1000", env=c.env)
        self.assertEqual(code, 0, err + out + p.output())
        time.sleep(1.5)          # beats come; nobody fights over the epoch
        self.assertNotIn("stop one of them", p.output())
        c.manager.kill()
        c.start_manager()        # the last one again
        wait_until("the other one knows", lambda: "stop one of them" in
                   p.output())
        c.wait_for("late", 2)
        self.ok(c, "stop", "web")
        self.assertFalse(is_alive(pid))

    def test_a_worker_of_two_names_is_no_other_managers(self):
        c = self.cluster(1)
        self.run_pid(c, "web")
        node = harness.get(c.url + "/nodes")[0]
        status, _, _ = harness.http("POST", c.url + "/nodes", {
            "Name": "localhost:%d" % c.ports[0], "Worker": node["Worker"]})
        self.assertEqual(status, 201)
        wait_until("both are up", lambda: [
            n["State"] for n in harness.get(c.url + "/nodes")] ==
            ["up", "up"])
        self.run_pid(c, "more")
        self.assertNotIn("older copy", c.manager.output())
        self.assertNotIn("stop one of them", c.manager.output())

    def test_the_epoch_can_be_told(self):
        c = self.cluster(1)
        self.run_pid(c, "web")   # now the worker is the cluster's
        self.manager_on(c, self.copy(c), "--epoch", "70",
                        port=harness.free_port())
        wait_until("the old one knows", lambda: "of epoch 70" in
                   c.manager.output())

    def test_a_store_in_memory_goes_on_in_a_file(self):
        c = self.cluster(1, manager=["-d", "memory"])
        pid = self.run_pid(c, "web")
        path = self.copy(c)
        c.manager.kill()
        self.manager_on(c, path)
        c.wait_for("web", 2)
        self.ok(c, "stop", "web")
        self.assertFalse(is_alive(pid))

    def test_a_copy_has_what_was_acknowledged_before_it_began(self):
        c = self.cluster(1)
        known = []

        def submit():
            t = {"Name": "huge", "Image": "x", "Memory": 1 << 50}
            status, _, body = harness.http("POST", c.url + "/tasks", t)
            assert status == 201, body
            known.append(json.loads(body)["ID"])
        submit()
        is_over = threading.Event()

        def keep_on():
            while not is_over.is_set():
                submit()
        thread = threading.Thread(target=keep_on)
        thread.start()
        try:
            for i in range(5):
                before = list(known)
                path = self.copy(c, "copy%d" % i)
                dump = self.rows(path, "tasks")
                ids = {json.loads(row[2])["Task"]["ID"] for row in dump}
                self.assertLessEqual(set(before), ids)
        finally:
            is_over.set()
            thread.join()

    def rows(self, path, *trees):
        code, out, err = harness.run(CUBE, "store", "dump", path, *trees)
        self.assertEqual(code, 0, err)
        return [line.split("\t") for line in out.splitlines()]

    def test_what_is_there_is_not_written_over(self):
        c = self.cluster()
        path = self.copy(c)
        self.refused(c, "is there already", "backup", path)
        self.copy(c, "copy.cube", "--force")
        self.refused(c, "has it open", "backup", "--force",
                     c.dir + "/m/manager.cube")
        self.refused(c, "No such file", "backup", c.dir + "/no/such")
        code, _, err = harness.run(CUBE, "backup", "-m", "127.0.0.1:1",
                                   c.dir + "/none")
        self.assertEqual(code, 3, err)
        self.assertFalse(os.path.exists(c.dir + "/none"))

    def test_a_broken_transfer_leaves_nothing(self):
        c = self.cluster()
        self.run_pid(c, "web")
        with socket.create_connection(("127.0.0.1", c.port)) as s:
            s.sendall(b"GET /backup HTTP/1.0\r\nHost: localhost\r\n\r\n")
            whole = b"".join(iter(lambda: s.recv(65536), b""))
        body = whole.split(b"\r\n\r\n", 1)[1]
        odd = body.replace(b"tasks", b"tusks", 1)[:-3] + b"7"
        for case, text, length in (
                ("cut", body[:-20], len(body)),
                ("short", body[:-10], len(body) - 10),
                ("count", odd, len(odd)),
                ("other", b"[]\n" * 9, 27),
                ("nothing", b"", 0)):
            with self.subTest(case), Answering(text, length) as port:
                path = c.dir + "/broken"
                code, out, err = harness.run(
                    CUBE, "backup", "-m", "127.0.0.1:%d" % port, path,
                    env=c.env)
                self.assertIn(code, (1, 3), err)
                self.assertEqual(out, "")
                self.assertEqual([f for f in os.listdir(c.dir)
                                  if f.startswith("broken")], [], err)


class Answering:
    """A server that gives one answer to whatever it is asked."""

    def __init__(self, body, length):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass
        self.server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever,
                                       args=(0.05,))

    def __enter__(self):
        self.thread.start()
        return self.server.server_address[1]

    def __exit__(self, *_):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


class Files(Case):
    def store(self, *argv):
        return harness.run(CUBE, "store", *argv)

    def test_a_file_at_rest_is_checked_dumped_and_compacted(self):
        c = self.cluster()
        self.run_pid(c, "web")
        path = c.dir + "/m/manager.cube"
        for command in ("check", "dump", "compact"):
            code, _, err = self.store(command, path)
            self.assertEqual(code, 1)
            self.assertIn("has it open", err)
            self.assertIn("cube backup", err)
        c.manager.kill()
        with open(path, "rb") as f:
            before = f.read()
        code, out, err = self.store("check", path)
        self.assertEqual(code, 0, err)
        self.assertIn("is whole", out)
        rows = [line.split("\t") for line in
                self.store("dump", path)[1].splitlines()]
        meta = {row[1]: row[2] for row in rows if row[0] == "meta"}
        self.assertEqual(len(meta["cluster"]), 36)
        tasks = [row for row in rows if row[0] == "tasks"]
        self.assertEqual(tasks[0][1], "1")
        self.assertEqual(json.loads(tasks[0][2])["Task"]["Name"], "web")
        with open(path, "rb") as f:
            self.assertEqual(f.read(), before)   # nothing was written
        os.mkdir(c.dir + "/copy")
        with open(c.dir + "/copy/at", "wb") as f:
            f.write(before)
        self.assertEqual(self.store("check", c.dir + "/copy/at")[0], 0)
        self.assertEqual(self.store("dump", c.dir + "/copy/at")[0], 0)
        self.assertEqual(os.listdir(c.dir + "/copy"), ["at"])
        code, out, err = self.store("compact", path)
        self.assertEqual(code, 0, err)
        self.assertEqual([line.split("\t") for line in
                          self.store("dump", path)[1].splitlines()], rows)
        self.assertEqual(self.store("dump", path, "nothing")[0], 1)
        c.start_manager()
        c.wait_for("web", 2)

    def test_damage_is_told_and_nothing_is_made(self):
        c = self.cluster()
        self.run_pid(c, "web")
        path = c.dir + "/copy"
        self.ok(c, "backup", path)
        with open(path, "r+b") as f:
            f.seek(os.path.getsize(path) // 2)
            byte = f.read(1)
            f.seek(-1, 1)
            f.write(bytes([byte[0] ^ 1]))
            f.seek(5)
            f.write(b"\xff")
        code, out, err = self.store("check", path)
        self.assertEqual((code, out), (1, ""))
        self.assertIn(path, err)
        for command in ("check", "dump", "compact"):
            code, _, err = self.store(command, c.dir + "/none")
            self.assertEqual(code, 1, err)
            self.assertEqual(self.store(command)[0], 2)
        self.assertFalse(os.path.exists(c.dir + "/none"))
        code, _, err = self.store()
        self.assertEqual(code, 2)
        self.assertIn("another word", err)


class Words(Case):
    """What is refused, and how it is said."""

    def test_a_live_node_is_not_forgotten(self):
        c = Cluster(0, manager=["-w", ""])
        self.addCleanup(c.close)
        c.start_manager()
        port = harness.free_port()
        name = "127.0.0.1:%d" % port
        with harness.Process(CUBE, "worker", "-p", port, "-n", "j", "-r",
                             "process", "--data", c.dir + "/j", "--join",
                             c.where, env=c.env) as worker:
            wait_until("it joins", lambda: any(
                n["Name"] == name and n["State"] == "up"
                for n in harness.get(c.url + "/nodes")))
            self.refused(c, "stop the worker first", "node", "rm", name)
            worker.kill()
        wait_until("it is forgotten", lambda: c.cube(
            "node", "rm", name)[0] == 0)
        self.assertEqual(harness.get(c.url + "/nodes"), [])

    def test_servers_say_what_is_wrong_with_their_flags(self):
        with tempfile.TemporaryDirectory(prefix="cube-words-") as d:
            code, _, err = harness.run(CUBE, "manager", "--data", d, "-p",
                                       "0", "--workers", "foo:bar")
            self.assertEqual(code, 2, err)
            self.assertIn("expected host:port", err)

    def test_a_second_dev_says_what_runs_there(self):
        with tempfile.TemporaryDirectory(prefix="cube-words-") as d:
            first, port = self.dev(d)
            dev = [CUBE, "dev", "-r", "process", "-p", port, "-n", "1"]
            with first:
                for data in ("/a", "/b"):
                    code, _, err = harness.run(*dev, "--data", d + data)
                    self.assertEqual(code, 1)
                    self.assertIn("A manager with 1 node runs at 127.0.0.1:%d"
                                  % port, err)
                    self.assertIn("--port", err)
                status, _, body = harness.http(
                    "GET", "http://127.0.0.1:%d/tasks" % port,
                    headers={"Host": "foo.example"})
                self.assertEqual(status, 403)
                self.assertIn("--allow-host foo.example", body)

    @staticmethod
    def dev(d):
        """A `cube dev` with one worker; its ports are two in a row."""
        for _ in range(10):
            port = harness.free_port()
            p = harness.Process(CUBE, "dev", "-r", "process", "-p", port,
                                "-n", "1", "--data", d + "/a")
            wait_until("it listens or has ended", lambda p=p: not
                       p.is_running() or "manager listens" in p.output())
            if p.is_running():
                return p, port
            p.close()
        raise AssertionError("no two free ports in a row")

    def test_less_memory_than_any_engine_takes_is_refused(self):
        c = self.cluster()
        self.refused(c, "at least 6291456 (6m)", "run", "--memory", "1", "--",
                     "true")

    def test_a_task_that_gave_up_says_so(self):
        c = self.cluster()
        c.cube("run", "-d", "--name", "never", "--", "false")
        wait_until("it gave up", lambda: "gave up after 3 restarts: exited "
                   "with code 1" in self.ok(c, "status"), timeout=40)
        lines = self.ok(c, "history", "never").splitlines()
        self.assertIn("it failed for good: gave up after 3 restarts", lines[-1])
        self.assertIn("it failed, and is to be started again", lines[3])


if __name__ == "__main__":
    harness.main(4)
