# Cube, by plain make. `make help` lists the targets.
#
# The library is cube.c and needs none of this: cc -c cube.c works bare.
# What is built stands in build/ and examples/; tests are found by their
# names, so that a new file needs no line here:
#
#     examples/NAME.c       a program; linked with cube.o
#     tests/tNN_*.c         a suite that includes cube.c (through test.h)
#     tests/embed_*.c       a suite that includes what it needs by itself
#     tests/link_*.c, .cc   a suite that is linked with cube.o
#     tests/sim.c           the simulator, a suite too
#     tests/*.py            a suite in python3 (not harness*.py)
#     tests/fuzz_*.c        a fuzz target, its corpus in tests/corpus/*
#     tools/bench, else     the benchmarks; each builds what it needs
#     tools/bench_*
#
# Set CC, CFLAGS, PREFIX, DESTDIR as usual; CUBE_WITH_CURL=1 adds libcurl, from
# then on, until make clean.

CFLAGS   ?= -O2 -g
CXX      ?= c++
PREFIX   ?= /usr/local
BUILD    ?= build
EXAMPLES ?= examples
FUZZ_SECONDS ?= 20
JOBS     ?= $(shell nproc)

WARN = -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wundef \
       -Wmissing-prototypes -Wstrict-prototypes
BASE = -std=c11 -pthread -I.
TEST_CFLAGS ?= -O0 -g
COMPILE = $(CC) $(BASE) $(WARN) $(CPPFLAGS) $(CFLAGS) -MMD -MP
COMPILE_TEST = $(CC) $(BASE) $(WARN) -Wno-unused-function $(CPPFLAGS) \
               $(TEST_CFLAGS) -MMD -MP
LINK = $(LDFLAGS) $(LDLIBS)
SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=undefined \
           -fno-omit-frame-pointer

# Remembered in build/, so that what was built without is built anew, and that
# `make install` installs what was built.
-include $(wildcard $(BUILD)/curl.mk)
ifeq ($(CUBE_WITH_CURL),1)
CPPFLAGS += -DCUBE_WITH_CURL=1
LDLIBS   += -lcurl
$(BUILD)/cube.o: $(BUILD)/curl.mk
endif

