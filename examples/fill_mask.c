/* fill-mask - guesses the words that a text leaves out
 *
 *   fill-mask MODEL "text with [MASK]" [--top K] [--threads N] [--isa NAME]
 *
 * For each mask the K likeliest tokens (usually 5), a line each: the mask's number, the probability, the token. Then the
 * text with the likeliest of each. A mask is [MASK], or the model's own token for it, as <mask>.
 * Exit status: 0, 1 for errors, 2 for wrong usage.
 */
#define TFM_IMPLEMENTATION
#include "../tfm.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char usage_text[] = "usage: fill-mask MODEL \"text with [MASK]\" [--top K] [--threads N] [--isa NAME]\n";

typedef struct arguments {
    const char *model, *text, *isa;
    long top, threads;
} arguments;

static int usage(const char *what, const char *which) {
    fprintf(stderr, "fill-mask: %s%s\n%s", what, which, usage_text);
    return 2;
}

static int fail(const char *message) {
    fprintf(stderr, "fill-mask: %s\n", message);
    return 1;
}

static int parse(int argc, char **argv, arguments *args) {
    int i;
    for (i = 1; i < argc; i++) {
        const char *option = argv[i];
        const int is_isa = !strcmp(option, "--isa"), is_top = !strcmp(option, "--top");
        char *end;
        long n;
        if (!args->model && option[0] != '-')
            args->model = option;
        else if (args->model && !args->text && strncmp(option, "--", 2))
            args->text = option;
        else if (strncmp(option, "--", 2))
            return usage("one argument too many: ", option);
        else if (!is_isa && !is_top && strcmp(option, "--threads"))
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
    return args->text ? 0 : usage("an argument is missing", "");
}

/* ---- tokens as text */

/* A token as it stands in a text. */
typedef struct word {
    char text[256];
    int size;
    int starts; /* 1: there is a space before it; 0: it goes on with the word before it, as "##ing" */
} word;

/* What a token adds to a text is what it is after itself; how tokens are joined is the tokenizer's business. */
static word token_word(const tfm_model *model, int32_t id) {
    int32_t twice[2];
    size_t once, size;
    word w;
    char text[sizeof w.text * 2];
    memset(&w, 0, sizeof w);
    twice[0] = twice[1] = id;
    if (tfm_decode(model, twice, 1, NULL, 0, &once, NULL) != TFM_OK ||
        tfm_decode(model, twice, 2, text, sizeof text, &size, NULL) != TFM_OK || size > sizeof text || size <= once ||
        size - once >= sizeof w.text)
        return w;
    w.starts = text[once] == ' ';
    w.size = (int)(size - once) - w.starts;
    memcpy(w.text, text + once + w.starts, (size_t)w.size);
    return w;
}

/* ---- a text with masks: everything that is made of one, freed by free_work */

typedef struct work {
    const tfm_model *model;
    char *text;        /* with the model's own masks */
    word mask;         /* how the model writes one */
    int32_t *ids;      /* [n] */
    size_t n, n_masks; /* tokens; those that are masks */
    float *logits;     /* [n][vocab_size] */
    int32_t *guesses;  /* [n_masks]: the likeliest */
    size_t vocab_size;
} work;

static void free_work(work *w) {
    free(w->text);
    free(w->ids);
    free(w->logits);
    free(w->guesses);
}

/* The text with every [MASK] as the model writes it. NULL: no memory. */
static char *with_own_masks(const char *text, const word *mask) {
    static const char usual[] = "[MASK]";
    const size_t usual_size = sizeof usual - 1, mask_size = (size_t)mask->size;
    char *own = (char *)malloc((strlen(text) / usual_size + 1) * mask_size + strlen(text) + 1), *to = own;
    while (own && *text)
        if (!strncmp(text, usual, usual_size)) {
            memcpy(to, mask->text, mask_size);
            to += mask_size;
            text += usual_size;
        } else
            *to++ = *text++;
    if (own)
        *to = 0;
    return own;
}

static tfm_status refuse(tfm_error *error, tfm_status status, const char *message) {
    snprintf(error->message, sizeof error->message, "%s", message);
    return error->status = status;
}

static tfm_status tokenize(work *w, const char *text, tfm_error *error) {
    const int32_t mask_id = tfm_mask_token(w->model);
    tfm_status status;
    size_t i;
    if (mask_id >= 0)
        w->mask = token_word(w->model, mask_id);
    if (!w->mask.size)
        return refuse(error, TFM_ERROR_UNSUPPORTED, "the model's tokenizer has no mask");
    w->text = with_own_masks(text, &w->mask);
    if (!w->text)
        return refuse(error, TFM_ERROR_MEMORY, "out of memory");
    status = tfm_tokenize(w->model, w->text, strlen(w->text), TFM_TOKENIZE_SPECIAL, NULL, 0, &w->n, error);
    if (status != TFM_OK)
        return status;
    w->ids = (int32_t *)malloc((w->n + 1) * sizeof *w->ids);
    if (!w->ids)
        return refuse(error, TFM_ERROR_MEMORY, "out of memory");
    status = tfm_tokenize(w->model, w->text, strlen(w->text), TFM_TOKENIZE_SPECIAL, w->ids, w->n, &w->n, error);
    for (i = 0; status == TFM_OK && i < w->n; i++)
        w->n_masks += w->ids[i] == mask_id;
    if (status == TFM_OK && !w->n_masks) {
        snprintf(error->message, sizeof error->message, "there is no %.*s in the text", w->mask.size, w->mask.text);
        status = error->status = TFM_ERROR_ARGUMENT;
    }
    return status;
}

static tfm_status encode(work *w, tfm_session *session, tfm_error *error) {
    tfm_text text;
    memset(&text, 0, sizeof text);
    text.tokens = w->ids;
    text.n_tokens = w->n;
    w->vocab_size = tfm_model_description(w->model)->vocab_size;
    w->logits = (float *)malloc(w->n * w->vocab_size * sizeof *w->logits);
    w->guesses = (int32_t *)malloc(w->n_masks * sizeof *w->guesses);
    if (!w->logits || !w->guesses)
        return refuse(error, TFM_ERROR_MEMORY, "out of memory");
    return tfm_encode(session, &text, 1, TFM_LOGITS, w->logits, error);
}

/* ---- what is printed */

static size_t find_largest(const float *values, size_t n) {
    size_t best = 0, i;
    for (i = 1; i < n; i++)
        if (values[i] > values[best])
            best = i;
    return best;
}

/* Logits become probabilities: softmax. */
static void to_probabilities(float *logits, size_t n) {
    const double largest = (double)logits[find_largest(logits, n)];
    double sum = 0;
    size_t i;
    for (i = 0; i < n; i++)
        sum += exp((double)logits[i] - largest);
    for (i = 0; i < n; i++)
        logits[i] = (float)(exp((double)logits[i] - largest) / sum);
}

/* The likeliest tokens of one mask. */
static int32_t print_guesses(const work *w, size_t number, float *logits, size_t top) {
    int32_t first = 0;
    size_t i;
    to_probabilities(logits, w->vocab_size);
    for (i = 0; i < top && i < w->vocab_size; i++) {
        const size_t best = find_largest(logits, w->vocab_size);
        const word guess = token_word(w->model, (int32_t)best);
        printf("%lu\t%.6f\t%.*s\n", (unsigned long)number, (double)logits[best], guess.size, guess.text);
        logits[best] = -1; /* it had its turn */
        if (!i)
            first = (int32_t)best;
    }
    return first;
}

/* The text with a token in the place of each mask: one that goes on with a word ("##ing") joins what is before it. */
static void print_filled(const work *w) {
    const char *text = w->text, *mask;
    size_t i;
    for (i = 0; i < w->n_masks && (mask = strstr(text, w->mask.text)) != NULL; i++) {
        const word guess = token_word(w->model, w->guesses[i]);
        const char *end = mask;
        while (!guess.starts && end > text && end[-1] == ' ')
            end--;
        printf("%.*s%.*s", (int)(end - text), text, guess.size, guess.text);
        text = mask + w->mask.size;
    }
    printf("%s\n", text);
}

static void print_results(work *w, size_t top) {
    size_t i, number = 0;
    for (i = 0; i < w->n; i++)
        if (w->ids[i] == tfm_mask_token(w->model)) {
            w->guesses[number] = print_guesses(w, number + 1, w->logits + i * w->vocab_size, top);
            number++;
        }
    print_filled(w);
}

static tfm_status run(const arguments *args, work *w, tfm_session *session, tfm_error *error) {
    tfm_status status =
        tfm_model_description(w->model)->head == TFM_NO_HEAD || tfm_model_description(w->model)->kind != TFM_ENCODER
            ? refuse(error, TFM_ERROR_UNSUPPORTED, "the model has no masked-LM head")
            : tokenize(w, args->text, error);
    if (status == TFM_OK)
        status = encode(w, session, error);
    if (status == TFM_OK)
        print_results(w, (size_t)args->top);
    return status;
}

int main(int argc, char **argv) {
    arguments args;
    tfm_session_options options;
    tfm_error error = {TFM_OK, ""};
    tfm_model *model = NULL;
    tfm_session *session;
    work w;
    int status;
    memset(&args, 0, sizeof args);
    memset(&options, 0, sizeof options);
    memset(&w, 0, sizeof w);
    args.top = 5;
    args.isa = getenv("TFM_ISA");
    if (argc == 2 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h")))
        return fputs(usage_text, stdout) < 0;
    status = parse(argc, argv, &args);
    if (status)
        return status;
    options.engine.threads = (int)args.threads;
    if (tfm_isa_from_name(args.isa, &options.engine.isa, &error) == TFM_OK)
        model = tfm_load(args.model, NULL, &error);
    w.model = model;
    session = model ? tfm_session_create(model, &options, &error) : NULL;
    if (session)
        run(&args, &w, session, &error);
    if ((fflush(stdout) || ferror(stdout)) && error.status == TFM_OK)
        refuse(&error, TFM_ERROR_FILE, "standard output can't be written");
    free_work(&w);
    tfm_session_free(session);
    tfm_free(model);
    return error.status == TFM_OK ? 0 : fail(error.message);
}
