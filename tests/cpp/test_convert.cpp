// The CPU's rows give the same bits as the pixel functions that a CUDA thread runs; plans allocate nothing when they
// run.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "allocations.hpp"
#include "check.hpp"
#include "convert.hpp"
#include "latency.hpp"
#include "sample.hpp"

using namespace fastpix2pix;

namespace {

constexpr Format kFormats[] = {Format::rgb, Format::bgr, Format::rgba, Format::nv12, Format::yuv420};

// A frame whose rows lie `padding` bytes apart, in memory that is watched for writes beside the rows.
struct TestFrame {
  TestFrame(const FrameShape& shape, std::ptrdiff_t padding, unsigned seed) : shape(shape) {
    std::ptrdiff_t at = padding;
    for (int p = 0; p < plane_count(shape.format); ++p) {
      planes.stride[p] = plane_width(shape, p) + padding;
      offset[p] = at;
      at += planes.stride[p] * plane_rows(shape, p);
    }
    bytes.resize(static_cast<std::size_t>(at));
    std::mt19937 random(seed);
    for (auto& byte : bytes) byte = static_cast<std::uint8_t>(random());
    for (int p = 0; p < plane_count(shape.format); ++p) planes.data[p] = bytes.data() + offset[p];
  }

  FrameShape shape;
  Planes planes;
  std::ptrdiff_t offset[3] = {};
  std::vector<std::uint8_t> bytes;
};

template <class T>
std::vector<T> tensor(const TensorShape& shape, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> units(-1.2f, 1.2f);
  std::vector<T> values(static_cast<std::size_t>(3) * shape.width * shape.height);
  for (T& value : values) value = static_cast<T>(units(random));
  for (std::size_t i = 5; i < values.size(); i += 97) values[i] = static_cast<T>(std::nanf(""));
  return values;
}

// A row of the network's input as blocks of CUDA threads make it: `at_once` columns of the crop, then the next.
template <Format kFormat>
std::vector<Pixel> resized_row(const InputSampler& sampler, const ConstPlanes& frame, int y, int at_once) {
  const int row = sampler.row(y), width = sampler.spec.crop.width;
  std::vector<Pixel> sums(at_once), levels(sampler.spec.network.width);
  for (int begin = 0; row >= 0 && begin < width; begin += at_once) {
    const int end = std::min(begin + at_once, width);
    for (int i = begin; i < end; ++i) sums[i - begin] = sampler.down<kFormat>(frame, i, row);
    for (int x = 0; x < static_cast<int>(levels.size()); ++x) {
      if (sampler.column(x) >= 0) sampler.across(sums.data(), begin, end, sampler.column(x), levels[x]);
    }
  }
  return levels;
}

template <class T>
void compare_input(const InputSpec& spec, int threads) {
  const TestFrame frame(spec.frame, 3, 1);
  const Resize resize = make_resize(spec);
  std::vector<T> rows = tensor<T>(spec.network, 2), pixels = tensor<T>(spec.network, 3);
  InputPlan(spec, threads, 1).run(rows.data(), as_const(frame.planes));
  const InputSampler sampler{spec, resize.rows.view(), resize.columns.view()};
  const ConstPlanes planes = as_const(frame.planes);
  with_format(spec.frame.format, [&](auto constant) {
    constexpr Format format = constant();
    for (int y = 0; y < spec.network.height; ++y) {
      std::vector<Pixel> levels;
      if (spec.resized()) levels = resized_row<format>(sampler, planes, y, 7);
      for (int x = 0; x < spec.network.width; ++x) {
        const int column = sampler.column(x), row = sampler.row(y);
        const bool filled = column < 0 || row < 0;
        Pixel p = filled           ? sampler.fill()
                  : levels.empty() ? sampler.at<format>(planes, spec.crop.x + column, spec.crop.y + row)
                                   : levels[x];
        store_pixel(pixels.data(), spec.network, x, y, filled ? p : sampler.units<format>(p));
      }
    }
  });
  CHECK(std::memcmp(rows.data(), pixels.data(), rows.size() * sizeof(T)) == 0);
}

template <class T>
void compare_output(const OutputSpec& spec, int threads) {
  TestFrame rows(spec.frame, 3, 1), pixels(spec.frame, 3, 1);  // equal beside the rows too
  const Resize resize = make_resize(spec);
  const std::vector<T> network = tensor<T>(spec.network, 2);
  OutputPlan(spec, threads, 1).run(rows.planes, network.data());
  const OutputSampler sampler{spec, resize.rows.view(), resize.columns.view()};
  with_format(spec.frame.format, [&](auto constant) {
    constexpr Format format = constant();
    const int width = spec.frame.width, height = spec.frame.height;
    if constexpr (is_yuv(format)) {
      for (int y = 0; y < (height + 1) / 2; ++y) {
        for (int x = 0; x < (width + 1) / 2; ++x) store_yuv_block<format>(sampler, pixels.planes, network.data(), x, y);
      }
    } else {
      for (int y = 0; y < height; ++y) {
        for (int x = 0; x < width; ++x) store_packed_pixel<format>(pixels.planes, x, y, sampler(network.data(), x, y));
      }
    }
  });
  CHECK(rows.bytes == pixels.bytes);
}

struct Geometry {
  int frame_width, frame_height;
  Rect crop;
  int network_width, network_height;
  Rect place;
};

constexpr Geometry kGeometries[] = {
    {16, 12, {0, 0, 16, 12}, 16, 12, {0, 0, 16, 12}},  // as it is
    {17, 11, {0, 0, 17, 11}, 17, 11, {0, 0, 17, 11}},  // odd
    {1, 1, {0, 0, 1, 1}, 1, 1, {0, 0, 1, 1}},          // one pixel
    {1, 1, {0, 0, 1, 1}, 5, 4, {2, 1, 1, 1}},          // one pixel, repeated
    {2, 3, {0, 0, 2, 3}, 16, 16, {9, 5, 2, 3}},        // reflected to and fro
    {801, 2, {0, 0, 801, 2}, 801, 2, {0, 0, 801, 2}},  // longer than a bite
    {19, 13, {5, 3, 8, 6}, 8, 6, {0, 0, 8, 6}},        // odd crop
    {53, 37, {0, 0, 53, 37}, 16, 16, {0, 0, 16, 16}},  // reduced
    {7, 5, {0, 0, 7, 5}, 24, 16, {0, 0, 24, 16}},      // enlarged
    {51, 33, {3, 1, 45, 31}, 32, 32, {0, 5, 32, 22}},  // letterbox of an odd crop
    {41, 80, {0, 0, 41, 80}, 3, 2, {0, 0, 3, 2}},      // more rows in a window than are added at once
};

template <class Body>
void for_everything(const Body& body) {
  for (const Geometry& g : kGeometries) {
    for (const Format format : kFormats) {
      for (const bool channels_last : {false, true}) {
        for (const Filter filter : {Filter::bilinear, Filter::bicubic, Filter::area}) {
          body(g, format, channels_last, filter, make_colour(Matrix::bt601, Range::full));
          body(g, format, channels_last, filter, make_colour(Matrix::bt709, Range::limited));
        }
      }
    }
  }
}

InputSpec input_spec(const Geometry& g, Format format, bool channels_last, bool half, Filter filter, Border border,
                     const Colour& colour) {
  return {{format, g.frame_width, g.frame_height},
          g.crop,
          g.place.width,
          g.place.height,
          g.place.x,
          g.place.y,
          {g.network_width, g.network_height, channels_last, half},
          filter,
          border,
          114.0f,
          colour};
}

void rows_are_pixels_on_the_way_in() {
  for_everything([](const Geometry& g, Format format, bool last, Filter filter, const Colour& colour) {
    for (const Border border : {Border::reflect, Border::constant}) {
      compare_input<float>(input_spec(g, format, last, false, filter, border, colour), 1);
      compare_input<rows::Half>(input_spec(g, format, last, true, filter, border, colour), 3);
    }
  });
}

void rows_are_pixels_on_the_way_out() {
  for_everything([](const Geometry& g, Format format, bool last, Filter filter, const Colour& colour) {
    const FrameShape frame{format, g.frame_width, g.frame_height};
    const TensorShape network{g.network_width, g.network_height, last, false};
    compare_output<float>({network, g.place, frame, filter, colour}, 1);
    TensorShape half = network;
    half.half = true;
    compare_output<rows::Half>({half, g.place, frame, filter, colour}, 3);
  });
}

void plans_allocate_nothing() {
  const Geometry& g = kGeometries[9];
  const Colour colour = make_colour(Matrix::bt709, Range::limited);
  const InputSpec in = input_spec(g, Format::nv12, false, true, Filter::bicubic, Border::reflect, colour);
  const OutputSpec out{in.network, g.place, in.frame, Filter::bicubic, colour};
  const TestFrame frame(in.frame, 0, 1);
  TestFrame back(in.frame, 0, 2);
  std::vector<rows::Half> network = tensor<rows::Half>(in.network, 3);
  InputPlan to_network(in, 2, 1);
  OutputPlan to_frame(out, 2, 1);
  const long before = allocations();
  for (int i = 0; i < 100; ++i) {
    to_network.run(network.data(), as_const(frame.planes));
    to_frame.run(back.planes, network.data());
  }
  CHECK(allocations() == before);
}

void several_threads_may_use_one_plan() {
  const Geometry& g = kGeometries[7];
  const InputSpec spec = input_spec(g, Format::rgb, true, false, Filter::area, Border::reflect, {});
  const TestFrame frame(spec.frame, 3, 1);
  InputPlan plan(spec, 2, 1);
  std::vector<float> wanted = tensor<float>(spec.network, 2);
  plan.run(wanted.data(), as_const(frame.planes));
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      for (int k = 0; k < 50; ++k) {
        std::vector<float> got = tensor<float>(spec.network, i);
        plan.run(got.data(), as_const(frame.planes));
        CHECK(got == wanted);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// The hardest sizes of a resize: windows stay inside the line and weigh 1.
void windows_of_a_resize() {
  for (const Filter filter : {Filter::bilinear, Filter::bicubic, Filter::area}) {
    for (const int in : {1, 2, 3, 7, 255, 256, 1080, 32768}) {
      for (const int out : {1, 2, 3, 7, 255, 256, 1080}) {
        const Taps taps = make_taps(in, out, filter);
        CHECK(taps.count >= 1 && taps.count <= in);
        for (int i = 0; i < out; ++i) {
          CHECK(taps.first[i] >= 0 && taps.first[i] + taps.count <= in);
          double sum = 0.0;
          for (int k = 0; k < taps.count; ++k) sum += taps.weight[static_cast<std::size_t>(k) * out + i];
          CHECK(std::fabs(sum - 1.0) < 1e-4);
        }
      }
    }
  }
}

void strange_units_become_levels() {
  const float nan = std::nanf(""), infinity = HUGE_VALF;
  CHECK(byte_of_level(clamp_level(level_of_unit(nan))) == 0);
  CHECK(byte_of_level(clamp_level(level_of_unit(infinity))) == 255);
  CHECK(byte_of_level(clamp_level(level_of_unit(-infinity))) == 0);
  for (int level = 0; level < 256; ++level) {
    const float value = static_cast<float>(level);
    CHECK(byte_of_level(value) == level);
    CHECK(byte_of_level(clamp_level(level_of_unit(unit_of_level(value)))) == level);
    if (level < 255) CHECK(byte_of_level(value + 0.5f) == (level % 2 ? level + 1 : level));  // half to even
  }
}

void latency_histogram() {
  using std::chrono::nanoseconds;
  Latency latency;
  CHECK(latency.count() == 0 && latency.quantile_ms(0.5) == 0.0 && latency.max_ms() == 0.0);
  for (int i = 1; i <= 1000; ++i) latency.add(nanoseconds(i * 1000));  // 1 to 1000 us
  CHECK(latency.count() == 1000);
  for (const double q : {0.001, 0.5, 0.95, 0.99, 1.0}) {
    const double exact = q;  // milliseconds
    CHECK(latency.quantile_ms(q) >= exact && latency.quantile_ms(q) <= exact * 1.125);
  }
  CHECK(latency.max_ms() == 1.0 && latency.quantile_ms(1.0) == 1.0);
  Latency extremes;
  extremes.add(nanoseconds(-5));  // a clock that went back counts as nothing
  extremes.add(nanoseconds::max());
  CHECK(extremes.quantile_ms(0.5) == 0.0);
  CHECK(extremes.quantile_ms(1.0) == extremes.max_ms());
  for (std::int64_t ns = 0; ns < 4096; ++ns) {
    Latency one;
    one.add(nanoseconds(ns));
    CHECK(one.quantile_ms(0.5) == static_cast<double>(ns) * 1e-6);  // never above the largest
  }
}

void refusals() {
  const Geometry& g = kGeometries[0];
  InputSpec spec = input_spec(g, Format::rgb, false, false, Filter::area, Border::reflect, {});
  CHECK_THROWS(InvalidInput, "threads = 0; allowed are 1 to 64", InputPlan(spec, 0));
  spec.crop.x = 1;
  CHECK_THROWS(InvalidInput, "does not lie inside the frame of 16x12", InputPlan(spec, 1));
  CHECK_THROWS(InvalidInput, "a network output of 0x4 pixels",
               OutputPlan({{0, 4, false, false}, {0, 0, 1, 1}, spec.frame, Filter::area, {}}, 1));
}

}  // namespace

int main() {
  return check::run({{"rows_are_pixels_on_the_way_in", rows_are_pixels_on_the_way_in},
                     {"rows_are_pixels_on_the_way_out", rows_are_pixels_on_the_way_out},
                     {"plans_allocate_nothing", plans_allocate_nothing},
                     {"several_threads_may_use_one_plan", several_threads_may_use_one_plan},
                     {"windows_of_a_resize", windows_of_a_resize},
                     {"strange_units_become_levels", strange_units_become_levels},
                     {"latency_histogram", latency_histogram},
                     {"refusals", refusals}});
}
