// The instruction set this translation unit is compiled for: its name (a namespace) and its vector width.
//
// Code here must not instantiate standard-library templates out of line: the linker would merge, say, an AVX-512 copy
// of std::vector's members into everyone's.
#pragma once

#if defined(__AVX512F__) && defined(__AVX512VL__)
#define NF_ISA avx512
#define NF_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define NF_ISA avx2
#define NF_VECTOR_BYTES 32
#else
#define NF_ISA baseline
#define NF_VECTOR_BYTES 16
#endif

// NF_UNROLL: before a short loop over registers, so that its arrays never become memory. NF_INDEPENDENT: before a loop
// whose iterations share no memory: spares the compiler its alias checks, which it gives up on past ten.
#if defined(__clang__)
#define NF_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#define NF_UNROLL _Pragma("clang loop unroll(full)")
#else
#define NF_INDEPENDENT _Pragma("GCC ivdep")
#define NF_UNROLL _Pragma("GCC unroll 16")
#endif
