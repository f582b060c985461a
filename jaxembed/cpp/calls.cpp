// What XLA's executables call: a model's embeddings, products with weights and attention, and sums over its rows, for CPUs.
// `cpu_library.py` compiles this for the machine it runs on, so the compiler knows the vectors that there are.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "crew.h"
#include "linear.h"
#include "matrix.h"
#include "norm.h"
#include "rows.h"
#include "vectors.h"
#include "xla/ffi/api/c_api.h"

namespace {

using namespace jaxembed;

const XLA_FFI_Buffer& argument(const XLA_FFI_CallFrame* frame, int64_t i) {
  return *static_cast<const XLA_FFI_Buffer*>(frame->args.args[i]);
}

float* result(const XLA_FFI_CallFrame* frame, int64_t i) {
  return static_cast<float*>(static_cast<const XLA_FFI_Buffer*>(frame->rets.rets[i])->data);
}

const float* floats(const XLA_FFI_Buffer& buffer) { return static_cast<const float*>(buffer.data); }

// Attributes come in the order of their names.
template <class T> T attribute(const XLA_FFI_CallFrame* frame, int64_t i) {
  return *static_cast<const T*>(static_cast<const XLA_FFI_Scalar*>(frame->attrs.attrs[i])->value);
}

size_t width_of(const XLA_FFI_Buffer& buffer) { return buffer.dims[buffer.rank - 1]; }

// Tokens of a buffer [..., N] that there are: the first ones. What the i-th argument tells, but no more than it has room for.
size_t tokens_of(const XLA_FFI_CallFrame* frame, int64_t i, const XLA_FFI_Buffer& buffer) {
  size_t count = 1;
  for (int64_t axis = 0; axis + 1 < buffer.rank; axis++) count *= buffer.dims[axis];
  const int32_t told = *static_cast<const int32_t*>(argument(frame, i).data);
  return std::min<size_t>(count, std::max(told, 0));
}

// The same of the first argument.
size_t tokens_of(const XLA_FFI_CallFrame* frame, int64_t i) { return tokens_of(frame, i, argument(frame, 0)); }

// The matrix whose kernel and bias follow x and the count of tokens as the i-th ones.
Matrix matrix(const XLA_FFI_CallFrame* frame, int64_t i, float* y) {
  const XLA_FFI_Buffer &kernel = argument(frame, 2 + 2 * i), &bias = argument(frame, 3 + 2 * i);
  return {kernel.data, bias.dims[0] ? floats(bias) : nullptr, y, size_t(kernel.dims[0])};
}

// The norm whose scale and bias are the i-th argument and the next.
Norm norm(const XLA_FFI_CallFrame* frame, int64_t i, float eps) {
  const XLA_FFI_Buffer& bias = argument(frame, i + 1);
  return {floats(argument(frame, i)), bias.dims[0] ? floats(bias) : nullptr, eps};
}

// Whether kernels are in bfloat16; all of a call are of one kind.
bool in_half(const XLA_FFI_CallFrame* frame) { return argument(frame, 2).dtype == XLA_FFI_DataType_BF16; }

// Whether XLA only asks which version of its interface this is made for; then it is told.
bool asked(XLA_FFI_CallFrame* frame) {
  auto* extension = frame->extension_start;  // its type has another name in each version
  if (extension == nullptr || extension->type != XLA_FFI_Extension_Metadata) return false;
  XLA_FFI_Metadata* told = reinterpret_cast<XLA_FFI_Metadata_Extension*>(extension)->metadata;
  told->api_version.major_version = XLA_FFI_API_MAJOR;
  told->api_version.minor_version = XLA_FFI_API_MINOR;
  return true;
}

}  // namespace

// In all of these, what stands behind the tokens that there are is neither read nor written.

// x [..., K], the count of tokens [1], then kernel [N, K] and bias [N] or [0] of each matrix -> y [..., N] of each, room.
// Attribute: activation.
extern "C" XLA_FFI_Error* jaxembed_linear(XLA_FFI_CallFrame* frame) {
  if (asked(frame)) return nullptr;
  const XLA_FFI_Buffer& x = argument(frame, 0);
  const int64_t count = (frame->args.size - 2) / 2;
  std::vector<Matrix> matrices;
  for (int64_t i = 0; i < count; i++) matrices.push_back(matrix(frame, i, result(frame, i)));
  with_way(tokens_of(frame, 1), in_half(frame), {width_of(x)}, [&](auto way) {
    linear(way, floats(x), width_of(x), matrices, Activation(attribute<int32_t>(frame, 0)), result(frame, count));
  });
  return nullptr;
}

// x [..., K], the count of tokens [1], kernel [N, K], bias [N] or [0], residual [..., N], scale [N], the norm's bias [N] or
// [0] -> y [..., N], room. Attribute: eps.
extern "C" XLA_FFI_Error* jaxembed_linear_norm(XLA_FFI_CallFrame* frame) {
  if (asked(frame)) return nullptr;
  const XLA_FFI_Buffer& x = argument(frame, 0);
  with_way(tokens_of(frame, 1), in_half(frame), {width_of(x)}, [&](auto way) {
    linear_norm(way, floats(x), width_of(x), matrix(frame, 0, result(frame, 0)), floats(argument(frame, 4)),
                norm(frame, 5, attribute<float>(frame, 0)), result(frame, 1));
  });
  return nullptr;
}

