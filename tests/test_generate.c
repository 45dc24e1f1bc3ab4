/* Sessions and generation. What is to come out is known beforehand: a script model's next token depends on the position
 * alone, by a table that the test writes; and where a model is random, the same tokens evaluated afresh must have the
 * same bits. */
#include "test.h"

#include <math.h>

#if defined(__unix__) || defined(__APPLE__)
#define HAVE_THREADS
#include <pthread.h>
#endif

/* ---- models */

#define VOCAB 320
#define POSITIONS 64

static float *zeroed(size_t n) {
    float *floats = (float *)test_allocate(n * sizeof *floats);
    memset(floats, 0, n * sizeof *floats);
    return floats;
}

/* Logits by position: table[POSITIONS][VOCAB]. The embedding of a token is zero and that of a position the unit vector;
 * the block adds nothing to it; so that the head's rows, which are the table's columns, are what comes out. */
static tfm_model *table_model(const float *table, const char *const *more, size_t n_more, unsigned char **bytes) {
    static const char *const silent[] = {"decoder.blocks.0.attention.out.weight", "decoder.blocks.0.ffn.down.weight"};
    static const char *const absent[] = {"decoder.blocks.0.attention.out.bias", "decoder.blocks.0.ffn.down.bias"};
    static const float zeros[VOCAB * POSITIONS];
    static float head[VOCAB * POSITIONS];
    const test_shape shape = {VOCAB, POSITIONS, 1, 1, 1, 4, 4, POSITIONS};
    float *unit = zeroed(POSITIONS * POSITIONS);
    test_tfm tfm;
    tfm_model *model;
    size_t i, k;
    memset(&tfm, 0, sizeof tfm);
    test_put_description(&tfm, &shape);
    test_put_text(&tfm, "head", "own");
    test_put_i64(&tfm, "decoder.final_norm", 0);
    test_put_weights(&tfm, &shape, 5);
    test_put_tokenizer(&tfm, more, n_more);
    for (i = 0; i < POSITIONS; i++) {
        unit[i * POSITIONS + i] = 1;
        for (k = 0; k < VOCAB; k++)
            head[k * POSITIONS + i] = table[i * VOCAB + k];
    }
    for (i = 0; i < 2; i++) {
        test_put_tensor(&tfm, silent[i], POSITIONS, 4, zeros);
        test_drop(&tfm, absent[i]);
    }
    test_put_tensor(&tfm, "token_embedding.weight", VOCAB, POSITIONS, zeros);
    test_put_tensor(&tfm, "decoder.position_embedding.weight", POSITIONS, POSITIONS, unit);
    test_put_tensor(&tfm, "head.weight", VOCAB, POSITIONS, head);
    model = test_load_tfm(&tfm, bytes);
    test_clear(&tfm);
    free(unit);
    return model;
}

/* The token after position i is script[i]; behind the script, the end. */
static tfm_model *script_model(const int32_t *script, size_t n, const char *const *more, size_t n_more,
                               unsigned char **bytes) {
    float *table = zeroed(POSITIONS * VOCAB);
    tfm_model *model;
    size_t i;
    for (i = 0; i < POSITIONS; i++)
        table[i * VOCAB + (size_t)(i < n ? script[i] : TEST_END)] = 1;
    model = table_model(table, more, n_more, bytes);
    free(table);
    return model;
}

static const test_shape random_shape = {VOCAB, 32, 2, 4, 2, 8, 48, 24};

static tfm_model *random_model(unsigned char **bytes) {
    test_tfm tfm;
    tfm_model *model;
    memset(&tfm, 0, sizeof tfm);
    test_put_description(&tfm, &random_shape);
    test_put_weights(&tfm, &random_shape, 77);
    test_put_tokenizer(&tfm, NULL, 0);
    model = test_load_tfm(&tfm, bytes);
    test_clear(&tfm);
    return model;
}

static tfm_dtype kv_dtype; /* of the sessions that are made */

static tfm_session *make_session(const tfm_model *model, size_t context, size_t n_sequences, size_t max_rows) {
    tfm_session_options options;
    tfm_error error = {TFM_OK, ""};
    tfm_session *session;
    memset(&options, 0, sizeof options);
    options.context = context;
    options.n_sequences = n_sequences;
    options.max_rows = max_rows;
    options.kv_dtype = kv_dtype;
    options.engine.threads = 1;
    session = tfm_session_create(model, &options, &error);
    CHECK_MSG(session != NULL, "%s", error.message);
    return session;
}

/* ---- UTF-8, by Unicode's table of well-formed sequences (3-7) */

/* The bytes at the start that are a character, or the longest beginning of one, or 1; *whole says which. */
static size_t utf8_unit(const unsigned char *text, size_t size, int *whole) {
    static const unsigned char rows[][5] = {
        /* first byte from, to; second from, to; bytes */
        {0x00, 0x7F, 0x00, 0x00, 1}, {0xC2, 0xDF, 0x80, 0xBF, 2}, {0xE0, 0xE0, 0xA0, 0xBF, 3},
        {0xE1, 0xEC, 0x80, 0xBF, 3}, {0xED, 0xED, 0x80, 0x9F, 3}, {0xEE, 0xEF, 0x80, 0xBF, 3},
        {0xF0, 0xF0, 0x90, 0xBF, 4}, {0xF1, 0xF3, 0x80, 0xBF, 4}, {0xF4, 0xF4, 0x80, 0x8F, 4},
    };
    size_t i, n;
    *whole = 0;
    for (i = 0; i < sizeof rows / sizeof *rows; i++)
        if (text[0] >= rows[i][0] && text[0] <= rows[i][1]) {
            for (n = 1; n < rows[i][4] && n < size; n++)
                if (text[n] < (n == 1 ? rows[i][2] : 0x80) || text[n] > (n == 1 ? rows[i][3] : 0xBF))
                    break;
            *whole = n == rows[i][4];
            return n;
        }
    return 1;
}

/* bytes.decode(errors="replace"). Returns the size; `to` has room for three times as many bytes. */
static size_t utf8_replace(const unsigned char *text, size_t size, char *to) {
    size_t n, written = 0;
    int whole;
    for (; size; text += n, size -= n) {
        n = utf8_unit(text, size, &whole);
        memcpy(to + written, whole ? (const char *)text : "\xEF\xBF\xBD", whole ? n : 3);
        written += whole ? n : 3;
    }
    return written;
}

/* ---- running and recording */

typedef struct result {
    char text[1024];
    size_t size, n_pieces, n_bad_pieces; /* bad: not whole characters, or empty */
    int32_t tokens[256];
    size_t n_tokens;
    size_t stop_at_piece, stop_at_token; /* the callback stops there; 0: never */
    tfm_generate_stats stats;
    tfm_status status;
    tfm_error error;
} result;

static int record_text(void *user, const char *text, size_t size) {
    result *r = (result *)user;
    size_t at = 0, n;
    int whole = 1;
    for (; at < size && whole; at += n)
        n = utf8_unit((const unsigned char *)text + at, size - at, &whole);
    r->n_bad_pieces += !size || !whole;
    if (r->size + size < sizeof r->text) {
        memcpy(r->text + r->size, text, size);
        r->size += size;
        r->text[r->size] = 0;
    }
    return ++r->n_pieces == r->stop_at_piece;
}

static int record_token(void *user, int32_t token) {
    result *r = (result *)user;
    if (r->n_tokens < sizeof r->tokens / sizeof *r->tokens)
        r->tokens[r->n_tokens] = token;
    return ++r->n_tokens == r->stop_at_token;
}

static tfm_generate_options prepare(const tfm_generate_options *options, result *r) {
    tfm_generate_options o = *options;
    size_t stop_at_piece = r->stop_at_piece, stop_at_token = r->stop_at_token;
    memset(r, 0, sizeof *r);
    r->stop_at_piece = stop_at_piece;
    r->stop_at_token = stop_at_token;
    o.stats = &r->stats;
    o.on_token = record_token;
    o.on_token_user = r;
    return o;
}

static void run_text(tfm_session *session, const char *prompt, const tfm_generate_options *options, result *r) {
    tfm_generate_options o = prepare(options, r);
    r->status = tfm_generate(session, prompt, &o, record_text, r, &r->error);
    CHECK_MSG(!r->n_bad_pieces && r->n_tokens == r->stats.n_generated && r->status == r->error.status,
              "%lu pieces are not whole characters, %lu tokens, status %d and %d", (unsigned long)r->n_bad_pieces,
              (unsigned long)r->n_tokens, (int)r->status, (int)r->error.status);
}

static void run_ids(tfm_session *session, const int32_t *prompt, size_t n, const tfm_generate_options *options,
                    result *r) {
    tfm_generate_options o = prepare(options, r);
    r->status = tfm_generate_ids(session, prompt, n, &o, record_text, r, &r->error);
    CHECK(!r->n_bad_pieces && r->n_tokens == r->stats.n_generated);
}

/* ---- scripts: one word, many ways to stop */

static void expect(const result *r, const char *step, const char *text, tfm_stop stop, size_t n_generated) {
    CHECK_MSG(r->status == (stop == TFM_STOP_CONTEXT ? TFM_ERROR_CONTEXT_FULL : TFM_OK) && !strcmp(r->text, text) &&
                  r->stats.stop == stop && r->stats.n_generated == n_generated,
              "%s: '%s' (expected '%s'), status %d, stop %d, %lu tokens: %s", step, r->text, text, (int)r->status,
              (int)r->stats.stop, (unsigned long)r->stats.n_generated, r->error.message);
}

