/* tfm - looks at models, runs them, converts them
 *
 *   tfm info MODEL [--verify]
 *   tfm quantize IN.tfm OUT.tfm [--type int8|f16|bf16|f32] [--threads N]
 *   tfm dump MODEL --ids 1,2,3 [--decoder-ids 0,5] [--types 0,0,1] [--mask 1,1,0] [--what logits|hidden|pooled]
 *       [--kv f32|f16|bf16|int8] [--isa NAME] [--threads N] -o OUT.npy
 *   tfm dump MODEL --input X.npy [--decoder-input Y.npy] [--mask 1,1,0] [--kv f32|f16|bf16|int8] [--isa NAME]
 *       [--threads N] -o OUT.npy
 *   tfm tokenize MODEL [--decode] [--special] [--whole] [--plain] [--pair] [--types] < text
 *   tfm perplexity MODEL TEXTFILE [--context N] [--stride N] [--kv f32|f16|bf16|int8] [--isa NAME] [--threads N]
 *   tfm bench MODEL [--type f32,f16,int8] [--threads N] [--isa NAME] [--prompt 512|4-128] [--gen 64] [--batch 1]
 *       [--kv f32|f16|bf16|int8] [--json FILE] [--svg FILE]
 *
 * dump: --input is for models without token embeddings (PyTorch's nn.Transformer and its parts): float32
 * [tokens, d_model], the encoder's vectors, or what a decoder alone attends to; --decoder-input has the decoder's. The
 * results are hidden states. A decoder's tokens see those before them, or all if the file's decoder.causal is 0. --mask:
 * no token sees those of --ids or --input that have a 0, as with src_key_padding_mask and memory_key_padding_mask.
 *
 * tokenize: ids for each line, or for all of the input (--whole), with what the tokenizer adds by default (not with
 * --plain); special tokens in the text are text unless --special is given. --pair: where a line has a tab, it is two texts.
 * --types: the token types instead of the ids. --decode: the text of ids.
 *
 * bench: --prompt A-B gives the sequences of the batch lengths that are spread evenly from A to B, in a shuffled order
 * that is always the same. Tokens are counted as they are, without padding; beside that stands how long the same takes
 * with every sequence padded to B.
 *
 * Exit status: 0, 1 for errors, 2 for wrong usage.
 */
#define _POSIX_C_SOURCE 200809L
#define _DEFAULT_SOURCE /* madvise */
#define TFM_IMPLEMENTATION
#include "../tfm.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#define isatty _isatty
#define posix_memalign(memory, alignment, size) !(*(memory) = _aligned_malloc(size, alignment))
#define free_aligned _aligned_free
#else
#include <sys/mman.h>
#include <unistd.h>
#define free_aligned free
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#include <immintrin.h>
#elif (defined(__GNUC__) || defined(__clang__)) && defined(__aarch64__)
#include <arm_neon.h>
#endif

static const char usage_text[] =
    "usage: tfm info MODEL [--verify]\n"
    "       tfm quantize IN.tfm OUT.tfm [--type int8|f16|bf16|f32] [--threads N]\n"
    "       tfm dump MODEL --ids 1,2,3 [--decoder-ids 0,5] [--types 0,0,1] [--mask 1,1,0]\n"
    "                [--what logits|hidden|pooled] [--kv f32|f16|bf16|int8] [--isa NAME] [--threads N] -o OUT.npy\n"
    "       tfm dump MODEL --input X.npy [--decoder-input Y.npy] [--mask 1,1,0] [--kv f32|f16|bf16|int8] [--isa NAME]\n"
    "                [--threads N] -o OUT.npy\n"
    "       tfm tokenize MODEL [--decode] [--special] [--whole] [--plain] [--pair] [--types] < text\n"
    "       tfm perplexity MODEL TEXTFILE [--context N] [--stride N] [--kv f32|f16|bf16|int8] [--isa NAME]\n"
    "                      [--threads N]\n"
    "       tfm bench MODEL [--type f32,f16,int8] [--threads N] [--isa NAME] [--prompt 512|4-128] [--gen 64]\n"
    "                 [--batch 1] [--kv f32|f16|bf16|int8] [--json FILE] [--svg FILE]\n";

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

/* The last thing that a subcommand does with its exit status: what it printed has arrived, or that is an error. */
static int finish(int status) {
    return (fflush(stdout) || ferror(stdout)) && !status ? fail_system("standard output") : status;
}

