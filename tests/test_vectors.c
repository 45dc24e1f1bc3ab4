/* PyTorch's own nn.Transformer, nn.TransformerEncoder and nn.TransformerDecoder on vectors, with key padding masks that have
 * holes and boolean target masks, by the public layers; as they were converted, and in int8. See write_vectors in
 * make_golden.py. */
#include "test.h"

#include <math.h>

enum { MAX_TEXTS = 4 };

/* Texts of vectors, one behind another: [sum of lengths][d_model]. */
typedef struct batch {
    const float *rows;
    const int32_t *lengths; /* [n] */
    size_t n, n_rows, longest;
} batch;

typedef struct subject {
    const char *name;
    tfm_model *model;
    const tfm_description *d;
    tfm_engine *engine;
    const char *isa;
    batch source, target;
    const int32_t *seen;   /* [source.n_rows], 0: a token of the source that no token sees */
    const int32_t *hidden; /* [target.longest][target.longest], 1: not seen by the row's token */
} subject;

static batch read_batch(const tfm_file *golden, const char *name, const char *what, size_t width) {
    batch b;
    size_t i;
    memset(&b, 0, sizeof b);
    b.lengths = golden_ints(golden, &b.n, "%s.%s.lengths", name, what);
    for (i = 0; i < b.n; i++) {
        const size_t length = (size_t)b.lengths[i];
        b.n_rows += length;
        b.longest = length > b.longest ? length : b.longest;
    }
    if (b.n > MAX_TEXTS)
        test_fatal("%s: too many texts", name);
    b.rows = golden_floats(golden, b.n_rows * width, "%s.%s", name, what);
    return b;
}

/* x[rows of the spans][d_model] becomes what the blocks and the norm behind them make of it. */
static void run_stack(const subject *s, int encoder, float *x, const tfm_span *spans, size_t n_spans) {
    const size_t n_layers = encoder ? s->d->encoder.n_layers : s->d->decoder.n_layers;
    const tfm_norm *norm = encoder ? tfm_model_encoder_final_norm(s->model) : tfm_model_final_norm(s->model);
    tfm_error error;
    size_t n_rows = 0, i;
    for (i = 0; i < n_layers; i++)
        CHECK_OK(tfm_block_forward(s->engine,
                                   encoder ? tfm_model_encoder_block(s->model, i) : tfm_model_block(s->model, i), i, x,
                                   spans, n_spans, &error),
                 error);
    for (i = 0; i < n_spans; i++)
        n_rows += spans[i].n_rows;
    if (norm)
        CHECK_OK(tfm_norm_forward(s->engine, norm, x, n_rows, x, &error), error);
}

/* Texts first, first + 1, ... of the sources through the encoder, if there is one: x[their rows][d_model]. */
static void run_encoder(const subject *s, size_t first, size_t n, float *x) {
    float *masks = (float *)test_allocate(s->source.n_rows * sizeof *masks);
    tfm_span spans[MAX_TEXTS];
    size_t at = 0, i;
    memset(spans, 0, sizeof spans);
    for (i = 0; i < s->source.n_rows; i++)
        masks[i] = s->seen[i] ? 0 : -INFINITY;
    for (i = 0; i < first + n; at += (size_t)s->source.lengths[i++])
        if (i >= first) {
            spans[i - first].n_rows = (size_t)s->source.lengths[i];
            spans[i - first].mask = masks + at;
            spans[i - first].same_mask = 1;
        }
    run_stack(s, 1, x, spans, n);
    free(masks);
}

/* What the decoder's texts attend to: those of the source's rows that are seen. */
static void fill_memory(const subject *s, const int32_t *seen, size_t n_rows, const float *rows, tfm_kv *memory) {
    const size_t width = s->d->d_model, n_layers = s->d->decoder.n_layers;
    float *kept = (float *)test_allocate(n_rows * width * sizeof *kept);
    tfm_error error;
    size_t n = 0, i;
    for (i = 0; i < n_rows; i++)
        if (seen[i])
            memcpy(kept + n++ * width, rows + i * width, width * sizeof *kept);
    CHECK_OK(
        tfm_kv_create(memory, TFM_F32, n_layers, s->d->decoder.n_kv_heads, s->d->decoder.head_dim, n, NULL, &error),
        error);
    for (i = 0; i < n_layers; i++)
        CHECK_OK(tfm_memory_forward(s->engine, tfm_model_block(s->model, i), i, kept, n, memory, &error), error);
    memory->n_tokens = n;
    free(kept);
}

/* The corner [n][n] of the target mask, as what is added to scores. */
static float *target_mask(const subject *s, size_t n) {
    float *mask = (float *)test_allocate(n * n * sizeof *mask);
    size_t i, k;
    for (i = 0; i < n; i++)
        for (k = 0; k < n; k++)
            mask[i * n + k] = s->hidden[i * s->target.longest + k] ? -INFINITY : 0;
    return mask;
}

