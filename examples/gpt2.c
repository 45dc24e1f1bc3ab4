/* gpt2 - writes text with a GPT-2: streams it to stdout, and statistics to stderr
 *
 *   gpt2 [-m MODEL] [-p PROMPT] [-n TOKENS] [--temp T] [--top-k K] [--top-p P] [--min-p P] [--repeat-penalty R]
 *        [--seed S] [--stop TEXT]... [--threads N] [--isa NAME] [--type f32|f16|bf16|int8] [--kv f32|f16|bf16|int8]
 *        [--keep N] [--special] [--ignore-eos] [--ids] [--prompt-ids 1,2,3]
 *
 * By default the demo model goes on from "Once upon a time" with 100 tokens. Only the continuation is printed, not the
 * prompt. --temp 0 (the default) always takes the likeliest token. -n 0 writes until the model ends its text. --keep N:
 * when the context is full, keep the first N tokens and the most recent half and go on; without it that is an error.
 * --prompt-ids 1,2,3 instead of -p needs no tokenizer. --special: special tokens written in the prompt, as
 * <|endoftext|>, are meant as such. Exit status: 0, 1 for errors, 2 for wrong usage.
 */
#define _POSIX_C_SOURCE 200809L
#define TFM_IMPLEMENTATION
#include "../tfm.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#else
#include <sys/resource.h>
#endif
#include <time.h>

#define MAX_STOPS 16

static const char usage_text[] =
    "usage: gpt2 [-m MODEL] [-p PROMPT] [-n TOKENS] [--temp T] [--top-k K] [--top-p P] [--min-p P]\n"
    "            [--repeat-penalty R] [--seed S] [--stop TEXT]... [--threads N] [--isa NAME]\n"
    "            [--type f32|f16|bf16|int8] [--kv f32|f16|bf16|int8] [--keep N] [--special] [--ignore-eos] [--ids] "
    "[--prompt-ids 1,2,3]\n";

typedef struct arguments {
    const char *model, *prompt, *prompt_ids, *type, *kv, *isa;
    const char *stops[MAX_STOPS];
    size_t n_stops;
    double temperature, top_p, min_p, repeat_penalty;
    unsigned long long tokens, top_k, seed, threads, keep;
    int shift, ids, ignore_eos, special;
} arguments;

static int usage(const char *what, const char *which) {
    fprintf(stderr, "gpt2: %s%s\n%s", what, which, usage_text);
    return 2;
}

static int fail(const char *message) {
    fprintf(stderr, "gpt2: %s\n", message);
    return 1;
}

/* ---- the command line */

static int parse_real(const char *text, double *value) {
    char *end;
    *value = strtod(text, &end);
    return *text && !*end && *value >= 0 && *value <= 1e30;
}

static int parse_count(const char *text, unsigned long long *value) {
    char *end;
    errno = 0;
    *value = strtoull(text, &end, 10);
    return *text >= '0' && *text <= '9' && !*end && !errno;
}