/* All that the subcommands take; each subcommand says which of it. */
typedef struct arguments {
    const char *paths[2];
    int n_paths;
    const char *ids, *decoder_ids, *type_ids, *mask, *what, *isa, *output, *type, *kv, *json, *svg, *prompt, *input,
        *decoder_input;
    int verify, decode, special, whole, plain, pair, types;
    tfm_dtype kv_dtype; /* what kv names */
    long threads, context, stride, gen, batch;
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

static int is_same_file(const char *a, const char *b) {
    struct stat of_a, of_b;
    if (!strcmp(a, b))
        return 1;
    return !stat(a, &of_a) && !stat(b, &of_b) && of_a.st_ino && of_a.st_ino == of_b.st_ino &&
           of_a.st_dev == of_b.st_dev && S_ISREG(of_a.st_mode);
}

/* Says which file would be written over the model or the vectors that are read; 0: none. */
static int check_outputs(const arguments *args) {
    const char *const outputs[] = {args->output, args->json, args->svg};
    const char *const inputs[] = {args->paths[0], args->input, args->decoder_input};
    size_t i, k;
    for (i = 0; i < sizeof outputs / sizeof *outputs; i++)
        for (k = 0; k < sizeof inputs / sizeof *inputs; k++)
            if (outputs[i] && inputs[k] && is_same_file(outputs[i], inputs[k])) {
                fprintf(stderr, "tfm: %s: is also read, and would be lost\n", outputs[i]);
                return 1;
            }
    return 0;
}

/* 0, or the exit status of wrong usage. `allowed` are the names of the subcommand's options, separated by spaces. */
static int parse(int argc, char **argv, int n_paths, const char *allowed, arguments *args) {
    const option options[] = {
        {"--ids", &args->ids, NULL, NULL},         {"--what", &args->what, NULL, NULL},
        {"--isa", &args->isa, NULL, NULL},         {"-o", &args->output, NULL, NULL},
        {"--type", &args->type, NULL, NULL},       {"--kv", &args->kv, NULL, NULL},
        {"--threads", NULL, &args->threads, NULL}, {"--context", NULL, &args->context, NULL},
        {"--stride", NULL, &args->stride, NULL},   {"--verify", NULL, NULL, &args->verify},
        {"--decode", NULL, NULL, &args->decode},   {"--special", NULL, NULL, &args->special},
        {"--whole", NULL, NULL, &args->whole},     {"--plain", NULL, NULL, &args->plain},
        {"--json", &args->json, NULL, NULL},       {"--svg", &args->svg, NULL, NULL},
        {"--prompt", &args->prompt, NULL, NULL},   {"--gen", NULL, &args->gen, NULL},
        {"--batch", NULL, &args->batch, NULL},     {"--pair", NULL, NULL, &args->pair},
        {"--types", NULL, NULL, &args->types},     {"--types", &args->type_ids, NULL, NULL},
        {"--mask", &args->mask, NULL, NULL},       {"--decoder-ids", &args->decoder_ids, NULL, NULL},
        {"--input", &args->input, NULL, NULL},     {"--decoder-input", &args->decoder_input, NULL, NULL},
    };
    const int has_lists = strstr(allowed, " --types --mask ") != NULL; /* dump's --types has a value */
    tfm_error error = {TFM_OK, ""};
    int i;
    size_t k;
    memset(args, 0, sizeof *args);
    args->isa = getenv("TFM_ISA");
    for (i = 0; i < argc; i++) {
        const option *found = NULL;
        char padded[64];
        snprintf(padded, sizeof padded, " %s ", argv[i]);
        for (k = 0; k < sizeof options / sizeof *options; k++)
            if (!strcmp(argv[i], options[k].name) && strstr(allowed, padded) &&
                (strcmp(argv[i], "--types") || has_lists == !options[k].flag))
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
        else if (!parse_number(argv[i], found->number)) {
            fprintf(stderr, "tfm: %s: expected a number greater than 0, found '%s'\n%s", argv[i - 1], argv[i],
                    usage_text);
            return 2;
        }
    }
    if (args->kv && tfm_dtype_from_name(args->kv, &args->kv_dtype, &error) != TFM_OK)
        return usage("--kv: ", error.message);
    if (args->threads > 1024)
        return usage("--threads: at most 1024", "");
    return args->n_paths < n_paths ? usage("an argument is missing", "") : check_outputs(args);
}

/* `source`: tokens for the encoder. 0: the model's positions. */
static tfm_session *create_session_of(const tfm_model *model, const arguments *args, size_t context, size_t source,
                                      tfm_error *error) {
    tfm_session_options options;
    memset(&options, 0, sizeof options);
    options.context = context;
    options.source = source;
    options.engine.threads = (int)args->threads;
    options.kv_dtype = args->kv_dtype;
    if (tfm_isa_from_name(args->isa, &options.engine.isa, error) != TFM_OK)
        return NULL;
    return tfm_session_create(model, &options, error);
}

static tfm_session *create_session(const tfm_model *model, const arguments *args, size_t context, tfm_error *error) {
    return create_session_of(model, args, context, 0, error);
}

/* For a text and a decoder's ids, as long as they are: relative positions have no other limit. */
static tfm_session *create_session_for(const tfm_model *model, const arguments *args, const tfm_text *text,
                                       size_t n_decoder_ids, tfm_error *error) {
    if (tfm_model_description(model)->kind == TFM_ENCODER_DECODER)
        return create_session_of(model, args, n_decoder_ids, text->n_tokens, error);
    return create_session_of(model, args, text->n_tokens, 0, error);
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

/* ---- files that are written: whole, under their name, or not at all */

typedef struct output {
    char *path;
    char *temporary; /* what it is called until it is whole; NULL: it is no file that could be replaced, as a device */
    FILE *file;
} output;

/* A new copy of two texts, one behind the other, or NULL. */
static char *join(const char *a, const char *b) {
    char *text = (char *)malloc(strlen(a) + strlen(b) + 1);
    if (text)
        strcat(strcpy(text, a), b);
    return text;
}

static int is_link(const char *path) {
#ifdef _WIN32
    (void)path;
    return 0;
#else
    struct stat status;
    return !lstat(path, &status) && S_ISLNK(status.st_mode);
#endif
}

/* The path of the file that a link leads to, or the path itself: what is replaced is the file. (Root would lose
 * /dev/stdout, a link to whatever file that is.) The caller frees it; NULL: no memory. */
static char *follow_link(const char *path) {
#ifndef _WIN32
    char *file = is_link(path) ? realpath(path, NULL) : NULL;
    if (file)
        return file;
#endif
    return join(path, "");
}

static void output_free(output *out) {
    free(out->temporary);
    free(out->path);
}

/* 0, or the exit status after a message. */
static int output_open(output *out, const char *path) {
    struct stat status;
    int replace;
    memset(out, 0, sizeof *out);
    replace = stat(path, &status) || S_ISREG(status.st_mode);
    out->path = replace ? follow_link(path) : join(path, "");
    if (out->path && replace && !is_link(out->path)) /* still a link: to a file without a name, or to none */
        out->temporary = join(out->path, ".part");
    else
        replace = 0;
    if (!out->path || (replace && !out->temporary)) {
        output_free(out);
        return fail("out of memory");
    }
    out->file = fopen(replace ? out->temporary : out->path, "wb");
    if (out->file)
        return 0;
    output_free(out);
    return fail_system(path);
}

/* Failures of the writes before are found here too. */
static int output_close(output *out) {
    int bad = fflush(out->file) || ferror(out->file);
    bad = fclose(out->file) || bad;
#ifdef _WIN32 /* whose rename replaces nothing */
    if (!bad && out->temporary)
        remove(out->path);
#endif
    bad = bad || (out->temporary && rename(out->temporary, out->path));
    if (bad) {
        bad = fail_system(out->path);
        if (out->temporary)
            remove(out->temporary);
    }
    output_free(out);
    return bad;
}

/* 0, or the exit status after a message: for what takes long before it writes. (A pipe can be opened only once.) */
static int output_check(const char *path) {
    struct stat found;
    output out;
    int checks = path && (stat(path, &found) || !S_ISFIFO(found.st_mode)),
        status = checks ? output_open(&out, path) : 0;
    if (checks && !status) {
        fclose(out.file);
        if (out.temporary)
            remove(out.temporary);
        output_free(&out);
    }
    return status;
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
        snprintf(shape + strlen(shape), sizeof shape - strlen(shape), "%s%lu", i ? ", " : "",
                 (unsigned long)tensor->shape[i]);
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
    return finish(0);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
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
    tfm_file *file;
    int status = parse(argc, argv, 2, " --type --threads ", &args);
    double start = now();
    char *path;
    if (status)
        return status;
    memset(&options, 0, sizeof options);
    options.threads = (int)args.threads;
    options.progress = quantize_progress;
    if (args.type && tfm_dtype_from_name(args.type, &options.dtype, &error) != TFM_OK)
        return usage(error.message, "");
    path = follow_link(args.paths[1]);
    if (!path)
        return fail("out of memory");
    if (is_link(path)) {
        free(path);
        fprintf(stderr, "tfm: %s: a link that leads to no file; expected a file, or a name for a new one\n",
                args.paths[1]);
        return 1;
    }
    status = tfm_quantize(args.paths[0], path, &options, &error) == TFM_OK ? 0 : fail(error.message);
    free(path);
    if (status)
        return status;
    start = now() - start;
    file = tfm_file_open(args.paths[1], NULL, &error);
    if (!file)
        return fail(error.message);
    fprintf(stderr, "tfm: %s: %lu tensors, %llu bytes, %.2f seconds\n", args.paths[1],
            (unsigned long)tfm_file_n_tensors(file), (unsigned long long)tfm_file_bytes(file), start);
    tfm_file_close(file);
    return 0;
}

/* ---- whole files */

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

/* ---- dump */

/* Numbers separated by commas, the value of an option; NULL, and a message, if it is not that. The caller frees them. */
static int32_t *parse_ids(const char *option_name, const char *text, size_t *n) {
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
    fprintf(stderr, "tfm: %s: expected numbers separated by commas, found '%.60s'\n", option_name, text);
    return NULL;
}

/* A float32 array [rows][columns], or, if rows is 0, [columns], in NumPy's format, version 1.0. */
static int write_npy(const char *path, const float *data, size_t rows, size_t columns) {
    const uint16_t one = 1;
    const char order =
        *(const unsigned char *)&one ? '<' : '>'; /* this machine's: the numbers are written as they are */
    char header[128];
    output out;
    int size;
    if (output_open(&out, path))
        return 1;
    memcpy(header, "\x93NUMPY\x01\x00\x76\x00", 10); /* 0x76 = 118 bytes follow */
    if (rows)
        size = snprintf(header + 10, sizeof header - 10,
                        "{'descr': '%cf4', 'fortran_order': False, 'shape': (%lu, %lu), }", order, (unsigned long)rows,
                        (unsigned long)columns);
    else
        size = snprintf(header + 10, sizeof header - 10, "{'descr': '%cf4', 'fortran_order': False, 'shape': (%lu,), }",
                        order, (unsigned long)columns);
    memset(header + 10 + size, ' ', sizeof header - 10 - (size_t)size);
    header[sizeof header - 1] = '\n';
    fwrite(header, 1, sizeof header, out.file);
    fwrite(data, sizeof *data, (rows ? rows : 1) * columns, out.file);
    return output_close(&out);
}

/* What is dumped: the inputs, and the outputs [rows][columns]. */
typedef struct dumping {
    tfm_text text;
    int32_t *decoder_ids;
    size_t n_decoder_ids;
    tfm_output what;
    int wants_pooled;
    float *outputs;
    size_t rows, columns;
} dumping;

static void dump_free(dumping *d) {
    free((void *)d->text.tokens);
    free((void *)d->text.types);
    free((void *)d->text.mask);
    free(d->decoder_ids);
    free(d->outputs);
}

/* One number for each of --ids, or another option's, or an exit status. */
static int dump_list(const char *option_name, const char *text, const char *of, size_t n_ids, const int32_t **list) {
    size_t n;
    if (!text)
        return 0;
    *list = parse_ids(option_name, text, &n);
    if (*list && n != n_ids) {
        fprintf(stderr, "tfm: %s has %lu numbers, and %s %lu\n", option_name, (unsigned long)n, of,
                (unsigned long)n_ids);
        return 1;
    }
    return *list ? 0 : 1;
}

static int dump_inputs(const arguments *args, dumping *d) {
    size_t n;
    d->text.tokens = parse_ids("--ids", args->ids, &d->text.n_tokens);
    if (!d->text.tokens)
        return 1;
    n = d->text.n_tokens;
    if (dump_list("--types", args->type_ids, "--ids", n, &d->text.types) ||
        dump_list("--mask", args->mask, "--ids", n, &d->text.mask))
        return 1;
    if (args->decoder_ids)
        d->decoder_ids = parse_ids("--decoder-ids", args->decoder_ids, &d->n_decoder_ids);
    return args->decoder_ids && !d->decoder_ids ? 1 : 0;
}

/* How many numbers will come out. A classifier's scores are the logits of a model that has no others. */
static tfm_status dump_shape(dumping *d, const tfm_model *model, tfm_error *error) {
    const tfm_description *description = tfm_model_description(model);
    if (description->kind == TFM_ENCODER && d->decoder_ids) {
        snprintf(error->message, sizeof error->message, "--decoder-ids is for models with a decoder");
        return error->status = TFM_ERROR_ARGUMENT;
    }
    if (!description->vocab_size) {
        snprintf(error->message, sizeof error->message,
                 "the model has no token embeddings: it takes vectors, --input X.npy, in place of --ids");
        return error->status = TFM_ERROR_ARGUMENT;
    }
    d->rows = d->decoder_ids ? d->n_decoder_ids : d->text.n_tokens;
    d->columns = d->what == TFM_LOGITS ? description->vocab_size : description->d_model;
    if (d->what == TFM_LOGITS && description->head == TFM_NO_HEAD && description->classifier) {
        d->what = TFM_CLASSES;
        d->columns = description->n_labels;
        if (description->classifier == TFM_SEQUENCE_CLASSIFIER)
            d->rows = 1;
    }
    if (d->what == TFM_POOLED)
        d->rows = 1;
    d->outputs = (float *)malloc(d->rows * d->columns * sizeof *d->outputs);
    if (d->outputs)
        return TFM_OK;
    snprintf(error->message, sizeof error->message, "out of memory");
    return error->status = TFM_ERROR_MEMORY;
}

static tfm_status dump_run(dumping *d, tfm_session *session, tfm_error *error) {
    const tfm_kind kind = tfm_model_description(tfm_session_model(session))->kind;
    tfm_chunk chunk;
    chunk.sequence = 0;
    chunk.tokens = d->decoder_ids ? d->decoder_ids : d->text.tokens;
    chunk.n_tokens = chunk.n_outputs = d->rows;
    if (kind == TFM_ENCODER || (kind == TFM_ENCODER_DECODER && !d->decoder_ids))
        return tfm_encode(session, &d->text, 1, d->what, d->outputs, error);
    if (kind == TFM_DECODER && (d->text.types || d->text.mask || d->decoder_ids)) {
        snprintf(error->message, sizeof error->message,
                 "a decoder takes --ids alone: --types, --mask and --decoder-ids are for models with an encoder");
        return error->status = TFM_ERROR_ARGUMENT;
    }
    if (kind == TFM_ENCODER_DECODER && tfm_set_source(session, 0, &d->text, error) != TFM_OK)
        return error->status;
    return tfm_eval(session, &chunk, 1, d->what, d->outputs, error);
}

/* The model, to be compared with others: so GGUF's quantized types, which only the packing rounds again, become fp32. */
static tfm_model *dump_load(const char *path, tfm_error *error) {
    tfm_load_options options;
    tfm_file *file = tfm_file_open(path, NULL, error);
    size_t i;
    memset(&options, 0, sizeof options);
    for (i = 0; file && i < tfm_file_n_tensors(file); i++)
        if (tfm_file_entry(file, i)->tensor.dtype >= TFM_DTYPE_COUNT)
            options.dtype = TFM_F32;
    tfm_file_close(file);
    return file ? tfm_load(path, &options, error) : NULL;
}

/* The results of a model on the ids of the options. */
static int dump_ids(const arguments *args, tfm_output what) {
    tfm_error error = {TFM_OK, ""};
    tfm_model *model = NULL;
    tfm_session *session = NULL;
    dumping d;
    int status;
    memset(&d, 0, sizeof d);
    d.what = what;
    status = dump_inputs(args, &d);
    if (!status) {
        model = dump_load(args->paths[0], &error);
        session = model ? create_session_for(model, args, &d.text, d.n_decoder_ids, &error) : NULL;
        if (session && dump_shape(&d, model, &error) == TFM_OK && dump_run(&d, session, &error) == TFM_OK)
            status = write_npy(args->output, d.outputs, what == TFM_POOLED ? 0 : d.rows, d.columns);
        if (error.status != TFM_OK)
            status = fail(error.message);
    }
    dump_free(&d);
    tfm_session_free(session);
    tfm_free(model);
    return status;
}

/* ---- dump: models without token embeddings, which take vectors */

/* [rows][columns] */
typedef struct matrix {
    float *data;
    size_t rows, columns;
} matrix;

/* What the header of a .npy file says: a matrix of float32, as NumPy writes it. NULL, or what is wrong. */
static const char *parse_npy(const char *header, matrix *m) {
    const uint16_t one = 1;
    const char *const type = *(const unsigned char *)&one ? "'descr': '<f4'" : "'descr': '>f4'";
    const char *shape = strstr(header, "'shape': (");
    unsigned long rows, columns;
    int end = 0;
    if (!strstr(header, type))
        return "expected numbers of type float32, in this machine's byte order";
    if (!strstr(header, "'fortran_order': False"))
        return "expected the rows one after another (C order)";
    if (!shape || sscanf(shape + 10, "%lu, %lu%n", &rows, &columns, &end) != 2 || shape[10 + end] != ')' || !rows)
        return "expected two dimensions, [tokens, d_model]";
    m->rows = (size_t)rows;
    m->columns = (size_t)columns;
    return NULL;
}

/* NULL, or what is wrong with the file. */
static const char *copy_npy(const char *bytes, size_t size, size_t columns, matrix *m) {
    const unsigned char *b = (const unsigned char *)bytes;
    char header[256];
    const char *wrong;
    size_t header_size;
    if (size < 10 || memcmp(bytes, "\x93NUMPY\x01\x00", 8))
        return "not a .npy file of version 1.0";
    header_size = b[8] | (size_t)b[9] << 8;
    if (header_size > size - 10)
        return "the file is truncated";
    snprintf(header, sizeof header, "%.*s", (int)header_size, bytes + 10);
    wrong = parse_npy(header, m);
    if (wrong)
        return wrong;
    if (m->columns != columns)
        return "the vectors' length is not the model's d_model";
    size -= 10 + header_size;
    if (size % (columns * sizeof *m->data) || size / (columns * sizeof *m->data) != m->rows)
        return "the size of the file does not fit its shape";
    m->data = (float *)malloc(size);
    if (!m->data)
        return "out of memory";
    memcpy(m->data, bytes + 10 + header_size, size);
    return NULL;
}

/* 0, or the exit status after a message. */
static int read_npy(const char *path, size_t columns, matrix *m) {
    FILE *file = fopen(path, "rb");
    size_t size;
    char *bytes = file ? read_all(file, &size) : NULL;
    const char *wrong = bytes ? copy_npy(bytes, size, columns, m) : NULL;
    if (!bytes)
        fail_system(path);
    if (wrong)
        fprintf(stderr, "tfm: %s: %s\n", path, wrong);
    if (file)
        fclose(file);
    free(bytes);
    return !m->data;
}

/* A run of a model on vectors. */
typedef struct vectors {
    const tfm_model *model;
    const tfm_description *d;
    tfm_engine *engine;
    matrix input, decoder_input; /* and in their place the results of the encoder, of the decoder */
    const int32_t *mask;         /* [input.rows]; NULL: all are seen */
    float *scores;               /* [input.rows], of the mask: what is added to attention's scores */
} vectors;

/* x becomes what all blocks and the norm behind them make of it. */
static tfm_status run_stack(const vectors *v, int encoder, matrix *x, const tfm_span *span, tfm_error *error) {
    const tfm_norm *norm = encoder ? tfm_model_encoder_final_norm(v->model) : tfm_model_final_norm(v->model);
    const tfm_stack *stack = encoder ? &v->d->encoder : &v->d->decoder;
    tfm_status status = TFM_OK;
    size_t i;
    if (x->rows > stack->n_positions) {
        snprintf(error->message, sizeof error->message, "%lu tokens are more than the model's %lu positions",
                 (unsigned long)x->rows, (unsigned long)stack->n_positions);
        return error->status = TFM_ERROR_CONTEXT_FULL;
    }
    for (i = 0; i < stack->n_layers && status == TFM_OK; i++)
        status =
            tfm_block_forward(v->engine, encoder ? tfm_model_encoder_block(v->model, i) : tfm_model_block(v->model, i),
                              i, x->data, span, 1, error);
    return status == TFM_OK && norm ? tfm_norm_forward(v->engine, norm, x->data, x->rows, x->data, error) : status;
}

static tfm_status run_encoder(vectors *v, tfm_error *error) {
    tfm_span span;
    size_t i;
    memset(&span, 0, sizeof span);
    span.n_rows = v->input.rows;
    if (v->mask) {
        for (i = 0; i < v->input.rows; i++)
            v->scores[i] = v->mask[i] ? 0 : -INFINITY;
        span.mask = v->scores;
        span.same_mask = 1;
    }
    return run_stack(v, 1, &v->input, &span, error);
}

/* The decoder attends to the vectors of the input that are seen; the others are left out. */
static tfm_status run_decoder(vectors *v, tfm_dtype kv_dtype, tfm_error *error) {
    const tfm_stack *stack = &v->d->decoder;
    const size_t width = v->d->d_model;
    tfm_status status;
    tfm_span span;
    tfm_kv memory;
    size_t n = 0, i;
    memset(&span, 0, sizeof span);
    memset(&memory, 0, sizeof memory);
    for (i = 0; i < v->input.rows; i++)
        if (!v->mask || v->mask[i])
            memmove(v->input.data + n++ * width, v->input.data + i * width, width * sizeof(float));
    status = tfm_kv_create(&memory, kv_dtype, stack->n_layers, stack->n_kv_heads, stack->head_dim, n, NULL, error);
    for (i = 0; i < stack->n_layers && status == TFM_OK; i++)
        status = tfm_memory_forward(v->engine, tfm_model_block(v->model, i), i, v->input.data, n, &memory, error);
    memory.n_tokens = n;
    span.n_rows = v->decoder_input.rows;
    span.memory = &memory;
    if (status == TFM_OK)
        status = run_stack(v, 0, &v->decoder_input, &span, error);
    tfm_kv_free(&memory, NULL);
    return status;
}

/* The vectors of the options. 0, or the exit status after a message. */
static int read_vectors(const arguments *args, vectors *v) {
    int32_t seen = 0;
    size_t i;
    if (v->d->vocab_size)
        return fail("--input is for models without token embeddings: this one takes --ids");
    if (v->d->kind == TFM_ENCODER && args->decoder_input)
        return fail("--decoder-input is for models with a decoder");
    if (v->d->kind == TFM_DECODER && (!v->d->decoder.cross || !args->decoder_input))
        return fail("a decoder takes --input, which it attends to, and --decoder-input");
    if (read_npy(args->input, v->d->d_model, &v->input) ||
        (args->decoder_input && read_npy(args->decoder_input, v->d->d_model, &v->decoder_input)) ||
        dump_list("--mask", args->mask, "--input", v->input.rows, &v->mask))
        return 1;
    for (i = 0; v->mask && i < v->input.rows; i++)
        seen |= v->mask[i];
    if (v->mask && !seen)
        return fail("--mask: no token is left to be seen");
    v->scores = (float *)malloc(v->input.rows * sizeof *v->scores);
    return v->scores ? 0 : fail("out of memory");
}

/* The hidden states of a model on vectors: its decoder's, or its encoder's if there is no --decoder-input. */
static int dump_vectors(const arguments *args) {
    tfm_engine_options options;
    tfm_error error = {TFM_OK, ""};
    tfm_model *model;
    vectors v;
    int status = 0;
    memset(&options, 0, sizeof options);
    memset(&v, 0, sizeof v);
    options.threads = (int)args->threads;
    if (tfm_isa_from_name(args->isa, &options.isa, &error) == TFM_OK)
        v.engine = tfm_engine_create(&options, &error);
    v.model = model = v.engine ? tfm_load(args->paths[0], NULL, &error) : NULL;
    if (model) {
        const matrix *result = args->decoder_input ? &v.decoder_input : &v.input;
        v.d = tfm_model_description(model);
        status = read_vectors(args, &v);
        if (!status && (v.d->kind == TFM_DECODER || run_encoder(&v, &error) == TFM_OK) &&
            (!args->decoder_input || run_decoder(&v, args->kv ? args->kv_dtype : TFM_F32, &error) == TFM_OK))
            status = write_npy(args->output, result->data, result->rows, result->columns);
    }
    if (error.status != TFM_OK)
        status = fail(error.message);
    free(v.input.data);
    free(v.decoder_input.data);
    free((void *)v.mask);
    free(v.scores);
    tfm_engine_free(v.engine);
    tfm_free(model);
    return status;
}

/* ---- dump: the command */

static int dump(int argc, char **argv) {
    arguments args;
    tfm_output what = TFM_LOGITS;
    int status =
        parse(argc, argv, 1,
              " --ids --decoder-ids --types --mask --what --kv --isa --threads --input --decoder-input -o ", &args);
    if (status)
        return status;
    if (!(args.ids || args.input) || !args.output)
        return usage("dump needs --ids and -o", ", or --input and -o");
    if (args.input && (args.ids || args.decoder_ids || args.type_ids))
        return usage("--input takes the place of --ids, --decoder-ids and --types", "");
    if (!args.input && args.decoder_input)
        return usage("--decoder-input is for --input", "");
    if (args.what && !strcmp(args.what, "hidden"))
        what = TFM_HIDDEN;
    else if (args.what && !strcmp(args.what, "pooled"))
        what = TFM_POOLED;
    else if (args.what && strcmp(args.what, "logits"))
        return usage("--what: expected logits, hidden or pooled, found ", args.what);
    if (args.input && args.what && what != TFM_HIDDEN)
        return usage("--what: expected hidden, the results of --input, found ", args.what);
    return args.input ? dump_vectors(&args) : dump_ids(&args, what);
}

/* ---- tokenize */

/* The ids of a text, or of the two that a tab separates if `pair`, or their types, as many as there are. The caller frees
   them. */
static int32_t *tokenize_text(const tfm_model *model, const char *text, size_t size, unsigned flags, int pair,
                              int types, size_t *n, tfm_error *error) {
    const char *tab = pair ? (const char *)memchr(text, '\t', size) : NULL;
    size_t first = tab ? (size_t)(tab - text) : size;
    size_t capacity = size + 64; /* no token is shorter than a byte; what the tokenizer adds may be more */
    int32_t *ids = NULL;
    for (;;) {
        free(ids);
        ids = (int32_t *)malloc(2 * capacity * sizeof *ids);
        if (!ids) {
            error->status = TFM_ERROR_MEMORY;
            snprintf(error->message, sizeof error->message, "out of memory");
            return NULL;
        }
        if (tfm_tokenize_pair(model, text, first, tab ? tab + 1 : NULL, tab ? size - first - 1 : 0, flags, ids,
                              ids + capacity, capacity, n, error) != TFM_OK) {
            free(ids);
            return NULL;
        }
        if (*n <= capacity)
            break;
        capacity = *n;
    }
    if (types)
        memmove(ids, ids + capacity, *n * sizeof *ids);
    return ids;
}

static int encode_line(const tfm_model *model, const char *text, size_t size, const arguments *args) {
    tfm_error error = {TFM_OK, ""};
    unsigned flags = (args->special ? TFM_TOKENIZE_SPECIAL : 0u) | (args->plain ? TFM_TOKENIZE_PLAIN : 0u);
    size_t n, i;
    int32_t *ids = tokenize_text(model, text, size, flags, args->pair, args->types, &n, &error);
    if (!ids)
        return fail(error.message);
    for (i = 0; i < n; i++)
        printf(i ? " %ld" : "%ld", (long)ids[i]);
    putchar('\n');
    free(ids);
    return 0;
}

/* The ids in a text. The caller frees them; NULL, and a message, if there is anything else. */
static int32_t *read_ids(const char *text, size_t size, size_t *n) {
    const char *end = text + size;
    int32_t *ids = (int32_t *)malloc((size / 2 + 1) * sizeof *ids);
    *n = 0;
    if (!ids)
        fail("out of memory");
    while (ids && text < end) {
        char *next;
        long id;
        if (*text == ' ' || *text == '\n' || *text == '\r' || *text == '\t') {
            text++;
            continue;
        }
        errno = 0;
        id = strtol(text, &next, 10);
        if (next == text || next > end || id < 0 || id > INT32_MAX || errno) {
            size_t shown = strcspn(text, " \n");
            fprintf(stderr, "tfm: '%.*s' is not the id of a token\n", (int)(shown < 40 ? shown : 40), text);
            free(ids);
            return NULL;
        }
        ids[(*n)++] = (int32_t)id;
        text = next;
    }
    return ids;
}

static int decode_line(const tfm_model *model, const char *text, size_t size, int line_end) {
    tfm_error error = {TFM_OK, ""};
    size_t n, n_bytes, room;
    int32_t *ids = read_ids(text, size, &n);
    char *bytes = NULL;
    int status = ids == NULL;
    if (!status && tfm_decode(model, ids, n, NULL, 0, &n_bytes, &error) != TFM_OK)
        status = fail(error.message);
    if (!status) {
        room = n_bytes;
        bytes = (char *)malloc(room + 1);
        status = bytes ? 0 : fail("out of memory");
    }
    if (!status && tfm_decode(model, ids, n, bytes, room, &n_bytes, &error) != TFM_OK)
        status = fail(error.message);
    if (!status) {
        fwrite(bytes, 1, n_bytes, stdout);
        if (line_end)
            putchar('\n');
    }
    free(bytes);
    free(ids);
    return status;
}

static int tokenize(int argc, char **argv) {
    arguments args;
    tfm_error error = {TFM_OK, ""};
    tfm_model *model;
    size_t size, start, end;
    char *text;
    int status = parse(argc, argv, 1, " --decode --special --whole --plain --pair --types ", &args);
    if (status)
        return status;
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
                             : encode_line(model, text + start, end - start, &args);
        if (args.whole)
            break;
    }
    free(text);
    tfm_free(model);
    return finish(status);
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
static tfm_status score(tfm_session *session, const int32_t *ids, size_t n, size_t context, size_t stride,
                        float *logits, double *total, size_t *scored, tfm_error *error) {
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
    const size_t n_positions = tfm_model_stack(model)->n_positions;
    size_t context = args->context ? (size_t)args->context : n_positions, scored = 0;
    size_t stride = args->stride ? (size_t)args->stride : context;
    tfm_session *session;
    double total = 0;
    float *logits;
    if (d->kind != TFM_DECODER || !n_positions)
        return fail("perplexity is of a decoder, which the model is not");
    if (context < 2 || context > n_positions || stride > context) {
        fprintf(stderr, "tfm: --context must be from 2 to %lu, the model's positions, and --stride no more than that\n",
                (unsigned long)n_positions);
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
    int status = parse(argc, argv, 2, " --context --stride --kv --isa --threads ", &args);
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
        ids = tokenize_text(model, text, size, TFM_TOKENIZE_PLAIN, 0, 0, &n, &error);
    status = ids ? perplexity_of(model, &args, ids, n) : fail(error.message);
    free(ids);
    free(text);
    tfm_free(model);
    return finish(status);
}

/* ---- bench: what this machine can do at most
 * The read bandwidth, and the multiply-add peaks of the instruction set in use. Each loop is handed out in small
 * pieces, as in the library, so that limits suffer from a busy neighbour no more than what is compared with them. */

enum { PEAK_ROUNDS = 5000 }; /* of a piece: some 0.03 ms */

/* Ten sums at a time, which do not wait for each other: more than the latency of any x86 times its ports. In assembly,
 * because GCC 12 spills dpbusd's accumulators, and because volatile assembly is not optimized away. Operands: %0 to %9
 * sums, %10 for results between, %11 factors. */
#define PEAK_TEN(step, constraint, sum, between, x)                                                                    \
    __asm__ volatile(step(0) step(1) step(2) step(3) step(4) step(5) step(6) step(7) step(8) step(9)                   \
                     : "+" constraint((sum)[0]), "+" constraint((sum)[1]), "+" constraint((sum)[2]),                   \
                       "+" constraint((sum)[3]), "+" constraint((sum)[4]), "+" constraint((sum)[5]),                   \
                       "+" constraint((sum)[6]), "+" constraint((sum)[7]), "+" constraint((sum)[8]),                   \
                       "+" constraint((sum)[9]), "=&" constraint(between)                                              \
                     : constraint(x))

/* A piece: PEAK_ROUNDS times `tens` times ten steps. The factors are not 0, whose products take less power. */
#define PEAK(name, target, vector, factor, constraint, step, tens)                                                     \
    static target void name(void *unused, size_t index) {                                                              \
        vector sum[10 * tens], between, x = factor;                                                                    \
        long round;                                                                                                    \
        (void)unused, (void)index;                                                                                     \
        memset(sum, 0, sizeof sum);                                                                                    \
        for (round = 0; round < PEAK_ROUNDS; round++) {                                                                \
            PEAK_TEN(step, constraint, sum, between, x);                                                               \
            if (tens > 1)                                                                                              \
                PEAK_TEN(step, constraint, sum + 10 * (tens - 1), between, x);                                         \
        }                                                                                                              \
    }

#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define FMA(i) "vfmadd231ps {%11, %11, %" #i "|%" #i ", %11, %11}\n\t"
#define DPBUSD(i) "vpdpbusd {%11, %11, %" #i "|%" #i ", %11, %11}\n\t"
#define DPBUSD_VEX(i) "%{vex%} vpdpbusd {%11, %11, %" #i "|%" #i ", %11, %11}\n\t"
#define MADDUBS(i)                                                                                                     \
    "vpmaddubsw {%11, %11, %10|%10, %11, %11}\n\tvpmaddwd {%11, %10, %10|%10, %10, %11}\n\t"                           \
    "vpaddd {%10, %" #i ", %" #i "|%" #i ", %" #i ", %10}\n\t"
#define FOR_AVX2 __attribute__((target("avx2,fma")))
#define FOR_AVX512 __attribute__((target("avx512f,avx512bw")))
#define FOR_AVX512VNNI __attribute__((target("avx512f,avx512bw,avx512vnni")))
PEAK(peak_fp32_avx2, FOR_AVX2, __m256, _mm256_set1_ps(0.01f), "x", FMA, 1)
PEAK(peak_int8_avx2, FOR_AVX2, __m256i, _mm256_set1_epi8(60), "x", MADDUBS, 1)
PEAK(peak_fp32_avx512, FOR_AVX512, __m512, _mm512_set1_ps(0.01f), "v", FMA, 1)
PEAK(peak_int8_avx512, FOR_AVX512, __m512i, _mm512_set1_epi8(60), "v", MADDUBS, 1)
PEAK(peak_int8_avx512vnni, FOR_AVX512VNNI, __m512i, _mm512_set1_epi8(60), "v", DPBUSD, 1)
#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define FOR_AVXVNNI __attribute__((target("avx2,avxvnni")))
PEAK(peak_int8_avxvnni, FOR_AVXVNNI, __m256i, _mm256_set1_epi8(60), "x", DPBUSD_VEX, 1)
#endif
#elif (defined(__GNUC__) || defined(__clang__)) && defined(__aarch64__)
/* The largest cores have four pipes with a latency of four: twenty sums. */
#define FMLA(i) "fmla %" #i ".4s, %11.4s, %11.4s\n\t"
#define SMULL(i) "smull %10.8h, %11.8b, %11.8b\n\tsmlal2 %10.8h, %11.16b, %11.16b\n\tsadalp %" #i ".4s, %10.8h\n\t"
#define SDOT(i) "sdot %" #i ".4s, %11.16b, %11.16b\n\t"
#ifdef __clang__
#define FOR_DOTPROD __attribute__((target("dotprod")))
#else
#define FOR_DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
PEAK(peak_fp32_neon, , float32x4_t, vdupq_n_f32(0.01f), "w", FMLA, 2)
PEAK(peak_int8_neon, , int8x16_t, vdupq_n_s8(60), "w", SMULL, 2)
PEAK(peak_int8_neondot, FOR_DOTPROD, int8x16_t, vdupq_n_s8(60), "w", SDOT, 2)
#endif

/* The plain C peaks: what the compiler makes of sixteen sums side by side, as in the library's plain C kernels. The
 * factor is volatile so that the loop is not made into one multiplication. */
#define PLAIN_STEP(i) sum[i] += w[i] * x;
#define PLAIN_FOUR(i) PLAIN_STEP(i) PLAIN_STEP(i + 1) PLAIN_STEP(i + 2) PLAIN_STEP(i + 3)
static volatile float plain_sink_fp32, plain_factor_fp32 = 0.01f;
static volatile int plain_sink_int8, plain_factor_int8 = 60;

static void peak_fp32_plain(void *unused, size_t index) {
    float sum[16] = {0}, w[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
    int round, i;
    (void)unused, (void)index;
    for (round = 0; round < PEAK_ROUNDS; round++) {
        const float x = plain_factor_fp32;
        PLAIN_FOUR(0) PLAIN_FOUR(4) PLAIN_FOUR(8) PLAIN_FOUR(12)
    }
    for (i = 0; i < 16; i++)
        plain_sink_fp32 = sum[i];
}

static void peak_int8_plain(void *unused, size_t index) {
    int32_t sum[16] = {0};
    int8_t w[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
    int round, i;
    (void)unused, (void)index;
    for (round = 0; round < PEAK_ROUNDS; round++) {
        const int8_t x = (int8_t)plain_factor_int8;
        PLAIN_FOUR(0) PLAIN_FOUR(4) PLAIN_FOUR(8) PLAIN_FOUR(12)
    }
    for (i = 0; i < 16; i++)
        plain_sink_int8 = sum[i];
}

/* The loops of each instruction set, and what one round of them counts: a multiplication and an addition are two. */
typedef struct peak {
    tfm_isa isa;
    tfm_task fp32, int8;
    double fp32_operations, int8_operations;
} peak;

static const peak peaks[] = {
    {TFM_ISA_SCALAR, peak_fp32_plain, peak_int8_plain, 16 * 2, 16 * 2},
#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
    {TFM_ISA_AVX2, peak_fp32_avx2, peak_int8_avx2, 10 * 8 * 2, 10 * 32 * 2},
    {TFM_ISA_AVX512, peak_fp32_avx512, peak_int8_avx512, 10 * 16 * 2, 10 * 64 * 2},
    {TFM_ISA_AVX512VNNI, peak_fp32_avx512, peak_int8_avx512vnni, 10 * 16 * 2, 10 * 64 * 2},
#ifdef FOR_AVXVNNI
    {TFM_ISA_AVXVNNI, peak_fp32_avx2, peak_int8_avxvnni, 10 * 8 * 2, 10 * 32 * 2},
#endif
#elif (defined(__GNUC__) || defined(__clang__)) && defined(__aarch64__)
    {TFM_ISA_NEON, peak_fp32_neon, peak_int8_neon, 20 * 4 * 2, 20 * 16 * 2},
    {TFM_ISA_NEONDOT, peak_fp32_neon, peak_int8_neondot, 20 * 4 * 2, 20 * 16 * 2},
#endif
};

typedef struct limits {
    int threads;
    const peak *peak;
    uint64_t *buffer;        /* much larger than the caches */
    size_t buffer_pieces;    /* its size */
    size_t next;             /* the piece of the buffer that is read next */
    size_t n_pieces;         /* of one measurement: of a peak; of reading, twice as many */
    double *ends;            /* [2 n_pieces]: when each was done */
    double when;             /* measured last; -1: not yet */
    double read, fp32, int8; /* bytes a second, operations a second: the most that was seen */
} limits;

enum { READ_PIECE = 1 << 18 }; /* bytes */

/* Reads one piece, a cache line at a time. No memory gives a core more than plain C can take. */
static void read_piece(void *argument, size_t index) {
    const limits *l = (const limits *)argument;
    const uint64_t *p = l->buffer + (l->next + index) % l->buffer_pieces * (READ_PIECE / sizeof *p);
    const uint64_t *end = p + READ_PIECE / sizeof *p;
    uint64_t seen = 0;
    for (; p < end; p += 8) {
#if defined(__GNUC__) || defined(__clang__)
        __builtin_prefetch(p + 1024);
#endif
        seen |= ((p[0] | p[1]) | (p[2] | p[3])) | ((p[4] | p[5]) | (p[6] | p[7]));
    }
    plain_sink_int8 = (int)(seen & 1);
}

static int compare_times(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Runs n pieces on all threads, and returns how many were done in a second, in the best stretch of so many of them: a
 * busy neighbour, and the starting of the threads, are left out if they leave such a stretch alone. */
static double measure_pieces(limits *l, tfm_task task, size_t n, size_t stretch) {
    long i, end = (long)n;
    double best = 0;
    size_t k;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(l->threads)
#endif
    for (i = 0; i < end; i++) {
        task(l, (size_t)i);
        l->ends[i] = now();
    }
    qsort(l->ends, n, sizeof *l->ends, compare_times);
    for (k = stretch; k < n; k++)
        best = fmax(best, (double)stretch / fmax(1e-9, l->ends[k] - l->ends[k - stretch]));
    return best;
}

/* Bytes a second, over some 10 ms: for a shorter time the memory may well be faster, but of no use to a model. */
static double measure_read(limits *l) {
    double pieces = measure_pieces(l, read_piece, 2 * l->n_pieces, l->n_pieces);
    l->next = (l->next + 2 * l->n_pieces) % l->buffer_pieces;
    return READ_PIECE * pieces;
}

/* Operations a second, over a few milliseconds. */
static double measure_peak(limits *l, tfm_task loop, double operations) {
    return PEAK_ROUNDS * operations * measure_pieces(l, loop, l->n_pieces, l->n_pieces / 4);
}

/* Raises the limits to what is seen now. They move with the neighbours on the machine: so they are measured again and
 * again, between the jobs that are compared with them. */
static void measure_limits(limits *l) {
    int run, runs = l->when < 0 ? 6 : 2;
    if (l->when >= 0 && now() - l->when < 0.3)
        return;
    for (run = 0; run < runs; run++) {
        l->read = fmax(l->read, measure_read(l));
        l->fp32 = fmax(l->fp32, measure_peak(l, l->peak->fp32, l->peak->fp32_operations));
        l->int8 = fmax(l->int8, measure_peak(l, l->peak->int8, l->peak->int8_operations));
    }
    l->when = now();
}

/* At least 256 MB, and four times the last cache where the system says how large that is. */
static size_t read_size(void) {
    size_t size = (size_t)256 << 20;
#ifdef _SC_LEVEL3_CACHE_SIZE
    long cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (cache > 0 && cache <= 1l << 28 && (size_t)cache * 4 > size)
        size = (size_t)cache * 4;
#endif
    return size;
}

/* 0, or 1 if there is no memory. */
static int open_limits(limits *l, int threads, tfm_isa isa) {
    const size_t huge_page = (size_t)2 << 20;
    size_t size = read_size(), i;
    void *memory;
    memset(l, 0, sizeof *l);
    l->threads = threads;
    l->peak = peaks;
    for (i = 0; i < sizeof peaks / sizeof *peaks; i++)
        if (peaks[i].isa == isa)
            l->peak = peaks + i;
    l->buffer_pieces = size / READ_PIECE;
    l->n_pieces = threads > 4 ? (size_t)threads * 256 : 1024;
    l->when = -1;
    l->ends = (double *)malloc(2 * l->n_pieces * sizeof *l->ends);
    if (!l->ends || posix_memalign(&memory, huge_page, size))
        return 1;
#ifdef MADV_HUGEPAGE
    (void)madvise(memory, size, MADV_HUGEPAGE); /* as the library does for weights */
#endif
    l->buffer = (uint64_t *)memory;
    memset(memory, 1, size); /* what was never written is not there */
    return 0;
}

/* ---- bench: the jobs */

enum {
    GEN_CONTEXT = 16,    /* tokens that a sequence has before generation is timed */
    ROWS_PER_PASS = 512, /* of the sessions, as by default: in one pass each weight is read once for so many tokens */
    ENCODER_ROWS_PER_PASS = 1024,
    MAX_TYPES = TFM_DTYPE_COUNT - 1,
    MAX_BATCH = 4096
};

typedef enum job { JOB_PROMPT, JOB_ENCODE, JOB_GEN, N_JOBS } job;

/* One job in one type. */
typedef struct result {
    int runs;                 /* 0: this model has no such job */
    double seconds, spent;    /* of the fastest run; of all together */
    double tokens;            /* of one run, in all sequences together */
    double bytes, operations; /* of one run, see job_work */
    double padded;            /* seconds of the fastest run with all sequences padded to the longest; 0: not measured */
} result;

/* The model in one type. */
typedef struct variant {
    tfm_dtype dtype;
    tfm_model *model;
    tfm_session *session;
    double weights; /* bytes, see type_bytes */
    result results[N_JOBS];
} variant;

typedef struct benchmark {
    const arguments *args;
    const char *name; /* of the model: its path's base name */
    char cpu[96];
    tfm_isa isa;
    limits limits;
    variant variants[MAX_TYPES];
    size_t n_variants;
    double parameters, f32_bytes; /* of the weights */
    /* known when the model is first loaded */
    size_t prompt, shortest;           /* the longest and the shortest sequence; shortest = 0: all are alike */
    size_t context, gen, batch, width; /* width: of an output */
    size_t *lengths;                   /* [batch], of the prompts */
    int padded;                        /* 1: as if each had `prompt` tokens */
    tfm_output what;
    int32_t *tokens, *next, *work; /* [prompt + batch], [batch], [vocab_size] */
    tfm_chunk *chunks;             /* [batch] */
    tfm_text *texts;               /* [batch] */
    float *outputs;                /* [batch][width], and for encoders [batch][prompt][d_model] */
    size_t steps, n_steps;         /* progress */
} benchmark;

/* The tokens of a sequence's prompt, of which no more than n are wanted. */
static size_t prompt_length(const benchmark *b, size_t sequence, size_t n) {
    const size_t length = b->padded ? b->prompt : b->lengths[sequence];
    return length < n ? length : n;
}

/* The first n tokens of each sequence, or, for a prompt, as many of those as it has. They differ from sequence to
 * sequence. */
static tfm_status begin_sequences(benchmark *b, tfm_session *session, size_t n, int is_prompt, tfm_error *error) {
    tfm_status status = TFM_OK;
    size_t i;
    for (i = 0; i < b->batch && status == TFM_OK; i++) {
        b->chunks[i].sequence = i;
        b->chunks[i].tokens = b->tokens + i;
        b->chunks[i].n_tokens = is_prompt ? prompt_length(b, i, n) : n;
        b->chunks[i].n_outputs = is_prompt ? 1 : 0;
        b->next[i] = b->tokens[i];
        status = tfm_truncate(session, i, 0, error);
    }
    if (status == TFM_OK && n)
        status = tfm_eval(session, b->chunks, b->batch, b->what, b->outputs, error);
    return status;
}

/* Prefill: prompts of up to n tokens, and the last one's result. */
static tfm_status run_prompt(benchmark *b, tfm_session *session, size_t n, double *seconds, tfm_error *error) {
    double start = now();
    tfm_status status = begin_sequences(b, session, n, 1, error);
    *seconds = now() - start;
    return status;
}

/* What an encoder-decoder's sequences answer to: texts of the prompts' lengths. */
static tfm_status begin_sources(benchmark *b, tfm_session *session, tfm_error *error) {
    tfm_status status = TFM_OK;
    tfm_text text;
    size_t i;
    memset(&text, 0, sizeof text);
    if (tfm_model_description(tfm_session_model(session))->kind == TFM_ENCODER_DECODER)
        for (i = 0; i < b->batch && status == TFM_OK; i++) {
            text.tokens = b->tokens + i;
            text.n_tokens = prompt_length(b, i, b->prompt);
            status = tfm_set_source(session, i, &text, error);
        }
    return status;
}

/* Decoding, greedily: n tokens for each sequence, one after the other, after a short context that is not timed. */
static tfm_status run_gen(benchmark *b, tfm_session *session, size_t n, double *seconds, tfm_error *error) {
    tfm_status status = begin_sources(b, session, error);
    tfm_sampling greedy;
    double start;
    size_t step, i;
    if (status == TFM_OK)
        status = begin_sequences(b, session, b->context, 0, error);
    start = now();
    memset(&greedy, 0, sizeof greedy);
    for (i = 0; i < b->batch; i++) {
        b->chunks[i].tokens = b->next + i;
        b->chunks[i].n_tokens = b->chunks[i].n_outputs = 1;
    }
    for (step = 0; step < n && status == TFM_OK; step++) {
        status = tfm_eval(session, b->chunks, b->batch, b->what, b->outputs, error);
        for (i = 0; i < b->batch && status == TFM_OK; i++) {
            float *logits = b->outputs + i * b->width;
            status = tfm_sample(&greedy, logits, b->width, NULL, 0, NULL, b->work, b->next + i, error);
        }
    }
    *seconds = now() - start;
    return status;
}

/* Encoding: texts of up to n tokens. */
static tfm_status run_encode(benchmark *b, tfm_session *session, size_t n, double *seconds, tfm_error *error) {
    double start;
    size_t i;
    tfm_status status;
    for (i = 0; i < b->batch; i++) {
        memset(b->texts + i, 0, sizeof *b->texts);
        b->texts[i].tokens = b->tokens + i;
        b->texts[i].n_tokens = prompt_length(b, i, n);
    }
    start = now();
    status = tfm_encode(session, b->texts, b->batch, TFM_HIDDEN, b->outputs, error);
    *seconds = now() - start;
    return status;
}

static int has_encode(const tfm_description *d) {
    return d->kind != TFM_DECODER && d->vocab_size;
}

static int has_prompt(const tfm_description *d) {
    return d->kind == TFM_DECODER && d->vocab_size;
}

static int has_gen(const tfm_description *d) {
    return d->kind != TFM_ENCODER && d->head != TFM_NO_HEAD;
}

static const struct {
    const char *name;
    int (*has)(const tfm_description *description);
    tfm_status (*run)(benchmark *b, tfm_session *session, size_t n, double *seconds, tfm_error *error);
    size_t warm_up; /* tokens of a run that only brings memory and caches into play */
} jobs[N_JOBS] = {
    {"prompt", has_prompt, run_prompt, 32},
    {"encode", has_encode, run_encode, 32},
    {"gen", has_gen, run_gen, 2},
};

/* The most tokens that a job has for a sequence. */
static size_t job_length(const benchmark *b, job which) {
    return which == JOB_GEN ? b->gen : b->prompt;
}

/* ---- bench: what a job must read and calculate
 * Counted are the weights of the linear layers: of the blocks, and of the head for the tokens whose logits are wanted.
 *   bytes       once for each pass: of up to rows_per_pass tokens of the prompts, or of one step of all sequences
 *   operations  2 (a multiplication and an addition) x weights x tokens
 * Attention's own arithmetic and reads of the KV cache are not counted, nor are norms and activations: the limit is a
 * little farther away than it could be. */

static void count_linear(const tfm_linear *linear, double *weights, double *bytes) {
    *weights += (double)linear->weight.shape[0] * (double)linear->weight.shape[1];
    *bytes += (double)tfm_tensor_bytes(&linear->weight);
    *bytes += linear->bias.data ? (double)tfm_tensor_bytes(&linear->bias) : 0;
}

/* The blocks of the encoder, or those that make the logits. */
static void count_blocks(const tfm_model *model, int of_encoder, double *weights, double *bytes) {
    const tfm_block *block;
    size_t i;
    *weights = *bytes = 0;
    for (i = 0; (block = of_encoder ? tfm_model_encoder_block(model, i) : tfm_model_block(model, i)) != NULL; i++) {
        count_linear(&block->attention.qkv, weights, bytes);
        count_linear(&block->attention.out, weights, bytes);
        count_linear(&block->ffn.up, weights, bytes);
        count_linear(&block->ffn.down, weights, bytes);
        if (block->cross.q.weight.data) { /* keys and values are those of the source */
            count_linear(&block->cross.q, weights, bytes);
            count_linear(&block->cross.out, weights, bytes);
        }
    }
}

/* Of all sequences together. */
static size_t prompt_tokens(const benchmark *b) {
    size_t tokens = 0, i;
    for (i = 0; i < b->batch; i++)
        tokens += b->lengths[i];
    return tokens;
}

static size_t rows_per_pass(const tfm_model *model) {
    return tfm_model_description(model)->kind == TFM_ENCODER ? ENCODER_ROWS_PER_PASS : ROWS_PER_PASS;
}

static double passes_for(size_t rows, size_t at_once) {
    return (double)((rows + at_once - 1) / at_once);
}

/* Passes in which a prompt ends, and so the head is read. */
static double head_passes(const benchmark *b) {
    size_t n = 0, last = (size_t)-1, end = 0, i;
    for (i = 0; i < b->batch; i++) {
        size_t pass = ((end += b->lengths[i]) - 1) / ROWS_PER_PASS;
        n += pass != last;
        last = pass;
    }
    return (double)n;
}

static void job_work(const benchmark *b, const tfm_model *model, job which, result *r) {
    const tfm_description *d = tfm_model_description(model);
    double weights, bytes, head_bytes, head = d->head == TFM_NO_HEAD ? 0 : (double)d->vocab_size * (double)d->d_model;
    double batch = (double)b->batch, steps = (double)b->gen;
    const size_t prompts = prompt_tokens(b);
    count_blocks(model, which == JOB_ENCODE, &weights, &bytes);
    head_bytes = (double)tfm_model_bytes_per_token(model) - bytes;
    r->tokens = which == JOB_GEN ? steps * batch : (double)prompts;
    if (which == JOB_ENCODE) {
        r->bytes = passes_for(prompts, rows_per_pass(model)) * bytes;
        r->operations = 2 * weights * r->tokens;
    } else if (which == JOB_PROMPT) {
        r->bytes = passes_for(prompts, rows_per_pass(model)) * bytes + head_passes(b) * head_bytes;
        r->operations = 2 * (weights * r->tokens + head * batch);
    } else {
        r->bytes = steps * passes_for(b->batch, rows_per_pass(model)) * (bytes + head_bytes);
        r->operations = 2 * (weights + head) * r->tokens;
    }
}

/* The least time that the machine's limits leave for a job. 16-bit weights are multiplied as fp32. */
static double limit_seconds(const limits *l, tfm_dtype dtype, const result *r) {
    return fmax(r->bytes / l->read, r->operations / (dtype == TFM_I8 ? l->int8 : l->fp32));
}

/* ---- bench: measuring */

static const char *type_name(tfm_dtype dtype) {
    return dtype == TFM_I8 ? "int8" : tfm_dtype_name(dtype);
}

/* Bytes of the file's tensors if its matrices had that type: what `tfm quantize --type` writes. */
static double type_bytes(const tfm_file *file, tfm_dtype dtype) {
    double bytes = 0;
    size_t i;
    for (i = 0; i < tfm_file_n_tensors(file); i++) {
        tfm_tensor tensor = tfm_file_entry(file, i)->tensor;
        if (tensor.n_dims == 2) {
            tensor.dtype = dtype;
            tensor.layout = TFM_PANELS;
        }
        bytes += (double)tfm_tensor_bytes(&tensor);
    }
    return bytes;
}

static void reduce(const char *name, size_t *n, size_t most) {
    if (*n > most)
        fprintf(stderr, "tfm: %s: reduced to %lu, for the model's context\n", name, (unsigned long)most);
    *n = *n > most ? most : *n;
}

/* Lengths of the prompts: all alike, or spread evenly from the shortest to the longest, shuffled, but always the same. */
static void spread_lengths(benchmark *b) {
    tfm_random random;
    size_t i;
    for (i = 0; i < b->batch; i++)
        b->lengths[i] = b->shortest ? b->shortest + (b->prompt - b->shortest) * i / (b->batch - 1) : b->prompt;
    tfm_random_seed(&random, 2);
    for (i = b->batch - 1; i > 0; i--) {
        const size_t other = (size_t)(tfm_random_uniform(&random) * (double)(i + 1)), length = b->lengths[i];
        b->lengths[i] = b->lengths[other];
        b->lengths[other] = length;
    }
}

/* What depends on the model: lengths that fit its context, and room for tokens and results. */
static tfm_status prepare(benchmark *b, const tfm_model *model, tfm_error *error) {
    const tfm_description *d = tfm_model_description(model);
    const size_t n_positions = tfm_model_stack(model)->n_positions;
    tfm_random random;
    size_t i;
    size_t outputs, source = d->kind == TFM_ENCODER_DECODER ? d->encoder.n_positions : n_positions;
    if (!d->vocab_size) {
        snprintf(error->message, sizeof error->message, "%.300s: the model takes vectors: bench has no job for it",
                 b->args->paths[0]);
        return error->status = TFM_ERROR_UNSUPPORTED;
    }
    b->context = n_positions > 2 * GEN_CONTEXT ? GEN_CONTEXT : n_positions / 2;
    if (d->kind == TFM_ENCODER_DECODER)
        b->context = 1;
    reduce("--prompt", &b->prompt, source);
    b->shortest = b->shortest < b->prompt ? b->shortest : b->prompt;
    reduce("--gen", &b->gen, n_positions - b->context);
    b->what = d->head == TFM_NO_HEAD ? TFM_HIDDEN : TFM_LOGITS;
    b->width = d->head == TFM_NO_HEAD ? d->d_model : d->vocab_size;
    b->tokens = (int32_t *)malloc((b->prompt + GEN_CONTEXT + b->batch) * sizeof *b->tokens);
    b->next = (int32_t *)malloc(b->batch * sizeof *b->next);
    b->work = (int32_t *)malloc(d->vocab_size * sizeof *b->work);
    b->chunks = (tfm_chunk *)malloc(b->batch * sizeof *b->chunks);
    outputs = b->batch * b->width;
    if (d->kind != TFM_DECODER && outputs < b->batch * b->prompt * d->d_model)
        outputs = b->batch * b->prompt * d->d_model;
    b->texts = (tfm_text *)malloc(b->batch * sizeof *b->texts);
    b->lengths = (size_t *)malloc(b->batch * sizeof *b->lengths);
    b->outputs = (float *)malloc(outputs * sizeof *b->outputs);
    if (!b->texts || !b->lengths || !b->tokens || !b->next || !b->work || !b->chunks || !b->outputs) {
        snprintf(error->message, sizeof error->message, "out of memory");
        return error->status = TFM_ERROR_MEMORY;
    }
    spread_lengths(b);
    tfm_random_seed(&random, 1);
    for (i = 0; i < b->prompt + GEN_CONTEXT + b->batch; i++)
        b->tokens[i] = (int32_t)(tfm_random_uniform(&random) * (double)d->vocab_size);
    return TFM_OK;
}

/* Loads the model in that type. All types get their weights as copies in memory of the same kind, whatever the file
 * holds: they are to differ in nothing else. */
static tfm_status open_variant(benchmark *b, variant *v, tfm_error *error) {
    tfm_load_options load;
    tfm_session_options options;
    memset(&load, 0, sizeof load);
    memset(&options, 0, sizeof options);
    load.dtype = v->dtype;
    load.copy = 1;
    load.threads = b->limits.threads;
    v->model = tfm_load(b->args->paths[0], &load, error);
    if (!v->model)
        return error->status;
    if (!b->tokens && prepare(b, v->model, error) != TFM_OK)
        return error->status;
    options.context = b->context + b->gen;
    if (tfm_model_description(v->model)->kind == TFM_ENCODER_DECODER)
        options.source = b->prompt;
    else if (tfm_model_description(v->model)->kind == TFM_ENCODER || options.context < b->prompt)
        options.context = b->prompt;
    options.n_sequences = b->batch;
    options.max_rows = rows_per_pass(v->model);
    options.engine.threads = b->limits.threads;
    options.engine.isa = b->isa;
    options.kv_dtype = b->args->kv_dtype;
    v->session = tfm_session_create(v->model, &options, error);
    return v->session ? TFM_OK : error->status;
}

static void close_variant(variant *v) {
    tfm_session_free(v->session);
    tfm_free(v->model);
    v->session = NULL;
    v->model = NULL;
}

/* Bytes of memory that programs can have, 0 if the system does not say. */
static double available_memory(void) {
    FILE *file = fopen("/proc/meminfo", "r");
    char line[128];
    double kilobytes = 0;
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "MemAvailable: %lf kB", &kilobytes) == 1)
            break;
    if (file)
        fclose(file);
    return kilobytes * 1024;
}

/* Whether the other types have room beside the first: then all can take turns. */
static int fit_together(const benchmark *b) {
    const tfm_stack *d = tfm_model_stack(b->variants[0].model);
    double kv = 2.0 * (double)d->n_layers * (double)d->n_kv_heads * (double)d->head_dim * sizeof(float);
    double tokens = (double)b->batch * (double)(b->prompt + b->context + b->gen), bytes = 0;
    size_t i;
    for (i = 1; i < b->n_variants; i++)
        bytes += b->variants[i].weights + kv * tokens;
    return bytes < (double)((size_t)512 << 20) || bytes < 0.8 * available_memory();
}

static void advance(benchmark *b, double share) {
    show_progress("measuring", ((double)b->steps + share) / (double)b->n_steps);
}

/* At least three runs and a second, but no more runs after ten seconds. */
static int is_measured(const result *r) {
    return r->runs && ((r->runs >= 3 && r->spent >= 1) || r->spent >= 10);
}

/* One run; *fastest is the least time of the runs so far, 0 before the first. */
static tfm_status time_run(benchmark *b, variant *v, job which, double *seconds, double *fastest, tfm_error *error) {
    tfm_status status = jobs[which].run(b, v->session, job_length(b, which), seconds, error);
    *seconds = fmax(*seconds, 1e-9);
    *fastest = *fastest > 0 && *fastest < *seconds ? *fastest : *seconds;
    return status;
}

static tfm_status run_once(benchmark *b, variant *v, job which, tfm_error *error) {
    result *r = v->results + which;
    double seconds = 0, padded;
    tfm_status status = time_run(b, v, which, &seconds, &r->seconds, error);
    if (b->shortest && which != JOB_GEN && status == TFM_OK) {
        b->padded = 1;
        status = time_run(b, v, which, &padded, &r->padded, error);
        b->padded = 0;
    }
    r->spent += seconds;
    r->runs++;
    return status;
}

/* The variants take turns, with the limits between, until each is measured: the machine's speed changes from minute to
 * minute, and what is compared should see the same of it. */
static tfm_status measure_job(benchmark *b, size_t first, size_t n, job which, tfm_error *error) {
    tfm_status status = TFM_OK;
    double seconds;
    size_t i, open = n;
    for (i = first; i < first + n && status == TFM_OK; i++) {
        size_t length = job_length(b, which), warm_up = jobs[which].warm_up;
        job_work(b, b->variants[i].model, which, b->variants[i].results + which);
        status = jobs[which].run(b, b->variants[i].session, length < warm_up ? length : warm_up, &seconds, error);
    }
    while (open && status == TFM_OK) {
        measure_limits(&b->limits);
        for (i = first, open = 0; i < first + n && status == TFM_OK; i++)
            if (!is_measured(b->variants[i].results + which)) {
                status = run_once(b, b->variants + i, which, error);
                advance(b, fmin(1, b->variants[first].results[which].spent) * (double)n);
                open++;
            }
    }
    b->steps += n;
    return status;
}

static tfm_status measure_variants(benchmark *b, size_t first, size_t *n, tfm_error *error) {
    const tfm_description *d;
    tfm_status status = open_variant(b, b->variants + first, error);
    size_t i;
    int which;
    *n = 1;
    if (status == TFM_OK && !first && fit_together(b))
        for (; *n < b->n_variants && status == TFM_OK; ++*n)
            status = open_variant(b, b->variants + *n, error);
    for (which = 0; which < N_JOBS && status == TFM_OK; which++) {
        d = tfm_model_description(b->variants[first].model);
        if (jobs[which].has(d))
            status = measure_job(b, first, *n, (job)which, error);
        advance(b, 0);
    }
    for (i = first; i < first + *n; i++)
        close_variant(b->variants + i);
    return status;
}

static tfm_status measure_all(benchmark *b, tfm_error *error) {
    tfm_status status = TFM_OK;
    size_t first, n;
    b->n_steps = b->n_variants * N_JOBS;
    advance(b, 0);
    for (first = 0; first < b->n_variants && status == TFM_OK; first += n)
        status = measure_variants(b, first, &n, error);
    if (status == TFM_OK)
        show_progress("measuring", 1);
    return status;
}

/* ---- bench: reports */

static double tokens_per_second(const result *r) {
    return r->tokens / r->seconds;
}

/* How much faster than f32; 0 if that was not measured. */
static double speed_up(const benchmark *b, size_t index, job which) {
    size_t i;
    for (i = 0; i < b->n_variants; i++)
        if (b->variants[i].dtype == TFM_F32)
            return b->variants[i].results[which].seconds / b->variants[index].results[which].seconds;
    return 0;
}

static double limit_share(const benchmark *b, const variant *v, job which) {
    return limit_seconds(&b->limits, v->dtype, v->results + which) / v->results[which].seconds;
}

static void print_result(const benchmark *b, size_t index, job which) {
    const variant *v = b->variants + index;
    const result *r = v->results + which;
    double faster = speed_up(b, index, which);
    printf("%-5s %-7s %5lu %11.1f %8.2f %9.1f %-7s %6.1f %%", type_name(v->dtype), jobs[which].name,
           (unsigned long)b->batch, tokens_per_second(r), r->bytes / r->seconds / 1e9, r->operations / r->seconds / 1e9,
           v->dtype == TFM_I8 ? "GOP/s" : "GFLOP/s", 100 * limit_share(b, v, which));
    if (faster > 0)
        printf(" %8.2f x", faster);
    if (r->padded > 0)
        printf("%*s %10.4g %9.4g %6.2f x", faster > 0 ? 2 : 13, "", r->seconds, r->padded, r->padded / r->seconds);
    putchar('\n');
}

/* "512", or "4 to 128". */
static const char *prompt_text(const benchmark *b, char *text, size_t size) {
    if (b->shortest)
        snprintf(text, size, "%lu to %lu", (unsigned long)b->shortest, (unsigned long)b->prompt);
    else
        snprintf(text, size, "%lu", (unsigned long)b->prompt);
    return text;
}

static void print_report(const benchmark *b) {
    const limits *l = &b->limits;
    double most = 0;
    char text[64];
    size_t i;
    int which;
    printf("model   %s: %.1f million parameters\n", b->name, b->parameters / 1e6);
    printf("cpu     %s%s%s, %d thread%s\n", b->cpu, *b->cpu ? ", " : "", tfm_isa_name(b->isa), l->threads,
           l->threads > 1 ? "s" : "");
    printf("limits  read %.2f GB/s, fp32 %.1f GFLOP/s, int8 %.1f GOP/s\n", l->read / 1e9, l->fp32 / 1e9, l->int8 / 1e9);
    printf("prompt  %s tokens;  gen %lu tokens after %lu\n\n", prompt_text(b, text, sizeof text), (unsigned long)b->gen,
           (unsigned long)b->context);
    printf("type  job     batch    tokens/s     GB/s           compute     limit   against f32%s\n",
           b->shortest ? "    seconds    padded     gain" : "");
    for (which = 0; which < N_JOBS; which++)
        for (i = 0; i < b->n_variants; i++)
            if (b->variants[i].results[which].runs) {
                print_result(b, i, (job)which);
                most = fmax(most, limit_share(b, b->variants + i, (job)which));
            }
    puts("\nlimit: of the time measured, the share that reading the weights, or the operations with them, take at the\n"
         "machine's limits. Attention's own arithmetic and reads of the KV cache are not counted.");
    if (most > 1)
        puts("More than 100 %: the weights stay in the caches, or others held the machine up while it was measured.");
    if (b->shortest)
        printf("padded: the seconds with every prompt at %lu tokens; gain: how many times as long that takes.\n"
               "tokens/s are of the prompts' own tokens: %lu of %lu.\n",
               (unsigned long)b->prompt, (unsigned long)prompt_tokens(b), (unsigned long)(b->prompt * b->batch));
    puts("\nweights");
    for (i = 0; i < b->n_variants; i++)
        printf("%-5s %11.2f MB  %6.1f %% of f32, %.2f times smaller\n", type_name(b->variants[i].dtype),
               b->variants[i].weights / 1e6, 100 * b->variants[i].weights / b->f32_bytes,
               b->f32_bytes / b->variants[i].weights);
}

/* Bytes of the well-formed UTF-8 character at text, 0 if there is none. */
static size_t utf8_size(const unsigned char *text) {
    static const unsigned long least[5] = {0, 0, 0x80, 0x800, 0x10000};
    size_t n = *text < 0x80 ? 1 : *text >> 5 == 6 ? 2 : *text >> 4 == 14 ? 3 : *text >> 3 == 30 ? 4 : 0, i;
    unsigned long code = n > 1 ? *text & (0x7Fu >> n) : *text;
    for (i = 1; i < n; i++) {
        if (text[i] >> 6 != 2)
            return 0;
        code = code << 6 | (text[i] & 0x3Fu);
    }
    return n && code >= least[n] && code <= 0x10FFFF && code >> 11 != 0x1B ? n : 0;
}

/* Writes text of any bytes as part of a JSON string or of XML. */
static void write_escaped(FILE *file, const char *text, int xml) {
    const unsigned char *p = (const unsigned char *)text;
    while (*p) {
        size_t n = utf8_size(p);
        if (!n || (xml && *p < 0x20))
            fputs("\xEF\xBF\xBD", file); /* U+FFFD: not a character */
        else if (xml ? *p == '<' || *p == '&' || *p == '"' : *p == '"' || *p == '\\' || *p < 0x20)
            fprintf(file, xml ? "&#%u;" : "\\u%04x", (unsigned)*p);
        else
            fwrite(p, 1, n, file);
        p += n ? n : 1;
    }
}

static void write_json_object(FILE *file, const benchmark *b, const variant *v, job which) {
    const result *r = v->results + which;
    fputs("  {\"model\": \"", file);
    write_escaped(file, b->name, 0);
    fprintf(file, "\", \"type\": \"%s\", \"job\": \"%s\", \"threads\": %d, \"batch\": %lu, \"tokens\": %.0f, ",
            type_name(v->dtype), jobs[which].name, b->limits.threads, (unsigned long)b->batch, r->tokens);
    fprintf(file, "\"seconds\": %.9g, \"tokens_per_s\": %.6g, \"gbytes_per_s\": %.6g, \"gops_per_s\": %.6g, ",
            r->seconds, tokens_per_second(r), r->bytes / r->seconds / 1e9, r->operations / r->seconds / 1e9);
    fprintf(file, "\"limit_share\": %.4g", limit_share(b, v, which));
    if (r->padded > 0)
        fprintf(file, ", \"padded_seconds\": %.9g, \"padding_gain\": %.6g", r->padded, r->padded / r->seconds);
    fputc('}', file);
}

static int write_json(const benchmark *b, const char *path) {
    output out;
    size_t i;
    int which, n = 0;
    if (output_open(&out, path))
        return 1;
    for (which = 0; which < N_JOBS; which++)
        for (i = 0; i < b->n_variants; i++)
            if (b->variants[i].results[which].runs) {
                fputs(n++ ? ",\n" : "[\n", out.file);
                write_json_object(out.file, b, b->variants + i, (job)which);
            }
    fputs(n ? "\n]\n" : "[]\n", out.file);
    return output_close(&out);
}

/* ---- bench: the chart
 * On a card of its own, since a README is read on light and on dark pages. */

enum {
    CHART_WIDTH = 760,
    CHART_MARGIN = 28,
    BAR_LEFT = 84,
    BAR_WIDTH = 420,
    BAR_HEIGHT = 20,
    BAR_STEP = 28,
    GROUP_HEADING = 40, /* from the top of a group to its first bar */
    GROUP_GAP = 12,
    CHART_TOP = 84, /* where the groups begin */
    CHART_BOTTOM = 62,
    TOKENS_RIGHT = 586, /* columns of numbers end here */
    FASTER_RIGHT = 658,
    SHARE_RIGHT = CHART_WIDTH - CHART_MARGIN
};

static const char limit_color[] = "#d1242f";

static const char *type_color(tfm_dtype dtype) {
    static const char *const colors[TFM_DTYPE_COUNT] = {"#000000", "#8c959f", "#54aeff", "#a475f9", "#0550ae"};
    return colors[dtype];
}

/* "1234", "123.4", "12.34": four digits. */
static const char *four_digits(double value, char *text, size_t size) {
    snprintf(text, size, "%.*f", value >= 999.95 ? 0 : value >= 99.995 ? 1 : 2, value);
    return text;
}

/* Opens a text element that starts (or with "end" ends) at x. */
static void chart_text(FILE *file, int x, int y, const char *anchor, const char *class_name) {
    fprintf(file, "<text x=\"%d\" y=\"%d\" text-anchor=\"%s\" class=\"%s\">", x, y, anchor, class_name);
}

static void chart_number(FILE *file, int x, int y, const char *class_name, const char *number, const char *unit) {
    chart_text(file, x, y, "end", class_name);
    fprintf(file, "%s%s</text>\n", number, unit);
}

static void chart_rect(FILE *file, double x, int y, double width, int height, int radius, const char *color) {
    fprintf(file, "<rect x=\"%.1f\" y=\"%d\" width=\"%.1f\" height=\"%d\" rx=\"%d\" fill=\"%s\"/>\n", x, y, width,
            height, radius, color);
}

/* One bar. `scale` is the tokens/s of the whole width. */
static void chart_bar(FILE *file, const benchmark *b, size_t index, job which, int y, double scale) {
    const variant *v = b->variants + index;
    const result *r = v->results + which;
    double speed = tokens_per_second(r), share = limit_share(b, v, which), faster = speed_up(b, index, which);
    double limit = BAR_LEFT + BAR_WIDTH * speed / share / scale;
    int base = y + 15;
    char number[32];
    chart_text(file, CHART_MARGIN, base, "start", "type");
    fprintf(file, "%s</text>\n", type_name(v->dtype));
    chart_rect(file, BAR_LEFT, y, BAR_WIDTH, BAR_HEIGHT, 3, "#f3f5f7");
    chart_rect(file, BAR_LEFT, y, fmax(2, BAR_WIDTH * speed / scale), BAR_HEIGHT, 3, type_color(v->dtype));
    chart_rect(file, limit - 1, y - 3, 2, BAR_HEIGHT + 6, 1, limit_color);
    chart_number(file, TOKENS_RIGHT, base, "number", four_digits(speed, number, sizeof number), "");
    snprintf(number, sizeof number, "%.2f", faster);
    if (faster > 0)
        chart_number(file, FASTER_RIGHT, base, "faster", number, "&#215;");
    snprintf(number, sizeof number, "%.0f", 100 * share);
    chart_number(file, SHARE_RIGHT, base, "small", number, " %");
}

static void chart_heading(FILE *file, const benchmark *b, job which, int y) {
    char text[64];
    chart_text(file, CHART_MARGIN, y, "start", "job");
    if (which != JOB_GEN)
        fprintf(file, "%s<tspan class=\"small\">&#160;&#160;%s tokens", which == JOB_ENCODE ? "Encoding" : "Prompt",
                prompt_text(b, text, sizeof text));
    else
        fprintf(file, "Generation<tspan class=\"small\">&#160;&#160;%lu tokens after %lu", (unsigned long)b->gen,
                (unsigned long)b->context);
    if (b->batch > 1)
        fprintf(file, ", %lu sequences at once", (unsigned long)b->batch);
    fputs("</tspan></text>\n", file);
    chart_number(file, TOKENS_RIGHT, y, "small", "tokens/s", "");
    if (speed_up(b, 0, which) > 0)
        chart_number(file, FASTER_RIGHT, y, "small", "vs f32", "");
    chart_number(file, SHARE_RIGHT, y, "small", "of limit", "");
}

/* The group of a job, its top at y. Returns where the next one begins. */
static int chart_group(FILE *file, const benchmark *b, job which, int y) {
    double scale = 0;
    size_t i;
    chart_heading(file, b, which, y + GROUP_HEADING - 16);
    for (i = 0; i < b->n_variants; i++) {
        const variant *v = b->variants + i;
        double speed = tokens_per_second(v->results + which);
        scale = fmax(scale, fmax(speed, speed / limit_share(b, v, which)));
    }
    y += GROUP_HEADING;
    for (i = 0; i < b->n_variants; i++, y += BAR_STEP)
        chart_bar(file, b, i, which, y, scale);
    return y + GROUP_GAP;
}

static void chart_open(FILE *file, const benchmark *b, int height) {
    fprintf(file,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" role=\"img\" "
            "aria-label=\"Tokens per second of each type\" font-family=\"system-ui, -apple-system, 'Segoe UI', "
            "Roboto, 'Helvetica Neue', Arial, sans-serif\">\n",
            CHART_WIDTH, height, CHART_WIDTH);
    fputs("<style>\n.title{font-size:18px;font-weight:600;fill:#1f2328}\n"
          ".small{font-size:12px;font-weight:400;fill:#59636e}\n.job{font-size:14px;font-weight:600;fill:#1f2328}\n"
          ".type,.number{font-size:13px;fill:#1f2328}\n"
          ".faster{font-size:13px;font-weight:600;fill:#1f2328}\n</style>\n",
          file);
    fprintf(file, "<rect x=\".5\" y=\".5\" width=\"%d\" height=\"%d\" rx=\"10\" fill=\"#fff\" stroke=\"#d1d9e0\"/>\n",
            CHART_WIDTH - 1, height - 1);
    chart_text(file, CHART_MARGIN, 40, "start", "title");
    write_escaped(file, b->name, 1);
    fputs("</text>\n", file);
    chart_text(file, CHART_MARGIN, 62, "start", "small");
    write_escaped(file, b->cpu, 1);
    fprintf(file, "%s%s, %d thread%s, %.4g million parameters</text>\n", *b->cpu ? ", " : "", tfm_isa_name(b->isa),
            b->limits.threads, b->limits.threads > 1 ? "s" : "", b->parameters / 1e6);
}

static void chart_close(FILE *file, const benchmark *b, int y) {
    const limits *l = &b->limits;
    fprintf(file, "<path d=\"M%d %d.5H%d\" stroke=\"#d1d9e0\"/>\n", CHART_MARGIN, y, CHART_WIDTH - CHART_MARGIN);
    chart_rect(file, CHART_MARGIN, y + 17, 2, 16, 1, limit_color);
    chart_text(file, CHART_MARGIN + 12, y + 30, "start", "small");
    fprintf(file, "this machine&#8217;s limit, measured: %.1f GB/s read, %.0f GFLOP/s fp32, %.0f GOP/s int8",
            l->read / 1e9, l->fp32 / 1e9, l->int8 / 1e9);
    fputs("</text>\n</svg>\n", file);
}

static int write_svg(const benchmark *b, const char *path) {
    const int group = GROUP_HEADING + GROUP_GAP + BAR_STEP * (int)b->n_variants;
    output out;
    int which, y = CHART_TOP, n = 0;
    if (output_open(&out, path))
        return 1;
    for (which = 0; which < N_JOBS; which++)
        n += b->variants[0].results[which].runs > 0;
    chart_open(out.file, b, CHART_TOP + n * group + CHART_BOTTOM);
    for (which = 0; which < N_JOBS; which++)
        if (b->variants[0].results[which].runs)
            y = chart_group(out.file, b, (job)which, y);
    chart_close(out.file, b, y + 8);
    return output_close(&out);
}

/* ---- bench: the command */

/* "f32,int8" to variants. 0, or the exit status. */
static int parse_types(benchmark *b, const char *list) {
    tfm_error error = {TFM_OK, ""};
    while (list) {
        const char *comma = strchr(list, ',');
        size_t size = comma ? (size_t)(comma - list) : strlen(list), i;
        tfm_dtype dtype;
        char name[32];
        snprintf(name, sizeof name, "%.*s", size < sizeof name ? (int)size : (int)sizeof name - 1, list);
        if (tfm_dtype_from_name(name, &dtype, &error) != TFM_OK)
            return usage("--type: ", error.message);
        for (i = 0; i < b->n_variants; i++)
            if (b->variants[i].dtype == dtype)
                return usage("--type: named twice: ", name);
        b->variants[b->n_variants++].dtype = dtype;
        list = comma ? comma + 1 : NULL;
    }
    return 0;
}

/* The CPU's name, or nothing if the system has none. */
static void read_cpu(char *name, size_t size) {
    FILE *file = fopen("/proc/cpuinfo", "r");
    char line[160];
    *name = 0;
    while (file && !*name && fgets(line, sizeof line, file)) {
        const char *colon = strncmp(line, "model name", 10) ? NULL : strchr(line, ':');
        if (colon)
            snprintf(name, size, "%s", colon + 1 + strspn(colon + 1, " \t"));
        name[strcspn(name, "\n")] = 0;
    }
    if (file)
        fclose(file);
}

/* "512" or "4-128". 0, or the exit status. */
static int parse_lengths(benchmark *b, const char *text) {
    const char *dash = strchr(text, '-');
    char first[32];
    long shortest = 0, longest;
    if (dash)
        snprintf(first, sizeof first, "%.*s", (int)(dash - text < 31 ? dash - text : 31), text);
    if ((dash && !parse_number(first, &shortest)) || !parse_number(dash ? dash + 1 : text, &longest) ||
        shortest > longest)
        return usage("--prompt: expected a number greater than 0, or a range as 4-128, found ", text);
    if (dash && b->batch < 2)
        return usage("--prompt: a range of lengths is for a --batch of at least 2, found ", text);
    b->shortest = (size_t)shortest;
    b->prompt = (size_t)longest;
    return 0;
}

/* What the command line says. 0, or the exit status. */
static int configure(benchmark *b, const arguments *args) {
    const char *slash = strrchr(args->paths[0], '/');
    tfm_error error = {TFM_OK, ""};
    b->args = args;
    b->name = slash ? slash + 1 : args->paths[0];
    b->gen = args->gen ? (size_t)args->gen : 64;
    b->batch = args->batch ? (size_t)args->batch : 1;
    if (b->batch > MAX_BATCH)
        return usage("--batch: at most 4096", "");
    if (parse_lengths(b, args->prompt ? args->prompt : "512"))
        return 2;
    if (tfm_isa_from_name(args->isa, &b->isa, &error) != TFM_OK)
        return usage("--isa: ", error.message);
    return parse_types(b, args->type ? args->type : "f32,f16,int8");
}

/* The instruction set and threads that are in use. */
static tfm_status find_engine(benchmark *b, int *threads, tfm_error *error) {
    tfm_engine_options options;
    tfm_engine *engine;
    memset(&options, 0, sizeof options);
    options.isa = b->isa;
    options.threads = 1;
    engine = tfm_engine_create(&options, error);
    if (!engine)
        return error->status;
    b->isa = tfm_engine_isa(engine);
    tfm_engine_free(engine);
#ifdef _OPENMP
    *threads = b->args->threads ? (int)b->args->threads : omp_get_max_threads();
#else
    *threads = 1;
#endif
    return TFM_OK;
}

/* Sizes from the file itself, which is not loaded for that. */
static tfm_status read_sizes(benchmark *b, tfm_error *error) {
    tfm_file *file = tfm_file_open(b->args->paths[0], NULL, error);
    size_t i;
    if (!file)
        return error->status;
    for (i = 0; i < tfm_file_n_tensors(file); i++) {
        const size_t *shape = tfm_file_entry(file, i)->tensor.shape;
        b->parameters += (double)shape[0] * (double)shape[1] * (double)shape[2] * (double)shape[3];
    }
    b->f32_bytes = type_bytes(file, TFM_F32);
    for (i = 0; i < b->n_variants; i++)
        b->variants[i].weights = type_bytes(file, b->variants[i].dtype);
    tfm_file_close(file);
    return TFM_OK;
}

static int run_benchmark(benchmark *b) {
    tfm_error error = {TFM_OK, ""};
    int threads = 1, status;
    if (output_check(b->args->json) || output_check(b->args->svg))
        return 1;
    if (find_engine(b, &threads, &error) != TFM_OK || read_sizes(b, &error) != TFM_OK)
        return fail(error.message);
    read_cpu(b->cpu, sizeof b->cpu);
    if (open_limits(&b->limits, threads, b->isa))
        return fail("out of memory");
    if (measure_all(b, &error) != TFM_OK)
        return fail(error.message);
    print_report(b);
    status = finish(0);
    if (b->args->json)
        status = write_json(b, b->args->json) || status;
    if (b->args->svg)
        status = write_svg(b, b->args->svg) || status;
    return status;
}

static int bench(int argc, char **argv) {
    arguments args;
    benchmark b;
    int status = parse(argc, argv, 1, " --type --kv --threads --isa --prompt --gen --batch --json --svg ", &args);
    memset(&b, 0, sizeof b);
    if (!status)
        status = configure(&b, &args);
    if (!status)
        status = run_benchmark(&b);
    free_aligned(b.limits.buffer);
    free(b.limits.ends);
    free(b.outputs);
    free(b.chunks);
    free(b.texts);
    free(b.lengths);
    free(b.work);
    free(b.next);
    free(b.tokens);
    return status;
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        int (*run)(int argc, char **argv);
    } commands[] = {
        {"info", info},         {"quantize", quantize},     {"dump", dump},
        {"tokenize", tokenize}, {"perplexity", perplexity}, {"bench", bench},
    };
    size_t i;
#ifdef SIGXFSZ /* a limit on the size of files fails to be written past, as a full disk does, and does not end the program */
    signal(SIGXFSZ, SIG_IGN);
#endif
#ifdef _WIN32 /* text is bytes */
    _setmode(0, _O_BINARY);
    _setmode(1, _O_BINARY);
#endif
    if (argc < 2)
        return usage("a command is missing", "");
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h"))
        return fputs(usage_text, stdout) < 0 || fflush(stdout);
    for (i = 0; i < sizeof commands / sizeof *commands; i++)
        if (!strcmp(argv[1], commands[i].name))
            return commands[i].run(argc - 2, argv + 2);
    return usage("unknown command ", argv[1]);
}
