/* Layers against PyTorch: norms, activations, linear, attention, feed-forward, blocks; and what must hold for any of
 * them: the same bits in any pieces, on any threads, in any order. */
#include "test.h"

#include <math.h>

/* What the tests below run on. */
static tfm_file *golden; /* the file of the test that runs: one of these */
static tfm_file *golden_layers, *golden_options;
static tfm_engine *engine;
static const char *engine_name;

/* The reference is exact, so that this is what rounding in fp32 may do: some hundred roundings of 6e-8, partly
 * cancelling out, of numbers a few times larger than the largest result. */
#define TOLERANCE 2e-6

static void each_case(const char *group, void (*test)(const char *name)) {
    int32_t i, count = *golden_ints(golden, NULL, "%s", group);
    char name[32];
    CHECK_MSG(count > 0, "no cases of %s", group);
    for (i = 0; i < count; i++) {
        snprintf(name, sizeof name, "%s.%ld", group, (long)i);
        test(name);
    }
}

static const char *where(const char *name, const char *what) {
    return test_text("%s%s%s on %s", name, *what ? ", " : "", what, engine_name);
}

static float *new_floats(size_t n) {
    return (float *)test_allocate(n * sizeof(float));
}

/* ---- weights */

static tfm_linear load_linear(const char *name, const char *part, tfm_dtype dtype) {
    tfm_tensor weight = golden_tensor(golden, "%s%s.weight", name, part);
    tfm_error error;
    tfm_linear linear;
    memset(&linear, 0, sizeof linear);
    if (!weight.data)
        test_fatal("golden file: %s%s.weight is not there", name, part);
    CHECK_OK(tfm_pack(&weight, dtype, NULL, &linear.weight, &error), error);
    linear.bias = golden_tensor(golden, "%s%s.bias", name, part);
    return linear;
}

static void free_linear(tfm_linear *linear) {
    tfm_unpack(&linear->weight, NULL);
}

static tfm_norm load_norm(const char *name, const char *part, int rms) {
    tfm_norm norm;
    norm.kind = rms ? TFM_RMS_NORM : TFM_LAYER_NORM;
    norm.eps = *golden_floats(golden, 1, "%s.eps", name);
    norm.weight = golden_tensor(golden, "%s%s.weight", name, part);
    norm.bias = golden_tensor(golden, "%s%s.bias", name, part);
    return norm;
}

static tfm_attention load_attention(const char *name) {
    const int32_t *info = golden_ints(golden, NULL, "%s", name);
    tfm_attention attention;
    memset(&attention, 0, sizeof attention);
    attention.n_heads = (size_t)info[0];
    attention.n_kv_heads = (size_t)info[1];
    attention.head_dim = (size_t)info[2];
    attention.causal = info[4];
    attention.scale = 1 / sqrtf((float)info[2]);
    attention.qkv = load_linear(name, ".qkv", TFM_F32);
    attention.out = load_linear(name, ".out", TFM_F32);
    return attention;
}

static tfm_ffn load_ffn(const char *name, int gated, int32_t activation) {
    tfm_ffn ffn;
    memset(&ffn, 0, sizeof ffn);
    ffn.gated = gated;
    ffn.activation = (tfm_activation)activation;
    ffn.up = load_linear(name, ".up", TFM_F32);
    ffn.down = load_linear(name, ".down", TFM_F32);
    return ffn;
}

static tfm_block load_block(const char *name) {
    const int32_t *info = golden_ints(golden, NULL, "%s.block", name);
    tfm_block block;
    memset(&block, 0, sizeof block);
    block.norm_place = info[0] ? TFM_POST_NORM : TFM_PRE_NORM;
    block.attention_norm = load_norm(name, ".attention_norm", info[1]);
    block.ffn_norm = load_norm(name, ".ffn_norm", info[1]);
    block.attention = load_attention(name);
    block.ffn = load_ffn(name, info[2], info[4]);
    return block;
}

/* What attention has besides: see OptionAttention in make_golden.py. */
static tfm_attention load_option_attention(const char *name) {
    tfm_attention attention = load_attention(name);
    const int32_t *info = golden_ints(golden, NULL, "%s.attention", name);
    const float *numbers = golden_floats(golden, 3, "%s.numbers", name);
    attention.scale = numbers[0];
    attention.softcap = numbers[1];
    attention.window = (size_t)info[4];
    attention.rotary.n_pairs = (size_t)info[0];
    attention.rotary.interleaved = info[1];
    attention.rotary.scale = numbers[2];
    if (info[0])
        attention.rotary.frequencies = golden_floats(golden, (size_t)info[0], "%s.frequencies", name);
    attention.relative.n_buckets = (size_t)info[2];
    attention.relative.max_distance = (size_t)info[3];
    if (info[2])
        attention.relative.table = golden_floats(golden, (size_t)info[2] * attention.n_heads, "%s.table", name);
    attention.q_norm = load_norm(name, ".q_norm", 1);
    attention.k_norm = load_norm(name, ".k_norm", 1);
    return attention;
}

