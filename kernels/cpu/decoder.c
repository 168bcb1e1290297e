/* The Llama family's decoder for a CPU with AVX512-BF16: one call runs a range of layers for a whole step.
 *
 * The residual stream is float32, what enters a product is rounded to bf16, sums are float32. Every row's result is the same
 * bits whatever shares the step: see linear.h and attention.h.
 */
#include <stddef.h>
#include "attention.h"
#include "linear.h"
#include "top.h"

typedef struct {
    const float *input_norm, *post_norm; /* [C] */
    const float *q_norm, *k_norm; /* [D] or NULL */
    Weight qkv, out, gate_up, down; /* packed; gate_up in panels of 16 gates and their 16 ups */
    const float *qkv_bias, *out_bias, *gate_up_bias, *down_bias; /* or NULL */
} Layer;

typedef struct {
    int hidden, heads, kv_heads, size, inner, vocab;
    float eps;
    const float *cos, *sin; /* [positions, D / 2] */
    Weight head; /* packed [vocab, hidden] */
    const bf16 *embedding; /* [vocab, hidden] row by row, or NULL: read from the head's panels */
    const float *norm; /* [C] */
    int window, block;
    float scale;
} Model;

typedef struct Context Context;

static void norm_row(const float *x, const float *weight, bf16 *out, int size, float eps) {
    __m512 squares = _mm512_setzero_ps();
    for (int i = 0; i < size; i += 16) {
        __m512 value = _mm512_loadu_ps(x + i);
        squares = _mm512_fmadd_ps(value, value, squares);
    }
    __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / size + eps));
    for (int i = 0; i < size; i += 16)
        store_bf16(out + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), scale), _mm512_loadu_ps(weight + i)));
}

/* Norm (where the model has one) and rotation of one head, in place. x [D] float. */
static void rotate(const Model *m, float *x, const float *norm, int position) {
    const int half = m->size / 2;
    if (norm) {
        __m512 squares = _mm512_setzero_ps();
        for (int i = 0; i < m->size; i += 16) {
            __m512 value = _mm512_loadu_ps(x + i);
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / m->size + m->eps));
        for (int i = 0; i < m->size; i += 16)
            _mm512_storeu_ps(x + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), scale), _mm512_loadu_ps(norm + i)));
    }
    const float *cos = m->cos + (long)position * half, *sin = m->sin + (long)position * half;
    for (int i = 0; i < half; i += 16) {
        __m512 low = _mm512_loadu_ps(x + i), high = _mm512_loadu_ps(x + half + i);
        __m512 c = _mm512_loadu_ps(cos + i), s = _mm512_loadu_ps(sin + i);
        _mm512_storeu_ps(x + i, _mm512_fmsub_ps(low, c, _mm512_mul_ps(high, s)));
        _mm512_storeu_ps(x + half + i, _mm512_fmadd_ps(high, c, _mm512_mul_ps(low, s)));
    }
}

static void narrow(bf16 *out, const float *x, int size) {
    for (int i = 0; i < size; i += 16) store_bf16(out + i, _mm512_loadu_ps(x + i));
}

/* Queries to `query`, keys and values to the cache. */
static void place_row(const Model *m, const Attention *a, const Layer *layer, const Batch *batch, float *qkv, bf16 *query, int row) {
    const int size = m->size, position = batch->positions[row];
    float *heads = qkv + (long)row * (m->heads + 2 * m->kv_heads) * size;
    for (int h = 0; h < m->heads; h++, heads += size) {
        rotate(m, heads, layer->q_norm, position);
        narrow(query + ((long)row * m->heads + h) * size, heads, size);
    }
    for (int h = 0; h < m->kv_heads; h++, heads += size) {
        rotate(m, heads, layer->k_norm, position);
        narrow((bf16 *)key_at(a, batch->slots[row], h), heads, size);
    }
    for (int h = 0; h < m->kv_heads; h++, heads += size) narrow((bf16 *)key_at(a, batch->slots[row], h) + value_offset(a), heads, size);
}

static void embed_row(const Model *m, int token, float *x) {
    if (m->embedding) {
        const bf16 *row = m->embedding + (long)token * m->hidden;
        for (int i = 0; i < m->hidden; i += 16) _mm512_storeu_ps(x + i, load_bf16(row + i));
        return;
    }
    unpack_row(&m->head, token, m->hidden, x);
}

