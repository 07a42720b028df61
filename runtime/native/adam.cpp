// AdamW over a split master, one pass. The arithmetic is defined in runtime/adam.py: every operation below is one
// rounding, a fused multiply-add is written as one, and the build forbids the compiler to make others
// (-ffp-contract=off). So all paths give the same bits.
//
// No floating-point exception leaves, and flush-to-zero, should the caller have it on, is off while a block runs.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "pool.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#define SLIDETUNE_X86 1
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

struct Coefficients {
  float grad_scale;
  float lerp;
  float beta2;
  float one_minus_beta2;
  float sqrt_correction2;
  float eps;
  float step_size;
  float decay;
  int32_t lerp_from_grad;
};

struct Arrays {
  uint16_t* high;
  int16_t* low;
  float* exp_avg;
  float* exp_avg_sq;
  const void* grad;
  bool grad_is_bf16;
};

constexpr uint32_t kQuietNan = 0x7FC00000u;

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// ---- one element

INLINE float quiet(float x) { return x == x ? x : from_bits(kQuietNan); }

template <bool kGradBf16>
INLINE void element(const Arrays& a, int64_t i, const Coefficients& c) {
  float g = kGradBf16 ? from_bits(uint32_t(static_cast<const uint16_t*>(a.grad)[i]) << 16)
                      : static_cast<const float*>(a.grad)[i];
  g *= c.grad_scale;
  float m = a.exp_avg[i], v = a.exp_avg_sq[i];
  float p = from_bits((uint32_t(a.high[i]) << 16) + uint32_t(int32_t(a.low[i])));
  m = __builtin_fmaf(c.lerp, g - m, c.lerp_from_grad ? g : m);
  v = __builtin_fmaf(c.one_minus_beta2 * g, g, v * c.beta2);
  // The builtin is the one correctly rounded instruction where there is one, else libm's, which is too.
  const float denominator = __builtin_sqrtf(v) / c.sqrt_correction2 + c.eps;
  p = p * c.decay - c.step_size * m / denominator;
  a.exp_avg[i] = quiet(m);
  a.exp_avg_sq[i] = quiet(v);
  const uint32_t bits = to_bits(quiet(p));
  a.high[i] = uint16_t((bits + 0x8000u) >> 16);
  a.low[i] = int16_t(uint16_t(bits));
}

template <bool kGradBf16>
void scalar(const Arrays& a, int64_t begin, int64_t end, const Coefficients& c) {
  for (int64_t i = begin; i < end; ++i) element<kGradBf16>(a, i, c);
}

#if SLIDETUNE_X86

// ---- AVX2: 8 elements at a time

TARGET_AVX2 INLINE __m256 quiet8(__m256 x) {
  const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(int(kQuietNan)));
  return _mm256_blendv_ps(x, nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

TARGET_AVX2 INLINE __m256i widen8(const uint16_t* halves) {
  return _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves))), 16);
}

// The low 16 bits of each lane, whose upper bits are zero.
TARGET_AVX2 INLINE void store_halves8(void* to, __m256i x) {
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storeu_si128(static_cast<__m128i*>(to), packed);
}

template <bool kGradBf16>
TARGET_AVX2 void avx2(const Arrays& a, int64_t begin, int64_t end, const Coefficients& c) {
  const __m256 scale = _mm256_set1_ps(c.grad_scale), lerp = _mm256_set1_ps(c.lerp), beta2 = _mm256_set1_ps(c.beta2),
               rest2 = _mm256_set1_ps(c.one_minus_beta2), correction = _mm256_set1_ps(c.sqrt_correction2),
               eps = _mm256_set1_ps(c.eps), rate = _mm256_set1_ps(c.step_size), decay = _mm256_set1_ps(c.decay);
  int64_t i = begin;
  for (; i + 8 <= end; i += 8) {
    __m256 g = kGradBf16 ? _mm256_castsi256_ps(widen8(static_cast<const uint16_t*>(a.grad) + i))
                         : _mm256_loadu_ps(static_cast<const float*>(a.grad) + i);
    g = _mm256_mul_ps(g, scale);
    __m256 m = _mm256_loadu_ps(a.exp_avg + i), v = _mm256_loadu_ps(a.exp_avg_sq + i);
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a.low + i));
    __m256i bits = _mm256_add_epi32(widen8(a.high + i), _mm256_cvtepi16_epi32(low));
    __m256 p = _mm256_castsi256_ps(bits);
    m = _mm256_fmadd_ps(lerp, _mm256_sub_ps(g, m), c.lerp_from_grad ? g : m);
    v = _mm256_fmadd_ps(_mm256_mul_ps(rest2, g), g, _mm256_mul_ps(v, beta2));
    const __m256 denominator = _mm256_add_ps(_mm256_div_ps(_mm256_sqrt_ps(v), correction), eps);
    p = _mm256_sub_ps(_mm256_mul_ps(p, decay), _mm256_div_ps(_mm256_mul_ps(rate, m), denominator));
    _mm256_storeu_ps(a.exp_avg + i, quiet8(m));
    _mm256_storeu_ps(a.exp_avg_sq + i, quiet8(v));
    bits = _mm256_castps_si256(quiet8(p));
    store_halves8(a.high + i, _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x8000)), 16));
    store_halves8(a.low + i, _mm256_and_si256(bits, _mm256_set1_epi32(0xFFFF)));
  }
  for (; i < end; ++i) element<kGradBf16>(a, i, c);
}

