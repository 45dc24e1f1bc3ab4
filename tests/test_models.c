/* Whole models against transformers: logits, hidden states and greedy text; and the same bits for every way of cutting
 * the tokens into calls, beside any other sequences, on any number of threads. */
#include "test.h"

#include <math.h>

/* The golden models: see GOLDEN_MODELS in make_golden.py. */
static const char *const names[] = {"one_head", "many_heads", "three_heads", "one_token", "unscaled"};

/* What is asked for is 1e-4 of the largest logit. */
#define TOLERANCE 1e-5

static tfm_file *golden;

/* One model on one instruction set. */
typedef struct subject {
    const char *name;
    const tfm_model *model;
    const tfm_description *d;
    tfm_isa isa;
    tfm_dtype kv_dtype;
    const int32_t *ids; /* [n]: a full context */
    size_t n;
    const float *expected; /* [n][vocab_size]: transformers' logits of ids */
    float *logits;         /* [n][vocab_size]: ours on one thread in one call, after they were compared */
} subject;

static const char *where(const subject *s, const char *what) {
    return test_text("%s on %s, %s", s->name, tfm_isa_name(s->isa), what);
}

/* A session with something besides the usual: NULL if it fails, which is counted. */
static tfm_session *open_session(const subject *s, size_t n_sequences, size_t max_rows, int threads) {
    tfm_session_options options;
    tfm_session *session;
    tfm_error error;
    memset(&options, 0, sizeof options);
    options.n_sequences = n_sequences;
    options.max_rows = max_rows;
    options.kv_dtype = s->kv_dtype;
    options.engine.isa = s->isa;
    options.engine.threads = threads;
    if (!threads)
        options.engine.parallel_for = test_backwards;
    session = tfm_session_create(s->model, &options, &error);
    CHECK_MSG(session != NULL, "%s: %s", s->name, error.message);
    return session;
}

static tfm_chunk make_chunk(size_t sequence, const int32_t *tokens, size_t n_tokens, size_t n_outputs) {
    tfm_chunk chunk;
    chunk.sequence = sequence;
    chunk.tokens = tokens;
    chunk.n_tokens = n_tokens;
    chunk.n_outputs = n_outputs;
    return chunk;
}

/* All of `n` tokens in one call; outputs [n][vocab_size or d_model], the caller's to free. */
static float *eval_all(const subject *s, const int32_t *ids, size_t n, tfm_output what, size_t max_rows, int threads) {
    float *outputs =
        (float *)test_allocate(n * (what == TFM_LOGITS ? s->d->vocab_size : s->d->d_model) * sizeof(float));
    tfm_session *session = open_session(s, 1, max_rows, threads);
    tfm_chunk chunk = make_chunk(0, ids, n, n);
    tfm_error error;
    if (session)
        CHECK_OK(tfm_eval(session, &chunk, 1, what, outputs, &error), error);
    tfm_session_free(session);
    return outputs;
}

/* ---- against transformers */

static void test_outputs(subject *s) {
    size_t n_logits = s->n * s->d->vocab_size, n_hidden = s->n * s->d->d_model;
    float *hidden = eval_all(s, s->ids, s->n, TFM_HIDDEN, 0, 1);
    s->logits = eval_all(s, s->ids, s->n, TFM_LOGITS, 0, 1);
    CHECK_CLOSE(s->logits, s->expected, n_logits, TOLERANCE, where(s, "logits"));
    CHECK_CLOSE(hidden, golden_floats(golden, n_hidden, "%s.hidden", s->name), n_hidden, TOLERANCE, where(s, "hidden"));
    free(hidden);
}

typedef struct collected {
    int32_t ids[512];
    size_t n;
} collected;

static int collect(void *user, int32_t token) {
    collected *all = (collected *)user;
    all->ids[all->n++] = token;
    return all->n == sizeof all->ids / sizeof *all->ids;
}

static void test_greedy(const subject *s, int threads) {
    tfm_session *session = open_session(s, 1, 0, threads);
    tfm_generate_options options;
    collected found;
    size_t n_prompt, n;
    const int32_t *prompt = golden_ints(golden, &n_prompt, "%s.prompt", s->name);
    const int32_t *expected = golden_ints(golden, &n, "%s.greedy", s->name);
    tfm_error error;
    memset(&options, 0, sizeof options);
    found.n = 0;
    options.max_tokens = n;
    options.ignore_end = 1;
    options.on_token = collect;
    options.on_token_user = &found;
    if (session && n) {
        CHECK_OK(tfm_generate_ids(session, prompt, n_prompt, &options, NULL, NULL, &error), error);
        CHECK_MSG(found.n == n && !memcmp(found.ids, expected, n * sizeof *expected), "%s: %lu tokens",
                  where(s, "greedy text differs"), (unsigned long)found.n);
    }
    tfm_session_free(session);
}

