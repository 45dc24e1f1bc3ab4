/* tfm - looks at models, runs them, converts them
 *
 *   tfm info MODEL [--verify]
 *   tfm quantize IN.tfm OUT.tfm [--type f32|f16|bf16] [--threads N]
 *   tfm dump MODEL --ids 1,2,3 [--what logits|hidden] [--isa NAME] [--threads N] -o OUT.npy
 *   tfm tokenize MODEL [--decode] [--special] [--whole] [--plain] < text
 *   tfm perplexity MODEL TEXTFILE [--context N] [--stride N] [--isa NAME] [--threads N]
 *
 * Exit status: 0, 1 for errors, 2 for wrong usage.
 */
#define _POSIX_C_SOURCE 200809L
#define TFM_IMPLEMENTATION
#include "../tfm.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char usage_text[] =
    "usage: tfm info MODEL [--verify]\n"
    "       tfm quantize IN.tfm OUT.tfm [--type f32|f16|bf16] [--threads N]\n"
    "       tfm dump MODEL --ids 1,2,3 [--what logits|hidden] [--isa NAME] [--threads N] -o OUT.npy\n"
    "       tfm tokenize MODEL [--decode] [--special] [--whole] [--plain] < text\n"
    "       tfm perplexity MODEL TEXTFILE [--context N] [--stride N] [--isa NAME] [--threads N]\n";

/* ---- errors, the command line */

static int usage(const char *what, const char *which) {
    fprintf(stderr, "tfm: %s%s\n%s", what, which, usage_text);
    return 2;
}

static int fail(const char *message) {
    fprintf(stderr, "tfm: %s\n", message);
    return 1;
}

static int fail_system(const char *path) {
    fprintf(stderr, "tfm: %s: %s\n", path, strerror(errno));
    return 1;
}

/* All that the subcommands take; each subcommand says which of it. */
typedef struct arguments {
    const char *paths[2];
    int n_paths;
    const char *ids, *what, *isa, *output, *type;
    int verify, decode, special, whole, plain;
    long threads, context, stride;
} arguments;

/* One option of a subcommand: exactly one of text, number, flag is set. */
typedef struct option {
    const char *name;
    const char **text;
    long *number;
    int *flag;
} option;

static int parse_number(const char *text, long *number) {
    char *end;
    errno = 0;
    *number = strtol(text, &end, 10);
    return *text && !*end && !errno && *number > 0;
}

/* 0, or the exit status of wrong usage. `allowed` are the names of the subcommand's options, separated by spaces. */
static int parse(int argc, char **argv, int n_paths, const char *allowed, arguments *args) {
    const option options[] = {
        {"--ids", &args->ids, NULL, NULL},       {"--what", &args->what, NULL, NULL},
        {"--isa", &args->isa, NULL, NULL},       {"-o", &args->output, NULL, NULL},
        {"--type", &args->type, NULL, NULL},     {"--threads", NULL, &args->threads, NULL},
        {"--context", NULL, &args->context, NULL}, {"--stride", NULL, &args->stride, NULL},
        {"--verify", NULL, NULL, &args->verify}, {"--decode", NULL, NULL, &args->decode},
        {"--special", NULL, NULL, &args->special}, {"--whole", NULL, NULL, &args->whole},
        {"--plain", NULL, NULL, &args->plain},
    };
    int i;
    size_t k;
    memset(args, 0, sizeof *args);
    args->isa = getenv("TFM_ISA");
    for (i = 0; i < argc; i++) {
        const option *found = NULL;
        char padded[64];
        snprintf(padded, sizeof padded, " %s ", argv[i]);
        for (k = 0; k < sizeof options / sizeof *options; k++)
            if (!strcmp(argv[i], options[k].name) && strstr(allowed, padded))
                found = options + k;
        if (!found && argv[i][0] == '-' && argv[i][1])
            return usage("unknown option ", argv[i]);
        if (!found) {
            if (args->n_paths == n_paths)
                return usage("one argument too many: ", argv[i]);
            args->paths[args->n_paths++] = argv[i];
        } else if (found->flag)
            *found->flag = 1;
        else if (++i == argc)
            return usage("a value is missing after ", argv[i - 1]);
        else if (found->text)
            *found->text = argv[i];
        else if (!parse_number(argv[i], found->number))
            return usage("expected a number greater than 0, found ", argv[i]);
    }
    return args->n_paths < n_paths ? usage("an argument is missing", "") : 0;
}

