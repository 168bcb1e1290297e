/* A team of threads that works through one job together: the caller is member 0.
 *
 * A job is a row of phases, a decode step some 240 of 5 to 100 microseconds. A phase has items that members take and finish;
 * it is over when all its items are finished, whoever did them. So nobody waits for a member that is not there: on a
 * small machine another process often has its core, and a barrier that waits for everybody makes a step five times as long.
 * A member that comes late runs past the phases that are over and joins the one that is not.
 *
 * Whoever has to wait spins for some ten microseconds and then sleeps.
 */
#pragma once
#include <immintrin.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SPINS = 4000 }; /* pauses, 10 to 40 ns each */

typedef struct Team Team;

/* A member's place in the job. */
typedef struct {
    Team *team;
    int member;
    uint32_t phase;
} Place;

/* What `argument` points to must stay readable after the job: a late member may still look at it, though it takes no item. */
typedef void (*Job)(Place *place, void *argument);

struct Team {
    int size;
    pthread_t *threads;
    Job job;
    void *argument;
    uint32_t first; /* phase of the job */
    _Alignas(64) atomic_int generation; /* of jobs; negative: leave */
    atomic_int sleepers;
    _Alignas(64) _Atomic uint64_t ticket; /* phase << 32 | next item */
    atomic_int dozing; /* members asleep until the next phase */
    _Alignas(64) atomic_int finished; /* items of this phase */
};

static inline void team_futex(void *word, int operation, int value) {
    syscall(SYS_futex, word, operation | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0);
}

static inline int *team_phase_word(Team *team) { return (int *)&team->ticket + 1; } /* little endian */

/* Up to `count` of the phase's items: the index of the first, or -1 when none is left. What was taken must be finished. */
static inline int team_take(Place *place, int total, int count) {
    Team *team = place->team;
    uint64_t ticket = atomic_load_explicit(&team->ticket, memory_order_acquire);
    while ((uint32_t)(ticket >> 32) == place->phase && (int)(uint32_t)ticket < total) {
        if (atomic_compare_exchange_weak_explicit(&team->ticket, &ticket, ticket + count, memory_order_acq_rel, memory_order_acquire))
            return (int)(uint32_t)ticket;
    }
    return -1;
}

/* Items first ... first + count (no more than the phase has) are done. */
static inline void team_finish(Place *place, int total, int first, int count) {
    Team *team = place->team;
    if (first + count > total) count = total - first;
    if (atomic_fetch_add_explicit(&team->finished, count, memory_order_acq_rel) + count != total) return;
    atomic_store_explicit(&team->finished, 0, memory_order_relaxed);
    atomic_store(&team->ticket, (uint64_t)(place->phase + 1) << 32);
    if (atomic_load(&team->dozing)) team_futex(team_phase_word(team), FUTEX_WAKE, INT_MAX);
}

/* To the next phase, when this one is over. A phase without items is none. */
static inline void team_next(Place *place, int total) {
    Team *team = place->team;
    if (total <= 0) return;
    uint32_t phase = place->phase++;
    for (int spins = 0; (uint32_t)(atomic_load_explicit(&team->ticket, memory_order_acquire) >> 32) == phase; spins++) {
        if (spins < SPINS) {
            _mm_pause();
            continue;
        }
        atomic_fetch_add(&team->dozing, 1);
        team_futex(team_phase_word(team), FUTEX_WAIT, (int)phase);
        atomic_fetch_sub(&team->dozing, 1);
    }
}

typedef struct {
    Team *team;
    int member;
} Member;

static void *team_main(void *pointer) {
    Member self = *(Member *)pointer;
    Team *team = self.team;
    free(pointer);
    int done = 0;
    for (;;) {
        int spins = 0, generation;
        while ((generation = atomic_load_explicit(&team->generation, memory_order_acquire)) == done || !generation) {
            if (++spins < SPINS || generation != done) {
                _mm_pause();
                continue;
            }
            atomic_fetch_add(&team->sleepers, 1);
            if (atomic_load(&team->generation) == done) team_futex(&team->generation, FUTEX_WAIT, done);
            atomic_fetch_sub(&team->sleepers, 1);
        }
        if (generation < 0) return NULL;
        Job job = team->job;
        void *argument = team->argument;
        Place place = {team, self.member, team->first};
        atomic_thread_fence(memory_order_acquire);
        if (atomic_load(&team->generation) != generation) continue; /* the next job is being put in its place */
        done = generation;
        job(&place, argument);
    }
}

/* Returns when the job is done; a late member may still be on its way through it. */
static void team_run(Team *team, Job job, void *argument) {
    Place place = {team, 0, (uint32_t)(atomic_load(&team->ticket) >> 32)};
    if (team->size > 1) {
        int generation = atomic_load(&team->generation);
        /* 0 while it is being written: nobody takes half a job. */
        atomic_store(&team->generation, 0);
        team->job = job;
        team->argument = argument;
        team->first = place.phase;
        atomic_store(&team->generation, generation == INT_MAX ? 1 : generation + 1);
        if (atomic_load(&team->sleepers)) team_futex(&team->generation, FUTEX_WAKE, INT_MAX);
    }
    job(&place, argument);
}

static Team *team_new(int size) {
    Team *team = aligned_alloc(64, sizeof(Team));
    if (!team) return NULL;
    team->size = size;
    team->threads = calloc(size, sizeof(pthread_t));
    atomic_init(&team->generation, 0);
    atomic_init(&team->sleepers, 0);
    atomic_init(&team->ticket, 0);
    atomic_init(&team->dozing, 0);
    atomic_init(&team->finished, 0);
    for (int i = 1; i < size; i++) {
        Member *member = malloc(sizeof(Member));
        *member = (Member){team, i};
        if (pthread_create(&team->threads[i], NULL, team_main, member)) {
            free(member);
            team->size = i; /* fewer members do the same work */
            break;
        }
    }
    return team;
}

static void team_free(Team *team) {
    atomic_store(&team->generation, -1);
    team_futex(&team->generation, FUTEX_WAKE, INT_MAX);
    for (int i = 1; i < team->size; i++) pthread_join(team->threads[i], NULL);
    free(team->threads);
    free(team);
}
