#include "spec.hpp"

#include <string>

namespace fastpix2pix {
namespace {

constexpr int kMaxSide = 32768;  // offsets of one row then fit into 32 bits on the GPU

std::string size(int width, int height) { return std::to_string(width) + "x" + std::to_string(height); }

void check_size(const char* what, int width, int height) {
  if (width >= 1 && height >= 1 && width <= kMaxSide && height <= kMaxSide) return;
  throw InvalidInput(std::string(what) + " of " + size(width, height) + " pixels; allowed are 1 to " +
                     std::to_string(kMaxSide) + " each way");
}

void check_inside(const char* what, const Rect& r, const char* whole, int width, int height) {
  check_size(what, r.width, r.height);
  if (r.x >= 0 && r.y >= 0 && r.x <= width - r.width && r.y <= height - r.height) return;
  throw InvalidInput(std::string(what) + " of " + size(r.width, r.height) + " at (" + std::to_string(r.x) + ", " +
                     std::to_string(r.y) + ") does not lie inside the " + whole + " of " + size(width, height));
}

}  // namespace

void validate(const InputSpec& spec) {
  check_size("a frame", spec.frame.width, spec.frame.height);
  check_size("a network input", spec.network.width, spec.network.height);
  check_inside("a crop", spec.crop, "frame", spec.frame.width, spec.frame.height);
  check_inside("a picture", {spec.left, spec.top, spec.scaled_width, spec.scaled_height}, "network input",
               spec.network.width, spec.network.height);
  if (!(spec.fill >= 0.0f && spec.fill <= 255.0f)) {
    throw InvalidInput("fill = " + std::to_string(spec.fill) + "; allowed are levels 0 to 255");
  }
}

void validate(const OutputSpec& spec) {
  check_size("a frame", spec.frame.width, spec.frame.height);
  check_size("a network output", spec.network.width, spec.network.height);
  check_inside("a region", spec.region, "network output", spec.network.width, spec.network.height);
}

Resize make_resize(const InputSpec& spec) {
  if (!spec.resized()) return {};
  return {make_taps(spec.crop.height, spec.scaled_height, spec.filter),
          make_taps(spec.crop.width, spec.scaled_width, spec.filter)};
}

Resize make_resize(const OutputSpec& spec) {
  if (!spec.resized()) return {};
  return {make_taps(spec.region.height, spec.frame.height, spec.filter),
          make_taps(spec.region.width, spec.frame.width, spec.filter)};
}

}  // namespace fastpix2pix
