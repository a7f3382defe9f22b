// The CPU's inner loops: one row of pixels each, compiled for several instruction sets and chosen at load time.
// Rows do not overlap. n counts pixels, or values where there is one component.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pixels.hpp"
#include "resample.hpp"

namespace fastpix2pix::rows {

using Half = _Float16;

// Three rows of floats, one per component.
struct Rows {
  float* c[3];
};

// bytes -> levels
void load_packed(const std::uint8_t* src, int channels, std::ptrdiff_t n, Rows to);  // src [n, 3 or 4]
void load_plane(const std::uint8_t* src, std::ptrdiff_t n, float* to);
// Chroma has half the columns: to[x] = src[(x + phase) / 2 * step]; phase 0 or 1, step 2 where U and V alternate.
void load_chroma(const std::uint8_t* src, int step, int phase, std::ptrdiff_t n, float* to);

// A few taps of a vertical filter: sum + weight[0] * src[0] + weight[1] * src[1] + ... in that order, from nothing if
// they are the first.
template <class T>
constexpr int kTaps = 4;
template <>
constexpr int kTaps<std::uint8_t> = 32;  // a whole window of most resizes
template <class T>
struct TapRows {
  const T* src[kTaps<T>];
  float weight[kTaps<T>];
  int count;  // 1 to kTaps
};
void add(const TapRows<std::uint8_t>& taps, bool first, std::ptrdiff_t n, float* sum);
void add(const TapRows<float>& taps, bool first, std::ptrdiff_t n, float* sum);
void add(const TapRows<Half>& taps, bool first, std::ptrdiff_t n, float* sum);

// Pixels of four floats, the last unused, for `resample`: from three rows, or with chroma as in load_chroma.
void interleave(const float* a, const float* b, const float* c, std::ptrdiff_t n, float* to);
void interleave_yuv(const float* y, const float* u, const float* v, int step, int phase, std::ptrdiff_t n, float* to);
// The horizontal filter: every column of `taps`, from pixels of 3 or 4 floats. One float behind the last is read.
void resample(const float* src, int pitch, TapsView taps, Rows to);

void yuv_to_rgb(Rows levels, std::ptrdiff_t n, const Colour& colour);  // in place

// levels, clamped -> units; to [n, 3] or one plane
void store_interleaved(Rows levels, std::ptrdiff_t n, float* to);
void store_interleaved(Rows levels, std::ptrdiff_t n, Half* to);
void store_plane(const float* levels, std::ptrdiff_t n, float* to);
void store_plane(const float* levels, std::ptrdiff_t n, Half* to);

// units as they are
void load_interleaved(const float* src, std::ptrdiff_t n, Rows to);  // src [n, 3]
void load_interleaved(const Half* src, std::ptrdiff_t n, Rows to);
void load_plane(const float* src, std::ptrdiff_t n, float* to);
void load_plane(const Half* src, std::ptrdiff_t n, float* to);

// units -> clamped levels, in place
void to_levels(Rows units, std::ptrdiff_t n);

// clamped levels -> bytes
void store_packed(Rows levels, int channels, std::ptrdiff_t n, std::uint8_t* to);  // to [n, 3 or 4], alpha 255
void store_luma(Rows rgb, std::ptrdiff_t n, const Colour& colour, std::uint8_t* y);
// One U and V for each 2x2 block of two rows of n pixels (the same row twice at an odd edge); step as in load_chroma.
void store_chroma(Rows top, Rows bottom, std::ptrdiff_t n, const Colour& colour, int step, std::uint8_t* u,
                  std::uint8_t* v);

}  // namespace fastpix2pix::rows
