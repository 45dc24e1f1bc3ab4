/* SentencePiece: unigram and BPE, by sentencepiece's own rules and by those of Hugging Face's tokenizers: golden texts on
 * small models; files that are not what they should be; long texts; memory that is not to be had. */
#include "test.h"

#include <math.h>

/* Enough for any golden text. */
enum { MAX_IDS = 8192 };

static void check_text(const tfm_model *model, const unsigned char *text, size_t size, const unsigned char *expected,
                       size_t n_expected, int32_t *ids, const char *what) {
    tfm_error error;
    size_t n = 0, i;
    int same;
    CHECK_OK(tfm_tokenize(model, (const char *)text, size, 0, ids, MAX_IDS, &n, &error), error);
    same = n == n_expected;
    for (i = 0; same && i < n; i++) /* two bytes each */
        same = ids[i] == (expected[2 * i] | expected[2 * i + 1] << 8);
    CHECK_MSG(same, "%s: %lu ids, expected %lu; id %lu differs: '%.60s'", what, (unsigned long)n,
              (unsigned long)n_expected, (unsigned long)(i ? i - 1 : 0),
              test_text("%.*s", (int)(size < 60 ? size : 60), text));
    CHECK_OK(tfm_tokenize(model, (const char *)text, size, 0, NULL, 0, &n, &error), error);
    CHECK(n == n_expected);
}

static void check_decoded(const tfm_model *model, const int32_t *ids, size_t n, const unsigned char *expected,
                          size_t size, const char *what) {
    char text[512];
    tfm_error error;
    size_t found = 0;
    CHECK_OK(tfm_decode(model, ids, n, text, sizeof text, &found, &error), error);
    CHECK_MSG(found == size && !memcmp(text, expected, size), "%s: decoded to '%.*s', expected '%.*s'", what,
              (int)(found < sizeof text ? found : sizeof text), text, (int)size, expected);
}

static void test_golden(const tfm_file *golden, const char *name) {
    static int32_t ids[MAX_IDS];
    size_t n_texts, n_counts, i;
    const unsigned char *text = golden_bytes(golden, NULL, "texts.text");
    const int32_t *sizes = golden_ints(golden, &n_texts, "texts.sizes");
    const unsigned char *expected = golden_bytes(golden, NULL, "%s.ids", name);
    const int32_t *counts = golden_ints(golden, &n_counts, "%s.counts", name);
    const unsigned char *decoded = golden_bytes(golden, NULL, "%s.decoded.text", name);
    const int32_t *decoded_sizes = golden_ints(golden, NULL, "%s.decoded.sizes", name);
    const int32_t *decodes = golden_ints(golden, NULL, "%s.decodes", name);
    tfm_error error;
    tfm_model *model = tfm_load(test_text("tests/golden/pieces_%s.tfm", name), NULL, &error);
    if (!model)
        test_fatal("%s", error.message);
    CHECK(n_texts == n_counts && n_texts > 100);
    for (i = 0; i < n_texts; i++) {
        const char *what = test_text("%s text %lu", name, (unsigned long)i);
        check_text(model, text, (size_t)sizes[i], expected, (size_t)counts[i], ids, what);
        if (decodes[i])
            check_decoded(model, ids, (size_t)counts[i], decoded, (size_t)decoded_sizes[i], what);
        text += sizes[i];
        expected += 2 * counts[i];
        decoded += decoded_sizes[i];
    }
    tfm_free(model);
}

/* ---- a small model made here: unigram, or BPE by scores */

enum { N_PIECES = 12 };
static const char *const pieces[N_PIECES] = {"<unk>",
                                             "<s>",
                                             "\xE2\x96\x81",
                                             "a",
                                             "b",
                                             "ab",
                                             "aa",
                                             "aaaa",
                                             "\xE2\x96\x81"
                                             "a",
                                             "c",
                                             "abc",
                                             "<user>"};
static const int32_t piece_types[N_PIECES] = {2, 3, 1, 1, 1, 1, 1, 1, 1, 1, 5, 4};
static const float piece_scores[N_PIECES] = {0, 0, -2, -3, -3, -4, -4, -5, -4, -3, -1, 0};
static const int32_t sorted_pieces[] = {11, 3, 6, 7, 5, 4, 9, 2, 8}; /* without the unused one */

