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
void widen_chroma(const float* src, int step, int phase, std::ptrdiff_t n, float* to);

// One tap of a vertical filter: sum = weight * src for the first, sum += weight * src for the others.
void add_bytes(const std::uint8_t* src, float weight, bool first, std::ptrdiff_t n, float* sum);
void add_floats(const float* src, float weight, bool first, std::ptrdiff_t n, float* sum);
void add_halves(const Half* src, float weight, bool first, std::ptrdiff_t n, float* sum);
// The horizontal filter: to[x] for every column of `taps`, from values that lie `step` apart.
void resample(const float* src, int step, TapsView taps, float* to);

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
