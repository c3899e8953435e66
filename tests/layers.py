"""tools/layers finds what it says it finds: one wrong line for each check."""

import os
import shutil
import subprocess
import tempfile
import unittest

import harness

NAMES = ("World Ground JSON Store Loop HTTP Tasks Machine Runtimes "
         "Schedulers Worker Manager Client").split()

# What is wrong, the chapter it is put into, the line, words of the finding.
ROWS = [
    ("a chapter that is not listed", 6, "static int cube_bad(void) "
     "{ return cube_in_3(); }", "chapter 6 uses cube_in_3 of chapter 3"),
    ("a struct that is not listed", 6, "struct cube_bad { struct cube_s3 *p; };",
     "chapter 6 uses cube_s3 of chapter 3"),
    ("an enum constant that is not listed", 6,
     "enum { CUBE_BAD = CUBE_E3 };", "chapter 6 uses CUBE_E3 of chapter 3"),
    ("a macro that is not listed", 6, "#define CUBE_BAD CUBE_M3",
     "chapter 6 uses CUBE_M3 of chapter 3"),
    ("a system call", 4, "static int cube_bad(void) "
     "{ return read(0, (void *)0, 0); }", "chapter 4 calls read"),
    ("one beside a member of its name", 4, "static int cube_bad(struct cube_w"
     " *w) { return w->close ? close(0) : 1; }", "chapter 4 calls close"),
    ("one in parentheses", 4, "static int cube_bad(void) "
     "{ return (close)(0); }", "chapter 4 reaches for close"),
    ("one behind a star", 4, "static int cube_bad(void) "
     "{ return (*close)(0); }", "chapter 4 reaches for close"),
    ("one that is kept", 4, "static int cube_bad(void) "
     "{ int (*f)(int) = close; return f(0); }", "chapter 4 reaches for close"),
    ("one in a table", 4, "static int (*const cube_bad[])(int) = { close };",
     "chapter 4 reaches for close"),
    ("one handed on", 4, "static int cube_bad(int (*f)(int (*g)(int))) "
     "{ return f(close); }", "chapter 4 reaches for close"),
    ("one with a new name", 4, "#define CUBE_BAD close",
     "chapter 4 reaches for close"),
    ("one with a new name, in parentheses", 4, "#define CUBE_BAD (close)",
     "chapter 4 reaches for close"),
    ("one in two pieces", 4, "#define CUBE_BAD(a, b) a##b",
     "chapter 4 makes names"),
    ("one in assembler", 4, "static void cube_bad(void) "
     "{ __asm__ volatile (\"syscall\"); }", "chapter 4 reaches for __asm__"),
    ("the World's own, not asked through its table", 4, "static int "
     "cube_bad(void) { return cube_in_1(); }",
     "chapter 4 goes round the table with cube_in_1"),
    ("a clock", 4, "static long cube_bad(void) { return time(0); }",
     "chapter 4 calls time"),
    ("a file of stdio", 4, "static void cube_bad(FILE *f) { (void)f; }",
     "chapter 4 reaches for FILE"),
    ("a header of the machine", 4, "#include <sys/socket.h>",
     "chapter 4 includes sys/socket.h"),
    ("mutable state", 4, "static int cube_bad;", "cube_bad is mutable"),
    ("a mutable pointer to what is constant", 4,
     "static const char *cube_bad = \"\";", "cube_bad is mutable"),
    ("a mutable table whose rows point to what is constant", 4,
     "static struct cube_row { const char *const p; } cube_bad[] = {{0}};",
     "cube_bad is mutable"),
    ("a mutable pointer to a function of constants", 4,
     "static int (*cube_bad)(const char *p);", "cube_bad is mutable"),
    ("a mutable object without a name", 4,
     "static int *const cube_bad = (int[2]){0};",
     "cube_bad points to a mutable literal"),
    ("a mutable static in a macro", 4, "#define CUBE_BAD static int n;",
     "CUBE_BAD hides a static"),
    ("a mutable static inside", 4, "static int cube_bad(void) "
     "{ static int n; return ++n; }", "cube_bad keeps a mutable static"),
    ("a static declared ahead", 4, "static int cube_bad(void);",
     "cube_bad is declared ahead"),
    ("a function that is neither static nor public", 4,
     "int cube_bad(void) { return 0; }", "neither static nor CUBE_API"),
    ("a name without prefix", 4, "static int bad(void) { return 0; }",
     "bad has no prefix"),
    ("a comment with a stale name", 4, "/* see cube_gone_away */",
     "names cube_gone_away"),
    ("a function of 101 lines", 4, "static void cube_bad(void) {\n" +
     ";\n" * 99 + "}", "cube_bad has 101 lines"),
    ("61 lines without a reason", 4, "static void cube_bad(void) {\n" +
     ";\n" * 59 + "}", "without /* long: why */"),
    ("81 columns", 4, "/* " + "x" * 75 + " */", "81 columns"),
    ("a tab", 4, "/*\tx */", "a tab"),
    ("sixteen conditionals", 4, "#if 1\n#endif\n" * 16, "16 #if"),
]

