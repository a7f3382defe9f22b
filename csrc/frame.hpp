// What a frame and a network tensor are made of in memory. Views own nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "pixels.hpp"

namespace fastpix2pix {

// Bad input from the caller: what was given, what is allowed.
struct InvalidInput : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// The machine or the engine failed.
struct Failed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Rect {
  int x, y, width, height;
};

struct FrameShape {
  Format format;
  int width, height;  // pixels
};

// Planes: packed [H, W, C]; nv12 Y [H, W], UV [ceil(H/2), ceil(W/2), 2]; yuv420 Y, U and V [ceil(H/2), ceil(W/2)].
inline int plane_count(Format format) { return format == Format::nv12 ? 2 : format == Format::yuv420 ? 3 : 1; }

inline int plane_rows(const FrameShape& frame, int plane) { return plane == 0 ? frame.height : (frame.height + 1) / 2; }

// Bytes of one row of a plane, without padding.
inline std::ptrdiff_t plane_width(const FrameShape& frame, int plane) {
  if (!is_yuv(frame.format)) return std::ptrdiff_t{frame.width} * packed_channels(frame.format);
  if (plane == 0) return frame.width;
  return std::ptrdiff_t{(frame.width + 1) / 2} * (frame.format == Format::nv12 ? 2 : 1);
}

template <class Byte>
struct PlanesOf {
  Byte* data[3] = {};
  std::ptrdiff_t stride[3] = {};  // bytes from row to row; any sign
};
using ConstPlanes = PlanesOf<const std::uint8_t>;
using Planes = PlanesOf<std::uint8_t>;

inline ConstPlanes as_const(const Planes& planes) {
  ConstPlanes same;
  for (int p = 0; p < 3; ++p) same.data[p] = planes.data[p], same.stride[p] = planes.stride[p];
  return same;
}

inline std::size_t frame_bytes(const FrameShape& frame) {
  std::size_t bytes = 0;
  for (int p = 0; p < plane_count(frame.format); ++p) bytes += plane_rows(frame, p) * plane_width(frame, p);
  return bytes;
}

// A frame's planes one after the other, without padding, in `memory` of frame_bytes.
inline Planes packed_planes(const FrameShape& frame, std::uint8_t* memory) {
  Planes planes;
  for (int p = 0; p < plane_count(frame.format); ++p) {
    planes.data[p] = memory;
    planes.stride[p] = plane_width(frame, p);
    memory += plane_rows(frame, p) * plane_width(frame, p);
  }
  return planes;
}

// One picture of the network: 3 channels in -1..1.
struct TensorShape {
  int width, height;
  bool channels_last;  // [H, W, 3], else [3, H, W]
  bool half;           // IEEE binary16, else float
};

inline std::size_t tensor_bytes(const TensorShape& tensor) {
  return std::size_t{3} * tensor.width * tensor.height * (tensor.half ? 2 : 4);
}

inline bool operator==(const TensorShape& a, const TensorShape& b) {
  return a.width == b.width && a.height == b.height && a.channels_last == b.channels_last && a.half == b.half;
}

// Where there is no engine the input is the output.
inline void check_identity(const TensorShape& input, const TensorShape& output) {
  if (input == output) return;
  throw InvalidInput("without an engine the network's input and output must be of one size, layout and type");
}

}  // namespace fastpix2pix
