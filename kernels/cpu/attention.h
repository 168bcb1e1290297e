/* Paged attention of prompt chunks and draft trees over a bf16 KV cache, float32 inside.
 *
 * A row meets its keys in the order of their positions, in tiles of 16 that begin at multiples of 16: its committed context,
 * then its own ancestors. What else shares the step, and where in the block table its ancestors lie, changes no bit.
 * Online softmax as in FlashAttention (arXiv 2205.14135), paged as in vLLM (arXiv 2309.06180), trees as in SpecInfer
 * (arXiv 2305.09781).
 */
#pragma once
#include <math.h>
#include <string.h>
#include "vector.h"

enum { TILE_KEYS = 16, MAX_HEAD = 256, MAX_QUERIES = 32 };

typedef struct {
    int T, B; /* fed rows, sequences */
    const int32_t *tokens, *positions; /* [T] */
    const int64_t *slots; /* [T] block * block size + offset */
    const int32_t *first; /* [B + 1] first row of each sequence */
    const int32_t *context; /* [B] tokens computed before this step */
    const int32_t *tables, *table_first; /* blocks of all sequences, and where each one's begin [B] */
    const uint8_t *trees; /* visibility among one sequence's rows [rows, rows], concatenated */
    const int64_t *tree_first; /* [B]; -1: a chain, that is, causal */
} Batch;

typedef struct {
    bf16 *kv; /* one layer: [blocks, 2, K, block size, D] */
    int heads, kv_heads, size, block; /* size: D, a multiple of 32 */
    int window; /* positions a row sees, itself included; 0: all */
    float scale;
} Attention;

typedef struct {
    _Alignas(64) uint32_t keys[MAX_HEAD / 2 * TILE_KEYS]; /* [D / 2][16 keys]: pairs of one key's elements */
    _Alignas(64) float values[TILE_KEYS * MAX_HEAD]; /* [16][D] */
    _Alignas(64) float weights[MAX_QUERIES * TILE_KEYS];
    _Alignas(64) float sums[MAX_QUERIES * 16]; /* of weights, by lane */
    _Alignas(64) float out[MAX_QUERIES * MAX_HEAD];
    float best[MAX_QUERIES], shrink[MAX_QUERIES];
    __mmask16 seen[MAX_QUERIES];
    const bf16 *query[MAX_QUERIES];
    int last[MAX_QUERIES], oldest[MAX_QUERIES]; /* positions that a query sees: oldest ... last */
} Scratch;

static const bf16 attention_zeros[MAX_HEAD] = {0};

static inline const bf16 *key_at(const Attention *a, long slot, int head) {
    long block = slot / a->block, offset = slot % a->block;
    return a->kv + (((block * 2) * a->kv_heads + head) * a->block + offset) * a->size;
}

static inline long value_offset(const Attention *a) { return (long)a->kv_heads * a->block * a->size; }

static inline __attribute__((always_inline)) void score_queries(const Attention *a, Scratch *s, int q, const int count) {
    __m512 even[4], odd[4];
    const uint32_t *query[4];
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
        even[i] = odd[i] = _mm512_setzero_ps();
        query[i] = (const uint32_t *)s->query[q + i];
    }
    for (int d = 0; d < a->size / 2; d += 2) {
        __m512bh first = (__m512bh)_mm512_load_si512(s->keys + d * 16), second = (__m512bh)_mm512_load_si512(s->keys + d * 16 + 16);
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) {
            even[i] = _mm512_dpbf16_ps(even[i], first, (__m512bh)_mm512_set1_epi32(query[i][d]));
            odd[i] = _mm512_dpbf16_ps(odd[i], second, (__m512bh)_mm512_set1_epi32(query[i][d + 1]));
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
        __m512 score = _mm512_mul_ps(_mm512_add_ps(even[i], odd[i]), _mm512_set1_ps(a->scale));
        score = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), s->seen[q + i], score);
        float best = _mm512_reduce_max_ps(score), before = s->best[q + i];
        __mmask16 nan = _mm512_mask_cmp_ps_mask(s->seen[q + i], score, score, _CMP_UNORD_Q);
        best = nan ? NAN : best > before ? best : before;
        __m512 weight = vexp(_mm512_sub_ps(score, _mm512_set1_ps(best)));
        weight = _mm512_maskz_mov_ps(s->seen[q + i], weight);
        _mm512_store_ps(s->weights + (q + i) * 16, weight);
        __m512 sum = _mm512_load_ps(s->sums + (q + i) * 16);
        s->shrink[q + i] = 1.0f;
        if (best != before) {
            __m512 shrink = vexp(_mm512_set1_ps(before - best));
            s->shrink[q + i] = _mm512_cvtss_f32(shrink);
            s->best[q + i] = best;
            sum = _mm512_mul_ps(sum, shrink);
        }
        _mm512_store_ps(s->sums + (q + i) * 16, _mm512_add_ps(sum, weight));
    }
}

static inline __attribute__((always_inline)) void weigh_values(const Attention *a, Scratch *s, int q, const int count, int keys) {
    for (int d = 0; d < a->size; d += 32) {
        __m512 sum[4][2];
#pragma GCC unroll 4
        for (int i = 0; i < count; i++)
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++)
                sum[i][j] = _mm512_mul_ps(_mm512_load_ps(s->out + (q + i) * a->size + d + 16 * j), _mm512_set1_ps(s->shrink[q + i]));
        for (int key = 0; key < keys; key++) {
            __m512 first = _mm512_load_ps(s->values + key * a->size + d), second = _mm512_load_ps(s->values + key * a->size + d + 16);
#pragma GCC unroll 4
            for (int i = 0; i < count; i++) {
                __m512 weight = _mm512_set1_ps(s->weights[(q + i) * 16 + key]);
                sum[i][0] = _mm512_fmadd_ps(weight, first, sum[i][0]);
                sum[i][1] = _mm512_fmadd_ps(weight, second, sum[i][1]);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < count; i++)
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) _mm512_store_ps(s->out + (q + i) * a->size + d + 16 * j, sum[i][j]);
    }
}