# What must not be found.
FINE = [
    "static int cube_ok(void) { return cube_in_2(); }",
    "static const int cube_ok[] = { 1, 2 };",
    "static const char *const cube_ok[] = { \"a\" };",
    "static const struct cube_row { const char *p; } cube_ok[] = {{0}};",
    "static int cube_ok(int (*read)(void)) { return read(); }",
    "struct cube_w { int (*open)(int); };\n"
    "static int cube_ok(struct cube_w *w) { return w->open(1); }",
    "static int cube_ok(int n); /* mutual recursion */",
    "static int (*const cube_ok)(const char *p) = 0;",
    "static const int *const cube_ok = (const int[2]){1, 2};",
    "static int cube_ok(int *p) { int *a = p, *link; link = a; "
    "return *link; }",
    "struct cube_w { const char *name, *listen; };",
    "#define CUBE_OK(link) ((link)->next)",
    "/* read(2) and cube_in_* are only named */",
    "static const char *cube_ok(void) { return \"open(\"; }",
    "static void cube_ok(void) {\n/* long: a table */\n" + ";\n" * 59 + "}",
    "static int cube_ok(void) { static const int t[] = { 1 }; return t[0]; }",
]


def source(chapter, line):
    """A cube.c of fourteen chapters, with `line` in one of them."""
    text = "/* ==== Chapter 0. Preface ==== uses: nothing ==== */\n/*\n"
    for n, name in enumerate(NAMES, 1):
        text += " *   %-2d %-12s what it is\n" % (n, name)
    text += " */\n"
    for n, name in enumerate(NAMES, 1):
        text += "/* ==== Chapter %d. %s ==== uses: %s ==== */\n" % (
            n, name, "1 2" if n > 2 else "nothing")
        text += "/*\n" + " *\n" * 30 + " */\n"
        text += ("static int cube_in_%d(void) { return 0; }\n"
                 "struct cube_s%d { int n; };\n"
                 "enum { CUBE_E%d = 1 };\n"
                 "#define CUBE_M%d 1\n" % (n, n, n, n))
        if n == chapter:
            text += line + "\n"
    return text


class Layers(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="cube-layers-")
        self.addCleanup(shutil.rmtree, self.dir)
        os.mkdir(os.path.join(self.dir, "tools"))
        shutil.copy(os.path.join(harness.TOP, "tools", "layers"),
                    os.path.join(self.dir, "tools"))

    def findings(self, chapter=0, line=""):
        with open(os.path.join(self.dir, "cube.c"), "w",
                  encoding="utf-8") as f:
            f.write(source(chapter, line))
        with open(os.path.join(self.dir, "cube.h"), "w",
                  encoding="utf-8") as f:
            for n, name in enumerate(NAMES, 1):
                f.write("/* ==== Chapter %d. %s ==== */\n" % (n, name))
        done = subprocess.run([os.path.join(self.dir, "tools", "layers")],
                              stdout=subprocess.PIPE, text=True, check=False)
        found = [x for x in done.stdout.splitlines() if x.startswith("cube")]
        self.assertEqual(done.returncode, 1 if found else 0, done.stdout)
        return found

    def test_a_good_source_passes(self):
        self.assertEqual(self.findings(), [])

    def test_each_fault_is_found_and_nothing_else(self):
        for what, chapter, line, words in ROWS:
            with self.subTest(what):
                found = self.findings(chapter, line)
                self.assertTrue(any(words in x for x in found), found)
                self.assertEqual(len(found), 1, found)

    def test_what_is_allowed_is_not_found(self):
        for line in FINE:
            with self.subTest(line):
                self.assertEqual(self.findings(4, line), [])


if __name__ == "__main__":
    harness.main()
