/* The demo model's tokenizer against transformers' GPT2TokenizerFast, on a few hundred nasty strings. */
#include "test.h"

static tfm_model *model;

/* Enough for any text here, and what must stay untouched behind. */
enum { MAX_IDS = 16384, UNTOUCHED = -7 };

static size_t tokenize(const void *text, size_t size, unsigned flags, size_t capacity, int32_t *ids) {
    size_t n = 0, i;
    tfm_error error;
    for (i = 0; i < MAX_IDS; i++)
        ids[i] = UNTOUCHED;
    CHECK_OK(tfm_tokenize(model, (const char *)text, size, flags, ids, capacity, &n, &error), error);
    CHECK_MSG(n <= MAX_IDS, "%lu ids are too many for this test", (unsigned long)n);
    for (i = n < capacity ? n : capacity; i < MAX_IDS && ids[i] == UNTOUCHED; i++)
        ;
    CHECK_MSG(i == MAX_IDS, "wrote past %lu ids", (unsigned long)(n < capacity ? n : capacity));
    return n;
}

/* The texts of the ids, one after another, are the text. */
static void check_decodes(const int32_t *ids, size_t n_ids, const unsigned char *text, size_t size, const char *what) {
    size_t done = 0, i;
    for (i = 0; i < n_ids; i++) {
        size_t token_size;
        const char *token = tfm_token_text(model, ids[i], &token_size);
        if (!token || token_size > size - done || memcmp(text + done, token, token_size))
            break;
        done += token_size;
    }
    CHECK_MSG(i == n_ids && done == size, "%s: decoded differently from byte %lu on", what, (unsigned long)done);
}

static void check_text(const unsigned char *text, size_t size, unsigned flags, const unsigned char *expected,
                       size_t n_expected, const char *what) {
    static int32_t ids[MAX_IDS];
    size_t n = tokenize(text, size, flags, MAX_IDS, ids), i;
    int same = n == n_expected;
    for (i = 0; same && i < n; i++) /* two bytes each */
        same = ids[i] == (expected[2 * i] | expected[2 * i + 1] << 8);
    CHECK_MSG(same, "%s: %lu ids, expected %lu; id %lu differs: '%.60s'", what, (unsigned long)n,
              (unsigned long)n_expected, (unsigned long)(i ? i - 1 : 0),
              test_text("%.*s", (int)(size < 60 ? size : 60), text));
    check_decodes(ids, n, text, size, what);
    if (n) { /* no room for the last: counted, not written */
        CHECK(tokenize(text, size, flags, n - 1, ids) == n);
        CHECK(tokenize(text, size, flags, 0, ids) == n);
    }
}

static void test_golden(const tfm_file *golden, const char *group, unsigned flags) {
    size_t n_texts, n_counts, i;
    const unsigned char *text = golden_bytes(golden, NULL, "%s.text", group);
    const unsigned char *ids = golden_bytes(golden, NULL, "%s.ids", group);
    const int32_t *sizes = golden_ints(golden, &n_texts, "%s.sizes", group);
    const int32_t *counts = golden_ints(golden, &n_counts, "%s.counts", group);
    CHECK(n_texts == n_counts && n_texts > 20);
    for (i = 0; i < n_texts; i++) {
        check_text(text, (size_t)sizes[i], flags, ids, (size_t)counts[i],
                   test_text("%s text %lu", group, (unsigned long)i));
        text += sizes[i];
        ids += 2 * counts[i];
    }
}

/* What is no UTF-8 is bytes like any other: nothing is lost. */
static void test_any_bytes(void) {
    static const char *const pieces[] = {
        "\xff", "\xc3", "\xe4\xb8", "\xf0\x9f\x98", "\xed\xa0\x80", "\xc0\x80", "\x80\x80", "\xf5\x80\x80\x80",
        "a",    " ",    "\xc3\xa9", "\xe4\xb8\xad", "'s",           "\n",       "1"};
    static int32_t ids[MAX_IDS];
    unsigned char text[1024];
    uint64_t state = 1;
    size_t round, size, i;
    for (round = 0; round < 300; round++) {
        size_t wanted = test_random(&state, 1000);
        for (size = 0; size < wanted;) {
            const char *piece = pieces[test_random(&state, sizeof pieces / sizeof *pieces)];
            if (round % 2)
                text[size++] = (unsigned char)test_random(&state, 256);
            else
                for (i = 0; piece[i]; i++)
                    text[size++] = (unsigned char)piece[i];
        }
        i = tokenize(text, size, 0, MAX_IDS, ids);
        check_decodes(ids, i, text, size, test_text("bytes %lu", (unsigned long)round));
    }
}

