/* A libFuzzer target: a .tfm file, behind it a text. The file is loaded under options that are drawn from the input, the
 * text tokenized and decoded, and if there is a model, it is evaluated, generates and encodes. Nothing may crash, leak,
 * hang or take much memory; what comes back is looked at only as far as the contracts go. tests/fuzz/run.sh runs it. */
#define TFM_IMPLEMENTATION
#include "../../tfm.h"

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t capacity);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t capacity, unsigned seed);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MAX_TEXT = 1 << 10 };

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            abort();                                                                                                   \
    } while (0)

/* ---- numbers drawn from the input */

static uint32_t draw(uint32_t *state, uint32_t n) {
    *state = *state * 1664525u + 1013904223u;
    return (*state >> 8) % n;
}

static uint32_t checksum(const uint8_t *data, size_t size) {
    tfm__crc_tables crc;
    tfm__crc_prepare(&crc);
    return tfm__crc(&crc, 0, data, size);
}

/* Bytes of the file at the input's beginning, as its header says. */
static size_t file_size(const uint8_t *data, size_t size) {
    uint64_t said = size < 64 ? size : tfm__u64(data + 16);
    return said > size ? size : (size_t)said;
}

/* ---- what is done with a model */

static void check_status(tfm_status status, const tfm_error *error) {
    CHECK(status == TFM_OK || (error->status == status && error->message[0]));
}

static void try_tokenizer(const tfm_model *model, const char *text, size_t size, uint32_t *state) {
    const unsigned flags = draw(state, 4);
    const size_t vocab_size = tfm_model_description(model)->vocab_size, half = size / 2;
    size_t n_ids = 0, bytes = 0, again = 0, capacity, n, i;
    int32_t ids[MAX_TEXT], types[MAX_TEXT];
    char decoded[256];
    tfm_error error;
    tfm_status status;
    memset(&error, 0, sizeof error);
    capacity = draw(state, 2) ? MAX_TEXT : draw(state, 8);
    status = tfm_tokenize(model, text, size, flags, ids, capacity, &n_ids, &error);
    check_status(status, &error);
    if (status == TFM_OK) {
        n = n_ids < capacity ? n_ids : capacity;
        for (i = 0; i < n; i++)
            CHECK(ids[i] >= 0 && (size_t)ids[i] < vocab_size);
        check_status(tfm_decode(model, ids, n, decoded, draw(state, sizeof decoded), &bytes, &error), &error);
    }
    for (i = 0; i < 8; i++)
        ids[i] = (int32_t)draw(state, (uint32_t)vocab_size + 2) - 1;
    if (tfm_decode(model, ids, 8, NULL, 0, &bytes, &error) == TFM_OK && bytes <= sizeof decoded) {
        CHECK(tfm_decode(model, ids, 8, decoded, bytes, &again, &error) == TFM_OK);
        CHECK(again == bytes);
    }
    (void)tfm_token_text(model, ids[0], &bytes);
    (void)tfm_token_id(model, text, size < 16 ? size : 16);
    (void)tfm_mask_token(model);
    check_status(
        tfm_tokenize_pair(model, text, half, text + half, size - half, flags, ids, types, capacity, &n_ids, &error),
        &error);
}

static void draw_ids(int32_t *ids, size_t n, size_t vocab_size, uint32_t *state) {
    size_t i;
    for (i = 0; i < n; i++)
        ids[i] = (int32_t)draw(state, (uint32_t)vocab_size);
    if (!draw(state, 8))
        ids[draw(state, (uint32_t)n)] = draw(state, 2) ? -1 : (int32_t)vocab_size;
}

static void try_decoder(tfm_session *session, const char *text, uint32_t *state) {
    const size_t vocab_size = tfm_model_description(tfm_session_model(session))->vocab_size;
    tfm_generate_options options;
    tfm_chunk chunk;
    tfm_error error;
    int32_t ids[4];
    memset(&error, 0, sizeof error);
    memset(&options, 0, sizeof options);
    memset(&chunk, 0, sizeof chunk);
    draw_ids(ids, 4, vocab_size, state);
    chunk.tokens = ids;
    chunk.n_tokens = 1 + draw(state, 4);
    check_status(tfm_eval(session, &chunk, 1, TFM_LOGITS, NULL, &error), &error);
    options.max_tokens = 4;
    options.append = (int)draw(state, 2);
    options.shift = (int)draw(state, 2);
    options.ignore_end = (int)draw(state, 2);
    options.seed = *state;
    options.sampling.temperature = (float)draw(state, 3);
    options.sampling.top_k = draw(state, 3);
    options.sampling.top_p = (float)draw(state, 3) / 2;
    options.sampling.repeat_penalty = (float)draw(state, 3);
    check_status(tfm_generate_ids(session, ids, chunk.n_tokens, &options, NULL, NULL, &error), &error);
    check_status(tfm_generate(session, text, &options, NULL, NULL, &error), &error);
}