static void put_pieces(test_tfm *tfm, int unigram) {
    const test_shape shape = {N_PIECES, 4, 1, 1, 1, 4, 8, 8};
    int32_t sizes[N_PIECES];
    char bytes[256];
    size_t size = 0, i;
    memset(tfm, 0, sizeof *tfm);
    test_put_description(tfm, &shape);
    test_put_weights(tfm, &shape, 1);
    for (i = 0; i < N_PIECES; i++) {
        sizes[i] = (int32_t)strlen(pieces[i]);
        memcpy(bytes + size, pieces[i], strlen(pieces[i]));
        size += strlen(pieces[i]);
    }
    test_put_text(tfm, "tokenizer.kind", unigram ? "unigram" : "spm_bpe");
    test_put(tfm, "tokenizer.tokens", TFM_META_BYTES, bytes, size);
    test_put_i32(tfm, "tokenizer.token_sizes", sizes, N_PIECES);
    test_put_i32(tfm, "tokenizer.types", piece_types, N_PIECES);
    test_put(tfm, "tokenizer.scores", TFM_META_F32, piece_scores, sizeof piece_scores);
    test_put_i64(tfm, "tokenizer.unk_id", 0);
    test_put_i64(tfm, "tokenizer.add_dummy_prefix", 1);
    test_put_i64(tfm, "tokenizer.escape_whitespaces", 1);
    test_put_i64(tfm, "tokenizer.decode_lead", 1);
    if (unigram)
        test_put_i32(tfm, "tokenizer.sorted", sorted_pieces, sizeof sorted_pieces / sizeof *sorted_pieces);
}

static void check_ids(const tfm_model *model, const char *text, const char *expected) {
    int32_t ids[64];
    char found[512] = "";
    tfm_error error;
    size_t n = 0, i;
    CHECK_OK(tfm_tokenize(model, text, strlen(text), 0, ids, 64, &n, &error), error);
    for (i = 0; i < n && i < 64; i++)
        sprintf(found + strlen(found), i ? " %ld" : "%ld", (long)ids[i]);
    CHECK_MSG(!strcmp(found, expected), "'%s': ids %s, expected %s", text, found, expected);
}

static void test_small(void) {
    unsigned char *bytes;
    size_t size;
    test_tfm tfm;
    tfm_model *model;
    put_pieces(&tfm, 1);
    model = test_load_tfm(&tfm, &bytes);
    check_ids(model, "", "");
    check_ids(model, "aaaa", "2 7");
    check_ids(model, "ab abc", "2 5 2 5 9");
    check_ids(model, "aac", "2 6 9");
    check_ids(model, "xyz", "2 0");
    check_ids(model, "x<user>y", "2 0 11 0");
    CHECK(tfm_token_text(model, 8, &size) != NULL && size == 2 && !memcmp(tfm_token_text(model, 8, &size), " a", 2));
    tfm_free(model);
    free(bytes);
    test_clear(&tfm);
    put_pieces(&tfm, 0);
    model = test_load_tfm(&tfm, &bytes);
    check_ids(model, "aaaa", "8 6 3");
    check_ids(model, "cabc", "2 9 5 9"); /* the unused piece comes apart again */
    check_ids(model, "<user>a", "2 11 3");
    tfm_free(model);
    free(bytes);
    test_clear(&tfm);
}

/* White space at the end, which the rules of `tokenizers` write and then take back: room for it is needed all the same. */
static void test_spaces_at_end(void) {
    const size_t size = 100000;
    char *text = (char *)test_allocate(size + 1);
    unsigned char *bytes;
    int32_t expected[16], found[16];
    size_t n_expected = 0, n_found = 0;
    tfm_error error;
    test_tfm tfm;
    tfm_model *model;
    put_pieces(&tfm, 1);
    test_put_text(&tfm, "tokenizer.rules", "tokenizers");
    test_put_i64(&tfm, "tokenizer.strip", 2);
    test_put_i64(&tfm, "tokenizer.replace_spaces", 1);
    model = test_load_tfm(&tfm, &bytes);
    memset(text, ' ', size);
    memcpy(text, "aaaa", 4);
    memcpy(text + size - 2, "\t\t", 2);
    CHECK_OK(tfm_tokenize(model, text, 4, 0, expected, 16, &n_expected, &error), error);
    CHECK_OK(tfm_tokenize(model, text, size, 0, found, 16, &n_found, &error), error);
    CHECK_MSG(n_expected && n_found == n_expected && !memcmp(found, expected, n_found * sizeof *found),
              "%lu ids with white space at the end, %lu without", (unsigned long)n_found, (unsigned long)n_expected);
    tfm_free(model);
    free(bytes);
    free(text);
    test_clear(&tfm);
}

