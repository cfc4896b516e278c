"""Density estimation on tables: what ``nfkernels train | sample | evaluate`` do with rows and columns of numbers."""
