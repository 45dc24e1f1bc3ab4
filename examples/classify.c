/* classify - what a text is: a sentiment, a topic, whether one text follows from another; or what each of its tokens is
 *
 *   classify MODEL [TEXT [TEXT2]] [--top K] [--threads N] [--isa NAME]
 *
 * Without TEXT it reads lines from standard input; a line may have two texts with a tab between them. For each text its
 * labels with their probabilities, the likeliest first, and a tab between any two: `POSITIVE 0.9987`. --top K prints K of
 * them (usually the likeliest one alone; all of them where several can be right). A model whose problem is regression has
 * values in place of probabilities. A model that classifies tokens has a line for each token (the token, a tab, its
 * labels) and an empty line after each text but the last.
 * Exit status: 0, 1 for errors, 2 for wrong usage.
 */
#define TFM_IMPLEMENTATION
#include "../tfm.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

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
                return usage("expected a number greater than 0, found ", argv[i]);
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
    const char *a, *b;
    size_t a_size, b_size;
    int32_t *ids, *types; /* [n] */
    float *scores;        /* [n_labels], or [n][n_labels] */
    size_t n;
} input;

static void free_input(input *in) {
    free(in->ids);
    free(in->types);
    free(in->scores);
}

static tfm_status tokenize(const classifier *c, input *in, tfm_error *error) {
    tfm_status status =
        tfm_tokenize_pair(c->model, in->a, in->a_size, in->b, in->b_size, 0, NULL, NULL, 0, &in->n, error);
    if (status != TFM_OK)
        return status;
    in->ids = (int32_t *)malloc((in->n + 1) * sizeof *in->ids);
    in->types = (int32_t *)malloc((in->n + 1) * sizeof *in->types);
    in->scores = (float *)malloc((in->n + 1) * c->d->n_labels * sizeof *in->scores);
    if (!in->ids || !in->types || !in->scores)
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
static void print_tokens(const classifier *c, const input *in) {
    size_t i;
    if (c->n_texts)
        putchar('\n');
    for (i = 0; i < in->n; i++) {
        size_t size;
        const char *text = tfm_token_text(c->model, in->ids[i], &size);
        if (is_added(c, in->ids[i]))
            continue;
        printf("%.*s\t", (int)size, size ? text : "");
        print_labels(c->model, in->scores + i * c->d->n_labels, c->top);
    }
}

static tfm_status classify(classifier *c, input *in, tfm_error *error) {
    tfm_text text;
    tfm_status status = tokenize(c, in, error);
    memset(&text, 0, sizeof text);
    text.tokens = in->ids;
    text.types = in->types;
    text.n_tokens = in->n;
    if (status == TFM_OK)
        status = tfm_encode(c->session, &text, 1, TFM_CLASSES, in->scores, error);
    if (status == TFM_OK && c->d->classifier == TFM_TOKEN_CLASSIFIER)
        print_tokens(c, in);
    else if (status == TFM_OK)
        print_labels(c->model, in->scores, c->top);
    c->n_texts++;
    free_input(in);
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

static tfm_status classify_lines(classifier *c, tfm_error *error) {
    tfm_status status = TFM_OK;
    size_t number;
    for (number = 1; status == TFM_OK; number++) {
        char message[400];
        input in;
        char *tab, *text;
        memset(&in, 0, sizeof in);
        in.a = text = read_line(&in.a_size);
        if (!text)
            return refuse(error, TFM_ERROR_MEMORY, "out of memory");
        if (in.a_size == SIZE_MAX) {
            free(text);
            return ferror(stdin) ? refuse(error, TFM_ERROR_FILE, "standard input can't be read") : TFM_OK;
        }
        tab = (char *)memchr(text, '\t', in.a_size);
        if (tab) {
            in.b = tab + 1;
            in.b_size = in.a_size - (size_t)(tab + 1 - text);
            in.a_size = (size_t)(tab - text);
        }
        status = classify(c, &in, error);
        free(text);
        if (status != TFM_OK) {
            snprintf(message, sizeof message, "line %lu: %.350s", (unsigned long)number, error->message);
            refuse(error, status, message);
        }
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
    input in;
    if (args->n_paths == 1)
        return classify_lines(c, error);
    memset(&in, 0, sizeof in);
    in.a = args->paths[1];
    in.a_size = strlen(in.a);
    in.b = args->paths[2];
    in.b_size = in.b ? strlen(in.b) : 0;
    return classify(c, &in, error);
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
