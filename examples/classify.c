/* classify - what a text is: a sentiment, a topic, whether one text follows from another; or what each of its tokens is
 *
 *   classify MODEL [TEXT [TEXT2]] [--top K] [--threads N] [--isa NAME]
 *
 * Without TEXT it reads lines from standard input; a line may have two texts with a tab between them. For each text its
 * labels with their probabilities, the likeliest first, and a tab between any two: `POSITIVE 0.9987`. --top K prints K of
 * them (usually the likeliest one alone; all of them where several can be right). A model whose problem is regression has
 * values in place of probabilities. A model that classifies tokens has a line for each token (the token, a tab, its
 * labels) and an empty line after each text but the last.
 * Lines end with LF or CR LF; the last one need not. An empty line is an empty text. What is no UTF-8 the tokenizer takes
 * as U+FFFD, or, byte by byte, as it is. A text that is too long for the model is an error; the lines before it are
 * answered. When there are many lines, progress goes to stderr if that is a terminal, and stdout is not.
 * Exit status: 0, 1 for errors, 2 for wrong usage.
 */
#define _POSIX_C_SOURCE 200809L
#define TFM_IMPLEMENTATION
#include "../tfm.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BATCH 64 /* texts that are encoded together: they share each read of the weights */

static const char usage_text[] =
    "usage: classify MODEL [TEXT [TEXT2]] [--top K] [--threads N] [--isa NAME] [< lines]\n";

typedef struct arguments {
    const char *paths[3]; /* the model, the texts */
    int n_paths;
    const char *isa;
    long top, threads;
} arguments;

static int usage(const char *what, const char *which) {
    fprintf(stderr, "classify: %s%s\n%s", what, which, usage_text);
    return 2;
}

static int fail(const char *message) {
    fprintf(stderr, "classify: %s\n", message);
    return 1;
}

static tfm_status refuse(tfm_error *error, tfm_status status, const char *message) {
    snprintf(error->message, sizeof error->message, "%s", message);
    return error->status = status;
}

static int parse(int argc, char **argv, arguments *args) {
    int i;
    for (i = 1; i < argc; i++) {
        const char *option = argv[i];
        const int is_isa = !strcmp(option, "--isa"), is_top = !strcmp(option, "--top");
        char *end;
        long n;
        if (strncmp(option, "--", 2)) {
            if (args->n_paths == 3)
                return usage("one argument too many: ", option);
            args->paths[args->n_paths++] = option;
        } else if (!is_isa && !is_top && strcmp(option, "--threads"))
            return usage("unknown option ", option);
        else if (++i == argc)
            return usage("a value is missing after ", option);
        else if (is_isa)
            args->isa = argv[i];
        else {
            n = strtol(argv[i], &end, 10);
            if (!*argv[i] || *end || n < 1 || n > (is_top ? 1000000 : 1024))
                return usage(is_top ? "--top: expected a number from 1 to 1000000, found "
                                    : "--threads: expected a number from 1 to 1024, found ",
                             argv[i]);
            *(is_top ? &args->top : &args->threads) = n;
        }
    }
    return args->n_paths ? 0 : usage("MODEL is missing", "");
}

/* ---- scores */

/* Scores become probabilities: softmax if one label is right, sigmoid if any number of them may be. */
static void to_probabilities(tfm_problem problem, float *scores, size_t n) {
    double largest = -INFINITY, sum = 0;
    size_t i;
    for (i = 0; i < n; i++)
        largest = fmax(largest, (double)scores[i]);
    for (i = 0; i < n; i++)
        sum += exp((double)scores[i] - largest);
    for (i = 0; i < n; i++)
        if (problem == TFM_SINGLE_LABEL)
            scores[i] = (float)(exp((double)scores[i] - largest) / sum);
        else if (problem == TFM_MULTI_LABEL)
            scores[i] = (float)(1 / (1 + exp(-(double)scores[i])));
}

static void print_label(const tfm_model *model, size_t index) {
    size_t size;
    const char *label = tfm_model_label(model, index, &size);
    if (label)
        fwrite(label, 1, size, stdout);
    else
        printf("LABEL_%lu", (unsigned long)index);
}

/* The best `top` labels; the scores are changed. */
static void print_labels(const tfm_model *model, float *scores, size_t top) {
    const tfm_description *d = tfm_model_description(model);
    size_t i, k;
    to_probabilities(d->classifier_problem, scores, d->n_labels);
    for (k = 0; k < top && k < d->n_labels; k++) {
        size_t best = 0;
        for (i = 1; i < d->n_labels; i++)
            if (!(scores[i] <= scores[best]))
                best = i;
        if (k)
            putchar('\t');
        print_label(model, best);
        printf(" %.6f", (double)scores[best]);
        scores[best] = -INFINITY; /* it had its turn */
    }
    putchar('\n');
}

