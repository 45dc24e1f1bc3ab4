/* Encoders against transformers: hidden states, logits, pooled vectors, classes, on every instruction set; the same bits
 * for a text alone and among others; and what is refused. */
#include "test.h"

#include <math.h>

#define TOLERANCE 1e-5

static tfm_file *golden;

/* One of the golden models on one instruction set, with its texts: see write_encoders in make_golden.py. */
enum { MAX_TEXTS = 8 };

typedef struct subject {
    const char *name;
    tfm_model *model;
    const tfm_description *d;
    tfm_isa isa;
    tfm_text texts[MAX_TEXTS];
    size_t n_texts, n_rows; /* n_rows: tokens of all texts */
} subject;

static const char *where(const subject *s, const char *what) {
    return test_text("%s on %s, %s", s->name, tfm_isa_name(s->isa), what);
}

static const char *const what_names[] = {"logits", "hidden", "pooled", "classes"}; /* in tfm_output's order */

static tfm_session *open_session(const subject *s, size_t max_rows, int threads) {
    tfm_session_options options;
    tfm_session *session;
    tfm_error error;
    memset(&options, 0, sizeof options);
    options.max_rows = max_rows;
    options.engine.isa = s->isa;
    options.engine.threads = threads;
    if (!threads)
        options.engine.parallel_for = test_backwards;
    session = tfm_session_create(s->model, &options, &error);
    CHECK_MSG(session != NULL, "%s: %s", s->name, error.message);
    return session;
}

/* Numbers that a kind of output has for a text of n tokens. */
static size_t output_size(const subject *s, tfm_output what, size_t n) {
    switch (what) {
    case TFM_LOGITS: return n * s->d->vocab_size;
    case TFM_HIDDEN: return n * s->d->d_model;
    case TFM_POOLED: return s->d->d_model;
    default: return (s->d->classifier == TFM_TOKEN_CLASSIFIER ? n : 1) * s->d->n_labels;
    }
}

static size_t outputs_size(const subject *s, tfm_output what) {
    size_t sum = 0, i;
    for (i = 0; i < s->n_texts; i++)
        sum += output_size(s, what, s->texts[i].n_tokens);
    return sum;
}

/* All texts in one call; the caller frees the outputs. */
static float *encode(const subject *s, tfm_output what, size_t max_rows, int threads) {
    float *outputs = (float *)test_allocate(outputs_size(s, what) * sizeof *outputs);
    tfm_session *session = open_session(s, max_rows, threads);
    tfm_error error;
    if (session)
        CHECK_OK(tfm_encode(session, s->texts, s->n_texts, what, outputs, &error), error);
    tfm_session_free(session);
    return outputs;
}

/* ---- the same bits */

/* Each text alone, backwards, twice: a session keeps nothing of the texts before. */
static void check_alone(const subject *s, tfm_output what, const float *expected) {
    float *outputs = (float *)test_allocate(outputs_size(s, what) * sizeof *outputs);
    tfm_session *session = open_session(s, 0, 1);
    tfm_error error;
    size_t i, at, round;
    for (round = 0; session && round < 2; round++)
        for (i = s->n_texts, at = outputs_size(s, what); i--;) {
            const size_t n = output_size(s, what, s->texts[i].n_tokens);
            at -= n;
            CHECK_OK(tfm_encode(session, s->texts + i, 1, what, outputs, &error), error);
            CHECK_SAME(outputs, expected + at, n,
                       where(s, test_text("%s of text %lu alone", what_names[what], (unsigned long)i)));
        }
    tfm_session_free(session);
    free(outputs);
}

static void check_bits(const subject *s, tfm_output what, const float *expected) {
    static const struct {
        size_t max_rows;
        int threads;
    } ways[] = {{0, 3}, {0, 0}, {40, 1}, {60, 3}, {7, 1}};
    size_t i;
    for (i = 0; i < sizeof ways / sizeof *ways; i++) {
        float *outputs = encode(s, what, ways[i].max_rows, ways[i].threads);
        CHECK_SAME(outputs, expected, outputs_size(s, what),
                   where(s, test_text("%s, passes of %lu, %d threads", what_names[what],
                                      (unsigned long)ways[i].max_rows, ways[i].threads)));
        free(outputs);
    }
    check_alone(s, what, expected);
}

/* ---- against transformers */

static void check_output(const subject *s, tfm_output what) {
    const size_t n = outputs_size(s, what);
    const float *expected = golden_floats(golden, n, "%s.%s", s->name, what_names[what]);
    float *outputs = encode(s, what, 0, 1);
    CHECK_CLOSE(outputs, expected, n, TOLERANCE, where(s, what_names[what]));
    check_bits(s, what, outputs);
    free(outputs);
}