/* Runs the script from the prompt "p", which takes position 0. */
static void run_script(const char *script, const tfm_generate_options *options, size_t context, result *r) {
    int32_t ids[POSITIONS];
    size_t n = strlen(script), i;
    unsigned char *bytes;
    tfm_model *model;
    tfm_session *session;
    for (i = 0; i < n; i++)
        ids[i] = script[i] == '\1' ? TEST_END : (unsigned char)script[i];
    model = script_model(ids, n, NULL, 0, &bytes);
    session = make_session(model, context, 1, 0);
    run_text(session, "p", options, r);
    tfm_session_free(session);
    tfm_free(model);
    free(bytes);
}

static void test_ends(void) {
    static const int32_t letters[2] = {'z', 'l'};
    tfm_generate_options options;
    result r;
    memset(&r, 0, sizeof r);
    memset(&options, 0, sizeof options);
    run_script("hello", &options, 0, &r);
    expect(&r, "until the end token", "hello", TFM_STOP_END_TOKEN, 6);
    CHECK(r.stats.n_prompt == 1 && r.stats.n_reused == 0);
    CHECK(r.tokens[0] == 'h' && r.tokens[4] == 'o' && r.tokens[5] == TEST_END);
    run_script("", &options, 0, &r);
    expect(&r, "the end token at once", "", TFM_STOP_END_TOKEN, 1);
    options.max_tokens = 3;
    run_script("hello", &options, 0, &r);
    expect(&r, "max_tokens", "hel", TFM_STOP_MAX_TOKENS, 3);
    options.max_tokens = 1;
    run_script("hello", &options, 0, &r);
    expect(&r, "one token", "h", TFM_STOP_MAX_TOKENS, 1);
    options.max_tokens = 6;
    options.ignore_end = 1;
    run_script("he\1l\1o", &options, 0, &r);
    expect(&r, "ignore_end", "helo", TFM_STOP_MAX_TOKENS, 6);
    options.stop_tokens = letters;
    options.n_stop_tokens = 2;
    run_script("he\1llo", &options, 0, &r);
    expect(&r, "a stop token", "he", TFM_STOP_END_TOKEN, 4);
}

static void test_callbacks_stop(void) {
    tfm_generate_options options;
    result r;
    memset(&options, 0, sizeof options);
    memset(&r, 0, sizeof r);
    r.stop_at_token = 3;
    run_script("hello", &options, 0, &r);
    expect(&r, "on_token stops", "he", TFM_STOP_CALLBACK, 3);
    memset(&r, 0, sizeof r);
    r.stop_at_piece = 2;
    run_script("hello", &options, 0, &r);
    expect(&r, "print stops", "he", TFM_STOP_CALLBACK, 2);
    memset(&r, 0, sizeof r);
    r.stop_at_piece = 2;
    run_script("a\xFF\xFF"
               "b",
               &options, 0, &r);
    expect(&r, "print stops at a replacement", "a\xEF\xBF\xBD", TFM_STOP_CALLBACK, 2);
}

static void check_stop_strings(const char *script, const char *const *stops, size_t n_stops, size_t max_tokens,
                               const char *text, tfm_stop stop, size_t n_generated) {
    tfm_generate_options options;
    result r;
    memset(&options, 0, sizeof options);
    memset(&r, 0, sizeof r);
    options.stop_strings = stops;
    options.n_stop_strings = n_stops;
    options.max_tokens = max_tokens;
    run_script(script, &options, 0, &r);
    expect(&r, script, text, stop, n_generated);
}

static void test_stop_strings(void) {
    static const char *const lo[] = {"lo"}, *const lx[] = {"lx", "", "ellx"}, *const aab[] = {"aab"},
                             *const two[] = {"lo", "ello"};
    static const char *const euro[] = {"\xE2\x82\xAC!"}, *const all[] = {"hello"}, *const abab[] = {"ababc"};
    static const char *const nested[] = {"bcde", "c"};
    check_stop_strings("hello", lo, 1, 0, "hel", TFM_STOP_STRING, 5);
    check_stop_strings("hello", lx, 3, 0, "hello", TFM_STOP_END_TOKEN, 6); /* what was held back comes after all */
    check_stop_strings("hello", two, 2, 0, "h", TFM_STOP_STRING, 5);
    check_stop_strings("hello", all, 1, 0, "", TFM_STOP_STRING, 5);
    check_stop_strings("aaab", aab, 1, 0, "a", TFM_STOP_STRING, 4); /* beginnings that overlap */
    check_stop_strings("xabababc.", abab, 1, 0, "xab", TFM_STOP_STRING, 8);
    check_stop_strings("abcd", nested, 2, 0, "ab", TFM_STOP_STRING, 3); /* the shorter one is there first */
    check_stop_strings("hel", lo, 1, 0, "hel", TFM_STOP_END_TOKEN, 4);
    check_stop_strings("hello", lo, 1, 4, "hell", TFM_STOP_MAX_TOKENS, 4); /* ends with half a stop string */
    check_stop_strings("hello", lo, 1, 5, "hel", TFM_STOP_STRING, 5);      /* the last token completes it */
    check_stop_strings("a\xE2\x82\xAC!b", euro, 1, 0, "a", TFM_STOP_STRING, 5);
    check_stop_strings("a\xE2\x82\xAC?b", euro, 1, 0, "a\xE2\x82\xAC?b", TFM_STOP_END_TOKEN, 7);
}

/* A stop string within a token, and over the border of two. */
static void test_stop_strings_and_tokens(void) {
    static const char *const more[] = {"wor", "ld, ", "\xE2\x82", "\xAC", "so"};
    static const int32_t script[] = {257, 258, 259, 260, 261};
    static const struct {
        const char *stop, *text;
        size_t n_generated;
    } cases[] = {{"rl", "wo", 2},
                 {"o", "w", 1},
                 {"world", "", 2},
                 {", ", "world", 2},
                 {"d, \xE2\x82\xAC"
                  "s",
                  "worl", 5},
                 {"\xE2\x82\xACso", "world, ", 5},
                 {"none", "world, \xE2\x82\xACso", 6}};
    unsigned char *bytes;
    tfm_model *model = script_model(script, 5, more, 5, &bytes);
    tfm_session *session = make_session(model, 0, 1, 0);
    tfm_generate_options options;
    result r;
    size_t i;
    memset(&options, 0, sizeof options);
    memset(&r, 0, sizeof r);
    options.n_stop_strings = 1;
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        options.stop_strings = &cases[i].stop;
        run_text(session, "p", &options, &r);
        expect(&r, cases[i].stop, cases[i].text,
               i + 1 < sizeof cases / sizeof *cases ? TFM_STOP_STRING : TFM_STOP_END_TOKEN, cases[i].n_generated);
    }
    { /* without a place to print to, stop strings stop all the same */
        static const char *const stop[] = {"rl"};
        tfm_generate_options silent = prepare(&options, &r);
        silent.stop_strings = stop;
        CHECK(tfm_generate(session, "p", &silent, NULL, NULL, &r.error) == TFM_OK);
        CHECK_MSG(r.stats.stop == TFM_STOP_STRING && r.n_tokens == 2, "print NULL: stop %d after %lu tokens",
                  (int)r.stats.stop, (unsigned long)r.n_tokens);
    }
    tfm_session_free(session);
    tfm_free(model);
    free(bytes);
}

/* ---- characters */

/* What the bytes of a script become, in pieces that are whole characters. */
static void check_bytes(const unsigned char *text, size_t n, const char *expected, size_t size) {
    tfm_generate_options options;
    int32_t ids[POSITIONS];
    unsigned char *bytes;
    tfm_model *model;
    tfm_session *session;
    result r;
    size_t i;
    for (i = 0; i < n; i++)
        ids[i] = text[i];
    memset(&options, 0, sizeof options);
    memset(&r, 0, sizeof r);
    model = script_model(ids, n, NULL, 0, &bytes);
    session = make_session(model, 0, 1, 0);
    for (options.max_tokens = 0; options.max_tokens <= n; options.max_tokens += n > 8 ? 17 : 1) { /* 0: all of it */
        char part[3 * POSITIONS];
        size_t part_size = options.max_tokens ? utf8_replace(text, options.max_tokens, part) : size;
        run_text(session, "p", &options, &r);
        CHECK_MSG(r.size == part_size && !memcmp(r.text, options.max_tokens ? part : expected, part_size),
                  "%lu bytes from %02X %02X %02X on become %lu bytes instead of %lu", (unsigned long)n, text[0],
                  n > 1 ? text[1] : 0u, n > 2 ? text[2] : 0u, (unsigned long)r.size, (unsigned long)part_size);
    }
    tfm_session_free(session);
    tfm_free(model);
    free(bytes);
}