/* A model loaded as 16-bit against transformers with the same rounded matrices. */
static void test_rounded(const subject *s, const char *path, tfm_dtype dtype) {
    tfm_tensor expected = golden_tensor(golden, "%s.%s", s->name, tfm_dtype_name(dtype));
    subject other = *s;
    tfm_load_options options;
    tfm_model *model;
    tfm_error error;
    float *logits;
    if (!expected.data)
        return;
    memset(&options, 0, sizeof options);
    options.dtype = dtype;
    model = tfm_load(path, &options, &error);
    CHECK_MSG(model != NULL, "%s", error.message);
    if (!model)
        return;
    other.model = model;
    CHECK(tfm_model_bytes_per_token(model) < tfm_model_bytes_per_token(s->model));
    logits = eval_all(&other, s->ids, expected.shape[0], TFM_LOGITS, 0, 1);
    CHECK_CLOSE(logits, (const float *)expected.data, expected.shape[0] * expected.shape[1], TOLERANCE,
                where(s, tfm_dtype_name(dtype)));
    CHECK(memcmp(logits, s->logits, expected.shape[0] * expected.shape[1] * sizeof *logits) != 0);
    free(logits);
    tfm_free(model);
}

/* ---- the same bits */

/* The same in passes of other sizes, on other threads, in another order of the pieces. */
static void test_passes(const subject *s) {
    static const size_t rows[] = {1, 3, 16, 100};
    size_t i, n = s->n * s->d->vocab_size;
    for (i = 0; i < sizeof rows / sizeof *rows; i++) {
        float *logits = eval_all(s, s->ids, s->n, TFM_LOGITS, rows[i], 1);
        CHECK_SAME(logits, s->logits, n, where(s, test_text("passes of %lu", (unsigned long)rows[i])));
        free(logits);
    }
    for (i = 0; i < 2; i++) {
        float *logits = eval_all(s, s->ids, s->n, TFM_LOGITS, i ? 50 : 0, i ? 0 : 3);
        CHECK_SAME(logits, s->logits, n, where(s, i ? "backwards" : "3 threads"));
        free(logits);
    }
}

/* Only the last n_outputs results of a call. */
static void test_n_outputs(const subject *s) {
    size_t wanted[4], i, vocab_size = s->d->vocab_size;
    float *logits = (float *)test_allocate(s->n * vocab_size * sizeof *logits);
    tfm_session *session = open_session(s, 1, 7, 1); /* the wanted ones begin in the middle of a pass */
    tfm_chunk chunk;
    tfm_error error;
    wanted[0] = 0;
    wanted[1] = 1;
    wanted[2] = s->n / 2;
    wanted[3] = s->n > 1 ? s->n - 1 : 1;
    for (i = 0; session && i < 4; i++) {
        CHECK_OK(tfm_truncate(session, 0, 0, &error), error);
        chunk = make_chunk(0, s->ids, s->n, wanted[i]);
        CHECK_OK(tfm_eval(session, &chunk, 1, TFM_LOGITS, wanted[i] ? logits : NULL, &error), error);
        CHECK_SAME(logits, s->logits + (s->n - wanted[i]) * vocab_size, wanted[i] * vocab_size,
                   where(s, test_text("the last %lu", (unsigned long)wanted[i])));
    }
    tfm_session_free(session);
    free(logits);
}

/* Several sequences, each with its own tokens, some shorter than the context. */
enum { N_SEQUENCES = 4 };

typedef struct sequences {
    int32_t *ids[N_SEQUENCES];
    float *alone[N_SEQUENCES]; /* [length][vocab_size]: what each gives when it is alone */
    float *found[N_SEQUENCES];
    size_t length[N_SEQUENCES];
    size_t done[N_SEQUENCES];
} sequences;

static sequences make_sequences(const subject *s) {
    sequences q;
    uint64_t state = 5;
    size_t i, k;
    for (i = 0; i < N_SEQUENCES; i++) {
        q.length[i] = i == 0 ? s->n : 1 + test_random(&state, s->n);
        q.ids[i] = (int32_t *)test_allocate(q.length[i] * sizeof(int32_t));
        for (k = 0; k < q.length[i]; k++)
            q.ids[i][k] = i == 0 ? s->ids[k] : (int32_t)test_random(&state, s->d->vocab_size);
        q.alone[i] = eval_all(s, q.ids[i], q.length[i], TFM_LOGITS, 0, 1);
        q.found[i] = (float *)test_allocate(q.length[i] * s->d->vocab_size * sizeof(float));
        q.done[i] = 0;
    }
    return q;
}

