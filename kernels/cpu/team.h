/* A team of threads that works through one job together: the caller is member 0.
 *
 * A decode step has some 240 phases of 5 to 100 microseconds, so members meet at spinning barriers. Whoever waits longer
 * sleeps: another process has the late member's core then, and on a small machine that is likely the one that feeds us.
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

enum { SPINS = 4000 }; /* pauses, 10 to 40 ns each, before a waiting thread sleeps */

typedef struct Team Team;
typedef void (*Job)(Team *team, int member, void *argument);

struct Team {
    int size;
    pthread_t *threads;
    Job job;
    void *argument;
    _Alignas(64) atomic_int generation; /* of jobs; negative: leave */
    atomic_int sleepers;
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_int phase;
    atomic_int dozing; /* members asleep at a barrier */
    _Alignas(64) atomic_int next[2]; /* the shared work counters of even and odd phases */
};

typedef struct {
    Team *team;
    int member;
} Member;

static inline void team_futex(atomic_int *word, int operation, int value) {
    syscall(SYS_futex, (int *)word, operation | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0);
}

/* Everybody arrives before anybody leaves. The last to arrive resets this phase's work counter for the phase after next. */
static inline void team_barrier(Team *team) {
    int phase = atomic_load_explicit(&team->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) == team->size - 1) {
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&team->next[phase & 1], 0, memory_order_relaxed);
        atomic_store(&team->phase, phase + 1);
        if (atomic_load(&team->dozing)) team_futex(&team->phase, FUTEX_WAKE, INT_MAX);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&team->phase, memory_order_acquire) == phase; spins++) {
        if (spins < SPINS) {
            _mm_pause();
            continue;
        }
        atomic_fetch_add(&team->dozing, 1);
        if (atomic_load(&team->phase) == phase) team_futex(&team->phase, FUTEX_WAIT, phase);
        atomic_fetch_sub(&team->dozing, 1);
    }
}

/* The next `count` items of this phase's work: the index of the first. Every phase must end with team_barrier. */
static inline int team_take(Team *team, int count) {
    int phase = atomic_load_explicit(&team->phase, memory_order_relaxed);
    return atomic_fetch_add_explicit(&team->next[phase & 1], count, memory_order_relaxed);
}

static void *team_main(void *pointer) {
    Member self = *(Member *)pointer;
    Team *team = self.team;
    free(pointer);
    int done = 0;
    for (;;) {
        int spins = 0, generation;
        while ((generation = atomic_load_explicit(&team->generation, memory_order_acquire)) == done) {
            if (++spins < SPINS) {
                _mm_pause();
                continue;
            }
            atomic_fetch_add(&team->sleepers, 1);
            if (atomic_load(&team->generation) == done) team_futex(&team->generation, FUTEX_WAIT, done);
            atomic_fetch_sub(&team->sleepers, 1);
        }
        if (generation < 0) return NULL;
        done = generation;
        team->job(team, self.member, team->argument);
        team_barrier(team); /* the caller goes on when all are done */
    }
}

static void team_run(Team *team, Job job, void *argument) {
    if (team->size > 1) {
        team->job = job;
        team->argument = argument;
        int generation = atomic_load_explicit(&team->generation, memory_order_relaxed);
        atomic_store(&team->generation, generation == INT_MAX ? 1 : generation + 1);
        if (atomic_load(&team->sleepers)) team_futex(&team->generation, FUTEX_WAKE, INT_MAX);
    }
    job(team, 0, argument);
    team_barrier(team);
}

static Team *team_new(int size) {
    Team *team = aligned_alloc(64, sizeof(Team));
    if (!team) return NULL;
    team->size = size;
    team->threads = calloc(size, sizeof(pthread_t));
    atomic_init(&team->generation, 0);
    atomic_init(&team->sleepers, 0);
    atomic_init(&team->arrived, 0);
    atomic_init(&team->phase, 0);
    atomic_init(&team->dozing, 0);
    atomic_init(&team->next[0], 0);
    atomic_init(&team->next[1], 0);
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
