/* translate - what an encoder-decoder (T5, mT5, ...) answers to each line: translations, summaries
 *
 *   translate MODEL [--beams B] [-n TOKENS] [--length-penalty P] [--ids] [--threads N] [--isa NAME] < lines
 *
 * A line for each line, in their order; lines of different lengths are answered side by side. What the model is to do
 * stands in the line, as it was trained: "translate English to German: The house is small." --beams 1 (the default) takes
 * the likeliest token each time, more is beam search. -n: tokens of an answer at most (default 128). --length-penalty: more
 * than 1 (the default) favours long answers, less short ones. --ids: the answers' token ids instead of their text:
 * those of transformers' generate, without the decoder's start token, with the token that ended the answer. An empty line
 * is answered by an empty line. A line may be longer than the texts in training if positions are relative, as T5's are.
 * Exit status: 0, 1 for errors, 2 for wrong usage.
 */
#define _POSIX_C_SOURCE 200809L
#define TFM_IMPLEMENTATION
#include "../tfm.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BATCH 8 /* lines side by side */

static const char usage_text[] = "usage: translate MODEL [--beams B] [-n TOKENS] [--length-penalty P] [--ids]\n"
                                 "                 [--threads N] [--isa NAME] < lines\n";

typedef struct arguments {
    const char *model, *isa;
    unsigned long long beams, tokens, threads;
    double length_penalty;
    int ids;
} arguments;

/* The model's session, and what it is made of. */
typedef struct translator {
    const arguments *args;
    const tfm_model *model;
    tfm_session_options options;
    tfm_session *session;
} translator;

/* Lines on their way through the model: the sources of the sequences, but for the empty ones. */
typedef struct batch {
    size_t n, n_texts;
    unsigned long number[BATCH]; /* of the line, from 1 */
    int empty[BATCH];
} batch;

static int usage(const char *what, const char *which) {
    fprintf(stderr, "translate: %s%s\n%s", what, which, usage_text);
    return 2;
}

/* ---- the command line */

static int parse_count(const char *text, unsigned long long most, unsigned long long *value) {
    char *end;
    errno = 0;
    *value = strtoull(text, &end, 10);
    return *text >= '0' && *text <= '9' && !*end && !errno && *value >= 1 && *value <= most;
}

static int parse_real(const char *text, double *value) {
    char *end;
    *value = strtod(text, &end);
    return *text && !*end && *value >= -100 && *value <= 100;
}

static int parse(int argc, char **argv, arguments *args) {
    int i;
    for (i = 1; i < argc; i++) {
        const char *option = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        int good;
        if (*option != '-') {
            if (args->model)
                return usage("one argument too many: ", option);
            args->model = option;
            continue;
        }
        if (!strcmp(option, "--ids")) {
            args->ids = 1;
            continue;
        }
        if (strcmp(option, "--beams") && strcmp(option, "-n") && strcmp(option, "--length-penalty") &&
            strcmp(option, "--threads") && strcmp(option, "--isa"))
            return usage("unknown option ", option);
        if (!value)
            return usage("a value is missing after ", option);
        if (!strcmp(option, "--isa"))
            good = (args->isa = value) != NULL;
        else if (!strcmp(option, "--length-penalty"))
            good = parse_real(value, &args->length_penalty);
        else if (!strcmp(option, "--beams"))
            good = parse_count(value, 256, &args->beams);
        else if (!strcmp(option, "-n"))
            good = parse_count(value, 1000000, &args->tokens);
        else
            good = parse_count(value, 1024, &args->threads);
        if (!good) {
            fprintf(stderr, "translate: %s: expected a number in range, found '%s'\n%s", option, value, usage_text);
            return 2;
        }
        i++;
    }
    return args->model ? 0 : usage("the model is missing", "");
}

/* ---- errors: those of a line name it */

static int fail_at(unsigned long line, const char *message) {
    fprintf(stderr, "translate: line %lu: %s\n", line, message);
    return 1;
}

/* ---- lines in */

/* A whole line of any length without its end; *text grows. Returns 0 at the end of the input, -1 without memory. */
static int read_line(FILE *file, char **text, size_t *capacity, size_t *size) {
    ssize_t n = getline(text, capacity, file);
    if (n < 0)
        return feof(file) || ferror(file) ? 0 : -1;
    *size = (size_t)n;
    if (*size && (*text)[*size - 1] == '\n')
        --*size;
    if (*size && (*text)[*size - 1] == '\r')
        --*size;
    return 1;
}

