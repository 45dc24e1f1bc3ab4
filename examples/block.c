/* block - a Transformer block built by hand, out of the library's layers and the program's own weights
 *
 *   block
 *
 * The block of the paper (Vaswani et al. 2017), x = norm(x + attention(x)); x = norm(x + ffn(x)), with a mask, computed
 * twice: step by step from its parts, and at once as a tfm_block. Both are printed beside what PyTorch gives for the same
 * weights, and the exit status is 1 if they differ by more than rounding. PyTorch's numbers come from this:
 *
 *     import torch
 *     from torch import nn
 *
 *     def numbers(seed, *shape):
 *         i = torch.arange(torch.tensor(shape).prod())
 *         return (((37 * seed + 29 * i) % 64 - 32) / 64).reshape(shape)
 *
 *     torch.set_default_dtype(torch.float64)
 *     torch.backends.mha.set_fastpath_enabled(False)
 *     layer = nn.TransformerEncoderLayer(d_model=8, nhead=2, dim_feedforward=12, dropout=0, batch_first=True)
 *     layer.load_state_dict({
 *         "self_attn.in_proj_weight": numbers(1, 24, 8), "self_attn.in_proj_bias": numbers(2, 24),
 *         "self_attn.out_proj.weight": numbers(3, 8, 8), "self_attn.out_proj.bias": numbers(4, 8),
 *         "linear1.weight": numbers(5, 12, 8), "linear1.bias": numbers(6, 12),
 *         "linear2.weight": numbers(7, 8, 12), "linear2.bias": numbers(8, 8),
 *         "norm1.weight": 1 + numbers(9, 8), "norm1.bias": numbers(10, 8),
 *         "norm2.weight": 1 + numbers(11, 8), "norm2.bias": numbers(12, 8)})
 *     mask = torch.full((4, 4), -torch.inf).triu(1)
 *     mask[3, 0] = -torch.inf
 *     print(layer(4 * numbers(13, 1, 4, 8), src_mask=mask))
 */
#define TFM_IMPLEMENTATION
#include "../tfm.h"

#include <math.h>
#include <string.h>

enum { D_MODEL = 8, N_HEADS = 2, D_FF = 12, N_TOKENS = 4 };

static const float pytorch[N_TOKENS][D_MODEL] = {
    {-0.275714f, 1.761143f, -0.451862f, 0.874184f, 0.480875f, -0.805989f, -0.652356f, 0.710310f},
    {-0.120599f, 0.516398f, -0.719026f, -0.429477f, 0.814002f, -1.303229f, 1.291810f, -0.558342f},
    {0.567788f, -0.018004f, 1.476003f, 0.418706f, 0.233481f, -2.724467f, -0.232528f, 0.274141f},
    {-0.279617f, 1.756584f, -0.374466f, 0.657572f, 0.478485f, -0.644061f, -0.733136f, 0.796945f},
};

/* Which tokens (columns) each token (rows) sees: what is added to the scores of attention, before softmax. */
#define NO -INFINITY
static const float mask[N_TOKENS][N_TOKENS] = {
    {0, NO, NO, NO},
    {0, 0, NO, NO},
    {0, 0, 0, NO},
    {NO, 0, 0, 0},
};

/* ---- the weights: in a program of your own they come from a file, or from training */

typedef struct weights {
    float qkv[3 * D_MODEL * D_MODEL], qkv_bias[3 * D_MODEL]; /* all queries' rows, all keys', all values' */
    float out[D_MODEL * D_MODEL], out_bias[D_MODEL];
    float up[D_FF * D_MODEL], up_bias[D_FF];
    float down[D_MODEL * D_FF], down_bias[D_MODEL];
    float norm1[D_MODEL], norm1_bias[D_MODEL], norm2[D_MODEL], norm2_bias[D_MODEL];
} weights;

/* start + n numbers from -1/2 to 31/64, times `scale`. */
static void fill(float *numbers, size_t n, unsigned seed, float start, float scale) {
    size_t i;
    for (i = 0; i < n; i++)
        numbers[i] = start + scale * ((float)((37 * seed + 29 * i) % 64) - 32) / 64;
}

#define FILL(array, seed, start) fill(array, sizeof(array) / sizeof *(array), seed, start, 1)
static void make_weights(weights *w) {
    FILL(w->qkv, 1, 0);
    FILL(w->qkv_bias, 2, 0);
    FILL(w->out, 3, 0);
    FILL(w->out_bias, 4, 0);
    FILL(w->up, 5, 0);
    FILL(w->up_bias, 6, 0);
    FILL(w->down, 7, 0);
    FILL(w->down_bias, 8, 0);
    FILL(w->norm1, 9, 1);
    FILL(w->norm1_bias, 10, 0);
    FILL(w->norm2, 11, 1);
    FILL(w->norm2_bias, 12, 0);
}

/* ---- the block: the library's layers, filled with the weights */

/* y = x W^T + b. The matrix is packed for the kernels (memory of its own); the bias is used where it lies. */
static tfm_status make_linear(tfm_linear *linear, const float *weight, const float *bias, size_t out, size_t in,
                              tfm_error *error) {
    const tfm_tensor matrix = tfm_matrix(weight, out, in);
    linear->bias = tfm_vector(bias, out);
    return tfm_pack(&matrix, TFM_F32, NULL, &linear->weight, error); /* TFM_I8 would quantize it */
}

