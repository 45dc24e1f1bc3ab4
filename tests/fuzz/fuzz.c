/* Targets for libFuzzer and AFL++. The environment's TFM_FUZZ says what an input is:
 *   file (or nothing)  a .tfm file, behind it a text. The file is loaded under options that are drawn from the input, the
 *                      text tokenized and decoded, and if there is a model, it is evaluated, generates and encodes.
 *   chat               a saved conversation of the model TFM_FUZZ_MODELS/decoder: it is loaded, and goes on.
 *   generate           options, read from the input one after another, under which that model, or the encoder-decoder
 *                      beside it, generates; twice, since the second text must be the same.
 * Nothing may crash, leak, hang or take much memory; what comes back is looked at only as far as the contracts go.
 * tests/fuzz/run.sh runs it. */
#define TFM_IMPLEMENTATION
#include "../../tfm.h"

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t capacity);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t capacity, unsigned seed);
int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MAX_TEXT = 1 << 10, LONG_TEXT = 1 << 14 };

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
    for (i = 0; i < 8; i++) {
        const int known = ids[i] >= 0 && (size_t)ids[i] < vocab_size;
        const char *token = tfm_token_text(model, ids[i], &bytes);
        CHECK(known || (!token && !bytes && !tfm_is_end_token(model, ids[i]) && !tfm_is_special_token(model, ids[i])));
        if (token && bytes)
            CHECK(tfm_token_id(model, token, bytes) >= -1);
    }
    (void)tfm_token_id(model, text, size < 16 ? size : 16);
    (void)tfm_mask_token(model);
    check_status(
        tfm_tokenize_pair(model, text, half, text + half, size - half, flags, ids, types, capacity, &n_ids, &error),
        &error);
}

/* A text so long that what encoding needs isn't on the stack. */
static void try_long_text(const tfm_model *model, const char *text, size_t size, uint32_t *state) {
    static int32_t ids[LONG_TEXT];
    static char many[LONG_TEXT];
    const size_t least = 1 + draw(state, sizeof many);
    size_t n_ids, all = 0;
    tfm_error error;
    memset(&error, 0, sizeof error);
    while (size && all < least) {
        const size_t piece = TFM__MIN(size, least - all);
        memcpy(many + all, text, piece);
        all += piece;
    }
    check_status(tfm_tokenize(model, many, all, draw(state, 4), ids, LONG_TEXT, &n_ids, &error), &error);
}

/* What can be asked about a file and a model. */
static void try_questions(const tfm_model *model, const void *data, size_t size) {
    const tfm_description *d = tfm_model_description(model);
    tfm_error error;
    tfm_file *file = tfm_file_open_memory(data, size, "again", NULL, &error);
    size_t i, bytes;
    CHECK(file && tfm_file_bytes(file) <= size);
    for (i = 0; i < tfm_file_n_meta(file); i++)
        (void)checksum((const uint8_t *)tfm_file_meta(file, i)->key, tfm_file_meta(file, i)->key_size);
    for (i = 0; i < tfm_file_n_tensors(file); i++)
        (void)checksum((const uint8_t *)tfm_file_entry(file, i)->name, tfm_file_entry(file, i)->name_size);
    CHECK(!tfm_file_meta(file, tfm_file_n_meta(file)) && !tfm_file_entry(file, tfm_file_n_tensors(file)));
    check_status(tfm_file_verify(file, &error), &error);
    tfm_file_close(file);
    for (i = 0; i <= d->n_labels && i < 100; i++)
        CHECK(tfm_model_label(model, i, &bytes) || !bytes);
    (void)tfm_model_bytes_per_token(model);
    (void)tfm_model_parameters(model);
    CHECK(tfm_start_token(model) < (int32_t)TFM__MAX(d->vocab_size, 1));
    (void)tfm_model_stack(model);
    (void)tfm_model_encoder_final_norm(model);
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
    int32_t ids[4], types[4], mask[4];
    tfm_text text;
    tfm_error error;
    size_t i;
    memset(&error, 0, sizeof error);
    memset(&text, 0, sizeof text);
    draw_ids(ids, 4, d->vocab_size, state);
    text.tokens = ids;
    text.n_tokens = 1 + draw(state, 4);
    for (i = 0; i < 4; i++) {
        types[i] = (int32_t)draw(state, (uint32_t)TFM__MIN(d->n_token_types, 1000) + 2) - 1;
        mask[i] = (int32_t)draw(state, 3);
    }
    text.types = draw(state, 2) ? types : NULL;
    text.mask = draw(state, 2) ? mask : NULL;
    if (d->kind == TFM_ENCODER_DECODER)
        check_status(tfm_set_source(session, 0, &text, &error), &error);
    else {
        const size_t largest = TFM__MAX(TFM__MAX(d->d_model, d->vocab_size), d->n_labels);
        float *rows = (float *)malloc(2 * 4 * largest * sizeof *rows);
        tfm_text texts[2];
        CHECK(rows);
        texts[0] = texts[1] = text;
        texts[1].n_tokens = 1;
        check_status(tfm_embed(session, texts, 2, (tfm_pooling)draw(state, 4), 1, rows, &error), &error);
        check_status(tfm_encode(session, texts, 2, (tfm_output)draw(state, 4), rows, &error), &error);
        free(rows);
    }
}

