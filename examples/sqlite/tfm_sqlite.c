/* tfm_sqlite - text embeddings inside SQLite: a loadable extension
 *
 *     make build/tfm_sqlite.so                      (needs SQLite's header: Debian's libsqlite3-dev)
 *     sqlite3
 *     .load build/tfm_sqlite
 *     select tfm_load('sentences.tfm');             the model of this connection; gives the size of its vectors
 *     select embed('a text');                       a blob of that many float32, in this machine's byte order
 *     select cosine(a, b);                          of two such blobs: -1 to 1
 *
 * What is no text, or no such vector, is an error, NULL too: leave such rows out with `where text is not null`.
 *
 * tfm_load again replaces the model; tfm_load('file', 4) uses 4 threads (otherwise 1: a database's host has its own).
 * Vectors are made as the model's file says (mean, first token or maximum, of length 1 or not); a text is cut where the
 * file says so, otherwise one that is too long is an error. Every connection has its own model and session, so that
 * connections may run on different threads; the weights of a file that `tfm quantize` wrote are shared by all of them.
 * All memory is given back when the connection closes.
 */
#define TFM_API static __attribute__((unused)) /* the host may have another tfm.h inside */
#define TFM_IMPLEMENTATION
#include "../../tfm.h"

#include <sqlite3ext.h>
SQLITE_EXTENSION_INIT1

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* What a connection has. Its functions hold it together: whichever is destroyed last frees it. */
typedef struct connection {
    int n_functions;
    tfm_model *model; /* NULL until tfm_load */
    tfm_session *session;
    size_t n_end; /* tokens that the tokenizer adds behind a text */
} connection;

/* An SQL error with a sentence. */
static void fail(sqlite3_context *context, const char *function, const char *message) {
    char *text = sqlite3_mprintf("%s: %s", function, message);
    if (text)
        sqlite3_result_error(context, text, -1);
    else
        sqlite3_result_error_nomem(context);
    sqlite3_free(text);
}

static void close_model(connection *c) {
    tfm_session_free(c->session);
    tfm_free(c->model);
    c->session = NULL;
    c->model = NULL;
}

static void release(void *user) {
    connection *c = (connection *)user;
    if (--c->n_functions > 0)
        return;
    close_model(c);
    sqlite3_free(c);
}

/* ---- tfm_load(path [, threads]) */

/* How many tokens the tokenizer adds behind each text: those after the place where a text's own stand. */
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

/* Fills an empty connection; on an error it may be half full. */
static tfm_status open_model(connection *c, const char *path, int threads, tfm_error *error) {
    tfm_load_options load;
    tfm_session_options options;
    tfm_status status;
    memset(&load, 0, sizeof load);
    memset(&options, 0, sizeof options);
    load.threads = options.engine.threads = threads;
    c->model = tfm_load(path, &load, error);
    if (!c->model)
        return error->status;
    if (tfm_model_description(c->model)->kind == TFM_DECODER) {
        snprintf(error->message, sizeof error->message, "%.300s: the model has no encoder", path);
        return error->status = TFM_ERROR_UNSUPPORTED;
    }
    status = count_end(c->model, &c->n_end, error);
    if (status != TFM_OK)
        return status;
    c->session = tfm_session_create(c->model, &options, error);
    return c->session ? TFM_OK : error->status;
}