/* A block with options or with cross-attention; norms that it does not have have no weight. */
static tfm_block load_option_block(const char *name, int cross) {
    const int32_t *info = golden_ints(golden, NULL, "%s.block", name);
    tfm_block block;
    memset(&block, 0, sizeof block);
    block.norm_place = (tfm_norm_place)info[0];
    block.parallel = info[5];
    block.attention_norm = load_norm(name, ".attention_norm", info[1]);
    block.ffn_norm = load_norm(name, ".ffn_norm", info[1]);
    block.attention_post_norm = load_norm(name, ".attention_post_norm", info[1]);
    block.ffn_post_norm = load_norm(name, ".ffn_post_norm", info[1]);
    block.attention = cross ? load_attention(name) : load_option_attention(name);
    block.ffn = load_ffn(name, info[2], info[4]);
    if (cross) {
        block.cross.norm = load_norm(name, ".cross_norm", info[1]);
        block.cross.q = load_linear(name, ".cross_q", TFM_F32);
        block.cross.kv = load_linear(name, ".cross_kv", TFM_F32);
        block.cross.out = load_linear(name, ".cross_out", TFM_F32);
    }
    return block;
}

static void free_attention(tfm_attention *attention) {
    free_linear(&attention->qkv);
    free_linear(&attention->out);
}

static void free_ffn(tfm_ffn *ffn) {
    free_linear(&ffn->up);
    free_linear(&ffn->down);
}

/* ---- norms, activations, linear, feed-forward */

static void test_norm(const char *name) {
    const int32_t *info = golden_ints(golden, NULL, "%s", name);
    size_t rows = (size_t)info[1], n = (size_t)info[2], row;
    const float *x = golden_floats(golden, rows * n, "%s.x", name), *y = golden_floats(golden, rows * n, "%s.y", name);
    tfm_norm norm = load_norm(name, "", info[0]);
    float *found = new_floats(rows * n), *in_place = new_floats(rows * n);
    tfm_error error;
    CHECK((norm.bias.data != NULL) == info[3]);
    CHECK_OK(tfm_norm_forward(engine, &norm, x, rows, found, &error), error);
    for (row = 0; row < rows; row++) /* each for itself: the largest result is another */
        CHECK_CLOSE(found + row * n, y + row * n, n, TOLERANCE, where(name, test_text("row %lu", (unsigned long)row)));
    memcpy(in_place, x, rows * n * sizeof *x);
    CHECK_OK(tfm_norm_forward(engine, &norm, in_place, rows, in_place, &error), error);
    CHECK_SAME(in_place, found, rows * n, where(name, "in place"));
    free(found);
    free(in_place);
}

/* The error that a result may have. tanh is computed to an absolute accuracy, the others also to a relative one, but
 * where they are as good as 0 (x * 1e-25): what adds 1 before it multiplies by x loses 2^-24 x. */
static double activation_error(tfm_activation activation, float x, float expected) {
    return activation == TFM_TANH ? 2.5e-7 : 1e-6 * fabs((double)expected) + 1e-7 * fabs((double)x);
}

static void test_activation(tfm_activation activation, const char *name) {
    tfm_tensor inputs = golden_tensor(golden, "activation.x");
    size_t n = inputs.shape[0], i, wrong = 0;
    const float *x = golden_floats(golden, n, "activation.x"), *y = golden_floats(golden, n, "activation.%s", name);
    float *found = new_floats(n + 1), *in_place = new_floats(n);
    tfm_error error;
    found[n] = 1234;
    CHECK_OK(tfm_activation_forward(engine, activation, x, n, found, &error), error);
    for (i = 0; i < n; i++)
        if (!(fabs((double)found[i] - (double)y[i]) <= activation_error(activation, x[i], y[i])) && !wrong++)
            CHECK_MSG(0, "%s: of %.9g is %.9g, expected %.9g", where(name, ""), (double)x[i], (double)found[i],
                      (double)y[i]);
    CHECK_MSG(!wrong, "%s: %lu wrong", where(name, ""), (unsigned long)wrong);
    CHECK(found[n] == 1234);
    memcpy(in_place, x, n * sizeof *x);
    CHECK_OK(tfm_activation_forward(engine, activation, in_place, n, in_place, &error), error);
    CHECK_SAME(in_place, found, n, where(name, "in place"));
    found[0] = NAN;
    CHECK_OK(tfm_activation_forward(engine, activation, found, 1, found, &error), error);
    CHECK_MSG(found[0] != found[0], "%s: NaN becomes %g", where(name, ""), (double)found[0]);
    free(found);
    free(in_place);
}

