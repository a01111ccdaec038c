// The call of dropout: bounds, strides, threads. The loops are in dropout_rows.hpp. Takes raw addresses; knows no torch.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <vector>

#include "dropout_rows.hpp"
#include "threads.hpp"

namespace nb = nanobind;

namespace twodice {
namespace {

constexpr int64_t kGrain = 32768;   // elements that a thread takes at a time
constexpr int64_t kAlone = 262144;  // elements up to which no second thread is worth its waking (measured)

bool within(const int64_t* values, const int64_t* stride, int64_t rows, int64_t columns, int64_t bound) {
    if (!values) return true;
    for (int64_t b = 0; b < (stride[0] ? rows : 1); ++b)
        for (int64_t t = 0; t < (stride[1] ? columns : 1); ++t)
            if (static_cast<uint64_t>(values[b * stride[0] + t * stride[1]]) >= static_cast<uint64_t>(bound))
                return false;
    return true;
}

using Two = std::tuple<int64_t, int64_t>;
using Four = std::tuple<int64_t, int64_t, int64_t, int64_t>;

void copy(const Two& from, int64_t* to) { std::tie(to[0], to[1]) = from; }
void copy(const Four& from, int64_t* to) { std::tie(to[0], to[1], to[2], to[3]) = from; }

// Returns false, and writes nothing, where a coordinate is out of bounds: the caller finds and names it.
bool dropout(uintptr_t x, uintptr_t y, uintptr_t residual, int code, Four shape, Four x_stride, Four y_stride,
             Four residual_stride, uintptr_t example, Two example_stride, uintptr_t position, Two position_stride,
             uintptr_t column, Two column_stride, bool follow, uint64_t key, uint32_t step, int threshold, int threads,
             int64_t stream_from) {
    Call call;
    call.x = reinterpret_cast<const char*>(x);
    call.y = reinterpret_cast<char*>(y);
    call.residual = reinterpret_cast<const char*>(residual);
    std::tie(call.B, call.H, call.T, call.C) = shape;
    const int64_t rows = call.B * call.H * call.T, total = rows * call.C;
    if (total == 0) return true;
    copy(x_stride, call.x_stride);
    copy(y_stride, call.y_stride);
    copy(residual_stride, call.residual_stride);
    call.example = reinterpret_cast<const int64_t*>(example);
    call.position = reinterpret_cast<const int64_t*>(position);
    call.column = reinterpret_cast<const int64_t*>(column);
    copy(example_stride, call.example_stride);
    copy(position_stride, call.position_stride);
    copy(column_stride, call.column_stride);
    call.follow = call.column && follow;
    constexpr int64_t kWord = int64_t{1} << 32;
    if (!within(call.example, call.example_stride, call.B, call.T, kWord) ||
        !within(call.position, call.position_stride, call.B, call.T, kWord) ||
        !within(call.column, call.column_stride, call.B, call.C, (int64_t{1} << 23) - (follow ? call.C - 1 : 0)))
        return false;
    if (call.column && !call.follow) {
        for (int64_t b = 0; b < call.B; ++b) {
            const int64_t* values = call.column + b * call.column_stride[0];
            int64_t low = values[0], high = values[0];
            for (int64_t i = 1; i < call.C; ++i) {
                low = std::min(low, values[i * call.column_stride[1]]);
                high = std::max(high, values[i * call.column_stride[1]]);
            }
            call.ranges.emplace_back(low, high);
        }
    }
    call.step = step;
    call.rate.threshold = static_cast<uint16_t>(threshold);
    call.rate.scale_double = 65536.0 / (65536 - threshold);
    call.rate.scale = static_cast<float>(call.rate.scale_double);
    const auto unit_stride = [&](const int64_t* stride) { return call.C == 1 || stride[3] == 1; };
    call.dense = unit_stride(call.x_stride) && unit_stride(call.y_stride) &&
                 (!residual || unit_stride(call.residual_stride));
    call.stream = total >= stream_from;
    call.block = call.column && !call.follow ? call.C : kBlock;
    call.blocks = (call.C + call.block - 1) / call.block;
    call.run.set_key(key);
    const int64_t units = rows * call.blocks;
    const int64_t grain = std::max<int64_t>(1, kGrain / std::min(call.C, call.block));
    if (threads <= 1 || total <= kAlone || units <= grain) {
        if (total <= kGrain) {
            all(call, code, 0, units);
        } else {
            nb::gil_scoped_release release;
            all(call, code, 0, units);
        }
        return true;
    }
    nb::gil_scoped_release release;
    parallel_for(units, grain, threads, [&](int64_t begin, int64_t end) { all(call, code, begin, end); });
    return true;
}

std::vector<std::string> simd_levels() {
    return {kSimdNames, kSimdNames + static_cast<int>(best_simd()) + 1};
}

}  // namespace
}  // namespace twodice

void bind_dropout(nb::module_& m) {
    using namespace twodice;
    m.def("dropout", &dropout);
    m.def("simd", [] { return std::string(kSimdNames[static_cast<int>(simd_level().load())]); },
          "The instruction set in use.");
    m.def("simd_levels", &simd_levels, "The instruction sets that this machine has, the least first.");
    m.def("set_simd", [](const std::string& name) {
        const std::vector<std::string> names = simd_levels();
        for (size_t i = 0; i < names.size(); ++i)
            if (names[i] == name) return simd_level().store(static_cast<Simd>(i));
        throw nb::value_error("no such instruction set on this machine");
    });
    m.def("lend_threads", [](uintptr_t team) { Pool::lend(reinterpret_cast<Pool::Team>(team)); },
          "The address of GOMP_parallel in the runtime of OpenMP whose threads are to be used; 0: threads of our own.");
    m.def("hardware_threads", [] { return std::thread::hardware_concurrency(); });
    m.def("philox4x32", [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
        const Words w = philox4x32(c0, c1, c2, c3, key);
        return std::make_tuple(w.w0, w.w1, w.w2, w.w3);
    });
}
