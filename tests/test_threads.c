/* Threads: one model, a session for each of eight threads, with the results of one thread; the caller's own threads as a
 * parallel-for; a child process (fork) that goes on with what its parent has loaded. POSIX threads or Windows'. */
#include "test.h"

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
typedef HANDLE thread_id;
#else
#include <pthread.h>
#include <signal.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>
typedef pthread_t thread_id;
#endif

enum { N_THREADS = 8, N_TOKENS = 12, N_ROUNDS = 3 };

/* ---- threads */

typedef struct call {
    void (*function)(void *argument);
    void *argument;
    thread_id id;
} call;

#ifdef _WIN32
static DWORD WINAPI run_call(void *argument) {
    call *c = (call *)argument;
    c->function(c->argument);
    return 0;
}

static void start(call *c) {
    c->id = CreateThread(NULL, 0, run_call, c, 0, NULL);
    if (!c->id)
        test_fatal("no thread");
}

static void join(call *c) {
    WaitForSingleObject(c->id, INFINITE);
    CloseHandle(c->id);
}
#else
static void *run_call(void *argument) {
    call *c = (call *)argument;
    c->function(c->argument);
    return NULL;
}

static void start(call *c) {
    if (pthread_create(&c->id, NULL, run_call, c))
        test_fatal("no thread");
}

static void join(call *c) {
    pthread_join(c->id, NULL);
}
#endif

/* A tfm_parallel_for with two threads: the even and the odd indexes. */
typedef struct half {
    tfm_task task;
    void *argument;
    size_t first, n;
} half;

static void run_half(void *argument) {
    const half *h = (const half *)argument;
    size_t i;
    for (i = h->first; i < h->n; i += 2)
        h->task(h->argument, i);
}

static void two_threads(void *user, size_t n, tfm_task task, void *argument) {
    half halves[2];
    call other;
    size_t i;
    (void)user;
    for (i = 0; i < 2; i++) {
        halves[i].task = task;
        halves[i].argument = argument;
        halves[i].first = i;
        halves[i].n = n;
    }
    other.function = run_half;
    other.argument = &halves[1];
    start(&other);
    run_half(&halves[0]);
    join(&other);
}

/* ---- what each does: a prompt of its own is continued, and its text tokenized. No checks: those are not for threads. */

typedef struct job {
    const tfm_model *model;
    size_t index;
    int threads;
    tfm_parallel_for parallel_for;
    tfm_error error;
    int32_t tokens[N_ROUNDS][N_TOKENS], ids[64];
    size_t n_tokens[N_ROUNDS], n_ids;
} job;

typedef struct sink {
    int32_t *tokens;
    size_t n;
} sink;

static int take(void *user, int32_t token) {
    sink *s = (sink *)user;
    if (s->n < N_TOKENS)
        s->tokens[s->n++] = token;
    return 0;
}

static void generate(void *argument) {
    static const char *const prompts[] = {"Once upon a time", "A little bear", "The sun", "One day, Lily",
                                          "Tom had a",        "It was dark",   "\"Hi!\"", "In the garden"};
    job *j = (job *)argument;
    const char *prompt = prompts[j->index % (sizeof prompts / sizeof *prompts)];
    tfm_session_options options;
    tfm_generate_options how;
    tfm_session *session;
    sink s;
    size_t round;
    memset(&options, 0, sizeof options);
    memset(&how, 0, sizeof how);
    options.engine.threads = j->threads;
    options.engine.parallel_for = j->parallel_for;
    options.context = 64;
    session = tfm_session_create(j->model, &options, &j->error);
    how.max_tokens = N_TOKENS;
    how.sampling.temperature = 0.8f;
    how.on_token = take;
    how.on_token_user = &s;
    for (round = 0; session && round < N_ROUNDS; round++) {
        s.tokens = j->tokens[round];
        s.n = 0;
        how.seed = j->index + 10 * round;
        if (tfm_generate(session, prompt, &how, NULL, NULL, &j->error) != TFM_OK)
            break;
        j->n_tokens[round] = s.n;
    }
    tfm_tokenize(j->model, prompt, strlen(prompt), 0, j->ids, 64, &j->n_ids, NULL);
    tfm_session_free(session);
}