static void sql_load(sqlite3_context *context, int argc, sqlite3_value **argv) {
    connection *c = (connection *)sqlite3_user_data(context), opened;
    const int is_text = sqlite3_value_type(argv[0]) == SQLITE_TEXT; /* before it is made one */
    const char *path = is_text ? (const char *)sqlite3_value_text(argv[0]) : NULL;
    const int is_number = argc < 2 || sqlite3_value_type(argv[1]) == SQLITE_INTEGER;
    const sqlite3_int64 threads = argc < 2 ? 1 : sqlite3_value_int64(argv[1]);
    tfm_error error = {TFM_OK, ""};
    if (is_text && !path) {
        sqlite3_result_error_nomem(context);
        return;
    }
    if (!is_text || strlen(path) != (size_t)sqlite3_value_bytes(argv[0])) {
        fail(context, "tfm_load", "expected the path of a .tfm file as text");
        return;
    }
    if (!is_number || threads < 1 || threads > 1024) {
        fail(context, "tfm_load", "expected a number of threads from 1 to 1024");
        return;
    }
    memset(&opened, 0, sizeof opened);
    if (open_model(&opened, path, (int)threads, &error) != TFM_OK) { /* the model before stays */
        close_model(&opened);
        fail(context, "tfm_load", error.message);
        return;
    }
    close_model(c);
    c->model = opened.model;
    c->session = opened.session;
    c->n_end = opened.n_end;
    sqlite3_result_int64(context, (sqlite3_int64)tfm_model_description(c->model)->d_model);
}

/* ---- embed(text) */

/* Cuts ids to `most`, but keeps what the tokenizer adds behind a text: n_end ids. */
static size_t cut(int32_t *ids, size_t n, size_t n_end, size_t most) {
    if (n <= most || n_end > most)
        return n;
    memmove(ids + most - n_end, ids + n - n_end, n_end * sizeof *ids);
    return most;
}

/* vector[d_model] of a text. */
static tfm_status embed(const connection *c, const char *text, size_t size, float *vector, tfm_error *error) {
    const tfm_description *d = tfm_model_description(c->model);
    tfm_text tokens;
    int32_t *ids;
    size_t n;
    tfm_status status = tfm_tokenize(c->model, text, size, 0, NULL, 0, &n, error);
    if (status != TFM_OK)
        return status;
    ids = (int32_t *)sqlite3_malloc64((n + 1) * sizeof *ids);
    if (!ids) {
        snprintf(error->message, sizeof error->message, "out of memory");
        return error->status = TFM_ERROR_MEMORY;
    }
    memset(&tokens, 0, sizeof tokens);
    tokens.tokens = ids;
    status = tfm_tokenize(c->model, text, size, 0, ids, n, &n, error);
    tokens.n_tokens = d->pool_max_tokens ? cut(ids, n, c->n_end, d->pool_max_tokens) : n;
    if (status == TFM_OK && tokens.n_tokens > d->encoder.n_positions) {
        snprintf(error->message, sizeof error->message, "the text has %lu tokens, and the model takes %lu at most",
                 (unsigned long)n, (unsigned long)d->encoder.n_positions);
        status = error->status = TFM_ERROR_CONTEXT_FULL;
    }
    if (status == TFM_OK)
        status = tfm_embed(c->session, &tokens, 1, TFM_NO_POOLING, 0, vector, error);
    sqlite3_free(ids);
    return status;
}

static void sql_embed(sqlite3_context *context, int argc, sqlite3_value **argv) {
    const connection *c = (const connection *)sqlite3_user_data(context);
    tfm_error error = {TFM_OK, ""};
    const char *text;
    float *vector;
    size_t bytes;
    (void)argc;
    if (!c->session) {
        fail(context, "embed", "no model is loaded: call tfm_load('model.tfm') first");
        return;
    }
    if (sqlite3_value_type(argv[0]) != SQLITE_TEXT) {
        fail(context, "embed",
             sqlite3_value_type(argv[0]) == SQLITE_NULL ? "expected a text, found NULL"
                                                        : "expected a text, found another type");
        return;
    }
    text = (const char *)sqlite3_value_text(argv[0]);
    bytes = tfm_model_description(c->model)->d_model * sizeof *vector;
    vector = (float *)sqlite3_malloc64(bytes);
    if (!text || !vector)
        sqlite3_result_error_nomem(context);
    else if (embed(c, text, (size_t)sqlite3_value_bytes(argv[0]), vector, &error) != TFM_OK)
        fail(context, "embed", error.message);
    else
        sqlite3_result_blob64(context, vector, bytes, SQLITE_TRANSIENT);
    sqlite3_free(vector);
}

