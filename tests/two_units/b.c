#include "tfm.h"
#include "tfm.h" /* twice does no harm */

int other_unit(void);

int other_unit(void) {
    tfm_isa isa;
    return tfm_isa_from_name("scalar", &isa, NULL) != TFM_OK || isa != TFM_ISA_SCALAR;
}
