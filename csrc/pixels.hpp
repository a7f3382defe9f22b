// What one pixel is: every rule about levels, colour and borders, once, for the CPU and for CUDA.
//
// Compiled without fused multiply-add, so that both give the same bits as runtime/pixel_spec.py in numpy.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTPIX2PIX_HD __host__ __device__ __forceinline__
#else
#define FASTPIX2PIX_HD inline __attribute__((always_inline))
#endif

namespace fastpix2pix {

enum class Format { rgb, bgr, rgba, nv12, yuv420 };
enum class Matrix { bt601, bt709 };
enum class Range { limited, full };
enum class Border { reflect, constant };

FASTPIX2PIX_HD constexpr bool is_yuv(Format format) { return format == Format::nv12 || format == Format::yuv420; }
FASTPIX2PIX_HD constexpr int packed_channels(Format format) { return format == Format::rgba ? 4 : 3; }

// Three components of one pixel: red, green, blue or Y, U, V.
struct Pixel {
  float c[3];
};

// Levels are 0..255, units are -1..1. Division, not a reciprocal: the bits are those of data/images.to_unit.
FASTPIX2PIX_HD float unit_of_level(float level) { return level / 127.5f - 1.0f; }
FASTPIX2PIX_HD float level_of_unit(float unit) { return (unit + 1.0f) * 127.5f; }

// NaN becomes 0: the comparison is written so that it fails.
FASTPIX2PIX_HD float clamp_level(float level) {
  level = level > 0.0f ? level : 0.0f;
  return level < 255.0f ? level : 255.0f;
}

// Nearest, half to even, for 0 <= level <= 255: adding 1.5 * 2^23 leaves no fraction bits.
FASTPIX2PIX_HD std::uint8_t byte_of_level(float level) {
  return static_cast<std::uint8_t>(static_cast<int>((level + 12582912.0f) - 12582912.0f));
}

// Y'CbCr <-> R'G'B' (ITU-R BT.601-7 and BT.709-6, 8 bit). All levels 0..255; made by make_colour.
struct Colour {
  float y_offset, y_scale;               // to RGB: (y - y_offset) * y_scale
  float r_of_v, g_of_u, g_of_v, b_of_u;  // times (u - 128), (v - 128)
  float y_of[3], u_of[3], v_of[3];       // from RGB
};

inline Colour make_colour(Matrix matrix, Range range) {
  const double kr = matrix == Matrix::bt601 ? 0.299 : 0.2126;
  const double kb = matrix == Matrix::bt601 ? 0.114 : 0.0722;
  const double kg = 1.0 - kr - kb;
  const double luma = range == Range::limited ? 219.0 / 255.0 : 1.0;
  const double chroma = range == Range::limited ? 224.0 / 255.0 : 1.0;
  const double u = chroma / (2.0 * (1.0 - kb));  // U - 128 = u * (B - luma of the pixel)
  const double v = chroma / (2.0 * (1.0 - kr));
  const auto f = [](double x) { return static_cast<float>(x); };
  Colour colour;
  colour.y_offset = range == Range::limited ? 16.0f : 0.0f;
  colour.y_scale = f(1.0 / luma);
  colour.r_of_v = f(1.0 / v);
  colour.g_of_u = f(-kb / kg / u);
  colour.g_of_v = f(-kr / kg / v);
  colour.b_of_u = f(1.0 / u);
  const double k[3] = {kr, kg, kb};
  for (int i = 0; i < 3; ++i) {
    colour.y_of[i] = f(luma * k[i]);
    colour.u_of[i] = f(u * ((i == 2) - k[i]));
    colour.v_of[i] = f(v * ((i == 0) - k[i]));
  }
  return colour;
}

FASTPIX2PIX_HD Pixel rgb_of_yuv(Pixel yuv, const Colour& k) {
  const float y = (yuv.c[0] - k.y_offset) * k.y_scale;
  const float u = yuv.c[1] - 128.0f, v = yuv.c[2] - 128.0f;
  return {{y + k.r_of_v * v, (y + k.g_of_u * u) + k.g_of_v * v, y + k.b_of_u * u}};
}

FASTPIX2PIX_HD float y_of_rgb(float r, float g, float b, const Colour& k) {
  return k.y_offset + ((k.y_of[0] * r + k.y_of[1] * g) + k.y_of[2] * b);
}
FASTPIX2PIX_HD float u_of_rgb(float r, float g, float b, const Colour& k) {
  return 128.0f + ((k.u_of[0] * r + k.u_of[1] * g) + k.u_of[2] * b);
}
FASTPIX2PIX_HD float v_of_rgb(float r, float g, float b, const Colour& k) {
  return 128.0f + ((k.v_of[0] * r + k.v_of[1] * g) + k.v_of[2] * b);
}

// The mean of a 2x2 block, which has one U and one V.
FASTPIX2PIX_HD float block_mean(float a, float b, float c, float d) { return ((a + b) + (c + d)) * 0.25f; }

// Where position i of a line of n comes from when it goes on to and fro without repeating its ends
// (runtime/padding.py); a line of one is repeated.
FASTPIX2PIX_HD int reflected(int i, int n) {
  if (n == 1) return 0;
  const int period = 2 * (n - 1);
  i %= period;
  i = i < 0 ? i + period : i;
  return i < n ? i : period - i;
}

}  // namespace fastpix2pix
