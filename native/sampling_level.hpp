// The chain on one row, for one instruction set. Included once for each, inside a namespace of its own (see sampling.cpp).
// No include guard on purpose, and no system header: those belong outside the target region.
#include "sampling_vector.hpp"
#include "sampling_mass.hpp"
#include "sampling_edit.hpp"
#include "sampling_order.hpp"
#include "sampling_row.hpp"
#include "sampling_kept.hpp"
#include "sampling_levels.hpp"
#include "sampling_stages.hpp"
#include "sampling_draw.hpp"
#include "sampling_chain.hpp"
