/* bf16 matrix products with float32 sums. The weight [N, K] is packed into panels of 32 outputs: [N / 32][K / 2][32][2].
 *
 * Output (m, n) is one chain of K / 2 dot-product instructions in the order of k, whatever the number of rows: a row's
 * result is the same bits alone and in any batch.
 */
#pragma once
#include <math.h>
#include "team.h"
#include "vector.h"

enum { PANEL = 32, MAX_ROWS = 12 };

/* What becomes of a panel's sums: rows m ... m + count of outputs n ... n + 32 (16 gates and 16 ups for SILU_MUL). */
typedef enum { STORE, ADD, SILU_MUL } Sink;

typedef struct {
    const bf16 *x; /* [M, K], K even */
    const bf16 *w; /* packed */
    const float *bias; /* [N padded to 32], or NULL */
    void *out; /* STORE, ADD: float [M, N]; SILU_MUL: bf16 [M, N / 2] */
    Sink sink;
    int M, N, K;
    float *peaks; /* STORE: the largest output of each panel [M, panels], NaN where one is NaN; or NULL */
} Linear;

static inline __attribute__((always_inline)) void linear_tile(const Linear *l, int panel, int m, const int MR, const int NP) {
    const int K2 = l->K / 2, stride = l->K / 2;
    const uint32_t *x = (const uint32_t *)(l->x + (long)m * l->K);
    const __m512i *w = (const __m512i *)(l->w + (long)panel * PANEL * l->K);
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
            _mm_prefetch((const char *)(w + (j / 2) * next + 2 * k + (j & 1)) + 4096, _MM_HINT_T0);
        }
#pragma GCC unroll 12
        for (int i = 0; i < MR; i++) {
            __m512bh row = (__m512bh)_mm512_set1_epi32(x[i * stride + k]);
#pragma GCC unroll 8
            for (int j = 0; j < 2 * NP; j++) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], weight[j], row);
        }
    }
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

#define TILE(rows, panels) \
    static __attribute__((noinline)) void tile_##rows##_##panels(const Linear *l, int panel, int m) { linear_tile(l, panel, m, rows, panels); }
TILE(1, 1) TILE(2, 1) TILE(3, 1) TILE(4, 1) TILE(5, 1) TILE(6, 1) TILE(7, 1) TILE(8, 1) TILE(9, 1) TILE(10, 1) TILE(11, 1) TILE(12, 1)
TILE(1, 2) TILE(2, 2) TILE(3, 2) TILE(4, 2)
#undef TILE

typedef void (*Tile)(const Linear *, int, int);
static const Tile tiles_one[MAX_ROWS + 1] = {0, tile_1_1, tile_2_1, tile_3_1, tile_4_1, tile_5_1, tile_6_1,
                                             tile_7_1, tile_8_1, tile_9_1, tile_10_1, tile_11_1, tile_12_1};
static const Tile tiles_two[5] = {0, tile_1_2, tile_2_2, tile_3_2, tile_4_2};

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
        for (int panel = first; panel < last;) {
            int step = panel + width <= last ? width : 1;
            if (step == 2)
                tiles_two[l->M](l, panel, 0);
            else
                for (int m = 0; m < l->M; m += rows) tiles_one[l->M - m < rows ? l->M - m : rows](l, panel, m);
            panel += step;
        }
    }
    team_next(place, panels);
}