/* The source of an encoder-decoder, or all there is to do with an encoder. */
static void try_encoder(tfm_session *session, uint32_t *state) {
    const tfm_description *d = tfm_model_description(tfm_session_model(session));
    int32_t ids[4];
    tfm_text text;
    tfm_error error;
    memset(&error, 0, sizeof error);
    memset(&text, 0, sizeof text);
    draw_ids(ids, 4, d->vocab_size, state);
    text.tokens = ids;
    text.n_tokens = 1 + draw(state, 4);
    if (d->kind == TFM_ENCODER_DECODER)
        check_status(tfm_set_source(session, 0, &text, &error), &error);
    else {
        float *vector = (float *)malloc(d->d_model * sizeof *vector);
        CHECK(vector);
        check_status(tfm_embed(session, &text, 1, (tfm_pooling)draw(state, 4), 1, vector, &error), &error);
        free(vector);
    }
}

static size_t work(const tfm_stack *stack) {
    return stack->n_layers * stack->n_heads * stack->head_dim + stack->n_layers * stack->d_ff;
}

static void try_model(const tfm_model *model, const char *text, uint32_t *state) {
    const tfm_description *d = tfm_model_description(model);
    tfm_session_options options;
    tfm_session *session;
    tfm_error error;
    memset(&options, 0, sizeof options);
    memset(&error, 0, sizeof error);
    options.context = options.source = 8; /* n_positions may be anything */
    options.max_rows = 1 + draw(state, 4);
    options.engine.isa = TFM_ISA_BEST;
    options.engine.threads = 1;
    if (!d->vocab_size || d->vocab_size > 1 << 16 || work(&d->encoder) + work(&d->decoder) > 1 << 14)
        return; /* right, but too slow here */
    session = tfm_session_create(model, &options, &error);
    CHECK(session || error.message[0]);
    if (session && d->kind != TFM_DECODER)
        try_encoder(session, state);
    if (session && d->kind != TFM_ENCODER)
        try_decoder(session, text, state);
    tfm_session_free(session);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const size_t file = file_size(data, size), text_size = size - file < MAX_TEXT ? size - file : MAX_TEXT - 1;
    uint32_t state = checksum(data + file, size - file);
    uint64_t *aligned = (uint64_t *)malloc(file + 8); /* exactly as large, so that reading past the end is seen */
    char text[MAX_TEXT];
    tfm_load_options options;
    tfm_error error;
    tfm_model *model;
    CHECK(aligned);
    memcpy(aligned, data, file);
    memcpy(text, data + file, text_size);
    text[text_size] = 0;
    memset(&options, 0, sizeof options);
    memset(&error, 0, sizeof error);
    options.dtype = (tfm_dtype)draw(&state, TFM_DTYPE_COUNT);
    options.copy = (int)draw(&state, 2);
    options.threads = 1;
    model = tfm_load_memory(aligned, file, &options, &error);
    CHECK(model || (error.status != TFM_OK && error.message[0]));
    if (model) {
        if (tfm_has_tokenizer(model))
            try_tokenizer(model, text, text_size, &state);
        try_model(model, text, &state);
    }
    tfm_free(model);
    free(aligned);
    return 0;
}

/* ---- the mutator: files whose header is right, so that what lies behind it is reached */

static void put_u32(uint8_t *p, uint32_t value) {
    int i;
    for (i = 0; i < 4; i++)
        p[i] = (uint8_t)(value >> 8 * i);
}

static void put_u64(uint8_t *p, uint64_t value) {
    put_u32(p, (uint32_t)value);
    put_u32(p + 4, (uint32_t)(value >> 32));
}

/* The file's parts, if the header's sizes can be true. */
static int parts(const uint8_t *data, size_t size, size_t *metadata, size_t *directory) {
    const uint64_t m = size < 64 ? 0 : tfm__u64(data + 32), d = size < 64 ? 0 : tfm__u64(data + 48);
    *metadata = (size_t)m;
    *directory = (size_t)d;
    return size >= 64 && m <= size - 64 && d <= size - 64 - m;
}

static void seal(uint8_t *data, size_t size) {
    size_t metadata, directory;
    tfm__crc_tables crc;
    if (!parts(data, size, &metadata, &directory))
        return;
    tfm__crc_prepare(&crc);
    put_u64(data + 24, 64);
    put_u64(data + 40, 64 + metadata);
    put_u32(data + 60, tfm__crc(&crc, tfm__crc(&crc, 0, data, 60), data + 64, metadata + directory));
}

