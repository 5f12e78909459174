#include "internal.h"
#include <stdlib.h>

/* Negative positions count from the end, as in Python. */
static long place(const strand *s, long i)
{
    return i < 0 ? i + (long)s->length : i;
}

/* A slice of a slice points at the first parent, so chains never get long. */
strand *strand_slice(strand *s, long from, long to)
{
    strand *root = s->parent ? s->parent : s, *made;
    from = place(s, from);
    to = place(s, to);
    if (from < 0 || from > to || to > (long)s->length)
        return 0;
    made = calloc(1, sizeof *made);
    if (!made)
        return 0;
    root->refs++;
    made->refs = 1;
    made->parent = root;
    made->start = s->start + from;
    made->length = (size_t)(to - from);
    return made;
}
