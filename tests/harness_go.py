"""What the Go implementation of Cube sends and expects, as Python: its
records, its worker, its way to speak HTTP. Facts, not code: they were read
off the running program, and the suites wire_go.py and faults.py replay them.
"""

import copy
import datetime
import http.client
import http.server
import json
import socket
import threading
import time
import uuid

UNSET = "0001-01-01T00:00:00Z"

# The fields of a Task, in the order in which they are sent.
TASK = {
    "ID": "", "ContainerID": "", "Name": "", "State": 0, "Image": "",
    "Cpu": 0, "Memory": 0, "Disk": 0, "HostPorts": None,
    "ExposedPorts": None, "PortBindings": None, "RestartPolicy": "",
    "StartTime": UNSET, "FinishTime": UNSET, "HealthCheck": "",
    "RestartCount": 0}

PENDING, SCHEDULED, RUNNING, COMPLETED, FAILED = range(5)

# From which state a worker of the Go program goes to which.
MAY = {PENDING: (SCHEDULED,), SCHEDULED: (SCHEDULED, RUNNING, FAILED),
       RUNNING: (RUNNING, COMPLETED, FAILED, SCHEDULED), COMPLETED: (),
       FAILED: (SCHEDULED,)}

NODE = ["Name", "Ip", "Api", "Memory", "MemoryAllocated", "Disk",
        "DiskAllocated", "Stats", "Role", "TaskCount"]

MEM = """mem_total mem_free mem_available buffers cached swap_cached active
inactive active_anon inactive_anon active_file inactive_file unevictable
mlocked swap_total swap_free dirty write_back anon_pages mapped shmem slab
s_reclaimable s_unclaim kernel_stack page_tables nfs_unstable bounce
writeback_tmp commit_limit committed_as vmalloc_total vmalloc_used
vmalloc_chunk hardware_corrupted anon_huge_pages huge_pages_total
huge_pages_free huge_pages_rsvd huge_pages_surp hugepagesize direct_map_4k
direct_map_2M direct_map_1G""".split()
DISK = ["all", "used", "free", "freeInodes"]
CPU = ["id", "user", "nice", "system", "idle", "iowait", "irq", "softirq",
       "steal", "guest", "guest_nice"]
LOAD = ["last1min", "last5min", "last15min", "process_running",
        "process_total", "last_pid"]
STATS = {"MemStats": MEM, "DiskStats": DISK, "CpuStats": CPU,
         "LoadStats": LOAD}


def stats(task_count=0, cpu="idle", **mem):
    """GET /stats of a machine with 24 GB, of which one CPU adds all its ticks
    to that counter."""
    m = dict.fromkeys(MEM, 0)
    m.update(mem_total=24684096, mem_free=22959224, mem_available=24158876,
             buffers=15364, cached=1322288, active=693916, **mem)
    ticks = {"user": 87060, "idle": 106606}
    ticks[cpu] += int(time.monotonic() * 100)
    return {
        "MemStats": m,
        "DiskStats": {"all": 270553174016, "used": 19940401152,
                      "free": 250612772864, "freeInodes": 16318366},
        "CpuStats": {"id": "cpu", "user": ticks["user"], "nice": 0,
                     "system": 14858, "idle": ticks["idle"],
                     "iowait": 1419, "irq": 0, "softirq": 358, "steal": 3304,
                     "guest": 0, "guest_nice": 0},
        "LoadStats": {"last1min": 1.99, "last5min": 2.92, "last15min": 1.73,
                      "process_running": 8, "process_total": 195,
                      "last_pid": 23382},
        "TaskCount": task_count}


def task(**fields):
    """A Task as its manager delivers it: with an ID, Scheduled."""
    t = dict(TASK, ID=str(uuid.uuid4()), State=SCHEDULED)
    t.update(fields)
    return t


def event(of, state=RUNNING):
    """A TaskEvent; State is the wish: 2 runs the task, 3 stops it."""
    return {"ID": str(uuid.uuid4()), "State": state,
            "Timestamp": now(), "Task": of}