static void test_token_text(void) {
    size_t vocab_size = tfm_model_description(model)->vocab_size, size = 1;
    CHECK(tfm_token_text(model, -1, &size) == NULL && size == 0);
    CHECK(tfm_token_text(model, (int32_t)vocab_size, &size) == NULL && size == 0);
    CHECK(tfm_token_text(model, 0, &size) != NULL && size == 13 &&
          !memcmp(tfm_token_text(model, 0, &size), "<|endoftext|>", 13));
    CHECK(tfm_is_end_token(model, 0));
    CHECK(!tfm_is_end_token(model, 1));
}

static void test_without_tokenizer(void) {
    tfm_error error;
    size_t n;
    tfm_model *bare = tfm_load("tests/golden/model_one_head.tfm", NULL, &error);
    CHECK_MSG(bare != NULL, "%s", error.message);
    if (!bare)
        return;
    CHECK(!tfm_has_tokenizer(bare));
    CHECK(tfm_tokenize(bare, "a", 1, 0, NULL, 0, &n, &error) == TFM_ERROR_UNSUPPORTED);
    tfm_free(bare);
}

/* ---- WordPiece */

/* Writes a list of texts of a golden file as offsets; returns how many there are. */
static size_t text_starts(const tfm_file *golden, const char *name, size_t *starts, size_t room) {
    size_t n, i;
    const int32_t *sizes = golden_ints(golden, &n, "%s.sizes", name);
    starts[0] = 0;
    for (i = 0; i < n && i + 1 < room; i++)
        starts[i + 1] = starts[i] + (size_t)sizes[i];
    return n;
}

enum { MAX_TEXTS = 1024 };

/* A small model with the WordPiece tokenizer of that name in the golden file. */
static void put_wordpiece(test_tfm *tfm, const tfm_file *golden, const char *name) {
    static const int32_t cls[1] = {2}, sep[1] = {3};
    static const char *const keys[] = {"tokenizer.lowercase", "tokenizer.strip_accents", "tokenizer.clean_text",
                                       "tokenizer.chinese_chars"};
    test_shape shape = {0, 8, 1, 1, 1, 8, 8, 8};
    const int32_t *options = golden_ints(golden, NULL, "%s.options", name), *added, *sizes;
    const unsigned char *bytes;
    size_t n, size, i;
    memset(tfm, 0, sizeof *tfm);
    sizes = golden_ints(golden, &n, "%s.tokens.sizes", name);
    shape.vocab_size = n;
    test_put_description(tfm, &shape);
    test_put_weights(tfm, &shape, 1);
    test_put_text(tfm, "tokenizer.kind", "wordpiece");
    test_put_i32(tfm, "tokenizer.token_sizes", sizes, n);
    bytes = golden_bytes(golden, &size, "%s.tokens.text", name);
    test_put(tfm, "tokenizer.tokens", TFM_META_BYTES, bytes, size);
    added = golden_ints(golden, &n, "%s.added", name);
    test_put_i32(tfm, "tokenizer.added", added, n);
    test_put_text(tfm, "tokenizer.continuing_prefix", "##");
    test_put_i64(tfm, "tokenizer.max_word_chars", 100);
    for (i = 0; i < 4; i++)
        test_put_i64(tfm, keys[i], options[i]);
    test_put_i64(tfm, "tokenizer.unk_id", 1);
    test_put_i64(tfm, "tokenizer.mask_id", 4);
    test_put_i32(tfm, "tokenizer.prefix_ids", cls, 1);
    test_put_i32(tfm, "tokenizer.pair_ids", sep, 1);
    test_put_i64(tfm, "tokenizer.pair_type", 1);
    test_put_i32(tfm, "tokenizer.suffix_ids", sep, 1);
}

static int same_ids(const int32_t *ids, const unsigned char *expected, size_t n) {
    size_t i;
    for (i = 0; i < n; i++) /* two bytes each */
        if (ids[i] != (expected[2 * i] | expected[2 * i + 1] << 8))
            return 0;
    return 1;
}