static void test_characters(void) {
#define U "\xEF\xBF\xBD"
    static const struct {
        const char *text, *decoded; /* by Python's bytes.decode(errors="replace") */
    } cases[] = {
        {"h\xC3\xA9llo", "h\xC3\xA9llo"},
        {"\xE2\x82\xAC\xF0\x9F\x98\x80", "\xE2\x82\xAC\xF0\x9F\x98\x80"},
        {"\xFF\xFE", U U},
        {"\xC0\x80", U U},
        {"\xE2\x82", U},
        {"\xE2\x82"
         "A",
         U "A"},
        {"\xE2\x28\xA1", U "(" U},
        {"\xE0\x80\xAF", U U U},
        {"\xED\xA0\x80", U U U},
        {"\xF0\x9F\x98", U},
        {"\xF0\x9F\x98\xC3\xA9", U "\xC3\xA9"},
        {"\xF0\x80\x80\x80", U U U U},
        {"\xF4\x90\x80\x80", U U U U},
        {"\xF5"
         "a",
         U "a"},
        {"\x80"
         "a\xBF",
         U "a" U},
        {"\xEF\xBF\xBD", U},
    };
    static const unsigned char alphabet[] = {'A',  ' ',  0x80, 0x82, 0x8F, 0x90, 0x9F, 0xA0, 0xAC,
                                             0xBF, 0xC0, 0xC2, 0xC3, 0xDF, 0xE0, 0xE2, 0xED, 0xEF,
                                             0xF0, 0xF1, 0xF4, 0xF5, 0xFF, 0xF0, 0xE2, 0x80};
    unsigned char text[POSITIONS];
    float random[POSITIONS];
    char decoded[3 * POSITIONS];
    size_t i, k, size;
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        size = utf8_replace((const unsigned char *)cases[i].text, strlen(cases[i].text), decoded);
        CHECK(size == strlen(cases[i].decoded) &&
              !memcmp(decoded, cases[i].decoded, size)); /* of this file's own decoder */
        check_bytes((const unsigned char *)cases[i].text, strlen(cases[i].text), decoded, size);
    }
    for (i = 0; i < 60; i++) {
        test_fill(random, POSITIONS, i);
        for (k = 0; k < POSITIONS - 2; k++)
            text[k] = alphabet[(size_t)((random[k] + 1) * 0.4999f * (float)sizeof alphabet)];
        check_bytes(text, POSITIONS - 2, decoded, utf8_replace(text, POSITIONS - 2, decoded));
    }
}

/* ---- the context */

static void test_context_full(void) {
    static const char *const abc[] = {"abc"};
    tfm_generate_options options;
    result r;
    memset(&options, 0, sizeof options);
    memset(&r, 0, sizeof r);
    run_script("hello, world", &options, 4, &r); /* positions 0 to 3, so four choices */
    expect(&r, "context of 4", "hell", TFM_STOP_CONTEXT, 4);
    CHECK(strstr(r.error.message, "context") != NULL);
    run_script("hello, world", &options, 1, &r);
    expect(&r, "context of 1", "h", TFM_STOP_CONTEXT, 1);
    options.max_tokens = 4; /* the fourth needs no room */
    run_script("hello, world", &options, 4, &r);
    expect(&r, "context of 4, four tokens", "hell", TFM_STOP_MAX_TOKENS, 4);
    options.max_tokens = 0;
    options.stop_strings = abc;
    options.n_stop_strings = 1;
    run_script("wxabcd", &options, 4, &r);
    expect(&r, "context full, text held back", "wxab", TFM_STOP_CONTEXT, 4);
    run_script("wx\xE2\x82\xAC", &options, 4, &r);
    expect(&r, "context full within a character", "wx" U, TFM_STOP_CONTEXT, 4);
    run_script("wxa", &options, 4, &r);
    expect(&r, "the end just fits", "wxa", TFM_STOP_END_TOKEN, 4);
}

/* ---- prompts and options that are wrong */

static void check_unprinted(const result *r, tfm_status status, const char *what) {
    CHECK_MSG(r->status == status && !r->size && !r->n_tokens && strstr(r->error.message, what),
              "status %d instead of %d, %lu bytes printed: %s", (int)r->status, (int)status, (unsigned long)r->size,
              r->error.message);
}

static void test_prompts(void) {
    static const int32_t bad[][3] = {{-1, 5, 5}, {5, VOCAB, 5}, {5, 5, INT32_MIN}, {INT32_MAX, 5, 5}};
    char text[40];
    unsigned char *bytes;
    tfm_model *model = random_model(&bytes);
    tfm_session *session = make_session(model, 0, 1, 0);
    tfm_generate_options options;
    int32_t ids[30] = {0};
    result r;
    size_t i;
    memset(&options, 0, sizeof options);
    memset(&r, 0, sizeof r);
    options.max_tokens = 1;
    run_text(session, "", &options, &r);
    check_unprinted(&r, TFM_ERROR_ARGUMENT, "empty");
    run_ids(session, ids, 0, &options, &r);
    check_unprinted(&r, TFM_ERROR_ARGUMENT, "empty");
    run_ids(session, NULL, 0, &options, &r);
    check_unprinted(&r, TFM_ERROR_ARGUMENT, "empty");
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        run_ids(session, bad[i], 3, &options, &r);
        check_unprinted(&r, TFM_ERROR_ARGUMENT, "out of range");
    }
    memset(text, 'a', sizeof text);
    text[random_shape.n_positions + 1] = 0;
    run_text(session, text, &options, &r);
    check_unprinted(&r, TFM_ERROR_CONTEXT_FULL, "25 tokens");
    CHECK(r.stats.stop == TFM_STOP_NONE);
    run_ids(session, ids, random_shape.n_positions + 1, &options, &r);
    check_unprinted(&r, TFM_ERROR_CONTEXT_FULL, "25 tokens");
    text[random_shape.n_positions] = 0;
    run_text(session, text, &options, &r);
    CHECK(r.status == TFM_OK && r.n_tokens == 1 && r.stats.n_prompt == random_shape.n_positions);
    options.append = 1; /* nothing fits behind that */
    run_ids(session, ids, 1, &options, &r);
    check_unprinted(&r, TFM_ERROR_CONTEXT_FULL, "1 token");
    options.append = 0;
    run_text(session, "a<|end|>", &options, &r); /* plain text unless asked for */
    CHECK(r.stats.n_prompt == 8);
    options.special = 1;
    run_text(session, "a<|end|>", &options, &r);
    CHECK(r.stats.n_prompt == 2);
    tfm_session_free(session);
    tfm_free(model);
    free(bytes);
}

/* Spoils one option, and puts it right again. */
#define BAD_OPTION(spoil, restore, what)                                                                               \
    do {                                                                                                               \
        spoil;                                                                                                         \
        run_text(session, "abc", &options, &r);                                                                        \
        check_unprinted(&r, TFM_ERROR_ARGUMENT, what);                                                                 \
        restore;                                                                                                       \
    } while (0)

static void test_bad_options(void) {
    static char long_stop[1026];
    const char *stop = long_stop;
    const tfm_logit_bias bias = {VOCAB, 1};
    unsigned char *bytes;
    tfm_model *model = random_model(&bytes);
    tfm_session *session = make_session(model, 0, 2, 0);
    tfm_generate_options options;
    result r;
    memset(&options, 0, sizeof options);
    memset(&r, 0, sizeof r);
    memset(long_stop, 'x', sizeof long_stop - 1);
    options.max_tokens = 2;
    BAD_OPTION(options.sequence = 2, options.sequence = 0, "sequence 2");
    BAD_OPTION(options.sampling.temperature = -1, options.sampling.temperature = 0, "temperature");
    BAD_OPTION(options.sampling.top_p = 1.5f, options.sampling.top_p = 0, "top_p");
    BAD_OPTION(options.sampling.min_p = NAN, options.sampling.min_p = 0, "min_p");
    BAD_OPTION(options.sampling.repeat_penalty = -2, options.sampling.repeat_penalty = 0, "penalty");
    BAD_OPTION((options.sampling.logit_bias = &bias, options.sampling.n_logit_bias = 1),
               options.sampling.n_logit_bias = 0, "bias");
    BAD_OPTION((options.stop_strings = &stop, options.n_stop_strings = 1), options.n_stop_strings = 0, "stop string 0");
    options.shift = 1;
    BAD_OPTION(options.shift_keep = random_shape.n_positions - 1, options.shift_keep = 0, "shift_keep");
    BAD_OPTION(options.shift_keep = SIZE_MAX, options.shift_keep = 0, "shift_keep");
    BAD_OPTION(options.shift_keep = SIZE_MAX - 1, options.shift_keep = 0, "shift_keep");
    long_stop[1024] = 0; /* the longest that there may be */
    options.stop_strings = &stop;
    options.n_stop_strings = 1;
    run_text(session, "abc", &options, &r);
    CHECK(r.status == TFM_OK && r.n_tokens == 2);
    tfm_session_free(session);
    tfm_free(model);
    free(bytes);
}

/* ---- logit bias, repeat penalty */

/* Letters whose logits are the same at every position. */
static void check_choice(const float *letters, float others, const tfm_generate_options *options, const char *text) {
    float *table = zeroed(POSITIONS * VOCAB);
    unsigned char *bytes;
    tfm_model *model;
    tfm_session *session;
    result r;
    size_t i;
    for (i = 0; i < POSITIONS * VOCAB; i++)
        table[i] = i % VOCAB >= 'A' && i % VOCAB <= 'C' ? letters[i % VOCAB - 'A'] : others;
    model = table_model(table, NULL, 0, &bytes);
    session = make_session(model, 0, 1, 0);
    memset(&r, 0, sizeof r);
    run_text(session, "p", options, &r);
    expect(&r, text, text, TFM_STOP_MAX_TOKENS, strlen(text));
    tfm_session_free(session);
    tfm_free(model);
    free(bytes);
    free(table);
}

static void test_bias_and_penalty(void) {
    static const float letters[3] = {3, 2, 1}, negative[3] = {-1, -1.5f, -8};
    tfm_logit_bias bias[2] = {{'A', 0}, {'C', 0}};
    tfm_generate_options options;
    memset(&options, 0, sizeof options);
    options.max_tokens = 4;
    check_choice(letters, 0, &options, "AAAA");
    bias[0].bias = -INFINITY;
    options.sampling.logit_bias = bias;
    options.sampling.n_logit_bias = 2;
    check_choice(letters, 0, &options, "BBBB");
    bias[1].bias = 1.5f; /* 2.5 is more than B's 2 */
    check_choice(letters, 0, &options, "CCCC");
    options.sampling.n_logit_bias = 0;
    options.sampling.repeat_penalty = 2; /* A, then 1.5 against 2, then 1.5 against 1 and 1 */
    check_choice(letters, 0, &options, "ABAA");
    options.sampling.repeat_penalty = 4; /* A; 0.75, 2, 1; 0.75, 0.5, 1; 0.75, 0.5, 0.25 */
    check_choice(letters, 0, &options, "ABCA");
    options.sampling.repeat_penalty = 2; /* -1; -2 against -1.5; -2 against -3 */
    check_choice(negative, -9, &options, "ABAA");
}

