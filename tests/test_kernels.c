/* The kernels of every instruction set that this CPU has, against arithmetic done here in double precision or with
 * fmaf(), and 16-bit floats and panels against their definition. The kernels are private to tfm.h, so this file has a
 * copy of the library of its own. */
#if defined(__GNUC__)
#define TFM_API static __attribute__((unused))
#else
#define TFM_API static
#endif
#define TFM_IMPLEMENTATION
#include "../tfm.h"

#include "test.h"

#include <float.h>
#include <math.h>

#define PANEL 16
#define GUARD 24               /* floats before and behind what a kernel may write */
#define SENTINEL ((float)1e30) /* what they hold; the cast: x87 would keep more bits of 1e30f */
#define EPS 5.9604645e-8       /* 2^-24: half a unit in the last place of 1 */

/* Every table of kernels that runs here, the plain C one first. */
static const tfm__kernels *kernels_here[TFM_ISA_COUNT];
static size_t n_kernels_here;

static void find_kernels(void) {
    tfm_isa isas[TFM_ISA_COUNT];
    size_t i;
    n_kernels_here = test_isas(isas);
    for (i = 0; i < n_kernels_here; i++)
        kernels_here[i] = tfm__kernels_of(isas[i]);
}

static const char *name_of(const tfm__kernels *kernels) {
    return tfm_isa_name(kernels->isa);
}

/* For who runs the tests on another CPU, or an emulated one: which kernels it has. */
static void print_kernels(void) {
    size_t i;
    printf("kernels of:");
    for (i = 0; i < n_kernels_here; i++)
        printf(" %s", name_of(kernels_here[i]));
    putchar('\n');
}

static int same_bits(const void *a, const void *b, size_t n) {
    return !memcmp(a, b, n * sizeof(float));
}

/* ---- 16-bit floats by their definition */

float test_from_f16(uint16_t half) {
    int exponent = half >> 10 & 31, mantissa = half & 1023;
    double magnitude = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
    if (exponent == 31)
        magnitude = mantissa ? (double)NAN : (double)INFINITY;
    return (float)(half & 0x8000 ? -magnitude : magnitude);
}

/* A magnitude rounded to a float with `bits` of mantissa (the leading 1 included) and the smallest normal exponent
 * `lowest`: how many steps above 0 it is. (frexp's mantissa is in [1/2, 1), rint rounds ties to even, and a mantissa
 * that is rounded up to 1 carries into the exponent as it should.) */
static uint32_t round_steps(double magnitude, int bits, int lowest) {
    int exponent;
    double mantissa = frexp(magnitude, &exponent);
    if (magnitude == 0 || exponent - 1 < lowest)
        return (uint32_t)rint(ldexp(magnitude, bits - 1 - lowest));
    return ((uint32_t)(exponent - 1 - lowest) << (bits - 1)) + (uint32_t)rint(ldexp(mantissa, bits));
}

static uint16_t round_to_half(float value, int bits, int lowest, uint32_t infinity) {
    uint32_t sign = signbit(value) ? 0x8000 : 0, steps = infinity;
    if (isnan(value))
        return (uint16_t)(sign | infinity | 1u << (bits - 2));
    if (!isinf(value))
        steps = round_steps(fabs((double)value), bits, lowest);
    return (uint16_t)(sign | (steps < infinity ? steps : infinity));
}

uint16_t test_to_f16(float value) {
    return round_to_half(value, 11, -14, 0x7C00);
}

uint16_t test_to_bf16(float value) {
    return round_to_half(value, 8, -126, 0x7F80);
}

/* The same number, or both NaN. */
static int same_number(float a, float b) {
    return (isnan(a) && isnan(b)) || (a == b && !signbit(a) == !signbit(b));
}

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Both NaN, or the same bits. */
static int same_half(uint16_t a, uint16_t b, uint32_t infinity) {
    return a == b || ((a & 0x7FFFu) > infinity && (b & 0x7FFFu) > infinity);
}

static int rounds_well(float value) {
    return same_half(tfm__to_f16(value), test_to_f16(value), 0x7C00) &&
           same_half(tfm__to_bf16(value), test_to_bf16(value), 0x7F80);
}

/* All halves; the floats on both sides of each, of the middle between it and the next, and the middle itself. */
static void test_halves(void) {
    uint32_t i, wrong_f16 = 0, wrong_bf16 = 0, wrong_back = 0, wrong_rounding = 0;
    int d;
    for (i = 0; i < 65536; i++) {
        const uint16_t half = (uint16_t)i;
        const uint32_t f16_bits = tfm__float_bits(test_from_f16(half)), bf16_bits = i << 16;
        wrong_f16 += !same_number(tfm__from_f16(half), test_from_f16(half));
        wrong_bf16 += !same_number(tfm__from_bf16(half), from_bits(bf16_bits));
        wrong_back += !same_half(tfm__to_f16(test_from_f16(half)), half, 0x7C00);
        wrong_back += !same_half(tfm__to_bf16(from_bits(bf16_bits)), half, 0x7F80);
        for (d = -1; d <= 1; d++) { /* half a step: bit 12 of a float for f16, bit 15 for bf16 */
            wrong_rounding += !rounds_well(from_bits(f16_bits + (uint32_t)d));
            wrong_rounding += !rounds_well(from_bits(f16_bits + 0x1000 + (uint32_t)d));
            wrong_rounding += !rounds_well(from_bits(bf16_bits + (uint32_t)d));
            wrong_rounding += !rounds_well(from_bits(bf16_bits + 0x8000 + (uint32_t)d));
        }
    }
    for (i = 0; i < 2049; i++) /* f16's subnormals are multiples of 2^-24, with ties between them */
        for (d = -1; d <= 1; d++)
            wrong_rounding += !rounds_well(from_bits(tfm__float_bits((float)ldexp(i + 0.5, -24)) + (uint32_t)d));
    CHECK_MSG(!wrong_f16, "tfm__from_f16: %u of 65536 are wrong", wrong_f16);
    CHECK_MSG(!wrong_bf16, "tfm__from_bf16: %u of 65536 are wrong", wrong_bf16);
    CHECK_MSG(!wrong_back, "16-bit floats to fp32 and back: %u are not what they were", wrong_back);
    CHECK_MSG(!wrong_rounding, "rounding to 16 bits: %u ties and neighbours of ties are wrong", wrong_rounding);
}

static void test_half_rounding_anywhere(void) {
    uint32_t bits = 0, wrong = 0, n;
    for (n = 0; n < 1500000; n++, bits += 2863) /* 2863 * 1.5 million = 2^32: the floats from end to end */
        wrong += !rounds_well(from_bits(bits));
    CHECK_MSG(!wrong, "rounding to 16 bits: %u of %u are wrong", wrong, n);
    CHECK(tfm__to_f16(65519.0f) == 0x7BFF && tfm__to_f16(65520.0f) == 0x7C00 && tfm__to_f16(-FLT_MAX) == 0xFC00);
    CHECK(tfm__to_bf16(FLT_MAX) == 0x7F80 && tfm__to_bf16(-INFINITY) == 0xFF80);
    CHECK(tfm__to_f16(2.9802322e-8f) == 0 && tfm__to_f16(2.9802326e-8f) == 1 && tfm__to_f16(-0.0f) == 0x8000);
}

/* A product with one input of 1 and all weights there are: what a kernel makes of a half when it loads it. */
static void test_half_loads(const tfm__kernels *kernels, tfm_dtype dtype) {
    static uint16_t weights[65536];
    static float y[65536];
    const float one = 1;
    uint32_t i, wrong = 0;
    tfm__matmul job;
    for (i = 0; i < 65536; i++)
        weights[i] = (uint16_t)i;
    job.x = &one;
    job.x_stride = 1;
    job.n_rows = 1;
    job.w = weights;
    job.panel_bytes = PANEL * sizeof *weights;
    job.n = 65536;
    job.k = 1;
    job.y = y;
    job.y_stride = 65536;
    job.add = 0;
    kernels->matmul[dtype](&job);
    for (i = 0; i < 65536; i++) {
        float expected = dtype == TFM_F16 ? test_from_f16((uint16_t)i) : from_bits(i << 16);
        wrong += !(y[i] == expected || (isnan(y[i]) && isnan(expected))); /* 0 + -0 is +0 */
    }
    CHECK_MSG(!wrong, "%s: %u of 65536 %s weights are loaded wrongly", name_of(kernels), wrong, tfm_dtype_name(dtype));
}

/* ---- packing */

/* A matrix of a layout and a type, with the numbers it stands for. */
typedef struct stored {
    tfm_tensor tensor;
    float *values; /* [out][in], rounded to the type */
    void *data;
} stored;

static void put_number(void *data, tfm_dtype dtype, size_t index, float value) {
    if (dtype == TFM_F32)
        ((float *)data)[index] = value;
    else
        ((uint16_t *)data)[index] = dtype == TFM_F16 ? test_to_f16(value) : test_to_bf16(value);
}

static float get_number(const void *data, tfm_dtype dtype, size_t index) {
    if (dtype == TFM_F32)
        return ((const float *)data)[index];
    return dtype == TFM_F16 ? test_from_f16(((const uint16_t *)data)[index])
                            : from_bits((uint32_t)((const uint16_t *)data)[index] << 16);
}

/* Where [o][i] of an [out][in] matrix lies: the definition of the layouts. */
static size_t place(tfm_layout layout, size_t out, size_t in, size_t o, size_t i) {
    if (layout == TFM_ROWS)
        return o * in + i;
    return layout == TFM_COLS ? i * out + o : o / PANEL * (in * PANEL) + i * PANEL + o % PANEL;
}

static stored make_matrix(tfm_layout layout, tfm_dtype dtype, size_t out, size_t in) {
    size_t padded = (out + PANEL - 1) / PANEL * PANEL, o, i;
    stored m;
    m.values = (float *)test_allocate(out * in * sizeof *m.values);
    m.data = test_allocate(padded * in * sizeof(float));
    memset(m.data, 0, padded * in * sizeof(float));
    m.tensor = tfm_matrix((const float *)m.data, out, in);
    m.tensor.layout = layout;
    m.tensor.dtype = dtype;
    test_fill(m.values, out * in, out * 1000 + in);
    for (o = 0; o < out; o++)
        for (i = 0; i < in; i++) {
            put_number(m.data, dtype, place(layout, out, in, o, i), m.values[o * in + i]);
            m.values[o * in + i] = get_number(m.data, dtype, place(layout, out, in, o, i));
        }
    return m;
}

