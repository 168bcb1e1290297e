/* Weights in the 32-input blocks of GGUF files, four or eight bits each, unpacked on their way into a product.
 *
 * A weight's value is bf16(scale * number + least), rounded once in float32 and once to bf16. The product of a float16 and a number
 * of up to 8 bits is exact in float32, so one fused operation gives the bits that a product and then a sum give. No value is a
 * denormal, which the conversion would flush: every one is a multiple of 2^-24.
 *
 * Packed: [panels of 32 outputs][K / 32] records; a record is 32 inputs of 32 outputs:
 *   four bits: scales [32] float16, leasts [32] float16, numbers [2 halves of 16 inputs][4 groups of 8 outputs][8 outputs][2] of 32
 *   bits: the inputs 2 j + (0 or 1) of the half, j = 0 ... 7, from the lowest bits on; 640 bytes
 *   eight bits: scales [32] float16, numbers [16][32 outputs][2] of 8 bits; 1088 bytes
 */
#pragma once
#include <string.h>
#include "vector.h"

enum { PANEL = 32, BLOCK = 32, FOUR_RECORD = 640, EIGHT_RECORD = 1088 };

/* Q4_0: scale (n - 8); Q4_1: scale n + least; Q8_0: scale n, n signed. Q4_Z is no type of GGUF's: scale (n - zero), the zero a
 * number of up to five bits in the place of the least, as AWQ and GPTQ have it. Both products are exact in float32, hence the sum. */
typedef enum { BF16, Q4_0, Q4_1, Q8_0, Q4_Z } Kind;

typedef struct {
    const void *data; /* packed */
    int64_t kind;
} Weight;

/* Bytes of `K` inputs of one panel. */
static inline long panel_bytes(Kind kind, int K) {
    return kind == BF16 ? (long)K * PANEL * sizeof(bf16) : (long)(K / BLOCK) * (kind == Q8_0 ? EIGHT_RECORD : FOUR_RECORD);
}

/* The numbers 0 ... 15 as the floats that a scale multiplies. */
static inline __m512 four_values(Kind kind) {
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return kind == Q4_0 ? _mm512_sub_ps(values, _mm512_set1_ps(8)) : values;
}

/* 32 float16 -> four vectors, one for 8 outputs: each number twice, for the two inputs of a pair. */
static inline __attribute__((always_inline)) void spread(const void *halves, __m512 out[4]) {
    const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        __m512 sixteen = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)halves + i));
        out[2 * i] = _mm512_permutexvar_ps(low, sixteen);
        out[2 * i + 1] = _mm512_permutexvar_ps(high, sixteen);
    }
}

/* Scales and leasts of a four-bit record. */
static inline __attribute__((always_inline)) void four_scales(const uint8_t *record, Kind kind, __m512 scale[4], __m512 least[4]) {
    spread(record, scale);
    spread(record + 64, least);
    if (kind == Q4_Z)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) least[i] = _mm512_fnmadd_ps(scale[i], least[i], _mm512_setzero_ps());
}

/* Two inputs of 16 outputs, bf16: number j of `first` (8 outputs) and `second` (the next 8). */
static inline __attribute__((always_inline)) __m512bh four_pair(__m512i first, __m512i second, const int j, __m512 values,
                                                                const __m512 scale[2], const __m512 least[2]) {
    /* The permutation looks at the lowest four bits alone. */
    __m512 low = _mm512_permutexvar_ps(_mm512_srli_epi32(first, 4 * j), values);
    __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(second, 4 * j), values);
    return _mm512_cvtne2ps_pbh(_mm512_fmadd_ps(high, scale[1], least[1]), _mm512_fmadd_ps(low, scale[0], least[0]));
}

static inline __attribute__((always_inline)) __m512bh eight_pair(const void *numbers, const __m512 scale[2]) {
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)numbers)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)numbers + 1)));
    return _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, scale[1]), _mm512_mul_ps(low, scale[0]));
}

/* One panel as bf16 [K / 2][32][2]. */
static void unpack_four(const uint8_t *record, Kind kind, int K, bf16 *out) {
    const __m512 values = four_values(kind);
    __m512i *to = (__m512i *)out;
    for (int k = 0; k < K; k += BLOCK, record += FOUR_RECORD) {
        __m512 scale[4], least[4];
        four_scales(record, kind, scale, least);
        for (int half = 0; half < 2; half++) {
            const __m512i *numbers = (const __m512i *)(record + 128) + 4 * half;
#pragma GCC unroll 2
            for (int side = 0; side < 2; side++) {
                __m512i first = _mm512_loadu_si512(numbers + 2 * side), second = _mm512_loadu_si512(numbers + 2 * side + 1);
#pragma GCC unroll 8
                for (int j = 0; j < 8; j++)
                    _mm512_store_si512(to + 2 * j + side, (__m512i)four_pair(first, second, j, values, scale + 2 * side, least + 2 * side));
            }
            to += 16;
        }
    }
}

static void unpack_eight(const uint8_t *record, int K, bf16 *out) {
    __m512i *to = (__m512i *)out;
    for (int k = 0; k < K; k += BLOCK, record += EIGHT_RECORD) {
        __m512 scale[4];
        spread(record, scale);
#pragma GCC unroll 4
        for (int j = 0; j < 16; j++) {
            _mm512_store_si512(to++, (__m512i)eight_pair(record + 64 + 64 * j, scale));
            _mm512_store_si512(to++, (__m512i)eight_pair(record + 96 + 64 * j, scale + 2));
        }
    }
}