static void to_length_1(float *y, size_t n) {
    double sum = 0;
    size_t i;
    for (i = 0; i < n; i++)
        sum += (double)y[i] * (double)y[i];
    for (i = 0; i < n; i++)
        y[i] = (float)((double)y[i] / sqrt(sum));
}

/* What tfm_embed is to give: pooled[n_texts][d_model], the caller's to free. */
static float *expected_vectors(const subject *s, tfm_pooling pooling, int normalize) {
    const size_t d_model = s->d->d_model, n = s->n_texts * d_model;
    float *vectors = (float *)test_allocate(n * sizeof *vectors);
    const float *hidden;
    size_t row = 0, i;
    if (pooling != TFM_POOL_CLS)
        memcpy(vectors, golden_floats(golden, n, pooling == TFM_POOL_MEAN ? "%s.mean" : "%s.max", s->name),
               n * sizeof *vectors);
    else {
        hidden = golden_floats(golden, s->n_rows * d_model, "%s.hidden", s->name);
        for (i = 0; i < s->n_texts; row += s->texts[i++].n_tokens)
            memcpy(vectors + i * d_model, hidden + row * d_model, d_model * sizeof *vectors);
    }
    for (i = 0; normalize && i < s->n_texts; i++)
        to_length_1(vectors + i * d_model, d_model);
    return vectors;
}

static void check_embed(const subject *s, tfm_session *session, tfm_pooling pooling, int normalize,
                        const float *expected, const char *what) {
    const size_t n = s->n_texts * s->d->d_model;
    float *vectors = (float *)test_allocate(n * sizeof *vectors);
    tfm_error error;
    CHECK_OK(tfm_embed(session, s->texts, s->n_texts, pooling, normalize, vectors, &error), error);
    CHECK_CLOSE(vectors, expected, n, TOLERANCE, where(s, what));
    free(vectors);
}

static void test_embed(const subject *s) {
    static const char *const names[] = {"", "cls", "mean", "max"};
    tfm_session *session = open_session(s, 0, 1);
    int pooling, normalize;
    float *expected;
    for (pooling = TFM_POOL_CLS; session && pooling <= TFM_POOL_MAX; pooling++)
        for (normalize = 0; normalize < 2; normalize++) {
            expected = expected_vectors(s, (tfm_pooling)pooling, normalize);
            check_embed(s, session, (tfm_pooling)pooling, normalize, expected,
                        test_text("%s%s", names[pooling], normalize ? ", normalized" : ""));
            free(expected);
        }
    /* The model's own way. */
    if (session && s->d->pooling) {
        expected = expected_vectors(s, TFM_POOL_MEAN, 1);
        CHECK(s->d->pooling == TFM_POOL_MEAN && s->d->pool_normalize && s->d->pool_max_tokens == 24);
        check_embed(s, session, TFM_NO_POOLING, 0, expected, "its own way");
        free(expected);
    } else if (session) {
        expected = encode(s, TFM_POOLED, 0, 1);
        check_embed(s, session, TFM_NO_POOLING, 0, expected, "the pooler");
        free(expected);
    }
    tfm_session_free(session);
}

/* ---- int8: near, and the same bits in any company */

static double cosine(const float *a, const float *b, size_t n) {
    double ab = 0, aa = 0, bb = 0;
    size_t i;
    for (i = 0; i < n; i++) {
        ab += (double)a[i] * (double)b[i];
        aa += (double)a[i] * (double)a[i];
        bb += (double)b[i] * (double)b[i];
    }
    return ab / sqrt(aa * bb);
}

static tfm_model *load(const char *name, tfm_dtype dtype) {
    tfm_load_options options;
    tfm_error error;
    tfm_model *model;
    memset(&options, 0, sizeof options);
    options.dtype = dtype;
    model = tfm_load(test_text("tests/golden/encoder_%s.tfm", name), &options, &error);
    if (!model)
        test_fatal("%s", error.message);
    return model;
}

static void test_i8(const subject *s) {
    subject other = *s;
    const size_t d_model = s->d->d_model;
    float *expected = expected_vectors(s, TFM_POOL_MEAN, 0);
    float *vectors = (float *)test_allocate(s->n_texts * d_model * sizeof *vectors), *hidden;
    tfm_session *session;
    tfm_error error;
    size_t i;
    other.model = load(s->name, TFM_I8);
    other.d = tfm_model_description(other.model);
    session = open_session(&other, 0, 1);
    if (session)
        CHECK_OK(tfm_embed(session, s->texts, s->n_texts, TFM_POOL_MEAN, 0, vectors, &error), error);
    for (i = 0; session && i < s->n_texts; i++) {
        const double similar = cosine(vectors + i * d_model, expected + i * d_model, d_model);
        CHECK_MSG(similar >= 0.998 && similar < 1, "%s: text %lu: %.6f", where(s, "int8"), (unsigned long)i, similar);
    }
    hidden = encode(&other, TFM_HIDDEN, 0, 1);
    check_bits(&other, TFM_HIDDEN, hidden);
    free(hidden);
    tfm_session_free(session);
    tfm_free(other.model);
    free(vectors);
    free(expected);
}