/* What is unknown is written as the file says, with its spaces; without a word there, as the piece. */
static void test_unknown(void) {
    static const int32_t ids[] = {1, 0, 8, 0, 4};
    static const char *const surfaces[] = {NULL, " \xE2\x81\x87 ", "", " what has no piece, longer than any of them "};
    static const char *const texts[] = {"<unk> a<unk>b", " \xE2\x81\x87  a \xE2\x81\x87 b", "ab",
                                        " what has no piece, longer than any of them  a"
                                        " what has no piece, longer than any of them b"};
    unsigned char *bytes;
    size_t i, size;
    for (i = 0; i < sizeof texts / sizeof *texts; i++) {
        test_tfm tfm;
        tfm_model *model;
        put_pieces(&tfm, 1);
        if (surfaces[i])
            test_put(&tfm, "tokenizer.unk_surface", TFM_META_BYTES, surfaces[i], strlen(surfaces[i]));
        model = test_load_tfm(&tfm, &bytes);
        check_decoded(model, ids, 5, (const unsigned char *)texts[i], strlen(texts[i]), "what is unknown");
        CHECK(!memcmp(tfm_token_text(model, 0, &size), "<unk>", 5) && size == 5);
        tfm_free(model);
        free(bytes);
        test_clear(&tfm);
    }
}

/* ---- files that are not what they should be */

static void check_refused(const test_tfm *tfm, const char *needle) {
    tfm_error error;
    size_t size;
    unsigned char *bytes = test_write_tfm(tfm, &size);
    tfm_model *model = tfm_load_memory(bytes, size, NULL, &error);
    CHECK_MSG(!model && strstr(error.message, needle), "%s: expected an error with '%s'",
              model ? "was loaded" : error.message, needle);
    tfm_free(model);
    free(bytes);
}

static void check_refused_ids(int unigram, const char *key, const int32_t *values, size_t n, const char *needle) {
    test_tfm tfm;
    put_pieces(&tfm, unigram);
    test_put_i32(&tfm, key, values, n);
    check_refused(&tfm, needle);
    test_clear(&tfm);
}

static void test_bad_pieces(void) {
    int32_t ids[N_PIECES];
    float scores[N_PIECES];
    test_tfm tfm;
    int unigram;
    for (unigram = 0; unigram < 2; unigram++) {
        check_refused_ids(unigram, "tokenizer.types", piece_types, N_PIECES - 1, "tokenizer.types");
        memcpy(ids, piece_types, sizeof ids);
        ids[3] = 7;
        check_refused_ids(unigram, "tokenizer.types", ids, N_PIECES, "type 7");
        ids[3] = 6;
        check_refused_ids(unigram, "tokenizer.types", ids, N_PIECES, "no byte");
        put_pieces(&tfm, unigram);
        memcpy(scores, piece_scores, sizeof scores);
        scores[5] = NAN;
        test_put(&tfm, "tokenizer.scores", TFM_META_F32, scores, sizeof scores);
        check_refused(&tfm, "score of token 5");
        scores[5] = INFINITY;
        test_put(&tfm, "tokenizer.scores", TFM_META_F32, scores, sizeof scores);
        check_refused(&tfm, "score of token 5");
        test_put(&tfm, "tokenizer.scores", TFM_META_F32, piece_scores, sizeof piece_scores - 4);
        check_refused(&tfm, "tokenizer.scores");
        test_put_text(&tfm, "tokenizer.scores", "high");
        check_refused(&tfm, "tokenizer.scores");
        test_drop(&tfm, "tokenizer.scores");
        check_refused(&tfm, "tokenizer.scores");
        test_clear(&tfm);
        put_pieces(&tfm, unigram);
        test_put_i64(&tfm, "tokenizer.byte_fallback", 1);
        check_refused(&tfm, "no piece for the byte 0");
        test_put_i64(&tfm, "tokenizer.byte_fallback", 0);
        test_drop(&tfm, "tokenizer.unk_id");
        check_refused(&tfm, "unknown token");
        test_put_i64(&tfm, "tokenizer.unk_id", N_PIECES);
        check_refused(&tfm, "unknown token's id");
        test_put_i64(&tfm, "tokenizer.unk_id", 0);
        test_put_i64(&tfm, "tokenizer.metaspace", 4);
        check_refused(&tfm, "tokenizer.metaspace");
        test_clear(&tfm);
    }
    ids[0] = 4, ids[1] = 3;
    check_refused_ids(1, "tokenizer.sorted", ids, 2, "out of order");
    ids[1] = 4;
    check_refused_ids(1, "tokenizer.sorted", ids, 2, "out of order");
    ids[1] = N_PIECES;
    check_refused_ids(1, "tokenizer.sorted", ids, 2, "sorted piece 1");
    ids[1] = -1;
    check_refused_ids(1, "tokenizer.sorted", ids, 2, "sorted piece 1");
    check_refused_ids(0, "tokenizer.merges", ids, 2, "tokenizer.merges");
    ids[0] = 3, ids[1] = 4, ids[2] = 6;
    check_refused_ids(0, "tokenizer.merges", ids, 3, "merge 0");
}