static int parse(int argc, char **argv, arguments *args) {
    const struct {
        const char *name, **text;
        double *real;
        unsigned long long *count;
        int *flag;
    } options[] = {
        {"-m", &args->model, NULL, NULL, NULL},
        {"-p", &args->prompt, NULL, NULL, NULL},
        {"--prompt-ids", &args->prompt_ids, NULL, NULL, NULL},
        {"--type", &args->type, NULL, NULL, NULL},
        {"--kv", &args->kv, NULL, NULL, NULL},
        {"--isa", &args->isa, NULL, NULL, NULL},
        {"--temp", NULL, &args->temperature, NULL, NULL},
        {"--top-p", NULL, &args->top_p, NULL, NULL},
        {"--min-p", NULL, &args->min_p, NULL, NULL},
        {"--repeat-penalty", NULL, &args->repeat_penalty, NULL, NULL},
        {"-n", NULL, NULL, &args->tokens, NULL},
        {"--top-k", NULL, NULL, &args->top_k, NULL},
        {"--seed", NULL, NULL, &args->seed, NULL},
        {"--threads", NULL, NULL, &args->threads, NULL},
        {"--keep", NULL, NULL, &args->keep, NULL},
        {"--special", NULL, NULL, NULL, &args->special},
        {"--ignore-eos", NULL, NULL, NULL, &args->ignore_eos},
        {"--ids", NULL, NULL, NULL, &args->ids},
    };
    const size_t n_options = sizeof options / sizeof *options;
    int i;
    for (i = 1; i < argc; i++) {
        size_t k = 0;
        while (k < n_options && strcmp(argv[i], options[k].name))
            k++;
        if (k < n_options && options[k].flag) {
            *options[k].flag = 1;
            continue;
        }
        if (k == n_options && strcmp(argv[i], "--stop"))
            return usage("unknown option ", argv[i]);
        if (++i == argc)
            return usage("a value is missing after ", argv[i - 1]);
        if (k == n_options) {
            if (args->n_stops == MAX_STOPS)
                return usage("too many --stop", "");
            args->stops[args->n_stops++] = argv[i];
        } else if (options[k].text)
            *options[k].text = argv[i];
        else if (options[k].real ? !parse_real(argv[i], options[k].real) : !parse_count(argv[i], options[k].count)) {
            fprintf(stderr, "gpt2: %s: expected a number, 0 or more, found '%s'\n%s", argv[i - 1], argv[i], usage_text);
            return 2;
        }
        if (k < n_options && options[k].count == &args->keep)
            args->shift = 1;
    }
    if (args->prompt && args->prompt_ids)
        return usage("-p and --prompt-ids: expected one of them", "");
    if (args->top_p > 1 || args->min_p > 1)
        return usage(args->top_p > 1 ? "--top-p" : "--min-p", ": expected a probability, 0 to 1");
    return args->threads > 1024 ? usage("--threads: at most 1024", "") : 0;
}

/* ---- what is measured while text is written */

typedef struct watch {
    double start, first; /* seconds: when it began, when the first token came */
    size_t n_tokens;
    int print_ids;
} watch;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static int on_token(void *user, int32_t token) {
    watch *w = (watch *)user;
    if (!w->n_tokens++)
        w->first = now();
    return w->print_ids && (printf(w->n_tokens > 1 ? " %ld" : "%ld", (long)token) < 0 || fflush(stdout));
}

static int print(void *user, const char *text, size_t size) {
    return fwrite(text, 1, size, (FILE *)user) != size || fflush((FILE *)user);
}

/* In bytes; 0 where there is no getrusage. */
static double peak_memory(void) {
#ifdef _WIN32
    return 0;
#else
    struct rusage usage_now;
    return getrusage(RUSAGE_SELF, &usage_now) ? 0 : 1024 * (double)usage_now.ru_maxrss;
#endif
}

static void print_statistics(const watch *w, const tfm_generate_stats *stats) {
    double end = now(), prefill = w->first - w->start;
    fprintf(stderr, "prompt: %lu tokens, %.1f tokens/s; ", (unsigned long)stats->n_prompt,
            (double)stats->n_prompt / prefill);
    if (w->n_tokens > 1)
        fprintf(stderr, "generated: %lu tokens, %.1f tokens/s; ", (unsigned long)w->n_tokens,
                (double)(w->n_tokens - 1) / (end - w->first));
    fprintf(stderr, "first token after %.1f ms; peak memory %.1f MB\n", 1000 * prefill, peak_memory() / 1e6);
}

/* ---- the program */

/* Numbers separated by commas. *ids is the caller's to free; NULL if it is not that. */
static int32_t *parse_ids(const char *text, size_t *n) {
    int32_t *ids = (int32_t *)malloc((strlen(text) / 2 + 1) * sizeof *ids);
    char *end = NULL;
    for (*n = 0; ids; text = end + 1) {
        long id = strtol(text, &end, 10);
        if (end == text || (*end && *end != ',') || id < 0 || id > INT32_MAX) {
            free(ids);
            return NULL;
        }
        ids[(*n)++] = (int32_t)id;
        if (!*end)
            break;
    }
    return ids;
}

