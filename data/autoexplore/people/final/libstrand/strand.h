/* Public interface. Everything else may change. */
#ifndef STRAND_H
#define STRAND_H
#include <stddef.h>

typedef struct strand strand;

/* Returns NULL when memory is short; never aborts. */
strand *strand_new(const char *bytes, size_t length);

/* Slices share memory with their parent. */
strand *strand_slice(strand *s, long from, long to);

/* The one copy of a text, for comparing pointers. */
strand *strand_intern(const char *bytes, size_t length);

size_t strand_length(const strand *s);
const char *strand_bytes(const strand *s);
void strand_free(strand *s);
#endif
