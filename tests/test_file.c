/* The .tfm reader against hostile bytes, and the writer. Small files are made in memory by the functions that come
 * first (test.h declares them: other tests use them too), then spoiled in every way: each must be refused with a
 * sentence that names the file and what is wrong with it, without a crash, a leak or a large allocation. */
#include "test.h"

#include <float.h>
#include <math.h>

/* ---- making a file */

static void *copy_of(const void *data, size_t size) {
    void *copy = test_allocate(size);
    if (size)
        memcpy(copy, data, size);
    return copy;
}

static void add_meta(test_tfm *tfm, const char *key, int type, const void *value, size_t size) {
    test_meta *meta = tfm->meta + tfm->n_meta++;
    if (tfm->n_meta > sizeof tfm->meta / sizeof *tfm->meta || strlen(key) >= sizeof meta->key)
        abort();
    strcpy(meta->key, key);
    meta->type = (uint32_t)type;
    meta->value = copy_of(value, size);
    meta->size = size;
}

static test_meta *find_meta(test_tfm *tfm, const char *key) {
    size_t i;
    for (i = 0; i < tfm->n_meta; i++)
        if (!strcmp(tfm->meta[i].key, key))
            return tfm->meta + i;
    return NULL;
}

void test_put(test_tfm *tfm, const char *key, int type, const void *value, size_t size) {
    test_meta *meta = find_meta(tfm, key);
    if (meta) {
        free(meta->value);
        meta->type = (uint32_t)type;
        meta->value = copy_of(value, size);
        meta->size = size;
    } else
        add_meta(tfm, key, type, value, size);
}

void test_put_i64(test_tfm *tfm, const char *key, int64_t value) {
    test_put(tfm, key, TFM_META_I64, &value, sizeof value);
}

void test_put_f64(test_tfm *tfm, const char *key, double value) {
    test_put(tfm, key, TFM_META_F64, &value, sizeof value);
}

void test_put_text(test_tfm *tfm, const char *key, const char *text) {
    test_put(tfm, key, TFM_META_TEXT, text, strlen(text));
}

void test_put_i32(test_tfm *tfm, const char *key, const int32_t *values, size_t n) {
    test_put(tfm, key, TFM_META_I32, values, n * sizeof *values);
}

static test_tensor *find_tensor(test_tfm *tfm, const char *name) {
    size_t i;
    for (i = 0; i < tfm->n_tensors; i++)
        if (!strcmp(tfm->tensors[i].name, name))
            return tfm->tensors + i;
    return NULL;
}

static test_tensor *add_tensor(test_tfm *tfm, const char *name) {
    test_tensor *tensor = tfm->tensors + tfm->n_tensors++;
    if (tfm->n_tensors > sizeof tfm->tensors / sizeof *tfm->tensors || strlen(name) >= sizeof tensor->name)
        abort();
    strcpy(tensor->name, name);
    return tensor;
}

void test_put_tensor(test_tfm *tfm, const char *name, size_t rows, size_t columns, const float *data) {
    test_tensor *tensor = find_tensor(tfm, name);
    if (tensor)
        free(tensor->data);
    else
        tensor = add_tensor(tfm, name);
    tensor->dtype = TFM_F32;
    tensor->layout = TFM_ROWS;
    tensor->n_dims = columns ? 2 : 1;
    tensor->shape[0] = rows;
    tensor->shape[1] = columns ? columns : 1;
    tensor->shape[2] = tensor->shape[3] = 1;
    tensor->size = rows * (columns ? columns : 1) * sizeof *data;
    tensor->data = copy_of(data, tensor->size);
}

void test_drop(test_tfm *tfm, const char *name) {
    test_meta *meta = find_meta(tfm, name);
    test_tensor *tensor = find_tensor(tfm, name);
    if (meta) {
        free(meta->value);
        memmove(meta, meta + 1, (size_t)(tfm->meta + --tfm->n_meta - meta) * sizeof *meta);
    }
    if (tensor) {
        free(tensor->data);
        memmove(tensor, tensor + 1, (size_t)(tfm->tensors + --tfm->n_tensors - tensor) * sizeof *tensor);
    }
}

void test_clear(test_tfm *tfm) {
    while (tfm->n_meta)
        free(tfm->meta[--tfm->n_meta].value);
    while (tfm->n_tensors)
        free(tfm->tensors[--tfm->n_tensors].data);
}

void test_put_description(test_tfm *tfm, const test_shape *shape) {
    test_put_text(tfm, "model.name", "tiny");
    test_put_text(tfm, "model.kind", "decoder");
    test_put_i64(tfm, "vocab_size", (int64_t)shape->vocab_size);
    test_put_i64(tfm, "d_model", (int64_t)shape->d_model);
    test_put_text(tfm, "head", "tied");
    test_put_i64(tfm, "decoder.n_layers", (int64_t)shape->n_layers);
    test_put_i64(tfm, "decoder.n_heads", (int64_t)shape->n_heads);
    test_put_i64(tfm, "decoder.n_kv_heads", (int64_t)shape->n_kv_heads);
    test_put_i64(tfm, "decoder.head_dim", (int64_t)shape->head_dim);
    test_put_i64(tfm, "decoder.d_ff", (int64_t)shape->d_ff);
    test_put_i64(tfm, "decoder.n_positions", (int64_t)shape->n_positions);
    test_put_i64(tfm, "decoder.causal", 1);
    test_put_i64(tfm, "decoder.cross", 0);
    test_put_text(tfm, "decoder.norm", "layer");
    test_put_text(tfm, "decoder.norm_place", "pre");
    test_put_f64(tfm, "decoder.norm_eps", 1e-5);
    test_put_i64(tfm, "decoder.final_norm", 1);
    test_put_text(tfm, "decoder.positions", "learned");
    test_put_f64(tfm, "decoder.attention_scale", 1 / sqrt((double)shape->head_dim));
    test_put_text(tfm, "decoder.ffn", "plain");
    test_put_text(tfm, "decoder.activation", "gelu_tanh");
}

/* Random numbers around `center`, of the size that keeps a product with so many inputs near 1. */
static void put_random(test_tfm *tfm, const char *name, size_t rows, size_t columns, float center, uint64_t seed) {
    size_t n = rows * (columns ? columns : 1), i;
    float *data = (float *)test_allocate(n * sizeof *data), size = columns ? 2 / sqrtf((float)columns) : 0.3f;
    test_fill(data, n, seed);
    for (i = 0; i < n; i++)
        data[i] = center + data[i] * size;
    test_put_tensor(tfm, name, rows, columns, data);
    free(data);
}

static void put_block(test_tfm *tfm, const test_shape *shape, size_t index, uint64_t seed) {
    const size_t d_model = shape->d_model, queries = shape->n_heads * shape->head_dim;
    const size_t width = queries + 2 * shape->n_kv_heads * shape->head_dim;
    const struct {
        const char *name;
        size_t rows, columns;
        float center;
    } parts[] = {
        {"attention_norm.weight", d_model, 0, 1},
        {"attention_norm.bias", d_model, 0, 0},
        {"attention.qkv.weight", width, d_model, 0},
        {"attention.qkv.bias", width, 0, 0},
        {"attention.out.weight", d_model, queries, 0},
        {"attention.out.bias", d_model, 0, 0},
        {"ffn_norm.weight", d_model, 0, 1},
        {"ffn_norm.bias", d_model, 0, 0},
        {"ffn.up.weight", shape->d_ff, d_model, 0},
        {"ffn.up.bias", shape->d_ff, 0, 0},
        {"ffn.down.weight", d_model, shape->d_ff, 0},
        {"ffn.down.bias", d_model, 0, 0},
    };
    size_t i;
    for (i = 0; i < sizeof parts / sizeof *parts; i++) {
        char name[64];
        snprintf(name, sizeof name, "decoder.blocks.%lu.%s", (unsigned long)index, parts[i].name);
        put_random(tfm, name, parts[i].rows, parts[i].columns, parts[i].center, seed + 100 * index + i);
    }
}

void test_put_weights(test_tfm *tfm, const test_shape *shape, uint64_t seed) {
    size_t i;
    put_random(tfm, "token_embedding.weight", shape->vocab_size, shape->d_model, 0, seed + 1);
    put_random(tfm, "decoder.position_embedding.weight", shape->n_positions, shape->d_model, 0, seed + 2);
    for (i = 0; i < shape->n_layers; i++)
        put_block(tfm, shape, i, seed + 1000);
    put_random(tfm, "decoder.final_norm.weight", shape->d_model, 0, 1, seed + 3);
    put_random(tfm, "decoder.final_norm.bias", shape->d_model, 0, 0, seed + 4);
}

void test_put_tokenizer(test_tfm *tfm, const char *const *more, size_t n) {
    static const char end_text[] = "<|end|>";
    const int32_t added[2] = {TEST_END, 1}, end[1] = {TEST_END};
    int32_t byte_ids[256], sizes[256 + 1 + 64];
    char bytes[4096];
    size_t size = 0, i;
    for (i = 0; i < 256; i++) {
        byte_ids[i] = (int32_t)i;
        sizes[i] = 1;
        bytes[size++] = (char)i;
    }
    for (i = 0; i < n + 1; i++) {
        const char *text = i ? more[i - 1] : end_text;
        sizes[256 + i] = (int32_t)strlen(text);
        if (n > 64 || size + strlen(text) > sizeof bytes)
            abort();
        memcpy(bytes + size, text, strlen(text));
        size += strlen(text);
    }
    test_put_text(tfm, "tokenizer.kind", "byte_bpe");
    test_put_text(tfm, "tokenizer.pattern", "gpt2");
    test_put(tfm, "tokenizer.tokens", TFM_META_BYTES, bytes, size);
    test_put_i32(tfm, "tokenizer.token_sizes", sizes, 257 + n);
    test_put_i32(tfm, "tokenizer.merges", NULL, 0);
    test_put_i32(tfm, "tokenizer.added", added, 2);
    test_put_i32(tfm, "tokenizer.byte_ids", byte_ids, 256);
    test_put_i32(tfm, "generation.eos_ids", end, 1);
}

