#include "convert.hpp"

#include <algorithm>
#include <string>
#include <type_traits>
#include <utility>

namespace fastpix2pix {
namespace {

constexpr int kMaxThreads = 64;

int checked(int threads) {
  if (threads >= 1 && threads <= kMaxThreads) return threads;
  throw InvalidInput("threads = " + std::to_string(threads) + "; allowed are 1 to " + std::to_string(kMaxThreads));
}

template <class Spec>
const Spec& validated(const Spec& spec) {
  validate(spec);
  return spec;
}

// Row y of a plane, from a byte of it on.
const std::uint8_t* at(const ConstPlanes& frame, int plane, int y, std::ptrdiff_t offset) {
  return frame.data[plane] + y * frame.stride[plane] + offset;
}

// The vertical filter: row y of n sums, over the rows that row_at gives. Rows that weigh nothing are not read.
template <class RowAt>
void sum_rows(TapsView taps, int y, std::ptrdiff_t n, float* sums, const RowAt& row_at) {
  using T = std::remove_const_t<std::remove_pointer_t<decltype(row_at(0))>>;
  rows::TapRows<T> some{};
  bool first = true;
  const auto flush = [&] {
    if (some.count > 0) rows::add(some, first, n, sums), first = false;
    some.count = 0;
  };
  for (int k = 0; k < taps.count; ++k) {
    const float weight = taps.weight[std::ptrdiff_t{k} * taps.out + y];
    if (weight == 0.0f) continue;
    some.src[some.count] = row_at(taps.first[y] + k);
    some.weight[some.count++] = weight;
    if (some.count == rows::kTaps<T>) flush();
  }
  flush();
}

long long area(int width, int height) { return static_cast<long long>(width) * height; }

rows::Rows ordered(Format format, rows::Rows rgb) {
  if (format == Format::bgr) std::swap(rgb.c[0], rgb.c[2]);
  return rgb;
}

}  // namespace

// A row holds the network's or the crop's columns, and chroma pairs that begin one column early.
InputPlan::InputPlan(const InputSpec& spec, int threads, int grain)
    : spec_(validated(spec)),
      resize_(make_resize(spec)),
      pool_(checked(threads), grain),
      scratch_(threads, std::max(spec.network.width, spec.crop.width + 3)) {}

void InputPlan::run(void* network, const ConstPlanes& frame) {
  std::lock_guard lock(mutex_);
  const long long pixels =
      std::max(area(spec_.crop.width, spec_.crop.height), area(spec_.network.width, spec_.network.height));
  pool_.for_rows(spec_.network.height, pixels, [&](int worker, int y) { row(worker, y, network, frame); });
}

void InputPlan::row(int worker, int y, void* network, const ConstPlanes& frame) {
  const int width = spec_.network.width, left = spec_.left, scaled = spec_.scaled_width;
  const rows::Rows line = scratch_.rows(worker, Scratch::kLine);
  int from = y - spec_.top;
  if (from < 0 || from >= spec_.scaled_height) {
    if (spec_.border == Border::constant) {
      for (float* c : line.c) std::fill(c, c + width, spec_.fill);
      return store(line, y, network);
    }
    from = reflected(from, spec_.scaled_height);
  }
  const rows::Rows picture = {{line.c[0] + left, line.c[1] + left, line.c[2] + left}};
  spec_.resized() ? load_resized(worker, from, frame, picture) : load(from, frame, picture);
  if (is_yuv(spec_.frame.format)) rows::yuv_to_rgb(picture, scaled, spec_.colour);
  for (float* c : picture.c) {
    const auto border = [&](int x) { c[x] = spec_.border == Border::reflect ? c[reflected(x, scaled)] : spec_.fill; };
    for (int x = -left; x < 0; ++x) border(x);
    for (int x = scaled; x < width - left; ++x) border(x);
  }
  store(line, y, network);
}

void InputPlan::load(int y, const ConstPlanes& frame, rows::Rows to) const {
  const Format format = spec_.frame.format;
  const Rect& crop = spec_.crop;
  y += crop.y;
  if (!is_yuv(format)) {
    const int channels = packed_channels(format);
    return rows::load_packed(at(frame, 0, y, std::ptrdiff_t{crop.x} * channels), channels, crop.width,
                             ordered(format, to));
  }
  const bool pairs = format == Format::nv12;
  const int column = crop.x / 2 * (pairs ? 2 : 1);
  rows::load_plane(at(frame, 0, y, crop.x), crop.width, to.c[0]);
  rows::load_chroma(at(frame, 1, y / 2, column), pairs ? 2 : 1, crop.x % 2, crop.width, to.c[1]);
  rows::load_chroma(at(frame, pairs ? 1 : 2, y / 2, column + pairs), pairs ? 2 : 1, crop.x % 2, crop.width, to.c[2]);
}

// Vertical sums over the crop's whole width first, then the horizontal filter; chroma is resized as if each of its
// values stood for a 2x2 block.
void InputPlan::load_resized(int worker, int y, const ConstPlanes& frame, rows::Rows to) {
  const Format format = spec_.frame.format;
  const Rect& crop = spec_.crop;
  const TapsView horizontal = resize_.columns.view();
  const auto sum = [&](int plane, int halve, std::ptrdiff_t offset, std::ptrdiff_t n, float* into) {
    sum_rows(resize_.rows.view(), y, n, into,
             [&](int row) { return at(frame, plane, (crop.y + row) >> halve, offset); });
  };
  float* sums = scratch_.row(worker, Scratch::kSums);
  if (!is_yuv(format)) {
    const int channels = packed_channels(format);
    sum(0, 0, std::ptrdiff_t{crop.x} * channels, std::ptrdiff_t{crop.width} * channels, sums);
    return rows::resample(sums, channels, horizontal, ordered(format, to));
  }
  const bool pairs = format == Format::nv12;
  const int step = pairs ? 2 : 1;
  const std::ptrdiff_t begin = crop.x / 2, n = (crop.x + crop.width + 1) / 2 - begin;  // of chroma
  float *u = scratch_.row(worker, Scratch::kSums + 1), *v = pairs ? u + 1 : scratch_.row(worker, Scratch::kSums + 2);
  sum(0, 0, crop.x, crop.width, sums);
  sum(1, 1, begin * step, n * step, u);
  if (!pairs) sum(2, 1, begin, n, v);
  float* pixels = scratch_.row(worker, Scratch::kPixels);
  rows::interleave_yuv(sums, u, v, step, crop.x % 2, crop.width, pixels);
  rows::resample(pixels, 4, horizontal, to);
}

void InputPlan::store(rows::Rows levels, int y, void* network) const {
  const std::ptrdiff_t width = spec_.network.width, plane = width * spec_.network.height;
  const auto into = [&](auto* to) {
    if (spec_.network.channels_last) return rows::store_interleaved(levels, width, to + 3 * y * width);
    for (int c = 0; c < 3; ++c) rows::store_plane(levels.c[c], width, to + c * plane + y * width);
  };
  spec_.network.half ? into(static_cast<rows::Half*>(network)) : into(static_cast<float*>(network));
}

OutputPlan::OutputPlan(const OutputSpec& spec, int threads, int grain)
    : spec_(validated(spec)),
      resize_(make_resize(spec)),
      pool_(checked(threads), grain),
      scratch_(threads, std::max(spec.frame.width, spec.region.width)) {}

void OutputPlan::run(const Planes& frame, const void* network) {
  std::lock_guard lock(mutex_);
  const Format format = spec_.frame.format;
  const std::ptrdiff_t width = spec_.frame.width;
  const long long pixels =
      std::max(area(spec_.region.width, spec_.region.height), area(spec_.frame.width, spec_.frame.height));
  const auto row_of = [&](int plane, int y) { return frame.data[plane] + y * frame.stride[plane]; };
  if (!is_yuv(format)) {
    return pool_.for_rows(spec_.frame.height, pixels, [&](int worker, int y) {
      const rows::Rows line = scratch_.rows(worker, Scratch::kLine);
      load(worker, y, network, line);
      rows::store_packed(ordered(format, line), packed_channels(format), width, row_of(0, y));
    });
  }
  pool_.for_rows((spec_.frame.height + 1) / 2, pixels, [&](int worker, int pair) {
    const rows::Rows top = scratch_.rows(worker, Scratch::kLine);
    rows::Rows bottom = top;  // an odd last row stands for two
    load(worker, 2 * pair, network, top);
    rows::store_luma(top, width, spec_.colour, row_of(0, 2 * pair));
    if (2 * pair + 1 < spec_.frame.height) {
      bottom = scratch_.rows(worker, Scratch::kSecondLine);
      load(worker, 2 * pair + 1, network, bottom);
      rows::store_luma(bottom, width, spec_.colour, row_of(0, 2 * pair + 1));
    }
    const bool pairs = format == Format::nv12;
    std::uint8_t* u = row_of(1, pair);
    rows::store_chroma(top, bottom, width, spec_.colour, pairs ? 2 : 1, u, pairs ? u + 1 : row_of(2, pair));
  });
}

// One row of the frame as clamped levels.
void OutputPlan::load(int worker, int y, const void* network, rows::Rows to) {
  spec_.network.half ? load_units(worker, y, static_cast<const rows::Half*>(network), to)
                     : load_units(worker, y, static_cast<const float*>(network), to);
  rows::to_levels(to, spec_.frame.width);
}

template <class T>
void OutputPlan::load_units(int worker, int y, const T* network, rows::Rows to) {
  const std::ptrdiff_t width = spec_.network.width, plane = width * spec_.network.height;
  const Rect& region = spec_.region;
  const bool last = spec_.network.channels_last;
  // Row y of the region: all three channels, or one plane.
  const auto at = [&](int row, int c) {
    const std::ptrdiff_t pixel = (region.y + row) * width + region.x;
    return last ? network + 3 * pixel : network + c * plane + pixel;
  };
  if (!spec_.resized()) {
    if (last) return rows::load_interleaved(at(y, 0), region.width, to);
    for (int c = 0; c < 3; ++c) rows::load_plane(at(y, c), region.width, to.c[c]);
    return;
  }
  const auto sum = [&](int c, std::ptrdiff_t n) {
    float* into = scratch_.row(worker, Scratch::kSums + c);
    sum_rows(resize_.rows.view(), y, n, into, [&](int row) { return at(row, c); });
    return into;
  };
  const TapsView horizontal = resize_.columns.view();
  if (last) return rows::resample(sum(0, 3 * region.width), 3, horizontal, to);
  const float *a = sum(0, region.width), *b = sum(1, region.width), *c = sum(2, region.width);
  float* pixels = scratch_.row(worker, Scratch::kPixels);
  rows::interleave(a, b, c, region.width, pixels);
  rows::resample(pixels, 4, horizontal, to);
}

}  // namespace fastpix2pix