static void check_wordpiece_texts(const tfm_file *golden, const char *name, const char *group, unsigned flags) {
    static int32_t ids[MAX_IDS];
    static char decoded[8192];
    size_t starts[MAX_TEXTS], decoded_starts[MAX_TEXTS], n_texts, n, i, size;
    const char *text = (const char *)golden_bytes(golden, NULL, "texts.text");
    const char *wanted = (const char *)golden_bytes(golden, NULL, "%s.decoded.text", name);
    const unsigned char *expected = golden_bytes(golden, NULL, "%s.%s.ids", name, group);
    const int32_t *counts = golden_ints(golden, NULL, "%s.%s.counts", name, group);
    tfm_error error;
    n_texts = text_starts(golden, "texts", starts, MAX_TEXTS);
    text_starts(golden, test_text("%s.decoded", name), decoded_starts, MAX_TEXTS);
    for (i = 0; i < n_texts; i++) {
        n = tokenize(text + starts[i], starts[i + 1] - starts[i], flags, MAX_IDS, ids);
        CHECK_MSG(n == (size_t)counts[i] && same_ids(ids, expected, n), "%s %s: text %lu: other ids", name, group,
                  (unsigned long)i);
        expected += 2 * counts[i];
        if (!(flags & TFM_TOKENIZE_SPECIAL)) /* what is decoded are the ids of the other group */
            continue;
        CHECK_OK(tfm_decode(model, ids, n, decoded, sizeof decoded, &size, &error), error);
        CHECK_MSG(size == decoded_starts[i + 1] - decoded_starts[i] &&
                      !memcmp(decoded, wanted + decoded_starts[i], size),
                  "%s: text %lu is decoded as '%.*s'", name, (unsigned long)i, (int)size, decoded);
    }
}

static void check_wordpiece_pairs(const tfm_file *golden, const char *name) {
    static int32_t ids[MAX_IDS], types[MAX_IDS];
    size_t starts[MAX_TEXTS], n_texts = text_starts(golden, "texts", starts, MAX_TEXTS), n, i;
    const char *text = (const char *)golden_bytes(golden, NULL, "texts.text");
    const unsigned char *expected = golden_bytes(golden, NULL, "%s.pairs.ids", name);
    const unsigned char *expected_types = golden_bytes(golden, NULL, "%s.types.ids", name);
    const int32_t *counts = golden_ints(golden, NULL, "%s.pairs.counts", name);
    tfm_error error;
    for (i = 0; i + 1 < n_texts; i += 2) {
        const char *a = text + starts[i], *b = text + starts[i + 1];
        CHECK_OK(tfm_tokenize_pair(model, a, (size_t)(b - a), b, starts[i + 2] - starts[i + 1], TFM_TOKENIZE_SPECIAL,
                                   ids, types, MAX_IDS, &n, &error),
                 error);
        CHECK_MSG(n == (size_t)counts[i / 2] && same_ids(ids, expected, n) && same_ids(types, expected_types, n),
                  "%s: pair %lu: other ids or types", name, (unsigned long)i / 2);
        expected += 2 * counts[i / 2];
        expected_types += 2 * counts[i / 2];
    }
}

/* What is no UTF-8 is U+FFFD: removed where the text is cleaned, so that it is as if it were not there. */
static void check_wordpiece_bytes(void) {
    static int32_t ids[MAX_IDS], clean[MAX_IDS];
    static char text[40000];
    size_t n, i;
    uint64_t state = 7;
    n = tokenize("pl\xff"
                 "ay\xf0\x9f\x98 \xc3",
                 10, 0, MAX_IDS, ids);
    CHECK(n == tokenize("play ", 5, 0, MAX_IDS, clean) && !memcmp(ids, clean, n * sizeof *ids));
    for (i = 0; i < sizeof text; i++) /* random bytes, and a long stretch without a place to cut */
        text[i] = (char)(i < 20000 ? test_random(&state, 256) : i % 2 ? 0x81 : 0xCC);
    for (i = 0; i + 1000 < sizeof text; i += 990)
        CHECK(tokenize(text + i, 1000, TFM_TOKENIZE_SPECIAL, MAX_IDS, ids) >= 2);
    CHECK(tokenize(text, sizeof text, 0, MAX_IDS, ids) > 2);
    memset(text, 'x', sizeof text);
    CHECK(tokenize(text, sizeof text, 0, MAX_IDS, ids) == 3 && ids[1] == 1); /* [CLS] [UNK] [SEP] */
}