/* ---- texts */

typedef struct classifier {
    tfm_session *session;
    const tfm_model *model;
    const tfm_description *d;
    int32_t added[64]; /* the tokens that the tokenizer puts around every text: they have no labels of interest */
    size_t n_added, top, n_texts;
} classifier;

/* A text, or a pair if b is not NULL, with what becomes of it. */
typedef struct input {
    char *line; /* what a and b point into, or NULL */
    const char *a, *b;
    size_t a_size, b_size;
    int32_t *ids, *types; /* [n] */
    size_t n;
} input;

static void free_input(input *in) {
    free(in->line);
    free(in->ids);
    free(in->types);
}

static tfm_status tokenize(const classifier *c, input *in, tfm_error *error) {
    tfm_status status =
        tfm_tokenize_pair(c->model, in->a, in->a_size, in->b, in->b_size, 0, NULL, NULL, 0, &in->n, error);
    if (status != TFM_OK)
        return status;
    in->ids = (int32_t *)malloc((in->n + 1) * sizeof *in->ids);
    in->types = (int32_t *)malloc((in->n + 1) * sizeof *in->types);
    if (!in->ids || !in->types)
        return refuse(error, TFM_ERROR_MEMORY, "out of memory");
    status =
        tfm_tokenize_pair(c->model, in->a, in->a_size, in->b, in->b_size, 0, in->ids, in->types, in->n, &in->n, error);
    if (status == TFM_OK && in->n > c->d->encoder.n_positions) {
        snprintf(error->message, sizeof error->message, "the text has %lu tokens, and the model takes %lu at most",
                 (unsigned long)in->n, (unsigned long)c->d->encoder.n_positions);
        status = error->status = TFM_ERROR_CONTEXT_FULL;
    }
    return status;
}

static int is_added(const classifier *c, int32_t id) {
    size_t i;
    for (i = 0; i < c->n_added; i++)
        if (c->added[i] == id)
            return 1;
    return 0;
}

/* A line for each token of the text itself. */
static void print_tokens(const classifier *c, const input *in, float *scores) {
    size_t i;
    if (c->n_texts)
        putchar('\n');
    for (i = 0; i < in->n; i++) {
        size_t size;
        const char *text = tfm_token_text(c->model, in->ids[i], &size);
        if (is_added(c, in->ids[i]))
            continue;
        printf("%.*s\t", (int)size, size ? text : "");
        print_labels(c->model, scores + i * c->d->n_labels, c->top);
    }
}

/* How often the text gets n_labels scores. */
static size_t count_rows(const classifier *c, const input *in) {
    return c->d->classifier == TFM_TOKEN_CLASSIFIER ? in->n : 1;
}

/* Prints the labels of up to BATCH texts, whose ids are there. */
static tfm_status classify(classifier *c, const input *inputs, size_t n, tfm_error *error) {
    tfm_text texts[BATCH];
    float *scores, *at;
    tfm_status status;
    size_t rows = 0, i;
    memset(texts, 0, sizeof texts);
    for (i = 0; i < n; i++) {
        texts[i].tokens = inputs[i].ids;
        texts[i].types = c->d->n_token_types ? inputs[i].types : NULL; /* DistilBERT has BERT's tokenizer, and none */
        texts[i].n_tokens = inputs[i].n;
        rows += count_rows(c, inputs + i);
    }
    scores = at = (float *)malloc((rows * c->d->n_labels + 1) * sizeof *scores);
    if (!scores)
        return refuse(error, TFM_ERROR_MEMORY, "out of memory");
    status = tfm_encode(c->session, texts, n, TFM_CLASSES, scores, error);
    for (i = 0; status == TFM_OK && i < n; at += count_rows(c, inputs + i++) * c->d->n_labels) {
        if (c->d->classifier == TFM_TOKEN_CLASSIFIER)
            print_tokens(c, inputs + i, at);
        else
            print_labels(c->model, at, c->top);
        c->n_texts++;
    }
    free(scores);
    return status;
}

/* A line of standard input without its end; the caller frees it. *size is SIZE_MAX at the end of the input. */
static char *read_line(size_t *size) {
    size_t capacity = 256, n = 0;
    char *text = (char *)malloc(capacity), *larger;
    int c = EOF;
    while (text && (c = getchar()) != EOF && c != '\n') {
        text[n++] = (char)c;
        if (n == capacity) {
            larger = (char *)realloc(text, capacity *= 2);
            if (!larger)
                free(text);
            text = larger;
        }
    }
    *size = c == EOF && !n ? SIZE_MAX : n && text && text[n - 1] == '\r' ? n - 1 : n;
    return text;
}