static void free_sequences(sequences *q) {
    size_t i;
    for (i = 0; i < N_SEQUENCES; i++) {
        free(q->ids[i]);
        free(q->alone[i]);
        free(q->found[i]);
    }
}

/* The next chunks: of each sequence at most `most` tokens, of random sequences if `random`. Returns how many. */
static size_t next_chunks(const sequences *q, size_t most, int random, uint64_t *state, tfm_chunk *chunks) {
    size_t n_chunks = 0, i;
    for (i = 0; i < N_SEQUENCES; i++) {
        size_t sequence = N_SEQUENCES - 1 - i, left = q->length[sequence] - q->done[sequence];
        size_t n = left < most ? left : most;
        if (random && n)
            n = test_random(state, 3) ? 1 + test_random(state, n) : 0;
        if (n)
            chunks[n_chunks++] = make_chunk(sequence, q->ids[sequence] + q->done[sequence], n, n);
    }
    return n_chunks;
}

/* Takes the results of a call apart. */
static void keep_results(sequences *q, const tfm_chunk *chunks, size_t n_chunks, const float *outputs,
                         size_t vocab_size) {
    size_t i;
    for (i = 0; i < n_chunks; i++) {
        size_t sequence = chunks[i].sequence, n = chunks[i].n_outputs * vocab_size;
        memcpy(q->found[sequence] + q->done[sequence] * vocab_size, outputs, n * sizeof *outputs);
        q->done[sequence] += chunks[i].n_tokens;
        outputs += n;
    }
}

static int all_done(const sequences *q) {
    size_t i;
    for (i = 0; i < N_SEQUENCES; i++)
        if (q->done[i] < q->length[i])
            return 0;
    return 1;
}

/* Runs the sequences side by side: every one gives the bits that it gives alone. */
static void check_together(const subject *s, sequences *q, size_t most, int random, size_t max_rows, int threads) {
    size_t vocab_size = s->d->vocab_size, i;
    float *outputs = (float *)test_allocate(N_SEQUENCES * s->n * vocab_size * sizeof *outputs);
    tfm_session *session = open_session(s, N_SEQUENCES, max_rows, threads);
    uint64_t state = most;
    memset(q->done, 0, sizeof q->done);
    while (session && !all_done(q)) {
        tfm_chunk chunks[N_SEQUENCES];
        size_t n_chunks = next_chunks(q, most, random, &state, chunks);
        tfm_error error;
        if (!CHECK_OK(tfm_eval(session, chunks, n_chunks, TFM_LOGITS, outputs, &error), error))
            break;
        keep_results(q, chunks, n_chunks, outputs, vocab_size);
    }
    for (i = 0; session && i < N_SEQUENCES; i++)
        CHECK_SAME(q->found[i], q->alone[i], q->length[i] * vocab_size,
                   where(s, test_text("sequence %lu of %d, at most %lu%s, passes of %lu, %d threads", (unsigned long)i,
                                      N_SEQUENCES, (unsigned long)most, random ? " at random" : "",
                                      (unsigned long)max_rows, threads)));
    tfm_session_free(session);
    free(outputs);
}

static void test_together(const subject *s) {
    sequences q = make_sequences(s);
    check_together(s, &q, 1, 0, 0, 1);    /* decode one at a time, side by side */
    check_together(s, &q, s->n, 0, 0, 3); /* prompts at once */
    check_together(s, &q, s->n, 0, 37, 1);
    check_together(s, &q, 5, 1, 0, 1);
    check_together(s, &q, s->n, 1, 50, 3);
    free_sequences(&q);
}

