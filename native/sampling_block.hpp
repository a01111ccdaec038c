// The unit in which the sampler looks at a row.
#pragma once

#include <cstdint>

namespace twodice {

constexpr int64_t kBlock = 128;  // ids, or their values

}  // namespace twodice