/* ---- what is refused */

static void check_refused(tfm_status found, tfm_status expected, const tfm_error *error, const char *words) {
    CHECK_MSG(found == expected && error->status == expected && strstr(error->message, words), "status %d, '%s'",
              (int)found, error->message);
}

static tfm_text text_of(const int32_t *tokens, const int32_t *types, size_t n) {
    tfm_text text;
    memset(&text, 0, sizeof text);
    text.tokens = tokens;
    text.types = types;
    text.n_tokens = n;
    return text;
}

static void test_refused(const subject *s) {
    int32_t ids[41] = {0}, types[2] = {0, 2}, low[2] = {0, -1};
    float *outputs = (float *)test_allocate(41 * s->d->vocab_size * sizeof *outputs);
    tfm_session *session = open_session(s, 0, 1);
    tfm_text texts[2];
    tfm_chunk chunk;
    tfm_error error;
    texts[0] = text_of(ids, NULL, 3);
#define REFUSED(text, status, words)                                                                                   \
    texts[1] = text;                                                                                                   \
    check_refused(tfm_encode(session, texts, 2, TFM_HIDDEN, outputs, &error), status, &error, words);                  \
    check_refused(tfm_embed(session, texts, 2, TFM_POOL_MEAN, 1, outputs, &error), status, &error, words)
    REFUSED(text_of(ids, NULL, 41), TFM_ERROR_CONTEXT_FULL, "text 1 has 41 tokens");
    REFUSED(text_of(ids, NULL, 0), TFM_ERROR_ARGUMENT, "text 1 has 0 tokens");
    REFUSED(text_of(low, NULL, 2), TFM_ERROR_ARGUMENT, "token id -1");
    low[1] = (int32_t)s->d->vocab_size;
    REFUSED(text_of(low, NULL, 2), TFM_ERROR_ARGUMENT, test_text("token id %ld", (long)low[1]));
    REFUSED(text_of(ids, types, 2), TFM_ERROR_ARGUMENT, "token type 2");
    types[1] = -1;
    REFUSED(text_of(ids, types, 2), TFM_ERROR_ARGUMENT, "token type -1");
#undef REFUSED
    check_refused(tfm_encode(session, texts, 1, (tfm_output)9, outputs, &error), TFM_ERROR_ARGUMENT, &error,
                  "output 9");
    check_refused(tfm_embed(session, texts, 1, (tfm_pooling)9, 0, outputs, &error), TFM_ERROR_ARGUMENT, &error,
                  "pooling 9");
    memset(&chunk, 0, sizeof chunk);
    chunk.tokens = ids;
    chunk.n_tokens = chunk.n_outputs = 1;
    CHECK(tfm_eval(session, &chunk, 1, TFM_HIDDEN, outputs, &error) != TFM_OK && error.message[0]);
    if (!s->d->head)
        check_refused(tfm_encode(session, texts, 1, TFM_LOGITS, outputs, &error), TFM_ERROR_UNSUPPORTED, &error,
                      "no head");
    if (!s->d->classifier)
        check_refused(tfm_encode(session, texts, 1, TFM_CLASSES, outputs, &error), TFM_ERROR_UNSUPPORTED, &error,
                      "no classifier");
    CHECK_OK(tfm_encode(session, texts, 1, TFM_HIDDEN, outputs, &error), error); /* none of that did harm */
    tfm_session_free(session);
    free(outputs);
}

/* A decoder encodes nothing. */
static void test_decoder(void) {
    int32_t id = 1;
    float y[4096];
    tfm_text text = text_of(&id, NULL, 1);
    tfm_error error;
    tfm_model *model = tfm_load(TEST_MODEL, NULL, &error);
    tfm_session *session = model ? tfm_session_create(model, NULL, &error) : NULL;
    if (!session)
        test_fatal("%s", error.message);
    check_refused(tfm_encode(session, &text, 1, TFM_HIDDEN, y, &error), TFM_ERROR_UNSUPPORTED, &error, "no encoder");
    check_refused(tfm_embed(session, &text, 1, TFM_POOL_MEAN, 0, y, &error), TFM_ERROR_UNSUPPORTED, &error,
                  "no encoder");
    tfm_session_free(session);
    tfm_free(model);
}

