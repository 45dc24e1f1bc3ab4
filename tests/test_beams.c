/* Encoder-decoders and beam search against transformers; several prompts side by side give what each gives alone, on any
 * number of threads; wrong arguments, and memory that is not to be had. */
#include "test.h"

#include <math.h>

#define TOLERANCE 5e-5 /* the random weights make sharp attention: transformers in fp32 is off by as much */
#define N_MOST 16      /* prompts, and cases, at most */
#define TOKENS_MOST 160

static tfm_file *golden;

/* A golden model on one instruction set, and its inputs: sources of an encoder-decoder, prompts of a decoder. */
typedef struct subject {
    const char *name;
    const tfm_model *model;
    int answers; /* 1: an encoder-decoder */
    tfm_isa isa;
    int threads;
    size_t n_inputs;
    int32_t ids[N_MOST][TOKENS_MOST];
    tfm_text inputs[N_MOST];
} subject;

/* One case of make_golden.py's BEAM_CASES. */
typedef struct beam_case {
    size_t n_inputs;
    const int32_t *inputs; /* which of the subject's */
    const int32_t *sizes, *ids;
    const float *scores; /* NULL for greedy text */
    tfm_beam_options options;
} beam_case;

static int read_case(const subject *s, size_t index, beam_case *c) {
    char key[64];
    const tfm_meta *meta;
    const int32_t *o;
    size_t n;
    snprintf(key, sizeof key, "%s.%lu.options", s->name, (unsigned long)index);
    meta = tfm_file_find_meta(golden, key);
    memset(c, 0, sizeof *c);
    if (!meta)
        return 0;
    o = (const int32_t *)meta->values;
    c->options.max_tokens = (size_t)o[0];
    c->options.beams = (size_t)o[1];
    c->options.n_best = (size_t)o[2];
    c->options.min_tokens = (size_t)o[3];
    c->options.early_stopping = (tfm_early_stopping)o[4];
    c->options.length_penalty = (float)o[5] / 1000;
    c->options.no_length_penalty = !o[5];
    c->options.no_repeat_ngram = (size_t)o[6];
    c->inputs = golden_ints(golden, &c->n_inputs, "%s.%lu.inputs", s->name, (unsigned long)index);
    c->sizes = golden_ints(golden, &n, "%s.%lu.sizes", s->name, (unsigned long)index);
    c->ids = golden_ints(golden, NULL, "%s.%lu.ids", s->name, (unsigned long)index);
    if (c->options.beams > 1)
        c->scores = golden_floats(golden, n, "%s.%lu.scores", s->name, (unsigned long)index);
    return CHECK(n == c->n_inputs * c->options.n_best);
}

static const char *where(const subject *s, const char *what, size_t index) {
    return test_text("%s on %s, %d threads: %s %lu", s->name, tfm_isa_name(s->isa), s->threads, what,
                     (unsigned long)index);
}

static tfm_session *open_session(const subject *s, size_t n_sequences) {
    tfm_session_options options;
    tfm_session *session;
    tfm_error error;
    memset(&options, 0, sizeof options);
    options.n_sequences = n_sequences;
    options.engine.isa = s->isa;
    options.engine.threads = s->threads;
    if (!s->threads)
        options.engine.parallel_for = test_backwards;
    session = tfm_session_create(s->model, &options, &error);
    if (!session)
        test_fatal("%s: %s", s->name, error.message);
    return session;
}

/* The prompt of an input, in that sequence: it is the sequence's source, and the prompt empty, or it is the prompt. */
static tfm_prompt set_input(const subject *s, tfm_session *session, size_t input, size_t sequence) {
    tfm_prompt prompt = {NULL, 0};
    tfm_error error;
    if (s->answers)
        CHECK_OK(tfm_set_source(session, sequence, s->inputs + input, &error), error);
    else {
        prompt.tokens = s->inputs[input].tokens;
        prompt.n_tokens = s->inputs[input].n_tokens;
    }
    return prompt;
}

/* ---- the encoder, the decoder */

