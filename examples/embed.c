/* embed - turns lines of text into vectors, or ranks them by how near they are to a text
 *
 *   embed MODEL [--pool mean|cls|max] [--normalize] [--similarity QUERY] [--threads N] [--isa NAME] < lines
 *
 * One vector for each line of the input, its numbers separated by spaces; an empty line has the vector of what the
 * tokenizer adds to every text, as [CLS] and [SEP]. How vectors are made of tokens is the model's own way unless --pool
 * says another. --similarity prints the lines instead, each behind its cosine with QUERY and a tab, the best first. A
 * model of sentences may say at how many tokens texts should be cut; without that a line that is too long is an error,
 * which is found before any of the BATCH lines that are encoded with it is printed. Lines end with LF or CR LF; the last
 * one need not. What is no UTF-8 the tokenizer takes as U+FFFD, or, byte by byte, as it is. When there are many lines,
 * progress goes to stderr if that is a terminal and no vectors go to it.
 * Exit status: 0, 1 for errors, 2 for wrong usage.
 */
#define _POSIX_C_SOURCE 200809L
#define TFM_IMPLEMENTATION
#include "../tfm.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BATCH 64 /* lines that are encoded together: they share each read of the weights */

static const char usage_text[] = "usage: embed MODEL [--pool mean|cls|max] [--normalize] [--similarity QUERY]\n"
                                 "             [--threads N] [--isa NAME] < lines\n";

typedef struct arguments {
    const char *model, *query, *isa;
    tfm_pooling pooling;
    int normalize, threads;
} arguments;

static int usage(const char *what, const char *which) {
    fprintf(stderr, "embed: %s%s\n%s", what, which, usage_text);
    return 2;
}

static int fail(const char *message) {
    fprintf(stderr, "embed: %s\n", message);
    return 1;
}

/* ---- the command line */

static int parse_pooling(const char *name, tfm_pooling *pooling) {
    static const char *const names[] = {"", "cls", "mean", "max"}; /* in tfm_pooling's order */
    int i;
    for (i = 1; i < 4; i++)
        if (!strcmp(name, names[i]))
            *pooling = (tfm_pooling)i;
    return *pooling != TFM_NO_POOLING;
}

static int parse_threads(const char *text, int *threads) {
    char *end;
    long n = strtol(text, &end, 10);
    *threads = (int)n;
    return *text && !*end && n >= 1 && n <= 1024;
}

static int parse(int argc, char **argv, arguments *args) {
    int i;
    for (i = 1; i < argc; i++) {
        const char *option = argv[i];
        if (!strcmp(option, "--normalize"))
            args->normalize = 1;
        else if (option[0] != '-') {
            if (args->model)
                return usage("one argument too many: ", option);
            args->model = option;
        } else if (strcmp(option, "--pool") && strcmp(option, "--similarity") && strcmp(option, "--threads") &&
                   strcmp(option, "--isa"))
            return usage("unknown option ", option);
        else if (++i == argc)
            return usage("a value is missing after ", option);
        else if (!strcmp(option, "--similarity"))
            args->query = argv[i];
        else if (!strcmp(option, "--isa"))
            args->isa = argv[i];
        else if (!strcmp(option, "--pool") && !parse_pooling(argv[i], &args->pooling))
            return usage("--pool: expected mean, cls or max, found ", argv[i]);
        else if (!strcmp(option, "--threads") && !parse_threads(argv[i], &args->threads))
            return usage("--threads: expected a number from 1 to 1024, found ", argv[i]);
    }
    return args->model ? 0 : usage("MODEL is missing", "");
}

/* ---- lines */

/* All of standard input, with a zero behind it; the caller frees it. NULL if it can't be read. */
static char *read_input(size_t *size) {
    size_t capacity = 1 << 16;
    char *text = (char *)malloc(capacity + 1), *larger;
    *size = 0;
    while (text && (*size += fread(text + *size, 1, capacity - *size, stdin)) == capacity) {
        larger = (char *)realloc(text, (capacity *= 2) + 1);
        if (!larger)
            free(text);
        text = larger;
    }
    if (text && ferror(stdin)) {
        free(text);
        return NULL;
    }
    if (text)
        text[*size] = 0;
    return text;
}

typedef struct line {
    const char *text;
    size_t size;
    double similarity;
} line;

/* The lines of a text; the caller frees them. */
static line *split_lines(const char *text, size_t size, size_t *n_lines) {
    const char *end = text + size, *at;
    size_t n = 1;
    line *lines;
    for (at = text; at < end; at++)
        n += *at == '\n';
    lines = (line *)calloc(n, sizeof *lines);
    for (*n_lines = 0; lines && text < end; text = at + 1) {
        at = (const char *)memchr(text, '\n', (size_t)(end - text));
        at = at ? at : end;
        lines[*n_lines].text = text;
        lines[(*n_lines)++].size = (size_t)(at - text) - (at > text && at[-1] == '\r');
    }
    return lines;
}

