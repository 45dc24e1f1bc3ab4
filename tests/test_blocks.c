/* GGUF's quantized types: every number of a block by its definition, and models with such matrices, whole and in parts,
 * against the same models in fp32. */
#include "test.h"

#include <math.h>

#define LARGEST_BLOCK 210
#define WIDEST_BLOCK 256

typedef struct block_type {
    tfm_dtype dtype;
    const char *name;
    size_t numbers, bytes;
} block_type;

static const block_type types[] = {
    {TFM_Q4_0, "q4_0", 32, 18},   {TFM_Q4_1, "q4_1", 32, 20},   {TFM_Q5_0, "q5_0", 32, 22},
    {TFM_Q5_1, "q5_1", 32, 24},   {TFM_Q8_0, "q8_0", 32, 34},   {TFM_Q4_K, "q4_k", 256, 144},
    {TFM_Q5_K, "q5_k", 256, 176}, {TFM_Q6_K, "q6_k", 256, 210},
};
#define N_TYPES (sizeof types / sizeof *types)

/* ---- the definition, number by number and bit by bit */

/* `n` bits of a block, from bit `at` on; bit 0 is the lowest of byte 0. */
static int bits(const unsigned char *block, size_t at, size_t n) {
    int value = 0;
    while (n--)
        value = 2 * value + (block[(at + n) / 8] >> (at + n) % 8 & 1);
    return value;
}

static int signed_byte(const unsigned char *block, size_t at) {
    return block[at] < 128 ? block[at] : block[at] - 256;
}

static float half(const unsigned char *block, size_t at) {
    return test_from_f16((uint16_t)(block[at] + 256 * block[at + 1]));
}

/* Four bits of number i, where those of every `run` numbers are the low halves of `run` bytes at `at`, and those of the next
 * the high ones. */
static int four(const unsigned char *block, size_t at, size_t run, size_t i) {
    return bits(block, 8 * (at + i / (2 * run) * run + i % run) + i / run % 2 * 4, 4);
}

static float k_number(const unsigned char *block, size_t i, int q) {
    const size_t unit = i / 32, place = 8 * (4 + unit % 4); /* of the scale of unit % 4, in bits */
    int scale = bits(block, place, 6), minimum = bits(block, place + 32, 6);
    if (unit >= 4) {
        scale = bits(block, place + 64, 4) + 16 * bits(block, place + 6, 2);
        minimum = bits(block, place + 68, 4) + 16 * bits(block, place + 38, 2);
    }
    return half(block, 0) * (float)scale * (float)q - half(block, 2) * (float)minimum;
}

static float number(tfm_dtype dtype, const unsigned char *block, size_t i) {
    switch ((int)dtype) {
    case TFM_Q4_0: return half(block, 0) * (float)(four(block, 2, 16, i) - 8);
    case TFM_Q4_1: return half(block, 0) * (float)four(block, 4, 16, i) + half(block, 2);
    case TFM_Q5_0: return half(block, 0) * (float)(four(block, 6, 16, i) + 16 * bits(block, 16 + i, 1) - 16);
    case TFM_Q5_1:
        return half(block, 0) * (float)(four(block, 8, 16, i) + 16 * bits(block, 32 + i, 1)) + half(block, 2);
    case TFM_Q8_0: return half(block, 0) * (float)signed_byte(block, 2 + i);
    case TFM_Q4_K: return k_number(block, i, four(block, 16, 32, i));
    case TFM_Q5_K: return k_number(block, i, four(block, 48, 32, i) + 16 * bits(block, 8 * (16 + i % 32) + i / 32, 1));
    default: /* q6_k */
        return half(block, 208) * (float)signed_byte(block, 192 + i / 16) *
               (float)(four(block, 0, 64, i) + 16 * bits(block, 8 * (128 + i / 128 * 32 + i % 32) + i / 32 % 4 * 2, 2) -
                       32);
    }
}

/* ---- matrices */

static void put_half(unsigned char *at, float value) {
    uint16_t bits16 = test_to_f16(value);
    at[0] = (unsigned char)bits16;
    at[1] = (unsigned char)(bits16 >> 8);
}

