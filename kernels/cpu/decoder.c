/* The Llama family's decoder for a CPU with AVX512-BF16: one call runs a range of layers for a whole step.
 *
 * The residual stream is float32, what enters a product is rounded to bf16, sums are float32. Every row's result is the same
 * bits whatever shares the step: see linear.h and attention.h.
 */
#include <stddef.h>
#include "attention.h"
#include "linear.h"

typedef struct {
    const float *input_norm, *post_norm; /* [C] */
    const float *q_norm, *k_norm; /* [D] or NULL */
    const bf16 *qkv, *out, *gate_up, *down; /* packed; gate_up in panels of 16 gates and their 16 ups */
    const float *qkv_bias, *out_bias, *gate_up_bias, *down_bias; /* or NULL */
} Layer;

typedef struct {
    int hidden, heads, kv_heads, size, inner, vocab;
    float eps;
    const float *cos, *sin; /* [positions, D / 2] */
    const bf16 *head; /* packed [vocab, hidden] */
    const bf16 *embedding; /* [vocab, hidden] row by row, or NULL: read from the head's panels */
    const float *norm; /* [C] */
    int window, block;
    float scale;
} Model;

typedef struct {
    Team *team;
    int capacity; /* rows that the buffers hold */
    float *qkv;
    bf16 *normed, *query, *attended, *inner;
    Scratch *scratch; /* one for each member */
} Context;

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
    const uint32_t *panel = (const uint32_t *)(m->head + (long)(token / PANEL) * PANEL * m->hidden) + token % PANEL;
    for (int k = 0; k < m->hidden / 2; k++) {
        uint32_t pair = panel[(long)k * PANEL], low = pair << 16, high = pair & 0xffff0000u;
        memcpy(x + 2 * k, &low, 4);
        memcpy(x + 2 * k + 1, &high, 4);
    }
}

typedef struct {
    Context *context;
    const Model *model;
    const Layer *layers;
    const Batch *batch;
    float *x; /* [T, C] */
    bf16 *kv; /* the first layer's cache */
    int64_t kv_stride; /* elements from one layer to the next */
    int begin, end, embed;
    int rows; /* of one sequence, attended together */
    int64_t *items; /* first attention item of each sequence [B + 1] */
} Forward;

static inline void rows_norm(Team *team, const Forward *f, const float *weight) {
    const int C = f->model->hidden, T = f->batch->T;
    for (int row; (row = team_take(team, 1)) < T;)
        norm_row(f->x + (long)row * C, weight, f->context->normed + (long)row * C, C, f->model->eps);
    team_barrier(team);
}

static void rows_attend(Team *team, const Forward *f, const Attention *a, Scratch *scratch) {
    const Batch *batch = f->batch;
    const int rows = f->rows;
    const int64_t total = f->items[batch->B];
    for (int64_t item; (item = team_take(team, 1)) < total;) {
        int low = 0, high = batch->B;
        while (high - low > 1) {
            int middle = (low + high) / 2;
            if (f->items[middle] <= item) low = middle;
            else high = middle;
        }
        int64_t rest = item - f->items[low];
        int head = rest % a->kv_heads, row = rest / a->kv_heads * rows;
        int count = batch->first[low + 1] - batch->first[low] - row;
        attend(a, batch, scratch, f->context->query, f->context->attended, low, head, row, count < rows ? count : rows);
    }
    team_barrier(team);
}

static void forward_job(Team *team, int member, void *argument) {
    const Forward *f = argument;
    const Model *m = f->model;
    const Batch *batch = f->batch;
    Context *c = f->context;
    const int T = batch->T, width = (m->heads + 2 * m->kv_heads) * m->size;
    if (f->embed) {
        for (int row; (row = team_take(team, 1)) < T;) embed_row(m, batch->tokens[row], f->x + (long)row * m->hidden);
        team_barrier(team);
    }
    for (int i = f->begin; i < f->end; i++) {
        const Layer *layer = f->layers + i;
        Attention a = {f->kv + i * f->kv_stride, m->heads, m->kv_heads, m->size, m->block, m->window, m->scale};
        rows_norm(team, f, layer->input_norm);
        linear_work(team, &(Linear){c->normed, layer->qkv, layer->qkv_bias, c->qkv, STORE, T, width, m->hidden});
        team_barrier(team);
        for (int row; (row = team_take(team, 1)) < T;) place_row(m, &a, layer, batch, c->qkv, c->query, row);
        team_barrier(team);
        rows_attend(team, f, &a, c->scratch + member);
        linear_work(team, &(Linear){c->attended, layer->out, layer->out_bias, f->x, ADD, T, m->hidden, m->heads * m->size});
        team_barrier(team);
        rows_norm(team, f, layer->post_norm);
        linear_work(team, &(Linear){c->normed, layer->gate_up, layer->gate_up_bias, c->inner, SILU_MUL, T, 2 * m->inner, m->hidden});
        team_barrier(team);
        linear_work(team, &(Linear){c->inner, layer->down, layer->down_bias, f->x, ADD, T, m->hidden, m->inner});
        team_barrier(team);
    }
}

static int reserve(Context *c, const Model *m, int rows) {
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
    Forward f = {c, m, layers, batch, x, kv, kv_stride, begin, end, embed, rows, items};
    team_run(c->team, forward_job, &f);
    free(items);
    return 0;
}

typedef struct {
    Context *context;
    const Model *model;
    const float *x;
    const int64_t *rows;
    float *logits;
    int count;
} Logits;

static void logits_job(Team *team, int member, void *argument) {
    const Logits *l = argument;
    const Model *m = l->model;
    (void)member;
    for (int row; (row = team_take(team, 1)) < l->count;)
        norm_row(l->x + l->rows[row] * m->hidden, m->norm, l->context->normed + (long)row * m->hidden, m->hidden, m->eps);
    team_barrier(team);
    linear_work(team, &(Linear){l->context->normed, m->head, NULL, l->logits, STORE, l->count, m->vocab, m->hidden});
}

/* logits [count, V] float of rows [count] of x [., C]. */
int outrider_logits(Context *c, const Model *m, const float *x, const int64_t *rows, int count, float *logits) {
    if (reserve(c, m, count)) return -1;
    Logits l = {c, m, x, rows, logits, count};
    team_run(c->team, logits_job, &l);
    return 0;
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
static void linear_job(Team *team, int member, void *argument) {
    (void)member;
    linear_work(team, argument);
}

void outrider_linear(Context *c, const bf16 *x, const bf16 *w, const float *bias, void *out, int sink, int M, int N, int K) {
    Linear l = {x, w, bias, out, (Sink)sink, M, N, K};
    team_run(c->team, linear_job, &l);
}

typedef struct {
    Context *context;
    const Attention *a;
    const Batch *batch;
    const bf16 *q;
    bf16 *out;
} Attend;

static void attend_job(Team *team, int member, void *argument) {
    const Attend *t = argument;
    const int rows = attention_rows(t->a);
    for (int b = 0; b < t->batch->B; b++)
        for (int row = 0; row < t->batch->first[b + 1] - t->batch->first[b]; row += rows)
            for (int head = 0; head < t->a->kv_heads; head++)
                if ((b + row / rows + head) % team->size == member) {
                    int count = t->batch->first[b + 1] - t->batch->first[b] - row;
                    attend(t->a, t->batch, t->context->scratch + member, t->q, t->out, b, head, row, count < rows ? count : rows);
                }
}

void outrider_attention(Context *c, const Attention *a, const Batch *batch, const bf16 *q, bf16 *out) {
    Attend t = {c, a, batch, q, out};
    team_run(c->team, attend_job, &t);
}