/* ---- vectors */

static tfm_status fail_memory(tfm_error *error) {
    snprintf(error->message, sizeof error->message, "out of memory");
    return error->status = TFM_ERROR_MEMORY;
}

/* Cuts ids to `most`, but keeps what the tokenizer adds behind a text: n_end ids. */
static size_t cut(int32_t *ids, size_t n, size_t n_end, size_t most) {
    if (n <= most || n_end > most)
        return n;
    memmove(ids + most - n_end, ids + n - n_end, n_end * sizeof *ids);
    return most;
}

/* How many ids the tokenizer adds behind each text: those after the place where a text's own stand. */
static tfm_status count_end(const tfm_model *model, size_t *n_end, tfm_error *error) {
    int32_t own, ids[64];
    size_t n_own, n, i = 0;
    tfm_status status = tfm_tokenize(model, "a", 1, TFM_TOKENIZE_PLAIN, &own, 1, &n_own, error);
    if (status == TFM_OK)
        status = tfm_tokenize(model, "a", 1, 0, ids, 64, &n, error);
    if (status != TFM_OK)
        return status;
    while (n_own && i < n && i < 64 && ids[i] != own)
        i++;
    *n_end = i + n_own <= n ? n - i - n_own : 0;
    return TFM_OK;
}

/* The ids of a line; text->tokens is the caller's to free, also after an error. */
static tfm_status tokenize(const tfm_model *model, const line *from, size_t n_end, tfm_text *text, tfm_error *error) {
    const tfm_description *d = tfm_model_description(model);
    int32_t *ids;
    size_t n;
    tfm_status status = tfm_tokenize(model, from->text, from->size, 0, NULL, 0, &n, error);
    if (status != TFM_OK)
        return status;
    ids = (int32_t *)malloc((n + 1) * sizeof *ids);
    if (!ids)
        return fail_memory(error);
    text->tokens = ids;
    status = tfm_tokenize(model, from->text, from->size, 0, ids, n, &n, error);
    text->n_tokens = d->pool_max_tokens ? cut(ids, n, n_end, d->pool_max_tokens) : n;
    if (status == TFM_OK && text->n_tokens > d->encoder.n_positions) {
        snprintf(error->message, sizeof error->message, "the text has %lu tokens, and the model takes %lu at most",
                 (unsigned long)n, (unsigned long)d->encoder.n_positions);
        status = error->status = TFM_ERROR_CONTEXT_FULL;
    }
    return status;
}

typedef struct embedder {
    tfm_session *session;
    const tfm_model *model;
    size_t n_end, d_model;
    const arguments *args;
} embedder;

/* vectors[n][d_model] of up to BATCH lines. On an error *bad is the line that it is about, or n. */
static tfm_status embed(const embedder *e, const line *lines, size_t n, float *vectors, size_t *bad, tfm_error *error) {
    tfm_text texts[BATCH];
    tfm_status status = TFM_OK;
    size_t i;
    memset(texts, 0, sizeof texts);
    for (*bad = 0; *bad < n; ++*bad) {
        status = tokenize(e->model, lines + *bad, e->n_end, texts + *bad, error);
        if (status != TFM_OK)
            break;
    }
    if (status == TFM_OK)
        status = tfm_embed(e->session, texts, n, e->args->pooling, e->args->normalize, vectors, error);
    for (i = 0; i < n; i++)
        free((void *)texts[i].tokens);
    return status;
}

static double cosine(const float *a, const float *b, size_t n) {
    double ab = 0, aa = 0, bb = 0;
    size_t i;
    for (i = 0; i < n; i++) {
        ab += (double)a[i] * (double)b[i];
        aa += (double)a[i] * (double)a[i];
        bb += (double)b[i] * (double)b[i];
    }
    return aa > 0 && bb > 0 ? ab / sqrt(aa * bb) : 0;
}

static void print_vector(const float *vector, size_t n) {
    size_t i;
    for (i = 0; i < n; i++)
        printf(i ? " %.9g" : "%.9g", (double)vector[i]);
    putchar('\n');
}

static int compare_lines(const void *a, const void *b) {
    const line *x = (const line *)a, *y = (const line *)b;
    if (x->similarity != y->similarity)
        return x->similarity < y->similarity ? 1 : -1;
    return x->text < y->text ? -1 : 1; /* equals stay in their order */
}

