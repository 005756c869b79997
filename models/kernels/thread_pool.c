/* A loop shared with helper threads, of which none is waited for that has taken nothing.
 *
 * OpenMP's barrier waits for every thread of the team: where another process wants a core, each of
 * the 150 loops of a decode step then waits for a time slice (measured beside one busy process on a
 * guest with 2 cores, November 2026: 3 tokens per second instead of 66). Here the caller claims items
 * like everybody else, and a helper that has no core is not missed.
 *
 * One loop runs at a time. `claim` holds the loop's generation and its next item in one word:
 *
 *     caller  claim = closed; body, argument, items, k, done = 0; claim = (generation, 0); wake
 *     anyone  (generation, n) -> (generation, n + k) by compare-and-swap, runs k items, done += k
 *     caller  claims until there is none, then waits for done == items
 *
 * A late helper may read fields of a later loop than the generation it woke for. It saw them after
 * the caller had closed the claim, so its compare-and-swap finds another generation and it goes back
 * to sleep. A second caller at the same time runs its loop alone. A child after fork() has no helpers
 * and starts its own; a loop that another thread was in at that moment is none of theirs.
 */
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_HELPERS 255
#define CLAIMS 4 /* of each thread in a loop: more share better, but cost 0.2 us each */
#define SPIN_NANOSECONDS 100000 /* about twice the gap between two loops of a step */

typedef void Body(void *argument, int64_t item);

static pthread_mutex_t pool_in_use = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t pool_prepared = PTHREAD_ONCE_INIT;
static int pool_helpers; /* threads that exist */
static Body *_Atomic pool_body;
static void *_Atomic pool_argument;
static _Atomic uint32_t pool_items, pool_step, pool_wanted;
/* What the loop after this one will read: a helper with nothing to do fetches it meanwhile. */
static const char *_Atomic pool_ahead;
static _Atomic int64_t pool_ahead_bytes;
/* Each on a cache line of its own: helpers look at the first while others write the last two. */
static _Alignas(64) _Atomic uint32_t pool_generation;
static _Alignas(64) _Atomic uint32_t pool_sleeping;
static _Alignas(64) _Atomic uint64_t pool_claim;
static _Alignas(64) _Atomic uint32_t pool_done;

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Take items of loop *generation* until there is none left. */
static void pool_help(uint32_t generation) {
    Body *body = atomic_load(&pool_body);
    void *argument = atomic_load(&pool_argument);
    const uint32_t items = atomic_load(&pool_items), step = atomic_load(&pool_step);
    for (;;) {
        uint64_t claim = atomic_load(&pool_claim);
        const uint32_t first = (uint32_t)claim, left = items - first;
        if (claim >> 32 != generation || first >= items) return;
        const uint32_t count = left < step ? left : step;
        if (!atomic_compare_exchange_weak(&pool_claim, &claim, claim + count)) continue;
        for (uint32_t item = first; item < first + count; item++) body(argument, item);
        atomic_fetch_add(&pool_done, count);
    }
}

/* Fetch what is said to be read next, until the generation is another than *seen*. */
static void pool_fetch_ahead(uint32_t seen) {
    const char *at = atomic_load(&pool_ahead), *end = at + atomic_load(&pool_ahead_bytes);
    for (; at < end && atomic_load(&pool_generation) == seen; at += 256)
        for (int line = 0; line < 4; line++) __builtin_prefetch(at + 64 * line, 0, 2);
}

/* Wait until the generation is another than *seen*: awake for a moment, then asleep. */
static uint32_t pool_wait(uint32_t seen) {
    pool_fetch_ahead(seen);
    const int64_t until = nanoseconds() + SPIN_NANOSECONDS;
    for (;;) {
        for (int i = 0; i < 64; i++, relax())
            if (atomic_load(&pool_generation) != seen) return atomic_load(&pool_generation);
        if (nanoseconds() < until) continue;
        atomic_fetch_add(&pool_sleeping, 1);
        syscall(SYS_futex, &pool_generation, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
        atomic_fetch_sub(&pool_sleeping, 1);
    }
}

static void *pool_helper(void *number) {
    uint32_t seen = 0;
    for (;;) {
        seen = pool_wait(seen);
        if ((uintptr_t)number < atomic_load(&pool_wanted)) pool_help(seen);
    }
    return NULL;
}

static void pool_forget(void) {
    pool_helpers = 0;
    atomic_store(&pool_claim, UINT32_MAX); /* closed */
    atomic_store(&pool_sleeping, 0);
    pthread_mutex_init(&pool_in_use, NULL);
}

static void pool_prepare(void) { pthread_atfork(NULL, NULL, pool_forget); }

/* Have *wanted* helpers, or as many as the system gives; signals stay with the program's threads. */
static void pool_grow(int wanted) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool_helpers < wanted && pool_helpers < MAX_HELPERS) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, pool_helper, (void *)(uintptr_t)pool_helpers)) break;
        pthread_detach(thread);
        pool_helpers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* body(argument, item) for every item, in any order, on up to *threads* threads. */
static void for_each(int threads, int64_t items, Body *body, void *argument) {
    pthread_once(&pool_prepared, pool_prepare);
    if (threads < 2 || items < 2 || pthread_mutex_trylock(&pool_in_use)) {
        for (int64_t item = 0; item < items; item++) body(argument, item);
        return;
    }
    if (pool_helpers < threads - 1) pool_grow(threads - 1);
    const uint32_t generation = atomic_load(&pool_generation) + 1;
    atomic_store(&pool_claim, (uint64_t)generation << 32 | UINT32_MAX); /* closed */
    atomic_store(&pool_body, body);
    atomic_store(&pool_argument, argument);
    atomic_store(&pool_items, (uint32_t)items);
    atomic_store(&pool_step, (uint32_t)(items / (threads * CLAIMS) + 1));
    atomic_store(&pool_wanted, (uint32_t)(threads - 1));
    atomic_store(&pool_done, 0);
    atomic_store(&pool_claim, (uint64_t)generation << 32);
    atomic_store(&pool_generation, generation);
    if (atomic_load(&pool_sleeping))
        syscall(SYS_futex, &pool_generation, FUTEX_WAKE_PRIVATE, threads - 1, NULL, NULL, 0);
    pool_help(generation);
    for (int i = 0; atomic_load(&pool_done) != (uint32_t)items; i++)
        if (i < 1000) relax();
        else sched_yield();
    pthread_mutex_unlock(&pool_in_use);
}