static void test_wordpiece(void) {
    static const char *const names[] = {"uncased", "cased", "accents", "raw"};
    tfm_file *golden = golden_open("wordpiece");
    tfm_model *demo = model;
    size_t k;
    for (k = 0; k < 4; k++) {
        test_tfm tfm;
        unsigned char *bytes;
        put_wordpiece(&tfm, golden, names[k]);
        model = test_load_tfm(&tfm, &bytes);
        if (model) {
            check_wordpiece_texts(golden, names[k], "plain", 0);
            check_wordpiece_texts(golden, names[k], "special", TFM_TOKENIZE_SPECIAL);
            check_wordpiece_pairs(golden, names[k]);
            if (k < 2)
                check_wordpiece_bytes();
            CHECK(tfm_mask_token(model) == 4 && tfm_token_id(model, "[MASK]", 6) == 4);
            CHECK(tfm_token_id(model, "[MAS", 4) == -1 && tfm_token_id(model, "", 0) == -1);
        }
        tfm_free(model);
        free(bytes);
        test_clear(&tfm);
    }
    model = demo;
    tfm_file_close(golden);
}

/* Each change makes the tokenizer one that can't be: an error that names what is wrong. */
static void check_spoiled(test_tfm *tfm, tfm_status expected, const char *what) {
    tfm_error error;
    size_t size;
    unsigned char *file = test_write_tfm(tfm, &size);
    tfm_model *spoiled = tfm_load_memory(file, size, NULL, &error);
    CHECK_MSG(!spoiled && error.status == expected && strstr(error.message, what), "%s: %s", what,
              spoiled ? "was accepted" : error.message);
    tfm_free(spoiled);
    free(file);
    test_clear(tfm);
}

static void test_hostile_wordpiece(void) {
    static const int32_t bad[1] = {100000}, odd_flags[2] = {5, 64};
    static const char *const flags[] = {"tokenizer.clean_text", "tokenizer.chinese_chars", "tokenizer.strip_accents",
                                        "tokenizer.lowercase", "tokenizer.cleanup"};
    tfm_file *golden = golden_open("wordpiece");
    test_tfm tfm;
    size_t k;
#define SPOILED(change, expected, what)                                                                                \
    do {                                                                                                               \
        put_wordpiece(&tfm, golden, "cased");                                                                          \
        change;                                                                                                        \
        check_spoiled(&tfm, expected, what);                                                                           \
    } while (0)
    for (k = 0; k < sizeof flags / sizeof *flags; k++) {
        SPOILED(test_put_i64(&tfm, flags[k], 2), TFM_ERROR_FORMAT, flags[k]);
        SPOILED(test_put_text(&tfm, flags[k], "1"), TFM_ERROR_FORMAT, flags[k]);
    }
    SPOILED(test_drop(&tfm, "tokenizer.unk_id"), TFM_ERROR_FORMAT, "tokenizer.unk_id");
    SPOILED(test_put_i64(&tfm, "tokenizer.unk_id", 100000), TFM_ERROR_FORMAT, "unknown token");
    SPOILED(test_put_i64(&tfm, "tokenizer.mask_id", 100000), TFM_ERROR_FORMAT, "tokenizer.mask_id");
    SPOILED(test_put_i64(&tfm, "tokenizer.max_word_chars", 0), TFM_ERROR_FORMAT, "tokenizer.max_word_chars");
    SPOILED(test_put_i64(&tfm, "tokenizer.max_word_chars", 1 << 20), TFM_ERROR_FORMAT, "tokenizer.max_word_chars");
    SPOILED(test_drop(&tfm, "tokenizer.continuing_prefix"), TFM_ERROR_FORMAT, "tokenizer.continuing_prefix");
    SPOILED(test_put_i64(&tfm, "tokenizer.continuing_prefix", 1), TFM_ERROR_FORMAT, "tokenizer.continuing_prefix");
    SPOILED(test_put_i64(&tfm, "tokenizer.pair_type", -1), TFM_ERROR_FORMAT, "tokenizer.pair_type");
    SPOILED(test_put_i32(&tfm, "tokenizer.pair_ids", bad, 1), TFM_ERROR_FORMAT, "pair id 0");
    SPOILED(test_put_i32(&tfm, "tokenizer.added", odd_flags, 2), TFM_ERROR_UNSUPPORTED, "unknown flags");
#undef SPOILED
    tfm_file_close(golden);
}