/* A charsmap of n units, and then texts. */
static size_t put_charsmap(unsigned char *map, const uint32_t *units, size_t n, const char *texts, size_t size) {
    size_t i;
    for (i = 0; i < n + 1; i++) {
        uint32_t word = i ? units[i - 1] : (uint32_t)(4 * n);
        map[4 * i] = (unsigned char)word;
        map[4 * i + 1] = (unsigned char)(word >> 8);
        map[4 * i + 2] = (unsigned char)(word >> 16);
        map[4 * i + 3] = (unsigned char)(word >> 24);
    }
    memcpy(map + 4 * (n + 1), texts, size);
    return 4 * (n + 1) + size;
}

static void check_charsmap(const unsigned char *map, size_t size, const char *needle) {
    test_tfm tfm;
    put_pieces(&tfm, 1);
    test_put(&tfm, "tokenizer.charsmap", TFM_META_BYTES, map, size);
    check_refused(&tfm, needle);
    test_clear(&tfm);
}

static void test_bad_charsmap(void) {
    static unsigned char map[8192];
    uint32_t units[512] = {0};
    size_t size, i;
    unsigned char *bytes;
    test_tfm tfm;
    tfm_model *model;
    check_charsmap(map, 0, "charsmap");
    check_charsmap(map, 3, "charsmap");
    map[0] = 8; /* units and texts that begin behind its end */
    check_charsmap(map, 4, "is not a trie");
    size = put_charsmap(map, units, 512, "x", 2);
    map[0]++; /* no whole number of units */
    check_charsmap(map, size, "charsmap");
    map[2] = 1; /* more than there is */
    check_charsmap(map, size, "charsmap");
    size = put_charsmap(map, units, 512, "x", 1); /* a text without an end */
    check_charsmap(map, size, "charsmap");
    memset(map + 4096, 'x', 4000);
    map[8095] = 0;
    put_charsmap(map, units, 512, "x", 1);
    check_charsmap(map, 8096, "more than 256 bytes");
    units['b'] = 'b' | 1u << 8 | 1000u << 10; /* its value is outside of the units, */
    size = put_charsmap(map, units, 512, "x", 2);
    check_charsmap(map, size, "leads to no text");
    units['b'] = 'b' | 1u << 8 | 300u << 10; /* in what is no value, */
    size = put_charsmap(map, units, 512, "x", 2);
    check_charsmap(map, size, "leads to no text");
    units['b' ^ 300] = 1u << 31 | 2; /* and outside of the texts */
    size = put_charsmap(map, units, 512, "x", 2);
    check_charsmap(map, size, "leads to no text");
    units['b' ^ 300] = 1u << 31; /* b -> x; and a leads to itself, for ever, whatever is behind it */
    units['a'] = 'a' | (uint32_t)'a' << 10;
    put_pieces(&tfm, 1);
    size = put_charsmap(map, units, 512, "x", 2);
    test_put(&tfm, "tokenizer.charsmap", TFM_META_BYTES, map, size);
    model = test_load_tfm(&tfm, &bytes);
    check_ids(model, "aab", "2 0"); /* as it leads to b, too */
    check_ids(model, "aac", "2 6 9");
    {
        const size_t n = 200000; /* a step for every byte behind every byte would be 2e10 of them */
        char *text = (char *)test_allocate(n);
        tfm_error error;
        size_t n_ids;
        memset(text, 'a', n);
        CHECK_OK(tfm_tokenize(model, text, n, 0, NULL, 0, &n_ids, &error), error);
        CHECK(n_ids > n / 4 && n_ids < n / 4 + 8);
        free(text);
    }
    tfm_free(model);
    free(bytes);
    { /* any units at all: an error, or a model that reads nothing but what is its own */
        uint64_t state = 9;
        for (i = 0; i < 2000; i++) {
            size_t changes = 1 + test_random(&state, 12);
            tfm_error error;
            unsigned char *file;
            while (changes--)
                map[4 + test_random(&state, size - 5)] = (unsigned char)test_random(&state, 256);
            if (i % 8 == 0)
                size = put_charsmap(map, units, 512, "x", 2);
            test_put(&tfm, "tokenizer.charsmap", TFM_META_BYTES, map, size);
            test_put_text(&tfm, "tokenizer.rules", i % 2 ? "tokenizers" : "sentencepiece");
            file = test_write_tfm(&tfm, &size);
            model = tfm_load_memory(file, size, NULL, &error);
            size = 4 * 513 + 2;
            if (model) {
                size_t n_ids;
                CHECK_OK(tfm_tokenize(model, "aabab\xCC\x81 xyz\xF0\x9F\x98\x80\xFF", 16, 0, NULL, 0, &n_ids, &error),
                         error);
            }
            tfm_free(model);
            free(file);
        }
    }
    test_clear(&tfm);
}

