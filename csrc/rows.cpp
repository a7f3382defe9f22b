#include "rows.hpp"

#include <algorithm>

// GCC compiles a marked function once per instruction set and the loader picks one; sanitizers start too late for that.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(FASTPIX2PIX_SANITIZED)
#include <immintrin.h>
#define HAS_CLONES
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define BASE_CPU __attribute__((target("default")))
#else
#define EACH_CPU
#define BASE_CPU
#endif

namespace fastpix2pix::rows {
namespace {

using std::ptrdiff_t;
using std::uint8_t;

#define INLINE inline __attribute__((always_inline))
#define INLINE_CALL __attribute__((always_inline))

template <class From, class To>
INLINE void widen(const From* __restrict src, ptrdiff_t n, To* __restrict to) {
  for (ptrdiff_t x = 0; x < n; ++x) to[x] = static_cast<To>(src[x]);
}

// Half is converted in bites that stay in the nearest cache, by the processor's own instruction where it has one:
// GCC does not vectorise it.
constexpr ptrdiff_t kBite = 768;  // values, a multiple of 3

template <class Body>
INLINE void in_bites(ptrdiff_t values, const Body& body) {
  for (ptrdiff_t from = 0; from < values; from += kBite) body(from, std::min(kBite, values - from));
}

#ifdef HAS_CLONES
__attribute__((target("arch=x86-64-v3"))) void to_half(const float* src, ptrdiff_t n, Half* to) {
  ptrdiff_t x = 0;
  for (; x + 8 <= n; x += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(src + x), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + x), half);
  }
  for (; x < n; ++x) to[x] = static_cast<Half>(src[x]);
}
__attribute__((target("arch=x86-64-v3"))) void of_half(const Half* src, ptrdiff_t n, float* to) {
  ptrdiff_t x = 0;
  for (; x + 8 <= n; x += 8) {
    _mm256_storeu_ps(to + x, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + x))));
  }
  for (; x < n; ++x) to[x] = static_cast<float>(src[x]);
}
#endif
BASE_CPU void to_half(const float* src, ptrdiff_t n, Half* to) {
  for (ptrdiff_t x = 0; x < n; ++x) to[x] = static_cast<Half>(src[x]);
}
BASE_CPU void of_half(const Half* src, ptrdiff_t n, float* to) {
  for (ptrdiff_t x = 0; x < n; ++x) to[x] = static_cast<float>(src[x]);
}

template <int Channels, class From>
INLINE void split(const From* __restrict src, ptrdiff_t n, float* __restrict a, float* __restrict b,
                  float* __restrict c) {
  for (ptrdiff_t x = 0; x < n; ++x) {
    a[x] = static_cast<float>(src[Channels * x]);
    b[x] = static_cast<float>(src[Channels * x + 1]);
    c[x] = static_cast<float>(src[Channels * x + 2]);
  }
}

// Up to four taps at a time.
template <int Count, class From>
INLINE void add_taps(const From* const* given, const float* weights, bool first, ptrdiff_t n, float* __restrict sum) {
  const From* src[Count];
  float weight[Count];
  for (int k = 0; k < Count; ++k) src[k] = given[k], weight[k] = weights[k];
  const auto next = [&](ptrdiff_t x, float value, int from) __attribute__((always_inline)) {
    for (int k = from; k < Count; ++k) value = value + weight[k] * static_cast<float>(src[k][x]);
    return value;
  };
  if (first) {
    for (ptrdiff_t x = 0; x < n; ++x) sum[x] = next(x, weight[0] * static_cast<float>(src[0][x]), 1);
  } else {
    for (ptrdiff_t x = 0; x < n; ++x) sum[x] = next(x, sum[x], 0);
  }
}

template <class From>
INLINE void add_rows(const TapRows<From>& taps, bool first, ptrdiff_t n, float* __restrict sum) {
  for (int k = 0; k < taps.count; k += 4, first = false) {
    switch (taps.count - k) {
      case 1:
        add_taps<1>(taps.src + k, taps.weight + k, first, n, sum);
        break;
      case 2:
        add_taps<2>(taps.src + k, taps.weight + k, first, n, sum);
        break;
      case 3:
        add_taps<3>(taps.src + k, taps.weight + k, first, n, sum);
        break;
      default:
        add_taps<4>(taps.src + k, taps.weight + k, first, n, sum);
    }
  }
}

