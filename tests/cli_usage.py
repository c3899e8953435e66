"""The command line by itself: usage, flags, what it asks of a manager, what
it prints and how it exits, and completion in real shells.

The manager is a fake one that notes the requests it gets and answers as
the test wants it to.
"""

import fcntl
import http.server
import json
import os
import pty
import re
import select
import shutil
import signal
import ssl
import struct
import subprocess
import tempfile
import termios
import threading
import time
import unittest
import urllib.parse

import harness
from harness import CUBE, TOP

COMMANDS = ["manager", "worker", "dev", "run", "status", "stop", "rm", "logs",
            "inspect", "events", "history", "node", "node rm", "backup",
            "store check", "store dump", "store compact", "completion",
            "help", "version"]
CLIENTS = [["run", "-d", "busybox"], ["status"], ["stop", "web"],
           ["rm", "web"], ["logs", "web"], ["inspect", "web"], ["events"],
           ["history", "web"], ["backup", "copy"], ["node"], ["node", "rm", "a:1"]]

IDS = ["1111aaaa-0000-4000-8000-000000000001",
       "1111bbbb-0000-4000-8000-000000000002",
       "2222cccc-0000-4000-8000-000000000003",
       "3333dddd-0000-4000-8000-000000000004"]
UNSET = "0001-01-01T00:00:00Z"


def task(task_id, name, state=2, **more):
    """A task as a manager sends it."""
    t = {"ID": task_id, "ContainerID": "", "Name": name, "State": state,
         "Image": "nginx:latest", "Cpu": 0, "Memory": 0, "Disk": 0,
         "HostPorts": None, "ExposedPorts": None, "PortBindings": None,
         "RestartPolicy": "", "StartTime": UNSET, "FinishTime": UNSET,
         "HealthCheck": "", "RestartCount": 0}
    t.update(more)
    return t


def ago(seconds):
    return time.strftime("%Y-%m-%dT%H:%M:%SZ",
                         time.gmtime(time.time() - seconds))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=None, kind="application/json"):
        data = b"" if body is None else (
            body if isinstance(body, bytes) else json.dumps(body).encode())
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if status != 204:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status, message):
        self.answer(status, {"HTTPStatusCode": status, "Message": message})

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def events(self, query):
        fake = self.server
        seq = 0
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        lines = [{"Type": "hello", "Cluster": "c", "Epoch": 1},
                 {"Type": "reset"}]
        only = query.get("task", [None])[0]
        for t in fake.tasks:
            if only in (None, t["ID"]):
                lines.append({"Type": "task", "Time": ago(0), "Task": t})
        lines.append({"Type": "listed"})
        for change in fake.changes:
            lines.append(change)
        for line in lines:
            seq += 1
            line = dict(line, Stream="s", Seq=seq)
            text = json.dumps(line).encode() + b"\n"
            # cut in two, as a network may
            self.chunk(text[:7])
            self.chunk(text[7:])
        if fake.cuts:
            fake.cuts -= 1
            self.close_connection = True
            return
        fake.hold.wait(20)
        self.chunk(b"")

    def cut_log(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.chunk(b"line 1\n")
        self.close_connection = True

    def handle_any(self):
        fake = self.server
        url = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(url.query)
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size).decode()
        fake.requests.append((self.command,
                              urllib.parse.unquote(self.path), body,
                              dict(self.headers)))
        if fake.refusal:
            return self.refuse(*fake.refusal)
        path = urllib.parse.unquote(url.path)
        if (self.command, path) == ("GET", "/tasks"):
            return self.answer(200, json.dumps(fake.tasks).encode())
        if (self.command, path) == ("GET", "/nodes"):
            return self.answer(200, fake.nodes)
        if (self.command, path) == ("GET", "/events"):
            return self.events(query)
        if (self.command, path) == ("POST", "/tasks"):
            t = json.loads(body)["Task"]
            t["State"] = 0
            fake.tasks.append(dict(t, **fake.becomes))
            return self.answer(201, t)
        if self.command == "DELETE":
            return self.answer(404 if path in fake.absent else 204)
        if path.endswith("/logs"):
            if fake.cuts:
                return self.cut_log()
            return self.answer(200, b"line 1\nline 2\n", "text/plain")
        if path.endswith("/inspect"):
            return self.answer(200, {"Id": "abc", "State": {}})
        return self.refuse(404, "no such thing")

    do_GET = do_POST = do_DELETE = handle_any