/* Progress is a line on stderr that is written over: if that is a terminal, there is much to wait for, and no vectors
 * appear on the terminal meanwhile. */
static int is_progress_shown(size_t total, int is_ranking) {
    return total > 4 * BATCH && isatty(2) && (is_ranking || !isatty(1));
}

/* Prints the lines' vectors, or, where there is a query's vector, finds how near they are to it. */
static int embed_lines(const embedder *e, line *lines, size_t n_lines, const float *query) {
    float *vectors = (float *)malloc(BATCH * e->d_model * sizeof *vectors);
    const int shown = is_progress_shown(n_lines, query != NULL);
    tfm_error error = {TFM_OK, ""};
    size_t start, n = 0, i, bad;
    if (!vectors)
        return fail("out of memory");
    for (start = 0; start < n_lines; start += n) {
        n = n_lines - start < BATCH ? n_lines - start : BATCH;
        if (embed(e, lines + start, n, vectors, &bad, &error) != TFM_OK)
            break;
        for (i = 0; i < n; i++)
            if (query)
                lines[start + i].similarity = cosine(vectors + i * e->d_model, query, e->d_model);
            else
                print_vector(vectors + i * e->d_model, e->d_model);
        if (shown)
            fprintf(stderr, "\r%lu of %lu lines", (unsigned long)(start + n), (unsigned long)n_lines);
    }
    if (shown && start)
        fputc('\n', stderr);
    free(vectors);
    if (error.status == TFM_OK)
        return 0;
    if (bad == n)
        return fail(error.message);
    fprintf(stderr, "embed: line %lu: %s\n", (unsigned long)(start + bad + 1), error.message);
    return 1;
}

static int rank_lines(const embedder *e, line *lines, size_t n_lines) {
    float *vector = (float *)malloc(e->d_model * sizeof *vector);
    tfm_error error = {TFM_OK, ""};
    line query;
    size_t bad, i;
    int status;
    memset(&query, 0, sizeof query);
    query.text = e->args->query;
    query.size = strlen(query.text);
    if (!vector)
        return fail("out of memory");
    status = embed(e, &query, 1, vector, &bad, &error) == TFM_OK ? 0 : fail(error.message);
    if (!status)
        status = embed_lines(e, lines, n_lines, vector);
    free(vector);
    if (status)
        return status;
    qsort(lines, n_lines, sizeof *lines, compare_lines);
    for (i = 0; i < n_lines; i++) {
        printf("%.6f\t", lines[i].similarity);
        fwrite(lines[i].text, 1, lines[i].size, stdout);
        putchar('\n');
    }
    return 0;
}

static int run(const embedder *e) {
    size_t size, n_lines = 0;
    char *input = read_input(&size);
    line *lines = input ? split_lines(input, size, &n_lines) : NULL;
    int status;
    if (!lines)
        status = fail(input ? "out of memory" : "standard input can't be read");
    else
        status = e->args->query ? rank_lines(e, lines, n_lines) : embed_lines(e, lines, n_lines, NULL);
    if ((fflush(stdout) || ferror(stdout)) && !status)
        status = fail("standard output can't be written");
    free(lines);
    free(input);
    return status;
}

int main(int argc, char **argv) {
    arguments args;
    tfm_load_options load;
    tfm_session_options options;
    tfm_error error = {TFM_OK, ""};
    tfm_model *model = NULL;
    embedder e;
    int status;
    memset(&args, 0, sizeof args);
    memset(&load, 0, sizeof load);
    memset(&options, 0, sizeof options);
    memset(&e, 0, sizeof e);
    args.isa = getenv("TFM_ISA");
    if (argc == 2 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h")))
        return fputs(usage_text, stdout) < 0;
    status = parse(argc, argv, &args);
    if (status)
        return status;
    load.threads = options.engine.threads = args.threads;
    options.max_rows = 2048; /* a batch of short lines is one pass */
    if (tfm_isa_from_name(args.isa, &options.engine.isa, &error) == TFM_OK)
        model = tfm_load(args.model, &load, &error);
    if (model && tfm_model_description(model)->kind == TFM_DECODER) {
        snprintf(error.message, sizeof error.message, "%.300s: the model has no encoder", args.model);
        error.status = TFM_ERROR_UNSUPPORTED;
    } else if (model && count_end(model, &e.n_end, &error) == TFM_OK)
        e.session = tfm_session_create(model, &options, &error);
    if (e.session) {
        e.model = model;
        e.args = &args;
        e.d_model = tfm_model_description(model)->d_model;
        status = run(&e);
    } else
        status = fail(error.message);
    tfm_session_free(e.session);
    tfm_free(model);
    return status;
}
