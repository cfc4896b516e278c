"""`nfkernels demo`: a first look at flows, on densities of the plane and on the lecture's one-dimensional cases."""
