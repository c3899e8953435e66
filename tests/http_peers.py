"""HTTP against other people's: our server with curl and Python's client, our
client with Python's server. The server is examples/echo, the client is
examples/fetch."""

import http.client
import http.server
import os
import shutil
import socket
import socketserver
import subprocess
import tempfile
import threading
import unittest

import harness

ECHO = os.path.join(harness.EXAMPLES, "echo")
FETCH = os.path.join(harness.EXAMPLES, "fetch")


class Echo(unittest.TestCase):
    def setUp(self):
        self.port = harness.free_port()
        self.url = "http://127.0.0.1:%d" % self.port
        self.echo = harness.Process(ECHO, str(self.port))
        self.addCleanup(self.echo.close)
        harness.wait_until("echo listens", self.answers)

    def answers(self):
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
            return True
        except OSError:
            return False

    def curl(self, *argv, stdin=b""):
        if not shutil.which("curl"):
            self.skipTest("no curl")
        done = subprocess.run(("curl", "-sS", "-m", "10") + argv,
                              input=stdin, capture_output=True)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        return done.stdout.decode()

    def test_curl_gets_a_page(self):
        page = self.curl("-i", self.url + "/")
        self.assertIn("HTTP/1.1 200 OK\r\n", page)
        self.assertIn("port %d" % self.port, page)

    def test_curl_gets_a_head(self):
        page = self.curl("-I", self.url + "/health")
        self.assertIn("Content-Length: 5\r\n", page)
        self.assertNotIn("well", page)

    def test_curl_speaks_http_1_0(self):
        page = self.curl("-i", "--http1.0", self.url + "/health")
        self.assertIn("Connection: close\r\n", page)
        self.assertTrue(page.endswith("well\n"))

    def test_curl_uses_its_connection_again(self):
        said = self.curl("-w", "%{num_connects} ", "-o", "/dev/null",
                         self.url + "/", "-o", "/dev/null", self.url + "/")
        self.assertEqual(said, "1 0 ")

    def test_curl_uploads_in_chunks(self):
        said = self.curl("-i", "-T", "-", "-X", "POST",
                         "-H", "Transfer-Encoding: chunked",
                         self.url + "/health", stdin=b"x" * 100000)
        self.assertIn("405 Method Not Allowed", said)
        self.assertIn("Allow: GET, HEAD", said)

    def test_curl_reaches_it_by_ipv6_and_name(self):
        for host in "localhost", "[::1]":
            try:
                said = self.curl("http://%s:%d/health" % (host, self.port))
            except AssertionError:
                if host == "[::1]" and not socket.has_ipv6:
                    continue
                raise
            self.assertEqual(said, "well\n")

    def test_python_keeps_a_connection(self):
        kept = http.client.HTTPConnection("127.0.0.1", self.port)
        self.addCleanup(kept.close)
        kept.connect()
        name = kept.sock.getsockname()
        for method, target, status in [("GET", "/", 200),
                                       ("GET", "/none", 404),
                                       ("HEAD", "/health", 200),
                                       ("DELETE", "/", 405)] * 50:
            kept.request(method, target)
            answer = kept.getresponse()
            answer.read()
            self.assertEqual(answer.status, status)
        self.assertEqual(kept.sock.getsockname(), name)

    def test_health_and_its_end(self):
        self.assertEqual(self.curl(self.url + "/health"), "well\n")
        self.curl(self.url + "/sick")
        self.assertIn("500 Internal", self.curl("-i", self.url + "/health"))
        self.assertEqual(self.curl(self.url + "/exit?code=7"), "bye\n")
        self.assertEqual(self.echo.wait(), 7)

    def test_sigterm_ends_it(self):
        self.echo.kill(15)
        self.assertEqual(self.echo.wait(), 0)

    def test_a_taken_port_is_said(self):
        done = subprocess.run([ECHO, str(self.port)], capture_output=True,
                              timeout=10)
        self.assertEqual(done.returncode, 1)
        self.assertIn(b"in use", done.stderr)

    def test_ports_come_from_the_environment(self):
        port = harness.free_port()
        env = dict(os.environ, CUBE_PORT_7777=str(port), PORT="1")
        with harness.Process(ECHO, env=env):
            harness.wait_until("echo listens", lambda: subprocess.run(
                [FETCH, "localhost:%d" % port, "/health"],
                capture_output=True).stdout == b"well\n")


class Page(http.server.BaseHTTPRequestHandler):
    """Answers in each of the ways that a body can end."""

    def say(self, *fields, body=b""):
        self.send_response(200)
        for name, value in fields:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/chunked":
            self.say(("Transfer-Encoding", "chunked"))
            for piece in b"one ", b"two ", b"x" * 50000:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")
        elif self.path == "/open":
            self.close_connection = True
            self.say(body=b"to the end")
        elif self.path == "/early":
            self.close_connection = True
            self.say(("Content-Length", "100"), body=b"not all")
        else:
            body = ("%s %s" % (self.path, self.headers["Host"])).encode()
            self.say(("Content-Length", str(len(body))), body=body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        body = self.headers["Content-Type"].encode() + b" " + body
        self.say(("Content-Length", str(len(body))), body=body)

    def do_HEAD(self):
        self.say(("Content-Length", "1000"))

    def log_message(self, *_):
        pass


class UnixPages(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    def get_request(self):
        request, _ = self.socket.accept()
        return request, ("local", 0)


class Fetch(unittest.TestCase):
    def serve(self, protocol="HTTP/1.1"):
        page = type("P", (Page,), {"protocol_version": protocol})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), page)
        self.start(server)
        return "http://127.0.0.1:%d" % server.server_port

    def start(self, server):
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,),
                         daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)

    def fetch(self, *argv):
        done = subprocess.run((FETCH,) + argv, capture_output=True,
                              timeout=20)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def test_each_kind_of_body(self):
        for protocol in "HTTP/1.0", "HTTP/1.1":
            base = self.serve(protocol)
            host = base[len("http://"):]
            with self.subTest(protocol):
                self.assertEqual(self.fetch(base, "/a?b=c"),
                                 (0, "/a?b=c " + host, "200\n"))
                self.assertEqual(self.fetch(base, "/open"),
                                 (0, "to the end", "200\n"))
                self.assertEqual(self.fetch(base, "/x", "HEAD"),
                                 (0, "", "200\n"))
                self.assertEqual(self.fetch(base, "/", "POST", "{}"),
                                 (0, "application/json {}", "200\n"))
        code, said, _ = self.fetch(base, "/chunked")
        self.assertEqual((code, said), (0, "one two " + "x" * 50000))

    def test_an_answer_that_is_cut(self):
        code, said, words = self.fetch(self.serve(), "/early")
        self.assertEqual((code, said), (3, "not all"))
        self.assertIn("in the middle of the answer", words)

    def test_unknown_methods_and_nobody(self):
        code, _, words = self.fetch(self.serve(), "/", "PUT", "x")
        self.assertEqual((code, words), (1, "501\n"))
        code, _, words = self.fetch(
            "http://127.0.0.1:%d" % harness.free_port(), "/")
        self.assertEqual(code, 3)
        self.assertIn("Connection refused", words)

    def test_a_unix_socket(self):
        directory = tempfile.mkdtemp(prefix="cube-http-")
        self.addCleanup(shutil.rmtree, directory)
        page = type("P", (Page,), {"protocol_version": "HTTP/1.1"})
        path = os.path.join(directory, "s")
        self.start(UnixPages(path, page))
        self.assertEqual(self.fetch("unix://" + path, "/a"),
                         (0, "/a localhost", "200\n"))


if __name__ == "__main__":
    harness.main()