/* A model without tokens runs on the caller's vectors: its encoder, and its decoder without cross-attention. */
static void try_layers(tfm_session *session) {
    const tfm_model *model = tfm_session_model(session);
    const size_t d_model = tfm_model_description(model)->d_model;
    tfm_engine *engine = tfm_session_engine(session);
    float *x = (float *)malloc(2 * d_model * sizeof *x);
    const tfm_norm *norm = tfm_model_final_norm(model);
    const tfm_block *block;
    tfm_span span;
    tfm_error error;
    size_t i;
    CHECK(x);
    for (i = 0; i < 2 * d_model; i++)
        x[i] = (float)(i % 5) - 2;
    memset(&span, 0, sizeof span);
    memset(&error, 0, sizeof error);
    span.n_rows = 2;
    for (i = 0; (block = tfm_model_encoder_block(model, i)) != NULL; i++)
        check_status(tfm_block_forward(engine, block, i, x, &span, 1, &error), &error);
    for (i = 0; (block = tfm_model_block(model, i)) != NULL; i++)
        check_status(tfm_block_forward(engine, block, i, x, &span, 1, &error), &error);
    if (norm)
        check_status(tfm_norm_forward(engine, norm, x, 2, x, &error), &error);
    free(x);
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
    options.kv_dtype = (tfm_dtype)draw(state, TFM_DTYPE_COUNT);
    options.engine.isa = TFM_ISA_BEST;
    options.engine.threads = 1;
    if (d->vocab_size > 1 << 16 || d->d_model > 1 << 14 || work(&d->encoder) + work(&d->decoder) > 1 << 14)
        return; /* right, but too slow here */
    session = tfm_session_create(model, &options, &error);
    CHECK(session || error.message[0]);
    if (!d->vocab_size) {
        if (session)
            try_layers(session);
        tfm_session_free(session);
        return;
    }
    if (session && d->kind != TFM_DECODER)
        try_encoder(session, state);
    if (session && d->kind != TFM_ENCODER)
        try_decoder(session, text, state);
    tfm_session_free(session);
}

/* ---- saved conversations and generation: models that stay loaded */

typedef enum target { A_FILE, A_CHAT, GENERATION } target;

static target chosen_target;
static tfm_model *decoder, *encoder_decoder;

static target target_of_environment(void) {
    const char *name = getenv("TFM_FUZZ");
    return !name ? A_FILE : !strcmp(name, "chat") ? A_CHAT : !strcmp(name, "generate") ? GENERATION : A_FILE;
}

static tfm_model *load_model(const char *directory, const char *name) {
    char path[1024];
    tfm_error error;
    tfm_model *model;
    snprintf(path, sizeof path, "%s/%s", directory, name);
    model = tfm_load(path, NULL, &error);
    if (!model)
        fprintf(stderr, "%s\n", error.message);
    CHECK(model);
    return model;
}

static void free_models(void) {
    tfm_free(decoder);
    tfm_free(encoder_decoder);
}

static tfm_session *make_session(const tfm_model *model, size_t context, size_t n_sequences, tfm_dtype kv_dtype) {
    tfm_session_options options;
    tfm_error error;
    tfm_session *session;
    memset(&options, 0, sizeof options);
    options.context = context;
    options.source = 16;
    options.n_sequences = n_sequences;
    options.kv_dtype = kv_dtype;
    options.engine.isa = TFM_ISA_BEST;
    options.engine.threads = 1;
    session = tfm_session_create(model, &options, &error);
    CHECK(session);
    return session;
}

static const char *summarise(void *user, const char *before, const tfm_turn *turns, size_t n_turns) {
    static const char *const summaries[] = {NULL, "", "short",
                                            "a long one that fills the context: abc abc abc abc abc abc"};
    CHECK(turns && n_turns);
    return before && !before[0] ? before : summaries[*(const uint32_t *)user];
}