static void free_matrix(stored *m) {
    free(m->values);
    free(m->data);
}

/* How many numbers of the panels are wrong: those of the matrix, rounded to the panels' type, and zeros behind it. */
static size_t wrong_in_panels(const stored *m, const tfm_tensor *packed) {
    size_t out = m->tensor.shape[0], in = m->tensor.shape[1], padded = (out + PANEL - 1) / PANEL * PANEL, wrong = 0, o,
           i;
    for (o = 0; o < padded; o++)
        for (i = 0; i < in; i++) {
            float expected[1] = {0};
            if (o < out)
                put_number(expected, packed->dtype, 0, m->values[o * in + i]);
            if (o < out)
                expected[0] = get_number(expected, packed->dtype, 0);
            wrong += get_number(packed->data, packed->dtype, place(TFM_PANELS, out, in, o, i)) != expected[0];
        }
    return wrong;
}

static void test_pack_one(tfm_layout layout, tfm_dtype from, tfm_dtype to, size_t out, size_t in) {
    stored m = make_matrix(layout, from, out, in);
    tfm_error error = {TFM_OK, ""};
    tfm_tensor packed;
    float row[512];
    size_t wrong = 0, o, column = in / 3, i;
    if (CHECK_MSG(tfm_pack(&m.tensor, to, NULL, &packed, &error) == TFM_OK, "tfm_pack: %s", error.message)) {
        CHECK(packed.dtype == to && packed.layout == TFM_PANELS && packed.n_dims == 2 && packed.shape[0] == out &&
              packed.shape[1] == in && packed.shape[2] == 1 && packed.shape[3] == 1);
        wrong = wrong_in_panels(&m, &packed);
        CHECK_MSG(!wrong, "tfm_pack: %lu numbers of a [%lu, %lu] matrix (layout %d, %s to %s) are wrong",
                  (unsigned long)wrong, (unsigned long)out, (unsigned long)in, (int)layout, tfm_dtype_name(from),
                  tfm_dtype_name(to));
        tfm_unpack(&packed, NULL);
        CHECK(!packed.data && !packed.dtype);
    }
    for (wrong = 0, o = 0; o < out; o++) { /* a row of the matrix, and what is left of it from a column on */
        tfm__matrix_row(&m.tensor, o, 0, in, row);
        wrong += !same_bits(row, m.values + o * in, in);
        tfm__matrix_row(&m.tensor, o, column, in - column, row);
        for (i = column; i < in; i++)
            wrong += row[i - column] != m.values[o * in + i];
    }
    CHECK_MSG(!wrong, "tfm__matrix_row: %lu are wrong (layout %d, %s)", (unsigned long)wrong, (int)layout,
              tfm_dtype_name(from));
    free_matrix(&m);
}

static void test_packing(void) {
    static const size_t outs[] = {1, 15, 16, 17, 50}, ins[] = {1, 2, 31, 127, 128, 129, 300};
    size_t a, b;
    int layout, from, to;
    for (layout = 0; layout < TFM_LAYOUT_COUNT; layout++)
        for (from = TFM_F32; from <= TFM_BF16; from++)
            for (to = TFM_F32; to <= TFM_BF16; to++)
                for (a = 0; a < sizeof outs / sizeof *outs; a++)
                    for (b = 0; b < sizeof ins / sizeof *ins; b++)
                        test_pack_one((tfm_layout)layout, (tfm_dtype)from, (tfm_dtype)to, outs[a], ins[b]);
}

static void check_unpackable(tfm_tensor tensor, tfm_dtype dtype, tfm_status expected) {
    tfm_error error = {TFM_OK, ""};
    tfm_tensor packed;
    CHECK(tfm_pack(&tensor, dtype, NULL, &packed, &error) == expected);
    CHECK(error.status == expected && strstr(error.message, "tfm_pack"));
    CHECK(tfm_pack(&tensor, dtype, NULL, &packed, NULL) == expected);
}

static void test_pack_errors(void) {
    static const float numbers[4] = {1, 2, 3, 4};
    tfm_tensor odd = tfm_matrix(numbers, 2, 2);
    odd.dtype = (tfm_dtype)77;
    check_unpackable(odd, TFM_F32, TFM_ERROR_UNSUPPORTED);
    check_unpackable(tfm_vector(numbers, 4), TFM_F32, TFM_ERROR_ARGUMENT);
    check_unpackable(tfm_matrix(numbers, 0, 4), TFM_F32, TFM_ERROR_ARGUMENT);
    check_unpackable(tfm_matrix(numbers, 4, 0), TFM_F32, TFM_ERROR_ARGUMENT);
    check_unpackable(tfm_matrix(NULL, 2, 2), TFM_F32, TFM_ERROR_ARGUMENT);
    check_unpackable(tfm_matrix(numbers, 2, 2), (tfm_dtype)77, TFM_ERROR_UNSUPPORTED);
}

/* ---- the matrix product */

#define MAX_ROWS 17
#define MAX_N 100
#define MAX_K 200
#define MAX_STRIDE 112

/* A product whose matrices lie awkwardly: rows longer than need be, everything just one number off an aligned address,
 * panels with a gap between them, NaN wherever nobody should look, and a guard around y. */
typedef struct product {
    tfm_dtype dtype;
    tfm__matmul job;
    float x[MAX_ROWS * (MAX_K + 8)];
    float weights[(MAX_N / PANEL + 1) * PANEL * MAX_K]; /* [panel][k][16], as numbers */
    unsigned char w[((MAX_N / PANEL + 1) * (PANEL * MAX_K + 4) + 1) * sizeof(float)];
    float before[MAX_ROWS * MAX_STRIDE + 2 * GUARD], y[MAX_ROWS * MAX_STRIDE + 2 * GUARD];
    float expected[MAX_ROWS * MAX_N];
    double magnitude[MAX_ROWS * MAX_N]; /* sum of |x w| */
} product;

static void fill_weights(product *p, size_t seed) {
    size_t n_panels = (p->job.n + PANEL - 1) / PANEL, k = p->job.k, panel, i;
    size_t gap = seed % 3 * 2, element = p->dtype == TFM_F32 ? 4 : 2;
    unsigned char *w = p->w + element;
    test_fill(p->weights, n_panels * k * PANEL, seed);
    memset(p->w, 0xFF, sizeof p->w); /* NaN in every type */
    for (panel = 0; panel < n_panels; panel++)
        for (i = 0; i < k * PANEL; i++) {
            float *number = p->weights + panel * k * PANEL + i;
            size_t at = panel * (k * PANEL + gap) + i;
            if (panel * PANEL + i % PANEL >= p->job.n)
                continue; /* past the last output */
            put_number(w, p->dtype, at, *number);
            *number = get_number(w, p->dtype, at);
        }
    p->job.w = w;
    p->job.panel_bytes = (k * PANEL + gap) * element;
}

static void fill_product(product *p, tfm_dtype dtype, size_t rows, size_t n, size_t k, int add, size_t seed) {
    size_t x_stride = k + seed % 5, y_stride = n + seed % 7, r, i;
    float *x = p->x + 1, *before = p->before + GUARD;
    p->dtype = dtype;
    p->job.n_rows = rows;
    p->job.n = n;
    p->job.k = k;
    p->job.x = x;
    p->job.x_stride = x_stride;
    p->job.y = p->y + GUARD;
    p->job.y_stride = y_stride;
    p->job.add = add;
    fill_weights(p, seed);
    memset(p->x, 0xFF, sizeof p->x);
    for (i = 0; i < sizeof p->before / sizeof *p->before; i++)
        p->before[i] = SENTINEL;
    for (r = 0; r < rows; r++) {
        test_fill(x + r * x_stride, k, seed + r + 1);
        if (add)
            test_fill(before + r * y_stride, n, seed + r + 100);
        else
            memset(before + r * y_stride, 0xFF, n * sizeof *before); /* what was there must not matter */
    }
}

/* The sums as the vector kernels promise them: a chain of fused multiply-adds over the inputs in order. */
static void expect_product(product *p) {
    const tfm__matmul *job = &p->job;
    size_t r, column, i;
    for (r = 0; r < job->n_rows; r++)
        for (column = 0; column < job->n; column++) {
            const float *x = job->x + r * job->x_stride;
            const float *w = p->weights + column / PANEL * job->k * PANEL + column % PANEL;
            float sum = job->add ? p->before[GUARD + r * job->y_stride + column] : 0;
            double magnitude = fabs((double)sum);
            for (i = 0; i < job->k; i++) {
                sum = fmaf(x[i], w[i * PANEL], sum);
                magnitude += fabs((double)x[i] * (double)w[i * PANEL]);
            }
            p->expected[r * job->n + column] = sum;
            p->magnitude[r * job->n + column] = magnitude;
        }
}

/* The first place where y is wrong, or -1. The plain C kernel may round each product, which n + 2 half units in the
 * last place of the sum of magnitudes allow for; the others must have the very bits. */
static long wrong_place(const product *p, int exact) {
    const tfm__matmul *job = &p->job;
    size_t i, end = sizeof p->y / sizeof *p->y;
    for (i = 0; i < end; i++) {
        size_t r = i < GUARD ? job->n_rows : (i - GUARD) / job->y_stride;
        size_t column = i < GUARD ? 0 : (i - GUARD) % job->y_stride, at = r * job->n + column;
        if (r >= job->n_rows || column >= job->n) {
            if (p->y[i] != SENTINEL)
                return (long)i;
        } else if (exact ? !same_bits(p->y + i, p->expected + at, 1)
                         : !(fabs((double)p->y[i] - (double)p->expected[at]) <=
                             2 * EPS * (double)(job->k + 2) * p->magnitude[at]))
            return (long)i;
    }
    return -1;
}

static void check_product(product *p) {
    size_t i;
    expect_product(p);
    for (i = 0; i < n_kernels_here; i++) {
        long wrong;
        memcpy(p->y, p->before, sizeof p->y);
        kernels_here[i]->matmul[p->dtype](&p->job);
        wrong = wrong_place(p, kernels_here[i]->isa != TFM_ISA_SCALAR);
        CHECK_MSG(wrong < 0, "%s %s: %lu rows, n %lu, k %lu, add %d: number %ld from the start of y is wrong",
                  name_of(kernels_here[i]), tfm_dtype_name(p->dtype), (unsigned long)p->job.n_rows,
                  (unsigned long)p->job.n, (unsigned long)p->job.k, p->job.add, wrong - GUARD);
    }
}

