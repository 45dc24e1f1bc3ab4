/* tfm.h - v0.1 - Transformer inference in one C header - MIT licence, see the end of the file
 *
 * In ONE C or C++ file, before the include, write
 *     #define TFM_IMPLEMENTATION
 *     #include "tfm.h"
 * and everywhere else just include it. C99 or C++11 and up; needs libc and libm, uses OpenMP when compiled with it.
 */
#ifndef TFM__TIER /* The header includes itself to compile its vector kernels once for each instruction set: floor c. */
#ifndef TFM_H
#define TFM_H

/* =====================================================================================================================
 * THE MANUAL
 * =====================================================================================================================
 *
 * WHAT IT IS
 *
 *   tfm.h runs Transformer models on a CPU. A checkpoint from PyTorch is converted once, by tools/convert.py, into a
 *   flat binary file; the library maps that file and runs it:
 *
 *     #define TFM_IMPLEMENTATION
 *     #include "tfm.h"
 *
 *     static int print(void *user, const char *text, size_t size) {
 *         return fwrite(text, 1, size, (FILE *)user) != size;
 *     }
 *
 *     int main(void) {
 *         tfm_error error = {0};
 *         tfm_model *model = tfm_load("gpt2.tfm", NULL, &error);
 *         tfm_session *session = model ? tfm_session_create(model, NULL, &error) : NULL;
 *         tfm_generate_options options = {0};
 *         options.max_tokens = 100;
 *         if (!session || tfm_generate(session, "Once upon a time", &options, print, stdout, &error) != TFM_OK)
 *             fprintf(stderr, "%s\n", error.message);
 *         tfm_session_free(session);
 *         tfm_free(model);
 *         return error.status != TFM_OK;
 *     }
 *
 *   (In C++ write `tfm_error error = {};` and likewise for the options.)
 *
 * THE IDEAS
 *
 *   A Transformer is data. The library knows no model family by name: a .tfm file describes its model (which norm, where;
 *   which positions; how many heads; which activation; ...) and one forward pass runs every description. The same
 *   layers are public: fill a tfm_block with your own weights and call tfm_block_forward.
 *
 *   tfm_model     what was loaded. Never changes afterwards; any number of threads may share one.
 *   tfm_session   one user's state: KV cache, scratch memory, random numbers. One thread at a time. It allocates all
 *                 that evaluating needs when it is created; generating allocates nothing. It may hold several
 *                 sequences, which are evaluated together and share each read of the weights (tfm_eval).
 *   tfm_chat      a conversation in a sequence of a session: turns, a template, a budget of tokens; it can be saved.
 *   tfm_engine    how the machine is used: instruction set, threads, scratch memory. A session has one inside; who builds
 *                 a Transformer by hand makes one. One thread at a time.
 *   tfm_error     what went wrong, in one sentence that names the file, tensor, token or option. Owned by the caller;
 *                 every function that takes one also takes NULL.
 *
 *   Options are structs that work when zeroed: every field's 0 means "the usual".
 *
 *   Results have the same bits for every number of threads, and a token's result has the same bits whether it was
 *   computed alone, inside a prompt, or beside other sequences: each output is a sum in one fixed order. So a cached
 *   prefix may be reused, and sequences batched, without a change in what comes out. The vector instruction sets agree
 *   with the plain C one to rounding.
 *
 *   The library prints nothing, never exits or aborts, keeps no global state, and trusts nothing that stands in a file.
 *
 * THREADS, PROCESSES
 *
 *   Functions that take a const object (tfm_model, tfm_file, tfm_description, tensors, blocks) may be called by any number
 *   of threads at once, as long as nobody frees it. A tfm_session, what is inside it (tfm_session_engine, tfm_chat) and a
 *   tfm_engine belong to one thread at a time; sessions of one model don't disturb each other. Functions without objects
 *   may be called by any thread. After fork a child may go on with a model, and with sessions that no thread of the parent
 *   was in the middle of using; it gets OpenMP threads of its own. (A child that loads the model itself while its parent's
 *   same thread has generated with GCC's OpenMP must keep to threads = 1: that OpenMP can't be used on both sides of a
 *   fork.)
 *
 * ODD NUMBERS
 *
 *   NaN and infinity     in weights: loaded as they are in f32, f16 and bf16 (finite ones as f16 at most +-65504); what
 *                        has to be quantized is refused with the tensor's name (TFM_ERROR_FORMAT for a file,
 *                        TFM_ERROR_ARGUMENT for tfm_pack). In activations: a product with one is NaN or infinite, as in
 *                        IEEE 754 and PyTorch; int8 makes a row that has one NaN. It stays in its own sequence, and goes
 *                        from a token only to those after it (with causal attention; a window or a mask does not stop
 *                        it): the tokens before it, other sequences, and whatever follows once it is forgotten
 *                        (tfm_truncate) have the bits that they have without it.
 *   logits that are NaN  are never chosen. If none is left that is a number above -infinity, sampling and generating are
 *                        TFM_ERROR_ARGUMENT, "no token can be chosen". An infinite logit leaves nothing to the others.
 *                        Beam search, which needs probabilities, takes nothing from a row in which one logit is NaN.
 *   equal logits         greedy: the lowest id. Sampling: equal chances; top_k keeps all that equal the k-th. Beam search:
 *                        the lower beam, then the lower token.
 *   nothing as input     generating from an empty prompt, a chunk or an encoder's text without tokens are
 *                        TFM_ERROR_ARGUMENT; the empty text tokenizes to what the tokenizer adds to every text, and no ids
 *                        decode to the empty text.
 *   a vocabulary of 1    works: that token is always chosen. Beam search needs two tokens, and one more than end a text.
 *   a row masked wholly  a token that sees nothing gets zeros from attention (so the output layer's bias). A text with a
 *                        mask that hides all its tokens pools (CLS, mean, maximum) to zeros, normalized or not.
 *
 * BUILD OPTIONS (define them before the include that has TFM_IMPLEMENTATION)
 *
 *   -fopenmp                  several threads (or give tfm_session_options.parallel_for your own thread pool)
 *   TFM_API                   what stands before every public function (default: extern; `static` makes all of it private)
 *   TFM_MALLOC(size), TFM_FREE(memory)   the default allocator (default: malloc and free)
 *   TFM_NO_STDIO              no files: tfm_load_memory is the only way to load, and nothing can be written
 *   TFM_NO_MMAP               files are read into memory instead of being mapped
 *   TFM_NO_SIMD               only the plain C kernels
 *   TFM_NO_IMPLEMENTATION     TFM_IMPLEMENTATION does not count. For -D on the command line: programs that could each stand
 *                             alone share one object, from cc -O2 -DTFM_IMPLEMENTATION -x c -c tfm.h -o tfm.o
 *   TFM_HEADER                this file's name in quotes, if you have renamed it (default "tfm.h")
 *   Nothing needs -march=native: the instruction set is chosen when the program runs. Compile with -O2.
 *
 * THE .tfm FILE (version 1; little-endian)
 *
 *   header, 64 bytes:  u8[8] magic "TFMH\r\n\x1a\n" | u32 version | u32 required features (a reader refuses bits that it
 *                      does not know) | u64 file size | u64 offset, u64 size of the metadata | u64 offset, u64 size of the
 *                      tensor directory | u32 number of tensors | u32 CRC-32 of the 60 bytes before it, the metadata and
 *                      the directory
 *   metadata:          entries, each 8-byte aligned: u32 key size | u32 type | u64 value size in bytes | key, padded to 8 |
 *                      value, padded to 8.  Types: 1 i64[]  2 f64[]  3 text  4 bytes  5 i32[]  6 f32[].
 *                      Unknown keys are ignored.
 *   tensor directory:  entries, each 8-byte aligned: u32 name size | u32 dtype | u32 layout | u32 number of dimensions |
 *                      u64[4] shape | u64 offset, u64 size of the data | u32 CRC-32 of the data | u32 zero | name, padded
 *                      to 8.  dtype: 1 f32  2 f16  3 bf16  4 i8, or GGUF's blocks, 16 + GGUF's number (see tfm_dtype).
 *                      layout: 0 rows  1 cols  2 panels (see tfm_layout).  NAME#0, NAME#1, ...: parts of a matrix NAME, whose
 *                      rows are its rows in turn.
 *   data:              each tensor at a multiple of 64 bytes.
 *   The keys of the description are read in tfm__read_description, the tokenizer's in tfm__read_tokenizer, a chat's in
 *   tfm__chat_setup and tfm__form_texts; the names of the tensors in tfm__load_weights.
 */

#include <stddef.h>
#include <stdint.h>
#ifndef TFM_NO_STDIO
#include <stdio.h>
#endif

#ifdef __cplusplus
extern "C" {
#endif

#ifndef TFM_API
#define TFM_API extern
#endif

#define TFM_VERSION_MAJOR 0
#define TFM_VERSION_MINOR 1

/* =====================================================================================================================
 * PUBLIC API
 * =====================================================================================================================
 * Sizes are size_t and count elements unless they say bytes; token ids are int32_t. [a][b] is an array in row-major
 * order. A pointer that is returned is owned by the object it came from unless the comment says otherwise.
 */

/* ------------------------------------------------------------------------------------------------ errors and memory */

typedef enum tfm_status {
    TFM_OK = 0,
    TFM_ERROR_MEMORY,       /* the allocator returned NULL */
    TFM_ERROR_FILE,         /* a file can't be opened, read or written, or is a directory, a pipe, a device */
    TFM_ERROR_FORMAT,       /* a file is not what it should be: damaged, truncated, inconsistent */
    TFM_ERROR_UNSUPPORTED,  /* a file or an option asks for something that this version or this CPU can't do */
    TFM_ERROR_ARGUMENT,     /* a caller's argument is out of range */
    TFM_ERROR_CONTEXT_FULL, /* the sequence has no room for the tokens (see tfm_shift), or the session for the text */
    TFM_ERROR_STOPPED       /* the caller's progress callback asked to stop */
} tfm_status;

typedef struct tfm_error {
    tfm_status status;
    char message[512]; /* one sentence without a line end; always terminated */
} tfm_error;

/* Where memory comes from. Zeroed: TFM_MALLOC and TFM_FREE. `allocate` returns memory aligned as malloc's, or NULL.
 * Both are called by the thread that calls the library, never by a worker. */
typedef struct tfm_allocator {
    void *(*allocate)(void *user, size_t size);
    void (*release)(void *user, void *memory);
    void *user;
} tfm_allocator;

/* --------------------------------------------------------------------------------------------- instruction sets, engine */

/* Instruction sets. TFM_ISA_BEST picks the fastest that this CPU has. */
typedef enum tfm_isa {
    TFM_ISA_BEST = 0,
    TFM_ISA_SCALAR,     /* plain C: the definition that the others are tested against */
    TFM_ISA_AVX2,       /* x86-64 with AVX2, FMA and F16C */
    TFM_ISA_AVXVNNI,    /* the same with AVX-VNNI's int8 dot products */
    TFM_ISA_AVX512,     /* AVX-512 F, BW, DQ, VL */
    TFM_ISA_AVX512VNNI, /* the same with VNNI's int8 dot products */
    TFM_ISA_NEON,       /* 64-bit Arm */
    TFM_ISA_NEONDOT,    /* the same with the int8 dot products of Armv8.2 */
    TFM_ISA_COUNT
} tfm_isa;

/* The name of an instruction set: "scalar", "avx2", ...; "best" for TFM_ISA_BEST. Static; NULL if out of range. */
TFM_API const char *tfm_isa_name(tfm_isa isa);

/* Finds the instruction set with that name. TFM_ERROR_ARGUMENT if there is none. `name` NULL or "" is TFM_ISA_BEST. */
TFM_API tfm_status tfm_isa_from_name(const char *name, tfm_isa *isa, tfm_error *error);

/* 1 if this program can run that instruction set on this CPU. */
TFM_API int tfm_isa_supported(tfm_isa isa);

/* A piece of work: called once for each index. Different indexes may run at the same time. */
typedef void (*tfm_task)(void *argument, size_t index);

/* The caller's own threads: must call task(argument, i) once for every i from 0 to n - 1, in any order and on any
 * threads, and return when all are done. Hand the indexes out dynamically: the pieces are small so that a thread that
 * is held up delays only one of them. */
typedef void (*tfm_parallel_for)(void *user, size_t n, tfm_task task, void *argument);

typedef struct tfm_engine_options {
    int threads;                   /* 0: all that OpenMP offers; at most 1024; 1 without OpenMP or with parallel_for */
    tfm_isa isa;                   /* 0: the best of this CPU */
    tfm_parallel_for parallel_for; /* NULL: OpenMP where compiled in, otherwise the caller's thread alone */
    void *parallel_user;           /* the first argument of parallel_for */
    tfm_allocator allocator;
} tfm_engine_options;

typedef struct tfm_engine tfm_engine;

/* Makes an engine; free it with tfm_engine_free. NULL on error (memory; an isa that this CPU can't run). */
TFM_API tfm_engine *tfm_engine_create(const tfm_engine_options *options, tfm_error *error);
/* Gives back an engine and its scratch memory. engine may be NULL. */
TFM_API void tfm_engine_free(tfm_engine *engine);

/* The instruction set that the engine uses. */
TFM_API tfm_isa tfm_engine_isa(const tfm_engine *engine);

/* ------------------------------------------------------------------------------------------------------------ tensors */

typedef enum tfm_dtype {
    TFM_NO_DTYPE = 0,
    TFM_F32,
    TFM_F16,
    TFM_BF16,
    TFM_I8,
    TFM_DTYPE_COUNT, /* of those that the kernels compute with. The others are only read, to be packed as one of those: */
    TFM_PARTS = 15, /* a matrix whose data is an array of tfm_tensor: matrices whose rows, in turn, are its rows */
    TFM_Q4_0 = 18,  /* GGUF's blocks of quantized numbers: see "blocks" in floor b. Always in rows */
    TFM_Q4_1 = 19,
    TFM_Q5_0 = 22,
    TFM_Q5_1 = 23,
    TFM_Q8_0 = 24,
    TFM_Q4_K = 28,
    TFM_Q5_K = 29,
    TFM_Q6_K = 30
} tfm_dtype;

/* How a matrix lies in memory. Its shape is [out, in] in all of them.
 *   rows    [out][in]               PyTorch's nn.Linear and nn.Embedding; also every vector
 *   cols    [in][out]               GPT-2's Conv1D
 *   panels  [ceil(out / 16)][in][16]  16 outputs side by side: what the kernels read. Outputs past the end are zero.
 *           i8 is always in panels; see "int8" in floor b for what is in one. */
typedef enum tfm_layout { TFM_ROWS = 0, TFM_COLS, TFM_PANELS, TFM_LAYOUT_COUNT } tfm_layout;

#define TFM_MAX_DIMS 4

/* A view of numbers; it does not own its data. Zeroed: "no tensor", as an absent bias. Dimensions past n_dims are 1. */
typedef struct tfm_tensor {
    tfm_dtype dtype;
    tfm_layout layout;
    int n_dims;
    size_t shape[TFM_MAX_DIMS];
    const void *data;
} tfm_tensor;

/* "f32", "f16", "bf16", "i8", "parts", "q4_0", ... "q6_k"; NULL if there is no such type. Static. */
TFM_API const char *tfm_dtype_name(tfm_dtype dtype);
/* Finds the type with that name, of those that a model can have in memory: the first four, and "int8". TFM_ERROR_ARGUMENT
 * if there is none. */
TFM_API tfm_status tfm_dtype_from_name(const char *name, tfm_dtype *dtype, tfm_error *error);

/* A tensor over the caller's own fp32 numbers: a vector [n]. */
TFM_API tfm_tensor tfm_vector(const float *data, size_t n);
/* The same: a matrix [out, in] in rows. */
TFM_API tfm_tensor tfm_matrix(const float *data, size_t out, size_t in);

/* Bytes of a tensor's data. */
TFM_API size_t tfm_tensor_bytes(const tfm_tensor *tensor);

/* Packs a matrix (any layout and dtype) into panels of the given dtype, for a tfm_linear. On success `packed` has memory
 * of its own that the caller gives back with tfm_unpack. allocator NULL: the default one. TFM_I8 quantizes: each weight
 * becomes an integer q = round(w / s) from -127 to 127 with a scale s for each output and 64 inputs, |w - s q| <= s / 2,
 * s <= 17 / 16 of the group's largest |w| / 127, or of the output's largest |w| / 127 / 60000 if that is more.
 * TFM_ERROR_ARGUMENT if a weight to be quantized is not finite. */
TFM_API tfm_status tfm_pack(const tfm_tensor *matrix, tfm_dtype dtype, const tfm_allocator *allocator,
                            tfm_tensor *packed, tfm_error *error);
/* Gives back what tfm_pack made, with the same allocator; `packed` is zeroed. Not for other tensors. */
TFM_API void tfm_unpack(tfm_tensor *packed, const tfm_allocator *allocator);

/* ------------------------------------------------------------------------------------------------------------- layers
 * The parts of a Transformer. The structs are plain: fill them by hand (weights packed by tfm_pack, vectors in fp32)
 * or take them from a loaded model. They own nothing. Every forward function takes its activations in fp32, row-major,
 * one token a row, and may grow the engine's scratch memory (TFM_ERROR_MEMORY). */

/* y = x W^T + b.  weight [out, in] in panels; bias [out] or absent.
 * With an i8 weight x is quantized too, when it comes (dynamic quantization): for each row and 64 inputs a scale
 * t = largest |x| / 127 and integers round(x / t). (AVX2, whose sums of two products of bytes saturate: t = the largest
 * |x| or |sum of two neighbours| / 127, so that they don't.) Integers are multiplied and added exactly, in 32 bits; then
 * y = sum over groups of s t (integer sum). The error of one product x w is at most (s |x| + t |w|) / 2 + s t / 4. */
typedef struct tfm_linear {
    tfm_tensor weight;
    tfm_tensor bias;
} tfm_linear;

typedef enum tfm_norm_kind {
    TFM_LAYER_NORM = 0, /* y = (x - mean) / sqrt(variance + eps) * weight + bias      (Ba et al. 2016) */
    TFM_RMS_NORM        /* y = x / sqrt(mean of squares + eps) * weight               (Zhang, Sennrich 2019) */
} tfm_norm_kind;

typedef struct tfm_norm {
    tfm_norm_kind kind;
    float eps;
    tfm_tensor weight; /* [d_model] */
    tfm_tensor bias;   /* [d_model] or absent */
} tfm_norm;

typedef enum tfm_activation {
    TFM_NO_ACTIVATION = 0,
    TFM_RELU,
    TFM_GELU,       /* x * (1 + erf(x / sqrt 2)) / 2                                  (Hendrycks, Gimpel 2016) */
    TFM_GELU_TANH,  /* x * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2: GPT-2's "gelu_new" */
    TFM_QUICK_GELU, /* x * sigmoid(1.702 x) */
    TFM_SILU,       /* x * sigmoid(x) */
    TFM_TANH,
    TFM_ACTIVATION_COUNT
} tfm_activation;

/* Rotary positions (Su et al. 2021): the pair (a, b) of a query or key at the position p is turned by the angle
 * p * frequency of the pair: (a cos - b sin, b cos + a sin). */
typedef struct tfm_rotary {
    size_t n_pairs;           /* 0: none. The first 2 n_pairs numbers of a head are turned. */
    int interleaved;          /* 0: the pairs are i and i + n_pairs; 1: 2 i and 2 i + 1 */
    float scale;              /* of sin and cos: mostly 1 */
    const float *frequencies; /* [n_pairs] */
} tfm_rotary;

/* Relative positions (Raffel et al. 2020, T5): what is added to a score depends on key position - query position alone.
 * Distances fall into buckets: the near ones have their own, the others logarithmically wider ones. */
typedef struct tfm_relative {
    size_t n_buckets, max_distance; /* 0 buckets: none. Without `causal` half of them are for keys after the query. */
    const float *table;             /* [n_buckets][n_heads] */
} tfm_relative;

/* Multi-head attention (Vaswani et al. 2017): for each head softmax(q k^T scale + mask) v; the heads' results side by
 * side through `out`. With n_kv_heads < n_heads, n_heads / n_kv_heads query heads share one head of keys and values
 * (Ainslie et al. 2023). */
typedef struct tfm_attention {
    size_t n_heads, n_kv_heads, head_dim;
    int causal;              /* 1: a token sees itself and the tokens before it */
    size_t window;           /* a token sees that many, itself included; 0: all */
    float scale;             /* mostly 1 / sqrt(head_dim) */
    float softcap;           /* scores become softcap * tanh(score / softcap); 0: they stay */
    tfm_linear qkv;          /* [(n_heads + 2 n_kv_heads) head_dim, d_model]: all queries, all keys, all values */
    tfm_norm q_norm, k_norm; /* of each head, [head_dim], or absent (no weight) */
    tfm_rotary rotary;
    tfm_relative relative;
    tfm_linear out; /* [d_model, n_heads head_dim] */
} tfm_attention;

/* Attention of a decoder to its encoder: queries from the decoder, keys and values from the encoder's results (which
 * tfm_memory_forward puts into a cache, once). Heads and scale are those of the block's attention. */
typedef struct tfm_cross {
    tfm_norm norm;
    tfm_linear q;   /* [n_heads head_dim, d_model] */
    tfm_linear kv;  /* [2 n_kv_heads head_dim, d_model]: all keys, all values */
    tfm_linear out; /* [d_model, n_heads head_dim] */
} tfm_cross;

/* Position-wise feed-forward: plain  down(act(up(x)));  gated  down(act(gate(x)) * up(x))  (Shazeer 2020). */
typedef struct tfm_ffn {
    tfm_activation activation;
    int gated;
    tfm_linear up;   /* [d_ff, d_model]; gated: [2 d_ff, d_model], the gate's rows first */
    tfm_linear down; /* [d_model, d_ff] */
} tfm_ffn;

typedef enum tfm_norm_place {
    TFM_PRE_NORM = 0, /* x += attention(norm(x));     x += ffn(norm(x))       (GPT-2, T5, LLaMA) */
    TFM_POST_NORM,    /* x = norm(x + attention(x));  x = norm(x + ffn(x))    (the paper, BERT) */
    TFM_SANDWICH_NORM /* x += post(attention(norm(x)));  x += post(ffn(norm(x)))  (Gemma 2) */
} tfm_norm_place;

typedef struct tfm_block {
    tfm_norm_place norm_place;
    int parallel; /* 1: x += attention(norm(x)) + ffn(norm(x)), each with its norm; without ffn_norm both have the same.
                   * Only with TFM_PRE_NORM and without cross. */
    tfm_norm attention_norm;
    tfm_attention attention;
    tfm_norm attention_post_norm; /* for TFM_SANDWICH_NORM */
    tfm_cross cross;              /* between the two, or absent (no weights) */
    tfm_norm ffn_norm;
    tfm_ffn ffn;
    tfm_norm ffn_post_norm; /* for TFM_SANDWICH_NORM */
} tfm_block;

/* Keys and values of one sequence for all blocks of a stack. Memory is cut into pages of TFM_KV_PAGE tokens, so that
 * sequences of different lengths share one pool; within a page each head's keys and values are contiguous, in the
 * panels that the matrix kernels read. Make one with tfm_kv_create, or let a session manage them. */
#define TFM_KV_PAGE 128
typedef struct tfm_kv {
    tfm_dtype dtype; /* TFM_F32, TFM_F16, TFM_BF16 or TFM_I8 */
    size_t n_layers, n_kv_heads, head_dim;
    size_t capacity;       /* tokens that there are pages for */
    size_t n_tokens;       /* tokens that are in it. The caller moves it on, after the last block of a step. */
    const uint32_t *pages; /* which page of the pool holds tokens [i * TFM_KV_PAGE, ...); NULL: page i */
    size_t n_pool_pages;
    size_t page_tokens; /* TFM_KV_PAGE; the library's own temporary caches may have one shorter page */
    void *pool; /* [n_pool_pages][n_layers][2: keys, values][n_kv_heads][TFM_KV_PAGE * head_dim rounded up to 16], and
                 * with TFM_I8 the scales */
} tfm_kv;

/* Makes an empty cache with its own pool. dtype TFM_F32; or TFM_F16 for half the memory: keys and values are rounded to
 * 11 bits, and held to +-65504; or TFM_BF16, with which attention is fastest: they are rounded to 8 bits, and so are the
 * queries and probabilities that they are multiplied with; or TFM_I8 for about a quarter of the memory: integers from
 * -127 to 127 with a scale (8 bits of mantissa, no less than largest / 127) for each 32 numbers of a head's key or
 * value. Free with tfm_kv_free and the same allocator (NULL: the default one). TFM_ERROR_ARGUMENT, TFM_ERROR_MEMORY: then
 * there is nothing to free. */
TFM_API tfm_status tfm_kv_create(tfm_kv *kv, tfm_dtype dtype, size_t n_layers, size_t n_kv_heads, size_t head_dim,
                                 size_t capacity, const tfm_allocator *allocator, tfm_error *error);
/* Gives back the pool of a cache, with the allocator that it was made with. */
TFM_API void tfm_kv_free(tfm_kv *kv, const tfm_allocator *allocator);

/* Consecutive rows of x that are consecutive tokens of one sequence; one step may run several spans, and tokens attend
 * only within their own. */
typedef struct tfm_span {
    size_t n_rows; /* tokens of this span: rows of x, after those of the spans before it */
    tfm_kv *kv;    /* the tokens before this span; this span's keys and values are added behind them (n_tokens stays).
                        * NULL: the span is the whole sequence and nothing is kept; keys and values are fp32 for a while,
                        * or bf16 if the weights are i8 (see tfm_kv_create). */
    const float *mask; /* [n_rows][tokens before + n_rows], added to every head's scores (-INFINITY: not seen), or NULL.
                        * A token that sees nothing at all gets zeros. */
    int same_mask;     /* 1: mask is [tokens before + n_rows], the same for every token */
    const tfm_kv *memory; /* for a block with cross-attention: the keys and values of the encoder's tokens */
} tfm_span;

/* y[n_rows][out] = x[n_rows][in] W^T + b.  y must not overlap x. */
TFM_API tfm_status tfm_linear_forward(tfm_engine *engine, const tfm_linear *linear, const float *x, size_t n_rows,
                                      float *y, tfm_error *error);

/* y[n_rows][d_model] = norm(x[n_rows][d_model]).  y may be x. */
TFM_API tfm_status tfm_norm_forward(tfm_engine *engine, const tfm_norm *norm, const float *x, size_t n_rows, float *y,
                                    tfm_error *error);

/* y = activation(x), n numbers.  y may be x. */
TFM_API tfm_status tfm_activation_forward(tfm_engine *engine, tfm_activation activation, const float *x, size_t n,
                                          float *y, tfm_error *error);

/* y[rows][d_model] = attention(x[rows][d_model]), rows = the spans' n_rows together.  `layer` says which layer of the
 * spans' caches this is. y must not overlap x. */
TFM_API tfm_status tfm_attention_forward(tfm_engine *engine, const tfm_attention *attention, size_t layer,
                                         const float *x, const tfm_span *spans, size_t n_spans, float *y,
                                         tfm_error *error);

/* y[n_rows][d_model] = ffn(x[n_rows][d_model]).  y must not overlap x. */
TFM_API tfm_status tfm_ffn_forward(tfm_engine *engine, const tfm_ffn *ffn, const float *x, size_t n_rows, float *y,
                                   tfm_error *error);

/* x[rows][d_model] becomes block(x). */
TFM_API tfm_status tfm_block_forward(tfm_engine *engine, const tfm_block *block, size_t layer, float *x,
                                     const tfm_span *spans, size_t n_spans, tfm_error *error);

/* Puts the cross-attention's keys and values of an encoder's results [n_rows][d_model] into layer `layer` of an empty
 * cache. After the last layer set memory->n_tokens = n_rows; then the cache may stand in a span as its memory. */
TFM_API tfm_status tfm_memory_forward(tfm_engine *engine, const tfm_block *block, size_t layer, const float *results,
                                      size_t n_rows, tfm_kv *memory, tfm_error *error);

/* -------------------------------------------------------------------------------------------------------- .tfm files */

/* Metadata of a .tfm file: one key with `count` values. Text and bytes count bytes; text is not terminated. */
typedef enum tfm_meta_type {
    TFM_META_I64 = 1,
    TFM_META_F64,
    TFM_META_TEXT,
    TFM_META_BYTES,
    TFM_META_I32,
    TFM_META_F32
} tfm_meta_type;

typedef struct tfm_meta {
    const char *key; /* not terminated */
    size_t key_size;
    tfm_meta_type type;
    size_t count;
    const void *values; /* 8-byte aligned; as the type says: int64_t, double, char, unsigned char, int32_t, float */
} tfm_meta;

/* One tensor of a .tfm file. */
typedef struct tfm_entry {
    const char *name; /* not terminated */
    size_t name_size;
    tfm_tensor tensor;
    uint32_t crc;
} tfm_entry;

/* An open .tfm file. Reading from it is safe from many threads. */
typedef struct tfm_file tfm_file;

#ifndef TFM_NO_STDIO
/* Opens and validates a file: header, checksum, metadata, directory. The tensors' own checksums are left to
 * tfm_file_verify. NULL on error. Close with tfm_file_close; entries and metadata point into the file. */
TFM_API tfm_file *tfm_file_open(const char *path, const tfm_allocator *allocator, tfm_error *error);
#endif
/* The same for a file in memory (8-byte aligned), which must outlive the tfm_file. `name` is for error messages. */
TFM_API tfm_file *tfm_file_open_memory(const void *data, size_t size, const char *name, const tfm_allocator *allocator,
                                       tfm_error *error);
/* Closes a file; what pointed into it is no longer valid. file may be NULL. */
TFM_API void tfm_file_close(tfm_file *file);
/* Bytes of the whole file. */
TFM_API size_t tfm_file_bytes(const tfm_file *file);
/* How many entries its metadata has. */
TFM_API size_t tfm_file_n_meta(const tfm_file *file);
/* A metadata entry, in the file's order; NULL past the end. The file's own. */
TFM_API const tfm_meta *tfm_file_meta(const tfm_file *file, size_t index);
/* How many tensors it has. */
TFM_API size_t tfm_file_n_tensors(const tfm_file *file);
/* A tensor, in the file's order; NULL past the end. The file's own. */
TFM_API const tfm_entry *tfm_file_entry(const tfm_file *file, size_t index);
/* The entry with that name, or NULL. A matrix that is in the file in parts (NAME#0, NAME#1, ...) is found under its own
 * name, too: its type is TFM_PARTS then. */
TFM_API const tfm_entry *tfm_file_find(const tfm_file *file, const char *name);
/* The metadata with that key, or NULL. */
TFM_API const tfm_meta *tfm_file_find_meta(const tfm_file *file, const char *key);
/* Reads all data and compares every tensor's checksum. */
TFM_API tfm_status tfm_file_verify(const tfm_file *file, tfm_error *error);

#ifndef TFM_NO_STDIO
/* Long work reports here: done of total, in bytes. Non-zero stops it with TFM_ERROR_STOPPED. */
typedef int (*tfm_progress)(void *user, uint64_t done, uint64_t total);

typedef struct tfm_quantize_options {
    tfm_dtype dtype; /* what the matrices become; 0: TFM_I8 */
    int threads;     /* as in tfm_engine_options */
    tfm_progress progress;
    void *progress_user;
    tfm_allocator allocator;
} tfm_quantize_options;

/* Rewrites a .tfm file with its matrices in panels of the given dtype (relative positions' few biases stay), so that
 * loading it copies nothing. One tensor is in memory at a time. The output appears whole, under its own name, or not at
 * all. */
TFM_API tfm_status tfm_quantize(const char *in_path, const char *out_path, const tfm_quantize_options *options,
                                tfm_error *error);
#endif

/* ------------------------------------------------------------------------------------------------------------- models */

typedef enum tfm_kind { TFM_DECODER = 0, TFM_ENCODER, TFM_ENCODER_DECODER } tfm_kind;
typedef enum tfm_positions {
    TFM_NO_POSITIONS = 0,
    TFM_LEARNED_POSITIONS,
    TFM_SINUSOIDAL_POSITIONS, /* (Vaswani et al. 2017): sin and cos of position / 10000^(2 i / d_model), in turn */
    TFM_ROTARY_POSITIONS,
    TFM_RELATIVE_POSITIONS
} tfm_positions;
typedef enum tfm_head { TFM_NO_HEAD = 0, TFM_TIED_HEAD, TFM_OWN_HEAD } tfm_head;
typedef enum tfm_pooling { TFM_NO_POOLING = 0, TFM_POOL_CLS, TFM_POOL_MEAN, TFM_POOL_MAX } tfm_pooling;
typedef enum tfm_classifier { TFM_NO_CLASSIFIER = 0, TFM_SEQUENCE_CLASSIFIER, TFM_TOKEN_CLASSIFIER } tfm_classifier;
/* What a classifier's results say: one class is right (softmax), any number of them are (sigmoid), or they are values. */
typedef enum tfm_problem { TFM_SINGLE_LABEL = 0, TFM_MULTI_LABEL, TFM_REGRESSION } tfm_problem;

/* A stack of blocks that are alike. */
typedef struct tfm_stack {
    size_t n_layers, n_heads, n_kv_heads, head_dim, d_ff;
    size_t n_positions; /* no sequence is longer, unless positions are relative, which have no end */
    size_t position_offset;
    int causal, cross, gated, parallel, embedding_norm, final_norm;
    tfm_norm_kind norm;
    tfm_norm_place norm_place;
    float norm_eps;
    tfm_positions positions;
    tfm_activation activation;
} tfm_stack;

/* What a model is: the description in its file. */
typedef struct tfm_description {
    tfm_kind kind;
    size_t vocab_size; /* 0: no token embedding (PyTorch's own modules) */
    size_t d_model, d_embedding;
    size_t n_token_types;
    tfm_head head;
    float embedding_scale, logit_scale,
        logit_softcap;             /* the last: 0, or logits become softcap * tanh(logit / softcap) */
    tfm_activation head_transform; /* of the layer before the head; TFM_NO_ACTIVATION: no layer */
    int pooler;                    /* 1: the first token's result through a layer and its activation */
    tfm_activation pooler_activation, classifier_activation;
    tfm_pooling pooling;    /* what the model's embeddings of texts are made of */
    int pool_normalize;     /* 1: and divided by their length */
    size_t pool_max_tokens; /* texts that are embedded should be cut to so many tokens; 0: nothing is said */
    tfm_classifier classifier;
    tfm_problem classifier_problem;
    size_t n_labels;
    tfm_stack encoder, decoder; /* n_layers = 0 and n_positions = 0: not there */
} tfm_description;

typedef struct tfm_model tfm_model;

typedef struct tfm_load_options {
    tfm_dtype dtype; /* the matrices' type in memory, tables that are only looked up included; 0: as in the file, or
                      * TFM_I8 if it has GGUF's quantized types */
    int verify;      /* 1: compare the checksum of every tensor (reads the whole file) */
    int copy; /* 1: copy the matrices of products into memory, in 2 MiB pages where the system has them, instead of using
                  * the mapped file in place: they are read faster, but loading takes time and nothing is shared */
    int threads; /* for packing, as in tfm_engine_options */
    tfm_allocator allocator;
} tfm_load_options;

#ifndef TFM_NO_STDIO
/* Loads a model. Matrices that the file holds in panels of the wanted dtype (tables that are only looked up: in any
 * layout) are used where they lie, in the mapped file; others are packed into memory. A file may hold a tokenizer
 * alone, for tfm_tokenize and its like; then there are no sessions, and the description is empty but for vocab_size.
 * options NULL: the usual. Free with tfm_free. NULL on error. */
TFM_API tfm_model *tfm_load(const char *path, const tfm_load_options *options, tfm_error *error);
#endif
/* The same from memory (8-byte aligned), which must outlive the model. */
TFM_API tfm_model *tfm_load_memory(const void *data, size_t size, const tfm_load_options *options, tfm_error *error);
/* Gives back a model and closes its file. Its sessions must be gone before. model may be NULL. */
TFM_API void tfm_free(tfm_model *model);

/* What the model is. The model's own. */
TFM_API const tfm_description *tfm_model_description(const tfm_model *model);
/* Number of weights, a tied head counted once. */
TFM_API uint64_t tfm_model_parameters(const tfm_model *model);
/* Bytes of weights that one generated token reads: all but the embedding tables that are only looked up. */
TFM_API uint64_t tfm_model_bytes_per_token(const tfm_model *model);
/* The stack that takes the model's tokens one after another: its decoder, or its encoder if it has no decoder. */
TFM_API const tfm_stack *tfm_model_stack(const tfm_model *model);
/* A block of that stack, 0 <= index < n_layers, to be run by tfm_block_forward. */
TFM_API const tfm_block *tfm_model_block(const tfm_model *model, size_t index);
/* The norm behind that stack's last block; NULL: there is none. */
TFM_API const tfm_norm *tfm_model_final_norm(const tfm_model *model);
/* The same of the model's encoder (which has no stack of its own in a decoder: NULL). With these a model without token
 * embeddings, as nn.Transformer, runs on the caller's vectors: tfm_block_forward for each block, tfm_norm_forward; for an
 * encoder-decoder then tfm_memory_forward for each of the decoder's blocks, whose spans have that memory. */
TFM_API const tfm_block *tfm_model_encoder_block(const tfm_model *model, size_t index);
/* The norm behind the encoder's last block; NULL: there is none. */
TFM_API const tfm_norm *tfm_model_encoder_final_norm(const tfm_model *model);
/* The name of a class, 0 <= index < n_labels, not terminated; NULL and *size = 0 if it has none. */
TFM_API const char *tfm_model_label(const tfm_model *model, size_t index, size_t *size);

/* ---------------------------------------------------------------------------------------------------------- tokenizer */

/* 1 if the model has a tokenizer. The others return TFM_ERROR_UNSUPPORTED without one. */
TFM_API int tfm_has_tokenizer(const tfm_model *model);

enum {
    TFM_TOKENIZE_SPECIAL = 1, /* special tokens written in the text become their ids; otherwise they are plain text */
    TFM_TOKENIZE_PLAIN = 2    /* leave out what the tokenizer adds to every text by itself, as [CLS] and [SEP] */
};

/* Tokenizes `size` bytes of text, any bytes. Like snprintf: *n_ids is how many ids the text has, of which at most
 * `capacity` are written. Thread-safe. Allocates only for stretches of more than some 200 bytes without a place to cut,
 * which a whole text may be to SentencePiece. What is no UTF-8 stays as it is with a byte-level tokenizer; others see
 * U+FFFD in its place. */
TFM_API tfm_status tfm_tokenize(const tfm_model *model, const char *text, size_t size, unsigned flags, int32_t *ids,
                                size_t capacity, size_t *n_ids, tfm_error *error);

/* The same for a pair of texts, as "[CLS] a [SEP] b [SEP]": what stands before, between and after them is the
 * tokenizer's own, TFM_TOKENIZE_PLAIN leaves it out. types (may be NULL), also of `capacity`, gets the token types: 0, and
 * from where b begins that of the second text (BERT: 1; most others: 0). b = NULL: one text, whose types are all 0.
 * TFM_ERROR_UNSUPPORTED for a pair if the tokenizer has no rule for it. */
TFM_API tfm_status tfm_tokenize_pair(const tfm_model *model, const char *a, size_t a_size, const char *b, size_t b_size,
                                     unsigned flags, int32_t *ids, int32_t *types, size_t capacity, size_t *n_ids,
                                     tfm_error *error);

/* The text of ids, special tokens included, as the tokenizer itself writes it: WordPiece joins "##" tokens to those before
 * them and others by spaces; SentencePiece shows no control tokens, and drops the space that it put in front of a text;
 * byte-level tokenizers have all of the text's bytes in the tokens (tfm_token_text). Like snprintf: *size is how many
 * bytes the text has, of which at most `capacity` are written (text may be NULL if that is 0); not terminated. Allocates
 * nothing. */
TFM_API tfm_status tfm_decode(const tfm_model *model, const int32_t *ids, size_t n_ids, char *text, size_t capacity,
                              size_t *size, tfm_error *error);

/* The id of the token that the vocabulary has with exactly this text, its marks ("##", U+2581) included; of several, an
 * added one first; or -1. Looks at all tokens. */
TFM_API int32_t tfm_token_id(const tfm_model *model, const char *text, size_t size);

/* The token that stands for one to be guessed, [MASK] or <mask>, or -1 if the tokenizer has none. */
TFM_API int32_t tfm_mask_token(const tfm_model *model);

/* The bytes of a token, not terminated; perhaps half a UTF-8 character. NULL and *size = 0 for an id that has none.
 * One after another they are the text that the tokens stand for, as it goes on from what was before them: a token that
 * begins a word begins with the space before it. (SentencePiece's tokenizers put such a space before the first word of a
 * text, too; tfm_decode takes it away.) */
TFM_API const char *tfm_token_text(const tfm_model *model, int32_t id, size_t *size);

/* 1 if the token ends a text. */
TFM_API int tfm_is_end_token(const tfm_model *model, int32_t id);

/* 1 if the token is a mark that generated text does not show, as </s>. */
TFM_API int tfm_is_special_token(const tfm_model *model, int32_t id);

/* The token that an encoder-decoder's decoder begins with, or -1 if the model does not say. */
TFM_API int32_t tfm_start_token(const tfm_model *model);

/* ----------------------------------------------------------------------------------------------------------- sessions */

typedef struct tfm_session_options {
    size_t context;     /* tokens that a sequence, or an encoder's text, may have: at most n_positions, or any number if
                         * positions are relative; 0: n_positions */
    size_t source;      /* of an encoder-decoder: tokens that a text for the encoder may have, as `context` */
    size_t n_sequences; /* independent sequences; 0: 1 */
    size_t max_rows;    /* tokens evaluated in one pass; longer input is cut into passes. 0: 512, of an encoder 1024 */
    tfm_dtype kv_dtype; /* of the KV cache: TFM_F32, TFM_F16, TFM_BF16, TFM_I8, as in tfm_kv_create; 0: TFM_BF16 if the
                         * weights are i8, else TFM_F32 */
    tfm_engine_options engine;
} tfm_session_options;

typedef struct tfm_session tfm_session;

/* Makes a session with all its memory. The model must outlive it. Free with tfm_session_free. NULL on error. */
TFM_API tfm_session *tfm_session_create(const tfm_model *model, const tfm_session_options *options, tfm_error *error);
/* Gives back a session; what came from it (chats, results) must not be used any more. session may be NULL. */
TFM_API void tfm_session_free(tfm_session *session);
/* The model that it was made for. */
TFM_API const tfm_model *tfm_session_model(const tfm_session *session);
/* The engine inside, for layers that are run by hand between two calls of the session. The session's own. */
TFM_API tfm_engine *tfm_session_engine(tfm_session *session);
/* Tokens that each sequence may have. */
TFM_API size_t tfm_session_context(const tfm_session *session);

/* New tokens for one sequence. */
typedef struct tfm_chunk {
    size_t sequence;       /* < n_sequences; at most one chunk for each in a call */
    const int32_t *tokens; /* [n_tokens], behind those that the sequence has */
    size_t n_tokens;       /* at least 1 */
    size_t n_outputs;      /* how many of the last tokens' results are wanted: 0 to n_tokens */
} tfm_chunk;

typedef enum tfm_output {
    TFM_LOGITS = 0, /* [vocab_size] for each token */
    TFM_HIDDEN,     /* [d_model] for each token: after the final norm */
    TFM_POOLED,     /* [d_model] for each text: see tfm_encode */
    TFM_CLASSES     /* [n_labels] for each text, or for each token (tfm_description.classifier) */
} tfm_output;

/* Evaluates the chunks together: prompts as matrix-matrix work, single tokens of many sequences in one read of the
 * weights. outputs [sum of n_outputs][vocab_size or d_model], in the chunks' order (NULL when none are wanted).
 * On an error that concerns the arguments (an id out of range, no room) nothing has changed. */
TFM_API tfm_status tfm_eval(tfm_session *session, const tfm_chunk *chunks, size_t n_chunks, tfm_output what,
                            float *outputs, tfm_error *error);

/* A text for an encoder. */
typedef struct tfm_text {
    const int32_t *tokens; /* [n_tokens] */
    size_t n_tokens;       /* 1 to the session's context, or of an encoder-decoder its source */
    const int32_t *types;  /* [n_tokens], token types; NULL: all 0 */
    const int32_t *mask;   /* [n_tokens]: 0: a token that no token sees, and that is not pooled; NULL: all are seen.
                            * There is no need for padding; this is for texts with holes. */
} tfm_text;

/* Runs texts of any lengths through the encoder, packed one behind another without padding; each token attends within its
 * own text, and its result does not depend on the other texts. outputs: TFM_HIDDEN and TFM_LOGITS (of a masked-LM head)
 * have a row for each token, TFM_POOLED and TFM_CLASSES as tfm_output says.
 * TFM_POOLED: the model's own way (tfm_description.pooling, else its pooler, else the mean of the tokens). */
TFM_API tfm_status tfm_encode(tfm_session *session, const tfm_text *texts, size_t n_texts, tfm_output what,
                              float *outputs, tfm_error *error);

/* One vector [d_model] for each text: its tokens' results pooled, and, if `normalize`, divided by its length.
 * TFM_NO_POOLING: the model's own way, as TFM_POOLED. */
TFM_API tfm_status tfm_embed(tfm_session *session, const tfm_text *texts, size_t n_texts, tfm_pooling pooling,
                             int normalize, float *vectors, tfm_error *error);

/* Encodes the text that a sequence of an encoder-decoder model answers to. The sequence becomes empty.
 * TFM_ERROR_CONTEXT_FULL: the text is longer than the session's source. */
TFM_API tfm_status tfm_set_source(tfm_session *session, size_t sequence, const tfm_text *text, tfm_error *error);

/* The tokens of a sequence; *n_tokens is how many. Valid until the next call that changes the sequence. */
TFM_API const int32_t *tfm_sequence_tokens(const tfm_session *session, size_t sequence, size_t *n_tokens);

/* Forgets all but the first n_tokens of a sequence. */
TFM_API tfm_status tfm_truncate(tfm_session *session, size_t sequence, size_t n_tokens, tfm_error *error);

/* Makes room in a full sequence: keeps its first n_keep tokens and the most recent half of the rest, and evaluates those
 * again at their new places. */
TFM_API tfm_status tfm_shift(tfm_session *session, size_t sequence, size_t n_keep, tfm_error *error);

/* ------------------------------------------------------------------------------------------------ sampling, generation */

typedef struct tfm_logit_bias {
    int32_t token;
    float bias; /* added to the token's logit; -INFINITY forbids it */
} tfm_logit_bias;

/* How the next token is chosen from the logits. The steps are taken in the order of the fields, as transformers does. */
typedef struct tfm_sampling {
    const tfm_logit_bias *logit_bias;
    size_t n_logit_bias;
    float
        repeat_penalty; /* logits of tokens that the sequence has: divided by it if positive, else multiplied. 0: off */
    size_t no_repeat_ngram; /* so many tokens in a row never come twice in a sequence. 0: off */
    float temperature;      /* logits are divided by it. 0: greedy, the largest logit (the lowest id among equals) */
    size_t top_k;           /* only the k likeliest tokens (and those equal to the k-th). 0: all */
    float top_p;            /* only the likeliest tokens that together reach this probability. 0 or 1: all */
    float min_p;            /* only tokens at least this likely, relative to the likeliest. 0: all */
} tfm_sampling;

/* Random numbers: PCG32 (O'Neill 2014). The same seed gives the same numbers everywhere. */
typedef struct tfm_random {
    uint64_t state;
} tfm_random;
/* Begins the sequence of numbers that belongs to a seed. */
TFM_API void tfm_random_seed(tfm_random *random, uint64_t seed);
/* Uniform in [0, 1). */
TFM_API double tfm_random_uniform(tfm_random *random);

/* Chooses a token from logits[vocab_size]; the logits are changed. `history` (the tokens so far) is for repeat_penalty
 * and no_repeat_ngram and may be NULL. `random` is not used when greedy. Logits that are NaN are never chosen. `work` holds
 * vocab_size int32_t. TFM_ERROR_ARGUMENT if an option is out of range or no token is left. */
TFM_API tfm_status tfm_sample(const tfm_sampling *sampling, float *logits, size_t vocab_size, const int32_t *history,
                              size_t n_history, tfm_random *random, int32_t *work, int32_t *token, tfm_error *error);

typedef enum tfm_stop {
    TFM_STOP_NONE = 0,
    TFM_STOP_MAX_TOKENS,
    TFM_STOP_END_TOKEN, /* the model ended its text, or a stop token came */
    TFM_STOP_STRING,
    TFM_STOP_CALLBACK,
    TFM_STOP_CONTEXT /* no room left, and options->shift is 0; tfm_generate returns TFM_ERROR_CONTEXT_FULL, batches and
                      * chats TFM_OK */
} tfm_stop;

/* Called with each new piece of text: whole UTF-8 characters, not terminated. Non-zero stops. */
typedef int (*tfm_print)(void *user, const char *text, size_t size);

typedef struct tfm_generate_options {
    size_t max_tokens; /* 0: until the text ends or the context is full */
    uint64_t seed;
    tfm_sampling sampling; /* zeroed: greedy */
    int ignore_end;        /* 1: go on when the model ends its text */
    int special;           /* 1: special tokens written in the prompt become their ids */
    int append;            /* 1: the prompt goes behind what the sequence has. 0: it is the whole text; of what the
                            * sequence has, the common beginning is reused. */
    int shift;             /* 1: when the context is full keep the first shift_keep tokens and the most recent half */
    size_t shift_keep;
    size_t sequence;
    const int32_t *stop_tokens;
    size_t n_stop_tokens;
    const char *const *stop_strings; /* the text ends before the first of them; it is not printed */
    size_t n_stop_strings;
    int (*on_token)(void *user, int32_t token); /* called with each new token, before its text. Non-zero stops. */
    void *on_token_user;
    struct tfm_generate_stats *stats; /* filled if not NULL */
} tfm_generate_options;

typedef struct tfm_generate_stats {
    size_t n_prompt;    /* tokens of the prompt */
    size_t n_reused;    /* of those, how many were in the cache */
    size_t n_generated; /* the token that ended the text included */
    tfm_stop stop;
} tfm_generate_stats;

/* Continues a prompt: tokenizes it, evaluates it, then chooses token after token; each new piece of text goes to `print`
 * (which may be NULL). An empty prompt is an error, as is one that is longer than the context. When the context runs
 * full without options->shift the text so far has been printed and the status is TFM_ERROR_CONTEXT_FULL.
 * With an encoder-decoder the prompt is the text that is answered (translated, summarized): tfm_set_source with it, as
 * the tokenizer ends it, then tfm_generate_ids without ids. The answer begins without a space. */
TFM_API tfm_status tfm_generate(tfm_session *session, const char *prompt, const tfm_generate_options *options,
                                tfm_print print, void *print_user, tfm_error *error);

/* The same for a prompt of token ids; works without a tokenizer (nothing is printed then, see on_token). With an
 * encoder-decoder these are the decoder's first tokens, after a tfm_set_source; n_prompt = 0: tfm_start_token. */
TFM_API tfm_status tfm_generate_ids(tfm_session *session, const int32_t *prompt, size_t n_prompt,
                                    const tfm_generate_options *options, tfm_print print, void *print_user,
                                    tfm_error *error);

/* ------------------------------------------------------------------------------------- several prompts, beam search */

/* What a text begins with. For an encoder-decoder these are the decoder's tokens; none: tfm_start_token. */
typedef struct tfm_prompt {
    const int32_t *tokens; /* [n_tokens] */
    size_t n_tokens;
} tfm_prompt;

/* What it is continued with. */
typedef struct tfm_result {
    const int32_t
        *tokens; /* [n_tokens], without the prompt, with the token that ended the text; the session's own, until
                            * the next call of one of these two functions */
    size_t n_tokens;
    tfm_stop stop;
    float score; /* beam search: the sum of the tokens' log-probabilities / n_tokens ** length_penalty */
} tfm_result;

/* Continues several prompts, of any lengths, side by side, so that they share each read of the weights: prompt i in the
 * sequence options->sequence + i, which it overwrites (an encoder-decoder's prompts answer to those sequences' sources;
 * prompts may be NULL there). Each gives the tokens that tfm_generate_ids gives with the seed options->seed + i.
 * results [n_prompts]. A text that fills the context ends with TFM_STOP_CONTEXT, which is no error. Nothing is printed:
 * of the options append, shift, stop_strings, on_token and stats must be 0. Memory for the results is made in the first
 * call, and kept. */
TFM_API tfm_status tfm_generate_batch(tfm_session *session, const tfm_prompt *prompts, size_t n_prompts,
                                      const tfm_generate_options *options, tfm_result *results, tfm_error *error);

/* When a search ends before max_tokens. `beams` results are kept; the best beam that goes on could still be better than
 * the worst of those if its score, divided by n ** length_penalty, is. */
typedef enum tfm_early_stopping {
    TFM_STOP_UNLIKELY = 0, /* it is not, n being its length so far (transformers' early_stopping=False) */
    TFM_STOP_FULL,         /* the same, or there are `beams` results (True) */
    TFM_STOP_SURE          /* it is not for any length: n is max_tokens if that makes it better ("never") */
} tfm_early_stopping;

typedef struct tfm_beam_options {
    size_t beams;          /* 0: 4. 1: greedy, the likeliest token each time */
    size_t n_best;         /* results for each prompt, 1 to beams; 0: 1 */
    size_t max_tokens;     /* new tokens; 0: as many as the context has room for */
    size_t min_tokens;     /* no text ends before it has so many new tokens, the one that ends it not counted */
    float length_penalty;  /* scores are divided by length ** length_penalty: more than 0 favours long texts. 0: 1 */
    int no_length_penalty; /* 1: a length_penalty of 0 is meant: scores are sums, as with transformers' */
    tfm_early_stopping early_stopping;
    size_t no_repeat_ngram; /* as in tfm_sampling */
    size_t sequence;        /* the first that is used */
} tfm_beam_options;

/* Beam search, as transformers' generate(num_beams=beams): keeps the `beams` likeliest beginnings of a continuation, and
 * returns the n_best best that ended, best first (fewer than n_best possible ones: n_tokens = 0, the score -INFINITY).
 * Prompts, of any lengths, are searched side by side and do not depend on each other; of equal candidates the one with
 * the lower beam, then the lower token is better. Prompt i takes the sequences sequence + i * beams, ... + beams - 1, all
 * of which are empty afterwards; an encoder-decoder's source is that of the first of them, which keeps it (the others
 * lose theirs; prompts may be NULL).
 * The beams of a prompt share the cache's pages (tfm_kv) as far as their texts are the same, and the source's: where they
 * part, no more than the last page is copied. results [n_prompts][n_best]. Memory for the search is made in the first
 * call, and kept. TFM_ERROR_CONTEXT_FULL if a prompt and max_tokens do not fit into the context. */
TFM_API tfm_status tfm_beam_search(tfm_session *session, const tfm_prompt *prompts, size_t n_prompts,
                                   const tfm_beam_options *options, tfm_result *results, tfm_error *error);
/* --------------------------------------------------------------------------------------------------------------- chat
 * A conversation with memory. A tfm_chat holds the turns, renders them by the model's chat template into one context
 * within a budget of tokens, and lets the model answer. The context begins as the one before it did (but for templates
 * that put the system prompt into the last message), so that only what is new is evaluated; and since a token's results
 * do not depend on what it was evaluated with, the answers have the same bits as if everything had been evaluated
 * afresh.
 * When the context grows past its budget the oldest turns are dropped, from a user's turn to a user's turn, until it takes
 * no more than half of the budget: dropping changes the context near its beginning, so all behind that place is evaluated
 * again, and it should not happen at each turn.
 *
 *     tfm_chat *chat = tfm_chat_create(session, NULL, &error);
 *     tfm_chat_say(chat, "Who wrote Faust?", NULL, print, stdout, &error);
 *     tfm_chat_say(chat, "And when?", NULL, print, stdout, &error);
 *     tfm_chat_free(chat);
 *
 * A chat belongs to one sequence of a session, and is used by one thread at a time. */

typedef enum tfm_role { TFM_SYSTEM = 0, TFM_USER, TFM_ASSISTANT, TFM_ROLE_COUNT } tfm_role;

/* One turn of a conversation. */
typedef struct tfm_turn {
    tfm_role role;
    const char *text; /* [size], not terminated; without the white space around it. The chat's, until it changes. */
    size_t size;
} tfm_turn;

/* Puts a summary in the place of turns that are dropped. `before` is the summary of what was dropped earlier, or NULL.
 * Returns the new summary, of everything, terminated, which must stay readable until the call that asked for it returns;
 * or NULL: the turns, and the summary before, are forgotten. A summary stands behind the system prompt, after an empty
 * line. One that leaves no room for the last message is not used. */
typedef const char *(*tfm_summarise)(void *user, const char *before, const tfm_turn *turns, size_t n_turns);

typedef struct tfm_chat_options {
    /* The system prompt, always kept. "": none (what a template writes in its place, as Llama 3.1's dates, stays). NULL: the
     * file's own, if it has one and chat_template is NULL. */
    const char *system;
    /* The template's name: "chatml", "llama2", "llama3", "mistral", "gemma", "zephyr", "phi3", or "plain" ("User:
     * ...\nAssistant: ..."), without what the file has of its own. NULL: the one that the model's file names
     * (chat.template), with that, or "plain" if it names none. */
    const char *chat_template;
    size_t budget; /* tokens of the context and the answer; 0, or more than the session's context: that */
    size_t sequence;
    tfm_summarise summarise; /* NULL: what is dropped is forgotten */
    void *summarise_user;
} tfm_chat_options;

typedef struct tfm_chat tfm_chat;

/* Makes an empty conversation, with the session's allocator. The session must outlive it. Free with tfm_chat_free. NULL on
 * error: memory; no tokenizer; a template that is unknown, or whose special tokens the tokenizer does not have; metadata
 * chat.* of a wrong type; a sequence that the session does not have; a model that is no decoder. */
TFM_API tfm_chat *tfm_chat_create(tfm_session *session, const tfm_chat_options *options, tfm_error *error);
/* Gives back a conversation; the session stays as it is. chat may be NULL. */
TFM_API void tfm_chat_free(tfm_chat *chat);

/* The user says something (terminated; never parsed for special tokens), and the model answers: as tfm_generate, with
 * options->append, shift, special and sequence without meaning, and the white space before the answer left out. Answers
 * end at the template's end of a turn, or at what the options say. A quarter of the budget, or options->max_tokens if that
 * is less, is free for the answer when it begins; when the budget is used up it ends with TFM_STOP_CONTEXT (and TFM_OK).
 * An answer that a callback stopped is remembered as far as it was printed. On an error neither message nor answer
 * becomes part of the conversation (older turns may have been dropped for them); TFM_ERROR_CONTEXT_FULL if the system
 * prompt and the message alone leave no room. Allocates memory for the texts. options NULL: greedy. */
TFM_API tfm_status tfm_chat_say(tfm_chat *chat, const char *message, const tfm_generate_options *options,
                                tfm_print print, void *print_user, tfm_error *error);

/* Adds a turn without an answer, as for examples or a conversation from elsewhere. TFM_SYSTEM replaces the system prompt
 * (an empty one: there is none). */
TFM_API tfm_status tfm_chat_add(tfm_chat *chat, tfm_role role, const char *text, tfm_error *error);

/* Forgets all turns and the summary; the system prompt stays. */
TFM_API void tfm_chat_reset(tfm_chat *chat);

/* How many turns the conversation has, without the system prompt. */
TFM_API size_t tfm_chat_n_turns(const tfm_chat *chat);
/* One of them, 0 being the oldest. Past the end: an empty turn. */
TFM_API tfm_turn tfm_chat_turn(const tfm_chat *chat, size_t index);
/* The system prompt; size 0: there is none. */
TFM_API tfm_turn tfm_chat_system(const tfm_chat *chat);
/* The summary of what was dropped; size 0: there is none. */
TFM_API tfm_turn tfm_chat_summary(const tfm_chat *chat);
/* Turns that were dropped since the conversation began. */
TFM_API size_t tfm_chat_n_dropped(const tfm_chat *chat);
/* The template's name. Static. */
TFM_API const char *tfm_chat_template(const tfm_chat *chat);

/* The context as text, special tokens written out; with `answer`, up to where the model is to answer. Like snprintf: *size
 * is how many bytes there are, of which at most `capacity` are written (text may be NULL if that is 0); not terminated.
 * Nothing is dropped for it. */
TFM_API tfm_status tfm_chat_render(tfm_chat *chat, int answer, char *text, size_t capacity, size_t *size,
                                   tfm_error *error);
/* The same as token ids; an answer that the model gave has the ids that it gave. */
TFM_API tfm_status tfm_chat_ids(tfm_chat *chat, int answer, int32_t *ids, size_t capacity, size_t *n_ids,
                                tfm_error *error);

/* Saves the conversation (system prompt, summary, turns) with the tokens of its sequence and their keys and values, so that
 * it goes on without evaluating anything again: 2 n_layers n_kv_heads head_dim numbers of the KV cache's type a token.
 * Like snprintf: *size is how many bytes that takes, which are written if `capacity` is enough. */
TFM_API tfm_status tfm_chat_save_memory(const tfm_chat *chat, void *data, size_t capacity, size_t *size,
                                        tfm_error *error);

/* Takes up a saved conversation in place of the chat's own. Nothing in it is trusted; what is damaged, comes from another
 * model (or from this one with weights of another type), has keys and values of another type than this session, or more
 * tokens than it has room for, is an error, and the chat stays as it was. */
TFM_API tfm_status tfm_chat_load_memory(tfm_chat *chat, const void *data, size_t size, tfm_error *error);
#ifndef TFM_NO_STDIO
/* tfm_chat_save_memory into a file: written as PATH.part and renamed, so that it is there as a whole or not at all. */
TFM_API tfm_status tfm_chat_save(const tfm_chat *chat, const char *path, tfm_error *error);
/* tfm_chat_load_memory from a file. */
TFM_API tfm_status tfm_chat_load(tfm_chat *chat, const char *path, tfm_error *error);
#endif

#ifdef __cplusplus
}
#endif

#endif /* TFM_H */

/* =====================================================================================================================
 * IMPLEMENTATION
 * =====================================================================================================================
 * Floors a to h. Each calls only those above it on the page, that is: nothing is used before it was explained.
 */
#ifdef TFM_NO_IMPLEMENTATION
#undef TFM_IMPLEMENTATION
#endif
#if defined(TFM_IMPLEMENTATION) && !defined(TFM__IMPLEMENTED)
#define TFM__IMPLEMENTED

#include <errno.h>
#include <float.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#ifdef TFM_NO_STDIO
#include <stdio.h> /* vsnprintf, for error messages; no files */
#endif

/* -ffast-math lets the compiler reorder sums, assume that nothing is infinite or NaN, and remove roundings: here, where
 * masks are -INFINITY, what is in a file may be anything, and results are the same bits for any number of threads, it
 * must not. (What it does to the whole program remains: subnormal numbers become 0.) */
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#define TFM__FAST_MATH
#if defined(__clang__)
#pragma float_control(push)
#pragma float_control(precise, on)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("no-fast-math")
#else
#error "tfm.h: this compiler can't turn -ffast-math off for a part of a file; compile the implementation without it"
#endif
#endif

/* =====================================================================================================================
 * a. PLATFORM: compiler, memory, errors, CPU features, threads, files
 *    All that depends on the compiler or the operating system is here and in the target lines of floor c.
 * ================================================================================================================== */

#ifndef TFM_MALLOC
#define TFM_MALLOC(size) malloc(size)
#define TFM_FREE(memory) free(memory)
#endif

#ifndef TFM_HEADER
#define TFM_HEADER "tfm.h"
#endif

#if defined(__MINGW_PRINTF_FORMAT) /* what its vsnprintf understands, which is not what `printf` means there */
#define TFM__PRINTF(format_index) __attribute__((format(__MINGW_PRINTF_FORMAT, format_index, format_index + 1)))
#define TFM__INLINE inline __attribute__((always_inline))
#elif defined(__GNUC__) || defined(__clang__)
#define TFM__PRINTF(format_index) __attribute__((format(printf, format_index, format_index + 1)))
#define TFM__INLINE inline __attribute__((always_inline))
#else
#define TFM__PRINTF(format_index)
#define TFM__INLINE inline
#endif

#if defined(__clang__)
#define TFM__UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define TFM__UNROLL _Pragma("GCC unroll 32")
#else
#define TFM__UNROLL
#endif

#if !defined(TFM_NO_SIMD) && (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define TFM__X86
#include <cpuid.h>
#include <immintrin.h>
#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define TFM__HAS_AVXVNNI /* the compiler knows it */
#endif
#if (defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 10)
#define TFM__HAS_AVX512BF16
#endif
#elif !defined(TFM_NO_SIMD) && (defined(__GNUC__) || defined(__clang__)) && defined(__aarch64__) && defined(__ARM_NEON)
#define TFM__NEON
#include <arm_neon.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define TFM__BIG_ENDIAN /* files are copied when they are opened, to turn their numbers around; kernels are plain C */
#undef TFM__NEON
#endif

/* Hints: this cache line will be read, or written, soon. */
#if defined(__GNUC__) || defined(__clang__)
#define TFM__FETCH(address) __builtin_prefetch(address, 0, 3)
#define TFM__FETCH_ONCE(address) __builtin_prefetch(address, 0, 0) /* what won't be read again soon */
#define TFM__FETCH_TO_WRITE(address) __builtin_prefetch(address, 1, 2)
#else
#define TFM__FETCH(address) (void)(address)
#define TFM__FETCH_ONCE(address) (void)(address)
#define TFM__FETCH_TO_WRITE(address) (void)(address)
#endif

#define TFM__MIN(a, b) ((a) < (b) ? (a) : (b))
#define TFM__MAX(a, b) ((a) > (b) ? (a) : (b))

/* Sizes of what a file or a caller describes: SIZE_MAX where they overflow. No allocation of that size succeeds. */
static size_t tfm__product(size_t a, size_t b) {
    return b && a > SIZE_MAX / b ? SIZE_MAX : a * b;
}

static size_t tfm__sum(size_t a, size_t b) {
    return a > SIZE_MAX - b ? SIZE_MAX : a + b;
}

static size_t tfm__divide_up(size_t n, size_t by) {
    return n / by + (n % by != 0);
}

static size_t tfm__round_up(size_t n, size_t to) {
    return tfm__product(tfm__divide_up(n, to), to);
}

/* ---- errors */

static TFM__PRINTF(3) tfm_status tfm__fail(tfm_error *error, tfm_status status, const char *format, ...) {
    if (error) {
        va_list arguments;
        error->status = status;
        va_start(arguments, format);
        vsnprintf(error->message, sizeof error->message, format, arguments);
        va_end(arguments);
    }
    return status;
}

static tfm_status tfm__fail_memory(tfm_error *error, size_t size) {
    return tfm__fail(error, TFM_ERROR_MEMORY, "out of memory: %lu bytes were asked for", (unsigned long)size);
}

/* ---- memory */

static void *tfm__default_allocate(void *user, size_t size) {
    (void)user;
    return TFM_MALLOC(size);
}

static void tfm__default_release(void *user, void *memory) {
    (void)user;
    TFM_FREE(memory);
}

static tfm_allocator tfm__allocator(const tfm_allocator *given) {
    tfm_allocator allocator;
    if (given && given->allocate && given->release)
        return *given;
    allocator.allocate = tfm__default_allocate;
    allocator.release = tfm__default_release;
    allocator.user = NULL;
    return allocator;
}

static void *tfm__allocate(const tfm_allocator *allocator, size_t size) {
    return size >= SIZE_MAX / 2 ? NULL : allocator->allocate(allocator->user, size ? size : 1);
}

static void *tfm__allocate_zeroed(const tfm_allocator *allocator, size_t size) {
    void *memory = tfm__allocate(allocator, size);
    if (memory)
        memset(memory, 0, size);
    return memory;
}

static void tfm__release(const tfm_allocator *allocator, void *memory) {
    if (memory)
        allocator->release(allocator->user, memory);
}

/* Aligned memory: cache lines for the kernels; 2 MiB for weights, which are read 15-20 % faster from huge pages, and for
 * scratch and caches, whose rows lie pages apart (1-5 %). The address that the allocator gave is kept just before the
 * aligned one. */
#define TFM__CACHE_LINE ((size_t)64)
#define TFM__HUGE_PAGE ((size_t)2 << 20)

static void *tfm__allocate_aligned(const tfm_allocator *allocator, size_t size, size_t alignment) {
    char *memory, *aligned;
    if (size > SIZE_MAX / 2 - alignment - sizeof(void *))
        return NULL;
    memory = (char *)tfm__allocate(allocator, size + alignment + sizeof(void *));
    if (!memory)
        return NULL;
    aligned = memory + sizeof(void *);
    aligned += (alignment - (uintptr_t)aligned % alignment) % alignment;
    memcpy(aligned - sizeof(void *), &memory, sizeof(void *));
    return aligned;
}

static void tfm__release_aligned(const tfm_allocator *allocator, const void *aligned) {
    void *memory;
    if (!aligned)
        return;
    memcpy(&memory, (const char *)aligned - sizeof(void *), sizeof(void *));
    allocator->release(allocator->user, memory);
}

/* ---- CPU features */

static const char *const tfm__isa_names[TFM_ISA_COUNT] = {"best",   "scalar",     "avx2", "avxvnni",
                                                          "avx512", "avx512vnni", "neon", "neondot"};

TFM_API const char *tfm_isa_name(tfm_isa isa) {
    return (unsigned)isa < TFM_ISA_COUNT ? tfm__isa_names[isa] : NULL;
}

TFM_API tfm_status tfm_isa_from_name(const char *name, tfm_isa *isa, tfm_error *error) {
    int i;
    for (i = 0; i < TFM_ISA_COUNT; i++)
        if (!name || !*name || !strcmp(name, tfm__isa_names[i])) {
            *isa = (tfm_isa)i;
            return TFM_OK;
        }
    return tfm__fail(
        error, TFM_ERROR_ARGUMENT,
        "unknown instruction set '%.64s' (there are scalar, avx2, avxvnni, avx512, avx512vnni, neon, neondot)", name);
}

#ifdef TFM__X86
/* What not every compiler's __builtin_cpu_supports knows. F16C: leaf 1, ECX bit 29. */
static int tfm__has_f16c(void) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
#endif

#if defined(TFM__HAS_AVXVNNI) || defined(TFM__HAS_AVX512BF16)
enum { TFM__AVXVNNI = 4, TFM__AVX512BF16 = 5 };

/* These: bits of leaf 7, subleaf 1, EAX. */
static int tfm__has_leaf_7_1(int bit) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> bit & 1);
}
#endif

/* __builtin_cpu_supports asks the CPU and the operating system (which must save the wide registers). */
TFM_API int tfm_isa_supported(tfm_isa isa) {
    switch (isa) {
    case TFM_ISA_BEST:
    case TFM_ISA_SCALAR: return 1;
#if defined(TFM__X86)
    case TFM_ISA_AVX2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && tfm__has_f16c();
    case TFM_ISA_AVX512:
        return tfm_isa_supported(TFM_ISA_AVX2) && __builtin_cpu_supports("avx512f") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl");
    case TFM_ISA_AVX512VNNI: return tfm_isa_supported(TFM_ISA_AVX512) && __builtin_cpu_supports("avx512vnni");
#ifdef TFM__HAS_AVXVNNI
    case TFM_ISA_AVXVNNI: return tfm_isa_supported(TFM_ISA_AVX2) && tfm__has_leaf_7_1(TFM__AVXVNNI);
#endif
#elif defined(TFM__NEON)
    case TFM_ISA_NEON: return 1;
#if defined(__linux__)
    case TFM_ISA_NEONDOT: return getauxval(AT_HWCAP) >> 20 & 1; /* HWCAP_ASIMDDP */
#elif defined(__APPLE__)
    case TFM_ISA_NEONDOT: return 1; /* every 64-bit Mac */
#endif
#endif
    default: return 0;
    }
}

static tfm_isa tfm__best_isa(void) {
    int i;
    for (i = TFM_ISA_COUNT - 1; i > TFM_ISA_SCALAR; i--)
        if (tfm_isa_supported((tfm_isa)i))
            return (tfm_isa)i;
    return TFM_ISA_SCALAR;
}

/* ---- threads: the caller's parallel-for, or OpenMP, or a plain loop
 * OpenMP's own loops wait for each other with barriers that spin for milliseconds. A forward pass has dozens of short
 * loops, and if another process holds up one thread, the other spins on its core while the system could have moved the
 * first one there. So OpenMP only lends its threads, once for a whole pass, and the pass hands out the work itself:
 * tfm__team. Pieces are small, and whichever thread is running takes the next one. */

#if defined(_OPENMP) && (defined(__GNUC__) || defined(__clang__))
#define TFM__TEAM
#include <omp.h>
#if defined(__unix__) || defined(__APPLE__)
#define TFM__APART
#include <pthread.h>
#include <sys/select.h>
#include <unistd.h>
#endif

typedef struct tfm__team {
    /* Jobs, by the lowest bit of their generation: who has taken a piece keeps its job from being replaced. */
    tfm_task task[2];
    void *argument[2];
    uint32_t n[2];
    uint32_t share; /* a thread takes 1 / share of the pieces left at a time */
    char apart1[64];
    uint64_t ticket;   /* atomic: generation << 32 | pieces that nobody has taken yet */
    char apart2[64];   /* in cache lines of their own: waiting for one must not disturb the other */
    uint32_t finished; /* atomic: pieces of this generation that are done */
    uint32_t over;     /* atomic: 1: no more jobs */
    uint32_t rests;    /* atomic: 1: see tfm__rest */
} tfm__team;
#endif

typedef struct tfm__threads {
    tfm_parallel_for parallel_for;
    void *user;
    int count;
#ifdef TFM__TEAM
    tfm__team *team;                /* the threads that wait for work, or NULL */
    double rests_until;             /* seconds: see tfm__rest */
    double alone_until, alone_time; /* seconds: see tfm__held_up */
    unsigned on_time;               /* passes since a thread was held up */
#endif
    int apart;    /* 1: threads that don't outlive the work: see tfm__work_apart */
    long process; /* where OpenMP may have threads already: a child process has them no more */
} tfm__threads;

static long tfm__process(void) {
#ifdef TFM__APART
    return (long)getpid();
#else
    return 0;
#endif
}

static void tfm__serial_for(void *user, size_t n, tfm_task task, void *argument) {
    size_t i;
    (void)user;
    for (i = 0; i < n; i++)
        task(argument, i);
}

/* The number of threads that `count` = 0 means. No more than anybody has cores: where the system gives no more threads,
 * OpenMP ends the process. */
static int tfm__thread_count(int count) {
#ifdef TFM__TEAM
    return count > 0 ? TFM__MIN(count, 1024) : omp_get_max_threads();
#else
    (void)count;
    return 1;
#endif
}

#ifdef TFM__TEAM
/* Leaves the core for some 0.1 ms. */
static void tfm__nap(void) {
#if defined(__unix__) || defined(__APPLE__)
    struct timeval nap;
    nap.tv_sec = 0;
    nap.tv_usec = 20;
    (void)select(0, NULL, NULL, NULL, &nap);
#endif
}

/* Waits a moment: at first without leaving the core, for jobs follow each other within microseconds; after about 100 of
 * these asleep, so that the system may run the thread that is being waited for on this core. */
static void tfm__pause(unsigned *waited) {
    if (++*waited < 5000) {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("isb");
#endif
        return;
    }
    tfm__nap();
}

/* Another process wants a core. The system takes it from a thread every few milliseconds, for as long, and most often while
 * the thread has a piece in hand: all others wait for that. So for a while the threads that serve the leader sleep a
 * moment, with nothing in hand, after 3 ms of work: less than the 4 ms or so that a thread is given at a time, and the
 * other process gets its turn then. Not after the last piece: the pass may be over. `rested`: when this one did so last;
 * NULL: of the leader, who does not. */
#define TFM__REST_AFTER 3e-3

static void tfm__rest(const tfm__team *team, double *rested) {
    if (!rested || !__atomic_load_n(&team->rests, __ATOMIC_RELAXED) ||
        !(uint32_t)__atomic_load_n(&team->ticket, __ATOMIC_RELAXED) || omp_get_wtime() - *rested < TFM__REST_AFTER)
        return;
    tfm__nap();
    *rested = omp_get_wtime();
}

/* Takes pieces as long as there are any: a quarter of each thread's share of those left, at least one. Neighbours share
 * their memory's pages and one visit to `ticket`, which the threads fight over; the small ones at the end make all
 * threads finish together. */
static void tfm__team_work(tfm__team *team, double *rested) {
    uint64_t ticket = __atomic_load_n(&team->ticket, __ATOMIC_ACQUIRE);
    while ((uint32_t)ticket) {
        const unsigned job = (unsigned)(ticket >> 32) & 1;
        const uint32_t left = (uint32_t)ticket, take = left / team->share + 1;
        uint32_t i;
        if (!__atomic_compare_exchange_n(&team->ticket, &ticket, ticket - take, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
            continue; /* `ticket` is now what it was found to be */
        for (i = 0; i < take; i++)
            team->task[job](team->argument[job], team->n[job] - left + i);
        __atomic_fetch_add(&team->finished, take, __ATOMIC_RELEASE);
        tfm__rest(team, rested);
        ticket = __atomic_load_n(&team->ticket, __ATOMIC_ACQUIRE);
    }
}

static void tfm__team_wait(tfm__team *team) {
    double rested = omp_get_wtime();
    unsigned waited = 0;
    while (!__atomic_load_n(&team->over, __ATOMIC_ACQUIRE))
        if ((uint32_t)__atomic_load_n(&team->ticket, __ATOMIC_ACQUIRE)) {
            tfm__team_work(team, &rested);
            waited = 0;
        } else
            tfm__pause(&waited);
}

/* Another process has one of the cores, and a pass is short beside the time for which it keeps it: at its end all waited
 * for a thread that slept. For a while the leader works alone; the while doubles each time that others are late again. */
static void tfm__held_up(tfm__threads *threads) {
    threads->alone_time = threads->alone_time > 0 ? TFM__MIN(2 * threads->alone_time, 0.5) : 0.03;
    threads->alone_until = omp_get_wtime() + threads->alone_time;
    threads->on_time = 0;
}

/* A job for the team, by the thread that leads it. n < 2^32. */
static void tfm__team_for(tfm__threads *threads, size_t n, tfm_task task, void *argument) {
    tfm__team *team = threads->team;
    uint64_t generation = (__atomic_load_n(&team->ticket, __ATOMIC_RELAXED) >> 32) + 1;
    const double start = omp_get_wtime();
    double done;
    unsigned waited = 0;
    team->task[generation & 1] = task;
    team->argument[generation & 1] = argument;
    team->n[generation & 1] = (uint32_t)n;
    __atomic_store_n(&team->finished, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&team->ticket, generation << 32 | n, __ATOMIC_RELEASE);
    tfm__team_work(team, NULL);
    done = omp_get_wtime();
    while (__atomic_load_n(&team->finished, __ATOMIC_ACQUIRE) != n)
        tfm__pause(&waited);
    if (waited > 1000) { /* longer than pieces take? */
        const double now = omp_get_wtime();
        if (now - done > 3e-4 && now - done > (done - start) / 4) {
            __atomic_store_n(&team->rests, 1, __ATOMIC_RELAXED);
            threads->rests_until = now + 0.5;
        }
    }
}
#endif

#ifdef TFM__APART
/* The threads that GCC's OpenMP has made stay, in the service of the thread that asked for them. A child process (fork) has
 * that thread's notes of them but not the threads, and its first parallel region would wait for them for ever. So what
 * works once in a while (loading) and what works in a child lets a thread of its own ask OpenMP, and both end with the
 * work. It takes 0.1 ms. */
typedef struct tfm__lease {
    tfm__team *team;
    int count;
} tfm__lease;

static void *tfm__lend(void *argument) {
    const tfm__lease *lease = (const tfm__lease *)argument;
#pragma omp parallel num_threads(lease->count) default(none) shared(lease)
    tfm__team_wait(lease->team);
    return NULL;
}

static void tfm__work_apart(tfm__threads *threads, tfm__team *team, void (*body)(void *argument), void *argument) {
    tfm__lease lease;
    pthread_t thread;
    int lent;
    lease.team = team;
    lease.count = threads->count - 1;
    lent = !pthread_create(&thread, NULL, tfm__lend, &lease);
    threads->team = lent ? team : NULL;
    body(argument);
    threads->team = NULL;
    __atomic_store_n(&team->over, 1, __ATOMIC_RELEASE);
    if (lent)
        pthread_join(thread, NULL);
}

static int tfm__is_apart(const tfm__threads *threads) {
    return (threads->apart || threads->process != tfm__process()) && !omp_in_parallel();
}
#endif

/* Runs body(argument) on this thread, with the other threads at hand for the tfm__parallel calls within. */
static void tfm__with_threads(tfm__threads *threads, void (*body)(void *argument), void *argument) {
#ifdef TFM__TEAM
    if (!threads->parallel_for && threads->count > 1 && !threads->team &&
        (threads->on_time || threads->alone_until <= omp_get_wtime())) {
        const double start = omp_get_wtime();
        double over = 0, end;
        tfm__team team;
        memset(&team, 0, sizeof team);
        team.share = 4 * (uint32_t)threads->count;
        team.rests = threads->rests_until > start;
        threads->on_time++;
#ifdef TFM__APART
        if (tfm__is_apart(threads)) {
            tfm__work_apart(threads, &team, body, argument);
            return;
        }
#endif
#pragma omp parallel num_threads(threads->count) default(none) shared(team, threads, body, argument, over)
        {
            if (omp_get_thread_num())
                tfm__team_wait(&team);
            else {
                threads->team = omp_get_num_threads() > 1 ? &team : NULL;
                body(argument);
                threads->team = NULL;
                over = omp_get_wtime();
                __atomic_store_n(&team.over, 1, __ATOMIC_RELEASE);
            }
        }
        end = omp_get_wtime();
        if (end - over > 3e-4 && end - over > (over - start) / 8)
            tfm__held_up(threads);
        if (threads->on_time > 50) {
            threads->alone_time = 0;
            threads->on_time = 1;
        }
        return;
    }
#endif
    (void)threads;
    body(argument);
}

/* One loop, as a body for tfm__with_threads. */
typedef struct tfm__loop {
    tfm__threads *threads;
    size_t n;
    tfm_task task;
    void *argument;
} tfm__loop;

static void tfm__run_loop(void *argument) {
    tfm__loop *loop = (tfm__loop *)argument;
#ifdef TFM__TEAM
    if (loop->threads->team) {
        tfm__team_for(loop->threads, loop->n, loop->task, loop->argument);
        return;
    }
#endif
    tfm__serial_for(NULL, loop->n, loop->task, loop->argument);
}

/* task(argument, i) for every i < n, on all threads. */
static void tfm__parallel(tfm__threads *threads, size_t n, tfm_task task, void *argument) {
    tfm__loop loop;
    loop.threads = threads;
    loop.n = n;
    loop.task = task;
    loop.argument = argument;
    if (n == 1)
        task(argument, 0);
    else if (threads->parallel_for)
        threads->parallel_for(threads->user, n, task, argument);
    else
        tfm__with_threads(threads, tfm__run_loop, &loop);
}

/* ---- files: a whole file as memory, mapped where the system can */

#if !defined(TFM_NO_STDIO) && !defined(TFM_NO_MMAP) && (defined(__unix__) || defined(__APPLE__))
#define TFM__MMAP
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

#if !defined(TFM_NO_STDIO) && defined(_WIN32)
#ifndef TFM_NO_MMAP
#define TFM__MAP_VIEW
#endif
#ifndef NOMINMAX
#define NOMINMAX
#endif
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#include <windows.h>
#endif

/* The few calls in which systems differ. Paths are UTF-8. */
#if !defined(TFM_NO_STDIO) && defined(_WIN32)
#define TFM__MAX_PATH 1024
#define tfm__seek _fseeki64
#define tfm__tell _ftelli64

/* A path that is not UTF-8 is in the system's code page, which is what `main` gets there. */
static int tfm__wide_path(const char *path, wchar_t wide[TFM__MAX_PATH]) {
    if (MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, wide, TFM__MAX_PATH) > 0 ||
        MultiByteToWideChar(CP_ACP, 0, path, -1, wide, TFM__MAX_PATH) > 0)
        return 1;
    errno = EINVAL;
    return 0;
}

static FILE *tfm__open_file(const char *path, const char *mode) {
    wchar_t wide[TFM__MAX_PATH];
    return tfm__wide_path(path, wide) ? _wfopen(wide, *mode == 'w' ? L"wb" : L"rb") : NULL;
}

/* Replaces what has the new name, as everywhere else. */
static int tfm__rename_file(const char *from, const char *to) {
    wchar_t wide_from[TFM__MAX_PATH], wide_to[TFM__MAX_PATH];
    if (tfm__wide_path(from, wide_from) && tfm__wide_path(to, wide_to) &&
        MoveFileExW(wide_from, wide_to, MOVEFILE_REPLACE_EXISTING))
        return 0;
    errno = EACCES;
    return -1;
}

static void tfm__remove_file(const char *path) {
    wchar_t wide[TFM__MAX_PATH];
    if (tfm__wide_path(path, wide))
        (void)_wremove(wide);
}
#elif !defined(TFM_NO_STDIO)
#define tfm__seek fseek
#define tfm__tell ftell
#define tfm__open_file fopen
#define tfm__rename_file rename
#define tfm__remove_file (void)remove
#endif

#ifndef TFM_NO_STDIO
/* What is written takes the place of what has its name. That may be a file, and not a device, which root would lose. */
static tfm_status tfm__check_replaceable(const char *path, tfm_error *error) {
#ifdef TFM__MMAP
    struct stat status;
    if (!stat(path, &status) && !S_ISREG(status.st_mode))
        return tfm__fail(error, TFM_ERROR_FILE, "%.300s: not a regular file, so it can't be replaced", path);
#else
    (void)path;
    (void)error;
#endif
    return TFM_OK;
}
#endif

typedef struct tfm__bytes {
    const unsigned char *data;
    size_t size;
    int mapped; /* 1: give back to the system; 0: to the allocator */
} tfm__bytes;

#if defined(TFM__MAP_VIEW)
static tfm_status tfm__map_file(const char *path, const tfm_allocator *allocator, tfm__bytes *bytes, tfm_error *error) {
    wchar_t wide[TFM__MAX_PATH];
    LARGE_INTEGER size;
    HANDLE file, mapping;
    void *memory = NULL;
    (void)allocator;
    size.QuadPart = 0;
    file = tfm__wide_path(path, wide) ? CreateFileW(wide, GENERIC_READ, FILE_SHARE_READ | FILE_SHARE_DELETE, NULL,
                                                    OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, NULL)
                                      : INVALID_HANDLE_VALUE;
    if (file == INVALID_HANDLE_VALUE)
        return tfm__fail(error, TFM_ERROR_FILE, "%.300s: %s", path,
                         GetLastError() == ERROR_ACCESS_DENIED ? strerror(EACCES) : strerror(ENOENT));
    if (!GetFileSizeEx(file, &size) || !size.QuadPart) {
        CloseHandle(file);
        return tfm__fail(error, TFM_ERROR_FORMAT, "%.300s: the file is empty", path);
    }
    mapping = (uint64_t)size.QuadPart > SIZE_MAX / 2 ? NULL : CreateFileMappingW(file, NULL, PAGE_READONLY, 0, 0, NULL);
    if (mapping) {
        memory = MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0);
        CloseHandle(mapping); /* the view keeps the mapping, and that the file */
    }
    CloseHandle(file);
    if (!memory)
        return tfm__fail(error, TFM_ERROR_FILE, "%.300s: can't be mapped into memory", path);
    bytes->data = (const unsigned char *)memory;
    bytes->size = (size_t)size.QuadPart;
    bytes->mapped = 1;
    return TFM_OK;
}
#elif defined(TFM__MMAP)
static tfm_status tfm__map_file(const char *path, const tfm_allocator *allocator, tfm__bytes *bytes, tfm_error *error) {
    struct stat status;
    void *memory;
    int descriptor = open(path, O_RDONLY | O_NONBLOCK); /* a pipe is refused, and not waited for */
    (void)allocator;
    if (descriptor < 0)
        return tfm__fail(error, TFM_ERROR_FILE, "%.300s: %s", path, strerror(errno));
    if (fstat(descriptor, &status) || !S_ISREG(status.st_mode)) {
        close(descriptor);
        return tfm__fail(error, TFM_ERROR_FILE, "%.300s: not a regular file", path);
    }
    if (status.st_size <= 0) {
        close(descriptor);
        return tfm__fail(error, TFM_ERROR_FORMAT, "%.300s: the file is empty", path);
    }
    memory = (uintmax_t)status.st_size > SIZE_MAX / 2
                 ? MAP_FAILED
                 : mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_SHARED, descriptor, 0);
    close(descriptor);
    if (memory == MAP_FAILED)
        return tfm__fail(error, TFM_ERROR_FILE, "%.300s: can't be mapped into memory", path);
    bytes->data = (const unsigned char *)memory;
    bytes->size = (size_t)status.st_size;
    bytes->mapped = 1;
    return TFM_OK;
}
#elif !defined(TFM_NO_STDIO)
static tfm_status tfm__map_file(const char *path, const tfm_allocator *allocator, tfm__bytes *bytes, tfm_error *error) {
    FILE *file = tfm__open_file(path, "rb");
    tfm_status status = TFM_OK;
    long long size;
    void *memory;
    if (!file)
        return tfm__fail(error, TFM_ERROR_FILE, "%.300s: %s", path, strerror(errno));
    if (tfm__seek(file, 0, SEEK_END) || (size = tfm__tell(file)) < 0 || tfm__seek(file, 0, SEEK_SET)) {
        fclose(file);
        return tfm__fail(error, TFM_ERROR_FILE, "%.300s: can't be read", path);
    }
    memory =
        (unsigned long long)size > SIZE_MAX ? NULL : tfm__allocate_aligned(allocator, (size_t)size, TFM__CACHE_LINE);
    if (!memory)
        status = tfm__fail(error, TFM_ERROR_MEMORY, "%.300s: no memory for its %lld bytes", path, size);
    else if (fread(memory, 1, (size_t)size, file) != (size_t)size)
        status = tfm__fail(error, TFM_ERROR_FILE, "%.300s: can't be read", path);
    fclose(file);
    if (status != TFM_OK) {
        tfm__release_aligned(allocator, memory);
        return status;
    }
    bytes->data = (const unsigned char *)memory;
    bytes->size = (size_t)size;
    bytes->mapped = 0;
    return TFM_OK;
}
#endif

#if defined(TFM__MMAP) && defined(__linux__) && !defined(__cplusplus)
extern int madvise(void *, size_t, int); /* strict C99 hides it */
#endif

/* Asks for 2 MiB pages where the system has them for the asking. A wish: nothing depends on it. */
static void tfm__advise_huge(void *memory, size_t size) {
#if defined(TFM__MMAP) && defined(__linux__)
    const int huge_page = 14; /* MADV_HUGEPAGE */
    if (size >= TFM__HUGE_PAGE)
        (void)madvise(memory, size / TFM__HUGE_PAGE * TFM__HUGE_PAGE, huge_page);
#else
    (void)memory;
    (void)size;
#endif
}

/* Memory that is gone through again and again: in huge pages, if it is as large as one. */
static void *tfm__allocate_large(const tfm_allocator *allocator, size_t size) {
    void *memory = tfm__allocate_aligned(allocator, size, size < TFM__HUGE_PAGE ? TFM__CACHE_LINE : TFM__HUGE_PAGE);
    if (memory)
        tfm__advise_huge(memory, size);
    return memory;
}

/* The pages that lie wholly within this part of a mapped file may leave memory; they come back when they are read. */
static void tfm__advise_unneeded(const void *memory, size_t size) {
#if defined(TFM__MMAP) && defined(__linux__)
    const int dont_need = 4;             /* MADV_DONTNEED */
    const size_t page = (size_t)1 << 16; /* no system has larger ones */
    uintptr_t start = ((uintptr_t)memory + page - 1) / page * page, end = ((uintptr_t)memory + size) / page * page;
    if (start < end)
        (void)madvise((void *)start, end - start, dont_need);
#else
    (void)memory;
    (void)size;
#endif
}

#ifndef TFM_NO_STDIO
static void tfm__unmap_file(const tfm_allocator *allocator, tfm__bytes *bytes) {
#if defined(TFM__MAP_VIEW)
    if (bytes->mapped && bytes->data)
        UnmapViewOfFile(bytes->data);
#elif defined(TFM__MMAP)
    if (bytes->mapped && bytes->data)
        munmap((void *)(uintptr_t)bytes->data, bytes->size);
#endif
    if (!bytes->mapped)
        tfm__release_aligned(allocator, bytes->data);
    bytes->data = NULL;
}
#endif

/* Numbers as files have them, little-endian. */
static uint32_t tfm__u32(const unsigned char *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static uint64_t tfm__u64(const unsigned char *p) {
    return (uint64_t)tfm__u32(p) | (uint64_t)tfm__u32(p + 4) << 32;
}

/* CRC-32 as in zlib (reflected polynomial 0xEDB88320), sliced by 8: eight tables take eight bytes in one step. The
 * tables are made by the caller, on the stack, so that the library keeps no state. */
typedef struct tfm__crc_tables {
    uint32_t table[8][256];
} tfm__crc_tables;

static void tfm__crc_prepare(tfm__crc_tables *crc) {
    uint32_t i, j;
    for (i = 0; i < 256; i++) {
        uint32_t value = i;
        for (j = 0; j < 8; j++)
            value = value & 1 ? value >> 1 ^ 0xEDB88320u : value >> 1;
        crc->table[0][i] = value;
    }
    for (j = 1; j < 8; j++)
        for (i = 0; i < 256; i++)
            crc->table[j][i] = crc->table[j - 1][i] >> 8 ^ crc->table[0][crc->table[j - 1][i] & 255];
}

static uint32_t tfm__crc(const tfm__crc_tables *crc, uint32_t value, const void *data, size_t size) {
    const unsigned char *p = (const unsigned char *)data;
    value = ~value;
    for (; size >= 8; size -= 8, p += 8) {
        const uint32_t low = tfm__u32(p) ^ value, high = tfm__u32(p + 4);
        value = crc->table[7][low & 255] ^ crc->table[6][low >> 8 & 255] ^ crc->table[5][low >> 16 & 255] ^
                crc->table[4][low >> 24] ^ crc->table[3][high & 255] ^ crc->table[2][high >> 8 & 255] ^
                crc->table[1][high >> 16 & 255] ^ crc->table[0][high >> 24];
    }
    for (; size; size--, p++)
        value = value >> 8 ^ crc->table[0][(value ^ *p) & 255];
    return ~value;
}

/* =====================================================================================================================
 * b. TENSORS: types, 16-bit floats, panels
 * ================================================================================================================== */

/* Outputs side by side in a panel: one AVX-512 register of fp32, two of AVX2, four of NEON. */
#define TFM__PANEL ((size_t)16)

static const char *const tfm__dtype_names[TFM_DTYPE_COUNT] = {NULL, "f32", "f16", "bf16", "i8"};
static const size_t tfm__dtype_sizes[TFM_DTYPE_COUNT] = {0, 4, 2, 2, 1};

/* How a row lies in blocks: the numbers and the bytes of one, and what makes floats of 32 of its numbers. */
#define TFM__UNIT ((size_t)32)
typedef struct tfm__block_format {
    tfm_dtype dtype;
    const char *name;
    size_t numbers, bytes;
    void (*unit)(const unsigned char *block, size_t unit, float *floats); /* floats[32], from number 32 unit on */
} tfm__block_format;
static const tfm__block_format *tfm__blocks_of(tfm_dtype dtype); /* NULL: that type has no blocks */

TFM_API const char *tfm_dtype_name(tfm_dtype dtype) {
    const tfm__block_format *format = tfm__blocks_of(dtype);
    if (format)
        return format->name;
    return dtype == TFM_PARTS ? "parts" : (unsigned)dtype < TFM_DTYPE_COUNT ? tfm__dtype_names[dtype] : NULL;
}

TFM_API tfm_status tfm_dtype_from_name(const char *name, tfm_dtype *dtype, tfm_error *error) {
    int i;
    for (i = 1; i < TFM_DTYPE_COUNT; i++)
        if (name && (!strcmp(name, tfm__dtype_names[i]) || (i == TFM_I8 && !strcmp(name, "int8")))) {
            *dtype = (tfm_dtype)i;
            return TFM_OK;
        }
    return tfm__fail(error, TFM_ERROR_ARGUMENT, "unknown type '%.64s' (there are f32, f16, bf16, int8)",
                     name ? name : "");
}

static tfm_tensor tfm__tensor(tfm_dtype dtype, tfm_layout layout, size_t rows, size_t columns, const void *data) {
    tfm_tensor tensor;
    tensor.dtype = dtype;
    tensor.layout = layout;
    tensor.n_dims = columns ? 2 : 1;
    tensor.shape[0] = rows;
    tensor.shape[1] = columns ? columns : 1;
    tensor.shape[2] = tensor.shape[3] = 1;
    tensor.data = data;
    return tensor;
}

TFM_API tfm_tensor tfm_vector(const float *data, size_t n) {
    return tfm__tensor(TFM_F32, TFM_ROWS, n, 0, data);
}

TFM_API tfm_tensor tfm_matrix(const float *data, size_t out, size_t in) {
    return tfm__tensor(TFM_F32, TFM_ROWS, out, in, data);
}

static int tfm__is_float(tfm_dtype dtype) {
    return dtype == TFM_F32 || dtype == TFM_F16 || dtype == TFM_BF16;
}

/* Whether a matrix may have that type: i8 has no other layout than panels. */
static int tfm__is_matrix_dtype(tfm_dtype dtype, tfm_layout layout) {
    return tfm__is_float(dtype) || (dtype == TFM_I8 && layout == TFM_PANELS);
}

/* Whether a matrix can be read, to be packed. */
static int tfm__is_readable(const tfm_tensor *matrix) {
    const tfm__block_format *format = tfm__blocks_of(matrix->dtype);
    const tfm_tensor *part = (const tfm_tensor *)matrix->data;
    size_t rows;
    if (format)
        return matrix->layout == TFM_ROWS && matrix->shape[1] % format->numbers == 0;
    if (matrix->dtype != TFM_PARTS)
        return tfm__is_matrix_dtype(matrix->dtype, matrix->layout);
    for (rows = 0; rows < matrix->shape[0]; rows += (part++)->shape[0])
        if (part->dtype == TFM_PARTS || !part->shape[0] || part->shape[0] > matrix->shape[0] - rows ||
            part->n_dims != 2 || part->shape[1] != matrix->shape[1] || !tfm__is_readable(part))
            return 0;
    return matrix->layout == TFM_ROWS;
}

/* ---- int8
 * A weight is s q: q an integer from -127 to 127, s the scale of its output and its group of 64 inputs. (One scale for
 * a whole row is not enough: real models have channels that are 20 to 100 times larger than the rest.) A scale takes one
 * byte: it is the float with the bits base + code * 2^19, base for each output, so that a step of the code is 1/16 to
 * 1/32 of the scale and the codes reach 16 octaves below the output's largest. A panel is
 *     int32 base[16]              the outputs' bases
 *     uint8 code[groups][16]      padded to a multiple of 64 bytes
 *     uint8 q[groups * 16][16][4] q + 128, the four bytes of one output side by side: what the dot-product
 *                                 instructions take. Inputs past the last are q = 0. */
#define TFM__GROUP ((size_t)64)
#define TFM__CODE_STEP 19

static size_t tfm__groups(size_t in) {
    return tfm__divide_up(in, TFM__GROUP);
}

/* Where the integers begin in an i8 panel. */
static size_t tfm__integers_at(size_t groups) {
    return TFM__CACHE_LINE + tfm__round_up(groups * TFM__PANEL, TFM__CACHE_LINE);
}

/* Bytes of a panel of a matrix with that many inputs. */
static size_t tfm__panel_bytes(tfm_dtype dtype, size_t in) {
    size_t groups = tfm__groups(in);
    if (dtype == TFM_I8)
        return tfm__sum(tfm__integers_at(groups), tfm__product(groups, TFM__GROUP * TFM__PANEL));
    return tfm__product(in, TFM__PANEL * tfm__dtype_sizes[dtype]);
}

TFM_API size_t tfm_tensor_bytes(const tfm_tensor *tensor) {
    size_t elements = tfm__product(tensor->shape[0], tensor->shape[1]), size = 0, rows;
    const tfm__block_format *format = tfm__blocks_of(tensor->dtype);
    const tfm_tensor *part = (const tfm_tensor *)tensor->data;
    if (format)
        return tfm__product(tfm__product(tensor->shape[0], tensor->shape[1] / format->numbers), format->bytes);
    if (tensor->dtype == TFM_PARTS) {
        for (rows = 0; rows < tensor->shape[0]; rows += (part++)->shape[0])
            size += tfm_tensor_bytes(part);
        return size;
    }
    if (tensor->layout == TFM_PANELS)
        return tfm__product(tfm__divide_up(tensor->shape[0], TFM__PANEL),
                            tfm__panel_bytes(tensor->dtype, tensor->shape[1]));
    elements = tfm__product(elements, tfm__product(tensor->shape[2], tensor->shape[3]));
    return tfm__product(elements, tfm__dtype_sizes[tensor->dtype]);
}

/* ---- 16-bit floats */

static float tfm__float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t tfm__float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* On the bits, since a compiler that assumes that nothing is infinite or NaN (some of -ffast-math stays, with clang and,
 * in vectorized loops, with GCC) leaves out x == -INFINITY and the like. */
static int tfm__is_minus_infinity(float x) {
    return tfm__float_bits(x) == 0xFF800000u;
}

static int tfm__is_finite(float x) {
    return (tfm__float_bits(x) & 0x7F800000u) != 0x7F800000u;
}

static int tfm__is_between(float x, float low, float high) {
    return tfm__is_finite(x) && x >= low && x <= high;
}

static int tfm__has_nan(const float *x, size_t n) {
    uint32_t any = 0; /* the highest bit: one's magnitude is beyond infinity's */
    size_t i;
    for (i = 0; i < n; i++)
        any |= 0x7F800000u - (tfm__float_bits(x[i]) & 0x7FFFFFFFu);
    return (int)(any >> 31);
}

static int tfm__is_finite_double(double x) {
    const uint64_t exponent = (uint64_t)0x7FF << 52;
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits & exponent) != exponent;
}

/* A subnormal half counts steps of 2^-24. (As a float it is not subnormal: it survives where those become 0.) */
static float tfm__from_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7FFFu;
    if (magnitude >= 0x7C00) /* infinity, NaN */
        return tfm__float_from_bits(sign | 0x7F800000u | (magnitude & 0x3FF) << 13);
    if (magnitude < 0x400)
        return tfm__float_from_bits(sign | tfm__float_bits((float)magnitude * (1.0f / 16777216)));
    return tfm__float_from_bits(sign | ((magnitude << 13) + (112u << 23)));
}

/* Rounds to nearest, ties to even: adding a power of two that makes the wanted last bit the float's last lets the
 * addition round. */
static uint16_t tfm__to_f16(float value) {
    uint32_t bits = tfm__float_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u)
        return (uint16_t)(sign | 0x7E00); /* NaN */
    if (magnitude >= 0x477FF000u)
        return (uint16_t)(sign | 0x7C00); /* rounds to infinity */
    if (magnitude < 0x38800000u)          /* subnormal halves count in steps of 2^-24 */
        return (uint16_t)(sign | (tfm__float_bits(tfm__float_from_bits(magnitude) + 0.5f) - 0x3F000000u));
    magnitude += 0xFFF + (magnitude >> 13 & 1);
    return (uint16_t)(sign | ((magnitude >> 13) - (112u << 10)));
}

static float tfm__from_bf16(uint16_t half) {
    return tfm__float_from_bits((uint32_t)half << 16);
}

static uint16_t tfm__to_bf16(float value) {
    uint32_t bits = tfm__float_bits(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u)
        return (uint16_t)(bits >> 16 | 0x40); /* NaN stays one */
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/* n numbers, `stride` elements apart in the source, to fp32. */
static void tfm__to_floats(tfm_dtype dtype, const void *source, size_t stride, size_t n, float *floats) {
    const uint16_t *halves = (const uint16_t *)source;
    size_t i;
    if (dtype == TFM_F32)
        for (i = 0; i < n; i++)
            floats[i] = ((const float *)source)[i * stride];
    else if (dtype == TFM_F16)
        for (i = 0; i < n; i++)
            floats[i] = tfm__from_f16(halves[i * stride]);
    else
        for (i = 0; i < n; i++)
            floats[i] = tfm__from_bf16(halves[i * stride]);
}

/* What is beyond the largest f16, 65504, as that. */
static float tfm__within_f16(float value) {
    return value > 65504.0f ? 65504.0f : value < -65504.0f ? -65504.0f : value; /* NaN stays NaN */
}

static void tfm__from_floats(tfm_dtype dtype, const float *floats, size_t n, void *target) {
    uint16_t *halves = (uint16_t *)target;
    size_t i;
    if (dtype == TFM_F32)
        memcpy(target, floats, n * sizeof *floats);
    else if (dtype == TFM_F16)
        for (i = 0; i < n; i++)
            halves[i] = tfm__to_f16(tfm__is_finite(floats[i]) ? tfm__within_f16(floats[i]) : floats[i]);
    else
        for (i = 0; i < n; i++)
            halves[i] = tfm__to_bf16(floats[i]);
}

/* ---- blocks
 * GGUF's files hold matrices in rows of blocks: 32 or 256 integers of 4 to 8 bits with a scale that they share. The larger
 * blocks have a scale for each 32 or 16 of their integers, too, in units of the block's. They are only read here:
 * what a model computes with is packed from them. d and m are halves; q[i] is the integer of number i.
 *   q4_0  d, 16 bytes with q[i] in the low and q[i + 16] in the high half of byte i           d (q - 8)
 *   q4_1  d, m, and the same                                                                d q + m
 *   q5_0  d, 32 fifth bits, 16 bytes as before                                              d (q - 16)
 *   q5_1  d, m, and the same                                                                d q + m
 *   q8_0  d, 32 signed bytes                                                                d q
 *   q4_k  d, m, 12 bytes with a scale s and a minimum t of 6 bits for each 32 numbers, and, for each 64 numbers, 32
 *         bytes with the first 32 in their low and the others in their high halves                  d s q - m t
 *   q5_k  the same with 32 bytes of fifth bits before the fourths: bit u of byte i is that of number 32 u + i
 *   q6_k  for each 128 numbers 64 bytes with four bits: numbers 0 to 63 in their low and 64 to 127 in their high halves;
 *         for each 128 numbers 32 bytes with two more: bits 2 u of byte i are those of number 32 u + i; 16 signed bytes
 *         s, one for each 16 numbers; d                                                       d s (q - 32) */

static float tfm__half_at(const unsigned char *p) {
    return tfm__from_f16((uint16_t)(p[0] | p[1] << 8));
}

static void tfm__q4_0_unit(const unsigned char *block, size_t unit, float *floats) {
    const float d = tfm__half_at(block);
    size_t i;
    (void)unit;
    for (i = 0; i < 16; i++) {
        floats[i] = d * (float)((block[2 + i] & 15) - 8);
        floats[i + 16] = d * (float)((block[2 + i] >> 4) - 8);
    }
}

static void tfm__q4_1_unit(const unsigned char *block, size_t unit, float *floats) {
    const float d = tfm__half_at(block), m = tfm__half_at(block + 2);
    size_t i;
    (void)unit;
    for (i = 0; i < 16; i++) {
        floats[i] = d * (float)(block[4 + i] & 15) + m;
        floats[i + 16] = d * (float)(block[4 + i] >> 4) + m;
    }
}

/* The integers of a q5_0 or q5_1 block, from its fifth bits on. */
static void tfm__q5_integers(const unsigned char *bits, int *q) {
    int i;
    for (i = 0; i < 16; i++) {
        q[i] = (bits[4 + i] & 15) | (bits[i / 8] >> i % 8 & 1) << 4;
        q[i + 16] = bits[4 + i] >> 4 | (bits[2 + i / 8] >> i % 8 & 1) << 4;
    }
}

static void tfm__q5_0_unit(const unsigned char *block, size_t unit, float *floats) {
    const float d = tfm__half_at(block);
    int q[TFM__UNIT];
    size_t i;
    (void)unit;
    tfm__q5_integers(block + 2, q);
    for (i = 0; i < TFM__UNIT; i++)
        floats[i] = d * (float)(q[i] - 16);
}

static void tfm__q5_1_unit(const unsigned char *block, size_t unit, float *floats) {
    const float d = tfm__half_at(block), m = tfm__half_at(block + 2);
    int q[TFM__UNIT];
    size_t i;
    (void)unit;
    tfm__q5_integers(block + 4, q);
    for (i = 0; i < TFM__UNIT; i++)
        floats[i] = d * (float)q[i] + m;
}

static void tfm__q8_0_unit(const unsigned char *block, size_t unit, float *floats) {
    const float d = tfm__half_at(block);
    size_t i;
    (void)unit;
    for (i = 0; i < TFM__UNIT; i++)
        floats[i] = d * (float)(signed char)block[2 + i];
}

/* The scale and the minimum of a unit of q4_k and q5_k. Of the 12 bytes, 0 to 3 hold the scales and 4 to 7 the minima of
 * units 0 to 3 in their low 6 bits; of units 4 to 7, 8 to 11 hold the low 4 bits of both, and the high 2 bits of the first
 * eight bytes the rest. */
static void tfm__k_scales(const unsigned char *block, size_t unit, float *scale, float *minimum) {
    const unsigned char *packed = block + 4;
    int s, t;
    if (unit < 4) {
        s = packed[unit] & 63;
        t = packed[unit + 4] & 63;
    } else {
        s = (packed[unit + 4] & 15) | packed[unit - 4] >> 6 << 4;
        t = packed[unit + 4] >> 4 | packed[unit] >> 6 << 4;
    }
    *scale = tfm__half_at(block) * (float)s;
    *minimum = tfm__half_at(block + 2) * (float)t;
}

static void tfm__q4_k_unit(const unsigned char *block, size_t unit, float *floats) {
    const unsigned char *q = block + 16 + unit / 2 * TFM__UNIT;
    float scale, minimum;
    size_t i;
    tfm__k_scales(block, unit, &scale, &minimum);
    for (i = 0; i < TFM__UNIT; i++)
        floats[i] = scale * (float)(q[i] >> unit % 2 * 4 & 15) - minimum;
}

static void tfm__q5_k_unit(const unsigned char *block, size_t unit, float *floats) {
    const unsigned char *fifths = block + 16, *q = fifths + TFM__UNIT + unit / 2 * TFM__UNIT;
    float scale, minimum;
    size_t i;
    tfm__k_scales(block, unit, &scale, &minimum);
    for (i = 0; i < TFM__UNIT; i++)
        floats[i] = scale * (float)((q[i] >> unit % 2 * 4 & 15) | (fifths[i] >> unit & 1) << 4) - minimum;
}

static void tfm__q6_k_unit(const unsigned char *block, size_t unit, float *floats) {
    const size_t half = unit / 4, quarter = unit % 4; /* of the block, of that half */
    const unsigned char *low = block + half * 64 + quarter % 2 * TFM__UNIT, *high = block + 128 + half * TFM__UNIT;
    const unsigned char *scales = block + 192 + 2 * unit;
    const float d = tfm__half_at(block + 208);
    size_t i;
    for (i = 0; i < TFM__UNIT; i++) {
        int q = (low[i] >> quarter / 2 * 4 & 15) | (high[i] >> 2 * quarter & 3) << 4;
        floats[i] = d * (float)(signed char)scales[i / 16] * (float)(q - 32);
    }
}

static const tfm__block_format *tfm__blocks_of(tfm_dtype dtype) {
    static const tfm__block_format formats[] = {
        {TFM_Q4_0, "q4_0", 32, 18, tfm__q4_0_unit},   {TFM_Q4_1, "q4_1", 32, 20, tfm__q4_1_unit},
        {TFM_Q5_0, "q5_0", 32, 22, tfm__q5_0_unit},   {TFM_Q5_1, "q5_1", 32, 24, tfm__q5_1_unit},
        {TFM_Q8_0, "q8_0", 32, 34, tfm__q8_0_unit},   {TFM_Q4_K, "q4_k", 256, 144, tfm__q4_k_unit},
        {TFM_Q5_K, "q5_k", 256, 176, tfm__q5_k_unit}, {TFM_Q6_K, "q6_k", 256, 210, tfm__q6_k_unit}};
    size_t i;
    for (i = 0; (unsigned)dtype > TFM_PARTS && i < sizeof formats / sizeof formats[0]; i++)
        if (formats[i].dtype == dtype)
            return &formats[i];
    return NULL;
}

/* n numbers of a row in blocks, from number `first` on. */
static void tfm__from_blocks(const tfm__block_format *format, const unsigned char *row, size_t first, size_t n,
                             float *floats) {
    float unit[TFM__UNIT];
    size_t i, skip, size;
    for (i = 0; i < n; i += size) {
        const unsigned char *block = row + (first + i) / format->numbers * format->bytes;
        skip = (first + i) % TFM__UNIT;
        size = TFM__MIN(TFM__UNIT - skip, n - i);
        format->unit(block, (first + i) % format->numbers / TFM__UNIT, unit);
        memcpy(floats + i, unit + skip, size * sizeof *unit);
    }
}

/* ---- panels */

static const void *tfm__at(const void *data, tfm_dtype dtype, size_t element) {
    return (const char *)data + element * tfm__dtype_sizes[dtype];
}

/* n weights of one output of an i8 panel, from input `first` on. */
static void tfm__from_i8(const unsigned char *panel, size_t groups, size_t lane, size_t first, size_t n,
                         float *floats) {
    const unsigned char *codes = panel + TFM__CACHE_LINE, *integers = panel + tfm__integers_at(groups);
    int32_t base;
    size_t i, k, part, some;
    memcpy(&base, panel + lane * sizeof base, sizeof base);
    for (i = 0; i < n; i += some) { /* the four, or fewer, that lie side by side */
        const size_t at = first + i;
        const uint32_t code = codes[at / TFM__GROUP * TFM__PANEL + lane];
        const float scale = tfm__float_from_bits((uint32_t)base + (code << TFM__CODE_STEP));
        const unsigned char *four = integers + (at / 4 * TFM__PANEL + lane) * 4;
        part = at % 4;
        some = TFM__MIN(4 - part, n - i);
        if (some == 4) {
            TFM__UNROLL
            for (k = 0; k < 4; k++)
                floats[i + k] = scale * (float)(four[k] - 128);
        } else
            for (k = 0; k < some; k++)
                floats[i + k] = scale * (float)(four[part + k] - 128);
    }
}

/* n numbers from a row of a matrix of any layout, the first from column `column`, as fp32. */
static void tfm__matrix_row(const tfm_tensor *matrix, size_t index, size_t column, size_t n, float *row) {
    const tfm__block_format *format = tfm__blocks_of(matrix->dtype);
    size_t out = matrix->shape[0], in = matrix->shape[1], first, stride;
    const char *data = (const char *)matrix->data;
    if (matrix->dtype == TFM_PARTS) {
        const tfm_tensor *part = (const tfm_tensor *)matrix->data;
        for (; index >= part->shape[0]; part++)
            index -= part->shape[0];
        tfm__matrix_row(part, index, column, n, row);
        return;
    }
    if (format) {
        tfm__from_blocks(format, (const unsigned char *)data + index * (in / format->numbers) * format->bytes, column,
                         n, row);
        return;
    }
    if (matrix->layout == TFM_ROWS)
        first = index * in, stride = 1;
    else if (matrix->layout == TFM_COLS)
        first = index, stride = out;
    else {
        data += index / TFM__PANEL * tfm__panel_bytes(matrix->dtype, in);
        first = index % TFM__PANEL, stride = TFM__PANEL;
    }
    if (matrix->dtype == TFM_I8)
        tfm__from_i8((const unsigned char *)data, tfm__groups(in), first, column, n, row);
    else
        tfm__to_floats(matrix->dtype, tfm__at(data, matrix->dtype, first + column * stride), stride, n, row);
}

/* Powers of two that a tensor is multiplied by when it is packed: see tfm__folding. */
typedef struct tfm__factors {
    const float *rows;    /* [out] of a matrix, [n] of a vector; NULL: none */
    const float *columns; /* [in]; NULL: none */
    float offset;         /* what a vector stands for is its numbers + this */
} tfm__factors;

typedef struct tfm__pack_job {
    const tfm_tensor *from; /* [out, in] */
    tfm__factors factors;   /* only for i8 */
    tfm_dtype dtype;
    char *panels; /* [ceil(out / 16)] panels */
} tfm__pack_job;

/* The inputs [first, first + n) of the 16 outputs of a panel: part[n][16]. n <= TFM__PACK_STEP. */
#define TFM__PACK_STEP ((size_t)128)
static void tfm__read_part(const tfm_tensor *from, size_t panel, size_t first, size_t n, float *part) {
    size_t out = from->shape[0], base = panel * TFM__PANEL, lanes = TFM__MIN(TFM__PANEL, out - base), k, lane;
    float row[TFM__PACK_STEP];
    if (lanes < TFM__PANEL)
        memset(part, 0, n * TFM__PANEL * sizeof *part);
    if (from->layout == TFM_COLS) /* contiguous across outputs */
        for (k = 0; k < n; k++)
            tfm__to_floats(from->dtype, tfm__at(from->data, from->dtype, (first + k) * out + base), 1, lanes,
                           part + k * TFM__PANEL);
    else
        for (lane = 0; lane < lanes; lane++) {
            tfm__matrix_row(from, base + lane, first, n, row);
            for (k = 0; k < n; k++)
                part[k * TFM__PANEL + lane] = row[k];
        }
}

static void tfm__pack_panel(void *argument, size_t panel) {
    const tfm__pack_job *job = (const tfm__pack_job *)argument;
    size_t in = job->from->shape[1], first, n;
    char *target = job->panels + panel * tfm__panel_bytes(job->dtype, in);
    float part[TFM__PACK_STEP * TFM__PANEL];
    for (first = 0; first < in; first += n) {
        n = TFM__MIN(TFM__PACK_STEP, in - first);
        tfm__read_part(job->from, panel, first, n, part);
        tfm__from_floats(job->dtype, part, n * TFM__PANEL, target);
        target += n * TFM__PANEL * tfm__dtype_sizes[job->dtype];
    }
}

/* The same as tfm__read_part, times the factors. */
static void tfm__read_factored(const tfm__pack_job *job, size_t panel, size_t first, size_t n, float *part) {
    size_t base = panel * TFM__PANEL, lanes = TFM__MIN(TFM__PANEL, job->from->shape[0] - base), k, lane;
    tfm__read_part(job->from, panel, first, n, part);
    if (job->factors.columns)
        for (k = 0; k < n; k++)
            for (lane = 0; lane < lanes; lane++)
                part[k * TFM__PANEL + lane] *= job->factors.columns[first + k];
    if (job->factors.rows)
        for (k = 0; k < n; k++)
            for (lane = 0; lane < lanes; lane++)
                part[k * TFM__PANEL + lane] *= job->factors.rows[base + lane];
}

/* The bits of the smallest scale with which `largest` is at most 127. */
static uint32_t tfm__scale_bits(float largest) {
    return tfm__float_bits(largest / 127);
}

/* What stands as the base of an output that can't be quantized because a weight is not finite. */
#define TFM__NOT_FINITE INT32_MIN

/* The bases: the largest scale of an output gets the code 255. */
static void tfm__quantize_bases(const tfm__pack_job *job, size_t panel, int32_t *bases) {
    const uint32_t step = (uint32_t)1 << TFM__CODE_STEP, reach = 255 * step;
    float part[TFM__GROUP * TFM__PANEL], largest[16] = {0};
    size_t in = job->from->shape[1], first, n, i;
    uint32_t bits, not_finite = 0;
    for (first = 0; first < in; first += n) {
        n = TFM__MIN(TFM__GROUP, in - first);
        tfm__read_factored(job, panel, first, n, part);
        for (i = 0; i < n * TFM__PANEL; i++) {
            float size = fabsf(part[i]);
            largest[i % TFM__PANEL] = size > largest[i % TFM__PANEL] ? size : largest[i % TFM__PANEL];
            not_finite |= (uint32_t)!tfm__is_finite(part[i]) << i % TFM__PANEL;
        }
    }
    for (i = 0; i < TFM__PANEL; i++) {
        bits = (tfm__scale_bits(largest[i]) + step - 1) / step * step;
        bases[i] = not_finite >> i & 1 ? TFM__NOT_FINITE : bits < reach ? 0 : (int32_t)(bits - reach);
    }
}

/* One group of a panel: part[64][16] -> code[16], q[16][16][4]. */
static void tfm__quantize_group(const float *part, const int32_t *bases, unsigned char *codes,
                                unsigned char *integers) {
    size_t lane, k;
    for (lane = 0; lane < TFM__PANEL; lane++) {
        float largest = 0, scale;
        uint32_t bits, code;
        for (k = 0; k < TFM__GROUP; k++)
            largest = fabsf(part[k * TFM__PANEL + lane]) > largest ? fabsf(part[k * TFM__PANEL + lane]) : largest;
        bits = tfm__scale_bits(largest);
        code = bits <= (uint32_t)bases[lane]
                   ? 0
                   : (bits - (uint32_t)bases[lane] + ((1u << TFM__CODE_STEP) - 1)) >> TFM__CODE_STEP;
        codes[lane] = (unsigned char)TFM__MIN(code, 255);
        scale = tfm__float_from_bits((uint32_t)bases[lane] + ((uint32_t)codes[lane] << TFM__CODE_STEP));
        for (k = 0; k < TFM__GROUP; k++) {
            float q = scale > 0 ? rintf(part[k * TFM__PANEL + lane] / scale) : 0;
            integers[(k / 4 * TFM__PANEL + lane) * 4 + k % 4] =
                (unsigned char)(128 + (int)TFM__MAX(-127, TFM__MIN(127, q)));
        }
    }
}

static void tfm__quantize_panel(void *argument, size_t panel) {
    const tfm__pack_job *job = (const tfm__pack_job *)argument;
    size_t in = job->from->shape[1], groups = tfm__groups(in), g, n;
    unsigned char *target = (unsigned char *)job->panels + panel * tfm__panel_bytes(TFM_I8, in);
    unsigned char *codes = target + TFM__CACHE_LINE, *integers = target + tfm__integers_at(groups);
    float part[TFM__GROUP * TFM__PANEL];
    int32_t bases[16];
    tfm__quantize_bases(job, panel, bases);
    memset(target, 0, tfm__integers_at(groups));
    memcpy(target, bases, sizeof bases);
    for (g = 0; g < TFM__PANEL; g++)
        if (bases[g] == TFM__NOT_FINITE)
            return;
    for (g = 0; g < groups; g++) {
        n = TFM__MIN(TFM__GROUP, in - g * TFM__GROUP);
        memset(part, 0, sizeof part);
        tfm__read_factored(job, panel, g * TFM__GROUP, n, part);
        tfm__quantize_group(part, bases, codes + g * TFM__PANEL, integers + g * TFM__GROUP * TFM__PANEL);
    }
}

/* 1 if some weight could not be quantized. */
static int tfm__is_not_finite(const tfm_tensor *packed) {
    size_t bytes = tfm__panel_bytes(packed->dtype, packed->shape[1]), i;
    for (i = 0; packed->dtype == TFM_I8 && i < packed->shape[0]; i++) {
        int32_t base;
        memcpy(&base, (const char *)packed->data + i / TFM__PANEL * bytes + i % TFM__PANEL * sizeof base, sizeof base);
        if (base == TFM__NOT_FINITE)
            return 1;
    }
    return 0;
}

static void tfm__copy_panel(void *argument, size_t panel) {
    const tfm__pack_job *job = (const tfm__pack_job *)argument;
    size_t bytes = tfm__panel_bytes(job->dtype, job->from->shape[1]);
    memcpy(job->panels + panel * bytes, (const char *)job->from->data + panel * bytes, bytes);
}

/* Packs a matrix into memory of tfm_tensor_bytes(the panels). See tfm__is_not_finite. */
static tfm_tensor tfm__pack_into(tfm__threads *threads, const tfm_tensor *matrix, tfm__factors factors, tfm_dtype dtype,
                                 void *memory) {
    int same = matrix->layout == TFM_PANELS && matrix->dtype == dtype;
    tfm__pack_job job;
    job.from = matrix;
    job.factors = factors;
    job.dtype = dtype;
    job.panels = (char *)memory;
    tfm__parallel(threads, tfm__divide_up(matrix->shape[0], TFM__PANEL),
                  same              ? tfm__copy_panel
                  : dtype == TFM_I8 ? tfm__quantize_panel
                                    : tfm__pack_panel,
                  &job);
    return tfm__tensor(dtype, TFM_PANELS, matrix->shape[0], matrix->shape[1], memory);
}

static tfm__factors tfm__no_factors(void) {
    tfm__factors factors = {NULL, NULL, 0};
    return factors;
}

TFM_API void tfm_unpack(tfm_tensor *packed, const tfm_allocator *allocator) {
    tfm_allocator memory = tfm__allocator(allocator);
    tfm__release_aligned(&memory, packed->data);
    memset(packed, 0, sizeof *packed);
}

TFM_API tfm_status tfm_pack(const tfm_tensor *matrix, tfm_dtype dtype, const tfm_allocator *allocator,
                            tfm_tensor *packed, tfm_error *error) {
    tfm_allocator memory = tfm__allocator(allocator);
    tfm__threads alone;
    size_t size;
    void *panels;
    memset(&alone, 0, sizeof alone);
    alone.count = 1;
    if (matrix->n_dims != 2 || !matrix->shape[0] || !matrix->shape[1] || !matrix->data)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "tfm_pack: expected a matrix");
    if (!tfm__is_readable(matrix) || !tfm__is_matrix_dtype(dtype, TFM_PANELS))
        return tfm__fail(error, TFM_ERROR_UNSUPPORTED,
                         "tfm_pack: expected f32, f16, bf16, i8 in panels or whole blocks in rows");
    *packed = tfm__tensor(dtype, TFM_PANELS, matrix->shape[0], matrix->shape[1], NULL);
    size = tfm_tensor_bytes(packed);
    panels = tfm__allocate_aligned(&memory, size, TFM__CACHE_LINE);
    if (!panels)
        return tfm__fail_memory(error, size);
    *packed = tfm__pack_into(&alone, matrix, tfm__no_factors(), dtype, panels);
    if (tfm__is_not_finite(packed)) {
        tfm_unpack(packed, allocator);
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "tfm_pack: a weight is not finite, and so can't be quantized");
    }
    return TFM_OK;
}

/* =====================================================================================================================
 * c. KERNELS: all arithmetic that takes time
 *    One table of functions (tfm__kernels) with an implementation for each instruction set. The plain C one comes first:
 *    it says what is computed. The vector ones come after it, written once over a 16-lane vector and compiled for each
 *    instruction set; tests/test_kernels.c compares them.
 *
 *    Why panels: [16 outputs][in] stored as [in][16]. One step over an input multiplies it, broadcast, with 16 weights
 *    that lie side by side, so that a vector of outputs is summed with no horizontal sum at the end, by matrix-vector
 *    and matrix-matrix products alike. Each output is ONE sum, over the inputs in order, whatever the tile is: that is
 *    what makes results independent of batching, of chunking and of threads.
 * ================================================================================================================== */

/* Activations as int8 weights take them: for each row and group of 64 a scale t, with x about t q. */
typedef struct tfm__quantized {
    int8_t *q;        /* [n_rows][groups][64]: -127 to 127, 0 past the last input */
    float *scales;    /* [n_rows][groups] */
    int32_t *offsets; /* [n_rows][groups]: -128 * the sum of the q: takes away the 128 that weights are stored with */
} tfm__quantized;

/* y[n_rows][n] (+)= x[n_rows][k] W^T.  W: panels of 16 outputs, panel_bytes from one to the next. */
typedef struct tfm__matmul {
    const float *x; /* not for i8 */
    size_t x_stride, n_rows;
    tfm__quantized quantized; /* only for i8 */
    const void *w;
    size_t panel_bytes, n, k;
    float *y;
    size_t y_stride;
    int add;           /* 1: y += */
    const float *bias; /* [n], only for i8: y (+)= x W^T + bias. Or NULL */
} tfm__matmul;

/* What happens to the product while it is in the cache: y[n_rows][n] (+)= activation(x[n_rows][n] + bias[n]). x may be
 * y. */
typedef struct tfm__finish {
    const float *x;
    size_t x_stride, n_rows, n;
    const float *bias; /* or NULL */
    tfm_activation activation;
    float *y;
    size_t y_stride;
    int add; /* 1: y += */
} tfm__finish;

/* Softmax that runs along the keys block by block (Milakov, Gimelshein 2018): the largest score so far and the sum of
 * exp(score - largest). */
typedef struct tfm__softmax {
    float max, sum;
} tfm__softmax;

typedef struct tfm__kernels {
    tfm_isa isa;
    void (*matmul[TFM_DTYPE_COUNT])(const tfm__matmul *job);
    /* x[n] of one row -> its q, scales and offsets */
    void (*quantize)(const float *x, size_t n, const tfm__quantized *row);
    /* The same product with an int8 cache's keys (0) or values (1) of one head in one page: see "int8 keys and values". */
    void (*matmul_kv[2])(const tfm__matmul *job);
    /* The same with bf16 keys or values, for which x is rounded to bf16: see "bf16 keys and values". */
    void (*matmul_pairs)(const tfm__matmul *job);
    /* first[n], second[n] -> bf16 pairs[n][2] */
    void (*pair)(const float *first, const float *second, size_t n, uint16_t *pairs);
    /* x[n], n <= TFM__KV_GROUP -> q[n rounded up to 16], 0 past the last, and the bits of its scale */
    void (*quantize_kv)(const float *x, size_t n, int8_t *q, uint16_t *scale);
    void (*finish)(const tfm__finish *job);
    /* y[n] = norm(x[n]) */
    void (*norm[2])(const float *x, size_t n, const float *weight, const float *bias, float eps, float *y);
    /* Turns the n scores of a block into exp(score * scale + mask - new max), adds them to the running softmax, and
     * returns the factor exp(old max - new max) for what was summed before. mask [n] or NULL. */
    float (*softmax_block)(tfm__softmax *softmax, float *scores, size_t n, float scale, const float *mask);
    /* Turns the pairs of x by their angles: see tfm_rotary. angles: n_pairs cosines, n_pairs sines. */
    void (*turn)(float *x, size_t n_pairs, int interleaved, const float *angles);
    /* x[n] as 16-bit floats, those beyond +-65504 as that */
    void (*to_f16)(const float *x, size_t n, uint16_t *halves);
    /* x[n] *= by */
    void (*scale)(float *x, size_t n, float by);
    /* gate[n] = gate[n] * up[n] */
    void (*multiply)(float *gate, const float *up, size_t n);
} tfm__kernels;

/* ---- the plain C kernels: the definition */

static void tfm__scalar_matmul(tfm_dtype dtype, const tfm__matmul *job) {
    size_t base, r, k, lane;
    for (base = 0; base < job->n; base += TFM__PANEL) {
        const char *panel = (const char *)job->w + base / TFM__PANEL * job->panel_bytes;
        size_t lanes = TFM__MIN(TFM__PANEL, job->n - base);
        for (r = 0; r < job->n_rows; r++) {
            const float *x = job->x + r * job->x_stride;
            float *y = job->y + r * job->y_stride + base;
            float sum[16] = {0}, weights[16];
            if (job->add)
                memcpy(sum, y, lanes * sizeof *y);
            for (k = 0; k < job->k; k++) {
                tfm__to_floats(dtype, tfm__at(panel, dtype, k * TFM__PANEL), 1, TFM__PANEL, weights);
                for (lane = 0; lane < TFM__PANEL; lane++)
                    sum[lane] += x[k] * weights[lane];
            }
            memcpy(y, sum, lanes * sizeof *y);
        }
    }
}

static void tfm__scalar_matmul_f32(const tfm__matmul *job) {
    tfm__scalar_matmul(TFM_F32, job);
}

static void tfm__scalar_matmul_f16(const tfm__matmul *job) {
    tfm__scalar_matmul(TFM_F16, job);
}

static void tfm__scalar_matmul_bf16(const tfm__matmul *job) {
    tfm__scalar_matmul(TFM_BF16, job);
}

static void tfm__scalar_matmul_i8(const tfm__matmul *job) {
    size_t groups = tfm__groups(job->k), row, column, g, k;
    for (row = 0; row < job->n_rows; row++)
        for (column = 0; column < job->n; column++) {
            const unsigned char *panel = (const unsigned char *)job->w + column / TFM__PANEL * job->panel_bytes;
            const unsigned char *codes = panel + TFM__CACHE_LINE, *w = panel + tfm__integers_at(groups);
            const int8_t *q = job->quantized.q + row * groups * TFM__GROUP;
            size_t lane = column % TFM__PANEL;
            float y = 0, scale;
            int32_t base;
            memcpy(&base, panel + lane * sizeof base, sizeof base);
            for (g = 0; g < groups; g++) {
                int32_t sum = 0;
                for (k = g * TFM__GROUP; k < (g + 1) * TFM__GROUP; k++)
                    sum += (w[(k / 4 * TFM__PANEL + lane) * 4 + k % 4] - 128) * q[k];
                scale =
                    tfm__float_from_bits((uint32_t)base + ((uint32_t)codes[g * TFM__PANEL + lane] << TFM__CODE_STEP));
                y += (float)sum * (scale * job->quantized.scales[row * groups + g]);
            }
            if (job->bias)
                y += job->bias[column];
            if (job->add)
                y += job->y[row * job->y_stride + column];
            job->y[row * job->y_stride + column] = y;
        }
}

/* The bits of what becomes 127: the largest |x| of a group; if `bounded`, also the largest |x0 + x1| of its pairs. Found on
 * the bits, in whose order NaN comes last: so a NaN makes the scale, and every result, NaN. */
static uint32_t tfm__largest_bits(const float *x, size_t n, int bounded) {
    uint32_t largest = 0;
    size_t k;
    for (k = 0; k < n; k++) {
        largest = TFM__MAX(largest, tfm__float_bits(x[k]) & 0x7FFFFFFFu);
        if (bounded && k % 2)
            largest = TFM__MAX(largest, tfm__float_bits(x[k - 1] + x[k]) & 0x7FFFFFFFu);
    }
    return largest;
}

/* Adding 1.5 * 2^23 rounds to the nearest integer, which then stands in the low bits. */
static void tfm__quantize_plainly(const float *x, size_t n, int bounded, const tfm__quantized *row) {
    size_t g, k;
    for (g = 0; g < tfm__groups(n); g++) {
        const size_t first = g * TFM__GROUP, end = TFM__MIN(first + TFM__GROUP, n);
        const uint32_t largest = tfm__largest_bits(x + first, end - first, bounded);
        float inverse = largest ? 127 / tfm__float_from_bits(largest) : 0;
        int32_t sum = 0;
        if (inverse > FLT_MAX) /* |x| < 4e-37: so small that it may as well be 0 */
            inverse = 0;
        memset(row->q + first, 0, TFM__GROUP);
        for (k = first; k < end; k++) {
            float product = x[k] * inverse;
            row->q[k] = (int8_t)(tfm__float_bits(product + 12582912.0f) & 255);
            sum += row->q[k];
        }
        row->scales[g] = tfm__float_from_bits(largest) / 127;
        row->offsets[g] = -128 * sum;
    }
}

static void tfm__scalar_quantize(const float *x, size_t n, const tfm__quantized *row) {
    tfm__quantize_plainly(x, n, 0, row);
}

/* ---- bf16 keys and values
 * What a bf16 KV cache holds of one head in one page: numbers that a product adds one after another stand side by side, as
 * the bf16 dot product of AVX-512 takes them:
 *     keys     [tokens / 16] panels of  bf16 [head_dim / 2][16][2]       (outputs: tokens)
 *     values   [head_dim / 16] panels of  bf16 [tokens / 2][16][2]       (outputs: dimensions)
 * Queries and probabilities are rounded to bf16 too. Their products are then exact in fp32 (8 bits times 8), and of a pair
 * the second is added first: as the instruction does, so that all instruction sets have the same bits. (Only that it takes
 * numbers below 2^-126 for 0.) Where k is odd, what stands beside the last number does not count. */
static void tfm__scalar_matmul_pairs(const tfm__matmul *job) {
    size_t column, r, k;
    for (column = 0; column < job->n; column++) {
        const char *panel = (const char *)job->w + column / TFM__PANEL * job->panel_bytes;
        const uint16_t *w = (const uint16_t *)(const void *)panel + column % TFM__PANEL * 2;
        for (r = 0; r < job->n_rows; r++) {
            const float *x = job->x + r * job->x_stride;
            float *y = job->y + r * job->y_stride + column, sum = job->add ? *y : 0;
            for (k = 0; k < job->k; k += 2) {
                if (k + 1 < job->k)
                    sum += tfm__from_bf16(tfm__to_bf16(x[k + 1])) * tfm__from_bf16(w[k * TFM__PANEL + 1]);
                sum += tfm__from_bf16(tfm__to_bf16(x[k])) * tfm__from_bf16(w[k * TFM__PANEL]);
            }
            *y = sum;
        }
    }
}

static void tfm__scalar_pair(const float *first, const float *second, size_t n, uint16_t *pairs) {
    size_t i;
    for (i = 0; i < n; i++) {
        pairs[2 * i] = tfm__to_bf16(first[i]);
        pairs[2 * i + 1] = tfm__to_bf16(second[i]);
    }
}

/* ---- int8 keys and values
 * What an int8 KV cache holds of one head in one page. A number is scale * q: q from -127 to 127, a scale for each
 * TFM__KV_GROUP numbers of a token's key or value, in bf16. Scales stand beside the integers that they belong to:
 *     keys     [tokens / 16] panels of  bf16 scale[groups][16]  |  int8 q[head_dim][16]      (outputs: tokens)
 *     values   [groups] of              bf16 scale[tokens]      |  int8 q[2][tokens][16]     (outputs: dimensions)
 * Integers become floats again in registers, scale * q, rounded nowhere (8 bits times 7): so the products have the bits that
 * the fp32 products of those floats have, and queries and probabilities lose nothing. */
#define TFM__KV_GROUP ((size_t)32)

static size_t tfm__kv_groups(size_t head_dim) {
    return tfm__divide_up(head_dim, TFM__KV_GROUP);
}

/* Bytes of 16 keys; and of a group of values. */
static size_t tfm__keys_i8_bytes(size_t head_dim) {
    return TFM__PANEL * (sizeof(uint16_t) * tfm__kv_groups(head_dim) + head_dim);
}
#define TFM__VALUES_I8_BYTES (TFM_KV_PAGE * (sizeof(uint16_t) + TFM__KV_GROUP))

/* The integers of the panel of 16 outputs that begins with that column, and their scales: of keys [groups][16], of values
 * [tokens]. */
static const int8_t *tfm__keys_i8(const tfm__matmul *job, size_t column, const uint16_t **scales) {
    const char *panel = (const char *)job->w + column / TFM__PANEL * tfm__keys_i8_bytes(job->k);
    *scales = (const uint16_t *)(const void *)panel;
    return (const int8_t *)(*scales + tfm__kv_groups(job->k) * TFM__PANEL);
}

static const int8_t *tfm__values_i8(const tfm__matmul *job, size_t column, const uint16_t **scales) {
    const char *group = (const char *)job->w + column / TFM__KV_GROUP * TFM__VALUES_I8_BYTES;
    *scales = (const uint16_t *)(const void *)group;
    return (const int8_t *)(*scales + TFM_KV_PAGE) + TFM_KV_PAGE * (column % TFM__KV_GROUP);
}

/* The product with keys (values = 0) or values (1), whose scales belong to groups of inputs, or to each input. */
static void tfm__scalar_matmul_kv(const int values, const tfm__matmul *job) {
    size_t column, r, k;
    for (column = 0; column < job->n; column++) {
        const size_t lane = column % TFM__PANEL;
        const uint16_t *scales;
        const int8_t *q = (values ? tfm__values_i8 : tfm__keys_i8)(job, column - lane, &scales);
        for (r = 0; r < job->n_rows; r++) {
            const float *x = job->x + r * job->x_stride;
            float *y = job->y + r * job->y_stride + column, sum = job->add ? *y : 0;
            for (k = 0; k < job->k; k++) {
                const uint16_t scale = scales[values ? k : k / TFM__KV_GROUP * TFM__PANEL + lane];
                sum += x[k] * (tfm__from_bf16(scale) * (float)q[k * TFM__PANEL + lane]);
            }
            *y = sum;
        }
    }
}

static void tfm__scalar_matmul_keys(const tfm__matmul *job) {
    tfm__scalar_matmul_kv(0, job);
}

static void tfm__scalar_matmul_values(const tfm__matmul *job) {
    tfm__scalar_matmul_kv(1, job);
}

/* The scale of numbers whose largest magnitude that is (found on the bits, as above): largest / 127 rounded up to bf16, so
 * that no integer is beyond 127. */
static uint16_t tfm__kv_scale(float largest, float *inverse) {
    const float exact = largest / 127;
    const uint32_t bits = tfm__float_bits(exact);
    uint16_t scale;
    *inverse = 0;
    if (bits > 0x7F800000u)
        return 0x7FC0;  /* NaN: so is every product */
    if (exact < 1e-30f) /* so small that it may as well be 0 */
        return 0;
    scale = (uint16_t)((bits + 0xFFFF) >> 16);
    *inverse = 1 / tfm__from_bf16(scale);
    return scale;
}

static void tfm__scalar_quantize_kv(const float *x, size_t n, int8_t *q, uint16_t *scale) {
    uint32_t largest = 0;
    float inverse;
    size_t i;
    for (i = 0; i < n; i++)
        largest = TFM__MAX(largest, tfm__float_bits(x[i]) & 0x7FFFFFFFu);
    *scale = tfm__kv_scale(tfm__float_from_bits(largest), &inverse);
    for (i = 0; i < tfm__round_up(n, TFM__PANEL); i++) {
        float product = i < n ? x[i] * inverse : 0;
        q[i] = (int8_t)(tfm__float_bits(product + 12582912.0f) & 255);
    }
}

/* Panels side by side, as the tiles of the vector kernels take them. */
typedef struct tfm__kv_panels {
    const int8_t *q[4];
    const uint16_t *key_scales[4];
    float value_scales[2][TFM_KV_PAGE]; /* of two panels each */
} tfm__kv_panels;

static float tfm__scalar_activation(tfm_activation activation, float x) {
    switch (activation) {
    case TFM_RELU: return x < 0 ? 0 : x; /* NaN stays NaN */
    case TFM_GELU: return x * 0.5f * (1 + erff(x * 0.70710678f));
    case TFM_GELU_TANH: return x * 0.5f * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case TFM_QUICK_GELU: return x / (1 + expf(-1.702f * x));
    case TFM_SILU: return x / (1 + expf(-x));
    case TFM_TANH: return tanhf(x);
    default: return x;
    }
}

static void tfm__scalar_finish(const tfm__finish *job) {
    size_t r, i;
    for (r = 0; r < job->n_rows; r++) {
        const float *x = job->x + r * job->x_stride;
        float *y = job->y + r * job->y_stride;
        for (i = 0; i < job->n; i++) {
            float result = tfm__scalar_activation(job->activation, job->bias ? x[i] + job->bias[i] : x[i]);
            y[i] = job->add ? y[i] + result : result;
        }
    }
}

static void tfm__scalar_layer_norm(const float *x, size_t n, const float *weight, const float *bias, float eps,
                                   float *y) {
    float sum = 0, squares = 0, mean, inverse;
    size_t i;
    for (i = 0; i < n; i++)
        sum += x[i];
    mean = sum / (float)n;
    for (i = 0; i < n; i++)
        squares += (x[i] - mean) * (x[i] - mean);
    inverse = 1 / sqrtf(squares / (float)n + eps);
    for (i = 0; i < n; i++)
        y[i] = (x[i] - mean) * inverse * weight[i] + (bias ? bias[i] : 0);
}

static void tfm__scalar_rms_norm(const float *x, size_t n, const float *weight, const float *bias, float eps,
                                 float *y) {
    float squares = 0, inverse;
    size_t i;
    for (i = 0; i < n; i++)
        squares += x[i] * x[i];
    inverse = 1 / sqrtf(squares / (float)n + eps);
    for (i = 0; i < n; i++)
        y[i] = x[i] * inverse * weight[i] + (bias ? bias[i] : 0);
}

static float tfm__scalar_softmax_block(tfm__softmax *softmax, float *scores, size_t n, float scale, const float *mask) {
    float max = softmax->max, sum = 0, shift, correction;
    size_t i;
    for (i = 0; i < n; i++) {
        scores[i] = scores[i] * scale + (mask ? mask[i] : 0);
        max = scores[i] > max ? scores[i] : max;
    }
    shift = tfm__is_minus_infinity(max) ? 0 : max; /* nothing seen yet, and nothing here: -inf - -inf would be NaN */
    correction = softmax->max == max ? 1 : expf(softmax->max - shift);
    for (i = 0; i < n; i++)
        sum += scores[i] = expf(scores[i] - shift);
    softmax->max = max;
    softmax->sum = softmax->sum * correction + sum;
    return correction;
}

static void tfm__scalar_turn(float *x, size_t n_pairs, int interleaved, const float *angles) {
    const float *sines = angles + n_pairs;
    const size_t step = interleaved ? 2 : 1, apart = interleaved ? 1 : n_pairs;
    size_t i;
    for (i = 0; i < n_pairs; i++) {
        float *a = x + i * step, *b = a + apart, turned = *a * angles[i] - *b * sines[i];
        *b = *b * angles[i] + *a * sines[i];
        *a = turned;
    }
}

static void tfm__scalar_to_f16(const float *x, size_t n, uint16_t *halves) {
    size_t i;
    for (i = 0; i < n; i++)
        halves[i] = tfm__to_f16(tfm__within_f16(x[i]));
}

static void tfm__scalar_scale(float *x, size_t n, float by) {
    size_t i;
    for (i = 0; i < n; i++)
        x[i] *= by;
}

static void tfm__scalar_multiply(float *gate, const float *up, size_t n) {
    size_t i;
    for (i = 0; i < n; i++)
        gate[i] *= up[i];
}

static const tfm__kernels tfm__scalar_kernels = {
    TFM_ISA_SCALAR,
    {NULL, tfm__scalar_matmul_f32, tfm__scalar_matmul_f16, tfm__scalar_matmul_bf16, tfm__scalar_matmul_i8},
    tfm__scalar_quantize,
    {tfm__scalar_matmul_keys, tfm__scalar_matmul_values},
    tfm__scalar_matmul_pairs,
    tfm__scalar_pair,
    tfm__scalar_quantize_kv,
    tfm__scalar_finish,
    {tfm__scalar_layer_norm, tfm__scalar_rms_norm},
    tfm__scalar_softmax_block,
    tfm__scalar_turn,
    tfm__scalar_to_f16,
    tfm__scalar_scale,
    tfm__scalar_multiply,
};

/* ---- the vector kernels: this file once more for each instruction set, which compiles the part below */

#if defined(TFM__X86) || defined(TFM__NEON)
/* Where a tile's panel of y is made: in place, or, of the last panel when n is not a multiple of 16, on the side, so as not
 * to write past the row. */
typedef struct tfm__edge {
    float *y; /* [rows][16] */
    size_t stride;
} tfm__edge;

/* y: the panel at that column in the job's y, of `rows` rows; side: [rows][16] */
static tfm__edge tfm__begin_edge(const tfm__matmul *job, size_t rows, size_t column, float *y, float *side) {
    tfm__edge edge = {y, job->y_stride};
    size_t r;
    if (job->n - column >= TFM__PANEL)
        return edge;
    edge.y = side, edge.stride = TFM__PANEL;
    for (r = 0; r < rows; r++)
        memcpy(side + r * TFM__PANEL, y + r * job->y_stride, (job->n - column) * sizeof *y);
    return edge;
}

static void tfm__end_edge(const tfm__matmul *job, size_t rows, size_t column, const tfm__edge *edge, float *y) {
    size_t r;
    for (r = 0; r < rows && edge->y != y; r++)
        memcpy(y + r * job->y_stride, edge->y + r * TFM__PANEL, (job->n - column) * sizeof *y);
}
#endif

#if defined(__GNUC__) && !defined(__clang__) /* GCC's own intrinsics: its bug 105593 */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#endif
#ifdef TFM__X86
#define TFM__TIER 20 /* AVX2 */
#include TFM_HEADER
#undef TFM__TIER
#ifdef TFM__HAS_AVXVNNI
#define TFM__TIER 21 /* AVX-VNNI: AVX2 with another int8 product */
#include TFM_HEADER
#undef TFM__TIER
#endif
#define TFM__TIER 50 /* AVX-512 */
#include TFM_HEADER
#undef TFM__TIER
#define TFM__TIER 51 /* AVX-512 VNNI: AVX-512 with another int8 product */
#include TFM_HEADER
#undef TFM__TIER
#endif
#ifdef TFM__NEON
#define TFM__TIER 10 /* NEON */
#include TFM_HEADER
#undef TFM__TIER
#define TFM__TIER 11 /* NEON dot-product: NEON with another int8 product */
#include TFM_HEADER
#undef TFM__TIER
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#endif /* TFM_IMPLEMENTATION: interrupted, it goes on after the vector kernels */
#endif /* !TFM__TIER */

#ifdef TFM__TIER

/* A tier defines: how its functions are named and compiled; its register (vf, with TFM__LANES floats) and the operations
 * on it; and its tile of the matrix product, TFM__ROWS rows x TFM__PANELS panels of accumulators. The tile fills the
 * registers: for each input it loads TFM__PANELS panels of weights and broadcasts TFM__ROWS activations, so the more
 * accumulators, the fewer loads for each multiplication.
 *   AVX-512: 32 registers: 8 rows x 48 outputs = 24 accumulators + 3 weights + 1 broadcast. 97 % of the multiplier's peak.
 *   AVX2:    16 registers: 6 rows x 16 outputs = 12 accumulators + 2 weights + 1 broadcast.
 *   NEON:    32 registers: 6 rows x 16 outputs = 24 accumulators + 4 weights + 1 broadcast.
 * Keys and values in bf16 or int8 have tiles of their own: heads of 64 and pages of 128 are whole tiles of 64 outputs, and
 * of 16 and 32. They have up to TFM__ROWS_KV rows x 1 panel, or, of up to TFM__FEW_KV rows, TFM__PANELS_KV panels: of AVX2
 * and NEON 4 x 1, in which nothing leaves the registers though a pair of bf16 takes two, or 2 x 2. */
#if TFM__TIER == 20 || TFM__TIER == 21
#if TFM__TIER == 20
#define TFM__FN(name) tfm__avx2_##name
#define TFM__TARGET __attribute__((target("avx2,fma,f16c")))
#define TFM__ISA TFM_ISA_AVX2
#else
#define TFM__FN(name) tfm__avxvnni_##name
#define TFM__TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#define TFM__ISA TFM_ISA_AVXVNNI
#endif
#define TFM__BASE(name) tfm__avx2_##name
#define TFM__LANES 8
#define TFM__ROWS 6
#define TFM__PANELS 1
#define vf __m256
#define vf_load _mm256_loadu_ps
#define vf_store _mm256_storeu_ps
#define vf_set1 _mm256_set1_ps
#define vf_add _mm256_add_ps
#define vf_sub _mm256_sub_ps
#define vf_mul _mm256_mul_ps
#define vf_div _mm256_div_ps
#define vf_max _mm256_max_ps
#define vf_min _mm256_min_ps
#define vf_fma _mm256_fmadd_ps
#define vf_load_f16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define vf_load_bf16(p)                                                                                                \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
#define vf_store_f16(p, a) _mm_storeu_si128((__m128i *)(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT))
#define vf_abs(a) _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a)
/* the larger of two floats that are not negative, by their bits: NaN is the largest */
#define vf_max_bits(a, b) _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)))
/* a < b ? yes : no */
#define vf_if_less(a, b, yes, no) _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ))
#define vf_if_nan(a, yes, no) _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, a, _CMP_UNORD_Q))
/* a times two to the n, for n = the low bits of t */
#define vf_times_2_to(a, t)                                                                                            \
    _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_castps_si256(t), 23)))
#define TFM__ROWS_KV 4
#define TFM__PANELS_KV 2
#define TFM__FEW_KV 2
#if TFM__TIER == 20
#define TFM__ROWS_I8 4
#define TFM__TALL_I8 4
#define TFM__QUANTIZE TFM__FN(quantize_bounded)
#else
#define TFM__ROWS_I8 3
#define TFM__TALL_I8 3
#define TFM__QUANTIZE TFM__BASE(quantize)
#endif
#define TFM__TURNS_I8 2
#define TFM__PANELS_I8 1
#define vi __m256i
#define vi_load(p) _mm256_loadu_si256((const __m256i *)(p))
#define vi_set1 _mm256_set1_epi32
#define vi_add _mm256_add_epi32
#define vi_or _mm256_or_si256
#define vi_and _mm256_and_si256
#define vi_shift_left _mm256_slli_epi32
#define vi_shift_right _mm256_srli_epi32
#define vi_as_floats _mm256_castsi256_ps
#define vf_as_integers _mm256_castps_si256
#define vi_to_floats _mm256_cvtepi32_ps
/* floats with the bits base[i] + code[i] * 2^19 */
#define vi_scales(base, code)                                                                                          \
    _mm256_castsi256_ps(_mm256_add_epi32(                                                                              \
        vi_load(base), _mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(code))), 19)))
#elif TFM__TIER == 50 || TFM__TIER == 51
#if TFM__TIER == 50
#define TFM__FN(name) tfm__avx512_##name
#define TFM__TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define TFM__ISA TFM_ISA_AVX512
#else
#define TFM__FN(name) tfm__avx512vnni_##name
#define TFM__TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define TFM__ISA TFM_ISA_AVX512VNNI
#endif
#define TFM__BASE(name) tfm__avx512_##name
#define TFM__LANES 16
#define TFM__ROWS 8
#define TFM__PANELS 3
#define vf __m512
#define vf_load _mm512_loadu_ps
#define vf_store _mm512_storeu_ps
#define vf_set1 _mm512_set1_ps
#define vf_add _mm512_add_ps
#define vf_sub _mm512_sub_ps
#define vf_mul _mm512_mul_ps
#define vf_div _mm512_div_ps
#define vf_max _mm512_max_ps
#define vf_min _mm512_min_ps
#define vf_fma _mm512_fmadd_ps
#define vf_load_f16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define vf_load_bf16(p)                                                                                                \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
#define vf_store_f16(p, a) _mm256_storeu_si256((__m256i *)(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT))
#define vf_abs(a) _mm512_abs_ps(a)
#define vf_max_bits(a, b) _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)))
#define vf_if_less(a, b, yes, no) _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes)
#define vf_if_nan(a, yes, no) _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), no, yes)
#define vf_times_2_to(a, t)                                                                                            \
    _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(_mm512_castps_si512(t), 23)))
#define TFM__ROWS_KV 6
#define TFM__PANELS_KV 4
#define TFM__FEW_KV TFM__ROWS_KV
#define TFM__ROWS_I8 4
#define TFM__PANELS_I8 3
#define TFM__TALL_I8 8
#define TFM__TURNS_I8 4
#define TFM__QUANTIZE TFM__BASE(quantize)
#define vi __m512i
#define vi_load(p) _mm512_loadu_si512(p)
#define vi_set1 _mm512_set1_epi32
#define vi_add _mm512_add_epi32
#define vi_or _mm512_or_si512
#define vi_and _mm512_and_si512
#define vi_shift_left _mm512_slli_epi32
#define vi_shift_right _mm512_srli_epi32
#define vi_as_floats _mm512_castsi512_ps
#define vf_as_integers _mm512_castps_si512
#define vi_to_floats _mm512_cvtepi32_ps
#define vi_scales(base, code)                                                                                          \
    _mm512_castsi512_ps(_mm512_add_epi32(                                                                              \
        vi_load(base), _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(code))), 19)))
#elif TFM__TIER == 10 || TFM__TIER == 11
#if TFM__TIER == 10
#define TFM__FN(name) tfm__neon_##name
#define TFM__TARGET
#define TFM__ISA TFM_ISA_NEON
#else
#define TFM__FN(name) tfm__neondot_##name
#ifdef __clang__
#define TFM__TARGET __attribute__((target("dotprod")))
#else
#define TFM__TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#define TFM__ISA TFM_ISA_NEONDOT
#endif
#define TFM__BASE(name) tfm__neon_##name
#define TFM__LANES 4
#define TFM__ROWS 6
#define TFM__PANELS 1
#define vf float32x4_t
#define vf_load vld1q_f32
#define vf_store vst1q_f32
#define vf_set1 vdupq_n_f32
#define vf_add vaddq_f32
#define vf_sub vsubq_f32
#define vf_mul vmulq_f32
#define vf_div vdivq_f32
#define vf_max vmaxq_f32
#define vf_min vminq_f32
#define vf_fma(a, b, c) vfmaq_f32(c, a, b)
#define vf_load_f16(p) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)(p))))
#define vf_load_bf16(p) vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t *)(p)), 16))
#define vf_store_f16(p, a) vst1_u16((uint16_t *)(p), vreinterpret_u16_f16(vcvt_f16_f32(a)))
#define vf_abs vabsq_f32
#define vf_max_bits(a, b) vreinterpretq_f32_s32(vmaxq_s32(vreinterpretq_s32_f32(a), vreinterpretq_s32_f32(b)))
#define vf_if_less(a, b, yes, no) vbslq_f32(vcltq_f32(a, b), yes, no)
#define vf_if_nan(a, yes, no) vbslq_f32(vceqq_f32(a, a), no, yes)
#define vf_times_2_to(a, t)                                                                                            \
    vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a), vshlq_n_s32(vreinterpretq_s32_f32(t), 23)))
#define TFM__ROWS_KV 4
#define TFM__PANELS_KV 2
#define TFM__FEW_KV 2
#define TFM__ROWS_I8 3
#define TFM__PANELS_I8 1
#define TFM__TALL_I8 3
#define TFM__TURNS_I8 2
#define TFM__QUANTIZE TFM__BASE(quantize)
#define vi int32x4_t
#define vi_load(p) vld1q_s32((const int32_t *)(const void *)(p))
#define vi_set1 vdupq_n_s32
#define vi_add vaddq_s32
#define vi_or vorrq_s32
#define vi_and vandq_s32
#define vi_shift_left vshlq_n_s32
#define vi_shift_right(a, n) vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a), n))
#define vi_as_floats vreinterpretq_f32_s32
#define vf_as_integers vreinterpretq_s32_f32
#define vi_to_floats vcvtq_f32_s32
#define vi_scales(base, code) vreinterpretq_f32_s32(vaddq_s32(vi_load(base), TFM__FN(codes)(code)))
#endif

/* Registers in a panel, and so in a v16. */
#define TFM__PARTS (16 / TFM__LANES)

/* Weights are asked for so many bytes before they are used. In decoding they come from memory, and while a core computes
 * it runs too little ahead to keep enough cache lines under way: with the hints 8 sequences at once are a third faster, and
 * one is a little. In a prompt, whose weights are in the cache, they cost nothing that can be measured. (Past the end of
 * the weights a hint does no harm.) */
#define TFM__AHEAD 8192

#if TFM__TIER % 10 == 0 /* what the tiers of one register have in common */

/* ---- the matrix product */

static TFM__TARGET TFM__INLINE vf TFM__FN(load)(const tfm_dtype dtype, const void *weights, size_t index) {
    return dtype == TFM_F32   ? vf_load((const float *)weights + index)
           : dtype == TFM_F16 ? vf_load_f16((const uint16_t *)weights + index)
                              : vf_load_bf16((const uint16_t *)weights + index);
}

/* The sums of a tile of rows x columns: they begin with 0, or with what y holds, and become y. */
static TFM__TARGET TFM__INLINE void TFM__FN(begin_sums)(const int rows, const int columns, int add, const float *y,
                                                        size_t y_stride, vf (*sum)[TFM__PANELS_KV * TFM__PARTS]) {
    int r, c;
    TFM__UNROLL
    for (r = 0; r < rows; r++)
        TFM__UNROLL
    for (c = 0; c < columns; c++)
        sum[r][c] = add ? vf_load(y + (size_t)r * y_stride + c * TFM__LANES) : vf_set1(0);
}

static TFM__TARGET TFM__INLINE void TFM__FN(store_sums)(const int rows, const int columns,
                                                        vf (*sum)[TFM__PANELS_KV * TFM__PARTS], float *y,
                                                        size_t y_stride) {
    int r, c;
    TFM__UNROLL
    for (r = 0; r < rows; r++)
        TFM__UNROLL
    for (c = 0; c < columns; c++)
        vf_store(y + (size_t)r * y_stride + c * TFM__LANES, sum[r][c]);
}

/* One tile: rows x (16 * panels) of y. dtype, rows and panels are constants where this is inlined, so every loop over
 * them is unrolled and `sum` lives in registers. */
static TFM__TARGET TFM__INLINE void TFM__FN(tile)(const tfm_dtype dtype, const int rows, const int panels,
                                                  const tfm__matmul *job, const float *x, const char *w, float *y,
                                                  size_t y_stride) {
    const int columns = panels * TFM__PARTS;
    const size_t x_stride = job->x_stride, panel_bytes = job->panel_bytes, n_inputs = job->k;
    vf sum[TFM__ROWS][TFM__PANELS_KV * TFM__PARTS], weights[TFM__PANELS_KV * TFM__PARTS];
    size_t k;
    int r, c;
    TFM__FN(begin_sums)(rows, columns, job->add, y, y_stride, sum);
    for (k = 0; k < n_inputs; k++) {
        TFM__UNROLL
        for (c = 0; c < columns; c++) {
            const char *panel = w + (size_t)(c / TFM__PARTS) * panel_bytes;
            if (c % TFM__PARTS == 0)
                TFM__FETCH(panel + k * 16 * tfm__dtype_sizes[dtype] + TFM__AHEAD);
            weights[c] = TFM__FN(load)(dtype, panel, k * 16 + (size_t)(c % TFM__PARTS * TFM__LANES));
        }
        TFM__UNROLL
        for (r = 0; r < rows; r++) {
            const vf input = vf_set1(x[(size_t)r * x_stride + k]);
            TFM__UNROLL
            for (c = 0; c < columns; c++)
                sum[r][c] = vf_fma(input, weights[c], sum[r][c]);
        }
    }
    TFM__FN(store_sums)(rows, columns, sum, y, y_stride);
}

static TFM__TARGET TFM__INLINE void TFM__FN(tile_rows)(const tfm_dtype dtype, size_t rows, const int panels,
                                                       const tfm__matmul *job, const float *x, const char *w, float *y,
                                                       size_t y_stride) {
    switch (rows) {
    case 1: TFM__FN(tile)(dtype, 1, panels, job, x, w, y, y_stride); break;
    case 2: TFM__FN(tile)(dtype, 2, panels, job, x, w, y, y_stride); break;
    case 3: TFM__FN(tile)(dtype, 3, panels, job, x, w, y, y_stride); break;
    case 4: TFM__FN(tile)(dtype, 4, panels, job, x, w, y, y_stride); break;
    case 5: TFM__FN(tile)(dtype, 5, panels, job, x, w, y, y_stride); break;
#if TFM__ROWS == 8
    case 6: TFM__FN(tile)(dtype, 6, panels, job, x, w, y, y_stride); break;
    case 7: TFM__FN(tile)(dtype, 7, panels, job, x, w, y, y_stride); break;
#endif
    default: TFM__FN(tile)(dtype, TFM__ROWS, panels, job, x, w, y, y_stride);
    }
}

#if TFM__LANES == 16
/* Where n is a multiple of 64, as in attention, whose heads and pages are: tiles of 6 rows x 64 outputs, 24 accumulators
 * too. (Weights come 48 outputs at a time.) */
static TFM__TARGET TFM__INLINE void TFM__FN(matmul_64)(const tfm_dtype dtype, const tfm__matmul *job) {
    size_t column, row;
    for (column = 0; column < job->n; column += 64) {
        const char *w = (const char *)job->w + column / 16 * job->panel_bytes;
        for (row = 0; row < job->n_rows; row += 6) {
            const float *x = job->x + row * job->x_stride;
            float *y = job->y + row * job->y_stride + column;
            switch (job->n_rows - row) {
            case 1: TFM__FN(tile)(dtype, 1, 4, job, x, w, y, job->y_stride); break;
            case 2: TFM__FN(tile)(dtype, 2, 4, job, x, w, y, job->y_stride); break;
            case 3: TFM__FN(tile)(dtype, 3, 4, job, x, w, y, job->y_stride); break;
            case 4: TFM__FN(tile)(dtype, 4, 4, job, x, w, y, job->y_stride); break;
            case 5: TFM__FN(tile)(dtype, 5, 4, job, x, w, y, job->y_stride); break;
            default: TFM__FN(tile)(dtype, 6, 4, job, x, w, y, job->y_stride);
            }
        }
    }
}
#endif

static TFM__TARGET TFM__INLINE void TFM__FN(matmul)(const tfm_dtype dtype, const tfm__matmul *job) {
    size_t column = 0, row, step;
    float side[TFM__ROWS * 16];
#if TFM__LANES == 16
    if (dtype != TFM_BF16 && job->n % 64 == 0) {
        TFM__FN(matmul_64)(dtype, job);
        return;
    }
#endif
    for (; column < job->n; column += step) {
        const char *w = (const char *)job->w + column / 16 * job->panel_bytes;
        step = TFM__PANELS > 1 && column + 16 * TFM__PANELS <= job->n ? 16 * TFM__PANELS : 16;
        for (row = 0; row < job->n_rows; row += TFM__ROWS) {
            const float *x = job->x + row * job->x_stride;
            float *y = job->y + row * job->y_stride + column;
            const size_t rows = TFM__MIN(job->n_rows - row, (size_t)TFM__ROWS);
            if (step > 16) {
                TFM__FN(tile_rows)(dtype, rows, TFM__PANELS, job, x, w, y, job->y_stride);
            } else {
                const tfm__edge edge = tfm__begin_edge(job, rows, column, y, side);
                TFM__FN(tile_rows)(dtype, rows, 1, job, x, w, edge.y, edge.stride);
                tfm__end_edge(job, rows, column, &edge, y);
            }
        }
    }
}

static TFM__TARGET void TFM__FN(matmul_f32)(const tfm__matmul *job) {
    TFM__FN(matmul)(TFM_F32, job);
}

static TFM__TARGET void TFM__FN(matmul_f16)(const tfm__matmul *job) {
    TFM__FN(matmul)(TFM_F16, job);
}

static TFM__TARGET void TFM__FN(matmul_bf16)(const tfm__matmul *job) {
    TFM__FN(matmul)(TFM_BF16, job);
}

/* ---- sixteen floats, whatever the register: the same operations in the same order on every instruction set */

#define v16 TFM__FN(v16_type)
typedef struct v16 {
    vf part[TFM__PARTS];
} v16;

#define TFM__LIFT(name, operation, ...)                                                                                \
    static TFM__TARGET TFM__INLINE v16 TFM__FN(name)(__VA_ARGS__) {                                                    \
        v16 result;                                                                                                    \
        int i;                                                                                                         \
        TFM__UNROLL                                                                                                    \
        for (i = 0; i < TFM__PARTS; i++)                                                                               \
            result.part[i] = operation;                                                                                \
        return result;                                                                                                 \
    }
TFM__LIFT(load16, vf_load(p + i * TFM__LANES), const float *p)
TFM__LIFT(set16, vf_set1(value), float value)
TFM__LIFT(add16, vf_add(a.part[i], b.part[i]), v16 a, v16 b)
TFM__LIFT(sub16, vf_sub(a.part[i], b.part[i]), v16 a, v16 b)
TFM__LIFT(mul16, vf_mul(a.part[i], b.part[i]), v16 a, v16 b)
TFM__LIFT(div16, vf_div(a.part[i], b.part[i]), v16 a, v16 b)
TFM__LIFT(max16, vf_max(a.part[i], b.part[i]), v16 a, v16 b)
TFM__LIFT(min16, vf_min(a.part[i], b.part[i]), v16 a, v16 b)
TFM__LIFT(abs16, vf_abs(a.part[i]), v16 a)
TFM__LIFT(max_bits16, vf_max_bits(a.part[i], b.part[i]), v16 a, v16 b)
TFM__LIFT(fma16, vf_fma(a.part[i], b.part[i], c.part[i]), v16 a, v16 b, v16 c)
TFM__LIFT(if_less16, vf_if_less(a.part[i], b.part[i], yes.part[i], no.part[i]), v16 a, v16 b, v16 yes, v16 no)
TFM__LIFT(times_2_to16, vf_times_2_to(a.part[i], t.part[i]), v16 a, v16 t)
#undef TFM__LIFT

static TFM__TARGET TFM__INLINE void TFM__FN(store16)(float *p, v16 a) {
    int i;
    TFM__UNROLL
    for (i = 0; i < TFM__PARTS; i++)
        vf_store(p + i * TFM__LANES, a.part[i]);
}

/* The first n lanes from memory, the rest `fill`; and back. */
static TFM__TARGET TFM__INLINE v16 TFM__FN(load_part)(const float *p, size_t n, float fill) {
#if TFM__LANES == 16
    v16 result;
    if (n >= 16)
        return TFM__FN(load16)(p);
    result.part[0] = _mm512_mask_loadu_ps(_mm512_set1_ps(fill), (__mmask16)((1u << n) - 1), p);
    return result;
#else
    float side[16];
    if (n >= 16)
        return TFM__FN(load16)(p);
    TFM__FN(store16)(side, TFM__FN(set16)(fill));
    memcpy(side, p, n * sizeof *p);
    return TFM__FN(load16)(side);
#endif
}

static TFM__TARGET TFM__INLINE void TFM__FN(store_part)(float *p, v16 a, size_t n) {
#if TFM__LANES == 16
    if (n >= 16)
        TFM__FN(store16)(p, a);
    else
        _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), a.part[0]);
#else
    float side[16];
    if (n >= 16) {
        TFM__FN(store16)(p, a);
        return;
    }
    TFM__FN(store16)(side, a);
    memcpy(p, side, n * sizeof *p);
#endif
}

/* Statements for each sixteen of n numbers, of which the last may be fewer: `lanes`. They stand here twice, for where
 * lanes is the constant 16 there are no masks and no side buffers: that is half of the time. */
#define TFM__SIXTEENS(i, lanes, n, ...)                                                                                \
    {                                                                                                                  \
        size_t lanes = 16;                                                                                             \
        for (i = 0; i + 16 <= (n); i += 16)                                                                            \
            __VA_ARGS__                                                                                                \
        lanes = (n)-i;                                                                                                 \
        if (lanes)                                                                                                     \
            __VA_ARGS__                                                                                                \
    }

/* The sum of the lanes: lane i and lane i + 8, of the eight sums i and i + 4, and so on: one order everywhere. */
static TFM__TARGET TFM__INLINE float TFM__FN(sum_lanes)(v16 a) {
#if TFM__LANES == 4
    float32x4_t four = vaddq_f32(vaddq_f32(a.part[0], a.part[2]), vaddq_f32(a.part[1], a.part[3]));
    float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
#else
    __m256 eight;
    __m128 four;
#if TFM__LANES == 16
    eight = _mm256_add_ps(_mm512_castps512_ps256(a.part[0]), _mm512_extractf32x8_ps(a.part[0], 1));
#else
    eight = _mm256_add_ps(a.part[0], a.part[1]);
#endif
    four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#endif
}

/* The largest lane; what it is when one is NaN is open. */
static TFM__TARGET TFM__INLINE float TFM__FN(max_lanes)(v16 a) {
#if TFM__LANES == 4
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.part[0], a.part[2]), vmaxq_f32(a.part[1], a.part[3])));
#else
    __m256 eight;
    __m128 four;
#if TFM__LANES == 16
    eight = _mm256_max_ps(_mm512_castps512_ps256(a.part[0]), _mm512_extractf32x8_ps(a.part[0], 1));
#else
    eight = _mm256_max_ps(a.part[0], a.part[1]);
#endif
    four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
#endif
}

/* The lane with the largest bits, of lanes that are not negative: NaN if there is one. */
static TFM__TARGET TFM__INLINE float TFM__FN(max_bits_lanes)(v16 a) {
#if TFM__LANES == 4
    int32x4_t four =
        vreinterpretq_s32_f32(vf_max_bits(vf_max_bits(a.part[0], a.part[2]), vf_max_bits(a.part[1], a.part[3])));
    return tfm__float_from_bits((uint32_t)vmaxvq_s32(four));
#else
    __m256i eight;
    __m128i four;
#if TFM__LANES == 16
    __m512i all = _mm512_castps_si512(a.part[0]);
    eight = _mm256_max_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
#else
    eight = _mm256_max_epi32(_mm256_castps_si256(a.part[0]), _mm256_castps_si256(a.part[1]));
#endif
    four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E)); /* 2 3 0 1 */
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xB1)); /* 1 0 3 2 */
    return tfm__float_from_bits((uint32_t)_mm_cvtsi128_si32(four));
#endif
}

/* a * b + c with constants b and c: a step of Horner's scheme. */
static TFM__TARGET TFM__INLINE v16 TFM__FN(horner)(v16 a, v16 sum, float coefficient) {
    return TFM__FN(fma16)(sum, a, TFM__FN(set16)(coefficient));
}

/* exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2. Adding 1.5 * 2^23 rounds to an integer that stands in the
 * low bits of the sum; ln 2 is subtracted in two parts, of which n times the first is exact; exp(r) is the minimax
 * polynomial of degree 6 (relative error 2e-9). In all, relative error < 2e-7. Below -87.3 the result is 0, above 88.37
 * it stays at 2.4e38; NaN stays NaN (min returns its second argument then). */
static TFM__TARGET TFM__INLINE v16 TFM__FN(exp16)(v16 x) {
    const v16 magic = TFM__FN(set16)(12582912.0f);
    v16 in = TFM__FN(min16)(TFM__FN(set16)(88.37f), x);
    v16 t = TFM__FN(fma16)(in, TFM__FN(set16)(1.44269504f), magic), n = TFM__FN(sub16)(t, magic);
    v16 r = TFM__FN(fma16)(n, TFM__FN(set16)(-0.693359375f), in);
    v16 p = TFM__FN(set16)(1.383683822e-3f);
    r = TFM__FN(fma16)(n, TFM__FN(set16)(2.12194440e-4f), r);
    p = TFM__FN(horner)(r, p, 8.374822087e-3f);
    p = TFM__FN(horner)(r, p, 4.166822604e-2f);
    p = TFM__FN(horner)(r, p, 1.66664201e-1f);
    p = TFM__FN(horner)(r, p, 4.999999208e-1f);
    p = TFM__FN(horner)(r, p, 1.000000036f);
    p = TFM__FN(horner)(r, p, 1.000000001f);
    return TFM__FN(if_less16)(x, TFM__FN(set16)(-87.3f), TFM__FN(set16)(0), TFM__FN(times_2_to16)(p, t));
}

static TFM__TARGET TFM__INLINE v16 TFM__FN(sigmoid16)(v16 x) {
    const v16 one = TFM__FN(set16)(1);
    return TFM__FN(div16)(one, TFM__FN(add16)(one, TFM__FN(exp16)(TFM__FN(sub16)(TFM__FN(set16)(0), x))));
}

/* The polynomial with n coefficients, the highest power's first. */
static TFM__TARGET TFM__INLINE v16 TFM__FN(polynomial16)(v16 x, const float *coefficients, const int n) {
    v16 sum = TFM__FN(set16)(coefficients[0]);
    int i;
    TFM__UNROLL
    for (i = 1; i < n; i++)
        sum = TFM__FN(horner)(x, sum, coefficients[i]);
    return sum;
}

/* GELU is x (1/2 + r): r is odd in x and lies between -1/2 and 1/2. Here r = u (15 - 10 u^2 + 3 u^4) / 16 with u held within
 * [-1, 1]. That is 1/2 at u = 1, and so flat there that u need not be exact where r is nearly 1/2: a u of low degree in x
 * gives r to 2e-8, without exp. (In m = u^2 - 1 it is u (1/2 - m / 4 + 3 m^2 / 16), which rounds best near 1.) Where u has
 * reached 1 or -1, beyond |x| = 5.6, the result is exactly x or 0. tests/fit_gelu.py finds the coefficients of u. */
static TFM__TARGET TFM__INLINE v16 TFM__FN(gelu_of16)(v16 x, v16 u) {
    const v16 one = TFM__FN(set16)(1), minus_one = TFM__FN(set16)(-1);
    v16 m, h = TFM__FN(set16)(3.0f / 16);
    u = TFM__FN(min16)(one, TFM__FN(max16)(minus_one, u));
    m = TFM__FN(fma16)(u, u, minus_one);
    h = TFM__FN(horner)(m, h, -1.0f / 4);
    h = TFM__FN(horner)(m, h, 1.0f / 2);
    return TFM__FN(mul16)(x, TFM__FN(fma16)(u, h, TFM__FN(set16)(0.5f)));
}

/* u = x P(x^2). P's first coefficient is above 0: far outside, u only grows, to infinity. */
static TFM__TARGET TFM__INLINE v16 TFM__FN(gelu16)(v16 x) {
    static const float p[] = {5.23549988e-11f, -6.91072799e-09f, 4.72860876e-07f, -2.22179733e-05f,
                              0.000766655721f, -0.0195509642f,   0.425538361f};
    return TFM__FN(gelu_of16)(x, TFM__FN(mul16)(x, TFM__FN(polynomial16)(TFM__FN(mul16)(x, x), p, 7)));
}

/* u = x P(x^2) / Q(x^2), for tanh has poles at x^2 = -7.2 +- 3.5i: a P alone would need the degree 10. From |x| = 5.1 on P / Q
 * stays what it is. */
static TFM__TARGET TFM__INLINE v16 TFM__FN(gelu_tanh16)(v16 x) {
    static const float p[] = {-3.37603971e-08f, 3.01130717e-06f, -0.000107258311f,
                              0.0026321162f,    0.0618132763f,   0.425538331f};
    static const float q[] = {0.0130927796f, 0.192027435f, 1};
    v16 square = TFM__FN(min16)(TFM__FN(set16)(26.01f), TFM__FN(mul16)(x, x));
    v16 quotient = TFM__FN(div16)(x, TFM__FN(polynomial16)(square, q, 3));
    return TFM__FN(gelu_of16)(x, TFM__FN(mul16)(quotient, TFM__FN(polynomial16)(square, p, 6)));
}

/* The activations. Largest error against the exact functions: 2e-7 of |x|; tanh 2e-7 absolute. In the negative tail, where
 * the result is small beside x, those made of sigmoid keep relative accuracy, for they have no 1 - 1: 3e-6 of
 * max(|result|, |x| 2^-24). GELU does not, as its formulas with 1 + erf and 1 + tanh don't, here in plain C or in PyTorch. */
static TFM__TARGET TFM__INLINE v16 TFM__FN(activate16)(const tfm_activation activation, v16 x) {
    switch (activation) {
    case TFM_RELU: return TFM__FN(if_less16)(x, TFM__FN(set16)(0), TFM__FN(set16)(0), x);
    case TFM_GELU: return TFM__FN(gelu16)(x);
    case TFM_GELU_TANH: return TFM__FN(gelu_tanh16)(x);
    case TFM_QUICK_GELU: return TFM__FN(mul16)(x, TFM__FN(sigmoid16)(TFM__FN(mul16)(x, TFM__FN(set16)(1.702f))));
    case TFM_SILU: return TFM__FN(mul16)(x, TFM__FN(sigmoid16)(x));
    case TFM_TANH: { /* 2 sigmoid(2x) - 1 */
        v16 s = TFM__FN(sigmoid16)(TFM__FN(add16)(x, x));
        return TFM__FN(sub16)(TFM__FN(add16)(s, s), TFM__FN(set16)(1));
    }
    default: return x;
    }
}

static TFM__TARGET TFM__INLINE void TFM__FN(finish_as)(const tfm_activation activation, const tfm__finish *job) {
    const float *bias = job->bias;
    const size_t n = job->n;
    const int add = job->add;
    size_t r, i;
    for (r = 0; r < job->n_rows; r++) {
        const float *from = job->x + r * job->x_stride;
        float *to = job->y + r * job->y_stride;
        TFM__SIXTEENS(i, lanes, n, {
            v16 y = TFM__FN(load_part)(from + i, lanes, 0);
            if (bias)
                y = TFM__FN(add16)(y, TFM__FN(load_part)(bias + i, lanes, 0));
            y = TFM__FN(activate16)(activation, y);
            if (add)
                y = TFM__FN(add16)(TFM__FN(load_part)(to + i, lanes, 0), y);
            TFM__FN(store_part)(to + i, y, lanes);
        })
    }
}

static TFM__TARGET void TFM__FN(finish)(const tfm__finish *job) {
    switch (job->activation) {
    case TFM_RELU: TFM__FN(finish_as)(TFM_RELU, job); break;
    case TFM_GELU: TFM__FN(finish_as)(TFM_GELU, job); break;
    case TFM_GELU_TANH: TFM__FN(finish_as)(TFM_GELU_TANH, job); break;
    case TFM_QUICK_GELU: TFM__FN(finish_as)(TFM_QUICK_GELU, job); break;
    case TFM_SILU: TFM__FN(finish_as)(TFM_SILU, job); break;
    case TFM_TANH: TFM__FN(finish_as)(TFM_TANH, job); break;
    default: TFM__FN(finish_as)(TFM_NO_ACTIVATION, job);
    }
}

/* ---- norms */

/* The sum of four registers' lanes, which were summed in turns, so that an addition need not wait for the one before. */
static TFM__TARGET TFM__INLINE float TFM__FN(sum_turns)(const v16 *turn) {
    return TFM__FN(sum_lanes)(TFM__FN(add16)(TFM__FN(add16)(turn[0], turn[1]), TFM__FN(add16)(turn[2], turn[3])));
}

/* Sums over i of x[i], and of (x[i] - mean)^2. */
static TFM__TARGET TFM__INLINE float TFM__FN(sum)(const float *x, size_t n) {
    v16 turn[4] = {TFM__FN(set16)(0), TFM__FN(set16)(0), TFM__FN(set16)(0), TFM__FN(set16)(0)};
    size_t i, t;
    for (; n >= 64; n -= 64, x += 64)
        TFM__UNROLL
    for (t = 0; t < 4; t++)
        turn[t] = TFM__FN(add16)(turn[t], TFM__FN(load16)(x + 16 * t));
    TFM__SIXTEENS(i, lanes, n, { turn[0] = TFM__FN(add16)(turn[0], TFM__FN(load_part)(x + i, lanes, 0)); })
    return TFM__FN(sum_turns)(turn);
}

static TFM__TARGET TFM__INLINE float TFM__FN(squares)(const float *x, size_t n, float mean) {
    v16 turn[4] = {TFM__FN(set16)(0), TFM__FN(set16)(0), TFM__FN(set16)(0), TFM__FN(set16)(0)};
    size_t i, t;
    for (; n >= 64; n -= 64, x += 64)
        TFM__UNROLL
    for (t = 0; t < 4; t++) {
        const v16 d = TFM__FN(sub16)(TFM__FN(load16)(x + 16 * t), TFM__FN(set16)(mean));
        turn[t] = TFM__FN(fma16)(d, d, turn[t]);
    }
    TFM__SIXTEENS(i, lanes, n, {
        const v16 d = TFM__FN(sub16)(TFM__FN(load_part)(x + i, lanes, mean), TFM__FN(set16)(mean));
        turn[0] = TFM__FN(fma16)(d, d, turn[0]);
    })
    return TFM__FN(sum_turns)(turn);
}

/* y = (x - mean) * inverse * weight + bias */
static TFM__TARGET TFM__INLINE void TFM__FN(normalize)(const float *x, size_t n, float mean, float inverse,
                                                       const float *weight, const float *bias, float *y) {
    size_t i;
    TFM__SIXTEENS(i, lanes, n, {
        const v16 d = TFM__FN(sub16)(TFM__FN(load_part)(x + i, lanes, 0), TFM__FN(set16)(mean));
        const v16 w = TFM__FN(load_part)(weight + i, lanes, 0);
        const v16 b = bias ? TFM__FN(load_part)(bias + i, lanes, 0) : TFM__FN(set16)(0);
        TFM__FN(store_part)(y + i, TFM__FN(fma16)(TFM__FN(mul16)(d, TFM__FN(set16)(inverse)), w, b), lanes);
    })
}

static TFM__TARGET void TFM__FN(layer_norm)(const float *x, size_t n, const float *weight, const float *bias, float eps,
                                            float *y) {
    const float mean = TFM__FN(sum)(x, n) / (float)n;
    TFM__FN(normalize)(x, n, mean, 1 / sqrtf(TFM__FN(squares)(x, n, mean) / (float)n + eps), weight, bias, y);
}

static TFM__TARGET void TFM__FN(rms_norm)(const float *x, size_t n, const float *weight, const float *bias, float eps,
                                          float *y) {
    TFM__FN(normalize)(x, n, 0, 1 / sqrtf(TFM__FN(squares)(x, n, 0) / (float)n + eps), weight, bias, y);
}

/* ---- softmax and the rest of attention */

/* score * scale + mask - shift of sixteen keys; past the last, -infinity. The shift is taken from the rounded number, so
 * that it leaves 0 of the largest however large that is. */
static TFM__TARGET TFM__INLINE v16 TFM__FN(scores16)(const float *scores, size_t n, float scale, const float *mask,
                                                     float shift) {
    const v16 more = mask ? TFM__FN(load_part)(mask, n, 0) : TFM__FN(set16)(0);
    const v16 s = TFM__FN(fma16)(TFM__FN(load_part)(scores, n, -INFINITY), TFM__FN(set16)(scale), more);
    return TFM__FN(sub16)(s, TFM__FN(set16)(shift));
}

/* The largest score * scale + mask, and no less than `largest`. */
static TFM__TARGET TFM__INLINE float TFM__FN(max_score)(const float *scores, size_t n, float scale, const float *mask,
                                                        float largest) {
    v16 most = TFM__FN(set16)(-INFINITY);
    float max;
    size_t i;
    TFM__SIXTEENS(i, lanes, n, {
        const v16 s = TFM__FN(load_part)(scores + i, lanes, -INFINITY);
        most = TFM__FN(max16)(
            most, mask ? TFM__FN(fma16)(s, TFM__FN(set16)(scale), TFM__FN(load_part)(mask + i, lanes, 0)) : s);
    })
    max = mask ? TFM__FN(max_lanes)(most) : TFM__FN(max_lanes)(most) * scale; /* the scale is positive */
    return largest > max ? largest : max;
}

static TFM__TARGET float TFM__FN(softmax_block)(tfm__softmax *softmax, float *scores, size_t n, float scale,
                                                const float *mask) {
    const float max = TFM__FN(max_score)(scores, n, scale, mask, softmax->max);
    const float shift = tfm__is_minus_infinity(max) ? 0 : max; /* nothing seen yet, and nothing here: no -inf - -inf */
    const float correction = softmax->max == max                    ? 1
                             : tfm__is_minus_infinity(softmax->max) ? 0
                                                                    : expf(softmax->max - shift);
    v16 sum = TFM__FN(set16)(0);
    size_t i;
    TFM__SIXTEENS(i, lanes, n, {
        const v16 s = TFM__FN(exp16)(TFM__FN(scores16)(scores + i, lanes, scale, mask ? mask + i : NULL, shift));
        sum = TFM__FN(add16)(sum, s);
        TFM__FN(store_part)(scores + i, s, lanes);
    })
    softmax->max = max;
    softmax->sum = softmax->sum * correction + TFM__FN(sum_lanes)(sum);
    return correction;
}

static TFM__TARGET void TFM__FN(turn)(float *x, size_t n_pairs, int interleaved, const float *angles) {
    const float *sines = angles + n_pairs;
    size_t i;
    if (interleaved) {
        tfm__scalar_turn(x, n_pairs, interleaved, angles);
        return;
    }
    TFM__SIXTEENS(i, lanes, n_pairs, {
        const v16 a = TFM__FN(load_part)(x + i, lanes, 0), b = TFM__FN(load_part)(x + n_pairs + i, lanes, 0);
        const v16 c = TFM__FN(load_part)(angles + i, lanes, 0), s = TFM__FN(load_part)(sines + i, lanes, 0);
        TFM__FN(store_part)(x + i, TFM__FN(sub16)(TFM__FN(mul16)(a, c), TFM__FN(mul16)(b, s)), lanes);
        TFM__FN(store_part)(x + n_pairs + i, TFM__FN(add16)(TFM__FN(mul16)(b, c), TFM__FN(mul16)(a, s)), lanes);
    })
}

/* NaN stays NaN: max and min return their second argument then. */
static TFM__TARGET void TFM__FN(to_f16)(const float *x, size_t n, uint16_t *halves) {
    const vf low = vf_set1(-65504.0f), high = vf_set1(65504.0f);
    float side[TFM__LANES];
    uint16_t side_halves[TFM__LANES];
    size_t i;
    for (i = 0; i + TFM__LANES <= n; i += TFM__LANES)
        vf_store_f16(halves + i, vf_min(high, vf_max(low, vf_load(x + i))));
    if (i < n) {
        memset(side, 0, sizeof side);
        memcpy(side, x + i, (n - i) * sizeof *x);
        vf_store_f16(side_halves, vf_min(high, vf_max(low, vf_load(side))));
        memcpy(halves + i, side_halves, (n - i) * sizeof *halves);
    }
}

static TFM__TARGET void TFM__FN(scale)(float *x, size_t n, float by) {
    size_t i;
    TFM__SIXTEENS(i, lanes, n, {
        TFM__FN(store_part)(x + i, TFM__FN(mul16)(TFM__FN(load_part)(x + i, lanes, 0), TFM__FN(set16)(by)), lanes);
    })
}

static TFM__TARGET void TFM__FN(multiply)(float *gate, const float *up, size_t n) {
    size_t i;
    TFM__SIXTEENS(i, lanes, n, {
        const v16 a = TFM__FN(load_part)(gate + i, lanes, 0), b = TFM__FN(load_part)(up + i, lanes, 0);
        TFM__FN(store_part)(gate + i, TFM__FN(mul16)(a, b), lanes);
    })
}

/* ---- quantization of activations: as the plain C one, to the bit */

/* The lowest byte of each lane's bits. */
static TFM__TARGET TFM__INLINE void TFM__FN(store_bytes)(int8_t *p, v16 a) {
#if TFM__LANES == 16
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_castps_si512(a.part[0])));
#elif TFM__LANES == 8
    const __m256i low = _mm256_set1_epi32(255);
    __m256i first = _mm256_and_si256(_mm256_castps_si256(a.part[0]), low);
    __m256i last = _mm256_and_si256(_mm256_castps_si256(a.part[1]), low);
    __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(first, last), 0xD8); /* packing works by halves */
    _mm_storeu_si128((__m128i *)p, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
#else
    uint16x8_t first =
        vcombine_u16(vmovn_u32(vreinterpretq_u32_f32(a.part[0])), vmovn_u32(vreinterpretq_u32_f32(a.part[1])));
    uint16x8_t last =
        vcombine_u16(vmovn_u32(vreinterpretq_u32_f32(a.part[2])), vmovn_u32(vreinterpretq_u32_f32(a.part[3])));
    vst1q_u8((uint8_t *)p, vcombine_u8(vmovn_u16(first), vmovn_u16(last)));
#endif
}

/* The group g of a row, of whose 64 numbers `n` are there. `bounded`: see the int8 product. */
static TFM__TARGET TFM__INLINE void TFM__FN(quantize_group)(const float *x, size_t n, const int bounded,
                                                            const tfm__quantized *row, size_t g) {
    const v16 magic = TFM__FN(set16)(12582912.0f);
    v16 parts[TFM__GROUP / 16], lanes = TFM__FN(set16)(0), sum = lanes, factor;
    float largest, inverse, total;
    size_t i;
    (void)bounded;
    TFM__UNROLL
    for (i = 0; i < TFM__GROUP / 16; i++) {
        parts[i] = i * 16 < n ? TFM__FN(load_part)(x + i * 16, n - i * 16, 0) : TFM__FN(set16)(0);
        lanes = TFM__FN(max_bits16)(lanes, TFM__FN(abs16)(parts[i]));
#if TFM__LANES == 8
        if (bounded)
            lanes.part[0] = vf_max_bits(lanes.part[0], vf_abs(_mm256_hadd_ps(parts[i].part[0], parts[i].part[1])));
#endif
    }
    largest = TFM__FN(max_bits_lanes)(lanes);
    inverse = largest == 0 ? 0 : 127 / largest;
    if (inverse > FLT_MAX)
        inverse = 0;
    factor = TFM__FN(set16)(inverse);
    TFM__UNROLL
    for (i = 0; i < TFM__GROUP / 16; i++) {
        const v16 rounded = TFM__FN(add16)(TFM__FN(mul16)(parts[i], factor), magic);
        TFM__FN(store_bytes)(row->q + g * TFM__GROUP + i * 16, rounded);
        sum = TFM__FN(add16)(sum, TFM__FN(sub16)(rounded, magic)); /* integers below 2^13: exact */
    }
    row->scales[g] = largest / 127;
    total = TFM__FN(sum_lanes)(sum);
    row->offsets[g] = tfm__is_finite(total) ? -128 * (int32_t)total : 0; /* if not, the q are 0 and the scale says so */
}

/* A row, group by group; whole ones know that they are. */
static TFM__TARGET TFM__INLINE void TFM__FN(quantize_row)(const float *x, size_t n, const int bounded,
                                                          const tfm__quantized *row) {
    const size_t whole = n / TFM__GROUP;
    size_t g;
    for (g = 0; g < whole; g++)
        TFM__FN(quantize_group)(x + g * TFM__GROUP, TFM__GROUP, bounded, row, g);
    if (n % TFM__GROUP)
        TFM__FN(quantize_group)(x + whole * TFM__GROUP, n % TFM__GROUP, bounded, row, whole);
}

static TFM__TARGET void TFM__FN(quantize)(const float *x, size_t n, const tfm__quantized *row) {
    TFM__FN(quantize_row)(x, n, 0, row);
}

#if TFM__LANES == 8
static TFM__TARGET void TFM__FN(quantize_bounded)(const float *x, size_t n, const tfm__quantized *row) {
    TFM__FN(quantize_row)(x, n, 1, row);
}
#endif

/* ---- int8 keys and values: as the plain C ones */

#if TFM__LANES == 16
#define vf_load_i8(p) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(p))))
#elif TFM__LANES == 8
#define vf_load_i8(p) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(p))))
#else
#define vf_load_i8 TFM__FN(load_i8)
static TFM__TARGET TFM__INLINE float32x4_t TFM__FN(load_i8)(const int8_t *p) {
    uint32_t four;
    memcpy(&four, p, sizeof four);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four))))));
}
#endif

/* One tile: rows x (16 * panels) of y. `values`, rows and panels are constants where this is inlined. */
static TFM__TARGET TFM__INLINE void TFM__FN(tile_kv)(const int values, const int rows, const int panels,
                                                     const tfm__matmul *job, const tfm__kv_panels *from, const float *x,
                                                     float *y, size_t y_stride) {
    const int columns = panels * TFM__PARTS;
    const size_t group = values ? job->k : TFM__KV_GROUP; /* inputs that share a scale; of values, each has its own */
    vf sum[TFM__ROWS_KV][TFM__PANELS_KV * TFM__PARTS], scales[TFM__PANELS_KV * TFM__PARTS];
    size_t first, k;
    int r, c;
    TFM__FN(begin_sums)(rows, columns, job->add, y, y_stride, sum);
    for (first = 0; first < job->k; first += group) {
        const size_t end = TFM__MIN(first + group, job->k);
        TFM__UNROLL
        for (c = 0; c < columns; c++)
            scales[c] = values ? vf_set1(0)
                               : vf_load_bf16(from->key_scales[c / TFM__PARTS] + first / TFM__KV_GROUP * 16 +
                                              (size_t)(c % TFM__PARTS * TFM__LANES));
        for (k = first; k < end; k++) {
            TFM__UNROLL
            for (c = 0; c < columns; c++) {
                const int8_t *q = from->q[c / TFM__PARTS] + k * 16 + (size_t)(c % TFM__PARTS * TFM__LANES);
                const vf scale = values ? vf_set1(from->value_scales[c / TFM__PARTS / 2][k]) : scales[c];
                const vf weights = vf_mul(vf_load_i8(q), scale);
                TFM__UNROLL
                for (r = 0; r < rows; r++)
                    sum[r][c] = vf_fma(vf_set1(x[(size_t)r * job->x_stride + k]), weights, sum[r][c]);
            }
        }
    }
    TFM__FN(store_sums)(rows, columns, sum, y, y_stride);
}

static TFM__TARGET TFM__INLINE void TFM__FN(tile_rows_kv)(const int values, size_t rows, const int panels,
                                                          const tfm__matmul *job, const tfm__kv_panels *from,
                                                          const float *x, float *y, size_t y_stride) {
    switch (rows) {
    case 1: TFM__FN(tile_kv)(values, 1, panels, job, from, x, y, y_stride); break;
    case 2: TFM__FN(tile_kv)(values, 2, panels, job, from, x, y, y_stride); break;
    case 3: TFM__FN(tile_kv)(values, 3, panels, job, from, x, y, y_stride); break;
#if TFM__ROWS_KV == 6
    case 4: TFM__FN(tile_kv)(values, 4, panels, job, from, x, y, y_stride); break;
    case 5: TFM__FN(tile_kv)(values, 5, panels, job, from, x, y, y_stride); break;
#endif
    default: TFM__FN(tile_kv)(values, TFM__ROWS_KV, panels, job, from, x, y, y_stride);
    }
}

/* Where the panels from a column on are. The values' scales become floats, which a step of all rows shares. */
static TFM__TARGET TFM__INLINE void TFM__FN(find_kv)(const int values, const int panels, const tfm__matmul *job,
                                                     size_t column, tfm__kv_panels *from) {
    const uint16_t *scales;
    size_t k;
    int i;
    for (i = 0; i < panels; i++, column += 16) {
        from->q[i] = values ? tfm__values_i8(job, column, &scales) : tfm__keys_i8(job, column, &scales);
        from->key_scales[i] = scales;
        if (values && i % 2 == 0)
            for (k = 0; k < job->k; k += TFM__LANES) /* in whole vectors: a page's scales are a multiple of them */
                vf_store(from->value_scales[i / 2] + k, vf_load_bf16(scales + k));
    }
}

/* All rows of y in one tile's width. */
static TFM__TARGET TFM__INLINE void TFM__FN(columns_kv)(const int values, const int panels, const tfm__matmul *job,
                                                        size_t column) {
    tfm__kv_panels from;
    size_t row;
    TFM__FN(find_kv)(values, panels, job, column, &from);
    for (row = 0; row < job->n_rows; row += TFM__ROWS_KV) {
        const size_t rows = TFM__MIN(job->n_rows - row, (size_t)TFM__ROWS_KV);
        const float *x = job->x + row * job->x_stride;
        float *y = job->y + row * job->y_stride + column, side[TFM__ROWS_KV * 16];
        const tfm__edge edge = tfm__begin_edge(job, rows, column, y, side);
        TFM__FN(tile_rows_kv)(values, rows, panels, job, &from, x, edge.y, edge.stride);
        tfm__end_edge(job, rows, column, &edge, y);
    }
}

static TFM__TARGET TFM__INLINE void TFM__FN(matmul_kv)(const int values, const tfm__matmul *job) {
    size_t column = 0;
    for (; job->n_rows <= TFM__FEW_KV && column + 16 * TFM__PANELS_KV <= job->n; column += 16 * TFM__PANELS_KV)
        TFM__FN(columns_kv)(values, TFM__PANELS_KV, job, column);
    for (; column < job->n; column += 16)
        TFM__FN(columns_kv)(values, 1, job, column);
}

static TFM__TARGET void TFM__FN(matmul_keys)(const tfm__matmul *job) {
    TFM__FN(matmul_kv)(0, job);
}

static TFM__TARGET void TFM__FN(matmul_values)(const tfm__matmul *job) {
    TFM__FN(matmul_kv)(1, job);
}

static TFM__TARGET void TFM__FN(quantize_kv)(const float *x, size_t n, int8_t *q, uint16_t *scale) {
    v16 largest = TFM__FN(set16)(0);
    float inverse;
    size_t i;
    TFM__SIXTEENS(i, lanes, n,
                  { largest = TFM__FN(max_bits16)(largest, TFM__FN(abs16)(TFM__FN(load_part)(x + i, lanes, 0))); })
    *scale = tfm__kv_scale(TFM__FN(max_bits_lanes)(largest), &inverse);
    TFM__SIXTEENS(i, lanes, n, {
        const v16 scaled = TFM__FN(mul16)(TFM__FN(load_part)(x + i, lanes, 0), TFM__FN(set16)(inverse));
        TFM__FN(store_bytes)(q + i, TFM__FN(add16)(scaled, TFM__FN(set16)(12582912.0f)));
    })
}

#endif /* what the tiers of one register have in common */

#if TFM__TIER % 10 == 0 || (TFM__TIER == 51 && defined(TFM__HAS_AVX512BF16))

/* ---- bf16 keys and values: as the plain C ones, to the bit
 * With AVX-512 BF16, one instruction takes sixteen pairs; its peak is 1.65 (Zen 5) to 2 times that of fp32. Without, a pair
 * becomes two floats: the first is its lower half moved up, the second the upper half. It is inline assembly as the int8
 * product is, for the same reason. */
#if TFM__TIER == 51
#define TFM__TARGET_PAIRS                                                                                              \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")))
#define TFM__INPUT_PAIR uint32_t
#define TFM__INPUT_STEP 1 /* a pair of inputs is one of these */
#else
#define TFM__TARGET_PAIRS TFM__TARGET
#define TFM__INPUT_PAIR float
#define TFM__INPUT_STEP 2 /* or two */

/* The nearest bf16, ties to even; NaN stays one. */
static TFM__TARGET TFM__INLINE vi TFM__FN(round_bf16)(vf x) {
    const vi bits = vf_as_integers(x), odd = vi_and(vi_shift_right(bits, 16), vi_set1(1));
    const vf rounded = vi_as_floats(vi_add(bits, vi_add(odd, vi_set1(0x7FFF))));
    return vi_and(vf_as_integers(vf_if_nan(x, vi_as_floats(vi_or(bits, vi_set1(0x400000))), rounded)), vi_set1(-65536));
}

static TFM__TARGET void TFM__FN(pair)(const float *first, const float *second, size_t n, uint16_t *pairs) {
    size_t i;
    int c;
    TFM__SIXTEENS(i, lanes, n, {
        const v16 a = TFM__FN(load_part)(first + i, lanes, 0), b = TFM__FN(load_part)(second + i, lanes, 0);
        v16 both;
        TFM__UNROLL
        for (c = 0; c < TFM__PARTS; c++)
            both.part[c] =
                vi_as_floats(vi_or(vi_shift_right(TFM__FN(round_bf16)(a.part[c]), 16), TFM__FN(round_bf16)(b.part[c])));
        TFM__FN(store_part)((float *)(void *)(pairs + 2 * i), both, lanes);
    })
}
#endif

/* Inputs of a tile that are rounded at once. */
#define TFM__INPUTS ((size_t)256)

/* 16 inputs, rounded. */
static TFM__TARGET_PAIRS TFM__INLINE void TFM__FN(round_16)(const float *x, TFM__INPUT_PAIR *rounded) {
#if TFM__TIER == 51
    __m256i pairs;
    __asm__("vcvtneps2bf16 {%1, %0|%0, %1}" : "=v"(pairs) : "v"(vf_load(x)));
    _mm256_storeu_si256((__m256i *)rounded, pairs);
#else
    int c;
    TFM__UNROLL
    for (c = 0; c < TFM__PARTS; c++)
        vf_store(rounded + c * TFM__LANES, vi_as_floats(TFM__FN(round_bf16)(vf_load(x + c * TFM__LANES))));
#endif
}

static TFM__TARGET_PAIRS TFM__INLINE void TFM__FN(round_inputs)(const float *x, size_t n, TFM__INPUT_PAIR *rounded) {
    float side[16];
    size_t i;
    for (i = 0; i + 16 <= n; i += 16)
        TFM__FN(round_16)(x + i, rounded + i / 2 * TFM__INPUT_STEP);
    if (i == n)
        return;
    memset(side, 0, sizeof side);
    memcpy(side, x + i, (n - i) * sizeof *x);
    TFM__FN(round_16)(side, rounded + i / 2 * TFM__INPUT_STEP);
}

/* sum[rows][columns] += the products of one pair of inputs; `odd`: of the first of them alone. w: the pair's weights in the
 * first panel. */
static TFM__TARGET_PAIRS TFM__INLINE void TFM__FN(add_pair)(const int rows, const int columns, const int odd,
                                                            const char *w, size_t panel_bytes, const TFM__INPUT_PAIR *x,
                                                            vf (*sum)[TFM__PANELS_KV * TFM__PARTS]) {
    int r, c;
#if TFM__TIER == 51
    vi weights[TFM__PANELS_KV];
    TFM__UNROLL
    for (c = 0; c < columns; c++) {
        weights[c] = vi_load(w + (size_t)c * panel_bytes);
        if (odd)
            weights[c] = vi_and(weights[c], vi_set1(0xFFFF));
    }
    TFM__UNROLL
    for (r = 0; r < rows; r++) {
        const vi input = vi_set1((int32_t)x[(size_t)r * (TFM__INPUTS / 2)]);
        TFM__UNROLL
        for (c = 0; c < columns; c++)
            __asm__("vdpbf16ps {%2, %1, %0|%0, %1, %2}" : "+v"(sum[r][c]) : "v"(weights[c]), "v"(input));
    }
#else
    const int held =
        rows > TFM__FEW_KV ? TFM__PARTS : 1; /* columns whose weights stay in registers while the inputs pass by */
    int base;
    TFM__UNROLL
    for (base = 0; base < columns; base += held) {
        vf first[TFM__PARTS], second[TFM__PARTS];
        TFM__UNROLL
        for (c = 0; c < held; c++) {
            const char *panel = w + (size_t)((base + c) / TFM__PARTS) * panel_bytes;
            const vi pair = vi_load(panel + (base + c) % TFM__PARTS * TFM__LANES * 4);
            first[c] = vi_as_floats(vi_shift_left(pair, 16));
            second[c] = vi_as_floats(vi_and(pair, vi_set1(-65536)));
        }
        TFM__UNROLL
        for (r = 0; r < rows; r++) {
            const vf x_first = vf_set1(x[(size_t)r * TFM__INPUTS]), x_second = vf_set1(x[(size_t)r * TFM__INPUTS + 1]);
            TFM__UNROLL
            for (c = 0; c < held; c++) {
                if (!odd)
                    sum[r][base + c] = vf_fma(x_second, second[c], sum[r][base + c]);
                sum[r][base + c] = vf_fma(x_first, first[c], sum[r][base + c]);
            }
        }
    }
#endif
}

/* One tile: rows x (16 * panels) of y, for n <= TFM__INPUTS inputs x. */
static TFM__TARGET_PAIRS TFM__INLINE void TFM__FN(tile_pairs)(const int rows, const int panels, const tfm__matmul *job,
                                                              size_t n, const TFM__INPUT_PAIR *x, const char *w,
                                                              int add, float *y, size_t y_stride) {
    const int columns = panels * TFM__PARTS;
    const size_t panel_bytes = job->panel_bytes;
    vf sum[TFM__ROWS_KV][TFM__PANELS_KV * TFM__PARTS];
    size_t pair;
    TFM__BASE(begin_sums)(rows, columns, add, y, y_stride, sum);
    for (pair = 0; pair < n / 2; pair++)
        TFM__FN(add_pair)(rows, columns, 0, w + pair * 64, panel_bytes, x + pair * TFM__INPUT_STEP, sum);
    if (n % 2)
        TFM__FN(add_pair)(rows, columns, 1, w + pair * 64, panel_bytes, x + pair * TFM__INPUT_STEP, sum);
    TFM__BASE(store_sums)(rows, columns, sum, y, y_stride);
}

static TFM__TARGET_PAIRS TFM__INLINE void TFM__FN(tile_rows_pairs)(size_t rows, const int panels,
                                                                   const tfm__matmul *job, size_t n,
                                                                   const TFM__INPUT_PAIR *x, const char *w, int add,
                                                                   float *y, size_t y_stride) {
    switch (rows) {
    case 1: TFM__FN(tile_pairs)(1, panels, job, n, x, w, add, y, y_stride); break;
    case 2: TFM__FN(tile_pairs)(2, panels, job, n, x, w, add, y, y_stride); break;
    case 3: TFM__FN(tile_pairs)(3, panels, job, n, x, w, add, y, y_stride); break;
#if TFM__ROWS_KV == 6
    case 4: TFM__FN(tile_pairs)(4, panels, job, n, x, w, add, y, y_stride); break;
    case 5: TFM__FN(tile_pairs)(5, panels, job, n, x, w, add, y, y_stride); break;
#endif
    default: TFM__FN(tile_pairs)(TFM__ROWS_KV, panels, job, n, x, w, add, y, y_stride);
    }
}

/* All columns of y[rows][job->n], for n rounded inputs of each row. w: the first one's weights. */
static TFM__TARGET_PAIRS TFM__INLINE void TFM__FN(columns_pairs)(const tfm__matmul *job, size_t rows, size_t n,
                                                                 const TFM__INPUT_PAIR *x, const char *w, int add,
                                                                 float *y) {
    float side[TFM__ROWS_KV * 16];
    size_t column = 0;
    for (; rows <= TFM__FEW_KV && column + 16 * TFM__PANELS_KV <= job->n;
         column += 16 * TFM__PANELS_KV, w += TFM__PANELS_KV * job->panel_bytes)
        TFM__FN(tile_rows_pairs)(rows, TFM__PANELS_KV, job, n, x, w, add, y + column, job->y_stride);
    for (; column < job->n; column += 16, w += job->panel_bytes) {
        const tfm__edge edge = tfm__begin_edge(job, rows, column, y + column, side);
        TFM__FN(tile_rows_pairs)(rows, 1, job, n, x, w, add, edge.y, edge.stride);
        tfm__end_edge(job, rows, column, &edge, y + column);
    }
}

static TFM__TARGET_PAIRS void TFM__FN(matmul_pairs)(const tfm__matmul *job) {
    TFM__INPUT_PAIR x[TFM__ROWS_KV * TFM__INPUTS / 2 * TFM__INPUT_STEP]; /* [rows][TFM__INPUTS], rounded */
    size_t row, first, r;
    for (row = 0; row < job->n_rows; row += TFM__ROWS_KV)
        for (first = 0; first < job->k; first += TFM__INPUTS) {
            const size_t rows = TFM__MIN(job->n_rows - row, (size_t)TFM__ROWS_KV),
                         n = TFM__MIN(job->k - first, TFM__INPUTS);
            for (r = 0; r < rows; r++)
                TFM__FN(round_inputs)
            (job->x + (row + r) * job->x_stride + first, n, x + r * (TFM__INPUTS / 2) * TFM__INPUT_STEP);
            TFM__FN(columns_pairs)
            (job, rows, n, x, (const char *)job->w + first * 32, job->add || first, job->y + row * job->y_stride);
        }
}

#undef TFM__TARGET_PAIRS
#undef TFM__INPUT_PAIR
#undef TFM__INPUT_STEP
#undef TFM__INPUTS
#endif /* bf16 keys and values */

/* ---- the int8 product
 * dot(sum, w, a): to each 32-bit sum add the products of its four weights with the four activations in `a`. Weights
 * come as w + 128, which is what VNNI's u8 x s8 takes; the 128 is taken away at the start of each group, where the sums
 * begin at -128 * (sum of the activations) instead of 0 (TFM__BIASED). The others flip the top bit, which makes w itself.
 *   AVX2: maddubs, u8 x s8 as well, adds two products in 16 bits and saturates at 32767. So activations are quantized
 *   within a bound: of two neighbours |a0 + a1| is at most 127 before they are rounded, 128 after. Then the products with
 *   bytes up to 255 are 32640 at most (of neighbours with two signs the larger one counts), and exact. It costs a scale
 *   that is 1 to 2 times as large, 1.27 times for 64 numbers of a normal distribution; a group with one outlier keeps its
 *   scale. It saves a quarter of the instructions beside |a| and w sign(a): 167 GOP/s on a core of Zen 3 at 3 GHz, whose
 *   two multipliers give 192. (Products of 16 bits, without that bound: 126.) The addition as inline assembly: GCC adds
 *   the products of several steps to each other first, for which there are no registers.
 *   AVX-512 without VNNI: maddubs adds two products in 16 bits and saturates at 32767, so it gets |a| and
 *   w sign(a), both at most 127: 2 * 127 * 127 = 32258 fits.
 *   VNNI as inline assembly: from the intrinsic GCC 12 makes code that spills the accumulators, at half the speed.
 *   NEON's dot product as inline assembly: clang has the intrinsic only if the command line asks for that extension. */
#if TFM__TIER == 51
#define TFM__BIASED 1
static TFM__TARGET TFM__INLINE vi TFM__FN(dot)(vi sum, vi w, vi a) {
    __asm__("vpdpbusd {%2, %1, %0|%0, %1, %2}" : "+v"(sum) : "v"(w), "v"(a));
    return sum;
}
#elif TFM__TIER == 21
#define TFM__BIASED 1
static TFM__TARGET TFM__INLINE vi TFM__FN(dot)(vi sum, vi w, vi a) {
    return _mm256_dpbusd_avx_epi32(sum, w, a);
}
#elif TFM__TIER == 20
#define TFM__BIASED 1
static TFM__TARGET TFM__INLINE vi TFM__FN(dot)(vi sum, vi w, vi a) {
    const vi products = _mm256_madd_epi16(_mm256_maddubs_epi16(w, a), _mm256_set1_epi16(1));
    __asm__("vpaddd {%1, %0, %0|%0, %0, %1}" : "+x"(sum) : "x"(products));
    return sum;
}
#elif TFM__TIER == 50
#define TFM__BIASED 0
static TFM__TARGET TFM__INLINE vi TFM__FN(dot)(vi sum, vi w, vi a) {
    vi plain = _mm512_xor_si512(w, _mm512_set1_epi8(-128));
    vi signed_w = _mm512_mask_sub_epi8(plain, _mm512_movepi8_mask(a), _mm512_setzero_si512(), plain);
    vi pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(a), signed_w);
    return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#elif TFM__TIER == 10
#define TFM__BIASED 0
static TFM__TARGET TFM__INLINE vi TFM__FN(dot)(vi sum, vi w, vi a) {
    int8x16_t plain = vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_s32(w), vdupq_n_u8(128)));
    int8x16_t bytes = vreinterpretq_s8_s32(a);
    int16x8_t low = vmull_s8(vget_low_s8(plain), vget_low_s8(bytes)), high = vmull_high_s8(plain, bytes);
    return vpadalq_s16(sum, vpaddq_s16(low, high)); /* two products fit 16 bits, as above */
}
#elif TFM__TIER == 11
#define TFM__BIASED 0
static TFM__TARGET TFM__INLINE vi TFM__FN(dot)(vi sum, vi w, vi a) {
    int8x16_t plain = vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_s32(w), vdupq_n_u8(128)));
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(plain), "w"(a));
    return sum;
}
#endif

#if TFM__TIER / 10 == 1
/* code[i] * 2^19 */
static TFM__TARGET TFM__INLINE int32x4_t TFM__FN(codes)(const unsigned char *code) {
    uint32_t four;
    memcpy(&four, code, sizeof four);
    return vreinterpretq_s32_u32(
        vshlq_n_u32(vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four))))), TFM__CODE_STEP));
}
#endif

/* The integer sums of a tile for one group, in several `turns`: part[rows][turns][columns]. w: the group's weights in the
 * first panel; q, offsets: of the first row. */
static TFM__TARGET TFM__INLINE void TFM__FN(sum_group)(const int rows, const int columns, const int turns,
                                                       const int once, const unsigned char *integers,
                                                       size_t panel_bytes, const int8_t *q, size_t q_stride,
                                                       const int32_t *offsets, size_t offset_stride,
                                                       vi (*part)[TFM__TURNS_I8][TFM__PANELS_I8 * TFM__PARTS]) {
    vi weights[TFM__PANELS_I8 * TFM__PARTS];
    int r, c, step, t;
    TFM__UNROLL
    for (r = 0; r < rows; r++)
        TFM__UNROLL
    for (t = 0; t < turns; t++)
        TFM__UNROLL
    for (c = 0; c < columns; c++)
        part[r][t][c] = vi_set1(TFM__BIASED && t == 0 ? offsets[(size_t)r * offset_stride] : 0);
    for (step = 0; step < 16; step += turns)
        TFM__UNROLL
    for (t = 0; t < turns; t++) {
        TFM__UNROLL
        for (c = 0; c < columns; c++) {
            const unsigned char *from = integers + (size_t)(c / TFM__PARTS) * panel_bytes + (size_t)(step + t) * 64;
            if (c % TFM__PARTS == 0 && once)
                TFM__FETCH_ONCE(from + TFM__AHEAD);
            else if (c % TFM__PARTS == 0)
                TFM__FETCH(from + TFM__AHEAD);
            weights[c] = vi_load(from + (size_t)(c % TFM__PARTS * TFM__LANES * 4));
        }
        TFM__UNROLL
        for (r = 0; r < rows; r++) {
            int32_t four;
            vi inputs;
            memcpy(&four, q + (size_t)r * q_stride + (size_t)(step + t) * 4, sizeof four);
            inputs = vi_set1(four);
            TFM__UNROLL
            for (c = 0; c < columns; c++)
                part[r][t][c] = TFM__FN(dot)(part[r][t][c], weights[c], inputs);
        }
    }
}

/* One tile: rows x (16 * panels) of y. For each group the integer sums become floats, times both scales, and are added to
 * the float sums. A wide tile has 2 x 12 accumulators, for 4 rows x 48 outputs on AVX-512, all in registers. Beside its 192
 * products on the two multipliers stand the 24 multiplications of the scales: 89 % of the peak at most. A narrow tile would
 * wait for its few accumulators; its integer sums, which are exact in any order, take `turns`. `once`: other rows won't take
 * these weights soon, so they need not stay in the second-level cache: 5 % for one sequence and for eight. */
static TFM__TARGET TFM__INLINE void TFM__FN(tile_i8)(const int rows, const int panels, const int turns, const int once,
                                                     const tfm__matmul *job, size_t row, const unsigned char *w,
                                                     const float *bias, float *y, size_t y_stride) {
    const int columns = panels * TFM__PARTS;
    const size_t groups = tfm__groups(job->k), panel_bytes = job->panel_bytes, q_stride = groups * TFM__GROUP;
    const unsigned char *integers = w + tfm__integers_at(groups), *codes = w + TFM__CACHE_LINE;
    const int8_t *q = job->quantized.q + row * q_stride;
    const float *scales = job->quantized.scales + row * groups;
    const int32_t *offsets = job->quantized.offsets + row * groups;
    vf sum[TFM__TALL_I8][TFM__PANELS_I8 * TFM__PARTS];
    size_t g;
    int r, c, t;
    TFM__UNROLL
    for (r = 0; r < rows; r++)
        TFM__UNROLL
    for (c = 0; c < columns; c++)
        sum[r][c] = vf_set1(0);
    for (g = 0; g < groups; g++) {
        vi part[TFM__TALL_I8][TFM__TURNS_I8][TFM__PANELS_I8 * TFM__PARTS];
        TFM__FN(sum_group)
        (rows, columns, turns, once, integers + g * TFM__GROUP * TFM__PANEL, panel_bytes, q + g * TFM__GROUP, q_stride,
         offsets + g, groups, part);
        TFM__UNROLL
        for (c = 0; c < columns; c++) {
            const unsigned char *panel = w + (size_t)(c / TFM__PARTS) * panel_bytes;
            const size_t lane = (size_t)(c % TFM__PARTS * TFM__LANES);
            const vf scale =
                vi_scales(panel + lane * 4, codes + (size_t)(c / TFM__PARTS) * panel_bytes + g * 16 + lane);
            TFM__UNROLL
            for (r = 0; r < rows; r++) {
                TFM__UNROLL
                for (t = 1; t < turns; t++)
                    part[r][0][c] = vi_add(part[r][0][c], part[r][t][c]);
                sum[r][c] = vf_fma(vi_to_floats(part[r][0][c]), vf_mul(scale, vf_set1(scales[(size_t)r * groups + g])),
                                   sum[r][c]);
            }
        }
    }
    TFM__UNROLL
    for (r = 0; r < rows; r++)
        TFM__UNROLL
    for (c = 0; c < columns; c++) {
        float *to = y + (size_t)r * y_stride + c * TFM__LANES;
        vf result = sum[r][c];
        if (bias)
            result = vf_add(result, vf_load(bias + c * TFM__LANES));
        if (job->add)
            result = vf_add(vf_load(to), result);
        vf_store(to, result);
    }
}

/* A wide tile, for many rows: `rows` of TFM__ROWS_I8. */
static TFM__TARGET TFM__INLINE void TFM__FN(wide_i8)(size_t rows, const tfm__matmul *job, size_t row,
                                                     const unsigned char *w, const float *bias, float *y) {
    const size_t y_stride = job->y_stride;
    switch (rows) {
    case 1: TFM__FN(tile_i8)(1, TFM__PANELS_I8, 1, 0, job, row, w, bias, y, y_stride); break;
    case 2: TFM__FN(tile_i8)(2, TFM__PANELS_I8, 1, 0, job, row, w, bias, y, y_stride); break;
#if TFM__ROWS_I8 == 4
    case 3: TFM__FN(tile_i8)(3, TFM__PANELS_I8, 1, 0, job, row, w, bias, y, y_stride); break;
#endif
    default: TFM__FN(tile_i8)(TFM__ROWS_I8, TFM__PANELS_I8, 1, 0, job, row, w, bias, y, y_stride);
    }
}

/* A tall one, for the few rows of decoding, and for columns that a wide one has not: `rows` of TFM__TALL_I8. */
static TFM__TARGET TFM__INLINE void TFM__FN(tall_i8)(size_t rows, const tfm__matmul *job, size_t row,
                                                     const unsigned char *w, const float *bias, float *y,
                                                     size_t y_stride) {
    switch (rows) {
    case 1: TFM__FN(tile_i8)(1, 1, TFM__TURNS_I8, 1, job, row, w, bias, y, y_stride); break;
    case 2: TFM__FN(tile_i8)(2, 1, TFM__TURNS_I8, 1, job, row, w, bias, y, y_stride); break;
#if TFM__TALL_I8 == 4
    case 3: TFM__FN(tile_i8)(3, 1, 1, 1, job, row, w, bias, y, y_stride); break;
#elif TFM__TALL_I8 == 8
    case 3: TFM__FN(tile_i8)(3, 1, 2, 1, job, row, w, bias, y, y_stride); break;
    case 4: TFM__FN(tile_i8)(4, 1, 2, 1, job, row, w, bias, y, y_stride); break;
    case 5: TFM__FN(tile_i8)(5, 1, 2, 1, job, row, w, bias, y, y_stride); break;
    case 6: TFM__FN(tile_i8)(6, 1, 2, 1, job, row, w, bias, y, y_stride); break;
    case 7: TFM__FN(tile_i8)(7, 1, 1, 1, job, row, w, bias, y, y_stride); break;
#endif
    default: TFM__FN(tile_i8)(TFM__TALL_I8, 1, 1, 1, job, row, w, bias, y, y_stride);
    }
}

/* All rows of y in a wide tile's columns. */
static TFM__TARGET TFM__INLINE void TFM__FN(wide_columns_i8)(const tfm__matmul *job, size_t column) {
    const unsigned char *w = (const unsigned char *)job->w + column / 16 * job->panel_bytes;
    const float *bias = job->bias ? job->bias + column : NULL;
    size_t row;
    for (row = 0; row < job->n_rows; row += TFM__ROWS_I8) {
        const size_t rows = TFM__MIN(job->n_rows - row, (size_t)TFM__ROWS_I8);
        TFM__FN(wide_i8)(rows, job, row, w, bias, job->y + row * job->y_stride + column);
    }
}

/* All rows of y in one panel's columns, which may be fewer than 16. */
static TFM__TARGET TFM__INLINE void TFM__FN(tall_columns_i8)(const tfm__matmul *job, size_t column) {
    const unsigned char *w = (const unsigned char *)job->w + column / 16 * job->panel_bytes;
    const size_t lanes = TFM__MIN(job->n - column, (size_t)16);
    const float *bias = job->bias ? job->bias + column : NULL;
    float side[TFM__TALL_I8 * 16], side_bias[16] = {0};
    size_t row;
    if (bias && lanes < 16) {
        memcpy(side_bias, bias, lanes * sizeof *bias);
        bias = side_bias;
    }
    for (row = 0; row < job->n_rows; row += TFM__TALL_I8) {
        float *y = job->y + row * job->y_stride + column;
        const size_t rows = TFM__MIN(job->n_rows - row, (size_t)TFM__TALL_I8);
        const tfm__edge edge = tfm__begin_edge(job, rows, column, y, side);
        TFM__FN(tall_i8)(rows, job, row, w, bias, edge.y, edge.stride);
        tfm__end_edge(job, rows, column, &edge, y);
    }
}

/* With few rows, as in decoding, the weights come from memory, and most of the time with them: the rows go in one tall,
 * narrow tile, or two, so that memory is read in one stream, which does not pause for rows that come after. */
static TFM__TARGET void TFM__FN(matmul_i8)(const tfm__matmul *job) {
    const int few = job->n_rows <= 2 * TFM__TALL_I8;
    size_t column = 0;
    for (; !few && column + 16 * TFM__PANELS_I8 <= job->n; column += 16 * TFM__PANELS_I8)
        TFM__FN(wide_columns_i8)(job, column);
    for (; column < job->n; column += 16)
        TFM__FN(tall_columns_i8)(job, column);
}

#define TFM__TABLE(matmul_pairs)                                                                                       \
    {                                                                                                                  \
        TFM__ISA, {NULL, TFM__BASE(matmul_f32), TFM__BASE(matmul_f16), TFM__BASE(matmul_bf16), TFM__FN(matmul_i8)},    \
            TFM__QUANTIZE, {TFM__BASE(matmul_keys), TFM__BASE(matmul_values)}, matmul_pairs, TFM__BASE(pair),          \
            TFM__BASE(quantize_kv), TFM__BASE(finish), {TFM__BASE(layer_norm), TFM__BASE(rms_norm)},                   \
            TFM__BASE(softmax_block), TFM__BASE(turn), TFM__BASE(to_f16), TFM__BASE(scale), TFM__BASE(multiply),       \
    }
static const tfm__kernels TFM__FN(kernels) = TFM__TABLE(TFM__BASE(matmul_pairs));
#if TFM__TIER == 51 && defined(TFM__HAS_AVX512BF16) /* of most CPUs with AVX-512 VNNI, not of the first ones */
static const tfm__kernels tfm__avx512bf16_kernels = TFM__TABLE(TFM__FN(matmul_pairs));
#endif
#undef TFM__TABLE

#undef TFM__FN
#undef TFM__BASE
#undef TFM__TARGET
#undef TFM__ISA
#undef TFM__LANES
#undef TFM__ROWS
#undef TFM__PANELS
#undef TFM__PARTS
#undef TFM__AHEAD
#undef v16
#undef TFM__SIXTEENS
#undef vf
#undef vf_load
#undef vf_store
#undef vf_set1
#undef vf_add
#undef vf_sub
#undef vf_mul
#undef vf_div
#undef vf_max
#undef vf_min
#undef vf_fma
#undef vf_load_f16
#undef vf_store_f16
#undef vf_load_bf16
#undef vf_abs
#undef vf_max_bits
#undef vf_if_less
#undef vf_if_nan
#undef vf_times_2_to
#undef TFM__ROWS_I8
#undef TFM__QUANTIZE
#undef TFM__PANELS_I8
#undef TFM__TALL_I8
#undef TFM__TURNS_I8
#undef TFM__BIASED
#undef TFM__ROWS_KV
#undef TFM__PANELS_KV
#undef TFM__FEW_KV
#undef vf_load_i8
#undef vi
#undef vi_load
#undef vi_set1
#undef vi_add
#undef vi_or
#undef vi_and
#undef vi_shift_left
#undef vi_shift_right
#undef vi_as_floats
#undef vf_as_integers
#undef vi_to_floats
#undef vi_scales

#endif /* TFM__TIER */

#ifndef TFM__TIER
#if defined(TFM_IMPLEMENTATION) && !defined(TFM__IMPLEMENTED_2) /* the implementation goes on */
#define TFM__IMPLEMENTED_2

/* The kernels of an instruction set that tfm_isa_supported. */
static const tfm__kernels *tfm__kernels_of(tfm_isa isa) {
    switch (isa) {
#if defined(TFM__X86)
    case TFM_ISA_AVX512VNNI:
#ifdef TFM__HAS_AVX512BF16
        if (tfm__has_leaf_7_1(TFM__AVX512BF16))
            return &tfm__avx512bf16_kernels;
#endif
        return &tfm__avx512vnni_kernels;
    case TFM_ISA_AVX512: return &tfm__avx512_kernels;
#ifdef TFM__HAS_AVXVNNI
    case TFM_ISA_AVXVNNI: return &tfm__avxvnni_kernels;
#endif
    case TFM_ISA_AVX2: return &tfm__avx2_kernels;
#elif defined(TFM__NEON)
    case TFM_ISA_NEONDOT: return &tfm__neondot_kernels;
    case TFM_ISA_NEON: return &tfm__neon_kernels;
#endif
    default: return &tfm__scalar_kernels;
    }
}

/* =====================================================================================================================
 * d. LAYERS: linear, norms, attention, feed-forward, block
 *    The functions tfm__* do the work and can't fail; the public ones check and reserve scratch memory first.
 * ================================================================================================================== */

struct tfm_engine {
    tfm_allocator allocator;
    tfm__threads threads;
    const tfm__kernels *kernels;
    float *scratch;                    /* a stack: layers take from it and put back all they took */
    size_t scratch_size, scratch_used; /* floats */
};

TFM_API tfm_engine *tfm_engine_create(const tfm_engine_options *options, tfm_error *error) {
    tfm_engine_options usual;
    tfm_allocator allocator;
    tfm_engine *engine;
    memset(&usual, 0, sizeof usual);
    if (!options)
        options = &usual;
    if (!tfm_isa_supported(options->isa)) {
        const char *name = tfm_isa_name(options->isa);
        tfm__fail(error, TFM_ERROR_UNSUPPORTED, "this CPU, or this build, can't run the instruction set '%s'",
                  name ? name : "?");
        return NULL;
    }
    allocator = tfm__allocator(&options->allocator);
    engine = (tfm_engine *)tfm__allocate_zeroed(&allocator, sizeof *engine);
    if (!engine) {
        tfm__fail_memory(error, sizeof *engine);
        return NULL;
    }
    engine->allocator = allocator;
    engine->threads.parallel_for = options->parallel_for;
    engine->threads.user = options->parallel_user;
    engine->threads.count = tfm__thread_count(options->threads);
    engine->threads.process = tfm__process();
    engine->kernels = tfm__kernels_of(options->isa == TFM_ISA_BEST ? tfm__best_isa() : options->isa);
    return engine;
}

TFM_API void tfm_engine_free(tfm_engine *engine) {
    tfm_allocator allocator;
    if (!engine)
        return;
    allocator = engine->allocator;
    tfm__release_aligned(&allocator, engine->scratch);
    tfm__release(&allocator, engine);
}

TFM_API tfm_isa tfm_engine_isa(const tfm_engine *engine) {
    return engine->kernels->isa;
}

/* ---- scratch memory */

/* Room that an array takes on the scratch stack. */
static size_t tfm__scratch_floats(size_t a, size_t b) {
    size_t floats = tfm__product(a, b);
    return floats > SIZE_MAX / 64 ? SIZE_MAX / 64 : tfm__round_up(floats, 16);
}

static tfm_status tfm__reserve(tfm_engine *engine, size_t floats, tfm_error *error) {
    float *scratch;
    if (floats <= engine->scratch_size)
        return TFM_OK;
    scratch = (float *)tfm__allocate_large(&engine->allocator, tfm__product(floats, sizeof *scratch));
    if (!scratch)
        return tfm__fail_memory(error, tfm__product(floats, sizeof *scratch));
    tfm__release_aligned(&engine->allocator, engine->scratch);
    engine->scratch = scratch;
    engine->scratch_size = floats;
    return TFM_OK;
}

/* [a][b] floats from the scratch stack, not initialised. To give back all taken since: engine->scratch_used = mark. */
static float *tfm__take(tfm_engine *engine, size_t a, size_t b) {
    float *floats = engine->scratch + engine->scratch_used;
    engine->scratch_used += tfm__scratch_floats(a, b);
    return floats;
}

/* Runs n pieces of about `work` multiplications each; not worth other threads if it is over in microseconds. */
static void tfm__run(tfm_engine *engine, size_t n, size_t work, tfm_task task, void *argument) {
    if (n > 1 && tfm__product(n, work) < 32768)
        tfm__serial_for(NULL, n, task, argument);
    else if (n)
        tfm__parallel(&engine->threads, n, task, argument);
}

/* ---- linear */

/* What a linear layer is applied to: x, or norm(x), or what the layer before has quantized already. */
typedef struct tfm__input {
    const float *x; /* [n_rows][in] */
    size_t n_rows;
    const tfm_norm *norm;     /* or NULL */
    float *normed;            /* where norm(x) goes, which may be x; NULL: nobody else wants it */
    tfm__quantized quantized; /* where q is not NULL: this, and x is not looked at */
} tfm__input;

/* Where the result goes: y (+)= it, or, if q is not NULL, its quantized form. */
typedef struct tfm__result {
    float *y; /* [n_rows][out] */
    int add;  /* 1: y += */
    tfm__quantized quantized;
} tfm__result;

typedef struct tfm__linear_job {
    const tfm_engine *engine;
    const tfm_linear *linear;
    tfm_activation activation;
    tfm__input input;
    float *normed;            /* [n_rows][in]: norm(x), if there is a norm */
    tfm__quantized quantized; /* of the input, for i8 weights */
    tfm__result result;
    size_t columns, rows, row_blocks; /* pieces: columns x rows of the result */
    size_t block_rows;                /* of a piece that are made at once */
} tfm__linear_job;

static tfm__input tfm__input_of(const float *x, size_t n_rows, const tfm_norm *norm) {
    tfm__input input;
    memset(&input, 0, sizeof input);
    input.x = x;
    input.n_rows = n_rows;
    input.norm = norm;
    return input;
}

static tfm__result tfm__result_in(float *y, int add) {
    tfm__result result;
    memset(&result, 0, sizeof result);
    result.y = y;
    result.add = add;
    return result;
}

/* The part of a quantized matrix [n_rows][in] that starts at a row and at an input, a multiple of TFM__GROUP. */
static tfm__quantized tfm__quantized_at(const tfm__quantized *x, size_t in, size_t row, size_t first) {
    tfm__quantized at = *x;
    const size_t group = row * tfm__groups(in) + first / TFM__GROUP;
    if (at.q) {
        at.q += group * TFM__GROUP;
        at.scales += group;
        at.offsets += group;
    }
    return at;
}

/* The q of a group. */
#define TFM__GROUP_FLOATS (TFM__GROUP / sizeof(float))

static size_t tfm__quantized_scratch(size_t n_rows, size_t in) {
    size_t groups = tfm__groups(in);
    return tfm__scratch_floats(n_rows, groups * TFM__GROUP_FLOATS) + 2 * tfm__scratch_floats(n_rows, groups);
}

static tfm__quantized tfm__take_quantized(tfm_engine *engine, size_t n_rows, size_t in) {
    size_t groups = tfm__groups(in);
    tfm__quantized quantized;
    quantized.q = (int8_t *)(void *)tfm__take(engine, n_rows, groups * TFM__GROUP_FLOATS);
    quantized.scales = tfm__take(engine, n_rows, groups);
    quantized.offsets = (int32_t *)(void *)tfm__take(engine, n_rows, groups);
    return quantized;
}

/* Scratch that a layer needs while it is computed: its input's norm, and its input quantized. */
static size_t tfm__linear_scratch(const tfm_linear *linear, size_t n_rows) {
    size_t in = linear->weight.shape[1];
    return tfm__scratch_floats(n_rows, in) + (linear->weight.dtype == TFM_I8 ? tfm__quantized_scratch(n_rows, in) : 0);
}

#define TFM__INPUT_ROWS ((size_t)16)

/* A piece: some rows of the input through the norm, and quantized. */
static void tfm__input_piece(void *argument, size_t index) {
    const tfm__linear_job *job = (const tfm__linear_job *)argument;
    const tfm__kernels *kernels = job->engine->kernels;
    const tfm_norm *norm = job->input.norm;
    size_t in = job->linear->weight.shape[1], row = index * TFM__INPUT_ROWS;
    size_t end = TFM__MIN(row + TFM__INPUT_ROWS, job->input.n_rows);
    for (; row < end; row++) {
        const float *x = job->input.x + row * in;
        if (norm) {
            kernels->norm[norm->kind](x, in, (const float *)norm->weight.data, (const float *)norm->bias.data,
                                      norm->eps, job->normed + row * in);
            x = job->normed + row * in;
        }
        if (job->quantized.q) {
            const tfm__quantized to = tfm__quantized_at(&job->quantized, in, row, 0);
            kernels->quantize(x, in, &to);
        }
    }
}

/* A piece of the result goes some rows at a time from the product through `finish` to its place (unless the product of i8
 * weights can write it there), so that it lies in a buffer that the first-level cache holds. (In its place it would not:
 * rows whose distance is a multiple of 4 KiB, as those of most models are, fall on the same few lines of the cache.)
 * The rows are whole tiles, of 8 rows and of 6 in a narrow piece, of 4 in a wide one of i8 weights: 32 rows would leave two
 * over, whose tile takes as long as one of four, 5 % of fp32 on AVX2. */
#define TFM__LINEAR_ROWS ((size_t)48)
#define TFM__LINEAR_COLUMNS ((size_t)48)
#define TFM__LINEAR_ROWS_I8 ((size_t)32)
#define TFM__LINEAR_COLUMNS_I8 ((size_t)192)
/* With fewer pieces than this, threads that finish would wait long for others. */
#define TFM__PIECES ((size_t)16)

/* Pieces are cut so that the weights of one stay in the second-level cache while its rows pass by, in whole tiles (48 is
 * the widest), and for i8 in whole groups of 64, which the next layer wants quantized. A few rows, whose time goes into
 * reading the weights, get narrow pieces, more of them than there are threads. The rows of one column block are
 * neighbours in the order of the pieces: its weights are read from memory once. */
static void tfm__cut(tfm__linear_job *job) {
    const int few = job->input.n_rows <= 8, i8 = job->linear->weight.dtype == TFM_I8 || job->result.quantized.q;
    size_t blocks;
    job->columns = !i8 ? TFM__LINEAR_COLUMNS : few ? TFM__GROUP : TFM__LINEAR_COLUMNS_I8;
    job->block_rows = i8 ? TFM__LINEAR_ROWS_I8 : TFM__LINEAR_ROWS;
    blocks = tfm__divide_up(job->linear->weight.shape[0], job->columns);
    job->rows = 4 * job->block_rows;
    while (job->rows > job->block_rows && blocks * tfm__divide_up(job->input.n_rows, job->rows) < TFM__PIECES)
        job->rows /= 2;
    job->row_blocks = tfm__divide_up(job->input.n_rows, job->rows);
}

/* The product of n rows of the input with the weights of a piece, which begin with that column; the place of y is open. */
static tfm__matmul tfm__piece_product(const tfm__linear_job *job, size_t row, size_t n, size_t column) {
    const tfm_tensor *weight = &job->linear->weight;
    const float *x = job->input.norm ? job->normed : job->input.x;
    const size_t out = weight->shape[0], in = weight->shape[1];
    tfm__matmul product;
    product.x = x ? x + row * in : NULL;
    product.x_stride = product.k = in;
    product.n_rows = n;
    product.quantized = tfm__quantized_at(&job->quantized, in, row, 0);
    product.panel_bytes = tfm__panel_bytes(weight->dtype, in);
    product.w = (const char *)weight->data + column / TFM__PANEL * product.panel_bytes;
    product.n = TFM__MIN(job->columns, out - column);
    product.y = NULL;
    product.y_stride = 0;
    product.add = 0;
    product.bias = NULL;
    return product;
}

static void tfm__ask_for(float *y, size_t stride, size_t n_rows, size_t n) {
    size_t r, c;
    for (r = 0; r < n_rows; r++)
        for (c = 0; c < n; c += TFM__CACHE_LINE / sizeof(float))
            TFM__FETCH_TO_WRITE(y + r * stride + c);
}

/* Some rows of a piece: from the product through a buffer and `finish` to their place, or to their quantized form. */
static void tfm__linear_rows(const tfm__linear_job *job, size_t row, size_t n, size_t column, const float *bias) {
    const tfm__kernels *kernels = job->engine->kernels;
    const size_t out = job->linear->weight.shape[0];
    float block[TFM__LINEAR_ROWS_I8 * TFM__LINEAR_COLUMNS_I8]; /* [n][columns] */
    tfm__matmul product = tfm__piece_product(job, row, n, column);
    tfm__finish finish;
    size_t r;
    finish.x = finish.y = product.y = block;
    finish.x_stride = finish.y_stride = product.y_stride = job->columns;
    finish.n_rows = n;
    finish.n = product.n;
    finish.bias = bias;
    finish.activation = job->activation;
    finish.add = job->result.add;
    if (!job->result.quantized.q) {
        finish.y = job->result.y + row * out + column;
        finish.y_stride = out;
        tfm__ask_for(finish.y, out, n, product.n);
    }
    kernels->matmul[job->linear->weight.dtype](&product);
    kernels->finish(&finish);
    for (r = 0; job->result.quantized.q && r < n; r++) {
        const tfm__quantized to = tfm__quantized_at(&job->result.quantized, out, row + r, column);
        kernels->quantize(block + r * job->columns, finish.n, &to);
    }
}

static void tfm__linear_piece(void *argument, size_t index) {
    const tfm__linear_job *job = (const tfm__linear_job *)argument;
    const tfm_tensor *weight = &job->linear->weight;
    const size_t column = index / job->row_blocks * job->columns, out = weight->shape[0];
    const float *bias = job->linear->bias.data ? (const float *)job->linear->bias.data + column : NULL;
    size_t row = index % job->row_blocks * job->rows, end = TFM__MIN(row + job->rows, job->input.n_rows);
    if (weight->dtype == TFM_I8 && !job->activation && !job->result.quantized.q) { /* all that the tile can do itself */
        tfm__matmul product = tfm__piece_product(job, row, end - row, column);
        product.bias = bias;
        product.add = job->result.add;
        product.y = job->result.y + row * out + column;
        product.y_stride = out;
        job->engine->kernels->matmul[TFM_I8](&product);
        return;
    }
    for (; row < end; row += job->block_rows)
        tfm__linear_rows(job, row, TFM__MIN(job->block_rows, end - row), column, bias);
}

/* result = activation(input W^T + b) */
static void tfm__linear(tfm_engine *engine, const tfm_linear *linear, tfm__input input, tfm_activation activation,
                        tfm__result result) {
    tfm__linear_job job;
    size_t out = linear->weight.shape[0], in = linear->weight.shape[1], mark = engine->scratch_used;
    job.engine = engine;
    job.linear = linear;
    job.activation = activation;
    job.input = input;
    job.normed = input.norm && !input.normed ? tfm__take(engine, input.n_rows, in) : input.normed;
    job.quantized = input.quantized;
    if (!job.quantized.q) {
        if (linear->weight.dtype == TFM_I8)
            job.quantized = tfm__take_quantized(engine, input.n_rows, in);
        if (job.quantized.q || input.norm)
            tfm__run(engine, tfm__divide_up(input.n_rows, TFM__INPUT_ROWS), TFM__INPUT_ROWS * 4 * in, tfm__input_piece,
                     &job);
    }
    job.result = result;
    tfm__cut(&job);
    tfm__run(engine, tfm__divide_up(out, job.columns) * job.row_blocks,
             TFM__MIN(job.input.n_rows, job.rows) * job.columns * in, tfm__linear_piece, &job);
    engine->scratch_used = mark;
}

static tfm_status tfm__check_linear(const tfm_linear *linear, const char *name, size_t out, size_t in,
                                    tfm_error *error) {
    const tfm_tensor *weight = &linear->weight, *bias = &linear->bias;
    if (!weight->data || weight->n_dims != 2 || weight->layout != TFM_PANELS ||
        !tfm__is_matrix_dtype(weight->dtype, TFM_PANELS))
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "%s: the weight is not a packed matrix (see tfm_pack)", name);
    if ((out && weight->shape[0] != out) || (in && weight->shape[1] != in))
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "%s: the weight is [%lu, %lu], expected [%lu, %lu]", name,
                         (unsigned long)weight->shape[0], (unsigned long)weight->shape[1],
                         (unsigned long)(out ? out : weight->shape[0]), (unsigned long)(in ? in : weight->shape[1]));
    if (bias->data && (bias->dtype != TFM_F32 || bias->n_dims != 1 || bias->shape[0] != weight->shape[0]))
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "%s: the bias is not an f32 vector of %lu numbers", name,
                         (unsigned long)weight->shape[0]);
    return TFM_OK;
}

TFM_API tfm_status tfm_linear_forward(tfm_engine *engine, const tfm_linear *linear, const float *x, size_t n_rows,
                                      float *y, tfm_error *error) {
    tfm_status status = tfm__check_linear(linear, "tfm_linear_forward", 0, 0, error);
    if (status == TFM_OK)
        status = tfm__reserve(engine, tfm__linear_scratch(linear, n_rows), error);
    if (status == TFM_OK && n_rows)
        tfm__linear(engine, linear, tfm__input_of(x, n_rows, NULL), TFM_NO_ACTIVATION, tfm__result_in(y, 0));
    return status;
}

/* ---- norms and activations */

typedef struct tfm__norm_job {
    const tfm_engine *engine;
    const tfm_norm *norm;
    const float *x; /* [n_rows][d_model] */
    size_t n_rows;
    float *y;
} tfm__norm_job;

#define TFM__NORM_ROWS ((size_t)16)

static void tfm__norm_piece(void *argument, size_t index) {
    const tfm__norm_job *job = (const tfm__norm_job *)argument;
    const tfm_norm *norm = job->norm;
    size_t n = norm->weight.shape[0], row = index * TFM__NORM_ROWS, end = TFM__MIN(row + TFM__NORM_ROWS, job->n_rows);
    for (; row < end; row++)
        job->engine->kernels->norm[norm->kind](job->x + row * n, n, (const float *)norm->weight.data,
                                               (const float *)norm->bias.data, norm->eps, job->y + row * n);
}

static void tfm__norm(tfm_engine *engine, const tfm_norm *norm, const float *x, size_t n_rows, float *y) {
    tfm__norm_job job;
    job.engine = engine;
    job.norm = norm;
    job.x = x;
    job.n_rows = n_rows;
    job.y = y;
    tfm__run(engine, tfm__divide_up(n_rows, TFM__NORM_ROWS), TFM__NORM_ROWS * norm->weight.shape[0] * 2,
             tfm__norm_piece, &job);
}

static tfm_status tfm__check_norm(const tfm_norm *norm, const char *name, size_t d_model, tfm_error *error) {
    const tfm_tensor *weight = &norm->weight, *bias = &norm->bias;
    if ((unsigned)norm->kind > TFM_RMS_NORM)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "%s: unknown kind of norm %d", name, (int)norm->kind);
    if (!weight->data || weight->dtype != TFM_F32 || weight->n_dims != 1 || (d_model && weight->shape[0] != d_model) ||
        (bias->data && (bias->dtype != TFM_F32 || bias->n_dims != 1 || bias->shape[0] != weight->shape[0])))
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "%s: weight and bias must be f32 vectors of d_model numbers", name);
    return TFM_OK;
}

TFM_API tfm_status tfm_norm_forward(tfm_engine *engine, const tfm_norm *norm, const float *x, size_t n_rows, float *y,
                                    tfm_error *error) {
    tfm_status status = tfm__check_norm(norm, "tfm_norm_forward", 0, error);
    if (status == TFM_OK)
        tfm__norm(engine, norm, x, n_rows, y);
    return status;
}

TFM_API tfm_status tfm_activation_forward(tfm_engine *engine, tfm_activation activation, const float *x, size_t n,
                                          float *y, tfm_error *error) {
    tfm__finish job;
    if ((unsigned)activation >= TFM_ACTIVATION_COUNT)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "unknown activation %d", (int)activation);
    memset(&job, 0, sizeof job);
    job.x = x;
    job.y = y;
    job.n_rows = 1;
    job.n = n;
    job.activation = activation;
    engine->kernels->finish(&job);
    return TFM_OK;
}

/* ---- keys and values
 * Attention multiplies twice: queries with keys, probabilities with values. Both are the matrix product of floor c when
 * keys lie in panels of 16 tokens [tokens / 16][head_dim][16] (outputs: tokens) and values in panels of 16 dimensions
 * [head_dim / 16][tokens][16] (outputs: dimensions). So that is how the cache stores them; with bf16 inputs stand in pairs,
 * and with int8 the scales between: see "bf16 keys and values" and "int8 keys and values" in floor c. */

static int tfm__is_kv_dtype(tfm_dtype dtype) {
    return dtype == TFM_F32 || dtype == TFM_F16 || dtype == TFM_BF16 || dtype == TFM_I8;
}

/* Scales of a token's key, or value, of one head. */
static size_t tfm__kv_scales(const tfm_kv *kv) {
    return kv->dtype == TFM_I8 ? tfm__kv_groups(kv->head_dim) : 0;
}

/* Bytes of one head's keys, or values, in one page. */
static size_t tfm__kv_head_bytes(const tfm_kv *kv) {
    size_t numbers = tfm__product(tfm__dtype_sizes[kv->dtype], tfm__round_up(kv->head_dim, TFM__PANEL));
    return tfm__product(kv->page_tokens, tfm__sum(numbers, tfm__kv_scales(kv) * sizeof(uint16_t)));
}

/* Bytes from one panel of keys to the next; and from one of values, with int8 from one group. */
static size_t tfm__key_panel_bytes(const tfm_kv *kv) {
    if (kv->dtype == TFM_I8)
        return tfm__keys_i8_bytes(kv->head_dim);
    return TFM__PANEL * (kv->dtype == TFM_BF16 ? tfm__round_up(kv->head_dim, 2) : kv->head_dim) *
           tfm__dtype_sizes[kv->dtype];
}

static size_t tfm__value_panel_bytes(const tfm_kv *kv) {
    return kv->dtype == TFM_I8 ? TFM__VALUES_I8_BYTES : TFM__PANEL * kv->page_tokens * tfm__dtype_sizes[kv->dtype];
}

static size_t tfm__kv_bytes(const tfm_kv *kv, size_t n_pages) {
    return tfm__product(tfm__product(kv->n_layers, n_pages),
                        tfm__product(tfm__product(2, kv->n_kv_heads), tfm__kv_head_bytes(kv)));
}

/* Keys (what = 0) or values (1) of a head in the page that holds the tokens [page * TFM_KV_PAGE, ...). A page has all
 * layers' side by side: memory that no token has come to is not touched. */
static char *tfm__kv_at(const tfm_kv *kv, size_t layer, size_t page, size_t what, size_t head) {
    size_t in_pool = kv->pages ? kv->pages[page] : page;
    return (char *)kv->pool +
           (((in_pool * kv->n_layers + layer) * 2 + what) * kv->n_kv_heads + head) * tfm__kv_head_bytes(kv);
}

/* Where in a head's keys or values of one page the numbers [d, ...) of its token `at` begin, d a multiple of 16. */
static size_t tfm__kv_number(const tfm_kv *kv, size_t what, size_t at, size_t d) {
    const size_t size = tfm__dtype_sizes[kv->dtype];
    if (!what)
        return at / TFM__PANEL * tfm__key_panel_bytes(kv) + TFM__PANEL * sizeof(uint16_t) * tfm__kv_scales(kv) +
               (d * TFM__PANEL + at % TFM__PANEL * (kv->dtype == TFM_BF16 ? 2 : 1)) * size;
    if (kv->dtype == TFM_BF16)
        return (d * kv->page_tokens + at / 2 * 2 * TFM__PANEL + at % 2) * size;
    if (kv->dtype == TFM_I8)
        return d / TFM__KV_GROUP * TFM__VALUES_I8_BYTES + TFM_KV_PAGE * (sizeof(uint16_t) + d % TFM__KV_GROUP) +
               at * TFM__PANEL;
    return (d * kv->page_tokens + at * TFM__PANEL) * size;
}

/* And the i-th of these numbers: keys have them 16 apart, values side by side, in bf16 with those of another token or of 15
 * others between. */
static size_t tfm__kv_step(const tfm_kv *kv, size_t what, size_t i) {
    const size_t size = tfm__dtype_sizes[kv->dtype];
    if (kv->dtype == TFM_BF16)
        return (what ? 2 * i : i / 2 * 2 * TFM__PANEL + i % 2) * size;
    return (what ? i : i * TFM__PANEL) * size;
}

/* And the scale of a group, with int8. */
static size_t tfm__kv_scale_at(const tfm_kv *kv, size_t what, size_t at, size_t group) {
    return what
               ? group * TFM__VALUES_I8_BYTES + at * sizeof(uint16_t)
               : at / TFM__PANEL * tfm__key_panel_bytes(kv) + (group * TFM__PANEL + at % TFM__PANEL) * sizeof(uint16_t);
}

TFM_API tfm_status tfm_kv_create(tfm_kv *kv, tfm_dtype dtype, size_t n_layers, size_t n_kv_heads, size_t head_dim,
                                 size_t capacity, const tfm_allocator *allocator, tfm_error *error) {
    tfm_allocator memory = tfm__allocator(allocator);
    size_t size;
    memset(kv, 0, sizeof *kv);
    if (!tfm__is_kv_dtype(dtype))
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "tfm_kv_create: keys and values can be f32, f16, bf16 or int8");
    if (!n_layers || !n_kv_heads || !head_dim)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "tfm_kv_create: layers, heads and head_dim must be greater than 0");
    kv->dtype = dtype;
    kv->n_layers = n_layers;
    kv->n_kv_heads = n_kv_heads;
    kv->head_dim = head_dim;
    kv->capacity = capacity;
    kv->page_tokens = TFM_KV_PAGE;
    kv->n_pool_pages = tfm__divide_up(capacity, TFM_KV_PAGE);
    size = tfm__kv_bytes(kv, kv->n_pool_pages);
    kv->pool = tfm__allocate_large(&memory, size);
    return kv->pool ? TFM_OK : tfm__fail_memory(error, size);
}

TFM_API void tfm_kv_free(tfm_kv *kv, const tfm_allocator *allocator) {
    tfm_allocator memory = tfm__allocator(allocator);
    tfm__release_aligned(&memory, kv->pool);
    memset(kv, 0, sizeof *kv);
}

/* ---- attention */

/* What all blocks of a stack have in common in one pass. */
typedef struct tfm__pass {
    const tfm_span *spans;
    size_t n_spans, n_rows;
    const float *angles; /* [n_rows][2][n_pairs]: cos and sin of rotary positions; or NULL */
    const float
        *bias; /* [n_heads][2 reach - 1]: relative positions, of the distances 1 - reach to reach - 1; or NULL */
    size_t reach;
} tfm__pass;

typedef struct tfm__attention_job {
    const tfm_engine *engine;
    const tfm_attention *attention;
    const tfm__pass *pass;
    size_t layer;
    int cross;            /* 1: keys and values are in the spans' memories */
    const size_t *wanted; /* [n_spans]: how many of each span's rows, the last ones, are to attend; NULL: all of them */
    const tfm_kv *uncached; /* where spans without a cache put their keys and values: [n_spans], or NULL */
    const float *queries;   /* [rows][query_stride]; cross: [wanted rows][query_stride] */
    size_t query_stride;
    const float *keys; /* [rows][key_stride]: n_kv_heads keys, then as many values */
    size_t key_stride;
    float *context; /* [wanted rows][n_heads head_dim]: the heads' results */
} tfm__attention_job;

/* Tokens that a span's cache holds from before. */
static size_t tfm__past(const tfm_span *span) {
    return span->kv ? span->kv->n_tokens : 0;
}

static size_t tfm__wanted_rows(const tfm__attention_job *job, size_t span) {
    return job->wanted ? job->wanted[span] : job->pass->spans[span].n_rows;
}

/* One span of a job: its keys and values, its rows, and the tokens before it. */
typedef struct tfm__span_view {
    const tfm_span *span;
    const tfm_kv *kv;
    size_t layer; /* of the cache: a temporary one has a single layer, which serves all */
    size_t past, n_keys;
    size_t row;     /* of x, the first */
    size_t wanted;  /* rows that attend */
    size_t context; /* row of the context, the first */
} tfm__span_view;

/* The span that piece number *index belongs to, when span i has pieces_of(job, i) pieces; *index becomes the number
 * within the span. */
static tfm__span_view tfm__find_span(const tfm__attention_job *job, size_t *index,
                                     size_t (*pieces_of)(const tfm__attention_job *job, size_t span)) {
    tfm__span_view view;
    size_t i, pieces;
    view.row = view.context = 0;
    for (i = 0; *index >= (pieces = pieces_of(job, i)); i++) {
        *index -= pieces;
        view.row += job->pass->spans[i].n_rows;
        view.context += tfm__wanted_rows(job, i);
    }
    view.span = job->pass->spans + i;
    view.wanted = tfm__wanted_rows(job, i);
    view.layer = job->cross || view.span->kv ? job->layer : 0;
    if (job->cross) {
        view.kv = view.span->memory;
        view.past = 0;
        view.n_keys = view.kv->n_tokens;
    } else {
        view.kv = view.span->kv ? view.span->kv : job->uncached + i;
        view.past = tfm__past(view.span);
        view.n_keys = view.past + view.span->n_rows;
    }
    return view;
}

static size_t tfm__all_pieces(const tfm__attention_job *job,
                              size_t (*pieces_of)(const tfm__attention_job *job, size_t span)) {
    size_t pieces = 0, i;
    for (i = 0; i < job->pass->n_spans; i++)
        pieces += pieces_of(job, i);
    return pieces;
}

static size_t tfm__qkv_width(const tfm_attention *attention) {
    return (attention->n_heads + 2 * attention->n_kv_heads) * attention->head_dim;
}

/* Query rows that one piece takes through the keys together: a multiple of every tile's rows, and few enough that their
 * scores for a page (12 KiB) stay in the first-level cache. */
#define TFM__QUERIES ((size_t)24)

/* A span of one token is cut by KV heads, and who attends with a head stores the token's keys and values for it first:
 * the cache lines that both need come from memory once. */
static int tfm__stores_itself(const tfm__attention_job *job, size_t span) {
    return !job->cross && job->pass->spans[span].n_rows == 1 && tfm__wanted_rows(job, span) == 1 &&
           job->attention->n_heads / job->attention->n_kv_heads <= TFM__QUERIES;
}

static size_t tfm__store_pieces(const tfm__attention_job *job, size_t span) {
    const tfm_span *from = job->pass->spans + span;
    if (tfm__stores_itself(job, span))
        return 0;
    return tfm__divide_up(tfm__past(from) % TFM__PANEL + from->n_rows, TFM__PANEL);
}

/* Turns 16 rows of [dim] numbers, `stride` apart, into columns [dim][16]. In the order of the columns: row by row, each
 * number would go to a cache line of its own. */
static void tfm__turn_rows(const float *rows, size_t stride, size_t dim, float *columns) {
    size_t d, i;
    for (d = 0; d < dim; d++) {
        const float *from = rows + d;
        TFM__UNROLL
        for (i = 0; i < TFM__PANEL; i++, from += stride)
            columns[d * TFM__PANEL + i] = *from;
    }
}

/* One head's keys and values of tokens that are neighbours in a panel, n <= 16 rows `stride` apart, go into the panels:
 * single numbers, and runs of 16. */
static void tfm__store_f32(const float *key, const float *value, size_t stride, size_t n, size_t dim,
                           size_t page_tokens, float *keys, float *values) {
    size_t d, i;
    if (n == TFM__PANEL)
        tfm__turn_rows(key, stride, dim, keys);
    else
        for (i = 0; i < n; i++)
            for (d = 0; d < dim; d++)
                keys[d * TFM__PANEL + i] = key[i * stride + d];
    for (d = 0; d + TFM__PANEL <= dim; d += TFM__PANEL)
        for (i = 0; i < n; i++)
            memcpy(values + d * page_tokens + i * TFM__PANEL, value + i * stride + d, TFM__PANEL * sizeof *value);
    for (i = 0; i < n && d < dim; i++)
        memcpy(values + d * page_tokens + i * TFM__PANEL, value + i * stride + d, (dim - d) * sizeof *value);
}

static void tfm__store_f16(const tfm__kernels *kernels, const float *key, const float *value, size_t stride, size_t n,
                           size_t dim, size_t page_tokens, uint16_t *keys, uint16_t *values) {
    float columns[TFM__PANEL * TFM__PANEL];
    uint16_t halves[TFM__PANEL * TFM__PANEL];
    size_t d, i, some;
    for (d = 0; d < dim; d += some) {
        some = TFM__MIN(TFM__PANEL, dim - d);
        if (n == TFM__PANEL) {
            tfm__turn_rows(key + d, stride, some, columns);
            kernels->to_f16(columns, some * TFM__PANEL, keys + d * TFM__PANEL);
        } else
            for (i = 0; i < n; i++) {
                size_t k;
                kernels->to_f16(key + i * stride + d, some, halves);
                for (k = 0; k < some; k++)
                    keys[(d + k) * TFM__PANEL + i] = halves[k];
            }
        for (i = 0; i < n; i++)
            kernels->to_f16(value + i * stride + d, some, values + d * page_tokens + i * TFM__PANEL);
    }
}

/* Numbers of one token that become pairs together. */
#define TFM__STORED ((size_t)64)

/* One token's key, in pairs of dimensions; a panel's keys have the pairs 16 apart. */
static void tfm__store_bf16_key(const tfm__kernels *kernels, const float *key, size_t dim, uint16_t *keys) {
    float first[TFM__STORED / 2], second[TFM__STORED / 2];
    uint16_t pairs[TFM__STORED];
    size_t d, k, some;
    for (d = 0; d < dim; d += some) {
        some = TFM__MIN(TFM__STORED, dim - d);
        for (k = 0; k < some; k += 2) {
            first[k / 2] = key[d + k];
            second[k / 2] = k + 1 < some ? key[d + k + 1] : 0;
        }
        kernels->pair(first, second, tfm__divide_up(some, 2), pairs);
        for (k = 0; k < some; k += 2)
            memcpy(keys + (d + k) * TFM__PANEL, pairs + k, 2 * sizeof *keys);
    }
}

/* The keys of n tokens; `keys`: the first one's. */
static void tfm__store_bf16_keys(const tfm__kernels *kernels, const float *key, size_t stride, size_t n, size_t dim,
                                 uint16_t *keys) {
    float columns[TFM__PANEL][TFM__PANEL];
    size_t d, i, k, some;
    for (i = 0; i < n && n < TFM__PANEL; i++)
        tfm__store_bf16_key(kernels, key + i * stride, dim, keys + 2 * i);
    for (d = 0; d < dim && n == TFM__PANEL; d += some) {
        some = TFM__MIN(TFM__PANEL, dim - d);
        tfm__turn_rows(key + d, stride, some, *columns);
        if (some % 2)
            memset(columns[some], 0, sizeof *columns);
        for (k = 0; k < some; k += 2)
            kernels->pair(columns[k], columns[k + 1], TFM__PANEL, keys + (d + k) * TFM__PANEL);
    }
}

/* One token's value: a half of each pair, the other is another token's. `values`: the pairs' in the head's first panel. */
static void tfm__store_bf16_value(const tfm__kernels *kernels, const float *value, size_t dim, size_t page_tokens,
                                  size_t at, uint16_t *values) {
    uint16_t pairs[2 * TFM__STORED];
    size_t d, k, some;
    for (d = 0; d < dim; d += some) {
        some = TFM__MIN(TFM__STORED, dim - d);
        kernels->pair(value + d, value + d, some, pairs);
        for (k = 0; k < some; k++)
            values[(d + k) / TFM__PANEL * TFM__PANEL * page_tokens + k % TFM__PANEL * 2 + at % 2] = pairs[2 * k];
    }
}

/* The values of n tokens, in pairs of tokens, the first of which stands at `at` in the page; `values`: the head's. */
static void tfm__store_bf16_values(const tfm__kernels *kernels, const float *value, size_t stride, size_t n, size_t dim,
                                   size_t page_tokens, size_t at, uint16_t *values) {
    size_t d, i, step;
    for (i = 0; i < n; i += step, value += step * stride) {
        uint16_t *to = values + (at + i) / 2 * 2 * TFM__PANEL;
        step = (at + i) % 2 == 0 && i + 1 < n ? 2 : 1;
        if (step == 1)
            tfm__store_bf16_value(kernels, value, dim, page_tokens, at + i, to);
        for (d = 0; d < dim && step == 2; d += TFM__PANEL)
            kernels->pair(value + d, value + stride + d, TFM__MIN(TFM__PANEL, dim - d), to + d * page_tokens);
    }
}

static void tfm__store_i8(const tfm__kernels *kernels, const tfm_kv *kv, const float *key, const float *value,
                          size_t at, char *keys, char *values) {
    int8_t q[TFM__KV_GROUP];
    size_t d, i, n;
    for (d = 0; d < kv->head_dim; d += n) {
        uint16_t *key_scale = (uint16_t *)(void *)(keys + tfm__kv_scale_at(kv, 0, at, d / TFM__KV_GROUP));
        uint16_t *value_scale = (uint16_t *)(void *)(values + tfm__kv_scale_at(kv, 1, at, d / TFM__KV_GROUP));
        char *to = keys + tfm__kv_number(kv, 0, at, d);
        n = TFM__MIN(TFM__KV_GROUP, kv->head_dim - d);
        kernels->quantize_kv(key + d, n, q, key_scale);
        for (i = 0; i < n; i++)
            to[tfm__kv_step(kv, 0, i)] = (char)q[i];
        kernels->quantize_kv(value + d, n, q, value_scale);
        for (i = 0; i < n; i += TFM__PANEL)
            memcpy(values + tfm__kv_number(kv, 1, at, d + i), q + i, TFM__PANEL);
    }
}

/* One head's keys and values of a span's tokens [first, first + n), which are neighbours in a panel, go into its cache. */
static void tfm__store(const tfm__attention_job *job, const tfm__span_view *view, size_t first, size_t n, size_t head) {
    const tfm_attention *attention = job->attention;
    const tfm__kernels *kernels = job->engine->kernels;
    const tfm_kv *kv = view->kv;
    const size_t dim = attention->head_dim, stride = job->key_stride;
    const size_t page = (view->past + first) / TFM_KV_PAGE, at = (view->past + first) % TFM_KV_PAGE;
    const float *key = job->keys + (view->row + first) * stride + head * dim;
    const float *value = key + attention->n_kv_heads * dim;
    char *keys = tfm__kv_at(kv, view->layer, page, 0, head), *values = tfm__kv_at(kv, view->layer, page, 1, head);
    size_t i;
    if (at % TFM__PANEL == 0 && n < TFM__PANEL) /* products read whole panels: nothing unwritten */
        memset(keys + at / TFM__PANEL * tfm__key_panel_bytes(kv), 0, tfm__key_panel_bytes(kv));
    if (kv->dtype == TFM_I8) {
        for (i = 0; i < n; i++)
            tfm__store_i8(kernels, kv, key + i * stride, value + i * stride, at + i, keys, values);
        return;
    }
    keys += tfm__kv_number(kv, 0, at, 0);
    if (kv->dtype == TFM_BF16) {
        tfm__store_bf16_keys(kernels, key, stride, n, dim, (uint16_t *)(void *)keys);
        tfm__store_bf16_values(kernels, value, stride, n, dim, kv->page_tokens, at, (uint16_t *)(void *)values);
        return;
    }
    values += tfm__kv_number(kv, 1, at, 0);
    if (kv->dtype == TFM_F16)
        tfm__store_f16(kernels, key, value, stride, n, dim, kv->page_tokens, (uint16_t *)(void *)keys,
                       (uint16_t *)(void *)values);
    else
        tfm__store_f32(key, value, stride, n, dim, kv->page_tokens, (float *)(void *)keys, (float *)(void *)values);
}

/* A piece: the tokens of a span that go into one panel, all heads, so that memory is read along its rows. */
static void tfm__store_piece(void *argument, size_t index) {
    const tfm__attention_job *job = (const tfm__attention_job *)argument;
    const tfm__span_view view = tfm__find_span(job, &index, tfm__store_pieces);
    const size_t start = view.past % TFM__PANEL; /* of the first panel, so much is there */
    const size_t first = index ? index * TFM__PANEL - start : 0;
    const size_t end = TFM__MIN((index + 1) * TFM__PANEL - start, view.span->n_rows);
    size_t head;
    for (head = 0; head < job->attention->n_kv_heads; head++)
        tfm__store(job, &view, first, end - first, head);
}

/* Where one token attends, the queries that share a KV head are the rows of the product. Where more do, each head's are,
 * TFM__QUERIES tokens at a time. */
static size_t tfm__attend_pieces(const tfm__attention_job *job, size_t span) {
    size_t n_heads = job->attention->n_heads, n_kv_heads = job->attention->n_kv_heads;
    size_t wanted = tfm__wanted_rows(job, span);
    if (wanted == 1)
        return n_kv_heads * tfm__divide_up(n_heads / n_kv_heads, TFM__QUERIES);
    return n_heads * tfm__divide_up(wanted, TFM__QUERIES);
}

/* Queries that go through one head's keys and values together. */
typedef struct tfm__queries {
    const float *query; /* [n][query_stride] */
    size_t query_stride, n;
    size_t kv_head;
    size_t head, head_step; /* query i is of the head head + i * head_step */
    size_t first, step;     /* and stands at the position first + i * step of the sequence */
    float *context;         /* [n][context_stride] */
    size_t context_stride;
} tfm__queries;

/* The keys [low, high) that a query may see, as far as causality and window go. */
typedef struct tfm__sight {
    size_t low, high;
} tfm__sight;

static tfm__sight tfm__sight_of(const tfm__attention_job *job, const tfm__span_view *view, const tfm__queries *queries,
                                size_t i) {
    const int causal = job->attention->causal && !job->cross;
    tfm__sight sight;
    sight.high = causal ? queries->first + i * queries->step + 1 : view->n_keys;
    sight.low = causal && job->attention->window && sight.high > job->attention->window
                    ? sight.high - job->attention->window
                    : 0;
    return sight;
}

/* What is added to a query's scores of the keys from `start` on: relative positions, or the caller's mask, or both (then
 * in `sum`); NULL: nothing. */
static const float *tfm__score_bias(const tfm__attention_job *job, const tfm__span_view *view,
                                    const tfm__queries *queries, size_t i, size_t start, size_t n, float *sum) {
    const size_t position = queries->first + i * queries->step, head = queries->head + i * queries->head_step;
    const float *mask = job->cross ? NULL : view->span->mask, *bias = job->cross ? NULL : job->pass->bias;
    size_t k;
    if (mask)
        mask += (view->span->same_mask ? 0 : (position - view->past) * view->n_keys) + start;
    if (bias)
        bias += head * (2 * job->pass->reach - 1) + job->pass->reach - 1 + start - position;
    if (!mask || !bias)
        return mask ? mask : bias;
    for (k = 0; k < n; k++)
        sum[k] = mask[k] + bias[k];
    return sum;
}

/* The scores of one query and one page, row[0 .. keys), become probabilities to be; 0 for keys that it does not see.
 * Returns the factor for what was summed before. */
static float tfm__weigh(const tfm__attention_job *job, const tfm__span_view *view, const tfm__queries *queries,
                        size_t i, size_t start, size_t keys, tfm__softmax *softmax, float *row) {
    const tfm__kernels *kernels = job->engine->kernels;
    const tfm__sight sight = tfm__sight_of(job, view, queries, i);
    size_t end = sight.high <= start ? 0 : TFM__MIN(sight.high - start, keys);
    size_t first = sight.low <= start ? 0 : TFM__MIN(sight.low - start, end), n = end - first;
    float sum[TFM_KV_PAGE], scale = job->attention->scale, softcap = job->attention->softcap, correction;
    if (softcap > 0) {
        tfm__finish tanh_of;
        kernels->scale(row + first, n, scale / softcap);
        memset(&tanh_of, 0, sizeof tanh_of);
        tanh_of.x = tanh_of.y = row + first;
        tanh_of.n_rows = 1;
        tanh_of.n = n;
        tanh_of.activation = TFM_TANH;
        kernels->finish(&tanh_of);
        scale = softcap;
    }
    correction = kernels->softmax_block(softmax, row + first, n, scale,
                                        tfm__score_bias(job, view, queries, i, start + first, n, sum));
    memset(row, 0, first * sizeof *row);
    memset(row + end, 0, (keys - end) * sizeof *row);
    return correction;
}

/* The product of attention with keys (what = 0) or values (1) of that type. */
static void tfm__matmul_kv(const tfm__kernels *kernels, tfm_dtype dtype, size_t what, const tfm__matmul *product) {
    (dtype == TFM_I8     ? kernels->matmul_kv[what]
     : dtype == TFM_BF16 ? kernels->matmul_pairs
                         : kernels->matmul[dtype])(product);
}

/* softmax(q k^T scale + mask) v, page by page with a running softmax, in the same order for every query whatever
 * queries stand beside it. */
static void tfm__attend(const tfm__attention_job *job, const tfm__span_view *view, const tfm__queries *queries) {
    const tfm__kernels *kernels = job->engine->kernels;
    const tfm_dtype dtype = view->kv->dtype;
    size_t dim = job->attention->head_dim, i;
    const size_t begin = tfm__sight_of(job, view, queries, 0).low / TFM_KV_PAGE * TFM_KV_PAGE;
    const size_t end = tfm__sight_of(job, view, queries, queries->n - 1).high; /* of the query that sees most */
    size_t start;
    float scores[TFM__QUERIES * TFM_KV_PAGE]; /* [n][TFM_KV_PAGE] */
    tfm__softmax softmax[TFM__QUERIES];
    tfm__matmul product;
    for (i = 0; i < queries->n; i++) {
        softmax[i].max = -INFINITY;
        softmax[i].sum = 0;
    }
    product.n_rows = queries->n;
    for (start = begin; start < end; start += TFM_KV_PAGE) {
        size_t keys = TFM__MIN((size_t)TFM_KV_PAGE, end - start);
        product.x = queries->query; /* scores [n][keys] = queries [n][head_dim] keys^T */
        product.x_stride = queries->query_stride;
        product.w = tfm__kv_at(view->kv, view->layer, start / TFM_KV_PAGE, 0, queries->kv_head);
        product.panel_bytes = tfm__key_panel_bytes(view->kv);
        product.n = tfm__round_up(keys, TFM__PANEL); /* the scores past the last key are not looked at */
        product.k = dim;
        product.y = scores;
        product.y_stride = TFM_KV_PAGE;
        product.add = 0;
        tfm__matmul_kv(kernels, dtype, 0, &product);
        for (i = 0; i < queries->n; i++) {
            float correction = tfm__weigh(job, view, queries, i, start, keys, softmax + i, scores + i * TFM_KV_PAGE);
            if (start > begin && correction != 1)
                kernels->scale(queries->context + i * queries->context_stride, dim, correction);
        }
        product.x = scores; /* context [n][head_dim] += probabilities [n][keys] values */
        product.x_stride = TFM_KV_PAGE;
        product.w = tfm__kv_at(view->kv, view->layer, start / TFM_KV_PAGE, 1, queries->kv_head);
        product.panel_bytes = tfm__value_panel_bytes(view->kv);
        product.n = dim;
        product.k = keys;
        product.y = queries->context;
        product.y_stride = queries->context_stride;
        product.add = start > begin;
        tfm__matmul_kv(kernels, dtype, 1, &product);
    }
    for (i = 0; i < queries->n; i++) {
        float *context = queries->context + i * queries->context_stride;
        if (softmax[i].sum == 0) /* it saw nothing */
            memset(context, 0, dim * sizeof *context);
        else
            kernels->scale(context, dim, 1 / softmax[i].sum);
        if (tfm__sight_of(job, view, queries, i).high < end && tfm__has_nan(context, dim)) {
            tfm__queries alone = *queries; /* 0 times a value that is not finite, of a token that it does not see */
            alone.n = 1;
            alone.query += i * alone.query_stride;
            alone.head += i * alone.head_step;
            alone.first += i * alone.step;
            alone.context = context;
            tfm__attend(job, view, &alone);
        }
    }
}

static void tfm__attend_piece(void *argument, size_t index) {
    const tfm__attention_job *job = (const tfm__attention_job *)argument;
    const tfm_attention *attention = job->attention;
    const tfm__span_view view = tfm__find_span(job, &index, tfm__attend_pieces);
    size_t group = attention->n_heads / attention->n_kv_heads, dim = attention->head_dim;
    size_t rows = view.wanted == 1 ? group : view.wanted, blocks = tfm__divide_up(rows, TFM__QUERIES);
    size_t block = index % blocks * TFM__QUERIES, row;
    size_t unwanted = job->cross ? 0 : view.span->n_rows - view.wanted;
    size_t query_row = job->cross ? view.context : view.row + unwanted;
    tfm__queries queries;
    queries.n = TFM__MIN(TFM__QUERIES, rows - block);
    if (view.wanted == 1) { /* rows are the heads of a group */
        queries.kv_head = index / blocks;
        queries.head = queries.kv_head * group + block;
        queries.head_step = 1;
        row = 0;
        queries.query_stride = queries.context_stride = dim;
        queries.step = 0;
    } else { /* rows are tokens */
        queries.head = index / blocks;
        queries.kv_head = queries.head / group;
        queries.head_step = 0;
        row = block;
        queries.query_stride = job->query_stride;
        queries.context_stride = attention->n_heads * dim;
        queries.step = 1;
    }
    if (tfm__stores_itself(job, (size_t)(view.span - job->pass->spans)))
        tfm__store(job, &view, 0, 1, queries.kv_head);
    queries.first = view.past + unwanted + row;
    queries.query = job->queries + (query_row + row) * job->query_stride + queries.head * dim;
    queries.context = job->context + (view.context + row) * attention->n_heads * dim + queries.head * dim;
    tfm__attend(job, &view, &queries);
}

/* ---- positions: rotary and relative ones */

static size_t tfm__count_rows(const tfm_span *spans, size_t n_spans) {
    size_t rows = 0, i;
    for (i = 0; i < n_spans; i++)
        rows += spans[i].n_rows;
    return rows;
}

typedef struct tfm__angles_job {
    const tfm_rotary *rotary;
    const tfm_span *spans;
    float *angles; /* [rows][2][n_pairs] */
} tfm__angles_job;

/* A piece: the angles of one row. In fp32 throughout, as PyTorch has them. */
static void tfm__angles_piece(void *argument, size_t row) {
    const tfm__angles_job *job = (const tfm__angles_job *)argument;
    const tfm_rotary *rotary = job->rotary;
    float *cosines = job->angles + row * 2 * rotary->n_pairs, *sines = cosines + rotary->n_pairs, position;
    const tfm_span *span = job->spans;
    size_t i;
    for (; row >= span->n_rows; span++)
        row -= span->n_rows;
    position = (float)(tfm__past(span) + row);
    for (i = 0; i < rotary->n_pairs; i++) {
        float angle = position * rotary->frequencies[i];
        cosines[i] = cosf(angle) * rotary->scale;
        sines[i] = sinf(angle) * rotary->scale;
    }
}

/* The bucket of a distance key - query. In fp32 throughout, as PyTorch has it. */
static size_t tfm__relative_bucket(const tfm_relative *relative, int causal, long distance) {
    size_t buckets = relative->n_buckets, base = 0, exact, apart = (size_t)(distance < 0 ? -distance : distance),
           bucket;
    if (!causal) {
        buckets /= 2;
        base = distance > 0 ? buckets : 0;
    } else if (distance > 0)
        apart = 0;
    exact = buckets / 2;
    if (apart < exact)
        return base + apart;
    bucket = exact + (size_t)(logf((float)apart / (float)exact) /
                              (float)log((double)relative->max_distance / (double)exact) * (float)(buckets - exact));
    return base + TFM__MIN(bucket, buckets - 1);
}

/* bias[head][distance + reach - 1] */
static void tfm__fill_bias(const tfm_attention *attention, size_t reach, float *bias) {
    size_t width = 2 * reach - 1, i, head;
    for (i = 0; i < width; i++) {
        size_t bucket = tfm__relative_bucket(&attention->relative, attention->causal, (long)i - (long)(reach - 1));
        for (head = 0; head < attention->n_heads; head++)
            bias[head * width + i] = attention->relative.table[bucket * attention->n_heads + head];
    }
}

static size_t tfm__reach(const tfm_span *spans, size_t n_spans) {
    size_t reach = 1, i;
    for (i = 0; i < n_spans; i++)
        reach = TFM__MAX(reach, tfm__past(spans + i) + spans[i].n_rows);
    return reach;
}

/* Scratch of a pass of so many rows whose longest sequence is `reach`. */
static size_t tfm__pass_scratch(const tfm_attention *attention, size_t rows, size_t reach) {
    return tfm__scratch_floats(rows, 2 * attention->rotary.n_pairs) +
           (attention->relative.n_buckets ? tfm__scratch_floats(attention->n_heads, 2 * reach - 1) : 0);
}

/* Takes scratch, which the caller gives back after the last block. `attention`: of any of the stack's blocks. */
static tfm__pass tfm__begin_pass(tfm_engine *engine, const tfm_attention *attention, const tfm_span *spans,
                                 size_t n_spans) {
    tfm__pass pass;
    memset(&pass, 0, sizeof pass);
    pass.spans = spans;
    pass.n_spans = n_spans;
    pass.n_rows = tfm__count_rows(spans, n_spans);
    if (attention->rotary.n_pairs) {
        tfm__angles_job job;
        job.rotary = &attention->rotary;
        job.spans = spans;
        pass.angles = job.angles = tfm__take(engine, pass.n_rows, 2 * attention->rotary.n_pairs);
        tfm__run(engine, pass.n_rows, 50 * attention->rotary.n_pairs, tfm__angles_piece, &job);
    }
    if (attention->relative.n_buckets) {
        float *bias;
        pass.reach = tfm__reach(spans, n_spans);
        pass.bias = bias = tfm__take(engine, attention->n_heads, 2 * pass.reach - 1);
        tfm__fill_bias(attention, pass.reach, bias);
    }
    return pass;
}

typedef struct tfm__turn_job {
    const tfm_engine *engine;
    const tfm_attention *attention;
    const float *angles;
    float *qkv; /* [rows][(n_heads + 2 n_kv_heads) head_dim] */
} tfm__turn_job;

/* A piece: the queries and keys of one row through their norms and to their rotary positions. */
static void tfm__turn_piece(void *argument, size_t row) {
    const tfm__turn_job *job = (const tfm__turn_job *)argument;
    const tfm_attention *attention = job->attention;
    const tfm_rotary *rotary = &attention->rotary;
    const tfm__kernels *kernels = job->engine->kernels;
    size_t dim = attention->head_dim, head;
    for (head = 0; head < attention->n_heads + attention->n_kv_heads; head++) {
        const tfm_norm *norm = head < attention->n_heads ? &attention->q_norm : &attention->k_norm;
        float *x = job->qkv + row * tfm__qkv_width(attention) + head * dim;
        if (norm->weight.data)
            kernels->norm[norm->kind](x, dim, (const float *)norm->weight.data, (const float *)norm->bias.data,
                                      norm->eps, x);
        if (rotary->n_pairs)
            kernels->turn(x, rotary->n_pairs, rotary->interleaved, job->angles + row * 2 * rotary->n_pairs);
    }
}

/* ---- attention in all */

/* Cache pages that a span without a cache needs while it is computed; one page may be shorter than others. */
static size_t tfm__uncached_pages(const tfm_span *span) {
    return span->kv ? 0 : tfm__divide_up(span->n_rows, TFM_KV_PAGE);
}

/* Keys and values as the weights: what int8 weights lose is more than what bf16 does. */
static tfm_dtype tfm__kv_dtype_of(const tfm_attention *attention) {
    return attention->qkv.weight.dtype == TFM_I8 ? TFM_BF16 : TFM_F32;
}

static tfm_kv tfm__uncached_kv(const tfm_attention *attention, const tfm_span *span) {
    tfm_kv kv;
    memset(&kv, 0, sizeof kv);
    kv.dtype = tfm__kv_dtype_of(attention);
    kv.n_layers = 1;
    kv.n_kv_heads = attention->n_kv_heads;
    kv.head_dim = attention->head_dim;
    kv.page_tokens = TFM__MIN((size_t)TFM_KV_PAGE, tfm__round_up(span->n_rows, TFM__PANEL));
    kv.capacity = tfm__uncached_pages(span) * kv.page_tokens;
    return kv;
}

static size_t tfm__uncached_floats(const tfm_attention *attention, const tfm_span *span) {
    const tfm_kv kv = tfm__uncached_kv(attention, span);
    return span->kv ? 0 : tfm__scratch_floats(1, tfm__kv_bytes(&kv, tfm__uncached_pages(span)) / sizeof(float));
}

static size_t tfm__kv_struct_floats(size_t n_spans) {
    return tfm__scratch_floats(n_spans, tfm__divide_up(sizeof(tfm_kv), sizeof(float)));
}

static size_t tfm__attention_scratch(const tfm_attention *attention, const tfm_span *spans, size_t n_spans) {
    size_t rows = tfm__count_rows(spans, n_spans), floats, i;
    floats = tfm__scratch_floats(rows, tfm__qkv_width(attention)) +
             tfm__scratch_floats(rows, attention->n_heads * attention->head_dim) + tfm__kv_struct_floats(n_spans);
    for (i = 0; i < n_spans; i++)
        floats += tfm__uncached_floats(attention, spans + i);
    return floats + TFM__MAX(tfm__linear_scratch(&attention->qkv, rows), tfm__linear_scratch(&attention->out, rows));
}

/* Caches, on the scratch stack, for the spans that have none. They live for one call: one layer has room for each. */
static const tfm_kv *tfm__take_uncached(tfm_engine *engine, const tfm__attention_job *job) {
    tfm_kv *kvs = (tfm_kv *)(void *)tfm__take(engine, 1, tfm__kv_struct_floats(job->pass->n_spans));
    size_t i;
    for (i = 0; i < job->pass->n_spans; i++) {
        const tfm_span *span = job->pass->spans + i;
        if (span->kv)
            continue;
        kvs[i] = tfm__uncached_kv(job->attention, span);
        kvs[i].pool = tfm__take(engine, 1, tfm__uncached_floats(job->attention, span));
    }
    return kvs;
}

/* Stores a job's keys and values, but for those that tfm__stores_itself. */
static void tfm__run_store(tfm_engine *engine, tfm__attention_job *job) {
    const size_t numbers = 2 * job->attention->n_kv_heads * job->attention->head_dim;
    tfm__run(engine, tfm__all_pieces(job, tfm__store_pieces),
             4 * numbers * TFM__MIN(TFM__PANEL, tfm__divide_up(job->pass->n_rows, job->pass->n_spans)),
             tfm__store_piece, job);
}

/* Runs the pieces of a job whose keys and values are in place or are stored now. */
static void tfm__run_attention(tfm_engine *engine, tfm__attention_job *job) {
    const size_t dim = job->attention->head_dim, n_spans = job->pass->n_spans;
    size_t keys = 0, pieces, i;
    if (!job->cross)
        tfm__run_store(engine, job);
    for (i = 0; i < n_spans; i++) {
        const tfm_span *span = job->pass->spans + i;
        keys += (job->cross ? span->memory->n_tokens : tfm__past(span) + span->n_rows) * tfm__wanted_rows(job, i);
    }
    pieces = tfm__all_pieces(job, tfm__attend_pieces);
    if (pieces)
        tfm__run(engine, pieces, 2 * dim * tfm__divide_up(keys * job->attention->n_heads, pieces), tfm__attend_piece,
                 job);
}

static size_t tfm__count_wanted(const tfm__pass *pass, const size_t *wanted) {
    size_t n = 0, i;
    for (i = 0; wanted && i < pass->n_spans; i++)
        n += wanted[i];
    return wanted ? n : pass->n_rows;
}

/* result [wanted rows][d_model] (+)= attention(input [rows][d_model]). wanted [n_spans]: only the last so many rows of
 * each span; NULL: all. */
static void tfm__attention(tfm_engine *engine, const tfm_attention *attention, size_t layer, const tfm__pass *pass,
                           tfm__input input, const size_t *wanted, tfm__result result) {
    size_t mark = engine->scratch_used, n_wanted = tfm__count_wanted(pass, wanted), width = tfm__qkv_width(attention);
    float *qkv = tfm__take(engine, input.n_rows, width);
    float *context = tfm__take(engine, input.n_rows, attention->n_heads * attention->head_dim);
    tfm__attention_job job;
    tfm__turn_job turn;
    memset(&job, 0, sizeof job);
    job.engine = turn.engine = engine;
    job.attention = turn.attention = attention;
    job.pass = pass;
    job.layer = layer;
    job.wanted = wanted;
    job.queries = turn.qkv = qkv;
    job.keys = qkv + attention->n_heads * attention->head_dim;
    job.query_stride = job.key_stride = width;
    job.context = context;
    job.uncached = tfm__take_uncached(engine, &job);
    turn.angles = pass->angles;
    tfm__linear(engine, &attention->qkv, input, TFM_NO_ACTIVATION, tfm__result_in(qkv, 0));
    if (attention->rotary.n_pairs || attention->q_norm.weight.data || attention->k_norm.weight.data)
        tfm__run(engine, input.n_rows, 2 * width, tfm__turn_piece, &turn);
    tfm__run_attention(engine, &job);
    if (n_wanted)
        tfm__linear(engine, &attention->out, tfm__input_of(context, n_wanted, NULL), TFM_NO_ACTIVATION, result);
    engine->scratch_used = mark;
}

static tfm_status tfm__check_attention(const tfm_attention *attention, const char *name, size_t d_model,
                                       tfm_error *error) {
    size_t heads = attention->n_heads, kv_heads = attention->n_kv_heads, dim = attention->head_dim;
    tfm_status status;
    if (!heads || !kv_heads || !dim || heads % kv_heads)
        return tfm__fail(error, TFM_ERROR_ARGUMENT,
                         "%s: n_heads must be a multiple of n_kv_heads, and they and head_dim greater than 0", name);
    if (heads > SIZE_MAX / 8 / dim || kv_heads > SIZE_MAX / 8 / dim)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "%s: too many heads", name);
    if (!tfm__is_finite(attention->scale) || attention->scale <= 0)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "%s: the scale must be a number greater than 0", name);
    if (attention->rotary.n_pairs && (attention->rotary.n_pairs > dim / 2 || !attention->rotary.frequencies))
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "%s: rotary positions need frequencies, at most head_dim / 2",
                         name);
    if (attention->relative.n_buckets &&
        (!attention->relative.table || attention->relative.n_buckets < (attention->causal ? 2u : 4u) ||
         attention->relative.max_distance <= attention->relative.n_buckets / (attention->causal ? 2 : 4)))
        return tfm__fail(error, TFM_ERROR_ARGUMENT,
                         "%s: relative positions need a table and more distance than buckets", name);
    status = attention->q_norm.weight.data ? tfm__check_norm(&attention->q_norm, name, dim, error) : TFM_OK;
    if (status == TFM_OK && attention->k_norm.weight.data)
        status = tfm__check_norm(&attention->k_norm, name, dim, error);
    if (status == TFM_OK)
        status = tfm__check_linear(&attention->qkv, name, tfm__qkv_width(attention), d_model, error);
    return status == TFM_OK ? tfm__check_linear(&attention->out, name, d_model, heads * dim, error) : status;
}

static tfm_status tfm__check_kv(const tfm_kv *kv, const tfm_attention *attention, size_t layer, size_t span,
                                tfm_error *error) {
    size_t i;
    if (!tfm__is_kv_dtype(kv->dtype) || kv->n_kv_heads != attention->n_kv_heads ||
        kv->head_dim != attention->head_dim || layer >= kv->n_layers || kv->page_tokens != TFM_KV_PAGE)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "the cache of span %lu was made for other layers",
                         (unsigned long)span);
    for (i = 0; i < tfm__divide_up(kv->capacity, TFM_KV_PAGE); i++)
        if (!kv->pool || (kv->pages ? kv->pages[i] : i) >= kv->n_pool_pages)
            return tfm__fail(error, TFM_ERROR_ARGUMENT, "the cache of span %lu has no page %lu in its pool",
                             (unsigned long)span, (unsigned long)i);
    return TFM_OK;
}

static tfm_status tfm__check_spans(const tfm_attention *attention, size_t layer, const tfm_span *spans, size_t n_spans,
                                   tfm_error *error) {
    size_t i;
    for (i = 0; i < n_spans; i++) {
        const tfm_kv *kv = spans[i].kv;
        if (!spans[i].n_rows)
            return tfm__fail(error, TFM_ERROR_ARGUMENT, "span %lu has no tokens", (unsigned long)i);
        if (!kv)
            continue;
        if (tfm__check_kv(kv, attention, layer, i, error) != TFM_OK)
            return TFM_ERROR_ARGUMENT;
        if (kv->n_tokens > kv->capacity || spans[i].n_rows > kv->capacity - kv->n_tokens)
            return tfm__fail(error, TFM_ERROR_CONTEXT_FULL,
                             "the cache of span %lu has room for %lu tokens, not for %lu", (unsigned long)i,
                             (unsigned long)kv->capacity, (unsigned long)(kv->n_tokens + spans[i].n_rows));
    }
    return TFM_OK;
}

TFM_API tfm_status tfm_attention_forward(tfm_engine *engine, const tfm_attention *attention, size_t layer,
                                         const float *x, const tfm_span *spans, size_t n_spans, float *y,
                                         tfm_error *error) {
    tfm_status status = tfm__check_attention(attention, "tfm_attention_forward", attention->qkv.weight.shape[1], error);
    if (status == TFM_OK)
        status = tfm__check_spans(attention, layer, spans, n_spans, error);
    if (status == TFM_OK)
        status =
            tfm__reserve(engine,
                         tfm__attention_scratch(attention, spans, n_spans) +
                             tfm__pass_scratch(attention, tfm__count_rows(spans, n_spans), tfm__reach(spans, n_spans)),
                         error);
    if (status == TFM_OK && n_spans) {
        size_t mark = engine->scratch_used;
        const tfm__pass pass = tfm__begin_pass(engine, attention, spans, n_spans);
        tfm__attention(engine, attention, layer, &pass, tfm__input_of(x, pass.n_rows, NULL), NULL,
                       tfm__result_in(y, 0));
        engine->scratch_used = mark;
    }
    return status;
}

/* ---- cross-attention */

static size_t tfm__cross_scratch(const tfm_attention *attention, const tfm_cross *cross, size_t rows) {
    size_t inner = attention->n_heads * attention->head_dim;
    return cross->q.weight.data
               ? 2 * tfm__scratch_floats(rows, inner) +
                     TFM__MAX(tfm__linear_scratch(&cross->q, rows), tfm__linear_scratch(&cross->out, rows))
               : 0;
}

/* result [wanted rows][d_model] (+)= attention of input [wanted rows][d_model] to the spans' memories */
static void tfm__cross(tfm_engine *engine, const tfm_attention *attention, const tfm_cross *cross, size_t layer,
                       const tfm__pass *pass, tfm__input input, const size_t *wanted, tfm__result result) {
    size_t mark = engine->scratch_used, inner = attention->n_heads * attention->head_dim;
    float *queries = tfm__take(engine, input.n_rows, inner), *context = tfm__take(engine, input.n_rows, inner);
    tfm__attention_job job;
    memset(&job, 0, sizeof job);
    job.engine = engine;
    job.attention = attention;
    job.pass = pass;
    job.layer = layer;
    job.cross = 1;
    job.wanted = wanted;
    job.queries = queries;
    job.query_stride = inner;
    job.context = context;
    tfm__linear(engine, &cross->q, input, TFM_NO_ACTIVATION, tfm__result_in(queries, 0));
    tfm__run_attention(engine, &job);
    tfm__linear(engine, &cross->out, tfm__input_of(context, input.n_rows, NULL), TFM_NO_ACTIVATION, result);
    engine->scratch_used = mark;
}

static size_t tfm__memory_scratch(const tfm_cross *cross, size_t rows) {
    return tfm__scratch_floats(rows, cross->kv.weight.shape[0]) + tfm__linear_scratch(&cross->kv, rows);
}

/* The keys and values of results [n_rows][d_model] go into an empty cache. */
static void tfm__memory(tfm_engine *engine, const tfm_block *block, size_t layer, const float *results, size_t n_rows,
                        tfm_kv *memory) {
    const tfm_attention *attention = &block->attention;
    const size_t nobody = 0; /* attends: so that keys and values of a single token are stored here, too */
    size_t mark = engine->scratch_used, width = 2 * attention->n_kv_heads * attention->head_dim;
    float *kv = tfm__take(engine, n_rows, width);
    tfm__attention_job job;
    tfm__pass pass;
    tfm_span span;
    memset(&span, 0, sizeof span);
    memset(&pass, 0, sizeof pass);
    memset(&job, 0, sizeof job);
    span.n_rows = n_rows;
    span.kv = memory;
    pass.spans = &span;
    pass.n_spans = 1;
    pass.n_rows = n_rows;
    job.engine = engine;
    job.attention = attention;
    job.pass = &pass;
    job.layer = layer;
    job.wanted = &nobody;
    job.keys = kv;
    job.key_stride = width;
    tfm__linear(engine, &block->cross.kv, tfm__input_of(results, n_rows, NULL), TFM_NO_ACTIVATION,
                tfm__result_in(kv, 0));
    tfm__run_store(engine, &job);
    engine->scratch_used = mark;
}

/* ---- feed-forward */

typedef struct tfm__gate_job {
    const tfm_engine *engine;
    tfm_activation activation;
    const float *up; /* [n_rows][2 d_ff]: gate, up */
    size_t d_ff;
    float *hidden;            /* [n_rows][d_ff] */
    tfm__quantized quantized; /* the same, if the next layer wants that */
} tfm__gate_job;

/* A row: hidden = activation(gate) * up */
static void tfm__gate_piece(void *argument, size_t row) {
    const tfm__gate_job *job = (const tfm__gate_job *)argument;
    const tfm__kernels *kernels = job->engine->kernels;
    const float *gate = job->up + row * 2 * job->d_ff;
    tfm__finish finish;
    memset(&finish, 0, sizeof finish);
    finish.x = gate;
    finish.y = job->hidden + row * job->d_ff;
    finish.n_rows = 1;
    finish.n = job->d_ff;
    finish.activation = job->activation;
    kernels->finish(&finish);
    kernels->multiply(finish.y, gate + job->d_ff, job->d_ff);
    if (job->quantized.q) {
        const tfm__quantized to = tfm__quantized_at(&job->quantized, job->d_ff, row, 0);
        kernels->quantize(finish.y, job->d_ff, &to);
    }
}

static size_t tfm__ffn_scratch(const tfm_ffn *ffn, size_t n_rows) {
    size_t d_ff = ffn->down.weight.shape[1];
    size_t hidden = ffn->gated || ffn->down.weight.dtype != TFM_I8 ? tfm__scratch_floats(n_rows, d_ff) : 0;
    size_t gate = ffn->gated ? tfm__scratch_floats(n_rows, 2 * d_ff) : 0;
    size_t linear = TFM__MAX(tfm__linear_scratch(&ffn->up, n_rows), tfm__linear_scratch(&ffn->down, n_rows));
    return hidden + gate + tfm__quantized_scratch(n_rows, d_ff) + linear;
}

/* result (+)= down(activation(up(input))), or down(activation(gate(input)) * up(input)). What lies between is only ever
 * quantized if `down` is i8. */
static void tfm__ffn(tfm_engine *engine, const tfm_ffn *ffn, tfm__input input, tfm__result result) {
    size_t mark = engine->scratch_used, d_ff = ffn->down.weight.shape[1], n_rows = input.n_rows;
    tfm__input hidden = tfm__input_of(NULL, n_rows, NULL);
    float *floats = NULL;
    if (ffn->down.weight.dtype == TFM_I8)
        hidden.quantized = tfm__take_quantized(engine, n_rows, d_ff);
    if (ffn->gated || !hidden.quantized.q)
        hidden.x = floats = tfm__take(engine, n_rows, d_ff);
    if (ffn->gated) {
        float *up = tfm__take(engine, n_rows, 2 * d_ff);
        tfm__gate_job job;
        job.engine = engine;
        job.activation = ffn->activation;
        job.up = up;
        job.d_ff = d_ff;
        job.hidden = floats;
        job.quantized = hidden.quantized;
        tfm__linear(engine, &ffn->up, input, TFM_NO_ACTIVATION, tfm__result_in(up, 0));
        tfm__run(engine, n_rows, 16 * d_ff, tfm__gate_piece, &job);
    } else {
        tfm__result to = tfm__result_in(floats, 0);
        to.quantized = hidden.quantized;
        tfm__linear(engine, &ffn->up, input, ffn->activation, to);
    }
    tfm__linear(engine, &ffn->down, hidden, TFM_NO_ACTIVATION, result);
    engine->scratch_used = mark;
}

static tfm_status tfm__check_ffn(const tfm_ffn *ffn, const char *name, size_t d_model, tfm_error *error) {
    size_t d_ff = ffn->down.weight.shape[1];
    tfm_status status;
    if ((unsigned)ffn->activation >= TFM_ACTIVATION_COUNT)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "%s: unknown activation %d", name, (int)ffn->activation);
    status = tfm__check_linear(&ffn->up, name, ffn->gated ? 2 * d_ff : d_ff, d_model, error);
    return status == TFM_OK ? tfm__check_linear(&ffn->down, name, d_model, d_ff, error) : status;
}

TFM_API tfm_status tfm_ffn_forward(tfm_engine *engine, const tfm_ffn *ffn, const float *x, size_t n_rows, float *y,
                                   tfm_error *error) {
    tfm_status status = tfm__check_ffn(ffn, "tfm_ffn_forward", ffn->up.weight.shape[1], error);
    if (status == TFM_OK)
        status = tfm__reserve(engine, tfm__ffn_scratch(ffn, n_rows), error);
    if (status == TFM_OK && n_rows)
        tfm__ffn(engine, ffn, tfm__input_of(x, n_rows, NULL), tfm__result_in(y, 0));
    return status;
}

/* ---- block */

static size_t tfm__block_scratch(const tfm_block *block, const tfm_span *spans, size_t n_spans) {
    size_t rows = tfm__count_rows(spans, n_spans), scratch = tfm__attention_scratch(&block->attention, spans, n_spans);
    scratch = TFM__MAX(scratch, tfm__cross_scratch(&block->attention, &block->cross, rows));
    scratch = TFM__MAX(scratch, tfm__ffn_scratch(&block->ffn, rows));
    return scratch + tfm__scratch_floats(rows, block->attention_norm.weight.shape[0]);
}

/* The last of each span's rows, wanted[span] of them: from x [rows][width] to selected [wanted rows][width]. */
static void tfm__keep_rows(const float *x, size_t width, const tfm__pass *pass, const size_t *wanted, float *selected) {
    size_t row = 0, i;
    for (i = 0; i < pass->n_spans; i++) {
        row += pass->spans[i].n_rows;
        memcpy(selected, x + (row - wanted[i]) * width, wanted[i] * width * sizeof *x);
        selected += wanted[i] * width;
    }
}

/* x[n] += y[n] */
static void tfm__add(tfm_engine *engine, const float *y, size_t n, float *x) {
    tfm__finish finish;
    memset(&finish, 0, sizeof finish);
    finish.x = y;
    finish.y = x;
    finish.n_rows = 1;
    finish.n = n;
    finish.add = 1;
    engine->kernels->finish(&finish);
}

/* What the next layer of a block reads: norm(x). After a post-norm that is x from then on. */
static tfm__input tfm__normed_input(float *x, size_t n_rows, const tfm_norm *norm, int post) {
    tfm__input input = tfm__input_of(x, n_rows, norm);
    input.normed = post ? x : NULL;
    return input;
}

/* x = x + attention(...), and so on, as tfm_norm_place and tfm_block.parallel say.
 * If not all rows are wanted (NULL: they are), x is given up after the attention, and the rest of the block is done for
 * the selected rows alone. */
static void tfm__block(tfm_engine *engine, const tfm_block *block, size_t layer, const tfm__pass *pass, float *x,
                       const size_t *wanted, float *selected) {
    const size_t mark = engine->scratch_used, d_model = block->attention_norm.weight.shape[0];
    const size_t n = tfm__count_wanted(pass, wanted);
    const int post = block->norm_place == TFM_POST_NORM, sandwich = block->norm_place == TFM_SANDWICH_NORM;
    const tfm_norm *attention_norm = &block->attention_norm;
    const tfm_norm *ffn_norm = block->ffn_norm.weight.data ? &block->ffn_norm : attention_norm, *ffn_input = ffn_norm;
    float *branch = sandwich || block->parallel ? tfm__take(engine, n, d_model) : NULL; /* what is added to x later */
    if (wanted)
        tfm__keep_rows(x, d_model, pass, wanted, selected);
    else
        selected = x;
    tfm__attention(engine, &block->attention, layer, pass, tfm__input_of(x, pass->n_rows, post ? NULL : attention_norm),
                   wanted, branch ? tfm__result_in(branch, 0) : tfm__result_in(selected, 1));
    if (!n) {
        engine->scratch_used = mark;
        return;
    }
    if (sandwich) {
        tfm__norm(engine, &block->attention_post_norm, branch, n, branch);
        tfm__add(engine, branch, n * d_model, selected);
    }
    if (block->cross.q.weight.data)
        tfm__cross(engine, &block->attention, &block->cross, layer, pass,
                   tfm__normed_input(selected, n, post ? attention_norm : &block->cross.norm, post), wanted,
                   tfm__result_in(selected, 1));
    if (post)
        ffn_input = block->cross.q.weight.data ? &block->cross.norm : attention_norm;
    tfm__ffn(engine, &block->ffn, tfm__normed_input(selected, n, ffn_input, post),
             branch ? tfm__result_in(branch, !sandwich) : tfm__result_in(selected, 1));
    if (sandwich)
        tfm__norm(engine, &block->ffn_post_norm, branch, n, branch);
    if (branch)
        tfm__add(engine, branch, n * d_model, selected);
    if (post)
        tfm__norm(engine, ffn_norm, selected, n, selected);
    engine->scratch_used = mark;
}

static tfm_status tfm__check_cross(const tfm_block *block, const char *name, size_t d_model, tfm_error *error) {
    const tfm_attention *attention = &block->attention;
    const tfm_cross *cross = &block->cross;
    size_t inner = attention->n_heads * attention->head_dim;
    tfm_status status = tfm__check_norm(&cross->norm, name, d_model, error);
    if (status == TFM_OK)
        status = tfm__check_linear(&cross->q, name, inner, d_model, error);
    if (status == TFM_OK)
        status = tfm__check_linear(&cross->kv, name, 2 * attention->n_kv_heads * attention->head_dim, d_model, error);
    return status == TFM_OK ? tfm__check_linear(&cross->out, name, d_model, inner, error) : status;
}

static tfm_status tfm__check_block(const tfm_block *block, const char *name, tfm_error *error) {
    size_t d_model = block->attention_norm.weight.shape[0];
    const int sandwich = block->norm_place == TFM_SANDWICH_NORM;
    tfm_status status = tfm__check_norm(&block->attention_norm, name, 0, error);
    if ((unsigned)block->norm_place > TFM_SANDWICH_NORM)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "%s: unknown place of the norms %d", name, (int)block->norm_place);
    if (block->parallel && (block->norm_place != TFM_PRE_NORM || block->cross.q.weight.data))
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "%s: only a pre-norm block without cross-attention can be parallel",
                         name);
    if (status == TFM_OK)
        status = tfm__check_attention(&block->attention, name, d_model, error);
    if (status == TFM_OK && block->cross.q.weight.data)
        status = tfm__check_cross(block, name, d_model, error);
    if (status == TFM_OK && !(block->parallel && !block->ffn_norm.weight.data))
        status = tfm__check_norm(&block->ffn_norm, name, d_model, error);
    if (status == TFM_OK && sandwich)
        status = tfm__check_norm(&block->attention_post_norm, name, d_model, error);
    if (status == TFM_OK && sandwich)
        status = tfm__check_norm(&block->ffn_post_norm, name, d_model, error);
    return status == TFM_OK ? tfm__check_ffn(&block->ffn, name, d_model, error) : status;
}

static tfm_status tfm__check_memories(const tfm_block *block, size_t layer, const tfm_span *spans, size_t n_spans,
                                      tfm_error *error) {
    size_t i;
    for (i = 0; block->cross.q.weight.data && i < n_spans; i++) {
        if (!spans[i].memory)
            return tfm__fail(error, TFM_ERROR_ARGUMENT, "span %lu has no memory for the cross-attention",
                             (unsigned long)i);
        if (tfm__check_kv(spans[i].memory, &block->attention, layer, i, error) != TFM_OK)
            return TFM_ERROR_ARGUMENT;
    }
    return TFM_OK;
}

TFM_API tfm_status tfm_block_forward(tfm_engine *engine, const tfm_block *block, size_t layer, float *x,
                                     const tfm_span *spans, size_t n_spans, tfm_error *error) {
    tfm_status status = tfm__check_block(block, "tfm_block_forward", error);
    if (status == TFM_OK)
        status = tfm__check_spans(&block->attention, layer, spans, n_spans, error);
    if (status == TFM_OK)
        status = tfm__check_memories(block, layer, spans, n_spans, error);
    if (status == TFM_OK)
        status = tfm__reserve(
            engine,
            tfm__block_scratch(block, spans, n_spans) +
                tfm__pass_scratch(&block->attention, tfm__count_rows(spans, n_spans), tfm__reach(spans, n_spans)),
            error);
    if (status == TFM_OK && n_spans) {
        size_t mark = engine->scratch_used;
        const tfm__pass pass = tfm__begin_pass(engine, &block->attention, spans, n_spans);
        tfm__block(engine, block, layer, &pass, x, NULL, NULL);
        engine->scratch_used = mark;
    }
    return status;
}

TFM_API tfm_status tfm_memory_forward(tfm_engine *engine, const tfm_block *block, size_t layer, const float *results,
                                      size_t n_rows, tfm_kv *memory, tfm_error *error) {
    tfm_status status = tfm__check_block(block, "tfm_memory_forward", error);
    if (status == TFM_OK && !block->cross.q.weight.data)
        status = tfm__fail(error, TFM_ERROR_ARGUMENT, "tfm_memory_forward: the block has no cross-attention");
    if (status == TFM_OK)
        status = tfm__check_kv(memory, &block->attention, layer, 0, error);
    if (status == TFM_OK && (memory->n_tokens || n_rows > memory->capacity))
        status = tfm__fail(error, TFM_ERROR_CONTEXT_FULL, "the memory has room for %lu tokens, and %lu in it",
                           (unsigned long)memory->capacity, (unsigned long)memory->n_tokens);
    if (status == TFM_OK)
        status = tfm__reserve(engine, tfm__memory_scratch(&block->cross, n_rows), error);
    if (status == TFM_OK && n_rows)
        tfm__memory(engine, block, layer, results, n_rows, memory);
    return status;
}

/* =====================================================================================================================
 * e. THE .tfm FILE: reader, writer
 *    The layout is in the manual. Nothing in a file is trusted: every number is checked before it is used.
 * ================================================================================================================== */

#define TFM__HEADER_SIZE ((size_t)64)
static const unsigned char tfm__magic[8] = {'T', 'F', 'M', 'H', 0x0D, 0x0A, 0x1A, 0x0A};

struct tfm_file {
    tfm_allocator allocator;
    tfm__bytes bytes;
    unsigned char *turned; /* big-endian CPUs: a copy of `bytes` with its numbers turned around; otherwise NULL */
    int owned;             /* 1: bytes are unmapped on closing */
    char name[256];        /* for error messages */
    size_t n_meta, n_entries, n_whole;
    tfm_meta *meta;          /* [n_meta], in the file's order */
    tfm_entry *entries;      /* [n_entries], in the file's order; [n_whole] matrices whose parts are among those */
    tfm_tensor *parts;       /* the data of those */
    uint32_t *whole;         /* [n_entries]: which of all entries that one is a part of, or itself */
    uint32_t *meta_by_key;   /* [n_meta]: sorted by key */
    uint32_t *entry_by_name; /* [n_entries + n_whole]: sorted by name */
};

/* ---- sorted indexes. Heapsort: n log n on hostile input too, in place. */

typedef int (*tfm__compare)(const void *context, uint32_t a, uint32_t b); /* < 0: a comes first */

static void tfm__sift_down(uint32_t *items, size_t start, size_t n, tfm__compare compare, const void *context) {
    size_t parent = start, child;
    while ((child = 2 * parent + 1) < n) {
        uint32_t swap;
        if (child + 1 < n && compare(context, items[child], items[child + 1]) < 0)
            child++;
        if (compare(context, items[parent], items[child]) >= 0)
            return;
        swap = items[parent];
        items[parent] = items[child];
        items[child] = swap;
        parent = child;
    }
}

static void tfm__sort(uint32_t *items, size_t n, tfm__compare compare, const void *context) {
    size_t i;
    for (i = n / 2; i-- > 0;)
        tfm__sift_down(items, i, n, compare, context);
    for (i = n; i-- > 1;) {
        uint32_t swap = items[0];
        items[0] = items[i];
        items[i] = swap;
        tfm__sift_down(items, 0, i, compare, context);
    }
}

static int tfm__compare_text(const char *a, size_t a_size, const char *b, size_t b_size) {
    int order = memcmp(a, b, TFM__MIN(a_size, b_size));
    return order ? order : (a_size > b_size) - (a_size < b_size);
}

/* How the key of a metadata entry, or the name of a tensor, stands to that text. */
static int tfm__key_order(const tfm_file *file, uint32_t index, const char *text, size_t size) {
    return tfm__compare_text(file->meta[index].key, file->meta[index].key_size, text, size);
}

static int tfm__name_order(const tfm_file *file, uint32_t index, const char *text, size_t size) {
    return tfm__compare_text(file->entries[index].name, file->entries[index].name_size, text, size);
}

/* Which of n sorted indexes is that text's; NULL: none. */
static const uint32_t *tfm__find_sorted(const tfm_file *file, const uint32_t *sorted, size_t n,
                                        int (*order_of)(const tfm_file *file, uint32_t index, const char *text,
                                                        size_t size),
                                        const char *text) {
    size_t low = 0, high = n, size = strlen(text);
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        int order = order_of(file, sorted[middle], text, size);
        if (!order)
            return sorted + middle;
        if (order < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return NULL;
}

static int tfm__compare_meta(const void *context, uint32_t a, uint32_t b) {
    const tfm_file *file = (const tfm_file *)context;
    return tfm__key_order(file, a, file->meta[b].key, file->meta[b].key_size);
}

static int tfm__compare_entries(const void *context, uint32_t a, uint32_t b) {
    const tfm_file *file = (const tfm_file *)context;
    return tfm__name_order(file, a, file->entries[b].name, file->entries[b].name_size);
}

/* ---- parsing */

static const size_t tfm__meta_sizes[7] = {1, sizeof(int64_t), sizeof(double), 1, 1, sizeof(int32_t), sizeof(float)};

static tfm_status tfm__parse_meta(tfm_file *file, size_t at, size_t end, tfm_error *error) {
    size_t capacity = (end - at) / 24, i; /* an entry has 16 bytes before a key of at least one */
    file->meta = (tfm_meta *)tfm__allocate(&file->allocator, capacity * sizeof *file->meta);
    file->meta_by_key = (uint32_t *)tfm__allocate(&file->allocator, capacity * sizeof *file->meta_by_key);
    if (!file->meta || !file->meta_by_key)
        return tfm__fail_memory(error, capacity * sizeof *file->meta);
    while (at < end) {
        const unsigned char *p = file->bytes.data + at;
        tfm_meta *meta = file->meta + file->n_meta;
        uint64_t value_size;
        if (end - at < 24)
            return tfm__fail(error, TFM_ERROR_FORMAT, "%s: metadata entry %lu is cut off", file->name,
                             (unsigned long)file->n_meta);
        meta->key_size = tfm__u32(p);
        meta->type = (tfm_meta_type)(tfm__u32(p + 4) < 7 ? tfm__u32(p + 4) : 0); /* 0: unknown, counted in bytes */
        value_size = tfm__u64(p + 8);
        at += 16;
        if (!meta->key_size || meta->key_size > end - at || tfm__round_up(meta->key_size, 8) > end - at ||
            value_size > end - at - tfm__round_up(meta->key_size, 8) ||
            tfm__round_up((size_t)value_size, 8) > end - at - tfm__round_up(meta->key_size, 8))
            return tfm__fail(error, TFM_ERROR_FORMAT, "%s: metadata entry %lu is larger than the metadata", file->name,
                             (unsigned long)file->n_meta);
        meta->key = (const char *)file->bytes.data + at;
        at += tfm__round_up(meta->key_size, 8);
        meta->values = file->bytes.data + at;
        at += tfm__round_up((size_t)value_size, 8);
        i = tfm__meta_sizes[meta->type];
        if (value_size % i)
            return tfm__fail(error, TFM_ERROR_FORMAT, "%s: metadata '%.*s' has a size that is no multiple of %lu bytes",
                             file->name, (int)TFM__MIN(meta->key_size, 64), meta->key, (unsigned long)i);
        meta->count = (size_t)value_size / i;
        file->meta_by_key[file->n_meta] = (uint32_t)file->n_meta;
        file->n_meta++;
    }
    tfm__sort(file->meta_by_key, file->n_meta, tfm__compare_meta, file);
    for (i = 1; i < file->n_meta; i++)
        if (!tfm__compare_meta(file, file->meta_by_key[i - 1], file->meta_by_key[i])) {
            const tfm_meta *meta = file->meta + file->meta_by_key[i];
            return tfm__fail(error, TFM_ERROR_FORMAT, "%s: metadata '%.*s' is there twice", file->name,
                             (int)TFM__MIN(meta->key_size, 64), meta->key);
        }
    return TFM_OK;
}

/* One entry of the directory, `p` with at least 80 bytes before the directory's end. */
static tfm_status tfm__parse_entry(const tfm_file *file, const unsigned char *p, size_t data_start, tfm_entry *entry,
                                   tfm_error *error) {
    tfm_tensor *tensor = &entry->tensor;
    const uint64_t most = (uint64_t)TFM__MIN(file->bytes.size, SIZE_MAX / 2) * 2; /* no number has less than 4 bits */
    uint64_t elements = 1, offset = tfm__u64(p + 48), size = tfm__u64(p + 56);
    const uint32_t dtype = tfm__u32(p + 4), layout = tfm__u32(p + 8);
    const tfm__block_format *format;
    int name_size = (int)TFM__MIN(entry->name_size, 100), i;
    tensor->dtype = dtype <= TFM_Q6_K ? (tfm_dtype)dtype : TFM_NO_DTYPE;
    tensor->layout = layout < TFM_LAYOUT_COUNT ? (tfm_layout)layout : TFM_LAYOUT_COUNT;
    format = tfm__blocks_of(tensor->dtype);
    tensor->n_dims = (int)TFM__MIN(tfm__u32(p + 12), 255);
    entry->crc = tfm__u32(p + 64);
    if (!tfm__is_float(tensor->dtype) && tensor->dtype != TFM_I8 && !format)
        return tfm__fail(error, TFM_ERROR_UNSUPPORTED, "%s: tensor '%.*s' has the unknown type %lu", file->name,
                         name_size, entry->name, (unsigned long)tfm__u32(p + 4));
    if ((unsigned)tensor->layout >= TFM_LAYOUT_COUNT)
        return tfm__fail(error, TFM_ERROR_UNSUPPORTED, "%s: tensor '%.*s' has the unknown layout %lu", file->name,
                         name_size, entry->name, (unsigned long)tfm__u32(p + 8));
    if (tensor->dtype == TFM_I8 && tensor->layout != TFM_PANELS)
        return tfm__fail(error, TFM_ERROR_FORMAT, "%s: tensor '%.*s' is i8, but not in panels", file->name, name_size,
                         entry->name);
    if (format && (tensor->layout != TFM_ROWS || tensor->n_dims != 2))
        return tfm__fail(error, TFM_ERROR_FORMAT, "%s: tensor '%.*s' is %s, but not a matrix in rows", file->name,
                         name_size, entry->name, format->name);
    if (tensor->n_dims < 1 || tensor->n_dims > TFM_MAX_DIMS || (tensor->layout != TFM_ROWS && tensor->n_dims != 2))
        return tfm__fail(error, TFM_ERROR_FORMAT, "%s: tensor '%.*s' has %d dimensions", file->name, name_size,
                         entry->name, tensor->n_dims);
    for (i = 0; i < TFM_MAX_DIMS; i++) {
        uint64_t n = tfm__u64(p + 16 + 8 * i);
        if (!n || n > most || (i >= tensor->n_dims && n != 1) || elements > most / n)
            return tfm__fail(error, TFM_ERROR_FORMAT, "%s: tensor '%.*s' has an impossible shape", file->name,
                             name_size, entry->name);
        elements *= n; /* no more than the file has half bytes, so that nothing below overflows */
        tensor->shape[i] = (size_t)n;
    }
    if (format && tensor->shape[1] % format->numbers)
        return tfm__fail(error, TFM_ERROR_FORMAT, "%s: tensor '%.*s' is %s, but its rows are not whole blocks of %lu",
                         file->name, name_size, entry->name, format->name, (unsigned long)format->numbers);
    if (size != tfm_tensor_bytes(tensor))
        return tfm__fail(error, TFM_ERROR_FORMAT, "%s: tensor '%.*s' has %llu bytes, but its shape needs %llu",
                         file->name, name_size, entry->name, (unsigned long long)size,
                         (unsigned long long)tfm_tensor_bytes(tensor));
    if (offset % TFM__CACHE_LINE || offset < data_start || offset > file->bytes.size ||
        size > file->bytes.size - offset)
        return tfm__fail(error, TFM_ERROR_FORMAT, "%s: the data of tensor '%.*s' lies outside of the file's data",
                         file->name, name_size, entry->name);
    tensor->data = file->bytes.data + offset;
    return TFM_OK;
}

static tfm_status tfm__parse_directory(tfm_file *file, size_t at, size_t end, size_t n, tfm_error *error) {
    const unsigned char *last = NULL;
    size_t data_start = end, i;
    if (n > (end - at) / 80)
        return tfm__fail(error, TFM_ERROR_FORMAT, "%s: the directory is too small for %lu tensors", file->name,
                         (unsigned long)n);
    file->entries = (tfm_entry *)tfm__allocate(&file->allocator, 2 * n * sizeof *file->entries);
    file->entry_by_name = (uint32_t *)tfm__allocate(&file->allocator, 2 * n * sizeof *file->entry_by_name);
    file->whole = (uint32_t *)tfm__allocate(&file->allocator, n * sizeof *file->whole);
    if (!file->entries || !file->entry_by_name || !file->whole)
        return tfm__fail_memory(error, 2 * n * sizeof *file->entries);
    for (; file->n_entries < n; file->n_entries++) {
        const unsigned char *p = file->bytes.data + at;
        tfm_entry *entry = file->entries + file->n_entries;
        tfm_status status;
        if (end - at < 80 || !tfm__u32(p) || tfm__u32(p) > end - at - 72 ||
            tfm__round_up(tfm__u32(p), 8) > end - at - 72)
            return tfm__fail(error, TFM_ERROR_FORMAT, "%s: entry %lu of the tensor directory is cut off", file->name,
                             (unsigned long)file->n_entries);
        entry->name = (const char *)p + 72;
        entry->name_size = tfm__u32(p);
        status = tfm__parse_entry(file, p, data_start, entry, error);
        if (status != TFM_OK)
            return status;
        if ((const unsigned char *)entry->tensor.data < last)
            return tfm__fail(error, TFM_ERROR_FORMAT,
                             "%s: the data of tensor '%.*s' overlaps that of the one before it", file->name,
                             (int)TFM__MIN(entry->name_size, 100), entry->name);
        last = (const unsigned char *)entry->tensor.data + tfm_tensor_bytes(&entry->tensor);
        file->entry_by_name[file->n_entries] = file->whole[file->n_entries] = (uint32_t)file->n_entries;
        at += 72 + tfm__round_up(entry->name_size, 8);
    }
    if (at != end)
        return tfm__fail(error, TFM_ERROR_FORMAT, "%s: the tensor directory is larger than its entries", file->name);
    tfm__sort(file->entry_by_name, n, tfm__compare_entries, file);
    for (i = 1; i < n; i++)
        if (!tfm__compare_entries(file, file->entry_by_name[i - 1], file->entry_by_name[i])) {
            const tfm_entry *entry = file->entries + file->entry_by_name[i];
            return tfm__fail(error, TFM_ERROR_FORMAT, "%s: tensor '%.*s' is there twice", file->name,
                             (int)TFM__MIN(entry->name_size, 100), entry->name);
        }
    return TFM_OK;
}

/* ---- matrices in parts: NAME#0, NAME#1, ... hold the rows of NAME, which is an entry more, of the type TFM_PARTS */

/* Joins the parts of the entry `first`, whose name ends in #0, and returns how many there are. */
static size_t tfm__join(tfm_file *file, const tfm_entry *first, tfm_entry *whole, tfm_tensor *parts) {
    const tfm_entry *entry = first;
    size_t rows = 0, n = 0;
    char name[128];
    *whole = *first;
    whole->name_size -= 2;
    for (; entry && entry->tensor.n_dims == 2 && entry->tensor.shape[1] == first->tensor.shape[1]; n++) {
        parts[n] = entry->tensor;
        rows += parts[n].shape[0];
        file->whole[entry - file->entries] = (uint32_t)(whole - file->entries);
        snprintf(name, sizeof name, "%.*s#%lu", (int)whole->name_size, whole->name, (unsigned long)n + 1);
        entry = tfm_file_find(file, name);
    }
    whole->tensor = tfm__tensor(TFM_PARTS, TFM_ROWS, rows, first->tensor.shape[1], parts);
    return n;
}

static tfm_status tfm__join_parts(tfm_file *file, tfm_error *error) {
    const size_t n = file->n_entries;
    size_t used = 0, n_whole = 0, i;
    char name[128];
    file->parts = (tfm_tensor *)tfm__allocate(&file->allocator, n * sizeof *file->parts);
    if (!file->parts)
        return tfm__fail_memory(error, n * sizeof *file->parts);
    for (i = 0; i < n; i++) {
        const tfm_entry *entry = file->entries + i;
        if (entry->name_size < 3 || entry->name_size > 100 || entry->tensor.n_dims != 2 ||
            memcmp(entry->name + entry->name_size - 2, "#0", 2) || memchr(entry->name, 0, entry->name_size))
            continue;
        snprintf(name, sizeof name, "%.*s", (int)entry->name_size - 2, entry->name);
        if (tfm_file_find(file, name))
            return tfm__fail(error, TFM_ERROR_FORMAT, "%s: tensor '%s' is there both whole and in parts", file->name,
                             name);
        used += tfm__join(file, entry, file->entries + n + n_whole, file->parts + used);
        file->entry_by_name[n + n_whole] = (uint32_t)(n + n_whole);
        n_whole++;
    }
    file->n_whole = n_whole; /* now tfm_file_find sees them */
    if (n_whole)
        tfm__sort(file->entry_by_name, n + n_whole, tfm__compare_entries, file);
    return TFM_OK;
}

/* ---- byte order */

#ifdef TFM__BIG_ENDIAN
/* n numbers of `size` bytes. */
static void tfm__turn_numbers(unsigned char *data, size_t n, size_t size) {
    size_t i, k;
    for (i = 0; i < n; i++, data += size)
        for (k = 0; k < size / 2; k++) {
            unsigned char swap = data[k];
            data[k] = data[size - 1 - k];
            data[size - 1 - k] = swap;
        }
}

/* A tensor's data. In a panel of i8, all but the bases at its start are bytes. */
static void tfm__turn_tensor(const tfm_tensor *tensor, unsigned char *data) {
    const int is_plain = (size_t)tensor->dtype < TFM_DTYPE_COUNT; /* GGUF's blocks are read byte by byte */
    const size_t element = is_plain ? tfm__dtype_sizes[tensor->dtype] : 1, size = tfm_tensor_bytes(tensor);
    size_t at;
    if (tensor->dtype != TFM_I8)
        tfm__turn_numbers(data, size / element, element);
    else
        for (at = 0; at < size; at += tfm__panel_bytes(TFM_I8, tensor->shape[1]))
            tfm__turn_numbers(data + at, TFM__PANEL, sizeof(int32_t));
}

static tfm_status tfm__turn_file(tfm_file *file, tfm_error *error) {
    size_t i;
    file->turned = (unsigned char *)tfm__allocate_aligned(&file->allocator, file->bytes.size, TFM__CACHE_LINE);
    if (!file->turned)
        return tfm__fail_memory(error, file->bytes.size);
    memcpy(file->turned, file->bytes.data, file->bytes.size);
    for (i = 0; i < file->n_meta; i++) {
        tfm_meta *meta = file->meta + i;
        unsigned char *values = file->turned + ((const unsigned char *)meta->values - file->bytes.data);
        if ((size_t)meta->type < 7)
            tfm__turn_numbers(values, meta->count, tfm__meta_sizes[meta->type]);
        meta->values = values;
    }
    for (i = 0; i < file->n_entries; i++) {
        tfm_tensor *tensor = &file->entries[i].tensor;
        unsigned char *data = file->turned + ((const unsigned char *)tensor->data - file->bytes.data);
        tfm__turn_tensor(tensor, data);
        tensor->data = data;
    }
    return TFM_OK;
}
#else
#ifndef TFM_NO_STDIO /* only a writer turns a tensor, then */
static void tfm__turn_tensor(const tfm_tensor *tensor, unsigned char *data) {
    (void)tensor;
    (void)data;
}
#endif

static tfm_status tfm__turn_file(tfm_file *file, tfm_error *error) {
    (void)file;
    (void)error;
    return TFM_OK;
}
#endif

/* The tensor's data as it is in the file. */
static const unsigned char *tfm__file_data(const tfm_file *file, const tfm_tensor *tensor) {
    const unsigned char *data = (const unsigned char *)tensor->data;
    return file->turned ? file->bytes.data + (data - file->turned) : data;
}

static tfm_status tfm__parse_file(tfm_file *file, tfm_error *error) {
    const unsigned char *p = file->bytes.data;
    uint64_t size = file->bytes.size, meta_size, directory_size;
    size_t directory, end;
    tfm__crc_tables crc;
    uint32_t value;
    tfm_status status;
    if (size < TFM__HEADER_SIZE || memcmp(p, tfm__magic, sizeof tfm__magic))
        return tfm__fail(error, TFM_ERROR_FORMAT, "%s: not a .tfm file (tools/convert.py makes them from checkpoints)",
                         file->name);
    if (tfm__u32(p + 8) != 1)
        return tfm__fail(error, TFM_ERROR_UNSUPPORTED, "%s: version %lu of the format; this library reads version 1",
                         file->name, (unsigned long)tfm__u32(p + 8));
    if (tfm__u32(p + 12))
        return tfm__fail(error, TFM_ERROR_UNSUPPORTED, "%s: needs features 0x%lx that this library does not have",
                         file->name, (unsigned long)tfm__u32(p + 12));
    if (tfm__u64(p + 16) != size)
        return tfm__fail(error, TFM_ERROR_FORMAT, "%s: has %llu bytes, but its header says %llu: truncated or damaged",
                         file->name, (unsigned long long)size, (unsigned long long)tfm__u64(p + 16));
    meta_size = tfm__u64(p + 32);
    directory_size = tfm__u64(p + 48);
    if (tfm__u64(p + 24) != TFM__HEADER_SIZE || meta_size % 8 || meta_size > size - TFM__HEADER_SIZE ||
        tfm__u64(p + 40) != TFM__HEADER_SIZE + meta_size || directory_size % 8 ||
        directory_size > size - TFM__HEADER_SIZE - meta_size)
        return tfm__fail(error, TFM_ERROR_FORMAT, "%s: the header's offsets and sizes do not fit together", file->name);
    directory = TFM__HEADER_SIZE + (size_t)meta_size;
    end = directory + (size_t)directory_size;
    tfm__crc_prepare(&crc);
    value = tfm__crc(&crc, tfm__crc(&crc, 0, p, 60), p + TFM__HEADER_SIZE, end - TFM__HEADER_SIZE);
    if (value != tfm__u32(p + 60))
        return tfm__fail(error, TFM_ERROR_FORMAT, "%s: the header's checksum is wrong: the file is damaged",
                         file->name);
    status = tfm__parse_meta(file, TFM__HEADER_SIZE, directory, error);
    if (status == TFM_OK)
        status = tfm__parse_directory(file, directory, end, tfm__u32(p + 56), error);
    if (status == TFM_OK)
        status = tfm__turn_file(file, error);
    return status == TFM_OK ? tfm__join_parts(file, error) : status;
}

TFM_API void tfm_file_close(tfm_file *file) {
    tfm_allocator allocator;
    if (!file)
        return;
    allocator = file->allocator;
    tfm__release(&allocator, file->meta);
    tfm__release(&allocator, file->meta_by_key);
    tfm__release(&allocator, file->entries);
    tfm__release(&allocator, file->parts);
    tfm__release(&allocator, file->whole);
    tfm__release(&allocator, file->entry_by_name);
    tfm__release_aligned(&allocator, file->turned);
#ifndef TFM_NO_STDIO
    if (file->owned)
        tfm__unmap_file(&allocator, &file->bytes);
#endif
    tfm__release(&allocator, file);
}

static tfm_file *tfm__file_create(const char *name, const tfm_allocator *allocator, tfm_error *error) {
    tfm_allocator memory = tfm__allocator(allocator);
    tfm_file *file = (tfm_file *)tfm__allocate_zeroed(&memory, sizeof *file);
    if (!file) {
        tfm__fail_memory(error, sizeof *file);
        return NULL;
    }
    file->allocator = memory;
    snprintf(file->name, sizeof file->name, "%s", name);
    return file;
}

/* The file if it is good, otherwise NULL and the file is closed. */
static tfm_file *tfm__file_parsed(tfm_file *file, tfm_error *error) {
    if (tfm__parse_file(file, error) == TFM_OK)
        return file;
    tfm_file_close(file);
    return NULL;
}

TFM_API tfm_file *tfm_file_open_memory(const void *data, size_t size, const char *name, const tfm_allocator *allocator,
                                       tfm_error *error) {
    tfm_file *file = tfm__file_create(name ? name : "model", allocator, error);
    if (!file)
        return NULL;
    if ((uintptr_t)data % 8) {
        tfm__fail(error, TFM_ERROR_ARGUMENT, "%s: the memory is not 8-byte aligned", file->name);
        tfm_file_close(file);
        return NULL;
    }
    file->bytes.data = (const unsigned char *)data;
    file->bytes.size = size;
    return tfm__file_parsed(file, error);
}

#ifndef TFM_NO_STDIO
TFM_API tfm_file *tfm_file_open(const char *path, const tfm_allocator *allocator, tfm_error *error) {
    tfm_file *file = tfm__file_create(path, allocator, error);
    if (!file)
        return NULL;
    if (tfm__map_file(path, &file->allocator, &file->bytes, error) != TFM_OK) {
        tfm_file_close(file);
        return NULL;
    }
    file->owned = 1;
    return tfm__file_parsed(file, error);
}
#endif

TFM_API size_t tfm_file_bytes(const tfm_file *file) {
    return file->bytes.size;
}

TFM_API size_t tfm_file_n_meta(const tfm_file *file) {
    return file->n_meta;
}

TFM_API const tfm_meta *tfm_file_meta(const tfm_file *file, size_t index) {
    return index < file->n_meta ? file->meta + index : NULL;
}

TFM_API size_t tfm_file_n_tensors(const tfm_file *file) {
    return file->n_entries;
}

TFM_API const tfm_entry *tfm_file_entry(const tfm_file *file, size_t index) {
    return index < file->n_entries ? file->entries + index : NULL;
}

TFM_API const tfm_entry *tfm_file_find(const tfm_file *file, const char *name) {
    const uint32_t *found =
        tfm__find_sorted(file, file->entry_by_name, file->n_entries + file->n_whole, tfm__name_order, name);
    return found ? file->entries + *found : NULL;
}

TFM_API const tfm_meta *tfm_file_find_meta(const tfm_file *file, const char *key) {
    const uint32_t *found = tfm__find_sorted(file, file->meta_by_key, file->n_meta, tfm__key_order, key);
    return found ? file->meta + *found : NULL;
}

/* The tensor's data in the mapped file is not needed again soon: lets the system take the memory back, so that a file
 * that is read through once need not fit in memory. */
static void tfm__file_forget(const tfm_file *file, const tfm_tensor *tensor) {
    const tfm_tensor *part = (const tfm_tensor *)tensor->data;
    size_t rows;
    if (tensor->dtype == TFM_PARTS)
        for (rows = 0; rows < tensor->shape[0]; rows += (part++)->shape[0])
            tfm__file_forget(file, part);
    else if (file->bytes.mapped)
        tfm__advise_unneeded(tfm__file_data(file, tensor), tfm_tensor_bytes(tensor));
}

TFM_API tfm_status tfm_file_verify(const tfm_file *file, tfm_error *error) {
    tfm__crc_tables crc;
    size_t i;
    tfm__crc_prepare(&crc);
    for (i = 0; i < file->n_entries; i++) {
        const tfm_entry *entry = file->entries + i;
        if (tfm__crc(&crc, 0, tfm__file_data(file, &entry->tensor), tfm_tensor_bytes(&entry->tensor)) != entry->crc)
            return tfm__fail(error, TFM_ERROR_FORMAT, "%s: the checksum of tensor '%.*s' is wrong: the file is damaged",
                             file->name, (int)TFM__MIN(entry->name_size, 100), entry->name);
    }
    return TFM_OK;
}

/* No size in a description is larger. */
#define TFM__MAX_SIZE 0x7FFFFFFF
/* Nor all heads together, so that a row of queries, keys and values has a size in 32 bits, too. */
#define TFM__MAX_WIDTH ((size_t)TFM__MAX_SIZE / 4)

/* ---- folding: outlier channels moved from activations into weights, before both are quantized
 * Some channels of a real model's activations are 20 to 100 times larger than the rest, and take the precision of the 63
 * others of their group. Where a channel i comes out of something linear, a factor can move: activation / c_i, and weights
 * of that input * c_i, is the same product (Xiao et al. 2023, SmoothQuant). c_i = sqrt(size of the activation / size of the
 * weights), rounded to a power of two, so that nothing changes but exponents. The sizes need no data: after a norm,
 * channel i has the size sqrt(gain_i^2 + bias_i^2); after a matrix, channel j sqrt(sum_i (w_ji size_i)^2 + bias_j^2).
 * Three pairs in each block: norm -> matrix (pre-norm only: the residual stream of post-norm is the norm's own result),
 * values -> out, and, in a gated FFN, up -> down (the gate is not linear). */

typedef struct tfm__folding {
    tfm__factors *of; /* [n_entries + n_whole] of the file */
    float *floats;
    size_t size, used; /* floats */
} tfm__folding;

/* The shape of a stack, as far as folding needs it, and its weights in one block. */
typedef struct tfm__foldable {
    size_t n_heads, n_kv_heads, head_dim;
    int pre_norm, gated;
    float offset;                                                                   /* that is added to norm weights */
    const tfm_entry *attention_norm[2], *qkv[2], *out, *ffn_norm[2], *up[2], *down; /* [weight, bias] */
} tfm__foldable;

static const tfm_meta *tfm__stack_meta(const tfm_file *file, const char *stack, const char *key) {
    char full[64];
    snprintf(full, sizeof full, "%s.%s", stack, key);
    return tfm_file_find_meta(file, full);
}

static size_t tfm__stack_size(const tfm_file *file, const char *stack, const char *key) {
    const tfm_meta *meta = tfm__stack_meta(file, stack, key);
    int64_t value = meta && meta->type == TFM_META_I64 && meta->count == 1 ? *(const int64_t *)meta->values : 0;
    return value > 0 && value < TFM__MAX_SIZE ? (size_t)value : 0;
}

static int tfm__stack_says(const tfm_file *file, const char *stack, const char *key, const char *word) {
    const tfm_meta *meta = tfm__stack_meta(file, stack, key);
    return meta && meta->type == TFM_META_TEXT && meta->count == strlen(word) &&
           !memcmp(meta->values, word, meta->count);
}

/* A tensor of a block that can take part: a matrix that is yet to be packed, or a vector. */
static const tfm_entry *tfm__block_entry(const tfm_file *file, const char *stack, size_t layer, const char *part) {
    const tfm_entry *entry;
    char name[96];
    snprintf(name, sizeof name, "%s.blocks.%lu.%s", stack, (unsigned long)layer, part);
    entry = tfm_file_find(file, name);
    return entry && entry->tensor.dtype != TFM_I8 && entry->tensor.n_dims <= 2 ? entry : NULL;
}

static tfm__foldable tfm__find_foldable(const tfm_file *file, const char *stack, size_t layer) {
    const tfm_meta *offset = tfm__stack_meta(file, stack, "norm_weight_offset");
    tfm__foldable f;
    memset(&f, 0, sizeof f);
    f.n_heads = tfm__stack_size(file, stack, "n_heads");
    f.n_kv_heads = tfm__stack_size(file, stack, "n_kv_heads");
    f.head_dim = tfm__stack_size(file, stack, "head_dim");
    f.pre_norm = !tfm__stack_says(file, stack, "norm_place", "post") && !tfm__stack_size(file, stack, "parallel");
    f.gated = tfm__stack_says(file, stack, "ffn", "gated");
    if (offset && offset->type == TFM_META_F64 && offset->count == 1)
        f.offset = (float)*(const double *)offset->values;
    f.attention_norm[0] = tfm__block_entry(file, stack, layer, "attention_norm.weight");
    f.attention_norm[1] = tfm__block_entry(file, stack, layer, "attention_norm.bias");
    f.qkv[0] = tfm__block_entry(file, stack, layer, "attention.qkv.weight");
    f.qkv[1] = tfm__block_entry(file, stack, layer, "attention.qkv.bias");
    f.out = tfm__block_entry(file, stack, layer, "attention.out.weight");
    f.ffn_norm[0] = tfm__block_entry(file, stack, layer, "ffn_norm.weight");
    f.ffn_norm[1] = tfm__block_entry(file, stack, layer, "ffn_norm.bias");
    f.up[0] = tfm__block_entry(file, stack, layer, "ffn.up.weight");
    f.up[1] = tfm__block_entry(file, stack, layer, "ffn.up.bias");
    f.down = tfm__block_entry(file, stack, layer, "ffn.down.weight");
    return f;
}

static int tfm__is_matrix_of(const tfm_entry *entry, size_t out, size_t in) {
    return entry && entry->tensor.n_dims == 2 && entry->tensor.shape[0] == out && entry->tensor.shape[1] == in;
}

static int tfm__is_vector_of(const tfm_entry *entry, size_t n, int optional) {
    return entry ? entry->tensor.n_dims == 1 && entry->tensor.shape[0] == n : optional;
}

/* Are these shapes what the description says? If not, nothing is folded: loading will say what is wrong. */
static int tfm__foldable_fits(const tfm__foldable *f) {
    size_t inner = tfm__product(f->n_heads, f->head_dim), kv = tfm__product(f->n_kv_heads, f->head_dim), d_model, d_ff;
    if (inner > TFM__MAX_WIDTH || kv > TFM__MAX_WIDTH || !f->qkv[0] || !f->down || f->qkv[0]->tensor.n_dims != 2 ||
        f->down->tensor.n_dims != 2 || !f->n_kv_heads || !f->head_dim || f->n_heads % f->n_kv_heads)
        return 0;
    d_model = f->qkv[0]->tensor.shape[1];
    d_ff = f->down->tensor.shape[1];
    return tfm__is_matrix_of(f->qkv[0], inner + 2 * kv, d_model) && tfm__is_vector_of(f->qkv[1], inner + 2 * kv, 1) &&
           tfm__is_matrix_of(f->out, d_model, inner) &&
           tfm__is_matrix_of(f->up[0], (f->gated ? 2 : 1) * d_ff, d_model) &&
           tfm__is_vector_of(f->up[1], (f->gated ? 2 : 1) * d_ff, 1) && f->down->tensor.shape[0] == d_model &&
           tfm__is_vector_of(f->attention_norm[0], d_model, !f->pre_norm) &&
           tfm__is_vector_of(f->attention_norm[1], d_model, 1) &&
           tfm__is_vector_of(f->ffn_norm[0], d_model, !f->pre_norm) && tfm__is_vector_of(f->ffn_norm[1], d_model, 1);
}

static float tfm__entry_float(const tfm_entry *entry, size_t i) {
    float value = 0;
    if (entry)
        tfm__to_floats(entry->tensor.dtype, tfm__at(entry->tensor.data, entry->tensor.dtype, i), 1, 1, &value);
    return value;
}

/* Squares of the sizes of a norm's results. */
static void tfm__norm_powers(const tfm__foldable *f, const tfm_entry *const norm[2], size_t n, float *powers) {
    size_t i;
    for (i = 0; i < n; i++) {
        float gain = tfm__entry_float(norm[0], i) + f->offset, bias = tfm__entry_float(norm[1], i);
        powers[i] = f->pre_norm ? gain * gain + bias * bias : 1;
    }
}

/* columns[in]: the sums of the squares of a matrix's columns. rows[out], or NULL: squares of the sizes of its results, for
 * inputs with the squares in_powers. */
static void tfm__measure(const tfm_entry *const linear[2], const float *in_powers, float *columns, float *rows) {
    const tfm_tensor *w = &linear[0]->tensor;
    size_t out = w->shape[0], in = w->shape[1], panel, first, n, k, lane;
    float part[TFM__PACK_STEP * TFM__PANEL];
    memset(columns, 0, in * sizeof *columns);
    for (panel = 0; panel < out; panel += TFM__PANEL) {
        float sums[16] = {0};
        for (first = 0; first < in; first += n) {
            n = TFM__MIN(TFM__PACK_STEP, in - first);
            tfm__read_part(w, panel / TFM__PANEL, first, n, part);
            for (k = 0; k < n; k++)
                for (lane = 0; lane < TFM__PANEL; lane++) {
                    float square = part[k * TFM__PANEL + lane] * part[k * TFM__PANEL + lane];
                    columns[first + k] += square;
                    if (rows)
                        sums[lane] += square * in_powers[first + k];
                }
        }
        for (lane = 0; rows && lane < TFM__MIN(TFM__PANEL, out - panel); lane++) {
            float bias = tfm__entry_float(linear[1], panel + lane);
            rows[panel + lane] = sums[lane] + bias * bias;
        }
    }
}

/* From the squares of activations and weights: their common factors c and, in place of the activations, 1 / c. */
static void tfm__balance(float *activations, float *weights, size_t n) {
    float mean = 0;
    size_t counted = 0, i;
    for (i = 0; i < n; i++) {
        float ratio = weights[i] > 0 && activations[i] > 0 ? activations[i] / weights[i] : 0;
        weights[i] = ratio > 0 && tfm__is_finite(ratio) ? log2f(ratio) / 4 : NAN; /* of c: sqrt(sqrt(ratio)) */
        if (tfm__is_finite(weights[i]))
            mean += weights[i], counted++;
    }
    mean /= (float)TFM__MAX(counted, 1);
    for (i = 0; i < n; i++) {
        float exponent = tfm__is_finite(weights[i]) ? rintf(weights[i] - mean) : 0;
        exponent = TFM__MAX(-16, TFM__MIN(16, exponent));
        weights[i] = ldexpf(1, (int)exponent);
        activations[i] = ldexpf(1, -(int)exponent);
    }
}

/* Room in the folding's memory; an address only on the second run. */
static float *tfm__fold_take(tfm__folding *folding, size_t n) {
    float *floats = folding->floats ? folding->floats + folding->used : NULL;
    folding->used += n;
    return floats;
}

static void tfm__set_factors(tfm__folding *folding, const tfm_file *file, const tfm_entry *entry, const float *rows,
                             const float *columns) {
    tfm__factors *of = entry ? folding->of + (entry - file->entries) : NULL;
    if (of && rows)
        of->rows = rows;
    if (of && columns)
        of->columns = columns;
}

/* One block. rows: of qkv and up, first squares of sizes and then factors; columns: of all four. */
static void tfm__fold_block(tfm__folding *folding, const tfm_file *file, const tfm__foldable *f) {
    size_t d_model = f->qkv[0]->tensor.shape[1], d_ff = f->down->tensor.shape[1], inner = f->n_heads * f->head_dim;
    size_t kv = f->n_kv_heads * f->head_dim, up = f->up[0]->tensor.shape[0], group = f->n_heads / f->n_kv_heads, i;
    float *qkv_rows = tfm__fold_take(folding, inner + 2 * kv), *qkv_columns = tfm__fold_take(folding, d_model);
    float *out_columns = tfm__fold_take(folding, inner), *values = tfm__fold_take(folding, kv);
    float *up_rows = tfm__fold_take(folding, up), *up_columns = tfm__fold_take(folding, d_model);
    float *down_columns = tfm__fold_take(folding, d_ff);
    float *norms[2];
    const tfm_entry *out[2] = {NULL, NULL}, *down[2] = {NULL, NULL};
    norms[0] = tfm__fold_take(folding, d_model);
    norms[1] = tfm__fold_take(folding, d_model);
    if (!folding->floats)
        return;
    out[0] = f->out;
    down[0] = f->down;
    tfm__norm_powers(f, f->attention_norm, d_model, norms[0]);
    tfm__measure(f->qkv, norms[0], qkv_columns, qkv_rows);
    tfm__measure(out, NULL, out_columns, NULL);
    memset(values, 0, kv * sizeof *values);
    for (i = 0; i < inner; i++) /* heads of a group share values */
        values[i / f->head_dim / group * f->head_dim + i % f->head_dim] += out_columns[i];
    tfm__balance(qkv_rows + inner + kv, values, kv);
    for (i = 0; i < inner; i++)
        out_columns[i] = values[i / f->head_dim / group * f->head_dim + i % f->head_dim];
    for (i = 0; i < inner + kv; i++)
        qkv_rows[i] = 1;
    tfm__set_factors(folding, file, f->qkv[0], qkv_rows, NULL);
    tfm__set_factors(folding, file, f->qkv[1], qkv_rows, NULL);
    tfm__set_factors(folding, file, f->out, NULL, out_columns);
    tfm__norm_powers(f, f->ffn_norm, d_model, norms[1]);
    tfm__measure(f->up, norms[1], up_columns, up_rows);
    if (f->gated) {
        tfm__measure(down, NULL, down_columns, NULL);
        for (i = 0; i < d_ff; i++) {
            up_rows[d_ff + i] *= up_rows[i]; /* the product of gate and up */
            up_rows[i] = 1;
        }
        tfm__balance(up_rows + d_ff, down_columns, d_ff);
        tfm__set_factors(folding, file, f->up[0], up_rows, NULL);
        tfm__set_factors(folding, file, f->up[1], up_rows, NULL);
        tfm__set_factors(folding, file, f->down, NULL, down_columns);
    }
    if (!f->pre_norm)
        return;
    tfm__balance(norms[0], qkv_columns, d_model);
    tfm__balance(norms[1], up_columns, d_model);
    tfm__set_factors(folding, file, f->qkv[0], NULL, qkv_columns);
    tfm__set_factors(folding, file, f->up[0], NULL, up_columns);
    for (i = 0; i < 2; i++) {
        tfm__set_factors(folding, file, f->attention_norm[i], norms[0], NULL);
        tfm__set_factors(folding, file, f->ffn_norm[i], norms[1], NULL);
    }
    folding->of[f->attention_norm[0] - file->entries].offset = f->offset;
    folding->of[f->ffn_norm[0] - file->entries].offset = f->offset;
}

static void tfm__fold_stack(tfm__folding *folding, const tfm_file *file, const char *stack) {
    size_t n_layers = TFM__MIN(tfm__stack_size(file, stack, "n_layers"), file->n_entries), layer;
    for (layer = 0; layer < n_layers; layer++) {
        tfm__foldable f = tfm__find_foldable(file, stack, layer);
        if (!tfm__foldable_fits(&f))
            continue;
        tfm__fold_block(folding, file, &f);
        if (folding->floats) { /* so that a file larger than memory streams through it */
            tfm__file_forget(file, &f.qkv[0]->tensor);
            tfm__file_forget(file, &f.out->tensor);
            tfm__file_forget(file, &f.up[0]->tensor);
            tfm__file_forget(file, &f.down->tensor);
        }
    }
}

static void tfm__fold_free(tfm__folding *folding, const tfm_allocator *allocator) {
    tfm__release(allocator, folding->of);
    tfm__release(allocator, folding->floats);
    memset(folding, 0, sizeof *folding);
}

/* The factors for all of a file's tensors. */
static tfm_status tfm__fold(const tfm_file *file, tfm__folding *folding, const tfm_allocator *allocator,
                            tfm_error *error) {
    size_t of_size = tfm__product(file->n_entries + file->n_whole, sizeof *folding->of), run;
    memset(folding, 0, sizeof *folding);
    folding->of = (tfm__factors *)tfm__allocate_zeroed(allocator, of_size);
    if (!folding->of)
        return tfm__fail_memory(error, of_size);
    for (run = 0; run < 2; run++) { /* how much memory; then the factors */
        folding->used = 0;
        tfm__fold_stack(folding, file, "encoder");
        tfm__fold_stack(folding, file, "decoder");
        if (run || !folding->used)
            break;
        folding->floats = (float *)tfm__allocate(allocator, tfm__product(folding->used, sizeof *folding->floats));
        if (!folding->floats) {
            tfm__fold_free(folding, allocator);
            return tfm__fail_memory(error, tfm__product(folding->used, sizeof *folding->floats));
        }
    }
    return TFM_OK;
}

static tfm__factors tfm__factors_of(const tfm__folding *folding, const tfm_file *file, const tfm_entry *entry) {
    return folding->of ? folding->of[entry - file->entries] : tfm__no_factors();
}

/* A vector times its factors, in fp32. */
static void tfm__factored_vector(const tfm_tensor *from, const tfm__factors *factors, float *to) {
    size_t n = from->shape[0], i;
    tfm__to_floats(from->dtype, from->data, 1, n, to);
    for (i = 0; factors->rows && i < n; i++)
        to[i] = (to[i] + factors->offset) * factors->rows[i] - factors->offset;
}

/* ---- writing */

static void tfm__put_u32(unsigned char *p, uint32_t value) {
    p[0] = (unsigned char)value;
    p[1] = (unsigned char)(value >> 8);
    p[2] = (unsigned char)(value >> 16);
    p[3] = (unsigned char)(value >> 24);
}

static void tfm__put_u64(unsigned char *p, uint64_t value) {
    tfm__put_u32(p, (uint32_t)value);
    tfm__put_u32(p + 4, (uint32_t)(value >> 32));
}

#ifndef TFM_NO_STDIO

/* A file that is being rewritten tensor by tensor. */
typedef struct tfm__rewrite {
    const tfm_file *from;
    const tfm_quantize_options *options;
    tfm__folding folding; /* for i8 */
    tfm_allocator allocator;
    tfm__threads threads;
    FILE *to;
    const char *path;    /* of `to` */
    unsigned char *head; /* header, metadata and directory of the new file */
    size_t head_size, size;
    uint64_t read, total; /* progress, in bytes of the old file's tensors */
} tfm__rewrite;

/* The few numbers that relative positions add to the scores. */
static int tfm__is_relative_bias(const tfm_entry *entry) {
    static const char name[] = ".relative_bias.weight";
    const size_t size = sizeof name - 1;
    return entry->name_size > size && !memcmp(entry->name + entry->name_size - size, name, size) &&
           entry->tensor.dtype <= TFM_BF16;
}

/* What the tensor becomes: matrices panels, of the wanted dtype; vectors stay, or are fp32 if they take part in folding;
 * relative biases stay, which are used in fp32. */
static tfm_tensor tfm__rewritten(const tfm__rewrite *rewrite, const tfm_entry *entry) {
    const tfm_dtype dtype = rewrite->options->dtype ? rewrite->options->dtype : TFM_I8;
    const tfm_tensor *tensor = &entry->tensor;
    if (tensor->n_dims == 2 && !tfm__is_relative_bias(entry))
        return tfm__tensor(dtype, TFM_PANELS, tensor->shape[0], tensor->shape[1], NULL);
    if (tfm__factors_of(&rewrite->folding, rewrite->from, entry).rows)
        return tfm__tensor(TFM_F32, TFM_ROWS, tensor->shape[0], 0, NULL);
    return *tensor;
}

static tfm_status tfm__write(const tfm__rewrite *rewrite, const void *data, size_t size, tfm_error *error) {
    if (fwrite(data, 1, size, rewrite->to) == size)
        return TFM_OK;
    return tfm__fail(error, TFM_ERROR_FILE, "%.300s: can't be written: %s", rewrite->path, strerror(errno));
}

static tfm_status tfm__write_padding(const tfm__rewrite *rewrite, size_t to, tfm_error *error) {
    static const unsigned char zeros[64] = {0};
    return tfm__write(rewrite, zeros, to - rewrite->size, error);
}

/* What is written in the place of an entry: that, or the whole of which it is the first part; NULL for its other parts. */
static const tfm_entry *tfm__written(const tfm_file *file, size_t index) {
    const tfm_entry *entry = file->entries + index, *whole = file->entries + file->whole[index];
    return whole == entry || ((const tfm_tensor *)whole->tensor.data)->data == entry->tensor.data ? whole : NULL;
}

/* Converts and writes one tensor, and notes its checksum in the directory at `directory`. */
static tfm_status tfm__rewrite_tensor(tfm__rewrite *rewrite, const tfm__crc_tables *crc, const tfm_entry *entry,
                                      unsigned char *directory, tfm_error *error) {
    const tfm_tensor *tensor = &entry->tensor;
    tfm_tensor target = tfm__rewritten(rewrite, entry);
    size_t offset = (size_t)tfm__u64(directory + 48), size = tfm_tensor_bytes(&target);
    const tfm_quantize_options *options = rewrite->options;
    const tfm__factors factors = tfm__factors_of(&rewrite->folding, rewrite->from, entry);
    void *memory = NULL;
    tfm_status status;
    if (!target.data) {
        memory = tfm__allocate_aligned(&rewrite->allocator, size, TFM__CACHE_LINE);
        if (!memory)
            return tfm__fail_memory(error, size);
        if (tensor->n_dims == 2)
            target = tfm__pack_into(&rewrite->threads, tensor, factors, target.dtype, memory);
        else {
            tfm__factored_vector(tensor, &factors, (float *)memory);
            target.data = memory;
        }
        if (tensor->n_dims == 2 && tfm__is_not_finite(&target)) {
            tfm__release_aligned(&rewrite->allocator, memory);
            return tfm__fail(error, TFM_ERROR_FORMAT,
                             "%s: a weight of tensor '%.*s' is not finite, and can't be quantized", rewrite->from->name,
                             (int)TFM__MIN(entry->name_size, 100), entry->name);
        }
        tfm__turn_tensor(&target, (unsigned char *)memory);
    } else
        target.data = tfm__file_data(rewrite->from, tensor);
    tfm__put_u32(directory + 64, tfm__crc(crc, 0, target.data, size));
    status = tfm__write_padding(rewrite, offset, error);
    if (status == TFM_OK)
        status = tfm__write(rewrite, target.data, size, error);
    tfm__release_aligned(&rewrite->allocator, memory);
    tfm__file_forget(rewrite->from, tensor);
    rewrite->size = offset + size;
    rewrite->read += tfm_tensor_bytes(tensor);
    if (status == TFM_OK && options->progress &&
        options->progress(options->progress_user, rewrite->read, rewrite->total))
        status = tfm__fail(error, TFM_ERROR_STOPPED, "%.300s: stopped", rewrite->path);
    return status;
}

/* Writes the new directory over the old one, which is no smaller: dtype, layout, offset and size of each tensor. */
static void tfm__plan_rewrite(tfm__rewrite *rewrite) {
    const tfm_file *from = rewrite->from;
    unsigned char *directory = rewrite->head + (size_t)tfm__u64(rewrite->head + 40), *entry_at = directory;
    size_t n = 0, size, end, i;
    for (i = 0; i < from->n_entries; i++) {
        const tfm_entry *entry = tfm__written(from, i);
        tfm_tensor target;
        if (!entry)
            continue;
        target = tfm__rewritten(rewrite, entry);
        size = tfm__round_up(entry->name_size, 8);
        memset(entry_at, 0, 72 + size);
        tfm__put_u32(entry_at, (uint32_t)entry->name_size);
        tfm__put_u32(entry_at + 4, (uint32_t)target.dtype);
        tfm__put_u32(entry_at + 8, (uint32_t)target.layout);
        tfm__put_u32(entry_at + 12, (uint32_t)target.n_dims);
        for (end = 0; end < TFM_MAX_DIMS; end++)
            tfm__put_u64(entry_at + 16 + 8 * end, target.shape[end]);
        tfm__put_u64(entry_at + 56, tfm_tensor_bytes(&target));
        memcpy(entry_at + 72, entry->name, entry->name_size);
        rewrite->total += tfm_tensor_bytes(&entry->tensor);
        entry_at += 72 + size;
        n++;
    }
    rewrite->head_size = (size_t)(entry_at - rewrite->head);
    for (end = rewrite->head_size; directory < entry_at; directory += 72 + tfm__round_up(tfm__u32(directory), 8)) {
        end = tfm__round_up(end, TFM__CACHE_LINE);
        tfm__put_u64(directory + 48, end);
        end += (size_t)tfm__u64(directory + 56);
    }
    tfm__put_u64(rewrite->head + 16, end);
    tfm__put_u64(rewrite->head + 48, rewrite->head_size - (size_t)tfm__u64(rewrite->head + 40));
    tfm__put_u32(rewrite->head + 56, (uint32_t)n);
}

static tfm_status tfm__rewrite_file(tfm__rewrite *rewrite, tfm_error *error) {
    unsigned char *directory = rewrite->head + (size_t)tfm__u64(rewrite->head + 40);
    tfm__crc_tables crc;
    tfm_status status;
    size_t i;
    tfm__crc_prepare(&crc);
    tfm__plan_rewrite(rewrite);
    status = tfm__write(rewrite, rewrite->head, rewrite->head_size, error); /* again when the checksums are known */
    rewrite->size = rewrite->head_size;
    for (i = 0; status == TFM_OK && i < rewrite->from->n_entries; i++) {
        const tfm_entry *entry = tfm__written(rewrite->from, i);
        if (!entry)
            continue;
        status = tfm__rewrite_tensor(rewrite, &crc, entry, directory, error);
        directory += 72 + tfm__round_up(entry->name_size, 8);
    }
    if (status != TFM_OK)
        return status;
    tfm__put_u32(rewrite->head + 60, tfm__crc(&crc, tfm__crc(&crc, 0, rewrite->head, 60),
                                              rewrite->head + TFM__HEADER_SIZE, rewrite->head_size - TFM__HEADER_SIZE));
    if (tfm__seek(rewrite->to, 0, SEEK_SET))
        return tfm__fail(error, TFM_ERROR_FILE, "%.300s: can't be written: %s", rewrite->path, strerror(errno));
    return tfm__write(rewrite, rewrite->head, rewrite->head_size, error);
}

/* Writes the temporary file beside the output. */
static tfm_status tfm__write_temporary(tfm__rewrite *rewrite, tfm_error *error) {
    tfm_status status;
    rewrite->to = tfm__open_file(rewrite->path, "wb");
    if (!rewrite->to)
        return tfm__fail(error, TFM_ERROR_FILE, "%.300s: can't be created: %s", rewrite->path, strerror(errno));
    status = tfm__rewrite_file(rewrite, error);
    if (fclose(rewrite->to) && status == TFM_OK)
        status = tfm__fail(error, TFM_ERROR_FILE, "%.300s: can't be written: %s", rewrite->path, strerror(errno));
    if (status != TFM_OK)
        tfm__remove_file(rewrite->path);
    return status;
}

/* PATH.part, for the caller to release; NULL: no memory. */
static char *tfm__temporary_path(const char *path, const tfm_allocator *allocator) {
    char *part = (char *)tfm__allocate(allocator, strlen(path) + sizeof ".part");
    if (part) {
        strcpy(part, path);
        strcat(part, ".part");
    }
    return part;
}

/* The temporary file gets its name when all of it is there. */
static tfm_status tfm__rename_temporary(const char *temporary, const char *out_path, tfm_error *error) {
    tfm_status status;
    if (!tfm__rename_file(temporary, out_path))
        return TFM_OK;
    status = tfm__fail(error, TFM_ERROR_FILE, "%.300s: can't be renamed: %s", temporary, strerror(errno));
    tfm__remove_file(temporary);
    return status;
}

TFM_API tfm_status tfm_quantize(const char *in_path, const char *out_path, const tfm_quantize_options *options,
                                tfm_error *error) {
    tfm_quantize_options usual;
    tfm__rewrite rewrite;
    tfm_error unread;
    tfm_file *from;
    tfm_status status;
    char *path;
    memset(&usual, 0, sizeof usual);
    memset(&rewrite, 0, sizeof rewrite);
    error = error ? error : &unread;
    rewrite.options = options ? options : &usual;
    if ((unsigned)rewrite.options->dtype >= TFM_DTYPE_COUNT)
        return tfm__fail(error, TFM_ERROR_UNSUPPORTED, "unknown type %d", (int)rewrite.options->dtype);
    if (tfm__check_replaceable(out_path, error) != TFM_OK)
        return error->status;
    rewrite.allocator = tfm__allocator(&rewrite.options->allocator);
    rewrite.threads.count = tfm__thread_count(rewrite.options->threads);
    rewrite.threads.apart = 1;
    from = tfm_file_open(in_path, &rewrite.allocator, error);
    if (!from)
        return error->status;
    rewrite.from = from;
    rewrite.head_size = (size_t)(tfm__u64(from->bytes.data + 40) + tfm__u64(from->bytes.data + 48));
    rewrite.head = (unsigned char *)tfm__allocate(&rewrite.allocator, rewrite.head_size);
    path = tfm__temporary_path(out_path, &rewrite.allocator);
    if (rewrite.head && path) {
        memcpy(rewrite.head, from->bytes.data, rewrite.head_size);
        rewrite.path = path;
        status = TFM_OK;
        if (!rewrite.options->dtype || rewrite.options->dtype == TFM_I8)
            status = tfm__fold(from, &rewrite.folding, &rewrite.allocator, error);
        if (status == TFM_OK)
            status = tfm__write_temporary(&rewrite, error);
        tfm__fold_free(&rewrite.folding, &rewrite.allocator);
    } else
        status = tfm__fail_memory(error, rewrite.head_size);
    tfm_file_close(from); /* before it may be replaced: not every system replaces a file that is in use */
    if (status == TFM_OK)
        status = tfm__rename_temporary(path, out_path, error);
    tfm__release(&rewrite.allocator, path);
    tfm__release(&rewrite.allocator, rewrite.head);
    return status;
}

#endif /* !TFM_NO_STDIO */

/* =====================================================================================================================
 * f. TOKENIZERS: text to token ids and back
 *    What lives here: the classes of Unicode characters, UTF-8, the rule that cuts a text into pieces
 *    ("pre-tokenization"), the byte-level BPE that GPT-2 introduced, BERT's normalization and WordPiece, SentencePiece's
 *    models, and the added tokens (<|endoftext|> and its like) that are found in a text before anything else looks at it.
 *    The standard is Hugging Face's `tokenizers`: the ids are the same for every text. It takes text in Unicode; here a
 *    text is bytes. To byte-level BPE a byte that is not well-formed UTF-8 is a character of its own that is neither
 *    letter, nor number, nor space, and is kept; others see U+FFFD for it, as after a lossy decoding (which BERT's
 *    normalization removes). A tokenizer is built once from tables in a model file, of which nothing is believed, and is never
 *    written to again: any number of threads may share it. Memory for the work on a text belongs to the call.
 * ================================================================================================================== */

/* ---- Classes of characters --------------------------------------------------------------------------------------- */

/* What tfm__unicode_class() says of a character: one of the first four or none, and perhaps TFM__WORD, "part of a word"
   (letters, marks, digits, the underscore and its like, ...: \w in Rust's regular expressions). The last three are BERT's:
   a word by itself; removed by "clean text" (even where it is TFM__SPACE, too); removed by stripping accents. */
enum {
    TFM__LETTER = 1,
    TFM__NUMBER = 2,
    TFM__SPACE = 4,
    TFM__MARK = 8,
    TFM__WORD = 16,
    TFM__PUNCTUATION = 32,
    TFM__CONTROL = 64,
    TFM__ACCENT = 128
};

/* BEGIN UNICODE 16.0: the tables as Hugging Face tokenizers has them, written by tests/make_unicode.py */
/* clang-format off */
static const unsigned char tfm__ascii_classes[128] = {
    64, 64, 64, 64, 64, 64, 64, 64, 64, 4, 4, 68, 68, 4, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64,
    64, 64, 4, 32, 32, 32, 32, 32, 32, 32, 32, 32, 32, 32, 32, 32, 32, 32, 18, 18, 18, 18, 18, 18, 18, 18, 18, 18, 32,
    32, 32, 32, 32, 32, 32, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17,
    17, 17, 17, 32, 32, 32, 32, 48, 32, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17,
    17, 17, 17, 17, 17, 17, 32, 32, 32, 32, 64,
};

/* Every run of code points of one class: (first code point << 8 | class), in order. */
static const uint32_t tfm__unicode_runs[2366] = {
    0x40, 0x904, 0xB44, 0xD04, 0xE40, 0x2004, 0x2120, 0x3012, 0x3A20, 0x4111, 0x5B20, 0x5F30, 0x6020, 0x6111, 0x7B20,
    0x7F40, 0x8544, 0x8640, 0xA004, 0xA120, 0xA200, 0xA720, 0xA800, 0xAA11, 0xAB20, 0xAC00, 0xAD40, 0xAE00, 0xB202,
    0xB400, 0xB511, 0xB620, 0xB800, 0xB902, 0xBA11, 0xBB20, 0xBC02, 0xBF20, 0xC011, 0xD700, 0xD811, 0xF700, 0xF811,
    0x2C200, 0x2C611, 0x2D200, 0x2E011, 0x2E500, 0x2EC11, 0x2ED00, 0x2EE11, 0x2EF00, 0x30098, 0x37011, 0x37500, 0x37611,
    0x37800, 0x37A11, 0x37E20, 0x37F11, 0x38000, 0x38611, 0x38720, 0x38811, 0x38B00, 0x38C11, 0x38D00, 0x38E11, 0x3A200,
    0x3A311, 0x3F600, 0x3F711, 0x48200, 0x48398, 0x48818, 0x48A11, 0x53000, 0x53111, 0x55700, 0x55911, 0x55A20, 0x56011,
    0x58920, 0x58B00, 0x59198, 0x5BE20, 0x5BF98, 0x5C020, 0x5C198, 0x5C320, 0x5C498, 0x5C620, 0x5C798, 0x5C800, 0x5D011,
    0x5EB00, 0x5EF11, 0x5F320, 0x5F500, 0x60040, 0x60600, 0x60920, 0x60B00, 0x60C20, 0x60E00, 0x61098, 0x61B20, 0x61C40,
    0x61D00, 0x61E20, 0x62011, 0x64B98, 0x66012, 0x66A20, 0x66E11, 0x67098, 0x67111, 0x6D420, 0x6D511, 0x6D698, 0x6DD40,
    0x6DE00, 0x6DF98, 0x6E511, 0x6E798, 0x6E900, 0x6EA98, 0x6EE11, 0x6F012, 0x6FA11, 0x6FD00, 0x6FF11, 0x70020, 0x70E00,
    0x70F40, 0x71011, 0x71198, 0x71211, 0x73098, 0x74B00, 0x74D11, 0x7A698, 0x7B111, 0x7B200, 0x7C012, 0x7CA11, 0x7EB98,
    0x7F411, 0x7F600, 0x7F720, 0x7FA11, 0x7FB00, 0x7FD18, 0x7FE00, 0x80011, 0x81698, 0x81A11, 0x81B98, 0x82411, 0x82598,
    0x82811, 0x82998, 0x82E00, 0x83020, 0x83F00, 0x84011, 0x85998, 0x85C00, 0x85E20, 0x85F00, 0x86011, 0x86B00, 0x87011,
    0x88800, 0x88911, 0x88F00, 0x89718, 0x8A011, 0x8CA18, 0x8E200, 0x8E398, 0x90318, 0x90411, 0x93A98, 0x93B18, 0x93C98,
    0x93D11, 0x93E18, 0x94198, 0x94918, 0x94D98, 0x94E18, 0x95011, 0x95198, 0x95811, 0x96298, 0x96420, 0x96612, 0x97020,
    0x97111, 0x98198, 0x98218, 0x98400, 0x98511, 0x98D00, 0x98F11, 0x99100, 0x99311, 0x9A900, 0x9AA11, 0x9B100, 0x9B211,
    0x9B300, 0x9B611, 0x9BA00, 0x9BC98, 0x9BD11, 0x9BE18, 0x9C198, 0x9C500, 0x9C718, 0x9C900, 0x9CB18, 0x9CD98, 0x9CE11,
    0x9CF00, 0x9D718, 0x9D800, 0x9DC11, 0x9DE00, 0x9DF11, 0x9E298, 0x9E400, 0x9E612, 0x9F011, 0x9F200, 0x9F402, 0x9FA00,
    0x9FC11, 0x9FD00, 0x9FE18, 0x9FF00, 0xA0198, 0xA0318, 0xA0400, 0xA0511, 0xA0B00, 0xA0F11, 0xA1100, 0xA1311, 0xA2900,
    0xA2A11, 0xA3100, 0xA3211, 0xA3400, 0xA3511, 0xA3700, 0xA3811, 0xA3A00, 0xA3C98, 0xA3D00, 0xA3E18, 0xA4198, 0xA4300,
    0xA4798, 0xA4900, 0xA4B98, 0xA4E00, 0xA5198, 0xA5200, 0xA5911, 0xA5D00, 0xA5E11, 0xA5F00, 0xA6612, 0xA7098, 0xA7211,
    0xA7598, 0xA7600, 0xA8198, 0xA8318, 0xA8400, 0xA8511, 0xA8E00, 0xA8F11, 0xA9200, 0xA9311, 0xAA900, 0xAAA11, 0xAB100,
    0xAB211, 0xAB400, 0xAB511, 0xABA00, 0xABC98, 0xABD11, 0xABE18, 0xAC198, 0xAC600, 0xAC798, 0xAC918, 0xACA00, 0xACB18,
    0xACD98, 0xACE00, 0xAD011, 0xAD100, 0xAE011, 0xAE298, 0xAE400, 0xAE612, 0xAF020, 0xAF100, 0xAF911, 0xAFA18, 0xB0000,
    0xB0198, 0xB0218, 0xB0400, 0xB0511, 0xB0D00, 0xB0F11, 0xB1100, 0xB1311, 0xB2900, 0xB2A11, 0xB3100, 0xB3211, 0xB3400,
    0xB3511, 0xB3A00, 0xB3C98, 0xB3D11, 0xB3E18, 0xB3F98, 0xB4018, 0xB4198, 0xB4500, 0xB4718, 0xB4900, 0xB4B18, 0xB4D98,
    0xB4E00, 0xB5518, 0xB5698, 0xB5718, 0xB5800, 0xB5C11, 0xB5E00, 0xB5F11, 0xB6298, 0xB6400, 0xB6612, 0xB7000, 0xB7111,
    0xB7202, 0xB7800, 0xB8298, 0xB8311, 0xB8400, 0xB8511, 0xB8B00, 0xB8E11, 0xB9100, 0xB9211, 0xB9600, 0xB9911, 0xB9B00,
    0xB9C11, 0xB9D00, 0xB9E11, 0xBA000, 0xBA311, 0xBA500, 0xBA811, 0xBAB00, 0xBAE11, 0xBBA00, 0xBBE18, 0xBC098, 0xBC118,
    0xBC300, 0xBC618, 0xBC900, 0xBCA18, 0xBCD98, 0xBCE00, 0xBD011, 0xBD100, 0xBD718, 0xBD800, 0xBE612, 0xBF002, 0xBF300,
    0xC0098, 0xC0118, 0xC0511, 0xC0D00, 0xC0E11, 0xC1100, 0xC1211, 0xC2900, 0xC2A11, 0xC3A00, 0xC3C18, 0xC3D11, 0xC3E98,
    0xC4118, 0xC4500, 0xC4698, 0xC4900, 0xC4A98, 0xC4E00, 0xC5598, 0xC5700, 0xC5811, 0xC5B00, 0xC5D11, 0xC5E00, 0xC6011,
    0xC6298, 0xC6400, 0xC6612, 0xC7000, 0xC7802, 0xC7F00, 0xC8011, 0xC8198, 0xC8218, 0xC8400, 0xC8511, 0xC8D00, 0xC8E11,
    0xC9100, 0xC9211, 0xCA900, 0xCAA11, 0xCB400, 0xCB511, 0xCBA00, 0xCBC98, 0xCBD11, 0xCBE18, 0xCBF98, 0xCC018, 0xCC500,
    0xCC698, 0xCC718, 0xCC900, 0xCCA18, 0xCCC98, 0xCCE00, 0xCD518, 0xCD700, 0xCDD11, 0xCDF00, 0xCE011, 0xCE298, 0xCE400,
    0xCE612, 0xCF000, 0xCF111, 0xCF318, 0xCF400, 0xD0018, 0xD0198, 0xD0218, 0xD0411, 0xD0D00, 0xD0E11, 0xD1100, 0xD1211,
    0xD3B18, 0xD3D11, 0xD3E18, 0xD4198, 0xD4500, 0xD4618, 0xD4900, 0xD4A18, 0xD4D98, 0xD4E11, 0xD4F00, 0xD5411, 0xD5718,
    0xD5802, 0xD5F11, 0xD6298, 0xD6400, 0xD6612, 0xD7002, 0xD7900, 0xD7A11, 0xD8000, 0xD8118, 0xD8400, 0xD8511, 0xD9700,
    0xD9A11, 0xDB200, 0xDB311, 0xDBC00, 0xDBD11, 0xDBE00, 0xDC011, 0xDC700, 0xDCA98, 0xDCB00, 0xDCF18, 0xDD298, 0xDD500,
    0xDD698, 0xDD700, 0xDD818, 0xDE000, 0xDE612, 0xDF000, 0xDF218, 0xDF420, 0xDF500, 0xE0111, 0xE3198, 0xE3211, 0xE3498,
    0xE3B00, 0xE4011, 0xE4798, 0xE4F20, 0xE5012, 0xE5A20, 0xE5C00, 0xE8111, 0xE8300, 0xE8411, 0xE8500, 0xE8611, 0xE8B00,
    0xE8C11, 0xEA400, 0xEA511, 0xEA600, 0xEA711, 0xEB198, 0xEB211, 0xEB498, 0xEBA18, 0xEBB98, 0xEBD11, 0xEBE00, 0xEC011,
    0xEC500, 0xEC611, 0xEC700, 0xEC898, 0xECE18, 0xECF00, 0xED012, 0xEDA00, 0xEDC11, 0xEE000, 0xF0011, 0xF0100, 0xF0420,
    0xF1300, 0xF1420, 0xF1500, 0xF1898, 0xF1A00, 0xF2012, 0xF2A02, 0xF3400, 0xF3598, 0xF3600, 0xF3798, 0xF3800, 0xF3998,
    0xF3A20, 0xF3E18, 0xF4011, 0xF4800, 0xF4911, 0xF6D00, 0xF7198, 0xF7F18, 0xF8098, 0xF8520, 0xF8698, 0xF8811, 0xF8D98,
    0xF9800, 0xF9998, 0xFBD00, 0xFC698, 0xFC700, 0xFD020, 0xFD500, 0xFD920, 0xFDB00, 0x100011, 0x102B18, 0x102D98,
    0x103118, 0x103298, 0x103818, 0x103998, 0x103B18, 0x103D98, 0x103F11, 0x104012, 0x104A20, 0x105011, 0x105618,
    0x105898, 0x105A11, 0x105E98, 0x106111, 0x106218, 0x106511, 0x106718, 0x106E11, 0x107198, 0x107511, 0x108298,
    0x108318, 0x108598, 0x108718, 0x108D98, 0x108E11, 0x108F18, 0x109012, 0x109A18, 0x109D98, 0x109E00, 0x10A011,
    0x10C600, 0x10C711, 0x10C800, 0x10CD11, 0x10CE00, 0x10D011, 0x10FB20, 0x10FC11, 0x124900, 0x124A11, 0x124E00,
    0x125011, 0x125700, 0x125811, 0x125900, 0x125A11, 0x125E00, 0x126011, 0x128900, 0x128A11, 0x128E00, 0x129011,
    0x12B100, 0x12B211, 0x12B600, 0x12B811, 0x12BF00, 0x12C011, 0x12C100, 0x12C211, 0x12C600, 0x12C811, 0x12D700,
    0x12D811, 0x131100, 0x131211, 0x131600, 0x131811, 0x135B00, 0x135D98, 0x136020, 0x136902, 0x137D00, 0x138011,
    0x139000, 0x13A011, 0x13F600, 0x13F811, 0x13FE00, 0x140020, 0x140111, 0x166D20, 0x166F11, 0x168004, 0x168111,
    0x169B20, 0x169D00, 0x16A011, 0x16EB20, 0x16EE12, 0x16F111, 0x16F900, 0x170011, 0x171298, 0x171518, 0x171600,
    0x171F11, 0x173298, 0x173520, 0x173700, 0x174011, 0x175298, 0x175400, 0x176011, 0x176D00, 0x176E11, 0x177100,
    0x177298, 0x177400, 0x178011, 0x17B498, 0x17B618, 0x17B798, 0x17BE18, 0x17C698, 0x17C718, 0x17C998, 0x17D420,
    0x17D711, 0x17D820, 0x17DB00, 0x17DC11, 0x17DD98, 0x17DE00, 0x17E012, 0x17EA00, 0x17F002, 0x17FA00, 0x180020,
    0x180B98, 0x180E40, 0x180F18, 0x181012, 0x181A00, 0x182011, 0x187900, 0x188011, 0x188518, 0x188711, 0x18A998,
    0x18AA11, 0x18AB00, 0x18B011, 0x18F600, 0x190011, 0x191F00, 0x192098, 0x192318, 0x192798, 0x192918, 0x192C00,
    0x193018, 0x193298, 0x193318, 0x193998, 0x193C00, 0x194420, 0x194612, 0x195011, 0x196E00, 0x197011, 0x197500,
    0x198011, 0x19AC00, 0x19B011, 0x19CA00, 0x19D012, 0x19DA02, 0x19DB00, 0x1A0011, 0x1A1798, 0x1A1918, 0x1A1B98,
    0x1A1C00, 0x1A1E20, 0x1A2011, 0x1A5518, 0x1A5698, 0x1A5718, 0x1A5898, 0x1A5F00, 0x1A6098, 0x1A6118, 0x1A6298,
    0x1A6318, 0x1A6598, 0x1A6D18, 0x1A7398, 0x1A7D00, 0x1A7F98, 0x1A8012, 0x1A8A00, 0x1A9012, 0x1A9A00, 0x1AA020,
    0x1AA711, 0x1AA820, 0x1AAE00, 0x1AB098, 0x1ABE18, 0x1ACF00, 0x1B0098, 0x1B0418, 0x1B0511, 0x1B3498, 0x1B3518,
    0x1B3698, 0x1B3B18, 0x1B3C98, 0x1B3D18, 0x1B4298, 0x1B4318, 0x1B4511, 0x1B4D00, 0x1B5012, 0x1B5A20, 0x1B6100,
    0x1B6B98, 0x1B7400, 0x1B8098, 0x1B8218, 0x1B8311, 0x1BA118, 0x1BA298, 0x1BA618, 0x1BA898, 0x1BAA18, 0x1BAB98,
    0x1BAE11, 0x1BB012, 0x1BBA11, 0x1BE698, 0x1BE718, 0x1BE898, 0x1BEA18, 0x1BED98, 0x1BEE18, 0x1BEF98, 0x1BF218,
    0x1BF400, 0x1BFC20, 0x1C0011, 0x1C2418, 0x1C2C98, 0x1C3418, 0x1C3698, 0x1C3800, 0x1C3B20, 0x1C4012, 0x1C4A00,
    0x1C4D11, 0x1C5012, 0x1C5A11, 0x1C7E20, 0x1C8011, 0x1C8B00, 0x1C9011, 0x1CBB00, 0x1CBD11, 0x1CC020, 0x1CC800,
    0x1CD098, 0x1CD320, 0x1CD498, 0x1CE118, 0x1CE298, 0x1CE911, 0x1CED98, 0x1CEE11, 0x1CF498, 0x1CF511, 0x1CF718,
    0x1CF898, 0x1CFA11, 0x1CFB00, 0x1D0011, 0x1DC098, 0x1DF618, 0x1DFC98, 0x1E0011, 0x1F1600, 0x1F1811, 0x1F1E00,
    0x1F2011, 0x1F4600, 0x1F4811, 0x1F4E00, 0x1F5011, 0x1F5800, 0x1F5911, 0x1F5A00, 0x1F5B11, 0x1F5C00, 0x1F5D11,
    0x1F5E00, 0x1F5F11, 0x1F7E00, 0x1F8011, 0x1FB500, 0x1FB611, 0x1FBD00, 0x1FBE11, 0x1FBF00, 0x1FC211, 0x1FC500,
    0x1FC611, 0x1FCD00, 0x1FD011, 0x1FD400, 0x1FD611, 0x1FDC00, 0x1FE011, 0x1FED00, 0x1FF211, 0x1FF500, 0x1FF611,
    0x1FFD00, 0x200004, 0x200B40, 0x200C50, 0x200E40, 0x201020, 0x202804, 0x202A40, 0x202F04, 0x203020, 0x203F30,
    0x204120, 0x204400, 0x204520, 0x205200, 0x205320, 0x205430, 0x205520, 0x205F04, 0x206040, 0x206500, 0x206640,
    0x207002, 0x207111, 0x207200, 0x207402, 0x207A00, 0x207D20, 0x207F11, 0x208002, 0x208A00, 0x208D20, 0x208F00,
    0x209011, 0x209D00, 0x20D098, 0x20DD18, 0x20E198, 0x20E218, 0x20E598, 0x20F100, 0x210211, 0x210300, 0x210711,
    0x210800, 0x210A11, 0x211400, 0x211511, 0x211600, 0x211911, 0x211E00, 0x212411, 0x212500, 0x212611, 0x212700,
    0x212811, 0x212900, 0x212A11, 0x212E00, 0x212F11, 0x213A00, 0x213C11, 0x214000, 0x214511, 0x214A00, 0x214E11,
    0x214F00, 0x215002, 0x216012, 0x218311, 0x218512, 0x218902, 0x218A00, 0x230820, 0x230C00, 0x232920, 0x232B00,
    0x246002, 0x249C00, 0x24B610, 0x24EA02, 0x250000, 0x276820, 0x277602, 0x279400, 0x27C520, 0x27C700, 0x27E620,
    0x27F000, 0x298320, 0x299900, 0x29D820, 0x29DC00, 0x29FC20, 0x29FE00, 0x2C0011, 0x2CE500, 0x2CEB11, 0x2CEF98,
    0x2CF211, 0x2CF400, 0x2CF920, 0x2CFD02, 0x2CFE20, 0x2D0011, 0x2D2600, 0x2D2711, 0x2D2800, 0x2D2D11, 0x2D2E00,
    0x2D3011, 0x2D6800, 0x2D6F11, 0x2D7020, 0x2D7100, 0x2D7F98, 0x2D8011, 0x2D9700, 0x2DA011, 0x2DA700, 0x2DA811,
    0x2DAF00, 0x2DB011, 0x2DB700, 0x2DB811, 0x2DBF00, 0x2DC011, 0x2DC700, 0x2DC811, 0x2DCF00, 0x2DD011, 0x2DD700,
    0x2DD811, 0x2DDF00, 0x2DE098, 0x2E0020, 0x2E2F11, 0x2E3020, 0x2E4300, 0x300004, 0x300120, 0x300400, 0x300511,
    0x300712, 0x300820, 0x301200, 0x301420, 0x302000, 0x302112, 0x302A98, 0x302E18, 0x303020, 0x303111, 0x303600,
    0x303812, 0x303B11, 0x303D20, 0x303E00, 0x304111, 0x309700, 0x309998, 0x309B00, 0x309D11, 0x30A020, 0x30A111,
    0x30FB20, 0x30FC11, 0x310000, 0x310511, 0x313000, 0x313111, 0x318F00, 0x319202, 0x319600, 0x31A011, 0x31C000,
    0x31F011, 0x320000, 0x322002, 0x322A00, 0x324802, 0x325000, 0x325102, 0x326000, 0x328002, 0x328A00, 0x32B102,
    0x32C000, 0x340011, 0x4DC000, 0x4E0011, 0xA48D00, 0xA4D011, 0xA4FE20, 0xA50011, 0xA60D20, 0xA61011, 0xA62012,
    0xA62A11, 0xA62C00, 0xA64011, 0xA66F98, 0xA67018, 0xA67320, 0xA67498, 0xA67E20, 0xA67F11, 0xA69E98, 0xA6A011,
    0xA6E612, 0xA6F098, 0xA6F220, 0xA6F800, 0xA71711, 0xA72000, 0xA72211, 0xA78900, 0xA78B11, 0xA7CE00, 0xA7D011,
    0xA7D200, 0xA7D311, 0xA7D400, 0xA7D511, 0xA7DD00, 0xA7F211, 0xA80298, 0xA80311, 0xA80698, 0xA80711, 0xA80B98,
    0xA80C11, 0xA82318, 0xA82598, 0xA82718, 0xA82800, 0xA82C18, 0xA82D00, 0xA83002, 0xA83600, 0xA84011, 0xA87420,
    0xA87800, 0xA88018, 0xA88211, 0xA8B418, 0xA8C498, 0xA8C518, 0xA8C600, 0xA8CE20, 0xA8D012, 0xA8DA00, 0xA8E098,
    0xA8F211, 0xA8F820, 0xA8FB11, 0xA8FC20, 0xA8FD11, 0xA8FF18, 0xA90012, 0xA90A11, 0xA92698, 0xA92E20, 0xA93011,
    0xA94798, 0xA95218, 0xA95400, 0xA95F20, 0xA96011, 0xA97D00, 0xA98098, 0xA98318, 0xA98411, 0xA9B398, 0xA9B418,
    0xA9B698, 0xA9BA18, 0xA9BC98, 0xA9BD18, 0xA9C120, 0xA9CE00, 0xA9CF11, 0xA9D012, 0xA9DA00, 0xA9DE20, 0xA9E011,
    0xA9E598, 0xA9E611, 0xA9F012, 0xA9FA11, 0xA9FF00, 0xAA0011, 0xAA2998, 0xAA2F18, 0xAA3198, 0xAA3318, 0xAA3598,
    0xAA3700, 0xAA4011, 0xAA4398, 0xAA4411, 0xAA4C98, 0xAA4D18, 0xAA4E00, 0xAA5012, 0xAA5A00, 0xAA5C20, 0xAA6011,
    0xAA7700, 0xAA7A11, 0xAA7B18, 0xAA7C98, 0xAA7D18, 0xAA7E11, 0xAAB098, 0xAAB111, 0xAAB298, 0xAAB511, 0xAAB798,
    0xAAB911, 0xAABE98, 0xAAC011, 0xAAC198, 0xAAC211, 0xAAC300, 0xAADB11, 0xAADE20, 0xAAE011, 0xAAEB18, 0xAAEC98,
    0xAAEE18, 0xAAF020, 0xAAF211, 0xAAF518, 0xAAF698, 0xAAF700, 0xAB0111, 0xAB0700, 0xAB0911, 0xAB0F00, 0xAB1111,
    0xAB1700, 0xAB2011, 0xAB2700, 0xAB2811, 0xAB2F00, 0xAB3011, 0xAB5B00, 0xAB5C11, 0xAB6A00, 0xAB7011, 0xABE318,
    0xABE598, 0xABE618, 0xABE898, 0xABE918, 0xABEB20, 0xABEC18, 0xABED98, 0xABEE00, 0xABF012, 0xABFA00, 0xAC0011,
    0xD7A400, 0xD7B011, 0xD7C700, 0xD7CB11, 0xD7FC00, 0xE00040, 0xF90011, 0xFA6E00, 0xFA7011, 0xFADA00, 0xFB0011,
    0xFB0700, 0xFB1311, 0xFB1800, 0xFB1D11, 0xFB1E98, 0xFB1F11, 0xFB2900, 0xFB2A11, 0xFB3700, 0xFB3811, 0xFB3D00,
    0xFB3E11, 0xFB3F00, 0xFB4011, 0xFB4200, 0xFB4311, 0xFB4500, 0xFB4611, 0xFBB200, 0xFBD311, 0xFD3E20, 0xFD4000,
    0xFD5011, 0xFD9000, 0xFD9211, 0xFDC800, 0xFDF011, 0xFDFC00, 0xFE0098, 0xFE1020, 0xFE1A00, 0xFE2098, 0xFE3020,
    0xFE3330, 0xFE3520, 0xFE4D30, 0xFE5020, 0xFE5300, 0xFE5420, 0xFE6200, 0xFE6320, 0xFE6400, 0xFE6820, 0xFE6900,
    0xFE6A20, 0xFE6C00, 0xFE7011, 0xFE7500, 0xFE7611, 0xFEFD00, 0xFEFF40, 0xFF0000, 0xFF0120, 0xFF0400, 0xFF0520,
    0xFF0B00, 0xFF0C20, 0xFF1012, 0xFF1A20, 0xFF1C00, 0xFF1F20, 0xFF2111, 0xFF3B20, 0xFF3E00, 0xFF3F30, 0xFF4000,
    0xFF4111, 0xFF5B20, 0xFF5C00, 0xFF5D20, 0xFF5E00, 0xFF5F20, 0xFF6611, 0xFFBF00, 0xFFC211, 0xFFC800, 0xFFCA11,
    0xFFD000, 0xFFD211, 0xFFD800, 0xFFDA11, 0xFFDD00, 0xFFF940, 0xFFFC00, 0xFFFD40, 0xFFFE00, 0x1000011, 0x1000C00,
    0x1000D11, 0x1002700, 0x1002811, 0x1003B00, 0x1003C11, 0x1003E00, 0x1003F11, 0x1004E00, 0x1005011, 0x1005E00,
    0x1008011, 0x100FB00, 0x1010020, 0x1010300, 0x1010702, 0x1013400, 0x1014012, 0x1017502, 0x1017900, 0x1018A02,
    0x1018C00, 0x101FD98, 0x101FE00, 0x1028011, 0x1029D00, 0x102A011, 0x102D100, 0x102E098, 0x102E102, 0x102FC00,
    0x1030011, 0x1032002, 0x1032400, 0x1032D11, 0x1034112, 0x1034211, 0x1034A12, 0x1034B00, 0x1035011, 0x1037698,
    0x1037B00, 0x1038011, 0x1039E00, 0x1039F20, 0x103A011, 0x103C400, 0x103C811, 0x103D020, 0x103D112, 0x103D600,
    0x1040011, 0x1049E00, 0x104A012, 0x104AA00, 0x104B011, 0x104D400, 0x104D811, 0x104FC00, 0x1050011, 0x1052800,
    0x1053011, 0x1056400, 0x1056F20, 0x1057011, 0x1057B00, 0x1057C11, 0x1058B00, 0x1058C11, 0x1059300, 0x1059411,
    0x1059600, 0x1059711, 0x105A200, 0x105A311, 0x105B200, 0x105B311, 0x105BA00, 0x105BB11, 0x105BD00, 0x105C011,
    0x105F400, 0x1060011, 0x1073700, 0x1074011, 0x1075600, 0x1076011, 0x1076800, 0x1078011, 0x1078600, 0x1078711,
    0x107B100, 0x107B211, 0x107BB00, 0x1080011, 0x1080600, 0x1080811, 0x1080900, 0x1080A11, 0x1083600, 0x1083711,
    0x1083900, 0x1083C11, 0x1083D00, 0x1083F11, 0x1085600, 0x1085720, 0x1085802, 0x1086011, 0x1087700, 0x1087902,
    0x1088011, 0x1089F00, 0x108A702, 0x108B000, 0x108E011, 0x108F300, 0x108F411, 0x108F600, 0x108FB02, 0x1090011,
    0x1091602, 0x1091C00, 0x1091F20, 0x1092011, 0x1093A00, 0x1093F20, 0x1094000, 0x1098011, 0x109B800, 0x109BC02,
    0x109BE11, 0x109C002, 0x109D000, 0x109D202, 0x10A0011, 0x10A0198, 0x10A0400, 0x10A0598, 0x10A0700, 0x10A0C98,
    0x10A1011, 0x10A1400, 0x10A1511, 0x10A1800, 0x10A1911, 0x10A3600, 0x10A3898, 0x10A3B00, 0x10A3F98, 0x10A4002,
    0x10A4900, 0x10A5020, 0x10A5900, 0x10A6011, 0x10A7D02, 0x10A7F20, 0x10A8011, 0x10A9D02, 0x10AA000, 0x10AC011,
    0x10AC800, 0x10AC911, 0x10AE598, 0x10AE700, 0x10AEB02, 0x10AF020, 0x10AF700, 0x10B0011, 0x10B3600, 0x10B3920,
    0x10B4011, 0x10B5600, 0x10B5802, 0x10B6011, 0x10B7300, 0x10B7802, 0x10B8011, 0x10B9200, 0x10B9920, 0x10B9D00,
    0x10BA902, 0x10BB000, 0x10C0011, 0x10C4900, 0x10C8011, 0x10CB300, 0x10CC011, 0x10CF300, 0x10CFA02, 0x10D0011,
    0x10D2418, 0x10D2800, 0x10D3012, 0x10D3A00, 0x10D4012, 0x10D4A11, 0x10D6600, 0x10D6918, 0x10D6E00, 0x10D6F11,
    0x10D8600, 0x10E6002, 0x10E7F00, 0x10E8011, 0x10EAA00, 0x10EAB18, 0x10EAD00, 0x10EB011, 0x10EB200, 0x10EC211,
    0x10EC500, 0x10EFC18, 0x10F0011, 0x10F1D02, 0x10F2711, 0x10F2800, 0x10F3011, 0x10F4618, 0x10F5102, 0x10F5500,
    0x10F7011, 0x10F8218, 0x10F8600, 0x10FB011, 0x10FC502, 0x10FCC00, 0x10FE011, 0x10FF700, 0x1100018, 0x1100198,
    0x1100218, 0x1100311, 0x1103898, 0x1104720, 0x1104E00, 0x1105202, 0x1106612, 0x1107018, 0x1107111, 0x1107318,
    0x1107511, 0x1107600, 0x1107F98, 0x1108218, 0x1108311, 0x110B018, 0x110B398, 0x110B718, 0x110B998, 0x110BB20,
    0x110BD40, 0x110BE20, 0x110C218, 0x110C300, 0x110D011, 0x110E900, 0x110F012, 0x110FA00, 0x1110098, 0x1110311,
    0x1112798, 0x1112C18, 0x1112D98, 0x1113500, 0x1113612, 0x1114020, 0x1114411, 0x1114518, 0x1114711, 0x1114800,
    0x1115011, 0x1117398, 0x1117420, 0x1117611, 0x1117700, 0x1118098, 0x1118218, 0x1118311, 0x111B318, 0x111B698,
    0x111BF18, 0x111C111, 0x111C520, 0x111C938, 0x111CA98, 0x111CD20, 0x111CE18, 0x111D012, 0x111DA11, 0x111DB20,
    0x111DC11, 0x111DD20, 0x111E000, 0x111E102, 0x111F500, 0x1120011, 0x1121200, 0x1121311, 0x1122C18, 0x1122F98,
    0x1123218, 0x1123498, 0x1123518, 0x1123698, 0x1123820, 0x1123E18, 0x1123F11, 0x1124118, 0x1124200, 0x1128011,
    0x1128700, 0x1128811, 0x1128900, 0x1128A11, 0x1128E00, 0x1128F11, 0x1129E00, 0x1129F11, 0x112A920, 0x112AA00,
    0x112B011, 0x112DF98, 0x112E018, 0x112E398, 0x112EB00, 0x112F012, 0x112FA00, 0x1130098, 0x1130218, 0x1130400,
    0x1130511, 0x1130D00, 0x1130F11, 0x1131100, 0x1131311, 0x1132900, 0x1132A11, 0x1133100, 0x1133211, 0x1133400,
    0x1133511, 0x1133A00, 0x1133B18, 0x1133C98, 0x1133D11, 0x1133E18, 0x1134098, 0x1134118, 0x1134500, 0x1134718,
    0x1134900, 0x1134B18, 0x1134E00, 0x1135011, 0x1135100, 0x1135718, 0x1135800, 0x1135D11, 0x1136218, 0x1136400,
    0x1136698, 0x1136D00, 0x1137098, 0x1137500, 0x1138011, 0x1138A00, 0x1138B11, 0x1138C00, 0x1138E11, 0x1138F00,
    0x1139011, 0x113B600, 0x113B711, 0x113B818, 0x113C100, 0x113C218, 0x113C300, 0x113C518, 0x113C600, 0x113C718,
    0x113CB00, 0x113CC18, 0x113D111, 0x113D218, 0x113D311, 0x113D400, 0x113E118, 0x113E300, 0x1140011, 0x1143518,
    0x1144711, 0x1144B00, 0x1145012, 0x1145A00, 0x1145E18, 0x1145F11, 0x1146200, 0x1148011, 0x114B018, 0x114B398,
    0x114B918, 0x114BA98, 0x114BB18, 0x114BF98, 0x114C118, 0x114C298, 0x114C411, 0x114C620, 0x114C711, 0x114C800,
    0x114D012, 0x114DA00, 0x1158011, 0x115AF18, 0x115B298, 0x115B600, 0x115B818, 0x115BC98, 0x115BE18, 0x115BF98,
    0x115C120, 0x115D811, 0x115DC98, 0x115DE00, 0x1160011, 0x1163018, 0x1163398, 0x1163B18, 0x1163D98, 0x1163E18,
    0x1163F98, 0x1164120, 0x1164411, 0x1164500, 0x1165012, 0x1165A00, 0x1168011, 0x116AB98, 0x116AC18, 0x116AD98,
    0x116AE18, 0x116B098, 0x116B618, 0x116B798, 0x116B811, 0x116B900, 0x116C012, 0x116CA00, 0x116D012, 0x116E400,
    0x1170011, 0x1171B00, 0x1171D98, 0x1172018, 0x1172298, 0x1172618, 0x1172798, 0x1172C00, 0x1173012, 0x1173A02,
    0x1173C20, 0x1173F00, 0x1174011, 0x1174700, 0x1180011, 0x1182C18, 0x1183B00, 0x118A011, 0x118E012, 0x118EA02,
    0x118F300, 0x118FF11, 0x1190700, 0x1190911, 0x1190A00, 0x1190C11, 0x1191400, 0x1191511, 0x1191700, 0x1191811,
    0x1193018, 0x1193600, 0x1193718, 0x1193900, 0x1193B18, 0x1193F11, 0x1194018, 0x1194111, 0x1194218, 0x1194400,
    0x1195012, 0x1195A00, 0x119A011, 0x119A800, 0x119AA11, 0x119D118, 0x119D800, 0x119DA18, 0x119E111, 0x119E200,
    0x119E311, 0x119E418, 0x119E500, 0x11A0011, 0x11A0118, 0x11A0B11, 0x11A3318, 0x11A3A11, 0x11A3B18, 0x11A3F00,
    0x11A4718, 0x11A4800, 0x11A5011, 0x11A5118, 0x11A5C11, 0x11A8A18, 0x11A9A00, 0x11A9D11, 0x11A9E00, 0x11AB011,
    0x11AF900, 0x11BC011, 0x11BE100, 0x11BF012, 0x11BFA00, 0x11C0011, 0x11C0900, 0x11C0A11, 0x11C2F18, 0x11C3700,
    0x11C3818, 0x11C4011, 0x11C4100, 0x11C5012, 0x11C5A02, 0x11C6D00, 0x11C7211, 0x11C9000, 0x11C9218, 0x11CA800,
    0x11CA918, 0x11CB700, 0x11D0011, 0x11D0700, 0x11D0811, 0x11D0A00, 0x11D0B11, 0x11D3118, 0x11D3700, 0x11D3A18,
    0x11D3B00, 0x11D3C18, 0x11D3E00, 0x11D3F18, 0x11D4611, 0x11D4718, 0x11D4800, 0x11D5012, 0x11D5A00, 0x11D6011,
    0x11D6600, 0x11D6711, 0x11D6900, 0x11D6A11, 0x11D8A18, 0x11D8F00, 0x11D9018, 0x11D9200, 0x11D9318, 0x11D9811,
    0x11D9900, 0x11DA012, 0x11DAA00, 0x11EE011, 0x11EF318, 0x11EF700, 0x11F0018, 0x11F0211, 0x11F0318, 0x11F0411,
    0x11F1100, 0x11F1211, 0x11F3418, 0x11F3B00, 0x11F3E18, 0x11F4300, 0x11F5012, 0x11F5A18, 0x11F5B00, 0x11FB011,
    0x11FB100, 0x11FC002, 0x11FD500, 0x1200011, 0x1239A00, 0x1240012, 0x1246F00, 0x1247020, 0x1247500, 0x1248011,
    0x1254400, 0x12F9011, 0x12FF100, 0x1300011, 0x1343000, 0x1344018, 0x1344111, 0x1344718, 0x1345600, 0x1346011,
    0x143FB00, 0x1440011, 0x1464700, 0x1610011, 0x1611E18, 0x1613012, 0x1613A00, 0x1680011, 0x16A3900, 0x16A4011,
    0x16A5F00, 0x16A6012, 0x16A6A00, 0x16A6E20, 0x16A7011, 0x16ABF00, 0x16AC012, 0x16ACA00, 0x16AD011, 0x16AEE00,
    0x16AF098, 0x16AF520, 0x16AF600, 0x16B0011, 0x16B3098, 0x16B3720, 0x16B3C00, 0x16B4011, 0x16B4420, 0x16B4500,
    0x16B5012, 0x16B5A00, 0x16B5B02, 0x16B6200, 0x16B6311, 0x16B7800, 0x16B7D11, 0x16B9000, 0x16D4011, 0x16D6D00,
    0x16D7012, 0x16D7A00, 0x16E4011, 0x16E8002, 0x16E9700, 0x16F0011, 0x16F4B00, 0x16F4F18, 0x16F5011, 0x16F5118,
    0x16F8800, 0x16F8F98, 0x16F9311, 0x16FA000, 0x16FE011, 0x16FE200, 0x16FE311, 0x16FE418, 0x16FE500, 0x16FF018,
    0x16FF200, 0x1700011, 0x187F800, 0x1880011, 0x18CD600, 0x18CFF11, 0x18D0900, 0x1AFF011, 0x1AFF400, 0x1AFF511,
    0x1AFFC00, 0x1AFFD11, 0x1AFFF00, 0x1B00011, 0x1B12300, 0x1B13211, 0x1B13300, 0x1B15011, 0x1B15300, 0x1B15511,
    0x1B15600, 0x1B16411, 0x1B16800, 0x1B17011, 0x1B2FC00, 0x1BC0011, 0x1BC6B00, 0x1BC7011, 0x1BC7D00, 0x1BC8011,
    0x1BC8900, 0x1BC9011, 0x1BC9A00, 0x1BC9D98, 0x1BC9F20, 0x1BCA040, 0x1BCA400, 0x1CCF012, 0x1CCFA00, 0x1CF0018,
    0x1CF2E00, 0x1CF3018, 0x1CF4700, 0x1D16518, 0x1D16798, 0x1D16A00, 0x1D16D18, 0x1D17340, 0x1D17B98, 0x1D18300,
    0x1D18598, 0x1D18C00, 0x1D1AA98, 0x1D1AE00, 0x1D24298, 0x1D24500, 0x1D2C002, 0x1D2D400, 0x1D2E002, 0x1D2F400,
    0x1D36002, 0x1D37900, 0x1D40011, 0x1D45500, 0x1D45611, 0x1D49D00, 0x1D49E11, 0x1D4A000, 0x1D4A211, 0x1D4A300,
    0x1D4A511, 0x1D4A700, 0x1D4A911, 0x1D4AD00, 0x1D4AE11, 0x1D4BA00, 0x1D4BB11, 0x1D4BC00, 0x1D4BD11, 0x1D4C400,
    0x1D4C511, 0x1D50600, 0x1D50711, 0x1D50B00, 0x1D50D11, 0x1D51500, 0x1D51611, 0x1D51D00, 0x1D51E11, 0x1D53A00,
    0x1D53B11, 0x1D53F00, 0x1D54011, 0x1D54500, 0x1D54611, 0x1D54700, 0x1D54A11, 0x1D55100, 0x1D55211, 0x1D6A600,
    0x1D6A811, 0x1D6C100, 0x1D6C211, 0x1D6DB00, 0x1D6DC11, 0x1D6FB00, 0x1D6FC11, 0x1D71500, 0x1D71611, 0x1D73500,
    0x1D73611, 0x1D74F00, 0x1D75011, 0x1D76F00, 0x1D77011, 0x1D78900, 0x1D78A11, 0x1D7A900, 0x1D7AA11, 0x1D7C300,
    0x1D7C411, 0x1D7CC00, 0x1D7CE12, 0x1D80000, 0x1DA0098, 0x1DA3700, 0x1DA3B98, 0x1DA6D00, 0x1DA7598, 0x1DA7600,
    0x1DA8498, 0x1DA8500, 0x1DA8720, 0x1DA8C00, 0x1DA9B98, 0x1DAA000, 0x1DAA198, 0x1DAB000, 0x1DF0011, 0x1DF1F00,
    0x1DF2511, 0x1DF2B00, 0x1E00018, 0x1E00700, 0x1E00818, 0x1E01900, 0x1E01B18, 0x1E02200, 0x1E02318, 0x1E02500,
    0x1E02618, 0x1E02B00, 0x1E03011, 0x1E06E00, 0x1E08F18, 0x1E09000, 0x1E10011, 0x1E12D00, 0x1E13018, 0x1E13711,
    0x1E13E00, 0x1E14012, 0x1E14A00, 0x1E14E11, 0x1E14F00, 0x1E29011, 0x1E2AE18, 0x1E2AF00, 0x1E2C011, 0x1E2EC18,
    0x1E2F012, 0x1E2FA00, 0x1E4D011, 0x1E4EC18, 0x1E4F012, 0x1E4FA00, 0x1E5D011, 0x1E5EE18, 0x1E5F011, 0x1E5F112,
    0x1E5FB00, 0x1E7E011, 0x1E7E700, 0x1E7E811, 0x1E7EC00, 0x1E7ED11, 0x1E7EF00, 0x1E7F011, 0x1E7FF00, 0x1E80011,
    0x1E8C500, 0x1E8C702, 0x1E8D098, 0x1E8D700, 0x1E90011, 0x1E94418, 0x1E94B11, 0x1E94C00, 0x1E95012, 0x1E95A00,
    0x1EC7102, 0x1ECAC00, 0x1ECAD02, 0x1ECB000, 0x1ECB102, 0x1ECB500, 0x1ED0102, 0x1ED2E00, 0x1ED2F02, 0x1ED3E00,
    0x1EE0011, 0x1EE0400, 0x1EE0511, 0x1EE2000, 0x1EE2111, 0x1EE2300, 0x1EE2411, 0x1EE2500, 0x1EE2711, 0x1EE2800,
    0x1EE2911, 0x1EE3300, 0x1EE3411, 0x1EE3800, 0x1EE3911, 0x1EE3A00, 0x1EE3B11, 0x1EE3C00, 0x1EE4211, 0x1EE4300,
    0x1EE4711, 0x1EE4800, 0x1EE4911, 0x1EE4A00, 0x1EE4B11, 0x1EE4C00, 0x1EE4D11, 0x1EE5000, 0x1EE5111, 0x1EE5300,
    0x1EE5411, 0x1EE5500, 0x1EE5711, 0x1EE5800, 0x1EE5911, 0x1EE5A00, 0x1EE5B11, 0x1EE5C00, 0x1EE5D11, 0x1EE5E00,
    0x1EE5F11, 0x1EE6000, 0x1EE6111, 0x1EE6300, 0x1EE6411, 0x1EE6500, 0x1EE6711, 0x1EE6B00, 0x1EE6C11, 0x1EE7300,
    0x1EE7411, 0x1EE7800, 0x1EE7911, 0x1EE7D00, 0x1EE7E11, 0x1EE7F00, 0x1EE8011, 0x1EE8A00, 0x1EE8B11, 0x1EE9C00,
    0x1EEA111, 0x1EEA400, 0x1EEA511, 0x1EEAA00, 0x1EEAB11, 0x1EEBC00, 0x1F10002, 0x1F10D00, 0x1F13010, 0x1F14A00,
    0x1F15010, 0x1F16A00, 0x1F17010, 0x1F18A00, 0x1FBF012, 0x1FBFA00, 0x2000011, 0x2A6E000, 0x2A70011, 0x2B73A00,
    0x2B74011, 0x2B81E00, 0x2B82011, 0x2CEA200, 0x2CEB011, 0x2EBE100, 0x2EBF011, 0x2EE5E00, 0x2F80011, 0x2FA1E00,
    0x3000011, 0x3134B00, 0x3135011, 0x323B000, 0xE000140, 0xE000200, 0xE002040, 0xE008000, 0xE010098, 0xE01F000,
    0xF000040, 0xFFFFE00, 0x10000040, 0x10FFFE00,
};

/* How canonical decomposition sorts marks: runs as above, of 0 for what is no such mark, and 1, 2, ... */
static const uint32_t tfm__order_runs[499] = {
    0x0, 0x30032, 0x31533, 0x3162D, 0x31A33, 0x31B2B, 0x31C2D, 0x32129, 0x3232D, 0x32729, 0x3292D, 0x33401, 0x3392D,
    0x33D32, 0x34000, 0x34232, 0x34300, 0x34536, 0x34632, 0x3472D, 0x34A32, 0x34D2D, 0x34F00, 0x35032, 0x3532D, 0x35732,
    0x35833, 0x3592D, 0x35B32, 0x35C34, 0x35D35, 0x35F34, 0x36035, 0x36234, 0x36332, 0x37000, 0x48332, 0x48800, 0x5912D,
    0x59232, 0x5962D, 0x59732, 0x59A2E, 0x59B2D, 0x59C32, 0x5A22D, 0x5A832, 0x5AA2D, 0x5AB32, 0x5AD2E, 0x5AE31, 0x5AF32,
    0x5B005, 0x5B106, 0x5B207, 0x5B308, 0x5B409, 0x5B50A, 0x5B60B, 0x5B70C, 0x5B80D, 0x5B90E, 0x5BB0F, 0x5BC10, 0x5BD11,
    0x5BE00, 0x5BF12, 0x5C000, 0x5C113, 0x5C214, 0x5C300, 0x5C432, 0x5C52D, 0x5C600, 0x5C70D, 0x5C800, 0x61032, 0x61819,
    0x6191A, 0x61A1B, 0x61B00, 0x64B16, 0x64C17, 0x64D18, 0x64E19, 0x64F1A, 0x6501B, 0x6511C, 0x6521D, 0x65332, 0x6552D,
    0x65732, 0x65C2D, 0x65D32, 0x65F2D, 0x66000, 0x6701E, 0x67100, 0x6D632, 0x6DD00, 0x6DF32, 0x6E32D, 0x6E432, 0x6E500,
    0x6E732, 0x6E900, 0x6EA2D, 0x6EB32, 0x6ED2D, 0x6EE00, 0x7111F, 0x71200, 0x73032, 0x7312D, 0x73232, 0x7342D, 0x73532,
    0x7372D, 0x73A32, 0x73B2D, 0x73D32, 0x73E2D, 0x73F32, 0x7422D, 0x74332, 0x7442D, 0x74532, 0x7462D, 0x74732, 0x7482D,
    0x74932, 0x74B00, 0x7EB32, 0x7F22D, 0x7F332, 0x7F400, 0x81632, 0x81A00, 0x81B32, 0x82400, 0x82532, 0x82800, 0x82932,
    0x82E00, 0x8592D, 0x85C00, 0x8D432, 0x8E200, 0x8E32D, 0x8E432, 0x8E62D, 0x8E732, 0x8E92D, 0x8EA32, 0x8ED2D, 0x8F016,
    0x8F117, 0x8F218, 0x8F332, 0x8F62D, 0x8F732, 0x8F92D, 0x8FB32, 0x90000, 0x93C02, 0x93D00, 0x94D04, 0x94E00, 0x95132,
    0x9522D, 0x95332, 0x95500, 0x9BC02, 0x9BD00, 0x9CD04, 0x9CE00, 0xA3C02, 0xA3D00, 0xA4D04, 0xA4E00, 0xABC02, 0xABD00,
    0xACD04, 0xACE00, 0xB3C02, 0xB3D00, 0xB4D04, 0xB4E00, 0xBCD04, 0xBCE00, 0xC4D04, 0xC4E00, 0xC5520, 0xC5621, 0xC5700,
    0xCBC02, 0xCBD00, 0xCCD04, 0xCCE00, 0xD4D04, 0xD4E00, 0xDCA04, 0xDCB00, 0xE3822, 0xE3A04, 0xE3B00, 0xE4823, 0xE4C00,
    0xEB824, 0xEBA00, 0xEC825, 0xECC00, 0xF182D, 0xF1A00, 0xF352D, 0xF3600, 0xF372D, 0xF3800, 0xF392B, 0xF3A00, 0xF7126,
    0xF7227, 0xF7300, 0xF7428, 0xF7500, 0xF7A27, 0xF7E00, 0xF8027, 0xF8100, 0xF8232, 0xF8404, 0xF8500, 0xF8632, 0xF8800,
    0xFC62D, 0xFC700, 0x103702, 0x103800, 0x103904, 0x103B00, 0x108D2D, 0x108E00, 0x135D32, 0x136000, 0x171404,
    0x171500, 0x173404, 0x173500, 0x17D204, 0x17D300, 0x17DD32, 0x17DE00, 0x18A931, 0x18AA00, 0x19392E, 0x193A32,
    0x193B2D, 0x193C00, 0x1A1732, 0x1A182D, 0x1A1900, 0x1A6004, 0x1A6100, 0x1A7532, 0x1A7D00, 0x1A7F2D, 0x1A8000,
    0x1AB032, 0x1AB52D, 0x1ABB32, 0x1ABD2D, 0x1ABE00, 0x1B3402, 0x1B3500, 0x1B4404, 0x1B4500, 0x1B6B32, 0x1B6C2D,
    0x1B6D32, 0x1B7400, 0x1BAA04, 0x1BAC00, 0x1BE602, 0x1BE700, 0x1BF204, 0x1BF400, 0x1C3702, 0x1C3800, 0x1CD032,
    0x1CD300, 0x1CD401, 0x1CD52D, 0x1CDA32, 0x1CDC2D, 0x1CE032, 0x1CE100, 0x1CE201, 0x1CE900, 0x1CED2D, 0x1CEE00,
    0x1CF432, 0x1CF500, 0x1CF832, 0x1CFA00, 0x1DC032, 0x1DC22D, 0x1DC332, 0x1DCA2D, 0x1DCB32, 0x1DCD35, 0x1DCE2A,
    0x1DCF2D, 0x1DD029, 0x1DD132, 0x1DF600, 0x1DFB32, 0x1DFC34, 0x1DFD2D, 0x1DFE32, 0x1DFF2D, 0x1E0000, 0x20D032,
    0x20D201, 0x20D432, 0x20D801, 0x20DB32, 0x20DD00, 0x20E132, 0x20E200, 0x20E501, 0x20E732, 0x20E82D, 0x20E932,
    0x20EA01, 0x20EC2D, 0x20F032, 0x20F100, 0x2CEF32, 0x2CF200, 0x2D7F04, 0x2D8000, 0x2DE032, 0x2E0000, 0x302A2C,
    0x302B31, 0x302C33, 0x302D2E, 0x302E2F, 0x303000, 0x309903, 0x309B00, 0xA66F32, 0xA67000, 0xA67432, 0xA67E00,
    0xA69E32, 0xA6A000, 0xA6F032, 0xA6F200, 0xA80604, 0xA80700, 0xA8C404, 0xA8C500, 0xA8E032, 0xA8F200, 0xA92B2D,
    0xA92E00, 0xA95304, 0xA95400, 0xA9B302, 0xA9B400, 0xA9C004, 0xA9C100, 0xAAB032, 0xAAB100, 0xAAB232, 0xAAB42D,
    0xAAB500, 0xAAB732, 0xAAB900, 0xAABE32, 0xAAC000, 0xAAC132, 0xAAC200, 0xAAF604, 0xAAF700, 0xABED04, 0xABEE00,
    0xFB1E15, 0xFB1F00, 0xFE2032, 0xFE272D, 0xFE2E32, 0xFE3000, 0x101FD2D, 0x101FE00, 0x102E02D, 0x102E100, 0x1037632,
    0x1037B00, 0x10A0D2D, 0x10A0E00, 0x10A0F32, 0x10A1000, 0x10A3832, 0x10A3901, 0x10A3A2D, 0x10A3B00, 0x10A3F04,
    0x10A4000, 0x10AE532, 0x10AE62D, 0x10AE700, 0x1104604, 0x1104700, 0x1107F04, 0x1108000, 0x110B904, 0x110BA02,
    0x110BB00, 0x1110032, 0x1110300, 0x1113304, 0x1113500, 0x1117302, 0x1117400, 0x111C004, 0x111C100, 0x111CA02,
    0x111CB00, 0x1123504, 0x1123602, 0x1123700, 0x112E902, 0x112EA04, 0x112EB00, 0x1133C02, 0x1133D00, 0x1134D04,
    0x1134E00, 0x1136632, 0x1136D00, 0x1137032, 0x1137500, 0x1144204, 0x1144300, 0x1144602, 0x1144700, 0x114C204,
    0x114C302, 0x114C400, 0x115BF04, 0x115C002, 0x115C100, 0x1163F04, 0x1164000, 0x116B604, 0x116B702, 0x116B800,
    0x1172B04, 0x1172C00, 0x11C3F04, 0x11C4000, 0x16AF001, 0x16AF500, 0x16B3032, 0x16B3700, 0x1BC9E01, 0x1BC9F00,
    0x1D1652B, 0x1D16701, 0x1D16A00, 0x1D16D30, 0x1D16E2B, 0x1D17300, 0x1D17B2D, 0x1D18300, 0x1D18532, 0x1D18A2D,
    0x1D18C00, 0x1D1AA32, 0x1D1AE00, 0x1D24232, 0x1D24500, 0x1E00032, 0x1E00700, 0x1E00832, 0x1E01900, 0x1E01B32,
    0x1E02200, 0x1E02332, 0x1E02500, 0x1E02632, 0x1E02B00, 0x1E8D02D, 0x1E8D700, 0x1E94432, 0x1E94A02, 0x1E94B00,
};
#define TFM__N_ORDERS 54

/* Lower case beyond ASCII: the first code points of runs; their last one, step, and how much further on the lower case
   is. (And U+0130 becomes an i with a dot, U+0307.) */
static const uint32_t tfm__lower_firsts[184] = {
    192, 216, 256, 306, 313, 330, 376, 377, 385, 386, 390, 391, 393, 395, 398, 399, 400, 401, 403, 404, 406, 407, 408,
    412, 413, 415, 416, 422, 423, 425, 428, 430, 431, 433, 435, 439, 440, 444, 452, 453, 455, 456, 458, 459, 478, 497,
    498, 502, 503, 504, 544, 546, 570, 571, 573, 574, 577, 579, 580, 581, 582, 880, 886, 895, 902, 904, 908, 910, 913,
    931, 975, 984, 1012, 1015, 1017, 1018, 1021, 1024, 1040, 1120, 1162, 1216, 1217, 1232, 1329, 4256, 4295, 4301, 5024,
    5104, 7305, 7312, 7357, 7680, 7838, 7840, 7944, 7960, 7976, 7992, 8008, 8025, 8040, 8072, 8088, 8104, 8120, 8122,
    8124, 8136, 8140, 8152, 8154, 8168, 8170, 8172, 8184, 8186, 8188, 8486, 8490, 8491, 8498, 8544, 8579, 9398, 11264,
    11360, 11362, 11363, 11364, 11367, 11373, 11374, 11375, 11376, 11378, 11381, 11390, 11392, 11499, 11506, 42560,
    42624, 42786, 42802, 42873, 42877, 42878, 42891, 42893, 42896, 42902, 42922, 42923, 42924, 42925, 42926, 42928,
    42929, 42930, 42931, 42932, 42948, 42949, 42950, 42951, 42955, 42956, 42972, 42997, 65313, 66560, 66736, 66928,
    66940, 66956, 66964, 68736, 68944, 71840, 93760, 93856, 125184,
};
static const int32_t tfm__lower_runs[184][3] = {
    {214, 1, 32}, {222, 1, 32}, {302, 2, 1}, {310, 2, 1}, {327, 2, 1}, {374, 2, 1}, {376, 1, -121}, {381, 2, 1},
    {385, 1, 210}, {388, 2, 1}, {390, 1, 206}, {391, 1, 1}, {394, 1, 205}, {395, 1, 1}, {398, 1, 79}, {399, 1, 202},
    {400, 1, 203}, {401, 1, 1}, {403, 1, 205}, {404, 1, 207}, {406, 1, 211}, {407, 1, 209}, {408, 1, 1}, {412, 1, 211},
    {413, 1, 213}, {415, 1, 214}, {420, 2, 1}, {422, 1, 218}, {423, 1, 1}, {425, 1, 218}, {428, 1, 1}, {430, 1, 218},
    {431, 1, 1}, {434, 1, 217}, {437, 2, 1}, {439, 1, 219}, {440, 1, 1}, {444, 1, 1}, {452, 1, 2}, {453, 1, 1},
    {455, 1, 2}, {456, 1, 1}, {458, 1, 2}, {475, 2, 1}, {494, 2, 1}, {497, 1, 2}, {500, 2, 1}, {502, 1, -97},
    {503, 1, -56}, {542, 2, 1}, {544, 1, -130}, {562, 2, 1}, {570, 1, 10795}, {571, 1, 1}, {573, 1, -163},
    {574, 1, 10792}, {577, 1, 1}, {579, 1, -195}, {580, 1, 69}, {581, 1, 71}, {590, 2, 1}, {882, 2, 1}, {886, 1, 1},
    {895, 1, 116}, {902, 1, 38}, {906, 1, 37}, {908, 1, 64}, {911, 1, 63}, {929, 1, 32}, {939, 1, 32}, {975, 1, 8},
    {1006, 2, 1}, {1012, 1, -60}, {1015, 1, 1}, {1017, 1, -7}, {1018, 1, 1}, {1023, 1, -130}, {1039, 1, 80},
    {1071, 1, 32}, {1152, 2, 1}, {1214, 2, 1}, {1216, 1, 15}, {1229, 2, 1}, {1326, 2, 1}, {1366, 1, 48},
    {4293, 1, 7264}, {4295, 1, 7264}, {4301, 1, 7264}, {5103, 1, 38864}, {5109, 1, 8}, {7305, 1, 1}, {7354, 1, -3008},
    {7359, 1, -3008}, {7828, 2, 1}, {7838, 1, -7615}, {7934, 2, 1}, {7951, 1, -8}, {7965, 1, -8}, {7983, 1, -8},
    {7999, 1, -8}, {8013, 1, -8}, {8031, 2, -8}, {8047, 1, -8}, {8079, 1, -8}, {8095, 1, -8}, {8111, 1, -8},
    {8121, 1, -8}, {8123, 1, -74}, {8124, 1, -9}, {8139, 1, -86}, {8140, 1, -9}, {8153, 1, -8}, {8155, 1, -100},
    {8169, 1, -8}, {8171, 1, -112}, {8172, 1, -7}, {8185, 1, -128}, {8187, 1, -126}, {8188, 1, -9}, {8486, 1, -7517},
    {8490, 1, -8383}, {8491, 1, -8262}, {8498, 1, 28}, {8559, 1, 16}, {8579, 1, 1}, {9423, 1, 26}, {11311, 1, 48},
    {11360, 1, 1}, {11362, 1, -10743}, {11363, 1, -3814}, {11364, 1, -10727}, {11371, 2, 1}, {11373, 1, -10780},
    {11374, 1, -10749}, {11375, 1, -10783}, {11376, 1, -10782}, {11378, 1, 1}, {11381, 1, 1}, {11391, 1, -10815},
    {11490, 2, 1}, {11501, 2, 1}, {11506, 1, 1}, {42604, 2, 1}, {42650, 2, 1}, {42798, 2, 1}, {42862, 2, 1},
    {42875, 2, 1}, {42877, 1, -35332}, {42886, 2, 1}, {42891, 1, 1}, {42893, 1, -42280}, {42898, 2, 1}, {42920, 2, 1},
    {42922, 1, -42308}, {42923, 1, -42319}, {42924, 1, -42315}, {42925, 1, -42305}, {42926, 1, -42308},
    {42928, 1, -42258}, {42929, 1, -42282}, {42930, 1, -42261}, {42931, 1, 928}, {42946, 2, 1}, {42948, 1, -48},
    {42949, 1, -42307}, {42950, 1, -35384}, {42953, 2, 1}, {42955, 1, -42343}, {42970, 2, 1}, {42972, 1, -42561},
    {42997, 1, 1}, {65338, 1, 32}, {66599, 1, 40}, {66771, 1, 40}, {66938, 1, 39}, {66954, 1, 39}, {66962, 1, 39},
    {66965, 1, 39}, {68786, 1, 64}, {68965, 1, 32}, {71871, 1, 32}, {93791, 1, 32}, {93880, 1, 27}, {125217, 1, 34},
};

/* What accents are stripped from: the first code points of runs; the place in tfm__unaccented where a run's results
   begin; what each code point becomes, or 0x110000 + its place in tfm__unaccented_several. Hangul is not here. */
static const uint32_t tfm__unaccented_firsts[216] = {
    192, 199, 209, 217, 224, 231, 241, 249, 255, 274, 296, 308, 313, 323, 332, 340, 360, 416, 431, 461, 478, 486, 500,
    504, 542, 550, 884, 894, 901, 908, 910, 938, 970, 979, 1024, 1027, 1031, 1036, 1049, 1081, 1104, 1107, 1111, 1116,
    1142, 1217, 1232, 1238, 1242, 1250, 1258, 1272, 1570, 1728, 1730, 1747, 2345, 2353, 2356, 2392, 2507, 2524, 2527,
    2611, 2614, 2649, 2654, 2888, 2891, 2908, 2964, 3018, 3264, 3271, 3274, 3402, 3546, 3548, 3907, 3917, 3922, 3927,
    3932, 3945, 4134, 6918, 6920, 6922, 6924, 6926, 6930, 6971, 6973, 6976, 6979, 7680, 7835, 7840, 7936, 7960, 7968,
    8008, 8016, 8025, 8027, 8029, 8031, 8064, 8118, 8126, 8129, 8134, 8150, 8157, 8178, 8182, 8192, 8486, 8490, 8602,
    8622, 8653, 8708, 8713, 8716, 8740, 8742, 8769, 8772, 8775, 8777, 8800, 8802, 8813, 8820, 8824, 8832, 8836, 8840,
    8876, 8928, 8938, 9001, 10972, 12364, 12366, 12368, 12370, 12372, 12374, 12376, 12378, 12380, 12382, 12384, 12386,
    12389, 12391, 12393, 12400, 12403, 12406, 12409, 12412, 12436, 12446, 12460, 12462, 12464, 12466, 12468, 12470,
    12472, 12474, 12476, 12478, 12480, 12482, 12485, 12487, 12489, 12496, 12499, 12502, 12505, 12508, 12532, 12535,
    12542, 63744, 64016, 64018, 64021, 64032, 64034, 64037, 64042, 64112, 64285, 64287, 64298, 64312, 64318, 64320,
    64323, 64326, 69786, 69788, 69803, 70475, 70843, 70846, 71098, 119134, 119227, 194560,
};
static const uint16_t tfm__unaccented_starts[217] = {
    0, 6, 15, 21, 26, 32, 41, 47, 52, 69, 89, 98, 102, 108, 114, 120, 138, 161, 163, 165, 181, 187, 198, 200, 236, 238,
    252, 253, 254, 260, 261, 264, 271, 276, 278, 280, 281, 282, 285, 286, 287, 289, 290, 291, 294, 296, 298, 302, 304,
    310, 316, 328, 330, 335, 336, 337, 338, 339, 340, 341, 349, 351, 353, 354, 355, 356, 359, 360, 361, 363, 365, 366,
    369, 370, 372, 374, 377, 378, 381, 382, 383, 384, 385, 386, 387, 388, 389, 390, 391, 392, 393, 394, 395, 396, 398,
    399, 553, 554, 644, 666, 672, 710, 716, 724, 725, 726, 727, 758, 811, 818, 819, 823, 837, 843, 862, 865, 873, 875,
    876, 878, 880, 881, 884, 885, 886, 887, 888, 889, 890, 891, 892, 893, 894, 895, 900, 902, 904, 906, 908, 910, 914,
    918, 922, 924, 925, 926, 927, 928, 929, 930, 931, 932, 933, 934, 935, 936, 937, 938, 939, 940, 942, 944, 946, 948,
    950, 951, 952, 953, 954, 955, 956, 957, 958, 959, 960, 961, 962, 963, 964, 965, 966, 967, 969, 971, 973, 975, 977,
    978, 982, 983, 1253, 1254, 1255, 1265, 1266, 1267, 1269, 1337, 1443, 1444, 1445, 1458, 1463, 1464, 1466, 1468, 1477,
    1478, 1479, 1480, 1482, 1484, 1485, 1487, 1494, 1500, 2042,
};
static const uint32_t tfm__unaccented[2042] = {
    65, 65, 65, 65, 65, 65, 67, 69, 69, 69, 69, 73, 73, 73, 73, 78, 79, 79, 79, 79, 79, 85, 85, 85, 85, 89, 97, 97, 97,
    97, 97, 97, 99, 101, 101, 101, 101, 105, 105, 105, 105, 110, 111, 111, 111, 111, 111, 117, 117, 117, 117, 121, 121,
    65, 97, 65, 97, 65, 97, 67, 99, 67, 99, 67, 99, 67, 99, 68, 100, 69, 101, 69, 101, 69, 101, 69, 101, 69, 101, 71,
    103, 71, 103, 71, 103, 71, 103, 72, 104, 73, 105, 73, 105, 73, 105, 73, 105, 73, 74, 106, 75, 107, 76, 108, 76, 108,
    76, 108, 78, 110, 78, 110, 78, 110, 79, 111, 79, 111, 79, 111, 82, 114, 82, 114, 82, 114, 83, 115, 83, 115, 83, 115,
    83, 115, 84, 116, 84, 116, 85, 117, 85, 117, 85, 117, 85, 117, 85, 117, 85, 117, 87, 119, 89, 121, 89, 90, 122, 90,
    122, 90, 122, 79, 111, 85, 117, 65, 97, 73, 105, 79, 111, 85, 117, 85, 117, 85, 117, 85, 117, 85, 117, 65, 97, 65,
    97, 198, 230, 71, 103, 75, 107, 79, 111, 79, 111, 439, 658, 106, 71, 103, 78, 110, 65, 97, 198, 230, 216, 248, 65,
    97, 65, 97, 69, 101, 69, 101, 73, 105, 73, 105, 79, 111, 79, 111, 82, 114, 82, 114, 85, 117, 85, 117, 83, 115, 84,
    116, 72, 104, 65, 97, 69, 101, 79, 111, 79, 111, 79, 111, 79, 111, 89, 121, 697, 59, 168, 913, 183, 917, 919, 921,
    927, 933, 937, 953, 921, 933, 945, 949, 951, 953, 965, 953, 965, 959, 965, 969, 978, 978, 1045, 1045, 1043, 1030,
    1050, 1048, 1059, 1048, 1080, 1077, 1077, 1075, 1110, 1082, 1080, 1091, 1140, 1141, 1046, 1078, 1040, 1072, 1040,
    1072, 1045, 1077, 1240, 1241, 1046, 1078, 1047, 1079, 1048, 1080, 1048, 1080, 1054, 1086, 1256, 1257, 1069, 1101,
    1059, 1091, 1059, 1091, 1059, 1091, 1063, 1095, 1067, 1099, 1575, 1575, 1608, 1575, 1610, 1749, 1729, 1746, 2344,
    2352, 2355, 2325, 2326, 2327, 2332, 2337, 2338, 2347, 2351, 1114112, 1114113, 2465, 2466, 2479, 2610, 2616, 2582,
    2583, 2588, 2603, 2887, 1114114, 1114115, 2849, 2850, 1114116, 1114117, 1114118, 1114119, 3285, 3285, 3286, 3266,
    1114120, 1114121, 1114122, 1114123, 3545, 1114124, 1114125, 1114126, 3906, 3916, 3921, 3926, 3931, 3904, 4133,
    1114127, 1114128, 1114129, 1114130, 1114131, 1114132, 6965, 6965, 1114133, 1114134, 6965, 65, 97, 66, 98, 66, 98,
    66, 98, 67, 99, 68, 100, 68, 100, 68, 100, 68, 100, 68, 100, 69, 101, 69, 101, 69, 101, 69, 101, 69, 101, 70, 102,
    71, 103, 72, 104, 72, 104, 72, 104, 72, 104, 72, 104, 73, 105, 73, 105, 75, 107, 75, 107, 75, 107, 76, 108, 76, 108,
    76, 108, 76, 108, 77, 109, 77, 109, 77, 109, 78, 110, 78, 110, 78, 110, 78, 110, 79, 111, 79, 111, 79, 111, 79, 111,
    80, 112, 80, 112, 82, 114, 82, 114, 82, 114, 82, 114, 83, 115, 83, 115, 83, 115, 83, 115, 83, 115, 84, 116, 84, 116,
    84, 116, 84, 116, 85, 117, 85, 117, 85, 117, 85, 117, 85, 117, 86, 118, 86, 118, 87, 119, 87, 119, 87, 119, 87, 119,
    87, 119, 88, 120, 88, 120, 89, 121, 90, 122, 90, 122, 90, 122, 104, 116, 119, 121, 383, 65, 97, 65, 97, 65, 97, 65,
    97, 65, 97, 65, 97, 65, 97, 65, 97, 65, 97, 65, 97, 65, 97, 65, 97, 69, 101, 69, 101, 69, 101, 69, 101, 69, 101, 69,
    101, 69, 101, 69, 101, 73, 105, 73, 105, 79, 111, 79, 111, 79, 111, 79, 111, 79, 111, 79, 111, 79, 111, 79, 111, 79,
    111, 79, 111, 79, 111, 79, 111, 85, 117, 85, 117, 85, 117, 85, 117, 85, 117, 85, 117, 85, 117, 89, 121, 89, 121, 89,
    121, 89, 121, 945, 945, 945, 945, 945, 945, 945, 945, 913, 913, 913, 913, 913, 913, 913, 913, 949, 949, 949, 949,
    949, 949, 917, 917, 917, 917, 917, 917, 951, 951, 951, 951, 951, 951, 951, 951, 919, 919, 919, 919, 919, 919, 919,
    919, 953, 953, 953, 953, 953, 953, 953, 953, 921, 921, 921, 921, 921, 921, 921, 921, 959, 959, 959, 959, 959, 959,
    927, 927, 927, 927, 927, 927, 965, 965, 965, 965, 965, 965, 965, 965, 933, 933, 933, 933, 969, 969, 969, 969, 969,
    969, 969, 969, 937, 937, 937, 937, 937, 937, 937, 937, 945, 945, 949, 949, 951, 951, 953, 953, 959, 959, 965, 965,
    969, 969, 945, 945, 945, 945, 945, 945, 945, 945, 913, 913, 913, 913, 913, 913, 913, 913, 951, 951, 951, 951, 951,
    951, 951, 951, 919, 919, 919, 919, 919, 919, 919, 919, 969, 969, 969, 969, 969, 969, 969, 969, 937, 937, 937, 937,
    937, 937, 937, 937, 945, 945, 945, 945, 945, 945, 945, 913, 913, 913, 913, 913, 953, 168, 951, 951, 951, 951, 951,
    917, 917, 919, 919, 919, 8127, 8127, 8127, 953, 953, 953, 953, 953, 953, 921, 921, 921, 921, 8190, 8190, 8190, 965,
    965, 965, 965, 961, 961, 965, 965, 933, 933, 933, 933, 929, 168, 168, 96, 969, 969, 969, 969, 969, 927, 927, 937,
    937, 937, 180, 8194, 8195, 937, 75, 65, 8592, 8594, 8596, 8656, 8660, 8658, 8707, 8712, 8715, 8739, 8741, 8764,
    8771, 8773, 8776, 61, 8801, 8781, 60, 62, 8804, 8805, 8818, 8819, 8822, 8823, 8826, 8827, 8834, 8835, 8838, 8839,
    8866, 8872, 8873, 8875, 8828, 8829, 8849, 8850, 8882, 8883, 8884, 8885, 12296, 12297, 10973, 12363, 12365, 12367,
    12369, 12371, 12373, 12375, 12377, 12379, 12381, 12383, 12385, 12388, 12390, 12392, 12399, 12399, 12402, 12402,
    12405, 12405, 12408, 12408, 12411, 12411, 12358, 12445, 12459, 12461, 12463, 12465, 12467, 12469, 12471, 12473,
    12475, 12477, 12479, 12481, 12484, 12486, 12488, 12495, 12495, 12498, 12498, 12501, 12501, 12504, 12504, 12507,
    12507, 12454, 12527, 12528, 12529, 12530, 12541, 35912, 26356, 36554, 36040, 28369, 20018, 21477, 40860, 40860,
    22865, 37329, 21895, 22856, 25078, 30313, 32645, 34367, 34746, 35064, 37007, 27138, 27931, 28889, 29662, 33853,
    37226, 39409, 20098, 21365, 27396, 29211, 34349, 40478, 23888, 28651, 34253, 35172, 25289, 33240, 34847, 24266,
    26391, 28010, 29436, 37070, 20358, 20919, 21214, 25796, 27347, 29200, 30439, 32769, 34310, 34396, 36335, 38706,
    39791, 40442, 30860, 31103, 32160, 33737, 37636, 40575, 35542, 22751, 24324, 31840, 32894, 29282, 30922, 36034,
    38647, 22744, 23650, 27155, 28122, 28431, 32047, 32311, 38475, 21202, 32907, 20956, 20940, 31260, 32190, 33777,
    38517, 35712, 25295, 27138, 35582, 20025, 23527, 24594, 29575, 30064, 21271, 30971, 20415, 24489, 19981, 27852,
    25976, 32034, 21443, 22622, 30465, 33865, 35498, 27578, 36784, 27784, 25342, 33509, 25504, 30053, 20142, 20841,
    20937, 26753, 31975, 33391, 35538, 37327, 21237, 21570, 22899, 24300, 26053, 28670, 31018, 38317, 39530, 40599,
    40654, 21147, 26310, 27511, 36706, 24180, 24976, 25088, 25754, 28451, 29001, 29833, 31178, 32244, 32879, 36646,
    34030, 36899, 37706, 21015, 21155, 21693, 28872, 35010, 35498, 24265, 24565, 25467, 27566, 31806, 29557, 20196,
    22265, 23527, 23994, 24604, 29618, 29801, 32666, 32838, 37428, 38646, 38728, 38936, 20363, 31150, 37300, 38584,
    24801, 20102, 20698, 23534, 23615, 26009, 27138, 29134, 30274, 34044, 36988, 40845, 26248, 38446, 21129, 26491,
    26611, 27969, 28316, 29705, 30041, 30827, 32016, 39006, 20845, 25134, 38520, 20523, 23833, 28138, 36650, 24459,
    24900, 26647, 29575, 38534, 21033, 21519, 23653, 26131, 26446, 26792, 27877, 29702, 30178, 32633, 35023, 35041,
    37324, 38626, 21311, 28346, 21533, 29136, 29848, 34298, 38563, 40023, 40607, 26519, 28107, 33256, 31435, 31520,
    31890, 29376, 28825, 35672, 20160, 33590, 21050, 20999, 24230, 25299, 31958, 23429, 27934, 26292, 36667, 34892,
    38477, 35211, 24275, 20800, 21952, 22618, 26228, 20958, 29482, 30410, 31036, 31070, 31077, 31119, 38742, 31934,
    32701, 34322, 35576, 36920, 37117, 39151, 39164, 39208, 40372, 37086, 38583, 20398, 20711, 20813, 21193, 21220,
    21329, 21917, 22022, 22120, 22592, 22696, 23652, 23662, 24724, 24936, 24974, 25074, 25935, 26082, 26257, 26757,
    28023, 28186, 28450, 29038, 29227, 29730, 30865, 31038, 31049, 31048, 31056, 31062, 31069, 31117, 31118, 31296,
    31361, 31680, 32244, 32265, 32321, 32626, 32773, 33261, 33401, 33401, 33879, 35088, 35222, 35585, 35641, 36051,
    36104, 36790, 36920, 38627, 38911, 38971, 24693, 148206, 33304, 20006, 20917, 20840, 20352, 20805, 20864, 21191,
    21242, 21917, 21845, 21913, 21986, 22618, 22707, 22852, 22868, 23138, 23336, 24274, 24281, 24425, 24493, 24792,
    24910, 24840, 24974, 24928, 25074, 25140, 25540, 25628, 25682, 25942, 26228, 26391, 26395, 26454, 27513, 27578,
    27969, 28379, 28363, 28450, 28702, 29038, 30631, 29237, 29359, 29482, 29809, 29958, 30011, 30237, 30239, 30410,
    30427, 30452, 30538, 30528, 30924, 31409, 31680, 31867, 32091, 32244, 32574, 32773, 33618, 33775, 34681, 35137,
    35206, 35222, 35519, 35576, 35531, 35585, 35582, 35565, 35641, 35722, 36104, 36664, 36978, 37273, 37494, 38524,
    38627, 38742, 38875, 38911, 38923, 38971, 39698, 40860, 141386, 141380, 144341, 15261, 16408, 16441, 152137, 154832,
    163539, 40771, 40846, 1497, 1522, 1513, 1513, 1513, 1513, 1488, 1488, 1488, 1489, 1490, 1491, 1492, 1493, 1494,
    1496, 1497, 1498, 1499, 1500, 1502, 1504, 1505, 1507, 1508, 1510, 1511, 1512, 1513, 1514, 1493, 1489, 1499, 1508,
    69785, 69787, 69797, 1114135, 1114136, 70841, 1114137, 1114138, 1114139, 1114140, 1114141, 1114142, 1114143,
    1114144, 1114145, 1114146, 1114147, 1114148, 1114149, 1114150, 1114151, 1114152, 1114153, 20029, 20024, 20033,
    131362, 20320, 20398, 20411, 20482, 20602, 20633, 20711, 20687, 13470, 132666, 20813, 20820, 20836, 20855, 132380,
    13497, 20839, 20877, 132427, 20887, 20900, 20172, 20908, 20917, 168415, 20981, 20995, 13535, 21051, 21062, 21106,
    21111, 13589, 21191, 21193, 21220, 21242, 21253, 21254, 21271, 21321, 21329, 21338, 21363, 21373, 21375, 21375,
    21375, 133676, 28784, 21450, 21471, 133987, 21483, 21489, 21510, 21662, 21560, 21576, 21608, 21666, 21750, 21776,
    21843, 21859, 21892, 21892, 21913, 21931, 21939, 21954, 22294, 22022, 22295, 22097, 22132, 20999, 22766, 22478,
    22516, 22541, 22411, 22578, 22577, 22700, 136420, 22770, 22775, 22790, 22810, 22818, 22882, 136872, 136938, 23020,
    23067, 23079, 23000, 23142, 14062, 14076, 23304, 23358, 23358, 137672, 23491, 23512, 23527, 23539, 138008, 23551,
    23558, 24403, 23586, 14209, 23648, 23662, 23744, 23693, 138724, 23875, 138726, 23918, 23915, 23932, 24033, 24034,
    14383, 24061, 24104, 24125, 24169, 14434, 139651, 14460, 24240, 24243, 24246, 24266, 172946, 24318, 140081, 140081,
    33281, 24354, 24354, 14535, 144056, 156122, 24418, 24427, 14563, 24474, 24525, 24535, 24569, 24705, 14650, 14620,
    24724, 141012, 24775, 24904, 24908, 24910, 24908, 24954, 24974, 25010, 24996, 25007, 25054, 25074, 25078, 25104,
    25115, 25181, 25265, 25300, 25424, 142092, 25405, 25340, 25448, 25475, 25572, 142321, 25634, 25541, 25513, 14894,
    25705, 25726, 25757, 25719, 14956, 25935, 25964, 143370, 26083, 26360, 26185, 15129, 26257, 15112, 15076, 20882,
    20885, 26368, 26268, 32941, 17369, 26391, 26395, 26401, 26462, 26451, 144323, 15177, 26618, 26501, 26706, 26757,
    144493, 26766, 26655, 26900, 15261, 26946, 27043, 27114, 27304, 145059, 27355, 15384, 27425, 145575, 27476, 15438,
    27506, 27551, 27578, 27579, 146061, 138507, 146170, 27726, 146620, 27839, 27853, 27751, 27926, 27966, 28023, 27969,
    28009, 28024, 28037, 146718, 27956, 28207, 28270, 15667, 28363, 28359, 147153, 28153, 28526, 147294, 147342, 28614,
    28729, 28702, 28699, 15766, 28746, 28797, 28791, 28845, 132389, 28997, 148067, 29084, 148395, 29224, 29237, 29264,
    149000, 29312, 29333, 149301, 149524, 29562, 29579, 16044, 29605, 16056, 16056, 29767, 29788, 29809, 29829, 29898,
    16155, 29988, 150582, 30014, 150674, 30064, 139679, 30224, 151457, 151480, 151620, 16380, 16392, 30452, 151795,
    151794, 151833, 151859, 30494, 30495, 30495, 30538, 16441, 30603, 16454, 16534, 152605, 30798, 30860, 30924, 16611,
    153126, 31062, 153242, 153285, 31119, 31211, 16687, 31296, 31306, 31311, 153980, 154279, 154279, 31470, 16898,
    154539, 31686, 31689, 16935, 154752, 31954, 17056, 31976, 31971, 32000, 155526, 32099, 17153, 32199, 32258, 32325,
    17204, 156200, 156231, 17241, 156377, 32634, 156478, 32661, 32762, 32773, 156890, 156963, 32864, 157096, 32880,
    144223, 17365, 32946, 33027, 17419, 33086, 23221, 157607, 157621, 144275, 144284, 33281, 33284, 36766, 17515, 33425,
    33419, 33437, 21171, 33457, 33459, 33469, 33510, 158524, 33509, 33565, 33635, 33709, 33571, 33725, 33767, 33879,
    33619, 33738, 33740, 33756, 158774, 159083, 158933, 17707, 34033, 34035, 34070, 160714, 34148, 159532, 17757, 17761,
    159665, 159954, 17771, 34384, 34396, 34407, 34409, 34473, 34440, 34574, 34530, 34681, 34600, 34667, 34694, 17879,
    34785, 34817, 17913, 34912, 34915, 161383, 35031, 35038, 17973, 35066, 13499, 161966, 162150, 18110, 18119, 35488,
    35565, 35722, 35925, 162984, 36011, 36033, 36123, 36215, 163631, 133124, 36299, 36284, 36336, 133342, 36564, 36664,
    165330, 165357, 37012, 37105, 37137, 165678, 37147, 37432, 37591, 37592, 37500, 37881, 37909, 166906, 38283, 18837,
    38327, 167287, 18918, 38595, 23986, 38691, 168261, 168474, 19054, 19062, 38880, 168970, 19122, 169110, 38923, 38923,
    38953, 169398, 39138, 19251, 39209, 39335, 39362, 39422, 19406, 170800, 39698, 40000, 40189, 19662, 19693, 40295,
    172238, 19704, 172293, 172558, 172689, 40635, 19798, 40697, 40702, 40709, 40719, 40726, 40763, 173568,
};
static const uint32_t tfm__unaccented_several[42][3] = {
    {2503, 2494, 0}, {2503, 2519, 0}, {2887, 2878, 0}, {2887, 2903, 0}, {2962, 3031, 0}, {3014, 3006, 0},
    {3015, 3006, 0}, {3014, 3031, 0}, {3266, 3285, 0}, {3398, 3390, 0}, {3399, 3390, 0}, {3398, 3415, 0},
    {3545, 3535, 0}, {3545, 3535, 0}, {3545, 3551, 0}, {6917, 6965, 0}, {6919, 6965, 0}, {6921, 6965, 0},
    {6923, 6965, 0}, {6925, 6965, 0}, {6929, 6965, 0}, {6974, 6965, 0}, {6975, 6965, 0}, {70471, 70462, 0},
    {70471, 70487, 0}, {70841, 70832, 0}, {70841, 70845, 0}, {71096, 71087, 0}, {71097, 71087, 0}, {119127, 119141, 0},
    {119128, 119141, 0}, {119128, 119141, 119150}, {119128, 119141, 119151}, {119128, 119141, 119152},
    {119128, 119141, 119153}, {119128, 119141, 119154}, {119225, 119141, 0}, {119226, 119141, 0},
    {119225, 119141, 119150}, {119226, 119141, 119150}, {119225, 119141, 119151}, {119226, 119141, 119151},
};

/* Canonical decomposition, a step at a time, where accents or their like come apart: character, first, second (0: there
   is none). */
static const uint32_t tfm__decompositions[1033][3] = {
    {192, 65, 768}, {193, 65, 769}, {194, 65, 770}, {195, 65, 771}, {196, 65, 776}, {197, 65, 778}, {199, 67, 807},
    {200, 69, 768}, {201, 69, 769}, {202, 69, 770}, {203, 69, 776}, {204, 73, 768}, {205, 73, 769}, {206, 73, 770},
    {207, 73, 776}, {209, 78, 771}, {210, 79, 768}, {211, 79, 769}, {212, 79, 770}, {213, 79, 771}, {214, 79, 776},
    {217, 85, 768}, {218, 85, 769}, {219, 85, 770}, {220, 85, 776}, {221, 89, 769}, {224, 97, 768}, {225, 97, 769},
    {226, 97, 770}, {227, 97, 771}, {228, 97, 776}, {229, 97, 778}, {231, 99, 807}, {232, 101, 768}, {233, 101, 769},
    {234, 101, 770}, {235, 101, 776}, {236, 105, 768}, {237, 105, 769}, {238, 105, 770}, {239, 105, 776},
    {241, 110, 771}, {242, 111, 768}, {243, 111, 769}, {244, 111, 770}, {245, 111, 771}, {246, 111, 776},
    {249, 117, 768}, {250, 117, 769}, {251, 117, 770}, {252, 117, 776}, {253, 121, 769}, {255, 121, 776},
    {256, 65, 772}, {257, 97, 772}, {258, 65, 774}, {259, 97, 774}, {260, 65, 808}, {261, 97, 808}, {262, 67, 769},
    {263, 99, 769}, {264, 67, 770}, {265, 99, 770}, {266, 67, 775}, {267, 99, 775}, {268, 67, 780}, {269, 99, 780},
    {270, 68, 780}, {271, 100, 780}, {274, 69, 772}, {275, 101, 772}, {276, 69, 774}, {277, 101, 774}, {278, 69, 775},
    {279, 101, 775}, {280, 69, 808}, {281, 101, 808}, {282, 69, 780}, {283, 101, 780}, {284, 71, 770}, {285, 103, 770},
    {286, 71, 774}, {287, 103, 774}, {288, 71, 775}, {289, 103, 775}, {290, 71, 807}, {291, 103, 807}, {292, 72, 770},
    {293, 104, 770}, {296, 73, 771}, {297, 105, 771}, {298, 73, 772}, {299, 105, 772}, {300, 73, 774}, {301, 105, 774},
    {302, 73, 808}, {303, 105, 808}, {304, 73, 775}, {308, 74, 770}, {309, 106, 770}, {310, 75, 807}, {311, 107, 807},
    {313, 76, 769}, {314, 108, 769}, {315, 76, 807}, {316, 108, 807}, {317, 76, 780}, {318, 108, 780}, {323, 78, 769},
    {324, 110, 769}, {325, 78, 807}, {326, 110, 807}, {327, 78, 780}, {328, 110, 780}, {332, 79, 772}, {333, 111, 772},
    {334, 79, 774}, {335, 111, 774}, {336, 79, 779}, {337, 111, 779}, {340, 82, 769}, {341, 114, 769}, {342, 82, 807},
    {343, 114, 807}, {344, 82, 780}, {345, 114, 780}, {346, 83, 769}, {347, 115, 769}, {348, 83, 770}, {349, 115, 770},
    {350, 83, 807}, {351, 115, 807}, {352, 83, 780}, {353, 115, 780}, {354, 84, 807}, {355, 116, 807}, {356, 84, 780},
    {357, 116, 780}, {360, 85, 771}, {361, 117, 771}, {362, 85, 772}, {363, 117, 772}, {364, 85, 774}, {365, 117, 774},
    {366, 85, 778}, {367, 117, 778}, {368, 85, 779}, {369, 117, 779}, {370, 85, 808}, {371, 117, 808}, {372, 87, 770},
    {373, 119, 770}, {374, 89, 770}, {375, 121, 770}, {376, 89, 776}, {377, 90, 769}, {378, 122, 769}, {379, 90, 775},
    {380, 122, 775}, {381, 90, 780}, {382, 122, 780}, {416, 79, 795}, {417, 111, 795}, {431, 85, 795}, {432, 117, 795},
    {461, 65, 780}, {462, 97, 780}, {463, 73, 780}, {464, 105, 780}, {465, 79, 780}, {466, 111, 780}, {467, 85, 780},
    {468, 117, 780}, {469, 220, 772}, {470, 252, 772}, {471, 220, 769}, {472, 252, 769}, {473, 220, 780},
    {474, 252, 780}, {475, 220, 768}, {476, 252, 768}, {478, 196, 772}, {479, 228, 772}, {480, 550, 772},
    {481, 551, 772}, {482, 198, 772}, {483, 230, 772}, {486, 71, 780}, {487, 103, 780}, {488, 75, 780}, {489, 107, 780},
    {490, 79, 808}, {491, 111, 808}, {492, 490, 772}, {493, 491, 772}, {494, 439, 780}, {495, 658, 780},
    {496, 106, 780}, {500, 71, 769}, {501, 103, 769}, {504, 78, 768}, {505, 110, 768}, {506, 197, 769}, {507, 229, 769},
    {508, 198, 769}, {509, 230, 769}, {510, 216, 769}, {511, 248, 769}, {512, 65, 783}, {513, 97, 783}, {514, 65, 785},
    {515, 97, 785}, {516, 69, 783}, {517, 101, 783}, {518, 69, 785}, {519, 101, 785}, {520, 73, 783}, {521, 105, 783},
    {522, 73, 785}, {523, 105, 785}, {524, 79, 783}, {525, 111, 783}, {526, 79, 785}, {527, 111, 785}, {528, 82, 783},
    {529, 114, 783}, {530, 82, 785}, {531, 114, 785}, {532, 85, 783}, {533, 117, 783}, {534, 85, 785}, {535, 117, 785},
    {536, 83, 806}, {537, 115, 806}, {538, 84, 806}, {539, 116, 806}, {542, 72, 780}, {543, 104, 780}, {550, 65, 775},
    {551, 97, 775}, {552, 69, 807}, {553, 101, 807}, {554, 214, 772}, {555, 246, 772}, {556, 213, 772}, {557, 245, 772},
    {558, 79, 775}, {559, 111, 775}, {560, 558, 772}, {561, 559, 772}, {562, 89, 772}, {563, 121, 772}, {832, 768, 0},
    {833, 769, 0}, {835, 787, 0}, {836, 776, 769}, {901, 168, 769}, {902, 913, 769}, {904, 917, 769}, {905, 919, 769},
    {906, 921, 769}, {908, 927, 769}, {910, 933, 769}, {911, 937, 769}, {912, 970, 769}, {938, 921, 776},
    {939, 933, 776}, {940, 945, 769}, {941, 949, 769}, {942, 951, 769}, {943, 953, 769}, {944, 971, 769},
    {970, 953, 776}, {971, 965, 776}, {972, 959, 769}, {973, 965, 769}, {974, 969, 769}, {979, 978, 769},
    {980, 978, 776}, {1024, 1045, 768}, {1025, 1045, 776}, {1027, 1043, 769}, {1031, 1030, 776}, {1036, 1050, 769},
    {1037, 1048, 768}, {1038, 1059, 774}, {1049, 1048, 774}, {1081, 1080, 774}, {1104, 1077, 768}, {1105, 1077, 776},
    {1107, 1075, 769}, {1111, 1110, 776}, {1116, 1082, 769}, {1117, 1080, 768}, {1118, 1091, 774}, {1142, 1140, 783},
    {1143, 1141, 783}, {1217, 1046, 774}, {1218, 1078, 774}, {1232, 1040, 774}, {1233, 1072, 774}, {1234, 1040, 776},
    {1235, 1072, 776}, {1238, 1045, 774}, {1239, 1077, 774}, {1242, 1240, 776}, {1243, 1241, 776}, {1244, 1046, 776},
    {1245, 1078, 776}, {1246, 1047, 776}, {1247, 1079, 776}, {1250, 1048, 772}, {1251, 1080, 772}, {1252, 1048, 776},
    {1253, 1080, 776}, {1254, 1054, 776}, {1255, 1086, 776}, {1258, 1256, 776}, {1259, 1257, 776}, {1260, 1069, 776},
    {1261, 1101, 776}, {1262, 1059, 772}, {1263, 1091, 772}, {1264, 1059, 776}, {1265, 1091, 776}, {1266, 1059, 779},
    {1267, 1091, 779}, {1268, 1063, 776}, {1269, 1095, 776}, {1272, 1067, 776}, {1273, 1099, 776}, {1570, 1575, 1619},
    {1571, 1575, 1620}, {1572, 1608, 1620}, {1573, 1575, 1621}, {1574, 1610, 1620}, {1728, 1749, 1620},
    {1730, 1729, 1620}, {1747, 1746, 1620}, {2345, 2344, 2364}, {2353, 2352, 2364}, {2356, 2355, 2364},
    {2392, 2325, 2364}, {2393, 2326, 2364}, {2394, 2327, 2364}, {2395, 2332, 2364}, {2396, 2337, 2364},
    {2397, 2338, 2364}, {2398, 2347, 2364}, {2399, 2351, 2364}, {2507, 2503, 2494}, {2508, 2503, 2519},
    {2524, 2465, 2492}, {2525, 2466, 2492}, {2527, 2479, 2492}, {2611, 2610, 2620}, {2614, 2616, 2620},
    {2649, 2582, 2620}, {2650, 2583, 2620}, {2651, 2588, 2620}, {2654, 2603, 2620}, {2888, 2887, 2902},
    {2891, 2887, 2878}, {2892, 2887, 2903}, {2908, 2849, 2876}, {2909, 2850, 2876}, {2964, 2962, 3031},
    {3018, 3014, 3006}, {3019, 3015, 3006}, {3020, 3014, 3031}, {3144, 3142, 3158}, {3264, 3263, 3285},
    {3271, 3270, 3285}, {3272, 3270, 3286}, {3274, 3270, 3266}, {3275, 3274, 3285}, {3402, 3398, 3390},
    {3403, 3399, 3390}, {3404, 3398, 3415}, {3546, 3545, 3530}, {3548, 3545, 3535}, {3549, 3548, 3530},
    {3550, 3545, 3551}, {3907, 3906, 4023}, {3917, 3916, 4023}, {3922, 3921, 4023}, {3927, 3926, 4023},
    {3932, 3931, 4023}, {3945, 3904, 4021}, {3955, 3953, 3954}, {3957, 3953, 3956}, {3958, 4018, 3968},
    {3960, 4019, 3968}, {3969, 3953, 3968}, {3987, 3986, 4023}, {3997, 3996, 4023}, {4002, 4001, 4023},
    {4007, 4006, 4023}, {4012, 4011, 4023}, {4025, 3984, 4021}, {4134, 4133, 4142}, {6918, 6917, 6965},
    {6920, 6919, 6965}, {6922, 6921, 6965}, {6924, 6923, 6965}, {6926, 6925, 6965}, {6930, 6929, 6965},
    {6971, 6970, 6965}, {6973, 6972, 6965}, {6976, 6974, 6965}, {6977, 6975, 6965}, {6979, 6978, 6965}, {7680, 65, 805},
    {7681, 97, 805}, {7682, 66, 775}, {7683, 98, 775}, {7684, 66, 803}, {7685, 98, 803}, {7686, 66, 817},
    {7687, 98, 817}, {7688, 199, 769}, {7689, 231, 769}, {7690, 68, 775}, {7691, 100, 775}, {7692, 68, 803},
    {7693, 100, 803}, {7694, 68, 817}, {7695, 100, 817}, {7696, 68, 807}, {7697, 100, 807}, {7698, 68, 813},
    {7699, 100, 813}, {7700, 274, 768}, {7701, 275, 768}, {7702, 274, 769}, {7703, 275, 769}, {7704, 69, 813},
    {7705, 101, 813}, {7706, 69, 816}, {7707, 101, 816}, {7708, 552, 774}, {7709, 553, 774}, {7710, 70, 775},
    {7711, 102, 775}, {7712, 71, 772}, {7713, 103, 772}, {7714, 72, 775}, {7715, 104, 775}, {7716, 72, 803},
    {7717, 104, 803}, {7718, 72, 776}, {7719, 104, 776}, {7720, 72, 807}, {7721, 104, 807}, {7722, 72, 814},
    {7723, 104, 814}, {7724, 73, 816}, {7725, 105, 816}, {7726, 207, 769}, {7727, 239, 769}, {7728, 75, 769},
    {7729, 107, 769}, {7730, 75, 803}, {7731, 107, 803}, {7732, 75, 817}, {7733, 107, 817}, {7734, 76, 803},
    {7735, 108, 803}, {7736, 7734, 772}, {7737, 7735, 772}, {7738, 76, 817}, {7739, 108, 817}, {7740, 76, 813},
    {7741, 108, 813}, {7742, 77, 769}, {7743, 109, 769}, {7744, 77, 775}, {7745, 109, 775}, {7746, 77, 803},
    {7747, 109, 803}, {7748, 78, 775}, {7749, 110, 775}, {7750, 78, 803}, {7751, 110, 803}, {7752, 78, 817},
    {7753, 110, 817}, {7754, 78, 813}, {7755, 110, 813}, {7756, 213, 769}, {7757, 245, 769}, {7758, 213, 776},
    {7759, 245, 776}, {7760, 332, 768}, {7761, 333, 768}, {7762, 332, 769}, {7763, 333, 769}, {7764, 80, 769},
    {7765, 112, 769}, {7766, 80, 775}, {7767, 112, 775}, {7768, 82, 775}, {7769, 114, 775}, {7770, 82, 803},
    {7771, 114, 803}, {7772, 7770, 772}, {7773, 7771, 772}, {7774, 82, 817}, {7775, 114, 817}, {7776, 83, 775},
    {7777, 115, 775}, {7778, 83, 803}, {7779, 115, 803}, {7780, 346, 775}, {7781, 347, 775}, {7782, 352, 775},
    {7783, 353, 775}, {7784, 7778, 775}, {7785, 7779, 775}, {7786, 84, 775}, {7787, 116, 775}, {7788, 84, 803},
    {7789, 116, 803}, {7790, 84, 817}, {7791, 116, 817}, {7792, 84, 813}, {7793, 116, 813}, {7794, 85, 804},
    {7795, 117, 804}, {7796, 85, 816}, {7797, 117, 816}, {7798, 85, 813}, {7799, 117, 813}, {7800, 360, 769},
    {7801, 361, 769}, {7802, 362, 776}, {7803, 363, 776}, {7804, 86, 771}, {7805, 118, 771}, {7806, 86, 803},
    {7807, 118, 803}, {7808, 87, 768}, {7809, 119, 768}, {7810, 87, 769}, {7811, 119, 769}, {7812, 87, 776},
    {7813, 119, 776}, {7814, 87, 775}, {7815, 119, 775}, {7816, 87, 803}, {7817, 119, 803}, {7818, 88, 775},
    {7819, 120, 775}, {7820, 88, 776}, {7821, 120, 776}, {7822, 89, 775}, {7823, 121, 775}, {7824, 90, 770},
    {7825, 122, 770}, {7826, 90, 803}, {7827, 122, 803}, {7828, 90, 817}, {7829, 122, 817}, {7830, 104, 817},
    {7831, 116, 776}, {7832, 119, 778}, {7833, 121, 778}, {7835, 383, 775}, {7840, 65, 803}, {7841, 97, 803},
    {7842, 65, 777}, {7843, 97, 777}, {7844, 194, 769}, {7845, 226, 769}, {7846, 194, 768}, {7847, 226, 768},
    {7848, 194, 777}, {7849, 226, 777}, {7850, 194, 771}, {7851, 226, 771}, {7852, 7840, 770}, {7853, 7841, 770},
    {7854, 258, 769}, {7855, 259, 769}, {7856, 258, 768}, {7857, 259, 768}, {7858, 258, 777}, {7859, 259, 777},
    {7860, 258, 771}, {7861, 259, 771}, {7862, 7840, 774}, {7863, 7841, 774}, {7864, 69, 803}, {7865, 101, 803},
    {7866, 69, 777}, {7867, 101, 777}, {7868, 69, 771}, {7869, 101, 771}, {7870, 202, 769}, {7871, 234, 769},
    {7872, 202, 768}, {7873, 234, 768}, {7874, 202, 777}, {7875, 234, 777}, {7876, 202, 771}, {7877, 234, 771},
    {7878, 7864, 770}, {7879, 7865, 770}, {7880, 73, 777}, {7881, 105, 777}, {7882, 73, 803}, {7883, 105, 803},
    {7884, 79, 803}, {7885, 111, 803}, {7886, 79, 777}, {7887, 111, 777}, {7888, 212, 769}, {7889, 244, 769},
    {7890, 212, 768}, {7891, 244, 768}, {7892, 212, 777}, {7893, 244, 777}, {7894, 212, 771}, {7895, 244, 771},
    {7896, 7884, 770}, {7897, 7885, 770}, {7898, 416, 769}, {7899, 417, 769}, {7900, 416, 768}, {7901, 417, 768},
    {7902, 416, 777}, {7903, 417, 777}, {7904, 416, 771}, {7905, 417, 771}, {7906, 416, 803}, {7907, 417, 803},
    {7908, 85, 803}, {7909, 117, 803}, {7910, 85, 777}, {7911, 117, 777}, {7912, 431, 769}, {7913, 432, 769},
    {7914, 431, 768}, {7915, 432, 768}, {7916, 431, 777}, {7917, 432, 777}, {7918, 431, 771}, {7919, 432, 771},
    {7920, 431, 803}, {7921, 432, 803}, {7922, 89, 768}, {7923, 121, 768}, {7924, 89, 803}, {7925, 121, 803},
    {7926, 89, 777}, {7927, 121, 777}, {7928, 89, 771}, {7929, 121, 771}, {7936, 945, 787}, {7937, 945, 788},
    {7938, 7936, 768}, {7939, 7937, 768}, {7940, 7936, 769}, {7941, 7937, 769}, {7942, 7936, 834}, {7943, 7937, 834},
    {7944, 913, 787}, {7945, 913, 788}, {7946, 7944, 768}, {7947, 7945, 768}, {7948, 7944, 769}, {7949, 7945, 769},
    {7950, 7944, 834}, {7951, 7945, 834}, {7952, 949, 787}, {7953, 949, 788}, {7954, 7952, 768}, {7955, 7953, 768},
    {7956, 7952, 769}, {7957, 7953, 769}, {7960, 917, 787}, {7961, 917, 788}, {7962, 7960, 768}, {7963, 7961, 768},
    {7964, 7960, 769}, {7965, 7961, 769}, {7968, 951, 787}, {7969, 951, 788}, {7970, 7968, 768}, {7971, 7969, 768},
    {7972, 7968, 769}, {7973, 7969, 769}, {7974, 7968, 834}, {7975, 7969, 834}, {7976, 919, 787}, {7977, 919, 788},
    {7978, 7976, 768}, {7979, 7977, 768}, {7980, 7976, 769}, {7981, 7977, 769}, {7982, 7976, 834}, {7983, 7977, 834},
    {7984, 953, 787}, {7985, 953, 788}, {7986, 7984, 768}, {7987, 7985, 768}, {7988, 7984, 769}, {7989, 7985, 769},
    {7990, 7984, 834}, {7991, 7985, 834}, {7992, 921, 787}, {7993, 921, 788}, {7994, 7992, 768}, {7995, 7993, 768},
    {7996, 7992, 769}, {7997, 7993, 769}, {7998, 7992, 834}, {7999, 7993, 834}, {8000, 959, 787}, {8001, 959, 788},
    {8002, 8000, 768}, {8003, 8001, 768}, {8004, 8000, 769}, {8005, 8001, 769}, {8008, 927, 787}, {8009, 927, 788},
    {8010, 8008, 768}, {8011, 8009, 768}, {8012, 8008, 769}, {8013, 8009, 769}, {8016, 965, 787}, {8017, 965, 788},
    {8018, 8016, 768}, {8019, 8017, 768}, {8020, 8016, 769}, {8021, 8017, 769}, {8022, 8016, 834}, {8023, 8017, 834},
    {8025, 933, 788}, {8027, 8025, 768}, {8029, 8025, 769}, {8031, 8025, 834}, {8032, 969, 787}, {8033, 969, 788},
    {8034, 8032, 768}, {8035, 8033, 768}, {8036, 8032, 769}, {8037, 8033, 769}, {8038, 8032, 834}, {8039, 8033, 834},
    {8040, 937, 787}, {8041, 937, 788}, {8042, 8040, 768}, {8043, 8041, 768}, {8044, 8040, 769}, {8045, 8041, 769},
    {8046, 8040, 834}, {8047, 8041, 834}, {8048, 945, 768}, {8049, 940, 0}, {8050, 949, 768}, {8051, 941, 0},
    {8052, 951, 768}, {8053, 942, 0}, {8054, 953, 768}, {8055, 943, 0}, {8056, 959, 768}, {8057, 972, 0},
    {8058, 965, 768}, {8059, 973, 0}, {8060, 969, 768}, {8061, 974, 0}, {8064, 7936, 837}, {8065, 7937, 837},
    {8066, 7938, 837}, {8067, 7939, 837}, {8068, 7940, 837}, {8069, 7941, 837}, {8070, 7942, 837}, {8071, 7943, 837},
    {8072, 7944, 837}, {8073, 7945, 837}, {8074, 7946, 837}, {8075, 7947, 837}, {8076, 7948, 837}, {8077, 7949, 837},
    {8078, 7950, 837}, {8079, 7951, 837}, {8080, 7968, 837}, {8081, 7969, 837}, {8082, 7970, 837}, {8083, 7971, 837},
    {8084, 7972, 837}, {8085, 7973, 837}, {8086, 7974, 837}, {8087, 7975, 837}, {8088, 7976, 837}, {8089, 7977, 837},
    {8090, 7978, 837}, {8091, 7979, 837}, {8092, 7980, 837}, {8093, 7981, 837}, {8094, 7982, 837}, {8095, 7983, 837},
    {8096, 8032, 837}, {8097, 8033, 837}, {8098, 8034, 837}, {8099, 8035, 837}, {8100, 8036, 837}, {8101, 8037, 837},
    {8102, 8038, 837}, {8103, 8039, 837}, {8104, 8040, 837}, {8105, 8041, 837}, {8106, 8042, 837}, {8107, 8043, 837},
    {8108, 8044, 837}, {8109, 8045, 837}, {8110, 8046, 837}, {8111, 8047, 837}, {8112, 945, 774}, {8113, 945, 772},
    {8114, 8048, 837}, {8115, 945, 837}, {8116, 940, 837}, {8118, 945, 834}, {8119, 8118, 837}, {8120, 913, 774},
    {8121, 913, 772}, {8122, 913, 768}, {8123, 902, 0}, {8124, 913, 837}, {8129, 168, 834}, {8130, 8052, 837},
    {8131, 951, 837}, {8132, 942, 837}, {8134, 951, 834}, {8135, 8134, 837}, {8136, 917, 768}, {8137, 904, 0},
    {8138, 919, 768}, {8139, 905, 0}, {8140, 919, 837}, {8141, 8127, 768}, {8142, 8127, 769}, {8143, 8127, 834},
    {8144, 953, 774}, {8145, 953, 772}, {8146, 970, 768}, {8147, 912, 0}, {8150, 953, 834}, {8151, 970, 834},
    {8152, 921, 774}, {8153, 921, 772}, {8154, 921, 768}, {8155, 906, 0}, {8157, 8190, 768}, {8158, 8190, 769},
    {8159, 8190, 834}, {8160, 965, 774}, {8161, 965, 772}, {8162, 971, 768}, {8163, 944, 0}, {8164, 961, 787},
    {8165, 961, 788}, {8166, 965, 834}, {8167, 971, 834}, {8168, 933, 774}, {8169, 933, 772}, {8170, 933, 768},
    {8171, 910, 0}, {8172, 929, 788}, {8173, 168, 768}, {8174, 901, 0}, {8178, 8060, 837}, {8179, 969, 837},
    {8180, 974, 837}, {8182, 969, 834}, {8183, 8182, 837}, {8184, 927, 768}, {8185, 908, 0}, {8186, 937, 768},
    {8187, 911, 0}, {8188, 937, 837}, {8491, 197, 0}, {8602, 8592, 824}, {8603, 8594, 824}, {8622, 8596, 824},
    {8653, 8656, 824}, {8654, 8660, 824}, {8655, 8658, 824}, {8708, 8707, 824}, {8713, 8712, 824}, {8716, 8715, 824},
    {8740, 8739, 824}, {8742, 8741, 824}, {8769, 8764, 824}, {8772, 8771, 824}, {8775, 8773, 824}, {8777, 8776, 824},
    {8800, 61, 824}, {8802, 8801, 824}, {8813, 8781, 824}, {8814, 60, 824}, {8815, 62, 824}, {8816, 8804, 824},
    {8817, 8805, 824}, {8820, 8818, 824}, {8821, 8819, 824}, {8824, 8822, 824}, {8825, 8823, 824}, {8832, 8826, 824},
    {8833, 8827, 824}, {8836, 8834, 824}, {8837, 8835, 824}, {8840, 8838, 824}, {8841, 8839, 824}, {8876, 8866, 824},
    {8877, 8872, 824}, {8878, 8873, 824}, {8879, 8875, 824}, {8928, 8828, 824}, {8929, 8829, 824}, {8930, 8849, 824},
    {8931, 8850, 824}, {8938, 8882, 824}, {8939, 8883, 824}, {8940, 8884, 824}, {8941, 8885, 824}, {10972, 10973, 824},
    {12364, 12363, 12441}, {12366, 12365, 12441}, {12368, 12367, 12441}, {12370, 12369, 12441}, {12372, 12371, 12441},
    {12374, 12373, 12441}, {12376, 12375, 12441}, {12378, 12377, 12441}, {12380, 12379, 12441}, {12382, 12381, 12441},
    {12384, 12383, 12441}, {12386, 12385, 12441}, {12389, 12388, 12441}, {12391, 12390, 12441}, {12393, 12392, 12441},
    {12400, 12399, 12441}, {12401, 12399, 12442}, {12403, 12402, 12441}, {12404, 12402, 12442}, {12406, 12405, 12441},
    {12407, 12405, 12442}, {12409, 12408, 12441}, {12410, 12408, 12442}, {12412, 12411, 12441}, {12413, 12411, 12442},
    {12436, 12358, 12441}, {12446, 12445, 12441}, {12460, 12459, 12441}, {12462, 12461, 12441}, {12464, 12463, 12441},
    {12466, 12465, 12441}, {12468, 12467, 12441}, {12470, 12469, 12441}, {12472, 12471, 12441}, {12474, 12473, 12441},
    {12476, 12475, 12441}, {12478, 12477, 12441}, {12480, 12479, 12441}, {12482, 12481, 12441}, {12485, 12484, 12441},
    {12487, 12486, 12441}, {12489, 12488, 12441}, {12496, 12495, 12441}, {12497, 12495, 12442}, {12499, 12498, 12441},
    {12500, 12498, 12442}, {12502, 12501, 12441}, {12503, 12501, 12442}, {12505, 12504, 12441}, {12506, 12504, 12442},
    {12508, 12507, 12441}, {12509, 12507, 12442}, {12532, 12454, 12441}, {12535, 12527, 12441}, {12536, 12528, 12441},
    {12537, 12529, 12441}, {12538, 12530, 12441}, {12542, 12541, 12441}, {64285, 1497, 1460}, {64287, 1522, 1463},
    {64298, 1513, 1473}, {64299, 1513, 1474}, {64300, 64329, 1473}, {64301, 64329, 1474}, {64302, 1488, 1463},
    {64303, 1488, 1464}, {64304, 1488, 1468}, {64305, 1489, 1468}, {64306, 1490, 1468}, {64307, 1491, 1468},
    {64308, 1492, 1468}, {64309, 1493, 1468}, {64310, 1494, 1468}, {64312, 1496, 1468}, {64313, 1497, 1468},
    {64314, 1498, 1468}, {64315, 1499, 1468}, {64316, 1500, 1468}, {64318, 1502, 1468}, {64320, 1504, 1468},
    {64321, 1505, 1468}, {64323, 1507, 1468}, {64324, 1508, 1468}, {64326, 1510, 1468}, {64327, 1511, 1468},
    {64328, 1512, 1468}, {64329, 1513, 1468}, {64330, 1514, 1468}, {64331, 1493, 1465}, {64332, 1489, 1471},
    {64333, 1499, 1471}, {64334, 1508, 1471}, {69786, 69785, 69818}, {69788, 69787, 69818}, {69803, 69797, 69818},
    {69934, 69937, 69927}, {69935, 69938, 69927}, {70475, 70471, 70462}, {70476, 70471, 70487}, {70843, 70841, 70842},
    {70844, 70841, 70832}, {70846, 70841, 70845}, {71098, 71096, 71087}, {71099, 71097, 71087},
};

/* The places of those that canonical composition makes, in the order of (first, second). */
static const uint16_t tfm__compositions[940] = {
    902, 899, 903, 0, 1, 2, 3, 53, 55, 238, 4, 569, 5, 165, 208, 210, 567, 412, 57, 414, 416, 418, 59, 61, 63, 65, 6,
    422, 67, 424, 428, 430, 426, 7, 8, 9, 595, 69, 71, 73, 10, 593, 77, 212, 214, 591, 240, 75, 436, 438, 442, 198, 79,
    444, 81, 83, 187, 85, 87, 446, 450, 236, 448, 452, 454, 11, 12, 13, 89, 91, 93, 97, 14, 607, 167, 216, 218, 609, 95,
    456, 98, 460, 189, 462, 100, 464, 102, 106, 466, 104, 472, 470, 474, 476, 478, 200, 108, 15, 480, 112, 482, 110,
    486, 484, 16, 17, 18, 19, 114, 116, 246, 20, 613, 118, 169, 220, 222, 161, 611, 191, 496, 498, 120, 500, 124, 224,
    226, 502, 122, 506, 126, 128, 508, 132, 510, 232, 130, 518, 136, 520, 234, 134, 524, 522, 21, 22, 23, 138, 140, 142,
    24, 637, 144, 146, 171, 228, 230, 163, 635, 526, 148, 530, 528, 536, 538, 540, 542, 150, 546, 544, 548, 550, 552,
    649, 25, 152, 655, 250, 554, 154, 653, 651, 155, 556, 157, 159, 558, 560, 26, 27, 28, 29, 54, 56, 239, 30, 570, 31,
    166, 209, 211, 568, 413, 58, 415, 417, 419, 60, 62, 64, 66, 32, 423, 68, 425, 429, 431, 427, 33, 34, 35, 596, 70,
    72, 74, 36, 594, 78, 213, 215, 592, 241, 76, 437, 439, 443, 199, 80, 445, 82, 84, 188, 86, 88, 447, 451, 237, 449,
    453, 455, 562, 37, 38, 39, 90, 92, 94, 40, 608, 168, 217, 219, 610, 96, 457, 99, 197, 461, 190, 463, 101, 465, 103,
    107, 467, 105, 473, 471, 475, 477, 479, 201, 109, 41, 481, 113, 483, 111, 487, 485, 42, 43, 44, 45, 115, 117, 247,
    46, 614, 119, 170, 221, 223, 162, 612, 192, 497, 499, 121, 501, 125, 225, 227, 503, 123, 507, 127, 129, 509, 133,
    511, 233, 131, 519, 563, 137, 521, 235, 135, 525, 523, 47, 48, 49, 139, 141, 143, 50, 638, 145, 147, 172, 229, 231,
    164, 636, 527, 149, 531, 529, 537, 539, 541, 543, 151, 547, 545, 564, 549, 551, 553, 650, 51, 153, 656, 251, 555,
    52, 654, 565, 652, 156, 557, 158, 160, 559, 561, 871, 256, 831, 573, 571, 577, 575, 181, 202, 204, 185, 420, 599,
    597, 603, 601, 458, 617, 615, 621, 619, 488, 244, 490, 242, 206, 179, 175, 173, 177, 574, 572, 578, 576, 182, 203,
    205, 186, 421, 600, 598, 604, 602, 459, 618, 616, 622, 620, 489, 245, 491, 243, 207, 180, 176, 174, 178, 583, 581,
    587, 585, 584, 582, 588, 586, 432, 434, 433, 435, 492, 494, 493, 495, 512, 513, 514, 515, 532, 533, 534, 535, 566,
    627, 625, 631, 629, 633, 628, 626, 632, 630, 634, 641, 639, 645, 643, 647, 642, 640, 646, 644, 648, 195, 193, 194,
    183, 184, 440, 441, 248, 249, 196, 828, 257, 827, 826, 665, 666, 830, 837, 258, 679, 680, 839, 259, 693, 694, 841,
    853, 260, 852, 851, 265, 709, 710, 878, 261, 723, 724, 870, 868, 262, 867, 866, 266, 737, 880, 263, 749, 750, 882,
    823, 834, 757, 267, 820, 819, 657, 658, 824, 822, 759, 268, 673, 674, 761, 269, 685, 686, 835, 833, 763, 270, 846,
    845, 272, 701, 702, 849, 765, 274, 717, 718, 862, 863, 767, 275, 859, 858, 273, 729, 730, 864, 769, 276, 741, 742,
    876, 874, 847, 264, 850, 860, 271, 865, 875, 277, 278, 282, 299, 301, 281, 279, 303, 280, 297, 307, 309, 284, 311,
    286, 313, 283, 315, 321, 285, 323, 325, 327, 329, 319, 300, 302, 290, 288, 304, 289, 298, 308, 310, 293, 312, 287,
    314, 292, 316, 322, 294, 324, 326, 328, 330, 320, 291, 295, 296, 305, 306, 317, 318, 331, 332, 334, 333, 335, 337,
    338, 336, 339, 340, 341, 350, 351, 362, 361, 363, 366, 367, 369, 368, 370, 371, 374, 372, 373, 375, 376, 378, 377,
    379, 380, 382, 381, 400, 401, 402, 403, 404, 405, 406, 407, 408, 409, 410, 411, 468, 469, 504, 505, 516, 517, 579,
    589, 580, 590, 605, 606, 623, 624, 659, 661, 663, 771, 660, 662, 664, 772, 773, 774, 775, 776, 777, 778, 667, 669,
    671, 779, 668, 670, 672, 780, 781, 782, 783, 784, 785, 786, 675, 677, 676, 678, 681, 683, 682, 684, 687, 689, 691,
    787, 688, 690, 692, 788, 789, 790, 791, 792, 793, 794, 695, 697, 699, 795, 696, 698, 700, 796, 797, 798, 799, 800,
    801, 802, 703, 705, 707, 704, 706, 708, 711, 713, 715, 712, 714, 716, 719, 721, 720, 722, 725, 727, 726, 728, 731,
    733, 735, 732, 734, 736, 738, 739, 740, 743, 745, 747, 803, 744, 746, 748, 804, 805, 806, 807, 808, 809, 810, 751,
    753, 755, 811, 752, 754, 756, 812, 813, 814, 815, 816, 817, 818, 821, 832, 873, 825, 842, 843, 844, 836, 877, 855,
    856, 857, 884, 885, 886, 887, 889, 888, 890, 891, 892, 893, 894, 895, 896, 897, 898, 901, 900, 904, 905, 906, 907,
    908, 909, 910, 911, 920, 921, 912, 913, 914, 915, 922, 923, 916, 917, 918, 919, 924, 925, 926, 927, 954, 929, 930,
    931, 932, 933, 934, 935, 936, 937, 938, 939, 940, 941, 942, 943, 944, 945, 946, 947, 948, 949, 950, 951, 952, 953,
    955, 981, 956, 957, 958, 959, 960, 961, 962, 963, 964, 965, 966, 967, 968, 969, 970, 971, 972, 973, 974, 975, 976,
    977, 978, 979, 980, 982, 983, 984, 985, 986, 1021, 1022, 1023, 1024, 1025, 1026, 1027, 1029, 1028, 1030, 1031, 1032,
};
/* clang-format on */
/* END UNICODE */

/* The last of n ascending numbers that is not above `value`; the first if all are. */
static size_t tfm__find_run(const uint32_t *starts, size_t n, uint32_t value) {
    size_t first = 0;
    while (n > 1) { /* it is one of n from first on */
        size_t half = n / 2;
        if (starts[first + half] <= value)
            first += half;
        n -= half;
    }
    return first;
}

/* The class of a code point; of no class is whatever is not a character. */
static unsigned tfm__unicode_class(uint32_t code_point) {
    size_t n = sizeof tfm__unicode_runs / sizeof tfm__unicode_runs[0];
    if (code_point < 128)
        return tfm__ascii_classes[code_point];
    return tfm__unicode_runs[tfm__find_run(tfm__unicode_runs, n, code_point << 8 | 0xFF)] & 0xFF;
}

/* ---- UTF-8 ------------------------------------------------------------------------------------------------------- */

#define TFM__NOT_UTF8 0xFFFFFFu /* what a byte outside of any well-formed sequence is decoded to; of no class */

/* How many bytes at the start of text (at most size, which is not 0) can begin a well-formed sequence, and in *length
   how long that sequence is: a whole character where the two are equal. Well-formed excludes what could be written
   shorter, surrogates, and everything above U+10FFFF; all of that shows in the first two bytes. */
static size_t tfm__utf8_prefix(const unsigned char *text, size_t size, size_t *length) {
    unsigned lead = text[0], low = 0x80, high = 0xBF;
    size_t n = 1;
    *length = lead < 0xC2 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 1;
    if (*length == 1)
        return lead < 0x80;
    if (lead == 0xE0)
        low = 0xA0;
    else if (lead == 0xED)
        high = 0x9F;
    else if (lead == 0xF0)
        low = 0x90;
    else if (lead == 0xF4)
        high = 0x8F;
    while (n < *length && n < size && text[n] >= low && text[n] <= high) {
        n++;
        low = 0x80;
        high = 0xBF;
    }
    return n;
}

/* The code point at the start of text, and the number of its bytes. */
static uint32_t tfm__utf8_decode(const unsigned char *text, size_t size, size_t *used) {
    size_t length, i;
    uint32_t code_point;
    if (tfm__utf8_prefix(text, size, &length) != length) {
        *used = 1;
        return TFM__NOT_UTF8;
    }
    code_point = length == 1 ? text[0] : text[0] & (0x7Fu >> length);
    for (i = 1; i < length; i++)
        code_point = code_point << 6 | (text[i] & 0x3Fu);
    *used = length;
    return code_point;
}

/* The same, but where no character begins, U+FFFD for all the bytes of the beginning of one: as those decode text that
   promise to lose only what can't be read. */
static uint32_t tfm__utf8_decode_lossy(const unsigned char *text, size_t size, size_t *used) {
    uint32_t code_point = tfm__utf8_decode(text, size, used);
    size_t length, begun;
    if (code_point != TFM__NOT_UTF8)
        return code_point;
    begun = tfm__utf8_prefix(text, size, &length);
    *used = TFM__MAX(begun, (size_t)1);
    return 0xFFFD;
}

/* Writes a code point; returns the number of its bytes, at most 4. */
static size_t tfm__utf8_encode(uint32_t code_point, unsigned char *out) {
    size_t length = code_point < 0x80 ? 1 : code_point < 0x800 ? 2 : code_point < 0x10000 ? 3 : 4, i;
    for (i = length - 1; i > 0; i--) {
        out[i] = (unsigned char)(0x80 | (code_point & 0x3F));
        code_point >>= 6;
    }
    out[0] = (unsigned char)(length == 1 ? code_point : (0xF00u >> length & 0xFF) | code_point);
    return length;
}

/* The class of the character at the start of text, and the number of its bytes. */
static unsigned tfm__class_at(const unsigned char *text, size_t size, size_t *used) {
    if (text[0] < 0x80) {
        *used = 1;
        return tfm__ascii_classes[text[0]];
    }
    return tfm__unicode_class(tfm__utf8_decode(text, size, used));
}

/* The class of the character that ends before text[at], at > 0, and the number of its bytes. */
static unsigned tfm__class_before(const unsigned char *text, size_t at, size_t *used) {
    size_t back;
    for (back = at < 4 ? at : 4; back > 1; back--) {
        uint32_t code_point = tfm__utf8_decode(text + at - back, back, used);
        if (*used == back)
            return tfm__unicode_class(code_point);
    }
    return tfm__class_at(text + at - 1, 1, used);
}

/* How many bytes at the end of text are the beginning of a character whose other bytes may still come. Who streams text
   holds these back; bytes that no continuation can make well-formed are not waited for. */
static size_t tfm__utf8_incomplete(const char *text, size_t size) {
    const unsigned char *end = (const unsigned char *)text + size;
    size_t back, length;
    for (back = 1; back <= 3 && back <= size; back++)
        if ((end[-(ptrdiff_t)back] & 0xC0) != 0x80)
            return tfm__utf8_prefix(end - back, back, &length) == back && back < length ? back : 0;
    return 0;
}

/* ---- A hash table of pairs --------------------------------------------------------------------------------------- */

#define TFM__PAIR_MEMBERS 0x1FFFFFu /* members of a pair are less than this, */
#define TFM__PAIR_VALUES 0x3FFFFFu  /* and values less than this: together 64 bits */
#define TFM__NONE UINT32_MAX
#define TFM__MAX_PROBES 256 /* real vocabularies need less than 50 */

/* Pair -> value, with open addressing. A slot is one word, (first << 43 | second << 22 | value), or all ones if empty,
   so that a look at a pair reads one cache line. */
typedef struct tfm__pairs {
    uint64_t *slots;
    size_t mask;
} tfm__pairs;

static void *tfm__tokenizer_allocate(const tfm_allocator *allocator, size_t size, tfm_error *error) {
    void *memory = allocator->allocate(allocator->user, size);
    if (!memory)
        tfm__fail(error, TFM_ERROR_MEMORY, "tokenizer: out of memory, %zu bytes are not to be had", size);
    return memory;
}

/* How many slots a table of n entries has: at least half of them stay empty. */
static size_t tfm__table_slots(size_t n) {
    size_t n_slots = 2;
    while (n_slots < 2 * n)
        n_slots *= 2;
    return n_slots;
}

static tfm_status tfm__pairs_create(tfm__pairs *pairs, size_t n, const tfm_allocator *allocator, tfm_error *error) {
    size_t n_slots = tfm__table_slots(n);
    pairs->slots = (uint64_t *)tfm__tokenizer_allocate(allocator, n_slots * sizeof *pairs->slots, error);
    if (!pairs->slots)
        return TFM_ERROR_MEMORY;
    memset(pairs->slots, 0xFF, n_slots * sizeof *pairs->slots);
    pairs->mask = n_slots - 1;
    return TFM_OK;
}

/* The slot that holds the pair, or the empty one where it belongs. NULL if that is far from where it should be, as
   happens only where somebody chose pairs that collide: such a table would make every text slow. */
static uint64_t *tfm__pairs_slot(const tfm__pairs *pairs, uint32_t first, uint32_t second) {
    uint64_t key = (uint64_t)first << 21 | second;
    uint64_t hash = key * 0x9E3779B97F4A7C15u;
    size_t slot, probes;
    hash = (hash ^ hash >> 32) * 0x9E3779B97F4A7C15u;
    slot = (size_t)(hash >> 32);
    for (probes = 0; probes < TFM__MAX_PROBES; probes++, slot++) {
        uint64_t *entry = &pairs->slots[slot & pairs->mask];
        if (*entry == UINT64_MAX || *entry >> 22 == key)
            return entry;
    }
    return NULL;
}

static uint64_t tfm__pairs_entry(uint32_t first, uint32_t second, uint32_t value) {
    return (uint64_t)first << 43 | (uint64_t)second << 22 | value;
}

static uint32_t tfm__pairs_find(const tfm__pairs *pairs, uint32_t first, uint32_t second) {
    const uint64_t *entry = tfm__pairs_slot(pairs, first, second);
    return entry && *entry != UINT64_MAX ? (uint32_t)(*entry & TFM__PAIR_VALUES) : TFM__NONE;
}

/* ---- A tokenizer's tables -------------------------------------------------------------------------------------------- */

/* Flags of an added token, as the file has them. */
enum {
    TFM__ADDED_SPECIAL = 1,     /* plain text unless the caller asks for special tokens */
    TFM__ADDED_LSTRIP = 2,      /* takes the white space before it along */
    TFM__ADDED_RSTRIP = 4,      /* takes the white space after it along */
    TFM__ADDED_SINGLE_WORD = 8, /* not where a word's character stands before or after it */
    TFM__ADDED_NORMALIZED = 16, /* looked for after those without this flag, in what they leave */
    TFM__ADDED_OUTSIDE = 32,    /* not in the vocabulary from which other text is made */
    TFM__ADDED = 64             /* not in the file: marks every added token */
};

#define TFM__ADDED_TRIES 3

typedef enum tfm__tokenizer_kind { TFM__BYTE_BPE, TFM__WORDPIECE, TFM__UNIGRAM, TFM__SPM_BPE } tfm__tokenizer_kind;

/* The types of SentencePiece's pieces, as the file has them. */
enum {
    TFM__PIECE_NONE = 0,    /* not one of the model's pieces: an added token */
    TFM__PIECE_NORMAL = 1,  /* found in a text */
    TFM__PIECE_UNKNOWN = 2, /* stands for what no other piece does */
    TFM__PIECE_CONTROL = 3, /* <s>: never found in a text, and no text itself */
    TFM__PIECE_USER = 4,    /* user-defined: found in a text before anything else is */
    TFM__PIECE_UNUSED = 5,  /* BPE: only on the way to longer pieces */
    TFM__PIECE_BYTE = 6,    /* <0x41>: a byte of a character without a piece */
    TFM__PIECE_TYPES = 7
};

typedef enum tfm__metaspace {
    TFM__METASPACE_NONE,
    TFM__METASPACE_NEVER,
    TFM__METASPACE_FIRST,
    TFM__METASPACE_ALWAYS
} tfm__metaspace;

typedef enum tfm__decode_lead {
    TFM__LEAD_KEPT,
    TFM__LEAD_DROPPED,
    TFM__LEADS_DROPPED,
    TFM__LEAD_TOKEN
} tfm__decode_lead;

/* How SentencePiece's models treat white space: the metadata of the same names. "_" here is U+2581. */
typedef struct tfm__spm_rules {
    int tokenizers;               /* Hugging Face's rules (the second list), else sentencepiece's (the first list) */
    int byte_fallback;            /* what has no piece becomes the pieces of its bytes */
    int add_dummy_prefix;         /* 1: a text gets a space in front; 2: at its end */
    int remove_extra_whitespaces; /* no space at the ends, and nowhere two of them */
    int escape_whitespaces;       /* a space becomes "_" */

    int strip;                /* 1: white space goes from the left end, 2: from the right one, 3: from both */
    int squeeze_spaces;       /* two spaces and more become: 1 one space, 2 "_" */
    int prepend;              /* a text gets "_" in front */
    int replace_spaces;       /* a space becomes "_" */
    int split_whitespace;     /* what white space parts is encoded by itself, without it; after that: */
    tfm__metaspace metaspace; /* a space becomes "_", and what doesn't begin with it gets one: never, if the text begins
                                 there, always */
    int split_words;          /* a new piece begins at each "_" */

    tfm__decode_lead decode_lead; /* decoding drops: nothing; the first space; the first space of each token until there
                                     is text; all spaces of the first token */
} tfm__spm_rules;

/* How byte-level BPE cuts a text into pieces: see tfm__bpe_piece(). */
typedef enum tfm__pattern {
    TFM__GPT2_PATTERN,
    TFM__LLAMA3_PATTERN,
    TFM__QWEN2_PATTERN,
    TFM__SMOLLM_PATTERN
} tfm__pattern;

/* The tokenizer's tables as they lie in the mapped file, none of them checked. The file must stay mapped for as long
   as the tokenizer built on it is used. What a kind has no use for is 0. */
typedef struct tfm__tokenizer_source {
    tfm__tokenizer_kind kind;
    /* every kind */
    const unsigned char *tokens; /* the bytes of every token, one after another, in the order of their ids */
    size_t tokens_size;
    const int32_t *token_sizes; /* [n_tokens] their sizes; 0 for an id without a token */
    size_t n_tokens;
    const int32_t *added; /* [n_added][2] id, flags; the token's bytes are the text to look for */
    size_t n_added;
    const int32_t *prefix_ids; /* [n_prefix] what every text begins with */
    size_t n_prefix;
    const int32_t *suffix_ids; /* [n_suffix] and ends with */
    size_t n_suffix;
    const int32_t *pair_ids; /* [n_pair] what stands between two texts */
    size_t n_pair;
    int has_pairs;     /* whether it is known how two texts are joined */
    int32_t pair_type; /* the token type of what comes after pair_ids */
    int32_t unk_id;    /* stands for what has no token; -1: there is none */
    /* byte-level BPE */
    const int32_t *merges; /* [n_merges][3] left id, right id, merged id; the rank of a merge is its place */
    size_t n_merges;
    const int32_t *byte_ids; /* [256] the token of each single byte, or -1: it becomes unk_id, or else vanishes */
    int fuse_unk;            /* one unk_id for a run of such bytes */
    tfm__pattern pattern;
    int nfc;              /* a text is put into Unicode's composed form first */
    int add_prefix_space; /* a text that does not begin with a space gets one, also after each added token; only with
                                GPT-2's pattern */
    int ignore_merges;    /* a piece that is a token is that token, whatever the merges make of it */
    /* WordPiece */
    const unsigned char *continuing_prefix; /* marks a token that continues a word */
    size_t continuing_size;
    size_t max_word_chars; /* a longer word is unknown */
    int clean_text;        /* control characters go, white space becomes spaces */
    int chinese_chars;     /* each is a word */
    int strip_accents;
    int lowercase;
    int cleanup; /* decoding leaves out the spaces before punctuation and English contractions */
    /* SentencePiece, for which see its section; its BPE goes by merges if there are any, else by scores */
    const float *scores;         /* [n_tokens]; unigram: either these, */
    const double *double_scores; /* [n_tokens] or these */
    const int32_t *types;        /* [n_tokens] TFM__PIECE_... */
    const int32_t *sorted; /* [n_sorted] unigram: the pieces that a text is cut into, in the order of their bytes */
    size_t n_sorted;
    const unsigned char *charsmap; /* what sentencepiece calls the precompiled charsmap; NULL: there is none */
    size_t charsmap_size;
    const unsigned char *unk_surface; /* what unk_id is decoded to; NULL: its piece */
    size_t unk_surface_size;
    tfm__spm_rules rules;
} tfm__tokenizer_source;

/* What SentencePiece's models have besides. */
typedef struct tfm__spm {
    unsigned char *texts;       /* what the tokens read as: with spaces, and bytes for the pieces of bytes */
    uint32_t *text_offsets;     /* [n_tokens + 1] */
    int32_t byte_ids[256];      /* the piece of each byte, or -1 */
    int has_unused;             /* whether there are pieces of that type */
    const unsigned char *units; /* the charsmap's trie, */
    size_t n_units;
    const unsigned char *replacements; /* and what it leads to: texts that end with a zero */
    int32_t *parents; /* unigram: [n_tokens] the longest other piece that the piece begins with, or -1 */
    uint32_t *starts; /* unigram: where in `sorted` pieces begin with two bytes; see tfm__unigram_range(); or NULL */
    double unk_score;
} tfm__spm;

typedef struct tfm__tokenizer {
    tfm__tokenizer_source source;
    tfm_allocator allocator;
    uint32_t *offsets;          /* [n_tokens + 1] where each token's bytes begin */
    unsigned char *token_flags; /* [n_tokens] TFM__ADDED_... */
    /* Added tokens, as tries in one table: node 0 is the root of those that are looked for first, node 1 of the
       normalized ones, node 2 of SentencePiece's user-defined pieces. */
    tfm__pairs added;                                 /* node, byte -> node */
    int32_t *added_ids;                               /* [number of nodes] the token that ends at the node, or -1 */
    unsigned char added_first[TFM__ADDED_TRIES][256]; /* whether a token begins with this byte */
    size_t n_added[TFM__ADDED_TRIES];                 /* how many tokens are in each trie */
    uint32_t *words; /* ids by the hash of their bytes, open addressing; NULL if not needed */
    size_t words_mask;
    size_t longest_word; /* bytes of the longest of them */
    tfm__pairs merges;   /* BPE: left id, right id -> rank */
    tfm__spm spm;
} tfm__tokenizer;

static void tfm__tokenizer_free(tfm__tokenizer *tokenizer) {
    void *memory[10];
    size_t i;
    memory[0] = tokenizer->offsets;
    memory[1] = tokenizer->token_flags;
    memory[2] = tokenizer->added.slots;
    memory[3] = tokenizer->added_ids;
    memory[4] = tokenizer->words;
    memory[5] = tokenizer->merges.slots;
    memory[6] = tokenizer->spm.texts;
    memory[7] = tokenizer->spm.text_offsets;
    memory[8] = tokenizer->spm.parents;
    memory[9] = tokenizer->spm.starts;
    for (i = 0; i < sizeof memory / sizeof memory[0]; i++)
        if (memory[i])
            tokenizer->allocator.release(tokenizer->allocator.user, memory[i]);
    memset(tokenizer, 0, sizeof *tokenizer);
}

/* The bytes of a token and their number; NULL if there is no such id. */
static const unsigned char *tfm__token_bytes(const tfm__tokenizer *tokenizer, int32_t id, size_t *size) {
    *size = 0;
    if (id < 0 || (size_t)id >= tokenizer->source.n_tokens)
        return NULL;
    *size = tokenizer->offsets[id + 1] - tokenizer->offsets[id];
    return tokenizer->source.tokens + tokenizer->offsets[id];
}

/* Whether the id is that of a special token, which is usually not shown to people. */
static int tfm__token_is_special(const tfm__tokenizer *tokenizer, int32_t id) {
    return id >= 0 && (size_t)id < tokenizer->source.n_tokens && (tokenizer->token_flags[id] & TFM__ADDED_SPECIAL);
}

/* ---- Checking them: what all kinds share ----------------------------------------------------------------------------- */

/* Where each token's bytes are. The limits keep every id and rank within the hash table's words, and every product of
   sizes within 32 bits. */
static tfm_status tfm__build_tokens(tfm__tokenizer *tokenizer, tfm_error *error) {
    const tfm__tokenizer_source *source = &tokenizer->source;
    uint32_t offset = 0;
    size_t size, i;
    if (source->n_tokens == 0 || source->tokens_size == 0)
        return tfm__fail(error, TFM_ERROR_FORMAT, "tokenizer: the vocabulary is empty");
    if (source->n_tokens > TFM__PAIR_MEMBERS || source->n_merges > TFM__PAIR_VALUES) {
        return tfm__fail(error, TFM_ERROR_UNSUPPORTED,
                         "tokenizer: %zu tokens and %zu merges are too many (the limits are %lu and %lu)",
                         source->n_tokens, source->n_merges, (unsigned long)TFM__PAIR_MEMBERS,
                         (unsigned long)TFM__PAIR_VALUES);
    }
    if (source->tokens_size > UINT32_MAX)
        return tfm__fail(error, TFM_ERROR_UNSUPPORTED, "tokenizer: the tokens have 4 GiB of bytes or more");
    size = (source->n_tokens + 1) * sizeof *tokenizer->offsets;
    tokenizer->offsets = (uint32_t *)tfm__tokenizer_allocate(&tokenizer->allocator, size, error);
    if (!tokenizer->offsets)
        return TFM_ERROR_MEMORY;
    for (i = 0; i < source->n_tokens; i++) {
        int32_t token_size = source->token_sizes[i];
        if (token_size < 0 || (uint32_t)token_size > source->tokens_size - offset) {
            return tfm__fail(error, TFM_ERROR_FORMAT,
                             "tokenizer: token %zu has size %ld, with %zu bytes left for it and those after it", i,
                             (long)token_size, (size_t)(source->tokens_size - offset));
        }
        tokenizer->offsets[i] = offset;
        offset += (uint32_t)token_size;
    }
    tokenizer->offsets[i] = offset;
    if (offset != source->tokens_size) {
        return tfm__fail(error, TFM_ERROR_FORMAT,
                         "tokenizer: the sizes of the tokens add up to %lu bytes, but there are %zu",
                         (unsigned long)offset, source->tokens_size);
    }
    return TFM_OK;
}

static tfm_status tfm__check_id(const tfm__tokenizer *tokenizer, int32_t id, const char *what, size_t which,
                                tfm_error *error) {
    if (id < 0 || (size_t)id >= tokenizer->source.n_tokens) {
        return tfm__fail(error, TFM_ERROR_FORMAT, "tokenizer: %s %zu refers to token %ld, but there are %zu tokens",
                         what, which, (long)id, tokenizer->source.n_tokens);
    }
    return TFM_OK;
}

static tfm_status tfm__check_ids(const tfm__tokenizer *tokenizer, const int32_t *ids, size_t n, const char *what,
                                 tfm_error *error) {
    tfm_status status = TFM_OK;
    size_t i;
    for (i = 0; i < n && status == TFM_OK; i++)
        status = tfm__check_id(tokenizer, ids[i], what, i, error);
    return status;
}

#define TFM__MAX_ADDED_SIZE 1024 /* looking for added tokens takes that many steps for a byte of text, at worst */
#define TFM__GROWTH 3            /* normalization makes a text longer by no more than this factor */

/* What a tokenizer does to a text before it looks for normalized tokens and cuts it into words: see below. */
static int tfm__kind_normalizes(const tfm__tokenizer *tokenizer);
static size_t tfm__kind_normalize(const tfm__tokenizer *tokenizer, const unsigned char *text, size_t size,
                                  unsigned char *out);

/* Enters one added token into a trie. Of several that normalization makes equal the first is found
   (`tokenizers` finds any). */
static tfm_status tfm__build_added_token(tfm__tokenizer *tokenizer, unsigned root, int32_t id, uint32_t *n_nodes,
                                         tfm_error *error) {
    unsigned char normalized[TFM__GROWTH * TFM__MAX_ADDED_SIZE];
    uint32_t node = root;
    size_t size, i;
    const unsigned char *bytes = tfm__token_bytes(tokenizer, id, &size);
    if (size == 0 || size > TFM__MAX_ADDED_SIZE) {
        return tfm__fail(error, TFM_ERROR_FORMAT, "tokenizer: the added token %ld has %zu bytes, not 1 to %d", (long)id,
                         size, TFM__MAX_ADDED_SIZE);
    }
    if (root == 1 && tfm__kind_normalizes(tokenizer)) {
        size = tfm__kind_normalize(tokenizer, bytes, size, normalized);
        bytes = normalized;
        if (size > sizeof normalized)
            return tfm__fail(error, TFM_ERROR_UNSUPPORTED,
                             "tokenizer: normalization makes the added token %ld too long", (long)id);
        if (size == 0)
            return TFM_OK; /* no text has it */
    }
    for (i = 0; i < size; i++) {
        uint64_t *slot = tfm__pairs_slot(&tokenizer->added, node, bytes[i]);
        if (!slot) {
            return tfm__fail(error, TFM_ERROR_FORMAT, "tokenizer: the added token %ld collides with too many others",
                             (long)id);
        }
        if (*slot == UINT64_MAX) {
            tokenizer->added_ids[*n_nodes] = -1;
            *slot = tfm__pairs_entry(node, bytes[i], (*n_nodes)++);
        }
        node = (uint32_t)(*slot & TFM__PAIR_VALUES);
    }
    if (tokenizer->added_ids[node] != -1 && bytes != normalized) {
        return tfm__fail(error, TFM_ERROR_FORMAT, "tokenizer: the added tokens %ld and %ld are the same text",
                         (long)tokenizer->added_ids[node], (long)id);
    }
    if (tokenizer->added_ids[node] == -1)
        tokenizer->added_ids[node] = id;
    tokenizer->added_first[root][bytes[0]] = 1;
    tokenizer->n_added[root]++;
    return TFM_OK;
}

static int tfm__is_user_piece(const tfm__tokenizer *tokenizer, size_t id) {
    return tokenizer->source.types && tokenizer->source.types[id] == TFM__PIECE_USER;
}

/* The flags of every token, and how many nodes the tries of added tokens have at most. */
static tfm_status tfm__build_flags(tfm__tokenizer *tokenizer, size_t *max_nodes, tfm_error *error) {
    const int32_t *added = tokenizer->source.added;
    size_t growth = tfm__kind_normalizes(tokenizer) ? TFM__GROWTH : 1, i;
    *max_nodes = TFM__ADDED_TRIES;
    tokenizer->token_flags =
        (unsigned char *)tfm__tokenizer_allocate(&tokenizer->allocator, tokenizer->source.n_tokens, error);
    if (!tokenizer->token_flags)
        return TFM_ERROR_MEMORY;
    memset(tokenizer->token_flags, 0, tokenizer->source.n_tokens);
    for (i = 0; i < tokenizer->source.n_added; i++) {
        int32_t id = added[2 * i], flags = added[2 * i + 1];
        if (tfm__check_id(tokenizer, id, "added token", i, error) != TFM_OK)
            return TFM_ERROR_FORMAT;
        if (flags < 0 || flags >= TFM__ADDED) {
            return tfm__fail(error, TFM_ERROR_UNSUPPORTED, "tokenizer: the added token %ld has unknown flags, %ld",
                             (long)id, (long)flags);
        }
        if (tokenizer->token_flags[id])
            return tfm__fail(error, TFM_ERROR_FORMAT, "tokenizer: token %ld is added twice", (long)id);
        tokenizer->token_flags[id] = (unsigned char)(flags | TFM__ADDED);
        *max_nodes +=
            (tokenizer->offsets[id + 1] - tokenizer->offsets[id]) * (flags & TFM__ADDED_NORMALIZED ? growth : 1);
    }
    for (i = 0; i < tokenizer->source.n_tokens; i++)
        if (tfm__is_user_piece(tokenizer, i))
            *max_nodes += tokenizer->offsets[i + 1] - tokenizer->offsets[i];
    if (*max_nodes > TFM__PAIR_MEMBERS) {
        return tfm__fail(error, TFM_ERROR_UNSUPPORTED, "tokenizer: the added tokens have more than %lu bytes",
                         (unsigned long)TFM__PAIR_MEMBERS);
    }
    return TFM_OK;
}

static tfm_status tfm__build_added(tfm__tokenizer *tokenizer, tfm_error *error) {
    size_t max_nodes, i;
    uint32_t n_nodes = TFM__ADDED_TRIES;
    tfm_status status = tfm__build_flags(tokenizer, &max_nodes, error);
    if (status == TFM_OK)
        status = tfm__pairs_create(&tokenizer->added, max_nodes, &tokenizer->allocator, error);
    if (status != TFM_OK)
        return status;
    tokenizer->added_ids =
        (int32_t *)tfm__tokenizer_allocate(&tokenizer->allocator, max_nodes * sizeof *tokenizer->added_ids, error);
    if (!tokenizer->added_ids)
        return TFM_ERROR_MEMORY;
    for (i = 0; i < TFM__ADDED_TRIES; i++)
        tokenizer->added_ids[i] = -1;
    for (i = 0; i < tokenizer->source.n_added && status == TFM_OK; i++) {
        int32_t id = tokenizer->source.added[2 * i];
        unsigned root = tokenizer->token_flags[id] & TFM__ADDED_NORMALIZED ? 1 : 0;
        status = tfm__build_added_token(tokenizer, root, id, &n_nodes, error);
    }
    for (i = 0; i < tokenizer->source.n_tokens && status == TFM_OK; i++)
        if (tfm__is_user_piece(tokenizer, i))
            status = tfm__build_added_token(tokenizer, 2, (int32_t)i, &n_nodes, error);
    return status;
}

/* The longest added token of one of the tries at the start of text: its id, or -1. */
static int32_t tfm__added_at(const tfm__tokenizer *tokenizer, unsigned root, const unsigned char *text, size_t size,
                             size_t *token_size) {
    int32_t found = -1;
    uint32_t node = root;
    size_t i;
    for (i = 0; i < size; i++) {
        node = tfm__pairs_find(&tokenizer->added, node, text[i]);
        if (node == TFM__NONE)
            break;
        if (tokenizer->added_ids[node] >= 0) {
            found = tokenizer->added_ids[node];
            *token_size = i + 1;
        }
    }
    return found;
}

#define TFM__HASH_SEED 2166136261u /* FNV-1a */

static uint32_t tfm__hash(uint32_t hash, const unsigned char *bytes, size_t size) {
    size_t i;
    for (i = 0; i < size; i++)
        hash = (hash ^ bytes[i]) * 16777619u;
    return hash;
}

/* The slot of a word (a prefix and text; hash is that of both) in the table of whole tokens, or the empty one where it
   belongs; NULL as for pairs. */
static uint32_t *tfm__word_slot(const tfm__tokenizer *tokenizer, uint32_t hash, const void *prefix, size_t prefix_size,
                                const unsigned char *text, size_t size) {
    size_t probes;
    for (probes = 0; probes < TFM__MAX_PROBES; probes++) {
        uint32_t *slot = &tokenizer->words[(hash + probes) & tokenizer->words_mask];
        if (*slot != TFM__NONE) {
            size_t token_size;
            const unsigned char *token = tfm__token_bytes(tokenizer, (int32_t)*slot, &token_size);
            if (token_size != prefix_size + size || (prefix_size && memcmp(token, prefix, prefix_size) != 0) ||
                memcmp(token + prefix_size, text, size) != 0)
                continue;
        }
        return slot;
    }
    return NULL;
}

/* The token that is this text, or TFM__NONE. */
static uint32_t tfm__find_word(const tfm__tokenizer *tokenizer, const unsigned char *text, size_t size) {
    const uint32_t *slot = tfm__word_slot(tokenizer, tfm__hash(TFM__HASH_SEED, text, size), NULL, 0, text, size);
    return slot ? *slot : TFM__NONE;
}

/* Whether a token may be a word that is looked up: if it has none of the flags; of SentencePiece's, if a text can have
   it. */
static int tfm__is_word(const tfm__tokenizer *tokenizer, size_t id, unsigned without_flags) {
    const int32_t *types = tokenizer->source.types;
    if (!types)
        return !(tokenizer->token_flags[id] & without_flags);
    return types[id] == TFM__PIECE_NORMAL || types[id] == TFM__PIECE_USER || types[id] == TFM__PIECE_UNUSED;
}

/* The table of whole tokens, but those that have one of the flags. */
static tfm_status tfm__build_words(tfm__tokenizer *tokenizer, unsigned without_flags, tfm_error *error) {
    size_t n_slots = tfm__table_slots(tokenizer->source.n_tokens), id;
    tokenizer->words =
        (uint32_t *)tfm__tokenizer_allocate(&tokenizer->allocator, n_slots * sizeof *tokenizer->words, error);
    if (!tokenizer->words)
        return TFM_ERROR_MEMORY;
    tokenizer->words_mask = n_slots - 1;
    memset(tokenizer->words, 0xFF, n_slots * sizeof *tokenizer->words);
    for (id = 0; id < tokenizer->source.n_tokens; id++) {
        size_t size;
        const unsigned char *bytes = tfm__token_bytes(tokenizer, (int32_t)id, &size);
        if (size > 0 && tfm__is_word(tokenizer, id, without_flags)) {
            uint32_t *slot = tfm__word_slot(tokenizer, tfm__hash(TFM__HASH_SEED, bytes, size), NULL, 0, bytes, size);
            if (!slot)
                return tfm__fail(error, TFM_ERROR_FORMAT, "tokenizer: token %zu collides with too many others", id);
            if (*slot == TFM__NONE)
                *slot = (uint32_t)id;
            tokenizer->longest_word = TFM__MAX(tokenizer->longest_word, size);
        }
    }
    return TFM_OK;
}

/* ---- Encoding: what all kinds share ---------------------------------------------------------------------------------- */

/* One call of tfm__encode(). */
typedef struct tfm__encoder {
    const tfm__tokenizer *tokenizer;
    unsigned flags;
    int32_t *ids;   /* the caller's; at most capacity of the n_ids found so far are stored */
    int32_t *types; /* the caller's, of the same size, or NULL */
    int32_t type;   /* of what is encoded now */
    size_t capacity;
    size_t n_ids;
    uint32_t *memory; /* where pieces are merged: the stack, the caller's scratch memory, or `own` */
    size_t n_words;
    void *own;
    tfm_error *error;
    const unsigned char *text;       /* the whole text, */
    const unsigned char *normalized; /* SentencePiece: what is made of the part that is being encoded, */
    int at_start;                    /* and whether that is the text's first */
} tfm__encoder;

static void tfm__emit(tfm__encoder *encoder, int32_t id) {
    if (encoder->n_ids < encoder->capacity) {
        encoder->ids[encoder->n_ids] = id;
        if (encoder->types)
            encoder->types[encoder->n_ids] = encoder->type;
    }
    encoder->n_ids++;
}

/* Sees to it that n_words words of memory are there. */
static tfm_status tfm__encoder_reserve(tfm__encoder *encoder, size_t n_words) {
    const tfm_allocator *allocator = &encoder->tokenizer->allocator;
    if (n_words <= encoder->n_words)
        return TFM_OK;
    if (encoder->own)
        allocator->release(allocator->user, encoder->own);
    encoder->n_words = 0;
    encoder->memory = NULL;
    encoder->own = tfm__tokenizer_allocate(allocator, n_words * sizeof *encoder->memory, encoder->error);
    if (!encoder->own)
        return TFM_ERROR_MEMORY;
    encoder->memory = (uint32_t *)encoder->own;
    encoder->n_words = n_words;
    return TFM_OK;
}

/* ---- Byte-level BPE: cutting a text into pieces ---------------------------------------------------------------------- */

/* The size of the English contraction at the start of text, in lower case only; 0 if there is none. */
static size_t tfm__gpt2_contraction(const unsigned char *text, size_t size) {
    unsigned char a = size >= 2 ? text[1] : 0, b = size >= 3 ? text[2] : 0;
    if (text[0] != '\'')
        return 0;
    if (a == 's' || a == 't' || a == 'm' || a == 'd')
        return 2;
    return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

/* The size of the first piece of a text (size is not 0) by GPT-2's pattern, whose alternatives are tried in this order:

       's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

   In words: an English contraction; a run of letters, of numbers, or of neither, with the one space before it; a run of
   white space, which leaves its last character to what follows unless it has only that one.
   With `lead`, a space that is not in the text stands before it, and is not counted; then a piece can have size 0. */
static size_t tfm__gpt2_piece(const unsigned char *text, size_t size, int lead) {
    const unsigned kinds = TFM__LETTER | TFM__NUMBER | TFM__SPACE;
    size_t contraction = lead ? 0 : tfm__gpt2_contraction(text, size);
    size_t end = !lead && text[0] == ' ' && size >= 2, used; /* after the one space */
    unsigned kind = tfm__class_at(text + end, size - end, &used) & kinds;
    size_t last = 0; /* where the last character of the run of white space begins */
    if (contraction > 0)
        return contraction;
    if (kind != TFM__SPACE) {
        do {
            end += used;
        } while (end < size && (tfm__class_at(text + end, size - end, &used) & kinds) == kind);
        return end;
    }
    for (end = 0; end < size && (tfm__class_at(text + end, size - end, &used) & TFM__SPACE); end += used)
        last = end;
    return end < size && (last > 0 || lead) ? last : end;
}

/* The size of the English contraction at the start of text, in any case; 0 if there is none. Folding case also makes an s of
   U+017F, the long one (two bytes). */
static size_t tfm__cased_contraction(const unsigned char *text, size_t size) {
    unsigned char lower[3] = {0, 0, 0};
    size_t i;
    for (i = 0; i < 3 && i < size; i++)
        lower[i] = (unsigned char)(text[i] >= 'A' && text[i] <= 'Z' ? text[i] + 32 : text[i]);
    if (lower[0] == '\'' && lower[1] == 0xC5 && lower[2] == 0xBF)
        return 3;
    return tfm__gpt2_contraction(lower, size < 3 ? size : 3);
}

/* Where the run of white space at the start of text ends; in *last where its last character begins, and in *line where what
   follows its last CR or LF begins (0: there is none). */
static size_t tfm__space_run(const unsigned char *text, size_t size, size_t *last, size_t *line) {
    size_t end, used;
    *last = *line = 0;
    for (end = 0; end < size && (tfm__class_at(text + end, size - end, &used) & TFM__SPACE); end += used) {
        *last = end;
        if (text[end] == '\r' || text[end] == '\n')
            *line = end + 1;
    }
    return end;
}

/* The same as tfm__gpt2_piece() by the pattern of GPT-4 and LLaMA 3:

       (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+

   In words: an English contraction; a run of letters with any one character before it that is none, but for numbers and line
   ends; up to `digits` numbers (Qwen 2: one); a run of others with the one space before and the line ends after it; white
   space up to its last line end; or as with GPT-2. */
static size_t tfm__llama3_piece(const unsigned char *text, size_t size, size_t digits) {
    const unsigned kinds = TFM__LETTER | TFM__NUMBER | TFM__SPACE;
    size_t end = tfm__cased_contraction(text, size), used, next_used, last, line;
    unsigned kind = tfm__class_at(text, size, &used) & kinds, next = TFM__SPACE;
    if (end > 0)
        return end;
    if (used < size)
        next = tfm__class_at(text + used, size - used, &next_used) & kinds;
    if (kind == TFM__LETTER || (next == TFM__LETTER && kind != TFM__NUMBER && text[0] != '\r' && text[0] != '\n')) {
        for (end = used; end < size && (tfm__class_at(text + end, size - end, &used) & TFM__LETTER); end += used)
            ;
        return end;
    }
    if (kind == TFM__NUMBER) {
        for (end = used; --digits && end < size && (tfm__class_at(text + end, size - end, &used) & TFM__NUMBER);)
            end += used;
        return end;
    }
    if (kind == 0 || (text[0] == ' ' && next == 0)) {
        for (end = used; end < size && !(tfm__class_at(text + end, size - end, &used) & kinds); end += used)
            ;
        while (end < size && (text[end] == '\r' || text[end] == '\n'))
            end++;
        return end;
    }
    end = tfm__space_run(text, size, &last, &line);
    return line > 0 ? line : end < size && last > 0 ? last : end;
}

/* The same for StarCoder and SmolLM: each number is a piece, and what is between numbers is cut by GPT-2's pattern as if it
   were a text of its own, so that white space before a number stays together. */
static size_t tfm__digits_piece(const unsigned char *text, size_t size) {
    size_t end, used, last, line;
    if (tfm__class_at(text, size, &used) & TFM__NUMBER)
        return used;
    end = tfm__space_run(text, size, &last, &line);
    if (end > 0 && end < size && (tfm__class_at(text + end, size - end, &used) & TFM__NUMBER))
        return end;
    return tfm__gpt2_piece(text, size, 0);
}

/* The first piece of a text by the tokenizer's pattern. */
static size_t tfm__bpe_piece(const tfm__tokenizer_source *source, const unsigned char *text, size_t size, int lead) {
    switch (source->pattern) {
    case TFM__LLAMA3_PATTERN: return tfm__llama3_piece(text, size, 3);
    case TFM__QWEN2_PATTERN: return tfm__llama3_piece(text, size, 1);
    case TFM__SMOLLM_PATTERN: return tfm__digits_piece(text, size);
    case TFM__GPT2_PATTERN: break;
    }
    return tfm__gpt2_piece(text, size, lead);
}

/* ---- Byte-level BPE: its tables -------------------------------------------------------------------------------------- */

/* That the token of each byte, if it has one, is that byte. */
static tfm_status tfm__bpe_check_bytes(const tfm__tokenizer *tokenizer, tfm_error *error) {
    size_t i;
    for (i = 0; i < 256; i++) {
        int32_t id = tokenizer->source.byte_ids[i];
        size_t size;
        const unsigned char *bytes;
        if (id == -1)
            continue;
        if (tfm__check_id(tokenizer, id, "byte", i, error) != TFM_OK)
            return TFM_ERROR_FORMAT;
        bytes = tfm__token_bytes(tokenizer, id, &size);
        if (size != 1 || bytes[0] != i) {
            return tfm__fail(error, TFM_ERROR_FORMAT, "tokenizer: byte %zu: its token, %ld, is not that byte", i,
                             (long)id);
        }
    }
    return TFM_OK;
}

/* That the bytes of a merge's two parts, together, are those of its result. (So merging only makes symbols longer, and
   what is encoded can be decoded.) */
static tfm_status tfm__bpe_check_merge(const tfm__tokenizer *tokenizer, size_t rank, tfm_error *error) {
    const int32_t *merge = tokenizer->source.merges + 3 * rank;
    const unsigned char *bytes[3];
    size_t sizes[3], i;
    for (i = 0; i < 3; i++) {
        if (tfm__check_id(tokenizer, merge[i], "merge", rank, error) != TFM_OK)
            return TFM_ERROR_FORMAT;
        bytes[i] = tfm__token_bytes(tokenizer, merge[i], &sizes[i]);
    }
    if (sizes[0] == 0 || sizes[1] == 0) {
        return tfm__fail(error, TFM_ERROR_FORMAT, "tokenizer: merge %zu joins token %ld, which is empty", rank,
                         (long)merge[sizes[0] != 0]);
    }
    if (sizes[2] != sizes[0] + sizes[1] || memcmp(bytes[2], bytes[0], sizes[0]) != 0 ||
        memcmp(bytes[2] + sizes[0], bytes[1], sizes[1]) != 0) {
        return tfm__fail(error, TFM_ERROR_FORMAT,
                         "tokenizer: merge %zu: token %ld is not token %ld followed by token %ld", rank, (long)merge[2],
                         (long)merge[0], (long)merge[1]);
    }
    return TFM_OK;
}

/* The table of merges. Real vocabularies have a few megabytes to compare; a file can be made to have terabytes. */
static tfm_status tfm__bpe_build_merges(tfm__tokenizer *tokenizer, tfm_error *error) {
    const int32_t *merge = tokenizer->source.merges;
    uint64_t compared = 0;
    size_t rank;
    if (tfm__pairs_create(&tokenizer->merges, tokenizer->source.n_merges, &tokenizer->allocator, error) != TFM_OK)
        return TFM_ERROR_MEMORY;
    for (rank = 0; rank < tokenizer->source.n_merges; rank++, merge += 3) {
        tfm_status status = tfm__bpe_check_merge(tokenizer, rank, error);
        uint64_t *slot;
        if (status != TFM_OK)
            return status;
        compared += tokenizer->offsets[merge[2] + 1] - tokenizer->offsets[merge[2]];
        slot = tfm__pairs_slot(&tokenizer->merges, (uint32_t)merge[0], (uint32_t)merge[1]);
        if (!slot || compared > UINT32_MAX) {
            return tfm__fail(error, TFM_ERROR_UNSUPPORTED,
                             "tokenizer: the merges up to %zu (tokens %ld and %ld) are not those of a real vocabulary",
                             rank, (long)merge[0], (long)merge[1]);
        }
        if (*slot != UINT64_MAX) {
            return tfm__fail(error, TFM_ERROR_FORMAT,
                             "tokenizer: merge %zu joins tokens %ld and %ld, as merge %lu does", rank, (long)merge[0],
                             (long)merge[1], (unsigned long)(*slot & TFM__PAIR_VALUES));
        }
        *slot = tfm__pairs_entry((uint32_t)merge[0], (uint32_t)merge[1], (uint32_t)rank);
    }
    return TFM_OK;
}

static tfm_status tfm__bpe_build(tfm__tokenizer *tokenizer, tfm_error *error) {
    tfm_status status = tfm__bpe_check_bytes(tokenizer, error);
    if (status == TFM_OK)
        status = tfm__bpe_build_merges(tokenizer, error);
    if (status == TFM_OK && tokenizer->source.ignore_merges) /* added tokens are found by their own rules */
        status = tfm__build_words(tokenizer, TFM__ADDED, error);
    return status;
}

/* ---- Byte-level BPE: merging the symbols of a piece ------------------------------------------------------------------ */

/* A piece begins as one symbol for each byte (SentencePiece: for each character). Again and again the pair of neighbours with the lowest rank, the leftmost
   of these, becomes one symbol, until no two neighbours are a pair of the vocabulary. Finding that pair must not take a
   look at all of them, or a long piece would take forever: so the ranks are the lowest level of a tree in which every
   node holds the lowest rank of the 16 below it (one cache line). Up to 16 symbols, that is a plain array.

   A symbol lives at its first byte's place. Its length is kept at its first and its last place, so that both neighbours
   can be found from it. */
#define TFM__FROZEN (UINT32_MAX - 1) /* the id of a symbol that is never joined */
#define TFM__MERGE_LEVELS 8          /* 16 to the power of 8 is 2^32 */
#define TFM__MERGE_STACK 1024        /* words on the stack: enough for 300 symbols */

typedef struct tfm__merge_state {
    uint32_t *ids;
    uint32_t *lengths;
    uint32_t *ranks[TFM__MERGE_LEVELS]; /* of the pair that the symbol at a place makes with its right neighbour */
    size_t n_levels;
    size_t top_size; /* of the highest level, which is at most 16 */
    /* Where pieces are joined by their scores (see tfm__spm_rank()), else these are NULL: */
    const unsigned char *text;
    uint32_t *splits;
} tfm__merge_state;

/* Lays the state for n symbols out in memory, all ranks "none"; returns how many words of memory that takes (and only
   that if memory is NULL). */
static size_t tfm__merge_layout(tfm__merge_state *state, size_t n, uint32_t *memory) {
    size_t words = 2 * n, level_size = n;
    state->ids = memory;
    state->lengths = memory ? memory + n : NULL;
    state->n_levels = 0;
    state->text = NULL;
    state->splits = NULL;
    do {
        size_t groups = (level_size + 15) / 16;
        if (memory) {
            state->ranks[state->n_levels] = memory + words;
            memset(memory + words, 0xFF, groups * 16 * sizeof *memory);
        }
        state->n_levels++;
        state->top_size = level_size;
        words += groups * 16;
        level_size = groups;
    } while (level_size > 1);
    return words;
}

static void tfm__merge_set_rank(tfm__merge_state *state, size_t place, uint32_t rank) {
    size_t level, i;
    state->ranks[0][place] = rank;
    for (level = 1; level < state->n_levels; level++) {
        const uint32_t *group = state->ranks[level - 1] + place / 16 * 16;
        uint32_t lowest = group[0];
        for (i = 1; i < 16; i++)
            lowest = group[i] < lowest ? group[i] : lowest;
        place /= 16;
        if (state->ranks[level][place] == lowest)
            return;
        state->ranks[level][place] = lowest;
    }
}

/* The leftmost place with the lowest rank. */
static size_t tfm__merge_lowest(const tfm__merge_state *state) {
    size_t place = 0, level = state->n_levels, size = state->top_size;
    while (level-- > 0) {
        const uint32_t *group = state->ranks[level] + place * 16;
        size_t lowest = 0, i;
        for (i = 1; i < size; i++)
            lowest = group[i] < group[lowest] ? i : lowest;
        place = place * 16 + lowest;
        size = 16;
    }
    return place;
}

/* The rank of a pair where SentencePiece's pieces are joined by scores: the higher the score, the lower the rank. For a piece that
   is not used, how it came about is noted. */
static uint32_t tfm__spm_rank(const tfm__tokenizer *tokenizer, const tfm__merge_state *state, size_t left) {
    size_t right = left + state->lengths[left], size = (size_t)state->lengths[left] + state->lengths[right];
    uint32_t id, bits;
    float score;
    if (size > tokenizer->longest_word || state->ids[left] == TFM__FROZEN || state->ids[right] == TFM__FROZEN)
        return TFM__NONE;
    id = tfm__find_word(tokenizer, state->text + left, size);
    if (id == TFM__NONE)
        return TFM__NONE;
    if (tokenizer->source.types[id] == TFM__PIECE_UNUSED)
        state->splits[id] = state->lengths[left];
    score = tokenizer->source.scores[id] + 0.0f; /* no negative zero */
    memcpy(&bits, &score, sizeof bits);
    return bits >> 31 ? bits : ~bits & 0x7FFFFFFFu;
}

/* The rank of the pair that the symbol at `left` makes with its right neighbour. */
static uint32_t tfm__merge_rank(const tfm__tokenizer *tokenizer, const tfm__merge_state *state, size_t left) {
    size_t right = left + state->lengths[left];
    if (state->text)
        return tfm__spm_rank(tokenizer, state, left);
    return tfm__pairs_find(&tokenizer->merges, state->ids[left], state->ids[right]);
}

/* Merges the symbols at n places (n > 0), whose ids and lengths are set. */
static void tfm__merge(const tfm__tokenizer *tokenizer, tfm__merge_state *state, size_t n) {
    size_t i;
    for (i = 0; i + state->lengths[i] < n; i += state->lengths[i])
        tfm__merge_set_rank(state, i, tfm__merge_rank(tokenizer, state, i));
    for (;;) {
        size_t left = tfm__merge_lowest(state), right, next;
        uint32_t rank = state->ranks[0][left];
        if (rank == TFM__NONE)
            return;
        right = left + state->lengths[left];
        next = right + state->lengths[right];
        if (!state->text)
            state->ids[left] = (uint32_t)tokenizer->source.merges[3 * (size_t)rank + 2];
        state->lengths[left] = state->lengths[next - 1] = (uint32_t)(next - left);
        tfm__merge_set_rank(state, right, TFM__NONE);
        if (left > 0) {
            size_t before = left - state->lengths[left - 1];
            tfm__merge_set_rank(state, before, tfm__merge_rank(tokenizer, state, before));
        }
        tfm__merge_set_rank(state, left, next < n ? tfm__merge_rank(tokenizer, state, left) : TFM__NONE);
    }
}

/* Puts the symbols of a piece into ids, and returns how many there are. */
static size_t tfm__bpe_symbols(const tfm__tokenizer *tokenizer, const unsigned char *text, size_t size, int lead,
                               uint32_t *ids) {
    size_t n = 0, i = 0;
    int unknown = 0;
    while (lead || i < size) {
        int32_t id = tokenizer->source.byte_ids[lead ? ' ' : text[i++]];
        lead = 0;
        if (id >= 0)
            ids[n++] = (uint32_t)id;
        else if (tokenizer->source.unk_id >= 0 && !(unknown && tokenizer->source.fuse_unk))
            ids[n++] = (uint32_t)tokenizer->source.unk_id;
        unknown = id < 0;
    }
    return n;
}

/* Encodes one piece of text; with `lead`, one that begins with a space that is not in the text. */
static tfm_status tfm__bpe_encode_piece(tfm__encoder *encoder, const unsigned char *text, size_t size, int lead) {
    const tfm__tokenizer *tokenizer = encoder->tokenizer;
    static const unsigned char space[1] = {' '};
    tfm__merge_state state;
    size_t n = size + (lead ? 1u : 0u), i;
    if (tokenizer->words) {
        uint32_t hash = tfm__hash(lead ? tfm__hash(TFM__HASH_SEED, space, 1) : TFM__HASH_SEED, text, size);
        const uint32_t *word = tfm__word_slot(tokenizer, hash, space, lead ? 1 : 0, text, size);
        if (word && *word != TFM__NONE) {
            tfm__emit(encoder, (int32_t)*word);
            return TFM_OK;
        }
    }
    if (n > UINT32_MAX || n > SIZE_MAX / 16) {
        return tfm__fail(encoder->error, TFM_ERROR_ARGUMENT, "tokenizer: a piece of text has %zu bytes without a break",
                         size);
    }
    if (tfm__encoder_reserve(encoder, tfm__merge_layout(&state, n, NULL)) != TFM_OK)
        return TFM_ERROR_MEMORY;
    n = tfm__bpe_symbols(tokenizer, text, size, lead, encoder->memory);
    if (n == 0)
        return TFM_OK;
    tfm__merge_layout(&state, n, encoder->memory);
    for (i = 0; i < n; i++)
        state.lengths[i] = 1;
    tfm__merge(tokenizer, &state, n);
    for (i = 0; i < n; i += state.lengths[i])
        tfm__emit(encoder, (int32_t)state.ids[i]);
    return TFM_OK;
}

/* Encodes text without added tokens (size > 0). */
static tfm_status tfm__bpe_encode_plain(tfm__encoder *encoder, const unsigned char *text, size_t size) {
    int lead = encoder->tokenizer->source.add_prefix_space && text[0] != ' ';
    tfm_status status;
    do {
        size_t piece = tfm__bpe_piece(&encoder->tokenizer->source, text, size, lead);
        status = tfm__bpe_encode_piece(encoder, text, piece, lead);
        text += piece;
        size -= piece;
        lead = 0;
    } while (size > 0 && status == TFM_OK);
    return status;
}

/* ---- WordPiece: BERT's normalization ----------------------------------------------------------------------------- */

/* A character in lower case: one, but for U+0130, whose dot comes apart. */
static size_t tfm__put_lower(uint32_t code_point, unsigned char *out) {
    size_t n = sizeof tfm__lower_firsts / sizeof tfm__lower_firsts[0];
    size_t run = tfm__find_run(tfm__lower_firsts, n, code_point);
    const int32_t *rule = tfm__lower_runs[run]; /* last, step, distance */
    uint32_t first = tfm__lower_firsts[run];
    if (code_point < 0x80) {
        out[0] = (unsigned char)(code_point >= 'A' && code_point <= 'Z' ? code_point + 32 : code_point);
        return 1;
    }
    if (code_point == 0x130) {
        memcpy(out, "i\xCC\x87", 3);
        return 3;
    }
    if (code_point >= first && code_point <= (uint32_t)rule[0] && (code_point - first) % (uint32_t)rule[1] == 0)
        code_point = (uint32_t)((int32_t)code_point + rule[2]);
    return tfm__utf8_encode(code_point, out);
}

/* The canonical decomposition of a character without its nonspacing marks: up to three; returns how many. */
static size_t tfm__unaccent(uint32_t code_point, uint32_t out[3]) {
    size_t n = sizeof tfm__unaccented_firsts / sizeof tfm__unaccented_firsts[0], run;
    uint32_t place;
    out[0] = code_point;
    if (code_point < 0x80)
        return 1;
    if (tfm__unicode_class(code_point) & TFM__ACCENT)
        return 0;
    if (code_point >= 0xAC00 && code_point < 0xAC00 + 11172) { /* Hangul: 19 leading letters, 21 vowels, 27 finals */
        place = code_point - 0xAC00;
        out[0] = 0x1100 + place / 588;
        out[1] = 0x1161 + place / 28 % 21;
        out[2] = 0x11A7 + place % 28;
        return place % 28 ? 3 : 2;
    }
    run = tfm__find_run(tfm__unaccented_firsts, n, code_point);
    place = code_point - tfm__unaccented_firsts[run]; /* huge below the first run */
    if (place >= (uint32_t)(tfm__unaccented_starts[run + 1] - tfm__unaccented_starts[run]))
        return 1;
    out[0] = tfm__unaccented[tfm__unaccented_starts[run] + place];
    if (out[0] < 0x110000)
        return 1;
    memcpy(out, tfm__unaccented_several[out[0] - 0x110000], 3 * sizeof *out);
    return out[2] ? 3 : 2;
}

/* A mark's place in the canonical order: see tfm__order_runs. */
static unsigned tfm__mark_order(uint32_t code_point) {
    size_t n = sizeof tfm__order_runs / sizeof tfm__order_runs[0];
    return code_point < 0x300 ? 0 : tfm__order_runs[tfm__find_run(tfm__order_runs, n, code_point << 8 | 0xFF)] & 0xFF;
}

/* Marks after one character are sorted by canonical decomposition. That stripping accents leaves two or more of them in
   another order is so rare that they are written as they come, and written again only if they turn out to be unsorted. */
typedef struct tfm__marks {
    size_t text, out; /* where the run of marks begins in the text, and in what is written */
    unsigned highest; /* order so far; 0: no mark yet */
    int unsorted;
} tfm__marks;

/* Writes the marks that stripping accents leaves of text, in their order: one walk for each of the few orders that there
   are, so that the time is linear in a text of marks. */
static void tfm__put_sorted(const unsigned char *text, size_t size, unsigned char *out) {
    unsigned order;
    for (order = 1; order <= TFM__N_ORDERS; order++) {
        size_t at, used;
        for (at = 0; at < size; at += used) {
            uint32_t parts[3];
            size_t n = tfm__unaccent(tfm__utf8_decode_lossy(text + at, size - at, &used), parts), i;
            for (i = 0; i < n; i++)
                if (tfm__mark_order(parts[i]) == order)
                    out += tfm__utf8_encode(parts[i], out);
        }
    }
}

/* A character that is no mark ends a run of them: at text[at]. */
static void tfm__end_marks(tfm__marks *marks, const unsigned char *text, size_t at, unsigned char *out) {
    if (marks->unsorted)
        tfm__put_sorted(text + marks->text, at - marks->text, out + marks->out);
    marks->highest = 0;
    marks->unsorted = 0;
}

/* A mark that stays is written to out[n], and comes from the character at text[at]. */
static void tfm__add_mark(tfm__marks *marks, unsigned order, size_t at, size_t n) {
    if (marks->highest == 0) {
        marks->text = at;
        marks->out = n;
    }
    marks->unsorted |= order < marks->highest;
    marks->highest = TFM__MAX(order, marks->highest);
}

/* Writes the character at text[at] without accents to out[n]; returns the new n. */
static size_t tfm__put_unaccented(const tfm__tokenizer_source *rules, tfm__marks *marks, const unsigned char *text,
                                  size_t at, uint32_t code_point, unsigned char *out, size_t n) {
    uint32_t parts[3];
    size_t n_parts = tfm__unaccent(code_point, parts), i;
    if (n_parts == 0 && tfm__mark_order(code_point) == 0) /* removed, but between marks they are not sorted across it */
        tfm__end_marks(marks, text, at, out);
    for (i = 0; i < n_parts; i++) {
        unsigned order = tfm__mark_order(parts[i]);
        if (order > 0)
            tfm__add_mark(marks, order, at, n);
        else
            tfm__end_marks(marks, text, at, out);
        n += rules->lowercase ? tfm__put_lower(parts[i], out + n) : tfm__utf8_encode(parts[i], out + n);
    }
    return n;
}

/* The characters that BERT calls Chinese: the ideographs' blocks as they were in Unicode 9. */
static int tfm__is_chinese(uint32_t c) {
    return (c >= 0x4E00 && c <= 0x9FFF) || (c >= 0x3400 && c <= 0x4DBF) || (c >= 0xF900 && c <= 0xFAFF) ||
           (c >= 0x20000 && c <= 0x2A6DF) || (c >= 0x2A700 && c <= 0x2B81F) || (c >= 0x2B920 && c <= 0x2CEAF) ||
           (c >= 0x2F800 && c <= 0x2FA1F);
}

/* Normalizes text as BERT does, in this order: control characters removed and white space made spaces; spaces put around
   Chinese characters; accents stripped; lower case. Returns the size of what was written, at most TFM__GROWTH * size. */
static size_t tfm__bert_normalize(const tfm__tokenizer_source *rules, const unsigned char *text, size_t size,
                                  unsigned char *out) {
    tfm__marks marks;
    size_t n = 0, at, used;
    memset(&marks, 0, sizeof marks);
    for (at = 0; at < size; at += used) {
        uint32_t c = tfm__utf8_decode_lossy(text + at, size - at, &used);
        unsigned kind = tfm__unicode_class(c);
        int chinese = rules->chinese_chars && c >= 0x3400 && tfm__is_chinese(c);
        if (rules->clean_text && (kind & TFM__CONTROL))
            continue;
        if (rules->clean_text && (kind & TFM__SPACE))
            c = ' ';
        if (chinese)
            out[n++] = ' ';
        if (rules->strip_accents)
            n = tfm__put_unaccented(rules, &marks, text, at, c, out, n);
        else
            n += rules->lowercase ? tfm__put_lower(c, out + n) : tfm__utf8_encode(c, out + n);
        if (chinese)
            out[n++] = ' ';
    }
    tfm__end_marks(&marks, text, size, out);
    return n;
}

/* ---- Unicode's composed form (NFC) ----------------------------------------------------------------------------------- */

#define TFM__HANGUL 0xAC00u /* 19 leading letters, 21 vowels, 27 finals: composed by arithmetic */

/* The canonical decomposition of a character: up to four; returns how many. */
static size_t tfm__decompose(uint32_t code_point, uint32_t out[4]) {
    size_t low = 0, high = sizeof tfm__decompositions / sizeof tfm__decompositions[0], n;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const uint32_t *step = tfm__decompositions[middle];
        if (step[0] == code_point) {
            n = tfm__decompose(step[1], out);
            if (step[2])
                out[n++] = step[2];
            return n;
        }
        if (step[0] < code_point)
            low = middle + 1;
        else
            high = middle;
    }
    if (!(tfm__unicode_class(code_point) & TFM__ACCENT))
        return tfm__unaccent(code_point, out);
    out[0] = code_point;
    return 1;
}

/* What the two characters are together; 0: two characters. */
static uint32_t tfm__compose(uint32_t first, uint32_t second) {
    size_t low = 0, high = sizeof tfm__compositions / sizeof tfm__compositions[0];
    if (first - 0x1100 < 19 && second - 0x1161 < 21)
        return TFM__HANGUL + ((first - 0x1100) * 21 + (second - 0x1161)) * 28;
    if (first - TFM__HANGUL < 11172 && (first - TFM__HANGUL) % 28 == 0 && second - 0x11A8 < 27)
        return first + (second - 0x11A7);
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const uint32_t *step = tfm__decompositions[tfm__compositions[middle]];
        if (step[1] == first && step[2] == second)
            return step[0];
        if (step[1] < first || (step[1] == first && step[2] < second))
            low = middle + 1;
        else
            high = middle;
    }
    return 0;
}

/* Writes a character; what is not well-formed stays the byte that it is. */
static size_t tfm__put_character(uint32_t code_point, unsigned char byte, unsigned char *out) {
    out[0] = byte;
    return code_point == TFM__NOT_UTF8 ? 1 : tfm__utf8_encode(code_point, out);
}

/* Writes the decomposed marks of text, but for what begins its first character (`skip` parts), in their order: as many
   counters as there are orders, so that the time is linear in a text of marks. */
static void tfm__sort_marks(const unsigned char *text, size_t size, size_t skip, unsigned char *out) {
    size_t places[TFM__N_ORDERS + 2] = {0}, at, used, order, i;
    unsigned char ignored[4];
    int run;
    for (run = 0; run < 2; run++) { /* the size of each order's marks; then the marks */
        for (at = 0; at < size; at += used) {
            uint32_t parts[4];
            size_t n_parts = tfm__decompose(tfm__utf8_decode(text + at, size - at, &used), parts);
            for (i = at ? 0 : skip; i < n_parts; i++) {
                order = tfm__mark_order(parts[i]);
                if (run)
                    places[order] += tfm__utf8_encode(parts[i], out + places[order]);
                else
                    places[order + 1] += tfm__utf8_encode(parts[i], ignored);
            }
        }
        for (order = 1; !run && order < TFM__N_ORDERS + 2; order++)
            places[order] += places[order - 1];
    }
}

/* Unicode's decomposed form (NFD). Returns the size of what was written, at most TFM__GROWTH * size. */
static size_t tfm__nfd(const unsigned char *text, size_t size, unsigned char *out) {
    size_t n = 0, at, used, first = 0, skip = 0, run = 0, i; /* a run of marks begins in text[first], and at out[run] */
    unsigned highest = 0;                                    /* order in it; 0: no mark yet */
    int unsorted = 0;
    for (at = 0; at < size; at += used) {
        uint32_t parts[4];
        size_t n_parts = tfm__decompose(tfm__utf8_decode(text + at, size - at, &used), parts);
        for (i = 0; i < n_parts; i++) {
            unsigned order = tfm__mark_order(parts[i]);
            if (order == 0 && unsorted)
                tfm__sort_marks(text + first, at - first, skip, out + run);
            if (order == 0)
                highest = 0, unsorted = 0;
            else if (highest == 0)
                first = at, skip = i, run = n;
            unsorted |= order < highest;
            highest = TFM__MAX(order, highest);
            n += tfm__put_character(parts[i], text[at], out + n);
        }
    }
    if (unsorted)
        tfm__sort_marks(text + first, size - first, skip, out + run);
    return n;
}

/* Writes a starter that has been composed over out[at..at + size): returns by how much it is longer or shorter, by which
   what follows it up to out[n] has been moved. */
static size_t tfm__put_starter(uint32_t starter, size_t at, size_t size, size_t n, unsigned char *out) {
    unsigned char bytes[4];
    size_t new_size = tfm__utf8_encode(starter, bytes);
    memmove(out + at + new_size, out + at + size, n - at - size);
    memcpy(out + at, bytes, new_size);
    return n + new_size - size;
}

/* Unicode's composed form (NFC): decomposed, then composed in place. What is composed is no longer than its parts, so
   that what is written never overtakes what is read. Returns the size; `out` has room for TFM__GROWTH * size. */
static size_t tfm__nfc(const unsigned char *text, size_t size, unsigned char *out) {
    const size_t all = tfm__nfd(text, size, out);
    size_t n = 0, at, used, place = 0, length = 0; /* where the last starter is, and its size there; 0: none */
    uint32_t starter = 0, before = 0;              /* the starter; what it was before something was composed with it */
    unsigned last = 0;                             /* order of the last mark that stayed */
    for (at = 0; at < all; at += used) {
        uint32_t c = tfm__utf8_decode(out + at, all - at, &used), both = 0;
        unsigned order = tfm__mark_order(c);
        unsigned char byte = out[at];
        if (length && (last < order || n == place + length))
            both = tfm__compose(starter, c);
        if (both) {
            starter = both;
            continue;
        }
        if (order == 0) {
            if (length && starter != before)
                n = tfm__put_starter(starter, place, length, n, out);
            starter = before = c;
            place = n;
            length = used;
        }
        last = order;
        n += tfm__put_character(c, byte, out + n);
    }
    return length && starter != before ? tfm__put_starter(starter, place, length, n, out) : n;
}

/* Whether a text is surely in that form: it has no character from U+0300 on, where marks begin. */
static int tfm__is_plainly_nfc(const unsigned char *text, size_t size) {
    size_t i;
    for (i = 0; i < size; i++)
        if (text[i] >= 0xCC)
            return 0;
    return 1;
}

/* ---- WordPiece: words -------------------------------------------------------------------------------------------- */

#define TFM__MAX_WORD_CHARS 1024 /* a word takes that many steps for each of its characters, at worst */

static tfm_status tfm__wordpiece_build(tfm__tokenizer *tokenizer, tfm_error *error) {
    size_t size, i;
    for (i = 0; i < tokenizer->source.n_tokens; i++) {
        tfm__token_bytes(tokenizer, (int32_t)i, &size);
        if (size > TFM__MAX_ADDED_SIZE)
            return tfm__fail(error, TFM_ERROR_UNSUPPORTED, "tokenizer: token %zu has %zu bytes, more than %d", i, size,
                             TFM__MAX_ADDED_SIZE);
    }
    return tfm__build_words(tokenizer, TFM__ADDED_OUTSIDE, error);
}

/* The longest token at the start of text, which continues a word or does not: its id, or -1, and its size there. */
static int32_t tfm__longest_piece(const tfm__tokenizer *tokenizer, const unsigned char *text, size_t size,
                                  int continues, size_t *piece_size) {
    const unsigned char *prefix = tokenizer->source.continuing_prefix;
    size_t prefix_size = continues ? tokenizer->source.continuing_size : 0;
    uint32_t hashes[TFM__MAX_ADDED_SIZE]; /* of what ends with each character */
    uint16_t ends[TFM__MAX_ADDED_SIZE];
    uint32_t hash = tfm__hash(TFM__HASH_SEED, prefix, prefix_size);
    size_t limit = TFM__MIN(size, tokenizer->longest_word), n = 0, start, end;
    for (start = 0; start < limit; start = end) {
        for (end = start + 1; end < size && (text[end] & 0xC0) == 0x80; end++)
            ;
        if (end > limit)
            break;
        hashes[n] = hash = tfm__hash(hash, text + start, end - start);
        ends[n++] = (uint16_t)end;
    }
    while (n-- > 0) {
        const uint32_t *slot = tfm__word_slot(tokenizer, hashes[n], prefix, prefix_size, text, ends[n]);
        *piece_size = ends[n];
        if (slot && *slot != TFM__NONE)
            return (int32_t)*slot;
    }
    return -1;
}

/* Cuts a word into the longest tokens that there are, from its beginning on; if there are none somewhere, all of it is
   one unknown token. */
static void tfm__wordpiece_word(tfm__encoder *encoder, const unsigned char *word, size_t size) {
    const tfm__tokenizer *tokenizer = encoder->tokenizer;
    int32_t ids[TFM__MAX_WORD_CHARS];
    size_t n_chars = 0, n = 0, done, i;
    for (i = 0; i < size && n_chars <= tokenizer->source.max_word_chars; i++)
        n_chars += (word[i] & 0xC0) != 0x80;
    if (n_chars > tokenizer->source.max_word_chars) {
        tfm__emit(encoder, tokenizer->source.unk_id);
        return;
    }
    for (done = 0; done < size;) {
        size_t piece = 0;
        ids[n] = tfm__longest_piece(tokenizer, word + done, size - done, done > 0, &piece);
        if (ids[n++] < 0) {
            tfm__emit(encoder, tokenizer->source.unk_id);
            return;
        }
        done += piece;
    }
    for (i = 0; i < n; i++)
        tfm__emit(encoder, ids[i]);
}

/* Encodes normalized text (size > 0): cuts it at white space, which goes, and around punctuation. */
static void tfm__wordpiece_encode_plain(tfm__encoder *encoder, const unsigned char *text, size_t size) {
    size_t start = 0, at, used;
    for (at = 0; at < size; at += used) {
        unsigned kind = tfm__class_at(text + at, size - at, &used);
        if (!(kind & (TFM__SPACE | TFM__PUNCTUATION)))
            continue;
        if (at > start)
            tfm__wordpiece_word(encoder, text + start, at - start);
        if (kind & TFM__PUNCTUATION)
            tfm__wordpiece_word(encoder, text + at, used);
        start = at + used;
    }
    if (size > start)
        tfm__wordpiece_word(encoder, text + start, size - start);
}

/* ---- WordPiece: decoding ----------------------------------------------------------------------------------------- */

/* Replaces every `from` in text by `to`, which is not longer; returns the new size. */
static size_t tfm__replace(unsigned char *text, size_t size, const char *from, const char *to) {
    size_t from_size = strlen(from), to_size = strlen(to), at = 0, n = 0;
    while (at < size) {
        if (size - at >= from_size && !memcmp(text + at, from, from_size)) {
            memcpy(text + n, to, to_size);
            at += from_size;
            n += to_size;
        } else {
            text[n++] = text[at++];
        }
    }
    return n;
}

/* The text of a token within others: without the mark of one that continues a word, else after a space. Then English
   spelling is put right, within this token as `tokenizers` does it; an added token that is found in normalized text is
   normalized itself, as there. out: TFM__MAX_PIECE_TEXT bytes; returns the size. */
static size_t tfm__wordpiece_decode(const tfm__tokenizer *tokenizer, int32_t id, int first, unsigned char *out) {
    static const char *const cleanup[][2] = {{" .", "."},   {" ?", "?"},     {" !", "!"},    {" ,", ","},
                                             {" ' ", "'"},  {" n't", "n't"}, {" 'm", "'m"},  {" do not", " don't"},
                                             {" 's", "'s"}, {" 've", "'ve"}, {" 're", "'re"}};
    const tfm__tokenizer_source *source = &tokenizer->source;
    unsigned char normalized[TFM__GROWTH * TFM__MAX_ADDED_SIZE];
    size_t size, n = 0, i;
    const unsigned char *token = tfm__token_bytes(tokenizer, id, &size);
    if (tokenizer->token_flags[id] & TFM__ADDED_NORMALIZED) {
        size = tfm__bert_normalize(source, token, size, normalized);
        token = normalized;
    }
    if (!first && size >= source->continuing_size &&
        !memcmp(token, source->continuing_prefix, source->continuing_size)) {
        token += source->continuing_size;
        size -= source->continuing_size;
    } else if (!first) {
        out[n++] = ' ';
    }
    memcpy(out + n, token, size);
    n += size;
    for (i = 0; source->cleanup && i < sizeof cleanup / sizeof cleanup[0]; i++)
        n = tfm__replace(out, n, cleanup[i][0], cleanup[i][1]);
    return n;
}

/* ---- SentencePiece: its tables ----------------------------------------------------------------------------------- */

/* A model of SentencePiece takes a text as it is, white space included: normalized (characters replaced by the charsmap;
   every space by U+2581 "_", with one more in front), it is cut into pieces of the vocabulary. Either so that the sum of
   their scores is highest (unigram), or by joining the two neighbours whose joined piece has the highest score (BPE).
   Two libraries read these models, and differ: sentencepiece itself, and Hugging Face's tokenizers, which normalizes and
   splits by steps of its own, adds scores up as doubles and knows BPE only by merges. A file says whose rules it has. */

#define TFM__SPACE_PIECE "\xE2\x96\x81" /* U+2581 */
#define TFM__MAX_PIECE_SIZE 1024        /* encoding takes that many steps for a byte of text, at worst */
#define TFM__MAX_RULE_SIZE 256          /* bytes that a rule of the charsmap looks at, or puts in their place */
#define TFM__UNKNOWN_PENALTY 10         /* that much lower than the lowest score is that of an unknown character */

/* The size of the "_" at the start of text, or 0. */
static size_t tfm__space_piece(const unsigned char *text, size_t size) {
    return size >= 3 && memcmp(text, TFM__SPACE_PIECE, 3) == 0 ? 3 : 0;
}

/* The charsmap is a double array (as the library Darts-clone has it): a trie over bytes whose node is a place in `units`,
   and whose child for a byte is at the node's place, exclusive-or the node's offset, exclusive-or the byte, if the unit
   there has that label. A unit with a value has no label that a byte could be. */
static uint32_t tfm__charsmap_unit(const tfm__spm *spm, size_t node) {
    const unsigned char *unit = spm->units + 4 * node;
    return unit[0] | (uint32_t)unit[1] << 8 | (uint32_t)unit[2] << 16 | (uint32_t)unit[3] << 24;
}

static size_t tfm__charsmap_offset(uint32_t unit) {
    return (size_t)(unit >> 10) << (unit >> 6 & 8);
}

/* What the charsmap has for the longest beginning of text that it knows (or the shortest): NULL if there is nothing. */
static const unsigned char *tfm__charsmap_find(const tfm__spm *spm, const unsigned char *text, size_t size,
                                               int shortest, size_t *used) {
    const unsigned char *found = NULL;
    size_t node = 0, i;
    uint32_t unit;
    if (spm->n_units == 0)
        return NULL;
    node = tfm__charsmap_offset(tfm__charsmap_unit(spm, 0));
    for (i = 0; i < size && i < TFM__MAX_RULE_SIZE && !(found && shortest); i++) {
        node ^= text[i];
        if (node >= spm->n_units)
            break;
        unit = tfm__charsmap_unit(spm, node);
        if ((unit & 0x800000FFu) != text[i])
            break;
        node ^= tfm__charsmap_offset(unit);
        if (unit >> 8 & 1) { /* there is a value, which has been checked */
            found = spm->replacements + (tfm__charsmap_unit(spm, node) & 0x7FFFFFFFu);
            *used = i + 1;
        }
    }
    return found;
}

/* That every value of the charsmap's trie is where it should be, and leads to a text that ends. */
static tfm_status tfm__spm_check_charsmap(tfm__tokenizer *tokenizer, tfm_error *error) {
    tfm__spm *spm = &tokenizer->spm;
    const unsigned char *map = tokenizer->source.charsmap;
    size_t map_size = tokenizer->source.charsmap_size, trie_size, texts_size, node, run = 0;
    if (!map)
        return TFM_OK;
    trie_size = map_size <= 4 ? 0 : map[0] | (size_t)map[1] << 8 | (size_t)map[2] << 16 | (size_t)map[3] << 24;
    if (trie_size == 0 || trie_size % 4 || trie_size > map_size - 4 - 1 || map[map_size - 1] != 0)
        return tfm__fail(error, TFM_ERROR_FORMAT, "tokenizer: the charsmap of %zu bytes is not a trie of %zu and texts",
                         map_size, trie_size);
    spm->units = map + 4;
    spm->replacements = map + 4 + trie_size;
    texts_size = map_size - 4 - trie_size;
    for (node = 0; node < texts_size; node++) {
        run = spm->replacements[node] ? run + 1 : 0;
        if (run > TFM__MAX_RULE_SIZE)
            return tfm__fail(error, TFM_ERROR_UNSUPPORTED, "tokenizer: the charsmap has a text of more than %d bytes",
                             TFM__MAX_RULE_SIZE);
    }
    spm->n_units = trie_size / 4;
    for (node = 0; node < spm->n_units; node++) {
        uint32_t unit = tfm__charsmap_unit(spm, node), value;
        size_t leaf = node ^ tfm__charsmap_offset(unit);
        if (unit >> 31 || !(unit >> 8 & 1))
            continue;
        value = leaf < spm->n_units ? tfm__charsmap_unit(spm, leaf) : 0;
        if (!(value >> 31) || (value & 0x7FFFFFFFu) >= texts_size)
            return tfm__fail(error, TFM_ERROR_FORMAT, "tokenizer: the charsmap's node %zu leads to no text", node);
    }
    return TFM_OK;
}

/* The byte that a piece such as <0x41> stands for, or -1. */
static int tfm__piece_byte(const unsigned char *piece, size_t size) {
    int value = 0, i;
    if (size != 6 || memcmp(piece, "<0x", 3) != 0 || piece[5] != '>')
        return -1;
    for (i = 3; i < 5; i++) {
        int c = piece[i];
        int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
        if (digit < 0)
            return -1;
        value = 16 * value + digit;
    }
    return value;
}

/* Types, scores and bytes of every piece. */
static tfm_status tfm__spm_check_pieces(tfm__tokenizer *tokenizer, tfm_error *error) {
    const tfm__tokenizer_source *source = &tokenizer->source;
    tfm__spm *spm = &tokenizer->spm;
    size_t i, size;
    for (i = 0; i < 256; i++)
        spm->byte_ids[i] = -1;
    for (i = 0; i < source->n_tokens; i++) {
        const unsigned char *piece = tfm__token_bytes(tokenizer, (int32_t)i, &size);
        int32_t type = source->types[i];
        double score = source->double_scores ? source->double_scores[i] : source->scores ? source->scores[i] : 0;
        if (type < 0 || type >= TFM__PIECE_TYPES)
            return tfm__fail(error, TFM_ERROR_FORMAT, "tokenizer: token %zu has the type %ld", i, (long)type);
        if (!tfm__is_finite_double(score))
            return tfm__fail(error, TFM_ERROR_FORMAT, "tokenizer: the score of token %zu is not a number", i);
        if (type == TFM__PIECE_BYTE) {
            int byte = tfm__piece_byte(piece, size);
            if (byte < 0)
                return tfm__fail(error, TFM_ERROR_FORMAT, "tokenizer: token %zu is no byte like <0x41>", i);
            spm->byte_ids[byte] = (int32_t)i;
        } else if (tfm__is_word(tokenizer, i, 0)) {
            if (size > TFM__MAX_PIECE_SIZE)
                return tfm__fail(error, TFM_ERROR_UNSUPPORTED, "tokenizer: token %zu has %zu bytes, more than %d", i,
                                 size, TFM__MAX_PIECE_SIZE);
            spm->has_unused |= type == TFM__PIECE_UNUSED;
        }
    }
    for (i = 0; i < 256 && source->rules.byte_fallback; i++)
        if (spm->byte_ids[i] < 0)
            return tfm__fail(error, TFM_ERROR_FORMAT, "tokenizer: there is no piece for the byte %zu", i);
    if (source->unk_id < 0)
        return tfm__fail(error, TFM_ERROR_FORMAT, "tokenizer: there is no unknown token");
    return TFM_OK;
}

/* What each token reads as. */
static tfm_status tfm__spm_build_texts(tfm__tokenizer *tokenizer, tfm_error *error) {
    tfm__spm *spm = &tokenizer->spm;
    size_t n = tokenizer->source.n_tokens, i, size;
    uint32_t done = 0;
    spm->texts = (unsigned char *)tfm__tokenizer_allocate(&tokenizer->allocator, tokenizer->source.tokens_size, error);
    spm->text_offsets =
        (uint32_t *)tfm__tokenizer_allocate(&tokenizer->allocator, (n + 1) * sizeof *spm->text_offsets, error);
    if (!spm->texts || !spm->text_offsets)
        return TFM_ERROR_MEMORY;
    for (i = 0; i < n; i++) {
        const unsigned char *piece = tfm__token_bytes(tokenizer, (int32_t)i, &size), *end = piece + size;
        spm->text_offsets[i] = done;
        if (tokenizer->source.types[i] == TFM__PIECE_BYTE) {
            spm->texts[done++] = (unsigned char)tfm__piece_byte(piece, size);
            continue;
        }
        while (piece < end) {
            size_t space = tfm__space_piece(piece, (size_t)(end - piece));
            spm->texts[done++] = space ? ' ' : *piece;
            piece += space ? space : 1;
        }
    }
    spm->text_offsets[n] = done;
    return TFM_OK;
}

/* ---- SentencePiece: grapheme clusters ---------------------------------------------------------------------------- */

/* What people see as one character may be several: a letter and its marks, a syllable of Hangul, a family of emoji. The
   rules of Unicode's annex 29 for where one ends look at the classes of the characters around. */
enum {
    TFM__CLUSTER_OTHER,
    TFM__CLUSTER_CONTROL,         /* always alone */
    TFM__CLUSTER_EXTEND,          /* goes with what is before it, */
    TFM__CLUSTER_CONJUNCT_EXTEND, /* also within a conjunct of consonants, */
    TFM__CLUSTER_LINKER,          /* which it makes */
    TFM__CLUSTER_SPACING,         /* goes with what is before it, but not within emoji */
    TFM__CLUSTER_PREPEND,         /* goes with what is after it */
    TFM__CLUSTER_LEAD,            /* of a syllable of Hangul, */
    TFM__CLUSTER_VOWEL,
    TFM__CLUSTER_TRAIL,
    TFM__CLUSTER_SYLLABLE, /* a whole one, with a trail or without */
    TFM__CLUSTER_PICTURE,
    TFM__CLUSTER_CONSONANT
};

/* BEGIN GRAPHEMES: the classes as Hugging Face tokenizers has them, written by tests/make_graphemes.py */
/* Every run of code points of one class: (first code point << 8 | class), in order; before the first: TFM__CLUSTER_OTHER. */
static const uint32_t tfm__grapheme_runs[1364] = {
    0x8001,    0xA000,    0xA90B,    0xAA00,    0xAD01,    0xAE0B,    0xAF00,    0x30003,   0x37000,   0x48303,
    0x48A00,   0x59103,   0x5BE00,   0x5BF03,   0x5C000,   0x5C103,   0x5C300,   0x5C403,   0x5C600,   0x5C703,
    0x5C800,   0x60006,   0x60600,   0x61003,   0x61B00,   0x61C01,   0x61D00,   0x64B03,   0x66000,   0x67003,
    0x67100,   0x6D603,   0x6DD06,   0x6DE00,   0x6DF03,   0x6E500,   0x6E703,   0x6E900,   0x6EA03,   0x6EE00,
    0x70F06,   0x71000,   0x71103,   0x71200,   0x73003,   0x74B00,   0x7A603,   0x7B100,   0x7EB03,   0x7F400,
    0x7FD03,   0x7FE00,   0x81603,   0x81A00,   0x81B03,   0x82400,   0x82503,   0x82800,   0x82903,   0x82E00,
    0x85903,   0x85C00,   0x89006,   0x89200,   0x89703,   0x8A000,   0x8CA03,   0x8E206,   0x8E303,   0x90305,
    0x90400,   0x9150C,   0x93A03,   0x93B05,   0x93C03,   0x93D00,   0x93E05,   0x94103,   0x94905,   0x94D04,
    0x94E05,   0x95000,   0x95103,   0x9580C,   0x96000,   0x96203,   0x96400,   0x9780C,   0x98000,   0x98103,
    0x98205,   0x98400,   0x9950C,   0x9A900,   0x9AA0C,   0x9B100,   0x9B20C,   0x9B300,   0x9B60C,   0x9BA00,
    0x9BC03,   0x9BD00,   0x9BE03,   0x9BF05,   0x9C103,   0x9C500,   0x9C705,   0x9C900,   0x9CB05,   0x9CD04,
    0x9CE00,   0x9D703,   0x9D800,   0x9DC0C,   0x9DE00,   0x9DF0C,   0x9E000,   0x9E203,   0x9E400,   0x9F00C,
    0x9F200,   0x9FE03,   0x9FF00,   0xA0103,   0xA0305,   0xA0400,   0xA3C03,   0xA3D00,   0xA3E05,   0xA4103,
    0xA4300,   0xA4703,   0xA4900,   0xA4B03,   0xA4E00,   0xA5103,   0xA5200,   0xA7003,   0xA7200,   0xA7503,
    0xA7600,   0xA8103,   0xA8305,   0xA8400,   0xA950C,   0xAA900,   0xAAA0C,   0xAB100,   0xAB20C,   0xAB400,
    0xAB50C,   0xABA00,   0xABC03,   0xABD00,   0xABE05,   0xAC103,   0xAC600,   0xAC703,   0xAC905,   0xACA00,
    0xACB05,   0xACD04,   0xACE00,   0xAE203,   0xAE400,   0xAF90C,   0xAFA03,   0xB0000,   0xB0103,   0xB0205,
    0xB0400,   0xB150C,   0xB2900,   0xB2A0C,   0xB3100,   0xB320C,   0xB3400,   0xB350C,   0xB3A00,   0xB3C03,
    0xB3D00,   0xB3E03,   0xB4005,   0xB4103,   0xB4500,   0xB4705,   0xB4900,   0xB4B05,   0xB4D04,   0xB4E00,
    0xB5503,   0xB5800,   0xB5C0C,   0xB5E00,   0xB5F0C,   0xB6000,   0xB6203,   0xB6400,   0xB710C,   0xB7200,
    0xB8203,   0xB8300,   0xBBE03,   0xBBF05,   0xBC003,   0xBC105,   0xBC300,   0xBC605,   0xBC900,   0xBCA05,
    0xBCD03,   0xBCE00,   0xBD703,   0xBD800,   0xC0003,   0xC0105,   0xC0403,   0xC0500,   0xC150C,   0xC2900,
    0xC2A0C,   0xC3A00,   0xC3C03,   0xC3D00,   0xC3E03,   0xC4105,   0xC4500,   0xC4603,   0xC4900,   0xC4A03,
    0xC4D04,   0xC4E00,   0xC5503,   0xC5700,   0xC580C,   0xC5B00,   0xC6203,   0xC6400,   0xC8103,   0xC8205,
    0xC8400,   0xCBC03,   0xCBD00,   0xCBE05,   0xCBF03,   0xCC105,   0xCC203,   0xCC305,   0xCC500,   0xCC603,
    0xCC900,   0xCCA03,   0xCCE00,   0xCD503,   0xCD700,   0xCE203,   0xCE400,   0xCF305,   0xCF400,   0xD0003,
    0xD0205,   0xD0400,   0xD150C,   0xD3B03,   0xD3D00,   0xD3E03,   0xD3F05,   0xD4103,   0xD4500,   0xD4605,
    0xD4900,   0xD4A05,   0xD4D04,   0xD4E06,   0xD4F00,   0xD5703,   0xD5800,   0xD6203,   0xD6400,   0xD8103,
    0xD8205,   0xD8400,   0xDCA03,   0xDCB00,   0xDCF03,   0xDD005,   0xDD203,   0xDD500,   0xDD603,   0xDD700,
    0xDD805,   0xDDF03,   0xDE000,   0xDF205,   0xDF400,   0xE3103,   0xE3200,   0xE3305,   0xE3403,   0xE3B00,
    0xE4703,   0xE4F00,   0xEB103,   0xEB200,   0xEB305,   0xEB403,   0xEBD00,   0xEC803,   0xECF00,   0xF1803,
    0xF1A00,   0xF3503,   0xF3600,   0xF3703,   0xF3800,   0xF3903,   0xF3A00,   0xF3E05,   0xF4000,   0xF7103,
    0xF7F05,   0xF8003,   0xF8500,   0xF8603,   0xF8800,   0xF8D03,   0xF9800,   0xF9903,   0xFBD00,   0xFC603,
    0xFC700,   0x10000C,  0x102B00,  0x102D03,  0x103105,  0x103203,  0x103800,  0x103904,  0x103A03,  0x103B05,
    0x103D03,  0x103F0C,  0x104000,  0x10500C,  0x105605,  0x105803,  0x105A0C,  0x105E03,  0x10610C,  0x106200,
    0x10650C,  0x106700,  0x106E0C,  0x107103,  0x10750C,  0x108203,  0x108300,  0x108405,  0x108503,  0x108700,
    0x108D03,  0x108E0C,  0x108F00,  0x109D03,  0x109E00,  0x110007,  0x116008,  0x11A809,  0x120000,  0x135D03,
    0x136000,  0x171203,  0x171600,  0x173203,  0x173500,  0x175203,  0x175400,  0x177203,  0x177400,  0x17800C,
    0x17B403,  0x17B605,  0x17B703,  0x17BE05,  0x17C603,  0x17C705,  0x17C903,  0x17D204,  0x17D303,  0x17D400,
    0x17DD03,  0x17DE00,  0x180B03,  0x180E01,  0x180F03,  0x181000,  0x188503,  0x188700,  0x18A903,  0x18AA00,
    0x192003,  0x192305,  0x192703,  0x192905,  0x192C00,  0x193005,  0x193203,  0x193305,  0x193903,  0x193C00,
    0x1A1703,  0x1A1905,  0x1A1B03,  0x1A1C00,  0x1A200C,  0x1A5505,  0x1A5603,  0x1A5705,  0x1A5803,  0x1A5F00,
    0x1A6004,  0x1A6100,  0x1A6203,  0x1A6300,  0x1A6503,  0x1A6D05,  0x1A7303,  0x1A7D00,  0x1A7F03,  0x1A8000,
    0x1AB003,  0x1ADE00,  0x1AE003,  0x1AEC00,  0x1B0003,  0x1B0405,  0x1B0500,  0x1B0B0C,  0x1B0D00,  0x1B130C,
    0x1B3403,  0x1B3E05,  0x1B4203,  0x1B4404,  0x1B450C,  0x1B4D00,  0x1B6B03,  0x1B7400,  0x1B8003,  0x1B8205,
    0x1B830C,  0x1BA105,  0x1BA203,  0x1BA605,  0x1BA803,  0x1BAB04,  0x1BAC03,  0x1BAE0C,  0x1BB000,  0x1BBB0C,
    0x1BBE00,  0x1BE603,  0x1BE705,  0x1BE803,  0x1BEA05,  0x1BED03,  0x1BEE05,  0x1BEF03,  0x1BF400,  0x1C2405,
    0x1C2C03,  0x1C3405,  0x1C3603,  0x1C3800,  0x1CD003,  0x1CD300,  0x1CD403,  0x1CE105,  0x1CE203,  0x1CE900,
    0x1CED03,  0x1CEE00,  0x1CF403,  0x1CF500,  0x1CF705,  0x1CF803,  0x1CFA00,  0x1DC003,  0x1E0000,  0x200B01,
    0x200C02,  0x200D05,  0x200E01,  0x201000,  0x202801,  0x202F00,  0x203C0B,  0x203D00,  0x20490B,  0x204A00,
    0x206001,  0x207000,  0x20D003,  0x20F100,  0x21220B,  0x212300,  0x21390B,  0x213A00,  0x21940B,  0x219A00,
    0x21A90B,  0x21AB00,  0x231A0B,  0x231C00,  0x23280B,  0x232900,  0x23CF0B,  0x23D000,  0x23E90B,  0x23F400,
    0x23F80B,  0x23FB00,  0x24C20B,  0x24C300,  0x25AA0B,  0x25AC00,  0x25B60B,  0x25B700,  0x25C00B,  0x25C100,
    0x25FB0B,  0x25FF00,  0x26000B,  0x260500,  0x260E0B,  0x260F00,  0x26110B,  0x261200,  0x26140B,  0x261600,
    0x26180B,  0x261900,  0x261D0B,  0x261E00,  0x26200B,  0x262100,  0x26220B,  0x262400,  0x26260B,  0x262700,
    0x262A0B,  0x262B00,  0x262E0B,  0x263000,  0x26380B,  0x263B00,  0x26400B,  0x264100,  0x26420B,  0x264300,
    0x26480B,  0x265400,  0x265F0B,  0x266100,  0x26630B,  0x266400,  0x26650B,  0x266700,  0x26680B,  0x266900,
    0x267B0B,  0x267C00,  0x267E0B,  0x268000,  0x26920B,  0x269800,  0x26990B,  0x269A00,  0x269B0B,  0x269D00,
    0x26A00B,  0x26A200,  0x26A70B,  0x26A800,  0x26AA0B,  0x26AC00,  0x26B00B,  0x26B200,  0x26BD0B,  0x26BF00,
    0x26C40B,  0x26C600,  0x26C80B,  0x26C900,  0x26CE0B,  0x26D000,  0x26D10B,  0x26D200,  0x26D30B,  0x26D500,
    0x26E90B,  0x26EB00,  0x26F00B,  0x26F600,  0x26F70B,  0x26FB00,  0x26FD0B,  0x26FE00,  0x27020B,  0x270300,
    0x27050B,  0x270600,  0x27080B,  0x270E00,  0x270F0B,  0x271000,  0x27120B,  0x271300,  0x27140B,  0x271500,
    0x27160B,  0x271700,  0x271D0B,  0x271E00,  0x27210B,  0x272200,  0x27280B,  0x272900,  0x27330B,  0x273500,
    0x27440B,  0x274500,  0x27470B,  0x274800,  0x274C0B,  0x274D00,  0x274E0B,  0x274F00,  0x27530B,  0x275600,
    0x27570B,  0x275800,  0x27630B,  0x276500,  0x27950B,  0x279800,  0x27A10B,  0x27A200,  0x27B00B,  0x27B100,
    0x27BF0B,  0x27C000,  0x29340B,  0x293600,  0x2B050B,  0x2B0800,  0x2B1B0B,  0x2B1D00,  0x2B500B,  0x2B5100,
    0x2B550B,  0x2B5600,  0x2CEF03,  0x2CF200,  0x2D7F03,  0x2D8000,  0x2DE003,  0x2E0000,  0x302A03,  0x30300B,
    0x303100,  0x303D0B,  0x303E00,  0x309903,  0x309B00,  0x32970B,  0x329800,  0x32990B,  0x329A00,  0xA66F03,
    0xA67300,  0xA67403,  0xA67E00,  0xA69E03,  0xA6A000,  0xA6F003,  0xA6F200,  0xA80203,  0xA80300,  0xA80603,
    0xA80700,  0xA80B03,  0xA80C00,  0xA82305,  0xA82503,  0xA82705,  0xA82800,  0xA82C03,  0xA82D00,  0xA88005,
    0xA88200,  0xA8B405,  0xA8C403,  0xA8C600,  0xA8E003,  0xA8F200,  0xA8FF03,  0xA90000,  0xA92603,  0xA92E00,
    0xA94703,  0xA95205,  0xA95303,  0xA95400,  0xA96007,  0xA97D00,  0xA98003,  0xA98305,  0xA98400,  0xA9890C,
    0xA98C00,  0xA98F0C,  0xA9B303,  0xA9B405,  0xA9B603,  0xA9BA05,  0xA9BC03,  0xA9BE05,  0xA9C004,  0xA9C100,
    0xA9E00C,  0xA9E503,  0xA9E600,  0xA9E70C,  0xA9F000,  0xA9FA0C,  0xA9FF00,  0xAA2903,  0xAA2F05,  0xAA3103,
    0xAA3305,  0xAA3503,  0xAA3700,  0xAA4303,  0xAA4400,  0xAA4C03,  0xAA4D05,  0xAA4E00,  0xAA600C,  0xAA7000,
    0xAA710C,  0xAA7400,  0xAA7A0C,  0xAA7B00,  0xAA7C03,  0xAA7D00,  0xAA7E0C,  0xAA8000,  0xAAB003,  0xAAB100,
    0xAAB203,  0xAAB500,  0xAAB703,  0xAAB900,  0xAABE03,  0xAAC000,  0xAAC103,  0xAAC200,  0xAAE00C,  0xAAEB05,
    0xAAEC03,  0xAAEE05,  0xAAF000,  0xAAF505,  0xAAF604,  0xAAF700,  0xABC00C,  0xABDB00,  0xABE305,  0xABE503,
    0xABE605,  0xABE803,  0xABE905,  0xABEB00,  0xABEC05,  0xABED03,  0xABEE00,  0xAC000A,  0xD7A400,  0xD7B008,
    0xD7C700,  0xD7CB09,  0xD7FC00,  0xFB1E03,  0xFB1F00,  0xFE0003,  0xFE1000,  0xFE2003,  0xFE3000,  0xFEFF01,
    0xFF0000,  0xFF9E03,  0xFFA000,  0xFFF001,  0xFFFC00,  0x101FD03, 0x101FE00, 0x102E003, 0x102E100, 0x1037603,
    0x1037B00, 0x10A000C, 0x10A0103, 0x10A0400, 0x10A0503, 0x10A0700, 0x10A0C03, 0x10A100C, 0x10A1400, 0x10A150C,
    0x10A1800, 0x10A190C, 0x10A3600, 0x10A3803, 0x10A3B00, 0x10A3F04, 0x10A4000, 0x10AE503, 0x10AE700, 0x10D2403,
    0x10D2800, 0x10D6903, 0x10D6E00, 0x10EAB03, 0x10EAD00, 0x10EFA03, 0x10F0000, 0x10F4603, 0x10F5100, 0x10F8203,
    0x10F8600, 0x1100005, 0x1100103, 0x1100205, 0x1100300, 0x1103803, 0x1104700, 0x1107003, 0x1107100, 0x1107303,
    0x1107500, 0x1107F03, 0x1108205, 0x1108300, 0x110B005, 0x110B303, 0x110B705, 0x110B903, 0x110BB00, 0x110BD06,
    0x110BE00, 0x110C203, 0x110C300, 0x110CD06, 0x110CE00, 0x1110003, 0x111030C, 0x1112703, 0x1112C05, 0x1112D03,
    0x1113304, 0x1113403, 0x1113500, 0x111440C, 0x1114505, 0x111470C, 0x1114800, 0x1117303, 0x1117400, 0x1118003,
    0x1118205, 0x1118300, 0x111B305, 0x111B603, 0x111BF05, 0x111C003, 0x111C100, 0x111C206, 0x111C400, 0x111C903,
    0x111CD00, 0x111CE05, 0x111CF03, 0x111D000, 0x1122C05, 0x1122F03, 0x1123205, 0x1123403, 0x1123800, 0x1123E03,
    0x1123F00, 0x1124103, 0x1124200, 0x112DF03, 0x112E005, 0x112E303, 0x112EB00, 0x1130003, 0x1130205, 0x1130400,
    0x1133B03, 0x1133D00, 0x1133E03, 0x1133F05, 0x1134003, 0x1134105, 0x1134500, 0x1134705, 0x1134900, 0x1134B05,
    0x1134D03, 0x1134E00, 0x1135703, 0x1135800, 0x1136205, 0x1136400, 0x1136603, 0x1136D00, 0x1137003, 0x1137500,
    0x113800C, 0x1138A00, 0x1138B0C, 0x1138C00, 0x1138E0C, 0x1138F00, 0x113900C, 0x113B600, 0x113B803, 0x113B905,
    0x113BB03, 0x113C100, 0x113C203, 0x113C300, 0x113C503, 0x113C600, 0x113C703, 0x113CA05, 0x113CB00, 0x113CC05,
    0x113CE03, 0x113D004, 0x113D106, 0x113D203, 0x113D300, 0x113E103, 0x113E300, 0x1143505, 0x1143803, 0x1144005,
    0x1144203, 0x1144505, 0x1144603, 0x1144700, 0x1145E03, 0x1145F00, 0x114B003, 0x114B105, 0x114B303, 0x114B905,
    0x114BA03, 0x114BB05, 0x114BD03, 0x114BE05, 0x114BF03, 0x114C105, 0x114C203, 0x114C400, 0x115AF03, 0x115B005,
    0x115B203, 0x115B600, 0x115B805, 0x115BC03, 0x115BE05, 0x115BF03, 0x115C100, 0x115DC03, 0x115DE00, 0x1163005,
    0x1163303, 0x1163B05, 0x1163D03, 0x1163E05, 0x1163F03, 0x1164100, 0x116AB03, 0x116AC05, 0x116AD03, 0x116AE05,
    0x116B003, 0x116B800, 0x1171D03, 0x1171E05, 0x1171F03, 0x1172000, 0x1172203, 0x1172605, 0x1172703, 0x1172C00,
    0x1182C05, 0x1182F03, 0x1183805, 0x1183903, 0x1183B00, 0x119000C, 0x1190700, 0x119090C, 0x1190A00, 0x1190C0C,
    0x1191400, 0x119150C, 0x1191700, 0x119180C, 0x1193003, 0x1193105, 0x1193600, 0x1193705, 0x1193900, 0x1193B03,
    0x1193E04, 0x1193F06, 0x1194005, 0x1194106, 0x1194205, 0x1194303, 0x1194400, 0x119D105, 0x119D403, 0x119D800,
    0x119DA03, 0x119DC05, 0x119E003, 0x119E100, 0x119E405, 0x119E500, 0x11A000C, 0x11A0103, 0x11A0B0C, 0x11A3303,
    0x11A3905, 0x11A3A00, 0x11A3B03, 0x11A3F00, 0x11A4704, 0x11A4800, 0x11A500C, 0x11A5103, 0x11A5705, 0x11A5903,
    0x11A5C0C, 0x11A8406, 0x11A8A03, 0x11A9705, 0x11A9803, 0x11A9904, 0x11A9A00, 0x11B6003, 0x11B6105, 0x11B6203,
    0x11B6505, 0x11B6603, 0x11B6705, 0x11B6800, 0x11C2F05, 0x11C3003, 0x11C3700, 0x11C3803, 0x11C3E05, 0x11C3F03,
    0x11C4000, 0x11C9203, 0x11CA800, 0x11CA905, 0x11CAA03, 0x11CB105, 0x11CB203, 0x11CB405, 0x11CB503, 0x11CB700,
    0x11D3103, 0x11D3700, 0x11D3A03, 0x11D3B00, 0x11D3C03, 0x11D3E00, 0x11D3F03, 0x11D4606, 0x11D4703, 0x11D4800,
    0x11D8A05, 0x11D8F00, 0x11D9003, 0x11D9200, 0x11D9305, 0x11D9503, 0x11D9605, 0x11D9703, 0x11D9800, 0x11EF303,
    0x11EF505, 0x11EF700, 0x11F0003, 0x11F0206, 0x11F0305, 0x11F040C, 0x11F1100, 0x11F120C, 0x11F3405, 0x11F3603,
    0x11F3B00, 0x11F3E05, 0x11F4003, 0x11F4204, 0x11F4300, 0x11F5A03, 0x11F5B00, 0x1343001, 0x1344003, 0x1344100,
    0x1344703, 0x1345600, 0x1611E03, 0x1612A05, 0x1612D03, 0x1613000, 0x16AF003, 0x16AF500, 0x16B3003, 0x16B3700,
    0x16D6308, 0x16D6400, 0x16D6708, 0x16D6B00, 0x16F4F03, 0x16F5000, 0x16F5105, 0x16F8800, 0x16F8F03, 0x16F9300,
    0x16FE403, 0x16FE500, 0x16FF003, 0x16FF200, 0x1BC9D03, 0x1BC9F00, 0x1BCA001, 0x1BCA400, 0x1CF0003, 0x1CF2E00,
    0x1CF3003, 0x1CF4700, 0x1D16503, 0x1D16A00, 0x1D16D03, 0x1D17301, 0x1D17B03, 0x1D18300, 0x1D18503, 0x1D18C00,
    0x1D1AA03, 0x1D1AE00, 0x1D24203, 0x1D24500, 0x1DA0003, 0x1DA3700, 0x1DA3B03, 0x1DA6D00, 0x1DA7503, 0x1DA7600,
    0x1DA8403, 0x1DA8500, 0x1DA9B03, 0x1DAA000, 0x1DAA103, 0x1DAB000, 0x1E00003, 0x1E00700, 0x1E00803, 0x1E01900,
    0x1E01B03, 0x1E02200, 0x1E02303, 0x1E02500, 0x1E02603, 0x1E02B00, 0x1E08F03, 0x1E09000, 0x1E13003, 0x1E13700,
    0x1E2AE03, 0x1E2AF00, 0x1E2EC03, 0x1E2F000, 0x1E4EC03, 0x1E4F000, 0x1E5EE03, 0x1E5F000, 0x1E6E303, 0x1E6E400,
    0x1E6E603, 0x1E6E700, 0x1E6EE03, 0x1E6F000, 0x1E6F503, 0x1E6F600, 0x1E8D003, 0x1E8D700, 0x1E94403, 0x1E94B00,
    0x1F0040B, 0x1F00500, 0x1F02C0B, 0x1F03000, 0x1F0940B, 0x1F0A000, 0x1F0AF0B, 0x1F0B100, 0x1F0C00B, 0x1F0C100,
    0x1F0CF0B, 0x1F0D100, 0x1F0F60B, 0x1F10000, 0x1F1700B, 0x1F17200, 0x1F17E0B, 0x1F18000, 0x1F18E0B, 0x1F18F00,
    0x1F1910B, 0x1F19B00, 0x1F1AE0B, 0x1F1E600, 0x1F2010B, 0x1F21000, 0x1F21A0B, 0x1F21B00, 0x1F22F0B, 0x1F23000,
    0x1F2320B, 0x1F23B00, 0x1F23C0B, 0x1F24000, 0x1F2490B, 0x1F26000, 0x1F2660B, 0x1F32200, 0x1F3240B, 0x1F39400,
    0x1F3960B, 0x1F39800, 0x1F3990B, 0x1F39C00, 0x1F39E0B, 0x1F3F100, 0x1F3F30B, 0x1F3F600, 0x1F3F70B, 0x1F3FB03,
    0x1F4000B, 0x1F4FE00, 0x1F4FF0B, 0x1F53E00, 0x1F5490B, 0x1F54F00, 0x1F5500B, 0x1F56800, 0x1F56F0B, 0x1F57100,
    0x1F5730B, 0x1F57B00, 0x1F5870B, 0x1F58800, 0x1F58A0B, 0x1F58E00, 0x1F5900B, 0x1F59100, 0x1F5950B, 0x1F59700,
    0x1F5A40B, 0x1F5A600, 0x1F5A80B, 0x1F5A900, 0x1F5B10B, 0x1F5B300, 0x1F5BC0B, 0x1F5BD00, 0x1F5C20B, 0x1F5C500,
    0x1F5D10B, 0x1F5D400, 0x1F5DC0B, 0x1F5DF00, 0x1F5E10B, 0x1F5E200, 0x1F5E30B, 0x1F5E400, 0x1F5E80B, 0x1F5E900,
    0x1F5EF0B, 0x1F5F000, 0x1F5F30B, 0x1F5F400, 0x1F5FA0B, 0x1F65000, 0x1F6800B, 0x1F6C600, 0x1F6CB0B, 0x1F6D300,
    0x1F6D50B, 0x1F6E600, 0x1F6E90B, 0x1F6EA00, 0x1F6EB0B, 0x1F6F100, 0x1F6F30B, 0x1F70000, 0x1F7DA0B, 0x1F80000,
    0x1F80C0B, 0x1F81000, 0x1F8480B, 0x1F85000, 0x1F85A0B, 0x1F86000, 0x1F8880B, 0x1F89000, 0x1F8AE0B, 0x1F8B000,
    0x1F8BC0B, 0x1F8C000, 0x1F8C20B, 0x1F8D000, 0x1F8D90B, 0x1F90000, 0x1F90C0B, 0x1F93B00, 0x1F93C0B, 0x1F94600,
    0x1F9470B, 0x1FA0000, 0x1FA580B, 0x1FA6000, 0x1FA6E0B, 0x1FB0000, 0x1FC000B, 0x1FFFE00, 0xE000001, 0xE002003,
    0xE008001, 0xE010003, 0xE01F001, 0xE100000,
};
/* END GRAPHEMES */

static unsigned tfm__grapheme_class(uint32_t code_point) {
    size_t first = 0, n = sizeof tfm__grapheme_runs / sizeof tfm__grapheme_runs[0];
    uint32_t last_start = code_point << 8 | 0xFF;
    if (code_point < 0x80)
        return code_point < ' ' || code_point == 0x7F ? TFM__CLUSTER_CONTROL : TFM__CLUSTER_OTHER;
    while (n > 1) { /* the run is one of n from first on */
        size_t half = n / 2;
        if (tfm__grapheme_runs[first + half] <= last_start)
            first += half;
        n -= half;
    }
    return tfm__grapheme_runs[first] & 0xFF;
}

/* Whether two parts of Hangul belong to one syllable. `open`: the first is a vowel, or a syllable without a trail. */
static int tfm__hangul_joined(unsigned before, int open, unsigned after) {
    if (before == TFM__CLUSTER_LEAD)
        return after == TFM__CLUSTER_LEAD || after == TFM__CLUSTER_VOWEL || after == TFM__CLUSTER_SYLLABLE;
    if (after == TFM__CLUSTER_VOWEL)
        return open;
    return after == TFM__CLUSTER_TRAIL &&
           (before == TFM__CLUSTER_VOWEL || before == TFM__CLUSTER_TRAIL || before == TFM__CLUSTER_SYLLABLE);
}

/* The size of the first grapheme cluster of a text (size > 0). Of flags, which come in pairs, each is its own: that makes
   no difference to clusters of less than 6 bytes, nor to where others begin that have less. */
static size_t tfm__grapheme(const unsigned char *text, size_t size) {
    size_t end, used;
    uint32_t c;
    unsigned before, after;
    int picture, joiner = 0, conjunct; /* conjunct: 1 after a consonant, 2 after a linker, too */
    if (text[0] < 0x80 && (size == 1 || text[1] < 0x80))
        return text[0] == '\r' && size > 1 && text[1] == '\n' ? 2 : 1;
    c = tfm__utf8_decode(text, size, &end);
    before = tfm__grapheme_class(c);
    picture = before == TFM__CLUSTER_PICTURE;
    conjunct = before == TFM__CLUSTER_CONSONANT;
    for (; end < size && before != TFM__CLUSTER_CONTROL; end += used, before = after) {
        int open = before == TFM__CLUSTER_VOWEL || (before == TFM__CLUSTER_SYLLABLE && (c - 0xAC00) % 28 == 0);
        c = tfm__utf8_decode(text + end, size - end, &used);
        after = tfm__grapheme_class(c);
        if (after == TFM__CLUSTER_CONTROL ||
            !(before == TFM__CLUSTER_PREPEND || (after >= TFM__CLUSTER_EXTEND && after <= TFM__CLUSTER_SPACING) ||
              tfm__hangul_joined(before, open, after) || (after == TFM__CLUSTER_PICTURE && joiner) ||
              (after == TFM__CLUSTER_CONSONANT && conjunct == 2)))
            break;
        joiner = picture && c == 0x200D;
        picture =
            after == TFM__CLUSTER_PICTURE || (picture && after >= TFM__CLUSTER_EXTEND && after <= TFM__CLUSTER_LINKER);
        conjunct = after == TFM__CLUSTER_CONSONANT                        ? 1
                   : after == TFM__CLUSTER_LINKER && conjunct             ? 2
                   : after == TFM__CLUSTER_CONJUNCT_EXTEND || c == 0x200D ? conjunct
                                                                          : 0;
    }
    return end;
}

/* ---- SentencePiece: normalizing a text --------------------------------------------------------------------------- */

/* Normalized text: written to bytes, or only counted if that is NULL. */
typedef struct tfm__normalized {
    unsigned char *bytes;
    size_t size;
} tfm__normalized;

static void tfm__normalized_put(tfm__normalized *out, const void *bytes, size_t size) {
    if (out->bytes)
        memcpy(out->bytes + out->size, bytes, size);
    out->size += size;
}

/* One step through a text by sentencepiece's rules: the bytes that it takes, and what comes out for them. */
static size_t tfm__spm_step(const tfm__tokenizer *tokenizer, const unsigned char *text, size_t size,
                            const unsigned char **out, size_t *out_size) {
    size_t used = 1;
    *out = text;
    if (tokenizer->added_first[2][text[0]] && tfm__added_at(tokenizer, 2, text, size, &used) >= 0) {
        *out_size = used;
        return used;
    }
    *out = tfm__charsmap_find(&tokenizer->spm, text, size, 0, &used);
    if (*out) {
        *out_size = strlen((const char *)*out);
    } else if (tfm__utf8_decode(text, size, &used) == TFM__NOT_UTF8) {
        *out = (const unsigned char *)"\xEF\xBF\xBD"; /* U+FFFD */
        *out_size = 3;
    } else {
        *out = text;
        *out_size = used;
    }
    return used;
}

/* sentencepiece's rules. What is only counted may be a few bytes more than what is written. */
static void tfm__spm_normalize(const tfm__tokenizer *tokenizer, const unsigned char *text, size_t size,
                               tfm__normalized *out) {
    const tfm__spm_rules *rules = &tokenizer->source.rules;
    const char *space = rules->escape_whitespaces ? TFM__SPACE_PIECE : " ";
    size_t space_size = strlen(space), at = 0, used, n, i;
    const unsigned char *bytes;
    int after_space = rules->remove_extra_whitespaces;
    for (; at < size && rules->remove_extra_whitespaces; at += used) {
        used = tfm__spm_step(tokenizer, text + at, size - at, &bytes, &n);
        if (n != 1 || *bytes != ' ')
            break;
    }
    if (at == size)
        return;
    if (rules->add_dummy_prefix == 1)
        tfm__normalized_put(out, space, space_size);
    for (; at < size; at += used) {
        used = tfm__spm_step(tokenizer, text + at, size - at, &bytes, &n);
        for (; after_space && n > 0 && *bytes == ' '; n--)
            bytes++;
        for (i = 0; i < n; i++)
            tfm__normalized_put(out, bytes[i] == ' ' ? (const void *)space : bytes + i,
                                bytes[i] == ' ' ? space_size : 1);
        if (n > 0)
            after_space = rules->remove_extra_whitespaces && bytes[n - 1] == ' ';
    }
    while (rules->remove_extra_whitespaces && out->bytes && out->size >= space_size &&
           memcmp(out->bytes + out->size - space_size, space, space_size) == 0)
        out->size -= space_size;
    if (rules->add_dummy_prefix == 2)
        tfm__normalized_put(out, space, space_size);
}

/* What stands between the steps of Hugging Face's rules. */
typedef struct tfm__huggingface {
    const tfm__spm_rules *rules;
    tfm__normalized *out;
    size_t spaces; /* not yet put out */
    size_t kept;   /* size after the last character that is not white space */
    int begun;     /* whether there was one */
} tfm__huggingface;

static void tfm__huggingface_spaces(tfm__huggingface *h) {
    const char *space = h->rules->replace_spaces ? TFM__SPACE_PIECE : " ";
    if (h->spaces > 1 && h->rules->squeeze_spaces) {
        if (h->rules->squeeze_spaces == 2)
            space = TFM__SPACE_PIECE;
        h->spaces = 1;
    }
    for (; h->spaces > 0; h->spaces--)
        tfm__normalized_put(h->out, space, strlen(space));
}

/* Characters as the charsmap left them. */
static void tfm__huggingface_put(tfm__huggingface *h, const unsigned char *bytes, size_t size) {
    size_t i, used;
    for (i = 0; i < size; i += used) {
        int white = (tfm__class_at(bytes + i, size - i, &used) & TFM__SPACE) != 0;
        if (white && !h->begun && (h->rules->strip & 1))
            continue;
        h->begun |= !white;
        if (bytes[i] == ' ') {
            h->spaces++;
            continue;
        }
        tfm__huggingface_spaces(h);
        tfm__normalized_put(h->out, bytes + i, used);
        if (!white)
            h->kept = h->out->size;
    }
}

/* Hugging Face's rules. Its charsmap looks at the characters that people see: up to 5 bytes of them are replaced as one,
   by what the shortest beginning that has a rule becomes, whatever stands after that; else each by itself. */
static void tfm__huggingface_normalize(const tfm__tokenizer *tokenizer, const unsigned char *text, size_t size,
                                       tfm__normalized *out) {
    const tfm__spm *spm = &tokenizer->spm;
    tfm__huggingface h;
    size_t at = 0, end, cluster, used, rule;
    memset(&h, 0, sizeof h);
    h.rules = &tokenizer->source.rules;
    h.out = out;
    if (h.rules->prepend)
        tfm__normalized_put(out, TFM__SPACE_PIECE, 3);
    while (at < size) {
        const unsigned char *found = NULL;
        cluster = spm->n_units ? tfm__grapheme(text + at, size - at) : 1;
        end = at + cluster;
        if (spm->n_units && cluster < 6 && (found = tfm__charsmap_find(spm, text + at, cluster, 1, &rule)) != NULL) {
            tfm__huggingface_put(&h, found, strlen((const char *)found));
            at = end;
        }
        for (; at < end; at += used) {
            tfm__utf8_decode(text + at, size - at, &used);
            found = tfm__charsmap_find(spm, text + at, used, 1, &rule);
            tfm__huggingface_put(&h, found ? found : text + at, found ? strlen((const char *)found) : used);
        }
    }
    tfm__huggingface_spaces(&h);
    if ((h.rules->strip & 2) && out->bytes) /* what is only counted must hold what is put out before it is taken back */
        out->size = h.kept;
}

static void tfm__normalize(const tfm__tokenizer *tokenizer, const unsigned char *text, size_t size,
                           tfm__normalized *out) {
    if (tokenizer->source.rules.tokenizers)
        tfm__huggingface_normalize(tokenizer, text, size, out);
    else
        tfm__spm_normalize(tokenizer, text, size, out);
}

/* An added token, normalized as a text is; see tfm__kind_normalize(). */
static size_t tfm__spm_normalize_token(const tfm__tokenizer *tokenizer, const unsigned char *text, size_t size,
                                       unsigned char *bytes) {
    tfm__normalized out = {NULL, 0};
    tfm__normalize(tokenizer, text, size, &out);
    if (out.size > TFM__GROWTH * size)
        return SIZE_MAX;
    out.bytes = bytes;
    out.size = 0;
    tfm__normalize(tokenizer, text, size, &out);
    return out.size;
}

/* ---- SentencePiece: unigram -------------------------------------------------------------------------------------- */

/* Pieces are found by a binary search among `sorted`: all that a text begins with are beginnings of the last piece that
   is not behind the text in the order of bytes, and `parents` leads from that one to each of them. */

/* Where `sorted` has the pieces that begin with two bytes is in `starts`: one list for all pieces, and one for those that
   begin with "_" (most of them), by the two bytes after that. A piece that ends before counts as if zeros followed. */
#define TFM__MIN_STARTS 2048 /* with less pieces it is not worth the memory */
#define TFM__N_STARTS 65537

static size_t tfm__unigram_start(const unsigned char *text, size_t size) {
    return (size > 0 ? (size_t)text[0] << 8 : 0) | (size > 1 ? text[1] : 0);
}

/* The part of `sorted`, from *first to before *last, in which the place of a text is. */
static void tfm__unigram_range(const tfm__tokenizer *tokenizer, const unsigned char *text, size_t size, size_t *first,
                               size_t *last) {
    const uint32_t *starts = tokenizer->spm.starts;
    size_t space = tfm__space_piece(text, size);
    *first = 0;
    *last = tokenizer->source.n_sorted;
    if (!starts)
        return;
    starts += (space ? TFM__N_STARTS : 0) + tfm__unigram_start(text + space, size - space);
    *first = starts[0];
    *last = starts[1];
}

/* The longest piece that the text begins with, or -1. */
static int32_t tfm__unigram_longest(const tfm__tokenizer *tokenizer, const unsigned char *text, size_t size) {
    const int32_t *sorted = tokenizer->source.sorted;
    const unsigned char *piece;
    size_t first, last, piece_size, common = 0;
    int32_t id;
    tfm__unigram_range(tokenizer, text, size, &first, &last);
    while (first < last) { /* those before `first` are not behind the text */
        size_t middle = first + (last - first) / 2;
        int order;
        piece = tfm__token_bytes(tokenizer, sorted[middle], &piece_size);
        order = memcmp(piece, text, TFM__MIN(piece_size, size));
        if (order < 0 || (order == 0 && piece_size <= size))
            first = middle + 1;
        else
            last = middle;
    }
    if (first == 0)
        return -1;
    id = sorted[first - 1];
    piece = tfm__token_bytes(tokenizer, id, &piece_size);
    while (common < piece_size && common < size && piece[common] == text[common])
        common++;
    while (id >= 0 && piece_size > common) {
        id = tokenizer->spm.parents[id];
        tfm__token_bytes(tokenizer, id, &piece_size);
    }
    return id;
}

/* That `sorted` is in order; and `parents`: the pieces that a piece begins with are among those that the piece before it
   begins with, and that piece. */
static tfm_status tfm__unigram_build_parents(tfm__tokenizer *tokenizer, tfm_error *error) {
    const tfm__tokenizer_source *source = &tokenizer->source;
    int32_t *parents, before = -1;
    const unsigned char *bytes[2] = {NULL, NULL}; /* of this piece, and of the one before */
    size_t sizes[2] = {0, 0}, i;
    tfm_status status = tfm__check_ids(tokenizer, source->sorted, source->n_sorted, "sorted piece", error);
    if (status != TFM_OK)
        return status;
    parents = (int32_t *)tfm__tokenizer_allocate(&tokenizer->allocator, source->n_tokens * sizeof *parents, error);
    tokenizer->spm.parents = parents;
    if (!parents)
        return TFM_ERROR_MEMORY;
    for (i = 0; i < source->n_sorted; i++) {
        int32_t id = source->sorted[i];
        int order = -1;
        bytes[0] = tfm__token_bytes(tokenizer, id, &sizes[0]);
        if (before >= 0) {
            bytes[1] = tfm__token_bytes(tokenizer, before, &sizes[1]);
            order = memcmp(bytes[1], bytes[0], TFM__MIN(sizes[0], sizes[1]));
        }
        if (order > 0 || (order == 0 && sizes[1] >= sizes[0]) || sizes[0] == 0 || sizes[0] > TFM__MAX_PIECE_SIZE)
            return tfm__fail(error, TFM_ERROR_FORMAT,
                             "tokenizer: sorted piece %zu, token %ld, is empty, too long or out of order", i, (long)id);
        while (before >= 0 && (sizes[1] > sizes[0] || memcmp(bytes[1], bytes[0], sizes[1]) != 0)) {
            before = parents[before];
            bytes[1] = tfm__token_bytes(tokenizer, before, &sizes[1]);
        }
        parents[id] = before;
        before = id;
    }
    return TFM_OK;
}

static tfm_status tfm__unigram_build_starts(tfm__tokenizer *tokenizer, tfm_error *error) {
    const tfm__tokenizer_source *source = &tokenizer->source;
    size_t i, next[2] = {0, 0}, list, size;
    uint32_t *starts;
    if (source->n_sorted < TFM__MIN_STARTS)
        return TFM_OK;
    starts = (uint32_t *)tfm__tokenizer_allocate(&tokenizer->allocator, 2 * TFM__N_STARTS * sizeof *starts, error);
    tokenizer->spm.starts = starts;
    if (!starts)
        return TFM_ERROR_MEMORY;
    for (i = 0; i <= source->n_sorted; i++) { /* fills each list up to what its next piece begins with */
        const unsigned char *piece = NULL;
        size_t space = 0;
        if (i < source->n_sorted) {
            piece = tfm__token_bytes(tokenizer, source->sorted[i], &size);
            space = tfm__space_piece(piece, size);
        }
        for (list = 0; list < 2; list++) {
            size_t skip = list ? 3 : 0, end = piece ? 0 : TFM__N_STARTS;
            if (piece && (list == 0 || space))
                end = tfm__unigram_start(piece + skip, size - skip) + 1;
            else if (piece && memcmp(piece, TFM__SPACE_PIECE, TFM__MIN(size, 3)) > 0)
                end = TFM__N_STARTS; /* behind all that begin with "_" */
            while (next[list] < end)
                starts[list * TFM__N_STARTS + next[list]++] = (uint32_t)i;
        }
    }
    return TFM_OK;
}

static tfm_status tfm__unigram_build(tfm__tokenizer *tokenizer, tfm_error *error) {
    const tfm__tokenizer_source *source = &tokenizer->source;
    double lowest = source->double_scores ? HUGE_VAL : FLT_MAX;
    tfm_status status = tfm__unigram_build_parents(tokenizer, error);
    size_t i;
    if (status == TFM_OK)
        status = tfm__unigram_build_starts(tokenizer, error);
    if (status != TFM_OK)
        return status;
    for (i = 0; i < source->n_sorted; i++) {
        int32_t id = source->sorted[i];
        double score = source->double_scores ? source->double_scores[id] : source->scores[id];
        if (!source->rules.tokenizers && source->types[id] != TFM__PIECE_NORMAL)
            continue;
        lowest = TFM__MIN(lowest, score);
    }
    lowest -= TFM__UNKNOWN_PENALTY;
    tokenizer->spm.unk_score = source->double_scores ? lowest : (double)(float)lowest;
    return TFM_OK;
}

/* The best way to cut the text before a place into pieces: its score, and the last piece. */
typedef struct tfm__unigram_node {
    double score;
    uint32_t start; /* where that piece begins; TFM__NONE: there is no way yet */
    int32_t id;
} tfm__unigram_node;

static void tfm__unigram_offer(tfm__unigram_node *node, double score, size_t start, int32_t id, int as_float) {
    score = as_float ? (float)score : score;
    if (node->start == TFM__NONE || score > node->score) {
        node->score = score;
        node->start = (uint32_t)start;
        node->id = id;
    }
}

static double tfm__unigram_score(const tfm__tokenizer *tokenizer, int32_t id, size_t size) {
    if (tokenizer->source.double_scores)
        return tokenizer->source.double_scores[id];
    if (tokenizer->source.types[id] == TFM__PIECE_USER) /* higher than any other, in general: those are logarithms */
        return (float)(0.1 * (double)(size - 1));
    return tokenizer->source.scores[id];
}

/* The best way through the whole text (Viterbi's algorithm), in nodes[size + 1]: there, afterwards, each piece's node is
   at its end and has the end of the next one as its start; returns the end of the first. Of two ways with the same score
   the one that was found first stays, as in both libraries. */
static size_t tfm__unigram_viterbi(const tfm__tokenizer *tokenizer, const unsigned char *text, size_t size,
                                   tfm__unigram_node *nodes) {
    const int as_float = !tokenizer->source.double_scores;
    size_t at, used, end, next = 0;
    for (at = 0; at <= size; at++)
        nodes[at].start = TFM__NONE;
    nodes[0].score = 0;
    for (at = 0; at < size; at += used) {
        double score = nodes[at].score;
        int32_t id = tfm__unigram_longest(tokenizer, text + at, size - at);
        int known = 0; /* whether the first character is a piece */
        tfm__utf8_decode(text + at, size - at, &used);
        for (; id >= 0; id = tokenizer->spm.parents[id]) {
            size_t piece_size;
            tfm__token_bytes(tokenizer, id, &piece_size);
            tfm__unigram_offer(nodes + at + piece_size, score + tfm__unigram_score(tokenizer, id, piece_size), at, id,
                               as_float);
            known |= piece_size == used;
        }
        if (!known)
            tfm__unigram_offer(nodes + at + used, score + tokenizer->spm.unk_score, at, tokenizer->source.unk_id,
                               as_float);
    }
    for (end = size; end > 0; end = at) {
        at = nodes[end].start;
        nodes[end].start = (uint32_t)next;
        next = end;
    }
    return next;
}

/* ---- SentencePiece: encoding ------------------------------------------------------------------------------------- */

/* The ids of a stretch of text (size > 0) without pieces. */
static void tfm__spm_emit_unknown(tfm__encoder *encoder, const unsigned char *text, size_t size) {
    const tfm__tokenizer *tokenizer = encoder->tokenizer;
    const tfm__spm_rules *rules = &tokenizer->source.rules;
    size_t unknown_size, i;
    const unsigned char *unknown = tfm__token_bytes(tokenizer, tokenizer->source.unk_id, &unknown_size);
    int spelled = rules->tokenizers && size == unknown_size && memcmp(text, unknown, size) == 0; /* "<unk>" */
    if (!rules->byte_fallback || spelled)
        tfm__emit(encoder, tokenizer->source.unk_id);
    else
        for (i = 0; i < size; i++)
            tfm__emit(encoder, tokenizer->spm.byte_ids[text[i]]);
}

static void tfm__unigram_encode(tfm__encoder *encoder, const unsigned char *text, size_t size,
                                tfm__unigram_node *nodes) {
    const tfm__tokenizer *tokenizer = encoder->tokenizer;
    size_t known = 0, start = 0, end; /* what is between `known` and `start` is unknown */
    for (end = tfm__unigram_viterbi(tokenizer, text, size, nodes); end > 0; end = nodes[end].start) {
        if (nodes[end].id != tokenizer->source.unk_id) {
            if (start > known)
                tfm__spm_emit_unknown(encoder, text + known, start - known);
            tfm__emit(encoder, nodes[end].id);
            known = end;
        }
        start = end;
    }
    if (start > known)
        tfm__spm_emit_unknown(encoder, text + known, start - known);
}

/* The symbols that BPE begins with: user-defined pieces, which are never joined to others, and characters. Where pieces
   are joined by merges, ids are those of the pieces; a character without one becomes symbols of its bytes, or part of an
   unknown symbol. */
static void tfm__spm_symbols(const tfm__tokenizer *tokenizer, tfm__merge_state *state, const unsigned char *text,
                             size_t size) {
    size_t at, used, unknown = SIZE_MAX, i; /* where the unknown symbol before this place begins */
    for (at = 0; at < size; at += used) {
        uint32_t id = TFM__NONE;
        state->ids[at] = TFM__NONE;
        if (state->text && tokenizer->added_first[2][text[at]] &&
            tfm__added_at(tokenizer, 2, text + at, size - at, &used) >= 0) {
            state->ids[at] = TFM__FROZEN;
        } else {
            tfm__utf8_decode(text + at, size - at, &used);
            id = state->text ? TFM__NONE : tfm__find_word(tokenizer, text + at, used);
        }
        state->lengths[at] = state->lengths[at + used - 1] = (uint32_t)used;
        if (state->text)
            continue;
        if (id != TFM__NONE) {
            state->ids[at] = id;
            unknown = SIZE_MAX;
        } else if (tokenizer->source.rules.byte_fallback) {
            for (i = at; i < at + used; i++) {
                state->ids[i] = (uint32_t)tokenizer->spm.byte_ids[text[i]];
                state->lengths[i] = 1;
            }
        } else {
            unknown = unknown == SIZE_MAX || !tokenizer->source.fuse_unk ? at : unknown;
            state->ids[unknown] = (uint32_t)tokenizer->source.unk_id;
            state->lengths[unknown] = state->lengths[at + used - 1] = (uint32_t)(at + used - unknown);
        }
    }
}

/* The ids of symbols that were joined by scores. A piece that is not used comes apart into the two that it was made of,
   and these perhaps again. */
static void tfm__spm_emit_symbols(tfm__encoder *encoder, tfm__merge_state *state, size_t size) {
    const tfm__tokenizer *tokenizer = encoder->tokenizer;
    size_t at = 0, known = 0;
    while (at < size) {
        uint32_t id = tfm__find_word(tokenizer, state->text + at, state->lengths[at]);
        if (id != TFM__NONE && tokenizer->source.types[id] == TFM__PIECE_UNUSED && state->splits[id] > 0 &&
            state->splits[id] < state->lengths[at]) {
            state->lengths[at + state->splits[id]] = state->lengths[at] - state->splits[id];
            state->lengths[at] = state->splits[id];
            continue;
        }
        if (id != TFM__NONE) {
            if (at > known)
                tfm__spm_emit_unknown(encoder, state->text + known, at - known);
            tfm__emit(encoder, (int32_t)id);
            known = at + state->lengths[at];
        }
        at += state->lengths[at];
    }
    if (size > known)
        tfm__spm_emit_unknown(encoder, state->text + known, size - known);
}

static void tfm__spm_bpe_encode(tfm__encoder *encoder, const unsigned char *text, size_t size, uint32_t *memory) {
    const tfm__tokenizer *tokenizer = encoder->tokenizer;
    tfm__merge_state state;
    size_t words = tfm__merge_layout(&state, size, memory), i;
    if (!tokenizer->source.n_merges) {
        state.text = text;
        state.splits = memory + words;
        if (tokenizer->spm.has_unused)
            memset(state.splits, 0, tokenizer->source.n_tokens * sizeof *state.splits);
    }
    tfm__spm_symbols(tokenizer, &state, text, size);
    tfm__merge(tokenizer, &state, size);
    if (state.text)
        tfm__spm_emit_symbols(encoder, &state, size);
    else
        for (i = 0; i < size; i += state.lengths[i])
            tfm__emit(encoder, (int32_t)state.ids[i]);
}

/* Words of memory for `size` bytes of normalized text. */
static size_t tfm__spm_words(const tfm__tokenizer *tokenizer, size_t size) {
    tfm__merge_state state;
    if (tokenizer->source.kind == TFM__UNIGRAM) /* two more: nodes are aligned to doubles */
        return (size + 1) * (sizeof(tfm__unigram_node) / sizeof(uint32_t)) + 2;
    return tfm__merge_layout(&state, size, NULL) + (tokenizer->spm.has_unused ? tokenizer->source.n_tokens : 0);
}

/* Encodes a stretch of normalized text, with spaces written as "_", and with `lead` one more in front. */
static tfm_status tfm__spm_encode_stretch(tfm__encoder *encoder, const unsigned char *text, size_t size, int lead) {
    const tfm__tokenizer *tokenizer = encoder->tokenizer;
    size_t n = size + (lead ? 3u : 0u), text_words, i;
    uint32_t *memory;
    for (i = 0; i < size && tokenizer->source.rules.metaspace; i++)
        n += text[i] == ' ' ? 2 : 0;
    if (n >= UINT32_MAX || n > SIZE_MAX / 64)
        return tfm__fail(encoder->error, TFM_ERROR_ARGUMENT, "tokenizer: a text of %zu bytes is too long", size);
    if (n == 0)
        return TFM_OK;
    text_words = n == size ? 0 : n / sizeof(uint32_t) + 1;
    if (tfm__encoder_reserve(encoder, text_words + tfm__spm_words(tokenizer, n)) != TFM_OK)
        return TFM_ERROR_MEMORY;
    memory = encoder->memory + text_words;
    if (text_words) {
        tfm__normalized out;
        out.bytes = (unsigned char *)encoder->memory;
        out.size = 0;
        if (lead)
            tfm__normalized_put(&out, TFM__SPACE_PIECE, 3);
        for (i = 0; i < size; i++)
            tfm__normalized_put(&out, text[i] == ' ' ? (const void *)TFM__SPACE_PIECE : text + i,
                                text[i] == ' ' ? 3 : 1);
        text = out.bytes;
    }
    if (tokenizer->source.kind == TFM__UNIGRAM) {
        uintptr_t misaligned = (uintptr_t)memory % sizeof(double);
        tfm__unigram_encode(encoder, text, n,
                            (tfm__unigram_node *)(void *)((char *)memory + (misaligned ? 8 - misaligned : 0)));
    } else {
        tfm__spm_bpe_encode(encoder, text, n, memory);
    }
    return TFM_OK;
}

/* Hugging Face's Metaspace on a stretch of normalized text (size > 0). */
static tfm_status tfm__metaspace_encode(tfm__encoder *encoder, const unsigned char *text, size_t size, int first) {
    const tfm__spm_rules *rules = &encoder->tokenizer->source.rules;
    int lead = text[0] != ' ' && !tfm__space_piece(text, size) &&
               (rules->metaspace == TFM__METASPACE_ALWAYS || (rules->metaspace == TFM__METASPACE_FIRST && first));
    tfm_status status = TFM_OK;
    size_t end;
    if (!rules->split_words)
        return tfm__spm_encode_stretch(encoder, text, size, lead);
    for (; size > 0 && status == TFM_OK; text += end, size -= end, lead = 0) {
        for (end = 1; end < size && text[end] != ' ' && !tfm__space_piece(text + end, size - end); end++)
            ;
        status = tfm__spm_encode_stretch(encoder, text, end, lead);
    }
    return status;
}

/* Encodes normalized text (size > 0) without added tokens. */
static tfm_status tfm__spm_encode_plain(tfm__encoder *encoder, const unsigned char *text, size_t size) {
    const tfm__spm_rules *rules = &encoder->tokenizer->source.rules;
    tfm_status status = TFM_OK;
    size_t at = 0, used;
    if (!rules->metaspace)
        return tfm__spm_encode_stretch(encoder, text, size, 0);
    if (!rules->split_whitespace)
        return tfm__metaspace_encode(encoder, text, size, encoder->at_start && text == encoder->normalized);
    while (at < size && status == TFM_OK) {
        size_t start = at;
        while (at < size && !(tfm__class_at(text + at, size - at, &used) & TFM__SPACE))
            at += used;
        if (at > start)
            status = tfm__metaspace_encode(encoder, text + start, at - start,
                                           encoder->at_start && text + start == encoder->normalized);
        else
            at += used;
    }
    return status;
}

static tfm_status tfm__spm_check(tfm__tokenizer *tokenizer, tfm_error *error) {
    tfm_status status = tfm__spm_check_pieces(tokenizer, error);
    return status == TFM_OK ? tfm__spm_check_charsmap(tokenizer, error) : status;
}

static tfm_status tfm__spm_build(tfm__tokenizer *tokenizer, tfm_error *error) {
    const tfm__tokenizer_source *source = &tokenizer->source;
    tfm_status status = tfm__spm_build_texts(tokenizer, error);
    if (status == TFM_OK && source->kind == TFM__UNIGRAM)
        return tfm__unigram_build(tokenizer, error);
    if (status == TFM_OK)
        status = tfm__build_words(tokenizer, 0, error);
    return status == TFM_OK && source->n_merges ? tfm__bpe_build_merges(tokenizer, error) : status;
}

/* Bytes of scratch memory with which a usual text of this size is encoded without an allocation: one that normalizing
   makes no more than half as long again. */
static size_t tfm__spm_scratch(const tfm__tokenizer *tokenizer, size_t size) {
    size_t node = tokenizer->source.kind == TFM__UNIGRAM ? sizeof(tfm__unigram_node) : 13;
    size_t unused = tokenizer->spm.has_unused ? tokenizer->source.n_tokens * sizeof(uint32_t) : 0;
    return tfm__product(size + size / 2 + 100, node + 2) + unused;
}

/* ---- SentencePiece: decoding ------------------------------------------------------------------------------------- */

/* The text of a token; NULL if there is none. */
static const unsigned char *tfm__token_text(const tfm__tokenizer *tokenizer, int32_t id, size_t *size) {
    const tfm__spm *spm = &tokenizer->spm;
    const unsigned char *bytes = tfm__token_bytes(tokenizer, id, size);
    if (!bytes || !spm->texts)
        return bytes;
    *size = spm->text_offsets[id + 1] - spm->text_offsets[id];
    return spm->texts + spm->text_offsets[id];
}

/* How far a text is decoded. */
typedef struct tfm__decoder {
    size_t n_ids;
    size_t size; /* bytes of text */
    int dropped; /* SentencePiece: the space that was put in front of the text has been left out */
} tfm__decoder;

/* What of a token's text is shown: not all of the spaces that were put in front of a text, and nothing of a control
   piece. What is unknown keeps the spaces that sentencepiece writes around it. */
static const unsigned char *tfm__spm_decode(const tfm__tokenizer *tokenizer, int32_t id, tfm__decoder *decoder,
                                            size_t *size) {
    const tfm__decode_lead lead = tokenizer->source.rules.decode_lead;
    const unsigned char *text = tfm__token_text(tokenizer, id, size);
    int32_t type = tokenizer->source.types[id];
    if (type == TFM__PIECE_CONTROL)
        *size = 0;
    if (id == tokenizer->source.unk_id && tokenizer->source.unk_surface) {
        *size = tokenizer->source.unk_surface_size;
        return tokenizer->source.unk_surface;
    }
    if (decoder->size > 0 || decoder->dropped || *size == 0 || type == TFM__PIECE_BYTE)
        return text;
    if (lead == TFM__LEAD_TOKEN && decoder->n_ids == 0) {
        for (; *size > 0 && *text == ' '; text++)
            --*size;
    } else if ((lead == TFM__LEAD_DROPPED || lead == TFM__LEADS_DROPPED) && *text == ' ') {
        decoder->dropped = lead == TFM__LEAD_DROPPED;
        text++;
        --*size;
    }
    return text;
}

/* ---- The kinds of tokenizers ------------------------------------------------------------------------------------- */

/* What can be checked, and is needed, before the added tokens are looked at. */
static tfm_status tfm__kind_check(tfm__tokenizer *tokenizer, tfm_error *error) {
    return tokenizer->source.types ? tfm__spm_check(tokenizer, error) : TFM_OK;
}

/* The tables that only this kind has. */
static tfm_status tfm__kind_build(tfm__tokenizer *tokenizer, tfm_error *error) {
    switch (tokenizer->source.kind) {
    case TFM__BYTE_BPE: return tfm__bpe_build(tokenizer, error);
    case TFM__WORDPIECE: return tfm__wordpiece_build(tokenizer, error);
    case TFM__UNIGRAM:
    case TFM__SPM_BPE: return tfm__spm_build(tokenizer, error);
    }
    return TFM_OK;
}

/* Whether text is normalized before it is encoded. */
static int tfm__kind_normalizes(const tfm__tokenizer *tokenizer) {
    return tokenizer->source.kind != TFM__BYTE_BPE || tokenizer->source.nfc;
}

/* Normalizes text; returns the size of what was written, at most TFM__GROWTH * size. (Where SentencePiece makes it longer
   than that, nothing is written.) */
static size_t tfm__kind_normalize(const tfm__tokenizer *tokenizer, const unsigned char *text, size_t size,
                                  unsigned char *out) {
    switch (tokenizer->source.kind) {
    case TFM__BYTE_BPE: return tfm__nfc(text, size, out);
    case TFM__WORDPIECE: return tfm__bert_normalize(&tokenizer->source, text, size, out);
    case TFM__UNIGRAM:
    case TFM__SPM_BPE: return tfm__spm_normalize_token(tokenizer, text, size, out);
    }
    memcpy(out, text, size);
    return size;
}

/* Encodes text (size > 0) without added tokens; normalized text lies in the encoder's memory. */
static tfm_status tfm__kind_encode(tfm__encoder *encoder, const unsigned char *text, size_t size) {
    switch (encoder->tokenizer->source.kind) {
    case TFM__BYTE_BPE: return tfm__bpe_encode_plain(encoder, text, size);
    case TFM__WORDPIECE: tfm__wordpiece_encode_plain(encoder, text, size); break;
    case TFM__UNIGRAM:
    case TFM__SPM_BPE: return tfm__spm_encode_plain(encoder, text, size);
    }
    return TFM_OK;
}

/* Bytes of scratch memory with which the encoding of `size` bytes of text allocates nothing. */
static size_t tfm__kind_scratch(const tfm__tokenizer *tokenizer, size_t size) {
    switch (tokenizer->source.kind) {
    case TFM__BYTE_BPE: /* a text without a place to cut; its composed form is hardly ever longer */
        return tfm__product(size + 100, tokenizer->source.nfc ? 17 : 13);
    case TFM__WORDPIECE: return tfm__product(size + 1, TFM__GROWTH);
    case TFM__UNIGRAM:
    case TFM__SPM_BPE: return tfm__spm_scratch(tokenizer, size);
    }
    return 0;
}

#define TFM__MAX_PIECE_TEXT (TFM__GROWTH * TFM__MAX_ADDED_SIZE + 1) /* normalized, and a space */

/* The text of a token (one that there is) as the next of a decoded text: in place, or in `memory`, TFM__MAX_PIECE_TEXT
   bytes. */
static const unsigned char *tfm__kind_decode(const tfm__tokenizer *tokenizer, int32_t id, tfm__decoder *decoder,
                                             unsigned char *memory, size_t *size) {
    switch (tokenizer->source.kind) {
    case TFM__BYTE_BPE: break;
    case TFM__WORDPIECE: *size = tfm__wordpiece_decode(tokenizer, id, decoder->n_ids == 0, memory); return memory;
    case TFM__UNIGRAM:
    case TFM__SPM_BPE: return tfm__spm_decode(tokenizer, id, decoder, size);
    }
    return tfm__token_bytes(tokenizer, id, size);
}

/* ---- Added tokens, and a whole text ---------------------------------------------------------------------------------- */

/* The first added token from *start on, and where it starts and ends. */
static int32_t tfm__find_added(const tfm__tokenizer *tokenizer, unsigned root, const unsigned char *text, size_t size,
                               size_t *start, size_t *end) {
    const unsigned char *first = tokenizer->added_first[root];
    size_t i, token_size;
    for (i = tokenizer->n_added[root] ? *start : size; i < size; i++) {
        int32_t found = first[text[i]] ? tfm__added_at(tokenizer, root, text + i, size - i, &token_size) : -1;
        if (found >= 0) {
            *start = i;
            *end = i + token_size;
            return found;
        }
    }
    return -1;
}

/* Whether a word's character stands before or after text[start .. end). */
static int tfm__touches_word(const unsigned char *text, size_t size, size_t start, size_t end) {
    size_t used;
    return (start > 0 && (tfm__class_before(text, start, &used) & TFM__WORD)) ||
           (end < size && (tfm__class_at(text + end, size - end, &used) & TFM__WORD));
}

static tfm_status tfm__encode_rest(tfm__encoder *encoder, unsigned root, const unsigned char *text, size_t size);

/* Encodes text (size > 0) in which the added tokens of the tries before `root` have been found already. As in Hugging
   Face's tokenizers, an added token that is found and not wanted (a special one in plain text, or a single_word within
   a word) still hides those that overlap it. */
static tfm_status tfm__encode_text(tfm__encoder *encoder, unsigned root, const unsigned char *text, size_t size) {
    const tfm__tokenizer *tokenizer = encoder->tokenizer;
    size_t done = 0;     /* the ids of the text before this place are out */
    size_t stripped = 0; /* where the white space ends that the last rstrip took */
    size_t start = 0, end = 0, used;
    tfm_status status = TFM_OK;
    int32_t id;
    for (; (id = tfm__find_added(tokenizer, root, text, size, &start, &end)) >= 0; start = end) {
        unsigned flags = tokenizer->token_flags[id];
        size_t token_end = end;
        if (((flags & TFM__ADDED_SPECIAL) && !(encoder->flags & TFM_TOKENIZE_SPECIAL)) ||
            ((flags & TFM__ADDED_SINGLE_WORD) && tfm__touches_word(text, size, start, end)))
            continue;
        if (flags & TFM__ADDED_LSTRIP) {
            start = start > done ? start : done;
            while (start > done && (tfm__class_before(text, start, &used) & TFM__SPACE))
                start -= used;
        }
        if (flags & TFM__ADDED_RSTRIP) {
            stripped = stripped > end ? stripped : end;
            while (stripped < size && (tfm__class_at(text + stripped, size - stripped, &used) & TFM__SPACE))
                stripped += used;
            token_end = stripped;
        }
        if (start > done) {
            status = tfm__encode_rest(encoder, root, text + done, start - done);
            if (status != TFM_OK)
                return status;
        }
        if (start < token_end) /* else an rstrip before has taken all of it, as white space */
            tfm__emit(encoder, id);
        done = token_end;
    }
    return done < size ? tfm__encode_rest(encoder, root, text + done, size - done) : TFM_OK;
}

/* How much of a text is normalized at once: all of it if it is not longer than `usual`, or if tokens are looked for in
   what comes of it; else up to white space that separates words whatever the tokenizer does. */
static size_t tfm__normalized_piece(const tfm__tokenizer *tokenizer, const unsigned char *text, size_t size,
                                    size_t usual) {
    size_t end;
    if (size <= usual || tokenizer->n_added[1] > 0)
        return size;
    for (end = usual; end > 0; end--)
        if (text[end - 1] == ' ' || text[end - 1] == '\n')
            return end;
    for (end = usual; end < size && text[end] != ' ' && text[end] != '\n'; end++)
        ;
    return end;
}

/* Normalizes all of a text, as byte-level BPE and SentencePiece need it; without room for it (out->bytes NULL), only says
   how much is enough. */
static void tfm__normalize_whole(const tfm__tokenizer *tokenizer, const unsigned char *text, size_t size,
                                 tfm__normalized *out) {
    if (tokenizer->source.kind == TFM__BYTE_BPE)
        out->size = out->bytes ? tfm__nfc(text, size, out->bytes) : TFM__GROWTH * size;
    else
        tfm__normalize(tokenizer, text, size, out);
}

/* Normalizes all of a text (size > 0), and encodes it from the second trie on. The normalized text is in
   the encoder's memory if that has room for it, ahead of the memory for the rest, else in memory of its own. */
static tfm_status tfm__encode_whole(tfm__encoder *encoder, const unsigned char *text, size_t size) {
    const tfm_allocator *allocator = &encoder->tokenizer->allocator;
    tfm__normalized out = {NULL, 0};
    tfm_status status = TFM_OK;
    uint32_t *memory = encoder->memory;
    size_t all_words = encoder->n_words, n_words;
    void *own = NULL;
    tfm__normalize_whole(encoder->tokenizer, text, size, &out);
    n_words = out.size / sizeof(uint32_t) + 1;
    if (!encoder->own && n_words <= encoder->n_words) {
        out.bytes = (unsigned char *)encoder->memory;
        encoder->memory += n_words;
        encoder->n_words -= n_words;
    } else {
        own = tfm__tokenizer_allocate(allocator, n_words * sizeof(uint32_t), encoder->error);
        if (!own)
            return TFM_ERROR_MEMORY;
        out.bytes = (unsigned char *)own;
    }
    out.size = 0;
    tfm__normalize_whole(encoder->tokenizer, text, size, &out);
    encoder->normalized = out.bytes;
    encoder->at_start = text == encoder->text;
    if (out.size > 0)
        status = tfm__encode_text(encoder, 1, out.bytes, out.size);
    encoder->normalized = NULL;
    if (own)
        allocator->release(allocator->user, own);
    else if (!encoder->own) {
        encoder->memory = memory;
        encoder->n_words = all_words;
    }
    return status;
}

/* Normalizes text in the encoder's memory, and encodes it from there. */
static tfm_status tfm__encode_normalized(tfm__encoder *encoder, const unsigned char *text, size_t size) {
    const tfm__tokenizer *tokenizer = encoder->tokenizer;
    tfm_status status = TFM_OK;
    while (size > 0 && status == TFM_OK) {
        size_t usual = encoder->n_words * sizeof *encoder->memory / TFM__GROWTH;
        size_t piece = tfm__normalized_piece(tokenizer, text, size, usual), n;
        if (piece > SIZE_MAX / TFM__GROWTH - 64)
            return tfm__fail(encoder->error, TFM_ERROR_ARGUMENT, "tokenizer: a text of %zu bytes is too long", size);
        status = tfm__encoder_reserve(encoder, piece * TFM__GROWTH / sizeof *encoder->memory + 1);
        if (status != TFM_OK)
            return status;
        n = tfm__kind_normalize(tokenizer, text, piece, (unsigned char *)encoder->memory);
        if (n > 0)
            status = tfm__encode_text(encoder, 1, (const unsigned char *)encoder->memory, n);
        text += piece;
        size -= piece;
    }
    return status;
}

/* What comes after looking for the added tokens of trie `root`: normalization after the first, words after the second. */
static tfm_status tfm__encode_rest(tfm__encoder *encoder, unsigned root, const unsigned char *text, size_t size) {
    if (root == 1)
        return tfm__kind_encode(encoder, text, size);
    if (encoder->tokenizer->source.types ||
        (encoder->tokenizer->source.nfc && !tfm__is_plainly_nfc(text, size) && size < SIZE_MAX / 4))
        return tfm__encode_whole(encoder, text, size);
    if (encoder->tokenizer->source.kind == TFM__BYTE_BPE)
        return tfm__encode_text(encoder, 1, text, size);
    return tfm__kind_normalizes(encoder->tokenizer) ? tfm__encode_normalized(encoder, text, size)
                                                    : tfm__encode_text(encoder, 1, text, size);
}

/* Begins a call: the tokenizer, flags, ids, types, capacity and error of the encoder are set, all else is 0. `stack` is
   the caller's, TFM__MERGE_STACK words; the scratch memory (may be NULL) is used instead if it is larger (it is aligned
   as a uint32_t is; tfm__kind_scratch says how much is enough), and if both are too small, memory from the allocator. */
static void tfm__encode_begin(tfm__encoder *encoder, uint32_t *stack, void *scratch, size_t scratch_size) {
    encoder->capacity = encoder->ids ? encoder->capacity : 0;
    encoder->memory = stack;
    encoder->n_words = TFM__MERGE_STACK;
    if (scratch && scratch_size / sizeof *encoder->memory > encoder->n_words) {
        encoder->memory = (uint32_t *)scratch;
        encoder->n_words = scratch_size / sizeof *encoder->memory;
    }
}

/* Puts out ids that the tokenizer itself adds. */
static void tfm__encode_ids(tfm__encoder *encoder, const int32_t *ids, size_t n) {
    size_t i;
    for (i = 0; i < n && !(encoder->flags & TFM_TOKENIZE_PLAIN); i++)
        tfm__emit(encoder, ids[i]);
}

/* The ids of a text, or of two if b is not NULL, in the caller's `ids`. *n_ids is how many there are, even if that is
   more than the capacity. flags: TFM_TOKENIZE_SPECIAL, TFM_TOKENIZE_PLAIN. */
static tfm_status tfm__encode(tfm__encoder *encoder, const char *a, size_t a_size, const char *b, size_t b_size,
                              size_t *n_ids) {
    const tfm__tokenizer *tokenizer = encoder->tokenizer;
    const tfm__tokenizer_source *source = &tokenizer->source;
    tfm_status status = TFM_OK;
    tfm__encode_ids(encoder, source->prefix_ids, source->n_prefix);
    encoder->text = (const unsigned char *)a;
    if (a_size > 0)
        status = tfm__encode_text(encoder, 0, (const unsigned char *)a, a_size);
    if (b) {
        tfm__encode_ids(encoder, source->pair_ids, source->n_pair);
        encoder->type = source->pair_type;
        encoder->text = (const unsigned char *)b;
        if (b_size > 0 && status == TFM_OK)
            status = tfm__encode_text(encoder, 0, (const unsigned char *)b, b_size);
    }
    tfm__encode_ids(encoder, source->suffix_ids, source->n_suffix);
    if (encoder->own)
        tokenizer->allocator.release(tokenizer->allocator.user, encoder->own);
    *n_ids = encoder->n_ids;
    return status;
}

/* Checks the tables of a model file and builds a tokenizer on them. On an error there is nothing to free. */
static tfm_status tfm__tokenizer_build(tfm__tokenizer *tokenizer, const tfm__tokenizer_source *source,
                                       const tfm_allocator *allocator, tfm_error *error) {
    tfm_status status;
    memset(tokenizer, 0, sizeof *tokenizer);
    tokenizer->source = *source;
    tokenizer->allocator = *allocator;
    status = tfm__build_tokens(tokenizer, error);
    if (status == TFM_OK)
        status = tfm__check_ids(tokenizer, source->prefix_ids, source->n_prefix, "prefix id", error);
    if (status == TFM_OK)
        status = tfm__check_ids(tokenizer, source->suffix_ids, source->n_suffix, "suffix id", error);
    if (status == TFM_OK)
        status = tfm__check_ids(tokenizer, source->pair_ids, source->n_pair, "pair id", error);
    if (status == TFM_OK)
        status = tfm__check_ids(tokenizer, &source->unk_id, source->unk_id != -1, "unknown token's id", error);
    if (status == TFM_OK)
        status = tfm__kind_check(tokenizer, error);
    if (status == TFM_OK)
        status = tfm__build_added(tokenizer, error);
    if (status == TFM_OK)
        status = tfm__kind_build(tokenizer, error);
    if (status != TFM_OK)
        tfm__tokenizer_free(tokenizer);
    return status;
}

/* =====================================================================================================================
 * g. THE MODEL: description + weights -> a Transformer that runs
 * ================================================================================================================== */

/* A stack with its weights. */
typedef struct tfm__stack {
    const tfm_stack *shape;        /* in the description */
    tfm_tensor position_embedding; /* [n_positions + position_offset, d_embedding], for learned positions */
    tfm_norm embedding_norm;       /* [d_embedding] */
    tfm_block *blocks;             /* [n_layers] */
    tfm_norm final_norm;
} tfm__stack;

struct tfm_model {
    tfm_allocator allocator;
    long process; /* that loaded it: a child of it treats OpenMP with care (tfm__threads) */
    tfm_file *file;
    tfm_description description;
    tfm_tensor token_embedding;      /* [vocab_size, d_embedding] */
    tfm_tensor token_type_embedding; /* [n_token_types, d_embedding] */
    tfm_linear embedding_projection; /* [d_model, d_embedding], where they differ */
    tfm__stack encoder, decoder;
    tfm_linear head_transform; /* before the head */
    tfm_norm head_norm;
    tfm_linear head; /* [vocab_size, d_model or d_embedding]; tied: the token embedding */
    tfm_linear pooler, classifier_dense, classifier;
    const char *labels; /* [labels_size]: one a line */
    size_t labels_size;
    void *weights; /* what could not be used where it lies in the file */
    uint64_t parameters, bytes_per_token;
    int has_tokenizer, only_tokenizer; /* the file has no model beside it */
    tfm__tokenizer tokenizer;
    int32_t mask_id, start_id; /* -1: there is none */
    const int32_t *end_ids;
    size_t n_end_ids;
};

/* ---- the description */

typedef struct tfm__reader {
    const tfm_file *file;
    tfm_error *error;
    tfm_status status; /* the first failure; what is read after it is not used */
} tfm__reader;

static void tfm__reader_fail(tfm__reader *reader, const char *key, const char *expected) {
    if (reader->status == TFM_OK)
        reader->status = tfm__fail(reader->error, TFM_ERROR_FORMAT, "%s: metadata '%s': expected %s",
                                   reader->file->name, key, expected);
}

/* The values of a key, or NULL: an error if it has another type, or is required and not there. */
static const tfm_meta *tfm__read_meta(tfm__reader *reader, const char *key, tfm_meta_type type, int required,
                                      const char *expected) {
    const tfm_meta *meta = tfm_file_find_meta(reader->file, key);
    if (meta ? meta->type != type : required) {
        tfm__reader_fail(reader, key, expected);
        return NULL;
    }
    return meta;
}

/* An integer from `low` to `high`; not there: `usual`, or an error if that is -1. */
static size_t tfm__read_size(tfm__reader *reader, const char *key, int64_t low, int64_t high, int64_t usual) {
    const tfm_meta *meta = tfm__read_meta(reader, key, TFM_META_I64, usual < 0, "an integer");
    int64_t value = usual;
    if (meta) {
        char expected[64];
        value = meta->count == 1 ? *(const int64_t *)meta->values : low - 1;
        snprintf(expected, sizeof expected, "one integer from %lld to %lld", (long long)low, (long long)high);
        if (value < low || value > high)
            tfm__reader_fail(reader, key, expected);
    }
    return value < low || value > high ? (size_t)low : (size_t)value;
}

/* The number at `index` of n, or one number that stands for all; finite. Not there: `usual`, or an error if that is -1. */
static float tfm__read_float(tfm__reader *reader, const char *key, size_t index, size_t n, float usual) {
    const tfm_meta *meta = tfm__read_meta(reader, key, TFM_META_F64, usual < 0, "a number");
    double value = usual;
    if (meta) {
        if (meta->count != 1 && meta->count != n) {
            tfm__reader_fail(reader, key, n > 1 ? "one number, or one for each layer" : "one number");
            return 0;
        }
        value = ((const double *)meta->values)[meta->count == 1 ? 0 : index];
        if (!tfm__is_finite_double(value) || fabs(value) > FLT_MAX)
            tfm__reader_fail(reader, key, "a finite number");
    }
    return (float)value;
}

/* One of the words: which. Not there: 0, or an error if required. */
static int tfm__read_word(tfm__reader *reader, const char *key, const char *const *words, int required) {
    const tfm_meta *meta = tfm__read_meta(reader, key, TFM_META_TEXT, required, "a word");
    int i;
    if (!meta)
        return 0;
    for (i = 0; words[i]; i++)
        if (!tfm__compare_text((const char *)meta->values, meta->count, words[i], strlen(words[i])))
            return i;
    if (reader->status == TFM_OK)
        reader->status = tfm__fail(reader->error, TFM_ERROR_UNSUPPORTED,
                                   "%s: '%.*s' as %s is not supported by this version of the library",
                                   reader->file->name, (int)TFM__MIN(meta->count, 40), (const char *)meta->values, key);
    return 0;
}

static const char *const tfm__kind_words[] = {"decoder", "encoder", "encoder-decoder", NULL};
static const char *const tfm__norm_words[] = {"layer", "rms", NULL};
static const char *const tfm__place_words[] = {"pre", "post", "sandwich", NULL};
static const char *const tfm__position_words[] = {"none", "learned", "sinusoidal", "rotary", "relative", NULL};
static const char *const tfm__head_words[] = {"none", "tied", "own", NULL};
static const char *const tfm__ffn_words[] = {"plain", "gated", NULL};
static const char *const tfm__activation_words[] = {"none",       "relu", "gelu", "gelu_tanh",
                                                    "quick_gelu", "silu", "tanh", NULL};
static const char *const tfm__pooling_words[] = {"none", "cls", "mean", "max", NULL};
static const char *const tfm__classifier_words[] = {"none", "sequence", "token", NULL};
static const char *const tfm__problem_words[] = {"single", "multi", "regression", NULL};

/* Reads keys "encoder.*" or "decoder.*". */
static void tfm__read_stack(tfm__reader *reader, const char *prefix, tfm_stack *stack) {
    const int is_decoder = !strcmp(prefix, "decoder");
    char key[64];
#define TFM__KEY(name) (snprintf(key, sizeof key, "%s.%s", prefix, name), key)
#define TFM__SIZE(name, low, usual) tfm__read_size(reader, TFM__KEY(name), low, TFM__MAX_SIZE, usual)
#define TFM__FLAG(name, usual) (int)tfm__read_size(reader, TFM__KEY(name), 0, 1, usual)
    stack->n_layers = TFM__SIZE("n_layers", 0, -1);
    stack->n_heads = TFM__SIZE("n_heads", 1, -1);
    stack->n_kv_heads = TFM__SIZE("n_kv_heads", 1, (int64_t)stack->n_heads);
    stack->head_dim = TFM__SIZE("head_dim", 1, -1);
    stack->d_ff = TFM__SIZE("d_ff", 1, -1);
    stack->n_positions = TFM__SIZE("n_positions", 1, -1);
    stack->position_offset = TFM__SIZE("position_offset", 0, 0);
    stack->causal = TFM__FLAG("causal", is_decoder);
    stack->cross = TFM__FLAG("cross", 0);
    stack->parallel = TFM__FLAG("parallel", 0);
    stack->embedding_norm = TFM__FLAG("embedding_norm", 0);
    stack->final_norm = TFM__FLAG("final_norm", 0);
    stack->norm = (tfm_norm_kind)tfm__read_word(reader, TFM__KEY("norm"), tfm__norm_words, 1);
    stack->norm_place = (tfm_norm_place)tfm__read_word(reader, TFM__KEY("norm_place"), tfm__place_words, 1);
    stack->norm_eps = tfm__read_float(reader, TFM__KEY("norm_eps"), 0, 1, -1);
    if (!(stack->norm_eps >= 0))
        tfm__reader_fail(reader, key, "a number that is not negative");
    stack->positions = (tfm_positions)tfm__read_word(reader, TFM__KEY("positions"), tfm__position_words, 1);
    stack->gated = tfm__read_word(reader, TFM__KEY("ffn"), tfm__ffn_words, 1);
    stack->activation = (tfm_activation)tfm__read_word(reader, TFM__KEY("activation"), tfm__activation_words, 1);
    if (tfm__product(TFM__MAX(stack->n_heads, stack->n_kv_heads), stack->head_dim) > TFM__MAX_WIDTH)
        tfm__reader_fail(reader, TFM__KEY("head_dim"), "at most 2^29 numbers in all heads");
    if (stack->n_heads % stack->n_kv_heads)
        tfm__reader_fail(reader, TFM__KEY("n_kv_heads"), "a number that divides n_heads");
    if (stack->n_layers > reader->file->n_entries)
        tfm__reader_fail(reader, TFM__KEY("n_layers"), "no more layers than there are tensors");
    if (stack->parallel && (stack->norm_place != TFM_PRE_NORM || stack->cross))
        tfm__reader_fail(reader, TFM__KEY("parallel"),
                         "0: only pre-norm blocks without cross-attention can be parallel");
    if (stack->cross && !is_decoder)
        tfm__reader_fail(reader, TFM__KEY("cross"), "0 in an encoder");
#undef TFM__KEY
#undef TFM__SIZE
#undef TFM__FLAG
}

/* The number of lines. */
static size_t tfm__count_labels(const char *labels, size_t size) {
    size_t n = size ? 1 : 0, i;
    for (i = 0; i < size; i++)
        n += labels[i] == '\n';
    return n;
}

static void tfm__read_classes(tfm__reader *reader, tfm_model *model) {
    tfm_description *d = &model->description;
    const tfm_meta *labels = tfm__read_meta(reader, "classifier_labels", TFM_META_TEXT, 0, "text");
    const tfm_entry *weight = tfm_file_find(reader->file, "classifier.weight");
    d->pooling = (tfm_pooling)tfm__read_word(reader, "pooling", tfm__pooling_words, 0);
    d->pool_normalize = (int)tfm__read_size(reader, "pool_normalize", 0, 1, 0);
    d->pool_max_tokens = tfm__read_size(reader, "pool_max_tokens", 0, TFM__MAX_SIZE, 0);
    d->pooler = tfm_file_find_meta(reader->file, "pooler_activation") != NULL;
    d->pooler_activation = (tfm_activation)tfm__read_word(reader, "pooler_activation", tfm__activation_words, 0);
    d->classifier = (tfm_classifier)tfm__read_word(reader, "classifier", tfm__classifier_words, 0);
    d->classifier_problem = (tfm_problem)tfm__read_word(reader, "classifier_problem", tfm__problem_words, 0);
    d->classifier_activation =
        (tfm_activation)tfm__read_word(reader, "classifier_activation", tfm__activation_words, 0);
    d->n_labels = d->classifier && weight ? weight->tensor.shape[0] : 0;
    if (d->classifier && labels && tfm__count_labels((const char *)labels->values, labels->count) == d->n_labels) {
        model->labels = (const char *)labels->values;
        model->labels_size = labels->count;
    } else if (labels)
        tfm__reader_fail(reader, "classifier_labels", "one line for each class");
}

static void tfm__read_description(tfm__reader *reader, tfm_model *model) {
    tfm_description *d = &model->description;
    model->encoder.shape = &d->encoder;
    model->decoder.shape = &d->decoder;
    model->start_id = -1;
    model->only_tokenizer = !tfm_file_find_meta(reader->file, "model.kind") && !reader->file->n_entries &&
                            tfm_file_find_meta(reader->file, "tokenizer.kind");
    if (model->only_tokenizer)
        return;
    d->kind = (tfm_kind)tfm__read_word(reader, "model.kind", tfm__kind_words, 1);
    d->vocab_size = tfm__read_size(reader, "vocab_size", 0, TFM__MAX_SIZE, -1);
    d->d_model = tfm__read_size(reader, "d_model", 1, TFM__MAX_SIZE, -1);
    d->d_embedding = tfm__read_size(reader, "d_embedding", 1, TFM__MAX_SIZE, (int64_t)d->d_model);
    d->n_token_types = tfm__read_size(reader, "n_token_types", 0, TFM__MAX_SIZE, 0);
    d->embedding_scale = tfm__read_float(reader, "embedding_scale", 0, 1, 1);
    d->logit_scale = tfm__read_float(reader, "logit_scale", 0, 1, 1);
    d->logit_softcap = tfm__read_float(reader, "logit_softcap", 0, 1, 0);
    d->head = (tfm_head)tfm__read_word(reader, "head", tfm__head_words, 1);
    d->head_transform = (tfm_activation)tfm__read_word(reader, "head_transform", tfm__activation_words, 0);
    if (d->kind != TFM_DECODER)
        tfm__read_stack(reader, "encoder", &d->encoder);
    if (d->kind != TFM_ENCODER)
        tfm__read_stack(reader, "decoder", &d->decoder);
    tfm__read_classes(reader, model);
    if (!d->vocab_size && d->head != TFM_NO_HEAD)
        tfm__reader_fail(reader, "vocab_size", "an integer greater than 0, for there is a head");
    if (d->logit_softcap < 0)
        tfm__reader_fail(reader, "logit_softcap", "a number that is not negative");
    if (d->kind == TFM_ENCODER_DECODER && !d->decoder.cross)
        tfm__reader_fail(reader, "decoder.cross", "1 in an encoder-decoder");
    model->start_id =
        tfm_file_find_meta(reader->file, "generation.start_id")
            ? (int32_t)tfm__read_size(reader, "generation.start_id", 0, (int64_t)TFM__MAX(d->vocab_size, 1) - 1, 0)
            : -1;
}

/* ---- the weights
 * tfm__load_weights runs twice over the same list: first it checks and adds up the memory that is needed, then it fills. */

typedef struct tfm__loader {
    tfm__reader reader;
    tfm__threads threads;
    tfm_dtype dtype;      /* of the matrices; 0: as in the file */
    tfm__folding folding; /* if that is i8 */
    int copy;             /* 1: nothing is used where it lies */
    int fill;             /* 0: first run */
    char *memory;         /* for what can't be used where it lies */
    size_t used;
    uint64_t parameters;
} tfm__loader;

/* Room in the loader's memory; an address only on the second run. */
static char *tfm__loader_take(tfm__loader *loader, size_t size) {
    char *memory = loader->fill ? loader->memory + loader->used : NULL;
    loader->used += tfm__round_up(size, TFM__CACHE_LINE);
    return memory;
}

/* The entry with that name and shape ([rows, columns], or [rows] if columns is 0), NULL if it is optional and not there. */
static const tfm_entry *tfm__load_entry(tfm__loader *loader, const char *name, size_t rows, size_t columns,
                                        int optional) {
    tfm__reader *reader = &loader->reader;
    const tfm_entry *entry = tfm_file_find(reader->file, name);
    const tfm_tensor *tensor = entry ? &entry->tensor : NULL;
    if (reader->status != TFM_OK)
        return NULL;
    if (!entry) {
        if (!optional)
            reader->status =
                tfm__fail(reader->error, TFM_ERROR_FORMAT, "%s: tensor '%s' is missing", reader->file->name, name);
        return NULL;
    }
    if (tensor->n_dims != (columns ? 2 : 1) || tensor->shape[0] != rows ||
        tensor->shape[1] != (columns ? columns : 1)) {
        reader->status =
            tfm__fail(reader->error, TFM_ERROR_FORMAT,
                      "%s: tensor '%s' is [%llu, %llu], but the description makes it [%llu, %llu]", reader->file->name,
                      name, (unsigned long long)tensor->shape[0], (unsigned long long)tensor->shape[1],
                      (unsigned long long)rows, (unsigned long long)(columns ? columns : 1));
        return NULL;
    }
    loader->parameters += (uint64_t)rows * (columns ? columns : 1);
    return entry;
}

/* Whether a file holds blocks, with which the kernels can't compute. */
static int tfm__has_blocks(const tfm_file *file) {
    size_t i;
    for (i = 0; i < file->n_entries; i++)
        if (tfm__blocks_of(file->entries[i].tensor.dtype))
            return 1;
    return 0;
}

/* A matrix in panels of the dtype, in the loader's memory. */
static tfm_tensor tfm__load_packed(tfm__loader *loader, const tfm_entry *entry, tfm_dtype dtype) {
    tfm__reader *reader = &loader->reader;
    tfm_tensor matrix = tfm__tensor(dtype, TFM_PANELS, entry->tensor.shape[0], entry->tensor.shape[1], NULL);
    char *memory = tfm__loader_take(loader, tfm_tensor_bytes(&matrix));
    if (!loader->fill)
        return matrix;
    matrix = tfm__pack_into(&loader->threads, &entry->tensor, tfm__factors_of(&loader->folding, reader->file, entry),
                            dtype, memory);
    tfm__file_forget(reader->file, &entry->tensor);
    if (tfm__is_not_finite(&matrix) && reader->status == TFM_OK)
        reader->status = tfm__fail(reader->error, TFM_ERROR_FORMAT,
                                   "%s: a weight of tensor '%.*s' is not finite, and can't be quantized",
                                   reader->file->name, (int)TFM__MIN(entry->name_size, 100), entry->name);
    return matrix;
}

/* A matrix for the kernels: in panels. */
static void tfm__load_matrix(tfm__loader *loader, const char *name, size_t out, size_t in, tfm_tensor *matrix) {
    const tfm_entry *entry = tfm__load_entry(loader, name, out, in, 0);
    tfm_dtype dtype;
    if (!entry)
        return;
    dtype = loader->dtype ? loader->dtype : entry->tensor.dtype;
    if (dtype == TFM_PARTS) /* of types that differ, which without blocks only a strange file has */
        dtype = TFM_F32;
    *matrix = entry->tensor;
    if (loader->copy || entry->tensor.layout != TFM_PANELS || entry->tensor.dtype != dtype)
        *matrix = tfm__load_packed(loader, entry, dtype);
}

/* A matrix that is only looked up: used where it lies, if it is of the wanted dtype. */
static void tfm__load_table(tfm__loader *loader, const char *name, size_t rows, size_t columns, tfm_tensor *table) {
    const tfm_entry *entry = tfm__load_entry(loader, name, rows, columns, 0);
    if (!entry)
        return;
    *table = entry->tensor;
    if (loader->dtype && entry->tensor.dtype != loader->dtype)
        *table = tfm__load_packed(loader, entry, loader->dtype);
}

/* A vector, in fp32; none if it is not there, or reading has failed: what an earlier run has found then stays unread. */
static void tfm__load_vector(tfm__loader *loader, const char *name, size_t n, int optional, tfm_tensor *vector) {
    const tfm_entry *entry = tfm__load_entry(loader, name, n, 0, optional);
    tfm__factors factors;
    memset(vector, 0, sizeof *vector);
    if (!entry)
        return;
    factors = tfm__factors_of(&loader->folding, loader->reader.file, entry);
    *vector = tfm__tensor(TFM_F32, TFM_ROWS, n, 0, entry->tensor.data);
    if (entry->tensor.dtype != TFM_F32 || factors.rows) {
        float *memory = (float *)(void *)tfm__loader_take(loader, n * sizeof *memory);
        if (loader->fill) {
            tfm__factored_vector(&entry->tensor, &factors, memory);
            vector->data = memory;
        }
    }
}

/* name.weight and name.bias */
static void tfm__load_linear(tfm__loader *loader, const char *name, size_t out, size_t in, tfm_linear *linear) {
    char full[128];
    snprintf(full, sizeof full, "%s.weight", name);
    tfm__load_matrix(loader, full, out, in, &linear->weight);
    snprintf(full, sizeof full, "%s.bias", name);
    tfm__load_vector(loader, full, out, 1, &linear->bias);
}

/* name.weight and name.bias. `offset` is added to the weights; a norm is optional if it may be missing. */
static void tfm__load_norm(tfm__loader *loader, const char *name, const tfm_stack *stack, size_t n, float offset,
                           int optional, tfm_norm *norm) {
    char full[128];
    norm->kind = stack->norm;
    norm->eps = stack->norm_eps;
    snprintf(full, sizeof full, "%s.weight", name);
    tfm__load_vector(loader, full, n, optional, &norm->weight);
    if (offset != 0 && norm->weight.data) {
        float *memory = (float *)(void *)tfm__loader_take(loader, n * sizeof *memory);
        size_t i;
        for (i = 0; loader->fill && i < n; i++)
            memory[i] = ((const float *)norm->weight.data)[i] + offset;
        norm->weight.data = loader->fill ? memory : norm->weight.data;
    }
    snprintf(full, sizeof full, "%s.bias", name);
    tfm__load_vector(loader, full, n, 1, &norm->bias);
}

/* A stack's part of the file while it is loaded. */
typedef struct tfm__stack_loader {
    tfm__loader *loader;
    const char *prefix;
    const tfm_description *d;
    const tfm_stack *shape;
    float norm_offset;
    tfm_rotary rotary;
    tfm_relative relative;
} tfm__stack_loader;

static float tfm__stack_float(const tfm__stack_loader *from, const char *name, size_t index, size_t n, float usual) {
    char key[64];
    snprintf(key, sizeof key, "%s.%s", from->prefix, name);
    return tfm__read_float(&from->loader->reader, key, index, n, usual);
}

static void tfm__load_rotary(tfm__stack_loader *from) {
    tfm__reader *reader = &from->loader->reader;
    const tfm_meta *frequencies;
    char key[64];
    snprintf(key, sizeof key, "%s.rotary_interleaved", from->prefix);
    from->rotary.interleaved = (int)tfm__read_size(reader, key, 0, 1, 0);
    from->rotary.scale = tfm__stack_float(from, "rotary_scale", 0, 1, 1);
    snprintf(key, sizeof key, "%s.rotary_frequencies", from->prefix);
    frequencies = tfm__read_meta(reader, key, TFM_META_F32, 1, "a list of numbers");
    if (frequencies && (!frequencies->count || frequencies->count > from->shape->head_dim / 2))
        tfm__reader_fail(reader, key, "at most head_dim / 2 numbers");
    if (reader->status != TFM_OK)
        return;
    from->rotary.n_pairs = frequencies->count;
    from->rotary.frequencies = (const float *)frequencies->values;
}

static void tfm__load_relative(tfm__stack_loader *from) {
    const tfm_stack *shape = from->shape;
    tfm__loader *loader = from->loader;
    const tfm_entry *entry;
    char key[64];
    snprintf(key, sizeof key, "%s.relative_buckets", from->prefix);
    from->relative.n_buckets = tfm__read_size(&loader->reader, key, shape->causal ? 2 : 4, TFM__MAX_SIZE, -1);
    snprintf(key, sizeof key, "%s.relative_max_distance", from->prefix);
    from->relative.max_distance = tfm__read_size(&loader->reader, key, 1, TFM__MAX_SIZE, -1);
    if (from->relative.max_distance <= from->relative.n_buckets / (shape->causal ? 2 : 4))
        tfm__reader_fail(&loader->reader, key,
                         shape->causal ? "more than half the number of buckets"
                                       : "more than a quarter of the number of buckets");
    snprintf(key, sizeof key, "%s.relative_bias.weight", from->prefix);
    entry = tfm__load_entry(loader, key, from->relative.n_buckets, shape->n_heads, 0);
    if (entry) { /* in fp32, by rows */
        float *table = (float *)(void *)tfm__loader_take(
            loader, tfm__product(entry->tensor.shape[0], shape->n_heads * sizeof *table));
        size_t i;
        for (i = 0; loader->fill && i < entry->tensor.shape[0]; i++)
            tfm__matrix_row(&entry->tensor, i, 0, shape->n_heads, table + i * shape->n_heads);
        from->relative.table = table;
    }
}

static void tfm__load_attention(const tfm__stack_loader *from, const char *name, size_t index,
                                tfm_attention *attention) {
    const tfm_stack *shape = from->shape;
    const size_t queries = shape->n_heads * shape->head_dim, keys = shape->n_kv_heads * shape->head_dim;
    tfm__loader *loader = from->loader;
    const tfm_meta *windows;
    char full[112], key[64];
    attention->n_heads = shape->n_heads;
    attention->n_kv_heads = shape->n_kv_heads;
    attention->head_dim = shape->head_dim;
    attention->causal = shape->causal;
    attention->rotary = from->rotary;
    attention->relative = from->relative;
    attention->scale = tfm__stack_float(from, "attention_scale", index, shape->n_layers, -1);
    attention->softcap = tfm__stack_float(from, "attention_softcap", 0, 1, 0);
    snprintf(key, sizeof key, "%s.attention_scale", from->prefix);
    if (!(attention->scale > 0) || attention->softcap < 0)
        tfm__reader_fail(&loader->reader, key, "numbers greater than 0, and no negative attention_softcap");
    snprintf(key, sizeof key, "%s.sliding_window", from->prefix);
    windows = tfm__read_meta(&loader->reader, key, TFM_META_I64, 0, "integers");
    if (windows) {
        int64_t window = windows->count == shape->n_layers ? ((const int64_t *)windows->values)[index] : -1;
        if (window < 0 || window > TFM__MAX_SIZE)
            tfm__reader_fail(&loader->reader, key, "an integer that is not negative for each layer");
        else
            attention->window = (size_t)window;
    }
    snprintf(full, sizeof full, "%s.qkv", name);
    tfm__load_linear(loader, full, queries + 2 * keys, from->d->d_model, &attention->qkv);
    snprintf(full, sizeof full, "%s.q_norm", name);
    tfm__load_norm(loader, full, shape, shape->head_dim, from->norm_offset, 1, &attention->q_norm);
    snprintf(full, sizeof full, "%s.k_norm", name);
    tfm__load_norm(loader, full, shape, shape->head_dim, from->norm_offset, 1, &attention->k_norm);
    snprintf(full, sizeof full, "%s.out", name);
    tfm__load_linear(loader, full, from->d->d_model, queries, &attention->out);
}

static void tfm__load_block(const tfm__stack_loader *from, size_t index, tfm_block *block) {
    const tfm_stack *shape = from->shape;
    const size_t d_model = from->d->d_model, queries = shape->n_heads * shape->head_dim;
    tfm__loader *loader = from->loader;
    tfm_ffn *ffn = &block->ffn;
    char name[96];
#define TFM__NAME(part)                                                                                                \
    (snprintf(name, sizeof name, "%s.blocks.%lu.%s", from->prefix, (unsigned long)index, part), name)
#define TFM__NORM(part, optional, norm)                                                                                \
    tfm__load_norm(loader, TFM__NAME(part), shape, d_model, from->norm_offset, optional, norm)
    block->norm_place = shape->norm_place;
    block->parallel = shape->parallel;
    TFM__NORM("attention_norm", 0, &block->attention_norm);
    tfm__load_attention(from, TFM__NAME("attention"), index, &block->attention);
    if (shape->norm_place == TFM_SANDWICH_NORM)
        TFM__NORM("attention_post_norm", 0, &block->attention_post_norm);
    if (shape->cross) {
        const size_t keys = 2 * shape->n_kv_heads * shape->head_dim;
        TFM__NORM("cross_norm", 0, &block->cross.norm);
        tfm__load_linear(loader, TFM__NAME("cross.q"), queries, d_model, &block->cross.q);
        tfm__load_linear(loader, TFM__NAME("cross.kv"), keys, d_model, &block->cross.kv);
        tfm__load_linear(loader, TFM__NAME("cross.out"), d_model, queries, &block->cross.out);
    }
    TFM__NORM("ffn_norm", shape->parallel, &block->ffn_norm);
    ffn->activation = shape->activation;
    ffn->gated = shape->gated;
    tfm__load_linear(loader, TFM__NAME("ffn.up"), (shape->gated ? 2 : 1) * shape->d_ff, d_model, &ffn->up);
    tfm__load_linear(loader, TFM__NAME("ffn.down"), d_model, shape->d_ff, &ffn->down);
    if (shape->norm_place == TFM_SANDWICH_NORM)
        TFM__NORM("ffn_post_norm", 0, &block->ffn_post_norm);
#undef TFM__NAME
#undef TFM__NORM
}

static void tfm__load_stack(tfm__loader *loader, const tfm_description *d, const char *prefix, tfm__stack *stack) {
    tfm__stack_loader from;
    char name[64];
    size_t i;
    memset(&from, 0, sizeof from);
    from.loader = loader;
    from.prefix = prefix;
    from.d = d;
    from.shape = stack->shape;
    from.norm_offset = tfm__stack_float(&from, "norm_weight_offset", 0, 1, 0);
    if (stack->shape->positions == TFM_ROTARY_POSITIONS)
        tfm__load_rotary(&from);
    if (stack->shape->positions == TFM_RELATIVE_POSITIONS)
        tfm__load_relative(&from);
    snprintf(name, sizeof name, "%s.position_embedding.weight", prefix);
    if (stack->shape->positions == TFM_LEARNED_POSITIONS)
        tfm__load_table(loader, name, stack->shape->n_positions + stack->shape->position_offset, d->d_embedding,
                        &stack->position_embedding);
    snprintf(name, sizeof name, "%s.embedding_norm", prefix);
    if (stack->shape->embedding_norm)
        tfm__load_norm(loader, name, stack->shape, d->d_embedding, 0, 0, &stack->embedding_norm);
    for (i = 0; i < stack->shape->n_layers && loader->reader.status == TFM_OK; i++)
        tfm__load_block(&from, i, stack->blocks + i);
    snprintf(name, sizeof name, "%s.final_norm", prefix);
    if (stack->shape->final_norm)
        tfm__load_norm(loader, name, stack->shape, d->d_model, from.norm_offset, 0, &stack->final_norm);
}

static void tfm__load_heads(tfm__loader *loader, tfm_model *model) {
    const tfm_description *d = &model->description;
    const tfm_stack *stack = d->kind == TFM_ENCODER ? &d->encoder : &d->decoder;
    const size_t head_in = d->head_transform || d->head == TFM_TIED_HEAD ? d->d_embedding : d->d_model;
    if (d->head_transform) {
        tfm__load_linear(loader, "head.transform", head_in, d->d_model, &model->head_transform);
        tfm__load_norm(loader, "head.norm", stack, head_in, 0, 0, &model->head_norm);
    }
    if (d->head == TFM_OWN_HEAD)
        tfm__load_matrix(loader, "head.weight", d->vocab_size, head_in, &model->head.weight);
    if (d->head != TFM_NO_HEAD)
        tfm__load_vector(loader, "head.bias", d->vocab_size, 1, &model->head.bias);
    if (d->head == TFM_TIED_HEAD && !d->head_transform && d->d_embedding != d->d_model)
        tfm__reader_fail(&loader->reader, "head", "a head_transform where embeddings have a width of their own");
    if (d->pooler)
        tfm__load_linear(loader, "pooler", d->d_model, d->d_model, &model->pooler);
    if (d->classifier && d->classifier_activation)
        tfm__load_linear(loader, "classifier.dense", d->d_model, d->d_model, &model->classifier_dense);
    if (d->classifier)
        tfm__load_linear(loader, "classifier", d->n_labels, d->d_model, &model->classifier);
}

static void tfm__load_weights(tfm__loader *loader, tfm_model *model) {
    const tfm_description *d = &model->description;
    loader->used = 0;
    loader->parameters = 0;
    if (d->head == TFM_TIED_HEAD) {
        tfm__load_matrix(loader, "token_embedding.weight", d->vocab_size, d->d_embedding, &model->token_embedding);
        model->head.weight = model->token_embedding;
    } else if (d->vocab_size)
        tfm__load_table(loader, "token_embedding.weight", d->vocab_size, d->d_embedding, &model->token_embedding);
    if (d->n_token_types)
        tfm__load_table(loader, "token_type_embedding.weight", d->n_token_types, d->d_embedding,
                        &model->token_type_embedding);
    if (d->d_embedding != d->d_model)
        tfm__load_linear(loader, "embedding_projection", d->d_model, d->d_embedding, &model->embedding_projection);
    if (d->kind != TFM_DECODER)
        tfm__load_stack(loader, d, "encoder", &model->encoder);
    if (d->kind != TFM_ENCODER)
        tfm__load_stack(loader, d, "decoder", &model->decoder);
    tfm__load_heads(loader, model);
}

static const tfm__stack *tfm__main_stack(const tfm_model *model) {
    return model->description.kind == TFM_ENCODER ? &model->encoder : &model->decoder;
}

/* Bytes of weights that a generated token reads. */
static uint64_t tfm__linear_bytes(const tfm_linear *linear) {
    return (linear->weight.data ? tfm_tensor_bytes(&linear->weight) : 0) +
           (linear->bias.data ? tfm_tensor_bytes(&linear->bias) : 0);
}

static uint64_t tfm__bytes_per_token(const tfm_model *model) {
    const tfm__stack *stack = tfm__main_stack(model);
    uint64_t bytes = tfm__linear_bytes(&model->head) + tfm__linear_bytes(&model->head_transform);
    size_t i;
    for (i = 0; i < stack->shape->n_layers; i++) {
        const tfm_block *block = stack->blocks + i;
        bytes += tfm__linear_bytes(&block->attention.qkv) + tfm__linear_bytes(&block->attention.out) +
                 tfm__linear_bytes(&block->cross.q) + tfm__linear_bytes(&block->cross.out) +
                 tfm__linear_bytes(&block->ffn.up) + tfm__linear_bytes(&block->ffn.down);
    }
    return bytes;
}

/* ---- the tokenizer's part of the file */

/* The values of an optional list, and how many: 0 if it is not there. */
static const int32_t *tfm__read_ids(tfm__reader *reader, const char *key, size_t *n) {
    const tfm_meta *meta = tfm__read_meta(reader, key, TFM_META_I32, 0, "a list of 32-bit integers");
    *n = meta ? meta->count : 0;
    return meta ? (const int32_t *)meta->values : NULL;
}

/* A flag: 0 or 1. */
static int tfm__read_flag(tfm__reader *reader, const char *key, int usual) {
    return (int)tfm__read_size(reader, key, 0, 1, usual);
}

/* An optional id; -1 if it is not there. */
static int32_t tfm__read_id(tfm__reader *reader, const char *key) {
    return tfm_file_find_meta(reader->file, key) ? (int32_t)tfm__read_size(reader, key, 0, TFM__MAX_SIZE, 0) : -1;
}

/* The tables that every kind of tokenizer has. */
static void tfm__read_vocabulary(tfm__reader *reader, tfm__tokenizer_source *source) {
    const tfm_meta *tokens = tfm__read_meta(reader, "tokenizer.tokens", TFM_META_BYTES, 1, "bytes");
    size_t n;
    source->tokens = tokens ? (const unsigned char *)tokens->values : NULL;
    source->tokens_size = tokens ? tokens->count : 0;
    source->token_sizes = tfm__read_ids(reader, "tokenizer.token_sizes", &source->n_tokens);
    source->added = tfm__read_ids(reader, "tokenizer.added", &n);
    source->n_added = n / 2;
    if (n % 2)
        tfm__reader_fail(reader, "tokenizer.added", "two numbers for each token");
    source->unk_id = tfm__read_id(reader, "tokenizer.unk_id");
    source->prefix_ids = tfm__read_ids(reader, "tokenizer.prefix_ids", &source->n_prefix);
    source->suffix_ids = tfm__read_ids(reader, "tokenizer.suffix_ids", &source->n_suffix);
    source->pair_ids = tfm__read_ids(reader, "tokenizer.pair_ids", &source->n_pair);
    source->has_pairs = tfm_file_find_meta(reader->file, "tokenizer.pair_ids") != NULL;
    source->pair_type = (int32_t)tfm__read_size(reader, "tokenizer.pair_type", 0, TFM__MAX_SIZE, 0);
}

static void tfm__read_byte_bpe(tfm__reader *reader, tfm__tokenizer_source *source) {
    static const char *const patterns[] = {"gpt2", "llama3", "qwen2", "smollm", NULL}; /* as in tfm__pattern */
    size_t n;
    source->pattern = (tfm__pattern)tfm__read_word(reader, "tokenizer.pattern", patterns, 1);
    source->nfc = tfm__read_flag(reader, "tokenizer.nfc", 0);
    source->merges = tfm__read_ids(reader, "tokenizer.merges", &n);
    source->n_merges = n / 3;
    if (n % 3)
        tfm__reader_fail(reader, "tokenizer.merges", "three numbers for each merge");
    source->byte_ids = tfm__read_ids(reader, "tokenizer.byte_ids", &n);
    if (n != 256)
        tfm__reader_fail(reader, "tokenizer.byte_ids", "256 numbers");
    source->fuse_unk = tfm__read_flag(reader, "tokenizer.fuse_unk", 0);
    source->add_prefix_space = tfm__read_flag(reader, "tokenizer.add_prefix_space", 0);
    if (source->add_prefix_space && source->pattern != TFM__GPT2_PATTERN)
        tfm__reader_fail(reader, "tokenizer.add_prefix_space", "0 with this tokenizer.pattern");
    source->ignore_merges = tfm__read_flag(reader, "tokenizer.ignore_merges", 0);
}

#define TFM__MAX_PREFIX 64 /* looking for a piece goes through it */

static void tfm__read_wordpiece(tfm__reader *reader, tfm__tokenizer_source *source) {
    const tfm_meta *prefix = tfm__read_meta(reader, "tokenizer.continuing_prefix", TFM_META_TEXT, 1, "text");
    source->continuing_prefix = prefix ? (const unsigned char *)prefix->values : NULL;
    source->continuing_size = prefix ? prefix->count : 0;
    if (source->continuing_size > TFM__MAX_PREFIX)
        tfm__reader_fail(reader, "tokenizer.continuing_prefix", "at most 64 bytes");
    source->max_word_chars = tfm__read_size(reader, "tokenizer.max_word_chars", 1, TFM__MAX_WORD_CHARS, 100);
    source->clean_text = tfm__read_flag(reader, "tokenizer.clean_text", 1);
    source->chinese_chars = tfm__read_flag(reader, "tokenizer.chinese_chars", 1);
    source->lowercase = tfm__read_flag(reader, "tokenizer.lowercase", 1);
    source->strip_accents = tfm__read_flag(reader, "tokenizer.strip_accents", source->lowercase);
    source->cleanup = tfm__read_flag(reader, "tokenizer.cleanup", 1);
    if (source->unk_id < 0)
        tfm__reader_fail(reader, "tokenizer.unk_id", "the token of what has no other");
}

static void tfm__read_spm_rules(tfm__reader *reader, tfm__spm_rules *rules) {
    static const char *const libraries[] = {"sentencepiece", "tokenizers", NULL};
    rules->tokenizers = tfm__read_word(reader, "tokenizer.rules", libraries, 0);
    rules->byte_fallback = tfm__read_flag(reader, "tokenizer.byte_fallback", 0);
    rules->add_dummy_prefix = (int)tfm__read_size(reader, "tokenizer.add_dummy_prefix", 0, 2, 0);
    rules->remove_extra_whitespaces = tfm__read_flag(reader, "tokenizer.remove_extra_whitespaces", 0);
    rules->escape_whitespaces = tfm__read_flag(reader, "tokenizer.escape_whitespaces", 0);
    rules->strip = (int)tfm__read_size(reader, "tokenizer.strip", 0, 3, 0);
    rules->squeeze_spaces = (int)tfm__read_size(reader, "tokenizer.squeeze_spaces", 0, 2, 0);
    rules->prepend = tfm__read_flag(reader, "tokenizer.prepend", 0);
    rules->replace_spaces = tfm__read_flag(reader, "tokenizer.replace_spaces", 0);
    rules->split_whitespace = tfm__read_flag(reader, "tokenizer.split_whitespace", 0);
    rules->metaspace = (tfm__metaspace)tfm__read_size(reader, "tokenizer.metaspace", 0, TFM__METASPACE_ALWAYS, 0);
    rules->split_words = tfm__read_flag(reader, "tokenizer.split_words", 0);
    rules->decode_lead = (tfm__decode_lead)tfm__read_size(reader, "tokenizer.decode_lead", 0, TFM__LEAD_TOKEN, 0);
    if (!rules->tokenizers) /* what is of the other library's rules only */
        rules->metaspace = TFM__METASPACE_NONE;
}

static void tfm__read_spm(tfm__reader *reader, tfm__tokenizer_source *source) {
    const tfm_meta *scores = tfm_file_find_meta(reader->file, "tokenizer.scores");
    const tfm_meta *charsmap = tfm__read_meta(reader, "tokenizer.charsmap", TFM_META_BYTES, 0, "bytes");
    const tfm_meta *unk_surface = tfm__read_meta(reader, "tokenizer.unk_surface", TFM_META_BYTES, 0, "bytes");
    size_t n;
    source->types = tfm__read_ids(reader, "tokenizer.types", &n);
    if (!source->types || n != source->n_tokens)
        tfm__reader_fail(reader, "tokenizer.types", "one number for each token");
    if (scores && scores->type == TFM_META_F32)
        source->scores = (const float *)scores->values;
    else if (scores && scores->type == TFM_META_F64 && source->kind == TFM__UNIGRAM)
        source->double_scores = (const double *)scores->values;
    source->merges = source->kind == TFM__SPM_BPE ? tfm__read_ids(reader, "tokenizer.merges", &n) : NULL;
    source->n_merges = source->merges ? n / 3 : 0;
    if (source->merges && n % 3)
        tfm__reader_fail(reader, "tokenizer.merges", "three numbers for each merge");
    if (scores ? (!source->scores && !source->double_scores) || scores->count != source->n_tokens : !source->n_merges)
        tfm__reader_fail(reader, "tokenizer.scores", "one number for each token");
    source->sorted = tfm__read_ids(reader, "tokenizer.sorted", &source->n_sorted);
    source->charsmap = charsmap ? (const unsigned char *)charsmap->values : NULL;
    source->charsmap_size = charsmap ? charsmap->count : 0;
    source->unk_surface = unk_surface ? (const unsigned char *)unk_surface->values : NULL;
    source->unk_surface_size = unk_surface ? unk_surface->count : 0;
    source->fuse_unk = tfm__read_flag(reader, "tokenizer.fuse_unk", 0);
    tfm__read_spm_rules(reader, &source->rules);
}

static void tfm__read_tokenizer(tfm__reader *reader, tfm_model *model) {
    static const char *const kinds[] = {"byte_bpe", "wordpiece", "unigram", "spm_bpe",
                                        NULL}; /* as in tfm__tokenizer_kind */
    tfm__tokenizer_source source;
    tfm_error why;
    model->end_ids = tfm__read_ids(reader, "generation.eos_ids", &model->n_end_ids);
    if (!tfm_file_find_meta(reader->file, "tokenizer.kind"))
        return;
    memset(&source, 0, sizeof source);
    source.kind = (tfm__tokenizer_kind)tfm__read_word(reader, "tokenizer.kind", kinds, 1);
    tfm__read_vocabulary(reader, &source);
    model->mask_id = tfm__read_id(reader, "tokenizer.mask_id");
    if (reader->status == TFM_OK && model->mask_id >= (int64_t)source.n_tokens)
        tfm__reader_fail(reader, "tokenizer.mask_id", "the id of a token");
    switch (source.kind) {
    case TFM__BYTE_BPE: tfm__read_byte_bpe(reader, &source); break;
    case TFM__WORDPIECE: tfm__read_wordpiece(reader, &source); break;
    case TFM__UNIGRAM:
    case TFM__SPM_BPE: tfm__read_spm(reader, &source); break;
    }
    if (model->only_tokenizer)
        model->description.vocab_size = source.n_tokens;
    if (reader->status == TFM_OK && source.n_tokens > model->description.vocab_size)
        tfm__reader_fail(reader, "tokenizer.token_sizes", "no more tokens than vocab_size");
    if (reader->status != TFM_OK)
        return;
    reader->status = tfm__tokenizer_build(&model->tokenizer, &source, &model->allocator, &why);
    model->has_tokenizer = reader->status == TFM_OK;
    if (reader->status != TFM_OK)
        tfm__fail(reader->error, reader->status, "%s: %.250s", reader->file->name, why.message);
}

/* ---- loading */

TFM_API void tfm_free(tfm_model *model) {
    tfm_allocator allocator;
    if (!model)
        return;
    allocator = model->allocator;
    if (model->has_tokenizer)
        tfm__tokenizer_free(&model->tokenizer);
    tfm__release_aligned(&allocator, model->weights);
    tfm__release(&allocator, model->encoder.blocks);
    tfm__release(&allocator, model->decoder.blocks);
    tfm_file_close(model->file);
    tfm__release(&allocator, model);
}

typedef struct tfm__filling {
    tfm__loader *loader;
    tfm_model *model;
} tfm__filling;

static void tfm__fill_weights(void *argument) {
    const tfm__filling *filling = (const tfm__filling *)argument;
    tfm__load_weights(filling->loader, filling->model);
}

static tfm_status tfm__load_with(tfm__loader *loader, tfm_model *model, const tfm_load_options *options,
                                 tfm_error *error) {
    const tfm_description *d = &model->description;
    tfm__filling filling;
    loader->reader.file = model->file;
    loader->reader.error = error;
    loader->threads.count = tfm__thread_count(options->threads);
    loader->threads.apart = 1;
    loader->dtype = options->dtype || !tfm__has_blocks(model->file) ? options->dtype : TFM_I8;
    loader->copy = options->copy;
    if ((unsigned)options->dtype >= TFM_DTYPE_COUNT)
        return tfm__fail(error, TFM_ERROR_UNSUPPORTED, "unknown type %d", (int)options->dtype);
    if (options->verify && tfm_file_verify(model->file, error) != TFM_OK)
        return TFM_ERROR_FORMAT;
    tfm__read_description(&loader->reader, model);
    if (loader->reader.status != TFM_OK)
        return loader->reader.status;
    if (loader->dtype == TFM_I8 && tfm__fold(model->file, &loader->folding, &model->allocator, error) != TFM_OK)
        return TFM_ERROR_MEMORY;
    model->encoder.blocks =
        (tfm_block *)tfm__allocate_zeroed(&model->allocator, d->encoder.n_layers * sizeof *model->encoder.blocks);
    model->decoder.blocks =
        (tfm_block *)tfm__allocate_zeroed(&model->allocator, d->decoder.n_layers * sizeof *model->decoder.blocks);
    if (!model->encoder.blocks || !model->decoder.blocks)
        return tfm__fail_memory(error, (d->encoder.n_layers + d->decoder.n_layers) * sizeof *model->decoder.blocks);
    if (!model->only_tokenizer)
        tfm__load_weights(loader, model);
    if (loader->reader.status != TFM_OK)
        return loader->reader.status;
    if (loader->used) {
        model->weights = tfm__allocate_large(&model->allocator, loader->used);
        if (!model->weights)
            return tfm__fail_memory(error, loader->used);
        loader->memory = (char *)model->weights;
        loader->fill = 1;
        filling.loader = loader;
        filling.model = model;
        tfm__with_threads(&loader->threads, tfm__fill_weights, &filling);
    }
    model->parameters = loader->parameters;
    model->bytes_per_token = tfm__bytes_per_token(model);
    tfm__read_tokenizer(&loader->reader, model);
    return loader->reader.status;
}

static tfm_status tfm__load_model(tfm_model *model, const tfm_load_options *options, tfm_error *error) {
    tfm__loader loader;
    tfm_status status;
    memset(&loader, 0, sizeof loader);
    status = tfm__load_with(&loader, model, options, error);
    tfm__fold_free(&loader.folding, &model->allocator);
    return status;
}

/* Takes the file over, whatever comes of it. */
static tfm_model *tfm__load_from(tfm_file *file, const tfm_load_options *options, tfm_error *error) {
    tfm_model *model;
    if (!file)
        return NULL;
    model = (tfm_model *)tfm__allocate_zeroed(&file->allocator, sizeof *model);
    if (!model) {
        tfm_file_close(file);
        tfm__fail_memory(error, sizeof *model);
        return NULL;
    }
    model->allocator = file->allocator;
    model->process = tfm__process();
    model->file = file;
    if (tfm__load_model(model, options, error) == TFM_OK)
        return model;
    tfm_free(model);
    return NULL;
}

#ifndef TFM_NO_STDIO
TFM_API tfm_model *tfm_load(const char *path, const tfm_load_options *options, tfm_error *error) {
    tfm_load_options usual;
    memset(&usual, 0, sizeof usual);
    if (!options)
        options = &usual;
    return tfm__load_from(tfm_file_open(path, &options->allocator, error), options, error);
}
#endif

TFM_API tfm_model *tfm_load_memory(const void *data, size_t size, const tfm_load_options *options, tfm_error *error) {
    tfm_load_options usual;
    memset(&usual, 0, sizeof usual);
    if (!options)
        options = &usual;
    return tfm__load_from(tfm_file_open_memory(data, size, NULL, &options->allocator, error), options, error);
}

TFM_API const tfm_description *tfm_model_description(const tfm_model *model) {
    return &model->description;
}

TFM_API uint64_t tfm_model_parameters(const tfm_model *model) {
    return model->parameters;
}

TFM_API uint64_t tfm_model_bytes_per_token(const tfm_model *model) {
    return model->bytes_per_token;
}

TFM_API const tfm_stack *tfm_model_stack(const tfm_model *model) {
    return tfm__main_stack(model)->shape;
}

TFM_API const tfm_block *tfm_model_block(const tfm_model *model, size_t index) {
    const tfm__stack *stack = tfm__main_stack(model);
    return index < stack->shape->n_layers ? stack->blocks + index : NULL;
}

TFM_API const tfm_norm *tfm_model_final_norm(const tfm_model *model) {
    const tfm__stack *stack = tfm__main_stack(model);
    return stack->shape->final_norm ? &stack->final_norm : NULL;
}

TFM_API const tfm_block *tfm_model_encoder_block(const tfm_model *model, size_t index) {
    return index < model->description.encoder.n_layers ? model->encoder.blocks + index : NULL;
}

TFM_API const tfm_norm *tfm_model_encoder_final_norm(const tfm_model *model) {
    return model->description.encoder.final_norm ? &model->encoder.final_norm : NULL;
}

TFM_API const char *tfm_model_label(const tfm_model *model, size_t index, size_t *size) {
    const char *label = model->labels, *end;
    *size = 0;
    if (!label || index >= model->description.n_labels)
        return NULL;
    end = label + model->labels_size;
    for (; index; label++)
        index -= *label == '\n';
    while (label + *size < end && label[*size] != '\n')
        ++*size;
    return label;
}

TFM_API int tfm_has_tokenizer(const tfm_model *model) {
    return model->has_tokenizer;
}

static tfm_status tfm__fail_no_tokenizer(const tfm_model *model, tfm_error *error) {
    return tfm__fail(error, TFM_ERROR_UNSUPPORTED, "%s: the model has no tokenizer", model->file->name);
}

/* tfm_tokenize with memory for long stretches of text. */
static tfm_status tfm__tokenize(const tfm_model *model, void *scratch, size_t scratch_size, const char *text,
                                size_t size, unsigned flags, int32_t *ids, size_t capacity, size_t *n_ids,
                                tfm_error *error) {
    uint32_t stack[TFM__MERGE_STACK];
    tfm__encoder encoder;
    *n_ids = 0;
    if (!model->has_tokenizer)
        return tfm__fail_no_tokenizer(model, error);
    memset(&encoder, 0, sizeof encoder);
    encoder.tokenizer = &model->tokenizer;
    encoder.flags = flags;
    encoder.ids = ids;
    encoder.capacity = capacity;
    encoder.error = error;
    tfm__encode_begin(&encoder, stack, scratch, scratch_size);
    return tfm__encode(&encoder, text, size, NULL, 0, n_ids);
}

TFM_API tfm_status tfm_tokenize(const tfm_model *model, const char *text, size_t size, unsigned flags, int32_t *ids,
                                size_t capacity, size_t *n_ids, tfm_error *error) {
    return tfm__tokenize(model, NULL, 0, text, size, flags, ids, capacity, n_ids, error);
}

TFM_API tfm_status tfm_tokenize_pair(const tfm_model *model, const char *a, size_t a_size, const char *b, size_t b_size,
                                     unsigned flags, int32_t *ids, int32_t *types, size_t capacity, size_t *n_ids,
                                     tfm_error *error) {
    uint32_t stack[TFM__MERGE_STACK];
    tfm__encoder encoder;
    *n_ids = 0;
    if (!model->has_tokenizer)
        return tfm__fail_no_tokenizer(model, error);
    if (b && !model->tokenizer.source.has_pairs)
        return tfm__fail(error, TFM_ERROR_UNSUPPORTED, "%s: the tokenizer has no rule for pairs of texts",
                         model->file->name);
    memset(&encoder, 0, sizeof encoder);
    encoder.tokenizer = &model->tokenizer;
    encoder.flags = flags;
    encoder.ids = ids;
    encoder.types = types;
    encoder.capacity = capacity;
    encoder.error = error;
    tfm__encode_begin(&encoder, stack, NULL, 0);
    return tfm__encode(&encoder, a, a_size, b, b_size, n_ids);
}

TFM_API tfm_status tfm_decode(const tfm_model *model, const int32_t *ids, size_t n_ids, char *text, size_t capacity,
                              size_t *size, tfm_error *error) {
    unsigned char memory[TFM__MAX_PIECE_TEXT];
    tfm__decoder decoder;
    size_t piece_size;
    *size = 0;
    if (!model->has_tokenizer)
        return tfm__fail_no_tokenizer(model, error);
    memset(&decoder, 0, sizeof decoder);
    for (; decoder.n_ids < n_ids; decoder.n_ids++, decoder.size = *size) {
        int32_t id = ids[decoder.n_ids];
        const unsigned char *piece;
        if (!tfm__token_bytes(&model->tokenizer, id, &piece_size))
            return tfm__fail(error, TFM_ERROR_ARGUMENT, "%ld is not the id of a token", (long)id);
        piece = tfm__kind_decode(&model->tokenizer, id, &decoder, memory, &piece_size);
        if (text && *size < capacity && piece_size > 0)
            memcpy(text + *size, piece, TFM__MIN(piece_size, capacity - *size));
        *size += piece_size;
    }
    return TFM_OK;
}

TFM_API const char *tfm_token_text(const tfm_model *model, int32_t id, size_t *size) {
    *size = 0;
    return model->has_tokenizer ? (const char *)tfm__token_text(&model->tokenizer, id, size) : NULL;
}

TFM_API int32_t tfm_token_id(const tfm_model *model, const char *text, size_t size) {
    const tfm__tokenizer *tokenizer = &model->tokenizer;
    int32_t found = -1;
    size_t token_size, i;
    for (i = 0; model->has_tokenizer && size > 0 && i < tokenizer->source.n_tokens; i++) {
        const unsigned char *token = tfm__token_bytes(tokenizer, (int32_t)i, &token_size);
        if (token_size != size || memcmp(token, text, size) != 0)
            continue;
        if (tokenizer->token_flags[i])
            return (int32_t)i;
        found = found < 0 ? (int32_t)i : found;
    }
    return found;
}

TFM_API int32_t tfm_mask_token(const tfm_model *model) {
    return model->has_tokenizer ? model->mask_id : -1;
}

/* Bytes of the longest token, and of what an unknown one is written as. */
static size_t tfm__longest_token(const tfm_model *model) {
    size_t longest = model->tokenizer.source.unk_surface_size, size, i;
    for (i = 0; model->has_tokenizer && i < model->tokenizer.source.n_tokens; i++) {
        tfm__token_text(&model->tokenizer, (int32_t)i, &size);
        longest = TFM__MAX(longest, size);
    }
    return longest;
}

TFM_API int tfm_is_special_token(const tfm_model *model, int32_t id) {
    return model->has_tokenizer && tfm__token_is_special(&model->tokenizer, id);
}

TFM_API int32_t tfm_start_token(const tfm_model *model) {
    return model->start_id;
}

TFM_API int tfm_is_end_token(const tfm_model *model, int32_t id) {
    size_t i;
    for (i = 0; i < model->n_end_ids; i++)
        if (model->end_ids[i] == id)
            return 1;
    return 0;
}

/* =====================================================================================================================
 * h. SESSIONS, SAMPLING, GENERATION, CHAT
 * ================================================================================================================== */

struct tfm_session {
    tfm_allocator allocator;
    const tfm_model *model;
    tfm_engine *engine;
    size_t context, n_sequences, max_rows;
    size_t n_pages; /* pages of each sequence */
    tfm_dtype kv_dtype;
    void *pool;             /* the sequences' keys and values */
    uint32_t *pages;        /* [n_sequences][n_pages] */
    tfm_kv *kv;             /* [n_sequences] */
    size_t source;          /* tokens of the longest text for the encoder, 0 without one */
    void *memory_pool;      /* the keys and values that cross-attention reads */
    uint32_t *memory_pages; /* [n_sequences][source pages] */
    tfm_kv *memories;       /* [n_sequences] */
    int32_t *tokens;        /* [n_sequences][context]: what is in the caches */
    tfm_span *spans;        /* [n_sequences, and at least TFM__TEXTS] */
    size_t *wanted;         /* [n_sequences]: how many of each span's rows, the last ones, have outputs */
    unsigned char *in_call; /* [n_sequences]: it has a chunk in this call */
    float *x;               /* [max_rows][d_model]: the activations */
    float *selected;        /* [max_rows][d_model]: those whose results are wanted */
    int32_t *ids;           /* [max_rows]: the tokens of a pass, with their positions: */
    int32_t *positions;     /* [max_rows] */
    int32_t *types;         /* [max_rows]: token types, for encoders; and their masks: 0 or -INFINITY */
    float *masks;           /* [max_rows] */
    /* for generation */
    int32_t *prompt; /* [context, and at least source] */
    float *logits;   /* [vocab_size] */
    int32_t *work;   /* [vocab_size] */
    char *text;      /* [text_size]: text that is held back */
    size_t text_size;
    void *search_memory; /* of tfm_beam_search and tfm_generate_batch; grows, never shrinks */
    size_t search_size;
};

/* ---- creation */

/* Pieces of one allocation: first with memory NULL to add up the sizes, then again for the addresses. */
typedef struct tfm__carver {
    char *memory;
    size_t used;
} tfm__carver;

static void *tfm__carve(tfm__carver *carver, size_t n, size_t size) {
    size_t bytes = tfm__product(n, size);
    char *piece = carver->memory ? carver->memory + carver->used : NULL;
    bytes = bytes > SIZE_MAX / 64 ? SIZE_MAX / 64 : tfm__round_up(bytes, TFM__CACHE_LINE);
    carver->used = carver->used > SIZE_MAX / 2 ? carver->used : carver->used + bytes;
    return piece;
}

/* The longest stop string, and the longest character, that may have to be held back. */
#define TFM__MAX_STOP_STRING ((size_t)1024)

/* Texts that one pass of an encoder takes at most. */
#define TFM__TEXTS ((size_t)64)

static size_t tfm__kv_pages(size_t tokens) {
    return tfm__divide_up(tokens, TFM_KV_PAGE);
}

static void tfm__carve_session(tfm_session *session, tfm__carver *carver) {
    const tfm_description *d = &session->model->description;
    size_t rows = session->max_rows, sequences = session->n_sequences;
    session->pages = (uint32_t *)tfm__carve(carver, sequences * session->n_pages, sizeof *session->pages);
    session->kv = (tfm_kv *)tfm__carve(carver, sequences, sizeof *session->kv);
    session->memory_pages =
        (uint32_t *)tfm__carve(carver, sequences * tfm__kv_pages(session->source), sizeof *session->memory_pages);
    session->memories = (tfm_kv *)tfm__carve(carver, sequences, sizeof *session->memories);
    session->tokens = (int32_t *)tfm__carve(carver, tfm__product(sequences, session->context), sizeof *session->tokens);
    session->spans = (tfm_span *)tfm__carve(carver, TFM__MAX(sequences, TFM__TEXTS), sizeof *session->spans);
    session->wanted = (size_t *)tfm__carve(carver, sequences, sizeof *session->wanted);
    session->in_call = (unsigned char *)tfm__carve(carver, sequences, 1);
    session->x = (float *)tfm__carve(carver, tfm__product(rows, d->d_model), sizeof *session->x);
    session->selected = (float *)tfm__carve(carver, tfm__product(rows, d->d_model), sizeof *session->selected);
    session->ids = (int32_t *)tfm__carve(carver, rows, sizeof *session->ids);
    session->positions = (int32_t *)tfm__carve(carver, rows, sizeof *session->positions);
    session->types = (int32_t *)tfm__carve(carver, rows, sizeof *session->types);
    session->masks = (float *)tfm__carve(carver, rows, sizeof *session->masks);
    session->prompt =
        (int32_t *)tfm__carve(carver, TFM__MAX(session->context, session->source), sizeof *session->prompt);
    session->logits = (float *)tfm__carve(carver, d->vocab_size, sizeof *session->logits);
    session->work = (int32_t *)tfm__carve(carver, d->vocab_size, sizeof *session->work);
    session->text = (char *)tfm__carve(carver, session->text_size, 1);
}

/* Caches for all sequences, of `tokens` tokens each, in one pool. */
static tfm_status tfm__session_caches(tfm_session *session, size_t tokens, tfm_kv *caches, uint32_t *pages, void **pool,
                                      tfm_error *error) {
    const tfm_stack *stack = session->model->decoder.shape;
    size_t n_pages = tfm__kv_pages(tokens), size, i;
    tfm_kv kv;
    memset(&kv, 0, sizeof kv);
    kv.dtype = session->kv_dtype;
    kv.n_layers = stack->n_layers;
    kv.n_kv_heads = stack->n_kv_heads;
    kv.head_dim = stack->head_dim;
    kv.capacity = tokens;
    kv.page_tokens = TFM_KV_PAGE;
    kv.n_pool_pages = tfm__product(session->n_sequences, n_pages);
    size = tfm__kv_bytes(&kv, kv.n_pool_pages);
    kv.pool = *pool = tfm__allocate_large(&session->allocator, size);
    if (!kv.pool)
        return tfm__fail_memory(error, size);
    for (i = 0; i < kv.n_pool_pages; i++)
        pages[i] = (uint32_t)i;
    for (i = 0; i < session->n_sequences; i++) {
        kv.pages = pages + i * n_pages;
        caches[i] = kv;
    }
    return TFM_OK;
}

static tfm_status tfm__session_memory(tfm_session *session, tfm_error *error) {
    tfm__carver carver = {NULL, 0};
    tfm_status status = TFM_OK;
    tfm__carve_session(session, &carver);
    carver.memory = (char *)tfm__allocate_large(&session->allocator, carver.used);
    if (!carver.memory)
        return tfm__fail_memory(error, carver.used);
    memset(carver.memory, 0, carver.used);
    carver.used = 0;
    tfm__carve_session(session, &carver);
    if (session->model->description.kind != TFM_ENCODER)
        status = tfm__session_caches(session, session->context, session->kv, session->pages, &session->pool, error);
    if (status == TFM_OK && session->model->description.kind == TFM_ENCODER_DECODER)
        status = tfm__session_caches(session, session->source, session->memories, session->memory_pages,
                                     &session->memory_pool, error);
    return status;
}

/* Scratch of embedding rows. */
static size_t tfm__embed_scratch(const tfm_model *model, size_t rows) {
    if (!model->embedding_projection.weight.data)
        return 0;
    return tfm__scratch_floats(rows, model->description.d_embedding) +
           tfm__linear_scratch(&model->embedding_projection, rows);
}

/* Scratch of the logits of n rows: see tfm__logits. */
static size_t tfm__logits_scratch(const tfm_model *model, size_t n) {
    const tfm_description *d = &model->description;
    size_t scratch = d->head == TFM_NO_HEAD ? 0 : tfm__linear_scratch(&model->head, n);
    if (d->head_transform)
        scratch = TFM__MAX(scratch, tfm__linear_scratch(&model->head_transform, n));
    return scratch + tfm__scratch_floats(n, TFM__MAX(d->d_model, d->d_embedding));
}

static size_t tfm__stack_scratch(const tfm_model *model, const tfm__stack *stack, const tfm_span *spans, size_t n_spans,
                                 size_t reach) {
    size_t rows = tfm__count_rows(spans, n_spans), scratch = tfm__embed_scratch(model, rows);
    if (stack->shape->n_layers) /* blocks are alike */
        scratch = TFM__MAX(scratch, tfm__pass_scratch(&stack->blocks->attention, rows, reach) +
                                        tfm__block_scratch(stack->blocks, spans, n_spans));
    return TFM__MAX(scratch, tfm__logits_scratch(model, rows));
}

/* Scratch of the longest source: see tfm_set_source. */
static size_t tfm__source_scratch(const tfm_session *session) {
    const tfm_model *model = session->model;
    size_t floats;
    tfm_span span;
    memset(&span, 0, sizeof span);
    span.n_rows = session->source;
    floats = tfm__stack_scratch(model, &model->encoder, &span, 1, session->source);
    if (model->decoder.shape->n_layers)
        floats = TFM__MAX(floats, tfm__memory_scratch(&model->decoder.blocks->cross, session->source));
    return floats;
}

/* Scratch for the largest pass that there can be, so that tfm_eval and tfm_set_source never allocate. (tfm_encode may: what
 * it needs depends on the texts.) */
static tfm_status tfm__session_scratch(tfm_session *session, tfm_error *error) {
    const tfm_model *model = session->model;
    size_t floats = 0;
    if (model->description.kind != TFM_ENCODER) {
        size_t i;
        for (i = 0; i < session->n_sequences; i++)
            session->spans[i].kv = session->kv + i;
        session->spans[0].n_rows = session->max_rows;
        floats = tfm__stack_scratch(model, &model->decoder, session->spans, session->n_sequences, session->context);
        session->spans[0].n_rows = 0;
    }
    if (model->description.kind == TFM_ENCODER_DECODER)
        floats = TFM__MAX(floats, tfm__source_scratch(session));
    if (model->has_tokenizer) {
        size_t longest = TFM__MAX(session->context, session->source);
        size_t bytes = tfm__product(longest, TFM__MIN(tfm__longest_token(model), (size_t)64));
        floats = TFM__MAX(floats, tfm__kind_scratch(&model->tokenizer, bytes) / sizeof(float) + 1);
    }
    return tfm__reserve(session->engine, floats, error);
}

/* So many tokens as asked for, if the stack has positions for them: relative positions know no end. */
static tfm_status tfm__session_size(const tfm_stack *stack, size_t asked, size_t *size, tfm_error *error) {
    *size = asked ? asked : stack->n_positions;
    if (*size > TFM__MAX_SIZE)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "a context of %lu tokens is more than %lu", (unsigned long)*size,
                         (unsigned long)TFM__MAX_SIZE);
    if (*size <= stack->n_positions || stack->positions == TFM_RELATIVE_POSITIONS)
        return TFM_OK;
    return tfm__fail(error, TFM_ERROR_ARGUMENT,
                     "a context of %lu tokens was asked for, but the model has %lu positions", (unsigned long)asked,
                     (unsigned long)stack->n_positions);
}

static tfm_status tfm__session_sizes(tfm_session *session, const tfm_session_options *options, tfm_error *error) {
    const tfm_description *d = &session->model->description;
    const tfm__stack *stack = tfm__main_stack(session->model);
    tfm_status status = tfm__session_size(stack->shape, options->context, &session->context, error);
    session->n_sequences = options->n_sequences ? options->n_sequences : 1;
    if (status == TFM_OK && d->kind != TFM_DECODER)
        status = tfm__session_size(&d->encoder, options->source, &session->source, error);
    if (status != TFM_OK)
        return status;
    if (d->kind == TFM_ENCODER)
        session->source = session->context;
    session->kv_dtype = options->kv_dtype;
    if (!session->kv_dtype)
        session->kv_dtype = stack->shape->n_layers ? tfm__kv_dtype_of(&stack->blocks->attention) : TFM_F32;
    if (!tfm__is_kv_dtype(session->kv_dtype))
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "the KV cache can be f32, f16, bf16 or int8");
    session->n_pages = tfm__kv_pages(TFM__MAX(session->context, session->source));
    if (session->n_sequences > (size_t)TFM__MAX_SIZE / session->n_pages)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "%lu sequences are too many", (unsigned long)session->n_sequences);
    session->n_pages = tfm__kv_pages(session->context);
    session->max_rows = options->max_rows ? options->max_rows : d->kind == TFM_ENCODER ? 1024 : 512;
    session->max_rows = TFM__MAX(session->max_rows, session->n_sequences);
    if (d->kind != TFM_ENCODER)
        session->max_rows = TFM__MIN(session->max_rows, tfm__product(session->context, session->n_sequences));
    session->max_rows = TFM__MAX(session->max_rows, session->source); /* an encoder sees all of a text at once */
    session->text_size =
        TFM__MAX_STOP_STRING + TFM__MAX(tfm__longest_token(session->model), (size_t)TFM__MAX_PIECE_TEXT) + 8;
    return TFM_OK;
}

static tfm_status tfm__session_setup(tfm_session *session, const tfm_session_options *options, tfm_error *error) {
    tfm_status status = tfm__session_sizes(session, options, error);
    if (status == TFM_OK)
        status = tfm__session_memory(session, error);
    if (status != TFM_OK)
        return status;
    session->engine = tfm_engine_create(&options->engine, error);
    if (!session->engine)
        return error->status;
    session->engine->threads.process = session->model->process;
    return tfm__session_scratch(session, error);
}

TFM_API tfm_session *tfm_session_create(const tfm_model *model, const tfm_session_options *options, tfm_error *error) {
    tfm_session_options usual;
    tfm_allocator allocator;
    tfm_session *session;
    tfm_error unread;
    memset(&usual, 0, sizeof usual);
    if (!options)
        options = &usual;
    error = error ? error : &unread;
    if (model->only_tokenizer) {
        tfm__fail(error, TFM_ERROR_UNSUPPORTED, "%s: has a tokenizer, but no model to run", model->file->name);
        return NULL;
    }
    allocator = tfm__allocator(&options->engine.allocator);
    session = (tfm_session *)tfm__allocate_zeroed(&allocator, sizeof *session);
    if (!session) {
        tfm__fail_memory(error, sizeof *session);
        return NULL;
    }
    session->allocator = allocator;
    session->model = model;
    if (tfm__session_setup(session, options, error) == TFM_OK)
        return session;
    tfm_session_free(session);
    return NULL;
}

TFM_API void tfm_session_free(tfm_session *session) {
    tfm_allocator allocator;
    if (!session)
        return;
    allocator = session->allocator;
    tfm_engine_free(session->engine);
    tfm__release_aligned(&allocator, session->pool);
    tfm__release_aligned(&allocator, session->memory_pool);
    tfm__release_aligned(&allocator, session->search_memory);
    tfm__release_aligned(&allocator, session->pages); /* the first of the carved pieces */
    tfm__release(&allocator, session);
}

TFM_API const tfm_model *tfm_session_model(const tfm_session *session) {
    return session->model;
}

TFM_API tfm_engine *tfm_session_engine(tfm_session *session) {
    return session->engine;
}

TFM_API size_t tfm_session_context(const tfm_session *session) {
    return session->context;
}

/* ---- the forward pass */

typedef struct tfm__embed_job {
    const tfm_engine *engine;
    const tfm_model *model;
    const tfm__stack *stack;
    const int32_t *ids, *positions, *types; /* [rows] */
    float *x;                               /* [rows][d_embedding] */
} tfm__embed_job;

/* x[n] += a row of a table */
static void tfm__add_row(const tfm_tensor *table, size_t row, size_t n, float *x) {
    float part[64];
    size_t k, i, size;
    for (k = 0; k < n; k += size) {
        size = TFM__MIN(sizeof part / sizeof *part, n - k);
        tfm__matrix_row(table, row, k, size, part);
        for (i = 0; i < size; i++)
            x[k + i] += part[i];
    }
}

static void tfm__add_sinusoids(size_t position, size_t n, float *x) {
    size_t i;
    for (i = 0; i < n; i++) {
        double angle = (double)position * exp(-log(10000.0) * (double)(i / 2 * 2) / (double)n);
        x[i] += (float)(i % 2 ? cos(angle) : sin(angle));
    }
}

/* x = norm(token_embedding[id] * scale + token_type_embedding[type] + position_embedding[position]) */
static void tfm__embed_row(void *argument, size_t row) {
    const tfm__embed_job *job = (const tfm__embed_job *)argument;
    const tfm_description *d = &job->model->description;
    const tfm_stack *shape = job->stack->shape;
    const tfm_norm *norm = &job->stack->embedding_norm;
    const size_t n = d->d_embedding, position = (size_t)job->positions[row] + shape->position_offset;
    float *x = job->x + row * n;
    size_t i;
    tfm__matrix_row(&job->model->token_embedding, (size_t)job->ids[row], 0, n, x);
    if (d->embedding_scale != 1)
        for (i = 0; i < n; i++)
            x[i] *= d->embedding_scale;
    if (d->n_token_types)
        tfm__add_row(&job->model->token_type_embedding, (size_t)job->types[row], n, x);
    if (shape->positions == TFM_LEARNED_POSITIONS)
        tfm__add_row(&job->stack->position_embedding, position, n, x);
    else if (shape->positions == TFM_SINUSOIDAL_POSITIONS)
        tfm__add_sinusoids(position, n, x);
    if (shape->embedding_norm)
        job->engine->kernels->norm[norm->kind](x, n, (const float *)norm->weight.data, (const float *)norm->bias.data,
                                               norm->eps, x);
}

/* The session's first `rows` ids to session->x. */
static void tfm__embed(tfm_session *session, const tfm__stack *stack, size_t rows) {
    const tfm_model *model = session->model;
    tfm_engine *engine = session->engine;
    const size_t mark = engine->scratch_used;
    const tfm_linear *projection = &model->embedding_projection;
    tfm__embed_job job;
    job.engine = engine;
    job.model = model;
    job.stack = stack;
    job.ids = session->ids;
    job.positions = session->positions;
    job.types = session->types;
    job.x = projection->weight.data ? tfm__take(engine, rows, model->description.d_embedding) : session->x;
    tfm__run(engine, rows, 16 * model->description.d_embedding, tfm__embed_row, &job);
    if (projection->weight.data)
        tfm__linear(engine, projection, tfm__input_of(job.x, rows, NULL), TFM_NO_ACTIVATION,
                    tfm__result_in(session->x, 0));
    engine->scratch_used = mark;
}

/* One pass: the session's first ids, as many as the spans have rows, through all blocks. Returns the results of the last
 * wanted[i] rows of span i, or, for wanted = NULL, of all rows. */
static float *tfm__forward(tfm_session *session, const tfm__stack *stack, size_t n_spans, const size_t *wanted) {
    const size_t n_layers = stack->shape->n_layers, mark = session->engine->scratch_used;
    const tfm_span *spans = session->spans;
    tfm__pass pass;
    size_t layer;
    tfm__embed(session, stack, tfm__count_rows(spans, n_spans));
    if (n_layers) {
        pass = tfm__begin_pass(session->engine, &stack->blocks->attention, spans, n_spans);
        for (layer = 0; layer < n_layers; layer++)
            tfm__block(session->engine, stack->blocks + layer, layer, &pass, session->x,
                       layer + 1 < n_layers ? NULL : wanted, session->selected);
        session->engine->scratch_used = mark;
    } else if (wanted) {
        memset(&pass, 0, sizeof pass);
        pass.spans = spans;
        pass.n_spans = n_spans;
        tfm__keep_rows(session->x, session->model->description.d_model, &pass, wanted, session->selected);
    }
    return wanted ? session->selected : session->x;
}

/* logits[n][vocab_size] of results x[n][d_model], which go through the stack's norm (or NULL) first. */
static void tfm__logits(tfm_engine *engine, const tfm_model *model, const tfm_norm *norm, const float *x, size_t n,
                        float *logits) {
    const tfm_description *d = &model->description;
    const size_t mark = engine->scratch_used, width = d->head_transform ? d->d_embedding : d->d_model;
    tfm__input input = tfm__input_of(x, n, norm);
    if (d->head_transform || d->logit_scale != 1) {
        float *t = tfm__take(engine, n, TFM__MAX(d->d_model, d->d_embedding));
        if (d->head_transform) {
            tfm__linear(engine, &model->head_transform, input, d->head_transform, tfm__result_in(t, 0));
            tfm__norm(engine, &model->head_norm, t, n, t);
        } else if (norm)
            tfm__norm(engine, norm, x, n, t);
        else
            memcpy(t, x, n * width * sizeof *t);
        if (d->logit_scale != 1)
            engine->kernels->scale(t, n * width, d->logit_scale);
        input = tfm__input_of(t, n, NULL);
    }
    tfm__linear(engine, &model->head, input, TFM_NO_ACTIVATION, tfm__result_in(logits, 0));
    if (d->logit_softcap > 0) {
        tfm__finish tanh_of;
        memset(&tanh_of, 0, sizeof tanh_of);
        tanh_of.x = tanh_of.y = logits;
        tanh_of.n_rows = 1;
        tanh_of.n = n * d->vocab_size;
        tanh_of.activation = TFM_TANH;
        engine->kernels->scale(logits, tanh_of.n, 1 / d->logit_softcap);
        engine->kernels->finish(&tanh_of);
        engine->kernels->scale(logits, tanh_of.n, d->logit_softcap);
    }
    engine->scratch_used = mark;
}

/* Final norm, and head if logits are wanted, of the n results x. */
static void tfm__output(tfm_session *session, const tfm__stack *stack, const float *x, size_t n, tfm_output what,
                        float *outputs) {
    const tfm_norm *norm = stack->shape->final_norm ? &stack->final_norm : NULL;
    if (!n)
        return;
    if (what == TFM_LOGITS)
        tfm__logits(session->engine, session->model, norm, x, n, outputs);
    else if (norm)
        tfm__norm(session->engine, norm, x, n, outputs);
    else if (outputs != x)
        memcpy(outputs, x, n * session->model->description.d_model * sizeof *outputs);
}

static tfm_status tfm__check_chunk(tfm_session *session, const tfm_chunk *chunk, size_t index, tfm_error *error) {
    size_t vocab_size = session->model->description.vocab_size, n_tokens, i;
    if (chunk->sequence >= session->n_sequences)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "chunk %lu: sequence %lu, but the session has %lu",
                         (unsigned long)index, (unsigned long)chunk->sequence, (unsigned long)session->n_sequences);
    if (session->in_call[chunk->sequence])
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "chunk %lu: sequence %lu has another chunk in this call",
                         (unsigned long)index, (unsigned long)chunk->sequence);
    if (!chunk->n_tokens || chunk->n_outputs > chunk->n_tokens)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "chunk %lu: %lu tokens and %lu outputs", (unsigned long)index,
                         (unsigned long)chunk->n_tokens, (unsigned long)chunk->n_outputs);
    n_tokens = session->kv[chunk->sequence].n_tokens;
    if (chunk->n_tokens > session->context - n_tokens)
        return tfm__fail(error, TFM_ERROR_CONTEXT_FULL,
                         "the context is full: it has room for %lu tokens, %lu are taken and %lu more were given",
                         (unsigned long)session->context, (unsigned long)n_tokens, (unsigned long)chunk->n_tokens);
    for (i = 0; i < chunk->n_tokens; i++)
        if (chunk->tokens[i] < 0 || (size_t)chunk->tokens[i] >= vocab_size)
            return tfm__fail(error, TFM_ERROR_ARGUMENT, "token id %ld is out of range: the vocabulary has %lu",
                             (long)chunk->tokens[i], (unsigned long)vocab_size);
    if (session->model->description.kind == TFM_ENCODER_DECODER && !session->memories[chunk->sequence].n_tokens)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "sequence %lu has no text that it answers to: see tfm_set_source",
                         (unsigned long)chunk->sequence);
    session->in_call[chunk->sequence] = 1;
    return TFM_OK;
}

static tfm_status tfm__check_chunks(tfm_session *session, const tfm_chunk *chunks, size_t n_chunks, tfm_output what,
                                    const float *outputs, tfm_error *error) {
    size_t wanted = 0, i;
    tfm_status status = TFM_OK;
    if (session->model->description.kind == TFM_ENCODER || !session->model->description.vocab_size)
        return tfm__fail(error, TFM_ERROR_UNSUPPORTED, "the model is no decoder of tokens: see tfm_encode");
    if (what == TFM_POOLED)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "a decoder has logits and hidden states, and no pooled output");
    if (what != TFM_LOGITS && what != TFM_HIDDEN)
        return tfm__fail(error, TFM_ERROR_ARGUMENT,
                         "a decoder has logits and hidden states, and no output of the kind %d", (int)what);
    memset(session->in_call, 0, session->n_sequences);
    for (i = 0; i < n_chunks && status == TFM_OK; i++) {
        status = tfm__check_chunk(session, chunks + i, i, error);
        wanted += chunks[i].n_outputs;
    }
    if (status == TFM_OK && wanted && !outputs)
        status = tfm__fail(error, TFM_ERROR_ARGUMENT, "outputs are wanted, but there is no place for them");
    if (status == TFM_OK && wanted && what == TFM_LOGITS && session->model->description.head == TFM_NO_HEAD)
        status = tfm__fail(error, TFM_ERROR_UNSUPPORTED, "the model has no head, and so no logits");
    return status;
}

/* Checked chunks on their way through the passes. */
typedef struct tfm__evaluation {
    tfm_session *session;
    const tfm_chunk *chunks;
    size_t n_chunks;
    tfm_output what;
    float *outputs;
    size_t chunk, done; /* where the next pass begins: this chunk, after so many of its tokens */
} tfm__evaluation;

/* Gathers a pass: as many tokens as there are rows, from as many chunks as that takes. */
static void tfm__gather(tfm__evaluation *e, size_t *n_spans) {
    tfm_session *session = e->session;
    size_t rows = 0, i;
    for (*n_spans = 0; e->chunk < e->n_chunks && rows < session->max_rows; ++*n_spans) {
        const tfm_chunk *from = e->chunks + e->chunk;
        tfm_kv *kv = session->kv + from->sequence;
        size_t n = TFM__MIN(from->n_tokens - e->done, session->max_rows - rows);
        size_t end = e->done + n, unwanted = from->n_tokens - from->n_outputs;
        int32_t *tokens = session->tokens + from->sequence * session->context + kv->n_tokens;
        memmove(tokens, from->tokens + e->done, n * sizeof *tokens); /* tfm_shift gives the sequence's own */
        memcpy(session->ids + rows, tokens, n * sizeof *tokens);
        for (i = 0; i < n; i++)
            session->positions[rows + i] = (int32_t)(kv->n_tokens + i);
        memset(session->spans + *n_spans, 0, sizeof *session->spans);
        session->spans[*n_spans].kv = kv;
        session->spans[*n_spans].memory = session->memories + from->sequence;
        session->spans[*n_spans].n_rows = n;
        session->wanted[*n_spans] = end > unwanted ? TFM__MIN(end - unwanted, n) : 0;
        rows += n;
        e->done += n;
        if (e->done == from->n_tokens)
            e->chunk++, e->done = 0;
    }
}

static void tfm__evaluate(void *argument) {
    tfm__evaluation *e = (tfm__evaluation *)argument;
    tfm_session *session = e->session;
    const tfm_description *d = &session->model->description;
    const tfm__stack *stack = &session->model->decoder;
    size_t output_size = e->what == TFM_LOGITS ? d->vocab_size : d->d_model;
    while (e->chunk < e->n_chunks) {
        size_t n_spans, n_selected = 0, i;
        const float *x;
        tfm__gather(e, &n_spans);
        x = tfm__forward(session, stack, n_spans, session->wanted);
        for (i = 0; i < n_spans; i++) {
            session->spans[i].kv->n_tokens += session->spans[i].n_rows;
            n_selected += session->wanted[i];
        }
        tfm__output(session, stack, x, n_selected, e->what, e->outputs);
        if (n_selected) /* without any, outputs may be NULL */
            e->outputs += n_selected * output_size;
    }
}

TFM_API tfm_status tfm_eval(tfm_session *session, const tfm_chunk *chunks, size_t n_chunks, tfm_output what,
                            float *outputs, tfm_error *error) {
    tfm__evaluation evaluation;
    tfm_status status = tfm__check_chunks(session, chunks, n_chunks, what, outputs, error);
    if (status != TFM_OK)
        return status;
    evaluation.session = session;
    evaluation.chunks = chunks;
    evaluation.n_chunks = n_chunks;
    evaluation.what = what;
    evaluation.outputs = outputs;
    evaluation.chunk = evaluation.done = 0;
    tfm__with_threads(&session->engine->threads, tfm__evaluate, &evaluation);
    return TFM_OK;
}

/* ---- encoding */

static tfm_status tfm__check_text(const tfm_session *session, const tfm_text *text, size_t index, tfm_error *error) {
    const tfm_description *d = &session->model->description;
    size_t i;
    if (!text->n_tokens || text->n_tokens > session->source)
        return tfm__fail(error, text->n_tokens ? TFM_ERROR_CONTEXT_FULL : TFM_ERROR_ARGUMENT,
                         "text %lu has %lu tokens, and can have 1 to %lu", (unsigned long)index,
                         (unsigned long)text->n_tokens, (unsigned long)session->source);
    for (i = 0; i < text->n_tokens; i++) {
        if (text->tokens[i] < 0 || (size_t)text->tokens[i] >= d->vocab_size)
            return tfm__fail(error, TFM_ERROR_ARGUMENT, "token id %ld is out of range: the vocabulary has %lu",
                             (long)text->tokens[i], (unsigned long)d->vocab_size);
        if (text->types && (text->types[i] < 0 || (size_t)text->types[i] >= TFM__MAX(d->n_token_types, 1)))
            return tfm__fail(error, TFM_ERROR_ARGUMENT, "token type %ld is out of range: the model has %lu",
                             (long)text->types[i], (unsigned long)d->n_token_types);
    }
    return TFM_OK;
}

/* A pass takes texts from the first on, until rows or spans run out. Returns how many. */
static size_t tfm__gather_texts(tfm_session *session, const tfm_text *texts, size_t n_texts) {
    size_t rows = 0, n, i;
    for (n = 0; n < n_texts && n < TFM__TEXTS && texts[n].n_tokens <= session->max_rows - rows; n++) {
        for (i = 0; i < texts[n].n_tokens; i++) {
            session->ids[rows + i] = texts[n].tokens[i];
            session->types[rows + i] = texts[n].types ? texts[n].types[i] : 0;
            session->masks[rows + i] = texts[n].mask && !texts[n].mask[i] ? -INFINITY : 0;
            session->positions[rows + i] = (int32_t)i;
        }
        memset(session->spans + n, 0, sizeof *session->spans);
        session->spans[n].n_rows = texts[n].n_tokens;
        session->spans[n].mask = texts[n].mask ? session->masks + rows : NULL;
        session->spans[n].same_mask = 1;
        rows += texts[n].n_tokens;
    }
    return n;
}

/* y[d_model] = the rows x[n][d_model] of one text pooled, those that the mask (or NULL) shows. */
static void tfm__pool(tfm_pooling pooling, const float *x, const float *mask, size_t n, size_t d_model, float *y) {
    size_t row, i, pooled = 0;
    memset(y, 0, d_model * sizeof *y);
    for (row = 0; row < n; row++) {
        const float *from = x + row * d_model;
        if ((mask && mask[row] != 0) || (pooling == TFM_POOL_CLS && pooled))
            continue;
        for (i = 0; i < d_model; i++)
            y[i] = !pooled ? from[i] : pooling == TFM_POOL_MEAN ? y[i] + from[i] : from[i] > y[i] ? from[i] : y[i];
        pooled++;
    }
    for (i = 0; i < d_model && pooling == TFM_POOL_MEAN && pooled; i++)
        y[i] /= (float)pooled;
}

/* y / |y| */
static void tfm__to_length_1(float *y, size_t n) {
    double sum = 0;
    float length;
    size_t i;
    for (i = 0; i < n; i++)
        sum += (double)y[i] * (double)y[i];
    length = TFM__MAX((float)sqrt(sum), 1e-12f);
    for (i = 0; i < n; i++)
        y[i] /= length;
}

/* Texts on their way through one pass. */
typedef struct tfm__encoding {
    tfm_session *session;
    size_t n_texts; /* of this pass */
    tfm_output what;
    tfm_pooling pooling;
    int normalize;
    float *outputs;
    size_t n_outputs; /* numbers written */
} tfm__encoding;

/* Each text's first row, side by side: [n_texts][d_model] */
static float *tfm__first_rows(tfm__encoding *e, const float *x) {
    const size_t d_model = e->session->model->description.d_model;
    float *first = tfm__take(e->session->engine, e->n_texts, d_model);
    size_t row = 0, i;
    for (i = 0; i < e->n_texts; i++) {
        memcpy(first + i * d_model, x + row * d_model, d_model * sizeof *first);
        row += e->session->spans[i].n_rows;
    }
    return first;
}

static void tfm__encode_pooled(tfm__encoding *e, const float *x) {
    const tfm_model *model = e->session->model;
    const size_t d_model = model->description.d_model;
    float *y = e->outputs;
    size_t i;
    if (e->pooling == TFM_NO_POOLING) /* the pooler */
        tfm__linear(e->session->engine, &model->pooler, tfm__input_of(tfm__first_rows(e, x), e->n_texts, NULL),
                    model->description.pooler_activation, tfm__result_in(y, 0));
    for (i = 0; i < e->n_texts; i++, y += d_model) {
        const size_t rows = e->session->spans[i].n_rows;
        if (e->pooling != TFM_NO_POOLING)
            tfm__pool(e->pooling, x, e->session->spans[i].mask, rows, d_model, y);
        if (e->normalize)
            tfm__to_length_1(y, d_model);
        x += rows * d_model;
    }
    e->n_outputs = e->n_texts * d_model;
}

static void tfm__encode_classes(tfm__encoding *e, const float *x, size_t rows) {
    const tfm_model *model = e->session->model;
    const tfm_description *d = &model->description;
    tfm_engine *engine = e->session->engine;
    size_t n = d->classifier == TFM_TOKEN_CLASSIFIER ? rows : e->n_texts;
    tfm__input input = tfm__input_of(d->classifier == TFM_TOKEN_CLASSIFIER ? x : tfm__first_rows(e, x), n, NULL);
    if (d->classifier_activation) {
        float *dense = tfm__take(engine, n, d->d_model);
        tfm__linear(engine, &model->classifier_dense, input, d->classifier_activation, tfm__result_in(dense, 0));
        input = tfm__input_of(dense, n, NULL);
    }
    tfm__linear(engine, &model->classifier, input, TFM_NO_ACTIVATION, tfm__result_in(e->outputs, 0));
    e->n_outputs = n * d->n_labels;
}

/* One pass. */
static void tfm__encode_texts(void *argument) {
    tfm__encoding *e = (tfm__encoding *)argument;
    tfm_session *session = e->session;
    const tfm_description *d = &session->model->description;
    const tfm__stack *stack = &session->model->encoder;
    const size_t mark = session->engine->scratch_used, rows = tfm__count_rows(session->spans, e->n_texts);
    float *x = tfm__forward(session, stack, e->n_texts, NULL);
    if (e->what == TFM_LOGITS || e->what == TFM_HIDDEN) {
        tfm__output(session, stack, x, rows, e->what, e->outputs);
        e->n_outputs = rows * (e->what == TFM_LOGITS ? d->vocab_size : d->d_model);
        return;
    }
    tfm__output(session, stack, x, rows, TFM_HIDDEN, x);
    if (e->what == TFM_POOLED)
        tfm__encode_pooled(e, x);
    else
        tfm__encode_classes(e, x, rows);
    session->engine->scratch_used = mark;
}

/* Scratch of what comes after the blocks, when it is not logits. */
static size_t tfm__classes_scratch(const tfm_model *model, size_t rows) {
    const tfm_linear *layers[3];
    size_t scratch = 0, i;
    layers[0] = &model->pooler;
    layers[1] = &model->classifier_dense;
    layers[2] = &model->classifier;
    for (i = 0; i < 3; i++)
        if (layers[i]->weight.data)
            scratch = TFM__MAX(scratch, tfm__linear_scratch(layers[i], rows));
    return scratch + 2 * tfm__scratch_floats(rows, model->description.d_model);
}

static tfm_status tfm__encode_all(tfm__encoding *e, const tfm_text *texts, size_t n_texts, tfm_error *error) {
    tfm_session *session = e->session;
    const tfm_model *model = session->model;
    tfm_status status = TFM_OK;
    size_t i;
    if (model->description.kind == TFM_DECODER || !model->description.vocab_size)
        return tfm__fail(error, TFM_ERROR_UNSUPPORTED, "the model has no encoder of tokens");
    for (i = 0; i < n_texts && status == TFM_OK; i++)
        status = tfm__check_text(session, texts + i, i, error);
    for (i = 0; i < n_texts && status == TFM_OK; i += e->n_texts) {
        size_t rows;
        e->n_texts = tfm__gather_texts(session, texts + i, n_texts - i);
        rows = tfm__count_rows(session->spans, e->n_texts);
        status = tfm__reserve(session->engine,
                              TFM__MAX(tfm__stack_scratch(model, &model->encoder, session->spans, e->n_texts,
                                                          tfm__reach(session->spans, e->n_texts)),
                                       tfm__classes_scratch(model, rows)),
                              error);
        if (status == TFM_OK)
            tfm__with_threads(&session->engine->threads, tfm__encode_texts, e);
        e->outputs += e->n_outputs;
    }
    return status;
}

TFM_API tfm_status tfm_encode(tfm_session *session, const tfm_text *texts, size_t n_texts, tfm_output what,
                              float *outputs, tfm_error *error) {
    const tfm_description *d = &session->model->description;
    tfm__encoding encoding;
    memset(&encoding, 0, sizeof encoding);
    encoding.session = session;
    encoding.what = what;
    encoding.outputs = outputs;
    encoding.pooling = d->pooling || d->pooler ? d->pooling : TFM_POOL_MEAN;
    encoding.normalize = d->pool_normalize;
    if ((unsigned)what > TFM_CLASSES)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "unknown kind of output %d", (int)what);
    if (what == TFM_LOGITS && (d->head == TFM_NO_HEAD || d->kind != TFM_ENCODER))
        return tfm__fail(error, TFM_ERROR_UNSUPPORTED, "the model's encoder has no head, and so no logits");
    if (what == TFM_CLASSES && !d->classifier)
        return tfm__fail(error, TFM_ERROR_UNSUPPORTED, "the model has no classifier");
    return tfm__encode_all(&encoding, texts, n_texts, error);
}

TFM_API tfm_status tfm_embed(tfm_session *session, const tfm_text *texts, size_t n_texts, tfm_pooling pooling,
                             int normalize, float *vectors, tfm_error *error) {
    const tfm_description *d = &session->model->description;
    tfm__encoding encoding;
    memset(&encoding, 0, sizeof encoding);
    encoding.session = session;
    encoding.what = TFM_POOLED;
    encoding.outputs = vectors;
    encoding.pooling = pooling ? pooling : d->pooling || d->pooler ? d->pooling : TFM_POOL_MEAN;
    encoding.normalize = normalize || (!pooling && d->pool_normalize);
    if ((unsigned)pooling > TFM_POOL_MAX)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "unknown kind of pooling %d", (int)pooling);
    return tfm__encode_all(&encoding, texts, n_texts, error);
}

/* The keys and values of all layers, from the encoder's results in session->selected. */
typedef struct tfm__remembering {
    tfm_session *session;
    tfm_kv *memory;
    size_t n_rows;
} tfm__remembering;

static void tfm__remember(void *argument) {
    tfm__remembering *r = (tfm__remembering *)argument;
    const tfm__stack *stack = &r->session->model->decoder;
    size_t layer;
    for (layer = 0; layer < stack->shape->n_layers; layer++)
        tfm__memory(r->session->engine, stack->blocks + layer, layer, r->session->selected, r->n_rows, r->memory);
    r->memory->n_tokens = r->n_rows;
}

TFM_API tfm_status tfm_set_source(tfm_session *session, size_t sequence, const tfm_text *text, tfm_error *error) {
    const tfm_model *model = session->model;
    const size_t d_model = model->description.d_model;
    size_t i;
    tfm__remembering remembering;
    tfm__encoding encoding;
    tfm_status status;
    if (model->description.kind != TFM_ENCODER_DECODER)
        return tfm__fail(error, TFM_ERROR_UNSUPPORTED, "the model is no encoder-decoder");
    if (sequence >= session->n_sequences)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "sequence %lu, but the session has %lu", (unsigned long)sequence,
                         (unsigned long)session->n_sequences);
    memset(&encoding, 0, sizeof encoding);
    encoding.session = session;
    encoding.what = TFM_HIDDEN;
    encoding.outputs = session->selected;
    status = tfm__encode_all(&encoding, text, 1, error);
    if (status == TFM_OK && model->decoder.shape->n_layers)
        status =
            tfm__reserve(session->engine, tfm__memory_scratch(&model->decoder.blocks->cross, text->n_tokens), error);
    if (status != TFM_OK)
        return status;
    remembering.session = session;
    remembering.memory = session->memories + sequence;
    for (i = remembering.n_rows = 0; i < text->n_tokens; i++) /* of the results only those that the mask shows */
        if (!text->mask || text->mask[i])
            memmove(session->selected + remembering.n_rows++ * d_model, session->selected + i * d_model,
                    d_model * sizeof *session->selected);
    if (!remembering.n_rows)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "the mask hides all of the text");
    remembering.memory->n_tokens = 0;
    session->kv[sequence].n_tokens = 0;
    tfm__with_threads(&session->engine->threads, tfm__remember, &remembering);
    return TFM_OK;
}

/* ---- sequences */

static tfm_status tfm__check_sequence(const tfm_session *session, size_t sequence, tfm_error *error) {
    if (sequence < session->n_sequences)
        return TFM_OK;
    return tfm__fail(error, TFM_ERROR_ARGUMENT, "sequence %lu, but the session has %lu", (unsigned long)sequence,
                     (unsigned long)session->n_sequences);
}

TFM_API const int32_t *tfm_sequence_tokens(const tfm_session *session, size_t sequence, size_t *n_tokens) {
    *n_tokens = 0;
    if (sequence >= session->n_sequences)
        return NULL;
    *n_tokens = session->kv[sequence].n_tokens;
    return session->tokens + sequence * session->context;
}

TFM_API tfm_status tfm_truncate(tfm_session *session, size_t sequence, size_t n_tokens, tfm_error *error) {
    tfm_status status = tfm__check_sequence(session, sequence, error);
    if (status != TFM_OK)
        return status;
    if (n_tokens > session->kv[sequence].n_tokens)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "the sequence has %lu tokens, %lu can't be kept",
                         (unsigned long)session->kv[sequence].n_tokens, (unsigned long)n_tokens);
    session->kv[sequence].n_tokens = n_tokens;
    return TFM_OK;
}

/* A token's keys and values depend on its position and on all tokens before it, so what moves is computed anew. */
TFM_API tfm_status tfm_shift(tfm_session *session, size_t sequence, size_t n_keep, tfm_error *error) {
    tfm_status status = tfm__check_sequence(session, sequence, error);
    int32_t *tokens;
    size_t n_tokens, recent;
    tfm_chunk chunk;
    if (status != TFM_OK)
        return status;
    tokens = session->tokens + sequence * session->context;
    n_tokens = session->kv[sequence].n_tokens;
    if (n_keep >= n_tokens)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "the sequence has %lu tokens: keeping the first %lu makes no room",
                         (unsigned long)n_tokens, (unsigned long)n_keep);
    recent = (n_tokens - n_keep) / 2;
    memmove(tokens + n_keep, tokens + n_tokens - recent, recent * sizeof *tokens);
    session->kv[sequence].n_tokens = n_keep;
    if (!recent)
        return TFM_OK;
    chunk.sequence = sequence;
    chunk.tokens = tokens + n_keep;
    chunk.n_tokens = recent;
    chunk.n_outputs = 0;
    return tfm_eval(session, &chunk, 1, TFM_LOGITS, NULL, error);
}

/* ---- random numbers */

TFM_API double tfm_random_uniform(tfm_random *random) {
    uint32_t half[2];
    int i;
    for (i = 0; i < 2; i++) { /* PCG-XSH-RR */
        uint64_t state = random->state;
        uint32_t mixed = (uint32_t)((state >> 18 ^ state) >> 27), rotation = (uint32_t)(state >> 59);
        random->state = state * 6364136223846793005u + 1442695040888963407u;
        half[i] = mixed >> rotation | mixed << (-rotation & 31);
    }
    return ((double)(half[0] >> 5) * 67108864.0 + (double)(half[1] >> 6)) / 9007199254740992.0; /* 53 bits */
}

TFM_API void tfm_random_seed(tfm_random *random, uint64_t seed) {
    random->state = seed + 1442695040888963407u;
    (void)tfm_random_uniform(random);
}

/* ---- sampling */

/* Likelier first; among equals the lower id. */
static int tfm__compare_logits(const void *context, uint32_t a, uint32_t b) {
    const float *logits = (const float *)context;
    if (logits[a] != logits[b])
        return logits[a] > logits[b] ? -1 : 1;
    return (a > b) - (a < b);
}

/* Arranges items so that the first k are the k that come first in order, in any order among themselves: Hoare's FIND with
 * the median of three as pivot. Each round leaves out at least the two that it swapped or found in place. */
static void tfm__select(uint32_t *items, size_t n, size_t k, tfm__compare compare, const void *context) {
    ptrdiff_t low = 0, high = (ptrdiff_t)n - 1, wanted = (ptrdiff_t)k;
    while (low < high && wanted <= high) {
        uint32_t a = items[low], b = items[low + (high - low) / 2], c = items[high], pivot;
        ptrdiff_t left = low, right = high;
        if (compare(context, a, b) < 0)
            pivot = compare(context, b, c) < 0 ? b : compare(context, a, c) < 0 ? c : a;
        else
            pivot = compare(context, a, c) < 0 ? a : compare(context, b, c) < 0 ? c : b;
        while (left <= right) { /* [low, left) do not come after the pivot, (right, high] do not come before it */
            while (compare(context, items[left], pivot) < 0)
                left++;
            while (compare(context, items[right], pivot) > 0)
                right--;
            if (left <= right) {
                uint32_t swap = items[left];
                items[left++] = items[right];
                items[right--] = swap;
            }
        }
        if (wanted <= right)
            high = right;
        else if (wanted >= left)
            low = left;
        else
            return;
    }
}

static tfm_status tfm__check_sampling(const tfm_sampling *sampling, size_t vocab_size, tfm_error *error) {
    size_t i;
    if (!tfm__is_between(sampling->temperature, 0, FLT_MAX))
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "the temperature is %g, expected 0 or more",
                         (double)sampling->temperature);
    if (!tfm__is_between(sampling->top_p, 0, 1))
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "top_p is %g, expected 0 to 1", (double)sampling->top_p);
    if (!tfm__is_between(sampling->min_p, 0, 1))
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "min_p is %g, expected 0 to 1", (double)sampling->min_p);
    if (!tfm__is_between(sampling->repeat_penalty, 0, FLT_MAX))
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "the repeat penalty is %g, expected 0 or more",
                         (double)sampling->repeat_penalty);
    for (i = 0; i < sampling->n_logit_bias; i++)
        if (sampling->logit_bias[i].token < 0 || (size_t)sampling->logit_bias[i].token >= vocab_size)
            return tfm__fail(error, TFM_ERROR_ARGUMENT, "a logit bias is for token %ld, but the vocabulary has %lu",
                             (long)sampling->logit_bias[i].token, (unsigned long)vocab_size);
    return TFM_OK;
}

/* Keskar et al. 2019. A token is penalised once, however often it came: `seen` (zeroed by this function) remembers. */
static void tfm__penalize(float penalty, float *logits, size_t vocab_size, const int32_t *history, size_t n_history,
                          int32_t *seen) {
    size_t i;
    memset(seen, 0, vocab_size * sizeof *seen);
    for (i = 0; i < n_history; i++) {
        size_t token = (size_t)history[i];
        if (history[i] < 0 || token >= vocab_size || seen[token])
            continue;
        seen[token] = 1;
        logits[token] = logits[token] < 0 ? logits[token] * penalty : logits[token] / penalty;
    }
}

/* Forbids the tokens that would make the sequence's last tokens, `size` of them, the same as some before (Paulus et al.
 * 2017). */
static void tfm__forbid_repeats(size_t size, float *logits, size_t vocab_size, const int32_t *history,
                                size_t n_history) {
    const int32_t *last = history + n_history - (size - 1);
    size_t i;
    for (i = 0; i + size <= n_history; i++) {
        int32_t token = history[i + size - 1];
        if (!memcmp(history + i, last, (size - 1) * sizeof *last) && token >= 0 && (size_t)token < vocab_size)
            logits[token] = -INFINITY;
    }
}

/* The largest logit's token, the first among equals; vocab_size if every logit is NaN or -infinity. */
static size_t tfm__likeliest(const float *logits, size_t vocab_size) {
    float largest = -INFINITY;
    size_t block = 0, first, n, i, k;
    for (first = 0; first < vocab_size; first += n) {
        float lane[16], most = -INFINITY;
        n = TFM__MIN((size_t)256, vocab_size - first);
        for (k = 0; k < 16; k++)
            lane[k] = -INFINITY;
        for (i = first; i + 16 <= first + n; i += 16) /* compilers make vectors of this */
            for (k = 0; k < 16; k++)
                lane[k] = logits[i + k] > lane[k] ? logits[i + k] : lane[k];
        for (; i < first + n; i++)
            lane[0] = logits[i] > lane[0] ? logits[i] : lane[0];
        for (k = 0; k < 16; k++)
            most = lane[k] > most ? lane[k] : most;
        if (most > largest) {
            largest = most;
            block = first;
        }
    }
    if (tfm__is_minus_infinity(largest))
        return vocab_size;
    for (i = block; logits[i] != largest; i++) {
    }
    return i;
}

/* Forbids all tokens below the k-th likeliest. */
static void tfm__keep_top_k(size_t k, float *logits, size_t vocab_size, uint32_t *candidates) {
    float limit = INFINITY;
    size_t n = 0, i;
    for (i = 0; i < vocab_size; i++)
        if (logits[i] > -INFINITY)
            candidates[n++] = (uint32_t)i;
    if (k >= n)
        return;
    tfm__select(candidates, n, k, tfm__compare_logits, logits);
    for (i = 0; i < k; i++)
        limit = TFM__MIN(limit, logits[candidates[i]]);
    for (i = 0; i < vocab_size; i++)
        if (!(logits[i] >= limit))
            logits[i] = -INFINITY;
}

/* Logits become exp((logit - largest) / temperature): the probabilities but for a common factor. Returns their sum. */
static double tfm__to_weights(float temperature, float *logits, size_t vocab_size, float largest) {
    double sum = 0;
    size_t i;
    for (i = 0; i < vocab_size; i++) {
        if (logits[i] == largest)
            logits[i] = 1; /* infinities included: they leave nothing to the others */
        else
            logits[i] =
                logits[i] > -INFINITY ? (float)exp(((double)logits[i] - (double)largest) / (double)temperature) : 0;
        sum += (double)logits[i];
    }
    return sum;
}

/* Sets to 0 the weights that are not needed to reach the probability top_p. The candidates are put in order as far as is
 * needed: the likeliest 64, then four times as many, and so on; a whole vocabulary is rarely sorted. */
static void tfm__keep_top_p(float top_p, float *weights, size_t vocab_size, double total, uint32_t *candidates) {
    size_t sorted = 0, n = 0, i;
    double sum = 0;
    for (i = 0; i < vocab_size; i++)
        if (weights[i] > 0)
            candidates[n++] = (uint32_t)i;
    for (i = 0; i < n && sum < (double)top_p * total; i++) {
        if (i == sorted) {
            sorted = TFM__MIN(n, sorted ? 4 * sorted : 64);
            tfm__select(candidates + i, n - i, sorted - i, tfm__compare_logits, weights);
            tfm__sort(candidates + i, sorted - i, tfm__compare_logits, weights);
        }
        sum += (double)weights[candidates[i]];
    }
    for (; i < n; i++)
        weights[candidates[i]] = 0;
}

/* A token, each with its probability. The walk is in the order of the ids. */
static size_t tfm__draw(const float *weights, size_t vocab_size, size_t best, tfm_random *random) {
    double total = 0, point;
    size_t i;
    for (i = 0; i < vocab_size; i++)
        total += (double)weights[i];
    point = tfm_random_uniform(random) * total;
    for (i = 0; i < vocab_size; i++) {
        point -= (double)weights[i];
        if (point < 0)
            return i;
    }
    return best; /* rounding ate the last bit */
}

TFM_API tfm_status tfm_sample(const tfm_sampling *sampling, float *logits, size_t vocab_size, const int32_t *history,
                              size_t n_history, tfm_random *random, int32_t *work, int32_t *token, tfm_error *error) {
    uint32_t *candidates = (uint32_t *)work;
    double total;
    size_t best, i;
    tfm_status status = tfm__check_sampling(sampling, vocab_size, error);
    if (status != TFM_OK)
        return status;
    for (i = 0; i < sampling->n_logit_bias; i++)
        logits[sampling->logit_bias[i].token] += sampling->logit_bias[i].bias;
    if (sampling->repeat_penalty > 0 && sampling->repeat_penalty != 1 && history)
        tfm__penalize(sampling->repeat_penalty, logits, vocab_size, history, n_history, work);
    if (sampling->no_repeat_ngram && history && sampling->no_repeat_ngram <= n_history)
        tfm__forbid_repeats(sampling->no_repeat_ngram, logits, vocab_size, history, n_history);
    best = tfm__likeliest(logits, vocab_size);
    if (best == vocab_size)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "no token can be chosen: every logit is NaN or -infinity");
    *token = (int32_t)best;
    if (sampling->temperature == 0)
        return TFM_OK;
    if (sampling->top_k)
        tfm__keep_top_k(sampling->top_k, logits, vocab_size, candidates);
    total = tfm__to_weights(sampling->temperature, logits, vocab_size, logits[best]);
    if (sampling->top_p > 0 && sampling->top_p < 1)
        tfm__keep_top_p(sampling->top_p, logits, vocab_size, total, candidates);
    for (i = 0; i < vocab_size; i++) /* the likeliest has the weight 1 */
        if (logits[i] < sampling->min_p)
            logits[i] = 0;
    *token = (int32_t)tfm__draw(logits, vocab_size, best, random);
    return TFM_OK;
}

/* ---- text that is being generated: held back while it may be half a character or the beginning of a stop string */

typedef struct tfm__stream {
    char *text; /* the session's: room for what is held back, and the longest token's text */
    size_t size;
    const char *const *stops;
    size_t n_stops;
    tfm_print print; /* NULL: only the stop strings matter */
    void *user;
    tfm__decoder decoder; /* how far the text is, where it begins with the sequence: that of an encoder-decoder */
} tfm__stream;

/* Hands on the first n bytes, with U+FFFD for what can't be UTF-8. Returns what the caller's function returned. */
static int tfm__stream_print(tfm__stream *stream, size_t n) {
    size_t start = 0, at = 0;
    int stop = 0;
    while (stream->print && at < n && !stop) {
        size_t length, size = tfm__utf8_prefix((const unsigned char *)stream->text + at, n - at, &length);
        if (size < length) { /* one for each longest beginning of a character, as Unicode recommends and Python does */
            size = TFM__MAX(size, 1);
            if (at > start)
                stop = stream->print(stream->user, stream->text + start, at - start);
            stop = stop || stream->print(stream->user, "\xEF\xBF\xBD", 3);
            start = at + size;
        }
        at += size;
    }
    if (stream->print && n > start && !stop)
        stop = stream->print(stream->user, stream->text + start, n - start);
    stream->size -= n;
    memmove(stream->text, stream->text + n, stream->size);
    return stop;
}

/* Where the first stop string begins, or the size of the text. *held: how many bytes at the end could be the beginning
 * of one. */
static size_t tfm__find_stop(const tfm__stream *stream, size_t *held) {
    size_t i, start;
    *held = 0;
    for (start = 0; start < stream->size; start++)
        for (i = 0; i < stream->n_stops; i++) {
            size_t size = strlen(stream->stops[i]), rest = stream->size - start;
            if (size && !memcmp(stream->text + start, stream->stops[i], TFM__MIN(size, rest))) {
                if (size <= rest)
                    return start;
                *held = TFM__MAX(*held, rest);
            }
        }
    return stream->size;
}

/* Adds a token's text and prints what can be printed. TFM_STOP_NONE: go on. */
static tfm_stop tfm__stream_add(tfm__stream *stream, const char *text, size_t size) {
    size_t held, found;
    memcpy(stream->text + stream->size, text, size);
    stream->size += size;
    found = tfm__find_stop(stream, &held);
    if (found < stream->size) {
        tfm_stop stop = tfm__stream_print(stream, found) ? TFM_STOP_CALLBACK : TFM_STOP_STRING;
        stream->size = 0;
        return stop;
    }
    held = TFM__MAX(held, tfm__utf8_incomplete(stream->text, stream->size));
    return stream->size > held && tfm__stream_print(stream, stream->size - held) ? TFM_STOP_CALLBACK : TFM_STOP_NONE;
}

/* A token's text, as it goes on from the prompt; the text of an encoder-decoder has no prompt, and begins with its first
 * token. */
static const char *tfm__stream_text(const tfm_model *model, tfm__decoder *decoder, int32_t token, unsigned char *memory,
                                    size_t *size) {
    const char *text;
    *size = 0;
    if (tfm_is_special_token(model, token))
        return NULL;
    if (model->description.kind != TFM_ENCODER_DECODER || !tfm_token_text(model, token, size))
        return tfm_token_text(model, token, size);
    text = (const char *)tfm__kind_decode(&model->tokenizer, token, decoder, memory, size);
    decoder->n_ids++;
    decoder->size += *size;
    return text;
}

/* ---- generation */

static tfm_status tfm__check_generate(const tfm_session *session, const tfm_generate_options *options,
                                      tfm_error *error) {
    size_t i;
    for (i = 0; i < options->n_stop_strings; i++)
        if (strlen(options->stop_strings[i]) > TFM__MAX_STOP_STRING)
            return tfm__fail(error, TFM_ERROR_ARGUMENT, "stop string %lu is longer than %lu bytes", (unsigned long)i,
                             (unsigned long)TFM__MAX_STOP_STRING);
    if (options->shift && (session->context < 2 || options->shift_keep > session->context - 2))
        return tfm__fail(error, TFM_ERROR_ARGUMENT,
                         "shift_keep is %lu, which leaves no room in a context of %lu tokens",
                         (unsigned long)options->shift_keep, (unsigned long)session->context);
    return tfm__check_sequence(session, options->sequence, error);
}

static int tfm__is_stop_token(const tfm_session *session, const tfm_generate_options *options, int32_t token) {
    size_t i;
    for (i = 0; i < options->n_stop_tokens; i++)
        if (options->stop_tokens[i] == token)
            return 1;
    return !options->ignore_end && tfm_is_end_token(session->model, token);
}

/* An encoder-decoder's tokens, where none are given. */
static tfm_status tfm__begin_decoder(const tfm_session *session, const tfm_generate_options *options,
                                     const int32_t **prompt, size_t *n_prompt, tfm_error *error) {
    const tfm_model *model = session->model;
    if (model->description.kind != TFM_ENCODER_DECODER || *n_prompt || options->append)
        return TFM_OK;
    if (model->start_id < 0)
        return tfm__fail(error, TFM_ERROR_ARGUMENT,
                         "%s: the file has no generation.start_id, so the decoder's first tokens must be given",
                         model->file->name);
    *prompt = &model->start_id;
    *n_prompt = 1;
    return TFM_OK;
}

/* Brings the sequence to the prompt; the logits of its last token are in session->logits. */
static tfm_status tfm__prefill(tfm_session *session, const int32_t *prompt, size_t n_prompt,
                               const tfm_generate_options *options, tfm_generate_stats *stats, tfm_error *error) {
    const int32_t *tokens = session->tokens + options->sequence * session->context;
    tfm_kv *kv = session->kv + options->sequence;
    size_t before = options->append ? kv->n_tokens : 0, reused = 0;
    tfm_chunk chunk;
    if (!n_prompt)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "the prompt is empty: there is nothing to continue");
    if (n_prompt > session->context - before)
        return tfm__fail(error, TFM_ERROR_CONTEXT_FULL, "the prompt has %lu tokens, but the context has room for %lu",
                         (unsigned long)n_prompt, (unsigned long)(session->context - before));
    if (!options->append) { /* the last token is always evaluated: its logits are wanted */
        while (reused < TFM__MIN(kv->n_tokens, n_prompt - 1) && tokens[reused] == prompt[reused])
            reused++;
        kv->n_tokens = reused;
    }
    stats->n_prompt = n_prompt;
    stats->n_reused = reused;
    chunk.sequence = options->sequence;
    chunk.tokens = prompt + reused;
    chunk.n_tokens = n_prompt - reused;
    chunk.n_outputs = 1;
    return tfm_eval(session, &chunk, 1, TFM_LOGITS, session->logits, error);
}

/* Evaluates a new token; makes room for it first if it has to and may. */
static tfm_status tfm__step(tfm_session *session, int32_t token, const tfm_generate_options *options,
                            tfm_error *error) {
    tfm_status status = TFM_OK;
    tfm_chunk chunk;
    if (options->shift && session->kv[options->sequence].n_tokens == session->context)
        status = tfm_shift(session, options->sequence, options->shift_keep, error);
    chunk.sequence = options->sequence;
    chunk.tokens = &token;
    chunk.n_tokens = 1;
    chunk.n_outputs = 1;
    return status == TFM_OK ? tfm_eval(session, &chunk, 1, TFM_LOGITS, session->logits, error) : status;
}

/* Chooses, prints and evaluates tokens until there is a reason to stop. */
static tfm_status tfm__continue(tfm_session *session, const tfm_generate_options *options, tfm__stream *stream,
                                tfm_generate_stats *stats, tfm_error *error) {
    size_t vocab_size = session->model->description.vocab_size;
    unsigned char memory[TFM__MAX_PIECE_TEXT];
    tfm_random random;
    tfm_random_seed(&random, options->seed);
    for (;;) {
        size_t n_history, size;
        const int32_t *history = tfm_sequence_tokens(session, options->sequence, &n_history);
        const char *text;
        int32_t token;
        tfm_status status = tfm_sample(&options->sampling, session->logits, vocab_size, history, n_history, &random,
                                       session->work, &token, error);
        if (status != TFM_OK)
            return status;
        stats->n_generated++;
        if (options->on_token && options->on_token(options->on_token_user, token))
            stats->stop = TFM_STOP_CALLBACK;
        else if (tfm__is_stop_token(session, options, token))
            stats->stop = TFM_STOP_END_TOKEN;
        else {
            text = tfm__stream_text(session->model, &stream->decoder, token, memory, &size);
            stats->stop = text ? tfm__stream_add(stream, text, size) : TFM_STOP_NONE;
            if (stats->stop == TFM_STOP_NONE && stats->n_generated == options->max_tokens)
                stats->stop = TFM_STOP_MAX_TOKENS;
        }
        if (stats->stop != TFM_STOP_NONE)
            return TFM_OK;
        status = tfm__step(session, token, options, error);
        if (status == TFM_ERROR_CONTEXT_FULL)
            stats->stop = TFM_STOP_CONTEXT;
        if (status != TFM_OK)
            return status;
    }
}

/* What the sequence's tokens so far would have shown, so that what comes goes on from there. */
static void tfm__stream_skip(const tfm_session *session, size_t sequence, tfm__stream *stream) {
    unsigned char memory[TFM__MAX_PIECE_TEXT];
    size_t n_tokens, size, i;
    const int32_t *tokens = tfm_sequence_tokens(session, sequence, &n_tokens);
    for (i = 0; i < n_tokens; i++)
        tfm__stream_text(session->model, &stream->decoder, tokens[i], memory, &size);
}

TFM_API tfm_status tfm_generate_ids(tfm_session *session, const int32_t *prompt, size_t n_prompt,
                                    const tfm_generate_options *options, tfm_print print, void *print_user,
                                    tfm_error *error) {
    tfm_generate_options usual;
    tfm_generate_stats unread, *stats;
    tfm__stream stream;
    tfm_status status;
    memset(&usual, 0, sizeof usual);
    if (!options)
        options = &usual;
    stats = options->stats ? options->stats : &unread;
    memset(stats, 0, sizeof *stats);
    memset(&stream, 0, sizeof stream);
    stream.text = session->text;
    stream.stops = options->stop_strings;
    stream.n_stops = options->n_stop_strings;
    stream.print = print;
    stream.user = print_user;
    status = tfm__check_generate(session, options, error);
    if (status == TFM_OK)
        status = tfm__begin_decoder(session, options, &prompt, &n_prompt, error);
    if (status == TFM_OK)
        status = tfm__prefill(session, prompt, n_prompt, options, stats, error);
    if (status != TFM_OK)
        return status;
    tfm__stream_skip(session, options->sequence, &stream);
    status = tfm__continue(session, options, &stream, stats, error);
    if (stream.size && stats->stop != TFM_STOP_CALLBACK && tfm__stream_print(&stream, stream.size))
        stats->stop = TFM_STOP_CALLBACK;
    return status;
}

/* The prompt's tokens are a sequence's source. */
static tfm_status tfm__prompt_as_source(tfm_session *session, size_t n_prompt, size_t sequence, tfm_error *error) {
    tfm_text text;
    memset(&text, 0, sizeof text);
    text.tokens = session->prompt;
    text.n_tokens = n_prompt;
    if (!n_prompt)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "the prompt is empty: there is nothing to answer");
    if (n_prompt > session->source)
        return tfm__fail(error, TFM_ERROR_CONTEXT_FULL,
                         "the prompt has %lu tokens, but the encoder has room for %lu: see tfm_session_options.source",
                         (unsigned long)n_prompt, (unsigned long)session->source);
    return tfm_set_source(session, sequence, &text, error);
}

TFM_API tfm_status tfm_generate(tfm_session *session, const char *prompt, const tfm_generate_options *options,
                                tfm_print print, void *print_user, tfm_error *error) {
    const int answers = session->model->description.kind == TFM_ENCODER_DECODER;
    unsigned flags = options && options->special ? TFM_TOKENIZE_SPECIAL : 0;
    tfm_engine *engine = session->engine; /* whose scratch memory is idle */
    size_t n_prompt;
    tfm_status status = tfm__tokenize(session->model, engine->scratch, engine->scratch_size * sizeof *engine->scratch,
                                      prompt, strlen(prompt), flags, session->prompt,
                                      answers ? session->source : session->context, &n_prompt, error);
    if (status == TFM_OK && answers) {
        status = tfm__prompt_as_source(session, n_prompt, options ? options->sequence : 0, error);
        n_prompt = 0;
    }
    if (status != TFM_OK)
        return status;
    return tfm_generate_ids(session, session->prompt, n_prompt, options, print, print_user, error);
}

/* ---- several prompts side by side: what tfm_generate_batch and tfm_beam_search have in common */

/* A continuation that may go on. */
typedef struct tfm__beam {
    float score;   /* the sum of the log-probabilities of its new tokens */
    size_t parent; /* the beam of the step before whose tokens it begins with */
    int32_t token; /* its newest, which is not in its sequence yet */
} tfm__beam;

/* One prompt and its continuations: beam b is in the sequence first + b. */
typedef struct tfm__group {
    size_t first, n_prompt;
    size_t max_new, n_new; /* tokens that each beam may have, and has */
    size_t n_beams;        /* that go on; 0: the search is over */
    size_t row;            /* their logits, in this step: rows row, row + 1, ... */
    size_t n_rows;         /* 1 after the prompt, which all beams share */
    tfm__beam *beams;      /* [beams] */
    size_t n_finished;
    tfm_result *finished; /* [beams]: best first */
    int32_t *tokens;      /* [beams][max_new]: what `finished` points to, in any order */
    tfm_random random;
} tfm__group;

/* What a row of logits offers: the best tokens and their log-probabilities. */
typedef struct tfm__offer {
    uint32_t token;
    float score;
} tfm__offer;

typedef struct tfm__search {
    tfm_session *session;
    tfm_beam_options options; /* with the usual in place of 0 */
    size_t n_groups, max_new, keep;
    tfm__group *groups;   /* [n_groups] */
    tfm_chunk *chunks;    /* [n_groups beams] */
    size_t *row_sequence; /* [n_groups beams]: whose logits a row is */
    float *logits;        /* [n_groups beams][vocab_size] */
    tfm__offer *offers;   /* [n_groups beams][keep], best first */
    size_t *n_offers;     /* [n_groups beams] */
    tfm__beam *beams;     /* [n_groups][beams] */
    tfm_result *finished; /* [n_groups][beams] */
    int32_t *tokens;      /* [n_groups][beams][max_new] */
    /* of one group at a time */
    tfm__beam *candidates; /* [beams keep] */
    uint32_t *order;       /* [beams keep] */
    uint32_t *page_tables; /* [beams][n_pages] */
    uint32_t *page_uses;   /* [beams n_pages]: how many beams a page is in */
    int32_t *old_tokens;   /* [beams][context] */
} tfm__search;

static void tfm__carve_search(tfm__search *search, tfm__carver *carver) {
    const tfm_session *session = search->session;
    const size_t beams = search->options.beams, rows = tfm__product(search->n_groups, beams), keep = search->keep;
    search->groups = (tfm__group *)tfm__carve(carver, search->n_groups, sizeof *search->groups);
    search->chunks = (tfm_chunk *)tfm__carve(carver, rows, sizeof *search->chunks);
    search->row_sequence = (size_t *)tfm__carve(carver, rows, sizeof *search->row_sequence);
    search->logits =
        (float *)tfm__carve(carver, tfm__product(rows, session->model->description.vocab_size), sizeof *search->logits);
    search->offers = (tfm__offer *)tfm__carve(carver, tfm__product(rows, keep), sizeof *search->offers);
    search->n_offers = (size_t *)tfm__carve(carver, rows, sizeof *search->n_offers);
    search->beams = (tfm__beam *)tfm__carve(carver, rows, sizeof *search->beams);
    search->finished = (tfm_result *)tfm__carve(carver, rows, sizeof *search->finished);
    search->tokens = (int32_t *)tfm__carve(carver, tfm__product(rows, search->max_new), sizeof *search->tokens);
    search->candidates = (tfm__beam *)tfm__carve(carver, tfm__product(beams, keep), sizeof *search->candidates);
    search->order = (uint32_t *)tfm__carve(carver, tfm__product(beams, keep), sizeof *search->order);
    search->page_tables =
        (uint32_t *)tfm__carve(carver, tfm__product(beams, session->n_pages), sizeof *search->page_tables);
    search->page_uses =
        (uint32_t *)tfm__carve(carver, tfm__product(beams, session->n_pages), sizeof *search->page_uses);
    search->old_tokens =
        (int32_t *)tfm__carve(carver, tfm__product(beams, session->context), sizeof *search->old_tokens);
}

static tfm_status tfm__search_memory(tfm__search *search, tfm_error *error) {
    tfm_session *session = search->session;
    tfm__carver carver = {NULL, 0};
    tfm__carve_search(search, &carver);
    if (carver.used > session->search_size) {
        void *memory = tfm__allocate_aligned(&session->allocator, carver.used, TFM__CACHE_LINE);
        if (!memory)
            return tfm__fail_memory(error, carver.used);
        tfm__release_aligned(&session->allocator, session->search_memory);
        session->search_memory = memory;
        session->search_size = carver.used;
    }
    carver.memory = (char *)session->search_memory;
    carver.used = 0;
    tfm__carve_search(search, &carver);
    return TFM_OK;
}

/* The prompt of group i. */
static tfm_status tfm__search_prompt(const tfm__search *search, const tfm_prompt *prompts, size_t i, tfm_prompt *prompt,
                                     tfm_error *error) {
    const tfm_model *model = search->session->model;
    memset(prompt, 0, sizeof *prompt);
    if (prompts)
        *prompt = prompts[i];
    if (prompt->n_tokens)
        return TFM_OK;
    if (model->description.kind != TFM_ENCODER_DECODER)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "prompt %lu is empty: there is nothing to continue",
                         (unsigned long)i);
    if (model->start_id < 0)
        return tfm__fail(error, TFM_ERROR_ARGUMENT,
                         "%s: the file has no generation.start_id, so the decoder's first tokens must be given",
                         model->file->name);
    prompt->tokens = &model->start_id;
    prompt->n_tokens = 1;
    return TFM_OK;
}

/* How many new tokens there may be after each prompt: the longest room, or what was asked for, which must fit (`strict`)
 * or is cut. The last token of a text is never evaluated, so it needs no room. */
static tfm_status tfm__search_rooms(tfm__search *search, const tfm_prompt *prompts, int strict, tfm_error *error) {
    const size_t context = search->session->context, asked = search->options.max_tokens;
    size_t i;
    search->max_new = 0;
    for (i = 0; i < search->n_groups; i++) {
        tfm_prompt prompt;
        tfm_status status = tfm__search_prompt(search, prompts, i, &prompt, error);
        size_t room = prompt.n_tokens > context ? 0 : context - prompt.n_tokens + 1;
        if (status != TFM_OK)
            return status;
        if (!room || (strict && asked > room))
            return tfm__fail(error, TFM_ERROR_CONTEXT_FULL,
                             "prompt %lu has %lu tokens and %lu more are asked for, but the context has room for %lu",
                             (unsigned long)i, (unsigned long)prompt.n_tokens, (unsigned long)asked,
                             (unsigned long)context);
        search->max_new = TFM__MAX(search->max_new, asked ? TFM__MIN(asked, room) : room);
    }
    return TFM_OK;
}

/* Sequences for all groups, and a head to search with. */
static tfm_status tfm__check_search(const tfm__search *search, tfm_error *error) {
    const tfm_session *session = search->session;
    const tfm_beam_options *options = &search->options;
    if (session->model->description.kind == TFM_ENCODER || session->model->description.head == TFM_NO_HEAD)
        return tfm__fail(error, TFM_ERROR_UNSUPPORTED, "the model writes no text: it is an encoder, or has no head");
    if (options->sequence > session->n_sequences ||
        search->n_groups > (session->n_sequences - options->sequence) / options->beams)
        return tfm__fail(error, TFM_ERROR_ARGUMENT,
                         "%lu prompts with %lu beams from sequence %lu on, but the session has %lu sequences: see "
                         "tfm_session_options.n_sequences",
                         (unsigned long)search->n_groups, (unsigned long)options->beams,
                         (unsigned long)options->sequence, (unsigned long)session->n_sequences);
    return TFM_OK;
}

/* Empties the groups' sequences and evaluates the prompts; their logits are the first rows. */
static tfm_status tfm__search_begin(tfm__search *search, const tfm_prompt *prompts, tfm_error *error) {
    tfm_session *session = search->session;
    const size_t beams = search->options.beams;
    size_t i, b;
    for (i = 0; i < search->n_groups; i++) {
        tfm__group *group = search->groups + i;
        tfm_chunk *chunk = search->chunks + i;
        tfm_prompt prompt;
        size_t room;
        tfm_status status = tfm__search_prompt(search, prompts, i, &prompt, error);
        if (status != TFM_OK)
            return status;
        room = session->context - prompt.n_tokens + 1;
        memset(group, 0, sizeof *group);
        group->first = search->options.sequence + i * beams;
        group->n_prompt = prompt.n_tokens;
        group->max_new = search->options.max_tokens ? TFM__MIN(search->options.max_tokens, room) : room;
        group->row = i;
        group->n_rows = group->n_beams = 1;
        group->beams = search->beams + i * beams;
        group->finished = search->finished + i * beams;
        group->tokens = search->tokens + i * beams * search->max_new;
        memset(group->beams, 0, beams * sizeof *group->beams);
        memset(group->finished, 0, beams * sizeof *group->finished);
        for (b = 0; b < beams; b++)
            session->kv[group->first + b].n_tokens = 0;
        search->row_sequence[i] = group->first;
        chunk->sequence = group->first;
        chunk->tokens = prompt.tokens;
        chunk->n_tokens = prompt.n_tokens;
        chunk->n_outputs = 1;
    }
    return tfm_eval(session, search->chunks, search->n_groups, TFM_LOGITS, search->logits, error);
}

/* Evaluates the newest tokens of all beams that go on. *n_rows: how many those are. */
static tfm_status tfm__search_step(tfm__search *search, size_t *n_rows, tfm_error *error) {
    size_t i, b;
    for (i = *n_rows = 0; i < search->n_groups; i++) {
        tfm__group *group = search->groups + i;
        group->row = *n_rows;
        group->n_rows = group->n_beams;
        for (b = 0; b < group->n_beams; b++, ++*n_rows) {
            tfm_chunk *chunk = search->chunks + *n_rows;
            search->row_sequence[*n_rows] = chunk->sequence = group->first + b;
            chunk->tokens = &group->beams[b].token;
            chunk->n_tokens = chunk->n_outputs = 1;
        }
    }
    return *n_rows ? tfm_eval(search->session, search->chunks, *n_rows, TFM_LOGITS, search->logits, error) : TFM_OK;
}

/* ---- several prompts: greedy, sampling */

/* Chooses the group's next token. */
static tfm_status tfm__batch_choose(tfm__search *search, tfm__group *group, const tfm_generate_options *options,
                                    tfm_error *error) {
    tfm_session *session = search->session;
    const size_t vocab_size = session->model->description.vocab_size;
    tfm_result *result = group->finished;
    size_t n_history;
    const int32_t *history = tfm_sequence_tokens(session, group->first, &n_history);
    tfm_status status = tfm_sample(&options->sampling, search->logits + group->row * vocab_size, vocab_size, history,
                                   n_history, &group->random, session->work, &group->beams->token, error);
    if (status != TFM_OK)
        return status;
    group->tokens[group->n_new++] = group->beams->token;
    if (tfm__is_stop_token(session, options, group->beams->token))
        result->stop = TFM_STOP_END_TOKEN;
    else if (group->n_new == group->max_new)
        result->stop = group->n_new == options->max_tokens ? TFM_STOP_MAX_TOKENS : TFM_STOP_CONTEXT;
    result->tokens = group->tokens;
    result->n_tokens = group->n_new;
    group->n_beams = result->stop == TFM_STOP_NONE;
    return TFM_OK;
}

static tfm_status tfm__check_batch(const tfm_generate_options *options, tfm_error *error) {
    if (!options->append && !options->shift && !options->n_stop_strings && !options->on_token && !options->stats)
        return TFM_OK;
    return tfm__fail(error, TFM_ERROR_ARGUMENT,
                     "tfm_generate_batch does not know the options append, shift, stop_strings, on_token and stats");
}

TFM_API tfm_status tfm_generate_batch(tfm_session *session, const tfm_prompt *prompts, size_t n_prompts,
                                      const tfm_generate_options *options, tfm_result *results, tfm_error *error) {
    tfm_generate_options usual;
    tfm__search search;
    tfm_status status;
    size_t n_rows = n_prompts, i;
    memset(&usual, 0, sizeof usual);
    memset(&search, 0, sizeof search);
    if (!options)
        options = &usual;
    search.session = session;
    search.n_groups = n_prompts;
    search.options.beams = 1;
    search.options.max_tokens = options->max_tokens;
    search.options.sequence = options->sequence;
    status = tfm__check_batch(options, error);
    if (status == TFM_OK)
        status = tfm__check_search(&search, error);
    if (status == TFM_OK)
        status = tfm__search_rooms(&search, prompts, 0, error);
    if (status == TFM_OK)
        status = tfm__search_memory(&search, error);
    if (status == TFM_OK)
        status = tfm__search_begin(&search, prompts, error);
    for (i = 0; i < n_prompts && status == TFM_OK; i++)
        tfm_random_seed(&search.groups[i].random, options->seed + i);
    while (n_rows && status == TFM_OK) {
        for (i = 0; i < n_prompts && status == TFM_OK; i++)
            if (search.groups[i].n_beams)
                status = tfm__batch_choose(&search, search.groups + i, options, error);
        if (status == TFM_OK)
            status = tfm__search_step(&search, &n_rows, error);
    }
    for (i = 0; i < n_prompts && status == TFM_OK; i++)
        results[i] = *search.groups[i].finished;
    return status;
}

/* ---- beam search: what the logits offer */

#define TFM__SCORE_BLOCK ((size_t)2048)

/* log(sum of exp(x)), NaN if one is. */
static float tfm__log_sum(const tfm__kernels *kernels, const float *x, size_t n) {
    float block[TFM__SCORE_BLOCK];
    tfm__softmax softmax;
    size_t i, size;
    softmax.max = -INFINITY;
    softmax.sum = 0;
    for (i = 0; i < n; i += size) {
        size = TFM__MIN(TFM__SCORE_BLOCK, n - i);
        memcpy(block, x + i, size * sizeof *x);
        kernels->softmax_block(&softmax, block, size, 1, NULL);
    }
    return softmax.max + (float)log((double)softmax.sum);
}

/* The k largest of x, best first, the first among equals; NaN and -infinity are left out. Returns how many. */
static size_t tfm__largest(const float *x, size_t n, size_t k, tfm__offer *best) {
    float limit = -INFINITY;
    size_t count = 0, i, end, at;
    for (i = 0; i < n; i = end) {
        int any = 0;
        end = TFM__MIN(i + 16, n);
        for (at = i; at < end; at++) /* mostly there is nothing, and compilers make vectors of this */
            any |= x[at] > limit;
        for (; any && i < end; i++) {
            if (!(x[i] > limit))
                continue;
            count += count < k;
            for (at = count - 1; at > 0 && best[at - 1].score < x[i]; at--)
                best[at] = best[at - 1];
            best[at].score = x[i];
            best[at].token = (uint32_t)i;
            limit = count == k ? best[k - 1].score : limit;
        }
    }
    return count;
}

/* A row's best tokens and their log-probabilities. What is forbidden is left out, and keeps its share of the
 * probability. */
static void tfm__offer_row(void *argument, size_t row) {
    const tfm__search *search = (const tfm__search *)argument;
    const tfm_session *session = search->session;
    const tfm_model *model = session->model;
    const size_t vocab_size = model->description.vocab_size, sequence = search->row_sequence[row];
    const tfm__group *group = search->groups + (sequence - search->options.sequence) / search->options.beams;
    float *logits = search->logits + row * vocab_size;
    tfm__offer *offers = search->offers + row * search->keep;
    const float log_sum = tfm__log_sum(session->engine->kernels, logits, vocab_size);
    const int spoiled = tfm__has_nan(logits, vocab_size) || tfm__has_nan(&log_sum, 1);
    size_t n_history, i, n;
    const int32_t *history = tfm_sequence_tokens(session, sequence, &n_history);
    if (search->options.no_repeat_ngram && search->options.no_repeat_ngram <= n_history)
        tfm__forbid_repeats(search->options.no_repeat_ngram, logits, vocab_size, history, n_history);
    for (i = 0; group->n_new < search->options.min_tokens && i < model->n_end_ids; i++)
        if (model->end_ids[i] >= 0 && (size_t)model->end_ids[i] < vocab_size) /* a file may name others */
            logits[model->end_ids[i]] = -INFINITY;
    n = spoiled ? 0 : tfm__largest(logits, vocab_size, search->keep, offers);
    for (i = 0; i < n; i++)
        offers[i].score -= log_sum;
    search->n_offers[row] = n;
}

/* ---- beam search: one step of one group */

/* Better first; among equals the lower beam, then the lower token. */
static int tfm__compare_candidates(const void *context, uint32_t a, uint32_t b) {
    const tfm__beam *x = (const tfm__beam *)context + a, *y = (const tfm__beam *)context + b;
    if (x->score != y->score)
        return x->score > y->score ? -1 : 1;
    if (x->parent != y->parent)
        return x->parent < y->parent ? -1 : 1;
    return (x->token > y->token) - (x->token < y->token);
}

/* All that the group's rows offer, in order. Returns how many. */
static size_t tfm__collect(tfm__search *search, const tfm__group *group) {
    size_t n = 0, row, i;
    for (row = 0; row < group->n_rows; row++)
        for (i = 0; i < search->n_offers[group->row + row]; i++, n++) {
            const tfm__offer *offer = search->offers + (group->row + row) * search->keep + i;
            search->candidates[n].score = group->beams[row].score + offer->score;
            search->candidates[n].parent = row;
            search->candidates[n].token = (int32_t)offer->token;
            search->order[n] = (uint32_t)n;
        }
    tfm__sort(search->order, n, tfm__compare_candidates, search->candidates);
    return n;
}

static float tfm__length_divisor(const tfm__search *search, size_t n_tokens) {
    return (float)pow((double)n_tokens, (double)search->options.length_penalty);
}

/* A continuation that ended: kept if it is one of the best. The place of the worst becomes free for it. */
static void tfm__finish_beam(tfm__search *search, tfm__group *group, const tfm__beam *beam, tfm_stop stop) {
    const size_t beams = search->options.beams, sequence = group->first + beam->parent;
    const int32_t *before = search->session->tokens + sequence * search->session->context + group->n_prompt;
    int32_t *tokens = group->tokens + group->n_finished * search->max_new;
    float score = beam->score / tfm__length_divisor(search, group->n_new + 1);
    size_t at;
    if (group->n_finished == beams) {
        if (!(score > group->finished[beams - 1].score))
            return;
        tokens = group->tokens + (size_t)(group->finished[beams - 1].tokens - group->tokens);
        group->n_finished--;
    }
    for (at = group->n_finished++; at > 0 && group->finished[at - 1].score < score; at--)
        group->finished[at] = group->finished[at - 1];
    memcpy(tokens, before, group->n_new * sizeof *tokens);
    tokens[group->n_new] = beam->token;
    group->finished[at].tokens = tokens;
    group->finished[at].n_tokens = group->n_new + 1;
    group->finished[at].stop = stop;
    group->finished[at].score = score;
}

/* 1 if a beam may still become better than the worst result. (transformers' score of a result that is not there is
 * -1e9.) */
static int tfm__may_improve(const tfm__search *search, const tfm__group *group) {
    const tfm_beam_options *options = &search->options;
    const int longest = options->early_stopping == TFM_STOP_SURE && options->length_penalty > 0;
    float worst = group->n_finished == options->beams ? group->finished[options->beams - 1].score : -1e9f;
    return group->beams[0].score / tfm__length_divisor(search, longest ? group->max_new : group->n_new) > worst;
}

/* Of the candidates in order the first beams * (end tokens + 1) count: those that end and are among the first `beams` are
 * results, the first `beams` others go on. */
static void tfm__choose_beams(tfm__search *search, tfm__group *group) {
    const tfm_beam_options *options = &search->options;
    const size_t n = TFM__MIN(tfm__collect(search, group), search->keep);
    const int last = group->n_new + 1 == group->max_new;
    size_t i;
    for (i = group->n_beams = 0; i < n; i++) {
        const tfm__beam *candidate = search->candidates + search->order[i];
        const int ends = tfm_is_end_token(search->session->model, candidate->token);
        if (!ends && !last && group->n_beams < options->beams)
            group->beams[group->n_beams++] = *candidate;
        else if ((ends || last) && i < options->beams)
            tfm__finish_beam(search, group, candidate, ends ? TFM_STOP_END_TOKEN : TFM_STOP_MAX_TOKENS);
    }
    group->n_new++;
    if (group->n_beams && (!tfm__may_improve(search, group) ||
                           (options->early_stopping == TFM_STOP_FULL && group->n_finished == options->beams)))
        group->n_beams = 0;
}

/* ---- beam search: the beams' pages */

typedef struct tfm__page_copy {
    tfm_kv kv; /* without a table: pages are those of the pool */
    size_t from, to, n_tokens;
} tfm__page_copy;

/* One layer's keys and values of a page's first tokens. */
static void tfm__copy_page_layer(void *argument, size_t layer) {
    const tfm__page_copy *copy = (const tfm__page_copy *)argument;
    const tfm_kv *kv = &copy->kv;
    const size_t size = tfm__dtype_sizes[kv->dtype] * TFM__PANEL, dim = kv->head_dim;
    size_t head, d, group;
    for (head = 0; head < kv->n_kv_heads; head++) {
        const char *values = tfm__kv_at(kv, layer, copy->from, 1, head);
        char *to = tfm__kv_at(kv, layer, copy->to, 1, head);
        memcpy(tfm__kv_at(kv, layer, copy->to, 0, head), tfm__kv_at(kv, layer, copy->from, 0, head),
               tfm__divide_up(copy->n_tokens, TFM__PANEL) * tfm__key_panel_bytes(kv));
        for (d = 0; d < dim; d += TFM__PANEL)
            memcpy(to + tfm__kv_number(kv, 1, 0, d), values + tfm__kv_number(kv, 1, 0, d),
                   tfm__round_up(copy->n_tokens, 2) * size); /* bf16 ones stand in pairs */
        for (group = 0; group < tfm__kv_scales(kv); group++)
            memcpy(to + tfm__kv_scale_at(kv, 1, 0, group), values + tfm__kv_scale_at(kv, 1, 0, group),
                   copy->n_tokens * sizeof(uint16_t));
    }
}

static void tfm__copy_page(const tfm_session *session, size_t from, size_t to, size_t n_tokens) {
    tfm__page_copy copy;
    copy.kv = session->kv[0];
    copy.kv.pages = NULL;
    copy.from = from;
    copy.to = to;
    copy.n_tokens = n_tokens;
    tfm__run(session->engine, copy.kv.n_layers, 2 * n_tokens * copy.kv.n_kv_heads * copy.kv.head_dim,
             tfm__copy_page_layer, &copy);
}

/* Gives every beam of the group a last page of its own, with room for one more token. The group's sequences brought
 * n_pages pages each, so there is always a free one. */
static void tfm__part_pages(tfm__search *search, const tfm__group *group) {
    const tfm_session *session = search->session;
    const size_t n_pages = session->n_pages, n_tokens = session->kv[group->first].n_tokens;
    const size_t last = n_tokens / TFM_KV_PAGE, filled = n_tokens % TFM_KV_PAGE;
    const size_t base = group->first * n_pages; /* the first of the group's pages */
    uint32_t *tables = session->pages + base, *uses = search->page_uses;
    size_t b, i, unused = 0;
    memset(uses, 0, search->options.beams * n_pages * sizeof *uses);
    for (b = 0; b < group->n_beams; b++)
        for (i = 0; i < last + (filled > 0); i++)
            uses[tables[b * n_pages + i] - base]++;
    for (b = 0; b < group->n_beams; b++) {
        uint32_t *page = tables + b * n_pages + last;
        if (filled && uses[*page - base] == 1)
            continue;
        while (uses[unused])
            unused++;
        uses[unused] = 1;
        if (filled) {
            uses[*page - base]--;
            tfm__copy_page(session, *page, base + unused, filled);
        }
        *page = (uint32_t)(base + unused);
    }
}

/* The sequences of the group's beams become those of their parents. */
static void tfm__follow_parents(tfm__search *search, const tfm__group *group) {
    tfm_session *session = search->session;
    const size_t n_pages = session->n_pages, context = session->context, n_tokens = session->kv[group->first].n_tokens;
    const size_t beams = search->options.beams;
    uint32_t *tables = session->pages + group->first * n_pages;
    int32_t *tokens = session->tokens + group->first * context;
    size_t b;
    memcpy(search->page_tables, tables, beams * n_pages * sizeof *tables);
    for (b = 0; b < group->n_rows; b++)
        memcpy(search->old_tokens + b * n_tokens, tokens + b * context, n_tokens * sizeof *tokens);
    for (b = 0; b < group->n_beams; b++) {
        const size_t parent = group->beams[b].parent;
        memcpy(tables + b * n_pages, search->page_tables + parent * n_pages, n_pages * sizeof *tables);
        memcpy(tokens + b * context, search->old_tokens + parent * n_tokens, n_tokens * sizeof *tokens);
        session->kv[group->first + b].n_tokens = n_tokens;
    }
    tfm__part_pages(search, group);
}

/* All beams of a prompt answer to the source of the first. */
static void tfm__share_sources(const tfm__search *search) {
    tfm_session *session = search->session;
    const size_t beams = search->options.beams;
    size_t i;
    if (session->model->description.kind == TFM_ENCODER_DECODER)
        for (i = 0; i < search->n_groups * beams; i++)
            session->memories[search->options.sequence + i] =
                session->memories[search->options.sequence + i / beams * beams];
}

/* Every sequence has its own pages again, and is empty; the first of each prompt still has its source. */
static void tfm__unshare(const tfm__search *search) {
    tfm_session *session = search->session;
    const size_t beams = search->options.beams, source_pages = tfm__kv_pages(session->source);
    size_t i, k;
    for (i = 0; i < search->n_groups * beams; i++) {
        const size_t sequence = search->options.sequence + i;
        for (k = 0; k < session->n_pages; k++)
            session->pages[sequence * session->n_pages + k] = (uint32_t)(sequence * session->n_pages + k);
        session->kv[sequence].n_tokens = 0;
        if (session->model->description.kind == TFM_ENCODER_DECODER && i % beams) {
            session->memories[sequence].pages = session->memory_pages + sequence * source_pages;
            session->memories[sequence].n_tokens = 0;
        }
    }
}

/* ---- beam search */

static tfm_status tfm__check_beams(const tfm__search *search, tfm_error *error) {
    const tfm_beam_options *options = &search->options;
    const size_t vocab_size = search->session->model->description.vocab_size;
    if (options->n_best > options->beams)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "%lu results are asked for, but there are %lu beams",
                         (unsigned long)options->n_best, (unsigned long)options->beams);
    if (!tfm__is_between(options->length_penalty, -100, 100))
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "the length penalty is %g, expected -100 to 100",
                         (double)options->length_penalty);
    if ((unsigned)options->early_stopping > TFM_STOP_SURE)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "unknown kind of early stopping %d", (int)options->early_stopping);
    if (search->keep / options->beams > vocab_size)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "a vocabulary of %lu tokens is too small for beam search",
                         (unsigned long)vocab_size);
    return TFM_OK;
}

/* Steps until all groups are done. */
static tfm_status tfm__search_beams(tfm__search *search, tfm_error *error) {
    const tfm_session *session = search->session;
    size_t n_rows = search->n_groups, i;
    tfm_status status = TFM_OK;
    while (n_rows && status == TFM_OK) {
        tfm__run(session->engine, n_rows, 8 * session->model->description.vocab_size, tfm__offer_row, search);
        for (i = 0; i < search->n_groups; i++) {
            tfm__group *group = search->groups + i;
            if (!group->n_beams)
                continue;
            tfm__choose_beams(search, group);
            if (group->n_beams)
                tfm__follow_parents(search, group);
            else if (!group->n_finished)
                return tfm__fail(error, TFM_ERROR_ARGUMENT,
                                 "prompt %lu: no token can be chosen: every logit is NaN, -infinity or forbidden",
                                 (unsigned long)i);
        }
        status = tfm__search_step(search, &n_rows, error);
    }
    return status;
}

static void tfm__search_results(const tfm__search *search, tfm_result *results) {
    size_t i, k;
    for (i = 0; i < search->n_groups; i++)
        for (k = 0; k < search->options.n_best; k++, results++) {
            memset(results, 0, sizeof *results);
            results->score = -INFINITY;
            if (k < search->groups[i].n_finished)
                *results = search->groups[i].finished[k];
        }
}

TFM_API tfm_status tfm_beam_search(tfm_session *session, const tfm_prompt *prompts, size_t n_prompts,
                                   const tfm_beam_options *options, tfm_result *results, tfm_error *error) {
    tfm__search search;
    tfm_status status;
    memset(&search, 0, sizeof search);
    search.session = session;
    search.n_groups = n_prompts;
    if (options)
        search.options = *options;
    if (!search.options.beams)
        search.options.beams = 4;
    if (!search.options.n_best)
        search.options.n_best = 1;
    if (search.options.length_penalty == 0)
        search.options.length_penalty = search.options.no_length_penalty ? 0.0f : 1.0f;
    if (search.options.beams == 1)
        search.options.early_stopping = TFM_STOP_FULL;
    search.keep = tfm__product(search.options.beams, TFM__MAX(2, session->model->n_end_ids + 1));
    status = tfm__check_search(&search, error);
    if (status == TFM_OK)
        status = tfm__check_beams(&search, error);
    if (status == TFM_OK)
        status = tfm__search_rooms(&search, prompts, 1, error);
    if (status == TFM_OK && n_prompts)
        status = tfm__search_memory(&search, error);
    if (status != TFM_OK || !n_prompts)
        return status;
    tfm__share_sources(&search);
    status = tfm__search_begin(&search, prompts, error);
    if (status == TFM_OK)
        status = tfm__search_beams(&search, error);
    if (status == TFM_OK)
        tfm__search_results(&search, results);
    tfm__unshare(&search);
    return status;
}

/* ---- chat: templates
 * A family's way of writing a conversation is a row of a table: texts around a turn of each role. Special tokens that stand
 * in them are listed, and become their ids; the same words in a turn's text stay words. A model's file may differ from its
 * family's row in some of the texts, and have a system prompt of its own: tfm__form_texts. */

#define TFM__FORM_TOKENS 4

typedef struct tfm__form {
    const char *name;
    const char *tokens[TFM__FORM_TOKENS]; /* the special tokens in the texts below, as far as there are any */
    const char *begin;
    const char *before[TFM_ROLE_COUNT], *after[TFM_ROLE_COUNT]; /* what stands around a turn */
    const char *lead;     /* between before[TFM_ASSISTANT] and the text; a model writes it itself */
    const char *end;      /* the token that ends an answer, or NULL */
    const char *stops[2]; /* texts that end an answer, as far as there are any */
    unsigned flags;
} tfm__form;

enum {
    TFM__FORM_TRIM = 1,          /* turns lose the white space around them */
    TFM__FORM_SYSTEM_INSIDE = 2, /* the system prompt stands in the first user's turn, after before[TFM_USER] */
    TFM__FORM_TEXT = 4,          /* begins as any text for the tokenizer does */
    TFM__FORM_SYSTEM_LAST = 8,   /* the user's turn that it stands in is the conversation's last */
    TFM__FORM_SYSTEM_ALWAYS = 16 /* what stands around a system prompt is there without one, too */
};

/* Of several rows with a name the first whose tokens the tokenizer has is taken. */
static const tfm__form tfm__forms[] = {
    {"chatml", /* OpenAI's, of Qwen, SmolLM2, Yi, ... */
     {"<|im_start|>", "<|im_end|>", NULL, NULL},
     "",
     {"<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n"},
     {"<|im_end|>\n", "<|im_end|>\n", "<|im_end|>\n"},
     "",
     "<|im_end|>",
     {NULL, NULL},
     0},
    {"llama2",
     {"<s>", "</s>", NULL, NULL},
     "",
     {"<<SYS>>\n", "<s>[INST] ", ""},
     {"\n<</SYS>>\n\n", " [/INST]", " </s>"},
     " ",
     "</s>",
     {NULL, NULL},
     TFM__FORM_TRIM | TFM__FORM_SYSTEM_INSIDE},
    {"llama3",
     {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"},
     "<|begin_of_text|>",
     {"<|start_header_id|>system<|end_header_id|>\n\n", "<|start_header_id|>user<|end_header_id|>\n\n",
      "<|start_header_id|>assistant<|end_header_id|>\n\n"},
     {"<|eot_id|>", "<|eot_id|>", "<|eot_id|>"},
     "",
     "<|eot_id|>",
     {NULL, NULL},
     TFM__FORM_TRIM},
    {"mistral", /* tokenizer v3: 7B v0.3, Mixtral 8x22B, ... */
     {"<s>", "</s>", "[INST]", "[/INST]"},
     "<s>",
     {"", "[INST] ", ""},
     {"\n\n", "[/INST]", "</s>"},
     " ",
     "</s>",
     {NULL, NULL},
     TFM__FORM_SYSTEM_INSIDE},
    {"mistral", /* tokenizer v1: 7B v0.1 and v0.2, Mixtral 8x7B */
     {"<s>", "</s>", NULL, NULL},
     "<s>",
     {"", " [INST] ", ""},
     {"\n\n", " [/INST]", "</s>"},
     " ",
     "</s>",
     {NULL, NULL},
     TFM__FORM_SYSTEM_INSIDE},
    {"gemma", /* knows no system prompt */
     {"<bos>", "<start_of_turn>", "<end_of_turn>", NULL},
     "<bos>",
     {"", "<start_of_turn>user\n", "<start_of_turn>model\n"},
     {"\n\n", "<end_of_turn>\n", "<end_of_turn>\n"},
     "",
     "<end_of_turn>",
     {NULL, NULL},
     TFM__FORM_TRIM | TFM__FORM_SYSTEM_INSIDE},
    {"zephyr", /* of TinyLlama, too */
     {"</s>", NULL, NULL, NULL},
     "",
     {"<|system|>\n", "<|user|>\n", "<|assistant|>\n"},
     {"</s>\n", "</s>\n", "</s>\n"},
     "",
     "</s>",
     {NULL, NULL},
     0},
    {"phi3",
     {"<|system|>", "<|user|>", "<|assistant|>", "<|end|>"},
     "",
     {"<|system|>\n", "<|user|>\n", "<|assistant|>\n"},
     {"<|end|>\n", "<|end|>\n", "<|end|>\n"},
     "",
     "<|end|>",
     {NULL, NULL},
     0},
    {"plain",
     {NULL, NULL, NULL, NULL},
     "",
     {"", "User: ", "Assistant:"},
     {"\n", "\n", "\n"},
     " ",
     NULL,
     {"\nUser:", "\nAssistant:"},
     TFM__FORM_TRIM | TFM__FORM_TEXT},
};

#define TFM__FORMS (sizeof tfm__forms / sizeof *tfm__forms)
#define TFM__OWN_TEXTS 5 /* of a file: the system prompt, and what stands around turns */

/* ---- chat: turns */

typedef struct tfm__turn {
    tfm_role role;
    int generated; /* 1: an answer of the model: */
    char *text;    /* [size]; an answer has what the model wrote before it, too */
    size_t size;
    int32_t *ids; /* [n_ids]: the tokens that the model chose for the first id_bytes of it */
    size_t n_ids, id_bytes;
    void *memory; /* of both */
} tfm__turn;

/* Part of the rendered text that is not tokenized, as it has ids already. Size 0 and no ids: tokens don't cross it. */
typedef struct tfm__mark {
    size_t at, size;
    const int32_t *ids;
    size_t n_ids;
} tfm__mark;

struct tfm_chat {
    tfm_allocator allocator;
    tfm_session *session;
    const tfm__form *form;               /* a row of the table, or: */
    tfm__form own_form;                  /* with what the file says instead */
    char *own_texts[TFM__OWN_TEXTS];     /* terminated; see tfm__form_texts */
    int32_t token_ids[TFM__FORM_TOKENS]; /* of the form's tokens */
    size_t budget, sequence;
    tfm_summarise summarise;
    void *summarise_user;
    tfm__turn system, summary; /* without memory: there is none */
    tfm__turn *turns;          /* [n_turns] */
    size_t n_turns, turn_capacity, n_dropped;
    /* the context, rendered */
    char *text; /* [text_size] */
    size_t text_size, text_capacity;
    tfm__mark *marks; /* [n_marks], in the order of their places */
    size_t n_marks, mark_capacity;
};

/* Room for `wanted` elements in memory that grows. */
static tfm_status tfm__grow(const tfm_allocator *allocator, void **memory, size_t *capacity, size_t wanted, size_t size,
                            tfm_error *error) {
    size_t larger = TFM__MAX(wanted, TFM__MIN(*capacity, SIZE_MAX / 4) * 2);
    void *grown;
    if (wanted <= *capacity)
        return TFM_OK;
    grown = tfm__allocate(allocator, tfm__product(larger, size));
    if (!grown)
        return tfm__fail_memory(error, tfm__product(larger, size));
    if (*capacity)
        memcpy(grown, *memory, *capacity * size);
    tfm__release(allocator, *memory);
    *memory = grown;
    *capacity = larger;
    return TFM_OK;
}

/* Copies a text, and the ids (int32_t, aligned or not) that some of it has, into a new turn. */
static tfm_status tfm__turn_make(const tfm_chat *chat, tfm_role role, const char *text, size_t size, const void *ids,
                                 size_t n_ids, tfm__turn *turn, tfm_error *error) {
    size_t id_bytes = n_ids * sizeof *turn->ids;
    memset(turn, 0, sizeof *turn);
    turn->memory = tfm__allocate(&chat->allocator, size > SIZE_MAX / 2 ? SIZE_MAX : id_bytes + size);
    if (!turn->memory)
        return tfm__fail_memory(error, id_bytes + size);
    turn->role = role;
    turn->ids = (int32_t *)turn->memory;
    turn->n_ids = n_ids;
    turn->text = (char *)turn->memory + id_bytes;
    turn->size = size;
    if (n_ids)
        memcpy(turn->ids, ids, id_bytes);
    if (size)
        memcpy(turn->text, text, size);
    return TFM_OK;
}

static void tfm__turn_free(const tfm_chat *chat, tfm__turn *turn) {
    tfm__release(&chat->allocator, turn->memory);
    memset(turn, 0, sizeof *turn);
}

/* Appends a turn, which is the chat's from then on. */
static tfm_status tfm__turn_append(tfm_chat *chat, const tfm__turn *turn, tfm_error *error) {
    void *turns = chat->turns;
    tfm_status status =
        tfm__grow(&chat->allocator, &turns, &chat->turn_capacity, chat->n_turns + 1, sizeof *chat->turns, error);
    chat->turns = (tfm__turn *)turns;
    if (status == TFM_OK)
        chat->turns[chat->n_turns++] = *turn;
    return status;
}

static void tfm__forget_turns(tfm_chat *chat, size_t n) {
    size_t i;
    for (i = 0; i < n; i++)
        tfm__turn_free(chat, chat->turns + i);
    chat->n_turns -= n;
    if (n)
        memmove(chat->turns, chat->turns + n, chat->n_turns * sizeof *chat->turns);
}

static int tfm__is_blank(char c) {
    return c == ' ' || (c >= '\t' && c <= '\r');
}

/* Takes away the white space around a text. */
static void tfm__trim(const char **text, size_t *size) {
    while (*size && tfm__is_blank(**text))
        ++*text, --*size;
    while (*size && tfm__is_blank((*text)[*size - 1]))
        --*size;
}

static tfm_turn tfm__turn_view(const tfm__turn *turn, tfm_role role) {
    tfm_turn view;
    view.role = role;
    view.text = turn->text ? turn->text : "";
    view.size = turn->size;
    tfm__trim(&view.text, &view.size);
    return view;
}

/* ---- chat: the context */

static tfm_status tfm__put_text(tfm_chat *chat, const char *text, size_t size, tfm_error *error) {
    void *memory = chat->text;
    tfm_status status = tfm__grow(&chat->allocator, &memory, &chat->text_capacity, chat->text_size + size, 1, error);
    chat->text = (char *)memory;
    if (status == TFM_OK && size) {
        memcpy(chat->text + chat->text_size, text, size);
        chat->text_size += size;
    }
    return status;
}

/* Text that has these ids. */
static tfm_status tfm__put_mark(tfm_chat *chat, const char *text, size_t size, const int32_t *ids, size_t n_ids,
                                tfm_error *error) {
    tfm__mark *mark;
    void *memory = chat->marks;
    tfm_status status =
        tfm__grow(&chat->allocator, &memory, &chat->mark_capacity, chat->n_marks + 1, sizeof *mark, error);
    chat->marks = (tfm__mark *)memory;
    if (status != TFM_OK)
        return status;
    mark = chat->marks + chat->n_marks++;
    mark->at = chat->text_size;
    mark->size = size;
    mark->ids = ids;
    mark->n_ids = n_ids;
    return tfm__put_text(chat, text, size, error);
}

/* Which of the form's tokens a text begins with, or TFM__FORM_TOKENS. */
static size_t tfm__form_token(const tfm__form *form, const char *text, size_t size) {
    size_t i;
    for (i = 0; i < TFM__FORM_TOKENS; i++) {
        size_t n = form->tokens[i] ? strlen(form->tokens[i]) : 0;
        if (n && n <= size && !memcmp(text, form->tokens[i], n))
            return i;
    }
    return TFM__FORM_TOKENS;
}

/* A text of the template. */
static tfm_status tfm__put_form(tfm_chat *chat, const char *text, tfm_error *error) {
    const tfm__form *form = chat->form;
    tfm_status status = TFM_OK;
    while (*text && status == TFM_OK) {
        size_t token = tfm__form_token(form, text, strlen(text)), size = 0;
        if (token < TFM__FORM_TOKENS) {
            size = strlen(form->tokens[token]);
            status = tfm__put_mark(chat, text, size, chat->token_ids + token, 1, error);
        } else {
            while (text[size] && tfm__form_token(form, text + size, strlen(text + size)) == TFM__FORM_TOKENS)
                size++;
            status = tfm__put_text(chat, text, size, error);
        }
        text += size;
    }
    return status;
}

/* White space for templates: Unicode's, and the four separators, as for Python's strip(). */
static int tfm__is_stripped(unsigned kind, char c) {
    return (kind & TFM__SPACE) || (c >= 0x1C && c <= 0x1F);
}

static void tfm__strip_begin(const char **text, size_t *size) {
    size_t used;
    while (*size && tfm__is_stripped(tfm__class_at((const unsigned char *)*text, *size, &used), **text)) {
        *text += used;
        *size -= used;
    }
}

static void tfm__strip_end(const char *text, size_t *size) {
    size_t used;
    while (*size && tfm__is_stripped(tfm__class_before((const unsigned char *)text, *size, &used), text[*size - 1]))
        *size -= used;
}

enum { TFM__STRIP_BEGIN = 1, TFM__STRIP_END = 2, TFM__STRIP_BOTH = 3 };

/* A text that somebody wrote. Special tokens in it are plain text to the tokenizer anyway; but some files have a template's
 * tokens among those that are found in any text (SentencePiece's user-defined pieces): those are cut after their first
 * byte. `strip`: where it loses its white space, if the form says so. */
static tfm_status tfm__put_written(tfm_chat *chat, const char *text, size_t size, unsigned strip, tfm_error *error) {
    tfm_status status;
    size_t done = 0, i;
    if (!size)
        text = ""; /* it may be NULL */
    if (!(chat->form->flags & TFM__FORM_TRIM))
        strip = 0;
    if (strip & TFM__STRIP_BEGIN)
        tfm__strip_begin(&text, &size);
    if (strip & TFM__STRIP_END)
        tfm__strip_end(text, &size);
    if (strip == TFM__STRIP_END && !size) /* its beginning stands before it: that is where it ends now */
        tfm__strip_end(chat->text, &chat->text_size);
    for (i = 0; i < size; i++) {
        size_t token = tfm__form_token(chat->form, text + i, size - i);
        if (token == TFM__FORM_TOKENS || tfm_is_special_token(chat->session->model, chat->token_ids[token]))
            continue;
        status = tfm__put_text(chat, text + done, i + 1 - done, error);
        done = i + 1;
        if (status == TFM_OK)
            status = tfm__put_mark(chat, NULL, 0, NULL, 0, error);
        if (status != TFM_OK)
            return status;
    }
    return tfm__put_text(chat, text + done, size - done, error);
}

static int tfm__has_system(const tfm_chat *chat) {
    return chat->system.size || chat->summary.size || (chat->form->flags & TFM__FORM_SYSTEM_ALWAYS);
}

static tfm_status tfm__put_system(tfm_chat *chat, tfm_error *error) {
    /* Inside a turn, and between marks, it stands as it was written. */
    const int inside = (chat->form->flags & TFM__FORM_SYSTEM_INSIDE) && *chat->form->before[TFM_SYSTEM];
    const unsigned strip = inside ? 0 : TFM__STRIP_BOTH;
    tfm_status status = tfm__put_form(chat, chat->form->before[TFM_SYSTEM], error);
    if (status == TFM_OK)
        status = tfm__put_written(chat, chat->system.text, chat->system.size, strip, error);
    if (status == TFM_OK && chat->system.size && chat->summary.size)
        status = tfm__put_text(chat, "\n\n", 2, error);
    if (status == TFM_OK)
        status = tfm__put_written(chat, chat->summary.text, chat->summary.size, strip, error);
    return status == TFM_OK ? tfm__put_form(chat, chat->form->after[TFM_SYSTEM], error) : status;
}

/* What a turn says, perhaps behind the system prompt (`joined`). An answer stands as the model gave it. */
static tfm_status tfm__put_content(tfm_chat *chat, const tfm__turn *turn, int joined, tfm_error *error) {
    tfm_status status = TFM_OK;
    if (turn->generated) {
        status = tfm__put_mark(chat, turn->text, turn->id_bytes, turn->ids, turn->n_ids, error);
        return status == TFM_OK ? tfm__put_text(chat, turn->text + turn->id_bytes, turn->size - turn->id_bytes, error)
                                : status;
    }
    if (turn->role == TFM_ASSISTANT)
        status = tfm__put_form(chat, chat->form->lead, error);
    return status == TFM_OK
               ? tfm__put_written(chat, turn->text, turn->size, joined ? TFM__STRIP_END : TFM__STRIP_BOTH, error)
               : status;
}

/* Renders the conversation from a turn on. */
static tfm_status tfm__chat_render(tfm_chat *chat, size_t first, int answer, tfm_error *error) {
    const tfm__form *form = chat->form;
    int system = tfm__has_system(chat), joined; /* it is still to come; it came just now */
    tfm_status status;
    size_t i;
    chat->text_size = chat->n_marks = 0;
    status = tfm__put_form(chat, form->begin, error);
    if (status == TFM_OK && system && !(form->flags & TFM__FORM_SYSTEM_INSIDE)) {
        status = tfm__put_system(chat, error);
        system = 0;
    }
    for (i = first; i < chat->n_turns && status == TFM_OK; i++) {
        const tfm__turn *turn = chat->turns + i;
        status = tfm__put_form(chat, form->before[turn->role], error);
        joined = system && turn->role == TFM_USER && (i + 1 == chat->n_turns || !(form->flags & TFM__FORM_SYSTEM_LAST));
        if (status == TFM_OK && joined) {
            status = tfm__put_system(chat, error);
            system = 0;
        }
        if (status == TFM_OK)
            status = tfm__put_content(chat, turn, joined, error);
        if (status == TFM_OK)
            status = tfm__put_form(chat, form->after[turn->role], error);
    }
    return status == TFM_OK && answer ? tfm__put_form(chat, form->before[TFM_ASSISTANT], error) : status;
}

/* The ids of the rendered context. To the tokenizer each stretch between marks is a part of one text, as when special
 * tokens are found in it. */
static tfm_status tfm__chat_encode(const tfm_chat *chat, int32_t *ids, size_t capacity, size_t *n_ids,
                                   tfm_error *error) {
    const tfm__tokenizer *tokenizer = &chat->session->model->tokenizer;
    const tfm_engine *engine = chat->session->engine; /* whose scratch memory is idle */
    const unsigned char *text = (const unsigned char *)chat->text;
    uint32_t stack[TFM__MERGE_STACK];
    tfm__encoder encoder;
    tfm_status status = TFM_OK;
    size_t done = 0, i;
    memset(&encoder, 0, sizeof encoder);
    encoder.tokenizer = tokenizer;
    encoder.ids = ids;
    encoder.capacity = capacity;
    encoder.error = error;
    encoder.text = text;
    tfm__encode_begin(&encoder, stack, engine->scratch, engine->scratch_size * sizeof *engine->scratch);
    if (chat->form->flags & TFM__FORM_TEXT)
        tfm__encode_ids(&encoder, tokenizer->source.prefix_ids, tokenizer->source.n_prefix);
    for (i = 0; i <= chat->n_marks && status == TFM_OK; i++) {
        const tfm__mark *mark = i < chat->n_marks ? chat->marks + i : NULL;
        size_t end = mark ? mark->at : chat->text_size;
        if (end > done)
            status = tfm__encode_text(&encoder, 0, text + done, end - done);
        if (mark) {
            tfm__encode_ids(&encoder, mark->ids, mark->n_ids);
            done = mark->at + mark->size;
        }
    }
    if (encoder.own)
        tokenizer->allocator.release(tokenizer->allocator.user, encoder.own);
    *n_ids = encoder.n_ids;
    return status;
}

/* The context from a turn on, ready to be answered, into session->prompt. */
static tfm_status tfm__chat_context(tfm_chat *chat, size_t first, size_t *n_ids, tfm_error *error) {
    tfm_status status = tfm__chat_render(chat, first, 1, error);
    return status == TFM_OK ? tfm__chat_encode(chat, chat->session->prompt, chat->session->context, n_ids, error)
                            : status;
}

/* ---- chat: dropping turns */

/* Asks the caller for a summary of the first n turns, and the summary before them. */
static tfm_status tfm__ask_summary(const tfm_chat *chat, size_t n, tfm__turn *summary, tfm_error *error) {
    tfm_turn *turns = (tfm_turn *)tfm__allocate(&chat->allocator, n * sizeof *turns);
    char *before = (char *)tfm__allocate_zeroed(&chat->allocator, chat->summary.size + 1);
    tfm_status status = TFM_OK;
    const char *text;
    size_t i;
    memset(summary, 0, sizeof *summary);
    if (turns && before) {
        for (i = 0; i < n; i++)
            turns[i] = tfm__turn_view(chat->turns + i, chat->turns[i].role);
        if (chat->summary.size)
            memcpy(before, chat->summary.text, chat->summary.size);
        text = chat->summarise(chat->summarise_user, chat->summary.size ? before : NULL, turns, n);
        if (text && *text)
            status = tfm__turn_make(chat, TFM_SYSTEM, text, strlen(text), NULL, 0, summary, error);
    } else
        status = tfm__fail_memory(error, n * sizeof *turns + chat->summary.size + 1);
    tfm__release(&chat->allocator, before);
    tfm__release(&chat->allocator, turns);
    return status;
}

/* Drops the first turns, of which the caller may make a summary; the context that is left has n_ids tokens. */
static tfm_status tfm__chat_drop(tfm_chat *chat, size_t first, size_t limit, size_t *n_ids, tfm_error *error) {
    tfm__turn before = chat->summary, summary;
    tfm_status status = TFM_OK;
    memset(&summary, 0, sizeof summary);
    if (chat->summarise && first)
        status = tfm__ask_summary(chat, first, &summary, error);
    chat->summary = summary;
    if (status == TFM_OK)
        status = tfm__chat_context(chat, first, n_ids, error);
    if (status == TFM_OK && *n_ids > limit && chat->summary.size) { /* no room for the summary */
        tfm__turn_free(chat, &chat->summary);
        status = tfm__chat_context(chat, first, n_ids, error);
    }
    if (status == TFM_OK && *n_ids > limit)
        status = tfm__fail(error, TFM_ERROR_CONTEXT_FULL,
                           "the system prompt and the message take %lu tokens, but there is room for %lu",
                           (unsigned long)*n_ids, (unsigned long)limit);
    if (status != TFM_OK) {
        tfm__turn_free(chat, &chat->summary);
        chat->summary = before;
        return status;
    }
    tfm__turn_free(chat, &before);
    tfm__forget_turns(chat, first);
    chat->n_dropped += first;
    return TFM_OK;
}

/* The context for an answer, into session->prompt, with at least `reserve` tokens left for it; if it has to, it drops turns
 * until half of the budget is free, or all but the last message. What is tried has no summary in it: the turns that stay
 * have room without one. */
static tfm_status tfm__chat_fit(tfm_chat *chat, size_t reserve, size_t *n_ids, tfm_error *error) {
    const size_t limit = chat->budget - reserve, half = TFM__MIN(chat->budget / 2, limit);
    const tfm__turn summary = chat->summary;
    size_t first, keep = 0, n;
    tfm_status status = tfm__chat_context(chat, 0, n_ids, error);
    if (status != TFM_OK || *n_ids <= limit)
        return status;
    memset(&chat->summary, 0, sizeof chat->summary);
    for (first = 1, n = *n_ids; first < chat->n_turns && status == TFM_OK && n > half; first++)
        if (chat->turns[first].role == TFM_USER) {
            status = tfm__chat_context(chat, first, &n, error);
            keep = first;
        }
    chat->summary = summary;
    return status == TFM_OK ? tfm__chat_drop(chat, keep, limit, n_ids, error) : status;
}

/* ---- chat: answers */

/* An answer that is being given. */
typedef struct tfm__answer {
    tfm_chat *chat;
    const tfm_generate_options *options; /* the caller's */
    tfm_print print;
    void *user;
    int begun;  /* something other than white space came */
    char *text; /* [size] */
    size_t size, capacity;
    int32_t *ids; /* [n_ids] */
    size_t n_ids, id_capacity;
    tfm_status status;
    tfm_error *error;
} tfm__answer;

static int tfm__answer_token(void *user, int32_t token) {
    tfm__answer *answer = (tfm__answer *)user;
    void *memory = answer->ids;
    answer->status = tfm__grow(&answer->chat->allocator, &memory, &answer->id_capacity, answer->n_ids + 1,
                               sizeof *answer->ids, answer->error);
    answer->ids = (int32_t *)memory;
    if (answer->status != TFM_OK)
        return 1;
    answer->ids[answer->n_ids++] = token;
    return answer->options->on_token && answer->options->on_token(answer->options->on_token_user, token);
}

static int tfm__answer_print(void *user, const char *text, size_t size) {
    tfm__answer *answer = (tfm__answer *)user;
    void *memory = answer->text;
    answer->status =
        tfm__grow(&answer->chat->allocator, &memory, &answer->capacity, answer->size + size, 1, answer->error);
    answer->text = (char *)memory;
    if (answer->status != TFM_OK)
        return 1;
    memcpy(answer->text + answer->size, text, size);
    answer->size += size;
    for (; size && !answer->begun && tfm__is_blank(*text); size--)
        text++;
    answer->begun |= size > 0;
    return size && answer->print && answer->print(answer->user, text, size);
}

/* How many of the ids, from the first on, are what stands in the text, and how many bytes of it that is: not those of a
 * stop string, or of a character that never became whole. */
static size_t tfm__answer_ids(const tfm__answer *answer, size_t n_ids, size_t *bytes) {
    const tfm_model *model = answer->chat->session->model;
    size_t i, size;
    *bytes = 0;
    for (i = 0; i < n_ids; i++) {
        const char *text = tfm_token_text(model, answer->ids[i], &size);
        if (!text || tfm_is_special_token(model, answer->ids[i]))
            continue;
        if (size > answer->size - *bytes || (size && memcmp(text, answer->text + *bytes, size)))
            break;
        *bytes += size;
    }
    return i;
}

static tfm_status tfm__answer_keep(const tfm__answer *answer, const tfm_generate_stats *stats, tfm_error *error) {
    tfm_chat *chat = answer->chat;
    tfm__turn turn;
    size_t bytes, n_ids = answer->n_ids - (stats->stop == TFM_STOP_END_TOKEN);
    tfm_status status;
    n_ids = tfm__answer_ids(answer, n_ids, &bytes);
    status = tfm__turn_make(chat, TFM_ASSISTANT, answer->text, answer->size, answer->ids, n_ids, &turn, error);
    if (status != TFM_OK)
        return status;
    turn.generated = 1;
    turn.id_bytes = bytes;
    status = tfm__turn_append(chat, &turn, error);
    if (status != TFM_OK)
        tfm__turn_free(chat, &turn);
    return status;
}

/* Adds the template's ways to end an answer to the caller's. The pointers are in `memory`, for the caller to release. */
static tfm_status tfm__answer_stops(const tfm_chat *chat, tfm_generate_options *options, void **memory,
                                    tfm_error *error) {
    const tfm__form *form = chat->form;
    size_t strings = options->n_stop_strings, tokens = options->n_stop_tokens, i;
    size_t size = (strings + 2) * sizeof(char *) + (tokens + TFM__FORM_TOKENS) * sizeof(int32_t);
    const char **stop_strings = (const char **)(*memory = tfm__allocate(&chat->allocator, size));
    int32_t *stop_tokens;
    if (!stop_strings)
        return tfm__fail_memory(error, size);
    stop_tokens = (int32_t *)(void *)(stop_strings + strings + 2);
    for (i = 0; i < strings; i++)
        stop_strings[i] = options->stop_strings[i];
    for (i = 0; i < tokens; i++)
        stop_tokens[i] = options->stop_tokens[i];
    for (i = 0; i < 2 && form->stops[i]; i++)
        stop_strings[strings++] = form->stops[i];
    for (i = 0; i < TFM__FORM_TOKENS; i++)
        if (form->end && form->tokens[i] && !strcmp(form->end, form->tokens[i]))
            stop_tokens[tokens++] = chat->token_ids[i];
    options->stop_strings = stop_strings;
    options->n_stop_strings = strings;
    options->stop_tokens = stop_tokens;
    options->n_stop_tokens = tokens;
    return TFM_OK;
}

/* The model's answer to the context of n_ids tokens in session->prompt. */
static tfm_status tfm__chat_answer(tfm__answer *answer, size_t n_ids, tfm_error *error) {
    tfm_chat *chat = answer->chat;
    tfm_generate_options options = *answer->options;
    const size_t room = chat->budget - n_ids;
    tfm_generate_stats unread;
    void *stops = NULL;
    tfm_status status = tfm__answer_stops(chat, &options, &stops, error);
    options.max_tokens = options.max_tokens ? TFM__MIN(options.max_tokens, room) : room;
    options.append = options.shift = 0;
    options.sequence = chat->sequence;
    options.on_token = tfm__answer_token;
    options.on_token_user = answer;
    options.stats = options.stats ? options.stats : &unread;
    if (status == TFM_OK)
        status =
            tfm_generate_ids(chat->session, chat->session->prompt, n_ids, &options, tfm__answer_print, answer, error);
    tfm__release(&chat->allocator, stops);
    if (status == TFM_OK)
        status = answer->status;
    if (status == TFM_OK && options.stats->stop == TFM_STOP_MAX_TOKENS &&
        options.max_tokens != answer->options->max_tokens)
        options.stats->stop = TFM_STOP_CONTEXT;
    return status == TFM_OK ? tfm__answer_keep(answer, options.stats, error) : status;
}

TFM_API tfm_status tfm_chat_say(tfm_chat *chat, const char *message, const tfm_generate_options *options,
                                tfm_print print, void *print_user, tfm_error *error) {
    tfm_generate_options usual;
    tfm__answer answer;
    size_t reserve, n_ids;
    tfm_status status = tfm_chat_add(chat, TFM_USER, message, error);
    if (status != TFM_OK)
        return status;
    memset(&usual, 0, sizeof usual);
    memset(&answer, 0, sizeof answer);
    answer.chat = chat;
    answer.options = options ? options : &usual;
    answer.print = print;
    answer.user = print_user;
    answer.error = error;
    if (answer.options->stats)
        memset(answer.options->stats, 0, sizeof *answer.options->stats);
    reserve = TFM__MAX(chat->budget / 4, 1);
    if (answer.options->max_tokens)
        reserve = TFM__MIN(reserve, answer.options->max_tokens);
    status = tfm__chat_fit(chat, reserve, &n_ids, error);
    if (status == TFM_OK)
        status = tfm__chat_answer(&answer, n_ids, error);
    tfm__release(&chat->allocator, answer.text);
    tfm__release(&chat->allocator, answer.ids);
    if (status != TFM_OK)
        tfm__turn_free(chat, chat->turns + --chat->n_turns);
    return status;
}

/* ---- chat: the conversation */

static tfm_status tfm__chat_form(tfm_chat *chat, const tfm__form *form, tfm_error *error) {
    const tfm_model *model = chat->session->model;
    size_t i;
    for (i = 0; i < TFM__FORM_TOKENS && form->tokens[i]; i++) {
        chat->token_ids[i] = tfm_token_id(model, form->tokens[i], strlen(form->tokens[i]));
        if (chat->token_ids[i] < 0)
            return tfm__fail(error, TFM_ERROR_UNSUPPORTED,
                             "%s: the tokenizer has no token '%s', which the chat template '%s' needs",
                             model->file->name, form->tokens[i], form->name);
    }
    chat->form = form;
    return TFM_OK;
}

/* The first of the forms with that name whose tokens are there. */
static tfm_status tfm__chat_find_form(tfm_chat *chat, const char *name, size_t size, tfm_error *error) {
    tfm_status status =
        tfm__fail(error, TFM_ERROR_UNSUPPORTED,
                  "unknown chat template '%.*s': expected chatml, llama2, llama3, mistral, gemma, zephyr, phi3 or "
                  "plain",
                  (int)TFM__MIN(size, 40), name);
    size_t i;
    for (i = 0; i < TFM__FORMS && !chat->form; i++)
        if (!tfm__compare_text(name, size, tfm__forms[i].name, strlen(tfm__forms[i].name)))
            status = tfm__chat_form(chat, tfm__forms + i, error);
    return status;
}

/* A text of the file's metadata, terminated, which the chat's own_texts hold; *text stays if it is not there. */
static tfm_status tfm__own_text(tfm_chat *chat, const char *key, size_t index, const char **text, tfm_error *error) {
    const tfm_file *file = chat->session->model->file;
    const tfm_meta *meta = tfm_file_find_meta(file, key);
    char *copy;
    if (!meta)
        return TFM_OK;
    if (meta->type != TFM_META_TEXT)
        return tfm__fail(error, TFM_ERROR_FORMAT, "%s: metadata '%s': expected a text", file->name, key);
    chat->own_texts[index] = copy = (char *)tfm__allocate(&chat->allocator, meta->count + 1);
    if (!copy)
        return tfm__fail_memory(error, meta->count + 1);
    memcpy(copy, meta->values, meta->count);
    copy[meta->count] = 0;
    *text = copy;
    return TFM_OK;
}

/* What the file says of its template: texts and flags in the place of the row's, and *system, its own system prompt. */
static tfm_status tfm__form_texts(tfm_chat *chat, const char **system, tfm_error *error) {
    static const char *const flag_keys[] = {"chat.system_last", "chat.system_always"};
    static const unsigned flags[] = {TFM__FORM_SYSTEM_LAST, TFM__FORM_SYSTEM_ALWAYS};
    tfm__form *form = &chat->own_form;
    const struct {
        const char *key, **text;
    } texts[TFM__OWN_TEXTS] = {{"chat.system", system},
                               {"chat.before_system", form->before + TFM_SYSTEM},
                               {"chat.before_user", form->before + TFM_USER},
                               {"chat.after_user", form->after + TFM_USER},
                               {"chat.before_answer", &form->lead}};
    tfm_status status = TFM_OK;
    size_t i;
    *form = *chat->form;
    chat->form = form;
    for (i = 0; i < TFM__OWN_TEXTS && status == TFM_OK; i++)
        status = tfm__own_text(chat, texts[i].key, i, texts[i].text, error);
    for (i = 0; i < 2; i++) {
        const tfm_meta *meta = tfm_file_find_meta(chat->session->model->file, flag_keys[i]);
        if (meta && meta->type == TFM_META_I64 && meta->count && *(const int64_t *)meta->values)
            form->flags |= flags[i];
    }
    return status;
}

static tfm_status tfm__chat_setup(tfm_chat *chat, const tfm_chat_options *options, tfm_error *error) {
    const tfm_model *model = chat->session->model;
    const tfm_meta *meta = tfm_file_find_meta(model->file, "chat.template");
    const char *name = options->chat_template ? options->chat_template : "plain", *system = NULL;
    size_t size = strlen(name);
    tfm_status status = tfm__check_sequence(chat->session, options->sequence, error);
    if (status != TFM_OK)
        return status;
    if (!model->has_tokenizer)
        return tfm__fail_no_tokenizer(model, error);
    if (model->description.kind != TFM_DECODER || model->description.head == TFM_NO_HEAD)
        return tfm__fail(error, TFM_ERROR_UNSUPPORTED, "%s: the model is no decoder that writes text",
                         model->file->name);
    if (!options->chat_template && meta) {
        if (meta->type != TFM_META_TEXT)
            return tfm__fail(error, TFM_ERROR_FORMAT, "%s: metadata 'chat.template': expected a word",
                             model->file->name);
        name = (const char *)meta->values;
        size = meta->count;
    }
    status = tfm__chat_find_form(chat, name, size, error);
    if (status == TFM_OK && !options->chat_template)
        status = tfm__form_texts(chat, &system, error);
    system = options->system ? options->system : system;
    return status == TFM_OK && system ? tfm_chat_add(chat, TFM_SYSTEM, system, error) : status;
}

TFM_API tfm_chat *tfm_chat_create(tfm_session *session, const tfm_chat_options *options, tfm_error *error) {
    tfm_chat_options usual;
    tfm_chat *chat = (tfm_chat *)tfm__allocate_zeroed(&session->allocator, sizeof *chat);
    tfm_error unread;
    memset(&usual, 0, sizeof usual);
    options = options ? options : &usual;
    if (!chat) {
        tfm__fail_memory(error, sizeof *chat);
        return NULL;
    }
    chat->allocator = session->allocator;
    chat->session = session;
    chat->sequence = options->sequence;
    chat->budget = options->budget ? TFM__MIN(options->budget, session->context) : session->context;
    chat->summarise = options->summarise;
    chat->summarise_user = options->summarise_user;
    unread.status = TFM_OK;
    if (tfm__chat_setup(chat, options, &unread) == TFM_OK)
        return chat;
    tfm__fail(error, unread.status, "%s", unread.message);
    tfm_chat_free(chat);
    return NULL;
}

TFM_API void tfm_chat_free(tfm_chat *chat) {
    tfm_allocator allocator;
    size_t i;
    if (!chat)
        return;
    allocator = chat->allocator;
    tfm_chat_reset(chat);
    for (i = 0; i < TFM__OWN_TEXTS; i++)
        tfm__release(&allocator, chat->own_texts[i]);
    tfm__turn_free(chat, &chat->system);
    tfm__release(&allocator, chat->turns);
    tfm__release(&allocator, chat->text);
    tfm__release(&allocator, chat->marks);
    tfm__release(&allocator, chat);
}

TFM_API tfm_status tfm_chat_add(tfm_chat *chat, tfm_role role, const char *text, tfm_error *error) {
    tfm__turn turn;
    tfm_status status;
    if ((unsigned)role >= TFM_ROLE_COUNT)
        return tfm__fail(error, TFM_ERROR_ARGUMENT, "unknown role %d", (int)role);
    status = tfm__turn_make(chat, role, text, strlen(text), NULL, 0, &turn, error);
    if (status == TFM_OK && role == TFM_SYSTEM) {
        tfm__turn_free(chat, &chat->system);
        chat->system = turn;
    } else if (status == TFM_OK) {
        status = tfm__turn_append(chat, &turn, error);
        if (status != TFM_OK)
            tfm__turn_free(chat, &turn);
    }
    return status;
}

TFM_API void tfm_chat_reset(tfm_chat *chat) {
    tfm__forget_turns(chat, chat->n_turns);
    tfm__turn_free(chat, &chat->summary);
    chat->n_dropped = 0;
}

TFM_API size_t tfm_chat_n_turns(const tfm_chat *chat) {
    return chat->n_turns;
}

TFM_API tfm_turn tfm_chat_turn(const tfm_chat *chat, size_t index) {
    const tfm__turn none = {TFM_SYSTEM, 0, NULL, 0, NULL, 0, 0, NULL};
    return index < chat->n_turns ? tfm__turn_view(chat->turns + index, chat->turns[index].role)
                                 : tfm__turn_view(&none, TFM_SYSTEM);
}

TFM_API tfm_turn tfm_chat_system(const tfm_chat *chat) {
    return tfm__turn_view(&chat->system, TFM_SYSTEM);
}

TFM_API tfm_turn tfm_chat_summary(const tfm_chat *chat) {
    return tfm__turn_view(&chat->summary, TFM_SYSTEM);
}

TFM_API size_t tfm_chat_n_dropped(const tfm_chat *chat) {
    return chat->n_dropped;
}

TFM_API const char *tfm_chat_template(const tfm_chat *chat) {
    return chat->form->name;
}

TFM_API tfm_status tfm_chat_render(tfm_chat *chat, int answer, char *text, size_t capacity, size_t *size,
                                   tfm_error *error) {
    tfm_status status = tfm__chat_render(chat, 0, answer, error);
    *size = status == TFM_OK ? chat->text_size : 0;
    if (text && TFM__MIN(*size, capacity))
        memcpy(text, chat->text, TFM__MIN(*size, capacity));
    return status;
}

TFM_API tfm_status tfm_chat_ids(tfm_chat *chat, int answer, int32_t *ids, size_t capacity, size_t *n_ids,
                                tfm_error *error) {
    tfm_status status = tfm__chat_render(chat, 0, answer, error);
    *n_ids = 0;
    return status == TFM_OK ? tfm__chat_encode(chat, ids, capacity, n_ids, error) : status;
}

/* ---- chat: files
 * header, 64 bytes:  u8[8] magic "TFMC\r\n\x1a\n" | u32 version | u32 type of the keys and values | u64 file size | u32
 *                    the model's fingerprint | u32 0 | u64 number of turns (the system prompt and the summary are the first
 *                    two) | u64 number of tokens in the cache | u64 turns dropped | u64 0
 * turns:             u32 role | u32 1 for an answer of the model | u64 bytes of text | u64 number of ids | u64 bytes of
 *                    text that the ids stand for | i32[] ids | text
 * cache:             i32[] tokens | for each layer the keys, then the values: [n_kv_heads][tokens] of [head_dim] numbers,
 *                    with int8 followed by the scales of their groups
 * end:               u32 CRC-32 of all before it */

#define TFM__CHAT_HEADER ((size_t)64)
#define TFM__CHAT_TURN ((size_t)32)

static const unsigned char tfm__chat_magic[8] = {'T', 'F', 'M', 'C', '\r', '\n', 0x1A, '\n'};

/* What results depend on: the file's header has a checksum over the description and the tensors' checksums. The types are
 * those of the weights in memory. */
static uint32_t tfm__fingerprint(const tfm_model *model) {
    unsigned char bytes[24];
    tfm__crc_tables crc;
    const tfm_stack *stack = model->decoder.shape;
    tfm__crc_prepare(&crc);
    memcpy(bytes, model->file->bytes.data + 60, 4);
    memcpy(bytes + 4, model->file->bytes.data + 16, 8);
    tfm__put_u32(bytes + 12, stack->n_layers ? (uint32_t)model->decoder.blocks->attention.qkv.weight.dtype : 0);
    tfm__put_u32(bytes + 16, (uint32_t)model->head.weight.dtype);
    tfm__put_u32(bytes + 20, (uint32_t)model->token_embedding.dtype);
    return tfm__crc(&crc, 0, bytes, sizeof bytes);
}

/* Where a chat is written: memory, if that is enough, or a file. The first failure stays. */
typedef struct tfm__chat_writer {
    unsigned char *data;
    size_t capacity, size;
#ifndef TFM_NO_STDIO
    FILE *file;
    int failed;
#endif
    tfm__crc_tables crc;
    uint32_t checksum;
} tfm__chat_writer;

static void tfm__chat_put(tfm__chat_writer *writer, const void *data, size_t size) {
    if (!size)
        return;
    if (writer->data && writer->capacity - writer->size >= size)
        memcpy(writer->data + writer->size, data, size);
#ifndef TFM_NO_STDIO
    if (writer->file && fwrite(data, 1, size, writer->file) != size)
        writer->failed = 1;
#endif
    writer->checksum = tfm__crc(&writer->crc, writer->checksum, data, size);
    writer->size += size;
}

static void tfm__chat_put_turn(tfm__chat_writer *writer, const tfm__turn *turn) {
    unsigned char head[TFM__CHAT_TURN];
    tfm__put_u32(head, (uint32_t)turn->role);
    tfm__put_u32(head + 4, (uint32_t)turn->generated);
    tfm__put_u64(head + 8, turn->size);
    tfm__put_u64(head + 16, turn->n_ids);
    tfm__put_u64(head + 24, turn->id_bytes);
    tfm__chat_put(writer, head, sizeof head);
    tfm__chat_put(writer, turn->ids, turn->n_ids * sizeof *turn->ids);
    tfm__chat_put(writer, turn->text, turn->size);
}

/* n numbers of a token's key or value of a head, from `first` on (a multiple of 16), between a page and a row: to the row, or
 * back. */
static void tfm__kv_piece(const tfm_kv *kv, size_t what, char *page, size_t at, size_t first, size_t n,
                          unsigned char *row, int to_row) {
    const size_t size = tfm__dtype_sizes[kv->dtype];
    size_t i;
    for (i = 0; i < n; i++) {
        char *number = page + tfm__kv_number(kv, what, at, first) + tfm__kv_step(kv, what, i);
        memcpy(to_row ? (char *)row + i * size : number, to_row ? number : (char *)row + i * size, size);
    }
}

typedef struct tfm__kv_copy {
    tfm__chat_writer *writer;  /* either the caches go there, */
    const unsigned char *from; /* or they come from here */
} tfm__kv_copy;

/* One token's key or value of a head. */
static void tfm__kv_transfer_token(const tfm_kv *kv, size_t what, char *page, size_t at, tfm__kv_copy *copy) {
    unsigned char row[TFM__PANEL * sizeof(float)];
    size_t first, group;
    for (first = 0; first < kv->head_dim; first += TFM__PANEL) {
        size_t n = TFM__MIN(TFM__PANEL, kv->head_dim - first), size = n * tfm__dtype_sizes[kv->dtype];
        if (!copy->writer)
            memcpy(row, copy->from, size);
        tfm__kv_piece(kv, what, page, at, first, n, row, copy->writer != NULL);
        if (copy->writer)
            tfm__chat_put(copy->writer, row, size);
        else
            copy->from += size;
    }
    for (group = 0; group < tfm__kv_scales(kv); group++) {
        char *scale = page + tfm__kv_scale_at(kv, what, at, group);
        if (copy->writer)
            tfm__chat_put(copy->writer, scale, sizeof(uint16_t));
        else {
            memcpy(scale, copy->from, sizeof(uint16_t));
            copy->from += sizeof(uint16_t);
        }
    }
}

/* The first n tokens of all layers and heads. */
static void tfm__kv_transfer(const tfm_kv *kv, size_t n, tfm__kv_copy copy) {
    size_t series, token;
    for (series = 0; series < kv->n_layers * 2 * kv->n_kv_heads; series++) {
        size_t head = series % kv->n_kv_heads, what = series / kv->n_kv_heads % 2, layer = series / kv->n_kv_heads / 2;
        for (token = 0; token < n; token++)
            tfm__kv_transfer_token(kv, what, tfm__kv_at(kv, layer, token / TFM_KV_PAGE, what, head),
                                   token % TFM_KV_PAGE, &copy);
    }
}

static size_t tfm__kv_token_bytes(const tfm_kv *kv) {
    return kv->n_layers * 2 * kv->n_kv_heads *
           (kv->head_dim * tfm__dtype_sizes[kv->dtype] + tfm__kv_scales(kv) * sizeof(uint16_t));
}

static uint64_t tfm__chat_bytes(const tfm_chat *chat) {
    const tfm_kv *kv = chat->session->kv + chat->sequence;
    uint64_t bytes =
        TFM__CHAT_HEADER + 4 + (chat->n_turns + 2) * TFM__CHAT_TURN + chat->system.size + chat->summary.size;
    size_t i;
    for (i = 0; i < chat->n_turns; i++)
        bytes += chat->turns[i].size + chat->turns[i].n_ids * sizeof(int32_t);
    return bytes + kv->n_tokens * (sizeof(int32_t) + (uint64_t)tfm__kv_token_bytes(kv));
}

static void tfm__chat_write(const tfm_chat *chat, tfm__chat_writer *writer) {
    const tfm_kv *kv = chat->session->kv + chat->sequence;
    unsigned char head[TFM__CHAT_HEADER], end[4];
    tfm__kv_copy copy;
    size_t i;
    tfm__crc_prepare(&writer->crc);
    memset(head, 0, sizeof head);
    memcpy(head, tfm__chat_magic, sizeof tfm__chat_magic);
    tfm__put_u32(head + 8, 1);
    tfm__put_u32(head + 12, (uint32_t)kv->dtype);
    tfm__put_u64(head + 16, tfm__chat_bytes(chat));
    tfm__put_u32(head + 24, tfm__fingerprint(chat->session->model));
    tfm__put_u64(head + 32, chat->n_turns + 2);
    tfm__put_u64(head + 40, kv->n_tokens);
    tfm__put_u64(head + 48, chat->n_dropped);
    tfm__chat_put(writer, head, sizeof head);
    tfm__chat_put_turn(writer, &chat->system);
    tfm__chat_put_turn(writer, &chat->summary);
    for (i = 0; i < chat->n_turns; i++)
        tfm__chat_put_turn(writer, chat->turns + i);
    tfm__chat_put(writer, chat->session->tokens + chat->sequence * chat->session->context,
                  kv->n_tokens * sizeof(int32_t));
    copy.writer = writer;
    copy.from = NULL;
    tfm__kv_transfer(kv, kv->n_tokens, copy);
    tfm__put_u32(end, writer->checksum);
    tfm__chat_put(writer, end, sizeof end);
}

TFM_API tfm_status tfm_chat_save_memory(const tfm_chat *chat, void *data, size_t capacity, size_t *size,
                                        tfm_error *error) {
    uint64_t bytes = tfm__chat_bytes(chat);
    tfm__chat_writer writer;
    *size = (size_t)bytes;
    if (bytes > SIZE_MAX / 2)
        return tfm__fail(error, TFM_ERROR_UNSUPPORTED, "the conversation is too large for memory");
    if (!data || capacity < bytes)
        return TFM_OK;
    memset(&writer, 0, sizeof writer);
    writer.data = (unsigned char *)data;
    writer.capacity = capacity;
    tfm__chat_write(chat, &writer);
    return TFM_OK;
}

/* A saved chat that is being read. */
typedef struct tfm__chat_reader {
    const char *name; /* for messages */
    const unsigned char *data, *end;
    tfm_chat *into; /* the turns, before they take the place of the chat's own */
    size_t n_turns, n_tokens;
    tfm_error *error;
} tfm__chat_reader;

static tfm_status tfm__chat_damaged(const tfm__chat_reader *reader, const char *what) {
    return tfm__fail(reader->error, TFM_ERROR_FORMAT, "%.300s: the saved conversation is damaged: %s", reader->name,
                     what);
}

static tfm_status tfm__chat_read_header(tfm__chat_reader *reader, const tfm_chat *chat, size_t size) {
    const tfm_kv *kv = chat->session->kv + chat->sequence;
    const unsigned char *p = reader->data;
    tfm__crc_tables crc;
    if (size < 8 || memcmp(p, tfm__chat_magic, 8))
        return tfm__fail(reader->error, TFM_ERROR_FORMAT, "%.300s: not a saved conversation", reader->name);
    if (size < TFM__CHAT_HEADER + 4 || tfm__u64(p + 16) > size)
        return tfm__chat_damaged(reader, "it is truncated");
    if (tfm__u32(p + 8) != 1)
        return tfm__fail(reader->error, TFM_ERROR_UNSUPPORTED,
                         "%.300s: a saved conversation of version %lu, expected 1", reader->name,
                         (unsigned long)tfm__u32(p + 8));
    tfm__crc_prepare(&crc);
    if (tfm__u64(p + 16) != size || tfm__crc(&crc, 0, p, size - 4) != tfm__u32(p + size - 4))
        return tfm__chat_damaged(reader, "its checksum is wrong");
    if (tfm__u32(p + 24) != tfm__fingerprint(chat->session->model))
        return tfm__fail(reader->error, TFM_ERROR_ARGUMENT,
                         "%.300s: the conversation was saved with another model, or with weights of another type",
                         reader->name);
    if (tfm__u32(p + 12) != (uint32_t)kv->dtype)
        return tfm__fail(reader->error, TFM_ERROR_ARGUMENT,
                         "%.300s: the conversation's keys and values are %s, the session's %s", reader->name,
                         tfm__is_kv_dtype((tfm_dtype)tfm__u32(p + 12)) ? tfm_dtype_name((tfm_dtype)tfm__u32(p + 12))
                                                                       : "of another type",
                         tfm_dtype_name(kv->dtype));
    if (tfm__u64(p + 40) > chat->session->context)
        return tfm__fail(reader->error, TFM_ERROR_CONTEXT_FULL,
                         "%.300s: the conversation has %llu tokens in its cache, but the context has room for %lu",
                         reader->name, (unsigned long long)tfm__u64(p + 40), (unsigned long)chat->session->context);
    if (tfm__u64(p + 32) < 2 || tfm__u64(p + 32) > size / TFM__CHAT_TURN || tfm__u64(p + 48) > SIZE_MAX / 2)
        return tfm__chat_damaged(reader, "the number of turns is impossible");
    if (tfm__u32(p + 28) || tfm__u64(p + 56))
        return tfm__chat_damaged(reader, "what its header keeps free is not zero");
    reader->n_turns = (size_t)tfm__u64(p + 32) - 2;
    reader->n_tokens = (size_t)tfm__u64(p + 40);
    reader->into->n_dropped = (size_t)tfm__u64(p + 48);
    reader->data += TFM__CHAT_HEADER;
    reader->end = p + size - 4;
    return TFM_OK;
}

static int tfm__are_ids(const tfm_model *model, const unsigned char *ids, size_t n) {
    size_t i;
    for (i = 0; i < n; i++)
        if (tfm__u32(ids + 4 * i) >= model->description.vocab_size)
            return 0;
    return 1;
}

static tfm_status tfm__chat_read_turn(tfm__chat_reader *reader, int is_system, tfm__turn *turn) {
    const unsigned char *p = reader->data, *ids = p + TFM__CHAT_TURN;
    const size_t all = (size_t)(reader->end - p), rest = all < TFM__CHAT_TURN ? 0 : all - TFM__CHAT_TURN;
    size_t size, n_ids;
    uint32_t role, generated;
    tfm_status status;
    if (all < TFM__CHAT_TURN || tfm__u64(p + 8) > rest || tfm__u64(p + 16) > (rest - tfm__u64(p + 8)) / 4)
        return tfm__chat_damaged(reader, "a turn is larger than the file");
    role = tfm__u32(p);
    generated = tfm__u32(p + 4);
    size = (size_t)tfm__u64(p + 8);
    n_ids = (size_t)tfm__u64(p + 16);
    if (role >= TFM_ROLE_COUNT || (role == TFM_SYSTEM) != is_system || generated > (role == TFM_ASSISTANT) ||
        (n_ids && !generated) || tfm__u64(p + 24) > (generated ? size : 0))
        return tfm__chat_damaged(reader, "a turn is impossible");
    if (!tfm__are_ids(reader->into->session->model, ids, n_ids))
        return tfm__chat_damaged(reader, "a token of a turn is not in the vocabulary");
    status = tfm__turn_make(reader->into, (tfm_role)role, (const char *)ids + 4 * n_ids, size, ids, n_ids, turn,
                            reader->error);
    turn->generated = (int)generated;
    turn->id_bytes = (size_t)tfm__u64(p + 24);
    reader->data = ids + 4 * n_ids + size;
    return status;
}

static tfm_status tfm__chat_read_turns(tfm__chat_reader *reader) {
    tfm_status status = tfm__chat_read_turn(reader, 1, &reader->into->system);
    size_t i;
    if (status == TFM_OK)
        status = tfm__chat_read_turn(reader, 1, &reader->into->summary);
    for (i = 0; i < reader->n_turns && status == TFM_OK; i++) {
        tfm__turn turn;
        memset(&turn, 0, sizeof turn);
        status = tfm__chat_read_turn(reader, 0, &turn);
        if (status == TFM_OK)
            status = tfm__turn_append(reader->into, &turn, reader->error);
        if (status != TFM_OK)
            tfm__turn_free(reader->into, &turn);
    }
    return status;
}

/* Reads all of it but the caches, which are only looked at. */
static tfm_status tfm__chat_read(tfm__chat_reader *reader, const tfm_chat *chat, size_t size) {
    const tfm_kv *kv = chat->session->kv + chat->sequence;
    tfm_status status = tfm__chat_read_header(reader, chat, size);
    if (status == TFM_OK)
        status = tfm__chat_read_turns(reader);
    if (status != TFM_OK)
        return status;
    if ((size_t)(reader->end - reader->data) != reader->n_tokens * (4 + tfm__kv_token_bytes(kv)))
        return tfm__chat_damaged(reader, "the size of its caches is wrong");
    if (!tfm__are_ids(chat->session->model, reader->data, reader->n_tokens))
        return tfm__chat_damaged(reader, "a token of its cache is not in the vocabulary");
    return TFM_OK;
}

/* The chat becomes what was read. */
static void tfm__chat_replace(tfm_chat *chat, const tfm__chat_reader *reader) {
    tfm_session *session = chat->session;
    tfm_kv *kv = session->kv + chat->sequence;
    tfm_chat *from = reader->into, old = *chat;
    tfm__kv_copy copy;
    chat->system = from->system;
    chat->summary = from->summary;
    chat->turns = from->turns;
    chat->n_turns = from->n_turns;
    chat->turn_capacity = from->turn_capacity;
    chat->n_dropped = from->n_dropped;
    from->system = old.system; /* for the caller to free */
    from->summary = old.summary;
    from->turns = old.turns;
    from->n_turns = old.n_turns;
    memcpy(session->tokens + chat->sequence * session->context, reader->data, reader->n_tokens * sizeof(int32_t));
    copy.writer = NULL;
    copy.from = reader->data + reader->n_tokens * sizeof(int32_t);
    tfm__kv_transfer(kv, reader->n_tokens, copy);
    kv->n_tokens = reader->n_tokens;
}

static tfm_status tfm__chat_load(tfm_chat *chat, const void *data, size_t size, const char *name, tfm_error *error) {
    tfm__chat_reader reader;
    tfm_chat into;
    tfm_status status;
    memset(&reader, 0, sizeof reader);
    memset(&into, 0, sizeof into);
    into.allocator = chat->allocator;
    into.session = chat->session;
    reader.name = name;
    reader.data = (const unsigned char *)data;
    reader.into = &into;
    reader.error = error;
    status = tfm__chat_read(&reader, chat, size);
    if (status == TFM_OK)
        tfm__chat_replace(chat, &reader);
    tfm_chat_reset(&into);
    tfm__turn_free(&into, &into.system);
    tfm__release(&into.allocator, into.turns);
    return status;
}

TFM_API tfm_status tfm_chat_load_memory(tfm_chat *chat, const void *data, size_t size, tfm_error *error) {
    return tfm__chat_load(chat, data, size, "chat", error);
}

#ifndef TFM_NO_STDIO

static tfm_status tfm__chat_write_file(const tfm_chat *chat, const char *part, const char *path, tfm_error *error) {
    tfm__chat_writer writer;
    int why;
    memset(&writer, 0, sizeof writer);
    writer.file = tfm__open_file(part, "wb");
    if (!writer.file)
        return tfm__fail(error, TFM_ERROR_FILE, "%.300s: can't be created: %s", part, strerror(errno));
    tfm__chat_write(chat, &writer);
    why = errno;
    if (fclose(writer.file) && !writer.failed)
        writer.failed = 1, why = errno;
    if (!writer.failed)
        return tfm__rename_temporary(part, path, error);
    tfm__remove_file(part);
    return tfm__fail(error, TFM_ERROR_FILE, "%.300s: can't be written: %s", part, strerror(why));
}

TFM_API tfm_status tfm_chat_save(const tfm_chat *chat, const char *path, tfm_error *error) {
    tfm_status status = tfm__check_replaceable(path, error);
    char *part = status == TFM_OK ? tfm__temporary_path(path, &chat->allocator) : NULL;
    if (status != TFM_OK)
        return status;
    if (!part)
        return tfm__fail_memory(error, strlen(path) + sizeof ".part");
    status = tfm__chat_write_file(chat, part, path, error);
    tfm__release(&chat->allocator, part);
    return status;
}

TFM_API tfm_status tfm_chat_load(tfm_chat *chat, const char *path, tfm_error *error) {
    tfm__bytes bytes = {NULL, 0, 0};
    tfm_status status = tfm__map_file(path, &chat->allocator, &bytes, error);
    if (status != TFM_OK)
        return status;
    status = tfm__chat_load(chat, bytes.data, bytes.size, path, error);
    tfm__unmap_file(&chat->allocator, &bytes);
    return status;
}

#endif /* !TFM_NO_STDIO */

#ifdef TFM__FAST_MATH
#if defined(__clang__)
#pragma float_control(pop)
#else
#pragma GCC pop_options
#endif
#endif

#endif /* TFM_IMPLEMENTATION */
#endif /* !TFM__TIER */

/*
MIT License

Copyright (c) 2026 the tfm.h authors

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation
files (the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy,
modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the
Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE,
ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
*/