static void test_activations(void) {
    test_activation(TFM_RELU, "relu");
    test_activation(TFM_GELU, "gelu");
    test_activation(TFM_GELU_TANH, "gelu_tanh");
    test_activation(TFM_QUICK_GELU, "quick_gelu");
    test_activation(TFM_SILU, "silu");
    test_activation(TFM_TANH, "tanh");
}

/* The transpose packs to the same panels. */
static void check_columns(const char *name, const tfm_linear *linear, const float *x, size_t rows,
                          const float *expected) {
    tfm_tensor weight = golden_tensor(golden, "%s.weight", name);
    size_t out = weight.shape[0], in = weight.shape[1], o, i;
    float *transposed = new_floats(out * in), *found = new_floats(rows * out);
    tfm_linear other = *linear;
    tfm_error error;
    for (o = 0; o < out; o++)
        for (i = 0; i < in; i++)
            transposed[i * out + o] = ((const float *)weight.data)[o * in + i];
    weight.layout = TFM_COLS;
    weight.data = transposed;
    CHECK_OK(tfm_pack(&weight, TFM_F32, NULL, &other.weight, &error), error);
    CHECK_OK(tfm_linear_forward(engine, &other, x, rows, found, &error), error);
    CHECK_SAME(found, expected, rows * out, where(name, "columns"));
    free_linear(&other);
    free(transposed);
    free(found);
}

static void test_linear_as(const char *name, tfm_dtype dtype) {
    const int32_t *info = golden_ints(golden, NULL, "%s", name);
    size_t out = (size_t)info[0], in = (size_t)info[1], rows = (size_t)info[2], row;
    const float *x = golden_floats(golden, rows * in, "%s.x", name), *y;
    tfm_linear linear = load_linear(name, "", dtype);
    float *found = new_floats(rows * out), *single = new_floats(rows * out);
    tfm_error error;
    CHECK((linear.bias.data != NULL) == info[3]);
    CHECK_OK(tfm_linear_forward(engine, &linear, x, rows, found, &error), error);
    y = golden_floats(golden, rows * out, "%s.%s", name, tfm_dtype_name(dtype));
    CHECK_CLOSE(found, y, rows * out, TOLERANCE, where(name, tfm_dtype_name(dtype)));
    for (row = 0; row < rows; row++)
        CHECK_OK(tfm_linear_forward(engine, &linear, x + row * in, 1, single + row * out, &error), error);
    CHECK_SAME(single, found, rows * out, where(name, "row by row"));
    if (dtype == TFM_F32)
        check_columns(name, &linear, x, rows, found);
    free_linear(&linear);
    free(found);
    free(single);
}

static void test_linear(const char *name) {
    test_linear_as(name, TFM_F32);
    if (golden_tensor(golden, "%s.f16", name).data) {
        test_linear_as(name, TFM_F16);
        test_linear_as(name, TFM_BF16);
    }
}

static void test_ffn(const char *name) {
    const int32_t *info = golden_ints(golden, NULL, "%s", name);
    size_t width = (size_t)info[1], rows = (size_t)info[3], n = rows * width;
    tfm_ffn ffn = load_ffn(name, info[0], info[4]);
    const float *x = golden_floats(golden, n, "%s.x", name);
    float *found = new_floats(n);
    tfm_error error;
    CHECK(ffn.down.weight.shape[1] == (size_t)info[2]);
    CHECK_OK(tfm_ffn_forward(engine, &ffn, x, rows, found, &error), error);
    CHECK_CLOSE(found, golden_floats(golden, n, "%s.y", name), n, TOLERANCE, where(name, ""));
    free_ffn(&ffn);
    free(found);
}

/* ---- attention and blocks: the same tests for both */

typedef struct layer {
    const char *name;
    const tfm_attention *attention;
    const tfm_block *block; /* NULL: the attention alone */
    size_t width;
    size_t n_rows; /* of all sequences */
    const int32_t *lengths;
    size_t n_sequences;
    const float *x, *mask;  /* [n_rows][width]; [n_rows][n_rows] or NULL */
    const tfm_kv *memories; /* [n_sequences]: what cross-attention looks at, or NULL */
} layer;