/* A conversation under options that are drawn; *which is what its summary will be. */
static tfm_chat *make_chat(tfm_session *session, uint32_t *state, uint32_t *which) {
    static const char *const templates[] = {NULL, "plain", "chatml", "llama2", "llama3", "mistral", "gemma"};
    tfm_chat_options options;
    tfm_error error;
    tfm_chat *chat;
    memset(&options, 0, sizeof options);
    options.chat_template = templates[draw(state, 7)];
    options.system = draw(state, 2) ? NULL : draw(state, 2) ? "be a bee" : "";
    options.budget = draw(state, 2) ? 0 : 24 + draw(state, 40);
    options.summarise = draw(state, 2) ? summarise : NULL;
    options.summarise_user = which;
    *which = draw(state, 4);
    chat = tfm_chat_create(session, &options, &error);
    CHECK(chat);
    return chat;
}

static void *saved(const tfm_chat *chat, size_t *size) {
    tfm_error error;
    void *data;
    size_t again;
    CHECK(tfm_chat_save_memory(chat, NULL, 0, size, &error) == TFM_OK);
    data = malloc(*size);
    CHECK(data && tfm_chat_save_memory(chat, data, *size, &again, &error) == TFM_OK && again == *size);
    return data;
}

static int stop_at_once(void *user, const char *text, size_t size) {
    (void)user;
    (void)text;
    return size > 0;
}

static void say(tfm_chat *chat, const char *message, int stopped) {
    tfm_generate_options options;
    tfm_error error;
    const char *const stops[] = {"a b", "##"};
    const int32_t stop_tokens[] = {30};
    tfm_generate_stats stats;
    memset(&options, 0, sizeof options);
    options.max_tokens = 4;
    options.stats = &stats;
    options.stop_strings = stops;
    options.stop_tokens = stop_tokens;
    options.n_stop_strings = options.n_stop_tokens = (size_t)stopped;
    check_status(tfm_chat_say(chat, message, &options, stopped ? stop_at_once : NULL, NULL, &error), &error);
}

/* An input of the target chat. */
static void write_seed(const char *path, tfm_dtype kv_dtype) {
    tfm_session *session = make_session(decoder, 64, 1, kv_dtype);
    tfm_error error;
    tfm_chat *chat = tfm_chat_create(session, NULL, &error);
    FILE *file = fopen(path, "wb");
    size_t size;
    void *data;
    CHECK(chat && file && tfm_chat_add(chat, TFM_SYSTEM, "be a bee", &error) == TFM_OK);
    say(chat, "hi", 0);
    say(chat, "abc", 0);
    data = saved(chat, &size);
    CHECK(fwrite(data, 1, size, file) == size && !fclose(file));
    free(data);
    tfm_chat_free(chat);
    tfm_session_free(session);
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    const char *models = getenv("TFM_FUZZ_MODELS"), *seed = getenv("TFM_FUZZ_SEED");
    tfm_dtype kv_dtype;
    char path[1024];
    (void)argc;
    (void)argv;
    chosen_target = target_of_environment();
    if (chosen_target == A_FILE)
        return 0;
    CHECK(models && !atexit(free_models));
    decoder = load_model(models, "decoder");
    encoder_decoder = load_model(models, "encoder_decoder");
    if (seed)
        for (kv_dtype = TFM_F32; kv_dtype <= TFM_I8; kv_dtype = (tfm_dtype)(kv_dtype + 1)) {
            snprintf(path, sizeof path, "%s-%d", seed, (int)kv_dtype);
            write_seed(path, kv_dtype);
        }
    return 0;
}

/* The type of the keys and values that the file has, so that most files fit. */
static tfm_dtype kv_dtype_of(const uint8_t *data, size_t size) {
    const uint32_t dtype = size < 16 ? 0 : tfm__u32(data + 12);
    return tfm__is_kv_dtype((tfm_dtype)dtype) ? (tfm_dtype)dtype : TFM_F32;
}

/* A conversation that can be loaded can be read, saved again as the same bytes, and goes on until turns are dropped; one
 * that can't leaves the chat as it was. */
