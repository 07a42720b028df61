// Embedding rows gathered for a batch; their gradients: the sum of the gradients of the tokens that read a row, in the
// tokens' order, each sum rounded to bf16, as torch's embedding_dense_backward adds on the CPU; and what their squares
// add to the gradient's norm.

#include <cstdint>
#include <cstring>
#include <vector>

#include "halves.hpp"
#include "pool.hpp"

#define INLINE inline __attribute__((always_inline))

namespace {

using slidetune::rounded;
using slidetune::widened;

struct Job {
  int64_t width;
  const int64_t* starts;
  const int64_t* tokens;
  const uint16_t* upstream;
  void* out;
  bool out_is_fp32;
  bool fresh;
};

INLINE void sum_row(const Job& job, int64_t row, uint16_t* __restrict sum) {
  int64_t at = job.starts[row];
  const int64_t end = job.starts[row + 1];
  if (at == end) {
    std::memset(sum, 0, size_t(job.width) * sizeof *sum);
  } else {
    // Most rows are read once. Added to zero a number is itself, but for minus zero and for what is none.
    const uint16_t* __restrict from = job.upstream + job.tokens[at++] * job.width;
    for (int64_t i = 0; i < job.width; ++i) {
      const uint16_t x = from[i], or_zero = x == 0x8000 ? uint16_t(0) : x;
      sum[i] = (x & 0x7FFF) > 0x7F80 ? uint16_t(0x7FC0) : or_zero;
    }
  }
  for (; at < end; ++at) {
    const uint16_t* __restrict from = job.upstream + job.tokens[at] * job.width;
    for (int64_t i = 0; i < job.width; ++i) sum[i] = rounded(widened(sum[i]) + widened(from[i]));
  }
  if (!job.out_is_fp32) return;
  float* out = static_cast<float*>(job.out) + row * job.width;
  if (job.fresh) {
    for (int64_t i = 0; i < job.width; ++i) out[i] = widened(sum[i]);
  } else {
    for (int64_t i = 0; i < job.width; ++i) out[i] += widened(sum[i]);
  }
}

INLINE void sum_rows(const Job& job, int64_t begin, int64_t end) {
  std::vector<uint16_t> scratch(job.out_is_fp32 ? job.width : 0);
  for (int64_t row = begin; row < end; ++row) {
    sum_row(job, row, job.out_is_fp32 ? scratch.data() : static_cast<uint16_t*>(job.out) + row * job.width);
  }
}

void plain(const Job& job, int64_t begin, int64_t end) { sum_rows(job, begin, end); }

#if defined(__x86_64__)
__attribute__((target("avx2"))) void avx2(const Job& job, int64_t begin, int64_t end) { sum_rows(job, begin, end); }
#endif

// What the squares of a row's elements grow by when `value` is added to each of `dense`, or from nothing.
double growth(int64_t width, const uint16_t* __restrict value, const uint16_t* __restrict dense) {
  double sum = 0.0;
  for (int64_t i = 0; i < width; ++i) {
    const double before = dense == nullptr ? 0.0 : widened(dense[i]);
    const double after = dense == nullptr ? widened(value[i]) : widened(rounded(widened(dense[i]) + widened(value[i])));
    sum += after * after - before * before;
  }
  return sum;
}

// Rows handed to a thread at once.
constexpr int64_t kRows = 32;

}  // namespace

extern "C" void slidetune_gather_rows(int threads, int64_t width, int64_t count, const int64_t* rows,
                                      const uint16_t* table, uint16_t* out) {
  const int64_t blocks = (count + kRows - 1) / kRows;
  slidetune::Pools::shared().run_rows(threads < blocks ? threads : int(blocks), blocks, [&](int64_t block) {
    const int64_t begin = block * kRows, end = begin + kRows < count ? begin + kRows : count;
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(out + i * width, table + rows[i] * width, size_t(width) * sizeof *table);
    }
  });
}

extern "C" void slidetune_sum_rows(int threads, int64_t width, int64_t count, const int64_t* starts,
                                   const int64_t* tokens, const uint16_t* upstream, void* out, int out_is_fp32,
                                   int fresh) {
  const Job job{width, starts, tokens, upstream, out, out_is_fp32 != 0, fresh != 0};
  auto* sum = plain;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) sum = avx2;
#endif
  const int64_t blocks = (count + kRows - 1) / kRows;
  slidetune::Pools::shared().run_rows(threads < blocks ? threads : int(blocks), blocks, [&](int64_t block) {
    const int64_t begin = block * kRows, end = begin + kRows;
    sum(job, begin, end < count ? end : count);
  });
}

extern "C" void slidetune_row_growths(int threads, int64_t width, int64_t count, const int64_t* rows,
                                      const uint16_t* values, const uint16_t* dense, double* growths) {
  const int64_t blocks = (count + kRows - 1) / kRows;
  slidetune::Pools::shared().run_rows(threads < blocks ? threads : int(blocks), blocks, [&](int64_t block) {
    const int64_t begin = block * kRows, end = begin + kRows < count ? begin + kRows : count;
    for (int64_t i = begin; i < end; ++i) {
      growths[i] = growth(width, values + i * width, dense == nullptr ? nullptr : dense + rows[i] * width);
    }
  });
}