/* One tile of 16 keys for queries q ... q + count. `key` has the keys' addresses; beyond the tile's end they are zeros. */
static void attend_tile(const Attention *a, Scratch *s, int q, int count, const bf16 *const key[TILE_KEYS], int base, int keys) {
    const long to_value = value_offset(a);
    for (int d = 0; d < a->size / 2; d += 16) {
        __m512i rows[16];
        for (int i = 0; i < 16; i++) rows[i] = _mm512_loadu_si512((const __m512i *)(key[i] + 2 * d));
        transpose16(rows);
        for (int i = 0; i < 16; i++) _mm512_store_si512(s->keys + (d + i) * 16, rows[i]);
    }
    for (int i = 0; i < keys; i++)
        for (int d = 0; d < a->size; d += 16) _mm512_store_ps(s->values + i * a->size + d, load_bf16(key[i] + to_value + d));
    for (int i = q; i < q + count; i++)
        s->seen[i] = first_lanes(s->last[i] - base + 1) & ~first_lanes(s->oldest[i] - base);
    int i = q;
    for (; i + 4 <= q + count; i += 4) score_queries(a, s, i, 4);
    for (; i + 3 <= q + count; i += 3) score_queries(a, s, i, 3);
    for (; i < q + count; i++) score_queries(a, s, i, 1);
    for (i = q; i + 4 <= q + count; i += 4) weigh_values(a, s, i, 4, keys);
    for (; i + 3 <= q + count; i += 3) weigh_values(a, s, i, 3, keys);
    for (; i < q + count; i++) weigh_values(a, s, i, 1, keys);
}

/* Rows row ... row + rows of sequence b for one key head. q [T, H, D] bf16 rotated, out [T, H * D] bf16. */
static void attend(const Attention *a, const Batch *batch, Scratch *s, const bf16 *q, bf16 *out, int b, int head, int row, int rows) {
    const int per_head = a->heads / a->kv_heads, queries = rows * per_head;
    const int first = batch->first[b], context = batch->context[b], total = batch->first[b + 1] - first;
    const int32_t *table = batch->tables + batch->table_first[b];
    const uint8_t *tree = batch->tree_first[b] < 0 ? NULL : batch->trees + batch->tree_first[b];
    const bf16 *key[TILE_KEYS];
    int oldest = INT32_MAX, last = 0;
    for (int i = 0; i < queries; i++) {
        int position = batch->positions[first + row + i / per_head];
        s->query[i] = q + ((long)(first + row + i / per_head) * a->heads + head * per_head + i % per_head) * a->size;
        s->best[i] = -1e30f; /* finite: nothing seen yet must not become NaN */
        s->last[i] = position;
        s->oldest[i] = a->window && position >= a->window ? position - a->window + 1 : 0;
        if (s->oldest[i] < oldest) oldest = s->oldest[i];
        if (position > last) last = position;
    }
    memset(s->sums, 0, sizeof(float) * 16 * queries);
    memset(s->out, 0, sizeof(float) * a->size * queries);
    /* Whole tiles of committed context are the same for all rows; a tree's later tiles differ from row to row. */
    int base = oldest / TILE_KEYS * TILE_KEYS, shared = tree ? context / TILE_KEYS * TILE_KEYS : last + 1;
    for (; base < shared; base += TILE_KEYS) {
        int keys = last + 1 - base < TILE_KEYS ? last + 1 - base : TILE_KEYS;
        for (int i = 0; i < TILE_KEYS; i++) {
            int position = base + i;
            key[i] = i < keys ? key_at(a, (long)table[position / a->block] * a->block + position % a->block, head) : attention_zeros;
        }
        attend_tile(a, s, 0, queries, key, base, keys);
    }
    if (tree) {
        for (int r = 0; r < rows; r++) {
            const uint8_t *visible = tree + (long)(row + r) * total;
            int position = batch->positions[first + row + r], own = 0;
            for (int start = base; start <= position; start += TILE_KEYS) {
                int keys = position + 1 - start < TILE_KEYS ? position + 1 - start : TILE_KEYS;
                for (int i = 0; i < TILE_KEYS; i++) {
                    int place = start + i;
                    if (i < keys && place >= context) {
                        while (own < total && !visible[own]) own++;
                        place = context + own++;
                    }
                    key[i] = i < keys ? key_at(a, (long)table[place / a->block] * a->block + place % a->block, head) : attention_zeros;
                }
                attend_tile(a, s, r * per_head, per_head, key, start, keys);
            }
        }
    }
    for (int i = 0; i < queries; i++) {
        __m512 scale = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(_mm512_load_ps(s->sums + i * 16)));
        bf16 *to = out + ((long)(first + row + i / per_head) * a->heads + head * per_head + i % per_head) * a->size;
        for (int d = 0; d < a->size; d += 16) store_bf16(to + d, _mm512_mul_ps(scale, _mm512_load_ps(s->out + i * a->size + d)));
    }
}

/* Rows of one sequence that are attended together. */
static inline int attention_rows(const Attention *a) {
    int rows = MAX_QUERIES / (a->heads / a->kv_heads);
    return rows < 1 ? 1 : rows > 16 ? 16 : rows;
}