static void unpack_panel(const uint8_t *panel, Kind kind, int K, bf16 *out) {
    if (kind == Q8_0) unpack_eight(panel, K, out);
    else unpack_four(panel, kind, K, out);
}

/* Output `row` of a packed weight, as float32 [K]. */
static void unpack_row(const Weight *weight, int row, int K, float *x) {
    const int o = row % PANEL;
    const uint8_t *record = (const uint8_t *)weight->data + (row / PANEL) * panel_bytes(weight->kind, K);
    if (weight->kind == BF16) {
        const uint32_t *pairs = (const uint32_t *)record + o;
        for (int k = 0; k < K / 2; k++) {
            uint32_t pair = pairs[(long)k * PANEL], low = pair << 16, high = pair & 0xffff0000u;
            memcpy(x + 2 * k, &low, 4);
            memcpy(x + 2 * k + 1, &high, 4);
        }
        return;
    }
    const long size = panel_bytes(weight->kind, BLOCK);
    for (int k = 0; k < K; k += BLOCK, record += size) {
        const __m512 scale = _mm512_cvtph_ps(_mm256_set1_epi16(((const int16_t *)record)[o]));
        __m512 least = _mm512_set1_ps(-0.0f); /* adds nothing, to zeros of either sign too */
        int number[BLOCK];
        if (weight->kind == Q8_0) {
            for (int i = 0; i < BLOCK; i++) number[i] = (int8_t)record[64 + 64 * (i / 2) + 2 * o + i % 2];
        } else {
            const uint32_t *numbers = (const uint32_t *)(record + 128);
            for (int i = 0; i < BLOCK; i++)
                number[i] = (int)(numbers[64 * (i / 16) + 2 * o + i % 2] >> 4 * (i % 16 / 2) & 15) - (weight->kind == Q4_0 ? 8 : 0);
            least = _mm512_cvtph_ps(_mm256_set1_epi16(((const int16_t *)record)[PANEL + o]));
            if (weight->kind == Q4_Z) least = _mm512_fnmadd_ps(scale, least, _mm512_setzero_ps());
        }
        for (int i = 0; i < BLOCK; i += 16) {
            __m512 value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(number + i)), scale, least);
            _mm512_storeu_ps(x + k + i, widen((__m256i)_mm512_cvtneps_pbh(value)));
        }
    }
}

/* One output's four-bit block of a file (the low halves of its 16 bytes are inputs 0 ... 15) into its record. */
static inline void pack_four(const uint8_t *numbers, uint8_t *record, int o) {
    uint64_t first, second;
    memcpy(&first, numbers, 8);
    memcpy(&second, numbers + 8, 8);
    uint32_t *to = (uint32_t *)(record + 128) + 2 * o;
    for (int half = 0; half < 2; half++)
        for (int odd = 0; odd < 2; odd++) {
            const uint64_t mask = 0x000f000f000f000full << (4 * half + 8 * odd);
            to[64 * half + odd] = (uint32_t)(_pext_u64(first, mask) | _pext_u64(second, mask) << 16);
        }
}

static inline void pack_eight(const uint8_t *numbers, uint8_t *record, int o) {
    for (int pair = 0; pair < BLOCK / 2; pair++) memcpy(record + 64 + 64 * pair + 2 * o, numbers + 2 * pair, 2);
}

/* weight [N][K / 32] blocks of a file -> panels; `other`: panels of 16 rows of weight and 16 of other, as in outrider_pack. */
void outrider_pack_blocks(const uint8_t *weight, const uint8_t *other, uint8_t *panels, int kind, int N, int K) {
    const int rows = other ? PANEL / 2 : PANEL, blocks = K / BLOCK, before = kind == Q4_1 || kind == Q4_Z ? 4 : 2;
    const long size = before + (kind == Q8_0 ? BLOCK : BLOCK / 2), record_size = panel_bytes(kind, BLOCK);
    const uint16_t nothing = 0x8000; /* -0 */
    for (int n = 0; n < N; n += rows)
        for (int o = 0; o < PANEL; o++) {
            const uint8_t *from = other && o >= rows ? other : weight;
            const int row = n + o % rows;
            for (int b = 0; b < blocks; b++) {
                const uint8_t *block = from + ((long)row * blocks + b) * size;
                uint8_t *record = panels + (n / rows * (long)blocks + b) * record_size;
                if (row >= N) { /* all zeros: 0 * 0 - 0 */
                    static const uint8_t zeros[BLOCK] = {0};
                    memset(record + 2 * o, 0, 2);
                    if (kind == Q8_0) pack_eight(zeros, record, o);
                    else pack_four(zeros, record, o);
                    if (kind != Q8_0) memcpy(record + 2 * (PANEL + o), &nothing, 2);
                    continue;
                }
                memcpy(record + 2 * o, block, 2);
                if (kind == Q8_0) {
                    pack_eight(block + 2, record, o);
                    continue;
                }
                memcpy(record + 2 * (PANEL + o), before == 4 ? (const void *)(block + 2) : &nothing, 2);
                pack_four(block + before, record, o);
            }
        }
}
