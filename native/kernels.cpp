// The kernels of one instruction set; compiled once for each, with LOKI_ISA as its name.
#include "append.h"
#include "attend.h"
#include "choose.h"
#include "columns.h"
#include "score.h"

namespace loki {
namespace LOKI_ISA {

#define LOKI_TEXT_(x) #x
#define LOKI_TEXT(x) LOKI_TEXT_(x)

extern const Kernels kKernels;
const Kernels kKernels = {
    LOKI_TEXT(LOKI_ISA), kPairDot,      lead_words,     prepare_lead, prepare_rows,   project,
    encode,              tile_logits,   row_logits,     soft_cap,     exponentials,   weigh,
    largest,             settle,        choose,         attend,       merge,          key_panel,
    column_powers,       column_factors, column_add,    differing_bits, sum_words,
};

}  // namespace LOKI_ISA
}  // namespace loki
