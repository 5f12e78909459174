#!/bin/sh
# Writes config.mk. Only needed on AIX and for 16-bit targets.
printf '#include <stdio.h>\nint main(void){printf("%%d",(int)sizeof(void*));}' > t.c
${CC:-cc} t.c -o t || exit 1
echo "POINTER = $(./t)" > config.mk
rm -f t t.c
