/* Not installed. */
#ifndef STRAND_INTERNAL_H
#define STRAND_INTERNAL_H
#include "strand.h"

struct strand {
    size_t length;
    unsigned refs;
    strand *parent; /* of a slice */
    char *start;
    char small[16];
};
#endif