static tfm_session *create_session(const tfm_model *model, const arguments *args, size_t context, tfm_error *error) {
    tfm_session_options options;
    memset(&options, 0, sizeof options);
    options.context = context;
    options.engine.threads = (int)args->threads;
    if (tfm_isa_from_name(args->isa, &options.engine.isa, error) != TFM_OK)
        return NULL;
    return tfm_session_create(model, &options, error);
}

/* ---- progress: a line on stderr that is written over, if that is a terminal */

static void show_progress(const char *what, double share) {
    static int shown = -1;
    int percent = (int)(share * 100);
    if (percent == shown || !isatty(2))
        return;
    shown = percent;
    fprintf(stderr, "\r%s %3d %%", what, percent);
    if (percent >= 100)
        fputc('\n', stderr);
}

/* ---- info */

static void print_meta(const tfm_meta *meta) {
    size_t i, shown = meta->count < 8 ? meta->count : 8;
    printf("  %-28.*s ", (int)meta->key_size, meta->key);
    switch (meta->type) {
    case TFM_META_TEXT:
        printf("%.*s\n", meta->count < 200 ? (int)meta->count : 200, (const char *)meta->values);
        return;
    case TFM_META_I64:
        for (i = 0; i < shown; i++)
            printf("%lld ", (long long)((const int64_t *)meta->values)[i]);
        break;
    case TFM_META_F64:
        for (i = 0; i < shown; i++)
            printf("%.9g ", ((const double *)meta->values)[i]);
        break;
    case TFM_META_I32:
        for (i = 0; i < shown; i++)
            printf("%ld ", (long)((const int32_t *)meta->values)[i]);
        break;
    case TFM_META_F32:
        for (i = 0; i < shown; i++)
            printf("%.9g ", (double)((const float *)meta->values)[i]);
        break;
    default: printf("(%lu bytes)\n", (unsigned long)meta->count); return;
    }
    if (shown < meta->count)
        printf("... (%lu values)", (unsigned long)meta->count);
    putchar('\n');
}

static void print_tensor(const tfm_entry *entry) {
    static const char *const layouts[] = {"rows", "cols", "panels"};
    const tfm_tensor *tensor = &entry->tensor;
    char shape[64] = "";
    int i;
    for (i = 0; i < tensor->n_dims; i++)
        snprintf(shape + strlen(shape), sizeof shape - strlen(shape), "%s%lu", i ? ", " : "", (unsigned long)tensor->shape[i]);
    printf("  %-44.*s %-5s %-7s [%s]\n", (int)entry->name_size, entry->name, tfm_dtype_name(tensor->dtype),
           layouts[tensor->layout], shape);
}

static int info(int argc, char **argv) {
    arguments args;
    tfm_error error = {TFM_OK, ""};
    tfm_file *file;
    tfm_model *model;
    uint64_t parameters = 0;
    size_t i;
    int status = parse(argc, argv, 1, " --verify ", &args);
    if (status)
        return status;
    file = tfm_file_open(args.paths[0], NULL, &error);
    if (!file)
        return fail(error.message);
    for (i = 0; i < tfm_file_n_tensors(file); i++) {
        const tfm_tensor *tensor = &tfm_file_entry(file, i)->tensor;
        parameters += (uint64_t)tensor->shape[0] * tensor->shape[1] * tensor->shape[2] * tensor->shape[3];
    }
    printf("%s: %lu bytes, %llu parameters, %lu tensors\n", args.paths[0], (unsigned long)tfm_file_bytes(file),
           (unsigned long long)parameters, (unsigned long)tfm_file_n_tensors(file));
    puts("metadata");
    for (i = 0; i < tfm_file_n_meta(file); i++)
        print_meta(tfm_file_meta(file, i));
    puts("tensors");
    for (i = 0; i < tfm_file_n_tensors(file); i++)
        print_tensor(tfm_file_entry(file, i));
    if (args.verify) {
        if (tfm_file_verify(file, &error) != TFM_OK)
            status = fail(error.message);
        else
            puts("verified: every checksum is right");
    }
    tfm_file_close(file);
    if (status)
        return status;
    model = tfm_load(args.paths[0], NULL, &error); /* the description and the tensors must fit together */
    if (!model)
        return fail(error.message);
    tfm_free(model);
    return 0;
}

/* ---- quantize */

static int quantize_progress(void *user, uint64_t done, uint64_t total) {
    (void)user;
    show_progress("quantizing", (double)done / (double)total);
    return 0;
}