/* ---- evaluating: the same bits, however the tokens are put in */

#define MANY_LOGITS (24 * VOCAB)

static const int32_t numbers[24] = {7,   300, 0,  65, 65, 319, 12,  99, 101, 32, 7, 7,
                                    200, 256, 31, 1,  2,  3,   250, 44, 90,  17, 5, 64};

static tfm_status eval(tfm_session *session, size_t sequence, const int32_t *tokens, size_t n, size_t n_outputs,
                       float *outputs, tfm_error *error) {
    tfm_chunk chunk;
    chunk.sequence = sequence;
    chunk.tokens = tokens;
    chunk.n_tokens = n;
    chunk.n_outputs = n_outputs;
    return tfm_eval(session, &chunk, 1, TFM_LOGITS, outputs, error);
}

/* The logits of every token of a text, in a session of their own. */
static void reference(const tfm_model *model, const int32_t *tokens, size_t n, float *logits) {
    tfm_session *session = make_session(model, 0, 1, 0);
    CHECK(eval(session, 0, tokens, n, n, logits, NULL) == TFM_OK);
    tfm_session_free(session);
}

static void test_pieces(const tfm_model *model) {
    static float expected[MANY_LOGITS], found[MANY_LOGITS];
    size_t max_rows, step, at;
    reference(model, numbers, 24, expected);
    for (max_rows = 1; max_rows <= 24; max_rows = max_rows * 2 + 1)
        for (step = 1; step <= 24; step += 5) {
            tfm_session *session = make_session(model, 0, 1, max_rows);
            for (at = 0; at < 24; at += step)
                CHECK(eval(session, 0, numbers + at, step < 24 - at ? step : 24 - at, step < 24 - at ? step : 24 - at,
                           found + at * VOCAB, NULL) == TFM_OK);
            CHECK_MSG(!memcmp(expected, found, sizeof found), "max_rows %lu, %lu tokens at a time: other bits",
                      (unsigned long)max_rows, (unsigned long)step);
            tfm_session_free(session);
        }
}

/* Three sequences of different lengths in one call, of which a few results are wanted. */
static void test_sequences(const tfm_model *model) {
    static float expected[3][MANY_LOGITS], found[MANY_LOGITS], hidden[32];
    static const size_t lengths[3] = {7, 1, 12}, wanted[3] = {3, 1, 0};
    size_t max_rows, i, n;
    for (i = 0; i < 3; i++)
        reference(model, numbers + i, lengths[i] + 5, expected[i]);
    for (max_rows = 0; max_rows <= 12; max_rows++) {
        tfm_session *session = make_session(model, 0, 3, max_rows);
        tfm_chunk chunks[3];
        for (i = 0; i < 3; i++) {
            chunks[i].sequence = i;
            chunks[i].tokens = numbers + i;
            chunks[i].n_tokens = lengths[i];
            chunks[i].n_outputs = wanted[i];
        }
        CHECK(tfm_eval(session, chunks, 3, TFM_LOGITS, found, NULL) == TFM_OK);
        CHECK(!memcmp(found, expected[0] + 4 * VOCAB, 3 * VOCAB * sizeof *found)); /* the last 3 of 7 */
        CHECK(!memcmp(found + 3 * VOCAB, expected[1], VOCAB * sizeof *found));
        for (i = 0; i < 3; i++) {
            const int32_t *tokens = tfm_sequence_tokens(session, i, &n);
            CHECK(n == lengths[i] && !memcmp(tokens, numbers + i, n * sizeof *tokens));
            chunks[i].sequence = 2 - i; /* and on, in another order */
            chunks[i].tokens = numbers + 2 - i + lengths[2 - i];
            chunks[i].n_tokens = 5;
            chunks[i].n_outputs = 1;
        }
        CHECK(tfm_eval(session, chunks, 3, TFM_LOGITS, found, NULL) == TFM_OK);
        for (i = 0; i < 3; i++)
            CHECK_MSG(!memcmp(found + i * VOCAB, expected[2 - i] + (lengths[2 - i] + 4) * VOCAB, VOCAB * sizeof *found),
                      "max_rows %lu: sequence %lu has other bits than alone", (unsigned long)max_rows,
                      (unsigned long)(2 - i));
        CHECK(tfm_eval(session, NULL, 0, TFM_LOGITS, NULL, NULL) == TFM_OK);
        CHECK(tfm_truncate(session, 1, 2, NULL) == TFM_OK);
        CHECK(eval(session, 1, numbers + 3, 1, 1, found, NULL) == TFM_OK); /* again the third of its tokens */
        CHECK(!memcmp(found, expected[1] + 2 * VOCAB, VOCAB * sizeof *found));
        chunks[0].n_tokens = 1;
        CHECK(tfm_eval(session, chunks, 1, TFM_HIDDEN, hidden, NULL) == TFM_OK);
        CHECK(!tfm_sequence_tokens(session, 3, &n) && n == 0);
        tfm_session_free(session);
    }
}

/* TFM_HIDDEN is what the head multiplies: with the tied head, logits are its products with the embeddings. */
static void test_hidden(const tfm_model *model, const unsigned char *bytes, size_t size) {
    float hidden[3 * 32], logits[3 * VOCAB];
    tfm_file *file = tfm_file_open_memory(bytes, size, NULL, NULL, NULL);
    const tfm_entry *entry = file ? tfm_file_find(file, "token_embedding.weight") : NULL;
    tfm_session *session = make_session(model, 0, 1, 0);
    tfm_chunk chunk;
    size_t t, v, k;
    chunk.sequence = 0;
    chunk.tokens = numbers;
    chunk.n_tokens = chunk.n_outputs = 3;
    CHECK(tfm_eval(session, &chunk, 1, TFM_HIDDEN, hidden, NULL) == TFM_OK);
    CHECK(tfm_truncate(session, 0, 0, NULL) == TFM_OK &&
          tfm_eval(session, &chunk, 1, TFM_LOGITS, logits, NULL) == TFM_OK);
    if (CHECK(entry != NULL))
        for (t = 0; t < 3; t++)
            for (v = 0; v < VOCAB; v += 53) {
                double sum = 0;
                for (k = 0; k < 32; k++)
                    sum += (double)hidden[t * 32 + k] * (double)((const float *)entry->tensor.data)[v * 32 + k];
                CHECK_MSG(fabs(sum - (double)logits[t * VOCAB + v]) < 1e-4, "%g %g", sum,
                          (double)logits[t * VOCAB + v]);
            }
    tfm_session_free(session);
    tfm_file_close(file);
}

/* A wrong call of tfm_eval in a session with two sequences of 4 tokens, after which both must go on as if nothing had
 * been. */
static void check_eval_error(const tfm_model *model, const tfm_chunk *chunks, size_t n_chunks, tfm_output what,
                             int no_outputs, tfm_status status, const char *message) {
    static float outputs[MANY_LOGITS], expected[MANY_LOGITS];
    tfm_session *session = make_session(model, 10, 2, 0);
    tfm_error error = {TFM_OK, ""};
    size_t sequence, n;
    reference(model, numbers, 5, expected);
    for (sequence = 0; sequence < 2; sequence++)
        CHECK(eval(session, sequence, numbers, 4, 0, NULL, NULL) == TFM_OK);
    CHECK_MSG(tfm_eval(session, chunks, n_chunks, what, no_outputs ? NULL : outputs, &error) == status &&
                  error.status == status && strstr(error.message, message),
              "tfm_eval: status %d instead of %d: '%s', not '%s'", (int)error.status, (int)status, error.message,
              message);
    CHECK(tfm_eval(session, chunks, n_chunks, what, no_outputs ? NULL : outputs, NULL) == status);
    for (sequence = 0; sequence < 2; sequence++) {
        const int32_t *tokens = tfm_sequence_tokens(session, sequence, &n);
        CHECK(n == 4 && !memcmp(tokens, numbers, 4 * sizeof *tokens));
        CHECK(eval(session, sequence, numbers + 4, 1, 1, outputs, NULL) == TFM_OK &&
              !memcmp(outputs, expected + 4 * VOCAB, VOCAB * sizeof *outputs));
    }
    tfm_session_free(session);
}

static void test_eval_errors(const tfm_model *model) {
    static const int32_t negative[2] = {5, -1}, large[2] = {VOCAB, 5}, huge[2] = {5, INT32_MAX};
    const tfm_chunk good = {0, numbers, 2, 1};
    const tfm_chunk bad[] = {{2, numbers, 2, 1}, {SIZE_MAX, numbers, 2, 1}, {0, numbers, 2, 1}, {1, numbers, 0, 0},
                             {1, numbers, 2, 3}, {1, negative, 2, 1},       {1, large, 2, 1},   {1, huge, 2, 1},
                             {1, numbers, 7, 1}, {1, numbers, SIZE_MAX, 1}, {1, numbers, 0, 1}};
    static const char *const messages[] = {"sequence 2", "sequence",    "another chunk", "0 tokens",
                                           "3 outputs",  "token id -1", "token id 320",  "out of range",
                                           "context",    "context",     "0 tokens"};
    tfm_chunk chunks[2];
    size_t i;
    for (i = 0; i < sizeof bad / sizeof *bad; i++) { /* alone, and behind one that is good */
        tfm_status status = i == 8 || i == 9 ? TFM_ERROR_CONTEXT_FULL : TFM_ERROR_ARGUMENT;
        chunks[0] = good;
        chunks[1] = bad[i];
        check_eval_error(model, chunks, 2, TFM_LOGITS, 0, status, messages[i]);
        if (i != 2) /* that is only wrong behind the good one, which has the same sequence */
            check_eval_error(model, bad + i, 1, TFM_LOGITS, 0, status, messages[i]);
    }
    check_eval_error(model, &good, 1, TFM_LOGITS, 1, TFM_ERROR_ARGUMENT, "outputs");
    check_eval_error(model, &good, 1, TFM_HIDDEN, 1, TFM_ERROR_ARGUMENT, "outputs");
    check_eval_error(model, &good, 1, (tfm_output)77, 0, TFM_ERROR_ARGUMENT, "77");
}