static void test_products(product *p) {
    static const size_t ns[] = {1, 15, 16, 17, 33, 47, 48, 49, 64, 95, 97, 100}, ks[] = {1, 2, 7, 64};
    size_t rows, a, b, seed = 0;
    int dtype;
    for (rows = 1; rows <= MAX_ROWS; rows++)
        for (a = 0; a < sizeof ns / sizeof *ns; a++)
            for (b = 0; b < sizeof ks / sizeof *ks; b++)
                for (dtype = TFM_F32; dtype <= TFM_BF16; dtype++, seed++) {
                    fill_product(p, (tfm_dtype)dtype, rows, ns[a], ks[b], (int)(seed / 3 % 2), seed);
                    check_product(p);
                }
    for (a = 1; a <= MAX_N; a++, seed++) {
        fill_product(p, (tfm_dtype)(TFM_F32 + a % 3), a % 11 + 1, a, 33, a % 2 == 0, seed);
        check_product(p);
    }
    for (a = 1; a <= MAX_K; a++, seed++) {
        fill_product(p, (tfm_dtype)(TFM_F32 + a % 3), 3, 20, a, a % 2 == 0, seed);
        check_product(p);
    }
}

/* A row computed alone, and 16 outputs computed alone, have the bits that they have among others. */
static void check_tiles(product *p, const tfm__kernels *kernels) {
    const tfm__matmul all = p->job;
    float alone[MAX_STRIDE];
    size_t r, column, wrong = 0;
    memcpy(p->y, p->before, sizeof p->y);
    kernels->matmul[p->dtype](&p->job);
    for (r = 0; r < all.n_rows; r++) {
        const float *y = all.y + r * all.y_stride, *before = p->before + GUARD + r * all.y_stride;
        p->job.n_rows = 1;
        p->job.x = all.x + r * all.x_stride;
        p->job.y = alone;
        memcpy(alone, before, all.n * sizeof *alone);
        kernels->matmul[p->dtype](&p->job);
        wrong += !same_bits(alone, y, all.n);
        for (column = 0; column < all.n; column += PANEL) {
            p->job.n = TFM__MIN((size_t)PANEL, all.n - column);
            p->job.w = (const char *)all.w + column / PANEL * all.panel_bytes;
            memcpy(alone, before + column, p->job.n * sizeof *alone);
            kernels->matmul[p->dtype](&p->job);
            wrong += !same_bits(alone, y + column, p->job.n);
        }
        p->job = all;
    }
    CHECK_MSG(!wrong, "%s %s: %lu rows or panels differ from those computed with others", name_of(kernels),
              tfm_dtype_name(p->dtype), (unsigned long)wrong);
}

static void test_tiles(product *p) {
    size_t i, rows;
    int dtype, add;
    for (i = 0; i < n_kernels_here; i++)
        for (dtype = TFM_F32; dtype <= TFM_BF16; dtype++)
            for (add = 0; add <= 1; add++)
                for (rows = 5; rows <= MAX_ROWS; rows += 6) {
                    fill_product(p, (tfm_dtype)dtype, rows, MAX_N, 77, add, rows);
                    check_tiles(p, kernels_here[i]);
                }
}

/* ---- activations */

/* To double precision. erfc and the logistic form have no cancellation in the tails. */
static double exact_activation(tfm_activation activation, double x) {
    switch (activation) {
    case TFM_RELU: return x < 0 ? 0 : x;
    case TFM_GELU: return x * 0.5 * erfc(-x * 0.70710678118654752);
    case TFM_GELU_TANH: return x / (1 + exp(-2 * 0.79788456080286536 * (x + 0.044715 * x * x * x)));
    case TFM_QUICK_GELU: return x / (1 + exp(-1.702 * x));
    case TFM_SILU: return x / (1 + exp(-x));
    case TFM_TANH: return tanh(x);
    default: return x;
    }
}

/* How far from exact a result may be: 2e-7 of x, which is two or three roundings. That is much in the negative tail,
 * where the result is small beside x: it is what 1 + erf and 1 + tanh, of which the formulas of GELU are made, leave there.
 * With a sigmoid the vector kernels are better: relative to the result, they have what the rounding of an exponent of about
 * 15 leaves (the plain C ones have up to 2e-7 of x). */
static double activation_error(const tfm__kernels *kernels, tfm_activation activation, double x, double exact) {
    const double smallest = 3e-45; /* two steps of the smallest numbers there are */
    double tail = (activation == TFM_SILU ? 3e-7 : 3e-6) * fmax(fabs(exact), fabs(x) * EPS);
    int sigmoid = activation == TFM_SILU || activation == TFM_QUICK_GELU;
    if (activation <= TFM_RELU)
        return 0;
    if (activation == TFM_TANH)
        return 2e-7;
    return (sigmoid && kernels->isa != TFM_ISA_SCALAR ? fmin(2e-7 * fabs(x), tail) : 2e-7 * fabs(x)) + smallest;
}

static void activate(const tfm__kernels *kernels, tfm_activation activation, float *y, size_t n) {
    tfm__finish job;
    memset(&job, 0, sizeof job);
    job.x = job.y = y;
    job.n_rows = 1;
    job.n = n;
    job.activation = activation;
    kernels->finish(&job);
}

/* Many finite x at once; reports the worst. */
static void check_activation(tfm_activation activation, const float *x, size_t n) {
    float *y = (float *)test_allocate(n * sizeof *y);
    double *exact = (double *)test_allocate(n * sizeof *exact);
    size_t i, k;
    for (i = 0; i < n; i++)
        exact[i] = exact_activation(activation, (double)x[i]);
    for (k = 0; k < n_kernels_here; k++) {
        double worst = 0;
        size_t at = 0;
        memcpy(y, x, n * sizeof *y);
        activate(kernels_here[k], activation, y, n);
        for (i = 0; i < n; i++) {
            double off = fabs((double)y[i] - exact[i]);
            double excess = off - activation_error(kernels_here[k], activation, (double)x[i], exact[i]);
            if (!(excess <= worst))
                worst = excess, at = i;
        }
        CHECK_MSG(worst <= 0, "%s, activation %d: %.9g becomes %.9g, exact is %.12g", name_of(kernels_here[k]),
                  (int)activation, (double)x[at], (double)y[at], exact[at]);
    }
    free(y);
    free(exact);
}

#define MANY 120000
static void test_activations(void) {
    float *x = (float *)test_allocate(MANY * sizeof *x);
    int activation;
    size_t n, i;
    for (activation = 0; activation < TFM_ACTIVATION_COUNT; activation++) {
        for (i = 0; i < MANY; i++)
            x[i] = (float)(-20 + 40.0 * (double)i / MANY);
        check_activation((tfm_activation)activation, x, MANY);
        for (n = 0, i = 0; i < MANY; i++) { /* floats from end to end: tiny, huge, of both signs */
            float value = from_bits((uint32_t)i * 35791u);
            if (value - value == 0)
                x[n++] = value;
        }
        check_activation((tfm_activation)activation, x, n);
    }
    free(x);
}

/* Infinities and NaN. What minus infinity becomes: 0, but for x * 0 (NaN, as in PyTorch) in the formulas, and never
 * another number. */
static void test_activation_limits(const tfm__kernels *kernels, tfm_activation activation) {
    float y[18];
    size_t i;
    for (i = 0; i < 18; i += 3) {
        y[i] = INFINITY;
        y[i + 1] = -INFINITY;
        y[i + 2] = NAN;
    }
    activate(kernels, activation, y, 18);
    for (i = 0; i < 18; i += 3) {
        float plus = activation == TFM_TANH ? 1 : INFINITY, minus = y[i + 1];
        CHECK_MSG(y[i] == plus, "%s, activation %d: infinity becomes %g", name_of(kernels), (int)activation,
                  (double)y[i]);
        CHECK_MSG(activation == TFM_NO_ACTIVATION ? minus == -INFINITY
                  : activation == TFM_TANH        ? minus == -1
                  : activation == TFM_RELU        ? minus == 0
                                                  : minus == 0 || !(minus - minus == 0),
                  "%s, activation %d: -infinity becomes %g", name_of(kernels), (int)activation, (double)minus);
        CHECK_MSG(isnan(y[i + 2]), "%s, activation %d: NaN becomes %g", name_of(kernels), (int)activation,
                  (double)y[i + 2]);
    }
}

/* Far outside the vector kernels' GELU is exactly x, or 0. (The plain C one has what the C library and the x87 make of
 * 1 + erf(x).) */
static void test_gelu_outside(const tfm__kernels *kernels, tfm_activation activation) {
    const uint32_t six = 0x40C00000, infinity = 0x7F800000;
    float x[16], y[16], wrong = 0;
    uint32_t bits;
    size_t i;
    if (kernels->isa == TFM_ISA_SCALAR)
        return;
    for (bits = six; bits < infinity; bits += 12345) {
        for (i = 0; i < 16; i++)
            x[i] = i % 2 ? -from_bits(bits) : from_bits(bits);
        memcpy(y, x, sizeof x);
        activate(kernels, activation, y, 16);
        for (i = 0; i < 16; i++)
            if (!(y[i] == (i % 2 ? 0 : x[i])))
                wrong = x[i];
    }
    CHECK_MSG(wrong == 0, "%s, activation %d: %.9g becomes neither 0 nor itself", name_of(kernels), (int)activation,
              (double)wrong);
}

/* finish: y (+)= activation(x + bias), over odd shapes, with y in a place of its own or in that of x. */
typedef struct finishing {
    float x[3 * MAX_STRIDE + 2 * GUARD], y[3 * MAX_STRIDE + 2 * GUARD], bias[MAX_N + 1];
} finishing;

static void fill_finishing(finishing *f, size_t rows, size_t n, size_t x_stride, size_t y_stride) {
    size_t i, r;
    for (i = 0; i < sizeof f->x / sizeof *f->x; i++)
        f->x[i] = f->y[i] = SENTINEL;
    test_fill(f->bias, MAX_N + 1, n);
    for (r = 0; r < rows; r++) {
        test_fill(f->x + GUARD + r * x_stride, n, n + r);
        test_fill(f->y + GUARD + r * y_stride, n, n + r + 50);
        for (i = 0; i < n; i++)
            f->x[GUARD + r * x_stride + i] *= 6;
    }
}

