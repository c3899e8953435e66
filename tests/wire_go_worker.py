"""Mixed clusters: our manager drives workers of the Go implementation.

It knows no events, no attempts and no commands; it is polled, told of a
restart by the same task again, and its orders wait in a queue for up to ten
seconds each. It is replayed by harness_go.py; our side is the built program.
"""

import json
import signal
import uuid

import harness
import harness_go as go
from cli_cluster import Cluster, Case, processes_in
from harness import wait_until

TASK_KEYS = list(go.TASK)


class GoWorker(Case):
    """Our manager finds that GET /events is not known there, and polls."""

    def go_cluster(self, tick=0.1, ours=0, manager=(), count=1):
        """`count` workers of the Go program beside `ours` of Cube."""
        c = Cluster(ours, manager=manager)
        self.go = [go.Worker(tick=tick) for _ in range(count)]
        for w in self.go:
            self.addCleanup(w.close)
        self.addCleanup(c.close)
        self.addCleanup(self.look_at_logs, c)
        names = [w.name for w in self.go]
        c.names = lambda: names + ["127.0.0.1:%d" % p for p in c.ports]
        for i in range(ours):
            c.start_worker(i)
        c.start_manager()
        wait_until("all nodes are up", lambda: len(self.up(c)) ==
                   count + ours and all(n["Memory"] for n in self.up(c)))
        return c

    @staticmethod
    def up(c):
        return [n for n in harness.get(c.url + "/nodes")
                if n["State"] == "up"]

    def submit(self, c, **fields):
        """A task, for which a Go worker needs an image and no command."""
        fields = dict({"Image": "echo:latest", "Name": "lm-echo"}, **fields)
        status, _, body = harness.http("POST", c.url + "/tasks",
                                       {"State": 2, "Task": fields})
        self.assertEqual(status, 201, body)
        return json.loads(body)["ID"]

    @staticmethod
    def wait_for_start(c, task_id, restarts):
        """Until it runs, and was restarted so many times."""
        def look():
            t = c.task(task_id)
            return (t["State"], t["RestartCount"]) == (go.RUNNING, restarts)
        wait_until("start %d of %s" % (restarts, task_id), look)

    def sick_fields(self):
        return {"HealthCheck": "/health", "ExposedPorts": {"7777/tcp": {}},
                "HealthStart": 100, "HealthInterval": 100,
                "HealthRetries": 2, "HealthTimeout": 1000}

    def test_it_becomes_a_node(self):
        c = self.go_cluster()
        n = wait_until("its stats", lambda: [
            n for n in self.up(c) if n["Memory"]])[0]
        self.assertEqual(list(n)[:10], go.NODE)
        self.assertEqual(
            {k: n[k] for k in go.NODE if k != "Stats"},
            {"Name": self.go[0].name, "Ip": "",
             "Api": "http://" + self.go[0].name, "Memory": 24684096,
             "MemoryAllocated": 0, "Disk": 270553174016, "DiskAllocated": 0,
             "Role": "worker", "TaskCount": 0})
        self.assertEqual(n["Stats"]["MemStats"], go.stats()["MemStats"])

    def test_a_task_is_delivered_once_and_seen_running(self):
        c = self.go_cluster()
        task_id = self.submit(c, RestartPolicy="no", Memory=8 << 20)
        got = c.wait_for(task_id, go.RUNNING)
        post, = self.go[0].posts
        self.assertEqual(list(post["Task"])[:16], TASK_KEYS)
        self.assertEqual((post["State"], post["Task"]["State"],
                          post["Task"]["ContainerID"]),
                         (go.RUNNING, go.SCHEDULED, ""))
        uuid.UUID(post["ID"])
        at, = self.go[0].containers
        self.assertEqual(got["ContainerID"], at)
        self.assertEqual(got["Node"], self.go[0].name)
        self.assertNotEqual(got["StartTime"], go.UNSET)
        n, = self.up(c)
        self.assertEqual((n["TaskCount"], n["MemoryAllocated"]), (1, 8192))

    def test_a_worker_that_takes_its_time_is_not_told_twice(self):
        """It takes one order from its queue in ten seconds (here three), and
        lists nothing of it before: more than one of our polls."""
        c = self.go_cluster(tick=3)
        ids = [self.submit(c, Name="t%d" % i) for i in range(3)]
        for task_id in ids:
            c.wait_for(task_id, go.RUNNING, 25)
        self.assertEqual(sorted(p["Task"]["ID"] for p in self.go[0].posts),
                         sorted(ids))
        self.assertEqual(self.go[0].most, 1)

    def test_ports_arrive_with_the_health_check_on_the_lowest(self):
        c = self.go_cluster()
        task_id = self.submit(c, **self.sick_fields())
        got = c.wait_for(task_id, go.RUNNING)
        self.assertEqual(got["HostPorts"]["7777/tcp"][0],
                         {"HostIp": "0.0.0.0",
                          "HostPort": str(self.go[0].page.server_port)})
        wait_until("checks", lambda: len(self.go[0].page.paths) >= 3)
        self.assertEqual(set(self.go[0].page.paths), {"/health"})
        self.assertEqual(len(self.go[0].posts), 1)

    def test_a_sick_task_is_restarted_three_times_and_then_given_up(self):
        c = self.go_cluster()
        w = self.go[0]
        task_id = self.submit(c, **self.sick_fields())
        c.wait_for(task_id, go.RUNNING)
        w.page.is_well = False
        got = c.wait_for(task_id, go.FAILED, 60)
        self.assertEqual(got["RestartCount"], 3)
        self.assertIn("health check GET /health", got["Error"])
        self.assert_posted_again(3)
        wait_until("the sick one is stopped", lambda: not w.containers)
        go.holds(lambda: len(w.posts) == 4 and c.task(task_id) is not None)

    def assert_posted_again(self, times):
        """The first order, and `times` restarts: the same ID, with the
        container that is to go, and counted."""
        posts = [p["Task"] for p in self.go[0].posts]
        self.assertEqual([p["RestartCount"] for p in posts],
                         list(range(times + 1)))
        self.assertEqual(len({p["ID"] for p in posts}), 1)
        self.assertEqual({p["State"] for p in posts}, {go.SCHEDULED})
        self.assertEqual([p["ContainerID"] != "" for p in posts],
                         [False] + [True] * times)
        self.assertEqual(self.go[0].most, 1)

    def test_a_task_that_is_well_again_is_not_restarted_for_old_faults(self):
        c = self.go_cluster()
        w = self.go[0]
        task_id = self.submit(c, **self.sick_fields())
        c.wait_for(task_id, go.RUNNING)
        w.page.is_well = False
        wait_until("a restart", lambda: len(w.posts) == 2)
        w.page.is_well = True
        self.wait_for_start(c, task_id, 1)
        seen = len(w.page.paths)
        wait_until("it is checked", lambda: len(w.page.paths) > seen + 3)
        self.assertEqual(len(w.posts), 2)

    def test_a_failed_container_is_restarted_by_posting_it_again(self):
        c = self.go_cluster()
        w = self.go[0]
        task_id = self.submit(c)
        for count in range(4):
            self.wait_for_start(c, task_id, count)
            w.exit(task_id)
        got = c.wait_for(task_id, go.FAILED)
        self.assertTrue(got["Error"])
        self.assertNotEqual(got["FinishTime"], go.UNSET)
        self.assert_posted_again(3)
        go.holds(lambda: c.task(task_id)["State"] == go.FAILED)

    def test_a_slow_worker_is_not_told_twice_to_restart_either(self):
        c = self.go_cluster(tick=3)
        w = self.go[0]
        task_id = self.submit(c)
        c.wait_for(task_id, go.RUNNING)
        w.exit(task_id)
        self.wait_for_start(c, task_id, 1)
        self.assert_posted_again(1)

    def test_restart_policies_hold_there_too(self):
        for policy, posts in (("no", 1), ("always", 6)):
            with self.subTest(policy=policy):
                c = self.go_cluster()
                w = self.go[0]
                task_id = self.submit(c, RestartPolicy=policy)
                c.wait_for(task_id, go.RUNNING)
                for count in range(1, posts + 1):
                    w.exit(task_id)
                    if count < posts:
                        wait_until("start %d" % count,
                                   lambda n=count: len(w.posts) > n and
                                   w.tasks()[0]["State"] == go.RUNNING)
                if policy == "no":
                    c.wait_for(task_id, go.FAILED)
                self.assertEqual(len(w.posts), posts)

    def test_a_container_that_does_not_start_fails(self):
        c = self.go_cluster()
        self.go[0].breaks.add("lm-nosuch")
        task_id = self.submit(c, Name="lm-nosuch", RestartPolicy="no",
                              Image="127.0.0.1:5000/nosuch:latest")
        got = c.wait_for(task_id, go.FAILED)
        self.assertTrue(got["Error"])
        self.assertNotEqual(got["FinishTime"], go.UNSET)
        go.holds(lambda: c.task(task_id) is not None)

    def test_stop_is_a_delete_and_true_when_the_worker_says_so(self):
        c = self.go_cluster(tick=1)
        w = self.go[0]
        task_id = self.submit(c)
        c.wait_for(task_id, go.RUNNING)
        self.assertEqual(c.cube("stop", "lm-echo")[0], 0)
        self.assertEqual(set(w.deletes), {task_id})
        self.assertEqual(w.containers, {})
        got = c.task(task_id)
        self.assertEqual(got["State"], go.COMPLETED)
        self.assertNotEqual(got["FinishTime"], go.UNSET)
        self.assertEqual(len(w.posts), 1)

    def test_a_stop_right_after_the_start_reaches_a_slow_worker(self):
        """It answers 404 as long as the order is in its queue, and then runs
        it: the stop must not be forgotten."""
        c = self.go_cluster(tick=2)
        w = self.go[0]
        first, second = self.submit(c, Name="a"), self.submit(c, Name="b")
        wait_until("both are delivered", lambda: len(w.posts) == 2)
        for task_id in (first, second):
            self.assertEqual(harness.http("DELETE", c.url + "/tasks/" +
                                          task_id)[0], 204)
        wait_until("the queue is empty and nothing runs",
                   lambda: not w.queue and w.db.keys() >= {first, second}
                   and not w.containers, 40)
        for task_id in (first, second):
            c.wait_for(task_id, go.COMPLETED)
        wait_until("nothing runs in the end", lambda: not w.containers)

    def test_what_was_removed_is_not_asked_for_again(self):
        c = self.go_cluster()
        w = self.go[0]
        task_id = self.submit(c)
        c.wait_for(task_id, go.RUNNING)
        self.assertEqual(c.cube("stop", task_id)[0], 0)
        self.assertEqual(c.cube("rm", task_id)[0], 0)
        self.assertEqual(c.tasks(), [])
        polls, deletes = w.polls, len(w.deletes)
        wait_until("two polls", lambda: w.polls >= polls + 2)
        self.assertLessEqual(len(w.deletes), deletes + 1)
        self.assertEqual(c.tasks(), [])

    def test_a_restart_of_the_manager_changes_nothing_there(self):
        c = self.go_cluster()
        w = self.go[0]
        task_id = self.submit(c)
        before = c.wait_for(task_id, go.RUNNING)
        c.manager.kill(signal.SIGKILL)
        c.start_manager()
        polls = w.polls
        wait_until("three polls", lambda: w.polls >= polls + 3)
        got = c.task(task_id)
        for key in ("State", "ContainerID", "Node", "StartTime"):
            self.assertEqual(got[key], before[key])
        self.assertEqual((len(w.posts), w.deletes), (1, []))
        self.assertEqual(c.cube("stop", task_id)[0], 0)
        self.assertEqual(w.containers, {})

    def test_a_manager_that_lost_its_store_adopts_what_runs(self):
        c = self.go_cluster(manager=["-d", "memory"])
        task_id = self.submit(c)
        c.wait_for(task_id, go.RUNNING)
        c.manager.kill(signal.SIGKILL)
        c.start_manager()
        c.wait_for(task_id, go.RUNNING)
        self.assertEqual(len(self.go[0].posts), 1)
        self.assertEqual(c.cube("stop", task_id)[0], 0)
        self.assertEqual(self.go[0].containers, {})

    def test_its_tasks_move_when_it_is_lost_and_it_stops_them_when_back(self):
        c = self.go_cluster(count=2)
        task_id = self.submit(c)
        node = c.wait_for(task_id, go.RUNNING)["Node"]
        lost, other = self.go if node == self.go[0].name else self.go[::-1]
        lost.vanish()
        wait_until("it is lost", lambda: len(self.up(c)) == 1)
        wait_until("it moves", lambda: c.task(task_id)["Node"] ==
                   other.name and c.task(task_id)["State"] == go.RUNNING)
        self.assertEqual(len(lost.containers), 1)
        lost.listen()
        wait_until("the first copy is stopped", lambda: not lost.containers)
        self.assertEqual(lost.deletes[0], task_id)
        got = c.task(task_id)
        self.assertEqual((got["Node"], got["State"]),
                         (other.name, go.RUNNING))
        self.assertEqual(len(other.containers), 1)

    def test_a_worker_that_comes_back_in_time_keeps_its_tasks(self):
        c = self.go_cluster(manager=["--lost-after", "60s"])
        w = self.go[0]
        task_id = self.submit(c)
        c.wait_for(task_id, go.RUNNING)
        w.vanish()
        w.listen()
        polls = w.polls
        wait_until("three polls", lambda: w.polls >= polls + 3)
        self.assertEqual(c.task(task_id)["State"], go.RUNNING)
        self.assertEqual((len(w.posts), w.deletes), (1, []))

    def test_a_worker_that_hangs_is_lost_too(self):
        c = self.go_cluster()
        with self.go[0].lock:  # all its answers wait for this
            wait_until("it is lost", lambda: not self.up(c), 30)
        wait_until("it is back", lambda: self.up(c), 30)

    def test_one_of_theirs_and_one_of_ours_share_the_tasks(self):
        c = self.go_cluster(ours=1, manager=["-s", "roundrobin"])
        ids = [self.submit(c, Name="t%d" % i, Cmd=["/bin/sleep", "1000"])
               for i in range(6)]
        for task_id in ids:
            c.wait_for(task_id, go.RUNNING)
        nodes = [c.task(i)["Node"] for i in ids]
        self.assertEqual({nodes.count(n) for n in c.names()}, {3}, nodes)
        self.assertEqual(c.cube("stop", *ids)[0], 0)
        self.assertEqual(processes_in(c.dir), [])
        self.assertEqual(self.go[0].containers, {})


if __name__ == "__main__":
    harness.main(jobs=5)