/* ---- cosine(a, b) */

static float number_at(const void *blob, size_t i) {
    float number; /* a blob need not lie where a float may */
    memcpy(&number, (const char *)blob + i * sizeof number, sizeof number);
    return number;
}

static const char *check_vectors(sqlite3_value **argv) {
    int i;
    for (i = 0; i < 2; i++) {
        if (sqlite3_value_type(argv[i]) == SQLITE_NULL)
            return "expected two vectors, found NULL";
        if (sqlite3_value_type(argv[i]) != SQLITE_BLOB)
            return "expected two vectors as blobs, found another type";
        if (!sqlite3_value_bytes(argv[i]) || sqlite3_value_bytes(argv[i]) % (int)sizeof(float))
            return "expected blobs of float32, found one whose size is no multiple of 4 bytes, or 0";
    }
    if (sqlite3_value_bytes(argv[0]) != sqlite3_value_bytes(argv[1]))
        return "the two vectors have different lengths";
    return NULL;
}

static void sql_cosine(sqlite3_context *context, int argc, sqlite3_value **argv) {
    const char *wrong = check_vectors(argv);
    const void *a, *b;
    double ab = 0, aa = 0, bb = 0;
    size_t n, i;
    (void)argc;
    if (wrong) {
        fail(context, "cosine", wrong);
        return;
    }
    a = sqlite3_value_blob(argv[0]);
    b = sqlite3_value_blob(argv[1]);
    n = (size_t)sqlite3_value_bytes(argv[0]) / sizeof(float);
    for (i = 0; i < n; i++) {
        const double x = (double)number_at(a, i), y = (double)number_at(b, i);
        ab += x * y;
        aa += x * x;
        bb += y * y;
    }
    if (aa > 0 && bb > 0 && isfinite(ab / sqrt(aa * bb)))
        sqlite3_result_double(context, ab / sqrt(aa * bb));
    else
        fail(context, "cosine", "a vector of zeros, or with numbers that are not finite, has no direction");
}

/* ---- the extension */

int sqlite3_tfmsqlite_init(sqlite3 *database, char **message, const sqlite3_api_routines *api);

/* What SQLite calls: the name follows from the file's. DIRECTONLY: no trigger or view of a database that somebody sent may
 * open files. */
int sqlite3_tfmsqlite_init(sqlite3 *database, char **message, const sqlite3_api_routines *api) {
    static const int vector_flags = SQLITE_UTF8, pure_flags = SQLITE_UTF8 | SQLITE_DETERMINISTIC | SQLITE_INNOCUOUS;
    connection *c;
    int i, status = SQLITE_OK;
    SQLITE_EXTENSION_INIT2(api);
    (void)message;
    c = (connection *)sqlite3_malloc64(sizeof *c);
    if (!c)
        return SQLITE_NOMEM;
    memset(c, 0, sizeof *c);
    for (i = 0; status == SQLITE_OK && i < 3; i++) { /* a function that can't be made is destroyed at once */
        c->n_functions++;
        if (i < 2)
            status = sqlite3_create_function_v2(database, "tfm_load", i + 1, SQLITE_UTF8 | SQLITE_DIRECTONLY, c,
                                                sql_load, NULL, NULL, release);
        else
            status = sqlite3_create_function_v2(database, "embed", 1, vector_flags, c, sql_embed, NULL, NULL, release);
    }
    if (status == SQLITE_OK)
        status = sqlite3_create_function_v2(database, "cosine", 2, pure_flags, NULL, sql_cosine, NULL, NULL, NULL);
    /* Worker threads of OpenMP may still be asleep in this code when a connection closes: it stays in memory. */
    return status == SQLITE_OK ? SQLITE_OK_LOAD_PERMANENTLY : status;
}
