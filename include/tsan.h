/* tsan.h - tells the thread sanitizers of gcc 12 and clang 14 what they do not see:
 * pthread_mutex_clocklock() and sem_clockwait(). Without such a sanitizer nothing. */
#ifndef EXTRACT_TSAN_H
#define EXTRACT_TSAN_H

#if defined(__SANITIZE_THREAD__)
#define HAS_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define HAS_TSAN 1
#endif
#endif

#ifdef HAS_TSAN
#include <sanitizer/tsan_interface.h>
#define TSAN_BEFORE_LOCK(mutex) __tsan_mutex_pre_lock((mutex), __tsan_mutex_try_lock)
#define TSAN_AFTER_LOCK(mutex, locked) \
    __tsan_mutex_post_lock((mutex),    \
                           (locked) ? __tsan_mutex_try_lock : __tsan_mutex_try_lock_failed, 0)
#define TSAN_RELEASE(what) __tsan_release(what)
#define TSAN_ACQUIRE(what) __tsan_acquire(what)
#else
#define TSAN_BEFORE_LOCK(mutex) ((void)0)
#define TSAN_AFTER_LOCK(mutex, locked) ((void)0)
#define TSAN_RELEASE(what) ((void)0)
#define TSAN_ACQUIRE(what) ((void)0)
#endif

#endif
