/* The tests' small framework. A test is a function `static void name(void)` full of CHECKs; each file has one function
 * that runs its tests, and test_main.c calls those. */
#ifndef TEST_H
#define TEST_H

#include "../tfm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern int test_passed, test_failed;

/* One check: counted, and reported with its place if it fails. */
int test_check(int good, const char *file, int line, const char *format, ...);
#define CHECK(condition) test_check((condition) != 0, __FILE__, __LINE__, "%s", #condition)
#define CHECK_MSG(condition, ...) test_check((condition) != 0, __FILE__, __LINE__, __VA_ARGS__)

/* The largest difference is at most `tolerance` times the largest expected value. */
void test_close(const float *found, const float *expected, size_t n, double tolerance, const char *file, int line,
                const char *what);
#define CHECK_CLOSE(found, expected, n, tolerance, what)                                                               \
    test_close(found, expected, n, tolerance, __FILE__, __LINE__, what)

/* Deterministic numbers, uniform in [-1, 1). */
void test_fill(float *values, size_t n, uint64_t seed);

/* The demo model; also what tests that need any real model use. */
#define TEST_MODEL "examples/models/stories.tfm"

#endif
