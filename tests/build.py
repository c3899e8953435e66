"""The ways to compile Cube that are meant to work, and the words of those
that are not."""

import os
import shutil
import subprocess
import tempfile
import unittest

import harness

CC = os.environ.get("CC", "cc")
CXX = os.environ.get("CXX", "c++")
USE = "int main(void) { return !cube_world_real(); }\n"
WHOLE = '#define CUBE_IMPLEMENTATION\n#include "cube.h"\n'

# What it shows, the compiler, flags, the source, words of the error or None.
ROWS = [
    ("header-only, no flags at all", CC, [], WHOLE + USE, None),
    ("as C11 without extensions", CC, ["-std=c11"], WHOLE + USE, None),
    ("as C17", CC, ["-std=c17"], WHOLE + USE, None),
    ("declarations first, the implementation later in the file", CC,
     ["-D_GNU_SOURCE"], '#include "cube.h"\n' + WHOLE + USE, None),
    ("the implementation asked for twice", CC, [], WHOLE + WHOLE + USE, None),
    ("a system header first, with the GNU names", CC, [],
     "#define _GNU_SOURCE\n#include <stdio.h>\n" + WHOLE + USE, None),
    ("a system header first, without them", CC, [],
     "#include <stdio.h>\n" + WHOLE + USE, "a system header came first"),
    ("in a C++ file", CXX, ["-x", "c++"], WHOLE + USE, "Cube is C"),
    ("all three of the memory functions", CC,
     ["-DCUBE_MALLOC(n)=malloc(n)", "-DCUBE_REALLOC(p,n)=realloc(p,n)",
      "-DCUBE_FREE(p)=free(p)"], WHOLE + USE, None),
    ("one of the memory functions", CC, ["-DCUBE_MALLOC(n)=malloc(n)"],
     WHOLE + USE, "or none"),
    ("without assertions", CC, ["-DNDEBUG", "-O2"], WHOLE + USE, None),
    ("an assertion of one's own", CC,
     ["-DCUBE_ASSERT(claim)=((claim) ? (void)0 : abort())"], WHOLE + USE,
     None),
    ("private to the file", CC, ["-DCUBE_API=static"], WHOLE + USE, None),
]


class Build(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="cube-build-")
        self.addCleanup(shutil.rmtree, self.dir)

    def path(self, name, text=None):
        full = os.path.join(self.dir, name)
        if text is not None:
            with open(full, "w", encoding="utf-8") as f:
                f.write(text)
        return full

    def compile(self, *argv):
        done = subprocess.run(
            argv, cwd=self.dir, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.STDOUT, check=False)
        return done.returncode, done.stdout

    def test_each_way(self):
        for what, cc, flags, text, error in ROWS:
            with self.subTest(what):
                source = self.path("program.c", text)
                code, words = self.compile(
                    cc, "-I" + harness.TOP, "-pthread", "-w", *flags, "-o",
                    self.path("program"), source)
                if error:
                    self.assertNotEqual(code, 0)
                    self.assertIn(error, words)
                    continue
                self.assertEqual(code, 0, words[:2000])
                self.assertEqual(self.compile(self.path("program"))[0], 0)

    def test_cube_c_compiles_bare(self):
        code, words = self.compile(CC, "-c", harness.TOP + "/cube.c", "-o",
                                   self.path("cube.o"))
        self.assertEqual((code, words), (0, ""))

    def test_two_files_of_one_program_use_it(self):
        one = self.path("one.c", WHOLE)
        two = self.path("two.c", '#include "cube.h"\n' + USE)
        code, words = self.compile(CC, "-w", "-pthread", "-I" + harness.TOP,
                                   "-o", self.path("program"), one, two)
        self.assertEqual(code, 0, words[:2000])
        self.assertEqual(self.compile(self.path("program"))[0], 0)

    def test_the_single_header_does_the_same(self):
        header = self.path("cube_single.h")
        code, words = self.compile(harness.TOP + "/tools/single", header)
        self.assertEqual(code, 0, words[:2000])
        with open(header, encoding="utf-8") as f:
            text = f.read()
        self.assertIn("MIT", text)
        self.assertNotIn('#include "cube.c"\n', text)

    def test_loop_and_helper_threads_do_not_race(self):
        """The tests of the loop, with its jobs and wakes, under a compiler
        that watches who touches what without the lock."""
        flags = [CC, "-w", "-g", "-fsanitize=thread", "-pthread", "-I" +
                 harness.TOP, "-o", self.path("program")]
        if self.compile(*flags, self.path(
                "nothing.c", "int main(void) { return 0; }\n"))[0]:
            self.skipTest(CC + " has no -fsanitize=thread")
        code, words = self.compile(*flags, harness.TOP + "/tests/t05_loop.c")
        self.assertEqual(code, 0, words[:2000])
        code, words = self.compile(self.path("program"))
        self.assertNotIn("ThreadSanitizer", words)
        self.assertEqual(code, 0, words)

    def test_no_name_but_cubes_own_leaves_the_object(self):
        obj = self.path("cube.o")
        self.compile(CC, "-w", "-c", harness.TOP + "/cube.c", "-o", obj)
        _, words = self.compile("nm", "--defined-only", "-g", obj)
        names = [line.split()[-1] for line in words.splitlines()]
        self.assertTrue(names)
        self.assertEqual([n for n in names if not n.startswith("cube_")], [])

    def test_the_object_holds_no_mutable_data(self):
        obj = self.path("cube.o")
        self.compile(CC, "-w", "-c", harness.TOP + "/cube.c", "-o", obj)
        _, words = self.compile("nm", "--format=sysv", "--defined-only", obj)
        sections = [(line.split("|")[0].strip(), line.split("|")[-1].strip())
                    for line in words.splitlines() if line.count("|") == 6]
        self.assertTrue(sections)
        state = [name for name, section in sections
                 if section.startswith((".data", ".bss", "*COM*")) and
                 not section.startswith(".data.rel.ro")]
        self.assertEqual(state, [])

    def make(self, *argv):
        code, words = self.compile("make", "-f", harness.TOP + "/Makefile",
                                   *argv)
        self.assertEqual(code, 0, words)
        return words

    def test_libcurl_is_added_to_what_is_built_already_and_then_kept(self):
        """`make` and then `make CUBE_WITH_CURL=1` had nothing to do, and the
        program then said that it was built without."""
        os.mkdir(self.path("examples"))
        self.path("cube.h", "")
        self.path("cube.c", "extern int cube; int cube;\n")
        self.path("examples/cube.c", "int main(void) { return 0; }\n")
        self.make()
        self.assertIn("Nothing to be done", self.make())
        for argv in (["all", "CUBE_WITH_CURL=1"], ["install", "DESTDIR=d"]):
            words = self.make("-n", *argv)
            self.assertIn("-DCUBE_WITH_CURL=1", words)
            self.assertRegex(words, r"-o examples/cube .* -lcurl")
            self.make("build/curl.mk")


if __name__ == "__main__":
    harness.main()