static void try_chat(const uint8_t *data, size_t size) {
    static const char *const messages[] = {"on", "", "  a b c d  ", "<|im_end|> [INST] </s>",
                                           "abc abc abc abc abc abc abc abc abc abc abc abc abc abc abc abc"};
    uint32_t state = checksum(data, size), which;
    tfm_session *session = make_session(decoder, 64, 1, kv_dtype_of(data, size));
    tfm_chat *chat = make_chat(session, &state, &which);
    uint8_t *copy = (uint8_t *)malloc(size + 1); /* exactly as large as it is, and not aligned */
    char text[256];
    int32_t ids[64];
    size_t n, i, dropped;
    tfm_error error;
    tfm_status status;
    CHECK(copy && tfm_chat_add(chat, TFM_USER, "before", &error) == TFM_OK);
    memcpy(copy, data, size);
    status = tfm_chat_load_memory(chat, copy, size, &error);
    free(copy);
    check_status(status, &error);
    if (status == TFM_OK) {
        void *again = saved(chat, &n);
        CHECK(n == size && !memcmp(again, data, size));
        free(again);
    } else
        CHECK(tfm_chat_n_turns(chat) == 1 && tfm_chat_turn(chat, 0).size == 6);
    for (i = 0; i < tfm_chat_n_turns(chat); i++)
        CHECK((unsigned)tfm_chat_turn(chat, i).role < TFM_ROLE_COUNT);
    check_status(tfm_chat_render(chat, 1, text, sizeof text, &n, &error), &error);
    check_status(tfm_chat_ids(chat, 1, ids, 64, &n, &error), &error);
    dropped = tfm_chat_n_dropped(chat); /* as the file says, which may be any number; the count goes on from there */
    for (i = 1 + draw(&state, 6); i; i--)
        if (draw(&state, 4))
            say(chat, messages[draw(&state, 5)], !draw(&state, 4));
        else
            check_status(tfm_chat_add(chat, (tfm_role)draw(&state, TFM_ROLE_COUNT), messages[draw(&state, 5)], &error),
                         &error);
    (void)tfm_chat_system(chat);
    (void)tfm_chat_summary(chat);
    CHECK(tfm_chat_template(chat)[0] && tfm_chat_n_dropped(chat) >= dropped &&
          tfm_chat_n_dropped(chat) - dropped <= size + 12);
    if (!draw(&state, 4))
        tfm_chat_reset(chat);
    free(saved(chat, &n));
    tfm_chat_free(chat);
    tfm_session_free(session);
}

/* Bytes of the input, one after another; zeros behind its end. */
typedef struct input {
    const uint8_t *data;
    size_t size;
} input;

static uint32_t take(input *in, uint32_t n) {
    const uint32_t byte = in->size ? *in->data : 0;
    if (in->size) {
        in->data++;
        in->size--;
    }
    return byte % n;
}

static float take_float(input *in) {
    static const float values[] = {0, 1, 0.5f, -1, 0.9f, 1e-6f, 1e30f, 2, 1.5f, 1e-40f, -0.0f};
    const uint32_t which = take(in, sizeof values / sizeof *values + 2);
    uint32_t bits;
    float any;
    if (which < sizeof values / sizeof *values)
        return values[which];
    bits = take(in, 256) | take(in, 256) << 8 | take(in, 256) << 16 | take(in, 256) << 24;
    memcpy(&any, &bits, sizeof any);
    return which & 1 ? any : (float)take(in, 256) / 128;
}

static size_t take_size(input *in) {
    const uint32_t which = take(in, 16);
    return which == 15 ? (size_t)-1 : which == 14 ? take(in, 256) : which < 8 ? 0 : which - 7;
}

typedef struct heard {
    int32_t tokens[128];
    size_t n_tokens, n_bytes, vocab_size, stop_after;
} heard;

static int hear_token(void *user, int32_t token) {
    heard *h = (heard *)user;
    CHECK(token >= 0 && (size_t)token < h->vocab_size);
    h->tokens[h->n_tokens++ % 128] = token;
    return h->n_tokens == h->stop_after;
}

static int hear_text(void *user, const char *text, size_t size) {
    heard *h = (heard *)user;
    CHECK(text && size);
    h->n_bytes += size;
    return 0;
}

static void take_ids(input *in, int32_t *ids, size_t n, size_t vocab_size) {
    size_t i;
    for (i = 0; i < n; i++) {
        const uint32_t byte = take(in, 256);
        ids[i] = byte == 255 ? -1 : byte == 254 ? (int32_t)vocab_size : (int32_t)(byte % vocab_size);
    }
}

