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

/* ---- a model that is loaded and used some thousand times */

#define MODEL TEST_OUTPUT "small.tfm"

static const test_shape shape = {320, 32, 2, 4, 2, 8, 48, 512};

static void save_model(void) {
    test_tfm tfm;
    size_t size;
    unsigned char *bytes;
    memset(&tfm, 0, sizeof tfm);
    test_put_description(&tfm, &shape);
    test_put_weights(&tfm, &shape, 1);
    test_put_tokenizer(&tfm, NULL, 0);
    bytes = test_write_tfm(&tfm, &size);
    test_save(MODEL, bytes, size);
    free(bytes);
    test_clear(&tfm);
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
    model = tfm_load(MODEL, &load, &error);
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
    tfm_quantize(MODEL, TEST_OUTPUT "memory.tfm", &options, &error);
    remove(TEST_OUTPUT "memory.tfm");
    return error.status;
}

/* A block of the model, run by hand with a cache of one's own and without one; and a matrix that is packed. */
static tfm_status by_hand(const tfm_allocator *allocator) {
    static float x[2 * 32], numbers[40 * 20];
    const tfm_tensor matrix = tfm_matrix(numbers, 40, 20);
    tfm_engine_options options;
    tfm_error error = {TFM_OK, ""};
    tfm_model *model = tfm_load(MODEL, NULL, &error);
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
    if (engine && tfm_kv_create(&kv, TFM_F32, 2, 2, 8, 8, allocator, &error) == TFM_OK) {
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

/* For the record: how many of an operation's allocations were made to fail. */
static size_t n_injected;

static void print_injected(const char *name, size_t n) {
    printf(" %s %lu;", name, (unsigned long)n);
    n_injected += n;
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
    print_injected(name, total);
}

/* ---- what goes on working: a call that fails for lack of memory leaves a model, a session, a chat that give, as soon as
 * there is memory, what they give without trouble */

/* What a call gave, as one number. */
static void mix(uint64_t *digest, const void *data, size_t size) {
    const unsigned char *bytes = (const unsigned char *)data;
    size_t i;
    for (i = 0; i < size; i++)
        *digest = (*digest ^ bytes[i]) * 1099511628211u;
}

static const int32_t some_ids[] = {3, 5, 4, 6, 3, 7, 8, 3, 5};

typedef struct service {
    const char *name, *path;
    tfm_dtype kv_dtype;
    tfm_status (*use)(tfm_session *session, uint64_t *digest, tfm_error *error);
} service;

static tfm_status encode(tfm_session *session, uint64_t *digest, tfm_error *error) {
    static float outputs[2 * 9 * 512];
    const tfm_description *d = tfm_model_description(tfm_session_model(session));
    tfm_text texts[2];
    memset(texts, 0, sizeof texts);
    texts[0].tokens = texts[1].tokens = some_ids;
    texts[0].n_tokens = 9;
    texts[1].n_tokens = 4;
    if (d->d_model > 512)
        test_fatal("a golden model of width %lu", (unsigned long)d->d_model);
    if (tfm_encode(session, texts, 2, TFM_HIDDEN, outputs, error) != TFM_OK)
        return error->status;
    mix(digest, outputs, 13 * d->d_model * sizeof *outputs);
    if (tfm_embed(session, texts, 2, TFM_POOL_MEAN, 1, outputs, error) != TFM_OK)
        return error->status;
    mix(digest, outputs, 2 * d->d_model * sizeof *outputs);
    return TFM_OK;
}

/* Sources for an encoder-decoder's sequences, prompts for a decoder's; prompt i in the sequence i * step. */
static tfm_status set_inputs(tfm_session *session, tfm_prompt *prompts, size_t n, size_t step, tfm_error *error) {
    int answers = tfm_model_description(tfm_session_model(session))->kind == TFM_ENCODER_DECODER;
    size_t i;
    memset(prompts, 0, n * sizeof *prompts);
    for (i = 0; i < n; i++) {
        tfm_text text = {some_ids, 0, NULL, NULL};
        text.n_tokens = 9 - 2 * i;
        if (answers && tfm_set_source(session, i * step, &text, error) != TFM_OK)
            return error->status;
        prompts[i].tokens = answers ? NULL : text.tokens;
        prompts[i].n_tokens = answers ? 0 : text.n_tokens;
    }
    return TFM_OK;
}

static void mix_results(uint64_t *digest, const tfm_result *results, size_t n) {
    size_t i;
    for (i = 0; i < n; i++) {
        mix(digest, results[i].tokens, results[i].n_tokens * sizeof *results->tokens);
        mix(digest, &results[i].score, sizeof results->score);
    }
}

static tfm_status generate_batch(tfm_session *session, uint64_t *digest, tfm_error *error) {
    tfm_generate_options options;
    tfm_prompt prompts[2];
    tfm_result results[2];
    memset(&options, 0, sizeof options);
    options.max_tokens = 4;
    memset(results, 0, sizeof results);
    if (set_inputs(session, prompts, 2, 1, error) == TFM_OK &&
        tfm_generate_batch(session, prompts, 2, &options, results, error) == TFM_OK)
        mix_results(digest, results, 2);
    return error->status;
}

static tfm_status beam_search(tfm_session *session, uint64_t *digest, tfm_error *error) {
    tfm_beam_options options;
    tfm_prompt prompts[2];
    tfm_result results[2];
    memset(&options, 0, sizeof options);
    options.beams = 2;
    options.max_tokens = 4;
    if (set_inputs(session, prompts, 2, 2, error) == TFM_OK &&
        tfm_beam_search(session, prompts, 2, &options, results, error) == TFM_OK)
        mix_results(digest, results, 2);
    return error->status;
}

static int mix_text(void *user, const char *text, size_t size) {
    mix((uint64_t *)user, text, size);
    return 0;
}

/* The prompt is longer than what is tokenized without memory. */
static tfm_status generate_text(tfm_session *session, uint64_t *digest, tfm_error *error) {
    static char text[300 + 1];
    tfm_generate_options options;
    memset(&options, 0, sizeof options);
    options.max_tokens = 4;
    memset(text, 'a', sizeof text - 1);
    return tfm_generate(session, text, &options, mix_text, digest, error);
}

static const service services[] = {
    {"an encoder", "tests/golden/encoder_sentence.tfm", TFM_NO_DTYPE, encode},
    {"a masked language model", "tests/golden/encoder_mlm.tfm", TFM_NO_DTYPE, encode},
    {"an encoder-decoder's answer", "tests/golden/beams_t5.tfm", TFM_NO_DTYPE, generate_text},
    {"an encoder-decoder's answers, int8 cache", "tests/golden/beams_t5.tfm", TFM_I8, generate_batch},
    {"an encoder-decoder's beams, int8 cache", "tests/golden/beams_t5.tfm", TFM_I8, beam_search},
    {"a decoder's batch", "tests/golden/beams_gpt2.tfm", TFM_F32, generate_batch},
    {"a decoder's beams, bf16 cache", "tests/golden/beams_gpt2.tfm", TFM_BF16, beam_search},
    {"a decoder's beams, f16 cache", "tests/golden/beams_gpt2.tfm", TFM_F16, beam_search},
    {"a text, int8 cache", MODEL, TFM_I8, generate_text},
};

/* Loads, makes a session, uses it; each again where memory fails, up to the end. Returns how often it failed. */
static int use_with_trouble(const service *s, test_heap *heap, uint64_t *digest) {
    tfm_load_options load;
    tfm_session_options options;
    tfm_error error = {TFM_OK, ""};
    tfm_model *model;
    tfm_session *session = NULL;
    tfm_status status = TFM_ERROR_MEMORY;
    int failures = 0, attempt;
    memset(&load, 0, sizeof load);
    memset(&options, 0, sizeof options);
    load.allocator = options.engine.allocator = test_allocator(heap);
    load.threads = options.engine.threads = 1;
    options.n_sequences = 4;
    options.context = strcmp(s->path, MODEL) ? 0 : 320;
    options.kv_dtype = s->kv_dtype;
    for (model = NULL, attempt = 0; !model && attempt < 2; attempt++) {
        model = tfm_load(s->path, &load, &error);
        if (!model) {
            failures += error.status == TFM_ERROR_MEMORY;
            heap->fail_at = 0;
        }
    }
    for (attempt = 0; model && !session && attempt < 2; attempt++) {
        session = tfm_session_create(model, &options, &error);
        if (!session) {
            failures += error.status == TFM_ERROR_MEMORY;
            heap->fail_at = 0;
        }
    }
    for (attempt = 0; session && status != TFM_OK && attempt < 2; attempt++) {
        error.status = TFM_OK;
        *digest = 14695981039346656037u;
        status = s->use(session, digest, &error);
        failures += status == TFM_ERROR_MEMORY;
        if (status != TFM_OK)
            heap->fail_at = 0;
    }
    CHECK_MSG(status == TFM_OK, "%s: %s", s->name, error.message);
    tfm_session_free(session);
    tfm_free(model);
    return failures;
}

static void test_service(const service *s) {
    test_heap heap;
    uint64_t expected = 0, found = 0;
    size_t n, total;
    memset(&heap, 0, sizeof heap);
    CHECK(use_with_trouble(s, &heap, &expected) == 0);
    total = heap.count;
    for (n = 1; n <= 2 * total; n++) { /* once alone, once with all that come after it, until it was noticed */
        int failures;
        memset(&heap, 0, sizeof heap);
        heap.fail_at = (n + 1) / 2;
        heap.fail_forever = n % 2 == 0;
        failures = use_with_trouble(s, &heap, &found);
        CHECK_MSG(failures == 1, "%s, allocation %lu of %lu fails: %d failures", s->name, (unsigned long)(n + 1) / 2,
                  (unsigned long)total, failures);
        CHECK_MSG(found == expected, "%s, allocation %lu of %lu failed: other results afterwards", s->name,
                  (unsigned long)(n + 1) / 2, (unsigned long)total);
        CHECK_MSG(!heap.live && !heap.bad, "%s, allocation %lu of %lu fails: %lu live, %lu bad", s->name,
                  (unsigned long)(n + 1) / 2, (unsigned long)total, (unsigned long)heap.live, (unsigned long)heap.bad);
    }
    print_injected(s->name, total);
}

/* ---- a chat: said twice, saved, loaded into another */

enum { MAKE, SAY, SAY_MORE, SAVE, LOAD, N_STEPS };

typedef struct talk {
    tfm_session *session;
    tfm_chat *chat, *other;
    unsigned char *data; /* of the saved one */
    size_t size;
    uint64_t digest;
} talk;

static tfm_status take_step(talk *t, int step) {
    tfm_generate_options options;
    tfm_chat_options other;
    tfm_error error = {TFM_OK, ""};
    uint64_t before = t->digest;
    memset(&options, 0, sizeof options);
    memset(&other, 0, sizeof other);
    options.max_tokens = 3;
    other.sequence = 1;
    switch (step) {
    case MAKE: t->chat = tfm_chat_create(t->session, NULL, &error); break;
    case SAY:
    case SAY_MORE:
        if (tfm_chat_say(t->chat, step == SAY ? "Hello bear" : "Why?", &options, mix_text, &t->digest, &error) !=
            TFM_OK)
            t->digest = before;
        break;
    case SAVE:
        if (!t->data && tfm_chat_save_memory(t->chat, NULL, 0, &t->size, &error) == TFM_OK)
            t->data = (unsigned char *)test_allocate(t->size);
        if (error.status == TFM_OK && tfm_chat_save_memory(t->chat, t->data, t->size, &t->size, &error) == TFM_OK)
            mix(&t->digest, t->data, t->size);
        break;
    default:
        if (!t->other)
            t->other = tfm_chat_create(t->session, &other, &error);
        if (t->other && tfm_chat_load_memory(t->other, t->data, t->size, &error) == TFM_OK)
            CHECK(tfm_chat_n_turns(t->other) == tfm_chat_n_turns(t->chat));
        else if (t->other)
            CHECK(tfm_chat_n_turns(t->other) == 0);
    }
    return error.status;
}

/* The whole talk; the allocation `fail_at` of the step `troubled` fails, and the step is taken again. */
static uint64_t talk_with_trouble(const tfm_model *model, int troubled, test_heap *heap) {
    tfm_session_options options;
    tfm_error error;
    talk t;
    size_t fail_at = heap->fail_at, turns, count = 0;
    int step;
    memset(&options, 0, sizeof options);
    memset(&t, 0, sizeof t);
    heap->fail_at = 0;
    options.engine.allocator = test_allocator(heap);
    options.engine.threads = 1;
    options.n_sequences = 2;
    options.kv_dtype = TFM_I8;
    t.session = tfm_session_create(model, &options, &error);
    for (step = 0; t.session && step < N_STEPS; step++) {
        heap->count = 0;
        heap->fail_at = step == troubled ? fail_at : 0;
        turns = t.chat ? tfm_chat_n_turns(t.chat) : 0;
        if (heap->fail_at) {
            CHECK_MSG(take_step(&t, step) == TFM_ERROR_MEMORY, "step %d of a chat, allocation %lu fails unseen", step,
                      (unsigned long)fail_at);
            heap->fail_at = 0;
            CHECK_MSG((t.chat ? tfm_chat_n_turns(t.chat) : 0) == turns, "step %d of a chat failed: other turns", step);
        }
        CHECK_MSG(take_step(&t, step) == TFM_OK, "step %d of a chat fails after allocation %lu failed", step,
                  (unsigned long)fail_at);
        count = step == troubled ? heap->count : count;
    }
    tfm_chat_free(t.chat);
    tfm_chat_free(t.other);
    tfm_session_free(t.session);
    free(t.data);
    heap->count = count;
    CHECK_MSG(!heap->live && !heap->bad, "a chat: %lu live, %lu bad", (unsigned long)heap->live,
              (unsigned long)heap->bad);
    return t.digest;
}

static void test_talk(void) {
    tfm_error error;
    tfm_model *model = tfm_load(MODEL, NULL, &error);
    test_heap heap;
    size_t n, total, all = 0;
    int step;
    if (!model)
        test_fatal("%s", error.message);
    for (step = 0; step < N_STEPS; step++) {
        uint64_t expected;
        memset(&heap, 0, sizeof heap);
        expected = talk_with_trouble(model, step, &heap);
        total = heap.count;
        all += total;
        for (n = 1; n <= 2 * total; n++) {
            memset(&heap, 0, sizeof heap);
            heap.fail_at = (n + 1) / 2;
            heap.fail_forever = n % 2 == 0;
            CHECK_MSG(talk_with_trouble(model, step, &heap) == expected, "step %d, allocation %lu failed: another talk",
                      step, (unsigned long)(n + 1) / 2);
        }
    }
    print_injected("a chat: made, said twice, saved, loaded", all);
    tfm_free(model);
}

void test_memory(void);

void test_memory(void) {
    size_t i;
    test_generate_allocates_nothing(1);
    test_generate_allocates_nothing(2);
    save_model();
    printf("allocations that failed, each alone and with all after it:");
    fail_each(as_stored, "loading and generating");
    fail_each(as_f16, "loading as f16 and generating");
    fail_each(quantize, "quantizing");
    fail_each(by_hand, "a block by hand");
    for (i = 0; i < sizeof services / sizeof *services; i++)
        test_service(&services[i]);
    test_talk();
    remove(MODEL);
    printf(" in all %lu\n", (unsigned long)n_injected);
}