static int quantize(int argc, char **argv) {
    arguments args;
    tfm_quantize_options options;
    tfm_error error = {TFM_OK, ""};
    int status = parse(argc, argv, 2, " --type --threads ", &args);
    if (status)
        return status;
    memset(&options, 0, sizeof options);
    options.threads = (int)args.threads;
    options.progress = quantize_progress;
    if (args.type && tfm_dtype_from_name(args.type, &options.dtype, &error) != TFM_OK)
        return usage(error.message, "");
    if (tfm_quantize(args.paths[0], args.paths[1], &options, &error) != TFM_OK)
        return fail(error.message);
    return 0;
}

/* ---- dump */

/* Ids separated by commas. *ids is the caller's to free. NULL and a message if it is not that. */
static int32_t *parse_ids(const char *text, size_t *n) {
    int32_t *ids = (int32_t *)malloc((strlen(text) / 2 + 1) * sizeof *ids);
    const char *at = text;
    *n = 0;
    while (ids) {
        char *end;
        long id = strtol(at, &end, 10);
        if (end == at || (*end && *end != ',') || id > INT32_MAX || id < INT32_MIN)
            break;
        ids[(*n)++] = (int32_t)id;
        if (!*end)
            return ids;
        at = end + 1;
    }
    free(ids);
    fprintf(stderr, "tfm: --ids: expected numbers separated by commas, found '%.60s'\n", text);
    return NULL;
}

/* A two-dimensional float32 array in NumPy's format, version 1.0: whole or not at all. */
static int write_npy(const char *path, const float *data, size_t rows, size_t columns) {
    char header[128], *temporary = (char *)malloc(strlen(path) + sizeof ".part");
    int size, bad = 1;
    FILE *file;
    if (!temporary)
        return fail("out of memory");
    strcpy(temporary, path);
    strcat(temporary, ".part");
    memcpy(header, "\x93NUMPY\x01\x00\x76\x00", 10); /* 0x76 = 118 bytes follow */
    size = snprintf(header + 10, sizeof header - 10, "{'descr': '<f4', 'fortran_order': False, 'shape': (%lu, %lu), }",
                    (unsigned long)rows, (unsigned long)columns);
    memset(header + 10 + size, ' ', sizeof header - 10 - (size_t)size);
    header[sizeof header - 1] = '\n';
    file = fopen(temporary, "wb");
    if (file) {
        bad = fwrite(header, 1, sizeof header, file) != sizeof header || fwrite(data, sizeof *data, rows * columns, file) != rows * columns;
        bad = fclose(file) || bad || rename(temporary, path);
    }
    if (bad) {
        bad = fail_system(path);
        remove(temporary);
    }
    free(temporary);
    return bad;
}

static int dump(int argc, char **argv) {
    arguments args;
    tfm_error error = {TFM_OK, ""};
    tfm_model *model = NULL;
    tfm_session *session = NULL;
    float *outputs = NULL;
    tfm_output what = TFM_LOGITS;
    tfm_chunk chunk;
    int32_t *ids;
    size_t width;
    int status = parse(argc, argv, 1, " --ids --what --isa --threads -o ", &args);
    if (status)
        return status;
    if (!args.ids || !args.output)
        return usage("dump needs --ids and -o", "");
    if (args.what && !strcmp(args.what, "hidden"))
        what = TFM_HIDDEN;
    else if (args.what && strcmp(args.what, "logits"))
        return usage("--what: expected logits or hidden, found ", args.what);
    ids = parse_ids(args.ids, &chunk.n_tokens);
    if (!ids)
        return 1;
    chunk.sequence = 0;
    chunk.tokens = ids;
    chunk.n_outputs = chunk.n_tokens;
    model = tfm_load(args.paths[0], NULL, &error);
    session = model ? create_session(model, &args, 0, &error) : NULL;
    if (session) {
        width = what == TFM_HIDDEN ? tfm_model_description(model)->d_model : tfm_model_description(model)->vocab_size;
        outputs = (float *)malloc(chunk.n_tokens * width * sizeof *outputs);
        if (!outputs)
            status = fail("out of memory");
        else if (tfm_eval(session, &chunk, 1, what, outputs, &error) == TFM_OK)
            status = write_npy(args.output, outputs, chunk.n_tokens, width);
    }
    if (error.status != TFM_OK)
        status = fail(error.message);
    free(outputs);
    free(ids);
    tfm_session_free(session);
    tfm_free(model);
    return status;
}

/* ---- whole files and lines */