// Bytes, in vectors: returns how many columns it did, from the left. They become floats by the processor's own
// instruction; GCC's way there is twice as long.
#ifdef HAS_CLONES
__attribute__((target("arch=x86-64-v3"))) ptrdiff_t add_vectors(const TapRows<uint8_t>& taps, bool first, ptrdiff_t n,
                                                                float* sum) {
  constexpr int kVectors = 4, kColumns = 8 * kVectors;
  ptrdiff_t x = 0;
  for (; x + kColumns <= n; x += kColumns) {
    __m256 value[kVectors];
    for (int i = 0; i < kVectors; ++i) value[i] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(sum + x + 8 * i);
    for (int k = 0; k < taps.count; ++k) {
      const __m256 weight = _mm256_set1_ps(taps.weight[k]);
      for (int i = 0; i < kVectors; ++i) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(taps.src[k] + x + 8 * i));
        const __m256 level = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
        value[i] = _mm256_add_ps(value[i], _mm256_mul_ps(weight, level));
      }
    }
    for (int i = 0; i < kVectors; ++i) _mm256_storeu_ps(sum + x + 8 * i, value[i]);
  }
  return x;
}
__attribute__((target("arch=x86-64-v4"))) ptrdiff_t add_vectors(const TapRows<uint8_t>& taps, bool first, ptrdiff_t n,
                                                                float* sum) {
  constexpr int kVectors = 4, kColumns = 16 * kVectors;
  constexpr __mmask16 kAll = 0xffff;
  ptrdiff_t x = 0;
  for (; x + kColumns <= n; x += kColumns) {
    __m512 value[kVectors];
    for (int i = 0; i < kVectors; ++i) value[i] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sum + x + 16 * i);
    for (int k = 0; k < taps.count; ++k) {
      const __m512 weight = _mm512_set1_ps(taps.weight[k]);
      for (int i = 0; i < kVectors; ++i) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(taps.src[k] + x + 16 * i));
        // a mask of all: GCC 12 warns of what the instructions without one leave undefined
        const __m512 level = _mm512_maskz_cvtepi32_ps(kAll, _mm512_maskz_cvtepu8_epi32(kAll, bytes));
        value[i] = _mm512_add_ps(value[i], _mm512_mul_ps(weight, level));
      }
    }
    for (int i = 0; i < kVectors; ++i) _mm512_storeu_ps(sum + x + 16 * i, value[i]);
  }
  return x;
}
#endif
BASE_CPU ptrdiff_t add_vectors(const TapRows<uint8_t>&, bool, ptrdiff_t, float*) { return 0; }