/* ---- long texts, any bytes, no memory */

static void check_long(const tfm_model *model, const char *text, size_t size, const char *what) {
    tfm_error error;
    size_t n = 0;
    CHECK_OK(tfm_tokenize(model, text, size, 0, NULL, 0, &n, &error), error);
    CHECK_MSG(n > 0 && n <= 3 * size + 1, "%s: %lu ids", what, (unsigned long)n);
}

/* Megabytes without a place to cut take seconds if a step is taken for each pair of bytes. */
static void test_long(void) {
    static const char *const names[] = {"unigram", "unigram_bytes", "bpe", "bpe_bytes", "t5", "llama"};
    const size_t size = 1 << 20;
    char *text = (char *)test_allocate(size);
    uint64_t state = 3;
    size_t i, k;
    for (i = 0; i < sizeof names / sizeof *names; i++) {
        tfm_error error;
        tfm_model *model = tfm_load(test_text("tests/golden/pieces_%s.tfm", names[i]), NULL, &error);
        if (!model)
            test_fatal("%s", error.message);
        memset(text, 'a', size);
        check_long(model, text, size, names[i]);
        for (k = 0; k < size; k++)
            text[k] = "abcdeilnorstu"[test_random(&state, 13)];
        check_long(model, text, size, names[i]);
        for (k = 0; k < size; k++)
            text[k] = (char)test_random(&state, 256);
        check_long(model, text, size, names[i]);
        tfm_free(model);
    }
    free(text);
}

/* Every allocation of loading and encoding may fail. */
static void test_no_memory(const char *name) {
    static const char text[] = "eins zwei \xE4\xB8\xAD\xE6\x96\x87 \xEF\xAC\x81 <s> drei";
    char *longer = (char *)test_allocate(100 * sizeof text);
    test_heap heap;
    size_t i;
    for (i = 0; i < 100; i++)
        memcpy(longer + i * (sizeof text - 1), text, sizeof text);
    memset(&heap, 0, sizeof heap);
    for (heap.fail_at = 1;; heap.fail_at++) {
        tfm_load_options options;
        tfm_error error;
        tfm_status status = TFM_OK;
        tfm_model *model;
        size_t n;
        memset(&options, 0, sizeof options);
        heap.count = 0;
        options.allocator = test_allocator(&heap);
        model = tfm_load(test_text("tests/golden/pieces_%s.tfm", name), &options, &error);
        if (model)
            status = tfm_tokenize(model, longer, 100 * (sizeof text - 1), TFM_TOKENIZE_SPECIAL, NULL, 0, &n, &error);
        CHECK_MSG((model && status == TFM_OK) || error.status == TFM_ERROR_MEMORY, "%s: %s", name, error.message);
        tfm_free(model);
        CHECK(heap.live == 0 && heap.bad == 0);
        if (heap.count < heap.fail_at)
            break;
    }
    CHECK(heap.fail_at > 8);
    free(longer);
}

void test_sentencepiece(void) {
    static const char *const names[] = {"unigram", "unigram_bytes", "bpe", "bpe_bytes", "t5", "llama"};
    tfm_file *golden = golden_open("sentencepiece");
    size_t i;
    for (i = 0; i < sizeof names / sizeof *names; i++) {
        test_golden(golden, names[i]);
        test_no_memory(names[i]);
    }
    tfm_file_close(golden);
    test_small();
    test_spaces_at_end();
    test_unknown();
    test_bad_pieces();
    test_bad_charsmap();
    test_long();
}