static void test_outputs(const subject *s) {
    const tfm_description *d = tfm_model_description(s->model);
    const tfm_text *text = s->inputs + 5;
    size_t n, i, n_logits = golden_tensor(golden, "t5.logits").shape[0];
    const int32_t *decoder_ids = golden_ints(golden, &n, "t5.decoder_ids");
    float *hidden = (float *)test_allocate(text->n_tokens * d->d_model * sizeof *hidden);
    float *logits = (float *)test_allocate(n * d->vocab_size * sizeof *logits);
    float *some = (float *)test_allocate(n_logits * d->vocab_size * sizeof *logits);
    tfm_session *session = open_session(s, 1);
    tfm_chunk chunk;
    tfm_error error;
    CHECK_OK(tfm_encode(session, text, 1, TFM_HIDDEN, hidden, &error), error);
    CHECK_CLOSE(hidden, golden_floats(golden, text->n_tokens * d->d_model, "t5.encoded"), text->n_tokens * d->d_model,
                TOLERANCE, where(s, "encoder", 0));
    CHECK_OK(tfm_set_source(session, 0, text, &error), error);
    memset(&chunk, 0, sizeof chunk);
    chunk.tokens = decoder_ids;
    chunk.n_tokens = chunk.n_outputs = n;
    CHECK_OK(tfm_eval(session, &chunk, 1, TFM_LOGITS, logits, &error), error);
    for (i = 0; i < n_logits; i++)
        memcpy(some + i * d->vocab_size, logits + 23 * i * d->vocab_size, d->vocab_size * sizeof *some);
    CHECK_CLOSE(some, golden_floats(golden, n_logits * d->vocab_size, "t5.logits"), n_logits * d->vocab_size, TOLERANCE,
                where(s, "decoder", 0));
    tfm_session_free(session);
    free(hidden);
    free(logits);
    free(some);
}

/* ---- text */

typedef struct written {
    char text[2000];
    size_t size;
} written;

static int write_text(void *user, const char *text, size_t size) {
    written *w = (written *)user;
    if (size > sizeof w->text - w->size)
        return 1;
    memcpy(w->text + w->size, text, size);
    w->size += size;
    return 0;
}

static void test_answers(const subject *s) {
    size_t n, i;
    const int32_t *sizes = golden_ints(golden, &n, "t5.texts.sizes"),
                  *answers = golden_ints(golden, NULL, "t5.answers.sizes");
    const char *text = (const char *)golden_bytes(golden, NULL, "t5.texts.text");
    const char *expected = (const char *)golden_bytes(golden, NULL, "t5.answers.text");
    tfm_session *session = open_session(s, 2);
    tfm_generate_options options;
    tfm_error error;
    memset(&options, 0, sizeof options);
    options.max_tokens = 30;
    options.sequence = 1;
    for (i = 0; i < n; text += sizes[i], expected += answers[i], i++) {
        const char *prompt = test_text("%.*s", (int)sizes[i], text);
        written w;
        w.size = 0;
        CHECK_OK(tfm_generate(session, prompt, &options, write_text, &w, &error), error);
        CHECK_MSG(w.size == (size_t)answers[i] && !memcmp(w.text, expected, w.size), "%s: '%.*s', expected '%.*s'",
                  where(s, "answer", i), (int)w.size, w.text, (int)answers[i], expected);
    }
    CHECK(tfm_generate(session, "", &options, NULL, NULL, &error) == TFM_OK); /* </s> alone is a text */
    tfm_session_free(session);
}

/* ---- the golden cases */

/* Whether a result is what transformers gave. */
static void check_result(const subject *s, const beam_case *c, size_t index, const tfm_result *results, size_t n) {
    const int32_t *ids = c->ids;
    size_t i;
    for (i = 0; i < n; ids += c->sizes[i], i++) {
        const tfm_result *result = results + i;
        CHECK_MSG(result->n_tokens == (size_t)c->sizes[i] &&
                      !memcmp(result->tokens, ids, result->n_tokens * sizeof *ids),
                  "%s, result %lu: other tokens (%lu)", where(s, "case", index), (unsigned long)i,
                  (unsigned long)result->n_tokens);
        CHECK(result->stop == (result->n_tokens && tfm_is_end_token(s->model, result->tokens[result->n_tokens - 1])
                                   ? TFM_STOP_END_TOKEN
                                   : TFM_STOP_MAX_TOKENS));
        if (c->scores)
            CHECK_MSG(fabsf(result->score - c->scores[i]) <= 1e-4f * (1 + fabsf(c->scores[i])),
                      "%s, result %lu: score %.7g, expected %.7g", where(s, "case", index), (unsigned long)i,
                      (double)result->score, (double)c->scores[i]);
    }
}

