/* bf16 matrix products with float32 sums. The weight [N, K] is packed into panels of 32 outputs: [N / 32][K / 2][32][2], or
 * records of four- and eight-bit numbers (blocks.h), which are unpacked to the same bf16 panels: for few rows in registers, for
 * more once a panel, into the member's own memory.
 *
 * Output (m, n) is one chain of K / 2 dot-product instructions in the order of k, whatever the number of rows: a row's
 * result is the same bits alone and in any batch.
 */
#pragma once
#include <math.h>
#include "blocks.h"
#include "team.h"
#include "vector.h"

enum { MAX_ROWS = 12, MAX_DIRECT = 8 /* rows that unpack in registers */ };

/* What becomes of a panel's sums: rows m ... m + count of outputs n ... n + 32 (16 gates and 16 ups for SILU_MUL). */
typedef enum { STORE, ADD, SILU_MUL } Sink;

typedef struct {
    const bf16 *x; /* [M, K], K even */
    Weight w;
    const float *bias; /* [N padded to 32], or NULL */
    void *out; /* STORE, ADD: float [M, N]; SILU_MUL: bf16 [M, N / 2] */
    Sink sink;
    int M, N, K;
    bf16 *scratch; /* a panel of bf16 for each member, [32, K]; or NULL for a bf16 weight */
    float *peaks; /* STORE: the largest output of each panel [M, panels], NaN where one is NaN; or NULL */
} Linear;

/* Where a tile's weights come from: bf16 panels, and what to ask for from memory meanwhile, `step` bytes a pair of inputs. */
typedef struct {
    const __m512i *panel;
    const char *ahead;
    long step;
} Source;

/* The sums of rows m ... m + MR and NP panels to where they belong. */
static inline __attribute__((always_inline)) void linear_finish(const Linear *l, int panel, int m, const int MR, const int NP,
                                                                __m512 acc[MAX_ROWS][4]) {
#pragma GCC unroll 8
    for (int p = 0; p < NP; p++) {
        int n = (panel + p) * PANEL;
        if (n >= l->N) break;
#pragma GCC unroll 12
        for (int i = 0; i < MR; i++) {
            __m512 a = acc[i][2 * p], b = acc[i][2 * p + 1];
            if (l->bias) {
                a = _mm512_add_ps(a, _mm512_loadu_ps(l->bias + n));
                b = _mm512_add_ps(b, _mm512_loadu_ps(l->bias + n + 16));
            }
            if (l->sink == SILU_MUL) {
                store_bf16((bf16 *)l->out + (long)(m + i) * (l->N / 2) + n / 2, _mm512_mul_ps(silu(a), b));
                continue;
            }
            float *out = (float *)l->out + (long)(m + i) * l->N + n;
            __mmask16 low = first_lanes(l->N - n), high = first_lanes(l->N - n - 16);
            if (l->sink == ADD) {
                a = _mm512_add_ps(a, _mm512_maskz_loadu_ps(low, out));
                b = _mm512_add_ps(b, _mm512_maskz_loadu_ps(high, out + 16));
            }
            _mm512_mask_storeu_ps(out, low, a);
            _mm512_mask_storeu_ps(out + 16, high, b);
            if (l->peaks) {
                __m512 none = _mm512_set1_ps(-INFINITY);
                a = _mm512_mask_mov_ps(none, low, a);
                b = _mm512_mask_mov_ps(none, high, b);
                float peak = _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) ? NAN : _mm512_reduce_max_ps(_mm512_max_ps(a, b));
                l->peaks[(long)(m + i) * ((l->N + PANEL - 1) / PANEL) + panel + p] = peak;
            }
        }
    }
}

