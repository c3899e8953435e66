"""The built program on real engines, Docker and Podman: what a person does
with containers, and what can happen to them.
"""

import http.client
import json
import os
import signal
import socket
import urllib.parse

import harness
import harness_engine
from cli_cluster import Case, Cluster
from harness import wait_until


class Connection(http.client.HTTPConnection):
    """To an engine, over its unix socket."""

    def __init__(self, where):
        super().__init__("engine", timeout=60)
        self.path = where.replace("unix://", "")

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class EngineCluster(Cluster):
    """A cluster whose workers use an engine. Removes its containers."""

    def __init__(self, runtime, where, **more):
        super().__init__(**more)
        self.runtime, self.engine = runtime, where
        self.env["DOCKER_HOST" if runtime == "docker"
                 else "CONTAINER_HOST"] = where
        self.more["worker"] += ["-r", runtime]
        self.seen = set()

    def ask(self, method, target):
        connection = Connection(self.engine)
        try:
            connection.request(method, target)
            answer = connection.getresponse()
            body = answer.read()
            return answer.status, body
        finally:
            connection.close()

    def containers(self, task_id):
        """All containers of a task, running or not."""
        query = urllib.parse.urlencode({"all": 1, "filters": json.dumps(
            {"label": ["cube.task=" + task_id]})})
        status, body = self.ask("GET", "/containers/json?" + query)
        assert status == 200, body
        return json.loads(body) or []

    def inspect(self, container_id):
        status, body = self.ask("GET", "/containers/%s/json" % container_id)
        assert status == 200, body
        return json.loads(body)

    def close(self):
        try:
            ids = [t["ID"] for t in self.tasks()]
        except OSError:
            ids = []
        for process in [self.manager] + self.workers:
            if process:
                process.close()
        for task_id in ids:
            for c in self.containers(task_id):
                self.ask("DELETE", "/containers/%s?force=1" % c["Id"])
        super().close()


class OnEngine:
    """Each test, for one engine."""

    runtime = None
    variable = None

    def start(self, **more):
        where = harness.need(self.variable)
        c = EngineCluster(self.runtime, where, **more)
        self.addCleanup(c.close)
        self.addCleanup(self.look_at_logs, c)
        return c.start()

    def sleeper(self, c, name, *flags):
        self.ok(c, "run", "--name", name, *flags, harness.IMAGE, "--",
                "sleep", "1000")
        return c.task(name)

    def test_a_container_from_run_to_rm(self):
        c = self.start()
        self.ok(c, "run", "--name", "web", "-e", "A=b c", "--memory", "32m",
                "--cpu", "0.5", harness.IMAGE, "--", "sh", "-c",
                "echo out $A; echo err >&2; sleep 1000")
        t = c.task("web")
        got = c.inspect(t["ContainerID"])
        self.assertTrue(got["State"]["Running"])
        self.assertEqual(got["Config"]["Labels"]["cube.task"], t["ID"])
        self.assertEqual(got["HostConfig"]["Memory"], 32 << 20)
        logs = wait_until("both lines", lambda: sorted(
            c.cube("logs", "web")[1].splitlines()) == ["err", "out b c"])
        self.assertTrue(logs)
        said = json.loads(self.ok(c, "inspect", "web"))
        self.assertEqual(said["Container"]["Id"], t["ContainerID"])
        self.assertIn(t["ContainerID"][:12], self.ok(c, "status"))
        self.ok(c, "stop", "web")
        self.assertFalse(any(x["State"] == "running"
                             for x in c.containers(t["ID"])))
        self.ok(c, "rm", "web")
        wait_until("nothing is left", lambda: not c.containers(t["ID"]))

    def test_ports_are_published(self):
        c = self.start()
        port = harness.free_port()
        self.ok(c, "run", "--name", "web", "-p", "%d:80" % port, "-p", "81",
                harness.IMAGE, "--", "sh", "-c", "mkdir w; echo hi > w/x; "
                "httpd -p 81 -h w; httpd -f -p 80 -h w")
        ports = c.task("web")["HostPorts"]
        self.assertEqual(ports["80/tcp"][0]["HostPort"], str(port))
        for number in (port, ports["81/tcp"][0]["HostPort"]):
            url = "http://127.0.0.1:%s/x" % number

            def page(url=url):
                try:
                    return harness.http("GET", url)[2] == "hi\n"
                except (OSError, http.client.HTTPException):
                    return False
            wait_until("the page at " + url, page)

    def test_what_fails_says_why_in_the_words_of_the_engine(self):
        c = self.start()
        rows = [
            (["no-such-registry.invalid/x:1"], "no-such-registry.invalid"),
            ([harness.IMAGE, "--", "/no/such/program"], "/no/such/program"),
        ]
        for argv, words in rows:
            with self.subTest(argv=argv):
                code, out, err = c.cube("run", "--restart", "no", *argv)
                self.assertEqual(code, 1, err)
                self.assertIn(words, err)
                task_id = out.strip()
                self.assertEqual(c.task(task_id)["State"], 4)
                self.assertEqual(
                    [x for x in c.containers(task_id)
                     if x["State"] == "running"], [])

    def test_a_taken_port_is_told(self):
        c = self.start()
        with socket.socket() as s:
            s.bind(("0.0.0.0", 0))
            s.listen()
            port = str(s.getsockname()[1])
            code, _, err = c.cube("run", "--restart", "no", "-p",
                                  port + ":80", harness.IMAGE, "--", "sleep",
                                  "1000")
        self.assertEqual(code, 1, err)
        self.assertIn(port, err)

    def test_exit_codes(self):
        c = self.start()
        for code, state in ((0, 3), (3, 4)):
            name = "exit%d" % code
            c.cube("run", "-d", "--name", name, "--restart", "no",
                   harness.IMAGE, "--", "sh", "-c", "exit %d" % code)
            t = c.wait_for(name, (3, 4), 60)
            self.assertEqual((t["State"], t.get("ExitCode", 0)),
                             (state, code))

    def test_a_task_killed_for_its_memory_says_so(self):
        """Podman on version 1 cgroups cannot tell; Docker hears of it beside
        the end, at times too late, so it has three tries."""
        c = self.start()
        for i in range(3):
            name = "big%d" % i
            self.ok(c, "run", "-d", "--name", name, "--restart", "no",
                    "--memory", "8m", harness.IMAGE, "--", "sh", "-c",
                    "x=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done")
            t = c.wait_for(name, 4, 60)
            self.assertEqual(t["ExitCode"], 137)
            state = c.inspect(t["ContainerID"])["State"]
            self.assertEqual("emory" in t["Error"], state["OOMKilled"])
            if state["OOMKilled"] or self.runtime == "podman":
                return
        self.fail("it never said so")

    def test_a_killed_worker_adopts_its_containers(self):
        c = self.start()
        before = self.sleeper(c, "web")
        c.workers[0].kill(signal.SIGKILL)
        c.start_worker()
        c.wait_for("web", 2)
        self.assertEqual(c.task("web")["ContainerID"], before["ContainerID"])
        self.assertEqual(len(c.containers(before["ID"])), 1)
        self.assertEqual(c.task("web")["RestartCount"], 0)

    def test_a_container_removed_by_hand_is_made_again(self):
        c = self.start()
        before = self.sleeper(c, "web", "--restart", "always")
        c.ask("DELETE", "/containers/%s?force=1" % before["ContainerID"])
        wait_until("another container", lambda: c.task("web")["State"] == 2
                   and c.task("web")["ContainerID"] !=
                   before["ContainerID"], 40)
        self.assertTrue(c.workers[0].is_running())

    def test_two_tasks_of_one_name_both_run(self):
        c = self.start()
        for _ in range(2):
            self.sleeper(c, "twin")
        self.assertEqual([t["State"] for t in c.tasks()], [2, 2])

    def test_an_image_is_pulled_when_it_is_not_there(self):
        registry = harness.need("REGISTRY")
        c = self.start()
        image = registry + "/" + harness.IMAGE
        c.ask("DELETE", "/images/%s?force=1" % image)
        code, _, err = c.cube("run", "--name", "web", image, "--", "sleep",
                              "1000")
        if code and "HTTPS" in err:
            self.skipTest("the engine wants https of this registry")
        self.assertEqual(code, 0, err)
        self.assertEqual(c.task("web")["State"], 2)