/* The case's inputs, all at once, from the sequence 2 on; then one after another: the same bits. */
static void test_case(const subject *s, tfm_session *session, size_t index, const beam_case *c) {
    tfm_prompt prompts[N_MOST];
    tfm_result results[N_MOST * 4], alone[4];
    float scores[N_MOST * 4];
    tfm_beam_options options = c->options;
    tfm_error error;
    size_t i, k, n = c->n_inputs * options.n_best;
    const int32_t *ids = c->ids, *sizes = c->sizes;
    memset(prompts, 0, sizeof prompts);
    options.sequence = 2;
    for (i = 0; i < c->n_inputs; i++)
        prompts[i] = set_input(s, session, (size_t)c->inputs[i], 2 + i * options.beams);
    if (!CHECK_OK(tfm_beam_search(session, prompts, c->n_inputs, &options, results, &error), error))
        return;
    check_result(s, c, index, results, n);
    for (i = 0; i < n; i++)
        scores[i] = results[i].score;
    options.sequence = 1;
    for (i = 0; i < c->n_inputs; i++) {
        tfm_prompt prompt = set_input(s, session, (size_t)c->inputs[i], 1);
        if (!CHECK_OK(tfm_beam_search(session, s->answers ? NULL : &prompt, 1, &options, alone, &error), error))
            return;
        for (k = 0; k < options.n_best; k++, ids += *sizes++)
            CHECK_MSG(alone[k].n_tokens == (size_t)*sizes &&
                          !memcmp(alone[k].tokens, ids, sizeof *ids * alone[k].n_tokens) &&
                          !memcmp(&alone[k].score, scores + i * options.n_best + k, sizeof *scores),
                      "%s: input %lu alone gives another result", where(s, "case", index), (unsigned long)i);
    }
}

typedef struct collected {
    int32_t ids[TOKENS_MOST];
    size_t n;
} collected;

static int collect(void *user, int32_t token) {
    collected *all = (collected *)user;
    all->ids[all->n++] = token;
    return all->n == TOKENS_MOST;
}

/* Greedy cases with tfm_generate_ids, and with tfm_generate_batch. */
static void test_greedy(const subject *s, tfm_session *session, size_t index, const beam_case *c) {
    tfm_generate_options options;
    tfm_prompt prompts[N_MOST];
    tfm_result results[N_MOST];
    const int32_t *ids = c->ids;
    tfm_error error;
    size_t i;
    memset(prompts, 0, sizeof prompts);
    memset(&options, 0, sizeof options);
    options.max_tokens = c->options.max_tokens;
    options.sampling.no_repeat_ngram = c->options.no_repeat_ngram;
    options.sequence = 1;
    for (i = 0; i < c->n_inputs; i++)
        prompts[i] = set_input(s, session, (size_t)c->inputs[i], 1 + i);
    CHECK_OK(tfm_generate_batch(session, prompts, c->n_inputs, &options, results, &error), error);
    check_result(s, c, index, results, c->n_inputs);
    options.on_token = collect;
    for (i = 0; i < c->n_inputs; ids += c->sizes[i], i++) {
        tfm_prompt prompt = set_input(s, session, (size_t)c->inputs[i], 1);
        collected found;
        found.n = 0;
        options.on_token_user = &found;
        CHECK_OK(tfm_generate_ids(session, prompt.tokens, prompt.n_tokens, &options, NULL, NULL, &error), error);
        CHECK_MSG(found.n == (size_t)c->sizes[i] && !memcmp(found.ids, ids, found.n * sizeof *ids),
                  "%s: tfm_generate_ids differs", where(s, "greedy", index));
    }
}