/* The job in hand lies in the context: a late member may still look at one that is over. */
typedef struct {
    const Model *model;
    const Layer *layers;
    const Batch *batch;
    float *x; /* [T, C] */
    bf16 *kv; /* the first layer's cache */
    int64_t kv_stride; /* elements from one layer to the next */
    int T, begin, end, embed;
    int rows; /* of one sequence, attended together */
    int64_t *items; /* first attention item of each sequence [B + 1] */
    int attentions; /* items in all */
} Forward;

typedef struct {
    const Model *model;
    const float *x;
    const int64_t *rows;
    float *logits, *peaks;
    int count;
} Logits;

typedef struct {
    Attention a;
    const Batch *batch;
    const bf16 *q;
    bf16 *out;
    int B;
} Attend;

struct Context {
    Team *team;
    int capacity; /* rows that the buffers hold */
    float *qkv;
    bf16 *normed, *query, *attended, *inner;
    Scratch *scratch; /* one for each member */
    bf16 *panels; /* of the widest packed weight, one for each member */
    long panel_inputs; /* that they hold */
    Model model; /* a copy: what a late member reads of a model that may be gone */
    Forward forward;
    Logits logits;
    Attend attend;
    Linear linear;
};

/* As many rows at a time as keep the members even; a lone row is no work to share. */
static inline int row_grain(const Place *place, int rows) {
    int grain = rows / (place->team->size * 4);
    return grain < 1 ? 1 : grain;
}

#define EACH_ROW(place, total, row) \
    for (int grain_ = row_grain(place, total), first_; (first_ = team_take(place, total, grain_)) >= 0; team_finish(place, total, first_, grain_)) \
        for (int row = first_, last_ = first_ + grain_ < (total) ? first_ + grain_ : (total); row < last_; row++)

static void norm_phase(Place *place, Context *c, const float *weight) {
    const Forward *f = &c->forward;
    const int C = c->model.hidden, T = f->T;
    EACH_ROW(place, T, row) norm_row(f->x + (long)row * C, weight, c->normed + (long)row * C, C, c->model.eps);
    team_next(place, T);
}

static void attend_phase(Place *place, Context *c, const Attention *a) {
    const Forward *f = &c->forward;
    const int rows = f->rows, total = f->attentions;
    for (int item; (item = team_take(place, total, 1)) >= 0; team_finish(place, total, item, 1)) {
        const Batch *batch = f->batch;
        int low = 0, high = batch->B;
        while (high - low > 1) {
            int middle = (low + high) / 2;
            if (f->items[middle] <= item) low = middle;
            else high = middle;
        }
        int rest = item - f->items[low];
        int head = rest % a->kv_heads, row = rest / a->kv_heads * rows;
        int count = batch->first[low + 1] - batch->first[low] - row;
        attend(a, batch, c->scratch + place->member, c->query, c->attended, low, head, row, count < rows ? count : rows);
    }
    team_next(place, total);
}

static void forward_job(Place *place, void *argument) {
    Context *c = argument;
    const Forward *f = &c->forward;
    const Model *m = &c->model;
    const int T = f->T, width = (m->heads + 2 * m->kv_heads) * m->size;
    if (f->embed) {
        EACH_ROW(place, T, row) embed_row(m, f->batch->tokens[row], f->x + (long)row * m->hidden);
        team_next(place, T);
    }
    for (int i = f->begin; i < f->end; i++) {
        const uint32_t phase = (uint32_t)(atomic_load(&place->team->ticket) >> 32);
        if ((int32_t)(phase - place->phase) >= 8) { /* eight phases a layer: this one is over */
            place->phase += 8;
            continue;
        }
        const Layer layer = f->layers[i];
        const Attention a = {f->kv + i * f->kv_stride, m->heads, m->kv_heads, m->size, m->block, m->window, m->scale};
        norm_phase(place, c, layer.input_norm);
        linear_phase(place, &(Linear){c->normed, layer.qkv, layer.qkv_bias, c->qkv, STORE, T, width, m->hidden, c->panels});
        EACH_ROW(place, T, row) place_row(m, &a, &layer, f->batch, c->qkv, c->query, row);
        team_next(place, T);
        attend_phase(place, c, &a);
        linear_phase(place, &(Linear){c->attended, layer.out, layer.out_bias, f->x, ADD, T, m->hidden, m->heads * m->size, c->panels});
        norm_phase(place, c, layer.post_norm);
        linear_phase(place, &(Linear){c->normed, layer.gate_up, layer.gate_up_bias, c->inner, SILU_MUL, T, 2 * m->inner, m->hidden, c->panels});
        linear_phase(place, &(Linear){c->inner, layer.down, layer.down_bias, f->x, ADD, T, m->hidden, m->inner, c->panels});
    }
}

