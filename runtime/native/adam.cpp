// AdamW over a split master, one pass. The arithmetic is defined in runtime/adam.py: every operation below is one
// rounding, a fused multiply-add is written as one, and the build forbids the compiler to make others
// (-ffp-contract=off). So all paths give the same bits.
//
// No floating-point exception leaves, and flush-to-zero, should the caller have it on, is off while a block runs.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "halves.hpp"
#include "pool.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#define SLIDETUNE_X86 1
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx2,fma")))
#endif

#define INLINE inline __attribute__((always_inline))

using slidetune::rounded;
using slidetune::widened;

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
// A tie that is rounded down to an even half is marked by the sign of the second moment (split.py).
constexpr uint32_t kSign = 0x80000000u, kTieMask = 0x1FFFFu, kTieDown = 0x8000u;

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
  const uint32_t signed_v = to_bits(a.exp_avg_sq[i]);
  float m = a.exp_avg[i], v = from_bits(signed_v & ~kSign);
  float p = from_bits((uint32_t(a.high[i]) << 16) + uint32_t(int32_t(a.low[i])) + ((signed_v >> 31) << 16));
  m = __builtin_fmaf(c.lerp, g - m, c.lerp_from_grad ? g : m);
  v = __builtin_fmaf(c.one_minus_beta2 * g, g, v * c.beta2);
  // The builtin is the one correctly rounded instruction where there is one, else libm's, which is too.
  const float denominator = __builtin_sqrtf(v) / c.sqrt_correction2 + c.eps;
  p = p * c.decay - c.step_size * m / denominator;
  a.exp_avg[i] = quiet(m);
  const uint32_t bits = to_bits(quiet(p));
  a.exp_avg_sq[i] = from_bits(to_bits(quiet(v)) | ((bits & kTieMask) == kTieDown ? kSign : 0u));
  a.high[i] = uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
  a.low[i] = int16_t(uint16_t(bits));
}

template <bool kGradBf16>
void scalar(const Arrays& a, int64_t begin, int64_t end, const Coefficients& c) {
  for (int64_t i = begin; i < end; ++i) element<kGradBf16>(a, i, c);
}

#if SLIDETUNE_X86

// Both wide paths take as many elements at a time as 16-bit numbers fill a register, as two registers of fp32. The
// 16-bit halves are put in an order in which unpack and pack, which work within 128-bit lanes, keep the elements'.
// Where a moment is NaN the parameter is, too: one comparison for all of them says whether any is to be made quiet.

// Hardware prefetchers stop at the end of a 4 KiB page, and there are five streams. 256 ahead was best on Zen 4,
// in small and in large pages; 128 to 512 are within 5 %. Past an array's end a prefetch does nothing.
constexpr int64_t kAhead = 256;

template <int kElements>
INLINE void prefetch_floats(const float* at) {
  for (int k = 0; k < kElements; k += 16) _mm_prefetch(reinterpret_cast<const char*>(at + kAhead + k), _MM_HINT_T0);
}

INLINE void prefetch_halves(const void* at) {
  _mm_prefetch(static_cast<const char*>(at) + kAhead * 2, _MM_HINT_T0);
}

template <bool kGradBf16, int kElements>
INLINE void prefetch(const Arrays& a, int64_t i) {
  prefetch_floats<kElements>(a.exp_avg + i);
  prefetch_floats<kElements>(a.exp_avg_sq + i);
  prefetch_halves(a.high + i);
  prefetch_halves(a.low + i);
  if (kGradBf16) {
    prefetch_halves(static_cast<const uint16_t*>(a.grad) + i);
  } else {
    prefetch_floats<kElements>(static_cast<const float*>(a.grad) + i);
  }
}

// ---- AVX2: 16 elements at a time

TARGET_AVX2 INLINE __m256 quiet8(__m256 x) {
  const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(int(kQuietNan)));
  return _mm256_blendv_ps(x, nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

TARGET_AVX2 INLINE __m256i load_halves16(const void* from) {
  return _mm256_permute4x64_epi64(_mm256_loadu_si256(static_cast<const __m256i*>(from)), 0xD8);
}

// The low 16 bits of the elements of two registers, whose upper bits are zero.
TARGET_AVX2 INLINE void store_halves16(void* to, __m256i first, __m256i second) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0xD8);
  _mm256_storeu_si256(static_cast<__m256i*>(to), packed);
}

