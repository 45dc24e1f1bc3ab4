/* Runs the tests: all groups, or those named on the command line. The last line is `N passed, N failed`. */
#define TFM_IMPLEMENTATION
#include "test.h"

#include <math.h>
#include <stdarg.h>

int test_passed, test_failed;

#define SHOWN_FAILURES 50 /* a broken kernel fails thousands of checks: the first say which */

/* ---- checks */

int test_check(int good, const char *file, int line, const char *format, ...) {
    va_list arguments;
    if (good) {
        test_passed++;
        return 1;
    }
    if (++test_failed > SHOWN_FAILURES)
        return 0;
    fprintf(stderr, "%s:%d: ", file, line);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    return 0;
}

void test_close(const float *found, const float *expected, size_t n, double tolerance, const char *file, int line,
                const char *what) {
    double largest = 0, worst = 0;
    size_t i, where = 0;
    for (i = 0; i < n; i++)
        largest = fmax(largest, fabs((double)expected[i]));
    for (i = 0; i < n; i++) {
        double difference = fabs((double)found[i] - (double)expected[i]);
        if (!(difference <= worst)) { /* NaN is the worst */
            worst = difference;
            where = i;
        }
        if (worst != worst)
            break;
    }
    test_check(worst <= tolerance * largest, file, line, "%s: [%lu] is %.9g, expected %.9g; the largest is %.9g", what,
               (unsigned long)where, n ? (double)found[where] : 0, n ? (double)expected[where] : 0, largest);
}

void test_same(const float *found, const float *expected, size_t n, const char *file, int line, const char *what) {
    size_t i = 0;
    while (i < n && !memcmp(found + i, expected + i, sizeof *found))
        i++;
    test_check(i == n, file, line, "%s: [%lu] of %lu is %.9g, expected the bits of %.9g", what, (unsigned long)i,
               (unsigned long)n, i < n ? (double)found[i] : 0, i < n ? (double)expected[i] : 0);
}

static int finish(void) {
    if (test_failed > SHOWN_FAILURES)
        fprintf(stderr, "%d more failures\n", test_failed - SHOWN_FAILURES);
    fflush(stderr);
    printf("%d passed, %d failed\n", test_passed, test_failed);
    return test_failed != 0;
}

void test_fatal(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    test_failed++;
    exit(finish());
}

void *test_allocate(size_t size) {
    void *memory = malloc(size ? size : 1);
    if (!memory)
        test_fatal("out of memory: %lu bytes", (unsigned long)size);
    return memory;
}

const char *test_text(const char *format, ...) {
    static char texts[4][256];
    static int next;
    char *text = texts[next++ % 4];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof texts[0], format, arguments);
    va_end(arguments);
    return text;
}

/* ---- numbers */