#define MAX_SEQUENCES 8
#define CACHE_LAYERS ((size_t)3) /* the layer's keys and values go into the second of three */

static void run_layer(const layer *l, const float *x, const tfm_span *spans, size_t n_spans, float *y) {
    size_t rows = 0, i;
    tfm_error error;
    for (i = 0; i < n_spans; i++)
        rows += spans[i].n_rows;
    if (l->block) {
        memcpy(y, x, rows * l->width * sizeof *y);
        CHECK_OK(tfm_block_forward(engine, l->block, 1, y, spans, n_spans, &error), error);
    } else
        CHECK_OK(tfm_attention_forward(engine, l->attention, 1, x, spans, n_spans, y, &error), error);
}

static tfm_kv new_cache(const layer *l, size_t capacity) {
    tfm_error error;
    tfm_kv kv;
    CHECK_OK(tfm_kv_create(&kv, TFM_F32, CACHE_LAYERS, l->attention->n_kv_heads, l->attention->head_dim, capacity, NULL,
                           &error),
             error);
    return kv;
}

/* All sequences in one call, each a span: without caches, or with. */
static void run_spans(const layer *l, int cached, float *y) {
    tfm_span spans[MAX_SEQUENCES];
    tfm_kv kvs[MAX_SEQUENCES];
    size_t i;
    for (i = 0; i < l->n_sequences; i++) {
        memset(spans + i, 0, sizeof *spans);
        spans[i].n_rows = (size_t)l->lengths[i];
        spans[i].mask = l->mask;
        spans[i].memory = l->memories ? l->memories + i : NULL;
        if (cached) {
            kvs[i] = new_cache(l, spans[i].n_rows);
            spans[i].kv = kvs + i;
        }
    }
    run_layer(l, l->x, spans, l->n_sequences, y);
    for (i = 0; cached && i < l->n_sequences; i++)
        tfm_kv_free(kvs + i, NULL);
}

/* Rows [first, first + n) of a square mask, their first `keys` columns. The caller frees it. */
static float *cut_mask(const float *mask, size_t size, size_t first, size_t n, size_t keys) {
    float *cut = new_floats(n * keys);
    size_t i;
    for (i = 0; i < n; i++)
        memcpy(cut + i * keys, mask + (first + i) * size, keys * sizeof *cut);
    return cut;
}

/* One sequence, `step` tokens at a time through a cache with pages in an order of their own. */
static void run_steps(const layer *l, size_t sequence, size_t first, size_t step, float *y) {
    const size_t length = (size_t)l->lengths[sequence];
    static const uint32_t pages[] = {2, 0, 1};
    tfm_kv kv = new_cache(l, 3 * TFM_KV_PAGE);
    size_t n;
    kv.pages = pages;
    for (; kv.n_tokens < length; kv.n_tokens += n) {
        size_t row = first + kv.n_tokens;
        tfm_span span = {0, NULL, NULL, 0, NULL};
        float *mask = NULL;
        n = step < length - kv.n_tokens ? step : length - kv.n_tokens;
        if (l->mask)
            mask = cut_mask(l->mask, l->n_rows, kv.n_tokens, n, kv.n_tokens + n);
        span.n_rows = n;
        span.kv = &kv;
        span.mask = mask;
        span.memory = l->memories ? l->memories + sequence : NULL;
        run_layer(l, l->x + row * l->width, &span, 1, y + row * l->width);
        free(mask);
    }
    kv.pages = NULL;
    tfm_kv_free(&kv, NULL);
}

/* A causal layer gives the same bits, however its sequences are cut. */
static void check_steps(const layer *l, const float *expected) {
    static const size_t steps[] = {1, 2, 7, 130};
    float *y = new_floats(l->n_rows * l->width);
    size_t i, s, row;
    for (s = 0; s < sizeof steps / sizeof *steps; s++) {
        for (i = 0, row = 0; i < l->n_sequences; row += (size_t)l->lengths[i++])
            run_steps(l, i, row, steps[s], y);
        CHECK_SAME(y, expected, l->n_rows * l->width,
                   where(l->name, test_text("%lu at a time", (unsigned long)steps[s])));
    }
    free(y);
}