// x [..., N], the count of tokens [1], then kernel [F, N] and bias [F] or [0], kernel [N, F] and bias [N] or [0], scale [N],
// the norm's bias [N] or [0] -> y [..., N], room. Attributes: activation, between the two; eps.
extern "C" XLA_FFI_Error* jaxembed_feed_forward(XLA_FFI_CallFrame* frame) {
  if (asked(frame)) return nullptr;
  const XLA_FFI_Buffer& x = argument(frame, 0);
  const Matrix up = matrix(frame, 0, nullptr), down = matrix(frame, 1, result(frame, 0));
  with_way(tokens_of(frame, 1), in_half(frame), {width_of(x), up.N}, [&](auto way) {
    feed_forward(way, floats(x), up, Activation(attribute<int32_t>(frame, 0)), down,
                 norm(frame, 6, attribute<float>(frame, 1)), result(frame, 1));
  });
  return nullptr;
}

// x [..., N], the count of tokens [1], then kernel [F, N] and bias [F] or [0] of the gate and of what it is for, kernel [N, F] and
// bias [N] or [0] -> y [..., N], room. Attribute: activation, of the gate.
extern "C" XLA_FFI_Error* jaxembed_gated_feed_forward(XLA_FFI_CallFrame* frame) {
  if (asked(frame)) return nullptr;
  const XLA_FFI_Buffer& x = argument(frame, 0);
  const Matrix gate = matrix(frame, 0, nullptr), up = matrix(frame, 1, nullptr), down = matrix(frame, 2, result(frame, 0));
  with_way(tokens_of(frame, 1), in_half(frame), {width_of(x), up.N}, [&](auto way) {
    gated_feed_forward(way, floats(x), gate, Activation(attribute<int32_t>(frame, 0)), up, down, result(frame, 1));
  });
  return nullptr;
}

// Queries [..., N H], keys and values [..., K H], starts, counts and seen [B], the count of tokens [1] -> [..., N H].
// Attributes: before, behind, how many keys a query sees on either side of its place; half, whether operands may be rounded to
// bfloat16; head_dim, scale.
extern "C" XLA_FFI_Error* jaxembed_attention(XLA_FFI_CallFrame* frame) {
  if (asked(frame)) return nullptr;
  const XLA_FFI_Buffer &query = argument(frame, 0), &key = argument(frame, 1), &starts = argument(frame, 3);
  const size_t width = attribute<int32_t>(frame, 3), before = attribute<int32_t>(frame, 0), behind = attribute<int32_t>(frame, 1);
  const Heads heads{width_of(query) / width, width_of(key) / width, width, attribute<float>(frame, 4), before, behind};
  auto numbers = [&](int64_t i) { return static_cast<const int32_t*>(argument(frame, i).data); };
  attention(floats(query), floats(key), floats(argument(frame, 2)), numbers(3), numbers(4), numbers(5), starts.dims[0],
            tokens_of(frame, 6), heads, attribute<int32_t>(frame, 2) != 0, result(frame, 0));
  return nullptr;
}

// Tables [R, N] and ids [...] each, scale [N], the norm's bias [N] or [0], the count of tokens [1] -> [..., N].
// Attribute: eps.
extern "C" XLA_FFI_Error* jaxembed_embed(XLA_FFI_CallFrame* frame) {
  if (asked(frame)) return nullptr;
  const int64_t count = (frame->args.size - 3) / 2;
  const XLA_FFI_Buffer& first = argument(frame, 0);
  std::vector<Table> tables;
  for (int64_t i = 0; i < count; i++) {
    const XLA_FFI_Buffer& rows = argument(frame, 2 * i);
    tables.push_back({rows.data, size_t(rows.dims[0]), static_cast<const int32_t*>(argument(frame, 2 * i + 1).data)});
  }
  const Norm after = norm(frame, 2 * count, attribute<float>(frame, 0));
  const size_t M = tokens_of(frame, 2 * count + 2, *static_cast<const XLA_FFI_Buffer*>(frame->rets.rets[0]));
  if (first.dtype == XLA_FFI_DataType_BF16) {
    embed<Half>(tables, after, M, width_of(first), result(frame, 0));
  } else {
    embed<float>(tables, after, M, width_of(first), result(frame, 0));
  }
  return nullptr;
}

// x [..., N], weights [B, T], starts and counts [B], the count of tokens [1] -> [B, N].
extern "C" XLA_FFI_Error* jaxembed_totals(XLA_FFI_CallFrame* frame) {
  if (asked(frame)) return nullptr;
  const XLA_FFI_Buffer &x = argument(frame, 0), &weights = argument(frame, 1);
  auto numbers = [&](int64_t i) { return static_cast<const int32_t*>(argument(frame, i).data); };
  const size_t N = width_of(x), T = width_of(weights), M = tokens_of(frame, 4);
  Crew::get().each(weights.dims[0], M * N > 60'000, [&](size_t row) {
    const size_t start = std::min<size_t>(M, std::max(numbers(2)[row], 0));
    const size_t count = std::min({T, M - start, size_t(std::max(numbers(3)[row], 0))});
    weighted_sum(floats(x) + start * N, floats(weights) + row * T, count, N, result(frame, 0) + row * N);
  });
  return nullptr;
}

// A run of a model begins and ends.
extern "C" void jaxembed_begin() { Crew::get().begin(); }
extern "C" void jaxembed_end() { Crew::get().end(); }

// Whether in products with weights in bfloat16 inputs of so many features are rounded to that too.
extern "C" bool jaxembed_in_pairs(int64_t features) { return in_pairs(features); }

// Numbers in float32 that so many tokens need room for.
extern "C" int64_t jaxembed_room(int64_t tokens, int64_t features) { return room_of(tokens, features); }

// Numbers of a vector, for whoever makes room.
extern "C" int64_t jaxembed_lanes() { return LANES; }