template <bool kGradBf16>
TARGET_AVX2 void avx2(const Arrays& a, int64_t begin, int64_t end, const Coefficients& c) {
  const __m256 scale = _mm256_set1_ps(c.grad_scale), lerp = _mm256_set1_ps(c.lerp), beta2 = _mm256_set1_ps(c.beta2),
               rest2 = _mm256_set1_ps(c.one_minus_beta2), correction = _mm256_set1_ps(c.sqrt_correction2),
               eps = _mm256_set1_ps(c.eps), rate = _mm256_set1_ps(c.step_size), decay = _mm256_set1_ps(c.decay);
  const __m256i zero = _mm256_setzero_si256(), half = _mm256_set1_epi32(0x7FFF), mask = _mm256_set1_epi32(0xFFFF),
                one = _mm256_set1_epi32(1), sign = _mm256_set1_epi32(int(kSign)),
                tie_mask = _mm256_set1_epi32(int(kTieMask)), tie_down = _mm256_set1_epi32(int(kTieDown));
  int64_t i = begin;
  for (; i + 16 <= end; i += 16) {
    prefetch<kGradBf16, 16>(a, i);
    const __m256i low = load_halves16(a.low + i);
    // A negative remainder borrows from the half.
    const __m256i high = _mm256_add_epi16(load_halves16(a.high + i), _mm256_srai_epi16(low, 15));
    __m256i bits[2] = {_mm256_unpacklo_epi16(low, high), _mm256_unpackhi_epi16(low, high)};
    __m256 g[2];
    if (kGradBf16) {
      const __m256i halves = load_halves16(static_cast<const uint16_t*>(a.grad) + i);
      g[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, halves));
      g[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, halves));
    } else {
      g[0] = _mm256_loadu_ps(static_cast<const float*>(a.grad) + i);
      g[1] = _mm256_loadu_ps(static_cast<const float*>(a.grad) + i + 8);
    }
    for (int k = 0; k < 2; ++k) {
      float* const m_at = a.exp_avg + i + 8 * k;
      float* const v_at = a.exp_avg_sq + i + 8 * k;
      g[k] = _mm256_mul_ps(g[k], scale);
      const __m256i signed_v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v_at));
      bits[k] = _mm256_add_epi32(bits[k], _mm256_slli_epi32(_mm256_srli_epi32(signed_v, 31), 16));
      __m256 m = _mm256_loadu_ps(m_at), v = _mm256_castsi256_ps(_mm256_andnot_si256(sign, signed_v)),
             p = _mm256_castsi256_ps(bits[k]);
      m = _mm256_fmadd_ps(lerp, _mm256_sub_ps(g[k], m), c.lerp_from_grad ? g[k] : m);
      v = _mm256_fmadd_ps(_mm256_mul_ps(rest2, g[k]), g[k], _mm256_mul_ps(v, beta2));
      const __m256 denominator = _mm256_add_ps(_mm256_div_ps(_mm256_sqrt_ps(v), correction), eps);
      p = _mm256_sub_ps(_mm256_mul_ps(p, decay), _mm256_div_ps(_mm256_mul_ps(rate, m), denominator));
      bits[k] = _mm256_castps_si256(p);
      const __m256i down = _mm256_cmpeq_epi32(_mm256_and_si256(bits[k], tie_mask), tie_down);
      _mm256_storeu_ps(m_at, m);
      _mm256_storeu_ps(v_at, _mm256_or_ps(v, _mm256_castsi256_ps(_mm256_and_si256(down, sign))));
    }
    const __m256 nan = _mm256_cmp_ps(_mm256_castsi256_ps(bits[0]), _mm256_castsi256_ps(bits[1]), _CMP_UNORD_Q);
    if (__builtin_expect(!_mm256_testz_ps(nan, nan), 0)) {
      for (int k = 0; k < 2; ++k) {
        for (float* at : {a.exp_avg + i + 8 * k, a.exp_avg_sq + i + 8 * k}) {
          _mm256_storeu_ps(at, quiet8(_mm256_loadu_ps(at)));
        }
        bits[k] = _mm256_castps_si256(quiet8(_mm256_castsi256_ps(bits[k])));
      }
    }
    __m256i rounded[2];
    for (int k = 0; k < 2; ++k) {
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits[k], 16), one);
      rounded[k] = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits[k], half), odd), 16);
    }
    store_halves16(a.high + i, rounded[0], rounded[1]);
    store_halves16(a.low + i, _mm256_and_si256(bits[0], mask), _mm256_and_si256(bits[1], mask));
  }
  for (; i < end; ++i) element<kGradBf16>(a, i, c);
}

