// Host and device: what a CUDA thread computes, a pixel, or of a resize a column of its block. The CPU's rows
// (convert.cpp) are its twin: the same operations in the same order, tested equal in tests/cpp.
#pragma once

#include <type_traits>

#include "spec.hpp"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace fastpix2pix {

#ifdef __CUDACC__
using DeviceHalf = __half;
FASTPIX2PIX_HD float widen(__half x) { return __half2float(x); }
FASTPIX2PIX_HD void narrow(float x, __half& to) { to = __float2half_rn(x); }
#else
using DeviceHalf = _Float16;
FASTPIX2PIX_HD float widen(_Float16 x) { return static_cast<float>(x); }
FASTPIX2PIX_HD void narrow(float x, _Float16& to) { to = static_cast<_Float16>(x); }
#endif
FASTPIX2PIX_HD float widen(float x) { return x; }
FASTPIX2PIX_HD void narrow(float x, float& to) { to = x; }

// Calls body with the format as a constant of its type.
template <class Body>
void with_format(Format format, const Body& body) {
  switch (format) {
    case Format::rgb:
      return body(std::integral_constant<Format, Format::rgb>());
    case Format::bgr:
      return body(std::integral_constant<Format, Format::bgr>());
    case Format::rgba:
      return body(std::integral_constant<Format, Format::rgba>());
    case Format::nv12:
      return body(std::integral_constant<Format, Format::nv12>());
    case Format::yuv420:
      return body(std::integral_constant<Format, Format::yuv420>());
  }
}

// A spec with the tables of its resize where the kernel can read them; without a resize both counts are 0.
struct InputSampler {
  InputSpec spec;
  TapsView rows, columns;

  // Red, green, blue or Y, U, V of the frame, as levels.
  template <Format kFormat>
  FASTPIX2PIX_HD Pixel at(const ConstPlanes& frame, int x, int y) const {
    if (!is_yuv(kFormat)) {
      const std::uint8_t* p = frame.data[0] + y * frame.stride[0] + x * packed_channels(kFormat);
      const float a = p[0], b = p[1], c = p[2];
      return kFormat == Format::bgr ? Pixel{{c, b, a}} : Pixel{{a, b, c}};
    }
    const float luma = frame.data[0][y * frame.stride[0] + x];
    if (kFormat == Format::nv12) {
      const std::uint8_t* uv = frame.data[1] + y / 2 * frame.stride[1] + x / 2 * 2;
      return {{luma, static_cast<float>(uv[0]), static_cast<float>(uv[1])}};
    }
    return {{luma, static_cast<float>(frame.data[1][y / 2 * frame.stride[1] + x / 2]),
             static_cast<float>(frame.data[2][y / 2 * frame.stride[2] + x / 2])}};
  }

  // Where row y of the network's input comes from in the scaled picture, and likewise column x; -1: it is filled.
  FASTPIX2PIX_HD int row(int y) const { return position(y - spec.top, spec.scaled_height); }
  FASTPIX2PIX_HD int column(int x) const { return position(x - spec.left, spec.scaled_width); }

  // Column x of the crop, summed over the rows of the crop that make row y of the scaled picture.
  template <Format kFormat>
  FASTPIX2PIX_HD Pixel down(const ConstPlanes& frame, int x, int y) const {
    Pixel sum{};
    for (int i = 0; i < rows.count; ++i) {
      const float weight = rows.weight[i * rows.out + y];
      if (weight == 0.0f) continue;
      const Pixel p = at<kFormat>(frame, spec.crop.x + x, spec.crop.y + rows.first[y] + i);
      for (int c = 0; c < 3; ++c) sum.c[c] += weight * p.c[c];
    }
    return sum;
  }

  // Adds to column x of the scaled picture what the columns of the crop from `begin` to before `end` give it.
  FASTPIX2PIX_HD void across(const Pixel* sums,  // of those columns
                             int begin, int end, int x, Pixel& sum) const {
    const int first = columns.first[x], last = first + columns.count;
    for (int from = first > begin ? first : begin; from < end && from < last; ++from) {
      const float weight = columns.weight[(from - first) * columns.out + x];
      for (int c = 0; c < 3; ++c) sum.c[c] += weight * sums[from - begin].c[c];
    }
  }

  // Levels of the frame's colours as the network takes them.
  template <Format kFormat>
  FASTPIX2PIX_HD Pixel units(Pixel p) const {
    if (is_yuv(kFormat)) p = rgb_of_yuv(p, spec.colour);
    for (float& c : p.c) c = unit_of_level(clamp_level(c));
    return p;
  }

  FASTPIX2PIX_HD Pixel fill() const {
    const float unit = unit_of_level(clamp_level(spec.fill));
    return {{unit, unit, unit}};
  }

