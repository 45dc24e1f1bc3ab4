# tfm.h: `make` builds the programs into build/, `make demo` writes a story, `make test` runs the tests.
# CC=clang, OPENMP=0 (one thread), CFLAGS=... as usual.

# The header is compiled once for the programs and once for the tests of its insides: two cores halve the time.
MAKEFLAGS += --jobs=$(shell nproc 2>/dev/null || echo 1)

CC ?= cc
CFLAGS ?= -O2
WARNINGS = -Wall -Wextra -Wpedantic -Wshadow -Wconversion
OPENMP ?= 1
ifeq ($(OPENMP),1)
# Only if the compiler and its OpenMP library are both there: without them everything works on one thread.
THREADS := $(shell echo 'int main(void) { return omp_get_max_threads() < 1; }' | \
	$(CC) -fopenmp -include omp.h -x c - -o /dev/null 2>/dev/null && echo -fopenmp)
endif
BUILD_C = $(CC) -std=c99 $(CFLAGS) $(WARNINGS) $(THREADS)

PROGRAMS = build/tfm build/gpt2 build/minimal build/embed build/fill-mask build/classify build/block build/translate \
	build/chat
TESTS = $(sort $(wildcard tests/test_*.c))
MODEL = examples/models/stories.tfm

.PHONY: all demo test fuzz clean
all: $(PROGRAMS)

# The implementation, which all programs share. (Each is complete without: cc -O2 -fopenmp examples/gpt2.c -lm)
build/tfm.o: tfm.h
	@mkdir -p build
	$(BUILD_C) -DTFM_IMPLEMENTATION -x c -c $< -o $@

BUILD_PROGRAM = $(BUILD_C) -DTFM_NO_IMPLEMENTATION $< build/tfm.o -o $@ -lm

build/tfm: tools/tfm.c tfm.h build/tfm.o
	$(BUILD_PROGRAM)

build/fill-mask: examples/fill_mask.c tfm.h build/tfm.o
	$(BUILD_PROGRAM)

build/%: examples/%.c tfm.h build/tfm.o
	$(BUILD_PROGRAM)

# A loadable extension for SQLite; needs its header (Debian: libsqlite3-dev), and so it is no part of `all`.
build/tfm_sqlite.so: examples/sqlite/tfm_sqlite.c tfm.h
	@mkdir -p build
	$(BUILD_C) -fPIC -shared $< -o $@ -lm

# A story, written as you watch.
PROMPT = Once upon a time, there was a little bear who
demo: build/gpt2
	@printf '%s' '$(PROMPT)'
	@build/gpt2 -m $(MODEL) -p '$(PROMPT)' -n 250 --temp 0.8 --top-k 40 --seed 7

build/test_objects/%.o: tests/%.c tests/test.h tfm.h
	@mkdir -p build/test_objects
	$(BUILD_C) -c $< -o $@

build/test_objects/test_main.o: BUILD_C += -DTFM_NO_IMPLEMENTATION

build/tests: $(TESTS:tests/%.c=build/test_objects/%.o) build/tfm.o
	$(CC) $(CFLAGS) $(THREADS) $^ -o $@ -lm -pthread

# For tests/test_header.sh.
build/header/implementation.o: tfm.h
	@mkdir -p build/header
	$(CC) -std=c99 $(WARNINGS) -DTFM_IMPLEMENTATION -x c -c $< -o $@

test: all build/tests build/header/implementation.o
	@sh tests/run.sh

# make fuzz SECONDS=60: each job for so long, two at a time. Needs clang; uses AFL++ if it is there.
SECONDS ?= 60
fuzz:
	@sh tests/fuzz/run.sh $(SECONDS)

clean:
	rm -rf build