// ---- AVX-512: 32 elements at a time

TARGET_AVX512 INLINE __m512 quiet16(__m512 x) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x,
                              _mm512_castsi512_ps(_mm512_set1_epi32(int(kQuietNan))));
}

TARGET_AVX512 INLINE __m512i load_halves32(const void* from) {
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), _mm512_loadu_si512(from));
}

TARGET_AVX512 INLINE void store_halves32(void* to, __m512i first, __m512i second) {
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi64(order, _mm512_packus_epi32(first, second)));
}

template <bool kGradBf16>
TARGET_AVX512 void avx512(const Arrays& a, int64_t begin, int64_t end, const Coefficients& c) {
  const __m512 scale = _mm512_set1_ps(c.grad_scale), lerp = _mm512_set1_ps(c.lerp), beta2 = _mm512_set1_ps(c.beta2),
               rest2 = _mm512_set1_ps(c.one_minus_beta2), correction = _mm512_set1_ps(c.sqrt_correction2),
               eps = _mm512_set1_ps(c.eps), rate = _mm512_set1_ps(c.step_size), decay = _mm512_set1_ps(c.decay);
  const __m512i zero = _mm512_setzero_si512(), half = _mm512_set1_epi32(0x7FFF), mask = _mm512_set1_epi32(0xFFFF),
                one = _mm512_set1_epi32(1), sign = _mm512_set1_epi32(int(kSign)),
                tie_mask = _mm512_set1_epi32(int(kTieMask)), tie_down = _mm512_set1_epi32(int(kTieDown));
  int64_t i = begin;
  for (; i + 32 <= end; i += 32) {
    prefetch<kGradBf16, 32>(a, i);
    const __m512i low = load_halves32(a.low + i);
    const __m512i high = _mm512_add_epi16(load_halves32(a.high + i), _mm512_srai_epi16(low, 15));
    __m512i bits[2] = {_mm512_unpacklo_epi16(low, high), _mm512_unpackhi_epi16(low, high)};
    __m512 g[2];
    if (kGradBf16) {
      const __m512i halves = load_halves32(static_cast<const uint16_t*>(a.grad) + i);
      g[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, halves));
      g[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, halves));
    } else {
      g[0] = _mm512_loadu_ps(static_cast<const float*>(a.grad) + i);
      g[1] = _mm512_loadu_ps(static_cast<const float*>(a.grad) + i + 16);
    }
    for (int k = 0; k < 2; ++k) {
      float* const m_at = a.exp_avg + i + 16 * k;
      float* const v_at = a.exp_avg_sq + i + 16 * k;
      g[k] = _mm512_mul_ps(g[k], scale);
      const __m512i signed_v = _mm512_loadu_si512(v_at);
      bits[k] = _mm512_add_epi32(bits[k], _mm512_slli_epi32(_mm512_srli_epi32(signed_v, 31), 16));
      __m512 m = _mm512_loadu_ps(m_at), v = _mm512_castsi512_ps(_mm512_andnot_si512(sign, signed_v)),
             p = _mm512_castsi512_ps(bits[k]);
      m = _mm512_fmadd_ps(lerp, _mm512_sub_ps(g[k], m), c.lerp_from_grad ? g[k] : m);
      v = _mm512_fmadd_ps(_mm512_mul_ps(rest2, g[k]), g[k], _mm512_mul_ps(v, beta2));
      const __m512 denominator = _mm512_add_ps(_mm512_div_ps(_mm512_sqrt_ps(v), correction), eps);
      p = _mm512_sub_ps(_mm512_mul_ps(p, decay), _mm512_div_ps(_mm512_mul_ps(rate, m), denominator));
      bits[k] = _mm512_castps_si512(p);
      const __mmask16 down = _mm512_cmpeq_epi32_mask(_mm512_and_si512(bits[k], tie_mask), tie_down);
      const __m512i v_bits = _mm512_castps_si512(v);
      _mm512_storeu_ps(m_at, m);
      _mm512_storeu_si512(v_at, _mm512_mask_or_epi32(v_bits, down, v_bits, sign));
    }
    if (__builtin_expect(
            _mm512_cmp_ps_mask(_mm512_castsi512_ps(bits[0]), _mm512_castsi512_ps(bits[1]), _CMP_UNORD_Q) != 0, 0)) {
      for (int k = 0; k < 2; ++k) {
        for (float* at : {a.exp_avg + i + 16 * k, a.exp_avg_sq + i + 16 * k}) {
          _mm512_storeu_ps(at, quiet16(_mm512_loadu_ps(at)));
        }
        bits[k] = _mm512_castps_si512(quiet16(_mm512_castsi512_ps(bits[k])));
      }
    }
    __m512i rounded[2];
    for (int k = 0; k < 2; ++k) {
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits[k], 16), one);
      rounded[k] = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits[k], half), odd), 16);
    }
    store_halves32(a.high + i, rounded[0], rounded[1]);
    store_halves32(a.low + i, _mm512_and_si512(bits[0], mask), _mm512_and_si512(bits[1], mask));
  }
  for (; i < end; ++i) element<kGradBf16>(a, i, c);
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