/* Is everything outside of the rows as it was? */
static int guarded(const float *all, size_t size, size_t rows, size_t n, size_t stride) {
    size_t i;
    for (i = 0; i < size; i++)
        if ((i < GUARD || (i - GUARD) / stride >= rows || (i - GUARD) % stride >= n) && all[i] != SENTINEL)
            return 0;
    return 1;
}

typedef enum finish_place { INTO_Y, ADD_TO_Y, IN_PLACE } finish_place;

static void check_finish(const tfm__kernels *kernels, tfm_activation activation, size_t rows, size_t n, int has_bias,
                         finish_place place, finishing *result) {
    static finishing before;
    const size_t size = sizeof before.y / sizeof *before.y, strides[2] = {n + n % 5, n + n % 3};
    size_t wrong = 0, r, i;
    tfm__finish job;
    fill_finishing(&before, rows, n, strides[0], strides[1]);
    *result = before;
    job.x = result->x + GUARD;
    job.x_stride = strides[0];
    job.n_rows = rows;
    job.n = n;
    job.bias = has_bias ? result->bias + 1 : NULL;
    job.activation = activation;
    job.y = place == IN_PLACE ? result->x + GUARD : result->y + GUARD;
    job.y_stride = strides[place != IN_PLACE];
    job.add = place == ADD_TO_Y;
    kernels->finish(&job);
    for (r = 0; r < rows; r++)
        for (i = 0; i < n; i++) {
            float x = before.x[GUARD + r * strides[0] + i] + (has_bias ? before.bias[i + 1] : 0);
            float base = job.add ? before.y[GUARD + r * strides[1] + i] : 0;
            double exact = exact_activation(activation, (double)x), sum = (double)base + exact;
            double error = activation_error(kernels, activation, (double)x, exact);
            double off = fabs((double)job.y[r * job.y_stride + i] - sum);
            wrong += !(off <= error + (job.add ? 1.01 * EPS * fabs(sum) : 0));
        }
    wrong += !guarded(result->x, size, rows, n, strides[0]);
    wrong += !guarded(result->y, size, rows, n, strides[1]);
    if (place == IN_PLACE)
        wrong += !!memcmp(result->y, before.y, sizeof before.y);
    else
        wrong += !!memcmp(result->x, before.x, sizeof before.x);
    CHECK_MSG(!wrong, "%s, activation %d, %lu rows of %lu, bias %d, place %d: %lu wrong", name_of(kernels),
              (int)activation, (unsigned long)rows, (unsigned long)n, has_bias, (int)place, (unsigned long)wrong);
}

static void test_finish(const tfm__kernels *kernels) {
    static finishing result;
    size_t n;
    int activation, has_bias, place;
    for (activation = 0; activation < TFM_ACTIVATION_COUNT; activation++)
        for (has_bias = 0; has_bias <= 1; has_bias++)
            for (place = INTO_Y; place <= IN_PLACE; place++)
                for (n = 1; n <= MAX_N; n += n < 36 ? 1 : 7)
                    check_finish(kernels, (tfm_activation)activation, 1 + n % 3, n, has_bias, (finish_place)place,
                                 &result);
}

/* ---- exp, which activations and softmax are made of */

typedef void (*function_of_16)(const float *x, float *y);

#define WRAP(name, target)                                                                                             \
    static target void name##_exp(const float *x, float *y) {                                                          \
        tfm__##name##_store16(y, tfm__##name##_exp16(tfm__##name##_load16(x)));                                        \
    }
#if defined(TFM__X86)
WRAP(avx2, __attribute__((target("avx2,fma,f16c"))))
WRAP(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))))
#elif defined(TFM__NEON)
WRAP(neon, )
#endif

static function_of_16 vector_exp(tfm_isa isa) {
    switch (isa) {
#if defined(TFM__X86)
    case TFM_ISA_AVX2: return avx2_exp;
    case TFM_ISA_AVX512: return avx512_exp;
#elif defined(TFM__NEON)
    case TFM_ISA_NEON: return neon_exp;
#endif
    default: return NULL;
    }
}

/* The largest relative error over [low, high]. */
static double relative_error(function_of_16 function, double low, double high) {
    double worst = 0;
    float x[16], y[16];
    int i, k;
    for (i = 0; i < 20000; i++) {
        for (k = 0; k < 16; k++)
            x[k] = (float)(low + (high - low) * (i * 16 + k) / 320000.0);
        function(x, y);
        for (k = 0; k < 16; k++) {
            double exact = exp((double)x[k]), error = fabs((double)y[k] - exact) / exact;
            worst = error <= worst ? worst : error;
        }
    }
    return worst;
}

static void test_exp(const tfm__kernels *kernels) {
    static const float corners[16] = {0,     -87.31f, -88,      -104,  -1e30f, -INFINITY, NAN, 88.4f,
                                      89.0f, 1e30f,   INFINITY, -0.0f, 1,      0,         0,   0};
    function_of_16 function = vector_exp(kernels->isa);
    float y[16];
    double error;
    int i;
    if (!function)
        return;
    error = relative_error(function, -87.3, 88.37);
    CHECK_MSG(error < 2e-7, "%s: exp has the relative error %g", name_of(kernels), error);
    function(corners, y);
    CHECK(y[0] == 1 && y[11] == 1 && fabs((double)y[12] - 2.718281828459045) < 4e-7);
    for (i = 1; i < 6; i++) /* underflows to zero */
        CHECK_MSG(y[i] == 0, "%s: exp(%g) is %g", name_of(kernels), (double)corners[i], (double)y[i]);
    CHECK(isnan(y[6]));
    for (i = 7; i < 11; i++) /* stays where it is just below overflow */
        CHECK_MSG(y[i] > 2.3e38f && y[i] <= FLT_MAX, "%s: exp(%g) is %g", name_of(kernels), (double)corners[i],
                  (double)y[i]);
}

/* ---- norms */

/* norm(x) in double precision, and how far from it a result may be: the sum of n squares has n roundings at most, and
 * the mean's error shows where x is large beside its deviation. */
static void exact_norm(int rms, const float *x, size_t n, const float *weight, const float *bias, double eps, double *y,
                       double *allowed) {
    double mean = 0, squares = 0, largest = 0, inverse;
    size_t i;
    for (i = 0; i < n && !rms; i++)
        mean += (double)x[i] / (double)n;
    for (i = 0; i < n; i++) {
        squares += ((double)x[i] - mean) * ((double)x[i] - mean) / (double)n;
        largest = fmax(largest, fabs((double)x[i]));
    }
    inverse = 1 / sqrt(squares + eps);
    for (i = 0; i < n; i++) {
        double normed = ((double)x[i] - mean) * inverse, b = bias ? (double)bias[i] : 0;
        y[i] = normed * (double)weight[i] + b;
        allowed[i] = EPS * ((double)(n + 8) * (fabs(normed) + (rms ? 0 : largest * inverse)) * fabs((double)weight[i]) +
                            2 * fabs(b) + 2 * fabs(y[i]));
    }
}

typedef struct normed {
    float x[1601], weight[1601], bias[1601], y[1601 + 2 * GUARD], in_place[1601];
    double exact[1601], allowed[1601];
} normed;

static void check_norm(const tfm__kernels *kernels, normed *m, int kind, size_t n, int has_bias, float eps) {
    const float *bias = has_bias ? m->bias + 1 : NULL;
    size_t i, wrong = 0;
    exact_norm(kind == TFM_RMS_NORM, m->x + 1, n, m->weight + 1, bias, (double)eps, m->exact, m->allowed);
    for (i = 0; i < n + 2 * GUARD; i++)
        m->y[i] = SENTINEL;
    kernels->norm[kind](m->x + 1, n, m->weight + 1, bias, eps, m->y + GUARD);
    for (i = 0; i < n; i++)
        wrong += !(fabs((double)m->y[GUARD + i] - m->exact[i]) <= m->allowed[i]);
    wrong += !guarded(m->y, n + 2 * GUARD, 1, n, n);
    CHECK_MSG(!wrong, "%s, norm %d of %lu numbers, bias %d, eps %g: %lu wrong", name_of(kernels), kind,
              (unsigned long)n, has_bias, (double)eps, (unsigned long)wrong);
    memcpy(m->in_place, m->x + 1, n * sizeof *m->in_place);
    kernels->norm[kind](m->in_place, n, m->weight + 1, bias, eps, m->in_place);
    CHECK(same_bits(m->in_place, m->y + GUARD, n));
}

static void test_norms(const tfm__kernels *kernels) {
    static normed m;
    static const size_t sizes[] = {1, 2, 3, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, 768, 1600};
    size_t s, i;
    int kind, has_bias;
    for (s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        test_fill(m.x, 1601, s);
        test_fill(m.weight, 1601, s + 20);
        test_fill(m.bias, 1601, s + 40);
        for (i = 0; i < 1601; i++)
            m.x[i] = m.x[i] * 3 + (float)(s % 4);
        for (kind = 0; kind <= 1; kind++)
            for (has_bias = 0; has_bias <= 1; has_bias++) {
                check_norm(kernels, &m, kind, sizes[s], has_bias, 1e-5f);
                check_norm(kernels, &m, kind, sizes[s], has_bias, 0.5f);
            }
    }
    for (i = 0; i < 101; i++) /* no deviation at all: eps keeps the quotient finite */
        m.x[i] = 0.25f;
    check_norm(kernels, &m, TFM_LAYER_NORM, 100, 1, 1e-5f);
    m.x[37] = NAN;
    kernels->norm[TFM_LAYER_NORM](m.x, 100, m.weight, NULL, 1e-5f, m.y);
    CHECK(isnan(m.y[0]) && isnan(m.y[99]));
    kernels->norm[TFM_RMS_NORM](m.x, 100, m.weight, NULL, 1e-5f, m.y);
    CHECK(isnan(m.y[0]) && isnan(m.y[99]));
}

/* ---- softmax */

#define MAX_KEYS 400

typedef struct softmaxing {
    float scores[MAX_KEYS], mask[MAX_KEYS], p[MAX_KEYS + 2 * GUARD];
    double exact[MAX_KEYS];
} softmaxing;