/* All sequences as one, with a mask that shows each token only its own: whole pages are masked out. */
static void check_masked_apart(const layer *l, const float *expected) {
    float *mask = new_floats(l->n_rows * l->n_rows), *y = new_floats(l->n_rows * l->width);
    size_t i, j, first = 0, sequence = 0;
    tfm_span span = {0, NULL, NULL, 0, NULL};
    for (i = 0; i < l->n_rows; i++) {
        if (i == first + (size_t)l->lengths[sequence])
            first += (size_t)l->lengths[sequence++];
        for (j = 0; j < l->n_rows; j++)
            mask[i * l->n_rows + j] = j < first || j >= first + (size_t)l->lengths[sequence] ? -INFINITY : 0;
    }
    span.n_rows = l->n_rows;
    span.kv = NULL;
    span.mask = mask;
    run_layer(l, l->x, &span, 1, y);
    /* Rotary angles are those of other positions here, each p x frequency rounded to 24 bits: twice the tolerance. */
    CHECK_CLOSE(y, expected, l->n_rows * l->width, l->attention->rotary.n_pairs ? 2 * TOLERANCE : TOLERANCE,
                where(l->name, "masked apart"));
    free(mask);
    free(y);
}

static void test_layer(const char *name, const tfm_attention *attention, const tfm_block *block,
                       const tfm_kv *memories) {
    const int32_t *info = golden_ints(golden, NULL, "%s", name);
    layer l;
    size_t n = 0, i;
    const float *expected;
    float *y, *cached;
    l.name = name;
    l.attention = attention;
    l.block = block;
    l.memories = memories;
    l.width = (size_t)info[3];
    l.lengths = golden_ints(golden, &l.n_sequences, "%s.lengths", name);
    l.n_rows = 0;
    if (l.n_sequences > MAX_SEQUENCES)
        test_fatal("%s: too many sequences", name);
    for (i = 0; i < l.n_sequences; i++)
        l.n_rows += (size_t)l.lengths[i];
    n = l.n_rows * l.width;
    l.x = golden_floats(golden, n, "%s.x", name);
    l.mask = info[5] ? golden_floats(golden, l.n_rows * l.n_rows, "%s.mask", name) : NULL;
    expected = golden_floats(golden, n, "%s.y", name);
    y = new_floats(n);
    cached = new_floats(n);
    run_spans(&l, 0, y);
    CHECK_CLOSE(y, expected, n, TOLERANCE, where(name, ""));
    run_spans(&l, 1, cached);
    CHECK_SAME(cached, y, n, where(name, "with a cache"));
    if (attention->causal)
        check_steps(&l, y);
    if (l.n_sequences > 1 && !memories)
        check_masked_apart(&l, expected);
    free(y);
    free(cached);
}

static void test_attention(const char *name) {
    tfm_attention attention = load_attention(name);
    test_layer(name, &attention, NULL, NULL);
    free_attention(&attention);
}

static void test_block(const char *name) {
    tfm_block block = load_block(name);
    test_layer(name, &block.attention, &block, NULL);
    free_attention(&block.attention);
    free_ffn(&block.ffn);
}

/* An attention with options, or a block around one. */
static void test_option(const char *name) {
    tfm_block block;
    if (!tfm_file_find_meta(golden, test_text("%s.block", name))) {
        tfm_attention attention = load_option_attention(name);
        test_layer(name, &attention, NULL, NULL);
        free_attention(&attention);
        return;
    }
    block = load_option_block(name, 0);
    test_layer(name, &block.attention, &block, NULL);
    free_attention(&block.attention);
    free_ffn(&block.ffn);
}

/* What a block's cross-attention makes of an encoder's results, in the second of three layers. */
static tfm_kv new_memory(const tfm_block *block, const float *results, size_t n_rows) {
    tfm_error error;
    tfm_kv memory;
    CHECK_OK(tfm_kv_create(&memory, TFM_F32, CACHE_LAYERS, block->attention.n_kv_heads, block->attention.head_dim,
                           n_rows, NULL, &error),
             error);
    CHECK_OK(tfm_memory_forward(engine, block, 1, results, n_rows, &memory, &error), error);
    memory.n_tokens = n_rows;
    return memory;
}

static void test_cross(const char *name) {
    tfm_block block = load_option_block(name, 1);
    const size_t width = block.cross.q.weight.shape[1];
    size_t n, i, row = 0, n_rows = 0;
    const int32_t *sources = golden_ints(golden, &n, "%s.sources", name);
    tfm_kv memories[MAX_SEQUENCES];
    const float *results;
    for (i = 0; i < n; i++)
        n_rows += (size_t)sources[i];
    results = golden_floats(golden, n_rows * width, "%s.memory", name);
    for (i = 0; i < n; row += (size_t)sources[i++])
        memories[i] = new_memory(&block, results + row * width, (size_t)sources[i]);
    test_layer(name, &block.attention, &block, memories);
    for (i = 0; i < n; i++)
        tfm_kv_free(memories + i, NULL);
    free_attention(&block.attention);
    free_ffn(&block.ffn);
    free_linear(&block.cross.q);
    free_linear(&block.cross.kv);
    free_linear(&block.cross.out);
}