static void test_no_head(void) {
    test_tfm tfm;
    unsigned char *bytes;
    tfm_model *model;
    float outputs[VOCAB];
    tfm_error error = {TFM_OK, ""};
    memset(&tfm, 0, sizeof tfm);
    test_put_description(&tfm, &random_shape);
    test_put_text(&tfm, "head", "none");
    test_put_weights(&tfm, &random_shape, 78);
    model = test_load_tfm(&tfm, &bytes);
    if (model) {
        tfm_session *session = make_session(model, 0, 1, 0);
        tfm_chunk chunk = {0, numbers, 3, 1};
        CHECK(eval(session, 0, numbers, 3, 1, outputs, &error) == TFM_ERROR_UNSUPPORTED &&
              strstr(error.message, "head"));
        CHECK(tfm_eval(session, &chunk, 1, TFM_HIDDEN, outputs, NULL) == TFM_OK);
        CHECK(tfm_generate_ids(session, numbers, 3, NULL, NULL, NULL, &error) == TFM_ERROR_UNSUPPORTED);
        tfm_session_free(session);
    }
    tfm_free(model);
    free(bytes);
    test_clear(&tfm);
}

static void test_session_errors(const tfm_model *model) {
    tfm_session_options options;
    tfm_error error = {TFM_OK, ""};
    tfm_session *session;
    memset(&options, 0, sizeof options);
    options.context = random_shape.n_positions + 1;
    CHECK(!tfm_session_create(model, &options, &error) && error.status == TFM_ERROR_ARGUMENT &&
          strstr(error.message, "25"));
    options.context = 0;
    options.n_sequences = SIZE_MAX;
    CHECK(!tfm_session_create(model, &options, &error) && error.status == TFM_ERROR_ARGUMENT);
    options.n_sequences = 1;
    options.kv_dtype = TFM_DTYPE_COUNT;
    CHECK(!tfm_session_create(model, &options, &error) && error.status == TFM_ERROR_ARGUMENT &&
          strstr(error.message, "the KV cache can be f32, f16, bf16 or int8"));
    options.kv_dtype = TFM_NO_DTYPE;
    options.n_sequences = 0;
    options.engine.isa = (tfm_isa)99;
    memset(&error, 0, sizeof error);
    CHECK(!tfm_session_create(model, &options, &error) && error.status == TFM_ERROR_UNSUPPORTED && error.message[0]);
    CHECK(!tfm_session_create(model, &options, NULL));
    session = make_session(model, 9, 2, 0);
    CHECK(tfm_session_model(session) == model && tfm_session_context(session) == 9 && tfm_session_engine(session));
    CHECK(eval(session, 1, numbers, 5, 0, NULL, NULL) == TFM_OK);
    CHECK(tfm_truncate(session, 2, 0, &error) == TFM_ERROR_ARGUMENT && strstr(error.message, "sequence 2"));
    CHECK(tfm_truncate(session, 1, 6, &error) == TFM_ERROR_ARGUMENT && strstr(error.message, "5 tokens"));
    CHECK(tfm_truncate(session, 0, 0, NULL) == TFM_OK && tfm_truncate(session, 1, 5, NULL) == TFM_OK);
    CHECK(tfm_shift(session, 2, 0, &error) == TFM_ERROR_ARGUMENT && strstr(error.message, "sequence 2"));
    CHECK(tfm_shift(session, 1, 5, &error) == TFM_ERROR_ARGUMENT && strstr(error.message, "no room"));
    CHECK(tfm_shift(session, 1, SIZE_MAX, NULL) == TFM_ERROR_ARGUMENT);
    CHECK(tfm_shift(session, 0, 0, NULL) == TFM_ERROR_ARGUMENT); /* an empty sequence */
    tfm_session_free(session);
}

/* ---- shifting */

/* What is left of n tokens when room is made: the first n_keep and the most recent half of the others. */
static size_t shifted(int32_t *tokens, size_t n, size_t n_keep) {
    size_t recent = (n - n_keep) / 2;
    memmove(tokens + n_keep, tokens + n - recent, recent * sizeof *tokens);
    return n_keep + recent;
}

static void check_shift(const tfm_model *model, size_t n, size_t n_keep) {
    static float expected[MANY_LOGITS], found[VOCAB];
    tfm_session *session = make_session(model, 0, 2, n_keep % 2 ? 3 : 0);
    size_t size, n_now;
    int32_t tokens[25];
    const int32_t *now;
    memcpy(tokens, numbers, n * sizeof *tokens);
    CHECK(eval(session, 1, tokens, n, 0, NULL, NULL) == TFM_OK && tfm_shift(session, 1, n_keep, NULL) == TFM_OK);
    size = shifted(tokens, n, n_keep);
    now = tfm_sequence_tokens(session, 1, &n_now);
    CHECK(n_now == size && !memcmp(now, tokens, size * sizeof *tokens));
    tokens[size] = 123;
    reference(model, tokens, size + 1, expected);
    CHECK(eval(session, 1, tokens + size, 1, 1, found, NULL) == TFM_OK);
    CHECK_MSG(!memcmp(found, expected + size * VOCAB, sizeof found), "shifting %lu tokens, keeping %lu: other bits",
              (unsigned long)n, (unsigned long)n_keep);
    tfm_session_free(session);
}

static void test_shift(const tfm_model *model) {
    size_t n_keep, n, step;
    for (n = 1; n <= 24; n++) {
        step = n / 9 + 1;
        for (n_keep = 0; n_keep < n; n_keep += step)
            check_shift(model, n, n_keep);
    }
}

static int32_t likeliest(const float *logits) {
    int32_t best = 0, i;
    for (i = 1; i < VOCAB; i++)
        best = logits[i] > logits[best] ? i : best;
    return best;
}

/* Generation that shifts, against the same done by hand: every token chosen from a fresh evaluation. */
static void test_shifting_generation(const tfm_model *model, size_t context, size_t n_keep) {
    static float logits[MANY_LOGITS];
    tfm_session *session = make_session(model, context, 1, 0);
    tfm_generate_options options;
    int32_t tokens[25];
    size_t n = 3, i, wrong = 0;
    result r;
    memset(&options, 0, sizeof options);
    memset(&r, 0, sizeof r);
    options.max_tokens = 60;
    options.ignore_end = 1;
    options.shift = 1;
    options.shift_keep = n_keep;
    run_ids(session, numbers, n, &options, &r);
    CHECK(r.status == TFM_OK && r.stats.stop == TFM_STOP_MAX_TOKENS && r.n_tokens == 60);
    memcpy(tokens, numbers, n * sizeof *tokens);
    for (i = 0; i < 60; i++) {
        reference(model, tokens, n, logits);
        wrong += r.tokens[i] != likeliest(logits + (n - 1) * VOCAB);
        if (n == context)
            n = shifted(tokens, n, n_keep);
        tokens[n++] = r.tokens[i];
    }
    CHECK_MSG(!wrong, "shifting in a context of %lu, keeping %lu: %lu of 60 tokens differ", (unsigned long)context,
              (unsigned long)n_keep, (unsigned long)wrong);
    tfm_session_free(session);
}

/* ---- reusing a prefix, appending */

/* Generates from ids in a session that has something already, and in a fresh one: the same tokens. */
static void check_reuse(tfm_session *session, const int32_t *prompt, size_t n, size_t n_reused, const char *step) {
    tfm_session *fresh = make_session(tfm_session_model(session), 0, 1, 0);
    tfm_generate_options options;
    result a, b;
    memset(&options, 0, sizeof options);
    memset(&a, 0, sizeof a);
    memset(&b, 0, sizeof b);
    options.max_tokens = 5;
    options.ignore_end = 1;
    options.sampling.temperature = 1;
    options.seed = 3;
    run_ids(session, prompt, n, &options, &a);
    run_ids(fresh, prompt, n, &options, &b);
    CHECK_MSG(a.stats.n_reused == n_reused && a.stats.n_prompt == n, "%s: %lu tokens of %lu are reused, %lu expected",
              step, (unsigned long)a.stats.n_reused, (unsigned long)a.stats.n_prompt, (unsigned long)n_reused);
    CHECK(b.stats.n_reused == 0 && b.n_tokens == 5);
    CHECK_MSG(a.n_tokens == b.n_tokens && !memcmp(a.tokens, b.tokens, sizeof a.tokens), "%s: other tokens", step);
    tfm_session_free(fresh);
}