// ---- AVX-512: 16 elements at a time, the last ones under a mask

TARGET_AVX512 INLINE __m512 quiet16(__m512 x) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x,
                              _mm512_castsi512_ps(_mm512_set1_epi32(int(kQuietNan))));
}

TARGET_AVX512 INLINE __m512i widen16(__mmask16 some, const uint16_t* halves) {
  return _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, halves)), 16);
}

template <bool kGradBf16>
TARGET_AVX512 void avx512(const Arrays& a, int64_t begin, int64_t end, const Coefficients& c) {
  const __m512 scale = _mm512_set1_ps(c.grad_scale), lerp = _mm512_set1_ps(c.lerp), beta2 = _mm512_set1_ps(c.beta2),
               rest2 = _mm512_set1_ps(c.one_minus_beta2), correction = _mm512_set1_ps(c.sqrt_correction2),
               eps = _mm512_set1_ps(c.eps), rate = _mm512_set1_ps(c.step_size), decay = _mm512_set1_ps(c.decay);
  for (int64_t i = begin; i < end; i += 16) {
    const __mmask16 some = end - i >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (end - i)) - 1);
    __m512 g = kGradBf16 ? _mm512_castsi512_ps(widen16(some, static_cast<const uint16_t*>(a.grad) + i))
                         : _mm512_maskz_loadu_ps(some, static_cast<const float*>(a.grad) + i);
    g = _mm512_mul_ps(g, scale);
    __m512 m = _mm512_maskz_loadu_ps(some, a.exp_avg + i), v = _mm512_maskz_loadu_ps(some, a.exp_avg_sq + i);
    const __m512i low = _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(some, a.low + i));
    __m512i bits = _mm512_add_epi32(widen16(some, a.high + i), low);
    __m512 p = _mm512_castsi512_ps(bits);
    m = _mm512_fmadd_ps(lerp, _mm512_sub_ps(g, m), c.lerp_from_grad ? g : m);
    v = _mm512_fmadd_ps(_mm512_mul_ps(rest2, g), g, _mm512_mul_ps(v, beta2));
    const __m512 denominator = _mm512_add_ps(_mm512_div_ps(_mm512_sqrt_ps(v), correction), eps);
    p = _mm512_sub_ps(_mm512_mul_ps(p, decay), _mm512_div_ps(_mm512_mul_ps(rate, m), denominator));
    _mm512_mask_storeu_ps(a.exp_avg + i, some, quiet16(m));
    _mm512_mask_storeu_ps(a.exp_avg_sq + i, some, quiet16(v));
    bits = _mm512_castps_si512(quiet16(p));
    const __m512i high = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x8000)), 16);
    _mm256_mask_storeu_epi16(a.high + i, some, _mm512_cvtepi32_epi16(high));
    _mm256_mask_storeu_epi16(a.low + i, some, _mm512_cvtepi32_epi16(bits));
  }
}

#endif

using Kernel = void (*)(const Arrays&, int64_t, int64_t, const Coefficients&);

enum Path : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

Kernel kernel_of(int path, bool grad_is_bf16) {
#if SLIDETUNE_X86
  if (path == kAvx512) return grad_is_bf16 ? avx512<true> : avx512<false>;
  if (path == kAvx2) return grad_is_bf16 ? avx2<true> : avx2<false>;
#endif
  return grad_is_bf16 ? scalar<true> : scalar<false>;
}

// Gradual underflow, rounding to nearest: whatever mode the calling thread, or the one that started the pool, is in.
class PlainFloatingPoint {
#if SLIDETUNE_X86
 public:
  PlainFloatingPoint() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~PlainFloatingPoint() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
 public:
  PlainFloatingPoint() {}
#endif
};

constexpr int64_t kBlock = 32768;

}  // namespace

extern "C" {

// The best path this CPU has; all below it work as well.
int slidetune_adam_best_path() {
#if SLIDETUNE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kScalar;
}

void slidetune_adam_step(int path, int threads, int64_t count, uint16_t* high, int16_t* low, float* exp_avg,
                         float* exp_avg_sq, const void* grad, int grad_is_bf16, const Coefficients* coefficients) {
  const Arrays arrays{high, low, exp_avg, exp_avg_sq, grad, grad_is_bf16 != 0};
  const Kernel kernel = kernel_of(path, arrays.grad_is_bf16);
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  slidetune::Pool::shared().run(threads < blocks ? threads : int(blocks), blocks, [&](int64_t block) {
    const PlainFloatingPoint mode;
    const int64_t begin = block * kBlock, end = begin + kBlock;
    kernel(arrays, begin, end < count ? end : count, *coefficients);
  });
}

}  // extern "C"