static void test_cases(const subject *s) {
    tfm_session *session = open_session(s, 2 + 4 * 7);
    beam_case c;
    size_t i;
    for (i = 0; read_case(s, i, &c); i++) {
        test_case(s, session, i, &c);
        if (c.options.beams == 1)
            test_greedy(s, session, i, &c);
    }
    CHECK(i >= 10);
    tfm_session_free(session);
}

/* ---- sampling several texts */

static void test_sampling_batch(const subject *s) {
    tfm_session *session = open_session(s, N_MOST);
    tfm_generate_options options;
    tfm_prompt prompts[N_MOST];
    tfm_result results[N_MOST];
    tfm_error error;
    size_t i, lengths = 0;
    memset(prompts, 0, sizeof prompts);
    memset(&options, 0, sizeof options);
    options.max_tokens = 25;
    options.seed = 77;
    options.sampling.temperature = 1.2f;
    options.sampling.top_p = 0.95f;
    options.sampling.repeat_penalty = 1.1f;
    for (i = 0; i < s->n_inputs; i++)
        prompts[i] = set_input(s, session, i, i);
    CHECK_OK(tfm_generate_batch(session, prompts, s->n_inputs, &options, results, &error), error);
    for (i = 0; i < s->n_inputs; i++) {
        tfm_prompt prompt = set_input(s, session, i, 3);
        tfm_generate_options one = options;
        collected found;
        found.n = 0;
        one.sequence = 3;
        one.seed = 77 + i;
        one.on_token = collect;
        one.on_token_user = &found;
        CHECK_OK(tfm_generate_ids(session, prompt.tokens, prompt.n_tokens, &one, NULL, NULL, &error), error);
        CHECK_MSG(found.n == results[i].n_tokens && !memcmp(found.ids, results[i].tokens, found.n * sizeof(int32_t)),
                  "%s: beside others another text", where(s, "sampling", i));
        lengths += results[i].n_tokens < 25;
    }
    CHECK(lengths > 0 && lengths < s->n_inputs); /* some ended before others */
    options.on_token = collect;
    CHECK(tfm_generate_batch(session, prompts, 1, &options, results, &error) == TFM_ERROR_ARGUMENT);
    tfm_session_free(session);
}

/* ---- an int8 cache: beams that share and copy pages find what a search finds that evaluates every beam's whole text
 * afresh, at each step, in a sequence of its own */

enum { AFRESH_PROMPT = 121, AFRESH_NEW = 12, AFRESH_BEAMS = 3 }; /* past the end of a page */

typedef struct fresh_beam {
    int32_t tokens[AFRESH_PROMPT + AFRESH_NEW];
    double score;
} fresh_beam;

static tfm_session *open_int8(const subject *s, size_t n_sequences) {
    tfm_session_options options;
    tfm_session *session;
    tfm_error error;
    memset(&options, 0, sizeof options);
    options.n_sequences = n_sequences;
    options.kv_dtype = TFM_I8;
    options.engine.isa = s->isa;
    options.engine.threads = s->threads;
    session = tfm_session_create(s->model, &options, &error);
    if (!session)
        test_fatal("%s: %s", s->name, error.message);
    return session;
}

/* The log-probabilities of what comes after n tokens; -INFINITY for what ends a text. */
static void score_afresh(const subject *s, tfm_session *session, const int32_t *tokens, size_t n, float *logits) {
    const size_t vocab_size = tfm_model_description(s->model)->vocab_size;
    double sum = 0;
    float largest = -INFINITY;
    tfm_chunk chunk;
    tfm_error error;
    size_t i;
    memset(&chunk, 0, sizeof chunk);
    chunk.tokens = tokens;
    chunk.n_tokens = n;
    chunk.n_outputs = 1;
    CHECK_OK(tfm_truncate(session, 0, 0, &error), error);
    CHECK_OK(tfm_eval(session, &chunk, 1, TFM_LOGITS, logits, &error), error);
    for (i = 0; i < vocab_size; i++)
        largest = logits[i] > largest ? logits[i] : largest;
    for (i = 0; i < vocab_size; i++)
        sum += exp((double)(logits[i] - largest));
    for (i = 0; i < vocab_size; i++)
        logits[i] = tfm_is_end_token(s->model, (int32_t)i) ? -INFINITY : logits[i] - largest - (float)log(sum);
}