def now():
    t = datetime.datetime.now(datetime.timezone.utc)
    return t.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def text(value):
    """Compact JSON with a newline, `&<>` escaped, as it is written there."""
    out = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    for c in "&<>\u2028\u2029":
        out = out.replace(c, "\\u%04x" % ord(c))
    return (out + "\n").encode()


def holds(true, seconds=2.5):
    """It stays so for a while: what must not happen would by then have."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert true(), "it did not stay so"
        time.sleep(0.05)


class Caller:
    """Speaks HTTP as a program in Go does: on one connection that is kept,
    willing to get gzip."""

    def __init__(self, port):
        self.port = port
        self.connection = http.client.HTTPConnection("127.0.0.1", port,
                                                     timeout=20)

    def call(self, method, path, body=None, headers=None, is_chunked=False):
        """(status, headers, body as bytes)."""
        all_headers = {"User-Agent": "Go-http-client/1.1",
                       "Accept-Encoding": "gzip"}
        if body is not None:
            all_headers["Content-Type"] = "application/json"
        all_headers.update(headers or {})
        if isinstance(body, (dict, list)):
            body = text(body)
        if is_chunked:
            all_headers["Transfer-Encoding"] = "chunked"
            body = iter([body[i:i + 1000]
                         for i in range(0, len(body), 1000)])
        self.connection.request(
            method, path, body=body, headers=all_headers,
            encode_chunked=is_chunked)
        answer = self.connection.getresponse()
        return answer.status, answer.headers, answer.read()

    def get(self, path):
        status, _, body = self.call("GET", path)
        assert status == 200, (path, status, body)
        return json.loads(body)

    def close(self):
        self.connection.close()


class Page(http.server.BaseHTTPRequestHandler):
    """What runs in the containers of the worker below: a health check."""

    def do_GET(self):
        self.server.paths.append(self.path)
        self.send_response(200 if self.server.is_well else 500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    """The API of a worker of the Go program."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, value=None, body=b"", kind="application/json"):
        body = text(value) if value is not None else body
        is_chunked = len(body) > 2048
        self.send_response(status)
        if body:
            self.send_header("Content-Type", kind)
        if is_chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if is_chunked:
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def path_parts(self):
        """Without the query, which it knows nothing of."""
        return self.path.split("?")[0].strip("/").split("/")

    def no_route(self):
        self.answer(404, body=b"404 page not found\n",
                    kind="text/plain; charset=utf-8")

    def do_GET(self):
        worker, path = self.server.worker, self.path_parts()
        if path == ["tasks"]:
            worker.polls += 1
            tasks = worker.tasks()
            self.answer(200, tasks) if tasks else self.answer(
                200, body=b"null\n")
        elif path == ["stats"]:
            worker.readings += 1
            self.answer(200, stats(len(worker.tasks()), worker.cpu))
        else:
            self.no_route()

    def do_POST(self):
        if self.path_parts() != ["tasks"]:
            self.no_route()
            return
        try:
            given = json.loads(self.body())
            accepted = self.server.worker.post(given)
        except (ValueError, TypeError, KeyError) as error:
            self.answer(400, {"HTTPStatusCode": 400, "Message": str(error)})
            return
        self.answer(201, accepted)

    def do_DELETE(self):
        path = self.path_parts()
        is_known = len(path) == 2 and path[0] == "tasks" and \
            self.server.worker.delete(path[1])
        self.answer(204 if is_known else 404)