/* ---- its bytes */

static void put_u32(unsigned char *at, uint32_t value) {
    int i;
    for (i = 0; i < 4; i++)
        at[i] = (unsigned char)(value >> 8 * i);
}

static void put_u64(unsigned char *at, uint64_t value) {
    put_u32(at, (uint32_t)value);
    put_u32(at + 4, (uint32_t)(value >> 32));
}

static uint64_t get_u64(const unsigned char *at) {
    uint64_t value = 0;
    int i;
    for (i = 7; i >= 0; i--)
        value = value << 8 | at[i];
    return value;
}

/* CRC-32: what the division bit by bit, as its definition has it, makes of each byte is kept. */
uint32_t test_crc32(uint32_t crc, const unsigned char *data, size_t size) {
    static uint32_t remainders[256];
    size_t i;
    int bit;
    for (i = 0; i < 256 && !remainders[255]; i++)
        for (remainders[i] = (uint32_t)i, bit = 0; bit < 8; bit++)
            remainders[i] = remainders[i] >> 1 ^ (remainders[i] & 1 ? 0xEDB88320u : 0);
    crc = ~crc;
    for (i = 0; i < size; i++)
        crc = crc >> 8 ^ remainders[(crc ^ data[i]) & 255];
    return ~crc;
}

void test_seal(unsigned char *file, size_t size) {
    uint64_t metadata, directory;
    if (size < 64)
        return;
    metadata = get_u64(file + 32);
    directory = get_u64(file + 48);
    if (metadata <= size - 64 && directory <= size - 64 - metadata)
        put_u32(file + 60, test_crc32(test_crc32(0, file, 60), file + 64, (size_t)(metadata + directory)));
}

static size_t round_up(size_t n, size_t to) {
    return (n + to - 1) / to * to;
}

static size_t meta_bytes(const test_meta *meta) {
    return 16 + round_up(strlen(meta->key), 8) + round_up(meta->size, 8);
}

static size_t directory_bytes(const test_tensor *tensor) {
    return 72 + round_up(strlen(tensor->name), 8);
}

/* n numbers of `size` bytes: from this machine's byte order to little-endian, or back. */
static void turn(unsigned char *data, size_t n, size_t size) {
    const uint16_t one = 1;
    size_t i, k;
    for (i = 0; i < n && !*(const unsigned char *)&one; i++)
        for (k = 0; k < size / 2; k++) {
            unsigned char swap = data[i * size + k];
            data[i * size + k] = data[i * size + size - 1 - k];
            data[i * size + size - 1 - k] = swap;
        }
}

static void write_meta(const test_meta *meta, unsigned char *at) {
    static const size_t sizes[7] = {1, 8, 8, 1, 1, 4, 4};
    put_u32(at, (uint32_t)strlen(meta->key));
    put_u32(at + 4, meta->type);
    put_u64(at + 8, meta->size);
    memcpy(at + 16, meta->key, strlen(meta->key));
    at += 16 + round_up(strlen(meta->key), 8);
    memcpy(at, meta->value, meta->size);
    if (meta->type < 7)
        turn(at, meta->size / sizes[meta->type], sizes[meta->type]);
}

static void write_tensor(const test_tensor *tensor, unsigned char *at, unsigned char *file, size_t offset) {
    const tfm_dtype dtype = (tfm_dtype)tensor->dtype; /* i8, and GGUF's blocks, are bytes */
    const size_t element = dtype == TFM_F32 ? 4 : dtype == TFM_F16 || dtype == TFM_BF16 ? 2 : 1;
    int i;
    memcpy(file + offset, tensor->data, tensor->size);
    turn(file + offset, tensor->size / element, element);
    put_u32(at, (uint32_t)strlen(tensor->name));
    put_u32(at + 4, tensor->dtype);
    put_u32(at + 8, tensor->layout);
    put_u32(at + 12, tensor->n_dims);
    for (i = 0; i < 4; i++)
        put_u64(at + 16 + 8 * i, tensor->shape[i]);
    put_u64(at + 48, offset);
    put_u64(at + 56, tensor->size);
    put_u32(at + 64, test_crc32(0, file + offset, tensor->size));
    memcpy(at + 72, tensor->name, strlen(tensor->name));
}

unsigned char *test_write_tfm(const test_tfm *tfm, size_t *size) {
    static const unsigned char magic[8] = {'T', 'F', 'M', 'H', '\r', '\n', 0x1A, '\n'};
    size_t metadata = 64, directory, offset, i;
    unsigned char *file, *entry;
    for (directory = 64, i = 0; i < tfm->n_meta; i++)
        directory += meta_bytes(tfm->meta + i);
    for (offset = directory, i = 0; i < tfm->n_tensors; i++)
        offset += directory_bytes(tfm->tensors + i);
    for (*size = offset, i = 0; i < tfm->n_tensors; i++)
        *size = round_up(*size, 64) + tfm->tensors[i].size;
    file = (unsigned char *)test_allocate(*size);
    memset(file, 0, *size);
    memcpy(file, magic, 8);
    put_u32(file + 8, 1);
    put_u64(file + 16, *size);
    put_u64(file + 24, metadata);
    put_u64(file + 32, directory - metadata);
    put_u64(file + 40, directory);
    put_u64(file + 48, offset - directory);
    put_u32(file + 56, (uint32_t)tfm->n_tensors);
    for (entry = file + metadata, i = 0; i < tfm->n_meta; entry += meta_bytes(tfm->meta + i++))
        write_meta(tfm->meta + i, entry);
    for (entry = file + directory, i = 0; i < tfm->n_tensors; entry += directory_bytes(tfm->tensors + i++)) {
        offset = round_up(offset, 64);
        write_tensor(tfm->tensors + i, entry, file, offset);
        offset += tfm->tensors[i].size;
    }
    test_seal(file, *size);
    return file;
}

tfm_model *test_load_tfm(const test_tfm *tfm, unsigned char **bytes) {
    tfm_error error = {TFM_OK, ""};
    size_t size;
    tfm_model *model;
    *bytes = test_write_tfm(tfm, &size);
    model = tfm_load_memory(*bytes, size, NULL, &error);
    CHECK_MSG(model != NULL, "a good file is refused: %s", error.message);
    return model;
}

int test_save(const char *path, const void *data, size_t size) {
    FILE *file = fopen(path, "wb");
    int good = file && fwrite(data, 1, size, file) == size;
    return CHECK_MSG((file ? !fclose(file) : 0) && good, "%s can't be written", path);
}

unsigned char *test_read(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    unsigned char *data = NULL;
    *size = 0;
    if (file && !fseek(file, 0, SEEK_END) && (*size = (size_t)ftell(file), !fseek(file, 0, SEEK_SET))) {
        data = (unsigned char *)test_allocate(*size);
        if (fread(data, 1, *size, file) != *size) {
            free(data);
            data = NULL;
        }
    }
    if (file)
        fclose(file);
    return data;
}

static int exists(const char *path) {
    FILE *file = fopen(path, "rb");
    if (file)
        fclose(file);
    return file != NULL;
}

/* ---- what is refused, and how */

static const test_shape tiny = {300, 8, 1, 2, 1, 4, 12, 10};

/* A valid file with everything in it, from a family of small ones. */
static void make_tiny(test_tfm *tfm) {
    static const char *const more[] = {"ab", "abc"};
    static const int32_t merges[6] = {'a', 'b', 257, 257, 'c', 258}, ids[1] = {65};
    memset(tfm, 0, sizeof *tfm);
    test_put_description(tfm, &tiny);
    test_put_f64(tfm, "embedding_scale", 1);
    test_put_i64(tfm, "decoder.position_offset", 0);
    test_put_weights(tfm, &tiny, 1);
    test_put_tokenizer(tfm, more, 2);
    test_put_i32(tfm, "tokenizer.merges", merges, 6);
    test_put_i32(tfm, "tokenizer.prefix_ids", ids, 0);
    test_put_i32(tfm, "tokenizer.suffix_ids", ids, 0);
    test_put_i64(tfm, "tokenizer.add_prefix_space", 0);
    test_put_i64(tfm, "tokenizer.ignore_merges", 0);
}

/* Loads a file from a piece of memory that is exactly as large (for sanitizers), and counts allocations. */
static tfm_model *load_bytes(const unsigned char *file, size_t size, test_heap *heap, void **memory, tfm_error *error) {
    tfm_load_options options;
    memset(heap, 0, sizeof *heap);
    memset(&options, 0, sizeof options);
    memset(error, 0, sizeof *error);
    options.threads = 1; /* thousands of files, each too small to share out */
    options.allocator = test_allocator(heap);
    *memory = copy_of(file, size);
    return tfm_load_memory(*memory, size, &options, error);
}

/* The file must be refused with that status (TFM_OK: with any) and a sentence that has `what` in it. `step` is for the
 * report. */
static void check_refused(const unsigned char *file, size_t size, tfm_status status, const char *what,
                          const char *step) {
    test_heap heap;
    tfm_error error;
    void *memory;
    tfm_model *model = load_bytes(file, size, &heap, &memory, &error);
    if (CHECK_MSG(!model, "%s: the file is accepted", step)) {
        CHECK_MSG(error.status == status || (!status && error.status), "%s: status %d instead of %d: %s", step,
                  (int)error.status, (int)status, error.message);
        CHECK_MSG(strstr(error.message, what) != NULL, "%s: '%s' is not named: %s", step, what, error.message);
        CHECK_MSG(!strncmp(error.message, "model: ", 7), "%s: the file is not named: %s", step, error.message);
        CHECK_MSG(!strchr(error.message, '\n'), "%s: a line end within: %s", step, error.message);
    }
    tfm_free(model);
    CHECK_MSG(!heap.live && !heap.bad, "%s: %lu allocations are left", step, (unsigned long)heap.live);
    CHECK_MSG(heap.largest < size + ((size_t)3 << 20), "%s: %lu bytes were asked for", step,
              (unsigned long)heap.largest);
    free(memory);
}