class Fake(http.server.ThreadingHTTPServer):
    """A manager that notes requests. `tasks`, `nodes`: what it lists;
    `becomes`: fields of a task once it was submitted; `changes`: events
    behind the list; `cuts`: how many event streams end too early;
    `refusal`: the answer to everything; `absent`: paths without a thing to
    remove."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.tasks, self.nodes = [], [], []
        self.becomes, self.changes, self.cuts = {"State": 2}, [], 0
        self.refusal, self.absent = None, []
        self.hold = threading.Event()
        self.where = "127.0.0.1:%d" % self.server_address[1]
        self.thread = threading.Thread(target=self.serve_forever,
                                       args=(0.02,))
        self.thread.start()

    def handle_error(self, *_):
        pass  # clients leave event streams in the middle

    def close(self):
        self.hold.set()
        self.shutdown()
        self.server_close()
        self.thread.join()

    def posted(self):
        """The events that were submitted."""
        return [json.loads(body) for method, path, body, _ in self.requests
                if (method, path) == ("POST", "/tasks")]


class Case(unittest.TestCase):
    def setUp(self):
        self.fake = Fake()
        self.addCleanup(self.fake.close)
        self.dir = tempfile.mkdtemp(prefix="cube-cli-")
        self.addCleanup(shutil.rmtree, self.dir)
        self.env = {"CUBE_TOKEN": "", "TZ": "UTC"}

    def cube(self, *argv, stdin="", env=None):
        """Runs a client command against the fake."""
        return harness.run(CUBE, *argv, "-m", self.fake.where, stdin=stdin,
                           env=dict(self.env, **(env or {})), cwd=self.dir)

    def ok(self, *argv, **more):
        code, out, err = self.cube(*argv, **more)
        self.assertEqual((code, err), (0, ""), argv)
        return out

    def file(self, text, name="t.json"):
        path = os.path.join(self.dir, name)
        with open(path, "w", encoding="utf-8") as f:
            f.write(text if isinstance(text, str) else json.dumps(text))
        return path


class Usage(Case):
    def test_help_lists_every_command(self):
        for argv in (["help"], ["--help"], ["-h"]):
            code, out, err = harness.run(CUBE, *argv)
            self.assertEqual((code, err), (0, ""))
            for command in COMMANDS:
                self.assertRegex(out, r"(?m)^  %s  +\w" % command)
            self.assertNotIn("__complete", out)

    def test_cube_alone_is_wrong_usage_that_shows_the_commands(self):
        _, out, _ = harness.run(CUBE, "help")
        self.assertEqual(harness.run(CUBE), (2, "", out))

    def test_help_of_a_first_word_lists_its_commands(self):
        code, out, _ = harness.run(CUBE, "help", "store")
        self.assertEqual((code, re.findall(r"(?m)^  (store \w+) ", out)),
                         (0, ["store check", "store dump", "store compact"]))
        self.assertIn("  node rm ", harness.run(CUBE, "help", "node")[1])

    def test_help_of_a_command_shows_its_flags_within_80_columns(self):
        for command in COMMANDS:
            words = command.split()
            code, out, _ = harness.run(CUBE, "help", *words)
            self.assertEqual(code, 0)
            self.assertIn("Usage: cube " + command, out)
            self.assertIn("-h, --help", out)
            for line in out.splitlines():
                self.assertLessEqual(len(line), 80, line)
            for flag in ("-h", "--help"):
                again = harness.run(CUBE, *words, flag)
                self.assertEqual(again, (0, out, ""))

    def test_the_task_that_help_shows_can_be_run(self):
        _, out, _ = harness.run(CUBE, "help", "run")
        shown = re.search(r"(?s)^  (\{.*?\})$", out, re.M).group(1)
        self.ok("run", "-d", "-f", "-", stdin=shown)
        event, = self.fake.posted()
        self.assertEqual({k: event["Task"].get(k) for k in json.loads(shown)},
                         json.loads(shown))

    def test_flags_of_the_go_program_are_there(self):
        for command, flags in {
                "manager": "-H --host -p --port -w --workers -s --scheduler "
                           "-d --dbType",
                "worker": "-H --host -p --port -n --name -d --dbtype "
                          "-r --runtime",
                "run": "-f --filename -m --manager",
                "status": "-m --manager", "stop": "-m --manager",
                "node": "-m --manager"}.items():
            _, out, _ = harness.run(CUBE, "help", command)
            for flag in flags.split():
                self.assertRegex(out, r"(?m)^ +.*%s\b" % flag, command)

    def test_wrong_usage_exits_2_and_says_why(self):
        rows = [
            (["stauts"], "did you mean status"),
            (["frobnicate"], "unknown command \"frobnicate\""),
            (["-m", "host:1", "status"], "no command before the flag -m"),
            (["status", "--al"], "unknown flag --al; did you mean --all"),
            (["status", "-x"], "unknown flag -x"),
            (["status", "web"], "\"web\""),
            (["status", "--all=5"], "takes no value"),
            (["status", "-o", "xml"], "one of text|json"),
            (["status", "-m"], "--manager needs a value"),
            (["stop"], "needs TASK"),
            (["logs", "a", "b"], "\"b\""),
            (["logs", "-n", "many", "web"], "many"),
            (["completion", "tcsh"], "bash|zsh|fish|powershell"),
            (["help", "nothing"], "unknown command \"nothing\""),
            (["manager", "-p", "65536"], "0 to 65535"),
            (["manager", "-s", "best"], "epvm|greedy|roundrobin"),
            (["manager", "--keep", "5"], "168h"),
            (["worker", "-r", "rkt"], "auto|docker|podman|process"),
            (["worker", "--join", "elsewhere:5555"], "--host"),
            (["worker", "-n", "a/b"], "has no /"),
            (["worker", "--join", "127.0.0.1:5555", "--advertise", "here",
              "-d", "memory", "-p", "0"], "expected host:port"),
            (["status", "-m", "here"], "as in 127.0.0.1:5555"),
            (["manager", "--keep", "0s"], "too short"),
            (["dev", "-p", "65534"], "up to 65535"),
            (["dev", "-n", "0"], "1 to 100"),
            (["dev", "-n", "100000"], "1 to 100"),
            (["run"], "needs an image"),
            (["run", "--name", "x"], "needs an image"),
            (["run", "-p", "http", "a"], "8080:80"),
            (["run", "-p", "80:0", "a"], "80:0"),
            (["run", "-p", "1.2.3.4:80:80", "a"], "8080:80"),
            (["run", "-p", "8080:80", "-p", "8081:80/tcp", "a"],
             "port 80/tcp of the task has one port of the host, 8080 or 8081"),
            (["run", "--memory", "lots", "a"], "64m"),
            (["run", "--memory", "-1", "a"], "64m"),
            (["run", "--cpu", "two", "a"], "0.5"),
            (["run", "--cpu", "nan", "a"], "0.5"),
            (["run", "--restart", "maybe", "a"], "on-failure"),
            (["run", "--stop-grace", "10 s", "a"], "10 s"),
            (["run", "--stop-grace", "0s", "a"], "too short"),
            (["run", "--health-start", "0s", "a"], "too short"),
            (["run", "-f", "x.json", "image"], "not from both"),
            (["run", "-f", "x.json", "--name", "n"], "--name"),
            (["run", "image", "-x"], "after --"),
            # which of several flags is wrong
            (["run", "--health-start", "1s", "--health-timeout", "5", "a"],
             "--health-timeout cannot be \"5\""),
            (["run", "--memory", "1g", "--disk", "5q", "a"],
             "--disk cannot be \"5q\""),
            (["logs", "-n", "-1", "web"], "--tail cannot be \"-1\""),
            (["status", "--at", "24:00"], "--at cannot be \"24:00\""),
            (["status", "-m", "ftp://here"], "--manager: "),
            # what is left of a variable that is not set
            (["manager", "--data", ""], "--data is empty"),
            (["manager", "--host="], "--host is empty"),
            (["worker", "--join", ""], "--join is empty"),
            (["status", "--token-file", ""], "--token-file is empty"),
            (["rm", "web", ""], "an argument is empty: TASK..."),
            (["node", "rm", ""], "an argument is empty: NODE..."),
            (["run", "", "--", "true"], "an argument is empty"),
            ([""], "unknown command \"\"\n"),
            (["x"], "unknown command \"x\"\n"),
            (["worker", "-n", "a\033[31mb", "-p", "0"], "at byte 2"),
            (["worker", "-n", "a" * 201, "-p", "0"], "at most 200 bytes"),
            (["worker", "--join", "localhost", "-d", "memory", "-p", "0"],
             "join \"localhost\": expected host:port"),
        ]
        for argv, words in rows:
            with self.subTest(argv=argv):
                code, out, err = harness.run(CUBE, *argv, cwd=self.dir)
                self.assertEqual((code, out), (2, ""), err)
                self.assertIn(words, err)
                self.assertIn("See: cube help", err)

    def test_what_cannot_listen_does_not_say_that_it_does(self):
        code, _, err = harness.run(CUBE, "manager", "-H", "no.invalid", "-p",
                                   "0", "--data", self.dir, env=self.env)
        self.assertEqual(code, 1)
        self.assertIn("no.invalid", err)
        self.assertNotIn("listens on", err)

    def test_version_is_one_line(self):
        for argv in (["version"], ["--version"]):
            code, out, _ = harness.run(CUBE, *argv)
            self.assertEqual(code, 0)
            self.assertRegex(out, r"^cube \d+\.\d+\S*\n$")

    def test_without_a_manager_every_client_exits_3(self):
        where = "127.0.0.1:%d" % harness.free_port()
        for argv in CLIENTS:
            with self.subTest(argv=argv):
                code, out, err = harness.run(CUBE, *argv, "-m", where,
                                             env=self.env)
                self.assertEqual((code, out), (3, ""), err)
                self.assertIn("no manager answered at " + where, err)
                self.assertIn("cube manager", err)

    def test_a_name_that_is_none_exits_3(self):
        code, _, err = harness.run(CUBE, "status", "-m", "no.invalid:5555")
        self.assertEqual(code, 3, err)
        self.assertIn("no.invalid", err)

    def test_what_is_no_manager_is_told(self):
        self.fake.tasks = {"not": "a list"}
        code, _, err = self.cube("status")
        self.assertEqual(code, 1)
        self.assertIn(self.fake.where, err)

    def test_output_that_cannot_be_written_is_a_failure(self):
        with open("/dev/full", "w", encoding="utf-8") as full:
            done = subprocess.run([CUBE, "help"], stdout=full, check=False,
                                  stderr=subprocess.PIPE, text=True)
        self.assertEqual(done.returncode, 1)
        self.assertIn("standard output", done.stderr)

    def test_https_is_there_or_says_how(self):
        code, _, err = harness.run(CUBE, "status", "-m",
                                   "https://127.0.0.1:%d" %
                                   harness.free_port())
        self.assertIn(code, (2, 3))
        if code == 2:
            self.assertIn("CUBE_WITH_CURL=1", err)


@unittest.skipUnless(shutil.which("cc") and shutil.which("openssl"),
                     "no cc, or no openssl for a certificate")
class Https(Case):
    """A program that was built with libcurl, and a manager behind TLS."""

    @classmethod
    def setUpClass(cls):
        cls.built = tempfile.mkdtemp(prefix="cube-curl-")
        cls.program = os.path.join(cls.built, "cube")
        done = subprocess.run(
            ["cc", "-O0", "-w", "-DCUBE_WITH_CURL=1", "-o", cls.program,
             TOP + "/examples/cube.c", TOP + "/cube.c", "-lcurl", "-lpthread"],
            capture_output=True, text=True, check=False)
        cls.why = done.stderr
        cls.cert = os.path.join(cls.built, "cert.pem")
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes",
             "-keyout", cls.cert, "-out", cls.cert + ".crt", "-days", "2",
             "-subj", "/CN=localhost", "-addext",
             "subjectAltName=DNS:localhost"], capture_output=True, check=True)
        with open(cls.cert, "a", encoding="utf-8") as out, \
                open(cls.cert + ".crt", encoding="utf-8") as crt:
            out.write(crt.read())

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.built)

    def setUp(self):
        if not os.path.exists(self.program):
            if "curl/curl.h" in self.why or "-lcurl" in self.why:
                self.skipTest("no libcurl to build with")
            self.fail(self.why)
        super().setUp()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert)
        self.fake.socket = context.wrap_socket(self.fake.socket,
                                               server_side=True)
        self.fake.where = "https://localhost:%d" % (
            self.fake.server_address[1])
        self.env["CURL_CA_BUNDLE"] = self.cert + ".crt"

    def cube(self, *argv, stdin="", env=None):
        return harness.run(self.program, *argv, "-m", self.fake.where,
                           stdin=stdin, env=dict(self.env, **(env or {})))

    def test_all_kinds_of_requests_pass_through_tls(self):
        self.fake.tasks = [task(IDS[0], "web")]
        self.assertIn("web", self.ok("status", env={"CUBE_TOKEN": "t"}))
        self.assertEqual(self.fake.requests[-1][3]["Authorization"],
                         "Bearer t")
        self.assertEqual(len(self.ok("run", "busybox")), 37)
        self.assertEqual(self.fake.posted()[0]["Task"]["Image"], "busybox")
        self.assertIn("stopping", self.ok("stop", "-d", "web"))
        self.assertEqual(self.ok("logs", "web"), "line 1\nline 2\n")
        self.assertIn("Running", self.ok("events"))

    def test_a_refusal_keeps_its_words(self):
        self.fake.refusal = (409, "not so")
        code, _, err = self.cube("status")
        self.assertEqual(code, 1)
        self.assertIn("not so", err)

    def test_a_certificate_that_nobody_vouches_for_gets_no_request(self):
        code, _, err = self.cube("status", env={"CURL_CA_BUNDLE": ""})
        self.assertEqual(code, 1, err)
        self.assertIn("name that one's file in CURL_CA_BUNDLE", err)
        self.assertEqual(self.fake.requests, [])

    def test_nobody_there_exits_3(self):
        self.fake.where = "https://localhost:%d" % harness.free_port()
        self.assertEqual(self.cube("status")[0], 3)


class Run(Case):
    def test_flags_become_a_task(self):
        rows = [
            (["nginx:latest"], {"Image": "nginx:latest", "Name": ""}),
            (["--name", "web", "i"], {"Name": "web"}),
            (["-p", "80", "i"], {"ExposedPorts": {"80/tcp": {}},
                                 "PortBindings": None}),
            (["-p", "8080:80", "i"], {"ExposedPorts": {"80/tcp": {}},
                                      "PortBindings": {"80/tcp": "8080"}}),
            (["-p", "53:53/udp", "-p", "90", "i"],
             {"ExposedPorts": {"53/udp": {}, "90/tcp": {}},
              "PortBindings": {"53/udp": "53"}}),
            (["-e", "A=b", "-e", "B=c=d", "i"], {"Env": ["A=b", "B=c=d"]}),
            (["-e", "FROM_HERE", "-e", "NOT_HERE", "i"],
             {"Env": ["FROM_HERE=x y"]}),
            (["--memory", "64m", "i"], {"Memory": 64 << 20}),
            (["--memory", "1.5g", "i"], {"Memory": 3 << 29}),
            (["--memory", "512KiB", "i"], {"Memory": 512 << 10}),
            (["--memory", "1000", "i"], {"Memory": 1000}),
            (["--disk", "10GB", "i"], {"Disk": 10 << 30}),
            (["--cpu", "0.5", "i"], {"Cpu": 0.5}),
            (["--restart", "always", "i"], {"RestartPolicy": "always"}),
            (["--health", "/health", "i"], {"HealthCheck": "/health"}),
            (["--health-start", "1m", "--health-interval", "1.5s",
              "--health-timeout", "200ms", "--health-retries", "5", "i"],
             {"HealthStart": 60000, "HealthInterval": 1500,
              "HealthTimeout": 200, "HealthRetries": 5}),
            (["--stop-grace", "1h30m", "i"], {"StopGrace": 5400000}),
            (["i", "cmd", "-x", "--name"], {"Cmd": ["cmd", "-x", "--name"]}),
            (["i", "--", "-x"], {"Cmd": ["-x"], "Image": "i"}),
            (["--", "sleep", "5"], {"Cmd": ["sleep", "5"], "Image": ""}),
            (["i", "--name", "n", "--", "c"], {"Name": "n", "Cmd": ["c"]}),
            (["i", "c", "a \"q\" \\ \u00fc"],
             {"Cmd": ["c", "a \"q\" \\ \u00fc"]}),
        ]
        for argv, want in rows:
            with self.subTest(argv=argv):
                self.fake.requests.clear()
                code, out, err = harness.run(
                    CUBE, "run", "-d", "-m", self.fake.where, *argv,
                    env=dict(self.env, FROM_HERE="x y"))
                self.assertEqual((code, err), (0, ""))
                event, = self.fake.posted()
                got = event["Task"]
                self.assertEqual({k: got.get(k) for k in want}, want)
                self.assertEqual(event["State"], 2)
                self.assertEqual(out, got["ID"] + "\n")
                self.assertEqual(got["State"], 0)

    def test_flags_can_be_written_in_each_usual_way(self):
        for argv in (["--name", "n"], ["--name=n"]):
            for port in (["-p", "1:2"], ["-p1:2"], ["--publish=1:2"]):
                for detach in (["-d"], ["--detach"], ["--detach=true"]):
                    self.fake.requests.clear()
                    self.ok("run", *argv, *port, *detach, "i")
                    event, = self.fake.posted()
                    self.assertEqual(event["Task"]["Name"], "n")
                    self.assertEqual(event["Task"]["PortBindings"],
                                     {"2/tcp": "1"})
                    self.assertEqual(len(self.fake.requests), 1)

    def test_letters_of_switches_can_stand_together(self):
        self.fake.tasks = [task(IDS[0], "old", 3, FinishTime=ago(9000))]
        out = self.ok("status", "-ao", "json")
        self.assertEqual(json.loads(out)[0]["Name"], "old")

    def test_a_file_holds_a_task_or_an_event(self):
        bare = {"Name": "web", "Image": "nginx"}
        event = {"ID": IDS[1], "State": 2, "Timestamp": ago(0),
                 "Task": {"ID": IDS[0], "Name": "web", "Image": "nginx"}}
        for text in (bare, event):
            for by in ("file", "stdin", "default"):
                with self.subTest(text=text, by=by):
                    self.fake.requests.clear()
                    if by == "file":
                        self.ok("run", "-df", self.file(text))
                    elif by == "stdin":
                        self.ok("run", "-d", "-f", "-",
                                stdin=json.dumps(text))
                    else:
                        self.file(text, "task.json")
                        self.ok("run", "-d")
                        os.unlink(os.path.join(self.dir, "task.json"))
                    got, = self.fake.posted()
                    self.assertEqual(got["Task"]["Name"], "web")
                    if text is event:
                        self.assertEqual(got["ID"], IDS[1])
                        self.assertEqual(got["Task"]["ID"], IDS[0])

    def test_a_bad_file_is_refused_before_anything_is_sent(self):
        rows = [("{", "early"), ("", "t.json"),
                ({"Name": "x", "Imgae": "y"}, "Imgae"),
                ({"Name": "x", "Memory": "much"}, "Memory")]
        for text, words in rows:
            with self.subTest(text=text):
                code, out, err = self.cube("run", "-f", self.file(text))
                self.assertEqual((code, out), (1, ""))
                self.assertIn(words, err)
        self.assertIn("standard input: JSON, line 1, column 3: ",
                      self.cube("run", "-f", "-", stdin="[]]")[2])
        code, _, err = self.cube("run", "-f", "missing.json")
        self.assertEqual(code, 1)
        self.assertIn("missing.json: No such file", err)
        self.assertEqual(self.fake.requests, [])

    def test_it_waits_until_the_task_runs(self):
        self.fake.becomes = {"State": 1}
        begin = time.monotonic()
        threading.Timer(0.3, self.submit_running).start()
        out = self.ok("run", "nginx")
        self.assertGreater(time.monotonic() - begin, 0.2)
        self.assertEqual(out, self.fake.tasks[0]["ID"] + "\n")

    def submit_running(self):
        """The running stream ends, and the next one says Running."""
        self.fake.tasks[0]["State"] = 2
        self.fake.hold.set()

    def test_it_outlives_a_manager_that_restarts(self):
        self.fake.becomes = {"State": 1}
        self.fake.cuts = 1
        threading.Timer(0.3, self.submit_running).start()
        code, out, _ = self.cube("run", "nginx")
        self.assertEqual((code, out), (0, self.fake.tasks[0]["ID"] + "\n"))

    def test_a_task_that_fails_is_told_with_its_reason(self):
        self.fake.becomes = {"State": 4, "Error": "no such image: nginx"}
        code, out, err = self.cube("run", "--name", "web", "nginx")
        self.assertEqual((code, out), (1, self.fake.tasks[0]["ID"] + "\n"))
        self.assertIn("no such image: nginx", err)
        self.assertIn("web", err)

    def test_a_task_that_waits_for_room_says_so(self):
        self.fake.becomes = {"State": 0, "Error": "no node has 9 TiB"}
        threading.Timer(0.5, self.submit_running).start()
        code, _, err = self.cube("run", "nginx")
        self.assertEqual(code, 0)
        self.assertIn("Pending: no node has 9 TiB", err)

    def test_what_the_manager_refuses_is_told_in_its_words(self):
        self.fake.refusal = (400, "Image: \"UPPER\" is no image")
        code, out, err = self.cube("run", "UPPER")
        self.assertEqual((code, out), (1, ""))
        self.assertIn("Image: \"UPPER\" is no image", err)

    def test_who_interrupts_the_waiting_is_told_that_the_task_stays(self):
        self.fake.becomes = {"State": 0, "Error": "no node has 9 TiB"}
        with harness.Process(CUBE, "run", "-m", self.fake.where,
                             "nginx") as p:
            harness.wait_until("it waits", lambda: "9 TiB" in p.output())
            p.kill(signal.SIGINT)
            self.assertEqual(p.wait(), -signal.SIGINT)
            shown = self.fake.tasks[0]["ID"][:8]
            self.assertIn("task %s stays; `cube stop %s` ends it\n" %
                          (shown, shown), p.output())

    def test_output_as_json_is_the_task(self):
        out = self.ok("run", "-o", "json", "nginx")
        self.assertEqual(json.loads(out)["State"], 2)


class Tasks(Case):
    def setUp(self):
        super().setUp()
        self.fake.tasks = [
            task(IDS[0], "web", 2, CreatedTime=ago(125), Node="n1:5556",
                 ContainerID="c0ffee" * 10, RestartCount=2,
                 HostPorts={"80/tcp": [
                     {"HostIp": "0.0.0.0", "HostPort": "8080"},
                     {"HostIp": "::", "HostPort": "8080"}]}),
            task(IDS[1], "db", 0, Error="no node fits\nat all"),
            task(IDS[2], "old", 3, FinishTime=ago(4000)),
            task(IDS[3], "recent", 4, FinishTime=ago(60),
                 Error="exit code 3"),
        ]

    def test_status_is_a_table_of_what_matters(self):
        lines = self.ok("status").splitlines()
        self.assertEqual(re.split(r"   +", lines[0]),
                         ["ID", "NAME", "CREATED", "STATE", "CONTAINERNAME",
                          "IMAGE", "NODE", "PORTS", "REASON"])
        self.assertEqual(re.split(r"   +", lines[1]),
                         ["1111aaaa", "web", "2 minutes ago", "Running",
                          "c0ffeec0ffee", "nginx:latest", "n1:5556",
                          "8080->80/tcp", "restarted 2 times"])
        self.assertIn("no node fits at all", lines[2])
        self.assertIn("exit code 3", lines[3])
        self.assertEqual(len(lines), 4)

    def on_terminal(self, columns, *argv):
        """What a client prints on a terminal of that width."""
        ours, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ,
                    struct.pack("HHHH", 24, columns, 0, 0))
        with subprocess.Popen(
                [CUBE, *argv, "-m", self.fake.where], stdout=its,
                env=dict(os.environ, TERM="dumb", **self.env)) as p:
            os.close(its)
            out = b""
            try:
                while piece := os.read(ours, 65536):
                    out += piece
            except OSError:
                pass  # that is how the end of a terminal is told
            os.close(ours)
        self.assertEqual(p.returncode, 0)
        return out.decode().replace("\r\n", "\n")

    def test_status_on_a_narrow_terminal_puts_the_rest_of_a_row_below(self):
        """At 80 columns each row was wrapped where the terminal ended, in the
        middle of words."""
        name = "a-service-with-a-rather-long-name-as-people-have"
        self.fake.tasks[1]["Name"] = name
        out = self.on_terminal(80, "status")
        lines = out.splitlines()
        self.assertLessEqual(max(map(len, lines)), 80)
        self.assertEqual(lines[0].split(), ["ID", "NAME", "CREATED", "STATE",
                                            "CONTAINERNAME"])
        self.assertEqual(re.split(r"   +", lines[1]),
                         ["1111aaaa", "web", "2 minutes ago", "Running",
                          "c0ffeec0ffee"])
        self.assertIn("    IMAGE nginx:latest   NODE n1:5556", lines[2])
        rows = [line for line in lines[1:] if line[0] != " "]
        self.assertEqual([row[:8] for row in rows],
                         [IDS[0][:8], IDS[1][:8], IDS[3][:8]])
        self.assertIn("a-service-with-a-rat..   ", rows[1])
        self.assertEqual({row.index(state) for row, state in
                          zip(rows, ("Running", "Pending", "Failed"))},
                         {lines[0].index("STATE")})
        flat = " ".join(out.split())
        for text in ("NAME " + name, "REASON no node fits at all",
                     "PORTS 8080->80/tcp REASON restarted 2 times"):
            self.assertIn(text, flat)

    def test_status_on_a_wide_terminal_is_what_a_file_gets(self):
        self.assertEqual(self.on_terminal(200, "status"), self.ok("status"))
        self.assertNotRegex(self.ok("status"), "(?m) $")
        self.assertEqual(self.on_terminal(3, "status"), self.ok("status"))

    def test_a_restart_to_come_is_told_in_one_sentence(self):
        self.fake.tasks[0].update(State=4, Error="exited with code 1",
                                  RestartTime=ago(-0.5))
        self.assertIn("starts again in less than a second: exited with",
                      self.ok("status"))

    def test_status_shows_what_is_long_over_only_with_all(self):
        self.assertNotIn("old", self.ok("status"))
        for flag in ("-a", "--all"):
            self.assertIn("old", self.ok("status", flag))

    def test_status_as_json_is_a_list_of_tasks(self):
        got = json.loads(self.ok("status", "-o", "json"))
        self.assertEqual([t["Name"] for t in got], ["web", "db", "recent"])
        self.fake.tasks = []
        self.assertEqual(json.loads(self.ok("status", "-o", "json")), [])
        self.fake.tasks = None
        self.assertEqual(json.loads(self.ok("status", "-o", "json")), [])

    def test_a_task_has_three_kinds_of_name(self):
        for name in ("web", IDS[0], IDS[0].upper(), "1111a"):
            self.fake.requests.clear()
            self.assertEqual(self.ok("stop", "-d", name),
                             "stopping web (1111aaaa)\n")
            self.assertIn(("DELETE", "/tasks/" + IDS[0]),
                          [r[:2] for r in self.fake.requests])

    def test_an_ambiguous_name_lists_what_it_can_be(self):
        code, _, err = self.cube("stop", "1111")
        self.assertEqual(code, 1)
        self.assertIn(IDS[0] + "  web, Running, created 2 minutes ago", err)
        self.assertIn(IDS[1], err)
        self.assertNotIn(IDS[2], err)
        self.assertNotIn("DELETE", [r[0] for r in self.fake.requests])

    def test_a_shared_name_means_the_task_that_is_not_over(self):
        self.fake.tasks.append(task(IDS[2][:-1] + "9", "web", 3))
        self.assertIn("1111aaaa", self.ok("stop", "-d", "web"))
        self.assertIn("2222cccc", self.ok("rm", "web"))
        self.fake.tasks.append(task(IDS[3][:-1] + "9", "web", 2))
        code, _, err = self.cube("stop", "web")
        self.assertEqual(code, 1)
        self.assertIn(IDS[3][:-1] + "9", err)

    def test_an_unknown_task_is_a_failure(self):
        for argv in (["stop"], ["rm"], ["logs"], ["inspect"]):
            code, out, err = self.cube(*argv, "nobody")
            self.assertEqual((code, out), (1, ""))
            self.assertIn("\"nobody\"", err)

    def test_stop_waits_until_it_is_true(self):
        def later():
            self.fake.tasks[0]["State"] = 3
            self.fake.hold.set()
        begin = time.monotonic()
        threading.Timer(0.3, later).start()
        self.assertEqual(self.ok("stop", "web"), "stopped web (1111aaaa)\n")
        self.assertGreater(time.monotonic() - begin, 0.2)

    def test_stop_says_what_keeps_it_from_being_sure(self):
        def later():
            self.fake.tasks[0].update(State=3, Error="its node was lost")
            self.fake.hold.set()
        threading.Timer(0.3, later).start()
        code, out, err = self.cube("stop", "web")
        self.assertEqual((code, out), (0, "stopped web (1111aaaa)\n"))
        self.assertIn("its node was lost", err)

    def test_stop_of_what_is_over_says_so_and_asks_for_nothing(self):
        self.assertEqual(self.ok("stop", "recent"), "recent (3333dddd) is "
                         "Failed already: exit code 3\n")
        self.assertNotIn("DELETE", [r[0] for r in self.fake.requests])

    def test_stop_goes_on_behind_a_name_that_is_none(self):
        code, out, err = self.cube("stop", "-d", "nobody", "web", "db")
        self.assertEqual((code, out), (1, "stopping web (1111aaaa)\n"
                                          "stopping db (1111bbbb)\n"))
        self.assertIn("nobody", err)

    def test_rm_removes_the_record(self):
        self.assertEqual(self.ok("rm", "old"), "removed old (2222cccc)\n")
        self.assertEqual(self.fake.requests[-1][:2],
                         ("DELETE", "/tasks/%s?forget=1" % IDS[2]))

    def test_logs_are_printed_as_they_are(self):
        self.assertEqual(self.ok("logs", "web"), "line 1\nline 2\n")
        self.assertEqual(self.fake.requests[-1][1],
                         "/tasks/%s/logs?follow=0" % IDS[0])
        self.ok("logs", "-f", "--tail", "7", "web")
        self.assertEqual(self.fake.requests[-1][1],
                         "/tasks/%s/logs?follow=1&tail=7" % IDS[0])

    def test_a_log_that_breaks_off_is_a_failure_of_the_log(self):
        self.fake.cuts = 1
        code, out, err = self.cube("logs", "web")
        self.assertEqual((code, out), (1, "line 1\n"))
        self.assertIn("the log of web breaks off here: ", err)
        self.assertNotIn("no manager answered", err)

    def test_inspect_shows_record_and_container(self):
        got = json.loads(self.ok("inspect", "web"))
        self.assertEqual(got["Task"]["Name"], "web")
        self.assertEqual(got["Container"]["Id"], "abc")

    def test_events_end_with_the_list(self):
        out = self.ok("events")
        self.assertEqual(out.count("\n"), 4)
        self.assertRegex(out, r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  task web "
                              r"\(1111aaaa\) Running on n1:5556: restarted 2 "
                              r"times$")
        lines = [json.loads(line)
                 for line in self.ok("events", "-o", "json").splitlines()]
        self.assertEqual([line["Type"] for line in lines],
                         ["hello", "reset"] + ["task"] * 4 + ["listed"])

    def test_listed_events_tell_when_the_task_became_so(self):
        """It was the time of the list, the same for all."""
        at = {i: "2025-03-01T10:1%d:12.5Z" % i for i in range(3)}
        self.fake.tasks = [
            task(IDS[0], "a", 0, CreatedTime=at[0]),
            task(IDS[1], "b", 2, CreatedTime=at[0], StartTime=at[1]),
            task(IDS[2], "c", 3, CreatedTime=at[0], StartTime=at[1],
                 FinishTime=at[2]),
            task(IDS[3], "d", 2, CreatedTime=at[0], StartTime=at[2],
                 FinishTime=at[1])]
        self.fake.changes = [{"Type": "gone", "ID": IDS[0],
                              "Time": "2025-03-02T01:02:03Z"}]
        with harness.Process(CUBE, "events", "-f", "-m", self.fake.where,
                             env=self.env) as p:
            harness.wait_until("the change", lambda: "removed" in p.output())
            times = [line[:19] for line in p.output().splitlines()]
        self.assertEqual(times, [
            "2025-03-01 10:10:12", "2025-03-01 10:11:12",
            "2025-03-01 10:12:12", "2025-03-01 10:12:12",
            "2025-03-02 01:02:03"])

    def test_what_others_wrote_does_not_drive_the_terminal(self):
        """A control character, one of U+0080 to U+009F, and what turns the
        direction of writing."""
        bad = "x\x1b[31m\u009b31m\u202egnp.\u2066y\nz"
        self.fake.tasks = [task(IDS[3], "v" + bad, 4, Error=bad,
                                FinishTime=ago(60), Node="n" + bad)]
        self.fake.becomes = {"State": 4, "Error": bad}
        for argv in (["status"], ["events"], ["stop", IDS[3]], ["rm", IDS[3]],
                     ["run", "nginx"]):
            _, out, err = self.cube(*argv)
            self.assertTrue(out)
            for c in "\x1b\u009b\u202e\u2066":
                self.assertNotIn(c, out + err, argv)
        self.fake.refusal = (500, bad)
        _, _, err = self.cube("status")
        self.assertIn("x [31m", err)
        self.assertNotRegex(err, "[\x1b\u009b\u202e\u2066]")

    def test_events_resume_where_they_broke_off(self):
        self.fake.cuts = 1
        self.fake.changes = [{"Type": "gone", "ID": IDS[2]}]
        with harness.Process(CUBE, "events", "-f", "-m",
                             self.fake.where) as p:
            harness.wait_until("the stream is opened again", lambda: sum(
                r[1].startswith("/events") for r in self.fake.requests) == 2)
            self.assertIn("task 2222cccc removed", p.output())
        self.assertEqual(self.fake.requests[-1][1], "/events?after=s:8")


class Nodes(Case):
    def setUp(self):
        super().setUp()
        base = {"Ip": "", "Memory": 8 << 20, "MemoryAllocated": 0,
                "Disk": 100 << 30, "DiskAllocated": 0, "Role": "worker"}
        self.fake.nodes = [
            dict(base, Name="a:5556", Api="http://a:5556", TaskCount=3,
                 State="up", Stats={"CpuUse": 0.256, "Runtime": "docker"},
                 Worker="abcdef00-0000-4000-8000-000000000000"),
            dict(base, Name="b:5556", Api="http://b:5556", TaskCount=0,
                 State="lost", Error="connect: refused", Stats=None),
            dict(base, Name="go:5556", Api="http://go:5556", TaskCount=1)]

    def test_node_is_a_table(self):
        lines = [re.split(r"   +", line)
                 for line in self.ok("node").splitlines()]
        self.assertEqual(lines[0], ["NAME", "MEMORY (MiB)", "DISK (GiB)",
                                    "ROLE", "TASKS", "STATE", "CPU",
                                    "RUNTIME", "REASON"])
        self.assertEqual(lines[1][:8], ["a:5556", "8192", "100", "worker",
                                        "3", "up", "26 %", "docker"])
        self.assertEqual(lines[2], ["b:5556", "8192", "100", "worker", "0",
                                    "lost", "-", "-", "connect: refused"])
        self.assertEqual(lines[3][:7], ["go:5556", "8192", "100", "worker",
                                        "1", "-", "-"])

    def test_node_as_json_is_what_the_manager_said(self):
        self.assertEqual(json.loads(self.ok("node", "-o", "json")),
                         self.fake.nodes)

    def test_a_node_is_inspected_by_name_and_by_worker(self):
        for name in ("a:5556", "abcdef"):
            self.assertEqual(json.loads(self.ok("inspect", name)),
                             self.fake.nodes[0])

    def test_node_rm_forgets_it(self):
        self.assertEqual(self.ok("node", "rm", "a:5556"),
                         "removed a:5556\n")
        self.assertEqual(self.fake.requests[-1][:2],
                         ("DELETE", "/nodes/a:5556"))

    def test_node_rm_goes_on_behind_one_that_is_none(self):
        self.fake.absent = ["/nodes/x:1"]
        code, out, err = self.cube("node", "rm", "x:1", "a:5556")
        self.assertEqual((code, out), (1, "removed a:5556\n"))
        self.assertIn("x:1", err)


class Access(Case):
    def token(self):
        return self.fake.requests[-1][3].get("Authorization")

    def test_a_token_comes_from_a_file_or_the_environment(self):
        self.ok("status")
        self.assertIsNone(self.token())
        self.ok("status", env={"CUBE_TOKEN": "from-env"})
        self.assertEqual(self.token(), "Bearer from-env")
        path = self.file("\n  from-file \nold-one\n")
        self.ok("status", "--token-file", path,
                env={"CUBE_TOKEN": "from-env"})
        self.assertEqual(self.token(), "Bearer from-file")

    def test_a_line_of_two_words_is_not_two_tokens(self):
        code, _, err = self.cube("status", "--token-file",
                                 self.file("two words\n"))
        self.assertEqual(code, 2)
        self.assertIn("not visible ASCII", err)
        self.assertEqual(self.fake.requests, [])

    def test_a_file_without_a_token_is_refused(self):
        code, _, err = self.cube("status", "--token-file", self.file("\n \n"))
        self.assertEqual(code, 1)
        self.assertIn("holds no token", err)

    def test_a_refusal_says_how_to_give_a_token(self):
        self.fake.refusal = (401, "a token is needed")
        code, _, err = self.cube("status")
        self.assertEqual(code, 1)
        self.assertIn("a token is needed", err)
        self.assertIn("--token-file", err)


def type_in(argv, keys, env, until, prompt):
    """Types keys into a program on a terminal; what it then shows."""
    pid, fd = pty.fork()
    if pid == 0:
        os.execvpe(argv[0], argv, env)
    out, end, typed = "", time.monotonic() + 20, False
    try:
        while time.monotonic() < end and not re.search(until, out):
            if select.select([fd], [], [], 0.1)[0]:
                out += os.read(fd, 65536).decode(errors="replace")
            if not typed and prompt in out:
                typed = True
                out = ""
                os.write(fd, keys.encode())
    finally:
        os.close(fd)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    return out


class Completion(Case):
    def setUp(self):
        super().setUp()
        self.fake.tasks = [task(IDS[0], "web-one"), task(IDS[1], "web-two"),
                           task(IDS[2], "", 2), task(IDS[3], "was", 3)]
        self.fake.nodes = [{"Name": "n1:5556", "State": "up"},
                           {"Name": "n1:5557", "State": "up"}]
        self.path = dict(os.environ, TERM="dumb", HOME=self.dir, CUBE_TOKEN="",
                         PATH=os.path.dirname(CUBE) + ":" +
                         os.environ["PATH"])
        self.m = "-m " + self.fake.where + " "

    def rows(self):
        """The line as typed, and what can follow its last word."""
        m = self.m
        return [
            ("cube st", ["status", "stop", "store"]),
            ("cube store ", ["check", "compact", "dump"]),
            ("cube help store c", ["check", "compact"]),
            ("cube node ", ["rm"]),
            ("cube manager --sch", ["--scheduler"]),
            ("cube manager -s ", ["epvm", "greedy", "roundrobin"]),
            ("cube worker --dbt", ["--dbtype"]),
            ("cube completion ", ["bash", "fish", "powershell", "zsh"]),
            ("cube stop " + m + "web", ["web-one", "web-two"]),
            ("cube stop " + m, ["2222cccc-0000-4000-8000-000000000003",
                                "web-one", "web-two"]),
            ("cube logs " + m + "wa", ["was"]),
            ("cube help node r", ["rm"]),
        ]

    def test_candidates(self):
        for line, want in self.rows() + [
                ("cube manager --scheduler=e", ["--scheduler=epvm"]),
                ("cube node rm " + self.m, ["n1:5556", "n1:5557"]),
                ("cube stop " + self.m + "1111a", [IDS[0]]),
                ("cube run -f ", [":file"]), ("cube worker --data ", [":dir"]),
                ("cube run nginx -- --na", [])]:
            with self.subTest(line=line):
                code, out, _ = harness.run(CUBE, "__complete",
                                           *line.split(" ")[1:],
                                           env=self.env)
                got = sorted(row.split("\t")[0] for row in out.splitlines())
                self.assertEqual((code, got), (0, want))

    def bash(self, line):
        script = r"""
            source <(cube completion bash) || exit 9
            COMP_LINE=$1 COMP_POINT=${#1}
            COMP_WORDBREAKS=$' \t\n"\'><=;|&(:'
            _cube && printf '%s\n' "${COMPREPLY[@]}" | sort -u"""
        code, out, err = harness.run("bash", "--norc", "-c", script, "bash",
                                     line, env=self.path)
        self.assertEqual((code, err), (0, ""))
        return [word for word in out.split("\n") if word]

    @unittest.skipUnless(shutil.which("bash"), "no bash")
    def test_bash(self):
        for line, want in self.rows() + [
                # readline replaces what is behind the last : or =
                ("cube manager --scheduler=e", ["epvm"]),
                ("cube node rm " + self.m + "n1:", ["5556", "5557"])]:
            with self.subTest(line=line):
                self.assertEqual(self.bash(line), want)

    @unittest.skipUnless(shutil.which("bash"), "no bash")
    def test_bash_completes_files(self):
        self.file("{}", "my task.json")
        os.mkdir(os.path.join(self.dir, "my dir"))
        here = os.getcwd()
        try:
            os.chdir(self.dir)
            self.assertEqual(self.bash("cube run -f my"),
                             ["my dir", "my task.json"])
            self.assertEqual(self.bash("cube worker --data=my"), ["my dir"])
        finally:
            os.chdir(here)

    @unittest.skipUnless(shutil.which("bash"), "no bash")
    def test_bash_on_a_terminal(self):
        out = type_in(
            ["bash", "--norc", "--noprofile", "-i"],
            "source <(cube completion bash)\r"
            "cube node rm " + self.m + "n1:\t\t\t",
            dict(self.path, PS1="ready> "), r"5556\s+5557", "ready>")
        self.assertRegex(out, r"5556\s+5557")

    @unittest.skipUnless(shutil.which("fish"), "no fish")
    def test_fish(self):
        for line, want in self.rows() + [
                ("cube node rm " + self.m + "n1:", ["n1:5556", "n1:5557"])]:
            with self.subTest(line=line):
                code, out, err = harness.run(
                    "fish", "--no-config", "-c",
                    "cube completion fish | source; complete -C $argv[1]",
                    line, env=self.path)
                self.assertEqual((code, err), (0, ""))
                got = sorted(row.split("\t")[0] for row in out.splitlines())
                self.assertEqual(got, want)

    @unittest.skipUnless(shutil.which("zsh"), "no zsh")
    def test_zsh(self):
        setup = ("autoload -U compinit; compinit -u -D; PS1='ready> '; "
                 "LISTMAX=0; source <(cube completion zsh)\r")
        for line, want in [("cube stat", ["cube status"]),
                           ("cube stop " + self.m + "web", ["web-one",
                                                            "web-two"]),
                           ("cube node rm " + self.m + "n1:", ["n1:5556",
                                                               "n1:5557"])]:
            with self.subTest(line=line):
                found = "(?s)" + "".join("(?=.*%s)" % w for w in want)
                out = type_in(["zsh", "-f", "-i"], setup + line + "\t\t",
                              dict(self.path, PS1="first> "), found, "first>")
                self.assertRegex(out, found)

    def test_powershell_script_is_printed(self):
        code, out, _ = harness.run(CUBE, "completion", "powershell")
        self.assertEqual(code, 0)
        self.assertIn("Register-ArgumentCompleter", out)

    @unittest.skipUnless(shutil.which("pwsh"), "no pwsh")
    def test_powershell(self):
        _, out, _ = harness.run(
            "pwsh", "-NoProfile", "-Command",
            "cube completion powershell | Out-String | Invoke-Expression; "
            "(TabExpansion2 'cube sta' 8).CompletionMatches.CompletionText",
            env=self.path)
        self.assertEqual(out.split(), ["status"])


if __name__ == "__main__":
    harness.main()