/* Cross-attention without a memory, or with one of another shape. */
static void test_cross_refused(void) {
    tfm_block block = load_option_block("cross.0", 1);
    float x[12] = {0}, results[24] = {0};
    tfm_kv memory = new_memory(&block, results, 2);
    tfm_span span = {1, NULL, NULL, 0, NULL};
    const uint32_t beyond = (uint32_t)memory.n_pool_pages;
    tfm_error error;
    CHECK(tfm_block_forward(engine, &block, 0, x, &span, 1, &error) == TFM_ERROR_ARGUMENT);
    CHECK_MSG(strstr(error.message, "no memory") != NULL, "%s", error.message);
    span.memory = &memory;
    CHECK_OK(tfm_block_forward(engine, &block, 1, x, &span, 1, &error), error);
    memory.n_kv_heads++;
    CHECK(tfm_block_forward(engine, &block, 1, x, &span, 1, &error) == TFM_ERROR_ARGUMENT);
    memory.n_kv_heads--;
    memory.pages = &beyond;
    CHECK(tfm_block_forward(engine, &block, 1, x, &span, 1, &error) == TFM_ERROR_ARGUMENT);
    CHECK_MSG(strstr(error.message, "no page 0 in its pool") != NULL, "%s", error.message);
    memory.pages = NULL;
    CHECK(tfm_block_forward(engine, &block, CACHE_LAYERS, x, &span, 1, &error) == TFM_ERROR_ARGUMENT);
    block.parallel = 1;
    CHECK(tfm_block_forward(engine, &block, 1, x, &span, 1, &error) == TFM_ERROR_ARGUMENT);
    tfm_kv_free(&memory, NULL);
    free_attention(&block.attention);
    free_ffn(&block.ffn);
    free_linear(&block.cross.q);
    free_linear(&block.cross.kv);
    free_linear(&block.cross.out);
}

/* A token that sees nothing gets zeros, which the output layer turns into its bias; the others don't notice. */
static void test_blind_token(void) {
    enum { WIDTH = 12, LENGTH = 5 };
    tfm_attention attention = load_attention("attention.2");
    const float *x = golden_floats(golden, WIDTH * LENGTH, "attention.2.x");
    float mask[LENGTH * LENGTH] = {0}, found[WIDTH * LENGTH];
    tfm_span span = {0, NULL, NULL, 0, NULL};
    tfm_error error;
    size_t i;
    for (i = 0; i < LENGTH; i++)
        mask[3 * LENGTH + i] = -INFINITY;
    span.n_rows = LENGTH;
    span.kv = NULL;
    span.mask = mask;
    CHECK_OK(tfm_attention_forward(engine, &attention, 0, x, &span, 1, found, &error), error);
    CHECK_CLOSE(found, golden_floats(golden, WIDTH * LENGTH, "attention.2.y"), 3 * WIDTH, TOLERANCE,
                where("blind token", "before it"));
    CHECK_SAME(found + 3 * WIDTH, (const float *)attention.out.bias.data, WIDTH, where("blind token", ""));
    free_attention(&attention);
}

/* ---- threads: layers large enough to be worth several */

typedef struct big_block {
    tfm_block block;
    float *numbers; /* what it is made of */
    float *x;       /* [rows][width] */
} big_block;

enum { BIG_WIDTH = 80, BIG_HIDDEN = 201, BIG_ROWS = 301 };

static tfm_linear big_linear(const float **numbers, size_t out, size_t in) {
    tfm_tensor weight = tfm_matrix(*numbers, out, in);
    tfm_linear linear;
    tfm_error error;
    *numbers += out * in;
    CHECK_OK(tfm_pack(&weight, TFM_F32, NULL, &linear.weight, &error), error);
    linear.bias = tfm_vector(*numbers, out);
    *numbers += out;
    return linear;
}