static void test_reuse(const tfm_model *model) {
    tfm_session *session = make_session(model, 0, 1, 0);
    int32_t prompt[24];
    size_t n;
    memcpy(prompt, numbers, sizeof prompt);
    check_reuse(session, prompt, 8, 0, "nothing there");
    prompt[6] = 200;
    check_reuse(session, prompt, 10, 6, "a common beginning");
    check_reuse(session, prompt, 10, 9, "the same prompt");
    check_reuse(session, prompt, 4, 3, "its beginning");
    n = 0;
    memcpy(prompt, tfm_sequence_tokens(session, 0, &n), 8 * sizeof *prompt);
    CHECK(n == 8); /* 4 of the prompt, 5 chosen, the last of which was not evaluated */
    prompt[8] = 11;
    check_reuse(session, prompt, 9, 8, "a text that goes on");
    prompt[0]++;
    check_reuse(session, prompt, 9, 0, "another beginning");
    CHECK(tfm_truncate(session, 0, 2, NULL) == TFM_OK);
    check_reuse(session, prompt, 9, 2, "truncated");
    tfm_session_free(session);
}

static void test_append(const tfm_model *model) {
    tfm_session *session = make_session(model, 0, 2, 0), *fresh = make_session(model, 0, 1, 0);
    tfm_generate_options options;
    const int32_t more[2] = {9, 8};
    int32_t all[24];
    result a, b;
    size_t n;
    memset(&options, 0, sizeof options);
    memset(&a, 0, sizeof a);
    memset(&b, 0, sizeof b);
    options.max_tokens = 4;
    options.ignore_end = 1;
    options.sequence = 1;
    run_ids(session, numbers, 5, &options, &a);
    memcpy(all, tfm_sequence_tokens(session, 1, &n), 8 * sizeof *all);
    CHECK(n == 8 && !memcmp(all, numbers, 5 * sizeof *all) && !memcmp(all + 5, a.tokens, 3 * sizeof *all));
    options.append = 1;
    run_ids(session, more, 2, &options, &a);
    CHECK(a.status == TFM_OK && a.stats.n_prompt == 2 && a.stats.n_reused == 0);
    memcpy(all + 8, more, sizeof more);
    options.append = 0;
    options.sequence = 0;
    run_ids(fresh, all, 10, &options, &b);
    CHECK(a.n_tokens == 4 && !memcmp(a.tokens, b.tokens, 4 * sizeof *a.tokens));
    (void)tfm_sequence_tokens(session, 0, &n);
    CHECK(n == 0);      /* the other sequence was left alone */
    options.append = 1; /* to nothing: from the beginning */
    run_ids(session, all, 10, &options, &a);
    CHECK(a.n_tokens == 4 && !memcmp(a.tokens, b.tokens, 4 * sizeof *a.tokens));
    tfm_session_free(session);
    tfm_free(NULL);
    tfm_session_free(fresh);
    tfm_session_free(NULL);
}

/* ---- threads: the same text however many, and whoever has them */

static void watched_backwards(void *user, size_t n, tfm_task task, void *argument) {
    size_t *largest = (size_t *)user;
    *largest = n > *largest ? n : *largest;
    test_backwards(NULL, n, task, argument);
}

#ifdef HAVE_THREADS
typedef struct shared_loop {
    pthread_mutex_t lock;
    size_t next, n;
    tfm_task task;
    void *argument;
} shared_loop;

static void *take_turns(void *user) {
    shared_loop *loop = (shared_loop *)user;
    for (;;) {
        size_t index;
        pthread_mutex_lock(&loop->lock);
        index = loop->next++;
        pthread_mutex_unlock(&loop->lock);
        if (index >= loop->n)
            return NULL;
        loop->task(loop->argument, index);
    }
}

static void with_pthreads(void *user, size_t n, tfm_task task, void *argument) {
    pthread_t threads[2];
    int started[2], i;
    shared_loop loop;
    (void)user;
    pthread_mutex_init(&loop.lock, NULL);
    loop.next = 0;
    loop.n = n;
    loop.task = task;
    loop.argument = argument;
    for (i = 0; i < 2; i++)
        started[i] = !pthread_create(threads + i, NULL, take_turns, &loop);
    take_turns(&loop);
    for (i = 0; i < 2; i++)
        if (started[i])
            pthread_join(threads[i], NULL);
    pthread_mutex_destroy(&loop.lock);
}
#endif

/* A story, and the last logits of its prompt. */
static void tell(const tfm_model *model, const tfm_engine_options *engine, uint64_t seed, result *r, float *logits) {
    static const char prompt[] = "Once upon a time, there was a little bear who lived in a house by the sea, and";
    const size_t vocab_size = tfm_model_description(model)->vocab_size;
    tfm_session_options options;
    tfm_generate_options generate;
    tfm_session *session;
    int32_t ids[64];
    size_t n;
    memset(&options, 0, sizeof options);
    memset(&generate, 0, sizeof generate);
    memset(r, 0, sizeof *r);
    options.engine = *engine;
    session = tfm_session_create(model, &options, NULL);
    if (!CHECK(session != NULL))
        return;
    generate.max_tokens = 24;
    generate.seed = seed;
    generate.ignore_end = 1;
    generate.sampling.temperature = 0.9f;
    generate.sampling.top_k = 50;
    run_text(session, prompt, &generate, r);
    CHECK(r->n_tokens == 24 && r->size > 24);
    CHECK(tfm_tokenize(model, prompt, strlen(prompt), 0, ids, 64, &n, NULL) == TFM_OK && n > 10 && n <= 64);
    memset(logits, 0, vocab_size * sizeof *logits);
    CHECK(tfm_truncate(session, 0, 0, NULL) == TFM_OK && eval(session, 0, ids, n, 1, logits, NULL) == TFM_OK);
    tfm_session_free(session);
}

static void test_threads(void) {
    tfm_error error = {TFM_OK, ""};
    tfm_model *model = tfm_load(TEST_MODEL, NULL, &error);
    size_t size = model ? tfm_model_description(model)->vocab_size * sizeof(float) : 0, largest = 0;
    float *expected = (float *)test_allocate(size), *found = (float *)test_allocate(size);
    tfm_engine_options engine;
    static result first, r;
    int threads;
    memset(&engine, 0, sizeof engine);
    if (CHECK_MSG(model != NULL, "%s", error.message)) {
        engine.threads = 1;
        tell(model, &engine, 1, &first, expected);
        for (threads = 2; threads <= 4; threads++) {
            engine.threads = threads;
            tell(model, &engine, 1, &r, found);
            CHECK_MSG(!strcmp(r.text, first.text) && !memcmp(expected, found, size), "%d threads: %s", threads, r.text);
        }
        engine.parallel_for = watched_backwards;
        engine.parallel_user = &largest;
        tell(model, &engine, 1, &r, found);
        CHECK_MSG(!strcmp(r.text, first.text) && !memcmp(expected, found, size), "backwards: %s", r.text);
        CHECK(largest > 4); /* it had something to turn round */
#ifdef HAVE_THREADS
        engine.parallel_for = with_pthreads;
        tell(model, &engine, 1, &r, found);
        CHECK_MSG(!strcmp(r.text, first.text) && !memcmp(expected, found, size), "pthreads: %s", r.text);
#endif
        memset(&engine, 0, sizeof engine);
        tell(model, &engine, 2, &r, found);
        CHECK(strcmp(r.text, first.text) != 0 && !memcmp(expected, found, size)); /* another seed */
        tell(model, &engine, 1, &r, found);
        CHECK(!strcmp(r.text, first.text)); /* and the first again */
    }
    free(expected);
    free(found);
    tfm_free(model);
}

/* ---- odd numbers: what the manual says under that name */

/* A model whose token 7 has that number in the middle of its embedding; the head is another table, without it. */
static tfm_model *spoiled_model(float number, tfm_dtype dtype, unsigned char **bytes) {
    const size_t width = random_shape.d_model;
    float *embedding = zeroed(VOCAB * width), *head = zeroed(VOCAB * width);
    test_tfm tfm;
    tfm_load_options options;
    tfm_error error;
    tfm_model *model;
    size_t size;
    memset(&tfm, 0, sizeof tfm);
    memset(&options, 0, sizeof options);
    options.dtype = dtype;
    test_put_description(&tfm, &random_shape);
    test_put_text(&tfm, "head", "own");
    test_put_weights(&tfm, &random_shape, 77);
    test_fill(embedding, VOCAB * width, 1);
    test_fill(head, VOCAB * width, 2);
    embedding[7 * width + width / 2] = number;
    test_put_tensor(&tfm, "token_embedding.weight", VOCAB, width, embedding);
    test_put_tensor(&tfm, "head.weight", VOCAB, width, head);
    *bytes = test_write_tfm(&tfm, &size);
    model = tfm_load_memory(*bytes, size, &options, &error);
    if (!model)
        test_fatal("%s", error.message);
    test_clear(&tfm);
    free(embedding);
    free(head);
    return model;
}

static size_t count_nans(const float *x, size_t n) {
    size_t i, nans = 0;
    for (i = 0; i < n; i++)
        nans += isnan(x[i]) ? 1 : 0;
    return nans;
}

/* A token whose embedding is no number: its logits are NaN, and those of the tokens behind it, which see it. The tokens
 * before it, another sequence in the same pass, and what comes when it is forgotten have the bits that they have without. */
