/* chat - a conversation with memory
 *
 *   chat MODEL [--system TEXT] [--template NAME] [--temp T] [--top-k K] [--top-p P] [--min-p P] [--repeat-penalty R]
 *        [--seed S] [-n TOKENS] [--context N] [--threads N] [--isa NAME] [--type int8|f16|bf16|f32]
 *        [--kv f32|f16|bf16|int8]
 *
 * Each line of stdin is a turn, and its answer goes to stdout as it is written; a line that begins with / is a command
 * (/help names them). Only what is new in a turn is evaluated. When the conversation outgrows the context (--context;
 * at most 4096 tokens unless it says more) the oldest turns are forgotten. -n 0 (the default) lets the model end its
 * answers itself. Ctrl-C stops an answer, or drops what is typed, and not the program: /quit or Ctrl-D end it. When
 * stdin is no terminal nothing but answers and what commands say is printed, and the first error ends the program, as
 * does a Ctrl-C between answers. Exit status: 0, 1 for errors, 2 for wrong usage.
 */
#define _POSIX_C_SOURCE 200809L
#define TFM_IMPLEMENTATION
#include "../tfm.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define USUAL_CONTEXT 4096

static const char usage_text[] =
    "usage: chat MODEL [--system TEXT] [--template NAME] [--temp T] [--top-k K] [--top-p P] [--min-p P]\n"
    "            [--repeat-penalty R] [--seed S] [-n TOKENS] [--context N] [--threads N] [--isa NAME]\n"
    "            [--type int8|f16|bf16|f32] [--kv f32|f16|bf16|int8]\n";

static const char help_text[] = "/reset      forget the conversation (the system prompt stays)\n"
                                "/save FILE  save the conversation, with what the model remembers of it\n"
                                "/load FILE  take up a saved one\n"
                                "/history    what was said\n"
                                "/stats      about the last answer\n"
                                "/quit       end\n";

typedef struct arguments {
    const char *model, *system, *chat_template, *type, *kv, *isa;
    double temperature, top_p, min_p, repeat_penalty;
    unsigned long long tokens, top_k, seed, context, threads;
} arguments;

/* The conversation, and what is measured of its last answer. */
typedef struct program {
    tfm_session *session;
    tfm_chat *chat;
    tfm_generate_options options;
    tfm_generate_stats stats;
    double start, first, end; /* seconds: when an answer was asked for, when its first token and its last came */
    int terminal;
    int printed; /* something of the answer */
} program;

static int usage(const char *what, const char *which) {
    fprintf(stderr, "chat: %s%s\n%s", what, which, usage_text);
    return 2;
}

static int fail(const char *message) {
    fprintf(stderr, "chat: %s\n", message);
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
    } options[] = {
        {"--system", &args->system, NULL, NULL},
        {"--template", &args->chat_template, NULL, NULL},
        {"--type", &args->type, NULL, NULL},
        {"--kv", &args->kv, NULL, NULL},
        {"--isa", &args->isa, NULL, NULL},
        {"--temp", NULL, &args->temperature, NULL},
        {"--top-p", NULL, &args->top_p, NULL},
        {"--min-p", NULL, &args->min_p, NULL},
        {"--repeat-penalty", NULL, &args->repeat_penalty, NULL},
        {"-n", NULL, NULL, &args->tokens},
        {"--top-k", NULL, NULL, &args->top_k},
        {"--seed", NULL, NULL, &args->seed},
        {"--context", NULL, NULL, &args->context},
        {"--threads", NULL, NULL, &args->threads},
    };
    const size_t n_options = sizeof options / sizeof *options;
    int i;
    for (i = 1; i < argc; i++) {
        size_t k = 0;
        while (k < n_options && strcmp(argv[i], options[k].name))
            k++;
        if (k == n_options) {
            if (argv[i][0] == '-' || args->model)
                return usage(argv[i][0] == '-' ? "unknown option " : "one argument too many: ", argv[i]);
            args->model = argv[i];
            continue;
        }
        if (++i == argc)
            return usage("a value is missing after ", argv[i - 1]);
        if (options[k].text)
            *options[k].text = argv[i];
        else if (options[k].real ? !parse_real(argv[i], options[k].real) : !parse_count(argv[i], options[k].count)) {
            fprintf(stderr, "chat: %s: expected a number, 0 or more, found '%s'\n%s", argv[i - 1], argv[i], usage_text);
            return 2;
        }
    }
    if (!args->model)
        return usage("the model is missing", "");
    return args->threads > 1024 ? usage("--threads: at most 1024", "") : 0;
}