static big_block new_big_block(void) {
    const size_t n = 200000;
    big_block big;
    const float *numbers;
    memset(&big, 0, sizeof big);
    numbers = big.numbers = new_floats(n);
    big.x = new_floats(BIG_ROWS * BIG_WIDTH);
    test_fill(big.numbers, n, 1);
    test_fill(big.x, BIG_ROWS * BIG_WIDTH, 2);
    big.block.attention.n_heads = big.block.attention.n_kv_heads = 5;
    big.block.attention.head_dim = 16;
    big.block.attention.causal = 1;
    big.block.attention.scale = 0.25f;
    big.block.attention.qkv = big_linear(&numbers, 3 * BIG_WIDTH, BIG_WIDTH);
    big.block.attention.out = big_linear(&numbers, BIG_WIDTH, BIG_WIDTH);
    big.block.ffn.activation = TFM_GELU_TANH;
    big.block.ffn.up = big_linear(&numbers, BIG_HIDDEN, BIG_WIDTH);
    big.block.ffn.down = big_linear(&numbers, BIG_WIDTH, BIG_HIDDEN);
    big.block.attention_norm.eps = big.block.ffn_norm.eps = 1e-5f;
    big.block.attention_norm.weight = big.block.ffn_norm.weight = tfm_vector(numbers, BIG_WIDTH);
    return big;
}

static void run_big(tfm_engine *on, const big_block *big, const tfm_span *spans, size_t n_spans, float *y) {
    tfm_error error;
    memcpy(y, big->x, BIG_ROWS * BIG_WIDTH * sizeof *y);
    CHECK_OK(tfm_block_forward(on, &big->block, 0, y, spans, n_spans, &error), error);
}

static void check_threads(tfm_isa isa, const big_block *big, const tfm_span *spans, size_t n_spans) {
    size_t n = BIG_ROWS * BIG_WIDTH;
    float *one = new_floats(n), *other = new_floats(n);
    tfm_engine *single = test_engine(isa, 1), *triple = test_engine(isa, 3), *backwards;
    tfm_engine_options options;
    tfm_error error;
    memset(&options, 0, sizeof options);
    options.isa = isa;
    options.parallel_for = test_backwards;
    backwards = tfm_engine_create(&options, &error);
    CHECK_MSG(backwards != NULL, "%s", error.message);
    run_big(single, big, spans, n_spans, one);
    run_big(triple, big, spans, n_spans, other);
    CHECK_SAME(other, one, n, where("a block", "3 threads"));
    if (backwards) {
        run_big(backwards, big, spans, n_spans, other);
        CHECK_SAME(other, one, n, where("a block", "backwards"));
    }
    tfm_engine_free(single);
    tfm_engine_free(triple);
    tfm_engine_free(backwards);
    free(one);
    free(other);
}

static void test_threads(tfm_isa isa) {
    big_block big = new_big_block();
    tfm_span spans[3] = {{BIG_ROWS, NULL, NULL, 0, NULL}, {0, NULL, NULL, 0, NULL}, {0, NULL, NULL, 0, NULL}};
    check_threads(isa, &big, spans, 1);
    spans[0].n_rows = 1;
    spans[1].n_rows = 200;
    spans[2].n_rows = BIG_ROWS - 201;
    check_threads(isa, &big, spans, 3);
    free_attention(&big.block.attention);
    free_ffn(&big.block.ffn);
    free(big.numbers);
    free(big.x);
}

/* ---- errors */

static void check_refused(tfm_status found, tfm_status expected, const tfm_error *error, const char *word) {
    CHECK_MSG(found == expected && error->status == expected && strstr(error->message, word), "status %d, '%s'",
              (int)found, error->message);
}

static void test_spans_refused(const tfm_attention *attention) {
    float x[3 * 12] = {0}, y[3 * 12];
    tfm_error error;
    tfm_span span = {0, NULL, NULL, 0, NULL};
    tfm_kv kv;
    check_refused(tfm_attention_forward(engine, attention, 0, x, &span, 1, y, &error), TFM_ERROR_ARGUMENT, &error,
                  "span 0");
    check_refused(tfm_kv_create(&kv, TFM_NO_DTYPE, 1, 1, 4, 2, NULL, &error), TFM_ERROR_ARGUMENT, &error,
                  "keys and values can be f32, f16, bf16 or int8");
    check_refused(tfm_kv_create(&kv, TFM_F32, 1, 0, 4, 2, NULL, &error), TFM_ERROR_ARGUMENT, &error, "greater than 0");
    check_refused(tfm_kv_create(&kv, TFM_F32, 1, 1, 64, SIZE_MAX, NULL, &error), TFM_ERROR_MEMORY, &error, "memory");
    check_refused(tfm_kv_create(&kv, TFM_I8, 1, SIZE_MAX / 2 + 2, 4, 2, NULL, &error), TFM_ERROR_MEMORY, &error,
                  "memory");
    check_refused(tfm_kv_create(&kv, TFM_F16, 1, 1, SIZE_MAX - 3, 2, NULL, &error), TFM_ERROR_MEMORY, &error, "memory");
    CHECK_OK(tfm_kv_create(&kv, TFM_F32, 1, attention->n_kv_heads, attention->head_dim, 2, NULL, &error), error);
    span.kv = &kv;
    span.n_rows = 1;
    check_refused(tfm_attention_forward(engine, attention, 1, x, &span, 1, y, &error), TFM_ERROR_ARGUMENT, &error,
                  "cache");
    kv.head_dim++;
    check_refused(tfm_attention_forward(engine, attention, 0, x, &span, 1, y, &error), TFM_ERROR_ARGUMENT, &error,
                  "cache");
    kv.head_dim--;
    span.n_rows = 3;
    check_refused(tfm_attention_forward(engine, attention, 0, x, &span, 1, y, &error), TFM_ERROR_CONTEXT_FULL, &error,
                  "room");
    CHECK(kv.n_tokens == 0);
    tfm_kv_free(&kv, NULL);
}

