// SPDX-License-Identifier: Apache-2.0
// REFREEKV_TARGET: the name of the instruction set that a file is compiled for.
//
// Code that depends on the instruction set is in an inline namespace of that name. Objects of one
// program that are compiled for different instruction sets then each have their own functions.
// Otherwise a linker would use the first definition for all.
#pragma once

#if defined(__AVX512F__)
#define REFREEKV_TARGET_VECTORS avx512
#elif defined(__AVX2__)
#define REFREEKV_TARGET_VECTORS avx2
#elif defined(__AVX__)
#define REFREEKV_TARGET_VECTORS avx
#elif defined(__SSE4_2__)
#define REFREEKV_TARGET_VECTORS sse4
#elif defined(__aarch64__)
#define REFREEKV_TARGET_VECTORS neon
#else
#define REFREEKV_TARGET_VECTORS base
#endif

#if defined(__FMA__)
#define REFREEKV_TARGET_FMA _fma
#else
#define REFREEKV_TARGET_FMA
#endif
#if defined(__F16C__) || defined(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC)
#define REFREEKV_TARGET_FP16 _fp16
#else
#define REFREEKV_TARGET_FP16
#endif
// The bf16 dot product has twice the rate of float multiply-adds on AMD's processors, and half of
// it on Intel's (measured on one with AMX). GCC 12 takes Zen 4 for Zen 3.
#if defined(__AVX512BF16__) && !defined(REFREEKV_EIGEN_LANES) && \
    (defined(__znver3__) || defined(__znver4__) || defined(__znver5__))
#define REFREEKV_FAST_BF16 1
#define REFREEKV_TARGET_BF16 _fastbf16
#elif defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define REFREEKV_TARGET_BF16 _bf16
#else
#define REFREEKV_TARGET_BF16
#endif
#if defined(REFREEKV_EIGEN_LANES)
#define REFREEKV_TARGET_LANES _eigen
#else
#define REFREEKV_TARGET_LANES
#endif

#define REFREEKV_JOIN_NAMES(a, b, c, d, e) a##b##c##d##e
#define REFREEKV_JOIN(a, b, c, d, e) REFREEKV_JOIN_NAMES(a, b, c, d, e)
#define REFREEKV_TARGET                                                             \
  REFREEKV_JOIN(REFREEKV_TARGET_VECTORS, REFREEKV_TARGET_FMA, REFREEKV_TARGET_FP16, \
                REFREEKV_TARGET_BF16, REFREEKV_TARGET_LANES)