static void prepare(job *j, const tfm_model *model, size_t index, int threads, tfm_parallel_for parallel_for) {
    memset(j, 0, sizeof *j);
    j->model = model;
    j->index = index;
    j->threads = threads;
    j->parallel_for = parallel_for;
}

static int same(const job *a, const job *b) {
    return a->error.status == TFM_OK && b->error.status == TFM_OK && a->n_tokens[N_ROUNDS - 1] &&
           !memcmp(a->n_tokens, b->n_tokens, sizeof a->n_tokens) && !memcmp(a->tokens, b->tokens, sizeof a->tokens) &&
           a->n_ids == b->n_ids && !memcmp(a->ids, b->ids, sizeof a->ids);
}

/* ---- the tests */

static void test_eight_threads(const tfm_model *model, const char *what) {
    static job alone[N_THREADS], together[N_THREADS];
    call calls[N_THREADS];
    size_t i, way;
    for (i = 0; i < N_THREADS; i++) {
        prepare(&alone[i], model, i, 1, NULL);
        generate(&alone[i]);
        CHECK_MSG(alone[i].error.status == TFM_OK, "%s: %s", what, alone[i].error.message);
    }
    for (way = 0; way < 3; way++) { /* one thread each; two of OpenMP's; two of the caller's */
        for (i = 0; i < N_THREADS; i++) {
            prepare(&together[i], model, i, way == 1 ? 2 : 1, way == 2 ? two_threads : NULL);
            calls[i].function = generate;
            calls[i].argument = &together[i];
            start(&calls[i]);
        }
        for (i = 0; i < N_THREADS; i++)
            join(&calls[i]);
        for (i = 0; i < N_THREADS; i++)
            CHECK_MSG(same(&alone[i], &together[i]), "%s, way %lu: thread %lu differs: %s", what, (unsigned long)way,
                      (unsigned long)i, together[i].error.message);
    }
}

static tfm_model *load(tfm_dtype dtype, int threads) {
    tfm_load_options options;
    tfm_error error;
    tfm_model *model;
    memset(&options, 0, sizeof options);
    options.dtype = dtype;
    options.threads = threads;
    model = tfm_load(TEST_MODEL, &options, &error);
    if (!model)
        test_fatal("%s", error.message);
    return model;
}

#ifndef _WIN32
/* What a child finds, as its exit status: 0 if it is what the parent found. It has 60 seconds. */
static int in_child(const job *expected, const tfm_model *model) {
    int status = -1;
    pid_t child;
    fflush(NULL);
    child = fork();
    if (!child) {
        static job found;
        alarm(60);
        prepare(&found, model, expected->index, 2, NULL);
        generate(&found);
        _exit(!same(expected, &found));
    }
    if (child < 0 || waitpid(child, &status, 0) != child)
        return -1;
    return status;
}

/* A child of a process that has loaded (and packed, on two threads), and of one that has generated, too. */
static void test_fork(void) {
    static job expected;
    tfm_model *model = load(TFM_F32, 2), *other = load(TFM_I8, 2);
    pid_t child;
    int status = -1;
    prepare(&expected, model, 1, 1, NULL);
    generate(&expected);
    status = in_child(&expected, model);
    CHECK_MSG(status == 0, "after loading: status %d", status);
    prepare(&expected, model, 2, 2, NULL);
    generate(&expected);
    status = in_child(&expected, model);
    CHECK_MSG(status == 0, "after generating on two threads: status %d", status);
    tfm_free(other);
    fflush(NULL);
    child = fork(); /* and a child that loads by itself, with threads, what its parent has loaded before */
    if (!child) {
        alarm(60);
        tfm_free(load(TFM_F16, 2));
        _exit(0);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK_MSG(status == 0, "loading in a child: status %d", status);
    tfm_free(model);
}
#endif

void test_threads(void);

void test_threads(void) {
    tfm_model *model = load(TFM_NO_DTYPE, 1);
#ifndef _WIN32
    test_fork(); /* first: before other groups' OpenMP */
#endif
    test_eight_threads(model, "as stored");
    tfm_free(model);
    model = load(TFM_F32, 2);
    test_eight_threads(model, "f32");
    tfm_free(model);
}