static void try_batches(tfm_session *session, input in, const tfm_generate_options *options, const int32_t *ids) {
    const size_t n_prompts = take(&in, 4);
    tfm_beam_options beams;
    tfm_prompt prompts[3];
    tfm_result results[3 * 4];
    tfm_generate_options batch = *options;
    tfm_error error;
    size_t i;
    for (i = 0; i < 3; i++) {
        prompts[i].tokens = ids + i;
        prompts[i].n_tokens = take(&in, 6);
    }
    if (!take(&in, 2))
        batch.append = batch.shift = 0;
    batch.on_token = NULL;
    batch.stats = NULL;
    if (take(&in, 4))
        batch.n_stop_strings = 0;
    check_status(tfm_generate_batch(session, prompts, n_prompts, &batch, results, &error), &error);
    memset(&beams, 0, sizeof beams);
    beams.beams = take_size(&in);
    beams.n_best = take(&in, 5);
    beams.max_tokens = take_size(&in);
    beams.min_tokens = take_size(&in);
    beams.length_penalty = take_float(&in);
    beams.no_length_penalty = (int)take(&in, 2);
    beams.early_stopping = (tfm_early_stopping)take(&in, 4);
    beams.no_repeat_ngram = take_size(&in);
    beams.sequence = take(&in, 3);
    if (beams.n_best <= 4)
        check_status(tfm_beam_search(session, prompts, n_prompts, &beams, results, &error), &error);
}

static void generate_once(const tfm_model *model, input in, heard *h) {
    static const char *const strings[] = {"a", "", "ab", "\xC3\xA9", " ", "abcabcabcabc"};
    const size_t vocab_size = tfm_model_description(model)->vocab_size;
    static const tfm_dtype kv_dtypes[] = {TFM_F32, TFM_F16, TFM_I8, TFM_BF16};
    const size_t context = 1 + take(&in, 40);
    tfm_session *session = make_session(model, context, 4, kv_dtypes[take(&in, 4)]);
    tfm_generate_options options;
    tfm_generate_stats stats;
    tfm_logit_bias biases[3];
    const char *stops[3];
    int32_t ids[8], stop_ids[2];
    char prompt[16];
    tfm_error error;
    tfm_status status;
    size_t n_prompt, i;
    memset(h, 0, sizeof *h);
    memset(&options, 0, sizeof options);
    memset(&stats, 0, sizeof stats);
    h->vocab_size = vocab_size;
    h->stop_after = take_size(&in);
    options.max_tokens = take_size(&in);
    options.seed = take(&in, 256);
    options.sampling.temperature = take_float(&in);
    options.sampling.repeat_penalty = take_float(&in);
    options.sampling.top_p = take_float(&in);
    options.sampling.min_p = take_float(&in);
    options.sampling.top_k = take_size(&in);
    options.sampling.no_repeat_ngram = take_size(&in);
    options.ignore_end = (int)take(&in, 2);
    options.special = (int)take(&in, 2);
    options.append = (int)take(&in, 2);
    options.shift = (int)take(&in, 2);
    options.shift_keep = take_size(&in);
    options.sequence = take(&in, 8) == 7 ? take_size(&in) : 0;
    for (i = 0; i < 3; i++) {
        take_ids(&in, &biases[i].token, 1, vocab_size);
        biases[i].bias = take(&in, 4) ? take_float(&in) : -INFINITY;
        stops[i] = strings[take(&in, 6)];
    }
    options.sampling.logit_bias = biases;
    options.sampling.n_logit_bias = take(&in, 4);
    options.stop_strings = stops;
    options.n_stop_strings = take(&in, 4);
    take_ids(&in, stop_ids, 2, vocab_size);
    options.stop_tokens = stop_ids;
    options.n_stop_tokens = take(&in, 3);
    options.on_token = hear_token;
    options.on_token_user = h;
    options.stats = &stats;
    n_prompt = take(&in, 9);
    take_ids(&in, ids, 8, vocab_size);
    for (i = 0; i < sizeof prompt - 1; i++)
        prompt[i] = (char)take(&in, 256);
    prompt[i] = 0;
    if (options.shift && (!options.max_tokens || options.max_tokens > 64))
        options.max_tokens = 64; /* it need not end */
    if (tfm_model_description(model)->kind == TFM_ENCODER_DECODER) {
        tfm_text source;
        memset(&source, 0, sizeof source);
        source.tokens = ids;
        source.n_tokens = n_prompt;
        check_status(tfm_set_source(session, take(&in, 2), &source, &error), &error);
        n_prompt = take(&in, 3);
    }
    status = tfm_generate_ids(session, ids, n_prompt, &options, hear_text, h, &error);
    check_status(status, &error);
    CHECK(status != TFM_OK || (stats.n_generated == h->n_tokens && stats.stop != TFM_STOP_NONE));
    CHECK(!options.max_tokens || h->n_tokens <= options.max_tokens);
    h->stop_after = 0;
    if (tfm_has_tokenizer(model))
        check_status(tfm_generate(session, prompt, &options, hear_text, h, &error), &error);
    try_batches(session, in, &options, ids);
    tfm_session_free(session);
}

static void try_generation(const uint8_t *data, size_t size) {
    heard once, again;
    input in;
    const tfm_model *model;
    in.data = data;
    in.size = size;
    model = take(&in, 3) ? decoder : encoder_decoder;
    generate_once(model, in, &once);
    generate_once(model, in, &again);
    CHECK(!memcmp(&once, &again, sizeof once));
}

