"""Mixed clusters: Cube beside the Go implementation of Cube.

    GoManager      its manager drives our worker
    GoCommandLine  its command line talks to our manager
    (wire_go_worker.py: our manager drives its worker)

The Go side is replayed: what it sends, byte for byte, and what it makes of
the answers (harness_go.py). Our side is the built program.
"""

import json
import os
import re
import uuid

import harness
import harness_go as go
from cli_cluster import Cluster, Case, is_alive, processes_in
from harness import wait_until

TASK_KEYS = list(go.TASK)


def members(text):
    """The keys of a JSON object, in the order in which they are sent."""
    return [k for k, _ in json.loads(text, object_pairs_hook=list)]


class GoManager(Case):
    """A manager of the Go program posts tasks to our worker, polls it every
    few seconds, counts restarts itself, and stops tasks by DELETE.

    Its tasks have no Cmd, since it knows no such field: on an engine the
    image has one. Here, without an engine, Cmd stands in for the image.
    """

    def setUp(self):
        self.c = Cluster()
        self.addCleanup(self.c.close)
        self.addCleanup(self.look_at_logs, self.c)
        self.c.start_worker()
        self.go = go.Caller(self.c.ports[0])
        self.addCleanup(self.go.close)

    def shell(self, script, **fields):
        return go.task(Cmd=["/bin/sh", "-c", script], **fields)

    def post(self, task):
        status, headers, body = self.go.call("POST", "/tasks",
                                             go.event(task))
        self.assertEqual(status, 201, body)
        self.assertEqual(headers["Content-Type"], "application/json")
        return json.loads(body)

    def poll(self, task):
        """What its 15-second loop reads of this task."""
        found = [t for t in self.go.get("/tasks") if t["ID"] == task["ID"]]
        self.assertEqual(len(found), 1)
        return found[0]

    def wait_for(self, task, state):
        def look():
            t = self.poll(task)
            return t if t["State"] == state else None
        return wait_until("state %d of %s" % (state, self.poll(task)), look)

    def refused(self, body, words, **more):
        status, headers, answer = self.go.call("POST", "/tasks", body, **more)
        self.assertEqual(status, 400, (body, answer))
        self.assertEqual(headers["Content-Type"], "application/json")
        self.assertTrue(answer.startswith(b'{"HTTPStatusCode":400,'
                                          b'"Message":"'), answer)
        self.assertTrue(answer.endswith(b'"}\n'), answer)
        self.assertIn(words.encode(), answer)

    # A task's life

    def test_a_task_is_delivered_and_runs(self):
        t = self.shell("exec sleep 1000", Name="lm-echo", Image="echo:latest")
        answer = self.post(t)
        self.assertEqual((answer["ID"], answer["State"]),
                         (t["ID"], go.SCHEDULED))
        got = self.wait_for(t, go.RUNNING)
        self.assertEqual(len(processes_in(self.c.dir)) > 0, True)
        self.assertTrue(got["ContainerID"])
        self.assertEqual(got["HostPorts"], {})
        self.assertEqual(got["RestartCount"], 0)
        self.assertNotEqual(got["StartTime"], go.UNSET)
        self.assertEqual(got["FinishTime"], go.UNSET)

    def test_the_answer_is_byte_for_byte_the_task(self):
        """The 16 fields first and in order, compact, one newline; Cube's own
        only where they are set."""
        t = self.shell("exec sleep 1000", Name="a", Image="b:latest",
                       Cpu=0.5, Memory=8 << 20, HealthCheck="/h?a=1&b=<2>",
                       ExposedPorts={"80/tcp": {}, "443/tcp": {}},
                       StartTime="2025-03-01T10:11:12.120000000+02:00",
                       RestartCount=2)
        body = self.go.call("POST", "/tasks", go.event(t))[2]
        want = (
            '{"ID":"%s","ContainerID":"","Name":"a","State":1,"Image":'
            '"b:latest","Cpu":0.5,"Memory":8388608,"Disk":0,"HostPorts":null,'
            '"ExposedPorts":{"443/tcp":{},"80/tcp":{}},"PortBindings":null,'
            '"RestartPolicy":"","StartTime":"2025-03-01T10:11:12.12+02:00",'
            '"FinishTime":"0001-01-01T00:00:00Z","HealthCheck":'
            '"/h?a=1\\u0026b=\\u003c2\\u003e","RestartCount":2,"Cmd":'
            '["/bin/sh","-c","exec sleep 1000"]' % t["ID"])
        self.assertEqual(body[:len(want)].decode(), want)
        self.assertTrue(body.endswith(b"}\n"))
        self.assertEqual(body.count(b"\n"), 1)
        raw = self.go.call("GET", "/tasks")[2]
        self.assertTrue(raw.startswith(b'[{"ID":"') and
                        raw.endswith(b"}]\n"), raw)
        self.assertEqual(members(raw[1:-2])[:16], TASK_KEYS)

    def test_it_restarts_by_the_same_id_with_its_container(self):
        t = self.shell("echo $$; exec sleep 1000")
        self.post(t)
        first = self.wait_for(t, go.RUNNING)
        pids = processes_in(self.c.dir)
        again = dict(t, State=go.SCHEDULED, RestartCount=1,
                     ContainerID=first["ContainerID"])
        self.assertEqual(self.post(again)["State"], go.SCHEDULED)
        second = wait_until("another container", lambda: self.another(
            t, first["ContainerID"]))
        self.assertEqual(second["RestartCount"], 1)
        wait_until("the first one's end", lambda: not any(
            is_alive(p) for p in pids))
        self.assertEqual(len(self.go.get("/tasks")), 1)

    def another(self, task, container):
        t = self.poll(task)
        return t if t["State"] == go.RUNNING and \
            t["ContainerID"] != container else None

    def test_a_failure_is_told_and_left_to_the_manager(self):
        t = self.shell("exit 3")
        self.post(t)
        got = self.wait_for(t, go.FAILED)
        self.assertNotEqual(got["FinishTime"], go.UNSET)
        go.holds(lambda: self.poll(t)["State"] == go.FAILED)
        self.post(dict(t, Cmd=["/bin/sleep", "1000"], RestartCount=1,
                       ContainerID=got["ContainerID"]))
        self.assertEqual(self.wait_for(t, go.RUNNING)["RestartCount"], 1)

    def test_a_sick_task_is_left_to_the_manager_as_well(self):
        t = self.shell("exec sleep 1000", HealthCheck="/health",
                       ExposedPorts={"80/tcp": {}}, HealthStart=1,
                       HealthInterval=100, HealthRetries=1)
        self.post(t)
        got = self.wait_for(t, go.RUNNING)
        go.holds(lambda: self.poll(t)["ContainerID"] == got["ContainerID"] and
              self.poll(t)["State"] == go.RUNNING)

    def test_exit_code_0_is_completed(self):
        t = self.shell("exit 0")
        self.post(t)
        self.wait_for(t, go.COMPLETED)

    def test_it_stops_by_delete(self):
        t = self.shell("exec sleep 1000")
        self.post(t)
        self.wait_for(t, go.RUNNING)
        status, headers, body = self.go.call("DELETE", "/tasks/" + t["ID"])
        self.assertEqual((status, body), (204, b""))
        self.assertIsNone(headers["Content-Type"])
        got = self.wait_for(t, go.COMPLETED)
        self.assertNotEqual(got["FinishTime"], go.UNSET)
        self.assertEqual(processes_in(self.c.dir), [])
        self.assertEqual(self.go.call("DELETE", "/tasks/" + t["ID"])[0], 204)

    def test_state_3_in_a_delivery_stops_too(self):
        t = self.shell("exec sleep 1000")
        self.post(t)
        self.wait_for(t, go.RUNNING)
        self.post(dict(t, State=go.COMPLETED))
        self.wait_for(t, go.COMPLETED)

    def test_what_is_unknown_is_404_without_a_body(self):
        for name in (str(uuid.uuid4()), "nonsense", "%20", "0"):
            status, _, body = self.go.call("DELETE", "/tasks/" + name)
            self.assertEqual((status, body), (404, b""), name)
        self.assertEqual(self.go.call("GET", "/tasks/" +
                                      str(uuid.uuid4()))[0], 404)

    def test_a_stopped_task_may_be_posted_again(self):
        t = self.shell("exec sleep 1000")
        self.post(t)
        self.wait_for(t, go.RUNNING)
        self.go.call("DELETE", "/tasks/" + t["ID"])
        got = self.wait_for(t, go.COMPLETED)
        self.post(dict(t, ContainerID=got["ContainerID"]))
        self.wait_for(t, go.RUNNING)

    def test_a_restart_of_our_worker_loses_none_of_it(self):
        t = self.shell("exec sleep 1000")
        self.post(t)
        first = self.wait_for(t, go.RUNNING)
        pids = processes_in(self.c.dir)
        self.c.workers[0].kill()
        self.c.start_worker()
        self.go.close()
        got = self.wait_for(t, go.RUNNING)
        self.assertEqual(got["ContainerID"], first["ContainerID"])
        self.assertTrue(all(is_alive(p) for p in pids))
        self.go.call("DELETE", "/tasks/" + t["ID"])
        self.wait_for(t, go.COMPLETED)

    def test_the_inspection_of_a_task(self):
        t = self.shell("exec sleep 1000")
        self.post(t)
        self.wait_for(t, go.RUNNING)
        got = self.go.get("/tasks/" + t["ID"])
        self.assertTrue(got["State"]["Running"])

    def test_on_docker_the_image_knows_what_to_run(self):
        harness.need("DOCKER")
        self.c.workers[0].kill()
        self.c.start_worker(0, "-r", "docker")
        self.go.close()
        t = go.task(Name="wire-go", Image=harness.IMAGE,
                    ExposedPorts={"7777/tcp": {}},
                    PortBindings={"7777/tcp": str(harness.free_port())})
        self.post(t)  # a shell without input ends at once, and well
        got = self.wait_for(t, go.COMPLETED)
        self.assertRegex(got["ContainerID"], "^[0-9a-f]{64}$")
        self.post(dict(t, ContainerID=got["ContainerID"], RestartCount=1,
                       Cmd=["sleep", "1000"], StopGrace=100))
        got = self.wait_for(t, go.RUNNING)
        self.assertEqual(got["HostPorts"]["7777/tcp"][0]["HostPort"],
                         t["PortBindings"]["7777/tcp"])
        self.assertEqual(self.go.call("DELETE", "/tasks/" + t["ID"])[0], 204)
        self.wait_for(t, go.COMPLETED)

    # What is accepted, and what is not

    def test_bad_bodies_are_400_with_the_reason(self):
        t = self.shell("true")
        for body, words in (
                (b"", ""), (b"{", ""), (b"[]", ""), (b"null", "Task"),
                (b"{}", "Task"), (b'{"Task":null}', "Task"),
                (go.event(None), "Task"), (go.event([]), "Task"),
                (go.event(dict(t, ID="")), "ID"),
                (go.event(dict(t, ID="zzz")), "ID"),
                (go.event(dict(t, State=7)), "State"),
                (go.event(dict(t, State="1")), "State"),
                (go.event(dict(t, Memory=-1)), "Memory"),
                (go.event(dict(t, Cpu="a")), "Cpu"),
                (go.event(dict(t, ExposedPorts={"x": {}})), "ExposedPorts"),
                (go.event(dict(t, StartTime="today")), "StartTime"),
                (go.text(go.event(t))[:-9], ""),
                (go.text(go.event(t)) + b"x", "")):
            with self.subTest(body=body):
                self.refused(body, words)
        self.assertEqual(self.go.call("GET", "/tasks")[2], b"[]\n")

    def test_a_worker_accepts_fields_that_it_does_not_know(self):
        t = self.shell("exec sleep 1000", Colour="blue", Deep=[[{}]])
        status, _, body = self.go.call("POST", "/tasks", dict(
            go.event(t), Extra={"a": [1, None]}))
        self.assertEqual(status, 201)
        self.assertNotIn(b"Colour", body)

    def test_keys_match_in_any_case_the_last_one_wins_null_is_nothing(self):
        name = uuid.uuid4()
        body = ('{"state":2,"task":{"NAME":"first","name":"second","Name":'
                'null,"iD":"%s","id":null,"image":"a:b","STATE":1,"cmd":'
                '["/bin/sleep","1000"],"Cpu":null,"hostports":null}}' % name)
        status, _, answer = self.go.call("POST", "/tasks", body.encode())
        self.assertEqual(status, 201, answer)
        got = json.loads(answer)
        self.assertEqual((got["ID"], got["Name"], got["Cpu"]),
                         (str(name), "second", 0))

    def test_a_uuid_comes_in_four_forms_and_leaves_in_one(self):
        for form in ("%s", "urn:uuid:%s", "{%s}", "hex", "upper"):
            name = uuid.uuid4()
            sent = name.hex if form == "hex" else str(name).upper() \
                if form == "upper" else form % name
            got = self.post(self.shell("exec sleep 1000") | {"ID": sent})
            self.assertEqual(got["ID"], str(name), form)
            self.assertEqual(self.go.call("DELETE", "/tasks/%s" % name)[0],
                             204)

    def test_the_content_type_does_not_matter(self):
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            status, _, body = self.go.call(
                "POST", "/tasks", go.event(self.shell("true")),
                {"Content-Type": kind})
            self.assertEqual(status, 201, body)

    def test_a_body_in_chunks(self):
        t = self.shell("exec sleep 1000", Env=["A=" + "x" * 5000])
        status, _, body = self.go.call("POST", "/tasks", go.event(t),
                                       is_chunked=True)
        self.assertEqual(status, 201, body)
        self.assertEqual(json.loads(body)["Env"], t["Env"])

    def test_bad_text_becomes_the_replacement_character(self):
        t = self.shell("true", HealthCheck="/X")
        body = go.text(go.event(t))
        for sent, kept in ((rb"\ud800", "\ufffd"), (b"\xff", "\ufffd"),
                           (rb"\u2028", r"\u2028"), (rb"a\/b", "a/b")):
            t = dict(t, ID=str(uuid.uuid4()))
            body = go.text(go.event(t)).replace(b"/X", b"/" + sent)
            status, _, answer = self.go.call("POST", "/tasks", body)
            if status == 400:  # a path that no server is asked for
                self.assertIn(b"HealthCheck", answer, sent)
            else:
                self.assertIn('"HealthCheck":"/%s"' % kept, answer.decode())

    # Routes

    def test_a_trailing_slash_changes_nothing(self):
        t = self.shell("exec sleep 1000")
        self.assertEqual(self.go.call("POST", "/tasks/", go.event(t))[0], 201)
        self.wait_for(t, go.RUNNING)
        self.assertEqual(len(self.go.get("/tasks/")), 1)
        self.assertIn("MemStats", self.go.get("/stats/"))
        self.assertEqual(self.go.call("DELETE", "/tasks/%s/" % t["ID"])[0],
                         204)

    def test_an_unknown_route_is_404_a_wrong_method_405(self):
        for path in ("/", "/nodes", "/task", "/tasks/a/b/c", "/Stats"):
            self.assertEqual(self.go.call("GET", path)[0], 404, path)
        for method, path, allowed in (
                ("PUT", "/tasks", {"GET", "POST"}),
                ("DELETE", "/tasks", {"GET", "POST"}),
                ("POST", "/stats", {"GET"}),
                ("PATCH", "/tasks/" + str(uuid.uuid4()),
                 {"GET", "DELETE"})):
            status, headers, _ = self.go.call(method, path, b"{}")
            self.assertEqual(status, 405, (method, path))
            allow = set(re.split(r",\s*", headers["Allow"]))
            self.assertLessEqual(allowed, allow)
            self.assertNotIn(method, allow)

    def test_a_connection_is_kept_and_nothing_is_zipped(self):
        self.go.get("/stats")
        at = self.go.connection.sock.getsockname()
        for i in range(300):
            status, headers, _ = self.go.call(
                "GET", ("/tasks", "/stats", "/nothing")[i % 3])
            self.assertIn(status, (200, 404))
            self.assertIsNone(headers["Content-Encoding"])
        self.assertEqual(self.go.connection.sock.getsockname(), at)

    def test_an_empty_list_is_a_list(self):
        self.assertEqual(self.go.call("GET", "/tasks")[2], b"[]\n")

    def test_a_long_list_comes_whole(self):
        made = [self.post(self.shell("true"))["ID"] for _ in range(30)]
        self.assertEqual([t["ID"] for t in self.go.get("/tasks")], made)

    def test_stats_have_its_keys_in_its_order(self):
        raw = self.go.call("GET", "/stats")[2]
        got = json.loads(raw)
        self.assertEqual(members(raw)[:5], list(go.STATS) + ["TaskCount"])
        for group, keys in go.STATS.items():
            self.assertEqual(list(got[group]), keys)
        self.assertEqual(raw[:26], b'{"MemStats":{"mem_total":%d' %
                         got["MemStats"]["mem_total"]
                         if got["MemStats"]["mem_total"] < 10 else raw[:26])
        self.assertTrue(raw.endswith(b"}\n"))
        with open("/proc/meminfo", encoding="ascii") as f:
            total = int(f.readline().split()[1])
        self.assertEqual(got["MemStats"]["mem_total"], total)
        self.assertEqual(got["CpuStats"]["id"], "cpu")
        disk = got["DiskStats"]
        self.assertEqual(disk["used"], disk["all"] - disk["free"])
        at = os.statvfs("/")
        self.assertEqual(disk["all"], at.f_blocks * at.f_bsize)
        for group, keys in go.STATS.items():
            for key in keys:
                kind = str if key == "id" else float \
                    if key.startswith("last") and key != "last_pid" else int
                value = got[group][key]
                self.assertIsInstance(value, (int, float) if kind is float
                                      else kind, key)

    def test_the_task_count_rises_and_falls(self):
        t = self.shell("exec sleep 1000")
        self.post(t)
        wait_until("one", lambda: self.go.get("/stats")["TaskCount"] == 1)
        self.wait_for(t, go.RUNNING)
        self.go.call("DELETE", "/tasks/" + t["ID"])
        wait_until("none", lambda: self.go.get("/stats")["TaskCount"] == 0)