class OnDocker(OnEngine, Case):
    runtime, variable = "docker", "DOCKER"


class OnPodman(OnEngine, Case):
    runtime, variable = "podman", "PODMAN"


class Auto(Case):
    """Which runtime `auto` takes, and that it says so."""

    def test_docker_is_taken_first_and_named(self):
        where = harness.need("DOCKER")
        c = Cluster(worker=["-r", "auto"], env={"DOCKER_HOST": where})
        self.addCleanup(c.close)
        c.start()
        self.assertIn("docker", self.ok(c, "node"))
        wait_until("it says so", lambda: "Docker Engine" in
                   c.workers[0].output())

    def test_without_an_engine_tasks_are_processes(self):
        c = Cluster(worker=["-r", "auto"], env={
            "DOCKER_HOST": "unix:///nowhere.sock",
            "CONTAINER_HOST": "unix:///nowhere.sock",
            "XDG_RUNTIME_DIR": "/nowhere"})
        self.addCleanup(c.close)
        c.start()
        if "podman" in self.ok(c, "node"):
            self.skipTest("a podman of this machine's root answers")
        self.assertIn("process", self.ok(c, "node"))
        self.ok(c, "run", "--name", "p", "--", "sleep", "1000")

    def test_an_engine_that_comes_up_after_the_worker_keeps_its_tasks(self):
        """As after a boot: taken for a machine without an engine, it would
        begin the tasks again as processes, and they would soon run twice."""
        engine = harness_engine.Engine(images=["web:1"])
        self.addCleanup(engine.close)
        link = engine.dir + "/link.sock"
        os.symlink(engine.where[7:], link)
        c = Cluster(worker=["-r", "auto"], env={
            "DOCKER_HOST": "unix://" + link,
            "CONTAINER_HOST": "unix:///nowhere.sock",
            "XDG_RUNTIME_DIR": "/nowhere"})
        self.addCleanup(c.close)
        c.start()
        self.ok(c, "run", "--name", "web", "web:1")
        before = [box["Id"] for box in engine.running()]
        c.workers[0].kill(signal.SIGKILL)
        os.unlink(link)
        c.start_worker()
        c.await_log(c.workers[0], "since this worker's tasks run there")
        c.await_log(c.workers[0], "for which we wait")
        os.symlink(engine.where[7:], link)
        self.ok(c, "stop", "web")
        self.assertEqual(engine.containers, {})
        self.assertEqual([e["id"] for e in engine.events
                          if e["Action"] == "start"], before)


if __name__ == "__main__":
    harness.main()