/* From one beam, the prompt, to AFRESH_BEAMS of AFRESH_NEW tokens, best first. */
static void search_afresh(const subject *s, tfm_session *session, fresh_beam *beams) {
    const size_t vocab_size = tfm_model_description(s->model)->vocab_size;
    float *scores = (float *)test_allocate(AFRESH_BEAMS * vocab_size * sizeof *scores);
    size_t n_beams = 1, n, b, i, k;
    beams->score = 0;
    for (n = AFRESH_PROMPT; n < AFRESH_PROMPT + AFRESH_NEW; n++) {
        fresh_beam next[AFRESH_BEAMS];
        for (b = 0; b < n_beams; b++)
            score_afresh(s, session, beams[b].tokens, n, scores + b * vocab_size);
        for (k = 0; k < AFRESH_BEAMS; k++) {
            size_t best = 0;
            double most = -(double)INFINITY;
            for (i = 0; i < n_beams * vocab_size; i++)
                if (beams[i / vocab_size].score + (double)scores[i] > most) {
                    most = beams[i / vocab_size].score + (double)scores[i];
                    best = i;
                }
            next[k] = beams[best / vocab_size];
            next[k].tokens[n] = (int32_t)(best % vocab_size);
            next[k].score = most;
            scores[best] = -INFINITY; /* chosen */
        }
        memcpy(beams, next, sizeof next);
        n_beams = AFRESH_BEAMS;
    }
    free(scores);
}

static void test_int8_beams(const subject *s) {
    tfm_session *session = open_int8(s, 2 * AFRESH_BEAMS), *one = open_int8(s, 1);
    const size_t vocab_size = tfm_model_description(s->model)->vocab_size;
    static fresh_beam expected[2][AFRESH_BEAMS];
    tfm_beam_options options;
    tfm_prompt prompts[2];
    tfm_result results[2 * AFRESH_BEAMS];
    tfm_error error;
    uint64_t state = 9;
    size_t i, k;
    memset(&options, 0, sizeof options);
    options.beams = options.n_best = AFRESH_BEAMS;
    options.max_tokens = options.min_tokens = AFRESH_NEW;
    options.no_length_penalty = 1;
    for (i = 0; i < 2; i++) {
        for (k = 0; k < AFRESH_PROMPT; k++)
            expected[i]->tokens[k] = (int32_t)test_random(&state, vocab_size);
        set_input(s, one, 3 + i, 0);
        search_afresh(s, one, expected[i]);
        set_input(s, session, 3 + i, i * AFRESH_BEAMS);
        prompts[i].tokens = expected[i]->tokens; /* the prompt is the beginning of every beam */
        prompts[i].n_tokens = AFRESH_PROMPT;
    }
    CHECK_OK(tfm_beam_search(session, prompts, 2, &options, results, &error), error);
    for (i = 0; i < 2 * AFRESH_BEAMS; i++) {
        const fresh_beam *beam = &expected[i / AFRESH_BEAMS][i % AFRESH_BEAMS];
        CHECK_MSG(results[i].n_tokens == AFRESH_NEW &&
                      !memcmp(results[i].tokens, beam->tokens + AFRESH_PROMPT, AFRESH_NEW * sizeof(int32_t)),
                  "%s: other tokens than afresh", where(s, "int8 beam", i));
        CHECK_MSG(fabs((double)results[i].score - beam->score) < 1e-4, "%s: score %.7g, afresh %.7g",
                  where(s, "int8 beam", i), (double)results[i].score, beam->score);
    }
    tfm_session_free(session);
    tfm_session_free(one);
}

/* The decoder's logits with an int8 cache, of itself and of the encoder's results: near those with fp32, and with the same
 * bits token by token as in one pass, and beside another sequence. (The attention is sharp: with keys and values rounded alike
 * PyTorch loses 0.089, too.) */
