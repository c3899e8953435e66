"""A manager whose disk is full, for real: a small tmpfs that fills up and gets
room again. It answers 507 with words, goes on answering questions, its tasks
run on, it does not fill its log; and it takes writes again by itself.
"""

import json
import os
import subprocess
import time

import harness
from cli_cluster import Case as ClusterCase
from cli_cluster import Cluster, is_alive
from harness import wait_until
from harness_go import COMPLETED, RUNNING


class FullDisk(ClusterCase):
    def setUp(self):
        self.c = Cluster()
        self.addCleanup(self.c.close)
        self.addCleanup(self.look_at_logs, self.c)
        self.disk = self.c.dir + "/m"
        os.mkdir(self.disk)
        got = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m",
                              "cube-test", self.disk], capture_output=True,
                             check=False)
        if got.returncode != 0:
            self.skipTest("a tmpfs cannot be mounted: " +
                          got.stderr.decode().strip())
        self.addCleanup(subprocess.run, ["umount", "-l", self.disk],
                        check=False)

    def post(self, **task):
        """POST /tasks with these fields: the status and the answer."""
        got, _, body = harness.http("POST", self.c.url + "/tasks",
                                    {"State": 2, "Task": task})
        return got, json.loads(body)

    def fill(self):
        """All of the room, and what the manager had laid out for itself."""
        with open(self.disk + "/filler", "ab", buffering=0) as f:
            try:
                while f.write(b"x" * 4096) == 4096:
                    pass
            except OSError:
                pass
        for pad in 8000, 1000, 0:
            status = 201
            while status == 201:
                status, answer = self.post(Name="t" + "x" * pad, Cmd=["true"])
        return status, answer

    def complaints(self):
        return self.c.manager.output().count("commit:")

    def test_it_answers_507_reads_go_on_and_it_writes_again_with_room(self):
        c = self.c.start()
        pid = self.run_pid(c, "sleeper")
        short = self.run_pid(c, "short", "--restart", "no")
        status, answer = self.fill()
        self.assertEqual(status, 507, answer)
        self.assertRegex(answer["Message"], "(?i)no space left on device")
        self.assertIn("manager.cube", answer["Message"])
        self.assertEqual(c.task("sleeper")["State"], RUNNING)
        code, _, err = c.cube("run", "--name", "more", "--", "true")
        self.assertEqual(code, 1)
        self.assertRegex(err, "(?i)no space left on device")
        code, out, _ = c.cube("status")
        self.assertEqual(code, 0)
        self.assertIn("sleeper", out)
        # what happens now cannot be written down, and is tried again quietly
        os.kill(short, 9)
        before = self.complaints()
        time.sleep(6)
        self.assertLessEqual(self.complaints() - before, 1)
        self.assertEqual(c.task("short")["State"], RUNNING)
        self.assertTrue(is_alive(pid))
        self.assertNotRegex(c.manager.output(), r"(?m): $") # no reason at all
        os.unlink(self.disk + "/filler")
        wait_until("what happened meanwhile is known",
                   lambda: c.task("short")["State"] != RUNNING, 30)
        self.ok(c, "run", "--name", "after", "--", "true")
        c.wait_for("after", COMPLETED)
        self.assertIn("commits work again", c.manager.output())
        self.assertTrue(is_alive(pid))
        c.manager.close()
        c.start_manager()
        self.assertEqual(c.wait_for("sleeper", RUNNING)["RestartCount"], 0)
        self.assertEqual(c.task("after")["State"], COMPLETED)
        self.assertIsNone(c.task("more"))


if __name__ == "__main__":
    harness.main()