static void test_spoiled_token(const tfm_model *good, const tfm_model *model, tfm_isa isa, const char *what) {
    static const int32_t ids[9] = {65, 300, 0, 12, 99, 7, 31, 1, 250}, others[3] = {5, 6, 8};
    static float expected[12 * VOCAB], found[12 * VOCAB];
    enum { AT = 5, N = 9 };
    tfm_session_options options;
    tfm_session *clean, *session;
    tfm_generate_options generate;
    tfm_chunk chunks[2] = {{0, ids, N, N}, {1, others, 3, 3}};
    tfm_error error;
    memset(&options, 0, sizeof options);
    memset(&generate, 0, sizeof generate);
    options.kv_dtype = kv_dtype;
    options.n_sequences = 2;
    options.engine.threads = 1;
    options.engine.isa = isa;
    clean = tfm_session_create(good, &options, &error);
    session = tfm_session_create(model, &options, &error);
    if (!clean || !session)
        test_fatal("%s", error.message);
    CHECK_OK(tfm_eval(clean, chunks, 2, TFM_LOGITS, expected, &error), error);
    CHECK_OK(tfm_eval(session, chunks, 2, TFM_LOGITS, found, &error), error);
    CHECK(!count_nans(expected, 12 * VOCAB));
    CHECK_SAME(found, expected, AT * VOCAB, test_text("%s: before it", what));
    CHECK_SAME(found + N * VOCAB, expected + N * VOCAB, 3 * VOCAB, test_text("%s: beside it", what));
    CHECK_MSG(count_nans(found + AT * VOCAB, (N - AT) * VOCAB) == (N - AT) * VOCAB, "%s: %lu NaNs from it on", what,
              (unsigned long)count_nans(found + AT * VOCAB, (N - AT) * VOCAB));
    generate.max_tokens = 1;
    error.status = TFM_OK;
    CHECK(tfm_generate_ids(session, ids, N, &generate, NULL, NULL, &error) == TFM_ERROR_ARGUMENT);
    CHECK_MSG(strstr(error.message, "no token can be chosen") != NULL, "%s: '%s'", what, error.message);
    CHECK_OK(tfm_truncate(session, 0, AT, &error), error); /* its keys and values are still in the cache's page */
    CHECK_OK(tfm_truncate(clean, 0, AT, &error), error);
    CHECK(eval(clean, 0, others, 3, 3, expected, NULL) == TFM_OK &&
          eval(session, 0, others, 3, 3, found, NULL) == TFM_OK);
    CHECK_SAME(found, expected, 3 * VOCAB, test_text("%s: forgotten", what));
    tfm_session_free(clean);
    tfm_session_free(session);
}

static void test_spoiled_tokens(void) {
    static const float spoilt[] = {NAN, INFINITY, -INFINITY};
    static const tfm_dtype caches[] = {TFM_F32, TFM_F16, TFM_BF16, TFM_I8};
    tfm_isa isas[TFM_ISA_COUNT];
    size_t n_isas = test_isas(isas), i, k, isa;
    for (i = 0; i < 3; i++) {
        unsigned char *good_bytes, *bytes;
        tfm_model *good = spoiled_model(0, TFM_F32, &good_bytes), *model = spoiled_model(spoilt[i], TFM_F32, &bytes);
        for (k = 0; k < sizeof caches / sizeof *caches; k++)
            for (isa = 0; isa < n_isas; isa++) {
                kv_dtype = caches[k];
                test_spoiled_token(good, model, isas[isa],
                                   test_text("%g, %s cache, %s", (double)spoilt[i], tfm_dtype_name(caches[k]),
                                             tfm_isa_name(isas[isa])));
            }
        tfm_free(good);
        tfm_free(model);
        free(good_bytes);
        free(bytes);
    }
    kv_dtype = TFM_NO_DTYPE;
}

/* The logits of one token are NaN, or all are the same. */
static void test_odd_logits(float letter, float all, const char *greedy, int beams) {
    float *table = zeroed(POSITIONS * VOCAB);
    unsigned char *bytes;
    tfm_model *model;
    tfm_session *session;
    tfm_generate_options options;
    tfm_beam_options search;
    const tfm_prompt prompt = {numbers, 2};
    tfm_result results[3];
    tfm_error error;
    result r;
    size_t i, k;
    int seen['Z' + 1] = {0}, n_seen = 0;
    for (i = 0; i < POSITIONS; i++)
        for (k = 0; k < VOCAB; k++)
            table[i * VOCAB + k] = k == 'A' ? letter : k == 'B' || k == 'C' ? 1 : all;
    model = table_model(table, NULL, 0, &bytes);
    session = make_session(model, 0, 3, 0);
    memset(&options, 0, sizeof options);
    memset(&search, 0, sizeof search);
    memset(&r, 0, sizeof r);
    options.max_tokens = 4;
    options.ignore_end = 1;
    run_ids(session, numbers, 2, &options, &r);
    CHECK(r.status == TFM_OK && r.n_tokens == 4);
    for (i = 0; i < 4; i++)
        CHECK(r.tokens[i] == (greedy ? greedy[i] : 0)); /* the lowest id among equals */
    options.max_tokens = 40;
    options.sampling.temperature = 1;
    options.sampling.top_k = greedy ? 2 : 1; /* those that are equal to the k-th stay */
    run_ids(session, numbers, 2, &options, &r);
    CHECK(r.status == TFM_OK && r.n_tokens == 40);
    for (i = 0; i < r.n_tokens; i++)
        if (greedy)
            CHECK(r.tokens[i] == 'B' || r.tokens[i] == 'C');
        else if (r.tokens[i] <= 'Z')
            n_seen += !seen[r.tokens[i]]++;
    CHECK(greedy || n_seen > 4);
    search.beams = search.n_best = 3;
    search.max_tokens = 2;
    if (beams) {
        CHECK_OK(tfm_beam_search(session, &prompt, 1, &search, results, &error), error);
        for (i = 0; i < 3; i++) { /* the lower beam, then the lower token */
            CHECK(results[i].n_tokens == 2 && results[i].tokens[0] == 0 && results[i].tokens[1] == (int32_t)i);
            CHECK(fabs((double)results[i].score + log((double)VOCAB)) < 1e-4);
        }
    } else {
        error.status = TFM_OK;
        CHECK(tfm_beam_search(session, &prompt, 1, &search, results, &error) == TFM_ERROR_ARGUMENT);
        CHECK(strstr(error.message, "no token can be chosen") != NULL);
    }
    tfm_session_free(session);
    tfm_free(model);
    free(bytes);
    free(table);
}