/* Relative positions have no end: a line that is longer than the session's texts gets a session with room for it. */
static tfm_status make_room(translator *t, size_t n_tokens, tfm_error *error) {
    if (tfm_model_description(t->model)->encoder.positions != TFM_RELATIVE_POSITIONS)
        return error->status; /* that there is no room */
    tfm_session_free(t->session);
    t->options.source = n_tokens;
    t->session = tfm_session_create(t->model, &t->options, error);
    return t->session ? TFM_OK : error->status;
}

/* The line becomes the source of a sequence; of sequence 0 even if that takes a new session. */
static tfm_status set_line(translator *t, const char *line, size_t size, size_t sequence, tfm_error *error) {
    tfm_text text;
    int32_t *ids = NULL;
    size_t n;
    tfm_status status = tfm_tokenize(t->model, line, size, 0, NULL, 0, &n, error);
    if (status != TFM_OK)
        return status;
    ids = (int32_t *)malloc((n + 1) * sizeof *ids);
    if (!ids) {
        snprintf(error->message, sizeof error->message, "out of memory");
        return error->status = TFM_ERROR_MEMORY;
    }
    memset(&text, 0, sizeof text);
    status = tfm_tokenize(t->model, line, size, 0, ids, n, &n, error);
    text.tokens = ids;
    text.n_tokens = n;
    if (status == TFM_OK)
        status = tfm_set_source(t->session, sequence, &text, error);
    if (status == TFM_ERROR_CONTEXT_FULL && !sequence && make_room(t, n, error) == TFM_OK)
        status = tfm_set_source(t->session, sequence, &text, error);
    free(ids);
    return status;
}

/* ---- answers out */

static void print_ids(const tfm_result *answer) {
    size_t i;
    for (i = 0; i < answer->n_tokens; i++)
        printf(i ? " %ld" : "%ld", (long)answer->tokens[i]);
}

/* The text of the tokens that are not marks; a line's end in it becomes a space. */
static tfm_status print_text(const tfm_model *model, const tfm_result *answer, tfm_error *error) {
    int32_t *ids = (int32_t *)malloc((answer->n_tokens + 1) * sizeof *ids);
    char *text = NULL;
    size_t n = 0, size, i;
    tfm_status status = TFM_OK;
    for (i = 0; ids && i < answer->n_tokens; i++)
        if (!tfm_is_special_token(model, answer->tokens[i]))
            ids[n++] = answer->tokens[i];
    if (ids)
        status = tfm_decode(model, ids, n, NULL, 0, &size, error);
    if (ids && status == TFM_OK)
        text = (char *)malloc(size + 1);
    if (text)
        status = tfm_decode(model, ids, n, text, size, &size, error);
    else if (status == TFM_OK) {
        snprintf(error->message, sizeof error->message, "out of memory");
        status = error->status = TFM_ERROR_MEMORY;
    }
    for (i = 0; text && status == TFM_OK && i < size; i++)
        if (text[i] == '\n' || text[i] == '\r')
            text[i] = ' ';
    if (status == TFM_OK)
        fwrite(text, 1, size, stdout);
    free(text);
    free(ids);
    return status;
}

/* Answers the batch's lines, prints a line for each, and empties it. */
static int answer(const translator *t, batch *lines) {
    const arguments *args = t->args;
    tfm_beam_options options;
    tfm_result results[BATCH];
    tfm_error error = {TFM_OK, ""};
    size_t n, i;
    memset(&options, 0, sizeof options);
    options.beams = (size_t)args->beams;
    options.max_tokens = (size_t)args->tokens;
    options.length_penalty = (float)args->length_penalty;
    options.no_length_penalty = 1;
    if (tfm_beam_search(t->session, NULL, lines->n_texts, &options, results, &error) != TFM_OK)
        return fail_at(lines->number[0], error.message);
    for (i = n = 0; i < lines->n; i++) {
        const tfm_result *result = results + n;
        n += !lines->empty[i];
        if (!lines->empty[i] && args->ids)
            print_ids(result);
        else if (!lines->empty[i] && print_text(t->model, result, &error) != TFM_OK)
            return fail_at(lines->number[i], error.message);
        putchar('\n');
    }
    if (fflush(stdout) || ferror(stdout))
        return fail_at(lines->number[0], "standard output can't be written");
    lines->n = lines->n_texts = 0;
    return 0;
}