/* Random rows of blocks, whose numbers are of the size `size` at most. */
static void fill_blocks(const block_type *type, unsigned char *blocks, size_t n, float size, uint64_t *state) {
    const float largest = type->dtype == TFM_Q8_0   ? 128
                          : type->dtype == TFM_Q6_K ? 32 * 128
                          : type->numbers == 256    ? 64 * 32
                                                    : 32;
    size_t i, k;
    for (i = 0; i < n; i++, blocks += type->bytes) {
        for (k = 0; k < type->bytes; k++)
            blocks[k] = (unsigned char)test_random(state, 256);
        put_half(blocks + (type->dtype == TFM_Q6_K ? 208 : 0),
                 size / largest * (float)(50 + test_random(state, 50)) / 100);
        if (type->dtype == TFM_Q4_1 || type->dtype == TFM_Q5_1)
            put_half(blocks + 2, -size / 2);
        else if (type->dtype == TFM_Q4_K || type->dtype == TFM_Q5_K)
            put_half(blocks + 2, size / 128);
    }
}

static void read_blocks(const block_type *type, const unsigned char *blocks, size_t n_numbers, float *numbers) {
    size_t i;
    for (i = 0; i < n_numbers; i++)
        numbers[i] = number(type->dtype, blocks + i / type->numbers * type->bytes, i % type->numbers);
}

/* What tfm_pack makes of the blocks, and of their numbers, is the same in every type. 19 rows of 3 blocks. */
static void test_numbers(const block_type *type) {
    enum { ROWS = 19 };
    static unsigned char blocks[ROWS * 3 * LARGEST_BLOCK];
    static float numbers[ROWS * 3 * WIDEST_BLOCK];
    const size_t columns = 3 * type->numbers;
    tfm_tensor from = tfm_matrix(numbers, ROWS, columns), quantized = from, packed, expected;
    tfm_error error = {TFM_OK, ""};
    uint64_t state = 7;
    int dtype;
    fill_blocks(type, blocks, ROWS * 3, 1, &state);
    read_blocks(type, blocks, ROWS * columns, numbers);
    quantized.dtype = type->dtype;
    quantized.data = blocks;
    CHECK(tfm_tensor_bytes(&quantized) == ROWS * 3 * type->bytes);
    CHECK_MSG(tfm_dtype_name(type->dtype) && !strcmp(tfm_dtype_name(type->dtype), type->name), "%s: its name",
              type->name);
    for (dtype = TFM_F32; dtype <= TFM_I8; dtype++) {
        CHECK_OK(tfm_pack(&from, (tfm_dtype)dtype, NULL, &expected, &error), error);
        CHECK_OK(tfm_pack(&quantized, (tfm_dtype)dtype, NULL, &packed, &error), error);
        CHECK_MSG(!memcmp(packed.data, expected.data, tfm_tensor_bytes(&expected)), "%s as %s", type->name,
                  tfm_dtype_name((tfm_dtype)dtype));
        tfm_unpack(&packed, NULL);
        tfm_unpack(&expected, NULL);
    }
    quantized.layout = TFM_COLS;
    CHECK(tfm_pack(&quantized, TFM_F32, NULL, &packed, &error) == TFM_ERROR_UNSUPPORTED);
    quantized.layout = TFM_ROWS;
    quantized.shape[1] -= 16;
    CHECK(tfm_pack(&quantized, TFM_F32, NULL, &packed, &error) == TFM_ERROR_UNSUPPORTED);
    CHECK(tfm_pack(&from, type->dtype, NULL, &packed, &error) == TFM_ERROR_UNSUPPORTED);
}

/* ---- models */

/* Widths of whole blocks; queries, keys and values of 24 + 8 + 8 rows, which end within panels. */
static const test_shape shape = {300, 256, 2, 3, 1, 8, 512, 16};

