/* The largest logits of a row, from the peaks of its panels: most of the row is never read again. */
#pragma once
#include <math.h>
#include "linear.h"

enum { MOST_TOP = 64 };

/* Put (value, id) into a list of at most k, largest first; of equals the one that came first stays first. */
static inline int top_insert(float *values, int *ids, int size, int k, float value, int id) {
    int at = size < k ? size : k - 1;
    for (; at > 0 && value > values[at - 1]; at--) {
        values[at] = values[at - 1];
        ids[at] = ids[at - 1];
    }
    values[at] = value;
    ids[at] = id;
    return size < k ? size + 1 : k;
}

/* The panels that hold the k largest of a row, ascending; their logits are asked for from memory. Negative: one of a NaN. */
static int top_panels(const float *logits, const float *peaks, int V, int k, int *chosen) {
    const int panels = (V + PANEL - 1) / PANEL;
    float best[MOST_TOP];
    int size = 0;
    /* An element outside the k panels with the largest peaks has k before it. */
    for (int p = 0; p < panels; p += 16) {
        __m512 value = _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), first_lanes(panels - p), peaks + p);
        __mmask16 large = size < k ? first_lanes(panels - p) : _mm512_cmp_ps_mask(value, _mm512_set1_ps(best[k - 1]), _CMP_NLE_UQ);
        for (; large; large &= large - 1) {
            int at = p + __builtin_ctz(large);
            if (isnan(peaks[at])) {
                chosen[0] = at;
                return -1;
            }
            if (size < k || peaks[at] > best[k - 1]) size = top_insert(best, chosen, size, k, peaks[at], at);
        }
    }
    for (int i = 0; i < size; i++) {
        _mm_prefetch((const char *)(logits + (long)chosen[i] * PANEL), _MM_HINT_T0);
        _mm_prefetch((const char *)(logits + (long)chosen[i] * PANEL + PANEL / 2), _MM_HINT_T0);
    }
    for (int i = 1; i < size; i++) /* ascending, so that equal values come in the order of their ids */
        for (int j = i; j > 0 && chosen[j] < chosen[j - 1]; j--) {
            int panel = chosen[j];
            chosen[j] = chosen[j - 1];
            chosen[j - 1] = panel;
        }
    return size;
}

/* ids, values [k]: largest first, of equals the lower id. Where the row holds NaN all values are NaN, with its id. */
static void top_row(const float *logits, const int *chosen, int size, int V, int k, int *ids, float *values) {
    if (size < 0) {
        int id = chosen[0] * PANEL;
        while (!isnan(logits[id])) id++;
        for (int i = 0; i < k; i++) {
            ids[i] = id;
            values[i] = logits[id];
        }
        return;
    }
    int found = 0;
    for (int i = 0; i < size; i++) {
        const int first = chosen[i] * PANEL, last = first + PANEL < V ? first + PANEL : V;
        for (int id = first; id < last; id++)
            if (found < k || logits[id] > values[k - 1]) found = top_insert(values, ids, found, k, logits[id], id);
    }
}

/* The k largest of each of `rows` rows: logits [rows, V], peaks [rows, panels], ids and values [rows, k]; k <= min(V, 64). */
void outrider_top(const float *logits, const float *peaks, int rows, int V, int k, int *ids, float *values) {
    enum { TOGETHER = 16 }; /* rows whose logits are on their way at once */
    const int panels = (V + PANEL - 1) / PANEL;
    int chosen[TOGETHER][MOST_TOP], size[TOGETHER];
    for (int first = 0; first < rows; first += TOGETHER) {
        const int count = rows - first < TOGETHER ? rows - first : TOGETHER;
        for (int i = 0; i < count; i++)
            size[i] = top_panels(logits + (long)(first + i) * V, peaks + (long)(first + i) * panels, V, k, chosen[i]);
        for (int i = 0; i < count; i++)
            top_row(logits + (long)(first + i) * V, chosen[i], size[i], V, k, ids + (long)(first + i) * k, values + (long)(first + i) * k);
    }
}