static void test_int8_decoder(const subject *s) {
    enum { LENGTH = 20 };
    const size_t vocab_size = tfm_model_description(s->model)->vocab_size, size = LENGTH * vocab_size;
    float *fp32 = (float *)test_allocate(size * sizeof *fp32), *whole = (float *)test_allocate(size * sizeof *whole);
    float *steps = (float *)test_allocate(2 * size * sizeof *steps);
    tfm_session *exact = open_session(s, 1), *session = open_int8(s, 2);
    const int32_t *ids = golden_ints(golden, NULL, "t5.decoder_ids");
    tfm_chunk chunks[2];
    tfm_error error;
    double squares = 0, differences = 0;
    size_t i;
    memset(chunks, 0, sizeof chunks);
    chunks[0].tokens = ids;
    chunks[0].n_tokens = chunks[0].n_outputs = LENGTH;
    CHECK_OK(tfm_set_source(exact, 0, s->inputs + 5, &error), error);
    CHECK_OK(tfm_eval(exact, chunks, 1, TFM_LOGITS, fp32, &error), error);
    CHECK_OK(tfm_set_source(session, 0, s->inputs + 5, &error), error);
    CHECK_OK(tfm_eval(session, chunks, 1, TFM_LOGITS, whole, &error), error);
    for (i = 0; i < size; i++) {
        squares += (double)fp32[i] * (double)fp32[i];
        differences += ((double)whole[i] - (double)fp32[i]) * ((double)whole[i] - (double)fp32[i]);
    }
    CHECK_MSG(differences > 0 && differences < 0.12 * 0.12 * squares, "%s: %g of fp32's logits is lost",
              where(s, "int8 cache", 0), sqrt(differences / squares));
    CHECK_OK(tfm_set_source(session, 1, s->inputs + 5, &error), error);
    CHECK_OK(tfm_set_source(session, 0, s->inputs + 4, &error), error);
    for (i = 0; i < LENGTH; i++) {
        chunks[0].tokens = chunks[1].tokens = ids + i;
        chunks[0].n_tokens = chunks[0].n_outputs = chunks[1].n_tokens = chunks[1].n_outputs = 1;
        chunks[1].sequence = 1;
        CHECK_OK(tfm_eval(session, chunks, 2, TFM_LOGITS, steps + i * vocab_size, &error), error);
        memmove(steps + i * vocab_size, steps + (i + 1) * vocab_size, vocab_size * sizeof *steps); /* the second's */
    }
    CHECK_SAME(steps, whole, size, where(s, "int8 cache, token by token", 0));
    tfm_session_free(exact);
    tfm_session_free(session);
    free(fp32);
    free(whole);
    free(steps);
}

/* ---- what is not right */

#define CHECK_ERROR(call, expected, words, error)                                                                      \
    do {                                                                                                               \
        CHECK((call) == (expected));                                                                                   \
        CHECK_MSG(strstr((error).message, words) != NULL, "'%s' does not say '%s'", (error).message, words);           \
    } while (0)

