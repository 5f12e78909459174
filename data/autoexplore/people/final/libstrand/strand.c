#include "internal.h"
#include <stdlib.h>
#include <string.h>

/* Up to 15 bytes live inside the struct, longer ones on the heap. */
strand *strand_new(const char *bytes, size_t length)
{
    strand *s = calloc(1, sizeof *s);
    if (!s)
        return 0;
    s->refs = 1;
    s->length = length;
    s->start = length < sizeof s->small ? s->small : malloc(length);
    if (!s->start) {
        free(s);
        return 0;
    }
    memcpy(s->start, bytes, length);
    return s;
}

/* Reference counts are not atomic: one thread only. */
void strand_free(strand *s)
{
    if (!s || --s->refs)
        return;
    if (s->parent)
        strand_free(s->parent);
    else if (s->start != s->small)
        free(s->start);
    free(s);
}

size_t strand_length(const strand *s) { return s->length; }
const char *strand_bytes(const strand *s) { return s->start; }
