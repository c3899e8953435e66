"""A Docker Engine for tests that want one without having one: its API on a
unix socket, containers that are only records, and the faults on demand.
"""

import http.server
import json
import re
import shutil
import socketserver
import tempfile
import threading
import urllib.parse
import uuid


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

    def get_request(self):
        connection, _ = super().get_request()
        return connection, ("unix", 0)

    def handle_error(self, *_):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, status, value=None, text=None):
        body = json.dumps(value) if value is not None else text or ""
        self.send_response(status)
        self.send_header("Api-Version", self.server.engine.api)
        self.send_header("Server", "Docker/1.12 (linux)")
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        if value is not None:
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(body.encode())

    def handle_any(self):
        engine = self.server.engine
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urllib.parse.urlsplit(self.path)
        query = {k: v[0] for k, v in
                 urllib.parse.parse_qs(url.query).items()}
        match = re.match(r"/v(\d+)\.(\d+)(/.*)", url.path)
        path = match.group(3) if match else url.path
        if match:
            version = int(match.group(1)), int(match.group(2))
            if version > tuple(map(int, engine.api.split("."))):
                engine.too_new += 1
                self.send(400, text="client is newer than server (client "
                          "API version: %d.%d, server API version: %s)\n" %
                          (*version, engine.api))
                return
        engine.asked.append((self.command, path))
        for method, pattern, fn in Engine.ROUTES:
            found = re.fullmatch(pattern, path)
            if method == self.command and found:
                fn(engine, self, query, json.loads(body) if body else None,
                   *found.groups())
                return
        self.send(404, {"message": "page not found"})

    do_GET = do_POST = do_DELETE = do_HEAD = handle_any


class Engine:
    def __init__(self, api="1.24", images=()):
        self.api, self.images = api, set(images)
        self.asked, self.too_new, self.pulled = [], 0, []
        self.containers = {}
        self.changed = threading.Condition()
        self.events = []
        self.is_open = True
        self.dir = tempfile.mkdtemp(prefix="cube-engine-")
        self.where = "unix://%s/docker.sock" % self.dir
        self.server = Server(self.where[7:], Handler)
        self.server.engine = self
        threading.Thread(target=self.server.serve_forever,
                         args=(0.02,)).start()

    def close(self):
        with self.changed:
            self.is_open = False
            self.changed.notify_all()
        self.server.shutdown()
        self.server.server_close()
        shutil.rmtree(self.dir)

    def running(self):
        return [c for c in self.containers.values() if c["Running"]]

    def tell(self, action, c):
        with self.changed:
            self.events.append({
                "Type": "container", "Action": action, "status": action,
                "id": c["Id"], "Actor": {"ID": c["Id"],
                                         "Attributes": c["Labels"]}})
            self.changed.notify_all()

    # What happens behind everybody's back

    def exit(self, c, code=0):
        c.update(Running=False, Status="exited", ExitCode=code)
        self.tell("die", c)

    def remove_by_hand(self, c):
        """docker rm -f"""
        self.exit(c, 137)
        del self.containers[c["Id"]]
        self.tell("destroy", c)

    # The API

    def ping(self, h, _query, _body):
        h.send(200, text="OK")

    def info(self, h, _query, _body):
        h.send(200, {"ID": "FAKE:" + self.dir, "ServerVersion": "1.12.6"})

    def version(self, h, _query, _body):
        h.send(200, {"Version": "1.12.6", "ApiVersion": self.api})

    def list(self, h, query, _body):
        labels = json.loads(query.get("filters", "{}")).get("label", [])
        found = []
        for c in list(self.containers.values()):
            have = ["%s=%s" % i for i in c["Labels"].items()] + \
                list(c["Labels"])
            if all(label in have for label in labels):
                found.append({"Id": c["Id"], "Names": ["/" + c["Name"]],
                              "Image": c["Image"], "Labels": c["Labels"],
                              "State": c["Status"], "Status": c["Status"]})
        h.send(200, found)

    def pull(self, h, query, _body):
        name = query["fromImage"]
        if "tag" in query:
            name += ":" + query["tag"]
        self.pulled.append(name)
        h.send(404, {"message": "pull access denied for %s, repository does "
                     "not exist" % name})

    def create(self, h, query, body):
        name = query.get("name", uuid.uuid4().hex[:8])
        if body["Image"] not in self.images:
            h.send(404, {"message": "No such image: " + body["Image"]})
        elif name in [c["Name"] for c in self.containers.values()]:
            h.send(409, {"message": "Conflict. The container name \"/%s\" is "
                         "already in use" % name})
        else:
            c = {"Id": uuid.uuid4().hex * 2, "Name": name,
                 "Image": body["Image"], "Labels": body.get("Labels") or {},
                 "Status": "created", "Running": False, "ExitCode": 0}
            self.containers[c["Id"]] = c
            self.tell("create", c)
            h.send(201, {"Id": c["Id"], "Warnings": None})

    def one(self, h, name):
        c = self.containers.get(name)
        if not c:
            h.send(404, {"message": "No such container: " + name})
        return c

    def inspect(self, h, _query, _body, name):
        c = self.one(h, name)
        if c:
            h.send(200, {
                "Id": c["Id"], "Name": "/" + c["Name"],
                "Created": "2025-03-01T10:00:00Z",
                "State": {"Status": c["Status"], "Running": c["Running"],
                          "Paused": False, "Restarting": False,
                          "OOMKilled": False, "Dead": False, "Pid": 0,
                          "ExitCode": c["ExitCode"], "Error": "",
                          "StartedAt": "2025-03-01T10:00:00Z",
                          "FinishedAt": "0001-01-01T00:00:00Z"},
                "Config": {"Image": c["Image"], "Labels": c["Labels"]},
                "HostConfig": {}, "NetworkSettings": {"Ports": None}})

    def start(self, h, _query, _body, name):
        c = self.one(h, name)
        if c:
            c.update(Running=True, Status="running")
            self.tell("start", c)
            h.send(204)

    def stop(self, h, _query, _body, name):
        c = self.one(h, name)
        if c:
            was = c["Running"]
            if was:
                self.exit(c, 143)
            h.send(204 if was else 304)

    def delete(self, h, _query, _body, name):
        c = self.one(h, name)
        if c:
            del self.containers[name]
            self.tell("destroy", c)
            h.send(204)

    def follow(self, h, _query, _body):
        h.send_response(200)
        h.send_header("Content-Type", "application/json")
        h.send_header("Transfer-Encoding", "chunked")
        h.end_headers()
        at = len(self.events)
        h.wfile.flush()
        while True:
            with self.changed:
                while at == len(self.events) and self.is_open:
                    self.changed.wait()
                if not self.is_open:
                    return
                line = (json.dumps(self.events[at]) + "\n").encode()
            at += 1
            h.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            h.wfile.flush()

    ID = "/containers/([^/]+)"
    ROUTES = [
        ("GET", "/_ping", ping), ("HEAD", "/_ping", ping),
        ("GET", "/info", info), ("GET", "/version", version),
        ("GET", "/containers/json", list), ("GET", "/events", follow),
        ("POST", "/images/create", pull),
        ("POST", "/containers/create", create),
        ("GET", ID + "/json", inspect), ("POST", ID + "/start", start),
        ("POST", ID + "/stop", stop), ("POST", ID + "/kill", stop),
        ("DELETE", ID, delete)]