static int reserve_panels(Context *c, long inputs) {
    if (inputs <= c->panel_inputs) return 0;
    free(c->panels);
    c->panel_inputs = 0;
    c->panels = aligned_alloc(64, sizeof(bf16) * PANEL * inputs * c->team->size);
    if (!c->panels) return -1;
    c->panel_inputs = inputs;
    return 0;
}

static int reserve(Context *c, const Model *m, int rows) {
    const int heads_width = m->heads * m->size, narrow_width = m->hidden > heads_width ? m->hidden : heads_width;
    if (reserve_panels(c, narrow_width > m->inner ? narrow_width : m->inner)) return -1;
    if (rows <= c->capacity) return 0;
    rows = (rows + 63) / 64 * 64;
    free(c->qkv);
    free(c->normed);
    free(c->query);
    free(c->attended);
    free(c->inner);
    c->capacity = 0;
    const size_t heads = (size_t)m->heads * m->size;
    c->qkv = aligned_alloc(64, rows * sizeof(float) * (heads + 2 * m->kv_heads * m->size));
    c->normed = aligned_alloc(64, rows * sizeof(bf16) * m->hidden);
    c->query = aligned_alloc(64, rows * sizeof(bf16) * heads);
    c->attended = aligned_alloc(64, rows * sizeof(bf16) * heads);
    c->inner = aligned_alloc(64, rows * sizeof(bf16) * m->inner);
    if (!c->qkv || !c->normed || !c->query || !c->attended || !c->inner) return -1;
    c->capacity = rows;
    return 0;
}

Context *outrider_context(int threads) {
    Context *c = calloc(1, sizeof(Context));
    if (!c) return NULL;
    c->team = team_new(threads);
    c->scratch = aligned_alloc(64, sizeof(Scratch) * threads);
    if (c->team && c->scratch) return c;
    if (c->team) team_free(c->team);
    free(c->scratch);
    free(c);
    return NULL;
}

void outrider_context_free(Context *c) {
    team_free(c->team);
    free(c->scratch);
    free(c->panels);
    free(c->qkv);
    free(c->normed);
    free(c->query);
    free(c->attended);
    free(c->inner);
    free(c);
}

/* Layers begin ... end of a step: x [T, C] in and out (embedded first where `embed`), kv written. -1: out of memory. */
int outrider_forward(Context *c, const Model *m, const Layer *layers, const Batch *batch, float *x, bf16 *kv, int64_t kv_stride,
                     int begin, int end, int embed) {
    if (batch->T < 1) return 0;
    if (reserve(c, m, batch->T)) return -1;
    int64_t *items = malloc(sizeof(int64_t) * (batch->B + 1));
    if (!items) return -1;
    Attention a = {kv, m->heads, m->kv_heads, m->size, m->block, m->window, m->scale};
    /* Rows attended together share their keys' way through the cache; too few items leave members idle. */
    int rows = attention_rows(&a);
    items[0] = 0;
    for (;; rows = (rows + 1) / 2) {
        for (int b = 0; b < batch->B; b++)
            items[b + 1] = items[b] + (int64_t)((batch->first[b + 1] - batch->first[b] + rows - 1) / rows) * m->kv_heads;
        if (rows == 1 || items[batch->B] >= 3 * c->team->size) break;
    }
    c->model = *m;
    c->forward = (Forward){m, layers, batch, x, kv, kv_stride, batch->T, begin, end, embed, rows, items, (int)items[batch->B]};
    team_run(c->team, forward_job, c);
    free(items);
    return 0;
}

static void logits_job(Place *place, void *argument) {
    Context *c = argument;
    const Logits *l = &c->logits;
    const Model *m = &c->model;
    const int count = l->count;
    EACH_ROW(place, count, row) norm_row(l->x + l->rows[row] * m->hidden, m->norm, c->normed + (long)row * m->hidden, m->hidden, m->eps);
    team_next(place, count);
    linear_phase(place, &(Linear){c->normed, m->head, NULL, l->logits, STORE, count, m->vocab, m->hidden, c->panels, l->peaks});
}

