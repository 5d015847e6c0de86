# core.mk - the C core as one static library, compiled from sources.txt, for the Makefiles of tests and examples.
#
# CORE_LIB     the library, if there is one already: what setup.py left in build/core, for example
# CORE_BUILD   else where it is built: one place for all of them, so that no file is compiled twice
# CORE_CFLAGS  what it is built with
CORE := $(patsubst %/,%,$(dir $(lastword $(MAKEFILE_LIST))))
CORE_BUILD ?= $(CORE)/../build/make/core
CORE_CFLAGS ?= $(CORE_OPTIMIZE) -g -Wall -Wextra
# What GCC's -O3 does for these kernels, in half its time; -O2 of clang does as much without.
CORE_OPTIMIZE := -O2 $(if $(findstring clang,$(shell $(CC) --version 2>&1)),,-ftree-vectorize \
  -fvect-cost-model=dynamic -fpeel-loops)
CORE_HEADERS := $(wildcard $(CORE)/*.h $(CORE)/*/*.h $(CORE)/*/*.inc)
# No contraction: a fused multiply-add happens where the source says so and nowhere else.
CORE_FLAGS := -std=c11 -fPIC -ffp-contract=off -fno-math-errno -I$(CORE)

ifndef CORE_LIB
override CORE_LIB := $(CORE_BUILD)/libpylora.a
# Kernels take longest: they come first in sources.txt, and so here.
CORE_OBJECTS := $(patsubst %.c,$(CORE_BUILD)/%.o,$(shell cat $(CORE)/sources.txt))

$(CORE_BUILD)/%.o: $(CORE)/%.c $(CORE_HEADERS)
	@mkdir -p $(@D)
	$(CC) $(CORE_FLAGS) $(CORE_CFLAGS) -c $< -o $@

$(CORE_LIB): $(CORE_OBJECTS)
	rm -f $@
	$(AR) rcs $@ $^
endif

.PHONY: core
core: $(CORE_LIB)