class GoCommandLine(Case):
    """run, status, node and stop of the Go program, as requests."""

    FILE = """{
    "ID": "6be4cb6b-61d1-40cb-bc7b-9cacefefa60c",
    "State": 2,
    "Task": {
        "State": 1,
        "ID": "21b23589-5d2d-4731-b5c9-a97e9832d021",
        "Name": "test-chapter-9.1",
        "Image": "timboring/echo-server:latest",
        "ExposedPorts": {"7777/tcp": {}},
        "PortBindings": {"7777/tcp": "%d"},
        "HealthCheck": "/health"%s
    }
}
"""
    ID = "21b23589-5d2d-4731-b5c9-a97e9832d021"

    def setUp(self):
        self.c = self.cluster()
        self.go = go.Caller(self.c.port)
        self.addCleanup(self.go.close)

    def run_file(self, more=""):
        """run -f: the file's bytes, as they are."""
        return self.go.call("POST", "/tasks", (
            self.FILE % (harness.free_port(), more)).encode())

    def test_run_status_stop(self):
        status, headers, body = self.run_file(
            ', "Cmd": ["/bin/sleep", "1000"]')
        self.assertEqual((status, headers["Content-Type"]),
                         (201, "application/json"), body)
        got = json.loads(body)
        self.assertEqual(members(body)[:16], TASK_KEYS)
        self.assertEqual((got["ID"], got["State"]), (self.ID, go.SCHEDULED))
        self.c.wait_for(self.ID, go.RUNNING)
        raw = self.go.call("GET", "/tasks")[2]
        self.assertEqual(members(raw.strip()[1:-1])[:16], TASK_KEYS)
        status, _, body = self.go.call("DELETE", "/tasks/" + self.ID)
        self.assertEqual((status, body), (204, b""))
        self.c.wait_for(self.ID, go.COMPLETED)

    def test_its_file_is_accepted_as_it_is_and_told_what_is_missing(self):
        """Without an engine there is no image to take a command from."""
        self.assertEqual(self.run_file()[0], 201)
        wait_until("the reason", lambda: "Cmd" in self.c.task(self.ID).get(
            "Error", ""))

    def test_a_field_that_nobody_knows_is_400(self):
        status, _, body = self.run_file(', "Colour": "blue"')
        self.assertEqual(status, 400)
        self.assertTrue(body.startswith(b'{"HTTPStatusCode":400,"Message":"'))
        self.assertIn(b"Colour", body)
        self.assertEqual(self.go.call("GET", "/tasks")[2], b"[]\n")

    def test_node(self):
        wait_until("its stats", lambda: self.go.get("/nodes")[0]["Memory"])
        raw = self.go.call("GET", "/nodes")[2]
        node = json.loads(raw)[0]
        self.assertEqual(list(node)[:10], go.NODE)
        self.assertEqual(list(node["Stats"])[:5],
                         list(go.STATS) + ["TaskCount"])
        for group, keys in go.STATS.items():
            self.assertEqual(list(node["Stats"][group]), keys)
        self.assertEqual(node["Name"], self.c.names()[0])
        self.assertEqual(node["Api"], "http://" + self.c.names()[0])
        self.assertEqual(node["Role"], "worker")
        self.assertTrue(raw.endswith(b"]\n"))

    def test_stop_of_what_is_unknown_is_404(self):
        for name in (str(uuid.uuid4()), "nonsense"):
            status, _, body = self.go.call("DELETE", "/tasks/" + name)
            self.assertEqual((status, body), (404, b""))

    def test_it_goes_through_on_one_kept_connection(self):
        self.go.get("/nodes")
        at = self.go.connection.sock.getsockname()
        for _ in range(50):
            self.go.get("/tasks/")
            self.go.get("/nodes/")
        self.assertEqual(self.go.connection.sock.getsockname(), at)


if __name__ == "__main__":
    harness.main()