static test_tensor *tensor_of(test_tfm *tfm, const char *name) {
    size_t i;
    for (i = 0; i < tfm->n_tensors; i++)
        if (!strcmp(tfm->tensors[i].name, name))
            return tfm->tensors + i;
    test_fatal("no tensor %s", name);
    return NULL;
}

/* A matrix full of random blocks in the one file, and its numbers in the other. */
static void put_blocks(test_tfm *tfm, test_tfm *floats, const char *name, const char *in_floats, size_t first,
                       size_t rows, size_t columns, const block_type *type, uint64_t *state) {
    const size_t n = rows * columns / type->numbers;
    test_tensor *tensor;
    test_put_tensor(tfm, name, 1, 0, (const float *)(const void *)"\0\0\0");
    tensor = tensor_of(tfm, name);
    free(tensor->data);
    tensor->dtype = (uint32_t)type->dtype;
    tensor->n_dims = 2;
    tensor->shape[0] = rows;
    tensor->shape[1] = columns;
    tensor->size = n * type->bytes;
    tensor->data = test_allocate(tensor->size);
    fill_blocks(type, (unsigned char *)tensor->data, n, 0.2f, state);
    read_blocks(type, (const unsigned char *)tensor->data, rows * columns,
                (float *)tensor_of(floats, in_floats)->data + first * columns);
}

/* A model whose matrices are all of the type, and its double in fp32. `parts`: qkv and the token embedding are in parts,
 * q8_0 from the second on. */
static void make_models(test_tfm *tfm, test_tfm *floats, const block_type *type, int parts) {
    static const char *const matrices[] = {"attention.qkv.weight", "ffn.up.weight", "ffn.down.weight"};
    const size_t rows[] = {40, 512, 256}, columns[] = {256, 256, 512};
    uint64_t state = 3;
    size_t layer, i;
    memset(tfm, 0, sizeof *tfm);
    memset(floats, 0, sizeof *floats);
    test_put_description(tfm, &shape);
    test_put_weights(tfm, &shape, 5);
    test_put_description(floats, &shape);
    test_put_weights(floats, &shape, 5);
    for (layer = 0; layer < shape.n_layers; layer++)
        for (i = 0; i < 3; i++) {
            char name[64], part[80];
            snprintf(name, sizeof name, "decoder.blocks.%d.%s", (int)layer, matrices[i]);
            if (parts && i == 0) {
                static const size_t first[] = {0, 24, 32, 40};
                size_t k;
                test_drop(tfm, name);
                for (k = 0; k < 3; k++) {
                    snprintf(part, sizeof part, "%s#%d", name, (int)k);
                    put_blocks(tfm, floats, part, name, first[k], first[k + 1] - first[k], 256, k ? &types[4] : type,
                               &state);
                }
            } else
                put_blocks(tfm, floats, name, name, 0, rows[i], columns[i], type, &state);
        }
    if (parts) {
        test_drop(tfm, "token_embedding.weight");
        put_blocks(tfm, floats, "token_embedding.weight#0", "token_embedding.weight", 0, 101, 256, type, &state);
        put_blocks(tfm, floats, "token_embedding.weight#1", "token_embedding.weight", 101, 199, 256, &types[4], &state);
    } else
        put_blocks(tfm, floats, "token_embedding.weight", "token_embedding.weight", 0, 300, 256, type, &state);
}

static int run(const tfm_model *model, float *logits) {
    static const int32_t tokens[5] = {1, 99, 0, 299, 42};
    tfm_session_options options;
    tfm_session *session;
    tfm_chunk chunk = {0, tokens, 5, 5};
    int good;
    memset(&options, 0, sizeof options);
    options.engine.threads = 1;
    session = tfm_session_create(model, &options, NULL);
    good = session && tfm_eval(session, &chunk, 1, TFM_LOGITS, logits, NULL) == TFM_OK;
    tfm_session_free(session);
    return good;
}

static void check_same(const tfm_model *found, const tfm_model *expected, const char *what) {
    static float a[5 * 300], b[5 * 300];
    if (CHECK_MSG(found && expected && run(found, a) && run(expected, b), "%s: can't be run", what))
        CHECK_SAME(a, b, 5 * shape.vocab_size, what);
}

