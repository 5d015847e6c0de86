/* cpu/rows_table.h - the entries of the kernel table that work on one row (included in kernels.h). */