/* A text of which no token is seen: numbers for each token, and zeros where they are pooled. */
static void test_hidden_text(const subject *s) {
    static const int32_t ids[4] = {5, 6, 7, 5}, mask[4] = {0, 0, 0, 0};
    const size_t width = s->d->d_model;
    float *y = (float *)test_allocate(4 * width * sizeof *y);
    tfm_session *session = tfm_session_create(s->model, NULL, NULL);
    tfm_text text = text_of(ids, NULL, 4);
    tfm_error error;
    size_t i, wrong = 0;
    int pooling, normalize;
    text.mask = mask;
    CHECK_OK(tfm_encode(session, &text, 1, TFM_HIDDEN, y, &error), error);
    for (i = 0; i < 4 * width; i++)
        wrong += !(fabsf(y[i]) < 1e6f);
    for (pooling = TFM_POOL_CLS; pooling <= TFM_POOL_MAX; pooling++)
        for (normalize = 0; normalize < 2; normalize++) {
            CHECK_OK(tfm_embed(session, &text, 1, (tfm_pooling)pooling, normalize, y, &error), error);
            for (i = 0; i < width; i++)
                wrong += y[i] != 0;
        }
    CHECK_MSG(!wrong, "%s: a text of which nothing is seen: %lu numbers are wrong", s->name, (unsigned long)wrong);
    tfm_session_free(session);
    free(y);
}

/* ---- */

static void read_texts(subject *s) {
    const int32_t *lengths = golden_ints(golden, &s->n_texts, "%s.lengths", s->name);
    const int32_t *ids = golden_ints(golden, &s->n_rows, "%s.ids", s->name);
    const int32_t *types = golden_ints(golden, NULL, "%s.types", s->name);
    const int32_t *mask = golden_ints(golden, NULL, "%s.mask", s->name);
    size_t row = 0, i, k, holes = 0, seconds = 0;
    if (s->n_texts > MAX_TEXTS)
        test_fatal("%s: too many texts", s->name);
    for (i = 0; i < s->n_texts; row += (size_t)lengths[i++]) {
        s->texts[i] = text_of(ids + row, types + row, (size_t)lengths[i]);
        s->texts[i].mask = mask + row;
    }
    for (k = 0; k < s->n_rows; k++) {
        holes += !mask[k];
        seconds += types[k] == 1;
    }
    CHECK_MSG(holes > 2 && seconds > 5, "%s: the texts have %lu holes, %lu tokens of type 1", s->name,
              (unsigned long)holes, (unsigned long)seconds);
}

static void test_labels(const tfm_model *model, const char *const *labels, size_t n) {
    size_t i, size;
    CHECK(tfm_model_description(model)->n_labels == n);
    CHECK(tfm_model_description(model)->classifier_problem == TFM_SINGLE_LABEL);
    for (i = 0; i < n; i++) {
        const char *label = tfm_model_label(model, i, &size);
        CHECK_MSG(label && size == strlen(labels[i]) && !memcmp(label, labels[i], size), "label %lu", (unsigned long)i);
    }
    CHECK(!tfm_model_label(model, n, &size) && !size);
}

static void test_model(const char *name) {
    static const char *const sequence_labels[] = {"bad", "so so", "good"}, *const token_labels[] = {"O", "NAME"};
    tfm_isa isas[TFM_ISA_COUNT];
    size_t n_isas = test_isas(isas), i;
    subject s;
    memset(&s, 0, sizeof s);
    s.name = name;
    s.model = load(name, TFM_NO_DTYPE);
    s.d = tfm_model_description(s.model);
    read_texts(&s);
    CHECK(s.d->kind == TFM_ENCODER && tfm_has_tokenizer(s.model) && tfm_mask_token(s.model) == 4);
    if (s.d->classifier)
        test_labels(s.model, s.d->classifier == TFM_TOKEN_CLASSIFIER ? token_labels : sequence_labels,
                    s.d->classifier == TFM_TOKEN_CLASSIFIER ? 2 : 3);
    for (i = 0; i < n_isas; i++) {
        s.isa = isas[i];
        if (s.d->head)
            check_output(&s, TFM_LOGITS);
        if (s.d->classifier)
            check_output(&s, TFM_CLASSES);
        else {
            check_output(&s, TFM_HIDDEN);
            test_embed(&s);
        }
        if (s.d->pooler && !s.d->pooling)
            check_output(&s, TFM_POOLED);
        test_i8(&s);
    }
    test_refused(&s);
    test_hidden_text(&s);
    tfm_free(s.model);
}

void test_encoders(void) {
    golden = golden_open("encoders");
    test_model("mlm");
    test_model("sequence");
    test_model("token");
    test_model("sentence");
    test_decoder();
    tfm_file_close(golden);
}