static tfm_status generate(tfm_session *session, const arguments *args, watch *w, tfm_generate_stats *stats,
                           tfm_error *error) {
    tfm_generate_options options;
    tfm_status status;
    memset(&options, 0, sizeof options);
    options.max_tokens = (size_t)args->tokens;
    options.seed = args->seed;
    options.sampling.temperature = (float)args->temperature;
    options.sampling.top_k = (size_t)args->top_k;
    options.sampling.top_p = (float)args->top_p;
    options.sampling.min_p = (float)args->min_p;
    options.sampling.repeat_penalty = (float)args->repeat_penalty;
    options.stop_strings = args->stops;
    options.n_stop_strings = args->n_stops;
    options.ignore_end = args->ignore_eos;
    options.special = args->special;
    options.shift = args->shift;
    options.shift_keep = (size_t)args->keep;
    options.on_token = on_token;
    options.on_token_user = w;
    options.stats = stats;
    w->start = now();
    if (args->prompt_ids) {
        size_t n;
        int32_t *ids = parse_ids(args->prompt_ids, &n);
        if (!ids) {
            snprintf(error->message, sizeof error->message,
                     "--prompt-ids: expected numbers separated by commas, found '%.60s'", args->prompt_ids);
            return error->status = TFM_ERROR_ARGUMENT;
        }
        status = tfm_generate_ids(session, ids, n, &options, args->ids ? NULL : print, stdout, error);
        free(ids);
    } else
        status = tfm_generate(session, args->prompt, &options, args->ids ? NULL : print, stdout, error);
    return status;
}

int main(int argc, char **argv) {
    arguments args;
    tfm_load_options load;
    tfm_session_options session_options;
    tfm_error error = {TFM_OK, ""};
    tfm_model *model = NULL;
    tfm_session *session = NULL;
    tfm_generate_stats stats;
    watch w;
    int status;
    memset(&args, 0, sizeof args);
    memset(&load, 0, sizeof load);
    memset(&session_options, 0, sizeof session_options);
    memset(&w, 0, sizeof w);
    memset(&stats, 0, sizeof stats);
    args.model = "examples/models/stories.tfm";
    args.tokens = 100;
    args.isa = getenv("TFM_ISA");
#ifdef _WIN32 /* text is bytes */
    _setmode(1, _O_BINARY);
#endif
    if (argc == 2 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h")))
        return fputs(usage_text, stdout) < 0 || fflush(stdout);
    status = parse(argc, argv, &args);
    if (status)
        return status;
    args.prompt = args.prompt ? args.prompt : "Once upon a time";
    w.print_ids = args.ids;
    load.threads = session_options.engine.threads = (int)args.threads;
    if ((args.type && tfm_dtype_from_name(args.type, &load.dtype, &error) != TFM_OK) ||
        (args.kv && tfm_dtype_from_name(args.kv, &session_options.kv_dtype, &error) != TFM_OK))
        return usage(error.message, "");
    if (tfm_isa_from_name(args.isa, &session_options.engine.isa, &error) == TFM_OK)
        model = tfm_load(args.model, &load, &error);
    session = model ? tfm_session_create(model, &session_options, &error) : NULL;
    if (session) {
        generate(session, &args, &w, &stats, &error);
        if (w.n_tokens) {
            putchar('\n');
            print_statistics(&w, &stats);
        }
        if ((fflush(stdout) || ferror(stdout)) && error.status == TFM_OK) {
            error.status = TFM_ERROR_FILE;
            snprintf(error.message, sizeof error.message, "standard output can't be written");
        }
    }
    tfm_session_free(session);
    tfm_free(model);
    return error.status == TFM_OK ? 0 : fail(error.message);
}