/* Softmax in one go, in double precision. All zeros where everything is masked. */
static void exact_softmax(softmaxing *s, size_t n, float scale, int has_mask) {
    double max = -(double)INFINITY, sum = 0;
    size_t i;
    for (i = 0; i < n; i++) {
        s->exact[i] = (double)s->scores[i] * (double)scale + (has_mask ? (double)s->mask[i] : 0);
        max = fmax(max, s->exact[i]);
    }
    for (i = 0; i < n; i++)
        sum += s->exact[i] = fabs(max) > DBL_MAX ? 0 : exp(s->exact[i] - max); /* mingw's isinf is for floats */
    for (i = 0; i < n; i++)
        s->exact[i] /= sum > 0 ? sum : 1;
}

/* Softmax block by block; p as the values would be weighted in the end. Returns the running softmax. */
static tfm__softmax run_softmax(const tfm__kernels *kernels, softmaxing *s, size_t n, size_t block, float scale,
                                int has_mask) {
    tfm__softmax softmax = {-INFINITY, 0};
    float *p = s->p + GUARD;
    size_t start, i;
    for (i = 0; i < n + 2 * GUARD; i++)
        s->p[i] = SENTINEL;
    for (i = 0; i < n; i++)
        p[i] = s->scores[i];
    for (start = 0; start < n; start += block) {
        size_t size = TFM__MIN(block, n - start);
        float correction = kernels->softmax_block(&softmax, p + start, size, scale, has_mask ? s->mask + start : NULL);
        for (i = 0; i < start; i++)
            p[i] *= correction;
    }
    for (i = 0; i < n; i++)
        p[i] *= softmax.sum == 0 ? 0 : 1 / softmax.sum;
    return softmax;
}

static void check_softmax(const tfm__kernels *kernels, softmaxing *s, size_t n, size_t block, float scale,
                          int has_mask) {
    size_t wrong = 0, i;
    exact_softmax(s, n, scale, has_mask);
    run_softmax(kernels, s, n, block, scale, has_mask);
    for (i = 0; i < n; i++) { /* exponents up to 60, known to 2^-24 of that: 4e-6 */
        float p = s->p[GUARD + i];
        wrong += s->exact[i] == 0 ? p != 0 : !(fabs((double)p - s->exact[i]) <= 8e-6 * s->exact[i] + 1e-37);
    }
    wrong += !guarded(s->p, n + 2 * GUARD, 1, n, n);
    CHECK_MSG(!wrong, "%s, softmax of %lu in blocks of %lu, scale %g, mask %d: %lu wrong", name_of(kernels),
              (unsigned long)n, (unsigned long)block, (double)scale, has_mask, (unsigned long)wrong);
}

static void test_softmax(const tfm__kernels *kernels) {
    static softmaxing s;
    size_t n, i;
    for (n = 1; n <= MAX_KEYS; n += n < 40 ? 1 : 23) {
        test_fill(s.scores, MAX_KEYS, n);
        test_fill(s.mask, MAX_KEYS, n + 1);
        for (i = 0; i < MAX_KEYS; i++) {
            s.mask[i] = s.mask[i] > 0.2f ? -INFINITY : s.mask[i]; /* masks may also add numbers */
            s.scores[i] *= 40;
        }
        check_softmax(kernels, &s, n, 128, 0.25f, 0);
        check_softmax(kernels, &s, n, 13, 0.7f, 1);
        for (i = 0; i < n && i < 26; i++) /* nothing is seen in the first two blocks */
            s.mask[i] = -INFINITY;
        check_softmax(kernels, &s, n, 13, 1, 1);
        for (i = 0; i < n; i++) /* nor anywhere */
            s.mask[i] = -INFINITY;
        check_softmax(kernels, &s, n, 13, 1, 1);
        check_softmax(kernels, &s, n, 128, 1, 1);
    }
}

/* A block in which nothing is seen changes nothing, whether something was seen before or not. */
static void test_softmax_state(const tfm__kernels *kernels) {
    const float hidden[3] = {-INFINITY, -INFINITY, -INFINITY};
    float scores[3] = {1, 2, 3};
    tfm__softmax softmax = {-INFINITY, 0};
    CHECK(kernels->softmax_block(&softmax, scores, 3, 1, hidden) == 1);
    CHECK(softmax.max == -INFINITY && softmax.sum == 0 && scores[0] == 0 && scores[1] == 0 && scores[2] == 0);
    CHECK(kernels->softmax_block(&softmax, scores, 0, 1, NULL) == 1);
    CHECK(softmax.max == -INFINITY && softmax.sum == 0);
    scores[0] = 4;
    CHECK(kernels->softmax_block(&softmax, scores, 1, 0.5f, NULL) == 0); /* the first: exp(-infinity) */
    CHECK(softmax.max == 2 && softmax.sum == 1 && scores[0] == 1);
    CHECK(kernels->softmax_block(&softmax, scores, 3, 1, hidden) == 1);
    CHECK(softmax.max == 2 && softmax.sum == 1 && scores[0] == 0 && scores[2] == 0);
    CHECK(kernels->softmax_block(&softmax, scores, 0, 1, NULL) == 1);
    CHECK(softmax.max == 2 && softmax.sum == 1);
}

/* Scores so large that their rounding is more than an exponent's range: the largest has the weight 1 all the same. */
static void test_softmax_huge(const tfm__kernels *kernels, const float *mask) {
    const float scales[] = {0.125f, 0.3f, 1, 1.7f};
    size_t k, n, i, wrong = 0;
    float size;
    for (size = 1e3f; size < 1e37f; size *= 7.3f)
        for (k = 0; k < 8; k++)
            for (n = 1; n <= 40; n += 13) {
                float scores[40];
                tfm__softmax softmax = {-INFINITY, 0};
                for (i = 0; i < n; i++)
                    scores[i] = (k % 2 ? size : -size) * (i == n / 2 ? 1 : k % 2 ? 0.5f : 2);
                kernels->softmax_block(&softmax, scores, n, scales[k / 2], mask);
                wrong += !(softmax.sum == 1 && scores[n / 2] == 1);
            }
    CHECK_MSG(!wrong, "%s: softmax of huge scores: %lu are wrong", name_of(kernels), (unsigned long)wrong);
}

/* A score that is NaN must not vanish: the sum tells. The other scores are numbers, or masked. */
static void test_softmax_nan(const tfm__kernels *kernels, float other) {
    size_t lost = 0, n, at, i;
    for (n = 1; n <= 40; n++)
        for (at = 0; at < n; at++) {
            float scores[40];
            tfm__softmax softmax = {-INFINITY, 0};
            for (i = 0; i < n; i++)
                scores[i] = i == at ? NAN : other;
            kernels->softmax_block(&softmax, scores, n, 1, NULL);
            lost += isnan(softmax.sum) ? 0 : 1;
        }
    CHECK_MSG(!lost, "%s: softmax loses %lu of 820 NaNs beside scores of %g", name_of(kernels), (unsigned long)lost,
              (double)other);
}

/* ---- the rest */

static void test_scale_and_multiply(const tfm__kernels *kernels) {
    const float factor = 0.3f; /* x87 keeps more bits of the constant itself */
    float x[MAX_N + 2 * GUARD], up[MAX_N], expected[MAX_N + 2 * GUARD];
    size_t n, i;
    for (n = 0; n <= MAX_N; n++) {
        size_t at = GUARD + n % 3;
        for (i = 0; i < MAX_N + 2 * GUARD; i++)
            expected[i] = SENTINEL;
        test_fill(expected + at, n, n);
        test_fill(up, MAX_N, n + 1);
        memcpy(x, expected, sizeof x);
        for (i = 0; i < n; i++)
            expected[at + i] *= factor;
        kernels->scale(x + at, n, factor);
        CHECK_MSG(same_bits(x, expected, MAX_N + 2 * GUARD), "%s: scale, %lu numbers", name_of(kernels),
                  (unsigned long)n);
        for (i = 0; i < n; i++)
            expected[at + i] *= up[i];
        kernels->multiply(x + at, up, n);
        CHECK_MSG(same_bits(x, expected, MAX_N + 2 * GUARD), "%s: multiply, %lu numbers", name_of(kernels),
                  (unsigned long)n);
    }
}

/* ---- int8: activations quantized to the same integers by every kernel; products near the plain C one's, and as far from
 * the exact ones as tfm_linear's comment says at most */

enum {
    MAX_I8_ROWS = 41,
    MAX_I8_N = 210,
    MAX_I8_K = 400,
    /* and a layer of many inputs */
    LONG_I8_ROWS = 9,
    LONG_I8_N = 17,
    LONG_I8_K = 16 * 1024 + 70,
    I8_X = LONG_I8_ROWS * (LONG_I8_K + 64),
    I8_W = LONG_I8_N * LONG_I8_K
};

typedef struct int8_product {
    float x[I8_X], w[I8_W], y[MAX_I8_ROWS * MAX_I8_N + 2 * GUARD];
    float unpacked[I8_W]; /* what the packed weights stand for */
    int8_t q[I8_X];       /* [rows][groups * 64] */
    float scales[I8_X / 64];
    int32_t offsets[I8_X / 64];
} int8_product;

/* AVX2's product of bytes saturates: its activations are quantized within a bound. See the int8 product in tfm.h. */
static int is_bounded(const tfm__kernels *kernels) {
    return kernels->isa == TFM_ISA_AVX2;
}

/* As the kernel does, or `plainly`, by the definition of what it does. */
static void quantize_rows(const tfm__kernels *kernels, int plainly, int8_product *p, size_t rows, size_t k) {
    size_t groups = (k + 63) / 64, row;
    memset(p->q, 0x77, sizeof p->q);
    for (row = 0; row < rows; row++) {
        tfm__quantized to;
        to.q = p->q + row * groups * 64;
        to.scales = p->scales + row * groups;
        to.offsets = p->offsets + row * groups;
        if (plainly)
            tfm__quantize_plainly(p->x + row * k, k, is_bounded(kernels), &to);
        else
            kernels->quantize(p->x + row * k, k, &to);
    }
}

/* Of one group: each number within half a step of what it stands for; the step as large as tfm_linear's comment says, no
 * larger than it must be; and, within the bound, no pair whose products with bytes from 1 to 255 would not fit 16 bits. */
