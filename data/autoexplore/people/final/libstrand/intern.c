/* Table of strings that are kept only once. */
#include "internal.h"
#include <string.h>

#define SLOTS 4096
static strand *table[SLOTS];

/* Hash is FNV-1a; SipHash was 3 times slower on the printer. */
static unsigned hash(const char *p, size_t n)
{
    unsigned h = 2166136261u;
    while (n--)
        h = (h ^ (unsigned char)*p++) * 16777619u;
    return h;
}

/* Returns NULL when the table is full. */
strand *strand_intern(const char *bytes, size_t length)
{
    unsigned i = hash(bytes, length) % SLOTS, tries;
    for (tries = 0; tries < SLOTS; tries++, i = (i + 1) % SLOTS) {
        if (!table[i])
            return table[i] = strand_new(bytes, length);
        if (table[i]->length == length && !memcmp(table[i]->start, bytes, length))
            return table[i];
    }
    return 0;
}
