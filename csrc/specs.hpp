// Conversions in Python's words: names, sizes as (height, width), boxes as (top, left, height, width).
#pragma once

#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "arguments.hpp"
#include "ring.hpp"
#include "spec.hpp"

namespace fastpix2pix::python {

constexpr Names<Format, 5> kFormats = {{{"rgb", Format::rgb},
                                        {"bgr", Format::bgr},
                                        {"rgba", Format::rgba},
                                        {"nv12", Format::nv12},
                                        {"yuv420", Format::yuv420}}};
constexpr Names<Filter, 3> kFilters = {
    {{"bilinear", Filter::bilinear}, {"bicubic", Filter::bicubic}, {"area", Filter::area}}};
constexpr Names<Border, 2> kBorders = {{{"reflect", Border::reflect}, {"constant", Border::constant}}};
constexpr Names<Matrix, 2> kMatrices = {{{"bt601", Matrix::bt601}, {"bt709", Matrix::bt709}}};
constexpr Names<Range, 2> kRanges = {{{"limited", Range::limited}, {"full", Range::full}}};
constexpr Names<bool, 2> kLayouts = {{{"nchw", false}, {"nhwc", true}}};
constexpr Names<bool, 2> kTypes = {{{"float32", false}, {"float16", true}}};
constexpr Names<Policy, 3> kPolicies = {
    {{"block", Policy::block}, {"drop-oldest", Policy::drop_oldest}, {"drop-newest", Policy::drop_newest}}};

using Size = std::pair<int, int>;            // height, width
using Box = std::tuple<int, int, int, int>;  // top, left, height, width

inline Rect rect(const Box& box) { return {std::get<1>(box), std::get<0>(box), std::get<3>(box), std::get<2>(box)}; }

inline FrameShape frame_shape(const std::string& format, const Size& size) {
  return {named("format", format, kFormats), size.second, size.first};
}

inline TensorShape tensor_shape(const Size& size, const std::string& layout, const std::string& dtype) {
  return {size.second, size.first, named("layout", layout, kLayouts), named("dtype", dtype, kTypes)};
}

inline Colour colour(const std::string& matrix, const std::string& range) {
  return make_colour(named("matrix", matrix, kMatrices), named("range", range, kRanges));
}

inline InputSpec input_spec(const std::string& format, const Size& frame, const Size& network,
                            const std::optional<Box>& crop, const std::optional<Box>& place, const std::string& border,
                            float fill, const std::string& filter, const std::string& matrix, const std::string& range,
                            const std::string& layout, const std::string& dtype) {
  InputSpec spec;
  spec.frame = frame_shape(format, frame);
  spec.crop = crop ? rect(*crop) : Rect{0, 0, frame.second, frame.first};
  const Rect placed = place ? rect(*place) : Rect{0, 0, network.second, network.first};
  spec.scaled_width = placed.width;
  spec.scaled_height = placed.height;
  spec.left = placed.x;
  spec.top = placed.y;
  spec.network = tensor_shape(network, layout, dtype);
  spec.filter = named("filter", filter, kFilters);
  spec.border = named("border", border, kBorders);
  spec.fill = fill;
  spec.colour = colour(matrix, range);
  validate(spec);
  return spec;
}

inline OutputSpec output_spec(const std::string& format, const Size& frame, const Size& network,
                              const std::optional<Box>& region, const std::string& filter, const std::string& matrix,
                              const std::string& range, const std::string& layout, const std::string& dtype) {
  OutputSpec spec;
  spec.frame = frame_shape(format, frame);
  spec.network = tensor_shape(network, layout, dtype);
  spec.region = region ? rect(*region) : Rect{0, 0, network.second, network.first};
  spec.filter = named("filter", filter, kFilters);
  spec.colour = colour(matrix, range);
  validate(spec);
  return spec;
}

inline const char* format_name(const FrameShape& shape) { return name_of(shape.format, kFormats); }

}  // namespace fastpix2pix::python
