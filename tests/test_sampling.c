/* Sampling: what is drawn, and how often, against the distributions that transformers' generate draws from. */
#include "test.h"

#include <math.h>

enum { MAX_VOCAB = 512, MAX_BIAS = 8 };
static const size_t draws = 40000; /* a token that may come is expected 80 times at least */

static tfm_file *golden;

/* Draws from copies of the logits; counts[vocab_size]. */
static void draw(const tfm_sampling *sampling, const float *logits, size_t vocab_size, const int32_t *history,
                 size_t n_history, uint64_t seed, size_t *counts, const char *name) {
    float copy[MAX_VOCAB];
    int32_t work[MAX_VOCAB], token = -1;
    tfm_random random;
    tfm_error error;
    size_t i;
    memset(counts, 0, vocab_size * sizeof *counts);
    tfm_random_seed(&random, seed);
    for (i = 0; i < draws; i++) {
        memcpy(copy, logits, vocab_size * sizeof *copy);
        if (tfm_sample(sampling, copy, vocab_size, history, n_history, &random, work, &token, &error) != TFM_OK ||
            token < 0 || (size_t)token >= vocab_size)
            break;
        counts[token]++;
    }
    CHECK_MSG(i == draws, "%s: token %ld, %s", name, (long)token, i < draws ? error.message : "");
}

/* The set of tokens exactly; the frequencies by Pearson's chi-square, whose mean is n - 1 and whose standard deviation is
 * sqrt(2 (n - 1)): five of those, and some for the skew at small n. A wrong distribution is off by hundreds. */
static void check_counts(const size_t *counts, const float *probabilities, size_t vocab_size, const char *name) {
    double chi_square = 0, limit;
    size_t kept = 0, i;
    for (i = 0; i < vocab_size; i++) {
        double expected = (double)probabilities[i] * (double)draws, difference = (double)counts[i] - expected;
        CHECK_MSG((counts[i] > 0) == (probabilities[i] > 0), "%s: token %lu came %lu times, its probability is %g",
                  name, (unsigned long)i, (unsigned long)counts[i], (double)probabilities[i]);
        if (probabilities[i] > 0) {
            chi_square += difference * difference / expected;
            kept++;
        }
    }
    limit = (double)(kept - 1) + 5 * sqrt(2 * (double)(kept - 1)) + (kept > 1 ? 8 : 1e-6);
    CHECK_MSG(chi_square <= limit, "%s: chi-square is %g for %lu tokens", name, chi_square, (unsigned long)kept);
}

static void test_case(size_t index) {
    char name[32];
    const int32_t *info, *history;
    const float *options, *logits, *probabilities;
    tfm_logit_bias bias[MAX_BIAS];
    tfm_sampling sampling;
    size_t vocab_size, n_history, counts[MAX_VOCAB], i;
    snprintf(name, sizeof name, "case.%lu", (unsigned long)index);
    memset(&sampling, 0, sizeof sampling);
    info = golden_ints(golden, NULL, "%s", name);
    history = golden_ints(golden, &n_history, "%s.history", name);
    vocab_size = (size_t)info[0];
    sampling.n_logit_bias = (size_t)info[2];
    if (vocab_size > MAX_VOCAB || sampling.n_logit_bias > MAX_BIAS)
        test_fatal("%s is too large", name);
    options = golden_floats(golden, 4 + sampling.n_logit_bias, "%s.options", name);
    logits = golden_floats(golden, vocab_size, "%s.logits", name);
    probabilities = golden_floats(golden, vocab_size, "%s.probabilities", name);
    for (i = 0; i < sampling.n_logit_bias; i++) {
        bias[i].token = info[3 + i];
        bias[i].bias = options[4 + i];
    }
    sampling.logit_bias = bias;
    sampling.repeat_penalty = options[0];
    sampling.temperature = options[1];
    sampling.top_k = (size_t)info[1];
    sampling.top_p = options[2];
    sampling.min_p = options[3];
    draw(&sampling, logits, vocab_size, history, n_history, index, counts, name);
    check_counts(counts, probabilities, vocab_size, name);
}

/* Tokens as likely as the k-th stay. */
static void test_ties(void) {
    const float *logits = golden_floats(golden, 7, "ties.logits");
    size_t counts[7];
    tfm_sampling sampling;
    memset(&sampling, 0, sizeof sampling);
    sampling.temperature = 1;
    sampling.top_k = 3;
    draw(&sampling, logits, 7, NULL, 0, 1, counts, "ties");
    check_counts(counts, golden_floats(golden, 7, "ties.probabilities"), 7, "ties");
}