static inline __attribute__((always_inline)) void linear_tile(const Linear *l, int panel, int m, Source source, const int MR, const int NP) {
    const int K2 = l->K / 2, stride = l->K / 2;
    const uint32_t *x = (const uint32_t *)(l->x + (long)m * l->K);
    const __m512i *w = source.panel;
    const long next = (long)K2 * 2; /* vectors from one panel to the next */
    __m512 acc[MAX_ROWS][4]; /* MR and NP are constants once inlined, but not to the C language */
#pragma GCC unroll 12
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
        for (int j = 0; j < 2 * NP; j++) acc[i][j] = _mm512_setzero_ps();
    for (int k = 0; k < K2; k++) {
        __m512bh weight[4];
#pragma GCC unroll 8
        for (int j = 0; j < 2 * NP; j++) {
            weight[j] = (__m512bh)_mm512_load_si512(w + (j / 2) * next + 2 * k + (j & 1));
            /* The hardware runs ahead of one row's reads, not of ten rows' work: 12 rows 6.0 ms a step without this, 4.7 with. */
            _mm_prefetch(source.ahead + (j / 2) * next * 64 + k * source.step + 64 * (j & 1), _MM_HINT_T0);
        }
#pragma GCC unroll 12
        for (int i = 0; i < MR; i++) {
            __m512bh row = (__m512bh)_mm512_set1_epi32(x[i * stride + k]);
#pragma GCC unroll 8
            for (int j = 0; j < 2 * NP; j++) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], weight[j], row);
        }
    }
    linear_finish(l, panel, m, MR, NP, acc);
}

/* One panel of four-bit records, unpacked on the way. */
static inline __attribute__((always_inline)) void linear_four(const Linear *l, int panel, const int MR) {
    const uint8_t *record = (const uint8_t *)l->w.data + panel * panel_bytes(Q4_1, l->K);
    const uint32_t *x = (const uint32_t *)l->x;
    const int stride = l->K / 2;
    const __m512 values = four_values(l->w.kind);
    __m512 acc[MAX_ROWS][4];
#pragma GCC unroll 12
    for (int i = 0; i < MR; i++) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
    for (int k = 0; k < l->K; k += BLOCK, record += FOUR_RECORD) {
        __m512 scale[4], least[4];
#pragma GCC unroll 10
        for (int line = 0; line < 10; line++) _mm_prefetch((const char *)record + 4096 + 64 * line, _MM_HINT_T0);
        four_scales(record, l->w.kind, scale, least);
        for (int half = 0; half < 2; half++, x += 8) {
            const __m512i *from = (const __m512i *)(record + 128) + 4 * half;
            __m512i numbers[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) numbers[i] = _mm512_loadu_si512(from + i);
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                __m512bh low = four_pair(numbers[0], numbers[1], j, values, scale, least);
                __m512bh high = four_pair(numbers[2], numbers[3], j, values, scale + 2, least + 2);
#pragma GCC unroll 12
                for (int i = 0; i < MR; i++) {
                    __m512bh row = (__m512bh)_mm512_set1_epi32(x[i * stride + j]);
                    acc[i][0] = _mm512_dpbf16_ps(acc[i][0], low, row);
                    acc[i][1] = _mm512_dpbf16_ps(acc[i][1], high, row);
                }
            }
        }
    }
    linear_finish(l, panel, 0, MR, 1, acc);
}

/* One panel of eight-bit records, unpacked on the way. */
static inline __attribute__((always_inline)) void linear_eight(const Linear *l, int panel, const int MR) {
    const uint8_t *record = (const uint8_t *)l->w.data + panel * panel_bytes(Q8_0, l->K);
    const uint32_t *x = (const uint32_t *)l->x;
    const int stride = l->K / 2;
    __m512 acc[MAX_ROWS][4];
#pragma GCC unroll 12
    for (int i = 0; i < MR; i++) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
    for (int k = 0; k < l->K; k += BLOCK, record += EIGHT_RECORD, x += BLOCK / 2) {
        __m512 scale[4];
        _mm_prefetch((const char *)record + 4096 + 1024, _MM_HINT_T0);
        spread(record, scale);
#pragma GCC unroll 16
        for (int j = 0; j < 16; j++) {
            _mm_prefetch((const char *)record + 4096 + 64 * j, _MM_HINT_T0);
            __m512bh low = eight_pair(record + 64 + 64 * j, scale), high = eight_pair(record + 96 + 64 * j, scale + 2);
#pragma GCC unroll 12
            for (int i = 0; i < MR; i++) {
                __m512bh row = (__m512bh)_mm512_set1_epi32(x[i * stride + j]);
                acc[i][0] = _mm512_dpbf16_ps(acc[i][0], low, row);
                acc[i][1] = _mm512_dpbf16_ps(acc[i][1], high, row);
            }
        }
    }
    linear_finish(l, panel, 0, MR, 1, acc);
}