static void test_model(const block_type *type, int parts, int own_head) {
    static const tfm_dtype dtypes[] = {TFM_NO_DTYPE, TFM_F32, TFM_F16, TFM_I8};
    test_tfm tfm, floats;
    size_t sizes[2], i;
    unsigned char *bytes[2];
    make_models(&tfm, &floats, type, parts);
    if (own_head) { /* the token embedding is only looked up */
        uint64_t state = 11;
        static float head[300 * 256];
        test_put_text(&tfm, "head", "own");
        test_put_text(&floats, "head", "own");
        test_put_tensor(&floats, "head.weight", 300, 256, head);
        put_blocks(&tfm, &floats, "head.weight", "head.weight", 0, 300, 256, type, &state);
    }
    bytes[0] = test_write_tfm(&tfm, &sizes[0]);
    bytes[1] = test_write_tfm(&floats, &sizes[1]);
    for (i = 0; i < sizeof dtypes / sizeof *dtypes; i++) {
        tfm_load_options options;
        tfm_error error = {TFM_OK, ""};
        tfm_model *found, *expected;
        memset(&options, 0, sizeof options);
        options.dtype = dtypes[i];
        found = tfm_load_memory(bytes[0], sizes[0], &options, &error);
        CHECK_MSG(found != NULL, "%s: %s", type->name, error.message);
        options.dtype = dtypes[i] ? dtypes[i] : TFM_I8; /* what blocks are packed into if nobody says more */
        expected = tfm_load_memory(bytes[1], sizes[1], &options, &error);
        check_same(found, expected,
                   test_text("%s%s loaded as %d", type->name, parts ? " in parts" : "", (int)dtypes[i]));
        tfm_free(found);
        tfm_free(expected);
    }
    free(bytes[0]);
    free(bytes[1]);
    test_clear(&tfm);
    test_clear(&floats);
}

#define FROM TEST_OUTPUT "blocks.tfm"
#define TO TEST_OUTPUT "blocks_quantized.tfm"

/* Quantized, the file has whole matrices only, and computes what it does when it is quantized as it is loaded. */
static void test_quantize(void) {
    test_tfm tfm, floats;
    tfm_error error = {TFM_OK, ""};
    tfm_load_options options;
    tfm_model *found, *expected;
    tfm_file *file;
    unsigned char *bytes;
    size_t size, i;
    int dtype;
    make_models(&tfm, &floats, &types[5], 1);
    bytes = test_write_tfm(&tfm, &size);
    test_save(FROM, bytes, size);
    for (dtype = TFM_F32; dtype <= TFM_I8; dtype++) {
        tfm_quantize_options to;
        memset(&to, 0, sizeof to);
        to.dtype = (tfm_dtype)dtype;
        CHECK_OK(tfm_quantize(FROM, TO, &to, &error), error);
        memset(&options, 0, sizeof options);
        options.verify = 1;
        found = tfm_load(TO, &options, &error);
        options.dtype = (tfm_dtype)dtype;
        expected = tfm_load(FROM, &options, &error);
        check_same(found, expected, test_text("quantized to %d", dtype));
        tfm_free(found);
        tfm_free(expected);
    }
    file = tfm_file_open(TO, NULL, &error);
    if (CHECK_MSG(file != NULL, "%s", error.message))
        CHECK(tfm_file_find(file, "token_embedding.weight") == tfm_file_entry(file, tfm_file_n_tensors(file) - 1));
    for (i = 0; file && i < tfm_file_n_tensors(file); i++)
        CHECK(tfm_file_entry(file, i)->tensor.dtype < TFM_DTYPE_COUNT &&
              !memchr(tfm_file_entry(file, i)->name, '#', tfm_file_entry(file, i)->name_size));
    tfm_file_close(file);
    free(bytes);
    test_clear(&tfm);
    test_clear(&floats);
    remove(FROM);
    remove(TO);
}

/* ---- hostile files */