static void test_vocabulary_of_one(void) {
    const test_shape shape = {1, 8, 1, 2, 2, 4, 8, 12};
    const int32_t prompt_ids[3] = {0, 0, 0};
    const tfm_prompt prompt = {prompt_ids, 3};
    unsigned char *bytes;
    test_tfm tfm;
    tfm_model *model;
    tfm_session *session;
    tfm_generate_options options;
    tfm_beam_options search;
    tfm_result results[2];
    tfm_error error;
    result r;
    memset(&tfm, 0, sizeof tfm);
    memset(&options, 0, sizeof options);
    memset(&search, 0, sizeof search);
    memset(&r, 0, sizeof r);
    test_put_description(&tfm, &shape);
    test_put_weights(&tfm, &shape, 9);
    model = test_load_tfm(&tfm, &bytes);
    session = make_session(model, 0, 4, 0);
    options.max_tokens = 5;
    run_ids(session, prompt_ids, 3, &options, &r);
    CHECK(r.status == TFM_OK && r.n_tokens == 5 && !memcmp(r.tokens, "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 20));
    options.sampling.temperature = 0.7f;
    options.sampling.top_k = 9;
    options.sampling.top_p = 0.5f;
    options.sampling.min_p = 0.5f;
    options.sampling.repeat_penalty = 1.3f;
    run_ids(session, prompt_ids, 3, &options, &r);
    CHECK(r.status == TFM_OK && r.n_tokens == 5 && r.tokens[0] == 0 && r.tokens[4] == 0);
    run_ids(session, numbers, 3, &options, &r);
    CHECK(r.status == TFM_ERROR_ARGUMENT && strstr(r.error.message, "token id 7"));
    search.beams = search.n_best = 2;
    search.max_tokens = 3;
    error.status = TFM_OK;
    CHECK(tfm_beam_search(session, &prompt, 1, &search, results, &error) == TFM_ERROR_ARGUMENT);
    CHECK(strstr(error.message, "a vocabulary of 1 tokens is too small") != NULL);
    tfm_session_free(session);
    tfm_free(model);
    free(bytes);
    test_clear(&tfm);
}

/* A weight that is no number: every result is NaN; it can't be quantized, and the tensor is named. */
static void test_spoiled_weight(void) {
    static const char *const name = "decoder.blocks.1.ffn.up.weight";
    static float logits[3 * VOCAB], weights[48 * 32];
    tfm_load_options options;
    tfm_error error = {TFM_OK, ""};
    tfm_model *model;
    tfm_session *session;
    unsigned char *bytes;
    test_tfm tfm;
    size_t size;
    memset(&tfm, 0, sizeof tfm);
    memset(&options, 0, sizeof options);
    test_put_description(&tfm, &random_shape);
    test_put_weights(&tfm, &random_shape, 77);
    test_fill(weights, 48 * 32, 3);
    weights[777] = NAN;
    test_put_tensor(&tfm, name, random_shape.d_ff, random_shape.d_model, weights);
    bytes = test_write_tfm(&tfm, &size);
    options.dtype = TFM_I8;
    CHECK(!tfm_load_memory(bytes, size, &options, &error) && error.status == TFM_ERROR_FORMAT);
    CHECK_MSG(strstr(error.message, name) && strstr(error.message, "not finite"), "%s", error.message);
    for (options.dtype = TFM_F32; options.dtype <= TFM_BF16; options.dtype = (tfm_dtype)(options.dtype + 1)) {
        model = tfm_load_memory(bytes, size, &options, &error);
        if (!CHECK_MSG(model != NULL, "%s", error.message))
            continue;
        session = make_session(model, 0, 1, 0);
        CHECK(eval(session, 0, numbers, 3, 3, logits, NULL) == TFM_OK);
        CHECK(count_nans(logits, 3 * VOCAB) == 3 * VOCAB);
        tfm_session_free(session);
        tfm_free(model);
    }
    free(bytes);
    test_clear(&tfm);
}

static void test_odd_numbers(void) {
    test_spoiled_weight();
    test_spoiled_tokens();
    test_odd_logits(NAN, 0, "BBBB", 0);
    test_odd_logits(1, 1, NULL, 1);
    test_vocabulary_of_one();
}

static void test_random_model(void) {
    unsigned char *bytes;
    tfm_model *model = random_model(&bytes);
    size_t size = 0, i;
    for (i = 0; i < 8; i++)
        size += (size_t)bytes[16 + i] << 8 * i;
    test_hidden(model, bytes, size);
    test_eval_errors(model);
    test_session_errors(model);
    for (kv_dtype = TFM_NO_DTYPE, i = 0; i < 2; kv_dtype = TFM_I8, i++) {
        test_pieces(model);
        test_sequences(model);
        test_shift(model);
        test_shifting_generation(model, 24, 0);
        test_shifting_generation(model, 24, 5);
        test_shifting_generation(model, 11, 9);
        test_shifting_generation(model, 5, 1);
        test_reuse(model);
        test_append(model);
    }
    kv_dtype = TFM_NO_DTYPE;
    tfm_free(model);
    free(bytes);
}

/* Ids that end a text and are none of the vocabulary's: a configuration may name them. */
static void test_strange_ends(void) {
    static const int32_t ends[] = {50000000, -40000000, VOCAB, -1};
    test_tfm tfm;
    unsigned char *bytes;
    tfm_model *model;
    tfm_error error = {TFM_OK, ""};
    memset(&tfm, 0, sizeof tfm);
    test_put_description(&tfm, &random_shape);
    test_put_weights(&tfm, &random_shape, 79);
    test_put_i32(&tfm, "generation.eos_ids", ends, 4);
    model = test_load_tfm(&tfm, &bytes);
    if (model) {
        tfm_session *session = make_session(model, 0, 4, 0);
        tfm_prompt prompt = {numbers, 3};
        tfm_beam_options options;
        tfm_result answer;
        memset(&options, 0, sizeof options);
        options.beams = 2;
        options.min_tokens = 2;
        options.max_tokens = 5;
        memset(&answer, 0, sizeof answer);
        CHECK_OK(tfm_beam_search(session, &prompt, 1, &options, &answer, &error), error);
        CHECK_MSG(answer.n_tokens == 5, "%lu tokens", (unsigned long)answer.n_tokens);
        tfm_session_free(session);
    }
    tfm_free(model);
    free(bytes);
    test_clear(&tfm);
}

static void put_zeros(test_tfm *tfm, const char *stack, const char *name, size_t rows, size_t columns) {
    static const float zeros[48 * 16];
    char full[64];
    snprintf(full, sizeof full, "%s.blocks.0.%s", stack, name);
    test_put_tensor(tfm, full, rows, columns, zeros);
}

static void put_stack(test_tfm *tfm, const char *stack) {
    static const struct {
        const char *name;
        int64_t value;
    } sizes[] = {{"n_layers", 1}, {"n_heads", 1}, {"head_dim", 16}, {"d_ff", 16}, {"n_positions", 64}};
    static const struct {
        const char *name, *value;
    } words[] = {
        {"norm", "rms"}, {"norm_place", "pre"}, {"positions", "none"}, {"ffn", "plain"}, {"activation", "relu"}};
    char key[64];
    size_t i;
    for (i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        snprintf(key, sizeof key, "%s.%s", stack, sizes[i].name);
        test_put_i64(tfm, key, sizes[i].value);
        snprintf(key, sizeof key, "%s.%s", stack, words[i].name);
        test_put_text(tfm, key, words[i].value);
    }
    snprintf(key, sizeof key, "%s.norm_eps", stack);
    test_put_f64(tfm, key, 1e-5);
    snprintf(key, sizeof key, "%s.attention_scale", stack);
    test_put_f64(tfm, key, 0.25);
    put_zeros(tfm, stack, "attention_norm.weight", 16, 0);
    put_zeros(tfm, stack, "attention.qkv.weight", 48, 16);
    put_zeros(tfm, stack, "attention.out.weight", 16, 16);
    put_zeros(tfm, stack, "ffn_norm.weight", 16, 0);
    put_zeros(tfm, stack, "ffn.up.weight", 16, 16);
    put_zeros(tfm, stack, "ffn.down.weight", 16, 16);
}

/* An encoder-decoder whose WordPiece tokenizer writes an added token three times as long as it is in the file: bytes that
 * can't be UTF-8, as U+FFFD. */
static tfm_model *long_text_model(unsigned char **bytes) {
    enum { N_TOKENS = 8, LONG = 1020 };
    static const float zeros[N_TOKENS * 16];
    static const char end[] = "decoder";
    static const int32_t added[] = {N_TOKENS - 1, 16}; /* 16: to be found in normalized text */
    int32_t sizes[N_TOKENS] = {5, 1, 1, 1, 1, 1, 1, LONG};
    char tokens[5 + 6 + LONG];
    test_tfm tfm;
    tfm_model *model;
    memcpy(tokens, "[UNK]abcdef", 11);
    memset(tokens + 11, 0xFF, LONG);
    memset(&tfm, 0, sizeof tfm);
    test_put_text(&tfm, "model.kind", "encoder-decoder");
    test_put_i64(&tfm, "vocab_size", N_TOKENS);
    test_put_i64(&tfm, "d_model", 16);
    test_put_text(&tfm, "head", "own");
    put_stack(&tfm, "encoder");
    put_stack(&tfm, end);
    test_put_i64(&tfm, "decoder.cross", 1);
    put_zeros(&tfm, end, "cross_norm.weight", 16, 0);
    put_zeros(&tfm, end, "cross.q.weight", 16, 16);
    put_zeros(&tfm, end, "cross.kv.weight", 32, 16);
    put_zeros(&tfm, end, "cross.out.weight", 16, 16);
    test_put_tensor(&tfm, "token_embedding.weight", N_TOKENS, 16, zeros);
    test_put_tensor(&tfm, "head.weight", N_TOKENS, 16, zeros);
    test_put_text(&tfm, "tokenizer.kind", "wordpiece");
    test_put(&tfm, "tokenizer.tokens", TFM_META_BYTES, tokens, sizeof tokens);
    test_put_i32(&tfm, "tokenizer.token_sizes", sizes, N_TOKENS);
    test_put_i64(&tfm, "tokenizer.unk_id", 0);
    test_put_text(&tfm, "tokenizer.continuing_prefix", "##");
    test_put_i64(&tfm, "tokenizer.clean_text", 0);
    test_put_i64(&tfm, "tokenizer.lowercase", 0);
    test_put_i32(&tfm, "tokenizer.added", added, 2);
    test_put_i64(&tfm, "generation.start_id", 1);
    model = test_load_tfm(&tfm, bytes);
    test_clear(&tfm);
    return model;
}

static int add_size(void *user, const char *text, size_t size) {
    (void)text;
    *(size_t *)user += size;
    return 0;
}

static void test_long_text(void) {
    unsigned char *bytes;
    tfm_model *model = long_text_model(&bytes);
    test_heap heap;
    if (model) {
        const tfm_logit_bias bias = {7, 1e6f};
        tfm_session_options small;
        tfm_generate_options options;
        tfm_session *session;
        tfm_error error = {TFM_OK, ""};
        size_t size = 0;
        memset(&heap, 0, sizeof heap);
        memset(&small, 0, sizeof small);
        memset(&options, 0, sizeof options);
        small.engine.allocator = test_allocator(&heap);
        small.engine.threads = 1;
        options.max_tokens = 3;
        options.sampling.logit_bias = &bias;
        options.sampling.n_logit_bias = 1;
        session = tfm_session_create(model, &small, &error);
        CHECK_MSG(session != NULL, "%s", error.message);
        CHECK_OK(tfm_generate(session, "a b", &options, add_size, &size, &error), error);
        CHECK_MSG(size > (size_t)3 * 3 * 1000, "%lu bytes of text", (unsigned long)size);
        tfm_session_free(session);
        CHECK(!heap.bad && !heap.live);
    }
    tfm_free(model);
    free(bytes);
}

/* Relative positions know no end; memory does. */
static void test_endless_context(void) {
    static const size_t sizes[] = {SIZE_MAX, SIZE_MAX - 100, (size_t)0x80000000u};
    tfm_error error = {TFM_OK, ""};
    tfm_model *model = tfm_load("tests/golden/beams_t5.tfm", NULL, &error);
    size_t i;
    for (i = 0; model && i < 2 * sizeof sizes / sizeof *sizes; i++) {
        tfm_session_options options;
        memset(&options, 0, sizeof options);
        options.context = i % 2 ? 8 : sizes[i / 2];
        options.source = i % 2 ? sizes[i / 2] : 8;
        CHECK(!tfm_session_create(model, &options, &error) && error.status == TFM_ERROR_ARGUMENT);
        CHECK_MSG(strstr(error.message, "a context of") != NULL, "%s", error.message);
    }
    CHECK_MSG(model != NULL, "%s", error.message);
    tfm_free(model);
}

void test_generate(void) {
    test_strange_ends();
    test_long_text();
    test_endless_context();
    test_ends();
    test_callbacks_stop();
    test_stop_strings();
    test_stop_strings_and_tokens();
    test_characters();
    test_context_full();
    test_prompts();
    test_bad_options();
    test_bias_and_penalty();
    test_random_model();
    test_odd_numbers();
    test_no_head();
    test_threads();
}
