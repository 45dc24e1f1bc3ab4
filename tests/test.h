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

/* The same bits. */
void test_same(const float *found, const float *expected, size_t n, const char *file, int line, const char *what);
#define CHECK_SAME(found, expected, n, what) test_same(found, expected, n, __FILE__, __LINE__, what)

/* A call that must succeed; `error` is the tfm_error that it was given. */
#define CHECK_OK(call, error) test_check((call) == TFM_OK, __FILE__, __LINE__, "%s: %s", #call, (error).message)

/* What the tests can't go on without, as memory or a golden file: says so, and ends the program as a failed run. */
void test_fatal(const char *format, ...);
void *test_allocate(size_t size); /* malloc that succeeds */

/* A formatted text, for a check's message: valid until the next but three. */
const char *test_text(const char *format, ...);

/* Deterministic numbers, uniform in [-1, 1). */
void test_fill(float *values, size_t n, uint64_t seed);
/* One from 0 to n - 1, and the next state. */
size_t test_random(uint64_t *state, size_t n);

/* The instruction sets that this CPU runs; returns how many. */
size_t test_isas(tfm_isa isas[TFM_ISA_COUNT]);
tfm_engine *test_engine(tfm_isa isa, int threads);
/* A tfm_parallel_for that takes the indexes backwards: the result must not depend on the order. */
void test_backwards(void *user, size_t n, tfm_task task, void *argument);

/* The demo model; also what tests that need any real model use. */
#define TEST_MODEL "examples/models/stories.tfm"

/* ---- golden files: arrays by name, written by make_golden.py; test_main.c. A name is a format. What is missing is
 * fatal, but for golden_tensor, which returns no tensor. */

tfm_file *golden_open(const char *name); /* tests/golden/NAME.tfm */
tfm_tensor golden_tensor(const tfm_file *file, const char *format, ...);
const float *golden_floats(const tfm_file *file, size_t n, const char *format, ...);
const int32_t *golden_ints(const tfm_file *file, size_t *n, const char *format, ...); /* n may be NULL */
const unsigned char *golden_bytes(const tfm_file *file, size_t *n, const char *format, ...);

/* ---- an allocator that counts, and can be made to fail: test_memory.c */

typedef struct test_heap {
    size_t live;      /* allocations that were not given back */
    size_t count;     /* calls of `allocate` */
    size_t largest;   /* bytes of the largest request */
    size_t fail_at;   /* which call fails, counted from 1; 0: none */
    int fail_forever; /* 1: and all after it */
    size_t bad;       /* what was given back and had not come from here, or twice */
} test_heap;

tfm_allocator test_allocator(test_heap *heap);

/* ---- 16-bit floats by their definition: test_kernels.c */

float test_from_f16(uint16_t half);
uint16_t test_to_f16(float value); /* to the nearest, ties to even */
uint16_t test_to_bf16(float value);

/* ---- small .tfm files: test_file.c. Fill a zeroed test_tfm, then test_write_tfm. */

typedef struct test_meta {
    char key[64];
    uint32_t type;
    void *value;
    size_t size; /* bytes */
} test_meta;

typedef struct test_tensor {
    char name[64];
    uint32_t dtype, layout, n_dims;
    uint64_t shape[4];
    void *data;
    size_t size; /* bytes */
} test_tensor;

typedef struct test_tfm {
    test_meta meta[56];
    test_tensor tensors[56];
    size_t n_meta, n_tensors;
} test_tfm;

/* Metadata; takes the place of what has that key. */
void test_put(test_tfm *tfm, const char *key, int type, const void *value, size_t size);
void test_put_i64(test_tfm *tfm, const char *key, int64_t value);
void test_put_f64(test_tfm *tfm, const char *key, double value);
void test_put_text(test_tfm *tfm, const char *key, const char *text);
void test_put_i32(test_tfm *tfm, const char *key, const int32_t *values, size_t n);
/* An f32 tensor in rows, [rows] if columns is 0; takes the place of the one with that name. */
void test_put_tensor(test_tfm *tfm, const char *name, size_t rows, size_t columns, const float *data);
/* Removes the metadata, or the tensor, with that name. */
void test_drop(test_tfm *tfm, const char *name);
void test_clear(test_tfm *tfm);

/* A small GPT-2; every size at least 1. test_put_weights gives it tensors full of random numbers. */
typedef struct test_shape {
    size_t vocab_size, d_model, n_layers, n_heads, n_kv_heads, head_dim, d_ff, n_positions;
} test_shape;
void test_put_description(test_tfm *tfm, const test_shape *shape);
void test_put_weights(test_tfm *tfm, const test_shape *shape, uint64_t seed);

/* A tokenizer whose token 0..255 is that byte, 256 is <|end|> (special; ends a text), and the n strings `more` follow.
 * The vocabulary must have 257 + n tokens at least. */
#define TEST_END 256
void test_put_tokenizer(test_tfm *tfm, const char *const *more, size_t n);

/* The file's bytes. The caller frees them. */
unsigned char *test_write_tfm(const test_tfm *tfm, size_t *size);
/* The model; test_write_tfm and tfm_load_memory. *bytes is the caller's to free, after the model. */
tfm_model *test_load_tfm(const test_tfm *tfm, unsigned char **bytes);
/* The CRC-32 of data behind what has the CRC-32 `crc` (0: nothing). */
uint32_t test_crc32(uint32_t crc, const unsigned char *data, size_t size);
/* Makes the header's checksum right again, as far as the sizes in the header can be true. */
void test_seal(unsigned char *file, size_t size);

/* Writes a file, or reads one whole (the caller frees it; NULL if it can't be read). */
int test_save(const char *path, const void *data, size_t size);
unsigned char *test_read(const char *path, size_t *size);

/* Where tests put their files: this and a name. A build of the tests that may run beside another has a place of its own. */
#ifndef TEST_OUTPUT
#define TEST_OUTPUT "build/test_output_"
#endif

#endif
