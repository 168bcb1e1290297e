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

/* ids, values [k]: largest first, of equals the lower id. Where the row holds NaN the first value is NaN, with its id. */
static void top_row(const float *logits, const float *peaks, int V, int k, int *ids, float *values) {
    const int panels = (V + PANEL - 1) / PANEL;
    float best[MOST_TOP];
    int chosen[MOST_TOP], size = 0;
    /* An element outside the k panels with the largest peaks has k before it. */
    for (int p = 0; p < panels; p += 16) {
        __m512 value = _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), first_lanes(panels - p), peaks + p);
        __mmask16 large = size < k ? first_lanes(panels - p) : _mm512_cmp_ps_mask(value, _mm512_set1_ps(best[k - 1]), _CMP_NLE_UQ);
        for (; large; large &= large - 1) {
            int at = p + __builtin_ctz(large);
            if (isnan(peaks[at])) {
                int id = at * PANEL;
                while (!isnan(logits[id])) id++;
                for (int i = 0; i < k; i++) {
                    ids[i] = id;
                    values[i] = logits[id];
                }
                return;
            }
            if (size < k || peaks[at] > best[k - 1]) size = top_insert(best, chosen, size, k, peaks[at], at);
        }
    }
    for (int i = 1; i < size; i++) /* ascending, so that equal values come in the order of their ids */
        for (int j = i; j > 0 && chosen[j] < chosen[j - 1]; j--) {
            int panel = chosen[j];
            chosen[j] = chosen[j - 1];
            chosen[j - 1] = panel;
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
    const int panels = (V + PANEL - 1) / PANEL;
    for (int row = 0; row < rows; row++)
        top_row(logits + (long)row * V, peaks + (long)row * panels, V, k, ids + (long)row * k, values + (long)row * k);
}