// Elements handed to a thread at once: 200 KB of traffic, 20 us where 16 threads share a server's DRAM. The last threads
// to end are waited for by the others that long.
constexpr int64_t kBlock = 8192;

}  // namespace

extern "C" {

// The best path this CPU has; all below it work as well.
int slidetune_adam_best_path() {
#if SLIDETUNE_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return kScalar;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") ? kAvx512 : kAvx2;
#else
  return kScalar;
#endif
}

void slidetune_adam_step(int path, int threads, int64_t count, uint16_t* high, int16_t* low, float* exp_avg,
                         float* exp_avg_sq, const void* grad, int grad_is_bf16, const Coefficients* coefficients) {
  const Arrays arrays{high, low, exp_avg, exp_avg_sq, grad, grad_is_bf16 != 0};
  const Kernel kernel = kernel_of(path, arrays.grad_is_bf16);
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  const slidetune::Pools& pools = slidetune::Pools::shared();
  pools.adam->run(threads < blocks ? threads : int(blocks), blocks, [&](int64_t block) {
    const PlainFloatingPoint mode;
    pools.urgent->help();
    const int64_t begin = block * kBlock, end = begin + kBlock;
    kernel(arrays, begin, end < count ? end : count, *coefficients);
  });
}

// The same for `count` rows of a matrix of rows of `width`. A row's gradient is the sum, rounded to bf16, of its own row
// of `dense`, where there is such a matrix, and of row places[i] of `values`, where that is not negative; all bf16.
void slidetune_adam_rows(int path, int threads, int64_t width, int64_t count, const int64_t* rows,
                         const int64_t* places, uint16_t* high, int16_t* low, float* exp_avg, float* exp_avg_sq,
                         const uint16_t* values, const uint16_t* dense, const Coefficients* coefficients) {
  const Kernel kernel = kernel_of(path, true);
  const int64_t rows_at_once = width < kBlock ? kBlock / width : 1;
  const int64_t blocks = (count + rows_at_once - 1) / rows_at_once;
  const slidetune::Pools& pools = slidetune::Pools::shared();
  pools.adam->run(threads < blocks ? threads : int(blocks), blocks, [&](int64_t block) {
    const PlainFloatingPoint mode;
    pools.urgent->help();
    const int64_t begin = block * rows_at_once, end = begin + rows_at_once;
    // Zeros, and where both matrices have a gradient, their sum.
    std::vector<uint16_t> own(width);
    for (int64_t i = begin; i < end && i < count; ++i) {
      const int64_t at = rows[i] * width;
      const uint16_t* grad = dense == nullptr ? own.data() : dense + at;
      if (places[i] >= 0) {
        const uint16_t* more = values + places[i] * width;
        if (dense != nullptr) {
          for (int64_t k = 0; k < width; ++k) own[k] = rounded(widened(grad[k]) + widened(more[k]));
          more = own.data();
        }
        grad = more;
      }
      kernel({high + at, low + at, exp_avg + at, exp_avg_sq + at, grad, true}, 0, width, *coefficients);
    }
  });
}

}  // extern "C"