/* The file on disk: it is quantized, and what comes out can be loaded if and only if the file itself can, as that type (the
 * usual one of GGUF's blocks is int8, which not every number can become). */
static void try_quantize(const uint8_t *data, size_t size, uint32_t *state) {
    static const tfm_dtype dtypes[] = {TFM_F32, TFM_F16, TFM_BF16, TFM_I8};
    const char *directory = getenv("TMPDIR");
    char from[1024], to[1024];
    tfm_quantize_options options;
    tfm_status status;
    tfm_error error;
    FILE *file;
    snprintf(from, sizeof from, "%s/fuzz-%lu.tfm", directory ? directory : "/tmp", (unsigned long)getpid());
    snprintf(to, sizeof to, "%s/fuzz-%lu-out.tfm", directory ? directory : "/tmp", (unsigned long)getpid());
    file = fopen(from, "wb");
    CHECK(file && fwrite(data, 1, size, file) == size && !fclose(file));
    memset(&options, 0, sizeof options);
    memset(&error, 0, sizeof error);
    options.dtype = dtypes[draw(state, 4)];
    options.threads = 1;
    status = tfm_quantize(from, to, &options, &error);
    check_status(status, &error);
    if (status == TFM_OK) {
        tfm_load_options load;
        tfm_model *before, *after;
        memset(&load, 0, sizeof load);
        load.dtype = options.dtype;
        before = tfm_load(from, &load, &error);
        after = tfm_load(to, NULL, &error);
        CHECK(!before == !after);
        tfm_free(before);
        tfm_free(after);
        CHECK(!remove(to));
    } else {
        file = fopen(to, "rb");
        CHECK(!file);
    }
    CHECK(!remove(from));
}

static void try_file(const uint8_t *data, size_t size) {
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
        if (tfm_has_tokenizer(model) && !draw(&state, 8))
            try_long_text(model, text, text_size, &state);
        try_questions(model, aligned, file);
        try_model(model, text, &state);
    }
    if (file >= 64 && !draw(&state, 16))
        try_quantize(data, file, &state);
    tfm_free(model);
    free(aligned);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (chosen_target == A_CHAT)
        try_chat(data, size);
    else if (chosen_target == GENERATION)
        try_generation(data, size);
    else
        try_file(data, size);
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

/* What descriptions and tokenizers may say: an integer from -1 to `most`, one of the words, or, with -1, a float. */
typedef struct known_key {
    const char *key, *words[8];
    int most;
} known_key;

