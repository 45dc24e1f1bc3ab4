/* Memory: generating allocates nothing, and when an allocation fails, whichever it is, the call says so and everything
 * is given back. */
#include "test.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

/* ---- the allocator */

typedef struct header {
    size_t size;
    uint32_t magic, padding;
} header;

#define MAGIC 0x7F4D454Du

static void *allocate(void *user, size_t size) {
    test_heap *heap = (test_heap *)user;
    header *memory;
    heap->count++;
    heap->largest = size > heap->largest ? size : heap->largest;
    if (heap->fail_at && (heap->count == heap->fail_at || (heap->fail_forever && heap->count > heap->fail_at)))
        return NULL;
    memory = (header *)malloc(sizeof *memory + size);
    if (!memory)
        return NULL;
    memory->size = size;
    memory->magic = MAGIC;
    heap->live++;
    memset(memory + 1, 0xA5, size); /* nothing may rely on zeros */
    return memory + 1;
}

static void release(void *user, void *memory) {
    test_heap *heap = (test_heap *)user;
    header *from = (header *)memory - 1;
    if (from->magic != MAGIC) {
        heap->bad++;
        return;
    }
    from->magic = 0;
    heap->live--;
    free(from);
}

tfm_allocator test_allocator(test_heap *heap) {
    tfm_allocator allocator;
    allocator.allocate = allocate;
    allocator.release = release;
    allocator.user = heap;
    return allocator;
}

/* ---- generating allocates nothing */

/* Bytes that malloc has handed out, on the C libraries that tell: so that allocations past the allocator show too. */
static size_t malloc_in_use(void) {
#if defined(__GLIBC__) && (__GLIBC__ > 2 || __GLIBC_MINOR__ >= 33) && !defined(__SANITIZE_ADDRESS__)
    struct mallinfo2 info = mallinfo2();
    return info.uordblks + info.hblkhd;
#else
    return 0;
#endif
}

typedef struct counter {
    size_t in_use; /* the largest difference that was seen while text came */
    size_t before;
    size_t n_bytes;
} counter;

static int watch_malloc(void *user, const char *text, size_t size) {
    counter *c = (counter *)user;
    size_t now = malloc_in_use();
    (void)text;
    c->n_bytes += size;
    if (now != c->before)
        c->in_use = now > c->before ? now - c->before : c->before - now;
    return 0;
}

static void test_generate_allocates_nothing(int threads) {
    test_heap heap;
    tfm_load_options load;
    tfm_session_options options;
    tfm_generate_options generate;
    tfm_error error = {TFM_OK, ""};
    tfm_model *model;
    tfm_session *session;
    counter c = {0, 0, 0};
    size_t count, run;
    memset(&heap, 0, sizeof heap);
    memset(&load, 0, sizeof load);
    memset(&options, 0, sizeof options);
    memset(&generate, 0, sizeof generate);
    load.allocator = options.engine.allocator = test_allocator(&heap);
    options.engine.threads = threads;
    options.context = 96;
    model = tfm_load(TEST_MODEL, &load, &error);
    session = model ? tfm_session_create(model, &options, &error) : NULL;
    if (!CHECK_MSG(session != NULL, "%s", error.message)) {
        tfm_free(model);
        return;
    }
    generate.max_tokens = 200; /* past the context, so that it shifts */
    generate.shift = 1;
    generate.shift_keep = 4;
    generate.ignore_end = 1;
    generate.sampling.temperature = 0.9f;
    generate.sampling.top_k = 50;
    generate.sampling.top_p = 0.95f;
    generate.sampling.min_p = 0.01f;
    generate.sampling.repeat_penalty = 1.1f;
    tfm_generate(session, "Warm", &generate, NULL, NULL,
                 &error); /* OpenMP makes its threads when they are first used */
    count = heap.count;
    c.before = malloc_in_use();
    for (run = 0; run < 2; run++) {
        CHECK_OK(tfm_generate(session, "Once upon a time there was a bear who", &generate, watch_malloc, &c, &error),
                 error);
        generate.sampling.temperature = 0;
    }
    CHECK_MSG(heap.count == count, "generating with %d threads allocated %lu times", threads,
              (unsigned long)(heap.count - count));
    CHECK_MSG(!c.in_use, "generating with %d threads changed malloc's use by %lu bytes", threads,
              (unsigned long)c.in_use);
    CHECK(c.n_bytes > 200);
    tfm_session_free(session);
    tfm_free(model);
    CHECK_MSG(!heap.live && !heap.bad, "%lu live, %lu bad", (unsigned long)heap.live, (unsigned long)heap.bad);
}

/* ---- every allocation fails once. A scenario returns the status of the first call that failed, or TFM_OK. */

typedef tfm_status (*scenario)(const tfm_allocator *allocator);