static void test_wrong_options(const subject *s) {
    tfm_session *session = open_session(s, 8);
    tfm_prompt prompts[3];
    tfm_result results[16];
    tfm_beam_options options;
    tfm_error error;
    const int32_t wrong = 1000000;
    size_t i;
    memset(prompts, 0, sizeof prompts);
    memset(&options, 0, sizeof options);
    options.max_tokens = 5;
    for (i = 0; i < 3; i++)
        prompts[i] = set_input(s, session, i, 4 * (i % 2));
    CHECK_ERROR(tfm_beam_search(session, prompts, 3, &options, results, &error), TFM_ERROR_ARGUMENT, "8 sequences",
                error);
    options.beams = 9;
    CHECK_ERROR(tfm_beam_search(session, prompts, 1, &options, results, &error), TFM_ERROR_ARGUMENT, "9 beams", error);
    options.beams = (size_t)-1;
    CHECK_ERROR(tfm_beam_search(session, prompts, 1, &options, results, &error), TFM_ERROR_ARGUMENT, "beams", error);
    options.beams = 4;
    options.n_best = 5;
    CHECK_ERROR(tfm_beam_search(session, prompts, 1, &options, results, &error), TFM_ERROR_ARGUMENT, "5 results",
                error);
    options.n_best = 4;
    options.length_penalty = NAN;
    CHECK_ERROR(tfm_beam_search(session, prompts, 1, &options, results, &error), TFM_ERROR_ARGUMENT, "length penalty",
                error);
    options.length_penalty = 0;
    options.early_stopping = (tfm_early_stopping)7;
    CHECK_ERROR(tfm_beam_search(session, prompts, 1, &options, results, &error), TFM_ERROR_ARGUMENT, "early stopping",
                error);
    options.early_stopping = TFM_STOP_UNLIKELY;
    options.max_tokens = 100000;
    CHECK_ERROR(tfm_beam_search(session, prompts, 1, &options, results, &error), TFM_ERROR_CONTEXT_FULL, "100000",
                error);
    options.max_tokens = (size_t)-1;
    CHECK_ERROR(tfm_beam_search(session, prompts, 1, &options, results, &error), TFM_ERROR_CONTEXT_FULL, "room", error);
    options.max_tokens = 5;
    prompts[1].tokens = &wrong;
    prompts[1].n_tokens = 1;
    CHECK_ERROR(tfm_beam_search(session, prompts, 2, &options, results, &error), TFM_ERROR_ARGUMENT, "out of range",
                error);
    CHECK_OK(tfm_beam_search(session, prompts, 0, &options, results, &error), error);
    prompts[0] = set_input(s, session, 0, 0); /* and after all that it still works, on all sequences */
    prompts[1] = set_input(s, session, 1, 4);
    CHECK_OK(tfm_beam_search(session, prompts, 2, &options, results, &error), error);
    CHECK(results[0].n_tokens > 0 && results[4].n_tokens > 0 && results[0].score >= results[1].score);
    if (s->answers) { /* the first sequence keeps its source, the others lose theirs */
        tfm_generate_options generate;
        memset(&generate, 0, sizeof generate);
        generate.max_tokens = 3;
        CHECK_OK(tfm_generate_ids(session, NULL, 0, &generate, NULL, NULL, &error), error);
        generate.sequence = 1;
        CHECK_ERROR(tfm_generate_ids(session, NULL, 0, &generate, NULL, NULL, &error), TFM_ERROR_ARGUMENT,
                    "tfm_set_source", error);
        options.sequence = 1;
        CHECK_ERROR(tfm_beam_search(session, NULL, 1, &options, results, &error), TFM_ERROR_ARGUMENT, "tfm_set_source",
                    error);
    } else
        CHECK_ERROR(tfm_beam_search(session, NULL, 1, &options, results, &error), TFM_ERROR_ARGUMENT, "empty", error);
    tfm_session_free(session);
}

/* A text that fills the context to its last token, which needs no room; and what no_repeat_ngram leaves when every token
 * has come: nothing. */
static void test_full(const subject *s) {
    const size_t context = 140;
    tfm_session_options session_options;
    tfm_session *session;
    tfm_beam_options options;
    tfm_result results[2];
    tfm_error error;
    tfm_prompt prompts[2];
    size_t i;
    memset(&session_options, 0, sizeof session_options);
    memset(&options, 0, sizeof options);
    session_options.context = context;
    session_options.n_sequences = 6;
    session = tfm_session_create(s->model, &session_options, &error);
    if (!CHECK_MSG(session != NULL, "%s", error.message))
        return;
    for (i = 0; i < 2; i++)
        prompts[i] = set_input(s, session, i, 3 * i);
    options.beams = 3;
    options.min_tokens = context;
    CHECK_OK(tfm_beam_search(session, prompts, 2, &options, results, &error), error);
    for (i = 0; i < 2; i++)
        CHECK(results[i].n_tokens == context + 1 - (s->answers ? 1 : s->inputs[i].n_tokens));
    if (tfm_model_description(s->model)->vocab_size < context) {
        options.no_repeat_ngram = 1;
        CHECK_ERROR(tfm_beam_search(session, prompts, 2, &options, results, &error), TFM_ERROR_ARGUMENT,
                    "no token can be chosen", error);
    }
    tfm_session_free(session);
}

/* ---- memory: every allocation fails once; a second search of the same size allocates nothing */

