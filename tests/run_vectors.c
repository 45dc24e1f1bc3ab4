/* Runs a model without token embeddings (PyTorch's own modules) on vectors, by the public layers: for live_families.py.
 *
 *   run_vectors MODEL N_SOURCE N_TARGET < vectors > results
 *
 * Standard input: float32, the encoder's vectors [N_SOURCE][d_model] (for a decoder alone: the encoder's results), then the
 * decoder's [N_TARGET][d_model] (N_TARGET 0: the model is an encoder). Standard output: the results, of the decoder if
 * there is one. */
#define TFM_IMPLEMENTATION
#include "../tfm.h"

#include <stdlib.h>
#include <string.h>

static tfm_status run_stack(tfm_engine *engine, const tfm_model *model, int encoder, size_t n_layers,
                            const tfm_span *span, float *x, tfm_error *error) {
    const tfm_norm *norm = encoder ? tfm_model_encoder_final_norm(model) : tfm_model_final_norm(model);
    tfm_status status = TFM_OK;
    size_t i;
    for (i = 0; i < n_layers && status == TFM_OK; i++)
        status = tfm_block_forward(engine, encoder ? tfm_model_encoder_block(model, i) : tfm_model_block(model, i), i,
                                   x, span, 1, error);
    return status == TFM_OK && norm ? tfm_norm_forward(engine, norm, x, span->n_rows, x, error) : status;
}

static tfm_status run(tfm_engine *engine, const tfm_model *model, float *source, size_t n_source, float *target,
                      size_t n_target, tfm_error *error) {
    const tfm_description *d = tfm_model_description(model);
    tfm_status status = TFM_OK;
    tfm_kv memory;
    tfm_span span;
    size_t i;
    memset(&span, 0, sizeof span);
    memset(&memory, 0, sizeof memory);
    span.n_rows = n_source;
    if (d->kind != TFM_DECODER)
        status = run_stack(engine, model, 1, d->encoder.n_layers, &span, source, error);
    if (status != TFM_OK || d->kind == TFM_ENCODER)
        return status;
    status = tfm_kv_create(&memory, TFM_F32, d->decoder.n_layers, d->decoder.n_kv_heads, d->decoder.head_dim, n_source,
                           NULL, error);
    for (i = 0; i < d->decoder.n_layers && status == TFM_OK; i++)
        status = tfm_memory_forward(engine, tfm_model_block(model, i), i, source, n_source, &memory, error);
    memory.n_tokens = n_source;
    span.n_rows = n_target;
    span.memory = &memory;
    if (status == TFM_OK)
        status = run_stack(engine, model, 0, d->decoder.n_layers, &span, target, error);
    tfm_kv_free(&memory, NULL);
    return status;
}

int main(int argc, char **argv) {
    const size_t n_source = argc == 4 ? (size_t)atol(argv[2]) : 0, n_target = argc == 4 ? (size_t)atol(argv[3]) : 0;
    tfm_error error = {TFM_OK, ""};
    tfm_model *model = argc == 4 ? tfm_load(argv[1], NULL, &error) : NULL;
    tfm_engine *engine = tfm_engine_create(NULL, &error);
    const size_t width = model ? tfm_model_description(model)->d_model : 1, n = (n_source + n_target) * width;
    float *x = (float *)malloc((n + 1) * sizeof *x), *target = x ? x + n_source * width : NULL;
    int good = model && engine && x && fread(x, sizeof *x, n, stdin) == n &&
               run(engine, model, x, n_source, target, n_target, &error) == TFM_OK;
    if (good && n_target)
        fwrite(target, sizeof *x, n_target * width, stdout);
    else if (good)
        fwrite(x, sizeof *x, n, stdout);
    else
        fprintf(stderr, "run_vectors: %s\n", error.message);
    free(x);
    tfm_engine_free(engine);
    tfm_free(model);
    return !good;
}