static tfm_status load_and_generate(const tfm_allocator *allocator, tfm_dtype dtype) {
    static char text[400 + 1]; /* longer than what is tokenized without memory */
    tfm_load_options load;
    tfm_session_options options;
    tfm_generate_options generate;
    tfm_error error = {TFM_OK, ""};
    tfm_model *model;
    tfm_session *session;
    size_t n;
    memset(&load, 0, sizeof load);
    memset(&options, 0, sizeof options);
    memset(&generate, 0, sizeof generate);
    load.dtype = dtype;
    load.allocator = options.engine.allocator = *allocator;
    options.context = 32;
    generate.max_tokens = 2;
    memset(text, 'a', sizeof text - 1);
    model = tfm_load(TEST_MODEL, &load, &error);
    session = model ? tfm_session_create(model, &options, &error) : NULL;
    if (session)
        tfm_generate(session, "Once", &generate, NULL, NULL, &error);
    if (session && error.status == TFM_OK)
        tfm_tokenize(model, text, sizeof text - 1, 0, NULL, 0, &n, &error);
    tfm_session_free(session);
    tfm_free(model);
    return error.status;
}

static tfm_status as_stored(const tfm_allocator *allocator) {
    return load_and_generate(allocator, TFM_NO_DTYPE);
}

static tfm_status as_f16(const tfm_allocator *allocator) {
    return load_and_generate(allocator, TFM_F16);
}

static tfm_status quantize(const tfm_allocator *allocator) {
    tfm_quantize_options options;
    tfm_error error = {TFM_OK, ""};
    memset(&options, 0, sizeof options);
    options.dtype = TFM_BF16;
    options.allocator = *allocator;
    tfm_quantize(TEST_MODEL, TEST_OUTPUT "memory.tfm", &options, &error);
    remove(TEST_OUTPUT "memory.tfm");
    return error.status;
}

/* A block of the demo model, run by hand with a cache of one's own and without one; and a matrix that is packed. */
static tfm_status by_hand(const tfm_allocator *allocator) {
    static float x[2 * 256], numbers[40 * 20];
    const tfm_tensor matrix = tfm_matrix(numbers, 40, 20);
    tfm_engine_options options;
    tfm_error error = {TFM_OK, ""};
    tfm_model *model = tfm_load(TEST_MODEL, NULL, &error);
    tfm_engine *engine;
    tfm_tensor packed;
    tfm_kv kv;
    tfm_span span;
    memset(&options, 0, sizeof options);
    memset(&kv, 0, sizeof kv);
    memset(&span, 0, sizeof span);
    options.allocator = *allocator;
    test_fill(x, sizeof x / sizeof *x, 1);
    test_fill(numbers, sizeof numbers / sizeof *numbers, 2);
    engine = model ? tfm_engine_create(&options, &error) : NULL;
    span.n_rows = 2;
    if (engine && tfm_kv_create(&kv, TFM_F32, 6, 4, 64, 8, allocator, &error) == TFM_OK) {
        tfm_block_forward(engine, tfm_model_block(model, 0), 0, x, &span, 1, &error);
        span.kv = &kv;
        if (error.status == TFM_OK)
            tfm_block_forward(engine, tfm_model_block(model, 0), 0, x, &span, 1, &error);
        if (error.status == TFM_OK && tfm_pack(&matrix, TFM_I8, allocator, &packed, &error) == TFM_OK)
            tfm_unpack(&packed, allocator);
    }
    tfm_kv_free(&kv, allocator);
    tfm_engine_free(engine);
    tfm_free(model);
    return error.status;
}

static void fail_each(scenario run, const char *name) {
    test_heap heap;
    tfm_allocator allocator;
    size_t n = 1, total;
    memset(&heap, 0, sizeof heap);
    allocator = test_allocator(&heap);
    CHECK_MSG(run(&allocator) == TFM_OK, "%s fails by itself", name);
    CHECK_MSG(!heap.live && !heap.bad, "%s: %lu live, %lu bad", name, (unsigned long)heap.live,
              (unsigned long)heap.bad);
    total = heap.count;
    CHECK_MSG(total > 0, "%s does not use the allocator", name);
    for (n = 1; n <= 2 * total; n++) { /* once alone, once with all that come after it */
        tfm_status status;
        memset(&heap, 0, sizeof heap);
        heap.fail_at = (n + 1) / 2;
        heap.fail_forever = n % 2 == 0;
        status = run(&allocator);
        CHECK_MSG(status == TFM_ERROR_MEMORY, "%s, allocation %lu of %lu fails: status %d", name,
                  (unsigned long)heap.fail_at, (unsigned long)total, (int)status);
        CHECK_MSG(!heap.live && !heap.bad, "%s, allocation %lu of %lu fails: %lu live, %lu bad", name,
                  (unsigned long)heap.fail_at, (unsigned long)total, (unsigned long)heap.live, (unsigned long)heap.bad);
    }
}

void test_memory(void);

void test_memory(void) {
    test_generate_allocates_nothing(1);
    test_generate_allocates_nothing(2);
    fail_each(as_stored, "loading and generating");
    fail_each(as_f16, "loading as f16 and generating");
    fail_each(quantize, "quantizing");
    fail_each(by_hand, "a block by hand");
}