 private:
  FASTPIX2PIX_HD int position(int at, int size) const {
    const bool outside = at < 0 || at >= size;
    return outside && spec.border != Border::reflect ? -1 : reflected(at, size);
  }
};

template <class T>
FASTPIX2PIX_HD void store_pixel(T* network, const TensorShape& shape, int x, int y, const Pixel& units) {
  const std::ptrdiff_t pixel = std::ptrdiff_t{y} * shape.width + x;
  const std::ptrdiff_t plane = std::ptrdiff_t{shape.width} * shape.height;
  for (int c = 0; c < 3; ++c) narrow(units.c[c], network[shape.channels_last ? 3 * pixel + c : c * plane + pixel]);
}

struct OutputSampler {
  OutputSpec spec;
  TapsView rows, columns;

  template <class T>
  FASTPIX2PIX_HD Pixel at(const T* network, int x, int y) const {
    const TensorShape& shape = spec.network;
    const std::ptrdiff_t pixel = std::ptrdiff_t{spec.region.y + y} * shape.width + spec.region.x + x;
    const std::ptrdiff_t plane = std::ptrdiff_t{shape.width} * shape.height;
    Pixel p;
    for (int c = 0; c < 3; ++c) p.c[c] = widen(network[shape.channels_last ? 3 * pixel + c : c * plane + pixel]);
    return p;
  }

  // Pixel (x, y) of the frame as clamped levels of red, green and blue; beyond the last row or column that one.
  template <class T>
  FASTPIX2PIX_HD Pixel operator()(const T* network, int x, int y) const {
    x = x < spec.frame.width ? x : spec.frame.width - 1;
    y = y < spec.frame.height ? y : spec.frame.height - 1;
    Pixel p{};
    if (columns.count == 0) {
      p = at(network, x, y);
    } else {
      for (int j = 0; j < columns.count; ++j) {
        Pixel inner{};
        for (int i = 0; i < rows.count; ++i) {
          const float weight = rows.weight[i * rows.out + y];
          if (weight == 0.0f) continue;  // as the CPU does: a NaN that weighs nothing must not spread
          const Pixel q = at(network, columns.first[x] + j, rows.first[y] + i);
          for (int c = 0; c < 3; ++c) inner.c[c] += weight * q.c[c];
        }
        for (int c = 0; c < 3; ++c) p.c[c] += columns.weight[j * columns.out + x] * inner.c[c];
      }
    }
    for (float& c : p.c) c = clamp_level(level_of_unit(c));
    return p;
  }
};

template <Format kFormat>
FASTPIX2PIX_HD void store_packed_pixel(const Planes& frame, int x, int y, const Pixel& rgb) {
  std::uint8_t* p = frame.data[0] + y * frame.stride[0] + x * packed_channels(kFormat);
  p[0] = byte_of_level(rgb.c[kFormat == Format::bgr ? 2 : 0]);
  p[1] = byte_of_level(rgb.c[1]);
  p[2] = byte_of_level(rgb.c[kFormat == Format::bgr ? 0 : 2]);
  if (kFormat == Format::rgba) p[3] = 255;
}

// The 2x2 block whose first pixel is (2 column, 2 row): up to four Y, one U, one V.
template <Format kFormat, class T>
FASTPIX2PIX_HD void store_yuv_block(const OutputSampler& sampler, const Planes& frame, const T* network, int column,
                                    int row) {
  const FrameShape& shape = sampler.spec.frame;
  const Colour& k = sampler.spec.colour;
  Pixel block[4];
  for (int i = 0; i < 4; ++i) {
    const int x = 2 * column + i % 2, y = 2 * row + i / 2;
    block[i] = sampler(network, x, y);
    const float* rgb = block[i].c;
    if (x >= shape.width || y >= shape.height) continue;
    frame.data[0][y * frame.stride[0] + x] = byte_of_level(clamp_level(y_of_rgb(rgb[0], rgb[1], rgb[2], k)));
  }
  float mean[3];
  for (int c = 0; c < 3; ++c) mean[c] = block_mean(block[0].c[c], block[1].c[c], block[2].c[c], block[3].c[c]);
  const int step = kFormat == Format::nv12 ? 2 : 1;
  std::uint8_t* u = frame.data[1] + row * frame.stride[1] + column * step;
  std::uint8_t* v = kFormat == Format::nv12 ? u + 1 : frame.data[2] + row * frame.stride[2] + column;
  *u = byte_of_level(clamp_level(u_of_rgb(mean[0], mean[1], mean[2], k)));
  *v = byte_of_level(clamp_level(v_of_rgb(mean[0], mean[1], mean[2], k)));
}

}  // namespace fastpix2pix