class Server(http.server.ThreadingHTTPServer):
    """Keeps its connections, so that all of them can be cut at once."""

    daemon_threads = True

    def __init__(self, *args):
        self.open = []
        super().__init__(*args)

    def get_request(self):
        connection, peer = super().get_request()
        self.open.append(connection)
        return connection, peer

    def handle_error(self, *_):
        pass

    def cut(self):
        self.shutdown()
        self.server_close()
        for connection in self.open:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class Worker:
    """A worker of the Go program, in so far as a manager can tell.

    What is posted goes into a queue, of which it takes one each `tick`
    seconds; only then is the task listed. State 1 removes the container that
    ContainerID names and starts another one; State 3 stops. It never starts
    a container that nobody asked for, and never refuses to start a second
    one: that there is one for each task is up to the manager.
    """

    def __init__(self, port=0, tick=0.1, host="127.0.0.1"):
        self.tick, self.host = tick, host
        self.lock = threading.RLock()
        self.db, self.queue = {}, []
        self.posts, self.deletes, self.polls = [], [], 0
        self.cpu, self.readings = "idle", 0
        self.containers = {}  # container ID: task ID
        self.most = 0         # containers of one task at once
        self.breaks = set()   # names of tasks whose containers do not start
        self.page = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
        self.page.daemon_threads = True
        self.page.is_well, self.page.paths = True, []
        self.serve(self.page)
        self.server = None
        self.port = port
        self.listen()
        self.is_open = True
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    @staticmethod
    def serve(server):
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()

    def listen(self):
        self.server = Server((self.host, self.port), Handler)
        self.server.worker = self
        self.port = self.server.server_port
        self.name = "%s:%d" % (self.host, self.port)
        self.serve(self.server)

    def vanish(self):
        """It answers no more. What it runs, runs on; listen() undoes it."""
        self.server.cut()
        self.server = None

    def close(self):
        self.is_open = False
        self.thread.join()
        if self.server:
            self.server.cut()
        self.page.shutdown()
        self.page.server_close()

    # The API

    def post(self, e):
        """A TaskEvent is decoded field by field: unknown ones are left out,
        wrong types refused; the task is echoed."""
        t = {k: e["Task"].get(k, v) for k, v in TASK.items()}
        for k, v in TASK.items():
            is_right = isinstance(t[k], (int, float)) if v == 0 else \
                isinstance(t[k], str) if isinstance(v, str) else \
                t[k] is None or isinstance(t[k], dict)
            if not is_right or isinstance(t[k], bool):
                raise ValueError("cannot unmarshal field " + k)
        t["ID"] = str(uuid.UUID(t["ID"]))
        uuid.UUID(e["ID"])
        with self.lock:
            self.posts.append(copy.deepcopy(e))
            self.queue.append(copy.deepcopy(t))
        return t

    def delete(self, task_id):
        with self.lock:
            self.deletes.append(task_id)
            if task_id not in self.db:
                return False
            self.queue.append(dict(self.db[task_id], State=COMPLETED))
            return True

    def tasks(self):
        with self.lock:
            return copy.deepcopy(list(self.db.values()))

    # What it does

    def work(self):
        while self.is_open:
            with self.lock:
                if self.queue:
                    self.take(self.queue.pop(0))
            end = time.monotonic() + self.tick
            while self.is_open and time.monotonic() < end:
                time.sleep(0.01)

    def take(self, t):
        have = self.db.setdefault(t["ID"], t)
        if have is not t and t["State"] not in MAY[have["State"]]:
            return  # "invalid transition", in its log
        if t["State"] == COMPLETED:
            self.containers.pop(t["ContainerID"], None)
            t["FinishTime"] = now()
        elif t["State"] == SCHEDULED:
            self.containers.pop(t["ContainerID"], None)
            self.start(t)
        self.db[t["ID"]] = t

    def start(self, t):
        if t["Name"] in self.breaks:
            t["State"] = FAILED
            return
        t["ContainerID"] = uuid.uuid4().hex * 2
        t["State"] = RUNNING
        self.containers[t["ContainerID"]] = t["ID"]
        running = list(self.containers.values())
        self.most = max(self.most, running.count(t["ID"]))
        if t["ExposedPorts"]:
            at = str(self.page.server_port)
            t["HostPorts"] = {port: [{"HostIp": "0.0.0.0", "HostPort": at},
                                     {"HostIp": "::", "HostPort": at}]
                              for port in t["ExposedPorts"]}
        else:
            t["HostPorts"] = {}

    def exit(self, task_id):
        """The container ends by itself: Failed, whatever its exit code, and
        the container stays."""
        with self.lock:
            self.db[task_id]["State"] = FAILED