/* All that is left of a stream, with a zero behind it. NULL if it can't be read. The caller frees it. */
static char *read_all(FILE *file, size_t *size) {
    size_t capacity = 1 << 16;
    char *text = (char *)malloc(capacity + 1);
    *size = 0;
    while (text) {
        *size += fread(text + *size, 1, capacity - *size, file);
        if (*size < capacity)
            break;
        capacity *= 2;
        {
            char *larger = (char *)realloc(text, capacity + 1);
            if (!larger)
                free(text);
            text = larger;
        }
    }
    if (text && ferror(file)) {
        free(text);
        return NULL;
    }
    if (text)
        text[*size] = 0;
    return text;
}

/* ---- tokenize */

/* The ids of a text, as many as there are. The caller frees them. */
static int32_t *tokenize_text(const tfm_model *model, const char *text, size_t size, unsigned flags, size_t *n,
                              tfm_error *error) {
    size_t capacity = size + 64; /* no token is shorter than a byte; what the tokenizer adds may be more */
    int32_t *ids = NULL;
    for (;;) {
        free(ids);
        ids = (int32_t *)malloc(capacity * sizeof *ids);
        if (!ids) {
            error->status = TFM_ERROR_MEMORY;
            snprintf(error->message, sizeof error->message, "out of memory");
            return NULL;
        }
        if (tfm_tokenize(model, text, size, flags, ids, capacity, n, error) != TFM_OK) {
            free(ids);
            return NULL;
        }
        if (*n <= capacity)
            return ids;
        capacity = *n;
    }
}

static int encode_line(const tfm_model *model, const char *text, size_t size, unsigned flags) {
    tfm_error error = {TFM_OK, ""};
    size_t n, i;
    int32_t *ids = tokenize_text(model, text, size, flags, &n, &error);
    if (!ids)
        return fail(error.message);
    for (i = 0; i < n; i++)
        printf(i ? " %ld" : "%ld", (long)ids[i]);
    putchar('\n');
    free(ids);
    return 0;
}

static int decode_line(const tfm_model *model, const char *text, size_t size, int line_end) {
    const char *end = text + size;
    while (text < end) {
        char *next;
        const char *token;
        size_t token_size;
        long id;
        if (*text == ' ' || *text == '\n' || *text == '\r' || *text == '\t') {
            text++;
            continue;
        }
        errno = 0;
        id = strtol(text, &next, 10);
        token = id >= 0 && id <= INT32_MAX && !errno ? tfm_token_text(model, (int32_t)id, &token_size) : NULL;
        if (next == text || next > end || !token) {
            fprintf(stderr, "tfm: '%.*s' is not the id of a token\n", (int)(strcspn(text, " \n") < 40 ? strcspn(text, " \n") : 40), text);
            return 1;
        }
        fwrite(token, 1, token_size, stdout);
        text = next;
    }
    if (line_end)
        putchar('\n');
    return 0;
}

static int tokenize(int argc, char **argv) {
    arguments args;
    tfm_error error = {TFM_OK, ""};
    tfm_model *model;
    size_t size, start, end;
    unsigned flags;
    char *text;
    int status = parse(argc, argv, 1, " --decode --special --whole --plain ", &args);
    if (status)
        return status;
    flags = (args.special ? TFM_TOKENIZE_SPECIAL : 0u) | (args.plain ? TFM_TOKENIZE_PLAIN : 0u);
    model = tfm_load(args.paths[0], NULL, &error);
    if (!model)
        return fail(error.message);
    if (!tfm_has_tokenizer(model)) {
        tfm_free(model);
        fprintf(stderr, "tfm: %s: the model has no tokenizer\n", args.paths[0]);
        return 1;
    }
    text = read_all(stdin, &size);
    if (!text)
        status = fail("standard input can't be read");
    for (start = 0; text && !status && (start < size || (args.whole && !start && !size)); start = end + 1) {
        const char *line_end = args.whole ? NULL : (const char *)memchr(text + start, '\n', size - start);
        end = line_end ? (size_t)(line_end - text) : size;
        status = args.decode ? decode_line(model, text + start, end - start, !args.whole)
                             : encode_line(model, text + start, end - start, flags);
        if (args.whole)
            break;
    }
    if ((fflush(stdout) || ferror(stdout)) && !status)
        status = fail_system("standard output");
    free(text);
    tfm_free(model);
    return status;
}

/* ---- perplexity */

/* -log softmax(logits)[id] */
static double surprise(const float *logits, size_t n, int32_t id) {
    double sum = 0;
    float max = -INFINITY;
    size_t i;
    for (i = 0; i < n; i++)
        max = logits[i] > max ? logits[i] : max;
    for (i = 0; i < n; i++)
        sum += exp((double)logits[i] - (double)max);
    return log(sum) - ((double)logits[id] - (double)max);
}