/* ---- Ctrl-C */

static volatile sig_atomic_t interrupted;

static void interrupt(int number) {
    (void)number;
    interrupted = 1;
}

/* Ctrl-C without SA_RESTART: it ends the waiting for a line. And a limit on the size of files makes /save fail, as a
 * full disk does, instead of ending the conversation. */
static void catch_signals(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = interrupt;
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    signal(SIGXFSZ, SIG_IGN);
}

/* ---- answers */

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static int on_token(void *user, int32_t token) {
    program *p = (program *)user;
    (void)token;
    p->end = now();
    if (p->first == 0)
        p->first = p->end;
    return interrupted;
}

static int print(void *user, const char *text, size_t size) {
    program *p = (program *)user;
    p->printed = 1;
    return fwrite(text, 1, size, stdout) != size || fflush(stdout) || interrupted;
}

static tfm_status answer(program *p, const char *message, tfm_error *error) {
    tfm_status status;
    interrupted = 0;
    p->printed = 0;
    p->first = 0;
    p->start = p->end = now();
    status = tfm_chat_say(p->chat, message, &p->options, print, p, error);
    if (status == TFM_OK || p->printed)
        putchar('\n');
    p->options.seed++; /* or every answer would draw the same numbers */
    interrupted = 0;
    return status;
}

/* ---- commands */

static void print_turn(const char *who, tfm_turn turn) {
    if (turn.size)
        printf("%s: %.*s\n", who, (int)turn.size, turn.text);
}

static void print_history(const program *p) {
    size_t n = tfm_chat_n_dropped(p->chat), i;
    print_turn("system", tfm_chat_system(p->chat));
    if (n)
        printf("(%lu turns forgotten)\n", (unsigned long)n);
    for (i = 0; i < tfm_chat_n_turns(p->chat); i++) {
        tfm_turn turn = tfm_chat_turn(p->chat, i);
        print_turn(turn.role == TFM_USER ? "user" : "assistant", turn);
    }
}

static void print_statistics(const program *p) {
    const tfm_generate_stats *s = &p->stats;
    size_t n_tokens;
    tfm_sequence_tokens(p->session, 0, &n_tokens);
    printf("context: %lu tokens, %lu of them from memory, %lu new; answer: %lu tokens", (unsigned long)s->n_prompt,
           (unsigned long)s->n_reused, (unsigned long)(s->n_prompt - s->n_reused), (unsigned long)s->n_generated);
    if (p->first > 0)
        printf(", the first after %.1f ms", 1000 * (p->first - p->start));
    if (s->n_generated > 1 && p->end > p->first)
        printf(", %.1f tokens/s", (double)(s->n_generated - 1) / (p->end - p->first));
    printf("\nmemory: %lu of %lu tokens, %lu turns, %lu forgotten; template %s\n", (unsigned long)n_tokens,
           (unsigned long)tfm_session_context(p->session), (unsigned long)tfm_chat_n_turns(p->chat),
           (unsigned long)tfm_chat_n_dropped(p->chat), tfm_chat_template(p->chat));
}

static tfm_status wrong_command(const char *line, tfm_error *error) {
    snprintf(error->message, sizeof error->message, "unknown command '%.60s': /help names them", line);
    return error->status = TFM_ERROR_ARGUMENT;
}

static tfm_status command(program *p, const char *line, tfm_error *error) {
    if (!strncmp(line, "/save ", 6) && line[6])
        return tfm_chat_save(p->chat, line + 6, error);
    if (!strncmp(line, "/load ", 6) && line[6])
        return tfm_chat_load(p->chat, line + 6, error);
    if (!strcmp(line, "/reset"))
        tfm_chat_reset(p->chat);
    else if (!strcmp(line, "/history"))
        print_history(p);
    else if (!strcmp(line, "/stats"))
        print_statistics(p);
    else if (!strcmp(line, "/help"))
        fputs(help_text, stdout);
    else
        return wrong_command(line, error);
    return TFM_OK;
}

/* ---- the program */

/* Reads a line without its end; 0 at the end of the input. Ctrl-C: what was typed is dropped, and the terminal asks again;
 * another input ends. */