/* The generator's numbers, as an implementation in Python's integers gives them. */
static void test_numbers(void) {
    static const struct {
        const char *name;
        uint64_t seed;
    } seeds[] = {{"0", 0}, {"1", 1}, {"123456789", 123456789}, {"18446744073709551615", UINT64_MAX}};
    size_t i, k, size;
    for (i = 0; i < sizeof seeds / sizeof *seeds; i++) {
        const unsigned char *bytes = golden_bytes(golden, &size, "random.%s", seeds[i].name);
        tfm_random random;
        tfm_random_seed(&random, seeds[i].seed);
        CHECK(size >= 16 * sizeof(double));
        for (k = 0; k < size / sizeof(double); k++) {
            double expected, found = tfm_random_uniform(&random);
            memcpy(&expected, bytes + k * sizeof expected, sizeof expected);
            CHECK_MSG(found == expected, "seed %s, number %lu: %.17g, expected %.17g", seeds[i].name, (unsigned long)k,
                      found, expected);
        }
    }
}

/* One token; -1 and *status if there is none. */
static int32_t sample(const tfm_sampling *sampling, const float *logits, size_t n, uint64_t seed, tfm_status *status) {
    float copy[MAX_VOCAB];
    int32_t work[MAX_VOCAB], token = -1;
    tfm_random random;
    tfm_error error;
    memcpy(copy, logits, n * sizeof *logits);
    tfm_random_seed(&random, seed);
    *status = tfm_sample(sampling, copy, n, NULL, 0, &random, work, &token, &error);
    return *status == TFM_OK ? token : -1;
}

static void test_greedy(void) {
    static const float equal[] = {1, 3, 2, 3, 3}, nans[] = {NAN, -1, NAN, -2}, below[] = {-INFINITY, -5, -INFINITY};
    static const float nothing[] = {NAN, -INFINITY, NAN};
    tfm_sampling sampling;
    tfm_status status;
    memset(&sampling, 0, sizeof sampling);
    CHECK(sample(&sampling, equal, 5, 0, &status) == 1); /* the lowest id among equals */
    CHECK(sample(&sampling, nans, 4, 0, &status) == 1);
    CHECK(sample(&sampling, below, 3, 0, &status) == 1);
    sample(&sampling, nothing, 3, 0, &status);
    CHECK(status == TFM_ERROR_ARGUMENT);
    sampling.temperature = 1;
    CHECK(sample(&sampling, nans, 1, 0, &status) == -1 && status == TFM_ERROR_ARGUMENT);
    CHECK(sample(&sampling, below, 3, 0, &status) == 1);
}

/* The same seed chooses the same, another one something else; NaN is never drawn. */
static void test_seeds(void) {
    float logits[100];
    size_t i, differ = 0, nan = 0;
    tfm_sampling sampling;
    memset(&sampling, 0, sizeof sampling);
    sampling.temperature = 1;
    test_fill(logits, 100, 3);
    for (i = 0; i < 50; i++)
        logits[2 * i] = NAN;
    for (i = 0; i < 200; i++) {
        tfm_status status;
        int32_t token = sample(&sampling, logits, 100, i, &status);
        CHECK(token == sample(&sampling, logits, 100, i, &status));
        differ += token != sample(&sampling, logits, 100, i + 1, &status);
        nan += token < 0 || token % 2 == 0;
    }
    CHECK_MSG(differ > 150, "only %lu of 200 differ", (unsigned long)differ);
    CHECK(nan == 0);
}

static void check_refused(tfm_sampling sampling) {
    static const float logits[] = {1, 2, 3};
    tfm_status status;
    CHECK(sample(&sampling, logits, 3, 0, &status) == -1 && status == TFM_ERROR_ARGUMENT);
}

static void test_refused(void) {
    static const tfm_logit_bias outside[] = {{3, 1.0f}, {-1, 1.0f}};
    tfm_sampling bad;
    memset(&bad, 0, sizeof bad);
#define REFUSE(field, value)                                                                                           \
    do {                                                                                                               \
        tfm_sampling one = bad;                                                                                        \
        one.field = value;                                                                                             \
        check_refused(one);                                                                                            \
    } while (0)
    REFUSE(temperature, -1);
    REFUSE(temperature, NAN);
    REFUSE(temperature, INFINITY);
    REFUSE(top_p, -0.1f);
    REFUSE(top_p, 1.1f);
    REFUSE(min_p, NAN);
    REFUSE(min_p, 2);
    REFUSE(repeat_penalty, -1);
#undef REFUSE
    bad.n_logit_bias = 1;
    bad.logit_bias = outside;
    check_refused(bad);
    bad.logit_bias = outside + 1;
    check_refused(bad);
}

void test_sampling(void) {
    size_t n, i;
    golden = golden_open("sampling");
    n = (size_t)*golden_ints(golden, NULL, "case");
    CHECK(n > 20);
    for (i = 0; i < n; i++)
        test_case(i);
    test_ties();
    test_numbers();
    test_greedy();
    test_seeds();
    test_refused();
    tfm_file_close(golden);
}