/* Texts of the targets through the decoder: x[their rows][d_model], whose sources gave `encoded`. */
static void run_decoder(const subject *s, size_t first, size_t n, const float *encoded, float *x) {
    float *masks[MAX_TEXTS];
    tfm_kv memories[MAX_TEXTS];
    tfm_span spans[MAX_TEXTS];
    const int32_t *seen = s->seen;
    size_t i, source_rows;
    memset(spans, 0, sizeof spans);
    memset(memories, 0, sizeof memories);
    for (i = 0; i < first; i++)
        seen += s->source.lengths[i];
    for (i = 0; i < n; i++, seen += source_rows, encoded += source_rows * s->d->d_model) {
        source_rows = (size_t)s->source.lengths[first + i];
        fill_memory(s, seen, source_rows, encoded, memories + i);
        spans[i].n_rows = (size_t)s->target.lengths[first + i];
        spans[i].mask = masks[i] = target_mask(s, spans[i].n_rows);
        spans[i].memory = memories + i;
    }
    run_stack(s, 0, x, spans, n);
    for (i = 0; i < n; i++) {
        free(masks[i]);
        tfm_kv_free(memories + i, NULL);
    }
}

/* The rows of texts first, first + 1, ...; the caller frees them. */
static float *copy_texts(const subject *s, const batch *b, size_t first, size_t n, size_t *n_numbers) {
    const float *rows = b->rows;
    float *copy;
    size_t i;
    for (i = 0; i < first; i++)
        rows += (size_t)b->lengths[i] * s->d->d_model;
    for (*n_numbers = 0; i < first + n; i++)
        *n_numbers += (size_t)b->lengths[i] * s->d->d_model;
    copy = (float *)test_allocate(*n_numbers * sizeof *copy);
    memcpy(copy, rows, *n_numbers * sizeof *copy);
    return copy;
}

/* The results of texts first, first + 1, ... in one run; the caller frees them. */
static float *run_texts(const subject *s, size_t first, size_t n, size_t *n_numbers) {
    float *source = copy_texts(s, &s->source, first, n, n_numbers), *target;
    if (s->d->kind != TFM_DECODER)
        run_encoder(s, first, n, source);
    if (s->d->kind == TFM_ENCODER)
        return source;
    target = copy_texts(s, &s->target, first, n, n_numbers);
    run_decoder(s, first, n, source, target);
    free(source);
    return target;
}

static void check_alone(const subject *s, const float *expected) {
    size_t i, n;
    for (i = 0; i < s->source.n; i++) {
        float *found = run_texts(s, i, 1, &n);
        CHECK_SAME(found, expected, n, test_text("%s on %s, text %lu alone", s->name, s->isa, (unsigned long)i));
        expected += n;
        free(found);
    }
}

static void check_all(const subject *s, const tfm_file *golden, double tolerance, const char *type) {
    size_t n;
    float *found = run_texts(s, 0, s->source.n, &n);
    CHECK_CLOSE(found, golden_floats(golden, n, "%s.expected", s->name), n, tolerance,
                test_text("%s on %s, %s", s->name, s->isa, type));
    check_alone(s, found);
    free(found);
}

/* dtype 0: as in the file, which is f16, as PyTorch's weights were. */
static void check_model(const tfm_file *golden, const char *name, tfm_dtype dtype, double tolerance) {
    tfm_isa isas[TFM_ISA_COUNT];
    tfm_load_options options;
    tfm_error error;
    subject s;
    size_t n = test_isas(isas), i;
    memset(&options, 0, sizeof options);
    memset(&s, 0, sizeof s);
    options.dtype = dtype;
    s.name = name;
    s.model = tfm_load(test_text("tests/golden/vectors_%s.tfm", name), &options, &error);
    CHECK_MSG(s.model != NULL, "%s: %s", name, error.message);
    if (!s.model)
        return;
    s.d = tfm_model_description(s.model);
    s.source = read_batch(golden, name, "source", s.d->d_model);
    s.seen = golden_ints(golden, NULL, "%s.seen", name);
    if (s.d->kind != TFM_ENCODER) {
        s.target = read_batch(golden, name, "target", s.d->d_model);
        s.hidden = golden_ints(golden, NULL, "%s.hidden", name);
    }
    for (i = 0; i < n; i++) {
        s.engine = test_engine(isas[i], 2);
        s.isa = tfm_isa_name(isas[i]);
        check_all(&s, golden, tolerance, dtype ? tfm_dtype_name(dtype) : "as in the file");
        tfm_engine_free(s.engine);
    }
    tfm_free(s.model);
}

void test_vectors(void) {
    static const char *const names[] = {"Transformer", "TransformerEncoder", "TransformerDecoder"};
    tfm_file *golden = golden_open("vectors");
    size_t i;
    for (i = 0; i < sizeof names / sizeof *names; i++) {
        check_model(golden, names[i], TFM_NO_DTYPE, 1e-5);
        check_model(golden, names[i], TFM_F32, 1e-5);
        check_model(golden, names[i], TFM_I8, 0.03);
    }
    tfm_file_close(golden);
}