static void make_norm(tfm_norm *norm, const float *weight, const float *bias) {
    norm->kind = TFM_LAYER_NORM;
    norm->eps = 1e-5f;
    norm->weight = tfm_vector(weight, D_MODEL);
    norm->bias = tfm_vector(bias, D_MODEL);
}

/* Free it with free_block, also after an error. */
static tfm_status make_block(tfm_block *block, const weights *w, tfm_error *error) {
    tfm_attention *attention = &block->attention;
    tfm_ffn *ffn = &block->ffn;
    tfm_status status;
    memset(block, 0, sizeof *block);
    block->norm_place = TFM_POST_NORM;
    make_norm(&block->attention_norm, w->norm1, w->norm1_bias);
    make_norm(&block->ffn_norm, w->norm2, w->norm2_bias);
    attention->n_heads = attention->n_kv_heads = N_HEADS;
    attention->head_dim = D_MODEL / N_HEADS;
    attention->scale = 1 / sqrtf(D_MODEL / N_HEADS);
    ffn->activation = TFM_RELU;
    status = make_linear(&attention->qkv, w->qkv, w->qkv_bias, 3 * D_MODEL, D_MODEL, error);
    if (status == TFM_OK)
        status = make_linear(&attention->out, w->out, w->out_bias, D_MODEL, D_MODEL, error);
    if (status == TFM_OK)
        status = make_linear(&ffn->up, w->up, w->up_bias, D_FF, D_MODEL, error);
    if (status == TFM_OK)
        status = make_linear(&ffn->down, w->down, w->down_bias, D_MODEL, D_FF, error);
    return status;
}

static void free_block(tfm_block *block) {
    tfm_unpack(&block->attention.qkv.weight, NULL);
    tfm_unpack(&block->attention.out.weight, NULL);
    tfm_unpack(&block->ffn.up.weight, NULL);
    tfm_unpack(&block->ffn.down.weight, NULL);
}

/* ---- two ways to run it */

static void add(float *x, const float *y) {
    size_t i;
    for (i = 0; i < N_TOKENS * D_MODEL; i++)
        x[i] += y[i];
}

/* x becomes block(x), each step a call. */
static tfm_status run_steps(tfm_engine *engine, const tfm_block *block, const tfm_span *span, float *x,
                            tfm_error *error) {
    float y[N_TOKENS * D_MODEL];
    tfm_status status = tfm_attention_forward(engine, &block->attention, 0, x, span, 1, y, error);
    if (status != TFM_OK)
        return status;
    add(x, y);
    status = tfm_norm_forward(engine, &block->attention_norm, x, N_TOKENS, x, error);
    if (status == TFM_OK)
        status = tfm_ffn_forward(engine, &block->ffn, x, N_TOKENS, y, error);
    if (status != TFM_OK)
        return status;
    add(x, y);
    return tfm_norm_forward(engine, &block->ffn_norm, x, N_TOKENS, x, error);
}

static tfm_status run(tfm_engine *engine, const tfm_block *block, float *in_steps, float *at_once, tfm_error *error) {
    tfm_span span; /* all tokens are one sequence; nothing is kept of it */
    tfm_status status;
    memset(&span, 0, sizeof span);
    span.n_rows = N_TOKENS;
    span.mask = mask[0];
    fill(in_steps, N_TOKENS * D_MODEL, 13, 0, 4);
    fill(at_once, N_TOKENS * D_MODEL, 13, 0, 4);
    status = run_steps(engine, block, &span, in_steps, error);
    return status == TFM_OK ? tfm_block_forward(engine, block, 0, at_once, &span, 1, error) : status;
}

/* Returns 1 if a number is not PyTorch's. */
static int print_results(const float *in_steps, const float *at_once) {
    size_t i;
    int differs = 0;
    printf("token      in steps    at once    PyTorch\n");
    for (i = 0; i < N_TOKENS * D_MODEL; i++) {
        const float expected = pytorch[i / D_MODEL][i % D_MODEL];
        printf("%lu [%lu]     %9.6f  %9.6f  %9.6f\n", (unsigned long)(i / D_MODEL), (unsigned long)(i % D_MODEL),
               (double)in_steps[i], (double)at_once[i], (double)expected);
        if (!(fabsf(in_steps[i] - expected) < 1e-5f && fabsf(at_once[i] - expected) < 1e-5f))
            differs = 1;
    }
    return differs;
}

int main(void) {
    static weights w;
    float in_steps[N_TOKENS * D_MODEL], at_once[N_TOKENS * D_MODEL];
    tfm_block block;
    tfm_error error = {TFM_OK, ""};
    tfm_engine *engine = tfm_engine_create(NULL, &error);
    tfm_status status;
    int differs = 0;
    make_weights(&w);
    status = make_block(&block, &w, &error);
    if (engine && status == TFM_OK && run(engine, &block, in_steps, at_once, &error) == TFM_OK)
        differs = print_results(in_steps, at_once);
    free_block(&block);
    tfm_engine_free(engine);
    if (error.status != TFM_OK || differs)
        fprintf(stderr, "block: %s\n", differs ? "the results differ from PyTorch's" : error.message);
    return error.status != TFM_OK || differs;
}