static void check_tfm_refused(const test_tfm *tfm, tfm_status status, const char *what, const char *step) {
    size_t size;
    unsigned char *file = test_write_tfm(tfm, &size);
    check_refused(file, size, status, what, step);
    free(file);
}

static void check_accepted(const test_tfm *tfm, const char *step) {
    size_t size;
    unsigned char *file = test_write_tfm(tfm, &size);
    test_heap heap;
    tfm_error error;
    void *memory;
    tfm_model *model = load_bytes(file, size, &heap, &memory, &error);
    CHECK_MSG(model != NULL, "%s: %s", step, error.message);
    tfm_free(model);
    CHECK_MSG(!heap.live && !heap.bad, "%s: %lu allocations are left", step, (unsigned long)heap.live);
    free(memory);
    free(file);
}

/* A fresh tiny file for each spoiled value. */
#define SPOILED(tfm, spoil, status, what)                                                                              \
    do {                                                                                                               \
        make_tiny(tfm);                                                                                                \
        spoil;                                                                                                         \
        check_tfm_refused(tfm, status, what, #spoil);                                                                  \
        test_clear(tfm);                                                                                               \
    } while (0)

/* ---- truncation and the header */

static void test_truncation(void) {
    size_t size, n;
    unsigned char *file;
    test_tfm tfm;
    make_tiny(&tfm);
    file = test_write_tfm(&tfm, &size);
    for (n = 0; n < size; n += n < 6000 ? 1 : 61)
        check_refused(file, n, TFM_ERROR_FORMAT, n < 64 ? "not a .tfm file" : "truncated", "truncated");
    for (n = 64; n < size; n += n < 6000 ? 1 : 61) { /* and the header says that this is all */
        unsigned char *shorter = (unsigned char *)copy_of(file, n);
        put_u64(shorter + 16, n);
        test_seal(shorter, n);
        check_refused(shorter, n, TFM_ERROR_FORMAT, "", "truncated, with the size in the header");
        free(shorter);
    }
    free(file);
    test_clear(&tfm);
}

/* Writes a value of `bytes` bytes into a copy of the file, seals it, and expects it to be refused. */
static void poke(const unsigned char *file, size_t size, size_t at, int bytes, uint64_t value, tfm_status status,
                 const char *what, const char *step) {
    unsigned char *copy = (unsigned char *)copy_of(file, size);
    if (bytes == 4)
        put_u32(copy + at, (uint32_t)value);
    else
        put_u64(copy + at, value);
    test_seal(copy, size);
    check_refused(copy, size, status, what, step);
    free(copy);
}

static const uint64_t hostile[] = {0,
                                   1,
                                   7,
                                   8,
                                   63,
                                   65,
                                   72,
                                   1 << 20,
                                   0x7FFFFFFF,
                                   0xFFFFFFFFu,
                                   0x100000000u,
                                   0x7FFFFFFFFFFFFFFFu,
                                   0x8000000000000000u,
                                   0xFFFFFFFFFFFFFFC0u,
                                   0xFFFFFFFFFFFFFFF8u,
                                   0xFFFFFFFFFFFFFFFFu};
#define N_HOSTILE (sizeof hostile / sizeof *hostile)

static void test_header(void) {
    test_tfm tfm;
    size_t size, i;
    unsigned char *file;
    make_tiny(&tfm);
    file = test_write_tfm(&tfm, &size);
    for (i = 0; i < 8; i++)
        poke(file, size, i, 4, 0x41414141, TFM_ERROR_FORMAT, "not a .tfm file", "magic");
    for (i = 0; i < N_HOSTILE; i++) {
        static const size_t places[] = {24, 32, 40, 48};
        size_t k;
        if ((uint32_t)hostile[i] != 1)
            poke(file, size, 8, 4, hostile[i], TFM_ERROR_UNSUPPORTED, "version", "version");
        if ((uint32_t)hostile[i])
            poke(file, size, 12, 4, hostile[i], TFM_ERROR_UNSUPPORTED, "features", "features");
        poke(file, size, 16, 8, hostile[i], TFM_ERROR_FORMAT, "truncated", "file size");
        for (k = 0; k < 4; k++) {
            poke(file, size, places[k], 8, hostile[i], TFM_ERROR_FORMAT,
                 k == 3 && hostile[i] < 100 && hostile[i] % 8 == 0 ? "too small" : "fit together", "offsets and sizes");
            poke(file, size, places[k], 8, get_u64(file + places[k]) + hostile[i] + (hostile[i] == 0), TFM_ERROR_FORMAT,
                 "", "offsets and sizes that are nearly right");
        }
        if ((uint32_t)hostile[i] != tfm.n_tensors)
            poke(file, size, 56, 4, hostile[i], TFM_ERROR_FORMAT, "director", "number of tensors");
    }
    file[60] ^= 1;
    check_refused(file, size, TFM_ERROR_FORMAT, "checksum", "checksum");
    file[60] ^= 1;
    file[200] ^= 1;
    check_refused(file, size, TFM_ERROR_FORMAT, "checksum", "a byte of the metadata");
    free(file);
    test_clear(&tfm);
}

/* The files' alignment in memory is the caller's part. */
static void test_misaligned(void) {
    test_tfm tfm;
    size_t size;
    unsigned char *file, *memory;
    tfm_error error = {TFM_OK, ""};
    make_tiny(&tfm);
    file = test_write_tfm(&tfm, &size);
    memory = (unsigned char *)test_allocate(size + 8);
    memcpy(memory + 4, file, size);
    CHECK(!tfm_load_memory(memory + 4, size, NULL, &error));
    CHECK(error.status == TFM_ERROR_ARGUMENT && strstr(error.message, "aligned"));
    free(memory);
    free(file);
    test_clear(&tfm);
}

/* ---- metadata entries */

/* Where an entry of the metadata begins in the file; `index` in the order of the file. */
static size_t meta_at(const test_tfm *tfm, const char *key) {
    size_t at = 64, i;
    for (i = 0; i < tfm->n_meta && strcmp(tfm->meta[i].key, key); i++)
        at += meta_bytes(tfm->meta + i);
    return at;
}

static void test_metadata_entries(void) {
    static const char *const keys[] = {"model.name", "decoder.norm_eps",
                                       "tokenizer.ignore_merges"}; /* first, middle, last */
    test_tfm tfm;
    size_t size, i, k;
    unsigned char *file;
    make_tiny(&tfm);
    file = test_write_tfm(&tfm, &size);
    CHECK(!strcmp(tfm.meta[0].key, keys[0]) && !strcmp(tfm.meta[tfm.n_meta - 1].key, keys[2]));
    for (k = 0; k < 3; k++)
        for (i = 0; i < N_HOSTILE; i++) {
            const size_t at = meta_at(&tfm, keys[k]);
            poke(file, size, at, 4, hostile[i], TFM_ERROR_FORMAT, "metadata", "key size");
            if (hostile[i] != 8 && !(hostile[i] < 8 && !k)) /* model.name may have any number of bytes */
                poke(file, size, at + 8, 8, hostile[i], TFM_ERROR_FORMAT, "metadata", "value size");
        }
    free(file);
    test_clear(&tfm);
    SPOILED(&tfm, add_meta(&tfm, "d_model", TFM_META_I64, "\10\0\0\0\0\0\0", 8), TFM_ERROR_FORMAT,
            "'d_model' is there twice");
    SPOILED(&tfm, (add_meta(&tfm, "x", 99, "", 0), add_meta(&tfm, "x", 98, "y", 1)), TFM_ERROR_FORMAT,
            "'x' is there twice");
}

/* Keys and types that this version does not know are none of its business. */
static void test_unknown_metadata(void) {
    test_tfm tfm;
    make_tiny(&tfm);
    add_meta(&tfm, "future.thing", 77, "12345", 5);
    add_meta(&tfm, "future.nothing", 0, "", 0);
    add_meta(&tfm, "future.number", TFM_META_F32, "1234", 4);
    add_meta(&tfm, "decoder.norm_epsilon", -1, "123", 3);
    add_meta(&tfm, "a", TFM_META_TEXT, "", 0);
    check_accepted(&tfm, "unknown metadata");
    test_clear(&tfm);
}

/* ---- the description */

typedef struct key_range {
    const char *key;
    int64_t low, high; /* what may stand there in some file */
    int optional;
} key_range;

static const key_range integer_keys[] = {
    {"vocab_size", 1, 0x7FFFFFFF, 0},
    {"d_model", 1, 0x7FFFFFFF, 0},
    {"decoder.n_layers", 0, 0x7FFFFFFF, 0},
    {"decoder.n_heads", 1, 0x7FFFFFFF, 0},
    {"decoder.n_kv_heads", 1, 0x7FFFFFFF, 1},
    {"decoder.head_dim", 1, 0x7FFFFFFF, 0},
    {"decoder.d_ff", 1, 0x7FFFFFFF, 0},
    {"decoder.n_positions", 1, 0x7FFFFFFF, 0},
    {"decoder.position_offset", 0, 0x7FFFFFFF, 1},
    {"decoder.causal", 0, 1, 1},
    {"decoder.final_norm", 0, 1, 1},
    {"tokenizer.add_prefix_space", 0, 1, 1},
    {"tokenizer.ignore_merges", 0, 1, 1},
};

static void test_integers(void) {
    static const int64_t two[2] = {1, 1};
    test_tfm tfm;
    size_t k, i;
    for (k = 0; k < sizeof integer_keys / sizeof *integer_keys; k++) {
        const key_range *range = integer_keys + k;
        const int64_t outside[] = {range->low - 1, range->high + 1, INT64_MIN, INT64_MAX, -1, 0x100000001};
        for (i = 0; i < sizeof outside / sizeof *outside; i++)
            SPOILED(&tfm, test_put_i64(&tfm, range->key, outside[i]), TFM_ERROR_FORMAT, range->key);
        SPOILED(&tfm, test_put(&tfm, range->key, TFM_META_I64, two, 16), TFM_ERROR_FORMAT, range->key);
        SPOILED(&tfm, test_put(&tfm, range->key, TFM_META_I64, two, 0), TFM_ERROR_FORMAT, range->key);
        SPOILED(&tfm, test_put(&tfm, range->key, TFM_META_F64, two, 8), TFM_ERROR_FORMAT, range->key);
        SPOILED(&tfm, test_put(&tfm, range->key, TFM_META_I32, two, 4), TFM_ERROR_FORMAT, range->key);
        SPOILED(&tfm, test_put(&tfm, range->key, 99, two, 8), TFM_ERROR_FORMAT, range->key);
        if (!range->optional)
            SPOILED(&tfm, test_drop(&tfm, range->key), TFM_ERROR_FORMAT, range->key);
    }
    SPOILED(&tfm, test_put_i64(&tfm, "decoder.n_kv_heads", 3), TFM_ERROR_FORMAT, "decoder.n_kv_heads");
    SPOILED(&tfm, test_put_i64(&tfm, "decoder.n_layers", 0x7FFFFFFF), TFM_ERROR_FORMAT, "decoder.n_layers");
    SPOILED(&tfm, test_put_i64(&tfm, "decoder.n_layers", 2), TFM_ERROR_FORMAT, "decoder.blocks.1.");
}

/* What is possible by itself but does not fit the tensors names a tensor. */
static void test_misfits(void) {
    static const struct {
        const char *key;
        int64_t value;
        const char *tensor;
    } misfits[] = {
        {"vocab_size", 301, "token_embedding.weight"},
        {"vocab_size", 0x7FFFFFFF, "token_embedding.weight"},
        {"d_model", 9, "token_embedding.weight"},
        {"decoder.n_heads", 4, "decoder.blocks.0.attention.qkv.weight"},
        {"decoder.n_heads", 0x7FFFFFFF, "decoder.head_dim"},
        {"decoder.n_kv_heads", 2, "decoder.blocks.0.attention.qkv.weight"},
        {"decoder.head_dim", 0x7FFFFFFF, "decoder.head_dim"},
        {"decoder.head_dim", 0x40000008, "decoder.head_dim"}, /* times 2 heads and 4 bytes: small in 32 bits */
        {"decoder.d_ff", 13, "decoder.blocks.0.ffn.up.weight"},
        {"decoder.d_ff", 0x7FFFFFFF, "decoder.blocks.0.ffn.up.weight"},
        {"decoder.n_positions", 0x7FFFFFFF, "decoder.position_embedding.weight"},
        {"decoder.position_offset", 0x7FFFFFFF, "decoder.position_embedding.weight"},
        {"decoder.position_offset", 1, "decoder.position_embedding.weight"},
    };
    test_tfm tfm;
    size_t i;
    for (i = 0; i < sizeof misfits / sizeof *misfits; i++)
        SPOILED(&tfm, test_put_i64(&tfm, misfits[i].key, misfits[i].value), TFM_ERROR_FORMAT, misfits[i].tensor);
    SPOILED(&tfm, test_put_text(&tfm, "head", "own"), TFM_ERROR_FORMAT, "head.weight");
    SPOILED(&tfm, test_put_text(&tfm, "decoder.ffn", "gated"), TFM_ERROR_FORMAT, "decoder.blocks.0.ffn.up.weight");
    make_tiny(&tfm);
    test_drop(&tfm, "decoder.n_kv_heads"); /* then it is n_heads */
    check_tfm_refused(&tfm, TFM_ERROR_FORMAT, "decoder.blocks.0.attention.qkv.weight", "no n_kv_heads");
    test_clear(&tfm);
}

static void test_numbers(void) {
    static const char *const keys[] = {"decoder.norm_eps", "decoder.attention_scale", "embedding_scale"};
    static const double two[2] = {0.25, 0.25};
    const double bad[] = {(double)NAN, (double)INFINITY, -(double)INFINITY, 1e300, -1e39};
    test_tfm tfm;
    size_t k, i;
    for (k = 0; k < 3; k++) {
        for (i = 0; i < sizeof bad / sizeof *bad; i++)
            SPOILED(&tfm, test_put_f64(&tfm, keys[k], bad[i]), TFM_ERROR_FORMAT,
                    test_text("metadata '%s': expected a finite number", keys[k]));
        SPOILED(&tfm, test_put(&tfm, keys[k], TFM_META_F64, two, 0), TFM_ERROR_FORMAT, keys[k]);
        SPOILED(&tfm, test_put(&tfm, keys[k], TFM_META_F64, two, 16), TFM_ERROR_FORMAT, keys[k]); /* and one layer */
        SPOILED(&tfm, test_put_i64(&tfm, keys[k], 1), TFM_ERROR_FORMAT, keys[k]);
        SPOILED(&tfm, test_put(&tfm, keys[k], TFM_META_F32, two, 4), TFM_ERROR_FORMAT, keys[k]);
        if (k < 2)
            SPOILED(&tfm, test_drop(&tfm, keys[k]), TFM_ERROR_FORMAT,
                    test_text("metadata '%s': expected a number", keys[k]));
    }
    SPOILED(&tfm, test_put_f64(&tfm, "decoder.norm_eps", -1e-5), TFM_ERROR_FORMAT,
            "decoder.norm_eps"); /* a root of it */
}

static void test_words(void) {
    static const char *const keys[] = {"model.kind",        "head",        "decoder.norm",       "decoder.norm_place",
                                       "decoder.positions", "decoder.ffn", "decoder.activation", "tokenizer.kind",
                                       "tokenizer.pattern"};
    test_tfm tfm;
    size_t k;
    for (k = 0; k < sizeof keys / sizeof *keys; k++) {
        SPOILED(&tfm, test_put_text(&tfm, keys[k], "banana"), TFM_ERROR_UNSUPPORTED, keys[k]);
        SPOILED(&tfm, test_put_text(&tfm, keys[k], "banana"), TFM_ERROR_UNSUPPORTED, "banana");
        SPOILED(&tfm, test_put_text(&tfm, keys[k], ""), TFM_ERROR_UNSUPPORTED, keys[k]);
        SPOILED(&tfm, find_meta(&tfm, keys[k])->size--, TFM_ERROR_UNSUPPORTED, keys[k]); /* a word that begins so */
        SPOILED(&tfm, test_put_i64(&tfm, keys[k], 1), TFM_ERROR_FORMAT, keys[k]);
        if (strcmp(keys[k], "tokenizer.kind"))
            SPOILED(&tfm, test_drop(&tfm, keys[k]), TFM_ERROR_FORMAT, keys[k]);
    }
}

/* ---- tensors */

static void test_missing_tensors(void) {
    test_tfm tfm;
    size_t n, i;
    make_tiny(&tfm);
    n = tfm.n_tensors;
    test_clear(&tfm);
    for (i = 0; i < n; i++) {
        char name[64];
        make_tiny(&tfm);
        strcpy(name, tfm.tensors[i].name);
        test_drop(&tfm, name);
        if (strstr(name, ".bias"))
            check_accepted(&tfm, "without a bias");
        else
            check_tfm_refused(&tfm, TFM_ERROR_FORMAT, name, "without a tensor");
        test_clear(&tfm);
    }
}

/* Valid tensors of a shape that the description does not give them. */
static void test_wrong_shapes(void) {
    test_tfm tfm;
    size_t n, i, k;
    make_tiny(&tfm);
    n = tfm.n_tensors;
    test_clear(&tfm);
    for (i = 0; i < n; i++)
        for (k = 0; k < 4; k++) {
            test_tensor *tensor;
            uint64_t rows, columns;
            make_tiny(&tfm);
            tensor = tfm.tensors + i;
            rows = tensor->shape[0];
            columns = tensor->shape[1];
            tensor->n_dims = k == 0 ? 3 - tensor->n_dims : k == 3 ? 3 : 2; /* a vector as a matrix, and the other way */
            tensor->shape[0] = k == 0 && columns > 1 ? rows * columns : k == 1 ? columns : rows;
            tensor->shape[1] = k == 0 ? 1 : k == 1 ? rows : columns;
            if (k == 2) { /* one row less */
                tensor->shape[0]--;
                tensor->size = (size_t)(tensor->shape[0] * columns) * sizeof(float);
            }
            if (columns == rows && k == 1)
                tensor->shape[0] *= 2, tensor->shape[1] /= 2;
            check_tfm_refused(&tfm, TFM_ERROR_FORMAT, tensor->name, "another shape");
            test_clear(&tfm);
        }
}

/* Where a tensor's entry begins in the file. */
static size_t entry_at(const test_tfm *tfm, const unsigned char *file, size_t index) {
    size_t at = (size_t)get_u64(file + 40), i;
    for (i = 0; i < index; i++)
        at += directory_bytes(tfm->tensors + i);
    return at;
}

static void check_entry(const test_tfm *tfm, const unsigned char *file, size_t size, size_t index) {
    const size_t at = entry_at(tfm, file, index);
    const test_tensor *tensor = tfm->tensors + index;
    const uint64_t offset = get_u64(file + at + 48), bytes = tensor->size;
    size_t i, k;
    for (i = 0; i < N_HOSTILE; i++) {
        if ((uint32_t)hostile[i] != strlen(tensor->name))
            poke(file, size, at, 4, hostile[i], TFM_OK, "", "name size");
        if ((uint32_t)hostile[i] != 1)
            poke(file, size, at + 4, 4, hostile[i], TFM_ERROR_UNSUPPORTED, tensor->name, "dtype");
        if ((uint32_t)hostile[i] > 1)
            poke(file, size, at + 8, 4, hostile[i], TFM_ERROR_UNSUPPORTED, tensor->name, "layout");
        if ((uint32_t)hostile[i] != tensor->n_dims)
            poke(file, size, at + 12, 4, hostile[i], TFM_ERROR_FORMAT, tensor->name, "n_dims");
        for (k = 0; k < 4; k++)
            if (hostile[i] != tensor->shape[k])
                poke(file, size, at + 16 + 8 * k, 8, hostile[i], TFM_ERROR_FORMAT, tensor->name, "shape");
        poke(file, size, at + 48, 8, hostile[i], TFM_ERROR_FORMAT, tensor->name, "offset");
        poke(file, size, at + 56, 8, hostile[i], TFM_ERROR_FORMAT, tensor->name, "size");
    }
    poke(file, size, at + 4, 4, TFM_I8, TFM_OK, tensor->name, "int8 in rows");
    poke(file, size, at + 8, 4, TFM_PANELS, TFM_ERROR_FORMAT, tensor->name, "panels with another size");
    poke(file, size, at + 48, 8, offset + 8, TFM_ERROR_FORMAT, tensor->name, "an offset that is not aligned");
    poke(file, size, at + 48, 8, 0, TFM_ERROR_FORMAT, tensor->name, "data that begins in the header");
    poke(file, size, at + 48, 8, (size - bytes) / 64 * 64 + 64, TFM_ERROR_FORMAT, tensor->name,
         "data that ends outside");
    poke(file, size, at + 48, 8, (uint64_t)0 - 64, TFM_ERROR_FORMAT, tensor->name, "an offset that overflows");
    poke(file, size, at + 56, 8, bytes - 4, TFM_ERROR_FORMAT, tensor->name, "four bytes too few");
    poke(file, size, at + 56, 8, bytes + 4, TFM_ERROR_FORMAT, tensor->name, "four bytes too many");
    if (index)
        poke(file, size, at + 48, 8, get_u64(file + entry_at(tfm, file, index - 1) + 48), TFM_ERROR_FORMAT,
             tensor->name, "data that overlaps");
}

/* A shape whose product is the right one modulo 2^64, and one that is 0. */
static void test_overflowing_shapes(void) {
    static const uint64_t shapes[][4] = {
        {0x100000000u, 0x100000000u, 1, 1},        {0x8000000000000000u, 2, 1, 1},
        {0x100000001u, 0xFFFFFFFF00000001u, 1, 1}, {3, 0xAAAAAAAAAAAAAAABu, 1, 1}, /* 1 modulo 2^64 */
        {0x10000, 0x10000, 0x10000, 0x10000},      {1, 1, 1, 0},
    };
    test_tfm tfm;
    size_t i, k;
    for (i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (k = 2; k <= 4; k += 2) {
            test_tensor *tensor;
            make_tiny(&tfm);
            tensor = find_tensor(&tfm, "decoder.blocks.0.ffn.down.weight");
            tensor->n_dims = (uint32_t)k;
            memcpy(tensor->shape, shapes[i], sizeof shapes[i]);
            tensor->size = i == 3 ? 4 : 0;
            check_tfm_refused(&tfm, TFM_ERROR_FORMAT, tensor->name, "a shape that overflows");
            test_clear(&tfm);
        }
}

/* Four dimensions that a file may have, each for itself, whose product is 2^64, of which 0 bytes are left. */
static void test_overflowing_tensor(void) {
    static const float padding[70000 / sizeof(float)];
    test_tfm tfm;
    test_tensor *tensor;
    int i;
    make_tiny(&tfm);
    test_put_tensor(&tfm, "huge", 1, 1, padding);
    tensor = find_tensor(&tfm, "huge");
    tensor->n_dims = 4;
    tensor->size = 0;
    for (i = 0; i < 4; i++)
        tensor->shape[i] = 0x10000;
    test_put_tensor(&tfm, "padding", sizeof padding / sizeof *padding, 0, padding);
    check_tfm_refused(&tfm, TFM_ERROR_FORMAT, "huge", "a shape of 2^64");
    test_clear(&tfm);
}

static void test_directory(void) {
    static const char *const names[] = {"token_embedding.weight", "decoder.blocks.0.attention.qkv.bias",
                                        "decoder.final_norm.bias"}; /* first, middle, last */
    test_tfm tfm;
    size_t size, i;
    unsigned char *file;
    make_tiny(&tfm);
    file = test_write_tfm(&tfm, &size);
    for (i = 0; i < 3; i++)
        check_entry(&tfm, file, size, (size_t)(find_tensor(&tfm, names[i]) - tfm.tensors));
    free(file);
    test_clear(&tfm);
    SPOILED(&tfm, strcpy(find_tensor(&tfm, names[1])->name, names[0]), TFM_ERROR_FORMAT,
            "'token_embedding.weight' is there twice");
    test_overflowing_shapes();
    test_overflowing_tensor();
}

/* A tensor that the description does not ask for is none of the reader's business. */
static void test_more_tensors(void) {
    static const float one[4] = {1, 1, 1, 1};
    test_tfm tfm;
    make_tiny(&tfm);
    test_put_tensor(&tfm, "decoder.blocks.7.ffn.up.weight", 2, 2, one);
    test_put_tensor(&tfm, "something", 4, 0, one);
    check_accepted(&tfm, "more tensors");
    test_clear(&tfm);
}

/* ---- the tokenizer's tables */

static void put_one(test_tfm *tfm, const char *key, size_t index, int32_t value) {
    test_meta *meta = find_meta(tfm, key);
    if (!meta || (index + 1) * sizeof value > meta->size)
        abort();
    memcpy((char *)meta->value + index * sizeof value, &value, sizeof value);
}

static void shorten(test_tfm *tfm, const char *key, size_t n) {
    find_meta(tfm, key)->size -= n * sizeof(int32_t);
}

static void test_tokenizer_tables(void) {
    static const int32_t bad_ids[] = {-1, -2, 259, 300, 0x7FFFFFFF, INT32_MIN};
    static const int32_t many[302] = {0}, twice[4] = {TEST_END, 1, TEST_END, 1}, odd[3] = {TEST_END, 1, 65};
    static const int32_t same_merge[9] = {'a', 'b', 257, 257, 'c', 258, 'a', 'b', 257};
    static const char *const lists[] = {"tokenizer.token_sizes", "tokenizer.merges",     "tokenizer.added",
                                        "tokenizer.byte_ids",    "tokenizer.prefix_ids", "tokenizer.suffix_ids",
                                        "generation.eos_ids"};
    test_tfm tfm;
    size_t i, k;
    for (i = 0; i < sizeof bad_ids / sizeof *bad_ids; i++) {
        const int32_t id = bad_ids[i];
        for (k = 0; k < 6; k++)
            SPOILED(&tfm, put_one(&tfm, "tokenizer.merges", k, id), TFM_ERROR_FORMAT, "merge");
        SPOILED(&tfm, put_one(&tfm, "tokenizer.added", 0, id), TFM_ERROR_FORMAT, "added");
        if (id != -1)
            SPOILED(&tfm, put_one(&tfm, "tokenizer.byte_ids", 7, id), TFM_ERROR_FORMAT, "byte 7");
        SPOILED(&tfm, test_put_i32(&tfm, "tokenizer.prefix_ids", &id, 1), TFM_ERROR_FORMAT, "prefix");
        SPOILED(&tfm, test_put_i32(&tfm, "tokenizer.suffix_ids", &id, 1), TFM_ERROR_FORMAT, "suffix");
        SPOILED(&tfm, put_one(&tfm, "tokenizer.token_sizes", 3, id < 0 ? id : 0x7FFFFFFF), TFM_ERROR_FORMAT, "token");
    }
    SPOILED(&tfm, put_one(&tfm, "tokenizer.byte_ids", 7, 8), TFM_ERROR_FORMAT, "byte 7");     /* another byte's */
    SPOILED(&tfm, put_one(&tfm, "tokenizer.byte_ids", 97, 257), TFM_ERROR_FORMAT, "byte 97"); /* "ab" */
    SPOILED(&tfm, shorten(&tfm, "tokenizer.byte_ids", 1), TFM_ERROR_FORMAT, "tokenizer.byte_ids");
    SPOILED(&tfm, test_drop(&tfm, "tokenizer.byte_ids"), TFM_ERROR_FORMAT, "tokenizer.byte_ids");
    SPOILED(&tfm, put_one(&tfm, "tokenizer.token_sizes", 258, 4), TFM_ERROR_FORMAT,
            "size"); /* one byte more than there are */
    SPOILED(&tfm, put_one(&tfm, "tokenizer.token_sizes", 258, 2), TFM_ERROR_FORMAT, "size");
    SPOILED(&tfm, test_put_i32(&tfm, "tokenizer.token_sizes", many, 0), TFM_ERROR_FORMAT, "empty");
    SPOILED(&tfm, test_put_i32(&tfm, "tokenizer.token_sizes", many, 302), TFM_ERROR_FORMAT, "tokenizer.token_sizes");
    SPOILED(&tfm, test_drop(&tfm, "tokenizer.token_sizes"), TFM_ERROR_FORMAT, "empty");
    SPOILED(&tfm, test_drop(&tfm, "tokenizer.tokens"), TFM_ERROR_FORMAT, "tokenizer.tokens");
    SPOILED(&tfm, test_put_text(&tfm, "tokenizer.tokens", "abc"), TFM_ERROR_FORMAT, "tokenizer.tokens");
    SPOILED(&tfm, put_one(&tfm, "tokenizer.merges", 2, 258), TFM_ERROR_FORMAT, "merge 0"); /* a + b is not "abc" */
    SPOILED(&tfm, put_one(&tfm, "tokenizer.merges", 0, 'b'), TFM_ERROR_FORMAT, "merge 0"); /* b + b is not "ab" */
    SPOILED(&tfm, shorten(&tfm, "tokenizer.merges", 1), TFM_ERROR_FORMAT, "tokenizer.merges");
    SPOILED(&tfm, test_put_i32(&tfm, "tokenizer.merges", same_merge, 9), TFM_ERROR_FORMAT, "merge 2");
    SPOILED(&tfm, test_put_i32(&tfm, "tokenizer.added", odd, 3), TFM_ERROR_FORMAT, "tokenizer.added");
    SPOILED(&tfm, test_put_i32(&tfm, "tokenizer.added", twice, 4), TFM_ERROR_FORMAT, "256");
    SPOILED(&tfm, put_one(&tfm, "tokenizer.added", 1, 64), TFM_ERROR_UNSUPPORTED, "256");
    SPOILED(&tfm, put_one(&tfm, "tokenizer.added", 1, -1), TFM_ERROR_UNSUPPORTED, "256");
    for (k = 0; k < sizeof lists / sizeof *lists; k++) {
        SPOILED(&tfm, test_put_text(&tfm, lists[k], "text"), TFM_ERROR_FORMAT, lists[k]);
        SPOILED(&tfm, test_put_i64(&tfm, lists[k], 0), TFM_ERROR_FORMAT, lists[k]);
    }
}

/* Bytes that have no token vanish; with an unknown token they become that. */
static void test_unknown_token(void) {
    int with_unknown;
    for (with_unknown = 0; with_unknown <= 1; with_unknown++) {
        test_tfm tfm;
        unsigned char *bytes;
        int32_t ids[4] = {-1, -1, -1, -1};
        size_t n = 99;
        tfm_model *model;
        make_tiny(&tfm);
        put_one(&tfm, "tokenizer.byte_ids", 'z', -1);
        if (with_unknown)
            test_put_i64(&tfm, "tokenizer.unk_id", 'U');
        model = test_load_tfm(&tfm, &bytes);
        if (model && CHECK(tfm_tokenize(model, "yzy", 3, 0, ids, 4, &n, NULL) == TFM_OK))
            CHECK_MSG(with_unknown ? n == 3 && ids[0] == 'y' && ids[1] == 'U' && ids[2] == 'y'
                                   : n == 2 && ids[0] == 'y' && ids[1] == 'y',
                      "%s an unknown token, y and a byte without a token and y are %lu ids: %ld %ld %ld",
                      with_unknown ? "with" : "without", (unsigned long)n, (long)ids[0], (long)ids[1], (long)ids[2]);
        tfm_free(model);
        free(bytes);
        test_clear(&tfm);
    }
    {
        test_tfm tfm;
        SPOILED(&tfm, test_put_i64(&tfm, "tokenizer.unk_id", 259), TFM_ERROR_FORMAT, "unk");
    }
}

/* A model need not have a tokenizer. */
static void test_no_tokenizer(void) {
    test_tfm tfm;
    unsigned char *bytes;
    tfm_model *model;
    tfm_error error = {TFM_OK, ""};
    int32_t ids[4];
    size_t n, size;
    make_tiny(&tfm);
    test_drop(&tfm, "tokenizer.kind");
    model = test_load_tfm(&tfm, &bytes);
    if (model) {
        CHECK(!tfm_has_tokenizer(model));
        CHECK(tfm_tokenize(model, "a", 1, 0, ids, 4, &n, &error) == TFM_ERROR_UNSUPPORTED && n == 0);
        CHECK(error.status == TFM_ERROR_UNSUPPORTED && strstr(error.message, "no tokenizer"));
        CHECK(!tfm_token_text(model, 97, &size) && size == 0);
        CHECK(tfm_is_end_token(model, TEST_END) && !tfm_is_end_token(model, 97) && !tfm_is_end_token(model, -1));
    }
    tfm_free(model);
    free(bytes);
    test_clear(&tfm);
}

static tfm_status quantize(const char *from, const char *to, tfm_dtype dtype, tfm_error *error) {
    tfm_quantize_options options;
    memset(&options, 0, sizeof options);
    if (error)
        memset(error, 0, sizeof *error);
    options.dtype = dtype;
    options.threads = 2;
    return tfm_quantize(from, to, &options, error);
}

#define FROM TEST_OUTPUT "from.tfm"
#define TO TEST_OUTPUT "to.tfm"

/* ---- random damage */

/* Whatever loads must also run. */
static void run_damaged(const tfm_model *model) {
    const char text[] = "ab c<|end|> abcabc \xC3\xA9\xFF 12";
    tfm_session_options options;
    tfm_generate_options generate;
    tfm_session *session;
    tfm_error error = {TFM_OK, ""};
    int32_t ids[40];
    size_t n;
    memset(&options, 0, sizeof options);
    memset(&generate, 0, sizeof generate);
    options.engine.threads = 1;
    generate.max_tokens = 3;
    (void)tfm_tokenize(model, text, sizeof text - 1, TFM_TOKENIZE_SPECIAL, ids, 40, &n, &error);
    session = tfm_session_create(model, &options, &error);
    if (session)
        (void)tfm_generate(session, "ab", &generate, NULL, NULL, &error);
    tfm_session_free(session);
}

/* Changes one to four bytes, mostly before the data, and makes the checksum right again. */
static void damage(unsigned char *file, size_t size, uint64_t *state) {
    size_t head = (size_t)(get_u64(file + 40) + get_u64(file + 48)), n = test_random(state, 4) + 1;
    while (n--) {
        size_t at = 8 + test_random(state, (test_random(state, 4) ? head : size) - 8);
        file[at] = (unsigned char)test_random(state, 256);
    }
    test_seal(file, size);
}

static void check_damage(const unsigned char *file, size_t size, size_t rounds) {
    uint64_t state = size;
    size_t round, refused = 0, accepted = 0, bad = 0;
    for (round = 0; round < rounds; round++) {
        unsigned char *copy = (unsigned char *)copy_of(file, size);
        test_heap heap;
        tfm_error error;
        void *memory;
        tfm_model *model;
        damage(copy, size, &state);
        model = load_bytes(copy, size, &heap, &memory, &error);
        if (model)
            run_damaged(model);
        bad += model ? error.status != TFM_OK : error.status == TFM_OK || !error.message[0];
        *(model ? &accepted : &refused) += 1;
        tfm_free(model);
        bad += heap.live || heap.bad || heap.largest > ((size_t)3 << 20);
        free(memory);
        free(copy);
    }
    CHECK_MSG(!bad, "random damage: %lu files left memory, asked for too much, or gave no reason", (unsigned long)bad);
    CHECK_MSG(refused > rounds / 4 && accepted > rounds / 30,
              "random damage: %lu refused, %lu accepted: no test of both", (unsigned long)refused,
              (unsigned long)accepted); /* as it would be with a wrong checksum */
}

static void test_random_damage(void) {
    test_tfm tfm;
    size_t size;
    unsigned char *file;
    make_tiny(&tfm);
    file = test_write_tfm(&tfm, &size);
    check_damage(file, size, 5000);
    test_save(FROM, file, size);
    free(file);
    test_clear(&tfm);
    CHECK(quantize(FROM, TO, TFM_I8, NULL) == TFM_OK); /* int8's panels have scales among the integers */
    file = test_read(TO, &size);
    if (CHECK(file != NULL))
        check_damage(file, size, 2000);
    free(file);
    remove(TO);
}

/* ---- files by name */

static void check_path_refused(const char *path, tfm_status status, const char *what) {
    tfm_error error = {TFM_OK, ""};
    test_heap heap;
    tfm_load_options options;
    memset(&heap, 0, sizeof heap);
    memset(&options, 0, sizeof options);
    options.allocator = test_allocator(&heap);
    CHECK_MSG(!tfm_load(path, &options, &error), "%s is accepted", path);
    CHECK_MSG(error.status == status && strstr(error.message, path) && strstr(error.message, what), "%s: %d, %s", path,
              (int)error.status, error.message);
    CHECK(!heap.live && !heap.bad);
    CHECK(!tfm_file_open(path, NULL, NULL));
}

static void test_paths(void) {
    const char *path = TEST_OUTPUT "file.tfm";
    char long_path[600];
    test_tfm tfm;
    size_t size;
    unsigned char *file;
    tfm_error error = {TFM_OK, ""};
    make_tiny(&tfm);
    file = test_write_tfm(&tfm, &size);
    check_path_refused(TEST_OUTPUT "not_there.tfm", TFM_ERROR_FILE, "");
    check_path_refused("tests", TFM_ERROR_FILE, "");
    test_save(path, "", 0);
    check_path_refused(path, TFM_ERROR_FORMAT, "empty");
    test_save(path, "{\"hello\": \"this is a text file, of more than sixty-four bytes, not a model\"}\n", 76);
    check_path_refused(path, TFM_ERROR_FORMAT, "not a .tfm file");
    test_save(path, file, size - 1);
    check_path_refused(path, TFM_ERROR_FORMAT, "truncated");
    test_save(path, file, 63);
    check_path_refused(path, TFM_ERROR_FORMAT, "not a .tfm file");
    memset(long_path, 'x', sizeof long_path - 1);
    long_path[sizeof long_path - 1] = 0;
    CHECK(!tfm_load(long_path, NULL, &error) && error.status == TFM_ERROR_FILE && strlen(error.message) > 100);
    remove(path);
    free(file);
    test_clear(&tfm);
}

/* ---- reading what is there */

static void test_entries(void) {
    test_tfm tfm;
    size_t size, i;
    unsigned char *bytes;
    tfm_file *file;
    tfm_error error = {TFM_OK, ""};
    make_tiny(&tfm);
    bytes = test_write_tfm(&tfm, &size);
    file = tfm_file_open_memory(bytes, size, "some name", NULL, &error);
    if (CHECK(file != NULL)) {
        CHECK(tfm_file_bytes(file) == size && tfm_file_n_meta(file) == tfm.n_meta &&
              tfm_file_n_tensors(file) == tfm.n_tensors);
        for (i = 0; i < tfm.n_meta; i++) {
            const tfm_meta *meta = tfm_file_meta(file, i);
            CHECK(meta == tfm_file_find_meta(file, tfm.meta[i].key) && (uint32_t)meta->type == tfm.meta[i].type &&
                  meta->key_size == strlen(tfm.meta[i].key) &&
                  !memcmp(meta->values, tfm.meta[i].value, tfm.meta[i].size));
        }
        for (i = 0; i < tfm.n_tensors; i++) {
            const tfm_entry *entry = tfm_file_entry(file, i);
            CHECK(entry == tfm_file_find(file, tfm.tensors[i].name) &&
                  entry->tensor.shape[0] == tfm.tensors[i].shape[0] &&
                  !memcmp(entry->tensor.data, tfm.tensors[i].data, tfm.tensors[i].size));
        }
        CHECK(!tfm_file_meta(file, tfm.n_meta) && !tfm_file_entry(file, tfm.n_tensors));
        CHECK(!tfm_file_find(file, "token_embedding") && !tfm_file_find(file, "") &&
              !tfm_file_find_meta(file, "d_mode"));
        CHECK(tfm_file_verify(file, &error) == TFM_OK);
        bytes[size - 3] ^= 0x10; /* in the last tensor */
        CHECK(tfm_file_verify(file, &error) == TFM_ERROR_FORMAT && strstr(error.message, "some name: ") &&
              strstr(error.message, "decoder.final_norm.bias"));
        tfm_file_close(file);
        check_accepted(&tfm, "unverified");
    }
    {
        tfm_load_options options;
        memset(&options, 0, sizeof options);
        options.verify = 1;
        memset(&error, 0, sizeof error);
        CHECK(!tfm_load_memory(bytes, size, &options, &error) && error.status == TFM_ERROR_FORMAT &&
              strstr(error.message, "decoder.final_norm.bias"));
        bytes[size - 3] ^= 0x10;
        CHECK(tfm_load_memory(bytes, 0, NULL, &error) == NULL);
    }
    free(bytes);
    test_clear(&tfm);
}

/* ---- quantize */

/* The logits of a few tokens; 0 if the model can't be run. */
static int logits_of(const tfm_model *model, float *logits) {
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

/* The matrices of a file in 16 bits, converted here. */
static void convert_matrices(test_tfm *tfm, tfm_dtype dtype) {
    size_t i, k;
    for (i = 0; i < tfm->n_tensors && dtype != TFM_F32; i++) {
        test_tensor *tensor = tfm->tensors + i;
        const float *numbers = (const float *)tensor->data;
        uint16_t *halves;
        if (tensor->n_dims != 2)
            continue;
        tensor->size /= 2;
        halves = (uint16_t *)test_allocate(tensor->size);
        for (k = 0; k < tensor->size / 2; k++)
            halves[k] = dtype == TFM_F16 ? test_to_f16(numbers[k]) : test_to_bf16(numbers[k]);
        tensor->dtype = (uint32_t)dtype;
        free(tensor->data);
        tensor->data = halves;
    }
}

static void save_tfm(const test_tfm *tfm, const char *path) {
    size_t size;
    unsigned char *bytes = test_write_tfm(tfm, &size);
    test_save(path, bytes, size);
    free(bytes);
}

/* The file at TO computes what `expected` does, bit for bit. */
static void check_same_model(const tfm_model *expected, const char *step) {
    static float a[5 * 300], b[5 * 300];
    tfm_error error = {TFM_OK, ""};
    tfm_load_options options;
    tfm_model *model;
    memset(&options, 0, sizeof options);
    options.verify = 1;
    model = tfm_load(TO, &options, &error);
    if (CHECK_MSG(model != NULL, "%s: %s", step, error.message))
        CHECK_MSG(logits_of(expected, a) && logits_of(model, b) && !memcmp(a, b, sizeof a), "%s: the logits differ",
                  step);
    tfm_free(model);
}

/* Every matrix of the file at TO lies in panels and has that type; vectors and metadata are as they were. */
static void check_quantized(const test_tfm *tfm, tfm_dtype dtype) {
    tfm_error error = {TFM_OK, ""};
    tfm_file *file = tfm_file_open(TO, NULL, &error);
    size_t i;
    if (!CHECK_MSG(file != NULL, "%s", error.message))
        return;
    CHECK(tfm_file_n_meta(file) == tfm->n_meta && tfm_file_n_tensors(file) == tfm->n_tensors);
    for (i = 0; i < tfm->n_meta; i++)
        CHECK(!memcmp(tfm_file_meta(file, i)->values, tfm->meta[i].value, tfm->meta[i].size));
    for (i = 0; i < tfm->n_tensors; i++) {
        const tfm_entry *entry = tfm_file_find(file, tfm->tensors[i].name);
        if (!CHECK(entry != NULL))
            continue;
        if (entry->tensor.n_dims == 2)
            CHECK(entry->tensor.dtype == dtype && entry->tensor.layout == TFM_PANELS);
        else
            CHECK(entry->tensor.dtype == TFM_F32 && entry->tensor.layout == TFM_ROWS &&
                  !memcmp(entry->tensor.data, tfm->tensors[i].data, tfm->tensors[i].size));
    }
    tfm_file_close(file);
}

static void test_quantize_to(tfm_dtype dtype) {
    tfm_error error;
    unsigned char *bytes;
    test_tfm tfm;
    tfm_model *model;
    make_tiny(&tfm);
    save_tfm(&tfm, FROM);
    CHECK_MSG(quantize(FROM, TO, dtype, &error) == TFM_OK, "%s", error.message);
    check_quantized(&tfm, dtype);
    convert_matrices(&tfm, dtype);
    model = test_load_tfm(&tfm, &bytes);
    check_same_model(model, "quantized, and converted here");
    CHECK(quantize(TO, TO, dtype, &error) == TFM_OK); /* onto itself, from panels */
    check_same_model(model, "quantized again");
    CHECK(quantize(TO, TO, dtype, &error) == TFM_OK);
    check_quantized(&tfm, dtype);
    check_same_model(model, "quantized once more");
    tfm_free(model);
    free(bytes);
    test_clear(&tfm);
    remove(TO);
}

/* Without a type: i8. */
static void test_quantize_usual(void) {
    size_t size, other_size;
    unsigned char *bytes, *other;
    test_tfm tfm;
    make_tiny(&tfm);
    save_tfm(&tfm, FROM);
    CHECK(quantize(FROM, TO, TFM_NO_DTYPE, NULL) == TFM_OK);
    bytes = test_read(TO, &size);
    CHECK(tfm_quantize(FROM, TO, NULL, NULL) == TFM_OK);
    other = test_read(TO, &other_size);
    CHECK(size == other_size && !memcmp(bytes, other, size));
    free(other);
    CHECK(quantize(FROM, TO, TFM_I8, NULL) == TFM_OK);
    other = test_read(TO, &other_size);
    CHECK(size == other_size && !memcmp(bytes, other, size));
    free(other);
    free(bytes);
    test_clear(&tfm);
    remove(TO);
}

/* A file that was quantized is the same as one that is converted when it is loaded. */
static void test_quantize_or_load(tfm_dtype dtype) {
    tfm_error error;
    test_tfm tfm;
    tfm_load_options options;
    tfm_model *model;
    memset(&options, 0, sizeof options);
    make_tiny(&tfm);
    save_tfm(&tfm, FROM);
    CHECK_MSG(quantize(FROM, TO, dtype, &error) == TFM_OK, "%s", error.message);
    options.dtype = dtype;
    model = tfm_load(FROM, &options, &error);
    if (CHECK_MSG(model != NULL, "%s", error.message))
        check_same_model(model, "quantized, and converted when loaded");
    tfm_free(model);
    test_clear(&tfm);
    remove(TO);
}

typedef struct watched {
    uint64_t done, total, calls, stop_at;
    int backwards;
} watched;

static int watch(void *user, uint64_t done, uint64_t total) {
    watched *w = (watched *)user;
    w->backwards |= done < w->done || done > total;
    w->done = done;
    w->total = total;
    return ++w->calls == w->stop_at;
}

static void check_nothing_written(const char *step) {
    CHECK_MSG(!exists(TO) && !exists(TO ".part"), "%s: something is left behind", step);
}

static void test_quantize_progress(void) {
    watched w;
    tfm_quantize_options options;
    tfm_error error = {TFM_OK, ""};
    memset(&w, 0, sizeof w);
    memset(&options, 0, sizeof options);
    options.progress = watch;
    options.progress_user = &w;
    CHECK(tfm_quantize(FROM, TO, &options, &error) == TFM_OK);
    CHECK(w.calls > 2 && w.done == w.total && !w.backwards);
    remove(TO);
    w.stop_at = w.calls; /* the last call */
    w.calls = w.done = 0;
    CHECK(tfm_quantize(FROM, TO, &options, &error) == TFM_ERROR_STOPPED && error.status == TFM_ERROR_STOPPED);
    check_nothing_written("stopped at the end");
    w.stop_at = 1;
    w.calls = w.done = 0;
    CHECK(tfm_quantize(FROM, TO, &options, NULL) == TFM_ERROR_STOPPED);
    check_nothing_written("stopped at once");
    test_save(TO, "old", 3); /* what was there stays */
    w.calls = w.done = 0;
    CHECK(tfm_quantize(FROM, TO, &options, NULL) == TFM_ERROR_STOPPED);
    {
        size_t size;
        unsigned char *old = test_read(TO, &size);
        CHECK(old && size == 3 && !memcmp(old, "old", 3) && !exists(TO ".part"));
        free(old);
    }
    remove(TO);
}

static void test_quantize_errors(void) {
    tfm_error error;
    test_save(FROM, "nothing of the kind, but long enough to have a header of sixty-four bytes", 72);
    CHECK(quantize(FROM, TO, TFM_F16, &error) == TFM_ERROR_FORMAT && strstr(error.message, FROM));
    check_nothing_written("no .tfm file");
    CHECK(quantize(TEST_OUTPUT "not_there.tfm", TO, TFM_F16, &error) == TFM_ERROR_FILE &&
          strstr(error.message, TEST_OUTPUT "not_there.tfm"));
    check_nothing_written("missing input");
    CHECK(quantize(FROM, TO, (tfm_dtype)77, &error) == TFM_ERROR_UNSUPPORTED);
    check_nothing_written("unknown type");
    {
        test_tfm tfm;
        make_tiny(&tfm);
        save_tfm(&tfm, FROM);
        test_clear(&tfm);
    }
    CHECK(quantize(FROM, TEST_OUTPUT "no_directory/to.tfm", TFM_F16, &error) == TFM_ERROR_FILE &&
          strstr(error.message, TEST_OUTPUT "no_directory/to.tfm"));
    CHECK(quantize(FROM, FROM "/to.tfm", TFM_F16, &error) == TFM_ERROR_FILE && strstr(error.message, FROM "/to.tfm"));
    CHECK(quantize(FROM, "tests", TFM_F16, &error) == TFM_ERROR_FILE && strstr(error.message, "tests"));
    CHECK(!exists("tests.part"));
}

/* Names of types and instruction sets, both ways, and what a model says about itself. */
static void test_names(void) {
    static const char *const unknown[] = {"f64", "F32", "f32 ", "parts", "q4_0"};
    tfm_dtype dtype = TFM_NO_DTYPE;
    tfm_isa isa = TFM_ISA_COUNT;
    tfm_error error;
    tfm_model *model;
    size_t i, labels;
    int value;
    for (value = TFM_F32; value < TFM_DTYPE_COUNT; value++) {
        CHECK(tfm_dtype_from_name(tfm_dtype_name((tfm_dtype)value), &dtype, &error) == TFM_OK);
        CHECK((int)dtype == value);
    }
    CHECK(tfm_dtype_from_name("int8", &dtype, NULL) == TFM_OK && dtype == TFM_I8);
    for (i = 0; i < sizeof unknown / sizeof *unknown; i++) {
        CHECK_MSG(tfm_dtype_from_name(unknown[i], &dtype, &error) == TFM_ERROR_ARGUMENT, "%s", unknown[i]);
        CHECK_MSG(strstr(error.message, unknown[i]) != NULL, "%s: %s", unknown[i], error.message);
    }
    for (value = TFM_ISA_BEST; value < TFM_ISA_COUNT; value++) {
        CHECK(tfm_isa_from_name(tfm_isa_name((tfm_isa)value), &isa, &error) == TFM_OK);
        CHECK((int)isa == value);
    }
    CHECK(tfm_isa_from_name(NULL, &isa, NULL) == TFM_OK && isa == TFM_ISA_BEST);
    CHECK(tfm_isa_from_name("", &isa, NULL) == TFM_OK && isa == TFM_ISA_BEST);
    CHECK(tfm_isa_from_name("avx1024", &isa, &error) == TFM_ERROR_ARGUMENT && strstr(error.message, "avx1024"));
    CHECK(!tfm_isa_name((tfm_isa)-1) && !tfm_isa_name(TFM_ISA_COUNT));
    model = tfm_load(TEST_MODEL, NULL, &error);
    if (!CHECK_MSG(model != NULL, "%s", error.message))
        return;
    {
        const tfm_description *d = tfm_model_description(model);
        CHECK(tfm_model_parameters(model) > d->vocab_size * d->d_model);
        CHECK(!tfm_is_special_token(model, -1) && !tfm_is_special_token(model, (int32_t)d->vocab_size));
        CHECK(!tfm_model_label(model, 0, &labels) && !labels);
    }
    tfm_free(model);
}

/* The blocks and norms of both stacks, or of the one that there is. */
static void test_stacks(void) {
    tfm_error error;
    tfm_model *both = tfm_load("tests/golden/beams_t5.tfm", NULL, &error),
              *decoder = tfm_load(TEST_MODEL, NULL, &error);
    if (CHECK_MSG(both && decoder, "%s", error.message)) {
        const tfm_description *d = tfm_model_description(both);
        CHECK(tfm_model_encoder_block(both, 0) && tfm_model_encoder_block(both, 0) != tfm_model_block(both, 0));
        CHECK(tfm_model_encoder_block(both, d->encoder.n_layers - 1) &&
              !tfm_model_encoder_block(both, d->encoder.n_layers));
        CHECK(tfm_model_encoder_final_norm(both) && tfm_model_encoder_final_norm(both)->weight.shape[0] == d->d_model &&
              tfm_model_final_norm(both) && tfm_model_final_norm(both) != tfm_model_encoder_final_norm(both));
        CHECK(!tfm_model_encoder_block(decoder, 0) && !tfm_model_encoder_final_norm(decoder));
        CHECK(tfm_model_final_norm(decoder) &&
              tfm_model_final_norm(decoder)->weight.shape[0] == tfm_model_description(decoder)->d_model);
    }
    tfm_free(both);
    tfm_free(decoder);
}

/* A weight that can't be quantized ends the loading: what comes behind it has not been read, and is not looked at. (The
 * last tensor has 16 bits, so that as floats it would be beyond the end of the file, which sanitizers see.) */
static void test_unread_norm(void) {
    static const char last[] = "decoder.final_norm.weight";
    static const float ones[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    static const uint16_t halves[8] = {0x3F80, 0x3F80, 0x3F80, 0x3F80, 0x3F80, 0x3F80, 0x3F80, 0x3F80};
    tfm_load_options options;
    tfm_error error = {TFM_OK, ""};
    test_tensor *norm;
    test_tfm tfm;
    tfm_model *model;
    unsigned char *file;
    size_t size;
    make_tiny(&tfm);
    test_put_f64(&tfm, "decoder.norm_weight_offset", 1);
    ((float *)find_tensor(&tfm, "decoder.blocks.0.ffn.down.weight")->data)[5] = NAN;
    test_drop(&tfm, last);
    test_put_tensor(&tfm, last, 8, 0, ones);
    norm = find_tensor(&tfm, last);
    norm->dtype = TFM_BF16;
    norm->size = sizeof halves;
    memcpy(norm->data, halves, sizeof halves);
    file = test_write_tfm(&tfm, &size);
    memset(&options, 0, sizeof options);
    options.dtype = TFM_I8;
    options.threads = 1;
    model = tfm_load_memory(file, size, &options, &error);
    CHECK_MSG(!model && error.status == TFM_ERROR_FORMAT && strstr(error.message, "ffn.down.weight"), "%s",
              error.message);
    tfm_free(model);
    free(file);
    test_clear(&tfm);
}

/* Hidden states of a text, of whatever kind the model is. */
static int run_text(const tfm_model *model, float *hidden, size_t *n) {
    static const int32_t ids[] = {3, 11, 7, 20, 5};
    const tfm_description *d = tfm_model_description(model);
    tfm_session *session = tfm_session_create(model, NULL, NULL);
    tfm_status status = session ? TFM_OK : TFM_ERROR_MEMORY;
    tfm_text text;
    tfm_chunk chunk = {0, ids, 5, 5};
    memset(&text, 0, sizeof text);
    text.tokens = ids;
    text.n_tokens = 5;
    *n = 5 * d->d_model;
    if (session && d->kind == TFM_ENCODER)
        status = tfm_encode(session, &text, 1, TFM_HIDDEN, hidden, NULL);
    if (session && d->kind == TFM_ENCODER_DECODER)
        status = tfm_set_source(session, 0, &text, NULL);
    if (status == TFM_OK && d->kind != TFM_ENCODER)
        status = tfm_eval(session, &chunk, 1, TFM_HIDDEN, hidden, NULL);
    tfm_session_free(session);
    return status == TFM_OK;
}

/* What is packed while it is loaded computes what the file that tfm_quantize writes does, tables that are only looked up and
 * relative positions included. */
static void test_packed_as_quantized(void) {
    static const char *const names[] = {"encoder_mlm", "encoder_token", "beams_t5", "beams_gpt2", "model_unscaled"};
    static float in_memory[5 * 256], in_file[5 * 256];
    size_t i, n;
    int dtype;
    for (i = 0; i < sizeof names / sizeof *names; i++)
        for (dtype = TFM_F32; dtype < TFM_DTYPE_COUNT; dtype++) {
            const char *path = test_text("tests/golden/%s.tfm", names[i]);
            tfm_quantize_options to;
            tfm_load_options options;
            tfm_error error = {TFM_OK, ""};
            tfm_model *packed, *quantized;
            memset(&to, 0, sizeof to);
            memset(&options, 0, sizeof options);
            to.dtype = options.dtype = (tfm_dtype)dtype;
            CHECK_OK(tfm_quantize(path, TO, &to, &error), error);
            packed = tfm_load(path, &options, &error);
            quantized = tfm_load(TO, NULL, &error);
            if (CHECK_MSG(packed && quantized, "%s", error.message) &&
                CHECK(run_text(packed, in_memory, &n) && run_text(quantized, in_file, &n)))
                CHECK_SAME(in_memory, in_file, n, test_text("%s as %s", names[i], tfm_dtype_name((tfm_dtype)dtype)));
            tfm_free(packed);
            tfm_free(quantized);
            remove(TO);
        }
}

void test_file(void) {
    test_unread_norm();
    test_names();
    test_stacks();
    int dtype;
    test_truncation();
    test_header();
    test_misaligned();
    test_metadata_entries();
    test_unknown_metadata();
    test_integers();
    test_misfits();
    test_numbers();
    test_words();
    test_missing_tensors();
    test_wrong_shapes();
    test_directory();
    test_more_tensors();
    test_tokenizer_tables();
    test_unknown_token();
    test_no_tokenizer();
    test_random_damage();
    test_paths();
    test_entries();
    test_quantize_usual();
    test_quantize_to(TFM_F32);
    test_quantize_to(TFM_F16);
    test_quantize_to(TFM_BF16);
    for (dtype = TFM_F32; dtype <= TFM_I8; dtype++)
        test_quantize_or_load((tfm_dtype)dtype);
    test_quantize_progress();
    test_quantize_errors();
    remove(FROM);
    test_packed_as_quantized();
}