/* Windows of `context` tokens, each `stride` after the last; a token is scored in the first window that holds it. */
static tfm_status score(tfm_session *session, const int32_t *ids, size_t n, size_t context, size_t stride, float *logits,
                        double *total, size_t *scored, tfm_error *error) {
    size_t vocab_size = tfm_model_description(tfm_session_model(session))->vocab_size, begin, done = 0, i;
    for (begin = 0; done < n; begin += stride) { /* done: the end of the last window */
        size_t end = begin + context < n ? begin + context : n, first = done > begin + 1 ? done : begin + 1;
        tfm_chunk chunk;
        tfm_status status = tfm_truncate(session, 0, 0, error);
        if (end > begin + 1 && first < end && status == TFM_OK) {
            chunk.sequence = 0;
            chunk.tokens = ids + begin;
            chunk.n_tokens = end - 1 - begin; /* the last token's logits predict what is behind the window */
            chunk.n_outputs = end - first;
            status = tfm_eval(session, &chunk, 1, TFM_LOGITS, logits, error);
            for (i = first; i < end && status == TFM_OK; i++)
                *total += surprise(logits + (i - first) * vocab_size, vocab_size, ids[i]), ++*scored;
        }
        if (status != TFM_OK)
            return status;
        done = end;
        show_progress("perplexity", (double)done / (double)n);
    }
    return TFM_OK;
}

static int perplexity_of(const tfm_model *model, const arguments *args, const int32_t *ids, size_t n) {
    tfm_error error = {TFM_OK, ""};
    const tfm_description *d = tfm_model_description(model);
    size_t context = args->context ? (size_t)args->context : d->n_positions, scored = 0;
    size_t stride = args->stride ? (size_t)args->stride : context;
    tfm_session *session;
    double total = 0;
    float *logits;
    if (context < 2 || context > d->n_positions || stride > context) {
        fprintf(stderr, "tfm: --context must be from 2 to %lu, the model's positions, and --stride no more than that\n",
                (unsigned long)d->n_positions);
        return 1;
    }
    if (n < 2)
        return fail("the text has fewer than two tokens: there is nothing to score");
    session = create_session(model, args, context, &error);
    if (!session)
        return fail(error.message);
    logits = (float *)malloc(context * d->vocab_size * sizeof *logits);
    if (!logits) {
        error.status = TFM_ERROR_MEMORY;
        strcpy(error.message, "out of memory");
    } else
        score(session, ids, n, context, stride, logits, &total, &scored, &error);
    free(logits);
    tfm_session_free(session);
    if (error.status != TFM_OK)
        return fail(error.message);
    printf("tokens %lu, scored %lu, context %lu, stride %lu\n", (unsigned long)n, (unsigned long)scored,
           (unsigned long)context, (unsigned long)stride);
    printf("perplexity %.6f\n", exp(total / (double)scored));
    return 0;
}

static int perplexity(int argc, char **argv) {
    arguments args;
    tfm_error error = {TFM_OK, ""};
    tfm_model *model;
    size_t size, n;
    FILE *file;
    char *text;
    int32_t *ids = NULL;
    int status = parse(argc, argv, 2, " --context --stride --isa --threads ", &args);
    if (status)
        return status;
    file = fopen(args.paths[1], "rb");
    if (!file)
        return fail_system(args.paths[1]);
    text = read_all(file, &size);
    fclose(file);
    if (!text)
        return fail_system(args.paths[1]);
    model = tfm_load(args.paths[0], NULL, &error);
    if (model)
        ids = tokenize_text(model, text, size, TFM_TOKENIZE_PLAIN, &n, &error);
    status = ids ? perplexity_of(model, &args, ids, n) : fail(error.message);
    free(ids);
    free(text);
    tfm_free(model);
    return status;
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        int (*run)(int argc, char **argv);
    } commands[] = {
        {"info", info}, {"quantize", quantize}, {"dump", dump}, {"tokenize", tokenize}, {"perplexity", perplexity},
    };
    size_t i;
    if (argc < 2)
        return usage("a command is missing", "");
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h"))
        return fputs(usage_text, stdout) < 0;
    for (i = 0; i < sizeof commands / sizeof *commands; i++)
        if (!strcmp(argv[1], commands[i].name))
            return commands[i].run(argc - 2, argv + 2);
    return usage("unknown command ", argv[1]);
}