static int good_group(const float *x, size_t n, int bounded, const int8_t *q, float step, int32_t offset) {
    double largest = 0, t = (double)step;
    int32_t sum = 0;
    size_t i;
    int good = 1;
    for (i = 0; i < n; i++) {
        largest = fmax(largest, fabs((double)x[i]));
        if (bounded && i % 2)
            largest = fmax(largest, fabs((double)x[i - 1] + (double)x[i]));
    }
    good &= fabs(t * 127 - largest) <= 1e-6 * largest;
    for (i = 0; i < 64; i++) {
        const int after = i % 2 ? 0 : q[i + 1], high = (q[i] > 0) * q[i] + (after > 0) * after,
                  low = (q[i] < 0) * q[i] + (after < 0) * after;
        good &= q[i] >= -127 && fabs((i < n ? (double)x[i] : 0) - t * q[i]) <= t * 0.5001;
        good &= !bounded || (255 * high + low <= 32767 && 255 * low + high >= -32768);
        sum += q[i];
    }
    return good && offset == -128 * sum;
}

static void check_quantized(const tfm__kernels *kernels, int8_product *p, int8_product *expected, size_t rows,
                            size_t k) {
    const size_t groups = (k + 63) / 64;
    size_t i, wrong = 0;
    quantize_rows(kernels, 0, p, rows, k);
    quantize_rows(kernels, 1, expected, rows, k);
    for (i = 0; i < rows * groups; i++)
        wrong +=
            !good_group(p->x + i / groups * k + i % groups * 64, i % groups + 1 < groups ? 64 : k - (groups - 1) * 64,
                        is_bounded(kernels), p->q + i * 64, p->scales[i], p->offsets[i]);
    CHECK_MSG(!wrong && !memcmp(p->q, expected->q, sizeof p->q) &&
                  !memcmp(p->scales, expected->scales, rows * groups * sizeof *p->scales) &&
                  !memcmp(p->offsets, expected->offsets, rows * groups * sizeof *p->offsets),
              "%s: quantize, %lu rows of %lu: %lu wrong", name_of(kernels), (unsigned long)rows, (unsigned long)k,
              (unsigned long)wrong);
}

/* Of each group of a column: the largest difference between a weight and what it was packed to. */
static void group_errors(const float *w, const float *unpacked, size_t k, double *errors) {
    size_t i;
    memset(errors, 0, (k + 63) / 64 * sizeof *errors);
    for (i = 0; i < k; i++)
        errors[i / 64] = fmax(errors[i / 64], fabs((double)w[i] - (double)unpacked[i]));
}

/* With a bias, and with what y holds, or both: the same sums, and what is added to them comes after. */
static void check_i8_added(const tfm__kernels *kernels, const tfm__matmul *plain) {
    static float bias[MAX_I8_N], before[MAX_I8_ROWS * (MAX_I8_N + 2)], y[MAX_I8_ROWS * (MAX_I8_N + 2)];
    const size_t size = plain->n_rows * plain->y_stride;
    tfm__matmul job = *plain;
    size_t row, column;
    int kind, wrong = 0;
    test_fill(bias, job.n, job.k);
    test_fill(before, size, job.k + 1);
    for (kind = 1; kind < 4; kind++) {
        job.bias = kind & 1 ? bias : NULL;
        job.add = kind >> 1;
        memcpy(y, before, size * sizeof *y);
        job.y = y;
        kernels->matmul[TFM_I8](&job);
        for (row = 0; row < job.n_rows; row++)
            for (column = 0; column < job.y_stride; column++) {
                const size_t at = row * job.y_stride + column;
                float sum = column < job.n ? plain->y[at] : before[at];
                if (job.bias && column < job.n)
                    sum += bias[column];
                if (job.add && column < job.n)
                    sum += before[at];
                wrong += !(y[at] == sum);
            }
    }
    CHECK_MSG(!wrong, "%s: i8 product, %lu rows, %lu outputs, %lu inputs, added to: %d wrong", name_of(kernels),
              (unsigned long)job.n_rows, (unsigned long)job.n, (unsigned long)job.k, wrong);
}

/* p: quantized by this kernel. */
static void check_i8(const tfm__kernels *kernels, int8_product *p, const tfm_tensor *packed, size_t rows, size_t n,
                     size_t k) {
    const size_t groups = (k + 63) / 64, stride = n + n % 3;
    size_t row, column, i, wrong = 0, beyond = 0;
    tfm__matmul job;
    for (i = 0; i < sizeof p->y / sizeof *p->y; i++)
        p->y[i] = SENTINEL;
    job.x = NULL;
    job.x_stride = 0;
    job.n_rows = rows;
    job.quantized.q = p->q;
    job.quantized.scales = p->scales;
    job.quantized.offsets = p->offsets;
    job.w = packed->data;
    job.panel_bytes = tfm__panel_bytes(TFM_I8, k);
    job.n = n;
    job.k = k;
    job.y = p->y + GUARD;
    job.y_stride = stride;
    job.add = 0;
    job.bias = NULL;
    kernels->matmul[TFM_I8](&job);
    check_i8_added(kernels, &job);
    for (column = 0; column < n; column++) {
        const float *w = p->w + column * k, *u = p->unpacked + column * k;
        double errors[(LONG_I8_K + 63) / 64];
        group_errors(w, u, k, errors);
        for (row = 0; row < rows; row++) {
            const float *x = p->x + row * k;
            double sum = 0, magnitude = 0, exact = 0, bound = 0, y = (double)job.y[row * stride + column];
            for (i = 0; i < k; i++) {
                double t = (double)p->scales[row * groups + i / 64];
                double q = t * p->q[row * groups * 64 + i];
                sum += q * (double)u[i];
                magnitude += fabs(q * (double)u[i]);
                exact += (double)x[i] * (double)w[i];
                bound += errors[i / 64] * fabs((double)x[i]) + t / 2 * fabs((double)u[i]);
            }
            wrong += !(fabs(y - sum) <= 4e-6 * magnitude);
            beyond += !(fabs(y - exact) <= bound * 1.0001 + 4e-6 * magnitude);
        }
    }
    for (i = 0; i < sizeof p->y / sizeof *p->y; i++)
        wrong += (i < GUARD || (i - GUARD) / stride >= rows || (i - GUARD) % stride >= n) && p->y[i] != SENTINEL;
    CHECK_MSG(!wrong && !beyond, "%s: i8 product, %lu rows, %lu outputs, %lu inputs: %lu wrong, %lu beyond the bound",
              name_of(kernels), (unsigned long)rows, (unsigned long)n, (unsigned long)k, (unsigned long)wrong,
              (unsigned long)beyond);
}

/* p: x and w. By all kernels, as their definitions say. */
static void check_i8_shape(int8_product *p, int8_product *other, size_t rows, size_t n, size_t k) {
    tfm_tensor matrix = tfm_matrix(p->w, n, k), packed;
    tfm_error error;
    size_t i;
    CHECK_OK(tfm_pack(&matrix, TFM_I8, NULL, &packed, &error), error);
    for (i = 0; i < n; i++)
        tfm__matrix_row(&packed, i, 0, k, p->unpacked + i * k);
    for (i = 0; i < n_kernels_here; i++) {
        memcpy(other->x, p->x, rows * k * sizeof *p->x);
        memcpy(other->w, p->w, n * k * sizeof *p->w);
        memcpy(other->unpacked, p->unpacked, n * k * sizeof *p->unpacked);
        check_quantized(kernels_here[i], other, p, rows, k);
        check_i8(kernels_here[i], other, &packed, rows, n, k);
    }
    tfm_unpack(&packed, NULL);
}

static void test_i8_shape(int8_product *p, int8_product *other, size_t rows, size_t n, size_t k) {
    size_t i;
    test_fill(p->x, rows * k, rows + n);
    test_fill(p->w, n * k, k);
    for (i = 0; i < rows * k; i += 97)
        p->x[i] *= i % 2 ? 1e3f : 0; /* outliers */
    for (i = 0; k > 64 && i < n; i += 5)
        memset(p->w + i * k, 0, 64 * sizeof *p->w); /* groups of zeros */
    check_i8_shape(p, other, rows, n, k);
}

/* Numbers that are all as large as they can be: of one sign, of two, and of two in pairs. */
static void test_i8_extremes(int8_product *p, int8_product *other) {
    const size_t k = 130, n = 18, rows = 9;
    size_t i, signs;
    for (signs = 0; signs < 16; signs++) {
        for (i = 0; i < rows * k; i++)
            p->x[i] = signs & 1 && i >> (signs >> 1 & 1) & 1 ? -3.0f : 3.0f;
        for (i = 0; i < n * k; i++)
            p->w[i] = signs & 4 && i >> (signs >> 3) & 1 ? 0.5f : -0.5f;
        check_i8_shape(p, other, rows, n, k);
        for (i = 0; i < rows * k; i++)
            p->x[i] *= -1;
        check_i8_shape(p, other, rows, n, k);
    }
}

/* An activation that is not finite: the others of its group are 0, and the scale is not finite. */
static void test_quantize_spoiled(void) {
    static const float spoilt[] = {NAN, INFINITY, -INFINITY};
    int8_product *p = (int8_product *)test_allocate(sizeof *p), *other = (int8_product *)test_allocate(sizeof *other);
    size_t i, n, k = 150;
    for (n = 0; n < 3; n++) {
        test_fill(p->x, k, 1);
        p->x[70 + n] = spoilt[n];
        for (i = 0; i < n_kernels_here; i++) {
            memcpy(other->x, p->x, k * sizeof *p->x);
            quantize_rows(kernels_here[i], 1, p, 1, k);
            CHECK(isnan(p->scales[1]) || isinf(p->scales[1]));
            CHECK(p->offsets[1] == 0 && p->offsets[0] != 0);
            quantize_rows(kernels_here[i], 0, other, 1, k);
            CHECK_MSG(!memcmp(other->q, p->q, sizeof p->q) &&
                          !memcmp(other->offsets, p->offsets, 3 * sizeof *p->offsets),
                      "%s: quantize with a number that is %g", name_of(kernels_here[i]), (double)spoilt[n]);
            CHECK(isnan(other->scales[1]) || isinf(other->scales[1]));
        }
    }
    free(p);
    free(other);
}

