#include "../strand.h"
#include <assert.h>
#include <string.h>

int main(void)
{
    strand *s = strand_new("reel of thread", 14), *cut = strand_slice(s, -6, 14);
    assert(strand_length(cut) == 6);
    assert(!memcmp(strand_bytes(cut), "thread", 6));
    assert(!strand_slice(s, 9, 3));
    assert(strand_intern("a", 1) == strand_intern("a", 1));
    strand_free(s);
    strand_free(cut);
    return 0;
}