// Four floats of a pixel in one register: all components of an output go through its taps together.
typedef float Vector __attribute__((vector_size(16)));
INLINE Vector load4(const float* from) {
  Vector value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

// Columns x to x + Count: several, as none waits for another's sum.
template <int Pitch, int Count>
INLINE void filter_some(const float* __restrict src, const TapsView& taps, ptrdiff_t x, const Rows& to) {
  const float* weight = taps.weight + x;
  ptrdiff_t first[Count];
  Vector sum[Count] = {};
  for (int i = 0; i < Count; ++i) first[i] = Pitch * taps.first[x + i];
  for (int k = 0; k < taps.count; ++k, src += Pitch, weight += taps.out) {
    for (int i = 0; i < Count; ++i) sum[i] = sum[i] + weight[i] * load4(src + first[i]);
  }
  for (int c = 0; c < 3; ++c) {
    for (int i = 0; i < Count; ++i) to.c[c][x + i] = sum[i][c];
  }
}

template <int Pitch>
INLINE void filter_columns(const float* src, TapsView taps, Rows to) {
  constexpr int kAtOnce = 4;
  ptrdiff_t x = 0;
  for (; x + kAtOnce <= taps.out; x += kAtOnce) filter_some<Pitch, kAtOnce>(src, taps, x, to);
  for (; x < taps.out; ++x) filter_some<Pitch, 1>(src, taps, x, to);
}

template <int Step, class From>
INLINE void double_columns(const From* __restrict src, int phase, ptrdiff_t n, float* __restrict to) {
  if (phase == 1 && n > 0) {
    *to++ = static_cast<float>(*src);
    src += Step;
    --n;
  }
  for (ptrdiff_t x = 0; x < n / 2; ++x) {
    const float value = static_cast<float>(src[Step * x]);
    to[2 * x] = value;
    to[2 * x + 1] = value;
  }
  if (n % 2) to[n - 1] = static_cast<float>(src[Step * (n / 2)]);
}

template <int Step>
INLINE void pixels_of_yuv(const float* __restrict y, const float* __restrict u, const float* __restrict v, int phase,
                          ptrdiff_t n, float* __restrict to) {
  const auto store = [&](ptrdiff_t x, ptrdiff_t pair) __attribute__((always_inline)) {
    to[4 * x] = y[x];
    to[4 * x + 1] = u[Step * pair];
    to[4 * x + 2] = v[Step * pair];
  };
  if (phase == 1 && n > 0) store(0, 0);
  for (ptrdiff_t pair = phase; pair < (n + phase) / 2; ++pair) {
    store(2 * pair - phase, pair);
    store(2 * pair - phase + 1, pair);
  }
  if ((n + phase) % 2 && n > phase) store(n - 1, (n - 1 + phase) / 2);
}

template <class To>
INLINE void units(const float* __restrict levels, ptrdiff_t n, To* __restrict to) {
  for (ptrdiff_t x = 0; x < n; ++x) to[x] = static_cast<To>(unit_of_level(clamp_level(levels[x])));
}

template <class To>
INLINE void interleaved_units(const float* __restrict a, const float* __restrict b, const float* __restrict c,
                              ptrdiff_t n, To* __restrict to) {
  for (ptrdiff_t x = 0; x < n; ++x) {
    to[3 * x] = static_cast<To>(unit_of_level(clamp_level(a[x])));
    to[3 * x + 1] = static_cast<To>(unit_of_level(clamp_level(b[x])));
    to[3 * x + 2] = static_cast<To>(unit_of_level(clamp_level(c[x])));
  }
}

INLINE void bytes(const float* __restrict a, const float* __restrict b, const float* __restrict c, ptrdiff_t n,
                  uint8_t* __restrict to) {
  for (ptrdiff_t x = 0; x < n; ++x) {
    to[3 * x] = byte_of_level(a[x]);
    to[3 * x + 1] = byte_of_level(b[x]);
    to[3 * x + 2] = byte_of_level(c[x]);
  }
}

// With alpha 255: a pixel is one word, which vectors hold side by side.
INLINE void words(const float* __restrict a, const float* __restrict b, const float* __restrict c, ptrdiff_t n,
                  uint8_t* __restrict to) {
  for (ptrdiff_t x = 0; x < n; ++x) {
    const std::uint32_t pixel = byte_of_level(a[x]) | std::uint32_t{byte_of_level(b[x])} << 8 |
                                std::uint32_t{byte_of_level(c[x])} << 16 | 255u << 24;
    __builtin_memcpy(to + 4 * x, &pixel, 4);  // little endian, as every machine with a GPU is
  }
}

template <int Step>
INLINE void chroma(const Rows& top, const Rows& bottom, ptrdiff_t n, const Colour& k, uint8_t* __restrict u,
                   uint8_t* __restrict v) {
  const float* __restrict r0 = top.c[0], * __restrict g0 = top.c[1], * __restrict b0 = top.c[2];
  const float* __restrict r1 = bottom.c[0], * __restrict g1 = bottom.c[1], * __restrict b1 = bottom.c[2];
  const auto store = [&](ptrdiff_t x, ptrdiff_t left, ptrdiff_t right) __attribute__((always_inline)) {
    const float r = block_mean(r0[left], r0[right], r1[left], r1[right]);
    const float g = block_mean(g0[left], g0[right], g1[left], g1[right]);
    const float b = block_mean(b0[left], b0[right], b1[left], b1[right]);
    u[Step * x] = byte_of_level(clamp_level(u_of_rgb(r, g, b, k)));
    v[Step * x] = byte_of_level(clamp_level(v_of_rgb(r, g, b, k)));
  };
  for (ptrdiff_t x = 0; x < n / 2; ++x) store(x, 2 * x, 2 * x + 1);
  if (n % 2) store(n / 2, n - 1, n - 1);
}

}  // namespace

EACH_CPU void load_packed(const uint8_t* src, int channels, ptrdiff_t n, Rows to) {
  channels == 4 ? split<4>(src, n, to.c[0], to.c[1], to.c[2]) : split<3>(src, n, to.c[0], to.c[1], to.c[2]);
}

EACH_CPU void load_plane(const uint8_t* src, ptrdiff_t n, float* to) { widen(src, n, to); }

EACH_CPU void load_chroma(const uint8_t* src, int step, int phase, ptrdiff_t n, float* to) {
  step == 2 ? double_columns<2>(src, phase, n, to) : double_columns<1>(src, phase, n, to);
}

EACH_CPU void add(const TapRows<uint8_t>& taps, bool first, ptrdiff_t n, float* sum) {
  const ptrdiff_t done = add_vectors(taps, first, n, sum);
  TapRows<uint8_t> rest = taps;
  for (int k = 0; k < rest.count; ++k) rest.src[k] += done;
  add_rows(rest, first, n - done, sum + done);
}
EACH_CPU void add(const TapRows<float>& taps, bool first, ptrdiff_t n, float* sum) { add_rows(taps, first, n, sum); }
EACH_CPU void add(const TapRows<Half>& taps, bool first, ptrdiff_t n, float* sum) {
  in_bites(n, [&](ptrdiff_t from, ptrdiff_t count) INLINE_CALL {
    float values[kTaps<Half>][kBite];
    TapRows<float> widened{{}, {}, taps.count};
    for (int k = 0; k < taps.count; ++k) {
      of_half(taps.src[k] + from, count, values[k]);
      widened.src[k] = values[k];
      widened.weight[k] = taps.weight[k];
    }
    add_rows(widened, first, count, sum + from);
  });
}