/* The next line of standard input, with its ids. 0: there is none, or an error. */
static int read_input(const classifier *c, input *in, tfm_error *error) {
    char *tab;
    memset(in, 0, sizeof *in);
    in->a = in->line = read_line(&in->a_size);
    if (!in->line)
        refuse(error, TFM_ERROR_MEMORY, "out of memory");
    else if (in->a_size == SIZE_MAX && ferror(stdin))
        refuse(error, TFM_ERROR_FILE, "standard input can't be read");
    else if (in->a_size != SIZE_MAX) {
        tab = (char *)memchr(in->line, '\t', in->a_size);
        if (tab) {
            in->b = tab + 1;
            in->b_size = in->a_size - (size_t)(tab + 1 - in->line);
            in->a_size = (size_t)(tab - in->line);
        }
        if (tokenize(c, in, error) == TFM_OK)
            return 1;
    }
    free_input(in);
    return 0;
}

static tfm_status classify_lines(classifier *c, tfm_error *error) {
    const int shows = isatty(STDERR_FILENO) && !isatty(STDOUT_FILENO); /* otherwise the labels show how far it is */
    const size_t most = isatty(STDIN_FILENO) ? 1 : BATCH;              /* who types a line waits for its labels */
    tfm_error bad = {TFM_OK, ""};                                      /* of a line: those before it are answered */
    tfm_status status = TFM_OK;
    unsigned long number = 0;
    input inputs[BATCH];
    size_t n = 0, i;
    int more = 1;
    while (status == TFM_OK && more) {
        more = read_input(c, inputs + n, &bad);
        number += more || bad.status != TFM_OK;
        n += more ? 1 : 0;
        if (n && (!more || n == most)) {
            status = classify(c, inputs, n, error);
            for (i = 0; i < n; i++)
                free_input(inputs + i);
            n = 0;
            if (shows && number > BATCH)
                fprintf(stderr, "\rclassify: %lu lines", number);
        }
    }
    if (shows && number > BATCH)
        fputc('\n', stderr);
    if (status == TFM_OK && bad.status != TFM_OK) {
        snprintf(error->message, sizeof error->message, "line %lu: %.450s", number, bad.message);
        status = error->status = bad.status;
    }
    return status;
}

/* ---- the program */

static tfm_status begin(classifier *c, const tfm_model *model, const arguments *args, tfm_error *error) {
    tfm_status status = TFM_OK;
    c->model = model;
    c->d = tfm_model_description(model);
    if (!c->d->classifier)
        return refuse(error, TFM_ERROR_UNSUPPORTED, "the model has no classifier");
    c->top = args->top ? (size_t)args->top : c->d->classifier_problem == TFM_SINGLE_LABEL ? 1 : c->d->n_labels;
    status = tfm_tokenize(model, "", 0, 0, c->added, 64, &c->n_added, error);
    c->n_added = c->n_added < 64 ? c->n_added : 64;
    return status;
}

static tfm_status run(classifier *c, const arguments *args, tfm_error *error) {
    tfm_status status;
    input in;
    if (args->n_paths == 1)
        return classify_lines(c, error);
    memset(&in, 0, sizeof in);
    in.a = args->paths[1];
    in.a_size = strlen(in.a);
    in.b = args->paths[2];
    in.b_size = in.b ? strlen(in.b) : 0;
    status = tokenize(c, &in, error);
    if (status == TFM_OK)
        status = classify(c, &in, 1, error);
    free_input(&in);
    return status;
}

int main(int argc, char **argv) {
    arguments args;
    tfm_session_options options;
    tfm_error error = {TFM_OK, ""};
    tfm_model *model = NULL;
    classifier c;
    int status;
    memset(&args, 0, sizeof args);
    memset(&options, 0, sizeof options);
    memset(&c, 0, sizeof c);
    args.isa = getenv("TFM_ISA");
    if (argc == 2 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h")))
        return fputs(usage_text, stdout) < 0;
    status = parse(argc, argv, &args);
    if (status)
        return status;
    options.engine.threads = (int)args.threads;
    options.max_rows = 2048; /* a batch of short lines is one pass */
    if (tfm_isa_from_name(args.isa, &options.engine.isa, &error) == TFM_OK)
        model = tfm_load(args.paths[0], NULL, &error);
    if (model && begin(&c, model, &args, &error) == TFM_OK)
        c.session = tfm_session_create(model, &options, &error);
    if (c.session)
        run(&c, &args, &error);
    if ((fflush(stdout) || ferror(stdout)) && error.status == TFM_OK)
        refuse(&error, TFM_ERROR_FILE, "standard output can't be written");
    tfm_session_free(c.session);
    tfm_free(model);
    return error.status == TFM_OK ? 0 : fail(error.message);
}