/* A tokenizer without a rule for pairs of texts says so; a single text needs none. */
static void test_without_pairs(void) {
    int32_t ids[8], types[8] = {7, 7, 7, 7, 7, 7, 7, 7};
    size_t n;
    tfm_error error;
    CHECK(tfm_tokenize_pair(model, "a", 1, "b", 1, 0, ids, types, 8, &n, &error) == TFM_ERROR_UNSUPPORTED && n == 0);
    CHECK(strstr(error.message, "pairs") != NULL);
    CHECK_OK(tfm_tokenize_pair(model, "a", 1, NULL, 0, 0, ids, types, 8, &n, &error), error);
    CHECK(n == 1 && types[0] == 0 && types[1] == 7);
}

/* The pieces that a pattern cuts a text into: each is a token, and `ignore_merges` makes it that. */
static void check_pieces(const char *pattern, int nfc, const char *text, const char *const *pieces, size_t n) {
    static const test_shape shape = {300, 4, 1, 1, 1, 4, 4, 4};
    test_tfm tfm;
    unsigned char *bytes;
    tfm_model *patterned;
    tfm_error error = {TFM_OK, ""};
    int32_t ids[64];
    size_t n_ids = 0, size, i;
    memset(&tfm, 0, sizeof tfm);
    test_put_description(&tfm, &shape);
    test_put_weights(&tfm, &shape, 1);
    test_put_tokenizer(&tfm, pieces, n);
    test_put_text(&tfm, "tokenizer.pattern", pattern);
    test_put_i64(&tfm, "tokenizer.nfc", nfc);
    test_put_i64(&tfm, "tokenizer.ignore_merges", 1);
    patterned = test_load_tfm(&tfm, &bytes);
    if (patterned) {
        CHECK_OK(tfm_tokenize(patterned, text, strlen(text), 0, ids, 64, &n_ids, &error), error);
        CHECK_MSG(n_ids == n, "%s: %lu pieces, expected %lu", pattern, (unsigned long)n_ids, (unsigned long)n);
        for (i = 0; i < n && i < n_ids; i++) {
            const char *found = tfm_token_text(patterned, ids[i], &size);
            CHECK_MSG(found && size == strlen(pieces[i]) && !memcmp(found, pieces[i], size), "%s: piece %lu is '%.*s'",
                      pattern, (unsigned long)i, (int)size, found ? found : "");
        }
    }
    tfm_free(patterned);
    free(bytes);
    test_clear(&tfm);
}

static void test_patterns(void) {
    static const char *const llama3[] = {"It", "'S", "'\xC5\xBF", " \n\n", "\tab", "123", "45", " ?!\r\n", "  ", " x"};
    static const char *const qwen2[] = {"(a\xC3\xA9", "1", "2", " \xEA\xB0\x81", "'lL", "  \r\n", "."};
    static const char *const smollm[] = {"a", "  ", "1", "2", " b", "'s", "  \n", "3"};
    check_pieces("llama3", 0, "It'S'\xC5\xBF \n\n\tab12345 ?!\r\n   x", llama3, 10);
    check_pieces("qwen2", 1,
                 "(ae\xCC\x81"
                 "12 \xE1\x84\x80\xE1\x85\xA1\xE1\x86\xA8'lL  \r\n.",
                 qwen2, 7);
    check_pieces("smollm", 0, "a  12 b's  \n3", smollm, 8);
}

void test_tokenizer(void) {
    tfm_error error;
    tfm_file *golden = golden_open("tokenizer");
    model = tfm_load(TEST_MODEL, NULL, &error);
    if (!model)
        test_fatal("%s", error.message);
    CHECK(tfm_has_tokenizer(model));
    test_golden(golden, "plain", 0);
    test_golden(golden, "special", TFM_TOKENIZE_SPECIAL);
    test_any_bytes();
    test_token_text();
    test_without_tokenizer();
    test_without_pairs();
    test_wordpiece();
    test_hostile_wordpiece();
    tfm_free(model);
    tfm_file_close(golden);
    test_patterns();
}