EACH_CPU void interleave(const float* __restrict a, const float* __restrict b, const float* __restrict c, ptrdiff_t n,
                         float* __restrict to) {
  for (ptrdiff_t x = 0; x < n; ++x) {
    to[4 * x] = a[x];
    to[4 * x + 1] = b[x];
    to[4 * x + 2] = c[x];
  }
}

EACH_CPU void interleave_yuv(const float* y, const float* u, const float* v, int step, int phase, ptrdiff_t n,
                             float* to) {
  step == 2 ? pixels_of_yuv<2>(y, u, v, phase, n, to) : pixels_of_yuv<1>(y, u, v, phase, n, to);
}

EACH_CPU void resample(const float* src, int pitch, TapsView taps, Rows to) {
  pitch == 4 ? filter_columns<4>(src, taps, to) : filter_columns<3>(src, taps, to);
}

EACH_CPU void yuv_to_rgb(Rows levels, ptrdiff_t n, const Colour& colour) {
  const Colour k = colour;
  float* __restrict a = levels.c[0], * __restrict b = levels.c[1], * __restrict c = levels.c[2];
  for (ptrdiff_t x = 0; x < n; ++x) {
    const Pixel rgb = rgb_of_yuv({{a[x], b[x], c[x]}}, k);
    a[x] = rgb.c[0];
    b[x] = rgb.c[1];
    c[x] = rgb.c[2];
  }
}

EACH_CPU void store_interleaved(Rows levels, ptrdiff_t n, float* to) {
  interleaved_units(levels.c[0], levels.c[1], levels.c[2], n, to);
}
EACH_CPU void store_interleaved(Rows levels, ptrdiff_t n, Half* to) {
  in_bites(3 * n, [&](ptrdiff_t from, ptrdiff_t count) INLINE_CALL {
    float values[kBite];
    const ptrdiff_t x = from / 3;
    interleaved_units(levels.c[0] + x, levels.c[1] + x, levels.c[2] + x, count / 3, values);
    to_half(values, count, to + from);
  });
}
EACH_CPU void store_plane(const float* levels, ptrdiff_t n, float* to) { units(levels, n, to); }
EACH_CPU void store_plane(const float* levels, ptrdiff_t n, Half* to) {
  in_bites(n, [&](ptrdiff_t from, ptrdiff_t count) INLINE_CALL {
    float values[kBite];
    units(levels + from, count, values);
    to_half(values, count, to + from);
  });
}

EACH_CPU void load_interleaved(const float* src, ptrdiff_t n, Rows to) { split<3>(src, n, to.c[0], to.c[1], to.c[2]); }
EACH_CPU void load_interleaved(const Half* src, ptrdiff_t n, Rows to) {
  in_bites(3 * n, [&](ptrdiff_t from, ptrdiff_t count) INLINE_CALL {
    float values[kBite];
    const ptrdiff_t x = from / 3;
    of_half(src + from, count, values);
    split<3>(values, count / 3, to.c[0] + x, to.c[1] + x, to.c[2] + x);
  });
}
EACH_CPU void load_plane(const float* src, ptrdiff_t n, float* to) { widen(src, n, to); }
EACH_CPU void load_plane(const Half* src, ptrdiff_t n, float* to) { of_half(src, n, to); }

EACH_CPU void to_levels(Rows units, ptrdiff_t n) {
  for (float* row : units.c) {
    for (ptrdiff_t x = 0; x < n; ++x) row[x] = clamp_level(level_of_unit(row[x]));
  }
}

EACH_CPU void store_packed(Rows levels, int channels, ptrdiff_t n, uint8_t* to) {
  channels == 4 ? words(levels.c[0], levels.c[1], levels.c[2], n, to)
                : bytes(levels.c[0], levels.c[1], levels.c[2], n, to);
}

EACH_CPU void store_luma(Rows rgb, ptrdiff_t n, const Colour& colour, uint8_t* __restrict y) {
  const Colour k = colour;
  const float* __restrict r = rgb.c[0], * __restrict g = rgb.c[1], * __restrict b = rgb.c[2];
  for (ptrdiff_t x = 0; x < n; ++x) y[x] = byte_of_level(clamp_level(y_of_rgb(r[x], g[x], b[x], k)));
}

EACH_CPU void store_chroma(Rows top, Rows bottom, ptrdiff_t n, const Colour& colour, int step, uint8_t* u, uint8_t* v) {
  const Colour k = colour;
  step == 2 ? chroma<2>(top, bottom, n, k, u, v) : chroma<1>(top, bottom, n, k, u, v);
}

}  // namespace fastpix2pix::rows