/* The bound of tfm_pack, for a group whose numbers are ever smaller than the other's. */
static void test_i8_reach(void) {
    float w[128], unpacked[128];
    tfm_tensor matrix = tfm_matrix(w, 1, 128), packed;
    tfm_error error;
    int octaves;
    size_t i;
    for (octaves = 0; octaves < 40; octaves++) {
        double largest = ldexp(100, -octaves), bound = 17.0 / 16 / 127 * fmax(largest, 100.0 / 60000) / 2;
        test_fill(w, 128, (uint64_t)octaves);
        for (i = 0; i < 128; i++)
            w[i] *= i < 64 ? 100 : (float)largest;
        w[0] = 100;
        CHECK_OK(tfm_pack(&matrix, TFM_I8, NULL, &packed, &error), error);
        tfm__matrix_row(&packed, 0, 0, 128, unpacked);
        for (i = 64; i < 128 && fabs((double)w[i] - (double)unpacked[i]) <= bound; i++)
            ;
        CHECK_MSG(i == 128, "packed %d octaves below: %g is %g, the bound %g", octaves, (double)w[i % 128],
                  (double)unpacked[i % 128], bound);
        tfm_unpack(&packed, NULL);
    }
}

static void test_i8(void) {
    static const size_t inputs[] = {1, 3, 63, 64, 65, 130, 257, 400}, outputs[] = {1, 15, 16, 17, 47, 48, 49, 100, 210};
    int8_product *p = (int8_product *)test_allocate(sizeof *p), *other = (int8_product *)test_allocate(sizeof *other);
    size_t rows, k;
    memset(p, 0, sizeof *p);
    memset(other, 0, sizeof *other);
    for (rows = 1; rows <= MAX_I8_ROWS; rows += rows < 14 ? 1 : 9)
        for (k = 0; k < sizeof inputs / sizeof *inputs; k++)
            test_i8_shape(p, other, rows, outputs[(rows + k) % 9], inputs[k]);
    test_i8_shape(p, other, LONG_I8_ROWS, LONG_I8_N, LONG_I8_K);
    test_i8_extremes(p, other);
    test_i8_reach();
    free(p);
    free(other);
}

/* Rounding to 16 bits: as the conversion of one number, but that nothing becomes infinite. */
static void test_narrowing(const tfm__kernels *kernels) {
    static float x[65536];
    static uint16_t halves[65536 + 2];
    size_t n, i, wrong = 0;
    for (i = 0; i < 65536; i++)
        x[i] = from_bits((uint32_t)i << 16 | (uint32_t)(i * 40503 & 0xFFFF));
    for (n = 0; n <= 65536; n = n < 40 ? n + 1 : 65536 + (n == 65536)) {
        memset(halves, 0x5A, sizeof halves);
        kernels->to_f16(x + 65536 - n, n, halves + 1);
        wrong += halves[0] != 0x5A5A || halves[n + 1] != 0x5A5A;
        for (i = 0; i < n; i++) {
            float value = x[65536 - n + i];
            if (isnan(value))
                wrong += isnan(test_from_f16(halves[1 + i])) ? 0u : 1u;
            else
                wrong += halves[1 + i] != tfm__to_f16(fmaxf(-65504, fminf(65504, value)));
        }
    }
    CHECK_MSG(!wrong, "%s: to_f16, %lu are wrong", name_of(kernels), (unsigned long)wrong);
}

/* Two rows become pairs of bf16, each as the conversion of one number. */
static void test_pairing(const tfm__kernels *kernels) {
    static float first[65536], second[65536];
    static uint16_t pairs[2 * 65536 + 2];
    size_t n, i, wrong = 0;
    for (i = 0; i < 65536; i++) {
        first[i] = from_bits((uint32_t)i << 16 | (uint32_t)(i * 40503 & 0xFFFF));
        second[65535 - i] = from_bits((uint32_t)i << 16 | (i % 3 ? 0x8000u : 0x7FFFu));
    }
    for (n = 0; n <= 65536; n = n < 40 ? n + 1 : 65536 + (n == 65536)) {
        memset(pairs, 0x5A, sizeof pairs);
        kernels->pair(first + 65536 - n, second, n, pairs + 1);
        wrong += pairs[0] != 0x5A5A || pairs[2 * n + 1] != 0x5A5A;
        for (i = 0; i < n; i++)
            wrong += !same_half(pairs[1 + 2 * i], test_to_bf16(first[65536 - n + i]), 0x7F80) ||
                     !same_half(pairs[2 + 2 * i], test_to_bf16(second[i]), 0x7F80);
    }
    CHECK_MSG(!wrong, "%s: pair, %lu are wrong", name_of(kernels), (unsigned long)wrong);
}

/* ---- int8 and bf16 keys and values */

#define KV_DIM 290 /* at most; more than a page has tokens, and more than the bf16 product rounds at once */

/* Integers and scale as the definition says; the same for every instruction set. */
static void check_quantize_kv(const tfm__kernels *kernels, const float *x, size_t n) {
    int8_t q[34], plain[34];
    uint16_t scale, plain_scale;
    float largest = 0, s;
    size_t i, wrong = 0;
    memset(q, 0x5A, sizeof q);
    memset(plain, 0x5A, sizeof plain);
    kernels->quantize_kv(x, n, q + 1, &scale);
    tfm__scalar_kernels.quantize_kv(x, n, plain + 1, &plain_scale);
    CHECK_MSG(scale == plain_scale && !memcmp(q, plain, sizeof q), "%s: quantize_kv of %lu differs from plain C",
              name_of(kernels), (unsigned long)n);
    for (i = 0; i < n; i++)
        largest = fmaxf(largest, fabsf(x[i]));
    s = tfm__from_bf16(scale);
    for (i = 0; i < n; i++)
        wrong += !(fabs((double)x[i] - (double)s * q[1 + i]) <= s * 0.5001);
    for (; i < tfm__round_up(n, 16); i++)
        wrong += q[1 + i] != 0;
    wrong +=
        q[0] != 0x5A || q[1 + i] != 0x5A || (double)s > largest / 127 * 1.0079 || (double)s * 127 < largest * 0.9999;
    CHECK_MSG(!wrong, "%s: quantize_kv of %lu: %lu are wrong", name_of(kernels), (unsigned long)n,
              (unsigned long)wrong);
}

static void test_quantize_kv(const tfm__kernels *kernels) {
    float x[32];
    int8_t q[32];
    uint16_t scale;
    size_t n, i;
    for (n = 1; n <= 32; n++)
        for (i = 0; i < 20; i++) {
            size_t k;
            test_fill(x, n, 100 * n + i);
            for (k = 0; k < n; k++)
                x[k] = ldexpf(x[k], (int)i * 4 - 40);
            check_quantize_kv(kernels, x, n);
        }
    memset(x, 0, sizeof x);
    kernels->quantize_kv(x, 32, q, &scale);
    CHECK(scale == 0 && q[0] == 0 && q[31] == 0);
    x[5] = NAN;
    kernels->quantize_kv(x, 32, q, &scale);
    CHECK_MSG(isnan(tfm__from_bf16(scale)), "%s: the scale of NaN", name_of(kernels));
    x[5] = -INFINITY;
    kernels->quantize_kv(x, 32, q, &scale);
    CHECK_MSG(scale == 0x7F80, "%s: the scale of infinity", name_of(kernels));
}

/* A page of one head: int8 or bf16, and the same numbers as floats, each in the panels of its type. */
typedef struct kv_page {
    tfm_kv kv, floats;
    char *keys, *values;
    float *float_keys, *float_values;
    float x[24 * KV_DIM], y[24 * (KV_DIM + TFM_KV_PAGE) + 2 * GUARD], expected[24 * (KV_DIM + TFM_KV_PAGE)];
} kv_page;

static uint16_t half_at(const char *p, size_t index) {
    uint16_t half;
    memcpy(&half, p + 2 * index, sizeof half);
    return half;
}

/* Number d of token `at`, read back by the definition of the layout. */
static void read_i8(const kv_page *p, size_t at, size_t d, float *key, float *value) {
    const size_t dim = p->kv.head_dim, groups = (dim + 31) / 32;
    const char *panel = p->keys + at / 16 * 16 * (dim + 2 * groups), *group = p->values + d / 32 * TFM_KV_PAGE * 34;
    *key = from_bits((uint32_t)half_at(panel, d / 32 * 16 + at % 16) << 16) *
           (float)(int8_t)panel[32 * groups + d * 16 + at % 16];
    *value = from_bits((uint32_t)half_at(group, at) << 16) *
             (float)(int8_t)group[TFM_KV_PAGE * 2 + d / 16 % 2 * TFM_KV_PAGE * 16 + at * 16 + d % 16];
}

static void read_bf16(const kv_page *p, size_t at, size_t d, float *key, float *value) {
    const size_t panel = at / 16 * 16 * ((p->kv.head_dim + 1) / 2 * 2);
    *key = from_bits((uint32_t)half_at(p->keys, panel + d / 2 * 32 + at % 16 * 2 + d % 2) << 16);
    *value =
        from_bits((uint32_t)half_at(p->values, d / 16 * 16 * TFM_KV_PAGE + at / 2 * 32 + d % 16 * 2 + at % 2) << 16);
}

/* Stores n rows in one panel, or fewer. */
static void store_rows(kv_page *p, const tfm__kernels *kernels, const float *key, const float *value, size_t n,
                       size_t at) {
    const size_t dim = p->kv.head_dim;
    size_t i;
    if (p->kv.dtype == TFM_BF16) {
        uint16_t *keys = (uint16_t *)(void *)(p->keys + tfm__kv_number(&p->kv, 0, at, 0));
        tfm__store_bf16_keys(kernels, key, KV_DIM, n, dim, keys);
        tfm__store_bf16_values(kernels, value, KV_DIM, n, dim, TFM_KV_PAGE, at, (uint16_t *)(void *)p->values);
        return;
    }
    for (i = 0; i < n; i++)
        tfm__store_i8(kernels, &p->kv, key + i * KV_DIM, value + i * KV_DIM, at + i, p->keys, p->values);
}