/* Adds a line to the batch. If there is no room for it, or something is wrong with it, those before it are answered first. */
static int add_line(translator *t, batch *lines, unsigned long number, const char *line, size_t size) {
    tfm_error error = {TFM_OK, ""};
    tfm_status added = size ? set_line(t, line, size, lines->n_texts * (size_t)t->args->beams, &error) : TFM_OK;
    if (added != TFM_OK && lines->n) {
        int status = answer(t, lines);
        if (status)
            return status;
        added = set_line(t, line, size, 0, &error);
    }
    if (added != TFM_OK)
        return fail_at(number, error.message);
    lines->number[lines->n] = number;
    lines->empty[lines->n++] = size == 0;
    lines->n_texts += size > 0;
    return 0;
}

static int translate(translator *t) {
    const int shows = isatty(STDERR_FILENO) && !isatty(STDOUT_FILENO); /* otherwise the answers show how far it is */
    const size_t most = isatty(STDIN_FILENO) ? 1 : BATCH;              /* who types a line waits for its answer */
    char *line = NULL;
    size_t capacity = 0, size = 0;
    unsigned long number = 0;
    int status = 0, more = 1;
    batch lines;
    lines.n = lines.n_texts = 0;
    while (!status && (more = read_line(stdin, &line, &capacity, &size)) > 0) {
        status = add_line(t, &lines, ++number, line, size);
        if (!status && lines.n == most) {
            status = answer(t, &lines);
            if (shows && number > BATCH)
                fprintf(stderr, "\rtranslate: %lu lines", number);
        }
    }
    if (!status && lines.n)
        status = answer(t, &lines);
    if (!status && (more < 0 || ferror(stdin)))
        status = fail_at(number + 1, more < 0 ? "out of memory" : "standard input can't be read");
    if (shows && number > BATCH)
        fputc('\n', stderr);
    free(line);
    return status;
}

/* ---- the program */

static int fail(const char *message) {
    fprintf(stderr, "translate: %s\n", message);
    return 1;
}

/* Loads the model, and sees that it can do this. */
static tfm_model *load(const arguments *args, tfm_error *error) {
    tfm_load_options options;
    tfm_model *model;
    const char *missing = NULL;
    memset(&options, 0, sizeof options);
    options.threads = (int)args->threads;
    model = tfm_load(args->model, &options, error);
    if (!model)
        return NULL;
    if (tfm_model_description(model)->kind != TFM_ENCODER_DECODER)
        missing = "is no encoder-decoder";
    else if (!tfm_has_tokenizer(model))
        missing = "has no tokenizer";
    else if (tfm_start_token(model) < 0)
        missing = "does not say which token its decoder begins with";
    if (missing) {
        snprintf(error->message, sizeof error->message, "%.300s: the model %s", args->model, missing);
        tfm_free(model);
        model = NULL;
    }
    return model;
}

int main(int argc, char **argv) {
    arguments args;
    translator t;
    tfm_error error = {TFM_OK, ""};
    tfm_model *model = NULL;
    int status;
    memset(&args, 0, sizeof args);
    memset(&t, 0, sizeof t);
    args.beams = 1;
    args.tokens = 128;
    args.length_penalty = 1;
    args.isa = getenv("TFM_ISA");
    if (argc == 2 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h")))
        return fputs(usage_text, stdout) < 0;
    status = parse(argc, argv, &args);
    if (status)
        return status;
    t.args = &args;
    t.options.engine.threads = (int)args.threads;
    t.options.n_sequences = (size_t)args.beams * BATCH;
    t.options.context = (size_t)args.tokens;
    if (tfm_isa_from_name(args.isa, &t.options.engine.isa, &error) == TFM_OK)
        t.model = model = load(&args, &error);
    t.session = model ? tfm_session_create(model, &t.options, &error) : NULL;
    status = t.session ? translate(&t) : fail(error.message);
    tfm_session_free(t.session);
    tfm_free(model);
    return status;
}
