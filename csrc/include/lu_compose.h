// W = P (L + I) (U + diag(s)), W^-1 and the sum of log|s| for a stack of matrices, and their gradients, to every
// kernel. All of it is computed in double whatever the storage.
#pragma once

#include "lu.h"

namespace nf {

// Row i of P A is row permutation[i] of A. Of lower and upper only the strict triangles are read.
struct LUFactors {
  DType data;                  // f32 or f64: of all tensors here and below
  int64_t count, channels;     // K, C
  const void* lower;           // [K, C, C]
  const void* upper;           // [K, C, C]
  const void* log_s;           // [K, C], the diagonal's raw parameter
  const void* sign;            // [K, C] of +-1, or null for +1
  const int64_t* permutation;  // [K, C], or null for none
  Diagonal diagonal;
  double eps;
  const int64_t* columns = nullptr;  // [C]: the product begins with x[columns]; CPU's lu_linear kernels alone
};

struct LUComposeForward {
  LUFactors lu;
  void* weight;   // [K, C, C], or null: not wanted
  void* inverse;  // [K, C, C], or null: not wanted
  void* logdet;   // [1], over all K; or null: not wanted
};

struct LUComposeBackward {
  LUFactors lu;
  const void* inverse;   // W^-1 as the forward gave it; read where there is a dinverse
  const void* dweight;   // [K, C, C] or null
  const void* dinverse;  // [K, C, C] or null
  const void* dlogdet;   // [1] or null
  void* dlower;          // [K, C, C], zero on and above the diagonal
  void* dupper;          // [K, C, C], zero on and below it
  void* dlog_s;          // [K, C]
};

}  // namespace nf