/* Tokens come in panels, and one, two, three at a time. */
static void fill_page(kv_page *p, const tfm__kernels *kernels, tfm_dtype dtype, size_t dim, size_t tokens) {
    static float key[16][KV_DIM], value[16][KV_DIM];
    size_t at, i, d, n, wrong = 0;
    tfm_error error;
    CHECK_OK(tfm_kv_create(&p->kv, dtype, 1, 1, dim, TFM_KV_PAGE, NULL, &error), error);
    CHECK_OK(tfm_kv_create(&p->floats, TFM_F32, 1, 1, dim, TFM_KV_PAGE, NULL, &error), error);
    p->keys = tfm__kv_at(&p->kv, 0, 0, 0, 0);
    p->values = tfm__kv_at(&p->kv, 0, 0, 1, 0);
    p->float_keys = (float *)(void *)tfm__kv_at(&p->floats, 0, 0, 0, 0);
    p->float_values = (float *)(void *)tfm__kv_at(&p->floats, 0, 0, 1, 0);
    memset(p->keys, 0, tfm__kv_head_bytes(&p->kv));
    memset(p->values, 0xFF, tfm__kv_head_bytes(&p->kv)); /* NaN, which must not count */
    memset(p->float_keys, 0, tfm__kv_head_bytes(&p->floats));
    memset(p->float_values, 0, tfm__kv_head_bytes(&p->floats));
    for (at = 0; at < tokens; at += n) {
        n = at % 32 == 0 && tokens - at >= 16 ? 16 : TFM__MIN(1 + at % 3, TFM__MIN(tokens - at, 16 - at % 16));
        for (i = 0; i < n; i++) {
            test_fill(key[i], dim, 7 * (at + i) + 1);
            test_fill(value[i], dim, 7 * (at + i) + 2);
            for (d = 0; d < dim; d++)
                value[i][d] *= (float)(1 + (at + i) % 5 * (d / 32 + 1)); /* scales that differ */
        }
        store_rows(p, kernels, *key, *value, n, at);
        for (i = 0; i < n; i++)
            for (d = 0; d < dim; d++) {
                float *k = p->float_keys + ((at + i) / 16 * dim + d) * 16 + (at + i) % 16, *v, steps;
                v = p->float_values + (d / 16 * TFM_KV_PAGE + at + i) * 16 + d % 16;
                (dtype == TFM_I8 ? read_i8 : read_bf16)(p, at + i, d, k, v);
                steps = fmaxf(fabsf(*k - key[i][d]) * 250,
                              fabsf(*v - value[i][d]) / (float)(1 + (at + i) % 5 * (d / 32 + 1)) * 250);
                wrong += !(dtype == TFM_I8 ? steps <= 1
                                           : *k == from_bits((uint32_t)test_to_bf16(key[i][d]) << 16) &&
                                                 *v == from_bits((uint32_t)test_to_bf16(value[i][d]) << 16));
            }
    }
    CHECK_MSG(!wrong, "%s cache: %lu numbers of %lu tokens of %lu are off", tfm_dtype_name(dtype), (unsigned long)wrong,
              (unsigned long)tokens, (unsigned long)dim);
}

/* The product with x rounded to bf16, pair by pair, of each the second number first. */
static void multiply_pairs(const tfm__matmul *job) {
    float x[KV_DIM];
    size_t r, c, k;
    for (r = 0; r < job->n_rows; r++) {
        for (k = 0; k < job->k; k++)
            x[k] = from_bits((uint32_t)test_to_bf16(job->x[r * job->x_stride + k]) << 16);
        for (c = 0; c < job->n; c++) {
            const float *w = (const float *)job->w + c / 16 * (job->panel_bytes / sizeof(float)) + c % 16;
            float *y = job->y + r * job->y_stride + c, sum = job->add ? *y : 0;
            for (k = 0; k < job->k; k += 2) {
                if (k + 1 < job->k)
                    sum = fmaf(x[k + 1], w[(k + 1) * 16], sum);
                sum = fmaf(x[k], w[k * 16], sum);
            }
            *y = sum;
        }
    }
}

/* The product with keys (what = 0) or values has the bits of the fp32 product with the floats that they stand for. */
static void check_kv_product(const tfm__kernels *kernels, kv_page *p, size_t what, size_t rows, size_t tokens,
                             int add) {
    const size_t dim = p->kv.head_dim, n = what ? dim : tfm__round_up(tokens, 16), stride = n + 3;
    tfm__matmul job;
    size_t r, i;
    memset(&job, 0, sizeof job);
    test_fill(p->x, sizeof p->x / sizeof *p->x, rows + tokens);
    test_fill(p->expected, sizeof p->expected / sizeof *p->expected, rows);
    for (i = 0; i < sizeof p->y / sizeof *p->y; i++)
        p->y[i] = SENTINEL;
    for (r = 0; r < rows; r++)
        memcpy(p->y + GUARD + r * stride, p->expected + r * stride, n * sizeof(float));
    job.x = p->x;
    job.n_rows = rows;
    job.n = n;
    job.k = what ? tokens : dim;
    job.x_stride = job.k;
    job.y_stride = stride;
    job.add = add;
    job.w = what ? p->float_values : p->float_keys;
    job.panel_bytes = 16 * sizeof(float) * (what ? (size_t)TFM_KV_PAGE : dim);
    job.y = p->expected;
    (p->kv.dtype == TFM_BF16 ? multiply_pairs : kernels->matmul[TFM_F32])(&job);
    job.w = what ? p->values : p->keys;
    job.panel_bytes = what ? tfm__value_panel_bytes(&p->kv) : tfm__key_panel_bytes(&p->kv);
    job.y = p->y + GUARD;
    tfm__matmul_kv(kernels, p->kv.dtype, what, &job);
    for (r = 0; r < rows; r++)
        CHECK_MSG(same_bits(p->y + GUARD + r * stride, p->expected + r * stride, n) &&
                      p->y[GUARD + r * stride + n] == SENTINEL,
                  "%s: %s %s, %lu tokens of %lu, row %lu of %lu, add %d", name_of(kernels), tfm_dtype_name(p->kv.dtype),
                  what ? "values" : "keys", (unsigned long)tokens, (unsigned long)dim, (unsigned long)r,
                  (unsigned long)rows, add);
    CHECK(p->y[GUARD - 1] == SENTINEL);
}

static void test_kv_products(const tfm__kernels *kernels, tfm_dtype dtype) {
    static const size_t dims[] = {1, 5, 16, 17, 31, 32, 33, 48, 64, 80, 96, 128, KV_DIM - 1, KV_DIM};
    static const size_t tokens[] = {1, 2, 15, 16, 17, 100, 127, 128};
    kv_page *p = (kv_page *)test_allocate(sizeof *p);
    size_t d, t, rows, what;
    for (d = 0; d < sizeof dims / sizeof *dims; d++)
        for (t = 0; t < sizeof tokens / sizeof *tokens; t++) {
            fill_page(p, kernels, dtype, dims[d], tokens[t]);
            for (rows = 1; rows <= 24; rows += rows < 8 ? 1 : 8)
                for (what = 0; what < 2; what++)
                    check_kv_product(kernels, p, what, rows, tokens[t], rows % 2 == what);
            tfm_kv_free(&p->kv, NULL);
            tfm_kv_free(&p->floats, NULL);
        }
    free(p);
}

/* The vector kernels are the same operations in the same order: where two instruction sets run, the bits are the
 * same. */
static void check_agreement(const tfm__kernels *a, const tfm__kernels *b) {
    static finishing finished[2];
    static normed m;
    static softmaxing s[2];
    const tfm__kernels *const both[2] = {a, b};
    size_t n, different = 0;
    int activation, kind, i;
    for (n = 1; n <= MAX_N; n++) {
        float y[2][MAX_N];
        for (activation = 0; activation < TFM_ACTIVATION_COUNT; activation++) {
            for (i = 0; i < 2; i++)
                check_finish(both[i], (tfm_activation)activation, 2, n, 1, ADD_TO_Y, finished + i);
            different += !!memcmp(finished[0].y, finished[1].y, sizeof finished[0].y);
        }
        test_fill(m.x, MAX_N, n);
        test_fill(m.weight, MAX_N, n + 1);
        for (kind = 0; kind <= 1; kind++) {
            for (i = 0; i < 2; i++)
                both[i]->norm[kind](m.x, n, m.weight, m.x, 1e-6f, y[i]);
            different += !same_bits(y[0], y[1], n);
        }
        for (i = 0; i < 2; i++) {
            test_fill(s[i].scores, MAX_KEYS, n);
            test_fill(s[i].mask, MAX_KEYS, n + 2);
            run_softmax(both[i], s + i, n, 31, 7.7f, 1);
        }
        different += !same_bits(s[0].p, s[1].p, n + 2 * GUARD);
    }
    CHECK_MSG(!different, "%s and %s: %lu results differ in their bits", name_of(a), name_of(b),
              (unsigned long)different);
}

/* In its GNU dialects GCC fuses products and sums as it likes, and not the same for every instruction set. */
static void test_agreement(void) {
#if defined(__STRICT_ANSI__) || defined(__clang__)
    size_t i;
    for (i = 2; i < n_kernels_here; i++)
        check_agreement(kernels_here[1], kernels_here[i]);
#else
    (void)check_agreement;
#endif
}

void test_kernels(void) {
    static const float zeros[40];
    product *p = (product *)test_allocate(sizeof *p);
    size_t i;
    int activation;
    find_kernels();
    CHECK(n_kernels_here >= 1 && kernels_here[0]->isa == TFM_ISA_SCALAR);
    for (i = 1; i < n_kernels_here; i++)
        CHECK(kernels_here[i]->isa != TFM_ISA_SCALAR);
    test_halves();
    test_half_rounding_anywhere();
    test_packing();
    test_pack_errors();
    test_products(p);
    test_tiles(p);
    free(p);
    test_activations();
    for (i = 0; i < n_kernels_here; i++) {
        const tfm__kernels *kernels = kernels_here[i];
        test_half_loads(kernels, TFM_F16);
        test_half_loads(kernels, TFM_BF16);
        for (activation = 0; activation < TFM_ACTIVATION_COUNT; activation++)
            test_activation_limits(kernels, (tfm_activation)activation);
        test_gelu_outside(kernels, TFM_GELU);
        test_gelu_outside(kernels, TFM_GELU_TANH);
        test_finish(kernels);
        test_exp(kernels);
        test_norms(kernels);
        test_softmax(kernels);
        test_softmax_state(kernels);
        test_softmax_huge(kernels, NULL);
        test_softmax_huge(kernels, zeros);
        test_softmax_nan(kernels, 1);
        test_softmax_nan(kernels, -INFINITY);
        test_scale_and_multiply(kernels);
        test_narrowing(kernels);
        test_quantize_kv(kernels);
        test_pairing(kernels);
        test_kv_products(kernels, TFM_I8);
        test_kv_products(kernels, TFM_BF16);
    }
    test_i8();
    test_quantize_spoiled();
    test_agreement();
    print_kernels(); /* at the end: these really ran */
}