/* logits [count, V] float of rows [count] of x [., C], and the largest of each panel of them. */
int outrider_logits(Context *c, const Model *m, const float *x, const int64_t *rows, int count, float *logits, float *peaks) {
    if (count < 1) return 0;
    if (reserve(c, m, count)) return -1;
    c->model = *m;
    c->logits = (Logits){m, x, rows, logits, peaks, count};
    team_run(c->team, logits_job, c);
    return 0;
}

/* Slot `pairs[2 i]` of every layer to slot `pairs[2 i + 1]`, one after the other; kv [layers, blocks, 2, K, block, D]. */
void outrider_move(uint16_t *kv, int layers, int64_t stride, int heads, int block, int size, const int64_t *pairs, int count) {
    const int64_t part = (int64_t)block * size, whole = 2 * heads * part;
    const int parts = 2 * heads * layers, bytes = size * sizeof(*kv);
#define ROW_AT(slot, i) (kv + (i) / (2 * heads) * stride + (slot) / block * whole + (i) % (2 * heads) * part + (slot) % block * size)
    for (int pair = 0; pair < count; pair++) { /* all of it is far away: ask for it before it is needed */
        for (int i = 0; i < parts; i++) {
            _mm_prefetch((const char *)ROW_AT(pairs[2 * pair], i), _MM_HINT_T0);
            _mm_prefetch((const char *)ROW_AT(pairs[2 * pair + 1], i), _MM_HINT_T0);
        }
        for (int i = 0; i < parts; i++) memcpy(ROW_AT(pairs[2 * pair + 1], i), ROW_AT(pairs[2 * pair], i), bytes);
    }
#undef ROW_AT
}

/* weight [N, K] bf16 -> panels; `other` [N, K]: panels of 16 rows of weight and 16 of other, [2 N, K] in all. K even. */
void outrider_pack(const bf16 *weight, const bf16 *other, bf16 *panels, int N, int K) {
    const int rows = other ? PANEL / 2 : PANEL, pairs = K / 2;
    for (int n = 0; n < N; n += rows)
        for (int half = 0; half < 2; half++) {
            const bf16 *from = other && half ? other : weight;
            const int first = n + (other ? 0 : 16 * half);
            __m512i *to = (__m512i *)(panels + (long)(n / rows) * PANEL * K) + half;
            for (int k = 0; k < pairs; k += 16) {
                const __mmask16 present = first_lanes(pairs - k);
                __m512i block[16];
                for (int i = 0; i < 16; i++)
                    block[i] = first + i < N ? _mm512_maskz_loadu_epi32(present, from + (long)(first + i) * K + 2 * k) : _mm512_setzero_si512();
                transpose16(block);
                for (int i = 0; i < 16 && k + i < pairs; i++) _mm512_storeu_si512(to + 2 * (k + i), block[i]);
            }
        }
}

/* The parts, for tests against their twins. */
static void linear_job(Place *place, void *argument) { linear_phase(place, &((Context *)argument)->linear); }

/* -1: out of memory. */
int outrider_linear(Context *c, const bf16 *x, const Weight *w, const float *bias, void *out, int sink, int M, int N, int K) {
    if (reserve_panels(c, K)) return -1;
    c->linear = (Linear){x, *w, bias, out, (Sink)sink, M, N, K, c->panels, NULL};
    team_run(c->team, linear_job, c);
    return 0;
}

static void attend_job(Place *place, void *argument) {
    Context *c = argument;
    const Attend *t = &c->attend;
    const int B = t->B;
    for (int b; (b = team_take(place, B, 1)) >= 0; team_finish(place, B, b, 1)) {
        const int rows = attention_rows(&t->a), total = t->batch->first[b + 1] - t->batch->first[b];
        for (int head = 0; head < t->a.kv_heads; head++)
            for (int row = 0; row < total; row += rows)
                attend(&t->a, t->batch, c->scratch + place->member, t->q, t->out, b, head, row, total - row < rows ? total - row : rows);
    }
    team_next(place, B);
}

void outrider_attention(Context *c, const Attention *a, const Batch *batch, const bf16 *q, bf16 *out) {
    c->attend = (Attend){*a, batch, q, out, batch->B};
    team_run(c->team, attend_job, c);
}