examples := $(patsubst examples/%.c,$(EXAMPLES)/%,$(wildcard examples/*.c))
suites   := $(patsubst tests/%.c,$(BUILD)/tests/%,$(wildcard tests/t[0-9]*.c \
              tests/embed_*.c tests/link_*.c)) \
            $(patsubst tests/%.cc,$(BUILD)/tests/%,$(wildcard tests/*.cc)) \
            $(BUILD)/tests/sim
scripts  := $(filter-out tests/harness%.py,$(wildcard tests/*.py))
fuzzers  := $(patsubst tests/%.c,$(BUILD)/%,$(wildcard tests/fuzz_*.c))
benches  := $(or $(wildcard tools/bench), \
              $(filter-out %.c,$(wildcard tools/bench_*)))

.PHONY: all test sim sim-mutants build-tests asan valgrind crash fuzz bench \
        bench-store lint single static install clean help demo
.DEFAULT_GOAL := all
.DELETE_ON_ERROR:

all: $(examples)                ## build examples/cube and the other examples

$(BUILD)/curl.mk:
	@mkdir -p $(@D)
	@echo 'CUBE_WITH_CURL ?= 1' > $@

$(BUILD)/cube.o: cube.c cube.h
	@mkdir -p $(@D)
	$(COMPILE) -c -o $@ $<

$(EXAMPLES)/%: examples/%.c $(BUILD)/cube.o
	@mkdir -p $(@D) $(BUILD)/examples
	$(COMPILE) -MF $(BUILD)/examples/$*.d -o $@ $< $(BUILD)/cube.o $(LINK)

$(BUILD)/tests/link_%: tests/link_%.c $(BUILD)/cube.o
	@mkdir -p $(@D)
	$(COMPILE_TEST) -o $@ $< $(BUILD)/cube.o $(LINK)

$(BUILD)/tests/link_%: tests/link_%.cc $(BUILD)/cube.o
	@mkdir -p $(@D)
	$(CXX) -pthread -I. -Wall -Wextra $(TEST_CFLAGS) -MMD -MP -o $@ $< \
	    $(BUILD)/cube.o $(LINK)

$(BUILD)/tests/sim: TEST_CFLAGS += -O2

$(BUILD)/tests/%: tests/%.c
	@mkdir -p $(@D)
	$(COMPILE_TEST) -o $@ $< $(LINK)

$(BUILD)/fuzz_%: tests/fuzz_%.c
	@mkdir -p $(@D)
	clang $(BASE) -O1 -g $(CPPFLAGS) $(SANITIZE) -fsanitize=fuzzer -MMD -MP \
	    -o $@ $< $(LINK)

# Suites that measure times, or restart an engine, and so run by themselves.
alone    := sim faults.py disturb.py partition.py
# Scripts that look at sources and compilers, not at what was built here.
compiling := tests/build.py tests/layers.py

build-tests: $(examples) $(suites)

test:                           ## run all suites (TESTS="a b" for some)
	@$(MAKE) --no-print-directory -j$(JOBS) build-tests
	@CUBE_BIN=$(CURDIR)/$(EXAMPLES)/cube CUBE_BUILD=$(CURDIR)/$(BUILD) \
	    TEST_ALONE="$(alone)" \
	    tools/runtests $(or $(TESTS),$(suites) $(scripts))

# make sim SEED=7 [FAULTS=1,4] replays one with its trace; N=500 [FROM=1000]
# runs many; neither: the suite, SIM_SEEDS of them.
sim: $(BUILD)/tests/sim         ## simulated clusters: SEED=n, or N=n of them
	@$< $(if $(SEED),-s $(SEED) $(if $(FAULTS),-k $(FAULTS)), \
	    $(if $(N),-n $(N)) $(if $(FROM),-f $(FROM)))

# Each mutant must fail one of MUTANT_SEEDS seeds.
MUTANT_SEEDS ?= 2000
sim-mutants:                    ## what the simulator catches of tests/mutants
	@TIMEOUT=1800 tools/mutants run sh -c '$(CC) $(BASE) -w -O1 \
	    -o sim tests/sim.c && ./sim -x -n $(MUTANT_SEEDS)'

asan:                           ## the same under ASan and UBSan
	@UBSAN_OPTIONS=print_stacktrace=1 $(MAKE) --no-print-directory test \
	    BUILD=build/asan EXAMPLES=build/asan/examples \
	    scripts="$(filter-out $(compiling),$(scripts))" \
	    CFLAGS="-O1 -g $(SANITIZE)" TEST_CFLAGS="-O1 -g $(SANITIZE)"

# Left out: what runs for many minutes there (the sanitizers see it), and what
# needs processes as descriptors, which valgrind 3.19 does not know.
checked := $(filter-out %/t03_json %/t04_store %/t04_crash %/t04_faults \
             %/t04_bounds %/t09_engine, \
             $(filter $(BUILD)/tests/t%,$(suites)))
valgrind: $(checked)            ## C suites: leaks of memory and descriptors
	@TEST_WRAP="valgrind -q --leak-check=full --track-fds=yes \
	    --error-exitcode=9" \
	    tools/runtests $(or $(TESTS),$(checked))

# The state of a disk after a crash, N times; and a writer killed N / 1000
# times. What fails is printed with the command that repeats it.
crash: CRASHES = $(or $(N),1000000)
crash:                          ## N crashes of the store (1000000)
	@$(MAKE) --no-print-directory TEST_CFLAGS="-O2 -g" BUILD=build/crash \
	    build/crash/tests/t04_crash
	TEST_TIMEOUT=100000 CRASH_STATES=$(CRASHES) CRASH_SUBSETS=64 \
	    TEST_KILLS=$$(($(CRASHES) / 1000)) build/crash/tests/t04_crash

fuzz: $(fuzzers)                ## each fuzz target for FUZZ_SECONDS
	@tools/fuzz $(FUZZ_SECONDS) $(fuzzers)

bench-store:                    ## the store beside its peers (ROWS="get scan")
	@tools/bench_store $(ROWS)

bench: all                      ## the figures, each beside its bar
	@for bench in $(benches); do $$bench || exit 1; done

lint:                           ## layers, warnings, style
	@CC="$(CC)" tools/lint

single:                         ## build/cube_single.h, all in one header
	@mkdir -p build
	tools/single build/cube_single.h

static: build/cube-static       ## build/cube-static, a static binary

# glibc warns that a static getaddrinfo needs its libraries at run time:
# names then resolve only where the same glibc is installed. musl has no
# such limit, and is taken where it is there. Neither comes with a libcurl.
MUSL := $(shell command -v musl-gcc)
bare  = $(filter-out -DCUBE_WITH_CURL=1,$(CPPFLAGS))
plain = $(if $(filter 1,$(CUBE_WITH_CURL)),cube.c,$(BUILD)/cube.o)
build/cube-static: examples/cube.c cube.c cube.h
	@mkdir -p build
	$(or $(MUSL),$(CC)) $(BASE) $(bare) -Os -static -s -ffunction-sections \
	    -fdata-sections -Wl,--gc-sections -o $@ examples/cube.c cube.c

$(BUILD)/fetch $(BUILD)/mkimage: $(BUILD)/%: tools/%.c $(BUILD)/cube.o
	$(COMPILE) -o $@ $< $(BUILD)/cube.o $(LINK)

# What runs in an image that holds nothing else. It looks up no names, so
# what a static glibc has to say of that (see above) does not matter.
$(BUILD)/static/echo: examples/echo.c $(plain)
	@mkdir -p $(@D)
	@$(CC) $(BASE) $(CFLAGS) -static -o $@ $^ 2>$@.log || \
	    { cat $@.log; false; }

demo: all $(BUILD)/fetch $(BUILD)/mkimage $(BUILD)/static/echo ## see a cluster at work
	@tools/demo

install: all                    ## to DESTDIR and PREFIX (/usr/local)
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/include
	install -m 755 examples/cube $(DESTDIR)$(PREFIX)/bin/cube
	install -m 644 cube.h cube.c $(DESTDIR)$(PREFIX)/include

clean:                          ## remove what was built
	rm -rf build $(patsubst %.c,%,$(wildcard examples/*.c))

help:                           ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /  \1\t/p' Makefile | expand -t 14

-include $(wildcard $(BUILD)/*.d $(BUILD)/tests/*.d $(BUILD)/examples/*.d)