/* As f16, what is finite stays finite; infinity and NaN stay what they are. (0x7BFF is 65504, the largest.) */
static void test_large_weights(void) {
    static const uint16_t expected[] = {0x7BFF, 0xFBFF, 0x7BFF, 0x7C00, 0x3C00};
    const float weights[5] = {70000, -1e30f, 65519, INFINITY, 1};
    const tfm_tensor matrix = tfm_matrix(weights, 1, 5);
    tfm_tensor packed;
    tfm_error error;
    size_t i;
    CHECK_OK(tfm_pack(&matrix, TFM_F16, NULL, &packed, &error), error);
    for (i = 0; i < 5; i++)
        CHECK_MSG(((const uint16_t *)packed.data)[16 * i] == expected[i], "%g", (double)weights[i]);
    tfm_unpack(&packed, NULL);
}

static void test_refused(void) {
    float x[3 * 12] = {0}, y[3 * 36];
    tfm_attention attention = load_attention("attention.2"), odd = attention;
    tfm_linear loose = attention.out;
    tfm_norm norm = load_norm("norm.0", "", 0);
    tfm_error error;
    tfm_span span = {1, NULL, NULL, 0, NULL};
    loose.weight.layout = TFM_ROWS;
    check_refused(tfm_linear_forward(engine, &loose, x, 1, y, &error), TFM_ERROR_ARGUMENT, &error, "packed");
    loose = attention.out;
    loose.bias = attention.qkv.bias;
    check_refused(tfm_linear_forward(engine, &loose, x, 1, y, &error), TFM_ERROR_ARGUMENT, &error, "bias");
    norm.weight.dtype = TFM_F16;
    check_refused(tfm_norm_forward(engine, &norm, x, 1, y, &error), TFM_ERROR_ARGUMENT, &error, "f32");
    check_refused(tfm_activation_forward(engine, TFM_ACTIVATION_COUNT, x, 1, y, &error), TFM_ERROR_ARGUMENT, &error,
                  "activation");
    odd.n_kv_heads = 2;
    check_refused(tfm_attention_forward(engine, &odd, 0, x, &span, 1, y, &error), TFM_ERROR_ARGUMENT, &error,
                  "n_kv_heads");
    odd = attention;
    odd.head_dim = 5;
    check_refused(tfm_attention_forward(engine, &odd, 0, x, &span, 1, y, &error), TFM_ERROR_ARGUMENT, &error,
                  "expected");
    test_spans_refused(&attention);
    free_attention(&attention);
}

/* ---- */

static void test_on(tfm_isa isa, int threads) {
    char name[64];
    engine = test_engine(isa, threads);
    snprintf(name, sizeof name, "%s, %d thread%s", tfm_isa_name(isa), threads, threads == 1 ? "" : "s");
    engine_name = name;
    CHECK(tfm_engine_isa(engine) == isa);
    each_case("norm", test_norm);
    test_activations();
    each_case("linear", test_linear);
    each_case("ffn", test_ffn);
    each_case("attention", test_attention);
    each_case("block", test_block);
    test_blind_token();
    test_refused();
    golden = golden_options;
    each_case("option", test_option);
    each_case("cross", test_cross);
    test_cross_refused();
    golden = golden_layers;
    if (threads == 1)
        test_threads(isa);
    tfm_engine_free(engine);
}

void test_layers(void) {
    tfm_isa isas[TFM_ISA_COUNT];
    size_t n = test_isas(isas), i;
    golden = golden_layers = golden_open("layers");
    golden_options = golden_open("options");
    test_large_weights();
    for (i = 0; i < n; i++) {
        test_on(isas[i], 1);
        test_on(isas[i], 3);
    }
    tfm_file_close(golden_layers);
    tfm_file_close(golden_options);
}
