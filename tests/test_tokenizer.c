/* The demo model's tokenizer against transformers' GPT2TokenizerFast, on a few hundred nasty strings. */
#include "test.h"

static tfm_model *model;

/* Enough for any text here, and what must stay untouched behind. */
enum { MAX_IDS = 8192, UNTOUCHED = -7 };

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
    tfm_free(model);
    tfm_file_close(golden);
}