/* The offset of a metadata entry, chosen at random; 0 if there is none. */
static size_t choose_entry(const uint8_t *data, size_t end, uint32_t *state) {
    size_t at = 64, chosen = 0;
    uint32_t n = 0;
    while (at < end && end - at >= 24) {
        const uint64_t key = tfm__round_up(tfm__u32(data + at), 8), value = tfm__u64(data + at + 8);
        if (key > end - at - 16 || value > end - at - 16 - key || tfm__round_up((size_t)value, 8) > end - at - 16 - key)
            return chosen;
        if (!draw(state, ++n))
            chosen = at;
        at += 16 + (size_t)key + tfm__round_up((size_t)value, 8);
    }
    return chosen;
}

/* Moves what lies behind the metadata by a multiple of 64 bytes, and says so everywhere. */
static void move_rest(uint8_t *data, size_t size, size_t metadata, size_t directory, size_t by) {
    size_t at = 64 + metadata, end = at + directory;
    memmove(data + at + by, data + at, size - at);
    memset(data + at, 0, by);
    at += by;
    end += by;
    while (end - at >= 80 && tfm__u32(data + at) <= end - at - 72) {
        put_u64(data + at + 48, tfm__u64(data + at + 48) + by);
        at += 72 + tfm__round_up(tfm__u32(data + at), 8);
        if (at > end)
            break;
    }
    put_u64(data + 32, metadata + by);
    put_u64(data + 16, size + by);
}

/* A number in a value: larger, smaller, extreme. */
static void change_number(uint8_t *value, size_t size, size_t width, uint32_t *state) {
    static const int64_t extremes[] = {0, 1, -1, 2, 3, 7, 8, 255, 256, 0x7FFFFFFF, -0x7FFFFFFF, 0x7FFFFFFFFFFFFFFF};
    uint8_t *number = value + draw(state, (uint32_t)(size / width)) * width, bytes[8];
    int64_t old = (int64_t)(width == 8 ? tfm__u64(number) : tfm__u32(number));
    int64_t now = draw(state, 2) ? (int64_t)((uint64_t)old + draw(state, 5) - 2)
                                 : extremes[draw(state, sizeof extremes / sizeof *extremes)];
    put_u64(bytes, (uint64_t)now);
    memcpy(number, bytes, width);
}

/* Changes one metadata entry: a number in it, its bytes, its size (what it gains is taken from 64 bytes of padding that
 * a key of its own covers). */
static size_t change_entry(uint8_t *data, size_t size, size_t capacity, uint32_t *state) {
    size_t metadata, directory, entry, value, value_size, room;
    uint32_t type;
    if (!parts(data, size, &metadata, &directory) || !(entry = choose_entry(data, 64 + metadata, state)))
        return LLVMFuzzerMutate(data, size, capacity);
    type = tfm__u32(data + entry + 4);
    value = entry + 16 + tfm__round_up(tfm__u32(data + entry), 8);
    value_size = (size_t)tfm__u64(data + entry + 8);
    room = tfm__round_up(value_size, 8);
    if (!draw(state, 4) && capacity - size >= 64) { /* room for 64 bytes more, or for fewer */
        const size_t element = type == TFM_META_TEXT || type == TFM_META_BYTES ? 1 : type >= TFM_META_I32 ? 4 : 8;
        move_rest(data, size, metadata, directory, 64);
        memmove(data + value + room + 64, data + value + room, 64 + metadata - value - room);
        memset(data + value + room, (int)draw(state, 256), 64);
        put_u64(data + entry + 8, room + 64 - (element == 1 ? draw(state, 8) : 0));
        size += 64;
    } else if (value_size && (type == TFM_META_I64 || type == TFM_META_I32) && value_size >= 8)
        change_number(data + value, value_size, type == TFM_META_I64 ? 8 : 4, state);
    else if (value_size)
        (void)LLVMFuzzerMutate(data + value, value_size, value_size);
    else
        data[entry + 4] = (uint8_t)draw(state, 8);
    return size;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t capacity, unsigned seed) {
    uint32_t state = seed;
    size_t file = file_size(data, size), n;
    if (size < 64)
        return LLVMFuzzerMutate(data, size, capacity);
    if (!draw(&state, 3)) /* the text, from which the options are drawn too */
        return file +
               LLVMFuzzerMutate(data + file, size - file, capacity - file < MAX_TEXT ? capacity - file : MAX_TEXT);
    for (n = draw(&state, 3) + 1; n; n--)
        if (draw(&state, 4) && size == file)
            file = size = change_entry(data, file, capacity, &state);
        else if (draw(&state, 4)) { /* with a text behind it: in a copy, and back */
            const size_t text = size - file;
            uint8_t *behind = (uint8_t *)malloc(text + 1);
            CHECK(behind);
            memcpy(behind, data + file, text);
            file = change_entry(data, file, capacity - text, &state);
            memcpy(data + file, behind, text);
            free(behind);
            size = file + text;
        } else if (file > 64)
            (void)LLVMFuzzerMutate(data + 24, file - 24, file - 24);
    if (draw(&state, 16))
        seal(data, file);
    return size;
}
