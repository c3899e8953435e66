"""What the Python suites share: the closing line, ports, engines, processes.

A suite is a file tests/NAME.py of unittest classes that ends with

    if __name__ == "__main__":
        harness.main()

main() runs them, prints the reasons of what was skipped as `SKIPPED ...`,
and as last line `N passed, N failed, N skipped`. A test or class that needs
an engine calls harness.need("DOCKER") (or PODMAN, REGISTRY, PRIVATE): it
gives the variable's value, and skips where there is none; with
CUBE_TEST_ENGINE=required it fails instead.
"""

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.error
import urllib.request

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CUBE = os.environ.get("CUBE_BIN", os.path.join(TOP, "examples", "cube"))
EXAMPLES = os.path.dirname(CUBE)
IMAGE = os.environ.get("CUBE_TEST_IMAGE", "cube-test/busybox:latest")


def need(what):
    """The value of CUBE_TEST_<what>; skips (or fails) without it."""
    value = os.environ.get("CUBE_TEST_" + what)
    if value:
        return value
    if os.environ.get("CUBE_TEST_ENGINE") == "required":
        raise AssertionError("CUBE_TEST_%s is required and not set" % what)
    raise unittest.SkipTest("no %s (see tools/engine)" % what.lower())


def free_port():
    """A TCP port of loopback that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until(what, true, timeout=20.0, step=0.02):
    """Calls true() until it gives something true, and gives that back."""
    end = time.monotonic() + timeout
    while True:
        value = true()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError("not within %g s: %s" % (timeout, what))
        time.sleep(step)


def http(method, url, body=None, headers=None, timeout=20):
    """One request: (status, headers, body as text). Body: dict or text."""
    data = json.dumps(body) if isinstance(body, (dict, list)) else body
    request = urllib.request.Request(
        url, method=method, headers=headers or {},
        data=data.encode() if isinstance(data, str) else data)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode()


def get(url, **more):
    """The parsed JSON of a GET, which must answer 200."""
    status, _, body = http("GET", url, **more)
    assert status == 200, "GET %s: %d %s" % (url, status, body)
    return json.loads(body)


class Process:
    """A program in a group of its own, its output in a file.

    Ends with the with block, and with it all that is left of its group.
    """

    def __init__(self, *argv, env=None, cwd=None):
        self.argv = [str(a) for a in argv]
        self.file = tempfile.TemporaryFile(prefix="cube-out-")
        self.process = subprocess.Popen(
            self.argv, stdin=subprocess.DEVNULL, stdout=self.file,
            stderr=subprocess.STDOUT, start_new_session=True, cwd=cwd,
            env=dict(os.environ, **(env or {})))
        self.pid = self.process.pid

    def output(self):
        """All that it printed so far."""
        size = os.fstat(self.file.fileno()).st_size
        return os.pread(self.file.fileno(), size, 0).decode(errors="replace")

    def is_running(self):
        return self.process.poll() is None

    def wait(self, timeout=30):
        return self.process.wait(timeout)

    def kill(self, number=signal.SIGKILL):
        """Sends it a signal; waits for its end after SIGKILL, SIGTERM."""
        if self.is_running():
            self.process.send_signal(number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            return self.wait()
        return None

    def close(self):
        if self.is_running():
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def run(*argv, stdin="", env=None, timeout=60, cwd=None):
    """Runs a program to its end: (exit code, stdout, stderr)."""
    done = subprocess.run(
        [str(a) for a in argv], input=stdin, text=True, timeout=timeout,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd,
        env=dict(os.environ, **(env or {})), check=False)
    return done.returncode, done.stdout, done.stderr


class _Result(unittest.TextTestResult):
    """Counts what passed, which unittest does not."""

    passed = 0

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1


def test_name(test):
    """Class.method; a subtest counts with the test that it is part of."""
    test = getattr(test, "test_case", test)
    return test.id().replace("__main__.", "")


def each_test(suite):
    """The test cases in a suite of suites."""
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from each_test(test)
        else:
            yield test


class _SideBySide(unittest.TestSuite):
    """Runs tests in threads: for those that mostly wait. They share nothing,
    and have no setUpClass."""

    def __init__(self, tests, jobs):
        super().__init__(tests)
        self.jobs = jobs

    def run(self, result, debug=False):
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda test: test(result), self))
        return result


def main(jobs=1):
    """Runs the calling file's tests (or those named on the command line),
    `jobs` of them at a time."""
    module = sys.modules["__main__"]
    loader = unittest.TestLoader()
    if len(sys.argv) > 1:
        suite = loader.loadTestsFromNames(sys.argv[1:], module)
    else:
        suite = loader.loadTestsFromModule(module)
    if jobs > 1:
        suite = _SideBySide(list(each_test(suite)), jobs)
    runner = unittest.TextTestRunner(
        stream=sys.stdout, resultclass=_Result, verbosity=1)
    result = runner.run(suite)
    for test, why in result.skipped:
        print("SKIPPED %s: %s" % (test.id(), why))
    failed = {test_name(t) for t, _ in result.failures + result.errors}
    for name in sorted(failed):
        print("run it alone: python3 %s %s" % (sys.argv[0], name))
    print("%d passed, %d failed, %d skipped" %
          (result.passed, len(failed), len(result.skipped)))
    sys.stdout.flush()
    sys.exit(1 if failed or result.testsRun + len(result.skipped) == 0 else 0)
