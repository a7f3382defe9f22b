// What a conversion is: which pixels go where, and how. Read by the CPU's rows and by CUDA kernels.
#pragma once

#include "frame.hpp"
#include "resample.hpp"

namespace fastpix2pix {

// crop of the frame -> resized to `scaled` -> laid into the network's input at (left, top), borders filled.
struct InputSpec {
  FrameShape frame;
  Rect crop;                        // of the frame, pixels
  int scaled_width, scaled_height;  // of the crop in the network's input
  int left, top;                    // where it lies there
  TensorShape network;
  Filter filter;
  Border border;
  float fill;  // level 0..255 of all three channels, for Border::constant
  Colour colour;

  bool resized() const { return scaled_width != crop.width || scaled_height != crop.height; }
};

// region of the network's output -> resized to the frame.
struct OutputSpec {
  TensorShape network;
  Rect region;  // of the network's output, pixels
  FrameShape frame;
  Filter filter;
  Colour colour;

  bool resized() const { return frame.width != region.width || frame.height != region.height; }
};

// Raise InvalidInput for sizes, rectangles and levels that do not fit together.
void validate(const InputSpec& spec);
void validate(const OutputSpec& spec);

// Both filters of a resize; empty where nothing is resized.
struct Resize {
  Taps rows, columns;
};
Resize make_resize(const InputSpec& spec);
Resize make_resize(const OutputSpec& spec);

}  // namespace fastpix2pix