static tfm_status search_with(const subject *s, const tfm_allocator *allocator, test_heap *heap) {
    tfm_session_options session_options;
    tfm_session *session;
    tfm_beam_options options;
    tfm_result results[2];
    tfm_prompt prompts[2];
    tfm_error error = {TFM_OK, ""};
    size_t count = 0, i, run;
    memset(&session_options, 0, sizeof session_options);
    memset(&options, 0, sizeof options);
    session_options.n_sequences = 8;
    session_options.engine.allocator = *allocator;
    session_options.engine.threads = 1;
    options.max_tokens = 4;
    session = tfm_session_create(s->model, &session_options, &error);
    for (run = 0; session && run < 2 && error.status == TFM_OK; run++) {
        for (i = 0; i < 2; i++)
            prompts[i] = set_input(s, session, i, 4 * i);
        tfm_beam_search(session, prompts, 2, &options, results, &error);
        if (run && error.status == TFM_OK)
            CHECK_MSG(heap->count == count, "%s: the second search allocates", s->name);
        count = heap->count;
    }
    tfm_session_free(session);
    return error.status;
}

static void test_memory_of(const subject *s) {
    test_heap heap;
    tfm_allocator allocator;
    size_t total, n;
    memset(&heap, 0, sizeof heap);
    allocator = test_allocator(&heap);
    CHECK(search_with(s, &allocator, &heap) == TFM_OK);
    CHECK(!heap.live && !heap.bad);
    total = heap.count;
    for (n = 1; n <= total; n++) {
        memset(&heap, 0, sizeof heap);
        heap.fail_at = n;
        CHECK_MSG(search_with(s, &allocator, &heap) == TFM_ERROR_MEMORY, "%s: allocation %lu of %lu may fail unseen",
                  s->name, (unsigned long)n, (unsigned long)total);
        CHECK(!heap.live && !heap.bad);
    }
}

/* ---- */

static void read_inputs(subject *s) {
    const int32_t *counts = golden_ints(golden, &s->n_inputs, "%s.inputs.counts", s->name);
    const unsigned char *ids = golden_bytes(golden, NULL, "%s.inputs.ids", s->name);
    size_t i, k;
    if (s->n_inputs > N_MOST)
        test_fatal("%s: %lu inputs", s->name, (unsigned long)s->n_inputs);
    for (i = 0; i < s->n_inputs; i++) {
        if (counts[i] > TOKENS_MOST)
            test_fatal("%s: an input of %ld tokens", s->name, (long)counts[i]);
        for (k = 0; k < (size_t)counts[i]; k++, ids += 2)
            s->ids[i][k] = ids[0] | ids[1] << 8;
        s->inputs[i].tokens = s->ids[i];
        s->inputs[i].n_tokens = (size_t)counts[i];
    }
}

static void test_model(const char *name, const char *path) {
    static subject s;
    tfm_isa isas[TFM_ISA_COUNT];
    size_t n_isas = test_isas(isas), i;
    tfm_error error;
    tfm_model *model = tfm_load(path, NULL, &error);
    if (!model)
        test_fatal("%s", error.message);
    memset(&s, 0, sizeof s);
    s.name = name;
    s.model = model;
    s.answers = tfm_model_description(model)->kind == TFM_ENCODER_DECODER;
    CHECK(tfm_start_token(model) == (s.answers ? 0 : -1));
    read_inputs(&s);
    for (i = 0; i < n_isas; i++) {
        s.isa = isas[i];
        s.threads = 1;
        if (s.answers)
            test_outputs(&s);
        test_cases(&s);
        test_int8_beams(&s);
        if (s.answers)
            test_int8_decoder(&s);
    }
    for (s.threads = 3; s.threads >= 0; s.threads -= 3) /* and backwards */
        test_cases(&s);
    s.threads = 1;
    if (s.answers)
        test_answers(&s);
    test_sampling_batch(&s);
    test_wrong_options(&s);
    test_full(&s);
    test_memory_of(&s);
    tfm_free(model);
}

void test_beams(void) {
    golden = golden_open("beams");
    test_model("t5", "tests/golden/beams_t5.tfm");
    test_model("gpt2", "tests/golden/beams_gpt2.tfm");
    tfm_file_close(golden);
}