static const known_key known_keys[] = {
    {"tokenizer.pattern", {"gpt2", "llama3", "qwen2", "smollm"}, 0},
    {"tokenizer.rules", {"sentencepiece", "tokenizers"}, 0},
    {"tokenizer.kind", {"byte_bpe", "wordpiece", "unigram", "spm_bpe"}, 0},
    {"tokenizer.nfc", {NULL}, 1},
    {"tokenizer.fuse_unk", {NULL}, 1},
    {"tokenizer.add_prefix_space", {NULL}, 1},
    {"tokenizer.ignore_merges", {NULL}, 1},
    {"tokenizer.max_word_chars", {NULL}, 5},
    {"tokenizer.clean_text", {NULL}, 1},
    {"tokenizer.chinese_chars", {NULL}, 1},
    {"tokenizer.lowercase", {NULL}, 1},
    {"tokenizer.strip_accents", {NULL}, 1},
    {"tokenizer.cleanup", {NULL}, 1},
    {"tokenizer.byte_fallback", {NULL}, 1},
    {"tokenizer.add_dummy_prefix", {NULL}, 2},
    {"tokenizer.remove_extra_whitespaces", {NULL}, 1},
    {"tokenizer.escape_whitespaces", {NULL}, 1},
    {"tokenizer.strip", {NULL}, 3},
    {"tokenizer.squeeze_spaces", {NULL}, 2},
    {"tokenizer.prepend", {NULL}, 1},
    {"tokenizer.replace_spaces", {NULL}, 1},
    {"tokenizer.split_whitespace", {NULL}, 1},
    {"tokenizer.metaspace", {NULL}, 3},
    {"tokenizer.split_words", {NULL}, 1},
    {"tokenizer.decode_lead", {NULL}, 3},
    {"tokenizer.pair_type", {NULL}, 2},
    {"tokenizer.unk_id", {NULL}, 5},
    {"tokenizer.mask_id", {NULL}, 5},
    {"model.kind", {"decoder", "encoder", "encoder-decoder"}, 0},
    {"head", {"none", "tied", "own"}, 0},
    {"head_transform", {"none", "relu", "gelu"}, 0},
    {"pooling", {"none", "cls", "mean", "max"}, 0},
    {"pool_normalize", {NULL}, 1},
    {"pool_max_tokens", {NULL}, 3},
    {"pooler_activation", {"none", "tanh"}, 0},
    {"classifier", {"none", "sequence", "token"}, 0},
    {"classifier_problem", {"single", "multi", "regression"}, 0},
    {"classifier_activation", {"none", "tanh"}, 0},
    {"generation.start_id", {NULL}, 5},
    {"embedding_scale", {NULL}, -1},
    {"logit_scale", {NULL}, -1},
    {"logit_softcap", {NULL}, -1},
    {"d_embedding", {NULL}, 8},
    {"chat.template", {"plain", "chatml", "llama2"}, 0},
    {".norm", {"layer", "rms"}, 0}, /* of the encoder or the decoder */
    {".norm_place", {"pre", "post", "sandwich"}, 0},
    {".positions", {"none", "learned", "sinusoidal", "rotary", "relative"}, 0},
    {".ffn", {"plain", "gated"}, 0},
    {".activation", {"none", "relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "tanh"}, 0},
    {".n_kv_heads", {NULL}, 3},
    {".causal", {NULL}, 1},
    {".cross", {NULL}, 1},
    {".parallel", {NULL}, 1},
    {".embedding_norm", {NULL}, 1},
    {".final_norm", {NULL}, 1},
    {".position_offset", {NULL}, 3},
    {".rotary_interleaved", {NULL}, 1},
    {".sliding_window", {NULL}, 3},
    {".norm_weight_offset", {NULL}, -1},
    {".attention_softcap", {NULL}, -1},
    {".rotary_scale", {NULL}, -1},
    {".attention_scale", {NULL}, -1},
    {".norm_eps", {NULL}, -1},
};

static size_t entry_size(const uint8_t *entry) {
    return 16 + tfm__round_up(tfm__u32(entry), 8) + tfm__round_up((size_t)tfm__u64(entry + 8), 8);
}

/* One of the known keys gets a value that it may have, whether it was there or not. Needs metadata that can be read. */
static size_t put_known(uint8_t *data, size_t size, size_t capacity, uint32_t *state) {
    const known_key *known = known_keys + draw(state, sizeof known_keys / sizeof *known_keys);
    char key[64];
    const size_t key_size = (size_t)snprintf(key, sizeof key, "%s%s",
                                             *known->key != '.' ? ""
                                             : draw(state, 2)   ? "decoder"
                                                                : "encoder",
                                             known->key);
    size_t metadata, directory, at, end, old_data, new_data, value_size = 8, n_words = 0;
    static const uint64_t floats[] = {/* 0, 1, -1, 0.5, 30, 1e-5, 1e38, 1e-300 */
                                      0,
                                      0x3FF0000000000000,
                                      0xBFF0000000000000,
                                      0x3FE0000000000000,
                                      0x403E000000000000,
                                      0x3EE4F8B588E368F1,
                                      0x47D2CED32A16A1B1,
                                      0x01A56E1FC2F8F359};
    uint8_t entry[128], *rest;
    if (!parts(data, size, &metadata, &directory) || capacity < size || capacity - size < 256)
        return size;
    old_data = tfm__round_up(64 + metadata + directory, 64);
    if (old_data > size || !(rest = (uint8_t *)malloc(size)))
        return size;
    for (at = 64, end = 64 + metadata; at < end; at += entry_size(data + at)) {
        if (end - at < 24 || entry_size(data + at) > end - at || tfm__u64(data + at + 8) > size) {
            free(rest);
            return size;
        }
        if (tfm__u32(data + at) == key_size && !memcmp(data + at + 16, key, key_size)) {
            const size_t there = entry_size(data + at);
            memmove(data + at, data + at + there, end - at - there);
            end -= there;
            if (at == end)
                break;
        }
    }
    memset(entry, 0, sizeof entry);
    memcpy(entry + 16, key, key_size);
    while (n_words < 8 && known->words[n_words])
        n_words++;
    if (n_words) {
        const char *word = known->words[draw(state, (uint32_t)n_words)];
        value_size = strlen(word);
        memcpy(entry + 16 + tfm__round_up(key_size, 8), word, value_size);
    } else if (known->most < 0)
        put_u64(entry + 16 + tfm__round_up(key_size, 8), floats[draw(state, sizeof floats / sizeof *floats)]);
    else
        put_u64(entry + 16 + tfm__round_up(key_size, 8), (uint64_t)draw(state, (uint32_t)known->most + 2) - 1);
    put_u32(entry, (uint32_t)key_size);
    put_u32(entry + 4, n_words ? TFM_META_TEXT : known->most < 0 ? TFM_META_F64 : TFM_META_I64);
    put_u64(entry + 8, value_size);
    /* then the directory, whose offsets change, and the tensors */
    memcpy(rest, data + 64 + metadata, size - 64 - metadata);
    memcpy(data + end, entry, entry_size(entry));
    end += entry_size(entry);
    new_data = tfm__round_up(end + directory, 64);
    for (at = 0; directory - at >= 80 && tfm__u32(rest + at) <= directory - at - 72;) {
        put_u64(rest + at + 48, tfm__u64(rest + at + 48) + new_data - old_data);
        at += 72 + tfm__round_up(tfm__u32(rest + at), 8);
        if (at > directory)
            break;
    }
    memset(data + end, 0, new_data - end);
    memcpy(data + end, rest, directory);
    memcpy(data + new_data, rest + (old_data - 64 - metadata), size - old_data);
    free(rest);
    put_u64(data + 32, end - 64);
    put_u64(data + 16, size + new_data - old_data);
    return size + new_data - old_data;
}

/* A saved conversation says its size and has a checksum at its end. */
static void seal_chat(uint8_t *data, size_t size) {
    if (size < 68)
        return;
    put_u64(data + 16, size);
    put_u32(data + size - 4, checksum(data, size - 4));
}

static size_t mutate_chat(uint8_t *data, size_t size, size_t capacity, uint32_t *state) {
    if (size < 128 || draw(state, 3))
        size = LLVMFuzzerMutate(data, size, capacity);
    else /* numbers of the header, or of the first turn's head */
        change_number(data + (draw(state, 2) ? 8 : 64), draw(state, 2) ? 56 : 32, draw(state, 2) ? 8 : 4, state);
    if (draw(state, 16))
        seal_chat(data, size);
    return size;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t capacity, unsigned seed) {
    uint32_t state = seed;
    size_t file = file_size(data, size), n;
    if (chosen_target == A_CHAT)
        return mutate_chat(data, size, capacity, &state);
    if (size < 64 || chosen_target == GENERATION)
        return LLVMFuzzerMutate(data, size, capacity);
    if (!draw(&state, 3)) /* the text, from which the options are drawn too */
        return file +
               LLVMFuzzerMutate(data + file, size - file, capacity - file < MAX_TEXT ? capacity - file : MAX_TEXT);
    for (n = draw(&state, 3) + 1; n; n--)
        if (draw(&state, 8)) { /* with the text behind it: in a copy, and back */
            const size_t text = size - file;
            uint8_t *behind = (uint8_t *)malloc(text + 1);
            CHECK(behind);
            memcpy(behind, data + file, text);
            file = (draw(&state, 3) ? put_known : change_entry)(data, file, capacity - text, &state);
            memcpy(data + file, behind, text);
            free(behind);
            size = file + text;
        } else if (file > 64)
            (void)LLVMFuzzerMutate(data + 24, file - 24, file - 24);
    if (draw(&state, 16))
        seal(data, file);
    return size;
}

#ifdef FUZZ_AFL_MUTATOR
/* ---- AFL++ changes inputs by itself; as a library of its own (AFL_CUSTOM_MUTATOR_LIBRARY) this file adds the right
 * checksum before they are tried. */

typedef struct afl_state afl_state;
void *afl_custom_init(afl_state *afl, unsigned seed);
size_t afl_custom_post_process(void *data, unsigned char *buffer, size_t size, unsigned char **out);
void afl_custom_deinit(void *data);

typedef struct sealed {
    uint8_t bytes[1 << 20];
} sealed;

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t capacity) {
    (void)data;
    (void)capacity;
    return size;
}

void *afl_custom_init(afl_state *afl, unsigned seed) {
    (void)afl;
    (void)seed;
    chosen_target = target_of_environment();
    return malloc(sizeof(sealed));
}

size_t afl_custom_post_process(void *data, unsigned char *buffer, size_t size, unsigned char **out) {
    sealed *copy = (sealed *)data;
    *out = buffer;
    if (!copy || size > sizeof copy->bytes || size < 64)
        return size;
    memcpy(copy->bytes, buffer, size);
    if (chosen_target == A_CHAT)
        seal_chat(copy->bytes, size);
    else if (chosen_target == A_FILE)
        seal(copy->bytes, file_size(copy->bytes, size));
    *out = copy->bytes;
    return size;
}

void afl_custom_deinit(void *data) {
    free(data);
}
#endif