static void refused(test_tfm *tfm, const char *says, const char *what) {
    test_heap heap;
    tfm_allocator allocator;
    tfm_load_options options;
    tfm_error error = {TFM_OK, ""};
    size_t size;
    unsigned char *bytes = test_write_tfm(tfm, &size);
    memset(&heap, 0, sizeof heap);
    allocator = test_allocator(&heap);
    memset(&options, 0, sizeof options);
    options.allocator = allocator;
    CHECK_MSG(!tfm_load_memory(bytes, size, &options, &error) && strstr(error.message, says), "%s: '%s'", what,
              error.message);
    CHECK_MSG(heap.live == 0 && heap.largest < 16 * size, "%s: %lu bytes, %lu left", what, (unsigned long)heap.largest,
              (unsigned long)heap.live);
    free(bytes);
}

static void test_hostile(const block_type *type) {
    enum {
        COLUMNS,
        VECTOR,
        CUBE,
        HALF_BLOCK,
        NO_ROWS,
        MANY_ROWS,
        HUGE_ROWS,
        SHORT,
        LONG,
        TWICE,
        OTHER_WIDTH,
        LACKING,
        N
    };
    static const char *const name = "decoder.blocks.0.ffn.up.weight";
    static const char *const qkv = "decoder.blocks.1.attention.qkv.weight";
    static const char *const says[N] = {
        "not a matrix in rows", "not a matrix in rows",    "not a matrix in rows",     "whole blocks",
        "impossible shape",     "impossible shape",        "impossible shape",         "bytes, but its shape",
        "bytes, but its shape", "both whole and in parts", "the description makes it", "the description makes it"};
    static float zeros[40 * 256];
    test_tfm tfm, floats;
    int i;
    make_models(&tfm, &floats, type, 1);
    test_clear(&floats);
    for (i = 0; i < N; i++) {
        test_tensor *up = tensor_of(&tfm, name);
        const test_tensor good = *up;
        switch (i) {
        case COLUMNS: up->layout = TFM_COLS; break;
        case VECTOR: up->n_dims = 1, up->shape[0] *= up->shape[1], up->shape[1] = 1; break;
        case CUBE: up->n_dims = 3; break;
        case HALF_BLOCK: up->shape[0] *= 16, up->shape[1] /= 16; break;
        case NO_ROWS: up->shape[0] = 0; break;
        case MANY_ROWS: up->shape[0] = (uint64_t)1 << 40; break;
        case HUGE_ROWS: up->shape[0] = (uint64_t)-1, up->shape[1] = (uint64_t)1 << 32; break;
        case SHORT: up->size--; break;
        case LONG: up->shape[0]--; break;
        case TWICE: test_put_tensor(&tfm, qkv, 40, 256, zeros); break;
        case OTHER_WIDTH: test_put_tensor(&tfm, test_text("%s#2", qkv), 8, 255, zeros); break;
        default: test_drop(&tfm, test_text("%s#2", qkv)); break;
        }
        refused(&tfm, says[i], test_text("%s, case %d", type->name, i));
        if (i < TWICE)
            *up = good;
        else if (i == TWICE)
            test_drop(&tfm, qkv);
    }
    test_clear(&tfm);
}

/* A scale that is not finite can't be quantized further. */
static void test_not_finite(void) {
    test_tfm tfm, floats;
    make_models(&tfm, &floats, &types[0], 0);
    put_half((unsigned char *)tensor_of(&tfm, "decoder.blocks.1.ffn.down.weight")->data, INFINITY);
    refused(&tfm, "not finite", "an infinite scale");
    test_clear(&tfm);
    test_clear(&floats);
}

void test_blocks(void) {
    size_t i;
    for (i = 0; i < N_TYPES; i++) {
        test_numbers(&types[i]);
        test_model(&types[i], 0, i % 2 == 0);
        test_model(&types[i], 1, i % 2 == 1);
        test_hostile(&types[i]);
    }
    CHECK(!tfm_dtype_name((tfm_dtype)17) && !tfm_dtype_name((tfm_dtype)31) && !tfm_dtype_name(TFM_DTYPE_COUNT));
    test_quantize();
    test_not_finite();
}