/* One at a time, alone, = all at once; and a sequence that was cut back goes on as if the rest had never been. */
static void test_one_at_a_time(const subject *s, int threads) {
    size_t vocab_size = s->d->vocab_size, i;
    float *logits = (float *)test_allocate(s->n * vocab_size * sizeof *logits);
    tfm_session *session = open_session(s, 1, 0, threads);
    tfm_error error;
    tfm_chunk chunk;
    for (i = 0; session && i < s->n; i++) {
        chunk = make_chunk(0, s->ids + i, 1, 1);
        CHECK_OK(tfm_eval(session, &chunk, 1, TFM_LOGITS, logits + i * vocab_size, &error), error);
    }
    if (session) {
        size_t half = s->n / 2;
        CHECK_SAME(logits, s->logits, s->n * vocab_size, where(s, "one at a time"));
        CHECK_OK(tfm_truncate(session, 0, half, &error), error);
        chunk = make_chunk(0, s->ids + half, s->n - half, s->n - half);
        CHECK_OK(tfm_eval(session, &chunk, 1, TFM_LOGITS, logits, &error), error);
        CHECK_SAME(logits, s->logits + half * vocab_size, (s->n - half) * vocab_size,
                   where(s, "the second half again"));
    }
    tfm_session_free(session);
    free(logits);
}

static void test_bits(const subject *s) {
    test_passes(s);
    test_n_outputs(s);
    test_one_at_a_time(s, 1);
    test_one_at_a_time(s, 3);
    test_together(s);
}

/* ---- rounded further: what comes out is near, and has the same bits however it is computed */

static float largest_difference(const float *a, const float *b, size_t n) {
    float largest = 0;
    size_t i;
    for (i = 0; i < n; i++)
        largest = fmaxf(largest, fabsf(a[i] - b[i]));
    return largest;
}

/* `tolerance`: of the largest logit. */
static void test_near(subject *other, const subject *s, const char *what, float tolerance) {
    size_t n = s->n * s->d->vocab_size, i;
    float largest = 0, difference;
    for (i = 0; i < n; i++)
        largest = fmaxf(largest, fabsf(s->logits[i]));
    other->logits = eval_all(other, s->ids, s->n, TFM_LOGITS, 0, 1);
    difference = largest_difference(other->logits, s->logits, n) / largest;
    CHECK_MSG(difference > 0 && difference < tolerance, "%s: %g of the largest logit", where(s, what),
              (double)difference);
    test_bits(other);
    free(other->logits);
}

/* Keys and values in 16 and in 8 bits. */
static void test_small_caches(const subject *s) {
    subject other = *s;
    if (s->n == 1) /* of one token alone the cache has nothing that counts */
        return;
    other.kv_dtype = TFM_F16;
    test_near(&other, s, "f16 cache", 2e-3f);
    other.kv_dtype = TFM_BF16;
    test_near(&other, s, "bf16 cache", 1.6e-2f); /* three bits less */
    other.kv_dtype = TFM_I8;
    test_near(&other, s, "int8 cache", 3e-2f);
}

static void test_i8(const subject *s, const char *path) {
    subject other = *s;
    tfm_load_options options;
    tfm_model *model;
    tfm_error error;
    memset(&options, 0, sizeof options);
    options.dtype = TFM_I8;
    model = tfm_load(path, &options, &error);
    CHECK_MSG(model != NULL, "%s", error.message);
    if (!model)
        return;
    other.model = model;
    test_near(&other, s, "i8", 0.1f);
    tfm_free(model);
}

/* ---- */

static void test_on(subject *s, const char *path, tfm_isa isa) {
    s->isa = isa;
    test_outputs(s);
    test_greedy(s, 1);
    test_greedy(s, 3);
    test_rounded(s, path, TFM_F16);
    test_rounded(s, path, TFM_BF16);
    test_bits(s);
    test_small_caches(s);
    test_i8(s, path);
    free(s->logits);
}

static void test_model(const char *name) {
    tfm_isa isas[TFM_ISA_COUNT];
    size_t n_isas = test_isas(isas), i;
    char path[128];
    tfm_error error;
    tfm_model *model;
    subject s;
    snprintf(path, sizeof path, "tests/golden/model_%s.tfm", name);
    model = tfm_load(path, NULL, &error);
    if (!model)
        test_fatal("%s", error.message);
    memset(&s, 0, sizeof s);
    s.name = name;
    s.model = model;
    s.d = tfm_model_description(model);
    s.ids = golden_ints(golden, &s.n, "%s.ids", name);
    s.expected = golden_floats(golden, s.n * s.d->vocab_size, "%s.logits", name);
    CHECK_MSG(s.n == tfm_model_stack(s.model)->n_positions, "%s: %lu ids", name, (unsigned long)s.n);
    for (i = 0; i < n_isas; i++)
        test_on(&s, path, isas[i]);
    tfm_free(model);
}

void test_models(void) {
    size_t i;
    golden = golden_open("models");
    for (i = 0; i < sizeof names / sizeof *names; i++)
        test_model(names[i]);
    tfm_file_close(golden);
}