#define TILE(rows, panels) \
    static __attribute__((noinline)) void tile_##rows##_##panels(const Linear *l, int panel, int m, Source source) { \
        linear_tile(l, panel, m, source, rows, panels); \
    }
TILE(1, 1) TILE(2, 1) TILE(3, 1) TILE(4, 1) TILE(5, 1) TILE(6, 1) TILE(7, 1) TILE(8, 1) TILE(9, 1) TILE(10, 1) TILE(11, 1) TILE(12, 1)
TILE(1, 2) TILE(2, 2) TILE(3, 2) TILE(4, 2)
#undef TILE
#define DIRECT(rows) \
    static __attribute__((noinline)) void four_##rows(const Linear *l, int panel) { linear_four(l, panel, rows); } \
    static __attribute__((noinline)) void eight_##rows(const Linear *l, int panel) { linear_eight(l, panel, rows); }
DIRECT(1) DIRECT(2) DIRECT(3) DIRECT(4) DIRECT(5) DIRECT(6) DIRECT(7) DIRECT(8)
#undef DIRECT

typedef void (*Tile)(const Linear *, int, int, Source);
static const Tile tiles_one[MAX_ROWS + 1] = {0, tile_1_1, tile_2_1, tile_3_1, tile_4_1, tile_5_1, tile_6_1,
                                             tile_7_1, tile_8_1, tile_9_1, tile_10_1, tile_11_1, tile_12_1};
static const Tile tiles_two[5] = {0, tile_1_2, tile_2_2, tile_3_2, tile_4_2};
typedef void (*Direct)(const Linear *, int);
static const Direct direct_four[MAX_DIRECT + 1] = {0, four_1, four_2, four_3, four_4, four_5, four_6, four_7, four_8};
static const Direct direct_eight[MAX_DIRECT + 1] = {0, eight_1, eight_2, eight_3, eight_4, eight_5, eight_6, eight_7, eight_8};

/* Panels first ... last of a bf16 weight. */
static void linear_panels(const Linear *l, int first, int last, int width, int rows) {
    const long size = panel_bytes(BF16, l->K);
    for (int panel = first; panel < last;) {
        const char *from = (const char *)l->w.data + panel * size;
        const Source source = {(const __m512i *)from, from + 4096, 128};
        int step = panel + width <= last ? width : 1;
        if (step == 2)
            tiles_two[l->M](l, panel, 0, source);
        else
            for (int m = 0; m < l->M; m += rows) tiles_one[l->M - m < rows ? l->M - m : rows](l, panel, m, source);
        panel += step;
    }
}

/* Panels first ... last of four- or eight-bit records. */
static void linear_records(const Linear *l, int first, int last, int rows, bf16 *scratch) {
    const Kind kind = l->w.kind;
    const long size = panel_bytes(kind, l->K);
    if (l->M <= MAX_DIRECT) {
        const Direct direct = (kind == Q8_0 ? direct_eight : direct_four)[l->M];
        for (int panel = first; panel < last; panel++) direct(l, panel);
        return;
    }
    for (int panel = first; panel < last; panel++) {
        const uint8_t *from = (const uint8_t *)l->w.data + panel * size;
        unpack_panel(from, kind, l->K, scratch);
        const Source source = {(const __m512i *)scratch, (const char *)from + size, 64};
        for (int m = 0; m < l->M; m += rows) tiles_one[l->M - m < rows ? l->M - m : rows](l, panel, m, source);
    }
}

/* The whole product, as one phase of the team's job. */
static void linear_phase(Place *place, const Linear *l) {
    const int panels = (l->N + PANEL - 1) / PANEL;
    const int blocks = (l->M + MAX_ROWS - 1) / MAX_ROWS, rows = blocks ? (l->M + blocks - 1) / blocks : 0;
    const int width = l->M <= 4 ? 2 : 1;
    /* A few shares per member: enough to even out a member that lost its core for a while. */
    int grain = panels / (place->team->size * 6);
    grain = grain < width ? width : grain - grain % width;
    for (int first; (first = team_take(place, panels, grain)) >= 0; team_finish(place, panels, first, grain)) {
        const int last = first + grain < panels ? first + grain : panels;
        if (l->w.kind == BF16) linear_panels(l, first, last, width, rows);
        else linear_records(l, first, last, rows, l->scratch + (long)place->member * PANEL * l->K);
    }
    team_next(place, panels);
}