static int read_line(const program *p, char **line, size_t *capacity) {
    ssize_t size;
    do {
        if (interrupted) {
            printf("\n(/quit or Ctrl-D ends)\n");
            clearerr(stdin);
        }
        interrupted = 0;
        if (p->terminal)
            printf("> ");
        fflush(stdout);
        size = getline(line, capacity, stdin);
    } while (size < 0 && interrupted && p->terminal);
    if (size < 0)
        return 0;
    while (size > 0 && ((*line)[size - 1] == '\n' || (*line)[size - 1] == '\r'))
        (*line)[--size] = 0;
    return 1;
}

static tfm_status converse(program *p, tfm_error *error) {
    char *line = NULL;
    size_t capacity = 0;
    tfm_status status = TFM_OK;
    while ((status == TFM_OK || p->terminal) && read_line(p, &line, &capacity)) {
        if (!strcmp(line, "/quit"))
            break;
        status = !*line ? TFM_OK : *line == '/' ? command(p, line, error) : answer(p, line, error);
        if (status != TFM_OK && p->terminal)
            fail(error->message);
    }
    if (p->terminal) {
        putchar('\n');
        status = TFM_OK;
    }
    if (ferror(stdin) && !interrupted && status == TFM_OK) {
        snprintf(error->message, sizeof error->message, "standard input can't be read");
        status = TFM_ERROR_FILE;
    }
    if ((fflush(stdout) || ferror(stdout)) && status == TFM_OK) {
        snprintf(error->message, sizeof error->message, "standard output can't be written");
        status = TFM_ERROR_FILE;
    }
    free(line);
    return status;
}

static void set_options(const arguments *args, program *p) {
    p->options.max_tokens = (size_t)args->tokens;
    p->options.seed = args->seed;
    p->options.sampling.temperature = (float)args->temperature;
    p->options.sampling.top_k = (size_t)args->top_k;
    p->options.sampling.top_p = (float)args->top_p;
    p->options.sampling.min_p = (float)args->min_p;
    p->options.sampling.repeat_penalty = (float)args->repeat_penalty;
    p->options.on_token = on_token;
    p->options.on_token_user = p;
    p->options.stats = &p->stats;
}

static tfm_session *create_session(const tfm_model *model, const arguments *args, tfm_session_options *options,
                                   tfm_error *error) {
    size_t positions = tfm_model_stack(model)->n_positions;
    options->context = (size_t)args->context;
    if (!options->context)
        options->context = positions < USUAL_CONTEXT ? positions : USUAL_CONTEXT;
    options->engine.threads = (int)args->threads;
    return tfm_session_create(model, options, error);
}

int main(int argc, char **argv) {
    arguments args;
    program p;
    tfm_load_options load;
    tfm_session_options session;
    tfm_chat_options chat;
    tfm_error error = {TFM_OK, ""};
    tfm_model *model = NULL;
    tfm_status done = TFM_ERROR_ARGUMENT;
    int status;
    memset(&args, 0, sizeof args);
    memset(&p, 0, sizeof p);
    memset(&load, 0, sizeof load);
    memset(&session, 0, sizeof session);
    memset(&chat, 0, sizeof chat);
    args.isa = getenv("TFM_ISA");
    if (argc == 2 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h")))
        return fputs(usage_text, stdout) < 0 || fputs(help_text, stdout) < 0;
    status = parse(argc, argv, &args);
    if (status)
        return status;
    if ((args.type && tfm_dtype_from_name(args.type, &load.dtype, &error) != TFM_OK) ||
        (args.kv && tfm_dtype_from_name(args.kv, &session.kv_dtype, &error) != TFM_OK))
        return usage(error.message, "");
    p.terminal = isatty(0);
    set_options(&args, &p);
    load.threads = (int)args.threads;
    chat.system = args.system;
    chat.chat_template = args.chat_template;
    if (tfm_isa_from_name(args.isa, &session.engine.isa, &error) == TFM_OK)
        model = tfm_load(args.model, &load, &error);
    p.session = model ? create_session(model, &args, &session, &error) : NULL;
    p.chat = p.session ? tfm_chat_create(p.session, &chat, &error) : NULL;
    if (p.chat) {
        catch_signals();
        done = converse(&p, &error);
    }
    tfm_chat_free(p.chat);
    tfm_session_free(p.session);
    tfm_free(model);
    return done == TFM_OK ? 0 : fail(error.message);
}