/* SplitMix64 (Steele, Lea, Flood 2014). */
static uint64_t next_number(uint64_t *state) {
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

void test_fill(float *values, size_t n, uint64_t seed) {
    size_t i;
    for (i = 0; i < n; i++)
        values[i] = (float)(next_number(&seed) >> 40) / 8388608 - 1;
}

size_t test_random(uint64_t *state, size_t n) {
    return (size_t)(next_number(state) >> 11) % n;
}

/* ---- engines */

size_t test_isas(tfm_isa isas[TFM_ISA_COUNT]) {
    size_t n = 0;
    int isa;
    for (isa = TFM_ISA_SCALAR; isa < TFM_ISA_COUNT; isa++)
        if (tfm_isa_supported((tfm_isa)isa))
            isas[n++] = (tfm_isa)isa;
    return n;
}

tfm_engine *test_engine(tfm_isa isa, int threads) {
    tfm_engine_options options;
    tfm_error error;
    tfm_engine *engine;
    memset(&options, 0, sizeof options);
    options.isa = isa;
    options.threads = threads;
    engine = tfm_engine_create(&options, &error);
    if (!engine)
        test_fatal("no engine: %s", error.message);
    return engine;
}

void test_backwards(void *user, size_t n, tfm_task task, void *argument) {
    (void)user;
    while (n)
        task(argument, --n);
}

/* ---- golden files */

tfm_file *golden_open(const char *name) {
    char path[128];
    tfm_error error;
    tfm_file *file;
    snprintf(path, sizeof path, "tests/golden/%s.tfm", name);
    file = tfm_file_open(path, NULL, &error);
    if (!file)
        test_fatal("%s", error.message);
    if (tfm_file_verify(file, &error) != TFM_OK)
        test_fatal("%s", error.message);
    return file;
}

#define FORMAT_NAME(name, format)                                                                                      \
    do {                                                                                                               \
        va_list arguments;                                                                                             \
        va_start(arguments, format);                                                                                   \
        vsnprintf(name, sizeof(name), format, arguments);                                                              \
        va_end(arguments);                                                                                             \
    } while (0)

tfm_tensor golden_tensor(const tfm_file *file, const char *format, ...) {
    const tfm_entry *entry;
    tfm_tensor none;
    char name[128];
    FORMAT_NAME(name, format);
    memset(&none, 0, sizeof none);
    entry = tfm_file_find(file, name);
    return entry ? entry->tensor : none;
}

const float *golden_floats(const tfm_file *file, size_t n, const char *format, ...) {
    tfm_tensor tensor;
    char name[128];
    FORMAT_NAME(name, format);
    tensor = golden_tensor(file, "%s", name);
    if (!tensor.data || tensor.dtype != TFM_F32 || tfm_tensor_bytes(&tensor) != n * sizeof(float))
        test_fatal("golden file: %s is not there, or not %lu floats", name, (unsigned long)n);
    return (const float *)tensor.data;
}

static const void *find_values(const tfm_file *file, const char *name, tfm_meta_type type, size_t *n) {
    const tfm_meta *meta = tfm_file_find_meta(file, name);
    if (!meta || meta->type != type) {
        test_fatal("golden file: %s is not there, or of another type", name);
        return NULL; /* not reached */
    }
    if (n)
        *n = meta->count;
    return meta->values;
}

const int32_t *golden_ints(const tfm_file *file, size_t *n, const char *format, ...) {
    char name[128];
    FORMAT_NAME(name, format);
    return (const int32_t *)find_values(file, name, TFM_META_I32, n);
}

const unsigned char *golden_bytes(const tfm_file *file, size_t *n, const char *format, ...) {
    char name[128];
    FORMAT_NAME(name, format);
    return (const unsigned char *)find_values(file, name, TFM_META_BYTES, n);
}

/* ---- the groups */

void test_kernels(void);
void test_layers(void);
void test_models(void);
void test_encoders(void);
void test_tokenizer(void);
void test_sentencepiece(void);
void test_sampling(void);
void test_blocks(void);
void test_file(void);
void test_generate(void);
void test_beams(void);
void test_vectors(void);
void test_memory(void);
void test_chat(void);
void test_threads(void);

static const struct {
    const char *name;
    void (*run)(void);
} groups[] = {
    {"kernels", test_kernels},   {"layers", test_layers},       {"models", test_models},
    {"encoders", test_encoders}, {"tokenizer", test_tokenizer}, {"sentencepiece", test_sentencepiece},
    {"sampling", test_sampling}, {"file", test_file},           {"blocks", test_blocks},
    {"generate", test_generate}, {"beams", test_beams},         {"memory", test_memory},
    {"chat", test_chat},         {"threads", test_threads},     {"vectors", test_vectors},
};

#define N_GROUPS (sizeof groups / sizeof *groups)

static int is_named(const char *name, int argc, char **argv) {
    int i;
    for (i = 1; i < argc; i++)
        if (!strcmp(argv[i], name))
            return 1;
    return 0;
}

static void run_group(size_t index) {
    int passed = test_passed, failed = test_failed;
    groups[index].run();
    printf("%-10s %7d passed, %d failed\n", groups[index].name, test_passed - passed, test_failed - failed);
    fflush(stdout);
}

int main(int argc, char **argv) {
    size_t i;
    int named = 0;
    for (i = 0; i < N_GROUPS; i++)
        named += is_named(groups[i].name, argc, argv);
    if (named != argc - 1) {
        fprintf(stderr, "usage: tests [GROUP]...   groups:");
        for (i = 0; i < N_GROUPS; i++)
            fprintf(stderr, " %s", groups[i].name);
        fputc('\n', stderr);
        return 2;
    }
    for (i = 0; i < N_GROUPS; i++)
        if (argc == 1 || is_named(groups[i].name, argc, argv))
            run_group(i);
    return finish();
}
